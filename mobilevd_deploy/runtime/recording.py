"""Run the pipeline on this computer and record every component's inputs and output."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mobilevd_deploy.artifact.artifact import Artifact
from mobilevd_deploy.artifact.manifest import Component
from mobilevd_deploy.base.tensors import Array
from mobilevd_deploy.runtime.pipeline import Pipeline
from mobilevd_deploy.runtime.runners import Runner

# The seed of the noise for checks and timings.
SEED = 0


def run_on_host(artifact: Artifact, image: str | None) -> dict[str, tuple[dict[str, Array], Array]]:
    """Generate a clip on this computer; return each component's inputs by name, and its output.

    The picture is the file `image`, or a smooth pattern. Errors as in `Pipeline.generate_all`, MediaError.
    """
    taken: dict[str, tuple[dict[str, Array], Array]] = {}
    pipeline = Pipeline.open(artifact)
    recording = Pipeline(artifact, lambda component: _Recorder(pipeline.load(component), component, taken))
    recording.generate(check_picture(artifact, image), SEED)
    return taken


def check_picture(artifact: Artifact, image: str | Path | None) -> Array:
    """Return the image file fitted to the artifact, or a smooth pattern: float32 (1, 3, H, W) in [-1, 1]."""
    spec = artifact.manifest.pipeline
    if image is not None:
        from mobilevd_deploy.runtime.media import read_picture

        return read_picture(image, spec.width, spec.height).pixels
    y, x = np.mgrid[0 : spec.height, 0 : spec.width] / max(spec.height, spec.width)
    waves = [np.sin(5 * x + 3 * y), np.cos(7 * x * y), np.sin(4 * (x - 0.5) ** 2 + 6 * y)]
    return np.stack(waves)[None].astype(np.float32)


class _Recorder:
    """A runner that records its inputs and output."""

    def __init__(
        self, runner: Runner, component: Component, taken: dict[str, tuple[dict[str, Array], Array]]
    ) -> None:
        self._runner = runner
        self._component = component
        self._taken = taken

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        outputs = self._runner.run(feeds)
        self._taken[self._component.name] = dict(feeds), outputs[self._component.outputs[0].name]
        return outputs
