"""A hand-made artifact of four tiny ONNX components, for the tests of whoever reads artifacts."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mobilevd_deploy.artifact.artifact import Artifact
from mobilevd_deploy.artifact.manifest import Component, FileEntry, Manifest, PassReport, PipelineSpec, Source
from mobilevd_deploy.artifact.partial import PartialArtifact
from mobilevd_deploy.base.processes import StageCost
from mobilevd_deploy.model.interface import TensorSpec

PIPELINE = PipelineSpec(frames=2, height=16, width=24, fps=7)
GENERATOR = np.random.default_rng(0)
WEIGHTS = {
    "embed": GENERATOR.normal(size=(3, 8)).astype(np.float32),
    "encode": GENERATOR.normal(size=(4, 3, 8, 8)).astype(np.float32) / 8,
    "decode": GENERATOR.normal(size=(4, 3, 8, 8)).astype(np.float32) / 2,
}
STRENGTH = np.float32(0.02)


def tensor(name, shape, layout, source=None, bounds=None, dtype="float32"):
    return TensorSpec(name, shape, dtype, layout, bounds, source)


IMAGE = tensor("image", (1, 3, 16, 24), "NCHW", "image", (-1.0, 1.0))
INPUTS = {
    "image_encoder": (IMAGE,),
    "vae_encoder": (IMAGE, tensor("image_noise", (1, 3, 16, 24), "NCHW", "noise:1")),
    "unet": (
        tensor("noise", (2, 4, 2, 3), "NCHW", "noise:0"),
        tensor("image_latents", (1, 4, 2, 3), "NCHW", "component:vae_encoder"),
        tensor("image_embeds", (1, 8), "NC", "component:image_encoder"),
    ),
    "decoder": (tensor("latents", (2, 4, 2, 3), "NCHW", "component:unet"),),
}
OUTPUTS = {
    "image_encoder": tensor("image_embeds", (1, 8), "NC"),
    "vae_encoder": tensor("image_latents", (1, 4, 2, 3), "NCHW"),
    "unet": tensor("latents", (2, 4, 2, 3), "NCHW"),
    "decoder": tensor("frames", (2, 3, 16, 24), "NCHW", bounds=(-1.0, 1.0)),
}
NODES = {
    "image_encoder": [
        helper.make_node("ReduceMean", ["image", "axes"], ["pooled"], keepdims=0),
        helper.make_node("MatMul", ["pooled", "embed"], ["image_embeds"]),
    ],
    "vae_encoder": [
        helper.make_node("Mul", ["image_noise", "strength"], ["scaled"]),
        helper.make_node("Add", ["image", "scaled"], ["noised"]),
        helper.make_node("Conv", ["noised", "encode"], ["image_latents"], strides=[8, 8]),
    ],
    "unet": [
        helper.make_node("ReduceMean", ["image_embeds"], ["level"], keepdims=1),
        helper.make_node("Reshape", ["level", "one"], ["scalar"]),
        helper.make_node("Mul", ["noise", "scalar"], ["moved"]),
        helper.make_node("Add", ["moved", "image_latents"], ["latents"]),
    ],
    "decoder": [helper.make_node("ConvTranspose", ["latents", "decode"], ["frames"], strides=[8, 8])],
}
CONSTANTS = {
    "image_encoder": {"axes": np.array([2, 3]), "embed": WEIGHTS["embed"]},
    "vae_encoder": {"strength": STRENGTH.reshape(1), "encode": WEIGHTS["encode"]},
    "unet": {"one": np.array([1])},
    "decoder": {"decode": WEIGHTS["decode"]},
}


def write_model(path: Path, name: str, external: bool) -> None:
    def value(spec):
        return helper.make_tensor_value_info(spec.name, TensorProto.FLOAT, spec.shape)

    graph = helper.make_graph(
        NODES[name],
        name,
        [value(spec) for spec in INPUTS[name]],
        [value(OUTPUTS[name])],
        [numpy_helper.from_array(array, key) for key, array in CONSTANTS[name].items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(
        model,
        path,
        save_as_external_data=external,
        location="model.onnx.data" if external else None,
        size_threshold=0,
    )


def build(root: Path) -> Manifest:
    """Write the files below `root` and return the manifest that goes with them."""
    files, manifest = _built()
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return manifest


@functools.cache
def _built() -> tuple[dict[str, bytes], Manifest]:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        manifest = _build_afresh(root)
        return {e.path: (root / e.path).read_bytes() for e in manifest.all_files()}, manifest


def _build_afresh(root: Path) -> Manifest:
    components = []
    for name, inputs in INPUTS.items():
        model = root / name / "model.onnx"
        write_model(model, name, external=name == "decoder")
        files = {"model": FileEntry.of(root, model)}
        if name == "decoder":
            files["data"] = FileEntry.of(root, root / name / "model.onnx.data")
        parameters = sum(array.size for array in CONSTANTS[name].values())
        ops: dict[str, int] = {}
        for node in NODES[name]:
            ops[node.op_type] = ops.get(node.op_type, 0) + 1
        components.append(Component(name, "onnx", files, inputs, (OUTPUTS[name],), parameters, 1000, ops))
    (root / "report.html").write_text("<p>tiny</p>")
    return Manifest(
        schema_version=1,
        created="2025-01-31T12:00:00Z",
        name="tiny",
        source=Source("tiny.pt", "0" * 64),
        recipe={"name": "onnx"},
        model={"name": "tiny", "frames": 2},
        passes=(PassReport("fold-single-step", ("unet.conv_in",), 10, 8, 100, 90, 120.5),),
        drift={"rewrite": {"unet": 120.5}, "onnx": {"unet": 110.0, "decoder": None}},
        components=tuple(components),
        pipeline=PIPELINE,
        tools={"onnx": onnx.__version__},
        stages={"onnx": StageCost(1.5, 2**20)},
        files={"report": FileEntry.of(root, root / "report.html")},
    )


def write_artifact(output: Path) -> Artifact:
    with PartialArtifact(output) as partial:
        return partial.finish(build(partial.artifact))
