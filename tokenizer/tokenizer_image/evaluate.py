"""Evaluation of a tokenizer over a whole image set: PSNR, perceptual distance, usage of every codebook, pictures."""

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from tokenizer.tokenizer_image.codebook import CodeUsage, warn_of_collapse
from tokenizer.tokenizer_image.quantizer import Streams
from tokenizer.tokenizer_image.vq_model import VQModel
from utils.crops import to_uint8
from utils.distributed import Processes, all_reduce_sum
from utils.image_dataset import ImageDataset, share_loader
from utils.pictures import image_grid


class Autoencoder(Protocol):
    """What the figures of reconstruction need of whatever reconstructs: a tokenizer's codes (`ByCodes`), or a baseline."""

    fingerprint: str                  # of the weights
    downsampling: int                 # image pixels that a cell covers along one axis
    codebook_sizes: tuple[int, ...]   # none where latents are continuous
    streams: int                      # of codes that it gives

    def reconstruct(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, H, W] in [-1, 1] -> reconstructions, about [-1, 1], and codes int64 [B, streams, h, w]."""

    def stages(self, images: Tensor) -> dict[str, Tensor]:
        """Reconstructions for a picture by name, the best one last."""

    def warn(self, figures: dict[str, float], image_size: int) -> None:
        """Log what the figures say against it."""


class ByCodes:
    """A tokenizer of ours as an `Autoencoder`: images through the codes of its first streams."""

    def __init__(self, tokenizer: VQModel, streams: Streams) -> None:
        self.tokenizer, self.streams = tokenizer, tokenizer.quantizer.streams(streams)
        self.fingerprint, self.codebook_sizes = tokenizer.provenance.fingerprint, tokenizer.config.codebook_sizes
        self.downsampling = tokenizer.config.downsampling

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """See `Autoencoder`."""
        codes = self.tokenizer.encode(images)[:, : self.streams]
        return self.tokenizer.decode_codes(codes), codes

    @torch.no_grad()
    def stages(self, images: Tensor) -> dict[str, Tensor]:
        """The images by the first stream alone, and by more."""
        codes = self.tokenizer.encode(images)
        names = ("semantic", "+ detail") if len(self.codebook_sizes) > 1 else ("decoded",)
        return {name: self.tokenizer.decode_codes(codes[:, : kept + 1]) for kept, name in enumerate(names[: self.streams])}

    def warn(self, figures: dict[str, float], image_size: int) -> None:
        """A codebook that is hardly used."""
        warn_of_collapse(figures, self.tokenizer.config, image_size)


def psnr(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair in dB: uint8 [B, H, W, 3], twice -> [B]."""
    error = (images.float() - reconstructions.float()).square().flatten(1).mean(1)
    return 10 * torch.log10(255**2 / error.clamp_min(1e-10))


def ssim(images: Tensor, reconstructions: Tensor, data_range: float) -> Tensor:
    """Structural similarity of each pair on [0, 1]: uint8 [B, H, W, 3], twice -> float64 [B].

    scikit-image's default: uniform windows of 7 pixels inside the image, sample covariances, K1 = 0.01, K2 = 0.03, mean over
    channels (Wang et al. 2004).
    """
    window, samples = 7, 49
    x, y = ((pixels.double() / 255).movedim(-1, 1) for pixels in (images, reconstructions))  # [B, 3, H, W]

    def mean(values: Tensor) -> Tensor:
        return F.avg_pool2d(values, window, stride=1)

    def covariance(a: Tensor, b: Tensor, mean_a: Tensor, mean_b: Tensor) -> Tensor:
        return (mean(a * b) - mean_a * mean_b) * samples / (samples - 1)

    mean_x, mean_y = mean(x), mean(y)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    structure = 2 * covariance(x, y, mean_x, mean_y) + c2
    variance = covariance(x, x, mean_x, mean_x) + covariance(y, y, mean_y, mean_y) + c2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    return (luminance * structure / variance).flatten(1).mean(1)


def reconstruct(autoencoder: Autoencoder, dataset: ImageDataset, rows: np.ndarray, batch_size: int, num_workers: int,
                device: torch.device) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Pass images through an autoencoder.

    Yields (rows [B], images, reconstructions, codes [B, streams, h, w]); images float [B, 3, H, W] in [-1, 1] on `device`.
    A row that could not be read comes back under the number of the image that replaced it, and is left out.
    """
    wanted = iter(rows.tolist())
    for images, _, found in share_loader(dataset, rows, batch_size, num_workers):
        asked = torch.tensor([next(wanted) for _ in found])
        readable = found == asked
        images = images[readable].to(device, non_blocking=True)
        if len(images) == 0:
            continue
        yield found[readable], images, *autoencoder.reconstruct(images)


@torch.no_grad()
def evaluate_tokenizer(tokenizer: VQModel, dataset: ImageDataset, streams: Streams, perceptual: nn.Module,
                       processes: Processes, batch_size: int, num_workers: int = 0, distance: str = "lpips") -> dict[str, float]:
    """Figures of a tokenizer in evaluation mode over the whole set, all processes together.

    distance: what the perceptual distance is called (`distance_name`).  Returns psnr (dB) and that distance, means over images;
    the number of images; usage_* and perplexity_* by stream.
    """
    usage = CodeUsage(tokenizer.config.codebook_sizes, processes.device)
    sums = torch.zeros(3, device=processes.device)  # PSNR, perceptual distance, images
    rows = np.arange(processes.rank, len(dataset), processes.world_size)
    by_codes = ByCodes(tokenizer, streams)
    for _, images, reconstructions, codes in reconstruct(by_codes, dataset, rows, batch_size, num_workers, processes.device):
        usage.add(codes)
        sums[0] += psnr(to_uint8(images), to_uint8(reconstructions)).sum()
        sums[1] += perceptual(images, reconstructions.clamp(-1, 1)).sum()
        sums[2] += len(images)
    total_psnr, total_distance, count = all_reduce_sum(sums, processes).tolist()
    figures = {"psnr": total_psnr / count, "images": count, distance: total_distance / count}
    return figures | usage.figures(by_codes.streams, processes)


@torch.no_grad()
def reconstruction_grid(autoencoder: Autoencoder, dataset: ImageDataset, device: torch.device, count: int = 12) -> Image.Image:
    """A picture: a row of originals, and one for each stage of their reconstruction."""
    picked = np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int)
    images = torch.stack([dataset[(0, int(index))][0] for index in picked]).to(device)
    shown = {"real": images} | autoencoder.stages(images)
    pixels = to_uint8(torch.cat(list(shown.values()))).cpu().numpy()
    return image_grid(pixels, len(images), rows=list(shown), scale=max(1, 64 // images.shape[-1]))
