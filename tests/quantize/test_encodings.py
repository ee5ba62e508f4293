"""AIMET's encodings out of a quantised graph: put back, they give the same outputs; AIMET writes the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

from mobilevd_deploy.config.recipe import QuantScheme
from mobilevd_deploy.errors import ExportError
from mobilevd_deploy.npu import ops
from mobilevd_deploy.quantize.encodings import write_encodings
from mobilevd_deploy.quantize.simulation import quantise

pytestmark = pytest.mark.npu


class Network(nn.Module):
    """Convolutions, and a product of two activations, whose second operand is relabelled."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(8, width, 1, 1, generator=generator) / 4 for width in (3, 8)]
        self.first, self.last = (ops.conv2d(w, torch.full((8,), 0.1)) for w in weights)
        self.product, self.act = ops.MatMul(), nn.ReLU()

    def forward(self, x):
        y = self.act(self.first(x))
        return self.last(self.product(y, y.transpose(-1, -2)))


def sample(seed):
    return {"x": np.random.default_rng(seed).uniform(-1, 1, (1, 3, 6, 6)).astype(np.float32)}


@pytest.fixture(scope="module")
def quantised():
    return quantise(Network(), map(sample, range(3)), QuantScheme())


@pytest.fixture(scope="module")
def graph(quantised, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantised")
    quantised.export(folder, sample(0), ["y"])
    return folder / "model.onnx"


def run(model, seed):
    options = onnxruntime.SessionOptions()
    # As written: fused kernels round elsewhere.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model, options).run(["y"], sample(seed))[0]


def put_back(path: Path, encodings: dict) -> onnx.ModelProto:
    """Quantise every tensor that has an activation encoding, by the format's own words."""
    model = onnx.load(path)
    for entry in encodings["activation_encodings"]:
        name, (scale,), (offset,) = entry["name"], entry["scale"], entry["offset"]
        dtype = {8: np.uint8, 16: np.uint16}[entry["bw"]]
        for suffix, value in (("scale", np.float32(scale)), ("zero", dtype(-offset))):
            model.graph.initializer.append(numpy_helper.from_array(np.array(value), f"{name}.{suffix}"))
        is_output = name in [value.name for value in model.graph.output]
        inside, after = (f"{name}.in", name) if is_output else (name, f"{name}.after")
        for node in model.graph.node:
            node.input[:] = [after if n == name else n for n in node.input]
            node.output[:] = [inside if n == name else n for n in node.output]
        grid = [f"{name}.scale", f"{name}.zero"]
        pair = [
            helper.make_node("QuantizeLinear", [inside, *grid], [f"{name}.q"]),
            helper.make_node("DequantizeLinear", [f"{name}.q", *grid], [after]),
        ]
        at = next((i + 1 for i, node in enumerate(model.graph.node) if inside in node.output), 0)
        nodes = list(model.graph.node)
        del model.graph.node[:]
        model.graph.node.extend([*nodes[:at], *pair, *nodes[at:]])
    return model


def test_put_back_they_give_what_the_quantised_graph_gives(graph, tmp_path):
    plain, *others = write_encodings(graph, tmp_path)
    assert [path.name for path in (plain, *others)] == ["model.onnx", "model.encodings"]
    assert {node.op_type for node in onnx.load(plain).graph.node}.isdisjoint(
        {"QuantizeLinear", "DequantizeLinear"}
    )
    encodings = json.loads(others[-1].read_text())
    again = put_back(plain, encodings)
    onnx.checker.check_model(again)
    for seed in range(5):
        assert np.array_equal(run(graph, seed), run(again.SerializeToString(), seed))
    # Without them it is another function.
    assert not np.array_equal(run(plain, 0), run(graph, 0))


def test_aimet_writes_the_same_grids(quantised, graph, tmp_path):
    quantised.sim.onnx.export(
        (torch.from_numpy(sample(0)["x"]),),
        str(tmp_path / "aimet.onnx"),
        input_names=["x"],
        output_names=["y"],
        dynamo=True,
        encoding_version="1.0.0",
    )
    theirs = json.loads((tmp_path / "aimet.encodings").read_text())
    ours = json.loads(write_encodings(graph, tmp_path)[-1].read_text())
    assert ours["version"] == theirs["version"]

    def grids(entries):
        return sorted(
            (e["bw"], e["enc_type"], tuple(np.float32(e["scale"])), tuple(e["offset"])) for e in entries
        )

    assert grids(ours["param_encodings"]) == grids(theirs["param_encodings"])
    assert grids(ours["activation_encodings"]) == grids(theirs["activation_encodings"])


def test_a_tensor_with_two_ranges_is_refused(graph, tmp_path):
    model = onnx.load(graph)
    scales = {t.name: t for t in model.graph.initializer}
    pair = next(n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] not in scales)
    model.graph.initializer.append(numpy_helper.from_array(np.float32(7.0), "other"))
    copies = [onnx.NodeProto.FromString(n.SerializeToString()) for n in model.graph.node]
    quantise_node = next(n for n in copies if n.output[0] == pair.input[0])
    again = onnx.NodeProto.FromString(pair.SerializeToString())
    for node, output in ((quantise_node, "q2"), (again, "dq2")):
        node.input[1], node.output[0], node.name = "other", output, output
    again.input[0] = "q2"
    model.graph.node.extend([quantise_node, again])
    onnx.save(model, tmp_path / "two.onnx")
    with pytest.raises(ExportError, match="read with two ranges"):
        write_encodings(tmp_path / "two.onnx", tmp_path)
