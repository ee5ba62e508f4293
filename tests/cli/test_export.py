"""Commands that make and check: export, tune."""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from PIL import Image

from mobilevd_deploy.artifact.artifact import Artifact
from mobilevd_deploy.config.recipe import load_recipe
from mobilevd_deploy.tune import Step, Tuned
from tests.cli.conftest import Run, WantsCode, hostile
from tests.support.networks import TINY_MODEL


def test_export_that_has_nothing_to_do(run: Run, artifact: Artifact, tiny_checkpoint: Path) -> None:
    ended = run("export", tiny_checkpoint, "-r", "onnx", "-o", artifact.root)
    assert ended.code == 0
    first, second = ended.out.splitlines()
    assert first.startswith(f"{artifact.root}: ")
    assert " MB, " in first
    assert " dB from the trained network" in first
    assert second == f"look at {artifact.root / 'report.html'}"
    assert "nothing has changed" in ended.err
    quiet = run("export", tiny_checkpoint, "-r", "onnx", "-o", artifact.root, "--quiet")
    assert (quiet.out, quiet.err) == (ended.out, "")
    result = run("export", tiny_checkpoint, "-r", "onnx", "-o", artifact.root, "--json")
    assert (result.code, result.err) == (0, "")
    expected = json.loads((artifact.root / "manifest.json").read_text())
    assert result.json == {"artifact": str(artifact.root), **expected}


def test_export_says_where_it_is(
    run: Run,
    artifact: Artifact,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """Stopped by Ctrl-C at the UNet, then finished; the default output carries both names."""
    # Shells start background jobs with this signal ignored.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, handler))
    stop = [True]

    def copy(_: Any, __: Any, ___: Any, folder: Path, ____: Any) -> tuple[str, ...]:
        if folder.name == "unet" and stop.pop():
            signal.raise_signal(signal.SIGINT)
        shutil.copytree(artifact.root / folder.name, folder, dirs_exist_ok=True)
        return (f"a note about {folder.name}",)

    monkeypatch.setattr("mobilevd_deploy.stages.export.export_onnx", copy)
    stopped = run("export", tiny_checkpoint, "-r", "onnx")
    assert (stopped.code, stopped.out) == (130, "")
    assert stopped.err.endswith("error: interrupted\n next: run the same command again to continue\n")
    assert re.search(r"^\[2/4\] export vae_encoder: \d", stopped.err, re.MULTILINE)
    assert "[3/4] export unet ..." in stopped.err

    stop.append(False)
    finished = run("export", tiny_checkpoint, "--recipe", "onnx")
    assert finished.code == 0
    assert "[2/4] export vae_encoder: done in an earlier run" in finished.err
    assert re.search(r"^\[4/4\] export decoder: \d", finished.err, re.MULTILINE)
    assert "a note about unet" in finished.err
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-onnx"]
    Artifact.open(tmp_path / "tiny-onnx").verify()


def hostile_plain(path: Path, _: Path) -> None:
    path.write_bytes(pickle.dumps(WantsCode(path.parent / "made")))


def truncated(path: Path, good: Path) -> None:
    path.write_bytes(good.read_bytes()[:-1000])


def empty(path: Path, _: Path) -> None:
    path.write_bytes(b"")


def picture_instead(path: Path, _: Path) -> None:
    Image.new("RGB", (8, 8)).save(path, format="png")


def not_a_number(path: Path, good: Path) -> None:
    tensors = safetensors.torch.load_file(good)
    tensors["image_encoder.visual_projection.weight"][3, 4] = float("nan")
    with safetensors.safe_open(good, framework="pt") as opened:
        safetensors.torch.save_file(tensors, path, opened.metadata())


def without_a_tensor(path: Path, good: Path) -> None:
    tensors = safetensors.torch.load_file(good)
    del tensors["unet.conv_in.weight"]
    with safetensors.safe_open(good, framework="pt") as opened:
        safetensors.torch.save_file(tensors, path, opened.metadata())


@pytest.mark.parametrize(
    ("make", "ending", "message"),
    [
        (hostile, "pt", "wants code to be run"),
        (hostile_plain, "pt", "wants code to be run"),
        (truncated, "safetensors", "not a whole .safetensors file"),
        (empty, "safetensors", "it is empty"),
        (empty, "pt", "it is empty"),
        (picture_instead, "pt", "PNG picture"),
        (picture_instead, "png", "PNG picture"),
        (without_a_tensor, "safetensors", "unet.conv_in.weight"),
        (not_a_number, "safetensors", "NaN"),
    ],
)
def test_bad_checkpoints(
    make: Callable[[Path, Path], None],
    ending: str,
    message: str,
    run: Run,
    tiny_checkpoint: Path,
    tmp_path: Path,
) -> None:
    path = tmp_path / f"bad.{ending}"
    make(path, tiny_checkpoint)
    ended = run("export", path, "-r", "onnx", "-o", "out", "-q")
    assert (ended.code, ended.out) == (1, "")
    assert ended.err.startswith("error: ")
    assert message in ended.err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "made").exists()
    assert message in run("export", path, "-r", "onnx", "-o", "out", "--json").json["error"]
    if message != "NaN":  # inspection reads no weights
        ended = run("inspect", path, "--json")
        assert ended.code == 1
        assert message in ended.json["error"]


def test_truncated_pt(run: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.pt"
    torch.save({"tensors": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])
    ended = run("export", path, "-r", "onnx", "-q")
    assert ended.code == 1
    assert "not a whole .pt file" in ended.err


def test_an_output_of_somebody_else(run: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    ended = run("export", tiny_checkpoint, "-r", "onnx", "-o", "mine", "--json")
    assert ended.code == 2
    assert "left unchanged" in ended.json["error"]
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "mine"


def test_the_spec_of_the_fixture_has_what_the_tests_assume() -> None:
    assert TINY_MODEL.unet.gated
    assert TINY_MODEL.unet.temporal_multiscaling == "conv"
    assert TINY_MODEL.unet.kept_temporal_blocks is not None
    assert TINY_MODEL.step.noise_aug_strength > 0
    assert max(dataclasses.astuple(TINY_MODEL.unet.funnels)) < 1


def test_tune_refuses_what_does_not_fit_together(run: Run) -> None:
    for options, message in (
        ((), "exactly one goal is needed"),
        (("--budget", 1, "--target-sqnr", 30), "exactly one goal is needed"),
        (("--budget", 1, "--recipe", "onnx"), "quantises nothing"),
        (("--budget", 1, "-o", "my.json"), "not a TOML file"),
    ):
        ended = run("tune", *options)
        assert ended.code == 2
        assert message in ended.err
    assert not list(Path().iterdir())


def test_tune_shows_the_way_there(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = (
        Step("", 8, 8, 0.48, 20.04, 20.6),
        Step("conv_out", 8, 16, 0.484, 21.5, None),
    )
    bits = {"conv_in": (8, 8), "conv_out": (8, 16), "mid_block.resnets.0": (8, 8)}
    found = Tuned(load_recipe("xiaomi-14-pro"), 0.484, 21.3, bits, steps)
    monkeypatch.setattr("mobilevd_deploy.tune.tune", lambda *_, **__: found)
    ended = run("tune", "ckpt.pt", "--target-sqnr", 21, "-o", "my.toml")
    assert re.search(r"0\.480 .* 20\.0 .* 20\.6 .* w8a8 throughout", ended.out)
    assert re.search(r"0\.484 .* 21\.5 .* identical .* conv_out to w8a16", ended.out)
    assert "my.toml: 21.3 dB at 0.48 of W8A16's bit operations; 1 at w8a16, 2 at w8a8" in ended.out
    assert ended.out.endswith("mobilevd-deploy export ckpt.pt --recipe my.toml\n")
    values = run("tune", "ckpt.pt", "--target-sqnr", 21, "-o", "my.toml", "--json").json
    assert (values["sqnr_db"], values["steps"][1]["measured_db"]) == (21.3, None)
    assert values["bits"]["conv_out"] == [8, 16]
