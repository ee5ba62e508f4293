"""Horizontal bar charts as PNG files, for places that cannot show a table, such as a chat."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

COLOURS = ("#4a7ebb", "#d0743c")
_STEP, _THICK, _LENGTH, _GAP = 44, 28, 1040, 20
_SIZE = 24


@dataclass(frozen=True)
class Bar:
    """One bar: lengths drawn end to end, at most one per entry of `COLOURS`. A chart has one scale.

    `text` is written to the right of the bar. `mark` is a length at which a dotted line is drawn. `depth`
    indents the label.
    """

    label: str
    lengths: tuple[float, ...]
    text: str
    mark: float | None = None
    depth: int = 0


def draw_bars(title: str, bars: Sequence[Bar], legend: str) -> bytes:
    """Draw bars from top to bottom between a title and a legend; return the bytes of the PNG."""
    font = ImageFont.load_default(_SIZE)
    longest = max((sum(bar.lengths) for bar in bars), default=0) or 1
    labels = [2 * _GAP * bar.depth + font.getlength(bar.label) for bar in bars]
    left = 2 * _GAP + max(labels, default=0)
    right = max((font.getlength(bar.text) for bar in bars), default=0)
    width = max(left + _LENGTH + right, *(font.getlength(text) for text in (title, legend))) + 2 * _GAP
    height = _STEP * (len(bars) + 2)
    image = Image.new("RGB", (round(width), height), "white")
    draw = ImageDraw.Draw(image)

    def write(x: float, y: float, text: str) -> None:
        draw.text((x, y), text, fill="black", font=font, anchor="lm")

    write(_GAP, _STEP / 2, title)
    write(_GAP, height - _STEP / 2, legend)
    for bar, top in zip(bars, range(_STEP, height, _STEP), strict=False):
        middle, x = top + _STEP / 2, left
        write(_GAP + 2 * _GAP * bar.depth, middle, bar.label)
        for length, colour in zip(bar.lengths, COLOURS, strict=False):
            end = x + _LENGTH * length / longest
            if round(end) > round(x):
                box = (round(x), middle - _THICK / 2, round(end) - 1, middle + _THICK / 2 - 1)
                draw.rectangle(box, fill=colour)
            x = end
        write(x + _GAP / 2, middle, bar.text)
        if bar.mark is not None:
            at = round(left + _LENGTH * bar.mark / longest)
            for y in range(top + 2, top + _STEP - 2, 8):
                draw.line((at, y, at, y + 3), fill="black", width=2)
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()
