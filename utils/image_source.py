"""Images with labels or captions from a folder or an npz, loaded one by one; `images.py` opens them.

Links are followed, those that lead out of the folder too: ImageNet is often a farm of links.  Nothing is ever written here,
neither into the folder nor through its links.  A file may be damaged or hostile: it is decoded only by the decoders of the
formats below, within a bound on its size, and its name is shown with control characters escaped.
"""

import copy
import os
import stat
import struct
import warnings
import zlib
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from utils.config import UserError
from utils.npz import NPZ_ERRORS, array_checksum, array_header, array_keys, open_array
from utils.texts import Texts
from utils.untrusted import printable, shortened

EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp")
# Names of images that are left out, with a word about them.
OTHER_EXTENSIONS = (".tif", ".tiff", ".gif", ".heic", ".heif", ".avif", ".jp2", ".jxl", ".svg", ".ppm", ".pgm", ".tga", ".psd",
                    ".raw", ".dng", ".cr2", ".nef", ".arw")
# By content, whatever the name says: some of ImageNet's .JPEG are PNG.  Other decoders of Pillow start programs (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
MAX_PIXELS = 178_956_970  # of one image: Pillow's own bound, which other libraries switch off

# What Pillow's decoders raise on damaged files.  MemoryError is left out: it says nothing about the image.
DECODER_ERRORS = (OSError, SyntaxError, ValueError, TypeError, IndexError, EOFError, RuntimeError, struct.error,
                  zlib.error, Image.DecompressionBombError)


class UnreadableImage(Exception):
    """An image that is truncated, damaged or gone: its message names the image and the cause."""


class ImageSource:
    """Images that can be loaded one by one; safe to pickle into workers and cheap to fork.

    labels: int64 [N], all 0 where images have captions and no classes; num_classes: number of label ids, whether or not `subset`
    left images of each; class_names: printable, one for each id, or none; rows: int64 [N], where each image lies in the storage.
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

    def captions(self, key: str = "") -> Texts:
        """The captions of all images [N]; key: which of several, as the storage names them.

        Raises UserError, naming the option, where there are none or no such.
        """
        raise UserError(f"{self.option} {printable(self.path)} has no captions: give a folder with captions.jsonl, WebDataset "
                        "tar shards, a table or an npz with captions.")

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
        try:
            return decode_file(self._file(index))
        except DECODER_ERRORS as error:
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

    def captions(self, key: str = "") -> Texts:
        """The strings of the array `captions`, or of `key`: [N]."""
        key, where = key or "captions", f"{self.option} {printable(self.path)}"
        try:
            if key not in (keys := array_keys(self.path)):
                raise UserError(f"{where} has no {printable(key)}, only {printable(', '.join(keys))}: give an npz with a caption "
                                "for each image.")
            shape, dtype = array_header(self.path, key)
            if dtype.kind != "U" or len(shape) != 1 or shape[0] <= self.rows.max():
                raise UserError(f"{where} has {printable(key)} of type {dtype} and shape {shape}: give one string for each "
                                "image.")
            return Texts(open_array(self.path, key)[self.rows].tolist())
        except NPZ_ERRORS as error:
            raise UserError(f"{where} has damaged {printable(key)} ({shortened(error)}): make the file again.") from error


def decode_file(file: Path) -> np.ndarray:
    """`decode` a file of an image; raises DECODER_ERRORS, also for what is no file."""
    if not stat.S_ISREG(file.stat().st_mode):  # opening a pipe would wait for ever
        raise OSError("it is no file")
    return decode(file)


def decode(file: Path | BytesIO) -> np.ndarray:
    """Decode an image, by its content alone: uint8 [H, W, 3]; raises DECODER_ERRORS, also for more than MAX_PIXELS."""
    with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning), \
            Image.open(file, formats=FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise OSError(f"it claims to have {image.width} x {image.height} pixels")
        return _to_rgb(image)


def _to_rgb(image: Image.Image) -> np.ndarray:
    """Decode a Pillow image of any mode: uint8 [H, W, 3]."""
    if image.mode.startswith("I;16"):  # Pillow would clip 16-bit grey levels at 255 instead of scaling them
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:  # without this step Pillow prints a warning
        image = image.convert("RGBA")
    return np.array(image.convert("RGB"))
