"""What --data-path names: a path, and behind `::` what of it is meant, where there is more than one: `PATH::test,label=kind`.

Words between commas: the name of a split, `image=COLUMN`, `label=COLUMN` (or, of tar shards, `label=FIELD` of their .json).
"""

import os
from pathlib import Path
from typing import NamedTuple

from utils.config import UserError
from utils.untrusted import printable

SEPARATOR = "::"
ROLES = ("image", "label")


class DataPath(NamedTuple):
    """A path with its choices; text: as it was typed; split: "" where none is named; columns: {"image" or "label": its name}.

    The label "" is chosen by `label=`: all images are of one class.
    """

    text: str
    path: Path
    split: str
    columns: dict[str, str]

    def require_no_split(self, option: str, what: str) -> None:
        """Raise UserError where a split of `what` is chosen, which has none."""
        if self.split:
            raise UserError(f"{option} {printable(self.text)} names the split {printable(self.split)!r}, but {what} has none: "
                            f"leave it out behind {SEPARATOR}.")

    def require_none(self, option: str, what: str, roles: tuple[str, ...] = ROLES) -> None:
        """Raise UserError where a split of `what` is chosen, or a column for one of the roles, which it does not have."""
        self.require_no_split(option, what)
        for role in roles:
            if role in self.columns:
                raise UserError(f"{option} {printable(self.text)} names {role}={printable(self.columns[role])}, but {what} has "
                                f"no such column: leave it out behind {SEPARATOR}.")


def parse_data_path(path: str | Path, option: str) -> DataPath:
    """Take the choices off a path; raises UserError, naming `option`, for words that are none.  A path that exists has none."""
    text = str(path)
    base, found, words = text.rpartition(SEPARATOR)
    if not found or os.path.lexists(text):
        return DataPath(text, Path(text), "", {})
    splits, columns = [], dict[str, str]()
    for word in filter(None, words.split(",")):
        role, chosen, name = word.partition("=")
        if not chosen:
            splits.append(word)
        elif role in ROLES and role not in columns:
            columns[role] = name
        else:
            raise UserError(f"{option} {printable(text)} has {printable(word)!r} behind {SEPARATOR}: give the name of a split, "
                            "image=COLUMN and label=COLUMN, each once and with commas between them.")
    if len(splits) > 1:
        raise UserError(f"{option} {printable(text)} names {len(splits)} splits, {printable(' and '.join(splits))}: name one.")
    return DataPath(text, Path(base), splits[0] if splits else "", columns)
