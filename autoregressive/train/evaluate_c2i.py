"""Likelihood of a GPT on held-out codes: nats per code for every stream, and bits per image.

The cross-entropies of the streams add up to the code length of an image, whatever the paradigm.  For CTF the two stages
are added, each evaluated with its own code map.  Bits of codes from different tokenizers say nothing without the quality of
their reconstructions.
"""

import logging
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started by its path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from autoregressive.models.conditions import Given, each
from autoregressive.models.gpt import GPT, GPTProvenance, load_gpt
from autoregressive.models.transformer import GPTConfig
from autoregressive.train.sources import Told, find_source
from utils.class_names import require_same_names
from utils.code_map import load_code_map
from utils.code_shards import STREAMS, read_header
from utils.config import Device, Positive, UserError, command_line, parse, run_main
from utils.distributed import Processes, all_reduce_sum, setup
from utils.files import check_writable, write_json
from utils.hub import local_path
from utils.logs import followed, set_up_logging
from utils.shards import require_fit
from utils.text_encoders import encoder_facts
from utils.text_shards import CaptionOptions

log = logging.getLogger("evaluate_c2i")

WHOLE = CaptionOptions(short_captions=0.0)  # beside the codes, none of them short


@dataclass
class EvaluateConfig:
    """Options of the evaluation."""

    gpt_ckpt: Path
    """gpt.safetensors, the run folder that holds it, or a training checkpoint step-*."""
    code_path: Path
    """Held-out codes, written by extract_codes_c2i.py."""
    code_map: str = ""
    """The code map the GPT was trained with."""
    out: Path | None = None
    """JSON to write."""
    batch_size: Positive = 64
    """Images a process takes at once."""
    device: Device = "auto"
    """auto: CUDA where there is any."""


def open_held_out(config: GPTConfig, about: GPTProvenance, model: str, code_path: str | Path, code_map: str,
                  option: str = "--code-path") -> Any:
    """Held-out codes as a GPT sees them, a data set of `sources.py`; raises UserError, naming `option`, when they are of other
    classes, captions, tokenizer or shape.

    config, about: of the GPT; model: what messages call it; code_map: the map of its training, or empty.
    """
    code_path = local_path(code_path, option)
    header, found = read_header(code_path, option), load_code_map(code_map) if code_map else None
    if found:
        header = found.header(header, f"--code-map {code_map}")
    require_fit(header, code_path, {
        "codebook_sizes": (list(config.codebook_sizes), model), "grid_size": (config.grid_size, model),
        **({"num_classes": (config.num_classes, model)} if config.condition == "class" else {})}, option)
    source = find_source(config.condition)
    require_told(source.tell([code_path], option, WHOLE), config, about, f"{option} {code_path}", model)
    require_same_names(tuple(header.class_names), about.class_names, f"{option} {code_path}", model)
    if about.tokenizer not in ("", header.tokenizer):
        raise UserError(f"{option} {code_path} has codes of {header.tokenizer} but {model} was trained on those of "
                        f"{about.tokenizer}: give codes of the same tokenizer, or the --code-map of the training.")
    return source.dataset(code_path, transform=found.apply if found else None, **source.chosen(WHOLE))


def require_told(told: Told, config: GPTConfig, about: GPTProvenance, what: str, model: str) -> None:
    """Raise UserError where captions have another shape or encoder than the GPT's; what, model: the two in messages."""
    seen = {name: (value, getattr(config, name)) for name, value in told.fields.items()}
    of_data = encoder_facts(told.encoder)
    seen |= {name: (of_data.get(name), value) for name, value in encoder_facts(about.encoder).items()}
    for name, (found, expected) in seen.items():
        if found != expected:
            raise UserError(f"{what} has captions of {name} {found} but {model} reads {name} {expected}: give features of the "
                            "encoder that it was trained with.")


@torch.no_grad()
def stream_nats(gpt: GPT, given: Given, codes: Tensor, coarse_of: Tensor | None) -> Tensor:
    """Sums over cells of the cross-entropy: labels [B] or captions, codes [B, C, N] -> [B, C'] nats of the predicted streams.

    coarse_of: the coarse label of every code [K] for CTF's second stage, None for other GPTs.  The second stage is scored
    among the members of each given cluster, so that its probabilities sum to one.
    """
    logits, targets = gpt(given, codes), gpt.paradigm.targets(codes)
    if coarse_of is not None:
        logits = [stream.masked_fill(coarse_of != codes[:, 0, :, None], -torch.inf) for stream in logits]
    return torch.stack([F.cross_entropy(stream.float().transpose(1, 2), target, reduction="none").sum(1)
                        for stream, target in zip(logits, targets.unbind(1), strict=True)], dim=1)


def evaluate(gpt: GPT, dataset: Any, batch_size: int, processes: Processes) -> dict[str, float]:
    """Figures over all images: nats_NAME per code of each stream, bits_per_image, images.

    dataset: one of `sources.py`; samples that are not valid do not count.  Every process makes as many passes of one shape, as
    sharded and compiled models need; images that are not left count none.
    """
    share, streams = -(-len(dataset) // processes.world_size), len(gpt.paradigm.outputs)
    batch_size = min(batch_size, share)
    coarse_of = torch.tensor(gpt.provenance.coarse_of, device=processes.device) if gpt.provenance.coarse_of else None
    sums = torch.zeros(streams + 1, dtype=torch.float64, device=processes.device)   # nats, images
    for first in followed(range(0, share, batch_size), "evaluate", "batches", processes):
        rows = np.arange(first, first + batch_size) * processes.world_size + processes.rank
        batch = dataset.__getitems__([(0, row) for row in rows.clip(max=len(dataset) - 1)])
        codes, given, *valid = (each(lambda part: part.to(processes.device), field) for field in batch)
        nats = stream_nats(gpt, given, codes, coarse_of).double()                  # [B, C']
        counted = torch.from_numpy(rows < len(dataset)).to(nats)[:, None]          # [B, 1]
        for flags in valid:
            counted = counted * flags[:, None]
        sums = sums + (torch.cat([nats, torch.ones_like(counted)], dim=1) * counted).sum(0)
    *totals, count = all_reduce_sum(sums, processes).tolist()
    figures = {f"nats_{name}": total / count / gpt.config.cells for name, total in zip(STREAMS[streams], totals, strict=True)}
    return figures | {"bits_per_image": sum(totals) / count / math.log(2), "images": int(count)}


def main() -> None:
    """Parse options, evaluate, print and write the figures."""
    config = parse(EvaluateConfig)
    processes = setup(config.device)
    set_up_logging(processes)
    if config.out is not None:
        check_writable(config.out.parent, "--out")
    gpt = load_gpt(config.gpt_ckpt, processes.device)
    model = f"--gpt-ckpt {config.gpt_ckpt}"
    held_out = open_held_out(gpt.config, gpt.provenance, model, config.code_path, config.code_map)
    figures = evaluate(gpt, held_out, config.batch_size, processes)
    figures["steps"] = gpt.provenance.step  # of its training; 0: imported
    if processes.is_main:
        for name, value in figures.items():
            print(f"{name:18} {value:.4f}")
        if config.out is not None:
            write_json(config.out, figures | {"command": command_line()})
    processes.close()


if __name__ == "__main__":
    run_main(main)
