"""Files in tests/vectors that the tests of Python and of the app both read.

To write them: python -m tests.support.golden

manifests/    manifest.json files, good and bad; index.json says what each side says of them
artifact/     the tiny artifact, whose UNet is also cut into two parts that are called context binaries
clip.json     what Python makes with it, of the first picture of pictures.json
pictures.json pictures in ARGB, and what becomes of them at another size
"""

from __future__ import annotations

import base64
import copy
import dataclasses
import json
import operator
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from mobilevd_deploy.artifact.artifact import Artifact
from mobilevd_deploy.artifact.manifest import FileEntry, NpuBinary, NpuPart
from mobilevd_deploy.artifact.partial import PartialArtifact
from mobilevd_deploy.runtime.media import read_picture
from mobilevd_deploy.runtime.pipeline import Pipeline
from tests.support import ROOT
from tests.support.tiny_artifact import INPUTS, NODES, OUTPUTS, build

VECTORS = ROOT / "tests" / "vectors"
SEED = 2**64 - 7
SDK = "v2.51.0.260929181845"
TARGET = "SM8650"


# ---- the artifact ----


def write_artifact(output: Path) -> Artifact:
    """The tiny artifact."""
    with PartialArtifact(output) as partial:
        root = partial.artifact
        manifest = build(root)
        components = [
            dataclasses.replace(component, npu=(_binary(root, component.name),))
            for component in manifest.components
        ]
        # Versions of libraries would change the files at every update.
        return partial.finish(dataclasses.replace(manifest, components=tuple(components), tools={}))


def _binary(root: Path, name: str) -> NpuBinary:
    """In name only: the wrappers are plain ONNX, which a test's runtime can run without an NPU."""
    inputs, output = [spec.name for spec in INPUTS[name]], OUTPUTS[name].name
    folder = root / name / TARGET
    folder.mkdir()
    if name != "unet":
        model = onnx.load(root / name / "model.onnx")
        parts = [_part(root, folder / "context", model, inputs, [output])]
    else:
        first, last = NODES[name][:-1], NODES[name][-1:]
        shapes = {spec.name: spec.shape for spec in (*INPUTS[name], OUTPUTS[name])}
        shapes["moved"] = shapes["noise"]
        parts = [
            _part(root, folder / f"part{number}", _model(nodes, feeds, made, shapes), feeds, [made])
            for number, (nodes, feeds, made) in enumerate(
                [
                    (first, ["noise", "image_embeds"], "moved"),
                    (last, ["moved", "image_latents"], output),
                ]
            )
        ]
    return NpuBinary(TARGET, 75, "w8a16", "2.40.0", SDK, tuple(parts))


def _part(root: Path, stem: Path, model: onnx.ModelProto, inputs: list[str], outputs: list[str]) -> NpuPart:
    wrapper, context = stem.with_suffix(".onnx"), stem.with_suffix(".bin")
    onnx.save(model, wrapper)
    context.write_bytes(f"not a context binary: {stem.name}".encode())
    files = {"wrapper": FileEntry.of(root, wrapper), "context": FileEntry.of(root, context)}
    return NpuPart(files, tuple(inputs), tuple(outputs))


def _model(
    nodes: list[onnx.NodeProto], inputs: list[str], output: str, shapes: dict[str, tuple[int, ...]]
) -> onnx.ModelProto:
    def value(name: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shapes[name])

    one = numpy_helper.from_array(np.array([1]), "one")
    read = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes, "part", [value(name) for name in inputs], [value(output)], [one] if "one" in read else []
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def _model_for_no_npu() -> onnx.ModelProto:
    def value(name: str, kind: int, shape: list[int | str]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    graph = helper.make_graph(
        [helper.make_node("NonZero", ["image"], ["indices"])],
        "not for NPUs",
        [value("image", TensorProto.FLOAT, [1, 3, 16, 24])],
        [value("indices", TensorProto.INT64, [4, "count"])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def clip(artifact: Artifact) -> dict[str, Any]:
    """What Python makes of the first picture."""
    spec = artifact.manifest.pipeline
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture.png"
        Image.fromarray(_pixels(*PICTURES[0][:2])).save(path)
        pixels = read_picture(path, spec.width, spec.height).pixels
    frames = Pipeline.open(artifact).generate(pixels, SEED)
    values = base64.b64encode(frames.astype("<f4").tobytes()).decode()
    return {"seed": str(SEED), "shape": list(frames.shape), "frames_float32_base64": values}


# ---- manifests ----


@dataclasses.dataclass(frozen=True)
class Case:
    """`problem` is the app's name for what is wrong, `says` a part of Python's message; None: it is fine."""

    name: str
    change: Callable[[dict[str, Any]], Any]
    problem: str | None = None
    says: str | None = None


def _set(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(values: dict[str, Any]) -> None:
        *parents, last = [int(key) if key.isdigit() else key for key in path.split("/")]
        target: Any = values
        for key in parents:
            target = target[key]
        if value is Missing:
            del target[last]
        else:
            target[last] = value

    return change


class Missing:
    """In the place of a value: the key is left out."""


INVALID, UNREADABLE, VERSION = "MANIFEST_INVALID", "MANIFEST_UNREADABLE", "MANIFEST_VERSION"
CASES = [
    Case("valid", lambda values: None),
    Case("only_needed_fields", lambda values: [
        _set("files", Missing)(values), _set("quality", Missing)(values),
        *(_set(f"pipeline/{key}", Missing)(values)
          for key in ("noise", "image_range", "image_layout", "resize", "crop", "resample")),
        *(_set(f"components/{i}/npu", Missing)(values) for i in range(4)),
    ]),
    Case("unknown_version", _set("schema_version", 2), VERSION, "schema version 2"),
    Case("version_is_a_truth", _set("schema_version", True), UNREADABLE, "no schema_version"),
    Case("no_version", _set("schema_version", Missing), UNREADABLE, "no schema_version"),
    Case("missing_field", _set("components/1/inputs/0/shape", Missing), INVALID, "shape"),
    Case("missing_pipeline", _set("pipeline", Missing), INVALID, "pipeline"),
    Case("unknown_field", _set("components/2/npu/0/parts/0/device", "phone"), INVALID, "device"),
    Case("unknown_noise", _set("pipeline/noise", "mersenne"), INVALID, "mersenne"),
    Case("unknown_resize", _set("pipeline/resize", "stretch"), INVALID, "stretch"),
    Case("other_range", _set("pipeline/image_range", [0, 1]), INVALID, "image_range"),
    Case("wrong_type", _set("components/0/inputs/0/shape", "1x3x16x24"), INVALID, "shape"),
    Case("number_for_text", _set("name", 7), INVALID, "name"),
    Case("text_for_number", _set("pipeline/fps", "7"), INVALID, "fps"),
    Case("fraction_for_whole", _set("pipeline/frames", 2.5), INVALID, "frames"),
    Case("size_below_zero", _set("components/0/files/model/bytes", -1), INVALID, "-1"),
    Case("empty_axis", _set("components/0/inputs/0/shape/3", 0), INVALID, "shape"),
    Case("climbing_path", _set("components/0/files/model/path", "../model.onnx"), INVALID, "model.onnx"),
    Case("absolute_path", _set("components/0/files/model/path", "/etc/passwd"), INVALID, "passwd"),
    Case("hidden_path", _set("components/0/files/model/path", "unet/.model"), INVALID, ".model"),
    Case("backslash_path", _set("components/0/files/model/path", "unet\\model"), INVALID, "model"),
    Case("own_path", _set("files/report/path", "manifest.json"), INVALID, "itself"),
    Case("same_path_in_other_case", _set("files/report/path", "UNet/model.onnx"), INVALID, "twice"),
    Case("short_digest", _set("components/0/files/model/sha256", "ab12"), INVALID, "sha256"),
    Case("no_model", _set("components/0/files", {}), INVALID, "model"),
    Case("no_components", _set("components", []), INVALID, "components"),
    Case("same_component_twice",
         lambda values: values["components"].append(values["components"][-1]), INVALID, "twice"),
    Case("unknown_kind", _set("components/0/kind", "tflite"), INVALID, "kind"),
    Case("unknown_dtype", _set("components/0/inputs/0/dtype", "int8"), INVALID, "dtype"),
    Case("layout_of_other_rank", _set("components/0/inputs/0/layout", "NCH"), INVALID, "layout"),
    Case("unknown_source", _set("components/0/inputs/0/source", "camera"), INVALID, "camera"),
    Case("no_source", _set("components/0/inputs/0/source", None), INVALID, "has no source"),
    Case("source_behind",
         lambda values: values["components"].insert(0, values["components"].pop(2)), INVALID, "earlier"),
    Case("source_does_not_fit", _set("components/2/inputs/1/shape", [1, 4, 3, 2]), INVALID, "not match"),
    Case("picture_of_other_size", _set("pipeline/width", 32), INVALID, "image"),
    Case("frames_of_other_number", _set("pipeline/frames", 3), INVALID, "frames"),
    Case("two_outputs",
         lambda values: operator.iadd(values["components"][0]["outputs"], values["components"][0]["outputs"]),
         INVALID, "one output"),
    Case("same_target_twice",
         lambda values: operator.iadd(values["components"][0]["npu"], values["components"][0]["npu"]),
         INVALID, "twice"),
    Case("no_parts", _set("components/2/npu/0/parts", []), INVALID, "npu"),
    Case("parts_in_wrong_order",
         lambda values: values["components"][2]["npu"][0]["parts"].reverse(), INVALID, "no earlier part"),
    Case("part_reads_unknown", _set("components/2/npu/0/parts/1/inputs/0", "lost"), INVALID, "lost"),
    Case("part_gives_an_input", _set("components/2/npu/0/parts/0/outputs/0", "noise"), INVALID, "noise"),
    Case("parts_without_output",
         lambda values: values["components"][2]["npu"][0]["parts"].pop(), INVALID, "latents"),
    Case("part_without_context",
         _set("components/2/npu/0/parts/0/files/context", Missing), INVALID, "wrapper and context"),
]  # fmt: skip
TEXTS = {
    "empty": ("", UNREADABLE, "not readable"),
    "list": ("[]\n", UNREADABLE, "schema_version"),
    "cut": ('{"schema_version": 1, "name": "ti', UNREADABLE, "not readable"),
    "key_twice": ('{"schema_version": 1, "schema_version": 1}', UNREADABLE, "twice"),
    "text_behind": ('{"schema_version": 2} {}', UNREADABLE, "not readable"),
    "not_a_number": ('{"schema_version": NaN}', UNREADABLE, "not readable"),
    "infinite": ('{"schema_version": 1e999}', UNREADABLE, "not readable"),
    "comment": ('{"schema_version": 1 /* one */}', UNREADABLE, "not readable"),
    "deep": ("[" * 20_000, UNREADABLE, "not readable"),
}


def manifests(artifact: Artifact) -> dict[str, str]:
    """Files of manifests/ by name."""
    good = json.loads(artifact.manifest.to_json())
    files, index = {}, []
    for case in CASES:
        values = copy.deepcopy(good)
        case.change(values)
        files[f"{case.name}.json"] = json.dumps(values, separators=(",", ":")) + "\n"
        index.append({"file": f"{case.name}.json", "problem": case.problem, "says": case.says})
    for name, (text, problem, says) in TEXTS.items():
        files[f"{name}.json"] = text
        index.append({"file": f"{name}.json", "problem": problem, "says": says})
    files["index.json"] = json.dumps(index, indent=1) + "\n"
    return files


# ---- pictures ----

# Width and height before and after: down, up, both, one axis alone, very long, one pixel, as it is.
PICTURES = [
    (40, 30, 24, 16),
    (5, 7, 12, 8),
    (31, 9, 16, 16),
    (24, 40, 24, 16),
    (200, 3, 8, 8),
    (1, 1, 5, 4),
    (24, 16, 24, 16),
    (50, 24, 25, 12),
]


def _pixels(width: int, height: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """RGBA pixels (height, width, 4): noise over a ramp, partly transparent."""
    generator = np.random.default_rng([width, height])
    ramp = np.linspace(0, 255, width * height * 4).reshape(height, width, 4)
    noisy = np.clip(ramp + generator.normal(0, 60, ramp.shape), 0, 255).astype(np.uint8)
    noisy[..., 3] = generator.choice([0, 1, 77, 128, 254, 255, 255, 255], (height, width))
    return noisy


def pictures() -> dict[str, Any]:
    """Each picture's ARGB bytes, and its RGB bytes as `read_picture` fits it, both in hex, row by row."""
    made = []
    for width, height, to_width, to_height in PICTURES:
        rgba = _pixels(width, height)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "picture.png"
            Image.fromarray(rgba).save(path)
            values = read_picture(path, to_width, to_height).pixels.astype(np.float64)
        rgb = np.rint((values[0].transpose(1, 2, 0) + 1) * 127.5).astype(np.uint8)
        made.append(
            {
                "size": [width, height],
                "to_size": [to_width, to_height],
                "argb": rgba[..., [3, 0, 1, 2]].tobytes().hex(),
                "rgb": rgb.tobytes().hex(),
            }
        )
    return {"about": "see tests/support/golden.py", "pictures": made}


def write(folder: Path) -> None:
    """Write everything below `folder`."""
    artifact = write_artifact(folder / "artifact")
    (folder / "clip.json").write_text(json.dumps(clip(artifact)) + "\n")
    (folder / "pictures.json").write_text(json.dumps(pictures(), indent=1) + "\n")
    onnx.save(_model_for_no_npu(), folder / "not-for-npus.onnx")
    (folder / "manifests").mkdir(exist_ok=True)
    for name, text in manifests(artifact).items():
        (folder / "manifests" / name).write_text(text)


if __name__ == "__main__":
    for old in ("artifact", "manifests"):
        shutil.rmtree(VECTORS / old, ignore_errors=True)
    write(VECTORS)
