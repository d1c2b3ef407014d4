"""A training run: resume, checkpoints, log, TensorBoard, averaged metrics.  The training loop itself stays in the script.

The folder holds `log.txt`, `options.json`, `metrics.jsonl` (one line per logged step), `tensorboard/`, `checkpoints/step-*`
and the exported model.  Everything random in step n comes from (seed, n, rank), so a resumed run repeats an uninterrupted one
without saving generator states.
"""

import json
import logging
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from utils.batches import StepPlan
from utils.checkpoint import CheckpointWriter, RunRecord, exported_step, latest_checkpoint, load_checkpoint
from utils.config import Count, Device, NonNegative, Positive, Seed, UserError, when_refused
from utils.distributed import Processes, agree, all_reduce_sum
from utils.files import PROBE, check_writable, lock_folder, naming, unlinked, write_json, write_text
from utils.logs import progress, set_up_logging
from utils.pictures import save_picture
from utils.signals import StopRequest, handled_by
from utils.train_state import TrainState
from utils.untrusted import parse_json, printable, read_text, shortened

log = logging.getLogger("run")

_BAD_ROW = 10  # steps without finite gradients after which a run ends


@dataclass
class RunOptions:
    """Where a run lives and how often it logs and saves."""

    run_dir: Path = Path()
    """Folder of the run, where the same command resumes it; left out: a folder below runs/ named after the model."""
    seed: Seed = 0
    """Seed of initialisation, data order and augmentation."""
    device: Device = "auto"
    """auto: CUDA where there is any."""
    log_every: Positive = 100
    """Steps between logged averages."""
    checkpoint_every: Count = 5000
    """Steps between checkpoints; 0: none by steps."""
    checkpoint_minutes: NonNegative = 20.0
    """Minutes after which a checkpoint is written between them; 0: none by time."""
    keep_checkpoints: Positive = 2
    """Checkpoints kept; older ones are removed."""
    keep_every: NonNegative = 0.0
    """Epochs between models that are exported for good, to snapshots/epoch-0050 and so on; 0: none."""


def figures_text(figures: Mapping[str, float | None]) -> str:
    """Figures in one line of the log; those that are missing are left out."""
    return "  ".join(f"{name} {value:.4g}" for name, value in figures.items() if value is not None)


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl that are whole, in their order; raises UserError for what is no such log."""
    try:
        lines = read_text(file).splitlines()
        found = [parse_json(line) for line in lines if line.startswith("{") and line.endswith("}")]
    except (OSError, ValueError) as error:
        raise UserError(f"{printable(file)} is no log of a training ({shortened(error)}): remove it, or give another "
                        "run.") from error
    return [line for line in found if type(line.get("step")) is int]


def first_line(name: str, images: int, of: str, parameters: int, plan: StepPlan, processes: Processes, spread: str = "") -> str:
    """What a training says of itself first.

    of: what the images are asked for by; spread: how the model is spread over processes, where there is a choice.
    """
    device = processes.device.type if processes.device.type == "cpu" else torch.cuda.get_device_name(processes.device)
    count = "1 process" if processes.world_size == 1 else f"{processes.world_size} processes"
    steps = f"{plan.total_steps} steps of {plan.global_batch} images ({plan.total_steps / plan.steps_per_epoch:.3g} epochs)"
    where = f"{count} ({spread}) on {device}" if spread else f"{count} on {device}"
    return f"{name}: {images} images of {of}, {parameters / 1e6:.1f}M parameters, {steps}, {where}"


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of everything random in one step of one process."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])


@dataclass(frozen=True)
class Work:
    """What training on one image means: tokens (codes), flops of forward and backward pass, and what all devices can do."""

    tokens: int
    flops: float
    peak: float | None  # flops a second of all devices together; None where unknown

    def rates(self, images_per_second: float) -> dict[str, float]:
        """Figures for the log: tokens a second, and the fraction of the devices' products that the model uses (MFU)."""
        mfu = {"mfu": self.flops * images_per_second / self.peak} if self.peak else {}
        return {"tokens_per_second": self.tokens * images_per_second} | mfu


class MeanMetrics:
    """Running means kept on the device and read once every `log_every` steps."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Add one value each; values are 0-dimensional tensors without gradient."""
        for name, value in metrics.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()
            self.counts[name] = self.counts.get(name, 0) + 1

    def read(self, processes: Processes) -> dict[str, float]:
        """Means over steps and processes since the last call.  Every process must have added the same names."""
        if not self.sums:
            return {}
        names = sorted(self.sums)
        sums = all_reduce_sum(torch.stack([self.sums[name].float() / self.counts[name] for name in names]), processes)
        self.sums, self.counts = {}, {}
        return dict(zip(names, (sums / processes.world_size).tolist()))

    def state(self, processes: Processes) -> dict[str, list[float]]:
        """Sums and counts since the last log line, means over processes: what a resumed run goes on with."""
        names = sorted(self.sums)
        if not names:
            return {}
        sums = all_reduce_sum(torch.stack([self.sums[name].double() for name in names]), processes) / processes.world_size
        return {name: [value, self.counts[name]] for name, value in zip(names, sums.tolist())}

    def load(self, state: dict[str, list[float]], processes: Processes) -> None:
        """Go on from `state`."""
        self.sums = {name: torch.tensor(value, device=processes.device) for name, (value, _) in state.items()}
        self.counts = {name: int(count) for name, (_, count) in state.items()}


class Run:
    """One training run: its folder, resuming, checkpoints, logs, which step logs or saves, and how it ends when asked to."""

    def __init__(self, options: RunOptions, record: RunRecord, processes: Processes, total_steps: int,
                 work: Work | None = None) -> None:
        """Create the folder and its log; work: for the rates in it.  Raises UserError when it cannot be written.

        Where the command is refused before the first step, what it has put into an empty folder is removed.
        """
        self.options, self.record, self.processes, self.total_steps = options, record, processes, total_steps
        self.folder = check_writable(options.run_dir, "--run-dir")
        empty = all(entry.name.startswith(PROBE) for entry in self.folder.iterdir())
        if processes.is_main:
            self.lock = lock_folder(self.folder, "--run-dir", "training")
        set_up_logging(processes, self.folder / "log.txt")
        self.metrics = MeanMetrics()
        self.checkpoints, self.keep = CheckpointWriter(self.folder / "checkpoints", record, processes), options.keep_checkpoints
        self.stop, self.leaving, self.saved_at = StopRequest(), 0, time.monotonic()
        self.tensorboard = self.folder / "tensorboard"
        with naming(self.tensorboard):
            self.writer = SummaryWriter(str(self.tensorboard)) if processes.is_main else None
        self.started, self.first_step, self.logged, self.begun = time.perf_counter(), 0, 0, False
        # Since the last log line: seconds by what was done beside steps; of every network the steps left out [3], in all, in the
        # present row, in the longest row.
        self.seconds: dict[str, float] = {}
        self.bad_steps: dict[str, Tensor] = {}
        self.work = work
        self.loss_range: tuple[float, float] | None = None  # first and lowest
        if empty and processes.is_main:
            when_refused(self._forget)

    def resume(self, training: TrainState) -> int:
        """Load the newest checkpoint, if there is one, into `training`; returns the first step still to do."""
        step = 0
        if found := latest_checkpoint(self.folder / "checkpoints"):
            path, step = found
            with handled_by(self.stop.note):  # torch would take the exit for a fault of the checkpoint; the first step ends it
                state, metrics = load_checkpoint(path, training.state_dict(), self.record, self.processes)
            training.load_state_dict(state)
            self.metrics.load(metrics, self.processes)
            if step < self.total_steps:
                log.info("resumed from %s at step %d of %d", path, step, self.total_steps)
            else:
                log.info("%s is of step %d, and %d are asked for: this training is finished", path, step, self.total_steps)
        self._start(step)
        return step

    def _forget(self) -> None:
        """Remove what was made before a first step that never came."""
        if not self.begun:
            if self.writer is not None:
                self.writer.close()
            shutil.rmtree(self.tensorboard, ignore_errors=True)
            for name in (".lock", "log.txt", "options.json"):
                (self.folder / name).unlink(missing_ok=True)

    def _start(self, step: int) -> None:
        self.first_step, self.logged = step, step - step % self.options.log_every
        if not self.processes.is_main:
            return
        if step < self.total_steps:  # a finished run keeps the options it was made with
            write_json(self.folder / "options.json", self.record.saved())
        metrics = unlinked(self.folder / "metrics.jsonl")
        if metrics.exists():  # lines after the checkpoint will be written again
            kept = "".join(json.dumps(line) + "\n" for line in read_metrics(metrics) if line["step"] <= step)
            if kept != metrics.read_text():
                write_text(metrics, kept)

    def steps(self) -> Iterator[int]:
        """Step numbers still to do, with their progress; seeds each step from (seed, step, rank)."""
        self.started, self.begun = time.perf_counter(), True
        if self.first_step >= self.total_steps:
            return
        with handled_by(self.stop.note), progress(self.total_steps, self.folder.name, "steps", self.processes,
                                                  self.first_step) as bar:
            for step in range(self.first_step, self.total_steps):
                torch.manual_seed(step_seed(self.options.seed, step, self.processes.rank))
                yield step
                bar.update()
                self.checkpoints.poll()
            self.checkpoints.finish()

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Count the seconds of the block as those of `what` ("data", "evaluation", "checkpoint") in the log."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - started

    def after_step(self, step: int, images: int, **values: float) -> None:
        """Log averaged metrics when due; images: global batch size, for the rates; values: plain numbers such as lr.

        Rates leave out what was not training: evaluations and checkpoints.
        """
        done = step + 1
        if done % self.options.log_every and done != self.total_steps:
            return
        means = self.metrics.read(self.processes)  # waits for the accelerator
        seconds = time.perf_counter() - self.started - sum(self.seconds.get(what, 0.0) for what in ("evaluation", "checkpoint"))
        # After a resume the first rate is of the steps since then.
        steps, self.logged = done - max(self.logged, self.first_step), done
        rate = images * steps / seconds
        scalars = means | values | {"images_per_second": rate} | (self.work.rates(rate) if self.work else {})
        scalars |= {f"seconds_{what}": spent for what, spent in self.seconds.items()}
        self.started, self.seconds = time.perf_counter(), {}
        if self.processes.device.type == "cuda":
            scalars["peak_memory_gib"] = torch.cuda.max_memory_allocated(self.processes.device) / 2**30
        self.write(done, scalars)
        log.info("step %d of %d: %s", done, self.total_steps, figures_text(scalars))
        self._watch_gradients(done)
        self._watch_loss(done, means.get("loss", means.get("total", 0.0)))

    def _watch_loss(self, step: int, loss: float) -> None:
        """Doubt a loss that is not finite, or twice the lowest and above the first: it will not come back by itself."""
        if not math.isfinite(loss):
            self.doubt(f"step {step}: the loss is {loss}")
            return
        first, lowest = self.loss_range or (loss, loss)
        self.loss_range = first, min(lowest, loss)
        if loss > max(2 * lowest, first) > 0:
            self.doubt(f"step {step}: the loss is {loss:.4g} after {lowest:.4g}, as with a learning rate that is far too high")

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Write scalars of `step` to metrics.jsonl and TensorBoard."""
        if self.writer is not None:
            with naming(self.folder / "metrics.jsonl"), (self.folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": step} | scalars) + "\n")
            with naming(self.tensorboard):
                for name, value in scalars.items():
                    self.writer.add_scalar(name, value, step)

    def write_evaluation(self, step: int, figures: dict[str, float]) -> None:
        """Write and log the figures of an evaluation after `step`."""
        self.write(step + 1, {f"eval/{name}": value for name, value in figures.items()})
        log.info("step %d: evaluation: %s", step + 1, figures_text(figures))

    def evaluations(self, name: str) -> list[float]:
        """A figure of all evaluations before the step that the run goes on with."""
        file = self.folder / "metrics.jsonl"
        lines = read_metrics(file) if file.exists() else []
        return [line[f"eval/{name}"] for line in lines
                if line["step"] <= self.first_step and isinstance(line.get(f"eval/{name}"), (int, float))]

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        """Show a PIL image in TensorBoard and keep it as NAME.png in the run's folder."""
        if self.writer is not None:
            with naming(self.tensorboard):
                self.writer.add_image(name, np.asarray(image), step, dataformats="HWC")
            save_picture(image, self.folder / f"{name}.png")

    def due(self, every: int, step: int) -> bool:
        """True after every `every`-th step and after the last; `every` 0: only after the last."""
        return step + 1 == self.total_steps or (every > 0 and (step + 1) % every == 0)

    def snapshot(self, step: int, steps_per_epoch: int) -> Path | None:
        """Where the model after `step` is kept for good; None where no multiple of --keep-every epochs ends with it."""
        every = self.options.keep_every * steps_per_epoch
        if every <= 0 or (passed := int((step + 1) / every + 1e-9)) == int(step / every + 1e-9):
            return None
        epoch = passed * self.options.keep_every
        return self.folder / "snapshots" / (f"epoch-{epoch:04.0f}" if epoch == int(epoch) else f"epoch-{epoch:07.2f}")

    def checkpoint_due(self, step: int) -> bool:
        """True after every --checkpoint-every-th step and the last, after --checkpoint-minutes, and when asked to stop.

        All processes agree: a signal, or the clock, of one of them counts for all.
        """
        minutes, waited = self.options.checkpoint_minutes, time.monotonic() - self.saved_at
        self.leaving, late = agree([self.stop.exit_code, int(0 < minutes * 60 < waited)], self.processes)
        return bool(self.leaving or late) or self.due(self.options.checkpoint_every, step)

    def checkpoint(self, step: int, training: TrainState) -> None:
        """Save `training` as it is after `step`; leaves the process, with the checkpoint whole, where it was asked to stop."""
        with self.timed("checkpoint"):
            self.checkpoints.save(step + 1, training.state_dict(), self.keep, self.metrics.state(self.processes))
        self.saved_at = time.monotonic()
        if self.leaving and step + 1 < self.total_steps:
            self.checkpoints.finish()
            self.processes.barrier()
            log.info("asked to stop: a checkpoint of step %d of %d is written, the same command carries on", step + 1,
                     self.total_steps)
            self.close()
            raise SystemExit(self.leaving)

    def doubt(self, reason: str) -> None:
        """Warn of numbers that went wrong; from now on no checkpoint is removed, so that those from before stay."""
        if self.keep:
            self.keep = 0
            log.warning("%s: from here on no checkpoint is removed; stop and go on from an earlier one with other options, or "
                        "wait", reason)

    @property
    def lacks_export(self) -> bool:
        """True for a finished training that was killed between its last checkpoint and the export of the model."""
        return self.first_step >= self.total_steps and exported_step(self.folder, self.record.kind) < self.total_steps

    def watch_gradient(self, norm: Tensor, name: str = "model") -> None:
        """Count the steps that `step_if_finite` leaves out, on the device; the log tells them."""
        bad = ~torch.isfinite(norm.detach())
        if name not in self.bad_steps:
            self.bad_steps[name] = torch.zeros(3, device=norm.device)
        left_out, row, longest = self.bad_steps[name].unbind()
        row = (row + 1) * bad
        self.bad_steps[name] = torch.stack([left_out + bad, row, torch.maximum(longest, row)])

    def _watch_gradients(self, step: int) -> None:
        """Warn of steps left out since the last log line; raises UserError where ten in a row were."""
        for name, counts in self.bad_steps.items():
            left_out, row, longest = (int(count) for count in counts.tolist())
            if left_out:
                log.warning("up to step %d: gradients of the %s that are not finite, %d steps left out", step, name, left_out)
            if longest >= _BAD_ROW:
                raise UserError(f"{longest} steps in a row up to {step} had gradients of the {name} that are not finite: lower "
                                "--lr, or use --mixed-precision none.")
            self.bad_steps[name] = torch.tensor([0.0, row, row], device=counts.device)

    def close(self) -> None:
        """Flush what is pending."""
        self.checkpoints.finish()
        if self.writer is not None:
            with naming(self.tensorboard):
                self.writer.close()
