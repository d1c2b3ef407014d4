"""The demonstration of text: what its captions say, what its prompts ask, and how samples are measured."""

import json
import re

import numpy as np
import pytest

from evaluations.c2i.classifier import ClassifierConfig, SmallClassifier
from scripts import text_demo_data, text_demo_report
from scripts.text_demo_data import CALLED, DAMAGE, DATA, PHRASINGS, WORDS, held_out, measure
from tests.conftest import call
from utils.captions import CLEANING
from utils.checkpoint import export
from utils.config import to_dict


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Captions of the first 2,000 images, and prompts."""
    folder = tmp_path_factory.mktemp("demo")
    call(text_demo_data.main, "--out", folder / "data", "--images", 2000)
    return folder


def sides_in(text: str) -> dict[str, int]:
    """What a cleaned caption says of the properties."""
    words = re.findall(r"\w+", text)
    return {key: side for key, pair in WORDS.items() for side, names in enumerate(pair) if set(names) & set(words)}


def test_properties_are_those_of_the_pictures():
    """Brightness is of what is shown alone; a bar that lies is wide, one that stands narrow."""
    lying, standing, dim = np.zeros((3, 32, 32), np.uint8)
    lying[14:18, 4:28], standing[4:28, 14:18], dim[14:18, 4:28] = 255, 255, 64
    found = measure(np.stack([lying, standing, dim]))
    np.testing.assert_allclose(found["brightness"], [1, 1, 64 / 255], rtol=1e-6)
    assert found["width"][0] == pytest.approx(1 / found["width"][1]) and found["width"][0] > 5
    colour = measure(np.repeat(np.stack([lying, standing, dim])[..., None], 3, axis=-1))
    assert all(np.allclose(found[key], colour[key]) for key in WORDS)


def test_captions_say_what_is_measured_and_never_what_is_held_out(prepared):
    """Every caption, damaged or not, reads as its class and the clear properties of its image; no class has its held-out pair."""
    with np.load(prepared / "data" / "train.npz") as arrays:
        captions, images, labels, names = (arrays[key] for key in ("captions", "images", "labels", "class_names"))
    found, limits = measure(images), json.loads((prepared / "data" / "limits.json").read_text())
    pairs = set()
    for row, caption in enumerate(captions):
        text = CLEANING["mended"](str(caption))
        said = sides_in(text)
        assert CALLED.get(str(names[labels[row]]), str(names[labels[row]])) in text, (caption, text)
        assert tuple(said.get(key, -1) for key in WORDS) != held_out(labels[row])
        pairs.add((labels[row], *said.values()))
        for key, side in said.items():
            limit = limits[key]["high" if side else "low"][labels[row]]
            assert (found[key][row] > limit) if side else (found[key][row] < limit)
    assert len([pair for pair in pairs if len(pair) == 3]) >= 30     # the three other combinations of ten classes


def test_prompts_are_new_and_ask_for_every_combination(prepared):
    """Phrasings that no caption has; each combination of each class, and which of them training lacks."""
    lines = [json.loads(line) for line in (prepared / "data" / "prompts.jsonl").read_text().splitlines()]
    with np.load(prepared / "data" / "train.npz") as arrays:
        captions = {CLEANING["mended"](str(text)) for text in arrays["captions"]}
    texts = [CLEANING["mended"](line["prompt"]) for line in lines]
    assert len(lines) == len(PHRASINGS) * 40 and not captions & set(texts)
    for line, text in zip(lines, texts):
        assert sides_in(text) == {key: line[key] for key in WORDS}
        assert line["held_out"] == (tuple(line[key] for key in WORDS) == held_out(line["class"]))
    assert sum(line["held_out"] for line in lines) == len(lines) // 4


@pytest.mark.parametrize("spoil", DAMAGE)
def test_damage_is_mended(spoil):
    """What a page made of a caption reads as before, but for what it added."""
    assert spoil("a dark bag") != "a dark bag" and "a dark bag" in CLEANING["mended"](spoil("a dark bag"))


def test_the_report_counts_what_has_its_prompt(prepared, capsys):
    """Real images as samples: those of the asked side count, by system, guidance and combination."""
    lines = [json.loads(line) for line in (prepared / "data" / "prompts.jsonl").read_text().splitlines()]
    with np.load(DATA / "fashion_mnist_train.npz") as arrays:
        images, labels = arrays["images"][:2000], arrays["labels"][:2000]
    found, limits = measure(images), json.loads((prepared / "data" / "limits.json").read_text())
    above = np.stack([found[key] > np.array(limits[key]["middle"])[labels] for key in WORDS], axis=1)
    fitting = [np.flatnonzero((labels == line["class"]) & (above == [line[key] for key in WORDS]).all(1))[:2] for line in lines]
    samples = np.repeat(images[np.concatenate(fitting)][..., None], 3, axis=-1)
    for system in text_demo_report.SYSTEMS:
        np.savez(prepared / f"{system}_guided.npz", arr_0=samples)
        np.savez(prepared / f"{system}_unguided.npz", arr_0=np.roll(samples, 2 * 20, axis=0))  # of another class
    judge = SmallClassifier(ClassifierConfig(channels=(8, 8)))
    export(prepared / "judge.safetensors", "classifier", judge.state_dict(), {"model": to_dict(judge.config)})
    (prepared / "phases").mkdir()
    (prepared / "phases" / "captions").write_text("3")
    call(text_demo_report.main, "--folder", prepared)
    rows = json.loads((prepared / "figures.json").read_text())["rows"]
    assert all(row["brightness"] == row["width"] == 1 for row in rows if row["guidance"] == "guided")
    assert all(row["brightness"] < 1 for row in rows if row["guidance"] == "unguided")
    assert {row["images"] for row in rows} == {60, 180}
    assert "| IAR2 | guided | new |" in capsys.readouterr().out and (prepared / "iar2.png").exists()
