"""This computer: the outputs that a phone's are compared with, and latencies that say which graph is slower.

A latency here says nothing about a phone. Two artifacts on the same idle computer can be compared.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mobilevd_deploy.artifact.artifact import Artifact
from mobilevd_deploy.artifact.manifest import Component
from mobilevd_deploy.base.progress import Progress
from mobilevd_deploy.base.tensors import Array
from mobilevd_deploy.pipeline import Job, OnnxRunner, Pipeline, Runner
from mobilevd_deploy.profiles import SCHEMA_VERSION, ComponentProfile, Latency, Profile, now, total_ms

# The seed of the noise for checks and timings.
SEED = 0
# A component gets no further call after this; the full size takes minutes a call.
SECONDS = 30.0


def profile_on_host(
    artifact: Artifact,
    progress: Progress | None = None,
    *,
    components: tuple[str, ...] = (),
    samples: int = 100,
    seconds: float = SECONDS,
) -> Profile:
    """Time the float graphs on onnxruntime's CPU provider: `samples` calls each, or fewer after `seconds`.

    `components`: only these (all). Every component gets the inputs of a real clip. Raises ArtifactError for a
    damaged artifact or an unknown component, ResourceError where memory runs out.
    """
    progress, manifest = progress or Progress(), artifact.manifest
    wanted = {artifact.manifest.component(name).name for name in components}
    chosen = [c for c in manifest.components if not components or c.name in wanted]
    job = Job(check_picture(artifact, None), SEED)
    rows = []
    progress.plan({component.name: max(component.flops, 1) for component in manifest.components})
    for component in manifest.components[: manifest.components.index(chosen[-1]) + 1]:
        progress.begin(component.name)
        artifact.verify(component)
        since = time.perf_counter()
        runner = OnnxRunner(artifact.path(component, "model"))
        load_ms = 1000 * (time.perf_counter() - since)
        feeds = job.feeds(component)
        calls = samples if component in chosen else 1  # once: the others need its output
        taken: list[float] = []
        begun = time.perf_counter()
        while len(taken) < calls and (len(taken) < 2 or time.perf_counter() - begun < seconds):
            since = time.perf_counter()
            outputs = runner.run(feeds)
            taken.append(1000 * (time.perf_counter() - since))
            progress.advance(max(len(taken) / calls, (time.perf_counter() - begun) / seconds))
        job.outputs[component.name] = outputs[component.outputs[0].name]
        if component in chosen:
            rows.append(ComponentProfile(component.name, Latency.of(taken), first_load_ms=load_ms))
        progress.end()
    return Profile(
        schema_version=SCHEMA_VERSION,
        asked_for="this computer",
        device=f"{platform.system()} {platform.machine()}",
        chipset=_processor(),
        source="host",
        created=now(),
        artifact=manifest.name,
        manifest_sha256=artifact.digest,
        components=tuple(rows),
        total_ms=total_ms(rows),
        notes=("the float32 graphs on onnxruntime's CPU provider, with as many threads as it likes",),
        tools={"onnxruntime": _onnxruntime()},
    )


def run_on_host(artifact: Artifact, image: str | None) -> dict[str, tuple[dict[str, Array], Array]]:
    """Make a clip on this computer; return each component's inputs by name, and its output.

    The picture is the file `image`, or a smooth pattern. Errors as in `Pipeline.generate_all`, MediaError.
    """
    taken: dict[str, tuple[dict[str, Array], Array]] = {}
    pipeline = Pipeline.open(artifact)
    recording = Pipeline(artifact, lambda component: _Recorder(pipeline.load(component), component, taken))
    recording.generate(check_picture(artifact, image), SEED)
    return taken


def check_picture(artifact: Artifact, image: str | Path | None) -> Array:
    """Return the picture of that file as the artifact wants it, or a smooth pattern; float32 in [-1, 1]."""
    spec = artifact.manifest.pipeline
    if image is not None:
        from mobilevd_deploy.media import read_picture

        return read_picture(image, spec.width, spec.height).pixels
    y, x = np.mgrid[0 : spec.height, 0 : spec.width] / max(spec.height, spec.width)
    waves = [np.sin(5 * x + 3 * y), np.cos(7 * x * y), np.sin(4 * (x - 0.5) ** 2 + 6 * y)]
    return np.stack(waves)[None].astype(np.float32)


class _Recorder:
    """A runner that keeps what goes in and comes out."""

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


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    lines = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return lines[0] if lines else platform.machine()


def _onnxruntime() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)
