"""Report of `gpu_check.sh`: what passed, what did not, and the figures of the benchmarks beside each other."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started by its path

from scripts.paper.table import markdown_table
from utils.config import UserError, parse, run_main
from utils.files import replacing
from utils.run import read_metrics

# What a benchmark says, in the order of the table's columns.
COLUMNS = ("ms_per_cell", "ms_per_step", "images_per_second", "tokens_per_second", "ratio", "ratio_float32",
           "encode_images_per_second",
           "decode_images_per_second", "encode_ratio", "decode_ratio", "train_ratio", "hours_for_50k", "fraction_of_floor",
           "peak_memory_gib")


@dataclass
class ReportConfig:
    """Which checks to report."""

    folder: Path
    """Folder that gpu_check.sh wrote."""


@dataclass(frozen=True)
class Check:
    """One command of the script, and what came of it."""

    name: str
    code: int
    seconds: int
    command: str
    printed: str
    errors: str


def read_checks(folder: Path) -> list[Check]:
    """All checks that ended, in their order; raises UserError where there is none."""
    found = [Check(path.stem, int(path.read_text()), int(path.with_suffix(".seconds").read_text()),
                   path.with_suffix(".command").read_text(), path.with_suffix(".out").read_text(errors="replace"),
                   path.with_suffix(".err").read_text(errors="replace"))
             for path in sorted((folder / "checks").glob("*.code"), key=lambda path: path.stat().st_mtime)]
    if not found:
        raise UserError(f"--folder {folder} holds no check: run scripts/gpu_check.sh first.")
    return found


def benchmark_rows(checks: list[Check]) -> list[list[str]]:
    """A row of figures for every benchmark that passed."""
    rows = []
    for check in checks:
        start = check.printed.find("{")
        if check.code == 0 and "scripts/benchmark.py" in check.command and start >= 0:
            figures: dict[str, Any] = json.loads(check.printed[start:])
            rows.append([check.name, *(f"{figures[name]:.3g}" if name in figures else "" for name in COLUMNS)])
    return rows


def training_rows(folder: Path, checks: list[Check]) -> list[list[str]]:
    """The last line of the log of every training."""
    rows = []
    for check in checks:
        log = folder / check.name / "metrics.jsonl"
        if log.is_file():
            last = read_metrics(log)[-1]
            rows.append([check.name, *(f"{last[name]:.4g}" if name in last else "" for name in (
                "loss", "images_per_second", "mfu", "peak_memory_gib"))])
    return rows


def report(folder: Path) -> str:
    """The report in markdown."""
    checks = read_checks(folder)
    failed = [check for check in checks if check.code]
    benchmarks = benchmark_rows(checks)
    used = [place for place in range(1, len(COLUMNS) + 1) if any(row[place] for row in benchmarks)]
    parts = [
        "# Checks on a GPU", "```\n" + next((check.printed for check in checks if check.name == "device"), "").strip() + "\n```",
        f"{len(checks) - len(failed)} of {len(checks)} checks passed.",
        markdown_table(["check", "exit code", "seconds"], [[each.name, str(each.code), str(each.seconds)] for each in checks]),
        "## Benchmarks", markdown_table(["", *(COLUMNS[place - 1] for place in used)],
                                        [[row[0], *(row[place] for place in used)] for row in benchmarks]),
        "## Trainings", markdown_table(["", "loss", "images/s", "MFU", "peak GiB"], training_rows(folder, checks))]
    quickstart = folder / "quickstart" / "report.md"
    if quickstart.is_file():
        parts += ["## Quickstart", quickstart.read_text().partition("\n")[2].strip()]
    for check in failed:
        parts += [f"## {check.name} failed with {check.code}", f"`{check.command.strip()}`",
                  "```\n" + (check.printed + check.errors).strip()[-3000:] + "\n```"]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Write report.md and print it; exit code 1 where a check failed."""
    config = parse(ReportConfig)
    text = report(config.folder)
    with replacing(config.folder / "report.md") as aside:
        aside.write_text(text)
    print(text)
    if any(check.code for check in read_checks(config.folder)):
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
