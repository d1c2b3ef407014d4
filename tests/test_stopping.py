"""Asked to stop, killed, refused: what a run leaves behind, and that the same command carries on."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from autoregressive.models.gpt import load_gpt
from autoregressive.train import train_c2i
from tests.conftest import REPOSITORY, call, command, losses
from tests.test_codes import write_codes
from tests.test_train import TRAIN, gpt_options, vq_options
from tokenizer.tokenizer_image import vq_train
from utils.files import lock_folder

LAUNCH = "scripts/launch.py"


@pytest.fixture(scope="module")
def codes(tmp_path_factory) -> Path:
    """Random codes shared by the tests of this file."""
    return write_codes(tmp_path_factory.mktemp("data") / "codes")


def options(codes: Path, run_dir: Path, **extra) -> list[str]:
    """A training of 30 steps that logs every step."""
    shape: dict[str, Any] = dict(steps=30, checkpoint_every=10, data_parallel="ddp") | extra
    return [str(word) for word in gpt_options(codes, run_dir, **shape)]


@pytest.fixture(scope="module")
def reference(codes, tmp_path_factory) -> dict[int, float]:
    """Losses of the uninterrupted training."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    command(TRAIN, *options(codes, run_dir, data_parallel="none"))
    return losses(run_dir)


def start(words: list[str], processes: int = 1, **environment: str) -> subprocess.Popen:
    """The training under way, by scripts/launch.py where it has several processes."""
    launcher = [LAUNCH] if processes > 1 else []
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "NPROC": str(processes)} | environment
    return subprocess.Popen([sys.executable, *launcher, TRAIN, *words], cwd=REPOSITORY, env=env, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True)


def await_step(run_dir: Path, step: int) -> None:
    """Wait until the log has `step`."""
    deadline, log = time.time() + 120, run_dir / "metrics.jsonl"
    while time.time() < deadline and not (log.exists() and f'"step": {step},' in log.read_text()):
        time.sleep(0.01)


def worker(parent: subprocess.Popen, rank: int) -> int:
    """The process id of a rank among the processes that `parent` started."""
    for task in Path(f"/proc/{parent.pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            if f"RANK={rank}\0" in Path(f"/proc/{child}/environ").read_text().replace("\0LOCAL_", "\0").replace("GROUP_RANK", ""):
                return int(child)
    raise AssertionError(f"no process of rank {rank}")


@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGUSR1", 143), ("SIGINT", 130)])
def test_a_signal_ends_a_training_with_a_checkpoint(codes, tmp_path, reference, name, code):
    """Slurm gives seconds: no step that was done is done again, and the curve is that of the uninterrupted run."""
    words = options(codes, tmp_path / "run", data_parallel="none", steps=3000, checkpoint_every=0)
    process = start(words)
    await_step(tmp_path / "run", 7)
    process.send_signal(getattr(signal, name))
    error = process.communicate(timeout=30)[1]
    assert process.returncode == code and "asked to stop" in error and "Traceback" not in error
    done = max(losses(tmp_path / "run"))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{done:08d}"]
    again = command(TRAIN, *options(codes, tmp_path / "run", data_parallel="none", steps=max(done, 30), checkpoint_every=0))
    assert f"at step {done} of" in again.stderr
    seen = losses(tmp_path / "run")
    assert [seen[step] for step in reference] == pytest.approx(list(reference.values()), abs=1e-6)


@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_two_processes_is_asked_and_both_stop(codes, tmp_path, reference, rank):
    """A scheduler may reach one process alone."""
    process = start(options(codes, tmp_path / "run", steps=3000, checkpoint_every=0), processes=2)
    await_step(tmp_path / "run", 5)
    os.kill(worker(process, rank), signal.SIGTERM)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 143 and error.count("asked to stop") == 1 and "Traceback" not in error
    done = max(losses(tmp_path / "run"))
    assert (tmp_path / "run" / "checkpoints" / f"step-{done:08d}").exists()


def test_a_killed_process_brings_all_back(codes, tmp_path, reference):
    """A process that dies ends the others at once; all start again and the curve is that of one process."""
    process = start(options(codes, tmp_path / "run"), processes=2)
    await_step(tmp_path / "run", 13)
    os.kill(worker(process, 1), signal.SIGKILL)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 0, error[-2000:]
    assert error.count("process 1 of 2 was killed by SIGKILL: starting all processes again") == 1 and "Traceback" not in error
    assert losses(tmp_path / "run") == pytest.approx(reference, abs=2e-5)


def test_world_sizes_follow_each_other(codes, tmp_path, reference):
    """Four processes, one, two: shards, averages and moments go where they belong, and the curve is that of one process."""
    for processes, steps in ((4, 10), (1, 17), (2, 30)):
        words = options(codes, tmp_path / "run", data_parallel="fsdp", ema_decay=0.9, steps=steps)
        done = start(words, processes)
        error = done.communicate(timeout=200)[1]
        assert done.returncode == 0, error[-2000:]
    assert losses(tmp_path / "run") == pytest.approx(reference, abs=2e-5)
    command(TRAIN, *options(codes, tmp_path / "alone", data_parallel="none", ema_decay=0.9))
    whole, parts = (load_gpt(tmp_path / name).state_dict() for name in ("alone", "run"))  # averaged weights
    assert all(torch.allclose(parts[name], value, atol=1e-3) for name, value in whole.items())


def test_a_mistake_is_one_sentence_of_one_process(codes, tmp_path):
    """No restart, no traceback, no list of child failures."""
    process = start(options(codes, tmp_path / "run", num_classes=7), processes=2)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and error.count("\n") == 1 and error.startswith("error: --code-path"), error
    assert "num_classes 3 but --num-classes says 7" in error


def test_sums_of_metrics_survive_a_cut(codes, tmp_path):
    """A mean over ten steps is the same, wherever between them the run was cut."""
    words = dict(log_every=10, data_parallel="none", steps=20)
    call(train_c2i.main, *options(codes, tmp_path / "whole", checkpoint_every=0, **words))
    for _ in range(2):
        call(train_c2i.main, *options(codes, tmp_path / "cut", checkpoint_every=7, keep_checkpoints=5, **words))
        for step in (14, 20):  # the second training goes on from step 7
            shutil.rmtree(tmp_path / "cut" / "checkpoints" / f"step-{step:08d}")
    whole, cut = losses(tmp_path / "whole"), losses(tmp_path / "cut")
    assert sorted(whole) == [10, 20] and cut == pytest.approx(whole, abs=1e-6)


def test_checkpoints_by_time(codes, tmp_path):
    """A slow model loses minutes, however many steps these are."""
    call(train_c2i.main, *options(codes, tmp_path / "run", data_parallel="none", steps=6, checkpoint_every=0,
                                  checkpoint_minutes=1e-6, keep_checkpoints=10))
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == [f"step-{step:08d}" for step in range(1, 7)]
    saved = json.loads((tmp_path / "run" / "checkpoints" / kept[2] / "config.json").read_text())
    assert saved["metrics"] == {} and saved["options"]["run"]["checkpoint_minutes"] == 1e-6


def test_a_loss_that_runs_away_keeps_the_checkpoints_from_before(codes, tmp_path):
    """Ten thousand steps later nobody could go back to the last good ones."""
    words = options(codes, tmp_path / "run", data_parallel="none", steps=24, checkpoint_every=4, lr=3.0, keep_checkpoints=1)
    call(train_c2i.main, *words)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count("as with a learning rate that is far too high: from here on no checkpoint is removed") == 1
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert len(kept) >= 5 and kept[-1] == "step-00000024"


def test_a_collapsed_codebook_keeps_the_checkpoints_from_before(tmp_path):
    """All images are one colour: a single code is used, and the run says so at its first evaluation."""
    np.savez(tmp_path / "images.npz", images=np.full((24, 20, 18, 3), 90, np.uint8), labels=np.arange(24) % 3)
    words = vq_options(tmp_path / "images.npz", tmp_path / "run", "semantic", 8, "--codebook-init", "uniform", "--eval-every", 2,
                       "--revive-every", 0, "--codebook-sizes", 8, 16, "--keep-checkpoints", 1, "--checkpoint-every", 2)
    call(vq_train.main, *words)
    assert "a codebook is used to 12.5%: from here on no checkpoint is removed" in (tmp_path / "run" / "log.txt").read_text()
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 4


def test_a_run_folder_is_used_by_one_training(codes, tmp_path, capsys):
    """Two trainings in one folder would write every line twice and each other's checkpoints."""
    folder = tmp_path / "run"
    folder.mkdir()
    held = lock_folder(folder, "--run-dir", "training")
    (folder / ".lock").write_text("n0-0-17")
    with pytest.raises(SystemExit) as stopped:
        call(train_c2i.main, *options(codes, folder, data_parallel="none"))
    assert stopped.value.code == 2 and "in use by another training (n0-0-17" in capsys.readouterr().err
    held.close()
    call(train_c2i.main, *options(codes, folder, data_parallel="none", steps=1))


def test_a_full_disk_is_one_sentence_and_the_run_carries_on(codes, tmp_path, reference):
    """A limit on the size of files stands for the full disk: no half checkpoint, and after it is lifted nothing is lost."""
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))  # two million bytes: less than a checkpoint

    words = [sys.executable, TRAIN, *options(codes, tmp_path / "run", data_parallel="none")]
    done = subprocess.run(words, cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
                          preexec_fn=limited)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error:"), done.stderr
    assert "cannot be written" in done.stderr.splitlines()[-1] and "File too large" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and not list((tmp_path / "run" / "checkpoints").iterdir())
    command(TRAIN, *words[2:])
    assert losses(tmp_path / "run") == pytest.approx(reference, abs=1e-6)


def test_a_signal_is_not_lost_where_python_drops_exceptions(tmp_path):
    """One that arrives in a `__del__`, whose exceptions are ignored, ends the process all the same, without a traceback."""
    code = ("import os, signal, time\n"
            "from utils.config import run_main\n"
            "class Slow:\n"
            "    def __del__(self):\n"
            "        signal.raise_signal(signal.SIGTERM)\n"
            "def main():\n"
            "    Slow()\n"
            "    time.sleep(60)\n"
            "run_main(main)\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (143, "")
