"""Seconds of a training step of several systems, measured in turn so that a slow minute of the machine hits all alike.

    python scripts/paper/step_times.py --out F.json system=NAME OPTIONS... system=NAME OPTIONS...

OPTIONS are train_c2i.py's.  The time is that of whole optimizer steps on codes of the data set, without evaluations and
checkpoints: the median over rounds, and the fastest.
"""

import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started by its path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from autoregressive.train.options import TrainConfig, gpt_config, mapped_header, recipe
from autoregressive.train.train_c2i import set_up, train_step
from utils.batches import GlobalBatches, plan_steps
from utils.code_shards import CodeDataset
from utils.config import Positive, UserError, parse, run_main
from utils.distributed import Processes, setup
from utils.files import check_writable, write_json
from utils.initial import Start
from utils.logs import followed
from utils.run import MeanMetrics, Run

MARK = "system="


@dataclass
class StepTimesConfig:
    """Options of the measurement."""

    out: Path
    """JSON to write: for each system the median and the fastest seconds of a step, and parameters."""
    rounds: Positive = 8
    """Turns over all systems, after one that warms up."""
    steps: Positive = 3
    """Steps of a system in a turn."""


class _Unlogged:
    """What a training step needs of a run, without a folder."""

    def __init__(self, processes: Processes) -> None:
        self.processes, self.metrics = processes, MeanMetrics()

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Time nothing."""
        yield

    def watch_gradient(self, norm: Tensor) -> None:
        """Watch nothing."""


class Trained:
    """One system under training."""

    def __init__(self, words: list[str], processes: Processes) -> None:
        self.config = parse(TrainConfig, recipe, words)
        self.run = cast(Run, _Unlogged(processes))
        header, code_map = mapped_header(self.config.codes)
        model = gpt_config(self.config.gpt, tuple(header.codebook_sizes), code_map)
        dataset = CodeDataset(*self.config.codes.code_path, seed=0, transform=code_map.apply if code_map else None)
        self.plan = plan_steps(self.config.batch, len(dataset), processes.world_size)
        batches = GlobalBatches(len(dataset), self.plan, processes.rank, 0, 0)
        self.loader = iter(DataLoader(dataset, batch_sampler=batches, collate_fn=tuple))
        self.gpt, self.training = set_up(self.config, model, Start(), processes)
        self.training.model.train()
        self.done = 0
        self.seconds: list[float] = []

    def steps(self, count: int, device: torch.device) -> float:
        """Make `count` steps; returns the seconds of one."""
        started = time.perf_counter()
        for _ in range(count):
            train_step(self.gpt, self.training, self.loader, self.plan, self.config, self.run, self.done)
            self.done += 1
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - started) / count


def split(words: list[str]) -> tuple[list[str], dict[str, list[str]]]:
    """A command line -> its own words, and those of each system by name; raises UserError for a name that comes twice."""
    own: list[str] = []
    systems: dict[str, list[str]] = {}
    current = own
    for word in words:
        if not word.startswith(MARK):
            current.append(word)
        elif (name := word.removeprefix(MARK)) in systems:
            raise UserError(f"{word} comes twice: give each system a name of its own.")
        else:
            current = systems.setdefault(name, [])
    return own, systems


def main() -> None:
    """Parse options, measure, write and print the times."""
    own, systems = split(sys.argv[1:])
    config = parse(StepTimesConfig, args=own)
    if not systems:
        raise UserError(f"there is no system to time: give {MARK}NAME and its options.")
    check_writable(config.out.parent, "--out")
    processes = setup("auto")
    trained = {name: Trained(words, processes) for name, words in systems.items()}
    for turn in followed(range(config.rounds + 1), "time", "rounds", processes):
        for each in trained.values():
            seconds = each.steps(config.steps, processes.device)
            if turn:
                each.seconds.append(seconds)
    found: dict[str, Any] = {name: {
        "seconds": statistics.median(each.seconds), "fastest": min(each.seconds), "rounds": each.seconds,
        "parameters": sum(parameter.numel() for parameter in each.gpt.parameters())} for name, each in trained.items()}
    write_json(config.out, found)
    for name, figures in found.items():
        print(f"{name:24} {figures['seconds']:.4f} s a step (at best {figures['fastest']:.4f}), {figures['parameters']} weights")
    processes.close()


if __name__ == "__main__":
    run_main(main)
