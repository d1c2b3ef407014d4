"""The study: its statistics, its fairness, and every part run to its report at a tiny scale."""

import json
import re
import sys
from collections.abc import Iterable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autoregressive.sample.drawing import warm_rate
from scripts.paper import study
from scripts.paper import study_systems as systems
from scripts.paper.estimates import at, differs, estimate, paired, verdict
from scripts.paper.steps import Runner, Step, in_order
from scripts.paper.study import chosen
from scripts.paper.study_data import framed, halves
from scripts.paper.study_parts import Trial, dual_tokenizer, learning_rates, part_a, part_b
from scripts.paper.study_report import mean, write_report
from scripts.paper.study_samples import equal_time, gallery, part_c, part_d, timed_rate
from scripts.paper.study_steps import Data, Lengths
from tests.conftest import REPOSITORY, call
from tests.test_npz import ALONE
from utils.config import UserError, to_dict
from utils.files import write_json

TINY = Lengths(classifier_epochs=(1, 1), tokenizer_steps=(2, 2), gpt_steps=4, pilot_steps=2, evaluations=2, per_class=1,
               tuning_per_class=1)


class Here(Runner):
    """Runs every command in this process."""

    def run(self, steps: Iterable[Step]) -> None:
        """Do what is not done."""
        for step in in_order(steps):
            if not step.done:
                step.folder.mkdir(parents=True, exist_ok=True)
                script, *words = step.command()[1:]
                words = ["--rounds", "1", "--steps", "1", *words] if step.kind == "times" else words
                call(import_module(script.removesuffix(".py").replace("/", ".")).main, *words)
                write_json(step.folder / "step.json", {"command": script, "seconds": 0.0})


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[str, str]:
    """npz of a few images of ten classes, for training and for the test."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name, count in (("train", 2100), ("test", 200)):
        labels = np.arange(count) % 10
        images = (labels[:, None, None] * 20 + rng.integers(0, 60, (count, 28, 28))).astype(np.uint8)
        np.savez(folder / f"{name}.npz", images=images, labels=labels)
    return str(folder / "train.npz"), str(folder / "test.npz")


def test_paired_seeds_decide_what_unpaired_ones_cannot():
    """The spread that seeds share cancels: 1.0 ± 0.1 is a difference though the seeds spread by tens."""
    ours, theirs = {0: 10.0, 1: 30.0, 2: 52.0}, {0: 11.1, 1: 30.9, 2: 53.0}
    difference = paired(ours, theirs)
    assert difference.mean == pytest.approx(-1.0) and difference.error == pytest.approx(0.1 / 3**0.5)
    assert differs(difference) and verdict(difference) == "better" and verdict(difference, lower_is_better=False) == "worse"
    assert estimate(list(ours.values())).error > 10


def test_no_verdict_without_evidence():
    """A difference within two standard errors is none, and a single seed says nothing."""
    assert verdict(paired({0: 1.0, 1: 2.0}, {0: 0.0, 1: 3.0})) == "no difference"
    assert verdict(paired({0: 1.0}, {0: 9.0})) == "one seed"
    assert not differs(paired({0: 1.0}, {0: 9.0}))


def test_a_curve_is_read_only_where_it_was_measured():
    """Bits at equal time lie between evaluations, never outside of them."""
    assert at(20.0, [10.0, 40.0], [8.0, 4.0]) == pytest.approx(6.0)
    with pytest.raises(ValueError, match="outside"):
        at(50.0, [10.0, 40.0], [8.0, 4.0])


def test_halves_of_the_test_images_are_disjoint_and_even():
    """What chooses a learning rate never scores it."""
    labels = np.repeat(np.arange(3), 5)[np.random.default_rng(0).permutation(15)]
    validation, test = halves(labels)
    assert sorted([*validation, *test]) == list(range(15))
    assert list(np.bincount(labels[validation])) == [2, 2, 2] and list(np.bincount(labels[test])) == [3, 3, 3]


def test_grey_images_are_framed():
    """Fashion-MNIST's 28 pixels stand in a black border of 32, unchanged."""
    grey = np.full((2, 28, 28), 7, np.uint8)
    image = framed(grey)
    assert image.shape == (2, 32, 32, 3) and image.sum() == 7 * 3 * grey.size and image[:, 2:-2, 2:-2].min() == 7


def test_equal_time_is_the_fastest_systems_whole_training():
    """Nobody trains longer than the fastest, whose steps are all used."""
    assert equal_time({"fast": 0.1, "slow": 0.4, "slower": 1e9}, 100) == {"fast": 100, "slow": 25, "slower": 1}


def test_rows_differ_by_what_they_declare_alone(tmp_path):
    """Every system of part B has the same data, length, batch, schedule and seed; only the declared options differ."""
    data = Data(tmp_path, "cifar10", ("train.npz", "test.npz"))
    tokenizer = dual_tokenizer(data)
    commands = {}
    for row in (*systems.B, *systems.BEYOND):
        words = list(map(repr, Trial(data, row, tokenizer).train(1e-3, 0).words))
        declared = list(map(repr, ("--gpt-model", row.gpt_model, *row.options)))
        first = words.index("'--gpt-model'")
        assert words[first : first + len(declared)] == declared
        del words[first : first + len(declared)]
        commands[row.name] = words
    assert len({tuple(words) for words in commands.values()}) == 1


def test_a_step_is_named_by_its_content(tmp_path):
    """Another option anywhere upstream makes another folder, and the same words anywhere the same one."""
    def bits(seed: int = 0, **lengths: Any) -> Path:
        data = Data(tmp_path, "cifar10", ("train.npz", "test.npz"), Lengths(**lengths))
        tokenizer = dual_tokenizer(data)
        return data.bits(Trial(data, systems.IAR2, tokenizer).train(1e-3, seed), tokenizer).folder

    assert bits() == bits()
    assert len({bits(), bits(seed=1), bits(classifier_epochs=(9, 3)), bits(tokenizer_steps=(1, 1))}) == 4


def test_tokenizers_share_their_first_phase(tmp_path):
    """Both ways of stage 1's gradients start from the same semantic stage."""
    data = Data(tmp_path, "cifar10")
    first = {row.name: data.tokenizer(row).needs[-1].folder
             for row in systems.A if row.quantizer == "dual"}
    assert len(first) > 1 and len(set(first.values())) == 1


def test_parts_run_to_their_report(tmp_path, files, monkeypatch):
    """All commands fit together: images, classifiers, tokenizers, codes, maps, GPTs, bits, sweeps, samples, judge, report."""
    monkeypatch.chdir(REPOSITORY)
    rows = {row.name: replace(row, sizes=tuple(min(size, 64) for size in row.sizes)) for row in systems.A}
    monkeypatch.setattr("scripts.paper.study_parts.ASSOCIATED", rows["associated"])
    for name, value in {"SINGLES": (64,), "IAR_CLUSTERS": 8, "CTF_CLUSTERS": 16, "CONSTANT": ("1:1", "2:2"),
                        "IAR2": replace(systems.IAR2, ranges=("1:2",))}.items():
        monkeypatch.setattr(f"scripts.paper.study_samples.{name}", value)
    data, runner, rates = Data(tmp_path, "fashion-mnist", files, TINY, batch=8, sampled=10), Here(), (1e-3,)
    figures = {
        "A": part_a(data, [rows["simvq-4096"], rows["associated"]], (0,), "", runner),
        "B": part_b(data, {systems.B[0]: (0, 1), systems.IAR2: (0, 1)}, rates, runner),
        "C": part_c(data, None, (0,), rates, runner),
        "D": part_d(data, [replace(systems.D[0], ranges=systems.D[0].ranges[:2])], (0,), rates, runner),
    }
    made = dict.fromkeys(figures, {"machine": "a machine", **to_dict(TINY)})
    write_json(tmp_path / "study.json", figures | {"made": made})
    write_report(tmp_path / "study.json", tmp_path)
    report = (tmp_path / "report.md").read_text()
    labels = (rows["associated"].label, systems.B[0].label, systems.D[0].label, "LlamaGen", "IAR", "CTF", "IAR2", "real images")
    assert all(f"| {label} |" in report for label in labels)
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert pictures == set(re.findall(r"[\w-]+\.png", report)) and "study-C-samples.png" in pictures
    assert set(figures["C"]["systems"]["ctf"]["stages"]) == {"ctf-coarse", "ctf-fine"}
    assert all(row["images_per_second"] > 0 for row in figures["C"]["systems"].values())
    saved = json.loads((tmp_path / "study.json").read_text())
    assert set(saved["B"]["compressed"]["seeds"]) == {"0", "1"} and "one seed" in report
    assert "On a machine: tokenizers of" in report


def test_some_rows_keep_what_they_are_set_against(capsys):
    """--rows leaves the base row in, and names what there is."""
    assert [row.name for row in chosen(systems.A, "A", ["product", "reversed"])] == ["product", "associated"]
    assert chosen(systems.D, "D", ()) == list(systems.D)
    with pytest.raises(SystemExit):
        call(study.main, "--rows", "product", "none", "--dry")
    assert "--rows none: no such row, choose from single-1024" in capsys.readouterr().err


def test_the_picture_shows_each_class_in_its_column(tmp_path):
    """Samples come with classes in turn; a row shows as many of a class as all rows have."""
    data = Data(tmp_path, "fashion-mnist")
    data.images.folder.mkdir(parents=True)
    labels = np.array([2, 0, 1, 1, 0, 2, 2])
    flat = np.broadcast_to(labels[:, None, None, None] * 40, (7, 32, 32, 3)).astype(np.uint8)
    np.savez(data.images.path("test.npz"), images=flat, labels=labels, class_names=np.array(["a", "b", "c"]))
    step = Step(tmp_path, "samples", "some", ("a.py",))
    step.folder.mkdir(parents=True)
    np.savez(step.path("samples.npz"), arr_0=np.broadcast_to(
        np.arange(100, 108)[:, None, None, None], (8, 32, 32, 3)).astype(np.uint8))
    picture = np.asarray(gallery(data, {"one": step}))
    lines = [line[line.max(1) < 255][:, 0] for line in (picture[-110], picture[-40])]  # through the middle of both rows
    columns = [line[np.flatnonzero(np.diff(line, prepend=256))] for line in lines]
    assert [set(line.tolist()) - {0} for line in columns] == [{40, 80}, {100, 101, 102, 103, 104, 105}]
    assert [value for value in columns[1].tolist() if value >= 100] == [100, 103, 101, 104, 102, 105]


def test_a_rate_leaves_the_first_batch_out(tmp_path):
    """It compiles; and a rate of nothing is refused, with what to do."""
    assert warm_rate([60.0, 61.0, 62.0], 10, ALONE) == {"warm_images_per_second": 10.0} and not warm_rate([60.0], 10, ALONE)
    step = Step(tmp_path, "samples", "timed", ("a.py",))
    step.folder.mkdir(parents=True)
    write_json(step.path("samples.rate.json"), {"images": 10, "images_per_second": 1.0})
    with pytest.raises(UserError, match="delete that folder"):
        timed_rate(step)


def test_the_readme_says_what_the_study_found():
    """Its table is of study.json, figure by figure."""
    readme = (REPOSITORY / "README.md").read_text()
    rows = json.loads((REPOSITORY / "scripts/paper/study/study.json").read_text())["C"]["systems"]
    for name, row in rows.items():
        label = row["label"] if name != "beyond" else f"{row['label']} (`--recipe beyond`)"
        weights = sum(stage["parameters"] for stage in row["stages"].values()) / 1e6
        found = [mean(row, lambda figures, key=key: figures["images"][key]).text(digits) for key, digits in
                 (("frechet", 2), ("precision", 3), ("recall", 3), ("class_accuracy", 3))]
        assert f"| {label} | {weights:.1f}M | {' | '.join(found)} | {row['images_per_second']:.0f} |" in readme


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    """--dry prints commands for every part, and leaves the folder as it was."""
    data, runner = Data(tmp_path / "study", "cifar10"), Runner(dry=True)
    trials = {row.name: Trial(data, row, dual_tokenizer(data)) for row in systems.B}
    assert learning_rates(trials, (1.0, 2.0, 3.0), runner)["compressed"]["lr"] == 2.0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(set(printed)) and sum("train_c2i.py" in line for line in printed) == 3 * len(systems.B)
    assert all(line.startswith(sys.executable) for line in printed) and not (tmp_path / "study").exists()
    assert part_c(data, systems.BEYOND[0], (0, 1), (1.0,), runner) == {}
    printed = capsys.readouterr().out
    assert all(script in printed for script in ("rearrange.py", "sweep_c2i.py", "sample_c2i_ddp.py", "judge.py", "step_times.py"))
