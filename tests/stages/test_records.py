from __future__ import annotations

import errno
import json
import math
import os
import pickle
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from mobilevd_deploy.artifact.partial import PartialArtifact
from mobilevd_deploy.base.files import digest
from mobilevd_deploy.base.progress import Progress
from mobilevd_deploy.errors import ResourceError, UsageError
from mobilevd_deploy.stages.records import StageOutput, Stages

KEY = {"checkpoint": "abc", "tools": {"onnx": "1.23"}}


class Run:
    """Three stages that write what they are told, and note that they ran."""

    def __init__(self, output: Path, key=None, first="one", second="two", progress=None):
        self.ran: list[str] = []
        with PartialArtifact(output) as partial:
            self.root = partial.root
            stages = Stages(partial, key or KEY, progress)
            self.records = [
                stages.run(
                    "load", {"what": first}, lambda: self.write("load", partial.work / "a.bin", first)
                ),
                stages.run(
                    "rewrite", {"what": second}, lambda: self.write("rewrite", partial.work / "b.bin", second)
                ),
                stages.run("report", {}, lambda: self.write("report", None, "")),
            ]
            self.costs = stages.costs

    def write(self, name, path, text):
        self.ran.append(name)
        if path is None:
            return StageOutput(values={"drift": math.inf, "pair": (1, 2)})
        path.write_text(text)
        return StageOutput((path,), {"length": len(text)})


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out"


def test_a_second_run_finds_everything_done(output):
    first, second = Run(output), Run(output)
    assert first.ran == ["load", "rewrite", "report"]
    assert second.ran == []
    assert second.records == first.records
    assert second.costs == first.costs
    assert first.records[0].values == {"length": 3}
    assert first.records[2].values == {"drift": math.inf, "pair": [1, 2]}
    assert first.records[0].files[0].path == "work/a.bin"


def test_new_inputs_redo_the_stage_and_all_after_it(output):
    Run(output)
    assert Run(output, second="2").ran == ["rewrite", "report"]
    assert Run(output, first="1", second="2").ran == ["load", "rewrite", "report"]
    assert Run(output, first="1", second="2").ran == []


def test_another_key_starts_clean(output):
    run = Run(output)
    (run.root / "work" / "leftover").write_text("x")
    assert Run(output, key={"checkpoint": "abd"}).ran == ["load", "rewrite", "report"]
    assert not (run.root / "work" / "leftover").exists()


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_file_redoes_its_stage(output, damage):
    run = Run(output)
    path = run.root / "work" / "b.bin"
    if damage == "remove":
        path.unlink()
    else:
        path.write_text("twx" if damage == "flip" else "t")
    assert Run(output).ran[0] == "rewrite"
    assert path.read_text() == "two"


def test_a_stage_that_is_redone_with_another_outcome_redoes_those_after_it(output):
    run = Run(output)
    (run.root / "work" / "a.bin").unlink()

    class Different(Run):
        def write(self, name, path, text):
            return super().write(name, path, text + "!" if name == "load" else text)

    assert Different(output).ran == ["load", "rewrite", "report"]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"name": 1}', "\0"])
def test_a_damaged_record_counts_as_none(output, text):
    run = Run(output)
    (run.root / "stages" / "rewrite.json").write_text(text)
    assert Run(output).ran == ["rewrite"]  # with the same outcome, so the report stands


@pytest.mark.parametrize("text", [None, "", "other"])
def test_a_damaged_key_starts_clean(output, text):
    key = Run(output).root / "stages" / "key"
    key.unlink() if text is None else key.write_text(text)
    assert Run(output).ran == ["load", "rewrite", "report"]


def test_a_record_cannot_name_files_elsewhere(output, tmp_path):
    run = Run(output)
    (tmp_path / "a.bin").write_text("one")
    path = run.root / "stages" / "load.json"
    record = json.loads(path.read_text())
    record["files"][0]["path"] = "../a.bin"
    path.write_text(json.dumps(record))
    assert "load" in Run(output).ran


def test_a_stage_that_fails_leaves_no_record(output):
    def fail():
        raise KeyboardInterrupt

    Run(output)
    with PartialArtifact(output) as partial:
        stages = Stages(partial, KEY)
        with pytest.raises(KeyboardInterrupt):
            stages.run("load", {"what": "else"}, fail)
    assert Run(output).ran[0] == "load"


def test_a_name_runs_once(output):
    with PartialArtifact(output) as partial:
        stages = Stages(partial, KEY)
        stages.run("load", {}, StageOutput)
        with pytest.raises(ValueError, match="ran already"):
            stages.run("load", {}, StageOutput)


def test_pieces_of_a_stage_that_did_not_end(output):
    ran, said = [], []

    class Heard(Progress):
        def say(self, sentence):
            said.append(sentence)

    def run(inputs, last):
        with PartialArtifact(output) as partial:
            stages = Stages(partial, KEY)
            pieces = pickle.loads(pickle.dumps(stages.pieces("compile", inputs)))

            def piece(name):
                ran.append(name)
                path = partial.work / name
                path.write_text(name)
                return StageOutput((path,), {"length": len(name)})

            def stage():
                first = pieces.run("first", lambda: piece("first"), Heard())
                last()
                second = pieces.run("second", lambda: piece("second"), Heard())
                return StageOutput(values={"all": [first.values, second.values]})

            return stages.run("compile", inputs, stage).values

    def stop():
        raise KeyboardInterrupt

    for expected in (["first"], []):
        ran.clear()
        with pytest.raises(KeyboardInterrupt):
            run({"for": "SM8650"}, stop)
        assert ran == expected
    assert said == ["compile, first: done in an earlier run"]
    assert run({"for": "SM8650"}, lambda: None) == {"all": [{"length": 5}, {"length": 6}]}
    assert ran == ["second"]
    run({"for": "SM8750"}, lambda: None)
    assert ran == ["second", "first", "second"]
    (output.with_name(".out.partial") / "work" / "first").write_text("harmed")
    run({"for": "SM8750"}, lambda: None)  # no file of the stage itself
    run({"for": "SM8750", "anew": True}, lambda: None)
    assert ran[3:] == ["first", "second"]


def test_a_full_disk_inside_a_stage(output):
    def fill():
        raise OSError(errno.ENOSPC, "No space left on device")

    with PartialArtifact(output) as partial:
        stages = Stages(partial, KEY)
        with pytest.raises(ResourceError, match="about 4,096 bytes are needed"):
            stages.run("load", {}, fill, disk_bytes=4096)
        with pytest.raises(ResourceError, match="about 100,000,000,000,000,000 bytes"):
            stages.run("load", {}, StageOutput, disk_bytes=10**17)
        with pytest.raises(ResourceError, match=r"full: [0-9,]+ bytes are free"):
            stages.run("load", {}, fill)


def test_two_runs_in_the_same_output_refuse_each_other(output):
    with PartialArtifact(output), pytest.raises(UsageError, match="another run"):
        Run(output)


def killed_at(number: int, output: Path) -> bool:
    """Run in a child that is killed before its n-th change to the disk; False if it got through."""
    child = os.fork()
    if child == 0:
        seen = 0

        def hook(event, args):
            nonlocal seen
            changes = event in ("os.rename", "os.mkdir", "os.remove", "os.truncate") or (
                event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
            )
            if changes and str(output.parent) in str(args[0]):
                seen += 1
                if seen == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        code = 1
        try:
            sys.addaudithook(hook)
            Run(output)
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
    return os.WIFSIGNALED(status)


def test_killed_before_any_change_to_the_disk(tmp_path):
    number, redone = 0, []
    while True:
        number += 1
        output = tmp_path / str(number) / "out"
        output.parent.mkdir()
        killed = killed_at(number, output)
        run = Run(output)
        assert run.ran == ["load", "rewrite", "report"][3 - len(run.ran) :]  # resumed, never with a gap
        assert (run.root / "work" / "a.bin").read_text() == "one"
        assert (run.root / "work" / "b.bin").read_text() == "two"
        redone.append(len(run.ran))
        if not killed:
            break
    assert sorted(redone, reverse=True) == redone
    assert set(redone) == {0, 1, 2, 3}


def test_costs_are_measured_per_stage(output):
    def allocate():
        return StageOutput(values={"sum": float(np.ones(30_000_000).sum())})

    with PartialArtifact(output) as partial:
        stages = Stages(partial, KEY)
        stages.run("large", {}, allocate)
        stages.run("small", {}, StageOutput)
        large, small = stages.costs["large"], stages.costs["small"]
    assert large.peak_bytes > 240_000_000
    if sys.platform == "linux":
        assert small.peak_bytes < large.peak_bytes - 200_000_000
    assert 0 < large.seconds < 60


def test_progress_is_told(output):
    class Heard(Progress):
        def __init__(self):
            self.heard = []

        def begin(self, stage):
            self.heard.append(stage)

        def end(self, *, reused=False):
            self.heard.append(reused)

    first, second = Heard(), Heard()
    Run(output, progress=first)
    Run(output, progress=second)
    assert first.heard == ["load", False, "rewrite", False, "report", False]
    assert second.heard == ["load", True, "rewrite", True, "report", True]


def test_digests_ignore_the_order_of_keys_alone():
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": (1, 2), "a": 1})
    values = [{"a": 1}, {"a": "1"}, {"a": [1, 2]}, {"a": [2, 1]}, {"b": 1}, {"a": None}, {}]
    assert len({digest(value) for value in values}) == len(values)
