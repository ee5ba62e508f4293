"""Single files in sgm's names: sizes from shapes, and the outputs of sgm's own networks."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from safetensors.torch import save_file
from torch import Tensor, nn

from mobilevd_deploy.config.spec import ImageEncoderSpec, UNetSpec
from mobilevd_deploy.errors import CheckpointError
from mobilevd_deploy.model.checkpoint import open_checkpoint
from mobilevd_deploy.model.weight_files import read_stored
from tests.support.networks import randomise
from tests.support.sgm_networks import SgmSvd, timestep_embedding

UNET = "model.diffusion_model."


class Sinusoids(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, timesteps: Tensor) -> Tensor:
        return timestep_embedding(timesteps, self.width)


def sgm_network(*, video_decoder: bool = True) -> SgmSvd:
    """Random values that float32 holds exactly, computed with in float64."""
    return randomise(SgmSvd(video_decoder=video_decoder), 3).double()


@pytest.fixture(scope="module")
def network() -> SgmSvd:
    return sgm_network()


def written(network: SgmSvd, path: Path, leave_out: tuple[str, ...] = ()) -> Path:
    state = network.state_dict()
    kept = {name: value.float() for name, value in state.items() if not name.startswith(leave_out or ("-",))}
    save_file({name: value.contiguous() for name, value in kept.items()}, path)
    return path


@pytest.fixture(scope="module")
def file(network: SgmSvd, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(network, tmp_path_factory.mktemp("sgm") / "svd.safetensors")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_sizes_follow_from_shapes(file: Path) -> None:
    notices: list[str] = []
    spec = open_checkpoint(file, notice=notices.append).spec
    assert spec.unet == UNetSpec(
        block_out_channels=(64, 128),
        num_attention_heads=(1, 2),
        attention=(True, False),
        layers_per_block=2,
        cross_attention_dim=24,
        addition_time_embed_dim=16,
    )
    assert spec.image_encoder == ImageEncoderSpec(
        32, 128, 2, 16, image_size=32, patch_size=8, projection_dim=24
    )
    assert spec.vae_encoder.block_out_channels == spec.decoder.block_out_channels == (32, 32, 64, 64)
    assert spec.vae_encoder.layers_per_block == spec.decoder.layers_per_block == 2
    assert (spec.name, spec.frames, spec.decoder.kind) == ("svd", 14, "svd-temporal")
    assert len(notices) == 1
    assert notices[0].startswith("svd.safetensors: 14 frames, by its name")


@torch.no_grad()
def test_the_unet_computes_what_sgm_computes(network: SgmSvd, file: Path) -> None:
    ours = open_checkpoint(file).load("unet", torch.float64)
    x, context, ids = noise(3, 8, 4, 6), noise(1, 1, 24, seed=1), torch.tensor([6.0, 127.0, 0.02]).double()
    wanted = network.model.diffusion_model(x, 1.25, context, ids)

    def error() -> float:
        return float((ours(x[None], 1.25, context, ids[None])[0] - wanted).norm() / wanted.norm())

    assert error() < 1e-4
    # What is left is diffusers' own: norms of some resblocks add 1e-6, not 1e-5, to the variance, and
    # sinusoids are computed in float32. With sgm's values the outputs are equal.
    for name, module in ours.named_modules():
        if isinstance(module, nn.GroupNorm) and ".resnets." in name:
            module.eps = 1e-5
    for module in list(ours.modules()):
        for name in ("time_proj", "add_time_proj"):
            if hasattr(module, name):
                setattr(module, name, Sinusoids(getattr(module, name).num_channels))
    assert error() < 1e-13


@torch.no_grad()
def test_the_vae_computes_what_sgm_computes(network: SgmSvd, file: Path) -> None:
    opened = open_checkpoint(file)
    encoder, decoder = opened.load("vae_encoder", torch.float64), opened.load("decoder", torch.float64)
    picture = noise(1, 3, 32, 48)
    vae = network.conditioner.embedders[3].encoder
    wanted = vae.quant_conv(vae.encoder(picture))[:, :4]
    assert torch.allclose(encoder(picture, torch.zeros_like(picture)), wanted, rtol=1e-9, atol=1e-9)
    latents = noise(3, 4, 4, 6)
    wanted = network.first_stage_model.decoder(latents / 0.18215)
    assert torch.allclose(decoder(latents), wanted, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_the_image_encoder_computes_what_open_clip_computes(network: SgmSvd, file: Path) -> None:
    ours, pixels = open_checkpoint(file).load("image_encoder", torch.float64), noise(2, 3, 32, 32)
    given = ours.visual_projection(ours.vision_model(pixels).pooler_output)
    wanted = network.conditioner.embedders[0].open_clip.model.visual(pixels)
    assert torch.allclose(given, wanted, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_an_encoder_without_quant_conv_has_it_merged(network: SgmSvd, tmp_path: Path) -> None:
    """ComfyUI saves only first_stage_model; its encoder returns the moments themselves."""
    path = written(network, tmp_path / "svd.safetensors", leave_out=("conditioner.embedders.3.",))
    encoder, picture = open_checkpoint(path).load("vae_encoder", torch.float64), noise(1, 3, 32, 48)
    wanted = network.first_stage_model.encoder(picture)[:, :4]
    assert torch.allclose(encoder(picture, torch.zeros_like(picture)), wanted, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_decoder_without_time_layers_decodes_frame_by_frame(tmp_path: Path) -> None:
    network, notices = sgm_network(video_decoder=False), list[str]()
    path = written(network, tmp_path / "svd_xt_image_decoder.safetensors")
    opened = open_checkpoint(path, notice=notices.append)
    assert (opened.spec.decoder.kind, opened.spec.frames) == ("svd-image", 25)
    assert "its decoder has no time layers" in notices[0]
    latents = noise(3, 4, 4, 6)
    wanted = network.first_stage_model.decoder(latents / 0.18215)
    assert torch.allclose(opened.load("decoder", torch.float64)(latents), wanted, rtol=1e-9, atol=1e-9)


def test_spatial_layers_get_the_names_that_diffusers_gives_them(network: SgmSvd, file: Path) -> None:
    """diffusers converts picture models only: the same file without its time layers."""
    ours = {name: entry.key for name, entry in open_checkpoint(file)._source.entries.items()}
    stored = {name: torch.empty(0) for name in network.state_dict()}
    unet = {name: value for name, value in stored.items() if name.startswith(UNET) and ".time_" not in name}
    marked = {name: name for name in unet}  # the "tensors" are their own names
    theirs = convert_ldm_unet_checkpoint(marked, {"layers_per_block": 2})
    spatial = {name.replace("spatial_res_block.", ""): key.removeprefix(UNET) for name, key in ours.items()}
    assert len(theirs) > 100
    for name, key in theirs.items():
        assert spatial[f"unet.{name}"] == key.removeprefix(UNET), name
    vae = {
        name.removeprefix("conditioner.embedders.3.encoder."): value
        for name, value in network.state_dict().items()
        if name.startswith("conditioner.embedders.3.encoder.")
    }
    blocks = {"down_block_types": [""] * 4, "up_block_types": [""] * 4}
    converted = convert_ldm_vae_checkpoint(vae, blocks)
    encoder = open_checkpoint(file).load("vae_encoder", torch.float64).state_dict()
    for name, value in converted.items():
        if name.startswith(("encoder.", "quant_conv.")):
            assert torch.equal(encoder.pop(name), value), name
    assert not encoder


def test_an_sgm_checkpoint_goes_to_another_process(file: Path) -> None:
    opened = pickle.loads(pickle.dumps(open_checkpoint(file)))
    before, after = open_checkpoint(file).load("image_encoder"), opened.load("image_encoder")
    assert all(torch.equal(after.state_dict()[name], value) for name, value in before.state_dict().items())


def test_sgm_weights_stay_memory_mapped(file: Path) -> None:
    unet = open_checkpoint(file).load("unet")
    assert str(file) in Path("/proc/self/maps").read_text()
    assert unet.state_dict()["conv_in.weight"].shape == (64, 8, 3, 3)


@pytest.mark.parametrize(
    ("left_out", "message"),
    [
        (("conditioner.",), "an sgm file without image encoder"),
        (("first_stage_model.",), "an sgm file without decoder"),
        (("conditioner.", "first_stage_model."), "a UNet alone, in sgm's names"),
    ],
)
def test_a_part_of_an_sgm_file_needs_a_base(
    network: SgmSvd, file: Path, tmp_path: Path, left_out: tuple[str, ...], message: str
) -> None:
    path = written(network, tmp_path / "part.safetensors", leave_out=left_out)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(path)
    assert "--base" in str(caught.value.next_step)
    opened = open_checkpoint(path, base=file)
    assert opened.spec == open_checkpoint(file).spec
    assert opened.sha256 != open_checkpoint(file).sha256
    opened.check_values()


def test_a_bare_sgm_unet(network: SgmSvd, file: Path, tmp_path: Path) -> None:
    """A trainer's UNet without the outer prefix, inside Lightning's dictionary."""
    state = {f"net.{k}": v.float() for k, v in network.model.diffusion_model.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, path := tmp_path / "last.ckpt")
    loaded = open_checkpoint(path, base=file).load("unet").state_dict()
    assert torch.equal(loaded["conv_in.weight"], state["net.input_blocks.0.0.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update({f"{UNET}label_emb.0.0.weight": torch.zeros(256, 64)}), "not a multiple of 3"),
        (
            lambda s: [s.pop(name) for name in list(s) if ".time_" in name and name.startswith(UNET)],
            "a UNet for pictures, without temporal layers",
        ),
        (
            lambda s: s.update({"first_stage_model.post_quant_conv.weight": torch.zeros(4, 4, 1, 1)}),
            "post_quant_conv",
        ),
        (
            lambda s: s.update({f"{UNET}input_blocks.0.0.weight": torch.zeros(64, 9, 3, 3)}),
            "takes 9 channels and returns 4",
        ),
        (
            lambda s: s.pop(f"{UNET}middle_block.0.time_stack.in_layers.2.bias"),
            r"missing     unet\.mid_block\.resnets\.0\.temporal_res_block\.conv1\.bias \[128\]",
        ),
    ],
)
def test_files_of_other_networks(network: SgmSvd, tmp_path: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    state = {name: value.float().contiguous() for name, value in network.state_dict().items()}
    change(state)
    save_file(state, path := tmp_path / "other.safetensors")
    assert read_stored(path).is_safetensors
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)
