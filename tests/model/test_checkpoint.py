"""Checkpoints in all three forms: what is written comes back, and what does not fit is named."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pickle
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from mobilevd_deploy.config.spec import (
    DecoderSpec,
    FunnelSpec,
    ImageEncoderSpec,
    ModelSpec,
    UNetSpec,
    VaeEncoderSpec,
)
from mobilevd_deploy.errors import CheckpointError
from mobilevd_deploy.model import checkpoint as checkpoint_module
from mobilevd_deploy.model.checkpoint import open_checkpoint, save_checkpoint
from mobilevd_deploy.model.components import CLIP_MEAN, CLIP_STD, build_component
from mobilevd_deploy.model.interface import COMPONENTS
from mobilevd_deploy.model.own_format import FORMAT_KEY, SPEC_KEY
from tests.support import ROOT

States = dict[str, dict[str, Tensor]]

SPEC = ModelSpec(
    name="little",
    frames=2,
    height=64,
    width=64,
    unet=UNetSpec(
        block_out_channels=(32, 32),
        num_attention_heads=(2, 1),
        attention=(True, False),
        layers_per_block=1,
        cross_attention_dim=8,
        addition_time_embed_dim=8,
        temporal_multiscaling="conv",
        gated=True,
        funnels=FunnelSpec(spatial_attention=0.5),
    ),
    image_encoder=ImageEncoderSpec(16, 32, 1, 2, image_size=32, patch_size=16, projection_dim=8),
    vae_encoder=VaeEncoderSpec(kind="pixel-unshuffle", block_out_channels=(8, 8), layers_per_block=1),
    decoder=DecoderSpec(kind="pixel-shuffle", block_out_channels=(8, 8), layers_per_block=1),
)
GATE = "down_blocks.0.resnets.0.time_mixer.gate"


@pytest.fixture(scope="module")
def trained() -> States:
    """Random weights of SPEC, one gate closed."""
    torch.manual_seed(0)
    states = {name: build_component(SPEC, name).state_dict() for name in COMPONENTS}
    for state in states.values():
        for name, tensor in state.items():
            if not name.endswith(".gate"):
                state[name] = torch.randn_like(tensor)
    states["unet"][GATE] = torch.zeros(())
    return states  # type: ignore[return-value]


@pytest.fixture(params=["model.safetensors", "model.pt"])
def saved(request: pytest.FixtureRequest, tmp_path: Path, trained: States) -> Path:
    path = tmp_path / str(request.param)
    save_checkpoint(path, SPEC, trained)  # type: ignore[arg-type]
    return path


def rewrite(path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> Path:
    """Apply `change` to the tensors and {format, spec} of a checkpoint, by the formats' own libraries."""
    if path.suffix == ".pt":
        content = torch.load(path, weights_only=True)
        outer = {"format": content["format"], "spec": content["spec"]}
        change(content["tensors"], outer)
        torch.save({**outer, "tensors": content["tensors"]}, path)
        return path
    with safetensors.safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    tensors = safetensors.torch.load_file(path)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    outer = {"format": metadata[FORMAT_KEY], "spec": json.loads(metadata[SPEC_KEY])}
    change(tensors, outer)
    safetensors.torch.save_file(
        tensors, path, {FORMAT_KEY: str(outer["format"]), SPEC_KEY: json.dumps(outer["spec"])}
    )
    return path


def test_what_is_saved_is_loaded(saved: Path, trained: States) -> None:
    opened = open_checkpoint(saved)
    assert dataclasses.replace(opened.spec, unet=SPEC.unet) == SPEC
    for name in COMPONENTS:
        module = opened.load(name)
        assert not module.training
        state = module.state_dict()
        assert list(state) == list(trained[name])
        for key, tensor in state.items():
            assert torch.equal(tensor, trained[name][key]), key
        wanted = sum(parameter.numel() for parameter in build_component(SPEC, name).parameters())
        assert opened.parameters[name] == wanted


def test_loaded_components_run(saved: Path) -> None:
    opened = open_checkpoint(saved)
    unet = opened.load("unet", torch.float64)
    noise = torch.randn(1, 2, 4, 8, 8, dtype=torch.float64)
    assert unet.denoise(noise, noise[:, 0], torch.randn(1, 8, dtype=torch.float64)).dtype == torch.float64  # type: ignore[operator]
    assert opened.load("image_encoder")(torch.rand(1, 3, 64, 64)).shape == (1, 8)


def test_the_configuration_follows_the_stored_gates(saved: Path, trained: States) -> None:
    kept = open_checkpoint(saved).spec.unet.kept_temporal_blocks
    assert kept is not None
    assert GATE.removesuffix(".time_mixer.gate") not in kept
    assert len(kept) == sum(name.endswith(".gate") for name in trained["unet"]) - 1
    opened = rewrite(saved, lambda tensors, _: tensors.update({f"unet.{GATE}": torch.ones(())}))
    assert open_checkpoint(opened).spec == SPEC


def test_importance_is_read_without_the_network(saved: Path, trained: States) -> None:
    importance = open_checkpoint(saved).importance()
    name = "up_blocks.1.attentions.0"
    assert importance[name] == pytest.approx(float(trained["unet"][f"{name}.time_mixer.importance"]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["half.safetensors", "half.pt"])
def test_half_precision(tmp_path: Path, trained: States, name: str, dtype: torch.dtype) -> None:
    path = tmp_path / name
    save_checkpoint(path, SPEC, trained, dtype)  # type: ignore[arg-type]
    weight = open_checkpoint(path).load("decoder").state_dict()["conv_in.weight"]
    assert weight.dtype == torch.float32
    assert torch.equal(weight, trained["decoder"]["conv_in.weight"].to(dtype).float())
    assert (
        path.stat().st_size < 0.6 * 4 * sum(t.numel() for s in trained.values() for t in s.values()) + 100_000
    )


def test_our_safetensors_are_everybodys(tmp_path: Path, trained: States) -> None:
    path = tmp_path / "m.safetensors"
    save_checkpoint(path, SPEC, trained)  # type: ignore[arg-type]
    tensors = safetensors.torch.load_file(path)
    assert torch.equal(tensors["decoder.conv_in.weight"], trained["decoder"]["conv_in.weight"])
    assert len(tensors) == sum(map(len, trained.values()))


def test_the_example_of_the_specification_writes_a_checkpoint(tmp_path: Path, trained: States) -> None:
    """models/README.md shows training codebases how to write one; the code there is run as it stands."""
    text = (ROOT / "models" / "README.md").read_text(encoding="utf-8")
    code = text.split("```python\n")[1].split("```")[0]
    networks = {}
    for name in COMPONENTS:
        networks[name] = build_component(SPEC, name)
        networks[name].load_state_dict(trained[name])
    path = tmp_path / "mine.safetensors"
    exec(code, {"networks": networks, "configuration": SPEC.to_dict(), "path": path})
    assert torch.equal(
        open_checkpoint(path).load("unet").state_dict()["conv_in.weight"], trained["unet"]["conv_in.weight"]
    )


def test_writing_to_a_loaded_component_leaves_the_file_alone(saved: Path) -> None:
    opened = open_checkpoint(saved)
    before = opened.sha256
    with torch.no_grad():
        for parameter in opened.load("decoder").parameters():
            parameter.zero_()
    again = open_checkpoint(saved)
    assert again.sha256 == before
    assert opened.load("decoder").state_dict()["conv_in.weight"].any()


def test_digest_follows_the_content(saved: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere" / saved.name
    copy.parent.mkdir()
    shutil.copy(saved, copy)
    before = open_checkpoint(saved).sha256
    assert open_checkpoint(copy).sha256 == before
    rewrite(copy, lambda tensors, _: tensors["unet.conv_in.bias"].add_(1))
    assert open_checkpoint(copy).sha256 != before


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to look at its own memory")
@pytest.mark.parametrize("name", ["large.safetensors", "large.pt"])
def test_loading_maps_the_file_instead_of_copying_it(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    spec = dataclasses.replace(SPEC, decoder=dataclasses.replace(SPEC.decoder, block_out_channels=(8, 1200)))
    save_checkpoint(path, spec, {name: build_component(spec, name).state_dict() for name in COMPONENTS})
    size = path.stat().st_size
    assert size > 100e6
    before = anonymous_bytes()
    decoder = open_checkpoint(path).load("decoder")
    assert anonymous_bytes() - before < size / 4
    assert str(path) in Path("/proc/self/maps").read_text()
    copied = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    assert anonymous_bytes() - before > size / 2, "the measure itself must see a copy"
    del copied


# ---- weights that do not fit ----


def test_missing_unexpected_and_misshapen_tensors_are_listed(saved: Path) -> None:
    def change(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        del tensors["unet.conv_in.bias"]
        tensors["unet.conv_in.bias_of_another"] = torch.zeros(3)
        tensors["decoder.conv_in.weight"] = torch.zeros(2, 2)
        tensors["vae_encoder.conv_in.weight"] = tensors["vae_encoder.conv_in.weight"].double()

    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(rewrite(saved, change))
    message = str(caught.value)
    assert "disagree in 4 tensors" in message
    assert "missing     unet.conv_in.bias [32]" in message
    assert "unexpected  unet.conv_in.bias_of_another [3]" in message
    assert "shape       decoder.conv_in.weight is [2, 2], the configuration wants [8, 4, 3, 3]" in message
    assert "dtype       vae_encoder.conv_in.weight is " in message


def test_long_lists_are_cut_after_ten(saved: Path) -> None:
    def change(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.startswith("decoder.")]:
            tensors["decodre." + name] = tensors.pop(name)

    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(rewrite(saved, change))
    lines = str(caught.value).splitlines()
    assert len([line for line in lines if "  missing" in line or "  unexpected" in line]) == 10
    assert any(line.strip().startswith("and ") and line.endswith("more") for line in lines)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused(saved: Path, value: float) -> None:
    def change(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        tensors["decoder.conv_in.weight"].view(-1)[-1] = value

    opened = open_checkpoint(rewrite(saved, change))
    opened.load("unet")
    with pytest.raises(CheckpointError, match=r"decoder\.conv_in\.weight holds NaN or infinite"):
        opened.load("decoder")


def test_not_finite_is_found_in_the_last_chunk(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_module, "_CHUNK", 7)
    test_values_that_are_not_finite_are_refused(saved, float("nan"))


@pytest.mark.parametrize("value", [0.5, -1.0, 2.0, 1 + 1e-6])
def test_gates_are_zero_or_one(saved: Path, value: float) -> None:
    def change(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        tensors[f"unet.{GATE}"] = torch.tensor(value)

    with pytest.raises(CheckpointError, match=r"time_mixer\.gate is .*exactly 0 or 1"):
        open_checkpoint(rewrite(saved, change))


def test_overflow_in_half_precision_is_refused(tmp_path: Path, trained: States) -> None:
    states = {name: dict(state) for name, state in trained.items()}
    states["decoder"]["conv_in.bias"] = states["decoder"]["conv_in.bias"] + 1e6
    path = tmp_path / "m.safetensors"
    with pytest.raises(CheckpointError, match="use float32"):
        save_checkpoint(path, SPEC, states, torch.float16)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


# ---- configurations that do not fit ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda spec: spec["unet"].update(block_out_channels=[32, 64]),
            "weights and configuration disagree in",
        ),
        (lambda spec: spec["unet"].update(block_out_channels=[32, 33]), "not a positive multiple of 32"),
        (
            lambda spec: spec["unet"].update(gated=False),
            "unexpected  unet.down_blocks.0.resnets.0.time_mixer",
        ),
        (lambda spec: spec["unet"].update(wings=2), "unknown key 'wings'"),
        (lambda spec: spec.update(height="tall"), "height: expected int"),
        (lambda spec: spec.pop("name"), "name"),
        (lambda spec: spec["image_encoder"].update(num_attention_heads=3), "image_encoder can not be built"),
        (lambda spec: spec["unet"].update(kept_temporal_blocks=["up.9"]), "no temporal block 'up.9'"),
    ],
)
def test_configuration_that_does_not_fit(saved: Path, change: Callable[[Any], None], message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(rewrite(saved, lambda _, outer: change(outer["spec"])))
    assert message in str(caught.value)
    assert str(saved) in str(caught.value)


def test_configuration_that_is_no_table(saved: Path) -> None:
    with pytest.raises(CheckpointError, match="not a table but list"):
        open_checkpoint(rewrite(saved, lambda _, outer: outer.update(spec=[1, 2])))


@pytest.mark.parametrize(
    ("version", "message"), [(2, "update mobilevd-deploy"), (0, "not a positive"), ("x", "not a p")]
)
def test_other_versions(saved: Path, version: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(rewrite(saved, lambda _, outer: outer.update(format=version)))


# ---- files that are no checkpoints ----

PNG = b"\x89PNG\r\n\x1a\n" + bytes(64)


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (PNG, "it is a PNG picture"),
        (b"version https://git-lfs.github.com/spec/v1\n", "never fetched"),
        (b"PK\x03\x04 and no more", "not a whole"),
        (struct.pack("<Q", 2) + b"{}", "not a"),
        (bytes(1000), "not a"),
    ],
)
def test_wrong_types(tmp_path: Path, ending: str, content: bytes, message: str) -> None:
    path = tmp_path / f"m.{ending}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert message in str(caught.value)


@pytest.mark.parametrize("kept", [0.001, 0.5, 0.99])
def test_truncated(saved: Path, kept: float) -> None:
    with saved.open("r+b") as file:
        file.truncate(int(kept * saved.stat().st_size))
    with pytest.raises(CheckpointError, match="not a whole"):
        open_checkpoint(saved)


def test_bytes_changed_anywhere_never_end_in_a_traceback(saved: Path) -> None:
    content = saved.read_bytes()
    # Where structure lies, as opposed to weights: the head of one format, pickle and directory of the other.
    head = range(20_000) if saved.suffix == ".safetensors" else range(2_000)
    places = [*head, *range(len(content) - 20_000, len(content))]
    chance = random.Random(0)
    for _ in range(40):
        damaged = bytearray(content)
        for _ in range(chance.choice([1, 3, 10])):
            damaged[chance.choice(places)] = chance.randrange(256)
        saved.write_bytes(damaged)
        with contextlib.suppress(CheckpointError):
            open_checkpoint(saved)


class Malicious:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("plain", [False, True])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path, plain: bool) -> None:
    path, target = tmp_path / "m.pt", tmp_path / "made"
    content = {"format": 1, "spec": {}, "tensors": {}, "extra": Malicious(target)}
    if plain:
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match="wants code to be run"):
        open_checkpoint(path)
    assert not target.exists()


def test_other_peoples_pt(tmp_path: Path, trained: States) -> None:
    path = tmp_path / "m.pt"
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="lacks the key 'format'"):
        open_checkpoint(path)
    torch.save(trained["unet"], path)
    with pytest.raises(CheckpointError, match="a UNet alone"):
        open_checkpoint(path)
    torch.save([1], path)
    with pytest.raises(CheckpointError, match="lacks a dictionary"):
        open_checkpoint(path)
    torch.save({"format": 1, "spec": SPEC.to_dict(), "tensors": {"a": 1}}, path)
    with pytest.raises(CheckpointError, match="plain dense tensors"):
        open_checkpoint(path)
    torch.save({"format": 1, "spec": SPEC.to_dict()}, path)
    with pytest.raises(CheckpointError, match="lacks the key 'tensors'"):
        open_checkpoint(path)


def test_training_state_beside_our_keys_is_ignored_with_a_notice(tmp_path: Path, trained: States) -> None:
    path, notices = tmp_path / "m.pt", list[str]()
    save_checkpoint(path, SPEC, trained)  # type: ignore[arg-type]
    torch.save({**torch.load(path), "optimizer": {"state": {}}, "step": 9}, path)
    opened = open_checkpoint(path, notice=notices.append)
    assert notices == ["m.pt: ignored beside 'format', 'spec' and 'tensors': optimizer, step"]
    assert torch.equal(opened.load("unet").state_dict()["conv_in.weight"], trained["unet"]["conv_in.weight"])


def test_other_peoples_safetensors(tmp_path: Path, trained: States) -> None:
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=f"lacks the metadata key '{FORMAT_KEY}'"):
        open_checkpoint(path)
    safetensors.torch.save_file({"a": torch.zeros(1)}, path, {FORMAT_KEY: "1", SPEC_KEY: "{"})
    with pytest.raises(CheckpointError, match="not valid JSON"):
        open_checkpoint(path)


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        open_checkpoint(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="no such file"):
        open_checkpoint(tmp_path / "none")
    other = tmp_path / "picture.png"
    other.write_bytes(PNG)
    with pytest.raises(CheckpointError, match="PNG picture"):
        open_checkpoint(other)


# ---- writing ----


def test_only_what_the_configuration_describes_is_written(tmp_path: Path, trained: States) -> None:
    states = {name: state for name, state in trained.items() if name != "decoder"}
    with pytest.raises(CheckpointError, match=r"missing     decoder\.conv_in\.weight"):
        save_checkpoint(tmp_path / "m.pt", SPEC, states)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"\.safetensors or \.pt"):
        save_checkpoint(tmp_path / "m.bin", SPEC, trained)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="float64"):
        save_checkpoint(tmp_path / "m.pt", SPEC, trained, torch.float64)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(saved: Path, trained: States) -> None:
    before = saved.read_bytes()
    states = {name: dict(state) for name, state in trained.items()}
    states["vae_encoder"]["conv_out.bias"] = torch.full((4,), float("nan"))
    with pytest.raises(CheckpointError, match=r"vae_encoder\.conv_out\.bias holds NaN"):
        save_checkpoint(saved, SPEC, states)  # type: ignore[arg-type]
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_writing_into_a_missing_folder(tmp_path: Path, trained: States) -> None:
    with pytest.raises(CheckpointError, match="can not be written"):
        save_checkpoint(tmp_path / "none" / "m.safetensors", SPEC, trained)  # type: ignore[arg-type]


def test_views_are_saved_alone(tmp_path: Path, trained: States) -> None:
    states = {name: dict(state) for name, state in trained.items()}
    states["decoder"]["conv_in.bias"] = torch.randn(1_000_000)[:8]
    path = tmp_path / "m.pt"
    save_checkpoint(path, SPEC, states)  # type: ignore[arg-type]
    plain = tmp_path / "plain.pt"
    save_checkpoint(plain, SPEC, trained)  # type: ignore[arg-type]
    assert path.stat().st_size < plain.stat().st_size + 100_000


# ---- a diffusers folder ----


@pytest.fixture(scope="module")
def svd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Video Diffusion's folder as diffusers and transformers write it, with tiny networks."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("svd")
    UNetSpatioTemporalConditionModel(
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        block_out_channels=(32, 64),
        num_attention_heads=(2, 4),
        layers_per_block=1,
        cross_attention_dim=16,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        num_frames=14,
    ).save_pretrained(folder / "unet")
    AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D",) * 4, block_out_channels=(32, 32, 32, 64), layers_per_block=1
    ).save_pretrained(folder / "vae")
    # Left at transformers' defaults where it is small enough: config.json then leaves those keys out.
    clip = CLIPVisionConfig(
        hidden_size=36, intermediate_size=48, num_hidden_layers=2, projection_dim=16, patch_size=32
    )
    CLIPVisionModelWithProjection(clip).save_pretrained(folder / "image_encoder")
    (folder / "feature_extractor").mkdir()
    preprocessor = {
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "crop_size": {"height": 224, "width": 224},
    }
    (folder / "feature_extractor" / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


@pytest.fixture
def folder(svd: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(svd, tmp_path / "svd"))


def test_diffusers_folder(svd: Path) -> None:
    opened = open_checkpoint(svd)
    spec = opened.spec
    assert (spec.frames, spec.height, spec.width) == (14, 256, 512)
    assert spec.unet.block_out_channels == (32, 64)
    assert spec.unet.attention == (True, False)
    assert spec.image_encoder.num_attention_heads == 12
    assert spec.decoder.kind == "svd-temporal"
    unet = UNetSpatioTemporalConditionModel.from_pretrained(svd / "unet").state_dict()
    loaded = opened.load("unet").state_dict()
    assert unet.keys() == loaded.keys()
    assert all(torch.equal(unet[name], tensor) for name, tensor in loaded.items())
    vae = AutoencoderKLTemporalDecoder.from_pretrained(svd / "vae").state_dict()
    halves = opened.load("vae_encoder").state_dict()
    halves |= {f"decoder.{name}": tensor for name, tensor in opened.load("decoder").state_dict().items()}
    assert vae.keys() == halves.keys()
    assert all(torch.equal(vae[name], tensor) for name, tensor in halves.items())
    assert opened.load("image_encoder")(torch.rand(1, 3, 64, 64)).shape == (1, 16)
    assert sum(opened.parameters.values()) == len(
        torch.cat([t.flatten() for t in [*unet.values(), *vae.values()]])
    ) + sum(p.numel() for p in opened.load("image_encoder").parameters())


def test_diffusers_folder_in_shards_and_half_precision(folder: Path) -> None:
    whole = open_checkpoint(folder)
    digest, wanted = whole.sha256, whole.load("unet").state_dict()
    unet = UNetSpatioTemporalConditionModel.from_pretrained(folder / "unet")
    shutil.rmtree(folder / "unet")
    unet.save_pretrained(folder / "unet", max_shard_size="1MB")
    assert len(list((folder / "unet").glob("*.safetensors"))) > 1
    vae = AutoencoderKLTemporalDecoder.from_pretrained(folder / "vae").half()
    shutil.rmtree(folder / "vae")
    vae.save_pretrained(folder / "vae", variant="fp16")
    assert (folder / "vae" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    opened = open_checkpoint(folder)
    assert all(torch.equal(wanted[name], tensor) for name, tensor in opened.load("unet").state_dict().items())
    assert opened.load("decoder").state_dict()["conv_in.weight"].dtype == torch.float32
    assert opened.sha256 != digest


def test_folder_digest_ignores_files_that_are_not_read(folder: Path) -> None:
    before = open_checkpoint(folder).sha256
    (folder / "README.md").write_text("a note")
    assert open_checkpoint(folder).sha256 == before
    config = folder / "unet" / "config.json"
    config.write_text(config.read_text() + "\n")
    assert open_checkpoint(folder).sha256 != before


def test_old_position_ids_are_left_out(folder: Path) -> None:
    path = folder / "image_encoder" / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["vision_model.embeddings.position_ids"] = torch.arange(50)[None]
    safetensors.torch.save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    open_checkpoint(folder).load("image_encoder")


@pytest.mark.parametrize("part", ["unet", "vae", "image_encoder", "feature_extractor"])
def test_folder_without_a_part(folder: Path, part: str) -> None:
    shutil.rmtree(folder / part)
    with pytest.raises(CheckpointError, match=f"lacks {part}/"):
        open_checkpoint(folder)


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"lacks unet/config\.json, vae/config\.json"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        ("unet", "_class_name", "UNet2DConditionModel", "only 'UNetSpatioTemporalConditionModel'"),
        ("unet", "block_out_channels", [32, 96], "weights and configuration disagree"),
        ("unet", "block_out_channels", "wide", "block_out_channels: found 'wide'"),
        ("unet", "layers_per_block", [1, 2], "differs between levels"),
        ("unet", "up_block_types", ["UpBlockSpatioTemporal"] * 2, "do not mirror"),
        ("unet", "down_block_types", ["DownBlock2D"] * 2, "down_block_types is"),
        ("unet", "transformer_layers_per_block", 2, "transformer_layers_per_block is 2"),
        ("vae", "_class_name", "AutoencoderKL", "only 'AutoencoderKLTemporalDecoder'"),
        ("image_encoder", "projection_dim", 24, "projection_dim 24 is not"),
        ("image_encoder", "hidden_act", "relu", "hidden_act"),
        ("feature_extractor", "image_mean", [0.5, 0.5, 0.5], "image_mean is"),
    ],
)
def test_folder_of_another_network(folder: Path, part: str, key: str, value: object, message: str) -> None:
    name = "preprocessor_config.json" if part == "feature_extractor" else "config.json"
    path = folder / part / name
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert message in str(caught.value)


def test_folder_with_broken_files(folder: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match="not a whole"):
        open_checkpoint(folder)
    weights.rename(weights.with_name("model.safetensors"))
    with pytest.raises(CheckpointError, match=r"no diffusion_pytorch_model\.safetensors, only model\.safet"):
        open_checkpoint(folder)
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": "../../secret.safetensors"}}))
    with pytest.raises(CheckpointError, match="not in this folder"):
        open_checkpoint(folder)
    (folder / "vae" / "config.json").write_bytes(PNG)
    with pytest.raises(CheckpointError, match="not JSON: it is a PNG"):
        open_checkpoint(folder)
