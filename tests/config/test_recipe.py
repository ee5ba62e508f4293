from __future__ import annotations

import dataclasses
import json
import typing

import pytest

from mobilevd_deploy.config.recipe import (
    Floors,
    GraphForms,
    NpuOptions,
    PassName,
    QuantRule,
    QuantScheme,
    Recipe,
    load_recipe,
    recipe_names,
    to_toml,
)
from mobilevd_deploy.config.strict import from_dict
from mobilevd_deploy.errors import SpecError, UsageError


def test_shipped_recipes():
    assert {"onnx", "npu-float"} <= set(recipe_names())
    for name in recipe_names():
        recipe = load_recipe(name)
        assert recipe.name == name
        assert recipe.description
        assert recipe.passes


def test_the_default_runs_every_exact_rewrite():
    assert load_recipe("onnx").passes == typing.get_args(PassName)


def test_npu_forms_differ_from_the_cpus():
    cpu, npu = load_recipe("onnx").graph, load_recipe("npu-float").graph
    assert (npu.group_norm, npu.linear, npu.upsample) == ("instance", "conv", "subpixel")
    assert (cpu.group_norm, cpu.linear, cpu.attention) == ("group", "matmul", "whole")


def test_defaults_are_written_out_and_read_back():
    recipe = load_recipe("npu-float")
    values = json.loads(json.dumps(recipe.to_dict()))
    assert set(values["graph"]) == {f.name for f in dataclasses.fields(GraphForms)}
    assert values["floors"] == dataclasses.asdict(Floors())
    assert values["quant"] is values["npu"] is None
    assert from_dict(Recipe, values) == recipe


@pytest.mark.parametrize(
    ("quant", "expected"),
    [
        (None, ("float", 1.0)),
        (QuantScheme(activations=8), ("float", 2.0)),
        (QuantScheme(rules=(QuantRule("a", activations=8, component="unet"),)), ("float", 2.0)),
        (QuantScheme(rules=(QuantRule("a", activations=8, component="decoder"),)), ("quantised", 3.0)),
        (QuantScheme(rules=(QuantRule("a", activations=32),)), ("quantised", 3.0)),
    ],
    ids=["float16", "a8", "a-block-of-8-bits", "another-component", "a16"],
)
def test_what_a_binary_must_agree_with(quant, expected):
    floors = Floors(float16_sqnr_db=1, quantised_sqnr_db=2, simulator_db=3)
    assert Recipe("r", quant=quant, floors=floors).agreement_floor("unet") == expected


def test_a_raised_limit_decides_nothing_about_a_binary():
    options = NpuOptions(targets=("SM8650", "SM8750"))
    raised = dataclasses.replace(options, targets=("SM8750",), compiler_memory_gb=20, compiler_hours=8)
    assert options.deciding("SM8750") == raised.deciding("SM8750")
    assert options.deciding("SM8750") != options.deciding("SM8650")
    assert options.deciding("SM8650") != dataclasses.replace(options, vtcm_mb=4).deciding("SM8650")


@pytest.mark.parametrize("name", recipe_names())
def test_what_is_written_is_read(name, tmp_path):
    recipe = dataclasses.replace(load_recipe(name), description='a "b" \\ ä')
    if recipe.quant:
        rules = (QuantRule("a.*", activations=8, component="unet"), QuantRule("b", weights=32))
        recipe = dataclasses.replace(recipe, quant=dataclasses.replace(recipe.quant, rules=rules))
    path = tmp_path / f"{name}.toml"
    path.write_text(to_toml(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe


def test_rules_of_other_components_do_not_count():
    rules = (QuantRule("*", activations=8, component="unet"), QuantRule("b", weights=32))
    scheme = QuantScheme(rules=rules)
    assert scheme.of("unet") == scheme
    assert scheme.of("decoder").rules == rules[1:]
    assert (scheme.of("unet").narrowest, scheme.of("decoder").narrowest) == (8, 16)
    assert QuantScheme(activations=8, rules=(QuantRule("a", activations=16),)).narrowest == 8


def test_a_file_by_path(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('passes = ["fold-single-step"]\n[graph]\nattention = "tiles"\nquery_tile = 64\n')
    recipe = load_recipe(path)
    assert recipe.name == "mine"
    assert recipe.passes == ("fold-single-step",)
    assert (recipe.graph.attention, recipe.graph.query_tile) == ("tiles", 64)
    assert recipe.onnx.opset == 21
    assert load_recipe(str(path)) == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colour = 1", "unknown key 'colour'"),
        ("[graph]\ntile = 1", "unknown key 'tile'"),
        ('[graph]\nattention = "half"', "'half' is not one of 'whole', 'tiles', 'heads'"),
        ("[graph]\nquery_tile = 0", "query_tile: 0 is less than 1"),
        ("[graph]\nquery_tile = 1.5", "expected int"),
        ("[graph]\nquery_tile = true", "expected int"),
        ("graph = 3", "expected a table"),
        ('passes = "fold-single-step"', "expected a list"),
        ('passes = ["fold"]', "'fold' is not one of 'fold-channel-funnels'"),
        ('passes = ["fold-single-step", "fold-single-step"]', "named twice"),
        ("[onnx]\nopset = 9", "opset: 9"),
        ("[onnx]\nsimplify = 1", "expected bool"),
        ("[floors]\nonnx_sqnr_db = nan", "finite"),
        ("[floors]\nonnx_sqnr_db = inf", "finite"),
        ('[floors]\nonnx_sqnr_db = "90"', "expected float"),
        ("[floors]\nconditioning = 1.5", "conditioning: 1.5"),
        ("[floors]\nconditioning = 0", "conditioning: 0"),
        ("[quant]\nweights = 3", "weights"),
        ("[quant]\nheadroom = 0.5", "headroom: 0.5"),
        ("[quant]\nsamples = 0", "samples: 0"),
        ('[[quant.rules]]\nmodules = "a"\nbits = 4', "unknown key 'bits'"),
        ("[npu]\ntargets = []", "npu.targets: the list is empty"),
        ('[npu]\ntargets = ["SM8650", "SM8650"]', "named twice"),
        ("[npu]\ncompiler_memory_gb = -1", "negative"),
        ("[npu]\ncompiler_hours = 0", "compiler_hours: 0.0 is not positive"),
        ('[quant]\n[npu]\noptimization_mode = 1\n[graph]\ngroup_norm = "instance"', "instance norms wrongly"),
        ("passes = [", "mine.toml"),
        ("description = 3", "expected str"),
    ],
)
def test_recipes_that_do_not_fit(tmp_path, text, message):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(SpecError, match=message):
        load_recipe(path)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(SpecError, match="no recipe 'onxn'") as caught:
        load_recipe("onxn")
    assert "npu-float, onnx" in str(caught.value)
    with pytest.raises(SpecError, match="no recipe"):
        load_recipe(tmp_path / "absent.toml")
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(SpecError, match="folder"):
        load_recipe(tmp_path / "folder.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\x00")
    with pytest.raises(SpecError, match="binary"):
        load_recipe(tmp_path / "binary.toml")


def test_compiled_for_other_chips_and_parts() -> None:
    recipe = load_recipe("xiaomi-14-pro")
    assert recipe.npu is not None
    changed = recipe.compiled_for(["SM8750", "SM8650", "SM8750"], 3)
    assert changed.npu is not None
    assert (changed.npu.targets, changed.npu.parts) == (("SM8750", "SM8650"), 3)
    assert dataclasses.replace(changed, npu=recipe.npu) == recipe
    assert recipe.compiled_for() == recipe
    with pytest.raises(UsageError, match="recipe onnx compiles for no chip"):
        load_recipe("onnx").compiled_for(["SM8650"])
