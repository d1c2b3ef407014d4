"""Several nodes on one file system: processes with other host names, the same process ids, and no torchrun between them."""

import os
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from autoregressive.train import extract_codes_c2i
from tests.conftest import REPOSITORY, call
from tests.test_codes import extract_options

EXTRACT, SAMPLE = "autoregressive/train/extract_codes_c2i.py", "autoregressive/sample/sample_c2i_ddp.py"

# What a process does before the script: take another host's name and the process id that containers repeat, make shares of
# five rows, note which rows it writes to which file, and die without a word after DIES_AFTER of them.
NODE = """
import os, runpy, socket, sys, time
from pathlib import Path
from utils import row_shares

host, left = os.environ["NODE"], int(os.environ["DIES_AFTER"])
socket.gethostname, os.getpid, row_shares._FEWEST_ROWS = lambda: host, lambda: 7, 5
append = row_shares._OwnShare.append

def noted(share, rows, state, values):
    global left
    for row in rows if left > 0 else ():
        append(share, rows[rows == row], state, values.reshape(len(rows), -1)[rows == row])
        with open(os.environ["NOTES"], "a") as notes:
            notes.write(f"{host} {Path(share.index.name).name} {row}\\n")
        left -= 1
        if left == 0:
            os._exit(9)

row_shares._OwnShare.append = noted
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_nodes(notes: Path, script: str, *arguments: object, count: int = 2, dies: dict[int, int] | None = None) -> list[int]:
    """Run a script on `count` nodes of one process each; dies: {node: rows after which it dies}.  Returns the exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = []
    for rank in range(count):
        environment = os.environ | {
            "RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "NODE": f"node{rank}", "DIES_AFTER": str((dies or {}).get(rank, 10**9)), "NOTES": str(notes), "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": ""}
        workers.append(subprocess.Popen([sys.executable, "-c", NODE, script, *map(str, arguments)], cwd=REPOSITORY,
                                        env=environment, stderr=subprocess.PIPE, text=True))
    patience = time.monotonic() + 100
    while any(worker.poll() is None for worker in workers) and time.monotonic() < patience:
        if dies and all(workers[rank].poll() is not None for rank in dies):
            patience = min(patience, time.monotonic() + 1)  # torchrun would end the others
        time.sleep(0.05)
    for worker in workers:
        worker.kill()
    said = [worker.communicate()[1] for worker in workers]
    codes = [worker.returncode for worker in workers]
    assert dies or codes == [0] * count, "\n".join(said)
    return codes


def read_notes(notes: Path) -> tuple[Counter[int], dict[str, set[str]]]:
    """How often each row was written, and the nodes that wrote each file; the notes are removed."""
    lines = [line.split() for line in notes.read_text().splitlines()] if notes.exists() else []
    notes.unlink(missing_ok=True)
    nodes: dict[str, set[str]] = {}
    for node, name, _ in lines:
        nodes.setdefault(name, set()).add(node)
    return Counter(int(row) for *_, row in lines), nodes


def require_same_codes(folder: Path, expected: Path) -> None:
    """All files of two code folders are equal to the byte, and there are no others."""
    assert sorted(os.listdir(folder)) == ["codes.npy", "header.json", "labels.npy", "state.npy"]
    for name in os.listdir(folder):
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name


@pytest.fixture
def notes(tmp_path) -> Path:
    """Where the nodes note the rows that they write."""
    return tmp_path / "notes.txt"


def test_nodes_extract_as_one_process(images_folder, models, tmp_path, notes):
    """No file is written by two nodes: a network file system writes whole pages back, and one would lose its rows."""
    bad = images_folder / "class1" / "3.png"
    bad.write_bytes(bad.read_bytes()[:200])
    call(extract_codes_c2i.main, *extract_options(images_folder, models[1], tmp_path / "one"))
    for name, count in (("two", 2), ("three", 3)):
        run_nodes(notes, EXTRACT, *extract_options(images_folder, models[1], tmp_path / name), count=count)
        rows, nodes = read_notes(notes)
        assert rows == Counter(range(24)) and all(len(writers) == 1 for writers in nodes.values())
        assert len(set.union(*nodes.values())) == count and len(nodes) <= 5 + count - 1  # five ranges, two shares at a border
        require_same_codes(tmp_path / name, tmp_path / "one")
    assert (np.load(tmp_path / "one" / "state.npy") == 2).sum() == 1


def test_extraction_survives_its_nodes(images_folder, models, tmp_path, notes):
    """One node dies, then all, then others carry on with what is missing, in other numbers: no row is done twice."""
    options = extract_options(images_folder, models[1], tmp_path / "codes")
    call(extract_codes_c2i.main, *extract_options(images_folder, models[1], tmp_path / "one"))
    assert run_nodes(notes, EXTRACT, *options, dies={1: 3})[1] == 9
    assert run_nodes(notes, EXTRACT, *options, count=3, dies={0: 1, 1: 1, 2: 1}) == [9, 9, 9]
    assert not (tmp_path / "codes" / "codes.npy").exists()
    assert len(list((tmp_path / "codes" / "shares").glob("*.rows"))) >= 4
    run_nodes(notes, EXTRACT, *options)
    assert read_notes(notes)[0] == Counter(range(24))
    require_same_codes(tmp_path / "codes", tmp_path / "one")
    call(extract_codes_c2i.main, *options)  # all is done
    require_same_codes(tmp_path / "codes", tmp_path / "one")


def test_nodes_sample_as_one_process_and_survive(models, tmp_path, notes):
    """The npz is the same for one node, for two, and after deaths; what was drawn is not drawn again."""
    options = ["--gpt-ckpt", models[0], "--vq-ckpt", models[1], "--num-samples", 13, "--cfg-scale", 1.5, 3.0, "--device", "cpu",
               "--batch-size", 3, "--out"]
    run_nodes(notes, SAMPLE, *options, tmp_path / "one.npz", count=1)
    read_notes(notes)
    for name, deaths in (("two", []), ("dead", [{0: 2, 1: 4}])):
        for dies in deaths:
            assert run_nodes(notes, SAMPLE, *options, tmp_path / f"{name}.npz", dies=dies) == [9, 9]
        run_nodes(notes, SAMPLE, *options, tmp_path / f"{name}.npz")
        rows, nodes = read_notes(notes)
        assert rows == Counter(range(13)) and all(len(writers) == 1 for writers in nodes.values())
        with np.load(tmp_path / "one.npz") as one, np.load(tmp_path / f"{name}.npz") as other:
            assert list(one) == list(other) == ["arr_0", "arr_1", "kind", "options"]
            assert all(np.array_equal(one[key], other[key]) for key in one) and one["arr_0"].std() > 1
        assert not (tmp_path / f"{name}.partial").exists()
