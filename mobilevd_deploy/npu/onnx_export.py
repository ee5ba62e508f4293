"""From a deploy-form module to a checked ONNX file: export, simplify, look at the graph.

export_onnx    model.onnx with its weights beside it in model.onnx.data
read_graph     parameters, FLOPs and op counts, from the file itself; refuses what a phone cannot take
run_onnx       outputs by onnxruntime on the CPU
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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir
import onnx_ir.passes.common
import onnxscript.optimizer
import torch
from torch import nn

from mobilevd_deploy.base.tensors import Tensors
from mobilevd_deploy.config.recipe import OnnxOptions
from mobilevd_deploy.errors import ExportError

MODEL = "model.onnx"
DATA = "model.onnx.data"

# Fusions that undo the deploy form: a quantiser and the NPU's compiler want layers as they were written.
_KEPT_APART = (
    "fuse_matmul_add_bias_into_gemm",
    "fuse_matmul_add_bias_into_gemm_batched",
    "fuse_qkv",
    "fuse_consecutive_slices",
)
# Shape arithmetic and control flow: a static graph of a static network has none.
_REFUSED_OPS = frozenset(
    {"Shape", "Size", "ConstantOfShape", "NonZero", "Range", "Loop", "If", "Scan", "Where", "Einsum"}
)
_MAX_RANK = 4
_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)


@dataclass(frozen=True)
class OnnxGraph:
    """What an ONNX file holds: floating-point weights, 2 x MAC of one run, nodes by type."""

    parameters: int
    flops: int
    ops: dict[str, int]


def export_onnx(
    module: nn.Module, inputs: Tensors, outputs: Sequence[str], folder: Path, options: OnnxOptions
) -> tuple[str, ...]:
    """Write `module` as `folder`/model.onnx with external weights, and return notes for the reader.

    `inputs` are example values in the order of the module's arguments; their shapes are fixed in the
    graph. Nodes are named after the module that they come from. Raises ExportError.
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
            program.save(path, external_data=True)
            del program
    except (OSError, MemoryError):  # a full disk is the caller's to name, not a graph's fault
        raise
    except Exception as error:  # torch's exporter raises what it likes
        raise ExportError(
            f"torch.onnx could not export {type(module).__name__}: {error}",
            next_step="report this with the model's configuration",
        ) from error
    model = onnx.load(path, load_external_data=False)
    name_nodes(model)
    onnx.save(model, path)
    notes = _simplify(path) if options.simplify else ()
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise ExportError(f"{path.name} of {type(module).__name__} is not valid ONNX: {error}") from error
    return notes


def read_graph(path: Path) -> OnnxGraph:
    """Count what is in the file, and refuse what a static NPU graph must not hold.

    Raises ExportError naming the node: shape arithmetic or control flow, a tensor of rank above 4, a
    dimension that is not fixed, an input or output that is not a float.
    """
    model = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False), data_prop=True)
    graph = model.graph
    shapes = {init.name: tuple(init.dims) for init in graph.initializer}
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.HasField("shape"):  # else its rank is unknown, which is not rank 0
            shapes[value.name] = tuple(
                d.dim_value if d.HasField("dim_value") else -1 for d in value.type.tensor_type.shape.dim
            )
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type not in _FLOATS:
            raise ExportError(
                f"{path.name}: {value.name} is not a float; a phone's runtime takes only floats"
            )
    for value in graph.input:
        _check_shape(value.name, shapes, f"{path.name}: input")
    for node in graph.node:
        if node.op_type in _REFUSED_OPS:
            raise ExportError(f"{path.name}: node {node.name} ({node.op_type}) makes the graph dynamic")
        for name in filter(None, node.output):  # an output that nobody wants has no name
            _check_shape(name, shapes, f"{path.name}: node {node.name} ({node.op_type}):")
    return OnnxGraph(
        parameters=sum(math.prod(i.dims) for i in graph.initializer if i.data_type in _FLOATS),
        flops=sum(_node_flops(node, shapes) for node in graph.node),
        ops=dict(sorted(Counter(node.op_type for node in graph.node).items())),
    )


def _check_shape(name: str, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    shape = shapes.get(name)
    if shape is None or min(shape, default=1) < 0:
        raise ExportError(f"{where} {name} has no fixed shape")
    if len(shape) > _MAX_RANK:
        raise ExportError(
            f"{where} {name} {list(shape)} has rank {len(shape)}; the NPU runs rank {_MAX_RANK} well"
        )


def fold_constants(model: onnx_ir.Model) -> None:
    """Fold what is constant, which is all that a static graph needs.

    The exporter's full optimiser matches some hundred rewrite rules on every node, takes as long as the
    export itself, and finds nothing else on the deploy form.
    """
    onnxscript.optimizer.fold_constants(model)
    for step in (
        onnx_ir.passes.common.IdentityEliminationPass(),
        onnx_ir.passes.common.LiftConstantsToInitializersPass(),
        onnx_ir.passes.common.RemoveUnusedNodesPass(),
    ):
        step(model)


def name_nodes(model: onnx.ModelProto) -> None:
    """Name each node <module path>/<op>, and drop the exporter's metadata, which holds local file paths."""
    taken: Counter[str] = Counter()
    for node in model.graph.node:
        scopes = next((p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"), "[]")
        module_path = next((scope for scope in reversed(ast.literal_eval(scopes)[:-1]) if scope), "graph")
        name = f"{module_path}/{node.op_type}"
        taken[name] += 1
        node.name = name if taken[name] == 1 else f"{name}_{taken[name]}"
        del node.metadata_props[:]
        node.doc_string = ""
    graph = model.graph
    for entry in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del entry.metadata_props[:]
        entry.doc_string = ""
    del model.metadata_props[:], graph.metadata_props[:]
    model.doc_string = graph.doc_string = ""


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
        path.with_name(DATA).unlink(missing_ok=True)  # a graph without large weights has no such file
        onnx_ir.save(model, path, external_data=DATA, size_threshold_bytes=1024)
    return ()


def _node_flops(node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> int:
    if node.op_type == "Conv":
        return 2 * math.prod(shapes[node.output[0]]) * math.prod(shapes[node.input[1]][1:])
    if node.op_type == "MatMul":
        return 2 * math.prod(shapes[node.output[0]]) * shapes[node.input[0]][-1]
    if node.op_type == "Gemm":
        transposed = any(a.name == "transA" and a.i for a in node.attribute)
        return 2 * math.prod(shapes[node.output[0]]) * shapes[node.input[0]][0 if transposed else 1]
    return 0


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporters' chatter off the terminal: progress has its own voice."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
