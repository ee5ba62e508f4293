"""Every error that the toolkit raises on purpose.

MobileVDError                 exit 1   says what is wrong, where, and what to do next
├── SpecError                 exit 2   a preset, recipe or embedded configuration that does not fit
├── UsageError                exit 2   arguments that do not fit together, or a path that is not ours
├── CheckpointError           exit 1   a checkpoint that cannot be read, or does not match its configuration
├── RewriteError              exit 1   a rewrite whose condition fails, or that changed the outputs
├── ExportError               exit 1   a graph that cannot be exported, checked or simplified
├── ParityError               exit 1   outputs that differ more than the recipe's floor allows
├── ArtifactError             exit 1   an artifact that is damaged, incomplete or of another version
├── MediaError                exit 1   a picture or clip that cannot be read or written
├── ResourceError             exit 1   not enough disk or memory
└── VendorError               exit 3   a vendor's tool or service failed
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import islice

_SHOWN = 8


def listed(faults: Collection[str]) -> str:
    """Return the first faults below each other, indented, and how many more there are."""
    lines = [*islice(faults, _SHOWN)]
    if rest := len(faults) - len(lines):
        lines.append(f"and {rest} more")
    return "".join(f"\n  {line}" for line in lines)


class MobileVDError(Exception):
    """Base of all errors here: `what` is wrong (with its place), `next_step` is what to do."""

    exit_code = 1

    def __init__(self, what: str, *, next_step: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.next_step = next_step

    def __str__(self) -> str:
        return self.what if self.next_step is None else f"{self.what}\n  next: {self.next_step}"


class SpecError(MobileVDError):
    """A preset, recipe or embedded configuration that does not fit."""

    exit_code = 2


class UsageError(MobileVDError):
    """Arguments that do not fit together, or a path that is not ours."""

    exit_code = 2


class CheckpointError(MobileVDError):
    """A checkpoint that cannot be read, or does not match its configuration."""


class RewriteError(MobileVDError):
    """A rewrite whose condition fails, or that changed the outputs."""


class ExportError(MobileVDError):
    """A graph that cannot be exported, checked or simplified."""


class ParityError(MobileVDError):
    """Outputs that differ more than the recipe's floor allows."""


class ArtifactError(MobileVDError):
    """An artifact that is damaged, incomplete or of another version."""


class MediaError(MobileVDError):
    """A picture or clip that cannot be read or written."""


class ResourceError(MobileVDError):
    """Not enough disk or memory."""


class VendorError(MobileVDError):
    """A vendor's tool or service failed."""

    exit_code = 3
