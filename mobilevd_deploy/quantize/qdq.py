"""Repairs of the QDQ graph that AIMET writes: what the NPU's compiler needs, at the same values.

load_folded            reads the file and folds its constants
convert_before_moves   changes bit widths before a reshape, not after it
relabel                gives 16-bit second operands of MatMul the type that the NPU has a kernel for
name_pairs             names each QuantizeLinear (Q) and DequantizeLinear (DQ) after a module
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from mobilevd_deploy.base.graphs import infer_shapes
from mobilevd_deploy.base.tensors import Array
from mobilevd_deploy.errors import ExportError
from mobilevd_deploy.npu.onnx_export import fold_constants, unique

QUANTISE, DEQUANTISE = PAIR = ("QuantizeLinear", "DequantizeLinear")

MOVES = frozenset(
    {"Concat", "DepthToSpace", "Flatten", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose"}
    | {"Unsqueeze"}
)
"""Ops that move values without changing them."""

_DATA_ONLY_FIRST = frozenset({"Clip", "Pad", "Resize"} | MOVES - {"Concat"})
_MIDDLE = 32768  # zero point of a symmetric range stored as uint16

Origin = ir.Node | ir.Value  # a node, or a graph input or initializer


def load_folded(path: Path) -> ir.Model:
    """Read a file that was exported without torch's optimiser, and fold its constants.

    The weights stay in the file: save the model before the file is removed.
    """
    model = ir.load(path)
    infer_shapes(model)  # so that shapes of weights behind a DQ fold as well
    fold_constants(model)
    for node in model.graph:
        # The exporter gives every convolution a bias. A bias of zeros in float32 would keep it off the NPU.
        if node.op_type == "Conv" and len(node.inputs) > 2 and (bias := node.inputs[2]) is not None:
            zeros = bias.const_value
            if zeros is not None and not zeros.numpy().any():
                node.resize_inputs(2)
    RemoveUnusedNodesPass()(model)
    return model


# ---- reading a QDQ graph ----


def operand(node: ir.Node, index: int) -> ir.Value:
    """Return an input that the op requires."""
    value = node.inputs[index]
    assert value is not None, node
    return value


def producer(value: ir.Value, op_type: str) -> ir.Node | None:
    """Return the node that makes a value, if it is of this type."""
    node = value.producer()
    return node if node is not None and node.op_type == op_type else None


def operands(node: ir.Node) -> list[ir.Value]:
    """Return the inputs that hold values, not shapes, axes or scales."""
    if node.op_type in _DATA_ONLY_FIRST:
        return [operand(node, 0)]
    return [
        value
        for value in node.inputs
        if value is not None and (not value.is_initializer() or value.dtype == ir.DataType.FLOAT)
    ]


def origins(value: ir.Value) -> Iterator[Origin]:
    """Yield the nodes, inputs and initializers that a value comes from, looking through moves."""
    node = value.producer()
    if node is None or node.op_type not in MOVES:
        yield value if node is None else node
        return
    for moved in operands(node):
        yield from origins(moved)


def dequantisers(value: ir.Value) -> Iterator[ir.Node]:
    """Yield each DQ that a value comes from, looking through moves."""
    for origin in origins(value):
        if isinstance(origin, ir.Node) and origin.op_type == DEQUANTISE:
            yield origin


def integer_type(pair: ir.Node) -> ir.DataType | None:
    """Return the integer type on the inner side of a Q or DQ, which its zero point has."""
    return operand(pair, 2).dtype


def constant(value: ir.Value) -> Array:
    """Return an initializer as an array."""
    assert value.const_value is not None, value
    return value.const_value.numpy()


def before_pairs(value: ir.Value) -> ir.Value:
    """Return the float value that one or more Q and DQ made this one from."""
    while (node := value.producer()) is not None and node.op_type in PAIR:
        value = operand(node, 0)
    return value


def is_weight(dequantise: ir.Node) -> bool:
    """Whether the values of a DQ are constants."""
    stored = operand(dequantise, 0)
    quantise = stored.producer()
    return quantise is None or operand(quantise, 0).is_initializer()


def module_of(node: ir.Node) -> str:
    """Return the module path in a node's name."""
    return (node.name or "").rpartition("/")[0]


def unsigned_operand(matmul: ir.Node) -> ir.Node | None:
    """Return the DQ that makes a MatMul's second operand from uint16, unless it is a weight."""
    for pair in dequantisers(operand(matmul, 1)):
        if not is_weight(pair) and integer_type(pair) == ir.DataType.UINT16:
            return pair
    return None


# ---- repairs ----


def convert_before_moves(model: ir.Model) -> None:
    """Change the bit width of values before they are moved, in place.

    before  uint16 -> DQ -> Reshape -> Q -> uint8          the compiler runs three ops in float
    after   uint16 -> DQ -> Q -> uint8 -> DQ -> Reshape    one Convert

    A move does not change values, so the result is the same.
    """
    for quantise in list(model.graph):
        if quantise.op_type != QUANTISE:
            continue
        moves, before = list[ir.Node](), operand(quantise, 0).producer()
        while before is not None and before.op_type in MOVES - {"Concat", "Split"}:
            moves.insert(0, before)
            before = operand(before, 0).producer()
        if not moves or before is None or before.op_type != DEQUANTISE:
            continue
        dequantise = quantise.outputs[0].consumers()[0]
        if integer_type(before) == integer_type(quantise) or dequantise.outputs[0].is_graph_output():
            continue
        chain: list[ir.Node] = []
        for node in (quantise, dequantise, *moves):
            first = chain[-1].outputs[0] if chain else before.outputs[0]
            made = ir.val(f"{node.outputs[0].name}_of_{quantise.outputs[0].name}")
            inputs = [first, *node.inputs[1:]]
            chain.append(ir.node(node.op_type, inputs, node.attributes, outputs=[made], name=node.name))
        model.graph.insert_before(quantise, chain)
        dequantise.outputs[0].replace_all_uses_with(chain[-1].outputs[0])
    RemoveUnusedNodesPass()(model)


def relabel(model: ir.Model) -> None:
    """Give 16-bit second operands of matrix products the type that the NPU has a kernel for, in place.

    before  uint16, zero point 32768 -> DQ -> MatMul        the compiler narrows it to 8 bits
    after   uint16, zero point 32768 -> DQ -> Q -> int16, zero point 0 -> DQ -> MatMul

    Scale and values stay the same. Raises ExportError for a range that is not symmetric.
    """
    graph = model.graph
    zero = ir.Value(name="relabel_zero_point", const_value=ir.tensor(np.zeros((), np.int16)))
    done: dict[ir.Value, ir.Value] = {}
    for node in graph:
        if node.op_type != "MatMul" or (pair := unsigned_operand(node)) is None:
            continue
        scale, zero_point = operand(pair, 1), operand(pair, 2)
        if int(constant(zero_point)) != _MIDDLE:
            raise ExportError(
                f"{node.name}: the range of its second operand is not symmetric",
                next_step=f"make the quantiser behind {pair.name} symmetric, or give it 8 bits by a rule",
            )
        wide = operand(node, 1)
        if wide not in done:
            value = wide
            for op, suffix in zip(PAIR, ("int16", "signed"), strict=True):
                made = ir.val(f"{wide.name}_{suffix}")
                name = f"{node.name}_relabel_{op}"
                graph.insert_before(node, ir.node(op, [value, scale, zero], outputs=[made], name=name))
                value = made
            done[wide] = value
        node.replace_input_with(1, done[wide])
    if done:
        graph.register_initializer(zero)


def name_pairs(model: ir.Model) -> None:
    """Name each Q and DQ after the module that made its values, or that reads them if they are weights."""
    makers = {value: value.name for value in model.graph.inputs}
    taken: Counter[str] = Counter()
    for node in model.graph:
        if node.op_type in PAIR:
            owner = makers.get(operand(node, 0)) or _reader(node)
            node.name = unique(f"{owner}/{node.op_type}", taken)
        else:
            owner = module_of(node)
        makers |= dict.fromkeys(node.outputs, owner)


def _reader(pair: ir.Node) -> str:
    """Return the module of the first node that reads what comes from a Q or DQ."""
    reader = next(iter(pair.outputs[0].consumers()), None)
    if reader is None:
        return "graph"
    return _reader(reader) if reader.op_type in PAIR else module_of(reader)
