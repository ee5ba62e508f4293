from __future__ import annotations

import zipfile

import pytest

from mobilevd_deploy.artifact.artifact import Artifact
from mobilevd_deploy.artifact.pack import pack
from mobilevd_deploy.errors import ArtifactError, ResourceError, UsageError
from tests.support.tiny_artifact import write_artifact


def test_what_is_unpacked_is_the_artifact(tmp_path):
    artifact = write_artifact(tmp_path / "tiny")
    with zipfile.ZipFile(pack(artifact, tmp_path / "tiny.mvd")) as archive:
        assert archive.namelist()[:2] == ["manifest.json", "manifest.sha256"]
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        # A reader of streams cannot read stored entries whose size follows them.
        assert not any(info.flag_bits & 8 for info in archive.infolist())
        archive.extractall(tmp_path / "again")
    Artifact.open(tmp_path / "again").verify()
    assert Artifact.open(tmp_path / "again").manifest == artifact.manifest


def test_equal_artifacts_give_equal_files(tmp_path):
    artifact = write_artifact(tmp_path / "tiny")
    first = pack(artifact, tmp_path / "a.mvd").read_bytes()
    assert pack(artifact, tmp_path / "a.mvd").read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mvd", "tiny"]


@pytest.mark.parametrize("output", ["tiny.zip", "tiny/x.mvd", "nowhere/x.mvd", "folder.mvd"])
def test_places_that_are_refused(tmp_path, output):
    artifact = write_artifact(tmp_path / "tiny")
    (tmp_path / "folder.mvd").mkdir()
    with pytest.raises(UsageError):
        pack(artifact, tmp_path / output)
    Artifact.open(artifact.root)


def test_damage_and_a_full_disk(tmp_path, monkeypatch):
    artifact = write_artifact(tmp_path / "tiny")
    with monkeypatch.context() as patched:
        patched.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10}))
        with pytest.raises(ResourceError, match="disk is full"):
            pack(artifact, tmp_path / "x.mvd")
    (artifact.root / "report.html").write_text("<p>TINY</p>")
    with pytest.raises(ArtifactError, match="damaged"):
        pack(artifact, tmp_path / "x.mvd")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
