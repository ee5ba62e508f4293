"""The deploy form of the network: the reference's outputs in every form, from modules that can be swapped."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mobilevd_deploy.config.recipe import GraphForms
from mobilevd_deploy.errors import RewriteError
from mobilevd_deploy.model.unet import MobileVDUNet
from mobilevd_deploy.npu import ops
from mobilevd_deploy.npu.unet import NpuUNet
from mobilevd_deploy.passes.runner import PASSES, UNetProbe, run_passes, select_passes
from mobilevd_deploy.passes.subpixel_upsampling import SubPixelUpsample
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
SUBPIXEL = NAMES[-1]
# Narrow maps make every axis distinguishable: 4 frames of 4x6, so 24 tokens in tiles of 7.
FRAMES, HEIGHT, WIDTH, TILE = 4, 4, 6, 7
FORMS = [
    GraphForms(
        attention, TILE, frames, linear, norm, temporal_conv="columns" if norm == "instance" else "rows"
    )
    for attention, frames, linear, norm in itertools.product(
        ("whole", "tiles", "heads"), ("batch", "sequential"), ("matmul", "conv"), ("group", "instance")
    )
]
MEAN = dataclasses.replace(FULL, temporal_multiscaling="mean", kept_temporal_blocks=None)
NONE = dataclasses.replace(PLAIN, gated=True, kept_temporal_blocks=())
SPECS = {"conv, some pruned": FULL, "mean, none pruned": MEAN, "no multiscaling, all pruned": NONE}


@functools.cache
def rewritten(case: str, subpixel: bool) -> tuple[MobileVDUNet, UNetProbe, Tensor]:
    """The network after its passes, a probe, and the outputs from before them."""
    unet = build_unet(SPECS[case], frames=FRAMES)
    probe = UNetProbe.make(unet, HEIGHT, WIDTH, seed=2)
    reference = probe.run(unet)[0]
    run_passes(unet, select_passes(NAMES if subpixel else NAMES[:-1]), probe, 200)
    return unet, probe, reference


def deploy(unet: MobileVDUNet, forms: GraphForms) -> NpuUNet:
    return NpuUNet(unet, FRAMES, HEIGHT, WIDTH, forms).eval().requires_grad_(False)


def run(network: NpuUNet, probe: UNetProbe) -> Tensor:
    output: Tensor = network(probe.noise[0], probe.image_latents, probe.image_embeds)
    return output


def label(forms: GraphForms) -> str:
    return "-".join((forms.attention, forms.frames, forms.linear, forms.group_norm))


class Ranks(TorchFunctionMode):
    """Every tensor that a call of torch returns."""

    def __init__(self) -> None:
        super().__init__()
        self.highest = 0

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor):
                self.highest = max(self.highest, value.ndim)
        return result


def count_leaves(network: nn.Module) -> tuple[Counter[str], set[str]]:
    """A counter that fills as leaf modules are called, and the paths of all leaves."""
    counts: Counter[str] = Counter()
    leaves = {path: m for path, m in network.named_modules(remove_duplicate=False) if not any(m.children())}
    leaves = {path: m for path, m in leaves.items() if not isinstance(m, nn.ModuleList)}
    for module in {id(m): m for m in leaves.values()}.values():
        paths = [path for path, m in leaves.items() if m is module]
        module.register_forward_pre_hook(lambda *_, paths=paths: counts.update(paths))
    return counts, set(leaves)


@pytest.mark.parametrize("subpixel", [False, True], ids=["nearest", "subpixel"])
@pytest.mark.parametrize("forms", FORMS, ids=label)
def test_every_form_gives_the_reference(forms: GraphForms, subpixel: bool) -> None:
    unet, probe, reference = rewritten("conv, some pruned", subpixel)
    network = deploy(unet, forms)
    counts, leaves = count_leaves(network)
    with Ranks() as ranks:
        output = run(network, probe)
    assert output.shape == (FRAMES, 4, HEIGHT, WIDTH)
    assert decibels(reference, output) >= 200
    assert ranks.highest == 4
    assert set(counts) == leaves
    assert set(counts.values()) == {1}


@pytest.mark.parametrize(("case", "subpixel"), zip(SPECS, (True, False, True), strict=True), ids=SPECS)
def test_every_kind_of_network_in_both_precisions(case: str, subpixel: bool) -> None:
    unet, probe, reference = rewritten(case, subpixel)
    single = build_unet(SPECS[case], frames=FRAMES).float()
    apply_passes(single, NAMES if subpixel else NAMES[:-1])
    inputs = (probe.noise[0].float(), probe.image_latents.float(), probe.image_embeds.float())
    for forms in (FORMS[0], FORMS[-1]):
        network = deploy(unet, forms)
        counts, leaves = count_leaves(network)
        assert decibels(reference, run(network, probe)) >= 200
        assert counts == dict.fromkeys(leaves, 1)
        output = deploy(single, forms)(*inputs)
        assert output.dtype == torch.float32
        assert decibels(reference, output) >= 90


def test_a_tile_may_be_larger_than_the_map() -> None:
    unet, probe, reference = rewritten("mean, none pruned", False)
    for tile in (1, 24, 500):
        forms = GraphForms("tiles", tile)
        assert decibels(reference, run(deploy(unet, forms), probe)) >= 200


@pytest.mark.parametrize("attention", ["tiles", "heads"])
def test_small_maps_may_have_their_attention_whole(attention: Literal["tiles", "heads"]) -> None:
    unet, probe, reference = rewritten("mean, none pruned", False)
    parts = {}
    for limit in (0, 6, 24):  # the levels have 24 and 6 tokens
        network = deploy(unet, GraphForms(attention, 4, whole_up_to=limit))
        assert decibels(reference, run(network, probe)) >= 200
        first, last = network.down_blocks[0].attentions[0], network.mid_block.attentions[0]
        parts[limit] = [len(a.spatial.transformer_blocks[0].attn1.mix) for a in (first, last)]
    heads = (2, 3) if attention == "heads" else (1, 1)
    assert parts == {0: [6 * heads[0], 2 * heads[1]], 6: [6 * heads[0], 1], 24: [1, 1]}


def test_no_call_is_outside_a_module_but_those_that_move_values() -> None:
    """What a quantiser cannot see must not compute: arithmetic only ever happens inside a leaf."""
    unet, probe, _ = rewritten("mean, none pruned", True)
    carry = {"reshape", "permute", "transpose", "flatten", "__getitem__", "shape", "__get__"}
    for forms in (FORMS[0], FORMS[-1]):
        network = deploy(unet, forms)
        inside: list[nn.Module] = []
        strays: set[str] = set()

        class Watch(TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if not inside:  # noqa: B023
                    strays.add(func.__name__)  # noqa: B023
                return func(*args, **(kwargs or {}))

        for module in network.modules():
            if not any(module.children()):
                module.register_forward_pre_hook(lambda m, _, inside=inside: inside.append(m))
                module.register_forward_hook(lambda *_, inside=inside: inside.pop() and None)
        with Watch():
            run(network, probe)
        assert strays <= carry, strays - carry
        assert strays


@pytest.mark.parametrize("subpixel", [False, True], ids=["nearest", "subpixel"])
@pytest.mark.parametrize("forms", [FORMS[0], FORMS[-1]], ids=label)
def test_weights_are_shared_with_the_source(forms: GraphForms, subpixel: bool) -> None:
    unet, _, _ = rewritten("mean, none pruned", subpixel)
    before = {name: t.clone() for name, t in unet.state_dict().items()}
    network = deploy(unet, forms)
    owned = {t.untyped_storage().data_ptr() for t in (*unet.parameters(), *unet.buffers())}
    copied = {
        name
        for name, t in (*network.named_parameters(), *network.named_buffers())
        if t.untyped_storage().data_ptr() not in owned and t.numel() > 64
    }
    # Only what a constant is folded into (softmax scale, blend, mean over pairs), and the phases' order.
    allowed = {"downsamplers.0.weight", "downsamplers.0.bias"}
    allowed |= {"upsamplers.0.conv.weight", "upsamplers.0.conv.bias"} if subpixel else set()
    scaled = ("attn1.to_q.weight", "temporal.blended_positions.value")
    assert {name for name in copied if not name.endswith(scaled)} <= allowed
    assert all(any(name.endswith(end) for name in copied) for end in scaled)
    assert all(torch.equal(before[name], t) for name, t in unet.state_dict().items())


@pytest.mark.parametrize("missing", NAMES[:-1])
def test_a_missing_pass_is_refused_by_name(missing: str) -> None:
    spec = (
        FULL
        if missing != NAMES[0]
        else dataclasses.replace(FULL, funnels=dataclasses.replace(FULL.funnels, resblock=1.0))
    )
    unet = build_unet(spec, frames=FRAMES)
    apply_passes(unet, set(NAMES) - {missing})
    with pytest.raises(RewriteError, match=f"the deploy form needs {missing}") as caught:
        NpuUNet(unet, FRAMES, HEIGHT, WIDTH, GraphForms())
    assert "name that pass in the recipe" in str(caught.value)


def test_an_untouched_network_is_refused() -> None:
    for spec in (PLAIN, FULL, NONE):
        with pytest.raises(RewriteError, match="the deploy form needs"):
            NpuUNet(build_unet(spec), FRAMES, HEIGHT, WIDTH, GraphForms())


def test_a_changed_weight_is_seen() -> None:
    """The comparisons above can fail."""
    unet, probe, reference = rewritten("mean, none pruned", False)
    network = deploy(unet, FORMS[0])
    weight = network.mid_block.attentions[0].temporal.block.attn1.to_q.weight
    weight.data = weight.data.clone()
    weight.data[0, 0] *= 1.01
    assert decibels(reference, run(network, probe)) < 200


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (2, 1), (5, 4)])
def test_both_upsamplers_agree_at_every_border(size: tuple[int, int]) -> None:
    conv = nn.Conv2d(6, 4, 3, padding=1).double().requires_grad_(False)
    x = torch.randn(3, 6, *size, dtype=torch.float64)
    expected = ops.Upsample(conv)(x)
    assert expected.shape == (3, 4, 2 * size[0], 2 * size[1])
    assert decibels(expected, ops.SubPixelUpsample(SubPixelUpsample(conv).conv)(x)) > 280


def test_instance_norm_form_is_group_norm() -> None:
    norm = nn.GroupNorm(4, 12, eps=1e-3).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = 5 + torch.randn(3, 12, 2, 5, dtype=torch.float64)
    with torch.no_grad():
        assert decibels(norm(x), ops.InstanceGroupNorm(norm)(x)) > 280


@settings(
    max_examples=4,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.generate),  # to shrink takes minutes
)
@example(case=ONE_LEVEL, forms=FORMS[9], tile=3, subpixel=True)
@example(case=DEEP, forms=FORMS[-2], tile=5, subpixel=False)
@given(case=cases(), forms=st.sampled_from(FORMS), tile=st.integers(3, 9), subpixel=st.booleans())
@pytest.mark.slow
def test_every_configuration_has_a_deploy_form(
    case: Case, forms: GraphForms, tile: int, subpixel: bool
) -> None:
    forms = dataclasses.replace(forms, query_tile=tile)
    unet = build_unet(case.spec, frames=case.frames, seed=case.seed)
    probe = UNetProbe.make(unet, case.height, case.width)
    reference = probe.run(unet)[0]
    apply_passes(unet, NAMES if subpixel else NAMES[:-1])
    network = NpuUNet(unet, case.frames, case.height, case.width, forms).eval().requires_grad_(False)
    counts, leaves = count_leaves(network)
    with Ranks() as ranks:
        output = run(network, probe)
    assert decibels(reference, output) >= 200
    assert ranks.highest <= 4
    assert counts == dict.fromkeys(leaves, 1)
