"""Measure an artifact on this computer's CPU, to compare artifacts with each other.

These latencies do not predict a phone's. Compare artifacts on the same idle computer.
"""

from __future__ import annotations

import platform
import time
from pathlib import Path

from mobilevd_deploy.artifact.artifact import Artifact
from mobilevd_deploy.base.progress import Progress
from mobilevd_deploy.profiling.profile import (
    SCHEMA_VERSION,
    ComponentProfile,
    Latency,
    Profile,
    now,
    total_ms,
)
from mobilevd_deploy.runtime.pipeline import ClipJob
from mobilevd_deploy.runtime.recording import SEED, check_picture
from mobilevd_deploy.runtime.runners import OnnxRunner

# No further call of a component after this time; one call takes minutes at full size.
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

    `components`: only these; empty: all. Every component gets the inputs of a real clip. Raises ArtifactError
    for a damaged artifact or an unknown component, ResourceError if memory runs out.
    """
    progress, manifest = progress or Progress(), artifact.manifest
    wanted = {artifact.manifest.component(name).name for name in components}
    chosen = [c for c in manifest.components if not components or c.name in wanted]
    job = ClipJob(check_picture(artifact, None), SEED)
    rows = []
    progress.plan({component.name: max(component.flops, 1) for component in manifest.components})
    for component in manifest.components[: manifest.components.index(chosen[-1]) + 1]:
        progress.begin(component.name)
        artifact.verify(component)
        since = time.perf_counter()
        runner = OnnxRunner(artifact.path(component, "model"))
        load_ms = 1000 * (time.perf_counter() - since)
        feeds = job.feeds(component)
        calls = samples if component in chosen else 1  # once, because the others need its output
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
        notes=("the float32 graphs on onnxruntime's CPU provider, with its default number of threads",),
        tools={"onnxruntime": _onnxruntime()},
    )


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
