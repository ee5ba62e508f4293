from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import typing
from pathlib import Path

import jsonschema
import pytest

import mobilevd_deploy
from mobilevd_deploy.artifact.artifact import Artifact, find_newest
from mobilevd_deploy.artifact.diff import diff
from mobilevd_deploy.artifact.manifest import (
    MANIFEST,
    MANIFEST_DIGEST,
    Component,
    FileEntry,
    Manifest,
    NpuBinary,
    NpuPart,
    PassReport,
    PipelineSpec,
    Source,
)
from mobilevd_deploy.artifact.partial import PartialArtifact
from mobilevd_deploy.base.files import disk_guard
from mobilevd_deploy.base.processes import StageCost
from mobilevd_deploy.errors import ArtifactError, ResourceError, SpecError, UsageError
from mobilevd_deploy.model.interface import TensorSpec
from tests.support.schema_mutations import same_verdicts
from tests.support.tiny_artifact import build, write_artifact

SCHEMA = json.loads((Path(mobilevd_deploy.__file__).parent / "artifact" / "manifest.schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Manifest:
    return build(tmp_path_factory.mktemp("built"))


@pytest.fixture
def artifact(tmp_path) -> Artifact:
    return write_artifact(tmp_path / "clip model")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def rewrite_manifest(root: Path, change) -> None:
    """Change the manifest and update its digest."""
    values = json.loads((root / MANIFEST).read_text())
    text = change(values) or json.dumps(values)
    (root / MANIFEST).write_text(text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    (root / MANIFEST_DIGEST).write_text(f"{digest}  {MANIFEST}\n")


# Manifest: values


def test_round_trip_through_json(manifest):
    again = Manifest.from_json(manifest.to_json())
    assert again == manifest
    assert isinstance(again.components[0].inputs[0], TensorSpec)
    assert again.components[0].inputs[0].range == (-1.0, 1.0)


def test_json_is_valid_for_the_schema(manifest):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    VALIDATOR.validate(json.loads(manifest.to_json()))


def test_identical_outputs_are_null_in_json(manifest):
    report = PassReport("x", (), 1, 1, 1, 1, math.inf)
    assert report.sqnr_db is None
    changed = dataclasses.replace(manifest, drift={"onnx": {"unet": math.inf, "decoder": 90.5}})
    assert json.loads(changed.to_json())["drift"] == {"onnx": {"unet": None, "decoder": 90.5}}


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_drift_that_measured_nothing_is_refused(manifest, value):
    with pytest.raises(SpecError, match=r"drift\.onnx\.unet"):
        dataclasses.replace(manifest, drift={"onnx": {"unet": value}})
    with pytest.raises(SpecError, match="pass x"):
        PassReport("x", (), 1, 1, 1, 1, value)


@pytest.mark.parametrize(
    "path",
    ["../x", "/etc/passwd", "a/../../x", "a//b", "", ".", "..", "a/..", "a\\b", "C:/x", ".hidden", "a/.b",
     "a b", "a/", "manifest.json", "manifest.sha256", "a\n"],
)  # fmt: skip
def test_paths_that_leave_the_folder_or_are_odd_are_refused(path):
    with pytest.raises(SpecError):
        FileEntry(path, "0" * 64, 1)


@pytest.mark.parametrize(
    "source", ["", "noise", "noise:", "noise:-1", "noise:01", "component:", "Image", "file:x"]
)
def test_unknown_sources_are_refused(source):
    with pytest.raises(SpecError, match="source"):
        TensorSpec("x", (1,), "float32", "N", None, source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": ""}, "empty name"),
        ({"shape": ()}, "not all positive"),
        ({"shape": (1, 0)}, "not all positive"),
        ({"layout": "NCHW"}, "does not name 2 axes"),
        ({"layout": "NX"}, "does not name 2 axes"),
        ({"range": (1.0, 1.0)}, "is empty"),
        ({"range": (math.nan, 1.0)}, "is empty"),
    ],
)
def test_tensor_specs_that_do_not_fit(change, message):
    with pytest.raises(SpecError, match=message):
        dataclasses.replace(TensorSpec("x", (1, 2), "float32", "NC"), **change)


def without(items, index):
    return tuple(item for i, item in enumerate(items) if i != index)


def test_components_must_be_wired(manifest):
    encoder, vae, unet, decoder = manifest.components

    def refused(components, message):
        with pytest.raises(SpecError, match=message):
            dataclasses.replace(manifest, components=components)

    refused((), "components: the list is empty")
    refused((encoder, unet, vae, decoder), "image_latents: no earlier component provides")
    refused((encoder, vae, unet), "not the frames")
    other = dataclasses.replace(vae.outputs[0], shape=(1, 4, 2, 2))
    refused((encoder, dataclasses.replace(vae, outputs=(other,)), unet, decoder), "does not match the output")
    half = dataclasses.replace(vae.outputs[0], dtype="float16")
    refused((encoder, dataclasses.replace(vae, outputs=(half,)), unet, decoder), "does not match the output")
    small = dataclasses.replace(encoder.inputs[0], shape=(1, 3, 8, 8))
    refused((dataclasses.replace(encoder, inputs=(small,)), vae, unet, decoder), "the image is")
    refused((encoder, encoder, vae, unet, decoder), "listed twice")


def test_components_that_do_not_fit(manifest):
    unet = manifest.component("unet")
    for change, message in [
        ({"name": "a/b"}, "component name"),
        ({"files": {}}, "role 'model'"),
        ({"inputs": ()}, "needs inputs"),
        ({"outputs": ()}, "one output"),
        ({"outputs": (unet.outputs[0], dataclasses.replace(unet.outputs[0], name="more"))}, "one output"),
        ({"inputs": unet.inputs[:1] * 2}, "listed twice"),
        ({"inputs": unet.outputs}, "has no source"),
        ({"outputs": unet.inputs[:1]}, "has a source"),
        ({"parameters": -1}, "negative"),
        ({"ops": {"Add": -1}}, "negative"),
    ]:
        with pytest.raises(SpecError, match=message):
            dataclasses.replace(unet, **change)


def npu_part(inputs, outputs, name="whole") -> NpuPart:
    files = {role: FileEntry(f"unet/{name}.{role}", "0" * 64, 1) for role in ("wrapper", "context")}
    return NpuPart(files, inputs, outputs)


def test_parts_must_lead_from_inputs_to_output(manifest):
    unet = manifest.component("unet")
    inputs = ("noise", "image_latents", "image_embeds")
    first, second = npu_part(inputs[:2], ("x", "skip"), "a"), npu_part(("x", "noise"), ("latents",), "b")

    def with_parts(*parts):
        binary = NpuBinary("SM8650", 75, "w8a16", "2.40.0", "v2.51.0", parts)
        return dataclasses.replace(unet, npu=(binary,))

    for parts in ((npu_part(inputs, ("latents",)),), (first, second)):
        assert with_parts(*parts).npu[0].bytes == 2 * len(parts)
    for parts, message in [
        ((), "last part does not provide latents"),
        ((first,), "last part does not provide latents"),
        ((second, first), "no earlier part provides x"),
        ((first, first, second), "x is provided twice"),
    ]:
        with pytest.raises(SpecError, match=message):
            with_parts(*parts)
    with pytest.raises(SpecError, match="needs inputs and outputs"):
        npu_part(inputs, ())
    with pytest.raises(SpecError, match="not wrapper and context"):
        dataclasses.replace(first, files={})


def test_two_roles_cannot_share_a_file(manifest):
    entry = manifest.components[0].files["model"]
    shouted = dataclasses.replace(entry, path=entry.path.upper())
    for twin in (entry, shouted):
        with pytest.raises(SpecError, match="listed twice"):
            dataclasses.replace(manifest, files={"report": twin})


def test_component_by_name(manifest):
    assert manifest.component("unet").name == "unet"
    with pytest.raises(ArtifactError, match="no component 'nett'"):
        manifest.component("nett")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not readable"),
        ("{", "not readable"),
        ("[]", "no schema_version"),
        ("{}", "no schema_version"),
        ('{"schema_version": "1"}', "no schema_version"),
        ('{"schema_version": true}', "no schema_version"),
        ('{"schema_version": 2}', "schema version 2; this toolkit reads 1"),
        ('{"schema_version": 1}', "missing"),
        ('{"schema_version": 1, "schema_version": 1}', "occurs twice"),
        ('{"schema_version": 1, "x": NaN}', "not a number"),
        ('{"schema_version": 1, "x": 1e999}', "not a number"),
        ("[" * 100_000, "not readable"),
        (b"\xff\xfe\x00", "not readable"),
    ],
)
def test_text_that_is_no_manifest(text, message):
    with pytest.raises(ArtifactError, match=message):
        Manifest.from_json(text)


# Manifest: the JSON Schema says the same as the dataclasses

DATACLASSES = (
    Manifest,
    Source,
    PassReport,
    Component,
    NpuBinary,
    NpuPart,
    TensorSpec,
    FileEntry,
    PipelineSpec,
    StageCost,
)


@pytest.mark.parametrize("cls", DATACLASSES)
def test_schema_lists_the_fields(cls):
    entry = SCHEMA["$defs"][cls.__name__]
    fields = dataclasses.fields(cls)
    assert set(entry["properties"]) == {f.name for f in fields}
    needed = {
        f.name
        for f in fields
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    assert set(entry["required"]) == needed
    assert entry["additionalProperties"] is False


@pytest.mark.parametrize("cls", DATACLASSES)
def test_schema_lists_the_choices(cls):
    for name, hint in typing.get_type_hints(cls).items():
        if typing.get_origin(hint) is typing.Literal:
            entry = SCHEMA["$defs"][cls.__name__]["properties"][name]
            assert entry.get("enum", [entry.get("const")]) == list(typing.get_args(hint))


def test_schema_and_dataclasses_refuse_the_same(manifest):
    original = json.loads(manifest.to_json())
    # One component is enough; its output must be the frames.
    component = original["components"][1]
    del component["inputs"][1]
    component["outputs"][0]["shape"] = [2, 3, 16, 24]
    original["components"] = [component]
    # A JSON Schema cannot express repeated files, wiring and the order of numbers.
    beyond = ("listed twice", "no earlier component", "not the frames", "the image is", "does not name",
              "has no source", "no earlier part provides", "has a source", "range")  # fmt: skip
    accepted, refused = same_verdicts(
        original, lambda values: Manifest.from_json(json.dumps(values)), VALIDATOR, beyond
    )
    assert accepted > 50
    assert refused > 500


# Reading


def test_open_and_verify(artifact):
    again = Artifact.open(artifact.root)
    assert again.manifest == artifact.manifest
    again.verify()
    unet = again.manifest.component("unet")
    assert again.path(unet, "model") == artifact.root / "unet" / "model.onnx"
    assert again.bytes == sum(
        p.stat().st_size
        for p in artifact.root.rglob("*")
        if p.is_file() and not p.name.startswith("manifest")
    )


def test_manifest_digest_is_what_sha256sum_checks(artifact):
    digest = hashlib.sha256((artifact.root / MANIFEST).read_bytes()).hexdigest()
    assert (artifact.root / MANIFEST_DIGEST).read_text() == f"{digest}  manifest.json\n"


def all_files(root: Path) -> list[Path]:
    return sorted(p for p in root.rglob("*") if p.is_file())


def test_a_flipped_bit_in_any_file_is_found(artifact):
    for path in all_files(artifact.root):
        original = path.read_bytes()
        for place in {0, len(original) // 2, len(original) - 1}:
            damaged = bytearray(original)
            damaged[place] ^= 1
            path.write_bytes(damaged)
            with pytest.raises(ArtifactError, match=path.name):
                Artifact.open(artifact.root).verify()
        path.write_bytes(original)
    Artifact.open(artifact.root).verify()


def test_missing_truncated_grown_and_extra_files_are_found_at_once(artifact):
    for path in all_files(artifact.root):
        original = path.read_bytes()
        path.unlink()
        with pytest.raises(ArtifactError, match=f"{path.name} is missing"):
            Artifact.open(artifact.root)
        for changed in (original[:-1], b"", original + b"\n"):
            path.write_bytes(changed)
            with pytest.raises(ArtifactError, match=path.stem):
                Artifact.open(artifact.root)
        path.write_bytes(original)
        extra = path.with_name("extra")
        extra.write_bytes(b"")
        with pytest.raises(ArtifactError, match="extra is not in the manifest"):
            Artifact.open(artifact.root)
        extra.unlink()
    (artifact.root / "unet" / ".DS_Store").write_bytes(b"x")
    Artifact.open(artifact.root)


def test_links_are_not_followed(artifact, tmp_path):
    path = artifact.root / "unet" / "model.onnx"
    outside = tmp_path / "outside.onnx"
    path.rename(outside)
    path.symlink_to(outside)
    with pytest.raises(ArtifactError, match="not a plain file"):
        Artifact.open(artifact.root)


def test_a_file_that_names_another_folder_is_refused(artifact, tmp_path):
    (tmp_path / "secret").write_text("x")

    def point_outside(values):
        values["files"]["report"] = {"path": "../secret", "sha256": "0" * 64, "bytes": 1}

    rewrite_manifest(artifact.root, point_outside)
    with pytest.raises(ArtifactError, match=r"'\.\./secret' is not allowed"):
        Artifact.open(artifact.root)


def test_an_unknown_key_or_version_is_refused(artifact):
    rewrite_manifest(artifact.root, lambda values: values.update(surprise=1))
    with pytest.raises(ArtifactError, match="unknown key 'surprise'"):
        Artifact.open(artifact.root)
    rewrite_manifest(artifact.root, lambda values: values.update(schema_version=7))
    with pytest.raises(ArtifactError, match="schema version 7"):
        Artifact.open(artifact.root)


def test_what_is_no_artifact(tmp_path):
    for path in (tmp_path / "absent", tmp_path, Path("/")):
        with pytest.raises(ArtifactError):
            Artifact.open(path)
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(ArtifactError, match="not a folder"):
        Artifact.open(file)


def test_verify_names_a_file_that_vanished(artifact):
    (artifact.root / "report.html").unlink()
    with pytest.raises(ArtifactError, match="cannot be read"):
        artifact.verify()
    artifact.verify(artifact.manifest.component("unet"))


# Writing


def test_nothing_is_left_beside_a_finished_artifact(tmp_path):
    artifact = write_artifact(tmp_path / "deep" / "er" / "out")
    assert [p.name for p in artifact.root.parent.iterdir()] == ["out"]
    assert sorted(contents(artifact.root)) == [
        "decoder/model.onnx",
        "decoder/model.onnx.data",
        "image_encoder/model.onnx",
        "manifest.json",
        "manifest.sha256",
        "report.html",
        "unet/model.onnx",
        "vae_encoder/model.onnx",
    ]


def test_the_output_does_not_exist_until_it_is_finished(tmp_path):
    output = tmp_path / "out"
    with PartialArtifact(output) as partial:
        manifest = build(partial.artifact)
        assert not output.exists()
        partial.finish(manifest)
    assert output.exists()


def test_an_unfinished_folder_stays_for_the_next_run(tmp_path):
    with PartialArtifact(tmp_path / "out") as partial:
        (partial.work / "weights").write_text("x")
    with PartialArtifact(tmp_path / "out") as partial:
        assert (partial.work / "weights").read_text() == "x"
        partial.clear()
        assert not list(partial.work.iterdir())


def test_left_over_files_do_not_get_into_the_artifact(tmp_path):
    with PartialArtifact(tmp_path / "out") as partial:
        manifest = build(partial.artifact)
        (partial.artifact / "unet" / "model.onnx.data").write_text("of another recipe")
        partial.finish(manifest)
    assert not (tmp_path / "out" / "unet" / "model.onnx.data").exists()


def test_a_manifest_that_does_not_fit_its_files_is_never_published(tmp_path):
    with PartialArtifact(tmp_path / "out") as partial:
        manifest = build(partial.artifact)
        (partial.artifact / "report.html").write_text("changed since")
        with pytest.raises(ArtifactError, match=r"report\.html"):
            partial.finish(manifest)
    assert not (tmp_path / "out").exists()


def test_an_artifact_is_replaced(tmp_path):
    old = write_artifact(tmp_path / "out")
    with PartialArtifact(tmp_path / "out") as partial:
        manifest = dataclasses.replace(build(partial.artifact), name="second")
        assert Artifact.open(old.root).manifest.name == "tiny"
        partial.finish(manifest)
    assert Artifact.open(old.root).manifest.name == "second"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "kind", ["file", "folder", "empty folder", "artifact and a note", "damaged artifact"]
)
def test_an_output_that_is_not_ours_is_never_touched(tmp_path, kind):
    output = tmp_path / "out"
    if kind == "file":
        output.write_text("precious")
    elif "folder" in kind:
        output.mkdir()
        if kind == "folder":
            (output / "notes.txt").write_text("precious")
    else:
        write_artifact(output)
        if "note" in kind:
            (output / "note.txt").write_text("precious")
        else:
            (output / "unet" / "model.onnx").write_bytes(b"precious")
    before = output.read_bytes() if output.is_file() else contents(output)
    with pytest.raises(UsageError, match="left unchanged"), PartialArtifact(output):
        pass
    assert (output.read_bytes() if output.is_file() else contents(output)) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_output_that_appears_meanwhile_is_not_touched(tmp_path):
    output = tmp_path / "out"
    with PartialArtifact(output) as partial:
        manifest = build(partial.artifact)
        output.mkdir()
        (output / "notes.txt").write_text("precious")
        with pytest.raises(UsageError, match="left unchanged"):
            partial.finish(manifest)
    assert contents(output) == {"notes.txt": b"precious"}


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_a_partial_folder_that_is_not_ours_is_never_touched(tmp_path, kind):
    partial = tmp_path / ".out.partial"
    other = tmp_path / "other"
    other.mkdir()
    (other / "lock").write_text("precious")
    if kind == "folder":
        other.rename(partial)
    elif kind == "file":
        partial.write_text("precious")
    else:
        partial.symlink_to(other)
    with pytest.raises(UsageError), PartialArtifact(tmp_path / "out"):
        pass
    if kind == "file":
        assert partial.read_text() == "precious"
    else:
        assert contents(partial) == {"lock": b"precious"}


@pytest.mark.parametrize("output", ["file/out", "/", "/proc/nothing/out"])
def test_an_output_that_cannot_be_written(tmp_path, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError), PartialArtifact(output):
        pass


def test_a_link_to_a_place_is_that_place(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    write_artifact(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    Artifact.open(tmp_path / "elsewhere")
    write_artifact(tmp_path / "link")


def test_a_second_run_is_refused_while_the_first_lives(tmp_path):
    with (
        PartialArtifact(tmp_path / "out"),
        pytest.raises(UsageError, match=f"process {os.getpid()}"),
        PartialArtifact(tmp_path / "out"),
    ):
        pass
    with PartialArtifact(tmp_path / "out"):
        pass


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    code = (
        "import os, signal, sys\n"
        "from mobilevd_deploy.artifact.partial import PartialArtifact\n"
        "PartialArtifact(sys.argv[1]).__enter__()\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "out")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match=f"process {child.pid}"), PartialArtifact(tmp_path / "out"):
            pass
        child.send_signal(signal.SIGKILL)
        child.wait()
    with PartialArtifact(tmp_path / "out"):
        pass


def test_threads_that_race_for_the_output(tmp_path):
    """The thread with the lock finishes, the others raise UsageError, and no temporary file remains."""
    outcomes: list[str] = []

    def run():
        finished = 0
        while finished < 5:
            try:
                write_artifact(tmp_path / "out")
                outcomes.append("written")
                finished += 1
            except UsageError as error:
                outcomes.append("another run" if "another run" in error.what else str(error))
                finished += outcomes[-1] != "another run"

    threads = [threading.Thread(target=run) for _ in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # switch threads between any two steps
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert set(outcomes) <= {"written", "another run"}
    assert "written" in outcomes
    Artifact.open(tmp_path / "out").verify()


CHANGES = ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate", "open")


def killed_at_event(number: int, output: Path) -> bool:
    """Write in a child that is killed before its n-th change to the disk; False if it was not killed."""
    child = os.fork()
    if child == 0:
        seen, armed = 0, True

        def hook(event, args):
            nonlocal seen
            reads = event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR)
            if armed and event in CHANGES and not reads and str(output.parent) in str(args[0]):
                seen += 1
                if seen == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        code = 1
        try:
            sys.addaudithook(hook)
            with PartialArtifact(output) as partial:
                armed = False
                manifest = dataclasses.replace(build(partial.artifact), name="new")
                armed = True
                partial.finish(manifest)
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.waitstatus_to_exitcode(status) == 0
    return False


@pytest.mark.parametrize("replace", [False, True])
def test_kill_before_any_change_to_the_disk(tmp_path, replace):
    number = 0
    while True:
        number += 1
        output = tmp_path / str(number) / "out"
        output.parent.mkdir()
        if replace:
            write_artifact(output)
        killed = killed_at_event(number, output)
        # An output that exists is complete.
        if output.exists():
            found = Artifact.open(output)
            found.verify()
            assert found.manifest.name == "new" or replace
        with PartialArtifact(output) as partial:
            if replace:
                assert Artifact.open(output).manifest.name in ("tiny", "new")
            partial.finish(dataclasses.replace(build(partial.artifact), name="after"))
        assert Artifact.open(output).manifest.name == "after"
        assert [p.name for p in output.parent.iterdir()] == ["out"]
        if not killed:
            break
    assert number > 10


def test_a_full_disk_says_how_much_is_needed(tmp_path):
    with (
        pytest.raises(ResourceError, match=r"10,000,000,000,000,000 bytes are needed"),
        disk_guard(tmp_path, 10**16),
    ):
        pass
    with pytest.raises(ResourceError, match=r"about 5,000 bytes are needed"), disk_guard(tmp_path, 5000):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(FileNotFoundError), disk_guard(tmp_path, 5000):
        (tmp_path / "absent").read_bytes()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_really_full_disk(tmp_path):
    with pytest.raises(ResourceError), disk_guard(tmp_path, 1), open("/dev/full", "wb", buffering=0) as file:  # noqa: PTH123
        file.write(b"x")


# The default artifact, and two side by side


def test_find_newest(tmp_path):
    with pytest.raises(UsageError, match="no artifact"):
        find_newest(tmp_path)
    old, new = tmp_path / "a", tmp_path / "build" / "demo" / "artifact"
    for age, path in ((2, old), (1, new)):
        write_artifact(path)
        os.utime(path / MANIFEST, (10**9 - age, 10**9 - age))
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / MANIFEST).write_text("{}")
    write_artifact(tmp_path / ".hidden" / "x")
    write_artifact(tmp_path / "1" / "2" / "3" / "4")
    assert find_newest(tmp_path).root == new
    assert find_newest(old).root == old
    (new / "report.html").unlink()
    with pytest.raises(ArtifactError, match=r"report\.html is missing"):
        find_newest(tmp_path)


def test_diff(artifact, tmp_path):
    with PartialArtifact(tmp_path / "b") as partial:
        manifest = build(partial.artifact)
        encoder, vae, unet, decoder = manifest.components
        unet = dataclasses.replace(unet, parameters=7, ops={"Add": 5, "Conv": 1})
        other = dataclasses.replace(
            manifest,
            components=(encoder, vae, unet, decoder),
            drift={"onnx": {"unet": 95.0, "decoder": None}},
        )
        b = partial.finish(other)
    rows = {(row.component, row.quantity): (row.a, row.b) for row in diff(artifact, b)}
    parameters = sum(c.parameters for c in artifact.manifest.components)
    assert rows[None, "parameters"] == (parameters, parameters + 6)
    assert rows[None, "bytes"] == (artifact.bytes, artifact.bytes)
    assert rows["unet", "parameters"] == (1, 7)
    assert rows["unet", "ops.Add"] == (1, 5)
    assert rows["unet", "ops.Mul"] == (1, None)
    assert rows["unet", "ops.Conv"] == (None, 1)
    assert rows["unet", "drift_db.rewrite"] == (120.5, None)
    assert rows["unet", "drift_db.onnx"] == (110.0, 95.0)
    assert rows["decoder", "drift_db.onnx"] == (math.inf, math.inf)
    order = list(dict.fromkeys(row.component for row in diff(artifact, b)))
    assert order == [None, "image_encoder", "vae_encoder", "unet", "decoder"]
