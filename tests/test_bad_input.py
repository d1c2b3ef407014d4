"""Mistakes of the user: one clear sentence, exit code 2, no traceback, before any long work."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from autoregressive.models.gpt import GPT
from autoregressive.sample import sample_c2i, sample_c2i_ddp
from autoregressive.train import extract_codes_c2i, train_c2i
from tests.conftest import TINY_GPT, call, command, randomise
from tests.test_codes import extract_options, write_codes
from tests.test_train import gpt_options
from tokenizer.tokenizer_image import vq_train
from utils.checkpoint import export


def refused(capsys, main, *arguments) -> str:
    """Run an entry point that must refuse; returns its one sentence."""
    with pytest.raises(SystemExit) as stopped:
        call(main, *arguments)
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(lines) == 1 and lines[0].endswith(".")
    return lines[0]


def vq(images: Path, run_dir: Path, *extra) -> list:
    """A short tokenizer command line."""
    return ["--data-path", images, "--run-dir", run_dir, "--vq-model", "VQ-8-small", "--image-size", 32, "--steps", 2,
            "--global-batch-size", 4, "--perceptual-net", "random", "--num-workers", 0, "--device", "cpu", *extra]


def test_missing_data_folder(capsys, tmp_path):
    """The commonest mistake of all."""
    sentence = refused(capsys, vq_train.main, *vq(tmp_path / "nowhere", tmp_path / "run"))
    assert "--data-path" in sentence and "nowhere" in sentence


def test_empty_class_folder(capsys, images_folder, tmp_path):
    """A half-copied data set shifts every class after the gap."""
    (images_folder / "class9").mkdir()
    assert "class9" in refused(capsys, vq_train.main, *vq(images_folder, tmp_path / "run"))


def test_npz_without_labels(capsys, tmp_path):
    """The sentence names the keys the file has."""
    np.savez(tmp_path / "x.npz", images=np.zeros((4, 32, 32, 3), np.uint8))
    sentence = refused(capsys, vq_train.main, *vq(tmp_path / "x.npz", tmp_path / "run"))
    assert "labels" in sentence and "images" in sentence


def test_truncated_image_is_skipped_and_counted(images_folder, tmp_path):
    """Not an error: the run goes on, and says at the end how many it met."""
    bad = images_folder / "class0" / "0.png"
    bad.write_bytes(bad.read_bytes()[:150])
    done = command("tokenizer/tokenizer_image/vq_train.py",
                   *vq(images_folder, tmp_path / "run", "--codebook-sizes", 8, 16, "--epochs", 1, "--steps", 6))
    assert "class0/0.png" in done.stderr and "1 of 24 images were unreadable" in done.stderr


def test_stage_two_without_stage_one(capsys, images_folder, tmp_path):
    """Stage 2 alone from random weights is not the method."""
    sentence = refused(capsys, vq_train.main, *vq(images_folder, tmp_path / "run", "--stage", "dual"))
    assert "--init-from" in sentence


def test_quantizer_without_that_stage(capsys, images_folder, tmp_path):
    """Each quantizer has its own stages, and the sentence names them."""
    for quantizer, stage, names in (("product", "semantic", "--stage single"), ("dual", "single", "--stage semantic and dual")):
        options = vq(images_folder, tmp_path / "run", "--quantizer", quantizer, "--stage", stage)
        assert names in refused(capsys, vq_train.main, *options)


def test_unknown_model_and_odd_size(capsys, images_folder, tmp_path):
    """The sentence lists what there is."""
    assert "VQ-16" in refused(capsys, vq_train.main, *vq(images_folder, tmp_path / "run", "--vq-model", "VQ-7"))
    assert "multiple of 8" in refused(capsys, vq_train.main, *vq(images_folder, tmp_path / "run", "--image-size", 36))


def test_batch_larger_than_the_data(capsys, images_folder, tmp_path):
    """Otherwise an epoch has no step and the run ends at once, silently."""
    sentence = refused(capsys, vq_train.main, *vq(images_folder, tmp_path / "run", "--global-batch-size", 64))
    assert "64" in sentence and "24" in sentence


def test_unwritable_output_folder(capsys, images_folder, tmp_path):
    """Noticed before the training, not after it."""
    (tmp_path / "file").write_text("in the way")
    sentence = refused(capsys, vq_train.main, *vq(images_folder, tmp_path / "file" / "run"))
    assert "--run-dir" in sentence and "cannot be written" in sentence


@pytest.mark.parametrize("changed, names", [
    (["--num-classes", "5"], ("num_classes 3", "5")),
    (["--image-size", "64"], ("grid_size 4", "8")),
])
def test_codes_that_do_not_fit_the_model(capsys, tmp_path, changed, names):
    """A silent class-count or grid mistake trains a model of nothing."""
    codes = write_codes(tmp_path / "codes")
    sentence = refused(capsys, train_c2i.main, *gpt_options(codes, tmp_path / "run"), *changed)
    assert all(name in sentence for name in names)


def test_codes_of_another_tokenizer(capsys, tmp_path):
    """Resuming on codes of another tokenizer would go on with a meaningless vocabulary."""
    options = dict(data_parallel="none", steps=2)
    call(train_c2i.main, *gpt_options(write_codes(tmp_path / "a", tokenizer="first"), tmp_path / "run", **options))
    other = write_codes(tmp_path / "b", tokenizer="second")
    sentence = refused(capsys, train_c2i.main, *gpt_options(other, tmp_path / "run", **options))
    assert "tokenizer first" in sentence and "second" in sentence


def test_held_out_codes_that_do_not_fit(capsys, tmp_path):
    """Found before the first step, not as an index error in the first evaluation."""
    options = gpt_options(write_codes(tmp_path / "codes"), tmp_path / "run", val_code_path=tmp_path / "held-out")
    options = options[: options.index("--codebook-sizes")]
    assert "--val-code-path" in refused(capsys, train_c2i.main, *options)
    write_codes(tmp_path / "held-out", tokenizer="other")
    assert "--val-code-path" in (sentence := refused(capsys, train_c2i.main, *options)) and "codes of other" in sentence
    path = tmp_path / "held-out" / "header.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer": "test", "codebook_sizes": [8, 99]}))
    assert "[8, 99]" in refused(capsys, train_c2i.main, *options)


def test_unfinished_and_missing_codes(capsys, tmp_path):
    """Half an extraction is not a data set."""
    codes = write_codes(tmp_path / "codes")
    header = json.loads((codes / "header.json").read_text()) | {"complete": False}
    (codes / "header.json").write_text(json.dumps(header))
    assert "unfinished" in refused(capsys, train_c2i.main, *gpt_options(codes, tmp_path / "run"))
    assert "header.json" in refused(capsys, train_c2i.main, *gpt_options(tmp_path / "none", tmp_path / "run"))


def test_checkpoint_of_another_size(capsys, tmp_path):
    """A run folder belongs to one model."""
    codes = write_codes(tmp_path / "codes")
    options = dict(data_parallel="none", steps=2)
    call(train_c2i.main, *gpt_options(codes, tmp_path / "run", **options))
    sentence = refused(capsys, train_c2i.main, *gpt_options(codes, tmp_path / "run", gpt_model="GPT-small", **options))
    assert "dim 128" in sentence and "384" in sentence


def test_world_size_that_does_not_divide_the_batch(tmp_path):
    """Two processes cannot share a batch of seven."""
    codes = write_codes(tmp_path / "codes")
    done = command("autoregressive/train/train_c2i.py", *gpt_options(codes, tmp_path / "run", global_batch_size=7),
                   processes=2, check=False)
    assert done.returncode != 0
    assert "error: --global-batch-size 7 is not a multiple of 2, the number of processes" in done.stderr


def test_extraction_refuses_other_options_and_stage_one(capsys, images_folder, models, tmp_path):
    """Codes of two tokenizers or two crops must never mix in one folder."""
    tokenizer = models[1]
    call(extract_codes_c2i.main, *extract_options(images_folder, tokenizer, tmp_path / "codes"))
    sentence = refused(capsys, extract_codes_c2i.main, *extract_options(images_folder, tokenizer, tmp_path / "codes"),
                       "--augmentation", "none")
    assert "crops 2" in sentence and "1" in sentence


def sample(models, out: Path, *extra) -> list:
    """A short sampling command line."""
    return ["--gpt-ckpt", models[0], "--vq-ckpt", models[1], "--out", out, "--cfg-scale", 1.5, 3.0, "--device", "cpu", *extra]


def test_class_id_out_of_range(capsys, models, tmp_path):
    """The model knows three classes."""
    sentence = refused(capsys, sample_c2i.main, *sample(models, tmp_path / "x.png", "--classes", 0, 3))
    assert "--classes 3" in sentence and "0 to 2" in sentence


def test_range_upside_down(capsys, models, tmp_path):
    """START END, in that order."""
    arguments = [a for a in sample(models, tmp_path / "x.npz") if a not in (1.5, 3.0)]
    place = arguments.index("--cfg-scale") + 1
    arguments[place:place] = [3.0, 1.5]
    assert "upside down" in refused(capsys, sample_c2i_ddp.main, *arguments)


def test_tokenizer_that_did_not_make_the_codes(capsys, models, tmp_path):
    """Another tokenizer decodes the codes into noise, without any error of its own."""
    from tests.conftest import TINY_VQ
    from tokenizer.tokenizer_image.vq_model import VQModel
    from utils.checkpoint import fingerprint
    from utils.config import to_dict

    other = VQModel(TINY_VQ).state_dict()
    export(tmp_path / "other.safetensors", "tokenizer", other,
           {"model": to_dict(TINY_VQ), "stage": "dual", "fingerprint": fingerprint(other)})
    sentence = refused(capsys, sample_c2i_ddp.main, *sample((models[0], tmp_path / "other.safetensors"), tmp_path / "x.npz"))
    assert "--vq-ckpt" in sentence and "--gpt-ckpt" in sentence


@pytest.mark.parametrize("damage, words", [("missing", "does not exist"), ("truncated", "damaged"), ("kind", "not a gpt"),
                                           ("shape", "another size"), ("key", "another model")])
def test_bad_checkpoint_files(capsys, models, tmp_path, damage, words):
    """Missing, truncated, of another kind, of another size, of another model: each has its sentence."""
    gpt, tokenizer = models
    bad = tmp_path / "bad.safetensors"
    if damage == "truncated":
        bad.write_bytes(gpt.read_bytes()[:2000])
    elif damage == "kind":
        shutil.copy(tokenizer, bad)
    elif damage in ("shape", "key"):
        state = randomise(GPT(TINY_GPT)).state_dict()
        if damage == "key":
            state.pop("paradigm.norm.weight")
        model = dict(vars(replace(TINY_GPT, num_classes=7) if damage == "shape" else TINY_GPT))
        export(bad, "gpt", state, {"model": model, "tokenizer": "x"})
    assert words in refused(capsys, sample_c2i_ddp.main, *sample((bad, tokenizer), tmp_path / "x.npz"))


def test_foreign_safetensors_and_per_stream_counts(capsys, models, tmp_path):
    """A safetensors file from elsewhere has no configuration; three temperatures fit no two streams."""
    save_file({"w": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    sentence = refused(capsys, sample_c2i_ddp.main, *sample((tmp_path / "foreign.safetensors", models[1]), tmp_path / "x.npz"))
    assert "unknown kind" in sentence
    assert "--temperature has 3 values" in refused(
        capsys, sample_c2i_ddp.main, *sample(models, tmp_path / "x.npz", "--temperature", 1.0, 1.0, 1.0))


def test_samples_of_other_options_are_not_continued(capsys, models, tmp_path):
    """An existing npz made otherwise is never silently taken for the result."""
    call(sample_c2i_ddp.main, *sample(models, tmp_path / "x.npz", "--num-samples", 3))
    sentence = refused(capsys, sample_c2i_ddp.main, *sample(models, tmp_path / "x.npz", "--num-samples", 3, "--seed", 1))
    assert "seed" in sentence
