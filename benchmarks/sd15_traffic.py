"""DRAM traffic of Stable Diffusion 1.5's UNet, whose latency Qualcomm publishes.

    python benchmarks/sd15_traffic.py        what is not in results/sd15_traffic.json yet

diffusers' network at a 64x64 latent, batch 1, with random weights, in the forms and at the precision of the
recipe xiaomi-14-pro, but with attention one head at a time; measured again with smaller tiles of queries. It
is compiled block by block, equal blocks once, largest maps first. A block's inputs and outputs count in
float32 (`interface` is their share); in one graph they would have 16 bits, and some would stay on chip.
`least` is weights, inputs and outputs once, at 8 and 16 bits. The time step's embedding is folded. Each block
is written when it is measured, the sum when all are.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from _common import RESULTS, write_result
from diffusers import UNet2DConditionModel
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from mobilevd_deploy.base.progress import make_progress
from mobilevd_deploy.base.tensors import Tensors
from mobilevd_deploy.config.devices import Chip, table
from mobilevd_deploy.config.recipe import GraphForms, load_recipe
from mobilevd_deploy.npu.ops import (
    Add,
    ResBlock,
    SelfAttention,
    SiLU,
    TokenNorm,
    Upsample,
    conv2d,
    copy_sharing,
    from_tokens,
    group_norm,
    pointwise,
    to_tokens,
)
from mobilevd_deploy.npu.unet import FeedForward
from mobilevd_deploy.profiling.estimate import Counts, count_module, floor, load_calibration
from mobilevd_deploy.profiling.traffic import Block, measure_block, randomised
from mobilevd_deploy.qnn.compiled import DramBytes
from mobilevd_deploy.qnn.targets import find_target

NAME = "sd15_traffic"
RECIPE = "xiaomi-14-pro"
# The recipe's tile, chosen for 2048 tokens, and one whose maps of 4096 tokens do not spill.
QUERY_TILES = (512, 128)
VALUE_BYTES = (
    4  # a block's inputs and outputs are float32; in one graph they would have 2 bytes, or stay on chip
)
SOURCE = "Qualcomm AI Hub Models, Stable-Diffusion-v1.5, W8A16 on a Galaxy S24"


class CrossAttention(SelfAttention):
    """Attention of each pixel to the prompt; the map of one head fits one tile."""

    def forward(self, tokens: Tensor, context: Tensor) -> Tensor:  # type: ignore[override]
        """Map tokens to tokens; `context` in their layout."""
        return self.attend(tokens, context)


class SpatialTransformer(nn.Module):
    """diffusers' Transformer2DModel with its one block."""

    def __init__(self, model: Any, size: tuple[int, int], forms: GraphForms) -> None:
        super().__init__()
        (block,), tokens = model.transformer_blocks, size[0] * size[1]
        self.size, self.forms = size, forms
        self.norm = group_norm(model.norm, forms)
        self.proj_in = pointwise(model.proj_in.weight.flatten(1), model.proj_in.bias, forms)
        self.norm1, self.norm2 = TokenNorm(block.norm1, forms), TokenNorm(block.norm2, forms)
        self.norm3, self.ff = TokenNorm(block.norm3, forms), FeedForward(block.ff, forms)
        one_tile = dataclasses.replace(forms, query_tile=tokens)
        self.attn1 = _attention(SelfAttention, block.attn1, tokens, forms)
        self.attn2 = _attention(CrossAttention, block.attn2, tokens, one_tile)
        self.proj_out = pointwise(model.proj_out.weight.flatten(1), model.proj_out.bias, forms)
        self.add1, self.add2, self.add3, self.add = Add(), Add(), Add(), Add()

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Map (B, C, H, W) to itself; `context` is (B, D, 1, L)."""
        tokens = self.proj_in(to_tokens(self.norm(x), self.forms))
        tokens = self.add1(tokens, self.attn1(self.norm1(tokens)))
        tokens = self.add2(tokens, self.attn2(self.norm2(tokens), context))
        tokens = self.add3(tokens, self.ff(self.norm3(tokens)))
        return self.add(x, from_tokens(self.proj_out(tokens), *self.size, self.forms))


class Head(nn.Module):
    """The last norm, activation and convolution."""

    def __init__(self, unet: Any, forms: GraphForms) -> None:
        super().__init__()
        self.norm, self.act = group_norm(unet.conv_norm_out, forms), SiLU()
        self.conv = copy_sharing(unet.conv_out)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the prediction (B, 4, H, W)."""
        return self.conv(self.act(self.norm(x)))


class Convolution(nn.Module):
    """A convolution between blocks."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = copy_sharing(conv)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H', W')."""
        return self.conv(x)


@dataclass(frozen=True)
class Part:
    """A part of diffusers' network, and its deploy form with example inputs."""

    path: str
    form: nn.Module
    inputs: tuple[Tensor, ...]
    source: Callable[[], Tensor]
    counts: Counts

    @property
    def weights(self) -> int:
        """Its parameters."""
        return sum(p.numel() for p in self.form.parameters())

    @property
    def values(self) -> int:
        """Elements of its inputs and its output."""
        return sum(x.numel() for x in (*self.inputs, self.source()))


def sd15_on_meta() -> tuple[UNet2DConditionModel, tuple[Tensor, Tensor, Tensor]]:
    """Return diffusers' default network with the prompt's token width of SD 1.5, and its inputs."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, sample_size=64).eval()
        return unet, (torch.empty(1, 4, 64, 64), torch.ones(1), torch.empty(1, 77, 768))


@torch.no_grad()
def parts(
    unet: UNet2DConditionModel, inputs: tuple[Tensor, Tensor, Tensor], forms: GraphForms
) -> Iterator[Part]:
    """Run diffusers' network and turn its parts into deploy forms, in calling order."""
    calls: list[tuple[str, nn.Module, tuple[Any, ...], dict[str, Any]]] = []
    kinds = (ResnetBlock2D, Transformer2DModel, Downsample2D, Upsample2D)
    handles = [
        module.register_forward_pre_hook(
            lambda m, args, kwargs, path=path: calls.append((path, m, args, kwargs)), with_kwargs=True
        )
        for path, module in unet.named_modules()
        if isinstance(module, kinds) or path in ("conv_in", "conv_norm_out")
    ]
    unet(*inputs)
    for handle in handles:
        handle.remove()
    for path, module, args, kwargs in calls:
        x, *rest = args
        given: tuple[Tensor, ...] = (x,)
        form: nn.Module
        if isinstance(module, ResnetBlock2D):
            form = _resblock(module, rest[0], forms)
        elif isinstance(module, Transformer2DModel):
            form = SpatialTransformer(module, (x.shape[2], x.shape[3]), forms)
            given = (x, kwargs["encoder_hidden_states"].transpose(1, 2)[:, :, None])
        elif isinstance(module, Upsample2D):
            form = Upsample(cast(nn.Conv2d, module.conv))
        elif path == "conv_norm_out":
            path, form = "conv_out", Head(unet, forms)
            module = nn.Sequential(unet.conv_norm_out, unet.conv_act, unet.conv_out)
        else:
            form = Convolution(cast(nn.Conv2d, getattr(module, "conv", module)))

        def source(module: nn.Module = module, args: Any = args, kwargs: Any = kwargs) -> Tensor:
            output = module(*args, **kwargs)
            return output if isinstance(output, Tensor) else output[0]

        yield Part(path, form, given, source, count_module(module, source))


def _resblock(block: ResnetBlock2D, embedding: Tensor, forms: GraphForms) -> ResBlock:
    form, conv = ResBlock(block, forms), block.conv1
    shift = block.time_emb_proj(block.nonlinearity(embedding))[0]
    form.conv1 = conv2d(conv.weight, conv.bias + shift, padding=(1, 1))
    return form


def _attention(kind: type[SelfAttention], attention: Any, tokens: int, forms: GraphForms) -> SelfAttention:
    layers = (attention.to_q, attention.to_k, attention.to_v, attention.to_out[0])
    projections = [(layer.weight, layer.bias) for layer in layers]
    return kind(projections, attention.heads, attention.scale, "space", tokens, forms)


def as_block(part: Part) -> Block:
    """Return a part with random inputs; its weights stay."""
    rng = np.random.default_rng(0)
    names = ("x", "context")
    values: Tensors = {
        n: rng.standard_normal(v.shape, np.float32) for n, v in zip(names, part.inputs, strict=False)
    }
    return Block(part.path, part.form, values)


def row_of(part_counts: Sequence[Counts], moved: DramBytes, weights: int, values: int) -> dict[str, Any]:
    """Return bytes and floors of a block, or of consecutive blocks.

    `weights` and `values` (inputs and outputs) are numbers of elements, for the least traffic.
    """
    chip = _chip()
    counts = Counts(*(sum(kind) for kind in zip(*map(dataclasses.astuple, part_counts), strict=True)))
    found = floor(counts, chip, moved.read + moved.written)
    assert found is not None
    return {
        "read": moved.read,
        "written": moved.written,
        "interface": VALUE_BYTES * values,
        "least": weights + 2 * values,
        "tflops": counts.total / 1e12,
        "bytes_per_thousand_operations": 1000 * found.dram_bytes / counts.total,
        "dram_ms": found.dram_ms,
        "arithmetic_ms": found.arithmetic_ms,
        "floor_ms": found.ms,
        "binds": found.binds,
    }


def result(parts: Sequence[Part], moved: Mapping[str, DramBytes]) -> dict[str, Any]:
    """Return the floor of each measured part, and of the whole if no part is missing."""
    rows = {
        part.path: row_of([part.counts], moved[part.path], part.weights, part.values)
        for part in parts
        if part.path in moved
    }
    if missing := [part.path for part in parts if part.path not in moved]:
        return {"missing": missing, "blocks": rows}
    total = sum(moved.values(), DramBytes())
    whole = row_of(
        [part.counts for part in parts], total, sum(p.weights for p in parts), sum(p.values for p in parts)
    )
    published = _chip().published_ms["sd15_unet"]
    return {
        "sum": whole,
        "published_ms": published,
        "published_by": SOURCE,
        "published_over_floor": published / whole["floor_ms"],
        # The estimate counts the embedding of the time step, which is folded here.
        "tflops_of_the_estimate": load_calibration().sd15.total / 1e12,
        "blocks": rows,
    }


def main() -> None:
    """Measure what is missing."""
    file = RESULTS / f"{NAME}.json"
    kept = json.loads(file.read_text())["query_tiles"] if file.exists() else {}
    recipe = load_recipe(RECIPE)
    assert recipe.npu is not None
    target = find_target(recipe.npu.targets[0])
    unet, inputs = sd15_on_meta()
    chip = _chip()
    assert chip.dram_gb_s is not None
    assert chip.int8_tops is not None
    setup = {
        "target": target.name,
        "recipe": RECIPE,
        "parameters": sum(p.numel() for p in unet.parameters()),
        "dram_gb_s": chip.dram_gb_s.value,
        "int8_tops": chip.int8_tops.value,
    }
    results: dict[str, Any] = dict(kept)
    known: dict[str, DramBytes] = {}
    with make_progress() as progress:
        for tile in QUERY_TILES:
            rows = kept.get(str(tile), {}).get("blocks", {})
            moved = {path: DramBytes(row["read"], row["written"]) for path, row in rows.items()}
            forms = dataclasses.replace(recipe.graph, attention="heads", query_tile=tile)
            found = list(parts(unet, inputs, forms))
            for part in sorted(found, key=lambda part: -part.inputs[0].shape[2]):
                block = as_block(part)
                if part.path not in moved:
                    progress.begin(f"{part.path}, tiles of {tile}")
                    if not (reused := block.structure in known):
                        real = dataclasses.replace(block, module=randomised(block.module))
                        known[block.structure] = measure_block(real, recipe, recipe.npu, target).total
                    moved[part.path] = known[block.structure]
                    progress.end(reused=reused)
                known[block.structure] = moved[part.path]
                results[str(tile)] = result(found, moved)
                write_result(NAME, setup | {"query_tiles": results})


def _chip() -> Chip:
    return next(chip for chip in table().chip if chip.name == load_calibration().chip)


if __name__ == "__main__":
    main()
