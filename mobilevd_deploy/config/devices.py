"""Phones and chips by name: `find("Xiaomi 14 Pro")` returns the phone and its chip from devices.toml.

Names match without regard to case, spaces, punctuation and the words "Samsung", "Galaxy", "Qualcomm" and
"Snapdragon": "galaxy s24", "S24 (Family)", "8gen3" and "SM8650" are all found.
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

_IGNORED = re.compile(r"\(.*?\)|qualcomm|snapdragon|samsung|galaxy|[^a-z0-9]")


@dataclass(frozen=True)
class Figure:
    """A published number, and its source."""

    value: float
    source: str


@dataclass(frozen=True)
class Chip:
    """A chip: AI Hub's attributes for it, its part numbers, and the compiler's options for it.

    `published_ms`: network -> latency in ms that the vendor publishes, measured on the phone `published_on`.
    `dram_gb_s` (GB/s) and `int8_tops` (TOPS) are peaks; None if no figure is known.
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


@dataclass(frozen=True)
class Phone:
    """A phone; `hosted`: AI Hub hosted it when devices.toml was written."""

    name: str
    chip: str
    hosted: bool = False


@dataclass(frozen=True)
class Device:
    """The result of a search by name: the chip, and the phone (None if the name is a chip's)."""

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
    """Return the phone or chip of that name. Raises UsageError with the nearest known names."""
    device = find_known(name)
    if device is None:
        raise unknown_device(name, known_names())
    return device


def chip_called(name: str) -> Chip | None:
    """Return the chip of a phone or chip by name, or None if the name is unknown."""
    device = find_known(name)
    return device.chip if device else None


def find_known(name: str) -> Device | None:
    """Return the phone or chip of that name, or None if devices.toml does not have it."""
    wanted = plain_name(name)
    if not wanted:
        return None
    for phone in table().phone:
        if wanted == plain_name(phone.name):
            return Device(name, phone, table().chip_of(phone))
    for chip in table().chip:
        if wanted in {plain_name(alias) for alias in (chip.name, *chip.attributes, *chip.sm)}:
            return Device(name, None, chip)
    return None


def known_names() -> list[str]:
    """List the names of all phones and chips in the table."""
    return [*(phone.name for phone in table().phone), *(chip.name for chip in table().chip)]


def unknown_device(name: str, known: Iterable[str]) -> UsageError:
    """Return the error for an unknown name, with the nearest of the `known` names."""
    by_plain = {plain_name(candidate): candidate for candidate in known}
    near = difflib.get_close_matches(plain_name(name), by_plain, n=4, cutoff=0.5)
    nearest = f"nearest are {', '.join(by_plain[match] for match in near)}; " if near else ""
    return UsageError(
        f"no phone or chip is called {name!r}", next_step=f"{nearest}mobilevd-deploy devices lists all"
    )


def plain_name(name: str) -> str:
    """Reduce a name to the part that identifies a device: "Samsung Galaxy S24 (Family)" becomes "s24"."""
    return _IGNORED.sub("", name.lower().replace("+", "plus"))
