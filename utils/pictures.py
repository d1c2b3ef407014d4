"""Pictures to look at: images in a grid, with captions."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from utils.files import replacing


def image_grid(images: np.ndarray, columns: int, scale: int = 1, rows: Sequence[str] = (),
               titles: Sequence[str] = ()) -> Image.Image:
    """Draw images in a grid, row by row, with captions.

    images: uint8 [N, H, W, 3]; scale: enlargement of each side; rows: captions to the left of the rows; titles: captions above
    the columns.  Long captions are cut.  Raises ValueError if there is no image or a list has the wrong length.
    """
    count, height, width = images.shape[:3]
    lines = math.ceil(count / max(columns, 1))
    if count < 1 or columns < 1 or len(rows) not in (0, lines) or len(titles) not in (0, columns):
        raise ValueError(f"{count} images in {columns} columns do not fit their captions")
    font, pad = ImageFont.load_default(size=12), 2
    line = 12 + 2 * pad  # height of a line of text
    titles = [_fit(text, font, max(width * scale, 96)) for text in titles]  # may widen the columns of small images
    rows = [_fit(text, font, 240) for text in rows]
    cell = max([width * scale, *(math.ceil(font.getlength(text)) for text in titles)]) + pad
    left = max([0, *(math.ceil(font.getlength(text)) + 2 * pad for text in rows)]) + pad
    top, step = pad + (line if titles else 0), height * scale + pad
    grid = Image.new("RGB", (left + columns * cell, top + lines * step), "white")
    draw = ImageDraw.Draw(grid)
    for index, image in enumerate(images):
        x, y = left + index % columns * cell, top + index // columns * step
        picture = Image.fromarray(np.ascontiguousarray(image)).resize((width * scale, height * scale), Image.Resampling.NEAREST)
        grid.paste(picture, (x, y))
    for index, text in enumerate(rows):
        draw.text((pad, top + index * step + height * scale // 2), text, "black", font, anchor="lm")
    for index, text in enumerate(titles):
        draw.text((left + index * cell, pad), text, "black", font)
    return grid


def save_picture(picture: Any, path: Path, dpi: int = 120) -> None:
    """Write a PIL image (as PNG) or a matplotlib figure (by the suffix) in one piece, in the place of what is there."""
    with replacing(path) as aside:
        if isinstance(picture, Image.Image):
            picture.save(aside, format="PNG")
        else:
            picture.savefig(aside, dpi=dpi, format=path.suffix[1:])


def _fit(text: str, font: Any, limit: float) -> str:
    """Cut a caption to `limit` pixels, ending it in two dots."""
    if font.getlength(text) <= limit:
        return text
    while text and font.getlength(text + "..") > limit:
        text = text[:-1]
    return text + ".."
