"""Run Qualcomm's compiler and simulator in a child process: progress, limits, errors.

A child process, because the library may crash, use all memory or never end. Its verbose log is read line by
line: only the log gives the reasons for a refused operation. No other file imports onnxruntime_qnn.
"""

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

from mobilevd_deploy.base.files import write_durably
from mobilevd_deploy.base.processes import die_with_parent, own_python, peak_bytes
from mobilevd_deploy.base.progress import Progress, duration
from mobilevd_deploy.errors import ExportError, MobileVDError, ResourceError, UsageError, VendorError, listed
from mobilevd_deploy.qnn.compiled import DramBytes, origin

PROVIDER = "QNNExecutionProvider"


# Share of the compilation's time before each stage; measured on the demo's UNet.
_STAGES = {"Graph Optimizations": 0.2, "Graph Sequencing for Target": 0.7, "VTCM Allocation": 0.9}


_POLL_MS = 100


_FULL_DISK_BYTES = 2**20


class _Log:
    """What the library's log says: versions, stages, refused operations and the reasons."""

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
            # The second pass, after a change of layout, may accept what the first one refused.
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
            # A quantised operation comes as a group with its Q and DQ, and the group has its name.
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
        raise UsageError("the Hexagon compiler (onnxruntime-qnn) is not installed", next_step=step)


def run_child(
    what: str,
    job: Mapping[str, Any],
    folder: Path,
    memory_bytes: int | None,
    timeout_s: float,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> _Ran:
    """Run a job with `folder` as its working folder. Error messages start with `what`."""
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
    """Read the child's log to its end and enforce the limits; return its peak memory in bytes."""
    assert process.stdout is not None
    poller, peak, begun = select.poll(), 0, time.monotonic()
    poller.register(process.stdout)
    while True:
        if poller.poll(_POLL_MS):
            chunk = os.read(process.stdout.fileno(), 2**16)
            log.feed(chunk)
            if not chunk:
                return peak
        if log.is_refused:  # compiling the rest could take minutes
            process.kill()
            return peak
        if stop is not None and stop.is_set():
            raise CancelledError(what)
        peak = max(peak, peak_bytes(process.pid))
        if memory_bytes is not None and peak > memory_bytes:
            raise ResourceError(
                f"{what} needs more than {memory_bytes / 1e9:.2f} GB{_during(log)}",
                next_step="close other programs, raise npu.compiler_memory_gb in the recipe if it is set, "
                "or cut the UNet into more parts (npu.parts)",
            )
        if time.monotonic() - begun > timeout_s:
            raise VendorError(
                f"{what} has not ended after {duration(timeout_s)}{_during(log)}",
                next_step="raise npu.compiler_hours in the recipe, or choose a lower npu.optimization_mode",
            )


def _failure(
    what: str, model: Path, status: int, result: Mapping[str, Any], log: _Log
) -> MobileVDError | None:
    """Return the error of a child that failed; None if it succeeded."""
    if log.refused and (log.is_refused or status):
        return ExportError(
            f"{what}: {len(log.refused)} operations do not run on the NPU"
            + listed([*_describe_refused(model, log.refused)]),
            next_step="choose another graph form in the recipe",
        )
    if status == 0 and "error" not in result:
        return None
    logged = "".join(f"\n  {line.strip()}" for line in dict.fromkeys(log.errors))
    if status == -signal.SIGKILL or "bad_alloc" in logged or "MemoryError" in str(result.get("error")):
        return ResourceError(
            f"{what}: memory ran out{_during(log)}{logged}",
            next_step="close other programs, or make the graph smaller",
        )
    if status < 0:
        return VendorError(
            f"{what}: Qualcomm's library crashed ({signal.Signals(-status).name}){_during(log)}{logged}",
            next_step="try another npu.optimization_mode, or another graph form",
        )
    return VendorError(f"{what}: {result.get('error', f'it ended with status {status}')}{logged}")


def _describe_refused(model: Path, refused: Mapping[str, tuple[str, str]]) -> Iterator[str]:
    from mobilevd_deploy.base.graphs import fixed_shape, read_shaped

    nodes = {node.name: node for node in read_shaped(model).graph if node.name}
    ours = {name: node for name in refused if (node := origin(name, nodes.keys())) is not None}
    for name in ours or refused:
        kind, reason = refused[name]
        made_by = nodes.get(ours.get(name, ""))
        shape = fixed_shape(made_by.outputs[0]) if made_by is not None else None
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
    except BaseException as error:  # the parent reports it
        result = {"error": f"{type(error).__name__}: {error}"}
    result["peak_bytes"] = peak_bytes()
    write_durably(Path("result.json"), json.dumps(result))
    sys.stdout.flush()
    # The library takes long to unload a large graph, and may crash then.
    os._exit(1 if "error" in result else 0)


def _do(job: Mapping[str, Any]) -> dict[str, Any]:
    """Create a session, which compiles or loads the model; run it if the job has `feeds`."""
    import onnxruntime
    import onnxruntime_qnn

    # Only the verbose log has the reasons for a refusal. A simulation would write too much of it.
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
