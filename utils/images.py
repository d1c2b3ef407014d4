"""Images: where they come from, how they are cropped, how they become tensors, and grids to look at.

Crops follow the guided-diffusion evaluation (ADM; Dhariwal and Nichol 2021): box halving, then bicubic, then a window,
so that results compare with published ones.  An image that cannot be read never ends a run and never passes unseen: it
is logged by name and counted.  An augmentation depends on (seed, epoch, index) alone, so a resumed run, or one with
another number of workers or processes, sees the same pixels.
"""

import copy
import logging
import math
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from utils.config import UserError
from utils.files import check_exists
from utils.npz import NPZ_ERRORS, array_header, array_keys, open_array

log = logging.getLogger("images")

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
Augment = Literal["none", "center", "train"]

_MAX_UNREADABLE = 100  # in a row: past this the folder is at fault, not an image
# What Pillow's decoders raise on damaged files.  MemoryError is left out: it says nothing about the image.
_DECODER_ERRORS = (OSError, SyntaxError, ValueError, TypeError, IndexError, EOFError, RuntimeError, struct.error,
                   zlib.error, Image.DecompressionBombError)
_FOLDER_REMEDY = "give a folder with one sub-folder of images per class, or an npz with images and labels"


class UnreadableImage(Exception):
    """An image that is truncated, damaged or gone: its message names the image and the cause."""


class ImageSource:
    """Labelled images that can be loaded one by one; safe to pickle into workers and cheap to fork.

    labels: int64 [N]; class_names: one for each label id; rows: int64 [N], where each image lies in the storage.
    """

    def __init__(self, path: Path, option: str, labels: np.ndarray, class_names: list[str]) -> None:
        self.path, self.option, self.class_names = path, option, class_names
        self.labels = labels.astype(np.int64)  # [N]
        self.rows = np.arange(len(labels))  # [N]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """Number of label ids, whether or not `subset` left images of each."""
        return len(self.class_names)

    def name(self, index: int) -> str:
        """What to call an image in a message: its path, or FILE.npz[row]."""
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

    EXIF rotation is not applied and transparency is dropped, as in ADM's and LlamaGen's loaders.
    """

    def __init__(self, path: Path, option: str, files: list[str], labels: np.ndarray, class_names: list[str]) -> None:
        super().__init__(path, option, labels, class_names)
        # One buffer instead of a million strings: forked workers would copy every page that holds a string they touch.
        encoded = [os.fsencode(file) for file in files]
        self._ends = np.cumsum([len(file) for file in encoded])  # [N]
        self._text = np.frombuffer(b"".join(encoded), np.uint8)

    def name(self, index: int) -> str:
        """Path of an image."""
        row = self.rows[index]
        begin = self._ends[row - 1] if row else 0
        return str(self.path / os.fsdecode(self._text[begin:self._ends[row]].tobytes()))

    def load(self, index: int) -> np.ndarray:
        """Decode one file: uint8 [H, W, 3]; raises UnreadableImage."""
        name = self.name(index)
        try:
            with Image.open(name) as image:
                return _to_rgb(image)
        except _DECODER_ERRORS as error:
            raise UnreadableImage(f"{name}: {error or type(error).__name__}") from error


class ArrayImages(ImageSource):
    """The arrays `images` and `labels` of an npz; made by `open_images`.

    An uncompressed array is mapped, so workers share its pages; a compressed one is loaded by every process.
    """

    def __init__(self, path: Path, option: str, labels: np.ndarray) -> None:
        super().__init__(path, option, labels, [str(label) for label in range(int(labels.max()) + 1)])
        self._images: np.ndarray | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_images": None}  # a pickled memory map would carry all pixels along

    def name(self, index: int) -> str:
        """FILE.npz[row], with the row in the file."""
        return f"{self.path}[{self.rows[index]}]"

    def load(self, index: int) -> np.ndarray:
        """Copy one image: uint8 [H, W, 3], greyscale repeated; raises UnreadableImage if the file is damaged."""
        try:
            if self._images is None:
                self._images = open_array(self.path, "images")
            image = self._images[self.rows[index]]  # [H, W] or [H, W, 1 or 3]
        except NPZ_ERRORS as error:
            raise UnreadableImage(f"{self.name(index)}: {error}") from error
        image = image.reshape(*image.shape[:2], -1)
        return np.array(np.broadcast_to(image, (*image.shape[:2], 3)))  # [H, W, 3]


def open_images(path: str | Path, option: str = "--data-path") -> ImageSource:
    """Open a folder of class folders, or an npz with `images` and `labels`.

    path: a folder whose sub-folders (sorted: label ids) hold images at any depth, or an npz with images uint8
    [N, H, W, 3], [N, H, W, 1] or [N, H, W] and labels int [N].  Names that begin with a dot are passed over.  Raises
    UserError, naming `option`, for anything else.
    """
    path = check_exists(path, option, "a folder with one sub-folder of images per class, or of an npz")
    return _open_folder(path, option) if path.is_dir() else _open_npz(path, option)


def _open_folder(path: Path, option: str) -> FolderImages:
    try:
        entries = sorted((entry for entry in os.scandir(path) if not entry.name.startswith(".")), key=lambda e: e.name)
    except OSError as error:
        raise UserError(f"{option} {path} cannot be read ({error.strerror}): give a folder you may read.") from error
    class_names = [entry.name for entry in entries if entry.is_dir()]
    flat = sum(_is_image(entry.name) for entry in entries if not entry.is_dir())
    if not class_names:
        seen = f"{flat} images lie flat in it" if flat else "it holds other files" if entries else "it is empty"
        raise UserError(f"{option} {path} has no class sub-folders ({seen}): {_FOLDER_REMEDY}.")
    if flat:
        log.warning("%s %s: %d images beside the class folders belong to no class and are left out",
                       option, path, flat)
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
        if real not in seen:  # a link to a folder above would otherwise be walked for ever
            found += [os.path.relpath(os.path.join(base, name), root) for name in sorted(names) if _is_image(name)]
        seen.add(real)
    return found


def _open_npz(path: Path, option: str) -> ArrayImages:
    try:
        keys = array_keys(path)
        if absent := [key for key in ("images", "labels") if key not in keys]:
            raise UserError(f"{option} {path} has no {' and no '.join(absent)}, only {', '.join(keys) or 'nothing'}: "
                            "give an npz with images and labels.")
        shape, dtype = array_header(path, "images")
        labels_shape, labels_dtype = array_header(path, "labels")
        _check_npz(f"{option} {path}", shape, dtype, labels_shape, labels_dtype)
        labels = np.array(open_array(path, "labels"))
    except NPZ_ERRORS as error:
        raise UserError(f"{option} {path} is not a readable npz ({error}): {_FOLDER_REMEDY}, whole and not "
                        "truncated.") from error
    if labels.min() < 0:
        raise UserError(f"{option} {path} has the negative label {labels.min()} at row {labels.argmin()}: number the "
                        "classes from 0.")
    return ArrayImages(path, option, labels)


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
    if image.mode == "P" and "transparency" in image.info:  # via RGBA, else Pillow warns on standard error
        image = image.convert("RGBA")
    return np.array(image.convert("RGB"))


def _resize_shorter(image: np.ndarray, size: int) -> np.ndarray:
    """Resize so that the shorter side equals `size`: box halving while it is at least twice that, then bicubic."""
    picture = Image.fromarray(image)
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    target = (round(picture.width * scale), round(picture.height * scale))
    return np.array(picture.resize(target, Image.Resampling.BICUBIC))


def center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """Cut the centre square after resizing the shorter side to `size` (ADM's centre crop).

    image: uint8 [H, W, 3].  Returns uint8 [size, size, 3]; an image of that shape comes back unchanged.
    """
    image = _resize_shorter(image, size)
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    return image[top:top + size, left:left + size]


def random_crop(image: np.ndarray, size: int, rng: np.random.Generator, min_fraction: float = 0.8,
                max_fraction: float = 1.0) -> np.ndarray:
    """Cut a random square after resizing the shorter side to a random length (ADM's random crop).

    image: uint8 [H, W, 3]; min_fraction, max_fraction: part of the shorter side that the square covers, in (0, 1].
    Returns uint8 [size, size, 3].
    """
    length = int(rng.integers(math.ceil(size / max_fraction), math.ceil(size / min_fraction), endpoint=True))
    image = _resize_shorter(image, length)
    top, left = (int(rng.integers(side - size, endpoint=True)) for side in image.shape[:2])
    return image[top:top + size, left:left + size]


def ten_crops(image: np.ndarray, size: int, crop_range: float = 1.1) -> np.ndarray:
    """Corners and centre of the image and of its mirror image, out of a centre crop `crop_range` times as wide.

    image: uint8 [H, W, 3].  Returns uint8 [10, size, size, 3] in the order of torchvision's TenCrop: top left, top
    right, bottom left, bottom right, centre, then the same five of the mirrored image (whose top left is the mirrored
    top right).  Raises ValueError if crop_range < 1.
    """
    width = int(size * crop_range)
    if width < size:
        raise ValueError(f"crop_range is {crop_range}, below 1")
    image = center_crop(image, width)
    far, middle = width - size, round((width - size) / 2)
    corners = ((0, 0), (0, far), (far, 0), (far, far), (middle, middle))
    return np.stack([view[top:top + size, left:left + size] for view in (image, image[:, ::-1])
                     for top, left in corners])  # [10, size, size, 3]


def flip_crops(image: np.ndarray, size: int) -> np.ndarray:
    """Centre crop and its mirror image: uint8 [H, W, 3] -> uint8 [2, size, size, 3]."""
    image = center_crop(image, size)
    return np.stack([image, image[:, ::-1]])


def to_tensor(images: np.ndarray | Tensor) -> Tensor:
    """Pixels to network range, x / 127.5 - 1: uint8 [..., H, W, 3] -> float32 [..., 3, H, W] in [-1, 1]."""
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(np.require(images, requirements=["C", "W"]))  # neither mirrored nor mapped views
    return images.movedim(-1, -3).to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1)


def to_uint8(images: Tensor) -> Tensor:
    """Network range to the nearest pixel value: float [..., 3, H, W] in [-1, 1] -> uint8 [..., H, W, 3].

    Truncates 127.5 x + 128 after clamping it to [0, 255], as ADM and LlamaGen do, so that numbers compare; this is
    127.5 x + 127.5 (the inverse of `to_tensor`) rounded to nearest, half up.  Values outside [-1, 1] are clamped.
    """
    images = images.to(torch.float32, copy=True).mul_(127.5).add_(128).clamp_(0, 255)
    return images.to(torch.uint8).movedim(-3, -1).contiguous()


def sample_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """A generator for one image in one epoch, the same in whatever worker or process asks (Philox, Salmon et al. 2011).

    epoch, index: in [0, 2^64).  The counter's upper words hold them, so no two streams overlap.
    """
    counter = np.array([0, 0, epoch, index], np.uint64)
    return np.random.Generator(np.random.Philox(counter=counter, key=np.array([seed % 2**64, 0], np.uint64)))


class ImageDataset(torch.utils.data.Dataset):
    """Cropped images with labels, for a DataLoader whose sampler yields (epoch, index), or index alone for epoch 0.

    source: the images; size: pixels; augment: "none" (images must be size x size already), "center" (centre crop) or
    "train" (with `random_crop` a random crop, otherwise the centre crop; with `random_flip` mirrored half the time);
    min_fraction, max_fraction: as in `random_crop`.  An unreadable image is logged, counted and replaced by the next
    readable one.
    Raises UserError if augment is "none" and the first readable image has another size.
    """

    def __init__(self, source: ImageSource, size: int, augment: Augment = "center", seed: int = 0, *,
                 random_crop: bool = True, random_flip: bool = True, min_fraction: float = 0.8,
                 max_fraction: float = 1.0) -> None:
        if augment not in ("none", "center", "train"):
            raise ValueError(f"augment is {augment!r}, not none, center or train")
        if not 0 < min_fraction <= max_fraction <= 1:
            raise ValueError(f"fractions {min_fraction} and {max_fraction} are not ascending in (0, 1]")
        self.source, self.size, self.augment, self.seed = source, size, augment, seed
        self.random_crop, self.random_flip = random_crop, random_flip
        self.fractions = (min_fraction, max_fraction)
        # One byte an image in shared memory: workers agree on which images were counted without a lock.
        self._unreadable = torch.zeros(len(source), dtype=torch.uint8).share_memory_()  # [N]
        if augment == "none":
            self._check_size(*self._load(0))

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, item: tuple[int, int] | int) -> tuple[Tensor, int, int]:
        """Image float32 [3, size, size] in [-1, 1], its label, its index (another than asked for if replaced).

        Raises UserError if 100 images in a row are unreadable.
        """
        epoch, index = item if isinstance(item, (tuple, list)) else (0, item)
        image, found = self._load(int(index))
        # keyed by the index asked for: the stand-in for an unreadable image then is not cropped as in its own turn
        return to_tensor(self._crop(image, found, int(epoch), int(index))), int(self.source.labels[found]), found

    @property
    def skipped(self) -> int:
        """Number of different images that this process and its workers found unreadable."""
        return int(self._unreadable.sum())

    def report_skipped(self) -> None:
        """Log how many images were unreadable; nothing if all could be read."""
        if skipped := self.skipped:
            log.warning("%s %s: %d of %d images were unreadable and replaced by others", self.source.option,
                           self.source.path, skipped, len(self))

    def _load(self, index: int) -> tuple[np.ndarray, int]:
        """The first readable image at or after `index`, and where it was found."""
        tries = min(_MAX_UNREADABLE, len(self))
        for found in ((index + offset) % len(self) for offset in range(tries)):
            try:
                return self.source.load(found), found
            except UnreadableImage as error:
                if not self._unreadable[found]:
                    self._unreadable[found] = 1
                    log.warning("unreadable image replaced by the next: %s", error)
        raise UserError(f"{self.source.option} {self.source.path} has {tries} unreadable images in a row, the last "
                        f"{self.source.name(found)}: check that its images are whole and can be read.")

    def _crop(self, image: np.ndarray, found: int, epoch: int, index: int) -> np.ndarray:
        """uint8 [H, W, 3] -> uint8 [size, size, 3]"""
        if self.augment == "none":
            self._check_size(image, found)
            return image
        if self.augment == "center":
            return center_crop(image, self.size)
        rng = sample_rng(self.seed, epoch, index)
        flip = rng.random() < 0.5  # drawn first and always: switching the crop off leaves the flips as they were
        image = random_crop(image, self.size, rng, *self.fractions) if self.random_crop else center_crop(image, self.size)
        return image[:, ::-1] if flip and self.random_flip else image

    def _check_size(self, image: np.ndarray, found: int) -> None:
        if image.shape[:2] != (self.size, self.size):
            raise UserError(f"{self.source.name(found)} is {image.shape[1]}x{image.shape[0]} pixels, not "
                            f"{self.size}x{self.size}: change --image-size or let images be centre-cropped.")


def image_grid(images: np.ndarray, columns: int, labels: Sequence[str] | None = None, scale: int = 1,
               rows: Sequence[str] | None = None, columns_titles: Sequence[str] | None = None) -> Image.Image:
    """Draw images in a grid, row by row, with captions.

    images: uint8 [N, H, W, 3]; labels: N captions, one below each image; scale: pixels an image pixel takes, in each
    direction; rows: captions to the left of the rows; columns_titles: captions above the columns.  Long captions are
    cut.  Raises ValueError if there is no image or a list has the wrong length.
    """
    count, height, width = images.shape[:3]
    lines = math.ceil(count / max(columns, 1))
    for texts, wanted in ((labels, count), (rows, lines), (columns_titles, columns)):
        if count < 1 or columns < 1 or (texts is not None and len(texts) != wanted):
            raise ValueError(f"{count} images in {columns} columns do not fit their captions")
    font, pad = ImageFont.load_default(size=12), 2
    line = 12 + 2 * pad  # height of a line of text
    least = max(width * scale, 96)  # captions of small images may widen their column this far
    labels = [_fit(text, font, least) for text in labels or []]
    titles = [_fit(text, font, least) for text in columns_titles or []]
    rows = [_fit(text, font, 240) for text in rows or []]
    cell = max([width * scale, *(math.ceil(font.getlength(text)) for text in labels + titles)]) + pad
    left = max([0, *(math.ceil(font.getlength(text)) + 2 * pad for text in rows)]) + pad
    top, step = pad + (line if titles else 0), height * scale + pad + (line + 4 * pad if labels else 0)
    grid = Image.new("RGB", (left + columns * cell, top + lines * step), "white")
    draw = ImageDraw.Draw(grid)
    for index, image in enumerate(images):
        x, y = left + index % columns * cell, top + index // columns * step
        picture = Image.fromarray(np.ascontiguousarray(image)).resize((width * scale, height * scale),
                                                                      Image.Resampling.NEAREST)
        grid.paste(picture, (x, y))
        if labels:
            draw.text((x, y + height * scale), labels[index], "black", font)
    for index, text in enumerate(rows):
        draw.text((pad, top + index * step + height * scale // 2), text, "black", font, anchor="lm")
    for index, text in enumerate(titles):
        draw.text((left + index * cell, pad), text, "black", font)
    return grid


def _fit(text: str, font: Any, limit: float) -> str:
    """Cut a caption to `limit` pixels, ending it in two dots."""
    if font.getlength(text) <= limit:
        return text
    while text and font.getlength(text + "..") > limit:
        text = text[:-1]
    return text + ".."
