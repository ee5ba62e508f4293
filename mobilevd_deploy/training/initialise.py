"""Initial checkpoints in training form, written tensor by tensor: from SVD's weights, or random.

compress_svd       Stable Video Diffusion's weights with a preset's optimisations: CSI funnels, gates
draw_checkpoint    random weights of realistic scales, to measure sizes, times and memory
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mobilevd_deploy.base.progress import Progress
from mobilevd_deploy.config.spec import FunnelSpec, ModelSpec
from mobilevd_deploy.errors import SpecError, UsageError
from mobilevd_deploy.model.checkpoint import Checkpoint, expected_shapes, write_checkpoint
from mobilevd_deploy.model.components import build_component
from mobilevd_deploy.model.funnels import SqueezedConv, SqueezedLinear, initialise_csi
from mobilevd_deploy.model.unet import MobileVDUNet, TemporalDownsample, TemporalUpsample
from mobilevd_deploy.training.gates import most_important

_UNET = "unet."


def draw_checkpoint(
    path: Path,
    spec: ModelSpec,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> None:
    """Write random weights that preserve the signal's scale through every layer. Equal seeds, equal weights.

    Matrices and kernels are normal with variance 1 / inputs, norm weights are 1, biases are 0. The blocks
    that the spec keeps have the highest importance and a gate of 1.

    Raises CheckpointError if the file cannot be written, SpecError if the spec names an unknown block.
    """
    paths = _gated_blocks(spec)
    kept = paths if spec.unet.kept_temporal_blocks is None else spec.unet.kept_temporal_blocks
    ranking = [path for path in paths if path in kept] + [path for path in paths if path not in kept]
    gates = _gates(spec, {path: 1 - rank / len(ranking) for rank, path in enumerate(ranking)})

    def drawn(name: str, shape: tuple[int, ...]) -> Tensor:
        if name in gates:
            return gates[name]
        if len(shape) < 2:
            return torch.full(shape, float("norm" in name and name.endswith("weight")))
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        # A squeeze or widen of attention holds one matrix per head.
        inputs = shape[-1] if len(shape) == 3 else math.prod(shape[1:])
        return torch.empty(shape).normal_(std=inputs**-0.5, generator=generator)

    _write(path, spec, drawn, dtype, progress)


def compress_svd(
    path: Path,
    source: Checkpoint,
    spec: ModelSpec,
    *,
    importance: Mapping[str, float] | None = None,
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> ModelSpec:
    """Write SVD's weights in the form of `spec`, for finetuning: funnels by CSI, gates by importance.

    All components but the UNet are copied from the source, with their configuration, as are the tensors that
    both UNets have. Temporal convolutions start as the mean of each pair (down) and as repetition (up).

    Args:
        path: .safetensors or .pt.
        source: an opened checkpoint without optimisations, such as a diffusers folder of SVD.
        spec: a preset's model. Without its optimisations, its UNet must equal the source's.
        importance: temporal block's module path -> q. The most important blocks are kept, as many as `spec`
            keeps. Without it, all q are 0 and the blocks that `spec` names are kept.
        dtype: dtype of the written tensors.
        progress: receives one stage.

    Returns:
        The spec that was written.

    Raises:
        UsageError: the source is already optimised, or has other sizes.
        SpecError: `importance` names an unknown block or lacks one.
        CheckpointError: the file cannot be written.
    """
    plain = dataclasses.replace(
        spec.unet, temporal_multiscaling="none", gated=False, kept_temporal_blocks=None, funnels=FunnelSpec()
    )
    if source.spec.unet != plain:
        raise UsageError(
            f"{source.path}: its UNet is not the one that {spec.name} is made from",
            next_step="give SVD's original weights, and a preset of the same widths",
        )
    spec = dataclasses.replace(
        spec,
        image_encoder=source.spec.image_encoder,
        vae_encoder=source.spec.vae_encoder,
        decoder=source.spec.decoder,
    )
    gates = _gates(spec, importance or {})
    with torch.device("meta"):
        unet = build_component(spec, "unet")
    made: dict[str, Tensor] = {}

    def compressed(name: str, shape: tuple[int, ...]) -> Tensor:
        if name in gates:
            return gates[name]
        if (found := _find(source, name)) is not None and found.shape == shape:
            return found
        if name not in made:
            made.clear()  # names are sorted, so each block is made once
            owner = _owner(unet, name.removeprefix(_UNET))
            made.update(_initialised(unet, owner, lambda inner: _find(source, f"{_UNET}{inner}")))
        return made[name]

    _write(path, spec, compressed, dtype, progress)
    return spec


def read_importance(path: Path) -> dict[str, float]:
    """Read a JSON object: temporal block's module path -> importance. Raises SpecError."""
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise SpecError(f"{path}: not a readable JSON file ({error})") from error
    if not isinstance(values, dict) or not all(
        isinstance(value, (int, float)) and math.isfinite(value) for value in values.values()
    ):
        raise SpecError(
            f"{path}: not a JSON object of temporal blocks and numbers",
            next_step='write {"down_blocks.0.resnets.0": 0.7, ...}; mobilevd-deploy inspect lists the blocks',
        )
    return {str(name): float(value) for name, value in values.items()}


def _find(source: Checkpoint, name: str) -> Tensor | None:
    """Return the source's tensor; a funnel around a layer adds ".conv" to the names of its tensors."""
    for old in (name, name.replace(".conv1.conv.", ".conv1.").replace(".conv2.conv.", ".conv2.")):
        if (tensor := source.tensor(old)) is not None:
            return tensor
    return None


def _owner(unet: nn.Module, name: str) -> str:
    """Return the path of the block that must be initialised as a whole to make the tensor `name`."""
    path = name
    while path:
        path = path.rpartition(".")[0]
        module = unet.get_submodule(path)
        if isinstance(module, (TemporalDownsample, TemporalUpsample)) or any(
            isinstance(child, (SqueezedLinear, SqueezedConv)) for child in module.children()
        ):
            return path
    raise SpecError(f"unet: no rule initialises {name}")


@torch.no_grad()
def _initialised(unet: nn.Module, path: str, find: Callable[[str], Tensor | None]) -> dict[str, Tensor]:
    block = copy.deepcopy(unet.get_submodule(path)).to_empty(device="cpu")
    for name, tensor in block.state_dict().items():
        found = find(f"{path}.{name}")
        if found is not None and found.shape == tensor.shape:
            tensor.copy_(found)
        elif name.startswith("norm"):
            tensor.fill_(float(name.endswith("weight")))
    if isinstance(block, (TemporalDownsample, TemporalUpsample)):
        taps = (0.0, 0.5, 0.5) if isinstance(block, TemporalDownsample) else (0.0, 1.0, 0.0)
        conv: Any = block.conv
        weight, bias = conv.weight, conv.bias
        eye = torch.eye(weight.shape[0])
        weight.copy_(torch.stack([tap * eye for tap in taps], -1)[..., None, None])
        bias.zero_()
    else:
        initialise_csi(block)
    return {f"{_UNET}{path}.{name}": tensor for name, tensor in block.state_dict().items()}


def _gates(spec: ModelSpec, importance: Mapping[str, float]) -> dict[str, Tensor]:
    """Return gates and importance values by tensor name; kept blocks by `importance`, else by the spec."""
    paths = _gated_blocks(spec)
    if unknown := sorted(set(importance) - set(paths)):
        raise SpecError(
            f"importance: no gated temporal block {unknown[0]!r}",
            next_step=f"blocks are named like {paths[0]}" if paths else "choose a preset with gates",
        )
    kept = set(paths if spec.unet.kept_temporal_blocks is None else spec.unet.kept_temporal_blocks)
    if importance:
        if missing := [path for path in paths if path not in importance]:
            raise SpecError(f"importance: {missing[0]} is missing")
        values = torch.tensor([importance[path] for path in paths])
        kept = {paths[i] for i in most_important(values, len(kept)).tolist()}
    gates: dict[str, Tensor] = {}
    for path in paths:
        block = f"{_UNET}{path}.time_mixer"
        gates[f"{block}.gate"] = torch.tensor(float(path in kept))
        gates[f"{block}.importance"] = torch.tensor(importance.get(path, 0.0))
    return gates


def _gated_blocks(spec: ModelSpec) -> list[str]:
    if not spec.unet.gated:
        return []
    with torch.device("meta"):
        return list(MobileVDUNet(spec.unet, spec.step, spec.frames).temporal_blocks())


def _write(
    path: Path,
    spec: ModelSpec,
    make: Callable[[str, tuple[int, ...]], Tensor],
    dtype: torch.dtype,
    progress: Progress | None,
) -> None:
    progress = progress or Progress()
    shapes = expected_shapes(spec)
    total, done = sum(map(math.prod, shapes.values())), 0
    progress.begin(f"write {path.name}")

    def tensor(name: str) -> Tensor:
        nonlocal done
        value = make(name, shapes[name])
        done += value.numel()
        progress.advance(done / total)
        return value

    write_checkpoint(path, spec, tensor, dtype)
    progress.end()
