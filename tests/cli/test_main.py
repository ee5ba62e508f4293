"""The entry point: help, usage, exit codes, and what is printed where."""

from __future__ import annotations

import importlib
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import mobilevd_deploy
from mobilevd_deploy.artifact.artifact import Artifact
from mobilevd_deploy.cli.main import app
from mobilevd_deploy.errors import ArtifactError, MobileVDError, VendorError
from tests.cli.conftest import Ended, Run, hostile

flow = importlib.import_module("mobilevd_deploy.deploy")  # the name in the package is the function

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
    "profile hub",
    "profile phone",
    "profile host",
    "profile estimate",
    "install",
    "pack",
    "report",
    "doctor",
    "jobs",
    "devices",
)


@pytest.mark.parametrize("verb", VERBS)
def test_help_ends_in_an_example(verb: str, run: Run) -> None:
    shown = run(*verb.split(), "--help")
    assert shown.code == 0
    assert shown.err == ""
    assert re.search(rf"Examples?: mobilevd-deploy {verb} ", shown.out)
    assert run(*verb.split(), "-h").out == shown.out


def test_defaults_without_a_value_are_shown(run: Run) -> None:
    """Rich would take words in brackets for markup and drop them."""
    for words, default in (
        (["verify"], "the newest one below this folder"),
        (["export"], "the demo checkpoint of the package"),
        (["profile", "hub"], "the newest artifact below this folder"),
    ):
        assert f"[default: ({default})]" in re.sub(r"[\s│]+", " ", run(*words, "--help").out)


def test_paragraphs_of_help_are_not_broken_as_in_the_source(run: Run) -> None:
    assert "interrupted run loses\n" not in run("profile", "hub", "--help").out
    assert "Without AI Hub's client or a token" in run("profile", "hub", "--help").out


def command_paths(group: Any, above: str = "") -> Iterator[str]:
    for name, command in group.commands.items():
        yield above + name
        if hasattr(command, "commands"):
            yield from command_paths(command, f"{above}{name} ")


def test_every_verb_is_tested_here() -> None:
    assert sorted(command_paths(get_command(app))) == sorted(VERBS)


def test_help_of_the_whole(run: Run) -> None:
    shown = run("--help")
    assert shown.code == 0
    assert all(verb in shown.out for verb in VERBS if " " not in verb)
    panels = re.findall(r"─ (Export|Use|Measure|Look|Commands) ─", shown.out)
    assert panels == ["Export", "Use", "Measure", "Look"]
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
    heavy = {"torch", "numpy", "onnx", "onnxruntime", "diffusers", "transformers", "PIL", "aimet_torch"}
    heavy = (heavy | {"onnxruntime_qnn", "qai_hub"}) & set(sys.modules)
    print("heavy", sorted(heavy), file=sys.stderr)
"""
    empty = """
import typer
app = typer.Typer(epilog="Example", rich_markup_mode="rich")
@app.command()
def verb(number: int = 0) -> None: ...
app()
"""
    bare = min(processor_seconds(empty, "--help")[0] for _ in range(2))
    for words in (["--help"], ["export", "--help"], ["profile", "hub", "--help"]):
        seconds = []
        for _ in range(2):
            own, stderr = processor_seconds(ours, *words)
            assert stderr == "heavy []\n"
            seconds.append(own)
        assert min(seconds) < 2.5 * bare


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


@pytest.mark.slow
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


def redirected(redirection: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command line behind a redirection of the shell."""
    command = [sys.executable, "-m", "mobilevd_deploy", *map(str, arguments)]
    shell = ["sh", "-c", f'exec "$@" {redirection}', "sh", *command]
    return subprocess.run(shell, cwd=cwd, capture_output=True, text=True)


WRONG = ("devices", "no-such-phone")  # an error that needs no torch


@pytest.mark.parametrize(
    ("redirection", "arguments", "code", "out", "err"),
    [
        (">&-", ["--version"], 0, "", ""),
        (">&-", ["--help"], 0, "", ""),
        (">&-", WRONG, 2, "", "error: no phone or chip is called"),
        (">&-", [*WRONG, "--json"], 2, "", "error: no phone or chip is called"),
        (">&-", ["exprot"], 2, "", "No such command 'exprot'"),
        ("2>&-", ["--version"], 0, mobilevd_deploy.__version__, ""),
        ("2>&-", WRONG, 2, "", ""),
        ("2>&-", [*WRONG, "--json"], 2, '"exit_code": 2', ""),
        ("2>&-", ["exprot"], 2, "", ""),
        ("<&- >&- 2>&-", ["--version"], 0, "", ""),
        ("<&- >&- 2>&-", WRONG, 2, "", ""),
        ("> /dev/full", ["--version"], 1, "", "No space left on device"),
        ("> /dev/full", [*WRONG, "--json"], 2, "", ""),
        ("2> /dev/full", WRONG, 2, "", ""),
        ("2> /dev/full", ["exprot"], 2, "", ""),
    ],
)
def test_outputs_that_are_closed_or_full(
    redirection: str, arguments: Sequence[str], code: int, out: str, err: str, tmp_path: Path
) -> None:
    """The exit code is the command's own, and nothing lands in the other output."""
    ended = redirected(redirection, *arguments, cwd=tmp_path)
    assert ended.returncode == code
    for written, words in ((ended.stdout, out), (ended.stderr, err)):
        assert words in written
        assert bool(words) == bool(written)
        assert "Traceback" not in written
        assert "Exception ignored" not in written


@pytest.mark.slow
def test_progress_without_standard_error(artifact: Artifact, tiny_checkpoint: Path, tmp_path: Path) -> None:
    arguments = ("export", tiny_checkpoint, "-r", "onnx", "-o", artifact.root)
    ended = redirected("2>&-", *arguments, cwd=tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith(f"{artifact.root}: ")
    assert redirected(">&- 2>&-", *arguments, cwd=tmp_path).returncode == 0


def test_no_file_gets_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    code = """
import os
from mobilevd_deploy.cli.main import main
try:
    main()
finally:
    null = os.stat(os.devnull)
    os._exit(0 if all(os.path.samestat(os.fstat(number), null) for number in (0, 1, 2)) else 1)
"""
    shell = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", code, "--version"]
    assert subprocess.run(shell, cwd=tmp_path).returncode == 0


def test_a_reader_of_errors_that_goes_away(tmp_path: Path) -> None:
    """The error's own exit code stays, with either stream on the broken pipe."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "mobilevd_deploy", *WRONG]
    try:
        assert subprocess.run(command, cwd=tmp_path, stderr=writer).returncode == 2
        ended = subprocess.run([*command, "--json"], cwd=tmp_path, stdout=writer, capture_output=False)
        assert ended.returncode == 2
    finally:
        os.close(writer)


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (("report",), "name one as the argument"),
        (("jobs", "--offline"), "name one as the argument"),
        (("profile", "host"), "name one as the argument"),
        (("profile", "estimate", "-d", "S24"), "name one, or a preset such as mobilevd, as the argument"),
        (("generate", "photo.jpg", "-o", "x.gif"), "name one with --artifact"),
    ],
)
def test_where_no_artifact_is_the_advice_fits_the_command(
    arguments: tuple[str, ...], advice: str, run: Run
) -> None:
    ended = run(*arguments)
    assert ended.code == 2
    assert f"next: {advice}, or make one with mobilevd-deploy export" in ended.err
