"""Chips to compile for."""

from __future__ import annotations

import mmap
import re
from dataclasses import dataclass
from pathlib import Path

from mobilevd_deploy.config.devices import Chip, find_chip, table
from mobilevd_deploy.errors import VendorError

_TARGET_TEXT = re.compile(rb"soc_type=([A-Za-z0-9]+);arch=([0-9]+)")


@dataclass(frozen=True)
class Target:
    """A chip to compile for: its part number, QNN's number for it (soc_model), and its Hexagon version."""

    name: str
    soc_model: int
    arch: int

    @classmethod
    def of(cls, chip: Chip) -> Target:
        """Return the target for a chip of devices.toml."""
        return cls(chip.part_number, chip.soc_model, int(chip.htp.removeprefix("v")))


def targets() -> tuple[Target, ...]:
    """List the target of every chip in devices.toml."""
    return tuple(map(Target.of, table().chip))


def find_target(name: str) -> Target:
    """Return the target for a chip by name, in any spelling. Errors as `find_chip`."""
    return Target.of(find_chip(name))


def read_target(context: Path) -> tuple[str, int]:
    """Return the part number and Hexagon version recorded in a context binary. Raises VendorError."""
    try:
        with context.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            found = {(m[1].decode(), int(m[2])) for m in _TARGET_TEXT.finditer(data)}
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise VendorError(f"{context} cannot be read: {error}", next_step="compile it again") from error
    if len(found) != 1:
        names = ", ".join(sorted(f"{soc} V{arch}" for soc, arch in found)) or "no chip"
        raise VendorError(f"{context} names {names}, not one chip", next_step="compile it again")
    return found.pop()
