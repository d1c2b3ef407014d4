"""Names on the Hugging Face hub where a path may stand: `hf:owner/name[/folder][@revision]`, `hf:datasets/...` for a data set.

What is downloaded lies in the hub's own cache (HF_HOME) and is not downloaded again; with HF_HUB_OFFLINE=1 that cache alone is
read.  A private repository needs `hf auth login` or HF_TOKEN.  Whatever fails is one sentence.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.constructors import PrimitiveConstructorSpec

from utils.config import UserError
from utils.files import check_exists
from utils.untrusted import printable, shortened

PREFIX = "hf:"
_FORM = f"{PREFIX}owner/name[/folder][@revision]"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class HubName:
    """A repository of the hub, and a place in it."""

    text: str
    repository: str
    folder: str = ""
    revision: str | None = None
    kind: str = "model"

    @classmethod
    def of(cls, text: str, option: str) -> "HubName":
        """Read `hf:...`; raises UserError, naming `option`, for anything else."""
        place, at, revision = text.removeprefix(PREFIX).partition("@")
        parts = place.split("/")
        kind = "dataset" if parts[0] == "datasets" else "model"
        owner_and_name, folders = (parts[1:3], parts[3:]) if kind == "dataset" else (parts[:2], parts[2:])
        sound = len(owner_and_name) == 2 and all(_NAME.fullmatch(part) and "--" not in part and ".." not in part
                                                 and part[-1] not in ".-" for part in owner_and_name)
        if not sound or bool(at) != bool(revision) or any(part in ("", ".", "..") for part in folders):
            raise UserError(f"{option} {printable(text)} is no name on the hub: give {_FORM}.")
        return cls(text, "/".join(owner_and_name), "/".join(folders), revision or None, kind)


def is_hub_name(path: str | Path) -> bool:
    """Whether this stands for a repository of the hub rather than a path."""
    return str(path).startswith(PREFIX)


def inside(path: str | Path, folder: str) -> str:
    """A folder inside a folder or a repository of the hub, by its path or name."""
    if not is_hub_name(path):
        return str(Path(path) / folder)
    place, at, revision = str(path).partition("@")
    return f"{place}/{folder}{at}{revision}"


def local_file(path: str | Path, option: str, name: str) -> Path:
    """Where the file lies that `path` names: itself, or after a download the file `name` of a repository, unless it names one.

    name: "" where there is no usual one.  Raises UserError, naming `option`, where the hub does not give it.
    """
    if not is_hub_name(path):
        return Path(path)
    found = HubName.of(str(path), option)
    wanted = found.folder if found.folder.endswith(Path(name).suffix) else f"{found.folder}/{name}".lstrip("/")
    if not wanted:
        raise UserError(f"{option} {printable(path)} names no file: give {PREFIX}owner/name/FILE[@revision].")
    from huggingface_hub import hf_hub_download  # takes a moment, and paths do not need it

    with _explained(found, option, wanted):
        return Path(hf_hub_download(found.repository, wanted, revision=found.revision, repo_type=found.kind))


def local_path(path: str | Path, option: str) -> Path:
    """Where the folder or file lies that `path` names: itself, or after a download that of a repository, with all that is in it.

    Raises UserError, naming `option`, where the hub does not give it.
    """
    if not is_hub_name(path):
        return Path(path)
    found = HubName.of(str(path), option)
    from huggingface_hub import snapshot_download

    with _explained(found, option, found.folder):
        patterns = [found.folder, f"{found.folder}/**"] if found.folder else None
        folder = Path(snapshot_download(found.repository, revision=found.revision, repo_type=found.kind, allow_patterns=patterns))
    if not (folder / found.folder).exists():
        raise UserError(f"{option} {printable(path)} is there, but no {printable(found.folder)} in it: correct the name.")
    return folder / found.folder


def published_file(path: str | Path, option: str, what: str) -> Path:
    """A file of weights in its maker's own format, by its path or as `hf:owner/name/FILE`.

    Raises UserError, naming `option` and `what` it should be, where it does not exist.
    """
    return check_exists(local_file(path, option, ""), option, what)


def hub_path(option: str) -> PrimitiveConstructorSpec[Any]:
    """Metadata of an `Annotated` path: it may be a repository of the hub, which is downloaded when options are read."""
    return PrimitiveConstructorSpec(nargs=1, metavar="PATH", instance_from_str=lambda words: local_path(words[0], option),
                                    is_instance=lambda value: isinstance(value, Path),
                                    str_from_instance=lambda value: [str(value)])


@contextmanager
def _explained(found: HubName, option: str, wanted: str) -> Iterator[None]:
    """Turn what the hub's library raises into one sentence."""
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # it would tell every try of several before the sentence
    what = f"{option} {printable(found.text)}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise UserError(f"{what} is only for those who accepted its conditions: accept them on its page, then `hf auth "
                        "login`.") from error
    except errors.RepositoryNotFoundError as error:
        raise _hidden(what) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{what} has no revision {printable(found.revision)}: give a branch, a tag or a commit of it.") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        cause = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        raise UserError(f"{what} is not in the hub's cache and cannot be downloaded ({cause}): download it where there is a "
                        "connection, or give a path.") from error
    except errors.EntryNotFoundError as error:
        raise UserError(f"{what} has no file {printable(wanted)}: give a repository that scripts/push_to_hub.py filled, or "
                        f"{_FORM}.") from error
    except Exception as error:  # of the network, of a full disk: the library's versions raise those of several others
        if getattr(getattr(error, "response", None), "status_code", 0) in (401, 403):
            raise _hidden(what) from error
        raise UserError(f"{what} cannot be downloaded ({shortened(error)}): try again, or give a path.") from error


def _hidden(what: str) -> UserError:
    """The hub says no more to strangers."""
    return UserError(f"{what} is not on the hub, or private: correct the name, or log in with `hf auth login` as someone who may "
                     "read it.")
