"""Calibrate the latency estimate: writes profiling/latency.json and results/estimate_calibration.json.

    python benchmarks/estimate_calibration.py

Counts the operations of the published structures on module trees without weights (one minute, no downloads).
Compares forms of the estimate by their leave-one-out error: each row is predicted from the other three. The
traffic of Stable Diffusion's UNet is the lowest in sd15_traffic.py's result; that of `mobilevd` is from
unet_traffic.py. Rows of the ablation that differ in weights only count once, so that no row predicts itself.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import sd15_traffic
import unet_traffic
from _common import RESULTS, write_result
from rich.console import Console
from rich.table import Table

import mobilevd_deploy
from mobilevd_deploy.config.devices import table
from mobilevd_deploy.config.presets import load_preset
from mobilevd_deploy.config.spec import FunnelSpec, ModelSpec
from mobilevd_deploy.profiling.estimate import (
    Calibration,
    Counts,
    Row,
    count_module,
    count_operations,
    estimate_counts,
)
from mobilevd_deploy.qnn.compiled import DramBytes

Vector = npt.NDArray[np.float64]
ROWS = ("svd-onestep", "mobilevd-multiscale", "mobilevd-pruned", "mobilevd")
FITTED = "one rate, attention counts twice"
NOTES = (
    "svd-crossattn is svd-onestep with other weights, at the same published latency: one point, not two.",
    "The ablation's 'spatial multiscaling' (2280 ms) is left out: the paper does not give its structure.",
    "'matrix products only' predicts these four rows best and is refused: it lets convolutions cost nothing, "
    "so a network with narrower convolutions would not get faster.",
    "Two fitted numbers: the one of attention moves between the fits by more than a factor of two.",
)


def main() -> None:
    """Count, fit, compare, write and print."""
    rows = tuple(_row(name) for name in ROWS)
    model = load_preset(ROWS[0]).model
    unet, inputs = sd15_traffic.sd15_on_meta()
    plans = _result(sd15_traffic.NAME)["query_tiles"].values()
    moved = min((plan["sum"] for plan in plans), key=lambda total: total["read"] + total["written"])
    calibration = Calibration(
        chip="Snapdragon 8 Gen 3",
        frames=model.frames,
        width=model.width,
        height=model.height,
        source="arXiv 2412.07583, ablation: phone latency of one evaluation, Xiaomi 14 Pro",
        rows=rows,
        sd15=count_module(unet, unet, *inputs),
        sd15_moved=DramBytes(moved["read"], moved["written"]),
    )
    path = Path(mobilevd_deploy.__file__).parent / "profiling" / "latency.json"
    path.write_text(json.dumps(dataclasses.asdict(calibration), indent=2) + "\n", encoding="utf-8")

    errors, rate = calibration.leave_one_out(), calibration.rate()
    left_out = [
        {
            "preset": row.preset,
            "tflops": row.counts.total / 1e12,
            "published_ms": row.published_ms,
            "leave_one_out_ms": row.published_ms * (1 + errors[row.preset]),
            "leave_one_out_error": errors[row.preset],
            "fitted_ms": rate * sum(row.counts.weighted().values()),
        }
        for row in rows
    ]
    forms = _compare_forms(rows)
    unseen = _unseen(calibration)
    sd15 = sum(calibration.sd15.weighted().values())
    sd15_ms = next(c for c in table().chip if c.name == calibration.chip).published_ms["sd15_unet"]
    values = {
        "chip": calibration.chip,
        "ms_per_weighted_tflop": rate * 1e12,
        "mean_leave_one_out_error": float(np.mean(np.abs(list(errors.values())))),
        "worst_leave_one_out_error": max(abs(error) for error in errors.values()),
        "rows": left_out,
        "forms": forms,
        "unseen": unseen,
        "sd15_unet": {
            "tflops": calibration.sd15.total / 1e12,
            "published_ms": sd15_ms,
            "ms_per_weighted_tflop": sd15_ms / sd15 * 1e12,
        },
        "notes": list(NOTES),
    }
    write_result("estimate_calibration", values)
    _print(values)


def _row(name: str) -> Row:
    preset = load_preset(name)
    assert preset.ladder is not None
    counted = _result(unet_traffic.NAME)
    moved = None
    if name == counted["preset"]:
        blocks = counted["blocks"]["w8a16"]["ours"].values()
        moved = sum((DramBytes(block["read"], block["written"]) for block in blocks), DramBytes())
    return Row(name, preset.ladder.phone_ms, count_operations(preset.model, preset.rewrites), moved)


def _result(name: str) -> dict[str, Any]:
    """Read what another benchmark has written."""
    return cast(dict[str, Any], json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")))


def _compare_forms(rows: tuple[Row, ...]) -> list[dict[str, Any]]:
    """Return leave-one-out errors and fitted values of other forms of the estimate."""
    published = np.array([row.published_ms for row in rows])
    counts = {name: np.array([getattr(r.counts, name) / 1e12 for r in rows]) for name in _kinds()}
    attention = counts["spatial_attention"] + counts["temporal_attention"]
    linear = counts["spatial_linear"] + counts["temporal_linear"]
    convolution = counts["spatial_convolution"] + counts["temporal_convolution"]
    forms = {
        "one rate, all operations alike": [linear + convolution + attention],
        FITTED: [linear + convolution + 2 * attention],
        "one rate, attention counts four times": [linear + convolution + 4 * attention],
        "two rates: layers with weights, attention": [linear + convolution, attention],
        "two rates: convolutions, matrix products": [convolution, linear + attention],
        "matrix products only": [linear + attention],
    }
    result = []
    for name, features in forms.items():
        matrix = np.stack(features, 1)
        errors, fits = [], []
        for i in range(len(rows)):
            others = [j for j in range(len(rows)) if j != i]
            fit = _nonnegative(matrix[others], published[others])
            errors.append(float(matrix[i] @ fit / published[i] - 1))
            fits.append(fit.tolist())
        mean = float(np.mean(np.abs(errors)))
        result.append({"form": name, "mean_error": mean, "errors": errors, "ms_per_tflop": fits})
    return result


def _nonnegative(matrix: Vector, target: Vector) -> Vector:
    """Fit by least squares of relative errors with coefficients >= 0: the best subset of columns."""
    scaled, ones = matrix / target[:, None], np.ones(len(target))
    best, residual = np.zeros(matrix.shape[1]), np.inf
    for size in range(1, matrix.shape[1] + 1):
        for columns in itertools.combinations(range(matrix.shape[1]), size):
            fit = np.linalg.lstsq(scaled[:, columns], ones, rcond=None)[0]
            error = float(np.sum((scaled[:, columns] @ fit - ones) ** 2))
            if (fit >= 0).all() and error < residual:
                best, residual = np.zeros(matrix.shape[1]), error
                best[list(columns)] = fit
    return best


def _unseen(calibration: Calibration) -> list[dict[str, Any]]:
    """Return estimates for structures that the paper does not list, as a plausibility check."""
    chip = next(c for c in table().chip if c.name == calibration.chip)
    result = []
    for title, spec in _unseen_specs().items():
        counts = count_operations(spec, load_preset("mobilevd").rewrites)
        found = estimate_counts(counts, chip, calibration)
        result.append(
            {
                "structure": title,
                "tflops": found.tflops,
                "ms": found.ms,
                "error_percent": found.error_percent,
                "warnings": list(found.warnings),
            }
        )
    return result


def _unseen_specs() -> dict[str, ModelSpec]:
    def funnels(preset: str, funnels: FunnelSpec) -> ModelSpec:
        model = load_preset(preset).model
        return dataclasses.replace(model, unet=dataclasses.replace(model.unet, funnels=funnels))

    return {
        "multiscaled, funnels on attention only, nothing pruned": funnels(
            "mobilevd-multiscale", FunnelSpec(0.5, 0.5, 1.0)
        ),
        "MobileVD with funnels in the resblocks": funnels("mobilevd", FunnelSpec(0.5, 1.0, 0.5)),
        "MobileVD with attention of rank 1/4": funnels("mobilevd", FunnelSpec(0.25, 0.25, 1.0)),
    }


def _kinds() -> list[str]:
    return [field.name for field in dataclasses.fields(Counts)]


def _print(values: Mapping[str, Any]) -> None:
    console = Console(width=120)
    grid = Table("row", "TFLOPs", "published ms", "left out ms", "error", "fitted ms")
    for row in values["rows"]:
        grid.add_row(
            row["preset"],
            f"{row['tflops']:.3f}",
            f"{row['published_ms']:.0f}",
            f"{row['leave_one_out_ms']:.0f}",
            f"{row['leave_one_out_error']:+.1%}",
            f"{row['fitted_ms']:.0f}",
        )
    forms = Table("form", "mean error", "errors, row by row")
    for form in values["forms"]:
        forms.add_row(
            form["form"], f"{form['mean_error']:.1%}", " ".join(f"{e:+.1%}" for e in form["errors"])
        )
    unseen = Table("never seen", "TFLOPs", "ms", "warnings")
    for row in values["unseen"]:
        unseen.add_row(
            row["structure"], f"{row['tflops']:.2f}", f"{row['ms']:.0f}", "; ".join(row["warnings"])
        )
    console.print(grid, forms, unseen, *values["notes"])


if __name__ == "__main__":
    main()
