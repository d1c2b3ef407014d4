"""Which columns of a table are images, labels and captions: by their types, then by the names that are usual for them.

What is not clear is asked for, in one sentence that names the columns there are: PATH::image=NAME,label=NAME, --caption-key NAME.
"""

import logging
from typing import Any, NamedTuple

import numpy as np

from utils.config import UserError
from utils.data_path import SEPARATOR, DataPath
from utils.labels import number_names, require_labels
from utils.packages import require_package
from utils.untrusted import printable

log = logging.getLogger("images")

IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp")
LABELS = ("label", "labels", "cls", "class")
CAPTIONS = ("text", "caption", "captions", "prompt")


class Columns:
    """The columns of a `datasets.Dataset`; where: the table with its option, for messages."""

    def __init__(self, dataset: Any, wanted: DataPath, where: str) -> None:
        self.pa, self.datasets = require_package("pyarrow", where), require_package("datasets", where)
        self.table, self.features, self.wanted, self.where = dataset.data, dataset.features, wanted, where
        self.names: list[str] = list(dataset.column_names)

    def kind(self, name: str) -> str:
        """What a column holds: image, bytes, classes, integers, strings, lists of strings, or Arrow's name of its type."""
        types, found = self.pa.types, self.table.schema.field(name).type
        if types.is_struct(found):
            inner = {each.name: each.type for each in found}
            return "image" if "bytes" in inner and _is_binary(types, inner["bytes"]) else "struct"
        if types.is_integer(found):
            return "classes" if isinstance(self.features[name], self.datasets.ClassLabel) else "integers"
        if types.is_string(found) or types.is_large_string(found):
            return "strings"
        if (types.is_list(found) or types.is_large_list(found)) and types.is_string(found.value_type):
            return "lists of strings"
        return "bytes" if _is_binary(types, found) else str(found)

    def described(self) -> str:
        """All columns with what they hold."""
        return printable(", ".join(f"{name} ({self.kind(name)})" for name in self.names))[:400] or "none"

    def read(self, name: str) -> Any:
        """A column as `pyarrow.ChunkedArray`, sound; raises UserError where places in it lead out of it."""
        column = self.table.column(name)
        try:
            column.validate(full=True)
        except (ValueError, MemoryError) as error:
            raise UserError(f"{self.where} has a damaged column {printable(name)!r} ({printable(str(error))[:120]}): make or "
                            "copy the table again.") from error
        return column

    def image(self) -> str:
        """The name of the images' column."""
        if (name := self._chosen("image", ("image", "bytes"))) is not None:
            return name
        for kind in ("image", "bytes"):
            if found := [name for name in self.names if self.kind(name) == kind]:
                return self._one_of(found, IMAGES, "image", "images")
        raise UserError(f"{self.where} has no column of images, only {self.described()}: give a table whose images are files' "
                        "bytes, as `datasets` stores its type Image.")

    def label(self) -> str | None:
        """The name of the labels' column; None where captions take their place, images are alone, or none is wanted."""
        if (name := self._chosen("label", ("classes", "integers", "strings"))) is not None:
            return name or None
        usual = [name for name in self.names if name.lower() in LABELS]
        for found in ([name for name in usual if self.kind(name) in ("classes", "integers")],
                      [name for name in self.names if self.kind(name) == "classes"],
                      [name for name in usual if self.kind(name) == "strings"]):
            if found:
                return self._one_of(found, LABELS, "label", "labels")
        if len(self.names) == 1 or self._captions():
            if numbers := [name for name in self.names if self.kind(name) == "integers"]:
                log.warning("%s: all images are of class 0, no column is called %s; if %s is the class, give %s", self.where,
                            " or ".join(LABELS), " or ".join(map(printable, numbers[:3])), self.example("label", numbers[0]))
            return None
        raise UserError(f"{self.where} has neither labels ({', '.join(LABELS)}) nor captions ({', '.join(CAPTIONS)}), only "
                        f"{self.described()}: name a column, {self.example('label', 'NAME')}, or none, "
                        f"{self.example('label', '')}, where all images are of one class.")

    def _captions(self) -> list[str]:
        return [name for name in self.names if name.lower() in CAPTIONS and self.kind(name) in ("strings", "lists of strings")]

    def caption(self, key: str) -> tuple[str, list[str]]:
        """The column of the captions, and names of fields inside it; key: its name, fields behind dots, or "" for the usual."""
        if key:
            name = next((name for name in self.names if key == name or key.startswith(f"{name}.")), None)
            if name is None:
                raise UserError(f"{self.where} has no column {printable(key)!r}, only {self.described()}: name a column of "
                                "strings.")
            return name, [part for part in key[len(name) + 1 :].split(".") if part]
        found = self._captions()
        if len(found) != 1:
            seen = f"captions in {printable(' and '.join(found))}" if found else f"no captions, only {self.described()}"
            raise UserError(f"{self.where} has {seen}: name the column, --caption-key NAME.")
        return found[0], []

    def _chosen(self, role: str, kinds: tuple[str, ...]) -> str | None:
        """The column that the path names for a role."""
        name = self.wanted.columns.get(role)
        if name is None or (role == "label" and not name):
            return name
        if name not in self.names or self.kind(name) not in kinds:
            seen = f"holds {self.kind(name)}" if name in self.names else "is none"
            raise UserError(f"{self.where} names {role}={printable(name)}, which {seen} of its columns {self.described()}: name "
                            f"one of {' or '.join(kinds)}.")
        return name

    def _one_of(self, found: list[str], usual: tuple[str, ...], role: str, what: str) -> str:
        """The only column, or the only one with a usual name; raises UserError where that is not clear."""
        named = found if len(found) == 1 else [name for name in found if name.lower() in usual]
        if len(named) != 1:
            raise UserError(f"{self.where} has {len(found)} columns that may be the {what}, {printable(', '.join(found))[:200]}: "
                            f"name one, {self.example(role, found[0])}.")
        return named[0]

    def example(self, role: str, name: str) -> str:
        """The path with a column named behind it, for messages."""
        words = [self.wanted.split] if self.wanted.split else []
        words += [f"{each}={given}" for each, given in self.wanted.columns.items() if each != role]
        return printable(f"{self.wanted.path}{SEPARATOR}{','.join([*words, f'{role}={name}'])}")


class Classes(NamedTuple):
    """Labels int64 [N], and names of the classes or none."""

    labels: np.ndarray
    names: list[str]


def read_classes(columns: Columns, rows: int) -> Classes:
    """The classes of all rows: of class labels, integers, or strings, whose sorted order numbers them; else all of class 0."""
    name = columns.label()
    if name is None:
        return Classes(np.zeros(rows, np.int64), [])
    column, kind, where = columns.read(name), columns.kind(name), f"{columns.where}, column {printable(name)!r},"
    if column.null_count:
        row = int(np.argmax(column.is_null().to_numpy()))
        raise UserError(f"{where} has no label at row {row}, as at {column.null_count} of {rows}: give every image a label.")
    if kind == "strings":
        return Classes(*number_names(column.to_pylist(), where))
    names = columns.features[name].names if kind == "classes" else []
    if kind == "classes" and not (isinstance(names, list) and names and all(isinstance(each, str) for each in names)):
        raise UserError(f"{where} holds classes whose names are {printable(names)[:80]}: give a list of strings, or integers.")
    labels = column.to_numpy()
    none = f"number the classes from 0, or give {columns.example('label', '')} where there are none"
    require_labels(labels, where, lambda row: f"at row {row}", names, none)
    return Classes(labels.astype(np.int64), names)



def _is_binary(types: Any, found: Any) -> bool:
    return types.is_binary(found) or types.is_large_binary(found)
