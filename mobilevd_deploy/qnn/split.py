"""Cut an ONNX graph into parts that run one after the other, where few values cross.

    cut = plan_cut(model, parts)          which nodes go where, and what crosses
    write_parts(model_file, cut)          one ONNX file a part, beside the whole: they share its weights

A part's inputs are the graph's own, or outputs of parts before it. In a quantised graph only what a
DequantizeLinear gave may cross: as float32, quantised again on the other side with the same scale and zero
point, which changes no value. What stems from constants alone is no value: each part holds what it needs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
from onnx import ModelProto, NodeProto, TensorProto

from mobilevd_deploy.errors import ExportError

if TYPE_CHECKING:
    import onnx


ALLOCATION_LIMIT = 2**31
"""Bytes that one graph may allocate on the NPU; source: ai-hub-models #129, #274."""

COMPILER_LIMIT = 6_500_000_000
"""Bytes of memory that the compiler may take for one graph, so that 16 GB take two at a time. MobileVD's UNet
in such parts is compiled in less than half the time of the whole, and moves 3 % more to and from DRAM.
Source: docs/explanation/full-size.md."""

# A cut may lie this share of a part's size away from where parts would be equal, to find a cheaper place.
_SLACK = 0.3
_QUANTISE, _DEQUANTISE = "QuantizeLinear", "DequantizeLinear"
_UNSIGNED = (TensorProto.UINT8, TensorProto.UINT16)


@dataclass(frozen=True)
class Part:
    """Nodes of the whole graph by index, and the names of what goes in and out."""

    nodes: tuple[int, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Cut:
    """The parts in running order, and for each border the bytes that cross it, as float32."""

    parts: tuple[Part, ...]
    crossing_bytes: tuple[int, ...]


def weight_bytes(model: ModelProto, float_bytes: int) -> int:
    """Bytes of a graph's constants, floats counted with `float_bytes` each (2 where it runs in float16)."""
    return sum(_constant_bytes(tensor, float_bytes) for tensor in model.graph.initializer)


def compiler_bytes(model: ModelProto, float_bytes: int) -> int:
    """About how much memory the Hexagon compiler takes for a graph whose shapes are inferred, at most.

    Fits what it took for MobileVD's UNet at W8A16, whole and in parts, and for the parts of HD in float16:
    1 to 16 GB (benchmarks/results/full_size.json, hd.json).
    """
    flow = _Flow(model)
    return _compiler_bytes(flow, flow.order, float_bytes)


def compiler_work(model: ModelProto) -> int:
    """How many values a graph computes whose shapes are inferred: what the compiler's time goes with."""
    flow = _Flow(model)
    return sum(flow.node_values(i) for i in flow.order)


def fewest_parts(model: ModelProto, float_bytes: int, limit: int = ALLOCATION_LIMIT) -> int:
    """Return how many parts `plan_cut` has to make.

    Each stays below `limit` bytes, a tenth to spare, and below `COMPILER_LIMIT` for the compiler, or as near
    to it as cuts come: one operation may be above. Raises ExportError: no number of parts is below `limit`.
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


def plan_cut(model: ModelProto, parts: int) -> Cut:
    """Choose where to cut: into parts of about equal size, at the place where the fewest bytes cross.

    A part's size is its share of all values that the graph computes, which is what the compiler's time and
    memory go with, and its weights, as they stand in the file, over `ALLOCATION_LIMIT`.

    Weights need not be loaded, but shapes have to be inferred. Raises ExportError: there are too few places.
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
    """Write each part as <stem>-<n>of<N>.onnx beside `path`, whose external weights it refers to.

    Values that cross keep their names. Raises ExportError: a part that is not valid ONNX.
    """
    model = onnx.load(path, load_external_data=False)
    shapes = _values(onnx.shape_inference.infer_shapes(model))
    flow, written = _Flow(model), []
    for number, part in enumerate(cut.parts, start=1):
        target = path.with_name(f"{path.stem}-{number}of{len(cut.parts)}.onnx")
        onnx.save(_part_model(model, flow, part, shapes), target)
        try:
            onnx.checker.check_model(str(target))
        except onnx.checker.ValidationError as error:
            raise ExportError(f"{target.name} is not valid ONNX: {error}") from error
        written.append(target)
    return tuple(written)


class _Flow:
    """The nodes that carry values, in order, and what each reads, makes and holds."""

    def __init__(self, model: ModelProto) -> None:
        graph = model.graph
        self.graph = graph
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.inputs = [value.name for value in graph.input if value.name not in self.constants]
        self.producers = {name: i for i, node in enumerate(graph.node) for name in node.output}
        self.shapes = _values(model)
        fixed = set(self.constants)
        self.order: list[int] = []
        for i, node in enumerate(graph.node):
            if all(name in fixed for name in node.input if name):  # a Constant reads nothing
                fixed.update(node.output)
            else:
                self.order.append(i)
        self.carrying = frozenset(self.order)
        self._fixed = fixed
        self._is_quantised = any(graph.node[i].op_type == _QUANTISE for i in self.order)

    def node_bytes(self, index: int, float_bytes: int = 4) -> int:
        """Bytes of the constants that a node reads, directly or through nodes of constants alone."""
        held = (self.constants.get(name) for name in self._needs([index]).constants)
        return sum(_constant_bytes(tensor, float_bytes) for tensor in held if tensor is not None)

    def node_values(self, index: int) -> int:
        """How many values a node computes; quantising and back is part of the operation before."""
        node = self.graph.node[index]
        if node.op_type in (_QUANTISE, _DEQUANTISE):
            return 0
        return sum(math.prod(self.shapes[name].shape) for name in node.output if name in self.shapes)

    def is_attention(self, index: int) -> bool:
        """Whether a node is a softmax or a product of two values, of which the compiler makes little."""
        node = self.graph.node[index]
        product = node.op_type == "MatMul" and self._fixed.isdisjoint(node.input)
        return product or node.op_type == "Softmax"

    def places(self) -> dict[int, int]:
        """Return the positions in `order` behind which the graph may be cut, with the bytes that cross."""
        last_read: dict[str, int] = {}
        for position, index in enumerate(self.order):
            for name in self._reads(index):
                last_read[name] = position
        for value in self.graph.output:
            last_read[value.name] = len(self.order)
        live: set[str] = set()
        places: dict[int, int] = {}
        for position, index in enumerate(self.order[:-1]):
            live.update(name for name in self.graph.node[index].output if name in last_read)
            live = {name for name in live if last_read[name] > position}
            if live and all(self._may_cross(name) for name in live):
                places[position] = sum(4 * math.prod(self.shapes[name].shape) for name in live)
        return places

    def parts(self, groups: Sequence[Sequence[int]]) -> Iterator[Part]:
        """Describe the parts that these groups of value-carrying nodes make."""
        wanted = {value.name for value in self.graph.output}
        readers = [{name for index in group for name in self._reads(index)} for group in groups]
        for number, group in enumerate(groups):
            made = {name for index in group for name in self.graph.node[index].output}
            later = wanted.union(*readers[number + 1 :])
            needs = self._needs(group)
            yield Part(
                tuple(sorted({*group, *needs.nodes})),
                tuple(sorted(readers[number] - made, key=self._age)),
                tuple(sorted(made & later, key=self._age)),
            )

    def quantiser_of(self, name: str) -> NodeProto | None:
        """Return the DequantizeLinear that gave a value, if one did."""
        index = self.producers.get(name)
        node = None if index is None else self.graph.node[index]
        return node if node is not None and node.op_type == _DEQUANTISE else None

    def _may_cross(self, name: str) -> bool:
        if name not in self.shapes or self.shapes[name].kind != TensorProto.FLOAT:
            return False
        if not self._is_quantised:
            return True
        node = self.quantiser_of(name)
        return node is not None and self.constants[node.input[2]].data_type in _UNSIGNED

    def _reads(self, index: int) -> Iterator[str]:
        return (name for name in self.graph.node[index].input if name and name not in self._fixed)

    def _age(self, name: str) -> tuple[int, int]:
        if name in self.inputs:
            return -1, self.inputs.index(name)
        return self.producers[name], 0

    def _needs(self, nodes: Iterable[int]) -> _Needs:
        found = _Needs(set(), set())
        queue = [name for index in nodes for name in self.graph.node[index].input if name in self._fixed]
        while queue:
            name = queue.pop()
            if name in self.constants:
                found.constants.add(name)
            elif (index := self.producers[name]) not in found.nodes:
                found.nodes.add(index)
                queue += self.graph.node[index].input
        return found


@dataclass(frozen=True)
class _Needs:
    """Constants, and nodes of constants alone, that some nodes read."""

    constants: set[str]
    nodes: set[int]


@dataclass(frozen=True)
class _Value:
    shape: tuple[int, ...]
    kind: int


def _values(model: ModelProto) -> dict[str, _Value]:
    graph = model.graph
    return {
        value.name: _Value(
            tuple(d.dim_value for d in value.type.tensor_type.shape.dim), value.type.tensor_type.elem_type
        )
        for value in (*graph.input, *graph.output, *graph.value_info)
        if value.type.tensor_type.HasField("shape")
    }


def _constant_bytes(tensor: TensorProto, float_bytes: int) -> int:
    floating = tensor.data_type == TensorProto.FLOAT
    width = float_bytes if floating else onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return math.prod(tensor.dims) * width


def _part_model(whole: ModelProto, flow: _Flow, part: Part, shapes: dict[str, _Value]) -> ModelProto:
    nodes = [NodeProto.FromString(whole.graph.node[i].SerializeToString()) for i in part.nodes]
    again = [pair for name in part.inputs for pair in _quantise_again(flow, name)]
    renamed = {q.input[0]: dq.output[0] for q, dq in zip(again[::2], again[1::2], strict=True)}
    for node in nodes:
        for i, name in enumerate(node.input):
            node.input[i] = renamed.get(name, name)
    nodes = [*again, *nodes]
    read = {name for node in nodes for name in node.input}

    def declared(names: Sequence[str]) -> list[onnx.ValueInfoProto]:
        return [onnx.helper.make_tensor_value_info(n, shapes[n].kind, shapes[n].shape) for n in names]

    graph = onnx.helper.make_graph(
        nodes,
        whole.graph.name,
        declared(part.inputs),
        declared(part.outputs),
        [tensor for tensor in whole.graph.initializer if tensor.name in read],
    )
    return onnx.helper.make_model(graph, ir_version=whole.ir_version, opset_imports=whole.opset_import)


def _quantise_again(flow: _Flow, name: str) -> Iterator[NodeProto]:
    """Yield the pair that a value which crossed needs on this side; none for inputs of the whole graph."""
    source = flow.quantiser_of(name) if name not in flow.inputs else None
    if source is None:
        return
    scale, zero_point = source.input[1:3]
    module = source.name.rpartition("/")[0]
    inner, outer = f"{name}_inner", f"{name}_again"
    yield onnx.helper.make_node(
        _QUANTISE, [name, scale, zero_point], [inner], f"{module}/{_QUANTISE}_again_{name}"
    )
    yield onnx.helper.make_node(
        _DEQUANTISE, [inner, scale, zero_point], [outer], f"{module}/{_DEQUANTISE}_again_{name}"
    )


def tensor_shapes(graph: onnx.GraphProto) -> dict[str, tuple[int, ...]]:
    """Return the static shape of every tensor that the graph names."""
    return {
        value.name: tuple(
            d.dim_value if d.HasField("dim_value") else -1 for d in value.type.tensor_type.shape.dim
        )
        for value in (*graph.input, *graph.output, *graph.value_info)
        if value.type.tensor_type.HasField("shape")
    }


def read_shaped(model: Path) -> onnx.ModelProto:
    """Read a graph without its weights, with shapes."""
    return onnx.shape_inference.infer_shapes(onnx.load(model, load_external_data=False))
