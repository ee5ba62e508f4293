"""The deploy form of every component against the component itself, in every form that a recipe may choose."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import (
    _resize_with_antialiasing,
)
from torch import Tensor, nn

from mobilevd_deploy.base.tensors import sqnr_db
from mobilevd_deploy.config.presets import load_preset
from mobilevd_deploy.config.recipe import GraphForms, load_recipe
from mobilevd_deploy.config.spec import (
    DecoderSpec,
    ImageEncoderSpec,
    ModelSpec,
    StepSpec,
    UNetSpec,
    VaeEncoderSpec,
)
from mobilevd_deploy.errors import RewriteError
from mobilevd_deploy.model.components import build_component, deploy_contract
from mobilevd_deploy.model.interface import input_shapes
from mobilevd_deploy.npu.build import build_npu
from mobilevd_deploy.npu.encoders import Resize
from mobilevd_deploy.npu.skeleton import deploy_skeleton
from mobilevd_deploy.passes.runner import PASSES
from mobilevd_deploy.passes.subpixel_upsampling import SubPixelUpsampling
from tests.support.networks import randomise

# What may stand between two modules of the deploy form: values pass through these unchanged.
MOVES = {"view", "reshape", "flatten", "permute", "transpose", "slice", "clone"}

# Widths of 64 and 96: with one channel per group, a norm hides the biases before it.
SVD = ModelSpec(
    name="svd-like",
    frames=3,
    height=16,
    width=32,
    unet=UNetSpec(
        block_out_channels=(32, 64),
        num_attention_heads=(2, 4),
        attention=(True, False),
        layers_per_block=1,
        cross_attention_dim=12,
        addition_time_embed_dim=8,
    ),
    step=StepSpec(noise_aug_strength=0.3),
    image_encoder=ImageEncoderSpec(24, 40, 2, 3, image_size=20, patch_size=6, projection_dim=12),
    vae_encoder=VaeEncoderSpec(block_out_channels=(32, 32, 96, 64), layers_per_block=1),
    decoder=DecoderSpec(block_out_channels=(64, 96), layers_per_block=2),
)
SMALL = dataclasses.replace(
    SVD,
    name="small",
    step=StepSpec(noise_aug_strength=0.0),
    image_encoder=dataclasses.replace(SVD.image_encoder, image_size=33, hidden_act="quick_gelu"),
    vae_encoder=VaeEncoderSpec(kind="pixel-unshuffle", block_out_channels=(8, 12), layers_per_block=2),
    decoder=DecoderSpec(
        kind="pixel-shuffle", block_out_channels=(8, 12), layers_per_block=2, scaling_factor=0.5
    ),
)
TAESD = dataclasses.replace(
    SVD,
    name="taesd",
    decoder=DecoderSpec(kind="tiny", block_out_channels=(8,) * 4, layers_per_block=2, scaling_factor=0.7),
)
IMAGE = dataclasses.replace(
    SVD,
    name="svd-image",
    decoder=DecoderSpec(kind="svd-image", block_out_channels=(32, 64), layers_per_block=1),
)
LONE = dataclasses.replace(
    SVD,
    name="one frame, shallow",
    frames=1,
    decoder=DecoderSpec(block_out_channels=(96, 64), layers_per_block=1),
)
CASES = {
    f"{spec.name} {name}": (spec, name)
    for spec, name in [
        (SVD, "image_encoder"),
        (SMALL, "image_encoder"),
        (SVD, "vae_encoder"),
        (SMALL, "vae_encoder"),
        (SVD, "decoder"),
        (IMAGE, "decoder"),
        (TAESD, "decoder"),
        (SMALL, "decoder"),
        (LONE, "decoder"),
    ]
}
FORMS = [
    GraphForms(attention, 3, frames, linear, group_norm, upsample)  # type: ignore[arg-type]
    for attention, frames, linear, group_norm, upsample in itertools.product(
        ("whole", "tiles", "heads"),
        ("batch", "sequential"),
        ("matmul", "conv"),
        ("group", "instance"),
        ("nearest", "subpixel"),
    )
]
EXTREMES = [FORMS[0], FORMS[-1]]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


@functools.cache
def component(case: str) -> nn.Module:
    """A random component in float64."""
    spec, name = CASES[case]
    return randomise(build_component(spec, name).double(), seed=1)  # type: ignore[arg-type]


def inputs(spec: ModelSpec, name: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = input_shapes(spec, name)  # type: ignore[arg-type]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes.values()]


@functools.cache
def reference(case: str) -> Tensor:
    return component(case)(*inputs(*CASES[case]))  # type: ignore[no-any-return]


def leaves(module: nn.Module) -> dict[str, nn.Module]:
    """Every module that does something itself, by path."""
    return {
        path: part
        for path, part in module.named_modules()
        if not list(part.children()) and not isinstance(part, nn.ModuleList)
    }


def count_calls(module: nn.Module) -> Counter[str]:
    """Count from now on how often each leaf is called."""
    calls = Counter(dict.fromkeys(leaves(module), 0))
    for path, part in leaves(module).items():
        part.register_forward_hook(lambda *_, path=path: calls.update([path]))
    return calls


@pytest.mark.parametrize("case", CASES)
def test_every_form_is_exact(case: str) -> None:
    spec, name = CASES[case]
    wanted = reference(case)
    assert wanted.std() > 0.01
    # The same weights in single precision, held to the same reference.
    single = build_component(spec, name)  # type: ignore[arg-type]
    single.load_state_dict(component(case).state_dict())
    feed = inputs(spec, name)
    for forms in FORMS:
        built = build_npu(name, component(case), spec, forms)  # type: ignore[arg-type]
        calls = count_calls(built)
        drift = sqnr_db(wanted, built(*feed))
        assert drift >= 200, f"{forms}: {drift:.1f} dB in float64"
        assert set(calls.values()) == {1}, f"{forms}: {[p for p, n in calls.items() if n != 1]}"
        built = build_npu(name, single, spec, forms)  # type: ignore[arg-type]
        drift = sqnr_db(wanted, built(*(x.float() for x in feed)))
        assert drift >= 90, f"{forms}: {drift:.1f} dB in float32"


@pytest.mark.parametrize("forms", EXTREMES, ids=["plain", "all-other"])
@pytest.mark.parametrize("case", CASES)
def test_graph_is_modules_and_views_of_rank_4_at_most(case: str, forms: GraphForms) -> None:
    spec, name = CASES[case]
    built = build_npu(name, component(case), spec, forms)  # type: ignore[arg-type]
    graph = torch.export.export(built, tuple(inputs(spec, name))).graph
    working = leaves(built)
    seen = 0
    for node in graph.nodes:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            continue
        assert value.ndim <= 4, f"{node}: {tuple(value.shape)}"
        if node.op != "call_function":
            continue
        seen += 1
        # The innermost module that a node came from, by path.
        innermost = [path for path, _ in node.meta["nn_module_stack"].values()][-1]
        moved = node.target.overloadpacket.__name__ in MOVES
        assert moved or innermost in working, f"{node} in {innermost or 'the root'} has no module of its own"
    assert seen > len(working) / 2


@pytest.mark.parametrize(
    ("case", "folded"),
    [
        (
            "svd-like image_encoder",
            {"resize.columns", "resize.rows", "patch_embedding", "to_q", "class_token"},
        ),
        ("svd-like vae_encoder", {"to_q", "conv_out", "strength"}),
        ("small vae_encoder", {"conv_in"}),
        ("svd-like decoder", {"conv_in", "to_q", "temporal_res_block.conv2"}),
        ("svd-image decoder", {"conv_in", "to_q"}),
        ("taesd decoder", {"clamp.scale", "conv_in", "conv_out"}),
        ("small decoder", {"conv_in"}),
    ],
)
def test_weights_are_shared_unless_folded(case: str, folded: set[str]) -> None:
    """No second copy in memory of a full-size network."""
    spec, name = CASES[case]
    source = component(case)
    owned = {tensor.untyped_storage().data_ptr() for tensor in source.state_dict().values()}
    for forms in (GraphForms(), GraphForms(frames="sequential", linear="conv", attention="heads")):
        built = build_npu(name, source, spec, forms)  # type: ignore[arg-type]
        new = {
            path
            for path, tensor in (*built.named_parameters(), *built.named_buffers())
            if tensor.untyped_storage().data_ptr() not in owned
        }
        layers = {path.rsplit(".", 1)[0] for path in new}
        unexpected = {layer for layer in layers if not any(layer.endswith(end) for end in folded)}
        assert not unexpected
        assert all(any(layer.endswith(end) for layer in layers) for end in folded)


def test_building_leaves_the_component_as_it_was() -> None:
    case = "svd-like decoder"
    before = {name: tensor.clone() for name, tensor in component(case).state_dict().items()}
    for forms in EXTREMES:
        build_npu("decoder", component(case), SVD, forms)
    after = component(case).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("linear", ["matmul", "conv"])
@pytest.mark.parametrize(("height", "width", "size"), [(32, 48, 20), (40, 24, 64), (72, 128, 28)])
def test_resize_is_the_pipelines(linear: str, height: int, width: int, size: int) -> None:
    image = torch.randn(1, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    resize = Resize(height, width, size, image, GraphForms(linear=linear))  # type: ignore[arg-type]
    assert sqnr_db(_resize_with_antialiasing(image, (size, size)), resize(image)) >= 200


def test_a_wrong_weight_is_seen() -> None:
    """The bounds above can fail: one value of one bias, off by a thousandth."""
    case = "svd-like vae_encoder"
    built = build_npu("vae_encoder", component(case), SVD, GraphForms())
    built.encoder.conv_out.bias[0] += 1e-3  # type: ignore[union-attr,index]
    assert sqnr_db(reference(case), built(*inputs(*CASES[case]))) < 90


@pytest.mark.parametrize("wrapped", [False, True])
def test_unet_needs_its_passes_and_is_then_exact(wrapped: bool) -> None:
    unet = randomise(build_component(SVD, "unet").double(), seed=4)
    feed = inputs(SVD, "unet")
    wanted = deploy_contract(unet)(*feed)
    with pytest.raises(RewriteError):
        build_npu("unet", unet, SVD, GraphForms())
    for step in PASSES:
        if not isinstance(step, SubPixelUpsampling):
            step.apply(unet)
    built = build_npu("unet", deploy_contract(unet) if wrapped else unet, SVD, EXTREMES[0])
    assert sqnr_db(wanted, built(*feed)) >= 200


def test_a_temporal_decoder_has_a_skeleton() -> None:
    """A large network's steps build every component without weights first."""
    network = deploy_skeleton("decoder", load_preset("svd-lowres").model, load_recipe("xiaomi-14-pro"))
    assert all(tensor.is_meta for tensor in (*network.parameters(), *network.buffers()))
