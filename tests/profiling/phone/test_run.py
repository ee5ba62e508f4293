"""The phone on the desk, against a stand-in adb: every error of the real one, installs and benchmarks."""

from __future__ import annotations

import io
import os
import re
import shutil
import socket
import subprocess
import sys
import time

import pytest
from rich.console import Console

from mobilevd_deploy.artifact.artifact import Artifact
from mobilevd_deploy.base.progress import LineProgress
from mobilevd_deploy.cli.tables import render_profile
from mobilevd_deploy.errors import ArtifactError, ResourceError, UsageError, VendorError
from mobilevd_deploy.profiling.phone.adb import Adb, attached
from mobilevd_deploy.profiling.phone.run import install, profile_over_adb
from mobilevd_deploy.profiling.store import load_profile, profiles_dir, save_profile
from tests.support.adb_phone import SERIAL, Phone
from tests.support.tiny_artifact import write_artifact

ALL = ["image_encoder", "vae_encoder", "unet", "decoder"]


@pytest.fixture
def phone(tmp_path, monkeypatch):
    (tmp_path / "adb").mkdir()
    phone = Phone(tmp_path / "adb")
    monkeypatch.setenv("PATH", f"{phone.bin}:{os.environ['PATH']}")
    monkeypatch.delenv("ANDROID_SERIAL", raising=False)
    return phone


@pytest.fixture
def artifact(tmp_path):
    return write_artifact(tmp_path / "tiny")


def benchmark(artifact, **options):
    return profile_over_adb(artifact, Adb.open(), samples=3, poll_seconds=0.02, **options)


# Which phone


def test_the_only_phone_is_taken(phone):
    assert Adb.open().serial == SERIAL
    assert [str(found) for found in attached()[1]] == [f"{SERIAL} (Made up Phone)"]


def test_a_phone_that_is_ready_goes_before_one_that_is_not(phone):
    phone.set(devices={"AAA": "unauthorized", SERIAL: "device"})
    assert Adb.open().serial == SERIAL


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"devices": {}}, VendorError, "no phone is attached\n.*USB debugging"),
        ({"devices": {"A": "unauthorized"}}, VendorError, "A has not allowed this computer\n.*unlock"),
        ({"devices": {"A": "offline"}}, VendorError, "A is offline\n.*plug it in again"),
        (
            {"devices": {"A": "no permissions (user in plugdev group; are your udev rules wrong?);"}},
            VendorError,
            "A cannot be opened by this user\n.*udev rules",
        ),
        ({"devices": {"A": "recovery"}}, VendorError, "A is in state 'recovery'"),
        (
            {"devices": {"A": "device", "B": "device"}},
            UsageError,
            "several .*A .*B .*\n.*choose one: --serial A",
        ),
        ({"broken": True}, VendorError, "does not work: adb: cannot bind.*\n.*kill-server"),
    ],
)
def test_a_phone_that_cannot_be_used(phone, settings, error, message):
    phone.set(**settings)
    with pytest.raises(error) as caught:
        Adb.open()
    assert_says(caught.value, message)


def test_a_chosen_phone(phone, monkeypatch):
    phone.set(devices={"A": "device", "B": "offline"})
    assert Adb.open("A").serial == "A"
    with pytest.raises(VendorError, match="B is offline"):
        Adb.open("B")
    with pytest.raises(UsageError, match="no phone C is attached"):
        Adb.open("C")
    monkeypatch.setenv("ANDROID_SERIAL", "B")
    with pytest.raises(VendorError, match="B is offline"):
        Adb.open()


def test_no_adb(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(VendorError, match="adb is not installed") as caught:
        Adb.open()
    assert "apt install adb" in caught.value.next_step


@pytest.mark.skipif(shutil.which("adb") is None, reason="needs the real adb")
def test_the_real_adb_without_a_phone(monkeypatch):
    program = shutil.which("adb")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(port))  # a server of our own, which we may end
    try:
        if attached()[1]:
            pytest.skip("a phone is attached")
        with pytest.raises(VendorError, match="no phone is attached"):
            Adb.open()
        # One that was unplugged between two calls.
        with pytest.raises(VendorError, match="the connection to GONE was lost"):
            Adb(program, "GONE").shell("true")
    finally:
        subprocess.run([program, "kill-server"], capture_output=True, check=False)


# Single calls


def test_the_status_of_a_command_is_its_own(phone):
    assert Adb.open().shell("echo 'a  b'; exit 3") == (3, "a  b\n")
    assert Adb.open().shell("cat nowhere")[0] == 1


@pytest.mark.parametrize("how", ["breaks", "hangs"])
def test_a_call_that_does_not_end_well(phone, how):
    phone.set(**{how: True})
    with pytest.raises(VendorError, match="was lost" if how == "breaks" else "did not answer within 0"):
        Adb.open().shell("true", seconds=60 if how == "breaks" else 0.3)


@pytest.mark.parametrize(
    ("state", "message"),
    [("unauthorized", "has not allowed"), ("offline", "is offline"), (None, "was lost")],
)
def test_a_phone_that_changes_between_two_calls(phone, state, message):
    adb = Adb.open()
    phone.set(devices={SERIAL: state} if state else {})
    with pytest.raises(VendorError, match=message):
        adb.shell("true")


# Installing


def test_an_artifact_lies_on_the_phone_as_it_lies_here(phone, artifact):
    assert install(artifact, Adb.open()) == "tiny"
    there = phone.files / "artifacts/tiny"
    Artifact.open(there).verify()
    assert [path.name for path in there.parent.iterdir()] == ["tiny"]
    count = len(phone.pushed())
    install(artifact, Adb.open())
    assert len(phone.pushed()) == count


def test_a_changed_file_on_the_phone_is_found_and_replaced(phone, artifact):
    install(artifact, Adb.open())
    model = phone.files / "artifacts/tiny/unet/model.onnx"
    content = model.read_bytes()
    model.write_bytes(content[:-1] + b"x")
    install(artifact, Adb.open())
    assert model.read_bytes() == content


def test_after_a_pulled_cable_only_the_rest_is_pushed(phone, artifact):
    phone.set(gone_at="decoder/model.onnx")
    with pytest.raises(VendorError, match="was lost"):
        install(artifact, Adb.open())
    assert not (phone.files / "artifacts/tiny").exists()
    first = phone.pushed()
    phone.set(devices={SERIAL: "device"}, gone_at=None)
    install(artifact, Adb.open())
    again = phone.pushed()[len(first) :]
    assert 0 < len(again) < len(first) + 3
    assert len(first) - 1 + len(again) == sum(1 for _ in artifact.manifest.all_files()) + 2
    Artifact.open(phone.files / "artifacts/tiny").verify()


def test_what_an_earlier_artifact_left_is_cleared(phone, artifact):
    left = phone.files / "artifacts/.tiny.partial/unet/other.onnx"
    left.parent.mkdir(parents=True)
    left.write_text("x")
    install(artifact, Adb.open())
    Artifact.open(phone.files / "artifacts/tiny").verify()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"absent": True}, VendorError, "the demo app .* is not installed on .*\n.*make apk"),
        ({"free_kb": 1000}, ResourceError, "storage is full: .* MB are needed, 1 MB are free"),
        ({"full_at": "unet/model.onnx"}, ResourceError, "storage is full\n.*not pushed again"),
        ({"flip_at": "unet/model.onnx"}, VendorError, "tiny arrived damaged"),
    ],
)
def test_an_install_that_fails_leaves_no_artifact(phone, artifact, settings, error, message):
    phone.set(**settings)
    with pytest.raises(error) as caught:
        install(artifact, Adb.open())
    assert_says(caught.value, message)
    assert not (phone.files / "artifacts/tiny").exists()


def test_a_folder_that_the_phone_refuses(phone, artifact):
    phone.files.rmdir()
    phone.files.write_text("not a folder")
    with pytest.raises(VendorError, match=r"refuses to make its folder: .*Not a directory"):
        install(artifact, Adb.open())


def test_a_damaged_artifact_and_a_name_for_no_phone(phone, artifact, tmp_path):
    (artifact.root / "unet/model.onnx").write_bytes(bytes((artifact.root / "unet/model.onnx").stat().st_size))
    with pytest.raises(ArtifactError, match="is damaged"):
        install(artifact, Adb.open())
    with pytest.raises(UsageError, match="cannot be an artifact's name"):
        install(write_artifact(tmp_path / "my model"), Adb.open())


# The benchmark


def test_a_benchmark_becomes_a_profile(phone, artifact):
    phone.app(seconds=0.4)
    stream = io.StringIO()
    profile = benchmark(artifact, progress=LineProgress(stream))
    assert [row.name for row in profile.components] == ALL
    unet = profile.components[2]
    assert (unet.ms.median, unet.ms.min, unet.ms.samples) == (30.375, 30.0, 3)
    assert (unet.first_load_ms, unet.peak_bytes, unet.ops) == (41.5, 251658240, {"NPU": 1})
    assert profile.source == "adb"
    assert (profile.device, profile.chipset) == ("Example Made-up Phone", "Snapdragon 8 Gen 3")
    assert profile.manifest_sha256 == artifact.digest
    assert profile.total_ms == 10.375 + 20.375 + 30.375 + 40.375
    assert profile.tools["qairt of the app"] == "v2.51.0.260929181845"
    assert any("none before, light after" in note for note in profile.notes)
    assert "measuring decoder" in stream.getvalue()
    assert load_profile(save_profile(profile, profiles_dir(artifact))) == profile
    console = Console(file=io.StringIO(), width=200)
    console.print(render_profile(profile))
    assert "attached phone: measured on the attached phone" in console.file.getvalue()


def test_only_some_components_and_a_backend(phone, artifact):
    profile = benchmark(artifact, components=("unet", "decoder"), backend="cpu")
    assert [row.name for row in profile.components] == ["unet", "decoder"]
    with pytest.raises(ArtifactError, match="no component 'nonsense'"):
        benchmark(artifact, components=("nonsense",))


def test_what_ran_on_the_cpu_says_so(phone, artifact):
    phone.app(timing={"backend": "cpu", "npu_nodes": 0, "cpu_nodes": 7})
    profile = benchmark(artifact)
    assert f"{', '.join(ALL)}: on the phone's CPU, not on its NPU" in profile.notes
    assert profile.components[0].ops == {"CPU": 7}
    assert not any("CPU" in note for note in benchmark(artifact, backend="cpu").notes)


def test_a_failure_inside_of_the_app_is_told(phone, artifact):
    phone.app(fails_at="unet")
    profile = benchmark(artifact)
    assert profile.errors == tuple(
        f"{name}: the app stopped: unet at load: error 5005" for name in ("unet", "decoder")
    )
    assert profile.components[0].ms is not None
    assert profile.total_ms is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"old_app": True}, "does not start the app's benchmark: Error: Activity class .*\n.*make apk"),
        ({"crash_at": "unet"}, "the app ended during the benchmark at unet\n.*logcat"),
        ({"stalls": True}, "no benchmark progress for 0 s at decoder"),
        ({"text": "{"}, "is invalid: it is not JSON"),
        ({"result": {"run_id": "another"}}, "the app measured another artifact"),
        ({"result": {"schema_version": 2}}, "is invalid: schema_version"),
    ],
)
def test_a_benchmark_that_fails(phone, artifact, settings, message):
    phone.app(**settings)
    with pytest.raises((VendorError, ArtifactError)) as caught:
        benchmark(artifact, stall_seconds=0.4)
    assert_says(caught.value, message)


def test_the_phone_does_not_go_on_when_we_stop(phone, artifact, tmp_path):
    phone.app(stalls=True)
    code = (
        "import sys\nfrom mobilevd_deploy.artifact.artifact import Artifact\n"
        "from mobilevd_deploy.profiling.phone.adb import Adb\n"
        "from mobilevd_deploy.profiling.phone.run import profile_over_adb\n"
        "profile_over_adb(Artifact.open(sys.argv[1]), Adb.open(), samples=3, poll_seconds=0.02)"
    )
    command = [sys.executable, "-c", code, str(artifact.root)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 20
    while not phone.alive() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert phone.alive()
    time.sleep(0.3)
    process.send_signal(2)
    process.communicate(timeout=20)
    assert process.returncode != 0
    assert not phone.alive()


def assert_says(error, pattern):
    assert re.search(pattern, f"{error.what}\n{error.next_step}", re.DOTALL), (error.what, error.next_step)
