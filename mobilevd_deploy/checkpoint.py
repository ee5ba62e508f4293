"""Checkpoints: read and written strictly, without running code and without holding a model twice.

    checkpoint = open_checkpoint("model.safetensors")   # headers only: every name, shape and dtype is checked
    unet = checkpoint.load("unet")                      # this component's weights, memory-mapped, all finite

Three forms are read, the first two are written; models/README.md specifies them:

    .safetensors    configuration in the metadata, tensors named <component>.<name>
    .pt             the same as a dictionary, read with weights_only=True
    a folder        Stable Video Diffusion in diffusers' layout: unet/, vae/, image_encoder/, ...

What a checkpoint must contain is what `build_component` builds from its configuration, on the meta device.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mobilevd_deploy.base.files import file_sha256, written_aside
from mobilevd_deploy.components import CLIP_MEAN, CLIP_STD, COMPONENTS, build_component
from mobilevd_deploy.config.spec import ComponentName, ModelSpec
from mobilevd_deploy.config.strict import from_dict
from mobilevd_deploy.errors import CheckpointError, SpecError

FORMAT_VERSION = 1
FORMAT_KEY = "mobilevd_format"
SPEC_KEY = "mobilevd_spec"

# Names as safetensors writes them.
_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_LISTED = 10  # problems that a message spells out
_CHUNK = 1 << 20  # elements looked at in one go: bounds the memory of a check


@dataclass(frozen=True)
class Header:
    """What a file says of a tensor without reading it: shape, and dtype in safetensors' spelling."""

    shape: tuple[int, ...]
    dtype: str


class _Source(Protocol):
    """Where tensors lie, under the names <component>.<name>."""

    @property
    def headers(self) -> Mapping[str, Header]:
        """Every tensor there is."""
        ...

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that was read."""
        ...

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield the named tensors, memory-mapped where the file can be."""
        ...


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint whose names, shapes and dtypes fit `spec`; made by `open_checkpoint`.

    `spec` tells the truth about pruning: its `kept_temporal_blocks` are those whose stored gate is 1.
    """

    path: Path
    spec: ModelSpec
    _source: _Source = field(repr=False, compare=False)

    def load(self, component: ComponentName, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Build one component with its weights, in eval mode on the CPU; the others stay on disk.

        Weights already of `dtype` are memory-mapped (private: writing to them leaves the file alone).

        Raises:
            CheckpointError: a value that is NaN or infinite (as `dtype`).
        """
        with torch.device("meta"):
            module = build_component(self.spec, component)
        prefix = f"{component}."
        names = [prefix + name for name in module.state_dict()]
        state = {}
        for name, tensor in self._read(names):
            state[name.removeprefix(prefix)] = converted = tensor.to(dtype)
            _check_values(name, converted, self.path)
        module.load_state_dict(state, assign=True)
        return module.eval()

    def tensor(self, name: str) -> Tensor | None:
        """Return one tensor as it is stored, memory-mapped where it can be; None if there is none."""
        if name not in self._source.headers:
            return None
        ((_, value),) = self._read([name])
        return value

    def importance(self) -> dict[str, float]:
        """Read the importance of each gated temporal block; empty for a network without gates."""
        return self._time_mixer_scalars("importance")

    def _time_mixer_scalars(self, name: str) -> dict[str, float]:
        suffix = f".time_mixer.{name}"
        names = [
            key for key in expected_shapes(self.spec) if key.startswith("unet.") and key.endswith(suffix)
        ]
        values = {}
        for key, tensor in self._read(names):
            _check_values(key, tensor, self.path)
            values[key.removeprefix("unet.").removesuffix(suffix)] = float(tensor)
        return values

    def _with_stored_gates(self) -> Checkpoint:
        gates = self._time_mixer_scalars("gate")
        kept = tuple(path for path, gate in gates.items() if gate) if 0.0 in gates.values() else None
        unet = dataclasses.replace(self.spec.unet, kept_temporal_blocks=kept)
        return dataclasses.replace(self, spec=dataclasses.replace(self.spec, unet=unet))

    @cached_property
    def parameters(self) -> dict[ComponentName, int]:
        """Count the elements of each component from the headers, gates not included."""
        counts: dict[ComponentName, int] = dict.fromkeys(COMPONENTS, 0)
        for name, header in self._source.headers.items():
            if not name.endswith(".gate"):
                counts[cast(ComponentName, name.split(".", 1)[0])] += torch.Size(header.shape).numel()
        return counts

    @cached_property
    def sha256(self) -> str:
        """Digest of the file; of a folder, over the names and digests of the files that are read, sorted."""
        if self._source.files == (self.path,):
            return _sha256(self.path)
        digest = hashlib.sha256()
        for file in sorted(self._source.files):
            digest.update(f"{file.relative_to(self.path).as_posix()}\0{_sha256(file)}\n".encode())
        return digest.hexdigest()

    def _read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        try:
            yield from self._source.read(names)
        except (OSError, SafetensorError, RuntimeError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                f"{self.path}: changed or became unreadable after it was opened: {error}"
            ) from error


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint in any of the three forms and check every name, shape and dtype.

    No weights are read yet but the gates, and a .pt in torch's old format, which can not be memory-mapped.

    Raises:
        CheckpointError: no such file, not a checkpoint, damaged, from a newer version, asking for code
            to be run, not what its own configuration describes, or with a gate that is neither 0 nor 1.
    """
    path = Path(path)
    try:
        if not path.exists():
            raise CheckpointError(f"{path}: no such file or folder")
        if path.is_dir():
            spec, source = _open_diffusers_folder(path)
        elif path.suffix == ".safetensors":
            spec, source = _open_safetensors(path)
        elif path.suffix in (".pt", ".pth"):
            spec, source = _open_torch(path)
        else:
            raise CheckpointError(
                f"{path}: not a checkpoint by its ending{_looks_like(path)}",
                next_step="give a .safetensors or .pt file, or a diffusers folder of Stable Video Diffusion",
            )
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    _check_headers(spec, source.headers, str(path))
    return Checkpoint(path, spec, source)._with_stored_gates()


def save_checkpoint(
    path: str | Path,
    spec: ModelSpec,
    states: Mapping[ComponentName, Mapping[str, Tensor]],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a .safetensors or .pt checkpoint; it is complete at `path` or not there at all.

    Args:
        path: ending .safetensors (streamed tensor by tensor) or .pt.
        spec: the configuration; `states` must be exactly what it builds.
        states: a state dict per component.
        dtype: float32, float16 or bfloat16, of every tensor in the file.

    Raises:
        CheckpointError: tensors that do not fit `spec`, values that are not finite, or a failed write.
    """
    tensors = {
        f"{component}.{name}": tensor for component, state in states.items() for name, tensor in state.items()
    }
    # The dtype is looked at below.
    _check_headers(spec, {name: Header(tuple(t.shape), "F32") for name, t in tensors.items()}, str(path))
    write_checkpoint(path, spec, lambda name: tensors[name].detach(), dtype)


def write_checkpoint(
    path: str | Path, spec: ModelSpec, tensor: Callable[[str], Tensor], dtype: torch.dtype = torch.float32
) -> None:
    """Write a checkpoint whose tensors are made as they are written, so that a large one never exists whole.

    `tensor` is asked once for each <component>.<name>, in sorted order; a .pt is held whole all the same.
    Otherwise as `save_checkpoint`.
    """
    path = Path(path)
    if dtype not in _DTYPES:
        raise CheckpointError(f"{path}: weights are stored as float32, float16 or bfloat16, not {dtype}")
    if path.suffix not in (".safetensors", ".pt"):
        raise CheckpointError(f"{path}: checkpoints are written as .safetensors or .pt")
    shapes = dict(sorted(expected_shapes(spec).items()))

    def stored(name: str) -> Tensor:
        made = tensor(name).to("cpu", dtype).contiguous()
        if made.shape != shapes[name]:
            raise CheckpointError(
                f"{path}: {name} is {list(made.shape)}, the configuration wants {list(shapes[name])}"
            )
        _check_values(name, made, path)
        return made

    try:
        with written_aside(path) as aside:
            if path.suffix == ".safetensors":
                metadata = {FORMAT_KEY: str(FORMAT_VERSION), SPEC_KEY: json.dumps(spec.to_dict())}
                _write_safetensors(aside, metadata, shapes, dtype, stored)
            else:
                _write_torch(aside, spec, shapes, dtype, stored)
    except OSError as error:
        raise CheckpointError(f"{path}: can not be written: {error.strerror or error}") from error


def write_weights(path: Path, module: nn.Module) -> None:
    """Write the float32 weights of any module as .safetensors, one tensor after the other."""
    state = module.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    with written_aside(path) as aside:
        _write_safetensors(aside, {}, shapes, torch.float32, lambda name: state[name].contiguous())


def read_weights(path: Path, module: nn.Module) -> None:
    """Give a module, which may be on the meta device, what `write_weights` wrote, memory-mapped (private)."""
    with safe_open(path, framework="pt") as opened:
        module.load_state_dict({name: opened.get_tensor(name) for name in opened.keys()}, assign=True)  # noqa: SIM118


# ---- what every form must satisfy ----


@lru_cache(maxsize=4)
def expected_shapes(spec: ModelSpec) -> Mapping[str, tuple[int, ...]]:
    """Return the shape of every tensor that a checkpoint of this configuration holds, by name."""
    with torch.device("meta"):
        return {
            f"{component}.{name}": tuple(tensor.shape)
            for component in COMPONENTS
            for name, tensor in build_component(spec, component).state_dict().items()
        }


def _check_headers(spec: ModelSpec, found: Mapping[str, Header], where: str) -> None:
    try:
        expected = expected_shapes(spec)
    except SpecError as error:
        raise CheckpointError(f"{where}: {error.what}", next_step=error.next_step) from error
    problems = [f"missing     {name} {list(shape)}" for name, shape in expected.items() if name not in found]
    problems += [
        f"unexpected  {name} {list(header.shape)}" for name, header in found.items() if name not in expected
    ]
    problems += [
        f"shape       {name} is {list(found[name].shape)}, the configuration wants {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    problems += [
        f"dtype       {name} is {header.dtype}, allowed are {', '.join(_DTYPES.values())}"
        for name, header in found.items()
        if name in expected and header.dtype not in _DTYPES.values()
    ]
    if problems:
        shown = "\n  ".join(problems[:_LISTED])
        rest = f"\n  and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise CheckpointError(
            f"{where}: weights and configuration disagree in {len(problems)} tensors:\n  {shown}{rest}",
            next_step="was that the configuration of the training run? models/README.md lists the names",
        )


def _check_values(name: str, tensor: Tensor, path: Path) -> None:
    for chunk in torch.split(tensor.reshape(-1), _CHUNK):
        if not bool(torch.isfinite(chunk).all()):
            raise CheckpointError(
                f"{path}: {name} holds NaN or infinite values as {tensor.dtype}",
                next_step="save the last good training state; if only half precision overflows, use float32",
            )
    if name.endswith(".gate") and float(tensor) not in (0.0, 1.0):
        raise CheckpointError(
            f"{path}: {name} is {float(tensor):g}; a trained gate is exactly 0 or 1",
            next_step="before saving, set the gates of the most important blocks to 1 and the others to 0",
        )


def _parse_spec(values: object, path: Path) -> ModelSpec:
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: its configuration is not a table but {type(values).__name__}")
    try:
        return from_dict(ModelSpec, values)
    except SpecError as error:
        raise CheckpointError(f"{path}: its configuration does not fit: {error.what}") from error


def _check_version(version: object, path: Path) -> None:
    if isinstance(version, str) and version.isdecimal():
        version = int(version)
    if not isinstance(version, int) or version < 1:
        raise CheckpointError(f"{path}: format version {version!r} is not a positive number")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: written in format {version}, this version reads up to {FORMAT_VERSION}",
            next_step="update mobilevd-deploy",
        )


def _not_ours(path: Path, lacks: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: not a checkpoint of ours, it lacks {lacks}",
        next_step="models/README.md shows how a training codebase writes one",
    )


# ---- .safetensors ----


class _SafetensorsFiles:
    """Tensors of one or several .safetensors files, renamed."""

    def __init__(self, names: Mapping[str, tuple[Path, str]], others: Iterable[Path] = ()) -> None:
        self._names = names
        self.files = tuple(sorted({file for file, _ in names.values()} | set(others)))
        self.headers = {}
        for file in {file for file, _ in names.values()}:
            with safe_open(file, framework="pt") as opened:
                for name, (holder, key) in names.items():
                    if holder == file:
                        view = opened.get_slice(key)
                        self.headers[name] = Header(tuple(view.get_shape()), view.get_dtype())

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        for file, wanted in _by_file(names, self._names).items():
            with safe_open(file, framework="pt") as opened:
                for name in wanted:
                    yield name, opened.get_tensor(self._names[name][1])


def _by_file(names: Iterable[str], where: Mapping[str, tuple[Path, str]]) -> dict[Path, list[str]]:
    grouped: dict[Path, list[str]] = {}
    for name in names:
        grouped.setdefault(where[name][0], []).append(name)
    return grouped


def _safetensors_keys(path: Path) -> tuple[list[str], dict[str, str]]:
    """Return tensor names and metadata; a file that is damaged or something else is a CheckpointError."""
    try:
        with safe_open(path, framework="pt") as opened:
            return list(opened.keys()), opened.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(
            f"{path}: not a whole .safetensors file{_looks_like(path)} ({error})",
            next_step="copy or download it again and compare sizes",
        ) from error


def _open_safetensors(path: Path) -> tuple[ModelSpec, _Source]:
    keys, metadata = _safetensors_keys(path)
    for key in (FORMAT_KEY, SPEC_KEY):
        if key not in metadata:
            raise _not_ours(path, f"the metadata key {key!r}")
    _check_version(metadata[FORMAT_KEY], path)
    spec = _parse_spec(_read_json(metadata[SPEC_KEY], f"{path}: {SPEC_KEY}"), path)
    return spec, _SafetensorsFiles({key: (path, key) for key in keys})


def _write_safetensors(
    path: Path,
    metadata: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    stored: Callable[[str], Tensor],
) -> None:
    # By hand because safetensors' own writer wants every tensor converted beforehand: the model twice.
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name in shapes:
            file.write(stored(name).reshape(-1).view(torch.uint8).numpy().data)


# ---- .pt ----


class _TorchFile:
    """Tensors of a torch.save file."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        self.files = (path,)
        self.headers = {
            name: Header(tuple(t.shape), _DTYPES.get(t.dtype, str(t.dtype).removeprefix("torch.")))
            for name, t in tensors.items()
        }

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        # Mapped anew, so that writing to a loaded component never shows in the next load.
        tensors = _torch_load(self.files[0])["tensors"]
        for name in names:
            yield name, tensors[name].detach()


def _torch_load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def _open_torch(path: Path) -> tuple[ModelSpec, _Source]:
    with path.open("rb") as file:
        start = file.read(4)
    try:
        content = _torch_load(path)
    except pickle.UnpicklingError as error:
        if zipfile.is_zipfile(path) or start[:1] == b"\x80":
            raise CheckpointError(
                f"{path}: refused: this pickle is damaged, or wants code to be run",
                next_step="whoever made it can load it and save plain tensors, as models/README.md shows",
            ) from error
        raise CheckpointError(f"{path}: not a .pt file{_looks_like(path)}") from error
    except Exception as error:  # a damaged pickle fails anywhere inside torch
        raise CheckpointError(
            f"{path}: not a whole .pt file{_looks_like(path)}", next_step="copy it again and compare sizes"
        ) from error
    if not isinstance(content, dict):
        raise _not_ours(path, "a dictionary with 'format', 'spec' and 'tensors'")
    for key in ("format", "spec", "tensors"):
        if key not in content:
            raise _not_ours(path, f"the key {key!r}")
    if unknown := sorted(map(str, set(content) - {"format", "spec", "tensors"})):
        raise CheckpointError(f"{path}: unknown key {unknown[0]!r} beside 'format', 'spec' and 'tensors'")
    _check_version(content["format"], path)
    tensors = content["tensors"]
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(t, Tensor) and t.layout == torch.strided and not t.is_quantized
        for name, t in tensors.items()
    ):
        raise CheckpointError(f"{path}: 'tensors' is not a dictionary of names and plain dense tensors")
    return _parse_spec(content["spec"], path), _TorchFile(path, tensors)


def _write_torch(
    path: Path,
    spec: ModelSpec,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    stored: Callable[[str], Tensor],
) -> None:
    def alone(tensor: Tensor) -> Tensor:
        # torch.save writes whole storages, so a view would bring along what it is cut from.
        return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()

    values = json.loads(json.dumps(spec.to_dict()))  # lists instead of tuples, as in the other form
    tensors = {name: alone(stored(name)) for name in shapes}
    torch.save({"format": FORMAT_VERSION, "spec": values, "tensors": tensors}, path)


# ---- a diffusers folder ----


def _open_diffusers_folder(path: Path) -> tuple[ModelSpec, _Source]:
    configs = {
        "unet": path / "unet" / "config.json",
        "vae": path / "vae" / "config.json",
        "image_encoder": path / "image_encoder" / "config.json",
        "feature_extractor": path / "feature_extractor" / "preprocessor_config.json",
    }
    if missing := [str(file.relative_to(path)) for file in configs.values() if not file.is_file()]:
        raise CheckpointError(
            f"{path}: not a diffusers folder of Stable Video Diffusion, it lacks {', '.join(missing)}",
            next_step="give the folder that holds model_index.json, completely downloaded",
        )
    config = {part: _Config(file) for part, file in configs.items()}
    spec = _svd_spec(path.resolve().name, config)
    names: dict[str, tuple[Path, str]] = {}
    indices: list[Path] = []
    for part, stem in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("image_encoder", "model"),
    ):
        files, index = _weight_files(path / part, stem)
        indices += index
        for file in files:
            for key in _safetensors_keys(file)[0]:
                if name := _component_name(part, key):
                    if name in names:
                        raise CheckpointError(f"{file}: {key} is also in {names[name][0].name}")
                    names[name] = (file, key)
    return spec, _SafetensorsFiles(names, [*configs.values(), *indices])


def _component_name(part: str, key: str) -> str | None:
    if part == "unet":
        return f"unet.{key}"
    if part == "vae":
        return (
            f"decoder.{key.removeprefix('decoder.')}" if key.startswith("decoder.") else f"vae_encoder.{key}"
        )
    # 0..n-1, which transformers stored up to 4.30 and no longer reads.
    return None if key == "vision_model.embeddings.position_ids" else f"image_encoder.{key}"


def _weight_files(folder: Path, stem: str) -> tuple[list[Path], list[Path]]:
    """Return the weight files of a part and the index that lists them, full precision first."""
    for variant in ("", ".fp16"):
        whole = folder / f"{stem}{variant}.safetensors"
        if whole.is_file():
            return [whole], []
        for index in (
            folder / f"{stem}.safetensors.index{variant}.json",
            folder / f"{stem}{variant}.safetensors.index.json",
        ):
            if not index.is_file():
                continue
            shards = _Config(index).get("weight_map", dict).values()
            files = [folder / str(shard) for shard in sorted(set(shards))]
            for file in files:
                if file.parent != folder or not file.is_file():
                    raise CheckpointError(f"{index}: names {file.name!r}, which is not in this folder")
            return files, [index]
    hint = "only .bin pickles are there; " if list(folder.glob("*.bin")) else ""
    raise CheckpointError(
        f"{folder}: no {stem}.safetensors", next_step=f"{hint}get the .safetensors files of this model"
    )


class _Config:
    """A part's JSON configuration, whose values are asked for with a type and errors name the key."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            values = _read_json(path.read_text(encoding="utf-8"), str(path))
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path}: not JSON{_looks_like(path)}") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{path}: not a table but {type(values).__name__}")
        self.values = values

    def get(self, key: str, kind: type | tuple[type, ...]) -> Any:
        if key not in self.values or not isinstance(self.values[key], kind):
            found = repr(self.values[key]) if key in self.values else "nothing"
            raise CheckpointError(f"{self.path}: {key}: found {found}")
        return self.values[key]

    def expect(self, key: str, *wanted: object) -> None:
        value = self.values.get(key, wanted[0])
        if value not in wanted:
            raise CheckpointError(
                f"{self.path}: {key} is {value!r}; only {wanted[0]!r} is supported",
                next_step="the folder must hold Stable Video Diffusion (image to video), finetuned or not",
            )

    def one(self, key: str) -> int:
        """An integer, or a list of equal ones."""
        value = self.get(key, (int, list))
        first = value[0] if isinstance(value, list) and value else value
        if isinstance(value, list) and any(item != first for item in value):
            raise CheckpointError(
                f"{self.path}: {key} differs between levels ({value}), which is not supported"
            )
        return cast(int, first)


def _svd_spec(name: str, config: Mapping[str, _Config]) -> ModelSpec:
    unet, vae, clip = config["unet"], config["vae"], config["image_encoder"]
    unet.expect("_class_name", "UNetSpatioTemporalConditionModel")
    unet.expect("transformer_layers_per_block", 1, [1] * len(unet.get("block_out_channels", list)))
    down, up = unet.get("down_block_types", list), unet.get("up_block_types", list)
    attention = [kind == "CrossAttnDownBlockSpatioTemporal" for kind in down]
    unet.expect("down_block_types", [f"{'CrossAttn' * has}DownBlockSpatioTemporal" for has in attention])
    if up != [f"{'CrossAttn' * has}UpBlockSpatioTemporal" for has in reversed(attention)]:
        raise CheckpointError(f"{unet.path}: up_block_types {up} do not mirror down_block_types")
    heads = unet.get("num_attention_heads", (int, list))
    vae.expect("_class_name", "AutoencoderKLTemporalDecoder")
    vae.expect("latent_channels", 4)
    clip.expect("model_type", "clip_vision_model")
    clip.expect("layer_norm_eps", 1e-5)
    for key, wanted in (("image_mean", CLIP_MEAN), ("image_std", CLIP_STD)):
        config["feature_extractor"].expect(key, list(wanted))
    vae_widths = {
        "block_out_channels": vae.get("block_out_channels", list),
        "layers_per_block": vae.one("layers_per_block"),
    }
    values = {
        "name": name,
        "frames": unet.get("num_frames", int),
        "unet": {
            "block_out_channels": unet.get("block_out_channels", list),
            "num_attention_heads": heads if isinstance(heads, list) else [heads] * len(down),
            "attention": attention,
            "layers_per_block": unet.one("layers_per_block"),
            "in_channels": unet.get("in_channels", int),
            "out_channels": unet.get("out_channels", int),
            "cross_attention_dim": unet.one("cross_attention_dim"),
            "addition_time_embed_dim": unet.get("addition_time_embed_dim", int),
        },
        "image_encoder": _clip_values(clip),
        "vae_encoder": {"kind": "svd", **vae_widths},
        "decoder": {"kind": "svd-temporal", "scaling_factor": vae.get("scaling_factor", float), **vae_widths},
    }
    try:
        return from_dict(ModelSpec, values)
    except SpecError as error:
        raise CheckpointError(f"{unet.path.parent.parent}: {error.what}") from error


# transformers leaves out of config.json what equals its defaults.
_CLIP_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "projection_dim": 512,
    "hidden_act": "quick_gelu",
}


def _clip_values(clip: _Config) -> dict[str, Any]:
    return {key: clip.values.get(key, default) for key, default in _CLIP_DEFAULTS.items()}


# ---- files ----


def _sha256(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise CheckpointError(f"{path}: can not be read any more: {error.strerror or error}") from error


def _read_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not valid JSON ({error})") from error


_SIGNATURES = {
    b"": "it is empty",
    b"\x89PNG": "it is a PNG picture",
    b"\xff\xd8\xff": "it is a JPEG picture",
    b"GIF8": "it is a GIF picture",
    b"PK\x03\x04": "it starts like a zip or .pt file",
    b"\x80": "it starts like a pickle",
    b"version https://git-lfs": "it is a Git LFS pointer, the content was never fetched",
    b"<": "it is a web page or XML",
}


def _looks_like(path: Path) -> str:
    """Return ": what the file really is" where its first bytes tell, else nothing."""
    with path.open("rb") as file:
        start = file.read(32)
    for signature, meaning in _SIGNATURES.items():
        if start.startswith(signature) and (signature or not start):
            return f": {meaning}"
    return ""
