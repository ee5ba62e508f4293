"""`traffic` and `devices`; `jobs` is tested with the hub, `report` with `profile`."""

from __future__ import annotations

from pathlib import Path

import pytest

from mobilevd_deploy.profiling.profile import TrafficReport, TrafficRow
from mobilevd_deploy.profiling.store import load_traffic
from tests.cli.conftest import Run
from tests.support import tiny_artifact

ROWS = (TrafficRow("unet", 3_000_000, 1_000_000, 2_000_000, (TrafficRow("conv_in", 1, 2),), "a note"),)


def report_of(what: str, digest: str | None) -> TrafficReport:
    return TrafficReport(1, what, digest, "SM8650", "w8a16", 3, "2025-01-31T12:00:00Z", ROWS)


def test_traffic_of_an_artifact_is_stored(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = tiny_artifact.write_artifact(tmp_path / "tiny")
    monkeypatch.setattr(
        "mobilevd_deploy.profiling.traffic.measure_artifact",
        lambda artifact, _: report_of("tiny", artifact.digest),
    )
    ended = run("traffic", "tiny", "--picture", "made/traffic.png", "-q")
    assert (ended.code, ended.err) == (0, "")
    for words in ("w8a16 for SM8650, mode 3", "3.0", "2.0", "  conv_in", "unet: a note"):
        assert words in ended.out
    assert (tmp_path / "made" / "traffic.png").read_bytes().startswith(b"\x89PNG")
    (stored,) = load_traffic(tiny)
    assert stored.rows == ROWS
    values = run("traffic", "tiny", "--json").json
    assert (values["read"], values["written"]) == (3_000_000, 1_000_000)
    assert run("traffic", "tiny", "--picture", "traffic.jpg").code == 2


def test_traffic_of_a_preset_takes_its_options(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def measure_preset(*arguments: object) -> TrafficReport:
        called.append(arguments)
        return report_of("demo", None)

    monkeypatch.setattr("mobilevd_deploy.profiling.traffic.measure_preset", measure_preset)
    options = ("--blocks", "conv_*", "--blocks", "mid_block*", "--recipe", "npu-float", "--mode", 1)
    assert run("traffic", "demo", *options, "--json").json["manifest_sha256"] is None
    ((name, spec, recipe, patterns, mode, _),) = called
    assert (name, spec.name, recipe.name) == ("demo", "demo", "npu-float")
    assert (list(patterns), mode) == (["conv_*", "mid_block*"], 1)
    assert run("traffic", "no-such-preset").code == 2


def test_devices_of_a_chip(run: Run) -> None:
    rows = run("devices", "Xiaomi 14 Pro", "--json").json
    assert {row["chipset"] for row in rows} == {"Snapdragon 8 Gen 3"}
    assert "Samsung Galaxy S24" in [row["phone"] for row in rows]
    assert "built-in table" in run("devices", "SM8650").out
