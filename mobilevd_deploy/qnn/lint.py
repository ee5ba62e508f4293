"""Checks before compilation: what the Hexagon compiler refuses, or accepts and computes wrongly."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from mobilevd_deploy.base.graphs import fixed_shape, read_shaped
from mobilevd_deploy.qnn.split import constant_bytes


@dataclass(frozen=True)
class LintFinding:
    """A known problem of a model: where, what, and the source of the rule.

    `next_step`: what to do instead, if the result would be wrong; None for a notice, if the compiler refuses
    the model by itself, or if the model would only be slow.
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
    """Look for known problems of the compiler and the NPU. Weights are read for float16 only.

    `peaks`: the largest magnitudes of values, by module path or ONNX name, if they were measured. Rules:
    "shape", "rank", "io-type", "data-file", "vtcm", "allocation", "silu", "float16-range".
    """
    graph = read_shaped(model).graph
    return (
        *_lint_shapes(graph),
        *_lint_io(graph),
        *_lint_data_files(graph, model.parent),
        *_lint_norms(graph, vtcm_mb or 8),
        *_lint_allocation(graph, float16),
        *(() if float16 else _lint_silu(graph)),
        *(_lint_range(graph, peaks or {}) if float16 else ()),
    )


# Measured on SM8650 in integers: maps of 16x8, 16x4, 64x4, 128x7 and 512x8 give 0 dB; 12x4, 8x8 and 16x9 are
# correct, and so are 64 channels.
_GROUPS, _NARROW, _NARROW_ABOVE = 32, 8, 12


_BETWEEN_NORM_AND_SILU = ("Sigmoid", "Reshape", "Add", "Mul", "QuantizeLinear", "DequantizeLinear")


def _lint_shapes(graph: ir.Graph) -> Iterator[LintFinding]:
    for node in graph:
        for value in node.outputs:
            if not value.name:  # an optional output that is left out
                continue
            shape = fixed_shape(value)
            if shape is None or 0 in shape:
                what = f"{value.name} has no fixed shape, so the compiler answers 'Cannot get shape'"
                yield LintFinding("shape", node.name or "", what, "measured, onnxruntime-qnn 2.7")
            elif len(shape) > 4:
                what = f"{value.name} {list(shape)} has rank {len(shape)}; above 4 is slow or refused"
                yield LintFinding("rank", node.name or "", what, "QNN HTP op definitions")


def _lint_io(graph: ir.Graph) -> Iterator[LintFinding]:
    types = ir.DataType
    bad = (types.INT64, types.UINT64, types.DOUBLE, types.UINT16, types.INT16)
    for value in (*graph.inputs, *graph.outputs):
        if value.dtype in bad and not value.is_initializer():
            what = f"is {value.dtype.name.lower()}; phones' runtimes pass and return float32"
            yield LintFinding("io-type", value.name or "", what, "QNN HTP has no 64-bit values; android_app")


def _lint_data_files(graph: ir.Graph, folder: Path) -> Iterator[LintFinding]:
    tensors = (value.const_value for value in graph.initializers.values())
    names = {str(tensor.location) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
    for name in sorted(names):
        if name != Path(name).name:
            yield LintFinding(
                "data-file", name, "is not a plain file name beside the model", "ONNX external data"
            )
        elif not (folder / name).is_file():
            yield LintFinding("data-file", name, "does not exist", "ONNX external data")


def _lint_norms(graph: ir.Graph, vtcm_mb: int) -> Iterator[LintFinding]:
    for node in graph:
        if node.op_type in ("GroupNormalization", "InstanceNormalization", "LayerNormalization"):
            axis = node.attributes.get_int("axis", -1 if node.op_type.startswith("Layer") else 1)
            size = 2 * math.prod((fixed_shape(node.inputs[0]) or (0,))[axis:])
            if size > vtcm_mb * 2**20:
                what = f"normalises {size / 2**20:.1f} MiB at once, more than {vtcm_mb} MiB of VTCM"
                yield LintFinding("vtcm", node.name or "", what, "executorch #1430")


def _lint_allocation(graph: ir.Graph, float16: bool) -> Iterator[LintFinding]:
    size = sum(constant_bytes(value, 2 if float16 else 4) for value in graph.initializers.values())
    # Inputs and outputs stay float32.
    size += sum(4 * math.prod(fixed_shape(value) or (0,)) for value in (*graph.inputs, *graph.outputs))
    if size >= 2**31:
        what = f"{size / 2**30:.2f} GiB of weights, inputs and outputs; a graph may allocate 2 GiB"
        yield LintFinding("allocation", graph.name or "graph", what, "ai-hub-models #129, #274")


def _lint_silu(graph: ir.Graph) -> Iterator[LintFinding]:
    """Find a norm with one channel per group and a SiLU behind it, on narrow maps: the result is noise."""
    for sigmoid in graph:
        if sigmoid.op_type != "Sigmoid":
            continue
        node, is_narrow = sigmoid, False
        while node.op_type in _BETWEEN_NORM_AND_SILU:
            value = node.inputs[0]
            before = None if value is None else value.producer()
            if before is None:
                break
            node = before
            if node.op_type == "Add":  # the norm's shift, on the map in its own shape
                _, channels, height, width = (0, 0, 0, 0, *(fixed_shape(value) or ()))[-4:]
                is_narrow = channels == _GROUPS and height > _NARROW_ABOVE and width <= _NARROW
        if is_narrow and node.op_type == "InstanceNormalization":
            yield LintFinding(
                "silu",
                sigmoid.name or "",
                f"SiLU behind a norm of {_GROUPS} groups of one channel, on maps at most {_NARROW} wide and "
                f"more than {_NARROW_ABOVE} high, is computed wrongly",
                "measured, onnxruntime-qnn 2.7",
                'transpose the map (graph.temporal_conv = "rows" for time), or give the block more channels',
            )


def _lint_range(graph: ir.Graph, peaks: Mapping[str, float]) -> Iterator[LintFinding]:
    largest = float(np.finfo(np.float16).max)
    known = dict(peaks)
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and tensor.dtype == ir.DataType.FLOAT and tensor.size:
            with contextlib.suppress(OSError, ValueError):  # rule "data-file" reports a missing file
                values = tensor.numpy()
                known[name] = max(float(values.max()), -float(values.min()))
    for name, peak in sorted(known.items()):
        if not peak <= largest:
            yield LintFinding(
                "float16-range", name, f"reaches {peak:g}; float16 ends at {largest:g}", "IEEE 754"
            )
