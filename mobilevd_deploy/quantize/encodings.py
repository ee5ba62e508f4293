"""A quantised graph in AIMET's form: the plain graph, and a file of scales and offsets.

    before  x -> QuantizeLinear -> DequantizeLinear -> Conv     weights stored as integers
    after   x -> Conv                                           weights as floats on the same grid
            activation_encodings: {"name": "x", "bw": 16, "scale": [..], "offset": [-zero point]}

Format: AIMET's encodings, version 1.0.0; value = scale (q + offset) with q from 0 to 2^bw - 1. Biases have no
entry: the compiler stores them as int32 at the scale of input times weight.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir import DataType
from onnx_ir.passes.common import RemoveUnusedNodesPass

from mobilevd_deploy.base.graphs import save_graph
from mobilevd_deploy.base.tensors import Array
from mobilevd_deploy.errors import ExportError
from mobilevd_deploy.quantize.qdq import DEQUANTISE, constant, operand


def write_encodings(quantised: Path, folder: Path) -> list[Path]:
    """Write model.onnx, model.data (its weights) and model.encodings into `folder`, from a QDQ graph.

    Raises ExportError for a tensor that is read with two different ranges, which the format cannot hold.
    """
    model = ir.load(quantised)
    activations, weights = _strip(model)
    paths = [folder / f"model.{suffix}" for suffix in ("onnx", "data", "encodings")]
    save_graph(model, paths[0], paths[1].name)
    values = {"version": "1.0.0", "activation_encodings": activations, "param_encodings": weights}
    paths[2].write_text(json.dumps(values, indent=1), encoding="utf-8")
    return [path for path in paths if path.exists()]


def _strip(model: ir.Model) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Remove every Q and DQ from `model`; return their ranges, for activations and for weights."""
    graph = model.graph
    activations: dict[ir.Value, dict[str, Any]] = {}
    weights: dict[ir.Value, dict[str, Any]] = {}
    for node in list(graph):
        if node.op_type != DEQUANTISE:
            continue
        stored, value = operand(node, 0), node.outputs[0]
        quantise, entry = stored.producer(), _entry(node)
        if quantise is None:
            plain = _dequantised(node)
            if entry["bw"] < 32:
                weights[plain] = entry
        else:
            plain = operand(quantise, 0)
            if plain.is_initializer():
                raise ExportError(
                    f"{node.name}: weights that are quantised in the graph",
                    next_step="export with prequantize_constants",
                )
            # A relabelled range (int16 behind uint16) is the same grid and has an equal entry.
            if activations.setdefault(plain, entry) != entry:
                raise ExportError(
                    f"{node.name}: {plain.name} is read with two ranges, and AIMET's encodings hold one",
                    next_step="--compile-on hub uses the graph with its quantisers",
                )
        is_output = value.is_graph_output()
        value.replace_all_uses_with(plain, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        if quantise is None:
            graph.register_initializer(plain)
        elif is_output:
            plain.name, plain.type, plain.shape = value.name, value.type, value.shape
    RemoveUnusedNodesPass()(model)
    return _named(activations), _named(weights)


def _named(entries: dict[ir.Value, dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"name": value.name} | entry for value, entry in entries.items()]


def _dequantised(node: ir.Node) -> ir.Value:
    """Return the float32 values of a DQ of constants. They are computed when the file is written."""
    stored, (scale, zero), name = operand(node, 0).const_value, _grid(node), node.outputs[0].name
    assert stored is not None
    if scale.ndim:
        shape = [1] * len(stored.shape)
        shape[node.attributes.get_int("axis", 1)] = -1
        scale, zero = scale.reshape(shape), zero.reshape(shape)

    def values() -> ir.TensorProtocol:
        floats = (stored.numpy().astype(np.int64) - zero) * scale.astype(np.float64)
        return ir.Tensor(floats.astype(np.float32))

    tensor = ir.LazyTensor(values, DataType.FLOAT, ir.Shape(stored.shape.numpy()), name=name)
    return ir.Value(name=name, const_value=tensor)


def _grid(node: ir.Node) -> tuple[Array, Array]:
    """Return scale and zero point of a DQ, the zero point as int64."""
    scale = constant(operand(node, 1))
    has_zero = len(node.inputs) > 2 and node.inputs[2] is not None
    zero = constant(operand(node, 2)) if has_zero else np.zeros_like(scale)
    return scale, zero.astype(np.int64)


def _entry(node: ir.Node) -> dict[str, Any]:
    """Return what the encodings say of a DQ, apart from the name."""
    scale, zero = _grid(node)
    stored = operand(node, 2 if len(node.inputs) > 2 else 0).dtype
    assert stored is not None
    offset = -zero - (2 ** (stored.bitwidth - 1) if stored.is_signed() else 0)
    return {
        "dtype": "INT",
        "bw": stored.bitwidth,
        "enc_type": "PER_CHANNEL" if scale.ndim else "PER_TENSOR",
        "is_sym": bool(np.all(offset == -(2 ** (stored.bitwidth - 1)))),
        "scale": np.atleast_1d(scale).astype(float).tolist(),
        "offset": np.atleast_1d(offset).tolist(),
    }
