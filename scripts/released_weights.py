"""Weights of the published LlamaGen, IAR and IAR2 checkpoints: import into our files, export to the published names.

    python scripts/released_weights.py KIND SRC DST            import a published file
    python scripts/released_weights.py KIND SRC DST --export   the other way

Keys are mapped by the tables beside the models (`released.py`).  Shapes are read from the file; what it cannot tell (heads,
grid) comes from --gpt-model and --image-size, or from --model-args.  The imported GPT carries the guidance that its
publication samples with, as the samplers' default: for IAR2 the released formula with table 12's range, for LlamaGen
constant guidance on all steps, from captions with its scale of 7.5 and the 1,000 likeliest codes.
"""

import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started by its path

import torch
import tyro
from torch import Tensor, nn

from autoregressive.models.gpt import GPT_models
from autoregressive.models.guidance import sampling_preset
from autoregressive.models.released import GPT_KINDS
from tokenizer.tokenizer_image.released import TOKENIZER_KINDS
from utils.checkpoint import export, fingerprint, read_export
from utils.config import Positive, UserError, choices, from_dict, parse, require_multiple, run_main, to_dict
from utils.files import check_writable
from utils.released import Kind, read_state_dict, to_ours, to_released, write_state_dict

log = logging.getLogger("released_weights")

KINDS = TOKENIZER_KINDS | GPT_KINDS
DOWNSAMPLING = 16  # of the published tokenizers
ENCODER = "google/flan-t5-xl"  # of LlamaGen's captions


@dataclass
class ReleasedConfig:
    """Options of import and export."""

    kind: tyro.conf.Positional[Annotated[str, choices(KINDS)]]
    """What SRC (or, with --export, DST) is."""
    src: tyro.conf.Positional[Path]
    """File to read; with --export one of ours, or its run folder."""
    dst: tyro.conf.Positional[Path]
    """File to write, or a folder for gpt.safetensors or tokenizer.safetensors (with --export KIND.pt)."""
    export: bool = False
    """From our checkpoint to the published key names."""
    gpt_model: Annotated[str, choices(GPT_models)] | None = None
    """Size of a GPT; None: the size of the table that fits the file's width and depth."""
    image_size: Positive = 256
    """Side of the images a GPT was trained on, which its file does not tell; 384 for 24x24 cells."""
    model_args: str = ""
    """JSON of GPTConfig's (or VQConfig's) fields, for a shape outside the tables."""


def parse_model_args(text: str) -> dict[str, Any]:
    """The fields named by --model-args; raises UserError when it is no JSON object."""
    try:
        fields = json.loads(text or "{}")
    except json.JSONDecodeError:
        fields = None
    if not isinstance(fields, dict):
        raise UserError(f"--model-args {text!r} is no JSON object: give one such as '{{\"n_head\": 8}}'.")
    return fields


def gpt_size(config: ReleasedConfig, seen: dict[str, Any], what: str) -> str:
    """The size of the table that fits the file, or "" where --model-args says all; raises UserError when none does."""
    fitting = [name for name, row in GPT_models.items() if (row["dim"], row["n_layer"]) == (seen["dim"], seen["n_layer"])]
    found = f"{what} has width {seen['dim']} and {seen['n_layer']} layers"
    if config.gpt_model and config.gpt_model not in fitting:
        row = GPT_models[config.gpt_model]
        raise UserError(f"--gpt-model {config.gpt_model} has width {row['dim']} and {row['n_layer']} layers but {found}: name "
                        "the size of the file.")
    if not fitting and "n_head" not in parse_model_args(config.model_args):
        raise UserError(f"{found}, which is no size of the table: say how many heads it has, --model-args "
                        "'{\"n_head\": ..., \"grid_size\": ...}'.")
    return config.gpt_model or (fitting[0] if fitting else "")


def describe_gpt(kind: Kind, config: ReleasedConfig, tensors: dict[str, Tensor], what: str) -> dict[str, Any]:
    """The description that our GPT file will carry."""
    seen = kind.shape(tensors, what)
    name = gpt_size(config, seen, what)
    require_multiple("--image-size", config.image_size, DOWNSAMPLING, "the tokenizers' downsampling")
    fields = GPT_models.get(name, {}) | {"grid_size": config.image_size // DOWNSAMPLING} | seen | kind.fixed
    model = to_dict(from_dict(kind.config, fields | parse_model_args(config.model_args)))
    build(kind, model)
    streams = len(model["codebook_sizes"])
    preset = sampling_preset(name or "GPT-B", streams, model["grid_size"], "released", model["condition"])
    log.info("samplers will guide with %s unless told otherwise", preset)
    return {"model": model, "gpt_model": name, "tokenizer": "", "image_size": DOWNSAMPLING * model["grid_size"],
            "sampling": preset, "encoder": ENCODER if model["condition"] == "text" else ""}


def describe_tokenizer(kind: Kind, config: ReleasedConfig, tensors: dict[str, Tensor], what: str) -> dict[str, Any]:
    """The description that our tokenizer file will carry, without the fingerprint."""
    fields = kind.shape(tensors, what) | kind.fixed | parse_model_args(config.model_args)
    return {"model": to_dict(from_dict(kind.config, fields)), "stage": fields["quantizer"]}


def build(kind: Kind, model: dict[str, Any]) -> nn.Module:
    """The model of a description, without memory for its weights; raises UserError for an impossible shape."""
    if kind.model == "gpt" and (model["dim"] % model["n_head"] or model["dim"] // model["n_head"] % 4):
        raise UserError(f"n_head {model['n_head']} does not divide width {model['dim']} into heads of a multiple of 4: correct "
                        "--model-args.")
    try:
        with torch.device("meta"):
            return kind.network(from_dict(kind.config, model))
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError, LookupError, AttributeError) as error:
        raise UserError(f"no {kind.model} has the shape {model} ({error!r}): correct --model-args.") from error


def import_weights(config: ReleasedConfig) -> Path:
    """Published file -> ours; returns the file written."""
    kind, what = KINDS[config.kind], f"SRC {config.src}"
    released = read_state_dict(config.src)
    describe = describe_gpt if kind.model == "gpt" else describe_tokenizer
    description = describe(kind, config, released, what) | {"imported": {"kind": config.kind, "file": config.src.name}}
    tensors = to_ours(kind, released, build(kind, description["model"]), what)
    if kind.model == "tokenizer":
        description["fingerprint"] = fingerprint(tensors)
    path = config.dst if config.dst.suffix == ".safetensors" else config.dst / f"{kind.model}.safetensors"
    check_writable(path.parent, "DST")
    export(path, kind.model, tensors, description)
    return path


def export_weights(config: ReleasedConfig) -> Path:
    """Our file -> the published key names; returns the file written."""
    kind, what = KINDS[config.kind], f"SRC {config.src}"
    description, tensors = read_export(config.src, kind.model, "SRC")
    defaults = to_dict(kind.config())  # what an older file lacks
    for name, value in kind.fixed.items():
        if (seen := description["model"].get(name, defaults[name])) != value:
            message = f"{what} has {name} {seen} but {config.kind} computes with {value}"
            if name in ("paradigm", "quantizer", "condition"):
                raise UserError(f"{message}: give the KIND of the file.")
            log.warning("%s: the published code will give OTHER LOGITS with these weights", message)
    released = to_released(kind, tensors, what)
    # Read back as the published shape: a variant of ours that the published code does not have is noticed here.
    kept = {name: description["model"][name] for name in ("n_head", "grid_size") if name in description["model"]}
    fields = kind.shape(released, what) | kind.fixed | kept
    to_ours(kind, released, build(kind, to_dict(from_dict(kind.config, fields))), what)
    path = config.dst / f"{config.kind}.pt" if config.dst.is_dir() else config.dst
    check_writable(path.parent, "DST")
    write_state_dict(path, released)
    return path


def main() -> None:
    """Parse options, import or export."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = parse(ReleasedConfig)
    print(f"wrote {export_weights(config) if config.export else import_weights(config)}")


if __name__ == "__main__":
    run_main(main)
