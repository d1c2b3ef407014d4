"""Options: dataclasses that become flat command lines and JSON.

A script composes option dataclasses, each declared once beside the code that reads it.  `parse` turns them into
LlamaGen-style flags (`--gpt-model`, `--image-size`) without prefixes.  Precedence: a typed flag wins over a recipe, a
recipe over a default.  The resolved options are saved as JSON with every checkpoint.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import tyro

T = TypeVar("T")


class UserError(Exception):
    """A mistake of the user: its message is one sentence that names option, value seen, value expected and remedy."""


def parse(config: type[T], recipe: Callable[[T], dict[str, Any]] | None = None, args: list[str] | None = None) -> T:
    """Parse the command line into `config`.

    config: a dataclass, possibly of dataclasses; recipe: maps the options typed so far to {field name: value}, which
    replaces defaults but not typed flags.  Returns an instance; exits with code 2 on an unknown or malformed flag.
    """
    marks = (tyro.conf.OmitArgPrefixes,)
    description = (sys.modules[config.__module__].__doc__ or "").strip().split("\n\n")[0]
    options = tyro.cli(config, args=args, config=marks, description=description)
    if recipe is None:
        return options
    return tyro.cli(config, args=args, config=marks, description=description, default=override(_blank(config), recipe(options)))


def _blank(config: type[T]) -> T:
    """The defaults of a dataclass, with tyro's MISSING where a field has none."""
    values = {}
    for field in dataclasses.fields(config):
        if dataclasses.is_dataclass(field.type):
            values[field.name] = _blank(field.type)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            values[field.name] = tyro.MISSING
    return config(**values)


def override(options: T, values: dict[str, Any]) -> T:
    """Return a copy of `options` with the fields named in `values` replaced, wherever they are nested.

    Raises KeyError for a name that no dataclass inside `options` has.
    """
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


def to_dict(options: Any) -> dict[str, Any]:
    """Dataclass -> plain dict that JSON can hold (paths become strings, tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(options), default=str))


def from_dict(config: type[T], values: dict[str, Any]) -> T:
    """Plain dict -> flat dataclass; lists become tuples, unknown names raise UserError."""
    names = {field.name for field in dataclasses.fields(config)}
    if unknown := sorted(set(values) - names):
        raise UserError(f"unknown fields {unknown} for {config.__name__}, which has {sorted(names)}: remove or rename them.")
    return config(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def run_main(main: Callable[[], None]) -> None:
    """Run an entry point; a UserError becomes one line on standard error and exit code 2, never a traceback."""
    try:
        main()
    except UserError as error:
        # A loader process hands its error over wrapped in a traceback, whose last line is the sentence.
        sentence = str(error).strip().splitlines()[-1].removeprefix("utils.config.UserError: ")
        rank = os.environ.get("RANK", "0")
        sys.stderr.write(f"error: {sentence}\n" if rank == "0" else f"error (process {rank}): {sentence}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def write_json(path: Path, content: Any) -> None:
    """Write `content` as JSON, aside and renamed: a reader never finds half a file."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        aside.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def read_json(path: str | Path, option: str, what: str) -> Any:
    """The content of a JSON file; raises UserError naming `option` and `what` it should be when it is missing or damaged."""
    try:
        return json.loads(check_exists(path, option, what).read_text())
    except ValueError as error:
        raise UserError(f"{option} {path} is no JSON ({error}): make {what} again.") from error


def check_writable(folder: Path, option: str) -> Path:
    """Create `folder` and check that a file can be written there; raises UserError naming `option` otherwise."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{option} {folder} cannot be written ({error.strerror}): give a folder you may write to.") from error
    return folder


def check_exists(path: str | Path, option: str, what: str) -> Path:
    """Return `path` if it exists; raises UserError naming `option` and `what` it should be otherwise."""
    if not str(path) or not Path(path).exists():
        raise UserError(f"{option} {str(path)!r} does not exist: give the path of {what}.")
    return Path(path)
