"""Kill long commands at random moments, start them again until they end, and compare with what an undisturbed run gives.

    python scripts/chaos.py --kills 1000 --seed 0 --out report.json

A run is killed up to --times times, by a signal drawn for each kill: SIGKILL, SIGTERM, SIGUSR1 or SIGINT of all its processes,
SIGKILL or SIGTERM of one of two.  Here, as under torchrun, the others end when one has died, and all start again.  Losses of
every step and the final weights of trainings, and all rows of codes and images, must be those of the undisturbed run.  After a
request to stop no logged step may be done again.  Runs fork from this process, which has the libraries loaded.  Not part of
the tests, which run a small share of it.
"""

import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started by its path

import numpy as np
import torch
from safetensors import safe_open
from tqdm import tqdm

from autoregressive.sample import sample_c2i_ddp, sample_t2i_ddp
from autoregressive.train import extract_codes_c2i, extract_text, train_c2i
from scripts.fuzz_commands import CPU, EXTRACT, GPT_WORDS, SAMPLE, VQ_WORDS
from scripts.fuzz_world import write_files
from scripts.paper.table import markdown_table
from tokenizer.tokenizer_image import vq_train
from tokenizer.validation import val_ddp
from utils.config import Positive, Seed, UserError, parse, run_main
from utils.files import check_writable, write_json
from utils.logs import progress

PATIENCE = 60.0   # seconds after a signal: a run that goes on longer hangs
GRACE = 5.0       # seconds that the others have after one has died, before they are killed too


@dataclass
class ChaosConfig:
    """What to kill, and how often."""

    kills: Positive = 1000
    """Kills in all."""
    times: Positive = 8
    """Kills of one run at most, before it may end."""
    seed: Seed = 0
    """Of signals and moments."""
    tasks: tuple[str, ...] = ()
    """Only these tasks; empty: all."""
    out: Path | None = None
    """JSON to write: every kill, and every run with its comparison."""


@dataclass(frozen=True)
class Task:
    """A long command, and how many processes run it."""

    main: Callable[[], None]
    words: str                  # {name}: an entry of the world, {out}: folder of the run
    processes: int
    log: str = ""               # metrics of a training
    results: tuple[str, ...] = ()


def training(words: str, kind: str, processes: int) -> Task:
    """A training, its log and its weights."""
    main = train_c2i.main if kind == "gpt" else vq_train.main
    return Task(main, words + " --run-dir {out}/run", processes, "{out}/run/metrics.jsonl", (f"{{out}}/run/{kind}.safetensors",))


GPT = f"--code-path {{codes}} --steps 24 --checkpoint-every 5 --ema-decay 0.9 {GPT_WORDS}"
TEXT_GPT = GPT.replace("--num-classes 3", "--condition text --short-captions 0.5").replace("parallel none", "parallel fsdp")
VQ = (f"--data-path {{images_npz}} --steps 8 --checkpoint-every 3 --eval-every 4 --ema-decay 0.9 --log-every 1 {VQ_WORDS} "
      "--perceptual-net random --disc-start 4 --codebook-init kmeans --kmeans-vectors 64 --revive-every 5")
VQ = VQ.replace("--perceptual-net classifier --perceptual-file {classifier} ", "")
ENCODE = "--data-path {many} --vq-ckpt {tokenizer} --batch-size 4 " + EXTRACT
DRAW = SAMPLE.replace("--num-samples 6 --batch-size 6", "--num-samples 40 --batch-size 4")
TEXT = "--text-encoder hashed --text-width 64 --short-captions first-sentence " + CPU
PROMPTS = ("--gpt-ckpt {text_gpt} --vq-ckpt {tokenizer} --prompts {prompts} --per-prompt 14 --batch-size 4 --layout geneval "
           "--out {out}/x.npz " + CPU)
CODES, IMAGES = ("{out}/codes/codes.npy", "{out}/codes/state.npy"), ("{out}/x.npz",)
TASKS = {
    "GPT": training(GPT, "gpt", 1), "GPT, DDP": training(GPT.replace("parallel none", "parallel ddp"), "gpt", 2),
    "GPT, FSDP2": training(GPT.replace("parallel none", "parallel fsdp"), "gpt", 2),
    "GPT from captions, FSDP2": training(TEXT_GPT, "gpt", 2),
    "tokenizer": training(VQ, "tokenizer", 1), "tokenizer, two processes": training(VQ, "tokenizer", 2),
    "extraction": Task(extract_codes_c2i.main, ENCODE, 1, "", CODES),
    "extraction, two processes": Task(extract_codes_c2i.main, ENCODE, 2, "", CODES),
    "sampling": Task(sample_c2i_ddp.main, DRAW, 1, "", IMAGES),
    "sampling, two processes": Task(sample_c2i_ddp.main, DRAW, 2, "", IMAGES),
    "captions": Task(extract_text.main, "--data-path {many} --batch-size 4 --text-path {out}/text " + TEXT, 1, "",
                     ("{out}/text/features.npy", "{out}/text/state.npy")),
    "prompts, two processes": Task(sample_t2i_ddp.main, PROMPTS, 2, "", IMAGES),
    "reference npz": Task(val_ddp.main, "--data-path {many} --image-size 32 --num-workers 0 --out {out}/x.npz", 1, "", IMAGES),
}
# What is sent, to all processes or to one drawn at random.
KILLS = {1: (("SIGKILL", False), ("SIGTERM", False), ("SIGUSR1", False), ("SIGINT", False)),
         2: (("SIGKILL", False), ("SIGTERM", False), ("SIGUSR1", False), ("SIGINT", False), ("SIGKILL", True), ("SIGTERM", True))}


@dataclass
class Kill:
    """One kill: its signal, when, and what the processes ended with."""

    task: str
    signal: str
    seconds: float
    exit_codes: list[int | None]
    fault: str = ""


def _child(task: Task, words: list[str], out: Path, rank: int, port: int) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(out / f"{name}{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", 1) for number in (1, 2))
    tqdm.set_lock(threading.RLock())  # the parent's is shared by all processes: one killed while it holds it would stop them all
    if task.processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(task.processes), "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(task.processes)}
    torch.set_num_threads(1)
    sys.argv = ["program", *words]
    run_main(task.main)


def start(task: Task, paths: dict[str, str], out: Path) -> list[BaseProcess]:
    """All processes of a task."""
    out.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words, fork = [word.format(out=out, **paths) for word in task.words.split()], multiprocessing.get_context("fork")
    processes = [fork.Process(target=_child, args=(task, words, out, rank, port)) for rank in range(task.processes)]
    for process in processes:
        process.start()
    return list(processes)


def await_end(processes: list[BaseProcess], seconds: float, grace: float) -> bool:
    """Wait until all have ended; one that dies by a signal or an error leaves the others `grace` seconds.  False: they go on."""
    end = time.monotonic() + seconds
    while any(process.is_alive() for process in processes):
        if time.monotonic() > end:
            return False
        if any(process.exitcode for process in processes):
            end = min(end, time.monotonic() + grace)
            grace = math.inf
        time.sleep(0.005)
    return True


def logged(path: Path, key: str) -> dict[int, float]:
    """A metric by step, from whole lines of a log; empty where there is no log yet."""
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
    return {line["step"]: line[key] for line in lines if key in line}


def results(task: Task, paths: dict[str, str], out: Path) -> dict[str, np.ndarray]:
    """What a finished task has made, comparable: arrays by name."""
    found: dict[str, np.ndarray] = {}
    for name in task.results:
        path = Path(name.format(out=out, **paths))
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                found |= {key: file.get_tensor(key).float().numpy() for key in file.keys()}  # noqa: SIM118, the file is no dict
        elif path.suffix == ".npz":
            with np.load(path) as arrays:
                found |= {key: arrays[key] for key in arrays.files if key.startswith("arr")}
        else:
            found[path.name] = np.load(path)
    if task.log:
        for key in ("loss", "total", "eval/psnr"):
            curve = logged(Path(task.log.format(out=out)), key)
            found |= {f"{key} by step": np.array(sorted(curve.items()))} if curve else {}
    return found


def difference(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float) -> str:
    """The first result that differs, or ""; images and codes must be equal, floats within the tolerance."""
    for name, value in expected.items():
        if name not in found or found[name].shape != value.shape:
            return f"{name} is missing or has another shape"
        largest = np.abs(found[name].astype(np.float64) - value).max(initial=0)
        if largest > (tolerance if value.dtype.kind == "f" else 0):
            return f"{name} differs by {largest:.3g}"
    return ""


def kill_once(name: str, task: Task, paths: dict[str, str], out: Path, longest: float, rng: random.Random) -> Kill | None:
    """Start a task and send a signal at a random moment; None if it ended before."""
    told = {path: path.stat().st_size for path in out.glob("stderr*")}  # by earlier tries
    processes, moment = start(task, paths, out), rng.uniform(0, longest)
    if await_end(processes, moment, GRACE):
        codes = [process.exitcode for process in processes]
        end = (out / "stderr0").read_text(errors="replace")[-300:]
        return Kill(name, "none", moment, codes, f"failed by itself: {end}") if any(codes) else None
    sent, alone = rng.choice(KILLS[task.processes])
    for process in [rng.choice(processes)] if alone else processes:
        if process.is_alive():
            assert process.pid is not None
            os.kill(process.pid, getattr(signal, sent))
    ended = await_end(processes, PATIENCE, GRACE if sent == "SIGKILL" else 2 * GRACE)
    left_alone = alone and any(process.exitcode for process in processes)  # in a rendezvous, say: torchrun kills it then
    for process in processes:
        process.kill()
        process.join()
    said = {path.name: path.read_bytes()[told.get(path, 0):].decode(errors="replace") for path in out.glob("stderr*")}
    kill = Kill(name, f"{sent} of one" if alone else sent, moment, [process.exitcode for process in processes])
    if not ended and sent != "SIGKILL" and not left_alone:
        kill.fault = f"went on after {sent}"
    elif task.log and sent != "SIGKILL" and 0 not in kill.exit_codes:
        steps = [int(path.name[5:]) for path in (out / "run" / "checkpoints").glob("step-*")]
        last = max([*logged(Path(task.log.format(out=out)), "lr"), 0])
        if any(code in (130, 143) for code in kill.exit_codes) and "asked to stop" in said["stderr0"] \
                and max([*steps, 0]) < last:
            kill.fault = f"step {last} was logged, the last checkpoint is of step {max([*steps, 0])}"
    if not kill.fault and (tracebacks := [text for text in said.values() if "Traceback" in text]):
        kill.fault = f"traceback: {tracebacks[0][-400:]}"
    return kill


def disturb(name: str, task: Task, paths: dict[str, str], folder: Path, expected: dict[str, np.ndarray], longest: float,
            times: int, rng: random.Random) -> list[Kill]:
    """One run, killed up to `times` times and carried on to its end; the last kill bears what the comparison found."""
    out, kills = folder / "run", list[Kill]()
    shutil.rmtree(out, ignore_errors=True)
    while len(kills) < times:
        kill = kill_once(name, task, paths, out, longest, rng)
        if kill is None:
            break
        kills.append(kill)
    processes = start(task, paths, out)  # where it has ended already, nothing is done
    ended = await_end(processes, 10 * longest + PATIENCE, GRACE)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    if not ended or any(codes):
        fault = f"does not end any more: {codes}, {(out / 'stderr0').read_text()[-300:]}"
    else:
        fault = difference(results(task, paths, out), expected, 1e-6)
    if fault and kills:
        kills[-1].fault = kills[-1].fault or fault
    return kills


def build(folder: Path) -> dict[str, str]:
    """The tiny world: models, codes, images."""
    folder.mkdir()
    write_files(folder)
    rng = np.random.default_rng(1)
    np.savez(folder / "many.npz", images=rng.integers(0, 256, (300, 32, 32, 3), dtype=np.uint8), labels=np.arange(300) % 3,
             captions=np.array([f"A picture. It has the number {index}." for index in range(300)]))
    paths = {name: str(next(folder.glob(f"{name}.*"), folder / name)) for name in (
        "images", "images_npz", "many", "tokenizer", "gpt", "text_gpt", "prompts")}
    words = (f"--data-path {{images_npz}} --vq-ckpt {{tokenizer}} --image-size 32 --augmentation flip --num-workers 0 "
             f"--code-path {folder}/codes {CPU}")
    text = f"--data-path {{images_npz}} --text-path {folder}/codes/text {TEXT}"
    for task in (Task(extract_codes_c2i.main, words, 1), Task(extract_text.main, text, 1)):
        await_end(start(task, paths, folder / "making"), PATIENCE, 0)
    return paths | {"codes": str(folder / "codes")}


def summary(kills: list[Kill]) -> str:
    """Markdown: kills by task and signal, and the faults."""
    signals = sorted({kill.signal for kill in kills})
    count = Counter((kill.task, kill.signal) for kill in kills)
    faults = Counter(kill.task for kill in kills if kill.fault)
    rows = [[task, *(str(count[task, sent]) for sent in signals), str(faults[task])]
            for task in dict.fromkeys(kill.task for kill in kills)]
    total = ["all", *(str(sum(kill.signal == sent for kill in kills)) for sent in signals), str(faults.total())]
    return markdown_table(["kills", *signals, "with a fault"], [*rows, total])


def main() -> None:
    """Kill until the number is reached; exit code 1 when a run lost work, differs or hangs."""
    config = parse(ChaosConfig)
    if unknown := sorted(set(config.tasks) - set(TASKS)):
        raise UserError(f"--tasks {unknown[0]!r} is none of {', '.join(TASKS)}: give one of these.")
    if config.out is not None:
        check_writable(config.out.parent, "--out")
    chosen = {name: task for name, task in TASKS.items() if name in config.tasks or not config.tasks}
    kills, rng = list[Kill](), random.Random(config.seed)
    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary, progress(config.kills, "chaos", "kills") as bar:
        folder = Path(temporary)
        paths, expected, longest = build(folder / "world"), dict[str, dict[str, np.ndarray]](), dict[str, float]()
        for name, task in chosen.items():
            began = time.monotonic()
            await_end(start(task, paths, folder / name), 300, GRACE)
            expected[name], longest[name] = results(task, paths, folder / name), time.monotonic() - began
        while len(kills) < config.kills:
            for name, task in chosen.items():
                found = disturb(name, task, paths, folder, expected[name], longest[name], config.times, rng)
                kills += found
                bar.update(len(found))
                for kill in found:
                    if kill.fault:
                        tqdm.write(f"{kill.task}, {kill.signal} after {kill.seconds:.2f} s: {kill.fault}", file=sys.stderr)
    print(summary(kills))
    if config.out is not None:
        write_json(config.out, [asdict(kill) for kill in kills])
    if any(kill.fault for kill in kills):
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
