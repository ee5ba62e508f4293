"""Standard-normal noise that any language reproduces bit by bit: "splitmix64-as241-v1".

This docstring is the specification. Numbers are IEEE 754 binary64 ("double") unless said otherwise, every
operation rounds once to nearest-even, and products and sums are never fused. Integers are unsigned 64-bit
and wrap around; >> is a logical shift. The value at `index` depends on (seed, stream, index) alone.

 1. Inputs: `seed` in [0, 2^64), `stream` in [0, 2^32), `index` in [0, 2^48): the element's position in the
    tensor in row-major order (last axis fastest). The tensor's shape has no other influence.
 2. G = 0x9E3779B97F4A7C15. mix(z):  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB;  return z ^ (z >> 31).
 3. key = mix(mix(seed + G) + (stream + 1) * G);  word = mix(key + (index + 1) * G). So the words of a stream
    are the outputs of SplitMix64 started in state `key`.
 4. u = (2 * (word >> 12) + 1) * 2^-53: an odd multiple of 2^-53 in (0, 1), exact.
 5. q = u - 0.5, exact. If |q| <= 0.425: r = 0.180625 - q * q and x = (q * A(r)) / B(r).
 6. Otherwise p = u if q < 0, else 1 - u (exact); r = sqrt(-log(p)) with the log of step 8.
    If r <= 5: x = C(r - 1.6) / D(r - 1.6); otherwise x = E(r - 5) / F(r - 5). If q < 0, x = -x.
 7. A to F are the degree-7 polynomials of `_CENTRAL`, `_MIDDLE` and `_FAR` (numerator, denominator), highest
    power first, by Horner: value = c[0]; then value = value * r + c[i] for i = 1 to 7.
 8. log(p): p = m * 2^e with m in [0.5, 1), from p's exponent bits; if m < 0.7071067811865476: m = m + m,
    e = e - 1. s = (m - 1) / (m + 1); t = s * s; value = 1/23; then value = value * t + 1/k for
    k = 21, 19, ..., 3, 1 (each 1/k rounded to double); log(p) = e * 0.6931471805599453 + (2 * s) * value.
    A language's own log must not be used: they differ in the last bit.
 9. The noise is x rounded to IEEE binary32, nearest-even.

Sources: SplitMix64: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014. Inverse
normal distribution function: Wichura, algorithm AS 241 (PPND16), Applied Statistics 37, 1988. Test vectors:
tests/vectors/noise.json.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mobilevd_deploy.errors import UsageError

GENERATOR = "splitmix64-as241-v1"
SEEDS = 2**64
STREAMS = 2**32

_GAMMA = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1

_CENTRAL = (
    (
        2509.0809287301226727,
        33430.575583588128105,
        67265.770927008700853,
        45921.953931549871457,
        13731.693765509461125,
        1971.5909503065514427,
        133.14166789178437745,
        3.387132872796366608,
    ),
    (
        5226.495278852545925,
        28729.085735721942674,
        39307.89580009271061,
        21213.794301586595867,
        5394.1960214247511077,
        687.1870074920579083,
        42.313330701600911252,
        1.0,
    ),
)
_MIDDLE = (
    (
        7.7454501427834140764e-4,
        0.0227238449892691845833,
        0.24178072517745061177,
        1.27045825245236838258,
        3.64784832476320460504,
        5.7694972214606914055,
        4.6303378461565452959,
        1.42343711074968357734,
    ),
    (
        1.05075007164441684324e-9,
        5.475938084995344946e-4,
        0.0151986665636164571966,
        0.14810397642748007459,
        0.68976733498510000455,
        1.6763848301838038494,
        2.05319162663775882187,
        1.0,
    ),
)
_FAR = (
    (
        2.01033439929228813265e-7,
        2.71155556874348757815e-5,
        0.0012426609473880784386,
        0.026532189526576123093,
        0.29656057182850489123,
        1.7848265399172913358,
        5.4637849111641143699,
        6.6579046435011037772,
    ),
    (
        2.04426310338993978564e-15,
        1.4215117583164458887e-7,
        1.8463183175100546818e-5,
        7.868691311456132591e-4,
        0.0148753612908506148525,
        0.13692988092273580531,
        0.59983220655588793769,
        1.0,
    ),
)


def unit_noise(seed: int, stream: int, shape: Sequence[int]) -> npt.NDArray[np.float32]:
    """Return standard-normal noise of `shape`, float32, by the specification above.

    Raises UsageError for a seed outside [0, 2^64) or a stream outside [0, 2^32).
    """
    return inverse_normal_cdf(uniform(seed, stream, shape)).astype(np.float32)


def uniform(seed: int, stream: int, shape: Sequence[int]) -> npt.NDArray[np.float64]:
    """Return the u of step 4 for every index of `shape`, float64 in (0, 1). Errors as in `unit_noise`."""
    for name, value, end in (("seed", seed, SEEDS), ("noise stream", stream, STREAMS)):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < end:
            raise UsageError(f"{name}: {value!r} is not an integer from 0 to {end - 1}")
    key = _mix(_mix(_word(seed + _GAMMA)) + _word((stream + 1) * _GAMMA))
    index = np.arange(1, math.prod(shape) + 1, dtype=np.uint64)
    word = _mix(key + index * np.uint64(_GAMMA))
    odd = (word >> np.uint64(12)) * np.uint64(2) + np.uint64(1)
    return (odd.astype(np.float64) * 2.0**-53).reshape(tuple(shape))


def inverse_normal_cdf(u: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return x with P(N(0, 1) <= x) = u, float64, by steps 5 to 8. `u` is float64 in (0, 1), any shape."""
    q = u - 0.5
    central = np.abs(q) <= 0.425
    x = np.empty_like(u)

    inner = q[central]
    x[central] = _ratio(_CENTRAL, 0.180625 - inner * inner, scale=inner)

    outer = q[~central]
    tail = np.where(outer < 0, u[~central], 1.0 - u[~central])
    r = np.sqrt(-_log(tail))
    value = np.where(r <= 5.0, _ratio(_MIDDLE, r - 1.6), _ratio(_FAR, r - 5.0))
    x[~central] = np.where(outer < 0, -value, value)
    return x


def _word(value: int) -> npt.NDArray[np.uint64]:
    # One-element arrays wrap around in silence; numpy scalars would warn.
    return np.array([value & _MASK], dtype=np.uint64)


def _mix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _horner(coefficients: Sequence[float], r: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    # Separate numpy calls, so that no compiler can fuse a product with the sum after it.
    value = np.full_like(r, coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * r
        value = value + coefficient
    return value


def _ratio(
    polynomials: tuple[Sequence[float], Sequence[float]],
    r: npt.NDArray[np.float64],
    scale: npt.NDArray[np.float64] | None = None,
) -> npt.NDArray[np.float64]:
    numerator = _horner(polynomials[0], r)
    if scale is not None:
        numerator = scale * numerator
    return numerator / _horner(polynomials[1], r)


def _log(p: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    mantissa, exponent = np.frexp(p)
    low = mantissa < 0.7071067811865476
    mantissa = np.where(low, mantissa + mantissa, mantissa)
    e = np.where(low, exponent - 1, exponent).astype(np.float64)
    s = (mantissa - 1.0) / (mantissa + 1.0)
    series = _horner([1.0 / k for k in range(23, 0, -2)], s * s)
    return e * 0.6931471805599453 + (2.0 * s) * series
