"""Graphs cut into parts: the row of them gives what the whole gives."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from mobilevd_deploy.artifact.artifact import Artifact
from mobilevd_deploy.base.graphs import read_shaped
from mobilevd_deploy.base.tensors import Array
from mobilevd_deploy.errors import ExportError
from mobilevd_deploy.qnn.split import (
    ALLOCATION_LIMIT,
    COMPILER_LIMIT,
    Cut,
    compiler_bytes,
    fewest_parts,
    plan_cut,
    weight_bytes,
    write_parts,
)
from mobilevd_deploy.runtime.runners import OnnxRunner, PartsRunner


def cut_and_run(path: Path, parts: int, feeds: dict[str, Array]) -> tuple[Cut, dict[str, Array]]:
    """Cut, write, run the parts on onnxruntime, and remove them."""
    cut = plan_cut(read_shaped(path), parts)
    files = write_parts(path, cut)
    given = PartsRunner(cut.parts, lambda part: OnnxRunner(files[cut.parts.index(part)])).run(feeds)
    for file in files:
        file.unlink()
    return cut, given


@pytest.fixture(scope="module")
def unet(exported: dict[str, Artifact], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's UNet in float32, in the NPU's forms."""
    folder = tmp_path_factory.mktemp("split") / "unet"
    shutil.copytree(exported["npu-float"].root / "unet", folder)
    return folder / "model.onnx"


def feeds_of(path: Path) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    graph = onnx.load(path, load_external_data=False).graph
    return {
        value.name: rng.standard_normal(
            [d.dim_value for d in value.type.tensor_type.shape.dim], dtype=np.float32
        )
        for value in graph.input
    }


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_the_row_of_parts_gives_what_the_whole_gives(unet: Path, parts: int) -> None:
    feeds = feeds_of(unet)
    expected = OnnxRunner(unet).run(feeds)
    cut, given = cut_and_run(unet, parts, feeds)
    assert len(cut.parts) == parts
    assert len(cut.crossing_bytes) == parts - 1
    assert list(given) == ["latents"]
    np.testing.assert_allclose(given["latents"], expected["latents"], atol=1e-5)


def test_every_node_is_in_a_part_and_work_is_shared_out(unet: Path) -> None:
    model = onnx.shape_inference.infer_shapes(onnx.load(unet, load_external_data=False))
    cut = plan_cut(ir.from_proto(model), 3)
    assert {i for part in cut.parts for i in part.nodes} == set(range(len(model.graph.node)))
    files = write_parts(unet, cut)
    sizes = [weight_bytes(ir.load(file), 4) for file in files]
    assert sum(sizes) < 1.05 * weight_bytes(ir.load(unet), 4)
    computed = [values_of(onnx.load(file, load_external_data=False)) for file in files]
    assert sum(computed) == values_of(model)
    assert max(computed) < 0.45 * sum(computed)
    for file in files:
        file.unlink()
    # What crosses is counted in bytes of float32.
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.value_info}
    borders = [set(cut.parts[0].outputs), set(cut.parts[1].outputs) | (set(cut.parts[2].inputs) - {"noise"})]
    for border, size in zip(borders, cut.crossing_bytes, strict=True):
        names = border - {value.name for value in model.graph.input}
        assert size == 4 * sum(int(np.prod(shapes[name])) for name in names)


def values_of(model: onnx.ModelProto) -> int:
    """How many values a graph computes."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    shapes = {v.name: v.type.tensor_type.shape.dim for v in (*graph.value_info, *graph.output)}
    made = [name for node in graph.node if node.op_type != "Constant" for name in node.output]
    return sum(int(np.prod([d.dim_value for d in shapes[name]])) for name in made)


def chain(weights: int) -> onnx.ModelProto:
    """x -> MatMul -> Tanh -> ... : after each Tanh but one the map is wide."""
    nodes, constants, name = [], [], "x"
    for i in range(weights):
        width = (8, 4 if i == weights // 2 else 64)
        if i and (i - 1) == weights // 2:
            width = (4, 64)
        elif i:
            width = (64, width[1])
        nodes.append(helper.make_node("MatMul", [name, f"w{i}"], [f"m{i}"], f"layer{i}/MatMul"))
        nodes.append(helper.make_node("Tanh", [f"m{i}"], [f"t{i}"], f"layer{i}/Tanh"))
        constants.append(numpy_helper.from_array(np.zeros(width, np.float32), f"w{i}"))
        name = f"t{i}"
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 8))],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)],
        constants,
    )
    return onnx.shape_inference.infer_shapes(helper.make_model(graph))


def test_the_cheapest_place_near_the_middle_is_taken() -> None:
    cut = plan_cut(ir.from_proto(chain(9)), 2)
    assert cut.crossing_bytes == (4 * 4,)
    assert cut.parts[1].inputs in (("t4",), ("m4",))


def test_more_parts_than_places_are_refused() -> None:
    with pytest.raises(ExportError, match="no place for cut 4 of 7"):
        plan_cut(ir.from_proto(chain(2)), 8)


def test_how_many_parts_a_limit_needs() -> None:
    proto = chain(9)
    model = ir.from_proto(proto)
    size = weight_bytes(model, 2)
    assert size == weight_bytes(model, 4) / 2
    assert fewest_parts(model, 2, limit=2 * size) == 1
    assert fewest_parts(model, 4) == 1
    # Three would do, were all of them equal.
    count = fewest_parts(model, 2, limit=size // 2)
    assert count >= 3
    initializers = {tensor.name: tensor for tensor in proto.graph.initializer}
    for part in plan_cut(model, count).parts:
        read = {name for i in part.nodes for name in proto.graph.node[i].input}
        assert sum(2 * int(np.prod(initializers[n].dims)) for n in read if n in initializers) <= 0.45 * size


def test_one_operation_may_take_the_compiler_more_than_wanted() -> None:
    shape = numpy_helper.from_array(np.array([10**9, 8]), "shape")
    axes = numpy_helper.from_array(np.array([0]), "axes")
    graph = helper.make_graph(
        [
            helper.make_node("Expand", ["x", "shape"], ["large"]),
            helper.make_node("Tanh", ["large"], ["t"]),
            helper.make_node("ReduceSum", ["t", "axes"], ["y"]),
        ],
        "large",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 8))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 8))],
        [shape, axes],
    )
    model = ir.from_proto(onnx.shape_inference.infer_shapes(helper.make_model(graph), data_prop=True))
    assert compiler_bytes(model, 2) > 2 * COMPILER_LIMIT
    assert fewest_parts(model, 2) == 2


@pytest.mark.parametrize(("float_bytes", "other"), [(4, 1.0), (2, 1.6)])
def test_what_attention_gives_takes_the_compiler_less(float_bytes: int, other: float) -> None:
    """1e9 values of scores and 1e9 of their softmax; 64e6 of a linear layer, and 64e6 of the answer."""
    tokens, channels = 31_623, 2048
    model = helper.make_model(
        onnx.parser.parse_graph(
            f"""g (float[{tokens},{channels}] x, float[{channels},{tokens}] k)
            => (float[{tokens},{channels}] y) <float[{channels},{channels}] w>
            {{ q = MatMul(x, w)
               s = MatMul(q, k)
               p = Softmax(s)
               y = MatMul(p, x) }}"""
        )
    )
    model.graph.initializer.append(
        TensorProto(name="w", data_type=TensorProto.FLOAT, dims=(channels, channels))
    )
    expected = 0.4e9 + 4.5 * float_bytes * channels**2
    expected += 0.45 * (2 * tokens**2 + tokens * channels) + other * tokens * channels
    shaped = ir.from_proto(onnx.shape_inference.infer_shapes(model))
    assert compiler_bytes(shaped, float_bytes) == pytest.approx(expected)


def test_weights_near_the_limit_count() -> None:
    """A graph of equal layers, but for one whose weights are as much as a chip takes."""
    wide = round(0.6 * ALLOCATION_LIMIT / 4 / 8)
    shapes = [(8, 8)] * 4 + [(8, wide), (wide, 8)] + [(8, 8)] * 4
    names = [f"t{i}" for i in range(len(shapes) + 1)]
    nodes = [
        helper.make_node("MatMul", [x, f"w{i}"], [y]) for i, (x, y) in enumerate(itertools.pairwise(names))
    ]
    empty = [TensorProto(name=f"w{i}", data_type=TensorProto.FLOAT, dims=s) for i, s in enumerate(shapes)]
    ends = [helper.make_tensor_value_info(names[i], TensorProto.FLOAT, (1, 8)) for i in (0, -1)]
    graph = helper.make_graph(nodes, "wide", ends[:1], ends[1:], empty)
    model = ir.from_proto(onnx.shape_inference.infer_shapes(helper.make_model(graph)))
    assert fewest_parts(model, 4) == 2


def test_what_a_constant_node_gives_does_not_cross() -> None:
    """The compiler takes no constant for an input; both sides hold it."""
    constant = numpy_helper.from_array(np.ones(8, np.float32))
    weights = [numpy_helper.from_array(np.eye(8, dtype=np.float32), f"w{i}") for i in range(2)]
    graph = helper.make_graph(
        [
            helper.make_node("Constant", [], ["one"], value=constant),
            helper.make_node("MatMul", ["x", "w0"], ["m0"]),
            helper.make_node("Add", ["m0", "one"], ["t0"]),
            helper.make_node("MatMul", ["t0", "w1"], ["m1"]),
            helper.make_node("Add", ["m1", "one"], ["y"]),
        ],
        "shared constant",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 8))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 8))],
        weights,
    )
    model = ir.from_proto(onnx.shape_inference.infer_shapes(helper.make_model(graph)))
    first, last = plan_cut(model, 2).parts
    assert len(first.outputs) == 1
    assert last.inputs == first.outputs
    assert 0 in last.nodes
