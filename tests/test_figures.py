"""Figures 1, 4 and 7: every point lands where its row says, and toy figures never share axes with published ones."""

import json

import pytest
from PIL import Image

from autoregressive.models.gpt import load_gpt
from scripts.paper import plot_figures, sweep_c2i, table
from scripts.paper.plots import Curve, Panel, draw
from tests.conftest import call
from utils.config import UserError

ROWS = {
    "1": {"iar2-tiny": {"parameters": 1.8, "frechet": 3.0}, "llamagen-tiny": {"parameters": 1.4, "frechet": 4.0}},
    "4": {"single-64": {"psnr": 15.0, "perceptual_classifier": 0.3, "frechet": 9.0},
          "single-2048": {"psnr": 19.0, "perceptual_classifier": 0.2, "frechet": 5.0},
          "dual-128-512": {"psnr": 20.0, "perceptual_classifier": 0.1, "frechet": 4.0}},
    "7a": {"GPT-tiny-1.0": {"frechet": 6.0, "class_accuracy": 0.5}, "GPT-tiny-2.25": {"frechet": 5.0, "class_accuracy": 0.6},
           "GPT-tiny-pag": {"frechet": 4.5, "class_accuracy": 0.7}},
    "7b": {"iar-tiny": {"parameters": 1.4, "frechet": 4.0, "class_accuracy": 0.7},
           "iar-small": {"parameters": 15.0, "frechet": 3.0, "class_accuracy": 0.8}},
    "7c": {"iar2-0000.50": {"frechet": 9.0, "class_accuracy": 0.2}, "iar2-0001": {"frechet": 8.0, "class_accuracy": 0.3},
           "llamagen-0001": {"frechet": 7.0, "class_accuracy": 0.4}},
}


def gather(folder, rows):
    """Rows as reproduce.py leaves them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, figures in rows.items():
        (folder / f"{name}.json").write_text(json.dumps(figures))
    return folder


def drawn(out):
    """What a picture shows: {label of the y axis: {curve: (x, y)}}; several panels of one label are one."""
    found = {}
    for panel in json.loads(out.with_suffix(".json").read_text())["panels"]:
        curves = found.setdefault(panel["y"], {})
        curves |= {curve["label"]: (curve["x"], curve["y"]) for curve in panel["curves"]}
    return found


def refused(capsys, *arguments) -> str:
    """The one sentence with which plot_figures ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        call(plot_figures.main, *arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1
    return error


@pytest.mark.parametrize("figure", ROWS)
def test_toy_and_published_points_share_no_axes(figure, tmp_path):
    """A distance of Fashion-MNIST's features on an axis of ImageNet's FID would be read as one."""
    out = tmp_path / f"figure{figure}.png"
    rows = gather(tmp_path / "rows", ROWS[figure])
    call(plot_figures.main, figure, "--folders", rows, "--out", out, "--toy", "Measured: toys.")
    about = json.loads(out.with_suffix(".json").read_text())
    assert about["figure"] == figure and about["note"] == "Measured: toys."
    kinds = [{curve["kind"] for curve in panel["curves"]} for panel in about["panels"]]
    assert all(len(kind) == 1 for kind in kinds) and {"published"} in kinds and {"measured"} in kinds
    assert {panel["title"].split(":")[0].lower() for panel in about["panels"]} == {"published", "measured"}
    for panel in about["panels"]:
        assert ("toy" in panel["title"]) == (panel["y"] in {plot_figures.METRICS[name] for name in
                                                            plot_figures.FIGURES[figure].toy_metrics})
    with Image.open(out) as picture:
        assert picture.width > 700 and picture.height > 400


def test_rows_say_where_points_lie(tmp_path):
    """A size, a scale or an epoch read wrongly would move a point without a trace."""
    found = {}
    for figure, rows in ROWS.items():
        out = tmp_path / f"figure{figure}.svg"
        call(plot_figures.main, figure, "--folders", gather(tmp_path / figure, rows), "--out", out, "--toy", "toys")
        found[figure] = drawn(out)
    frechet = {figure: curves[plot_figures.METRICS["frechet"]] for figure, curves in found.items()}
    assert frechet["1"] == {"IAR2, measured": ([1.8], [3]), "LlamaGen, measured": ([1.4], [4])}
    assert frechet["4"] == {"IAR2, dual codebook, measured": ([], [4]), "single codebook, measured": ([64, 2048], [9, 5])}
    assert frechet["7a"] == {"GPT-tiny, constant, measured": ([1, 2.25], [6, 5]), "GPT-tiny, PAG-CFG, measured": ([], [4.5])}
    assert frechet["7b"] == {"IAR, measured": ([1.4, 15], [4, 3])}
    assert frechet["7c"] == {"IAR2, measured": ([0.5, 1], [9, 8]), "LlamaGen, measured": ([1], [7])}
    assert found["4"]["PSNR (dB)"]["single codebook, measured"] == ([64, 2048], [15, 19])


def test_published_points_come_from_the_tables(tmp_path):
    """The picture and the tables must not tell two stories; systems without a number of parameters have no place."""
    for figure in ("1", "7b"):
        call(plot_figures.main, figure, "--out", tmp_path / f"{figure}.png")
    first, second = drawn(tmp_path / "1.png")["FID"], drawn(tmp_path / "7b.png")
    rows = table.read_published("2")["rows"]
    sizes = ("B", "L", "XL", "XXL")
    for name, label in (("iar2", "IAR2"), ("iar", "IAR"), ("llamagen", "LlamaGen")):
        assert first[f"{label}, published"] == ([rows[f"{name}-{size}"]["parameters"] for size in sizes],
                                                [rows[f"{name}-{size}"]["values"][0] for size in sizes])
        seventh = [table.read_published("3-24-300")["rows"][f"{name}-{size}"] for size in sizes]
        assert second["inception score"][f"{label}, published"] == ([row["parameters"] for row in seventh],
                                                                    [row["values"][1] for row in seventh])
    assert sum(len(x) for x, _ in first.values()) == sum("parameters" in row for row in rows.values()) == len(rows) - 1
    last = {point.system: point.figures["fid"] for point in plot_figures.published_points("7c") if point.x == 300}
    assert last["LlamaGen"] - last["IAR2"] == pytest.approx(0.96)  # as the text states


def test_measured_rows_join_the_published_ones_at_full_scale(tmp_path):
    """A measured row has the parameters of its published namesake; CTF, without any, and half-measured rows are left out."""
    rows = {"iar2-B": {"fid": 5.0, "inception_score": 200.0}, "iar2-L": {"fid": 3.0, "inception_score": float("nan")},
            "ctf-B": {"fid": 4.0}}
    call(plot_figures.main, "7b", "--folders", gather(tmp_path / "table3", rows), "--out", tmp_path / "7b.png")
    found = drawn(tmp_path / "7b.png")
    assert found["FID"]["IAR2, measured"] == ([143, 408], [5, 3]) and found["inception score"]["IAR2, measured"] == ([143], [200])
    assert len(found["FID"]) == len(found["inception score"]) == 4 and len(found["FID"]["IAR2, published"][0]) == 4


def test_missing_figures_are_one_sentence(tmp_path, capsys):
    """Whoever draws before measuring is told what to run."""
    out = ("--out", tmp_path / "figure.png")
    other = gather(tmp_path / "other", {"GPT-B-2.0": {"precision": 0.8}})
    assert "run reproduce.py figure7a" in refused(capsys, "7a", "--folders", other, *out)
    assert "hold none of fid, inception_score for figure 7c: run reproduce.py figure7c" in refused(capsys, "7c", *out)
    assert "hold none of frechet for figure 1" in refused(capsys, "1", "--toy", "toys", *out)
    assert "none holds no gathered figures" in refused(capsys, "4", "--folders", tmp_path / "none", *out)
    assert "has no number at its end" in refused(capsys, "7a", "--folders", gather(tmp_path / "x", {"iar2": {"fid": 1}}), *out)
    assert ".png, .pdf or .svg" in refused(capsys, "1", "--out", tmp_path / "figure.json")
    assert not list(tmp_path.glob("figure.*"))


def test_systems_differ_by_colour_and_marker_and_kinds_by_filling():
    """A picture printed without colours must still tell them apart."""
    curves = [Curve(f"{look} {kind}", [1, 2], [3, 4 + look], look, kind)
              for look in range(4) for kind in ("published", "measured")]
    axis, = draw([Panel("", "x", "y", curves, log_x=True)], "a note").axes
    lines = axis.get_lines()
    assert len({line.get_color() for line in lines}) == len({line.get_marker() for line in lines}) == 4
    for line in lines:
        published = "published" in line.get_label()
        assert (line.get_markerfacecolor() == "none", line.get_linestyle() == "--") == (published, published)
    names = Curve("named", [1, 10], [1, 2], joined=False, names=["left", "right"])
    axis, = draw([Panel("", "x", "y", [names])]).axes
    assert [text.get_horizontalalignment() for text in axis.texts] == ["left", "right"]


def test_tables_show_published_rows_that_were_not_measured(tmp_path, capsys):
    """Table 2 is read beside the other systems; a row that was asked for must have been measured."""
    gather(tmp_path, {"iar2-XXL": {"fid": 2.5}})
    call(table.main, "--folder", tmp_path, "--table", "2", "--rows", "iar2-XXL", "--all-published")
    lines = capsys.readouterr().out.splitlines()
    assert "| CDM |  | 4.88 | 158.7 |  |  |  |" in lines and "| IAR2-XXL | 1500 | 1.76 | 279.5 | 0.8 | 0.62 | 2.50 |" in lines
    labels = [line.split("|")[1].strip() for line in lines if line.startswith("| ")]
    assert labels[1:] == [row["label"] for row in table.read_published("2")["rows"].values()]
    with pytest.raises(SystemExit):
        call(table.main, "--folder", tmp_path, "--table", "2", "--rows", "iar2-B", "--all-published")
    assert "iar2-B has no figures" in capsys.readouterr().err


def test_parameters_of_a_gpt_are_counted(models):
    """The x axis of toy figures: all weights of the exported file, in millions."""
    counted = table.gather([], models[0])["parameters"]
    assert counted == pytest.approx(sum(p.numel() for p in load_gpt(models[0]).parameters()) / 1e6)


def test_a_sweep_may_ask_for_the_range_of_the_checkpoint():
    """Figure 7a's horizontal line: table 12's range, which no script has to repeat."""
    scales = {"carried": sweep_c2i.parse_range("carried", (1.75, 3.0)), "1:1": sweep_c2i.parse_range("1:1", (1.75, 3.0))}
    assert scales == {"carried": (1.75, 3.0), "1:1": (1.0, 1.0)}
    figures = {"carried": {"fid": 4.0, "sfid": None, "images": 9}, "1:1": {"fid": 6.0, "sfid": None, "images": 9}}
    panel, = sweep_c2i.panels(figures, scales)
    assert [(each.label, each.x, each.y) for each in panel.curves] == [("from 1.75", [3.0], [4.0]), ("constant", [1.0], [6.0])]
    assert "| 1.75 | 3 | 4 | n/a | 9 |" in sweep_c2i.table(figures, scales)
    with pytest.raises(UserError, match="carries the scales"):
        sweep_c2i.parse_range("carried", (2.0,))
