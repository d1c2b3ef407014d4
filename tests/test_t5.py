"""The whole way of a T5: captioned shards, features and codes, a GPT of one process and of two, GenEval's folders."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.models.gpt import load_gpt
from autoregressive.sample import sample_t2i_ddp
from autoregressive.train import extract_codes_c2i, extract_text, train_t2i
from tests.conftest import call, command, export_models, losses
from tests.test_captions import png, write_tar
from tests.test_codes import extract_options
from tests.test_text_features import write_t5
from tests.test_text_training import text_options
from utils.text_encoders import EncoderRecord, T5TextEncoder
from utils.text_shards import open_text

CAPTIONS = "a dark square. The cat of a dog", "a grey square. The dog of the cat", "a light square. White", "a white square. Dog"
STEPS = 5


class Extracted(NamedTuple):
    """Codes of the shards, with the features of their captions in `codes/text`; the same apart, in `bare` and `text`."""

    t5: Path
    tokenizer: Path
    codes: Path
    bare: Path
    text: Path


@pytest.fixture(scope="module")
def extracted(tmp_path_factory) -> Extracted:
    """Two shards of four images each, through the tokenizer and the T5 by their commands."""
    folder = tmp_path_factory.mktemp("t5")
    for shard in range(2):
        numbers = range(4 * shard, 4 * shard + 4)
        images = {f"{number}.png": png(10 + 30 * number) for number in numbers}
        captions = {f"{number}.txt": CAPTIONS[number % 4].encode() for number in numbers}
        write_tar(folder / "data" / f"{shard}.tar", dict(sorted((images | captions).items())))
    made = Extracted(write_t5(folder / "encoder"), export_models(folder / "models")[1],
                     *(folder / name for name in ("codes", "bare", "text")))
    call(extract_codes_c2i.main, *extract_options(folder / "data", made.tokenizer, made.bare))
    call(extract_text.main, "--data-path", folder / "data", "--text-encoder", "t5", "--text-encoder-path", made.t5,
         "--text-length", 8, "--short-captions", "first-sentence", "--device", "cpu", "--text-path", made.text)
    shutil.copytree(made.bare, made.codes)
    shutil.copytree(made.text, made.codes / "text")
    return made


def options(codes: Path, run: Path, **extra: object) -> list:
    """The command line of train_t2i.py, which needs no --condition; half of the captions are short."""
    given = {"short_captions": 0.5, "global_batch_size": 4} | extra
    line = text_options(codes, run, STEPS, **given)
    at = line.index("--condition")
    return line[:at] + line[at + 2 :]


@pytest.fixture(scope="module")
def trained(extracted, tmp_path_factory) -> Path:
    """The run folder of one process."""
    run = tmp_path_factory.mktemp("trained") / "run"
    call(train_t2i.main, *options(extracted.codes, run, data_parallel="none"))
    return run


def test_features_are_those_of_the_t5(extracted):
    """The rows of the shards in their order, whole captions and first sentences, as `transformers` encodes them."""
    header, features, starts, lengths, _ = open_text(extracted.text)
    encoder = T5TextEncoder(str(extracted.t5), 8, torch.device("cpu"), False)
    assert header.record.encoder_fingerprint == encoder.fingerprint and (header.images, header.crops) == (8, 2)
    for row in range(8):
        whole = CAPTIONS[row % 4].lower()
        for crop, text in enumerate((whole, whole.partition(".")[0])):
            expected, mask = encoder.encode([text])
            stored = features[starts[row, crop] :][: lengths[row, crop]].copy()
            assert lengths[row, crop] == mask.sum()
            assert torch.allclose(torch.from_numpy(stored).view(torch.bfloat16).float(), expected[0][mask[0]], atol=1e-2)


def test_short_captions_change_what_is_learnt(extracted, trained, tmp_path):
    """Otherwise the equal losses of processes would say nothing of the draw."""
    call(train_t2i.main, *options(extracted.codes, tmp_path / "run", data_parallel="none", short_captions=0))
    assert losses(tmp_path / "run") != pytest.approx(losses(trained), abs=1e-4)


@pytest.mark.parametrize("mode, elsewhere", [("ddp", False), ("fsdp", True)])
def test_two_processes_train_like_one(extracted, trained, tmp_path, mode, elsewhere):
    """Which caption an image has in an epoch is no matter of processes, nor of where the features lie."""
    codes, place = (extracted.bare, {"text_path": extracted.text}) if elsewhere else (extracted.codes, {})
    line = options(codes, tmp_path / "two", data_parallel=mode, **place)
    command("autoregressive/train/train_t2i.py", *line, processes=2)
    assert len(losses(trained)) == STEPS and losses(tmp_path / "two") == pytest.approx(losses(trained), abs=2e-5)
    assert load_gpt(tmp_path / "two").provenance.encoder == load_gpt(trained).provenance.encoder


def test_prompts_become_folders_of_geneval(extracted, trained, tmp_path):
    """The GPT names its T5: the prompts' file and the two models are all that the sampler is given."""
    record = EncoderRecord.of(load_gpt(trained).provenance.encoder, "run")
    assert (record.encoder, record.encoder_path, record.text_width) == ("t5", str(extracted.t5), 16)
    lines = [{"tag": "colors", "include": [], "prompt": text} for text in ("a white cat", "the dog of the cat")]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    call(sample_t2i_ddp.main, "--gpt-ckpt", trained, "--vq-ckpt", extracted.tokenizer, "--prompts", tmp_path / "metadata.jsonl",
         "--per-prompt", 2, "--batch-size", 4, "--layout", "geneval", "--out", tmp_path / "x.npz", "--device", "cpu")
    with np.load(tmp_path / "x.npz") as samples:
        images, about = samples["arr_0"], json.loads(str(samples["options"]))
        assert images.shape == (4, 32, 32, 3) and len(np.unique(images.reshape(4, -1), axis=0)) == 4
        assert about["text_encoder"] == record.encoder_fingerprint and about["text_length"] == 8
    for number, line in enumerate(lines):
        folder = tmp_path / "x" / f"{number:05d}"
        assert json.loads((folder / "metadata.jsonl").read_text()) == line
        for sample in range(2):
            assert np.array_equal(np.array(Image.open(folder / "samples" / f"{sample:04d}.png")), images[2 * number + sample])
