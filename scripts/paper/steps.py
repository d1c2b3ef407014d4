"""Steps of an experiment: commands in folders named by what they are, done once, on one or several workers.

A step is one command of this repository.  Its folder, ROOT/KIND/LABEL-HASH, is named by a hash of the command and of all steps
that the command reads from, so that another option anywhere makes another folder, and what two experiments have in common
is made once.  A step that ended well leaves `step.json` there.  Trainings, extractions and samplings carry on where they
were interrupted, as their commands do.
"""

import hashlib
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Any

from utils.config import UserError
from utils.files import read_json, write_json
from utils.signals import EXIT_CODES, handled_by

log = logging.getLogger("steps")

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Own:
    """A path below the folder of the step whose command it stands in; "" is the folder itself."""

    part: str = ""


@dataclass(frozen=True)
class Made:
    """A path below the folder of another step, which is done first."""

    step: "Step"
    part: str = ""


Word = str | int | float | Path | Own | Made


@dataclass(frozen=True, eq=False)
class Step:
    """One command, and what it is."""

    root: Path
    kind: str
    """What it makes, for example gpt: the folder below the root, and what the time left is estimated by."""
    label: str
    """What tells it from others of its kind, for people; a part of the folder's name."""
    words: tuple[Word, ...]
    """The command without Python: a script and its options."""
    processes: bool = False
    """Whether it is started by scripts/launch.sh, on the processes that NPROC says."""
    alone: bool = False
    """Whether nothing may run beside it, because it measures time."""
    after: tuple["Step", ...] = ()
    """Steps that must be done before, though the command does not read from them."""

    @cached_property
    def identity(self) -> str:
        """A hash of the command and of what it reads, without any folder's name."""
        def content(word: Word) -> Any:
            if isinstance(word, Made):
                return [word.step.identity, word.part]
            return ["own", word.part] if isinstance(word, Own) else str(word)
        return hashlib.sha256(json.dumps([self.kind, *map(content, self.words)]).encode()).hexdigest()[:8]

    @property
    def folder(self) -> Path:
        """Where it writes."""
        return self.root / self.kind / f"{self.label}-{self.identity}"

    @property
    def needs(self) -> list["Step"]:
        """The steps that must be done before."""
        return [*(word.step for word in self.words if isinstance(word, Made)), *self.after]

    @property
    def done(self) -> bool:
        """Whether it ended well."""
        return (self.folder / "step.json").exists()

    @property
    def seconds(self) -> float:
        """How long its last try took, beside whatever else ran."""
        return float(read_json(self.folder / "step.json", "step", "the note of a finished step")["seconds"])

    def path(self, part: str = "") -> Path:
        """A path below its folder."""
        return self.folder / part if part else self.folder

    def command(self) -> list[str]:
        """The command with all paths."""
        def text(word: Word) -> str:
            if isinstance(word, Made):
                return str(word.step.path(word.part))
            return str(self.path(word.part)) if isinstance(word, Own) else str(word)
        launcher = ["bash", "scripts/launch.sh"] if self.processes else [os.environ.get("PYTHON", sys.executable)]
        return [*launcher, *map(text, self.words)]

    def json(self, part: str) -> Any:
        """The content of a JSON file that it made, but for its command, which names this machine's folders."""
        found = read_json(self.path(part), "step", f"a file of {self.kind} {self.label}")
        return {name: value for name, value in found.items() if name != "command"} if isinstance(found, dict) else found


def in_order(steps: Iterable[Step]) -> list[Step]:
    """The steps and all that they need, each once, what is needed first."""
    found: dict[Path, Step] = {}

    def visit(step: Step) -> None:
        if step.folder in found:
            return
        for need in step.needs:
            visit(need)
        found[step.folder] = step

    for step in steps:
        visit(step)
    return list(found.values())


@dataclass
class _Running:
    """A command under way on a worker."""

    step: Step
    worker: int
    process: subprocess.Popen
    started: float


class Runner:
    """Runs steps on workers: shares of the CPU's threads, or GPUs."""

    def __init__(self, workers: int = 1, gpus: int = 0, dry: bool = False) -> None:
        """workers: commands at a time; gpus: of this machine, dealt out to the workers in turn;
        dry: print the commands, run none."""
        self.workers, self.gpus, self.dry = workers, gpus, dry
        self.printed: set[Path] = set()

    def run(self, steps: Iterable[Step]) -> None:
        """Do what is not done of the steps and of what they need.

        Raises UserError when a command fails, after those beside it have ended, and SystemExit when asked to stop, after the
        commands under way were told and have ended.
        """
        everything = in_order(steps)
        waiting = [step for step in everything if not step.done]
        if self.dry:
            self.print_commands(waiting)
            return
        times = {step.folder: (step.kind, step.seconds) for step in everything if step.done}
        _Schedule(self, waiting, len(everything), times).run()

    def print_commands(self, steps: list[Step]) -> None:
        """Print the commands, in the calls of one runner each once."""
        for step in steps:
            if step.folder not in self.printed:
                print(shlex.join(step.command()))
                self.printed.add(step.folder)

    def environment(self, worker: int, alone: bool = False) -> dict[str, str]:
        """What a worker's command may use: its GPU, which several share if there are fewer, and its share of the threads, or all
        if nothing runs beside it."""
        if self.workers == 1:
            return dict(os.environ)
        gpu = {"CUDA_VISIBLE_DEVICES": str(worker % self.gpus)} if self.gpus else {}
        threads = len(os.sched_getaffinity(0)) // (1 if alone else self.workers)
        return os.environ | gpu | {"OMP_NUM_THREADS": str(max(threads, 1))}


class _Schedule:
    """One call of Runner.run."""

    def __init__(self, runner: Runner, waiting: list[Step], total: int, times: dict[Path, tuple[str, float]]) -> None:
        self.runner, self.waiting, self.total, self.times = runner, waiting, total, times
        self.running: list[_Running] = []
        self.failed: list[Step] = []
        self.asked: int | None = None

    def run(self) -> None:
        """Start, wait and note until nothing is left."""
        with handled_by(self._stop):
            try:
                while self.running or (self.waiting and not self.failed and self.asked is None):
                    self._start_ready()
                    for finished in [entry for entry in self.running if entry.process.poll() is not None]:
                        self.running.remove(finished)
                        self._finish(finished)
                    time.sleep(0.05)
            finally:
                for entry in self.running:
                    entry.process.kill()
        if self.asked is not None:
            raise SystemExit(EXIT_CODES[signal.Signals(self.asked)])
        if self.failed:
            step = self.failed[0]
            raise UserError(f"{step.kind} {step.label} failed, see {step.path('output.txt')}, which ends with: {last_line(step)}")

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        self.asked = self.asked or signum
        for entry in self.running:
            with suppress(ProcessLookupError):
                # Each leads a session, so that Ctrl-C reaches it once, from here; a Python that still imports knows TERM only.
                entry.process.send_signal(signal.SIGTERM if signum == signal.SIGINT else signum)

    def _start_ready(self) -> None:
        for step in list(self.waiting):
            alone = step.alone or any(entry.step.alone for entry in self.running)
            if self.asked is not None or self.failed or len(self.running) >= (1 if alone else self.runner.workers):
                return
            if all(need.done for need in step.needs):
                self.waiting.remove(step)
                self._start(step)

    def _start(self, step: Step) -> None:
        step.folder.mkdir(parents=True, exist_ok=True)
        worker = min(set(range(self.runner.workers)) - {entry.worker for entry in self.running})
        with (step.folder / "output.txt").open("a") as output:
            # Python is found and its packages asked for once, by the script that started this.
            process = subprocess.Popen(step.command(), cwd=REPOSITORY, env=self.runner.environment(worker, step.alone),
                                       stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True)
        self.running.append(_Running(step, worker, process, time.monotonic()))

    def _finish(self, entry: _Running) -> None:
        step, seconds = entry.step, time.monotonic() - entry.started
        if entry.process.returncode:
            if self.asked is None:
                self.failed.append(step)
            return
        write_json(step.folder / "step.json", {"command": step.command(), "seconds": round(seconds, 1)})
        self.times[step.folder] = step.kind, seconds
        left = len(self.waiting) + len(self.running)
        log.info("[%d/%d] %s %s: %s%s", self.total - left, self.total, step.kind, step.label, spoken(seconds),
                 f"; about {spoken(self._left())} left" if left else "")

    def _left(self) -> float:
        """Seconds that the other steps will take, by the mean of their kind so far, or of all."""
        by_kind: dict[str, list[float]] = {}
        for kind, seconds in self.times.values():
            by_kind.setdefault(kind, []).append(seconds)
        whole = [seconds for found in by_kind.values() for seconds in found]
        mean = {kind: sum(found) / len(found) for kind, found in by_kind.items()}
        expected = [mean.get(step.kind, sum(whole) / len(whole)) for step in self.waiting]
        expected += [max(mean.get(entry.step.kind, 0.0) - (time.monotonic() - entry.started), 0.0) for entry in self.running]
        return sum(expected) / self.runner.workers


def last_line(step: Step) -> str:
    """What a command said last."""
    text = step.path("output.txt").read_text(errors="replace").replace("\r", "\n")
    return next((line for line in reversed(text.splitlines()) if any(map(str.isalnum, line))), "nothing")  # no frames


def spoken(seconds: float) -> str:
    """A time for people."""
    hours, minutes, seconds = int(seconds // 3600), int(seconds // 60 % 60), seconds % 60
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02.0f} s" if minutes else f"{seconds:.1f} s"
