"""Images in WebDataset tar shards, with captions, with classes, or with both.

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
from typing import Any, NamedTuple

import numpy as np

from utils.config import UserError
from utils.data_path import DataPath
from utils.files import read_json
from utils.image_source import DECODER_ERRORS, EXTENSIONS, ImageSource, UnreadableImage, decode
from utils.labels import number_names, require_labels
from utils.texts import Texts, string_in
from utils.untrusted import parse_json, printable, read_text, shortened

log = logging.getLogger("images")

_ABSENT = (-1, 0)
_MAX_TEXT = 1 << 20   # bytes of a caption's or a description's file
_MAX_LABEL = 32       # bytes of a .cls
_NAMES = ("classnames.txt", "classnames.json")  # beside the shards: names of the classes by label id


class _Sample(NamedTuple):
    """Where the files of a sample lie in a shard: (offset, bytes), or _ABSENT; label: what its .cls holds."""

    name: str
    image: tuple[int, int]
    text: tuple[int, int] = _ABSENT
    json: tuple[int, int] = _ABSENT
    label: bytes | None = None


class TarImages(ImageSource):
    """Samples of WebDataset shards that have an image; made by `open_images`."""

    def __init__(self, path: Path, option: str, tars: list[Path], samples: list[list[_Sample]]) -> None:
        flat = [sample for shard in samples for sample in shard]
        super().__init__(path, option, np.zeros(len(flat), np.int64), ())
        self._tars = tars
        self._tar = np.repeat(np.arange(len(tars)), [len(shard) for shard in samples])            # [N]
        self._names = np.array([os.fsencode(sample.name) for sample in flat])                     # [N] bytes
        self._places = np.array([(sample.image, sample.text, sample.json) for sample in flat])    # [N, 3, 2]

    def set_classes(self, labels: np.ndarray, names: list[str]) -> None:
        """Give every sample a class: labels int64 [N]; names: of the classes by label id, or none."""
        self.labels, self.class_names = labels, tuple(printable(name) for name in names)
        self.num_classes = len(names) or int(labels.max()) + 1

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
        if kind == 2:
            return string_in(self.described(index), key, f"{self.option} {self.name(index)}: its .json")
        return self._text(index, kind, "caption").decode("utf-8", "replace")

    def described(self, index: int) -> dict[str, Any]:
        """What the .json of a sample holds, {} for none and for what is no object; raises UserError where it is damaged."""
        if self._places[self.rows[index], 2, 0] < 0:
            return {}
        try:
            found = parse_json(self._text(index, 2, ".json"))
        except ValueError as error:
            raise self._unreadable(index, ".json", error) from error
        return found if isinstance(found, dict) else {}

    def _text(self, index: int, kind: int, what: str) -> bytes:
        """A small file of a sample."""
        if (size := self._places[self.rows[index], kind, 1]) > _MAX_TEXT:
            raise UserError(f"{self.option} {self.name(index)} has a {what} of {size} bytes: give at most {_MAX_TEXT}.")
        try:
            return self._read(self.rows[index], kind)
        except OSError as error:
            raise self._unreadable(index, what, error) from error

    def _unreadable(self, index: int, what: str, error: Exception) -> UserError:
        return UserError(f"{self.option} {self.name(index)} has a {what} that cannot be read ({shortened(error)}): make the "
                         "shard again.")


def tars_of(path: Path) -> list[Path]:
    """The shard itself, or the shards in a folder by their names; none for anything else."""
    if not path.is_dir():
        return [path] if path.suffix == ".tar" else []
    return sorted(each for each in path.glob("*.tar") if not each.name.startswith("."))


def open_tars(wanted: DataPath, option: str) -> TarImages:
    """Find all samples of the shards; raises UserError naming a shard that is damaged, or where no sample has an image."""
    tars = tars_of(wanted.path)
    wanted.require_none(option, "a folder of tar shards" if wanted.path.is_dir() else "a tar shard", ("image",))
    samples = [list(_samples(tar, option)) for tar in tars]
    if not any(samples):
        raise UserError(f"{option} {printable(wanted.path)} has no image in {len(tars)} tar files: give WebDataset shards whose "
                        f"samples have an image ({' '.join(EXTENSIONS)}).")
    source = TarImages(Path(wanted.text), option, tars, samples)
    _classify(source, wanted, [sample.label for shard in samples for sample in shard])
    return source


# --- classes ---------------------------------------------------------------------------------------------------------


def _classify(source: TarImages, wanted: DataPath, given: list[bytes | None]) -> None:
    """Give the samples the classes of their .cls, or those under label=FIELD in their .json; neither: all are of class 0."""
    field = wanted.columns.get("label")
    if field:
        found = [_field_of(source, index, field) for index in range(len(source))]
    elif field is None and any(label is not None for label in given):
        found = [_number(source, index, label) for index, label in enumerate(given)]
    else:
        if field is None:
            _hint_at_json(source)
        return
    where = f"{source.option} {printable(source.path)}"
    if isinstance(found[0], str):
        if (row := next((row for row, each in enumerate(found) if not isinstance(each, str)), None)) is not None:
            raise UserError(f"{source.option} {source.name(row)} has the label {found[row]} and others have names: give one "
                            "kind.")
        source.set_classes(*number_names([str(each) for each in found], where))
        return
    if (row := next((row for row, each in enumerate(found) if isinstance(each, str)), None)) is not None:
        raise UserError(f"{source.option} {source.name(row)} has a name as label and others have integers: give one kind.")
    names = _names_beside(wanted.path, source.option)
    labels = np.array(found, object)  # Python's integers: a hostile one fits no other array
    require_labels(labels, where, lambda row: f"of {source.name(row)}", names)
    source.set_classes(labels.astype(np.int64), names)


def _number(source: TarImages, index: int, label: bytes | None) -> int:
    """The integer of a .cls; raises UserError naming the sample where there is none."""
    seen = "no .cls, where others have one" if label is None else f"the .cls {printable(label.decode('utf-8', 'replace'))[:40]!r}"
    try:
        return int(label or b"")
    except ValueError:
        raise UserError(f"{source.option} {source.name(index)} has {seen}: give every sample an integer from 0 as its "
                        "class.") from None


def _field_of(source: TarImages, index: int, field: str) -> int | str:
    """The class under a key of a sample's .json, an integer or a name; a key with dots leads into inner objects."""
    value: Any = source.described(index)
    for part in field.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if type(value) is int or isinstance(value, str):
        return value
    raise UserError(f"{source.option} {source.name(index)} has no class in its .json under {printable(field)!r}: give every "
                    "sample an integer or a name there, or name another field.")


def _hint_at_json(source: TarImages) -> None:
    """Say so where the first sample's .json looks as if it held the class, which nothing reads unless it is asked for."""
    found = source.described(0)
    if field := next((name for name in ("label", "class", "cls") if type(found.get(name)) is int), None):
        log.warning("%s %s: all images are of class 0, their samples have no .cls; their .json have %s: add ::label=%s to the "
                    "path if it is the class", source.option, source.path, field, field)


def _names_beside(path: Path, option: str) -> list[str]:
    """Names of the classes from a file beside the shards: a line each, or a JSON list of strings; [] where there is none."""
    folder = path if path.is_dir() else path.parent
    for file in (folder / name for name in _NAMES):
        if not os.path.lexists(file):
            continue
        if file.suffix == ".json":
            found = read_json(file, option, "the names of the classes")
        else:
            try:
                found = [line.strip() for line in read_text(file).splitlines()]
            except (OSError, ValueError) as error:
                raise UserError(f"{option} {file} cannot be read ({shortened(error)}): give names in UTF-8, or remove "
                                "it.") from error
        if not isinstance(found, list) or not found or not all(isinstance(name, str) and name for name in found):
            raise UserError(f"{option} {file} is no list of names: give one for each class, or remove the file.")
        return found
    return []


# --- members ---------------------------------------------------------------------------------------------------------


def _samples(tar: Path, option: str) -> Iterator[_Sample]:
    """The samples of one shard that have an image."""
    key, places = "", dict[str, _File]()
    try:
        with tarfile.open(tar, "r:") as archive, tar.open("rb") as content:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # it would remember millions
                folder, base = os.path.split(member.name)
                stem, _, suffix = base.partition(".")
                if not member.isreg() or member.issparse() or not stem:
                    continue
                if (here := os.path.join(folder, stem)) != key:
                    yield from _sample(places)
                    key, places = here, {}
                suffix = f".{suffix.lower()}"
                label = None
                if suffix == ".cls":  # read now, while the shard is read from its beginning to its end
                    content.seek(member.offset_data)
                    label = content.read(min(member.size, _MAX_LABEL))
                places.setdefault(suffix, _File(member.name, (member.offset_data, member.size), label))
            yield from _sample(places)
            _require_end(tar, archive.offset)
    except (tarfile.TarError, OSError, ValueError, EOFError, zlib.error) as error:
        raise UserError(f"{option} {printable(tar)} is no whole tar file ({shortened(error)}): make or copy it again.") from error


class _File(NamedTuple):
    """A member of a shard: its name, (offset, bytes), and what it holds if it is a .cls."""

    name: str
    place: tuple[int, int]
    content: bytes | None


def _require_end(tar: Path, offset: int) -> None:
    """Raise ValueError unless the block of zeros that ends a tar is where its members end: tarfile takes a cut for an end."""
    with tar.open("rb") as file:
        file.seek(offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise ValueError(f"it ends or is damaged at byte {offset}")


def _sample(places: dict[str, _File]) -> Iterator[_Sample]:
    """The sample of these files, by their suffixes, if one of them is an image."""
    absent = _File("", _ABSENT, None)
    if image := next((suffix for suffix in places if suffix.endswith(EXTENSIONS)), None):
        text, json, label = (places.get(suffix, absent) for suffix in (".txt", ".json", ".cls"))
        yield _Sample(places[image].name, places[image].place, text.place, json.place, label.content)
