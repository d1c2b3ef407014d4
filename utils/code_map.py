"""Code maps: tables that turn the codes of one tokenizer into the codes that a GPT is trained on.

A code map is a table [K, C'] that replaces every code of a single codebook by C' codes: IAR's rearrangement is a
permutation [K, 1], CTF's coarse labels are [K, 1], and CTF's fine stage reads (coarse, fine) pairs [K, 2].  Trainers
apply the table while reading code shards; they do not know which method made it.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from utils.checkpoint import export, read_export
from utils.code_shards import CodeHeader
from utils.config import UserError
from utils.untrusted import read_fields


@dataclass
class CodeMap:
    """A table of codes, and the tokenizers whose codes it reads and gives."""

    table: np.ndarray               # [K, C'] int64
    codebook_sizes: tuple[int, ...]  # of the C' streams it gives
    source: str                     # fingerprint of the tokenizer whose codes it reads
    target: str                     # fingerprint of the tokenizer that decodes its codes, or of the coarse labels
    coarse: str = ""                # fine stage: `target` of the map that gives its first stream

    def apply(self, codes: np.ndarray) -> np.ndarray:
        """Codes [..., 1, N] -> [..., C', N]."""
        return np.moveaxis(self.table[codes[..., 0, :]], -1, -2)

    def header(self, header: CodeHeader, option: str) -> CodeHeader:
        """The header of mapped codes; raises UserError when the codes are not those that the map reads."""
        if list(header.codebook_sizes) != [len(self.table)]:
            raise UserError(f"{option} maps one codebook of {len(self.table)} codes but the codes are of codebooks "
                            f"{header.codebook_sizes}: give the map that was made from their tokenizer.")
        if self.source != header.tokenizer:
            raise UserError(f"{option} maps codes of tokenizer {self.source} but the codes were made by tokenizer "
                            f"{header.tokenizer}: give the map that was made from it.")
        return replace(header, tokenizer=self.target, codebook_sizes=list(self.codebook_sizes))

    def save(self, path: Path) -> None:
        """Write the map as a safetensors file."""
        export(path, "code_map", {"table": torch.from_numpy(self.table)},
               {"codebook_sizes": list(self.codebook_sizes), "source": self.source, "target": self.target,
                "coarse": self.coarse})


@dataclass
class _Description:
    """What the file of a map says beside its table."""

    codebook_sizes: tuple[int, ...]
    source: str
    target: str
    coarse: str = ""


def load_code_map(path: str | Path, option: str = "--code-map") -> CodeMap:
    """Read a code map; raises UserError naming `option` when the file is no code map or gives codes outside of its codebooks."""
    config, tensors = read_export(path, "code_map", option)
    fields = read_fields(_Description, config, where := f"{option} {path}")
    sizes, table = fields["codebook_sizes"], tensors.get("table", torch.empty(0))
    if set(tensors) != {"table"} or table.dtype != torch.int64 or table.ndim != 2 or table.shape[1] != len(sizes) or not sizes:
        raise UserError(f"{where} has no table of {len(sizes)} int64 columns: make it again with rearrange.py.")
    for column, size in enumerate(sizes):
        low, high = (int(each) for each in table[:, column].aminmax()) if len(table) else (0, -1)
        if not 0 <= low <= high < size:
            raise UserError(f"{where} gives codes from {low} to {high} but its codebook has {size}: make it again with "
                            "rearrange.py.")
    return CodeMap(table.numpy(), **fields)
