"""Fixed inputs, the outputs they should give, and how far a test is from its reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mobilevd_deploy.artifact import TensorSpec
from mobilevd_deploy.errors import UsageError
from mobilevd_deploy.noise import uniform, unit_noise

Tensors = dict[str, npt.NDArray[np.generic]]


@dataclass(frozen=True)
class Probe:
    """Inputs by name, and the outputs that the trained network gives for them."""

    inputs: Tensors
    reference: Tensors

    def drift(self, outputs: Mapping[str, npt.ArrayLike]) -> float:
        """Return the SQNR in dB of the worst of `outputs` against the reference; names must be equal."""
        if set(outputs) != set(self.reference):
            raise UsageError(f"outputs {sorted(outputs)} are not the reference's {sorted(self.reference)}")
        return min(sqnr_db(reference, outputs[name]) for name, reference in self.reference.items())


def make_probe(
    inputs: Sequence[TensorSpec],
    seed: int,
    reference: Callable[[Tensors], Mapping[str, npt.ArrayLike]],
    given: Mapping[str, npt.NDArray[np.generic]] | None = None,
) -> Probe:
    """Make inputs from `seed`, run `reference` on them and keep both.

    Inputs in `given` are taken from there. Of the others, input i uses noise stream i: uniform over the
    spec's range where it has one, standard normal otherwise.
    """
    values: Tensors = {}
    for stream, spec in enumerate(inputs):
        if given is not None and spec.name in given:
            value: npt.NDArray[np.generic] = given[spec.name]
        elif spec.range is None:
            value = unit_noise(seed, stream, spec.shape)
        else:
            low, high = spec.range
            value = low + (high - low) * uniform(seed, stream, spec.shape)
        values[spec.name] = value.astype(spec.dtype)
    return Probe(values, {name: np.asarray(value) for name, value in reference(values).items()})


def sqnr_db(reference: npt.ArrayLike, test: npt.ArrayLike) -> float:
    """Return 10 log10(sum(reference^2) / sum((test - reference)^2)) in dB, computed in float64.

    inf where both are equal (zero or empty included), -inf where only the reference is zero everywhere or
    `test` holds NaN or Inf. Raises UsageError for different shapes, or NaN or Inf in the reference.
    """
    signal, error = _signal_and_error(reference, test)
    return _ratio_db(float(np.sum(signal * signal)), float(np.sum(error * error)))


def psnr_db(reference: npt.ArrayLike, test: npt.ArrayLike, peak: float) -> float:
    """Return 10 log10(peak^2 / mean((test - reference)^2)) in dB, computed in float64.

    `peak` is the width of the value range: 2 for [-1, 1], 255 for 8 bits. inf, -inf and errors as `sqnr_db`;
    a peak that is not positive raises UsageError too.
    """
    if not (peak > 0 and math.isfinite(peak)):
        raise UsageError(f"peak: {peak} is not a positive number")
    _, error = _signal_and_error(reference, test)
    return _ratio_db(peak * peak * error.size, float(np.sum(error * error)))


def _signal_and_error(
    reference: npt.ArrayLike, test: npt.ArrayLike
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    signal, other = np.asarray(reference, dtype=np.float64), np.asarray(test, dtype=np.float64)
    if signal.shape != other.shape:
        raise UsageError(f"shapes differ: reference {signal.shape}, test {other.shape}")
    if not np.isfinite(signal).all():
        raise UsageError("the reference holds NaN or Inf: nothing can be compared with it")
    with np.errstate(invalid="ignore"):
        return signal, other - signal


def _ratio_db(signal: float, error: float) -> float:
    if not math.isfinite(error):
        return -math.inf
    if error == 0:
        return math.inf
    return 10 * (math.log10(signal) - math.log10(error)) if signal else -math.inf
