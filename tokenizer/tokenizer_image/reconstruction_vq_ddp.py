"""Reconstruct an image set: npz for rFID, and PSNR, SSIM, LPIPS, codebook usage over the whole set (LlamaGen's entry point).

PSNR and SSIM are means over images.  `ssim` is the published number: scikit-image on pixels in [0, 1] with `data_range=2.0`, as
LlamaGen and the IAR2 release call it.  `ssim_full_range` has the data range that pixels have, 1, and is lower.  `arr_0` holds
the reconstructions; compare it with the npz that `val_ddp.py` makes of the same images.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started by its path

import numpy as np
import torch
import torch.nn.functional as F

from tokenizer.tokenizer_image.codebook import CodeUsage, warn_of_collapse
from tokenizer.tokenizer_image.evaluate import psnr, reconstruct, reconstruction_grid, ssim
from tokenizer.tokenizer_image.perceptual import PerceptualOptions, build_perceptual, distance_name
from tokenizer.tokenizer_image.quantizer import Streams
from tokenizer.tokenizer_image.vq_model import VQModel, load_tokenizer
from utils.config import Count, Device, Positive, UserError, parse, require_multiple, run_main
from utils.crops import to_uint8
from utils.devices import image_layout
from utils.distributed import Processes, all_reduce_sum, setup
from utils.files import check_writable, write_json
from utils.image_dataset import ImageDataset, ImageOptions
from utils.image_store import ImageStore
from utils.images import open_images
from utils.logs import progress, set_up_logging
from utils.pictures import save_picture


@dataclass
class ReconstructionConfig:
    """Options of reconstruction."""

    images: ImageOptions
    perceptual: PerceptualOptions
    vq_ckpt: Path
    """tokenizer.safetensors or the run folder that holds it."""
    out: Path
    """npz to write; figures go beside it as JSON, a picture as PNG."""
    streams: Streams = "all"
    """Decode all codes, or the semantic ones alone."""
    image_size_eval: Count = 0
    """Resize images and reconstructions to this side, bicubic, before all figures, as LlamaGen does; 0: do not."""
    batch_size: Positive = 32
    """Images a process reconstructs at once."""
    device: Device = "auto"
    """auto: CUDA where there is any."""


def open_tokenizer(config: ReconstructionConfig, processes: Processes) -> VQModel:
    """The tokenizer; raises UserError when it cannot do what the options ask."""
    tokenizer = load_tokenizer(config.vq_ckpt, processes.device).to(memory_format=image_layout(processes.device))
    if tokenizer.provenance.stage == "semantic" and config.streams == "all":
        raise UserError(f"--vq-ckpt {config.vq_ckpt} is a stage 1 tokenizer, whose detail codebook is untrained: use "
                        "--streams semantic.")
    require_multiple("--image-size", config.images.image_size, tokenizer.config.downsampling, "the tokenizer's downsampling")
    return tokenizer


def run_share(config: ReconstructionConfig, tokenizer: VQModel, dataset: ImageDataset, store: ImageStore,
              processes: Processes) -> dict[str, Any]:
    """Reconstruct this process's share into the store; returns the figures of all processes together."""
    perceptual = build_perceptual(config.perceptual, processes.device)
    usage = CodeUsage(tokenizer.config.codebook_sizes, processes.device)
    sums = torch.zeros(5, dtype=torch.float64, device=processes.device)  # PSNR, SSIM twice, perceptual distance, images
    size = (config.image_size_eval,) * 2
    share = store.share()
    with progress(len(share), "reconstruct", "images", processes) as bar:
        for rows, images, decoded, codes in reconstruct(tokenizer, dataset, share, config.streams, config.batch_size,
                                                        config.images.num_workers, processes.device):
            if config.image_size_eval:
                images, decoded = (F.interpolate(pixels, size, mode="bicubic") for pixels in (images, decoded))
            real, fake = to_uint8(images), to_uint8(decoded)
            store.write(rows.numpy(), fake.cpu().numpy())
            usage.add(codes)
            sums[0] += psnr(real, fake).sum()
            for place, data_range in ((1, 2.0), (2, 1.0)):
                sums[place] += ssim(real, fake, data_range).sum()
            sums[3] += perceptual(images.clamp(-1, 1), decoded.clamp(-1, 1)).sum()
            sums[4] += len(rows)
            bar.update(len(rows))
    store.mark_skipped(np.intersect1d(share, store.missing()))
    total = all_reduce_sum(sums, processes).tolist()
    names = "psnr", "ssim", "ssim_full_range", distance_name(config.perceptual)
    figures = {name: value / total[4] for name, value in zip(names, total)} | {"images": int(total[4])}
    figures |= usage.figures(tokenizer.quantizer.streams(config.streams), processes)
    figures["perceptual_net"] = config.perceptual.perceptual_net
    if processes.is_main:
        warn_of_collapse(figures, tokenizer.config, config.images.image_size)
        save_picture(reconstruction_grid(tokenizer, dataset, config.streams, processes.device), config.out.with_suffix(".png"))
    return figures


def main() -> None:
    """Parse options, reconstruct, write npz, figures and picture."""
    config = parse(ReconstructionConfig)
    processes = setup(config.device)
    set_up_logging(processes)
    source = open_images(config.images.data_path)
    check_writable(config.out.parent, "--out")
    size = config.image_size_eval or config.images.image_size
    dataset = ImageDataset(source, config.images.image_size, left_out=True)
    tokenizer = open_tokenizer(config, processes)
    # A whole set takes minutes and every figure needs every image: an interrupted run starts over.
    store = ImageStore(config.out, (len(source), size, size, 3),
                       {"kind": "reconstruction", "tokenizer": config.vq_ckpt, "streams": config.streams},
                       processes, start_over=True)
    figures = run_share(config, tokenizer, dataset, store, processes)
    store.finish(source.class_names, arr_1=source.labels, kind=np.array("reconstruction"))
    if processes.is_main:
        write_json(config.out.with_suffix(".json"), figures)
        for name, value in figures.items():
            print(f"{name:22} {value if isinstance(value, str) else f'{value:.4f}'}")
    dataset.report_skipped()
    processes.close()


if __name__ == "__main__":
    run_main(main)
