"""Names of the classes, carried from the images to codes, models and samples: an id must mean the same in all of them."""

from utils.config import UserError
from utils.untrusted import printable

ClassNames = tuple[str, ...]  # by label id, printable; empty where nothing says them


def require_same_names(found: ClassNames, expected: ClassNames, what: str, source: str) -> None:
    """Raise UserError naming the first class that two sources call differently; one that says no names fits every other.

    what, source: the two, with the options that named them.
    """
    if difference := different_names(found, expected, what, source):
        raise UserError(f"{difference}: give sources with the same classes in the same order.")


def different_names(found: ClassNames, expected: ClassNames, what: str, source: str) -> str:
    """What two sources call differently, in words; "" where nothing, or where one of them says no names."""
    if not found or not expected or tuple(found) == tuple(expected):
        return ""
    if len(found) != len(expected):
        return f"{what} names {len(found)} classes but {source} names {len(expected)}"
    label = next(label for label, (here, there) in enumerate(zip(found, expected)) if here != there)
    here, there = (printable(names[label])[:60] for names in (found, expected))
    return f"{what} calls class {label} '{here}' but {source} calls it '{there}'"
