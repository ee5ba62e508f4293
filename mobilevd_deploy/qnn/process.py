"""The vendor's compiler and simulator in a child process: progress, limits, errors."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobilevd_deploy.base.processes import die_with_parent, own_python, peak_bytes
from mobilevd_deploy.base.progress import Progress, duration
from mobilevd_deploy.errors import ExportError, MobileVDError, ResourceError, UsageError, VendorError, listed
from mobilevd_deploy.qnn.compiled import DramBytes, origin
from mobilevd_deploy.qnn.split import tensor_shapes

PROVIDER = "QNNExecutionProvider"


# Where the compiler's stages begin, as parts of the whole; measured on the demo's UNet.
_STAGES = {"Graph Optimizations": 0.2, "Graph Sequencing for Target": 0.7, "VTCM Allocation": 0.9}


_POLL_MS = 100


_FULL_DISK_BYTES = 2**20


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


def check_installed() -> None:
    """Raise UsageError unless onnxruntime-qnn can run here."""
    step = "pip install 'mobilevd-deploy[npu]'"
    if (here := f"{platform.system()} {platform.machine()}") != "Linux x86_64":
        raise UsageError(
            f"the Hexagon compiler runs on Linux x86_64 only, not on {here}",
            next_step=f"on such a machine: {step}",
        )
    if importlib.util.find_spec("onnxruntime_qnn") is None:
        raise UsageError("onnxruntime-qnn is not installed, which holds the Hexagon compiler", next_step=step)


def run_child(
    what: str,
    job: Mapping[str, Any],
    folder: Path,
    memory_bytes: int | None,
    timeout_s: float,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> _Ran:
    """Run a job with `folder` as its working folder; `what` begins every error."""
    check_installed()
    code = f"from {__name__} import _child_main; _child_main(sys.argv[1], {os.getpid()})"
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
    shapes = tensor_shapes(graph)
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
    onnxruntime.register_execution_provider_library(PROVIDER, onnxruntime_qnn.get_library_path())
    device = next(d for d in onnxruntime.get_ep_devices() if d.ep_name == PROVIDER)
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
