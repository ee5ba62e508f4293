"""Count the bytes that a graph moves to and from DRAM, in the schedule of the NPU's compiler.

An artifact is counted component by component, a preset block by block with random weights, because schedules
do not depend on weights. The counts are the compiler's plan, not a measurement on a phone.
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import filter as matching
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from mobilevd_deploy.artifact.artifact import Artifact
from mobilevd_deploy.artifact.manifest import MANIFEST
from mobilevd_deploy.base.chart import Bar, draw_bars
from mobilevd_deploy.base.files import file_sha256, write_durably
from mobilevd_deploy.base.progress import Progress
from mobilevd_deploy.base.tensors import Tensors
from mobilevd_deploy.config.presets import load_preset
from mobilevd_deploy.config.recipe import NpuOptions, Recipe
from mobilevd_deploy.config.spec import ModelSpec
from mobilevd_deploy.config.strict import from_dict
from mobilevd_deploy.errors import UsageError
from mobilevd_deploy.npu.build import build_npu
from mobilevd_deploy.npu.onnx_export import MODEL, export_onnx
from mobilevd_deploy.npu.ops import PerFrame, TemporalResBlock
from mobilevd_deploy.npu.skeleton import rewrites, rewritten_skeleton
from mobilevd_deploy.npu.unet import TemporalStage, Transformer, VideoResBlock
from mobilevd_deploy.profiling.profile import SCHEMA_VERSION, TrafficReport, TrafficRow, now
from mobilevd_deploy.profiling.store import profiles_dir, save_traffic
from mobilevd_deploy.qnn.compiled import Traffic
from mobilevd_deploy.qnn.compiler import measure_traffic
from mobilevd_deploy.qnn.targets import Target, find_target
from mobilevd_deploy.quantize.simulation import block_of, quantise

WHOLE_UP_TO_FLOPS = 200e9
"""The schedule of a larger graph takes gigabytes and hours, so its blocks are compiled one by one."""

_DEPTH = 3  # names that tell the parts of a block apart
_DRAWN = 40


@dataclass(frozen=True)
class Block:
    """A resblock or transformer of the deploy form with random weights, and inputs for it."""

    path: str
    module: nn.Module
    inputs: Tensors

    @property
    def structure(self) -> str:
        """Everything that determines its schedule, as text."""
        return f"{self.module} {[value.shape for value in self.inputs.values()]}"

    @property
    def floor_bytes(self) -> int:
        """Minimum traffic in float16: inputs, outputs (of the first input's size) and weights, each once."""
        first = next(iter(self.inputs.values())).size
        values = sum(value.size for value in self.inputs.values()) + first
        return 2 * (values + sum(p.numel() for p in self.module.parameters()))


def measure(
    what: str,
    recipe: Recipe,
    patterns: Sequence[str] = ("*",),
    mode: int | None = None,
    progress: Progress | None = None,
) -> TrafficReport:
    """Count for an artifact, and store the report beside it, or for a preset by name or TOML file.

    `recipe`, `patterns` and `mode` are for presets, see `measure_preset`. Errors as `measure_preset` and
    `measure_artifact`.
    """
    if not (Path(what) / MANIFEST).exists():
        return measure_preset(what, load_preset(what).model, recipe, patterns, mode, progress)
    artifact = Artifact.open(what)
    report = measure_artifact(artifact, progress)
    save_traffic(report, profiles_dir(artifact))
    return report


def unet_blocks(spec: ModelSpec, recipe: Recipe, patterns: Sequence[str] = ("*",)) -> Iterator[Block]:
    """Build the UNet's blocks whose path matches one of `patterns`, one at a time, with random weights.

    Raises UsageError if nothing matches.
    """
    step, inputs = rewritten_skeleton(spec, rewrites(recipe))
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
        yield Block(path, randomised(unet.get_submodule(path)), values)


def measure_preset(
    name: str,
    spec: ModelSpec,
    recipe: Recipe,
    patterns: Sequence[str] = ("*",),
    mode: int | None = None,
    progress: Progress | None = None,
) -> TrafficReport:
    """Measure the UNet's blocks that match `patterns` for the recipe's first target.

    Weights are random; quantised if the recipe is, else in float16. `mode`: another optimisation mode.
    Raises UsageError if nothing matches.
    """
    options = recipe.npu or NpuOptions()
    if mode is not None:
        options = dataclasses.replace(options, optimization_mode=cast(Any, mode))
    recipe = dataclasses.replace(recipe, npu=None)  # modes that recipes refuse can be measured
    return _report(name, None, recipe, options, _block_rows(spec, recipe, options, patterns, progress))


def measure_block(block: Block, recipe: Recipe, options: NpuOptions, target: Target) -> Traffic:
    """Export one block as the recipe says, compile it and read the schedule."""
    with tempfile.TemporaryDirectory() as folder:
        export_block(block, recipe, Path(folder))
        return measure_traffic(Path(folder) / MODEL, target, options, float16=recipe.quant is None)


def export_block(block: Block, recipe: Recipe, folder: Path) -> None:
    """Write one block as `folder`/model.onnx with the output "out", quantised if the recipe has `quant`.

    Ranges are calibrated on one frame if the block allows it, because schedules do not depend on them.
    """
    if recipe.quant is None:
        export_onnx(block.module, block.inputs, ["out"], folder, recipe.onnx)
        return
    sample = block.inputs
    if not any(isinstance(m, (TemporalStage, TemporalResBlock, PerFrame)) for m in block.module.modules()):
        sample = sample | {"x": sample["x"][:1]}
    quantise(block.module, [sample], recipe.quant).export(folder, block.inputs, ["out"])


def measure_artifact(artifact: Artifact, progress: Progress | None = None) -> TrafficReport:
    """Measure an artifact as it was compiled for its first target: each component with its parts.

    A part is a block with its modules. A UNet above `WHOLE_UP_TO_FLOPS` is measured block by block with
    random weights. Raises UsageError if the artifact was compiled for no chip.
    """
    progress, recipe = progress or Progress(), from_dict(Recipe, artifact.manifest.recipe)
    if recipe.npu is None:
        raise UsageError(
            f"{artifact.root} was compiled for no chip",
            next_step="export with a recipe that has [npu], for example --recipe xiaomi-14-pro",
        )
    target, role = find_target(recipe.npu.targets[0]), "model" if recipe.quant is None else "quantised"
    rows: list[TrafficRow] = []
    progress.plan({c.name: max(c.flops, 1) for c in artifact.manifest.components})
    for component in artifact.manifest.components:
        artifact.verify(component)
        if component.name == "unet" and component.flops > WHOLE_UP_TO_FLOPS:
            spec = from_dict(ModelSpec, artifact.manifest.model)
            note = "block by block with random weights, without the operations between blocks"
            blocks = _block_rows(spec, recipe, recipe.npu, ["*"], progress)
            rows.append(_joined(component.name, blocks, note))
            continue
        progress.begin(component.name)
        model = artifact.path(component, role)
        found = measure_traffic(model, target, recipe.npu, float16=recipe.quant is None)
        rows.append(_row(component.name, found, block_of))
        progress.end()
    digest = file_sha256(artifact.root / MANIFEST)
    return _report(artifact.manifest.name, digest, recipe, recipe.npu, rows)


def write_picture(report: TrafficReport, path: Path) -> None:
    """Write `bars(report)` as a PNG. Raises UsageError if it cannot be written, ResourceError."""
    title = (
        f"{report.what}, {report.precision} for {report.target}, "
        f"optimisation mode {report.optimization_mode}: {report.read / 1e6:,.1f} MB read "
        f"and {report.written / 1e6:,.1f} MB written, as scheduled"
    )
    legend = "blue: read; orange: written; dotted: inputs, outputs and weights once"
    every = bars(report)
    if len(every) > _DRAWN:
        legend += f"; {len(every) - _DRAWN} more rows are not drawn"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, draw_bars(title, every[:_DRAWN], legend))
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error}", next_step="choose another file") from error


def bars(report: TrafficReport) -> list[Bar]:
    """Return a bar for each row and its parts: bytes read, then bytes written."""
    return [
        Bar(
            row.path,
            (row.read, row.written),
            f"{row.read / 1e6:,.1f} + {row.written / 1e6:,.1f} MB",
            row.floor,
            depth,
        )
        for whole in report.rows
        for row, depth in ((whole, 0), *((part, 1) for part in whole.parts))
    ]


def _report(
    what: str, digest: str | None, recipe: Recipe, options: NpuOptions, rows: Sequence[TrafficRow]
) -> TrafficReport:
    scheme, target = recipe.quant, options.targets[0]
    precision = scheme.precision if scheme else "float16"
    mode = options.optimization_mode
    return TrafficReport(SCHEMA_VERSION, what, digest, target, precision, mode, now(), _spills_first(rows))


def _block_rows(
    spec: ModelSpec,
    recipe: Recipe,
    options: NpuOptions,
    patterns: Sequence[str],
    progress: Progress | None = None,
) -> list[TrafficRow]:
    rules = recipe.quant.of("unet").rules if recipe.quant else ()
    progress, target, rows = progress or Progress(), find_target(options.targets[0]), []
    measured: dict[str, Traffic] = {}  # by structure, because levels repeat their blocks
    for block in unet_blocks(spec, recipe, patterns):
        modules = [f"{block.path}.{name}" for name, _ in block.module.named_modules()]
        if ruled := [rule.modules for rule in rules if matching(modules, rule.modules)]:
            raise UsageError(
                f"{block.path}: the recipe's rule for {ruled[0]!r} does not apply block by block",
                next_step="choose a recipe without rules for the blocks that are measured",
            )
        progress.begin(block.path)
        if not (known := block.structure in measured):
            measured[block.structure] = measure_block(block, recipe, options, target)
        rows.append(_row(block.path, measured[block.structure], _beginning, block.floor_bytes))
        progress.end(reused=known)
    return rows


def _row(path: str, found: Traffic, part_of: Callable[[str], str], floor: int | None = None) -> TrafficRow:
    """Sum up modules into parts, as `part_of` assigns them; a part lists its modules."""
    parts: dict[str, list[TrafficRow]] = {}
    for module, moved in found.modules.items():
        row = TrafficRow(module or "others", moved.read, moved.written)
        parts.setdefault(part_of(row.path), []).append(row)
    rows = [_joined(name, modules) for name, modules in parts.items()]
    edges = TrafficRow("inputs and outputs", found.edges.read, found.edges.written)
    return dataclasses.replace(_joined(path, [edges, *rows]), floor=floor)


def _joined(path: str, rows: Sequence[TrafficRow], note: str | None = None) -> TrafficRow:
    read, written = sum(row.read for row in rows), sum(row.written for row in rows)
    parts = () if [row.path for row in rows] == [path] else _spills_first(rows)
    return TrafficRow(path, read, written, None, parts, note)


def _beginning(module: str) -> str:
    return ".".join(module.split(".")[:_DEPTH])


def _spills_first(rows: Sequence[TrafficRow]) -> tuple[TrafficRow, ...]:
    return tuple(sorted(rows, key=lambda row: (-row.written, -row.read)))


@torch.no_grad()
def _input_shapes(unet: nn.Module, inputs: Sequence[Tensor]) -> Mapping[str, dict[str, tuple[int, ...]]]:
    """Run the network on the meta device and record the input shapes of every block."""
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
def randomised(module: nn.Module) -> nn.Module:
    """Copy a module from the meta device to memory, with random weights that keep the signal's scale.

    Shared weights stay shared, which `Module.to_empty` does not do.
    """
    real, made = copy.deepcopy(module), dict[int, Tensor]()
    for part in real.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    empty = torch.empty_like(tensor, device="cpu")
                    fresh = nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty
                    tensors[name] = cast(Any, made.setdefault(id(tensor), fresh))
    generator = torch.Generator().manual_seed(0)
    for name, tensor in (*real.named_parameters(), *real.named_buffers()):
        if tensor.ndim < 2:
            tensor.fill_(0.0 if name.endswith("bias") else 0.5 if tensor.ndim == 0 else 1.0)
        else:
            tensor.normal_(std=max(tensor[0].numel(), 1) ** -0.5, generator=generator)
    return real.eval()
