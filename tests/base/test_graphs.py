"""ONNX graphs read with shapes, and written with their weights beside them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from mobilevd_deploy.base.graphs import check_file, fixed_shape, read_shaped, save_graph
from mobilevd_deploy.errors import ExportError


def graph(text: str, **weights: np.ndarray) -> ir.Model:
    opsets = '"": 21, "somebody": 1'
    model = onnx.parser.parse_model(f"<ir_version: 10, opset_import: [{opsets}]> g {text}")
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    return ir.from_proto(model)


@pytest.mark.parametrize(("size", "files"), [(200, ["m.onnx"]), (400, ["m.data", "m.onnx"])])
def test_only_large_weights_have_a_file(tmp_path: Path, size: int, files: list[str]) -> None:
    values = np.arange(size, dtype=np.float32)
    model = graph(f"(float[{size}] x) => (float[{size}] y) {{ y = Add(x, w) }}", w=values)
    (tmp_path / "m.data").write_bytes(b"left over" * 1000)
    save_graph(model, tmp_path / "m.onnx", "m.data")
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    assert np.array_equal(numpy_helper.to_array(onnx.load(tmp_path / "m.onnx").graph.initializer[0]), values)
    if "m.data" in files:
        assert (tmp_path / "m.data").stat().st_size == values.nbytes
        assert (tmp_path / "m.data").stat().st_mode == (tmp_path / "m.onnx").stat().st_mode


def test_weights_stay_in_their_file(tmp_path: Path) -> None:
    model = graph("(float[400] x) => (float[400] y) { y = Add(x, w) }", w=np.ones(400, np.float32))
    save_graph(model, tmp_path / "m.onnx", "m.data")
    (tmp_path / "m.data").unlink()
    read = read_shaped(tmp_path / "m.onnx")
    assert fixed_shape(read.graph.initializers["w"]) == (400,)
    with pytest.raises(OSError, match=r"m\.data"):
        read.graph.initializers["w"].const_value.numpy()


def test_shapes_around_an_op_of_another_domain_are_inferred(tmp_path: Path) -> None:
    model = graph(
        """(float[2, 3] x, float[N] n) => (float[2, 3] y, float[N] m)
        { a = Relu(x)
          b = somebody.Mystery(a)
          m = Relu(n)
          y = Add(a, b) }"""
    )
    save_graph(model, tmp_path / "m.onnx", "m.data")
    values = ir.convenience.create_value_mapping(read_shaped(tmp_path / "m.onnx").graph)
    shapes = {name: fixed_shape(value) for name, value in values.items()}
    assert shapes == {"x": (2, 3), "a": (2, 3), "b": None, "y": (2, 3), "n": None, "m": None}
    assert fixed_shape(None) is None


def test_an_invalid_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    model = graph("(float[2] x) => (float[2] y) { y = Relu(x) }")
    save_graph(model, path, "m.data")
    check_file(path, "the model")
    model.graph[0].op_type = "Mystery"
    save_graph(model, path, "m.data")
    with pytest.raises(ExportError, match=r"the model is not valid ONNX: .*m\.onnx: .*Mystery") as caught:
        check_file(path, "the model")
    assert caught.value.next_step
