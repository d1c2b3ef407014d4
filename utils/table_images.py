"""Images in the rows of a table (`table_files.py`): parquet, or what `datasets.Dataset.save_to_disk` wrote.

The bytes of an image are decoded here, like those of every other source, and never by `datasets`.
"""

import logging
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from utils.config import UserError
from utils.data_path import DataPath
from utils.image_source import DECODER_ERRORS, ImageSource, UnreadableImage, decode, decode_file
from utils.packages import require_package
from utils.table_columns import Columns, read_classes
from utils.table_files import load_table
from utils.texts import Texts
from utils.untrusted import printable, shortened

log = logging.getLogger("images")

_MAX_CAPTION = 1 << 20  # bytes
_AT_ONCE = 65536        # captions in memory as objects


class TableImages(ImageSource):
    """The rows of a table; made by `open_images`.

    `datasets` maps the Arrow files and pickles their names, so that workers share the pages.
    """

    def __init__(self, wanted: DataPath, option: str, dataset: Any, columns: Columns) -> None:
        image = columns.image()
        labels, names = read_classes(columns, len(dataset))
        super().__init__(Path(wanted.text), option, labels, names)
        self._wanted, self._dataset = wanted, dataset
        self._images = dataset.select_columns([image]).with_format("arrow")
        self._sizes = _checksum_of_sizes(columns.read(image))

    def _storage_checksum(self) -> int:
        """Of the sizes of the images' bytes, and of the paths beside them."""
        return self._sizes

    def name(self, index: int) -> str:
        """PATH[row], with the row in the table."""
        return printable(f"{self.path}[{self.rows[index]}]")

    def load(self, index: int) -> np.ndarray:
        """Decode one row's bytes, or the file it names where it has none: uint8 [H, W, 3]; raises UnreadableImage."""
        try:
            found = self._images[int(self.rows[index])].column(0)[0].as_py()
            data, file = (found.get("bytes"), found.get("path")) if isinstance(found, dict) else (found, None)
            if data is None and file is None:
                raise ValueError("it has no bytes")
            return decode(BytesIO(data)) if data is not None else decode_file(self._folder() / str(file))
        except DECODER_ERRORS as error:
            raise UnreadableImage(f"{self.name(index)}: {shortened(error)}") from error

    def _folder(self) -> Path:
        return self._wanted.path if self._wanted.path.is_dir() else self._wanted.path.parent

    def captions(self, key: str = "") -> Texts:
        """The strings of the column `key`, or of the only one with a usual name; of several captions of an image the first.

        A row without a caption has an empty one.
        """
        where = f"{self.option} {printable(self.path)}"
        columns = Columns(self._dataset, self._wanted, where)
        name, fields = columns.caption(key)
        column = columns.read(name)
        texts, absent = list[str](), 0
        for first in range(0, len(self), _AT_ONCE):
            for value in column.take(self.rows[first : first + _AT_ONCE]).to_pylist():
                text = _text_in(value, fields)
                if text is not None and not isinstance(text, str) or len(text or "") > _MAX_CAPTION:
                    raise UserError(f"{where} has no captions in {printable(key or name)!r}, whose row {self.rows[len(texts)]} "
                                    f"is no string of at most {_MAX_CAPTION} bytes: name a column of strings, --caption-key.")
                texts.append(text or "")
                absent += text is None
        if absent:
            log.warning("%s: %d of %d rows have no %s, their captions are empty", where, absent, len(self),
                        printable(key or name))
        return Texts(texts)


def _text_in(value: Any, fields: list[str]) -> Any:
    """What a row holds under names of inner fields; the first of a list."""
    for field in fields:
        value = value.get(field) if isinstance(value, dict) else None
    return (value[0] if value else None) if isinstance(value, list) else value


def _checksum_of_sizes(column: Any) -> int:
    """CRC-32 of the sizes of a column's bytes, -1 where there are none, and of the paths beside them; the bytes are not read."""
    pyarrow, compute = require_package("pyarrow", "a table"), require_package("pyarrow.compute", "a table")
    sizes, paths = 0, 0
    for chunk in column.chunks:  # whose ends are no part of the data
        struct = pyarrow.types.is_struct(chunk.type)
        parts = dict(zip([field.name for field in chunk.type], chunk.flatten())) if struct else {"bytes": chunk}
        found = compute.binary_length(parts["bytes"]).fill_null(-1).to_numpy(zero_copy_only=False)
        sizes = zlib.crc32(found.astype(np.int64).tobytes(), sizes)
        if "path" in parts and pyarrow.types.is_string(parts["path"].type):
            paths = zlib.crc32("".join(f"{path}\0" for path in parts["path"].to_pylist()).encode(), paths)
    return zlib.crc32(paths.to_bytes(4, "little"), sizes)


def open_table(wanted: DataPath, option: str) -> TableImages:
    """Open a table of images; raises UserError, naming `option`, where it has no rows or no images, or labels that cannot be."""
    dataset, where = load_table(wanted, option), f"{option} {printable(wanted.text)}"
    if not len(dataset):
        raise UserError(f"{where} has no rows: give a table with an image in every row.")
    return TableImages(wanted, option, dataset, Columns(dataset, wanted, where))
