"""Where guidance acts: the attention to the class and the guidance scale of every cell, over the image (the paper's figure 6).

Draws one image of each class and writes a row for each: the image, log α, the scale s of the first stream, and the scale laid
over the image.  α is the last trunk layer's attention to the class token, averaged over heads, on the conditional branch,
when the cell is predicted.  The numbers are written as JSON beside the picture.
"""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started by its path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from autoregressive.models.conditions import Given
from autoregressive.models.ctf import FineOptions
from autoregressive.models.generate import Decoder, SamplingOptions
from autoregressive.sample.model_options import SHOWN, ModelOptions, carried_grid_options
from autoregressive.sample.pipeline import Pipeline, check_classes
from utils.config import Count, UserError, parse, run_main
from utils.distributed import setup
from utils.files import check_writable, write_json
from utils.logs import set_up_logging
from utils.pictures import save_picture

log = logging.getLogger("guidance_map")


@dataclass
class GuidanceMapConfig:
    """Options of the map."""

    models: ModelOptions
    sampling: SamplingOptions
    fine: FineOptions
    classes: tuple[Count, ...] = SHOWN
    """Class ids, a row each; left out: LlamaGen's eight of ImageNet where the GPT knows 1,000 classes, else the first eight."""
    class_names: tuple[str, ...] = ()
    """Captions of the rows; empty: the names that the GPT carries, else the class ids."""
    out: Path = Path("samples/guidance_map.png")
    """Picture to write (png, pdf or svg); the numbers go beside it as JSON."""


class GuidanceMap(NamedTuple):
    """Images with what guided them."""

    images: np.ndarray     # uint8 [B, S, S, 3]
    attention: np.ndarray  # [B, h, w], of the conditional rows
    scale: np.ndarray      # [B, C, h, w], that of each stream


def has_map(pipeline: Pipeline) -> bool:
    """Whether every cell is one trunk step, which has one attention and one scale."""
    return pipeline.fine is None and pipeline.gpt.paradigm.num_steps == pipeline.gpt.config.cells


def measure(pipeline: Pipeline, given: Given, uniforms: Tensor, sampling: SamplingOptions) -> GuidanceMap:
    """Draw samples [B] as `Pipeline.rows` does of the same arguments, and keep α and s of every cell."""
    gpt, side = pipeline.gpt, pipeline.gpt.config.grid_size
    count, streams = len(uniforms), len(gpt.config.codebook_sizes)
    attention, scales = [], []
    decoder = Decoder(gpt, record_attention=True)
    for decoding in decoder.steps(given, sampling, uniforms):
        a = decoding.cache.condition_weight
        assert a is not None
        attention.append(a[:count].clone())                                                              # [B]
        # The step that gave this attention; the decoding stands at the next.
        scale = [torch.as_tensor(decoding.sampler.scale(stream, decoding.step - 1, a[:count])) for stream in range(streams)]
        scales.append(torch.stack([each.to(attention[-1]).expand(count) for each in scale], dim=1))       # [B, C]
    images = pipeline.decode(decoding.state.codes[:count])
    return GuidanceMap(images, torch.stack(attention, -1).unflatten(-1, (side, side)).cpu().numpy(),
                       torch.stack(scales, -1).unflatten(-1, (side, side)).cpu().numpy())


def draw(found: GuidanceMap, names: list[str]) -> Figure:
    """A row for each image: the image, log α, s, and s over the image; one colour scale for all rows."""
    rows, size = len(names), found.images.shape[1]
    figure = Figure(figsize=(8.5, 0.5 + 1.9 * rows), layout="constrained")
    axes = figure.subplots(rows, 4, squeeze=False)
    log_attention, scale = np.log(found.attention.clip(1e-12)), found.scale[:, 0]
    # The class token's own step has nothing but itself to attend to: α is 1 there, and would hide the differences of the others.
    others = log_attention.reshape(rows, -1)[:, 1:]
    shades = {"log α": (log_attention, others.min(), others.max(), "viridis"),
              "scale s": (scale, scale.min(), scale.max(), "magma")}
    for row, name in enumerate(names):
        axes[row, 0].imshow(found.images[row])
        axes[row, 0].set_ylabel(name)
        for column, (values, low, high, colours) in enumerate(shades.values(), 1):
            shown = axes[row, column].imshow(values[row], cmap=colours, vmin=low, vmax=high)
            if row == rows - 1:
                figure.colorbar(shown, ax=axes[:, column], location="bottom", shrink=0.9, aspect=20, fraction=0.1 / rows,
                                pad=0.05 / rows)
        axes[row, 3].imshow(found.images[row].mean(-1), cmap="gray", vmin=0, vmax=255)
        axes[row, 3].imshow(scale[row], cmap="magma", vmin=scale.min(), vmax=scale.max(), alpha=0.5,
                            extent=(-0.5, size - 0.5, size - 0.5, -0.5))
    for axis, title in zip(axes[0], ("sample", *shades, "s over the sample")):
        axis.set_title(title, fontsize=10)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    return figure


def main() -> None:
    """Parse options, draw, write picture and numbers."""
    config = parse(GuidanceMapConfig, carried_grid_options)
    processes = setup(config.models.device)
    set_up_logging(processes)
    if config.out.suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"--out {config.out} is no picture: give one that ends in .png, .pdf or .svg.")
    check_writable(config.out.parent, "--out")
    pipeline = Pipeline(config.models, config.sampling, config.fine, processes.device)
    names = check_classes(config.classes, config.class_names, pipeline)
    if not has_map(pipeline):
        raise UserError(f"--gpt-ckpt {config.models.gpt_ckpt} takes more than one trunk step for a cell: give a GPT of the "
                        "single, independent, conditional or hierarchical paradigm, without --fine-ckpt.")
    uniforms = pipeline.uniforms(config.sampling.seed, np.arange(len(names)))
    found = measure(pipeline, torch.tensor(config.classes), uniforms, config.sampling)
    save_picture(draw(found, names), config.out, dpi=110)
    write_json(config.out.with_suffix(".json"), {"classes": list(config.classes), "attention": found.attention.tolist(),
                                                 "scale": found.scale.tolist()})
    log.info("α from %.4f to %.4f after the first cell, s from %.3f to %.3f; wrote %s",
             found.attention.reshape(len(names), -1)[:, 1:].min(), found.attention.reshape(len(names), -1)[:, 1:].max(),
             found.scale.min(), found.scale.max(), config.out)
    processes.close()


if __name__ == "__main__":
    run_main(main)
