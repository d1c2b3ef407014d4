"""Weights of a published network: a local file or the usual download, read without unpickling objects."""

import hashlib
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlparse

import torch
from torch import Tensor

from utils.config import UserError
from utils.hub import published_file
from utils.untrusted import shortened


@dataclass(frozen=True)
class Weights:
    """Where a network's weights come from, and what messages call them."""

    option: str
    """Of the command line, for a local file."""
    url: str
    what: str
    """What the file at the url is."""
    contents: str
    """Which network it holds."""
    digest: str = ""
    """First digits of its SHA-256, where they are known."""

    def file(self, path: Path | None) -> Path:
        """`path`, or the file in torch's cache, downloaded if missing; raises UserError where there is no file."""
        if path is not None:
            found = published_file(path, self.option, f"{self.what} (.pth)")
            if found.is_dir():
                raise UserError(f"{self.option} {path} is a folder: give the path of the weights file (.pth) in it.")
            return found
        cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(self.url).path).name
        if not cached.exists():
            try:
                cached.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(self.url, str(cached), hash_prefix=self.digest or None)
            except (OSError, RuntimeError, HTTPException) as error:
                raise UserError(f"{self.what} could not be downloaded ({shortened(error)}): fetch {self.url} on a machine with a "
                                f"connection and name the file with {self.option}.") from error
        return cached

    def read(self, path: Path) -> tuple[dict[str, Tensor], str]:
        """The tensors in a file and the file's SHA-256; raises UserError where it holds no tensors by name."""
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises half a dozen types for files it cannot read
            raise UserError(f"{self.option} {path} is not a readable torch file ({type(error).__name__}): "
                            f"{self._remedy}") from error
        if not isinstance(tensors, dict) or not all(isinstance(each, Tensor) for each in tensors.values()):
            raise self.misfit(path)
        with path.open("rb") as file:
            return tensors, hashlib.file_digest(file, "sha256").hexdigest()

    def misfit(self, path: Path) -> UserError:
        """The error for a file of another network."""
        return UserError(f"{self.option} {path} does not hold {self.contents} (other keys or shapes): {self._remedy}")

    @property
    def _remedy(self) -> str:
        return f"give the file {Path(urlparse(self.url).path).name} or leave the option out to download it."
