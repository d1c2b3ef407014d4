"""Extract text features: captions -> cleaning -> text encoder -> one memory-mapped array, beside the codes of the same images.

LlamaGen writes a file for each caption; here every process encodes a share of the missing captions into files of its own, which
become one at the end.  Tokens are stored without padding.  `--short-captions` stores a second, short caption of each image, of
which training draws one now and then.
"""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started by its path

import numpy as np
import torch

from utils.captions import first_sentence
from utils.config import Count, Device, UserError, choices, parse, run_main
from utils.distributed import Processes, agree, all_reduce_sum, setup
from utils.files import check_writable
from utils.image_source import ImageSource
from utils.images import open_images
from utils.logs import progress, set_up_logging
from utils.optim import uses_bf16
from utils.text_encoders import CaptionEncoder, TextEncoderOptions, make_encoder
from utils.text_shards import TextHeader, TextWriter, known_lengths
from utils.texts import Texts
from utils.untrusted import printable

log = logging.getLogger("extract_text")

NONE, FIRST_SENTENCE = "none", "first-sentence"
_COUNTED_AT_ONCE = 4096  # captions that are cleaned and counted between two lines of progress


@dataclass
class ExtractTextConfig:
    """Options of the extraction."""

    encoder: TextEncoderOptions
    data_path: Path
    """Folder with captions.jsonl, folder of WebDataset tar shards or one of them, npz with `images` and `captions`, or table
    with a column of captions (utils/README.md)."""
    text_path: Path
    """Folder to write; training looks for it as `text` in the folder of the codes."""
    caption_key: str = ""
    """Which caption, where there are several: field of captions.jsonl (inner ones as text.short) or of a shard's .json, array of
    the npz, or column of the table; left out: `text`, the .txt, `captions`, the column of a usual name."""
    short_captions: str = NONE
    """A second, short caption of each image: none; first-sentence, LlamaGen's; or the key of given ones, as in --caption-key."""
    batch_size: Count = 0
    """Captions a process encodes at once; 0: 64 on a GPU, 16 on a CPU."""
    precision: Annotated[str, choices(("auto", "bf16", "float32"))] = "auto"
    """Of the encoder; auto: bf16 on GPUs.  Features are stored in bf16 either way."""
    device: Device = "auto"
    """auto: CUDA where there is any."""


def read_captions(config: ExtractTextConfig, source: ImageSource) -> list[Texts]:
    """The crops of all captions: the whole ones, and the short ones where they are asked for.

    Raises UserError where there are none, or all are empty.
    """
    captions = [source.captions(config.caption_key)]
    if config.short_captions == FIRST_SENTENCE:
        captions.append(Texts(map(first_sentence, captions[0])))
    elif config.short_captions != NONE:
        captions.append(source.captions(config.short_captions))
    if not any(text.strip() for text in captions[0]):
        raise UserError(f"--data-path {printable(config.data_path)} has no captions, all {len(captions[0])} are empty: give "
                        "images with captions, or --caption-key for those that are not.")
    return captions


def clean_crops(encoder: CaptionEncoder, captions: list[Texts], rows: np.ndarray) -> list[str]:
    """The cleaned captions of rows [n], all crops of an image and then those of the next: [n * crops].

    A short caption of which nothing is left is replaced by the whole one.
    """
    whole, *short = (encoder.clean(crop.of(rows)) for crop in captions)
    return [text for texts in zip(whole, *([each or full for each, full in zip(crop, whole)] for crop in short))
            for text in texts]


def count_tokens(encoder: CaptionEncoder, captions: list[Texts], processes: Processes) -> np.ndarray:
    """Tokens of every caption before it is cut, 0 where the whole one is empty: int64 [images, crops]; all processes count."""
    count, crops = len(captions[0]), len(captions)
    lengths = np.zeros((count, crops), np.int64)
    mine = np.array_split(np.arange(count), processes.world_size)[processes.rank]
    bar = progress(len(mine), "count tokens", "images", processes)
    for rows in (mine[first : first + _COUNTED_AT_ONCE] for first in range(0, len(mine), _COUNTED_AT_ONCE)):
        cleaned = clean_crops(encoder, captions, rows)
        lengths[rows] = np.reshape(encoder.encoder.lengths(cleaned), (-1, crops))
        lengths[rows[[not text for text in cleaned[::crops]]]] = 0
        bar.update(len(rows))
    bar.close()
    processes.barrier()  # whose patience is longer than that of the sum
    return all_reduce_sum(torch.from_numpy(lengths), processes).numpy()


def report(config: ExtractTextConfig, captions: list[Texts], lengths: np.ndarray) -> None:
    """Say how many captions are cut or empty; raises UserError when all are empty."""
    limit = config.encoder.text_length
    if len(cut := np.flatnonzero(lengths[:, 0] > limit)):
        log.warning("%d of %d captions are longer than --text-length %d tokens and are cut; the first begins %r", len(cut),
                    len(lengths), limit, printable(captions[0][int(cut[0])])[:60])
    if len(empty := np.flatnonzero(lengths[:, 0] == 0)) == len(lengths):
        raise UserError(f"--caption-cleaning {config.encoder.caption_cleaning} leaves nothing of any of the {len(lengths)} "
                        f"captions of --data-path {printable(config.data_path)}: choose another, or other captions.")
    if len(empty):
        log.warning("%d of %d captions are empty after cleaning and are left out; the first was %r", len(empty), len(lengths),
                    printable(captions[0][int(empty[0])])[:60])


def extract(config: ExtractTextConfig, processes: Processes) -> None:
    """Encode every missing caption; finished ones are never done again."""
    source = open_images(config.data_path)
    captions = read_captions(config, source)
    check_writable(config.text_path, "--text-path")
    encoder = make_encoder(config.encoder, processes.device, uses_bf16(config.precision, processes.device))
    header = TextHeader(**vars(encoder.record), crops=len(captions), short_captions=config.short_captions, images=len(source),
                        captions_checksum="-".join(crop.checksum for crop in captions), images_checksum=source.checksum,
                        source=f"{len(source)} images of {config.data_path.name}")
    lengths = known_lengths(config.text_path, header)  # an earlier run has counted, of which another node may not know yet
    if agree([int(lengths is None)], processes) == [1] or lengths is None:
        lengths = count_tokens(encoder, captions, processes)
        if processes.is_main:
            report(config, captions, lengths)
    empty = lengths[:, 0] == 0  # [images]
    writer = TextWriter(config.text_path, header, lengths.clip(max=header.text_length), processes)
    rows, batch_size = writer.share(), config.batch_size or (64 if processes.device.type == "cuda" else 16)
    writer.skip(rows[empty[rows]])
    rows, step = rows[~empty[rows]], max(1, batch_size // len(captions))
    bar = progress(len(rows), "extract", "images", processes)
    for some in (rows[first : first + step] for first in range(0, len(rows), step)):
        features, mask = encoder.encoder.encode(clean_crops(encoder, captions, some))
        writer.write(some, features[mask])
        bar.update(len(some))
    bar.close()
    left_out = writer.finish()
    log.info("%s: features of %d images, %d captions each, %d tokens of width %d; %d images without a caption left out",
             config.text_path, header.images - left_out, header.crops, writer.lengths.sum(), header.text_width, left_out)


def main() -> None:
    """Parse options and extract."""
    config = parse(ExtractTextConfig)
    processes = setup(config.device)
    set_up_logging(processes)
    extract(config, processes)
    processes.close()


if __name__ == "__main__":
    run_main(main)
