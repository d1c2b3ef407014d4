"""The pipeline in Python: classes by name, the samplers' images, pictures on the way, and images to go on from."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.models.generate import Decoder, SamplingOptions, draw_codes, generate, whole_rows
from autoregressive.models.gpt import GPT
from autoregressive.sample import sample_c2i_ddp
from autoregressive.sample.pipeline import Pipeline
from tests.conftest import TINY_GPT, call, export_models, random_codes, randomise
from tests.test_decoding import DECODED, batch, shape_of
from tests.test_t2i_sampling import PROMPTS, world  # noqa: F401
from utils.checkpoint import export, read_export
from utils.class_names import find_class, words_for
from utils.config import UserError

NAMES = ("cat", "cable car, cable", "Hund")
GUIDED = {"guidance": "attention", "cfg_scale": [1.5, 3.0], "cfg_attention_weight": 0.1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a GPT that carries class names and guidance, and its tokenizer."""
    made = tmp_path_factory.mktemp("models")
    gpt, _ = export_models(made)
    description, tensors = read_export(gpt, "gpt", "--gpt-ckpt")
    export(gpt, "gpt", tensors, description | {"class_names": NAMES, "sampling": GUIDED})
    return made


@pytest.fixture(scope="module")
def pipeline(folder) -> Pipeline:
    """Both models, by the folder's name alone."""
    return Pipeline.from_pretrained(folder, device="cpu")


def test_the_images_are_the_samplers(pipeline, folder, tmp_path):
    """Whoever reports figures of an npz may show the same samples from Python: by seed and number, whatever the batch."""
    call(sample_c2i_ddp.main, "--gpt-ckpt", folder, "--vq-ckpt", folder, "--num-samples", 5, "--seed", 3, "--device", "cpu",
         "--batch-size", 5, "--out", tmp_path / "samples.npz")
    with np.load(tmp_path / "samples.npz") as data:
        expected, labels = data["arr_0"], data["arr_1"]
    images = pipeline([*map(int, labels)], seed=3, progress=False)
    assert all(isinstance(image, Image.Image) for image in images) and np.array_equal(np.stack(images), expected)
    assert np.array_equal(np.stack(pipeline(labels, seed=3, progress=False)), expected)  # an array of ids
    some = pipeline([NAMES[label] for label in labels[2:]], seed=3, first=2, batch_size=2, progress=False)
    assert np.array_equal(np.stack(some), expected[2:])
    assert not np.array_equal(np.stack(pipeline([0, 1], progress=False)), expected[:2])  # another seed


@pytest.mark.parametrize("wanted, label", [
    ("cat", 0), ("CAT", 0), (" Cable  Car ", 1), ("cable", 1), ("hun", 2), ("2", 2), (1, 1)])
def test_a_class_is_found_by_what_people_type(wanted, label):
    """An exact name wins over a part of others; case and spaces do not matter."""
    assert find_class(wanted, NAMES, "class") == label


@pytest.mark.parametrize("wanted, words", [
    ("ca", "fits 2 classes (0 cat; 1 cable car, cable): give one of these ids"), ("hunt", "did you mean 'hund'?"),
    ("zebra", "is the name of no class: give an id from 0 to 2"), (3, "class 3 is out of range"), ("-1", "of no class"),
    ("", "of no class")])
def test_a_name_of_no_class_or_of_several_is_one_sentence(pipeline, wanted, words):
    """The sentence says what would be right."""
    with pytest.raises(UserError, match=".") as told:
        pipeline(wanted, progress=False)
    assert words in str(told.value) and "\n" not in str(told.value)


def test_imagenet_is_spoken_in_words():
    """A model of 1,000 nameless classes, or of WordNet's numbers, is asked in English."""
    names = words_for((), 1000)
    assert find_class("golden retriever", names, "class") == 207 and find_class("tench", names, "class") == 0
    with pytest.raises(UserError, match="fits 2 classes"):
        find_class("crane", names, "class")  # the bird and the machine
    assert words_for(("n02099601", "n01440764"), 2) == ("golden retriever", "tench, Tinca tinca")
    assert words_for(("n02099601", "mine"), 2) == ("n02099601", "mine") and words_for((), 2) == ("class 0", "class 1")


@pytest.mark.parametrize("paradigm", DECODED)
def test_rows_come_from_the_top(paradigm):
    """A row is shown when all of its codes are there, whatever the order of prediction."""
    gpt = GPT(replace(TINY_GPT, context="none", **shape_of(paradigm)))
    found = whole_rows(gpt)
    assert len(found) == gpt.paradigm.num_steps and found[0] == 0 and found[-1] == 4 and found == sorted(found)
    row = found.index(1) + 1
    assert row == {"grouped": 16 + 4, "alternating": 8}.get(paradigm, 4)


def test_pictures_on_the_way_are_the_top_of_the_last(pipeline):
    """Codes of a row do not change any more; below it the picture is grey."""
    seen: list[tuple[np.ndarray, np.ndarray]] = []
    last = np.stack(pipeline(["cat", "Hund"], progress=False, on_row=lambda samples, images: seen.append((samples, images))))
    assert [samples.tolist() for samples, _ in seen] == [[0, 1]] * 4 and np.array_equal(seen[-1][1], last)
    for number, (_, images) in enumerate(seen[:-1], 1):
        assert images.shape == last.shape and (images[:, 8 * number :] == 128).all() and images[:, : 8 * number].std() > 1
    uniforms, given = pipeline.uniforms(0, np.arange(2)), torch.tensor([0, 2])
    steps = [(rows, codes.clone()) for rows, codes in pipeline.rows(given, uniforms, pipeline.sampling)]
    assert [rows for rows, _ in steps] == [1, 2, 3, 4]
    for rows, codes in steps:
        assert torch.equal(codes[..., : 4 * rows], steps[-1][1][..., : 4 * rows])
        assert np.array_equal(pipeline.decode(steps[-1][1], rows), seen[rows - 1][1])


@pytest.mark.parametrize("paradigm", DECODED)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_what_is_kept_stays_and_the_rest_follows_from_it(paradigm, scale):
    """Completion is decoding with some codes given: free codes are those that teacher forcing with the given ones draws."""
    gpt = randomise(GPT(replace(TINY_GPT, context="none", **shape_of(paradigm))))
    labels, uniforms = batch(gpt)
    options = SamplingOptions("constant", (scale,))
    kept = random_codes(3, gpt.config, seed=5)
    kept[..., 8:] = -1
    kept[1] = -1  # one sample keeps nothing
    codes = Decoder(gpt).draw(labels, options, uniforms, kept)
    assert torch.equal(codes[kept >= 0], kept[kept >= 0])
    assert torch.equal(codes[1], generate(gpt, labels, options, uniforms)[1])
    with torch.inference_mode():
        conditional, unconditional = gpt(labels, codes), gpt(torch.full_like(labels, 3), codes)
    for stream, (a, b) in enumerate(zip(conditional, unconditional)):
        logits = b + scale * (a - b)
        drawn = draw_codes(logits.flatten(0, 1), uniforms[:, stream].flatten()).view_as(codes[:, stream])
        free = kept[:, stream] < 0
        assert torch.equal(drawn[free], codes[:, stream][free])
        assert not torch.equal(drawn, codes[:, stream])  # the given ones are not what would have been drawn


def test_a_decoder_forgets_what_was_kept(gpt):
    """Buffers are reused: the next batch of the same kind has codes of its own."""
    labels, uniforms = batch(gpt)
    decoder, options = Decoder(gpt), SamplingOptions("constant", (2.0,))
    plain = decoder.draw(labels, options, uniforms)
    everything = random_codes(3, gpt.config, seed=5)
    assert torch.equal(decoder.draw(labels, options, uniforms, everything), everything)
    assert torch.equal(decoder.draw(labels, options, uniforms, torch.full_like(everything, -1)), plain)
    assert torch.equal(decoder.draw(labels, options, uniforms), plain)


def test_an_image_is_gone_on_from(pipeline):
    """The top of the result is the tokenizer's view of the image's top; the rest is drawn."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 36, 3), np.uint8))
    own = pipeline.encode(np.asarray(image))
    images = pipeline([0, 1], top=(image, 2), progress=False)
    kept = pipeline.top_codes(np.asarray(image), 2).expand(2, -1, -1)
    *_, (_, drawn) = pipeline.rows(torch.tensor([0, 1]), pipeline.uniforms(0, np.arange(2)), pipeline.sampling, kept)
    assert torch.equal(drawn[..., :8], own[..., :8].expand(2, -1, -1))
    assert not torch.equal(drawn[..., 8:], own[..., 8:].expand(2, -1, -1))
    assert np.array_equal(np.stack(images), pipeline.decode(drawn))
    assert np.array_equal(np.stack(pipeline([0, 1], top=(image, 0), progress=False)), np.stack(pipeline([0, 1], progress=False)))
    with pytest.raises(UserError, match="5 rows cannot be kept of a grid of 4"):
        pipeline([0], top=(image, 5), progress=False)


def test_captions_are_asked_for_by_the_encoder_of_the_training(world, tmp_path):  # noqa: F811
    """A text model takes sentences in the place of names; a sample does not depend on the others."""
    pipeline = Pipeline.from_pretrained(world["gpt"], world["tokenizer"], device="cpu")
    images = np.stack(pipeline(PROMPTS, progress=False))
    assert images.shape == (5, 32, 32, 3) and np.array_equal(np.stack(pipeline(PROMPTS[1], first=1, progress=False)), images[1:2])
    with pytest.raises(UserError, match="is empty after --caption-cleaning"):
        pipeline(["  "], progress=False)


@pytest.mark.parametrize("options, words", [
    ({"cfg_scale": (3.0, 1.0)}, "--cfg-scale 3.0 1.0 is upside down"), ({"top_p": 0.0}, "--top-p 0.0 is out of range"),
    ({"scale": 2}, "scale is no sampling option: choose from guidance"), ({"seed": -1}, "--seed -1 is out of range")])
def test_options_are_those_of_the_command_line(pipeline, options, words):
    """A number stands for one value; what makes no sense is refused before anything is drawn."""
    assert pipeline([0], cfg_scale=2.0, top_k=3, progress=False)
    with pytest.raises(UserError) as told:
        pipeline([0], progress=False, **options)
    assert words in str(told.value)


def test_second_stages_are_found_beside_the_first(tmp_path, folder):
    """CTF's two GPTs and their tokenizer are one folder; whoever misses one is told."""
    description, tensors = read_export(folder, "gpt", "--gpt-ckpt")
    export(tmp_path / "gpt.safetensors", "gpt", tensors, description | {"tokenizer": "coarse-1234"})
    with pytest.raises(UserError, match=r"--fine-ckpt .*/fine does not exist"):
        Pipeline.from_pretrained(tmp_path, folder, device="cpu")


def test_description_is_checked(tmp_path, folder):
    """A file that carries options which nobody knows is refused in one sentence."""
    description, tensors = read_export(folder, "gpt", "--gpt-ckpt")
    export(tmp_path / "gpt.safetensors", "gpt", tensors, description | {"sampling": {"guide": 1}})
    with pytest.raises(UserError, match="guide is no sampling option"):
        Pipeline.from_pretrained(tmp_path, folder, device="cpu")
