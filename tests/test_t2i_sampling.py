"""Sampling from prompts: the picture, the npz and the folders of other evaluations, encoders, and what is refused."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.models.ctf import FineOptions
from autoregressive.models.generate import SamplingOptions
from autoregressive.models.gpt import GPT
from autoregressive.sample import sample_t2i, sample_t2i_ddp
from autoregressive.sample.layouts import write_folder
from autoregressive.sample.model_options import ModelOptions
from autoregressive.sample.pipeline import Pipeline
from autoregressive.sample.prompts import PromptConditions, load_encoder
from evaluations.c2i.evaluation_file import EvaluationFile
from evaluations.c2i.evaluator import find_pitfalls
from evaluations.t2i.clip_score import read_pairs
from scripts.fuzz_commands import evaluate_few_features
from tests.conftest import TINY_GPT, TINY_VQ, call, command, export_models, randomise
from tests.test_bad_input import refused
from tests.test_npz import ALONE
from tests.test_paradigms import COARSE_OF
from tests.test_rejection import drawn_rows, stop  # noqa: F401
from tests.test_text_features import write_t5
from tokenizer.tokenizer_image.vq_model import VQModel
from utils.checkpoint import export, fingerprint
from utils.image_store import ImageStore
from utils.pictures import captioned_grid
from utils.text_encoders import EncoderRecord, TextEncoderOptions, make_encoder
from utils.texts import Prompt

CPU = torch.device("cpu")
HASHED = TextEncoderOptions("hashed", text_width=32, text_length=8)
GUIDED = {"guidance": "constant", "cfg_scale": [3.0]}
PROMPTS = ("a red boat", "a very old lighthouse on a green hill", "night", "two dogs that run", "Café, window")


def export_text_gpt(path: Path, tokenizer: str, encoder: object, seed: int = 0, **shape: Any) -> Path:
    """A random GPT that reads captions and carries its encoder's record and its guidance."""
    about = {name: shape.pop(name) for name in ("coarse", "coarse_of") if name in shape}
    fields: dict[str, Any] = {"condition": "text", "caption_length": 8, "caption_dim": 32} | shape
    config = replace(TINY_GPT, **fields)
    export(path, "gpt", randomise(GPT(config), seed).state_dict(), {
        "model": asdict(config), "tokenizer": tokenizer, "image_size": 32, "sampling": GUIDED, "encoder": encoder} | about)
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Path]:
    """A tokenizer, a GPT of hashed captions, one of classes, and files of prompts."""
    folder = tmp_path_factory.mktemp("world")
    classes, tokenizer = export_models(folder / "models")
    record = make_encoder(HASHED, CPU, False).record
    made = Pipeline(ModelOptions(classes, tokenizer), SamplingOptions("constant", (1.0,)), FineOptions(), CPU)
    gpt = export_text_gpt(folder / "gpt.safetensors", made.tokenizer.provenance.fingerprint, record.text)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS), "utf-8")
    lines = [json.dumps({"tag": "single_object", "include": [{"class": "boat", "count": 1}], "prompt": text}) for text in PROMPTS]
    (folder / "geneval.jsonl").write_text("\n".join(lines))
    return {"gpt": gpt, "classes": classes, "tokenizer": tokenizer, "prompts": folder / "prompts.txt",
            "geneval": folder / "geneval.jsonl"}


def options(world: dict[str, Path], out: Path, *extra: object, prompts: str = "prompts", gpt: str = "gpt") -> list[object]:
    """A command line that wants two samples of each of five prompts."""
    return ["--gpt-ckpt", world[gpt], "--vq-ckpt", world["tokenizer"], "--prompts", world[prompts], "--per-prompt", 2,
            "--batch-size", 4, "--device", "cpu", "--out", out, *extra]


def read(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an npz."""
    with np.load(path) as data:
        return dict(data)


# --- the npz ---------------------------------------------------------------------------------------------------------


def test_a_sample_is_its_seed_number_and_prompt(world, tmp_path, monkeypatch, drawn_rows):  # noqa: F811
    """Two processes, another batch size, or a stop in the middle give the same npz; what was drawn is not drawn again."""
    call(sample_t2i_ddp.main, *options(world, tmp_path / "one.npz"))
    one = read(tmp_path / "one.npz")
    assert one["arr_0"].shape == (10, 32, 32, 3) and one["arr_0"].std() > 1 and one["kind"] == "samples"
    assert one["captions"].tolist() == [text for text in PROMPTS for _ in range(2)]
    assert len(np.unique(one["arr_0"].reshape(10, -1), axis=0)) == 10
    about = json.loads(str(one["options"]))
    assert about["cfg_scale"] == [3.0] and about["guidance"] == "constant" and about["per_prompt"] == 2  # of the checkpoint
    assert (tmp_path / "one.png").exists() and not (tmp_path / "one").exists()
    command("autoregressive/sample/sample_t2i_ddp.py", *options(world, tmp_path / "two.npz", "--batch-size", 3, "--layout",
                                                                "geneval"), processes=2)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        write = ImageStore.write
        patch.setattr(ImageStore, "write", lambda store, rows, new: stop() if rows[0] else write(store, rows, new))
        call(sample_t2i_ddp.main, *options(world, tmp_path / "cut.npz"))
    drawn_rows.clear()
    call(sample_t2i_ddp.main, *options(world, tmp_path / "cut.npz"))
    assert set(drawn_rows) == set(range(4, 10))
    for name in ("two", "cut"):
        other = read(tmp_path / f"{name}.npz")
        assert list(one) == list(other) and all(np.array_equal(one[key], other[key]) for key in one)
        assert not (tmp_path / f"{name}.partial").exists()
    pairs = read_pairs(tmp_path / "two")  # written by both
    assert all(np.array_equal(pairs.image(row), one["arr_0"][row]) for row in range(10)) and len(pairs.captions) == 10


def test_other_options_are_never_taken_for_the_result(capsys, world, tmp_path):
    """Other prompts, another seed and another count are other samples; the same command finds its work done."""
    out = tmp_path / "x.npz"
    call(sample_t2i_ddp.main, *options(world, out))
    before = out.stat()
    call(sample_t2i_ddp.main, *options(world, out))
    assert "is there already" in capsys.readouterr().err and out.stat() == before
    other = tmp_path / "other.txt"
    other.write_text("\n".join(PROMPTS[::-1]))
    for extra, words in ((("--seed", 1), "made with seed 0, not with 1"), (("--prompts", other), "made with prompts "),
                         (("--per-prompt", 3), "made with per_prompt 2, not with 3")):
        assert words in refused(capsys, sample_t2i_ddp.main, *options(world, out, *extra))


def test_both_evaluations_read_the_npz(world, tmp_path):
    """FID against real images by the evaluator of classes, the CLIP score by its own: the same file, as it is."""
    out, rng = tmp_path / "x.npz", np.random.default_rng(0)
    call(sample_t2i_ddp.main, *options(world, out))
    np.savez(tmp_path / "real.npz", arr_0=rng.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8), kind=np.array("validation"))
    call(evaluate_few_features, tmp_path / "real.npz", out, "--inception-weights", out, "--json", tmp_path / "x.json",
         "--device", "cpu")
    assert json.loads((tmp_path / "x.json").read_text())["fid"] > 0
    reference, sample = (EvaluationFile(path, name) for path, name in ((tmp_path / "real.npz", "REF"), (out, "SAMPLE")))
    assert not any("VIRTUAL" in said for said in find_pitfalls(reference, sample, "generation"))  # that is of ImageNet
    pairs = read_pairs(out)
    assert pairs.captions == read(out)["captions"].tolist() and np.array_equal(pairs.image(7), read(out)["arr_0"][7])


# --- captions in a batch ---------------------------------------------------------------------------------------------


def test_a_sample_depends_on_no_other_caption_of_its_batch(world):
    """Captions of one to eight tokens together, each alone, in another order, or without their padding: the same codes."""
    models = ModelOptions(world["gpt"], world["tokenizer"])
    pipeline = Pipeline(models, SamplingOptions("constant", (3.0,)), FineOptions(), CPU, condition="text")
    encoder, rows = load_encoder(HASHED, models, pipeline), np.arange(5)
    given = PromptConditions(encoder, [Prompt(text, {}) for text in PROMPTS], 1)
    features, mask = given(rows)
    assert features.shape == (5, 8, 32) and mask.sum(1).tolist() == [4, 8, 2, 5, 3]
    together = pipeline.sample_codes((features, mask), rows)
    assert len(together.flatten(1).unique(dim=0)) == 5
    order = np.array([3, 0, 4, 2, 1])
    assert torch.equal(pipeline.sample_codes(given(order), order), together[order])
    for row in rows:
        alone = given(rows[row : row + 1])
        assert torch.equal(alone[0][0], features[row])
        assert torch.equal(pipeline.sample_codes(alone, rows[row : row + 1])[0], together[row])
    words = slice(3, None)  # without three columns that are padding of all but the longest
    short = np.array([0, 2, 3, 4])
    assert torch.equal(pipeline.sample_codes((features[short][:, words], mask[short][:, words]), short), together[short])
    assert torch.equal(pipeline.sample_codes((torch.where(mask[..., None], features, 7.0), mask), rows), together)


def test_a_prompt_beyond_the_length_is_said_and_cut(world, tmp_path, capsys):
    """The end of a long prompt is not in the picture, and nothing else would tell."""
    texts = ["one two three four five six seven eight nine", "one two three four five six seven"]
    (tmp_path / "long.txt").write_text("\n".join(texts))
    call(sample_t2i_ddp.main, *options(world, tmp_path / "x.npz", "--prompts", tmp_path / "long.txt", "--seed", 3))
    assert capsys.readouterr().err.count("1 of 2 captions are longer") == 1
    assert read(tmp_path / "x.npz")["captions"].tolist() == [text for text in texts for _ in range(2)]


# --- the folders -----------------------------------------------------------------------------------------------------


def test_the_folder_of_geneval(world, tmp_path, capsys):
    """Each prompt's own line of JSON and its images; a stopped writing carries on, and an image is never written twice."""
    out, folder = tmp_path / "x.npz", tmp_path / "x"
    arguments = options(world, out, "--layout", "geneval", prompts="geneval")
    call(sample_t2i_ddp.main, *arguments)
    images = read(out)["arr_0"]
    lines = [json.loads(line) for line in world["geneval"].read_text().splitlines()]
    for number, line in enumerate(lines):
        assert json.loads((folder / f"{number:05d}" / "metadata.jsonl").read_text()) == line  # GenEval reads the whole file
        for sample in range(2):
            png = np.array(Image.open(folder / f"{number:05d}" / "samples" / f"{sample:04d}.png"))
            assert np.array_equal(png, images[2 * number + sample])
    assert sorted(path.name for path in folder.iterdir()) == [*(f"{number:05d}" for number in range(5)), "samples.json"]
    assert read_pairs(folder).captions == read_pairs(out).captions
    kept, lost = folder / "00001" / "samples" / "0000.png", folder / "00001" / "samples" / "0001.png"
    before = kept.stat()
    lost.unlink()
    (folder / "00004" / "metadata.jsonl").unlink()
    (folder / "00001" / "samples" / ".0001.png.host-0-7.tmp").touch()
    call(sample_t2i_ddp.main, *arguments)
    assert np.array_equal(np.array(Image.open(lost)), images[3]) and kept.stat() == before
    assert (folder / "00004" / "metadata.jsonl").exists() and len(list((folder / "00001" / "samples").iterdir())) == 2
    assert "no `tag`" not in capsys.readouterr().err
    assert "made with layout geneval, not with partiprompts" in refused(capsys, sample_t2i_ddp.main, *arguments, "--layout",
                                                                       "partiprompts")


def test_the_folder_of_partiprompts(world, tmp_path, capsys):
    """LlamaGen's evaluation pairs the sorted images with the lines of captions.txt."""
    out, folder = tmp_path / "x.npz", tmp_path / "x"
    table = "Prompt\tCategory\n" + "".join(f"{text}\tAnimals\n" for text in PROMPTS)
    (tmp_path / "p.tsv").write_text(table, "utf-8")
    call(sample_t2i_ddp.main, *options(world, out, "--layout", "partiprompts", "--prompts", tmp_path / "p.tsv"))
    made, captions = read(out), (folder / "captions.txt").read_text("utf-8").splitlines()
    results = [json.loads(line) for line in (folder / "result.jsonl").read_text().splitlines()]
    files = sorted((folder / "images").iterdir())
    assert captions == made["captions"].tolist() == [line["text"] for line in results] and len(files) == 10
    for file, image, line in zip(files, made["arr_0"], results, strict=True):
        assert np.array_equal(np.array(Image.open(file)), image) and folder / line["image_path"] == file
    images = made | {"arr_0": made["arr_0"][::-1]}
    np.savez(out, **images)
    with pytest.raises(Exception, match="was made with checksum"):
        write_folder("partiprompts", out, [], 2, json.loads(str(made["options"])), ALONE)


def test_a_foreign_folder_is_not_written_into(capsys, world, tmp_path, drawn_rows):  # noqa: F811
    """Found before the drawing; plain prompts are said not to be GenEval's."""
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "notes.txt").touch()
    sentence = refused(capsys, sample_t2i_ddp.main, *options(world, tmp_path / "x.npz", "--layout", "geneval"))
    assert "--layout geneval would write into" in sentence and not drawn_rows
    call(sample_t2i_ddp.main, *options(world, tmp_path / "y.npz", "--layout", "geneval"))
    assert "some prompts have no `tag`" in capsys.readouterr().err
    assert json.loads((tmp_path / "y" / "00002" / "metadata.jsonl").read_text()) == {"prompt": "night"}


# --- the picture -----------------------------------------------------------------------------------------------------


def test_the_picture_shows_the_samples_over_their_prompts(world, tmp_path):
    """The same samples as in the npz, whatever the batch size, enlarged where they are small."""
    models = ["--gpt-ckpt", world["gpt"], "--vq-ckpt", world["tokenizer"], "--device", "cpu", "--per-prompt", 2]
    call(sample_t2i.main, *models, "--prompt", *PROMPTS, "--batch-size", 3, "--out", tmp_path / "typed.png")
    call(sample_t2i.main, *models, "--prompts", world["prompts"], "--out", tmp_path / "read.png")
    call(sample_t2i_ddp.main, *options(world, tmp_path / "x.npz"))
    expected = np.array(captioned_grid(read(tmp_path / "x.npz")["arr_0"], PROMPTS, 4))
    for name in ("typed", "read", "x"):
        assert np.array_equal(np.array(Image.open(tmp_path / f"{name}.png")), expected)


def test_captions_are_wrapped_under_their_images():
    """Long words are broken and long captions cut: nothing is drawn over another image or past the edge."""
    images = np.full((4, 32, 32, 3), 200, np.uint8)
    short, long = (np.array(captioned_grid(images, [text] * 2, 2)) for text in ("cat", "a cat on a mat " * 3))
    assert short.shape[1] == long.shape[1] and short.shape[0] < long.shape[0]
    endless, words = (np.array(captioned_grid(images, [text] * 2, 2)) for text in ("x" * 3000, "word " * 900))
    assert endless.shape == words.shape and (words[:, -4:] == 255).all() and (words[-3:] == 255).all()
    assert (long[:, :3] == 255).all() and (long[80:] < 128).any()
    with pytest.raises(ValueError, match="4 images do not fit 3 captions"):
        captioned_grid(images, ["a", "b", "c"])


# --- encoders and stages ---------------------------------------------------------------------------------------------


def test_the_encoder_is_found_where_it_lies_now(capsys, world, tmp_path):
    """A GPT carries which T5 it was trained with; it may have moved, and another one in its place is refused."""
    folder = write_t5(tmp_path / "t5", width=32)
    record = make_encoder(TextEncoderOptions(text_encoder_path=str(folder), text_length=8), CPU, False).record
    tokenizer = Pipeline(ModelOptions(world["classes"], world["tokenizer"]), SamplingOptions("constant", (1.0,)), FineOptions(),
                         CPU).tokenizer.provenance.fingerprint
    own = world | {"t5": export_text_gpt(tmp_path / "gpt.safetensors", tokenizer, record.text)}
    call(sample_t2i_ddp.main, *options(own, tmp_path / "a.npz", gpt="t5"))
    moved = folder.rename(tmp_path / "moved")
    call(sample_t2i_ddp.main, *options(own, tmp_path / "b.npz", "--text-encoder-path", moved, gpt="t5"))
    assert all(np.array_equal(one, read(tmp_path / "b.npz")[key]) for key, one in read(tmp_path / "a.npz").items())
    other = write_t5(tmp_path / "other", seed=1, width=32)
    for extra, words in (((), f"--text-encoder-path {folder} cannot be loaded"),
                         (("--text-encoder-path", other), "holds an encoder with the fingerprint"),
                         (("--text-length", 5), "--text-length 5 is not what --gpt-ckpt"),
                         (("--text-encoder", "hashed"), "--text-encoder hashed is not what --gpt-ckpt")):
        assert words in refused(capsys, sample_t2i_ddp.main, *options(own, tmp_path / "c.npz", *extra, gpt="t5"))


def test_published_weights_take_the_encoder_of_the_options(capsys, world, tmp_path):
    """LlamaGen's files say at most which T5: the length comes from the weights, the place from the options."""
    own = world | {"bare": export_text_gpt(tmp_path / "gpt.safetensors", "", "google/flan-t5-xl", caption_length=6)}
    path = "--text-encoder-path", write_t5(tmp_path / "t5", width=32)
    call(sample_t2i_ddp.main, *options(own, tmp_path / "x.npz", *path, gpt="bare"))
    about = json.loads(str(read(tmp_path / "x.npz")["options"]))
    assert (about["text_length"], about["caption_cleaning"]) == (6, "published")
    narrow = "--text-encoder-path", write_t5(tmp_path / "narrow", width=16)
    for extra, words in ((narrow, "gives 6 tokens of width 16 but --gpt-ckpt"), ((*path, "--text-length", 9), "gives 9 tokens")):
        assert words in refused(capsys, sample_t2i_ddp.main, *options(own, tmp_path / "y.npz", *extra, gpt="bare"))


def test_a_second_stage_refines_captions_too(capsys, world, tmp_path):
    """CTF: both stages read the same captions, and stages of two encoders are refused."""
    single, record = replace(TINY_VQ, quantizer="single", codebook_sizes=(16,)), make_encoder(HASHED, CPU, False).record
    tokenizer = fingerprint(tensors := VQModel(single).state_dict())
    export(tmp_path / "vq.safetensors", "tokenizer", tensors,
           {"model": asdict(single), "stage": "single", "fingerprint": tokenizer})
    coarse = dict(paradigm="single", codebook_sizes=(4,))
    fine = dict(paradigm="fine", codebook_sizes=(4, 16), coarse="coarse-1", coarse_of=COARSE_OF.tolist())
    own = world | {"tokenizer": tmp_path / "vq.safetensors",
                   "coarse": export_text_gpt(tmp_path / "coarse.safetensors", "coarse-1", record.text, **coarse)}
    stages = [export_text_gpt(tmp_path / f"fine{seed}.safetensors", tokenizer, text, seed, **fine) for seed, text in enumerate(
        (record.text, replace(record, encoder_fingerprint="0" * 16).text))]
    for size in (4, 3):
        call(sample_t2i_ddp.main, *options(own, tmp_path / f"{size}.npz", "--fine-ckpt", stages[0], "--fine-cfg-scale", 2,
                                           "--batch-size", size, gpt="coarse"))
    assert np.array_equal(read(tmp_path / "4.npz")["arr_0"], read(tmp_path / "3.npz")["arr_0"])
    sentence = refused(capsys, sample_t2i_ddp.main, *options(own, tmp_path / "x.npz", "--fine-ckpt", stages[1], gpt="coarse"))
    assert "was trained with another text encoder" in sentence


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra, words", [
    (("--prompts", "nowhere.txt"), "--prompts 'nowhere.txt' does not exist"),
    (("--prompts", "empty.txt"), "empty.txt is empty"),
    (("--prompts", "blank.jsonl"), "prompt 2, '<br>', is empty after --caption-cleaning published"),
    (("--layout", "coco"), "--layout coco is out of range: give one of npz, geneval, partiprompts"),
    (("--text-encoder-path", "/nowhere"), "--text-encoder-path /nowhere is not what --gpt-ckpt"),
    (("--out", "x.zip"), "--out 'x.zip' is not the name of an npz"),
    (("--per-prompt", 0), "--per-prompt 0 is out of range"),
])
def test_bad_options(capsys, world, tmp_path, monkeypatch, extra, words):
    """One sentence that names the option, before anything is drawn."""
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n \n")
    Path("blank.jsonl").write_text('{"prompt": "a cat"}\n{"prompt": "<br>"}\n')
    assert words in refused(capsys, sample_t2i_ddp.main, *options(world, tmp_path / "x.npz", *extra))
    assert not (tmp_path / "x.partial").exists()


def test_bad_prompts_of_the_picture_and_models_of_classes(capsys, world, tmp_path):
    """Two sources of prompts, an empty one, and a GPT that reads no captions."""
    models = ["--gpt-ckpt", world["gpt"], "--vq-ckpt", world["tokenizer"], "--device", "cpu", "--out", tmp_path / "x.png"]
    for extra, words in ((("--prompt", "a cat", "--prompts", world["prompts"]), "are both given"),
                         (("--prompt", "a cat", " "), "--prompt, prompt 2, ' ', is empty"),
                         (("--prompt",), "--prompt is empty: give at least one value"),
                         (("--out", tmp_path / "x.jpg"), "must end in .png")):
        assert words in refused(capsys, sample_t2i.main, *models, *extra)
    for main, out in ((sample_t2i.main, "x.png"), (sample_t2i_ddp.main, "x.npz")):
        sentence = refused(capsys, main, *options(world, tmp_path / out, "--cfg-scale", 1.5, 3.0, gpt="classes"))
        assert "is conditioned on class" in sentence and "sample_c2i.py" in sentence


@pytest.mark.parametrize("encoder, words", [("flan", "its text encoder"), ("{}", "its text encoder"), (7, "encoder"), (
    EncoderRecord("clip", "", "0", 32, 8, "published").text, "the text encoder clip, which is unknown here")])
def test_damaged_and_unknown_records(capsys, world, tmp_path, encoder, words):
    """A file from elsewhere is said to be what it is."""
    own = world | {"bad": export_text_gpt(tmp_path / "gpt.safetensors", "", encoder)}
    assert words in refused(capsys, sample_t2i_ddp.main, *options(own, tmp_path / "x.npz", gpt="bad"))
