"""Describe a checkpoint, preset or artifact, and compare the paper's ablation with our counts.

Everything is counted on module trees: the network is built on the meta device, the real passes rewrite it,
and its one-step map is traced. No figure is declared, and no full-size weight is allocated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.models.resnet import SpatioTemporalResBlock

from mobilevd_deploy.artifact.artifact import Artifact
from mobilevd_deploy.artifact.manifest import MANIFEST
from mobilevd_deploy.base.progress import Progress
from mobilevd_deploy.config.presets import LadderRow, Preset, load_preset, preset_names, structural_rewrites
from mobilevd_deploy.config.spec import ComponentName, ModelSpec
from mobilevd_deploy.config.strict import from_dict
from mobilevd_deploy.errors import UsageError
from mobilevd_deploy.model.checkpoint import Checkpoint, open_checkpoint
from mobilevd_deploy.model.components import build_component
from mobilevd_deploy.model.flops import Convention, count_flops_by_module
from mobilevd_deploy.model.hub_cache import parse_hub_id
from mobilevd_deploy.model.interface import COMPONENTS
from mobilevd_deploy.model.unet import MobileVDUNet
from mobilevd_deploy.npu.skeleton import rewritten_skeleton

LADDER_NOTES = (
    "TFLOPs are those of one UNet evaluation at batch 1: 2 per multiply-accumulate of convolutions, linear "
    "layers and both products of attention. The paper counts by DeepSpeed's profiler, which adds norms, "
    "activations, biases and a mistaken cost of nearest-neighbour upsampling.",
    "From '+ optimised cross-attention' on ours is lower by up to 0.007: W_out W_v is merged into one layer.",
    "The paper names neither the kept temporal blocks nor the places of the funnels. Both are our choice "
    "(models/mobilevd-pruned.toml, models/mobilevd.toml), so the last two rows are approximations: "
    "funnels on all spatial self-attentions save 0.32 TFLOPs, and the two published rows are 0.30 apart.",
    "The published '523x (1817.2 against 4.34 TFLOPs)' takes 50 evaluations of SVD for the ratio "
    "(50 x 45.43 / 4.34 = 523) and 40 for the total (40 x 45.43 = 1817.2).",
)


def inspect(what: str | Path | Checkpoint | Preset | Artifact) -> dict[str, Any]:
    """Describe a checkpoint, preset or artifact as plain values.

    Args:
        what: the thing itself, a preset's name or TOML file, a checkpoint's file or folder, or an
            artifact's folder.

    Returns:
        `parameters` (of the UNet in training form), `parameters_rewritten`, `tflops` and
        `tflops_paper_convention` (one evaluation of the UNet after `rewrites`), `temporal_blocks`
        (`total`, `kept`, and per block `path`, `kind`, `level`, `kept`, `importance`, and the `tflops`
        that it costs where it is kept),
        `funnels`, `structure`, `components` (parameters of each) and the source's identity.

    Raises:
        SpecError, CheckpointError, ArtifactError: it cannot be read.
        UsageError: `what` names nothing.
    """
    if isinstance(what, (str, Path)):
        what = _resolve(what)
    if isinstance(what, Preset):
        return {"kind": "preset", **_describe(what.model, what.rewrites)}
    if isinstance(what, Checkpoint):
        described = _describe(what.spec, structural_rewrites(), what.importance())
        return {"kind": "checkpoint", "file": what.path.name, "sha256": what.sha256, **described}
    manifest = what.manifest
    described = _describe(from_dict(ModelSpec, manifest.model), [report.name for report in manifest.passes])
    described["components"] = {component.name: component.parameters for component in manifest.components}
    unet = manifest.component("unet")
    # The artifact's own figures, counted on the graph that it holds.
    described |= {"parameters_rewritten": unet.parameters, "tflops": unet.flops / 1e12}
    source = {"name": manifest.source.name, "sha256": manifest.source.sha256}
    return {"kind": "artifact", "source": source, "bytes": what.bytes, **described}


def ladder(progress: Progress | None = None) -> list[dict[str, Any]]:
    """Return the paper's ablation and our counts, in its order: one plain dictionary per row's preset.

    `parameters` and both counts are of the network after the row's `rewrites`. Deviations are relative to the
    published TFLOPs; None where the paper has no measurement.
    """
    presets = {name: load_preset(name) for name in preset_names()}
    rows = [(preset.ladder, name, preset.model) for name, preset in presets.items() if preset.ladder]
    progress = progress or Progress()
    progress.plan({f"count {name}": 1 for _, name, _ in rows})
    counted = []
    for row, name, spec in sorted(rows, key=lambda entry: entry[0].order):
        progress.begin(f"count {name}")
        counted.append(_ladder_row(row, name, spec))
        progress.end()
    return counted


def _ladder_row(row: LadderRow, name: str, spec: ModelSpec) -> dict[str, Any]:
    counted = _count(spec, row.rewrites)
    honest, paper = counted.tflops("honest"), counted.tflops("paper")
    return {
        "preset": name,
        "title": row.title,
        "published_tflops": row.tflops,
        "tflops": honest,
        "tflops_paper_convention": paper,
        "deviation": honest / row.tflops - 1,
        "deviation_paper_convention": paper / row.tflops - 1,
        "parameters": counted.parameters,
        "nfe": row.nfe,
        "fvd": list(row.fvd),
        "gpu_ms": row.gpu_ms,
        "phone_ms": row.phone_ms if row.phone_ms >= 0 else None,
        "rewrites": list(row.rewrites),
    }


def _resolve(what: str | Path) -> Checkpoint | Preset | Artifact:
    path = Path(what)
    if path.suffix == ".toml" or str(what) in preset_names():
        return load_preset(what)
    if (path / MANIFEST).exists():
        return Artifact.open(path)
    if not path.exists() and parse_hub_id(str(what)) is None:
        raise UsageError(
            f"{what} is neither a file or folder nor a preset",
            next_step=f"presets are {', '.join(preset_names())}",
        )
    return open_checkpoint(path)


@dataclass(frozen=True)
class _Counted:
    """The FLOPs of a network's one-step map by module path, and the network's parameters."""

    flops: dict[Convention, dict[str, int]]
    parameters: int

    def tflops(self, convention: Convention, path: str = "") -> float:
        return self.flops[convention].get(path, 0) / 1e12


def _count(spec: ModelSpec, rewrites: Iterable[str]) -> _Counted:
    """Build the UNet on the meta device, rewrite it and count; takes seconds at full size."""
    # Rows of the ladder that differ in their weights only share one count.
    return _count_once(dataclasses.replace(spec, name=""), tuple(rewrites))


@lru_cache(maxsize=8)
def _count_once(spec: ModelSpec, rewrites: tuple[str, ...]) -> _Counted:
    step, inputs = rewritten_skeleton(spec, rewrites)
    return _Counted(count_flops_by_module(step.unet, step, *inputs), _parameters(step.unet))


def _describe(
    spec: ModelSpec, rewrites: Sequence[str], importance: dict[str, float] | None = None
) -> dict[str, Any]:
    counted = _count(spec, rewrites)
    components = {name: _component_parameters(spec, name) for name in COMPONENTS}
    blocks = _temporal_blocks(spec, rewrites, importance or {})
    return {
        "name": spec.name,
        "parameters": components["unet"],
        "parameters_rewritten": counted.parameters,
        "tflops": counted.tflops("honest"),
        "tflops_paper_convention": counted.tflops("paper"),
        "rewrites": list(rewrites),
        "temporal_blocks": {
            "total": len(blocks),
            "kept": sum(block["kept"] for block in blocks),
            "blocks": blocks,
        },
        "funnels": dataclasses.asdict(spec.unet.funnels),
        "structure": _structure(spec),
        "components": components,
    }


def _temporal_blocks(
    spec: ModelSpec, rewrites: Sequence[str], importance: dict[str, float]
) -> list[dict[str, Any]]:
    kept = spec.unet.kept_temporal_blocks
    # Counted with all blocks kept, for the cost of a dropped block.
    whole = dataclasses.replace(spec, unet=dataclasses.replace(spec.unet, kept_temporal_blocks=None))
    counted = _count(whole, rewrites)
    with torch.device("meta"):
        blocks = cast(MobileVDUNet, build_component(whole, "unet")).temporal_blocks()
    described = []
    for path, block in blocks.items():
        resnet = isinstance(block, SpatioTemporalResBlock)
        temporal = ("temporal_res_block",) if resnet else ("temporal_transformer_blocks", "time_pos_embed")
        described.append(
            {
                "path": path,
                "kind": "resnet" if resnet else "transformer",
                "level": spec.unet.level_of(path),
                "kept": kept is None or path in kept,
                "importance": importance.get(path),
                "tflops": sum(counted.tflops("honest", f"{path}.{part}") for part in temporal),
            }
        )
    return described


def _structure(spec: ModelSpec) -> dict[str, Any]:
    unet = spec.unet
    height, width = spec.latent_size
    levels = [
        {
            "level": level,
            "channels": channels,
            "heads": heads if attends else 0,
            "latent": [height >> level, width >> level],
            "frames": unet.frames_at(level, spec.frames),
        }
        for level, (channels, heads, attends) in enumerate(
            zip(unet.block_out_channels, unet.num_attention_heads, unet.attention, strict=True)
        )
    ]
    return {
        "frames": spec.frames,
        "width": spec.width,
        "height": spec.height,
        "levels": levels,
        "layers_per_block": unet.layers_per_block,
        "temporal_multiscaling": unet.temporal_multiscaling,
        "gated": unet.gated,
        "step": dataclasses.asdict(spec.step),
        "vae_encoder": spec.vae_encoder.kind,
        "decoder": spec.decoder.kind,
    }


def _component_parameters(spec: ModelSpec, name: ComponentName) -> int:
    with torch.device("meta"):
        return _parameters(build_component(spec, name))


def _parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
