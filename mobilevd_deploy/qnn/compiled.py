"""Read back what the Hexagon compiler made of a model.

read_qnn_graph  QnnGraph: operations and tensors with their types, from the JSON that a compilation writes
check_graph     refuses a quantised graph with float operations or with tensors of too few bits
read_traffic    Traffic: bytes to and from DRAM per module, from the compiler's schedule

Neither format is documented, so an unknown value is an error. The compiler renames operations ("a.conv/Conv"
becomes "a.conv/Conv_token_7") and inserts its own. Both are traced back to nodes of the ONNX file, which are
named <module path>/<op>.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from mobilevd_deploy.errors import ExportError, VendorError, listed

# Qnn_DataType_t of QnnTypes.h: the low byte is the width, written as if decimal.
_KINDS = {0: "int", 1: "uint", 2: "float", 3: "sfixed", 4: "ufixed", 5: "bool"}
_WIDTHS = {0x04: 4, 0x08: 8, 0x16: 16, 0x32: 32, 0x64: 64}
_ROLES: dict[int, Role] = {0: "input", 1: "output", 3: "inner", 4: "constant"}
_MOVES = ("Transpose", "Reshape", "StridedSlice", "Concat", "Cast")
_CARRIERS = ("Quantize", "Dequantize", *_MOVES)
_TRAFFIC_KEYS = ["opid", "dram_read", "dram_write", "vtcm_read", "vtcm_write", "is_dma"]
_LOW_32_BITS = 0xFFFFFFFF

Role = Literal["input", "output", "inner", "constant"]


@dataclass(frozen=True)
class QnnTensor:
    """A tensor of the compiled graph.

    `dtype` follows QNN's names: "float32", "ufixed16" (quantised, with a zero point), "sfixed8", "int32".
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    role: Role

    @property
    def is_float_value(self) -> bool:
        """Whether it is a computed value, not a constant, in floating point."""
        return self.role != "constant" and self.dtype.startswith("float")

    @property
    def quantised_bits(self) -> int | None:
        """Bits of a quantised computed value; None for constants and for other values."""
        if self.role == "constant" or "fixed" not in self.dtype:
            return None
        return int(self.dtype.partition("fixed")[2])


@dataclass(frozen=True)
class QnnOp:
    """An operation. `node` is its ONNX node, or the nearest ONNX node if the compiler inserted it."""

    name: str
    type: str
    node: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Narrowed:
    """A value with fewer bits than in the ONNX file; `node` reads it."""

    tensor: str
    dtype: str
    node: str


@dataclass(frozen=True)
class QnnGraph:
    """A compiled graph. `narrow_by_design`: names of values that have 8 bits in the ONNX file as well."""

    ops: tuple[QnnOp, ...]
    tensors: dict[str, QnnTensor]
    narrow_by_design: frozenset[str] = frozenset()

    @property
    def is_quantised(self) -> bool:
        """Whether any computed value is quantised."""
        return any(tensor.quantised_bits for tensor in self.tensors.values())

    @cached_property
    def float_islands(self) -> tuple[QnnOp, ...]:
        """Operations in floating point within a quantised graph, without its edges.

        The edges quantise a float input or dequantise an output. Conversions and moves around an island are
        not listed.
        """
        if not self.is_quantised:
            return ()
        edge = self._carried(
            {t.name for t in self.tensors.values() if t.is_float_value and t.role != "inner"}
        )
        bad = [
            op
            for op in self.ops
            if (floats := self._floats(op)) and not (op.type in _CARRIERS and floats <= edge)
        ]
        computing = [op for op in bad if op.type not in _CARRIERS]
        # If the island computes nothing, name the operations that move its values.
        reached = self._carried({name for op in computing for name in self._floats(op)})
        return (*computing, *(op for op in bad if op.type in _CARRIERS and not self._floats(op) & reached))

    @cached_property
    def narrowed(self) -> tuple[Narrowed, ...]:
        """Values of 8 bits or fewer that have more in the ONNX file; only the first of a chain is listed."""
        found = []
        for op in self.ops:
            if any(self._is_narrow(name) for name in op.inputs):
                continue
            for name in op.outputs:
                if self._is_narrow(name) and origin(name, self.narrow_by_design) is None:
                    reader = next((o for o in self.ops if name in o.inputs), op)
                    found.append(Narrowed(name, self.tensors[name].dtype, reader.node))
        return tuple(found)

    def node_of(self, name: str) -> str | None:
        """Return the ONNX node of the operation called `name`."""
        return self._nodes.get(name)

    @cached_property
    def _nodes(self) -> dict[str, str]:
        return {op.name: op.node for op in self.ops}

    def _floats(self, op: QnnOp) -> set[str]:
        return {name for name in (*op.inputs, *op.outputs) if self.tensors[name].is_float_value}

    def _carried(self, values: set[str]) -> set[str]:
        """Return these float values, and all that moves connect with them."""
        moves = [floats for op in self.ops if op.type in _MOVES and (floats := self._floats(op))]
        size = -1
        while size < len(values):
            size = len(values)
            values = values.union(*(floats for floats in moves if floats & values))
        return values

    def _is_narrow(self, name: str) -> bool:
        return (self.tensors[name].quantised_bits or 16) <= 8


def read_qnn_graph(path: Path, model: Path | None = None) -> QnnGraph:
    """Read the JSON of a compiled graph; `model` is the ONNX file that it was compiled from.

    Without `model`, nodes have the compiler's names of operations, and every 8-bit value counts as narrowed.
    Raises VendorError for an unknown format.
    """
    try:
        content = json.loads(path.read_bytes())["graph"]
        tensors = {name: _tensor(name, values) for name, values in content["tensors"].items()}
        raw = {
            name: (str(v["type"]), tuple(v["input_names"]), tuple(v["output_names"]))
            for name, v in content["nodes"].items()
        }
        for name, (_, inputs, outputs) in raw.items():
            if unknown := [t for t in (*inputs, *outputs) if t not in tensors]:
                raise ValueError(f"tensor {unknown[0]!r} of {name!r} is not described")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _not_understood(path, f"{type(error).__name__}: {error}") from error
    nodes, narrow = _onnx_names(model) if model else (set[str](), frozenset[str]())
    readers: dict[str, list[str]] = {}
    writers: dict[str, str] = {}
    for name, (_, inputs, outputs) in raw.items():
        writers |= dict.fromkeys(outputs, name)
        for tensor in inputs:
            readers.setdefault(tensor, []).append(name)

    def neighbours(name: str) -> Iterator[str]:
        """Yield the operations that read this one's outputs, then those that make its inputs."""
        _, inputs, outputs = raw[name]
        yield from (reader for tensor in outputs for reader in readers.get(tensor, ()))
        yield from (writers[tensor] for tensor in inputs if tensor in writers)

    own = {name: origin(name, nodes) if model else re.sub(r"_token_\d+$", "", name) for name in raw}
    return QnnGraph(
        tuple(
            QnnOp(name, kind, _nearest(name, own, neighbours) or name, inputs, outputs)
            for name, (kind, inputs, outputs) in raw.items()
        ),
        tensors,
        narrow,
    )


def check_graph(graph: QnnGraph, precision: str, allow: Sequence[str] = ()) -> None:
    """Raise ExportError that names the operations which do not have `precision` ("float16", "w8a16", ...).

    `allow`: shell wildcards for names of ONNX nodes to accept, such as "up_blocks.3.*".
    """
    if precision == "float16":
        return
    if not graph.is_quantised:
        raise ExportError(
            f"the compiled graph holds no quantised value, {precision} was requested",
            next_step="compile the quantised model",
        )
    faults = {op.node: f"{op.node} ({op.type}) runs in floating point" for op in graph.float_islands}
    faults |= {n.node: f"{n.node} reads {n.tensor} as {n.dtype}" for n in graph.narrowed}
    faults = {node: fault for node, fault in faults.items() if not any(fnmatchcase(node, a) for a in allow)}
    if faults:
        raise ExportError(
            f"the compiled graph is not {precision} throughout:{listed(faults.values())}",
            next_step="choose another graph form, or allow these names in the recipe (npu.allow)",
        )


@dataclass(frozen=True)
class DramBytes:
    """Bytes moved between DRAM and the NPU's own memory in one run."""

    read: int = 0
    written: int = 0

    @property
    def total(self) -> int:
        """Bytes read and written."""
        return self.read + self.written

    def __add__(self, other: DramBytes) -> DramBytes:
        return DramBytes(self.read + other.read, self.written + other.written)


@dataclass(frozen=True)
class Traffic:
    """DRAM traffic of one run as the compiler scheduled it, by module path, without that of children.

    `modules` has "" for operations of no module. `edges` are the graph's inputs and outputs.
    """

    modules: dict[str, DramBytes] = field(default_factory=dict)
    edges: DramBytes = DramBytes()

    @property
    def total(self) -> DramBytes:
        """The sum of all modules and the edges."""
        return sum(self.modules.values(), self.edges)

    def under(self, path: str) -> DramBytes:
        """Return the sum of the module at `path` and of its children."""
        inside = (b for m, b in self.modules.items() if m == path or m.startswith(path + "."))
        return sum(inside, DramBytes())


def read_traffic(path: Path, graph: QnnGraph | None = None) -> Traffic:
    """Sum the DMA transfers in a `*_schematic.bin`, the schedule that profiling_level=optrace writes.

    Only rows with is_dma = 1 move data between DRAM and the NPU; the others count operands in place. With
    `graph`, of the same compilation, operations that the compiler inserted count for the nearest module.
    Raises VendorError for an unknown heading or row.
    """
    rows = _section(path, "bandwidth_information = [", "]")
    transfers: dict[int, DramBytes] = {}
    for row in rows:
        pairs = re.findall(r'"(\w+)"\s*:\s*(\w+)', row)
        if [key for key, _ in pairs] != _TRAFFIC_KEYS:
            raise _not_understood(path, f"a row of bandwidth_information reads {row[:120]!r}")
        try:
            operation, read, written, _, _, is_dma = (int(value, 0) for _, value in pairs)
        except ValueError as error:
            raise _not_understood(path, f"{error} in bandwidth_information") from error
        if is_dma not in (0, 1):
            raise _not_understood(path, f"is_dma is {is_dma}")
        if is_dma:
            key = operation & _LOW_32_BITS
            transfers[key] = transfers.get(key, DramBytes()) + DramBytes(read, written)
    names: dict[int, str] = {}
    for row in _section(path, "qnn_name_translations = {", "}"):
        if (match := re.fullmatch(r"0x([0-9a-f]+): '(.*)',?", row)) is None:
            raise _not_understood(path, f"a row of qnn_name_translations reads {row[:120]!r}")
        names[int(match[1], 16)] = match[2]
    if transfers and not names.keys() & transfers.keys():
        raise _not_understood(path, "no transfer belongs to a named operation")
    modules: dict[str, DramBytes] = {}
    edges = DramBytes()
    for key, moved in transfers.items():
        if key not in names:
            edges += moved
            continue
        node = graph.node_of(names[key]) if graph else None
        module = (node or names[key]).rpartition("/")[0]
        modules[module] = modules.get(module, DramBytes()) + moved
    return Traffic(dict(sorted(modules.items())), edges)


def _section(path: Path, heading: str, end: str) -> Iterator[str]:
    """Yield the lines between `heading` and `end`, read one at a time: the file may have 200 MB."""
    found = False
    inside = False
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in map(str.strip, file):
                if line == heading:
                    if found:
                        raise _not_understood(path, f"{heading!r} occurs twice")
                    found = inside = True
                elif line == end:
                    inside = False
                elif inside:
                    yield line
    except OSError as error:
        raise VendorError(f"the compiler's schedule cannot be read: {error}") from error
    if not found or inside:
        raise _not_understood(path, f"{heading!r} {'has no end' if found else 'is missing'}")


def _tensor(name: str, values: Mapping[str, Any]) -> QnnTensor:
    kind, width = divmod(int(values["data_type"]), 256)
    if kind not in _KINDS or width not in _WIDTHS or values["type"] not in _ROLES:
        raise ValueError(f"{name}: data_type {values['data_type']}, type {values['type']}")
    dtype = f"{_KINDS[kind]}{_WIDTHS[width]}"
    return QnnTensor(name, dtype, tuple(int(d) for d in values["dims"]), _ROLES[values["type"]])


def _onnx_names(path: Path) -> tuple[set[str], frozenset[str]]:
    """Return the names of all nodes, and the names of nodes and values that the file quantises to 8 bits."""
    import onnx_ir as ir

    eight, nodes, narrow = (ir.DataType.INT8, ir.DataType.UINT8), set[str](), set[str]()
    for node in ir.load(path).graph:
        nodes.add(node.name or "")
        zero_point = node.inputs[2] if node.op_type == "QuantizeLinear" and len(node.inputs) > 2 else None
        if zero_point is not None and zero_point.dtype in eight:
            narrow |= {node.name or "", node.outputs[0].name or ""}
    return nodes, frozenset(narrow)


def origin(name: str, known: AbstractSet[str]) -> str | None:
    """Return the longest of the `known` names to which appending "_<text>" gives `name`, if there is one."""
    while name and name not in known:
        name = name.rpartition("_")[0]
    return name or None


def _nearest(
    name: str, own: Mapping[str, str | None], neighbours: Callable[[str], Iterable[str]]
) -> str | None:
    """Return the ONNX node of the operation itself, else of the nearest operation that has one."""
    seen, queue = {name}, [name]
    for current in queue:
        if (node := own[current]) is not None:
            return node
        fresh = [other for other in neighbours(current) if other not in seen]
        seen.update(fresh)
        queue += fresh
    return None


def _not_understood(path: Path, why: str) -> VendorError:
    return VendorError(
        f"{path.name} has an unknown format ({why})",
        next_step="use the onnxruntime-qnn of constraints.txt, or report its version",
    )
