"""Model specifications: strict readers, errors that name the key, and levels of the real network."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings

from mobilevd_deploy.config.presets import load_preset, preset_names
from mobilevd_deploy.config.spec import FunnelSpec, ImageEncoderSpec, ModelSpec, StepSpec, UNetSpec
from mobilevd_deploy.config.strict import from_dict
from mobilevd_deploy.errors import SpecError
from mobilevd_deploy.passes.runner import UNetProbe
from tests.support.networks import PLAIN, build_unet, unet_specs


@dataclass(frozen=True)
class Inner:
    r: float = 1.0
    flag: bool = False


@dataclass(frozen=True)
class Outer:
    name: str
    count: int = 1
    kind: Literal["a", "b"] = "a"
    pair: tuple[int, int] = (0, 0)
    many: tuple[float, ...] = ()
    maybe: tuple[str, ...] | None = None
    table: dict[str, int] = field(default_factory=dict)
    inner: Inner = field(default_factory=Inner)


def test_from_dict_reads_every_kind_of_value() -> None:
    values = {
        "name": "n",
        "count": 3,
        "kind": "b",
        "pair": [1, 2],
        "many": [1, 2.5],
        "maybe": ["x"],
        "table": {"k": 4},
        "inner": {"r": 2, "flag": True},
    }
    read = from_dict(Outer, values)
    assert read == Outer("n", 3, "b", (1, 2), (1.0, 2.5), ("x",), {"k": 4}, Inner(2.0, True))
    assert all(type(x) is float for x in (*read.many, read.inner.r))
    assert from_dict(Outer, {"name": "n", "maybe": None}).maybe is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "n", "colour": 1}, "Outer: unknown key 'colour'; known are count, inner, kind"),
        ({"name": "n", "inner": {"R": 1.0}}, "inner: unknown key 'R'; known are flag, r"),
        ({}, "Outer: .*'name'"),
        ({"name": 3}, "name: expected str, found 3"),
        ({"name": "n", "count": 1.0}, "count: expected int, found 1.0"),
        ({"name": "n", "count": True}, "count: expected int, found True"),
        ({"name": "n", "count": "1"}, "count: expected int, found '1'"),
        ({"name": "n", "count": None}, "count: expected int, found None"),
        ({"name": "n", "kind": "c"}, "kind: 'c' is not one of 'a', 'b'"),
        ({"name": "n", "kind": ["a"]}, r"kind: \['a'\] is not one of"),
        ({"name": "n", "pair": [1]}, "pair: expected 2 values, found 1"),
        ({"name": "n", "pair": [1, "2"]}, r"pair\[1\]: expected int, found '2'"),
        ({"name": "n", "many": 1.0}, "many: expected a list, found 1.0"),
        ({"name": "n", "many": "12"}, "many: expected a list, found '12'"),
        ({"name": "n", "many": [True]}, r"many\[0\]: expected float, found True"),
        ({"name": "n", "maybe": [1]}, r"maybe\[0\]: expected str, found 1"),
        ({"name": "n", "table": {"k": "v"}}, "table.k: expected int"),
        ({"name": "n", "table": {1: 1}}, "table: expected a table"),
        ({"name": "n", "inner": 1}, "inner: expected a table, found 1"),
        ({"name": "n", "inner": {"flag": 1}}, "inner.flag: expected bool, found 1"),
        ({"name": "n", "inner": {"r": True}}, "inner.r: expected float, found True"),
        ({"name": "n", "inner": {"r": "0.5"}}, "inner.r: expected float, found '0.5'"),
        ([], "Outer: expected a table"),
        (None, "Outer: expected a table"),
        ("name", "Outer: expected a table"),
    ],
)
def test_from_dict_names_what_does_not_fit(values: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        from_dict(Outer, values)


def test_from_dict_says_where_a_nested_specification_fails() -> None:
    with pytest.raises(SpecError, match=r"funnels.resblock: 0.0 is not in"):
        from_dict(ModelSpec, {"name": "n", "unet": {"funnels": {"resblock": 0.0}}})
    with pytest.raises(SpecError, match=r"unet.block_out_channels\[1\]: expected int, found 64.0"):
        from_dict(ModelSpec, {"name": "n", "unet": {"block_out_channels": [64, 64.0]}})


@settings(max_examples=30, deadline=None, derandomize=True)
@given(spec=unet_specs())
def test_a_specification_survives_json(spec: UNetSpec) -> None:
    encoder = ImageEncoderSpec(projection_dim=spec.cross_attention_dim)
    model = ModelSpec("m", frames=2, height=64, width=96, unet=spec, image_encoder=encoder)
    assert from_dict(ModelSpec, json.loads(json.dumps(model.to_dict()))) == model


@pytest.mark.parametrize("name", preset_names())
def test_shipped_presets_survive_json(name: str) -> None:
    model = load_preset(name).model
    assert from_dict(ModelSpec, json.loads(json.dumps(model.to_dict()))) == model


UNET: dict[str, Any] = {
    "block_out_channels": (64, 96),
    "num_attention_heads": (2, 3),
    "attention": (True, False),
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_out_channels": ()}, "one entry per level; they have 0, 2 and 2"),
        ({"num_attention_heads": (2,)}, "one entry per level; they have 2, 1 and 2"),
        ({"attention": (True, True, True)}, "one entry per level; they have 2, 2 and 3"),
        ({"block_out_channels": (64, 80)}, "80 is not a positive multiple of 32"),
        ({"block_out_channels": (0, 96)}, "0 is not a positive multiple of 32"),
        ({"block_out_channels": (-32, 96)}, "-32 is not a positive multiple of 32"),
        ({"num_attention_heads": (2, 5)}, "5 heads do not divide 96"),
        ({"num_attention_heads": (0, 3)}, "0 heads do not divide 64"),
        ({"layers_per_block": 0}, "layers_per_block: 0"),
        ({"in_channels": 4}, "in_channels: 4 must exceed out_channels 4"),
        ({"out_channels": 0}, "must exceed out_channels 0"),
        ({"cross_attention_dim": 0}, "cross_attention_dim 0 must"),
        ({"addition_time_embed_dim": 1}, "addition_time_embed_dim 1 at least 2"),
        ({"kept_temporal_blocks": ()}, "gated is false"),
        ({"funnels": FunnelSpec(spatial_attention=1.01)}, "funnels.spatial_attention: 1.01"),
        ({"funnels": FunnelSpec(temporal_attention=-0.5)}, "funnels.temporal_attention: -0.5"),
        ({"funnels": FunnelSpec(resblock=math.nan)}, "funnels.resblock: nan"),
    ],
)
def test_unets_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    UNetSpec(**UNET)
    with pytest.raises(SpecError, match=message):
        UNetSpec(**(UNET | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 250}, "512x250 px: both sides must be multiples of 64"),
        ({"width": 0}, "0x256 px"),
        ({"height": -256}, "512x-256 px"),
        ({"frames": 0}, "frames: 0 must be positive"),
        (
            {"unet": UNetSpec(cross_attention_dim=768)},
            "projection_dim 1024 is not unet.cross_attention_dim 768",
        ),
        ({"unet": UNetSpec(temporal_multiscaling="mean"), "frames": 13}, "frames: 13 .* even"),
    ],
)
def test_models_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        ModelSpec("m", **changes)


def test_sizes_follow_the_number_of_levels() -> None:
    assert UNetSpec().size_multiple == 8
    assert UNetSpec((64,), (1,), (True,)).size_multiple == 1
    assert ModelSpec("m", unet=UNetSpec((64,), (1,), (True,)), height=8, width=24).latent_size == (1, 3)


@pytest.mark.parametrize("multiscaling", ["none", "mean", "conv"])
def test_levels_are_those_of_the_network(multiscaling: Literal["none", "mean", "conv"]) -> None:
    """Record the maps that the resblocks of a network of three levels work on."""
    spec = dataclasses.replace(
        PLAIN,
        block_out_channels=(64, 96, 128),
        num_attention_heads=(2, 3, 4),
        attention=(True, False, False),
        temporal_multiscaling=multiscaling,
    )
    unet, frames = build_unet(spec, frames=4), {}
    for path, block in unet.temporal_blocks().items():
        block.register_forward_pre_hook(
            lambda _, positional, named, path=path: frames.update(
                {path: (positional[0] if positional else named["hidden_states"]).shape}
            ),
            with_kwargs=True,
        )
    UNetProbe.make(unet, 8, 16).run(unet)
    assert set(frames) == set(unet.temporal_blocks())
    for path, (count, _, height, width) in frames.items():
        level = spec.level_of(path)
        assert (height, width) == (8 >> level, 16 >> level), path
        assert count == spec.frames_at(level, 4), path
    assert {spec.level_of(path) for path in frames} == {0, 1, 2}
    assert any(count == 2 for count, *_ in frames.values()) is (multiscaling != "none")


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.inf, math.nan])
def test_sigma_must_be_positive(sigma: float) -> None:
    with pytest.raises(SpecError, match=r"step.sigma"):
        StepSpec(sigma=sigma)


@pytest.mark.parametrize("strength", [-0.1, math.inf, math.nan])
def test_noise_strength_must_be_a_number(strength: float) -> None:
    with pytest.raises(SpecError, match=r"step.noise_aug_strength"):
        StepSpec(noise_aug_strength=strength)


@pytest.mark.parametrize("sigma", [1e-200, 0.002, 1.0, 700.0, 1e200])
def test_preconditioning_at_any_sigma(sigma: float) -> None:
    step = StepSpec(sigma=sigma)
    # c_skip^2 (sigma^2 + 1) + c_out^2 = 1: the two factors lie on a circle.
    assert step.noise_to_denoised**2 + step.c_out**2 == pytest.approx(1)
    assert step.c_out == pytest.approx(-sigma * step.noise_to_denoised)
    assert step.c_noise == pytest.approx(math.log(sigma) / 4)


def test_the_default_step_is_svds() -> None:
    assert StepSpec().added_time_ids == (6, 127, 0.02)
    assert StepSpec().c_noise == pytest.approx(1.63777, abs=1e-5)


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / f"{name}.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_tables_merge_over_the_base_and_lists_replace(tmp_path: Path) -> None:
    base = load_preset("demo").model
    grandparent = write(tmp_path, "first", 'base = "demo"\nname = "first"\n[unet.funnels]\nresblock = 0.5\n')
    parent = write(
        tmp_path,
        "second",
        f'base = "{grandparent.as_posix()}"\nname = "second"\nframes = 6\n'
        '[unet]\nkept_temporal_blocks = ["a", "b"]\n',
    )
    child = write(
        tmp_path,
        "third",
        f'base = "{parent.as_posix()}"\nname = "third"\n[unet]\nkept_temporal_blocks = ["c"]\n'
        "[unet.funnels]\nspatial_attention = 0.25\n[step]\nfps = 9\n",
    )
    model = load_preset(child).model
    funnels = dataclasses.replace(base.unet.funnels, resblock=0.5, spatial_attention=0.25)
    assert model == dataclasses.replace(
        base,
        name="third",
        frames=6,
        unet=dataclasses.replace(base.unet, funnels=funnels, kept_temporal_blocks=("c",)),
        step=dataclasses.replace(base.step, fps=9),
    )


def test_a_row_of_the_ladder_is_not_inherited(tmp_path: Path) -> None:
    row = '[ladder]\norder = 1\ntitle = "t"\ntflops = 1.5\nnfe = 1\nfvd = [1, 2]\ngpu_ms = 3\n'
    parent = write(tmp_path, "parent", 'base = "demo"\n' + row)
    ladder = load_preset(parent).ladder
    assert ladder is not None
    assert (ladder.tflops, ladder.fvd, ladder.gpu_ms, ladder.phone_ms) == (1.5, (1, 2), 3.0, -1.0)
    assert load_preset(write(tmp_path, "child", f'base = "{parent.as_posix()}"\n')).ladder is None
    with pytest.raises(SpecError, match="ladder: unknown key 'tflop'"):
        load_preset(write(tmp_path, "typo", 'base = "demo"\n' + row.replace("tflops", "tflop")))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base = 3", "base 3 is not the name"),
        ('base = ["demo"]', "is not the name"),
        ('base = "svd.json"', "no preset 'svd.json'"),
        ("unet = 3", "unet: expected a table"),
        ('base = "demo"\nunet = 3', "unet: expected a table"),
        ('base = "demo"\n[frames]\nx = 1', "frames: expected int"),
        ("ladder = 3", "ladder: expected a table"),
        ("[step]\nsigma = nan", "step.sigma"),
        ("\x00", "bad.toml"),
    ],
)
def test_preset_files_that_do_not_fit(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        load_preset(write(tmp_path, "bad", text))


def test_presets_that_inherit_from_each_other_are_refused(tmp_path: Path) -> None:
    one, two = tmp_path / "one.toml", tmp_path / "two.toml"
    write(tmp_path, "one", f'base = "{two.as_posix()}"')
    write(tmp_path, "two", f'base = "{one.as_posix()}"')
    for start in (one, two):
        with pytest.raises(SpecError, match="is not the name of another preset"):
            load_preset(start)


def test_preset_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "latin.toml").write_bytes(b'name = "\xe9"')
    for name, message in (("folder", "folder.toml"), ("latin", "latin.toml"), ("none", "no preset")):
        with pytest.raises(SpecError, match=message) as caught:
            load_preset(tmp_path / f"{name}.toml")
        assert caught.value.exit_code == 2
    with pytest.raises(SpecError, match="no preset 'sdv'") as caught:
        load_preset("sdv")
    assert "shipped presets: " in str(caught.value)
    assert "demo" in str(caught.value)
