from __future__ import annotations

import json

import numpy as np
import pytest

from mobilevd_deploy.config.recipe import load_recipe
from mobilevd_deploy.synthetic.clips import HELD_OUT, DrawnClip, make_clip
from mobilevd_deploy.training.quality import gradient_energy, score, summarise
from tests.support import ROOT


@pytest.fixture(scope="module")
def clip() -> DrawnClip:
    return make_clip(0, HELD_OUT)


def test_the_truth_scores_best(clip: DrawnClip) -> None:
    result = score(clip, clip.frames)
    assert result.psnr == result.first_frame == float("inf")
    assert result.sharpness == 1
    assert set(result.position_errors) == {0.0}
    assert result.lost == 0


def test_a_repeated_frame_gains_nothing_and_stands_still(clip: DrawnClip) -> None:
    result = score(clip, np.repeat(clip.frames[:1], len(clip.frames), axis=0))
    assert result.psnr == result.psnr_repeat
    assert result.position_errors == result.still_errors
    assert np.mean(result.position_errors) > 5


def test_a_shifted_clip_is_off_by_its_shift(clip: DrawnClip) -> None:
    result = score(clip, np.roll(clip.frames, 3, axis=2))
    assert np.median(result.position_errors) == pytest.approx(3, abs=0.7)


def test_vanished_darts_are_lost_not_misplaced(clip: DrawnClip) -> None:
    result = score(clip, np.repeat(clip.background[None], len(clip.frames), axis=0))
    assert result.position_errors == ()
    assert result.lost == len(result.still_errors)
    assert result.sharpness < 0.5


def test_gradient_energy_falls_with_blur(clip: DrawnClip) -> None:
    frame = clip.frames[0]
    blurred = ((frame[:, :-1].astype(int) + frame[:, 1:]) // 2).astype(np.uint8)
    assert gradient_energy(blurred) < 0.95 * gradient_energy(frame)
    assert gradient_energy(np.full((4, 4, 3), 7, np.uint8)) == 0


def test_summary_counts_the_lost_and_subtracts_the_baseline(clip: DrawnClip) -> None:
    half = np.concatenate([clip.frames[:7], np.repeat(clip.background[None], 7, axis=0)])
    one = score(clip, half)
    values = summarise([one, one])
    assert values["clips"] == 2
    assert values["psnr_gain_db"] == pytest.approx(one.psnr - one.psnr_repeat, abs=1e-3)
    assert values["darts_lost_share"] == pytest.approx(
        one.lost / (one.lost + len(one.position_errors)), abs=1e-3
    )


# ---- what was measured ----

RESULTS = ROOT / "benchmarks" / "results"


@pytest.mark.parametrize("form", ["quantised", "npu-sim"])
def test_integers_cost_the_demo_at_most_a_third_of_a_decibel(form: str) -> None:
    result = json.loads((RESULTS / f"demo_quality_{form.replace('-', '_')}.json").read_bytes())
    assert result["precision"] == "w8a16"
    assert result["values"]["clips"] == result[form]["clips"] >= 12
    assert result["values"]["psnr_db"] - result[form]["psnr_db"] <= 0.3


def test_the_demos_unet_keeps_the_floor_of_the_shipped_recipe() -> None:
    floor = load_recipe("xiaomi-14-pro").floors.quantised_sqnr_db
    result = json.loads((RESULTS / "quantisation.json").read_bytes())
    (shipped,) = (s for s in result["settings"] if s["name"] == "W8A16, headroom 1.25")
    assert shipped["unet_sqnr_db"]["worst"] >= floor >= 30
