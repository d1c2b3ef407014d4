"""Label ids as files hold them: the same checks whatever the storage."""

from collections.abc import Callable, Sequence

import numpy as np

from utils.config import UserError
from utils.untrusted import printable

MAX_CLASSES = 1_000_000  # a larger label is a mistake, and would ask for as many rows of every table


def require_labels(labels: np.ndarray, where: str, place: Callable[[int], str], names: Sequence[str] = (),
                   remedy: str = "number the classes from 0") -> None:
    """Raise UserError unless all labels, integers [N] with N > 0, number classes; names: of the classes, where there are any.

    where: the storage with its option; place: words for where the label of a row stands; remedy: for negative labels.
    """
    if (low := labels.min()) < 0:
        raise UserError(f"{where} has the negative label {low} {place(int(labels.argmin()))}: {remedy}.")
    high, row = labels.max(), int(labels.argmax())
    if high >= MAX_CLASSES:
        raise UserError(f"{where} has the label {high} {place(row)}: number the classes from 0, without gaps and below "
                        f"{MAX_CLASSES}.")
    if names and high >= len(names):
        raise UserError(f"{where} has the label {high} {place(row)} but names {len(names)} classes: give a name for each class.")


def number_names(names: Sequence[str], where: str) -> tuple[np.ndarray, list[str]]:
    """Names of classes, one for each image -> label ids int64 [N] in the order of the sorted names, and these."""
    found, labels = np.unique(np.array(names, object), return_inverse=True)
    if len(found) >= MAX_CLASSES:
        raise UserError(f"{where} has {len(found)} different names of classes, the first being {printable(found[0])[:60]!r}: "
                        f"name fewer than {MAX_CLASSES} classes.")
    return labels.astype(np.int64).reshape(-1), found.tolist()
