"""Reconstruct an image set: npz for rFID, and PSNR, SSIM, LPIPS, codebook usage over the whole set (LlamaGen's entry point).

PSNR and SSIM are means over images.  `ssim` is the published number: scikit-image on pixels in [0, 1] with `data_range=2.0`, as
LlamaGen and the IAR2 release call it.  `ssim_full_range` has the data range that pixels have, 1, and is lower.  `arr_0` holds
the reconstructions; compare it with the npz that `val_ddp.py` makes of the same images.  `scripts/rfid.py` does all of it.
`--vq-ckpt diffusers:...` reconstructs by an autoencoder of that package (`baselines.py`).
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started by its path

import numpy as np
import torch
import torch.nn.functional as F

from tokenizer.tokenizer_image.baselines import PREFIX, load_baseline
from tokenizer.tokenizer_image.codebook import CodeUsage
from tokenizer.tokenizer_image.evaluate import Autoencoder, ByCodes, psnr, reconstruct, reconstruction_grid, ssim
from tokenizer.tokenizer_image.perceptual import PerceptualOptions, build_perceptual, distance_name
from tokenizer.tokenizer_image.quantizer import Streams
from tokenizer.tokenizer_image.vq_model import load_tokenizer
from utils.config import Count, Device, Positive, UserError, parse, require_multiple, run_main
from utils.crops import to_uint8
from utils.devices import image_layout
from utils.distributed import Processes, all_reduce_sum, setup
from utils.files import check_writable, write_json
from utils.image_dataset import ImageDataset, ImageOptions
from utils.image_source import ImageSource
from utils.image_store import ImageStore
from utils.images import open_images
from utils.logs import progress, set_up_logging
from utils.pictures import save_picture


@dataclass
class ReconstructionOptions:
    """What is reconstructed, by what, and how it is compared."""

    images: ImageOptions
    perceptual: PerceptualOptions
    vq_ckpt: Path
    """tokenizer.safetensors or the run folder that holds it; diffusers:FOLDER or diffusers:OWNER/NAME[/SUBFOLDER][@REVISION]."""
    streams: Streams = "all"
    """Decode all codes, or the semantic ones alone."""
    image_size_eval: Count = 0
    """Resize images and reconstructions to this side, bicubic, before all figures, as LlamaGen does; 0: do not."""
    batch_size: Positive = 32
    """Images a process reconstructs at once."""
    device: Device = "auto"
    """auto: CUDA where there is any."""

    @property
    def compared_size(self) -> int:
        """Side in pixels of the images that are compared."""
        return self.image_size_eval or self.images.image_size


@dataclass
class ReconstructionConfig:
    """Options of reconstruction."""

    what: ReconstructionOptions
    out: Path
    """npz to write; figures go beside it as JSON, a picture as PNG."""


def open_autoencoder(options: ReconstructionOptions, device: torch.device) -> Autoencoder:
    """The tokenizer or baseline; raises UserError when it cannot do what the options ask."""
    given = str(options.vq_ckpt)
    found: Autoencoder
    if given.startswith(PREFIX):
        if options.streams == "semantic":
            raise UserError(f"--streams semantic is for tokenizers of two codebooks, not for --vq-ckpt {given}: leave it out.")
        baseline = load_baseline(given, device)
        baseline.model.to(memory_format=image_layout(device))
        found = baseline
    else:
        tokenizer = load_tokenizer(options.vq_ckpt, device).to(memory_format=image_layout(device))
        if tokenizer.provenance.stage == "semantic" and options.streams == "all":
            raise UserError(f"--vq-ckpt {given} is a stage 1 tokenizer, whose detail codebook is untrained: use --streams "
                            "semantic.")
        found = ByCodes(tokenizer, options.streams)
    require_multiple("--image-size", options.images.image_size, found.downsampling, "the tokenizer's downsampling")
    return found


def run_share(options: ReconstructionOptions, autoencoder: Autoencoder, dataset: ImageDataset, store: ImageStore,
              processes: Processes) -> dict[str, Any]:
    """Reconstruct this process's share into the store; returns the figures of all processes together."""
    perceptual = build_perceptual(options.perceptual, processes.device)
    usage = CodeUsage(autoencoder.codebook_sizes, processes.device)
    sums = torch.zeros(5, dtype=torch.float64, device=processes.device)  # PSNR, SSIM twice, perceptual distance, images
    size = (options.image_size_eval,) * 2
    share = store.share()
    with progress(len(share), "reconstruct", "images", processes) as bar:
        for rows, images, decoded, codes in reconstruct(autoencoder, dataset, share, options.batch_size,
                                                        options.images.num_workers, processes.device):
            if options.image_size_eval:
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
    names = "psnr", "ssim", "ssim_full_range", distance_name(options.perceptual)
    figures = {name: value / total[4] for name, value in zip(names, total)} | {"images": int(total[4])}
    figures |= usage.figures(autoencoder.streams, processes)
    figures["perceptual_net"] = options.perceptual.perceptual_net
    if processes.is_main:
        autoencoder.warn(figures, options.images.image_size)
    return figures


def reconstruct_all(options: ReconstructionOptions, autoencoder: Autoencoder, source: ImageSource, out: Path,
                    processes: Processes) -> dict[str, Any]:
    """Write npz, figures and picture of all images; returns the figures, the same in every process."""
    dataset, size = ImageDataset(source, options.images.image_size, left_out=True), options.compared_size
    # A whole set takes minutes and every figure needs every image: an interrupted run starts over.
    store = ImageStore(out, (len(source), size, size, 3),
                       {"kind": "reconstruction", "tokenizer": options.vq_ckpt, "streams": options.streams},
                       processes, start_over=True)
    figures = run_share(options, autoencoder, dataset, store, processes)
    if processes.is_main:
        save_picture(reconstruction_grid(autoencoder, dataset, processes.device), out.with_suffix(".png"))
    store.finish(source.class_names, arr_1=source.labels, kind=np.array("reconstruction"))
    if processes.is_main:
        write_json(out.with_suffix(".json"), figures)
    dataset.report_skipped()
    return figures


def main() -> None:
    """Parse options, reconstruct, write npz, figures and picture."""
    config = parse(ReconstructionConfig)
    processes = setup(config.what.device)
    set_up_logging(processes)
    source = open_images(config.what.images.data_path)
    check_writable(config.out.parent, "--out")
    figures = reconstruct_all(config.what, open_autoencoder(config.what, processes.device), source, config.out, processes)
    if processes.is_main:
        for name, value in figures.items():
            print(f"{name:22} {value if isinstance(value, str) else f'{value:.4f}'}")
    processes.close()


if __name__ == "__main__":
    run_main(main)
