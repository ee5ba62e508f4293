"""The components against diffusers' own Stable Video Diffusion pipeline, on tiny random networks."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLTemporalDecoder,
    AutoencoderTiny,
    EulerDiscreteScheduler,
    StableVideoDiffusionPipeline,
    UNetSpatioTemporalConditionModel,
)
from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import (
    _resize_with_antialiasing,
)
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from mobilevd_deploy.config.spec import (
    DecoderSpec,
    ImageEncoderSpec,
    ModelSpec,
    StepSpec,
    UNetSpec,
    VaeEncoderSpec,
)
from mobilevd_deploy.errors import SpecError
from mobilevd_deploy.model.components import antialiased_resize, build_component, deploy_contract
from mobilevd_deploy.model.interface import COMPONENTS, component_tensors, input_shapes

TINY = ModelSpec(
    name="tiny",
    frames=4,
    height=64,
    width=96,
    unet=UNetSpec(
        block_out_channels=(32, 64),
        num_attention_heads=(2, 4),
        attention=(True, False),
        layers_per_block=1,
        cross_attention_dim=16,
        addition_time_embed_dim=8,
    ),
    image_encoder=ImageEncoderSpec(32, 64, 2, 2, image_size=224, patch_size=56, projection_dim=16),
    vae_encoder=VaeEncoderSpec(block_out_channels=(32, 32, 64, 64), layers_per_block=1),
    decoder=DecoderSpec(block_out_channels=(32, 32, 64, 64), layers_per_block=1),
)
TAESD = dataclasses.replace(
    TINY,
    decoder=DecoderSpec(kind="tiny", block_out_channels=(8, 8, 8, 8), layers_per_block=3, scaling_factor=1.0),
)
DEMO = dataclasses.replace(
    TINY,
    vae_encoder=VaeEncoderSpec(kind="pixel-unshuffle", block_out_channels=(16, 24), layers_per_block=2),
    decoder=DecoderSpec(
        kind="pixel-shuffle", block_out_channels=(16, 24), layers_per_block=2, scaling_factor=2.0
    ),
)


@pytest.fixture(scope="module")
def pipeline() -> StableVideoDiffusionPipeline:
    """diffusers' pipeline with networks of TINY's shapes and SVD's scheduler, in float32."""
    torch.manual_seed(0)
    unet = TINY.unet
    vae = TINY.vae_encoder
    clip = TINY.image_encoder
    made = StableVideoDiffusionPipeline(
        vae=AutoencoderKLTemporalDecoder(
            down_block_types=("DownEncoderBlock2D",) * 4,
            block_out_channels=vae.block_out_channels,
            layers_per_block=vae.layers_per_block,
        ),
        image_encoder=CLIPVisionModelWithProjection(CLIPVisionConfig(**dataclasses.asdict(clip))),
        unet=UNetSpatioTemporalConditionModel(
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            block_out_channels=unet.block_out_channels,
            num_attention_heads=unet.num_attention_heads,
            layers_per_block=unet.layers_per_block,
            cross_attention_dim=unet.cross_attention_dim,
            addition_time_embed_dim=unet.addition_time_embed_dim,
            projection_class_embeddings_input_dim=3 * unet.addition_time_embed_dim,
            num_frames=TINY.frames,
        ),
        scheduler=EulerDiscreteScheduler(
            prediction_type="v_prediction",
            use_karras_sigmas=True,
            sigma_min=0.002,
            sigma_max=700.0,
            timestep_type="continuous",
            timestep_spacing="leading",
            interpolation_type="linear",
            steps_offset=1,
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
        ),
        feature_extractor=CLIPImageProcessor(),
    )
    for network in (made.vae, made.image_encoder, made.unet):
        network.eval().requires_grad_(False)
        # Biases and norms that start at 0 and 1 would hide a swap of two of them.
        for parameter in network.parameters():
            if parameter.ndim < 2:
                parameter += 0.1 * torch.randn_like(parameter)
    return made


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (TINY.height, TINY.width, 3), np.uint8))


@pytest.fixture(scope="module")
def image(picture: Image.Image) -> Tensor:
    """The picture as the components take it."""
    return torch.tensor(np.asarray(picture)).permute(2, 0, 1)[None] / 127.5 - 1


def loaded(spec: ModelSpec, name: str, state: dict[str, Tensor]) -> nn.Module:
    module = build_component(spec, name)  # type: ignore[arg-type]
    module.load_state_dict(state)
    return deploy_contract(module).requires_grad_(False)


def test_image_encoder_is_svds(
    pipeline: StableVideoDiffusionPipeline, picture: Image.Image, image: Tensor
) -> None:
    wanted = pipeline._encode_image([picture], "cpu", 1, False)[:, 0]
    embeds = loaded(TINY, "image_encoder", pipeline.image_encoder.state_dict())(image)
    torch.testing.assert_close(embeds, wanted, atol=2e-5, rtol=1e-5)


def test_vae_encoder_is_svds(
    pipeline: StableVideoDiffusionPipeline, picture: Image.Image, image: Tensor
) -> None:
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(1))
    # The three lines of the pipeline's __call__ that lead to the latents.
    prepared = pipeline.video_processor.preprocess(picture, height=TINY.height, width=TINY.width)
    prepared = prepared + 0.02 * noise
    wanted = pipeline._encode_vae_image(prepared, "cpu", 1, False)
    state = {k: v for k, v in pipeline.vae.state_dict().items() if not k.startswith("decoder.")}
    torch.testing.assert_close(loaded(TINY, "vae_encoder", state)(image, noise), wanted, atol=1e-5, rtol=1e-5)


def test_decoder_is_svds(pipeline: StableVideoDiffusionPipeline) -> None:
    latents = torch.randn(4, 4, 8, 12, generator=torch.Generator().manual_seed(2))
    wanted = pipeline.decode_latents(latents[None], 4)[0].transpose(0, 1)
    state = {
        k.removeprefix("decoder."): v
        for k, v in pipeline.vae.state_dict().items()
        if k.startswith("decoder.")
    }
    torch.testing.assert_close(loaded(TINY, "decoder", state)(latents), wanted, atol=1e-5, rtol=1e-5)


def test_tiny_decoder_is_taesds() -> None:
    torch.manual_seed(3)
    widths = TAESD.decoder.block_out_channels
    vae = AutoencoderTiny(
        encoder_block_out_channels=widths, decoder_block_out_channels=widths
    ).requires_grad_(False)
    latents = 2 * torch.randn(3, 4, 4, 6)
    frames = loaded(TAESD, "decoder", vae.decoder.state_dict())(latents)
    torch.testing.assert_close(frames, vae.decode(latents).sample)


def test_one_call_of_the_pipeline_is_our_four_components(
    pipeline: StableVideoDiffusionPipeline, picture: Image.Image, image: Tensor
) -> None:
    """One step at sigma_max without guidance is SVD's own sampler with one inference step."""
    generator = torch.Generator().manual_seed(4)
    pipeline.set_progress_bar_config(disable=True)
    wanted = pipeline(
        picture,
        height=TINY.height,
        width=TINY.width,
        num_frames=TINY.frames,
        num_inference_steps=1,
        max_guidance_scale=1.0,
        generator=generator,
        output_type="pt",
    ).frames[0]
    # The pipeline draws the image's noise first, then the latents'.
    generator.manual_seed(4)
    image_noise = torch.randn(1, 3, TINY.height, TINY.width, generator=generator)
    noise = torch.randn(1, TINY.frames, 4, *TINY.latent_size, generator=generator)[0]
    vae = pipeline.vae.state_dict()
    embeds = loaded(TINY, "image_encoder", pipeline.image_encoder.state_dict())(image)
    encoder = loaded(TINY, "vae_encoder", {k: v for k, v in vae.items() if not k.startswith("decoder.")})
    unet = loaded(TINY, "unet", pipeline.unet.state_dict())
    decoder = {k.removeprefix("decoder."): v for k, v in vae.items() if k.startswith("decoder.")}
    frames = loaded(TINY, "decoder", decoder)(unet(noise, encoder(image, image_noise), embeds))
    torch.testing.assert_close((frames / 2 + 0.5).clamp(0, 1), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("height", "width", "size"), [(64, 96, 224), (256, 512, 224), (300, 225, 28), (224, 224, 224)]
)
def test_resize_is_svds(height: int, width: int, size: int) -> None:
    image = torch.rand(1, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    wanted = _resize_with_antialiasing(image, (size, size))
    torch.testing.assert_close(antialiased_resize(image, size), wanted, atol=1e-9, rtol=0)


@pytest.mark.parametrize(("spec", "name"), itertools.product([TINY, TAESD, DEMO], COMPONENTS))
def test_shapes_follow_the_contract_on_the_meta_device(spec: ModelSpec, name: str) -> None:
    with torch.device("meta"):
        module = deploy_contract(build_component(spec, name))  # type: ignore[arg-type]
        out = module(*(torch.empty(shape) for shape in input_shapes(spec, name).values()))  # type: ignore[arg-type]
    h, w = spec.latent_size
    wanted = {
        "image_embeds": (1, 16),
        "image_latents": (1, 4, h, w),
        "latents": (4, 4, h, w),
        "frames": (4, 3, spec.height, spec.width),
    }
    assert tuple(out.shape) == wanted[component_tensors(name, spec)[1][0].name]  # type: ignore[index]
    assert out.is_meta


def test_demo_decoder_undoes_the_scaling() -> None:
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(6))
    decoder = build_component(DEMO, "decoder")
    undivided = dataclasses.replace(DEMO, decoder=dataclasses.replace(DEMO.decoder, scaling_factor=1.0))
    plain = build_component(undivided, "decoder")
    plain.load_state_dict(decoder.state_dict())
    torch.testing.assert_close(decoder(latents), plain(latents / 2))


def test_image_noise_is_an_input_only_where_it_is_used() -> None:
    quiet = dataclasses.replace(DEMO, step=StepSpec(noise_aug_strength=0.0))
    assert list(input_shapes(quiet, "vae_encoder")) == ["image"]
    assert list(input_shapes(DEMO, "vae_encoder")) == ["image", "image_noise"]
    image = torch.rand(1, 3, 64, 96)
    assert build_component(quiet, "vae_encoder")(image).shape == (1, 4, 8, 12)
    with pytest.raises(ValueError, match="image_noise is missing"):
        build_component(DEMO, "vae_encoder")(image)


def test_meta_weights_become_a_working_image_encoder() -> None:
    """transformers' position ids are no weights; built on meta they have to come back with them."""
    reference = build_component(TINY, "image_encoder")
    with torch.device("meta"):
        module = build_component(TINY, "image_encoder")
    module.load_state_dict(reference.state_dict(), assign=True)
    image = torch.rand(1, 3, 64, 96)
    torch.testing.assert_close(module(image), reference(image))


def test_impossible_configurations_are_named() -> None:
    broken = dataclasses.replace(
        TINY, image_encoder=dataclasses.replace(TINY.image_encoder, num_attention_heads=5)
    )
    with pytest.raises(SpecError, match="tiny: image_encoder can not be built"):
        build_component(broken, "image_encoder")
