"""Images into npz files without losing finished rows (utils/image_store.py), and the reference npz (tokenizer/validation)."""

import errno
import json
import logging
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tokenizer.validation import val_ddp
from utils import row_shares
from utils.config import UserError
from utils.crops import center_crop
from utils.distributed import Processes
from utils.image_store import ImageStore, already_finished
from utils.images import open_images
from utils.npz import NPZ_ERRORS, array_header, array_keys, open_array

ROOT = Path(__file__).resolve().parents[1]
SHAPE = (10, 4, 5, 3)
IDENTITY = {"seed": 0, "scale": [1.5, 2.0]}
ALONE = Processes(0, 1, 0, torch.device("cpu"))
IMPORTS = ("import os, sys, numpy as np; from pathlib import Path; from tests.test_npz import ALONE; "
           "from utils.image_store import ImageStore\n")


def pixels(count: int = 10) -> np.ndarray:
    """uint8 [count, 4, 5, 3]"""
    return np.random.default_rng(0).integers(0, 256, (count, *SHAPE[1:]), dtype=np.uint8)


def filled(path: Path) -> ImageStore:
    """A store with all ten rows written."""
    store = ImageStore(path, SHAPE, IDENTITY, ALONE)
    store.write(np.arange(10), pixels())
    return store


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save, mapped", [(np.savez, True), (np.savez_compressed, False)])
def test_arrays_open_without_being_read(tmp_path: Path, save: Callable[..., None], mapped: bool) -> None:
    """A reference of 10 GB must open at once; what is stored uncompressed is mapped."""
    arrays = {"a": pixels(), "b": np.asfortranarray(np.arange(12.0).reshape(3, 4)), "empty": np.zeros((0, 3))}
    save(tmp_path / "x.npz", **arrays)
    assert array_keys(tmp_path / "x.npz") == ["a", "b", "empty"]
    assert array_header(tmp_path / "x.npz", "b") == ((3, 4), np.dtype(float))
    for key, value in arrays.items():
        assert np.array_equal(open_array(tmp_path / "x.npz", key), value)
    assert isinstance(open_array(tmp_path / "x.npz", "a"), np.memmap) == mapped
    with pytest.raises(KeyError):
        open_array(tmp_path / "x.npz", "c")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_python_objects_are_refused(tmp_path: Path, save: Callable[..., None]) -> None:
    """A pickle inside a downloaded npz could run anything."""
    save(tmp_path / "x.npz", a=np.array([{}, None]))
    with pytest.raises(NPZ_ERRORS):
        open_array(tmp_path / "x.npz", "a")


# --- the store -------------------------------------------------------------------------------------------------------


def test_rows_in_any_order_become_one_npz(tmp_path: Path) -> None:
    """np.load must read the result as if np.savez had written it, whatever order the rows came in."""
    path = tmp_path / "deep" / "out.npz"
    store = ImageStore(path, SHAPE, IDENTITY, ALONE)
    order = np.array([3, 4, 5, 9, 0, 2, 1, 8, 7, 6])
    for part in (order[:6], order[6:]):
        store.write(part, pixels()[part])
    assert not path.exists()
    assert store.finish(arr_1=np.arange(10), kind=np.array("samples")) == 10
    with np.load(path) as data:
        assert list(data) == ["arr_0", "arr_1", "kind"]
        assert np.array_equal(data["arr_0"], pixels()) and np.array_equal(data["arr_1"], np.arange(10))
        assert data["kind"] == "samples"
    assert isinstance(open_array(path, "arr_0"), np.memmap)  # uncompressed
    assert os.listdir(path.parent) == ["out.npz"]


def test_a_batch_is_written_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One system call a batch, not one an image, keeps the disk out of the sampler's way."""
    store = ImageStore(tmp_path / "out.npz", SHAPE, IDENTITY, ALONE)
    sizes, pwrite = [], os.pwrite

    def count(fd: int, data: memoryview, at: int) -> int:
        sizes.append(len(data))
        return pwrite(fd, data, at)

    monkeypatch.setattr(os, "pwrite", count)
    store.write(np.array([2, 3, 4, 7]), pixels()[:4])
    assert sizes == [4 * 60, 4 * 9]


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write may take fewer bytes than it was given, past 2 GB always; the rest must not be lost."""
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:7], at))
    filled(tmp_path / "out.npz").finish()
    assert np.array_equal(open_array(tmp_path / "out.npz", "arr_0"), pixels())


def test_images_are_written_before_they_are_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row marked as done without its pixels would be a black sample in the evaluation."""
    store = ImageStore(tmp_path / "out.npz", SHAPE, IDENTITY, ALONE)
    pwrite = os.pwrite

    def fail_on_images(fd: int, data: memoryview, at: int) -> int:
        if os.readlink(f"/proc/self/fd/{fd}").endswith(".values"):
            raise OSError(errno.EIO, "input/output error")
        return pwrite(fd, data, at)

    monkeypatch.setattr(os, "pwrite", fail_on_images)
    with pytest.raises(OSError):
        store.write(np.arange(2), pixels()[:2])
    assert len(store.missing()) == 10 and len(ImageStore(tmp_path / "out.npz", SHAPE, IDENTITY, ALONE).missing()) == 10


@pytest.mark.parametrize("suffix, row_bytes", [(".values", 60), (".rows", 9)])
@pytest.mark.parametrize("zeros", [False, True])
def test_a_torn_end_costs_its_rows_alone(tmp_path: Path, suffix: str, row_bytes: int, zeros: bool) -> None:
    """After a kill or a power failure the end of a file may be missing or zero: no such row may count as done."""
    filled(tmp_path / "out.npz").close()
    path = next((tmp_path / "out.partial").glob(f"*{suffix}"))
    whole = path.read_bytes()
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length] + bytes(len(whole) - length if zeros and suffix == ".rows" else 0))
        missing = ImageStore(tmp_path / "out.npz", SHAPE, IDENTITY, ALONE).missing()
        assert missing.tolist() == list(range(length // row_bytes, 10))
    path.write_bytes(whole[: 5 * row_bytes + 3])
    store = ImageStore(tmp_path / "out.npz", SHAPE, IDENTITY, ALONE)
    store.write(np.arange(5, 10), pixels()[5:])
    assert store.finish() == 10
    assert np.array_equal(open_array(tmp_path / "out.npz", "arr_0"), pixels())


def test_a_crash_costs_only_what_was_not_written(tmp_path: Path) -> None:
    """The same command after a crash carries on: finished rows are hours of a GPU."""
    code = IMPORTS + ("store = ImageStore(Path(sys.argv[1]), (10, 4, 5, 3), {'seed': 0, 'scale': (1.5, 2.0)}, ALONE)\n"
            "store.write(np.arange(2, 6), np.full((4, 4, 5, 3), 7, np.uint8)); store.mark_skipped(np.array([8]))\n"
            "os.kill(os.getpid(), 9)")
    path = tmp_path / "out.npz"
    assert subprocess.run([sys.executable, "-c", code, path], cwd=ROOT).returncode == -9
    store = ImageStore(path, SHAPE, IDENTITY, ALONE)
    assert store.missing().tolist() == [0, 1, 6, 7, 9]
    rows = store.missing()
    store.write(rows, pixels()[rows])
    assert store.finish() == 9
    expected = pixels()
    expected[2:6] = 7
    assert np.array_equal(open_array(path, "arr_0"), np.delete(expected, 8, 0))


def test_skipped_rows_leave_all_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image left out must take its label along, or every label after it is wrong; also across chunks."""
    monkeypatch.setattr(row_shares, "CHUNK_BYTES", 3 * 60)
    store = ImageStore(tmp_path / "out.npz", SHAPE, IDENTITY, ALONE)
    kept = np.array([0, 2, 3, 4, 5, 9])
    store.write(kept, pixels()[kept])
    store.mark_skipped(np.array([1, 6, 7, 8]))
    assert store.finish(arr_1=np.arange(10), kind=np.array("x")) == 6
    with np.load(tmp_path / "out.npz") as data:
        assert np.array_equal(data["arr_0"], pixels()[kept]) and data["arr_1"].tolist() == kept.tolist()


@pytest.mark.parametrize("identity, shape, sentence", [
    ({"seed": 1, "scale": [1.5, 2.0]}, SHAPE, "was begun with seed 0, not with 1 as now"),
    ({"seed": 0}, SHAPE, "was begun with scale [1.5, 2.0], not with None as now"),
    (IDENTITY, (11, 4, 5, 3), "was begun with shape [10, 4, 5, 3], not with [11, 4, 5, 3] as now"),
])
def test_another_identity_is_refused(tmp_path: Path, identity: dict[str, object], shape: Any,
                                     sentence: str) -> None:
    """Rows of two settings in one file would give a number that belongs to neither."""
    filled(tmp_path / "out.npz").close()
    with pytest.raises(UserError) as error:
        ImageStore(tmp_path / "out.npz", shape, identity, ALONE)
    assert str(error.value) == f"{tmp_path / 'out.partial'} {sentence}: delete it or change --out."


def test_a_damaged_identity_is_refused(tmp_path: Path) -> None:
    """A folder of that name which holds something else must not be written into."""
    filled(tmp_path / "out.npz").close()
    (tmp_path / "out.partial" / "identity.json").write_text("[")
    with pytest.raises(UserError, match="out.partial does not say with which options it was begun: delete it or change --out"):
        ImageStore(tmp_path / "out.npz", SHAPE, IDENTITY, ALONE)


def test_a_target_that_cannot_be_written_is_told_first(tmp_path: Path) -> None:
    """Not after an hour of sampling."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out .*file cannot be written \(.*\): give a folder you may write to"):
        ImageStore(tmp_path / "file" / "out.npz", SHAPE, IDENTITY, ALONE)
    with pytest.raises(UserError, match="--out '.*out.png' is not the name of an npz: give one that ends in .npz."):
        ImageStore(tmp_path / "out.png", SHAPE, IDENTITY, ALONE)
    (tmp_path / "dir.npz").mkdir()
    with pytest.raises(UserError, match="--out .*dir.npz is a folder, not a file: give the name of an npz inside it."):
        ImageStore(tmp_path / "dir.npz", SHAPE, IDENTITY, ALONE)


def test_a_full_disk_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user frees space and runs the same command: a traceback would not say so."""
    store = ImageStore(tmp_path / "out.npz", SHAPE, IDENTITY, ALONE)
    store.write(np.arange(3), pixels()[:3])

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UserError, match=r"does not fit on its disk \(No space left on device\): free space and run"):
        store.write(np.arange(3, 5), pixels()[3:5])
    assert store.missing().tolist() == list(range(3, 10))


def test_a_small_disk_is_mentioned_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                caplog: pytest.LogCaptureFixture) -> None:
    """Fifty thousand images need 20 GB while they are made; the user should know before the night."""
    usage = row_shares.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(row_shares.shutil, "disk_usage", lambda _: usage._replace(free=2_000_000_000))
    ImageStore(tmp_path / "out.npz", (50_000, 256, 256, 3), {}, ALONE)
    assert "needs 19.7 GB while it is made, and 2.0 GB are free" in caplog.text


def test_a_failed_finish_leaves_the_store_and_no_debris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash after the last step must not lose the samples, nor leave a half file of the final name."""
    store = filled(tmp_path / "out.npz")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="free space"):
        patch.setattr(os, "replace", fail)
        store.finish()
    assert os.listdir(tmp_path) == ["out.partial"]
    assert ImageStore(tmp_path / "out.npz", SHAPE, IDENTITY, ALONE).finish() == 10


def test_finish_refuses_gaps_and_arrays_of_another_length(tmp_path: Path) -> None:
    """A hole in the file reads as black images, and a short label array shifts every class."""
    store = ImageStore(tmp_path / "out.npz", SHAPE, IDENTITY, ALONE)
    store.write(np.arange(9), pixels()[:9])
    with pytest.raises(RuntimeError, match="1 of 10 rows are missing, the first is 9"):
        store.finish()
    store.write(np.array([9]), pixels()[9:])
    for arrays in ({"arr_1": np.arange(9)}, {"arr_0": np.arange(10)}):
        with pytest.raises(ValueError, match="neither a scalar nor an array of 10 rows"):
            store.finish(**arrays)


def test_nothing_readable_is_a_mistake_of_the_data(tmp_path: Path) -> None:
    """An empty reference would only fail later, inside the evaluation."""
    store = ImageStore(tmp_path / "out.npz", SHAPE, IDENTITY, ALONE)
    store.mark_skipped(np.arange(10))
    with pytest.raises(UserError, match="would hold no image because all 10 were skipped: check the images, then"):
        store.finish()


@pytest.mark.parametrize("rows, images", [
    (np.array([0, 10]), pixels(2)), (np.array([-1]), pixels(1)), (np.array([[0]]), pixels(1)),
    (np.array([0]), pixels(2)), (np.array([0]), pixels(1).astype(float)), (np.array([0]), pixels(1)[:, :, :, :1])])
def test_wrong_rows_or_images_are_refused(tmp_path: Path, rows: np.ndarray, images: np.ndarray) -> None:
    """A wrong offset would overwrite another process's images in silence."""
    with pytest.raises(ValueError):
        ImageStore(tmp_path / "out.npz", SHAPE, IDENTITY, ALONE).write(rows, images)


def test_an_empty_batch_changes_nothing(tmp_path: Path) -> None:
    """The last batch of a process may hold unreadable images only."""
    store = ImageStore(tmp_path / "out.npz", SHAPE, IDENTITY, ALONE)
    store.write(np.zeros(0, np.int64), pixels(0))
    store.mark_skipped(np.zeros(0, np.int64))
    assert len(store.missing()) == 10


def test_a_finished_file_knows_its_options(tmp_path: Path) -> None:
    """The same command again must do nothing, and another one must not take or overwrite the result."""
    path = tmp_path / "out.npz"
    assert not already_finished(path, SHAPE, IDENTITY)
    filled(path).finish()
    (tmp_path / "out.partial").mkdir()  # as after a crash between renaming and removing
    assert already_finished(path, SHAPE, {"scale": (1.5, 2.0), "seed": 0})
    assert os.listdir(tmp_path) == ["out.npz"]
    with zipfile.ZipFile(path) as archive:
        assert json.loads(archive.comment)["shape"] == list(SHAPE)
    with pytest.raises(UserError, match="exists and was made with seed 0, not with 1 as now: delete it or change --o"):
        already_finished(path, SHAPE, {**IDENTITY, "seed": 1})
    np.savez(path, arr_0=pixels())
    with pytest.raises(UserError, match="exists and does not say with which options it was made"):
        already_finished(path, SHAPE, IDENTITY)


# --- val_ddp.py ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of five images, one of them truncated."""
    for index in range(10):
        path = tmp_path / "val" / "ab"[index % 2] / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(index).integers(0, 256, (40, 40 + index, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
    broken = tmp_path / "val" / "a" / "4.jpg"
    broken.write_bytes(broken.read_bytes()[:600])
    return tmp_path / "val"


def expected_reference(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Centre crops uint8 [9, 16, 16, 3] and labels of the readable images."""
    source = open_images(folder)
    good = [index for index in range(10) if not source.name(index).endswith("4.jpg")]
    return np.stack([center_crop(source.load(index), 16) for index in good]), source.labels[good]


def run_val(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """Run the script in this process."""
    monkeypatch.setattr(sys, "argv", ["val_ddp.py", *map(str, arguments)])
    try:
        val_ddp.main()
    finally:
        logging.getLogger().handlers.clear()


def test_reference_of_one_process(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """The file that FID is measured against: centre crops with their labels, unreadable images told and left out."""
    out = folder.parent / "ref.npz"
    arguments = ("--data-path", folder, "--image-size", 16, "--out", out, "--num-workers", 0)
    run_val(monkeypatch, *arguments)
    images, labels = expected_reference(folder)
    with np.load(out) as data:
        assert np.array_equal(data["arr_0"], images) and np.array_equal(data["arr_1"], labels)
        assert data["kind"] == "validation"
    assert "9 images of 2 classes, 16x16, 1 unreadable left out" in capsys.readouterr().out
    run_val(monkeypatch, *arguments)
    assert "is there already" in capsys.readouterr().out


def test_reference_of_two_processes(folder: Path) -> None:
    """torchrun from any folder gives the very same file."""
    out = folder.parent / "ref.npz"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               str(ROOT / "tokenizer" / "validation" / "val_ddp.py"), "--data-path", str(folder), "--image-size", "16",
               "--out", str(out), "--num-workers", "0"]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=one_thread)
    assert done.returncode == 0, done.stderr
    images, labels = expected_reference(folder)
    with np.load(out) as data:
        assert np.array_equal(data["arr_0"], images) and np.array_equal(data["arr_1"], labels)


def test_reference_carries_on_after_a_crash(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are there are not decoded again."""
    out = folder.parent / "ref.npz"
    write, decoded, crop = ImageStore.write, [], center_crop

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    def count(image: np.ndarray, size: int) -> np.ndarray:
        decoded.append(size)
        return crop(image, size)

    monkeypatch.setattr(val_ddp, "_BATCH_SIZE", 4)
    monkeypatch.setattr(ImageStore, "write",
                        lambda store, rows, images: crash() if rows.min() >= 5 else write(store, rows, images))
    arguments = ("--data-path", folder, "--image-size", 16, "--out", out, "--num-workers", 0)
    with pytest.raises(KeyboardInterrupt):
        run_val(monkeypatch, *arguments)
    monkeypatch.setattr(ImageStore, "write", write)
    monkeypatch.setattr(val_ddp, "center_crop", count)
    run_val(monkeypatch, *arguments)
    assert 0 < len(decoded) < 9
    assert np.array_equal(open_array(out, "arr_0"), expected_reference(folder)[0])


def test_reference_of_a_limited_number(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quick reference must hold every class, not the first one only."""
    out = folder.parent / "ref.npz"
    run_val(monkeypatch, "--data-path", folder, "--image-size", 16, "--out", out, "--num-workers", 0, "--limit", 4)
    assert open_array(out, "arr_1").tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("arguments, sentence", [
    (("--image-size", 0), "--image-size 0 is out of range"), (("--limit", -1), "--limit -1 is out of range"),
    (("--num-workers", -1), "--num-workers -1 is out of range"), (("--out", "ref"), "--out 'ref' is not the name of an"),
    (("--data-path", "/nowhere"), "--data-path '/nowhere' does not exist")])
def test_val_mistakes_are_told_first(folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[object, ...],
                                     sentence: str) -> None:
    """A mistyped option ends in one sentence before any image is read."""
    with pytest.raises(UserError, match=sentence):
        run_val(monkeypatch, "--data-path", folder, "--out", folder.parent / "ref.npz", *arguments)
