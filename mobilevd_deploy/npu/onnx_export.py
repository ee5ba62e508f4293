"""From a deploy-form module to a checked ONNX file: export, simplify, check.

export_onnx    writes model.onnx, with its weights in model.onnx.data
read_graph     counts parameters, FLOPs and ops in the file; refuses a graph that an NPU cannot run
"""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import math
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir
import onnx_ir.passes.common
import onnxscript.optimizer
import torch
from torch import nn

from mobilevd_deploy.base.graphs import check_file, fixed_shape, read_shaped, save_graph
from mobilevd_deploy.base.tensors import Tensors
from mobilevd_deploy.config.recipe import OnnxOptions
from mobilevd_deploy.errors import ExportError

MODEL = "model.onnx"
DATA = "model.onnx.data"

# Fusions that undo the deploy form: the quantiser and the NPU's compiler need the layers as written.
_KEPT_APART = (
    "fuse_matmul_add_bias_into_gemm",
    "fuse_matmul_add_bias_into_gemm_batched",
    "fuse_qkv",
    "fuse_consecutive_slices",
)
# Shape arithmetic and control flow, which the NPU cannot run.
_REFUSED_OPS = frozenset(
    {"Shape", "Size", "ConstantOfShape", "NonZero", "Range", "Loop", "If", "Scan", "Where", "Einsum"}
)
_MAX_RANK = 4
_FLOATS = (onnx_ir.DataType.FLOAT, onnx_ir.DataType.FLOAT16)


@dataclass(frozen=True)
class OnnxGraph:
    """Counts of an ONNX file: floating-point weights, FLOPs of one run (2 per MAC), nodes by op type."""

    parameters: int
    flops: int
    ops: dict[str, int]


def export_onnx(
    module: nn.Module, inputs: Tensors, outputs: Sequence[str], folder: Path, options: OnnxOptions
) -> tuple[str, ...]:
    """Write `module` as `folder`/model.onnx with external weights, and return notes for the user.

    `inputs` are example values in the order of the module's arguments; their shapes are fixed in the
    graph. Nodes are named <module path>/<op>. Raises ExportError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / MODEL
    arguments = tuple(torch.from_numpy(value) for value in inputs.values())
    try:
        with quiet():
            program = torch.onnx.export(
                module.eval(),
                arguments,
                input_names=list(inputs),
                output_names=list(outputs),
                opset_version=options.opset,
                dynamo=True,
                optimize=False,
                verbose=False,
            )
            assert program is not None
            fold_constants(program.model)
            name_nodes(program.model)
            save_graph(program.model, path, DATA)
            del program
    except (OSError, MemoryError):  # not a fault of the graph: the caller reports a full disk
        raise
    except Exception as error:  # torch's exporter raises many types
        raise ExportError(
            f"torch.onnx could not export {type(module).__name__}: {error}",
            next_step="report this with the model's configuration",
        ) from error
    notes = _simplify(path) if options.simplify else ()
    check_file(path, f"the export of {type(module).__name__}")
    return notes


def read_graph(path: Path) -> OnnxGraph:
    """Count parameters, FLOPs and ops in the file.

    Raises ExportError naming the node or tensor: shape arithmetic, control flow, a tensor of rank above 4, a
    dimension that is not fixed, an input or output that is not a float.
    """
    graph = read_shaped(path).graph
    for value in (*graph.inputs, *graph.outputs):
        if value.dtype not in _FLOATS:
            raise ExportError(
                f"{path.name}: {value.name} is not a float; a phone's runtime takes only floats"
            )
    for value in graph.inputs:
        _check_shape(value, f"{path.name}: input")
    for node in graph:
        if node.op_type in _REFUSED_OPS:
            raise ExportError(f"{path.name}: node {node.name} ({node.op_type}) makes the graph dynamic")
        for value in node.outputs:
            if value.name:  # an optional output that is left out has no name
                _check_shape(value, f"{path.name}: node {node.name} ({node.op_type}):")
    weights = (value.const_value for value in graph.initializers.values())
    return OnnxGraph(
        parameters=sum(tensor.size for tensor in weights if tensor and tensor.dtype in _FLOATS),
        flops=sum(_node_flops(node) for node in graph),
        ops=dict(sorted(Counter(node.op_type for node in graph).items())),
    )


def _check_shape(value: onnx_ir.Value, where: str) -> None:
    shape = fixed_shape(value)
    if shape is None:
        raise ExportError(f"{where} {value.name} has no fixed shape")
    if len(shape) > _MAX_RANK:
        raise ExportError(
            f"{where} {value.name} {list(shape)} has rank {len(shape)}; the NPU runs rank {_MAX_RANK} well"
        )


def fold_constants(model: onnx_ir.Model) -> None:
    """Fold constants, in place.

    The exporter's full optimiser matches about a hundred rewrite rules on every node, takes as long as the
    export itself, and finds nothing else in the deploy form.
    """
    onnxscript.optimizer.fold_constants(model)
    for step in (
        onnx_ir.passes.common.IdentityEliminationPass(),
        onnx_ir.passes.common.LiftConstantsToInitializersPass(),
        onnx_ir.passes.common.RemoveUnusedNodesPass(),
    ):
        step(model)


def name_nodes(model: onnx_ir.Model) -> None:
    """Name each node <module path>/<op>, and drop the exporter's metadata, which holds local file paths."""
    taken: Counter[str] = Counter()
    for node in model.graph:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        module_path = next((scope for scope in reversed(scopes[:-1]) if scope), "graph")
        node.name = unique(f"{module_path}/{node.op_type}", taken)
    onnx_ir.passes.common.ClearMetadataAndDocStringPass()(model)
    # The pass leaves the model and the values as they are.
    model.metadata_props.clear()
    model.doc_string = model.producer_name = model.producer_version = None
    for value in onnx_ir.convenience.create_value_mapping(model.graph).values():
        value.metadata_props.clear()
        value.doc_string = None


def unique(name: str, taken: Counter[str]) -> str:
    """Return `name`, with a number from the second time on; `taken` counts the names."""
    taken[name] += 1
    return name if taken[name] == 1 else f"{name}_{taken[name]}"


def _simplify(path: Path) -> tuple[str, ...]:
    """Run onnxsim on the file in place. If onnxsim fails, leave the file as it is and return a note.

    onnxsim reads and writes files: given a model in memory, it holds six times the weights.
    """
    import onnxsim

    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".onnxsim-") as aside:
        simplified = Path(aside) / MODEL
        try:
            with quiet():
                onnxsim.simplify(
                    str(path),
                    skipped_optimizers=list(_KEPT_APART),
                    certify=False,
                    output_path=str(simplified),
                )
            model = onnx_ir.load(simplified)
        except (OSError, MemoryError):
            raise
        except Exception as error:  # onnxsim's C++ code raises many types
            return (f"{path.parent.name}: left as exported, onnxsim failed on it: {error}",)
        model.producer_name = model.producer_version = None
        save_graph(model, path, DATA)
    return ()


def _node_flops(node: onnx_ir.Node) -> int:
    if node.op_type not in ("Conv", "MatMul", "Gemm"):
        return 0
    first, second = (fixed_shape(value) or () for value in node.inputs[:2])
    if node.op_type == "Conv":
        products = math.prod(second[1:])
    elif node.op_type == "MatMul":
        products = first[-1]
    else:
        products = first[0 if node.attributes.get_int("transA", 0) else 1]
    return 2 * math.prod(fixed_shape(node.outputs[0]) or ()) * products


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the messages of torch's exporter off the terminal."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
