"""Packages that only some commands need: imported when they are, and asked for in one sentence where they are missing."""

import importlib
from typing import Any

from utils.config import UserError
from utils.untrusted import shortened


def require_package(name: str, purpose: str) -> Any:
    """Import a package when it is needed; raises UserError with pip's command where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{purpose} needs the package {name}, which cannot be imported ({shortened(error)}): install it with "
                        f"`pip install {name}`.") from error
