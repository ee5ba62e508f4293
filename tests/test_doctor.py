"""What the doctor finds, on computers that have things and on those that do not."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from mobilevd_deploy import doctor
from mobilevd_deploy.config.presets import load_preset
from mobilevd_deploy.config.recipe import load_recipe
from tests.support import ROOT
from tests.support.adb_phone import SERIAL, Phone
from tests.support.hub_server import TOKEN, HubServer

NPU, FLOAT = load_recipe("xiaomi-14-pro"), load_recipe("onnx")
DEMO = load_preset("demo").model


@pytest.mark.npu
@pytest.mark.skipif(doctor._npu_remedy().startswith("Qualcomm"), reason="not Linux on x86-64")
def test_the_compiler_and_the_simulator_are_really_tried():
    found = doctor._qnn(NPU)
    assert (found.ready, found.needed, found.remedy) == (True, True, None)
    assert "compiled and simulated a layer for SM8650" in found.detail
    assert not doctor._qnn(FLOAT).needed


def test_a_compiler_that_is_not_there(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = doctor._qnn(NPU)
    assert not found.ready
    assert "pip install" in found.remedy


def test_aimet_is_imported_elsewhere(monkeypatch):
    def run(command, **options):
        script = "import sys; print('noise'); print('2.42.0')" if works else "import no_such_thing"
        return real([sys.executable, "-c", script], **options)

    real = subprocess.run
    monkeypatch.setattr("subprocess.run", run)
    works = True
    assert doctor._aimet(NPU) == doctor.DoctorFinding("AIMET", True, True, "version 2.42.0")
    works = False
    found = doctor._aimet(FLOAT)
    assert (found.ready, found.needed) == (False, False)
    assert "no_such_thing" in found.detail


def test_memory_is_held_against_the_model_and_the_recipe(monkeypatch):
    monkeypatch.setattr(doctor, "parameters", lambda *_: 845_000_000)
    for there, free, recipe, ready, remedy in (
        (24e9, 20e9, NPU, True, None),
        (24e9, 9e9, NPU, False, "close other programs"),
        (9e9, 8e9, NPU, False, "use a computer with more, or add swap"),
        (9e9, 8.6e9, FLOAT, True, None),
    ):
        monkeypatch.setattr(doctor, "memory_bytes", lambda there=there, free=free: (int(there), int(free)))
        found = doctor._memory(recipe, DEMO)
        assert (found.ready, found.remedy) == (ready, remedy)
    monkeypatch.setattr(doctor, "memory_bytes", lambda: (int(24e9), int(20e9)))
    results = ROOT / "benchmarks" / "results" / "full_size.json"
    stages = json.loads(results.read_bytes())["stages"]
    seen = max(cost["peak_bytes"] for cost in stages.values()) / 1e9
    told = re.search(r"about ([\d.]+) GB", doctor._memory(NPU, DEMO).detail)
    assert told is not None
    assert seen < float(told[1]) < 1.1 * seen


def test_disk_is_held_against_the_model(monkeypatch, tmp_path):
    assert doctor._disk(NPU, DEMO, tmp_path).ready
    monkeypatch.setattr(doctor, "parameters", lambda *_: 10**15)
    found = doctor._disk(NPU, DEMO, tmp_path)
    assert not found.ready
    assert "free some space" in found.remedy


def test_the_demo_is_smaller_than_the_papers():
    assert 0 < doctor.parameters(DEMO, FLOAT) < 20e6
    there, free = doctor.memory_bytes()
    assert 0 < free <= there


def test_the_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("QAIHUB_CLIENT_INI", str(tmp_path / "none.ini"))
    assert "not configured" in doctor._hub().detail
    with HubServer() as server:
        path = server.ini(tmp_path / "client.ini")
        monkeypatch.setenv("QAIHUB_CLIENT_INI", str(path))
        assert doctor._hub().detail.endswith("lists 2 devices")
        path.chmod(0o644)
        found = doctor._hub()
        assert not found.ready
        assert (found.detail, found.remedy) == (
            "others on this computer can read your token",
            f"chmod 600 {path}",
        )
        server.ini(path, "another")
        found = doctor._hub()
        assert "the token is refused" in found.detail
        assert TOKEN not in f"{found}"
        assert "another" not in found.detail


def test_the_phone(tmp_path, monkeypatch):
    phone = Phone(tmp_path / "adb")
    monkeypatch.setenv("PATH", f"{phone.bin}:{os.environ['PATH']}")
    monkeypatch.delenv("ANDROID_SERIAL", raising=False)
    assert doctor._phone().detail == f"{SERIAL} is attached, and has the app"
    phone.set(absent=True)
    assert "make apk" in doctor._phone().remedy
    phone.set(devices={})
    assert "no phone is attached" in doctor._phone().detail
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "apt install adb" in doctor._phone().remedy


def test_the_tools_for_the_app(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    found = doctor._apk()
    assert not found.ready
    assert not found.needed
    assert "javac, mvn" in found.detail
    for name in doctor._APK_TOOLS:
        (tmp_path / name).write_text("#!/bin/sh\necho javac 11.0.2\n")
        (tmp_path / name).chmod(0o755)
    assert doctor._apk().detail == "JDK 11 is older than 17"
    (tmp_path / "javac").write_text("#!/bin/sh\necho javac 17.0.9\n")
    assert doctor._apk().ready


def test_only_what_the_recipe_needs_decides(monkeypatch, tmp_path):
    for name in ("_aimet", "_qnn"):
        monkeypatch.setattr(
            doctor,
            name,
            lambda recipe, name=name: doctor.DoctorFinding(name, False, recipe.npu is not None, "", "x"),
        )
    for recipe, ready in ((NPU, False), (FLOAT, True)):
        findings = doctor.examine(recipe, DEMO, tmp_path)
        assert all(f.ready for f in findings if f.needed) == ready
        assert all(f.ready == (f.remedy is None) for f in findings)
        assert len(findings) == 7
