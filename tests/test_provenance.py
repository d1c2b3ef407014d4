"""What results say of where they come from: class names go with them, and what has changed since is not gone on with."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from autoregressive.models.gpt import load_gpt
from autoregressive.sample import sample_c2i, sample_c2i_ddp
from autoregressive.train import evaluate_c2i, extract_codes_c2i, train_c2i
from evaluations.c2i import classifier, judge
from evaluations.c2i.evaluation_file import EvaluationFile
from evaluations.c2i.evaluator import find_pitfalls
from tests.conftest import call, export_models
from tests.test_codes import write_codes
from tests.test_train import gpt_options, vq_options
from tokenizer.tokenizer_image import reconstruction_vq_ddp, vq_train
from tokenizer.validation import val_ddp
from utils.class_names import require_same_names
from utils.code_shards import read_header
from utils.config import UserError
from utils.images import open_images

NAMES = ("class0", "class1", "class2")


def refused(capsys, main, *words) -> str:
    """The one sentence with which a command refuses."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        call(main, *words)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert ended.value.code == 2 and len(said) == 1
    return said[0]


def extract(images: Path, tokenizer: Path, codes: Path, *extra) -> list:
    """Command line of an extraction."""
    return ["--data-path", images, "--vq-ckpt", tokenizer, "--code-path", codes, "--image-size", 32, "--augmentation", "none",
            "--num-workers", 0, "--device", "cpu", *extra]


@pytest.fixture
def other_names(images_folder, tmp_path) -> Path:
    """The same images with the first class renamed, so that all ids shift."""
    shutil.copytree(images_folder, tmp_path / "other")
    return (tmp_path / "other" / "class0").rename(tmp_path / "other" / "zebra").parent


def test_class_names_travel_from_the_images_to_the_samples(images_folder, tmp_path, monkeypatch):
    """Folder -> codes -> GPT -> npz and captions; a reference and a reconstruction carry them too."""
    _, tokenizer = export_models(tmp_path / "models")
    call(extract_codes_c2i.main, *extract(images_folder, tokenizer, tmp_path / "codes"))
    assert tuple(read_header(tmp_path / "codes").class_names) == NAMES
    call(train_c2i.main, *gpt_options(tmp_path / "codes", tmp_path / "run", steps=1, data_parallel="none"))
    assert load_gpt(tmp_path / "run").provenance.class_names == NAMES
    models = ["--gpt-ckpt", tmp_path / "run", "--vq-ckpt", tokenizer, "--cfg-scale", 1, "--device", "cpu"]
    call(sample_c2i_ddp.main, *models, "--per-class", 2, "--out", tmp_path / "x.npz")
    images = ["--data-path", images_folder, "--image-size", 32, "--num-workers", 0]
    call(val_ddp.main, *images, "--out", tmp_path / "val.npz")
    call(reconstruction_vq_ddp.main, *images, "--vq-ckpt", tokenizer, "--perceptual-net", "random", "--device", "cpu",
         "--out", tmp_path / "rec.npz")
    for name in ("x", "val", "rec"):
        with np.load(tmp_path / f"{name}.npz") as found:
            assert tuple(found["class_names"]) == NAMES, name
    captions = []
    monkeypatch.setattr(sample_c2i, "image_grid", lambda images, columns, rows, scale: captions.extend(rows))
    monkeypatch.setattr(sample_c2i, "save_picture", lambda picture, path: None)
    call(sample_c2i.main, *models, "--classes", 2, 0, "--per-class", 1, "--out", tmp_path / "x.png")
    assert captions == ["class2", "class0"]


def test_sources_that_call_a_class_differently_are_refused(images_folder, other_names, tmp_path, capsys):
    """Held-out codes, a second folder of codes, a classifier and samples, all with one class renamed."""
    _, tokenizer = export_models(tmp_path / "models")
    for images, name in ((images_folder, "codes"), (other_names, "val")):
        call(extract_codes_c2i.main, *extract(images, tokenizer, tmp_path / name))
    options = gpt_options(tmp_path / "codes", tmp_path / "run", steps=1, data_parallel="none")
    said = refused(capsys, train_c2i.main, *options, "--val-code-path", tmp_path / "val")
    assert "--val-code-path" in said and "calls class 0 'class1' but this run calls it 'class0'" in said
    assert not (tmp_path / "run").exists()  # refused before anything was made
    call(train_c2i.main, *options)
    said = refused(capsys, evaluate_c2i.main, "--gpt-ckpt", tmp_path / "run", "--code-path", tmp_path / "val", "--device", "cpu")
    assert "--code-path" in said and "--gpt-ckpt" in said
    two = gpt_options(tmp_path / "codes", tmp_path / "run2", steps=1)
    assert "calls class 0" in refused(capsys, train_c2i.main, *two[:2], tmp_path / "val", *two[2:])
    call(classifier.main, "--data-path", other_names, "--widths", 4, 4, "--epochs", 1, "--out", tmp_path / "c.safetensors",
         "--device", "cpu")
    models = ["--gpt-ckpt", tmp_path / "run", "--vq-ckpt", tokenizer, "--cfg-scale", 1, "--device", "cpu"]
    rejection = ["--classifier", tmp_path / "c.safetensors", "--rejection-ratio", 2]
    said = refused(capsys, sample_c2i_ddp.main, *models, *rejection, "--out", tmp_path / "x.npz")
    assert "--classifier" in said and "the GPT calls it" in said
    call(sample_c2i_ddp.main, *models, "--per-class", 4, "--out", tmp_path / "x.npz")
    judged = ["--classifier", tmp_path / "c.safetensors", "--out", tmp_path / "x.json", "--device", "cpu", "--reference"]
    assert "--reference" in refused(capsys, judge.main, *judged, images_folder)
    assert "--samples" in refused(capsys, judge.main, *judged, other_names, "--samples", tmp_path / "x.npz")
    call(val_ddp.main, "--data-path", other_names, "--image-size", 32, "--num-workers", 0, "--out", tmp_path / "ref.npz")
    files = [EvaluationFile(tmp_path / f"{name}.npz", name) for name in ("ref", "x")]
    assert any("calls class 0" in pitfall for pitfall in find_pitfalls(*files, "generation"))


def test_sources_without_names_fit_all():
    """Images without names, and published models, are taken as they are."""
    require_same_names((), NAMES, "A", "B")
    require_same_names(NAMES, (), "A", "B")
    with pytest.raises(UserError, match="A names 2 classes but B names 3"):
        require_same_names(NAMES[:2], NAMES, "A", "B")
    with pytest.raises(UserError, match=r"'x\\x1b' but B"):
        require_same_names(("x\x1b", *NAMES[1:]), NAMES, "A", "B")


def test_images_are_told_apart(images_folder, tmp_path):
    """By the names of files or the checksum of an npz, by labels, and by what was chosen of them."""
    source = open_images(images_folder)
    sums = {source.checksum, source.subset(9).checksum, source.subset(10).checksum}
    next((images_folder / "class0").iterdir()).rename(images_folder / "class0" / "new.png")
    sums.add(open_images(images_folder).checksum)
    pixels, labels = np.zeros((6, 8, 8, 3), np.uint8), np.arange(6) % 3
    for shade in (0, 1):
        np.savez(tmp_path / f"{shade}.npz", images=pixels + shade, labels=labels)
        sums.add(open_images(tmp_path / f"{shade}.npz").checksum)
    np.savez(tmp_path / "2.npz", images=pixels, labels=labels[::-1])
    sums.add(open_images(tmp_path / "2.npz").checksum)
    assert len(sums) == 7
    np.savez_compressed(tmp_path / "3.npz", images=pixels, labels=labels)  # packed otherwise, the same images
    assert open_images(tmp_path / "3.npz").checksum == open_images(tmp_path / "0.npz").checksum


def test_codes_of_other_images_are_not_gone_on_with(tmp_path, capsys):
    """As many images of the same classes, other pixels: the extraction refuses the folder, a training the codes."""
    _, tokenizer = export_models(tmp_path / "models")
    rng, folder = np.random.default_rng(0), tmp_path / "codes"
    for name in ("a", "b"):
        np.savez(tmp_path / f"{name}.npz", images=rng.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8), labels=np.arange(12) % 3)
    call(extract_codes_c2i.main, *extract(tmp_path / "a.npz", tokenizer, folder))
    call(extract_codes_c2i.main, *extract(tmp_path / "a.npz", tokenizer, folder))  # nothing left to do
    shutil.move(tmp_path / "b.npz", tmp_path / "a.npz")
    assert "images_checksum" in refused(capsys, extract_codes_c2i.main, *extract(tmp_path / "a.npz", tokenizer, folder))
    options = gpt_options(folder, tmp_path / "run", steps=1, data_parallel="none")
    call(train_c2i.main, *options)
    shutil.rmtree(folder)
    call(extract_codes_c2i.main, *extract(tmp_path / "a.npz", tokenizer, folder))
    options[options.index("--steps") + 1] = 2
    assert "images_checksum" in refused(capsys, train_c2i.main, *options)


def test_codes_of_an_older_version_are_gone_on_with(tmp_path):
    """Folders from before class names and checksums: an extraction finds them done and a training resumes on them."""
    _, tokenizer = export_models(tmp_path / "models")
    images = tmp_path / "a.npz"
    np.savez(images, images=np.zeros((12, 32, 32, 3), np.uint8), labels=np.arange(12) % 3, class_names=np.array(NAMES))
    call(extract_codes_c2i.main, *extract(images, tokenizer, tmp_path / "codes"))
    path = tmp_path / "codes" / "header.json"
    header = json.loads(path.read_text())
    for name in ("class_names", "images_checksum", "version"):
        del header[name]
    path.write_text(json.dumps(header))
    call(extract_codes_c2i.main, *extract(images, tokenizer, tmp_path / "codes"))
    options = gpt_options(tmp_path / "codes", tmp_path / "run", steps=1, data_parallel="none")
    call(train_c2i.main, *options)


def test_a_run_is_not_gone_on_with_from_other_initial_weights(tmp_path, capsys):
    """Stage 2 of a tokenizer made from an older stage 1, and a GPT's --init-from that has been trained on since."""
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "a.npz", images=rng.integers(0, 255, (8, 16, 16, 3), dtype=np.uint8), labels=np.arange(8) % 2)
    first, second = (vq_options(tmp_path / "a.npz", tmp_path / stage, stage, 2) for stage in ("semantic", "dual"))
    second += ["--init-from", tmp_path / "semantic"]
    call(vq_train.main, *first)
    call(vq_train.main, *second)
    call(vq_train.main, *second)  # finished: nothing is done again
    first[first.index("--steps") + 1] = 3
    call(vq_train.main, *first)
    assert "the weights of --init-from" in refused(capsys, vq_train.main, *second)

    codes = write_codes(tmp_path / "codes")
    call(train_c2i.main, *gpt_options(codes, tmp_path / "base", steps=1, data_parallel="none"))
    tuning = gpt_options(codes, tmp_path / "tuned", steps=1, data_parallel="none", init_from=tmp_path / "base")
    call(train_c2i.main, *tuning)
    call(train_c2i.main, *gpt_options(codes, tmp_path / "base", steps=2, data_parallel="none"))
    assert "the weights of --init-from" in refused(capsys, train_c2i.main, *tuning)
