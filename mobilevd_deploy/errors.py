"""All errors that the toolkit raises on purpose.

MobileVDError                 exit 1   base class: says what is wrong, where, and what to do next
├── SpecError                 exit 2   an invalid preset, recipe or embedded configuration
├── UsageError                exit 2   invalid arguments, or an output path that the toolkit did not create
├── CheckpointError           exit 1   a checkpoint that cannot be read, or does not match its configuration
├── RewriteError              exit 1   a rewrite whose condition is not met, or that changed the outputs
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
    """Return the first 8 faults as indented lines, and the number of the others."""
    lines = [*islice(faults, _SHOWN)]
    if rest := len(faults) - len(lines):
        lines.append(f"and {rest} more")
    return "".join(f"\n  {line}" for line in lines)


class MobileVDError(Exception):
    """Base class: `what` says what is wrong and where, `next_step` what to do about it."""

    exit_code = 1

    def __init__(self, what: str, *, next_step: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.next_step = next_step

    def __str__(self) -> str:
        return self.what if self.next_step is None else f"{self.what}\n  next: {self.next_step}"


class SpecError(MobileVDError):
    """An invalid preset, recipe or embedded configuration."""

    exit_code = 2


class UsageError(MobileVDError):
    """Invalid arguments, or an output path that the toolkit did not create."""

    exit_code = 2


class CheckpointError(MobileVDError):
    """A checkpoint that cannot be read, or does not match its configuration."""


class RewriteError(MobileVDError):
    """A rewrite whose condition is not met, or that changed the outputs."""


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
