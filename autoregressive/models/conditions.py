"""Conditions: what a GPT is asked for, and how it stands in front of the codes.

    class   a label; one learned vector (LlamaGen, IAR2)
    text    a caption; the features of a frozen text encoder, projected (LlamaGen's text-conditional models)

A condition takes the first P trunk positions, and the last of them predicts the first cell.  It is one tensor of labels [B], or
a caption: features [B, P, E] and a mask [B, P] of the visible positions, padded on the left, so that its last word is the last
position.  `GPT` looks its condition up in `CONDITIONS` once; trainers, decoding and guidance hand it on without looking into it.

LlamaGen's conventions for captions, which imported files carry, and what is different here:

- The unconditional caption is a buffer drawn once and never trained.  It takes the place of the whole caption, under the
  caption's own mask, in dropped samples of the training and in unconditional rows of guidance.
- Padded positions are hidden from all others, and every position sees itself.
- LlamaGen's rotary rows of a caption are zero, as that of the class token is: queries and keys vanish, every score with a caption
  is 0, and attention to its words is uniform (`caption_rotary="zero"`).  Here captions are not rotated (`"identity"`): words keep
  their scores.  Neither says where a word stands; the encoder's features do.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoregressive.models.transformer import GPTConfig

# Labels [B], or a caption's features [B, P, E] and mask [B, P].
Given = Tensor | tuple[Tensor, Tensor]


def each(function: Callable[..., Tensor], *given: Given) -> Any:
    """Apply a function to the tensors of one condition, or to the matching tensors of several of one kind: as they are given."""
    if isinstance(given[0], Tensor):
        return function(*given)
    return tuple(function(*parts) for parts in zip(*given, strict=True))


def count(given: Given) -> int:
    """Samples B of a condition."""
    return len(given if isinstance(given, Tensor) else given[0])


class Condition(nn.Module):
    """The interface, and the parts that all conditions have; P is the number of trunk positions."""

    positions: int          # P
    dropout: float          # probability of training a sample unconditionally
    hides: bool = False     # whether some positions may be hidden
    cosine: float = 0.0     # of every position's rotary row, whose sine is 0

    def check(self, given: Given) -> None:
        """Raise ValueError for what is no condition of this GPT.  Waits for tensors that are on a GPU."""
        raise NotImplementedError

    def blank(self, batch: int) -> Given:
        """A condition of the right shapes that means nothing, on the CPU."""
        raise NotImplementedError

    def tokens(self, given: Given) -> Tensor:
        """The first trunk inputs [B, P, D]."""
        raise NotImplementedError

    def visible(self, given: Given) -> Tensor | None:
        """The positions that others may attend to, bool [B, P]; None: all."""
        return None

    def unconditional(self, given: Given) -> Given:
        """What guidance compares these samples with, of the same shapes."""
        raise NotImplementedError

    def fit(self, given: Given) -> Given:
        """The same condition at its full number of positions."""
        return given

    def drop(self, given: Given) -> Given:
        """While training, replace samples by the unconditional ones with the probability `dropout`."""
        if not self.training or self.dropout == 0:
            return given
        device = (given if isinstance(given, Tensor) else given[0]).device
        dropped = torch.rand(count(given), device=device) < self.dropout           # [B]
        return each(lambda null, kept: torch.where(dropped.view(-1, *[1] * (kept.ndim - 1)), null, kept),
                    self.unconditional(given), given)

    def rotary(self, rows: Tensor) -> Tensor:
        """Rotary rows of the condition [P, E/2, 2], like those of the cells [..., E/2, 2]."""
        own = rows.new_zeros(self.positions, *rows.shape[1:])
        own[..., 0] = self.cosine
        return own


class ClassCondition(nn.Embedding, Condition):
    """A class id in [0, num_classes); the last row of the table is the null class."""

    positions = 1

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config.num_classes + 1, config.dim)
        self.dropout = config.class_dropout

    @property
    def null_class(self) -> int:
        """The label of the unconditional model."""
        return self.num_embeddings - 1

    def check(self, given: Given) -> None:
        """Raise ValueError unless these are class ids [B] that the GPT knows."""
        if not isinstance(given, Tensor):
            raise ValueError("labels are captions but the GPT is conditioned on classes: give class ids.")
        if len(given) and not 0 <= int(given.min()) <= int(given.max()) < self.null_class:
            raise ValueError(f"labels go from {int(given.min())} to {int(given.max())} but the GPT knows classes 0 to "
                             f"{self.null_class - 1}.")

    def blank(self, batch: int) -> Given:
        """Labels [B] of the first class."""
        return torch.zeros(batch, dtype=torch.long)

    def tokens(self, given: Given) -> Tensor:
        """Labels [B] -> class tokens [B, 1, D]."""
        assert isinstance(given, Tensor)
        return self(given)[:, None]

    def unconditional(self, given: Given) -> Given:
        """The null class for labels [B]."""
        assert isinstance(given, Tensor)
        return torch.full_like(given, self.null_class)


class CaptionCondition(Condition):
    """Features [B, P', E] and mask [B, P'] of captions, P' <= P: shorter ones are as good as padded ones."""

    hides = True
    null_caption: Tensor  # [P, E] features of the unconditional caption

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.positions, self.width, self.dropout = config.caption_length, config.caption_dim, config.class_dropout
        self.cosine = {"identity": 1.0, "zero": 0.0}[config.caption_rotary]
        self.projection = nn.Sequential(nn.Linear(self.width, config.dim, bias=False), nn.GELU(approximate="tanh"),
                                        nn.Linear(config.dim, config.dim, bias=False))
        self.register_buffer("null_caption", torch.randn(self.positions, self.width) * self.width**-0.5)

    def parts(self, given: Given) -> tuple[Tensor, Tensor]:
        """Features and mask; raises ValueError where their shapes fit no caption of this GPT."""
        if isinstance(given, Tensor):
            raise ValueError("features are missing, the GPT is conditioned on text: give (features, mask) instead of labels.")
        features, mask = given
        if features.ndim != 3 or features.shape[2] != self.width or not 0 < features.shape[1] <= self.positions:
            raise ValueError(f"features have the shape {tuple(features.shape)} but the GPT reads captions of at most "
                             f"{self.positions} tokens of width {self.width}: give those of the encoder of its training.")
        if mask.shape != features.shape[:2] or mask.dtype != torch.bool:
            raise ValueError(f"mask is {mask.dtype} of the shape {tuple(mask.shape)}, not bool of the shape "
                             f"{tuple(features.shape[:2])}, that of its features.")
        return features, mask

    def check(self, given: Given) -> None:
        """Raise ValueError unless these are captions that end at the last position."""
        _, mask = self.parts(given)
        if not mask[:, -1].all():
            raise ValueError(f"mask hides the last position of {int((~mask[:, -1]).sum())} captions, which predicts the first "
                             "cell: pad captions on the left.")

    def blank(self, batch: int) -> Given:
        """Features of zeros [B, P, E], all visible."""
        return torch.zeros(batch, self.positions, self.width), torch.ones(batch, self.positions, dtype=torch.bool)

    def tokens(self, given: Given) -> Tensor:
        """Features [B, P', E] -> caption tokens [B, P', D], in the precision of the weights."""
        features, _ = self.parts(given)
        return self.projection(features.to(next(self.projection.parameters()).dtype))

    def visible(self, given: Given) -> Tensor | None:
        """The mask [B, P']."""
        return self.parts(given)[1]

    def unconditional(self, given: Given) -> Given:
        """The null caption's last P' positions under the captions' own mask."""
        features, mask = self.parts(given)
        return self.null_caption[self.positions - features.shape[1] :].type_as(features).expand_as(features), mask

    def fit(self, given: Given) -> Given:
        """Captions padded on the left to P positions."""
        features, mask = self.parts(given)
        missing = self.positions - features.shape[1]
        return F.pad(features, (0, 0, missing, 0)), F.pad(mask, (missing, 0))


class Row(NamedTuple):
    """How a condition is built, and the fields of GPTConfig that it reads and others do not."""

    build: Callable[[GPTConfig], Condition]
    own: tuple[str, ...]
    describe: Callable[[GPTConfig], str]


CONDITIONS: dict[str, Row] = {
    "class": Row(ClassCondition, ("num_classes",), lambda config: f"{config.num_classes} classes"),
    "text": Row(CaptionCondition, ("caption_rotary",),
                lambda config: f"captions of {config.caption_length} tokens of width {config.caption_dim}"),
}
