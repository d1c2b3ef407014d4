"""The evaluator against ADM's own numbers: metrics, Inception features, and the command line around them."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy.spatial.distance import cdist

from evaluations.c2i import evaluator, features
from evaluations.c2i.evaluation_file import EvaluationFile
from evaluations.c2i.extractors import EXTRACTORS
from evaluations.c2i.inception import load_inception
from evaluations.c2i.metrics import (
    Moments,
    feature_statistics,
    frechet_distance,
    inception_score,
    nearest_radii,
    precision_recall,
)
from scripts.fuzz_commands import FEW, FewFeatures
from utils.config import UserError

GOLDEN = Path(__file__).parent / "golden"
SCRIPT = Path(evaluator.__file__)
FIVE = ("fid", "sfid", "inception_score", "precision", "recall")


@pytest.fixture(scope="module")
def adm() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "adm_metrics.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def adm_features() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "adm_inception.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def random_inception():
    spec = importlib.util.spec_from_file_location("random_inception", GOLDEN / "random_inception.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def images(random_inception) -> np.ndarray:
    return random_inception.images(1, 24, 64, 64)  # [24, 64, 64, 3]


@pytest.fixture(scope="module")
def weights(random_inception, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save({key: torch.from_numpy(value) for key, value in random_inception.make().items()}, path)
    return path


@pytest.fixture(scope="module")
def batches(images, tmp_path_factory) -> tuple[Path, Path]:
    """A reference of 14 images, stored, and a sample of 10, compressed."""
    folder = tmp_path_factory.mktemp("batches")
    np.savez(folder / "ref.npz", images[:14])
    np.savez_compressed(folder / "sample.npz", images[14:], np.arange(10) % 5, kind="samples")
    return folder / "ref.npz", folder / "sample.npz"


def run(*args) -> None:
    evaluator.main([*map(str, args), "--device", "cpu"])


@pytest.mark.parametrize("case", ["a", "b", "c"], ids=["full rank", "singular", "zero columns"])
def test_frechet_distance_is_adms(adm, case):
    """Published FIDs compare only if the formula agrees, also where a covariance is singular."""
    parts = [feature_statistics(adm[f"fid_{case}_x{i}"]) for i in (1, 2)]
    assert frechet_distance(*parts[0], *parts[1]) == pytest.approx(adm[f"fid_{case}_value"], rel=1e-6)
    stored = [adm[f"fid_{case}_{name}"] for name in ("mu1", "sigma1", "mu2", "sigma2")]
    assert frechet_distance(*stored) == pytest.approx(adm[f"fid_{case}_value"], rel=1e-6)


def test_frechet_distance_of_few_samples_is_exact():
    """With fewer images than features, rounding noise in the null space must not add to the distance."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(6, 300)), rng.normal(size=(9, 300)) + 0.1
    a, b = (x - x.mean(0)) / np.sqrt(5), (y - y.mean(0)) / np.sqrt(8)
    root = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + (a ** 2).sum() + (b ** 2).sum() - 2 * root
    assert frechet_distance(*feature_statistics(x), *feature_statistics(y)) == pytest.approx(expected, rel=1e-11)


def test_frechet_distance_refuses_different_features():
    """Statistics of another network must not be broadcast into a plausible number."""
    with pytest.raises(ValueError, match="different shapes"):
        frechet_distance(np.zeros(3), np.eye(3), np.zeros(1), np.eye(1))


def test_moments_do_not_depend_on_batches():
    """Streaming must give the covariance of the whole, also where the mean is large beside the spread."""
    rows = np.random.default_rng(0).normal(size=(101, 7)) + 1e4
    moments = Moments()
    for part in np.array_split(rows, [1, 40, 90]):
        moments.update(part)
    mean, sigma = moments.finish()
    np.testing.assert_allclose(mean, rows.mean(0), rtol=1e-13)
    np.testing.assert_allclose(sigma, np.cov(rows, rowvar=False), rtol=1e-9, atol=1e-9)


def test_inception_score_is_adms(adm):
    """Splits, their order and the weight of a partial split all move the score."""
    assert inception_score(adm["is_probs"], 500) == pytest.approx(adm["is_split500"], rel=1e-6)
    assert inception_score(adm["is_probs"]) == pytest.approx(adm["is_default"], rel=1e-6)


def test_inception_score_of_impossible_classes_is_finite():
    """A class whose probability underflows must not turn the score into NaN."""
    assert inception_score(np.eye(4, dtype=np.float32)) == pytest.approx(4)


@pytest.mark.parametrize("path", ["pr", "pr32"], ids=["half precision", "single precision"])
def test_precision_and_recall_are_adms(adm, path):
    """Both precisions decide ties differently; ADM falls back to single where half overflows."""
    reference, sample = adm[f"{path}_ref"], adm[f"{path}_sample"]
    assert precision_recall(reference, sample) == (adm[f"{path}_precision"], adm[f"{path}_recall"])
    for side, rows in (("ref", reference), ("sample", sample)):
        np.testing.assert_allclose(nearest_radii(rows), adm[f"{path}_radii_{side}"][:, 0], rtol=1e-6)


def test_half_precision_radii_are_adms_to_the_bit(adm):
    """Radii are compared with distances from the same rounding: a last bit changes who is inside."""
    np.testing.assert_array_equal(nearest_radii(adm["pr_ref"]), adm["pr_radii_ref"][:, 0])


def test_precision_and_recall_do_not_depend_on_tiles(adm):
    """50,000 images are compared tile by tile: the seams must not show."""
    reference, sample = adm["pr_ref"], adm["pr_sample"]
    assert precision_recall(reference, sample, tile=170) == precision_recall(reference, sample)


def test_features_are_adms(adm_features, random_inception, images, weights):
    """Resize, normalisation, layer and order of the features define FID, sFID and inception score; any image size."""
    network, _ = load_inception(weights, torch.device("cpu"))
    for name, batch in (("ref", images), ("big", random_inception.images(3, 3, 320, 288))):
        outputs = network(torch.from_numpy(batch).permute(0, 3, 1, 2))
        for key, ours in zip(("pool3", "spatial", "probs"), outputs, strict=True):
            theirs = adm_features[f"{name}_{key}"]
            assert np.linalg.norm(ours.numpy() - theirs) < 1e-5 * np.linalg.norm(theirs), f"{name} {key}"


def expected_metrics(features: dict[str, np.ndarray]) -> dict[str, float]:
    """The five metrics of images 14 to 23 against images 0 to 13, in float64 from ADM's own features."""
    ref, sample = ({key: features[f"ref_{key}"][rows].astype(np.float64) for key in ("pool3", "spatial", "probs")}
                   for rows in (slice(14), slice(14, 24)))

    def distance(key):
        a, b = ref[key], sample[key]
        cross = (a - a.mean(0)) @ (b - b.mean(0)).T / np.sqrt((len(a) - 1) * (len(b) - 1))
        variances = a.var(0, ddof=1).sum() + b.var(0, ddof=1).sum()
        return ((a.mean(0) - b.mean(0)) ** 2).sum() + variances - 2 * scipy.linalg.svdvals(cross).sum()

    probs = sample["probs"]
    radius = {name: np.sort(cdist(x, x), axis=1)[:, 3] for name, x in (("ref", ref["pool3"]),
                                                                       ("sample", sample["pool3"]))}
    between = cdist(ref["pool3"], sample["pool3"])
    return {"fid": distance("pool3"), "sfid": distance("spatial"),
            "inception_score": np.exp((probs * np.log(probs / probs.mean(0))).sum(1).mean()),
            "precision": (between <= radius["ref"][:, None]).any(0).mean(),
            "recall": (between <= radius["sample"]).any(1).mean()}


@pytest.fixture(scope="module")
def command_line(batches, weights, tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path]:
    """The finished command and its JSON file, run from a folder outside the repository."""
    folder = tmp_path_factory.mktemp("elsewhere")
    command = [sys.executable, str(SCRIPT), *map(str, batches), "--inception-weights", str(weights), "--json",
               "new/result.json", "--batch-size", "5", "--device", "cpu"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done, folder / "new" / "result.json"


def test_command_line(command_line, adm_features):
    """What a user runs gives ADM's numbers as a table and as JSON."""
    done, path = command_line
    result = json.loads(path.read_text())
    for key, value in expected_metrics(adm_features).items():
        assert result[key] == pytest.approx(value, rel=1e-4), key
    lines = done.stdout.splitlines()
    assert [line.split()[-1] for line in lines] == [f"{result[key]:.4f}" for key in FIVE]
    assert len({len(line) for line in lines}) == 1
    assert result["counts"] == {"reference": 14, "sample": 10}
    assert result["settings"]["purpose"] == "generation"
    assert "WARNING: SAMPLE" in done.stderr and "50000 images" in done.stderr
    assert [file.name for file in path.parent.iterdir()] == ["result.json"]


def test_cached_features_are_used_again(command_line, batches, weights, tmp_path, monkeypatch):
    """A second evaluation takes seconds instead of the network's minutes, and gives the same numbers."""
    monkeypatch.setattr(features, "compute_features", None)  # calling it fails
    run(*batches, "--inception-weights", weights, "--json", tmp_path / "second.json")
    first, second = (json.loads(path.read_text()) for path in (command_line[1], tmp_path / "second.json"))
    assert all(first[key] == second[key] for key in FIVE)


class StubNetwork(FewFeatures):
    """Counts its batches."""

    calls = 0

    def forward(self, images):
        StubNetwork.calls += 1
        return super().forward(images)


@pytest.fixture
def small(monkeypatch) -> None:
    """Fewer features, so that files of statistics stay small."""
    monkeypatch.setitem(EXTRACTORS, "inception", FEW)


@pytest.fixture
def stub(small, monkeypatch, tmp_path) -> Path:
    """Put the stub in the network's place; returns a file to name as weights."""
    path = tmp_path / "stub.pth"
    path.write_bytes(b"one")
    stub = replace(FEW, load=lambda given, device: (StubNetwork(), path.read_bytes().hex() * 8))
    monkeypatch.setitem(EXTRACTORS, "inception", stub)
    StubNetwork.calls = 0
    return path


def test_changed_npz_or_weights_never_meet_old_features(stub, images, tmp_path):
    """Samples overwritten under the same name, or other weights, must not be answered from the cache."""
    ref, sample = tmp_path / "ref.npz", tmp_path / "sample.npz"
    np.savez(ref, images[:8])
    np.savez(sample, images[8:16])
    for change, calls in ((None, 2), (None, 2), ("sample", 3), ("weights", 5)):
        if change == "sample":
            np.savez(sample, images[16:])
        if change == "weights":
            stub.write_bytes(b"two")
        run(ref, sample, "--inception-weights", stub)
        assert StubNetwork.calls == calls, change
    assert len(list(tmp_path.glob("sample.features-*.npz"))) == 2  # one each of the weights; the old images' is gone


def test_damaged_cache_is_computed_again(stub, images, tmp_path, caplog):
    """A half-written file from elsewhere costs time, not a traceback."""
    ref = tmp_path / "ref.npz"
    np.savez(ref, images[:8])
    run(ref, ref, "--inception-weights", stub)
    next(tmp_path.glob("ref.features-*")).write_bytes(b"PK")
    run(ref, ref, "--inception-weights", stub)
    assert "computed again" in caplog.text


def test_no_cache_leaves_nothing_behind(stub, images, tmp_path):
    """Whoever says --no-cache keeps a folder clean."""
    ref = tmp_path / "ref.npz"
    np.savez(ref, images[:8])
    run(ref, ref, "--inception-weights", stub, "--no-cache")
    assert {file.name for file in tmp_path.iterdir()} == {"ref.npz", "stub.pth"}


def test_unwritable_folder_only_costs_the_cache(stub, images, tmp_path, monkeypatch, caplog, capsys):
    """References often lie in a shared folder that one may only read."""
    ref = tmp_path / "ref.npz"
    np.savez(ref, images[:8])

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(np, "savez", refuse)
    run(ref, ref, "--inception-weights", stub)
    assert "could not be kept" in caplog.text and "FID" in capsys.readouterr().out


def statistics(value: float) -> dict[str, np.ndarray]:
    return {key: np.full(shape, value, np.float32) for output in FEW.outputs for key, shape in output.statistics_shapes.items()}


def test_stored_statistics_replace_those_of_the_images(stub, images, tmp_path):
    """ADM's VIRTUAL batches carry statistics of the whole training set, which define the published FID."""
    ref, sample = tmp_path / "ref.npz", tmp_path / "sample.npz"
    np.savez(ref, images[:8], **statistics(0.0))
    np.savez(sample, images[:8])
    run(ref, sample, "--inception-weights", stub, "--json", tmp_path / "r.json")
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["fid"] > 1 and result["sfid"] > 1
    assert result["precision"] == result["recall"] == 1  # from arr_0, which is the sample's


def test_reference_without_images_gives_no_precision(stub, images, tmp_path, caplog, capsys):
    """Statistics alone serve FID; what they cannot give is said, not invented."""
    ref, sample = tmp_path / "ref.npz", tmp_path / "sample.npz"
    np.savez(ref, **{key: value for key, value in statistics(0.0).items() if key in ("mu", "sigma")})
    np.savez(sample, images[:8])
    run(ref, sample, "--inception-weights", stub, "--json", tmp_path / "r.json")
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["fid"] is not None and result["inception_score"] is not None
    assert result["sfid"] is None and result["precision"] is None and result["recall"] is None
    assert capsys.readouterr().out.count("n/a") == 3
    assert "precision and recall need images" in caplog.text


def test_float_images_equal_bytes(stub, images, tmp_path):
    """Floats from 0 to 255 are what ADM accepts besides uint8."""
    np.savez(tmp_path / "bytes.npz", images[:8])
    np.savez(tmp_path / "floats.npz", images[:8].astype(np.float64))
    run(tmp_path / "bytes.npz", tmp_path / "floats.npz", "--inception-weights", stub, "--json", tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["fid"] == pytest.approx(0, abs=1e-9)


REFUSALS = {
    "type": (dict(arr_0=np.zeros((8, 4, 4, 3), np.int64)), "type int64, not uint8 or float"),
    "channels": (dict(arr_0=np.zeros((8, 3, 4, 4), np.uint8)), r"\(8, 3, 4, 4\), not \(N, H, W, 3\)"),
    "axes": (dict(arr_0=np.zeros((8, 4, 3), np.uint8)), r"not \(N, H, W, 3\)"),
    "unit range": (dict(arr_0=np.full((8, 4, 4, 3), 0.5, np.float32)), "from 0.5 to 0.5, not from 0 to 255"),
    "signed range": (dict(arr_0=np.full((8, 4, 4, 3), -1.0, np.float32)), "from -1 to -1, not from 0 to 255"),
    "not a number": (dict(arr_0=np.full((8, 4, 4, 3), np.nan, np.float32)), "from nan to nan, not from 0 to 255"),
    "objects": (dict(arr_0=np.array([{}])), "type object, not uint8 or float"),
    "key": (dict(images=np.zeros((8, 4, 4, 3), np.uint8)), "has no arr_0, only images"),
    "statistics only": (statistics(0.0), "has no arr_0, only mu"),
    "too few": (dict(arr_0=np.zeros((3, 4, 4, 3), np.uint8)), "3 images, but precision and recall need at least 4"),
    "half statistics": (dict(arr_0=np.zeros((8, 4, 4, 3), np.uint8), mu=np.zeros(2048)), "has mu but not sigma"),
    "other network": (dict(arr_0=np.zeros((8, 4, 4, 3), np.uint8), mu=np.zeros(768), sigma=np.eye(768)),
                      r"shape \(768,\), not float \(64,\)"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_unusable_sample_is_refused_in_a_sentence(case, images, tmp_path, stub):
    """A wrong file is named before the network works for an hour, with what is wrong and what helps."""
    content, message = REFUSALS[case]
    ref, sample = tmp_path / "ref.npz", tmp_path / "sample.npz"
    np.savez(ref, images[:8])
    np.savez(sample, **content)
    with pytest.raises(UserError, match=message) as error:
        run(ref, sample, "--inception-weights", stub)
    assert str(sample) in str(error.value) and StubNetwork.calls == 0


def test_unreadable_files_are_refused_in_a_sentence(images, tmp_path, stub):
    """Missing, foreign and damaged files and options that cannot work end in one line, never in a traceback."""
    good, other = tmp_path / "good.npz", tmp_path / "other.npz"
    np.savez(good, images[:8])
    np.save(tmp_path / "array.npy", images[:8])
    other.write_bytes(good.read_bytes()[:5000])
    damaged = bytearray(good.read_bytes())
    damaged[len(damaged) // 2] ^= 255
    (tmp_path / "damaged.npz").write_bytes(damaged)
    for args, message in (
        ((tmp_path / "none.npz", good), "REF .*none.npz.* does not exist"),
        ((good, tmp_path), "SAMPLE .* is not an npz"),
        ((good, tmp_path / "array.npy"), "SAMPLE .*array.npy is not an npz"),
        ((good, other), "SAMPLE .*other.npz is not an npz"),
        ((good, tmp_path / "damaged.npz"), "SAMPLE .*damaged.npz cannot be read to its end .*CRC"),
        ((good, good, "--batch-size", 0), "--batch-size 0 is out of range"),
        ((good, good, "--json", tmp_path), "--json .* is a folder"),
        ((good, good, "--json", good / "x" / "r.json"), "--json.* cannot be written"),
    ):
        with pytest.raises(UserError, match=message):
            run(*args, "--inception-weights", stub)


def test_unusable_weights_are_refused_in_a_sentence(batches, tmp_path, monkeypatch):
    """The option that would help is named, also on a machine without a connection."""
    wrong, text = tmp_path / "wrong.pth", tmp_path / "text.pth"
    torch.save({"weight": torch.zeros(1)}, wrong)
    text.write_text("no weights")
    for path, message in ((tmp_path / "none.pth", "does not exist"), (tmp_path, "is a folder"),
                          (wrong, "other keys or shapes"), (text, "not a readable torch file")):
        with pytest.raises(UserError, match=f"--inception-weights .*{message}"):
            run(*batches, "--inception-weights", path)

    def fail(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(UserError, match=r"could not be downloaded \(no route\).*--inception-weights"):
        run(*batches)


def test_user_errors_are_one_line(tmp_path):
    """As a program: exit code 2 and a single line."""
    done = subprocess.run([sys.executable, str(SCRIPT), "none.npz", "none.npz"], cwd=tmp_path, capture_output=True,
                          text=True, check=False, env={**os.environ, "RANK": "0"})
    assert done.returncode == 2 and done.stderr.startswith("error: REF") and done.stderr.count("\n") == 1


WARNINGS = {
    "few samples": ({}, {}, [], "fewer than 50000 images"),
    "unbalanced labels": ({}, dict(arr_1=np.array([0, 0, 0, 1])), [], "unbalanced labels, 1 to 3 images per class"),
    "sorted by class": ({}, dict(count=6000, arr_1=np.repeat(np.arange(10), 600)), [], "sorted by class"),
    "labels of no use": ({}, dict(arr_1=np.zeros(3)), [], "arr_1 that is not one integer label"),
    "sizes": (dict(size=8), {}, [], "8x8 pixels and those of .* 4x4"),
    "swapped": (dict(kind="samples"), {}, [], "holds samples, not real images"),
    "virtual batch for reconstruction": (dict(count=10_000, **statistics(0.0)), dict(kind="reconstruction"), [],
                                         "looks like ADM's VIRTUAL_imagenet batch"),
    "virtual batch by option": (dict(count=10_000, **statistics(0.0)), {}, ["--purpose", "reconstruction"],
                                "looks like ADM's VIRTUAL_imagenet batch"),
    "other count of reconstructions": (dict(count=5), dict(kind="reconstruction"), [], "the same images before and"),
    "validation for generation": (dict(kind="validation"), dict(kind="samples"), [], "holds validation images"),
    "own statistics": ({}, statistics(0.0), [], "they replace the statistics"),
    "small reference": ({}, {}, [], "too few for a covariance"),
}


def make_file(path: Path, count: int = 4, size: int = 4, **content) -> EvaluationFile:
    np.savez(path, arr_0=np.zeros((count, size, size, 3), np.uint8), **content)
    return EvaluationFile(path, "REF" if path.name == "ref.npz" else "SAMPLE")


@pytest.mark.parametrize("case", WARNINGS)
def test_pitfalls_are_pointed_out(case, tmp_path, small):
    """The mistakes that make published numbers impossible to reproduce are silent elsewhere."""
    reference, sample, args, message = WARNINGS[case]
    files = make_file(tmp_path / "ref.npz", **reference), make_file(tmp_path / "sample.npz", **sample)
    purpose = evaluator.resolve_purpose(args[1] if args else "auto", files[1])
    found = "\n".join(evaluator.find_pitfalls(*files, purpose))
    assert re.search(message, found)


def test_right_reference_gets_no_warning(tmp_path, small):
    """A warning that always appears is read by nobody."""
    virtual = make_file(tmp_path / "ref.npz", count=10_000, **statistics(0.0))
    labels = np.tile(np.arange(1000), 50)
    sample = make_file(tmp_path / "sample.npz", count=50_000, arr_1=labels, kind="samples")
    assert evaluator.find_pitfalls(virtual, sample, evaluator.resolve_purpose("auto", sample)) == []
    validation = make_file(tmp_path / "ref.npz", count=50_000, kind="validation")
    rebuilt = make_file(tmp_path / "sample.npz", count=50_000, kind="reconstruction")
    assert evaluator.find_pitfalls(validation, rebuilt, evaluator.resolve_purpose("auto", rebuilt)) == []


def test_features_stream_ahead_in_order():
    """The reading thread must neither reorder batches nor swallow its errors."""
    assert list(features.ahead(range(5))) == [0, 1, 2, 3, 4]

    def broken():
        yield 1
        raise UserError("damaged")

    with pytest.raises(UserError, match="damaged"):
        list(features.ahead(broken()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_gives_the_same_numbers(batches, weights, adm, adm_features, tmp_path):
    """Reduced precision on a GPU must not reach features or distances."""
    assert precision_recall(adm["pr_ref"], adm["pr_sample"], device="cuda") == (adm["pr_precision"], adm["pr_recall"])
    evaluator.main([*map(str, batches), "--inception-weights", str(weights), "--device", "cuda", "--no-cache", "--json",
                    str(tmp_path / "r.json")])
    result = json.loads((tmp_path / "r.json").read_text())
    for key, value in expected_metrics(adm_features).items():
        assert result[key] == pytest.approx(value, rel=1e-4), key
