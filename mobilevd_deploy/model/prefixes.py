"""Names as training code leaves them: wrappers' segments, and the dictionaries that weights lie in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from mobilevd_deploy.errors import CheckpointError

T = TypeVar("T")

# DistributedDataParallel and FSDP, torch.compile, DeepSpeed, activation checkpointing.
_WRAPPERS = frozenset(
    ("module", "_orig_mod", "_fsdp_wrapped_module", "_forward_module", "_checkpoint_wrapped_module")
)


def without_wrappers(entries: Mapping[str, T], where: str, notice: Callable[[str], None]) -> dict[str, T]:
    """Return entries without the segments that wrappers of modules add to names, anywhere in a name.

    Gives one line of notice. Raises CheckpointError: two names become one.
    """
    stripped: dict[str, T] = {}
    found: dict[str, int] = {}
    for name, entry in entries.items():
        segments = name.split(".")
        for segment in _WRAPPERS.intersection(segments):
            found[segment] = found.get(segment, 0) + 1
        plain = ".".join(segment for segment in segments if segment not in _WRAPPERS)
        if plain in stripped:
            raise CheckpointError(f"{where}: {plain} is there twice, with and without a wrapper's prefix")
        stripped[plain] = entry
    if found:
        dropped = ", ".join(f"'{segment}.' from {count} names" for segment, count in sorted(found.items()))
        notice(f"{where}: dropped {dropped}")
    return stripped


def roots(names: Iterable[str], anchor: str) -> list[str]:
    """Return what stands before `anchor` in the names that end with it: "" or a prefix with its dot."""
    return sorted(
        name.removesuffix(anchor) for name in names if name == anchor or name.endswith("." + anchor)
    )


def choose_root(found: list[str], where: str, notice: Callable[[str], None]) -> str:
    """Choose one of several copies of a network: averaged weights (EMA) first, then the shortest prefix."""
    chosen = min(found, key=lambda root: ("ema" not in root.lower(), len(root)))
    if len(found) > 1:
        shown = ", ".join(repr(root) for root in found)
        notice(f"{where}: holds {len(found)} sets of weights ({shown}); {chosen!r} is read")
    return chosen


def below(entries: Mapping[str, T], root: str) -> dict[str, T]:
    """Return the entries whose names begin with `root`, without it."""
    return {name.removeprefix(root): entry for name, entry in entries.items() if name.startswith(root)}
