"""Losses of the tokenizer (equations 7 to 10): reconstruction, perceptual, adversarial, codebook and commitment.

`RECIPES` says which terms a stage uses: the paper's, or those of the released code, which adds LPIPS to stage 2 and the
adversarial term to stage 1.  Under "equal" all stages and quantizers have the same terms, so that a comparison of codebooks
(tables 4 and 7) is not one of losses.  Functions return losses and metrics; nothing here logs.

Deviation from the release: the non-saturating losses have input and target in the right order, so that fakes teach the
discriminator.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.tokenizer_image.quantizer import Quantized


@dataclass(frozen=True)
class LossWeights:
    """Factors of the terms of one stage; the codebook and commitment terms always have 1 and β."""

    pixel: float
    perceptual: float
    adversarial: float


RECIPES: dict[tuple[str, str], LossWeights] = {
    # (recipe, stage)              pixel  perceptual  adversarial
    ("paper", "semantic"):    LossWeights(0.0, 1.0, 0.0),   # equation 7
    ("paper", "dual"):        LossWeights(1.0, 0.0, 0.5),   # equation 9
    ("released", "semantic"): LossWeights(0.0, 1.0, 0.5),
    ("released", "dual"):     LossWeights(1.0, 1.0, 0.5),
    ("paper", "single"):      LossWeights(1.0, 1.0, 0.5),   # LlamaGen
    ("released", "single"):   LossWeights(1.0, 1.0, 0.5),
    ("equal", "semantic"):    LossWeights(1.0, 1.0, 0.5),
    ("equal", "dual"):        LossWeights(1.0, 1.0, 0.5),
    ("equal", "single"):      LossWeights(1.0, 1.0, 0.5),
}


@dataclass(frozen=True)
class Procedure:
    """What a recipe decides beside its loss weights."""

    interleave_gradients: str    # of INTERLEAVE_GRADIENTS, unless --interleave-gradients is typed
    clip_apart: bool             # semantic codebook, detail codebook and network are each clipped to the norm
    keep_discriminator: bool     # stage 2 goes on with stage 1's discriminator
    weigh_discriminator: bool    # the discriminator's own loss bears the weight of the adversarial term too


INTERLEAVE_GRADIENTS = ("all", "codebook")  # what the third step's equation 7 moves: network and semantic codebook, or this alone
PROCEDURES: dict[str, Procedure] = {
    "paper": Procedure("all", False, False, False),     # the paper leaves all four open
    "released": Procedure("codebook", True, True, True),
    "equal": Procedure("all", False, False, False),
}


def hinge_d_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Discriminator's hinge loss on logits of any shape."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def cross_entropy_d_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Discriminator's cross-entropy with labels one for real, zero for fake: softplus(-x) is -log sigmoid(x)."""
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def hinge_g_loss(fake: Tensor) -> Tensor:
    """Generator's loss of "hinge" and "vanilla"."""
    return -fake.mean()


def non_saturating_g_loss(fake: Tensor) -> Tensor:
    """Generator's cross-entropy with labels one for fakes."""
    return F.binary_cross_entropy_with_logits(fake, torch.ones_like(fake))


ADVERSARIAL = {
    # name: (discriminator's loss, generator's loss)
    "hinge": (hinge_d_loss, hinge_g_loss),
    "vanilla": (cross_entropy_d_loss, hinge_g_loss),
    "non-saturating": (cross_entropy_d_loss, non_saturating_g_loss),
}


def adaptive_weight(base: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """VQGAN's factor that makes both losses pull equally at the decoder's last layer, in [0, 1e4]."""
    base_grad, = torch.autograd.grad(base, last_layer, retain_graph=True)
    adversarial_grad, = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    return (base_grad.norm() / (adversarial_grad.norm() + 1e-4)).clamp(0, 1e4).detach()


@dataclass
class TokenizerLoss:
    """The generator's and the discriminator's side of one stage."""

    perceptual: nn.Module
    discriminator: nn.Module
    adversarial: str = "hinge"
    discriminator_start: int = 20_000
    adaptive: bool = False

    def generator(self, images: Tensor, reconstructions: Tensor, quantized: Quantized, weights: LossWeights, step: int,
                  last_layer: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of encoder, decoder and codebooks.

        images, reconstructions: [B, 3, H, W] in [-1, 1]; last_layer: the decoder's, for the adaptive weight.
        Returns the scalar loss and its detached terms.
        """
        terms = {"codebook": quantized.codebook_loss, "commitment": quantized.commitment_loss}
        total = quantized.codebook_loss + quantized.commitment_loss
        base = images.new_zeros(())
        if weights.pixel:
            terms["pixel"] = F.mse_loss(reconstructions, images)
            base = base + weights.pixel * terms["pixel"]
        if weights.perceptual:
            terms["perceptual"] = self.perceptual(images, reconstructions).mean()
            base = base + weights.perceptual * terms["perceptual"]
        total = total + base
        if weights.adversarial and step >= self.discriminator_start:
            terms["adversarial"] = ADVERSARIAL[self.adversarial][1](self.discriminator(reconstructions))
            factor = adaptive_weight(base, terms["adversarial"], last_layer) if self.adaptive else 1.0
            total = total + weights.adversarial * factor * terms["adversarial"]
        return total, {name: value.detach() for name, value in terms.items()} | {"total": total.detach()}

    def discriminate(self, images: Tensor, reconstructions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of the discriminator on real and reconstructed images, and both mean logits."""
        real, fake = self.discriminator(images), self.discriminator(reconstructions.detach())
        loss = ADVERSARIAL[self.adversarial][0](real, fake)
        return loss, {"discriminator": loss.detach(), "logits_real": real.mean().detach(), "logits_fake": fake.mean().detach()}
