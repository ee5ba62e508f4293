"""`profile` in its four ways, and `report` on what it stored."""

from __future__ import annotations

from pathlib import Path

import pytest

from mobilevd_deploy.artifact.artifact import Artifact
from mobilevd_deploy.config.data import data_dir
from mobilevd_deploy.profiling.profile import TrafficReport, TrafficRow
from mobilevd_deploy.profiling.store import profiles_dir, save_traffic
from tests.cli.conftest import Run
from tests.support.adb_phone import SERIAL, Phone


def test_profile_over_adb_with_and_without_a_serial_number(phone: Phone, tiny: Artifact, run: Run) -> None:
    for words in ([tiny.root], ["--serial", SERIAL, tiny.root]):
        ended = run("profile", "phone", *words, "--samples", 2, "--components", "unet", "--json")
        assert ended.code == 0
        assert (ended.json["source"], ended.json["device"]) == ("adb", "Example Made-up Phone")
        assert ended.json["asked_for"] == (SERIAL if SERIAL in words else "attached phone")
        assert ended.json["total_ms"] == 10.25
    assert "no phone X is attached" in run("profile", "phone", tiny.root, "--serial", "X").err
    phone.app(fails_at="unet")
    ended = run("profile", "phone", tiny.root, "--samples", 2)
    assert ended.code == 3
    assert "error 5005" in ended.err


def test_profiles_on_this_computer_are_reported_and_compared(tiny: Artifact, run: Run) -> None:
    assert run("report", tiny.root).code == 2
    ended = run("profile", "host", tiny.root, "--samples", 2, "--json")
    assert ended.json["source"] == "host"
    assert [c["name"] for c in ended.json["components"]] == [c.name for c in tiny.manifest.components]
    assert run("profile", "host", tiny.root, "--samples", 2).code == 0
    ended = run("report", tiny.root)
    assert "this computer" in ended.out
    assert "report.html" in ended.out
    page = Path(run("report", tiny.root, "--json").json["page"])
    assert "measured on this computer" in page.read_text()
    rows = (TrafficRow("unet", 3_000_000, 1_000_000),)
    planned = TrafficReport(1, "tiny", tiny.digest, "SM8650", "w8a16", 0, "2025-01-31T12:00:00Z", rows)
    save_traffic(planned, profiles_dir(tiny))
    ended = run("report", tiny.root)
    assert "DRAM traffic planned for SM8650: 3.0 MB read, 1.0 MB written" in ended.out
    assert "DRAM traffic on SM8650" in page.read_text()
    assert len(run("report", tiny.root, "--json").json["traffic"]) == 1
    rows = run("diff", tiny.root, tiny.root, "--json").json
    assert any(
        r["quantity"].startswith("ms.host.this computer on") and r["component"] == "unet" for r in rows
    )
    Artifact.open(tiny.root).verify()


def test_an_estimate_names_the_artifact_that_it_took(tiny: Artifact, run: Run) -> None:
    ended = run("profile", "estimate", "-d", "S24")
    assert ended.err.startswith(f"estimating {tiny.root.name}\n")
    assert "there is no estimate" in ended.err  # so small a clip has none


@pytest.mark.parametrize(
    "options",
    [
        ("--host", "--estimate"),
        ("--adb", "--host"),
        ("--host", "--check"),
        ("--adb", "--device", "S24"),
        ("--backend", "cpu"),
        ("--resume", "--host"),
        ("--resume", "--device", "S24"),
        ("--resume", "--no-wait"),
        ("--image", "x.png", "--device", "S24"),
    ],
)
def test_ways_to_profile_that_do_not_fit_together(tiny: Artifact, run: Run, options: tuple[str, ...]) -> None:
    assert run("profile", tiny.root, *options).code == 2
    assert run("profile", "hub", tiny.root, *options).code == 2


@pytest.mark.parametrize(
    "words",
    [
        ("phone", "--device", "S24"),
        ("phone", "--check"),
        ("host", "--check"),
        ("host", "--device", "S24"),
        ("host", "--backend", "cpu"),
        ("estimate", "--components", "unet"),
        ("estimate", "--resume"),
    ],
)
def test_a_way_has_no_options_of_another(run: Run, words: tuple[str, ...]) -> None:
    ended = run("profile", *words)
    assert ended.code == 2
    assert f"No such option: {words[1]}" in ended.err


@pytest.mark.parametrize(
    ("words", "option", "instead"),
    [
        (("profile", "my-model", "--adb"), "--adb", "profile phone [ARTIFACT] [--serial SERIAL]"),
        (("profile", "--adb", "X", "my-model"), "--adb", "profile phone [ARTIFACT] [--serial SERIAL]"),
        (("profile", "my-model", "--host"), "--host", "profile host [ARTIFACT]"),
        (("profile", "--estimate", "-d", "S24"), "--estimate", "profile estimate [ARTIFACT|PRESET] --device"),
        (("profile", "--backend", "cpu"), "--backend", "profile phone [ARTIFACT] --backend"),
        (("install", "my-model", "--adb", "X"), "--adb", "install [ARTIFACT] --serial SERIAL"),
    ],
)
def test_earlier_options_name_their_new_spelling(
    run: Run, words: tuple[str, ...], option: str, instead: str
) -> None:
    ended = run(*words)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith(f"error: No such option: {option}\n next: mobilevd-deploy {instead}")
    assert run(*words, "--json").json["next_step"].startswith(f"mobilevd-deploy {instead}")


def test_profile_alone_is_profile_hub(run: Run, tmp_path: Path) -> None:
    """In any order of its arguments; here for a preset, which is estimated."""
    (tmp_path / "my.toml").write_text((data_dir("models") / "mobilevd.toml").read_text())
    device = ("--device", "Xiaomi 14 Pro")
    wanted = run("profile", "hub", "mobilevd", *device, "--json").json
    assert (wanted["source"], wanted["asked_for"]) == ("estimate", "Xiaomi 14 Pro")
    for words in (
        ("mobilevd", *device, "--json"),
        (*device, "mobilevd", "--json"),
        ("--json", "-d", "Xiaomi 14 Pro", "--", "mobilevd"),
        ("my.toml", *device, "--json"),
    ):
        found = run("profile", *words).json
        assert found["total_ms"] == wanted["total_ms"]
    ended = run("profile", *device)
    assert ended.code == 2
    assert "no artifact in ." in ended.err
    assert run("profile").err == run("profile", "hub").err


def test_an_artifact_with_the_name_of_a_way_is_named_by_its_path(run: Run, tiny: Artifact) -> None:
    tiny.root.rename("host")
    assert "is not a folder" not in run("profile", "./host", "--resume").err
    assert run("profile", "host", "./host", "--samples", 2, "--json").json["artifact"] == "tiny"
