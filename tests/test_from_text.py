"""From captioned images to a GPT, its held-out bits and its samples, by the commands alone."""

import json

import numpy as np
import pytest

from autoregressive.models.gpt import load_gpt
from autoregressive.sample import sample_t2i_ddp
from autoregressive.train import evaluate_c2i, extract_codes_c2i, extract_text, train_c2i
from tests.conftest import call, export_models, losses
from tests.test_captions import WORDS, write_npz
from tests.test_codes import extract_options
from tests.test_text_training import text_options
from utils.text_encoders import EncoderRecord


def test_captioned_images_become_a_gpt(tmp_path, capsys):
    """Codes and features are extracted apart and meet in the trainer, which learns shapes and encoder from them."""
    data, (_, tokenizer) = write_npz(tmp_path / "data"), export_models(tmp_path / "models")
    codes, run = tmp_path / "codes", tmp_path / "run"
    call(extract_codes_c2i.main, *extract_options(data, tokenizer, codes))
    features = ["--data-path", data, "--text-encoder", "hashed", "--text-width", 32, "--text-length", 6, "--device", "cpu"]
    call(extract_text.main, *features, "--text-path", codes / "text")
    options = text_options(codes, run, steps=6, data_parallel="none", global_batch_size=4, val_code_path=codes, eval_every=3)
    call(train_c2i.main, *options)
    gpt, bits = load_gpt(run), losses(run, "eval/bits_per_image")
    assert (gpt.config.condition, gpt.config.caption_length, gpt.config.caption_dim) == ("text", 6, 32)
    assert EncoderRecord.of(gpt.provenance.encoder, "run").encoder == "hashed" and bits[6] < bits[3]
    call(evaluate_c2i.main, "--gpt-ckpt", run, "--code-path", codes, "--out", tmp_path / "bits.json", "--device", "cpu")
    assert json.loads((tmp_path / "bits.json").read_text())["bits_per_image"] == pytest.approx(bits[6], rel=1e-4)
    (tmp_path / "prompts.txt").write_text("\n".join(WORDS))
    call(sample_t2i_ddp.main, "--gpt-ckpt", run, "--vq-ckpt", tokenizer, "--prompts", tmp_path / "prompts.txt", "--batch-size", 4,
         "--out", tmp_path / "x.npz", "--device", "cpu")  # encoder and guidance come with the GPT
    with np.load(tmp_path / "x.npz") as samples:
        assert samples["arr_0"].shape == (4, 32, 32, 3) and samples["captions"].tolist() == list(WORDS)
    capsys.readouterr()
    call(extract_text.main, *features[:-4], "--text-length", 5, "--device", "cpu", "--text-path", tmp_path / "others")
    (codes / "text").rename(tmp_path / "before")
    (tmp_path / "others").rename(codes / "text")
    with pytest.raises(SystemExit):
        call(evaluate_c2i.main, "--gpt-ckpt", run, "--code-path", codes, "--device", "cpu")
    assert "captions of caption_length 5" in capsys.readouterr().err
