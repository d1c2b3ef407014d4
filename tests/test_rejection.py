"""Rejection sampling (autoregressive/sample/rejection.py): what is kept, what the npz says of it, what is refused."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from autoregressive.sample import sample_c2i_ddp
from autoregressive.sample.pipeline import Pipeline
from autoregressive.sample.rejection import RejectionOptions, load_selector, select
from tests.conftest import call, command
from tests.test_npz import ALONE
from utils.checkpoint import export, fingerprint
from utils.classifier import ClassifierConfig, SmallClassifier, load_classifier
from utils.config import UserError
from utils.crops import to_tensor
from utils.image_store import ImageStore


def export_classifier(path: Path, num_classes: int = 3, seed: int = 0) -> Path:
    """A file as evaluations/c2i/classifier.py writes it, of random weights."""
    torch.manual_seed(seed)
    model = SmallClassifier(ClassifierConfig(num_classes, (8, 16)))
    export(path, "classifier", model.state_dict(), {"model": asdict(model.config)})
    return path


def options(models: tuple[Path, Path], out: Path, *extra: object) -> list[object]:
    """A command line that wants seven samples of three classes."""
    return ["--gpt-ckpt", models[0], "--vq-ckpt", models[1], "--num-samples", 7, "--cfg-scale", 1.5, 3.0,
            "--device", "cpu", "--batch-size", 4, "--out", out, *extra]


def read(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an npz."""
    with np.load(path) as data:
        return dict(data)


def expected(drawn: dict[str, np.ndarray], probabilities: torch.Tensor) -> np.ndarray:
    """The seven images to keep of candidates with probabilities [N, 3], found one class at a time."""
    chosen = {}
    for label, wanted in enumerate((3, 2, 2)):
        own = [(-float(probabilities[row, label]), row) for row, its in enumerate(drawn["arr_1"]) if its == label]
        chosen[label] = sorted(row for _, row in sorted(own)[:wanted])
    return np.stack([drawn["arr_0"][chosen[index % 3][index // 3]] for index in range(7)])


@pytest.fixture
def drawn_rows(monkeypatch) -> list[int]:
    """The samples that are drawn, as they are drawn."""
    seen: list[int] = []
    start = Pipeline.start

    def record(self, labels, rows):
        seen.extend(rows)
        return start(self, labels, rows)

    monkeypatch.setattr(Pipeline, "start", record)
    return seen


def refused(capsys, *arguments: object) -> str:
    """Run a command that must be refused; returns its one sentence."""
    with pytest.raises(SystemExit) as stopped:
        call(sample_c2i_ddp.main, *arguments)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stopped.value.code == 2 and len(lines) == 1 and lines[0].endswith(".")
    return lines[0]


# --- selection -------------------------------------------------------------------------------------------------------


def test_the_best_of_each_class_are_kept():
    """A class that lost its count, or took another's candidates, would bend every metric."""
    rng = np.random.default_rng(0)
    labels = rng.integers(5, size=40)
    candidate_labels, scores = np.tile(labels, 6), rng.random(240)
    chosen = select(scores, candidate_labels, labels)
    assert np.array_equal(candidate_labels[chosen], labels) and len(set(chosen.tolist())) == 40
    for label in range(5):
        rows = np.flatnonzero(candidate_labels == label)
        left = np.setdiff1d(rows, chosen)
        kept = chosen[labels == label]
        assert scores[kept].min() > scores[left].max() and (np.diff(kept) > 0).all()


def test_equal_scores_keep_the_first():
    """A sure classifier gives many candidates the same probability: chance must not choose among them."""
    labels = np.array([0, 1, 0])
    assert select(np.ones(9), np.tile(labels, 3), labels).tolist() == [0, 1, 2]
    assert select(np.array([0, 1, 0, 0, 0, 1, 1, 0, 1.0]), np.tile(labels, 3), labels).tolist() == [5, 1, 6]


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_npz_holds_the_best_and_says_so(models, tmp_path, capsys):
    """A figure with rejection sampling must not pass for one without: the file itself has to tell."""
    out, classifier = tmp_path / "out.npz", export_classifier(tmp_path / "small.safetensors")
    call(sample_c2i_ddp.main, *options(models, out, "--rejection-ratio", 3, "--classifier", classifier,
                                       "--classifier-batch-size", 4))
    made, drawn, model = read(out), read(tmp_path / "out.candidates.npz"), load_classifier(classifier)
    assert drawn["arr_0"].shape == (21, 32, 32, 3) and drawn["arr_1"].tolist() == [i % 7 % 3 for i in range(21)]
    assert made["arr_1"].tolist() == [i % 3 for i in range(7)]
    assert drawn["kind"] == "candidates" and made["kind"] == "samples" and (tmp_path / "out.png").exists()
    probabilities = model(to_tensor(drawn["arr_0"])).softmax(1)
    assert np.array_equal(made["arr_0"], expected(drawn, probabilities))
    about = json.loads(str(made["options"]))
    note = about["rejection"]
    assert about["seed"] == 0 and about["cfg_scale"] == [1.5, 3.0]
    assert (note["ratio"], note["classifier"]) == (3, "small.safetensors")
    assert note["classifier_fingerprint"] == fingerprint(model.state_dict())
    before, after = note["mean_probability_candidates"], note["mean_probability_kept"]
    assert before == pytest.approx(float(probabilities[range(21), drawn["arr_1"]].mean()), abs=1e-6) and after > before
    log = capsys.readouterr().err
    assert f"kept 7 of 21 candidates: mean probability of their class {after:.4f}, before {before:.4f}" in log
    assert "out.candidates.npz: 21 candidates" in log


def test_nothing_is_drawn_twice(models, tmp_path, monkeypatch, drawn_rows, capsys):
    """Candidates are hours of a GPU: a crash, the same command again and another classifier must all keep them."""
    out, first = tmp_path / "out.npz", export_classifier(tmp_path / "first.safetensors")
    arguments = options(models, out, "--rejection-ratio", 2, "--classifier")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        write = ImageStore.write
        patch.setattr(ImageStore, "write", lambda store, rows, new: stop() if rows[0] else write(store, rows, new))
        call(sample_c2i_ddp.main, *arguments, first)
    drawn_rows.clear()
    call(sample_c2i_ddp.main, *arguments, first)
    assert set(drawn_rows) == set(range(4, 14))
    drawn_rows.clear()
    before, made = out.stat(), read(out)
    call(sample_c2i_ddp.main, *arguments, first)
    assert "is there already" in capsys.readouterr().err and out.stat() == before

    second = export_classifier(tmp_path / "second.safetensors", seed=1)
    assert "made with rejection" in refused(capsys, *arguments, second)  # never taken for the other's
    out.unlink()
    call(sample_c2i_ddp.main, *arguments, second)
    drawn = read(tmp_path / "out.candidates.npz")
    probabilities = load_classifier(second)(to_tensor(drawn["arr_0"])).softmax(1)
    assert np.array_equal(read(out)["arr_0"], expected(drawn, probabilities)) and not drawn_rows
    assert not np.array_equal(read(out)["arr_0"], made["arr_0"])


def stop() -> None:
    raise KeyboardInterrupt


def test_results_of_another_ratio_are_refused(models, tmp_path, drawn_rows, capsys):
    """Neither samples nor candidates of another ratio may be taken for the result, nor overwritten."""
    out = tmp_path / "out.npz"
    arguments = options(models, out, "--classifier", export_classifier(tmp_path / "c.safetensors"), "--rejection-ratio")
    call(sample_c2i_ddp.main, *arguments, 1)  # off
    assert "rejection" not in json.loads(str(read(out)["options"])) and list(tmp_path.glob("*.npz")) == [out]
    assert "made with rejection None, not with {'ratio': 2" in refused(capsys, *arguments, 2)
    out.unlink()
    call(sample_c2i_ddp.main, *arguments, 2)
    drawn_rows.clear()
    assert "made with rejection {'ratio': 2" in refused(capsys, *arguments, 3)
    assert "made with rejection {'ratio': 2" in refused(capsys, *arguments, 1)
    out.unlink()
    assert "out.candidates.npz exists and was made with rejection_ratio 2, not with 3" in refused(capsys, *arguments, 3)
    (tmp_path / "out.candidates.npz").unlink()
    ImageStore(out, (7, 32, 32, 3), {}, ALONE).close()  # begun by another command
    assert "out.partial was begun with" in refused(capsys, *arguments, 3)
    assert not drawn_rows


def test_two_processes_select_as_one(models, tmp_path):
    """The share of a process must not show in the result."""
    extra = ["--rejection-ratio", 3, "--classifier", export_classifier(tmp_path / "c.safetensors"),
             "--classifier-batch-size", 4]
    for name, processes in (("one", 1), ("two", 2)):  # both on one thread each: probabilities to the last bit
        command("autoregressive/sample/sample_c2i_ddp.py", *options(models, tmp_path / f"{name}.npz", *extra),
                processes=processes)
    for suffix in (".npz", ".candidates.npz"):
        one, two = read(tmp_path / f"one{suffix}"), read(tmp_path / f"two{suffix}")
        assert one.keys() == two.keys() and all(np.array_equal(one[key], two[key]) for key in one)


@pytest.fixture(scope="module")
def resnet(tmp_path_factory) -> tuple[torch.nn.Module, Path]:
    """A timm ResNet-18 of three classes with random weights, and the file of its weights."""
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=3).eval()
    model.state_dict()["fc.weight"].mul_(30)  # opinions that differ by image
    path = tmp_path_factory.mktemp("timm") / "resnet18.pth"
    torch.save(model.state_dict(), path)
    return model, path


def test_a_timm_model_selects(models, resnet, tmp_path):
    """ImageNet classifiers see what they were trained to see only through their own preprocessing."""
    model, weights = resnet
    call(sample_c2i_ddp.main, *options(models, tmp_path / "out.npz", "--rejection-ratio", 2,
                                       "--classifier", "resnet18.a1_in1k", "--classifier-weights", weights))
    made, drawn = read(tmp_path / "out.npz"), read(tmp_path / "out.candidates.npz")
    pixels = []
    for image in drawn["arr_0"]:  # as resnet18.a1_in1k was tested: bicubic to 224 / 0.95, centre crop, normalised
        large = np.asarray(Image.fromarray(image).resize((235, 235), Image.Resampling.BICUBIC))[6:230, 6:230] / 255
        pixels.append((large - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225])
    with torch.inference_mode():
        probabilities = model(torch.from_numpy(np.stack(pixels)).float().movedim(-1, 1)).softmax(1)
    assert np.array_equal(made["arr_0"], expected(drawn, probabilities))
    note = json.loads(str(made["options"]))["rejection"]
    assert note["classifier"] == "resnet18.a1_in1k"
    assert note["classifier_fingerprint"] == fingerprint(model.state_dict())
    mean = float(probabilities[range(14), drawn["arr_1"]].mean())
    assert note["mean_probability_candidates"] == pytest.approx(mean, 1e-3)
    assert note["mean_probability_kept"] > 1.02 * mean


# --- mistakes --------------------------------------------------------------------------------------------------------


def test_mistakes_are_told_before_anything_is_drawn(models, resnet, tmp_path, drawn_rows, capsys):
    """Not after a night of candidates: each mistake has one sentence with option, value and remedy."""
    small, five = (export_classifier(tmp_path / f"{count}.safetensors", count) for count in (3, 5))
    (tmp_path / "bad.pth").write_bytes(resnet[1].read_bytes()[:5000])
    torch.save({"fc.weight": torch.zeros(3, 512)}, tmp_path / "head.pth")
    torch.save({"fc.weight": torch.zeros(7, 512)}, tmp_path / "seven.pth")
    two, resnet18 = ("--rejection-ratio", 2), ("--classifier", "resnet18", "--classifier-weights")
    for extra, sentence in (
            (("--rejection-ratio", 0), "--rejection-ratio 0 is out of range"),
            (two, "--rejection-ratio 2 has nothing to select by: give --classifier"),
            ((*two, "--classifier", small, "--classifier-batch-size", 0), "--classifier-batch-size 0 is out of range"),
            ((*two, "--classifier", "resnet1"), "--classifier resnet1 is neither a file nor a model of timm"),
            ((*two, "--classifier", "resnet18.x"), "--classifier resnet18.x is neither a file nor"),
            ((*two, "--classifier", tmp_path / "no.safetensors"), "no.safetensors does not exist"),
            ((*two, "--classifier", models[0]), "holds a gpt, not a classifier"),
            ((*two, "--classifier", five), "5.safetensors has 5 outputs but the GPT has 3 classes"),
            ((*two, "--classifier", small, "--classifier-weights", small), "give one of the two"),
            ((*two, "--classifier", "resnet18"), "resnet18 has 1000 outputs but the GPT has 3 classes"),
            ((*two, *resnet18, tmp_path / "no.pth"), "no.pth' does not exist: give the path of a file with weights"),
            ((*two, *resnet18, tmp_path / "bad.pth"), "bad.pth is damaged or holds no weights"),
            ((*two, *resnet18, tmp_path / "head.pth"), "head.pth does not fit --classifier resnet18 (Error(s) in"),
            ((*two, *resnet18, tmp_path / "seven.pth"), "seven.pth has 7 outputs but the GPT has 3 classes"),
            ((*two, "--classifier", small, "--out", tmp_path / "x.png"), "x.candidates.png' is not the name")):
        assert sentence in refused(capsys, *options(models, tmp_path / "out.npz", *extra))
    assert not drawn_rows and not list(tmp_path.glob("out*"))


def test_an_impossible_download_names_the_way_out(tmp_path, monkeypatch):
    """Compute nodes often see no network: the weights can be brought along."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="--classifier resnet18 cannot be downloaded .*as --classifier-weights.$"):
        load_selector(RejectionOptions(2, "resnet18"), 1000)
