"""Cut an ONNX graph into parts that run one after the other, at places where few values cross.

    cut = plan_cut(model, parts)          which nodes each part has, and which values cross
    write_parts(model_file, cut)          one ONNX file per part, beside the whole: they share its weights

A part's inputs are inputs of the whole graph or outputs of earlier parts. In a quantised graph only outputs
of a DequantizeLinear may cross: as float32, quantised again in the next part with the same scale and zero
point, which changes no value. Constants, and what is computed from constants alone, do not cross: each part
has its own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from mobilevd_deploy.base.graphs import check_file, fixed_shape, read_shaped
from mobilevd_deploy.errors import ExportError

ALLOCATION_LIMIT = 2**31
"""Bytes that one graph may allocate on the NPU; source: ai-hub-models #129, #274."""

COMPILER_LIMIT = 6_500_000_000
"""Bytes of memory that the compiler may need for one graph, so that 16 GB are enough for two at a time.

MobileVD's UNet in such parts compiles in less than half the time of the whole, and moves 3 % more bytes to
and from DRAM. Source: docs/explanation/full-size.md.
"""

# To find a cheaper place, a cut may move by this share of a part's size.
_SLACK = 0.3
_QUANTISE, _DEQUANTISE = "QuantizeLinear", "DequantizeLinear"
_UNSIGNED = (ir.DataType.UINT8, ir.DataType.UINT16)


@dataclass(frozen=True)
class Part:
    """Nodes by index in the whole graph, and the names of the inputs and outputs."""

    nodes: tuple[int, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Cut:
    """The parts in the order in which they run, and the bytes of float32 that cross each border."""

    parts: tuple[Part, ...]
    crossing_bytes: tuple[int, ...]


def constant_bytes(value: ir.Value, float_bytes: int) -> int:
    """Bytes of an initializer, with `float_bytes` per float."""
    tensor = value.const_value
    assert tensor is not None
    width = float_bytes if tensor.dtype == ir.DataType.FLOAT else tensor.dtype.numpy().itemsize
    return tensor.size * width


def weight_bytes(model: ir.Model, float_bytes: int) -> int:
    """Bytes of a graph's constants, with `float_bytes` per float (2 if the graph runs in float16)."""
    return sum(constant_bytes(value, float_bytes) for value in model.graph.initializers.values())


def compiler_bytes(model: ir.Model, float_bytes: int) -> int:
    """Estimate the peak memory, in bytes, of the Hexagon compiler for a graph with inferred shapes.

    Fitted to measurements of MobileVD's UNet at W8A16, whole and in parts, and of the parts of HD in float16:
    1 to 16 GB (benchmarks/results/full_size.json, hd.json).
    """
    flow = _Flow(model)
    return _compiler_bytes(flow, flow.order, float_bytes)


def compiler_work(model: ir.Model) -> int:
    """Count the values that a graph with inferred shapes computes. Compile time scales with this count."""
    flow = _Flow(model)
    return sum(flow.node_values(i) for i in flow.order)


def fewest_parts(model: ir.Model, float_bytes: int, limit: int = ALLOCATION_LIMIT) -> int:
    """Return the number of parts for `plan_cut`.

    It is the smallest number whose parts all have less than 0.9 `limit` bytes of weights and need at most
    `COMPILER_LIMIT` bytes to compile. If one operation alone needs more to compile, it is the number that
    comes closest. Raises ExportError if no number of parts keeps the weights below the limit.
    """
    flow, allowed = _Flow(model), 0.9 * limit
    shares = weight_bytes(model, float_bytes) / allowed, compiler_bytes(model, float_bytes) / COMPILER_LIMIT
    found: list[tuple[int, int]] = []
    for count in range(1, 2 * math.ceil(max(shares)) + 1):
        try:
            parts = plan_cut(model, count).parts
        except ExportError:
            break
        groups = [[i for i in part.nodes if i in flow.carrying] for part in parts]
        if max(sum(flow.node_bytes(i, float_bytes) for i in group) for group in groups) > allowed:
            continue
        found.append((max(_compiler_bytes(flow, group, float_bytes) for group in groups), count))
        if found[-1][0] <= COMPILER_LIMIT:
            return count
    if not found:
        raise ExportError(
            f"{model.graph.name}: no cut leaves parts below {limit / 2**30:.1f} GiB of weights",
            next_step="quantise the weights, or make the network smaller",
        )
    return min(found)[1]


def _compiler_bytes(flow: _Flow, nodes: Sequence[int], float_bytes: int) -> int:
    weights = sum(flow.node_bytes(i, float_bytes) for i in nodes)
    attention = sum(flow.node_values(i) for i in nodes if flow.is_attention(i))
    others = sum(flow.node_values(i) for i in nodes) - attention
    return round(0.4e9 + 4.5 * weights + 0.45 * attention + (1.6 if float_bytes == 2 else 1.0) * others)


def plan_cut(model: ir.Model, parts: int) -> Cut:
    """Choose where to cut a graph with inferred shapes into parts of similar size, so that few bytes cross.

    The size of a part is its share of all values that the graph computes, with which the compiler's time and
    memory scale, plus the bytes of its weights in the file over `ALLOCATION_LIMIT`.

    Raises ExportError if the graph has too few places to cut.
    """
    flow = _Flow(model)
    places = flow.places()
    values = [flow.node_values(i) for i in flow.order]
    weights = [flow.node_bytes(i) / ALLOCATION_LIMIT for i in flow.order]
    sizes = list(itertools.accumulate(v / sum(values) + w for v, w in zip(values, weights, strict=True)))
    total, chosen = sizes[-1], list[int]()
    for number in range(1, parts):
        ideal, slack = total * number / parts, total / parts * _SLACK
        after = chosen[-1] if chosen else -1
        left = [place for place in places if place > after]
        if not left:
            raise ExportError(
                f"{model.graph.name}: there is no place for cut {number} of {parts - 1}",
                next_step="ask for fewer parts",
            )
        far = {place: abs(sizes[place] - ideal) for place in left}
        near = [place for place in left if far[place] <= slack] or [min(left, key=far.__getitem__)]
        chosen.append(min(near, key=lambda place: (places[place], far[place])))
    bounds = list(itertools.pairwise([-1, *chosen, len(flow.order) - 1]))
    groups = [flow.order[start + 1 : stop + 1] for start, stop in bounds]
    return Cut(tuple(flow.parts(groups)), tuple(places[place] for place in chosen))


def write_parts(path: Path, cut: Cut) -> tuple[Path, ...]:
    """Write each part as <stem>-<n>of<N>.onnx beside `path`. The parts refer to its external weights.

    Values that cross keep their names. Raises ExportError if a part is not valid ONNX.
    """
    model, written = read_shaped(path), []
    for number, part in enumerate(cut.parts, start=1):
        target = path.with_name(f"{path.stem}-{number}of{len(cut.parts)}.onnx")
        ir.save(ir.Model(_part_graph(model.graph, part), ir_version=model.ir_version), target)
        check_file(target, f"part {number} of {path.name}")
        written.append(target)
    return tuple(written)


class _Flow:
    """The nodes that carry values, in order, and the values and constants that each reads and makes.

    A node is its index in the graph. Constants, and what nodes compute from constants alone, are fixed.
    """

    def __init__(self, model: ir.Model) -> None:
        self.graph = model.graph
        self.nodes = list(model.graph)
        self.index = {node: i for i, node in enumerate(self.nodes)}
        self._fixed: set[ir.Value] = set(model.graph.initializers.values())
        self.order: list[int] = []
        for i, node in enumerate(self.nodes):
            if all(value in self._fixed for value in node.inputs if value is not None):
                self._fixed.update(node.outputs)  # a Constant reads nothing
            else:
                self.order.append(i)
        self.carrying = frozenset(self.order)
        self._is_quantised = any(self.nodes[i].op_type == _QUANTISE for i in self.order)

    def node_bytes(self, index: int, float_bytes: int = 4) -> int:
        """Bytes of the constants that a node reads, directly or through nodes of constants alone."""
        return sum(constant_bytes(value, float_bytes) for value in self._needs([index]).constants)

    def node_values(self, index: int) -> int:
        """Count the values that a node computes. Q and DQ count for nothing: the compiler fuses them."""
        node = self.nodes[index]
        if node.op_type in (_QUANTISE, _DEQUANTISE):
            return 0
        return sum(_size(value) for value in node.outputs)

    def is_attention(self, index: int) -> bool:
        """Whether a node is a softmax or a product of two values; these take the compiler less memory."""
        node = self.nodes[index]
        product = node.op_type == "MatMul" and self._fixed.isdisjoint(node.inputs)
        return product or node.op_type == "Softmax"

    def places(self) -> dict[int, int]:
        """Return the positions in `order` after which the graph may be cut, with the bytes that cross."""
        last_read: dict[ir.Value, int] = {}
        for position, index in enumerate(self.order):
            for value in self._reads(index):
                last_read[value] = position
        for value in self.graph.outputs:
            last_read[value] = len(self.order)
        live: set[ir.Value] = set()
        places: dict[int, int] = {}
        for position, index in enumerate(self.order[:-1]):
            live.update(value for value in self.nodes[index].outputs if value in last_read)
            live = {value for value in live if last_read[value] > position}
            if live and all(self._may_cross(value) for value in live):
                places[position] = sum(4 * _size(value) for value in live)
        return places

    def parts(self, groups: Sequence[Sequence[int]]) -> Iterator[Part]:
        """Describe the part that each group of value-carrying nodes makes."""
        wanted = set(self.graph.outputs)
        readers = [{value for index in group for value in self._reads(index)} for group in groups]
        for number, group in enumerate(groups):
            made = {value for index in group for value in self.nodes[index].outputs}
            later = wanted.union(*readers[number + 1 :])
            yield Part(
                tuple(sorted({*group, *self._needs(group).nodes})),
                self._names(readers[number] - made),
                self._names(made & later),
            )

    def _may_cross(self, value: ir.Value) -> bool:
        if fixed_shape(value) is None or value.dtype != ir.DataType.FLOAT:
            return False
        pair = _dequantiser(value)
        return not self._is_quantised or (pair is not None and _zero_point(pair).dtype in _UNSIGNED)

    def _reads(self, index: int) -> Iterator[ir.Value]:
        return (v for v in self.nodes[index].inputs if v is not None and v not in self._fixed)

    def _names(self, values: Iterable[ir.Value]) -> tuple[str, ...]:
        """Return names: inputs of the graph first, then the others in the order of the nodes."""
        inputs = {value: i for i, value in enumerate(self.graph.inputs)}

        def age(value: ir.Value) -> tuple[int, int]:
            node = value.producer()
            return (-1, inputs[value]) if node is None else (self.index[node], value.index() or 0)

        return tuple(str(value.name) for value in sorted(values, key=age))

    def _needs(self, nodes: Iterable[int]) -> _Needs:
        found = _Needs(set(), set())
        queue: list[ir.Value | None] = [
            value for index in nodes for value in self.nodes[index].inputs if value in self._fixed
        ]
        while queue:
            value = queue.pop()
            node = None if value is None else value.producer()
            if value is not None and node is None:
                found.constants.add(value)
            elif node is not None and (index := self.index[node]) not in found.nodes:
                found.nodes.add(index)
                queue += node.inputs
        return found


@dataclass(frozen=True)
class _Needs:
    """Constants, and nodes of constants alone, that some nodes read."""

    constants: set[ir.Value]
    nodes: set[int]


def _size(value: ir.Value) -> int:
    """Return the number of elements of a value; 0 if its shape is not known."""
    shape = fixed_shape(value)
    return 0 if shape is None else math.prod(shape)


def _dequantiser(value: ir.Value) -> ir.Node | None:
    """Return the DequantizeLinear that makes a value, if one does."""
    node = value.producer()
    return node if node is not None and node.op_type == _DEQUANTISE else None


def _zero_point(pair: ir.Node) -> ir.Value:
    assert pair.inputs[2] is not None
    return pair.inputs[2]


def _part_graph(whole: ir.Graph, part: Part) -> ir.Graph:
    """Extract a part. Values that crossed are quantised again, with their own scale and zero point."""
    graph = ir.convenience.extract(whole, part.inputs, part.outputs)
    sources, first = ir.convenience.create_value_mapping(whole), graph[0]
    for crossed in graph.inputs:
        pair = _dequantiser(sources[str(crossed.name)])
        if pair is None:  # an input of the whole graph, or a value of a float graph
            continue
        uses, value, module = list(crossed.uses()), crossed, (pair.name or "").rpartition("/")[0]
        grid = [_held(graph, constant) for constant in pair.inputs[1:3]]
        for op, suffix in ((_QUANTISE, "inner"), (_DEQUANTISE, "again")):
            name, made = f"{module}/{op}_again_{crossed.name}", ir.val(f"{crossed.name}_{suffix}")
            graph.insert_before(first, ir.node(op, [value, *grid], outputs=[made], name=name))
            value = made
        for node, index in uses:
            node.replace_input_with(index, value)
    # `extract` returns initializers in no fixed order.
    for name in whole.initializers:
        if name in graph.initializers:
            graph.register_initializer(graph.initializers.pop(name))
    return graph


def _held(graph: ir.Graph, constant: ir.Value | None) -> ir.Value:
    """Return the part's own initializer for a constant of the whole graph."""
    assert constant is not None
    assert constant.name is not None
    if constant.name not in graph.initializers:
        graph.register_initializer(ir.Value(name=constant.name, const_value=constant.const_value))
    return graph.initializers[constant.name]
