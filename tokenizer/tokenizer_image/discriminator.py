"""PatchGAN discriminator of the tokenizer's adversarial loss (pix2pix; LlamaGen's default)."""

from torch import Tensor, nn


class PatchGAN(nn.Module):
    """Strided 4x4 convolutions with batch normalisation: one logit for each patch, high for real images."""

    def __init__(self, channels: int = 64, layers: int = 3) -> None:
        super().__init__()
        blocks: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True)]
        width = channels
        for layer in range(1, layers + 1):
            before, width = width, channels * min(2**layer, 8)
            stride = 2 if layer < layers else 1
            blocks += [nn.Conv2d(before, width, 4, stride=stride, padding=1, bias=False), nn.BatchNorm2d(width),
                       nn.LeakyReLU(0.2, inplace=True)]
        self.main = nn.Sequential(*blocks, nn.Conv2d(width, 1, 4, padding=1))
        for module in self.main:
            if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
                nn.init.normal_(module.weight, 1.0 if isinstance(module, nn.BatchNorm2d) else 0.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> logits [B, 1, h', w']."""
        return self.main(images)
