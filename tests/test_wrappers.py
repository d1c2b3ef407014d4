"""Scripts that run many commands: a signal reaches the one that runs, nothing follows, and the same script carries on."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

# Takes the place of Python: notes which script it was to start, and makes the files that the scripts look for.  SLOW names the
# start (script, number) that goes on until a signal comes.
STANDIN = """
import json, os, pathlib, signal, sys, time
if sys.argv[1] in ("-", "-c"):
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
name, started = os.path.basename(sys.argv[1]), pathlib.Path(os.environ["STARTED"])
if name == "reproduce.py":  # starts what it starts by the stand-in
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
with started.open("a") as file:
    file.write(name + "\\n")
if os.environ.get("SLOW") == f"{name} {started.read_text().split().count(name)}":
    mode, asked = os.environ["MODE"], []
    if mode != "importing":  # a signal finds no handlers yet
        for each in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(each, lambda number, frame: asked.append(number))
    started.with_name("ready").touch()
    while not asked:
        time.sleep(0.01)
    time.sleep(0.5)  # a checkpoint is written
    started.with_name("ended").touch()
    if mode != "just done":  # it had nothing left to do when it was asked
        sys.exit({signal.SIGINT: 130}.get(asked[0], 143) if mode == "running" else 2)
for option, value in zip(sys.argv, sys.argv[1:]):
    if option == "--run-dir":
        pathlib.Path(value).mkdir(parents=True, exist_ok=True)
        pathlib.Path(value, "metrics.jsonl").write_text(json.dumps({"images_per_second": 64.0}))
    elif option in ("--out", "--json"):
        pathlib.Path(value).parent.mkdir(parents=True, exist_ok=True)
        pathlib.Path(value).write_text('{"samples": {}}' if value.endswith(".json") else "")
        if value.endswith(".png"):
            pathlib.Path(value).with_suffix(".json").touch()
"""
WRAPPERS = {
    "quickstart": ["quickstart.sh"], "cifar10": ["cifar10.sh", "train.npz", "test.npz", "vgg.pth"],
    "two stages": ["tokenizer/train_dual_vq.sh", "--data-path", "d"],
    "table 8, toy": ["paper/run.sh", "table8", "--scale", "toy", "--out", "out"],
    "table 6": ["paper/run.sh", "table6", "--epochs", "2", "--data-path", ".", "--val-path", ".", "--reference", ".", "--out",
                "out"],
    "figure 6": ["paper/run.sh", "figure6", "--scale", "toy", "--out", "out"],
}
CASES = [
    # wrapper, the start that is interrupted, signal, whether the whole process group gets it
    ("quickstart", "classifier.py 2", "TERM", False), ("quickstart", "vq_train.py 1", "TERM", False),
    ("quickstart", "train_c2i.py 1", "USR1", False), ("quickstart", "vq_train.py 2", "INT", True),
    ("quickstart", "sample_c2i.py 1", "INT", True), ("quickstart", "vq_train.py 2", "INT", False),
    ("cifar10", "vq_train.py 2", "TERM", False), ("cifar10", "sample_c2i.py 1", "TERM", False),
    ("two stages", "vq_train.py 1", "INT", False), ("table 8, toy", "classifier.py 1", "TERM", False),
    ("table 8, toy", "train_c2i.py 1", "TERM", False),  # measures the rate
    ("table 8, toy", "train_c2i.py 2", "INT", True), ("table 8, toy", "judge.py 2", "USR1", False),
    ("table 6", "vq_train.py 1", "TERM", False), ("table 6", "train_c2i.py 2", "TERM", False),  # equal times are measured
    ("figure 6", "guidance_map.py 1", "TERM", False),
]


class Wrapper:
    """One wrapper in a folder of its own, with the stand-in for Python."""

    def __init__(self, name: str, folder: Path) -> None:
        self.folder, self.words = folder, ["bash", str(REPOSITORY / "scripts" / WRAPPERS[name][0]), *WRAPPERS[name][1:]]
        python = folder / "python"
        python.write_text(f'#!/bin/sh\nexec {sys.executable} -SE {folder}/standin.py "$@"\n')
        python.chmod(0o755)
        (folder / "standin.py").write_text(STANDIN)
        kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME")}
        self.environment = kept | {"PYTHON": str(python), "REQUIREMENTS_MET_BY": str(python), "OUT": str(folder / "out"),
                                   "STARTED": str(folder / "started"), "NPROC": "1"}

    def start(self, **variables: str) -> subprocess.Popen:
        """The wrapper under way, in a process group of its own, with Ctrl-C not ignored, as from a terminal."""
        return subprocess.Popen(self.words, cwd=self.folder, env=self.environment | variables, stderr=subprocess.PIPE,
                                stdout=subprocess.DEVNULL, text=True, start_new_session=True,
                                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))

    def interrupt(self, slow: str, name: str, group: bool, mode: str = "running") -> tuple[int, str]:
        """Exit code and standard error of a wrapper that gets a signal while `slow` runs."""
        for name_of_file in ("ready", "ended"):
            (self.folder / name_of_file).unlink(missing_ok=True)
        process = self.start(SLOW=slow, MODE=mode)
        while not (self.folder / "ready").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        (os.killpg if group else os.kill)(process.pid, getattr(signal, f"SIG{name}"))
        try:
            process.wait(20)
            assert mode == "importing" or (self.folder / "ended").exists()  # the wrapper waits for it
            error = process.communicate(timeout=20)[1]
        finally:
            with suppress(ProcessLookupError):  # what the wrapper has left behind
                os.killpg(process.pid, signal.SIGKILL)
        return process.returncode, error

    def started(self) -> list[str]:
        """Scripts started so far."""
        return (self.folder / "started").read_text().split()


@pytest.mark.parametrize("name, slow, number, group", CASES)
def test_a_signal_ends_the_command_that_runs_and_the_script(tmp_path, name, slow, number, group):
    """`kill` of the script must not leave a training behind, nor go on with the next; Ctrl-C reaches all at once."""
    wrapper = Wrapper(name, tmp_path)
    code, error = wrapper.interrupt(slow, number, group)
    assert code == (130 if number == "INT" else 143) and "Traceback" not in error and "line " not in error, error
    done = wrapper.started()
    script, count = slow.split()
    assert done[-1] == script and done.count(script) == int(count)
    again = wrapper.start()
    error = again.communicate(timeout=60)[1]
    assert again.returncode == 0, error
    assert script in wrapper.started()[len(done):] and not list((tmp_path / "out").rglob("*.new"))


@pytest.mark.parametrize("mode, number, group, code", [
    ("just done", "TERM", False, 143), ("just done", "INT", True, 130), ("importing", "TERM", False, 143),
    ("importing", "USR1", False, 143), ("importing", "INT", True, 130), ("importing", "INT", False, 130),
    ("failing", "TERM", False, 2)])
@pytest.mark.parametrize("slow", ["classifier.py 1", "vq_train.py 1"])
def test_nothing_follows_a_command_that_was_asked_to_stop(tmp_path, slow, mode, number, group, code):
    """It may have been done anyway, or not have begun; a mistake that it has met stays one."""
    wrapper = Wrapper("quickstart", tmp_path)
    found, error = wrapper.interrupt(slow, number, group, mode)
    assert found == code and "Traceback" not in error, error
    assert wrapper.started()[-1] == slow.split()[0] and wrapper.started().count(slow.split()[0]) == 1


@pytest.mark.parametrize("script", ["quickstart.sh", "text_demo.sh"])
def test_a_script_without_options_says_so(tmp_path, script):
    """`--out X` was ignored without a word, and twelve minutes later everything lay elsewhere."""
    def run(*words: str) -> subprocess.CompletedProcess:
        environment = {"PATH": os.environ["PATH"], "PYTHON": "/bin/false", "OUT": str(tmp_path / "out")}
        return subprocess.run(["bash", str(REPOSITORY / "scripts" / script), *words], cwd=tmp_path, env=environment,
                              capture_output=True, text=True)

    refused = run("--out", "X")
    assert refused.returncode == 2 and refused.stdout == "" and refused.stderr == (
        f"error: {script} takes no options but was given '--out': set OUT and SCALE before the command, for example "
        f"OUT=runs/trial SCALE=0.02 bash {REPOSITORY}/scripts/{script}.\n")
    for words in (["--help"], ["-h"]):
        shown = run(*words)
        assert (shown.returncode, shown.stderr) == (0, "")
        assert "  OUT=runs/" in shown.stdout and "  SCALE=1" in shown.stdout and "source" not in shown.stdout
        assert not shown.stdout.startswith("#")
    assert not (tmp_path / "out").exists()


def test_out_is_a_path_of_the_folder_that_one_is_in(tmp_path):
    """`OUT=trial bash /path/to/quickstart.sh` made `trial` in the repository."""
    wrapper = Wrapper("quickstart", tmp_path)
    done = wrapper.start(OUT="trial")
    assert done.wait(60) == 0 and (tmp_path / "trial" / "phases" / "gpt").exists() and not (REPOSITORY / "trial").exists()


def test_an_echo_does_not_cut_tidying_short(tmp_path):
    """Ctrl-C comes by the terminal and by the script: the second would leave the temporary file of which the first was told."""
    (tmp_path / "own.py").write_text(f"""
import sys, time
sys.path.insert(0, {str(REPOSITORY)!r})
from pathlib import Path
from utils.config import run_main

def main():
    try:
        Path("ready").touch()
        time.sleep(60)
    finally:
        time.sleep(0.5)
        Path("ready").unlink()

run_main(main)
""")
    process = subprocess.Popen([sys.executable, "own.py"], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    assert process.communicate(timeout=20)[1] == "" and process.returncode == 143 and not (tmp_path / "ready").exists()


def test_the_quickstart_carries_on_from_a_full_disk(tmp_path):
    """A clock that was written by half would be a syntax error of every later try."""
    wrapper, phases = Wrapper("quickstart", tmp_path), tmp_path / "out" / "phases"
    phases.mkdir(parents=True)
    (phases / ".judge.new").symlink_to("/dev/full")
    assert wrapper.interrupt("classifier.py 2", "TERM", False) == (143, "== teacher\n== judge\n")
    full = wrapper.start()
    error = full.communicate(timeout=60)[1].splitlines()
    assert full.returncode == 2 and error == ["== judge", f"error: {phases}/.judge cannot be written: make space; the same "
                                                          "command then carries on."]
    (phases / ".judge.new").unlink()
    assert wrapper.start().wait(60) == 0 and int((phases / "judge").read_text()) < 20


def test_the_quickstart_counts_the_seconds_of_all_tries(tmp_path):
    """The table of times would be that of the last try alone."""
    wrapper, phases = Wrapper("quickstart", tmp_path), tmp_path / "out" / "phases"
    assert wrapper.interrupt("train_c2i.py 1", "TERM", False)[0] == 143
    assert int((phases / ".gpt").read_text()) < 20 and not (phases / "gpt").exists()
    (phases / ".gpt").write_text("1000\n")
    assert wrapper.interrupt("train_c2i.py 2", "INT", True)[0] == 130
    assert 1000 <= int((phases / ".gpt").read_text()) < 1020
    assert wrapper.start().wait(60) == 0
    assert 1000 <= int((phases / "gpt").read_text()) < 1020 and not list(phases.glob(".*"))
    assert wrapper.started().count("train_c2i.py") == 3 and wrapper.started().count("classifier.py") == 2
