"""What the compiler made: float islands, narrowed values, names, DRAM traffic. With small QDQ graphs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mobilevd_deploy.errors import ExportError, VendorError
from mobilevd_deploy.qnn.compiled import (
    DramBytes,
    Narrowed,
    QnnGraph,
    check_graph,
    origin,
    read_qnn_graph,
    read_traffic,
)


class Qdq:
    """Writes a quantised graph: 16-bit activations unless told otherwise, int8 weights per channel."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.values: list[onnx.ValueInfoProto] = []
        self.rng = np.random.default_rng(0)
        self.scales: dict[str, float] = {}

    def op(self, kind: str, inputs: list[str], module: str, **attributes: Any) -> str:
        """Add an operation with the name <module>/<kind>, and return its output."""
        output = f"{module}.out"
        self.nodes.append(helper.make_node(kind, inputs, [output], name=f"{module}/{kind}", **attributes))
        return output

    def quantised(
        self, value: str, scale: float = 2**-12, zero: int = 32768, dtype: type = np.uint16, output: str = ""
    ) -> str:
        """Put a Quantize and a Dequantize behind `value`."""
        name = f"{value}.{np.dtype(dtype)}"
        arguments = [
            self.constant(f"{name}.scale", np.float32(scale)),
            self.constant(f"{name}.zero", dtype(zero)),
        ]
        output = output or f"{name}.dq"
        self.nodes += [
            helper.make_node("QuantizeLinear", [value, *arguments], [f"{name}.q"], name=f"{name}/Q"),
            helper.make_node("DequantizeLinear", [f"{name}.q", *arguments], [output], name=f"{name}/DQ"),
        ]
        self.scales[output] = scale
        return output

    def conv(self, value: str, module: str) -> str:
        """Add a 3x3 convolution of 16 channels."""
        weight = self.rng.normal(size=(16, 16, 3, 3)).astype(np.float32) / 12
        scale = (np.abs(weight).max(axis=(1, 2, 3)) / 127).astype(np.float32)
        rounded = np.round(weight / scale[:, None, None, None]).astype(np.int8)
        bias_scale = (scale * self.scales[value]).astype(np.float32)
        bias = np.round(self.rng.normal(size=16) / bias_scale).astype(np.int32)
        weights = [
            self.dequantised(f"{module}.weight", rounded, scale),
            self.dequantised(f"{module}.bias", bias, bias_scale),
        ]
        return self.op("Conv", [value, *weights], module, pads=[1, 1, 1, 1])

    def dequantised(self, name: str, value: np.ndarray, scale: np.ndarray) -> str:
        zero = np.zeros(len(scale), value.dtype)
        arguments = [
            self.constant(f"{name}.{suffix}", array)
            for suffix, array in {"q": value, "scale": scale, "zero": zero}.items()
        ]
        self.nodes.append(helper.make_node("DequantizeLinear", arguments, [name], name=f"{name}/DQ", axis=0))
        return name

    def constant(self, name: str, value: np.ndarray | np.generic) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def save(self, path: Path, inputs: dict[str, list[int]], outputs: dict[str, list[int]]) -> Path:
        def described(shapes: dict[str, list[int]]) -> list[onnx.ValueInfoProto]:
            return [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()]

        graph = helper.make_graph(
            self.nodes,
            "graph",
            described(inputs),
            described(outputs),
            self.constants,
            value_info=self.values,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        onnx.checker.check_model(model)
        onnx.save(model, path)
        return path


MAP = [1, 16, 16, 16]


def write_convs(path: Path) -> Path:
    """Conv, ReLU, conv: nothing to object to."""
    net = Qdq()
    x = net.quantised(net.conv(net.quantised("x"), "block.conv1"))
    x = net.quantised(net.op("Relu", [x], "block.act"), zero=0)
    net.quantised(net.conv(x, "block.conv2"), output="y")
    return net.save(path, {"x": MAP}, {"y": MAP})


def write_norm(path: Path) -> Path:
    """A group norm between two convolutions, which the compiler runs in float32."""
    net = Qdq()
    x = net.quantised(net.conv(net.quantised("x"), "block.conv1"))
    affine = [net.constant("scale", np.ones(16, np.float32)), net.constant("shift", np.zeros(16, np.float32))]
    x = net.op("GroupNormalization", [x, *affine], "block.norm", num_groups=4)
    net.values.append(helper.make_tensor_value_info(x, TensorProto.FLOAT, MAP))
    net.quantised(net.conv(net.quantised(x), "block.conv2"), output="y")
    return net.save(path, {"x": MAP}, {"y": MAP})


def write_softmax(path: Path) -> Path:
    """A softmax and a sum without quantisers around them."""
    net = Qdq()
    x = net.quantised(net.conv(net.quantised("x"), "block.conv1"))
    x = net.op("Add", [net.op("Softmax", [x], "block.softmax"), x], "block.add")
    net.quantised(net.conv(net.quantised(x), "block.conv2"), output="y")
    return net.save(path, {"x": MAP}, {"y": MAP})


def write_matmul(path: Path, *, relabelled: bool) -> Path:
    """A product of two values; a second operand in uint16 is narrowed, one in int16 is not."""
    net = Qdq()
    second = net.quantised("b")
    if relabelled:
        second = net.quantised(second, zero=0, dtype=np.int16)
    product = net.op("MatMul", [net.quantised("a"), second], "attn.scores")
    net.quantised(product, scale=1e-3, output="y")
    return net.save(path, {"a": [1, 2, 32, 16], "b": [1, 2, 16, 32]}, {"y": [1, 2, 32, 32]})


def write_eight_bit_layer(path: Path) -> Path:
    """One convolution between two has 8-bit activations, because somebody asked for that."""
    net = Qdq()
    x = net.quantised(net.conv(net.quantised("x"), "block.conv1"))
    x = net.quantised(x, scale=2**-4, zero=128, dtype=np.uint8)
    x = net.quantised(net.conv(x, "block.conv2"), scale=2**-4, zero=128, dtype=np.uint8)
    net.quantised(net.conv(net.quantised(x), "block.conv3"), output="y")
    return net.save(path, {"x": MAP}, {"y": MAP})


def compiled(model: Path) -> QnnGraph:
    from mobilevd_deploy.config.recipe import NpuOptions
    from mobilevd_deploy.qnn.compiler import compile_context
    from mobilevd_deploy.qnn.targets import find_target

    target = find_target("SM8650")
    return compile_context(model, model.parent, target, NpuOptions(), float16=False).graph


# ---- graphs that were really compiled ----


@pytest.mark.npu
def test_a_graph_of_integers_passes(tmp_path):
    graph = compiled(write_convs(tmp_path / "m.onnx"))
    assert graph.is_quantised
    assert graph.float_islands == graph.narrowed == ()
    nodes = {op.type: op.node for op in graph.ops if op.type in ("Conv2d", "Relu")}
    assert nodes == {"Conv2d": "block.conv2/Conv", "Relu": "block.act/Relu"}
    assert {t.name: t.dtype for t in graph.tensors.values() if t.role in ("input", "output")} == {
        "x": "float32",
        "y": "float32",
    }
    check_graph(graph, "w8a16")


@pytest.mark.npu
def test_every_operation_is_traced_to_a_node(tmp_path):
    model = write_norm(tmp_path / "m.onnx")
    names = {node.name for node in onnx.load(model).graph.node}
    graph = compiled(model)
    inserted = [op for op in graph.ops if origin(op.name, names) is None]
    assert inserted  # the compiler put in transposes of its own
    assert {op.node for op in graph.ops} <= names


@pytest.mark.npu
@pytest.mark.parametrize(
    ("write", "nodes"),
    [
        (write_norm, {"block.norm/GroupNormalization": "GroupNorm"}),
        (write_softmax, {"block.softmax/Softmax": "Softmax", "block.add/Add": "ElementWiseAdd"}),
    ],
)
def test_float_islands_are_named(tmp_path, write, nodes):
    graph = compiled(write(tmp_path / "m.onnx"))
    assert {op.node: op.type for op in graph.float_islands} == nodes
    with pytest.raises(ExportError) as caught:
        check_graph(graph, "w8a16")
    assert all(node in caught.value.what for node in nodes)
    with pytest.raises(ExportError):
        check_graph(graph, "w8a16", ["another.*"])
    check_graph(graph, "w8a16", ["block.*"])
    check_graph(graph, "float16")


@pytest.mark.npu
def test_narrowed_operand_is_named(tmp_path):
    graph = compiled(write_matmul(tmp_path / "m.onnx", relabelled=False))
    (narrowed,) = graph.narrowed
    assert (narrowed.dtype, narrowed.node) == ("ufixed8", "attn.scores/MatMul")
    for precision in ("w8a16", "w8a8"):  # a rule keeps 16 bits within an 8-bit scheme too
        with pytest.raises(ExportError, match=r"attn\.scores/MatMul reads .* as ufixed8"):
            check_graph(graph, precision)
        check_graph(graph, precision, ["attn.scores/*"])


@pytest.mark.npu
def test_relabelled_operand_keeps_its_width(tmp_path):
    graph = compiled(write_matmul(tmp_path / "m.onnx", relabelled=True))
    assert graph.narrowed == graph.float_islands == ()


@pytest.mark.npu
def test_eight_bits_by_design_are_not_narrowed(tmp_path):
    graph = compiled(write_eight_bit_layer(tmp_path / "m.onnx"))
    assert any(tensor.quantised_bits == 8 for tensor in graph.tensors.values())
    assert graph.narrowed == graph.float_islands == ()


# ---- the format ----


def tensor(dtype: int, role: int = 3) -> dict[str, Any]:
    return {"data_type": dtype, "dims": [1, 4], "type": role}


def node(kind: str, inputs: list[str], outputs: list[str]) -> dict[str, Any]:
    return {"type": kind, "input_names": inputs, "output_names": outputs}


def written(folder: Path, nodes: dict[str, Any], tensors: dict[str, Any]) -> Path:
    path = folder / "graph.json"
    path.write_text(json.dumps({"graph": {"nodes": nodes, "tensors": tensors}}))
    return path


F32, U16, U8, I8 = 0x232, 0x416, 0x408, 0x308
EDGES = {"x": tensor(F32, 0), "y": tensor(F32, 1)}


def test_moves_at_the_edges_are_no_island(tmp_path):
    nodes = {
        "in": node("Transpose", ["x"], ["xt"]),
        "q": node("Quantize", ["xt"], ["q"]),
        "relu": node("Relu", ["q"], ["r"]),
        "dq": node("Dequantize", ["r"], ["rt"]),
        "out": node("Reshape", ["rt"], ["y"]),
    }
    tensors = EDGES | {"xt": tensor(F32), "rt": tensor(F32), "q": tensor(U16), "r": tensor(U16)}
    assert read_qnn_graph(written(tmp_path, nodes, tensors)).float_islands == ()


def test_computing_with_a_float_input_is_an_island(tmp_path):
    nodes = {"relu": node("Relu", ["x"], ["r"]), "q": node("Quantize", ["r"], ["q"])}
    nodes["dq"] = node("Dequantize", ["q"], ["y"])
    graph = read_qnn_graph(written(tmp_path, nodes, EDGES | {"r": tensor(F32), "q": tensor(U16)}))
    assert [op.name for op in graph.float_islands] == ["relu"]


def test_floats_between_quantisers_are_an_island_even_if_nothing_is_computed(tmp_path):
    nodes = {
        "q": node("Quantize", ["x"], ["q"]),
        "dq": node("Dequantize", ["q"], ["f"]),
        "q2": node("Quantize", ["f"], ["g"]),
        "dq2": node("Dequantize", ["g"], ["y"]),
    }
    tensors = EDGES | {"q": tensor(U16), "f": tensor(F32), "g": tensor(U16)}
    graph = read_qnn_graph(written(tmp_path, nodes, tensors))
    assert [op.name for op in graph.float_islands] == ["dq", "q2"]


def test_weights_of_eight_bits_and_what_follows_from_a_narrowed_value_are_not_named(tmp_path):
    nodes = {
        "q": node("Quantize", ["x"], ["q"]),
        "conv_token_3": node("Conv2d", ["q", "w"], ["c"]),
        "cv": node("Convert", ["c"], ["n"]),
        "t": node("Transpose", ["n"], ["nt"]),
        "mm_token_4": node("MatMul", ["c", "nt"], ["m"]),
        "dq": node("Dequantize", ["m"], ["y"]),
    }
    tensors = EDGES | dict.fromkeys("qcm", tensor(U16)) | {"w": tensor(I8, 4)}
    graph = read_qnn_graph(written(tmp_path, nodes, tensors | {"n": tensor(U8), "nt": tensor(U8)}))
    assert graph.narrowed == (Narrowed("n", "ufixed8", "t"),)
    assert graph.node_of("mm_token_4") == "mm"  # without a model, the compiler's counter is cut off
    assert graph.node_of("nobody") is None


def test_a_float_graph_is_not_what_a_quantised_one_should_be(tmp_path):
    graph = read_qnn_graph(written(tmp_path, {"relu": node("Relu", ["x"], ["y"])}, EDGES))
    assert graph.float_islands == ()
    check_graph(graph, "float16")
    with pytest.raises(ExportError, match="no quantised value"):
        check_graph(graph, "w8a16")


def test_many_faults_are_counted(tmp_path):
    nodes = {f"n{i}": node("Relu", ["x"], [f"f{i}"]) for i in range(11)}
    tensors = EDGES | {f"f{i}": tensor(F32) for i in range(11)} | {"q": tensor(U16)}
    with pytest.raises(ExportError, match="and 3 more"):
        check_graph(read_qnn_graph(written(tmp_path, nodes, tensors)), "w8a16")


@pytest.mark.parametrize(
    ("nodes", "tensors", "why"),
    [
        ({}, {"x": tensor(0x999)}, "data_type 2457"),
        ({}, {"x": tensor(F32, 9)}, "type 9"),
        ({}, {"x": {"dims": [1], "type": 0}}, "data_type"),
        ({"relu": node("Relu", ["x"], ["y"])}, {"x": tensor(F32, 0)}, "'y' of 'relu'"),
        ({"relu": {"type": "Relu", "inputs": []}}, EDGES, "input_names"),
        ([], EDGES, "items"),
    ],
)
def test_unknown_format_is_refused(tmp_path, nodes, tensors, why):
    with pytest.raises(VendorError, match=why):
        read_qnn_graph(written(tmp_path, nodes, tensors))


@pytest.mark.parametrize("text", ["", "{}", "[]", "{'graph'"])
def test_unreadable_graph_is_refused(tmp_path, text):
    (tmp_path / "graph.json").write_text(text)
    with pytest.raises(VendorError, match=r"graph\.json"):
        read_qnn_graph(tmp_path / "graph.json")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.conv/Conv", "a.conv/Conv"),
        ("a.conv/Conv_token_17", "a.conv/Conv"),
        ("a.conv/Conv_2_token_17", "a.conv/Conv_2"),
        ("Transpose_token_3", None),
        ("a.conv/Convolution", None),
    ],
)
def test_origin(name, expected):
    assert origin(name, {"a.conv/Conv", "a.conv/Conv_2"}) == expected


# ---- the schedule ----

ROW = (
    '{{"opid" : 0x0000407e000000{0:02x} , "dram_read": {1} , "dram_write": {2} , '
    '"vtcm_read": 7 , "vtcm_write": 7, "is_dma": {3}}},'
)
SCHEDULE = "\n".join(
    [
        "\x00\x01 something binary",
        "concrete_ops = {",
        "}",
        "bandwidth_information = [",
        ROW.format(0x10, 100, 0, 1),
        ROW.format(0x10, 1000, 50, 1),
        ROW.format(0x10, 10**9, 10**9, 0),
        ROW.format(0x11, 5, 6, 1),
        ROW.format(0x12, 0, 3, 1),
        ROW.format(0x02, 20, 0, 1),
        "]",
        "qnn_name_translations = {",
        "0x0000000000000010: 'a.conv/Conv_token_1',",
        "0x0000000000000011: 'a.conv.inner/Relu',",
        "0x0000000000000012: 'Transpose_token_5',",
        "}",
        'qnn_graph_name = "g"',
    ]
)


def schedule(folder: Path, text: str = SCHEDULE) -> Path:
    path = folder / "g_schematic.bin"
    path.write_text(text)
    return path


def test_traffic_is_summed_by_module(tmp_path):
    traffic = read_traffic(schedule(tmp_path))
    assert traffic.modules == {
        "": DramBytes(0, 3),
        "a.conv": DramBytes(1100, 50),
        "a.conv.inner": DramBytes(5, 6),
    }
    assert traffic.edges == DramBytes(20, 0)
    assert traffic.total == DramBytes(1125, 59)
    assert traffic.total.total == 1184
    assert traffic.under("a.conv") == DramBytes(1105, 56)
    assert traffic.under("a") == traffic.under("a.conv")
    assert traffic.under("a.co") == DramBytes()


def test_what_the_compiler_put_in_counts_for_whom_it_serves(tmp_path):
    nodes = {
        "Transpose_token_5": node("Transpose", ["x"], ["t"]),
        "a.conv/Conv_token_1": node("Conv2d", ["t"], ["y"]),
    }
    model = helper.make_model(
        helper.make_graph([helper.make_node("Conv", ["x", "w"], ["y"], name="a.conv/Conv")], "g", [], [])
    )
    onnx.save(model, tmp_path / "m.onnx")
    graph_json = written(tmp_path, nodes, EDGES | {"t": tensor(F32)})
    traffic = read_traffic(schedule(tmp_path), read_qnn_graph(graph_json, tmp_path / "m.onnx"))
    assert traffic.modules == {"a.conv": DramBytes(1100, 53), "a.conv.inner": DramBytes(5, 6)}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("bandwidth_information", "bandwidth_info"),
        ("bandwidth_information = [", "bandwidth_information = {"),
        ("qnn_name_translations", "name_translations"),
        ('"dram_read"', '"ddr_read"'),
        ('"is_dma"', '"kind"'),
        ('"is_dma": 1', '"is_dma": 2'),
        ('"is_dma": 1', '"is_dma": yes'),
        ('"dram_read": 100 ,', '"dram_read": 100 , "dram_write": 1 ,'),
        ('"dram_read": 100 , "dram_write": 0', '"dram_write": 0 , "dram_read": 100'),
        ("0x0000000000000010: 'a.conv", "16: 'a.conv"),
        ("\n]\n", "\n"),
        ('}\nqnn_graph_name = "g"', ""),
        ("0x00000000000000", "0x00000001000000"),
        ("concrete_ops = {\n}", "bandwidth_information = [\n]"),
    ],
)
def test_unknown_schedule_is_an_error_and_not_a_number(tmp_path, old, new):
    assert old in SCHEDULE
    with pytest.raises(VendorError, match=r"has an unknown format"):
        read_traffic(schedule(tmp_path, SCHEDULE.replace(old, new)))


def test_missing_schedule(tmp_path):
    with pytest.raises(VendorError, match="cannot be read"):
        read_traffic(tmp_path / "none.bin")
