"""Phones and chipsets by name, and which hosted phone can stand in for one that is not hosted.

    find("Xiaomi 14 Pro")                   Device: the phone and its chip, from our own table (devices.toml)
    choose_hosted("Xiaomi 14 Pro", listed)  Target: the hosted phone to use, and what to say beside it

Case, spaces and signs do not matter, nor do "Samsung Galaxy" and "Qualcomm Snapdragon": "galaxy s24",
"S24 (Family)", "8gen3" and "SM8650" are all understood.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from mobilevd_deploy.config.strict import from_dict
from mobilevd_deploy.errors import UsageError

if TYPE_CHECKING:
    pass


_NOISE = re.compile(r"\(.*?\)|qualcomm|snapdragon|samsung|galaxy|[^a-z0-9]")


@dataclass(frozen=True)
class Figure:
    """A number that is not ours, and where it is from."""

    value: float
    source: str


@dataclass(frozen=True)
class Chip:
    """A chipset: the hub's names for it, its part numbers, and what the compiler is told.

    `published_ms`: latencies that the vendor publishes for networks that anyone can build, measured on the
    phone `published_on`. `dram_gb_s` and `int8_tops` are its peaks, None where we have no figure.
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
    """A phone; `hosted`: AI Hub had it when the table was written."""

    name: str
    chip: str
    hosted: bool = False


@dataclass(frozen=True)
class Device:
    """What a name stands for: the phone, None where a chip was named, and the chip."""

    asked_for: str
    phone: Phone | None
    chip: Chip


@dataclass(frozen=True)
class Table:
    """All chips and phones that we know; `published_by` is the source of the chips' `published_ms`."""

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
    """Say what phone or chip `name` stands for.

    Raises UsageError with the nearest names we know.
    """
    device = find_known(name)
    if device is None:
        raise unknown_device(name, known_names())
    return device


def chip_called(name: str) -> Chip | None:
    """Return the chip of a phone or chip by name, None where nobody knows it."""
    device = find_known(name)
    return device.chip if device else None


def find_known(name: str) -> Device | None:
    """Return the phone or chip of that name, or None if it is in no table."""
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
    """Return the error for a name that is in no table, with the nearest of the `known` names."""
    by_plain = {plain_name(candidate): candidate for candidate in known}
    near = difflib.get_close_matches(plain_name(name), by_plain, n=4, cutoff=0.5)
    nearest = f"nearest are {', '.join(by_plain[match] for match in near)}; " if near else ""
    return UsageError(
        f"no phone or chip is called {name!r}", next_step=f"{nearest}mobilevd-deploy devices lists all"
    )


def plain_name(name: str) -> str:
    """Reduce a name to what tells phones apart: "Samsung Galaxy S24 (Family)" and "s24" are one."""
    return _NOISE.sub("", name.lower().replace("+", "plus"))
