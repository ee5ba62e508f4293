"""Checkpoints: read in every form that people have, without running code and without holding a model twice.

    checkpoint = open_checkpoint("svd_xt.safetensors")  # headers only: every name, shape and dtype is checked
    checkpoint.check_values()                           # every weight is finite
    unet = checkpoint.load("unet")                      # this component's weights, memory-mapped

recognise.py finds out what a path holds; each form has a file of its own. Only ours (own_format.py) is
written. The networks that `build_component` builds from the configuration, on the meta device, say which
tensors a checkpoint must have.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mobilevd_deploy.base.files import file_sha256, written_aside
from mobilevd_deploy.base.progress import Progress
from mobilevd_deploy.config.spec import ComponentName, ModelSpec
from mobilevd_deploy.errors import CheckpointError, SpecError
from mobilevd_deploy.model.components import build_component
from mobilevd_deploy.model.differences import require_same
from mobilevd_deploy.model.hub_cache import download, parse_hub_id, resolve_cache_folder
from mobilevd_deploy.model.interface import COMPONENTS
from mobilevd_deploy.model.lora import Lora, merge_loras
from mobilevd_deploy.model.own_format import (
    FORMAT_KEY,
    FORMAT_VERSION,
    SPEC_KEY,
    write_safetensors,
    write_torch,
)
from mobilevd_deploy.model.recognise import Form, recognise
from mobilevd_deploy.model.weight_files import DTYPES, Header, Weights, finite_chunks

_CHUNK = 1 << 20  # elements that a check reads at a time
_UNREADABLE = (OSError, SafetensorError, RuntimeError, pickle.UnpicklingError)
Notice = Callable[[str], None]


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint whose names, shapes and dtypes fit `spec`; made by `open_checkpoint`.

    `spec.unet.kept_temporal_blocks` lists the blocks whose stored gate is 1. `loras` are merged when weights
    are read.
    """

    path: Path
    spec: ModelSpec
    _source: Weights = field(repr=False, compare=False)
    loras: tuple[Lora, ...] = ()

    def check_values(self, progress: Progress | None = None) -> None:
        """Read every weight once, a few MB at a time, and look for NaN and infinite values.

        Raises CheckpointError: a value that is not finite, or a gate that is neither 0 nor 1.
        """
        progress = progress or Progress()
        names: dict[Path, dict[str, str]] = {}
        total = done = 0
        for name, entry in self._source.stored():
            names.setdefault(entry.file, {}).setdefault(entry.key, name)
            total += torch.Size(entry.header.shape).numel()
        try:
            for file, keys in names.items():
                for key, chunk in finite_chunks(file, keys, _CHUNK):
                    _check_values(keys[key], chunk, self.path)
                    done += chunk.numel()
                    progress.advance(done / max(total, done, 1))
        except _UNREADABLE as error:
            raise self._changed(error) from error

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
        """Digest of the file; of several, over their names and digests, sorted, and the scales of LoRAs."""
        if self._source.files == (self.path,):
            return _sha256(self.path)
        digest = hashlib.sha256()
        for file in self._source.files:
            name = file.relative_to(self.path) if file.is_relative_to(self.path) else Path(file.name)
            digest.update(f"{name.as_posix()}\0{_sha256(file)}\n".encode())
        for lora in self.loras:
            digest.update(f"{lora.path.name}\0{lora.scale!r}\n".encode())
        return digest.hexdigest()

    def _read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        try:
            yield from self._source.read(names)
        except _UNREADABLE as error:
            raise self._changed(error) from error

    def _changed(self, error: BaseException) -> CheckpointError:
        return CheckpointError(f"{self.path}: changed or became unreadable after it was opened: {error}")


def open_checkpoint(
    path: str | Path,
    *,
    base: str | Path | None = None,
    loras: Sequence[Lora] = (),
    notice: Notice | None = None,
) -> Checkpoint:
    """Open a checkpoint in any form that `recognise` knows, and check every name, shape and dtype.

    No weights are read but gates and a LoRA's alphas. A .pt in torch's old format is read whole, because it
    cannot be memory-mapped.

    Args:
        path: file or folder, or an id of the Hugging Face Hub: org/name, org/name@revision.
        base: checkpoint that gives the configuration, and the networks that `path` lacks.
        loras: adapters to merge into the UNet.
        notice: receives a sentence about each thing that was chosen, assumed or ignored.

    Raises:
        CheckpointError: no such file, nothing that can be read, damaged, from a newer version, asking for
            code to be run, not what its configuration describes, not what the pipeline can run, or with a
            gate that is neither 0 nor 1.
    """
    notice = notice or (lambda _: None)
    path = _located(path, notice)
    try:
        form = recognise(path, notice)
        spec, weights = form.spec, form.weights
        if base is not None:
            spec, weights = _completed(form, open_checkpoint(base, notice=notice), notice)
        elif spec is None:
            raise CheckpointError(
                f"{path}: {form.what}",
                next_step="add --base with a checkpoint of the same architecture that gives the rest: a "
                "folder or single file of Stable Video Diffusion, or a checkpoint in our format",
            )
        weights = merge_loras(weights, loras, notice)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    _require_pipeline(spec, path)
    _require_expected(spec, weights.headers, str(path))
    return Checkpoint(path, spec, weights, tuple(loras))._with_stored_gates()


def _located(path: str | Path, notice: Notice) -> Path:
    """Return a file or folder on this disk. Raises CheckpointError: none, and no id of the Hub."""
    text, path = str(path), Path(path)
    if path.is_dir():
        return resolve_cache_folder(path)
    if path.is_symlink() and not path.exists():
        raise CheckpointError(
            f"{path}: a link to {path.readlink()}, which is gone", next_step="copy it again"
        )
    if path.exists():
        return path
    if (wanted := parse_hub_id(text)) is not None:
        return download(wanted, notice)
    raise CheckpointError(f"{path}: no such file or folder")


def _completed(form: Form, base: Checkpoint, notice: Notice) -> tuple[ModelSpec, Weights]:
    """Take configuration and missing networks from `base`."""
    own = {name.split(".", 1)[0] for name in form.weights.entries}
    entries = base._source.entries
    rest = {name: entry for name, entry in entries.items() if name.split(".", 1)[0] not in own}
    given = [part for part in COMPONENTS if part not in own]
    notice(f"{base.path.name}: gives the configuration" + f" and {', '.join(given)}" * bool(given))
    return base.spec, Weights({**rest, **form.weights.entries}, (*form.weights.others, *base._source.others))


def _require_pipeline(spec: ModelSpec, path: Path) -> None:
    """Raise CheckpointError for a UNet that does not fit the VAE's 4 latents and our inputs."""
    given, made = spec.unet.in_channels, spec.unet.out_channels
    if (given, made) != (8, 4):
        raise CheckpointError(
            f"{path}: its UNet takes {given} channels and returns {made}; the pipeline gives 8 (4 of noise, "
            "4 of the picture's latents) and expects 4",
            next_step="finetunes with more inputs, such as a motion mask, are not supported",
        )


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
    headers = {name: Header(tuple(t.shape), "F32") for name, t in tensors.items()}  # dtype: checked below
    _require_expected(spec, headers, str(path))
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


def _require_expected(spec: ModelSpec, found: Mapping[str, Header], where: str) -> None:
    try:
        expected = expected_shapes(spec)
    except SpecError as error:
        raise CheckpointError(f"{where}: {error.what}", next_step=error.next_step) from error
    require_same(expected, found, where)


def _check_values(name: str, tensor: Tensor, path: Path) -> None:
    for chunk in torch.split(tensor.reshape(-1), _CHUNK):
        # A sum is several times faster than isfinite, and it is finite only if all are. It may overflow.
        if not bool(torch.isfinite(chunk.sum(dtype=torch.float32))) and not bool(torch.isfinite(chunk).all()):
            raise CheckpointError(
                f"{path}: {name} holds NaN or infinite values as {tensor.dtype}",
                next_step="save the last good training state; if only half precision overflows, use float32",
            )
    if name.endswith(".gate") and float(tensor) not in (0.0, 1.0):
        raise CheckpointError(
            f"{path}: {name} is {float(tensor):g}; a trained gate is exactly 0 or 1",
            next_step="before saving, set the gates of the most important blocks to 1 and the others to 0",
        )


def _sha256(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read any more: {error.strerror or error}") from error
