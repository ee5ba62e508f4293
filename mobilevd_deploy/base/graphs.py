"""ONNX graphs as onnx_ir objects: a value knows its producer, its users, its dtype and its shape.

Weights stay in their file, memory-mapped, until something reads them.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir
import onnx_ir.passes.common

from mobilevd_deploy.errors import ExportError

_EXTERNAL_ABOVE_BYTES = 1024


def read_shaped(path: Path) -> onnx_ir.Model:
    """Read an ONNX file and infer the shapes of its values."""
    model = onnx_ir.load(path)
    infer_shapes(model)
    return model


def save_graph(model: onnx_ir.Model, path: Path, data: str) -> None:
    """Write `path`, and the weights above 1 KiB in a file called `data` beside it, if there are any.

    Replaces both files. `model` must not hold tensors of the file that it replaces.
    """
    weights = path.with_name(data)
    weights.unlink(missing_ok=True)
    onnx_ir.save(model, path, external_data=data, size_threshold_bytes=_EXTERNAL_ABOVE_BYTES)
    if weights.stat().st_size == 0:
        weights.unlink()


def check_file(path: Path, what: str) -> None:
    """Raise ExportError, which names `what`, if the file is not valid ONNX."""
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise ExportError(
            f"{what} is not valid ONNX: {path}: {error}",
            next_step="report this with the model's configuration and recipe",
        ) from error


def infer_shapes(model: onnx_ir.Model) -> None:
    """Infer the shapes of all values in place. A value whose shape cannot be inferred keeps None."""
    # Strict inference would leave a model without any shape if it has one op of another domain.
    onnx_ir.passes.common.ShapeInferencePass(check_type=False, strict_mode=False)(model)


def fixed_shape(value: onnx_ir.Value | None) -> tuple[int, ...] | None:
    """Return a value's shape, or None if its rank is unknown or a dimension is not a number."""
    if value is None or value.shape is None or not value.shape.is_static():
        return None
    return value.shape.numpy()
