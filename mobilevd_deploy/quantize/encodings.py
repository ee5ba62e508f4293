"""A quantised graph as AIMET writes it: the plain graph, and beside it a file of scales and offsets.

    before  x -> QuantizeLinear -> DequantizeLinear -> Conv     weights stored as integers
    after   x -> Conv                                           weights as floats on the same grid
            activation_encodings: {"name": "x", "bw": 16, "scale": [..], "offset": [-zero point]}

Format: AIMET's encodings, version 1.0.0; value = scale (q + offset) with q from 0 to 2^bw - 1. Biases have no
entry: whoever compiles stores them as int32 at the scale of input times weight.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from mobilevd_deploy.errors import ExportError

_BITS: dict[int, int] = {
    TensorProto.INT4: 4,
    TensorProto.UINT4: 4,
    TensorProto.INT8: 8,
    TensorProto.UINT8: 8,
    TensorProto.INT16: 16,
    TensorProto.UINT16: 16,
}
_SIGNED = (TensorProto.INT4, TensorProto.INT8, TensorProto.INT16)


def write_encodings(quantised: Path, folder: Path) -> list[Path]:
    """Write model.onnx, model.data (its weights) and model.encodings into `folder`, from a QDQ graph.

    Raises ExportError for a tensor that is read with two different ranges, which the format cannot hold.
    """
    model = onnx.load(quantised)
    activations, weights = _strip(model)
    paths = [folder / f"model.{suffix}" for suffix in ("onnx", "data", "encodings")]
    onnx.save(model, paths[0], save_as_external_data=True, location=paths[1].name, size_threshold=1024)
    values = {"version": "1.0.0", "activation_encodings": activations, "param_encodings": weights}
    paths[2].write_text(json.dumps(values, indent=1), encoding="utf-8")
    return [path for path in paths if path.exists()]


def _strip(model: onnx.ModelProto) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Take the pairs out of `model`; return what they held, for activations and for weights."""
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
    plain: dict[str, str] = {}  # what each tensor behind a pair is without it
    activations: dict[str, dict[str, Any]] = {}
    weights: dict[str, dict[str, Any]] = {}
    kept: list[NodeProto] = []
    for node in graph.node:
        if node.op_type == "QuantizeLinear":
            continue
        if node.op_type != "DequantizeLinear":
            kept.append(node)
            continue
        stored, name = node.input[0], node.output[0]
        quantise = producers.get(stored)
        if quantise is None:
            constants[name] = numpy_helper.from_array(_dequantised(node, constants), name)
            if constants[stored].data_type in _BITS:
                weights[name] = _entry(name, node, constants)
            continue
        before = plain.get(quantise.input[0], quantise.input[0])
        if before in constants:
            raise ExportError(
                f"{node.name}: weights that are quantised in the graph",
                next_step="export with prequantize_constants",
            )
        plain[name] = before
        entry = _entry(before, node, constants)
        # A signed range that repeats an unsigned one is the same grid by another name.
        known = activations.setdefault(before, entry)
        if (known["bw"], known["scale"], known["offset"]) != (entry["bw"], entry["scale"], entry["offset"]):
            raise ExportError(
                f"{node.name}: {before} is read with two ranges, and AIMET's encodings hold one",
                next_step="--compile-on hub uses the graph with its quantisers",
            )
    outputs = {plain[value.name]: value.name for value in graph.output if value.name in plain}
    for node in kept:
        node.input[:] = [outputs.get(plain.get(n, n), plain.get(n, n)) for n in node.input]
        node.output[:] = [outputs.get(n, n) for n in node.output]
    for before, name in outputs.items():
        activations[before]["name"] = name
    read = {name for node in kept for name in node.input}
    del graph.node[:], graph.value_info[:], graph.initializer[:]
    graph.node.extend(kept)
    graph.initializer.extend(tensor for name, tensor in constants.items() if name in read)
    return list(activations.values()), list(weights.values())


def _dequantised(node: NodeProto, constants: dict[str, TensorProto]) -> Any:
    stored = numpy_helper.to_array(constants[node.input[0]]).astype(np.int64)
    scale, zero = _grid(node, constants)
    axis = next((helper.get_attribute_value(a) for a in node.attribute if a.name == "axis"), 1)
    if scale.ndim:
        shape = [1] * stored.ndim
        shape[axis] = -1
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    return ((stored - zero) * scale.astype(np.float64)).astype(np.float32)


def _grid(node: NodeProto, constants: dict[str, TensorProto]) -> tuple[Any, Any]:
    scale = numpy_helper.to_array(constants[node.input[1]])
    has_zero = len(node.input) > 2 and node.input[2]
    zero = numpy_helper.to_array(constants[node.input[2]]) if has_zero else np.zeros_like(scale)
    return scale, zero.astype(np.int64)


def _entry(name: str, node: NodeProto, constants: dict[str, TensorProto]) -> dict[str, Any]:
    scale, zero = _grid(node, constants)
    stored = constants[node.input[2]].data_type if len(node.input) > 2 else constants[node.input[0]].data_type
    bits = _BITS[stored]
    offset = -zero - (2 ** (bits - 1) if stored in _SIGNED else 0)
    return {
        "name": name,
        "dtype": "INT",
        "bw": bits,
        "enc_type": "PER_CHANNEL" if scale.ndim else "PER_TENSOR",
        "is_sym": bool(np.all(offset == -(2 ** (bits - 1)))),
        "scale": np.atleast_1d(scale).astype(float).tolist(),
        "offset": np.atleast_1d(offset).tolist(),
    }
