"""How many bytes a graph moves to and from DRAM, by the schedule of the NPU's compiler: no phone needed.

An artifact is measured component by component, a preset block by block with random weights, because no
schedule depends on their values. It is what the compiler planned, not what a phone was seen to do.
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from mobilevd_deploy.artifact import Artifact
from mobilevd_deploy.errors import UsageError
from mobilevd_deploy.npu.build import build_npu
from mobilevd_deploy.npu.unet import Transformer, VideoResBlock
from mobilevd_deploy.onnx_export import MODEL, export_onnx
from mobilevd_deploy.passes.subpixel_upsampling import SubPixelUpsampling
from mobilevd_deploy.probe import Tensors
from mobilevd_deploy.progress import Progress
from mobilevd_deploy.qnn import Target, find_target, measure_traffic
from mobilevd_deploy.qnn_graph import Traffic
from mobilevd_deploy.quantize import quantise
from mobilevd_deploy.recipe import NpuOptions, Recipe
from mobilevd_deploy.skeleton import rewritten_skeleton
from mobilevd_deploy.spec import ModelSpec, from_dict


@dataclass(frozen=True)
class Block:
    """A resblock or transformer of the deploy form with random weights, and inputs for it."""

    path: str
    module: nn.Module
    inputs: Tensors

    @property
    def floor_bytes(self) -> int:
        """Least traffic in float16: inputs, outputs (as large as the first input) and weights once."""
        first = next(iter(self.inputs.values())).size
        values = sum(value.size for value in self.inputs.values()) + first
        return 2 * (values + sum(p.numel() for p in self.module.parameters()))


def unet_blocks(spec: ModelSpec, recipe: Recipe, patterns: Sequence[str] = ("*",)) -> Iterator[Block]:
    """Build the UNet's blocks whose path matches one of `patterns`, one at a time, weights drawn by path.

    Raises UsageError if nothing matches.
    """
    rewrites = [*recipe.passes, *(SubPixelUpsampling.name,) * (recipe.graph.upsample == "subpixel")]
    step, inputs = rewritten_skeleton(spec, rewrites)
    unet = build_npu("unet", step, spec, recipe.graph)
    shapes = _input_shapes(unet, inputs)
    chosen = [path for path in shapes if any(fnmatch(path, pattern) for pattern in patterns)]
    if not chosen:
        raise UsageError(
            f"no block matches {', '.join(patterns)}", next_step="blocks are named like " + next(iter(shapes))
        )
    for path in chosen:
        rng = np.random.default_rng(len(path))
        values: Tensors = {n: rng.standard_normal(s, np.float32) for n, s in shapes[path].items()}
        yield Block(path, _randomised(unet.get_submodule(path)), values)


@dataclass(frozen=True)
class Row:
    """Scheduled DRAM traffic in bytes of a component or block; `floor`: weights, inputs, outputs once."""

    path: str
    read: int
    written: int
    floor: int | None = None


def measure_preset(
    spec: ModelSpec,
    recipe: Recipe,
    patterns: Sequence[str] = ("*",),
    mode: int | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Measure the UNet's blocks that match `patterns` for the recipe's first target, most traffic first.

    Weights are random; quantised if the recipe is, else in float16. `mode`: another optimisation mode.
    Raises UsageError if nothing matches.
    """
    progress, options = progress or Progress(), recipe.npu or NpuOptions()
    if mode is not None:
        options = dataclasses.replace(options, optimization_mode=cast(Any, mode))
    target, rows = find_target(options.targets[0]), []
    for block in unet_blocks(spec, recipe, patterns):
        progress.begin(block.path)
        found = measure_block(block, recipe, options, target).total
        rows.append(Row(block.path, found.read, found.written, block.floor_bytes))
        progress.end()
    return sorted(rows, key=lambda row: -row.read - row.written)


def measure_block(block: Block, recipe: Recipe, options: NpuOptions, target: Target) -> Traffic:
    """Export one block as the recipe says, quantised if it has `quant`, compile it and read the schedule."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        if recipe.quant is None:
            export_onnx(block.module, block.inputs, ["out"], path, recipe.onnx)
        else:
            quantise(block.module, [block.inputs], recipe.quant).export(path, block.inputs, ["out"])
        return measure_traffic(path / MODEL, target, options, float16=recipe.quant is None)


def measure_artifact(artifact: Artifact, progress: Progress | None = None) -> list[Row]:
    """Measure an artifact as it was compiled for its first target: each component, then its parts.

    A part is what stands up to four names deep; most traffic first. Raises UsageError if it was compiled for
    no chip.
    """
    progress, recipe = progress or Progress(), from_dict(Recipe, artifact.manifest.recipe)
    if recipe.npu is None:
        raise UsageError(
            f"{artifact.root} was compiled for no chip",
            next_step="export with a recipe that has [npu], for example --recipe xiaomi-14-pro",
        )
    target, role = find_target(recipe.npu.targets[0]), "model" if recipe.quant is None else "quantised"
    rows: list[Row] = []
    progress.plan({c.name: max(c.flops, 1) for c in artifact.manifest.components})
    for component in artifact.manifest.components:
        progress.begin(component.name)
        artifact.verify(component)
        model = artifact.path(component, role)
        found = measure_traffic(model, target, recipe.npu, float16=recipe.quant is None)
        rows.append(Row(component.name, found.total.read, found.total.written))
        paths = dict.fromkeys(".".join(path.split(".")[:4]) for path in found.modules)
        parts = [Row(f"{component.name}.{p}", found.under(p).read, found.under(p).written) for p in paths]
        rows += sorted(parts, key=lambda row: -row.read - row.written)
        progress.end()
    return rows


@torch.no_grad()
def _input_shapes(unet: nn.Module, inputs: Sequence[Tensor]) -> Mapping[str, dict[str, tuple[int, ...]]]:
    """Run the network on the meta device and note what every block is called with."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}

    def note(path: str) -> Any:
        def hook(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            names = ("x", "image_embeds")
            pairs = zip(names, arguments, strict=False)  # a resblock has no embedding
            shapes[path] = {name: tuple(value.shape) for name, value in pairs}

        return hook

    handles = [
        module.register_forward_pre_hook(note(path))
        for path, module in unet.named_modules()
        if isinstance(module, (VideoResBlock, Transformer))
    ]
    unet(*inputs)
    for handle in handles:
        handle.remove()
    return shapes


@torch.no_grad()
def _randomised(module: nn.Module) -> nn.Module:
    """Copy a module from the meta device to memory, with weights that keep the signal's size."""
    real = copy.deepcopy(module).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for name, tensor in (*real.named_parameters(), *real.named_buffers()):
        if tensor.ndim < 2:
            tensor.fill_(0.0 if name.endswith("bias") else 0.5 if tensor.ndim == 0 else 1.0)
        else:
            tensor.normal_(std=max(tensor[0].numel(), 1) ** -0.5, generator=generator)
    return real.eval()
