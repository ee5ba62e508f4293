"""The quantised graph as AIMET writes it, repaired for the compiler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir.passes.common
from onnx import NodeProto, TensorProto, numpy_helper

from mobilevd_deploy.base.tensors import Array
from mobilevd_deploy.errors import ExportError
from mobilevd_deploy.npu.onnx_export import fold_constants


def load_folded(path: Path) -> onnx.ModelProto:
    """Read what was exported without torch's optimiser, and do what little of it a quantised graph needs."""
    model = onnx_ir.from_proto(onnx.load(path))  # its files go away
    onnx_ir.passes.common.ShapeInferencePass()(model)  # so that shapes of weights behind a DQ fold as well
    fold_constants(model)
    for node in model.graph:
        # The exporter gives every convolution a bias; one of zeros, in floats, would keep it off the NPU.
        if node.op_type == "Conv" and len(node.inputs) > 2 and (bias := node.inputs[2]) is not None:
            zeros = bias.const_value
            if zeros is not None and not zeros.numpy().any():
                node.resize_inputs(2)
    onnx_ir.passes.common.RemoveUnusedNodesPass()(model)
    return onnx_ir.to_proto(model)


PAIR = ("QuantizeLinear", "DequantizeLinear")


# Ops that carry values through unchanged: what stands on their other side decides.
MOVES = frozenset(
    {"Concat", "DepthToSpace", "Flatten", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose"}
    | {"Unsqueeze"}
)


_DATA_ONLY_FIRST = frozenset({"Clip", "Pad", "Resize"} | MOVES - {"Concat"})


_MIDDLE = 32768  # zero point of a symmetric range written as uint16


Origin = NodeProto | str  # a node, or the name of a graph input or initializer


class QdqGraph:
    """Who makes and who reads each tensor."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = model.graph
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.producers = {name: node for node in model.graph.node for name in node.output}

    def origins(self, tensor: str) -> Iterator[Origin]:
        """Yield what a tensor's values come from, looking through moves."""
        node = self.producers.get(tensor)
        if node is None or node.op_type not in MOVES:
            yield tensor if node is None else node
            return
        for name in self.operands(node):
            yield from self.origins(name)

    def operands(self, node: NodeProto) -> list[str]:
        """Return the inputs that hold values, not shapes, axes or scales."""
        if node.op_type in _DATA_ONLY_FIRST:
            return [node.input[0]]
        return [name for name in node.input if name and self._is_float(name)]

    def _is_float(self, name: str) -> bool:
        return name not in self.constants or self.constants[name].data_type == TensorProto.FLOAT

    def dtype(self, pair: NodeProto) -> int:
        """Return the integer type on the inner side of a Q or DQ."""
        return self.constants[pair.input[2]].data_type

    def value(self, name: str) -> Array:
        """Return a constant as an array."""
        return numpy_helper.to_array(self.constants[name])

    def before_pairs(self, tensor: str) -> str:
        """Return the float tensor that Q and DQ made this one from."""
        node = self.producers.get(tensor)
        while node is not None and node.op_type in PAIR:
            tensor = node.input[0]
            node = self.producers.get(tensor)
        return tensor

    def is_constant(self, dequantise: NodeProto) -> bool:
        """Whether a DQ yields weights."""
        stored = dequantise.input[0]
        return stored in self.constants or self.producers[stored].input[0] in self.constants


def convert_before_moves(model: onnx.ModelProto) -> None:
    """Let values change their width before they are moved, in place.

    before  uint16 -> DQ -> Reshape -> Q -> uint8      three operations in float for the compiler
    after   uint16 -> DQ -> Q -> uint8 -> DQ -> Reshape    one Convert

    A move takes every value where it was, so the result is the same.
    """
    graph = QdqGraph(model)
    replaced: dict[int, list[NodeProto]] = {}
    renamed: dict[str, str] = {}
    outputs = {value.name for value in model.graph.output}  # they keep their names
    for index, node in enumerate(model.graph.node):
        if node.op_type != "QuantizeLinear":
            continue
        moves, before = list[NodeProto](), graph.producers.get(node.input[0])
        while before is not None and before.op_type in MOVES - {"Concat", "Split"}:
            moves.insert(0, before)
            before = graph.producers.get(before.input[0])
        if not moves or before is None or before.op_type != "DequantizeLinear":
            continue
        if graph.dtype(before) == graph.dtype(node):
            continue
        dequantise = next(n for n in model.graph.node if n.input[:1] == node.output[:1])
        if dequantise.output[0] in outputs:
            continue
        narrow, wide = f"{node.output[0]}_before", f"{dequantise.output[0]}_before"
        chain = [
            onnx.helper.make_node(node.op_type, [before.output[0], *node.input[1:]], [narrow], node.name),
            onnx.helper.make_node(
                dequantise.op_type, [narrow, *dequantise.input[1:]], [wide], dequantise.name
            ),
        ]
        for move in moves:
            copied = NodeProto()
            copied.CopyFrom(move)
            copied.input[0] = chain[-1].output[0]
            copied.output[0] = f"{move.output[0]}_{node.output[0]}"
            chain.append(copied)
        replaced[index] = chain
        renamed[dequantise.output[0]] = chain[-1].output[0]
    if not replaced:
        return
    nodes = [n for i, node in enumerate(model.graph.node) for n in replaced.get(i, [node])]
    for node in nodes:
        node.input[:] = [renamed.get(name, name) for name in node.input]
    read = set(outputs)
    kept: list[NodeProto] = []
    for node in reversed(nodes):
        if any(name in read for name in node.output):
            read.update(node.input)
            kept.append(node)
    del model.graph.node[:]
    model.graph.node.extend(reversed(kept))


def relabel(model: onnx.ModelProto) -> None:
    """Give 16-bit second operands of matrix products the type that the NPU has a kernel for, in place.

    before  uint16, zero point 32768 -> DQ -> MatMul        narrowed to 8 bits by the compiler
    after   uint16, zero point 32768 -> DQ -> Q -> int16, zero point 0 -> DQ -> MatMul

    Same scale, same values. Raises ExportError for a range that is not symmetric.
    """
    graph, zero = QdqGraph(model), numpy_helper.from_array(np.zeros((), np.int16), "relabel_zero_point")
    nodes: list[NodeProto] = []
    done: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type == "MatMul" and (pair := unsigned_operand(graph, node)) is not None:
            scale, zero_point = pair.input[1:3]
            if int(graph.value(zero_point)) != _MIDDLE:
                raise ExportError(
                    f"{node.name}: the range of its second operand is not symmetric",
                    next_step=f"make the quantiser behind {pair.name} symmetric, or give it 8 bits by a rule",
                )
            operand = node.input[1]
            if operand not in done:
                done[operand] = f"{operand}_signed"
                inner = f"{operand}_int16"
                for op, before, after in zip(PAIR, (operand, inner), (inner, done[operand]), strict=True):
                    name = f"{node.name}_relabel_{op}"
                    nodes.append(onnx.helper.make_node(op, [before, scale, zero.name], [after], name))
            node.input[1] = done[operand]
        nodes.append(node)
    if done:
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        model.graph.initializer.append(zero)


def unsigned_operand(graph: QdqGraph, matmul: NodeProto) -> NodeProto | None:
    """Return the DQ from which a MatMul's second operand comes as uint16, unless it is a weight."""
    for origin in graph.origins(matmul.input[1]):
        if (
            isinstance(origin, NodeProto)
            and origin.op_type == "DequantizeLinear"
            and not graph.is_constant(origin)
            and graph.dtype(origin) == TensorProto.UINT16
        ):
            return origin
    return None


def module_of(node: NodeProto) -> str:
    """Return the module path in a node's name."""
    return node.name.rpartition("/")[0]


def name_pairs(model: onnx.ModelProto) -> None:
    """Name each Q and DQ after the module that made its values, or that reads them if they are weights."""
    readers: dict[str, str] = {}
    for node in reversed(model.graph.node):
        owner = readers.get(node.output[0], "graph") if node.op_type in PAIR else module_of(node)
        readers |= dict.fromkeys(node.input, owner)
    owners = {value.name: value.name for value in model.graph.input}
    taken: Counter[str] = Counter()
    for node in model.graph.node:
        if node.op_type in PAIR:
            owner = owners.get(node.input[0]) or readers[node.input[0]]
            name = f"{owner}/{node.op_type}"
            taken[name] += 1
            node.name = name if taken[name] == 1 else f"{name}_{taken[name]}"
        else:
            owner = module_of(node)
        owners |= dict.fromkeys(node.output, owner)
