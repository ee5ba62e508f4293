"""Graphs that the compiler accepts and gets wrong: found before it is asked."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mobilevd_deploy.qnn.split import tensor_shapes

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class LintFinding:
    """Something about a model that is known to go wrong: where, what, and who says so.

    `next_step`: what to do instead, where the result would be wrong; None where it would be slow or refused.
    """

    rule: str
    where: str
    what: str
    source: str
    next_step: str | None = None

    def __str__(self) -> str:
        return f"{self.where}: {self.what} [{self.rule}; {self.source}]"


def lint(
    model: Path,
    *,
    float16: bool,
    vtcm_mb: int = 8,
    peaks: Mapping[str, float] | None = None,
) -> tuple[LintFinding, ...]:
    """Look for what the compiler or the NPU is known to stumble over; the weights are read for float16 only.

    `peaks`: the largest magnitudes of values, by module path or ONNX name, where they were measured. Rules:
    "shape", "rank", "io-type", "data-file", "vtcm", "allocation", "silu", "float16-range".
    """
    import onnx

    loaded = onnx.load(model, load_external_data=False)
    graph = onnx.shape_inference.infer_shapes(loaded).graph
    shapes = tensor_shapes(graph)
    return (
        *_lint_shapes(graph, shapes),
        *_lint_io(graph),
        *_lint_data_files(graph, model.parent),
        *_lint_norms(graph, shapes, vtcm_mb or 8),
        *_lint_allocation(graph, shapes, float16),
        *(() if float16 else _lint_silu(graph, shapes)),
        *(_lint_range(graph, model.parent, peaks or {}) if float16 else ()),
    )


# Seen on SM8650 in integers: maps of 16x8, 16x4, 64x4, 128x7 and 512x8 give 0 dB; 12x4, 8x8 and 16x9 are
# right, and so are 64 channels.
_GROUPS, _NARROW, _NARROW_ABOVE = 32, 8, 12


_BETWEEN_NORM_AND_SILU = ("Sigmoid", "Reshape", "Add", "Mul", "QuantizeLinear", "DequantizeLinear")


def _lint_shapes(graph: onnx.GraphProto, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[LintFinding]:
    for node in graph.node:
        for name in filter(None, node.output):
            if name not in shapes or min(shapes[name], default=1) < 1:
                what = f"{name} has no fixed shape, so the compiler answers 'Cannot get shape'"
                yield LintFinding("shape", node.name, what, "measured, onnxruntime-qnn 2.7")
            elif len(shapes[name]) > 4:
                what = f"{name} {list(shapes[name])} has rank {len(shapes[name])}; above 4 is slow or refused"
                yield LintFinding("rank", node.name, what, "QNN HTP op definitions")


def _lint_io(graph: onnx.GraphProto) -> Iterator[LintFinding]:
    import onnx

    constants = {init.name for init in graph.initializer}
    types = onnx.TensorProto
    bad = (types.INT64, types.UINT64, types.DOUBLE, types.UINT16, types.INT16)
    for value in (*graph.input, *graph.output):
        kind = value.type.tensor_type.elem_type
        if kind in bad and value.name not in constants:
            what = f"is {types.DataType.Name(kind).lower()}; phones' runtimes feed and read float32"
            yield LintFinding("io-type", value.name, what, "QNN HTP has no 64-bit values; android_app")


def _lint_data_files(graph: onnx.GraphProto, folder: Path) -> Iterator[LintFinding]:
    names = {e.value for i in graph.initializer for e in i.external_data if e.key == "location"}
    for name in sorted(names):
        if name != Path(name).name:
            yield LintFinding(
                "data-file", name, "is not a plain file name beside the model", "ONNX external data"
            )
        elif not (folder / name).is_file():
            yield LintFinding("data-file", name, "does not exist", "ONNX external data")


def _lint_norms(
    graph: onnx.GraphProto, shapes: Mapping[str, tuple[int, ...]], vtcm_mb: int
) -> Iterator[LintFinding]:
    for node in graph.node:
        if node.op_type in ("GroupNormalization", "InstanceNormalization", "LayerNormalization"):
            axis = -1 if node.op_type.startswith("Layer") else 1
            axis = next((a.i for a in node.attribute if a.name == "axis"), axis)
            size = 2 * math.prod(shapes.get(node.input[0], (0,))[axis:])
            if size > vtcm_mb * 2**20:
                what = f"normalises {size / 2**20:.1f} MiB at once, more than {vtcm_mb} MiB of VTCM"
                yield LintFinding("vtcm", node.name, what, "executorch #1430")


def _lint_allocation(
    graph: onnx.GraphProto, shapes: Mapping[str, tuple[int, ...]], float16: bool
) -> Iterator[LintFinding]:
    import onnx

    width = {onnx.TensorProto.FLOAT: 2 if float16 else 4}
    size = sum(
        math.prod(i.dims) * width.get(i.data_type, onnx.helper.tensor_dtype_to_np_dtype(i.data_type).itemsize)
        for i in graph.initializer
    )
    # Inputs and outputs stay float32.
    size += sum(4 * math.prod(shapes.get(value.name, (0,))) for value in (*graph.input, *graph.output))
    if size >= 2**31:
        what = f"{size / 2**30:.2f} GiB of weights, inputs and outputs; a graph may allocate 2 GiB"
        yield LintFinding("allocation", graph.name or "graph", what, "ai-hub-models #129, #274")


def _lint_silu(graph: onnx.GraphProto, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[LintFinding]:
    """A norm with a channel per group and a SiLU behind it, on narrow maps: the result is noise."""
    producers = {name: node for node in graph.node for name in node.output}
    for sigmoid in graph.node:
        if sigmoid.op_type != "Sigmoid":
            continue
        node, narrow = sigmoid, False
        while node.op_type in _BETWEEN_NORM_AND_SILU and node.input[0] in producers:
            value = node.input[0]
            node = producers[value]
            if node.op_type == "Add":  # the norm's shift, on the map as it was
                _, channels, height, width = (0, 0, 0, 0, *shapes.get(value, ()))[-4:]
                narrow = channels == _GROUPS and height > _NARROW_ABOVE and width <= _NARROW
        if narrow and node.op_type == "InstanceNormalization":
            yield LintFinding(
                "silu",
                sigmoid.name,
                f"SiLU behind a norm of {_GROUPS} groups of one channel, on maps at most {_NARROW} wide and "
                f"more than {_NARROW_ABOVE} high, is computed wrongly",
                "measured, onnxruntime-qnn 2.7",
                'turn the map (graph.temporal_conv = "rows" for time), or give the block more channels',
            )


def _lint_range(graph: onnx.GraphProto, folder: Path, peaks: Mapping[str, float]) -> Iterator[LintFinding]:
    import numpy as np
    import onnx

    largest = float(np.finfo(np.float16).max)
    known = dict(peaks)
    for init in graph.initializer:
        if init.data_type == onnx.TensorProto.FLOAT and math.prod(init.dims):
            with contextlib.suppress(OSError, ValueError):  # a missing file has its own rule
                values = onnx.numpy_helper.to_array(init, str(folder))
                known[init.name] = max(float(values.max()), -float(values.min()))
    for name, peak in sorted(known.items()):
        if not peak <= largest:
            yield LintFinding(
                "float16-range", name, f"reaches {peak:g}, float16 ends at {largest:g}", "IEEE 754"
            )
