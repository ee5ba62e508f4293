"""The benchmark's result: golden example, and the JSON Schema against the dataclasses."""

import dataclasses
import json
import typing
from pathlib import Path

import jsonschema
import pytest

import mobilevd_deploy
from mobilevd_deploy.errors import ArtifactError
from mobilevd_deploy.profiling.phone.result import (
    ArtifactId,
    Benchmark,
    Failure,
    Handset,
    Memory,
    PhoneRuntime,
    Timing,
)
from tests.support import ROOT
from tests.support.schema_mutations import same_verdicts

SCHEMA = json.loads(
    (Path(mobilevd_deploy.__file__).parent / "profiling" / "phone" / "benchmark.schema.json").read_text()
)
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
GOLDEN = ROOT / "tests" / "vectors" / "benchmark.json"


def test_the_golden_example_is_valid_and_reads_back():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    values = json.loads(GOLDEN.read_text())
    VALIDATOR.validate(values)
    found = Benchmark.from_json(GOLDEN.read_bytes())
    assert json.loads(json.dumps(dataclasses.asdict(found))) == values
    assert [(c.name, c.backend, len(c.ms)) for c in found.components] == [
        ("image_encoder", "npu", 5),
        ("unet", "npu", 5),
        ("decoder", "cpu", 5),
    ]


@pytest.mark.parametrize("cls", [Benchmark, ArtifactId, Handset, PhoneRuntime, Timing, Memory, Failure])
def test_schema_lists_the_fields(cls):
    entry = SCHEMA["$defs"][cls.__name__]
    names = {field.name for field in dataclasses.fields(cls)}
    assert set(entry["properties"]) == set(entry["required"]) == names
    assert entry["additionalProperties"] is False
    for name, hint in typing.get_type_hints(cls).items():
        if typing.get_origin(hint) is typing.Literal:
            found = entry["properties"][name]
            assert found.get("enum", [found.get("const")]) == list(typing.get_args(hint))


def test_schema_and_dataclasses_refuse_the_same():
    original = json.loads(GOLDEN.read_text())
    original["components"], original["state"] = original["components"][:1], "failed"
    original["error"] = {"message": "no memory", "component": "unet", "step": "load"}
    accepted, refused = same_verdicts(
        original, lambda values: Benchmark.from_json(json.dumps(values)), VALIDATOR, ["does not fit error"]
    )
    assert accepted > 30
    assert refused > 300


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("[]", "expected a table"),
        ('{"state": "running", "component": "unet", "sample": 3}', "unknown key"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_other_texts_are_refused(text, message):
    with pytest.raises(ArtifactError, match=message):
        Benchmark.from_json(text)


def test_an_endless_time_is_refused():
    with pytest.raises(ArtifactError, match="not finite"):
        Benchmark.from_json(GOLDEN.read_text().replace("12.5,", "1e999,"))
