"""Quantizers, losses and the two training stages."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.conftest import GOLDEN, TINY_VQ, arrays, imported_tokenizer
from tokenizer.tokenizer_image import vq_loss, vq_train
from tokenizer.tokenizer_image.codebook import (
    CodeUsage,
    initialise_codebook,
    revive_dead_codes,
    warn_of_collapse,
    whiten_projection,
)
from tokenizer.tokenizer_image.discriminator import PatchGAN
from tokenizer.tokenizer_image.perceptual import PerceptualOptions, build_perceptual
from tokenizer.tokenizer_image.quantizer import VectorQuantizer
from tokenizer.tokenizer_image.vq_model import VQ_models, VQConfig, VQModel, build_tokenizer
from tokenizer.tokenizer_image.vq_options import VQTrainConfig
from tokenizer.tokenizer_image.vq_train import autoencoder_loss
from utils.config import parse
from utils.distributed import Processes

ALONE = Processes(0, 1, 0, torch.device("cpu"))


class PixelDistance(torch.nn.Module):
    """Stands in for LPIPS where a test is about something else."""

    def forward(self, a, b):
        """Mean absolute difference [B, 1, 1, 1]."""
        return (a - b).abs().mean((1, 2, 3), keepdim=True)


def released_tokenizer() -> VQModel:
    """The golden weights in our model."""
    return imported_tokenizer("iar2-vq", arrays("iar2_vq_weights_encoder", "iar2_vq_weights_rest"))


@pytest.mark.parametrize("streams, prefix", [("all", "second"), ("semantic", "first")])
def test_codes_reconstruction_and_losses_equal_the_released_code(streams, prefix):
    """Released tokenizers must give their own codes: a single flipped argmin is another image."""
    model, io = released_tokenizer(), np.load(GOLDEN / "iar2_vq_io.npz")
    images = torch.from_numpy(io["input"])
    decoded, quantized = model(images, streams)
    assert np.array_equal(quantized.codes[:, 0], io["semantic"])
    if streams == "all":
        assert np.array_equal(quantized.codes[:, 1], io["detail"])
    np.testing.assert_allclose(decoded.detach(), io["decode" if streams == "all" else "first_decode"], atol=1e-4)
    np.testing.assert_allclose([quantized.codebook_loss.item(), quantized.commitment_loss.item()],
                               [io[f"{prefix}_vq_loss"], io[f"{prefix}_commit_loss"]], rtol=1e-5)
    (F.mse_loss(decoded, images) + quantized.codebook_loss + quantized.commitment_loss).backward()
    np.testing.assert_allclose(model.quantizer.codebooks[0].grad, io[f"{prefix}_grad/quantize.embedding.weight"], atol=1e-7)
    np.testing.assert_allclose(model.encoder.conv_in.weight.grad, io[f"{prefix}_grad/encoder.conv_in.weight"], atol=2e-6)


def test_decoding_codes_equals_decoding_latents():
    """What sampling decodes must be what training reconstructed."""
    model = released_tokenizer()
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(model.decode_codes(model.encode(images)), model(images)[0], atol=1e-5, rtol=1e-5)


def test_detail_codes_quantize_the_residual():
    """Equations 5 and 6 by brute force."""
    model = VQModel(TINY_VQ)
    latents = torch.randn(2, 8, 3, 3)
    e = F.normalize(latents.movedim(1, -1).reshape(-1, 8), dim=-1)
    semantic_book, detail_book = F.normalize(model.quantizer.codebooks[0], dim=-1), model.quantizer.codebooks[1]
    semantic = torch.cdist(e, semantic_book).argmin(1)
    detail = torch.cdist(e - semantic_book[semantic], detail_book).argmin(1)
    codes = model.quantizer(latents).codes
    assert torch.equal(codes[:, 0].flatten(), semantic) and torch.equal(codes[:, 1].flatten(), detail)


def stage_options(stage: str, recipe: str = "paper", *extra: str) -> VQTrainConfig:
    """The options of one stage as its command line resolves them."""
    return parse(VQTrainConfig, vq_train.recipe, args=["--run-dir", "unused", "--data-path", "unused", "--stage", stage,
                                                       "--recipe", recipe, *extra])


def moved_parts(stage: str, step: int, recipe: str = "paper") -> set[str]:
    """Which parts get a gradient from one step's loss."""
    torch.manual_seed(0)
    model = VQModel(TINY_VQ)
    loss = vq_loss.TokenizerLoss(PixelDistance(), PatchGAN(8, 2).requires_grad_(False))
    config = stage_options(stage, recipe)
    total, *_ = autoencoder_loss(model, loss, torch.rand(2, 3, 32, 32) * 2 - 1, config, step)
    total.backward()
    return parts_with_gradient(model)


def parts_with_gradient(model: VQModel) -> set[str]:
    """Encoder, decoder and codebooks that a backward pass has reached."""
    named = {"quantizer.codebooks.0": "semantic", "quantizer.codebooks.1": "detail"}
    return {named.get(name, name.split(".")[0]) for name, p in model.named_parameters()
            if p.grad is not None and p.grad.abs().sum() > 0}


NETWORK = {"encoder", "quant_conv", "post_quant_conv", "decoder"}


@pytest.mark.parametrize("recipe", ["paper", "released"])
def test_gradients_reach_exactly_the_parts_of_each_step(recipe):
    """Equation 7 moves E, D, C_s; equation 9 moves E, D, C_d; every third joint step adds equation 7 (2:1 interleave)."""
    assert moved_parts("semantic", 0, recipe) == NETWORK | {"semantic"}
    for step in range(6):
        expected = NETWORK | {"detail"} | ({"semantic"} if step % 3 == 2 else set())
        assert moved_parts("dual", step, recipe) == expected


def test_interleaved_step_adds_stage_one_to_the_joint_loss():
    """The third step's loss is equation 9 plus equation 7, not one in place of the other."""
    torch.manual_seed(0)
    model, images = VQModel(TINY_VQ).eval(), torch.rand(2, 3, 32, 32) * 2 - 1
    loss = vq_loss.TokenizerLoss(PixelDistance(), PatchGAN(8, 2))
    joint = autoencoder_loss(model, loss, images, stage_options("dual"), 0)[0]
    semantic = autoencoder_loss(model, loss, images, stage_options("semantic"), 0)[0]
    both = autoencoder_loss(model, loss, images, stage_options("dual"), 2)[0]
    torch.testing.assert_close(both, joint + semantic)


def test_the_released_interleave_moves_the_semantic_codebook_alone():
    """The release clears stage 1's gradients of everything else; the paper's equation 7 moves the network too."""
    for recipe, moved in (("paper", NETWORK | {"semantic"}), ("released", {"semantic"})):
        torch.manual_seed(0)
        model = VQModel(TINY_VQ)
        loss = vq_loss.TokenizerLoss(PixelDistance(), PatchGAN(8, 2).requires_grad_(False), discriminator_start=0)
        vq_train.interleaved_loss(model, loss, torch.rand(2, 3, 32, 32) * 2 - 1, stage_options("dual", recipe), 2).backward()
        assert parts_with_gradient(model) == moved


def test_typed_loss_weights_reach_the_interleaved_loss():
    """A typed weight that half of the losses ignored would be no weight."""
    assert vq_train.semantic_weights(stage_options("dual")) == vq_loss.RECIPES["paper", "semantic"]
    typed = vq_train.semantic_weights(stage_options("dual", "paper", "--perceptual-weight", "0.3"))
    assert typed == vq_loss.LossWeights(0.0, 0.3, 0.0)


def test_the_release_clips_codebooks_and_network_apart():
    """One large gradient of the network must not shrink the step of a codebook."""
    model = VQModel(TINY_VQ)
    paper, released = (vq_train.clipping_groups(model, name) for name in ("paper", "released"))
    assert len(paper) == 1 and [len(group) for group in released] == [1, 1, len(paper[0]) - 2]
    assert released[0][0] is model.quantizer.codebooks[0] and released[1][0] is model.quantizer.codebooks[1]
    model.quantizer.codebooks[0].requires_grad_(False)
    assert len(vq_train.clipping_groups(model, "released")) == 2


def test_typed_loss_weights_win_over_the_recipe():
    """LlamaGen's users turn these knobs; an untouched one stays the recipe's."""
    options = stage_options("dual", "paper", "--perceptual-weight", "0.3", "--disc-weight", "0")
    assert (options.loss.pixel_weight, options.loss.perceptual_weight, options.loss.disc_weight) == (1.0, 0.3, 0.0)
    torch.manual_seed(0)
    model, images = VQModel(TINY_VQ).eval(), torch.rand(2, 3, 32, 32) * 2 - 1
    loss = vq_loss.TokenizerLoss(PixelDistance(), PatchGAN(8, 2), discriminator_start=0)
    plain, terms, *_ = autoencoder_loss(model, loss, images, stage_options("dual", "paper", "--disc-weight", "0"), 0)
    total, with_lpips, *_ = autoencoder_loss(model, loss, images, options, 0)
    assert "perceptual" not in terms and "adversarial" not in with_lpips
    torch.testing.assert_close(total, plain + 0.3 * with_lpips["perceptual"])


def test_stage_terms_are_those_of_the_recipe():
    """Paper and release differ in where LPIPS and the adversarial term enter."""
    model, images = VQModel(TINY_VQ), torch.rand(2, 3, 32, 32)
    loss = vq_loss.TokenizerLoss(PixelDistance(), PatchGAN(8, 2), discriminator_start=10)
    seen = {}
    for (recipe, stage), weights in vq_loss.RECIPES.items():
        if stage != "single":
            decoded, quantized = model(images)
            _, terms = loss.generator(images, decoded, quantized, weights, 10, model.decoder.conv_out.weight)
            seen[recipe, stage] = set(terms) - {"codebook", "commitment", "total"}
            _, early = loss.generator(images, decoded, quantized, weights, 9, model.decoder.conv_out.weight)
            assert "adversarial" not in early
    assert seen == {("paper", "semantic"): {"perceptual"}, ("paper", "dual"): {"pixel", "adversarial"},
                    ("released", "semantic"): {"perceptual", "adversarial"},
                    **dict.fromkeys((("released", "dual"), ("equal", "semantic"), ("equal", "dual")),
                                    {"pixel", "perceptual", "adversarial"})}


def test_adversarial_losses_equal_the_reference():
    """Values and gradients of the released losses where they are right, of the corrected ones where they are not."""
    golden = np.load(GOLDEN / "losses.npz")
    for name, function in [("hinge_d_loss", vq_loss.hinge_d_loss), ("vanilla_d_loss", vq_loss.cross_entropy_d_loss)]:
        real, fake = (torch.from_numpy(golden[key]).requires_grad_() for key in ("logits_real", "logits_fake"))
        function(real, fake).backward()
        np.testing.assert_allclose(function(real, fake).item(), golden[name], rtol=1e-6)
        np.testing.assert_allclose(real.grad, golden[f"{name}_grad_real"], atol=1e-7)
        np.testing.assert_allclose(fake.grad, golden[f"{name}_grad_fake"], atol=1e-7)
    real, fake = (torch.from_numpy(golden[key]) for key in ("logits_real", "logits_fake"))
    np.testing.assert_allclose(vq_loss.hinge_g_loss(fake), golden["hinge_gen_loss"], rtol=1e-6)
    np.testing.assert_allclose(vq_loss.cross_entropy_d_loss(real, fake), golden["correct_non_saturating_d_loss"], rtol=1e-6)
    np.testing.assert_allclose(vq_loss.non_saturating_g_loss(fake), golden["correct_non_saturating_gen_loss"], rtol=1e-6)


def test_patchgan_equals_the_reference():
    """The discriminator is a published network; its running statistics are part of it."""
    golden = np.load(GOLDEN / "losses.npz")
    model = PatchGAN(8, 3)
    model.load_state_dict({key.split("/")[1]: torch.from_numpy(golden[key]) for key in golden.files
                           if key.startswith("patchgan_before/")})
    images = torch.from_numpy(golden["patchgan_input"])
    np.testing.assert_allclose(model.train()(images).detach(), golden["patchgan_train_out"], atol=1e-5)
    np.testing.assert_allclose(model.eval()(images).detach(), golden["patchgan_eval_out"], atol=1e-5)


def test_a_fresh_dual_codebook_is_used_almost_whole():
    """The ImageNet recipe has neither k-means nor revival: codes that no residual meets at the start stay dead."""
    torch.manual_seed(0)
    quantizer, latents = VectorQuantizer((256, 4096), 8, 0.25), torch.randn(30, 8, 32, 32)
    usage = CodeUsage((256, 4096), torch.device("cpu"))
    usage.add(quantizer(latents).codes)
    figures = usage.figures(2, ALONE)
    assert figures["usage_semantic"] == 1 and figures["usage_detail"] > 0.95


def test_usage_and_perplexity_count_the_whole_set():
    """Usage is measured over all images: a sliding buffer hides collapse."""
    usage = CodeUsage((4, 8), torch.device("cpu"))
    usage.add(torch.tensor([[[0, 0], [1, 2]]]))
    usage.add(torch.tensor([[[1, 1], [3, 4]]]))
    figures = usage.figures(2, ALONE)
    assert figures["usage_semantic"] == 0.5 and figures["usage_detail"] == 0.5
    np.testing.assert_allclose([figures["perplexity_semantic"], figures["perplexity_detail"]], [2, 4], rtol=1e-6)


def test_collapse_is_announced(caplog):
    """Codebook collapse that nobody saw is the classic way to lose a week."""
    warn_of_collapse({"images": 1000, "usage_semantic": 0.9, "usage_detail": 0.1}, VQConfig(codebook_sizes=(128, 512)), 64)
    assert "CODEBOOK COLLAPSE" in caplog.text and "detail" in caplog.text and "semantic codebook" not in caplog.text


def test_kmeans_start_uses_all_codes():
    """The purpose of the option: every code lies where data are."""
    torch.manual_seed(0)
    model = VQModel(TINY_VQ)
    vectors = F.normalize(torch.randn(2000, 8), dim=-1)
    initialise_codebook(model.quantizer, 0, vectors, 0, ALONE)
    assert len(torch.cdist(vectors, model.quantizer.table(0)).argmin(1).unique()) == 8


def test_whitening_spreads_latents_over_the_sphere():
    """Latents of a fresh encoder that all point one way would use one code."""
    projection = torch.nn.Conv2d(16, 4, 1)
    encoded = torch.randn(8, 16, 4, 4) * torch.linspace(0.01, 1, 16)[:, None, None] + 3.0
    whiten_projection(projection, encoded, ALONE)
    latents = projection(encoded).movedim(1, -1).flatten(0, 2)
    torch.testing.assert_close(torch.cov(latents.T), torch.eye(4), atol=2e-2, rtol=0)
    assert latents.mean(0).abs().max() < 1e-3


def test_revival_moves_dead_codes_only():
    """Codes in use must stay where they are, or the decoder forgets them."""
    model = VQModel(TINY_VQ)
    optimizer = torch.optim.Adam(model.parameters())
    book = model.quantizer.codebooks[1]
    optimizer.state[book] = {"exp_avg": torch.ones_like(book)}
    before, counts = book.detach().clone(), torch.tensor([0.0] * 5 + [3.0] * 11)
    moved = revive_dead_codes(model.quantizer, 1, counts, torch.randn(100, 8), optimizer, ALONE)
    assert moved == 5 and torch.equal(book[5:], before[5:]) and not (book[:5] == before[:5]).any()
    assert optimizer.state[book]["exp_avg"].sum(1).tolist() == [0] * 5 + [8] * 11


@pytest.mark.parametrize("name", list(VQ_models))
def test_every_preset_maps_images_to_its_grid(name):
    """Presets are tables: a typing mistake in one shows only when it is built."""
    model = build_tokenizer(name)
    size = 4 * model.config.downsampling
    with torch.no_grad():
        codes = model.encode(torch.rand(1, 3, size, size) * 2 - 1)
        assert codes.shape == (1, 2, 4, 4) and model.decode_codes(codes).shape == (1, 3, size, size)
    if name == "VQ-16":
        assert sum(p.numel() for p in model.parameters()) == 71_787_147


def test_the_perceptual_distance_is_that_of_evaluation():
    """The release trains with LPIPS' dropout active; here the distance of two images is always the same."""
    images = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    model = build_perceptual(PerceptualOptions(perceptual_net="random"), torch.device("cpu"))
    assert not any(module.training for module in model.modules())
    assert torch.equal(model(images[0], images[1]), model(images[0], images[1]))
