"""deploy(): the whole way from a checkpoint to an artifact. READ FIRST."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from mobilevd_deploy.apart import Steps
from mobilevd_deploy.artifact import (
    Artifact,
    FileEntry,
    Manifest,
    PartialArtifact,
    PassReport,
    PipelineSpec,
    Source,
    TensorSpec,
    disk_guard,
)
from mobilevd_deploy.artifact import Component as ComponentEntry
from mobilevd_deploy.calibration import Pictures, drawn_pictures, read_pictures
from mobilevd_deploy.checkpoint import Checkpoint, open_checkpoint, read_weights, write_weights
from mobilevd_deploy.components import COMPONENTS, Component, deploy_contract
from mobilevd_deploy.errors import ArtifactError, ParityError, UsageError
from mobilevd_deploy.npu.build import build_npu
from mobilevd_deploy.onnx_export import DATA, MODEL, OnnxGraph, export_onnx, read_graph
from mobilevd_deploy.passes import UNetProbe, run_passes, select_passes
from mobilevd_deploy.pipeline import OnnxRunner
from mobilevd_deploy.probe import Probe, Tensors, make_probe
from mobilevd_deploy.progress import Progress
from mobilevd_deploy.recipe import QuantScheme, Recipe
from mobilevd_deploy.report.page import render_report
from mobilevd_deploy.skeleton import deploy_skeleton, rewrites
from mobilevd_deploy.spec import ModelSpec, from_dict
from mobilevd_deploy.stages import StageOutput, Stages
from mobilevd_deploy.unet import MobileVDUNet

REPORT = "report.html"
PROBE_SEED = 20241207
APART_ABOVE_PARAMETERS = 300_000_000
"""A larger network takes a child process for each step (apart.py)."""

# Shares of the time, for the estimate of the rest: the UNet has most of the nodes.
_WEIGHTS: dict[str, float] = {"image_encoder": 2, "vae_encoder": 1, "unet": 12, "decoder": 1}
# The rewrites do not depend on the map's size; a larger one is proven on about this many pixels.
_PROBE_PIXELS = 128
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
    pictures = _pictures(spec, recipe, calibration)
    # 2.
    if (finished := _same_artifact(output, source, recipe, tools, pictures)) is not None:
        progress.say(f"{output}: nothing has changed since it was made, so it stays as it is")
        return finished
    # 3.
    with PartialArtifact(output) as folder, disk_guard(folder.root, 0):
        stages = Stages(folder, {"checkpoint": source.sha256, "tools": tools}, progress)
        shares = {f"export {name}": _WEIGHTS[name] for name in COMPONENTS}
        if pictures is not None:
            from mobilevd_deploy import npu_stages

            shares |= npu_stages.plan(recipe, _WEIGHTS)
        progress.plan(shares)
        sizes = [4 * checkpoint.parameters[name] for name in COMPONENTS]
        apart = sum(checkpoint.parameters.values()) > APART_ABOVE_PARAMETERS
        records = {
            name: stages.run(
                f"export {name}",
                {key: value for key, value in recipe.to_dict().items() if key not in _LATER},
                partial(_export_component, name, checkpoint, recipe, folder, Steps(apart, progress)),
                disk_bytes=2 * sum(sizes[i:]),  # of all that is still to be written
            ).values
            for i, name in enumerate(COMPONENTS)
        }
        drift: dict[str, dict[str, float | None]] = {
            "onnx": {name: record["drift"] for name, record in records.items()}
        }
        components = tuple(
            _component_entry(name, spec, record, folder.artifact) for name, record in records.items()
        )
        # 8.
        quality = sheet = None
        if pictures is not None:
            added = npu_stages.run(
                recipe,
                components,
                partial(_build_deploy_form, checkpoint=checkpoint, recipe=recipe, work=folder.work),
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
            _weights_path(folder.work, name).unlink(missing_ok=True)
        # Another chip for the same network then costs no more than its compilation.
        return folder.finish(dataclasses.replace(manifest, files=files), keep=pictures is not None)


def _export_component(
    name: Component,
    checkpoint: Checkpoint,
    recipe: Recipe,
    partial_artifact: PartialArtifact,
    steps: Steps,
) -> StageOutput:
    folder, work = partial_artifact.artifact / name, partial_artifact.work
    # 4.
    steps.run("answer", _answer, name, checkpoint, work)
    # 5.
    reports = steps.run("rewrite", _rewrite_component, name, checkpoint, recipe, work)
    # 6.
    graph = steps.run("write", _write_component, name, checkpoint.spec, recipe, folder, work)
    # 7.
    drift = steps.run("compare", _compare_component, name, checkpoint.spec, recipe, folder, work)
    written = [folder / MODEL, folder / DATA, _probe_path(work, name)]
    values = {
        "drift": None if drift == math.inf else drift,
        "passes": [dataclasses.asdict(report) for report in reports],
        "graph": dataclasses.asdict(graph),
    }
    return StageOutput(tuple(path for path in written if path.exists()), values, steps.costs)


def _answer(name: Component, checkpoint: Checkpoint, work: Path, progress: Progress) -> None:
    """Keep inputs of a probe, and what the trained network gives for them."""
    inputs, outputs = component_tensors(name, checkpoint.spec)
    # What an earlier network gave is passed on: on random embeddings, which no encoder would ever give, a
    # trained UNet multiplies the rounding of float32 by ten.
    given = {}
    for tensor in inputs:
        kind, _, which = str(tensor.source).partition(":")
        if kind == "component":
            (given[tensor.name],) = _read_probe(
                work, cast(Component, which), checkpoint.spec
            ).reference.values()
    reference = partial(_reference, deploy_contract(checkpoint.load(name)), outputs[0].name)
    probe = make_probe(inputs, PROBE_SEED, reference, given)
    if not np.isfinite(probe.reference[outputs[0].name]).all():
        raise ParityError(
            f"{name}: the trained network's outputs are not finite", next_step="check the weights"
        )
    values: dict[str, Any] = probe.inputs | probe.reference
    np.savez(_probe_path(work, name), **values)


def _rewrite_component(
    name: Component, checkpoint: Checkpoint, recipe: Recipe, work: Path, progress: Progress
) -> tuple[PassReport, ...]:
    """Keep the weights of the deploy form; return what the rewrites did, each proven."""
    deployed, reports = deploy_form(name, checkpoint.load(name), checkpoint.spec, recipe, progress)
    write_weights(_weights_path(work, name), deployed)
    return reports


def _write_component(
    name: Component, spec: ModelSpec, recipe: Recipe, folder: Path, work: Path, progress: Progress
) -> OnnxGraph:
    """Write the deploy form as ONNX, and read the graph back."""
    probe = _read_probe(work, name, spec)
    deployed = _read_deploy_form(name, spec, recipe, work)
    for note in export_onnx(deployed, probe.inputs, [*probe.reference], folder, recipe.onnx):
        progress.say(note)
    return read_graph(folder / MODEL)


def _compare_component(
    name: Component, spec: ModelSpec, recipe: Recipe, folder: Path, work: Path, _: Progress
) -> float:
    """Return the SQNR in dB of the file's outputs against the trained network's."""
    probe = _read_probe(work, name, spec)
    drift = probe.drift(OnnxRunner(folder / MODEL).run(probe.inputs))
    if not drift >= recipe.floors.onnx_sqnr_db:
        raise ParityError(
            f"{name}: the exported graph is {drift:.1f} dB from the trained network, "
            f"the floor is {recipe.floors.onnx_sqnr_db:g} dB",
            next_step="choose other graph forms in the recipe, or report it with the model's configuration",
        )
    return drift


def _probe_path(work: Path, name: Component) -> Path:
    return work / f"{name}.npz"


def _weights_path(work: Path, name: Component) -> Path:
    return work / f"{name}.safetensors"


def _read_probe(work: Path, name: Component, spec: ModelSpec) -> Probe:
    with np.load(_probe_path(work, name)) as arrays:
        inputs, outputs = ({t.name: arrays[t.name] for t in side} for side in component_tensors(name, spec))
    return Probe(inputs, outputs)


def _read_deploy_form(name: Component, spec: ModelSpec, recipe: Recipe, work: Path) -> nn.Module:
    """Build the deploy form around the weights that `_rewrite_component` kept, memory-mapped."""
    network = deploy_skeleton(name, spec, recipe)
    read_weights(_weights_path(work, name), network)
    return network


def _build_deploy_form(name: Component, checkpoint: Checkpoint, recipe: Recipe, work: Path) -> nn.Module:
    """Build the deploy form, rewriting anew where an earlier export threw the weights away in the end."""
    if not _weights_path(work, name).exists():
        _rewrite_component(name, checkpoint, recipe, work, Progress())
    return _read_deploy_form(name, checkpoint.spec, recipe, work)


def _component_entry(
    name: Component, spec: ModelSpec, record: Mapping[str, Any], root: Path
) -> ComponentEntry:
    inputs, outputs = component_tensors(name, spec)
    files = {"model": root / name / MODEL, "data": root / name / DATA}
    return ComponentEntry(
        name,
        "onnx",
        {role: FileEntry.of(root, path) for role, path in files.items() if path.exists()},
        inputs,
        outputs,
        **record["graph"],
    )


def deploy_form(
    name: Component, network: nn.Module, spec: ModelSpec, recipe: Recipe, progress: Progress
) -> tuple[nn.Module, tuple[PassReport, ...]]:
    """Rewrite a trained component (the UNet; each pass proven) and build its deploy form, in place.

    Raises RewriteError.
    """
    reports = _rewrite(network, spec, recipe, progress) if isinstance(network, MobileVDUNet) else ()
    return build_npu(name, network, spec, recipe.graph), reports


def _pictures(spec: ModelSpec, recipe: Recipe, calibration: Sequence[str | Path]) -> Pictures | None:
    """Return what calibrates and judges; None where the recipe ends with float ONNX."""
    if not (recipe.quant or recipe.npu):
        if calibration:
            raise UsageError(
                f"recipe {recipe.name} calibrates nothing", next_step="choose a recipe with [quant] or [npu]"
            )
        return None
    scheme = recipe.quant or QuantScheme(samples=1)
    if calibration:
        return read_pictures(calibration, spec.width, spec.height, scheme.samples, scheme.seed)
    return drawn_pictures(spec.width, spec.height, scheme.samples, scheme.seed)


def _rewrite(
    unet: MobileVDUNet, spec: ModelSpec, recipe: Recipe, progress: Progress
) -> tuple[PassReport, ...]:
    height, width = spec.latent_size
    least = spec.unet.size_multiple
    side = least * max(1, math.isqrt(_PROBE_PIXELS // (2 * least * least)))
    if height * width > 2 * side * side:
        height, width = side, 2 * side
        progress.say(f"unet: rewrites are proven on latents of {width}x{height}, the export at full size")
    probe = UNetProbe.make(unet, height, width)
    return run_passes(unet, select_passes(rewrites(recipe)), probe, recipe.floors.rewrite_sqnr_db)


def component_tensors(
    name: Component, spec: ModelSpec
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Return inputs and outputs of a component: float32, NCHW (embeddings NC), ranges where bounded."""
    frames, (h, w), embedding = spec.frames, spec.latent_size, spec.unet.cross_attention_dim
    picture, pixels = (1, 3, spec.height, spec.width), (-1.0, 1.0)
    image = TensorSpec("image", picture, "float32", "NCHW", pixels, "image")

    def latents(name: str, frames: int, source: str | None) -> TensorSpec:
        return TensorSpec(name, (frames, 4, h, w), "float32", "NCHW", None, source)

    def embeds(source: str | None) -> TensorSpec:
        return TensorSpec("image_embeds", (1, embedding), "float32", "NC", None, source)

    if name == "image_encoder":
        return (image,), (embeds(None),)
    if name == "vae_encoder":
        noise = TensorSpec("image_noise", picture, "float32", "NCHW", None, "noise:1")
        return ((image, noise) if spec.step.noise_aug_strength else (image,)), (
            latents("image_latents", 1, None),
        )
    if name == "unet":
        return (
            latents("noise", frames, "noise:0"),
            latents("image_latents", 1, "component:vae_encoder"),
            embeds("component:image_encoder"),
        ), (latents("latents", frames, None),)
    clip = TensorSpec("frames", (frames, 3, spec.height, spec.width), "float32", "NCHW", pixels)
    return (latents("latents", frames, "component:unet"),), (clip,)


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


@torch.no_grad()
def _reference(network: nn.Module, output: str, inputs: Tensors) -> Tensors:
    return {output: network(*(torch.from_numpy(value) for value in inputs.values())).numpy()}
