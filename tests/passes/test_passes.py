"""Every rewrite keeps the outputs, reports its changes and refuses other networks; the runner proves it."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import re
import typing
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from torch import Tensor, nn
from torch.nn import functional as F

from mobilevd_deploy.artifact.manifest import PassReport
from mobilevd_deploy.config.recipe import PassName
from mobilevd_deploy.config.spec import FunnelSpec, UNetSpec
from mobilevd_deploy.errors import RewriteError, UsageError
from mobilevd_deploy.model.funnels import SqueezedConv, WidenedConv, funnel_width
from mobilevd_deploy.model.unet import MobileVDUNet, Preconditioning
from mobilevd_deploy.npu.ops import SubPixelUpsample as DeploySubPixelUpsample
from mobilevd_deploy.passes.base import Pass
from mobilevd_deploy.passes.drop_temporal_blocks import FixedBlend, SpatialResBlock, SpatialTransformer
from mobilevd_deploy.passes.runner import PASSES, UNetProbe, run_passes, select_passes
from mobilevd_deploy.passes.subpixel_upsampling import SubPixelUpsample, phase_kernels
from tests.support.networks import (
    DEEP,
    FULL,
    ONE_LEVEL,
    PLAIN,
    Case,
    apply_passes,
    build_unet,
    cases,
    decibels,
)

NAMES = tuple(p.name for p in PASSES)
FUNNELS, CROSS, DROP, STEP, PRECONDITIONING, SUBPIXEL = NAMES
# Passes that a resblock funnel must be folded before.
AFTER_FUNNELS = {DROP, STEP}


def by_name(name: str) -> Pass:
    (found,) = select_passes([name])
    return found


def probe_for(unet: MobileVDUNet, batch: int = 2, size: int = 4) -> UNetProbe:
    return UNetProbe.make(unet, size, size, seed=3, batch=batch)


def in_float32(unet: MobileVDUNet, probe: UNetProbe) -> tuple[MobileVDUNet, UNetProbe]:
    inputs = (getattr(probe, f.name).float() for f in dataclasses.fields(probe))
    return copy.deepcopy(unet).float(), UNetProbe(*inputs)


def rewrite(unet: MobileVDUNet, *names: str, floor_db: float = 200) -> tuple[PassReport, ...]:
    return run_passes(unet, select_passes(names), probe_for(unet), floor_db)


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def folded() -> MobileVDUNet:
    unet = build_unet(FULL)
    apply_passes(unet, [FUNNELS])
    return unet


def test_recipes_name_every_pass_in_running_order() -> None:
    """Except sub-pixel upsampling, which a recipe chooses by `graph.upsample`."""
    assert (*typing.get_args(PassName), SUBPIXEL) == NAMES


# What each pass keeps, and what it reports.


@pytest.mark.parametrize("name", NAMES)
def test_each_pass_on_its_own_keeps_the_outputs(name: str) -> None:
    unet = folded() if name in AFTER_FUNNELS else build_unet(FULL)
    probe = probe_for(unet)
    single, single_probe = in_float32(unet, probe)
    (report,) = run_passes(unet, [by_name(name)], probe, 200)
    assert report.name == name
    assert report.changed
    run_passes(single, [by_name(name)], single_probe, 90)


@pytest.mark.parametrize("spec", [PLAIN, FULL], ids=["plain", "full"])
def test_all_passes_in_sequence_keep_the_outputs(spec: UNetSpec) -> None:
    unet = build_unet(spec)
    probe = probe_for(unet)
    before = probe.run(unet)
    single, single_probe = in_float32(unet, probe)
    reports = run_passes(unet, PASSES, probe, 200)
    assert [r.name for r in reports] == list(NAMES)
    assert decibels(before, probe.run(unet)) >= 200
    # Each starts from where the one before ended.
    for one, next_one in itertools.pairwise(reports):
        assert (one.params_after, one.flops_after) == (next_one.params_before, next_one.flops_before)
    assert reports[-1].params_after == parameters(unet)
    assert min(r.sqnr_db or math.inf for r in run_passes(single, PASSES, single_probe, 90)) >= 90


@pytest.mark.parametrize(
    "order", [NAMES[::-1], (STEP, SUBPIXEL, DROP, PRECONDITIONING, CROSS)], ids=["reversed", "mixed"]
)
def test_the_order_does_not_matter_once_resblock_funnels_are_gone(order: tuple[str, ...]) -> None:
    spec = dataclasses.replace(FULL, funnels=FunnelSpec(0.5, 0.5, 1.0))
    unet = build_unet(spec)
    reports = run_passes(unet, [by_name(name) for name in order], probe_for(unet), 200)
    assert all(report.changed for report in reports)


def test_a_second_run_changes_nothing() -> None:
    unet = build_unet(FULL)
    rewrite(unet, *NAMES)
    state = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    preconditioning = unet.preconditioning
    for report in rewrite(unet, *NAMES):
        assert report.changed == ()
        assert report.params_before == report.params_after
        assert report.flops_before == report.flops_after
    again = unet.state_dict()
    assert list(again) == list(state)
    assert all(torch.equal(tensor, again[name]) for name, tensor in state.items())
    assert unet.preconditioning == preconditioning


def test_reported_paths_are_the_modules_that_changed() -> None:
    unet = build_unet(FULL)
    blocks, kept = list(unet.temporal_blocks()), FULL.kept_temporal_blocks or ()
    resblocks = [
        path for path, m in unet.named_modules() if path.endswith(("spatial_res_block", "temporal_res_block"))
    ]
    alive = [p for p in resblocks if p.endswith("spatial_res_block") or p.rpartition(".")[0] in kept]
    transformers = [path for path in blocks if ".attentions." in path]
    cross = [path for path, _ in unet.named_modules() if path.endswith(".attn2")]
    funnelled = {
        name.rpartition(".")[0]
        for name, _ in unet.named_parameters()
        if name.endswith((".squeeze", ".widen"))
    }
    changed = {}
    for name in NAMES:
        (report,) = rewrite(unet, name)
        changed[name] = report.changed
        assert len(set(report.changed)) == len(report.changed)
        for path in set(report.changed) - {"time_embedding", "add_embedding"}:
            unet.get_submodule(path)
    assert set(changed[FUNNELS]) == funnelled
    assert set(changed[CROSS]) == set(cross)
    assert len(cross) == 2 * len(transformers)
    assert changed[DROP] == tuple(blocks)
    assert set(changed[STEP]) == {
        "time_embedding",
        "add_embedding",
        *alive,
        *(path for path in transformers if path in kept),
    }
    assert changed[PRECONDITIONING] == ("conv_out",)
    assert changed[SUBPIXEL] == ("up_blocks.0.upsamplers.0",)


def test_the_modules_are_really_gone() -> None:
    unet = build_unet(FULL)
    rewrite(unet, *NAMES)
    kept = set(FULL.kept_temporal_blocks or ())
    assert set(unet.temporal_blocks()) == kept
    names = {name for name, _ in unet.named_parameters()}
    assert not any(
        part in name
        for name in names
        for part in (
            "squeeze",
            "widen",
            "norm2.weight_",
            "time_emb",
            "time_pos",
            "mix_factor",
            "importance",
            "to_q.b",
        )
    )
    assert not any(".attn2." in name and not name.endswith((".proj.weight", ".proj.bias")) for name in names)
    assert all(
        path in kept
        for path, m in unet.named_modules()
        if isinstance(getattr(m, "time_mixer", None), nn.Module)
    )
    assert unet.preconditioning.c_out == 1


def test_parameters_dropped_are_those_of_the_dropped_modules() -> None:
    unet = build_unet(FULL)
    modules = dict(unet.named_modules())
    kept = FULL.kept_temporal_blocks or ()

    funnels = 0
    for path, module in modules.items():
        if path.endswith(".attn1"):
            width = module.to_q.in_features
            d = width // module.heads
            inner = funnel_width(d, 0.4 if ".temporal_tr" in path else 0.5)
            # Four layers of width^2 shrink to heads * inner, and four matrices d x inner a head go.
            funnels += 4 * (width - module.heads * inner) * width + 4 * module.heads * d * inner
        elif isinstance(module, (SqueezedConv, WidenedConv)):
            weight = module.conv.weight
            out, channels, taps = weight.shape[0], weight.shape[1], weight[0, 0].numel()
            inner = funnel_width(out, 0.75)
            if isinstance(module, SqueezedConv):
                funnels += (out - inner) * (channels * taps + 1) + inner * (out + 1)
            else:
                funnels += out * (channels - inner) * taps + channels * inner
        elif path.endswith(".time_emb_proj"):
            out = module.out_features
            inner = funnel_width(out, 0.75)
            funnels += (out - inner) * (module.in_features + 1) + inner * out

    cross = 0
    for path, module in modules.items():
        if path.endswith(".attn2"):
            width, context = module.to_q.in_features, module.to_k.in_features
            norm = modules[path.removesuffix("attn2") + "norm2"]
            cross += parameters(module) + parameters(norm) - (context * width + width)

    reports = {report.name: report for report in rewrite(unet, FUNNELS, CROSS)}
    cost = {name: report.params_before - report.params_after for name, report in reports.items()}
    assert (cost[FUNNELS], cost[CROSS]) == (funnels, cross)
    # Counted now, because the two passes have changed the sizes of the pruned blocks themselves.
    pruned = 0
    for path, block in unet.temporal_blocks().items():
        pruned += 2
        if path not in kept:
            names = ("temporal_res_block", "temporal_transformer_blocks", "time_pos_embed")
            pruned += sum(parameters(getattr(block, name)) for name in names if hasattr(block, name))
    (drop,) = rewrite(unet, DROP)
    assert drop.params_before - drop.params_after == pruned
    clock = parameters(unet.time_embedding) + parameters(unet.add_embedding)
    clock += sum(
        parameters(m) for p, m in unet.named_modules() if p.endswith(("time_emb_proj", "time_pos_embed"))
    )
    step, preconditioning, subpixel = rewrite(unet, STEP, PRECONDITIONING, SUBPIXEL)
    assert step.params_before - step.params_after == clock
    assert preconditioning.params_before == preconditioning.params_after
    assert subpixel.params_after - subpixel.params_before == 96 * 96 * (16 - 9) + 3 * 96


def test_flops_of_each_pass() -> None:
    """The honest count by hand for latents of 4x4, 4 frames, 2 clips: 64 channels there, 96 below."""
    spec = dataclasses.replace(PLAIN, gated=True, kept_temporal_blocks=())
    reports = {r.name: r.flops_before - r.flops_after for r in rewrite(build_unet(spec), *NAMES)}
    batch, frames, context = 2, 4, 16
    cross = 0
    for width, pixels, count in ((64, 16, 3), (96, 4, 1)):  # level 0: one down, two up; one in the middle
        queries = batch * frames * pixels
        both_maps = 2 * queries * width * 2  # one key
        projections = 2 * queries * width * width * 2
        for rows in (batch * frames, batch * pixels):  # spatial: context per frame; temporal: per pixel
            key_and_value = 2 * 2 * rows * context * width
            merged = 2 * rows * context * width
            cross += count * (both_maps + projections + key_and_value - merged)
    assert reports[FUNNELS] == reports[PRECONDITIONING] == 0
    assert reports[CROSS] == cross
    upsampled = 2 * batch * frames * 96 * 96
    assert reports[SUBPIXEL] == upsampled * (9 * 16 - 16 * 9)  # 4x4 of 3x3 taps; 3x3 of four 2x2 taps
    assert reports[DROP] > reports[STEP] > 0


def test_subpixel_saves_multiplies_on_larger_maps() -> None:
    unet = build_unet()
    (report,) = run_passes(unet, [by_name(SUBPIXEL)], probe_for(unet, batch=1, size=16), 200)
    saved = report.flops_before - report.flops_after
    assert saved == 2 * 4 * 96 * 96 * (9 * 16 * 16 - 16 * 9 * 9)


# Conditions.


@pytest.mark.parametrize("gate", [0.5, -1.0, 1.0001, 1e-9, math.nan])
def test_a_gate_between_0_and_1_is_refused(gate: float) -> None:
    unet = folded()
    unet.get_submodule("mid_block.attentions.0").time_mixer.gate.fill_(gate)
    with pytest.raises(RewriteError, match=r"mid_block.attentions.0.time_mixer.gate is") as caught:
        by_name(DROP).requires(unet)
    assert "hard gates" in str(caught.value)
    if math.isfinite(gate):
        with pytest.raises(RewriteError, match=f"^{DROP}: mid_block.*ran before: none"):
            rewrite(unet, DROP)
        assert len(unet.temporal_blocks()) == 12  # nothing was changed


@pytest.mark.parametrize("name", sorted(AFTER_FUNNELS))
def test_unfolded_resblock_funnels_are_refused(name: str) -> None:
    unet = build_unet(FULL)
    with pytest.raises(
        RewriteError, match=rf"^{name}: .*funnel is not folded yet .*ran before: none"
    ) as caught:
        rewrite(unet, name)
    assert FUNNELS in str(caught.value)


def test_a_widen_bias_before_padding_is_refused() -> None:
    unet = build_unet(FULL)
    path = "up_blocks.1.resnets.0.spatial_res_block.conv2"
    widened = unet.get_submodule(path)
    widened.widen_bias = nn.Parameter(torch.zeros(widened.conv.in_channels, dtype=torch.float64))
    run_passes(copy.deepcopy(unet), [by_name(FUNNELS)], probe_for(unet), 200)  # zero: nothing to carry
    widened.widen_bias.data[3] = 0.1
    with pytest.raises(RewriteError, match=f"^{FUNNELS}: {path}: its widen bias"):
        rewrite(unet, FUNNELS)


def test_two_context_tokens_are_refused_after_stripping() -> None:
    unet = build_unet()
    rewrite(unet, CROSS)
    with pytest.raises(ValueError, match="2 tokens"):
        unet(
            torch.zeros(1, 4, 8, 4, 4, dtype=torch.float64),
            1.0,
            torch.zeros(1, 2, 16, dtype=torch.float64),
            torch.zeros(1, 3),
        )


@pytest.mark.parametrize("attribute", ["norm_cross", "residual_connection"])
def test_a_cross_attention_that_is_not_svds_is_refused(attribute: str) -> None:
    unet = build_unet()
    setattr(unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2"), attribute, True)
    with pytest.raises(RewriteError, match=r"mid_block.attentions.0.transformer_blocks.0.attn2"):
        by_name(CROSS).requires(unet)


def test_another_step_is_refused_after_folding() -> None:
    unet = build_unet()
    sample = torch.zeros(2, 4, 8, 4, 4, dtype=torch.float64)
    context = torch.zeros(2, 1, 16, dtype=torch.float64)
    ids = torch.tensor([[6.0, 127.0, 0.02]] * 2, dtype=torch.float64)
    rewrite(unet, STEP)
    unet(sample, unet.step_spec.c_noise, context, ids)
    unet(
        sample.float().double(),
        torch.tensor(unet.step_spec.c_noise, dtype=torch.float32),
        context,
        ids.float(),
    )
    for column, value in ((0, 7.0), (1, 128.0), (2, 0.03)):
        other = ids.clone()
        other[1, column] = value  # one clip of the batch is enough
        with pytest.raises(ValueError, match="folded for timestep"):
            unet(sample, unet.step_spec.c_noise, context, other)
    with pytest.raises(ValueError, match="folded for timestep"):
        unet(sample, 0.25 * math.log(699), context, ids)


@pytest.mark.parametrize("change", ["norm", "kernel", "padding", "bias"])
def test_an_upsampler_of_another_kind_is_refused(change: str) -> None:
    unet = build_unet()
    upsampler = unet.get_submodule("up_blocks.0.upsamplers.0")
    if change == "norm":
        upsampler.norm = nn.LayerNorm(96)
    else:
        kernel, padding = (5, 2) if change == "kernel" else (3, 0 if change == "padding" else 1)
        upsampler.conv = nn.Conv2d(96, 96, kernel, padding=padding, bias=change != "bias")
    with pytest.raises(RewriteError, match=r"up_blocks.0.upsamplers.0"):
        by_name(SUBPIXEL).requires(unet)


def test_select_passes_puts_them_in_running_order() -> None:
    assert [p.name for p in select_passes([SUBPIXEL, FUNNELS, DROP])] == [FUNNELS, DROP, SUBPIXEL]
    assert select_passes([]) == ()
    with pytest.raises(UsageError, match="no pass 'fold'") as caught:
        select_passes([FUNNELS, "fold"])
    assert all(name in str(caught.value) for name in NAMES)


# What each rewrite does to the modules.


def test_kept_blocks_hold_the_blend_in_their_weights() -> None:
    unet = folded()
    alpha = {p: torch.sigmoid(b.time_mixer.mix_factor).item() for p, b in unet.temporal_blocks().items()}
    conv2 = unet.get_submodule("mid_block.resnets.0.temporal_res_block.conv2").weight.clone()
    rewrite(unet, DROP)
    after = unet.get_submodule("mid_block.resnets.0.temporal_res_block.conv2").weight
    torch.testing.assert_close(after, (1 - alpha["mid_block.resnets.0"]) * conv2)
    mixer = unet.get_submodule("mid_block.attentions.0.time_mixer")
    assert isinstance(mixer, FixedBlend)
    assert mixer.weight.item() == pytest.approx(1 - alpha["mid_block.attentions.0"])
    assert isinstance(unet.get_submodule("down_blocks.0.resnets.0"), SpatialResBlock)
    assert isinstance(unet.get_submodule("up_blocks.1.attentions.1"), SpatialTransformer)


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (2, 2), (5, 4)])
def test_subpixel_convolution_is_convolution_of_the_upsampled_map(size: tuple[int, int]) -> None:
    conv = nn.Conv2d(3, 5, 3, padding=1).double().requires_grad_(False)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    expected = F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), conv.weight, conv.bias, padding=1)
    training_form = SubPixelUpsample(conv)
    assert decibels(expected, training_form(x)) > 280
    assert decibels(expected, DeploySubPixelUpsample(training_form.conv)(x)) > 280


def test_phase_kernels_keep_the_sum_of_the_taps() -> None:
    weight = torch.randn(4, 2, 3, 3, dtype=torch.float64)
    kernels = phase_kernels(weight)
    assert kernels.shape == (16, 2, 2, 2)
    torch.testing.assert_close(kernels.sum((2, 3)), weight.sum((2, 3)).repeat_interleave(4, 0))


# The runner.


class Broken:
    """Run a real pass, then damage its result as a mistake in the pass would."""

    def __init__(self, name: str, damage: Callable[[MobileVDUNet], None]) -> None:
        self.name, self.damage = name, damage

    def requires(self, unet: MobileVDUNet) -> None:
        by_name(self.name).requires(unet)

    def apply(self, unet: MobileVDUNet) -> tuple[str, ...]:
        changed = by_name(self.name).apply(unet)
        self.damage(unet)
        return changed


def scale(path: str, factor: float) -> Callable[[MobileVDUNet], None]:
    return lambda unet: unet.get_parameter(path).mul_(factor)


def narrow_softmax_scale(unet: MobileVDUNet) -> None:
    attention = unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1")
    attention.scale = (attention.to_q.out_features // attention.heads) ** -0.5


def forget(path: str) -> Callable[[MobileVDUNet], None]:
    return scale(path, 0.0)


def alpha_for_its_complement(unet: MobileVDUNet) -> None:
    mixer = unet.get_submodule("mid_block.attentions.0.time_mixer")
    mixer.weight = 1 - mixer.weight


def drop_one_more(unet: MobileVDUNet) -> None:
    path = "up_blocks.1.resnets.1"
    unet.set_submodule(path, SpatialResBlock(unet.get_submodule(path)))


def ids_without_noise(unet: MobileVDUNet) -> None:
    """conv1's bias as if the added ids were forgotten in one block."""
    unet.get_submodule("up_blocks.0.resnets.1.spatial_res_block.conv1").bias.sub_(
        torch.linspace(-1, 1, 72, dtype=torch.float64)
    )


def positions_from_1(unet: MobileVDUNet) -> None:
    model = unet.get_submodule("down_blocks.0.attentions.0")
    model.time_proj.table = model.time_proj.table.roll(1, 0)


def skip_scaled_too(unet: MobileVDUNet) -> None:
    unet.preconditioning = Preconditioning(unet.preconditioning.skip * unet.step_spec.c_out, 1.0)


def border_replicated(unet: MobileVDUNet) -> None:
    unet.get_submodule("up_blocks.0.upsamplers.0").conv.padding_mode = "replicate"
    conv = unet.get_submodule("up_blocks.0.upsamplers.0").conv
    conv._reversed_padding_repeated_twice = [1, 1, 1, 1]


def phases_swapped(unet: MobileVDUNet) -> None:
    conv = unet.get_submodule("up_blocks.0.upsamplers.0").conv
    conv.weight.copy_(conv.weight.unflatten(0, (-1, 2, 2)).transpose(1, 2).flatten(0, 2))


MISTAKES: dict[str, tuple[str, Callable[[MobileVDUNet], None]]] = {
    "softmax scale of the squeezed width": (FUNNELS, narrow_softmax_scale),
    "bias of a folded convolution": (FUNNELS, forget("up_blocks.0.resnets.0.spatial_res_block.conv1.bias")),
    "output bias of cross-attention": (
        CROSS,
        forget("mid_block.attentions.0.transformer_blocks.0.attn2.proj.bias"),
    ),
    "one weight of cross-attention": (
        CROSS,
        lambda u: (
            u.get_submodule("mid_block.attentions.0.temporal_transformer_blocks.0.attn2")
            .proj.weight[0, 0]
            .mul_(1.01)
        ),
    ),
    "alpha instead of 1 - alpha": (DROP, alpha_for_its_complement),
    "conv2's bias unscaled": (DROP, scale("mid_block.resnets.1.temporal_res_block.conv2.bias", 1.5)),
    "one block too many": (DROP, drop_one_more),
    "a block without its time embedding": (STEP, ids_without_noise),
    "frame positions off by one": (STEP, positions_from_1),
    "conv_out's bias unscaled": (PRECONDITIONING, scale("conv_out.bias", -1.0)),
    "c_out on the skip as well": (PRECONDITIONING, skip_scaled_too),
    "the border": (SUBPIXEL, border_replicated),
    "phases of rows and columns swapped": (SUBPIXEL, phases_swapped),
    "bias of one phase": (
        SUBPIXEL,
        lambda u: u.get_submodule("up_blocks.0.upsamplers.0").conv.bias[1::4].zero_(),
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_in_a_pass_fails_the_runner(case: str) -> None:
    name, damage = MISTAKES[case]
    unet = build_unet(dataclasses.replace(FULL, temporal_multiscaling="mean"))
    place = NAMES.index(name)
    apply_passes(unet, NAMES[: max(place - 1, 0)])
    before = PASSES[max(place - 1, 0) : place]
    chain = [*before, Broken(name, damage), *PASSES[place + 1 :]]
    with pytest.raises(RewriteError) as caught:
        run_passes(unet, chain, probe_for(unet), 200)
    message = str(caught.value)
    assert message.startswith(f"{name} changed the outputs: ")
    assert f"(ran before: {', '.join(p.name for p in before) or 'none'})" in message
    assert "the floor is 200 dB" in message


class Nudge:
    """Multiply the weight of largest magnitude in one tensor by 1.01."""

    name = "nudge"

    def __init__(self, path: str) -> None:
        self.path = path

    def requires(self, unet: MobileVDUNet) -> None:
        pass

    def apply(self, unet: MobileVDUNet) -> tuple[str, ...]:
        flat = unet.get_parameter(self.path).view(-1)
        flat[flat.abs().argmax()] *= 1.01
        return ()


def every_kind_of_tensor() -> list[str]:
    """One parameter for each place in a block: its name without the indices."""
    spec = dataclasses.replace(FULL, kept_temporal_blocks=None)
    kinds: dict[str, str] = {}
    for name, _ in build_unet(spec).named_parameters():
        place = re.sub(r"^(down|mid|up)_blocks?\.", "", name)
        kinds.setdefault(re.sub(r"\d+\.", "", place), name)
    # Nothing reads these: a single key makes the map a no-op, and gates are hard here.
    unread = ("attn2.to_q", "attn2.to_k", ".norm2.", "importance")
    return [
        n
        for n in kinds.values()
        if not any(u in n and ("attn" in u or "transformer" in n or u == "importance") for u in unread)
    ]


def test_one_changed_weight_fails_the_runner_wherever_it_is() -> None:
    spec = dataclasses.replace(FULL, kept_temporal_blocks=None)
    unet = build_unet(spec)
    probe, state = probe_for(unet, batch=1), copy.deepcopy(unet.state_dict())
    unnoticed = []
    paths = every_kind_of_tensor()
    reference = probe.run(unet)
    for path in paths:
        Nudge(path).apply(unet)
        if decibels(reference, probe.run(unet)) >= 200:
            unnoticed.append(path)
        unet.get_parameter(path).copy_(state[path])
    assert unnoticed == []
    assert len(paths) > 70


def test_a_changed_weight_is_named_with_what_ran_before() -> None:
    for floor, dtype in ((200, torch.float64), (90, torch.float32)):
        unet = build_unet(FULL).to(dtype)
        chain = [*select_passes([FUNNELS, CROSS]), Nudge("conv_out.weight"), by_name(STEP)]
        with pytest.raises(RewriteError, match=f"^nudge changed .*ran before: {FUNNELS}, {CROSS}"):
            run_passes(unet, chain, probe_for(unet), floor)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_said_before_any_pass(value: float) -> None:
    unet = build_unet()
    unet.get_submodule("mid_block.resnets.0.spatial_res_block.conv1").weight[0, 0, 0, 0] = value
    with pytest.raises(RewriteError, match="not finite before any rewrite") as caught:
        rewrite(unet, *NAMES)
    assert "check the weights" in str(caught.value)


def test_a_pass_that_makes_nan_fails() -> None:
    unet = build_unet()
    broken = Broken(CROSS, scale("conv_out.bias", math.nan))
    with pytest.raises(RewriteError, match=f"^{CROSS} changed the outputs: -inf dB"):
        run_passes(unet, [broken], probe_for(unet), 90)


def test_no_pass_at_all_reports_nothing() -> None:
    unet = build_unet()
    assert run_passes(unet, [], probe_for(unet), 200) == ()


# Random configurations.


@settings(
    max_examples=4,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.generate),  # to shrink takes minutes
)
@example(case=ONE_LEVEL)
@example(case=DEEP)
@given(case=cases())
@pytest.mark.slow
def test_every_configuration_survives_every_pass(case: Case) -> None:
    spec = case.spec
    unet = build_unet(spec, frames=case.frames, seed=case.seed)
    probe = UNetProbe.make(unet, case.height, case.width, batch=case.batch)
    before: Tensor = probe.run(unet)
    single, single_probe = in_float32(unet, probe)
    reports = run_passes(unet, PASSES, probe, 200)
    assert decibels(before, probe.run(unet)) >= 200
    assert all(p.apply(unet) == () for p in PASSES)
    run_passes(single, PASSES, single_probe, 90)
    everything = reports[NAMES.index(DROP)].changed
    kept = everything if spec.kept_temporal_blocks is None else spec.kept_temporal_blocks
    assert set(unet.temporal_blocks()) == set(kept)
