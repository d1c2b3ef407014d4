"""No space: each part by itself, and a small share of `scripts/full_disk.py`."""

import errno
import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tqdm import tqdm

from scripts import full_disk
from tests.conftest import REPOSITORY, call, command
from tests.test_fuzz import save_images
from utils.config import UserError, file_error
from utils.distributed import setup
from utils.files import check_writable, replacing
from utils.logs import set_up_logging
from utils.signals import LAUNCHED

COMMANDS = ("train", "sample", "extract", "export", "evaluate", "report")
FULL = Path("/dev/full")  # every write to it finds no space


def test_a_share_of_the_full_disks_is_refused_and_carried_on(tmp_path):
    """One sentence wherever space ends; afterwards the same command gives what an undisturbed run gives, and leaves nothing."""
    done = command("scripts/full_disk.py", "--cases", 2 * len(COMMANDS), "--seed", 5, "--commands", *COMMANDS, "--out",
                   tmp_path / "cases.json", check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    cases = json.loads((tmp_path / "cases.json").read_text())["cases"]
    assert {case["command"] for case in cases} == set(COMMANDS)
    assert sum(case["outcome"] == "refused in one sentence" for case in cases) > len(COMMANDS)


def test_only_a_small_file_system_is_filled(tmp_path, monkeypatch):
    """The system's own disk must not be filled by mistake."""
    with pytest.raises(UserError, match="is no mount point"):
        full_disk.check_disk(tmp_path)
    monkeypatch.setattr(full_disk, "LARGEST_DISK", 0)
    with pytest.raises(UserError, match="all of which would be filled"):
        full_disk.check_disk(Path("/"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("full", [("stdout",), ("stdout", "stderr")])
def test_output_on_a_full_disk_ends_with_the_exit_code_of_a_mistake(tmp_path, full):
    """Logs lie on the same disk: the interpreter's own end would be another code, and nobody might start the command again."""
    save_images(tmp_path / "data" / "a")
    words = [sys.executable, "tokenizer/validation/val_ddp.py", "--data-path", tmp_path / "data", "--image-size", "8",
             "--num-workers", "0", "--out", tmp_path / "x.npz"]
    with FULL.open("w") as nowhere:
        streams = {name: nowhere if name in full else subprocess.PIPE for name in ("stdout", "stderr")}
        done = subprocess.run(words, cwd=REPOSITORY, env=os.environ | {"PYTHONUNBUFFERED": ""}, text=True, **streams)
    assert done.returncode == 2
    if full == ("stdout",):
        assert done.stderr.splitlines()[-1].startswith("error: standard output cannot be") and "Traceback" not in done.stderr


def test_a_log_that_cannot_be_written_ends_the_run(capsys):
    """logging prints a traceback for every line, and the run goes on without a log."""
    def main() -> None:
        set_up_logging(setup("cpu"), FULL)
        logging.getLogger("run").info("step 1")

    with pytest.raises(SystemExit) as stopped:
        call(main)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.splitlines()[-1].startswith("error: /dev/full cannot be") and "Logging" not in error


def test_a_thread_leaves_the_full_disk_to_the_main_one(capsys):
    """TensorBoard's thread raises what it hands over: two tracebacks instead of a sentence."""
    def fail() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def main() -> None:
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
        raise UserError("the run ends.")

    with pytest.raises(SystemExit):
        call(main)
    assert capsys.readouterr().err == "error: the run ends.\n"


def test_the_sentence_has_a_line_of_its_own(capsys):
    """Behind a progress bar nobody looks for it."""
    def main() -> None:
        bar = tqdm(total=3, desc="sample")
        raise UserError(f"no space after {bar.n} images.")

    with pytest.raises(SystemExit):
        call(main)
    assert capsys.readouterr().err.endswith("\nerror: no space after 0 images.\n")


def test_one_of_several_processes_can_tell_without_its_error_file(capsys, monkeypatch):
    """torchrun keeps those files below /tmp, which may be what is full."""
    monkeypatch.setenv(LAUNCHED, "1")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(FULL))

    def main() -> None:
        raise UserError("no space.")

    with pytest.raises(SystemExit):
        call(main)
    assert capsys.readouterr().err == "error: no space.\n"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"),
                                   RuntimeError("unable to write to file </torch_1>: No space left on device (28)")])
def test_a_failed_write_names_its_file(tmp_path, error):
    """The system does not say which file a write was to; the reader may be shown no name that is gone a moment later."""
    with pytest.raises(OSError) as raised, replacing(tmp_path / "x.json") as aside:
        aside.write_text("half")
        raise error
    assert raised.value.filename == str(tmp_path / "x.json") and raised.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made(tmp_path, monkeypatch, capsys):
    """Another folder of the same disk would not help; TensorBoard names files in bytes."""
    def full(path: Path, *_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", os.fsencode(path))

    with monkeypatch.context() as patched, pytest.raises(UserError, match="--out .*x cannot be written .*: make space."):
        patched.setattr(Path, "mkdir", full)
        check_writable(tmp_path / "x", "--out")
    with pytest.raises(SystemExit):
        call(lambda: full(tmp_path / "x"))
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'x'} cannot be read or written")


def test_torch_hides_the_cause():
    """Its own message is of a position in a zip file; other errors keep their traceback."""
    def raised(cause: Exception) -> Exception:
        try:
            try:
                raise cause
            except type(cause):
                raise RuntimeError("unexpected pos 704 vs 598")  # noqa: B904, as torch does
        except RuntimeError as error:
            return error

    full = OSError(errno.ENOSPC, "No space left on device")
    assert file_error(raised(full)) is full
    assert file_error(raised(ValueError())) is None and file_error(ValueError("No space left on device")) is None
