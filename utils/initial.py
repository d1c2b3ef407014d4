"""The weights that a training begins from (--init-from): all that fit the model, and a line that says which those are.

What has another shape, or no counterpart, is drawn anew as in any training: the table of the classes, codebooks of another size,
the layers of another head.  With --init-strict every difference is an error instead.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from utils.checkpoint import fingerprint, read_export, require_finite, require_tensors
from utils.config import UserError
from utils.untrusted import printable

_SHOWN = 10  # names in one line

Rows = list[tuple[int, int]]  # of a table: (row of the model, row of the file that it takes)


@dataclass(frozen=True)
class Initial:
    """An exported model to begin from."""

    where: str                    # the option and its value
    description: dict[str, Any]   # what the file says of its model
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Start:
    """What a model takes before its first step."""

    tensors: dict[str, Tensor] = field(default_factory=dict)                  # whole
    rows: dict[str, tuple[list[int], Tensor]] = field(default_factory=dict)   # of tables: rows of the model, and their values
    facts: dict[str, str] = field(default_factory=dict)                       # of a run's record
    text: str = ""                                                            # for the log

    @torch.no_grad()
    def load(self, model: nn.Module) -> None:
        """Copy the weights into the model that was planned for; the others stay as they are."""
        model.load_state_dict(self.tensors, strict=False)
        state = model.state_dict()
        for name, (rows, values) in self.rows.items():
            state[name][rows] = values.to(state[name])


def read_initial(path: str, kind: str) -> Initial | None:
    """The model that --init-from names; None for an empty path."""
    if not path:
        return None
    return Initial(f"--init-from {path}", *read_export(path, kind, "--init-from"))


def plan_start(model: nn.Module, initial: Initial | None, strict: bool = False, rows: Mapping[str, Rows] | None = None,
               anew: Collection[str] = (), notes: Sequence[str] = ()) -> Start:
    """What `model`, which may be without memory ("meta"), takes from a file.

    strict: all, or a UserError; rows: of tables whose rows mean something, the pairs to take; anew: names that are not taken
    though they fit; notes: what else to say.  A run whose record says other weights than `facts` is not continued: it would be
    the result of those.  Raises UserError where nothing fits, or a weight that is taken is not finite.
    """
    if not initial:
        return Start()
    facts = {"the weights of --init-from": fingerprint(initial.tensors)}
    if strict:
        require_tensors(model, initial.tensors, initial.where, "give a file that fits, or leave --init-strict out")
        return Start(initial.tensors, facts=facts, text=f"{initial.where}: took all {len(initial.tensors)} tensors")
    expected, rows = model.state_dict(), {name: pairs for name, pairs in (rows or {}).items() if pairs}
    whole = {name: tensor for name, tensor in initial.tensors.items()
             if name not in rows and name not in anew and name in expected and fits(tensor, expected[name])}
    parameters = {name for name, parameter in model.named_parameters() if parameter.ndim > 1}
    if not parameters & set(whole):
        raise UserError(f"{initial.where} shares no weights with this model{_difference(expected, initial.tensors)}: give a file "
                        "of the same width, or leave the option out.")
    parts = {name: ([row for row, _ in pairs], initial.tensors[name][[row for _, row in pairs]]) for name, pairs in rows.items()}
    for name, tensor in (whole | {name: values for name, (_, values) in parts.items()}).items():
        require_finite(name, tensor, initial.where)
    drawn = {name: tensor for name, tensor in expected.items() if name not in whole}
    unused = {name: tensor for name, tensor in initial.tensors.items() if name not in whole and name not in rows}
    return Start(whole, parts, facts, _told(initial.where, expected, whole, parts, drawn, unused, notes))


def fits(found: Tensor, expected: Tensor) -> bool:
    """Whether a tensor can stand in the place of another."""
    return found.shape == expected.shape and found.is_floating_point() == expected.is_floating_point()


def _difference(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """The first tensor that two models have in different shapes, in words."""
    for name in expected:
        if name in found and found[name].shape != expected[name].shape and expected[name].ndim > 1:
            return f", whose {name} is {tuple(expected[name].shape)} and not {tuple(found[name].shape)}"
    return ""


def _told(where: str, expected: Mapping[str, Tensor], whole: Mapping[str, Tensor], parts: Mapping[str, tuple[list[int], Tensor]],
          drawn: Mapping[str, Tensor], unused: Mapping[str, Tensor], notes: Sequence[str]) -> str:
    """What was taken and what was drawn anew, in one line."""
    numbers = sum(tensor.numel() for tensor in whole.values()) + sum(values.numel() for _, values in parts.values())
    said = [f"{where}: took {len(whole)} of {len(expected)} tensors, {numbers:,} of "
            f"{sum(tensor.numel() for tensor in expected.values()):,} numbers"]
    said += [f"of {name} {len(rows)} of {len(expected[name])} rows" for name, (rows, _) in parts.items()]
    if drawn := {name: tensor for name, tensor in drawn.items() if name not in parts}:
        said.append(f"drew anew {listed(drawn)}")
    if unused:
        said.append(f"left {listed(unused)}")
    return "; ".join([*said, *notes])


def listed(tensors: Mapping[str, Tensor]) -> str:
    """Names with their shapes; those of one shape that differ in the number of a layer stand together, long lists are cut."""
    def kind(name: str, tensor: Tensor) -> tuple[str, tuple[int, ...]]:
        return re.sub(r"\.\d+(?=\.|$)", ".*", name), tuple(tensor.shape)

    counts = Counter(kind(name, tensor) for name, tensor in tensors.items())
    alone = {kind(name, tensor): name for name, tensor in tensors.items()}
    return shortlist(f"{pattern} {shape} {count} times" if count > 1 else f"{printable(alone[pattern, shape])} {shape}"
                     for (pattern, shape), count in counts.items())


def shortlist(texts: Iterable[str]) -> str:
    """Texts with commas between them, the first ten of many."""
    found = list(texts)
    return ", ".join(found[:_SHOWN]) + (f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")
