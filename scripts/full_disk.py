"""Let commands run out of space at random places, make space, run them again, and compare with what an undisturbed run gives.

    python scripts/full_disk.py --cases 300 --seed 0 --out report.json       no file may grow beyond a random size
    mount -t tmpfs -o size=64m tmpfs /mnt/small && python scripts/full_disk.py --disk /mnt/small

A command must end with one sentence and exit code 2, and the same command must carry on once there is space.  Its results must
then be those of the undisturbed run, and no file may be left over.  By default the limit is the system's on the size of a file
(RLIMIT_FSIZE); with --disk the file system is filled but for a random number of bytes.  Standard output goes to a file that is
limited too.  Commands and world are those of `fuzz.py`.  Not part of the tests, which run a small share of it.
"""

import fcntl
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started by its path

from scripts.fuzz_commands import COMMANDS, words_of
from scripts.fuzz_world import World
from scripts.paper.table import markdown_table
from utils.config import AboveZero, Positive, Seed, UserError, parse, run_main
from utils.files import check_writable, write_json
from utils.logs import followed
from utils.untrusted import printable

LARGEST_DISK = 4 << 30  # bytes of a file system that is filled: a larger one was hardly made for it
SAID = 1 << 20          # bytes of standard error that a pipe holds until the command has ended
UNTIDY = ("Traceback", "Exception ignored", "Logging error")
REFUSED, ENOUGH = "refused in one sentence", "enough space"


@dataclass
class FullDiskConfig:
    """What to try."""

    cases: Positive = 300
    """Number of cases, the commands in turn."""
    seed: Seed = 0
    """Case n of a seed has always the same command, and the same room where the same is written."""
    commands: tuple[str, ...] = ()
    """Only these commands; empty: all."""
    disk: Path | None = None
    """Mount point of a small file system to fill; left out: the size of files is limited."""
    time_limit: AboveZero = 30.0
    """Seconds after which a command counts as hanging."""
    out: Path | None = None
    """JSON to write: every case with its outcome."""


@dataclass
class Case:
    """One command with too little room, and what came of it."""

    number: int
    command: str
    room: int      # bytes
    written: int   # bytes that the undisturbed command needs
    outcome: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Undisturbed:
    """What a command leaves where there is space."""

    sizes: list[int]       # bytes of its files, ascending; on a disk running sums, and last what it needs on the way
    results: list[str]
    files: dict[str, int]  # names, and how many files bear them


class Space:
    """The room that a command has: on a disk, or without one in each file."""

    def __init__(self, disk: Path | None) -> None:
        self.disk = disk

    def free(self) -> int:
        """Bytes left on the disk."""
        return shutil.disk_usage(self.disk).free if self.disk else 0

    @contextmanager
    def limited(self, main: Callable[[], None], room: int) -> Iterator[Callable[[], None]]:
        """The entry point, which within the block has so many bytes."""
        if self.disk is None:
            def confined() -> None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
                main()

            yield confined
            return
        with tempfile.TemporaryFile(dir=self.disk) as ballast:
            if (size := self.free() - room) > 0:
                os.posix_fallocate(ballast.fileno(), 0, size)
            yield main


def run(world: World, main: Callable[[], None], words: list[str],
        watch: Callable[[], None] = lambda: None) -> tuple[int | None, str]:
    """Exit code, None for a hang, and standard error, which goes through a pipe: a file would be limited too."""
    read, write = os.pipe()
    try:
        fcntl.fcntl(read, fcntl.F_SETPIPE_SZ, SAID)
        os.set_blocking(read, False)
        code = world.run(main, words, world.out, write, watch)
    finally:
        os.close(write)
    with os.fdopen(read, "rb") as said:
        return code, (said.read() or b"").decode(errors="replace")


def files_of(world: World) -> list[Path]:
    """The files that a case may write."""
    return [path for folder in (world.out, world.case) for path in folder.rglob("*") if path.is_file()]


def names_of(world: World) -> dict[str, int]:
    """Names of these files and how many bear them, but not TensorBoard's, of which each run has one more, nor measured rates."""
    return Counter(str(path.relative_to(world.scratch)) for path in files_of(world)
                   if "tensorboard" not in path.parts and not path.name.endswith(".rate.json"))


def undisturbed(name: str, world: World, space: Space) -> Undisturbed:
    """Run a command with all the space there is."""
    command, paths = COMMANDS[name], world.fresh(COMMANDS[name].copied)
    before = least = space.free()

    def watch() -> None:
        nonlocal least
        least = min(least, space.free())

    code, said = run(world, command.main, words_of(command, paths, world.out), watch)
    if code != 0:
        raise UserError(f"{name} fails on the undisturbed world: {said[-3000:]}")
    sizes = sorted(path.stat().st_size for path in files_of(world))
    if space.disk:
        block = os.statvfs(space.disk).f_frsize
        sizes = [*accumulate(-(-size // block) * block for size in sizes), before - least]
    return Undisturbed(sizes, world.digest(command, paths), names_of(world))


def judge(code: int | None, said: str) -> str:
    """What became of a command that had too little room."""
    errors = [line for line in said.splitlines() if line.startswith("error")]
    if code is None:
        return "hang"
    if any(sign in said for sign in UNTIDY):
        return "traceback"
    if code not in (0, 2):
        return f"exit code {code}"
    return ENOUGH if code == 0 else REFUSED if len(errors) == 1 and errors[0].endswith(".") else "unclear"


def same_results(name: str, paths: dict[str, str], world: World, expected: Undisturbed) -> bool:
    """Whether a command that succeeded has made what the undisturbed one makes."""
    try:
        return world.digest(COMMANDS[name], paths) == expected.results
    except (OSError, ValueError):
        return False


def try_out(case: Case, world: World, space: Space, expected: Undisturbed) -> None:
    """Run the command of a case with its room, then with all, and judge both."""
    command, paths = COMMANDS[case.command], world.fresh(COMMANDS[case.command].copied)
    words = words_of(command, paths, world.out)
    with space.limited(command.main, case.room) as main:
        code, said = run(world, main, words)
    case.outcome, case.detail = judge(code, said), " ".join(said.split())[-300:]
    code, said = run(world, command.main, words)
    if code != 0 or any(sign in said for sign in UNTIDY):
        case.outcome, case.detail = "does not carry on", f"{' '.join(said.split())[-300:]} (before: {case.detail})"
    elif not same_results(case.command, paths, world, expected):
        case.outcome = "other results"
    elif differing := set(names_of(world).items()) ^ set(expected.files.items()):
        case.outcome, case.detail = "other files", f"{', '.join(sorted(name for name, _ in differing))} (before: {case.detail})"


def draw(number: int, seed: int, names: list[str], needs: Callable[[str], Undisturbed]) -> Case:
    """Case `number` of the seed: commands in turn, each of its files as likely as any to be the one that does not fit."""
    rng, name = random.Random(seed * 1_000_003 + number), names[number % len(names)]
    sizes = needs(name).sizes
    return Case(number, name, int(rng.random() * rng.choice(sizes)), max(sizes))


def mishandled(cases: list[Case]) -> list[Case]:
    """The cases that something must be done about."""
    return [case for case in cases if case.outcome not in (REFUSED, ENOUGH)]


def table(cases: list[Case]) -> str:
    """Markdown: a row for every command."""
    rows = []
    for name in [*dict.fromkeys(case.command for case in cases), "all"]:
        own = [case for case in cases if name in (case.command, "all")]
        outcomes = Counter(case.outcome for case in own)
        rows.append([name, *map(str, (len(own), outcomes[REFUSED], outcomes[ENOUGH], len(mishandled(own))))])
    return markdown_table(["command", "tries", REFUSED, ENOUGH, "mishandled"], rows)


def check_disk(disk: Path) -> None:
    """Raise UserError unless `disk` is a small file system that may be filled."""
    if not disk.is_mount():
        raise UserError(f"--disk {disk} is no mount point: mount a small file system there, for example by "
                        f"mount -t tmpfs -o size=64m tmpfs {disk}.")
    if shutil.disk_usage(disk).total > LARGEST_DISK:
        raise UserError(f"--disk {disk} has more than {LARGEST_DISK >> 30} GiB, all of which would be filled: give a small one.")
    check_writable(disk, "--disk")


def run_cases(config: FullDiskConfig) -> list[Case]:
    """Draw and try all cases; a command runs undisturbed before its first one."""
    names, cases, known, space = list(config.commands or COMMANDS), list[Case](), dict[str, Undisturbed](), Space(config.disk)
    with tempfile.TemporaryDirectory(prefix="full-disk-") as folder, tempfile.TemporaryDirectory(
            prefix="full-disk-", dir=config.disk) as scratch:
        world = World(Path(folder), config.time_limit, Path(scratch))

        def needs(name: str) -> Undisturbed:
            if name not in known:
                known[name] = undisturbed(name, world, space)
            return known[name]

        for number in followed(range(config.cases), "full disk", "cases"):
            cases.append(draw(number, config.seed, names, needs))
            try_out(cases[-1], world, space, needs(cases[-1].command))
    return cases


def main() -> None:
    """Try the cases, print the table and what was mishandled; exit code 1 if anything was."""
    config = parse(FullDiskConfig)
    if unknown := sorted(set(config.commands) - set(COMMANDS)):
        raise UserError(f"--commands {unknown[0]!r} is none of {', '.join(COMMANDS)}: give some of these.")
    if config.disk is not None:
        check_disk(config.disk)
    if config.out is not None:
        check_writable(config.out.absolute().parent, "--out")
    started, cases = time.perf_counter(), run_cases(config)
    print(f"{table(cases)}\n{len(cases)} cases of seed {config.seed} in {time.perf_counter() - started:.0f} s")
    for case in mishandled(cases):
        print(f"- {case.number}: {case.outcome}: {case.command}, {case.room} of {case.written} bytes: {printable(case.detail)}")
    if config.out is not None:
        write_json(config.out, {"seed": config.seed, "cases": [asdict(case) for case in cases]})
    if mishandled(cases):
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
