"""The quantised simulation of a small network, its QDQ graph, and graphs that must be refused."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto
from torch import Tensor, nn
from torch.nn import functional as F

from mobilevd_deploy.base.graphs import read_shaped
from mobilevd_deploy.base.tensors import Tensors, sqnr_db
from mobilevd_deploy.config.data import data_dir
from mobilevd_deploy.config.recipe import GraphForms, QuantRule, QuantScheme
from mobilevd_deploy.errors import ExportError, UsageError
from mobilevd_deploy.npu import ops
from mobilevd_deploy.npu.onnx_export import DATA, MODEL
from mobilevd_deploy.npu.unet import NpuUNet
from mobilevd_deploy.passes.runner import PASSES
from mobilevd_deploy.qnn.split import plan_cut, write_parts
from mobilevd_deploy.quantize import simulation as quantize
from mobilevd_deploy.quantize.judging import answers, conditioning, sensitivity
from mobilevd_deploy.quantize.qdq import MOVES, integer_type, relabel
from mobilevd_deploy.quantize.qdq_check import check_interface, check_operands, check_quantised
from mobilevd_deploy.quantize.simulation import RULES, Quantised, block_of, quantise
from mobilevd_deploy.runtime.runners import OnnxRunner, PartsRunner
from tests.support.networks import PLAIN, apply_passes, build_unet

pytestmark = pytest.mark.npu

FORMS = GraphForms(attention="heads", linear="conv", group_norm="instance")
# One resblock down, one up, and both kinds of both blocks in the middle.
SPEC = dataclasses.replace(
    PLAIN,
    block_out_channels=(64,),
    num_attention_heads=(2,),
    attention=(False,),
    gated=True,
    kept_temporal_blocks=("mid_block.attentions.0", "mid_block.resnets.0"),
)
FRAMES, HEIGHT, WIDTH = 2, 4, 8


def tiny_unet() -> NpuUNet:
    unet = build_unet(SPEC, frames=FRAMES).float()
    apply_passes(unet, [step.name for step in PASSES][:-1])
    return NpuUNet(unet, FRAMES, HEIGHT, WIDTH, FORMS).eval().requires_grad_(False)


def sample(seed: int) -> Tensors:
    rng = np.random.default_rng(seed)
    shapes = {
        "noise": (FRAMES, 4, HEIGHT, WIDTH),
        "image_latents": (1, 4, HEIGHT, WIDTH),
        "image_embeds": (1, SPEC.cross_attention_dim),
    }
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def in_float(network: nn.Module, inputs: Tensors) -> np.ndarray:
    with torch.no_grad():
        return network(*(torch.from_numpy(value) for value in inputs.values())).numpy()


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state") / "encodings.pt"


@pytest.fixture(scope="module")
def quantised(state: Path) -> Quantised:
    return quantise(tiny_unet(), map(sample, range(4)), QuantScheme(), state=state)


@pytest.fixture(scope="module")
def exported(quantised: Quantised, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    quantised.export(folder, sample(0), ["latents"])
    return folder


@pytest.fixture
def graph(exported: Path) -> onnx.ModelProto:
    return onnx.load(exported / MODEL)


class Little(nn.Module):
    """Two convolutions around what the tests are about."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(8, width, 1, 1, generator=generator) / 4 for width in (3, 8)]
        self.first, self.last = (ops.conv2d(w, torch.full((8,), 0.1)) for w in weights)
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x)))


def little_sample(seed: int) -> Tensors:
    return {"x": np.random.default_rng(seed).normal(size=(2, 3, 4, 4)).astype(np.float32)}


def quantise_little(middle: nn.Module, scheme: QuantScheme | None = None) -> Quantised:
    return quantise(Little(middle), map(little_sample, range(2)), scheme or QuantScheme())


# ---- the simulation ----


def test_import_leaves_aimet_alone() -> None:
    code = "import sys, mobilevd_deploy.quantize.simulation; sys.exit('aimet_torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_values_change_their_width_before_they_are_moved(tmp_path: Path) -> None:
    """A norm begins with a reshape; with the conversion behind it the compiler runs it in floats."""
    norm = ops.group_norm(nn.GroupNorm(2, 8), GraphForms(group_norm="instance"))
    little = quantise_little(norm, QuantScheme(rules=(QuantRule("middle.*", activations=8),)))
    little.export(tmp_path, little_sample(0), ["y"])
    conversions = 0
    for node in ir.load(tmp_path / MODEL).graph:
        before = node.inputs[0].producer()
        if node.op_type == "QuantizeLinear" and before is not None:
            is_dequantiser = before.op_type == "DequantizeLinear"
            conversions += is_dequantiser and integer_type(before) != integer_type(node)
            if before.op_type == "Reshape":
                source = before.inputs[0].producer()
                if source.op_type.startswith("D"):
                    assert integer_type(source) == integer_type(node), node.name
    assert conversions == 2  # into the norm, and out of it
    exact, written = little.run(little_sample(3)), OnnxRunner(tmp_path / MODEL).run(little_sample(3))["y"]
    assert sqnr_db(exact, written) > 40


def test_a_bias_behind_padding_has_the_scale_of_its_sums(tmp_path: Path) -> None:
    """SVD's encoder pads on two sides before it halves a map; its biases, here 0, got 2e-12 for a scale."""
    conv = nn.Conv2d(8, 8, 3, 2)
    nn.init.zeros_(conv.bias)
    quantise_little(nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), conv)).export(tmp_path, little_sample(0), ["y"])


def test_without_aimet_the_next_step_is_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aimet_torch", None)
    quantize._load_aimet.cache_clear()
    with pytest.raises(UsageError, match="AIMET") as caught:
        quantise(nn.Identity(), [little_sample(0)], QuantScheme())
    assert caught.value.next_step == "pip install 'mobilevd-deploy[npu]'"


def test_sixteen_bits_stay_close_to_float(quantised: Quantised) -> None:
    network, unseen = tiny_unet(), sample(9)
    exact = in_float(network, unseen)
    assert sqnr_db(exact, quantised.run(unseen)) > 25
    assert np.array_equal(quantised.run_float(unseen), exact)
    assert quantised.run(unseen).dtype == np.float32


def test_eight_bits_are_worse() -> None:
    inputs = little_sample(5)
    wide, narrow = (quantise_little(ops.SiLU(), QuantScheme(activations=a)) for a in (16, 8))
    exact = wide.run_float(inputs)
    assert sqnr_db(exact, wide.run(inputs)) > sqnr_db(exact, narrow.run(inputs)) + 3


def test_ranges_are_stretched_but_not_those_that_hold_by_definition() -> None:
    ranges = []
    for headroom in (1.0, 2.0):
        middle = quantise_little(ops.SiLU(), QuantScheme(headroom=headroom)).sim.model.middle
        quantisers = (middle.multiply.output_quantizers[0], middle.sigmoid.output_quantizers[0])
        ranges.append([(q.min.item(), q.max.item()) for q in quantisers])
    (product, sigmoid), (stretched, same) = ranges
    assert stretched == pytest.approx((2 * product[0], 2 * product[1]))
    assert sigmoid == same == (0, 1)


def test_eight_bit_ranges_are_not_stretched() -> None:
    narrow = [
        quantise_little(nn.GELU(), QuantScheme(activations=8, headroom=h)).run(little_sample(0))
        for h in (1.0, 2.0)
    ]
    assert np.array_equal(*narrow)


def test_samples_are_not_kept() -> None:
    alive: list[weakref.ref[Any]] = []

    def samples() -> Iterator[Tensors]:
        for seed in range(4):
            # The first is held by AIMET's trace, perhaps.
            assert sum(ref() is not None for ref in alive[1:]) == 0
            values = little_sample(seed)
            alive.append(weakref.ref(values["x"]))
            yield values
            del values

    quantise(Little(nn.GELU()), samples(), QuantScheme())
    assert len(alive) == 4


def test_ranges_are_resumed(quantised: Quantised, state: Path) -> None:
    def only_one() -> Iterator[Tensors]:
        yield sample(0)
        raise AssertionError("calibrated again")

    resumed = quantise(tiny_unet(), only_one(), QuantScheme(), state=state)
    assert np.array_equal(resumed.run(sample(7)), quantised.run(sample(7)))


@pytest.mark.parametrize("what", ["scheme", "weights", "sample", "quantisers", "damaged"])
def test_ranges_of_something_else_are_not_taken(what: str, tmp_path: Path) -> None:
    path = tmp_path / "encodings.pt"
    quantise(Little(nn.GELU()), map(little_sample, (0, 1)), QuantScheme(), state=path)
    before = path.read_bytes()
    network, seeds, scheme = Little(nn.GELU()), (0, 2), QuantScheme()
    if what == "scheme":
        scheme = QuantScheme(headroom=1.5)
    elif what == "weights":
        network.last.weight.data *= 2
    elif what == "sample":
        seeds = (2, 0)
    elif what == "quantisers":
        saved = torch.load(path, weights_only=True)
        saved["quantisers"].popitem()
        torch.save(saved, path)
        before = path.read_bytes()
    else:
        path.write_bytes(before[:100])
    seen: list[int] = []

    def samples() -> Iterator[Tensors]:
        for seed in seeds:
            seen.append(seed)
            yield little_sample(seed)

    quantise(network, samples(), scheme, state=path)
    assert seen == [*seeds]
    assert path.read_bytes() != before
    assert list(tmp_path.iterdir()) == [path]


def test_the_first_rule_that_matches_decides() -> None:
    rules = (
        QuantRule("first", weights=16),
        QuantRule("*st", weights=4, activations=8),  # `last` only
        QuantRule("middle.sigmoid", activations=32),
    )
    model = quantise_little(ops.SiLU(), QuantScheme(rules=rules)).sim.model
    bits = {
        path: (module.param_quantizers["weight"].bitwidth, module.output_quantizers[0].bitwidth)
        for path, module in (("first", model.first), ("last", model.last))
    }
    assert bits == {"first": (16, 16), "last": (4, 8)}
    assert model.middle.sigmoid.output_quantizers[0] is None
    assert model.middle.multiply.output_quantizers[0].bitwidth == 16


def test_weights_of_norms_keep_eight_bits() -> None:
    norm = ops.InstanceGroupNorm(nn.GroupNorm(4, 8))
    model = quantise_little(norm, QuantScheme(weights=4)).sim.model
    assert model.middle.norm.param_quantizers["weight"].bitwidth == 8
    assert model.last.param_quantizers["weight"].bitwidth == 4


def test_rules_of_the_hardware_are_those_that_aimet_ships() -> None:
    ours = [(path, repr(module)) for path, module in quantised_by(str(data_dir("export") / RULES))]
    theirs = [(path, repr(module)) for path, module in quantised_by("htp_v75")]
    assert ours == theirs
    assert len(ours) > 10


def quantised_by(rules: str) -> list[tuple[str, nn.Module]]:
    aimet = quantize._load_aimet()
    weights = [(torch.ones(8, 8), torch.ones(8)) for _ in range(4)]
    network = nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.ReLU(),
        ops.SelfAttention(weights, 2, 1.0, "space", 16, FORMS),
        ops.TokenNorm(nn.LayerNorm(8), FORMS),
        ops.InstanceGroupNorm(nn.GroupNorm(4, 8)),
        ops.SiLU(),
        nn.Tanh(),
        nn.Upsample(scale_factor=2),
        nn.GELU(),
    )
    with quantize._silence():
        quantize._swap_arithmetic(network, aimet.arithmetic)
        sim = aimet.sim(network, torch.ones(2, 3, 4, 4), config_file=rules, default_output_bw=16)
    return list(sim.named_qmodules())


def test_nothing_to_calibrate_with() -> None:
    with pytest.raises(UsageError, match="sample"):
        quantise(nn.Identity(), [], QuantScheme())


def test_values_that_are_not_finite_are_refused() -> None:
    broken = little_sample(0)
    broken["x"][0, 0, 0, 0] = np.inf
    with pytest.raises(ExportError, match=r"first: .*not all finite"):
        quantise(Little(nn.GELU()), [broken], QuantScheme())


def test_weights_use_all_their_integers() -> None:
    """AIMET stores an identity as ones, with a scale of 1."""
    eye = ops.conv2d(
        torch.eye(8)[:, :, None, None] * torch.tensor([0.5] + [2.0] * 7)[:, None, None, None], None
    )
    little = quantise_little(eye)
    quantiser = little.sim.model.middle.param_quantizers["weight"]
    scale = quantiser.get_scale().detach().flatten()
    assert torch.allclose(127 * scale, torch.tensor([0.5] + [2.0] * 7))
    assert torch.equal(quantiser(eye.weight).as_subclass(Tensor), eye.weight)


# ---- the written graph ----


def test_file_does_what_the_simulation_does(exported: Path, quantised: Quantised) -> None:
    runner, unseen = OnnxRunner(exported / MODEL), sample(8)
    assert sqnr_db(quantised.run(unseen), runner.run(unseen)["latents"]) > 50


def test_nothing_lies_beside_model_and_weights(exported: Path) -> None:
    assert sorted(path.name for path in exported.iterdir()) == [MODEL, DATA]
    assert (exported / DATA).stat().st_mode == (exported / MODEL).stat().st_mode
    model = onnx.load(exported / MODEL, load_external_data=False)
    places = {e.value for i in model.graph.initializer for e in i.external_data if e.key == "location"}
    assert places == {DATA}


def test_weights_are_stored_as_integers(graph: onnx.ModelProto) -> None:
    large = [t for t in graph.graph.initializer if np.prod(t.dims) > 1000]
    assert large
    assert {t.data_type for t in large} <= {TensorProto.INT8}


def test_interface_stays_as_it_was(graph: onnx.ModelProto) -> None:
    assert [value.name for value in graph.graph.input] == [*sample(0)]
    assert [value.name for value in graph.graph.output] == ["latents"]
    check_interface(ir.from_proto(graph))
    assert [(entry.domain, entry.version) for entry in graph.opset_import] == [("", 21)]


def test_nodes_are_named_after_modules(graph: onnx.ModelProto, quantised: Quantised) -> None:
    names = [node.name for node in graph.graph.node]
    assert len(set(names)) == len(names)
    modules = {path for path, _ in quantised.sim.model.named_modules()} | {*sample(0), "graph"}
    strangers = {name.rpartition("/")[0] for name in names} - modules
    assert not strangers
    assert "conv_out/QuantizeLinear" in names
    assert "noise/QuantizeLinear" in names
    assert not any(node.metadata_props or node.doc_string for node in graph.graph.node)


@pytest.mark.parametrize("parts", [2, 3])
def test_parts_of_a_quantised_graph_give_what_the_whole_gives(exported: Path, parts: int) -> None:
    """What crosses is quantised again on the other side, so that no part holds a value without a range."""
    expected = OnnxRunner(exported / MODEL).run(sample(5))["latents"]
    cut = plan_cut(read_shaped(exported / MODEL), parts)
    files = write_parts(exported / MODEL, cut)
    for file in files:
        check_quantised(ir.load(file))
    given = PartsRunner(cut.parts, lambda part: OnnxRunner(files[cut.parts.index(part)])).run(sample(5))
    for file in files:
        file.unlink()
    assert sqnr_db(expected, given["latents"]) > 60


def test_second_operands_are_relabelled(graph: onnx.ModelProto) -> None:
    producers = {name: node for node in graph.graph.node for name in node.output}
    types = {t.name: t.data_type for t in graph.graph.initializer}
    products = [node for node in graph.graph.node if node.op_type == "MatMul"]
    assert len(products) == 2 * (2 + 1)  # two heads apart over space, all at once over time
    for node in products:
        assert types[producers[node.input[1]].input[2]] == TensorProto.INT16
    model = ir.from_proto(graph)
    before = ir.to_proto(model)
    relabel(model)
    assert ir.to_proto(model) == before, "twice is not once more"


def test_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    quantise_little(ops.SiLU()).export(tmp_path, little_sample(0), ["y"])
    assert capfd.readouterr() == ("", "")


def test_arithmetic_that_is_skipped_makes_no_difference(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "_Hollow", contextlib.nullcontext)
    quantise(tiny_unet(), map(sample, range(4)), QuantScheme()).export(tmp_path, sample(0), ["latents"])
    for name in (MODEL, DATA):
        assert (tmp_path / name).read_bytes() == (exported / name).read_bytes()


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, stride=2, padding=(1, 0)),
        nn.Conv2d(4, 8, 1, groups=2),
        nn.Linear(9, 5),
        nn.Linear(9, 5, bias=False),
    ],
    ids=repr,
)
def test_skipped_arithmetic_has_the_shape_of_the_real(layer: nn.Module) -> None:
    x = torch.randn(2, 4, 7, 9)
    with torch.no_grad():
        real = layer(x)
        with quantize._Hollow():
            assert layer(x).shape == real.shape


def test_scales_are_found_without_gradients(quantised: Quantised, tmp_path: Path) -> None:
    # With them every value of the network is kept: 23 GB at the paper's size.
    tracked: list[bool] = []
    hook = quantised.sim.model.register_forward_hook(lambda _, __, out: tracked.append(out.requires_grad))
    quantised.export(tmp_path, sample(0), ["latents"])
    hook.remove()
    assert tracked[0] is False


def test_a_second_export_replaces_the_first(tmp_path: Path) -> None:
    little = quantise_little(ops.SiLU())
    (tmp_path / DATA).write_bytes(b"left over" * 1000)
    little.export(tmp_path, little_sample(0), ["y"])
    first = (tmp_path / MODEL).read_bytes()
    little.export(tmp_path, little_sample(0), ["y"])
    assert (tmp_path / MODEL).read_bytes() == first
    OnnxRunner(tmp_path / MODEL).run(little_sample(1))


def test_a_rule_may_leave_a_module_in_float(tmp_path: Path) -> None:
    scheme = QuantScheme(rules=(QuantRule("middle", activations=32),))
    little = quantise_little(nn.GELU(), scheme)
    little.export(tmp_path, little_sample(0), ["y"])
    after = [
        node
        for node in onnx.load(tmp_path / MODEL).graph.node
        if node.op_type == "QuantizeLinear" and "gelu" in node.input[0].lower()
    ]
    assert len(after) == 1, "what comes behind it is made of integers again"


@pytest.mark.parametrize("inside", [8, 16])
def test_integers_of_other_bits_are_converted(inside: Literal[8, 16], tmp_path: Path) -> None:
    """An operation takes and gives one width; the compiler refuses two."""
    scheme = QuantScheme(
        activations=16 if inside == 8 else 8, rules=(QuantRule("middle.*", activations=inside),)
    )
    little = quantise_little(nn.Sequential(nn.Conv2d(8, 8, 1), nn.GELU()), scheme)
    little.export(tmp_path, little_sample(0), ["y"])
    convs = [node for node in ir.load(tmp_path / MODEL).graph if node.op_type == "Conv"]
    for conv in convs:
        assert integer_type(conv.inputs[0].producer()) == integer_type(conv.outputs[0].consumers()[-1])
    assert len({integer_type(conv.outputs[0].consumers()[-1]) for conv in convs}) == 2


def test_what_shares_a_range_parts_where_bits_differ(tmp_path: Path) -> None:
    """A concatenation has the range of what it joins; with other bits, each has its own."""
    scheme = QuantScheme(rules=(QuantRule("down_blocks.*", activations=8),))
    mixed = quantise(tiny_unet(), map(sample, range(2)), scheme)
    widths = {path: module.output_quantizers[0].bitwidth for path, module in mixed.sim.named_qmodules()}
    joins = [path for path in widths if ".joins." in path]
    assert joins
    assert all(widths[path] == (8 if path.startswith("down_blocks") else 16) for path in widths)
    mixed.export(tmp_path, sample(0), ["latents"])
    graph = ir.load(tmp_path / MODEL).graph
    for join in (node for node in graph if node.name in [f"{path}/Concat" for path in joins]):
        types = {integer_type(value.producer()) for value in join.inputs}
        after = integer_type(join.outputs[0].consumers()[-1])
        assert types == {after} == {ir.DataType.UINT16}, join.name


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tanh = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.tanh(F.gelu(x))


class PlainSiLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sigmoid, self.multiply = nn.Sigmoid(), ops.Multiply()

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x, self.sigmoid(x))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.tanh = nn.Conv2d(8, 8, 1), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.tanh(self.conv(x)))


@pytest.mark.parametrize(
    ("middle", "message"),
    [
        (Functional(), "middle.tanh/Tanh .* reads middle/Gelu"),
        (nn.SiLU(), r"middle/Mul \(Mul\) reads middle/Sigmoid"),
        (PlainSiLU(), "middle.multiply/Mul: a tensor times its own sigmoid"),
        (nn.GroupNorm(4, 8), "middle/GroupNormalization: .*float32"),
        (Twice(), "middle.conv/Conv.*: its bias is stored for another input"),
    ],
    ids=["function", "silu", "plain-silu", "group-norm", "called-twice"],
)
def test_traps_of_networks_are_refused(middle: nn.Module, message: str, tmp_path: Path) -> None:
    little = quantise_little(middle)
    with pytest.raises(ExportError, match=message):
        little.export(tmp_path, little_sample(0), ["y"])
    assert not list(tmp_path.iterdir())


def test_every_pair_is_needed(graph: onnx.ModelProto) -> None:
    """Take any one Q and DQ out of the middle, and the reader is named."""
    model, tried = ir.from_proto(graph), 0
    pairs = {"QuantizeLinear", "DequantizeLinear"}
    for node in model.graph:
        if node.op_type in pairs | MOVES:
            continue
        for i, value in enumerate(node.inputs):
            pair = value.producer()
            if pair is None or pair.op_type != "DequantizeLinear" or pair.inputs[0].producer() is None:
                continue
            source = pair.inputs[0].producer().inputs[0]
            if source.producer() is not None and source.producer().op_type in {"DequantizeLinear"} | MOVES:
                continue  # the relabelled, and what moved between two pairs
            node.replace_input_with(i, source)
            with pytest.raises(ExportError, match=re.escape(node.name)):
                check_quantised(model)
            node.replace_input_with(i, value)
            tried += 1
    assert tried > 50
    check_quantised(model)


# ---- graphs that must be refused ----

CONSTANTS = """
    float s = {0.01}, uint16 z = {32768}, uint16 odd = {100}, int16 zs = {0}, uint8 z8 = {128},
    int8 zs8 = {0},
    float sw = {0.5}, float sb = {0.005}, float wrong = {0.05}, int32 zb = {0}, float half = {0.5},
    int8[8,8,1,1] w = {WEIGHTS}, int8[8,8,1,1] few = {FEW}, float[8] sws = {1,1,1,1,1,1,1,1},
    int8[8,8] m = {WEIGHTS}, int32[8] b = {1,2,3,4,5,6,7,8},
    float[8] bf = {1,2,3,4,5,6,7,8}, int64[4] shape = {2,8,4,4}, int64[4] row_shape = {2,8,1,16}
""".replace("WEIGHTS", ",".join(["127"] * 64)).replace("FEW", ",".join(["127"] * 56 + ["1"] * 8))


def qdq(body: str) -> ir.Model:
    """Build a graph from ONNX text; `a -> b` stands for a Q and a DQ with scale s and zero point z."""
    lines = []
    for line in filter(None, map(str.strip, body.splitlines())):
        if "->" in line:
            before, after, zero = (*(part.strip() for part in line.split("->")), "z")[:3]
            lines.append(f"{after}_q = QuantizeLinear({before}, s, {zero})")
            lines.append(f"{after} = DequantizeLinear({after}_q, s, {zero})")
        else:
            lines.append(line)
    text = (
        f'<ir_version: 10, opset_import: ["": 21]>\n'
        f"g (float[2,8,4,4] x) => (float[2,8,4,4] y) <{CONSTANTS}> {{ {' '.join(lines)} }}"
    )
    model = onnx.parser.parse_model(text)
    for node in model.graph.node:
        node.name = f"block.{node.output[0]}/{node.op_type}"
    return ir.from_proto(onnx.shape_inference.infer_shapes(model, data_prop=True))


CONV = """
    wd = DequantizeLinear(w, sw, zs8)
    bd = DequantizeLinear(b, sb, zb)
"""

GOOD = {
    "conv and relu": f"""{CONV}
        x -> xd
        c = Conv(xd, wd, bd)
        r = Relu(c)
        r -> y""",
    "moves between": """
        x -> xd
        t = Transpose<perm = [0, 2, 3, 1]>(xd)
        t -> td
        back = Transpose<perm = [0, 3, 1, 2]>(td)
        g = Gelu(back)
        gm = Reshape(g, shape)
        gm -> y""",
    "linear layer on tokens": """
        md = DequantizeLinear(m, sw, zs8)
        bd = DequantizeLinear(b, sb, zb)
        x -> xd
        p = MatMul(xd, md)
        sum = Add(p, bd)
        sum -> y""",
    "SiLU with a detour": """
        x -> xd
        row = Reshape(xd, row_shape)
        row -> rd
        g = Sigmoid(rd)
        g -> gd
        back = Reshape(gd, shape)
        back -> bd
        h = Mul(xd, bd)
        h -> y""",
    "SiLU with a slope": """
        x -> xd
        half_q = QuantizeLinear(half, s, z)
        half_d = DequantizeLinear(half_q, s, z)
        steep = Mul(xd, half_d)
        steep -> sd
        g = Sigmoid(sd)
        g -> gd
        h = Mul(xd, gd)
        h -> y""",
    "eight bits by eight bits": """
        x -> xd -> z8
        p = MatMul(xd, xd)
        p -> y""",
}

BAD: dict[str, tuple[str, str]] = {
    "no pair between two ops": (
        """
        x -> xd
        g = Gelu(xd)
        h = Tanh(g)
        h -> y""",
        r"block.h/Tanh \(Tanh\) reads block.g/Gelu",
    ),
    "no pair behind a move": (
        """
        x -> xd
        g = Gelu(xd)
        t = Reshape(g, shape)
        h = Tanh(t)
        h -> y""",
        "block.h/Tanh .* reads block.g/Gelu",
    ),
    "a function that resizes": (
        """
        x -> xd
        g = Gelu(xd)
        h = Resize<mode = "nearest">(g, , , shape)
        h -> y""",
        "block.h/Resize .* reads block.g/Gelu",
    ),
    "an input read as floats": (
        """
        g = Gelu(x)
        g -> y""",
        "block.g/Gelu .* reads x\n",
    ),
    "a constant in floats": (
        """
        x -> xd
        g = Mul(xd, half)
        g -> y""",
        "block.g/Mul .* reads half\n",
    ),
    "an output without a pair": (
        """
        x -> xd
        y = Gelu(xd)""",
        "the output y reads block.y/Gelu",
    ),
    "SiLU in one": (
        """
        x -> xd
        g = Sigmoid(xd)
        h = Mul(xd, g)
        h -> y""",
        r"block.h/Mul \(Mul\) reads block.g/Sigmoid",
    ),
    "a tensor times its own sigmoid": (
        """
        x -> xd
        g = Sigmoid(xd)
        g -> gd
        h = Mul(gd, xd)
        h -> y""",
        "block.h/Mul: a tensor times its own sigmoid",
    ),
    "group normalisation": (
        """
        x -> xd
        bd = DequantizeLinear(b, sb, zb)
        g = GroupNormalization<num_groups = 4>(xd, bd, bd)
        g -> y""",
        "block.g/GroupNormalization: group normalisation",
    ),
    "expand": (
        """
        x -> xd
        g = Expand(xd, shape)
        g -> y""",
        "block.g/Expand: an expanded axis",
    ),
    "second operand that would be narrowed": (
        """
        x -> xd
        p = MatMul(xd, xd)
        p -> y""",
        "block.p/MatMul: its second operand is uint16",
    ),
    "the same behind a move": (
        """
        x -> xd
        t = Transpose<perm = [0, 1, 3, 2]>(xd)
        p = MatMul(xd, t)
        p -> y""",
        "block.p/MatMul: its second operand is uint16",
    ),
    "eight bits by sixteen": (
        """
        x -> xd -> z8
        x -> xu
        xu -> xs -> zs
        p = MatMul(xd, xs)
        p -> y""",
        "block.p/MatMul: a 16-bit second operand",
    ),
    "a bias in floats": (
        """
        wd = DequantizeLinear(w, sw, zs8)
        bias_q = QuantizeLinear(bf, s, z8)
        bd = DequantizeLinear(bias_q, s, z8)
        x -> xd
        c = Conv(xd, wd, bd)
        c -> y""",
        "block.c/Conv .*bias is not int32",
    ),
    "a norm's bias": (
        """
        bias_q = QuantizeLinear(bf, s, z8)
        bd = DequantizeLinear(bias_q, s, z8)
        x -> xd
        c = InstanceNormalization(xd, bd, bd)
        c -> y""",
        "block.c/InstanceNormalization .*bias is not int32",
    ),
    "a bias for another input": (
        """
        wd = DequantizeLinear(w, sw, zs8)
        bd = DequantizeLinear(b, wrong, zb)
        x -> xd
        c = Conv(xd, wd, bd)
        c -> y""",
        "block.c/Conv: its bias is stored for another input",
    ),
    "weights that use few integers": (
        """
        wd = DequantizeLinear<axis = 0>(few, sws)
        x -> xd
        c = Conv(xd, wd)
        c -> y""",
        "block.c/Conv: weights stored as integers up to 1 where 127",
    ),
    "a signed activation": (
        """
        x -> xd
        g = Gelu(xd)
        g -> y -> zs""",
        "block.y_q/QuantizeLinear: a signed activation",
    ),
}


@pytest.mark.parametrize("case", GOOD)
def test_graphs_that_pass(case: str) -> None:
    model = qdq(GOOD[case])
    check_quantised(model)


@pytest.mark.parametrize("case", BAD)
def test_graphs_that_do_not(case: str) -> None:
    body, message = BAD[case]
    model = qdq(body)
    with pytest.raises(ExportError, match=message) as caught:
        check_quantised(model)
    assert caught.value.next_step
    if case != "a signed activation":
        check_quantised(model, lambda path: path.startswith("block"))


def test_every_gap_is_named_up_to_eight() -> None:
    chain = ["x -> v0", *(f"v{i + 1} = Gelu(v{i})" for i in range(10)), "v10 -> y"]
    with pytest.raises(ExportError, match=r"and 1 more\n") as caught:
        check_quantised(qdq("\n".join(chain)))
    for i in range(2, 10):
        assert f"block.v{i}/Gelu (Gelu) reads block.v{i - 1}/Gelu (Gelu)" in caught.value.what


def test_integers_at_the_interface_are_refused() -> None:
    model = qdq("x -> y")
    model.graph.inputs[0].dtype = ir.DataType.UINT16
    with pytest.raises(ExportError, match=r"^x: an input or output that is not float32"):
        check_quantised(model)


def test_relabelling_changes_no_value() -> None:
    model = qdq("x -> xd \n p = MatMul(xd, xd) \n p -> y")
    before = onnx.reference.ReferenceEvaluator(ir.to_proto(model))
    inputs = {"x": np.random.default_rng(0).normal(size=(2, 8, 4, 4)).astype(np.float32)}
    (expected,) = before.run(None, inputs)
    relabel(model)
    relabelled = ir.to_proto(model)
    onnx.checker.check_model(relabelled, full_check=True)
    check_operands(model)
    (after,) = onnx.reference.ReferenceEvaluator(relabelled).run(None, inputs)
    assert np.array_equal(after, expected)


def test_an_asymmetric_range_can_not_be_relabelled() -> None:
    model = qdq("x -> xd -> odd \n p = MatMul(xd, xd) \n p -> y")
    with pytest.raises(ExportError, match=r"block.p/MatMul: .*not symmetric"):
        relabel(model)


def test_weights_are_not_relabelled() -> None:
    model = qdq(GOOD["linear layer on tokens"])
    before = ir.to_proto(model)
    relabel(model)
    assert ir.to_proto(model) == before


# ---- what was lost ----


def test_conditioning_is_the_share_that_is_left() -> None:
    rng = np.random.default_rng(0)
    samples = [{name: rng.normal(size=(4, 4)) for name in "abc"} for _ in range(3)]

    def reference(inputs: Tensors) -> np.ndarray:
        return 2 * inputs["a"] + inputs["b"]

    def run(inputs: Tensors) -> np.ndarray:
        return inputs["a"] + 5

    moved, expected = (answers(f, samples, [f(s) for s in samples]) for f in (run, reference))
    assert conditioning(moved, expected) == pytest.approx({"a": 0.5, "b": 0, "c": 1})
    assert conditioning(expected, moved) == pytest.approx({"a": 2, "b": np.inf, "c": 1})
    once = answers(reference, samples, [reference(samples[0])])
    change = samples[1]["b"] - samples[0]["b"]
    assert once["b"] == pytest.approx(np.sqrt(np.mean(change * change)))


def test_conditioning_of_a_quantised_network(quantised: Quantised) -> None:
    samples = [sample(5), sample(6)]
    moved, expected = (
        answers(run, samples, [run(s) for s in samples]) for run in (quantised.run, quantised.run_float)
    )
    ratios = conditioning(moved, expected)
    assert [*ratios] == [*sample(0)]
    assert all(0.9 < ratio < 1.1 for ratio in ratios.values())


def test_conditioning_needs_another_sample() -> None:
    with pytest.raises(UsageError, match="two samples"):
        answers(lambda _: 0.0, [sample(0)], [np.zeros(1)])


def test_sensitivity_finds_the_block_that_costs_most() -> None:
    middle = nn.Sequential(nn.GELU(), nn.Tanh())
    little = quantise_little(middle, QuantScheme(rules=(QuantRule("middle.1", activations=8),)))
    inputs = little_sample(3)
    before = little.run(inputs)
    alone = sensitivity(little, inputs)
    assert set(alone) == {"first", "middle.0", "middle.1", "last"}
    assert [*alone.values()] == sorted(alone.values())
    assert alone["middle.1"] < alone["middle.0"] - 20
    assert np.array_equal(little.run(inputs), before), "the quantisers are back"


def test_blocks() -> None:
    blocks = {
        "up_blocks.1.resnets.0.spatial_res_block.conv1": "up_blocks.1.resnets.0",
        "mid_block.attentions.0.proj_in": "mid_block.attentions.0",
        "layers.11.self_attn.to_q": "layers.11",
        "encoder.blocks.1.act1.sigmoid": "encoder.blocks.1",
        "down_blocks.0.downsample.conv": "down_blocks.0.downsample.conv",
        "conv_in": "conv_in",
    }
    assert {path: block_of(path) for path in blocks} == blocks
