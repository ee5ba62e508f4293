"""Tell the drift of a graph from the drift of its runner: instance norms whose sums a CPU runner gets right.

The NPU's forms keep InstanceNormalization, which the NPU computes well at every size (float16 on the
simulator: 67 dB SQNR at 0.1 M elements a group, 65 dB at 0.9 M). onnxruntime's CPU kernel loses accuracy with
the size of a group: 92 dB at 1.8 M elements, 74 dB at 7.3 M. Where that hides how good a graph is, a copy of
the graph is run that computes the same means in two steps, as `ops.TwoStepGroupNorm` does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from mobilevd_deploy.base.graphs import fixed_shape, read_shaped
from mobilevd_deploy.npu.ops import TwoStepGroupNorm, columns


def write_two_step_norms(model: Path, copy: Path) -> int:
    """Write `model` with each large InstanceNormalization in two steps; return the largest group's elements.

    Norms over up to `TwoStepGroupNorm.LIMIT` elements stay as they are. `copy` has to be in the folder of
    `model`, whose file of weights it shares. Returns 0 and writes nothing if no norm is large.
    """
    loaded = onnx.load(model, load_external_data=False)
    shapes = {
        str(value.name): shape
        for node in read_shaped(model).graph
        for value in node.inputs
        if value is not None and (shape := fixed_shape(value)) is not None
    }
    nodes, constants, largest = list[onnx.NodeProto](), list[onnx.TensorProto](), 0
    for node in loaded.graph.node:
        size = _group_size(node, shapes)
        if size <= TwoStepGroupNorm.LIMIT:
            nodes.append(node)
            continue
        largest = max(largest, size)
        added = _Constants(node.name or node.output[0])
        nodes += _two_steps(node, shapes[node.input[0]], added)
        constants += added.tensors
    if largest:
        del loaded.graph.node[:]
        loaded.graph.node.extend(nodes)
        loaded.graph.initializer.extend(constants)
        onnx.save(loaded, copy)
    return largest


def _group_size(node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return how many elements an InstanceNormalization normalises together; 0 for other nodes."""
    return math.prod(shapes[node.input[0]][2:]) if node.op_type == "InstanceNormalization" else 0


class _Constants:
    """Collects the constants that replace a node, under names of their own."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.tensors: list[onnx.TensorProto] = []

    def add(self, values: np.ndarray) -> str:
        name = f"{self.prefix}/two_step_{len(self.tensors)}"
        self.tensors.append(numpy_helper.from_array(values, name))
        return name

    def ints(self, *values: int) -> str:
        return self.add(np.array(values, np.int64))


def _two_steps(
    node: onnx.NodeProto, shape: tuple[int, ...], constants: _Constants
) -> Iterator[onnx.NodeProto]:
    """Yield (x - mean) / sqrt(variance + epsilon) * scale + shift, as nodes.

    Values inside are written with "@" here; their real names begin with that of the replaced node.
    """
    x, scale, shift = node.input
    epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
    size = math.prod(shape[2:])
    rows, batch_and_channels = size // columns(size), shape[:2]
    per_channel, last = constants.ints(shape[1], *[1] * (len(shape) - 2)), constants.ints(3)

    def step(op: str, output: str, *inputs: str, **attributes: Any) -> onnx.NodeProto:
        name, *sources = (
            value.replace("@", f"{constants.prefix}/two_step_", 1) for value in (output, *inputs)
        )
        return helper.make_node(op, sources, [name], name, **attributes)

    def mean(of: str, output: str) -> Iterator[onnx.NodeProto]:
        yield step("ReduceMean", f"{output}_rows", of, last, keepdims=1)
        yield step("Reshape", f"{output}_row", f"{output}_rows", constants.ints(*batch_and_channels, 1, rows))
        yield step("ReduceMean", output, f"{output}_row", last, keepdims=1)

    yield step("Reshape", "@matrix", x, constants.ints(*batch_and_channels, rows, columns(size)))
    yield from mean("@matrix", "@mean")
    yield step("Sub", "@centred", "@matrix", "@mean")
    yield step("Mul", "@squares", "@centred", "@centred")
    yield from mean("@squares", "@variance")
    yield step("Add", "@stable", "@variance", constants.add(np.array(epsilon, np.float32)))
    yield step("Sqrt", "@deviation", "@stable")
    yield step("Div", "@normal", "@centred", "@deviation")
    yield step("Reshape", "@normalised", "@normal", constants.ints(*shape))
    yield step("Reshape", "@scale", scale, per_channel)
    yield step("Reshape", "@shift", shift, per_channel)
    yield step("Mul", "@scaled", "@normalised", "@scale")
    yield step("Add", node.output[0], "@scaled", "@shift")
