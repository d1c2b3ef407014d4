"""How far an image changes when its codes do: MSE and LPIPS against code distance (the paper's figure 3, section 3.1).

Every code of an image is replaced by another of the same codebook, the one whose distance to it is nearest to a target.
The result is decoded.  Targets go from 0, where the codes stay, to the largest distance in the codebook.  `--against source`
compares the decoded image with the image that was encoded, as the figure's caption says: the curve starts at the tokenizer's
own error.  `--against reconstruction` compares it with the decoding of the unchanged codes: the curve starts at 0.

Deviation from the paper: it measures distances of embeddings that are not normalised.  Here distances are between codes as the
tokenizer uses them; L2-normalised ones are at most 2 apart.  Decoded images are clamped to [-1, 1] and compared there.
"""

import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started by its path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from tokenizer.tokenizer_image.evaluate import ByCodes, reconstruct
from tokenizer.tokenizer_image.perceptual import PerceptualOptions, build_perceptual, distance_name
from tokenizer.tokenizer_image.quantizer import Streams
from tokenizer.tokenizer_image.vq_model import VQModel, load_tokenizer
from utils.config import Count, Device, Positive, UserError, choices, interval, parse, require_multiple, run_main
from utils.crops import to_uint8
from utils.devices import image_layout
from utils.distributed import Processes, setup
from utils.files import check_writable, write_json
from utils.image_dataset import ImageDataset, ImageOptions
from utils.images import open_images
from utils.logs import progress, set_up_logging
from utils.pictures import image_grid, save_picture

log = logging.getLogger("code_distance")

_CHUNK = 1024  # codes whose distances to all others are held at once: 64 MiB for 16384 codes
_SHOWN = 6     # images in the picture


@dataclass
class CodeDistanceConfig:
    """Options of the measurement."""

    data: ImageOptions
    perceptual: PerceptualOptions
    vq_ckpt: Path
    """tokenizer.safetensors or the run folder that holds it."""
    out: Path
    """Folder for code_distance.json, code_distance.png and code_distance_images.png."""
    against: Annotated[str, choices(("source", "reconstruction"))] = "source"
    """Compare with the images themselves, or with their reconstructions from unchanged codes."""
    stream: Count = 0
    """Codebook whose codes are replaced; those of the others stay."""
    points: Annotated[int, interval(int, 2)] = 12
    """Distances, from 0 to the largest."""
    images: Positive = 256
    """Images at most, evenly over the classes."""
    batch_size: Positive = 32
    """Images decoded at once."""
    device: Device = "auto"
    """auto: CUDA where there is any."""


class Replacements(NamedTuple):
    """For each of P target distances, the code that replaces each code of a codebook."""

    targets: Tensor    # [P], from 0
    codes: Tensor      # int64 [P, K]
    distances: Tensor  # [P, K], to the code that is replaced


def distance_rows(codebook: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Distances of some codes to all, a chunk at a time: [K, d] -> (first code, [R, K]).

    Computed from differences, not from products: the distance of a code to itself is exactly 0, and TF32 is not used.
    """
    for first in range(0, len(codebook), _CHUNK):
        rows = codebook[first : first + _CHUNK]
        yield first, torch.cdist(rows, codebook, compute_mode="donot_use_mm_for_euclid_dist")  # [R, K]


def replacements(codebook: Tensor, points: int) -> Replacements:
    """Replacements of a codebook [K, d] at `points` target distances, from 0 to the largest distance between two codes.

    At target 0 every code stays.  At the others it is replaced by the other code whose distance to it is nearest to the
    target, the lower one of two.
    """
    largest = max(distances.max().item() for _, distances in distance_rows(codebook))
    targets = torch.linspace(0, largest, points)                                   # [P]
    codes, realised = [], []
    for first, distances in distance_rows(codebook):
        own = torch.arange(first, first + len(distances), device=codebook.device)  # [R]
        others = distances.scatter(1, own[:, None], torch.inf)
        found = [own] + [(others - target).abs_().argmin(1) for target in targets[1:].tolist()]
        codes.append(torch.stack(found, 1))                                        # [R, P]
        realised.append(distances.gather(1, codes[-1]))
    return Replacements(targets, torch.cat(codes).T.contiguous(), torch.cat(realised).T.contiguous())


def replace_codes(codes: Tensor, stream: int, replacement: Tensor) -> Tensor:
    """Codes [B, C, h, w] with those of one stream replaced by a table [K]."""
    changed = codes.clone()
    changed[:, stream] = replacement[codes[:, stream]]
    return changed


def measure(config: CodeDistanceConfig, tokenizer: VQModel, streams: Streams, dataset: ImageDataset,
            replaced: Replacements, processes: Processes) -> list[dict[str, Any]]:
    """The curve: for every point the target, the realised distance (mean over cells), mse, the perceptual distance by its name
    (`distance_name`), and what was measured."""
    points, device = len(replaced.targets), processes.device
    perceptual = build_perceptual(config.perceptual, device)
    sums = torch.zeros(points, 3, dtype=torch.float64, device=device)  # distance, MSE, perceptual distance
    count, rows = 0, np.arange(len(dataset))
    with progress(len(rows) * points, "code distance", "images", processes) as bar:
        for _, images, decoded, codes in reconstruct(ByCodes(tokenizer, streams), dataset, rows, config.batch_size,
                                                     config.data.num_workers, device):
            compared = images if config.against == "source" else decoded.clamp(-1, 1)
            for point in range(points):
                changed = tokenizer.decode_codes(replace_codes(codes, config.stream, replaced.codes[point])).clamp(-1, 1)
                sums[point, 0] += replaced.distances[point][codes[:, config.stream]].flatten(1).mean(1).sum()
                sums[point, 1] += (changed - compared).square().flatten(1).mean(1).sum()
                sums[point, 2] += perceptual(changed, compared).sum()
                bar.update(len(images))
            count += len(images)
    about = {"images": count, "against": config.against, "perceptual_net": config.perceptual.perceptual_net}
    return [{"target": target} | dict(zip(("distance", "mse", distance_name(config.perceptual)), line)) | about
            for target, line in zip(replaced.targets.tolist(), (sums / count).tolist())]


def draw_curves(curve: list[dict[str, Any]], config: CodeDistanceConfig) -> Figure:
    """Figure 3a: MSE on the left axis, the perceptual distance on the right, over the realised code distance."""
    figure = Figure(figsize=(6, 4))
    left = figure.subplots()
    right = left.twinx()
    distances = [point["distance"] for point in curve]
    net, own = config.perceptual.perceptual_net, distance_name(config.perceptual)
    lpips = {"classifier": "classifier distance", "random": "LPIPS of a random network"}.get(net, f"LPIPS ({net})")
    for axis, key, name, marker, color in ((left, "mse", "MSE", "o-", "tab:blue"), (right, own, lpips, "s--", "tab:orange")):
        axis.plot(distances, [point[key] for point in curve], marker, color=color, label=name)
        axis.set_ylabel(name, color=color)
        axis.set_ylim(bottom=0)
    left.set(xlabel="code distance", title=f"difference to the {config.against}, {curve[0]['images']} images")
    left.grid(alpha=0.3)
    left.legend(handles=[*left.lines, *right.lines], loc="upper left")
    figure.tight_layout()
    return figure


@torch.no_grad()
def draw_images(config: CodeDistanceConfig, tokenizer: VQModel, streams: Streams, dataset: ImageDataset,
                replaced: Replacements, distances: list[float], device: torch.device) -> Image.Image:
    """Figure 3b: a row for each of a few images, with a column for the source and one for each distance."""
    picked = np.linspace(0, len(dataset) - 1, min(_SHOWN, len(dataset))).astype(int)
    images = torch.stack([dataset[(0, int(index))][0] for index in picked]).to(device)  # [N, 3, H, W]
    codes = tokenizer.encode(images)[:, :tokenizer.quantizer.streams(streams)]
    columns = [images] + [tokenizer.decode_codes(replace_codes(codes, config.stream, line)).clamp(-1, 1)
                          for line in replaced.codes]
    pixels = to_uint8(torch.stack(columns, 1).flatten(0, 1)).cpu().numpy()              # [N (1 + P), H, W, 3]
    return image_grid(pixels, len(columns), scale=max(1, 64 // config.data.image_size),
                      titles=["source", *(f"{distance:.2f}" for distance in distances)])


def open_tokenizer(config: CodeDistanceConfig, device: torch.device) -> tuple[VQModel, Streams]:
    """The tokenizer and the streams it is decoded from; raises UserError when an option does not fit it."""
    tokenizer = load_tokenizer(config.vq_ckpt, device).to(memory_format=image_layout(device))
    # Stage 1 leaves the detail codebook untrained.
    streams: Streams = "semantic" if tokenizer.provenance.stage == "semantic" else "all"
    kept = tokenizer.quantizer.streams(streams)
    if config.stream >= kept:
        raise UserError(f"--stream {config.stream} is not among the {kept} trained codebooks of --vq-ckpt "
                        f"{config.vq_ckpt}: give a number from 0 to {kept - 1}.")
    require_multiple("--image-size", config.data.image_size, tokenizer.config.downsampling, "the tokenizer's downsampling")
    return tokenizer, streams


def main() -> None:
    """Measure the curve and write it as figures and pictures."""
    config = parse(CodeDistanceConfig)
    processes = setup(config.device)
    set_up_logging(processes)
    dataset = ImageDataset(open_images(config.data.data_path).subset(config.images), config.data.image_size,
                           left_out=True)
    check_writable(config.out, "--out")
    tokenizer, streams = open_tokenizer(config, processes.device)
    replaced = replacements(tokenizer.quantizer.table(config.stream), config.points)
    curve = measure(config, tokenizer, streams, dataset, replaced, processes)
    write_json(config.out / "code_distance.json", curve)
    save_picture(draw_curves(curve, config), config.out / "code_distance.png")
    save_picture(draw_images(config, tokenizer, streams, dataset, replaced, [point["distance"] for point in curve],
                             processes.device), config.out / "code_distance_images.png")
    dataset.report_skipped()
    log.info("MSE %.4f at distance 0, %.4f at %.3f; wrote %s", curve[0]["mse"], curve[-1]["mse"], curve[-1]["distance"],
             config.out)
    processes.close()


if __name__ == "__main__":
    run_main(main)
