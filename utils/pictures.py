"""Pictures to look at: images in a grid, with captions."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont


def image_grid(images: np.ndarray, columns: int, labels: Sequence[str] | None = None, scale: int = 1,
               rows: Sequence[str] | None = None, titles: Sequence[str] | None = None) -> Image.Image:
    """Draw images in a grid, row by row, with captions.

    images: uint8 [N, H, W, 3]; labels: N captions, one below each image; scale: pixels an image pixel takes, in each
    direction; rows: captions to the left of the rows; titles: captions above the columns.  Long captions are
    cut.  Raises ValueError if there is no image or a list has the wrong length.
    """
    count, height, width = images.shape[:3]
    lines = math.ceil(count / max(columns, 1))
    for texts, wanted in ((labels, count), (rows, lines), (titles, columns)):
        if count < 1 or columns < 1 or (texts is not None and len(texts) != wanted):
            raise ValueError(f"{count} images in {columns} columns do not fit their captions")
    font, pad = ImageFont.load_default(size=12), 2
    line = 12 + 2 * pad  # height of a line of text
    least = max(width * scale, 96)  # captions of small images may widen their column this far
    labels = [_fit(text, font, least) for text in labels or []]
    titles = [_fit(text, font, least) for text in titles or []]
    rows = [_fit(text, font, 240) for text in rows or []]
    cell = max([width * scale, *(math.ceil(font.getlength(text)) for text in labels + titles)]) + pad
    left = max([0, *(math.ceil(font.getlength(text)) + 2 * pad for text in rows)]) + pad
    top, step = pad + (line if titles else 0), height * scale + pad + (line + 4 * pad if labels else 0)
    grid = Image.new("RGB", (left + columns * cell, top + lines * step), "white")
    draw = ImageDraw.Draw(grid)
    for index, image in enumerate(images):
        x, y = left + index % columns * cell, top + index // columns * step
        picture = Image.fromarray(np.ascontiguousarray(image)).resize((width * scale, height * scale), Image.Resampling.NEAREST)
        grid.paste(picture, (x, y))
        if labels:
            draw.text((x, y + height * scale), labels[index], "black", font)
    for index, text in enumerate(rows):
        draw.text((pad, top + index * step + height * scale // 2), text, "black", font, anchor="lm")
    for index, text in enumerate(titles):
        draw.text((left + index * cell, pad), text, "black", font)
    return grid


def _fit(text: str, font: Any, limit: float) -> str:
    """Cut a caption to `limit` pixels, ending it in two dots."""
    if font.getlength(text) <= limit:
        return text
    while text and font.getlength(text + "..") > limit:
        text = text[:-1]
    return text + ".."
