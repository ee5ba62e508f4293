"""What the app's tests read as well: written by golden.py, and held here to what Python says today."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest

from mobilevd_deploy.artifact.artifact import Artifact
from mobilevd_deploy.artifact.manifest import Manifest
from mobilevd_deploy.errors import ArtifactError
from tests.support import golden

INDEX = json.loads((golden.VECTORS / "manifests" / "index.json").read_text())


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    golden.write(folder)
    return folder


def test_the_files_are_what_golden_py_writes(written):
    def contents(root):
        single = [root / "pictures.json", root / "not-for-npus.onnx"]
        files = [*single, *(root / "artifact").rglob("*"), *(root / "manifests").rglob("*")]
        return {str(p.relative_to(root)): p.read_bytes() for p in files if p.is_file()}

    fresh, kept = contents(written), contents(golden.VECTORS)
    assert fresh.keys() == kept.keys()
    assert [name for name in fresh if fresh[name] != kept[name]] == []


def test_every_manifest_is_in_the_index():
    names = {path.name for path in (golden.VECTORS / "manifests").iterdir()}
    assert {case["file"] for case in INDEX} | {"index.json"} == names


@pytest.mark.parametrize("case", INDEX, ids=lambda case: Path(case["file"]).stem)
def test_manifests(case):
    text = (golden.VECTORS / "manifests" / case["file"]).read_bytes()
    if case["problem"] is None:
        assert Manifest.from_json(text).components
        return
    with pytest.raises(ArtifactError) as caught:
        Manifest.from_json(text)
    assert case["says"] in caught.value.what


def test_the_artifact_is_intact_and_its_unet_is_cut():
    artifact = Artifact.open(golden.VECTORS / "artifact")
    artifact.verify()
    (binary,) = artifact.manifest.component("unet").npu
    assert [(part.inputs, part.outputs) for part in binary.parts] == [
        (("noise", "image_embeds"), ("moved",)),
        (("moved", "image_latents"), ("latents",)),
    ]


def test_the_clip_is_what_the_artifact_makes():
    def frames(values):
        data = base64.b64decode(values.pop("frames_float32_base64"))
        return np.frombuffer(data, "<f4").reshape(values["shape"])

    kept = json.loads((golden.VECTORS / "clip.json").read_text())
    made = golden.clip(Artifact.open(golden.VECTORS / "artifact"))
    # Other processors round otherwise.
    assert np.allclose(frames(kept), frames(made), atol=1e-5)
    assert kept == made
