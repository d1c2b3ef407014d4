"""Evaluation of a tokenizer over a whole image set: PSNR, perceptual distance, usage of every codebook, pictures."""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from tokenizer.tokenizer_image.codebook import CodeUsage
from tokenizer.tokenizer_image.quantizer import Streams
from tokenizer.tokenizer_image.vq_model import VQModel
from utils.crops import to_uint8
from utils.distributed import Processes, all_reduce_sum
from utils.image_dataset import ImageDataset, share_loader
from utils.pictures import image_grid


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


@torch.no_grad()
def reconstruct(tokenizer: VQModel, dataset: ImageDataset, rows: np.ndarray, streams: Streams, batch_size: int,
                num_workers: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Pass images through a tokenizer in evaluation mode.

    Yields (rows [B], images, reconstructions, codes [B, C', h, w]); images float [B, 3, H, W] in [-1, 1] on `device`.
    A row that could not be read comes back under the number of the image that replaced it, and is left out.
    """
    kept = tokenizer.quantizer.streams(streams)
    wanted = iter(rows.tolist())
    for images, _, found in share_loader(dataset, rows, batch_size, num_workers):
        asked = torch.tensor([next(wanted) for _ in found])
        readable = found == asked
        images = images[readable].to(device, non_blocking=True)
        if len(images) == 0:
            continue
        codes = tokenizer.encode(images)[:, :kept]
        yield found[readable], images, tokenizer.decode_codes(codes), codes


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
    for _, images, reconstructions, codes in reconstruct(tokenizer, dataset, rows, streams, batch_size, num_workers,
                                                         processes.device):
        usage.add(codes)
        sums[0] += psnr(to_uint8(images), to_uint8(reconstructions)).sum()
        sums[1] += perceptual(images, reconstructions.clamp(-1, 1)).sum()
        sums[2] += len(images)
    total_psnr, total_distance, count = all_reduce_sum(sums, processes).tolist()
    figures = {"psnr": total_psnr / count, "images": count, distance: total_distance / count}
    return figures | usage.figures(tokenizer.quantizer.streams(streams), processes)


@torch.no_grad()
def reconstruction_grid(tokenizer: VQModel, dataset: ImageDataset, streams: Streams, device: torch.device,
                        count: int = 12) -> Image.Image:
    """A picture: originals, semantic-only reconstructions and, with more streams, full reconstructions, in rows."""
    picked = np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int)
    images = torch.stack([dataset[(0, int(index))][0] for index in picked]).to(device)
    codes = tokenizer.encode(images)
    shown, names = [images], ["real"]
    for kept in range(1, tokenizer.quantizer.streams(streams) + 1):
        shown.append(tokenizer.decode_codes(codes[:, :kept]))
        names.append(("semantic", "+ detail")[kept - 1] if len(tokenizer.config.codebook_sizes) > 1 else "decoded")
    return image_grid(to_uint8(torch.cat(shown)).cpu().numpy(), len(images), rows=names, scale=max(1, 64 // images.shape[-1]))
