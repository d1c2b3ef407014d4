"""A small share of what scripts/chaos.py does for an hour."""

import json

import pytest

from scripts.chaos import KILLS, TASKS
from tests.conftest import command


@pytest.mark.parametrize("task", ["GPT", "extraction, two processes"])
def test_a_share_of_the_kills_loses_nothing(tmp_path, task):
    """Killed at random moments and carried on: losses, weights and codes are those of the undisturbed run."""
    done = command("scripts/chaos.py", "--kills", 4, "--times", 2, "--seed", 3, "--tasks", task, "--out", tmp_path / "kills.json",
                   check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    kills = json.loads((tmp_path / "kills.json").read_text())
    signals = {f"{name} of one" if alone else name for name, alone in KILLS[TASKS[task].processes]}
    assert len(kills) >= 4 and {kill["signal"] for kill in kills} <= signals and not any(kill["fault"] for kill in kills)
