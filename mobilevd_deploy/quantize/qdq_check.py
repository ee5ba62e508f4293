"""Checks of a QDQ graph: the compiler must run it in integers, with the requested bits, and correctly."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import onnx_ir as ir
from onnx_ir import DataType

from mobilevd_deploy.errors import ExportError, listed
from mobilevd_deploy.quantize.qdq import (
    DEQUANTISE,
    MOVES,
    PAIR,
    QUANTISE,
    before_pairs,
    constant,
    dequantisers,
    integer_type,
    is_weight,
    module_of,
    operand,
    operands,
    origins,
    producer,
    unsigned_operand,
)

_WITH_BIAS = frozenset({"Conv", "ConvTranspose", "Gemm", "InstanceNormalization", "LayerNormalization"})
_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_LARGEST = {DataType.INT4: 7, DataType.INT8: 127, DataType.INT16: 32767}
_UNSIGNED = (DataType.UINT8, DataType.UINT16)
_WIDE = {DataType.UINT16, DataType.INT16}


def check_quantised(model: ir.Model, is_float: Callable[[str], bool] = lambda _: False) -> None:
    """Refuse a graph that would compile, and then be wrong, have fewer bits or be slow.

    `is_float` returns whether the rule of a module path has 32 bits. Raises ExportError that names the
    node.
    """
    check_interface(model)
    check_forms(model, is_float)
    check_coverage(model, is_float)
    check_operands(model, is_float)


def check_interface(model: ir.Model) -> None:
    """Refuse inputs or outputs that are not float32, the only type that callers of the NPU pass."""
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.dtype != DataType.FLOAT:
            raise ExportError(f"{value.name}: an input or output that is not float32")


def check_forms(model: ir.Model, is_float: Callable[[str], bool] = lambda _: False) -> None:
    """Refuse ops that the compiler runs in float32 or computes wrongly at any range.

    All were observed on SM8650 with onnxruntime-qnn 2.7.0.
    """
    for node in model.graph:
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
        if node.op_type == "Mul" and _is_silu(node):
            raise ExportError(
                f"{node.name}: a tensor times its own sigmoid is computed wrongly at many sizes",
                next_step="use npu.ops.SiLU, which reshapes the tensor before the sigmoid",
            )


def _is_silu(mul: ir.Node) -> bool:
    """Whether a node multiplies x and sigmoid(x), with only Q and DQ in between."""
    first, second = operand(mul, 0), operand(mul, 1)
    for x, other in ((first, second), (second, first)):
        source = before_pairs(other)
        sigmoid = producer(source, "Sigmoid")
        if source is not other and sigmoid is not None:
            return before_pairs(operand(sigmoid, 0)) is before_pairs(x)
    return False


def check_coverage(model: ir.Model, is_float: Callable[[str], bool] = lambda _: False) -> None:
    """Refuse values that reach an op, or the graph's output, without a Q and DQ on the way; name them all."""
    gaps = dict.fromkeys(_gaps(model.graph, is_float))
    if gaps:
        raise ExportError(
            "values without a range; the ops that make and read them would run in float32 or not on the NPU:"
            + listed(gaps),
            next_step="make each of these ops a module of its own with one instance per call, as in "
            "npu/ops.py (for SiLU: npu.ops.SiLU), or allow it by a rule with 32 bits",
        )


def _gaps(graph: ir.Graph, is_float: Callable[[str], bool]) -> Iterator[str]:
    """Describe each read of a value without a range."""
    readers: list[tuple[str, ir.Value, ir.Node | None]] = [
        (f"{node.name} ({node.op_type})", value, node)
        for node in graph
        if node.op_type not in (*PAIR, *MOVES) and not is_float(module_of(node))
        for value in operands(node)
    ]
    readers += [(f"the output {output.name}", output, None) for output in graph.outputs]
    for reader, value, node in readers:
        for origin in origins(value):
            if isinstance(origin, ir.Value):
                yield f"{reader} reads {origin.name}"
            elif not (
                origin.op_type == DEQUANTISE
                or is_float(module_of(origin))
                or (node is not None and _fuses(origin, node))
            ):
                yield f"{reader} reads {origin.name} ({origin.op_type})"


def _fuses(first: ir.Node, second: ir.Node) -> bool:
    """Whether the compiler makes one op of the two."""
    if second.op_type in ("Relu", "Clip"):
        return first.op_type in ("Conv", "Gemm", "Add")
    if first.op_type != "MatMul" or second.op_type != "Add":
        return False
    # A linear layer on tokens: product with a weight, plus a bias.
    others = [operand(first, 1), *(value for value in operands(second) if value.producer() is not first)]
    return all(
        isinstance(origin, ir.Node) and origin.op_type == DEQUANTISE and is_weight(origin)
        for value in others
        for origin in origins(value)
    )


def check_operands(model: ir.Model, is_float: Callable[[str], bool] = lambda _: False) -> None:
    """Refuse integers of a type or scale that the compiler narrows, converts or leaves to the CPU."""
    for node in model.graph:
        if node.op_type == QUANTISE:
            _check_sign(node)
        elif is_float(module_of(node)):
            continue
        elif node.op_type == "MatMul":
            _check_matmul(node)
        elif node.op_type in _WITH_BIAS and len(node.inputs) > 2 and node.inputs[2] is not None:
            _check_bias(node)
        if node.op_type in _PRODUCTS:
            _check_steps(node)


def _check_sign(quantise: ir.Node) -> None:
    value = operand(quantise, 0)
    is_relabelled = producer(value, DEQUANTISE) is not None
    if integer_type(quantise) not in _UNSIGNED and not is_relabelled and not value.is_initializer():
        raise ExportError(
            f"{quantise.name}: a signed activation, which moves the layer to the CPU",
            next_step='export with force_activation_as="unsigned"',
        )


def _check_matmul(node: ir.Node) -> None:
    if unsigned_operand(node) is not None:
        raise ExportError(
            f"{node.name}: its second operand is uint16, which the compiler narrows to 8 bits",
            next_step="call relabel first",
        )
    first, second = ({integer_type(pair) for pair in dequantisers(operand(node, i))} for i in (0, 1))
    if second & _WIDE and first - _WIDE:
        raise ExportError(
            f"{node.name}: a 16-bit second operand needs a 16-bit first one",
            next_step="give both the same bits by a rule",
        )


def _check_bias(node: ir.Node) -> None:
    bias = producer(operand(node, 2), DEQUANTISE)
    if bias is None or integer_type(bias) != DataType.INT32:
        raise ExportError(
            f"{node.name} ({node.op_type}): its bias is not int32, so it runs in float32",
            next_step="export with export_int32_bias, or allow it by a rule with 32 bits",
        )
    if node.op_type.endswith("Normalization"):
        return
    weight = operand(node, 1).producer()
    assert weight is not None
    for source in dequantisers(operand(node, 0)):
        expected = constant(operand(source, 1)) * constant(operand(weight, 1))
        if not np.allclose(constant(operand(bias, 1)), expected, rtol=1e-3, atol=0):
            raise ExportError(
                f"{node.name}: its bias is stored for another input's scale; is the module called twice?",
                next_step="make one module instance per call",
            )


def _check_steps(node: ir.Node) -> None:
    pair = producer(operand(node, 1), DEQUANTISE)
    if pair is None or not (stored := operand(pair, 0)).is_initializer():
        return
    integers = np.abs(constant(stored).astype(np.int64))
    axis = pair.attributes.get_int("axis", 1)
    per_output = constant(operand(pair, 1)).ndim > 0
    rows = np.moveaxis(integers, axis, 0).reshape(integers.shape[axis], -1) if per_output else [integers]
    largest = _LARGEST.get(stored.dtype, 0) if stored.dtype else 0
    for row in rows:
        if 0 < 2 * (steps := int(np.max(row))) <= largest:
            raise ExportError(
                f"{node.name}: weights stored as integers up to {steps} where {largest} is possible; the NPU "
                "drops the low byte of their sums",
                next_step="make their scale smaller",
            )
