"""Stages that compile a component for a chip and run its binary on the HTP simulator."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mobilevd_deploy.artifact.manifest import Component, FileEntry, NpuBinary, NpuPart
from mobilevd_deploy.base.graphs import read_shaped
from mobilevd_deploy.base.processes import StageCost, memory_bytes, side_by_side
from mobilevd_deploy.base.progress import Progress, shares
from mobilevd_deploy.base.tensors import Tensors, sqnr_db
from mobilevd_deploy.config.recipe import Recipe
from mobilevd_deploy.config.spec import ComponentName
from mobilevd_deploy.errors import ExportError
from mobilevd_deploy.qnn.compiled import check_graph
from mobilevd_deploy.qnn.compiler import compile_context
from mobilevd_deploy.qnn.lint import lint
from mobilevd_deploy.qnn.simulator import SIMULATE_UP_TO_FLOPS, NpuSimRunner
from mobilevd_deploy.qnn.split import (
    Cut,
    compiler_bytes,
    compiler_work,
    fewest_parts,
    plan_cut,
    write_parts,
)
from mobilevd_deploy.qnn.targets import find_target
from mobilevd_deploy.runtime.runners import OnnxRunner, PartsRunner
from mobilevd_deploy.stages.export import build_deploy_form
from mobilevd_deploy.stages.job import ExportJob, StageContext, json_number, require
from mobilevd_deploy.stages.records import Pieces, StageOutput, StageRecord

# ---- ranges, for float16 ----


def measure_ranges(job: ExportJob, context: StageContext, name: ComponentName) -> StageOutput:
    """Find the largest magnitude of each layer's output over all pictures; float16 ends at 65,504."""
    return context.steps.run("rest", _measure_ranges, job, name)


def _measure_ranges(job: ExportJob, name: ComponentName, _: Progress) -> StageOutput:
    network = build_deploy_form(name, job.checkpoint, job.recipe, job.folder.work)
    samples = (job.load_sample(path).feeds(job.components[name]) for path in job.sample_paths())
    return StageOutput((), largest_magnitudes(network, samples))


def note_ranges(job: ExportJob, values: Mapping[str, float], name: ComponentName) -> None:
    """Keep the magnitudes for the compiler's lint."""
    job.magnitudes[name] = dict(values)


@torch.no_grad()
def largest_magnitudes(network: nn.Module, samples: Iterable[Tensors]) -> dict[str, float]:
    """Return the largest magnitude of each leaf module's output over all samples, by module path.

    `samples` are float32 inputs in the order of the network's arguments, read one at a time.
    """
    magnitudes: dict[str, float] = {}

    def watch(path: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(_module: nn.Module, _arguments: Any, output: Tensor) -> None:
            # np.maximum keeps a NaN, which is not below any limit.
            magnitudes[path] = float(np.maximum(magnitudes.get(path, 0.0), output.abs().max().item()))

        return hook

    handles = [
        module.register_forward_hook(watch(path))
        for path, module in network.named_modules()
        if not any(module.children())
    ]
    for sample in samples:
        network(*(torch.from_numpy(value) for value in sample.values()))
    for handle in handles:
        handle.remove()
    return magnitudes


# ---- compile ----


def compile_component(job: ExportJob, context: StageContext, name: ComponentName, target: str) -> StageOutput:
    """Compile one component for one chip, whole or in parts. Every finished part is recorded as a piece."""
    return context.steps.run("rest", _compile, job, name, target, context.pieces)


def _compile(
    job: ExportJob, name: ComponentName, target: str, pieces: Pieces, progress: Progress
) -> StageOutput:
    npu, quantised = job.recipe.npu, job.recipe.quant is not None
    assert npu is not None
    chip, graph = find_target(target), job.graph_to_compile(name)
    magnitudes = job.magnitudes.get(name, {})
    for finding in lint(graph, float16=not quantised, vtcm_mb=npu.vtcm_mb, peaks=magnitudes):
        if finding.next_step:
            raise ExportError(f"{name}: {finding}", next_step=finding.next_step)
        progress.say(f"{name}: {finding}")
    # Modules with a rule of 32 bits may run in float.
    rules = job.recipe.quant.of(name).rules if job.recipe.quant else ()
    floats = [f"{rule.modules}/*" for rule in rules if 32 in (rule.weights, rule.activations)]
    root = job.folder.artifact / name / target

    def compile_part(path: Path, part: str, share: Progress, stop: threading.Event) -> StageRecord:
        folder = root / part.replace(" ", "")

        def act() -> StageOutput:
            made = compile_context(path, folder, chip, npu, float16=not quantised, progress=share, stop=stop)
            check_graph(made.graph, precision(job.recipe), [*npu.allow, *floats])
            values = {
                "folder": folder.relative_to(job.folder.artifact).as_posix(),
                "arch": made.arch,
                "qnn_api": made.qnn_api,
                "sdk": made.sdk,
                "dram_read": made.dram.read if made.dram else None,
                "dram_written": made.dram.written if made.dram else None,
            }
            step = f"compiler part {part}" if part else "compiler"
            cost = StageCost(round(made.seconds, 3), made.peak_bytes)
            return StageOutput((made.wrapper, made.context), values, {step: cost})

        record = pieces.run(f"part {part or 1}", act, share)
        share.advance(1)
        return record

    with _cut(job, name, graph, pieces, progress) as cut:
        names = [f"{n} of {len(cut)}" if len(cut) > 1 else "" for n in range(1, len(cut) + 1)]
        graphs = [read_shaped(path) for path, _, _ in cut]
        needed = [compiler_bytes(part, 4 if quantised else 2) for part in graphs]
        work = [compiler_work(part) for part in graphs]
        tasks = [
            functools.partial(compile_part, path, part, share)
            for (path, _, _), part, share in zip(cut, names, shares(progress, work), strict=True)
        ]
        # The compiler uses one thread for most of its time.
        made = side_by_side(tasks, needed, work, budget=memory_bytes()[1], workers=os.cpu_count() or 1)
    parts = [
        record.values | {"inputs": inputs, "outputs": outputs}
        for record, (_, inputs, outputs) in zip(made, cut, strict=True)
    ]
    files = [job.folder.root / file.path for record in made for file in record.files]
    steps = {step: cost for record in made for step, cost in record.steps.items()}
    return StageOutput(tuple(files), {"parts": parts}, steps)


@contextlib.contextmanager
def _cut(
    job: ExportJob, name: ComponentName, model: Path, pieces: Pieces, progress: Progress
) -> Iterator[list[tuple[Path, list[str], list[str]]]]:
    """Yield (file, inputs, outputs) of each graph to compile: the model, or its parts after a check."""
    assert job.recipe.npu is not None
    component, quantised = job.components[name], job.recipe.quant is not None
    whole = read_shaped(model)
    count = job.recipe.npu.parts if name == "unet" else 0
    count = count or fewest_parts(whole, float_bytes=4 if quantised else 2)
    if count == 1:
        yield [(model, [t.name for t in component.inputs], [t.name for t in component.outputs])]
        return
    cut = plan_cut(whole, count)
    crossing = ", ".join(f"{size / 1e6:.1f} MB" for size in cut.crossing_bytes)
    progress.say(f"{name}: cut into {count} parts; {crossing} cross, as float32")
    files = write_parts(model, cut)
    try:
        pieces.run("check of parts", lambda: check_parts(job, component, files, cut), progress)
        yield [(f, [*part.inputs], [*part.outputs]) for f, part in zip(files, cut.parts, strict=True)]
    finally:
        for file in files:
            file.unlink()


def check_parts(job: ExportJob, component: Component, files: Sequence[Path], cut: Cut) -> StageOutput:
    """Run the parts in order on onnxruntime and compare the output with that of the whole graph."""
    judge, output = job.judges()[0], component.outputs[0].name
    chain = PartsRunner(cut.parts, lambda part: OnnxRunner(files[cut.parts.index(part)]))
    given = chain.run(judge.feeds(component))[output]
    drift, what = sqnr_db(judge.outputs[component.name], given), "its parts, run in order,"
    if job.recipe.quant is None:
        require(component.name, f"{what} vs float", drift, job.recipe.floors.onnx_sqnr_db)
    else:
        job.require_agreement(component, what, given, drift)
    return StageOutput()


def note_compiled(job: ExportJob, values: Mapping[str, Any], name: ComponentName, target: str) -> None:
    """Add the binary."""
    root, first = job.folder.artifact, values["parts"][0]
    parts = []
    for part in values["parts"]:
        roles = {"wrapper": f"{target}.onnx", "context": f"{target}.bin"}
        files = {role: FileEntry.of(root, root / part["folder"] / file) for role, file in roles.items()}
        wiring = tuple(part["inputs"]), tuple(part["outputs"])
        parts.append(NpuPart(files, *wiring, part["dram_read"], part["dram_written"]))
    arch, api, sdk = first["arch"], first["qnn_api"], first["sdk"]
    binary = NpuBinary(target, arch, precision(job.recipe), api, sdk, tuple(parts))
    component = job.components[name]
    job.components[name] = dataclasses.replace(component, npu=(*component.npu, binary))


def precision(recipe: Recipe) -> str:
    """Return the precision of a recipe's binaries, such as "w8a16" or "float16"."""
    return recipe.quant.precision if recipe.quant else "float16"


# ---- simulate ----


def simulate_component(
    job: ExportJob, context: StageContext, name: ComponentName, target: str
) -> StageOutput:
    """Run one binary on the simulator on the first judge; compare with AIMET's simulation and with float."""
    return context.steps.run("rest", run_simulator, job, name, target)


def run_simulator(job: ExportJob, name: ComponentName, target: str, progress: Progress) -> StageOutput:
    """Run a binary on the first judge, compare, and raise ParityError below the floor."""
    component = job.components[name]
    if component.flops > SIMULATE_UP_TO_FLOPS:
        progress.say(f"{name}: not simulated, {component.flops / 1e9:.0f} GFLOPs are too many")
        return StageOutput((), {"simulated": False})
    output, judge = component.outputs[0].name, job.judges()[0]
    root, (binary,) = job.folder.artifact, (b for b in component.npu if b.target == target)
    runner = PartsRunner(binary.parts, lambda part: NpuSimRunner(root / part.files["wrapper"].path))
    given = runner.run(judge.feeds(component))[output]
    drift = sqnr_db(judge.outputs[name], given)
    agreement = None
    if job.recipe.quant is None:
        _, floor = job.recipe.agreement_floor(name)
        require(name, "the simulator's float16 vs float", drift, floor)
    else:
        agreement = json_number(job.require_agreement(component, "the simulator", given, drift))
    return StageOutput((), {"simulated": True, "drift": json_number(drift), "agreement": agreement})


def note_simulated(job: ExportJob, values: Mapping[str, Any], name: ComponentName, target: str) -> None:
    """Add the simulator's SQNR."""
    if values["simulated"]:
        job.drift.setdefault(f"npu.{target}", {})[name] = values["drift"]
