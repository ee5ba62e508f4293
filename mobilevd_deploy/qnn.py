"""The Hexagon compiler and the NPU's simulator, as onnxruntime-qnn brings them to any x86 Linux machine.

lint             what is known to go wrong, said before the compiler is asked
compile_context  ONNX -> ContextBinary: a binary for one chip, the wrapper that loads it, the graph read back
measure_traffic  bytes to and from DRAM per module, from the compiler's schedule
NpuSimRunner     runs a context binary here, as the phone's NPU would compute it

The library works in a child process, because it may crash, take all memory, or never end; its verbose log is
read as it comes, because only there it says why it refuses an operation. The only file that imports
onnxruntime_qnn, and late.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import mmap
import os
import platform
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobilevd_deploy.base.processes import die_with_parent, memory_bytes, own_python, peak_bytes
from mobilevd_deploy.base.progress import Progress, duration
from mobilevd_deploy.config.devices import table
from mobilevd_deploy.config.recipe import NpuOptions
from mobilevd_deploy.errors import ExportError, MobileVDError, ResourceError, UsageError, VendorError, listed
from mobilevd_deploy.qnn_graph import DramBytes, QnnGraph, Traffic, origin, read_qnn_graph, read_traffic

if TYPE_CHECKING:
    import onnx

    from mobilevd_deploy.base.tensors import Array

SIMULATE_UP_TO_FLOPS = 20e9
"""A component with more is not simulated: on two cores its run would take from minutes to days."""

_PROVIDER = "QNNExecutionProvider"
# onnxruntime writes the newest version that it knows; the wrapper's one node needs none of it.
_WRAPPER_IR, _WRAPPER_OPSET = 10, 21
_KEPT_METADATA = ("ep_compatibility_info", "external_dependencies")
_TARGET_TEXT = re.compile(rb"soc_type=([A-Za-z0-9]+);arch=([0-9]+)")
# Where the compiler's stages begin, as parts of the whole; measured on the demo's UNet.
_STAGES = {"Graph Optimizations": 0.2, "Graph Sequencing for Target": 0.7, "VTCM Allocation": 0.9}
_POLL_MS = 100
_FULL_DISK_BYTES = 2**20


@dataclass(frozen=True)
class Target:
    """A chip to compile for: its part number, QNN's number for it, and the version of its Hexagon."""

    name: str
    soc_model: int
    arch: int


def targets() -> tuple[Target, ...]:
    """Every chip of devices.toml, by its first part number."""
    return tuple(Target(c.sm[0].upper(), c.soc_model, int(c.htp.removeprefix("v"))) for c in table().chip)


def find_target(name: str) -> Target:
    """Return the chip with the part number `name`, such as "SM8650". Raises UsageError for others."""
    for chip, target in zip(table().chip, targets(), strict=True):
        if name.lower() in chip.sm:
            return target
    known = ", ".join(target.name for target in targets())
    raise UsageError(f"no chip has the part number {name!r}", next_step=f"known are {known}")


@dataclass(frozen=True)
class ContextBinary:
    """A compiled model: `context` is the binary, `wrapper` the ONNX file that loads it from beside itself.

    `soc` and `arch` are read back from the binary. `qnn_api` is the version of the QNN interface and `sdk`
    that of the SDK that wrote it; a phone needs a runtime at least as new. `graph` is what was compiled.
    `dram` is what a run will move, by the compiler's own sum; None where it gave none.
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
    """Compile an ONNX file, all of it, as <target>.onnx and <target>.bin in `folder`.

    `float16`: `model` is in float32 and computed in float16; else it is quantised (QDQ). Both files are made
    aside and renamed. The graph is read back but not judged: `check_graph` does that. `stop` ends the
    compiler from another thread, with CancelledError here.

    Raises:
        ExportError: the compiler refuses operations; they are named, with its reasons.
        VendorError: it failed, crashed, ran out of time, or made something else than it was asked for.
        ResourceError: it needs more memory than `options` allow, or than the machine has.
        UsageError: onnxruntime-qnn is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _fresh_folder(folder / f".{target.name}.partial") as aside:
        made = aside / "context.onnx"
        job = _compile_job(model, target, options, float16) | {"context": str(made.resolve())}
        what = f"compiling {model} for {target.name}"
        ran = _run_child(what, job, aside, *_limits(options), progress, stop)
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
    """Compile `model` and sum the DRAM traffic that the compiler scheduled; nothing is kept.

    The schedule takes some 200 MB of disk per large block while it is read. Errors as in `compile_context`;
    VendorError too for a sum that is not the compiler's own.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = _compile_job(model, target, options, float16)
        job["options"] |= {"profiling_level": "optrace", "profiling_file_path": str(folder / "profile.csv")}
        ran = _run_child(f"compiling {model} for {target.name}", job, folder, *_limits(options))
        graph = read_qnn_graph(_graph_json(folder), model)
        schedules = [*folder.glob("*_schematic.bin")]
        if len(schedules) != 1:
            raise VendorError(f"the compiler wrote {len(schedules)} schedules for {model}, not one")
        traffic = read_traffic(schedules[0], graph)
    _compare_sums(traffic.total, ran.log.dram, graph, model)
    return traffic


def _compare_sums(schedule: DramBytes, own: DramBytes | None, graph: QnnGraph, model: Path) -> None:
    """Refuse a schedule that adds up to something else than the compiler says.

    Only inputs and outputs may make a difference: small maps are padded on their way, which the compiler's
    sum counts and its schedule does not.
    """
    if own is None:
        return
    edges = {"input": 0, "output": 0}
    for tensor in graph.tensors.values():
        if tensor.role in edges:
            # A map's rows and columns come in eights.
            *outer, height, width = (1, 1, *tensor.shape)
            edges[tensor.role] += 4 * math.prod(outer) * (height + 7) * (width + 7)
    more = own.read - schedule.read, own.written - schedule.written
    if not (0 <= more[0] <= edges["input"] and 0 <= more[1] <= edges["output"]):
        raise VendorError(
            f"{model}: the schedule adds up to {schedule}, the compiler's own sum is {own}",
            next_step="its schedules are not understood: install the onnxruntime-qnn of pyproject.toml",
        )


def read_target(context: Path) -> tuple[str, int]:
    """Return part number and Hexagon version that a context binary names. Raises VendorError."""
    try:
        with context.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            found = {(m[1].decode(), int(m[2])) for m in _TARGET_TEXT.finditer(data)}
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise VendorError(f"{context} cannot be read: {error}", next_step="compile it again") from error
    if len(found) != 1:
        names = ", ".join(sorted(f"{soc} V{arch}" for soc, arch in found)) or "no chip"
        raise VendorError(f"{context} names {names}, not one chip", next_step="compile it again")
    return found.pop()


class NpuSimRunner:
    """A context binary on the simulator of the NPU, which computes as the chip does, and far slower.

    It needs what `compile_context` wrote: the wrapper with the binary beside it. The process lives for one
    call, however long that takes: what is too large to be simulated is for the caller to decide.
    """

    def __init__(self, wrapper: Path) -> None:
        _check_installed()
        if not wrapper.is_file():
            raise UsageError(f"{wrapper} does not exist", next_step="compile it first")
        self._wrapper = wrapper

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Map inputs by name to outputs by name. Raises VendorError, ResourceError."""
        import numpy as np

        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for i, value in enumerate(feeds.values()):
                np.save(folder / f"in{i}.npy", value)
            job = {"model": str(self._wrapper.resolve()), "options": {}, "feeds": list(feeds)}
            ran = _run_child(f"simulating {self._wrapper}", job, folder, None, math.inf)
            return {key: np.load(folder / f"out{i}.npy") for i, key in enumerate(ran.result["outputs"])}


@dataclass(frozen=True)
class Finding:
    """Something about a model that is known to go wrong: where, what, and who says so.

    `next_step`: what to do instead, where the result would be wrong; None where it would be slow or refused.
    """

    rule: str
    where: str
    what: str
    source: str
    next_step: str | None = None

    def __str__(self) -> str:
        return f"{self.where}: {self.what} [{self.rule}; {self.source}]"


def lint(
    model: Path,
    *,
    float16: bool,
    vtcm_mb: int = 8,
    peaks: Mapping[str, float] | None = None,
) -> tuple[Finding, ...]:
    """Look for what the compiler or the NPU is known to stumble over; the weights are read for float16 only.

    `peaks`: the largest magnitudes of values, by module path or ONNX name, where they were measured. Rules:
    "shape", "rank", "io-type", "data-file", "vtcm", "allocation", "silu", "float16-range".
    """
    import onnx

    loaded = onnx.load(model, load_external_data=False)
    graph = onnx.shape_inference.infer_shapes(loaded).graph
    shapes = _shapes(graph)
    return (
        *_lint_shapes(graph, shapes),
        *_lint_io(graph),
        *_lint_data_files(graph, model.parent),
        *_lint_norms(graph, shapes, vtcm_mb or 8),
        *_lint_allocation(graph, shapes, float16),
        *(() if float16 else _lint_silu(graph, shapes)),
        *(_lint_range(graph, model.parent, peaks or {}) if float16 else ()),
    )


# ---- lint rules ----

# Seen on SM8650 in integers: maps of 16x8, 16x4, 64x4, 128x7 and 512x8 give 0 dB; 12x4, 8x8 and 16x9 are
# right, and so are 64 channels.
_GROUPS, _NARROW, _NARROW_ABOVE = 32, 8, 12
_BETWEEN_NORM_AND_SILU = ("Sigmoid", "Reshape", "Add", "Mul", "QuantizeLinear", "DequantizeLinear")


def _lint_shapes(graph: onnx.GraphProto, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Finding]:
    for node in graph.node:
        for name in filter(None, node.output):
            if name not in shapes or min(shapes[name], default=1) < 1:
                what = f"{name} has no fixed shape, so the compiler answers 'Cannot get shape'"
                yield Finding("shape", node.name, what, "measured, onnxruntime-qnn 2.7")
            elif len(shapes[name]) > 4:
                what = f"{name} {list(shapes[name])} has rank {len(shapes[name])}; above 4 is slow or refused"
                yield Finding("rank", node.name, what, "QNN HTP op definitions")


def _lint_io(graph: onnx.GraphProto) -> Iterator[Finding]:
    import onnx

    constants = {init.name for init in graph.initializer}
    types = onnx.TensorProto
    bad = (types.INT64, types.UINT64, types.DOUBLE, types.UINT16, types.INT16)
    for value in (*graph.input, *graph.output):
        kind = value.type.tensor_type.elem_type
        if kind in bad and value.name not in constants:
            what = f"is {types.DataType.Name(kind).lower()}; phones' runtimes feed and read float32"
            yield Finding("io-type", value.name, what, "QNN HTP has no 64-bit values; android_app")


def _lint_data_files(graph: onnx.GraphProto, folder: Path) -> Iterator[Finding]:
    names = {e.value for i in graph.initializer for e in i.external_data if e.key == "location"}
    for name in sorted(names):
        if name != Path(name).name:
            yield Finding(
                "data-file", name, "is not a plain file name beside the model", "ONNX external data"
            )
        elif not (folder / name).is_file():
            yield Finding("data-file", name, "does not exist", "ONNX external data")


def _lint_norms(
    graph: onnx.GraphProto, shapes: Mapping[str, tuple[int, ...]], vtcm_mb: int
) -> Iterator[Finding]:
    for node in graph.node:
        if node.op_type in ("GroupNormalization", "InstanceNormalization", "LayerNormalization"):
            axis = -1 if node.op_type.startswith("Layer") else 1
            axis = next((a.i for a in node.attribute if a.name == "axis"), axis)
            size = 2 * math.prod(shapes.get(node.input[0], (0,))[axis:])
            if size > vtcm_mb * 2**20:
                what = f"normalises {size / 2**20:.1f} MiB at once, more than {vtcm_mb} MiB of VTCM"
                yield Finding("vtcm", node.name, what, "executorch #1430")


def _lint_allocation(
    graph: onnx.GraphProto, shapes: Mapping[str, tuple[int, ...]], float16: bool
) -> Iterator[Finding]:
    import onnx

    width = {onnx.TensorProto.FLOAT: 2 if float16 else 4}
    size = sum(
        math.prod(i.dims) * width.get(i.data_type, onnx.helper.tensor_dtype_to_np_dtype(i.data_type).itemsize)
        for i in graph.initializer
    )
    # Inputs and outputs stay float32.
    size += sum(4 * math.prod(shapes.get(value.name, (0,))) for value in (*graph.input, *graph.output))
    if size >= 2**31:
        what = f"{size / 2**30:.2f} GiB of weights, inputs and outputs; a graph may allocate 2 GiB"
        yield Finding("allocation", graph.name or "graph", what, "ai-hub-models #129, #274")


def _lint_silu(graph: onnx.GraphProto, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Finding]:
    """A norm with a channel per group and a SiLU behind it, on narrow maps: the result is noise."""
    producers = {name: node for node in graph.node for name in node.output}
    for sigmoid in graph.node:
        if sigmoid.op_type != "Sigmoid":
            continue
        node, narrow = sigmoid, False
        while node.op_type in _BETWEEN_NORM_AND_SILU and node.input[0] in producers:
            value = node.input[0]
            node = producers[value]
            if node.op_type == "Add":  # the norm's shift, on the map as it was
                _, channels, height, width = (0, 0, 0, 0, *shapes.get(value, ()))[-4:]
                narrow = channels == _GROUPS and height > _NARROW_ABOVE and width <= _NARROW
        if narrow and node.op_type == "InstanceNormalization":
            yield Finding(
                "silu",
                sigmoid.name,
                f"SiLU behind a norm of {_GROUPS} groups of one channel, on maps at most {_NARROW} wide and "
                f"more than {_NARROW_ABOVE} high, is computed wrongly",
                "measured, onnxruntime-qnn 2.7",
                'turn the map (graph.temporal_conv = "rows" for time), or give the block more channels',
            )


def _lint_range(graph: onnx.GraphProto, folder: Path, peaks: Mapping[str, float]) -> Iterator[Finding]:
    import numpy as np
    import onnx

    largest = float(np.finfo(np.float16).max)
    known = dict(peaks)
    for init in graph.initializer:
        if init.data_type == onnx.TensorProto.FLOAT and math.prod(init.dims):
            with contextlib.suppress(OSError, ValueError):  # a missing file has its own rule
                values = onnx.numpy_helper.to_array(init, str(folder))
                known[init.name] = max(float(values.max()), -float(values.min()))
    for name, peak in sorted(known.items()):
        if not peak <= largest:
            yield Finding("float16-range", name, f"reaches {peak:g}, float16 ends at {largest:g}", "IEEE 754")


def _shapes(graph: onnx.GraphProto) -> dict[str, tuple[int, ...]]:
    return {
        value.name: tuple(
            d.dim_value if d.HasField("dim_value") else -1 for d in value.type.tensor_type.shape.dim
        )
        for value in (*graph.input, *graph.output, *graph.value_info)
        if value.type.tensor_type.HasField("shape")
    }


# ---- files of a compilation ----


@contextlib.contextmanager
def _fresh_folder(path: Path) -> Iterator[Path]:
    """Make an empty folder, whatever a run that was killed has left there, and remove it afterwards."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _limits(options: NpuOptions) -> tuple[int, float]:
    """Return the bytes and seconds that a compilation may take which starts now."""
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
    """Make the wrapper refer to the file name `context`; return the binary that it referred to, and the SDK.

    It also gets an old IR version, and loses what exporters left in the model's metadata.
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
    found = [path for path in folder.glob("*.json") if path.name.startswith(_PROVIDER)]
    graphs = [path for path in found if not path.name.endswith("_tensor_log.json")]
    if len(graphs) != 1:
        raise VendorError(f"the compiler described {len(graphs)} graphs, not one")
    return graphs[0]


# ---- the child process, seen from outside ----


class _Log:
    """What the library says of itself: versions, stages, refused operations and their reasons."""

    _ERRORS = ("[E:onnxruntime", "<E>", "terminate called", "  what():")
    _HARMLESS = ("unexpected GraphHtpSettings option", "Unsupported nodes in QNN EP")

    def __init__(self, progress: Progress) -> None:
        self.qnn_api = "unknown"
        self.stage = ""
        self.refused: dict[str, tuple[str, str]] = {}
        self.is_refused = False
        self.dram: DramBytes | None = None
        self.errors: deque[str] = deque(maxlen=5)
        self._progress = progress
        self._half = b""
        self._unit: str | None = None
        self._members: list[tuple[str, str]] = []

    def feed(self, chunk: bytes) -> None:
        *lines, self._half = (self._half + chunk).split(b"\n")
        for line in lines:
            self._read(line.decode(errors="replace"))

    def _read(self, line: str) -> None:
        if self._unit is not None and line.startswith("\t"):
            self._read_refusal(line)
            return
        self._unit = None
        if "Validation FAILED for" in line:
            self._unit, self._members = line.rpartition("(")[2].partition(")")[0], []
        elif "GetCapability pass" in line:
            # The first pass may refuse what the second one, after the layout has changed, takes.
            self.refused.clear()
        elif "ComposeGraph Graph name" in line:
            self.is_refused = bool(self.refused)
        elif "Starting stage: " in line:
            self.stage = line.rpartition("Starting stage: ")[2].strip()
            if self.stage in _STAGES:
                self._progress.advance(_STAGES[self.stage])
        elif match := re.search(r"\b(read|write)_total_bytes=(\d+)", line):
            known, count = self.dram or DramBytes(), int(match[2])
            reading = match[1] == "read"
            self.dram = DramBytes(count, known.written) if reading else DramBytes(known.read, count)
        elif match := re.search(r"Found valid interface, version: (\S+)", line):
            self.qnn_api = match[1]
        elif any(sign in line for sign in self._ERRORS) and not any(text in line for text in self._HARMLESS):
            self.errors.append(re.sub(r"\x1b\[[0-9;]*m|^.*?(QnnLogging\]\s*<E>|\w+\.cc:\d+ \w+\])", "", line))

    def _read_refusal(self, line: str) -> None:
        if match := re.search(r"Operator type: (\S+) Node name: (.*?) Node index:", line):
            self._members.append((match[1], match[2]))
        elif "REASON :" in line and self._members:
            reason = line.partition("REASON :")[2].strip()
            reason = re.sub(r"\.?\w+ node `.*` will not be assigned.*", "", reason)
            # Quantised operations come as a group, with the borders around the one that it is named for.
            kind, name = next((m for m in self._members if m[0] == self._unit), self._members[0])
            self.refused[name] = (kind, reason)


@dataclass(frozen=True)
class _Ran:
    result: dict[str, Any]
    log: _Log
    seconds: float
    peak_bytes: int


def _check_installed() -> None:
    step = "pip install 'mobilevd-deploy[npu]'"
    if (here := f"{platform.system()} {platform.machine()}") != "Linux x86_64":
        raise UsageError(
            f"the Hexagon compiler runs on Linux x86_64 only, not on {here}",
            next_step=f"on such a machine: {step}",
        )
    if importlib.util.find_spec("onnxruntime_qnn") is None:
        raise UsageError("onnxruntime-qnn is not installed, which holds the Hexagon compiler", next_step=step)


def _run_child(
    what: str,
    job: Mapping[str, Any],
    folder: Path,
    memory_bytes: int | None,
    timeout_s: float,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> _Ran:
    """Run a job with `folder` as its working folder; `what` begins every error."""
    _check_installed()
    code = f"from mobilevd_deploy.qnn import _child_main; _child_main(sys.argv[1], {os.getpid()})"
    begun, log = time.monotonic(), _Log(progress or Progress())
    with subprocess.Popen(
        [*own_python(code), json.dumps(job)],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        try:
            peak = _follow(process, what, log, memory_bytes, timeout_s, stop)
            status = process.wait()
        finally:
            process.kill()
    seconds = time.monotonic() - begun
    file = folder / "result.json"
    result = json.loads(file.read_bytes()) if file.is_file() else {}
    if error := _failure(what, Path(job["model"]), status, result, log):
        if shutil.disk_usage(folder).free < _FULL_DISK_BYTES:
            raise ResourceError(f"{what}: the disk is full", next_step="free some space") from error
        raise error
    return _Ran(result, log, seconds, max(peak, int(result["peak_bytes"])))


def _follow(
    process: subprocess.Popen[bytes],
    what: str,
    log: _Log,
    memory_bytes: int | None,
    timeout_s: float,
    stop: threading.Event | None,
) -> int:
    """Read the child's log to its end and hold it to its limits; return its peak memory in bytes."""
    assert process.stdout is not None
    poller, peak, begun = select.poll(), 0, time.monotonic()
    poller.register(process.stdout)
    while True:
        if poller.poll(_POLL_MS):
            chunk = os.read(process.stdout.fileno(), 2**16)
            log.feed(chunk)
            if not chunk:
                return peak
        if log.is_refused:  # to compile the rest could take minutes, for nothing
            process.kill()
            return peak
        if stop is not None and stop.is_set():
            raise CancelledError(what)
        peak = max(peak, peak_bytes(process.pid))
        if memory_bytes is not None and peak > memory_bytes:
            raise ResourceError(
                f"{what} takes more than {memory_bytes / 1e9:.2f} GB{_during(log)}",
                next_step="close other programs, raise npu.compiler_memory_gb in the recipe if it is set, "
                "or cut the UNet into more parts (npu.parts)",
            )
        if time.monotonic() - begun > timeout_s:
            raise VendorError(
                f"{what} was not done after {duration(timeout_s)}{_during(log)}",
                next_step="raise npu.compiler_hours in the recipe, or choose a lower npu.optimization_mode",
            )


def _failure(
    what: str, model: Path, status: int, result: Mapping[str, Any], log: _Log
) -> MobileVDError | None:
    """Say why the child did not do its job; None if it did."""
    if log.refused and (log.is_refused or status):
        return ExportError(
            f"{what}: {len(log.refused)} operations do not run on the NPU"
            + listed([*_describe_refused(model, log.refused)]),
            next_step="choose another graph form in the recipe",
        )
    if status == 0 and "error" not in result:
        return None
    said = "".join(f"\n  {line.strip()}" for line in dict.fromkeys(log.errors))
    if status == -signal.SIGKILL or "bad_alloc" in said or "MemoryError" in str(result.get("error")):
        return ResourceError(
            f"{what}: memory ran out{_during(log)}{said}",
            next_step="close other programs, or make the graph smaller",
        )
    if status < 0:
        return VendorError(
            f"{what}: Qualcomm's library crashed ({signal.Signals(-status).name}){_during(log)}{said}",
            next_step="try another npu.optimization_mode, or another graph form",
        )
    return VendorError(f"{what}: {result.get('error', f'it ended with status {status}')}{said}")


def _describe_refused(model: Path, refused: Mapping[str, tuple[str, str]]) -> Iterator[str]:
    import onnx

    graph = onnx.shape_inference.infer_shapes(onnx.load(model, load_external_data=False)).graph
    shapes = _shapes(graph)
    nodes = {node.name: node for node in graph.node}
    ours = {name: node for name in refused if (node := origin(name, nodes.keys())) is not None}
    for name in ours or refused:
        kind, reason = refused[name]
        node = nodes.get(ours.get(name, ""))
        shape = shapes.get(node.output[0]) if node is not None else None
        size = f" -> {'x'.join(map(str, shape))}" if shape else ""
        hint = "; its layer has no quantised output" if "standalone DQ" in reason else ""
        yield f"{ours.get(name, name)} ({kind}{size}): {reason}{hint}"


def _during(log: _Log) -> str:
    return f", in the stage '{log.stage}'" if log.stage else ""


# ---- the child process, from inside ----


def _child_main(job: str, parent_pid: int) -> None:
    """Do a job and write result.json into the working folder."""
    die_with_parent(parent_pid)
    try:
        result = _do(json.loads(job))
    except BaseException as error:  # reported by the parent, in its own words
        result = {"error": f"{type(error).__name__}: {error}"}
    result["peak_bytes"] = peak_bytes()
    aside = Path("result.json.new")
    aside.write_text(json.dumps(result))
    aside.rename("result.json")
    sys.stdout.flush()
    # The library's own tear-down takes long for a large graph, and may crash when all is done.
    os._exit(1 if "error" in result else 0)


def _do(job: Mapping[str, Any]) -> dict[str, Any]:
    """Create a session, which compiles or loads; run it if there are `feeds`."""
    import onnxruntime
    import onnxruntime_qnn

    # The reasons for a refusal stand in the verbose log alone; a simulation would drown in it.
    severity = 2 if "feeds" in job else 0
    onnxruntime.set_default_logger_severity(severity)
    onnxruntime.register_execution_provider_library(_PROVIDER, onnxruntime_qnn.get_library_path())
    device = next(d for d in onnxruntime.get_ep_devices() if d.ep_name == _PROVIDER)
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = severity
    settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    if "context" in job:
        settings.add_session_config_entry("ep.context_enable", "1")
        settings.add_session_config_entry("ep.context_file_path", job["context"])
        settings.add_session_config_entry("ep.context_embed_mode", "0")
    backend = {"backend_path": onnxruntime_qnn.get_qnn_htp_path()}
    settings.add_provider_for_devices([device], backend | job["options"])
    session = onnxruntime.InferenceSession(job["model"], settings)
    return {"outputs": _run_session(session, job["feeds"])} if "feeds" in job else {}


def _run_session(session: Any, names: Sequence[str]) -> list[str]:
    import numpy as np

    feeds = {name: np.load(f"in{i}.npy") for i, name in enumerate(names)}
    outputs = [output.name for output in session.get_outputs()]
    for i, value in enumerate(session.run(outputs, feeds)):
        np.save(f"out{i}.npy", value)
    return outputs
