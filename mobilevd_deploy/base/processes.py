"""Work in a process of its own, whose memory goes when it ends and whose peak is known.

Steps          runs the steps of a stage: here, or, for a large network, each in a child process
side_by_side   runs tasks that wait for such a process, as many at a time as memory allows
own_python     command line of a child that finds the modules that this process would
peak_bytes     peak resident memory of a process
memory_bytes   memory of the machine, and what is free of it
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
    """Runs the steps of a stage, and keeps what each cost if they run `apart`, in a child process each.

    Neither torch nor onnxruntime gives back all of what it held, and a memory-mapped file counts as long as
    one of its tensors lives; so a large network takes one process for its trained form, one to rewrite, one
    to export and one to compare. For a small one the start of a process, seconds, would cost more.
    """

    def __init__(self, apart: bool, progress: Progress) -> None:
        self.apart = apart
        self._progress = progress
        self.costs: dict[str, StageCost] = {}

    def run(self, name: str, function: Callable[..., T], *arguments: Any) -> T:
        """Return function(*arguments, progress).

        Apart, the function has to be found by its name in a module, and arguments and result are pickled.
        Raises what it raises, and ResourceError or ExportError for a child that died.
        """
        if not self.apart:
            return function(*arguments, self._progress)
        begun = time.monotonic()
        result, peak = _run_apart(name, function, arguments, self._progress)
        self.costs[name] = StageCost(round(time.monotonic() - begun, 3), peak)
        return cast(T, result)


def _run_apart(
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
            stdout=subprocess.DEVNULL,  # a library's chatter; what is to be said comes through the pipe
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
                    f"{name}: its process was killed, as a system does that runs out of memory",
                    next_step="close other programs, or use a machine with more memory",
                ) from None
            raise ExportError(
                f"{name}: its process ended with status {status}",
                next_step="run it again, and report it if it ends there again",
            ) from None
        finally:
            process.kill()


class _Teller(Progress):
    """What the child tells, on its way to the parent's progress."""

    def __init__(self, parent: Connection) -> None:
        self._parent = parent

    def advance(self, fraction: float) -> None:
        self._parent.send(("advance", fraction, 0))

    def say(self, sentence: str) -> None:
        self._parent.send(("say", sentence, 0))


def _child_main(descriptor: int, parent_pid: int) -> None:
    """Receive a function and its arguments, send back what it tells and returns."""
    die_with_parent(parent_pid)
    parent = Connection(descriptor)
    kind: Literal["result", "error"]
    try:
        function, arguments = parent.recv()
        kind, value = "result", function(*arguments, _Teller(parent))
    except BaseException as error:  # raised again by the parent
        kind, value = "error", error
    try:
        parent.send((kind, value, peak_bytes()))
    except (pickle.PicklingError, TypeError, AttributeError):  # an error of a library, holding what it likes
        parent.send(("error", ExportError(f"{type(value).__name__}: {value}"), 0))
    # The libraries' own tear-down may crash when all is done.
    os._exit(0)


def side_by_side(
    tasks: Sequence[Callable[[threading.Event], T]],
    peaks: Sequence[float],
    seconds: Sequence[float],
    *,
    budget: float,
    workers: int,
) -> list[T]:
    """Run tasks in threads, each of which waits for a process of its own; return their results in order.

    Args:
        tasks: called with an event that asks to end at once; what they raise then does not matter.
        peaks: bytes that each will take at most.
        seconds: how long each will take, in any unit. The longest begin.
        budget: bytes that those which run at a time may take together; one alone runs whatever it takes.
        workers: how many run at a time, at most.

    Raises what the first task to fail raised, or KeyboardInterrupt, after the others have ended.
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
    """Return the command that runs Python code in a child with this process's modules, wherever it works."""
    path = [str(Path(entry).resolve()) for entry in sys.path]
    return [sys.executable, "-P", "-c", f"import sys; sys.path[:] = {path!r}\n{code}"]


def die_with_parent(parent_pid: int) -> None:
    """Linux: have this process killed when its parent ends, since nobody waits for an orphan's gigabytes."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent_pid:  # it ended before it was asked for
            os._exit(1)


def reset_peak() -> None:
    """Linux: let this process's peak begin anew."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_bytes(pid: int | None = None) -> int:
    """Peak resident memory of a process, of this one if left out; 0 for another that is gone.

    On Linux since `reset_peak`; elsewhere this process's alone, and since its start.
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
    """Return all memory that this process may use, and what is free of it; a container's limit counts."""
    page = os.sysconf("SC_PAGE_SIZE")
    there = page * os.sysconf("SC_PHYS_PAGES")
    free = there
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        free = int(found[1]) * 1024 if found else there
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{n}").read_text()) for n in ("max", "current"))
        # What was read from files counts as used, and is given back when it is wanted.
        cached = re.findall(
            r"^(?:in)?active_file (\d+)", Path("/sys/fs/cgroup/memory.stat").read_text(), re.M
        )
        used -= sum(map(int, cached))
    except (OSError, ValueError):  # not Linux, or no limit ("max")
        return there, free
    return min(there, limit), min(free, limit - used)


@dataclass(frozen=True)
class StageCost:
    """Wall time and peak resident memory of one stage: of the export's process, or of one that it started."""

    seconds: float
    peak_bytes: int
