"""The real client against a loopback server. Every number that is measured here is made up by the server."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from qai_hub import public_api_pb2 as pb
from rich.console import Console

from mobilevd_deploy.artifact.artifact import Artifact
from mobilevd_deploy.artifact.manifest import FileEntry
from mobilevd_deploy.artifact.partial import PartialArtifact
from mobilevd_deploy.base.progress import LineProgress
from mobilevd_deploy.cli.main import main
from mobilevd_deploy.cli.tables import render_profile
from mobilevd_deploy.config.presets import load_preset
from mobilevd_deploy.errors import ArtifactError, SpecError, UsageError, VendorError
from mobilevd_deploy.profiling.estimate import load_calibration
from mobilevd_deploy.profiling.hub.client import Hub
from mobilevd_deploy.profiling.hub.hosted import HostedDevice
from mobilevd_deploy.profiling.hub.ledger import LEDGER, Book, Request, read_ledger
from mobilevd_deploy.profiling.hub.result import read_result
from mobilevd_deploy.profiling.hub.run import profile_on_hub, refresh_jobs
from mobilevd_deploy.profiling.store import load_profile, load_profiles, profiles_dir
from mobilevd_deploy.runtime.recording import run_on_host
from tests.support import golden
from tests.support.hub_server import S24, S25, TOKEN, Fault, HubServer, made_up_detail
from tests.support.tiny_artifact import build, write_artifact

ONE = Request((S24,), ("image_encoder",), compile="onnx")
ALL = Request((S24,), compile="onnx")
COMPONENTS = ("image_encoder", "vae_encoder", "unet", "decoder")


@pytest.fixture
def server():
    with HubServer() as server:
        yield server
    assert not server.broken, server.broken[0]


@pytest.fixture
def artifact(tmp_path):
    return write_artifact(tmp_path / "tiny")


@pytest.fixture
def configured(server, tmp_path, monkeypatch):
    path = server.ini(tmp_path / "client.ini")
    monkeypatch.setenv("QAIHUB_CLIENT_INI", str(path))
    return path


class Runner:
    """Runs `profile_on_hub`, and keeps everything that was said or raised."""

    def __init__(self, artifact):
        self.artifact = artifact
        self.said = io.StringIO()
        self.trace = ""

    def __call__(self, request, *, wait=True):
        progress = LineProgress(self.said)
        try:
            return profile_on_hub(self.artifact, request, Hub.open(), progress, wait=wait, poll_seconds=0.01)
        except BaseException as error:
            told = traceback.TracebackException.from_exception(error, capture_locals=True)
            self.trace += "".join(told.format())
            raise

    @property
    def folder(self):
        return profiles_dir(self.artifact)


@pytest.fixture
def run(artifact, configured, tmp_path, capfd):
    runner = Runner(artifact)
    yield runner
    captured = capfd.readouterr()
    assert captured.out == ""  # the client's chatter does not mix with our result
    everything = [runner.said.getvalue(), runner.trace, captured.err]
    everything += [
        p.read_bytes().decode("latin-1") for p in tmp_path.rglob("*") if p.is_file() and p != configured
    ]
    assert not any(TOKEN in text for text in everything)


def test_the_whole_flow(run, server, artifact):
    before = {path: path.read_bytes() for path in artifact.root.rglob("*") if path.is_file()}
    outcome = run(dataclasses.replace(ALL, samples=7))
    ((path, profile),) = outcome.profiles
    options = server.jobs["j0001"].pb.compile_job.options
    assert options.startswith("--target_runtime qnn_context_binary --qnn_options ")
    assert options.endswith("default_graph_htp_precision=FLOAT16")
    assert server.jobs["j0002"].pb.inference_job.options == "--compute_unit npu --max_profiler_iterations 7"
    assert path.parent == run.folder
    assert [c.name for c in profile.components] == list(COMPONENTS)
    assert (profile.source, profile.device, profile.asked_for) == ("hub", S24, S24)
    unet = profile.components[2]
    assert (unet.ms.median, unet.ms.p95, unet.ms.min, unet.ms.samples) == (3.0, 4.0, 2.0, 4)
    assert (unet.first_load_ms, unet.warm_load_ms, unet.peak_bytes) == (800.0, 300.0, 5_000_000)
    assert unet.ops == {"NPU": 7, "CPU": 1}
    assert [op.ms for op in unet.slowest] == [0.6, 0.5, 0.4, 0.3, 0.2]
    assert profile.total_ms == 12.0
    assert profile.tools["qairt of unet (hub)"] == "2.99.0-made-up"
    assert len(server.uploaded) == 4
    assert {path: path.read_bytes() for path in before} == before
    Artifact.open(artifact.root).verify()
    assert load_profiles(artifact) == [profile]
    assert outcome.run.finished


def test_made_up_numbers_say_so(run):
    ((_, profile),) = run(ONE).profiles
    console = Console(file=io.StringIO(), width=200)
    console.print(render_profile(profile))
    shown = console.file.getvalue()
    assert profile.made_up
    assert "MADE UP by a server on this computer" in shown
    assert "measured through" not in shown
    assert "the numbers are made up" in shown
    assert "compiled by the hub" in shown
    assert "excludes 3 of the artifact's components" in shown


def test_a_model_travels_in_parts_and_arrives_whole(run, server, artifact):
    run(ALL)
    onnx = [artifact.path(c, "model").read_bytes() for c in artifact.manifest.components]
    contents = list(server.contents.values())
    assert contents[:3] == onnx[:3]
    # The decoder's weights lie outside its graph, so it travels as an archive of a folder.
    assert len(server.parts[list(server.contents)[3]]) > 2
    assert contents[3].startswith(b"PK")
    assert not list(run.folder.glob(".upload-*"))


def test_equal_content_is_uploaded_once(run, server):
    run(ONE)
    run(dataclasses.replace(ONE, components=("image_encoder", "unet")))
    assert len(server.uploaded) == 2
    assert "is uploaded already" in run.said.getvalue()
    assert len(load_profiles(run.artifact)) == 2


def test_what_the_hub_forgot_is_uploaded_again(run, server):
    run(ONE)
    server.models.clear()
    run(ONE)
    assert len(server.uploaded) == 2


def test_several_devices_at_once_share_uploads_and_equal_devices_share_jobs(run, server):
    outcome = run(dataclasses.replace(ONE, devices=("Xiaomi 14 Pro", S25, S24)))
    profiles = [profile for _, profile in outcome.profiles]
    assert [p.asked_for for p in profiles] == ["Xiaomi 14 Pro", S25, S24]
    assert [p.device for p in profiles] == [S24, S25, S24]
    assert "not hosted" in profiles[0].notes[0]
    assert not any("not hosted" in note for note in profiles[2].notes)
    assert len(server.uploaded) == 1
    assert len(server.jobs) == 4


def test_an_unknown_device_or_component_stops_before_any_upload(run, server):
    with pytest.raises(UsageError, match="called 'Nokia 3310'"):
        run(dataclasses.replace(ONE, devices=(S24, "Nokia 3310")))
    with pytest.raises(UsageError, match="no component 'clip'"):
        run(dataclasses.replace(ONE, components=("clip",)))
    with pytest.raises(UsageError, match="no device is named"):
        run(dataclasses.replace(ONE, devices=()))
    assert server.count("^POST") == 0


def test_without_a_context_binary_it_says_what_to_do(run):
    with pytest.raises(UsageError, match=r"no context binary of image_encoder") as caught:
        run(dataclasses.replace(ONE, compile=None))
    assert "--compile-on hub" in caught.value.next_step


def test_the_check_compares_with_this_computer(run, server):
    server.noise = 1e-3
    ((_, profile),) = run(dataclasses.replace(ALL, check=True)).profiles
    found = {c.name: c.check.sqnr_db for c in profile.components}
    host = run_on_host(run.artifact, None)
    for name, (_, output) in host.items():
        noise = 1e-3 * np.random.default_rng(0).standard_normal(output.shape)
        expected = 10 * np.log10(np.sum(np.square(output, dtype=np.float64)) / np.sum(noise**2))
        assert found[name] == pytest.approx(expected, abs=0.01), name
    assert [job.kind for job in server.jobs.values()].count("inference") == 4
    server.noise = 0.0
    ((_, profile),) = run(dataclasses.replace(ALL, check=True)).profiles
    assert all(c.check.sqnr_db is None or c.check.sqnr_db > 100 for c in profile.components)
    assert len(server.uploaded) == 4
    assert server.count("^POST /api/v1/datasets/") == 4


def test_a_check_that_fails_leaves_the_times(run, server):
    check = dataclasses.replace(ONE, check=True)
    server.reasons["inference"] = "wrong input"
    ((_, profile),) = run(check).profiles
    assert profile.total_ms == 3.0
    assert "inference job" in profile.errors[0]
    server.reasons.clear()
    server.noise = float("nan")
    ((_, profile),) = run(check).profiles
    assert profile.total_ms == 3.0
    assert "the check failed: the device's output holds NaN" in profile.errors[0]


@pytest.fixture
def own(run, tmp_path):
    """A run of an artifact that has binaries."""
    run.artifact = golden.write_artifact(tmp_path / "own")
    return run


def test_the_artifacts_own_binaries_are_what_is_profiled_by_default(own, server):
    """Wrapper and binary go up together, part by part; nothing is compiled."""
    ((_, profile),) = own(Request(("Xiaomi 14 Pro",), samples=7)).profiles
    assert {job.kind for job in server.jobs.values()} == {"profile"}
    names = [job.pb.inference_job.name for job in server.jobs.values()]
    assert names[2:4] == ["tiny unet profile", "tiny unet profile part 2"]
    assert len(server.uploaded) == 5
    first = own.artifact.manifest.component("unet").npu[0].parts[0].files
    with zipfile.ZipFile(io.BytesIO(list(server.contents.values())[2])) as archive:
        assert sorted(archive.namelist()) == ["unet.onnx/part0.bin", "unet.onnx/part0.onnx"]
        for entry in first.values():
            name = f"unet.onnx/{Path(entry.path).name}"
            assert archive.read(name) == (own.artifact.root / entry.path).read_bytes()
    assert {model.model_type for model in server.models.values()} == {pb.MODEL_TYPE_ONNX}
    assert not any("compiled by the hub" in note for note in profile.notes)
    unet = profile.components[2]
    assert (unet.ms.median, unet.ms.p95, unet.ms.min, unet.ms.samples) == (6.0, 8.0, 4.0, 4)
    assert (unet.first_load_ms, unet.ops, unet.peak_bytes) == (1600.0, {"NPU": 14, "CPU": 2}, 5_000_000)
    assert profile.total_ms == 15.0
    assert "unet is 2 binaries, profiled one by one: its times are their sums" in profile.notes


def test_a_check_of_a_split_component_goes_from_part_to_part_on_the_device(own, server):
    ((_, profile),) = own(Request((S24,), check=True)).profiles
    assert all(c.check.sqnr_db is None or c.check.sqnr_db > 100 for c in profile.components)
    assert [job.kind for job in server.jobs.values()].count("inference") == 5
    # What the first part gives is what the second one gets: an error of the device adds up.
    server.noise = 0.1
    ((_, noisy),) = own(Request((S24,), ("unet",), check=True)).profiles
    output = run_on_host(own.artifact, None)["unet"][1]
    noise = 0.2 * np.random.default_rng(0).standard_normal(output.shape)
    expected = 10 * np.log10(np.sum(np.square(output, dtype=np.float64)) / np.sum(noise**2))
    assert noisy.components[0].check.sqnr_db == pytest.approx(expected, abs=0.01)


def test_a_part_that_fails_in_a_check_ends_it(own, server):
    server.reasons["inference tiny unet"] = "no memory"
    ((_, profile),) = own(Request((S24,), ("unet",), check=True)).profiles
    assert profile.total_ms == 6.0
    assert "inference job j0002 failed: no memory" in profile.errors[0]
    assert len(server.jobs) == 3


def test_a_split_check_is_resumed_where_it_stood(own, server):
    request = Request((S24,), ("unet",), check=True)
    own(request, wait=False)
    assert [job.kind for job in server.jobs.values()] == ["profile", "inference", "profile"]
    ((_, profile),) = own(None).profiles
    assert profile.components[0].check is not None
    assert [job.kind for job in server.jobs.values()] == ["profile", "inference", "profile", "inference"]


def test_a_chip_without_a_binary_is_refused_before_any_upload(own, server):
    with pytest.raises(
        UsageError, match=r"no context binary of image_encoder for .*Elite, only for SM8650"
    ) as e:
        own(Request((S24, S25)))
    assert "--target" in e.value.next_step
    assert server.count("^POST") == 0


@pytest.mark.parametrize(
    ("offered", "option", "note"),
    [
        ({"2.49.0": ("default",), "2.51.0": ("latest",)}, "--qairt_version 2.51", None),
        ({"2.50.0": ("default",), "2.53.0": ("latest",)}, "--qairt_version 2.53", "a newer runtime loads it"),
        (
            {"2.47.0": (), "2.49.0": ("default", "latest")},
            "--qairt_version 2.49",
            "an older runtime may refuse",
        ),
        ({}, "", None),
    ],
)
def test_versions_of_both_sides_are_recorded_and_a_mismatch_explained(own, server, offered, option, note):
    server.qairt = offered
    ((_, profile),) = own(Request((S24,), ("unet",))).profiles
    assert (
        server.jobs["j0001"]
        .pb.inference_job.options.removeprefix("--compute_unit npu --max_profiler_iterations 100")
        .strip()
        == option
    )
    assert profile.tools["qairt of unet"] == "v2.51.0.260929181845"
    assert profile.tools.get("qairt on the device (hub)", "")[:4] == option[-4:]
    said = [text for text in profile.notes if "compiled with QAIRT 2.51.0, run with" in text]
    assert [note in text for text in said] == ([True] if note else [])


def test_a_mismatch_is_explained_where_the_hub_compiled_too(run, server):
    for runtime, explained in (("2.49.0", True), ("2.99.0", False)):
        server.qairt = {runtime: ("default",)}
        ((_, profile),) = run(ONE).profiles
        words = "compiled with QAIRT 2.99.0, run with 2.49.0 (the hub's): an older runtime may refuse"
        assert any(words in note for note in profile.notes) == explained


def test_the_hubs_compiler_starts_from_the_quantised_graph_or_from_aimets_encodings(run, server, tmp_path):
    with PartialArtifact(tmp_path / "quantised") as partial:
        manifest = build(partial.artifact)
        folder = partial.artifact / "unet" / "quantised"
        folder.mkdir()
        write_quantised(folder / "model.onnx")
        unet = manifest.component("unet")
        entry = FileEntry.of(partial.artifact, folder / "model.onnx")
        unet = dataclasses.replace(unet, files=unet.files | {"quantised": entry})
        components = tuple(unet if c.name == "unet" else c for c in manifest.components)
        run.artifact = partial.finish(dataclasses.replace(manifest, components=components))
    ((_, profile),) = run(Request((S24,), ("unet",), compile="onnx")).profiles
    assert list(server.contents.values()) == [(run.artifact.root / entry.path).read_bytes()]
    assert server.jobs["j0001"].pb.compile_job.options == "--target_runtime qnn_context_binary"
    ((_, profile),) = run(Request((S24,), ("unet",), compile="aimet", check=True)).profiles
    with zipfile.ZipFile(io.BytesIO(list(server.contents.values())[1])) as archive:
        assert sorted(archive.namelist()) == ["unet.aimet/model.encodings", "unet.aimet/model.onnx"]
        encodings = json.loads(archive.read("unet.aimet/model.encodings"))
    assert [e["name"] for e in encodings["activation_encodings"]] == ["noise"]
    assert [model.model_type for model in server.models.values()][2] == pb.MODEL_TYPE_AIMET_ONNX
    assert any("ONNX and AIMET's encodings" in note for note in profile.notes)
    assert profile.components[0].check.sqnr_db is None or profile.components[0].check.sqnr_db > 100
    with pytest.raises(UsageError, match="decoder: not quantised"):
        run(Request((S24,), ("decoder",), compile="aimet"))
    with pytest.raises(UsageError, match="no run is unfinished"):
        run(None)


def write_quantised(path):
    """The tiny UNet with its first input on a grid of 16 bits."""
    model = onnx.load(path.parent.parent / "model.onnx")
    model.graph.initializer.append(numpy_helper.from_array(np.float32(1e-3), "scale"))
    model.graph.initializer.append(numpy_helper.from_array(np.uint16(32768), "zero"))
    pair = [
        helper.make_node("QuantizeLinear", ["noise", "scale", "zero"], ["q"], "noise/Q"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["dq"], "noise/DQ"),
    ]
    nodes = list(model.graph.node)
    for node in nodes:
        node.input[:] = ["dq" if name == "noise" else name for name in node.input]
    del model.graph.node[:]
    model.graph.node.extend([*pair, *nodes])
    onnx.save(model, path)


def test_the_host_run_gives_each_component_what_the_pipeline_gives_it(artifact):
    taken = run_on_host(artifact, None)
    assert list(taken) == list(COMPONENTS)
    for component in artifact.manifest.components:
        for tensor in component.inputs:
            if tensor.source.startswith("component:"):
                assert np.array_equal(taken[component.name][0][tensor.name], taken[tensor.source[10:]][1])


def test_a_failed_job_gives_the_hubs_reason_and_the_place_of_its_log(run, server):
    server.reasons["profile tiny unet"] = f"out of memory on the device, token {TOKEN}"
    ((_, profile),) = run(ALL).profiles
    assert profile.total_ms is None
    assert [c.ms is None for c in profile.components] == [False, False, True, False]
    (error,) = profile.errors
    assert "unet: profile job" in error
    assert "out of memory on the device, token [token]" in error
    place = Path(re.search(r"log: (.*)\)", error)[1])
    assert [path.read_text()[-8:] for path in place.iterdir()] == [" [token]"]


def test_what_waits_for_a_failed_compilation_is_not_waited_for(run, server):
    server.reasons["compile_job tiny image_encoder"] = "op Foo is not supported"
    ((_, profile),) = run(dataclasses.replace(ONE, check=True)).profiles
    assert "compile job j0001 failed: op Foo is not supported" in profile.errors[0]


def test_a_log_that_cannot_be_had_is_no_second_failure(run, server):
    server.reasons["profile"] = "no luck"
    server.faults.append(Fault("GET .*artifact_list", status=404))
    ((_, profile),) = run(ONE).profiles
    assert "no luck (no log: " in profile.errors[0]


def test_a_slow_queue_is_waited_for(run, server):
    server.looks = 40
    run(ONE)
    said = run.said.getvalue()
    assert said.count("provisioning device") == 1
    assert said.index("profile created") < said.index("provisioning") < said.index("measuring")


@pytest.mark.parametrize(
    ("pattern", "status", "body", "words", "advice"),
    [
        ("GET .*devices", 401, "", "token is refused", "account page"),
        ("POST .*models", 401, "", "token is refused", "client.ini"),
        ("POST .*jobs", 404, "nothing here", "nothing here", "without --resume"),
        ("POST .*models/$", 413, "too big", "too large for the hub", "fewer --components"),
        ("GET .*devices", 426, "old", "no longer speaks", "upgrade qai-hub"),
        ("POST .*jobs", 400, '{"detail": "bad option"}', "bad option", "start a new run"),
        (
            "POST .*jobs",
            400,
            '{"detail": "device X is retired"}',
            "device X is retired",
            "devices --hub lists",
        ),
        ("POST .*jobs", 409, '{"detail": "conflict"}', "conflict", "start a new run"),
        ("POST .*jobs", 403, "", "may not", "organisation"),
        ("PUT /part", 403, "<Code>Expired</Code>", "store 127.0.0.1", "--resume"),
        ("POST .*jobs", 400, f"you sent {TOKEN}", r"you sent \[token\]", "start a new run"),
    ],
)
def test_each_refusal_is_one_clear_error(run, server, pattern, status, body, words, advice):
    """A resumed run would repeat the request, so only the store's refusal (an expired address) advises it."""
    server.faults.append(Fault(pattern, status=status, body=body))
    with pytest.raises(VendorError, match=words) as caught:
        run(ONE)
    assert advice in caught.value.next_step
    assert f"(HTTP {status})" in caught.value.what or status == 404
    refused_by_the_hub = "/part" not in pattern
    assert ("--resume" in caught.value.next_step.replace("without --resume", "")) != refused_by_the_hub
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


@pytest.mark.parametrize(
    "pattern", ["GET .*devices", "POST .*models/$", "POST .*jobs", "GET .*jobs", "GET .*result"]
)
@pytest.mark.parametrize("raw", [b"\xff\xff\xff\xff\xff\xff", b""])
def test_garbage_is_an_error_or_nothing_but_never_a_crash(run, server, pattern, raw):
    server.faults.append(Fault(pattern, raw=raw))
    try:
        ((_, profile),) = run(ONE).profiles
    except (VendorError, UsageError) as error:
        told = error.next_step or error.what
    else:
        told = profile.errors[0]
    assert any(
        words in told
        for words in (
            "makes no sense",
            "is invalid",
            "same command again",
            "--resume",
            "--hub lists",
            "devices lists",
        )
    )


@pytest.fixture
def hurried(monkeypatch):
    """The client tries as often as ever, but waits no time in between; benchmarks/hub_faults.py lets it."""
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))


@pytest.mark.parametrize(("status", "words"), [(429, "wants fewer calls"), (503, "service is down")])
def test_a_service_that_stays_away_is_one_clear_error(run, server, hurried, status, words):
    server.faults.append(Fault("GET .*devices", status=status))
    with pytest.raises(VendorError, match=words) as caught:
        run(ONE)
    assert "the same command again" in caught.value.next_step  # there is nothing to resume yet
    assert server.count("GET .*devices") == 7


@pytest.mark.parametrize("pattern", ["POST .*jobs", "GET .*jobs/j0002"])
@pytest.mark.parametrize(
    ("status", "words"), [(429, "wants fewer calls"), (500, "service is down"), (None, "cannot be reached")]
)
def test_a_fault_that_lasts_is_one_clear_error_and_resume_goes_on(
    run, server, hurried, pattern, status, words
):
    """While submitting and while waiting; None: the service dies.

    Not begun by `run`: it shows the client's jobs, and they would ask the service that is away.
    """
    server.faults.append(Fault(pattern, status=status, after=1, act=None if status else server.stop))
    with pytest.raises(VendorError, match=words) as caught:
        profile_on_hub(run.artifact, ONE, Hub.open(), poll_seconds=0.01)
    assert "--resume" in caught.value.next_step
    server.faults.clear()
    server.stop()
    server.start()
    ((_, profile),) = run(None).profiles
    assert profile.total_ms == 3.0
    assert len(server.uploaded) == 1
    assert [job.kind for job in server.jobs.values()] == ["compile_job", "profile"]


def test_a_page_instead_of_an_answer_is_an_error(run, server):
    server.faults.append(
        Fault("GET .*devices", status=200, body="<html>", headers={"Content-Type": "text/html"})
    )
    with pytest.raises(VendorError, match="makes no sense"):
        run(ONE)


def test_after_any_refusal_resume_goes_on(run, server):
    steps = ["POST .*models/m0002/multi", "POST .*jobs", "GET .*jobs/j", "GET .*result"]
    for number, pattern in enumerate(steps):
        server.faults[:] = [Fault(pattern, status=400, after=number)]
        with pytest.raises(VendorError):
            run(ALL if number == 0 else None)
    server.faults.clear()
    ((_, profile),) = run(None).profiles
    assert profile.total_ms == 12.0
    assert len(server.uploaded) == 4
    assert len(server.jobs) == 8
    with pytest.raises(UsageError, match="no run is unfinished"):
        run(None)


def test_not_waiting_then_looking_then_resuming(run, server):
    outcome = run(ALL, wait=False)
    assert not outcome.profiles
    assert len(server.jobs) == 8
    assert server.count("GET /api/v1/jobs/.*/result") == 0
    (listed,) = refresh_jobs(run.artifact, None)
    assert {job.state for job in listed.jobs} == {"submitted"}
    for _ in range(3):
        (listed,) = refresh_jobs(run.artifact, Hub.open())
    assert {job.state for job in listed.jobs} == {"done"}
    ((_, profile),) = run(None).profiles
    assert profile.total_ms == 12.0
    assert len(server.uploaded) == 4


def test_resume_refuses_another_artifact_or_another_hub(run, server, configured, tmp_path):
    run(ONE, wait=False)
    with PartialArtifact(run.artifact.root) as partial:
        changed = partial.finish(dataclasses.replace(build(partial.artifact), name="other"))
    with pytest.raises(UsageError, match="is not the artifact"):
        profile_on_hub(changed, None, Hub.open())
    with PartialArtifact(run.artifact.root) as partial:
        partial.finish(build(partial.artifact))
    server.stop()
    server._ports = [0, 0]
    server.start()
    server.ini(configured)
    with pytest.raises(UsageError, match="began on http"):
        run(None)


def test_a_damaged_ledger_is_named(run):
    run(ONE, wait=False)
    for content in (b"", b"{}x", b'{"schema_version": 2}', b'{"uploads": [{"token": "x"}]}'):
        (run.folder / LEDGER).write_bytes(content)
        with pytest.raises(ArtifactError, match=r"ledger\.json is damaged"):
            run(None)


def test_two_runs_at_once_keep_out_of_each_others_way(run, server, artifact):
    caught = []

    def second():
        try:
            profile_on_hub(artifact, ONE, Hub.open())
        except UsageError as error:
            caught.append(error.what)

    run(ONE, wait=False)
    hub = Hub.open()
    with Book(run.folder):
        second()
    assert "another run is profiling" in caught[0]
    assert hub.url == server.api


CHILD = """
import sys, traceback
from mobilevd_deploy.artifact.artifact import Artifact
from mobilevd_deploy.base.progress import LineProgress
from mobilevd_deploy.profiling.hub.client import Hub
from mobilevd_deploy.profiling.hub.ledger import Request
from mobilevd_deploy.profiling.hub.run import profile_on_hub
try:
    request = Request((sys.argv[2],), compile="onnx") if len(sys.argv) > 2 else None
    artifact, progress = Artifact.open(sys.argv[1]), LineProgress(sys.stderr)
    profile_on_hub(artifact, request, Hub.open(), progress, poll_seconds=0.01)
except BaseException as error:
    sys.exit("".join(traceback.TracebackException.from_exception(error, capture_locals=True).format()))
"""


@pytest.mark.slow
def test_kill_at_any_moment_then_resume(run, server):
    moments = ["PUT /part/m0004/1", "POST .*jobs", "GET .*jobs/j0003", "GET .*result"]
    for number, pattern in enumerate(moments):
        arguments = [str(run.artifact.root), *([S24] if number == 0 else [])]
        with subprocess.Popen([sys.executable, "-c", CHILD, *arguments], stderr=subprocess.PIPE) as process:
            kill = (signal.SIGINT, signal.SIGKILL)[number % 2]
            hit = threading.Event()
            server.faults[:] = [
                Fault(
                    pattern,
                    raw=b"",
                    times=1,
                    act=lambda p=process, k=kill, h=hit: (p.send_signal(k), h.set()),
                )
            ]
            _, said = process.communicate(timeout=300)
        assert hit.is_set(), said.decode()
        assert process.returncode == (1 if kill == signal.SIGINT else -signal.SIGKILL), said.decode()
        assert ("KeyboardInterrupt" in said.decode()) == (kill == signal.SIGINT)
        assert TOKEN.encode() not in said
        read_ledger(run.folder / LEDGER)
    server.faults.clear()
    ((_, profile),) = run(None).profiles
    assert profile.total_ms == 12.0
    assert len(server.uploaded) == 4
    assert not list(run.folder.glob(".upload-*"))


def test_a_store_that_dies_in_mid_upload_and_comes_back(run, server):
    """The client itself tries again, and the model arrives whole."""
    server.faults.append(Fault("PUT /part/m0001/0", times=1))
    server.faults.append(Fault("PUT /part/m0001/0", status=503, times=1))
    run(ONE)
    assert server.count("PUT /part/m0001/0") == 3
    assert len(server.uploaded) == 1


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        f"api_token = {TOKEN}\n",
        f"[api]\napi_token = {TOKEN}\n",
        f"[api]\napi_token = %{TOKEN}\napi_url = x\nweb_url = x\n",
        f"[api]\napi_token = {TOKEN}\napi_url = x\nweb_url = x\nverbose = {TOKEN}\n",
        f"[api]\napi_token = {TOKEN}\n{TOKEN}\n",
    ],
)
def test_a_broken_configuration_is_an_error_without_the_token(run, configured, text):
    configured.unlink() if text is None else configured.write_text(text)
    with pytest.raises(VendorError, match="not configured") as caught:
        run(ONE)
    assert str(configured) in caught.value.what
    assert "qai-hub configure" in caught.value.next_step


def test_results_are_read_strictly():
    good = {
        "execution_summary": {"all_inference_times": [5000, 1000], "first_load_time": None},
        "execution_detail": [{"name": "a", "type": "Conv", "compute_unit": "GPU"}],
    }
    assert read_result("x", good).ms.median == 1.0
    assert read_result("x", good).slowest == ()
    summary = good["execution_summary"]
    for bad in (
        {},
        None,
        good | {"execution_summary": summary | {"all_inference_times": []}},
        good | {"execution_summary": summary | {"all_inference_times": ["1"]}},
        good | {"execution_summary": summary | {"all_inference_times": [True]}},
        good | {"execution_summary": summary | {"warm_load_time": -1}},
        good | {"execution_detail": None},
        good | {"execution_detail": [{"compute_unit": 3}]},
    ):
        with pytest.raises(SpecError):
            read_result("x", bad)


def test_a_result_without_samples_is_that_components_error(run, server):
    server.result = made_up_detail(samples=())
    ((_, profile),) = run(ONE).profiles
    assert "is invalid: there are no samples" in profile.errors[0]


def test_devices_come_with_their_attributes(run):
    hosted = Hub.open().devices()
    assert [device.name for device in hosted] == [S24, S25]
    assert isinstance(hosted[0], HostedDevice)
    assert "hexagon:v75" in hosted[0].attributes


def test_the_ledger_knows_everything_but_the_token(run, server):
    run(ONE)
    ledger = json.loads((run.folder / LEDGER).read_text())
    assert [u["id"] for u in ledger["uploads"]] == ["m0001"]
    (entry,) = ledger["runs"]
    assert [(j["kind"], j["id"], j["state"]) for j in entry["jobs"]] == [
        ("compile", "j0001", "done"),
        ("profile", "j0002", "done"),
    ]
    assert pb.JobState.Name(server.jobs["j0002"].pb.inference_job.job_state) == "JOB_STATE_DONE"


@pytest.fixture
def command(artifact, configured, server, monkeypatch, capfd):
    """Run the command line in this process; return its exit code, and what it wrote."""
    server.looks = 0  # so that it need not wait between two looks

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["mobilevd-deploy", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        written = capfd.readouterr()
        assert TOKEN not in written.out + written.err
        return caught.value.code or 0, written.out, written.err

    return run


def test_one_command_measures_and_prints_json(command, artifact):
    code, out, err = command(
        "profile", artifact.root, "--device", "Xiaomi 14 Pro", "--compile-on", "hub", "--json", "--check"
    )
    assert (code, err) == (0, "")
    values = json.loads(out)
    assert {"asked_for", "device", "chipset", "source", "error_percent"} < set(values)
    assert (values["asked_for"], values["device"]) == ("Xiaomi 14 Pro", S24)
    assert [c["ms"]["median"] for c in values["components"]] == [3.0] * 4
    assert values["total_ms"] == 12.0
    assert load_profiles(artifact)[0].to_dict() == load_profile(values["file"]).to_dict()


def test_two_devices_are_shown_and_failures_decide_the_exit_code(command, artifact, server):
    server.reasons["profile tiny unet"] = "no luck"
    devices = ("--device", S24, "--device", "s25")
    code, out, err = command("profile", artifact.root, *devices, "--compile-on", "hub")
    assert code == 3
    assert "error: unet: profile job" in err
    assert out.count("MADE UP by a server on this computer") == 2
    assert "the numbers are made up" in out
    code, out, err = command("profile", artifact.root, *devices, "--compile-on", "hub", "--json")
    assert (code, len(json.loads(out))) == (3, 2)


def test_ctrl_c_says_how_to_go_on_and_the_words_are_true(command, artifact, server):
    act = lambda: os.kill(os.getpid(), signal.SIGINT)  # noqa: E731
    server.faults.append(Fault("POST .*jobs", raw=b"", after=3, times=1, act=act))
    options = ("--device", S24, "--compile-on", "hub", "--components", "image_encoder, unet")
    code, out, err = command("profile", artifact.root, *options)
    assert (code, out) == (130, "")
    words = re.search(r"next: mobilevd-deploy (.*)", err)[1].split()
    assert words == ["profile", "hub", str(artifact.root), "--resume"]
    code, out, _ = command(*words)
    assert code == 0
    assert "6" in out
    assert len(server.uploaded) == 2


def test_a_service_that_is_down_says_how_to_go_on_and_the_words_are_true(command, artifact, server, hurried):
    server.faults.append(Fault("POST .*jobs", status=500))
    options = ("--device", S24, "--compile-on", "hub", "--components", "unet")
    code, _, err = command("profile", artifact.root, *options)
    assert code == 3
    words = re.search(r"then mobilevd-deploy (.*), which uploads nothing again", err)[1].split()
    assert words == ["profile", "hub", str(artifact.root), "--resume"]
    server.faults.clear()
    assert command(*words)[0] == 0
    assert len(server.uploaded) == 1


def test_a_device_that_was_retired_in_the_middle_of_a_run(run, server, hurried, monkeypatch):
    """The client itself refuses it, and would at every resumption."""
    server.faults.append(Fault("POST .*jobs", status=500))
    with pytest.raises(VendorError, match="service is down") as caught:
        run(ONE)
    assert "--resume" in caught.value.next_step
    server.faults.clear()
    monkeypatch.setattr("tests.support.hub_server.DEVICES", ())
    with pytest.raises(VendorError, match="is not available") as caught:
        run(None)
    assert "devices --hub lists the devices" in caught.value.next_step
    assert "--resume" not in caught.value.next_step


def test_without_a_token_it_estimates_and_says_that_nothing_was_measured(command, configured, tmp_path):
    configured.unlink()
    manifest = build(tmp_path / "scratch")
    with PartialArtifact(tmp_path / "full") as partial:
        build(partial.artifact)
        model = load_preset("mobilevd").model.to_dict()
        full = partial.finish(dataclasses.replace(manifest, model=json.loads(json.dumps(model))))
    code, out, err = command("profile", full.root, "--device", "Xiaomi 14 Pro", "--json")
    values = json.loads(out)
    assert (code, values["source"]) == (0, "estimate")
    assert values["error_percent"] is None  # the artifact is not quantised
    assert "nothing was measured: AI Hub is not configured" in values["notes"][0]
    assert "qai-hub configure" in values["notes"][0]
    assert load_profile(values["file"]).total_ms == values["total_ms"]
    code, out, err = command("profile", full.root, "--resume")
    assert code == 3
    code, out, _ = command("profile", "mobilevd", "--device", "Xiaomi 14 Pro", "--json")
    values = json.loads(out)
    assert (code, values["source"]) == (0, "estimate")
    assert values["error_percent"] > 0
    assert "nothing was measured: mobilevd is a preset" in values["notes"][0]
    assert "qai-hub configure" in values["notes"][0]
    assert "on a phone with profile phone" in values["notes"][0]
    # The tiny artifact is of a size that nobody published a latency for.
    code, out, err = command("profile", tmp_path / "tiny", "--device", "Xiaomi 14 Pro")
    assert (code, out) == (3, "")
    assert "not configured" in err
    assert "there is no estimate" in err
    assert "profile host compares on this computer" in err


def test_without_a_token_unknown_names_get_the_nearest_and_known_ones_their_reason(
    command, configured, artifact, monkeypatch
):
    configured.unlink()
    code, out, err = command("profile", artifact.root, "--device", S24, "--device", "Xiaomi 14 Prp")
    assert (code, out) == (2, "")
    assert "next: nearest are Xiaomi 14 Pro" in err
    counts = load_calibration().rows[-1].counts
    monkeypatch.setattr("mobilevd_deploy.profiling.estimate.count_operations", lambda *_: counts)
    code, out, err = command("profile", "mobilevd", "--device", "Xiaomi 13")
    assert (code, out) == (3, "")
    assert "an estimate is possible for Snapdragon 8 Gen 3" in err
    code, out, err = command("profile", "no-such.toml", "--device", S24)
    assert (code, out) == (2, "")
    assert "no preset 'no-such.toml'" in err


@pytest.mark.parametrize("quiet", [["--json"], ["-q"], []])
def test_a_token_file_that_others_can_read_is_warned_about(command, configured, artifact, quiet):
    words = ("profile", artifact.root, "--device", S24, "--compile-on", "hub", "--no-wait", *quiet)
    assert "warning" not in command(*words)[2]
    configured.chmod(0o644)
    warning = f"warning: others on this computer can read your token: chmod 600 {configured}\n"
    assert warning in command(*words)[2]
    assert warning in command("jobs", artifact.root, "--json")[2]


def test_jobs_are_listed(command, artifact):
    assert "no jobs" in command("jobs", artifact.root, "--offline")[1]
    _, out, _ = command("profile", artifact.root, "--device", S24, "--compile-on", "hub", "--no-wait")
    assert "--resume" in out
    for offline, state in ((["--offline"], "submitted"), ([], "done")):
        code, out, _ = command("jobs", artifact.root, "--json", *offline)
        assert code == 0
        assert {job["state"] for run in json.loads(out) for job in run["jobs"]} == {state}
    code, out, _ = command("jobs", artifact.root)
    assert out.count("done") == 8


@pytest.mark.parametrize(
    "options",
    [["--resume", "--device", S24], ["--image", "x.png", "--device", S24], ["--device", "Nokia 3310"], []],
)
def test_wrong_usage_is_told(command, artifact, options):
    code, out, err = command("profile", artifact.root, "--compile-on", "hub", *options)
    assert (code, out) == (2, "")
    assert err.count("error: ") == 1
    assert "next: " in err
