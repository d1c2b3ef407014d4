"""Tables of images on disk, opened by the package `datasets`: parquet files, and folders that its `save_to_disk` wrote.

A split is told by names, as the hub does: `data/train-00000-of-00003.parquet`, `test.parquet`, `default/train/0000.parquet`;
what has no such name is of the split train.  Rows of parquet cannot be read one by one: `datasets` copies them once into Arrow
files below HF_DATASETS_CACHE (~/.cache/huggingface/datasets), which are mapped and shared by all processes.  One process writes
them, the others wait; another time of a parquet file makes another copy.
"""

import glob
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils.config import NO_SPACE, UserError
from utils.data_path import SEPARATOR, DataPath
from utils.files import read_json
from utils.image_source import EXTENSIONS
from utils.packages import require_package
from utils.untrusted import printable, shortened

log = logging.getLogger("images")

SUFFIXES = (".parquet", ".arrow")
_SHARD = re.compile(r"(.+)-\d{3,}-of-\d{3,}(-[0-9a-f]+)?")  # the hub's names of a split's files
_SPLITS = {"train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
           "dev": "validation", "test": "test", "testing": "test", "eval": "test", "evaluation": "test"}
_DEPTH = 2  # folders between a data set and its parquet files


def is_table(path: Path) -> bool:
    """Whether a path is a table: a file by its name, a folder by what `save_to_disk` or the hub puts into it.

    A folder below it that holds images makes none; ImageNet's thousand are looked into, but not read.
    """
    if not path.is_dir():
        return path.suffix in SUFFIXES
    return _is_saved(path) or (path / "dataset_dict.json").is_file() or _holds_parquet(path, _DEPTH)


def _is_saved(path: Path) -> bool:
    return (path / "state.json").is_file() and (path / "dataset_info.json").is_file()


def _holds_parquet(folder: Path, depth: int) -> bool:
    """Whether parquet files are in a folder, or, without images beside them, in one below it."""
    folders, found = [], False
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    if depth < _DEPTH and entry.name.lower().endswith(EXTENSIONS):
                        return False
                    found = found or entry.name.endswith(".parquet")
                    if os.path.isdir(entry.path):
                        folders.append(entry.path)
    except OSError:  # not a folder that can be read: the reader of images says so
        return False
    return found or (depth > 0 and any(_holds_parquet(Path(each), depth - 1) for each in folders))


def load_table(wanted: DataPath, option: str) -> Any:
    """The rows of one split as a memory-mapped `datasets.Dataset`.

    Raises UserError, naming `option`, where the package is missing, the files are damaged, or several splits or none fit.
    """
    where = f"{option} {printable(wanted.text)}"
    datasets = require_package("datasets", f"{where}, a table,")
    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    files = _files(wanted, option)
    try:
        if files[0].suffix == ".parquet":
            log.info("%s: rows are read from Arrow files below %s, which are made now where they are not there yet", where,
                     datasets.config.HF_DATASETS_CACHE)
            return datasets.Dataset.from_parquet([glob.escape(str(file.absolute())) for file in files])
        if _is_saved(files[0].parent):
            return datasets.load_from_disk(str(files[0].parent), keep_in_memory=False)
        return datasets.Dataset.from_file(str(files[0]))
    except Exception as error:  # of a damaged file, of another layout: whatever the library raises
        raise _explained(error, where, files, datasets.config.HF_DATASETS_CACHE) from error


def _files(wanted: DataPath, option: str) -> list[Path]:
    """The files of the rows: parquet files, an Arrow file, or those of a saved data set."""
    path = wanted.path
    if not path.is_dir():
        wanted.require_no_split(option, "a single file")
        return [path]
    saved = _is_saved(path) or (path / "dataset_dict.json").is_file()
    return _saved_files(_saved_split(wanted, option), option) if saved else _parquet_split(wanted, option)


def _explained(error: Exception, where: str, files: list[Path], cache: object) -> UserError:
    """What came of opening a table, by the first cause in a chain of errors."""
    cause: BaseException = error
    while cause.__cause__ or cause.__context__:
        cause = cause.__cause__ or cause.__context__ or cause
        if isinstance(cause, OSError) and cause.errno in NO_SPACE:
            break
    if isinstance(cause, OSError) and (cause.errno in NO_SPACE or isinstance(cause, PermissionError)):
        return UserError(f"{where} cannot be copied into Arrow files below {cache} ({cause.strerror}): make space there, or name "
                         "another folder by the variable HF_DATASETS_CACHE.")
    which = printable(files[0]) if len(files) == 1 else f"{len(files)} files, the first of them {printable(files[0])},"
    copied = f", or delete its copy below {cache}" if files[0].suffix == ".parquet" else ""
    return UserError(f"{where}: the table of {which} cannot be read ({shortened(cause)}): make or copy it again{copied}.")


# --- splits ----------------------------------------------------------------------------------------------------------


def split_of(file: Path) -> str:
    """The split that the name of a parquet file, relative to its data set, tells; "train" where it tells none."""
    if shard := _SHARD.fullmatch(file.stem):
        return shard[1]
    for part in reversed((*file.parts[:-1], file.stem)):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in _SPLITS:
                return _SPLITS[word]
    return "train"


def _choose_split(splits: dict[str, Any], wanted: DataPath, option: str) -> Any:
    """The chosen one of the splits, or the only one; raises UserError naming all of them."""
    names = printable(", ".join(sorted(splits)))
    if wanted.split:
        if wanted.split not in splits:
            raise UserError(f"{option} {printable(wanted.text)} has no split {printable(wanted.split)!r}: give one of {names}.")
        return splits[wanted.split]
    if len(splits) > 1:
        example = printable(f"{wanted.path}{SEPARATOR}{min(splits)}")
        raise UserError(f"{option} {printable(wanted.text)} has {len(splits)} splits, {names}: name one behind the path, such as "
                        f"{example}.")
    return next(iter(splits.values()))


def _parquet_split(wanted: DataPath, option: str) -> list[Path]:
    """The parquet files of one split by their names; raises UserError where they lie in several folders."""
    splits = dict[str, list[Path]]()
    for file in sorted(_parquet_below(wanted.path, _DEPTH)):
        splits.setdefault(split_of(file.relative_to(wanted.path)), []).append(file)
    if not splits:
        raise UserError(f"{option} {printable(wanted.text)} has no parquet file that can be read: copy the whole folder.")
    files = _choose_split(splits, wanted, option)
    if len(folders := sorted({str(file.parent) for file in files})) > 1:
        raise UserError(f"{option} {printable(wanted.text)} has files of one split in {len(folders)} "
                        f"folders, {printable(folders[0])} and {printable(folders[1])}: give one of them.")
    return files


def _parquet_below(folder: Path, depth: int) -> Iterator[Path]:
    for entry in os.scandir(folder):
        if not entry.name.startswith("."):
            if entry.name.endswith(".parquet") and os.path.isfile(entry.path):
                yield folder / entry.name
            elif depth and os.path.isdir(entry.path):
                yield from _parquet_below(folder / entry.name, depth - 1)


def _saved_split(wanted: DataPath, option: str) -> Path:
    """The folder of one split of what `save_to_disk` wrote: the folder itself, or one below that of a DatasetDict."""
    if _is_saved(wanted.path):
        wanted.require_no_split(option, "a saved data set")
        return wanted.path
    found = read_json(wanted.path / "dataset_dict.json", option, "the data set")
    names = found.get("splits") if isinstance(found, dict) else None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name == os.path.basename(name) and
                                                           name not in ("", os.curdir, os.pardir) for name in names):
        raise UserError(f"{option} {printable(wanted.path / 'dataset_dict.json')} names no splits but "
                        f"{printable(json.dumps(found))[:80]}: save the data set again.")
    return _choose_split({name: wanted.path / name for name in names}, wanted, option)


def _saved_files(folder: Path, option: str) -> list[Path]:
    """The Arrow files of a saved data set; raises UserError where its state names others than those beside it."""
    read_json(folder / "dataset_info.json", option, "the data set")  # for its own name in the message
    state = read_json(folder / "state.json", option, "the data set")
    listed = state.get("_data_files") if isinstance(state, dict) else None
    names = [each.get("filename") if isinstance(each, dict) else None for each in listed] if isinstance(listed, list) else []
    if not names:
        raise UserError(f"{option} {printable(folder / 'state.json')} names no Arrow files: save the data set again.")
    files = [folder / name for name in names if isinstance(name, str) and name == os.path.basename(name)]
    if len(files) < len(names) or not all(file.is_file() for file in files):
        raise UserError(f"{option} {printable(folder / 'state.json')} names {printable(json.dumps(names))[:80]}, which are not "
                        "all files beside it: copy the whole folder, or save the data set again.")
    return files
