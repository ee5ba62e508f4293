"""Stages that calibrate, quantise with AIMET, and judge the result on pictures not used for calibration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mobilevd_deploy.artifact.manifest import FileEntry
from mobilevd_deploy.base.processes import StageCost, Steps
from mobilevd_deploy.base.progress import Progress, shares
from mobilevd_deploy.base.tensors import psnr_db, sqnr_db
from mobilevd_deploy.config.spec import ComponentName
from mobilevd_deploy.errors import ParityError
from mobilevd_deploy.npu.onnx_export import DATA, MODEL
from mobilevd_deploy.quantize.judging import answers, conditioning, sensitivity
from mobilevd_deploy.quantize.simulation import quantise
from mobilevd_deploy.runtime.media import to_uint8, write_sheet
from mobilevd_deploy.runtime.pipeline import ClipJob, run_component
from mobilevd_deploy.runtime.runners import OnnxRunner
from mobilevd_deploy.stages.export import build_deploy_form
from mobilevd_deploy.stages.job import (
    JUDGE_ALL_UP_TO_FLOPS,
    MORE_PICTURES_OR_BITS,
    ExportJob,
    StageContext,
    graph_files,
    json_number,
    require,
    runs_graph,
)
from mobilevd_deploy.stages.records import StageOutput

SHEET = "sheet.png"
"""In the work folder: input, float clip and quantised clip of the first judge, for the report."""

_ENCODINGS = "encodings.pt"


# ---- calibrate ----


def calibrate(job: ExportJob, context: StageContext) -> StageOutput:
    """Run the float graphs on every picture, one component at a time, and keep their outputs."""
    components = job.components.values()
    files: tuple[Path, ...] = ()
    costs: dict[str, StageCost] = {}
    for component, share in zip(
        components, shares(context.progress, [c.flops for c in components]), strict=True
    ):
        steps = Steps(context.steps.apart, share)
        files = steps.run(component.name, _answer_pictures, job, component.name)
        costs |= steps.costs
    return StageOutput(files, steps=costs)


def _answer_pictures(job: ExportJob, name: ComponentName, progress: Progress) -> tuple[Path, ...]:
    """Run one float component on every picture; a file per picture holds it and all outputs so far."""
    assert job.pictures is not None
    component, count = job.components[name], len(job.pictures.values)
    is_first = name == next(iter(job.components))
    runner = OnnxRunner(job.float_folder(name) / MODEL)
    for index in range(count):
        path = job.sample_path(index)
        path.parent.mkdir(parents=True, exist_ok=True)
        sample = ClipJob(job.pictures.values[index], index) if is_first else job.load_sample(path)
        run_component(component, lambda _: runner, [sample])
        arrays: dict[str, Any] = {"image": sample.image, **sample.outputs}
        np.savez(path, **arrays)
        progress.advance((index + 1) / count)
    return tuple(job.sample_path(index) for index in range(count))


def note_calibrated(job: ExportJob, values: Mapping[str, Any]) -> None:
    """Do nothing: calibration only writes files."""


# ---- quantise ----


def quantise_component(job: ExportJob, context: StageContext, name: ComponentName) -> StageOutput:
    """Quantise one component with AIMET, judge the simulation, then judge the graph that AIMET wrote."""
    steps = context.steps
    output = steps.run("AIMET", run_aimet, job, name)
    # Two processes, because onnxruntime keeps its memory: 17.7 GB for both graphs of the paper's UNet.
    quantised = steps.run("judge quantised", answers_of_quantised, job, name)
    ratios = conditioning(quantised, steps.run("judge float", answers_of_float, job, name))
    require_conditioning(job, name, ratios)
    return StageOutput(output.files, output.values | {"conditioning": ratios})


def run_aimet(job: ExportJob, name: ComponentName, progress: Progress) -> StageOutput:
    """Quantise one component, judge it, write its QDQ graph and its output for the first judge."""
    assert job.recipe.quant is not None
    component = job.components[name]
    state = job.folder.work / name / _ENCODINGS
    state.parent.mkdir(parents=True, exist_ok=True)
    network = build_deploy_form(name, job.checkpoint, job.recipe, job.folder.work)
    quantised = quantise(network, job.calibration_inputs(component), job.recipe.quant.of(name), state=state)
    feeds, exact = job.judged(component)
    progress.advance(0.4)
    given = [quantised.run(values) for values in feeds[: len(exact)]]
    drift = min(sqnr_db(expected, out) for expected, out in zip(exact, given, strict=True))
    require(name, "the quantised network vs float", drift, job.recipe.floors.quantised_sqnr_db)
    progress.advance(0.5)
    quantised.export(job.quantised_folder(name), feeds[0], [component.outputs[0].name])
    simulated = job.simulated_path(name)
    np.savez(simulated, given=given[0])
    large = component.flops > JUDGE_ALL_UP_TO_FLOPS
    alone = {} if large else sensitivity(quantised, feeds[0])
    blocks = {block: json_number(drift) for block, drift in alone.items()}
    return StageOutput(
        (*graph_files(job.quantised_folder(name)), simulated),
        {"drift": json_number(drift), "sensitivity": blocks},
    )


def answers_of_quantised(job: ExportJob, name: ComponentName, _: Progress) -> dict[str, float]:
    """Run the QDQ graph, compare it with AIMET's simulation, and return how far each input moves its output.

    onnxruntime is faster than AIMET, and this is the graph that is compiled.
    """
    component = job.components[name]
    feeds, exact = job.judged(component)
    run = runs_graph(job.quantised_folder(name), component)
    given = [run(values) for values in feeds[: len(exact)]]
    drift = min(sqnr_db(expected, out) for expected, out in zip(exact, given, strict=True))
    job.require_agreement(component, "the written graph", given[0], drift)
    return answers(run, feeds, given)


def answers_of_float(job: ExportJob, name: ComponentName, _: Progress) -> dict[str, float]:
    """Return how far each input moves the output of the float graph."""
    component = job.components[name]
    feeds, exact = job.judged(component)
    return answers(runs_graph(job.float_folder(name), component), feeds, exact)


def require_conditioning(job: ExportJob, name: str, ratios: Mapping[str, float]) -> None:
    """Raise ParityError if an input has far more or less effect than in the float component."""
    floor = job.recipe.floors.conditioning
    for tensor, ratio in ratios.items():
        if not floor <= ratio <= 1 / floor:
            raise ParityError(
                f"{name}: when {tensor} changes, the quantised output moves {ratio:.2f} times "
                f"as far as the float one; from {floor:g} to {1 / floor:.2f} is allowed",
                next_step=MORE_PICTURES_OR_BITS,
            )


def note_quantised(job: ExportJob, values: Mapping[str, Any], name: ComponentName) -> None:
    """Add the files and the measurements of the quantised graph."""
    root, roles = job.folder.artifact, {MODEL: "quantised", DATA: "quantised_data"}
    files = {roles[path.name]: FileEntry.of(root, path) for path in graph_files(job.quantised_folder(name))}
    component = job.components[name]
    job.components[name] = dataclasses.replace(component, files=component.files | files)
    job.drift.setdefault("quantised", {})[name] = values["drift"]
    job.conditioning[name] = values["conditioning"]
    job.sensitivity[name] = values["sensitivity"]


# ---- judge clip ----


def judge_clip(job: ExportJob, context: StageContext) -> StageOutput:
    """Run the quantised graphs in order and compare the clip with the float clip."""
    return context.steps.run("rest", _judge_clip, job)


def _judge_clip(job: ExportJob, _: Progress) -> StageOutput:
    components = tuple(job.components.values())
    last, judges = components[-1].name, job.judges()
    if max(component.flops for component in components) > JUDGE_ALL_UP_TO_FLOPS:
        judges = judges[:1]
    clips = [ClipJob(judge.image, judge.seed) for judge in judges]
    for component in components:
        run_component(component, lambda c: OnnxRunner(job.quantised_folder(c.name) / MODEL), clips)
    pairs = [(judge.outputs[last], clip.outputs[last]) for judge, clip in zip(judges, clips, strict=True)]
    worst = min(psnr_db(exact, quantised, peak=2.0) for exact, quantised in pairs)
    floor = job.recipe.floors.clip_psnr_db
    if not worst >= floor:
        raise ParityError(
            f"the quantised clip is {worst:.1f} dB PSNR from the float clip, the floor is {floor:g} dB",
            next_step=MORE_PICTURES_OR_BITS,
        )
    sheet = job.folder.work / SHEET
    rows = [("input", to_uint8(judges[0].image))]
    for label, clip in zip(("float", "quantised"), pairs[0], strict=True):
        rows.append((label, to_uint8(clip)[:: max(1, len(clip) // 7)]))
    write_sheet(rows, sheet)
    return StageOutput((sheet,), {"psnr_db": json_number(worst)})


def note_clip(job: ExportJob, values: Mapping[str, Any]) -> None:
    """Add the clip's PSNR."""
    job.clip_psnr_db = values["psnr_db"]
