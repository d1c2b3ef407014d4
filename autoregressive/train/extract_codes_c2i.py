"""Extract codes: images -> tokenizer -> one memory-mapped array (LlamaGen's entry point, one file instead of millions).

Every process encodes a share of the missing images into files of its own, which become one at the end.  `--augmentation
ten-crop` stores LlamaGen's ten crops of an image enlarged by `--crop-range`; `flip` the centre crop and its mirror.
"""

import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started by its path

import numpy as np
import torch
from torch import Tensor

from tokenizer.tokenizer_image.vq_model import VQModel, load_tokenizer
from utils.code_shards import CodeHeader
from utils.code_writer import CodeWriter
from utils.config import Count, Device, UserError, choices, interval, parse, require_multiple, run_main
from utils.crops import center_crop, flip_crops, ten_crops, to_tensor
from utils.devices import image_layout
from utils.distributed import Processes, setup
from utils.files import check_writable
from utils.image_dataset import ImageOptions, crop_loader
from utils.images import ImageSource, open_images
from utils.logs import progress, set_up_logging
from utils.optim import uses_bf16

log = logging.getLogger("extract_codes")

Crops = tuple[np.ndarray, Tensor | None, np.ndarray]             # of `crop_loader`
EncodedCrops = tuple[np.ndarray, np.ndarray | None, np.ndarray]  # the same with codes instead of crops

CROPS: dict[str, tuple[int, Callable[[np.ndarray, int, float], np.ndarray]]] = {
    # name: (crops, function of (image, size, crop range) -> uint8 [crops, size, size, 3])
    "ten-crop": (10, ten_crops),
    "flip": (2, lambda image, size, crop_range: flip_crops(image, size)),
    "none": (1, lambda image, size, crop_range: center_crop(image, size)[None]),
}


@dataclass
class ExtractConfig:
    """Options of code extraction."""

    images: ImageOptions
    vq_ckpt: Path
    """tokenizer.safetensors or the run folder that holds it."""
    code_path: Path
    """Folder to write."""
    augmentation: Annotated[str, choices(CROPS)] = "ten-crop"
    """Crops stored of every image: ten, two, or one."""
    crop_range: Annotated[float, interval(float, 1)] = 1.1
    """Ten-crop: enlarge images by this factor before cutting (LlamaGen: 1.1 and 1.05)."""
    batch_size: Count = 0
    """Crops a process encodes at once, at least all of one image; 0: 256 on a GPU, 32 on a CPU."""
    precision: Annotated[str, choices(("auto", "bf16", "float32"))] = "auto"
    """Of the encoder; auto: bf16 on GPUs.  Codes are chosen in float32 either way."""
    device: Device = "auto"
    """auto: CUDA where there is any."""


def cut(image: np.ndarray, augmentation: str, size: int, crop_range: float) -> np.ndarray:
    """The crops that an augmentation stores of one image: uint8 [H, W, 3] -> uint8 [crops, size, size, 3]."""
    return CROPS[augmentation][1](image, size, crop_range)


def encode(tokenizer: VQModel, crops: Tensor, device: torch.device, bf16: bool) -> Tensor:
    """uint8 crops [n, crops, H, W, 3] -> codes int64 [n, crops, C, N] on the device, which the host does not wait for."""
    pixels = crops.flatten(0, 1).to(device, non_blocking=True)                     # a quarter of what floats would move
    images = to_tensor(pixels).contiguous(memory_format=image_layout(device))
    return tokenizer.encode(images, bf16).flatten(2).unflatten(0, crops.shape[:2])


def encoded(loader: Iterable[Crops], tokenizer: VQModel, device: torch.device, bf16: bool) -> Iterator[EncodedCrops]:
    """(Readable rows, their codes, unreadable rows) of every batch; a batch is fetched once the next one is on the device."""
    waiting: tuple[np.ndarray, Tensor | None, np.ndarray] | None = None
    for readable, crops, unreadable in loader:
        codes = None if crops is None else encode(tokenizer, crops, device, bf16)
        if waiting is not None:
            yield fetched(*waiting)
        waiting = readable, codes, unreadable
    if waiting is not None:
        yield fetched(*waiting)


def fetched(readable: np.ndarray, codes: Tensor | None, unreadable: np.ndarray) -> EncodedCrops:
    """A batch with its codes on the host."""
    return readable, None if codes is None else codes.cpu().numpy(), unreadable


def make_header(config: ExtractConfig, source: ImageSource, tokenizer: VQModel) -> CodeHeader:
    """The header of the codes; raises UserError when the tokenizer does not fit the options."""
    size, crops = config.images.image_size, CROPS[config.augmentation][0]
    if tokenizer.provenance.stage == "semantic":
        raise UserError(f"--vq-ckpt {config.vq_ckpt} is a stage 1 tokenizer, whose detail codebook is untrained: give stage 2's.")
    require_multiple("--image-size", size, tokenizer.config.downsampling, "the tokenizer's downsampling")
    augmentation = f"ten-crop {config.crop_range}" if config.augmentation == "ten-crop" else config.augmentation
    return CodeHeader(tokenizer.provenance.fingerprint, list(tokenizer.config.codebook_sizes),
                      size // tokenizer.config.downsampling, size, crops, augmentation, source.num_classes, len(source),
                      source=f"{len(source)} images of {config.images.data_path.name}", class_names=list(source.class_names),
                      images_checksum=source.checksum)


def extract(config: ExtractConfig, processes: Processes) -> None:
    """Encode every missing image; finished rows are never done again."""
    source = open_images(config.images.data_path)
    tokenizer = load_tokenizer(config.vq_ckpt, processes.device).to(memory_format=image_layout(processes.device))
    header = make_header(config, source, tokenizer)
    check_writable(config.code_path, "--code-path")
    writer = CodeWriter(config.code_path, header, source.labels, processes)
    rows = writer.share()
    crop = partial(cut, augmentation=config.augmentation, size=config.images.image_size, crop_range=config.crop_range)
    device, bf16 = processes.device, uses_bf16(config.precision, processes.device)
    batch_size = config.batch_size or (256 if device.type == "cuda" else 32)
    loader = crop_loader(source, rows, crop, max(batch_size // header.crops, 1), config.images.num_workers)
    bar = progress(len(rows), "extract", "images", processes)
    for readable, codes, unreadable in encoded(loader, tokenizer, device, bf16):
        if codes is not None:
            writer.write(readable, codes)
        writer.skip(unreadable)
        bar.update(len(readable) + len(unreadable))
    bar.close()
    left_out = writer.finish()
    log.info("%s: codes of %d images, %d crops each, grid %dx%d, %d classes; %d unreadable images left out",
             config.code_path, header.images - left_out, header.crops, header.grid_size, header.grid_size,
             header.num_classes, left_out)


def main() -> None:
    """Parse options and extract."""
    config = parse(ExtractConfig)
    processes = setup(config.device)
    set_up_logging(processes)
    extract(config, processes)
    processes.close()


if __name__ == "__main__":
    run_main(main)
