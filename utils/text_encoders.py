"""Text encoders: captions -> features and a mask, left-padded as LlamaGen has them.

`t5` is the encoder of a T5 model by `transformers`, which published text-conditional weights were trained with (flan-t5-xl, 120
tokens of width 2048).  `hashed` needs no download: every word is the mean of fixed random vectors of its character n-grams
(Bojanowski et al. 2017, without training), so that a misspelt word stays near the right one.  Features are rounded to bf16
everywhere: what a model is trained on from disk and what it sees while sampling are the same numbers.
"""

import json
import logging
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Annotated, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from utils.captions import CLEANING
from utils.checkpoint import fingerprint
from utils.config import Count, UserError, choices, flag, interval
from utils.packages import require_package
from utils.untrusted import parse_json, printable, read_fields, shortened

log = logging.getLogger("text")

Caption = tuple[Tensor, Tensor]  # features float32 [B, T, E], zero where padded; mask bool [B, T], True where a token is

PUBLISHED_T5 = "google/flan-t5-xl"
HASHED_WIDTH = 256
_BUCKETS, _GRAMS = 1 << 14, (3, 4, 5)  # of the hashed vectors: how many there are, and characters of the n-grams
_POSITION = 0.3                        # size of a word's place beside its vector, whose size is 1


class TextEncoder(Protocol):
    """What an encoder is: width of its features, most tokens it is given, a hash of all that decides them, and two functions."""

    width: int
    length: int
    fingerprint: str

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """How many tokens each text has before it is cut to `length`, its end token included."""

    def encode(self, texts: Sequence[str]) -> Caption:
        """Features and mask, padded on the left to the longest text, which is cut to `length` tokens."""


def quiet_transformers(purpose: str) -> Any:
    """The package transformers, which then reports errors alone: it warns of weights that are left out on purpose."""
    transformers = require_package("transformers", purpose)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def load_pretrained(kind: Any, path: str, option: str, what: str, **arguments: Any) -> Any:
    """Part of a `transformers` model from a local folder or the hub; raises UserError naming `option` and `what` it should be."""
    try:
        return kind.from_pretrained(path, **arguments)
    except Exception as error:  # of a damaged folder, of the network, of a missing package: whatever the library raises
        reason = shortened(str(error).split(". ")[0])
        raise UserError(f"{option} {printable(path)} cannot be loaded ({reason}): give a local folder with {what}, or its name "
                        "on the hub where that can be reached.") from error


class T5TextEncoder:
    """The encoder of a T5 model with its tokenizer; right-padded inside, as T5 was trained, and left-padded outside."""

    def __init__(self, path: str, length: int, device: torch.device, bf16: bool) -> None:
        """path: local folder or name on the hub.  Raises UserError when it cannot be loaded."""
        transformers, option, what = quiet_transformers("--text-encoder t5"), "--text-encoder-path", "a T5 and its tokenizer"
        self._tokenizer = load_pretrained(transformers.AutoTokenizer, path, option, what)
        self._model = load_pretrained(transformers.T5EncoderModel, path, option, what,
                                      dtype=torch.bfloat16 if bf16 else torch.float32).eval().requires_grad_(False).to(device)
        self._tokenizer.padding_side = "right"
        self.length, self.width, self._device = length, int(self._model.config.d_model), device
        vocabulary = json.dumps(sorted(self._tokenizer.get_vocab().items())).encode()
        # Of the weights rounded to bf16: a GPU loads them so, and both must be known as the same encoder.
        rounded = {name: tensor.bfloat16() for name, tensor in self._model.state_dict().items()}
        self.fingerprint = fingerprint(rounded | {"vocabulary": torch.frombuffer(bytearray(vocabulary), dtype=torch.uint8)})

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """How many tokens each text has before it is cut, with the end token."""
        return [len(each) for each in self._tokenizer(list(texts), verbose=False)["input_ids"]]

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Caption:
        """Features float32 [B, T, E] and mask bool [B, T], padded on the left to the longest text."""
        tokens = self._tokenizer(list(texts), truncation=True, max_length=self.length, padding="longest", return_tensors="pt")
        ids, attention = tokens["input_ids"].to(self._device), tokens["attention_mask"].to(self._device)
        hidden = self._model(input_ids=ids, attention_mask=attention).last_hidden_state  # [B, T, E]
        return left_padded(hidden[attention.bool()], attention.sum(1))


class HashedTextEncoder:
    """A frozen encoder from random vectors: one token a word, and an end token that is the mean of all words.

    A word's vector is the mean of those of its character n-grams and of the word as a whole, scaled to unit size, and a sinusoid
    of its place is added (Vaswani et al. 2017).
    """

    def __init__(self, width: int, length: int, seed: int = 0) -> None:
        self.width, self.length = width, length
        draw = np.random.Generator(np.random.Philox(seed))
        self._table = draw.standard_normal((_BUCKETS, width), np.float32)            # [buckets, E]
        place, frequency = np.arange(length)[:, None], 10_000.0 ** -(np.arange(width) // 2 * 2 / width)
        self._places = _POSITION * np.sqrt(2) * np.where(np.arange(width) % 2, np.cos(place * frequency),
                                                         np.sin(place * frequency)).astype(np.float32)  # [length, E]
        self.fingerprint = fingerprint({"table": torch.from_numpy(self._table), "places": torch.from_numpy(self._places)})
        self._vector = lru_cache(1 << 16)(self._make_vector)

    def _make_vector(self, word: str) -> np.ndarray:
        whole = f"<{word}>"
        grams = [whole] + [whole[at : at + size] for size in _GRAMS for at in range(len(whole) - size + 1)]
        return _unit(self._table[[zlib.crc32(gram.encode()) % _BUCKETS for gram in grams]].sum(0))

    def _words(self, text: str) -> list[str]:
        return re.findall(r"\w+", text.lower())

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Words of each text and the end token."""
        return [len(self._words(text)) + 1 for text in texts]

    def encode(self, texts: Sequence[str]) -> Caption:
        """Features float32 [B, T, E] and mask bool [B, T], padded on the left to the longest text."""
        found = [self._encode(self._words(text)[: self.length - 1]) for text in texts]
        return left_padded(torch.from_numpy(np.concatenate(found)), torch.tensor([len(each) for each in found]))

    def _encode(self, words: list[str]) -> np.ndarray:
        """The features of one caption: float32 [words + 1, E]."""
        vectors = np.stack([*map(self._vector, words), np.zeros(self.width, np.float32)])
        vectors[-1] = _unit(vectors[:-1].sum(0)) if words else 0
        return vectors + self._places[: len(vectors)]


def _unit(vector: np.ndarray) -> np.ndarray:
    """Scaled so that its numbers have a mean square of 1."""
    return vector / np.sqrt(np.mean(vector**2))


def left_padded(tokens: Tensor, lengths: Tensor, length: int = 0) -> Caption:
    """Tokens of captions one after the other, [sum of lengths, E], with lengths [B] -> features [B, T, E] and mask [B, T].

    length: T, at least the longest; 0: the longest.  Features are rounded to bf16 and returned in float32.
    """
    longest = length or int(lengths.max())
    mask = torch.arange(longest, device=lengths.device) >= longest - lengths[:, None]  # [B, T]
    features = torch.zeros(*mask.shape, tokens.shape[-1], device=tokens.device)        # [B, T, E]
    features[mask] = tokens.bfloat16().float()
    return features, mask


class _Kind(NamedTuple):
    """How an encoder is made of options, a device and whether to compute in bf16, and the options that are its own."""

    make: Callable[["TextEncoderOptions", torch.device, bool], TextEncoder]
    options: tuple[str, ...]


TEXT_ENCODERS: dict[str, _Kind] = {
    "t5": _Kind(lambda given, device, bf16: T5TextEncoder(given.text_encoder_path or PUBLISHED_T5, given.text_length, device,
                                                          bf16), ("text_encoder_path",)),
    "hashed": _Kind(lambda given, device, bf16: HashedTextEncoder(given.text_width or HASHED_WIDTH, given.text_length),
                    ("text_width",)),
}


@dataclass
class TextEncoderOptions:
    """Which encoder reads the captions, and what it reads of them."""

    text_encoder: Annotated[str, choices(TEXT_ENCODERS)] = "t5"
    """t5: a T5 encoder by `transformers`; hashed: fixed random vectors of words, without a download."""
    text_encoder_path: str = ""
    """t5: local folder, or name on the hub; left out: google/flan-t5-xl."""
    text_width: Count = 0
    """hashed: width of the features; 0: 256."""
    text_length: Annotated[int, interval(int, 2, 4096)] = 120
    """Most tokens of a caption; a longer one is cut."""
    caption_cleaning: Annotated[str, choices(CLEANING)] = "published"
    """Before encoding: as published (lower case, no links, markup, file names), the same after ftfy has mended, or none."""


@dataclass(frozen=True)
class EncoderRecord:
    """What decided a model's features: kept with them and with the model; flat, as JSON holds it."""

    encoder: str
    encoder_path: str
    encoder_fingerprint: str
    text_width: int
    text_length: int
    caption_cleaning: str

    @property
    def text(self) -> str:
        """The record in one string, for a model to carry."""
        return json.dumps(asdict(self))

    @classmethod
    def of(cls, text: str, source: str) -> "EncoderRecord":
        """A record from its string; raises UserError, naming `source`, for anything else."""
        try:
            found = parse_json(text)
        except ValueError:
            found = None
        return cls(**read_fields(cls, found, f"{source}: its text encoder"))


def encoder_facts(text: str) -> dict[str, Any]:
    """What must be equal where two models, or a model and features, have one encoder; text: what a model carries of its own.

    The fields of an `EncoderRecord` but the place, which may change; nothing of published weights, which have no record.
    """
    if text in ("", PUBLISHED_T5):
        return {}
    try:
        found = asdict(EncoderRecord.of(text, ""))
    except UserError:
        return {"encoder": text}
    return {name: value for name, value in found.items() if name != "encoder_path"}


@dataclass
class CaptionEncoder:
    """Cleaning and encoding of captions as a model was trained with them: `encoder(captions)` gives its condition."""

    encoder: TextEncoder
    record: EncoderRecord
    _told: bool = field(default=False, repr=False)

    def clean(self, captions: Sequence[str]) -> list[str]:
        """The captions as the encoder reads them."""
        return [CLEANING[self.record.caption_cleaning](caption) for caption in captions]

    def __call__(self, captions: Sequence[str]) -> Caption:
        """Captions [B] -> features float32 [B, T, E], zero where padded, and mask bool [B, T] with T the record's text_length.

        A caption that is cut is reported once in a process.
        """
        cleaned = self.clean(captions)
        self.report_cut(cleaned, self.encoder.lengths(cleaned))
        features, mask = self.encoder.encode(cleaned)
        missing = self.record.text_length - mask.shape[1]
        return functional.pad(features, (0, 0, missing, 0)), functional.pad(mask, (missing, 0))

    def report_cut(self, captions: Sequence[str], lengths: Sequence[int]) -> None:
        """Log, once in a process, that captions of these lengths are cut."""
        limit = self.record.text_length
        cut = [caption for caption, length in zip(captions, lengths, strict=True) if length > limit]
        if cut and not self._told:
            self._told = True
            log.warning("%d of %d captions are longer than --text-length %d tokens and are cut; the first begins %r", len(cut),
                        len(captions), limit, printable(cut[0])[:60])


def make_encoder(options: TextEncoderOptions, device: torch.device, bf16: bool) -> CaptionEncoder:
    """The encoder that the options name; raises UserError for an option of another encoder, or one that cannot be loaded."""
    kind = TEXT_ENCODERS[options.text_encoder]
    for name, other in TEXT_ENCODERS.items():
        for option in other.options:
            if getattr(options, option) and option not in kind.options:
                raise UserError(f"{flag(option)} {getattr(options, option)} is an option of --text-encoder {name}, not of "
                                f"{options.text_encoder}: leave it out.")
    encoder = kind.make(options, device, bf16)
    path = options.text_encoder_path or (PUBLISHED_T5 if options.text_encoder == "t5" else "")
    return CaptionEncoder(encoder, EncoderRecord(options.text_encoder, path, encoder.fingerprint, encoder.width, encoder.length,
                                                 options.caption_cleaning))


def encoder_of(record: EncoderRecord, source: str, device: torch.device, bf16: bool, path: str = "") -> CaptionEncoder:
    """The encoder of a model, by the record that it carries.

    source: who carries it, for messages; path: where the encoder lies now.  Raises UserError when that is another encoder.
    """
    if record.encoder not in TEXT_ENCODERS:
        raise UserError(f"{source} was trained with the text encoder {printable(record.encoder)}, which is unknown here: use the "
                        "version of this repository that has it.")
    own = TEXT_ENCODERS[record.encoder].options
    options = TextEncoderOptions(record.encoder, (path or record.encoder_path) if "text_encoder_path" in own else "",
                                 record.text_width if "text_width" in own else 0, record.text_length, record.caption_cleaning)
    made = make_encoder(options, device, bf16)
    if made.record.encoder_fingerprint != record.encoder_fingerprint:
        raise UserError(f"--text-encoder-path {printable(options.text_encoder_path)!r} holds an encoder with the fingerprint "
                        f"{made.record.encoder_fingerprint} but {source} was trained with {record.encoder_fingerprint}: give the "
                        "folder of that encoder.")
    return made
