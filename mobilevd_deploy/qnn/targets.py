"""Chips to compile for."""

from __future__ import annotations

import mmap
import re
from dataclasses import dataclass
from pathlib import Path

from mobilevd_deploy.config.devices import table
from mobilevd_deploy.errors import UsageError, VendorError

_TARGET_TEXT = re.compile(rb"soc_type=([A-Za-z0-9]+);arch=([0-9]+)")


@dataclass(frozen=True)
class Target:
    """A chip to compile for: its part number, QNN's number for it, and the version of its Hexagon."""

    name: str
    soc_model: int
    arch: int


def targets() -> tuple[Target, ...]:
    """Every chip of devices.toml, by its first part number."""
    return tuple(Target(c.sm[0].upper(), c.soc_model, int(c.htp.removeprefix("v"))) for c in table().chip)


def find_target(name: str) -> Target:
    """Return the chip with the part number `name`, such as "SM8650". Raises UsageError for others."""
    for chip, target in zip(table().chip, targets(), strict=True):
        if name.lower() in chip.sm:
            return target
    known = ", ".join(target.name for target in targets())
    raise UsageError(f"no chip has the part number {name!r}", next_step=f"known are {known}")


def read_target(context: Path) -> tuple[str, int]:
    """Return part number and Hexagon version that a context binary names. Raises VendorError."""
    try:
        with context.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            found = {(m[1].decode(), int(m[2])) for m in _TARGET_TEXT.finditer(data)}
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise VendorError(f"{context} cannot be read: {error}", next_step="compile it again") from error
    if len(found) != 1:
        names = ", ".join(sorted(f"{soc} V{arch}" for soc, arch in found)) or "no chip"
        raise VendorError(f"{context} names {names}, not one chip", next_step="compile it again")
    return found.pop()
