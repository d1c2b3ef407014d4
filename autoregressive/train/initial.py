"""What a GPT takes from --init-from: all that fits, of the class table the rows of classes with the same name.

Two tables are more than their shapes.  A row of the class table means a class: where the file and the codes both name their
classes, rows go by name, and the null class's row, which is the last, always goes to the last.  What projects captions reads the
features of one text encoder, and is drawn anew for those of another.
"""

from collections.abc import Iterable
from typing import Any

import torch

from autoregressive.models.gpt import GPT, GPTProvenance
from autoregressive.models.transformer import GPTConfig
from utils.class_names import ClassNames, require_same_names
from utils.config import UserError
from utils.initial import Initial, Rows, Start, fits, plan_start, read_initial, shortlist
from utils.text_encoders import encoder_facts
from utils.untrusted import printable

CONDITION = "cls_embedding."  # names of the condition's weights begin so
CLASSES = f"{CONDITION}weight"


def start_from(path: str, strict: bool, model: GPTConfig, about: GPTProvenance) -> Start:
    """What a GPT of this configuration takes from the file of --init-from, if there is one.

    strict: all or nothing; about: the GPT's classes, codes and captions.  Raises UserError where the file has nothing for it, or
    with `strict` not all.
    """
    initial = read_initial(path, "gpt")
    if initial is None:
        return Start()
    with torch.device("meta"):
        trial = GPT(model)
    named = initial.description.get("class_names", ())
    names = tuple(str(name) for name in named) if isinstance(named, (list, tuple)) else ()
    encoders = other_encoder(initial.description.get("encoder", ""), about.encoder)
    if strict:
        require_same_names(names, about.class_names, initial.where, "--code-path")
        if encoders:
            raise UserError(f"{initial.where} reads captions of {encoders}: give features of its encoder, or leave --init-strict "
                            "out to draw anew what reads captions.")
    rows, said = class_rows(initial, trial, names, about.class_names)
    notes = [*said, *other_codes(initial.description.get("tokenizer", ""), about.tokenizer)]
    anew: Iterable[str] = ()
    if encoders:
        anew = [name for name in trial.state_dict() if name.startswith(CONDITION)]
        notes.append(f"its captions are of {encoders}")
    return plan_start(trial, initial, strict, rows, set(anew), notes)


def class_rows(initial: Initial, trial: GPT, before: ClassNames, now: ClassNames) -> tuple[dict[str, Rows], list[str]]:
    """The rows of the class table to take, and what to say of them; none where the table is taken whole, or there is none.

    before, now: names of the classes of the file and of the codes, by id.
    """
    found, expected = initial.tensors.get(CLASSES), trial.state_dict().get(CLASSES)
    if found is None or expected is None or found.ndim != 2 or not fits(found[:1], expected[:1]):
        return {}, []
    named = len(before) == len(found) - 1 and len(now) == len(expected) - 1
    if not named and len(found) == len(expected) or named and before == now:
        return {}, []
    ids = {name: label for label, name in enumerate(before)} if named else {}
    known = {label: ids[name] for label, name in enumerate(now) if name in ids}
    rows = [*known.items(), (len(expected) - 1, len(found) - 1)]
    taken = shortlist(printable(now[label]) for label in known) or "none of its classes"
    anew = shortlist(printable(name) if now else str(label) for label, name in enumerate(now or range(len(expected) - 1))
                     if label not in known)
    return {CLASSES: rows}, [f"classes: took {taken} and the null class; drew anew {anew or 'none'}"]


def other_encoder(before: Any, now: str) -> str:
    """Two text encoders in words, where a file carries a record of another than that of the captions; else ""."""
    here, there = encoder_facts(now), encoder_facts(before if isinstance(before, str) else "")
    for name in ("encoder", "encoder_fingerprint"):
        if here and there and here.get(name) != there.get(name):
            return f"{name} {printable(there.get(name))} and those of this run of {printable(here.get(name))}"
    return ""


def other_codes(before: Any, now: str) -> list[str]:
    """A note where a file was trained on the codes of another tokenizer: weights fit by shape, and may mean other codes."""
    if not before or not now or before == now:
        return []
    return [f"it was trained on codes of tokenizer {printable(before)}, and those of this run are of {now}: the same number may "
            "mean another code"]
