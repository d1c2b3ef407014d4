"""Image tokenizer: convolutional encoder and decoder around a quantizer (paper section 4.2; architecture of LlamaGen).

`VQ_models` holds the presets.  The two large ones are LlamaGen's autoencoders; the small ones serve 32-pixel images and
begin with a pixel-unshuffle stem, which halves the resolution before the first convolution.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.tokenizer_image.quantizer import QUANTIZERS, Quantized, Streams
from utils.checkpoint import read_export, restore
from utils.untrusted import read_fields


@dataclass
class VQConfig:
    """Everything that fixes the shape and the function of a tokenizer; saved with every checkpoint."""

    quantizer: str = "dual"
    codebook_sizes: tuple[int, ...] = (256, 4096)
    code_dim: int = 8
    beta: float = 0.25
    channels: int = 128
    encoder_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    decoder_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    latent_channels: int = 256
    residual_blocks: int = 2
    stem: int = 1
    norm_groups: int = 32
    attention: bool = True
    zero_residual: bool = False
    dropout: float = 0.0

    @property
    def downsampling(self) -> int:
        """Image pixels a grid cell covers along one axis."""
        return self.stem * 2 ** (len(self.encoder_multipliers) - 1)


VQ_models: dict[str, dict] = {
    # LlamaGen's autoencoders, 72M and 70M parameters
    "VQ-16": dict(encoder_multipliers=(1, 1, 2, 2, 4), decoder_multipliers=(1, 1, 2, 2, 4)),
    "VQ-8": dict(encoder_multipliers=(1, 2, 2, 4), decoder_multipliers=(1, 2, 2, 4)),
    # 32-pixel images: 4x4 and 8x8 cells
    "VQ-8-small": dict(channels=16, encoder_multipliers=(1, 2, 4), decoder_multipliers=(1, 2, 4), latent_channels=64,
                       residual_blocks=1, stem=2, norm_groups=8, attention=False, zero_residual=True),
    "VQ-4-small": dict(channels=32, encoder_multipliers=(1, 2), decoder_multipliers=(1, 2), latent_channels=64,
                       residual_blocks=2, stem=2, norm_groups=8, attention=False, zero_residual=True),
}


def group_norm(channels: int, config: VQConfig) -> nn.GroupNorm:
    """GroupNorm with the preset's number of groups."""
    return nn.GroupNorm(config.norm_groups, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """Two normalised 3x3 convolutions with a shortcut."""

    def __init__(self, config: VQConfig, channels: int, out: int) -> None:
        super().__init__()
        self.norm1 = group_norm(channels, config)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.norm2 = group_norm(out, config)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        if config.zero_residual:  # every block starts as its shortcut: short trainings get further
            nn.init.zeros_(self.conv2.weight)
            nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]
        self.shortcut = nn.Conv2d(channels, out, 1) if out != channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, out, h, w]."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.shortcut(x) + h


class AttentionBlock(nn.Module):
    """Single-head self-attention over the cells."""

    def __init__(self, config: VQConfig, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels, config)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> the same shape."""
        normed = self.norm(x)
        q, k, v = (proj(normed).flatten(2).transpose(1, 2)[:, None] for proj in (self.q, self.k, self.v))  # [B,1,hw,C]
        out = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape_as(x)
        return x + self.proj_out(out)


class Downsample(nn.Module):
    """Stride-2 convolution, padded on the right and bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C, h/2, w/2]."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbour doubling and a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C, 2h, 2w]."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Stage(nn.Module):
    """The residual blocks of one resolution, with attention where asked, and the change of resolution after it."""

    def __init__(self, config: VQConfig, channels: int, out: int, blocks: int, attention: bool,
                 resample: type[Downsample] | type[Upsample] | None) -> None:
        super().__init__()
        self.res = nn.ModuleList(ResidualBlock(config, channels if index == 0 else out, out) for index in range(blocks))
        self.attn = nn.ModuleList(AttentionBlock(config, out) for _ in range(blocks if attention and config.attention else 0))
        self.resample = resample(out) if resample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, out, h', w']."""
        for index, block in enumerate(self.res):
            x = block(x)
            if len(self.attn):
                x = self.attn[index](x)
        return self.resample(x)


def middle(config: VQConfig, channels: int) -> nn.Sequential:
    """Residual, attention, residual at the lowest resolution."""
    attention = AttentionBlock(config, channels) if config.attention else nn.Identity()
    return nn.Sequential(ResidualBlock(config, channels, channels), attention, ResidualBlock(config, channels, channels))


class Encoder(nn.Module):
    """Images -> latents at the grid's resolution."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.encoder_multipliers]
        last = len(widths) - 1
        self.stem = nn.PixelUnshuffle(config.stem) if config.stem > 1 else nn.Identity()
        self.conv_in = nn.Conv2d(3 * config.stem**2, config.channels, 3, padding=1)
        self.stages = nn.Sequential(*(
            Stage(config, ([config.channels] + widths)[i], width, config.residual_blocks, i == last,
                  None if i == last else Downsample) for i, width in enumerate(widths)))
        self.mid = middle(config, widths[-1])
        self.norm_out = group_norm(widths[-1], config)
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> [B, latent_channels, h, w]."""
        x = self.stages(self.conv_in(self.stem(images)))
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Latents -> images; the encoder mirrored, with one more residual block a resolution."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in reversed(config.decoder_multipliers)]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid = middle(config, widths[0])
        self.stages = nn.Sequential(*(
            Stage(config, ([widths[0]] + widths)[i], width, config.residual_blocks + 1, i == 0,
                  None if i == last else Upsample) for i, width in enumerate(widths)))
        self.norm_out = group_norm(widths[-1], config)
        self.conv_out = nn.Conv2d(widths[-1], 3 * config.stem**2, 3, padding=1)
        self.stem = nn.PixelShuffle(config.stem) if config.stem > 1 else nn.Identity()

    def forward(self, latents: Tensor) -> Tensor:
        """[B, latent_channels, h, w] -> [B, 3, H, W], about [-1, 1], not clamped."""
        x = self.stages(self.mid(self.conv_in(latents)))
        return self.stem(self.conv_out(F.silu(self.norm_out(x))))


@dataclass
class TokenizerProvenance:
    """What made a tokenizer; saved beside its weights and configuration."""

    fingerprint: str = ""                                      # of its weights, by which codes and GPTs know it
    stage: str = ""                                            # of training that it comes from; "semantic": stage 1 alone
    step: int = 0                                              # of that stage; 0 if imported
    image_size: int = 0                                        # of its training images
    figures: dict[str, float] = field(default_factory=dict)    # of its last evaluation
    cluster_size: int = 0                                      # codes in each of IAR's clusters; 0 if not rearranged
    imported: dict[str, str] = field(default_factory=dict)     # kind and file name of published weights


class VQModel(nn.Module):
    """Encoder, quantizer, decoder."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        if config.quantizer not in QUANTIZERS:
            raise ValueError(f"quantizer {config.quantizer} is not registered: add it to QUANTIZERS, which has "
                             f"{', '.join(QUANTIZERS)}.")
        quantizer, codebooks, _ = QUANTIZERS[config.quantizer]
        if len(config.codebook_sizes) != codebooks:
            raise ValueError(f"quantizer {config.quantizer} needs {codebooks} codebook sizes, not {config.codebook_sizes}.")
        self.config = config
        self.provenance = TokenizerProvenance()
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.code_dim, 1)
        self.quantizer = quantizer(config.codebook_sizes, config.code_dim, config.beta)
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.latent_channels, 1)
        self.decoder = Decoder(config)

    def latents(self, images: Tensor) -> Tensor:
        """Encoder outputs before quantization: [B, 3, H, W] in [-1, 1] -> [B, d, h, w]."""
        return self.quant_conv(self.encoder(images))

    def forward(self, images: Tensor, streams: Streams = "all", freeze_semantic: bool = False) -> tuple[Tensor, Quantized]:
        """Reconstruct images [B, 3, H, W] for training; see `VectorQuantizer.forward` for the switches."""
        quantized = self.quantizer(self.latents(images), streams, freeze_semantic)
        return self.decode(quantized.latents), quantized

    @torch.no_grad()
    def encode(self, images: Tensor, bf16: bool = False) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> codes [B, C, h, w] int64; bf16: of the network alone, codes are chosen in float32."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            latents = self.latents(images)
        return self.quantizer(latents.float() if bf16 else latents).codes

    def decode(self, latents: Tensor) -> Tensor:
        """Quantized latents [B, d, h, w] -> images [B, 3, H, W]."""
        return self.decoder(self.post_quant_conv(latents))

    def decode_codes(self, codes: Tensor) -> Tensor:
        """Codes [B, C', h, w] of the first C' streams -> images [B, 3, H, W], about [-1, 1]."""
        return self.decode(self.quantizer.lookup(codes).to(self.post_quant_conv.weight.dtype))


def build_tokenizer(name: str, **options: Any) -> VQModel:
    """A tokenizer of the table's preset `name`, with VQConfig fields overridden by `options`."""
    return VQModel(VQConfig(**VQ_models[name] | options))


def load_tokenizer(path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
                   option: str = "--vq-ckpt") -> VQModel:
    """A tokenizer ready to encode and decode, from an exported file or run folder.

    Raises UserError, naming `option`, when there is none.
    """
    description, tensors = read_export(path, "tokenizer", option)
    tokenizer = restore(VQModel, VQConfig, description.pop("model"), tensors, f"{option} {path}")
    tokenizer.provenance = TokenizerProvenance(**read_fields(TokenizerProvenance, description, f"{option} {path}"))
    return tokenizer.to(device, dtype).eval().requires_grad_(False)
