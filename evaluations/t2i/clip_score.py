"""CLIP score of images and the captions they were drawn from (Hessel et al. 2021, arXiv 2104.08718).

    python evaluations/t2i/clip_score.py SAMPLES

The mean over all pairs of 100 · max(cos(image, caption), 0), with the embeddings of a CLIP by `transformers`; the factor is
that of published text-to-image tables.  Scores of different CLIPs do not compare.
"""

import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started by its path

import numpy as np
import torch
import tyro
from torch import Tensor
from torch.nn import functional

from utils.config import Device, Positive, UserError, parse, run_main, to_dict
from utils.distributed import choose_device
from utils.files import check_exists, check_file_to_write, write_json
from utils.image_source import DECODER_ERRORS, decode
from utils.logs import StandardError, progress
from utils.npz import NPZ_ERRORS, array_header, array_keys, open_array
from utils.text_encoders import load_pretrained, quiet_transformers
from utils.texts import json_lines, string_in
from utils.untrusted import printable, shortened

log = logging.getLogger("clip_score")

_OPTION = "SAMPLES"
_MAKE_AGAIN = "sample them again, or give another"


@dataclass(frozen=True)
class ClipScoreConfig:
    """What to score, and by which CLIP."""

    samples: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="SAMPLES")]]
    """npz with `arr_0` images and `captions`, or folder as GenEval reads it: NUMBER/metadata.jsonl and NUMBER/samples/*.png."""
    clip: str = "openai/clip-vit-large-patch14"
    """CLIP: local folder or name on the hub."""
    json: Path | None = None
    """Write the result to this file too."""
    batch_size: Positive = 32
    """Pairs that pass the network at once."""
    device: Device = "auto"
    """auto: CUDA where there is any."""


class Pairs(NamedTuple):
    """Captions, and a function that gives the image of each: uint8 [H, W, 3]."""

    captions: list[str]
    image: Callable[[int], np.ndarray]


def read_pairs(path: Path) -> Pairs:
    """Images and captions of an npz or of a folder as GenEval reads it; raises UserError where there are none."""
    check_exists(path, _OPTION, "an npz with captions, or of a folder as GenEval reads it")
    return _read_folder(path) if path.is_dir() else _read_npz(path)


def _read_npz(path: Path) -> Pairs:
    where = f"{_OPTION} {printable(path)}"
    try:
        keys = array_keys(path)
        if absent := [key for key in ("arr_0", "captions") if key not in keys]:
            raise UserError(f"{where} has no {' and no '.join(absent)}, only {printable(', '.join(keys)) or 'nothing'}: give an "
                            "npz that sample_t2i_ddp.py wrote.")
        (shape, dtype), (count, kind) = (array_header(path, key) for key in ("arr_0", "captions"))
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape:
            raise UserError(f"{where} has arr_0 of type {dtype} and shape {shape}, not uint8 (N, H, W, 3): {_MAKE_AGAIN}.")
        if kind.kind != "U" or count != shape[:1]:
            raise UserError(f"{where} has captions of type {kind} and shape {count}, not {shape[0]} strings: {_MAKE_AGAIN}.")
        images, captions = open_array(path, "arr_0"), open_array(path, "captions").tolist()
    except NPZ_ERRORS as error:
        raise UserError(f"{where} cannot be read ({shortened(error)}): {_MAKE_AGAIN}.") from error
    return Pairs(captions, lambda index: np.array(images[index]))


def _read_folder(path: Path) -> Pairs:
    files, captions = list[Path](), list[str]()
    for about in sorted(path.glob("*/metadata.jsonl")):
        _, line = next(json_lines(about, _OPTION), (1, dict[str, Any]()))
        found = sorted((about.parent / "samples").glob("*.png"))
        captions += [string_in(line, "prompt", f"{_OPTION} {printable(about)}, line 1,")] * len(found)
        files += found
    if not files:
        raise UserError(f"{_OPTION} {printable(path)} holds no NUMBER/metadata.jsonl with NUMBER/samples/*.png: give a folder as "
                        "GenEval reads it, or an npz.")

    def image(index: int) -> np.ndarray:
        try:
            return decode(files[index])
        except DECODER_ERRORS as error:
            raise UserError(f"{_OPTION} {printable(files[index])} cannot be read ({shortened(error)}): {_MAKE_AGAIN}.") from error

    return Pairs(captions, image)


class Clip:
    """A CLIP by `transformers` with its tokenizer and image preparation."""

    def __init__(self, path: str, device: torch.device) -> None:
        """path: local folder or name on the hub.  Raises UserError when it cannot be loaded."""
        transformers, what = quiet_transformers("the CLIP score"), "a CLIP model"
        self.device, self._told = device, False
        self._model = load_pretrained(transformers.CLIPModel, path, "--clip", what).eval().to(device)
        self._tokenizer = load_pretrained(transformers.AutoTokenizer, path, "--clip", what)
        self._prepare = load_pretrained(transformers.AutoImageProcessor, path, "--clip", what)
        self._length = self._model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def scores(self, images: list[np.ndarray], captions: list[str]) -> Tensor:
        """100 · max(cos, 0) of each image, uint8 [H, W, 3], and its caption, cut to CLIP's length: float32 [B]."""
        whole = self._tokenizer(captions, verbose=False)["input_ids"]
        if not self._told and (long := [text for text, ids in zip(captions, whole, strict=True) if len(ids) > self._length]):
            self._told = True
            log.warning("captions of more than %d tokens are cut; the first begins %r", self._length, printable(long[0])[:60])
        tokens = self._tokenizer(captions, padding=True, truncation=True, max_length=self._length, return_tensors="pt")
        pixels = self._prepare(images=images, return_tensors="pt")["pixel_values"]
        found = self._model(input_ids=tokens["input_ids"].to(self.device), pixel_values=pixels.to(self.device),
                            attention_mask=tokens["attention_mask"].to(self.device))
        return 100 * functional.cosine_similarity(found.image_embeds.float(), found.text_embeds.float()).clamp(min=0).cpu()  # [B]


def clip_scores(clip: Clip, pairs: Pairs, batch_size: int) -> Tensor:
    """The score of every pair, whose progress is shown: float32 [N]."""
    found = [torch.empty(0)]
    with progress(len(pairs.captions), "CLIP score", "images") as bar:
        for rows in batches(len(pairs.captions), batch_size):
            found.append(clip.scores([pairs.image(row) for row in rows], [pairs.captions[row] for row in rows]))
            bar.update(len(rows))
    return torch.cat(found)


def batches(count: int, size: int) -> Iterator[range]:
    """The numbers below `count` in parts of `size`."""
    return (range(first, min(first + size, count)) for first in range(0, count, size))


def main() -> None:
    """Score as the command line says."""
    config = parse(ClipScoreConfig)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s", handlers=[StandardError()])
    device = choose_device(config.device)
    if config.json is not None:
        check_file_to_write(config.json, "--json")
    pairs = read_pairs(config.samples)
    scores = clip_scores(Clip(config.clip, device), pairs, config.batch_size)
    result = {"clip_score": float(scores.mean()), "standard_error": float(scores.std() / len(scores) ** 0.5) if len(scores) > 1
              else None, "pairs": len(scores)}
    print(f"CLIP score {result['clip_score']:.3f}   {result['pairs']} pairs")
    if config.json is not None:
        write_json(config.json, {**result, "settings": to_dict(config)})


if __name__ == "__main__":
    run_main(main)
