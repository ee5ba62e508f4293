"""What AI Hub returns, as profiles and comparisons."""

from __future__ import annotations

from typing import Any

import numpy as np

from mobilevd_deploy.base.tensors import Array, sqnr_db
from mobilevd_deploy.errors import SpecError, UsageError
from mobilevd_deploy.profiling.profile import ComponentProfile, Latency, OpTime, OutputCheck

SLOWEST = 5


def single(values: Any) -> Array:
    """Return the output of an inference job on one set of inputs. Raises UsageError for none or several."""
    if not isinstance(values, list) or len(values) != 1:
        raise UsageError("the device gave no output, or several")
    return np.asarray(values[0])


def compare(reference: Array, output: Array) -> OutputCheck:
    """Compare an output with this computer's. Raises UsageError for other dtypes, NaN and Inf."""
    if output.dtype.kind not in "fiu":
        raise UsageError(f"the device's output is {output.dtype}")
    if not np.isfinite(output).all():
        raise UsageError("the device's output holds NaN or Inf")
    value = sqnr_db(reference, output)
    return OutputCheck(value if np.isfinite(value) else None)


def read_result(component: str, result: Any) -> ComponentProfile:
    """Read the client's result of a finished profile job (times in us, memory in bytes).

    Raises SpecError if it has another form or no samples.
    """
    summary = _part(result, "execution_summary", dict)
    samples = [_number(value, "all_inference_times") for value in _part(summary, "all_inference_times", list)]
    peaks = summary.get("inference_memory_peak_range") or (
        None,
        summary.get("estimated_inference_peak_memory"),
    )
    ops: dict[str, int] = {}
    times = []
    for op in _part(result, "execution_detail", list):
        unit = str(_part(op, "compute_unit", str))
        ops[unit] = ops.get(unit, 0) + 1
        if op.get("execution_time") is not None:
            ms = _number(op["execution_time"], "execution_time") / 1000
            times.append(OpTime(str(op.get("name")), str(op.get("type")), unit, ms))
    order = ("NPU", "GPU", "CPU")
    return ComponentProfile(
        component,
        Latency.of([value / 1000 for value in samples]),
        first_load_ms=_milliseconds(summary.get("first_load_time"), "first_load_time"),
        warm_load_ms=_milliseconds(summary.get("warm_load_time"), "warm_load_time"),
        peak_bytes=None if peaks[1] is None else int(_number(peaks[1], "peak memory")),
        ops={unit: ops[unit] for unit in sorted(ops, key=lambda u: order.index(u) if u in order else 3)},
        slowest=tuple(sorted(times, key=lambda op: -op.ms)[:SLOWEST]),
    )


def _part(values: Any, key: str, kind: type) -> Any:
    found = values.get(key) if isinstance(values, dict) else None
    if not isinstance(found, kind):
        raise SpecError(f"there is no {key}")
    return found


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
        raise SpecError(f"{what}: {value!r} is not a measurement")
    return float(value)


def _milliseconds(value: Any, what: str) -> float | None:
    # The protocol does not distinguish 0 from an unset value.
    return _number(value, what) / 1000 if value else None
