"""Child processes: a child returns all of its memory when it ends, and its peak can be measured.

Steps          runs the steps of a stage in this process or, for a large network, each in a child
side_by_side   runs tasks that wait for child processes, as many at a time as memory allows
own_python     command line of a child that imports from the same places as this process
peak_bytes     peak resident memory of a process
memory_bytes   memory that this process may use, and how much of it is free
"""

from __future__ import annotations

import ctypes
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from mobilevd_deploy.base.progress import Progress
from mobilevd_deploy.errors import ExportError, ResourceError

T = TypeVar("T")
_PR_SET_PDEATHSIG = 1


class Steps:
    """Runs the steps of a stage; with `apart`, each in a child process whose time and peak go to `costs`.

    torch and onnxruntime do not free all of their memory, and a memory-mapped file counts as resident while
    one of its tensors is alive. So a large network gets a child process each to run the trained form, to
    rewrite, to export and to compare. A small network does not: a process takes seconds to start.
    """

    def __init__(self, apart: bool, progress: Progress) -> None:
        self.apart = apart
        self._progress = progress
        self.costs: dict[str, StageCost] = {}

    def run(self, name: str, function: Callable[..., T], *arguments: Any) -> T:
        """Return function(*arguments, progress).

        With `apart`, the function must be importable by module and name; arguments and result are pickled.
        Raises the function's errors. If the child dies: ResourceError where it was killed, else ExportError.
        """
        if not self.apart:
            return function(*arguments, self._progress)
        begun = time.monotonic()
        result, peak = _run_in_child(name, function, arguments, self._progress)
        self.costs[name] = StageCost(round(time.monotonic() - begun, 3), peak)
        return cast(T, result)


def _run_in_child(
    name: str, function: Callable[..., Any], arguments: tuple[Any, ...], progress: Progress
) -> tuple[Any, int]:
    ours, theirs = Pipe()
    code = f"from {__name__} import _child_main; _child_main({theirs.fileno()}, {os.getpid()})"
    with (
        ours,
        subprocess.Popen(
            own_python(code),
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # libraries print to it; our messages come through the pipe
        ) as process,
    ):
        theirs.close()
        try:
            ours.send((function, arguments))
            while True:
                kind, value, peak = ours.recv()
                if kind == "result":
                    return value, peak
                if kind == "error":
                    raise value
                getattr(progress, kind)(value)
        except (EOFError, ConnectionResetError, BrokenPipeError):
            status = process.wait()
            if status == -signal.SIGKILL:
                raise ResourceError(
                    f"{name}: the child process was killed; the system probably ran out of memory",
                    next_step="close other programs, or use a machine with more memory",
                ) from None
            raise ExportError(
                f"{name}: the child process ended with status {status}",
                next_step="run the same command again; report the error if it happens again",
            ) from None
        finally:
            process.kill()


class _PipeProgress(Progress):
    """Sends the child's progress to the parent."""

    def __init__(self, parent: Connection) -> None:
        self._parent = parent

    def advance(self, fraction: float) -> None:
        self._parent.send(("advance", fraction, 0))

    def say(self, sentence: str) -> None:
        self._parent.send(("say", sentence, 0))


def _child_main(descriptor: int, parent_pid: int) -> None:
    """Receive a function and its arguments; send its progress and its result or error to the parent."""
    die_with_parent(parent_pid)
    parent = Connection(descriptor)
    kind: Literal["result", "error"]
    try:
        function, arguments = parent.recv()
        kind, value = "result", function(*arguments, _PipeProgress(parent))
    except BaseException as error:  # raised again by the parent
        kind, value = "error", error
    try:
        parent.send((kind, value, peak_bytes()))
    except (pickle.PicklingError, TypeError, AttributeError):  # an error of a library may hold anything
        parent.send(("error", ExportError(f"{type(value).__name__}: {value}"), 0))
    # Skip the libraries' cleanup at exit: it may crash although the work is done.
    os._exit(0)


def side_by_side(
    tasks: Sequence[Callable[[threading.Event], T]],
    peaks: Sequence[float],
    seconds: Sequence[float],
    *,
    budget: float,
    workers: int,
) -> list[T]:
    """Run tasks, which wait for child processes, in threads; return their results in order.

    Args:
        tasks: called with an event that is set when the task must end at once. Errors after that are dropped.
        peaks: expected peak memory of each task, in bytes.
        seconds: expected time of each task, in any unit. The longest tasks start first.
        budget: memory that the running tasks may use together, in bytes. A task above it runs alone.
        workers: largest number of tasks that run at a time.

    Raises the error of the first task that fails, or KeyboardInterrupt, after all tasks have ended.
    """
    stop, results = threading.Event(), dict[int, T]()
    waiting = sorted(range(len(tasks)), key=lambda i: seconds[i], reverse=True)
    running: dict[Future[T], int] = {}
    with ThreadPoolExecutor(workers) as pool:
        try:
            while waiting or running:
                left = budget - sum(peaks[i] for i in running.values())
                fitting = [i for i in waiting if peaks[i] <= left or not running]
                if fitting and len(running) < workers:
                    waiting.remove(fitting[0])
                    running[pool.submit(tasks[fitting[0]], stop)] = fitting[0]
                    continue
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    results[running.pop(future)] = future.result()
        except BaseException:
            stop.set()
            raise
    return [results[i] for i in range(len(tasks))]


def own_python(code: str) -> list[str]:
    """Return a command that runs Python code in a child with this process's import path, in any folder."""
    path = [str(Path(entry).resolve()) for entry in sys.path]
    return [sys.executable, "-P", "-c", f"import sys; sys.path[:] = {path!r}\n{code}"]


def die_with_parent(parent_pid: int) -> None:
    """On Linux, have this process killed when its parent ends: an orphan would hold gigabytes for nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent_pid:  # the parent ended before the call above
            os._exit(1)


def reset_peak() -> None:
    """On Linux, reset this process's peak memory to its current memory."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_bytes(pid: int | None = None) -> int:
    """Return the peak resident memory in bytes of process `pid` (None: this one); 0 if it has ended.

    On Linux the peak counts from `reset_peak`. Other systems give this process's peak since its start, and 0
    for other processes.
    """
    try:
        for line in Path(f"/proc/{pid or 'self'}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    if pid is not None:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory_bytes() -> tuple[int, int]:
    """Return the memory that this process may use, and how much of it is free, in bytes.

    A container's limit (cgroup v2) is taken into account.
    """
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = total
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        free = int(found[1]) * 1024 if found else total
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{n}").read_text()) for n in ("max", "current"))
        # "current" includes the file cache, which the kernel frees on demand.
        cached = re.findall(
            r"^(?:in)?active_file (\d+)", Path("/sys/fs/cgroup/memory.stat").read_text(), re.M
        )
        used -= sum(map(int, cached))
    except (OSError, ValueError):  # not Linux, or no limit ("max")
        return total, free
    return min(total, limit), min(free, limit - used)


@dataclass(frozen=True)
class StageCost:
    """Wall time and peak resident memory of a stage: of the export's process or of a child process."""

    seconds: float
    peak_bytes: int
