"""Writing a code folder (`code_shards.py`) from any number of processes on any number of nodes."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from utils.code_shards import CodeHeader, open_codes, require_largest
from utils.distributed import Processes
from utils.shard_writer import ShardWriter

_OPTION = "--code-path"


class CodeWriter(ShardWriter[CodeHeader]):
    """Creates or continues a code folder; all processes of a group open their writers together."""

    def __init__(self, folder: Path, header: CodeHeader, labels: np.ndarray, processes: Processes) -> None:
        """labels: [images].  Raises UserError when the folder holds codes made with other options or of other labels."""
        row_bytes = int(np.prod(header.shape[1:])) * header.dtype.itemsize
        super().__init__(folder, header, header.shape, row_bytes, ("labels", labels.astype(np.int64)), processes, _OPTION)

    def write(self, rows: np.ndarray, codes: np.ndarray) -> None:
        """Store codes [n, crops, C, N] of the given rows [n].

        Raises ValueError for another shape or codes beyond their codebook, UserError when the disk is full.
        """
        if codes.shape != (len(rows), *self.header.shape[1:]):
            raise ValueError(f"codes are {codes.shape}, not {(len(rows), *self.header.shape[1:])}")
        sizes = self.header.codebook_sizes
        if len(rows) and (codes.min() < 0 or (codes.max((0, 1, 3)) >= sizes).any()):
            raise ValueError(f"codes from {codes.min()} to {codes.max((0, 1, 3))} are not of codebooks of {sizes} codes")
        self._shares.write(rows, codes.astype(self.header.dtype))

    def require_sound(self) -> None:
        """Raise UserError where a complete folder is damaged."""
        open_codes(self.folder, _OPTION)

    def completed(self) -> CodeHeader:
        """The header with the largest code of each stream; raises UserError when one is beyond its codebook."""
        largest = self.largest((0, 1, 3))
        require_largest(self.header, largest, self._target)
        return replace(self.header, complete=True, largest_codes=largest.tolist())
