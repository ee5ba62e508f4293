"""Generate clips: run the components of an artifact one after another, wired as its manifest says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from mobilevd_deploy.artifact.artifact import Artifact
from mobilevd_deploy.artifact.manifest import Component
from mobilevd_deploy.base.progress import Progress
from mobilevd_deploy.base.tensors import Array
from mobilevd_deploy.errors import ArtifactError, UsageError
from mobilevd_deploy.model.interface import TensorSpec
from mobilevd_deploy.runtime.noise import unit_noise
from mobilevd_deploy.runtime.runners import Loader, OnnxRunner, PartsRunner, Runner, check_providers


@dataclass(frozen=True)
class Pipeline:
    """An artifact and the loader of its components, which decides where they run."""

    artifact: Artifact
    load: Loader

    @classmethod
    def open(
        cls, artifact: Artifact | str | Path, providers: Sequence[str] = ("CPUExecutionProvider",)
    ) -> Pipeline:
        """Open an artifact to run on onnxruntime with these execution providers, best first.

        "npu-sim" alone runs the context binaries on the HTP simulator, "quantised" alone the quantised graphs
        on the CPU. Raises ArtifactError for a damaged artifact, UsageError for a provider that is not
        available, or graphs that the artifact does not have.
        """
        opened = artifact if isinstance(artifact, Artifact) else Artifact.open(artifact)
        match tuple(providers):
            case ("npu-sim" | "quantised" as kind,):
                return cls(opened, loader(opened, kind))
            case chosen:
                return cls(opened, loader(opened, "onnx", chosen))

    def generate(self, image: npt.ArrayLike, seed: int, progress: Progress | None = None) -> Array:
        """Generate a clip: picture (1, 3, H, W) in [-1, 1] to frames float32 (T, 3, H, W), not clamped.

        Errors as in `generate_all`.
        """
        return self.generate_all([(image, seed)], progress)[0]

    def generate_all(
        self, requests: Iterable[tuple[npt.ArrayLike, int]], progress: Progress | None = None
    ) -> list[Array]:
        """Generate the clip of each (picture, seed), loading every component once.

        Only one component is in memory at a time. Raises UsageError for a picture of another shape or range
        or a seed outside [0, 2^64), ArtifactError for damaged files and for outputs that the manifest does
        not describe, ResourceError if memory runs out.
        """
        progress, components = progress or Progress(), self.artifact.manifest.components
        jobs = [ClipJob(self._check_image(image), seed) for image, seed in requests]
        progress.plan({component.name: max(component.flops, 1) for component in components})
        for component in components:
            progress.begin(component.name)
            run_component(component, self.load, jobs, progress.advance)
            progress.end()
        return [job.outputs[components[-1].name].astype(np.float32, copy=False) for job in jobs]

    def _check_image(self, image: npt.ArrayLike) -> Array:
        shape, (low, high) = (
            self.artifact.manifest.pipeline.image_shape,
            self.artifact.manifest.pipeline.image_range,
        )
        values = np.asarray(image)
        if values.shape != shape:
            raise UsageError(f"the image has shape {values.shape}, the artifact needs {shape}")
        if not (values.min() >= low and values.max() <= high):
            raise UsageError(f"the image's values are not all from {low:g} to {high:g}")
        return values


@dataclass(frozen=True)
class ClipJob:
    """The run of one clip: the picture, the seed of its noise, and the outputs of the components so far."""

    image: Array
    seed: int
    outputs: dict[str, Array] = field(default_factory=dict)

    def feeds(self, component: Component) -> dict[str, Array]:
        """Return a component's inputs, each from the source that the manifest names."""
        return self.gather(component.inputs)

    def gather(self, inputs: Iterable[TensorSpec]) -> dict[str, Array]:
        """Return these inputs by name."""
        return {tensor.name: self._feed(tensor) for tensor in inputs}

    def _feed(self, tensor: TensorSpec) -> Array:
        kind, _, which = (tensor.source or "").partition(":")
        if kind == "image":
            value = self.image
        elif kind == "noise":
            value = unit_noise(self.seed, int(which), tensor.shape)
        else:
            value = self.outputs[which]
        return value.astype(tensor.dtype, copy=False)


def run_component(
    component: Component,
    load: Loader,
    jobs: Sequence[ClipJob],
    advance: Callable[[float], None] = lambda done: None,
) -> None:
    """Load a component once and run it for every job; jobs keep the outputs. Errors as `generate_all`."""
    runner = load(component)
    for number, job in enumerate(jobs, start=1):
        job.outputs[component.name] = _check_outputs(component, runner.run(job.feeds(component)))
        advance(number / len(jobs))


def loader(
    artifact: Artifact,
    kind: Literal["onnx", "quantised", "npu-sim"],
    providers: Sequence[str] = ("CPUExecutionProvider",),
) -> Loader:
    """Return a loader of an artifact's components that checks their digests; see `Pipeline.open`.

    Raises UsageError for a provider that is not available, or graphs that the artifact does not have.
    """
    components = artifact.manifest.components
    if kind == "npu-sim":
        if any(not component.npu for component in components):
            raise UsageError(
                f"{artifact.root} has no context binaries",
                next_step="export with a recipe that has [npu], for example --recipe xiaomi-14-pro",
            )
        return partial(_load_simulated, artifact)
    role = "model" if kind == "onnx" else "quantised"
    if any(role not in component.files for component in components):
        raise UsageError(
            f"{artifact.root} has no quantised graphs",
            next_step="export with a recipe that has [quant], for example --recipe xiaomi-14-pro",
        )
    check_providers(providers)
    return partial(_load_onnx, artifact, role, tuple(providers))


def _load_onnx(artifact: Artifact, role: str, providers: Sequence[str], component: Component) -> Runner:
    artifact.verify(component)
    return OnnxRunner(artifact.path(component, role), providers)


def _load_simulated(artifact: Artifact, component: Component) -> Runner:
    from mobilevd_deploy.qnn.simulator import NpuSimRunner

    artifact.verify(component)
    return PartsRunner(
        component.npu[0].parts, lambda part: NpuSimRunner(artifact.root / part.files["wrapper"].path)
    )


def _check_outputs(component: Component, outputs: Mapping[str, Array]) -> Array:
    """Return the component's only output. Raises ArtifactError if the manifest describes another."""
    (spec,) = component.outputs
    value = outputs.get(spec.name)
    if value is None or value.shape != spec.shape:
        found = {name: array.shape for name, array in outputs.items()}
        raise ArtifactError(f"{component.name} gave {found}, the manifest says {spec.name} {spec.shape}")
    if not np.isfinite(value).all():
        raise ArtifactError(f"{component.name} gave NaN or Inf", next_step="try another seed or picture")
    return value
