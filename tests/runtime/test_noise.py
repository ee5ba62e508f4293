from __future__ import annotations

import json
import math
import struct
from statistics import NormalDist

import numpy as np
import pytest

from mobilevd_deploy.errors import UsageError
from mobilevd_deploy.runtime.noise import GENERATOR, inverse_normal_cdf, uniform, unit_noise
from tests.support import ROOT

VECTORS = json.loads((ROOT / "tests" / "vectors" / "noise.json").read_text())

# An independent implementation of the specification: Python integers and floats, one value at a time.

G = 0x9E3779B97F4A7C15
A = [2509.0809287301226727, 33430.575583588128105, 67265.770927008700853, 45921.953931549871457,
     13731.693765509461125, 1971.5909503065514427, 133.14166789178437745, 3.387132872796366608]  # fmt: skip
B = [5226.495278852545925, 28729.085735721942674, 39307.89580009271061, 21213.794301586595867,
     5394.1960214247511077, 687.1870074920579083, 42.313330701600911252, 1.0]  # fmt: skip
C = [7.7454501427834140764e-4, 0.0227238449892691845833, 0.24178072517745061177, 1.27045825245236838258,
     3.64784832476320460504, 5.7694972214606914055, 4.6303378461565452959,
     1.42343711074968357734]  # fmt: skip
D = [1.05075007164441684324e-9, 5.475938084995344946e-4, 0.0151986665636164571966, 0.14810397642748007459,
     0.68976733498510000455, 1.6763848301838038494, 2.05319162663775882187, 1.0]  # fmt: skip
E = [2.01033439929228813265e-7, 2.71155556874348757815e-5, 0.0012426609473880784386, 0.026532189526576123093,
     0.29656057182850489123, 1.7848265399172913358, 5.4637849111641143699, 6.6579046435011037772]  # fmt: skip
F = [2.04426310338993978564e-15, 1.4215117583164458887e-7, 1.8463183175100546818e-5, 7.868691311456132591e-4,
     0.0148753612908506148525, 0.13692988092273580531, 0.59983220655588793769, 1.0]  # fmt: skip


def wrap(value):
    return value % 2**64


def mix(z):
    z = wrap((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9)
    z = wrap((z ^ (z >> 27)) * 0x94D049BB133111EB)
    return z ^ (z >> 31)


def polynomial(coefficients, r):
    value = coefficients[0]
    for coefficient in coefficients[1:]:
        value = value * r
        value = value + coefficient
    return value


def log(p):
    m, e = p, 0
    while m < 0.5:
        m, e = m * 2.0, e - 1
    if m < 0.7071067811865476:
        m, e = m + m, e - 1
    s = (m - 1.0) / (m + 1.0)
    series = polynomial([1.0 / k for k in (23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1)], s * s)
    return e * 0.6931471805599453 + (2.0 * s) * series


def scalar_noise(seed, stream, index):
    key = mix(wrap(mix(wrap(seed + G)) + (stream + 1) * G))
    word = mix(wrap(key + (index + 1) * G))
    return np.float32(scalar_inverse((2 * (word >> 12) + 1) / 2**53))


def scalar_inverse(u):
    q = u - 0.5
    if abs(q) <= 0.425:
        r = 0.180625 - q * q
        return q * polynomial(A, r) / polynomial(B, r)
    r = math.sqrt(-log(u if q < 0 else 1.0 - u))
    if r <= 5:
        x = polynomial(C, r - 1.6) / polynomial(D, r - 1.6)
    else:
        x = polynomial(E, r - 5) / polynomial(F, r - 5)
    return -x if q < 0 else x


def bits(values) -> list[str]:
    return [
        f"{word:08x}" for word in np.asarray(values, dtype=np.float32).reshape(-1).view(np.uint32).tolist()
    ]


def test_the_generator_is_named():
    assert VECTORS["generator"] == GENERATOR == "splitmix64-as241-v1"


@pytest.mark.parametrize("vector", VECTORS["vectors"], ids=lambda v: f"{v['seed']}-{v['stream']}")
def test_vectors(vector):
    seed, stream, indices = int(vector["seed"]), vector["stream"], vector["indices"]
    noise = unit_noise(seed, stream, (max(indices) + 1,))
    assert bits(noise[indices]) == vector["float32_bits"]
    assert bits([scalar_noise(seed, stream, i) for i in indices]) == vector["float32_bits"]


def test_vectors_of_the_inverse():
    """The far tail is too rare for the vectors above, so steps 5 to 8 have some of their own."""
    pairs = [[struct.unpack(">d", bytes.fromhex(word))[0] for word in pair] for pair in VECTORS["inverse"]]
    u, x = np.array(pairs).T
    assert inverse_normal_cdf(u).tolist() == x.tolist() == [scalar_inverse(value) for value in u.tolist()]
    assert (np.minimum(u, 1 - u) < math.exp(-25)).any()


def test_the_vectors_reach_every_branch():
    values = np.concatenate(
        [np.array([int(b, 16) for b in v["float32_bits"]], dtype=np.uint32) for v in VECTORS["vectors"]]
    ).view(np.float32)
    assert {0, 2**64 - 1} <= {int(v["seed"]) for v in VECTORS["vectors"]}
    assert (abs(values) < 1.43).any()
    assert (values > 1.45).any()
    assert (values < -1.45).any()


@pytest.mark.parametrize(("seed", "stream"), [(0, 0), (1, 1), (2**63, 7), (2**64 - 1, 2**32 - 1)])
def test_agrees_with_the_scalar_implementation(seed, stream):
    noise = unit_noise(seed, stream, (5, 200))
    assert noise.dtype == np.float32
    assert bits(noise) == bits([scalar_noise(seed, stream, i) for i in range(1000)])


def test_first_words_are_splitmix64s():
    # Published first outputs of SplitMix64 from state 1234567.
    state, outputs = 1234567, []
    for _ in range(3):
        state = wrap(state + G)
        outputs.append(mix(state))
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_a_value_depends_on_its_index_alone():
    flat = unit_noise(5, 0, (24,))
    assert np.array_equal(unit_noise(5, 0, (2, 3, 4)).reshape(-1), flat)
    assert np.array_equal(unit_noise(5, 0, (100,))[:24], flat)
    assert unit_noise(5, 0, ()) == flat[0]
    assert unit_noise(5, 0, (0, 3)).shape == (0, 3)


def test_seeds_and_streams_give_unrelated_noise():
    rows = [unit_noise(seed, stream, (20_000,)) for seed in (0, 1, 2, 2**32) for stream in (0, 1, 2)]
    correlation = np.corrcoef(np.stack(rows).astype(np.float64)) - np.eye(len(rows))
    assert np.abs(correlation).max() < 0.035  # 5 sigma


def test_statistics():
    x = unit_noise(7, 0, (200_000,)).astype(np.float64)
    n = x.size
    assert abs(x.mean()) < 4 / math.sqrt(n)
    assert abs(x.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((x**3).mean()) < 4 * math.sqrt(15 / n)
    assert abs((x**4).mean() - 3) < 4 * math.sqrt(96 / n)
    assert abs((x[:-1] * x[1:]).mean()) < 4 / math.sqrt(n)
    cdf = np.array([0.5 * (1 + math.erf(v / math.sqrt(2))) for v in np.sort(x)])
    steps = np.arange(n + 1) / n
    distance = max((steps[1:] - cdf).max(), (cdf - steps[:-1]).max())
    assert distance < 1.95 / math.sqrt(n)  # Kolmogorov-Smirnov, 0.1 %


def test_uniforms_are_odd_multiples_strictly_inside():
    u = uniform(3, 0, (10_000,))
    scaled = u * 2.0**53
    assert u.dtype == np.float64
    assert ((u > 0) & (u < 1)).all()
    assert (scaled % 2 == 1).all()
    assert abs(u.mean() - 0.5) < 4 / math.sqrt(12 * u.size)


def test_inverse_of_the_normal_distribution():
    edges = np.array([2.0**-53, 1 - 2.0**-53, 0.5, 0.075, 0.925, math.exp(-25), 1 - math.exp(-25)])
    near = np.concatenate([np.nextafter(edges[2:], 0), np.nextafter(edges[2:], 1)])
    u = np.concatenate(
        [uniform(11, 0, (20_000,)), edges, near, 2.0 ** -np.arange(2.0, 53), 1 - 2.0 ** -np.arange(2.0, 53)]
    )
    expected = np.array([NormalDist().inv_cdf(v) for v in u])
    assert np.allclose(inverse_normal_cdf(u), expected, rtol=1e-12, atol=0)
    # and independently of that algorithm
    back = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in inverse_normal_cdf(u)])
    assert np.allclose(back, u, rtol=1e-13, atol=0)


def test_extremes_are_finite_and_symmetric():
    low, high = inverse_normal_cdf(np.array([2.0**-53, 1 - 2.0**-53]))
    assert low == -high
    assert 8 < high < 8.5
    assert inverse_normal_cdf(np.array([0.5]))[0] == 0


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, "7", True, None])
def test_bad_seeds_are_refused(seed):
    with pytest.raises(UsageError, match="seed"):
        unit_noise(seed, 0, (1,))


@pytest.mark.parametrize("stream", [-1, 2**32, 0.5])
def test_bad_streams_are_refused(stream):
    with pytest.raises(UsageError, match="noise stream"):
        unit_noise(0, stream, (1,))
