"""The stage that exports one component: reference outputs, rewrites, ONNX, comparison."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from mobilevd_deploy.artifact.manifest import Component, FileEntry, PassReport
from mobilevd_deploy.base.progress import Progress
from mobilevd_deploy.base.tensors import Tensors
from mobilevd_deploy.config.recipe import Recipe
from mobilevd_deploy.config.spec import ComponentName, ModelSpec
from mobilevd_deploy.config.strict import from_dict
from mobilevd_deploy.errors import ParityError
from mobilevd_deploy.model.checkpoint import Checkpoint, read_weights, write_weights
from mobilevd_deploy.model.components import deploy_contract
from mobilevd_deploy.model.interface import component_tensors
from mobilevd_deploy.model.unet import MobileVDUNet
from mobilevd_deploy.npu.build import build_npu
from mobilevd_deploy.npu.onnx_export import DATA, MODEL, OnnxGraph, export_onnx, read_graph
from mobilevd_deploy.npu.skeleton import deploy_skeleton, rewrites
from mobilevd_deploy.npu.two_step_norms import write_two_step_norms
from mobilevd_deploy.passes.runner import UNetProbe, run_passes, select_passes
from mobilevd_deploy.runtime.runners import OnnxRunner
from mobilevd_deploy.stages.job import ExportJob, StageContext, graph_files, json_number
from mobilevd_deploy.stages.probe import Probe, make_probe
from mobilevd_deploy.stages.records import StageOutput

PROBE_SEED = 20241207
# The rewrites do not depend on the map's size. Larger maps are checked on about this many pixels.
_PROBE_PIXELS = 128


def export_component(job: ExportJob, context: StageContext, name: ComponentName) -> StageOutput:
    """Export one component from the checkpoint to a float ONNX file, and compare the two."""
    steps, folder, work = context.steps, job.float_folder(name), job.folder.work
    checkpoint, spec, recipe = job.checkpoint, job.spec, job.recipe
    steps.run("answer", _answer, name, checkpoint, work)
    reports = steps.run("rewrite", _rewrite_component, name, checkpoint, recipe, work)
    graph = steps.run("write", _write_component, name, spec, recipe, folder, work)
    drift = steps.run("compare", _compare_component, name, spec, recipe, folder, work)
    values = {
        "drift": json_number(drift),
        "passes": [dataclasses.asdict(report) for report in reports],
        "graph": dataclasses.asdict(graph),
    }
    return StageOutput((*graph_files(folder), _probe_path(work, name)), values)


def note_exported(job: ExportJob, values: Mapping[str, Any], name: ComponentName) -> None:
    """Add the component, its SQNR and, for the UNet, the reports of its rewrites."""
    inputs, outputs = component_tensors(name, job.spec)
    root, roles = job.folder.artifact, {MODEL: "model", DATA: "data"}
    files = {roles[path.name]: FileEntry.of(root, path) for path in graph_files(job.float_folder(name))}
    job.components[name] = Component(name, "onnx", files, inputs, outputs, **values["graph"])
    job.drift.setdefault("onnx", {})[name] = values["drift"]
    if name == "unet":
        job.passes = tuple(from_dict(PassReport, report) for report in values["passes"])


def _answer(name: ComponentName, checkpoint: Checkpoint, work: Path, progress: Progress) -> None:
    """Save a probe: inputs, and the outputs of the trained network for them."""
    inputs, outputs = component_tensors(name, checkpoint.spec)
    # Inputs that another component makes are its real outputs. On random embeddings, which no encoder makes,
    # a trained UNet multiplies the rounding errors of float32 by ten.
    given = {}
    for tensor in inputs:
        kind, _, which = str(tensor.source).partition(":")
        if kind == "component":
            (given[tensor.name],) = _read_probe(
                work, cast(ComponentName, which), checkpoint.spec
            ).reference.values()
    ask = partial(reference, deploy_contract(checkpoint.load(name)), outputs[0].name)
    probe = make_probe(inputs, PROBE_SEED, ask, given)
    if not np.isfinite(probe.reference[outputs[0].name]).all():
        raise ParityError(
            f"{name}: the trained network's outputs are not finite", next_step="check the weights"
        )
    values: dict[str, Any] = probe.inputs | probe.reference
    np.savez(_probe_path(work, name), **values)


def _rewrite_component(
    name: ComponentName, checkpoint: Checkpoint, recipe: Recipe, work: Path, progress: Progress
) -> tuple[PassReport, ...]:
    """Rewrite the network and save the weights of its deploy form; return the reports of the passes."""
    deployed, reports = deploy_form(name, checkpoint.load(name), checkpoint.spec, recipe, progress)
    write_weights(weights_path(work, name), deployed)
    return reports


def _write_component(
    name: ComponentName, spec: ModelSpec, recipe: Recipe, folder: Path, work: Path, progress: Progress
) -> OnnxGraph:
    """Write the deploy form as ONNX, and read the graph back."""
    probe = _read_probe(work, name, spec)
    deployed = _read_deploy_form(name, spec, recipe, work)
    for note in export_onnx(deployed, probe.inputs, [*probe.reference], folder, recipe.onnx):
        progress.say(note)
    return read_graph(folder / MODEL)


def _compare_component(
    name: ComponentName, spec: ModelSpec, recipe: Recipe, folder: Path, work: Path, progress: Progress
) -> float:
    """Return the SQNR in dB of the file's outputs against the trained network's.

    Where onnxruntime's rounding in large norms alone takes it below the floor, the SQNR without that counts.
    """
    probe = _read_probe(work, name, spec)
    drift = probe.drift(OnnxRunner(folder / MODEL).run(probe.inputs))
    if not drift >= recipe.floors.onnx_sqnr_db:
        accurate = folder / "two-step.onnx"
        try:
            if largest := write_two_step_norms(folder / MODEL, accurate):
                on_runner, drift = drift, probe.drift(OnnxRunner(accurate).run(probe.inputs))
                progress.say(
                    f"{name}: the graph is {drift:.1f} dB SQNR from the trained network; onnxruntime's CPU "
                    f"rounds norms over {largest:,} elements coarsely and gives {on_runner:.1f} dB"
                )
        finally:
            accurate.unlink(missing_ok=True)
    if not drift >= recipe.floors.onnx_sqnr_db:
        raise ParityError(
            f"{name}: the exported graph is {drift:.1f} dB from the trained network, "
            f"the floor is {recipe.floors.onnx_sqnr_db:g} dB",
            next_step="choose other graph forms in the recipe, or report it with the model's configuration",
        )
    return drift


def _probe_path(work: Path, name: ComponentName) -> Path:
    return work / f"{name}.npz"


def weights_path(work: Path, name: ComponentName) -> Path:
    """Return the file that holds a component's rewritten weights while the artifact is built."""
    return work / f"{name}.safetensors"


def _read_probe(work: Path, name: ComponentName, spec: ModelSpec) -> Probe:
    with np.load(_probe_path(work, name)) as arrays:
        inputs, outputs = ({t.name: arrays[t.name] for t in side} for side in component_tensors(name, spec))
    return Probe(inputs, outputs)


def _read_deploy_form(name: ComponentName, spec: ModelSpec, recipe: Recipe, work: Path) -> nn.Module:
    """Build the deploy form with the weights that `_rewrite_component` saved, memory-mapped."""
    network = deploy_skeleton(name, spec, recipe)
    read_weights(weights_path(work, name), network)
    return network


def build_deploy_form(name: ComponentName, checkpoint: Checkpoint, recipe: Recipe, work: Path) -> nn.Module:
    """Build the deploy form; rewrite the network again if an earlier run removed the rewritten weights."""
    if not weights_path(work, name).exists():
        _rewrite_component(name, checkpoint, recipe, work, Progress())
    return _read_deploy_form(name, checkpoint.spec, recipe, work)


def deploy_form(
    name: ComponentName, network: nn.Module, spec: ModelSpec, recipe: Recipe, progress: Progress
) -> tuple[nn.Module, tuple[PassReport, ...]]:
    """Rewrite a trained component in place (only the UNet has passes) and build its deploy form.

    Raises RewriteError if a pass changes the outputs.
    """
    reports = _rewrite(network, spec, recipe, progress) if isinstance(network, MobileVDUNet) else ()
    return build_npu(name, network, spec, recipe.graph), reports


def _rewrite(
    unet: MobileVDUNet, spec: ModelSpec, recipe: Recipe, progress: Progress
) -> tuple[PassReport, ...]:
    height, width = spec.latent_size
    least = spec.unet.size_multiple
    side = least * max(1, math.isqrt(_PROBE_PIXELS // (2 * least * least)))
    if height * width > 2 * side * side:
        height, width = side, 2 * side
        progress.say(f"unet: rewrites are checked on latents of {width}x{height}, the export at full size")
    probe = UNetProbe.make(unet, height, width)
    return run_passes(unet, select_passes(rewrites(recipe)), probe, recipe.floors.rewrite_sqnr_db)


@torch.no_grad()
def reference(network: nn.Module, output: str, inputs: Tensors) -> Tensors:
    """Run a network on float32 inputs in calling order; return its output by name."""
    return {output: network(*(torch.from_numpy(value) for value in inputs.values())).numpy()}
