"""The benchmark of benchmarks/export_cost.py: its arithmetic, and one run on a tiny network."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from mobilevd_deploy.base.progress import Progress
from mobilevd_deploy.config.presets import load_preset
from mobilevd_deploy.model.components import build_component
from tests.support import ROOT

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("export_cost")


def run(seconds: dict[str, float], peak: int, **others: Any) -> dict[str, Any]:
    record = {"error": None, "seconds": seconds, "peak_bytes": peak, "peak_bytes_before": 50}
    identity = {
        "parameters": 7,
        "temporal_blocks": {"total": 4, "kept": 2},
        "frames": 2,
        "latents": "4x4",
        "weights": {"seed": 1},
    }
    return record | identity | {"parity_db": 120.0, "passes": {}} | others


OURS = [
    run({"rewrites with proofs": 10.0, "deploy form": 1.0, "export": 5.0}, 300),
    run({"rewrites with proofs": 14.0, "deploy form": 1.0, "export": 7.0}, 500),
]
ALTERNATIVE = [run({"export": 10.0}, 700), run({"export": 30.0}, 900)]
LATENCY: dict[str, Any] = {
    "error": None,
    "graphs": {
        "ours": {"nodes": 10, "bytes": 200, "flops": 30},
        "alternative": {"nodes": 40, "bytes": 400, "flops": 40},
    },
    "milliseconds": {"ours": [1.0, 3.0, 2.0], "alternative": [8.0, 7.0, 90.0]},
    "agreement_db": 110.0,
}


def test_ratios_are_ours_over_the_alternatives_medians(bench: Any) -> None:
    result = bench.summarise("tiny", OURS, ALTERNATIVE, LATENCY)
    assert result["ours"]["seconds"] == {"rewrites with proofs": 12, "deploy form": 1, "export": 6}
    assert result["ratios"] == {
        "export_seconds": 7 / 20,  # without the rewrites
        "total_seconds": 19 / 20,
        "peak_bytes": 400 / 800,
        "bytes": 0.5,
        "nodes": 0.25,
        "flops": 0.75,
        "latency_ms": 2 / 8,  # of medians: the outlier does not count
    }
    assert result["agreement_db"] == 110
    assert [r["peak_bytes"] for r in result["alternative"]["runs"]] == [700, 900]


def test_a_failure_of_the_alternative_is_a_result(bench: Any) -> None:
    failed = [run({"export": 3.0}, 700, error="RuntimeError: no such operator")]
    latency = LATENCY | {"graphs": {"ours": LATENCY["graphs"]["ours"]}, "agreement_db": None}
    result = bench.summarise("tiny", OURS, failed, latency)
    assert result["alternative"]["error"] == "RuntimeError: no such operator"
    assert result["ratios"] == {}
    assert result["ours"]["latency_ms"] == 2
    assert "no such operator" in rendered(bench.table(result))


@pytest.mark.parametrize("which", ["ours", "latency"])
def test_a_failure_of_ours_ends_it(bench: Any, which: str) -> None:
    died = {"error": f"{which}: killed"}
    ours = [OURS[0], died] if which == "ours" else OURS
    with pytest.raises(RuntimeError, match=f"tiny: {which}: killed"):
        bench.summarise("tiny", ours, ALTERNATIVE, died if which == "latency" else LATENCY)


def test_a_child_that_dies_is_reported(bench: Any, tmp_path: Path) -> None:
    record = bench._in_child("ours", tmp_path)  # there is no job.json
    assert record["error"].startswith("ours: the process ended with 1: FileNotFoundError")


def test_midsize_is_a_smaller_mobilevd(bench: Any) -> None:
    (midsize,) = (s.spec for s in bench.subjects() if s.spec.name == "midsize")
    large = load_preset("mobilevd").model.unet
    assert midsize.unet.kept_temporal_blocks == large.kept_temporal_blocks
    assert (midsize.unet.gated, midsize.unet.funnels) == (large.gated, large.funnels)
    with torch.device("meta"):
        unet = build_component(midsize, "unet")
    assert 190e6 < sum(parameter.numel() for parameter in unet.parameters()) < 210e6


@pytest.mark.slow
def test_both_ways_of_a_tiny_network_agree(bench: Any) -> None:
    result = bench.measure(bench.quick_subject(), Progress())
    assert result["temporal_blocks"]["kept"] == 2 < result["temporal_blocks"]["total"]
    assert all(report["changed"] for report in result["ours"]["passes"].values())
    assert result["ours"]["parity_db"] >= 90
    assert result["agreement_db"] >= 90
    assert result["ratios"]["flops"] < 1
    assert result["ratios"]["nodes"] < 1
    assert all(ratio > 0 for ratio in result["ratios"].values())
    assert len(result["pairs"]["ours"]) == len(result["pairs"]["alternative"]) == 3
    assert "quick" in rendered(bench.table(result))


def rendered(shown: Any) -> str:
    console = Console(width=120)
    with console.capture() as captured:
        console.print(shown)
    return captured.get()
