"""Codes that LlamaGen, IAR or IAR2 extracted, a file for each image, as one code folder that our trainers read.

    python scripts/llamagen_codes.py C/imagenet256_codes C/imagenet256_labels --vq-ckpt released/llamagen --code-path codes/256

CODES and LABELS hold 0.npy, 1.npy, ...: codes [1, crops, cells] (ten crops, or an image and its mirror) or, of two codebooks,
[2, 1, crops, cells]; labels [1].  File n becomes row n.  The tokenizer is the one that the codes were extracted with, imported by
`released_weights.py`: its fingerprint goes into the header, and nothing but the size of its codebooks can be checked.  Several
GPUs extract as many images each, the last of which repeat the first; such repetitions are left out.  The same command carries
on where it was interrupted; NPROC processes share the files (`NPROC=8 bash scripts/launch.sh scripts/llamagen_codes.py ...`).
"""

import logging
import math
import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started by its path

import numpy as np
import torch
import tyro

from tokenizer.tokenizer_image.vq_model import VQModel, load_tokenizer
from utils.code_shards import CodeHeader
from utils.code_writer import CodeWriter
from utils.config import Count, Positive, UserError, interval, parse, run_main
from utils.distributed import Processes, broadcast, setup
from utils.files import check_exists, check_writable
from utils.labels import require_labels
from utils.logs import progress, set_up_logging
from utils.npz import read_header
from utils.untrusted import printable, shortened

log = logging.getLogger("llamagen_codes")

AUGMENTATIONS = {2: "flip", 1: "none"}  # by the number of crops; ten crops have a range

_NAME = re.compile(r"(0|[1-9]\d{0,11})\.npy")
_LARGEST_FILE = 1 << 24  # bytes
_AT_ONCE = 512           # files between two lines of progress
_PROBES = 64             # files, spread over all, that are looked at before the work starts
_MOST_REPEATED = 64      # images at the end: one for each GPU but one


@dataclass
class LlamaGenCodesConfig:
    """Options of the conversion."""

    codes: tyro.conf.Positional[Path]
    """Folder of codes, such as imagenet256_codes."""
    labels: tyro.conf.Positional[Path]
    """Folder of labels, such as imagenet256_labels."""
    vq_ckpt: Path
    """The tokenizer of the codes: tokenizer.safetensors, or the folder that holds it."""
    code_path: Path
    """Folder to write."""
    num_classes: Count = 0
    """Classes of the data set; 0: the largest label and one."""
    crop_range: Annotated[float, interval(float, 1)] = 1.1
    """Of ten crops, as the codes were extracted (LlamaGen: 1.1 and 1.05): kept in the header alone."""
    num_threads: Positive = 16
    """Files that a process reads at once."""


@dataclass(frozen=True)
class Numbered:
    """A folder with the files 0.npy to COUNT - 1.npy; option: what named it."""

    folder: Path
    option: str
    count: int

    def path(self, number: int) -> Path:
        """The file of an image."""
        return self.folder / f"{number}.npy"

    def read(self, number: int) -> np.ndarray:
        """Integers of any shape; raises UserError naming the file where it holds anything else."""
        try:
            with self.path(number).open("rb") as file:
                data = file.read(_LARGEST_FILE + 1)
            if len(data) > _LARGEST_FILE:
                raise ValueError(f"it is larger than {_LARGEST_FILE} bytes")
            start = 10 + int.from_bytes(data[8:10], "little")
            shape, fortran, dtype = _layout(data[:start], len(data))
            array = np.frombuffer(data, dtype, offset=start).reshape(shape, order="F" if fortran else "C")
        except (OSError, ValueError) as error:
            raise UserError(f"{self.called(number)} cannot be read ({shortened(error)}): copy or extract it again.") from error
        if dtype.kind not in "iu":
            raise UserError(f"{self.called(number)} holds {dtype}, not integers: give what extract_codes_c2i.py wrote.")
        return array

    def called(self, number: int) -> str:
        """A file, for messages."""
        return f"{self.option} {printable(self.path(number))}"


@lru_cache(maxsize=64)
def _layout(header: bytes, size: int) -> tuple[tuple[int, ...], bool, np.dtype]:
    """What the first bytes of an npy file say, which are the same in a million files."""
    shape, fortran, dtype = read_header(BytesIO(header), size)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    return shape, fortran, dtype


def open_numbered(folder: Path, option: str, what: str) -> Numbered:
    """The files of a folder by their numbers; raises UserError, naming `option` and `what` it should hold, where one lacks."""
    check_exists(folder, option, f"the folder of {what}")
    try:
        names = [entry.name for entry in os.scandir(folder) if (os.path.isfile(entry) if entry.is_symlink() else entry.is_file())]
    except OSError as error:
        raise UserError(f"{option} {printable(folder)} cannot be read ({error.strerror}): give the folder of {what}.") from error
    numbers = np.sort([int(match[1]) for match in map(_NAME.fullmatch, names) if match])
    if not len(numbers):
        seen = printable(", ".join(sorted(os.listdir(folder))[:3])) or "nothing"
        raise UserError(f"{option} {printable(folder)} has no file 0.npy, 1.npy, ..., but {seen}: give the folder of {what} that "
                        "LlamaGen's extract_codes_c2i.py wrote.")
    if numbers[-1] != len(numbers) - 1:
        lacking = int(np.argmax(numbers != np.arange(len(numbers))))
        raise UserError(f"{option} {printable(folder)} lacks {lacking}.npy, the first of {numbers[-1] + 1 - len(numbers)} "
                        f"missing ones among 0 to {numbers[-1]}: copy or extract them again.")
    if others := len(names) - len(numbers):
        log.info("%s %s: %d files have other names than a number and are left out", option, folder, others)
    return Numbered(folder, option, len(numbers))


def arranged(array: np.ndarray, streams: int) -> np.ndarray:
    """Codes of an image as they were saved, of any of the known shapes -> [crops, C, N]; raises ValueError for another."""
    shape = array.shape
    if streams == 1 and array.ndim <= 3:
        array = array.reshape(*(1,) * (4 - array.ndim), *shape)
    if array.ndim != 4 or array.shape[:2] != (streams, 1) or not array.size:
        raise ValueError(f"codes of shape {shape}")
    return array[:, 0].transpose(1, 0, 2)


class Converter:
    """Reads codes and labels file by file, each checked against the tokenizer and against the first."""

    def __init__(self, codes: Numbered, labels: Numbered, tokenizer: VQModel, config: LlamaGenCodesConfig) -> None:
        self.codes, self.labels, self.config = codes, labels, config
        self.sizes = np.array(tokenizer.config.codebook_sizes)
        if labels.count != codes.count:
            raise UserError(f"LABELS {printable(labels.folder)} has {labels.count} files but CODES {printable(codes.folder)} has "
                            f"{codes.count}: give the labels of the same images.")
        self.saved = codes.read(0).shape
        try:
            first = arranged(codes.read(0), len(self.sizes))
        except ValueError as error:
            raise UserError(f"{codes.called(0)} has {error}, where --vq-ckpt {config.vq_ckpt} has {len(self.sizes)} codebooks, "
                            "whose codes are [1, crops, cells] of one and [2, 1, crops, cells] of two: give the tokenizer of the "
                            "codes.") from error
        self.crops, _, self.cells = first.shape
        self.grid = math.isqrt(self.cells)
        if self.grid**2 != self.cells:
            raise UserError(f"{codes.called(0)} has {self.cells} codes a crop, which are no square grid: give codes of square "
                            "images.")
        for number in np.unique(np.linspace(0, codes.count - 1, _PROBES).astype(int)).tolist():
            self.read_codes(number), self.read_label(number)
        self.images = codes.count - self._repeated()

    def read_codes(self, number: int) -> np.ndarray:
        """Codes [crops, C, N] of an image; raises UserError where they differ in shape from the first or exceed the codebooks."""
        found = self.codes.read(number)
        if found.shape != self.saved:
            raise UserError(f"{self.codes.called(number)} has codes of shape {found.shape} but 0.npy of {self.saved}: extract "
                            "all images in the same way.")
        codes = arranged(found, len(self.sizes))
        if codes.min() < 0 or (codes.max((0, 2)) >= self.sizes).any():
            raise UserError(f"{self.codes.called(number)} has codes from {codes.min()} to {codes.max()}, beyond the codebooks of "
                            f"{self.sizes.tolist()} codes of --vq-ckpt {self.config.vq_ckpt}: give the tokenizer of the codes.")
        return codes.astype(np.int64)

    def read_label(self, number: int) -> int:
        """The label of an image; raises UserError where there is not one."""
        found = self.labels.read(number)
        if found.size != 1:
            raise UserError(f"{self.labels.called(number)} holds {found.size} labels of shape {found.shape}, not one: give the "
                            "labels that belong to the codes.")
        return int(found.reshape(-1)[0])

    def _repeated(self) -> int:
        """How many images at the end are the first ones again, which a sampler of several GPUs adds."""
        for most in range(min(_MOST_REPEATED, self.codes.count // 2), 0, -1):
            if all(self._same(number, self.codes.count - most + number) for number in range(most)):
                log.info("CODES %s: the last %d of %d images are the first ones again, as several GPUs extract them, and are "
                            "left out", self.codes.folder, most, self.codes.count)
                return most
        return 0

    def _same(self, one: int, other: int) -> bool:
        return all(np.array_equal(files.read(one), files.read(other)) for files in (self.labels, self.codes))

    def header(self, tokenizer: VQModel, labels: np.ndarray) -> CodeHeader:
        """What the code folder will say; raises UserError where --num-classes is less than the labels need."""
        require_labels(labels, f"LABELS {printable(self.labels.folder)}", lambda row: f"in {row}.npy")
        classes = self.config.num_classes or int(labels.max()) + 1
        if labels.max() >= classes:
            raise UserError(f"--num-classes {classes} is less than {self.labels.called(int(labels.argmax()))} needs, whose label "
                            f"is {labels.max()}: give {labels.max() + 1} or more.")
        augmentation = f"ten-crop {self.config.crop_range}" if self.crops == 10 else AUGMENTATIONS.get(
            self.crops, f"{self.crops} crops")
        return CodeHeader(tokenizer.provenance.fingerprint, self.sizes.tolist(), self.grid,
                          self.grid * tokenizer.config.downsampling, self.crops, augmentation, classes, self.images,
                          source=f"{self.images} images of {self.codes.folder.name}")


def read_labels(converter: Converter, pool: ThreadPoolExecutor, processes: Processes) -> np.ndarray:
    """The labels of all images, read by the main process: int64 [images]."""
    labels = np.zeros(converter.images, np.int64)
    if processes.is_main:
        bar = progress(converter.images, "labels", "images", processes)
        for rows in parts(np.arange(converter.images)):
            labels[rows] = list(pool.map(converter.read_label, rows.tolist()))
            bar.update(len(rows))
        bar.close()
    processes.barrier()  # whose patience is longer than that of a broadcast
    return broadcast(torch.from_numpy(labels), processes).numpy()


def parts(rows: np.ndarray) -> Iterator[np.ndarray]:
    """Rows [n], some at a time."""
    return (rows[first : first + _AT_ONCE] for first in range(0, len(rows), _AT_ONCE))


def convert(config: LlamaGenCodesConfig, processes: Processes) -> None:
    """Copy every image's codes that are missing in the code folder."""
    tokenizer = load_tokenizer(config.vq_ckpt)
    files = open_numbered(config.codes, "CODES", "codes"), open_numbered(config.labels, "LABELS", "labels")
    converter = Converter(*files, tokenizer, config)
    check_writable(config.code_path, "--code-path")
    with ThreadPoolExecutor(config.num_threads) as pool:
        labels = read_labels(converter, pool, processes)
        header = converter.header(tokenizer, labels)
        writer = CodeWriter(config.code_path, header, labels, processes)
        bar = progress(len(writer.share()), "codes", "images", processes)
        for rows in parts(writer.share()):
            writer.write(rows, np.stack(list(pool.map(converter.read_codes, rows.tolist()))))
            bar.update(len(rows))
        bar.close()
    writer.finish()
    log.info("%s: codes of %d images, %d crops each (%s), grid %dx%d of %d-pixel images, %d classes", config.code_path,
             header.images, header.crops, header.augmentation, header.grid_size, header.grid_size, header.image_size,
             header.num_classes)


def main() -> None:
    """Parse options and convert."""
    config = parse(LlamaGenCodesConfig)
    processes = setup("cpu")
    set_up_logging(processes)
    convert(config, processes)
    processes.close()


if __name__ == "__main__":
    run_main(main)
