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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobilevd_deploy.errors import UsageError
from mobilevd_deploy.spec import from_dict

if TYPE_CHECKING:
    from mobilevd_deploy.hub import HostedDevice, Target

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
    device = _find(name)
    if device is None:
        raise _unknown(name, _known_names())
    return device


def chip_called(name: str) -> Chip | None:
    """Return the chip of a phone or chip by name, None where nobody knows it."""
    device = _find(name)
    return device.chip if device else None


def choose_hosted(name: str, hosted: Sequence[HostedDevice]) -> Target:
    """Pick the hosted phone for `name` from the hub's live list.

    A hosted phone of that name (or of its family) comes first, then any phone with the same chip, and then
    the notes say so. Of several system versions the newest is used.

    Raises:
        UsageError: nobody knows the name, or no phone with that chip is hosted now.
    """
    from mobilevd_deploy.hub import Target

    same = [device for device in hosted if _plain(device.name) == _plain(name)]
    known = _find(name)
    if same:
        best = max(same, key=_version)
        return Target(name, best.name, best.os, chip_name(best))
    if known is None:
        raise _unknown(name, [*_known_names(), *(device.name for device in hosted)])
    chip = known.chip
    fitting = [device for device in hosted if _attributes(device) & {*chip.attributes, *chip.sm}]
    if not fitting:
        raise UsageError(
            f"{name}: no phone with its chip ({chip.name}) is hosted now",
            next_step="mobilevd-deploy devices --hub lists what is; profile estimate needs no phone",
        )
    # The plain chip before a "for Galaxy" one, phones of our table before strangers.
    listed = {_plain(phone.name) for phone in table().phone}
    best = max(
        fitting,
        key=lambda d: (chip.attributes[0] in _attributes(d), _plain(d.name) in listed, _version(d), d.name),
    )
    if known.phone is None:
        return Target(name, best.name, best.os, chip.name)
    note = f"{name} is not hosted: measured on {best.name}, which has the same chip ({chip.name})"
    if "galaxy" in best.name.lower():
        note += "; Galaxy phones may run it at other clocks"
    return Target(name, best.name, best.os, chip.name, (note,))


def chip_name(device: HostedDevice) -> str:
    """Name the chip of a hosted device as our table does, else as the hub does."""
    attributes = _attributes(device)
    for chip in table().chip:
        if attributes & {*chip.attributes, *chip.sm}:
            return chip.name
    return min(attributes, default="unknown chip")


def list_devices(hosted: Sequence[HostedDevice] | None = None) -> list[dict[str, Any]]:
    """Return phones with their chips as plain values, by chip.

    `hosted` is the hub's live list; without it the table's own memory of it is used. Keys: `phone`,
    `chipset`, `htp`, `soc_model`, `sm`, `hosted`, `os` (of the hosted one, live list only) and `profiled_on`:
    the phone itself where it is hosted, else one of the same chip, None where there is none.
    """
    rows: list[dict[str, Any]] = []
    for phone in table().phone:
        chip = table().chip_of(phone)
        if hosted is None:
            twins = [p.name for p in table().phone if p.hosted and p.chip == phone.chip]
            stand_in = phone.name if phone.hosted else twins[-1] if twins else None
            rows.append(_row(phone.name, chip, phone.hosted, None, stand_in))
            continue
        try:
            target = choose_hosted(phone.name, hosted)
        except UsageError:
            rows.append(_row(phone.name, chip, False, None, None))
        else:
            is_hosted = not target.notes
            rows.append(_row(phone.name, chip, is_hosted, target.os if is_hosted else None, target.device))
    ours = {_plain(phone.name) for phone in table().phone}
    for device in hosted or ():
        if _plain(device.name) not in ours:
            # Some are no phones at all, and their chips are not ours: the hub's own words are all there is.
            known = next((chip for chip in table().chip if chip.name == chip_name(device)), None)
            htp = next((a.partition(":")[2] for a in device.attributes if a.startswith("hexagon:")), None)
            row = _row(device.name, known, True, device.os, device.name)
            rows.append(row | {"chipset": chip_name(device), "htp": row["htp"] or htp})
    return rows


def _row(
    name: str, chip: Chip | None, hosted: bool, os: str | None, profiled_on: str | None
) -> dict[str, Any]:
    return {
        "phone": name,
        "chipset": chip.name if chip else None,
        "sm": list(chip.sm) if chip else [],
        "htp": chip.htp if chip else None,
        "soc_model": chip.soc_model if chip else None,
        "hosted": hosted,
        "os": os,
        "profiled_on": profiled_on,
    }


def _find(name: str) -> Device | None:
    wanted = _plain(name)
    if not wanted:
        return None
    for phone in table().phone:
        if wanted == _plain(phone.name):
            return Device(name, phone, table().chip_of(phone))
    for chip in table().chip:
        if wanted in {_plain(alias) for alias in (chip.name, *chip.attributes, *chip.sm)}:
            return Device(name, None, chip)
    return None


def _known_names() -> list[str]:
    return [*(phone.name for phone in table().phone), *(chip.name for chip in table().chip)]


def _unknown(name: str, known: Iterable[str]) -> UsageError:
    by_plain = {_plain(candidate): candidate for candidate in known}
    near = difflib.get_close_matches(_plain(name), by_plain, n=4, cutoff=0.5)
    nearest = f"nearest are {', '.join(by_plain[match] for match in near)}; " if near else ""
    return UsageError(
        f"no phone or chip is called {name!r}", next_step=f"{nearest}mobilevd-deploy devices lists all"
    )


def _plain(name: str) -> str:
    """Reduce a name to what tells phones apart: "Samsung Galaxy S24 (Family)" and "s24" are one."""
    return _NOISE.sub("", name.lower().replace("+", "plus"))


def _attributes(device: HostedDevice) -> set[str]:
    return {a.partition(":")[2] for a in device.attributes if a.startswith("chipset:")}


def _version(device: HostedDevice) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", device.os))
