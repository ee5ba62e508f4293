"""Does an artifact still do what its manifest says? Files, targets, and outputs graph against graph."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from mobilevd_deploy.artifact import Artifact, Component
from mobilevd_deploy.calibration import drawn_pictures
from mobilevd_deploy.errors import MobileVDError
from mobilevd_deploy.pipeline import Array, Job, Loader, loader, run_component
from mobilevd_deploy.probe import psnr_db, sqnr_db
from mobilevd_deploy.progress import Progress
from mobilevd_deploy.qnn import read_target
from mobilevd_deploy.recipe import Recipe
from mobilevd_deploy.spec import from_dict

_SEED = 20241207


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: what, of which component (None: of the whole), whether it holds, how."""

    what: str
    component: str | None
    ok: bool
    detail: str


def verify(artifact: Artifact, *, simulate: bool = False, progress: Progress | None = None) -> list[Check]:
    """Check digests, the chips that the binaries name, and every graph's outputs on a drawn picture.

    The float graphs are the reference. Quantised graphs run on onnxruntime; with `simulate` the context
    binaries run on the HTP simulator, where 16-bit ones have to agree with the quantised graph. Floors are
    the recipe's. Nothing that is damaged is run.
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
    reference, quantised = Job(picture, _SEED), Job(picture, _SEED)
    progress.plan({c.name: max(c.flops, 1) for c in manifest.components})
    for c in manifest.components:
        progress.begin(c.name)
        run_component(c, loader(artifact, "onnx"), [reference])
        exact, feeds = reference.outputs[c.name], reference.feeds(c)
        if scheme is not None:
            load = loader(artifact, "quantised")
            checks.append(_agrees("quantised graph", c, load, feeds, exact, floors.quantised_sqnr_db))
            run_component(c, load, [quantised])
        if simulate and c.npu:
            what, expected, floor = "float16 binary, simulated", exact, floors.float16_sqnr_db
            if scheme is not None:
                what, floor = "binary, simulated", floors.quantised_sqnr_db
            if scheme is not None and scheme.of(c.name).narrowest >= 16:
                expected = loader(artifact, "quantised")(c).run(feeds)[c.outputs[0].name]
                what, floor = "binary, simulated, against the quantised graph", floors.simulator_db
            checks.append(_agrees(what, c, loader(artifact, "npu-sim"), feeds, expected, floor))
        progress.end()
    if scheme is not None:
        last = manifest.components[-1].name
        psnr = psnr_db(reference.outputs[last], quantised.outputs[last], peak=2.0)
        checks.append(_above("quantised clip, PSNR", None, psnr, floors.clip_psnr_db))
    return checks


def _agrees(
    what: str, component: Component, load: Loader, feeds: dict[str, Array], expected: Array, floor: float
) -> Check:
    """Run a component and compare; one that does not run is a check that failed."""
    try:
        given = load(component).run(feeds)[component.outputs[0].name]
    except MobileVDError as error:
        return Check(what, component.name, False, error.what)
    return _above(what, component.name, sqnr_db(expected, given), floor)


def _above(what: str, component: str | None, value: float, floor: float) -> Check:
    shown = "identical" if value == math.inf else f"{value:.1f} dB"
    return Check(what, component, value >= floor, f"{shown}, floor {floor:g} dB")


def _check(what: str, component: str | None, look: Callable[[], str]) -> Check:
    try:
        return Check(what, component, True, look())
    except MobileVDError as error:
        return Check(what, component, False, error.what)


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
