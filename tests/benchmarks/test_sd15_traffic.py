"""The forms that benchmarks/sd15_traffic.py measures compute what diffusers' network computes."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from mobilevd_deploy.base.tensors import sqnr_db
from mobilevd_deploy.config.recipe import load_recipe
from mobilevd_deploy.profiling.estimate import load_calibration
from mobilevd_deploy.qnn.compiled import DramBytes
from tests.support import ROOT

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("sd15_traffic")


@torch.no_grad()
def test_every_part_of_a_small_network_is_diffusers_own(bench: Any) -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64, 64, 64), cross_attention_dim=24, sample_size=32, norm_num_groups=8
    ).eval()
    inputs = (torch.randn(1, 4, 32, 32), torch.tensor([500.0]), torch.randn(1, 7, 24))
    found = list(bench.parts(unet, inputs, load_recipe(bench.RECIPE).graph))
    assert len(found) == 22 + 16 + 3 + 3 + 2
    assert len(found[2].form.attn1.tiles) == 2  # tiled as at full size
    for part in found:
        assert sqnr_db(part.source().numpy(), part.form(*part.inputs).numpy()) > 90, part.path


def test_the_network_is_the_published_one_and_its_operations_are_the_estimates(bench: Any) -> None:
    unet, inputs = bench.sd15_on_meta()
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964
    found = list(bench.parts(unet, inputs, load_recipe(bench.RECIPE).graph))
    folded = sum(p.numel() for name, p in unet.named_parameters() if "time_emb" in name)
    # Norms stand as constants in the deploy form.
    assert sum(part.weights for part in found) == pytest.approx(859_520_964 - folded, rel=1e-3)
    assert sum(part.counts.total for part in found) == pytest.approx(load_calibration().sd15.total, rel=1e-4)


def test_a_sum_is_claimed_of_all_parts_only(bench: Any) -> None:
    unet, inputs = bench.sd15_on_meta()
    found = list(bench.parts(unet, inputs, load_recipe(bench.RECIPE).graph))
    moved = {part.path: DramBytes(30_000_000, 10_000_000) for part in found}
    whole = bench.result(found, moved)
    assert whole["sum"]["dram_ms"] == pytest.approx(len(found) * 40 / 76.8)
    assert whole["sum"]["arithmetic_ms"] == pytest.approx(
        sum(row["arithmetic_ms"] for row in whole["blocks"].values())
    )
    assert whole["published_over_floor"] == pytest.approx(76.2 / whole["sum"]["floor_ms"])
    del moved[found[3].path]
    partial = bench.result(found, moved)
    assert partial["missing"] == [found[3].path]
    assert "sum" not in partial
