"""Paths on the command line, and what is refused before the work begins."""

from __future__ import annotations

import importlib
import inspect
import pwd
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mobilevd_deploy.artifact.artifact import Artifact
from mobilevd_deploy.cli import export, look, measure, profile, use
from mobilevd_deploy.cli.options import base_name, expanded, given_path
from mobilevd_deploy.config.recipe import Recipe
from tests.cli.conftest import Ended, Run

TAKES_NAMES = {"recipe", "preset", "what", "model"}  # and files


def parameters() -> Iterator[tuple[str, str, Any, Any]]:
    """Yield command, parameter, type and typer's information of every parameter."""
    for group in (export, use, profile, measure, look):
        for command in group.commands.registered_commands:
            assert command.callback is not None
            hints = typing.get_type_hints(command.callback, include_extras=True)
            for name in inspect.signature(command.callback).parameters:
                kind, information, *_ = typing.get_args(hints[name])
                yield command.callback.__name__, name, kind, information


def test_every_path_is_read_by_one_function() -> None:
    paths, names = set(), set()
    for command, name, kind, information in parameters():
        if Path in (kind, *typing.get_args(kind)) or kind == (list[Path] | None):
            assert information.parser is given_path, (command, name)
            paths.add((command, name))
        elif name in TAKES_NAMES or (command, name) in {("hub", "artifact"), ("estimate", "artifact")}:
            assert information.parser is expanded, (command, name)
            names.add((command, name))
    assert len(paths) > 15
    assert len(names) > 7


@pytest.mark.parametrize(
    ("text", "home", "expected"),
    [
        ("~", "/home/me", "/home/me"),
        ("~/x.gif", "/home/me", "/home/me/x.gif"),
        ("~root/x.gif", "/home/me", f"{pwd.getpwnam('root').pw_dir}/x.gif"),
        ("./~/x.gif", "/home/me", "~/x.gif"),
        ("a~/x.gif", "/home/me", "a~/x.gif"),
        ("~draft.gif", "/home/me", "~draft.gif"),
        ("x.gif", None, "x.gif"),
    ],
)
def test_home_folders(text: str, home: str | None, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", home) if home else monkeypatch.delenv("HOME", raising=False)
    assert given_path(text) == Path(expected)


def test_a_home_folder_that_nobody_knows(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # no HOME, and no entry for the user
    ended = run("generate", "p.png", "-o", "~/x.gif")
    assert ended.code == 2
    assert "HOME is not set" in ended.err


@pytest.mark.parametrize(
    "words", [["--output=~/x.gif"], ["--output", "~/x.gif"], ["-o", "~/x.gif"], ["-o~/x.gif"]]
)
def test_an_output_at_home_in_every_spelling(
    words: list[str],
    run: Run,
    artifact: Artifact,
    picture: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(
        "mobilevd_deploy.runtime.pipeline.Pipeline.generate", lambda self, *_: _frames(self.artifact)
    )
    ended = run("generate", picture, "-a", artifact.root, *words, "-q")
    assert (ended.code, [path.name for path in home.iterdir()]) == (0, ["x.gif"])
    assert not (tmp_path / "~").exists()


def _frames(artifact: Artifact) -> Any:
    import numpy as np

    spec = artifact.manifest.pipeline
    return np.zeros((spec.frames, 3, spec.height, spec.width), np.float32)


@pytest.mark.parametrize(
    ("name", "is_folder", "expected"),
    [
        ("svd_v1.1", True, "svd_v1.1"),
        ("svd_v1.2", True, "svd_v1.2"),
        ("ckpt.pt", False, "ckpt"),
        ("ckpt.safetensors", False, "ckpt"),
        ("my.v1.1.safetensors", False, "my.v1.1"),
        ("weights.v2", False, "weights.v2"),
        ("odd.pt", True, "odd.pt"),
    ],
)
def test_default_names_keep_what_tells_checkpoints_apart(
    name: str, is_folder: bool, expected: str, tmp_path: Path
) -> None:
    (tmp_path / name).mkdir() if is_folder else (tmp_path / name).touch()
    assert base_name(tmp_path / name) == expected


@pytest.fixture
def deployed(monkeypatch: pytest.MonkeyPatch, artifact: Artifact) -> list[tuple[Recipe, Path]]:
    """What the command line asks `deploy` for, which then does nothing."""
    asked: list[tuple[Recipe, Path]] = []

    def note(_: Path, recipe: Recipe, output: Path, *__: Any, **___: Any) -> Artifact:
        asked.append((recipe, output))
        return artifact

    monkeypatch.setattr(importlib.import_module("mobilevd_deploy.deploy"), "deploy", note)
    return asked


def test_export_gives_each_folder_its_own_artifact(run: Run, deployed: list[Any], tmp_path: Path) -> None:
    for name in ("svd_v1.1", "svd_v1.2"):
        (tmp_path / name).mkdir()
        assert run("export", name, "-r", "onnx").code == 0
    assert [output.name for _, output in deployed] == ["svd_v1.1-onnx", "svd_v1.2-onnx"]


@pytest.mark.parametrize(
    "target", ["SM8650", "sm8650", "Snapdragon 8 Gen 3", "8gen3", "SM8650-AC", "qualcomm-snapdragon-8gen3"]
)
def test_export_compiles_for_the_part_number(target: str, run: Run, deployed: list[Any]) -> None:
    assert run("export", "ckpt.pt", "--target", target).code == 0
    ((recipe, _),) = deployed
    assert recipe.npu.targets == ("SM8650",)


def exit_2(ended: Ended, *words: str) -> None:
    assert (ended.code, ended.out) == (2, "")
    for word in words:
        assert word in ended.err
    assert "next: " in ended.err
    assert "[1/" not in ended.err


def test_what_devices_prints_is_a_target(run: Run, deployed: list[Any]) -> None:
    for row in run("devices", "--json").json:
        for name in (row["chipset"], *row["sm"], *(part.upper() for part in row["sm"])):
            assert run("export", "ckpt.pt", "--target", name).code == 0
            assert deployed[-1][0].npu.targets == (row["sm"][0].upper(),)


def test_targets_that_are_none_are_refused_before_the_first_stage(
    run: Run, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    for name, words in (("sm865", "nearest: SM8650"), ("Xiaomi 14 Pro", "SM8650"), ("fast", "known: SM8450")):
        exit_2(run("export", tiny_checkpoint, "--target", name), name, words)
    (tmp_path / "my.toml").write_text('[npu]\ntargets = ["sm865"]\n')
    exit_2(
        run("export", tiny_checkpoint, "-r", "my.toml"),
        "npu.targets: unknown chip 'sm865'",
        "nearest: SM8650",
    )


@pytest.mark.parametrize(
    "words",
    [
        ("export", "CHECKPOINT", "-r", "onnx", "-o", "/proc/model"),
        ("tune", "CHECKPOINT", "--budget", "1", "-o", "/proc/my.toml"),
        ("init", "-o", "/proc/start.safetensors", "-p", "demo"),
        ("init", "-o", "/proc/start.pt", "--from", "CHECKPOINT"),
        ("generate", "PICTURE", "-a", "ARTIFACT", "-o", "/proc/x.gif"),
        ("generate", "PICTURE", "-a", "ARTIFACT", "--sheet", "/proc/x.png"),
        ("generate", "PICTURE", "-a", "ARTIFACT", "--frames-dir", "/proc/frames"),
        ("pack", "ARTIFACT", "-o", "/proc/x.mvd"),
        ("traffic", "ARTIFACT", "--picture", "/proc/x.png"),
        ("train-demo", "-o", "/proc/x.safetensors"),
    ],
)
def test_a_place_that_cannot_be_written_is_noticed_before_the_work(
    words: tuple[str, ...], run: Run, tiny_checkpoint: Path, artifact: Artifact, picture: Path, tmp_path: Path
) -> None:
    real = {"CHECKPOINT": tiny_checkpoint, "ARTIFACT": artifact.root, "PICTURE": picture}
    exit_2(run(*(real.get(word, word) for word in words)), "/proc", "cannot be written")
    assert list(tmp_path.iterdir()) == []


def test_a_temporary_folder_that_cannot_be_used_is_named(
    run: Run, tiny_checkpoint: Path, artifact: Artifact, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", "/proc")
    for words in (
        ("export", tiny_checkpoint, "-r", "onnx"),
        ("generate", picture, "-a", artifact.root, "-p", "npu-sim"),
        ("traffic", artifact.root),
    ):
        exit_2(run(*words), "the temporary folder /proc cannot be written", "TMPDIR")


def test_a_disk_without_room_is_noticed_before_the_work(
    run: Run, artifact: Artifact, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    for words in (
        ("generate", picture, "-a", artifact.root),
        ("pack", artifact.root),
        ("init", "-o", "start.safetensors", "-p", "demo"),
    ):
        ended = run(*words)
        assert (ended.code, ended.out) == (1, "")
        assert "1,000 bytes are free" in ended.err
        assert "[1/4] image_encoder" not in ended.err
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_an_input_is_refused(
    run: Run, artifact: Artifact, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    from PIL import Image

    Image.new("RGB", (8, 8)).save("p.png")
    (tmp_path / "r.toml").write_text("")
    (tmp_path / "importance.safetensors").write_text("{}")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for words in (
        ("generate", "p.png", "-a", artifact.root, "-o", "p.png"),
        ("generate", "p.png", "-a", artifact.root, "-o", "./p.png"),
        ("generate", "p.png", "-a", artifact.root, "--sheet", "p.png"),
        ("generate", "p.png", "-a", artifact.root, "-o", "x.png", "--sheet", "x.png"),
        ("tune", tiny_checkpoint, "--budget", "1", "-r", "r.toml", "-o", "r.toml"),
        ("init", "--from", tiny_checkpoint, "-o", tiny_checkpoint),
        (
            *("init", "--from", tiny_checkpoint),
            *("--importance", "importance.safetensors", "-o", "importance.safetensors"),
        ),
    ):
        exit_2(run(*words), "would be overwritten", "choose another output")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_text_files_with_a_byte_order_mark_are_read(run: Run, tmp_path: Path) -> None:
    from mobilevd_deploy.config.data import data_dir

    for kind, name in (("export", "onnx"), ("models", "demo")):
        text = (data_dir(kind) / f"{name}.toml").read_text(encoding="utf-8")
        (tmp_path / f"{name}.toml").write_text(text, encoding="utf-8-sig")
    from mobilevd_deploy.config.presets import load_preset
    from mobilevd_deploy.config.recipe import load_recipe

    assert load_recipe("onnx.toml") == load_recipe("onnx")
    assert load_preset("demo.toml").model == load_preset("demo").model
    from mobilevd_deploy.training.initialise import read_importance

    (tmp_path / "q.json").write_text('{"a": 0.5}', encoding="utf-8-sig")
    assert read_importance(tmp_path / "q.json") == {"a": 0.5}
