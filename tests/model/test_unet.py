"""MobileVDUNet against diffusers' network, its scheduler, and the definitions of each optimisation."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from diffusers.models.resnet import SpatioTemporalResBlock
from torch import Tensor
from torch.nn import functional as F

from mobilevd_deploy.config.spec import FunnelSpec, ModelSpec, StepSpec, UNetSpec
from mobilevd_deploy.errors import SpecError
from mobilevd_deploy.model.funnels import funnel_width
from mobilevd_deploy.model.unet import GatedBlender, MobileVDUNet, TemporalDownsample, TemporalUpsample
from mobilevd_deploy.passes.runner import UNetProbe
from mobilevd_deploy.training.gates import inclusion_probabilities, sample_gates
from tests.support.networks import (
    FULL,
    PLAIN,
    build_unet,
    decibels,
    diffusers_unet,
    randomise,
    temporal_paths,
    unet_inputs,
)

EXACT_DB = 280.0  # float64 with sums in another order
MULTISCALING = ("none", "mean", "conv")

# Architecture, frames, batch, latent height and width.
CONFIGURATIONS: dict[str, tuple[UNetSpec, int, int, int, int]] = {
    "two-levels": (PLAIN, 4, 2, 4, 6),
    "one-level-one-head": (
        dataclasses.replace(
            PLAIN, block_out_channels=(64,), num_attention_heads=(1,), attention=(True,), layers_per_block=2
        ),
        1,
        2,
        1,
        3,
    ),
    "four-levels": (
        UNetSpec((32, 64, 96, 96), (1, 4, 6, 3), (True, True, False, False), 1, 8, 4, 12, 6),
        3,
        1,
        8,
        16,
    ),
    "attention-only-deep": (
        dataclasses.replace(PLAIN, attention=(False, True), layers_per_block=3),
        5,
        1,
        2,
        2,
    ),
    "other-channels": (
        dataclasses.replace(PLAIN, attention=(False, False), in_channels=5, out_channels=3),
        2,
        2,
        2,
        4,
    ),
}


def denoise_inputs(unet: MobileVDUNet, batch: int = 1, size: int = 4, seed: int = 3) -> UNetProbe:
    return UNetProbe.make(unet, size, size, seed=seed, batch=batch)


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_all_optimisations_off_is_diffusers_network(case: str) -> None:
    spec, frames, batch, height, width = CONFIGURATIONS[case]
    theirs = randomise(diffusers_unet(spec, frames), seed=5)
    ours = MobileVDUNet(spec, StepSpec(), num_frames=frames).double().eval()
    state = theirs.state_dict()
    assert list(ours.state_dict()) == list(state)
    ours.load_state_dict(state, strict=True)
    inputs = unet_inputs(spec, batch=batch, frames=frames, height=height, width=width)
    expected = theirs(**inputs).sample
    with torch.no_grad():
        actual = ours(**inputs)
    assert actual.shape == (batch, frames, spec.out_channels, height, width)
    assert float(expected.std()) > 0.1
    assert decibels(expected, actual) > EXACT_DB


def test_more_context_tokens_still_give_diffusers_output() -> None:
    """Only the rewrites need a single token; the training form is diffusers' for any number."""
    theirs = randomise(diffusers_unet(PLAIN, 4), seed=5)
    inputs = unet_inputs(PLAIN)
    inputs["encoder_hidden_states"] = torch.randn(1, 3, 16, dtype=torch.float64)
    ours = build_unet()
    ours.load_state_dict(theirs.state_dict())
    assert decibels(theirs(**inputs).sample, ours(**inputs)) > EXACT_DB


def test_the_timestep_may_be_a_tensor() -> None:
    unet, inputs = build_unet(), unet_inputs(PLAIN, batch=2)
    as_tensor = inputs | {"timestep": torch.tensor(1.25)}
    assert torch.equal(unet(**inputs), unet(**as_tensor))
    assert not torch.equal(unet(**inputs), unet(**(inputs | {"timestep": 1.0})))


def test_full_size_counts_without_allocation() -> None:
    with torch.device("meta"):
        unet = MobileVDUNet(UNetSpec(), StepSpec())
    assert sum(p.numel() for p in unet.parameters()) == 1_524_623_082
    assert all(
        p.is_meta for p in unet.parameters() if p.numel() > 1
    )  # diffusers makes the blend factors real
    resnets = [b for b in unet.temporal_blocks().values() if isinstance(b, SpatioTemporalResBlock)]
    assert (len(unet.temporal_blocks()), len(resnets)) == (38, 22)


def test_every_optimisation_names_its_own_tensors() -> None:
    plain, full = set(build_unet(PLAIN).state_dict()), set(build_unet(FULL).state_dict())
    # A convolution funnel wraps its convolution, so that one's names move below ".conv".
    moved = {name for name in plain if ".conv1." in name or ".conv2." in name}
    assert plain - full == moved
    endings = {name.rsplit(".", 1)[1] for name in full - plain}
    assert endings == {"gate", "importance", "squeeze", "squeeze_bias", "widen", "weight", "bias"}
    others = {n for n in full - plain if n.endswith((".weight", ".bias"))}
    assert {n for n in others if ".conv.w" not in n and ".conv.b" not in n} == set()


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_temporal_blocks_are_found_wherever_they_are(case: str) -> None:
    spec = dataclasses.replace(CONFIGURATIONS[case][0], layers_per_block=2)
    with torch.device("meta"):
        unet = MobileVDUNet(spec, StepSpec())
    assert sorted(unet.temporal_blocks()) == sorted(temporal_paths(spec))


@pytest.mark.parametrize("sigma", [700.0, 1.0, 0.05])
def test_denoise_is_one_step_of_the_scheduler(sigma: float) -> None:
    """SVD's own scheduler configuration, stepped as StableVideoDiffusionPipeline does."""
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_type="continuous",
        timestep_spacing="leading",
        steps_offset=1,
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=sigma,
    )
    scheduler.set_timesteps(1)
    (timestep,) = scheduler.timesteps
    unet = build_unet(step=StepSpec(sigma=sigma))
    assert abs(float(timestep) - unet.step_spec.c_noise) < 1e-6
    probe = denoise_inputs(unet, batch=2)

    latents = probe.noise * scheduler.init_noise_sigma
    scaled = scheduler.scale_model_input(latents, timestep)
    image = probe.image_latents.unsqueeze(1).repeat(1, 4, 1, 1, 1)
    ids = torch.tensor([[7 - 1, 127, 0.02]] * 2, dtype=torch.float64)
    predicted = unet(torch.cat([scaled, image], 2), timestep, probe.image_embeds.unsqueeze(1), ids)
    step = scheduler.step(predicted, timestep, latents)

    ours = probe.run(unet)
    # The scheduler keeps its sigmas in float32 and computes in it.
    assert decibels(step.pred_original_sample.double(), ours) > 110
    assert decibels(step.prev_sample.double(), ours) > 80  # x + (x - denoised) / sigma * -sigma cancels


def test_the_step_reaches_the_output() -> None:
    probe = denoise_inputs(build_unet())
    outputs = [
        probe.run(build_unet(step=step))
        for step in (
            StepSpec(),
            StepSpec(sigma=80),
            StepSpec(fps=8),
            StepSpec(motion_bucket_id=30),
            StepSpec(noise_aug_strength=0.1),
        )
    ]
    assert all(decibels(outputs[0], other) < 60 for other in outputs[1:])


@pytest.mark.parametrize("kind", MULTISCALING)
def test_clips_of_a_batch_do_not_touch_each_other(kind: Any) -> None:
    unet = build_unet(dataclasses.replace(FULL, temporal_multiscaling=kind))
    probe = denoise_inputs(unet, batch=3)
    together = probe.run(unet)
    for i in range(3):
        one = UNetProbe(*(getattr(probe, f.name)[i : i + 1] for f in dataclasses.fields(probe)))
        assert decibels(one.run(unet), together[i : i + 1]) > EXACT_DB


@pytest.mark.parametrize("kind", ["mean", "conv"])
@pytest.mark.parametrize("levels", [2, 3])
def test_frames_are_halved_exactly_below_level_0(kind: Any, levels: int) -> None:
    spec = dataclasses.replace(
        PLAIN,
        block_out_channels=(64,) * levels,
        num_attention_heads=(2,) * levels,
        attention=(True,) * levels,
        temporal_multiscaling=kind,
    )
    unet, batch, frames = build_unet(spec, frames=6), 2, 6
    seen: dict[str, int] = {}

    def record(path: str) -> Any:
        def hook(_: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            images = args[0] if args else kwargs["hidden_states"]
            indicator = kwargs.get("image_only_indicator")
            seen[path] = images.shape[0] // batch
            assert indicator is None or indicator.shape == (batch, seen[path])

        return hook

    blocks = unet.temporal_blocks()
    for path, module in unet.named_modules():
        if path in blocks or path.endswith("samplers.0") or path in ("conv_in", "conv_out"):
            module.register_forward_pre_hook(record(path), with_kwargs=True)
    denoise_inputs(unet, batch=batch, size=2 ** (levels - 1)).run(unet)
    assert len(seen) == len(blocks) + 2 * (levels - 1) + 2

    def expected(path: str) -> int:
        # The level's own samplers run at the rate of the level; level 0 is the last of the up blocks.
        at_level_0 = path.startswith(("down_blocks.0.", f"up_blocks.{levels - 1}.", "conv_"))
        return frames if at_level_0 else frames // 2

    assert seen == {path: expected(path) for path in seen}


def test_mean_resampling_averages_pairs_and_repeats() -> None:
    clips = torch.arange(2 * 4 * 3.0).reshape(8, 3, 1, 1)
    halved = TemporalDownsample(3, "mean")(clips, 4)
    assert torch.equal(halved, torch.stack([(clips[i] + clips[i + 1]) / 2 for i in (0, 2, 4, 6)]))
    doubled = TemporalUpsample(3, "mean")(halved, 2)
    assert torch.equal(doubled, torch.stack([halved[i // 2] for i in range(8)]))


def test_conv_resampling_is_a_temporal_convolution_per_clip() -> None:
    clips = torch.randn(2, 4, 5, 2, 3, dtype=torch.float64)
    down = randomise(TemporalDownsample(5, "conv").double(), 0)
    up = randomise(TemporalUpsample(5, "conv").double(), 1)
    halved = torch.zeros(2, 2, 5, 2, 3, dtype=torch.float64)
    padded = F.pad(clips, (0, 0, 0, 0, 0, 0, 1, 1))
    for t in range(2):
        for tap in range(3):
            mixed = torch.einsum("oc,bchw->bohw", down.conv.weight[:, :, tap, 0, 0], padded[:, 2 * t + tap])
            halved[:, t] += mixed
        halved[:, t] += down.conv.bias[:, None, None]
    torch.testing.assert_close(down(clips.flatten(0, 1), 4), halved.flatten(0, 1))
    repeated = halved.repeat_interleave(2, 1).transpose(1, 2)
    expected = F.conv3d(repeated, up.conv.weight, up.conv.bias, padding=(1, 0, 0)).transpose(1, 2)
    torch.testing.assert_close(up(halved.flatten(0, 1), 2), expected.flatten(0, 1))


@pytest.mark.parametrize("kind", ["mean", "conv"])
@pytest.mark.parametrize("batch", [1, 2])
def test_odd_frame_counts_are_refused_with_multiscaling(kind: Any, batch: int) -> None:
    spec = dataclasses.replace(PLAIN, temporal_multiscaling=kind)
    with pytest.raises(SpecError, match="frames: 5"):
        ModelSpec("odd", frames=5, height=64, width=64, unet=spec)
    with pytest.raises(ValueError, match="5 frames"):
        build_unet(spec)(**unet_inputs(spec, batch=batch, frames=5))


def test_multiscaling_needs_two_levels() -> None:
    with pytest.raises(SpecError, match="two levels"):
        UNetSpec((64,), (2,), (True,), temporal_multiscaling="mean")


def test_latents_that_the_levels_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 2"):
        build_unet()(**unet_inputs(PLAIN, height=5))


def gated_like(plain: MobileVDUNet, gate: float) -> MobileVDUNet:
    gated = build_unet(dataclasses.replace(plain.unet_spec, gated=True), frames=plain.config.num_frames)
    left = gated.load_state_dict(plain.state_dict(), strict=False)
    assert not left.unexpected_keys
    assert {name.rsplit(".", 1)[1] for name in left.missing_keys} == {"gate", "importance"}
    for block in gated.temporal_blocks().values():
        block.time_mixer.gate = torch.tensor(gate)
    return gated


def test_gate_1_changes_nothing() -> None:
    plain = build_unet()
    probe = denoise_inputs(plain, batch=2)
    assert decibels(probe.run(plain), probe.run(gated_like(plain, 1.0))) > EXACT_DB


def test_gate_0_leaves_the_spatial_branch_exactly() -> None:
    plain = build_unet()
    probe = denoise_inputs(plain, batch=2)
    gated = gated_like(plain, 0.0)
    before = probe.run(gated)
    theirs = diffusers_unet(PLAIN, 4)
    theirs.load_state_dict(plain.state_dict())
    for block in gated.temporal_blocks().values():  # alpha = 1 in diffusers' own blend
        block.time_mixer.mix_factor.fill_(60.0)
    for name, parameter in theirs.named_parameters():
        if name.endswith("mix_factor"):
            parameter.fill_(60.0)
    inputs = unet_inputs(PLAIN, batch=2)
    assert decibels(theirs(**inputs).sample, gated(**inputs)) > EXACT_DB
    # The blend factor no longer matters, nor does anything temporal.
    assert torch.equal(before, probe.run(gated))
    assert decibels(probe.run(plain), before) < 40


@pytest.mark.parametrize("path", ["down_blocks.0.resnets.0", "mid_block.attentions.0"])
def test_gate_0_of_one_block_is_diffusers_image_only_output(path: str) -> None:
    plain = build_unet()
    block, gated = plain.get_submodule(path), gated_like(plain, 0.0).get_submodule(path)
    channels = 64 if path.startswith("down") else 96
    x = torch.randn(4, channels, 2, 2, dtype=torch.float64)
    if isinstance(block, SpatioTemporalResBlock):
        arguments: dict[str, Any] = {"temb": torch.randn(4, 256, dtype=torch.float64)}
    else:
        context = torch.randn(1, 1, 16, dtype=torch.float64).expand(4, -1, -1)
        arguments = {"encoder_hidden_states": context, "return_dict": False}

    def run(module: torch.nn.Module, indicator: Tensor) -> Tensor:
        out = module(x, image_only_indicator=indicator, **arguments)
        return out if isinstance(out, Tensor) else out[0]

    assert torch.equal(run(block, torch.ones(1, 4)), run(gated, torch.zeros(1, 4)))
    assert not torch.equal(run(block, torch.zeros(1, 4)), run(gated, torch.zeros(1, 4)))


def test_a_fractional_gate_scales_the_residual() -> None:
    mixer = build_unet(FULL).temporal_blocks()["mid_block.resnets.0"].time_mixer
    assert isinstance(mixer, GatedBlender)
    mixer.gate = torch.tensor(0.25)
    x_s, x_t = torch.randn(2, 1, 3, 4, 2, 2, dtype=torch.float64)
    alpha = torch.sigmoid(mixer.mix_factor)
    expected = x_s + 0.25 * (1 - alpha) * (x_t - x_s)
    torch.testing.assert_close(mixer(x_s, x_t, torch.zeros(1, 4)), expected)


def test_a_straight_through_sample_carries_gradient_to_every_importance() -> None:
    unet = build_unet(dataclasses.replace(FULL, kept_temporal_blocks=None)).requires_grad_(True)
    probe = denoise_inputs(unet)
    mixers = [block.time_mixer for block in unet.temporal_blocks().values()]
    importance = torch.stack([mixer.importance for mixer in mixers])
    gates = sample_gates(inclusion_probabilities(importance, 5), torch.Generator().manual_seed(0))
    for mixer, gate in zip(mixers, gates, strict=True):
        mixer.gate = gate
    assert sorted(set(gates.detach().round(decimals=9).tolist())) == [0.0, 1.0]
    unet.denoise(probe.noise, probe.image_latents, probe.image_embeds).square().mean().backward()
    gradients = [mixer.importance.grad for mixer in mixers]
    assert all(g is not None and bool(g.isfinite()) and float(g) != 0.0 for g in gradients)


def test_kept_blocks_set_the_gates() -> None:
    unet = build_unet(FULL)
    gates = {path: float(block.time_mixer.gate) for path, block in unet.temporal_blocks().items()}
    assert {path for path, gate in gates.items() if gate == 1.0} == set(FULL.kept_temporal_blocks or ())
    assert sorted(gates.values()) == [0.0] * 3 + [1.0] * 9
    nothing = build_unet(dataclasses.replace(FULL, kept_temporal_blocks=()))
    assert all(float(b.time_mixer.gate) == 0.0 for b in nothing.temporal_blocks().values())


def test_gates_are_real_on_the_meta_device() -> None:
    with torch.device("meta"):
        unet = MobileVDUNet(FULL, StepSpec(), num_frames=4)
    assert sum(float(block.time_mixer.gate) for block in unet.temporal_blocks().values()) == 9


@pytest.mark.parametrize("path", ["down_blocks.9.resnets.0", "down_blocks.1.attentions.0", "mid_block", ""])
def test_an_unknown_kept_block_is_refused(path: str) -> None:
    spec = dataclasses.replace(FULL, kept_temporal_blocks=("mid_block.resnets.0", path))
    with torch.device("meta"), pytest.raises(SpecError) as caught:
        MobileVDUNet(spec, StepSpec())
    assert repr(path) in str(caught.value)
    assert "blocks are named like" in str(caught.value)


def test_funnels_sit_on_the_kinds_that_the_spec_names() -> None:
    for kind, part in (
        ("spatial_attention", ".transformer_blocks."),
        ("temporal_attention", ".temporal_transformer_blocks."),
    ):
        unet = build_unet(dataclasses.replace(PLAIN, funnels=FunnelSpec(**{kind: 0.5})))
        squeezed = {n: p for n, p in unet.named_parameters() if n.endswith((".squeeze", ".widen"))}
        attentions = [n for n, _ in unet.named_modules() if part in n and n.endswith(".attn1")]
        assert len(squeezed) == 4 * len(attentions)
        assert all(part in name and ".attn1." in name for name in squeezed)
        first = squeezed[f"down_blocks.0.attentions.0{part}0.attn1.to_q.squeeze"]
        assert first.shape == (2, funnel_width(32, 0.5), 32)
    unet = build_unet(dataclasses.replace(PLAIN, funnels=FunnelSpec(resblock=0.5)))
    names = {n for n, _ in unet.named_parameters() if n.endswith((".squeeze", ".widen"))}
    resblocks = 2 * len([b for b in unet.temporal_blocks().values() if isinstance(b, SpatioTemporalResBlock)])
    assert len(names) == 3 * resblocks
    assert not any("attn" in name for name in names)
