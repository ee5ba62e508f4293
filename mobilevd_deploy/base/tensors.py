"""Arrays by name, and the signal-to-noise ratios that compare two arrays."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from mobilevd_deploy.errors import UsageError

Tensors = dict[str, npt.NDArray[np.generic]]


def sqnr_db(reference: npt.ArrayLike, test: npt.ArrayLike) -> float:
    """Return 10 log10(sum(reference^2) / sum((test - reference)^2)) in dB, computed in float64.

    inf if both are equal (also if both are zero or empty). -inf if the reference alone is all zero, or if
    `test` holds NaN or Inf. Raises UsageError if the shapes differ or the reference holds NaN or Inf.
    """
    signal, error = _signal_and_error(reference, test)
    return _ratio_db(float(np.sum(signal * signal)), float(np.sum(error * error)))


def psnr_db(reference: npt.ArrayLike, test: npt.ArrayLike, peak: float) -> float:
    """Return 10 log10(peak^2 / mean((test - reference)^2)) in dB, computed in float64.

    `peak` is the width of the value range: 2 for [-1, 1], 255 for 8 bits. inf, -inf and errors are those of
    `sqnr_db`; UsageError also if the peak is not positive.
    """
    if not (peak > 0 and math.isfinite(peak)):
        raise UsageError(f"peak: {peak} is not a positive number")
    _, error = _signal_and_error(reference, test)
    return _ratio_db(peak * peak * error.size, float(np.sum(error * error)))


def decibels(value: float | None) -> str:
    """Format an SQNR or PSNR: "31.2 dB"; None and infinity mean equal signals: "identical"."""
    return "identical" if value is None or value == math.inf else f"{value:.1f} dB"


def _signal_and_error(
    reference: npt.ArrayLike, test: npt.ArrayLike
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    signal, other = np.asarray(reference, dtype=np.float64), np.asarray(test, dtype=np.float64)
    if signal.shape != other.shape:
        raise UsageError(f"shapes differ: reference {signal.shape}, test {other.shape}")
    if not np.isfinite(signal).all():
        raise UsageError("the reference holds NaN or Inf, so nothing can be compared with it")
    with np.errstate(invalid="ignore"):
        return signal, other - signal


def _ratio_db(signal: float, error: float) -> float:
    if not math.isfinite(error):
        return -math.inf
    if error == 0:
        return math.inf
    return 10 * (math.log10(signal) - math.log10(error)) if signal else -math.inf


Array = npt.NDArray[Any]
