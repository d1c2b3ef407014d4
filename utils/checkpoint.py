"""Checkpoints: sharded save and resume while training, one safetensors file for everything after.

Training state goes through `torch.distributed.checkpoint`: every process writes its shards in the background, and a run resumes
on another number of processes.  A checkpoint is a folder `step-00001000`, renamed when it is whole.  Sampling and evaluation
read one safetensors file, whose metadata carries the configuration: no shape flags are repeated.
"""

import atexit
import hashlib
import json
import logging
import os
import re
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from utils.config import UserError, file_error, flag, flatten
from utils.distributed import Processes, full_tensor, lost_peer, patient_group
from utils.files import replacing, require_same, write_json
from utils.hub import local_file
from utils.untrusted import available_memory, check_checkpoint_files, parse_json, printable, read_fields, read_text, shortened

log = logging.getLogger("checkpoint")

# What a single process does without collectives is no cause for a warning, also not in the thread that writes.
warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)

Network = TypeVar("Network", bound=nn.Module)

EXPORT_VERSION = 1  # of exported files: raised when an older reader would misread them


@dataclass(frozen=True)
class RunRecord:
    """What a checkpoint says about its run, beside its tensors."""

    kind: str                         # of the exported file: "gpt" or "tokenizer"
    model: dict[str, Any]             # what must be the same on resume
    defaults: dict[str, Any]          # of those fields; a checkpoint from before a field was added had its default
    options: dict[str, Any]           # resolved options of the command
    fixed: tuple[str, ...]            # names of the options that must not change on resume
    export: dict[str, Any] = field(default_factory=dict)  # what the exported file will say, where that is known
    flags: dict[str, str] = field(default_factory=dict)   # options that decide fields of `model` of other names

    def saved(self) -> dict[str, Any]:
        """What is written; the flags are for messages alone."""
        return {name: value for name, value in asdict(self).items() if name != "flags"}

    def remedy(self, name: str) -> str:
        """What to do where `name` is another now than when the run was begun."""
        option = self.flags.get(name) or (flag(name) if name in flatten(self.options) else "the options")
        return f"choose another --run-dir, or give {option} as when this run was begun"


class CheckpointWriter:
    """Writes checkpoints while training goes on: `save` copies the state and returns, the files follow in the background."""

    def __init__(self, folder: Path, record: RunRecord, processes: Processes) -> None:
        self.folder, self.record, self.processes = folder, record, processes
        self.pending: tuple[Future, Path, int, dict[str, Any]] | None = None  # files, their folder, checkpoints to keep, metrics
        atexit.register(self._abandon)

    def save(self, step: int, state: dict[str, Any], keep: int, metrics: dict[str, Any]) -> None:
        """Begin to write `state`, nested dicts of plain values and of tensors, possibly sharded.

        keep: checkpoints that stay, this one included, once it is whole; 0: all.  metrics: plain values to find again.
        """
        self.finish()
        aside = self.folder / f".writing-step-{step:08d}"
        with self._explained():
            if self.processes.is_main:
                for left in self.folder.glob(".writing-step-*"):  # by a process that was killed
                    shutil.rmtree(left, ignore_errors=True)
                aside.mkdir(parents=True)
            self.processes.barrier()
            # No collective in a single process: gloo would start threads of its own, which crowd the CPU and halve the speed of
            # every later step.
            alone = self.processes.world_size == 1
            future = dcp.async_save(state, checkpoint_id=aside, async_stager=BlockingAsyncStager(), no_dist=alone,
                                    process_group=None if alone else patient_group("checkpoint"))
        assert isinstance(future, Future)
        self.pending = future, aside, keep, metrics

    def poll(self) -> None:
        """Give the checkpoint its name if its files are whole by now."""
        if self.pending and self.pending[0].done():
            self.finish()

    def finish(self) -> None:
        """Wait until the checkpoint is whole; raises UserError when it could not be written."""
        if self.pending is None:
            return
        future, aside, keep, metrics = self.pending
        self.pending = None
        with self._explained():
            future.result()  # in the main process only when all others have written their part
            if self.processes.is_main:
                write_json(aside / "config.json", self.record.saved() | {"metrics": metrics})
                target = self.folder / aside.name.removeprefix(".writing-")
                shutil.rmtree(target, ignore_errors=True)
                os.replace(aside, target)
                for old in sorted(self.folder.glob("step-*"))[:-keep] if keep else ():
                    shutil.rmtree(old)

    def _abandon(self) -> None:
        """When the process ends by another error: keep what became whole, leave nothing half written."""
        with suppress(UserError):
            self.finish()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what writing raises into one sentence, and remove what was written."""
        try:
            yield
        except (OSError, RuntimeError, CheckpointException) as error:
            if lost_peer(error):
                raise
            if self.processes.is_main:
                for left in self.folder.glob(".writing-step-*"):
                    shutil.rmtree(left, ignore_errors=True)
            raise UserError(f"a checkpoint cannot be written below {self.folder} ({_reason(error)}): make space or give another "
                            "--run-dir; the same command carries on from the checkpoint before.") from error


def _reason(error: BaseException) -> str:
    """What went wrong, in one line; of several processes the first that failed."""
    if isinstance(error, CheckpointException) and error.failures:
        error = min(error.failures.items())[1][0]
    error = file_error(error) or error
    text = getattr(error, "strerror", None) or " ".join(str(error).split())[:200] or type(error).__name__
    # A place in torch's source is all that comes from another process, where the cause stays.
    return "a file could not be written to its end" if "inline_container" in text else text


def latest_checkpoint(folder: Path) -> tuple[Path, int] | None:
    """The newest complete checkpoint below `folder` and its step, or None."""
    found = sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name))
    return (found[-1], int(found[-1].name[5:])) if found else None


def load_checkpoint(path: Path, state: dict[str, Any], record: RunRecord,
                    processes: Processes) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fill `state` and return it, with the metrics saved beside it.

    Raises UserError naming the first difference of the model or of the fixed options.
    """
    saved = read_record(path, "--run-dir")
    check_checkpoint_files(path, "--run-dir")
    before, now = flatten(saved["options"]), flatten(record.options)
    fixed = {name: now[name] for name in record.fixed}
    # An option that was added after the checkpoint was written cannot differ.
    require_same(record.defaults | saved["model"] | {name: before.get(name, now[name]) for name in fixed}, record.model | fixed,
                 f"checkpoint {path} was made with", record.remedy)
    for name in sorted(set(before) & set(now)):
        if before[name] != now[name]:
            log.warning("resuming with %s %s, which was %s before", name, now[name], before[name])
    try:
        dcp.load(state, checkpoint_id=path, no_dist=processes.world_size == 1)
    except (Exception, CheckpointException) as error:
        if lost_peer(error):
            raise
        raise UserError(f"checkpoint {path} does not fit this run ({shortened(_reason(error))}): remove it to go on from the one "
                        "before, or choose another --run-dir.") from error
    return state, saved.get("metrics", {})


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
        text = json.dumps(config)
        with replacing(path) as aside:
            try:
                save_file(whole, aside, metadata={"kind": kind, "version": str(EXPORT_VERSION), "config": text,
                                                  "crc32": checksum(whole, text)})
            except SafetensorError as error:
                raise UserError(f"{path} cannot be written ({_reason(error)}): make space or give another folder; the same "
                                "command then carries on.") from error
            umask = os.umask(0)
            os.umask(umask)
            aside.chmod(0o666 & ~umask)  # safetensors writes files that only their owner may read


def read_export(path: str | Path, kind: str, option: str, tensors: bool = True) -> tuple[dict, dict[str, Tensor]]:
    """Read (configuration, tensors) of an exported file; a run folder, or a repository of the hub, stands for the file in it.

    A training checkpoint `step-*` that holds its configuration can be read too; averaged weights are preferred.  tensors:
    False reads the configuration alone.  Raises UserError naming `option` when the file is missing, damaged, or of another kind.
    """
    path = local_file(path, option, f"{kind}.safetensors")
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
                seen = printable(metadata.get("kind", "model of unknown kind"))
                raise UserError(f"{option} {path} holds a {seen}, not a {kind}: give the {kind}.safetensors that training "
                                "exported.")
            description = require_description(metadata.get("config", ""), kind, f"{option} {path}", metadata.get("version", "1"))
            found = {name: file.get_tensor(name) for name in (file.keys() if tensors else ())}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{option} {path} is damaged or no safetensors file ({shortened(error)}): export or copy it "
                        "again.") from error
    if tensors and metadata.get("crc32", "") not in ("", checksum(found, metadata["config"])):
        raise UserError(f"{option} {path} is damaged (its content is not what its checksum says): export or copy it again.")
    return description, found


def require_description(text: str, kind: str, where: str, version: str = "1") -> dict[str, Any]:
    """What an exported file says about its model, from JSON; raises UserError when it cannot be that of a `kind`."""
    if not version.isdecimal() or int(version) > EXPORT_VERSION:
        raise UserError(f"{where} has version {printable(version)[:20]} but this code reads files up to {EXPORT_VERSION}: it was "
                        "written by a newer version of the code, update this one.")
    try:
        description = parse_json(text)
    except ValueError as error:
        raise UserError(f"{where} is damaged (no JSON describes it: {shortened(error)}): export or copy it again.") from error
    parts = {"model"} if kind in ("gpt", "tokenizer", "classifier") else set()
    if not isinstance(description, dict) or not all(
            isinstance(description.get(part, {}), dict) for part in ("model", "sampling", "figures", "imported")):
        raise UserError(f"{where} is damaged (its description is no object of objects): export or copy it again.")
    if parts - set(description):
        raise UserError(f"{where} does not describe its model: give a {kind}.safetensors that training exported.")
    return description


def checksum(tensors: dict[str, Tensor], text: str) -> str:
    """CRC-32 over a description, names and data of whole tensors, which tells a damaged copy from a sound one."""
    value = zlib.crc32(text.encode())
    for name in sorted(tensors):
        data = tensors[name].cpu().contiguous().reshape(-1).view(torch.uint8)
        value = zlib.crc32(data.numpy().data, zlib.crc32(name.encode(), value))
    return f"{value:08x}"


def exported_step(path: Path, kind: str) -> int:
    """The training step after which a run folder's file was exported; -1 where there is none."""
    exists = (path / f"{kind}.safetensors").exists()
    return read_export(path, kind, "--run-dir", tensors=False)[0].get("step", -1) if exists else -1


def read_record(path: Path, option: str) -> dict[str, Any]:
    """What a training checkpoint says about its run, as RunRecord wrote it; raises UserError when it is damaged."""
    try:
        saved = parse_json(read_text(path / "config.json"))
    except (OSError, ValueError) as error:
        raise UserError(f"{option} {path} has a damaged config.json ({shortened(error)}): copy the checkpoint again, or take an "
                        "older one.") from error
    if not isinstance(saved, dict) or not all(isinstance(saved.get(part), dict) for part in ("model", "options")):
        raise UserError(f"{option} {path} has a config.json that does not describe a run: copy the checkpoint again, or take an "
                        "older one.")
    return saved


def read_checkpoint(path: Path, kind: str, option: str, tensors: bool) -> tuple[dict, dict[str, Tensor]]:
    """(configuration, weights) of a training checkpoint; raises UserError when it is damaged or of another kind."""
    saved = read_record(path, option)
    if not saved.get("export") or saved.get("kind", kind) != kind:
        raise UserError(f"{option} {path} is a training checkpoint, not a {kind}: give the {kind}.safetensors of its run.")
    description = require_description(json.dumps(saved["export"]), kind, f"{option} {path}")
    if not tensors:
        return description, {}
    stored = check_checkpoint_files(path, option).state_dict_metadata
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}}
    for name, entry in stored.items():
        part, _, key = name.partition(".")
        averaged = part == "model" and f"ema.{key}" in stored  # parameters, where averaging is on; buffers have no average
        if part in parts and not averaged and isinstance(entry, TensorStorageMetadata):
            parts[part][key] = torch.empty(entry.size, dtype=entry.properties.dtype)
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            dcp.load({part: weights for part, weights in parts.items() if weights}, checkpoint_id=path, no_dist=True)
    except (Exception, CheckpointException) as error:  # torch raises half a dozen types for damaged parts
        raise UserError(f"{option} {path} has damaged parts ({shortened(error)}): copy the checkpoint again.") from error
    return description, parts["model"] | parts["ema"]


def restore(network: Callable[[Any], Network], config: type, values: Any, tensors: dict[str, Tensor], where: str) -> Network:
    """The model that a file describes, with the file's weights; raises UserError when they do not fit each other.

    values: what the file holds as fields of `config`.  The shape is tried without memory first: a description cannot ask for
    more than its weights fill.
    """
    fields = read_fields(config, values, where)
    for name, value in fields.items():
        loops = len(value) if isinstance(value, tuple) else value if re.search("layer|blocks", name) else 0
        if loops > len(tensors):
            raise UserError(f"{where} has {name} {str(value)[:60]} but only {len(tensors)} tensors: export or copy it again.")
    try:
        with torch.device("meta"):
            trial = network(config(**fields))
    except Exception as error:  # of torch or of the model: whatever an impossible shape raises
        raise UserError(f"{where} cannot be built: {shortened(error)}: export or copy it again.") from error
    require_tensors(trial, tensors, where, "give a file that fits")
    needed = sum(each.numel() * each.element_size() for each in (*trial.parameters(), *trial.buffers()))
    if needed > available_memory():
        raise UserError(f"{where} describes a model of {needed / 2**30:.0f} GiB, more than the free memory: give a smaller one.")
    model = network(config(**fields))
    model.load_state_dict(tensors)
    return model


def load_weights(model: nn.Module, tensors: dict[str, Tensor], option: str) -> None:
    """Load tensors into a model of exactly their keys; raises UserError naming the first that does not fit."""
    require_tensors(model, tensors, option, "give a file that fits")
    model.load_state_dict(tensors)


def require_tensors(model: nn.Module, tensors: dict[str, Tensor], what: str, remedy: str,
                    called: Callable[[str], str | None] = str) -> None:
    """Raise UserError unless tensors are finite and have exactly the model's keys and shapes; called: a key's name in it."""
    expected = model.state_dict()
    for name in sorted(set(expected) ^ set(tensors)):
        raise UserError(f"{what} {'lacks' if name in expected else 'has an unknown'} key {printable(called(name))}: it is of "
                        f"another model, {remedy}.")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise UserError(f"{what} has {called(name)} of shape {tuple(tensor.shape)} but the model needs "
                            f"{tuple(expected[name].shape)}: it is of another size, {remedy}.")
        if tensor.is_floating_point() != expected[name].is_floating_point():
            raise UserError(f"{what} has {called(name)} of type {tensor.dtype} but the model needs {expected[name].dtype}: "
                            f"it is of another model, {remedy}.")
        require_finite(str(called(name)), tensor, what)


def require_finite(name: str, tensor: Tensor, what: str) -> None:
    """Raise UserError where a file's tensor has numbers that are none; what: the file, as messages call it."""
    if not tensor.is_meta and not torch.isfinite(tensor).all():
        raise UserError(f"{what} has {printable(name)} with infinite or missing values: give a file from before the training "
                        "failed.")


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """A short hash of named tensors; codes and GPTs carry their tokenizer's."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(full_tensor(tensors[name].detach()).float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
