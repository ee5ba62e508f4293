"""The search for bits: its simulation must agree with what `quantise` makes of the rules, and it resumes."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mobilevd_deploy.base.tensors import Tensors, sqnr_db
from mobilevd_deploy.config.recipe import QuantRule, QuantScheme, Recipe, load_recipe
from mobilevd_deploy.errors import ParityError, UsageError
from mobilevd_deploy.npu import ops
from mobilevd_deploy.quantize.simulation import Quantised, bits_of, input_sources, quantise
from mobilevd_deploy.tune import (
    CANDIDATES,
    UNIT,
    Bits,
    Mixture,
    Tuned,
    bit_operations,
    group_blocks,
    palette_of,
    tune,
)
from tests.support.networks import PLAIN, TINY_MODEL, write_checkpoint

pytestmark = pytest.mark.npu

SHIPPED = load_recipe("xiaomi-14-pro")
assert SHIPPED.quant is not None
RECIPE = dataclasses.replace(SHIPPED, quant=dataclasses.replace(SHIPPED.quant, samples=2, rules=()))
RANDOM = torch.Generator().manual_seed(0)


class Layer(nn.Module):
    """A convolution, or a product of the map with itself, added to the map."""

    def __init__(self, product: bool) -> None:
        super().__init__()
        self.conv = ops.conv2d(torch.randn(8, 8, 1, 1, generator=RANDOM) / 3, torch.full((8,), 0.1))
        self.matmul = ops.MatMul() if product else None
        self.add = ops.Add()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.add(x, y if self.matmul is None else self.matmul(y, y.transpose(2, 3)))


class Net(nn.Module):
    """Two blocks whose results are joined, between modules that stand alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = ops.conv2d(torch.randn(8, 3, 1, 1, generator=RANDOM), None)
        self.blocks = nn.ModuleList([Layer(False), Layer(True)])
        self.join = ops.Concat(1)
        self.conv_out = ops.conv2d(torch.randn(3, 16, 1, 1, generator=RANDOM) / 4, torch.full((3,), 0.1))
        self.add_out = ops.Add()

    def forward(self, x: Tensor) -> Tensor:
        first = self.blocks[0](self.conv_in(x))
        return self.add_out(self.conv_out(self.join(first, self.blocks[1](first))), x)


def net() -> Net:
    RANDOM.manual_seed(0)
    return Net().eval().requires_grad_(False)


def sample(seed: int) -> Tensors:
    return {"x": np.random.default_rng(seed).normal(size=(2, 3, 8, 8)).astype(np.float32)}


@pytest.fixture(scope="module")
def sources() -> dict[str, list[str | None]]:
    return input_sources(net(), sample(0))


def throughout(bits: Bits, *, apart: bool = False) -> Quantised:
    scheme = QuantScheme(rules=(QuantRule("*", *bits),))  # type: ignore[arg-type]
    return quantise(net(), map(sample, range(2)), scheme, apart=apart)


@pytest.fixture(scope="module")
def mixture(sources: dict[str, list[str | None]]) -> Mixture:
    made = [throughout(bits, apart=True) for bits in CANDIDATES]
    return Mixture(made[-1], dict(zip(CANDIDATES, map(palette_of, made), strict=True)), sources)


# ---- the simulation ----


def test_without_bits_it_is_the_network(mixture: Mixture) -> None:
    given = mixture.run(lambda _: (32, 32), sample(5))
    assert np.array_equal(given, net()(torch.from_numpy(sample(5)["x"])).numpy())


@pytest.mark.parametrize("bits", CANDIDATES)
def test_one_palette_is_one_scheme(mixture: Mixture, bits: Bits) -> None:
    expected = throughout(bits).run(sample(5))
    assert sqnr_db(expected, mixture.run(lambda _: bits, sample(5))) > 60


@pytest.mark.parametrize("chosen", [*itertools.product(((8, 8), (8, 16)), repeat=2)], ids=str)
def test_a_mixture_is_what_rules_make(mixture: Mixture, chosen: tuple[Bits, Bits]) -> None:
    """Also at the borders between blocks of different bits: both have nearly the same noise."""
    rules = tuple(QuantRule(f"blocks.{i}.*", *bits) for i, bits in enumerate(chosen))  # type: ignore[arg-type]
    scheme = QuantScheme(rules=rules)
    anew = quantise(net(), map(sample, range(2)), scheme)
    exact, inputs = anew.run_float(sample(5)), sample(5)
    believed, made = mixture.run(lambda path: bits_of(scheme, path), inputs), anew.run(inputs)
    assert sqnr_db(exact, believed) == pytest.approx(sqnr_db(exact, made), abs=0.5)


# ---- price and blocks ----


def test_bit_operations_are_products_times_the_bits_of_both_factors() -> None:
    prices = bit_operations(net(), sample(0))
    conv, matmul = 2 * 64 * 8 * 8, 2 * 8 * 8 * 8 * 8
    assert prices["blocks.1.conv"]((8, 16)) == conv * 8 * 16
    assert prices["blocks.1.matmul"]((8, 16)) == matmul * 16 * 16
    assert prices["blocks.1.matmul"]((16, 8)) == matmul * 8 * 8
    assert set(prices) == {"conv_in", "blocks.0.conv", "blocks.1.conv", "blocks.1.matmul", "conv_out"}


def test_what_has_no_product_goes_with_its_reader(sources: dict[str, list[str | None]]) -> None:
    groups = group_blocks(sources, [*bit_operations(net(), sample(0))])
    assert groups["blocks.1.add"] == "blocks.1"
    assert groups["join"] == "conv_out"
    assert groups["add_out"] == "conv_out", "nobody reads it"


# ---- the search ----


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One level, and a transformer in the middle."""
    unet = dataclasses.replace(
        PLAIN, block_out_channels=(64,), num_attention_heads=(2,), attention=(False,), gated=True
    )
    spec = dataclasses.replace(TINY_MODEL, frames=2, unet=dataclasses.replace(unet, kept_temporal_blocks=()))
    return write_checkpoint(tmp_path_factory.mktemp("little") / "little.safetensors", spec)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tuned")


@pytest.fixture(scope="module")
def tuned(checkpoint: Path, work: Path) -> Tuned:
    return tune(checkpoint, RECIPE, work / "my.toml", budget=2.5)


def middle(tuned: Tuned) -> float:
    measured = [step.measured_db for step in tuned.steps]
    assert measured[0] is not None
    return (measured[0] + tuned.sqnr_db) / 2


def test_every_step_costs_more_and_the_best_is_taken(tuned: Tuned) -> None:
    prices = [step.bit_operations for step in tuned.steps]
    assert prices == sorted(prices)
    assert prices[0] < 0.6
    assert tuned.bit_operations in prices
    best = max(step.measured_db or 0 for step in tuned.steps)
    assert tuned.sqnr_db == pytest.approx(best, abs=3), "of another picture, after calibration with the rules"
    assert set(tuned.bits.values()) <= set(CANDIDATES)


def test_a_target_is_reached_for_less(tuned: Tuned, checkpoint: Path, work: Path) -> None:
    target = middle(tuned)
    found = tune(checkpoint, RECIPE, work / "my.toml", target_sqnr=target)
    assert found.sqnr_db >= target
    assert found.bit_operations < tuned.bit_operations
    assert len(set(found.bits.values())) > 1


def test_the_recipe_is_complete_and_means_what_was_found(tuned: Tuned, checkpoint: Path, work: Path) -> None:
    path = work / "target.toml"
    found = tune(checkpoint, RECIPE, path, target_sqnr=middle(tuned))
    assert path.read_text().startswith("# Written by mobilevd-deploy tune. To use it: ")
    recipe = load_recipe(path)
    assert recipe == found.recipe
    assert (recipe.graph, recipe.npu, recipe.passes) == (RECIPE.graph, RECIPE.npu, RECIPE.passes)
    assert recipe.quant is not None
    assert {rule.component for rule in recipe.quant.rules} == {"unet"}
    assert recipe.quant.of("decoder").rules == ()
    scheme = recipe.quant.of("unet")
    for block, bits in found.bits.items():
        assert bits_of(scheme, f"{block}.conv") == bits or bits_of(scheme, block) == bits, block
    assert recipe.floors.quantised_sqnr_db < found.sqnr_db


def test_with_a_budget_nothing_costs_more(checkpoint: Path, work: Path, tuned: Tuned) -> None:
    found = tune(checkpoint, RECIPE, work / "my.toml", budget=0.8)
    assert max(step.bit_operations for step in found.steps) <= 0.8
    assert 0.6 < found.bit_operations <= 0.8


def test_goals_that_cannot_be_reached_name_the_best(tuned: Tuned, checkpoint: Path, work: Path) -> None:
    with pytest.raises(ParityError, match=r"200 dB cannot be reached: .* has \d+\.\d dB"):
        tune(checkpoint, RECIPE, work / "my.toml", target_sqnr=200)
    with pytest.raises(ParityError, match=r"0\.1 is too small: 8 bits in all blocks cost 0\.[45]"):
        tune(checkpoint, RECIPE, work / "my.toml", budget=0.1)


def test_a_killed_search_goes_on(
    checkpoint: Path, tmp_path: Path, tuned: Tuned, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, real = 0, Mixture.run

    def counted(self: Mixture, *arguments: Any) -> Any:
        nonlocal runs
        runs += 1
        if runs == 9:
            raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(Mixture, "run", counted)
    output = tmp_path / "my.toml"
    with pytest.raises(KeyboardInterrupt):
        tune(checkpoint, RECIPE, output, budget=2.5)
    assert not output.exists()
    kept = json.loads((tmp_path / "my.toml.work" / "measured.json").read_text())["values"]
    assert len(kept) == 7, "the first run is the float one"
    found = tune(checkpoint, RECIPE, output, budget=2.5)
    assert found.steps == tuned.steps
    first = runs
    assert tune(checkpoint, RECIPE, output, budget=2.5).steps == tuned.steps
    assert runs == first, "everything is stored"
    # Measurements of another recipe are not reused.
    other = dataclasses.replace(RECIPE, quant=dataclasses.replace(RECIPE.quant, headroom=1.5))
    tune(checkpoint, other, output, budget=0.6)
    assert runs > first + 10


def test_rules_of_the_recipe_stay(checkpoint: Path, tmp_path: Path, tuned: Tuned) -> None:
    rule = QuantRule("conv_out", weights=32, activations=32)
    recipe = dataclasses.replace(RECIPE, quant=dataclasses.replace(RECIPE.quant, rules=(rule,)))
    found = tune(checkpoint, recipe, tmp_path / "my.toml", budget=1)
    assert found.recipe.quant is not None
    assert found.recipe.quant.rules[0] == rule
    assert all(later.modules != "conv_out" for later in found.recipe.quant.rules[1:])
    assert "conv_out" not in found.bits
    assert "conv_out" in tuned.bits


def test_what_does_not_fit_together_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "my.toml"
    for recipe, path, goals, message in (
        (Recipe("float"), output, {"budget": 1}, "quantises nothing"),
        (RECIPE, output, {}, "one goal"),
        (RECIPE, output, {"budget": 1, "target_sqnr": 30}, "one goal"),
        (RECIPE, tmp_path / "my.json", {"budget": 1}, "not a TOML"),
    ):
        with pytest.raises(UsageError, match=message):
            tune(checkpoint, recipe, path, **goals)
    assert not list(tmp_path.iterdir())


def test_the_unit_is_the_default() -> None:
    assert (SHIPPED.quant.weights, SHIPPED.quant.activations) == UNIT
