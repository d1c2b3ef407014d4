"""Weights of the published LlamaGen, IAR and IAR2 checkpoints: import into our files, export to the published names.

    python -m utils.released_weights KIND SRC DST            import a published file
    python -m utils.released_weights KIND SRC DST --export   the other way

KIND: llamagen-vq, llamagen-gpt, iar-vq (LlamaGen's tokenizer with IAR's reordered codebook), iar2-vq, iar2-gpt.  Keys are
mapped by the tables below, total in both directions: a key too many, too few or of another shape is an error that names
it.  Shapes are read from the file; where it cannot tell (heads, grid) they come from --gpt-model and --image-size, or
from --model-args.

What the published code computes otherwise than the paper becomes configuration of the imported checkpoint: IAR2's rotary
rows (`rotary="repeated"`, `head_rotary="zero_summary"`) and, as defaults of the samplers, its guidance formula with the
range of table 12; for LlamaGen constant guidance on all steps.  The class token's zero rotary row and the compression of
a zero vector at borders are the same in all our models.
"""

import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor, nn

from autoregressive.models.generate import sampling_preset
from autoregressive.models.gpt import GPT, GPT_models
from autoregressive.models.transformer import GPTConfig
from tokenizer.tokenizer_image.vq_model import VQConfig, VQModel
from utils.checkpoint import export, fingerprint, read_export, require_tensors
from utils.config import UserError, from_dict, parse, run_main, to_dict
from utils.files import check_writable
from utils.released_files import read_state_dict, write_state_dict

log = logging.getLogger("released_weights")

Table = list[tuple[str, str]]
"""(published key, our key); each {} stands for one number, the same on both sides."""

BLOCK = ("attention.wqkv.weight", "attention.wo.weight", "feed_forward.w1.weight", "feed_forward.w2.weight",
         "feed_forward.w3.weight", "attention_norm.weight", "ffn_norm.weight")


def blocks(released: str, ours: str) -> Table:
    """Keys of a stack of transformer layers."""
    return [(f"{released}.{{}}.{name}", f"{ours}.{{}}.{name}") for name in BLOCK]


def affine(released: str, ours: str | None = None) -> Table:
    """Weight and bias."""
    return [(f"{released}.{name}", f"{ours or released}.{name}") for name in ("weight", "bias")]


def half_biased(released: str, ours: str) -> Table:
    """A two-layer MLP whose second layer has no bias."""
    return [*affine(f"{released}.0", f"{ours}.0"), (f"{released}.2.weight", f"{ours}.2.weight")]


TRUNK: Table = [("cls_embedding.embedding_table.weight", "cls_embedding.weight"), *blocks("layers", "layers"),
                ("norm.weight", "paradigm.norm.weight")]
LLAMAGEN_GPT: Table = [*TRUNK, ("tok_embeddings.weight", "paradigm.embeddings.0.weight"),
                       ("output.weight", "paradigm.outputs.0.weight")]
IAR2_GPT: Table = [
    *TRUNK, *blocks("factorized_blocks", "paradigm.head.layers"),
    ("tok_embeddings1.weight", "paradigm.embeddings.0.weight"),
    ("tok_embeddings2.weight", "paradigm.embeddings.1.weight"),
    *affine("aggregation_layer.0", "paradigm.fusion.0"), *affine("aggregation_layer.2", "paradigm.fusion.2"),
    *half_biased("mlp1", "paradigm.head.context.compress"), *half_biased("mlp2", "paradigm.head.context.expand"),
    *half_biased("output1", "paradigm.outputs.0"), *half_biased("output2", "paradigm.outputs.1"),
]


def autoencoder(side: str, resample: str) -> Table:
    """Keys of the encoder or the decoder."""
    residual, attention = ("norm1", "conv1", "norm2", "conv2"), ("norm", "q", "k", "v", "proj_out")
    released, ours = f"{side}.conv_blocks.{{}}", f"{side}.stages.{{}}"
    names = [(name, name) for name in (f"{side}.conv_in", f"{side}.norm_out", f"{side}.conv_out",
                                       *(f"{side}.mid.{{}}.{part}" for part in residual + attention))]
    names += [(f"{released}.res.{{}}.{part}", f"{ours}.res.{{}}.{part}") for part in residual]
    names += [(f"{released}.res.{{}}.nin_shortcut", f"{ours}.res.{{}}.shortcut")]
    names += [(f"{released}.attn.{{}}.{part}", f"{ours}.attn.{{}}.{part}") for part in attention]
    names += [(f"{released}.{resample}.conv", f"{ours}.resample.conv")]
    return [pair for name in names for pair in affine(*name)]


LLAMAGEN_VQ: Table = [*autoencoder("encoder", "downsample"), *autoencoder("decoder", "upsample"), *affine("quant_conv"),
                      *affine("post_quant_conv"), ("quantize.embedding.weight", "quantizer.codebooks.0")]
IAR2_VQ: Table = [*LLAMAGEN_VQ, ("quantize.embedding_second", "quantizer.codebooks.1")]

USAGE_LENGTH = 65_536  # of the usage buffers, which hold the codes of recent batches and no weights


@dataclass(frozen=True)
class Kind:
    """One family of published files: its keys, the model they fill, and what the file cannot say about it."""

    model: Literal["gpt", "tokenizer"]
    table: Table
    fixed: dict[str, Any] = field(default_factory=dict)
    usage_buffers: tuple[str, ...] = ()


KINDS: dict[str, Kind] = {
    "llamagen-vq": Kind("tokenizer", LLAMAGEN_VQ, {"quantizer": "single"}, ("quantize.codebook_used",)),
    "llamagen-gpt": Kind("gpt", LLAMAGEN_GPT, {"paradigm": "single"}),
    "iar-vq": Kind("tokenizer", LLAMAGEN_VQ, {"quantizer": "single"}, ("quantize.codebook_used",)),
    "iar2-vq": Kind("tokenizer", IAR2_VQ, {"quantizer": "dual"}, ("quantize.codebook_used", "quantize.codebook_used2")),
    "iar2-gpt": Kind("gpt", IAR2_GPT, {"paradigm": "hierarchical", "rotary": "repeated", "head_rotary": "zero_summary"}),
}


def translator(table: Table) -> Callable[[str], str | None]:
    """A function from one naming to the other, None for a name the table does not know."""
    rules = [(re.compile(re.escape(source).replace(r"\{\}", r"(\d+)")), target) for source, target in table]

    def translate(key: str) -> str | None:
        for pattern, target in rules:
            if match := pattern.fullmatch(key):
                return target.format(*match.groups())
        return None

    return translate


def rename(tensors: dict[str, Tensor], table: Table, what: str) -> dict[str, Tensor]:
    """Translate all keys; raises UserError naming the first that the table does not know."""
    translate, renamed = translator(table), {}
    for key, tensor in tensors.items():
        name = translate(key)
        if name is None:
            raise UserError(f"{what} has the key {key}, which such a file does not have: name the KIND it is of.")
        renamed[name] = tensor
    return renamed


def reverse(table: Table) -> Table:
    """The table from our keys to the published ones."""
    return [(ours, released) for released, ours in table]


def to_ours(kind: Kind, released: dict[str, Tensor], model: nn.Module, what: str) -> dict[str, Tensor]:
    """Published tensors under our names, float32; raises UserError naming the first key that does not fit `model`."""
    weights = {key: tensor for key, tensor in released.items() if key not in kind.usage_buffers}
    renamed, published = rename(weights, kind.table, what), translator(reverse(kind.table))
    require_tensors(model, renamed, what, "choose KIND, --gpt-model or --model-args that fit the file", published)
    return {name: tensor.float() for name, tensor in renamed.items()}


def to_released(kind: Kind, ours: dict[str, Tensor], what: str) -> dict[str, Tensor]:
    """Our tensors under the published names, with empty usage buffers, as the published code loads them strictly."""
    buffers = {name: torch.zeros(USAGE_LENGTH) for name in kind.usage_buffers}
    return rename(ours, reverse(kind.table), what) | buffers


def count(keys: Any, pattern: str) -> int:
    """How many numbers `pattern`'s group takes among the keys; gaps show later, as keys that are missing."""
    return len({match[1] for key in keys if (match := re.match(pattern, key))})


def require(tensors: dict[str, Tensor], key: str, what: str, dimensions: int) -> Tensor:
    """A tensor that the shape is read from; raises UserError where it is missing or of other dimensions."""
    if key not in tensors:
        raise UserError(f"{what} lacks the key {key}: it is no file of this KIND.")
    if tensors[key].ndim != dimensions:
        raise UserError(f"{what} has {key} of shape {tuple(tensors[key].shape)} but it should have {dimensions} dimensions: "
                        "it is no file of this KIND.")
    return tensors[key]


def tokenizer_shape(tensors: dict[str, Tensor], what: str) -> dict[str, Any]:
    """VQConfig fields that the published tensors tell."""
    channels = require(tensors, "encoder.conv_in.weight", what, 4).shape[0]
    multipliers = {}
    for side in ("encoder", "decoder"):
        first = "{}.conv_blocks.{}.res.0.conv1.weight"
        levels = range(count(tensors, rf"{side}\.conv_blocks\.(\d+)\."))
        multipliers[side] = [require(tensors, first.format(side, b), what, 4).shape[0] // channels for b in levels]
    books = [require(tensors, name, what, 2) for name in ("quantize.embedding.weight", "quantize.embedding_second")
             if name in tensors or name.endswith(".weight")]
    return {"channels": channels, "encoder_multipliers": multipliers["encoder"],
            "decoder_multipliers": multipliers["decoder"][::-1],  # the decoder begins at the deepest level
            "latent_channels": require(tensors, "encoder.conv_out.weight", what, 4).shape[0],
            "residual_blocks": count(tensors, r"encoder\.conv_blocks\.0\.res\.(\d+)\."),
            "code_dim": books[0].shape[1], "codebook_sizes": [len(book) for book in books]}


def gpt_shape(tensors: dict[str, Tensor], what: str) -> dict[str, Any]:
    """GPTConfig fields that the published tensors tell; heads and grid are not among them."""
    classes, dim = require(tensors, "cls_embedding.embedding_table.weight", what, 2).shape
    tables = [require(tensors, key, what, 2) for key in ("tok_embeddings.weight", "tok_embeddings1.weight",
                                                         "tok_embeddings2.weight") if key in tensors]
    return {"dim": dim, "num_classes": classes - 1, "n_layer": count(tensors, r"layers\.(\d+)\."),
            "codebook_sizes": [len(table) for table in tables]} | (
                {"head_layers": heads} if (heads := count(tensors, r"factorized_blocks\.(\d+)\.")) else {})


@dataclass
class ReleasedConfig:
    """Options of import and export."""

    kind: tyro.conf.Positional[Literal["llamagen-vq", "llamagen-gpt", "iar-vq", "iar2-vq", "iar2-gpt"]]
    """What SRC (or, with --export, DST) is."""
    src: tyro.conf.Positional[Path]
    """File to read; with --export one of ours, or its run folder."""
    dst: tyro.conf.Positional[Path]
    """File to write, or a folder for gpt.safetensors or tokenizer.safetensors (with --export KIND.pt)."""
    export: bool = False
    """From our checkpoint to the published key names."""
    gpt_model: str = ""
    """Size of a GPT; empty: the size of the table that fits the file's width and depth."""
    image_size: int = 256
    """Side of the images a GPT was trained on, which its file does not tell; 384 for 24x24 cells."""
    model_args: str = ""
    """JSON of GPTConfig's (or VQConfig's) fields, for a shape outside the tables."""


def parse_model_args(text: str) -> dict[str, Any]:
    """The fields named by --model-args; raises UserError when it is no JSON object."""
    try:
        fields = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise UserError(f"--model-args {text!r} is no JSON ({error}): give an object such as '{{\"n_head\": 8}}'.") from error
    if not isinstance(fields, dict):
        raise UserError(f"--model-args {text!r} is no JSON object: give one such as '{{\"n_head\": 8}}'.")
    return fields


def gpt_size(config: ReleasedConfig, seen: dict[str, Any], what: str) -> str:
    """The size of the table that fits the file, or "" where --model-args says all; raises UserError when none does."""
    if config.gpt_model:
        if config.gpt_model not in GPT_models:
            raise UserError(f"--gpt-model {config.gpt_model} is unknown: choose one of {', '.join(GPT_models)}.")
        row = GPT_models[config.gpt_model]
        if (row["dim"], row["n_layer"]) != (seen["dim"], seen["n_layer"]):
            raise UserError(f"--gpt-model {config.gpt_model} has width {row['dim']} and {row['n_layer']} layers but {what} has "
                            f"width {seen['dim']} and {seen['n_layer']} layers: name the size of the file.")
        return config.gpt_model
    fitting = [name for name, row in GPT_models.items() if (row["dim"], row["n_layer"]) == (seen["dim"], seen["n_layer"])]
    if not fitting and "n_head" not in parse_model_args(config.model_args):
        raise UserError(f"{what} has width {seen['dim']} and {seen['n_layer']} layers, which is no size of the table: say "
                        "how many heads it has, --model-args '{\"n_head\": ..., \"grid_size\": ...}'.")
    return fitting[0] if fitting else ""


def describe_gpt(kind: Kind, config: ReleasedConfig, tensors: dict[str, Tensor], what: str) -> dict[str, Any]:
    """The description that our GPT file will carry."""
    seen = gpt_shape(tensors, what)
    name = gpt_size(config, seen, what)
    if config.image_size % 16:
        raise UserError(f"--image-size {config.image_size} is not a multiple of 16, the tokenizers' downsampling.")
    fields = GPT_models.get(name, {}) | {"grid_size": config.image_size // 16} | seen | kind.fixed
    model = to_dict(from_dict(GPTConfig, fields | parse_model_args(config.model_args)))
    build(kind, model)
    streams = len(model["codebook_sizes"])
    preset = sampling_preset(name, streams, model["grid_size"]) or sampling_preset("GPT-B", streams, 16)
    log.info("samplers will guide with %s unless told otherwise", preset)
    return {"model": model, "gpt_model": name, "tokenizer": "", "image_size": 16 * model["grid_size"], "sampling": preset}


def describe_tokenizer(kind: Kind, config: ReleasedConfig, tensors: dict[str, Tensor], what: str) -> dict[str, Any]:
    """The description that our tokenizer file will carry, without the fingerprint."""
    fields = tokenizer_shape(tensors, what) | kind.fixed | parse_model_args(config.model_args)
    return {"model": to_dict(from_dict(VQConfig, fields)), "stage": fields["quantizer"]}


def build(kind: Kind, model: dict[str, Any]) -> nn.Module:
    """The model of a description, without memory for its weights; raises UserError for an impossible shape."""
    if kind.model == "gpt" and (model["dim"] % model["n_head"] or model["dim"] // model["n_head"] % 4):
        raise UserError(f"n_head {model['n_head']} does not divide width {model['dim']} into heads of a multiple of 4: correct "
                        "--model-args.")
    try:
        with torch.device("meta"):
            return GPT(from_dict(GPTConfig, model)) if kind.model == "gpt" else VQModel(from_dict(VQConfig, model))
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
    for name, value in kind.fixed.items():
        if description["model"][name] != value:
            message = f"{what} has {name} {description['model'][name]} but {config.kind} computes with {value}"
            if name in ("paradigm", "quantizer"):
                raise UserError(f"{message}: name the KIND it is of.")
            log.warning("%s: the published code will give OTHER LOGITS with these weights", message)
    released = to_released(kind, tensors, what)
    # Read back as the published shape: a variant of ours that the published code does not have is noticed here.
    describe = gpt_shape if kind.model == "gpt" else tokenizer_shape
    kept = {name: description["model"][name] for name in ("n_head", "grid_size") if name in description["model"]}
    fields = describe(released, what) | kind.fixed | kept
    to_ours(kind, released, build(kind, to_dict(from_dict(GPTConfig if kind.model == "gpt" else VQConfig, fields))), what)
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
