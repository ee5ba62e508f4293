"""deploy(): a checkpoint becomes an artifact. READ FIRST.

    open            every name, shape and dtype is checked, nothing is run
    export NAME     rewrite exactly, write ONNX, compare            stages/export.py
    calibrate       run the float graphs on pictures                stages/quantise.py
    quantise NAME   AIMET, judged on other pictures                 stages/quantise.py
    judge clip      the quantised graphs against the float clip     stages/quantise.py
    ranges NAME     for float16 instead of the two above            stages/compile.py
    compile NAME T  a context binary for the chip T, read back      stages/compile.py
    simulate NAME T the binary on the HTP simulator                 stages/compile.py
    finish          manifest and report; one rename gives the artifact its name

NAME is each component in running order. One table, `stage_table`, plans, runs and resumes the stages.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mobilevd_deploy.artifact.artifact import Artifact
from mobilevd_deploy.artifact.manifest import FileEntry, Manifest, PipelineSpec, Quality, Source
from mobilevd_deploy.artifact.partial import PartialArtifact
from mobilevd_deploy.base.files import disk_guard
from mobilevd_deploy.base.places import require_folder_place, require_scratch
from mobilevd_deploy.base.processes import Steps
from mobilevd_deploy.base.progress import Progress
from mobilevd_deploy.config.recipe import Recipe
from mobilevd_deploy.errors import ArtifactError, UsageError
from mobilevd_deploy.model.checkpoint import Checkpoint, open_checkpoint
from mobilevd_deploy.model.interface import COMPONENTS
from mobilevd_deploy.model.lora import Lora
from mobilevd_deploy.quantize.calibration import JUDGES, Pictures, choose_pictures
from mobilevd_deploy.report.page import render_report
from mobilevd_deploy.stages.compile import (
    compile_component,
    measure_ranges,
    note_compiled,
    note_ranges,
    note_simulated,
    simulate_component,
)
from mobilevd_deploy.stages.export import export_component, note_exported, weights_path
from mobilevd_deploy.stages.job import ExportJob, Stage, StageContext
from mobilevd_deploy.stages.quantise import (
    SHEET,
    calibrate,
    judge_clip,
    note_calibrated,
    note_clip,
    note_quantised,
    quantise_component,
)
from mobilevd_deploy.stages.records import StageOutput, StageRecord, Stages

REPORT = "report.html"
APART_ABOVE_PARAMETERS = 300_000_000
"""A larger network takes a child process for each step (base/processes.py)."""

# Shares of the time: the UNet has most of the nodes.
_SHARES: dict[str, float] = {"image_encoder": 2, "vae_encoder": 1, "unet": 12, "decoder": 1}
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
    base: str | Path | None = None,
    loras: Sequence[Lora] = (),
) -> Artifact:
    """Take a trained checkpoint to a verified artifact.

    Args:
        checkpoint_path: a checkpoint in a form that `open_checkpoint` reads.
        recipe: graph forms, precision, chips and floors.
        output: folder of the artifact. If it holds an artifact from the same checkpoint, recipe, pictures and
            tools, that one is returned.
        progress: receives the stages as they begin and end.
        calibration: pictures, or folders of them. If empty, pictures are drawn like the demo's training
            clips.
        base, loras: as for `open_checkpoint`.

    An interrupted export resumes after its last finished stage, from the hidden folder `.NAME.partial` beside
    the output. After an export to binaries that folder stays, so another chip only needs its compilation.

    Raises:
        CheckpointError, RewriteError, ExportError, ParityError, ResourceError: see errors.py.
        UsageError: `output` or the temporary folder cannot be written, `output` exists and is not an artifact
            of ours, or another run is writing it.
    """
    progress, output = progress or Progress(), Path(output)
    require_folder_place(output.parent)
    require_scratch()
    checkpoint = open_checkpoint(checkpoint_path, base=base, loras=loras, notice=progress.say)
    source, tools = Source(checkpoint.path.resolve().name, checkpoint.sha256), tool_versions(recipe)
    pictures = choose_pictures(checkpoint.spec, recipe, calibration, progress)
    if (finished := _same_artifact(output, source, recipe, tools, pictures)) is not None:
        progress.say(f"{output}: nothing has changed since it was made, so it stays as it is")
        return finished
    with PartialArtifact(output) as folder, disk_guard(folder.root, 0):
        job = ExportJob(checkpoint, recipe, pictures, folder)
        stages = Stages(folder, {"checkpoint": source.sha256, "tools": tools}, progress)
        table = stage_table(job)
        _check_weights(checkpoint, progress)
        progress.plan({stage.name: stage.share for stage in table})
        for stage in table:
            record = _run_stage(stage, job, stages, progress)
            stage.note(job, record.values, *stage.arguments)
        return _finish(job, source, tools, stages)


def _check_weights(checkpoint: Checkpoint, progress: Progress) -> None:
    """Look for NaN and infinite weights before the first stage, about 3 s for each GB."""
    count = sum(checkpoint.parameters.values())
    if count > APART_ABOVE_PARAMETERS:
        progress.say(f"checking {count / 1e6:,.0f} M weights for NaN and infinite values")
    checkpoint.check_values()


def stage_table(job: ExportJob) -> list[Stage]:
    """List the stages of an export in running order."""
    recipe, table = job.recipe, list[Stage]()
    per_parameter = bytes_per_parameter(recipe)
    sizes = job.checkpoint.parameters
    inputs: dict[str, Any]
    float_inputs = {key: value for key, value in recipe.to_dict().items() if key not in _LATER}
    floors = {"floors": dataclasses.asdict(recipe.floors)}
    for name in COMPONENTS:
        writes = round(per_parameter["export"] * sizes[name])
        arguments: tuple[str, ...] = (name,)
        table.append(
            Stage(
                f"export {name}",
                _SHARES[name],
                float_inputs,
                export_component,
                note_exported,
                arguments,
                writes,
            )
        )
    if job.pictures is not None:
        inputs = {"pictures": job.pictures.sha256}
        table.append(Stage("calibrate", 1, inputs, calibrate, note_calibrated))
    if recipe.quant:
        inputs = {"quant": dataclasses.asdict(recipe.quant)} | floors
        for name in COMPONENTS:
            share, writes = 3 * _SHARES[name], round(per_parameter["quantise"] * sizes[name])
            table.append(
                Stage(f"quantise {name}", share, inputs, quantise_component, note_quantised, (name,), writes)
            )
        table.append(Stage("judge clip", 1, inputs, judge_clip, note_clip))
    elif recipe.npu:
        for name in COMPONENTS:
            table.append(Stage(f"ranges {name}", _SHARES[name], {}, measure_ranges, note_ranges, (name,)))
    for target in recipe.npu.targets if recipe.npu else ():
        inputs = {"npu": recipe.npu.deciding(target)} if recipe.npu else {}
        for name in COMPONENTS:
            share, arguments = _SHARES[name], (name, target)
            writes = round(per_parameter["compile"] * sizes[name])
            compiled, simulated = f"compile {name} {target}", f"simulate {name} {target}"
            table += [
                Stage(compiled, 3 * share, inputs, compile_component, note_compiled, arguments, writes),
                Stage(simulated, share, floors, simulate_component, note_simulated, arguments),
            ]
    return _with_all_to_come(table)


def bytes_per_parameter(recipe: Recipe) -> dict[str, float]:
    """Return the bytes per parameter that a stage writes: "export", "quantise", "compile" (for each chip).

    Every stage writes aside what it keeps: float32 weights and ONNX; quantised ONNX; and context binaries,
    measured as 993 MB for 881 M parameters in W8A16, 1.58 GB for 760 M in float16.
    """
    return {
        "export": 2 * 4.0,
        "quantise": 2 * 1.1 if recipe.quant else 0.0,
        "compile": (2 * 1.13 if recipe.quant else 2 * 2.1) if recipe.npu else 0.0,
    }


def _with_all_to_come(table: Sequence[Stage]) -> list[Stage]:
    """Add the bytes of all later stages to each stage, so that a small disk fails the first that runs."""
    left, stages = 0, list[Stage]()
    for stage in reversed(table):
        left += stage.disk_bytes
        stages.insert(0, dataclasses.replace(stage, disk_bytes=left))
    return stages


def _run_stage(stage: Stage, job: ExportJob, stages: Stages, progress: Progress) -> StageRecord:
    """Run a stage, or find it done by an earlier run."""
    apart = sum(job.checkpoint.parameters.values()) > APART_ABOVE_PARAMETERS
    pieces = stages.pieces(stage.name, stage.inputs)

    def act() -> StageOutput:
        steps = Steps(apart, progress)
        output = stage.act(job, StageContext(steps, pieces, progress), *stage.arguments)
        return dataclasses.replace(output, steps=output.steps | steps.costs)

    return stages.run(stage.name, stage.inputs, act, disk_bytes=stage.disk_bytes)


def _finish(job: ExportJob, source: Source, tools: Mapping[str, str], stages: Stages) -> Artifact:
    """Write manifest and report, and rename the artifact into place."""
    spec, folder, quality, sheet = job.spec, job.folder, None, None
    if job.recipe.quant and job.pictures is not None:
        pictures, judged = job.pictures, (job.clip_psnr_db, job.conditioning, job.sensitivity)
        quality = Quality(pictures.source, len(pictures.values) - JUDGES, pictures.sha256, *judged)
        sheet = (folder.work / SHEET).read_bytes()
    manifest = Manifest(
        schema_version=1,
        created=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        name=folder.output.name,
        source=source,
        recipe=job.recipe.to_dict(),
        model=spec.to_dict(),
        passes=job.passes,
        drift=job.drift,
        components=tuple(job.components.values()),
        pipeline=PipelineSpec(spec.frames, spec.height, spec.width, spec.step.fps),
        tools=dict(tools),
        stages=stages.costs,
        quality=quality,
    )
    report = folder.artifact / REPORT
    report.write_text(render_report(manifest, job.checkpoint.importance(), sheet), encoding="utf-8")
    files = {"report": FileEntry.of(folder.artifact, report)}
    for name in COMPONENTS:
        weights_path(folder.work, name).unlink(missing_ok=True)
    # The rest stays, so that another chip only needs its compilation.
    return folder.finish(dataclasses.replace(manifest, files=files), keep=job.pictures is not None)


def tool_versions(recipe: Recipe) -> dict[str, str]:
    """Return the versions of all tools that shape an artifact. Raises UsageError if one is missing."""
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
