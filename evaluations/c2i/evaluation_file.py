"""One npz of images or statistics to evaluate: what it must hold, checked before the network runs, and how it is read."""

import zipfile
from collections.abc import Iterator
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import numpy as np

from evaluations.c2i.extractors import EXTRACTORS, stored_statistics
from evaluations.c2i.metrics import NEAREST_K
from utils.class_names import ClassNames
from utils.config import UserError
from utils.files import check_exists
from utils.image_source import MAX_PIXELS
from utils.npz import NPZ_ERRORS, array_header, array_keys, open_array, read_small
from utils.untrusted import printable, shortened

SAVE_AS_ADM = "save images as np.savez(path, images) with uint8 images of shape (N, H, W, 3)"


class EvaluationFile:
    """One npz to evaluate, checked when it is opened and read in batches.

    name: the argument it came from (REF or SAMPLE).  Raises UserError for a file that ADM's evaluator could not use.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.where = path, f"{name} {path}"
        self.shape: tuple[int, ...] = ()  # of arr_0; empty if the file holds statistics only
        self.dtype = np.dtype(np.uint8)
        check_exists(path, name, "an npz of images")
        try:
            if path.is_dir() or not zipfile.is_zipfile(path):
                raise UserError(f"{self.where} is not an npz: {SAVE_AS_ADM}.")
            self.keys = array_keys(path)
            if "arr_0" in self.keys:
                self.shape, self.dtype = array_header(path, "arr_0")
            self.kind = str(read_small(path, "kind", (), "U")) if "kind" in self.keys else None
            self._check_statistics()
        except NPZ_ERRORS as error:
            raise UserError(f"{self.where} cannot be read ({shortened(error)}): it may be damaged or incomplete, make it "
                            "again.") from error
        if "arr_0" in self.keys:
            self._check_images()
        elif name != "REF" or not stored_statistics().keys() & set(self.keys):
            raise UserError(f"{self.where} has no arr_0, only {printable(', '.join(self.keys)) or 'nothing'}: {SAVE_AS_ADM}.")

    @property
    def has_statistics(self) -> bool:
        """True if the file stores a mean and a covariance of Inception features that stand for its images in FID."""
        return "mu" in self.keys

    @property
    def count(self) -> int:
        """Number of images; 0 if the file holds statistics only."""
        return self.shape[0] if self.shape else 0

    def statistic(self, key: str) -> np.ndarray | None:
        """A stored mean or covariance, such as mu or sigma, or None."""
        return np.array(open_array(self.path, key)) if key in self.keys else None

    def labels(self) -> np.ndarray | None:
        """Class labels of the images [N], or None where the file has none that can be read as such."""
        if "arr_1" not in self.keys:
            return None
        try:
            shape, dtype = array_header(self.path, "arr_1")
            labels = open_array(self.path, "arr_1") if dtype.kind in "iu" and shape == (self.count,) else None
        except NPZ_ERRORS as error:
            raise UserError(f"{self.where} has a damaged arr_1 ({shortened(error)}): make the file again.") from error
        if labels is not None and len(labels) and labels.min() < 0:
            raise UserError(f"{self.where} has the negative label {labels.min()} in arr_1: make the file again.")
        return labels

    @property
    def class_names(self) -> ClassNames:
        """Names of the classes by label; empty where the file has none that can be read as such."""
        try:
            shape, dtype = array_header(self.path, "class_names") if "class_names" in self.keys else ((), np.dtype("U"))
            return tuple(open_array(self.path, "class_names").tolist()) if len(shape) == 1 and dtype.kind == "U" else ()
        except NPZ_ERRORS as error:
            raise UserError(f"{self.where} has damaged class_names ({shortened(error)}): make the file again.") from error

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """Images in order, uint8 or float [n, H, W, 3], `size` rows at a time, without loading the rest.

        Raises UserError if the data is damaged or floats lie outside 0 to 255.
        """
        row_bytes = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as member:
                header = member.read(archive.getinfo("arr_0.npy").file_size - self.count * row_bytes)
                if b"'fortran_order': True" in header:
                    raise UserError(f"{self.where} has arr_0 in Fortran order: save np.ascontiguousarray(images).")
                for start in range(0, self.count, size):
                    rows = min(size, self.count - start)
                    batch = np.frombuffer(member.read(rows * row_bytes), self.dtype).reshape(rows, *self.shape[1:])
                    self._check_range(batch, first=start == 0)
                    yield batch
        except NPZ_ERRORS as error:
            raise UserError(f"{self.where} cannot be read to its end ({shortened(error)}): it is damaged, make it "
                            "again.") from error

    @cached_property
    def digest(self) -> str:
        """A hash of the images' checksum in the zip directory, size, shape and type."""
        with zipfile.ZipFile(self.path) as archive:
            info = archive.getinfo("arr_0.npy")
        return sha256(f"{info.CRC} {info.file_size} {self.shape} {self.dtype}".encode()).hexdigest()[:16]

    def _check_images(self) -> None:
        if self.dtype != np.uint8 and self.dtype.kind != "f":
            raise UserError(f"{self.where} has arr_0 of type {self.dtype}, not uint8 or float: {SAVE_AS_ADM}.")
        if len(self.shape) != 4 or self.shape[3] != 3 or 0 in self.shape:
            raise UserError(f"{self.where} has arr_0 of shape {self.shape}, not (N, H, W, 3): {SAVE_AS_ADM}.")
        if self.shape[1] * self.shape[2] > MAX_PIXELS:
            raise UserError(f"{self.where} has images of {self.shape[2]}x{self.shape[1]} pixels: give images of at most "
                            f"{MAX_PIXELS} pixels.")
        if self.count <= NEAREST_K:
            raise UserError(f"{self.where} has {self.count} images, but precision and recall need at least "
                            f"{NEAREST_K + 1}: give a file with more images.")
        if self.dtype.kind == "f":
            next(self.batches(1 << 4))  # a wrong range is found before the network works for an hour

    def _check_range(self, batch: np.ndarray, first: bool) -> None:
        if batch.dtype.kind != "f":
            return
        low, high = float(batch.min()), float(batch.max())
        if not (low >= 0 and high <= 255) or (first and high <= 1):
            raise UserError(f"{self.where} has float images from {low:g} to {high:g}, not from 0 to 255: scale them "
                            "to 0 to 255 or save them as uint8.")

    def _check_statistics(self) -> None:
        pairs = [output.statistics for extractor in EXTRACTORS.values() for output in extractor.outputs if output.statistics]
        for key, partner in (each for mean, covariance in pairs for each in ((mean, covariance), (covariance, mean))):
            if key in self.keys and partner not in self.keys:
                raise UserError(f"{self.where} has {key} but not {partner}: store both or neither.")
        for key, (wanted, source) in stored_statistics().items():
            if key not in self.keys:
                continue
            shape, dtype = array_header(self.path, key)
            if shape != wanted or dtype.kind != "f":
                raise UserError(f"{self.where} has {key} of type {dtype} and shape {shape}, not float {wanted}: take statistics "
                                f"of {source}.")
            values = open_array(self.path, key)
            if not np.isfinite(values).all():
                raise UserError(f"{self.where} has {key} with infinite or missing values: compute the statistics again.")
            if values.ndim == 2 and (np.diagonal(values).min() < 0 or not np.allclose(values, values.T, atol=1e-3)):
                raise UserError(f"{self.where} has {key} that is no covariance (not symmetric, or a variance below 0): compute "
                                "the statistics again.")
