"""What one sees of a command: dates, progress that suits a file, a first line that says all, and no traces of refusals."""

import fcntl
import logging
import os
import re
import struct
import sys
import termios
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from autoregressive.sample import sample_c2i
from autoregressive.train import train_c2i
from tests.conftest import call, losses
from tests.test_bad_input import refused, vq
from tests.test_codes import write_codes
from tests.test_npz import ALONE
from tests.test_repository import SOURCES, relative
from tests.test_train import gpt_options
from tokenizer.tokenizer_image import vq_train
from utils import devices, logs
from utils.config import UserError, run_main, when_refused
from utils.distributed import Processes
from utils.files import check_writable

DATED = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ")


@pytest.fixture
def clock(monkeypatch):
    """The seconds that `logs` sees, to be set by the test."""
    now = [0.0]
    monkeypatch.setattr(logs.time, "monotonic", lambda: now[0])
    return now


def lines_of(bar, clock, seconds: int, caplog) -> list[str]:
    """What is said of work of one thing a second."""
    caplog.set_level(logging.INFO)
    with bar:
        for second in range(seconds):
            clock[0] = second + 1.0
            bar.update()
    return [record.getMessage() for record in caplog.records]


def test_a_file_gets_a_line_now_and_then(clock, caplog):
    """A night of bars that are drawn every second hides the one warning in it."""
    found = lines_of(logs.progress(1000, "extract", "images", ALONE), clock, 1000, caplog)
    assert found == [f"extract: {second} of 1000 images, 1 a second, {left} left" for second, left in (
        (30, "0:16:10"), (60, "0:15:40"), (120, "0:14:40"), (240, "0:12:40"), (480, "0:08:40"), (960, "0:00:40"))] + [
        "extract: 1000 of 1000 images, in 0:16:40"]
    caplog.clear()
    clock[0] = 0.0
    later = lines_of(logs.progress(20_000, "extract", "images"), clock, 9000, caplog)
    assert [int(line.split()[1]) for line in later[5:]] == [960, 1920, 3720, 5520, 7320, 9000]  # half an hour apart at most


def test_a_resumed_count_goes_on_at_its_own_rate(clock, caplog):
    """What an earlier process did is no speed of this one."""
    found = lines_of(logs.progress(130, "run", "steps", ALONE, initial=90), clock, 40, caplog)
    assert found == ["run: 120 of 130 steps, 1 a second, 0:00:10 left", "run: 130 of 130 steps, in 0:00:40"]


def test_short_work_and_other_processes_say_nothing(clock, caplog):
    """The result is enough of an account of ten seconds, and one process enough of all."""
    assert not lines_of(logs.progress(20, "sample", "images", ALONE), clock, 20, caplog)
    clock[0] = 0.0
    other = Processes(1, 2, 1, ALONE.device)
    assert not lines_of(logs.progress(1000, "sample", "images", other), clock, 1000, caplog)


def test_every_bar_is_the_same_helper():
    """A command that draws bars of its own fills files again."""
    own = [relative(path) for path in SOURCES if re.search(r"\btqdm\(", path.read_text())]
    assert own == ["utils/logs.py"]


def test_a_training_into_a_file(tmp_path, capfd, recwarn):
    """No bars and cursor codes, dates in both logs, one line that says all first, nothing of loader processes but one line."""
    words = gpt_options(write_codes(tmp_path / "codes"), tmp_path / "run", steps=3, data_parallel="none", num_workers=500,
                        val_code_path=write_codes(tmp_path / "held", images=21, seed=1), eval_every=1)
    call(train_c2i.main, *words)
    said = capfd.readouterr().err
    assert "\r" not in said and "\x1b" not in said and not [each for each in recwarn if "DataLoader" in str(each.message)]
    assert all(DATED.match(line) for line in said.splitlines()), said
    assert said.count("instead of --num-workers 500") == 1
    first, *others = (tmp_path / "run" / "log.txt").read_text().splitlines()
    assert re.fullmatch(DATED.pattern + r"train_c2i: GPT-tiny: 48 images of 3 classes, \d\.\dM parameters, 3 steps of 8 images "
                        r"\(0\.5 epochs\), 1 process \(none\) on cpu", first), first
    assert all(DATED.match(line) for line in others) and sum("evaluation:" in line for line in others) == 3


def test_a_tokenizer_says_first_what_it_trains(images_folder, tmp_path):
    """Images, classes, parameters, steps and device, as a GPT does: a wrong folder shows in the first line."""
    call(vq_train.main, *vq(images_folder, tmp_path / "run", "--codebook-sizes", 8, 16, "--steps", 1))
    first = (tmp_path / "run" / "log.txt").read_text().splitlines()[0]
    assert re.fullmatch(DATED.pattern + r"vq_train: VQ-8-small, stage semantic: 24 images of 3 classes, \d\.\dM parameters, "
                        r"1 steps of 4 images \(0\.167 epochs\), 1 process on cpu", first), first


def test_no_more_loader_processes_than_cpus(monkeypatch, caplog):
    """PyTorch warned of it twice for each loader, in words that name no option."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2}, raising=False)
    devices.loader_processes.cache_clear()
    assert [devices.loader_processes(wanted) for wanted in (0, 2, 3, 8, 8)] == [0, 2, 3, 3, 3]
    assert [record.getMessage() for record in caplog.records] == [
        "3 loader processes, one for each CPU that this process may use, instead of --num-workers 8"]
    devices.loader_processes.cache_clear()
    with pytest.warns(UserWarning, match="This DataLoader will create 4"):  # what is avoided still exists
        DataLoader([1], num_workers=4)


def test_a_message_has_a_line_of_its_own_in_a_terminal(monkeypatch):
    """Glued to a bar it is read by nobody."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with open(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        logs.set_up_logging(ALONE)
        with logs.progress(3, "work", "steps", ALONE) as bar:
            bar.refresh()
            logging.getLogger("x").warning("half way")
            logging.getLogger().handlers[0]._process = -1  # as a process that was forked from the one with the bar
            logging.getLogger("x").warning("in a loader")
            bar.update(3)
        logging.getLogger().handlers.clear()
        terminal.flush()
        os.set_blocking(ours, False)
        shown = os.read(ours, 65536).decode().replace("\r\n", "\n")
    os.close(ours)
    assert "work:   0%" in shown and "work: 100%" in shown
    before, after = shown.split("x: half way")
    assert after.startswith("\n") and DATED.fullmatch(re.split(r"[\r\n]", before)[-1])
    assert re.search(r"\r\x1b\[K" + DATED.pattern + "x: in a loader\n", after)


# --- refused and finished ------------------------------------------------------------------------------------------------------


def test_a_refused_training_leaves_no_folder(tmp_path, capsys):
    """An empty run among others is taken for one that was lost; what was there before stays."""
    codes = write_codes(tmp_path / "codes")
    call(train_c2i.main, *gpt_options(codes, tmp_path / "small", steps=1, data_parallel="none"))
    words = dict(gpt_model="GPT-small", init_from=tmp_path / "small", data_parallel="none")
    assert "--init-from" in refused(capsys, train_c2i.main, *gpt_options(codes, tmp_path / "new" / "run", **words))
    assert not (tmp_path / "new").exists()
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "notes.txt").write_text("mine")
    refused(capsys, train_c2i.main, *gpt_options(codes, tmp_path / "kept", **words))
    assert (tmp_path / "kept" / "notes.txt").read_text() == "mine"
    before = sorted(path.name for path in (tmp_path / "small").iterdir())
    assert "--lr-schedule" in refused(capsys, train_c2i.main, *gpt_options(codes, tmp_path / "small", steps=2), "--lr-schedule",
                                      "cosine")
    assert sorted(path.name for path in (tmp_path / "small").iterdir()) == before and "gpt.safetensors" in before


def test_a_tokenizer_refused_at_its_first_step_leaves_no_folder(tmp_path, images_folder, capsys):
    """The start of the codebooks comes after the log has begun."""
    words = vq(images_folder, tmp_path / "new" / "run", "--codebook-init", "kmeans", "--kmeans-vectors", 8)
    assert "--kmeans-vectors" in refused(capsys, vq_train.main, *words)
    assert not (tmp_path / "new").exists()


def test_a_refused_sampler_leaves_no_folder(models, tmp_path, capsys):
    """The place of the picture is tried before the models are loaded."""
    refused(capsys, sample_c2i.main, "--gpt-ckpt", models[0], "--vq-ckpt", models[1], "--out", tmp_path / "new" / "x" / "y.png",
            "--classes", 7, "--cfg-scale", 2.0, 3.0)
    assert not (tmp_path / "new").exists()


def test_only_a_refusal_undoes(tmp_path, capsys):
    """What a command has made is kept where it ends otherwise, and what is not empty is kept always."""
    undone = []

    def ends(error: BaseException | None, file: bool = False):
        def main() -> None:
            check_writable(tmp_path / "a" / "b", "--out")
            when_refused(lambda: undone.append(1))
            if file:
                (tmp_path / "a" / "x").touch()
            if error:
                raise error
        return main

    call(ends(None))
    with pytest.raises(KeyError):
        run_main(ends(KeyError()))
    assert (tmp_path / "a" / "b").is_dir() and not undone
    (tmp_path / "a" / "b").rmdir()
    with pytest.raises(SystemExit):
        run_main(ends(UserError("no."), file=True))
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["x"] and undone == [1]


def test_a_finished_run_says_so(tmp_path):
    """`step 6 of 2` is no step."""
    codes, words = write_codes(tmp_path / "codes"), dict(data_parallel="none")
    call(train_c2i.main, *gpt_options(codes, tmp_path / "run", steps=6, **words))
    call(train_c2i.main, *gpt_options(codes, tmp_path / "run", steps=2, **words))
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "step-00000006 is of step 6, and 2 are asked for: this training is finished" in log
    assert "step 6 of 2" not in log and sorted(losses(tmp_path / "run")) == list(range(1, 7))


@pytest.mark.parametrize("words, seen, option", [
    (("--dropout", 0.2), "token_dropout 0.0", "--dropout"), (("--gpt-model", "GPT-small"), "dim 128", "--gpt-model"),
    (("--semantic-weight", 3), "semantic_weight 1.0", "--semantic-weight"), (("--qk-norm",), "qk_norm False", "--qk-norm"),
    (("--code-path", "other"), "tokenizer test", "--code-path")])
def test_what_differs_on_resume_is_told_by_its_option(tmp_path, capsys, words, seen, option):
    """A field of the configuration is nothing that one can type."""
    run = [*gpt_options(write_codes(tmp_path / "codes"), tmp_path / "run", steps=1, data_parallel="none"), "--device", "cpu"]
    call(train_c2i.main, *run)
    words = [write_codes(tmp_path / word, tokenizer=word) if word == "other" else word for word in words]
    sentence = refused(capsys, train_c2i.main, *run, *words)
    assert f"was made with {seen}, not with" in sentence
    assert f"choose another --run-dir, or give {option} as when this run was begun." in sentence
    assert "flags" not in (tmp_path / "run" / "options.json").read_text()


def test_a_rank_that_is_not_the_first_logs_warnings_alone(tmp_path):
    """Eight processes would say everything eight times, and write one file."""
    try:
        logs.set_up_logging(Processes(1, 2, 1, ALONE.device), Path(tmp_path / "log.txt"))
        assert logging.getLogger().level == logging.WARNING and not (tmp_path / "log.txt").exists()
    finally:
        logging.getLogger().handlers.clear()
