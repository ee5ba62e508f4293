"""deploy(): the whole way from a checkpoint to an artifact. READ FIRST."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from mobilevd_deploy.artifact.artifact import Artifact
from mobilevd_deploy.artifact.manifest import FileEntry, Manifest, PassReport, PipelineSpec, Source
from mobilevd_deploy.artifact.partial import PartialArtifact
from mobilevd_deploy.base.files import disk_guard
from mobilevd_deploy.base.processes import Steps
from mobilevd_deploy.base.progress import Progress
from mobilevd_deploy.config.recipe import Recipe
from mobilevd_deploy.config.strict import from_dict
from mobilevd_deploy.errors import ArtifactError, UsageError
from mobilevd_deploy.model.checkpoint import open_checkpoint
from mobilevd_deploy.model.interface import COMPONENTS
from mobilevd_deploy.quantize.calibration import Pictures, choose_pictures
from mobilevd_deploy.report import render_report
from mobilevd_deploy.stages.export import build_deploy_form, component_entry, export_component, weights_path
from mobilevd_deploy.stages.records import Stages

REPORT = "report.html"
APART_ABOVE_PARAMETERS = 300_000_000
"""A larger network takes a child process for each step (apart.py)."""

# Shares of the time, for the estimate of the rest: the UNet has most of the nodes.
_WEIGHTS: dict[str, float] = {"image_encoder": 2, "vae_encoder": 1, "unet": 12, "decoder": 1}
_LATER = ("quant", "npu")  # parts of a recipe that the float export does not depend on
_TOOLS = (
    "mobilevd-deploy",
    "torch",
    "diffusers",
    "transformers",
    "onnx",
    "onnxscript",
    "onnxsim",
    "onnxruntime",
)


def deploy(
    checkpoint_path: str | Path,
    recipe: Recipe,
    output: str | Path,
    progress: Progress | None = None,
    *,
    calibration: Sequence[str | Path] = (),
) -> Artifact:
    """Take a trained checkpoint to a verified artifact.

    1. Open the checkpoint: every name, shape and dtype is checked, nothing is run.
    2. Return what lies at `output` if it was made from the same checkpoint, recipe and tools.
    3. Claim a hidden folder beside `output`; finished stages of an interrupted run are found there.
    For each component in running order, as one resumable stage:
    4. Ask the trained network for reference outputs on a fixed probe.
    5. Rewrite it exactly (the UNet), each pass proven against the untouched network.
    6. Build the deploy form and write it as ONNX: simplified, checked, read back.
    7. Run the file on onnxruntime and compare with the reference.
    8. Where the recipe asks for it: calibrate, quantise with AIMET, compile for the NPU, prove it on the
       simulator (npu_stages.py), again as resumable stages.
    9. Write manifest and report, and give the artifact its name in one rename. What was calibrated and
       compiled stays in the hidden folder, for an export to another chip.

    `calibration`: pictures, or folders of them; left out, they are drawn as the demo's training clips are.

    Raises:
        CheckpointError, RewriteError, ExportError, ParityError, ResourceError: named in errors.py.
        UsageError: `output` exists and is not an artifact of ours, or another run is writing it.
    """
    progress = progress or Progress()
    output = Path(output)
    # 1.
    checkpoint = open_checkpoint(checkpoint_path)
    spec, tools = checkpoint.spec, tool_versions(recipe)
    source = Source(checkpoint.path.resolve().name, checkpoint.sha256)
    pictures = choose_pictures(spec, recipe, calibration)
    # 2.
    if (finished := _same_artifact(output, source, recipe, tools, pictures)) is not None:
        progress.say(f"{output}: nothing has changed since it was made, so it stays as it is")
        return finished
    # 3.
    with PartialArtifact(output) as folder, disk_guard(folder.root, 0):
        stages = Stages(folder, {"checkpoint": source.sha256, "tools": tools}, progress)
        shares = {f"export {name}": _WEIGHTS[name] for name in COMPONENTS}
        if pictures is not None:
            from mobilevd_deploy.stages import npu as npu_stages

            shares |= npu_stages.plan(recipe, _WEIGHTS)
        progress.plan(shares)
        sizes = [4 * checkpoint.parameters[name] for name in COMPONENTS]
        apart = sum(checkpoint.parameters.values()) > APART_ABOVE_PARAMETERS
        records = {
            name: stages.run(
                f"export {name}",
                {key: value for key, value in recipe.to_dict().items() if key not in _LATER},
                partial(export_component, name, checkpoint, recipe, folder, Steps(apart, progress)),
                disk_bytes=2 * sum(sizes[i:]),  # of all that is still to be written
            ).values
            for i, name in enumerate(COMPONENTS)
        }
        drift: dict[str, dict[str, float | None]] = {
            "onnx": {name: record["drift"] for name, record in records.items()}
        }
        components = tuple(
            component_entry(name, spec, record, folder.artifact) for name, record in records.items()
        )
        # 8.
        quality = sheet = None
        if pictures is not None:
            added = npu_stages.run(
                recipe,
                components,
                partial(build_deploy_form, checkpoint=checkpoint, recipe=recipe, work=folder.work),
                pictures,
                folder,
                stages,
                progress,
                apart=apart,
            )
            components, drift = added.components, drift | added.drift
            quality, sheet = added.quality, added.sheet
        # 9.
        manifest = Manifest(
            schema_version=1,
            created=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            name=folder.output.name,
            source=source,
            recipe=recipe.to_dict(),
            model=spec.to_dict(),
            passes=tuple(from_dict(PassReport, report) for report in records["unet"]["passes"]),
            drift=drift,
            components=components,
            pipeline=PipelineSpec(spec.frames, spec.height, spec.width, spec.step.fps),
            tools=tools,
            stages=stages.costs,
            quality=quality,
        )
        report = folder.artifact / REPORT
        report.write_text(render_report(manifest, checkpoint.importance(), sheet), encoding="utf-8")
        files = {"report": FileEntry.of(folder.artifact, report)}
        for name in COMPONENTS:
            weights_path(folder.work, name).unlink(missing_ok=True)
        # Another chip for the same network then costs no more than its compilation.
        return folder.finish(dataclasses.replace(manifest, files=files), keep=pictures is not None)


def tool_versions(recipe: Recipe) -> dict[str, str]:
    """Versions of everything that shapes an artifact; UsageError for a vendor's tool that is missing."""
    names = (*_TOOLS, *("aimet-torch",) * bool(recipe.quant), *("onnxruntime-qnn",) * bool(recipe.npu))
    try:
        versions = {name: importlib.metadata.version(name) for name in names}
    except importlib.metadata.PackageNotFoundError as error:
        raise UsageError(
            f"recipe {recipe.name} needs {error.name}, which is not installed",
            next_step="pip install 'mobilevd-deploy[npu]' (Linux x86-64), or choose --recipe onnx",
        ) from error
    return {"python": platform.python_version()} | versions


def _same_artifact(
    output: Path, source: Source, recipe: Recipe, tools: Mapping[str, str], pictures: Pictures | None
) -> Artifact | None:
    try:
        artifact = Artifact.open(output)
        manifest = artifact.manifest
        made_from = (manifest.source, manifest.recipe, manifest.tools)
        # The recipe's tuples are lists in JSON.
        if made_from != (source, json.loads(json.dumps(recipe.to_dict())), tools):
            return None
        judged_on = manifest.quality.sha256 if manifest.quality else None
        if recipe.quant and pictures is not None and judged_on != pictures.sha256:
            return None
        artifact.verify()
    except ArtifactError:
        return None
    return artifact
