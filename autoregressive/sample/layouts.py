"""Samples of prompts as the folders that other evaluations read, written from a finished npz.

    geneval        00000/metadata.jsonl, the prompt's line; 00000/samples/0000.png, ...
    partiprompts   images/000000.png, ...; captions.txt, a line an image; result.jsonl, caption and image in a line

The folder is the npz's name without `.npz`.  Images are written one by one, each in one piece, and what names them comes last: a
run that was stopped carries on, and an evaluation does not take half a folder for the whole.  `samples.json` says what the
folder holds.
"""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from utils.config import UserError
from utils.distributed import Processes
from utils.files import read_json, require_same, write_json, write_text
from utils.logs import progress
from utils.npz import array_checksum, open_array
from utils.pictures import save_picture
from utils.texts import Prompt

log = logging.getLogger("layouts")

ABOUT = "samples.json"
Texts = Iterator[tuple[str, str]]  # (path in the folder, content)


class Layout(NamedTuple):
    """Paths in a folder: of a sample's image by its prompt's number, its own among that prompt's and among all; of texts."""

    image: Callable[[int, int, int], str]
    texts: Callable[[Sequence[Prompt], int], Texts]


def _geneval_texts(prompts: Sequence[Prompt], each: int) -> Texts:
    if any("tag" not in prompt.about for prompt in prompts):
        log.warning("some prompts have no `tag`, which GenEval's evaluation reads: give its own file of prompts as --prompts")
    for number, prompt in enumerate(prompts):
        yield f"{number:05d}/metadata.jsonl", json.dumps({"prompt": prompt.text} | prompt.about) + "\n"


def _partiprompts_texts(prompts: Sequence[Prompt], each: int) -> Texts:
    lines = [" ".join(prompt.text.split()) for prompt in prompts for _ in range(each)]
    yield "captions.txt", "".join(f"{line}\n" for line in lines)
    yield "result.jsonl", "".join(json.dumps({"text": line, "image_path": f"images/{row:06d}.png"}) + "\n"
                                  for row, line in enumerate(lines))


# None: the npz alone.
LAYOUTS: dict[str, Layout | None] = {
    "npz": None,
    "geneval": Layout(lambda prompt, sample, row: f"{prompt:05d}/samples/{sample:04d}.png", _geneval_texts),
    "partiprompts": Layout(lambda prompt, sample, row: f"images/{row:06d}.png", _partiprompts_texts),
}


def check_folder(layout: str, npz: Path, about: dict[str, Any]) -> None:
    """Raise UserError where the folder of an npz holds something else than its images in this layout.

    about: the npz's identity, perhaps with the `checksum` of its images.
    """
    folder = npz.with_suffix("")
    if LAYOUTS[layout] is None or not folder.exists():
        return
    if not folder.is_dir() or (not (folder / ABOUT).exists() and any(folder.iterdir())):
        raise UserError(f"--layout {layout} would write into {folder}, which is not a folder of such samples: move it away or "
                        "change --out.")
    if (folder / ABOUT).exists():
        found = read_json(folder / ABOUT, "--out", "the folder")
        wanted = json.loads(json.dumps({"layout": layout} | about))
        known = {"checksum": None} | (found if isinstance(found, dict) else {})
        require_same(known, {"checksum": known["checksum"]} | wanted,
                     f"the folder {folder} of --out was made with", "delete it or change --out")


def write_folder(layout: str, npz: Path, prompts: Sequence[Prompt], each: int, about: dict[str, Any],
                 processes: Processes) -> None:
    """Write the images of a finished npz, `each` of every prompt, in a layout; what is there already stays.

    about: the npz's identity.  All processes call this together.  Raises UserError where the folder holds other images.
    """
    row_of, folder = LAYOUTS[layout], npz.with_suffix("")
    if row_of is None:
        return
    if processes.is_main:
        about = about | {"checksum": array_checksum(npz, "arr_0")}
        check_folder(layout, npz, about)
        folder.mkdir(exist_ok=True)
        for left in folder.rglob(".*.tmp"):  # of a process that was killed
            left.unlink()
        write_json(folder / ABOUT, {"layout": layout} | about)
    processes.barrier()
    images = open_array(npz, "arr_0")
    paths = {row: folder / row_of.image(row // each, row % each, row)
             for row in range(processes.rank, len(images), processes.world_size)}
    missing = [row for row, path in paths.items() if not path.exists()]
    bar = progress(len(missing), "write", "images", processes)
    for row in missing:
        paths[row].parent.mkdir(parents=True, exist_ok=True)
        save_picture(Image.fromarray(np.array(images[row])), paths[row])
        bar.update(1)
    bar.close()
    processes.barrier()
    if processes.is_main:
        for name, content in row_of.texts(prompts, each):
            write_text(folder / name, content)
        log.info("%s: %d images in the layout %s", folder, len(images), layout)
