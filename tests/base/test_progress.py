from __future__ import annotations

import io
import re
import subprocess
import sys

import pytest

from mobilevd_deploy.base.progress import (
    LineProgress,
    LiveProgress,
    Progress,
    duration,
    make_progress,
    shares,
)


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_lines_and_the_estimate():
    stream, clock = io.StringIO(), Clock()
    progress = LineProgress(stream, clock)
    progress.plan({"load": 1, "rewrite": 2, "export": 6})
    progress.begin("load")
    clock.now += 10
    progress.end()
    progress.begin("rewrite")
    progress.end(reused=True)
    progress.begin("export")
    clock.now += 80
    progress.say("simplified")
    progress.end()
    assert stream.getvalue().splitlines() == [
        "[1/3] load ...",
        "[1/3] load: 10.0 s, about 1 min 20 s left",
        "[2/3] rewrite ...",
        "[2/3] rewrite: done in an earlier run",
        "[3/3] export ...",
        "simplified",
        "[3/3] export: 1 min 20 s",
    ]


def test_the_running_stage_counts_by_its_fraction():
    clock = Clock()
    progress = LineProgress(io.StringIO(), clock)
    progress.plan({"a": 1, "b": 1})
    progress.begin("a")
    assert progress.rest() == ""
    clock.now = 5
    progress.advance(0.5)
    assert progress.rest() == "about 15.0 s left"
    progress.advance(7)  # more than all of it
    assert progress.rest() == "about 5.0 s left"


def test_stages_that_nobody_planned():
    stream = io.StringIO()
    progress = LineProgress(stream, Clock())
    for name in ("a", "b"):
        progress.begin(name)
        progress.end()
    assert stream.getvalue().splitlines() == [
        "[1/1] a ...",
        "[1/1] a: 0.0 s",
        "[2/2] b ...",
        "[2/2] b: 0.0 s",
    ]


def test_tasks_side_by_side_add_up():
    stream, clock = io.StringIO(), Clock()
    progress = LineProgress(stream, clock)
    progress.plan({"compile": 1})
    progress.begin("compile")
    large, small = shares(progress, [3, 1])
    large.advance(0.5)
    small.advance(1.0)
    small.say("the small one is done")
    clock.now += 10
    assert progress.rest() == "about 6.0 s left"  # 5/8 are done
    assert "the small one is done" in stream.getvalue()


def test_the_kind_fits_the_stream():
    assert type(make_progress(quiet=True)) is Progress
    assert type(make_progress(stream=io.StringIO())) is LineProgress
    assert type(make_progress(stream=Terminal())) is LiveProgress
    assert type(make_progress(quiet=True, stream=Terminal())) is Progress


def test_live_on_a_terminal():
    stream = Terminal()
    with make_progress(stream=stream) as progress:
        progress.plan({"load [x]": 1, "export": 1})
        progress.begin("load [x]")
        progress.say("a [word] in between")
        progress.end()
        progress.begin("export")
        progress.end(reused=True)
    text = stream.getvalue()
    for part in ("a [word] in between", "[2/2] export: done in an earlier run"):
        assert part in text
    assert re.search(r"\[1/2\] load \[x\]: \d+\.\d s", text)


def test_live_leaves_the_terminal_alone_after_an_error():
    stream = Terminal()
    progress = make_progress(stream=stream)
    progress.__enter__()
    progress.begin("load")
    progress.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    hidden, shown = "\x1b[?25l", "\x1b[?25h"
    assert stream.getvalue().rfind(shown) > stream.getvalue().rfind(hidden) >= 0


def test_silent_takes_every_call():
    with Progress() as progress:
        progress.plan({"a": 1})
        progress.begin("a")
        progress.advance(0.5)
        progress.say("x")
        progress.end()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (3.24, "3.2 s"), (59.94, "59.9 s"), (59.96, "1 min 00 s"), (65, "1 min 05 s"),
     (3599, "59 min 59 s"), (3600, "1 h 00 min"), (7380, "2 h 03 min")],
)  # fmt: skip
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_the_runtime_modules_import_no_heavy_package():
    """`--help` must be fast, so these modules leave such packages alone until they need them."""
    code = (
        "import sys\n"
        "from mobilevd_deploy.artifact import artifact, partial\n"
        "from mobilevd_deploy.base import progress\n"
        "from mobilevd_deploy.config import recipe\n"
        "from mobilevd_deploy.runtime import media, noise, pipeline\n"
        "from mobilevd_deploy.stages import probe, records\n"
        "print([name for name in ('torch', 'onnx', 'onnxruntime', 'diffusers', 'imageio', 'rich')"
        " if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
