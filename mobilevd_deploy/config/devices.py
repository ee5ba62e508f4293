"""Phones and chips by name: the one table (devices.toml) and the one resolver of names.

    find("Xiaomi 14 Pro")   Device: a phone and its chip, or a chip alone
    find_chip("8gen3")      Chip: for options that take a chip

Case, spaces and punctuation are ignored, and so are "Samsung Galaxy", "Qualcomm Snapdragon" and the bin of a
part number: "galaxy s24", "S24 (Family)", "8gen3", "sm8650" and "SM8650-AC" are all resolved.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from mobilevd_deploy.config.strict import from_dict
from mobilevd_deploy.errors import UsageError

_NOISE = re.compile(r"\(.*?\)|qualcomm|snapdragon|samsung|galaxy|[^a-z0-9]")
_BINNED = re.compile(r"(sm\d{4})[a-z]{2}")  # a part number with its bin, as plain_name leaves it


@dataclass(frozen=True)
class Figure:
    """A figure that others published, and its source."""

    value: float
    source: str


@dataclass(frozen=True)
class Chip:
    """A chip: AI Hub's names (`attributes`), part numbers (`sm`), HTP version and QNN's `soc_model`.

    `published_ms`: the vendor's latencies of public networks, measured on the phone `published_on`.
    `dram_gb_s` (GB/s) and `int8_tops` (TOPS) are peak rates, None if no figure is known.
    """

    name: str
    attributes: tuple[str, ...]
    sm: tuple[str, ...]
    htp: str
    soc_model: int
    published_ms: dict[str, float] = field(default_factory=dict)
    published_on: str | None = None
    dram_gb_s: Figure | None = None
    int8_tops: Figure | None = None

    @property
    def part_number(self) -> str:
        """The name that recipes, artifacts and the compiler use: "SM8650"."""
        return self.sm[0].upper()


@dataclass(frozen=True)
class Phone:
    """A phone; `hosted`: AI Hub hosted it when the table was written."""

    name: str
    chip: str
    hosted: bool = False


@dataclass(frozen=True)
class Device:
    """The meaning of a name: a phone (None if the name is a chip's) and its chip."""

    asked_for: str
    phone: Phone | None
    chip: Chip


@dataclass(frozen=True)
class Table:
    """All known chips and phones; `published_by` is the source of the chips' `published_ms`."""

    published_by: str
    chip: tuple[Chip, ...]
    phone: tuple[Phone, ...]

    def chip_of(self, phone: Phone) -> Chip:
        """Return the chip of a phone."""
        return next(chip for chip in self.chip if chip.name == phone.chip)


@lru_cache(maxsize=1)
def table() -> Table:
    """Read devices.toml, once."""
    path = Path(__file__).with_name("devices.toml")
    return from_dict(Table, tomllib.loads(path.read_text(encoding="utf-8")))


def find(name: str) -> Device:
    """Return the phone or chip called `name`. Raises UsageError with the nearest known names."""
    device = find_known(name)
    if device is None:
        raise unknown_device(name, known_names())
    return device


def find_chip(name: str) -> Chip:
    """Return the chip called `name`, in any spelling that `find` resolves.

    Raises UsageError for a phone (with its chip's part number), and for an unknown name (with the nearest).
    """
    device = find_known(name)
    if device is None:
        named = {alias: chip.part_number for chip in table().chip for alias in _aliases(chip)}
        near = dict.fromkeys(named[alias] for alias in _nearest(name, named))
        nearest = f"nearest: {', '.join(near)}; " if near else ""
        chips = ", ".join(chip.part_number for chip in table().chip)
        raise UsageError(f"unknown chip {name!r}", next_step=f"{nearest}known: {chips}")
    if device.phone is not None:
        raise UsageError(
            f"{name!r} is a phone, not a chip",
            next_step=f"name its chip: {device.chip.part_number} ({device.chip.name})",
        )
    return device.chip


def chip_called(name: str) -> Chip | None:
    """Return the chip of a phone or chip by name, None if the name is unknown."""
    device = find_known(name)
    return device.chip if device else None


def find_known(name: str) -> Device | None:
    """Return the phone or chip called `name`, None if the name is unknown."""
    wanted = plain_name(name)
    if not wanted:
        return None
    for phone in table().phone:
        if wanted == plain_name(phone.name):
            return Device(name, phone, table().chip_of(phone))
    binned = _BINNED.fullmatch(wanted)
    for spelling in (wanted, binned[1] if binned else wanted):
        for chip in table().chip:
            if spelling in map(plain_name, _aliases(chip)):
                return Device(name, None, chip)
    return None


def known_names() -> list[str]:
    """List the names of all phones and chips in the table."""
    return [*(phone.name for phone in table().phone), *(chip.name for chip in table().chip)]


def unknown_device(name: str, known: Iterable[str]) -> UsageError:
    """Return the error for an unknown name, with the nearest of the `known` names."""
    near = _nearest(name, known)
    nearest = f"nearest are {', '.join(near)}; " if near else ""
    return UsageError(
        f"no phone or chip is called {name!r}", next_step=f"{nearest}mobilevd-deploy devices lists all"
    )


def plain_name(name: str) -> str:
    """Reduce a name to the characters that identify it: "Samsung Galaxy S24 (Family)" becomes "s24"."""
    return _NOISE.sub("", name.lower().replace("+", "plus"))


def _aliases(chip: Chip) -> tuple[str, ...]:
    return (chip.name, *chip.attributes, *chip.sm)


def _nearest(name: str, known: Iterable[str]) -> list[str]:
    """Return at most four of the `known` names, the most similar first."""
    by_plain = {plain_name(candidate): candidate for candidate in known}
    return [by_plain[m] for m in difflib.get_close_matches(plain_name(name), by_plain, n=4, cutoff=0.5)]
