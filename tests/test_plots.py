"""Pictures made from logs show what was logged."""

import json

import pytest
from PIL import Image

from scripts.paper import plot_losses
from tests.conftest import call


@pytest.fixture
def runs(tmp_path):
    """Logs of two runs; the first has a line without the loss, a value that is not finite and a last line cut off."""
    for name, values in (("ours", (4.0, 2.0, 1.0)), ("theirs", (5.0, 4.5))):
        folder = tmp_path / name
        folder.mkdir()
        lines = [json.dumps({"step": 10 * step, "loss": value, "lr": 0.1}) for step, value in enumerate(values, 1)]
        if name == "ours":
            lines += ['{"step": 35, "psnr": 20.0}', '{"step": 40, "loss": NaN}', '{"step": 50, "lo']
        (folder / "metrics.jsonl").write_text("\n".join(lines))
    return tmp_path / "ours", tmp_path / "theirs"


def test_average_is_corrected_and_drawn(runs, tmp_path, capsys):
    """An average that starts at 0 would show every run falling from nowhere; half a line must not end the plot."""
    call(plot_losses.main, *runs, "--out", tmp_path / "plots" / "losses.png", "--smooth", 0.5)
    assert plot_losses.smoothed([3.0, 1.0], None) == [3.0, 1.0]  # too short to smooth
    assert 3.4 < plot_losses.smoothed([4.0] * 50 + [1.0], None)[-1] < 3.45
    drawn = json.loads((tmp_path / "plots" / "losses.json").read_text())
    assert drawn["metric"] == "loss" and [run["name"] for run in drawn["runs"]] == ["ours", "theirs"]
    ours, theirs = drawn["runs"]
    assert ours["steps"] == [10, 20, 30] and ours["values"] == [4, 2, 1]
    # by hand: 4; (2 / 2 + 4 / 4) / (3 / 4); (1 / 2 + 2 / 4 + 4 / 8) / (7 / 8)
    assert ours["smoothed"] == pytest.approx([4, 8 / 3, 12 / 7])
    assert theirs["smoothed"] == pytest.approx([5, (4.5 / 2 + 5 / 4) / 0.75])
    assert "1.7143 at step 30" in capsys.readouterr().out
    with Image.open(tmp_path / "plots" / "losses.png") as picture:
        assert picture.width > 400 and picture.height > 200


def test_names_metric_and_axis_are_chosen(runs, tmp_path):
    """A paper's legend does not name folders."""
    call(plot_losses.main, *runs, "--out", tmp_path / "lr.svg", "--metric", "lr", "--names", "IAR2", "LlamaGen",
         "--smooth", 0, "--log-x")
    drawn = json.loads((tmp_path / "lr.json").read_text())
    assert [run["name"] for run in drawn["runs"]] == ["IAR2", "LlamaGen"] and drawn["runs"][0]["smoothed"] == [0.1] * 3
    assert (tmp_path / "lr.svg").read_text().startswith("<?xml")


def test_folders_of_one_name_stay_apart(runs, tmp_path):
    """Runs are often called the same below folders of different experiments."""
    other = tmp_path / "more" / "ours"
    other.mkdir(parents=True)
    (other / "metrics.jsonl").write_text((runs[1] / "metrics.jsonl").read_text())
    call(plot_losses.main, runs[0], other, "--out", tmp_path / "losses.png")
    drawn = json.loads((tmp_path / "losses.json").read_text())
    assert [run["name"] for run in drawn["runs"]] == [str(runs[0]), str(other)]


@pytest.mark.parametrize("options, words", [
    (("--metric", "fid"), "which logs loss, lr, psnr: choose one"),
    (("--names", "one"), "--names has 1 names for 2 runs"),
    (("--smooth", 1), "--smooth 1.0 is out of range: give a number from 0 to below 1"),
    (("--out", "losses.json"), "give one that ends in .png, .pdf or .svg"),
])
def test_mistakes_are_one_sentence(runs, tmp_path, options, words, capsys):
    """The sentence says what to type instead."""
    with pytest.raises(SystemExit) as stopped:
        call(plot_losses.main, *runs, "--out", tmp_path / "losses.png", *options)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and words in error and error.count("\n") == 1
    assert not list(tmp_path.glob("losses*"))


def test_a_folder_without_a_log_is_named(runs, tmp_path, capsys):
    """Of many folders the wrong one must be told; none at all is a mistake too."""
    (tmp_path / "empty").mkdir()
    for folders, words in (((*runs, tmp_path / "empty"), "empty has no metrics.jsonl"), ((), "no run folder")):
        with pytest.raises(SystemExit) as stopped:
            call(plot_losses.main, *folders, "--out", tmp_path / "losses.png")
        assert stopped.value.code == 2 and words in capsys.readouterr().err
