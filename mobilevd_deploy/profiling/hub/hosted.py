"""Phones that Qualcomm AI Hub hosts, and which of them measures for a named device."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mobilevd_deploy.config.devices import Chip, find_known, known_names, plain_name, table, unknown_device
from mobilevd_deploy.errors import UsageError


@dataclass(frozen=True)
class HostedDevice:
    """A device in the hub's list; attributes are like "chipset:qualcomm-snapdragon-8gen3", "hexagon:v75"."""

    name: str
    os: str
    attributes: tuple[str, ...]


@dataclass(frozen=True)
class HostedPhone:
    """The user's name for a device, the hosted device that is used, and notes for every number."""

    asked_for: str
    device: str
    os: str
    chipset: str
    notes: tuple[str, ...] = ()


def choose_hosted(name: str, hosted: Sequence[HostedDevice]) -> HostedPhone:
    """Pick the hosted phone for `name` from the hub's live list.

    Prefers a hosted phone of that name or family, then any phone with the same chip, which the notes say. Of
    several system versions the newest is used.

    Raises:
        UsageError: the name is unknown, or no phone with that chip is hosted now.
    """
    same = [device for device in hosted if plain_name(device.name) == plain_name(name)]
    known = find_known(name)
    if same:
        best = max(same, key=_version)
        return HostedPhone(name, best.name, best.os, chip_name(best))
    if known is None:
        raise unknown_device(name, [*known_names(), *(device.name for device in hosted)])
    chip = known.chip
    fitting = [device for device in hosted if _attributes(device) & {*chip.attributes, *chip.sm}]
    if not fitting:
        raise UsageError(
            f"{name}: no phone with its chip ({chip.name}) is hosted now",
            next_step="mobilevd-deploy devices --hub lists what is; profile estimate needs no phone",
        )
    # The plain chip before a "for Galaxy" one, phones of our table before others.
    listed = {plain_name(phone.name) for phone in table().phone}
    best = max(
        fitting,
        key=lambda d: (
            chip.attributes[0] in _attributes(d),
            plain_name(d.name) in listed,
            _version(d),
            d.name,
        ),
    )
    if known.phone is None:
        return HostedPhone(name, best.name, best.os, chip.name)
    note = f"{name} is not hosted: measured on {best.name}, which has the same chip ({chip.name})"
    if "galaxy" in best.name.lower():
        note += "; Galaxy phones may run it at other clocks"
    return HostedPhone(name, best.name, best.os, chip.name, (note,))


def chip_name(device: HostedDevice) -> str:
    """Return the chip's name in our table, else the hub's name for it."""
    attributes = _attributes(device)
    for chip in table().chip:
        if attributes & {*chip.attributes, *chip.sm}:
            return chip.name
    return min(attributes, default="unknown chip")


def list_devices(hosted: Sequence[HostedDevice] | None = None) -> list[dict[str, Any]]:
    """Return phones with their chips as plain values, by chip.

    `hosted` is the hub's live list; without it, the table says what was hosted. Keys: `phone`, `chipset`,
    `htp`, `soc_model`, `sm`, `hosted`, `os` (of the hosted phone, live list only) and `profiled_on`: the
    phone itself if it is hosted, else one with the same chip, else None.
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
    ours = {plain_name(phone.name) for phone in table().phone}
    for device in hosted or ():
        if plain_name(device.name) not in ours:
            # Some are not phones and have chips that are not in our table: use the hub's names.
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


def _attributes(device: HostedDevice) -> set[str]:
    return {a.partition(":")[2] for a in device.attributes if a.startswith("chipset:")}


def _version(device: HostedDevice) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", device.os))
