"""LoRA: every spelling of names gives the weights W + scale alpha / r B A; what does not fit is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from safetensors.torch import load_file, save_file
from torch import Tensor

from mobilevd_deploy.errors import CheckpointError, UsageError
from mobilevd_deploy.model.checkpoint import open_checkpoint
from mobilevd_deploy.model.lora import Lora, parse_lora
from tests.support.svd_folders import write_svd_folder

LAYERS = {  # module: rank
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": 4,
    "down_blocks.0.attentions.0.temporal_transformer_blocks.0.attn2.to_out.0": 2,
    "up_blocks.1.resnets.0.spatial_res_block.conv1": 3,
    "mid_block.resnets.1.temporal_res_block.conv2": 2,
}
ALPHA = 6.0


@pytest.fixture(scope="module")
def svd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_svd_folder(tmp_path_factory.mktemp("svd") / "tiny")


@pytest.fixture(scope="module")
def weights(svd: Path) -> dict[str, Tensor]:
    return load_file(svd / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def pairs(weights: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Down (r, in, kernel) and up (out, r, 1, 1) of each layer."""
    generator = torch.Generator().manual_seed(5)
    made = {}
    for name, rank in LAYERS.items():
        weight = weights[f"{name}.weight"]
        down = torch.randn((rank, *weight.shape[1:]), generator=generator)
        up = torch.randn((weight.shape[0], rank, *[1] * (weight.ndim - 2)), generator=generator)
        made[name] = (down, up)
    return made


def merged(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """The layer's own kernel plus the kernel of both maps in a row, in float64."""
    difference = torch.einsum("or,ri...->oi...", up.double().flatten(1), down.double())
    return weight.double() + scale * difference


def peft(pairs: dict[str, tuple[Tensor, Tensor]], folder: Path) -> Path:
    folder.mkdir()
    state = {}
    for name, (down, up) in pairs.items():
        state[f"base_model.model.{name}.lora_A.weight"] = down
        state[f"base_model.model.{name}.lora_B.weight"] = up
    save_file(state, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": ALPHA, "r": 4}))
    return folder


def diffusers(pairs: dict[str, tuple[Tensor, Tensor]], folder: Path) -> Path:
    """Names by diffusers' own conversion; alpha in the metadata, as it saves them."""
    folder.mkdir()
    state = {}
    for name, (down, up) in pairs.items():
        state[f"unet.{name}.lora_A.weight"], state[f"unet.{name}.lora_B.weight"] = down, up
    path = folder / "pytorch_lora_weights.safetensors"
    metadata = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": ALPHA, "unet.r": 4})}
    save_file(convert_state_dict_to_diffusers(state), path, metadata)
    return path


def kohya(pairs: dict[str, tuple[Tensor, Tensor]], folder: Path) -> Path:
    folder.mkdir()
    state = {}
    for name, (down, up) in pairs.items():
        key = "lora_unet_" + name.replace(".", "_")
        state |= {
            f"{key}.lora_down.weight": down,
            f"{key}.lora_up.weight": up,
            f"{key}.alpha": torch.tensor(ALPHA),
        }
    path = folder / "kohya.safetensors"
    save_file({name: value.half() if "alpha" in name else value for name, value in state.items()}, path)
    return path


def old_processors(pairs: dict[str, tuple[Tensor, Tensor]], folder: Path) -> Path:
    """diffusers before peft: attention layers only, without alpha."""
    folder.mkdir()
    state = {}
    for name, (down, up) in pairs.items():
        attention, _, layer = name.removesuffix(".0").rpartition(".")
        if layer.startswith("to_"):
            key = f"unet.{attention}.processor.{layer}_lora"
            state |= {f"{key}.down.weight": down, f"{key}.up.weight": up}
    torch.save(state, folder / "pytorch_lora_weights.bin")
    return folder


@pytest.mark.parametrize("write", [peft, diffusers, kohya, old_processors])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_adapters_are_merged_as_they_are_read(  # type: ignore[no-untyped-def]
    write, scale: float, svd: Path, weights: dict[str, Tensor], pairs, tmp_path: Path
) -> None:
    notices: list[str] = []
    lora = Lora(write(pairs, tmp_path / "lora"), scale)
    state = open_checkpoint(svd, loras=[lora], notice=notices.append).load("unet").state_dict()
    has_alpha = write is not old_processors
    layers = {name for name in LAYERS if has_alpha or ".to_" in name}
    assert f"merges {len(layers)} adapters at scale {scale:g}" in notices[0]
    assert has_alpha != notices[0].endswith("alpha is the rank)")
    for name, weight in weights.items():
        layer = name.removesuffix(".weight")
        if layer not in layers:
            assert torch.equal(state[name], weight), name
            continue
        factor = scale * (ALPHA / LAYERS[layer] if has_alpha else 1)
        wanted = merged(weight, *pairs[layer], factor)
        assert torch.equal(state[name], wanted.float()), name
        assert not torch.equal(state[name], weight)


def test_two_adapters_add_up(svd: Path, weights: dict[str, Tensor], pairs, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    first, second = Lora(peft(pairs, tmp_path / "a"), 0.5), Lora(kohya(pairs, tmp_path / "b"), -2.0)
    opened = open_checkpoint(svd, loras=[first, second])
    opened.check_values()
    name = "mid_block.resnets.1.temporal_res_block.conv2"
    wanted = merged(weights[f"{name}.weight"], *pairs[name], (0.5 - 2) * ALPHA / 2)
    assert torch.allclose(opened.load("unet").state_dict()[f"{name}.weight"].double(), wanted, rtol=1e-5)
    digests = {open_checkpoint(svd, loras=some).sha256 for some in ([], [first], [second], [first, second])}
    assert len(digests) == 4
    assert open_checkpoint(svd, loras=[Lora(first.path, 0.6)]).sha256 not in digests


def test_patterns_and_rank_stabilisation_of_peft(svd: Path, weights, pairs, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder = peft(pairs, tmp_path / "lora")
    config = {"lora_alpha": ALPHA, "use_rslora": True, "alpha_pattern": {"conv2": 10}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    state = open_checkpoint(svd, loras=[Lora(folder)]).load("unet").state_dict()
    for name, rank in LAYERS.items():
        factor = (10 if name.endswith("conv2") else ALPHA) / rank**0.5
        wanted = merged(weights[f"{name}.weight"], *pairs[name], factor)
        assert torch.equal(state[f"{name}.weight"], wanted.float()), name


def test_peft_itself_merges_to_the_same_weights(svd: Path, tmp_path: Path) -> None:
    library = pytest.importorskip("peft", reason="needs peft, which the toolkit does not need")
    from diffusers import UNetSpatioTemporalConditionModel

    unet = UNetSpatioTemporalConditionModel.from_pretrained(svd / "unet").double()
    config = library.LoraConfig(
        r=4, lora_alpha=6, target_modules=["to_q", "to_out.0", "conv1", "ff.net.2"], alpha_pattern={"to_q": 3}
    )
    adapted = library.get_peft_model(unet, config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(generator=generator)
    adapted.save_pretrained(tmp_path / "adapter")
    wanted = adapted.merge_and_unload().state_dict()
    state = open_checkpoint(svd, loras=[Lora(tmp_path / "adapter")]).load("unet").state_dict()
    assert all(
        torch.allclose(state[name].double(), value, rtol=1e-5, atol=1e-6) for name, value in wanted.items()
    )


def test_adapters_that_do_not_fit_are_named(svd: Path, pairs, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    wrong = dict(pairs)
    wrong["down_blocks.7.attentions.0.to_q"] = (torch.zeros(1, 2), torch.zeros(2, 1))
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    wrong[name] = (torch.zeros(4, 48), torch.zeros(32, 4))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(svd, loras=[Lora(peft(wrong, tmp_path / "lora"))])
    message = str(caught.value)
    assert "2 of 5 adapters do not fit this UNet" in message
    assert "down_blocks.7.attentions.0.to_q: no such layer" in message
    assert f"{name}: [32, 4] x [4, 48], the layer is [32, 32]" in message


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a.hada_w1_a": torch.zeros(2, 2)}, "holds LoHa adapters"),
        ({"a.to_q.dora_scale": torch.zeros(2)}, "holds DoRA adapters"),
        ({"conv_in.weight": torch.zeros(2)}, "holds no LoRA"),
        ({"unet.mid_block.a.lora_A.weight": torch.zeros(2, 2)}, "half of a pair for unet.mid_block.a"),
        ({"lora_unet_conv_in.diff": torch.zeros(2), "x.lora_up.weight": torch.zeros(1)}, "are not pairs"),
    ],
)
def test_files_that_hold_no_pairs(
    svd: Path, tmp_path: Path, tensors: dict[str, Tensor], message: str
) -> None:
    save_file(tensors, path := tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(svd, loras=[Lora(path)])


def test_a_lora_alone_is_no_checkpoint(pairs, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(CheckpointError, match="a LoRA, which changes the weights of another checkpoint"):
        open_checkpoint(diffusers(pairs, tmp_path / "a"))
    with pytest.raises(CheckpointError, match="a LoRA, which changes the weights of another checkpoint"):
        open_checkpoint(peft(pairs, tmp_path / "b"))


def test_a_missing_lora_is_named(svd: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.safetensors: no such file"):
        open_checkpoint(svd, loras=[Lora(tmp_path / "none.safetensors")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"lacks adapter_model\.safetensors"):
        open_checkpoint(svd, loras=[Lora(tmp_path / "empty")])


def test_a_lora_that_is_not_finite_is_found(svd: Path, pairs, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    name = next(iter(pairs))
    broken = {**pairs, name: (torch.full_like(pairs[name][0], torch.nan), pairs[name][1])}
    opened = open_checkpoint(svd, loras=[Lora(peft(broken, tmp_path / "lora"))])
    with pytest.raises(CheckpointError, match="holds NaN or infinite values"):
        opened.check_values()


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a.safetensors", Lora(Path("a.safetensors"))),
        ("a.safetensors:0.8", Lora(Path("a.safetensors"), 0.8)),
        ("dir/a:-1", Lora(Path("dir/a"), -1.0)),
    ],
)
def test_lora_option(text: str, wanted: Lora) -> None:
    assert parse_lora(text) == wanted


def test_lora_option_with_a_colon_in_the_name(tmp_path: Path) -> None:
    (path := tmp_path / "a:b").write_bytes(b"")
    assert parse_lora(str(path)) == Lora(path)
    with pytest.raises(UsageError, match="'high' is not a scale"):
        parse_lora("a.safetensors:high")
    with pytest.raises(UsageError, match="is not a scale"):
        parse_lora("a.safetensors:nan")
