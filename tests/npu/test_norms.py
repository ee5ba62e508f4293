"""Group norms of every size, as files that onnxruntime runs, against float64."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from mobilevd_deploy.base.tensors import Tensors, sqnr_db
from mobilevd_deploy.config.recipe import GraphForms, OnnxOptions
from mobilevd_deploy.config.spec import DecoderSpec
from mobilevd_deploy.model.components import build_component, deploy_contract
from mobilevd_deploy.model.interface import input_shapes
from mobilevd_deploy.npu import ops
from mobilevd_deploy.npu.build import build_npu
from mobilevd_deploy.npu.onnx_export import MODEL, export_onnx
from mobilevd_deploy.npu.two_step_norms import write_two_step_norms
from mobilevd_deploy.runtime.runners import OnnxRunner
from tests.npu.test_components import SVD
from tests.support.networks import randomise

LIMIT = ops.TwoStepGroupNorm.LIMIT
FLOOR_DB = 110


def norm(channels: int, groups: int) -> nn.GroupNorm:
    torch.manual_seed(0)
    made = nn.GroupNorm(groups, channels).requires_grad_(False)
    nn.init.normal_(made.weight, 1, 0.2)
    nn.init.normal_(made.bias, 0, 0.2)
    return made


def values(shape: tuple[int, ...]) -> np.ndarray:
    """Noise around 0.5: a mean makes the sums grow, and with them the rounding."""
    return np.random.default_rng(0).standard_normal(shape, np.float32) + np.float32(0.5)


def expected(made: nn.GroupNorm, x: np.ndarray) -> np.ndarray:
    grouped = x.reshape(x.shape[0], made.num_groups, -1).astype(np.float64)
    centred = grouped - grouped.mean(2, keepdims=True)
    centred /= np.sqrt((centred**2).mean(2, keepdims=True) + made.eps)
    weight, bias = (t.double().numpy()[:, None, None] for t in (made.weight, made.bias))
    return centred.reshape(x.shape) * weight + bias


def write(folder: Path, module: nn.Module, x: np.ndarray) -> Path:
    inputs: Tensors = {"x": x}
    export_onnx(module, inputs, ["y"], folder, OnnxOptions())
    return folder / MODEL


def run(model: Path, x: np.ndarray) -> np.ndarray:
    return OnnxRunner(model).run({"x": x})["y"]


def op_types(model: Path) -> set[str]:
    return {node.op_type for node in onnx.load(model, load_external_data=False).graph.node}


# (B, C, H, W) and groups; elements of a group in the comments.
LARGE = [
    ((1, 4, 256, 259), 2),  # 132,608: the first size above the limit that is no power of two
    ((2, 4, 14, 65_536), 2),  # 1.8 M, two of a batch
    ((1, 2, 14, 262_144), 1),  # 7.3 M: SVD's temporal decoder, 14 frames of 512x256
    ((1, 2, 25, 262_144), 1),  # 13.1 M: 25 frames
]


@pytest.mark.parametrize(("shape", "groups"), LARGE)
def test_large_groups_are_accurate_on_onnxruntime(
    tmp_path: Path, shape: tuple[int, ...], groups: int
) -> None:
    made, x = norm(shape[1], groups), values(shape)
    model = write(tmp_path, ops.group_norm(made, GraphForms(group_norm="group")).eval(), x)
    assert op_types(model).isdisjoint({"GroupNormalization", "InstanceNormalization"})
    assert sqnr_db(expected(made, x), run(model, x)) >= FLOOR_DB


@pytest.mark.parametrize(("shape", "groups"), [((3, 8, 5, 7), 4), ((1, 2, 256, LIMIT // 256), 2)])
def test_groups_up_to_the_limit_are_one_node(tmp_path: Path, shape: tuple[int, ...], groups: int) -> None:
    made, x = norm(shape[1], groups), values(shape)
    plain = write(tmp_path / "plain", made, x)
    ours = write(tmp_path / "ours", ops.group_norm(made, GraphForms(group_norm="group")).eval(), x)
    assert op_types(ours) == {"GroupNormalization"}
    assert ours.read_bytes() == plain.read_bytes()
    assert sqnr_db(expected(made, x), run(ours, x)) >= FLOOR_DB


@pytest.mark.parametrize("size", [131_072, 132_608, 286_720, 7_340_032, 13_107_200])
def test_rows_and_columns_make_up_the_group(size: int) -> None:
    columns = ops.columns(size)
    assert size % columns == 0
    assert columns**2 <= size
    assert columns**2 * 4 >= size


@pytest.mark.parametrize(("shape", "groups"), LARGE[:3])
def test_an_instance_form_keeps_its_node_and_is_accurate_in_the_copy(
    tmp_path: Path, shape: tuple[int, ...], groups: int
) -> None:
    made, x = norm(shape[1], groups), values(shape)
    model = write(tmp_path, ops.group_norm(made, GraphForms(group_norm="instance")).eval(), x)
    assert "InstanceNormalization" in op_types(model)
    copy = tmp_path / "copy.onnx"
    size = x[0].size // groups
    assert write_two_step_norms(model, copy) == size
    assert "InstanceNormalization" not in op_types(copy)
    onnx.checker.check_model(str(copy))
    assert sqnr_db(expected(made, x), run(copy, x)) >= FLOOR_DB


def test_small_instance_norms_need_no_copy(tmp_path: Path) -> None:
    made, x = norm(8, 4), values((1, 8, 16, 16))
    model = write(tmp_path, ops.InstanceGroupNorm(made).eval(), x)
    assert write_two_step_norms(model, tmp_path / "copy.onnx") == 0
    assert not (tmp_path / "copy.onnx").exists()


def test_the_copy_does_not_hide_a_wrong_graph(tmp_path: Path) -> None:
    made, x = norm(4, 2), values((1, 4, 256, 259))
    wrong = norm(4, 2)
    wrong.weight[1] += 0.01
    write_two_step_norms(write(tmp_path, ops.InstanceGroupNorm(wrong).eval(), x), tmp_path / "copy.onnx")
    assert sqnr_db(expected(made, x), run(tmp_path / "copy.onnx", x)) < 60


@pytest.mark.parametrize("frames", [14, 25])
def test_a_decoder_of_128_channels_with_every_norm_in_two_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frames: int
) -> None:
    """SVD's layout at a small size; `benchmarks/norm_rounding.py` runs sizes at which groups are large."""
    monkeypatch.setattr(ops.TwoStepGroupNorm, "LIMIT", 0)
    spec = dataclasses.replace(SVD, frames=frames, decoder=DecoderSpec(block_out_channels=(128, 128)))
    network = randomise(build_component(spec, "decoder"), seed=1)
    latents = np.random.default_rng(0).standard_normal(input_shapes(spec, "decoder")["latents"], np.float32)
    with torch.no_grad():
        exact = deploy_contract(network.double())(torch.from_numpy(latents).double()).numpy()
    network.float()
    model = write(tmp_path, build_npu("decoder", network, spec, GraphForms()), latents)
    assert "GroupNormalization" not in op_types(model)
    made = OnnxRunner(model).run({"x": latents})["y"]
    assert sqnr_db(exact, made) >= FLOOR_DB
