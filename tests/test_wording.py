"""What is said of images, codebooks, distances and options is true of what was done with them."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from autoregressive.models.generate import SamplingOptions
from autoregressive.models.guidance import GUIDANCE, sampling_preset
from autoregressive.sample import sample_c2i_ddp
from autoregressive.sample.pipeline import check_sampling
from tests.conftest import call, export_models, losses
from tests.test_bad_input import refused, vq
from tests.test_reconstruction import reconstruct
from tokenizer.tokenizer_image import vq_train
from tokenizer.tokenizer_image.codebook import remedies, warn_of_collapse
from tokenizer.tokenizer_image.perceptual import PerceptualOptions, distance_name
from tokenizer.tokenizer_image.vq_model import VQConfig
from utils.checkpoint import read_export
from utils.config import UserError
from utils.image_dataset import ImageDataset
from utils.images import open_images
from utils.pictures import captioned_grid, image_grid


def touch(folder: Path, *names: str) -> None:
    """Empty files in a folder, which is made."""
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).touch()


def test_images_of_other_kinds_are_counted(images_folder, caplog):
    """A third of a data set in TIFF was left out without a word, and its classes were smaller than anybody knew."""
    touch(images_folder / "class0", "a.tiff", "b.TIF", "._c.tiff", "notes.txt")
    touch(images_folder / "class1" / "deep", "a.tiff")
    assert len(open_images(images_folder)) == 24
    assert [record.getMessage() for record in caplog.records] == [
        f"--data-path {images_folder}: 3 images of other kinds than .jpg .jpeg .jfif .png .webp .bmp are left out "
        "(2 .tiff, 1 .tif): convert them if they are wanted"]


def test_a_class_of_other_kinds_alone_says_so(images_folder):
    """`Without any image` is no help to somebody who sees a thousand."""
    touch(images_folder / "class9", "a.heic", "b.heic", "c.avif")
    with pytest.raises(UserError, match=r"folder 'class9' without any image \(.*\), only 2 .heic, 1 .avif: convert"):
        open_images(images_folder)


def test_what_an_evaluation_leaves_out_is_not_replaced(images_folder, models, tmp_path, caplog, capfd):
    """Figures are of the images that were read; a training goes on with another image in the place."""
    bad = images_folder / "class0" / "0.png"
    bad.write_bytes(bad.read_bytes()[:150])
    for left_out, words in ((True, ("left out", "left out")), (False, ("replaced by the next", "replaced by others"))):
        caplog.clear()
        dataset = ImageDataset(open_images(images_folder), 16, left_out=left_out)
        assert dataset[0][2] == 1
        dataset.report_skipped()
        first, second = [record.getMessage() for record in caplog.records]
        assert first.startswith(f"unreadable image {words[0]}: ")
        assert second.endswith(f"1 of 24 images were unreadable and {words[1]}")
    capfd.readouterr()
    assert len(reconstruct(images_folder, models, tmp_path)[0]) == 23
    said = capfd.readouterr().err
    assert "1 of 24 images were unreadable and left out" in said and "replaced" not in said


@pytest.mark.parametrize("quantizer, init, revive, advice", [
    ("dual", "uniform", 0, "--codebook-init kmeans and --revive-every 100"), ("dual", "kmeans", 0, "--revive-every 100"),
    ("dual", "whitened", 50, "--codebook-init kmeans"), ("dual", "kmeans", 50, "a lower --lr or smaller --codebook-sizes"),
    ("simvq", "uniform", 0, "--codebook-init whitened or a lower --lr"), ("simvq", "whitened", 0, "a lower --lr")])
def test_the_advice_on_collapse_is_not_what_was_done(quantizer, init, revive, advice):
    """`Try --codebook-init kmeans` under a command that has it makes the whole warning look wrong."""
    assert remedies(VQConfig(quantizer=quantizer), init, revive) == advice


def test_the_advice_on_a_finished_tokenizer_is_of_its_training(caplog):
    """Whoever reconstructs images has no --codebook-init to give."""
    warn_of_collapse({"images": 1000, "usage_semantic": 0.1}, VQConfig(codebook_sizes=(128, 512)), 64)
    assert caplog.text.rstrip().endswith("try training it with --codebook-init kmeans and --revive-every 100")


def test_the_trainer_knows_what_it_was_given(images_folder, tmp_path):
    """The advice is about this command."""
    call(vq_train.main, *vq(images_folder, tmp_path / "run", "--codebook-sizes", 48, 64, "--codebook-init", "kmeans", "--lr", 1.0,
                            "--steps", 3))
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "CODEBOOK COLLAPSE" in log and "try --revive-every 100\n" in log and "kmeans" not in log


def test_only_lpips_is_called_lpips(images_folder, models, tmp_path):
    """A random network's distance under that name was taken for one that compares with published ones."""
    names = {net: distance_name(PerceptualOptions(net)) for net in ("vgg", "alex", "squeeze", "random", "classifier")}
    assert names == dict.fromkeys(("vgg", "alex", "squeeze"), "lpips") | {"random": "perceptual_random",
                                                                         "classifier": "perceptual_classifier"}
    call(vq_train.main, *vq(images_folder, tmp_path / "run", "--codebook-sizes", 8, 16))
    assert losses(tmp_path / "run", "eval/perceptual_random") and not losses(tmp_path / "run", "eval/lpips")
    figures = read_export(tmp_path / "run", "tokenizer", "--vq-ckpt", tensors=False)[0]["figures"]
    assert "perceptual_random" in figures and "lpips" not in figures
    _, figures = reconstruct(images_folder, models, tmp_path)
    assert figures["perceptual_random"] > 0 and "lpips" not in figures


def test_captions_have_the_letters_of_european_languages():
    """Pillow's own font drew one empty box for all of them: `Hörnchen` and `Hůrnchen` were the same picture."""
    image = np.full((1, 16, 16, 3), 255, np.uint8)
    for draw in (lambda text: image_grid(image, 1, rows=[text]), lambda text: image_grid(image, 1, titles=[text]),
                 lambda text: captioned_grid(image, [text])):
        assert len({np.asarray(draw(text)).tobytes() for text in ("öööö", "őőőő", "łłłł", "ěěěě", "жжжж")}) == 5


def sampled(tmp_path: Path, *words) -> Path:
    """Samples of a GPT of three named classes with a picture beside them."""
    gpt, tokenizer = export_models(tmp_path / "models")
    call(sample_c2i_ddp.main, "--gpt-ckpt", gpt, "--vq-ckpt", tokenizer, "--cfg-scale", 1.5, 3.0, "--device", "cpu", "--out",
         tmp_path / "x.npz", *words)
    return tmp_path / "x.png"


@pytest.mark.parametrize("words, count, classes", [
    (("--per-class", 4), 12, 3), (("--num-samples", 3), 3, 3), (("--num-samples", 2), 2, 2), (("--per-class", 12), 30, 3)])
def test_the_picture_beside_samples_says_their_classes(tmp_path, monkeypatch, words, count, classes):
    """A grid of a hundred classes without a name says nothing of any."""
    shown = []

    def note(images, captions, scale):
        shown.append((images, captions))
        return captioned_grid(images, captions, scale)

    monkeypatch.setattr(sample_c2i_ddp, "captioned_grid", note)
    with Image.open(sampled(tmp_path, *words)) as picture:
        assert picture.width >= 2 * 192
    images, captions = shown[0]
    assert len(images) == count and captions == [f"class {number}" for number in range(classes)]
    with np.load(tmp_path / "x.npz") as file:
        for index, image in enumerate(images):  # each under the name of its class
            label = captions[index * len(captions) // len(images)].removeprefix("class ")
            assert any(np.array_equal(image, own) for own in file["arr_0"][file["arr_1"] == int(label)])


# --- options that nothing reads ------------------------------------------------------------------------------------------------


def test_a_weight_that_nothing_reads_is_refused(gpt):
    """As the power is; what a checkpoint carries for another schedule is not typed."""
    for name, row in GUIDANCE.items():
        options = SamplingOptions(guidance=name, cfg_scale=(2.0,), cfg_attention_weight=0.3)
        if row.reads_weight:
            check_sampling(options, gpt)
        else:
            with pytest.raises(UserError, match=f"^--cfg-attention-weight 0.3 is of attention guidance, not of {name}: leave"):
                check_sampling(options, gpt)
        check_sampling(replace(options, cfg_attention_weight=SamplingOptions.cfg_attention_weight), gpt)
    gpt.provenance.sampling = sampling_preset("GPT-B", 2, 16, "released")
    check_sampling(SamplingOptions(guidance="constant", cfg_scale=(2.0,), cfg_attention_weight=0.1), gpt)


def test_the_rows_that_read_a_weight_are_those_that_it_changes():
    """A row that says too little would refuse an option of its own."""
    for name, row in GUIDANCE.items():
        first, second = (row.scale(1.0, 3.0, 0.5, 0.25, weight) for weight in (0.1, 0.9))
        assert (first != second) == row.reads_weight, name


def test_a_typed_weight_is_refused_on_the_command_line(tmp_path, capsys):
    """Before anything is drawn."""
    gpt, tokenizer = export_models(tmp_path / "models")
    words = ["--gpt-ckpt", gpt, "--vq-ckpt", tokenizer, "--cfg-scale", 2.0, "--guidance", "constant", "--device", "cpu", "--out",
             tmp_path / "x.npz", "--num-samples", 3]
    assert "--cfg-attention-weight 0.2" in refused(capsys, sample_c2i_ddp.main, *words, "--cfg-attention-weight", 0.2)
    call(sample_c2i_ddp.main, *words)
    with np.load(tmp_path / "x.npz") as file:
        assert json.loads(str(file["options"]))["cfg_attention_weight"] == 0.05


def test_help_says_what_is_not_done_with_images(capsys):
    """Photographs from a telephone lie on their side; it must not take a look into the source to know why."""
    logging.getLogger().handlers.clear()
    with pytest.raises(SystemExit):
        call(vq_train.main, "--help")
    assert "EXIF rotation is not applied" in " ".join(capsys.readouterr().out.replace("│", " ").split())
