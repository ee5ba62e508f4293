from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from mobilevd_deploy.artifact import Artifact
from mobilevd_deploy.errors import UsageError
from mobilevd_deploy.recipe import load_recipe
from mobilevd_deploy.spec import load_preset
from mobilevd_deploy.traffic import measure_artifact, measure_preset, unet_blocks

DEMO = load_preset("demo").model
FLOAT = load_recipe("npu-float")


def test_blocks_are_the_deploy_forms_own_and_run() -> None:
    blocks = {block.path: block for block in unet_blocks(DEMO, FLOAT)}
    assert set(blocks) >= {"down_blocks.0.resnets.0", "mid_block.attentions.0", "up_blocks.3.attentions.1"}
    assert blocks["mid_block.resnets.0"].inputs["x"].shape == (7, 96, 1, 2)
    block = blocks["down_blocks.0.attentions.0"]
    assert {name: value.shape for name, value in block.inputs.items()} == {
        "x": (14, 32, 8, 16),
        "image_embeds": (1, 64),
    }
    with torch.no_grad():
        out = block.module(*(torch.from_numpy(value) for value in block.inputs.values()))
    assert out.shape == (14, 32, 8, 16)
    assert torch.isfinite(out).all()
    assert 0.3 < out.std() < 30


def test_the_floor_counts_weights_inputs_and_outputs_once() -> None:
    (block,) = unet_blocks(DEMO, FLOAT, ["mid_block.resnets.0"])
    weights = sum(p.numel() for p in block.module.parameters())
    assert block.floor_bytes == 2 * (weights + 2 * 7 * 96 * 2)


def test_an_unknown_block_is_refused() -> None:
    with pytest.raises(UsageError, match="no block matches nonsense") as caught:
        next(iter(unet_blocks(DEMO, FLOAT, ["nonsense"])))
    assert "down_blocks.0.resnets.0" in str(caught.value)


def test_an_artifact_without_binaries_is_refused(exported: dict[str, Artifact]) -> None:
    with pytest.raises(UsageError, match="compiled for no chip"):
        measure_artifact(exported["onnx"])


@pytest.mark.parametrize("recipe", [FLOAT, load_recipe("xiaomi-14-pro")], ids=["float16", "w8a16"])
def test_the_compilers_schedule_of_a_block(recipe: object) -> None:
    """Weights have to come from DRAM at least once, and a block this small never spills."""
    pytest.importorskip("onnxruntime_qnn")
    pytest.importorskip("aimet_torch")
    (row,) = measure_preset(DEMO, recipe, ["mid_block.resnets.0"])  # type: ignore[arg-type]
    weights = 2 * 9 * 96 * 96 * (2 if recipe is FLOAT else 1)
    assert weights <= row.read < 4 * weights
    assert row.written < row.read
    assert row.floor is not None
    assert np.isfinite(row.floor)
    assert dataclasses.asdict(row)["path"] == "mid_block.resnets.0"
