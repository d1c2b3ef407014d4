"""Containers of published weights: every form the releases use, read without executing anything.

Seen: a bare dict (FSDP's consolidated.pth), and dicts with the weights under "ema", "model", "module" or "state_dict", often
with a pickled argparse namespace under "args" and optimizer states beside them.
"""

import argparse
import os
import pathlib
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from utils.config import UserError
from utils.files import check_exists

CONTAINERS = ("ema", "model", "module", "state_dict")  # averaged weights first, as LlamaGen samples from them
WRAPPERS = ("module.", "_orig_mod.")                   # of DistributedDataParallel and torch.compile
HARMLESS = [argparse.Namespace, pathlib.PosixPath, pathlib.PurePosixPath]


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The weights in a published file, .pt, .pth, .bin or .safetensors.

    Raises UserError when the file is missing or damaged, holds objects that would have to be executed, or no weights.
    """
    check_exists(path, "SRC", "a published weights file")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"SRC {path} is damaged or no safetensors file ({error}): download it again.") from error
    try:
        with torch.serialization.safe_globals(HARMLESS):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"SRC {path} holds more than weights, or is no weights file, and was not opened "
                        f"({_reason(error)}): save its state dict alone, where you trust it.") from error
    except Exception as error:  # torch raises half a dozen types for a damaged file
        raise UserError(f"SRC {path} is damaged or no weights file ({_reason(error)}): download it again.") from error
    return unwrap(loaded, path)


def _reason(error: Exception) -> str:
    """The telling part of torch's many-line messages."""
    lines = str(error).splitlines() or [type(error).__name__]
    telling = [line for line in lines if "Unsupported" in line or "GLOBAL" in line] or lines
    return telling[0].strip().removeprefix("WeightsUnpickler error: ").rstrip(".")[:160]


def is_state_dict(value: Any) -> bool:
    """True for a non-empty mapping of names to tensors."""
    return isinstance(value, Mapping) and bool(value) and all(
        isinstance(key, str) and isinstance(item, Tensor) for key, item in value.items())


def unwrap(loaded: Any, path: Path) -> dict[str, Tensor]:
    """Find the state dict inside what a file held, and take wrappers' prefixes off its keys."""
    found = loaded
    if not is_state_dict(loaded):
        candidates = [loaded[name] for name in CONTAINERS if name in loaded] if isinstance(loaded, Mapping) else []
        found = next((candidate for candidate in candidates if is_state_dict(candidate)), None)
    if found is None:
        raise UserError(f"SRC {path} holds no weights: expected a state dict, or one under {', '.join(CONTAINERS)}.")
    for prefix in WRAPPERS * 2:
        if all(key.startswith(prefix) for key in found):
            found = {key.removeprefix(prefix): value for key, value in found.items()}
    return dict(found)


def write_state_dict(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write weights as LlamaGen publishes them, {"model": state dict}, aside and renamed."""
    aside = path.with_name(f".writing-{path.name}")
    torch.save({"model": tensors}, aside)
    os.replace(aside, path)
