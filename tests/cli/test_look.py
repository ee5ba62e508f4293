"""Commands that look: inspect, diff, doctor."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import safetensors.torch

from mobilevd_deploy import inspection
from mobilevd_deploy.artifact.artifact import Artifact
from mobilevd_deploy.doctor import DoctorFinding
from mobilevd_deploy.profiling.profile import ComponentProfile, Latency, Profile, now
from mobilevd_deploy.profiling.store import profiles_dir, save_profile
from tests.cli.conftest import Run

KEYS = {"parameters", "tflops", "tflops_paper_convention", "temporal_blocks"}


def test_inspect_a_checkpoint(run: Run, tiny_checkpoint: Path) -> None:
    ended = run("inspect", tiny_checkpoint, "--json")
    assert (ended.code, ended.err) == (0, "")
    result = ended.json
    assert set(result) >= KEYS
    assert (result["kind"], result["name"]) == ("checkpoint", "tiny")
    with safetensors.safe_open(tiny_checkpoint, framework="pt") as opened:
        names = [n for n in opened.keys() if n.startswith("unet.")]  # noqa: SIM118
        stored = sum(opened.get_tensor(n).numel() for n in names if not n.endswith(".gate"))
        gates = [float(opened.get_tensor(n)) for n in names if n.endswith(".gate")]
        importance = {
            n.removeprefix("unet.").removesuffix(".time_mixer.importance"): float(opened.get_tensor(n))
            for n in names
            if n.endswith(".importance")
        }
    blocks = result["temporal_blocks"]
    assert result["parameters"] == stored
    assert (blocks["total"], blocks["kept"]) == (len(gates), sum(gates))
    assert {b["path"]: b["importance"] for b in blocks["blocks"]} == pytest.approx(importance)
    assert 0 < result["tflops"] < result["tflops_paper_convention"]
    shown = run("inspect", tiny_checkpoint)
    assert shown.code == 0
    for words in ("9 of 12 kept", f"{stored:,} in training form", "mid_block.attentions.0", "dropped"):
        assert words in shown.out


def test_inspect_a_preset(run: Run) -> None:
    result = run("inspect", "demo", "--json").json
    assert set(result) >= KEYS
    assert result["kind"] == "preset"
    assert result["temporal_blocks"]["total"] >= result["temporal_blocks"]["kept"] > 0
    assert "levels" in run("inspect", "demo").out


def test_inspect_an_artifact(run: Run, artifact: Artifact) -> None:
    ended = run("inspect", artifact.root, "--json")
    assert (ended.code, ended.err) == (0, "")
    result = ended.json
    assert set(result) >= KEYS
    assert result["kind"] == "artifact"
    assert result["tflops"] == artifact.manifest.component("unet").flops / 1e12
    assert result["bytes"] == artifact.bytes
    assert (result["temporal_blocks"]["total"], result["temporal_blocks"]["kept"]) == (12, 9)
    assert result["source"]["name"] == "tiny.safetensors"
    assert "tiny (artifact)" in run("inspect", artifact.root).out


def test_inspect_the_ladder(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    # All eight rows are test_inspection's, which counts them once.
    monkeypatch.setattr(inspection, "preset_names", lambda: ["mobilevd", "svd-lowres", "demo"])
    ended = run("inspect", "--ladder", "--json")
    assert (ended.code, ended.err) == (0, "")
    assert [row["preset"] for row in ended.json] == ["svd-lowres", "mobilevd"]
    for row in ended.json:
        assert set(row) >= {"preset", "published_tflops", "tflops", "tflops_paper_convention"}
        assert row["tflops_paper_convention"] == pytest.approx(row["published_tflops"], rel=0.06)


def test_inspect_a_damaged_artifact(run: Run, artifact: Artifact, tmp_path: Path) -> None:
    shutil.copytree(artifact.root, tmp_path / "model")
    (tmp_path / "model" / "unet" / "model.onnx").unlink()
    ended = run("inspect", "model", "--json")
    assert ended.code == 1
    assert "unet/model.onnx is missing" in ended.json["error"]


def test_diff(run: Run, exported: dict[str, Artifact], tmp_path: Path) -> None:
    a, b = exported["onnx"], exported["npu-float"]
    ended = run("diff", a.root, b.root, "--json")
    assert (ended.code, ended.err) == (0, "")
    rows = {(row["component"], row["quantity"]): row for row in ended.json}
    assert rows[None, "bytes"] == {
        "component": None,
        "quantity": "bytes",
        "a": a.bytes,
        "b": b.bytes,
        "a_error_percent": None,
        "b_error_percent": None,
        "equal": False,
    }
    assert rows["unet", "ops.GroupNormalization"]["b"] is None
    assert rows["unet", "ops.InstanceNormalization"]["a"] is None
    assert rows["unet", "drift_db.onnx"]["a"] == a.manifest.drift["onnx"]["unet"]
    assert rows["unet", "ops.Gelu"]["equal"]
    shown = run("diff", a.root, b.root)
    assert "ops.InstanceNormalization" in shown.out
    assert "ops.Gelu" not in shown.out
    assert "ops.Gelu" in run("diff", a.root, b.root, "--all").out
    assert "no difference" in run("diff", a.root, a.root).out
    ended = run("diff", a.root, "nowhere", "--json")
    assert (ended.code, ended.json["exit_code"]) == (1, 1)


def test_paths_that_the_system_refuses(run: Run) -> None:
    ended = run("inspect", "n" * 300, "--json")
    assert (ended.code, ended.json["exit_code"]) == (1, 1)
    assert "too long" in ended.json["error"]


def test_diff_shows_the_errors_of_estimates(tiny: Artifact, run: Run) -> None:
    unet = ComponentProfile("unet", Latency(200.0))
    made = Profile(
        1, "S24", "S24", "8 Gen 3", "estimate", now(), "tiny", tiny.digest, (unet,), 200.0, error_percent=9.0
    )
    save_profile(made, profiles_dir(tiny))
    assert "200 ± 9 %" in run("diff", tiny.root, tiny.root, "--all").out


def test_doctor_answers_by_its_exit_code(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for ready in (True, False):
        found = [DoctorFinding("disk", ready, True, "so much", None if ready else "free some")]
        found.append(DoctorFinding("phone", False, False, "none", "plug one in"))
        monkeypatch.setattr("mobilevd_deploy.doctor.examine", lambda *_, found=found: found)
        ended = run("doctor")
        assert ended.code == (0 if ready else 1)
        assert "not yet phone: none -> plug one in" in ended.out
        assert ("MISSING disk: so much -> free some" in ended.out) == (not ready)
        assert run("doctor", "--json").json["ready"] == ready
