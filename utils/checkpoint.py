"""Checkpoints: sharded save and resume while training, one safetensors file for everything after.

Training state goes through `torch.distributed.checkpoint`: every process writes its shards, and a run resumes on another number
of processes.  A checkpoint is a folder `step-00001000`, renamed when it is whole.  Sampling and evaluation read one
safetensors file, whose metadata carries the configuration: no shape flags are repeated.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from utils.config import UserError, flatten
from utils.distributed import Processes, full_tensor
from utils.files import replacing, require_same, write_json

log = logging.getLogger("checkpoint")


@dataclass(frozen=True)
class RunRecord:
    """What a checkpoint says about its run, beside its tensors."""

    kind: str                         # of the exported file: "gpt" or "tokenizer"
    model: dict[str, Any]             # what must be the same on resume
    defaults: dict[str, Any]          # of those fields; a checkpoint from before a field was added had its default
    options: dict[str, Any]           # resolved options of the command
    fixed: tuple[str, ...]            # names of the options that must not change on resume
    export: dict[str, Any] = field(default_factory=dict)  # what the exported file will say, where that is known


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], record: RunRecord, processes: Processes, keep: int) -> None:
    """Write `state`, nested dicts of plain values and of tensors, possibly sharded; the newest `keep` checkpoints stay."""
    target = folder / f"step-{step:08d}"
    aside = folder / f".writing-{target.name}"
    if processes.is_main:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    processes.barrier()
    # No collective in a single process: gloo would start threads of its own, which crowd the CPU and halve the speed of every
    # later step.
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        dcp.save(state, checkpoint_id=aside, no_dist=processes.world_size == 1)
    if processes.is_main:
        write_json(aside / "config.json", asdict(record))
        shutil.rmtree(target, ignore_errors=True)
        os.replace(aside, target)
        for old in sorted(folder.glob("step-*"))[:-keep]:
            shutil.rmtree(old)
    processes.barrier()


def latest_checkpoint(folder: Path) -> tuple[Path, int] | None:
    """The newest complete checkpoint below `folder` and its step, or None."""
    found = sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name))
    return (found[-1], int(found[-1].name[5:])) if found else None


def load_checkpoint(path: Path, state: dict[str, Any], record: RunRecord, processes: Processes) -> dict[str, Any]:
    """Fill `state` and return it; raises UserError naming the first difference of the model or of the fixed options."""
    saved = json.loads((path / "config.json").read_text())
    before, now = flatten(saved["options"]), flatten(record.options)
    fixed = {name: now[name] for name in record.fixed}
    # An option that was added after the checkpoint was written cannot differ.
    require_same(record.defaults | saved["model"] | {name: before.get(name, now[name]) for name in fixed}, record.model | fixed,
                 f"checkpoint {path} was made with", "choose another --run-dir or the options it was started with")
    for name in sorted(set(before) & set(now)):
        if before[name] != now[name]:
            log.warning("resuming with %s %s, which was %s before", name, now[name], before[name])
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        dcp.load(state, checkpoint_id=path, no_dist=processes.world_size == 1)
    return state


def export(path: Path, kind: str, tensors: dict[str, Tensor], config: dict, processes: Processes | None = None) -> None:
    """Write tensors (gathered if sharded) and their configuration as one safetensors file, aside and renamed.

    kind: "gpt", "tokenizer" or "classifier"; a loader of another kind refuses the file.
    """
    is_main, whole = processes is None or processes.is_main, {}
    for name, tensor in tensors.items():
        gathered = full_tensor(tensor.detach())  # every process takes part, one keeps the result
        if is_main:
            whole[name] = gathered.cpu().contiguous()
    if is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as aside:
            save_file(whole, aside, metadata={"kind": kind, "config": json.dumps(config)})
            umask = os.umask(0)
            os.umask(umask)
            aside.chmod(0o666 & ~umask)  # safetensors writes files that only their owner may read


def read_export(path: str | Path, kind: str, option: str, tensors: bool = True) -> tuple[dict, dict[str, Tensor]]:
    """Read (configuration, tensors) of an exported file; a run folder stands for the file in it.

    A training checkpoint `step-*` that holds its configuration can be read too; averaged weights are preferred.  tensors:
    False reads the configuration alone.  Raises UserError naming `option` when the file is missing, damaged, or of another kind.
    """
    path = Path(path)
    if (path / "config.json").is_file() and (path / ".metadata").is_file():
        return read_checkpoint(path, kind, option, tensors)
    if path.is_dir():
        path = path / f"{kind}.safetensors"
    if not path.is_file():
        raise UserError(f"{option} {path} does not exist: give the {kind}.safetensors that training exported.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("kind") != kind:
                raise UserError(f"{option} {path} holds a {metadata.get('kind', 'model of unknown kind')}, not a {kind}: "
                                f"give the {kind}.safetensors that training exported.")
            names = file.keys() if tensors else ()
            return json.loads(metadata["config"]), {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise UserError(f"{option} {path} is damaged or no safetensors file ({error}): export or copy it again.") from error


def exported_step(path: Path, kind: str) -> int:
    """The training step after which a run folder's file was exported; -1 where there is none."""
    exists = (path / f"{kind}.safetensors").exists()
    return read_export(path, kind, "--run-dir", tensors=False)[0].get("step", -1) if exists else -1


def read_checkpoint(path: Path, kind: str, option: str, tensors: bool) -> tuple[dict, dict[str, Tensor]]:
    """(configuration, weights) of a training checkpoint; raises UserError when it is of another kind."""
    saved = json.loads((path / "config.json").read_text())
    if not saved.get("export") or saved.get("kind", kind) != kind:
        raise UserError(f"{option} {path} is a training checkpoint, not a {kind}: give the {kind}.safetensors of its run.")
    if not tensors:
        return saved["export"], {}
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    part = "ema" if any(name.startswith("ema.") for name in stored) else "model"
    shapes = {name.removeprefix(f"{part}."): entry for name, entry in stored.items() if name.startswith(f"{part}.")}
    weights = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in shapes.items()
               if isinstance(entry, TensorStorageMetadata)}
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        dcp.load({part: weights}, checkpoint_id=path, no_dist=True)
    return saved["export"], weights


def load_weights(model: nn.Module, tensors: dict[str, Tensor], option: str) -> None:
    """Load tensors into a model of exactly their keys; raises UserError naming the first that does not fit."""
    require_tensors(model, tensors, option, "give a file that fits")
    model.load_state_dict(tensors)


def require_tensors(model: nn.Module, tensors: dict[str, Tensor], what: str, remedy: str,
                    called: Callable[[str], str | None] = str) -> None:
    """Raise UserError unless tensors have exactly the model's keys and shapes; called: a key's name in the message."""
    expected = model.state_dict()
    for name in sorted(set(expected) ^ set(tensors)):
        raise UserError(f"{what} {'lacks' if name in expected else 'has an unknown'} key {called(name)}: it is of another model, "
                        f"{remedy}.")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise UserError(f"{what} has {called(name)} of shape {tuple(tensor.shape)} but the model needs "
                            f"{tuple(expected[name].shape)}: it is of another size, {remedy}.")


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """A short hash of named tensors; codes and GPTs carry their tokenizer's."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(full_tensor(tensors[name].detach()).float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
