"""From a checkpoint to context binaries on the simulator, with a small model; gates are shown to close."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import jsonschema
import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from onnx import TensorProto
from torch import Tensor, nn

from mobilevd_deploy import verify
from mobilevd_deploy.artifact.artifact import Artifact
from mobilevd_deploy.artifact.manifest import Component, FileEntry
from mobilevd_deploy.artifact.partial import PartialArtifact
from mobilevd_deploy.base.processes import Steps
from mobilevd_deploy.base.progress import Progress
from mobilevd_deploy.base.tensors import psnr_db
from mobilevd_deploy.config.presets import load_preset
from mobilevd_deploy.config.recipe import Floors, QuantRule, Recipe, load_recipe, to_toml
from mobilevd_deploy.config.spec import ComponentName, ModelSpec
from mobilevd_deploy.deploy import deploy, stage_table
from mobilevd_deploy.errors import ArtifactError, ParityError, UsageError, VendorError
from mobilevd_deploy.model.checkpoint import Checkpoint, open_checkpoint
from mobilevd_deploy.model.interface import COMPONENTS, TensorSpec
from mobilevd_deploy.npu import ops
from mobilevd_deploy.npu.onnx_export import export_onnx
from mobilevd_deploy.quantize.calibration import choose_pictures, drawn_pictures
from mobilevd_deploy.quantize.judging import conditioning
from mobilevd_deploy.quantize.qdq import integer_type
from mobilevd_deploy.report.page import render_report
from mobilevd_deploy.runtime.pipeline import ClipJob, Pipeline
from mobilevd_deploy.stages import compile as compile_stages
from mobilevd_deploy.stages import quantise as quantise_stages
from mobilevd_deploy.stages.job import ExportJob, StageContext
from mobilevd_deploy.stages.records import Pieces
from tests.support.networks import write_checkpoint

pytestmark = pytest.mark.npu

SHIPPED = load_recipe("xiaomi-14-pro")
# Random weights make more of every rounding than trained ones do.
RECIPE = dataclasses.replace(
    SHIPPED,
    quant=dataclasses.replace(SHIPPED.quant, samples=2),
    floors=dataclasses.replace(SHIPPED.floors, quantised_sqnr_db=15, clip_psnr_db=15, simulator_db=35),
)


def small_model() -> ModelSpec:
    """The demo's layers at the demo's widths, with two levels and four frames."""
    demo = load_preset("demo").model
    unet = dataclasses.replace(
        demo.unet,
        block_out_channels=(32, 64),
        num_attention_heads=(2, 4),
        attention=(True, False),
        kept_temporal_blocks=("down_blocks.0.resnets.0", "up_blocks.1.attentions.0"),
    )
    return dataclasses.replace(demo, name="small", frames=4, unet=unet)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("small") / "small.safetensors", small_model())


@pytest.fixture(scope="module")
def halted(checkpoint: Path) -> Path:
    """The partial folder of an export that the compiler stopped: all that was quantised is there."""

    def stop(*_: object, **__: object) -> None:
        raise VendorError("the compiler was asked")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compile_stages, "compile_context", stop)
        with pytest.raises(VendorError, match="the compiler was asked"):
            deploy(checkpoint, RECIPE, checkpoint.parent / "halted")
    return checkpoint.parent / ".halted.partial"


@pytest.fixture(scope="module")
def artifact(checkpoint: Path, halted: Path) -> Artifact:
    return go_on(halted, checkpoint, checkpoint.parent / "npu")


def go_on(halted: Path, checkpoint: Path, output: Path, recipe: Recipe = RECIPE) -> Artifact:
    """Finish the export elsewhere; what is stopped stays as it is."""
    shutil.copytree(halted, output.with_name(f".{output.name}.partial"))
    return deploy(checkpoint, recipe, output)


def job_in(root: Path, components: tuple[Component, ...], recipe: Recipe = RECIPE) -> ExportJob:
    """Return an export in a folder that has an `artifact` and a `work` below it."""
    folder = SimpleNamespace(artifact=root / "artifact", work=root / "work")
    job = ExportJob(cast(Checkpoint, None), recipe, None, cast(PartialArtifact, folder))
    job.components = {cast(ComponentName, component.name): component for component in components}
    return job


def spoil(model: Path, factor: float) -> None:
    """Make a quantised graph believe that its output has another scale."""
    graph = onnx.load(model)
    last = next(node for node in graph.graph.node if node.output[0] == graph.graph.output[0].name)
    assert last.op_type == "DequantizeLinear"
    scale = next(tensor for tensor in graph.graph.initializer if tensor.name == last.input[1])
    value = onnx.numpy_helper.to_array(scale)
    name = f"{scale.name}_spoilt"
    graph.graph.initializer.append(onnx.numpy_helper.from_array((value * factor).astype(np.float32), name))
    last.input[1] = name
    onnx.save(graph, model, save_as_external_data=True, location=f"spoilt-{model.name}.data")


def test_every_component_has_a_binary_that_names_its_chip(artifact: Artifact) -> None:
    for component in artifact.manifest.components:
        (binary,) = component.npu
        assert (binary.target, binary.arch, binary.precision) == ("SM8650", 75, "w8a16")
        assert binary.sdk.startswith("v2.")
        (part,) = binary.parts
        assert b"soc_type=SM8650;arch=75" in (artifact.root / part.files["context"].path).read_bytes()
        wrapper = onnx.load(artifact.root / part.files["wrapper"].path)
        assert [value.name for value in wrapper.graph.input] == list(part.inputs)
        assert [value.name for value in wrapper.graph.output] == list(part.outputs)
        assert {"model", "quantised"} <= set(component.files)


def test_the_manifest_follows_its_schema_and_tells_the_quality(artifact: Artifact) -> None:
    schema = Path(compile_stages.__file__).parents[1] / "artifact" / "manifest.schema.json"
    jsonschema.validate(
        json.loads(artifact.manifest.to_json()), json.loads(schema.read_text(encoding="utf-8"))
    )
    assert set(artifact.manifest.drift) == {"onnx", "quantised", "npu.SM8650"}
    quality = artifact.manifest.quality
    assert quality is not None
    assert len(quality.sha256) == 4
    assert set(quality.conditioning["unet"]) == {"noise", "image_latents", "image_embeds"}
    assert {"aimet-torch", "onnxruntime-qnn"} <= set(artifact.manifest.tools)


def test_the_report_tells_it(artifact: Artifact) -> None:
    page = (artifact.root / "report.html").read_text(encoding="utf-8")
    assert "data:image/png;base64," in page
    for text in ("Quantisation", "NPU binaries", "SM8650", "Hexagon V75", "on the simulator"):
        assert text in page
    assert "img class" not in render_report(artifact.manifest, {})


def test_the_same_clip_from_all_three_forms(artifact: Artifact) -> None:
    picture = np.random.default_rng(0).uniform(-1, 1, (1, 3, 64, 128)).astype(np.float32)
    exact, quantised, simulated = (
        Pipeline.open(artifact, (provider,)).generate(picture, 0)
        for provider in ("CPUExecutionProvider", "quantised", "npu-sim")
    )
    assert psnr_db(exact, quantised, 2.0) > 15
    assert psnr_db(quantised, simulated, 2.0) > 30


def test_nothing_is_made_twice(artifact: Artifact, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("it was made again")

    monkeypatch.setattr(importlib.import_module("mobilevd_deploy.deploy"), "stage_table", fail)
    assert deploy(checkpoint, RECIPE, artifact.root) == artifact


# ---- verify ----


def test_verify_passes_what_was_made(artifact: Artifact) -> None:
    checks = verify.verify(artifact, simulate=True)
    assert [check for check in checks if not check.ok] == []
    assert {check.what for check in checks} >= {"files", "SM8650 binary", "quantised graph"}
    simulated = [check for check in checks if "simulated" in check.what]
    assert [check.component for check in simulated if check.component] == [
        component.name for component in artifact.manifest.components
    ]
    clips = {check.what: check.detail for check in checks if "clip" in check.what}
    assert [*clips] == [
        "quantised clip, PSNR",
        "simulated clip, PSNR",
        "simulated clip, against the quantised graphs', PSNR",
    ]
    assert all(detail.endswith("dB, floor 15 dB") for detail in clips.values())


def test_the_simulated_clip_is_made_of_what_the_binaries_gave_each_other(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = artifact.manifest.pipeline
    picture = drawn_pictures(spec.width, spec.height, 1, verify._SEED).values[0]
    clip = Pipeline.open(artifact, ["npu-sim"]).generate(picture, verify._SEED)
    compared: list[Any] = []

    def noted(expected: Any, given: Any, **options: Any) -> float:
        compared.append(given)
        return psnr_db(expected, given, **options)

    monkeypatch.setattr(verify, "psnr_db", noted)
    verify.verify(artifact, simulate=True)
    np.testing.assert_array_equal(compared[1], clip)
    np.testing.assert_array_equal(compared[2], clip)


def test_verify_says_what_is_too_large_for_the_simulator(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = max(component.flops for component in artifact.manifest.components)
    monkeypatch.setattr(verify, "SIMULATE_UP_TO_FLOPS", most - 1)
    checks = verify.verify(artifact, simulate=True)
    assert all(check.ok for check in checks)
    (large,) = (check for check in checks if "not simulated" in check.detail)
    (clip,) = (check for check in checks if "simulated clip" in check.what)
    assert f"there is none: {large.component} did not run" in clip.detail


@pytest.fixture
def copied(artifact: Artifact, tmp_path: Path) -> Path:
    return Path(shutil.copytree(artifact.root, tmp_path / "copy"))


def test_a_flipped_byte_in_any_file_is_found(copied: Path) -> None:
    for path in sorted(p for p in copied.rglob("*") if p.is_file()):
        original = path.read_bytes()
        path.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
        try:
            checks = verify.verify(Artifact.open(copied))
        except ArtifactError:
            pass  # the manifest itself, or its digest
        else:
            assert not all(check.ok for check in checks), path
        path.write_bytes(original)


def test_a_floor_that_is_not_met_fails(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    strict = dataclasses.replace(RECIPE, floors=dataclasses.replace(RECIPE.floors, quantised_sqnr_db=200))
    monkeypatch.setattr(verify, "from_dict", lambda *_: strict)
    failed = [check for check in verify.verify(artifact) if not check.ok]
    assert {check.what for check in failed} == {"quantised graph"}


# ---- the gates of the export ----


def test_pipeline_forms_that_an_artifact_lacks_are_refused(exported: dict[str, Artifact]) -> None:
    for provider in ("npu-sim", "quantised"):
        with pytest.raises(UsageError, match="--recipe") as caught:
            Pipeline.open(exported["onnx"], (provider,))
        assert "holds no" in caught.value.what or "xiaomi" in str(caught.value)


@pytest.mark.parametrize(
    ("floors", "message"),
    [
        (Floors(quantised_sqnr_db=200), "the quantised network vs float: .* the floor is 200 dB"),
        (Floors(quantised_sqnr_db=0, conditioning=0.9999999), "when image changes"),
    ],
)
def test_gates_stop_the_export_and_keep_the_stages(
    checkpoint: Path, tmp_path: Path, floors: Floors, message: str
) -> None:
    recipe = dataclasses.replace(RECIPE, floors=floors)
    with pytest.raises(ParityError, match=message):
        deploy(checkpoint, recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.partial" / "stages" / "calibrate.json").exists()


def test_a_dead_input_is_refused_even_where_the_outputs_are_close(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stable Diffusion lost its prompt this way at W8A16, with every other figure green."""
    monkeypatch.setattr(quantise_stages, "conditioning", lambda *_: {"image": 0.01})
    with pytest.raises(ParityError, match=r"0\.01 times as far"):
        deploy(checkpoint, RECIPE, tmp_path / "out")


class QuietInput(nn.Module):
    """Two inputs join and meet a convolution; the second says next to nothing beside the first."""

    def __init__(self) -> None:
        super().__init__()
        self.concat = ops.Concat(1)
        loud, quiet = torch.eye(4), 4 * torch.eye(4)
        self.conv = ops.conv2d(torch.cat((loud, quiet), 1)[:, :, None, None], torch.full((4,), 0.1))

    def forward(self, noise: Tensor, image_latents: Tensor) -> Tensor:
        return self.conv(self.concat(noise, image_latents))


def conditioning_of(job: ExportJob, name: ComponentName) -> dict[str, float]:
    quantised = quantise_stages.answers_of_quantised(job, name, Progress())
    return conditioning(quantised, quantise_stages.answers_of_float(job, name, Progress()))


@pytest.mark.parametrize("activations", [16, 8])
def test_an_input_that_eight_bits_kill_is_refused(
    activations: Literal[8, 16], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the joined range a step is larger than all that the quiet input ever says, and nobody misses it."""
    shape, size = (1, 4, 4, 4), 0.004
    inputs = (
        TensorSpec("noise", shape, "float32", "NCHW", None, "noise:0"),
        TensorSpec("image_latents", shape, "float32", "NCHW", None, "component:vae_encoder"),
    )
    network, rng = QuietInput().eval().requires_grad_(False), np.random.default_rng(0)
    (tmp_path / "work" / "calibration").mkdir(parents=True)
    for i in range(6):
        quiet = rng.uniform(-size, size, shape).astype(np.float32)
        job = ClipJob(np.zeros((1, 3, 32, 32), np.float32), i, {"vae_encoder": quiet})
        given = network(*(torch.from_numpy(value) for value in job.gather(inputs).values())).numpy()
        np.savez(
            tmp_path / "work" / "calibration" / f"{i}.npz", image=job.image, vae_encoder=quiet, unet=given
        )
    files = {"model": FileEntry("unet/model.onnx", "0" * 64, 0)}
    outputs = (TensorSpec("latents", shape, "float32", "NCHW"),)
    component = Component("unet", "onnx", files, inputs, outputs, 0, 0, {})
    recipe = dataclasses.replace(RECIPE, quant=dataclasses.replace(RECIPE.quant, activations=activations))
    export_onnx(network, job.gather(inputs), ["latents"], tmp_path / "artifact" / "unet", SHIPPED.onnx)
    monkeypatch.setattr(quantise_stages, "build_deploy_form", lambda *_: network)
    export = job_in(tmp_path, (component,), recipe)
    quantise_stages.run_aimet(export, "unet", Progress())
    ratios = conditioning_of(export, "unet")
    if activations == 16:
        assert ratios["image_latents"] == pytest.approx(1, abs=0.1)
        return
    with pytest.raises(ParityError, match=r"when image_latents changes, .* moves 0\.00 times as far"):
        quantise_stages.require_conditioning(export, "unet", ratios)


def test_a_written_graph_that_is_not_what_was_simulated_is_refused(
    artifact: Artifact, halted: Path, tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(halted, tmp_path / "copy"))
    job = job_in(copied, artifact.manifest.components)
    quality = artifact.manifest.quality
    assert quality is not None
    assert conditioning_of(job, "decoder") == pytest.approx(quality.conditioning["decoder"])
    spoil(copied / "artifact" / "decoder" / "quantised" / "model.onnx", 1.1)
    with pytest.raises(ParityError, match=r"decoder: the written graph vs AIMET: 2\d\.\d dB"):
        quantise_stages.answers_of_quantised(job, "decoder", Progress())


def test_a_clip_below_its_floor_fails(artifact: Artifact, halted: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(halted, tmp_path / "copy"))
    job = job_in(copied, artifact.manifest.components)
    context = StageContext(Steps(False, Progress()), cast(Pieces, None), Progress())
    quality = artifact.manifest.quality
    assert quality is not None
    assert quantise_stages.judge_clip(job, context).values["psnr_db"] == pytest.approx(quality.clip_psnr_db)
    spoil(copied / "artifact" / "decoder" / "quantised" / "model.onnx", 4)
    with pytest.raises(ParityError, match=r"clip is -?\d+\.\d dB PSNR .*, the floor is 15 dB"):
        quantise_stages.judge_clip(job, context)


def test_a_binary_that_computes_something_else_fails(
    checkpoint: Path, halted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler is given a graph that is a little wrong; only the simulator can tell."""
    real = compile_stages.compile_context

    def compile_wrongly(model: Path, *arguments: Any, **options: Any) -> Any:
        graph = onnx.load(model, load_external_data=False)
        last = next(node for node in reversed(graph.graph.node) if node.op_type in ("Conv", "Gemm", "MatMul"))
        weight = next(node for node in graph.graph.node if node.output[0] == last.input[1])
        scale = next(tensor for tensor in graph.graph.initializer if tensor.name == weight.input[1])
        scale.CopyFrom(onnx.numpy_helper.from_array(1.1 * onnx.numpy_helper.to_array(scale), scale.name))
        wrong = model.with_name("wrong.onnx")
        onnx.save(graph, wrong)
        return real(wrong, *arguments, **options)

    monkeypatch.setattr(compile_stages, "compile_context", compile_wrongly)
    with pytest.raises(ParityError, match=r"image_encoder: the simulator vs AIMET: .* the floor is 35 dB"):
        go_on(halted, checkpoint, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


# ---- other recipes, to the end ----


def test_blocks_of_eight_bits_compile_and_agree(checkpoint: Path, halted: Path, tmp_path: Path) -> None:
    """What `tune` writes: rules for blocks of the UNet, in a file; the other components are as they were."""
    rules = (
        QuantRule("down_blocks.0.*", activations=8, component="unet"),
        QuantRule("mid_block.resnets.0.*", weights=16, component="unet"),
    )
    floors = dataclasses.replace(RECIPE.floors, quantised_sqnr_db=8, clip_psnr_db=8)
    recipe = dataclasses.replace(RECIPE, floors=floors, quant=dataclasses.replace(RECIPE.quant, rules=rules))
    path = tmp_path / "mixed.toml"
    path.write_text(to_toml(recipe), encoding="utf-8")
    artifact = deploy(checkpoint, load_recipe(path), tmp_path / "out")
    simulated = artifact.manifest.drift["npu.SM8650"]["unet"]
    assert simulated == pytest.approx(artifact.manifest.drift["quantised"]["unet"], abs=2)
    kinds = {
        integer_type(node)
        for node in onnx_ir.load(artifact.root / "unet" / "quantised" / "model.onnx").graph
        if node.op_type == "QuantizeLinear" and node.name.startswith("down_blocks.0.resnets")
    }
    assert kinds == {onnx_ir.DataType.UINT8}
    decoder = onnx.load(artifact.root / "decoder" / "quantised" / "model.onnx")
    assert TensorProto.UINT8 not in {tensor.data_type for tensor in decoder.graph.initializer}
    failed = [check for check in verify.verify(artifact, simulate=True) if not check.ok]
    assert failed == []


def test_w8a8_goes_all_the_way(checkpoint: Path, tmp_path: Path) -> None:
    shipped = load_recipe("xiaomi-14-pro-w8a8")
    recipe = dataclasses.replace(
        shipped,
        quant=dataclasses.replace(shipped.quant, samples=2),
        floors=dataclasses.replace(shipped.floors, quantised_sqnr_db=5, clip_psnr_db=5, conditioning=0.5),
    )
    artifact = deploy(checkpoint, recipe, tmp_path / "out")
    for component in artifact.manifest.components:
        assert component.npu[0].precision == "w8a8"
        quantised, simulated = (
            artifact.manifest.drift[stage][component.name] for stage in ("quantised", "npu.SM8650")
        )
        assert simulated == pytest.approx(quantised, abs=3), component.name


def test_two_parts_are_compiled_and_run_in_a_row(
    checkpoint: Path, halted: Path, artifact: Artifact, tmp_path: Path
) -> None:
    recipe = dataclasses.replace(RECIPE, npu=dataclasses.replace(RECIPE.npu, parts=2))
    cut = go_on(halted, checkpoint, tmp_path / "cut", recipe)
    (binary,) = cut.manifest.components[2].npu
    assert len(binary.parts) == 2
    assert binary.parts[0].inputs[0] == "noise"
    assert set(binary.parts[1].inputs) & set(binary.parts[0].outputs)
    whole, parts = (a.manifest.drift["npu.SM8650"]["unet"] for a in (artifact, cut))
    assert parts == pytest.approx(whole, abs=0.5)
    assert not [*(cut.root / "unet" / "quantised").glob("*of2*")]
    assert [check for check in verify.verify(cut, simulate=True) if not check.ok] == []
    # Once more over the finished artifact, whose graphs are taken over.
    recipe = dataclasses.replace(recipe, npu=dataclasses.replace(RECIPE.npu, parts=3))
    (again,) = deploy(checkpoint, recipe, cut.root).manifest.components[2].npu
    assert len(again.parts) == 3


def test_parts_that_were_compiled_before_a_stop_stay(
    checkpoint: Path, halted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = dataclasses.replace(RECIPE, npu=dataclasses.replace(RECIPE.npu, parts=3))
    real, compiled = compile_stages.compile_context, list[str]()

    def stop_at_the_second(model: Path, *arguments: Any, **options: Any) -> Any:
        if "of3" in model.name:
            if len(compiled) == 1:
                raise KeyboardInterrupt
            compiled.append(model.name)
        return real(model, *arguments, **options)

    def refuse(*_: Any) -> None:
        raise AssertionError("the parts were compared already")

    monkeypatch.setattr(compile_stages.os, "cpu_count", lambda: 1)  # one after the other
    monkeypatch.setattr(compile_stages, "compile_context", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        go_on(halted, checkpoint, tmp_path / "cut", recipe)
    monkeypatch.setattr(compile_stages, "check_parts", refuse)
    monkeypatch.setattr(
        compile_stages, "compile_context", lambda m, *a, **o: compiled.append(m.name) or real(m, *a, **o)
    )
    (binary,) = deploy(checkpoint, recipe, tmp_path / "cut").manifest.components[2].npu
    assert len(binary.parts) == 3
    assert sorted(name for name in compiled if "of3" in name) == [f"model-{n}of3.onnx" for n in (1, 2, 3)]


def test_the_table_names_every_stage_that_runs(artifact: Artifact, checkpoint: Path) -> None:
    def names(recipe: Recipe) -> list[str]:
        pictures = choose_pictures(small_model(), recipe, ())
        folder = cast(PartialArtifact, None)
        table = stage_table(ExportJob(open_checkpoint(checkpoint), recipe, pictures, folder))
        return [stage.name for stage in table]

    exports = [f"export {name}" for name in COMPONENTS]
    # A stage of several steps is followed by their costs, as "<stage>: <step>".
    assert names(RECIPE) == [name for name in artifact.manifest.stages if ":" not in name]
    assert names(Recipe("float")) == exports
    assert names(dataclasses.replace(RECIPE, quant=None)) == [
        *exports,
        "calibrate",
        *(f"ranges {name}" for name in COMPONENTS),
        *(f"{stage} {name} SM8650" for name in COMPONENTS for stage in ("compile", "simulate")),
    ]


def test_large_components_are_not_simulated_and_say_so(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compile_stages, "SIMULATE_UP_TO_FLOPS", 0)
    heard: list[str] = []

    class Heard(Progress):
        def say(self, sentence: str) -> None:
            heard.append(sentence)

    component = artifact.manifest.components[0]
    job = job_in(Path(), (component,))
    assert compile_stages.run_simulator(job, "image_encoder", "SM8650", Heard()).values == {
        "simulated": False
    }
    assert "not simulated" in heard[0]


# ---- ranges ----


def test_the_largest_magnitude_of_every_layer_is_found() -> None:
    network = nn.Sequential(nn.Identity(), nn.Sequential(nn.ReLU()))
    samples = ({"x": np.array(values, np.float32)} for values in ([1, -70000], [3, 2]))
    assert compile_stages.largest_magnitudes(network, samples) == {"0": 70000, "1.0": 3}
    assert all(not module._forward_hooks for module in network.modules())
    # A NaN must not be forgotten over what comes behind it.
    broken = ({"x": np.array([value], np.float32)} for value in (float("nan"), 1))
    assert math.isnan(compile_stages.largest_magnitudes(network, broken)["0"])


def test_what_float16_does_not_hold_is_said_before_the_compiler_is_asked(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str] = []

    class Heard(Progress):
        def say(self, sentence: str) -> None:
            heard.append(sentence)

    def stop(*_: object, **__: object) -> None:
        raise VendorError("the compiler was asked")

    monkeypatch.setattr(
        compile_stages, "largest_magnitudes", lambda *_: {"blocks.0.conv": 70000.0, "fine": 1.0}
    )
    monkeypatch.setattr(compile_stages, "compile_context", stop)
    with pytest.raises(VendorError, match="the compiler was asked"):
        deploy(checkpoint, dataclasses.replace(RECIPE, quant=None), tmp_path / "out", progress=Heard())
    said = [sentence for sentence in heard if "float16-range" in sentence]
    assert said == [
        "image_encoder: blocks.0.conv: reaches 70000; float16 ends at 65504 [float16-range; IEEE 754]"
    ]
    assert (tmp_path / ".out.partial" / "stages" / "ranges unet.json").exists()


# ---- another chip ----


def test_another_chip_costs_its_compilation_alone(
    artifact: Artifact, checkpoint: Path, tmp_path: Path
) -> None:
    ran: list[str] = []

    class Heard(Progress):
        def begin(self, stage: str) -> None:
            ran.append(stage)

        def end(self, *, reused: bool = False) -> None:
            if reused:
                ran.pop()

    # As the export left it.
    output = tmp_path / "npu"
    shutil.copytree(artifact.root, output)
    shutil.copytree(artifact.root.with_name(".npu.partial"), tmp_path / ".npu.partial")
    assert RECIPE.quant
    assert RECIPE.npu
    other = dataclasses.replace(RECIPE, npu=dataclasses.replace(RECIPE.npu, targets=("SM8750",)))
    second = deploy(checkpoint, other, output, Heard())
    names = [component.name for component in second.manifest.components]
    assert ran == [f"{what} {name} SM8750" for name in names for what in ("compile", "simulate")]
    assert [b.target for c in second.manifest.components for b in c.npu] == ["SM8750"] * len(names)
    quantised = [c.files["quantised"].sha256 for c in artifact.manifest.components]
    assert [c.files["quantised"].sha256 for c in second.manifest.components] == quantised
    # What another export writes must not reach into the artifact that still stands there.
    wider = dataclasses.replace(RECIPE.quant, headroom=2)
    refused = dataclasses.replace(
        other, quant=wider, floors=dataclasses.replace(RECIPE.floors, simulator_db=500)
    )
    with pytest.raises(ParityError, match=r"the written graph vs AIMET: .* the floor is 500 dB"):
        deploy(checkpoint, refused, output)
    second.verify()
