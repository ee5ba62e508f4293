"""Compile ONNX for the NPU with the Hexagon compiler in onnxruntime-qnn, on any x86-64 Linux machine.

compile_context  ONNX -> ContextBinary: a binary for one chip, the wrapper that loads it, the graph read back
measure_traffic  bytes to and from DRAM per module, from the compiler's schedule

The compiler runs in a child process: see qnn.process.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobilevd_deploy.base.processes import memory_bytes
from mobilevd_deploy.base.progress import Progress
from mobilevd_deploy.config.recipe import NpuOptions
from mobilevd_deploy.errors import UsageError, VendorError
from mobilevd_deploy.qnn.compiled import DramBytes, QnnGraph, Traffic, read_qnn_graph, read_traffic
from mobilevd_deploy.qnn.process import PROVIDER, run_child
from mobilevd_deploy.qnn.targets import Target, read_target

# onnxruntime writes the newest versions that it knows. The wrapper's one node does not need them.
_WRAPPER_IR, _WRAPPER_OPSET = 10, 21
_KEPT_METADATA = ("ep_compatibility_info", "external_dependencies")


@dataclass(frozen=True)
class ContextBinary:
    """A compiled model: `context` is the binary, `wrapper` the ONNX file that loads it from its own folder.

    `soc` and `arch` are read back from the binary. `qnn_api` is the version of the QNN interface and `sdk`
    the version of the SDK that wrote it; a phone needs a runtime at least as new. `graph` is the compiled
    graph. `dram` is the compiler's own sum of the bytes that a run moves; None if it reported none.
    """

    wrapper: Path
    context: Path
    soc: str
    arch: int
    qnn_api: str
    sdk: str
    bytes: int
    seconds: float
    peak_bytes: int
    graph: QnnGraph
    dram: DramBytes | None


def compile_context(
    model: Path,
    folder: Path,
    target: Target,
    options: NpuOptions,
    *,
    float16: bool,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> ContextBinary:
    """Compile a whole ONNX file to <target>.onnx and <target>.bin in `folder`.

    `float16`: `model` is in float32 and is computed in float16; else it is quantised (QDQ). Both files are
    written aside and renamed. The graph is read back but not checked: `check_graph` does that. Setting `stop`
    in another thread ends the compiler, and this function raises CancelledError.

    Raises:
        ExportError: the compiler refuses operations; the error names them, with the compiler's reasons.
        VendorError: the compiler failed, crashed, ran out of time, or compiled for another chip.
        ResourceError: it needs more memory than `options` allow or the machine has.
        UsageError: onnxruntime-qnn is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _fresh_folder(folder / f".{target.name}.partial") as aside:
        made = aside / "context.onnx"
        job = _compile_job(model, target, options, float16) | {"context": str(made.resolve())}
        what = f"compiling {model} for {target.name}"
        ran = run_child(what, job, aside, *_limits(options), progress, stop)
        wrapper, context = folder / f"{target.name}.onnx", folder / f"{target.name}.bin"
        binary, sdk = _rewrite_wrapper(made, context.name)
        soc, arch = read_target(binary)
        if (soc, arch) != (target.name, target.arch):
            raise VendorError(
                f"{model} was compiled for {soc} (V{arch}), not for {target.name} (V{target.arch})",
                next_step="check the chip in devices.toml",
            )
        graph = read_qnn_graph(_graph_json(aside), model)
        binary.replace(context)
        made.replace(wrapper)
    return ContextBinary(
        wrapper,
        context,
        soc,
        arch,
        ran.log.qnn_api,
        sdk,
        wrapper.stat().st_size + context.stat().st_size,
        ran.seconds,
        ran.peak_bytes,
        graph,
        ran.log.dram,
    )


def measure_traffic(
    model: Path,
    target: Target,
    options: NpuOptions,
    *,
    float16: bool,
) -> Traffic:
    """Compile `model` and sum the DRAM traffic that the compiler scheduled; no file is kept.

    The schedule of a large block needs about 200 MB of disk while it is read. Raises the errors of
    `compile_context`, and VendorError if the sum differs from the compiler's own.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = _compile_job(model, target, options, float16)
        job["options"] |= {"profiling_level": "optrace", "profiling_file_path": str(folder / "profile.csv")}
        ran = run_child(f"compiling {model} for {target.name}", job, folder, *_limits(options))
        graph = read_qnn_graph(_graph_json(folder), model)
        schedules = [*folder.glob("*_schematic.bin")]
        if len(schedules) != 1:
            raise VendorError(f"the compiler wrote {len(schedules)} schedules for {model}, not one")
        traffic = read_traffic(schedules[0], graph)
    _compare_sums(traffic.total, ran.log.dram, graph, model)
    return traffic


def _compare_sums(schedule: DramBytes, own: DramBytes | None, graph: QnnGraph, model: Path) -> None:
    """Raise VendorError if the schedule's sum differs from the compiler's.

    Only inputs and outputs may differ: small maps are padded, which the compiler's sum includes and its
    schedule does not.
    """
    if own is None:
        return
    edges = {"input": 0, "output": 0}
    for tensor in graph.tensors.values():
        if tensor.role in edges:
            # The padded numbers of rows and columns are multiples of 8.
            *outer, height, width = (1, 1, *tensor.shape)
            edges[tensor.role] += 4 * math.prod(outer) * (height + 7) * (width + 7)
    more = own.read - schedule.read, own.written - schedule.written
    if not (0 <= more[0] <= edges["input"] and 0 <= more[1] <= edges["output"]):
        raise VendorError(
            f"{model}: the schedule adds up to {schedule}, the compiler's own sum is {own}",
            next_step="this version's schedules have another format: install the onnxruntime-qnn of "
            "pyproject.toml",
        )


@contextlib.contextmanager
def _fresh_folder(path: Path) -> Iterator[Path]:
    """Make an empty folder, after removing what a killed run may have left, and remove it afterwards."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _limits(options: NpuOptions) -> tuple[int, float]:
    """Return the limits, in bytes and seconds, of a compilation that starts now."""
    memory = int(options.compiler_memory_gb * 1e9) or memory_bytes()[1]
    return memory, options.compiler_hours * 3600


def _compile_job(model: Path, target: Target, options: NpuOptions, float16: bool) -> dict[str, Any]:
    if not model.is_file():
        raise UsageError(f"{model} does not exist")
    provider = {
        "htp_arch": str(target.arch),
        "soc_model": str(target.soc_model),
        "htp_graph_finalization_optimization_mode": str(options.optimization_mode),
        "dump_json_qnn_graph": "1",
        "json_qnn_graph_dir": ".",
    }
    if options.vtcm_mb:
        provider["vtcm_mb"] = str(options.vtcm_mb)
    if float16:
        provider["enable_htp_fp16_precision"] = "1"
    return {"model": str(model.resolve()), "options": provider}


def _rewrite_wrapper(path: Path, context: str) -> tuple[Path, str]:
    """Make the wrapper refer to the file name `context`; return the present path of the binary, and the SDK.

    Also lowers the IR version, and removes metadata of exporters.
    """
    import onnx

    model = onnx.load(path)
    nodes = model.graph.node
    if [node.op_type for node in nodes] != ["EPContext"]:
        kinds = ", ".join(sorted({node.op_type for node in nodes}))
        raise VendorError(f"the compiler made {len(nodes)} parts of the graph ({kinds}), not one")
    attributes = {a.name: a for a in nodes[0].attribute}
    binary = path.with_name(attributes["ep_cache_context"].s.decode())
    attributes["ep_cache_context"].s = context.encode()
    rewritten = onnx.helper.make_model(
        model.graph,
        ir_version=min(model.ir_version, _WRAPPER_IR),
        opset_imports=[
            onnx.helper.make_opsetid("", _WRAPPER_OPSET),
            onnx.helper.make_opsetid("com.microsoft", 1),
        ],
    )
    kept = {p.key: p.value for p in model.metadata_props if p.key.startswith(_KEPT_METADATA)}
    onnx.helper.set_model_props(rewritten, kept)
    onnx.save(rewritten, path)
    return binary, attributes["ep_sdk_version"].s.decode()


def _graph_json(folder: Path) -> Path:
    found = [path for path in folder.glob("*.json") if path.name.startswith(PROVIDER)]
    graphs = [path for path in found if not path.name.endswith("_tensor_log.json")]
    if len(graphs) != 1:
        raise VendorError(f"the compiler described {len(graphs)} graphs, not one")
    return graphs[0]
