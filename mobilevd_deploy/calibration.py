"""Pictures that calibrate a quantised model, and others that judge it.

The first `samples` calibrate, the rest are never calibrated on. Each has its own noise: picture i, seed i.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mobilevd_deploy import media
from mobilevd_deploy.errors import UsageError

JUDGES = 2
"""Pictures that are kept back to judge, and to ask whether every input still matters."""

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


@dataclass(frozen=True)
class Pictures:
    """Pictures (1, 3, H, W) float32 in [-1, 1], where they came from, and the sha256 of each one's values."""

    source: str
    values: tuple[npt.NDArray[np.float32], ...]

    @property
    def sha256(self) -> tuple[str, ...]:
        """Digest of each picture as the network sees it, in hex."""
        return tuple(hashlib.sha256(value.tobytes()).hexdigest() for value in self.values)


def drawn_pictures(width: int, height: int, samples: int, seed: int) -> Pictures:
    """First frames of procedural clips, `samples` and the judges; none is one of the held-out clips."""
    from mobilevd_deploy.training.clips import make_clip

    clips = (make_clip(seed, i, frames=1, height=height, width=width) for i in range(samples + JUDGES))
    values = tuple(_to_float(clip.frames[0]) for clip in clips)
    return Pictures("drawn by mobilevd_deploy.training.clips", values)


def read_pictures(paths: Sequence[str | Path], width: int, height: int, samples: int, seed: int) -> Pictures:
    """Read `samples` pictures and the judges from files and folders, chosen by `seed` where there are more.

    Of an animated picture the first frame counts. Raises MediaError for a file that is none, UsageError
    where there are too few.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            files += sorted(p for p in path.rglob("*") if p.suffix.lower() in _SUFFIXES)
        else:
            files.append(path)
    if len(files) < 1 + JUDGES:
        raise UsageError(
            f"{len(files)} calibration pictures are too few: one to calibrate and {JUDGES} to judge",
            next_step="name more pictures, or a folder of them",
        )
    order = np.random.default_rng(seed).permutation(len(files))[: samples + JUDGES]
    pictures = (media.read_picture(files[i], width, height) for i in order)
    return Pictures(
        f"{len(order)} of {len(files)} pictures", tuple(np.asarray(p.pixels, np.float32) for p in pictures)
    )


def _to_float(frame: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    return (frame.transpose(2, 0, 1)[None] / np.float32(127.5) - 1).astype(np.float32)
