"""Published weights: the containers they come in, and the translation of their keys to ours.

A table of keys lies beside the model whose layers it names (`released.py` in the model's folder).  Tables are total in both
directions: a key too many, too few or of another shape is an error that names it.

Containers seen: a bare dict (FSDP's consolidated.pth), and dicts with the weights under "ema", "model", "module" or
"state_dict", often with a pickled argparse namespace under "args" and optimizer states beside them.  They are read without
executing anything.
"""

import argparse
import pathlib
import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from utils.checkpoint import require_tensors
from utils.config import UserError
from utils.files import replacing
from utils.hub import published_file
from utils.untrusted import printable

CONTAINERS = ("ema", "model", "module", "state_dict")  # averaged weights first, as LlamaGen samples from them
WRAPPERS = ("module.", "_orig_mod.")                   # of DistributedDataParallel and torch.compile
USAGE_LENGTH = 65_536  # of a usage buffer, which holds the codes of recent batches, not weights

# (published key, our key); each {} stands for one number, the same on both sides.
Table = list[tuple[str, str]]


@dataclass(frozen=True)
class Kind:
    """One family of published files: the model that they fill, their keys, and what a file cannot say."""

    model: str                                 # "gpt" or "tokenizer", as our exported files name it
    network: Callable[[Any], nn.Module]        # of a configuration
    config: type                               # its dataclass
    shape: Callable[[dict[str, Tensor], str], dict[str, Any]]  # (tensors, name of the file) -> the fields that tensors tell
    table: Table
    fixed: dict[str, Any] = field(default_factory=dict)        # fields that are the same for all files of the kind
    usage_buffers: tuple[str, ...] = ()


def affine(released: str, ours: str | None = None) -> Table:
    """Keys of a layer's weight and bias."""
    return [(f"{released}.{name}", f"{ours or released}.{name}") for name in ("weight", "bias")]


def translator(table: Table) -> Callable[[str], str | None]:
    """A function from the first naming of a table to the second; None for a name that the table does not know."""
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
            raise UserError(f"{what} has the key {printable(key)}, which files of this KIND do not have: give the KIND of the "
                            "file.")
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


def count(keys: Iterable[str], pattern: str) -> int:
    """How many different numbers the group of `pattern` matches; a gap among them is found later as a missing key."""
    return len({match[1] for key in keys if (match := re.match(pattern, key))})


def require(tensors: dict[str, Tensor], key: str, what: str, dimensions: int) -> Tensor:
    """A tensor whose shape tells the model's; raises UserError where it is missing or has other dimensions."""
    if key not in tensors:
        raise UserError(f"{what} lacks the key {key}: give a file of this KIND.")
    if tensors[key].ndim != dimensions:
        raise UserError(f"{what} has {key} of shape {tuple(tensors[key].shape)} but it should have {dimensions} dimensions: "
                        "give a file of this KIND.")
    return tensors[key]


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The weights in a published file, .pt, .pth, .bin or .safetensors.

    Raises UserError when the file is missing or damaged, holds objects that would have to be executed, or no weights.
    """
    path = published_file(path, "SRC", "a published weights file")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"SRC {path} is damaged or no safetensors file ({error}): download it again.") from error
    try:
        with torch.serialization.safe_globals([argparse.Namespace, pathlib.PosixPath, pathlib.PurePosixPath]):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"SRC {path} holds more than weights, or is no weights file, and was not opened "
                        f"({_reason(error)}): save its state dict alone, where you trust it.") from error
    except Exception as error:  # torch raises half a dozen types for a damaged file
        raise UserError(f"SRC {path} is damaged or no weights file ({_reason(error)}): download it again.") from error
    return unwrap(loaded, path)


def _reason(error: Exception) -> str:
    """The informative part of torch's many-line messages."""
    lines = str(error).splitlines() or [type(error).__name__]
    found = [line for line in lines if "Unsupported" in line or "GLOBAL" in line] or lines
    return found[0].strip().removeprefix("WeightsUnpickler error: ").rstrip(".")[:160]


def is_state_dict(value: Any) -> bool:
    """True for a non-empty mapping of names to tensors."""
    return isinstance(value, Mapping) and bool(value) and all(
        isinstance(key, str) and isinstance(item, Tensor) for key, item in value.items())


def unwrap(loaded: Any, path: Path) -> dict[str, Tensor]:
    """Find the state dict in what a file held, and remove wrappers' prefixes from its keys."""
    candidates = [loaded, *(loaded[name] for name in CONTAINERS if name in loaded)] if isinstance(loaded, Mapping) else []
    found = next((candidate for candidate in candidates if is_state_dict(candidate)), None)
    if found is None:
        raise UserError(f"SRC {path} holds no weights: give a file with a state dict, or one under {', '.join(CONTAINERS)}.")
    for prefix in WRAPPERS * 2:
        if all(key.startswith(prefix) for key in found):
            found = {key.removeprefix(prefix): value for key, value in found.items()}
    return dict(found)


def write_state_dict(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write weights as LlamaGen publishes them, {"model": state dict}."""
    with replacing(path) as aside, aside.open("wb") as file:
        torch.save({"model": tensors}, file)
