"""The quickstart, whole, with a fiftieth of its steps: every command of the pipeline hands over to the next."""

import json
import os
import subprocess
import sys
import time

import numpy as np
from PIL import Image

from tests.conftest import REPOSITORY


def quickstart(out, asked=None, scale: str = "0.02") -> subprocess.CompletedProcess:
    """Run the quickstart's command at a fiftieth of its length; asked: a file, on whose appearance it is asked to stop."""
    environment = os.environ | {"OUT": str(out), "SCALE": scale, "PYTHON": sys.executable}
    process = subprocess.Popen(["bash", "scripts/quickstart.sh"], cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    while asked and not asked.exists() and process.poll() is None:
        time.sleep(0.1)
    if asked:
        process.terminate()
    output, error = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, output, error)


def test_quickstart_leaves_a_report_and_does_nothing_twice(tmp_path):
    """The first command a newcomer types: asked to stop it carries on, all figures are there, and another call is a glance."""
    folder = tmp_path / "quickstart"
    cut = quickstart(folder, folder / "vq" / "semantic" / "options.json")
    assert cut.returncode == 143 and "Traceback" not in cut.stderr, cut.stderr[-3000:]
    assert {path.name for path in (folder / "phases").iterdir()} == {"teacher", "judge", ".tokenizer"}
    first = quickstart(folder)
    assert first.returncode == 0 and first.stderr.startswith("== tokenizer"), first.stderr[-3000:]
    figures = json.loads((folder / "figures.json").read_text())
    wanted = {"psnr_semantic", "psnr_dual", "usage_semantic", "usage_detail", "class_accuracy_guided",
              "class_accuracy_unguided", "class_accuracy_real", "class_accuracy_reconstructed", "frechet_samples",
              "frechet_reconstructed", "frechet_real", "seconds"}
    assert wanted <= set(figures)
    assert 0 < figures["usage_semantic"] <= 1 and figures["psnr_dual"] > 5 and len(figures["seconds"]) == 11
    for name in ("stage1.png", "stage2.png", "samples.png", "curves.png", "guided.png"):
        assert np.asarray(Image.open(folder / name)).std() > 5, name
        assert name in (folder / "report.md").read_text() or name == "guided.png"
    # As if killed in the middle of the last training: only what is missing is done again.
    (folder / "phases" / "gpt").unlink()
    (folder / "phases" / "evaluate").unlink()
    second = quickstart(folder)
    assert second.returncode == 0, second.stderr[-3000:]
    assert [line for line in second.stderr.splitlines() if line.startswith("== ")] == ["== gpt", "== evaluate"]
    other = quickstart(folder, scale="1")  # not the results of another length under this name
    assert other.returncode == 2 and "was begun with SCALE=0.02, not 1" in other.stderr
