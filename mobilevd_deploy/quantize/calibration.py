"""Pictures that calibrate a quantised model, and others that judge it.

The first `samples` calibrate, the last `JUDGES` judge. No two of them are equal, so no picture that
calibrated judges. Each has its own noise: picture i, seed i.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mobilevd_deploy.base.progress import Progress
from mobilevd_deploy.config.recipe import QuantScheme, Recipe
from mobilevd_deploy.config.spec import ModelSpec
from mobilevd_deploy.errors import UsageError
from mobilevd_deploy.runtime.media import read_picture
from mobilevd_deploy.runtime.picture_files import describe_skipped, find_pictures

JUDGES = 2
"""Pictures that only judge: they measure the error, and whether every input still matters."""

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Pictures:
    """Pictures to calibrate with and to judge on.

    Attributes:
        source: where they came from, for the manifest.
        values: float32 (1, 3, H, W) in [-1, 1]. Each is made at every access, so memory does not grow with
            their number.
        sha256: of each one's values.
        summary: a sentence about what was used and what was left out; empty for drawn pictures.
    """

    source: str
    values: Sequence[Floats]
    sha256: tuple[str, ...]
    summary: str = ""


@dataclass(frozen=True)
class _OnAccess(Sequence[Floats]):
    """Results of `make` for each of `origins`, computed at each access; both have to be picklable."""

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
    values = _OnAccess(partial(_draw, seed, height, width), range(samples + JUDGES))
    return Pictures("drawn by mobilevd_deploy.synthetic.clips", values, tuple(map(_sha256, values)))


def read_pictures(
    paths: Sequence[str | Path],
    width: int,
    height: int,
    samples: int,
    seed: int,
    progress: Progress | None = None,
) -> Pictures:
    """Read `samples` pictures and the judges from files and folders, chosen by `seed` where there are more.

    `find_pictures` says which files of a folder count. Of a clip or an animated picture the first frame
    counts. A picture whose values (decoded, fitted to width x height) equal those of one already chosen is
    left out. Files that are not needed are not read.

    Raises MediaError for a file that cannot be read, UsageError where there are fewer than 1 + `JUDGES`
    different pictures.
    """
    progress = progress or Progress()
    found = find_pictures(paths)
    wanted, skipped = samples + JUDGES, Counter(found.skipped)
    chosen: dict[str, Path] = {}
    profiles_ignored = 0
    for index in np.random.default_rng(seed).permutation(len(found.files)):
        if len(chosen) == wanted:
            break
        picture = read_picture(found.files[index], width, height)
        digest = _sha256(picture.pixels)
        if digest in chosen:
            skipped["duplicates"] += 1
            continue
        chosen[digest] = found.files[index]
        profiles_ignored += picture.profile_ignored
        progress.advance(len(chosen) / wanted)
    left_out = describe_skipped(skipped)
    if len(chosen) < 1 + JUDGES:
        few = "1 calibration picture is" if len(chosen) == 1 else f"{len(chosen)} calibration pictures are"
        raise UsageError(
            f"{few} too few: at least {1 + JUDGES} different ones are needed, "
            f"1 to calibrate and {JUDGES} to judge{left_out}",
            next_step=f"name more pictures or clips, or a folder of them; the recipe can use {wanted}",
        )
    source = f"{len(chosen)} of {len(found.files)} pictures"
    summary = f"calibration: {source} used{left_out}"
    if profiles_ignored:
        summary += f"; {profiles_ignored} with a colour profile that cannot be used count as sRGB"
    values = _OnAccess(partial(_read, width, height), [*chosen.values()])
    return Pictures(source, values, tuple(chosen), summary)


def _sha256(values: Floats) -> str:
    return hashlib.sha256(values.tobytes()).hexdigest()


def _draw(seed: int, height: int, width: int, index: int) -> Floats:
    from mobilevd_deploy.synthetic.clips import make_clip

    frame = make_clip(seed, index, frames=1, height=height, width=width).frames[0]
    return (frame.transpose(2, 0, 1)[None] / np.float32(127.5) - 1).astype(np.float32)


def _read(width: int, height: int, path: Path) -> Floats:
    return read_picture(path, width, height).pixels


def choose_pictures(
    spec: ModelSpec, recipe: Recipe, calibration: Sequence[str | Path], progress: Progress | None = None
) -> Pictures | None:
    """Return the pictures to calibrate with and to judge on; None where the recipe ends with float ONNX.

    `calibration`: pictures, clips or folders of them; empty: drawn pictures. `progress` receives a stage and
    the summary while pictures are read. Raises UsageError if the recipe calibrates nothing and `calibration`
    is not empty; else as `read_pictures`.
    """
    if not (recipe.quant or recipe.npu):
        if calibration:
            raise UsageError(
                f"recipe {recipe.name} calibrates nothing", next_step="choose a recipe with [quant] or [npu]"
            )
        return None
    scheme = recipe.quant or QuantScheme(samples=1)
    if not calibration:
        return drawn_pictures(spec.width, spec.height, scheme.samples, scheme.seed)
    progress = progress or Progress()
    progress.begin("read pictures")
    pictures = read_pictures(calibration, spec.width, spec.height, scheme.samples, scheme.seed, progress)
    progress.end()
    progress.say(pictures.summary)
    return pictures
