"""Files: checked before work starts, written whole or not at all."""

import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from utils.config import NO_SPACE, UserError, file_error, when_refused
from utils.untrusted import parse_json, shortened

PROBE = ".write-test-"  # what the names of files begin with that are made to see whether files can be made


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, renamed to `path` when the block ends: a reader never finds half a file."""
    aside = path.with_name(f".{path.name}.{own_name()}.tmp")
    try:
        with naming(path):
            yield aside
            os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Within the block an error that does not say which file cannot be written, as that of a full disk, names `path`."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = file_error(error)
        if cause is None or cause.filename:
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from error


def own_name() -> str:
    """A name that no other process has, also of another node or container, which may have the same process id."""
    return f"{socket.gethostname()}-{os.environ.get('RANK', '0')}-{os.getpid()}"


def lock_folder(folder: Path, option: str, what: str) -> IO[str]:
    """Claim `folder` until the process ends or the returned file is closed; raises UserError when another one holds it.

    A file system without locks is not guarded.
    """
    try:  # not through a link, whose target would be emptied
        file = os.fdopen(os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+", errors="replace")
    except OSError as error:
        if error.errno in NO_SPACE:
            raise
        raise UserError(f"{option} {folder / '.lock'} cannot be opened ({error.strerror}): remove it.") from error
    holder = file.read().strip()
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if holder != own_name():
            raise UserError(f"{option} {folder} is in use by another {what} ({holder or 'unknown'}: host-rank-process): wait "
                            "for its end, or choose another folder.") from None
    except OSError:
        return file
    with naming(folder / ".lock"):
        file.seek(0)
        file.truncate(0)
        file.write(own_name())
        file.flush()
    return file


def unlinked(path: Path) -> Path:
    """`path`, to be appended to; a link in its place is removed, so that nothing is written elsewhere."""
    if path.is_symlink():
        path.unlink()
    return path


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, in one piece."""
    with replacing(path) as aside:
        aside.write_text(text, "utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write `content` as JSON in one piece."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def read_json(path: str | Path, option: str, what: str) -> Any:
    """The content of a JSON file; raises UserError naming `option` and `what` it should be when it is missing or damaged."""
    try:
        return parse_json(check_exists(path, option, what).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{option} {path} is no JSON ({shortened(error)}): make {what} again.") from error


def require_same(found: dict[str, Any], wanted: dict[str, Any], what: str, remedy: str | Callable[[str], str]) -> None:
    """Raise UserError naming the first key in which what was found on disk differs from what is wanted, with both values.

    remedy: what to do, or a function of the key that says so.
    """
    absent = object()
    for key in [*wanted, *found]:
        if found.get(key, absent) != wanted.get(key, absent):
            advice = remedy if isinstance(remedy, str) else remedy(key)
            raise UserError(f"{what} {key} {found.get(key)}, not with {wanted.get(key)} as now: {advice}.")


def check_writable(folder: Path, option: str) -> Path:
    """Create `folder` and check that a file can be written there; raises UserError naming `option` otherwise.

    Where the command is refused after all, the folders that it has made and left empty are removed.
    """
    try:
        if made := [each for each in (folder, *folder.parents) if not each.exists()]:
            when_refused(lambda: _remove_empty(made))
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f"{PROBE}{own_name()}"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        remedy = "make space" if error.errno in NO_SPACE else "give a folder you may write to"
        raise UserError(f"{option} {folder} cannot be written ({error.strerror}): {remedy}.") from error
    return folder


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders, the innermost first, as far as they are empty."""
    for each in folders:
        with suppress(OSError):
            each.rmdir()


def check_file_to_write(path: Path, option: str) -> Path:
    """Return `path` if a file can be written there, creating its folder; raises UserError naming `option` otherwise."""
    if path.is_dir():
        raise UserError(f"{option} {path} is a folder: give the name of a file.")
    check_writable(path.absolute().parent, f"the folder of {option},")
    return path


def check_exists(path: str | Path, option: str, what: str) -> Path:
    """Return `path` if it exists; raises UserError naming `option` and `what` it should be otherwise."""
    if not str(path) or not Path(path).exists():
        raise UserError(f"{option} {str(path)!r} does not exist: give the path of {what}.")
    if not (Path(path).is_file() or Path(path).is_dir()):  # a pipe or a device would be read without end
        raise UserError(f"{option} {str(path)!r} is neither a file nor a folder: give the path of {what}.")
    return Path(path)
