"""Options: dataclasses that become flat command lines and JSON.

A script composes option dataclasses, each declared once beside the code that reads it.  `parse` turns them into
LlamaGen-style flags (`--gpt-model`, `--image-size`) without prefixes.  Precedence: a typed flag wins over a recipe, a
recipe over a default.  Every option declares the values that make sense in its type (`Positive`, `Fraction`, ...): `--help`
shows them, and `check_options` checks all of them before anything else happens.
"""

import dataclasses
import errno
import json
import logging
import math
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, TextIO, TypeVar, get_args, get_origin, get_type_hints

import tyro
from tqdm import tqdm
from tyro.constructors import PrimitiveConstructorSpec

from utils.signals import LAUNCHED, RETRY, leaving_at_once

T = TypeVar("T")


class UserError(Exception):
    """A mistake of the user: its message is one sentence that names option, value seen, value expected and remedy."""


class Values(PrimitiveConstructorSpec[Any]):
    """The values of an option that make sense: metadata of an `Annotated` type.

    kind: int, float or str; metavar: how --help shows them; text: what to give, in words; allows: whether a value is one.
    """

    text: str
    allows: Callable[[Any], bool]

    def __init__(self, kind: type, metavar: str, text: str, allows: Callable[[Any], bool]) -> None:
        super().__init__(nargs=1, metavar=metavar, instance_from_str=lambda words: kind(words[0]),
                         is_instance=lambda value: isinstance(value, (kind, int) if kind is float else kind),
                         str_from_instance=lambda value: [str(value)])
        vars(self).update(text=text, allows=allows)  # the base class is frozen


_LARGEST = 2**62  # of an integer: beyond it arithmetic on sizes overflows


def interval(kind: type, low: float, high: float = math.inf, open_low: bool = False, open_high: bool = False) -> Values:
    """Numbers from low to high; an open end is excluded, and so are NaN and infinity."""
    name, bounded = kind.__name__.upper(), high < math.inf
    metavar = f"{name}{'>' if open_low else '>='}{low}"
    if bounded:
        metavar = f"{low}{'<' if open_low else '<='}{name}{'<' if open_high else '<='}{high}"
    text = "an integer" if kind is int else "a number"
    start = f"above {low}" if open_low else f"from {low}" if bounded else f"of {low} or more"
    end = f" to {'below ' if open_high else ''}{high}" if bounded else ""

    def allows(value: float) -> bool:
        bounded_value = math.isfinite(value) and (kind is not int or value <= _LARGEST)
        return bounded_value and (low < value if open_low else low <= value) and (
            value < high if open_high else value <= high)

    return Values(kind, metavar, f"{text} {start}{end}", allows)


def choices(names: Iterable[str]) -> Values:
    """The names of a table's rows."""
    rows = tuple(names)
    return Values(str, "{" + ",".join(rows) + "}", f"one of {', '.join(rows)}", rows.__contains__)


Count = Annotated[int, interval(int, 0)]
Positive = Annotated[int, interval(int, 1)]
NonNegative = Annotated[float, interval(float, 0)]
AboveZero = Annotated[float, interval(float, 0, open_low=True)]
Probability = Annotated[float, interval(float, 0, 1)]
Fraction = Annotated[float, interval(float, 0, 1, open_high=True)]
Seed = Annotated[int, interval(int, 0, 2**32 - 1)]
Device = Annotated[str, choices(("auto", "cuda", "cpu"))]
Precision = Annotated[str, choices(("auto", "bf16", "none"))]


NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What is said of files in one sentence: no space, a folder in the place of a file, or the other way round, no permission.
_FILE_ERRORS = (*NO_SPACE, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)
_print_thread_error = threading.excepthook
_undo = list[Callable[[], None]]()


def command_line(words: list[str] | None = None) -> str:
    """The command that is running, as it can be typed again in the repository; words: its options, those typed if None."""
    script = Path(sys.argv[0]).absolute()
    root = Path(__file__).absolute().parents[1]
    name = script.relative_to(root) if script.is_relative_to(root) else Path(script.name)
    return shlex.join(["python", str(name), *(sys.argv[1:] if words is None else words)])


def flag(name: str) -> str:
    """The command line's spelling of a field."""
    return f"--{name.replace('_', '-')}"


def parse(config: type[T], recipe: Callable[[T], dict[str, Any]] | None = None, args: list[str] | None = None) -> T:
    """Parse the command line into `config`.

    config: a dataclass, possibly of dataclasses; recipe: maps the options typed so far to {field name: value}, which
    replaces defaults but not typed flags.  Returns an instance; exits with code 2 on an unknown or malformed flag.
    Raises UserError for a value that makes no sense.
    """
    words, defaults = sys.argv[1:] if args is None else args, _blank(config)
    description = f"{sys.modules['__main__'].__doc__ or ''}\n\n{config.__doc__}".strip()

    def read(words: list[str], default: T) -> T:
        options = tyro.cli(config, args=words, config=(tyro.conf.OmitArgPrefixes,), description=description, default=default)
        check_options(options)
        return options

    if recipe is not None and {"-h", "--help"} & set(words):  # show the defaults that the other words select
        with suppress(UserError):
            others = [word for word in words if word not in ("-h", "--help")]
            defaults = override(defaults, recipe(read(others, _blank(config, missing=Path()))))
    options = read(words, defaults)
    return options if recipe is None else read(words, override(defaults, recipe(options)))


def check_options(options: Any) -> None:
    """Raise UserError naming the first option, nested ones too, whose value is not among those it declares.

    A list of values may be empty only where its default is.
    """
    for name, hint in get_type_hints(type(options), include_extras=True).items():
        value = getattr(options, name)
        if dataclasses.is_dataclass(value):
            check_options(value)
        elif value == () and getattr(type(options), name, ()):
            raise UserError(f"{flag(name)} is empty: give at least one value.")
        elif value is not None and (declared := declared_values(hint)):
            for each in value if isinstance(value, tuple) else (value,):
                if not declared.allows(each):
                    raise UserError(f"{flag(name)} {each} is out of range: give {declared.text}.")


def declared_values(hint: Any) -> Values | None:
    """The `Values` in a type such as Count, tuple[Count, ...] or Count | None; None where there are none."""
    found = (part if isinstance(part, Values) else declared_values(part)
             for part in (*getattr(hint, "__metadata__", ()), *get_args(hint)))
    return next((values for values in found if values), None)


def _blank(config: type[T], missing: Any = tyro.MISSING) -> T:
    """The defaults of a dataclass, with `missing` where a field has none."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            nested = isinstance(field.type, type) and dataclasses.is_dataclass(field.type)
            several = get_origin(field.type) is tuple and missing is not tyro.MISSING
            absent = (missing,) if several else missing
            values[field.name] = _blank(field.type, missing) if nested else absent  # type: ignore[arg-type]
    return config(**values)


def defaults_of(config: type) -> dict[str, Any]:
    """{field name: default} of a dataclass of options and of those inside it, as JSON holds it; None where there is none."""
    return flatten(to_dict(_blank(config, missing=None)))


def override(options: T, values: dict[str, Any]) -> T:
    """A copy of `options` with the fields named in `values` replaced, nested ones too; KeyError for an unknown name."""
    left = dict(values)

    def replace(node: Any) -> Any:
        changes = {}
        for field in dataclasses.fields(node):
            if dataclasses.is_dataclass(getattr(node, field.name)):
                changes[field.name] = replace(getattr(node, field.name))
            elif field.name in left:
                changes[field.name] = left.pop(field.name)
        return dataclasses.replace(node, **changes)

    result = replace(options)
    if left:
        raise KeyError(f"no option named {sorted(left)} in {type(options).__name__}")
    return result


def flatten(options: dict[str, Any]) -> dict[str, Any]:
    """The dict of nested dataclasses -> {field name: value}; names differ, as flags do."""
    flat: dict[str, Any] = {}
    for name, value in options.items():
        flat |= flatten(value) if isinstance(value, dict) else {name: value}
    return flat


def to_dict(options: Any) -> dict[str, Any]:
    """Dataclass -> plain dict that JSON can hold (paths become strings, tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(options), default=str))


def from_dict(config: type[T], values: dict[str, Any]) -> T:
    """Plain dict -> flat dataclass; lists become tuples, unknown names raise UserError."""
    names = {field.name for field in dataclasses.fields(config)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - names):
        raise UserError(f"unknown fields {unknown} for {config.__name__}, which has {sorted(names)}: remove or rename them.")
    return config(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def require_multiple(option: str, value: int, divisor: int, of: str) -> None:
    """Raise UserError unless `value`, given by `option`, is a multiple of `divisor`, which is the number `of` something."""
    if value % divisor:
        raise UserError(f"{option} {value} is not a multiple of {divisor}, {of}: choose one that is.")


def when_refused(undo: Callable[[], None]) -> None:
    """Have `undo` called where the command ends by a UserError, the last one first: a refusal leaves nothing behind."""
    _undo.append(undo)


def run_main(main: Callable[[], None]) -> None:
    """Run an entry point; a UserError becomes one line on standard error and exit code 2, never a traceback.

    So does a file that cannot be read or written, such as one on a full disk.
    """
    threading.excepthook = _thread_failed
    _undo.clear()
    try:
        try:
            with leaving_at_once():
                main()
        finally:  # also when --help has left by SystemExit: a broken pipe is met here and not at the interpreter's end
            _flush_output()
        if os.environ.get("WORLD_SIZE", "1") != "1":
            # Threads of gloo now and then abort the interpreter while it shuts down, which torchrun takes for a failed run.
            logging.shutdown()
            os._exit(0)
    except UserError as error:
        while _undo:
            with suppress(OSError):
                _undo.pop()()
        # A loader process hands its error over wrapped in a traceback, whose last line is the sentence.
        _complain(" ".join(str(error).rpartition("utils.config.UserError: ")[2].split()))
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of `--help | head` has seen enough
        pass
    except Exception as error:
        if cause := file_error(error):
            name = cause.filename2 or cause.filename or "a file"
            name = os.fsdecode(name) if isinstance(name, bytes) else name
            _complain(f"{name} cannot be read or written ({cause.strerror}): make space, or give a place where you may read and "
                      "write; the same command then carries on.")
            sys.exit(2)
        if os.environ.get("WORLD_SIZE", "1") == "1" or not _lost_peer(error):
            raise
        _complain(f"another process is gone ({' '.join(str(error).split())[:200]}).")
        os._exit(RETRY)  # the interpreter's end would wait for it


def _lost_peer(error: Exception) -> bool:
    from utils.distributed import lost_peer  # torch is not imported for options alone

    return lost_peer(error)


def file_error(error: BaseException) -> OSError | None:
    """The error of a file that cannot be read or written, if that is what `error` is.

    torch hides it behind a RuntimeError, or tells it in words alone (of shared memory).
    """
    found: BaseException | None = error
    while isinstance(found, RuntimeError):
        if told := [number for number in NO_SPACE if os.strerror(number) in str(found)]:
            return OSError(told[0], os.strerror(told[0]))
        found = found.__cause__ or found.__context__
    return found if isinstance(found, OSError) and found.errno in _FILE_ERRORS else None


def _thread_failed(args: threading.ExceptHookArgs) -> None:
    """Say nothing of a full disk: TensorBoard's thread hands the error over to the main one too."""
    if args.exc_value is None or not file_error(args.exc_value):
        _print_thread_error(args)


def _flush_output() -> None:
    """Write what was printed; raises OSError where that fails."""
    try:
        sys.stdout.flush()
    except OSError as error:
        _silence(sys.stdout)
        error.filename = "standard output"
        raise


def _silence(stream: TextIO) -> None:
    """Let a stream end nowhere: what is still buffered would fail again, with another exit code, at the interpreter's end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _complain(sentence: str) -> None:
    """Write one sentence to standard error; of several processes scripts/launch.py, where it started them, writes one."""
    rank, file = os.environ.get("RANK", "0"), os.environ.get("TORCHELASTIC_ERROR_FILE")
    try:
        for bar in list(getattr(tqdm, "_instances", ())):  # the sentence has a line of its own
            bar.close()
        if LAUNCHED in os.environ and file:
            with suppress(OSError):
                Path(file).write_text(json.dumps({"message": sentence, "timestamp": str(int(time.time()))}))
                return
        sys.stderr.write(f"error: {sentence}\n" if rank == "0" else f"error (process {rank}): {sentence}\n")
    except OSError:  # nothing can be said, and the exit code is told all the same
        _silence(sys.stderr)
