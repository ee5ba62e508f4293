"""Presets of models/: architectures by name, and their rows in the paper's ablation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mobilevd_deploy.config.recipe import PassName
from mobilevd_deploy.config.spec import ModelSpec
from mobilevd_deploy.config.strict import from_dict, read_named_toml, shipped_names
from mobilevd_deploy.errors import SpecError


@dataclass(frozen=True)
class LadderRow:
    """A row of the paper's ablation, as published. `phone_ms` is -1 if the paper gives none (out of memory).

    `tflops`: one UNet evaluation at batch 1. `nfe`: evaluations per clip. `gpu_ms`, `phone_ms`: latency of
    one evaluation. `rewrites`: the passes that these numbers include. Source: arXiv 2412.07583.
    """

    order: int
    title: str
    tflops: float
    nfe: int
    fvd: tuple[int, ...]
    gpu_ms: float
    phone_ms: float = -1.0
    rewrites: tuple[PassName, ...] = ()


@dataclass(frozen=True)
class Preset:
    """An architecture of models/, and its row of the published ablation if it has one."""

    model: ModelSpec
    ladder: LadderRow | None = None

    @property
    def rewrites(self) -> tuple[PassName, ...]:
        """Passes that the preset's counts include: the row's own, else `structural_rewrites`."""
        return self.ladder.rewrites if self.ladder else structural_rewrites()


def preset_names() -> list[str]:
    """Return the names of the shipped presets."""
    return shipped_names("models")


def load_preset(name_or_path: str | Path) -> Preset:
    """Read a preset by its name or by the path of a TOML file.

    If it names another preset as `base`, its tables are merged over the base's tables.
    Raises SpecError for an unknown name, unreadable TOML, an unknown key or an invalid value.
    """
    values = _read_preset(name_or_path)
    ladder = values.pop("ladder", None)
    model = from_dict(ModelSpec, {"name": Path(name_or_path).stem} | values)
    return Preset(model, from_dict(LadderRow, ladder, "ladder") if ladder else None)


@cache
def structural_rewrites() -> tuple[PassName, ...]:
    """Passes of the published ablation's last row: MobileVD's own; all other passes fold constants."""
    ladder = load_preset("mobilevd").ladder
    assert ladder is not None  # a test holds the table
    return ladder.rewrites


def _read_preset(name_or_path: str | Path, heirs: tuple[str, ...] = ()) -> dict[str, Any]:
    values = read_named_toml("models", "preset", name_or_path)
    base = values.pop("base", None)
    if base is None:
        return values
    heirs = (*heirs, str(name_or_path))
    if not isinstance(base, str) or base in heirs:
        raise SpecError(f"{name_or_path}: base {base!r} is not the name of another preset")
    inherited = _read_preset(base, heirs)
    inherited.pop("ladder", None)
    return _merge(inherited, values)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merge(base[key], value) if both else value
    return merged
