"""Comparison of two artifacts."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mobilevd_deploy.artifact.artifact import Artifact


@dataclass(frozen=True)
class DiffRow:
    """One quantity of two artifacts `a` and `b`; `component` None means the whole artifact.

    `quantity` is "bytes", "parameters", "flops", "ops.<type>", "drift_db.<stage>" or "ms.<source>.<device>".
    A value is None if the artifact does not have the quantity; a drift of inf means identical outputs.
    `a_error_percent` and `b_error_percent` are given for estimates only.
    """

    component: str | None
    quantity: str
    a: float | None
    b: float | None
    a_error_percent: float | None = None
    b_error_percent: float | None = None


def diff(a: Artifact, b: Artifact) -> tuple[DiffRow, ...]:
    """Compare two artifacts: totals first, then each component. Equal rows are included."""
    before, after = _quantities(a), _quantities(b)
    keys = dict.fromkeys([*before, *after])
    components = dict.fromkeys(component for component, _ in keys)
    return tuple(
        DiffRow(*key, before.get(key), after.get(key))
        for component in components
        for key in keys
        if key[0] == component
    )


def _quantities(artifact: Artifact) -> dict[tuple[str | None, str], float]:
    manifest = artifact.manifest
    rows: dict[tuple[str | None, str], float] = {
        (None, "bytes"): artifact.bytes,
        (None, "parameters"): sum(c.parameters for c in manifest.components),
        (None, "flops"): sum(c.flops for c in manifest.components),
    }
    for c in manifest.components:
        rows |= {(c.name, "bytes"): c.bytes, (c.name, "parameters"): c.parameters, (c.name, "flops"): c.flops}
        rows |= {(c.name, f"ops.{kind}"): count for kind, count in sorted(c.ops.items())}
        for stage, values in manifest.drift.items():
            if c.name in values:
                value = values[c.name]
                rows[c.name, f"drift_db.{stage}"] = math.inf if value is None else value
    return rows
