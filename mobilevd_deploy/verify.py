"""Check an artifact against its manifest: files, targets, and the outputs of one graph against another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from mobilevd_deploy.artifact.artifact import Artifact
from mobilevd_deploy.artifact.manifest import Component
from mobilevd_deploy.base.progress import Progress
from mobilevd_deploy.base.tensors import Array, decibels, psnr_db, sqnr_db
from mobilevd_deploy.config.recipe import Recipe
from mobilevd_deploy.config.strict import from_dict
from mobilevd_deploy.errors import MobileVDError
from mobilevd_deploy.qnn.simulator import SIMULATE_UP_TO_FLOPS
from mobilevd_deploy.qnn.targets import read_target
from mobilevd_deploy.quantize.calibration import drawn_pictures
from mobilevd_deploy.runtime.pipeline import ClipJob, loader, run_component
from mobilevd_deploy.runtime.runners import Loader

_SEED = 20241207


@dataclass(frozen=True)
class ArtifactCheck:
    """One check: `what` was checked, in which component (None: the whole artifact), and the outcome."""

    what: str
    component: str | None
    ok: bool
    detail: str


def verify(
    artifact: Artifact, *, simulate: bool = False, progress: Progress | None = None
) -> list[ArtifactCheck]:
    """Check digests, the chips that the binaries name, and every graph's outputs on a drawn picture.

    The float graphs are the reference. Quantised graphs run on onnxruntime. With `simulate` the context
    binaries run on the HTP simulator, each on the simulator's outputs of the components before it. On equal
    inputs, binaries with 16-bit activations must agree with the quantised graph and others with the float
    graph; the simulated clip must agree with both clips. A component above `SIMULATE_UP_TO_FLOPS` is not
    simulated, and then there is no simulated clip. The floors are the recipe's. Damaged files are never run.
    """
    progress, manifest = progress or Progress(), artifact.manifest
    files = _check("files", None, lambda: _digests(artifact))
    targets = [
        _check(f"{binary.target} binary", c.name, lambda c=c, i=i: _target(artifact, c, i))  # type: ignore[misc]
        for c in manifest.components
        for i, binary in enumerate(c.npu)
    ]
    if not all(check.ok for check in (files, *targets)):
        return [files, *targets]
    checks, recipe = [files, *targets], from_dict(Recipe, manifest.recipe)
    floors, scheme, spec = recipe.floors, recipe.quant, manifest.pipeline
    picture = drawn_pictures(spec.width, spec.height, 1, _SEED).values[0]
    reference, quantised, simulated = (ClipJob(picture, _SEED) for _ in range(3))
    left_out: list[str] = []
    progress.plan({c.name: max(c.flops, 1) for c in manifest.components})
    for c in manifest.components:
        progress.begin(c.name)
        run_component(c, loader(artifact, "onnx"), [reference])
        exact = reference.outputs[c.name]
        if scheme is not None:
            load = loader(artifact, "quantised")
            feeds = reference.feeds(c)
            check, _ = _agrees("quantised graph", c, load, feeds, exact, floors.quantised_sqnr_db)
            checks.append(check)
            run_component(c, load, [quantised])
        given = None
        if simulate and c.npu:
            check, given = _simulate(artifact, c, recipe, simulated.feeds(c))
            checks.append(check)
        if given is None:
            left_out.append(c.name)
        simulated.outputs[c.name] = exact if given is None else given
        progress.end()
    last = manifest.components[-1].name
    clips = [("quantised clip", reference, quantised)] if scheme is not None else []
    if simulate and any(c.npu for c in manifest.components):
        if left_out:
            why = f"there is none: {', '.join(left_out)} did not run on the simulator"
            checks.append(ArtifactCheck("simulated clip", None, True, why))
        else:
            clips.append(("simulated clip", reference, simulated))
            if scheme is not None:
                clips.append(("simulated clip, against the quantised graphs'", quantised, simulated))
    for what, expected, job in clips:
        psnr = psnr_db(expected.outputs[last], job.outputs[last], peak=2.0)
        checks.append(_above(f"{what}, PSNR", None, psnr, floors.clip_psnr_db))
    return checks


def _simulate(
    artifact: Artifact, component: Component, recipe: Recipe, feeds: dict[str, Array]
) -> tuple[ArtifactCheck, Array | None]:
    """Run a binary on the simulator and compare; None: it was not simulated, or did not run."""
    expected_of, floor = recipe.agreement_floor(component.name)
    kind: Literal["onnx", "quantised"] = "onnx"
    what = "float16 binary, simulated" if recipe.quant is None else "binary, simulated"
    if expected_of == "quantised":
        kind, what = "quantised", f"{what}, against the quantised graph"
    if component.flops > SIMULATE_UP_TO_FLOPS:
        why = f"not simulated: {component.flops / 1e9:.0f} GFLOPs are too many for the simulator"
        return ArtifactCheck(what, component.name, True, why), None
    expected = loader(artifact, kind)(component).run(feeds)[component.outputs[0].name]
    return _agrees(what, component, loader(artifact, "npu-sim"), feeds, expected, floor)


def _agrees(
    what: str, component: Component, load: Loader, feeds: dict[str, Array], expected: Array, floor: float
) -> tuple[ArtifactCheck, Array | None]:
    """Run a component and compare it; a component that does not run fails the check, with output None."""
    try:
        given = load(component).run(feeds)[component.outputs[0].name]
    except MobileVDError as error:
        return ArtifactCheck(what, component.name, False, error.what), None
    return _above(what, component.name, sqnr_db(expected, given), floor), given


def _above(what: str, component: str | None, value: float, floor: float) -> ArtifactCheck:
    return ArtifactCheck(what, component, value >= floor, f"{decibels(value)}, floor {floor:g} dB")


def _check(what: str, component: str | None, look: Callable[[], str]) -> ArtifactCheck:
    try:
        return ArtifactCheck(what, component, True, look())
    except MobileVDError as error:
        return ArtifactCheck(what, component, False, error.what)


def _digests(artifact: Artifact) -> str:
    artifact.verify()
    count = sum(1 for _ in artifact.manifest.all_files())
    return f"{count} digests, {artifact.bytes / 1e6:.1f} MB"


def _target(artifact: Artifact, component: Component, index: int) -> str:
    binary = component.npu[index]
    for part in binary.parts:
        soc, arch = read_target(artifact.root / part.files["context"].path)
        if (soc, arch) != (binary.target, binary.arch):
            raise MobileVDError(
                f"it was compiled for {soc}, V{arch}; the manifest says {binary.target}, V{binary.arch}"
            )
    parts = f", {len(binary.parts)} parts" if len(binary.parts) > 1 else ""
    return f"{binary.target}, Hexagon V{binary.arch}, QAIRT {binary.sdk}{parts}"
