"""Steps of an experiment: named by their content, done once, in order of need, ended and carried on with."""

import dataclasses
import logging
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest

from scripts.paper.steps import Made, Own, Runner, Step, in_order
from tests.conftest import REPOSITORY
from utils.config import UserError

# A command: notes its start in LOG and does what its other words say.
TOOL = """
import os, pathlib, signal, sys, time
log, folder, name, *acts = sys.argv[1:]
log = pathlib.Path(log)
folder = pathlib.Path(folder)
running = log.with_name(f"running-{name}")
def note(text):
    with log.open("a") as file:
        file.write(text + "\\n")
others = [path.name for path in log.parent.glob("running-*")]
running.touch()
note(f"{name} beside {len(others)}")
for act in acts:
    if act == "fail" and not log.with_name("mended").exists():
        running.unlink()
        sys.exit("the disk is on fire")
    if act.startswith("meet="):  # goes on only when the other one runs
        while not log.with_name(f"running-{act[5:]}").exists():
            time.sleep(0.01)
        time.sleep(0.3)
    if act == "last" and not log.with_name("mended").exists():  # until a signal comes
        asked = []
        signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
        log.with_name("ready").touch()
        while not asked:
            time.sleep(0.01)
        note(f"{name} told")
        sys.exit(143)
running.unlink()
(folder / "made.json").write_text('{"words": %d}' % len(acts))
"""


@pytest.fixture
def step(tmp_path):
    """A function that gives a step of the tool: its name, what it reads, further words, further fields."""
    (tmp_path / "tool.py").write_text(TOOL)

    def made(name: str, *needs: Step, words=(), **fields) -> Step:
        reads = tuple(Made(need, "made.json") for need in needs)
        command = (tmp_path / "tool.py", tmp_path / "log", Own(), name, *words, *reads)
        return Step(tmp_path / "out", "tool", name, command, **fields)

    return made


def started(tmp_path) -> list[str]:
    return (tmp_path / "log").read_text().splitlines() if (tmp_path / "log").exists() else []


def test_a_folder_is_named_by_the_command_and_what_it_reads(step):
    """Another option anywhere upstream is another result, which must not be taken for this one; the same one is shared."""
    last = step("last", step("middle", step("first", words=["--lr", 1])))
    again = step("last", step("middle", step("first", words=["--lr", 1])))
    other = step("last", step("middle", step("first", words=["--lr", 2])))
    assert last.folder == again.folder and last.folder != other.folder
    assert len({each.folder for each in in_order([last, again, other])}) == len(in_order([last, again, other])) == 6
    assert last.folder.name.startswith("last-") and str(last.words[4].step.folder) in " ".join(last.command())


def test_where_everything_lies_does_not_change_a_name(step, tmp_path):
    """A folder that is moved, or written on another machine, is found again."""
    first = step("first")
    assert first.identity == dataclasses.replace(first, root=tmp_path / "elsewhere").identity


def test_a_step_is_done_once_and_what_it_reads_before(step, tmp_path, caplog):
    """Two tables share a tokenizer: it must be there before either, and be trained once; the log says how far it is."""
    caplog.set_level(logging.INFO)
    shared = step("shared")
    Runner().run([step("one", shared), step("two", shared)])
    Runner().run([step("one", shared), step("three", shared)])
    assert [line.split()[0] for line in started(tmp_path)] == ["shared", "one", "two", "three"]
    assert shared.json("made.json") == {"words": 0} and shared.seconds > 0
    assert "[1/3] tool shared" in caplog.text and "[3/3] tool three" in caplog.text


def test_a_failing_command_is_named_with_its_last_words(step, tmp_path):
    """Hours in, the one line that says what went wrong must not have to be searched for; mended, the same call carries on."""
    bad = step("bad", step("good"), words=["fail"])
    with pytest.raises(UserError, match=r"tool bad failed, see .*output.txt, which ends with: the disk is on fire"):
        Runner().run([bad, step("after", bad), step("later")])
    assert [line.split()[0] for line in started(tmp_path)] == ["good", "bad"] and not bad.done
    (tmp_path / "mended").touch()
    Runner().run([bad, step("after", bad)])
    assert [line.split()[0] for line in started(tmp_path)] == ["good", "bad", "bad", "after"]


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGINT, 130)])
def test_a_signal_reaches_the_command_and_nothing_follows(step, tmp_path, number, code):
    """A training left behind would hold the GPU; the same call afterwards carries on with it."""
    (tmp_path / "driver.py").write_text(f"""
import sys
sys.path.insert(0, {str(REPOSITORY)!r})
from pathlib import Path
from scripts.paper.steps import Own, Runner, Step
root = Path({str(tmp_path)!r})
def step(name, *words, after=()):
    return Step(root / "out", "tool", name, (root / "tool.py", root / "log", Own(), name, *words), after=after)
endless = step("endless", "last")
Runner().run([endless, step("next", after=(endless,))])
""")
    words = [sys.executable, str(tmp_path / "driver.py")]
    if number == signal.SIGUSR1:  # the tool, as a Python that still imports, knows TERM only
        (tmp_path / "tool.py").write_text(TOOL.replace("signal.SIGTERM", "signal.SIGUSR1"))
    process = subprocess.Popen(words)
    while not (tmp_path / "ready").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(60) == code
    assert [line.split()[1] for line in started(tmp_path)] == ["beside", "told"]  # it was waited for
    (tmp_path / "mended").touch()
    (tmp_path / "running-endless").unlink()
    assert subprocess.run(words).returncode == 0
    assert [line.split()[0] for line in started(tmp_path)] == ["endless", "endless", "endless", "next"]


def test_workers_run_side_by_side_but_not_beside_what_measures_time(step, tmp_path):
    """A rate measured beside another training is not one; all the rest would waste a machine if it were done in turn."""
    pair = [step("left", words=["meet=right"]), step("right", words=["meet=left"])]
    Runner(workers=2).run([step("rate", alone=True), *pair, step("late", alone=True)])
    beside = {line.split()[0]: int(line.split()[2]) for line in started(tmp_path)}
    assert beside["rate"] == beside["late"] == 0 and sorted((beside["left"], beside["right"])) in ([0, 1], [1, 1])


def test_dry_prints_in_order_of_need_and_runs_nothing(step, tmp_path, capsys):
    """What would be run, ready to be pasted: a command before what reads its files, each once."""
    first = step("first", words=["two words"])
    Runner(dry=True).run([step("last", step("middle", first)), first])
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert [line[4] for line in lines] == ["first", "middle", "last"] and lines[0][5] == "two words"
    assert lines[1][-1] == str(first.path("made.json")) and not (tmp_path / "out").exists()
    Runner().run([first])
    Runner(dry=True).run([first])
    assert not capsys.readouterr().out


def test_each_worker_has_a_gpu_or_a_share_of_the_threads():
    """Two trainings on one GPU, or with all threads each, would slow each other down unnoticed."""
    assert [Runner(3, gpus=2).environment(worker)["CUDA_VISIBLE_DEVICES"] for worker in range(3)] == ["0", "1", "0"]
    threads = len(os.sched_getaffinity(0))
    assert Runner(2).environment(1)["OMP_NUM_THREADS"] == str(max(threads // 2, 1))
    assert Runner(2).environment(0, alone=True)["OMP_NUM_THREADS"] == str(threads)
    assert Runner(1, gpus=2).environment(0) == dict(os.environ) == Runner(1).environment(0)
