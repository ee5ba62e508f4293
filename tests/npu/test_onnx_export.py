"""The exporter on small modules and on whole components, and graphs that must be refused."""

from __future__ import annotations

import dataclasses
import math
import re
import shutil
import subprocess
import time
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import onnxsim
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from mobilevd_deploy.artifact.artifact import Artifact
from mobilevd_deploy.base.processes import own_python
from mobilevd_deploy.config.recipe import GraphForms, OnnxOptions, load_recipe
from mobilevd_deploy.errors import ExportError
from mobilevd_deploy.model.checkpoint import open_checkpoint
from mobilevd_deploy.model.flops import count_flops
from mobilevd_deploy.model.interface import COMPONENTS, input_shapes
from mobilevd_deploy.npu import onnx_export
from mobilevd_deploy.npu.build import build_npu
from mobilevd_deploy.npu.onnx_export import DATA, MODEL, export_onnx, read_graph
from mobilevd_deploy.npu.ops import Add, SelfAttention
from mobilevd_deploy.passes.runner import select_passes
from tests.support.networks import decibels

RECIPES = ("onnx", "npu-float")
OPTIONS = OnnxOptions()
INPUTS = {
    "image": np.random.default_rng(0).normal(size=(2, 3, 6, 10)).astype(np.float32),
    "shift": np.random.default_rng(1).normal(size=(1, 8)).astype(np.float32),
}


class Little(nn.Module):
    """A convolution, a norm and linear layers on tokens of rank 3: what fusions like to rebuild."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 32, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))
        self.norm = nn.GroupNorm(32, 32)
        self.add, self.shift = Add(), nn.Linear(8, 32)
        weights = [(torch.randn(32, 32) / 6, torch.randn(32)) for _ in range(4)]
        self.attention = SelfAttention(weights, 4, 0.35, "space", 15, GraphForms())

    def forward(self, image: Tensor, shift: Tensor) -> Tensor:
        tokens = self.norm(self.conv(image)).flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = block(tokens)
        return self.add(self.attention(tokens), self.shift(shift)[:, None, :])


@pytest.fixture(scope="module")
def little() -> nn.Module:
    return Little().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def written(little: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("little")
    assert export_onnx(little, INPUTS, ["tokens"], folder, OPTIONS) == ()
    return folder


def outputs(path: Path) -> np.ndarray:
    return onnxruntime.InferenceSession(path).run(None, INPUTS)[0]


def reference(module: nn.Module) -> Tensor:
    return module(*(torch.from_numpy(value) for value in INPUTS.values()))


# ---- what is written ----


def test_file_is_the_module(written: Path, little: nn.Module) -> None:
    model = onnx.load(written / MODEL)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 21)]
    assert model.ir_version <= 10
    assert [value.name for value in model.graph.input] == ["image", "shift"]
    assert [value.name for value in model.graph.output] == ["tokens"]
    assert not model.functions
    assert decibels(reference(little), torch.from_numpy(outputs(written / MODEL))) > 110


def test_graph_is_counted_from_the_file(written: Path, little: nn.Module) -> None:
    graph = read_graph(written / MODEL)
    tensors = [torch.from_numpy(value) for value in INPUTS.values()]
    assert graph.flops == count_flops(little, *tensors)
    weights = sum(p.numel() for p in little.parameters())
    assert weights <= graph.parameters <= weights + 8
    ops = Counter(node.op_type for node in onnx.load(written / MODEL, load_external_data=False).graph.node)
    assert graph.ops == ops
    assert list(graph.ops) == sorted(graph.ops)


def test_layers_stay_as_they_were_written(written: Path) -> None:
    ops = read_graph(written / MODEL).ops
    # Seven linear layers, one of them on a matrix; two products of attention.
    assert ops["MatMul"] + ops.get("Gemm", 0) == 2 + 4 + 1 + 2
    assert ops.get("Gemm", 0) <= 1
    # flatten, and one per projection and one for the merge; a Gemm on tokens would bring two more each.
    assert ops["Reshape"] <= 6


def test_weights_lie_outside_where_the_model_says(written: Path) -> None:
    model = onnx.load(written / MODEL, load_external_data=False)
    places = {e.value for i in model.graph.initializer for e in i.external_data if e.key == "location"}
    assert places == {DATA}
    assert sorted(path.name for path in written.iterdir()) == [MODEL, DATA]
    large = [i.name for i in model.graph.initializer if math.prod(i.dims) * 4 > 1024 and not i.external_data]
    assert not large


def test_weights_are_as_readable_as_the_model(written: Path) -> None:
    assert (written / DATA).stat().st_mode == (written / MODEL).stat().st_mode


def test_a_second_export_replaces_the_first(
    written: Path, little: nn.Module, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # onnx appends to a data file that is there: an interrupted stage would leave its weights in it.
    (tmp_path / MODEL).write_bytes(b"half a model")
    (tmp_path / DATA).write_bytes(b"left over" * 100_000)
    export_onnx(little, INPUTS, ["tokens"], tmp_path, OPTIONS)
    assert (tmp_path / DATA).stat().st_size == (written / DATA).stat().st_size
    assert np.array_equal(outputs(tmp_path / MODEL), outputs(written / MODEL))
    assert capfd.readouterr() == ("", ""), "the exporters' chatter belongs nowhere"


@pytest.mark.parametrize("opset", [18, 23])
def test_oldest_and_newest_opset(opset: int, little: nn.Module, tmp_path: Path) -> None:
    export_onnx(little, INPUTS, ["tokens"], tmp_path, OnnxOptions(opset=opset))
    model = onnx.load(tmp_path / MODEL)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", opset)]
    assert model.ir_version <= 10
    read_graph(tmp_path / MODEL)
    assert decibels(reference(little), torch.from_numpy(outputs(tmp_path / MODEL))) > 110


# ---- simplification ----


def test_without_simplification(little: nn.Module, written: Path, tmp_path: Path) -> None:
    assert export_onnx(little, INPUTS, ["tokens"], tmp_path, OnnxOptions(simplify=False)) == ()
    graph = read_graph(tmp_path / MODEL)
    assert graph.flops == read_graph(written / MODEL).flops
    assert decibels(reference(little), torch.from_numpy(outputs(tmp_path / MODEL))) > 110


@pytest.mark.slow
def test_simplification_holds_few_copies_of_the_weights(tmp_path: Path) -> None:
    """Measured: 2.2 times their size; 5.8 times when onnxsim gets a model in memory."""
    side, layers = 2048, 8
    weights = {f"w{i}": np.full((side, side), i + 1, np.float32) for i in range(layers)}
    nodes = [helper.make_node("Identity", ["x"], ["y0"])]
    nodes += [helper.make_node("MatMul", [f"y{i}", f"w{i}"], [f"y{i + 1}"]) for i in range(layers)]
    shapes = {"x": (1, side)}, {f"y{layers}": (1, side)}
    model = onnx.load(write_graph(tmp_path / MODEL, nodes, *shapes, weights))
    onnx.save(model, tmp_path / MODEL, save_as_external_data=True, location=DATA)
    code = """
import pathlib
import onnxsim
from mobilevd_deploy.base.processes import peak_bytes, reset_peak
from mobilevd_deploy.npu import onnx_export
reset_peak()
before = peak_bytes()
assert onnx_export._simplify(pathlib.Path(onnx_export.MODEL)) == ()
print(peak_bytes() - before)
"""
    child = subprocess.run(own_python(code), cwd=tmp_path, capture_output=True, check=True)
    assert int(child.stdout) < 3 * layers * 4 * side**2

    assert sorted(path.name for path in tmp_path.iterdir()) == [MODEL, DATA]
    simplified = onnx.load(tmp_path / MODEL)
    assert [node.op_type for node in simplified.graph.node] == ["MatMul"] * layers
    assert len(simplified.graph.initializer) == layers
    for tensor in simplified.graph.initializer:
        assert np.array_equal(numpy_helper.to_array(tensor), weights[tensor.name])


def test_a_failing_onnxsim_leaves_the_export(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("The model does not have an ir_version set properly.")

    monkeypatch.setattr(onnxsim, "simplify", fail)
    shutil.copytree(written, tmp_path / "part")
    before = {path.name: path.read_bytes() for path in (tmp_path / "part").iterdir()}
    (note,) = onnx_export._simplify(tmp_path / "part" / MODEL)
    assert {path.name: path.read_bytes() for path in (tmp_path / "part").iterdir()} == before
    assert "onnxsim failed on it: The model does not" in note


# ---- modules that cannot be exported ----


class DependsOnData(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return image if float(image.sum()) > 0 else -image


class HoldsSomethingAlive(nn.Module):
    """Neither picklable nor traceable: it waits on a clock."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = lambda: time.monotonic()

    def forward(self, image: Tensor) -> Tensor:
        raise ValueError(f"it is {self.clock() > 0}")


@pytest.mark.parametrize("module", [DependsOnData, HoldsSomethingAlive])
def test_a_module_that_cannot_be_exported(module: type[nn.Module], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=f"could not export {module.__name__}") as raised:
        export_onnx(module(), {"image": INPUTS["image"]}, ["map"], tmp_path, OPTIONS)
    assert raised.value.next_step


def test_a_full_disk_is_not_the_graphs_fault(
    little: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx_ir, "save", full)
    with pytest.raises(OSError, match="No space left"):
        export_onnx(little.conv, {"image": INPUTS["image"]}, ["map"], tmp_path, OPTIONS)


# ---- refused graphs, made by hand ----


def write_graph(
    path: Path,
    nodes: list[onnx.NodeProto],
    inputs: dict[str, tuple[object, ...]],
    outputs: dict[str, tuple[object, ...]],
    weights: dict[str, np.ndarray] | None = None,
    dtype: int = TensorProto.FLOAT,
) -> Path:
    graph = helper.make_graph(
        nodes,
        "made by hand",
        [helper.make_tensor_value_info(name, dtype, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, dtype, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in (weights or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def node(kind: str, inputs: list[str], outputs: list[str], **attributes: object) -> onnx.NodeProto:
    return helper.make_node(kind, inputs, outputs, name=f"here/{kind}", **attributes)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "graph.onnx"


def test_a_plain_graph_is_counted(path: Path) -> None:
    weights = {
        "w": np.ones((8, 2, 3, 3), np.float32),  # four channels in two groups
        "m": np.ones((5, 7), np.float32),
        "rows": np.array([8, 5]),
        "g": np.ones((8, 6), np.float32),
    }
    nodes = [
        node("Conv", ["x", "w"], ["map"], group=2, strides=[2, 1]),
        node("MatMul", ["map", "m"], ["tokens"]),
        node("ReduceMean", ["tokens"], ["mean"], keepdims=1),
        node("Reshape", ["e", "rows"], ["table"]),
        node("Gemm", ["table", "g"], ["square"], transA=1),
        node("MatMul", ["square", "one"], ["column"]),
        node("Mul", ["mean", "column"], ["y"]),
    ]
    weights["one"] = np.ones((6, 1), np.float32)
    write_graph(path, nodes, {"x": (1, 4, 9, 7), "e": (1, 40)}, {"y": (1, 1, 5, 1)}, weights)
    graph = read_graph(path)
    convolution = 2 * (8 * 4 * 5) * (2 * 3 * 3)
    assert graph.flops == convolution + 2 * (8 * 4 * 7) * 5 + 2 * (5 * 6) * 8 + 2 * 5 * 6
    assert graph.parameters == 144 + 35 + 48 + 6  # the Reshape's integers are none
    assert graph.ops == {"Conv": 1, "Gemm": 1, "MatMul": 2, "Mul": 1, "ReduceMean": 1, "Reshape": 1}


def test_shape_arithmetic_is_refused(path: Path) -> None:
    nodes = [
        node("Shape", ["x"], ["size"]),
        node("Reshape", ["x", "size"], ["y"]),
    ]
    write_graph(path, nodes, {"x": (2, 3)}, {"y": (2, 3)})
    with pytest.raises(ExportError, match=r"here/Shape \(Shape\) makes the graph dynamic"):
        read_graph(path)


def test_control_flow_is_refused(path: Path) -> None:
    branch = helper.make_graph(
        [node("Relu", ["x"], ["z"])], "branch", [], [helper.make_tensor_value_info("z", 1, (2, 3))]
    )
    nodes = [node("If", ["yes"], ["y"], then_branch=branch, else_branch=branch)]
    write_graph(path, nodes, {"x": (2, 3)}, {"y": (2, 3)}, {"yes": np.array(True)})
    with pytest.raises(ExportError, match="here/If"):
        read_graph(path)


def test_rank_5_is_refused(path: Path) -> None:
    nodes = [
        node("Reshape", ["x", "five"], ["cube"]),
        node("Reshape", ["cube", "two"], ["y"]),
    ]
    shapes = {"five": np.array([1, 2, 3, 2, 2]), "two": np.array([4, 6])}
    write_graph(path, nodes, {"x": (4, 6)}, {"y": (4, 6)}, shapes)
    with pytest.raises(ExportError, match=r"here/Reshape.*cube \[1, 2, 3, 2, 2\] has rank 5"):
        read_graph(path)


def test_an_input_of_rank_5_is_refused(path: Path) -> None:
    nodes = [node("Reshape", ["x", "two"], ["y"])]
    write_graph(path, nodes, {"x": (1, 2, 3, 2, 2)}, {"y": (4, 6)}, {"two": np.array([4, 6])})
    with pytest.raises(ExportError, match=r"input x.*rank 5"):
        read_graph(path)


def test_a_dimension_that_is_not_fixed_is_refused(path: Path) -> None:
    write_graph(path, [node("Relu", ["x"], ["y"])], {"x": ("N", 3)}, {"y": ("N", 3)})
    with pytest.raises(ExportError, match="x has no fixed shape"):
        read_graph(path)
    # Nothing after the input tells.
    nodes = [node("Gather", ["x", "first"], ["y"], axis=0)]
    write_graph(path, nodes, {"x": ("N", 3)}, {"y": (1, 3)}, {"first": np.array([0])})
    with pytest.raises(ExportError, match="x has no fixed shape"):
        read_graph(path)


def test_a_tensor_of_unknown_rank_is_refused(path: Path) -> None:
    # The target shape is only known when the graph runs; inference then knows the type alone.
    nodes = [
        node("Cast", ["s"], ["size"], to=TensorProto.INT64),
        node("Reshape", ["x", "size"], ["middle"]),
        node("Reshape", ["middle", "two"], ["y"]),
    ]
    write_graph(path, nodes, {"x": (4, 6), "s": (2,)}, {"y": (4, 6)}, {"two": np.array([4, 6])})
    with pytest.raises(ExportError, match="middle has no fixed shape"):
        read_graph(path)


def test_inputs_that_are_no_floats_are_refused(path: Path) -> None:
    write_graph(path, [node("Neg", ["x"], ["y"])], {"x": (2,)}, {"y": (2,)}, dtype=TensorProto.INT64)
    with pytest.raises(ExportError, match="x is not a float"):
        read_graph(path)


def test_an_output_that_nobody_wants_is_no_obstacle(path: Path) -> None:
    weights = {"scale": np.ones(3, np.float32), "two": np.array([6, 1])}
    nodes = [
        node("LayerNormalization", ["x", "scale"], ["z", "", "deviation"]),
        node("Reshape", ["deviation", "two"], ["d"]),
        node("Reshape", ["z", "two"], ["r"]),
        node("Add", ["r", "one"], ["y"]),
        node("Add", ["d", "one"], ["w"]),
    ]
    weights["two"], weights["one"] = np.array([-1, 1]), np.ones((1, 1), np.float32)
    write_graph(path, nodes, {"x": (2, 3)}, {"y": (6, 1), "w": (2, 1)}, weights)
    assert read_graph(path).ops["LayerNormalization"] == 1


# ---- whole components, from the artifacts that the session exported ----


@pytest.mark.parametrize("recipe", RECIPES)
def test_counts_of_whole_components(
    recipe: str, exported: dict[str, Artifact], tiny_checkpoint: Path
) -> None:
    checkpoint, forms = open_checkpoint(tiny_checkpoint), load_recipe(recipe)
    for name in COMPONENTS:
        network = checkpoint.load(name)
        if name == "unet":
            wanted = [*forms.passes, *(["subpixel-upsampling"] if forms.graph.upsample == "subpixel" else [])]
            with torch.no_grad():
                for rewrite in select_passes(wanted):
                    rewrite.apply(network)  # type: ignore[arg-type]
        module = build_npu(name, network, checkpoint.spec, forms.graph)
        inputs = [torch.zeros(shape) for shape in input_shapes(checkpoint.spec, name).values()]
        component = exported[recipe].manifest.component(name)
        assert component.flops == count_flops(module, *inputs), name

        model = onnx.load(exported[recipe].path(component, "model"), load_external_data=False)
        names = [n.name for n in model.graph.node]
        assert len(set(names)) == len(names)
        paths = set(dict(module.named_modules())) - {""} | {"graph"}
        strangers = [n for n in names if not re.fullmatch(r"\w+", n.rpartition("/")[2])]
        strangers += [n for n in names if n.rpartition("/")[0] not in paths]
        assert not strangers, name


@pytest.mark.parametrize("recipe", RECIPES)
def test_files_of_whole_components(recipe: str, exported: dict[str, Artifact]) -> None:
    artifact = exported[recipe]
    here = [str(Path(onnx_export.__file__).parents[2]), str(Path(torch.__file__).parents[1]), str(Path.cwd())]
    for component in artifact.manifest.components:
        path = artifact.path(component, "model")
        content = path.read_bytes()
        for trace in (*here, str(artifact.root.parent), ".py", "Traceback", "pkg.torch", "site-packages"):
            assert trace.encode() not in content, (component.name, trace)
        model = onnx.load(path, load_external_data=False)
        assert (model.ir_version, model.producer_name) == (10, "")
        assert [(o.domain, o.version) for o in model.opset_import] == [("", 21)]
        assert dataclasses.asdict(read_graph(path)) == {
            "parameters": component.parameters,
            "flops": component.flops,
            "ops": component.ops,
        }
        shapes = {
            v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim)
            for v in (*model.graph.input, *model.graph.output)
        }
        assert shapes == {t.name: t.shape for t in (*component.inputs, *component.outputs)}


def test_linear_layers_take_the_recipes_form(exported: dict[str, Artifact]) -> None:
    as_matmul = exported["onnx"].manifest.component("unet").ops
    as_conv = exported["npu-float"].manifest.component("unet").ops
    assert as_conv["Conv"] > as_matmul["Conv"]
    assert as_conv["MatMul"] < as_matmul["MatMul"]
    assert "InstanceNormalization" in as_conv
    assert "InstanceNormalization" not in as_matmul
    # The embedding is a matrix already; a Gemm on tokens would stand between two reshapes.
    gemms = [
        n.name
        for n in onnx.load(
            exported["onnx"].path(exported["onnx"].manifest.component("unet"), "model"),
            load_external_data=False,
        ).graph.node
        if n.op_type == "Gemm"
    ]
    assert all(".attn2" in name or "cross" in name for name in gemms), gemms
