"""Tables of the paper: measured figures beside the published ones.

    python scripts/paper/table.py --folder F --table 5 --rows ROW...       the table in Markdown, kept as F/table5.md

reproduce.py leaves a row's figures in F/ROW.json; those of a row that was run with several seeds are in ROW-seed0.json,
ROW-seed1.json, ...; the table shows mean ± standard deviation.  The published figures, in published.json, are of ImageNet at
full scale.  Toy figures beside them only show that a row runs.
"""

import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started by its path

from utils.checkpoint import read_export
from utils.config import UserError, parse, run_main
from utils.files import read_json, write_text

PUBLISHED = Path(__file__).with_name("published.json")
# Measured figures in the order of the columns, with their digits.
COLUMNS = {"fid": 2, "sfid": 2, "inception_score": 1, "precision": 3, "recall": 3, "rfid": 2, "psnr": 2, "ssim": 3, "lpips": 3,
           "perceptual_classifier": 4, "perceptual_random": 4, "usage_semantic": 3, "usage_detail": 3, "usage_token": 3,
           "steps": 0, "bits_per_image": 1, "frechet": 2, "class_accuracy": 3, "images_per_second": 1, "parameters": 2}
PARAMETERS = "parameters in millions"
ADDED = ("bits_per_image", "steps")  # of the stages of one system


@dataclass
class TableConfig:
    """Options of the tables."""

    table: str
    """Key of published.json."""
    rows: tuple[str, ...]
    """Rows in order; each must have been measured."""
    folder: Path = Path("runs/paper/figures")
    """Folder of the gathered figures."""
    all_published: bool = False
    """Also the table's other rows that have published figures, all in the table's order."""
    note: str = ""
    """A sentence under the title."""


def gather(files: list[tuple[Path, tuple[str, ...], str]], gpt_ckpt: Path | None = None) -> dict[str, float]:
    """The figures of a row by name: those of `COLUMNS`, of several JSON files.

    files: path, keys that lead to the figures in the file's nested objects, outermost first, and what is put before their names
    (r turns fid into rfid).  gpt_ckpt: a GPT whose parameters are counted, in millions.  Bits and training steps of several
    files, the stages of one system, add up; of another figure the last file's is taken.
    """
    row: dict[str, float] = {}
    for file, keys, prefix in files:
        found = read_json(file, "FILE", "a JSON file of figures")
        for key in keys:
            if not isinstance(found, dict) or key not in found:
                raise UserError(f"key {key} leads nowhere in {file}: make the file again.")
            found = found[key]
        if not isinstance(found, dict):
            raise UserError(f"FILE {file} holds no figures by name: make it again.")
        for name, value in ((prefix + name, value) for name, value in found.items()):
            if name in ADDED and not isinstance(value, (int, float)):
                raise UserError(f"FILE {file} has {name} that is no number: make it again.")
            if name in COLUMNS and isinstance(value, (int, float)):
                row[name] = value + (row.get(name, 0) if name in ADDED else 0)
    if gpt_ckpt:
        row["parameters"] = sum(tensor.numel() for tensor in read_export(gpt_ckpt, "gpt", "--gpt-ckpt")[1].values()) / 1e6
    return row


def read_row(folder: Path, row: str) -> dict[str, list[float]]:
    """Every figure of a row, one value a seed."""
    paths = [path for path in (folder / f"{row}.json", *sorted(folder.glob(f"{row}-seed*.json"))) if path.exists()]
    if not paths:
        raise UserError(f"--rows {row} has no figures in {folder}: run reproduce.py with the name of the table.")
    seeds = [read_json(path, "--rows", "the row") for path in paths]
    return {name: [seed[name] for seed in seeds if name in seed] for name in COLUMNS if any(name in seed for seed in seeds)}


def cell(values: list[float] | None, digits: int) -> str:
    """One value, or mean ± standard deviation of several."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    """The lines of a table in Markdown."""
    first, *others = ("| " + " | ".join(row) + " |" for row in (head, *rows))
    return "\n".join([first, "|" + "---|" * len(head), *others]) + "\n"


def read_published(table: str) -> dict[str, Any]:
    """A table of published.json: title, columns, and by row a label, values in the columns' order, perhaps parameters."""
    published = json.loads(PUBLISHED.read_text())
    return published.get(table, {"title": f"Table {table} (nothing published)", "columns": [], "rows": {}})


def published_cells(known: dict[str, Any], head: list[str]) -> list[str]:
    """Published values of a row under the columns of `head`, empty where there is none."""
    values = [str(value) for value in known["values"]]
    parameters = [str(known.get("parameters", ""))] if head[:1] == [PARAMETERS] else []
    return parameters + values + [""] * (len(head) - len(parameters) - len(values))


def markdown(config: TableConfig) -> str:
    """The table: label, published columns, measured columns."""
    source = read_published(config.table)
    measured = {row: read_row(config.folder, row) for row in config.rows}
    if config.all_published:
        shown = [row for row, known in source["rows"].items() if known["values"] or row in measured]
        measured = {row: measured.get(row, {}) for row in [*shown, *measured]}
    known = {row: source["rows"].get(row, {"label": row, "values": []}) for row in measured}
    columns = [PARAMETERS] * any("parameters" in row for row in known.values()) + source["columns"]
    names = [name for name in COLUMNS if any(name in figures for figures in measured.values())]
    head = ["", *(f"{column} (published)" for column in columns), *(name.replace("_", " ") for name in names)]
    rows = [[known[row]["label"], *published_cells(known[row], columns),
             *(cell(figures.get(name), COLUMNS[name]) for name in names)] for row, figures in measured.items()]
    note = f"{config.note}\n" if config.note else ""
    return f"**{source['title']}**\n{note}\n{markdown_table(head, rows)}"


def print_table(config: TableConfig) -> None:
    """Print the table, and keep it beside its rows."""
    text = markdown(config)
    write_text(config.folder / f"table{config.table}.md", text)
    print(text)


def main() -> None:
    """Parse options, show the table."""
    print_table(parse(TableConfig))


if __name__ == "__main__":
    run_main(main)
