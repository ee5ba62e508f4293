from __future__ import annotations

import dataclasses
import gc
import weakref

import numpy as np
import onnx
import pytest

from mobilevd_deploy.artifact.artifact import Artifact
from mobilevd_deploy.artifact.manifest import Component, FileEntry, NpuPart
from mobilevd_deploy.artifact.partial import PartialArtifact
from mobilevd_deploy.base.progress import Progress
from mobilevd_deploy.errors import ArtifactError, UsageError
from mobilevd_deploy.model.interface import TensorSpec
from mobilevd_deploy.runtime.noise import unit_noise
from mobilevd_deploy.runtime.pipeline import Pipeline
from mobilevd_deploy.runtime.runners import OnnxRunner, PartsRunner
from tests.support.tiny_artifact import PIPELINE, STRENGTH, WEIGHTS, build, write_artifact


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Artifact:
    return write_artifact(tmp_path_factory.mktemp("pipeline") / "artifact")


@pytest.fixture
def artifact(tmp_path) -> Artifact:
    return write_artifact(tmp_path / "artifact")


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(1).uniform(-1, 1, PIPELINE.image_shape).astype(np.float32)


def expected_frames(image, seed):
    """What the four tiny components compute, in numpy."""
    embeds = image.mean(axis=(2, 3)) @ WEIGHTS["embed"]
    noised = image + STRENGTH * unit_noise(seed, 1, image.shape)
    patches = noised.reshape(1, 3, 2, 8, 3, 8)
    latents = unit_noise(seed, 0, (2, 4, 2, 3)) * embeds.mean() + np.einsum(
        "nchywx,ocyx->nohw", patches, WEIGHTS["encode"]
    )
    return np.einsum("tihw,icyx->tchywx", latents, WEIGHTS["decode"]).reshape(2, 3, 16, 24)


@pytest.mark.parametrize("seed", [0, 7, 2**64 - 1])
def test_generate(shared, image, seed):
    frames = Pipeline.open(shared.root).generate(image, seed)
    assert frames.shape == (2, 3, 16, 24)
    assert frames.dtype == np.float32
    assert np.allclose(frames, expected_frames(image, seed), atol=1e-5)


def test_parts_run_in_order_and_hold_no_more_than_they_need():
    log: list[object] = []

    class Sum:
        def __init__(self, part: NpuPart) -> None:
            self.part = part
            log.append(part.outputs)

        def run(self, feeds):
            assert tuple(feeds) == self.part.inputs
            return dict.fromkeys(self.part.outputs, sum(feeds.values()))

    entry = {role: FileEntry(f"{role}.x", "0" * 64, 1) for role in ("wrapper", "context")}
    parts = [
        NpuPart(entry, ("a", "b"), ("c", "skip")),
        NpuPart(entry, ("c",), ("d",)),
        NpuPart(entry, ("d", "skip", "a"), ("out",)),
    ]
    given = PartsRunner(parts, Sum).run({"a": np.float32(1), "b": np.float32(2)})
    assert given == {"out": 3 + 3 + 1}
    assert log == [("c", "skip"), ("d",), ("out",)]


def test_the_same_seed_gives_the_same_clip(shared, image):
    pipeline = Pipeline.open(shared)
    assert np.array_equal(pipeline.generate(image, 3), pipeline.generate(image, 3))
    assert not np.array_equal(pipeline.generate(image, 3), pipeline.generate(image, 4))
    assert not np.array_equal(pipeline.generate(image, 3), pipeline.generate(-image, 3))


def test_many_at_once_are_the_same_as_one_by_one(shared, image):
    pipeline = Pipeline.open(shared)
    requests = [(image, 1), (-image, 1), (image, 2)]
    for frames, (picture, seed) in zip(pipeline.generate_all(requests), requests, strict=True):
        assert np.array_equal(frames, pipeline.generate(picture, seed))
    assert pipeline.generate_all([]) == []


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5])
def test_bad_seeds(shared, image, seed):
    with pytest.raises(UsageError, match="seed"):
        Pipeline.open(shared).generate(image, seed)


def test_bad_images(shared, image):
    pipeline = Pipeline.open(shared)
    for bad, message in [
        (image[0], "shape"),
        (image[:, :, :, :-1], "shape"),
        (image * 255, "from -1 to 1"),
        (np.full_like(image, np.nan), "from -1 to 1"),
    ]:
        with pytest.raises(UsageError, match=message):
            pipeline.generate(bad, 0)


@pytest.mark.parametrize("providers", [(), ("QuantumExecutionProvider",), ("CPUExecutionProvider", "cpu")])
def test_providers_that_are_not_there(shared, providers):
    with pytest.raises(UsageError) as caught:
        Pipeline.open(shared, providers)
    assert "CPUExecutionProvider" in (caught.value.next_step or "")


class Recorder:
    """Stands in for any backend: zeros of the right shape, and a diary."""

    def __init__(self):
        self.diary: list[str] = []
        self.feeds: dict[str, dict[str, np.ndarray]] = {}
        self.alive: list[weakref.ref[object]] = []
        self.value = 0.0

    def load(self, component: Component):
        gc.collect()
        assert not any(ref() for ref in self.alive), "the component before is still loaded"
        self.diary.append(f"load {component.name}")
        recorder = self

        class Backend:
            def run(self, feeds):
                recorder.diary.append(f"run {component.name}")
                recorder.feeds[component.name] = dict(feeds)
                return {t.name: np.full(t.shape, recorder.value, t.dtype) for t in component.outputs}

        backend = Backend()
        self.alive.append(weakref.ref(backend))
        return backend


def test_components_are_loaded_one_after_the_other(shared, image):
    recorder = Recorder()
    frames = Pipeline(shared, recorder.load).generate_all([(image, 0), (image, 1)])
    assert recorder.diary == [
        step
        for name in ("image_encoder", "vae_encoder", "unet", "decoder")
        for step in (f"load {name}", f"run {name}", f"run {name}")
    ]
    assert [f.sum() for f in frames] == [0, 0]


def test_inputs_come_from_where_the_manifest_says(shared, image):
    recorder = Recorder()
    recorder.value = 0.25
    Pipeline(shared, recorder.load).generate(image, 9)
    feeds = recorder.feeds
    assert list(feeds["vae_encoder"]) == ["image", "image_noise"]
    assert np.array_equal(feeds["vae_encoder"]["image"], image)
    assert np.array_equal(feeds["vae_encoder"]["image_noise"], unit_noise(9, 1, image.shape))
    assert np.array_equal(feeds["unet"]["noise"], unit_noise(9, 0, (2, 4, 2, 3)))
    assert feeds["unet"]["image_embeds"].shape == (1, 8)
    assert (feeds["decoder"]["latents"] == 0.25).all()


def test_half_precision_inputs(shared, image):
    def halve(tensors: tuple[TensorSpec, ...]):
        return tuple(dataclasses.replace(t, dtype="float16") for t in tensors)

    components = tuple(
        dataclasses.replace(c, inputs=halve(c.inputs), outputs=halve(c.outputs))
        for c in shared.manifest.components
    )
    half = dataclasses.replace(shared, manifest=dataclasses.replace(shared.manifest, components=components))
    recorder = Recorder()
    frames = Pipeline(half, recorder.load).generate(image, 9)
    assert {v.dtype for feeds in recorder.feeds.values() for v in feeds.values()} == {np.dtype("float16")}
    assert frames.dtype == np.float32
    assert np.array_equal(recorder.feeds["unet"]["noise"], unit_noise(9, 0, (2, 4, 2, 3)).astype(np.float16))


def test_a_backend_that_does_not_keep_to_the_manifest(shared, image):
    class Wrong:
        def __init__(self, outputs):
            self.outputs = outputs

        def run(self, feeds):
            return self.outputs

    for outputs, message in [
        ({}, "image_embeds"),
        ({"other": np.zeros((1, 8))}, "other"),
        ({"image_embeds": np.zeros((1, 9))}, r"\(1, 9\)"),
        ({"image_embeds": np.full((1, 8), np.nan)}, "NaN"),
    ]:
        with pytest.raises(ArtifactError, match=message):
            Pipeline(shared, lambda component, outputs=outputs: Wrong(outputs)).generate(image, 0)


def test_progress(shared, image):
    class Heard(Progress):
        def __init__(self):
            self.heard = []

        def plan(self, stages):
            self.heard.append(list(stages))

        def begin(self, stage):
            self.heard.append(stage)

        def end(self, *, reused=False):
            self.heard.append("end")

    progress = Heard()
    Pipeline.open(shared).generate(image, 0, progress)
    names = ["image_encoder", "vae_encoder", "unet", "decoder"]
    assert progress.heard == [names, *(word for name in names for word in (name, "end"))]


def test_damage_found_at_opening(artifact):
    (artifact.root / "unet" / "model.onnx").unlink()
    with pytest.raises(ArtifactError, match=r"unet/model\.onnx is missing"):
        Pipeline.open(artifact.root)
    with pytest.raises(ArtifactError, match="not a folder"):
        Pipeline.open(artifact.root / "absent")


def test_a_flipped_weight_is_found_before_it_is_used(artifact, image):
    path = artifact.root / "decoder" / "model.onnx.data"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"model\.onnx\.data is damaged"):
        Pipeline.open(artifact.root).generate(image, 0)


def test_a_file_that_vanishes_after_opening(artifact, image):
    pipeline = Pipeline.open(artifact.root)
    (artifact.root / "unet" / "model.onnx").unlink()
    with pytest.raises(ArtifactError, match=r"model\.onnx"):
        pipeline.generate(image, 0)


def test_a_listed_file_that_is_no_model(tmp_path, image):
    with PartialArtifact(tmp_path / "out") as partial:
        manifest = build(partial.artifact)
        path = partial.artifact / "unet" / "model.onnx"
        path.write_bytes(b"not a model")
        unet = manifest.component("unet")
        broken = dataclasses.replace(unet, files={"model": FileEntry.of(partial.artifact, path)})
        components = tuple(broken if c is unet else c for c in manifest.components)
        artifact = partial.finish(dataclasses.replace(manifest, components=components))
    with pytest.raises(ArtifactError, match="onnxruntime cannot load it"):
        Pipeline.open(artifact).generate(image, 0)


def test_onnx_runner_by_itself(shared):
    path = shared.root / "unet" / "model.onnx"
    runner = OnnxRunner(path)
    feeds = {t.name: np.ones(t.shape, np.float32) for t in shared.manifest.component("unet").inputs}
    assert (runner.run(feeds)["latents"] == 2).all()
    with pytest.raises(ArtifactError, match="cannot run it"):
        runner.run({"noise": feeds["noise"]})
    with pytest.raises(ArtifactError, match="cannot run it"):
        runner.run(feeds | {"noise": feeds["noise"][:1, :1, :1, :1].astype(np.float64)})
    with pytest.raises(ArtifactError, match="does not exist"):
        OnnxRunner(path.with_name("absent.onnx"))


def test_the_tiny_models_are_valid(shared):
    for component in shared.manifest.components:
        onnx.checker.check_model(shared.path(component, "model"), full_check=True)
