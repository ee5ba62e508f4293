from __future__ import annotations

import dataclasses
import re

from mobilevd_deploy.profiling.profile import (
    ComponentProfile,
    Latency,
    OpTime,
    OutputCheck,
    Profile,
    TrafficReport,
    TrafficRow,
)
from mobilevd_deploy.report.profiles_page import render_profiles
from tests.support.html_page import HOSTILE, Page, percent

PROFILE = Profile(
    schema_version=1,
    asked_for="Xiaomi 14 Pro",
    device="Xiaomi 14",
    chipset="Snapdragon 8 Gen 3",
    source="hub",
    created="2025-01-31T12:00:00Z",
    artifact="walk",
    manifest_sha256="0" * 64,
    components=(
        ComponentProfile(
            "unet",
            Latency(300.0, 330.0, 290.0, 100),
            ops={"NPU": 812},
            slowest=(OpTime("conv_in", "Conv", "NPU", 4.5),),
            check=OutputCheck(41.25),
        ),
        ComponentProfile("decoder", Latency(100.0), check=OutputCheck(None)),
    ),
    total_ms=400.0,
    error_percent=9.0,
    notes=("the clocks may differ",),
    tools={"qai-hub": "0.56.0"},
)


def test_bars_are_parts_of_the_clip_and_the_total_fills_the_column():
    page = Page(render_profiles("walk", [PROFILE]))
    assert [percent(bar["width"]) for bar in page.of_class("rect", "cost")] == [75, 25, 100]
    for words in (
        "Xiaomi 14 Pro on Xiaomi 14 400 ms ± 9 % measured through Qualcomm AI Hub",
        "Chipset: Snapdragon 8 Gen 3. Date: 2025-01-31. One clip: 400 ms ± 9 % .",
        "unet 300 330 290 - - - 812 NPU 41.2 dB",
        "decoder 100 - - - - - - identical",
        "total 400 - - - - - 812 NPU -",
        "the clocks may differ",
        "qai-hub 0.56.0",
    ):
        assert words in page.text


def test_without_all_times_there_is_no_total_but_the_reason():
    failed = ComponentProfile("decoder", None, error="no memory")
    profile = dataclasses.replace(PROFILE, components=(PROFILE.components[0], failed), total_ms=None)
    page = Page(render_profiles("walk", [profile]))
    assert "There is no total, because a component failed." in page.text
    assert "decoder failed" in page.text
    assert "decoder: no memory" in page.text
    assert [percent(bar["width"]) for bar in page.of_class("rect", "cost")] == [100]
    none = dataclasses.replace(profile, components=(failed,))
    assert not Page(render_profiles("walk", [none])).of_class("rect", "cost")


def test_the_page_stands_alone_and_is_the_same_for_the_same_profiles():
    text = render_profiles("walk", [PROFILE], [planned()])
    assert text == render_profiles("walk", [PROFILE], [planned()])
    assert not re.search(r"https?:|url\(|@import|<script|<link|<img", text)
    assert "prefers-color-scheme: dark" in text
    policies = [a["content"] for tag, a in Page(text).elements if tag == "meta" and "http-equiv" in a]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_hostile_names_are_only_text():
    unet, decoder = PROFILE.components
    hostile = dataclasses.replace(
        PROFILE,
        asked_for=HOSTILE,
        device=HOSTILE + "2",
        chipset=HOSTILE,
        components=(
            dataclasses.replace(
                unet, name=HOSTILE, ops={HOSTILE: 1}, slowest=(OpTime(HOSTILE, "", "", 1.0),)
            ),
            dataclasses.replace(decoder, error=HOSTILE),
        ),
        notes=(HOSTILE,),
        tools={HOSTILE: HOSTILE},
    )
    row = TrafficRow(HOSTILE, 2, 1, 1, (TrafficRow(HOSTILE, 1, 1),), HOSTILE)
    traffic = dataclasses.replace(planned(), target=HOSTILE, precision=HOSTILE, rows=(row,))
    page = Page(render_profiles(HOSTILE, [hostile], [traffic]))
    plain = Page(render_profiles("walk", [PROFILE], [planned()]))
    assert {tag for tag, _ in page.elements} == {tag for tag, _ in plain.elements} - {"details", "summary"}
    assert {name for _, attrs in page.elements for name in attrs} == {n for _, a in plain.elements for n in a}
    assert page.text.count(HOSTILE) >= 20


def planned(parts: int = 10) -> TrafficReport:
    blocks = tuple(TrafficRow(f"down_blocks.{i}", 2_000_000, 1_000_000) for i in range(parts))
    rows = (
        TrafficRow("unet", 30_000_000, 10_000_000, None, blocks),
        TrafficRow("decoder", 10_000_000, 0, 5_000_000, (), "with random weights"),
    )
    return TrafficReport(1, "walk", "0" * 64, "SM8650", "w8a16", 0, "2025-01-31T12:00:00Z", rows)


def test_planned_traffic_is_a_table_with_bars_and_its_blocks():
    page = Page(render_profiles("walk", (), [planned()]))
    assert "DRAM traffic 50.0 MB planned for SM8650" in page.text
    assert "unet 30.0 MB + 10.0 MB" in page.text
    assert "decoder 10.0 MB + 0 B inputs, outputs and weights once: 5.00 MB" in page.text
    assert "Sum: 40.0 MB read and 10.0 MB written." in page.text
    assert "2 more" in page.text
    assert "with random weights" in page.text
    read, written = (page.of_class("rect", kind) for kind in ("left", "added"))
    assert [percent(bar["width"]) for bar in read[:3]] == [75, 25, 5]
    assert [percent(bar["width"]) for bar in written[:3]] == [25, 0, 2.5]
    assert [percent(bar["x"]) for bar in written[:2]] == [75, 25]
    assert len(read) == len(written) == 12
    assert "more" not in Page(render_profiles("walk", (), [planned(8)])).text
