"""Images with captions: a folder with captions.jsonl (LlamaGen's `image_path` and `text`), and WebDataset tar shards.

A shard is an uncompressed tar in which the files of one sample follow each other and differ in what is behind the first dot
of their names.  Python's tarfile finds where each file lies, and any row is then one read: resuming, several processes and
training orders need rows, where the webdataset package streams.  Rows are the samples in the order of shards and members.
"""

import logging
import os
import tarfile
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.config import UserError
from utils.image_source import DECODER_ERRORS, EXTENSIONS, FolderImages, ImageSource, UnreadableImage, decode
from utils.texts import Texts, json_lines, string_in
from utils.untrusted import parse_json, printable, shortened

log = logging.getLogger("images")

LIST = "captions.jsonl"
_ABSENT = (-1, 0)
_MAX_CAPTION = 1 << 20  # bytes of a caption's file


class ListedImages(FolderImages):
    """The images that the lines of captions.jsonl name, one row for each line; made by `open_images`."""

    def captions(self, key: str = "") -> Texts:
        """The strings under `text`, or under another key; a key with dots leads into inner objects."""
        path, lines = self.path / LIST, json_lines(self.path / LIST, self.option)
        found = [string_in(line, key or "text", f"{self.option} {printable(path)}, line {number},") for number, line in lines]
        if len(found) <= self.rows.max():
            raise UserError(f"{self.option} {printable(path)} was changed while it was read: run the command again.")
        return Texts(found[row] for row in self.rows)


def is_listed(path: Path) -> bool:
    """Whether a folder has a captions.jsonl."""
    return (path / LIST).is_file()


def open_listed(path: Path, option: str) -> ListedImages:
    """Open a folder with captions.jsonl; raises UserError naming the line that is malformed or whose image is elsewhere."""
    files = []
    for number, line in json_lines(path / LIST, option):
        where = f"{option} {printable(path / LIST)}, line {number},"
        name = string_in(line, "image_path", where)
        file = os.path.relpath(os.path.join(path, name), path) if "\0" not in name else os.pardir
        if file.split(os.sep)[0] in (os.pardir, os.curdir):
            raise UserError(f"{where} has the image_path {printable(name)!r}, which leaves the folder: give paths inside it.")
        files.append(file)
    if not files:
        raise UserError(f"{option} {printable(path / LIST)} has no captions: give a line with image_path and text for each "
                        "image.")
    return ListedImages(path, option, files, np.zeros(len(files), np.int64), [])


class _Sample(NamedTuple):
    """Where the files of a sample lie in a shard: (offset, bytes), or _ABSENT."""

    name: str
    image: tuple[int, int]
    text: tuple[int, int] = _ABSENT
    json: tuple[int, int] = _ABSENT


class TarImages(ImageSource):
    """Samples of WebDataset shards that have an image; made by `open_images`."""

    def __init__(self, path: Path, option: str, tars: list[Path], samples: list[list[_Sample]]) -> None:
        flat = [sample for shard in samples for sample in shard]
        super().__init__(path, option, np.zeros(len(flat), np.int64), ())
        self._tars = tars
        self._tar = np.repeat(np.arange(len(tars)), [len(shard) for shard in samples])            # [N]
        self._names = np.array([os.fsencode(sample.name) for sample in flat])                     # [N] bytes
        self._places = np.array([(sample.image, sample.text, sample.json) for sample in flat])    # [N, 3, 2]

    def _storage_checksum(self) -> int:
        """Of the names and sizes of shards' images."""
        value = zlib.crc32(b"\0".join(os.fsencode(tar.name) for tar in self._tars))
        return zlib.crc32(b"\0".join(self._names.tolist()), zlib.crc32(self._places[:, 0].tobytes(), value))

    def name(self, index: int) -> str:
        """SHARD.tar/member, control characters escaped."""
        row = self.rows[index]
        return printable(self._tars[self._tar[row]] / os.fsdecode(bytes(self._names[row])))

    def _read(self, row: int, kind: int) -> bytes:
        offset, size = self._places[row, kind].tolist()
        with self._tars[self._tar[row]].open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def load(self, index: int) -> np.ndarray:
        """Decode one member: uint8 [H, W, 3]; raises UnreadableImage."""
        try:
            return decode(BytesIO(self._read(self.rows[index], 0)))
        except DECODER_ERRORS as error:
            raise UnreadableImage(f"{self.name(index)}: {shortened(error)}") from error

    def captions(self, key: str = "") -> Texts:
        """The samples' .txt, or the string under `key` in their .json; the caption of a sample without one is empty."""
        kind, suffix = (2, ".json") if key else (1, ".txt")
        there = (self._places[self.rows, kind, 0] >= 0).nonzero()[0]
        if not len(there):
            raise UserError(f"{self.option} {printable(self.path)} has no captions, its samples have no {suffix}: give shards "
                            "with a .txt for each image, or --caption-key for a field of their .json.")
        if missing := len(self) - len(there):
            log.warning("%s %s: %d of %d samples have no %s, their captions are empty", self.option, self.path, missing,
                        len(self), suffix)
        texts = [""] * len(self)
        for index in there:
            texts[index] = self._caption(int(index), kind, key)
        return Texts(texts)

    def _caption(self, index: int, kind: int, key: str) -> str:
        where, row = f"{self.option} {self.name(index)}", self.rows[index]
        if (size := self._places[row, kind, 1]) > _MAX_CAPTION:
            raise UserError(f"{where} has a caption of {size} bytes: give captions of at most {_MAX_CAPTION}.")
        try:
            content = self._read(row, kind)
            found = parse_json(content) if key else content.decode("utf-8", "replace")
        except (OSError, ValueError) as error:
            raise UserError(f"{where} has a caption that cannot be read ({shortened(error)}): make the shard again.") from error
        return string_in(found if isinstance(found, dict) else {}, key, f"{where}: its .json") if key else found


def tars_of(path: Path) -> list[Path]:
    """The shard itself, or the shards in a folder by their names."""
    if not path.is_dir():
        return [path]
    return sorted(each for each in path.glob("*.tar") if not each.name.startswith("."))


def open_tars(path: Path, option: str) -> TarImages:
    """Find all samples of the shards; raises UserError naming a shard that is damaged, or where no sample has an image."""
    tars = tars_of(path)
    samples = [list(_samples(tar, option)) for tar in tars]
    if not any(samples):
        raise UserError(f"{option} {printable(path)} has no image in {len(tars)} tar files: give WebDataset shards whose samples "
                        f"have an image ({' '.join(EXTENSIONS)}).")
    return TarImages(path, option, tars, samples)


def _samples(tar: Path, option: str) -> Iterator[_Sample]:
    """The samples of one shard that have an image."""
    key, places = "", dict[str, tuple[str, tuple[int, int]]]()
    try:
        with tarfile.open(tar, "r:") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # it would remember millions
                folder, base = os.path.split(member.name)
                stem, _, suffix = base.partition(".")
                if not member.isreg() or member.issparse() or not stem:
                    continue
                if (here := os.path.join(folder, stem)) != key:
                    yield from _sample(places)
                    key, places = here, {}
                places.setdefault(f".{suffix.lower()}", (member.name, (member.offset_data, member.size)))
            yield from _sample(places)
            _require_end(tar, archive.offset)
    except (tarfile.TarError, OSError, ValueError, EOFError, zlib.error) as error:
        raise UserError(f"{option} {printable(tar)} is no whole tar file ({shortened(error)}): make or copy it again.") from error


def _require_end(tar: Path, offset: int) -> None:
    """Raise ValueError unless the block of zeros that ends a tar is where its members end: tarfile takes a cut for an end."""
    with tar.open("rb") as file:
        file.seek(offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise ValueError(f"it ends or is damaged at byte {offset}")


def _sample(places: dict[str, tuple[str, tuple[int, int]]]) -> Iterator[_Sample]:
    """The sample of these files, by their suffixes, if one of them is an image."""
    absent = ("", _ABSENT)
    if image := next((suffix for suffix in places if suffix.endswith(EXTENSIONS)), None):
        yield _Sample(*places[image], places.get(".txt", absent)[1], places.get(".json", absent)[1])
