"""Damage files and options at random, run the commands that read them, and report whatever is not refused in one sentence.

    python scripts/fuzz.py --cases 500 --seed 0 --out report.json     a table, and every mishandled case with its number
    python scripts/fuzz.py --seed 0 --only 137                        one case again, with what it printed

Every command runs on a tiny world (`fuzz_world.py`) in a process of its own, which inherits the loaded libraries: a hang, a crash
and a process that takes all memory are found, and cost a second.  Case n of a seed is always the same.  Not part of the tests,
which run a small share of it.
"""

import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started by its path

from scripts import fuzz_damage
from scripts.fuzz_commands import COMMANDS, READERS, fields_of, words_of
from scripts.fuzz_damage import Skip
from scripts.fuzz_tables import damages_of
from scripts.fuzz_world import World
from utils.config import AboveZero, Count, Positive, Seed, UserError, declared_values, flag, parse, run_main
from utils.files import check_writable, write_json
from utils.logs import followed
from utils.untrusted import printable

VALUES = ("nan", "inf", "-inf", "-1", "0", "1e309", "", "9" * 30, "x", "1.5", "-0.5")
GOOD = ("refused", "harmless", "warned", "accepted", "undetected")
# Data without a checksum of its own, or that may be absent, which nobody can tell from other data: images, arrays, figures.
UNDETECTABLE = {".npy": ("flipped", "smallest"), ".npz": ("missing", "renamed"), "figures": ("field",), ".pt": ("flipped",),
                ".png": ("flipped", "deleted", "folder", "name"),
                # Those whose checksum was taken away: other descriptions, as sound as the true one.
                ".safetensors": tuple(f"description {number}" for number in range(1, 6)),
                ".json": ("flipped",), ".jsonl": ("flipped", "truncated", "field"), "": ("class name",),
                # Other columns, members or names of classes, as sound as the true ones.
                ".parquet": ("flipped", "missing", "renamed", "twice", "features"), ".arrow": ("flipped",),
                ".tar": ("flipped", "named"), ".txt": ("",)}


@dataclass
class FuzzConfig:
    """What to try."""

    cases: Positive = 500
    """Number of cases."""
    seed: Seed = 0
    """Case n of a seed is always the same."""
    kinds: tuple[str, ...] = ()
    """Only these kinds: entries of the world, options, outputs; empty: all."""
    only: Count | None = None
    """Run this case alone, and show what it printed."""
    time_limit: AboveZero = 20.0
    """Seconds after which a case counts as hanging."""
    out: Path | None = None
    """JSON to write: every case with its outcome."""


@dataclass
class Case:
    """One damage, and what came of it."""

    number: int
    kind: str      # entry of the world, "options" or "outputs"
    target: str    # file, option or output that was damaged
    damage: str
    command: str
    outcome: str = ""
    detail: str = ""


def files_below(path: Path) -> dict[str, list[Path]]:
    """Files of an entry by their kind, relative to it; a folder of images is a kind of its own."""
    if path.is_file():
        return {path.suffix: [Path()]}
    found: dict[str, list[Path]] = {"": [Path()]} if (path / "class0").exists() else {}
    for file in sorted(path.rglob("*")):
        if file.is_file() and "tensorboard" not in file.parts and file.name not in ("log.txt", ".lock"):
            found.setdefault(file.suffix or file.name, []).append(file.relative_to(path))
    return found


def draw(number: int, config: FuzzConfig, world: World) -> tuple[Case, random.Random]:
    """Case `number` of the seed, and the generator of its damage."""
    rng = random.Random(config.seed * 1_000_003 + number)
    kinds = config.kinds or ("options",) * 8 + ("outputs",) * 2 + (*READERS, "run", "codes", "images_npz", "gpt", "tokenizer")
    kind = kinds[number % len(kinds)]
    if kind == "options":
        name = rng.choice([name for name, command in COMMANDS.items() if command.options])
        options = COMMANDS[name].options
        assert options is not None
        field = rng.choice([field for field, hint in fields_of(options) if "Positional" not in str(hint)])
        return Case(number, kind, flag(field), rng.choice(VALUES), name), rng
    if kind == "outputs":
        return Case(number, kind, "", "a link to a file outside", rng.choice(sorted(COMMANDS))), rng
    files = files_below(Path(world.paths[kind]))
    target = rng.choice(files[rng.choice(sorted(files))])
    damage = rng.choice(sorted(damages_of(Path(world.paths[kind]) / target)))
    return Case(number, kind, str(target), damage, rng.choice(READERS[kind])), rng


def prepare(case: Case, rng: random.Random, world: World) -> tuple[list[str], dict[str, str]]:
    """Do the damage; returns the command line and the paths of the entries."""
    command = COMMANDS[case.command]
    paths = world.fresh(tuple({*command.copied, case.kind} - {"options", "outputs"}))
    words = words_of(command, paths, world.out)
    if case.kind == "options":
        start = words.index(case.target) if case.target in words else len(words)
        end = next((place for place in range(start + 1, len(words)) if words[place].startswith("--")), len(words))
        words[start:end] = [case.target, case.damage]
    elif case.kind == "outputs":
        world.run(command.main, words, world.out)
        written = [path.relative_to(world.out) for path in sorted(world.out.rglob("*")) if path.is_file() and path.name not in (
            "stdout", "stderr") and "tensorboard" not in path.parts and "checkpoints" not in path.parts]
        if not written:
            raise Skip
        paths, target = world.fresh(command.copied), rng.choice(written)
        case.target = str(target)
        (world.out / target).parent.mkdir(parents=True, exist_ok=True)
        (world.out / target).symlink_to(world.outside / "target")
    else:
        path = Path(paths[case.kind]) / case.target
        damages_of(path)[case.damage](path, rng)
    return words, paths


def judge(case: Case, code: int | None, changed: bool, paths: dict[str, str], world: World) -> tuple[str, str]:
    """Outcome of a case, and what tells it."""
    printed = b"".join(path.read_bytes() for path in (world.out / "stdout", world.out / "stderr", world.out / "run" / "log.txt")
                       if path.is_file())
    text = printed.decode(errors="replace").replace("; 0 unreadable images left out", "")
    errors = [line for line in text.splitlines() if line.startswith("error")]
    last = (errors or [line for line in text.splitlines() if line.strip()] or [""])[-1][:300]
    if fuzz_damage.CANARY.exists():
        fuzz_damage.CANARY.rmdir()
        return "executed", last
    if changed:
        return "outside", last
    if code is None:
        return "hang", last
    if "\x1b]0;fuzz" in text or any(line.startswith("forged") for line in text.splitlines()):
        return "control characters", last
    if code == 2 and "Traceback" not in text:
        by_parser = "For full helptext" in text or "╭" in text
        return "refused" if by_parser or len(errors) == 1 and errors[0].endswith(".") else "unclear", last
    if code != 0 or "Traceback" in text:
        return "traceback" if code in (0, 1, 2) else "crash", last
    if case.kind == "options":
        return judge_value(case), last
    if world.digest(COMMANDS[case.command], paths) == world.undamaged[case.command]:
        return "harmless", ""
    if case.kind == "outputs" or any(word in text for word in ("unreadable", "left out", "belong to no class", "not checked")):
        return "warned", last
    kind = Path(case.target).suffix or Path(paths.get(case.kind, "")).suffix
    undetectable = any(word in case.damage for word in UNDETECTABLE.get(kind, ()) + UNDETECTABLE.get(case.kind, ()))
    return "undetected" if undetectable else "silent", last


def judge_value(case: Case) -> str:
    """Whether a value that was accepted is one that its option declares."""
    options = COMMANDS[case.command].options
    assert options is not None
    declared = declared_values(dict((flag(name), hint) for name, hint in fields_of(options))[case.target])
    try:
        return "accepted" if declared is None or declared.allows(declared.instance_from_str([case.damage])) else "silent"
    except ValueError:
        return "silent"


def run_case(number: int, config: FuzzConfig, world: World) -> Case:
    """Draw, damage, run and judge one case."""
    case, rng = draw(number, config, world)
    world.expected(case.command)
    try:
        words, paths = prepare(case, rng, world)
    except Skip:
        case.outcome = "skipped"
        return case
    before = world.state()
    code = world.run(COMMANDS[case.command].main, words, world.out)
    try:
        case.outcome, case.detail = judge(case, code, world.state() != before, paths, world)
    except (OSError, ValueError) as error:  # a command that succeeds has written its results
        case.outcome, case.detail = "silent", f"result missing or damaged: {error}"[:300]
    return case


@contextmanager
def make_world(time_limit: float) -> Iterator[World]:
    """A world in a temporary folder, removed at the end."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        fuzz_damage.CANARY = Path(folder) / "canary"
        yield World(Path(folder), time_limit)


def table(cases: list[Case]) -> str:
    """Markdown: a row for every kind."""
    columns = ("tried", *GOOD, "mishandled")
    rows: list[list[object]] = []
    for kind in [*sorted({case.kind for case in cases}), "all"]:
        outcomes = Counter(case.outcome for case in cases if kind in (case.kind, "all") and case.outcome != "skipped")
        good = [outcomes[name] for name in GOOD]
        rows.append([kind, outcomes.total(), *good, outcomes.total() - sum(good)])
    lines: list[list[object]] = [["kind", *columns], ["---"] * (len(columns) + 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def mishandled(cases: list[Case]) -> list[Case]:
    """The cases that something must be done about."""
    return [case for case in cases if case.outcome not in (*GOOD, "skipped")]


def print_report(cases: list[Case], seed: int, seconds: float) -> None:
    """Show the table, and every mishandled case."""
    print(f"{table(cases)}\n\n{len(cases)} cases of seed {seed} in {seconds:.0f} s")
    for case in mishandled(cases):
        target, damage, detail = (printable(text) for text in (case.target, case.damage, case.detail))
        print(f"- {case.number}: {case.outcome}: {case.command}, {case.kind} {target}, {damage}: {detail}")


def main() -> None:
    """Run the cases, print the table and the mishandled ones; exit code 1 if there is any."""
    config = parse(FuzzConfig)
    if unknown := sorted(set(config.kinds) - {*READERS, "options", "outputs"}):
        raise UserError(f"--kinds {unknown[0]} is no kind: give some of {', '.join((*READERS, 'options', 'outputs'))}.")
    if config.out is not None:
        check_writable(config.out.absolute().parent, "--out")
    started = time.perf_counter()
    with make_world(config.time_limit) as world:
        numbers = range(config.cases) if config.only is None else [config.only]
        cases = [run_case(number, config, world) for number in followed(numbers, "fuzz", "cases")]
        if config.only is not None:
            print(*map(printable, (world.out / "stderr").read_text(errors="replace").splitlines()), sep="\n")
    print_report(cases, config.seed, time.perf_counter() - started)
    if config.out is not None:
        found: list[dict[str, Any]] = [asdict(case) for case in cases]
        write_json(config.out, {"seed": config.seed, "cases": found})
    if mishandled(cases):
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
