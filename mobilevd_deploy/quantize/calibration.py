"""Pictures that calibrate a quantised model, and others that judge it.

The first `samples` calibrate, the rest are never calibrated on. Each has its own noise: picture i, seed i.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mobilevd_deploy.config.recipe import QuantScheme, Recipe
from mobilevd_deploy.config.spec import ModelSpec
from mobilevd_deploy.errors import UsageError
from mobilevd_deploy.runtime import media

JUDGES = 2
"""Pictures that are kept back to judge, and to ask whether every input still matters."""

_SUFFIXES = {
    ".png",
    ".apng",
    ".jpg",
    ".jpeg",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
} | media.VIDEO_SUFFIXES

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Pictures:
    """Pictures (1, 3, H, W) float32 in [-1, 1], where they came from, and the sha256 of each one's values.

    `values` makes a picture anew whenever it is asked for, so that memory does not grow with their number.
    """

    source: str
    values: Sequence[Floats]
    sha256: tuple[str, ...]

    @classmethod
    def of(cls, source: str, values: Sequence[Floats]) -> Pictures:
        """Look at every picture once. Raises what making one raises."""
        return cls(source, values, tuple(hashlib.sha256(value.tobytes()).hexdigest() for value in values))


@dataclass(frozen=True)
class _MadeAnew(Sequence[Floats]):
    """What `make` makes of each of `origins`, at the moment of access; both have to be picklable."""

    make: Callable[[Any], Floats]
    origins: Sequence[Any]

    def __len__(self) -> int:
        return len(self.origins)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return dataclasses.replace(self, origins=self.origins[index])
        return self.make(self.origins[index])


def drawn_pictures(width: int, height: int, samples: int, seed: int) -> Pictures:
    """First frames of procedural clips, `samples` and the judges; none is one of the held-out clips."""
    draw = partial(_draw, seed, height, width)
    return Pictures.of("drawn by mobilevd_deploy.synthetic.clips", _MadeAnew(draw, range(samples + JUDGES)))


def read_pictures(paths: Sequence[str | Path], width: int, height: int, samples: int, seed: int) -> Pictures:
    """Read `samples` pictures and the judges from files and folders, chosen by `seed` where there are more.

    Of a clip or an animated picture the first frame counts. Raises MediaError for a file that is none,
    UsageError where there are too few.
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
            next_step="name more pictures or clips, or a folder of them",
        )
    order = np.random.default_rng(seed).permutation(len(files))[: samples + JUDGES]
    chosen = _MadeAnew(partial(_read, width, height), [files[i] for i in order])
    return Pictures.of(f"{len(order)} of {len(files)} pictures", chosen)


def _draw(seed: int, height: int, width: int, index: int) -> Floats:
    from mobilevd_deploy.synthetic.clips import make_clip

    frame = make_clip(seed, index, frames=1, height=height, width=width).frames[0]
    return (frame.transpose(2, 0, 1)[None] / np.float32(127.5) - 1).astype(np.float32)


def _read(width: int, height: int, path: Path) -> Floats:
    return media.read_picture(path, width, height).pixels


def choose_pictures(spec: ModelSpec, recipe: Recipe, calibration: Sequence[str | Path]) -> Pictures | None:
    """Return what calibrates and judges; None where the recipe ends with float ONNX."""
    if not (recipe.quant or recipe.npu):
        if calibration:
            raise UsageError(
                f"recipe {recipe.name} calibrates nothing", next_step="choose a recipe with [quant] or [npu]"
            )
        return None
    scheme = recipe.quant or QuantScheme(samples=1)
    if calibration:
        return read_pictures(calibration, spec.width, spec.height, scheme.samples, scheme.seed)
    return drawn_pictures(spec.width, spec.height, scheme.samples, scheme.seed)
