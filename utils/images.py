"""Labelled images from a folder of class folders or from an npz, loaded one by one.

Links are followed, those that lead out of the folder too: ImageNet is often a farm of links.  Nothing is ever written here,
neither into the folder nor through its links.  A file may be damaged or hostile: it is decoded only by the decoders of the
formats below, within a bound on its size, and its name is shown with control characters escaped.
"""

import copy
import logging
import os
import stat
import struct
import warnings
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from utils.config import UserError
from utils.files import check_exists
from utils.npz import NPZ_ERRORS, array_checksum, array_header, array_keys, open_array
from utils.untrusted import printable, shortened

log = logging.getLogger("images")

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
# By content, whatever the name says: some of ImageNet's .JPEG are PNG.  Other decoders of Pillow start programs (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
MAX_PIXELS = 178_956_970  # of one image: Pillow's own bound, which other libraries switch off

# What Pillow's decoders raise on damaged files.  MemoryError is left out: it says nothing about the image.
_DECODER_ERRORS = (OSError, SyntaxError, ValueError, TypeError, IndexError, EOFError, RuntimeError, struct.error,
                   zlib.error, Image.DecompressionBombError)
_MAX_CLASSES = 1_000_000  # a larger label is a mistake, and would ask for as many rows of every table
_PROBES = 100  # images, spread over a folder, of which one must be readable
_FOLDER_REMEDY = "give a folder with one sub-folder of images per class, or an npz with images and labels"


class UnreadableImage(Exception):
    """An image that is truncated, damaged or gone: its message names the image and the cause."""


class ImageSource:
    """Labelled images that can be loaded one by one; safe to pickle into workers and cheap to fork.

    labels: int64 [N]; num_classes: number of label ids, whether or not `subset` left images of each; class_names: printable, one
    for each id, or none; rows: int64 [N], where each image lies in the storage.
    """

    def __init__(self, path: Path, option: str, labels: np.ndarray, class_names: Iterable[str]) -> None:
        self.path, self.option, self.class_names = path, option, tuple(printable(name) for name in class_names)
        self.labels = labels.astype(np.int64)  # [N]
        self.num_classes = len(self.class_names) or int(labels.max()) + 1
        self.rows = np.arange(len(labels))  # [N]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def checksum(self) -> str:
        """Of labels and of what the storage says about its images without reading them: tells two sets of images apart."""
        value = zlib.crc32(self.labels.tobytes(), self._storage_checksum())
        return f"{zlib.crc32(self.rows.tobytes(), value):08x}"

    def _storage_checksum(self) -> int:
        raise NotImplementedError

    def name(self, index: int) -> str:
        """What to call an image in a message, printable: its path, or FILE.npz[row]."""
        raise NotImplementedError

    def load(self, index: int) -> np.ndarray:
        """Load one image: uint8 [H, W, 3], RGB; raises UnreadableImage if it is truncated or damaged."""
        raise NotImplementedError

    def subset(self, limit: int) -> "ImageSource":
        """The first images of each class, `limit` in all, classes differing by at most one where they have enough.

        Label ids stay as they are and images keep their order; all images if there are no more than `limit`.  Raises
        ValueError if limit < 1.
        """
        if limit < 1:
            raise ValueError(f"limit is {limit}, not positive")
        order = np.argsort(self.labels, kind="stable")
        counts = np.bincount(self.labels, minlength=self.num_classes)  # [num_classes]
        rank = np.empty(len(self), np.int64)  # [N] how many images of the same class come before
        rank[order] = np.arange(len(self)) - np.repeat(np.cumsum(counts) - counts, counts)
        chosen = np.sort(np.lexsort((self.labels, rank))[:limit])
        result = copy.copy(self)
        result.rows, result.labels = self.rows[chosen], self.labels[chosen]
        return result


class FolderImages(ImageSource):
    """A folder with one sub-folder per class, sorted by name; made by `open_images`.

    EXIF rotation is not applied and transparency is dropped, as ADM and LlamaGen do.
    """

    def __init__(self, path: Path, option: str, files: list[str], labels: np.ndarray, class_names: list[str]) -> None:
        super().__init__(path, option, labels, class_names)
        # One array instead of a million strings: forked workers would copy every page that holds a string they touch.
        self._files = np.array([os.fsencode(file) for file in files])  # [N] bytes

    def _storage_checksum(self) -> int:
        """Of the files' names: asking a network file system for a million sizes would take minutes."""
        return zlib.crc32(b"\0".join(self._files.tolist()))

    def _file(self, index: int) -> Path:
        return self.path / os.fsdecode(bytes(self._files[self.rows[index]]))

    def name(self, index: int) -> str:
        """Path of an image, control characters escaped."""
        return printable(self._file(index))

    def load(self, index: int) -> np.ndarray:
        """Decode one file: uint8 [H, W, 3]; raises UnreadableImage, also for one of more than MAX_PIXELS."""
        file = self._file(index)
        try:
            if not stat.S_ISREG(file.stat().st_mode):  # opening a pipe would wait for ever
                raise OSError("it is no file")
            with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning), \
                    Image.open(file, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise OSError(f"it claims to have {image.width} x {image.height} pixels")
                return _to_rgb(image)
        except _DECODER_ERRORS as error:
            raise UnreadableImage(f"{self.name(index)}: {shortened(error)}") from error


class ArrayImages(ImageSource):
    """The arrays `images` and `labels` of an npz; made by `open_images`.

    An uncompressed array is mapped, so workers share its pages; a compressed one is loaded, again by workers that are spawned.
    """

    def __init__(self, path: Path, option: str, labels: np.ndarray, class_names: Iterable[str], images: np.ndarray) -> None:
        super().__init__(path, option, labels, class_names)
        self._images: np.ndarray | None = images

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_images": None}  # a pickled memory map would carry all pixels along

    def _storage_checksum(self) -> int:
        """Of the pixels, as the npz holds it."""
        return array_checksum(self.path, "images")

    def name(self, index: int) -> str:
        """FILE.npz[row], with the row in the file."""
        return printable(f"{self.path}[{self.rows[index]}]")

    def load(self, index: int) -> np.ndarray:
        """Copy one image: uint8 [H, W, 3], greyscale repeated; raises UnreadableImage if the file is damaged."""
        try:
            if self._images is None:
                self._images = open_array(self.path, "images")
            image = self._images[self.rows[index]]  # [H, W] or [H, W, 1 or 3]
        except NPZ_ERRORS as error:
            raise UnreadableImage(f"{self.name(index)}: {shortened(error)}") from error
        image = image.reshape(*image.shape[:2], -1)
        return np.array(np.broadcast_to(image, (*image.shape[:2], 3)))  # [H, W, 3]


def open_images(path: str | Path, option: str = "--data-path") -> ImageSource:
    """Open a folder of class folders, or an npz with `images` and `labels`.

    path: a folder whose sub-folders (sorted: label ids) hold images at any depth, or an npz with images uint8
    [N, H, W, 3], [N, H, W, 1] or [N, H, W], labels int [N], and perhaps class_names, one string for each label id.  Names
    that begin with a dot are ignored.  Raises UserError, naming `option`, for anything else, and where no image is readable.
    """
    path = check_exists(path, option, "a folder with one sub-folder of images per class, or of an npz")
    if not path.is_dir():
        return _open_npz(path, option)
    source = _open_folder(path, option)
    _require_readable(source)
    return source


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
    for label, class_name in enumerate(class_names):
        found = _images_below(path / class_name, path)
        if not found:
            raise UserError(f"{option} {path} has a class folder {class_name!r} without any image "
                            f"({' '.join(EXTENSIONS)}): remove the folder or put its images into it.")
        files += found
        labels += [label] * len(found)
    return FolderImages(path, option, files, np.array(labels), class_names)


def _is_image(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(EXTENSIONS)


def _images_below(folder: Path, root: Path) -> list[str]:
    """Paths relative to `root` of all images at or below `folder`, sorted by folder, then by name."""
    found, seen = [], set()
    for base, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(base)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        if real not in seen:  # a link to a folder above it would be followed without end
            found += [os.path.relpath(os.path.join(base, name), root) for name in sorted(names) if _is_image(name)]
        seen.add(real)
    return found


def _open_npz(path: Path, option: str) -> ArrayImages:
    try:
        keys = array_keys(path)
        if absent := [key for key in ("images", "labels") if key not in keys]:
            raise UserError(f"{option} {path} has no {' and no '.join(absent)}, only {printable(', '.join(keys)) or 'nothing'}: "
                            "give an npz with images and labels.")
        _check_npz(f"{option} {path}", *array_header(path, "images"), *array_header(path, "labels"))
        labels, names = np.array(open_array(path, "labels")), list[str]()
        if labels.min() < 0:
            raise UserError(f"{option} {path} has the negative label {labels.min()} at row {labels.argmin()}: number the "
                            "classes from 0.")
        if labels.max() >= _MAX_CLASSES:
            raise UserError(f"{option} {path} has the label {labels.max()} at row {labels.argmax()}: number the classes from 0, "
                            f"without gaps and below {_MAX_CLASSES}.")
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


def _to_rgb(image: Image.Image) -> np.ndarray:
    """Decode a Pillow image of any mode: uint8 [H, W, 3]."""
    if image.mode.startswith("I;16"):  # Pillow would clip 16-bit grey levels at 255 instead of scaling them
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:  # without this step Pillow prints a warning
        image = image.convert("RGBA")
    return np.array(image.convert("RGB"))
