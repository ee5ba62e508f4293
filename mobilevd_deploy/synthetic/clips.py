"""Procedural clips whose first frame determines all other frames.

Paper darts fly over a soft background. A dart flies in the direction of its pale nose. Small darts fly faster
than large ones. A dart is reflected at a wall. Darts pass over each other, the faster one on top. There is no
other randomness, so a model that sees frame 0 can predict frames 1 to 13.

Clip `index` of stream `seed` does not depend on the clips drawn before it (numpy's Philox, keyed by both).
Training clips and held-out clips are disjoint ranges of indices.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mobilevd_deploy.errors import UsageError

HELD_OUT = 1_000_000_000
"""First index of the held-out clips, which training never uses."""

_LENGTHS = (32.0, 24.0)  # px from nose to tail
_SPEEDS = (1.5, 3.0)  # px per frame, for the length above
_DIRECTIONS = 8
_MARGIN = 1.0  # px between a dart's nose and the wall when it is reflected
_EDGE = 2.0  # px over which an edge fades
_TRIES = 1000  # to place two darts apart; on the demo's map two or three suffice


@dataclass(frozen=True)
class DrawnClip:
    """A clip and its ground truth, for S darts and T frames of H x W px.

    frames     uint8 (T, H, W, 3), RGB
    positions  float32 (T, S, 2), x and y of each dart's centre in px; darts are ordered from back to front
    colours    float32 (S, 3), body colour of each dart, in [0, 1]
    background uint8 (H, W, 3), the picture without darts
    """

    frames: npt.NDArray[np.uint8]
    positions: npt.NDArray[np.float32]
    colours: npt.NDArray[np.float32]
    background: npt.NDArray[np.uint8]


def make_clip(seed: int, index: int, *, frames: int = 14, height: int = 64, width: int = 128) -> DrawnClip:
    """Draw clip `index` of stream `seed`. Raises UsageError if the frames are too small for two darts."""
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, index], dtype=np.uint64)))
    count = 1 if rng.random() < 0.25 else 2
    kinds = np.sort(rng.integers(len(_LENGTHS), size=count))  # slow darts first, faster ones on top
    lengths = np.asarray(_LENGTHS)[kinds]
    angles = rng.integers(_DIRECTIONS, size=count) * (2 * np.pi / _DIRECTIONS)
    velocities = np.asarray(_SPEEDS)[kinds, None] * np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    margins = lengths / 2 + _MARGIN
    size = np.array([width, height])
    for _ in range(_TRIES):
        start = margins[:, None] + rng.random((count, 2)) * (size - 2 * margins[:, None])
        if count == 1 or np.linalg.norm(start[0] - start[1]) > lengths.max():
            break
    else:
        raise UsageError(
            f"procedural clips do not fit {width}x{height} pixels",
            next_step="give your own pictures for calibration",
        )
    if count == 2 and kinds[0] == kinds[1] and start[0, 1] > start[1, 1]:
        start = start[::-1].copy()  # equal speeds: the dart lower in the picture is in front
    positions, headings = _bounce(start, velocities, margins, size, frames)
    hue = rng.random()
    colours = np.array(
        [
            colorsys.hsv_to_rgb(
                (hue + i * rng.uniform(0.3, 0.7)) % 1, rng.uniform(0.85, 1), rng.uniform(0.9, 1)
            )
            for i in range(count)
        ],
        dtype=np.float32,
    )
    background = _background(rng, height, width)
    picture = np.repeat(background[None], frames, axis=0)
    for i in range(count):
        _draw_dart(picture, positions[:, i], headings[:, i], float(lengths[i]), colours[i])
    return DrawnClip(_to_bytes(picture), positions.astype(np.float32), colours, _to_bytes(background))


def make_clips(seed: int, indices: range, **size: int) -> npt.NDArray[np.uint8]:
    """Return the frames of several clips, uint8 (N, T, 3, H, W)."""
    return np.stack([make_clip(seed, i, **size).frames.transpose(0, 3, 1, 2) for i in indices])


def _to_bytes(picture: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    return (picture * 255 + 0.5).clip(0, 255).astype(np.uint8)


def _bounce(
    start: npt.NDArray[np.float64],
    velocities: npt.NDArray[np.float64],
    margins: npt.NDArray[np.float64],
    size: npt.NDArray[np.int64],
    frames: int,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return positions (T, S, 2) and unit headings (T, S, 2) of points reflected between the walls.

    A straight path with reflections is a triangle wave, so no loop over frames is needed.
    """
    span = size - 2 * margins[:, None]
    free = start - margins[:, None] + np.arange(frames)[:, None, None] * velocities
    phase = np.mod(free, 2 * span)
    back = phase > span
    positions = margins[:, None] + np.where(back, 2 * span - phase, phase)
    headings = np.where(back, -velocities, velocities)
    return positions, headings / np.linalg.norm(headings, axis=-1, keepdims=True)


def _background(rng: np.random.Generator, height: int, width: int) -> npt.NDArray[np.float32]:
    """Draw a muted colour with a slow gradient and soft waves of low contrast, (H, W, 3) in [0, 1]."""
    base = np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.08, 0.3), rng.uniform(0.4, 0.75)))
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    waves = 7
    wavelengths = rng.uniform(16, 90, waves)
    angles = rng.uniform(0, 2 * np.pi, waves)
    kx, ky = np.cos(angles) * 2 * np.pi / wavelengths, np.sin(angles) * 2 * np.pi / wavelengths
    phases = kx[:, None, None] * x + ky[:, None, None] * y + rng.uniform(0, 2 * np.pi, waves)[:, None, None]
    tints = rng.normal(1, 0.35, (waves, 3)) * rng.uniform(0.006, 0.022, waves)[:, None]
    texture = np.tensordot(np.sin(phases), tints, axes=(0, 0))
    slope = (y / height - 0.5)[..., None] * rng.uniform(-0.12, 0.12)
    return np.asarray(base + slope + texture, dtype=np.float32)


def _draw_dart(
    picture: npt.NDArray[np.float32],
    positions: npt.NDArray[np.float64],
    headings: npt.NDArray[np.float64],
    length: float,
    colour: npt.NDArray[np.float32],
) -> None:
    """Blend one dart into `picture` (T, H, W, 3) in place, antialiased by its signed distance."""
    _, height, width, _ = picture.shape
    half = length / 2
    reach = int(half * 1.3) + 2  # the wing tips are 1.28 half-lengths from the centre
    corner = np.floor(positions).astype(np.int64) - reach
    offsets = np.arange(2 * reach + 1)
    dx = (corner[:, 0, None] + offsets + 0.5 - positions[:, 0, None]).astype(np.float32)[:, None, :]
    dy = (corner[:, 1, None] + offsets + 0.5 - positions[:, 1, None]).astype(np.float32)[:, :, None]
    cos, sin = (headings[:, k, None, None].astype(np.float32) for k in (0, 1))
    along = (dx * cos + dy * sin) / half  # 1 at the nose, -1 at the wing tips
    across = np.abs(dy * cos - dx * sin) / half

    def beyond(u0: float, v0: float, u1: float, v1: float) -> npt.NDArray[np.float32]:
        """Return the distance in px from the line through two points, negative on the dart's side."""
        nu, nv = v1 - v0, u0 - u1
        return np.asarray(((along - u0) * nu + (across - v0) * nv) * (half / float(np.hypot(nu, nv))))

    distance = np.maximum(beyond(1.0, 0.0, -1.0, 0.8), beyond(-1.0, 0.8, -0.55, 0.0))
    cover = np.clip(0.5 - distance / _EDGE, 0, 1)[..., None]
    nose = np.clip((along - 0.05) / 0.5, 0, 1)[..., None]
    tail = np.clip((-0.2 - along) / 0.5, 0, 1)[..., None]
    paint = colour + (1 - colour) * (0.85 * nose) - colour * (0.75 * tail)
    for t, (x0, y0) in enumerate(corner):
        rows = slice(max(y0, 0), min(y0 + len(offsets), height))
        columns = slice(max(x0, 0), min(x0 + len(offsets), width))
        inner = (t, slice(rows.start - y0, rows.stop - y0), slice(columns.start - x0, columns.stop - x0))
        region = picture[t, rows, columns]
        region += cover[inner] * (paint[inner] - region)


def locate(
    frame: npt.NDArray[np.uint8], background: npt.NDArray[np.uint8], colour: npt.NDArray[np.float32]
) -> npt.NDArray[np.float64] | None:
    """Find a dart by its body colour; return x and y of the painted area's centre in px, and the area in px.

    `frame` and `background` are (H, W, 3), `colour` (3,) in [0, 1]. A pixel's weight is its position between
    background colour (0) and body colour (1), if the pixel is near the line between the two colours in RGB.
    Returns None if the area is less than 8 px.
    """
    base = background / 255.0
    towards = colour - base
    change = frame / 255.0 - base
    length = np.square(towards).sum(-1)
    along = (change * towards).sum(-1) / length
    off_line = np.square(change - along[..., None] * towards).sum(-1)
    weight = np.clip(along, 0, 1) * (along > 0.5) * (off_line < 0.15 * length)
    area = weight.sum()
    if area < 8:
        return None
    y, x = np.mgrid[0 : frame.shape[0], 0 : frame.shape[1]] + 0.5
    return np.array([(weight * x).sum() / area, (weight * y).sum() / area, area])
