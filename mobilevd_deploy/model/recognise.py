"""One recogniser for every form of checkpoint. It judges by content: a name or an ending decides nothing.

form                          told by                                           read in
our own file                  mobilevd_format, or {"format", "spec", "tensors"}  own_format.py
folder in diffusers' layout   unet/config.json, vae/config.json, ...             svd_folder.py
sgm single file               model.diffusion_model.input_blocks.0.0.weight      sgm.py
a UNet alone                  time_embedding.linear_1.weight                     single_unet.py
our four networks without     the same below unet., beside decoder. and others   here
configuration
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobilevd_deploy.config.spec import ModelSpec
from mobilevd_deploy.config.strict import from_dict
from mobilevd_deploy.errors import CheckpointError, SpecError
from mobilevd_deploy.model import sgm
from mobilevd_deploy.model.hub_cache import model_name
from mobilevd_deploy.model.interface import COMPONENTS
from mobilevd_deploy.model.lora import is_adapter
from mobilevd_deploy.model.own_format import FORMAT_KEY, is_ours, read_ours
from mobilevd_deploy.model.prefixes import below, choose_root, roots, without_wrappers
from mobilevd_deploy.model.single_unet import open_unet_folder
from mobilevd_deploy.model.svd_folder import Config, missing_configs, open_svd_folder
from mobilevd_deploy.model.weight_files import Entry, Stored, Weights, read_stored

_UNET_ANCHOR = "time_embedding.linear_1.weight"
Notice = Callable[[str], None]


@dataclass(frozen=True)
class Form:
    """What a path holds. `spec` is None where a base must give the configuration; `what` then says why."""

    what: str
    weights: Weights
    spec: ModelSpec | None = None


def recognise(path: Path, notice: Notice) -> Form:
    """Find out what a file or folder holds, from headers alone.

    Raises CheckpointError: nothing that can be read. OSError.
    """
    return _recognise_folder(path, notice) if path.is_dir() else _recognise_tensors(read_stored(path), notice)


def _recognise_folder(path: Path, notice: Notice) -> Form:
    lacks = missing_configs(path)
    if not lacks:
        spec, weights = open_svd_folder(path, model_name(path), notice)
        return Form("a folder of Stable Video Diffusion", weights, spec)
    index = path / "model_index.json"
    if (
        index.is_file()
        and (kind := Config(index).values.get("_class_name")) != "StableVideoDiffusionPipeline"
    ):
        raise CheckpointError(
            f"{path}: a {kind}, not a folder of Stable Video Diffusion",
            next_step="give a model that makes video from a picture with StableVideoDiffusionPipeline",
        )
    chosen = open_unet_folder(path, notice)
    if chosen is None:
        inside = [file.name for file in _checkpoints_inside(path)]
        raise CheckpointError(
            f"{path}: not a diffusers folder of Stable Video Diffusion, it lacks {', '.join(lacks)}",
            next_step=f"give what is in it: {', '.join(inside[:3])}"
            if inside
            else "give the folder that holds model_index.json, completely downloaded",
        )
    first, *_ = stored = [read_stored(file) for file in chosen.files]
    entries = {key: entry for part in stored for key, entry in part.entries.items()}
    form = _recognise_tensors(Stored(path, entries, first.content, first.is_safetensors), notice)
    weights = Weights(form.weights.entries, chosen.others)
    if form.spec is not None:
        return Form(form.what, weights, form.spec)
    only = form.what if len(lacks) == 3 else "only the UNet of this folder can be read"
    return Form(f"{only}; the folder lacks {', '.join(lacks)}", weights)


def _checkpoints_inside(path: Path) -> list[Path]:
    """List what a user may have meant: files of weights, repositories of a Hub cache, whole SVD folders."""
    endings = (".safetensors", ".ckpt", ".pt", ".pth")
    return sorted(
        file
        for file in path.glob("*")
        if file.suffix in endings or file.name.startswith("models--") or not missing_configs(file)
    )


def _recognise_tensors(stored: Stored, notice: Notice) -> Form:
    where = stored.path.name
    if is_ours(stored):
        spec, entries = read_ours(stored, notice)
        return Form("our format", Weights(without_wrappers(entries, where, notice)), spec)
    entries = without_wrappers(stored.entries, where, notice)
    if found := roots(entries, sgm.UNET_ANCHOR):
        root = choose_root(found, where, notice)
        return _sgm_form(entries, root, stored.path, notice)
    if found := roots(entries, _UNET_ANCHOR):
        root = choose_root(found, where, notice)
        return _unet_form(entries, root, stored.path, notice)
    if any(map(is_adapter, entries)):
        raise CheckpointError(
            f"{stored.path}: a LoRA, which changes the weights of another checkpoint",
            next_step=f"give that checkpoint, and --lora {stored.path}",
        )
    key = FORMAT_KEY if stored.is_safetensors else "format"
    names = ", ".join(list(entries)[:3]) or "none"
    raise CheckpointError(
        f"{stored.path}: not a checkpoint: it lacks the {'metadata ' * stored.is_safetensors}key {key!r} of "
        f"our format, and its {len(entries)} tensors ({names}) are not those of SVD's UNet",
        next_step="`--help` lists the forms that are read; models/README.md specifies ours",
    )


def _unet_form(entries: Mapping[str, Entry], root: str, path: Path, notice: Notice) -> Form:
    """Read a UNet in diffusers' names, and our other components where they lie beside it."""
    tree = root.removesuffix("unet.")
    others = [f"{tree}{part}." for part in COMPONENTS if part != "unet"]
    if root != tree and any(name.startswith(tuple(others)) for name in entries):
        ours = {name: entry for name, entry in below(entries, tree).items() if name.startswith(COMPONENTS)}
        parts = ", ".join(part for part in COMPONENTS if any(name.startswith(f"{part}.") for name in ours))
        return Form(f"weights without a configuration ({parts})", Weights(ours))
    unet = below(entries, root)
    if adapters := [name for name in unet if is_adapter(name)]:
        raise CheckpointError(
            f"{path}: a UNet with {len(adapters)} tensors of adapters (LoRA) that are not merged, such as "
            f"{adapters[0]}",
            next_step="merge them before saving (peft: merge_and_unload())",
        )
    return Form("a UNet alone", Weights({f"unet.{name}": entry for name, entry in unet.items()}))


def _sgm_form(entries: Mapping[str, Entry], root: str, path: Path, notice: Notice) -> Form:
    """Read a file in sgm's names: all four networks, or those that are there."""
    outer = root.removesuffix(sgm.UNET)
    unet, clip = below(entries, root), below(entries, outer + sgm.CLIP)
    vae = below(entries, outer + sgm.VAE)
    picture_vae = below(entries, outer + sgm.PICTURE_VAE) or vae
    if "post_quant_conv.weight" in vae:
        raise CheckpointError(
            f"{path}: its VAE decoder begins with post_quant_conv, which Stable Video Diffusion has not",
            next_step="give a checkpoint of Stable Video Diffusion (image to video)",
        )
    spec: dict[str, Any] = {"name": model_name(path), "unet": sgm.unet_spec(unet, str(path))}
    named = {f"unet.{name}": entry for name, entry in sgm.convert_unet(unet).items()}
    lacks = []
    if "proj" in clip:
        spec["image_encoder"] = sgm.clip_spec(clip)
        named |= {f"image_encoder.{name}": entry for name, entry in sgm.convert_clip(clip).items()}
    else:
        lacks.append("image encoder")
    if "encoder.conv_in.weight" in picture_vae:
        spec["vae_encoder"] = sgm.vae_encoder_spec(picture_vae)
        named |= {f"vae_encoder.{n}": entry for n, entry in sgm.convert_vae_encoder(picture_vae).items()}
    else:
        lacks.append("VAE encoder")
    if "decoder.conv_in.weight" in vae:
        spec["decoder"] = sgm.decoder_spec(vae)
        named |= {f"decoder.{name}": entry for name, entry in sgm.convert_decoder(vae).items()}
    else:
        lacks.append("decoder")
    if lacks:
        what = (
            "a UNet alone, in sgm's names" if len(lacks) == 3 else f"an sgm file without {', '.join(lacks)}"
        )
        return Form(what, Weights(named))
    if not sgm.has_time_layers(vae):
        notice(
            f"{path.name}: its decoder has no time layers: each frame is decoded alone, which flickers more"
        )
    # Nothing in the tensors tells; the files of SVD-XT carry it in their name.
    spec["frames"] = 25 if "xt" in path.stem.lower() else 14
    notice(
        f"{path.name}: {spec['frames']} frames, by its name: such a file does not record the number "
        "(svd: 14, svd_xt: 25)"
    )
    try:
        return Form("a single file of Stable Video Diffusion", Weights(named), from_dict(ModelSpec, spec))
    except SpecError as error:
        raise CheckpointError(f"{path}: {error.what}", next_step=error.next_step) from error
