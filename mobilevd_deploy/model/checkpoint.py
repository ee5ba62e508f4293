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
import math
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mobilevd_deploy.base.files import file_sha256, written_aside
from mobilevd_deploy.config.spec import ComponentName, ModelSpec
from mobilevd_deploy.errors import CheckpointError, SpecError
from mobilevd_deploy.model.components import build_component
from mobilevd_deploy.model.interface import COMPONENTS
from mobilevd_deploy.model.svd_folder import open_diffusers_folder
from mobilevd_deploy.model.weight_files import (
    DTYPES,
    FORMAT_KEY,
    FORMAT_VERSION,
    SPEC_KEY,
    Header,
    WeightSource,
    looks_like,
    open_safetensors,
    open_torch,
    write_safetensors,
    write_torch,
)

_LISTED = 10  # problems that a message spells out
_CHUNK = 1 << 20  # elements looked at in one go: bounds the memory of a check


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint whose names, shapes and dtypes fit `spec`; made by `open_checkpoint`.

    `spec` tells the truth about pruning: its `kept_temporal_blocks` are those whose stored gate is 1.
    """

    path: Path
    spec: ModelSpec
    _source: WeightSource = field(repr=False, compare=False)

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
            spec, source = open_diffusers_folder(path)
        elif path.suffix == ".safetensors":
            spec, source = open_safetensors(path)
        elif path.suffix in (".pt", ".pth"):
            spec, source = open_torch(path)
        else:
            raise CheckpointError(
                f"{path}: not a checkpoint by its ending{looks_like(path)}",
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
    if dtype not in DTYPES:
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

    needed = dtype.itemsize * sum(math.prod(shape) for shape in shapes.values())
    try:
        with written_aside(path, needed) as aside:
            if path.suffix == ".safetensors":
                metadata = {FORMAT_KEY: str(FORMAT_VERSION), SPEC_KEY: json.dumps(spec.to_dict())}
                write_safetensors(aside, metadata, shapes, dtype, stored)
            else:
                write_torch(aside, spec, shapes, dtype, stored)
    except OSError as error:
        raise CheckpointError(f"{path}: can not be written: {error.strerror or error}") from error


def write_weights(path: Path, module: nn.Module) -> None:
    """Write the float32 weights of any module as .safetensors, one tensor after the other."""
    state = module.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    with written_aside(path) as aside:
        write_safetensors(aside, {}, shapes, torch.float32, lambda name: state[name].contiguous())


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
        f"dtype       {name} is {header.dtype}, allowed are {', '.join(DTYPES.values())}"
        for name, header in found.items()
        if name in expected and header.dtype not in DTYPES.values()
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


# ---- .safetensors ----


# ---- .pt ----


# ---- a diffusers folder ----


# ---- files ----


def _sha256(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise CheckpointError(f"{path}: can not be read any more: {error.strerror or error}") from error
