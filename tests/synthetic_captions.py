"""Captions without an encoder, words by the class of a code folder: with samples that are not valid, and without such flags.

Run as a script it is `train_c2i.py` with the latter as the data of `--condition text`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started by its path

import torch

from autoregressive.train import train_c2i
from autoregressive.train.sources import SOURCES, Source, Told
from utils.code_shards import CodeDataset
from utils.config import run_main

LENGTH, WIDTH, ENCODER = 5, 12, "synthetic"


class Captions(CodeDataset):
    """Codes with captions of one to three words, padded on the left to five."""

    def __getitems__(self, items):
        codes, labels = super().__getitems__(items)
        words = torch.randn(3, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0))
        mask = torch.arange(LENGTH) >= LENGTH - 1 - labels[:, None]
        return codes, (words[labels] * mask[..., None], mask)


class SomeValid(Captions):
    """The same where every seventh sample is not valid."""

    def __getitems__(self, items):
        return *super().__getitems__(items), torch.tensor([index % 7 != 3 for _, index in items])


def tell(folders, option, captions):
    """The shape of these captions."""
    return Told({"caption_length": LENGTH, "caption_dim": WIDTH}, ENCODER)


TEXT = Source(Captions, tell)

if __name__ == "__main__":
    SOURCES["text"] = TEXT
    run_main(train_c2i.main)
