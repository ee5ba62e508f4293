"""The command line: what it prints where, and with which code it ends."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
import safetensors.torch
import tiny_artifact
import torch
from adb_phone import SERIAL, Phone
from conftest import TINY_MODEL
from PIL import Image

import mobilevd_deploy
from mobilevd_deploy import inspection
from mobilevd_deploy import deploy as flow
from mobilevd_deploy.artifact import Artifact
from mobilevd_deploy.cli.main import app, main
from mobilevd_deploy.doctor import Finding
from mobilevd_deploy.errors import ArtifactError, MobileVDError, VendorError
from mobilevd_deploy.passes import PASSES
from mobilevd_deploy.profiles import (
    ComponentProfile,
    Latency,
    Profile,
    TrafficReport,
    TrafficRow,
    now,
    profiles_dir,
    save_profile,
    save_traffic,
)
from mobilevd_deploy.recipe import PassName, load_recipe
from mobilevd_deploy.tune import Step, Tuned

VERBS = (
    "init",
    "export",
    "generate",
    "verify",
    "traffic",
    "tune",
    "inspect",
    "diff",
    "train-demo",
    "profile",
    "install",
    "pack",
    "report",
    "doctor",
    "jobs",
    "devices",
)


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a call of the command line ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, which must be one JSON value and nothing else."""
        return json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


Run = Callable[..., Ended]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Call the command line in an empty folder, in this process."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> Ended:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["mobilevd-deploy", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capfd.readouterr()
        assert "Traceback" not in captured.out + captured.err
        return Ended(int(ended.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "photo.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)).save(path)
    return path


@pytest.fixture
def artifact(exported: dict[str, Artifact]) -> Artifact:
    return exported["onnx"]


# ---- help, version, usage ----


@pytest.mark.parametrize("verb", VERBS)
def test_help_ends_in_an_example(verb: str, run: Run) -> None:
    shown = run(verb, "--help")
    assert shown.code == 0
    assert shown.err == ""
    assert re.search(rf"Examples?: mobilevd-deploy {verb} ", shown.out)
    assert run(verb, "-h").out == shown.out


def test_every_verb_is_tested_here() -> None:
    names = [c.name or c.callback.__name__ for c in app.registered_commands]  # type: ignore[union-attr]
    assert sorted(names) == sorted(VERBS)


def test_help_of_the_whole(run: Run) -> None:
    shown = run("--help")
    assert shown.code == 0
    assert all(verb in shown.out for verb in VERBS)
    assert "Example: mobilevd-deploy export" in shown.out
    assert run().code == 2


def test_version(run: Run) -> None:
    assert run("--version") == Ended(0, f"{mobilevd_deploy.__version__}\n", "")


def processor_seconds(code: str, *arguments: str) -> tuple[float, str]:
    """Run Python code in a process of its own; return its processor time and what it wrote to stderr."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ended.returncode == 0, ended.stderr
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, ended.stderr


def test_help_is_quick_and_needs_no_torch() -> None:
    """Processor time against typer's own for one empty verb, so that a slow machine does not matter."""
    ours = """
import sys
from mobilevd_deploy.cli.main import main
try:
    main()
finally:
    heavy = {"torch", "numpy", "onnx", "onnxruntime", "diffusers", "transformers", "PIL"} & set(sys.modules)
    print("heavy", sorted(heavy), file=sys.stderr)
"""
    empty = """
import typer
app = typer.Typer(epilog="Example", rich_markup_mode="rich")
@app.command()
def verb(number: int = 0) -> None: ...
app()
"""
    seconds = []
    for _ in range(2):
        own, stderr = processor_seconds(ours, "export", "--help")
        assert stderr == "heavy []\n"
        seconds.append((own, processor_seconds(empty, "--help")[0]))
    assert min(own for own, _ in seconds) < 2.5 * min(bare for _, bare in seconds)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["exprot"], "exprot"),
        (["export", "--nonsense"], "--nonsense"),
        (["export", "a.pt", "b.pt"], "b.pt"),
        (["generate"], "IMAGE"),
        (["generate", "a.png", "--seed", "-1"], "seed"),
        (["generate", "a.png", "--seed", str(2**64)], "seed"),
        (["generate", "a.png", "--seed", "soon"], "seed"),
        (["generate", "a.png", "--scale", "0"], "scale"),
        (["diff", "one"], "B"),
        (["inspect"], "--ladder"),
        (["inspect", "svd", "--ladder"], "--ladder"),
        (["inspect", "no-such-thing"], "no-such-thing"),
        (["export", "a.pt", "--recipe", "no-such-recipe"], "no-such-recipe"),
    ],
)
def test_wrong_usage(arguments: list[str], word: str, run: Run, tmp_path: Path) -> None:
    ended = run(*arguments)
    assert ended.code == 2
    assert ended.out == ""
    assert word.lower() in ended.err.lower()
    ended = run(*arguments, "--json")
    if "--nonsense" not in arguments and "exprot" not in arguments:
        assert word.lower() in ended.json["error"].lower()
    assert (ended.json["exit_code"], ended.code) == (2, 2)
    assert ended.json["next_step"]
    assert list(tmp_path.iterdir()) == []


def test_names_of_passes_in_recipes() -> None:
    """recipe.py knows no torch, so it lists them itself; sub-pixel upsampling belongs to a graph form."""
    assert typing.get_args(PassName) == tuple(p.name for p in PASSES if p.name != "subpixel-upsampling")
    assert "subpixel-upsampling" in [p.name for p in PASSES]


# ---- export ----


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

    monkeypatch.setattr(flow, "export_onnx", copy)
    stopped = run("export", tiny_checkpoint, "-r", "onnx")
    assert (stopped.code, stopped.out) == (130, "")
    assert stopped.err.endswith("error: interrupted\n next: run the same command again to go on\n")
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


def test_interrupted_json_is_json(run: Run, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(flow, "deploy", interrupt)
    ended = run("export", tiny_checkpoint, "-r", "onnx", "--json")
    assert ended.code == ended.json["exit_code"] == 130


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ArtifactError("it is broken", next_step="mend it"), 1),
        (VendorError("it is away", next_step="wait"), 3),
        (MemoryError(), 1),
    ],
)
def test_exit_codes(
    error: Exception, code: int, run: Run, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(flow, "deploy", fail)
    ended = run("export", tiny_checkpoint, "-r", "onnx", "-q")
    what = error.what if isinstance(error, MobileVDError) else "not enough memory"
    assert (ended.code, ended.out) == (code, "")
    assert ended.err.startswith(f"error: {what}\n next: ")
    ended = run("export", tiny_checkpoint, "-r", "onnx", "--json")
    assert ended.json["error"] == what
    assert ended.json["exit_code"] == ended.code == code


class WantsCode:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def hostile(path: Path, _: Path) -> None:
    torch.save({"format": 1, "spec": {}, "tensors": {}, "more": WantsCode(path.parent / "made")}, path)


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
    assert "not touched" in ended.json["error"]
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "mine"


# ---- generate ----


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


# ---- inspect and diff ----

KEYS = {"parameters", "tflops", "tflops_paper_convention", "temporal_blocks"}


def test_inspect_a_checkpoint(run: Run, tiny_checkpoint: Path) -> None:
    ended = run("inspect", tiny_checkpoint, "--json")
    assert (ended.code, ended.err) == (0, "")
    result = ended.json
    assert set(result) >= KEYS
    assert (result["kind"], result["name"]) == ("checkpoint", "tiny")
    with safetensors.safe_open(tiny_checkpoint, framework="pt") as opened:
        names = [n for n in opened.keys() if n.startswith("unet.")]  # noqa: SIM118
        stored = sum(opened.get_tensor(n).numel() for n in names if not n.endswith(".gate"))
        gates = [float(opened.get_tensor(n)) for n in names if n.endswith(".gate")]
        importance = {
            n.removeprefix("unet.").removesuffix(".time_mixer.importance"): float(opened.get_tensor(n))
            for n in names
            if n.endswith(".importance")
        }
    blocks = result["temporal_blocks"]
    assert result["parameters"] == stored
    assert (blocks["total"], blocks["kept"]) == (len(gates), sum(gates))
    assert {b["path"]: b["importance"] for b in blocks["blocks"]} == pytest.approx(importance)
    assert 0 < result["tflops"] < result["tflops_paper_convention"]
    shown = run("inspect", tiny_checkpoint)
    assert shown.code == 0
    for words in ("9 of 12 kept", f"{stored:,} in training form", "mid_block.attentions.0", "dropped"):
        assert words in shown.out


def test_inspect_a_preset(run: Run) -> None:
    result = run("inspect", "demo", "--json").json
    assert set(result) >= KEYS
    assert result["kind"] == "preset"
    assert result["temporal_blocks"]["total"] >= result["temporal_blocks"]["kept"] > 0
    assert "levels" in run("inspect", "demo").out


def test_inspect_an_artifact(run: Run, artifact: Artifact) -> None:
    ended = run("inspect", artifact.root, "--json")
    assert (ended.code, ended.err) == (0, "")
    result = ended.json
    assert set(result) >= KEYS
    assert result["kind"] == "artifact"
    assert result["tflops"] == artifact.manifest.component("unet").flops / 1e12
    assert result["bytes"] == artifact.bytes
    assert (result["temporal_blocks"]["total"], result["temporal_blocks"]["kept"]) == (12, 9)
    assert result["source"]["name"] == "tiny.safetensors"
    assert "tiny (artifact)" in run("inspect", artifact.root).out


def test_inspect_the_ladder(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    # All eight rows are test_inspection's, which counts them once.
    monkeypatch.setattr(inspection, "preset_names", lambda: ["mobilevd", "svd-lowres", "demo"])
    ended = run("inspect", "--ladder", "--json")
    assert (ended.code, ended.err) == (0, "")
    assert [row["preset"] for row in ended.json] == ["svd-lowres", "mobilevd"]
    for row in ended.json:
        assert set(row) >= {"preset", "published_tflops", "tflops", "tflops_paper_convention"}
        assert row["tflops_paper_convention"] == pytest.approx(row["published_tflops"], rel=0.06)


def test_inspect_a_damaged_artifact(run: Run, artifact: Artifact, tmp_path: Path) -> None:
    shutil.copytree(artifact.root, tmp_path / "model")
    (tmp_path / "model" / "unet" / "model.onnx").unlink()
    ended = run("inspect", "model", "--json")
    assert ended.code == 1
    assert "unet/model.onnx is missing" in ended.json["error"]


def test_diff(run: Run, exported: dict[str, Artifact], tmp_path: Path) -> None:
    a, b = exported["onnx"], exported["npu-float"]
    ended = run("diff", a.root, b.root, "--json")
    assert (ended.code, ended.err) == (0, "")
    rows = {(row["component"], row["quantity"]): row for row in ended.json}
    assert rows[None, "bytes"] == {
        "component": None,
        "quantity": "bytes",
        "a": a.bytes,
        "b": b.bytes,
        "a_error_percent": None,
        "b_error_percent": None,
        "equal": False,
    }
    assert rows["unet", "ops.GroupNormalization"]["b"] is None
    assert rows["unet", "ops.InstanceNormalization"]["a"] is None
    assert rows["unet", "drift_db.onnx"]["a"] == a.manifest.drift["onnx"]["unet"]
    assert rows["unet", "ops.Gelu"]["equal"]
    shown = run("diff", a.root, b.root)
    assert "ops.InstanceNormalization" in shown.out
    assert "ops.Gelu" not in shown.out
    assert "ops.Gelu" in run("diff", a.root, b.root, "--all").out
    assert "no difference" in run("diff", a.root, a.root).out
    ended = run("diff", a.root, "nowhere", "--json")
    assert (ended.code, ended.json["exit_code"]) == (1, 1)


def test_paths_that_the_system_refuses(run: Run) -> None:
    ended = run("inspect", "n" * 300, "--json")
    assert (ended.code, ended.json["exit_code"]) == (1, 1)
    assert "too long" in ended.json["error"]


# ---- as a program ----


def test_as_a_program(exported: dict[str, Artifact], tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The installed script, in a process of its own: streams and codes are the operating system's."""

    def program(*arguments: object) -> subprocess.CompletedProcess[str]:
        script = Path(sys.executable).with_name("mobilevd-deploy")
        command = [script] if script.exists() else [sys.executable, "-m", "mobilevd_deploy"]
        return subprocess.run([*command, *map(str, arguments)], cwd=tmp_path, capture_output=True, text=True)

    ended = program("diff", *(artifact.root for artifact in exported.values()), "--json")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert json.loads(ended.stdout)[0]["quantity"] == "bytes"
    hostile(tmp_path / "bad.pt", tiny_checkpoint)
    ended = program("export", "bad.pt", "-r", "onnx", "--json")
    assert ended.returncode == 1
    assert json.loads(ended.stdout)["exit_code"] == 1
    assert "Traceback" not in ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["bad.pt"]
    assert program("generate").returncode == 2


@pytest.mark.parametrize("arguments", [["diff", "--json"], ["--help"]])
def test_a_reader_that_goes_away(arguments: list[str], exported: dict[str, Artifact]) -> None:
    operands = [str(artifact.root) for artifact in exported.values()] if "diff" in arguments else []
    reader, writer = os.pipe()
    os.close(reader)
    try:
        ended = subprocess.run(
            [sys.executable, "-m", "mobilevd_deploy", *arguments, *operands],
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        os.close(writer)
    assert (ended.returncode, ended.stderr) == (1, "")


def test_the_spec_of_the_fixture_has_what_the_tests_assume() -> None:
    assert TINY_MODEL.unet.gated
    assert TINY_MODEL.unet.temporal_multiscaling == "conv"
    assert TINY_MODEL.unet.kept_temporal_blocks is not None
    assert TINY_MODEL.step.noise_aug_strength > 0
    assert max(dataclasses.astuple(TINY_MODEL.unet.funnels)) < 1


# ---- a phone on the desk, and this computer ----


@pytest.fixture
def phone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Phone:
    phone = Phone(tmp_path / "adb")
    monkeypatch.setenv("PATH", f"{phone.bin}:{os.environ['PATH']}")
    monkeypatch.delenv("ANDROID_SERIAL", raising=False)
    return phone


@pytest.fixture
def tiny(tmp_path: Path) -> Artifact:
    return tiny_artifact.write_artifact(tmp_path / "tiny")


def test_profile_over_adb_with_and_without_a_serial_number(phone: Phone, tiny: Artifact, run: Run) -> None:
    for words in (["--adb", tiny.root], [tiny.root, "--adb"], ["--adb", SERIAL, tiny.root]):
        ended = run("profile", *words, "--samples", 2, "--components", "unet", "--json")
        assert ended.code == 0
        assert (ended.json["source"], ended.json["device"]) == ("adb", "Example Made-up Phone")
        assert ended.json["asked_for"] == (SERIAL if SERIAL in words else "attached phone")
        assert ended.json["total_ms"] == 10.25
    assert "no phone X is attached" in run("profile", tiny.root, "--adb", "X").err
    phone.app(fails_at="unet")
    ended = run("profile", tiny.root, "--adb", "--samples", 2)
    assert ended.code == 3
    assert "error 5005" in ended.err


def test_install_and_pack(phone: Phone, tiny: Artifact, run: Run) -> None:
    ended = run("install", tiny.root, "--json")
    assert ended.json["path"].endswith("/files/artifacts/tiny")
    assert (phone.files / "artifacts/tiny/manifest.json").exists()
    assert "tiny is on" in run("install", tiny.root, "--adb", SERIAL).out
    phone.set(absent=True)
    ended = run("install", tiny.root)
    assert ended.code == 3
    assert "make apk" in ended.err
    ended = run("pack", tiny.root, "--json")
    assert (ended.json["file"], ended.json["bytes"]) == ("tiny.mvd", Path("tiny.mvd").stat().st_size)
    assert run("pack", tiny.root, "-o", "x.zip").code == 2


def test_profiles_on_this_computer_are_reported_and_compared(tiny: Artifact, run: Run) -> None:
    assert run("report", tiny.root).code == 2
    ended = run("profile", tiny.root, "--host", "--samples", 2, "--json")
    assert ended.json["source"] == "host"
    assert [c["name"] for c in ended.json["components"]] == [c.name for c in tiny.manifest.components]
    assert run("profile", tiny.root, "--host", "--samples", 2).code == 0
    ended = run("report", tiny.root)
    assert "this computer" in ended.out
    assert "report.html" in ended.out
    page = Path(run("report", tiny.root, "--json").json["page"])
    assert "measured on this computer" in page.read_text()
    rows = (TrafficRow("unet", 3_000_000, 1_000_000),)
    planned = TrafficReport(1, "tiny", tiny.digest, "SM8650", "w8a16", 0, "2025-01-31T12:00:00Z", rows)
    save_traffic(planned, profiles_dir(tiny))
    ended = run("report", tiny.root)
    assert "DRAM traffic planned for SM8650: 3.0 MB read, 1.0 MB written" in ended.out
    assert "DRAM traffic on SM8650" in page.read_text()
    assert len(run("report", tiny.root, "--json").json["traffic"]) == 1
    rows = run("diff", tiny.root, tiny.root, "--json").json
    assert any(
        r["quantity"].startswith("ms.host.this computer on") and r["component"] == "unet" for r in rows
    )
    Artifact.open(tiny.root).verify()


def test_diff_shows_the_errors_of_estimates(tiny: Artifact, run: Run) -> None:
    unet = ComponentProfile("unet", Latency(200.0))
    made = Profile(
        1, "S24", "S24", "8 Gen 3", "estimate", now(), "tiny", tiny.digest, (unet,), 200.0, error_percent=9.0
    )
    save_profile(made, profiles_dir(tiny))
    assert "200 ± 9 %" in run("diff", tiny.root, tiny.root, "--all").out


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (("report",), "name one as the argument"),
        (("jobs", "--offline"), "name one as the argument"),
        (("profile", "--host"), "name one as the argument"),
        (("profile", "--estimate", "-d", "S24"), "name one, or a preset such as mobilevd, as the argument"),
        (("generate", "photo.jpg", "-o", "x.gif"), "name one with --artifact"),
    ],
)
def test_where_no_artifact_is_the_advice_fits_the_command(
    arguments: tuple[str, ...], advice: str, run: Run
) -> None:
    ended = run(*arguments)
    assert ended.code == 2
    assert f"next: {advice}, or make one with mobilevd-deploy export" in ended.err


def test_an_estimate_names_the_artifact_that_it_took(tiny: Artifact, run: Run) -> None:
    ended = run("profile", "--estimate", "-d", "S24")
    assert ended.err.startswith(f"estimating {tiny.root.name}\n")
    assert "there is no estimate" in ended.err  # so small a clip has none


def test_tune_refuses_what_does_not_fit_together(run: Run) -> None:
    for options, message in (
        ((), "one goal is needed"),
        (("--budget", 1, "--target-sqnr", 30), "one goal is needed"),
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


@pytest.mark.parametrize(
    "options",
    [
        ("--host", "--estimate"),
        ("--adb", "--host"),
        ("--host", "--check"),
        ("--adb", "--device", "S24"),
        ("--backend", "cpu"),
        ("--resume", "--host"),
    ],
)
def test_ways_to_profile_that_do_not_fit_together(tiny: Artifact, run: Run, options: tuple[str, ...]) -> None:
    assert run("profile", tiny.root, *options).code == 2


def test_doctor_answers_by_its_exit_code(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for ready in (True, False):
        found = [Finding("disk", ready, True, "so much", None if ready else "free some")]
        found.append(Finding("phone", False, False, "none", "plug one in"))
        monkeypatch.setattr("mobilevd_deploy.doctor.examine", lambda *_, found=found: found)
        ended = run("doctor")
        assert ended.code == (0 if ready else 1)
        assert "not yet phone: none -> plug one in" in ended.out
        assert ("MISSING disk: so much -> free some" in ended.out) == (not ready)
        assert run("doctor", "--json").json["ready"] == ready
