"""What a quantised graph must hold for the compiler to run it in integers, and to run it right."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import onnx
from onnx import NodeProto, TensorProto

from mobilevd_deploy.errors import ExportError, listed
from mobilevd_deploy.quantize.qdq import MOVES, PAIR, QdqGraph, module_of, unsigned_operand

_WITH_BIAS = frozenset({"Conv", "ConvTranspose", "Gemm", "InstanceNormalization", "LayerNormalization"})


_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


_LARGEST = {TensorProto.INT4: 7, TensorProto.INT8: 127, TensorProto.INT16: 32767}


_UNSIGNED, _SIGNED = (TensorProto.UINT8, TensorProto.UINT16), (TensorProto.INT8, TensorProto.INT16)


_WIDE = (TensorProto.UINT16, TensorProto.INT16)


def check_quantised(model: onnx.ModelProto, is_float: Callable[[str], bool] = lambda _: False) -> None:
    """Refuse a graph that compiles and then is wrong, narrow or slow.

    `is_float` says of a module path whether float is what its rule asks for. Raises ExportError that names
    the node; weights have to be in memory.
    """
    check_interface(model)
    check_forms(model, is_float)
    check_coverage(model, is_float)
    check_operands(model, is_float)


def check_interface(model: onnx.ModelProto) -> None:
    """Refuse inputs or outputs that are not float32: what calls the NPU speaks floats."""
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type != TensorProto.FLOAT:
            raise ExportError(f"{value.name}: an input or output that is not float32")


def check_forms(model: onnx.ModelProto, is_float: Callable[[str], bool] = lambda _: False) -> None:
    """Refuse ops that the compiler runs in float32 or computes wrongly, whatever their ranges.

    All were seen on SM8650 with onnxruntime-qnn 2.7.0.
    """
    graph = QdqGraph(model)
    for node in model.graph.node:
        if is_float(module_of(node)):
            continue
        if node.op_type == "GroupNormalization":
            raise ExportError(
                f"{node.name}: group normalisation always runs in float32",
                next_step='set graph.group_norm = "instance" in the recipe',
            )
        if node.op_type == "Expand":
            raise ExportError(
                f"{node.name}: an expanded axis is computed wrongly",
                next_step="concatenate the tensor with itself, or let an op broadcast",
            )
        if node.op_type == "Mul" and _is_silu(graph, node):
            raise ExportError(
                f"{node.name}: a tensor times its own sigmoid is computed wrongly at many sizes",
                next_step="use npu.ops.SiLU, which hides it from the compiler",
            )


def _is_silu(graph: QdqGraph, mul: NodeProto) -> bool:
    """Whether it multiplies x and sigmoid(x), each behind Q and DQ and nothing else."""
    for x, other in (mul.input, mul.input[::-1]):
        source = graph.before_pairs(other)
        node = graph.producers.get(source)
        if source != other and node is not None and node.op_type == "Sigmoid":
            return graph.before_pairs(node.input[0]) == graph.before_pairs(x)
    return False


def check_coverage(model: onnx.ModelProto, is_float: Callable[[str], bool] = lambda _: False) -> None:
    """Refuse values that reach an op, or the graph's output, without a Q and DQ on the way; name them all."""
    gaps = dict.fromkeys(_gaps(QdqGraph(model), is_float))
    if gaps:
        raise ExportError(
            "values without a range; what makes and what reads them would run in float32 or not on the NPU:"
            + listed(gaps),
            next_step="make each of these ops a module of its own with one instance per call, as in "
            "npu/ops.py (for SiLU: npu.ops.SiLU), or allow it by a rule with 32 bits",
        )


def _gaps(graph: QdqGraph, is_float: Callable[[str], bool]) -> Iterator[str]:
    """Yield what reads a value without a range, and which."""
    readers = [
        (f"{node.name} ({node.op_type})", operand, node)
        for node in graph.graph.node
        if node.op_type not in (*PAIR, *MOVES) and not is_float(module_of(node))
        for operand in graph.operands(node)
    ]
    outputs = [(f"the output {output.name}", output.name, None) for output in graph.graph.output]
    for reader, operand, node in (*readers, *outputs):
        for origin in graph.origins(operand):
            if not isinstance(origin, NodeProto):
                yield f"{reader} reads {origin}"
            elif not (
                origin.op_type == "DequantizeLinear"
                or is_float(module_of(origin))
                or (node is not None and _fuses(graph, origin, node))
            ):
                yield f"{reader} reads {origin.name} ({origin.op_type})"


def _fuses(graph: QdqGraph, first: NodeProto, second: NodeProto) -> bool:
    """Whether the compiler makes one op of the two."""
    if second.op_type in ("Relu", "Clip"):
        return first.op_type in ("Conv", "Gemm", "Add")
    if first.op_type != "MatMul" or second.op_type != "Add":
        return False
    # A linear layer on tokens: product with a weight, plus a bias.
    others = [first.input[1], *(name for name in second.input if name not in first.output)]
    return all(
        isinstance(origin, NodeProto) and origin.op_type == "DequantizeLinear" and graph.is_constant(origin)
        for name in others
        for origin in graph.origins(name)
    )


def check_operands(model: onnx.ModelProto, is_float: Callable[[str], bool] = lambda _: False) -> None:
    """Refuse integers of a type or scale that the compiler narrows, converts or leaves to the CPU."""
    graph = QdqGraph(model)
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            _check_signs(graph, node)
        elif is_float(module_of(node)):
            continue
        elif node.op_type == "MatMul":
            _check_matmul(graph, node)
        elif node.op_type in _WITH_BIAS and len(node.input) > 2 and node.input[2]:
            _check_bias(graph, node)
        if node.op_type in _PRODUCTS:
            _check_steps(graph, node)


def _check_signs(graph: QdqGraph, node: NodeProto) -> None:
    before = graph.producers.get(node.input[0])
    relabelled = before is not None and before.op_type == "DequantizeLinear"
    if graph.dtype(node) not in _UNSIGNED and not relabelled and node.input[0] not in graph.constants:
        raise ExportError(
            f"{node.name}: a signed activation, which sends the layer to the CPU",
            next_step='export with force_activation_as="unsigned"',
        )


def _check_matmul(graph: QdqGraph, node: NodeProto) -> None:
    if unsigned_operand(graph, node) is not None:
        raise ExportError(
            f"{node.name}: its second operand is uint16, which the compiler narrows to 8 bits",
            next_step="call relabel first",
        )
    first, second = (
        {
            graph.dtype(origin)
            for origin in graph.origins(name)
            if isinstance(origin, NodeProto) and origin.op_type == "DequantizeLinear"
        }
        for name in node.input
    )
    if second & set(_WIDE) and first - set(_WIDE):
        raise ExportError(
            f"{node.name}: a 16-bit second operand needs a 16-bit first one",
            next_step="give both the same bits by a rule",
        )


def _check_bias(graph: QdqGraph, node: NodeProto) -> None:
    bias = graph.producers.get(node.input[2])
    if bias is None or bias.op_type != "DequantizeLinear" or graph.dtype(bias) != TensorProto.INT32:
        raise ExportError(
            f"{node.name} ({node.op_type}): its bias is not int32, so it runs in float32",
            next_step="export with export_int32_bias, or allow it by a rule with 32 bits",
        )
    if node.op_type.endswith("Normalization"):
        return
    weight = graph.producers[node.input[1]]
    for source in graph.origins(node.input[0]):
        if isinstance(source, NodeProto) and source.op_type == "DequantizeLinear":
            expected = graph.value(source.input[1]) * graph.value(weight.input[1])
            if not np.allclose(graph.value(bias.input[1]), expected, rtol=1e-3, atol=0):
                raise ExportError(
                    f"{node.name}: its bias is stored for another input's scale; is the module called twice?",
                    next_step="one instance per call",
                )


def _check_steps(graph: QdqGraph, node: NodeProto) -> None:
    pair = graph.producers.get(node.input[1])
    if pair is None or pair.op_type != "DequantizeLinear" or pair.input[0] not in graph.constants:
        return
    integers = np.abs(graph.value(pair.input[0]).astype(np.int64))
    axis = next((a.i for a in pair.attribute if a.name == "axis"), 1)
    per_output = graph.value(pair.input[1]).ndim > 0
    rows = np.moveaxis(integers, axis, 0).reshape(integers.shape[axis], -1) if per_output else [integers]
    largest = _LARGEST.get(graph.constants[pair.input[0]].data_type, 0)
    for row in rows:
        if 0 < 2 * (steps := int(np.max(row))) <= largest:
            raise ExportError(
                f"{node.name}: weights stored as integers up to {steps} where {largest} is possible; the NPU "
                "drops the low byte of their sums",
                next_step="make their scale smaller",
            )
