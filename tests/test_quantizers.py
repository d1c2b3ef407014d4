"""Quantizers and gradients beyond the paper: rotation trick, SimVQ, plain residual codebooks; what the interleaved step moves."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.conftest import TINY_VQ, call
from tests.test_bad_input import refused, vq
from tests.test_tokenizer import NETWORK, PixelDistance, parts_with_gradient, stage_options
from tests.test_train import vq_options
from tokenizer.tokenizer_image import vq_loss, vq_train
from tokenizer.tokenizer_image.codebook import warn_of_collapse
from tokenizer.tokenizer_image.discriminator import PatchGAN
from tokenizer.tokenizer_image.quantizer import GRADIENTS, QUANTIZERS, Quantized, VectorQuantizer, rotation, straight_through
from tokenizer.tokenizer_image.vq_model import VQModel, load_tokenizer
from utils.distributed import Processes


def quantizer(name: str, gradient: str = "straight-through") -> VectorQuantizer:
    """A small quantizer of the table, of eight-dimensional codes."""
    torch.manual_seed(0)
    kind, books, _ = QUANTIZERS[name]
    made = kind((16,) if books == 1 else (8, 16), 8, 0.25)
    made.gradient = GRADIENTS[gradient]
    return made


def turned_by_formula(e: np.ndarray, q: np.ndarray, g: np.ndarray) -> np.ndarray:
    """The gradient (|q| / |e| R)ᵀ g of each vector [M, d], with R written out as a matrix."""
    rows = []
    for e_i, q_i, g_i in zip(e, q, g):
        e_unit, q_unit = e_i / np.linalg.norm(e_i), q_i / np.linalg.norm(q_i)
        r = (e_unit + q_unit) / np.linalg.norm(e_unit + q_unit)
        matrix = np.eye(len(e_i)) - 2 * np.outer(r, r) + 2 * np.outer(q_unit, e_unit)
        np.testing.assert_allclose(matrix @ e_unit, q_unit, atol=1e-6)
        rows.append(np.linalg.norm(q_i) / np.linalg.norm(e_i) * matrix.T @ g_i)
    return np.stack(rows)


def cells(grid: torch.Tensor) -> np.ndarray:
    """[B, d, h, w] -> [B h w, d]."""
    return grid.detach().movedim(1, -1).flatten(0, 2).double().numpy()


def test_the_rotation_tricks_gradient_is_the_papers():
    """Equation of arXiv 2410.06424; lengths other than one are those of the sum of two codes."""
    torch.manual_seed(0)
    e, q, g = (torch.randn(50, 8, dtype=torch.float64) for _ in range(3))
    e.requires_grad_()
    value = rotation(e, q)
    (value * g).sum().backward()
    assert torch.equal(value, q)
    np.testing.assert_allclose(e.grad, turned_by_formula(e.detach().numpy(), q.numpy(), g.numpy()), atol=1e-12)


def test_rotation_keeps_the_angle_of_the_gradient():
    """The point of the trick: gradient against latent is as the decoder's gradient against the code, and so is its length."""
    torch.manual_seed(0)
    e, q, g = (torch.randn(50, 8, dtype=torch.float64) for _ in range(3))
    e.requires_grad_()
    (rotation(e, q) * g).sum().backward()
    torch.testing.assert_close(F.cosine_similarity(e.grad, e.detach()), F.cosine_similarity(g, q))
    torch.testing.assert_close(e.grad.norm(dim=1), g.norm(dim=1) * q.norm(dim=1) / e.detach().norm(dim=1))


def test_rotation_without_a_plane_is_straight_through():
    """An opposite or zero vector in a batch must not turn all weights into NaN."""
    e = torch.tensor([[1.0, 0, 0], [0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1e-30, 0]], requires_grad=True)
    q = torch.tensor([[-2.0, 0, 0], [1, 0, 0], [0, 0, 0], [1e-5, -1, 0], [1, 0, 0]])
    g = torch.randn(5, 3)
    value = rotation(e, q)
    (value * g).sum().backward()
    assert torch.equal(value, q) and torch.equal(e.grad, g)


@pytest.mark.parametrize("name", ["single", "dual", "simvq"])
def test_the_quantizer_rotates_the_whole_sum(name):
    """The decoder sees the sum of semantic and detail code, so the latent is turned to the sum and not to one of them."""
    made = quantizer(name, "rotation")
    latents, g = torch.randn(2, 8, 3, 3, requires_grad=True), torch.randn(2, 8, 3, 3)
    result = made(latents)
    (result.latents * g).sum().backward()
    assert torch.equal(result.latents, made.lookup(result.codes))
    length = np.linalg.norm(cells(latents), axis=1, keepdims=True)
    e = cells(latents) / length
    turned = turned_by_formula(e, cells(result.latents), cells(g))
    expected = (turned - (turned * e).sum(1, keepdims=True) * e) / length          # back through the L2 normalisation
    np.testing.assert_allclose(cells(latents.grad), expected, atol=1e-5)


def test_the_product_quantizer_rotates_each_part():
    """Unassociated codebooks stay unassociated: the code of one half must not turn the gradient of the other."""
    made = quantizer("product", "rotation")
    first, g = torch.randn(2, 4, 3, 3), torch.randn(2, 8, 3, 3)
    gradients = []
    for _ in range(2):
        latents = torch.cat([first, torch.randn(2, 4, 3, 3)], dim=1).requires_grad_()
        (made(latents).latents * g).sum().backward()
        gradients.append(latents.grad)
    assert torch.equal(gradients[0][:, :4], gradients[1][:, :4]) and not torch.equal(gradients[0][:, 4:], gradients[1][:, 4:])
    half = torch.cat([first, torch.randn(2, 4, 3, 3)], dim=1).requires_grad_()
    e = F.normalize(half[:, :4], dim=1)
    result = made(half)
    turned = torch.autograd.grad(e, half, torch.from_numpy(turned_by_formula(
        cells(e), cells(result.latents[:, :4]), cells(g[:, :4]))).float().unflatten(0, (2, 3, 3)).movedim(-1, 1))[0]
    torch.testing.assert_close(gradients[0][:, :4], turned[:, :4], atol=1e-5, rtol=1e-4)


def test_only_the_encoders_gradient_depends_on_the_trick():
    """Codes, losses and the codebook's own gradient are those of the straight-through estimator."""
    seen = []
    for name in GRADIENTS:
        made = quantizer("dual", name)
        latents = torch.randn(2, 8, 3, 3, generator=torch.Generator().manual_seed(1), requires_grad=True)
        result: Quantized = made(latents)
        (result.latents.square().sum() + result.codebook_loss).backward()
        seen.append((result.codes, result.codebook_loss, result.latents, made.codebooks[0].grad, latents.grad))
    for before, after in list(zip(*seen))[:-1]:
        torch.testing.assert_close(before, after, atol=1e-6, rtol=0)
    assert not torch.allclose(seen[0][-1], seen[1][-1], atol=1e-3)


def test_the_option_reaches_the_quantizer_but_no_checkpoint(tmp_path):
    """It changes the backward pass alone, so that a tokenizer trained with it is a tokenizer like any other."""
    default, turned = (vq_train.build_model(stage_options("single", "paper", "--codebook-sizes", "8", *words), {})
                       for words in ((), ("--gradient", "rotation")))
    assert default.quantizer.gradient is straight_through and turned.quantizer.gradient is rotation
    assert default.config == turned.config and default.state_dict().keys() == turned.state_dict().keys()


@pytest.mark.parametrize("name", ["simvq", "dual-simvq"])
def test_simvqs_gradients_are_those_of_its_matrices(name):
    """dL/dW = Σ C_kᵀ g over the chosen codes, through the L2 normalisation of the first stream; the book receives none."""
    made = quantizer(name)
    with torch.no_grad():
        for matrix in made.matrices:
            matrix.add_(0.3 * torch.randn(8, 8))
    latents = torch.randn(2, 8, 3, 3)
    result = made(latents)
    result.codebook_loss.backward()
    e = cells(F.normalize(latents, dim=1))
    books, matrices = ([p.detach().double().numpy() for p in each] for each in (made.codebooks, made.matrices))
    chosen = [books[stream][codes.flatten()] for stream, codes in enumerate(result.codes.unbind(1))]      # [M, d] each
    codes = [rows @ matrix for rows, matrix in zip(chosen, matrices)]
    length = np.linalg.norm(codes[0], axis=1, keepdims=True)
    unit = codes[0] / length
    g = 2 * (sum([unit, *codes[1:]]) - e) / e.size
    through = (g - (g * unit).sum(1, keepdims=True) * unit) / length
    for matrix, rows, gradient in zip(made.matrices, chosen, [through, g]):
        np.testing.assert_allclose(matrix.grad, rows.T @ gradient, atol=1e-6)
    assert all(book.grad is None and not book.requires_grad for book in made.codebooks)


def test_every_code_of_simvq_moves_though_few_are_chosen():
    """Codes that nobody chooses follow the others, which is how SimVQ keeps a large book in use."""
    moved = {}
    for name in ("single", "simvq"):
        made = quantizer(name)
        before = made.table(0).detach()
        optimizer = torch.optim.SGD([made.trained(0)], lr=1.0)
        result = made(torch.randn(1, 8, 1, 2))
        result.codebook_loss.backward()
        optimizer.step()
        moved[name] = int(((made.table(0) - before).abs().amax(1) > 1e-6).sum())
        assert len(result.codes.unique()) == 2
    assert moved == {"single": 2, "simvq": 16}


def test_simvqs_codes_do_not_depend_on_autocast():
    """Its table is a product, which bf16 autocast would round: sampling would decode other codes than training used."""
    made = quantizer("simvq")
    codes, matrix = torch.arange(16).reshape(1, 1, 4, 4), made.matrices[0]
    matrix.data.add_(torch.randn(8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = made.lookup(codes)
    assert rounded.dtype == torch.float32 and torch.equal(rounded, made.lookup(codes))


def test_a_matrix_is_simvqs_codebook_to_the_trainer():
    """Stage 1 leaves out the detail matrix, stage 2's joint loss the semantic one, and the release clips each by itself."""
    torch.manual_seed(0)
    words = ("--vq-model", "VQ-8-small", "--quantizer", "dual-simvq", "--codebook-sizes", "8", "16", "--perceptual-net", "random",
             "--image-size", "32", "--device", "cpu")
    training = vq_train.set_up(stage_options("semantic", "released", *words), {}, Processes(0, 1, 0, torch.device("cpu")))
    matrices, held = training.model.quantizer.matrices, training.optimizer.param_groups[0]["params"]
    assert any(p is matrices[0] for p in held) and not any(p is matrices[1] for p in held)
    assert not any(p is book for p in held for book in training.model.quantizer.codebooks)
    matrices[1].requires_grad_()
    groups = vq_train.clipping_groups(training.model, "released")
    assert groups[0][0] is matrices[0] and groups[1][0] is matrices[1] and len(groups) == 3
    loss = vq_loss.TokenizerLoss(PixelDistance(), PatchGAN(8, 2).requires_grad_(False))
    for step, moves in ((0, False), (2, True)):
        training.model.zero_grad()
        config = stage_options("dual", "released")
        vq_train.autoencoder_loss(training.model, loss, torch.rand(2, 3, 32, 32), config, step)[0].backward()
        assert (matrices[0].grad is not None) == moves and matrices[1].grad.abs().sum() > 0


def test_residual_codebooks_choose_like_the_associated_ones():
    """The ablation differs in training alone: equations 5 and 6 from the start, both codebooks moved by every step."""
    model = VQModel(replace(TINY_VQ, quantizer="residual"))
    dual = VQModel(TINY_VQ)
    dual.load_state_dict(model.state_dict())
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    assert torch.equal(model.encode(images), dual.encode(images))
    loss = vq_loss.TokenizerLoss(PixelDistance(), PatchGAN(8, 2).requires_grad_(False))
    for step in range(3):
        model.zero_grad()
        vq_train.autoencoder_loss(model, loss, images, stage_options("single"), step)[0].backward()
        assert parts_with_gradient(model) == NETWORK | {"semantic", "detail"}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """24 small random images."""
    path = tmp_path_factory.mktemp("pictures") / "images.npz"
    images = np.random.default_rng(0).integers(0, 255, (24, 20, 18, 3), dtype=np.uint8)
    np.savez(path, images=images, labels=np.arange(24) % 3)
    return path


def round_trip(folder: Path) -> VQModel:
    """The exported tokenizer, once it has encoded and decoded."""
    model = load_tokenizer(folder)
    codes = model.encode(torch.rand(2, 3, 16, 16) * 2 - 1)
    assert codes.shape == (2, len(model.config.codebook_sizes), 2, 2)
    assert torch.isfinite(model.decode_codes(codes)).all()
    return model


def test_residual_codebooks_train_in_one_stage(pictures, tmp_path, monkeypatch):
    """k-means start and revival of both codebooks, in the one command; the detail codes start among the residuals."""
    revived, revive = [], vq_train.revive_dead_codes
    monkeypatch.setattr(vq_train, "revive_dead_codes", lambda *args: revived.append(args[1]) or revive(*args))
    for name, steps, more in (("start", 1, ("--lr", 0)), ("end", 5, ("--gradient", "rotation"))):
        call(vq_train.main, *vq_options(pictures, tmp_path / name, "single", steps, "--quantizer", "residual", *more))
    assert revived == [0, 1]
    before, after = round_trip(tmp_path / "start"), round_trip(tmp_path / "end")
    assert all(not torch.equal(a, b) for a, b in zip(before.quantizer.codebooks, after.quantizer.codebooks))
    assert before.quantizer.codebooks[1].norm(dim=1).mean() < 0.9
    assert {"usage_semantic", "usage_detail"} <= set(after.provenance.figures)


def test_simvq_trains_through_both_stages(pictures, tmp_path):
    """The frozen books stay as they were drawn, the matrices move, and the file holds both."""
    care = ("--codebook-init", "whitened", "--revive-every", 0, "--quantizer", "dual-simvq", "--gradient", "rotation")
    call(vq_train.main, *vq_options(pictures, tmp_path / "first", "semantic", 4, *care))
    call(vq_train.main, *vq_options(pictures, tmp_path / "second", "dual", 4, *care, "--init-from", tmp_path / "first"))
    first, second = (round_trip(tmp_path / name).quantizer for name in ("first", "second"))
    assert all(torch.equal(a, b) for a, b in zip(first.codebooks, second.codebooks))
    assert not torch.equal(first.matrices[0], torch.eye(8)) and torch.equal(first.matrices[1], torch.eye(8))
    assert not torch.equal(second.matrices[0], first.matrices[0]) and not torch.equal(second.matrices[1], torch.eye(8))


def test_checkpoints_from_before_these_options_go_on(pictures, tmp_path, capsys):
    """A run that was begun without an option had its default, and must not be lost by an update."""
    words = vq_options(pictures, tmp_path / "run", "semantic", 3)
    call(vq_train.main, *words)
    records = sorted((tmp_path / "run" / "checkpoints").glob("*/config.json"))
    record = json.loads(records[-1].read_text())
    assert record["options"]["codebook"].pop("gradient") == "straight-through"
    assert record["options"]["loss"].pop("interleave_gradients") == "all"
    records[-1].write_text(json.dumps(record))
    (tmp_path / "run" / "tokenizer.safetensors").unlink()
    call(vq_train.main, *words)
    round_trip(tmp_path / "run")


def test_options_that_simvq_cannot_have_are_refused(capsys, images_folder, tmp_path):
    """Placing single codes of a frozen book would train something else than what was asked for."""
    simvq = ("--stage", "single", "--quantizer", "simvq")
    for words, names in ((("--codebook-init", "kmeans"), "--codebook-init kmeans"), (("--revive-every", 5), "--revive-every 5")):
        sentence = refused(capsys, vq_train.main, *vq(images_folder, tmp_path / "run", *simvq, *words))
        assert names in sentence and "--quantizer simvq" in sentence
    for name, stage in (("simvq", "semantic"), ("dual-simvq", "single"), ("residual", "semantic"), ("residual", "dual")):
        words = ("--quantizer", name, "--stage", stage)
        assert f"--quantizer {name}" in refused(capsys, vq_train.main, *vq(images_folder, tmp_path / "run", *words))
    assert "straight-through, rotation" in refused(capsys, vq_train.main, *vq(images_folder, tmp_path / "run", "--gradient", "x"))


def test_the_advice_on_collapse_fits_the_quantizer(caplog):
    """A warning that recommends a refused option helps nobody."""
    warn_of_collapse({"images": 1000, "usage_token": 0.1}, replace(TINY_VQ, quantizer="simvq", codebook_sizes=(16,)), 64)
    assert "CODEBOOK COLLAPSE" in caplog.text and "whitened" in caplog.text and "kmeans" not in caplog.text


@pytest.mark.parametrize("recipe, words, network", [
    ("paper", (), True), ("released", (), False), ("equal", (), True),
    ("paper", ("--interleave-gradients", "codebook"), False), ("released", ("--interleave-gradients", "all"), True),
    ("equal", ("--interleave-gradients", "codebook"), False)])
def test_what_the_interleaved_step_moves_is_an_option_of_its_own(recipe, words, network):
    """The paper leaves it open, so it must be separable from everything else in which paper and release differ."""
    torch.manual_seed(0)
    model, config = VQModel(TINY_VQ), stage_options("dual", recipe, *words)
    loss = vq_loss.TokenizerLoss(PixelDistance(), PatchGAN(8, 2).requires_grad_(False), discriminator_start=0)
    vq_train.interleaved_loss(model, loss, torch.rand(2, 3, 32, 32) * 2 - 1, config, 2).backward()
    assert parts_with_gradient(model) == (NETWORK if network else set()) | {"semantic"}
    untyped = replace(config.loss, interleave_gradients=stage_options("dual", recipe).loss.interleave_gradients)
    assert untyped == stage_options("dual", recipe).loss


def test_the_interleave_belongs_to_stage_two(capsys, images_folder, tmp_path):
    """A stage without a third step would ignore it."""
    words = ("--stage", "semantic", "--interleave-gradients", "codebook")
    sentence = refused(capsys, vq_train.main, *vq(images_folder, tmp_path / "run", *words))
    assert "--interleave-gradients codebook" in sentence and "--stage dual" in sentence
