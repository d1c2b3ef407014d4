"""Figure 3's measurement: which code replaces which, and that images differ more as codes do."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tests.conftest import TINY_VQ, call
from tokenizer.tokenizer_image import code_distance
from tokenizer.tokenizer_image.code_distance import replace_codes, replacements
from tokenizer.tokenizer_image.vq_model import VQModel, load_tokenizer
from utils.checkpoint import export
from utils.image_dataset import ImageDataset
from utils.images import open_images


@pytest.fixture
def codebook() -> torch.Tensor:
    return F.normalize(torch.randn(50, 8, generator=torch.Generator().manual_seed(0)), dim=-1)


@pytest.fixture
def checkers(tmp_path):
    """Images of 2x2 black and white squares, one per cell of the tiny tokenizer, twelve in two classes."""
    squares = np.random.default_rng(1).choice([0, 255], (12, 2, 2)).astype(np.uint8)
    for index, image in enumerate(squares.repeat(8, 1).repeat(8, 2)):
        path = tmp_path / "checkers" / f"class{index // 6}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return tmp_path / "checkers"


def tiny_tokenizer(folder, images=None, stage="dual"):
    """A tiny tokenizer, exported as training does; with images, it has learned them a little."""
    torch.manual_seed(1)
    tokenizer = VQModel(TINY_VQ)
    if images is not None:
        found = tokenizer.quantizer.residuals(tokenizer.latents(images), 0)
        tokenizer.quantizer.codebooks[0].data = found[torch.randperm(len(found))[:8]].detach()
        optimizer = torch.optim.Adam(tokenizer.parameters(), 3e-3)
        for _ in range(40):
            decoded, quantized = tokenizer(images)
            loss = F.mse_loss(decoded, images) + quantized.codebook_loss + quantized.commitment_loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    export(folder / "tokenizer.safetensors", "tokenizer", tokenizer.state_dict(),
           {"model": asdict(TINY_VQ), "stage": stage, "fingerprint": "test"})
    return folder / "tokenizer.safetensors"


def run(folder, checkpoint, out, *options):
    call(code_distance.main, "--data-path", folder, "--image-size", 16, "--num-workers", 0, "--vq-ckpt",
         checkpoint, "--out", out, "--perceptual-net", "random", "--images", 10, "--points", 4,
         "--device", "cpu", *options)
    return json.loads((out / "code_distance.json").read_text())


def test_at_distance_0_codes_replace_themselves(codebook):
    """The curve's first point is the plain reconstruction, even where two codes are equal."""
    codebook[3] = codebook[7]
    found = replacements(codebook, 5)
    assert found.targets[0] == 0 and found.codes[0].tolist() == list(range(50)) and (found.distances[0] == 0).all()
    assert found.codes[1, 7] != 7  # past 0 a code is never its own replacement


@pytest.mark.parametrize("chunk", [7, 1024])
def test_replacements_are_the_nearest_to_the_target(codebook, chunk, monkeypatch):
    """Chunks spare memory and change nothing: brute force over all pairs finds the same codes."""
    monkeypatch.setattr(code_distance, "_CHUNK", chunk)
    found = replacements(codebook, 6)
    table = codebook.double().numpy()
    distances = np.linalg.norm(table[:, None] - table[None], axis=-1)  # [K, K]
    assert found.targets[-1].item() == pytest.approx(distances.max())
    assert np.allclose(found.targets, np.linspace(0, distances.max(), 6))
    for point in range(1, 6):
        for code in range(50):
            others = [other for other in range(50) if other != code]
            best = min(others, key=lambda other: abs(distances[code, other] - found.targets[point].item()))
            assert found.codes[point, code] == best
            assert found.distances[point, code].item() == pytest.approx(distances[code, best], abs=1e-5)
    assert (found.distances.mean(1).diff() > 0).all()


def test_a_tie_goes_to_the_lower_code():
    """The same codebook gives the same picture on every machine."""
    square = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    assert replacements(square, 4).codes[1:3].tolist() == [[1, 0, 1, 0]] * 2


def test_only_the_chosen_stream_is_replaced():
    """A curve of the detail codes must hold the semantic ones fixed."""
    codes = torch.tensor([[[[0, 1]], [[1, 2]]]])  # [1, 2, 1, 2]
    assert replace_codes(codes, 1, torch.tensor([5, 6, 7])).tolist() == [[[[0, 1]], [[6, 7]]]]
    assert codes.tolist() == [[[[0, 1]], [[1, 2]]]]


def test_command_line_measures_the_curve(checkers, tmp_path):
    """End to end: nearer codes decode to nearer images, from the error of plain reconstruction on."""
    dataset = ImageDataset(open_images(checkers).subset(10), 16)
    images = torch.stack([dataset[index][0] for index in range(10)])
    checkpoint = tiny_tokenizer(tmp_path, images)
    curve = run(checkers, checkpoint, tmp_path / "out")
    assert [point["images"] for point in curve] == [10] * 4
    assert curve[0]["distance"] == 0 and np.all(np.diff([point["distance"] for point in curve]) > 0)
    tokenizer = load_tokenizer(checkpoint)
    plain = F.mse_loss(tokenizer.decode_codes(tokenizer.encode(images)).clamp(-1, 1), images).item()
    assert curve[0]["mse"] == pytest.approx(plain, rel=1e-4)
    assert curve[-1]["mse"] > 2 * curve[0]["mse"] and curve[-1]["perceptual_random"] > curve[0]["perceptual_random"]
    with Image.open(tmp_path / "out" / "code_distance.png") as picture:
        assert picture.width > 300
    with Image.open(tmp_path / "out" / "code_distance_images.png") as picture:
        assert picture.width >= 5 * 64 and picture.height >= 6 * 64  # source and 4 distances; 6 images


def test_against_reconstruction_starts_at_0(images_folder, tmp_path):
    """Without the tokenizer's own error the curve shows the effect of the codes alone."""
    checkpoint = tiny_tokenizer(tmp_path, stage="semantic")
    curve = run(images_folder, checkpoint, tmp_path / "out", "--against", "reconstruction")
    assert curve[0]["mse"] == 0 and curve[0]["perceptual_random"] == pytest.approx(0, abs=1e-6) and curve[-1]["mse"] > 0


def test_a_stage_1_tokenizer_has_one_codebook(images_folder, tmp_path, capsys):
    """Its detail codebook is untrained: disturbing that one measures nothing."""
    with pytest.raises(SystemExit):
        run(images_folder, tiny_tokenizer(tmp_path, stage="semantic"), tmp_path / "out", "--stream", 1)
    assert "--stream 1 is not among the 1 trained codebooks" in capsys.readouterr().err


@pytest.mark.parametrize("options, words", [
    (("--stream", 2), "--stream 2 is not among the 2 trained codebooks"),
    (("--points", 1), "--points 1 is out of range: give an integer of 2 or more"),
    (("--images", 0), "--images 0 is out of range"), (("--image-size", 20), "not a multiple of 8"),
])
def test_mistakes_are_one_sentence(models, images_folder, tmp_path, options, words, capsys):
    """A wrong option ends before minutes of decoding, with a remedy and no traceback."""
    with pytest.raises(SystemExit) as stopped:
        run(images_folder, models[1], tmp_path / "out", *options)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and words in error and "Traceback" not in error
