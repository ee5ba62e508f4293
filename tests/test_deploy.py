"""From checkpoint to artifact: what is written, what is reused, and what happens when it goes wrong.

Exports cost seconds, so few tests but those of the session's two artifacts call the real exporter. Where a
test is about the flow around it, a copy of the files that it wrote there takes its place (`borrowed`);
rewrites, deploy form, onnxruntime and parity are real everywhere.
"""

from __future__ import annotations

import dataclasses
import errno
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import nn

import mobilevd_deploy
from mobilevd_deploy.artifact.artifact import Artifact
from mobilevd_deploy.artifact.partial import PartialArtifact
from mobilevd_deploy.base.progress import Progress
from mobilevd_deploy.base.tensors import sqnr_db
from mobilevd_deploy.config.presets import load_preset
from mobilevd_deploy.config.recipe import Floors, Recipe, load_recipe
from mobilevd_deploy.deploy import deploy
from mobilevd_deploy.errors import (
    CheckpointError,
    ExportError,
    MobileVDError,
    ParityError,
    ResourceError,
    RewriteError,
    UsageError,
)
from mobilevd_deploy.model.checkpoint import open_checkpoint
from mobilevd_deploy.model.components import build_component, deploy_contract
from mobilevd_deploy.model.interface import COMPONENTS, component_tensors, input_shapes
from mobilevd_deploy.model.unet import MobileVDUNet
from mobilevd_deploy.runtime.noise import unit_noise
from mobilevd_deploy.runtime.pipeline import Pipeline
from mobilevd_deploy.stages import export as stages_export
from tests.support.networks import TINY_MODEL, write_checkpoint

flow = importlib.import_module("mobilevd_deploy.deploy")  # the name in the package is the function

RECIPE = load_recipe("onnx")
PARTIAL = ".model.partial"


class Heard(Progress):
    """Keeps what it is told: sentences, and stages that ran or were found done."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.ran: list[str] = []
        self.reused: list[str] = []
        self._stage = ""

    def begin(self, stage: str) -> None:
        self._stage = stage.removeprefix("export ")

    def end(self, *, reused: bool = False) -> None:
        (self.reused if reused else self.ran).append(self._stage)

    def say(self, sentence: str) -> None:
        self.said.append(sentence)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "model"


@pytest.fixture
def borrowed(monkeypatch: pytest.MonkeyPatch, exported: dict[str, Artifact]) -> list[str]:
    """The exporter replaced by a copy of what it wrote for the session; names of what was asked for."""
    asked: list[str] = []

    def copy(_: nn.Module, __: Any, ___: Any, folder: Path, ____: Any) -> tuple[str, ...]:
        asked.append(folder.name)
        shutil.copytree(exported["onnx"].root / folder.name, folder, dirs_exist_ok=True)
        return ()

    monkeypatch.setattr(stages_export, "export_onnx", copy)
    return asked


def stop_at(monkeypatch: pytest.MonkeyPatch, component: str, act: Callable[[], None]) -> None:
    """Let `act` happen where the component's deploy form is built."""
    build = stages_export.build_npu

    def built(name: Any, *rest: Any) -> nn.Module:
        if name == component:
            act()
        return build(name, *rest)

    monkeypatch.setattr(stages_export, "build_npu", built)


def throw(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


def times(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.stat().st_ino) for p in sorted(folder.rglob("*"))
    }


def finished_by(output: Path, checkpoint: Path, recipe: Recipe = RECIPE) -> Heard:
    """Run to the end, check that nothing but a whole artifact is left, and tell what was heard."""
    heard = Heard()
    artifact = deploy(checkpoint, recipe, output, heard)
    assert Artifact.open(output) == artifact
    artifact.verify()
    assert not (output.parent / f".{output.name}.partial").exists()
    return heard


# ---- the artifact ----


def test_manifest_tells_what_was_made(exported: dict[str, Artifact], tiny_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint)
    package = Path(mobilevd_deploy.__file__).parent
    schema = json.loads((package / "artifact" / "manifest.schema.json").read_text())
    for name, artifact in exported.items():
        artifact.verify()
        jsonschema.Draft202012Validator(schema).validate(
            json.loads((artifact.root / "manifest.json").read_text())
        )
        manifest = artifact.manifest
        recipe = load_recipe(name)
        assert (manifest.name, manifest.source.name) == (name, "tiny.safetensors")
        assert manifest.source.sha256 == checkpoint.sha256
        assert manifest.recipe == json.loads(json.dumps(recipe.to_dict()))
        assert manifest.model == json.loads(json.dumps(checkpoint.spec.to_dict()))
        kept = (TINY_MODEL.unet.kept_temporal_blocks, manifest.model["unet"]["kept_temporal_blocks"])
        assert set(kept[0] or ()) == set(kept[1])
        assert tuple(c.name for c in manifest.components) == COMPONENTS
        expected = [*recipe.passes, *(["subpixel-upsampling"] if recipe.graph.upsample == "subpixel" else [])]
        assert [report.name for report in manifest.passes] == expected
        assert list(manifest.stages) == [f"export {component}" for component in COMPONENTS]
        assert all(cost.seconds > 0 and cost.peak_bytes > 0 for cost in manifest.stages.values())
        assert set(manifest.tools) >= {"python", "torch", "onnx", "onnxruntime", "onnxsim", "mobilevd-deploy"}
        assert list(manifest.files) == ["report"]


def test_drift_of_every_component_is_measured(exported: dict[str, Artifact]) -> None:
    for artifact in exported.values():
        drift = artifact.manifest.drift["onnx"]
        assert tuple(drift) == COMPONENTS
        for name, value in drift.items():
            # Float32 on another engine: near, and not the same numbers compared with themselves.
            assert value is not None, name
            assert 90 <= value < 200, name
        for report in artifact.manifest.passes:
            assert report.sqnr_db is None or report.sqnr_db >= 90


def test_contract_is_that_of_the_components(exported: dict[str, Artifact]) -> None:
    for name in COMPONENTS:
        inputs, (out,) = component_tensors(name, TINY_MODEL)
        assert {t.name: t.shape for t in inputs} == input_shapes(TINY_MODEL, name)
        with torch.device("meta"):
            module = deploy_contract(build_component(TINY_MODEL, name))
            result = module(*(torch.empty(t.shape) for t in inputs))
        assert tuple(result.shape) == out.shape
        component = exported["onnx"].manifest.component(name)
        assert (component.inputs, component.outputs) == (inputs, (out,))


def test_a_clean_picture_asks_for_no_noise() -> None:
    clean = dataclasses.replace(TINY_MODEL, step=dataclasses.replace(TINY_MODEL.step, noise_aug_strength=0.0))
    assert [t.name for t in component_tensors("vae_encoder", clean)[0]] == ["image"]


def test_nothing_of_this_machine_gets_into_the_artifact(
    exported: dict[str, Artifact], tiny_checkpoint: Path
) -> None:
    places = [tiny_checkpoint.parent, Path.cwd(), Path.home(), Path(torch.__file__).parents[1]]
    for artifact in exported.values():
        for path in filter(Path.is_file, artifact.root.rglob("*")):
            assert path.stat().st_mode == (artifact.root / "manifest.json").stat().st_mode, path
            content = path.read_bytes()
            for place in (*places, artifact.root.parent):
                if len(place.parts) > 2:
                    assert str(place).encode() not in content, path


@torch.no_grad()
def reference_clip(checkpoint: Path, image: NDArray[Any], seed: int) -> NDArray[Any]:
    """What the trained networks make of a picture, in float64: no rewrite, no manifest, no pipeline."""
    opened = open_checkpoint(checkpoint)
    spec = opened.spec
    image_encoder, vae_encoder, unet, decoder = (opened.load(name, torch.float64) for name in COMPONENTS)
    height, width = spec.latent_size

    def noise(stream: int, *shape: int) -> torch.Tensor:
        return torch.from_numpy(unit_noise(seed, stream, shape).astype(np.float32)).double()

    picture = torch.from_numpy(image).double()
    embeds = image_encoder(picture)
    latents = vae_encoder(picture, noise(1, 1, 3, spec.height, spec.width))
    assert isinstance(unet, MobileVDUNet)
    # The denoising step as the paper and diffusers write it, from the network's plain forward.
    sigma, step = spec.step.sigma, spec.step
    unit = noise(0, spec.frames, 4, height, width)
    x = (sigma**2 + 1) ** 0.5 * unit
    stacked = torch.cat([x / (sigma**2 + 1) ** 0.5, latents.expand(spec.frames, -1, -1, -1)], 1)
    ids = torch.tensor([[step.fps - 1, step.motion_bucket_id, step.noise_aug_strength]], dtype=torch.float64)
    predicted = unet(stacked[None], 0.25 * np.log(sigma), embeds[:, None], ids)[0]
    denoised = x / (sigma**2 + 1) - sigma / (sigma**2 + 1) ** 0.5 * predicted
    return decoder(denoised).numpy()


def test_clips_are_the_trained_networks(exported: dict[str, Artifact], tiny_checkpoint: Path) -> None:
    image = np.random.default_rng(5).uniform(-1, 1, (1, 3, 48, 80)).astype(np.float32)
    clips = {name: Pipeline.open(artifact).generate(image, 11) for name, artifact in exported.items()}
    expected = reference_clip(tiny_checkpoint, image, 11)
    assert expected.shape == (4, 3, 48, 80)
    for name, clip in clips.items():
        assert sqnr_db(expected, clip) >= 90, name
    assert sqnr_db(clips["onnx"], clips["npu-float"]) >= 90
    # The comparison can fail: each of picture, seed and order of frames matters.
    assert sqnr_db(expected, Pipeline.open(exported["onnx"]).generate(image, 12)) < 40
    assert sqnr_db(expected, Pipeline.open(exported["onnx"]).generate(-image, 11)) < 40
    assert sqnr_db(expected, clips["onnx"][::-1]) < 40


def test_rewrites_are_proven_on_sizes_that_the_network_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    # Latents of 32x6 and 32x8 are no multiples of one another; both are larger than the probe.
    narrow = dataclasses.replace(TINY_MODEL, height=256, width=48)
    unet = build_component(narrow, "unet")
    assert isinstance(unet, MobileVDUNet)
    unet.reset_gates()
    seen: list[tuple[int, ...]] = []
    monkeypatch.setattr(
        stages_export, "run_passes", lambda _, __, probe, ___: seen.append(tuple(probe.noise.shape))
    )
    heard = Heard()
    stages_export._rewrite(unet, narrow, RECIPE, heard)
    stages_export._rewrite(unet, dataclasses.replace(narrow, width=64), RECIPE, heard)
    stages_export._rewrite(unet, TINY_MODEL, RECIPE, heard)
    stages_export._rewrite(
        unet, load_preset("mobilevd-hd").model, RECIPE, heard
    )  # 72 rows are not to be halved to 9
    assert [shape[-2:] for shape in seen] == [(8, 16), (8, 16), (6, 10), (8, 16)]
    assert heard.said == ["unet: rewrites are checked on latents of 16x8, the export at full size"] * 3


# ---- again ----


def test_a_second_run_returns_what_is_there(
    exported: dict[str, Artifact], tiny_checkpoint: Path, borrowed: list[str]
) -> None:
    artifact = exported["onnx"]
    before, heard = times(artifact.root), Heard()
    assert deploy(tiny_checkpoint, RECIPE, artifact.root, heard) == artifact
    assert times(artifact.root) == before
    assert heard.said == [f"{artifact.root}: nothing has changed since it was made, so it stays as it is"]
    assert heard.ran == heard.reused == borrowed == []


@pytest.mark.parametrize("change", ["recipe", "checkpoint", "tools", "damage"])
def test_anything_else_replaces_it(
    change: str,
    exported: dict[str, Artifact],
    tiny_checkpoint: Path,
    output: Path,
    borrowed: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(exported["onnx"].root, output)
    recipe, checkpoint = RECIPE, tiny_checkpoint
    if change == "recipe":
        recipe = dataclasses.replace(RECIPE, floors=Floors(onnx_sqnr_db=80))
    elif change == "checkpoint":
        checkpoint = write_checkpoint(output.parent / "same-weights.pt")
    elif change == "tools":
        tools = flow.tool_versions(RECIPE) | {"onnxsim": "99"}
        monkeypatch.setattr(flow, "tool_versions", lambda recipe: tools)
    else:
        data = output / "unet" / "model.onnx.data"
        data.write_bytes(data.read_bytes()[:-1] + b"!")
    kept: list[bool] = []
    stop_at(monkeypatch, "decoder", lambda: kept.append(Artifact.open(output).manifest.name == "onnx"))
    heard = finished_by(output, checkpoint, recipe)
    assert kept == [True], "the old artifact has to be there until the new one is"
    assert heard.ran == borrowed == list(COMPONENTS)
    manifest = Artifact.open(output).manifest
    assert manifest.name == "model"
    assert manifest.source.name == checkpoint.name
    assert manifest.recipe["floors"]["onnx_sqnr_db"] == recipe.floors.onnx_sqnr_db


def test_a_failed_run_keeps_the_old_artifact(
    exported: dict[str, Artifact],
    tiny_checkpoint: Path,
    output: Path,
    borrowed: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(exported["onnx"].root, output)
    before = times(output)
    strict = dataclasses.replace(RECIPE, floors=Floors(onnx_sqnr_db=250))
    with pytest.raises(ParityError, match="the floor is 250 dB"):
        deploy(tiny_checkpoint, strict, output)
    assert times(output) == before
    # What the strict run left behind is of no use to the old recipe, and in nobody's way.
    heard = Heard()
    deploy(tiny_checkpoint, RECIPE, output, heard)
    assert times(output) == before
    assert "nothing has changed" in heard.said[0]


# ---- interrupted ----


def test_a_wrong_weight_is_found(
    tiny_checkpoint: Path, output: Path, borrowed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, build = stages_export.export_onnx, stages_export.build_npu

    def perturbed(name: Any, *rest: Any) -> nn.Module:
        module = build(name, *rest)
        if name == "decoder":
            weight = next(p for p in module.parameters() if p.ndim == 4)
            weight.data = weight.data.clone()
            weight.data[0, 0] *= 1.01  # one kernel of many, by a hundredth
        return module

    from mobilevd_deploy.npu.onnx_export import export_onnx

    with monkeypatch.context() as patch:
        patch.setattr(stages_export, "build_npu", perturbed)
        patch.setattr(
            stages_export, "export_onnx", lambda *a: export_onnx(*a) if a[3].name == "decoder" else copy(*a)
        )
        with pytest.raises(
            ParityError, match=r"decoder: .* dB from the trained network, the floor is 90"
        ) as e:
            deploy(tiny_checkpoint, RECIPE, output)
    assert e.value.next_step
    assert not output.exists()
    assert (output.parent / PARTIAL).is_dir()
    heard = finished_by(output, tiny_checkpoint)
    assert heard.reused == ["image_encoder", "vae_encoder", "unet"]
    assert heard.ran == ["decoder"]


CHILD = """
import os, shutil, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from mobilevd_deploy import deploy
from mobilevd_deploy.stages import export
from mobilevd_deploy.config.recipe import load_recipe

finished, checkpoint, output = sys.argv[1:]

def copy(module, inputs, outputs, folder, options):
    shutil.copytree(Path(finished) / folder.name, folder)
    if folder.name == "unet":
        data = folder / "model.onnx.data"
        os.truncate(data, data.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    return ()

export.export_onnx = copy
deploy(checkpoint, load_recipe("onnx"), output)
"""


@pytest.mark.slow
def test_killed_while_the_unet_is_written(
    exported: dict[str, Artifact], tiny_checkpoint: Path, output: Path, borrowed: list[str]
) -> None:
    arguments = [sys.executable, "-c", CHILD, exported["onnx"].root, tiny_checkpoint, output]
    killed = subprocess.run(arguments, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not output.exists()
    heard = finished_by(output, tiny_checkpoint)
    assert heard.reused == ["image_encoder", "vae_encoder"]
    assert heard.ran == borrowed == ["unet", "decoder"]


def test_a_stage_of_another_recipe_or_with_changed_files_is_not_reused(
    tiny_checkpoint: Path, output: Path, borrowed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt_at_unet() -> None:
        with monkeypatch.context() as patch:
            stop_at(patch, "unet", throw(KeyboardInterrupt()))
            with pytest.raises(KeyboardInterrupt):
                deploy(tiny_checkpoint, RECIPE, output)

    interrupt_at_unet()
    assert not output.exists()
    data = output.parent / PARTIAL / "artifact" / "vae_encoder" / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-1] + b"!")
    interrupt_at_unet()
    assert borrowed == ["image_encoder", "vae_encoder", "vae_encoder"]
    borrowed.clear()
    relaxed = dataclasses.replace(RECIPE, floors=Floors(onnx_sqnr_db=85))
    assert finished_by(output, tiny_checkpoint, relaxed).reused == []
    assert borrowed == list(COMPONENTS)


# ---- full disks, failing exporters, foreign folders ----


def test_a_disk_without_room_is_named_before_the_work(
    tiny_checkpoint: Path, output: Path, borrowed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(output.parent)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000))
        with pytest.raises(ResourceError, match="10,000 bytes are free"):
            deploy(tiny_checkpoint, RECIPE, output)
    assert borrowed == []
    assert not output.exists()


def test_room_is_asked_for_what_is_still_to_come(
    tiny_checkpoint: Path, output: Path, borrowed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, "decoder", throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            deploy(tiny_checkpoint, RECIPE, output)
    usage = shutil.disk_usage(output.parent)
    enough = 2 * 4 * open_checkpoint(tiny_checkpoint).parameters["decoder"]

    def free(path: str | Path) -> Any:
        """The output's disk is nearly full, the temporary folder's is not."""
        return usage._replace(free=enough) if output.parent in (Path(path), *Path(path).parents) else usage

    monkeypatch.setattr(shutil, "disk_usage", free)
    assert finished_by(output, tiny_checkpoint).ran == ["decoder"]


@pytest.mark.parametrize("place", ["weights", "report", "stage record"])
@pytest.mark.slow
def test_a_disk_that_fills_up(
    place: str, tiny_checkpoint: Path, output: Path, borrowed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if place == "weights":
            from mobilevd_deploy.npu.onnx_export import export_onnx

            patch.setattr(stages_export, "export_onnx", export_onnx)
            patch.setattr("mobilevd_deploy.npu.onnx_export.save_graph", full)
        elif place == "report":
            patch.setattr(flow, "render_report", full)
        else:
            patch.setattr("mobilevd_deploy.stages.records.write_durably", full)
        with pytest.raises(ResourceError, match="the disk is full") as raised:
            deploy(tiny_checkpoint, RECIPE, output)
    assert "free some space" in str(raised.value.next_step)
    assert not output.exists()
    heard = finished_by(output, tiny_checkpoint)
    assert heard.reused == (list(COMPONENTS) if place == "report" else [])


def test_an_exporter_that_fails(tiny_checkpoint: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise torch.onnx.OnnxExporterError("no decomposition")

    monkeypatch.setattr(torch.onnx, "export", refuse)
    with pytest.raises(ExportError, match="NpuImageEncoder: no decomposition"):
        deploy(tiny_checkpoint, RECIPE, output)
    assert not output.exists()


def test_outputs_that_overflow(tiny_checkpoint: Path, tmp_path: Path, output: Path) -> None:
    tensors = safetensors.torch.load_file(tiny_checkpoint)
    tensors["image_encoder.visual_projection.weight"].fill_(3e38)  # finite, so the checkpoint is read
    with safetensors.safe_open(tiny_checkpoint, framework="pt") as opened:
        safetensors.torch.save_file(tensors, tmp_path / "huge.safetensors", opened.metadata())
    with pytest.raises(ParityError, match="image_encoder: the trained network's outputs are not finite"):
        deploy(tmp_path / "huge.safetensors", RECIPE, output)


def test_a_graph_that_onnxruntime_cannot_load(
    tiny_checkpoint: Path, output: Path, borrowed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    with pytest.raises(MobileVDError, match="NOT_IMPLEMENTED"):
        deploy(tiny_checkpoint, RECIPE, output)
    assert not output.exists()


@pytest.mark.parametrize("kind", ["file", "folder", "link", "damaged", "partial"])
def test_an_output_that_is_not_ours_is_never_touched(
    kind: str, exported: dict[str, Artifact], tiny_checkpoint: Path, output: Path, borrowed: list[str]
) -> None:
    mine = output.parent / "mine"
    if kind == "file":
        output.write_text("mine")
    elif kind == "folder":
        output.mkdir()
        (output / "thesis.txt").write_text("mine")
    elif kind == "link":
        mine.mkdir()
        (mine / "thesis.txt").write_text("mine")
        output.symlink_to(mine)
    elif kind == "damaged":
        shutil.copytree(exported["onnx"].root, output)
        (output / "thesis.txt").write_text("mine")
    else:
        (output.parent / PARTIAL).mkdir()
        (output.parent / PARTIAL / "thesis.txt").write_text("mine")
    before = times(output.parent)
    with pytest.raises(UsageError, match="left unchanged"):
        deploy(tiny_checkpoint, RECIPE, output)
    assert times(output.parent) == before
    assert borrowed == []


def test_a_second_run_beside_the_first_is_refused(
    tiny_checkpoint: Path, output: Path, borrowed: list[str]
) -> None:
    with PartialArtifact(output):
        with pytest.raises(UsageError, match=f"another run \\(process {os.getpid()}\\) is writing"):
            deploy(tiny_checkpoint, RECIPE, output)
        assert borrowed == []
    finished_by(output, tiny_checkpoint)


def test_a_recipe_without_a_needed_rewrite(tiny_checkpoint: Path, output: Path, borrowed: list[str]) -> None:
    lacking = dataclasses.replace(RECIPE, passes=RECIPE.passes[:-1])
    with pytest.raises(RewriteError, match="fold-preconditioning"):
        deploy(tiny_checkpoint, lacking, output)
    assert not output.exists()


def test_a_bad_checkpoint_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        deploy(tmp_path / "none.pt", RECIPE, tmp_path / "deep" / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_outputs_in_odd_places(
    tiny_checkpoint: Path, tmp_path: Path, borrowed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    deploy(tiny_checkpoint, RECIPE, tmp_path / "new" / "folder" / "ünïcode model")
    monkeypatch.chdir(tmp_path / "new" / "folder" / "ünïcode model")
    again = dataclasses.replace(RECIPE, description="changed")
    borrowed.clear()
    artifact = deploy(tiny_checkpoint, again, Path())
    assert artifact.manifest.name == "ünïcode model"
    assert borrowed == list(COMPONENTS)
