"""Many strings in one array, and prompts from a file."""

import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from utils.config import UserError
from utils.files import check_exists
from utils.untrusted import parse_json, printable, shortened


class Texts:
    """Strings in two arrays: forked workers would copy every page that holds a string object they touch."""

    def __init__(self, texts: Iterable[str]) -> None:
        encoded = [text.encode("utf-8", "replace") for text in texts]  # half a surrogate pair, as JSON may hold, is no character
        self._ends = np.cumsum([len(each) for each in encoded], dtype=np.int64)      # [N]
        self._data = np.frombuffer(b"".join(encoded), np.uint8)                      # [bytes]

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        start = self._ends[index - 1] if index else 0
        return self._data[start : self._ends[index]].tobytes().decode()

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    def of(self, rows: Iterable[int]) -> list[str]:
        """The strings of some rows."""
        return [self[int(row)] for row in rows]

    @property
    def checksum(self) -> str:
        """Tells two lists of strings apart."""
        return f"{zlib.crc32(self._ends.tobytes(), zlib.crc32(self._data.data)):08x}"


class Prompt(NamedTuple):
    """A prompt, and the line of JSON it came from, which an evaluator may need again; {} for plain text."""

    text: str
    about: dict[str, Any]


def well_formed(text: str) -> str:
    """A string that UTF-8 can hold: half a surrogate pair, as JSON or a command line may have it, becomes a question mark."""
    return text.encode("utf-8", "replace").decode()


def json_lines(path: Path, option: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(Line number from 1, JSON object) of every line that is not empty; raises UserError naming file and line."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _json_object(line, f"{option} {printable(path)}, line {number},")
    except OSError as error:
        raise UserError(f"{option} {printable(path)} cannot be read ({error.strerror}): give a file you may read.") from error


def _json_object(line: bytes, where: str) -> dict[str, Any]:
    try:
        found = parse_json(line)
    except ValueError as error:
        raise UserError(f"{where} is no JSON ({shortened(error)}): mend or remove the line.") from error
    if not isinstance(found, dict):
        raise UserError(f"{where} is no JSON object but {printable(json.dumps(found))[:60]}: mend or remove the line.")
    return found


def string_in(found: dict[str, Any], key: str, where: str) -> str:
    """The string under a key, with dots into inner objects ("text.short"); raises UserError naming `where` otherwise."""
    value: Any = found
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if not isinstance(value, str):
        kind = "no" if value is None else "other than a string as"
        seen = printable(", ".join(found))[:120] or "nothing"
        raise UserError(f"{where} has {kind} {printable(key)!r}, only {seen}: mend the line, or name the field of the text.")
    return value


def read_prompts(path: str | Path, option: str = "--prompts") -> list[Prompt]:
    """Prompts of a file: lines of text; .jsonl with `prompt` (GenEval) or `text`; .tsv with a column `Prompt` (PartiPrompts).

    Empty lines are left out.  Raises UserError, naming `option`, for a file without prompts or a malformed line.
    """
    path = check_exists(path, option, "a file of prompts")
    if path.is_dir():
        raise UserError(f"{option} {path} is a folder: give a file of prompts.")
    try:
        if path.suffix == ".jsonl":
            found = [Prompt(string_in(line, "prompt" if "prompt" in line else "text", f"{option} {path}, line {number},"), line)
                     for number, line in json_lines(path, option)]
        else:
            lines = path.read_text("utf-8").splitlines()
            found = [Prompt(text.strip(), {}) for text in (_column(lines, "Prompt", f"{option} {path}") if path.suffix == ".tsv"
                                                           else lines)]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{option} {path} is no text that can be read ({shortened(error)}): give prompts in UTF-8.") from error
    if not (found := [prompt for prompt in found if prompt.text.strip()]):
        raise UserError(f"{option} {path} is empty: give a file with a prompt in every line.")
    return found


def _column(lines: list[str], name: str, where: str) -> list[str]:
    """A column of tab-separated lines, the first of which names the columns."""
    names = lines[0].split("\t") if lines else [name]
    if name not in names:
        raise UserError(f"{where} has no column {name}, only {printable(', '.join(names))[:120]}: give PartiPrompts' table.")
    cells = [line.split("\t") for line in lines[1:]]
    return [row[names.index(name)] for row in cells if len(row) > names.index(name)]
