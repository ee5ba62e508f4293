"""Bar charts: the pixels of the PNG."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageColor

from mobilevd_deploy.base.chart import COLOURS, Bar, draw_bars

BARS = [Bar("whole", (3, 1), "3 + 1", mark=2), Bar("part", (2, 0), "2", depth=1), Bar("none", (), "failed")]


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def lengths(row: np.ndarray) -> list[int]:
    """Pixels of each colour in the middle of a bar."""
    return [int((row == ImageColor.getrgb(colour)).all(-1).sum()) for colour in COLOURS]


def test_bars_have_one_scale() -> None:
    image = pixels(draw_bars("title", BARS, "legend"))
    step = image.shape[0] // (len(BARS) + 2)
    first, second, third = (lengths(image[step * i + step // 2 + 12]) for i in (1, 2, 3))
    unit = sum(first) / 4
    assert unit > 100
    np.testing.assert_allclose([*first, *second], [3 * unit, unit, 2 * unit, 0], atol=3)
    assert third == [0, 0]


def test_the_mark_stands_at_its_length() -> None:
    with_mark, without = (
        pixels(draw_bars("title", [Bar("a", (4,), "4", mark), Bar("b", (2,), "2")], "")) for mark in (2, None)
    )
    columns = np.flatnonzero((with_mark != without).any((0, 2)))
    ends = np.flatnonzero((without[2 * 44 + 34] == ImageColor.getrgb(COLOURS[0])).all(-1))
    assert abs(columns.mean() - ends.max()) < 3


def test_it_is_as_wide_as_its_words() -> None:
    narrow, wide = (pixels(draw_bars(title, BARS, "")).shape[1] for title in ("short", "long " * 100))
    assert wide > narrow
    # Nothing runs out of the picture on any side.
    edge = pixels(draw_bars("long " * 100, BARS, "legend " * 100))
    assert (edge[:, -1] == 255).all()
    assert (edge[:, 0] == 255).all()


def test_nothing_to_draw() -> None:
    assert pixels(draw_bars("title", [], "legend")).shape[0] > 0
    assert pixels(draw_bars("title", [Bar("zero", (0, 0), "0")], "legend")).shape[0] > 0
