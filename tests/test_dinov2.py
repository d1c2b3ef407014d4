"""FD-DINOv2: features as DINOv2's own code and torch-fidelity compute them, and the evaluator's options around them."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial.distance import cdist
from torch_fidelity import feature_extractor_dinov2
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize
from transformers import Dinov2Config, Dinov2Model

from evaluations.c2i import dinov2, evaluator, features
from evaluations.c2i.dinov2 import DINOv2, load_dinov2, prepare, resample_positions
from evaluations.c2i.evaluation_file import EvaluationFile
from evaluations.c2i.extractors import EXTRACTORS
from evaluations.c2i.metrics import frechet_distance, precision_recall
from scripts.fuzz_commands import FEW
from tests.conftest import call
from tests.test_bad_input import refused

WIDTH = 16
PUBLISHED = dict(dinov2.SHAPE)  # before the fixture below
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch) -> None:
    """A network of two narrow layers in the place of 24 wide ones; all else is as it is."""
    monkeypatch.setattr(dinov2, "SHAPE", {"embed_dim": WIDTH, "depth": 2, "num_heads": 2})
    row = EXTRACTORS["dinov2"]
    monkeypatch.setitem(EXTRACTORS, "dinov2", replace(row, outputs=(replace(row.outputs[0], width=WIDTH),)))


def random_tensors(side: int = 37) -> dict[str, torch.Tensor]:
    """Random weights under the names of DINOv2's file, with positions of side x side cells."""
    generator = torch.Generator().manual_seed(0)
    shapes = {name: tensor.shape for name, tensor in DINOv2().trunk.state_dict().items()}
    shapes |= {"pos_embed": (1, 1 + side**2, WIDTH), "mask_token": (1, WIDTH)}
    return {name: torch.randn(shape, generator=generator) * (0.3 if len(shape) > 1 else 0.5) + (name.endswith("norm.weight"))
            for name, shape in shapes.items()}


@pytest.fixture
def weights(tmp_path) -> Path:
    """A file as DINOv2 publishes it."""
    torch.save(random_tensors(), tmp_path / "dinov2.pth")
    return tmp_path / "dinov2.pth"


@pytest.fixture
def images() -> np.ndarray:
    """uint8 [60, 40, 48, 3]: smooth colours with noise."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 1, 40 * 48).reshape(1, 40, 48, 1) * rng.uniform(50, 250, (60, 1, 1, 3))
    return (ramp + rng.uniform(0, 5, (60, 40, 48, 3))).astype(np.uint8)


@pytest.fixture
def files(images, tmp_path) -> tuple[Path, Path]:
    """A reference of 32 images and a sample of 28."""
    np.savez(tmp_path / "ref.npz", images[:32])
    np.savez(tmp_path / "sample.npz", images[32:])
    return tmp_path / "ref.npz", tmp_path / "sample.npz"


def named_by_transformers(name: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """A tensor of DINOv2's file by its name in transformers, of which 5.24 has renamed some."""
    for theirs, ours in (("embeddings.patch_embeddings.projection", "patch_embed.proj"),
                         ("embeddings.position_embeddings", "pos_embed"), ("embeddings.", ""), ("layernorm", "norm"),
                         ("encoder.layer.", "blocks."), (".lambda1", ".gamma"), ("layer_scale", "ls"),
                         ("attention.output.dense", "attn.proj"), ("attention.o_proj", "attn.proj"),
                         ("attention.attention.", "attention."), ("_proj", "")):
        name = name.replace(theirs, ours)
    if found := re.fullmatch(r"(.*)\.attention\.(query|key|value|q|k|v)\.(.*)", name):
        return tensors[f"{found[1]}.attn.qkv.{found[3]}"].chunk(3)["qkv".index(found[2][0])]
    return tensors[name]


def test_features_are_those_of_another_implementation(tmp_path, images):
    """Names, order of the products, norms and the token that is read: transformers' DINOv2 with the same weights agrees."""
    tensors = random_tensors(side=16)
    torch.save(tensors, tmp_path / "same.pth")
    config = Dinov2Config(hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, image_size=224, patch_size=14)
    other = Dinov2Model(config).eval()
    other.load_state_dict({name: named_by_transformers(name, tensors) for name in other.state_dict()})
    pixels = prepare(images[:4])
    normalised = (pixels / 255 - torch.tensor(dinov2._MEAN).view(3, 1, 1)) / torch.tensor(dinov2._DEVIATION).view(3, 1, 1)
    with torch.no_grad():
        expected = other(normalised).pooler_output
    found, = load_dinov2(tmp_path / "same.pth", CPU)[0](pixels)
    assert found.shape == (4, WIDTH) and found.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_positions_are_resampled_as_dinov2_does():
    """Its factor is (16 + 0.1) / 37, not 16 / 37: another one moves all features and the distance."""
    values = torch.randn(1, 1 + 37 * 37, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def cubic(x: float) -> float:
        x = abs(x)
        return (1.25 * x - 2.25) * x * x + 1 if x <= 1 else -0.75 * (((x - 5) * x + 8) * x - 4) if x < 2 else 0.0

    matrix = np.zeros((16, 37))
    for cell in range(16):
        centre = (cell + 0.5) * 37 / 16.1 - 0.5
        for tap in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            matrix[cell, min(max(tap, 0), 36)] += cubic(centre - tap)
    expected = np.einsum("ir,jc,rcd->ijd", matrix, matrix, values[0, 1:].reshape(37, 37, 3).numpy()).reshape(256, 3)
    found = resample_positions(values)
    np.testing.assert_allclose(found[0, 1:].numpy(), expected, atol=1e-5)
    assert torch.equal(found[:, :1], values[:, :1])
    assert torch.equal(resample_positions(values[:, :257]), values[:, :257])  # already of 16 x 16 cells


def test_images_are_resized_by_pillow(images):
    """Published values are of Pillow's antialiased bicubic resize to bytes, floats being rounded before."""
    expected = [np.asarray(resize(Image.fromarray(each), [224, 224], InterpolationMode.BICUBIC)) for each in images[:3]]
    np.testing.assert_array_equal(prepare(images[:3]).permute(0, 2, 3, 1).numpy(), expected)
    assert torch.equal(prepare(images[:3] + 0.4), prepare(images[:3]))
    whole = np.random.default_rng(0).integers(0, 256, (1, 224, 224, 3), dtype=np.uint8)
    np.testing.assert_array_equal(prepare(whole).permute(0, 2, 3, 1).numpy(), whole)


def run(*args) -> dict:
    """The evaluator's JSON."""
    out = Path(args[0]).with_name("result.json")
    evaluator.main([*map(str, args), "--device", "cpu", "--batch-size", "7", "--json", str(out)])
    return json.loads(out.read_text())


def test_the_distance_is_torch_fidelitys(weights, monkeypatch, tmp_path):
    """On images that need no resize both packages see the same features, and must come to the same distance."""
    network, _ = load_dinov2(weights, CPU)
    monkeypatch.setattr(torch.hub, "load", lambda *_, **__: network.trunk)
    theirs = feature_extractor_dinov2.FeatureExtractorDinoV2("dinov2-vit-l-14", ["dinov2"])
    rng = np.random.default_rng(0)
    pixels = rng.uniform(0, 1, (50, 14, 14, 3)) * rng.uniform(0, 256, (50, 1, 1, 3))
    pixels[26:] /= 2
    pixels = pixels.astype(np.uint8).repeat(16, 1).repeat(16, 2)  # [50, 224, 224, 3]
    statistics = []
    for name, part in (("ref", pixels[:26]), ("sample", pixels[26:])):
        np.savez(tmp_path / f"{name}.npz", part)
        with torch.no_grad():
            computed, = theirs(torch.from_numpy(part).permute(0, 3, 1, 2))
        torch.testing.assert_close(network(prepare(part))[0], computed, rtol=1e-4, atol=1e-4)
        statistics.append(fid_features_to_statistics(computed.double()))
    expected = fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]
    found = run(tmp_path / "ref.npz", tmp_path / "sample.npz", "--features", "dinov2", "--dinov2-weights", weights)
    assert found["fd_dinov2"] == pytest.approx(expected, rel=1e-4) and expected > 0.1


def test_the_command_prints_what_was_asked_for(weights, files, monkeypatch, capsys):
    """One space or both, in one table and one JSON, which says whose weights; ADM's five numbers alone unless asked."""
    monkeypatch.setitem(EXTRACTORS, "inception", FEW)
    found = run(*files, "--features", "dinov2", "--dinov2-weights", weights)
    assert [line.rsplit(maxsplit=1)[0] for line in capsys.readouterr().out.splitlines()] == [
        "FD-DINOv2", "Precision (DINOv2)", "Recall (DINOv2)"]
    assert "fid" not in found and len(found["settings"]["dinov2_weights_sha256"]) == 64
    both = run(*files, "--features", "inception", "dinov2", "--dinov2-weights", weights)
    assert len(capsys.readouterr().out.splitlines()) == 8
    alone = run(*files)
    assert len(capsys.readouterr().out.splitlines()) == 5 and "fd_dinov2" not in alone
    for name, value in ({**alone, **found}).items():
        assert name not in evaluator.METRICS or both[name] == value, name


def test_features_are_kept_beside_the_files(weights, files, monkeypatch):
    """The reference's features cost minutes, and are the same for every sample; other weights never meet them."""
    first = run(*files, "--features", "dinov2", "--dinov2-weights", weights)
    computed = features.compute_features
    monkeypatch.setattr(features, "compute_features", None)  # calling it fails
    assert run(*files, "--features", "dinov2", "--dinov2-weights", weights)["fd_dinov2"] == first["fd_dinov2"]
    monkeypatch.setattr(features, "compute_features", computed)
    tensors = random_tensors()
    tensors["norm.weight"] *= 2
    torch.save(tensors, weights)
    again = run(*files, "--features", "dinov2", "--dinov2-weights", weights)
    assert again["fd_dinov2"] > first["fd_dinov2"] and len(list(files[0].parent.glob("ref.features-*.npz"))) == 2


def test_stored_statistics_are_used(weights, files, images, tmp_path, caplog):
    """A training set's statistics replace those of the images beside them; Inception's alone cannot, and that is said."""
    mean, sigma = np.full(WIDTH, 2.0), np.eye(WIDTH)
    np.savez(tmp_path / "stored.npz", images[:32], mu_dinov2=mean, sigma_dinov2=sigma)
    found = run(tmp_path / "stored.npz", files[1], "--features", "dinov2", "--dinov2-weights", weights)
    cache = next(tmp_path.glob("sample.features-*.npz"))
    with np.load(cache) as data:
        expected = frechet_distance(mean, sigma, data["mu_dinov2"], data["sigma_dinov2"])
    assert found["fd_dinov2"] == pytest.approx(expected) and "Inception features alone" not in caplog.text
    np.savez(tmp_path / "only.npz", mu_dinov2=mean, sigma_dinov2=sigma)
    only = run(tmp_path / "only.npz", files[1], "--features", "dinov2", "--dinov2-weights", weights)
    assert only["fd_dinov2"] == found["fd_dinov2"] and only["precision_dinov2"] is None
    np.savez(tmp_path / "wrong.npz", images[:32], mu_dinov2=np.zeros(768), sigma_dinov2=np.eye(768))
    with pytest.raises(Exception, match=r"mu_dinov2 .*shape \(768,\), not float \(16,\): take statistics of features of DINOv2"):
        EvaluationFile(tmp_path / "wrong.npz", "REF")


def test_a_reference_of_inception_statistics_is_pointed_out(files, images, tmp_path, monkeypatch):
    """ADM's VIRTUAL batch: its FID is against 1.28 million images, FD-DINOv2 against its 10,000."""
    monkeypatch.setitem(EXTRACTORS, "inception", FEW)
    np.savez(tmp_path / "virtual.npz", images[:32], mu=np.zeros(64), sigma=np.eye(64))
    reference, sample = EvaluationFile(tmp_path / "virtual.npz", "REF"), EvaluationFile(files[1], "SAMPLE")
    for names, told in ((("inception",), False), (("inception", "dinov2"), True)):
        found = "\n".join(evaluator.find_pitfalls(reference, sample, "generation", names))
        assert ("Inception features alone: FD-DINOv2 is measured against its 32 images" in found) == told


def test_neighbours_are_found_in_single_precision():
    """Half precision is ADM's, for comparable numbers in its space; here its rounding would decide who is inside."""
    rng = np.random.default_rng(0)
    reference, sample = (rng.normal(3.0, 1.0, (count, 64)).astype(np.float32) for count in (200, 150))
    radii = [np.sort(cdist(rows, rows), axis=1)[:, 3] for rows in (reference, sample)]
    between = cdist(reference, sample)
    exact = (between <= radii[0][:, None]).any(0).mean(), (between <= radii[1]).any(1).mean()
    assert precision_recall(reference, sample, half=False) == pytest.approx(exact, abs=1e-9)
    assert precision_recall(reference, sample) != pytest.approx(exact, abs=1e-9)
    assert not EXTRACTORS["dinov2"].outputs[0].half and EXTRACTORS["inception"].outputs[0].half


def test_unusable_weights_are_refused_in_a_sentence(capsys, weights, files, tmp_path, monkeypatch):
    """Another size, one with registers, another file, none, no connection: the option that helps is named."""
    tensors = random_tensors()
    torch.save(tensors | {"register_tokens": torch.zeros(1, 4, WIDTH)}, tmp_path / "registers.pth")
    torch.save({name: tensor[..., :8] for name, tensor in tensors.items()}, tmp_path / "narrow.pth")
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    torch.save({}, tmp_path / "empty.pth")
    (tmp_path / "text.pth").write_text("no weights")
    for name, message in (("none.pth", "does not exist"), (".", "is a folder"), ("text.pth", "not a readable torch file"),
                          *((f"{each}.pth", "does not hold DINOv2's ViT-L/14 without registers")
                            for each in ("registers", "narrow", "tensor", "empty"))):
        sentence = refused(capsys, evaluator.main, *files, "--features", "dinov2", "--dinov2-weights", tmp_path / name)
        assert "--dinov2-weights" in sentence and message in sentence
    sentence = refused(capsys, evaluator.main, *files, "--dinov2-weights", weights)
    assert "--features is inception: add dinov2" in sentence

    def fail(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    sentence = refused(capsys, evaluator.main, *files, "--features", "dinov2")
    assert "could not be downloaded (no route): fetch https://" in sentence and "--dinov2-weights" in sentence


def test_a_download_is_found_in_torchs_cache(weights, files, tmp_path, monkeypatch):
    """Whoever has fetched DINOv2 by torch.hub has the file already, under the same name."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    weights.rename(tmp_path / "hub" / "checkpoints" / "dinov2_vitl14_pretrain.pth")
    assert run(*files, "--features", "dinov2")["fd_dinov2"] > 0


def test_products_keep_single_precision(weights):
    """rfid.py shares its process with a tokenizer, for which TensorFloat-32 is allowed: features must not change by it."""
    network, seen = load_dinov2(weights, CPU)[0], []
    network.trunk.register_forward_pre_hook(
        lambda *_: seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        network(torch.zeros(1, 3, 224, 224, dtype=torch.uint8))
        assert seen == [("highest", False)] and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_features_of_a_gpu_are_those_of_a_cpu(weights, images):
    """A reference's features may come from another device than the samples'."""
    here, there = (load_dinov2(weights, torch.device(name))[0](prepare(images[:8]).to(name))[0].cpu() for name in ("cpu", "cuda"))
    torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-4)


def test_the_published_network_has_its_size(monkeypatch):
    """FD-DINOv2 is of ViT-L/14: 304,368,640 parameters with 37 x 37 positions and the mask token."""
    monkeypatch.setattr(dinov2, "SHAPE", PUBLISHED)
    with torch.device("meta"):
        own = sum(each.numel() for each in DINOv2().parameters())
    assert own + (37**2 - 16**2 + 1) * dinov2.FEATURES == 304_368_640


def test_help_lists_the_spaces(capsys):
    """What can be asked for is read there first."""
    with pytest.raises(SystemExit):
        call(evaluator.main, "--help")
    out = capsys.readouterr().out
    assert "--features" in out and "--dinov2-weights" in out and "inception,dinov2" in out.replace("\n", "")
