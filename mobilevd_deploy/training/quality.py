"""Quality of a generated clip of darts, relative to the true clip.

Frame 1 is the input picture, so most measures use frames 2 to T.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mobilevd_deploy.base.tensors import psnr_db
from mobilevd_deploy.synthetic.clips import DrawnClip, locate

Bytes = npt.NDArray[np.uint8]

# Fraction of a dart's painted area. Below it, a dart counts as covered (true clip) or lost (generated clip).
_VISIBLE = 0.5


@dataclass(frozen=True)
class ClipScore:
    """Measures of one clip, relative to the true clip.

    psnr, psnr_repeat      PSNR over frames 2 to T in dB: of the clip, and of the first true frame repeated
    first_frame            PSNR of frame 1 in dB
    sharpness              gradient energy of the last frame / that of the true last frame
    position_errors        in px, of every dart in every frame 2 to T in which it is visible
    still_errors           in px, the same if the darts stayed at their positions in frame 1
    lost                   number of darts, over all frames, that should be visible and are not found
    """

    psnr: float
    psnr_repeat: float
    first_frame: float
    sharpness: float
    position_errors: tuple[float, ...]
    still_errors: tuple[float, ...]
    lost: int


def score(clip: DrawnClip, generated: Bytes) -> ClipScore:
    """Measure the uint8 frames (T, H, W, 3) `generated`, relative to a true clip of the same size."""
    truth = clip.frames
    repeated = np.repeat(truth[:1], len(truth), axis=0)
    moved, still, lost = [], [], 0
    for colour in clip.colours:
        start = locate(truth[0], clip.background, colour)
        for t in range(1, len(truth)):
            expected = locate(truth[t], clip.background, colour)
            if start is None or expected is None or expected[2] < _VISIBLE * start[2]:
                continue  # covered by the other dart
            still.append(_distance(start, expected))
            found = locate(generated[t], clip.background, colour)
            if found is None or found[2] < _VISIBLE * expected[2]:
                lost += 1
            else:
                moved.append(_distance(found, expected))
    return ClipScore(
        psnr=_psnr(generated[1:], truth[1:]),
        psnr_repeat=_psnr(repeated[1:], truth[1:]),
        first_frame=_psnr(generated[:1], truth[:1]),
        sharpness=gradient_energy(generated[-1]) / gradient_energy(truth[-1]),
        position_errors=tuple(moved),
        still_errors=tuple(still),
        lost=lost,
    )


def gradient_energy(frame: Bytes) -> float:
    """Return the mean squares of horizontal and vertical differences, added; uint8 (H, W, 3) as [0, 1]."""
    values = frame / 255.0
    return float(np.square(np.diff(values, axis=0)).mean() + np.square(np.diff(values, axis=1)).mean())


def summarise(scores: Sequence[ClipScore]) -> dict[str, float]:
    """Return means over clips, and quantiles of the position errors over all darts and frames."""
    errors = np.concatenate([s.position_errors for s in scores])
    still = np.concatenate([s.still_errors for s in scores])
    lost = sum(s.lost for s in scores)
    psnr, repeat = (float(np.mean([getattr(s, name) for s in scores])) for name in ("psnr", "psnr_repeat"))
    values = {
        "clips": len(scores),
        "psnr_db": psnr,
        "psnr_db_worst_tenth": float(np.quantile([s.psnr for s in scores], 0.1)),
        "psnr_db_repeat_first_frame": repeat,
        "psnr_gain_db": psnr - repeat,
        "first_frame_psnr_db": float(np.mean([s.first_frame for s in scores])),
        "gradient_energy_ratio_last_frame": float(np.mean([s.sharpness for s in scores])),
        "position_error_px_mean": float(errors.mean()),
        "position_error_px_median": float(np.median(errors)),
        "position_error_px_p90": float(np.quantile(errors, 0.9)),
        "position_error_px_if_still": float(still.mean()),
        "darts_lost_share": lost / (lost + len(errors)),
    }
    return {name: round(value, 4) for name, value in values.items()}


def _psnr(frames: Bytes, truth: Bytes) -> float:
    return psnr_db(truth / 255.0, frames / 255.0, peak=1.0)


def _distance(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    return float(np.linalg.norm(a[:2] - b[:2]))
