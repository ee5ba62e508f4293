"""The Hexagon compiler and its simulator in their child process: what they make, and every way they fail."""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mobilevd_deploy.base.progress import Progress
from mobilevd_deploy.base.tensors import sqnr_db
from mobilevd_deploy.config.recipe import NpuOptions
from mobilevd_deploy.errors import ExportError, ResourceError, UsageError, VendorError
from mobilevd_deploy.qnn import compiler
from mobilevd_deploy.qnn.compiled import DramBytes
from mobilevd_deploy.qnn.compiler import ContextBinary, compile_context, measure_traffic
from mobilevd_deploy.qnn.lint import lint
from mobilevd_deploy.qnn.simulator import NpuSimRunner
from mobilevd_deploy.qnn.targets import Target, find_target, read_target, targets
from mobilevd_deploy.runtime.runners import OnnxRunner
from tests.qnn.test_compiled import write_convs, write_matmul

pytestmark = pytest.mark.npu

SM8650 = find_target("SM8650")
MAP = [1, 16, 16, 16]


def save(path: Path, nodes, inputs, outputs, constants=(), **changes) -> Path:
    """Write a float graph of these nodes; `changes` go to the model."""

    def described(shapes):
        return [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()]

    graph = helper.make_graph(nodes, "graph", described(inputs), described(outputs), list(constants))
    model = helper.make_model(
        graph, **{"opset_imports": [helper.make_opsetid("", 21)], "ir_version": 10} | changes
    )
    onnx.save(model, path)
    return path


def write_float(path: Path) -> Path:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(16, 16, 3, 3)).astype(np.float32) / 12
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="block.conv/Conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["y"], name="block.act/Relu"),
    ]
    return save(path, nodes, {"x": MAP}, {"y": MAP}, [numpy_helper.from_array(weight, "w")])


def write_unsupported(path: Path) -> Path:
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], name="net.act/Relu"),
        helper.make_node("Det", ["r"], ["y"], name="net.head/Det"),
    ]
    return save(path, nodes, {"x": [1, 4, 8, 8]}, {"y": [1, 4]})


def compile_float(
    model: Path, folder: Path, target: Target = SM8650, npu: NpuOptions | None = None, **options
) -> ContextBinary:
    return compile_context(model, folder, target, npu or NpuOptions(), **{"float16": True} | options)


def picture() -> np.ndarray:
    return np.random.default_rng(1).normal(size=MAP).astype(np.float32)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_float(tmp_path_factory.mktemp("float") / "model.onnx")


@pytest.fixture(scope="module")
def binary(model, tmp_path_factory) -> ContextBinary:
    return compile_float(model, tmp_path_factory.mktemp("compiled"))


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """Put another onnxruntime_qnn in place of the real one, with these lines of Python."""

    def replace(*lines: str) -> None:
        folder = tmp_path / "stub"
        folder.mkdir()
        (folder / "onnxruntime_qnn.py").write_text("\n".join(("import os, signal, time", *lines)))
        monkeypatch.syspath_prepend(folder)

    return replace


# ---- targets ----


def test_importing_is_cheap():
    heavy = "onnxruntime", "onnxruntime_qnn", "onnx", "torch"
    code = f"import mobilevd_deploy.qnn.compiler, sys; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_targets_are_those_of_the_table():
    assert find_target("SM8650") == find_target("sm8650") == Target("SM8650", 57, 75)
    assert find_target("SM8750-AC").name == "SM8750"
    assert [target.name for target in targets()] == ["SM8450", "SM8550", "SM8650", "SM8750", "SM8850"]
    with pytest.raises(UsageError) as caught:
        find_target("Xiaomi 14 Pro")
    assert "SM8650" in caught.value.next_step


@pytest.mark.parametrize("target", targets(), ids=lambda t: t.name)
def test_every_target_is_what_the_compiler_calls_it(model, tmp_path, target):
    made = compile_float(model, tmp_path, target)
    assert (made.soc, made.arch) == (target.name, target.arch) == read_target(made.context)


# ---- compiling ----


def test_what_a_compilation_leaves(binary):
    folder = binary.wrapper.parent
    assert {path.name for path in folder.iterdir()} == {"SM8650.onnx", "SM8650.bin"}
    assert binary.bytes == sum(path.stat().st_size for path in folder.iterdir())
    assert re.fullmatch(r"\d+\.\d+\.\d+", binary.qnn_api)
    assert re.fullmatch(r"v\d+\.\d+\.\d+\.\d+", binary.sdk)
    assert binary.seconds > 0
    assert binary.peak_bytes > 50e6
    assert {"block.conv/Conv", "block.act/Relu"} == {op.node for op in binary.graph.ops}


def test_wrapper_suits_older_runtimes_and_tells_no_tales(tmp_path, model):
    loaded = onnx.load(model)
    helper.set_model_props(loaded, {"exporter.path": str(tmp_path)})
    onnx.save(loaded, tmp_path / "model.onnx")
    wrapper = onnx.load(compile_float(tmp_path / "model.onnx", tmp_path / "out").wrapper)
    assert wrapper.ir_version <= 10
    assert {opset.domain: opset.version for opset in wrapper.opset_import} == {"": 21, "com.microsoft": 1}
    (node,) = wrapper.graph.node
    values = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    assert (values["ep_cache_context"], values["embed_mode"]) == (b"SM8650.bin", 0)
    assert {p.key for p in wrapper.metadata_props} <= {
        "ep_compatibility_info.QNNExecutionProvider",
        "external_dependencies",
    }
    made = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())
    assert str(tmp_path).encode() not in made


def test_names_of_inputs_and_outputs_stay(binary):
    graph = onnx.load(binary.wrapper).graph
    assert [value.name for value in (*graph.input, *graph.output)] == ["x", "y"]


def test_a_failed_compilation_leaves_what_was_there(model, tmp_path):
    made = compile_float(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ExportError):
        compile_float(write_unsupported(tmp_path.with_suffix(".onnx")), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert made.wrapper.name in before


def test_unsupported_operation_is_named_with_shape_and_reason(tmp_path):
    with pytest.raises(ExportError) as caught:
        compile_float(write_unsupported(tmp_path / "m.onnx"), tmp_path / "out")
    assert "net.head/Det (Det -> 1x4): Operators of type `Det` are not supported" in caught.value.what
    assert "net.act/Relu" not in caught.value.what
    assert caught.value.next_step


def test_layer_without_a_quantised_output_is_named(tmp_path):
    loaded = onnx.load(write_convs(tmp_path / "m.onnx"))
    nodes = loaded.graph.node
    del nodes[-2:]  # the last Quantize and Dequantize
    nodes[-1].output[0] = "y"
    onnx.save(loaded, tmp_path / "m.onnx")
    with pytest.raises(ExportError, match=r"block\.conv2\.weight/DQ .* no quantised output"):
        compile_float(tmp_path / "m.onnx", tmp_path / "out", float16=False)


REFUSAL = """[V:onnxruntime:, a.cc:1 LogNodeSupport] Validation FAILED for 3 nodes in OrtNodeUnit (Conv) :
\tOperator type: DequantizeLinear Node name: w/DQ Node index: 1
\tOperator type: Conv Node name: block.conv/Conv_token_4 Node index: 2
\tREASON : too wide
"""


def test_refusal_ends_the_compilation_at_once(model, tmp_path, stub):
    stub(f"print({REFUSAL!r} + 'ComposeGraph Graph name: g', flush=True)", "time.sleep(60)")
    with pytest.raises(ExportError, match=r"block\.conv/Conv \(Conv -> 1x16x16x16\): too wide"):
        compile_float(model, tmp_path / "out", npu=NpuOptions(compiler_hours=30 / 3600))


def test_refusals_of_the_first_pass_do_not_count(model, tmp_path, stub):
    said = f"GetCapability pass 1\n{REFUSAL}GetCapability pass 2\nComposeGraph Graph name: g"
    stub(f"print({said!r}, flush=True)", "time.sleep(0.3)", "raise RuntimeError('as far as it goes')")
    with pytest.raises(VendorError, match="as far as it goes"):
        compile_float(model, tmp_path / "out")


def test_binary_for_another_chip_is_refused(model, tmp_path):
    with pytest.raises(VendorError, match=r"for SM8650 \(V75\), not for SM8750"):
        compile_float(model, tmp_path, Target("SM8750", 57, 75))
    assert not [*tmp_path.iterdir()]


def test_missing_model(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        compile_float(tmp_path / "none.onnx", tmp_path)


def test_unreadable_model(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"nothing of the kind")
    with pytest.raises(VendorError, match=r"m\.onnx"):
        compile_float(tmp_path / "m.onnx", tmp_path / "out")


def test_progress_advances(model, tmp_path):
    class Seen(Progress):
        fractions: list[float] = []  # noqa: RUF012

        def advance(self, fraction: float) -> None:
            self.fractions.append(fraction)

    seen = Seen()
    compile_float(model, tmp_path, progress=seen)
    assert seen.fractions
    assert seen.fractions == sorted(seen.fractions)


def test_relative_paths_work(model, monkeypatch, tmp_path):
    monkeypatch.chdir(model.parent)
    folder = Path(os.path.relpath(tmp_path / "out"))
    made = compile_float(Path(model.name), folder)
    assert made.wrapper == folder / "SM8650.onnx"
    assert set(NpuSimRunner(made.wrapper).run({"x": picture()})) == {"y"}


# ---- what binaries name ----


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "cannot be read"),
        (b"\x00" * 99, "no chip"),
        (b"a soc_type=SM8650;arch=75; b soc_type=SM8750;arch=79;", "SM8650 V75, SM8750 V79"),
    ],
)
def test_binary_that_names_no_chip_or_two(tmp_path, content, why):
    (tmp_path / "m.bin").write_bytes(content)
    with pytest.raises(VendorError, match=why):
        read_target(tmp_path / "m.bin")


def test_missing_binary(tmp_path):
    with pytest.raises(VendorError, match="cannot be read"):
        read_target(tmp_path / "m.bin")


# ---- simulating ----


def test_simulator_runs_the_binary_and_agrees(model, binary, tmp_path):
    # Moved, and without the model: what runs is the binary, and the wrapper finds it beside itself.
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for path in (binary.wrapper, binary.context):
        (moved / path.name).write_bytes(path.read_bytes())
    runner, feeds = NpuSimRunner(moved / binary.wrapper.name), {"x": picture()}
    given = runner.run(feeds)["y"]
    expected = OnnxRunner(model).run(feeds)["y"]
    assert given.dtype == np.float32
    assert 60 < sqnr_db(expected, given) < 90  # float16, and really so
    assert np.array_equal(given, runner.run(feeds)["y"])


def test_simulator_agrees_on_integers(tmp_path):
    model = write_convs(tmp_path / "m.onnx")
    made = compile_float(model, tmp_path / "out", float16=False)
    feeds = {"x": picture()}
    given = NpuSimRunner(made.wrapper).run(feeds)["y"]
    assert sqnr_db(OnnxRunner(model).run(feeds)["y"], given) > 65


def test_simulator_shows_what_narrowing_costs(tmp_path):
    rng = np.random.default_rng(2)
    feeds = {
        "a": rng.normal(size=(1, 2, 32, 16)).astype(np.float32),
        "b": rng.normal(size=(1, 2, 16, 32)).astype(np.float32),
    }
    sqnr = []
    for relabelled in (False, True):
        model = write_matmul(tmp_path / f"{relabelled}.onnx", relabelled=relabelled)
        made = compile_float(model, tmp_path / str(relabelled), float16=False)
        given = NpuSimRunner(made.wrapper).run(feeds)["y"]
        sqnr.append(sqnr_db(OnnxRunner(model).run(feeds)["y"], given))
    assert sqnr[0] < 40 < 55 < sqnr[1]


@pytest.mark.parametrize("damage", ["truncated", "empty", "missing"])
def test_damaged_binary(binary, tmp_path, damage):
    wrapper = tmp_path / binary.wrapper.name
    wrapper.write_bytes(binary.wrapper.read_bytes())
    content = binary.context.read_bytes()
    if damage != "missing":
        kept = content[: len(content) // 2] if damage == "truncated" else b""
        (tmp_path / binary.context.name).write_bytes(kept)
    with pytest.raises(VendorError, match=r"simulating .*SM8650\.onnx"):
        NpuSimRunner(wrapper).run({"x": picture()})


def test_wrong_inputs(binary):
    with pytest.raises(VendorError, match="invalid dimensions"):
        NpuSimRunner(binary.wrapper).run({"x": picture()[:, :3]})
    with pytest.raises(VendorError, match="x"):
        NpuSimRunner(binary.wrapper).run({})


def test_missing_wrapper(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        NpuSimRunner(tmp_path / "SM8650.onnx")


# ---- limits and crashes ----


def test_memory_limit(model, tmp_path):
    with pytest.raises(ResourceError, match=r"needs more than 0\.04 GB") as caught:
        compile_float(model, tmp_path, npu=NpuOptions(compiler_memory_gb=0.04))
    assert "npu.compiler_memory_gb" in str(caught.value.next_step)
    assert not [*tmp_path.iterdir()]


def test_a_compilation_may_take_what_is_free_when_it_starts(model, tmp_path, monkeypatch):
    monkeypatch.setattr(compiler, "memory_bytes", lambda: (int(8e9), 30_000_000))
    for compilation in (
        lambda: compile_float(model, tmp_path),
        lambda: measure_traffic(model, SM8650, NpuOptions(), float16=True),
    ):
        with pytest.raises(ResourceError, match=r"needs more than 0\.03 GB"):
            compilation()


@pytest.fixture
def children(monkeypatch) -> list[subprocess.Popen[bytes]]:
    """The processes that are started."""
    started = []

    class Noted(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Noted)
    return started


def test_time_limit_ends_the_child(model, tmp_path, stub, children):
    stub("time.sleep(60)")
    with pytest.raises(VendorError, match=r"has not ended after 0\.5 s") as caught:
        compile_float(model, tmp_path / "out", npu=NpuOptions(compiler_hours=0.5 / 3600))
    assert "npu.compiler_hours" in str(caught.value.next_step)
    assert [child.returncode for child in children] == [-signal.SIGKILL]


def test_interrupt_ends_the_child(model, tmp_path, stub, children):
    stub("print('Starting stage: Graph Optimizations', flush=True)", "time.sleep(60)")

    class Interrupted(Progress):
        def advance(self, fraction: float) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compile_float(model, tmp_path / "out", progress=Interrupted())
    assert [child.returncode for child in children] == [-signal.SIGKILL]
    assert not [*(tmp_path / "out").iterdir()]


def test_crash_is_an_error_with_stage_and_last_words(model, tmp_path, stub):
    stub(
        "print('Starting stage: VTCM Allocation')",
        "print('[E:onnxruntime:, qnn.cc:1 F] no luck today', flush=True)",
        "os.kill(os.getpid(), signal.SIGSEGV)",
    )
    with pytest.raises(VendorError) as caught:
        compile_float(model, tmp_path / "out")
    assert "crashed (SIGSEGV), in the stage 'VTCM Allocation'\n  no luck today" in caught.value.what
    assert "optimization_mode" in caught.value.next_step
    assert caught.value.exit_code == 3


def test_crash_while_simulating_is_an_error(binary, stub):
    stub("os.abort()")
    with pytest.raises(VendorError, match="SIGABRT"):
        NpuSimRunner(binary.wrapper).run({"x": picture()})


@pytest.mark.parametrize("lines", ["os.kill(os.getpid(), signal.SIGKILL)", "raise MemoryError"])
def test_memory_that_runs_out(model, tmp_path, stub, lines):
    stub(lines)
    with pytest.raises(ResourceError, match="memory ran out"):
        compile_float(model, tmp_path / "out")


def test_vendor_error_is_passed_on(model, tmp_path, stub):
    stub("raise RuntimeError('graph requires estimated allocation of 2097153 KB')")
    with pytest.raises(VendorError, match="2097153 KB"):
        compile_float(model, tmp_path / "out")


def test_full_disk(model, tmp_path, stub, monkeypatch):
    stub("raise OSError('cannot write')")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=10))
    with pytest.raises(ResourceError, match="the disk is full"):
        compile_float(model, tmp_path / "out")


def test_leftovers_of_a_killed_run_go(model, tmp_path):
    leftover = tmp_path / ".SM8650.partial" / "context.onnx"
    leftover.parent.mkdir()
    leftover.write_text("half a file")
    compile_float(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"SM8650.onnx", "SM8650.bin"}


def test_exit_without_a_word(model, tmp_path, stub):
    stub("os._exit(7)")
    with pytest.raises(VendorError, match="status 7"):
        compile_float(model, tmp_path / "out")


def test_not_installed(model, binary, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for use in (lambda: compile_float(model, tmp_path), lambda: NpuSimRunner(binary.wrapper)):
        with pytest.raises(UsageError, match="not installed") as caught:
            use()
        assert caught.value.next_step == "pip install 'mobilevd-deploy[npu]'"


def test_another_machine(model, tmp_path, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(UsageError, match="not on Linux aarch64"):
        compile_float(model, tmp_path)


# ---- traffic ----


def test_the_compilers_own_sum_goes_with_the_binary(tmp_path):
    model = write_convs(tmp_path / "m.onnx")
    made = compile_context(model, tmp_path / "out", SM8650, NpuOptions(), float16=False)
    assert made.dram == measure_traffic(model, SM8650, NpuOptions(), float16=False).total


def test_a_schedule_that_adds_up_to_something_else_is_not_believed(tmp_path, monkeypatch):
    model, read = write_convs(tmp_path / "m.onnx"), compiler.read_traffic

    def generous(*arguments):
        traffic = read(*arguments)
        return dataclasses.replace(traffic, edges=traffic.edges + DramBytes(1, 0))

    monkeypatch.setattr(compiler, "read_traffic", generous)
    with pytest.raises(VendorError, match="the compiler's own sum is"):
        measure_traffic(model, SM8650, NpuOptions(), float16=False)


def test_traffic_of_a_small_graph(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = write_convs(tmp_path / "m.onnx")
    traffic = measure_traffic(model, SM8650, NpuOptions(), float16=False)
    bytes_in_and_out = 4 * 16**3 * 2
    weights = 2 * 9 * 16 * 16
    assert bytes_in_and_out + weights <= traffic.total.total < 4 * bytes_in_and_out
    assert any(name.startswith("block") for name in traffic.modules)
    assert {path.name for path in tmp_path.iterdir()} == {"m.onnx"}


# ---- lint ----


def rules(model: Path, **options) -> dict[str, str]:
    return {f.rule: f.where for f in lint(model, **{"float16": True} | options)}


def test_lint_has_nothing_to_say(model, tmp_path):
    assert lint(model, float16=True) == ()
    assert lint(write_convs(tmp_path / "m.onnx"), float16=False) == ()


def test_lint_names_values_without_shape(tmp_path):
    nodes = [
        helper.make_node("Mystery", ["x"], ["a"], name="net.odd/Mystery", domain="somebody"),
        helper.make_node("Relu", ["a"], ["y"], name="net.act/Relu"),
    ]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("somebody", 1)]
    model = save(tmp_path / "m.onnx", nodes, {"x": MAP}, {"y": MAP}, opset_imports=opsets)
    (finding,) = lint(model, float16=True)
    assert (finding.rule, finding.where) == ("shape", "net.odd/Mystery")
    assert "Cannot get shape" in str(finding)
    assert finding.source in str(finding)


def test_lint_names_high_ranks(tmp_path):
    shape = numpy_helper.from_array(np.array([1, 4, 4, 16, 16]), "shape")
    node = helper.make_node("Reshape", ["x", "shape"], ["y"], name="net/Reshape")
    model = save(tmp_path / "m.onnx", [node], {"x": MAP}, {"y": [1, 4, 4, 16, 16]}, [shape])
    assert rules(model) == {"rank": "net/Reshape"}


@pytest.mark.parametrize(("kind", "found"), [("UINT16", True), ("INT64", True), ("INT32", False)])
def test_lint_names_inputs_that_a_phone_does_not_feed(tmp_path, kind, found):
    nodes = [helper.make_node("Cast", ["x"], ["y"], name="net/Cast", to=TensorProto.FLOAT)]
    path = save(tmp_path / "m.onnx", nodes, {"x": MAP}, {"y": MAP})
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.DataType.Value(kind)
    onnx.save(model, path)
    assert rules(path) == ({"io-type": "x"} if found else {})


@pytest.mark.parametrize("location", ["../elsewhere.data", "gone.data"])
def test_lint_names_data_files(tmp_path, model, location):
    loaded = onnx.load(model)
    onnx.save(loaded, tmp_path / "m.onnx", save_as_external_data=True, location="w.data", size_threshold=0)
    assert rules(tmp_path / "m.onnx") == {}
    loaded = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    loaded.graph.initializer[0].external_data[0].value = location
    onnx.save(loaded, tmp_path / "m.onnx")
    assert rules(tmp_path / "m.onnx", float16=False) == {"data-file": location}


def test_lint_names_norms_above_vtcm(tmp_path):
    shape = [3, 32, 256, 257]
    ones = numpy_helper.from_array(np.ones(32, np.float32), "ones")
    node = helper.make_node("InstanceNormalization", ["x", "ones", "ones"], ["y"], name="net.norm/Norm")
    model = save(tmp_path / "m.onnx", [node], {"x": shape}, {"y": shape}, [ones])
    assert rules(model, vtcm_mb=4) == {"vtcm": "net.norm/Norm"}
    assert rules(model, vtcm_mb=8) == {}


@pytest.mark.parametrize(("axis", "is_found"), [(1, True), (-1, False)])
def test_lint_counts_what_a_layer_norm_needs_at_once(tmp_path, axis, is_found):
    shape = [2, 256, 256, 33]
    scale = numpy_helper.from_array(np.ones(shape[axis:], np.float32), "scale")
    node = helper.make_node("LayerNormalization", ["x", "scale"], ["y"], name="net.norm/Norm", axis=axis)
    model = save(tmp_path / "m.onnx", [node], {"x": shape}, {"y": shape}, [scale])
    assert rules(model, vtcm_mb=4) == ({"vtcm": "net.norm/Norm"} if is_found else {})


@pytest.mark.parametrize("rows", [2**15, 2**15 - 1])
def test_lint_adds_up_weights_inputs_and_outputs(tmp_path, rows):
    big = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[rows, 2**14, 1, 1])
    big.data_location = TensorProto.EXTERNAL
    big.external_data.add(key="location", value="w.data")
    (tmp_path / "w.data").touch()
    node = helper.make_node("Conv", ["x", "w"], ["y"], name="net/Conv")
    model = save(tmp_path / "m.onnx", [node], {"x": [1, 2**14, 1, 1]}, {"y": [1, rows, 1, 1]}, [big])
    assert rules(model, float16=False) == {"allocation": "graph"}  # 2 GiB in float32
    assert rules(model, float16=True) == {}


def test_lint_names_values_that_float16_does_not_hold(tmp_path, model):
    loaded = onnx.load(model)
    weight = numpy_helper.to_array(loaded.graph.initializer[0]).copy()
    weight[0, 0, 0, 0] = -1e5
    loaded.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "w"))
    onnx.save(loaded, tmp_path / "m.onnx", save_as_external_data=True, location="w.data", size_threshold=0)
    assert rules(tmp_path / "m.onnx") == {"float16-range": "w"}
    assert rules(tmp_path / "m.onnx", float16=False) == {}
    assert rules(model, peaks={"c": 65504.0}) == {}
    assert (
        rules(model, peaks={"c": 70000.0})
        == rules(model, peaks={"c": float("nan")})
        == {"float16-range": "c"}
    )
