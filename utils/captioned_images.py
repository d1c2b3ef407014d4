"""Images with captions in a folder with captions.jsonl: LlamaGen's lines of `image_path` and `text`."""

import os
from pathlib import Path

import numpy as np

from utils.config import UserError
from utils.image_source import FolderImages
from utils.texts import Texts, json_lines, string_in
from utils.untrusted import printable

LIST = "captions.jsonl"


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
