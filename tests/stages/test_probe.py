from __future__ import annotations

import math

import numpy as np
import pytest

from mobilevd_deploy.base.tensors import psnr_db, sqnr_db
from mobilevd_deploy.errors import UsageError
from mobilevd_deploy.model.interface import TensorSpec
from mobilevd_deploy.runtime.noise import unit_noise
from mobilevd_deploy.stages.probe import Probe, make_probe


def test_sqnr_by_hand():
    assert sqnr_db([3.0, 4.0], [3.0, 3.5]) == pytest.approx(20.0)  # 25 / 0.25
    assert sqnr_db(np.float32([1, 1]), np.float32([1, 2])) == pytest.approx(10 * math.log10(2))


def test_sqnr_divides_by_the_reference_not_by_the_test():
    assert sqnr_db([10.0], [1.0]) == pytest.approx(10 * math.log10(100 / 81))
    assert sqnr_db([1.0], [10.0]) == pytest.approx(10 * math.log10(1 / 81))


def test_psnr_by_hand():
    assert psnr_db([0.0, 0.0], [0.0, 0.2], peak=2) == pytest.approx(10 * math.log10(4 / 0.02))
    assert psnr_db(np.uint8([255, 0]), np.uint8([0, 255]), peak=255) == pytest.approx(0.0)
    # a constant offset gives the same, whatever the reference
    assert psnr_db([5.0], [5.1], peak=1) == pytest.approx(20.0)
    assert psnr_db([500.0], [500.1], peak=1) == pytest.approx(20.0)


def test_unsigned_values_do_not_wrap_around():
    assert sqnr_db(np.uint8([1]), np.uint8([2])) == pytest.approx(0.0)


def test_computed_in_float64():
    reference = np.full(1000, 1e30, np.float32)  # squares overflow float32
    assert sqnr_db(reference, reference * np.float32(1.5)) == pytest.approx(10 * math.log10(4), abs=1e-5)


def test_equal_is_inf():
    for values in ([1.0, 2.0], [0.0], []):
        assert sqnr_db(values, values) == math.inf
        assert psnr_db(values, values, peak=2) == math.inf


def test_no_signal_or_no_number_is_minus_inf():
    assert sqnr_db([0.0], [1.0]) == -math.inf
    for bad in (math.nan, math.inf, -math.inf):
        assert sqnr_db([1.0, 1.0], [1.0, bad]) == -math.inf
        assert psnr_db([1.0, 1.0], [1.0, bad], peak=2) == -math.inf
        for measure in (sqnr_db, lambda a, b: psnr_db(a, b, peak=2)):
            with pytest.raises(UsageError, match="reference holds NaN or Inf"):
                measure([bad], [1.0])


def test_shapes_must_be_equal():
    for measure in (sqnr_db, lambda a, b: psnr_db(a, b, peak=2)):
        with pytest.raises(UsageError, match=r"reference \(2, 1\), test \(2,\)"):
            measure([[1.0], [2.0]], [1.0, 2.0])  # would broadcast


@pytest.mark.parametrize("peak", [0, -1, math.nan, math.inf])
def test_peak_must_be_positive(peak):
    with pytest.raises(UsageError, match="peak"):
        psnr_db([1.0], [1.0], peak=peak)


SPECS = (
    TensorSpec("image", (1, 3, 8, 8), "float32", "NCHW", (-1.0, 1.0), "image"),
    TensorSpec("noise", (2, 4, 2, 2), "float16", "NCHW", None, "noise:0"),
)


def test_probe_from_specs():
    probe = make_probe(SPECS, 3, lambda inputs: {"sum": inputs["image"].sum() + inputs["noise"].sum()})
    image, noise = probe.inputs["image"], probe.inputs["noise"]
    assert (image.shape, image.dtype) == ((1, 3, 8, 8), np.float32)
    assert -1 <= image.min() < -0.8
    assert 0.8 < image.max() <= 1
    assert noise.dtype == np.float16
    assert np.array_equal(noise, unit_noise(3, 1, (2, 4, 2, 2)).astype(np.float16))
    assert probe.reference["sum"] == image.sum() + noise.sum()


def test_probes_repeat_and_differ_by_seed():
    def first(seed):
        return make_probe(SPECS, seed, lambda inputs: {}).inputs["image"]

    assert np.array_equal(first(1), first(1))
    assert not np.array_equal(first(1), first(2))


def test_drift_is_that_of_the_worst_output():
    probe = Probe({}, {"a": np.array([10.0]), "b": np.array([10.0])})
    assert probe.drift({"a": [10.0], "b": [11.0]}) == pytest.approx(20.0)
    assert probe.drift({"a": [9.0], "b": [10.0]}) == pytest.approx(20.0)
    assert probe.drift({"a": [10.0], "b": [10.0]}) == math.inf
    for outputs in ({"a": [10.0]}, {"a": [10.0], "c": [10.0]}, {"a": [1.0], "b": [1.0], "c": [1.0]}):
        with pytest.raises(UsageError, match="are not the reference's"):
            probe.drift(outputs)
