"""Rejection sampling: draw more candidates than wanted and keep those that a classifier is surest of.

IAR2-XXL's published FID of 1.50 is with rejection sampling, 1.76 without (tables 2 and 3), so a figure must always say
which it is: the npz says it under `rejection` in its options.  The idea is VQ-VAE-2's (Razavi et al. 2019).  Candidates
stay in OUT.candidates.npz, from which another classifier can select without drawing again.
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from utils.checkpoint import fingerprint
from utils.class_names import ClassNames, require_same_names
from utils.classifier import load_classifier
from utils.config import Positive, UserError
from utils.crops import to_tensor
from utils.distributed import Processes, all_reduce_sum
from utils.hub import is_hub_name, published_file
from utils.image_store import ImageStore
from utils.logs import progress
from utils.npz import open_array

log = logging.getLogger("rejection")

_COPY_ROWS = 256  # selected images in memory at once


@dataclass
class RejectionOptions:
    """How many candidates are drawn and what selects among them."""

    rejection_ratio: Positive = 1
    """Candidates drawn for each sample that is kept; 1: no rejection sampling."""
    classifier: str = ""
    """What selects: a timm model by name (downloaded), or a file of evaluations/c2i/classifier.py.
    Its classes must be the GPT's in the same order: another number, or other names in a file, are refused."""
    classifier_weights: Path | None = None
    """Local file with the weights of the timm model, instead of its download."""
    classifier_batch_size: Positive = 64
    """Candidates a process classifies at once."""


@dataclass(frozen=True)
class Selector:
    """A classifier on the CPU with its preprocessing, on any device: uint8 [B, H, W, 3] -> what the model takes."""

    name: str
    model: nn.Module
    prepare: Callable[[Tensor], Tensor]

    def note(self, ratio: int) -> dict[str, Any]:
        """What a selection depends on besides its candidates."""
        return {"ratio": ratio, "classifier": self.name, "classifier_fingerprint": fingerprint(self.model.state_dict())}


def check_rejection(options: RejectionOptions) -> None:
    """Raise UserError for options that cannot be meant."""
    ratio = options.rejection_ratio
    if ratio > 1 and not options.classifier:
        raise UserError(f"--rejection-ratio {ratio} has nothing to select by: give --classifier, a timm model or a "
                        "file of evaluations/c2i/classifier.py.")
    if ratio == 1 and options.classifier:
        log.info("--classifier %s selects nothing at --rejection-ratio 1", options.classifier)


def load_selector(options: RejectionOptions, num_classes: int, class_names: ClassNames = ()) -> Selector:
    """The classifier that --classifier names; raises UserError if there is none or its classes are not those of the GPT.

    num_classes, class_names: those of the GPT, names where it carries them.
    """
    name, path = options.classifier, Path(options.classifier)
    if not (is_hub_name(name) or path.suffix == ".safetensors" or path.is_file() or (path / "classifier.safetensors").is_file()):
        return Selector(name, *load_timm(name, options.classifier_weights, num_classes))
    if options.classifier_weights is not None:
        raise UserError(f"--classifier-weights {options.classifier_weights} is for a timm model but --classifier "
                        f"{name} is a file with weights of its own: give one of the two.")
    model = load_classifier(name)
    require_classes(model.config.num_classes, num_classes, f"--classifier {name}")
    require_same_names(model.config.class_names, class_names, f"--classifier {name}", "the GPT")
    return Selector(path.name, model, to_tensor)


def load_timm(name: str, weights: Path | None, num_classes: int) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """A timm model with downloaded or local weights, and the preprocessing it was trained for, of whole batches."""
    import timm  # takes seconds, and only rejection sampling needs it
    from timm.data import create_transform, resolve_model_data_config
    from timm.models import resolve_pretrained_cfg

    try:
        described = resolve_pretrained_cfg(name) if timm.is_model(name) else None
    except RuntimeError:  # a model that timm knows, with a tag that it does not know
        described = None
    if described is None:
        raise UserError(f"--classifier {name} is neither a file nor a model of timm {timm.__version__}: give a name of "
                        "timm.list_models() or a file of evaluations/c2i/classifier.py.")
    source, changes = f"--classifier {name}", None
    remedy = "cannot be downloaded ({}): give a local file of its weights as --classifier-weights."
    outputs = described.num_classes
    if weights is not None:
        source = f"--classifier-weights {weights}"
        remedy = "does not fit --classifier " + name + " ({}): give the weights of that model."
        weights = published_file(weights, "--classifier-weights", "a file with weights of the timm model")
        outputs = count_outputs(weights, described.classifier, described.num_classes)
        changes = {"file": str(weights), "num_classes": outputs}  # loaded as timm loads its own download
    require_classes(outputs, num_classes, source)
    try:
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=changes)
    except Exception as error:  # of timm, torch, safetensors or the network: their kinds are not documented
        raise UserError(f"{source} {remedy.format(_reason(error))}") from error
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    return model.eval().requires_grad_(False), partial(prepare, transform.transforms)


def prepare(steps: Sequence[Callable[[Tensor], Tensor]], images: Tensor) -> Tensor:
    """timm's preprocessing for a batch where it lies, uint8 [B, H, W, 3], instead of for one picture after the other.

    steps: resizing and cropping, the conversion of a picture, normalisation.
    """
    *geometry, _, normalise = steps
    images = images.movedim(-1, 1)                                                 # [B, 3, H, W]
    for step in geometry:
        images = step(images)                                                      # uint8, rounded as Pillow does
    return normalise(images.float() / 255)


def count_outputs(weights: Path, head: str | tuple[str, ...] | None, default: int) -> int:
    """Classes of a file with timm weights, from its layer `head` (the first of several), or `default` without one."""
    from timm.models import load_state_dict

    try:
        tensors = load_state_dict(str(weights))
    except Exception as error:  # whatever torch or safetensors raise for what is no weights file
        raise UserError(f"--classifier-weights {weights} is damaged or holds no weights ({_reason(error)}): "
                        "copy it again.") from error
    head = head if isinstance(head, str) or head is None else head[0]
    return len(tensors[f"{head}.weight"]) if f"{head}.weight" in tensors else default


def require_classes(outputs: int, num_classes: int, source: str) -> None:
    """Raise UserError unless a classifier has as many outputs as the GPT has classes."""
    if outputs != num_classes:
        raise UserError(f"{source} has {outputs} outputs but the GPT has {num_classes} classes: give a classifier of "
                        "the GPT's classes.")


def _reason(error: Exception) -> str:
    """An error in one line."""
    return " ".join(str(error).split())[:300].rstrip(".:") or type(error).__name__


def candidates_path(out: Path) -> Path:
    """Where the candidates of `out` lie."""
    return out.with_name(f"{out.stem}.candidates{out.suffix}")


@torch.inference_mode()
def score(selector: Selector, images: np.ndarray, labels: np.ndarray, batch_size: int, processes: Processes) -> np.ndarray:
    """Probability of every image's own class, float64 [N], worked out by all processes together and known to each.

    images: uint8 [N, H, W, 3], memory-mapped; labels: int64 [N].
    """
    scores = torch.zeros(len(labels), dtype=torch.float64)  # single precision would call sure candidates equal
    # Whole batches are shared out: kernels, and with them the last bits, are the same for any number of processes.
    share = np.array_split(np.arange(0, len(labels), batch_size), processes.world_size)[processes.rank]
    model = selector.model.to(processes.device)
    bar = progress(len(share), "classify", "batches", processes)
    for first in share:
        rows = slice(first, first + batch_size)
        logits = model(selector.prepare(torch.from_numpy(np.array(images[rows])).to(processes.device)))
        own = torch.from_numpy(labels[rows]).to(processes.device)[:, None]
        scores[rows] = logits.double().softmax(1).gather(1, own)[:, 0].cpu()
        bar.update()
    bar.close()
    return all_reduce_sum(scores, processes).numpy()


def select(scores: np.ndarray, candidate_labels: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The candidate for each wanted label [M], of every class those with the highest scores.

    Of equal scores the lower index wins; within a class the chosen keep the candidates' order.
    """
    chosen = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        places, rows = np.flatnonzero(labels == label), np.flatnonzero(candidate_labels == label)
        best = np.argsort(-scores[rows], kind="stable")[: len(places)]
        chosen[places] = rows[np.sort(best)]
    return chosen


def keep_best(selector: Selector, candidates: Path, out: Path, labels: np.ndarray, about: dict[str, Any], batch_size: int,
              processes: Processes, class_names: ClassNames = ()) -> None:
    """Select from the npz `candidates` and write the npz `out` with the wanted labels [M].

    about: identity of the result, with a `rejection` entry, to which the npz adds the mean probabilities.
    """
    images, candidate_labels = open_array(candidates, "arr_0"), np.array(open_array(candidates, "arr_1"))
    scores = score(selector, images, candidate_labels, batch_size, processes)
    chosen = select(scores, candidate_labels, labels)
    store = ImageStore(out, (len(labels), *images.shape[1:]), about, processes)
    share = store.share()
    for first in range(0, len(share), _COPY_ROWS):
        rows = share[first : first + _COPY_ROWS]
        store.write(rows, images[chosen[rows]])
    kept, drawn = float(scores[chosen].mean()), float(scores.mean())
    means = {"mean_probability_kept": kept, "mean_probability_candidates": drawn}
    options = {**about, "rejection": about["rejection"] | means}
    store.finish(class_names, arr_1=labels, kind=np.array("samples"), options=np.array(json.dumps(options)))
    log.info("rejection sampling by %s kept %d of %d candidates: mean probability of their class %.4f, before %.4f",
             selector.name, len(labels), len(scores), kept, drawn)
