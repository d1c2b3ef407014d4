"""Pictures to look at: images in a grid, with captions."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from utils.files import replacing

# Of a tile with a caption: pixels that leave room for words, and lines of the caption.
_NARROWEST, _MOST_LINES = 192, 12


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
    font: Any = _font(12) if rows or titles else None
    pad = 2
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
        grid.paste(_enlarged(image, scale), (x, y))
    for index, text in enumerate(rows):
        draw.text((pad, top + index * step + height * scale // 2), text, "black", font, anchor="lm")
    for index, text in enumerate(titles):
        draw.text((left + index * cell, pad), text, "black", font)
    return grid


def captioned_grid(images: np.ndarray, captions: Sequence[str], scale: int = 1, widest: int = 1024) -> Image.Image:
    """Draw the images of each caption side by side and the caption under them, and such tiles beside each other.

    images: uint8 [N, H, W, 3], as many of each caption, one caption after the other; scale: enlargement of each side; widest: of
    the picture, in pixels, where a tile is not wider.  A caption is wrapped to the width of its tile; one of more than 12 lines
    is cut.  Raises ValueError if there is no image or the captions do not divide them.
    """
    count, height, width = images.shape[:3]
    if count < 1 or not captions or count % len(captions):
        raise ValueError(f"{count} images do not fit {len(captions)} captions")
    font, pad, line = _font(13), 4, 17
    own = count // len(captions)                                    # images of a tile
    tile = max(own * (width * scale + pad) - pad, _NARROWEST)
    columns = min(len(captions), max(1, (widest - 3 * pad) // (tile + 3 * pad)))
    wrapped = [_wrap(text, font, tile) for text in captions]
    rows = [wrapped[first : first + columns] for first in range(0, len(wrapped), columns)]
    heights = [height * scale + 3 * pad + line * max(map(len, row)) for row in rows]
    grid = Image.new("RGB", (3 * pad + columns * (tile + 3 * pad), 2 * pad + sum(heights)), "white")
    draw = ImageDraw.Draw(grid)
    for number, lines in enumerate(wrapped):
        row, column = divmod(number, columns)
        x, y = 3 * pad + column * (tile + 3 * pad), 2 * pad + sum(heights[:row])
        for index, image in enumerate(images[number * own : (number + 1) * own]):
            grid.paste(_enlarged(image, scale), (x + index * (width * scale + pad), y))
        for index, text in enumerate(lines):
            draw.text((x, y + height * scale + pad + index * line), text, "black", font)
    return grid


def save_picture(picture: Any, path: Path, dpi: int = 120) -> None:
    """Write a PIL image (as PNG) or a matplotlib figure (by the suffix) in one piece, in the place of what is there."""
    with replacing(path) as aside:
        if isinstance(picture, Image.Image):
            picture.save(aside, format="PNG")
        else:
            picture.savefig(aside, dpi=dpi, format=path.suffix[1:])


def _enlarged(image: np.ndarray, scale: int) -> Image.Image:
    """An image [H, W, 3] with every pixel as a square of `scale` pixels a side."""
    size = image.shape[1] * scale, image.shape[0] * scale
    return Image.fromarray(np.ascontiguousarray(image)).resize(size, Image.Resampling.NEAREST)


def _font(size: int) -> Any:
    """A font with the letters of most European languages: Pillow's own has those of English alone."""
    import matplotlib  # takes a moment, and only captions need it

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def _wrap(text: str, font: Any, limit: float) -> list[str]:
    """The lines of a caption, at most `limit` pixels wide; a longer word is broken.  A caption of too many lines is cut."""
    lines, rest = [""], text.split()
    while rest and len(lines) <= _MOST_LINES:
        word, *rest = rest
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= limit:
            lines[-1] = joined
        elif lines[-1]:
            lines.append("")
            rest = [word, *rest]
        else:
            fits = max(size for size in range(1, min(len(word), 400) + 1) if size == 1 or font.getlength(word[:size]) <= limit)
            lines, rest = [*lines[:-1], word[:fits], ""], [*filter(None, [word[fits:]]), *rest]
    if len(lines) > _MOST_LINES:
        lines[_MOST_LINES - 1] = _fit(lines[_MOST_LINES - 1] + " ...", font, limit)
    return lines[:_MOST_LINES]


def _fit(text: str, font: Any, limit: float) -> str:
    """Cut a caption to `limit` pixels, ending it in two dots."""
    if font.getlength(text) <= limit:
        return text
    while text and font.getlength(text + "..") > limit:
        text = text[:-1]
    return text + ".."
