"""The Jinja2 environment of the pages: templates, style sheet and number formats.

Templates escape every value. The style sheet, which is ours, is the only exception.
"""

from __future__ import annotations

import math
from importlib import resources

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mobilevd_deploy.base.progress import duration
from mobilevd_deploy.base.tensors import decibels as words_of_decibels
from mobilevd_deploy.profiling.profile import number

_NBSP = "\N{NO-BREAK SPACE}"
_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def si(value: float, unit: str = "") -> str:
    """Format with three digits and a decimal prefix: "1.52 G", "4.34 TFLOPs", "512 B"."""
    for factor, prefix in _PREFIXES:
        if value >= 0.9995 * factor:
            return f"{value / factor:#.3g}".rstrip(".") + f"{_NBSP}{prefix}{unit}"
    return f"{value:g}{_NBSP}{unit}".rstrip()


def decibels(value: float | None) -> str:
    """Format an SQNR or PSNR as `base.tensors.decibels` does, on one line."""
    return words_of_decibels(value).replace(" ", _NBSP)


def plural(count: int, noun: str) -> str:
    """Format a count and its noun: "1 frame", "1,200 frames"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def share(part: float, whole: float) -> str:
    """Format `part` as a percentage of `whole`: "25 %"; "all" if `whole` is 0."""
    return f"{100 * part / whole:.0f}{_NBSP}%" if whole else "all"


def change(before: float, after: float) -> str:
    """Format a relative change: "+20.0 %", "−37.5 %"; "< 0.1 %" if it rounds to zero."""
    relative = 100 * (after - before) / before if before else math.inf
    if abs(relative) < 0.05:
        return f"<{_NBSP}0.1{_NBSP}%"
    sign = "\N{MINUS SIGN}" if relative < 0 else "+"
    return f"{sign}{abs(relative):.1f}{_NBSP}%"


def percent(fraction: float) -> str:
    """Format a fraction as a length in CSS or SVG: "37.500%"."""
    return f"{100 * fraction:.3f}%"


def render(template: str, **values: object) -> str:
    """Fill in a template of this package.

    Equal values give equal text. Raises jinja2.UndefinedError if the template uses a value that is missing.
    """
    return _ENVIRONMENT.get_template(template).render(values)


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader(__package__),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for function in (si, decibels, plural, share, change, percent, number, duration):
        environment.filters[function.__name__] = function
    style = resources.files(__package__).joinpath("style.css").read_text(encoding="utf-8")
    environment.globals["style"] = Markup(style)
    return environment


_ENVIRONMENT = _environment()
