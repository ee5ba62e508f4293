"""Steps in child processes: equal results and errors, memory that is returned, and dead children named."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from mobilevd_deploy.base import processes as apart
from mobilevd_deploy.base.processes import Steps, own_python, side_by_side
from mobilevd_deploy.base.progress import Progress
from mobilevd_deploy.config.recipe import load_recipe
from mobilevd_deploy.errors import ExportError, ParityError, ResourceError
from tests.support import ROOT


class Heard(Progress):
    def __init__(self) -> None:
        self.said: list[object] = []

    def advance(self, fraction: float) -> None:
        self.said.append(fraction)

    def say(self, sentence: str) -> None:
        self.said.append(sentence)


# The child imports these functions by name.


def add(a: int, b: int, progress: Progress) -> tuple[int, int]:
    progress.advance(0.5)
    progress.say("adding")
    print("chatter")
    return a + b, os.getpid()


def refuse(progress: Progress) -> None:
    raise ParityError("too far", next_step="come closer")


class UnspeakableError(Exception):
    def __init__(self) -> None:
        super().__init__("a lambda is in me")
        self.held = lambda: None


def refuse_in_a_library(progress: Progress) -> None:
    raise UnspeakableError


def die(number: int, progress: Progress) -> None:
    os.kill(os.getpid(), number)


def fill(megabytes: int, progress: Progress) -> float:
    return float(np.ones(megabytes * 2**17).sum())


def sleep(begun: Path, progress: Progress) -> None:
    begun.touch()
    time.sleep(600)


def child_of(pid: int) -> int | None:
    """The child process of a running step; importing torch starts other processes for a moment."""
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with contextlib.suppress(OSError):
            if "_child_main" in Path(f"/proc/{child}/cmdline").read_text():
                return int(child)
    return None


def is_gone(pid: int) -> bool:
    """Whether a process has ended; without an init process that reaps orphans, it remains as a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_here_and_apart_give_the_same(capfd: pytest.CaptureFixture[str]) -> None:
    here, there = Heard(), Heard()
    inside, outside = Steps(False, here), Steps(True, there)
    assert inside.run("add", add, 2, 3) == (5, os.getpid())
    assert capfd.readouterr().out == "chatter\n"
    result, pid = outside.run("add", add, 2, 3)
    assert result == 5
    assert pid != os.getpid()
    assert here.said == there.said == [0.5, "adding"]
    assert not inside.costs
    assert capfd.readouterr().out == ""


def test_the_memory_of_a_step_is_its_own() -> None:
    steps = Steps(True, Progress())
    steps.run("small", fill, 1)
    steps.run("large", fill, 300)
    steps.run("small again", fill, 1)
    small, large, again = (steps.costs[name].peak_bytes for name in ("small", "large", "small again"))
    assert large - small > 250 * 2**20
    assert abs(again - small) < 50 * 2**20


def test_errors_come_through() -> None:
    steps = Steps(True, Progress())
    with pytest.raises(ParityError, match="too far") as raised:
        steps.run("check", refuse)
    assert raised.value.next_step == "come closer"
    with pytest.raises(ExportError, match="UnspeakableError: a lambda is in me"):
        steps.run("check", refuse_in_a_library)


def test_a_death_is_named() -> None:
    steps = Steps(True, Progress())
    with pytest.raises(ResourceError, match=r"fold: the child process was killed; .* ran out of memory"):
        steps.run("fold", die, int(signal.SIGKILL))
    with pytest.raises(
        ExportError, match=f"fold: the child process ended with status -{int(signal.SIGSEGV)}"
    ):
        steps.run("fold", die, int(signal.SIGSEGV))


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's PR_SET_PDEATHSIG")
@pytest.mark.parametrize("killed", ["as the child starts", "as the step runs"])
def test_a_step_does_not_outlive_its_parent(tmp_path: Path, killed: str) -> None:
    begun = tmp_path / "begun"
    code = (
        f"from pathlib import Path\nfrom {__name__} import sleep\n"
        "from mobilevd_deploy.base.processes import Steps\n"
        "from mobilevd_deploy.base.progress import Progress\n"
        f"Steps(True, Progress()).run('sleep', sleep, Path({str(begun)!r}))"
    )
    root = ROOT
    until = time.monotonic() + 120
    parent = subprocess.Popen([*own_python(f"import sys; sys.path.insert(0, {str(root)!r})\n{code}")])
    try:
        while (child := child_of(parent.pid)) is None and time.monotonic() < until:
            time.sleep(0.001)
        assert child is not None
        if killed == "as the child starts":
            os.kill(child, signal.SIGSTOP)  # before it sets PR_SET_PDEATHSIG
            time.sleep(0.5)  # the parent sends it the step meanwhile
        while killed == "as the step runs" and not begun.exists() and time.monotonic() < until:
            time.sleep(0.01)
    finally:
        parent.kill()
        parent.wait()
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGCONT)
    while not is_gone(child) and time.monotonic() < until:
        time.sleep(0.05)
    assert is_gone(child)


@pytest.mark.slow
def test_a_large_network_is_exported_step_by_step(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Imported here: every child process of these tests imports this module, and deploy.py imports torch.
    flow = importlib.import_module("mobilevd_deploy.deploy")
    monkeypatch.setattr(flow, "APART_ABOVE_PARAMETERS", 0)
    artifact = flow.deploy(tiny_checkpoint, load_recipe("onnx"), tmp_path / "model")
    monkeypatch.undo()
    together = flow.deploy(tiny_checkpoint, load_recipe("onnx"), tmp_path / "together")
    for ours, theirs in zip(artifact.manifest.components, together.manifest.components, strict=True):
        assert {role: file.sha256 for role, file in ours.files.items()} == {
            role: file.sha256 for role, file in theirs.files.items()
        }
    steps = [name for name in artifact.manifest.stages if name.startswith("export unet: ")]
    assert steps == [f"export unet: {step}" for step in ("answer", "rewrite", "write", "compare")]
    peaks = [artifact.manifest.stages[step].peak_bytes for step in steps]
    assert artifact.manifest.stages["export unet"].peak_bytes >= max(peaks) > 0
    assert apart.peak_bytes() > 0


def test_tasks_share_a_budget() -> None:
    lock, running, most = threading.Lock(), set[int](), list[tuple[int, ...]]()

    def task(size: int, _stop: threading.Event) -> int:
        with lock:
            running.add(size)
            most.append(tuple(sorted(running)))
        time.sleep(0.1)
        with lock:
            running.remove(size)
        return 10 * size

    sizes = [1, 9, 4, 5, 2]
    tasks = [functools.partial(task, size) for size in sizes]
    assert side_by_side(tasks, sizes, sizes, budget=7, workers=2) == [10, 90, 40, 50, 20]
    assert most[0] == (9,)  # the longest first, and alone, since it is over the budget
    assert all(len(sizes) == 1 or sum(sizes) <= 7 for sizes in most)
    assert max(len(sizes) for sizes in most) == 2


def test_one_that_fails_ends_the_others() -> None:
    ended = []

    def fail(_stop: threading.Event) -> None:
        raise ResourceError("no more memory")

    def last(stop: threading.Event) -> None:
        ended.append(stop.wait(60))
        raise RuntimeError("an error after the first one")

    def never(_stop: threading.Event) -> None:
        raise AssertionError("this task must not start")

    with pytest.raises(ResourceError, match="no more memory"):
        side_by_side([last, fail, never], [1, 1, 1], [3, 2, 1], budget=10, workers=2)
    assert ended == [True]


def test_an_interruption_ends_all() -> None:
    ended = []

    def wait(stop: threading.Event) -> None:
        ended.append(stop.wait(60))

    def interrupt(stop: threading.Event) -> None:
        time.sleep(0.3)  # both run, and the main thread waits
        os.kill(os.getpid(), signal.SIGINT)
        wait(stop)

    with pytest.raises(KeyboardInterrupt):
        side_by_side([wait, interrupt], [1, 1], [1, 1], budget=2, workers=2)
    assert ended == [True, True]


def test_memory_of_a_container_is_free_though_it_caches_files(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {
        "/proc/meminfo": "MemTotal: 64000000 kB\nMemAvailable: 60000000 kB\n",
        "/sys/fs/cgroup/memory.max": "8000000000\n",
        "/sys/fs/cgroup/memory.current": "7900000000\n",
        "/sys/fs/cgroup/memory.stat": "anon 900000000\ninactive_file 5000000000\nactive_file 2000000000\n",
    }
    monkeypatch.setattr(Path, "read_text", lambda path: said[str(path)])
    assert apart.memory_bytes()[1] == 8_000_000_000 - 900_000_000
