"""Numbers in README and manual are those of benchmarks/results/: each phrase is made again from the file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support import ROOT

README, NUMBERS = "README.md", "docs/explanation/numbers.md"
FULL_SIZE, QUANTISATION = "docs/explanation/full-size.md", "docs/decisions/quantisation.md"


def result(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def cost(stage: dict[str, float]) -> str:
    seconds = stage["seconds"]
    time = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
    return f"{time}, {stage['peak_bytes'] / 1e9:.1f} GB"


def ladder() -> Iterator[tuple[str, str]]:
    rows = result("flops_ladder")["rows"]
    for row in rows:
        ours = f"{row['tflops']:.3f} ({100 * row['deviation']:.1f} %)"
        theirs = f"{row['tflops_paper_convention']:.3f} ({100 * row['deviation_paper_convention']:.2f} %)"
        yield NUMBERS, f"| `{row['preset']}` | {row['published_tflops']:.2f} | {ours} | {theirs} |"
    last = rows[-1]
    yield README, f"{last['tflops_paper_convention']:.3f} T, the paper has {last['published_tflops']:.2f} T"


def quality() -> Iterator[tuple[str, str]]:
    values = result("demo_quality")["values"]
    gain = f"{values['psnr_db']:.1f} dB, {values['psnr_gain_db']:.1f} dB above repeating the first frame"
    yield README, gain
    yield NUMBERS, gain
    yield NUMBERS, f"median error {values['position_error_px_median']:.2f} px"
    yield NUMBERS, f"({values['position_error_px_if_still']:.1f} px if they had not moved)"
    yield NUMBERS, f"{100 * values['darts_lost_share']:.1f} % of the darts are not found"
    yield NUMBERS, f"| {values['gradient_energy_ratio_last_frame']:.2f} | 0.7 |"
    for name, key in (("demo_quality_quantised", "quantised"), ("demo_quality_npu_sim", "npu-sim")):
        found = result(name)
        pair = f"{found[key]['psnr_db']:.2f} dB against {found['values']['psnr_db']:.2f} dB in float"
        yield NUMBERS, f"{pair}, {found['psnr_lost_db']:.2f} dB lost"
    lost = [result(f"demo_quality_{kind}")["psnr_lost_db"] for kind in ("quantised", "npu_sim")]
    yield README, f"{lost[0]:.2f} dB PSNR; {lost[1]:.2f} dB on the NPU's simulator"


def mixed_precision() -> Iterator[tuple[str, str]]:
    steps = result("mixed_precision")["steps"]
    yield NUMBERS, f"{steps[0]['measured_db']:.1f} dB SQNR at {steps[0]['bit_operations']:.2f}"
    for db in (32.5, 36.5, 44.3):
        step = next(step for step in steps if round(step["measured_db"], 1) == db)
        yield NUMBERS, f"{db} dB at {step['bit_operations']:.2f}"


def export_cost() -> Iterator[tuple[str, str]]:
    demo, middle = (model["ratios"] for model in result("export_cost")["models"])
    for key, text in (
        ("total_seconds", "comparison | {:.2f} | {:.2f} |"),
        ("peak_bytes", "peak memory | {:.2f} | {:.2f}:"),
        ("bytes", "size of the files | {:.2f} | {:.2f} |"),
        ("nodes", "nodes | {:.2f} | {:.2f} |"),
        ("flops", "FLOPs of a run | {:.2f} | {:.2f} |"),
        ("latency_ms", "CPU provider | {:.2f} | {:.2f} |"),
    ):
        yield NUMBERS, text.format(demo[key], middle[key])


def traffic() -> Iterator[tuple[str, str]]:
    rows = result("unet_traffic")["megabytes"]["w8a16"]
    for row in rows.values():
        gigabytes = [row[key] / 1000 for key in ("ours", "plain", "floor")]
        ratio = gigabytes[0] / gigabytes[1]
        yield NUMBERS, "| {:.2f} | {:.2f} | {:.2f} | {:.2f} |".format(*gigabytes[:2], ratio, gigabytes[2])
    whole = rows["sum"]
    share = 100 * whole["ours"] / whole["plain"]
    yield README, f"{whole['ours'] / 1000:.2f} GB per run, {share:.0f} % of the plain export"


def estimate() -> Iterator[tuple[str, str]]:
    found = result("estimate_calibration")
    mean, worst = (100 * found[f"{which}_leave_one_out_error"] for which in ("mean", "worst"))
    yield README, f"{mean:.1f} % mean, {worst:.1f} % worst"
    yield NUMBERS, f"{mean:.1f} % mean, {worst:.1f} % worst"


def full_size() -> Iterator[tuple[str, str]]:
    found = result("full_size")
    stages, parts = found["stages"], found["components"]
    names = ("unet", "image_encoder", "vae_encoder", "decoder")

    def row(text: str, stage: str) -> tuple[str, str]:
        return FULL_SIZE, f"| {text} | " + " | ".join(cost(stages[stage.format(n)]) for n in names) + " |"

    yield row("rewritten and proven", "export {}: rewrite")
    yield row("float ONNX written", "export {}: write")
    yield row("compared with the trained network on onnxruntime", "export {}: compare")
    yield row("run on three pictures", "calibrate: {}")
    yield row("quantised by AIMET, written, judged", "quantise {}")
    moved = [
        sum(map(sum, part["binaries"][0]["parts_dram_bytes"])) / 1e9
        for part in (parts[name] for name in names)
    ]
    yield (
        FULL_SIZE,
        "planned DRAM traffic per run | {:.2f} GB | {:.2f} GB | {:.2f} GB | {:.2f} GB".format(*moved),
    )
    sizes = [size / 1e6 for size in sorted(parts["unet"]["binaries"][0]["parts_bytes"], reverse=True)]
    yield FULL_SIZE, "{:.0f}, {:.0f}, {:.0f} and {:.0f} MB".format(*sizes)
    whole = found["init"]["seconds"] + found["export"]["seconds"]
    yield README, f"{whole / 60:.0f} minutes, at most {found['export']['peak_bytes'] / 1e9:.1f} GB"
    yield FULL_SIZE, f"took {whole / 60:.0f} minutes"


def quantisation() -> Iterator[tuple[str, str]]:
    found = {setting["name"]: setting for setting in result("quantisation")["settings"]}
    best = found["W8A16, headroom 1.25"]
    yield (
        QUANTISATION,
        f"{best['psnr_lost_db']:.2f} dB PSNR lost at W8A16 "
        f"(worst SQNR {best['unet_sqnr_db']['worst']:.1f} dB)",
    )
    for name in ("W8A8", "W4A16"):
        lost, worst = found[name]["psnr_lost_db"], found[name]["unet_sqnr_db"]["worst"]
        yield QUANTISATION, f"{lost:.1f} dB at {name} ({worst:.1f} dB)"
    worst = found["W8A16, headroom 1"]["unet_sqnr_db"]["worst"]
    yield QUANTISATION, f"from {best['unet_sqnr_db']['worst']:.1f} to {worst:.1f} dB SQNR"


def growth() -> Iterator[tuple[str, str]]:
    rows = result("cost_growth")["rows"]
    assert len(rows) == 7
    for row in rows.values():
        yield FULL_SIZE, f"| {row['parameters'] / 1e6:.0f} M | {row['gflops']:.0f} |"


SOURCES = (
    ladder,
    quality,
    mixed_precision,
    export_cost,
    traffic,
    estimate,
    full_size,
    quantisation,
    growth,
)


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.__name__)
def test_pages_have_the_numbers_of_the_results(source: Any) -> None:
    missing = [
        f"{page}: {phrase}"
        for page, phrase in source()
        if phrase not in (ROOT / page).read_text(encoding="utf-8")
    ]
    assert not missing
