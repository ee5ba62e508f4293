"""Names of phones and chips, and the hosted phone that replaces one that is not hosted."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from mobilevd_deploy.cli.tables import render_devices
from mobilevd_deploy.config.devices import find, find_chip, table
from mobilevd_deploy.config.recipe import NpuOptions, load_recipe
from mobilevd_deploy.errors import SpecError, UsageError
from mobilevd_deploy.profiling.hub.hosted import HostedDevice, choose_hosted, list_devices


def hosted(name: str, os: str, *attributes: str) -> HostedDevice:
    return HostedDevice(name, os, attributes)


S24 = hosted("Samsung Galaxy S24 (Family)", "14", "chipset:qualcomm-snapdragon-8gen3", "hexagon:v75")
S25 = hosted("Samsung Galaxy S25 (Family)", "15", "chipset:qualcomm-snapdragon-8-elite-for-galaxy")
QRD = hosted("Snapdragon 8 Elite QRD", "15", "chipset:qualcomm-snapdragon-8-elite", "hexagon:v79")
CAR = hosted("SA8775 (Proxy)", "", "chipset:qualcomm-sa8775", "hexagon:v73")
LIVE = [S24, S25, CAR]


def test_table_holds_the_facts() -> None:
    chips = {chip.attributes[0]: (chip.sm[0], chip.htp, chip.soc_model) for chip in table().chip}
    assert chips == {
        "qualcomm-snapdragon-8gen1": ("sm8450", "v69", 36),
        "qualcomm-snapdragon-8gen2": ("sm8550", "v73", 43),
        "qualcomm-snapdragon-8gen3": ("sm8650", "v75", 57),
        "qualcomm-snapdragon-8-elite": ("sm8750", "v79", 69),
        "qualcomm-snapdragon-8-elite-gen5": ("sm8850", "v81", 87),
    }
    names = [phone.name for phone in table().phone]
    assert len(set(names)) == len(names)
    assert {phone.chip for phone in table().phone} <= {chip.name for chip in table().chip}


@pytest.mark.parametrize("name", ["Xiaomi 14 Pro", "xiaomi 14 pro", "Xiaomi-14-Pro", "XIAOMI14PRO"])
def test_phone_by_any_spelling(name: str) -> None:
    device = find(name)
    assert device.asked_for == name
    assert device.phone is not None
    assert (device.phone.name, device.phone.hosted) == ("Xiaomi 14 Pro", False)
    assert device.chip.name == "Snapdragon 8 Gen 3"


@pytest.mark.parametrize(
    ("name", "chip"),
    [
        ("Snapdragon 8 Gen 3", "Snapdragon 8 Gen 3"),
        ("8gen3", "Snapdragon 8 Gen 3"),
        ("SM8650", "Snapdragon 8 Gen 3"),
        ("qualcomm-snapdragon-8gen3", "Snapdragon 8 Gen 3"),
        ("sm8750-ac", "Snapdragon 8 Elite"),
        ("8 Elite for Galaxy", "Snapdragon 8 Elite"),
        ("8 Elite Gen 5", "Snapdragon 8 Elite Gen 5"),
    ],
)
def test_chip_by_any_spelling(name: str, chip: str) -> None:
    device = find(name)
    assert device.phone is None
    assert device.chip.name == chip


@pytest.mark.parametrize(
    ("name", "part_number"),
    [
        *(
            (shown, chip.sm[0].upper())
            for chip in table().chip
            for shown in (chip.name, *chip.attributes, *chip.sm)
        ),
        ("SM8650", "SM8650"),
        ("Sm8650", "SM8650"),
        (" sm8650 ", "SM8650"),
        ("SM-8650", "SM8650"),
        ("SM8650-AB", "SM8650"),
        ("SM8650-AC", "SM8650"),
        ("sm8550ac", "SM8550"),
        ("SM8850-AD", "SM8850"),
        ("8gen3", "SM8650"),
        ("8 gen 3", "SM8650"),
        ("Snapdragon 8 Gen 3", "SM8650"),
        ("Snapdragon-8-Gen-3", "SM8650"),
        ("Qualcomm Snapdragon 8 Gen 3 (SM8650)", "SM8650"),
        ("8 Elite", "SM8750"),
        ("Snapdragon 8 Elite for Galaxy", "SM8750"),
    ],
)
def test_targets_in_any_spelling_are_kept_as_part_numbers(name: str, part_number: str) -> None:
    """One spelling, because stages and files are named by it: `sm8650` failed after 516 s."""
    assert find_chip(name).part_number == part_number
    assert NpuOptions(targets=(name,)).targets == (part_number,)
    compiled = load_recipe("xiaomi-14-pro").compiled_for([name, part_number])
    assert compiled.npu is not None
    assert compiled.npu.targets == (part_number,)


@pytest.mark.parametrize(
    ("name", "what", "next_step"),
    [
        ("sm865", "unknown chip 'sm865'", "nearest: SM8650"),
        ("SM8651", "unknown chip 'SM8651'", "nearest: SM8650"),
        ("SM8650-ACX", "unknown chip 'SM8650-ACX'", "nearest: SM8"),
        ("Snapdragon 7 Gen 3", "unknown chip 'Snapdragon 7 Gen 3'", "nearest: SM8650"),
        ("Exynos 2400", "unknown chip 'Exynos 2400'", "known: SM8450, SM8550, SM8650, SM8750, SM8850"),
        ("", "unknown chip ''", "known: SM8450"),
        ("Xiaomi 14 Pro", "'Xiaomi 14 Pro' is a phone", "name its chip: SM8650 (Snapdragon 8 Gen 3)"),
    ],
)
def test_targets_that_are_no_chip_are_refused_with_the_nearest(name: str, what: str, next_step: str) -> None:
    with pytest.raises(UsageError) as caught:
        find_chip(name)
    assert caught.value.what.startswith(what)
    assert (caught.value.next_step or "").startswith(next_step)
    with pytest.raises(SpecError, match=r"npu\.targets: ") as in_a_recipe:
        NpuOptions(targets=(name,))
    assert in_a_recipe.value.next_step == caught.value.next_step


@pytest.mark.parametrize("name", ["Galaxy S24", "S24", "Samsung Galaxy S24 (Family)"])
def test_galaxy_and_family_may_be_left_out(name: str) -> None:
    assert find(name).chip.soc_model == 57


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(UsageError, match="no phone or chip is called 'Xiaomi 14 Prp'") as caught:
        find("Xiaomi 14 Prp")
    assert (caught.value.next_step or "").startswith("nearest are Xiaomi 14 Pro")
    for name in ("", "()", "Nokia 3310", "12"):
        with pytest.raises(UsageError):
            find(name)


def test_a_hosted_phone_is_taken_itself() -> None:
    target = choose_hosted("galaxy s24", LIVE)
    assert (target.device, target.os, target.chipset, target.notes) == (
        S24.name,
        "14",
        "Snapdragon 8 Gen 3",
        (),
    )
    assert target.asked_for == "galaxy s24"
    # Known to the hub alone: its own word for the chip.
    assert choose_hosted("SA8775 (Proxy)", LIVE).chipset == "qualcomm-sa8775"


def test_another_phone_of_the_same_chip_stands_in() -> None:
    target = choose_hosted("Xiaomi 14 Pro", LIVE)
    assert (target.asked_for, target.device, target.chipset) == (
        "Xiaomi 14 Pro",
        S24.name,
        "Snapdragon 8 Gen 3",
    )
    (note,) = target.notes
    assert "Xiaomi 14 Pro is not hosted" in note
    assert S24.name in note
    assert "other clocks" in note


def test_a_chip_needs_no_apology() -> None:
    assert choose_hosted("8 Gen 3", LIVE).notes == ()


def test_the_plain_chip_comes_before_the_one_for_galaxy() -> None:
    assert choose_hosted("Xiaomi 15", LIVE).device == S25.name
    target = choose_hosted("Xiaomi 15", [*LIVE, QRD])
    assert target.device == QRD.name
    assert "other clocks" not in target.notes[0]


def test_the_newest_system_is_used() -> None:
    versions = [hosted(S24.name, os, *S24.attributes) for os in ("9", "14", "15.1", "15")]
    assert choose_hosted("S24", versions).os == "15.1"
    assert choose_hosted("Xiaomi 14 Pro", versions).os == "15.1"


def test_nothing_of_the_chip_is_hosted() -> None:
    with pytest.raises(UsageError, match="no phone with its chip \\(Snapdragon 8 Gen 2\\)"):
        choose_hosted("Xiaomi 13", LIVE)
    with pytest.raises(UsageError, match="no phone or chip is called") as caught:
        choose_hosted("SA8776", LIVE)
    assert "SA8775" in (caught.value.next_step or "")


def test_list() -> None:
    rows = {row["phone"]: row for row in list_devices()}
    assert rows["Xiaomi 14 Pro"] == {
        "phone": "Xiaomi 14 Pro",
        "chipset": "Snapdragon 8 Gen 3",
        "sm": ["sm8650"],
        "htp": "v75",
        "soc_model": 57,
        "hosted": False,
        "os": None,
        "profiled_on": "Samsung Galaxy S24",
    }
    live = {row["phone"]: row for row in list_devices(LIVE)}
    assert live["Samsung Galaxy S24"]["hosted"]
    assert live["Samsung Galaxy S24"]["os"] == "14"
    assert live["Xiaomi 14 Pro"]["profiled_on"] == S24.name
    assert not live["Samsung Galaxy S23"]["hosted"]
    assert live["Xiaomi 13"]["profiled_on"] is None
    assert live["SA8775 (Proxy)"] | {"os": ""} == {
        "phone": "SA8775 (Proxy)",
        "chipset": "qualcomm-sa8775",
        "sm": [],
        "htp": "v73",
        "soc_model": None,
        "hosted": True,
        "os": "",
        "profiled_on": "SA8775 (Proxy)",
    }


def test_rendering_names_its_source() -> None:
    for live in (False, True):
        console = Console(width=200, file=io.StringIO())
        console.print(render_devices(list_devices(LIVE if live else None), live=live))
        shown = console.file.getvalue()  # type: ignore[attr-defined]
        assert "Xiaomi 14 Pro" in shown
        assert ("AI Hub's current list" in shown and "built-in" not in shown) is live
