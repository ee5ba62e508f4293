from __future__ import annotations

import dataclasses
import html
import io
import json

import pytest
from rich.console import Console

from mobilevd_deploy.artifact.artifact import Artifact
from mobilevd_deploy.cli.tables import render_comparison, render_profile
from mobilevd_deploy.errors import ArtifactError, SpecError
from mobilevd_deploy.profiling.profile import (
    MADE_UP,
    ComponentProfile,
    Latency,
    OpTime,
    OutputCheck,
    Profile,
    draw_profile,
    join_parts,
    total_ms,
)
from mobilevd_deploy.profiling.store import (
    diff_profiles,
    load_profile,
    load_profiles,
    newest_profiles,
    profiles_dir,
    save_profile,
)
from mobilevd_deploy.report.profiles_page import render_profiles
from tests.support.tiny_artifact import write_artifact

COMPONENTS = (
    ComponentProfile(
        "unet",
        Latency(1220.5, 1300.25, 1200.0, 100),
        first_load_ms=900.0,
        warm_load_ms=300.0,
        peak_bytes=12_000_000,
        ops={"NPU": 812, "CPU": 3},
        slowest=(OpTime("conv_in", "Conv", "NPU", 4.5),),
        check=OutputCheck(41.25),
    ),
    ComponentProfile("decoder", Latency(99.5), check=OutputCheck(None)),
)
PROFILE = Profile(
    schema_version=1,
    asked_for="Xiaomi 14 Pro",
    device="Samsung Galaxy S24 (Family)",
    chipset="Snapdragon 8 Gen 3",
    source="hub",
    created="2025-01-31T12:00:00Z",
    artifact="tiny",
    manifest_sha256="0" * 64,
    components=COMPONENTS,
    total_ms=total_ms(COMPONENTS),
    notes=("the clocks may differ",),
    tools={"qai-hub": "0.56.0"},
)


def shown(profile: Profile) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(render_profile(profile))
    return console.file.getvalue()


def test_median_and_p95_leave_the_first_sample_out():
    latency = Latency.of([900.0, *range(1, 101)])
    assert latency == Latency(50.5, 95, 1, 101)
    assert Latency.of([100.0, 4.0, 2.0]) == Latency(3.0, 4.0, 2.0, 3)


def test_a_single_sample_stands_for_itself_and_none_is_refused():
    assert Latency.of([7.0]) == Latency(7.0, 7.0, 7.0, 1)
    with pytest.raises(SpecError, match="no samples"):
        Latency.of([])


@pytest.mark.parametrize("samples", [[1.0, -2.0], [1.0, float("nan"), 2.0], [1.0, float("inf")]])
def test_a_sample_that_is_no_time_is_refused(samples):
    with pytest.raises(SpecError, match="not a time"):
        Latency.of(samples)


def test_the_total_is_the_sum_of_the_medians_or_none():
    assert total_ms(COMPONENTS) == 1320.0
    assert total_ms([*COMPONENTS, ComponentProfile("vae_encoder", None, error="no")]) is None


def test_a_profile_goes_through_its_file_unchanged_and_beside_the_artifact(tmp_path):
    artifact = write_artifact(tmp_path / "out")
    first = save_profile(PROFILE, profiles_dir(artifact))
    second = save_profile(dataclasses.replace(PROFILE, total_ms=1.0), profiles_dir(artifact))
    assert first.parent == tmp_path / "out.profiles"
    assert first != second
    assert load_profile(first) == PROFILE
    assert first.with_suffix(".png").read_bytes() == draw_profile(PROFILE)
    assert [p.total_ms for p in load_profiles(artifact)] == [1320.0, 1.0]
    Artifact.open(artifact.root).verify()
    assert not list(first.parent.glob(".*"))


def test_the_json_has_the_promised_keys(tmp_path):
    values = json.loads(save_profile(PROFILE, tmp_path).read_text())
    assert {"asked_for", "device", "chipset", "source", "total_ms", "error_percent"} < set(values)
    assert values["components"][0]["ms"]["median"] == 1220.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "dream"}, "'dream' is not one of"),
        ({"schema_version": 2}, "schema version 2"),
        ({"components": []}, "there is none"),
        ({"extra": 1}, "unknown key 'extra'"),
        ({"components": [{"name": "unet", "ms": {"median": -1}}]}, "-1.0 is not a time"),
        ({"components": [{"name": "a", "ms": None}] * 2}, "listed twice"),
    ],
)
def test_a_changed_file_is_refused(tmp_path, change, message):
    path = save_profile(PROFILE, tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ArtifactError, match=message):
        load_profile(path)


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_a_file_that_is_no_profile_is_refused(tmp_path, content):
    path = tmp_path / "hub_x.json"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="hub_x"):
        load_profile(path)


def test_what_a_person_sees():
    text = shown(PROFILE)
    for part in (
        "Xiaomi 14 Pro: measured through Qualcomm AI Hub, on Samsung Galaxy S24 (Family)",
        "Snapdragon 8 Gen 3",
        "1,220",
        "812 NPU, 3 CPU",
        "41.2 dB",
        "identical",
        "conv_in (Conv, NPU) 4.5 ms",
        "do not add up",
        "without the weights",
        "note: the clocks may differ",
        "1,320",
    ):
        assert part in text
    bars = {line.split()[1]: line.count("█") for line in text.splitlines() if "█" in line}
    assert bars == {"unet": 30, "decoder": 2}


def test_the_total_sums_loads_and_operations_and_takes_the_highest_peak():
    unet = COMPONENTS[0]
    decoder = dataclasses.replace(unet, name="decoder", peak_bytes=7_000_000, ops={"NPU": 8, "GPU": 1})
    profile = dataclasses.replace(PROFILE, components=(unet, decoder), total_ms=2441.0)
    (total,) = (line for line in shown(profile).splitlines() if "total" in line)
    cells = [cell.strip() for cell in total.strip("│ ").split("│")]
    sums = ["2,600", "2,400", "1,800", "600", "12", "820 NPU, 3 CPU, 1 GPU"]
    assert cells[:8] == ["total", "2,441", *sums]
    page = render_profiles("tiny", [profile])
    for head, value in zip(("p95", "min", "first load", "warm load", "peak MB", "ops"), sums, strict=True):
        assert f'<td data-label="{head}">{value}</td>' in page.partition(">total<")[2]
    failed = dataclasses.replace(PROFILE, components=(unet, ComponentProfile("x", None)), total_ms=None)
    assert ">total<" not in render_profiles("tiny", [failed])


def test_what_the_peak_counts_depends_on_its_source():
    for source, words in (("hub", "without the weights that it maps"), ("adb", "app&#39;s process while")):
        profile = dataclasses.replace(PROFILE, source=source)
        page = render_profiles("tiny", [profile])
        assert words in page
        assert html.unescape(words) in shown(profile)
        assert page.count("peak MB: ") == shown(profile).count("peak MB: ") == 1


def test_the_page_has_warm_loads_and_the_slowest_operations():
    page = render_profiles("tiny", [PROFILE])
    assert '<td data-label="warm load">300</td>' in page
    assert "conv_in (Conv, NPU) 4.5 ms" in page
    assert "do not add up to the latency" in page


def test_an_estimate_outside_of_the_calibration_is_marked_and_has_no_error(tmp_path):
    artifact = write_artifact(tmp_path / "out")
    saved(artifact, source="estimate")
    (profile,) = newest_profiles(artifact)
    page = render_profiles("tiny", [profile])
    for text in (shown(profile), page):
        assert "OUTSIDE of the calibration" in text
        assert "±" not in text
    row = diff_profiles(artifact, artifact)[0]
    assert row.quantity.startswith("ms.estimate, OUTSIDE.")
    assert row.a_error_percent is None


def test_an_estimate_shows_its_error_and_a_failure_its_reason():
    estimate = dataclasses.replace(PROFILE, source="estimate", error_percent=8.0)
    assert "estimated, not measured" in shown(estimate)
    assert "± 8 %" in shown(estimate)
    components = (COMPONENTS[0], ComponentProfile("decoder", None, error="[out of] memory"))
    broken = dataclasses.replace(PROFILE, components=components, total_ms=total_ms(components))
    assert "failed: decoder: [out of] memory" in shown(broken)
    assert broken.errors == ("decoder: [out of] memory",)


def saved(artifact, **changes):
    digest = {"manifest_sha256": artifact.digest}
    save_profile(dataclasses.replace(PROFILE, **(digest | changes)), profiles_dir(artifact))


def test_the_newest_of_each_source_and_device_counts(tmp_path):
    artifact = write_artifact(tmp_path / "out")
    saved(artifact, total_ms=1.0)
    saved(artifact, total_ms=2.0, created="2025-02-01T12:00:00Z")
    saved(artifact, total_ms=3.0, source="host", created="2025-01-01T12:00:00Z")
    saved(artifact, total_ms=4.0, created="2025-03-01T12:00:00Z", manifest_sha256="1" * 64)
    assert [(p.source, p.total_ms) for p in newest_profiles(artifact)] == [("host", 3.0), ("hub", 2.0)]


def test_diff_puts_times_side_by_side(tmp_path):
    a, b = write_artifact(tmp_path / "a"), write_artifact(tmp_path / "b")
    saved(a)
    saved(b, components=COMPONENTS[:1], total_ms=1220.5)
    saved(b, source="host", asked_for="this computer")
    saved(b, source="estimate", error_percent=9.0)
    saved(b, asked_for=PROFILE.device, notes=(f"a stand-in: {MADE_UP}",))
    found = diff_profiles(a, b)
    rows = {(r.component, r.quantity): (r.a, r.b) for r in found}
    on = "on Samsung Galaxy S24 (Family)"
    assert rows[None, f"ms.hub.Xiaomi 14 Pro {on}"] == (1320.0, 1220.5)
    assert rows["unet", f"ms.hub.Xiaomi 14 Pro {on}"] == (1220.5, 1220.5)
    assert rows["decoder", f"ms.hub.Xiaomi 14 Pro {on}"] == (99.5, None)
    assert rows["decoder", f"ms.host.this computer {on}"] == (None, 99.5)
    assert rows["unet", f"ms.hub, MADE UP.{PROFILE.device}"] == (None, 1220.5)
    errors = {(r.a_error_percent, r.b_error_percent) for r in found if "estimate" in r.quantity}
    assert errors == {(None, 9.0)}


def test_a_failure_hides_no_earlier_time(tmp_path):
    artifact = write_artifact(tmp_path / "out")
    broken = (COMPONENTS[0], ComponentProfile("decoder", None, error="no luck"))
    for day, ms in enumerate((None, 1.0, 2.0, None, None), 1):
        components = COMPONENTS if ms else broken
        saved(artifact, total_ms=ms, components=components, created=f"2025-02-0{day}T12:00:00Z")
    assert [(p.created[9], p.total_ms) for p in newest_profiles(artifact)] == [("3", 2.0), ("5", None)]
    rows = {row.component: row.a for row in diff_profiles(artifact, artifact)}
    assert rows == {None: 2.0, "unet": 1220.5, "decoder": 99.5}


def test_profiles_beside_each_other_and_as_a_page(tmp_path):
    artifact = write_artifact(tmp_path / "out")
    saved(artifact)
    broken = (COMPONENTS[0], ComponentProfile("decoder", None, error="<b>no memory</b>"))
    saved(artifact, source="adb", asked_for="R&D phone", components=broken, total_ms=None)
    saved(artifact, source="estimate", total_ms=2640.0, error_percent=9.0)
    saved(artifact, asked_for="Galaxy S24", notes=(f"a stand-in: {MADE_UP}",))
    console = Console(file=io.StringIO(), width=200)
    console.print(render_comparison(newest_profiles(artifact)))
    text = console.file.getvalue()
    assert "2,640 ± 9 %" in text
    bars = [line.count("█") for line in text.splitlines() if "█" in line]
    assert sorted(bars) == [15, 15, 30]
    assert text.count("hub, MADE UP") == 2
    assert text.count("Xiaomi 14 Pro on Samsung Galaxy S24 (Family)") >= 2
    page = render_profiles("tiny", newest_profiles(artifact))
    tile = "<dt>Xiaomi 14 Pro on Samsung Galaxy S24 (Family)</dt><dd>2,640\N{NO-BREAK SPACE}ms ± 9 %</dd>"
    assert tile in page
    assert "R&amp;D phone" in page
    assert "&lt;b&gt;no memory&lt;/b&gt;" in page
    assert "estimated, not measured" in page
    assert page.count("MADE UP by a server") == 2
    assert "<script" not in page


def test_parts_add_up():
    first, second = COMPONENTS[0], dataclasses.replace(COMPONENTS[0], warm_load_ms=None, peak_bytes=7)
    joined = join_parts([first, second])
    assert joined.ms == Latency(2441.0, 2600.5, 2400.0, 100)
    assert (joined.first_load_ms, joined.warm_load_ms, joined.peak_bytes) == (1800.0, None, 12_000_000)
    assert joined.ops == {"NPU": 1624, "CPU": 6}
    assert join_parts([first]) is first
