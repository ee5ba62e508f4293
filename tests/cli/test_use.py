"""Commands that use an artifact: generate, install, pack."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import imageio_ffmpeg
import pytest
from PIL import Image

from mobilevd_deploy.artifact.artifact import Artifact
from tests.cli.conftest import Ended, Run
from tests.support.adb_phone import SERIAL, Phone


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_generate(run: Run, artifact: Artifact, picture: Path, tmp_path: Path) -> None:
    def made(name: str, *arguments: object) -> Ended:
        ended = run("generate", picture, "-a", artifact.root, "-o", name, *arguments)
        assert ended.code == 0
        return ended

    ended = made("a.gif")
    assert ended.out == "a.gif: 4 frames of 80x48 at 7 fps, seed 0\n"
    assert "90x70 px scaled by" in ended.err
    assert "[4/4] decoder: " in ended.err
    with Image.open(tmp_path / "a.gif") as clip:
        assert (clip.n_frames, clip.size, clip.info["loop"]) == (4, (80, 48), 0)
    made("again.gif", "--seed", 0, "-q")
    made("other.gif", "--seed", 2**64 - 1, "-q")
    assert digest(tmp_path / "again.gif") == digest(tmp_path / "a.gif")
    assert digest(tmp_path / "other.gif") != digest(tmp_path / "a.gif")


def test_generate_in_every_form(run: Run, artifact: Artifact, picture: Path, tmp_path: Path) -> None:
    arguments = ["--frames-dir", "frames", "--sheet", "new/sheet.png", "--scale", 2, "--json", "--seed", 3]
    ended = run("generate", picture, "-a", artifact.root, "-o", "deep/clip.mp4", *arguments)
    assert (ended.code, ended.err) == (0, "")
    frames = [f"frames/frame_{i:02}.png" for i in range(4)]
    assert ended.json == {
        "artifact": str(artifact.root),
        "clip": "deep/clip.mp4",
        "written": ["deep/clip.mp4", *frames, "new/sheet.png"],
        "picture": ended.json["picture"],
        "seed": 3,
        "frames": 4,
        "fps": 7,
    }
    assert ended.json["picture"].startswith("photo.jpg: 90x70 px scaled by")
    assert imageio_ffmpeg.count_frames_and_secs("deep/clip.mp4")[0] == 4
    for name in frames:
        with Image.open(name) as frame:
            assert frame.size == (160, 96)
    with Image.open("new/sheet.png") as sheet:
        assert sheet.size[0] == 2 * 160 + 2  # the frames in two rows, the picture above them
        assert sheet.size[1] > 3 * 96

    ended = run("generate", picture, "-a", artifact.root, "-o", "strip.png", "--json")
    with Image.open("strip.png") as strip:
        assert strip.size == (4 * 80 + 3 * 2, 48)


def test_generate_finds_the_newest_artifact(
    run: Run, artifact: Artifact, picture: Path, tmp_path: Path
) -> None:
    ended = run("generate", picture, "--json")
    assert (ended.code, ended.json["exit_code"]) == (2, 2)
    assert "--artifact" in ended.json["next_step"]
    shutil.copytree(artifact.root, tmp_path / "build" / "model")
    assert run("generate", picture, "--json").json["artifact"] == "build/model"


def test_folders_that_may_not_be_read_are_passed_over(
    run: Run, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "private").mkdir()
    is_file = Path.is_file

    def refuse(path: Path) -> bool:
        if path.parent.name == "private":
            raise PermissionError(13, "Permission denied", str(path))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", refuse)
    ended = run("generate", picture, "--json")
    assert ended.code == 2
    assert "no artifact in" in ended.json["error"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["-o", "clip.webm"], 2, "cannot write .webm"),
        (["-o", "clip"], 2, "a file without suffix"),
        (["--sheet", "sheet.xyz"], 2, "a sheet is written as .png"),
        (["--frames-dir", "full"], 2, "not an empty folder"),
        (["-p", "TPUExecutionProvider"], 2, "no execution provider 'TPUExecutionProvider'"),
        (["-a", "missing"], 1, "missing is not a folder"),
        (["-a", "full"], 1, "manifest.json is missing"),
    ],
)
def test_generate_refuses_before_it_works(
    arguments: list[str],
    code: int,
    message: str,
    run: Run,
    artifact: Artifact,
    picture: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    ended = run("generate", picture, "-a", artifact.root, *arguments)
    assert (ended.code, ended.out) == (code, "")
    assert message in ended.err
    assert "[1/" not in ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    ended = run("generate", picture, "-a", artifact.root, *arguments, "--json")
    assert (ended.code, ended.json["exit_code"]) == (code, code)
    assert message in ended.json["error"]
    assert ended.json["next_step"]


def test_generate_from_what_is_no_picture(run: Run, artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / "words.jpg").write_text("a thousand of them")
    for name, message in (
        ("words.jpg", "not an image"),
        ("none.jpg", "does not exist"),
        (".", "is a folder"),
    ):
        ended = run("generate", name, "-a", artifact.root, "--json")
        assert ended.code == 1
        assert message in ended.json["error"]


def test_generate_with_a_damaged_artifact(
    run: Run, artifact: Artifact, picture: Path, tmp_path: Path
) -> None:
    shutil.copytree(artifact.root, tmp_path / "model")
    data = tmp_path / "model" / "decoder" / "model.onnx.data"
    content = bytearray(data.read_bytes())
    content[100] ^= 1
    data.write_bytes(content)
    ended = run("generate", picture, "-a", "model", "-q")
    assert ended.code == 1
    assert "model.onnx.data is damaged" in ended.err
    assert not (tmp_path / "clip.gif").exists()


def test_install_and_pack(phone: Phone, tiny: Artifact, run: Run) -> None:
    ended = run("install", tiny.root, "--json")
    assert ended.json["path"].endswith("/files/artifacts/tiny")
    assert (phone.files / "artifacts/tiny/manifest.json").exists()
    assert "tiny is on" in run("install", tiny.root, "--serial", SERIAL).out
    phone.set(absent=True)
    ended = run("install", tiny.root)
    assert ended.code == 3
    assert "make apk" in ended.err
    ended = run("pack", tiny.root, "--json")
    assert (ended.json["file"], ended.json["bytes"]) == ("tiny.mvd", Path("tiny.mvd").stat().st_size)
    assert run("pack", tiny.root, "-o", "x.zip").code == 2
