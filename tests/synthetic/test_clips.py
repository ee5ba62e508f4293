from __future__ import annotations

import numpy as np
import pytest

from mobilevd_deploy.errors import UsageError
from mobilevd_deploy.synthetic.clips import HELD_OUT, DrawnClip, locate, make_clip, make_clips


@pytest.fixture(scope="module")
def clips() -> list[DrawnClip]:
    return [make_clip(0, HELD_OUT + i) for i in range(40)]


def test_a_clip_depends_on_seed_and_index_alone() -> None:
    first = make_clip(5, 17)
    make_clip(5, 16)
    assert np.array_equal(make_clip(5, 17).frames, first.frames)
    assert not np.array_equal(make_clip(5, 18).frames, first.frames)
    assert not np.array_equal(make_clip(6, 17).frames, first.frames)


def test_a_clip_stays_what_it_was() -> None:
    """A changed drawing routine makes the committed checkpoint's training data unreproducible."""
    clip = make_clip(0, 0)
    assert clip.frames.shape == (14, 64, 128, 3)
    assert clip.frames.dtype == np.uint8
    assert clip.positions[0] == pytest.approx(np.array([[24.365, 34.448]]), abs=1e-2)


def test_batches_are_channels_first_and_sizes_are_free() -> None:
    batch = make_clips(1, range(3, 5), frames=6, height=72, width=96)
    assert batch.shape == (2, 6, 3, 72, 96)
    single = make_clip(1, 4, frames=6, height=72, width=96)
    assert np.array_equal(batch[1].transpose(0, 2, 3, 1), single.frames)


def test_a_map_that_two_darts_do_not_fit_is_refused() -> None:
    with pytest.raises(UsageError, match="do not fit 32x16 pixels"):
        make_clips(0, range(20), height=16, width=32, frames=1)  # some have a single dart


def test_darts_stay_inside_and_move_at_one_of_two_speeds(clips: list[DrawnClip]) -> None:
    for clip in clips:
        assert (clip.positions > 8).all()
        assert (clip.positions < [120, 56]).all()
        steps = np.linalg.norm(np.diff(clip.positions, axis=0), axis=-1)
        # A step with a reflection is shorter, never longer; most steps have none.
        assert steps.max() <= 3.0 + 1e-3
        typical = np.median(steps, axis=0)
        assert all(min(abs(speed - 1.5), abs(speed - 3.0)) < 1e-3 for speed in typical)


def test_every_clip_moves_and_some_turn_and_some_meet(clips: list[DrawnClip]) -> None:
    turned = met = 0
    for clip in clips:
        assert np.abs(clip.frames[0].astype(int) - clip.frames[-1]).max() > 80
        moves = np.diff(clip.positions, axis=0)
        turned += bool((moves[:-1] * moves[1:] < -1).any())
        if clip.positions.shape[1] == 2:
            met += bool((np.linalg.norm(clip.positions[:, 0] - clip.positions[:, 1], axis=-1) < 17).any())
    assert turned > 10
    assert met > 3


def test_the_picture_shows_the_darts_where_they_are_said_to_be(clips: list[DrawnClip]) -> None:
    errors = []
    for clip in clips:
        for t in (0, 13):
            for s, colour in enumerate(clip.colours):
                apart = (
                    clip.positions.shape[1] == 1
                    or np.linalg.norm(clip.positions[t, 0] - clip.positions[t, 1]) > 30
                )
                found = locate(clip.frames[t], clip.background, colour)
                if apart and found is not None:
                    errors.append(float(np.linalg.norm(found[:2] - clip.positions[t, s])))
    assert len(errors) > 60
    # The painted body's centre is not the dart's: its nose is pale and its tail is dark.
    assert np.median(errors) < 3
    assert np.quantile(errors, 0.95) < 6


def test_the_nose_points_where_the_dart_goes(clips: list[DrawnClip]) -> None:
    looked = 0
    for clip in clips:
        moves = np.diff(clip.positions[:3], axis=0)
        for s in range(clip.positions.shape[1]):
            apart = (
                clip.positions.shape[1] == 1
                or np.linalg.norm(clip.positions[0, 0] - clip.positions[0, 1]) > 30
            )
            if not apart or not np.allclose(moves[0, s], moves[1, s], atol=1e-4):
                continue  # it is reflected in the first two steps
            x, y = clip.positions[0, s]
            heading = moves[0, s] / np.linalg.norm(moves[0, s])
            ahead, behind = (
                clip.frames[0, int(y + at * heading[1]), int(x + at * heading[0])].astype(int)
                for at in (5, -2.5)
            )
            assert ahead.sum() > behind.sum() + 60
            looked += 1
    assert looked > 20


def test_a_missing_dart_is_not_found(clips: list[DrawnClip]) -> None:
    assert locate(clips[0].background, clips[0].background, clips[0].colours[0]) is None
