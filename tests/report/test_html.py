from __future__ import annotations

import math

import pytest
from jinja2 import UndefinedError

from mobilevd_deploy.report.html import change, decibels, plural, render, share, si


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (si(0, "B"), "0 B"),
        (si(999, "B"), "999 B"),
        (si(999.6), "1.00 k"),
        (si(1_519_000_000), "1.52 G"),
        (si(434_000_000_000_000, "FLOPs"), "434 TFLOPs"),
        (decibels(None), "identical"),
        (decibels(math.inf), "identical"),
        (decibels(31.26), "31.3 dB"),
        (plural(1, "frame"), "1 frame"),
        (plural(1200, "frame"), "1,200 frames"),
        (share(1, 4), "25 %"),
        (share(0, 0), "all"),
        (change(1000, 1200), "+20.0 %"),
        (change(800, 500), "\N{MINUS SIGN}37.5 %"),
        (change(100_000, 99_999), "< 0.1 %"),
    ],
)
def test_numbers_have_few_digits_and_a_unit(words, expected):
    assert words.replace("\N{NO-BREAK SPACE}", " ") == expected


def test_a_template_refuses_a_missing_value():
    with pytest.raises(UndefinedError, match="name"):
        render("profiles.html", profiles=(), traffic=())
