"""What people bring: each input gives the right weights, or one sentence that says what it is."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNetSpatioTemporalConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mobilevd_deploy.config.data import data_dir
from mobilevd_deploy.errors import CheckpointError
from mobilevd_deploy.model import checkpoint as checkpoint_module
from mobilevd_deploy.model.checkpoint import open_checkpoint
from mobilevd_deploy.model.interface import COMPONENTS
from mobilevd_deploy.model.own_format import SPEC_KEY
from tests.support.svd_folders import PARTS, write_svd_folder

WHOLE = "diffusion_pytorch_model.safetensors"
DEMO = data_dir("models") / "demo.safetensors"
Tensors = dict[str, Tensor]


# ---- containers of the demo checkpoint ----


class Demo:
    """The demo's tensors and configuration, with ways of writing them."""

    def __init__(self) -> None:
        with safe_open(DEMO, "pt") as opened:
            self.metadata: dict[str, str] = opened.metadata()
        self.tensors = load_file(DEMO)
        self.spec = json.loads(self.metadata[SPEC_KEY])
        self.unet = {k.removeprefix("unet."): v for k, v in self.tensors.items() if k.startswith("unet.")}

    def pt(self, path: Path, tensors: Any = None, **extra: Any) -> None:
        content = {"format": 1, "spec": self.spec, "tensors": self.tensors if tensors is None else tensors}
        torch.save({**content, **extra}, path)

    def inside(self, segment: str) -> Tensors:
        """Put a segment behind the component's name."""
        return {name.replace(".", f".{segment}.", 1): value for name, value in self.tensors.items()}

    def outside(self, segment: str) -> Tensors:
        return {f"{segment}.{name}": value for name, value in self.tensors.items()}

    def each(self, change: Callable[[Tensor], Tensor]) -> Tensors:
        return {name: change(value) for name, value in self.tensors.items()}

    def lightning(self, path: Path) -> None:
        states = [{"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]}]
        torch.save({"epoch": 3, "state_dict": self.tensors, "optimizer_states": states}, path)

    def with_ema(self, path: Path) -> None:
        old = self.each(lambda value: value + 1)
        torch.save({"model": old, "ema": self.tensors, "optimizer": {"state": {}}, "step": 9}, path)

    def accelerate(self, path: Path) -> None:
        (path / "unet").mkdir(parents=True)
        save_file(self.unet, path / "unet" / WHOLE)
        (path / "unet" / "config.json").write_text('{"_class_name": "UNetSpatioTemporalConditionModel"}')
        torch.save({}, path / "optimizer.bin")

    def with_ema_folder(self, path: Path) -> None:
        self.accelerate(path)
        shutil.copytree(path / "unet", path / "unet_ema")
        save_file({name: value + 1 for name, value in self.unet.items()}, path / "unet" / WHOLE)

    def accelerate_without_hooks(self, path: Path) -> None:
        path.mkdir()
        save_file(self.unet, path / "model.safetensors")

    def in_shards(self, path: Path) -> None:
        path.mkdir()
        names = sorted(self.tensors)
        for number, part in enumerate((names[::2], names[1::2]), 1):
            tensors = {name: self.tensors[name] for name in part}
            save_file(tensors, path / f"model-0000{number}-of-00002.safetensors", self.metadata)
        where = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))

    def unmerged(self, path: Path) -> None:
        name = next(name for name in self.tensors if name.endswith("attn1.to_q.weight"))
        base, rest = name.removesuffix(".weight"), {k: v for k, v in self.tensors.items() if k != name}
        weight = self.tensors[name]
        low = {"lora_A": torch.zeros(4, weight.shape[1]), "lora_B": torch.zeros(weight.shape[0], 4)}
        adapters = {f"{base}.{key}.default.weight": value for key, value in low.items()}
        self.pt(path, rest | {f"{base}.base_layer.weight": weight} | adapters)

    def overflow(self, path: Path) -> None:
        tensors = {name: value.clone() for name, value in self.tensors.items()}
        tensors["decoder.conv_in.weight"].view(-1)[0] = 1e6
        self.pt(path, {name: value.half() for name, value in tensors.items()})

    def spec_with_numpy(self, path: Path) -> None:
        torch.save(
            {"format": 1, "spec": {**self.spec, "step": {"sigma": np.float64(700)}}, "tensors": self.tensors},
            path,
        )

    def zipped(self, path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.write(DEMO, "demo.safetensors")


@pytest.fixture(scope="module")
def demo() -> Demo:
    return Demo()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123\n"
PAGE = b"<!doctype html><html><body>Access to model is restricted</body></html>"
Write = Callable[[Demo, Path], object]

# name, how it is written, and what the notices say ("" for none)
READ: list[tuple[str, Write, str]] = [
    ("UPPER.SAFETENSORS", lambda d, p: shutil.copy(DEMO, p), ""),
    ("noending", lambda d, p: shutil.copy(DEMO, p), ""),
    ("sft.sft", lambda d, p: shutil.copy(DEMO, p), ""),
    ("safetensors_called.pt", lambda d, p: shutil.copy(DEMO, p), ""),
    ("pt_called.safetensors", lambda d, p: d.pt(p), ""),
    ("ours.bin", lambda d, p: d.pt(p), ""),
    ("ours.ckpt", lambda d, p: d.pt(p), ""),
    ("ours.pt", lambda d, p: d.pt(p), ""),
    ("ddp_module.pt", lambda d, p: d.pt(p, d.inside("module")), "dropped 'module.' from 1118 names"),
    ("ddp_outer.pt", lambda d, p: d.pt(p, d.outside("module")), "dropped 'module.' from 1118 names"),
    ("compiled.pt", lambda d, p: d.pt(p, d.inside("_orig_mod")), "dropped '_orig_mod.' from 1118"),
    (
        "compiled_outer.safetensors",
        lambda d, p: save_file(d.outside("_orig_mod"), p, d.metadata),
        "dropped '_orig_mod.' from 1118",
    ),
    ("plus_step.pt", lambda d, p: d.pt(p, step=1000), "tensors': step"),
    ("plus_optimizer.pt", lambda d, p: d.pt(p, optimizer={"state": {}}), "tensors': optimizer"),
    ("parameters.pt", lambda d, p: d.pt(p, d.each(nn.Parameter)), ""),
    (
        "noncontiguous.pt",
        lambda d, p: d.pt(p, d.each(lambda v: v.T.contiguous().T if v.ndim == 2 else v)),
        "",
    ),
    (
        "channels_last.pt",
        lambda d, p: d.pt(p, d.each(lambda v: v.to(memory_format=torch.channels_last) if v.ndim == 4 else v)),
        "",
    ),
    (
        "spec_as_text.pt",
        lambda d, p: torch.save({"format": 1, "spec": json.dumps(d.spec), "tensors": d.tensors}, p),
        "",
    ),
    ("numpy_in_spec.pt", Demo.spec_with_numpy, ""),
    ("in_shards", Demo.in_shards, ""),
]
# The same, with the demo itself as base.
READ_ON_A_BASE: list[tuple[str, Write, str]] = [
    ("plain_state_dict.pt", lambda d, p: torch.save(d.tensors, p), "gives the configuration"),
    ("no_metadata.safetensors", lambda d, p: save_file(d.tensors, p), "gives the configuration"),
    ("unet_only.pth", lambda d, p: torch.save(d.unet, p), "and image_encoder, vae_encoder, decoder"),
    ("wrapped.pt", lambda d, p: torch.save({f"module.{k}": v for k, v in d.unet.items()}, p), "'module.'"),
    ("lightning.ckpt", Demo.lightning, "gives the configuration"),
    ("ema_nested.pt", Demo.with_ema, "2 sets of weights ('ema.unet.', 'model.unet.'); 'ema.unet.' is read"),
    ("checkpoint-1000", Demo.accelerate, "and image_encoder, vae_encoder, decoder"),
    ("checkpoint-2000", Demo.with_ema_folder, "reads unet_ema/ (averaged weights), not unet/"),
    ("checkpoint-3000", Demo.accelerate_without_hooks, "and image_encoder, vae_encoder, decoder"),
]
REFUSED: list[tuple[str, Write, str]] = [
    (
        "plain_state_dict.pt",
        lambda d, p: torch.save(d.tensors, p),
        "weights without a configuration (image_enc",
    ),
    ("unet_only.pth", lambda d, p: torch.save(d.unet, p), "unet_only.pth: a UNet alone"),
    ("checkpoint-1000", Demo.accelerate, "a UNet alone; the folder lacks vae/config.json, image_encoder/"),
    ("fp64.pt", lambda d, p: d.pt(p, d.each(Tensor.double)), "1118 tensors; weights are float64:"),
    (
        "counter.pt",
        lambda d, p: d.pt(p, {**d.tensors, "unet.batches": torch.tensor(5)}),
        "unexpected  unet.batches",
    ),
    ("unmerged.pt", Demo.unmerged, "; adapters (LoRA) are not merged:"),
    ("empty.safetensors", lambda d, p: p.write_bytes(b""), "it is empty"),
    (
        "lfs.safetensors",
        lambda d, p: p.write_bytes(POINTER),
        "a Git LFS pointer, the content was never fetched",
    ),
    ("lfs.pt", lambda d, p: p.write_bytes(POINTER), "a Git LFS pointer, the content was never fetched"),
    ("page.safetensors", lambda d, p: p.write_bytes(PAGE), "it is a web page"),
    (
        "cut.safetensors",
        lambda d, p: p.write_bytes(DEMO.read_bytes()[:9_000_000]),
        "not a whole .safetensors file",
    ),
    (
        "whole_module.pt",
        lambda d, p: torch.save(nn.Linear(2, 2), p),
        "it holds a torch.nn.modules.linear.Linear",
    ),
    ("zipped.pt", Demo.zipped, "a zip archive that holds demo.safetensors"),
]


def same_as_the_demo(path: Path, demo: Demo, base: Path | None, expected_notice: str) -> None:
    notices: list[str] = []
    opened = open_checkpoint(path, base=base, notice=notices.append)
    opened.check_values()
    assert any(expected_notice in notice for notice in notices) if expected_notice else notices == []
    for component in COMPONENTS:
        for name, value in opened.load(component).state_dict().items():
            assert torch.equal(value, demo.tensors[f"{component}.{name}"]), name
            assert value.is_contiguous()


@pytest.mark.parametrize(("name", "write", "notice"), READ, ids=[row[0] for row in READ])
def test_container_of_our_format(demo: Demo, tmp_path: Path, name: str, write: Write, notice: str) -> None:
    write(demo, tmp_path / name)
    same_as_the_demo(tmp_path / name, demo, None, notice)


@pytest.mark.parametrize(("name", "write", "notice"), READ_ON_A_BASE, ids=[row[0] for row in READ_ON_A_BASE])
def test_weights_that_need_a_base(demo: Demo, tmp_path: Path, name: str, write: Write, notice: str) -> None:
    write(demo, tmp_path / name)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / name)
    assert "add --base" in str(caught.value.next_step)
    same_as_the_demo(tmp_path / name, demo, DEMO, notice)


@pytest.mark.parametrize(("name", "write", "message"), REFUSED, ids=[row[0] for row in REFUSED])
def test_container_that_is_refused(demo: Demo, tmp_path: Path, name: str, write: Write, message: str) -> None:
    write(demo, tmp_path / name)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / name)
    assert message in str(caught.value)
    assert caught.value.next_step


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_mixed_containers(demo: Demo, tmp_path: Path, dtype: torch.dtype) -> None:
    demo.pt(tmp_path / "m.pt", demo.each(lambda value: value.to(dtype) if value.ndim >= 2 else value))
    state = open_checkpoint(tmp_path / "m.pt").load("decoder").state_dict()
    for name, value in state.items():
        stored = demo.tensors[f"decoder.{name}"]
        assert torch.equal(value, stored.to(dtype).float() if value.ndim >= 2 else stored), name


def test_all_values_are_checked_before_a_component_is_loaded(
    demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    original = checkpoint_module._check_values
    monkeypatch.setattr(checkpoint_module, "_CHUNK", 1000)
    monkeypatch.setattr(
        checkpoint_module,
        "_check_values",
        lambda name, chunk, path: (sizes.append(chunk.numel()), original(name, chunk, path)),
    )
    open_checkpoint(DEMO).check_values()
    gates = sum(name.endswith(("gate", "importance")) for name in demo.tensors)
    assert max(sizes) == 1000
    assert sum(sizes) - sum(value.numel() for value in demo.tensors.values()) <= gates
    demo.overflow(tmp_path / "overflow.pt")
    with pytest.raises(
        CheckpointError, match=r"decoder\.conv_in\.weight holds NaN or infinite values as torch\.float16"
    ):
        open_checkpoint(tmp_path / "overflow.pt").check_values()


@pytest.mark.parametrize("name", ["large.safetensors", "large.pt"])
def test_large_finite_values_are_no_overflow(demo: Demo, tmp_path: Path, name: str) -> None:
    """Their sum is infinite in float32, which is only the fast check."""
    tensors = {
        **demo.tensors,
        "decoder.conv_in.weight": torch.full(demo.tensors["decoder.conv_in.weight"].shape, 3e38),
    }
    if name.endswith(".pt"):
        demo.pt(tmp_path / name, tensors)
    else:
        save_file(tensors, tmp_path / name, demo.metadata)
    open_checkpoint(tmp_path / name).check_values()


# ---- folders of Stable Video Diffusion ----


@pytest.fixture(scope="module")
def svd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_svd_folder(tmp_path_factory.mktemp("svd") / "tiny-svd")


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("svd") / "tiny-svd"
    return write_svd_folder(folder, dtype=torch.float16, variant="fp16")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_svd_folder(tmp_path_factory.mktemp("svd") / "tiny-svd", shard="300KB")


class Folders:
    """Copies of the three folders to change."""

    def __init__(self, folders: dict[str, Path], to: Path) -> None:
        self._folders, self._to = folders, to

    def copy(self, which: str = "svd") -> Path:
        return Path(shutil.copytree(self._folders[which], self._to / "tiny-svd"))

    def config(self, part: str, change: Callable[[dict[str, Any]], object]) -> Path:
        folder = self.copy()
        path = folder / part / ("preprocessor_config.json" if part == "feature_extractor" else "config.json")
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))
        return folder

    def variant(self, name: str, dtype: torch.dtype) -> Path:
        folder = self.copy()
        for part, stem in PARTS.items():
            tensors = load_file(folder / part / f"{stem}.safetensors")
            save_file(
                {k: v.to(dtype) for k, v in tensors.items()}, folder / part / f"{stem}.{name}.safetensors"
            )
            (folder / part / f"{stem}.safetensors").unlink()
        return folder

    def beside(self, which: str, file: str) -> Path:
        """Add a file of other weights beside those of the UNet."""
        folder = self.copy(which)
        tensors = load_file(self._folders["svd"] / "unet" / WHOLE)
        save_file({name: value + 1 for name, value in tensors.items()}, folder / "unet" / file)
        return folder

    def bin(self) -> Path:
        folder = self.copy()
        path = folder / "unet" / WHOLE
        torch.save(load_file(path), path.with_suffix(".bin"))
        path.unlink()
        return folder

    def renamed(self) -> Path:
        folder = self.copy("shards")
        for shard in (folder / "unet").glob("*-of-*.safetensors"):
            shard.rename(shard.with_name(shard.name.replace("diffusion_pytorch_model", "model")))
        return folder

    def without_shard(self) -> Path:
        folder = self.copy("shards")
        next((folder / "unet").glob("*-00003-of-*")).unlink()
        return folder

    def pointer(self) -> Path:
        folder = self.copy()
        (folder / "unet" / WHOLE).write_bytes(POINTER)
        return folder

    def mask(self) -> Path:
        folder = self.config("unet", lambda c: c.update(in_channels=9))
        path = folder / "unet" / WHOLE
        tensors = load_file(path)
        weight = tensors["conv_in.weight"]
        save_file({**tensors, "conv_in.weight": torch.cat([weight, weight[:, :1]], 1)}, path)
        return folder

    def bom(self) -> Path:
        folder = self.copy()
        config = folder / "unet" / "config.json"
        config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())
        return folder

    def position_ids(self) -> Path:
        folder = self.copy()
        path = folder / "image_encoder" / "model.safetensors"
        ids = {"vision_model.embeddings.position_ids": torch.arange(5)[None]}
        save_file(load_file(path) | ids, path)
        return folder

    def cache(self, *, gone: bool = False) -> Path:
        """The cache of the Hub: a snapshot of links into blobs."""
        root, commit = self._to / "models--someone--tiny-svd", "9c1a" * 10
        for folder in (root / "blobs", root / "refs"):
            folder.mkdir(parents=True)
        (root / "refs" / "main").write_text(commit)
        for number, file in enumerate(sorted(f for f in self._folders["svd"].rglob("*") if f.is_file())):
            blob = root / "blobs" / f"{number:064x}"
            link = root / "snapshots" / commit / file.relative_to(self._folders["svd"])
            link.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, blob)
            link.symlink_to(os.path.relpath(blob, link.parent))
            if gone and blob.stat().st_size > 100_000:
                blob.unlink()
        return root

    def picture_model(self) -> Path:
        folder = self._to / "sd15"
        folder.mkdir()
        (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
        (folder / "unet").mkdir()
        (folder / "unet" / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
        return folder

    def without(self, part: str) -> Path:
        folder = self.copy()
        shutil.rmtree(folder / part)
        return folder


@pytest.fixture
def folders(svd: Path, half: Path, shards: Path, tmp_path: Path) -> Folders:
    return Folders({"svd": svd, "half": half, "shards": shards}, tmp_path)


Make = Callable[[Folders], Path]
# name, folder, frames, dtype that the weights were rounded to, what the notices say
FOLDERS: list[tuple[str, Make, int, torch.dtype, list[str]]] = [
    ("whole", lambda f: f.copy(), 14, torch.float32, []),
    ("shards", lambda f: f.copy("shards"), 14, torch.float32, []),
    ("half", lambda f: f.copy("half"), 14, torch.float16, ["model.fp16.safetensors, the only one there"] * 3),
    ("bf16", lambda f: f.variant("bf16", torch.bfloat16), 14, torch.bfloat16, ["model.bf16.saf"] * 3),
    (
        "non_ema",
        lambda f: f.variant("non_ema", torch.float32),
        14,
        torch.float32,
        ["non_ema.safetensors"] * 3,
    ),
    ("bin", Folders.bin, 14, torch.float32, []),
    ("bom", Folders.bom, 14, torch.float32, []),
    ("old_position_ids", Folders.position_ids, 14, torch.float32, []),
    (
        "stale_whole_beside_shards",
        lambda f: f.beside("shards", WHOLE),
        14,
        torch.float32,
        [f"unet: reads {WHOLE}.index.json, as diffusers does, not {WHOLE}"],
    ),
    (
        "fp16_beside_fp32",
        lambda f: f.beside("svd", "diffusion_pytorch_model.fp16.safetensors"),
        14,
        torch.float32,
        [f"unet: reads {WHOLE}, as diffusers does, not diffusion_pytorch_model.fp16.safetensors"],
    ),
    ("cache", lambda f: f.cache(), 14, torch.float32, []),
    ("cache_snapshot", lambda f: next((f.cache() / "snapshots").iterdir()), 14, torch.float32, []),
    (
        "extra_keys",
        lambda f: f.config("unet", lambda c: c.update(new_option=True, quantization_config=None, _x=1)),
        14,
        torch.float32,
        ["unet/config.json: ignores new_option, quantization_config"],
    ),
    (
        "missing_num_frames",
        lambda f: f.config("unet", lambda c: c.pop("num_frames")),
        25,
        torch.float32,
        ["unet/config.json: no num_frames, so 25, diffusers' default"],
    ),
    (
        "missing_scaling",
        lambda f: f.config("vae", lambda c: c.pop("scaling_factor")),
        14,
        torch.float32,
        ["vae/config.json: no scaling_factor, so 0.18215"],
    ),
    ("scaling_int", lambda f: f.config("vae", lambda c: c.update(scaling_factor=1)), 14, torch.float32, []),
    (
        "lists",
        lambda f: f.config("unet", lambda c: c.update(cross_attention_dim=[16, 16], layers_per_block=[1, 1])),
        14,
        torch.float32,
        [],
    ),
    ("frames_1", lambda f: f.config("unet", lambda c: c.update(num_frames=1)), 1, torch.float32, []),
    ("frames_16", lambda f: f.config("unet", lambda c: c.update(num_frames=16)), 16, torch.float32, []),
]


@pytest.mark.parametrize(
    ("name", "make", "frames", "dtype", "notices"), FOLDERS, ids=[row[0] for row in FOLDERS]
)
def test_folder_of_svd(
    folders: Folders, svd: Path, name: str, make: Make, frames: int, dtype: torch.dtype, notices: list[str]
) -> None:
    given: list[str] = []
    opened = open_checkpoint(make(folders), notice=given.append)
    opened.check_values()
    assert len(given) == len(notices)
    assert all(wanted in notice for wanted, notice in zip(notices, given, strict=True))
    assert (opened.spec.name, opened.spec.frames) == ("tiny-svd", frames)
    for part, stem in PARTS.items():
        for key, value in load_file(svd / part / f"{stem}.safetensors").items():
            component = {"vae": "decoder" if key.startswith("decoder.") else "vae_encoder"}.get(part, part)
            loaded = opened.load(component).state_dict()  # type: ignore[arg-type]
            assert torch.equal(
                loaded[key.removeprefix("decoder.") if part == "vae" else key], value.to(dtype).float()
            )
            break  # the first tensor of each tells the set of weights


@pytest.mark.parametrize(
    "make", [lambda f: f.beside("shards", WHOLE), lambda f: f.copy("shards"), Folders.bin]
)
def test_the_unet_is_the_one_that_diffusers_loads(folders: Folders, make: Make) -> None:
    folder = make(folders)
    theirs = UNetSpatioTemporalConditionModel.from_pretrained(folder / "unet").state_dict()
    ours = open_checkpoint(folder).load("unet").state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


REFUSED_FOLDERS: list[tuple[str, Make, str]] = [
    ("in_channels_9", Folders.mask, "its UNet takes 9 channels and returns 4; the pipeline gives 8"),
    ("pointer", Folders.pointer, "a Git LFS pointer, the content was never fetched"),
    ("shard_missing", Folders.without_shard, "-00003-of-"),
    ("shard_renamed", Folders.renamed, "rename the shards as the index says; one is model-00001-of-"),
    ("cache_gone", lambda f: f.cache(gone=True), "a link to ../../../blobs/"),
    (
        "no_vae",
        lambda f: f.without("vae"),
        "only the UNet of this folder can be read; the folder lacks vae/config",
    ),
    ("no_unet", lambda f: f.without("unet"), "lacks unet/config.json"),
    (
        "no_extractor",
        lambda f: f.without("feature_extractor"),
        "lacks feature_extractor/preprocessor_config.json",
    ),
    (
        "picture_model",
        Folders.picture_model,
        "a StableDiffusionPipeline, not a folder of Stable Video Diffusion",
    ),
    (
        "other_mean",
        lambda f: f.config("feature_extractor", lambda c: c.update(image_mean=[0.5] * 3)),
        "image_mean is [0.5, 0.5, 0.5]",
    ),
    (
        "plain_vae",
        lambda f: f.config("vae", lambda c: c.update(_class_name="AutoencoderKL")),
        "only 'AutoencoderKLTemporalDecoder' is supported",
    ),
    (
        "missing_layers",
        lambda f: f.config("unet", lambda c: c.pop("layers_per_block")),
        "missing     unet.down_blocks.0.attentions.1.norm.weight",
    ),
    (
        "missing_time_embed",
        lambda f: f.config("unet", lambda c: c.pop("addition_time_embed_dim")),
        "all names fit, so this is the same network in other widths",
    ),
    ("folder_of_folders", lambda f: f.cache().parent, "give what is in it: models--someone--tiny-svd"),
]


@pytest.mark.parametrize(
    ("name", "make", "message"), REFUSED_FOLDERS, ids=[row[0] for row in REFUSED_FOLDERS]
)
def test_folder_that_is_refused(folders: Folders, name: str, make: Make, message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(make(folders))
    assert message in str(caught.value)
    assert caught.value.next_step


@pytest.mark.parametrize("inner", ["", "unet"])
def test_a_unet_folder_on_a_base(svd: Path, tmp_path: Path, inner: str) -> None:
    other = write_svd_folder(tmp_path / "other", seed=1)
    for part in ("vae", "image_encoder", "feature_extractor"):
        shutil.rmtree(other / part)
    opened = open_checkpoint(other / inner, base=svd)
    trained = load_file(other / "unet" / WHOLE)["conv_in.weight"]
    assert torch.equal(opened.load("unet").state_dict()["conv_in.weight"], trained)
    vae = load_file(svd / "vae" / WHOLE)
    assert torch.equal(opened.load("decoder").state_dict()["conv_in.weight"], vae["decoder.conv_in.weight"])
    assert opened.spec == open_checkpoint(svd).spec
    digest = opened.sha256
    save_file({name: value + 1 for name, value in vae.items()}, other / "vae.safetensors")
    assert open_checkpoint(other / inner, base=svd).sha256 == digest


# ---- names that disagree ----


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (
            lambda t: {k.replace("decoder.", "decoder.vae."): v for k, v in t.items()},
            "; every name has the prefix 'decoder.vae.' instead of 'decoder.':",
        ),
        (lambda t: {k: v for k, v in t.items() if not k.startswith("decoder.")}, "; there is no decoder:"),
        (
            lambda t: {f"net.{k}": v for k, v in t.items()},
            "; every name has the prefix 'net.' instead of '':",
        ),
        (
            lambda t: {k: v for k, v in t.items() if not k.endswith((".gate", ".importance"))},
            "; only the configuration has gates of temporal blocks:",
        ),
        (lambda t: {k: v.double() for k, v in t.items()}, "; weights are float64:"),
    ],
)
def test_one_cause_is_named(
    demo: Demo, tmp_path: Path, change: Callable[[Tensors], Tensors], cause: str
) -> None:
    demo.pt(tmp_path / "m.pt", change(demo.tensors))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / "m.pt")
    assert cause in str(caught.value).splitlines()[0]


def test_missing_and_unexpected_names_alternate(demo: Demo, tmp_path: Path) -> None:
    demo.pt(
        tmp_path / "m.pt", {name.replace("unet.conv", "unet.konv"): v for name, v in demo.tensors.items()}
    )
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / "m.pt")
    _, first, second, third, *_ = str(caught.value).splitlines()
    assert first.startswith("  missing     unet.conv_")
    assert second.startswith("  unexpected  unet.konv_")
    assert third.startswith("  missing     unet.conv_")


def test_two_names_that_become_one(demo: Demo, tmp_path: Path) -> None:
    twice = {**demo.tensors, "unet.module.conv_in.bias": demo.tensors["unet.conv_in.bias"]}
    demo.pt(tmp_path / "m.pt", twice)
    with pytest.raises(CheckpointError, match=r"unet\.conv_in\.bias is there twice"):
        open_checkpoint(tmp_path / "m.pt")
