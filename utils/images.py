"""Opening images: a folder of class folders, an npz, a folder with captions.jsonl, WebDataset tar shards, or a table."""

import logging
import os
from collections import Counter
from pathlib import Path

import numpy as np

from utils.captioned_images import is_listed, open_listed
from utils.config import UserError
from utils.data_path import DataPath, parse_data_path
from utils.files import check_exists
from utils.hub import local_path
from utils.image_source import EXTENSIONS, OTHER_EXTENSIONS, ArrayImages, FolderImages, ImageSource, UnreadableImage
from utils.labels import require_labels
from utils.npz import NPZ_ERRORS, array_header, array_keys, open_array
from utils.table_files import is_table
from utils.table_images import open_table
from utils.tar_images import open_tars, tars_of
from utils.untrusted import printable, shortened

log = logging.getLogger("images")

_PROBES = 100  # images, spread over a folder, of which one must be readable
_FOLDER_REMEDY = "give a folder with one sub-folder of images per class, or an npz with images and labels"


def open_images(path: str | Path, option: str = "--data-path") -> ImageSource:
    """Open a folder of class folders, an npz with `images`, a folder with captions.jsonl, WebDataset tar shards, or a table.

    path: a folder whose sub-folders (sorted: label ids) hold images at any depth; or an npz with images uint8 [N, H, W, 3],
    [N, H, W, 1] or [N, H, W], labels int [N] or captions, strings [N], and perhaps class_names, one string for each label id; or
    what `captioned_images.py`, `tar_images.py` or `table_files.py` reads, with choices behind `::` (`data_path.py`); any of them
    may lie on the hub (`hf:datasets/owner/name`).  Images that have captions alone are all of class 0.  Names that begin with a
    dot are ignored.  Raises UserError, naming `option`, for anything else, and where no image is readable.
    """
    wanted = parse_data_path(path, option)
    path = check_exists(local_path(wanted.path, option), option, "a folder with one sub-folder of images per class, or of an npz")
    source = _open(wanted._replace(path=path), option)
    _require_readable(source)
    return source


def _open(wanted: DataPath, option: str) -> ImageSource:
    """The source of a path that exists."""
    path = wanted.path
    if path.is_dir() and is_listed(path):
        wanted.require_none(option, "a folder with captions.jsonl")
        return open_listed(path, option)
    if tars_of(path):
        return open_tars(wanted, option)
    if is_table(path):
        return open_table(wanted, option)
    wanted.require_none(option, "a folder of class folders" if path.is_dir() else "an npz")
    return _open_folder(path, option) if path.is_dir() else _open_npz(path, option)


def _require_readable(source: ImageSource) -> None:
    """Raise UserError unless one of some images, spread over all, can be read: else a training would find out step by step."""
    probes = np.unique(np.linspace(0, len(source) - 1, _PROBES).astype(int))
    reasons = []
    for index in probes:
        try:
            source.load(int(index))
            return
        except UnreadableImage as error:
            reasons.append(error)
    raise UserError(f"{source.option} {printable(source.path)} has no readable image among the {len(probes)} that were tried "
                    f"(the first: {reasons[0]}): check that its images are whole and that you may read them.") from reasons[0]


def _open_folder(path: Path, option: str) -> FolderImages:
    try:
        entries = sorted((entry for entry in os.scandir(path) if not entry.name.startswith(".")), key=lambda e: e.name)
    except OSError as error:
        raise UserError(f"{option} {path} cannot be read ({error.strerror}): give a folder you may read.") from error
    class_names = [entry.name for entry in entries if os.path.isdir(entry.path)]  # entry.is_dir() fails on a link to itself
    flat = sum(_is_image(entry.name) for entry in entries if entry.name not in set(class_names))
    if not class_names:
        seen = f"{flat} images lie flat in it" if flat else "it holds other files" if entries else "it is empty"
        raise UserError(f"{option} {path} has no class sub-folders ({seen}): {_FOLDER_REMEDY}.")
    if flat:
        log.warning("%s %s: %d images beside the class folders belong to no class and are left out", option, path, flat)
    files: list[str] = []
    labels: list[int] = []
    others = Counter[str]()
    for label, class_name in enumerate(class_names):
        found, left_out = _images_below(path / class_name, path)
        if not found:
            seen = f", only {_kinds(left_out)}: convert them" if left_out else ": put its images into it"
            raise UserError(f"{option} {path} has a class folder {class_name!r} without any image "
                            f"({' '.join(EXTENSIONS)}){seen}, or remove the folder.")
        files += found
        labels += [label] * len(found)
        others += left_out
    if others:
        log.warning("%s %s: %d images of other kinds than %s are left out (%s): convert them if they are wanted", option, path,
                    others.total(), " ".join(EXTENSIONS), _kinds(others))
    return FolderImages(path, option, files, np.array(labels), class_names)


def _kinds(others: Counter[str]) -> str:
    """How many files there are of each suffix."""
    return ", ".join(f"{count} {suffix}" for suffix, count in others.most_common())


def _is_image(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(EXTENSIONS)


def _images_below(folder: Path, root: Path) -> tuple[list[str], Counter[str]]:
    """Paths relative to `root` of all images at or below `folder`, sorted by folder, then by name; other kinds by suffix."""
    found, others, seen = [], Counter[str](), set()
    for base, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(base)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        if real not in seen:  # a link to a folder above it would be followed without end
            found += [os.path.relpath(os.path.join(base, name), root) for name in sorted(names) if _is_image(name)]
            suffixes = (os.path.splitext(name)[1].lower() for name in names if not name.startswith("."))
            others.update(suffix for suffix in suffixes if suffix in OTHER_EXTENSIONS)
        seen.add(real)
    return found, others


def _open_npz(path: Path, option: str) -> ArrayImages:
    try:
        keys = array_keys(path)
        needed = ["images"] if "captions" in keys else ["images", "labels"]
        if absent := [key for key in needed if key not in keys]:
            raise UserError(f"{option} {path} has no {' and no '.join(absent)}, only {printable(', '.join(keys)) or 'nothing'}: "
                            "give an npz with images and labels.")
        shape, dtype = array_header(path, "images")
        labelled = array_header(path, "labels") if "labels" in keys else (shape[:1], np.dtype(int))
        _check_npz(f"{option} {path}", shape, dtype, *labelled)
        labels = np.array(open_array(path, "labels")) if "labels" in keys else np.zeros(shape[0], np.int64)
        names = list[str]()
        require_labels(labels, f"{option} {path}", lambda row: f"at row {row}")
        if "class_names" in keys:
            names = _read_class_names(f"{option} {path}", path, int(labels.max()) + 1)
        images = open_array(path, "images")
    except NPZ_ERRORS as error:
        raise UserError(f"{option} {path} is not a readable npz ({shortened(error)}): {_FOLDER_REMEDY}, whole and not "
                        "truncated.") from error
    return ArrayImages(path, option, labels, names, images)


def _read_class_names(where: str, path: Path, num_classes: int) -> list[str]:
    """The array class_names of an npz; raises UserError unless it holds a name for each class, NPZ_ERRORS if it is damaged."""
    shape, dtype = array_header(path, "class_names")
    if dtype.kind != "U" or len(shape) != 1:
        raise UserError(f"{where} has class_names of type {dtype} and shape {shape}, not strings of shape ({num_classes},): give "
                        "one string for each class.")
    if shape[0] != num_classes:
        raise UserError(f"{where} has {shape[0]} class_names for labels 0 to {num_classes - 1}: give one string for each class.")
    return open_array(path, "class_names").tolist()


def _check_npz(where: str, shape: tuple[int, ...], dtype: np.dtype, labels_shape: tuple[int, ...],
               labels_dtype: np.dtype) -> None:
    if dtype != np.uint8:
        raise UserError(f"{where} has images of type {dtype}, not uint8: save them as integers from 0 to 255.")
    if len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] not in (1, 3)) or 0 in shape:
        raise UserError(f"{where} has images of shape {shape}, not (N, H, W, 3), (N, H, W, 1) or (N, H, W) with N, H "
                        "and W at least 1: put the axes in this order.")
    if labels_dtype.kind not in "iu":
        raise UserError(f"{where} has labels of type {labels_dtype}, not integers: number the classes from 0.")
    if labels_shape != shape[:1]:
        raise UserError(f"{where} has labels of shape {labels_shape} for {shape[0]} images, not ({shape[0]},): give "
                        "one label for each image.")
