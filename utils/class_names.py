"""Names of the classes, carried from the images to codes, models and samples: an id must mean the same in all of them.

ImageNet's folders are called by WordNet's numbers ("n02099601"); a person is shown, and types, words for them.
"""

import difflib
import re
from functools import cache

from utils.config import UserError
from utils.untrusted import printable

IMAGENET_CLASSES = 1000

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


def words_for(names: ClassNames, num_classes: int) -> ClassNames:
    """What to call classes before a person: their names, ImageNet's words for WordNet's numbers and for 1,000 nameless ones."""
    if not names:
        known = num_classes == IMAGENET_CLASSES
        return tuple(_imagenet_words().values()) if known else tuple(f"class {label}" for label in range(num_classes))
    words = _imagenet_words() if all(re.fullmatch(r"n\d{8}", name) for name in names) else {}
    return tuple(words.get(name, name) for name in names)


@cache
def _imagenet_words() -> dict[str, str]:
    """WordNet's number -> words ("tench, Tinca tinca") of ImageNet's 1,000 classes in the order of their ids."""
    from timm.data import ImageNetInfo  # takes a second, and only 1,000 classes or WordNet's numbers need it

    found = ImageNetInfo()
    return dict(zip(found.label_names(), found.label_descriptions(), strict=True))


def find_class(wanted: str | int, names: ClassNames, what: str) -> int:
    """The id of a class that is given by its id, its name, one of its names between commas, or a part that only it has.

    names: by label id, as `words_for` gives them; case does not matter.  Raises UserError, naming `what` was given, for an id out
    of range and for a name of no class or of several.
    """
    if not isinstance(wanted, str) or re.fullmatch(r"\d+", wanted.strip()):
        if 0 <= int(wanted) < len(names):
            return int(wanted)
        raise UserError(f"{what} {wanted} is out of range: the model knows classes 0 to {len(names) - 1}.")
    text = " ".join(wanted.lower().split())
    spoken = [[part.strip() for part in name.lower().split(",")] for name in names]
    for fits in (lambda label: text == names[label].lower(), lambda label: text in spoken[label],
                 lambda label: text and text in names[label].lower()):
        if found := [label for label in range(len(names)) if fits(label)]:
            break
    else:
        near = difflib.get_close_matches(text, [part for parts in spoken for part in parts], 3, 0.6)
        remedy = f"did you mean {' or '.join(map(repr, near))}?" if near else f"give an id from 0 to {len(names) - 1}, or a name."
        raise UserError(f"{what} {printable(wanted)[:60]!r} is the name of no class: {remedy}")
    if len(found) > 1:
        few = "; ".join(f"{label} {printable(names[label])[:40]}" for label in found[:5])
        more = f"; {len(found) - 5} others" if len(found) > 5 else ""
        raise UserError(f"{what} {printable(wanted)[:60]!r} fits {len(found)} classes ({few}{more}): give one of these ids.")
    return found[0]
