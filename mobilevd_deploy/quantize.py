"""Integers in place of floats, with AIMET: calibrate, simulate, write ONNX that the NPU takes whole.

quantise          a deploy-form network and samples -> Quantised, its simulation
Quantised.export  ONNX with QuantizeLinear and DequantizeLinear (Q, DQ), repaired and checked
relabel           the repair: 16-bit second operands of matrix products
check_quantised   refuses what would compile, and be wrong or run in float32 without a word
answers           how far does the output move with each input?
conditioning      does each input still matter as much as before?
sensitivity       which block costs how much?

Rules of the hardware are in export/htp_quantsim.json, in AIMET's format.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import logging
import math
import pickle
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir.passes.common
import torch
from onnx import NodeProto, TensorProto, numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from mobilevd_deploy.base.files import written_aside
from mobilevd_deploy.base.tensors import Tensors, sqnr_db
from mobilevd_deploy.config.data import data_dir
from mobilevd_deploy.config.recipe import QuantScheme
from mobilevd_deploy.errors import ExportError, UsageError, listed
from mobilevd_deploy.npu import ops
from mobilevd_deploy.npu.onnx_export import DATA, MODEL, fold_constants, name_nodes, quiet

Array = npt.NDArray[Any]
Runner = Callable[[Tensors], npt.ArrayLike]

RULES = "htp_quantsim.json"
# "up_blocks.1.resnets.0" of "up_blocks.1.resnets.0.spatial_res_block.conv1".
_BLOCK = re.compile(r"(?:.*?\.)?(?:resnets|attentions|layers|blocks)\.\d+(?=\.|$)")
FLOAT = 32

# 16-bit Q and DQ exist from here on.
_OPSET = 21


# ---- the simulation ----


def quantise(
    network: nn.Module,
    samples: Iterable[Tensors],
    scheme: QuantScheme,
    *,
    state: Path | None = None,
    apart: bool = False,
) -> Quantised:
    """Turn a deploy-form network into its quantised simulation, calibrated on `samples`.

    The network is changed in place: its arithmetic modules become AIMET's and every module gets quantisers.

    Args:
        network: as `build_npu` makes it, in the forms linear = "conv" and group_norm = "instance".
        samples: inputs by name in the order of the network's arguments, float32. Read one at a time.
        scheme: bits, headroom and rules of the recipe.
        state: where the ranges are kept. If the file is there and was made with this scheme, network and
            first sample, no other sample is read. Otherwise it is written.
        apart: every module has a range of its own, also those that AIMET lets share one.

    Raises:
        UsageError: AIMET is not installed, or there is no sample.
        ExportError: AIMET can not follow the network, a module never ran, or its values are not finite.
    """
    aimet = _load_aimet()
    stream = iter(samples)
    if (first := next(stream, None)) is None:
        raise UsageError("there is no sample to calibrate with")
    key = _digest(network, first, (scheme, apart))
    with _silence():
        _swap_arithmetic(network.eval().requires_grad_(False), aimet.arithmetic)
        sources = _sources(network, first)
        with _blaming_aimet("simulate", network), _Hollow():
            sim = aimet.sim(
                network,
                _arguments(first),
                default_param_bw=8,
                default_output_bw=16,  # so that second operands of matrix products are symmetric
                config_file=str(data_dir("export") / RULES),
                in_place=True,
            )
        _fill_gaps(sim, aimet)
        shared = _shared(sim)
        if apart:
            for path in chain.from_iterable(shared):
                quantisers = sim.model.get_submodule(path).output_quantizers
                quantisers[0] = copy.deepcopy(quantisers[0])
        _set_bits(sim, scheme)
        _convert_between(sim, sources, scheme, aimet)
        if state is None or not _restore(sim, state, key):
            sim.compute_encodings(lambda model: _run_all(model, chain([first], stream)))
            _check_ranges(sim)
            _use_all_steps(sim)
            _stretch(sim, scheme.headroom)
            if state is not None:
                with written_aside(state) as aside:
                    torch.save({"key": key, "quantisers": sim.quantizer_state_dict()}, aside)
    return Quantised(sim, scheme, shared)


@dataclass(frozen=True, eq=False)
class Quantised:
    """A calibrated simulation; made by `quantise`. `sim` is AIMET's QuantizationSimModel.

    `shared`: modules whose outputs AIMET gives one range, as a concatenation and what it joins.
    """

    sim: Any
    scheme: QuantScheme
    shared: tuple[tuple[str, ...], ...] = ()

    @torch.no_grad()
    def run(self, inputs: Tensors) -> Array:
        """Return the network's output as the integers give it, float32, for inputs in argument order."""
        with _silence():
            output: Tensor = self.sim.model(*_arguments(inputs))
        return np.asarray(output.as_subclass(torch.Tensor).numpy())

    def run_float(self, inputs: Tensors) -> Array:
        """Return the output of the same network without any quantiser."""
        with self._without(lambda _: True):
            return self.run(inputs)

    def export(self, folder: Path, inputs: Tensors, output_names: Sequence[str]) -> None:
        """Write `folder`/model.onnx with its integer weights in model.onnx.data, repaired and checked.

        Inputs and outputs stay float32. Nodes are named <module path>/<op> as in a float export, a Q or DQ
        after the module whose values it holds. `inputs` are example values. Raises ExportError: AIMET or
        torch can not write it, or the graph is one that `check_quantised` refuses.
        """
        folder.mkdir(parents=True, exist_ok=True)
        # AIMET leaves files behind that no graph refers to.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".aimet-") as aside:
            raw = Path(aside) / MODEL
            network, arguments, aimet = self.sim.model, _arguments(inputs), _load_aimet()
            with _silence(), _blaming_aimet("export", network), contextlib.ExitStack() as stack:
                with torch.no_grad(), _Hollow():
                    stack.enter_context(aimet.int32_biases(network, arguments))
                aimet.export(
                    network,
                    arguments,
                    str(raw),
                    input_names=list(inputs),
                    output_names=list(output_names),
                    opset_version=_OPSET,
                    dynamo=True,
                    optimize=False,
                    verbose=False,
                    prequantize_constants=True,
                    export_int32_bias=False,  # they are there
                    force_activation_as="unsigned",
                )
            model = _load_folded(raw)
        name_nodes(model)
        convert_before_moves(model)
        _name_pairs(model)
        relabel(model)
        check_quantised(model, self._is_float)
        path, data = folder / MODEL, folder / DATA
        data.unlink(missing_ok=True)  # onnx appends
        onnx.save(model, path, save_as_external_data=True, location=DATA, size_threshold=1024)
        if data.exists():
            data.chmod(path.stat().st_mode)  # onnx makes it for its owner alone
        try:
            onnx.checker.check_model(str(path))
        except onnx.checker.ValidationError as error:
            raise ExportError(f"{path}: AIMET wrote what is not valid ONNX: {error}") from error

    def _is_float(self, module: str) -> bool:
        return FLOAT in _bits(self.scheme, module)

    @contextlib.contextmanager
    def _without(self, chosen: Callable[[str], bool]) -> Iterator[None]:
        """Take the quantisers out of the modules whose path is `chosen`."""
        slots = [
            (container, key, container[key])
            for path, module in self.sim.named_qmodules()
            if chosen(path)
            for container, key in _slots(module)
        ]
        for container, key, _ in slots:
            container[key] = None
        try:
            yield
        finally:
            for container, key, quantiser in slots:
                container[key] = quantiser


@dataclass(frozen=True)
class _Aimet:
    sim: Any  # QuantizationSimModel
    export: Any
    int32_biases: Any  # a context in which every bias has a quantiser; runs the network to find their scales
    quantiser: Any  # QuantizeDequantize
    multiply: Any
    arithmetic: Mapping[type[nn.Module], Callable[[Any], nn.Module]]


@functools.cache
def _load_aimet() -> _Aimet:
    """Import AIMET, which takes ten seconds, and teach it `Constant`."""
    try:
        with _silence():
            import aimet_torch.onnx
            from aimet_torch.nn import QuantizationMixin
            from aimet_torch.nn.modules import custom
            from aimet_torch.onnx import _concretize_int32_bias_quantizers
            from aimet_torch.quantization.affine import QuantizeDequantize
            from aimet_torch.quantsim import QuantizationSimModel
    except ImportError as error:
        raise UsageError(
            f"quantising needs AIMET, which can not be imported: {error}",
            next_step="pip install 'mobilevd-deploy[npu]'",
        ) from error

    @QuantizationMixin.implements(ops.Constant)
    class QuantisedConstant(QuantizationMixin, ops.Constant):  # type: ignore[misc]
        __quant_init__ = QuantizationMixin.__nullary__

        def forward(self) -> Tensor:
            quantisers: Any = self.output_quantizers
            return self.value if quantisers[0] is None else cast(Tensor, quantisers[0](self.value))

    arithmetic: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
        ops.Add: lambda _: custom.Add(),
        ops.Multiply: lambda _: custom.Multiply(),
        ops.MatMul: lambda _: custom.MatMul(),
        ops.Concat: lambda concat: custom.Concat(concat.dim),
    }
    return _Aimet(
        QuantizationSimModel,
        aimet_torch.onnx.export,
        _concretize_int32_bias_quantizers,
        QuantizeDequantize,
        custom.Multiply,
        arithmetic,
    )


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep AIMET's and torch's chatter, hundreds of lines, off the terminal."""
    with quiet():
        yield
        for name in ("Quant", "Utils", "ConnectedGraph"):
            logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def _blaming_aimet(what: str, network: nn.Module) -> Iterator[None]:
    try:
        yield
    except (OSError, MemoryError, ExportError):
        raise
    except Exception as error:  # AIMET and torch raise what they like
        raise ExportError(
            f"AIMET could not {what} {type(network).__name__}: {_first_line(error)}",
            next_step="report this with the model's configuration",
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)  # the rest is code to paste


def _arguments(inputs: Tensors) -> tuple[Tensor, ...]:
    return tuple(torch.from_numpy(value) for value in inputs.values())


def _run_all(model: nn.Module, samples: Iterable[Tensors]) -> None:
    for sample in samples:
        with _blaming_aimet("calibrate", model):
            model(*_arguments(sample))
        del sample  # before the next one is made


class _Hollow(TorchFunctionMode):
    """Run a network for its shapes and its course: what costs most gives values that mean nothing.

    AIMET runs it four times to trace it, to count inputs and outputs, and to find the scales of biases; of
    all that no value matters.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Take one channel in and one out, repeated; round nothing."""
        if func in (torch.fake_quantize_per_tensor_affine, torch.fake_quantize_per_channel_affine):
            return args[0].view_as(args[0])
        if func is F.linear or (func is F.conv2d and args[6:] == (1,)):  # no groups
            values, weight, _, *how = args
            axis = -1 if func is F.linear else 1
            one = func(values.narrow(axis, 0, 1), weight[:1, :1], None, *how)
            shape = [-1] * one.ndim
            shape[axis] = len(weight)
            return one.expand(shape)
        return func(*args, **(kwargs or {}))


def _swap_arithmetic(network: nn.Module, swaps: Mapping[type[nn.Module], Callable[[Any], nn.Module]]) -> None:
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in swaps:
                setattr(parent, name, swaps[type(child)](child))


def _bits(scheme: QuantScheme, path: str) -> tuple[int, int]:
    """Return the bits of a module's weights and activations."""
    rule = next((rule for rule in scheme.rules if fnmatchcase(path, rule.modules)), None)
    if rule is None:
        return scheme.weights, scheme.activations
    return rule.weights or scheme.weights, rule.activations or scheme.activations


def _fill_gaps(sim: Any, aimet: _Aimet) -> None:
    # AIMET leaves a product with one positive number without a range, counting on the compiler to derive it,
    # and padding; the int32 bias of a convolution behind it then has a scale of its own, which no sum has.
    bare: Any = (aimet.multiply, nn.ZeroPad2d)
    for module in sim.qmodules():
        if isinstance(module, bare) and module.output_quantizers[0] is None:
            module.output_quantizers[0] = aimet.quantiser(shape=(), bitwidth=16, symmetric=False)


def _shared(sim: Any) -> tuple[tuple[str, ...], ...]:
    paths: dict[int, list[str]] = {}
    for path, module in sim.named_qmodules():
        if (quantiser := module.output_quantizers[0]) is not None:
            paths.setdefault(id(quantiser), []).append(path)
    return tuple(tuple(group) for group in paths.values() if len(group) > 1)


def _set_bits(sim: Any, scheme: QuantScheme) -> None:
    # What shares a range goes on sharing it with those of the same bits.
    narrow: dict[int, tuple[Any, Any]] = {}  # quantisers by id, each with its twin of 8 bits
    for path, module in sim.named_qmodules():
        weights, activations = _bits(scheme, path)
        parameters = module.param_quantizers
        for name, quantiser in parameters.items():
            if weights == FLOAT:
                parameters[name] = None
            elif quantiser is not None and isinstance(module, (nn.Conv2d, nn.Linear)):
                quantiser.bitwidth = weights  # the vectors of a norm stay at 8 bits
        for container in (module.input_quantizers, module.output_quantizers):
            for i, quantiser in enumerate(container):
                if activations == FLOAT:
                    container[i] = None
                elif quantiser is not None and activations == 8:
                    _, twin = narrow.setdefault(id(quantiser), (quantiser, copy.deepcopy(quantiser)))
                    twin.bitwidth = 8
                    if twin.is_overwrite_allowed():
                        twin.symmetric = False  # only 16-bit operands have to be
                    container[i] = twin


class _Traced(Tensor):
    """A tensor that knows which leaf module made it, through whatever moves its values."""

    source: str | None = None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        if isinstance(result, _Traced):
            flat = (a for arg in args for a in (arg if isinstance(arg, (tuple, list)) else (arg,)))
            result.source = next((a.source for a in flat if isinstance(a, _Traced) and a.source), None)
        return result


@torch.no_grad()
def _sources(network: nn.Module, inputs: Tensors) -> dict[str, list[str | None]]:
    """Return, for each leaf module, which leaf module each of its inputs comes from; None: an input.

    Shapes tell that, so it runs on tensors without values.
    """
    sources: dict[str, list[str | None]] = {}

    def note(path: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        sources[path] = [arg.source if isinstance(arg, _Traced) else None for arg in args]
        traced = output.as_subclass(_Traced)
        traced.source = path
        return traced

    leaves = [(path, module) for path, module in network.named_modules() if not [*module.children()]]
    hooks = [module.register_forward_hook(functools.partial(note, path)) for path, module in leaves]
    hollow = {
        name: tensor.to("meta") for name, tensor in chain(network.named_parameters(), network.named_buffers())
    }
    arguments = tuple(argument.to("meta") for argument in _arguments(inputs))
    try:
        torch.func.functional_call(network, hollow, arguments)
    finally:
        for hook in hooks:
            hook.remove()
    return sources


def _convert_between(
    sim: Any, sources: Mapping[str, Sequence[str | None]], scheme: QuantScheme, aimet: _Aimet
) -> None:
    """Give a module a quantiser of its own bits for each input that comes with other bits.

    The NPU's operations take and give integers of one width, and a Q and DQ in between converts.
    """
    modules = dict(sim.named_qmodules())
    for path, i, _ in _borders(modules, sources, functools.partial(_bits, scheme)):
        own = _bits(scheme, path)[1]
        modules[path].input_quantizers[i] = aimet.quantiser(shape=(), bitwidth=own, symmetric=False)


def _borders(
    modules: Mapping[str, Any],
    sources: Mapping[str, Sequence[str | None]],
    bits: Callable[[str], tuple[int, int]],
) -> Iterator[tuple[str, int, str]]:
    """Yield each input (module, index) that comes with other bits than the module's, and what it comes from.

    `modules`: AIMET's by path, with the quantisers that `bits` (weights, activations) of a path asks for. An
    input with a quantiser of its own is no border.
    """

    def origin(path: str | None) -> tuple[str, int] | None:
        while path is not None:
            if bits(path)[1] == FLOAT:
                return path, FLOAT
            if path in modules and (quantiser := modules[path].output_quantizers[0]) is not None:
                return path, int(quantiser.bitwidth)
            path = sources[path][0]  # it only moves values
        return None

    for path, module in modules.items():
        own = bits(path)[1]
        if own == FLOAT or path not in sources:
            continue
        for i, quantiser in enumerate(module.input_quantizers):
            before = origin(sources[path][i]) if quantiser is None else None
            if before is not None and before[1] != own:
                yield path, i, before[0]


def _slots(module: Any) -> Iterator[tuple[Any, Any]]:
    """Yield container and key of each quantiser of a module."""
    for container in (module.input_quantizers, module.output_quantizers):
        yield from ((container, i) for i, quantiser in enumerate(container) if quantiser is not None)
    parameters = module.param_quantizers
    yield from ((parameters, name) for name, quantiser in parameters.items() if quantiser is not None)


def _check_ranges(sim: Any) -> None:
    for path, module in sim.named_qmodules():
        for container, key in _slots(module):
            quantiser = container[key]
            if not quantiser.is_initialized():
                raise ExportError(
                    f"{path}: calibration never ran this module, so it has no range",
                    next_step="remove modules without a call from the deploy form",
                )
            if not all(bool(torch.isfinite(p).all()) for p in quantiser.parameters()):
                raise ExportError(
                    f"{path}: its values in calibration were not all finite", next_step="check the samples"
                )


@torch.no_grad()
def _use_all_steps(sim: Any) -> None:
    """Make the integers of weights as large as they can be without rounding anew.

    AIMET stores weights with few distinct values as the smallest integers that hold them: an identity as
    ones. The NPU's 16-bit products drop the low byte of the sum, so small integers give coarse outputs.
    """
    for module in sim.qmodules():
        quantiser = dict(module.param_quantizers.items()).get("weight")
        if quantiser is None or not isinstance(module, (nn.Conv2d, nn.Linear)):
            continue
        rows = module.weight.abs().amax(tuple(range(1, module.weight.ndim)), keepdim=True)
        steps = torch.round(rows / quantiser.get_scale())
        factor = torch.where(steps > 0, quantiser.qmax // steps.clamp(min=1), 1).clamp(min=1)
        quantiser.set_range(quantiser.min / factor, quantiser.max / factor)


@torch.no_grad()
def _stretch(sim: Any, headroom: float) -> None:
    """Widen the ranges of 16-bit activations, but not those that hold by definition, as a softmax's."""
    activations = {
        id(quantiser): quantiser  # some modules share one
        for module in sim.qmodules()
        for quantiser in chain(module.input_quantizers, module.output_quantizers)
        if quantiser is not None and quantiser.bitwidth == 16 and quantiser.is_overwrite_allowed()
    }
    for quantiser in activations.values():
        quantiser.min.mul_(headroom)
        quantiser.max.mul_(headroom)


def _digest(network: nn.Module, first: Tensors, choices: tuple[QuantScheme, bool]) -> str:
    digest = hashlib.sha256(repr(choices).encode())
    tensors = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    for name, values in chain(tensors.items(), first.items()):
        digest.update(f"{name} {values.dtype} {values.shape}".encode())
        digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()


def _restore(sim: Any, state: Path, key: str) -> bool:
    """Take the ranges from an earlier run; False where there are none that fit."""
    try:
        saved = torch.load(state, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
        return False
    # Other quantisers: an older version of this toolkit, or of AIMET, made it.
    if saved["key"] != key or saved["quantisers"].keys() != sim.quantizer_state_dict().keys():
        return False
    sim.model.load_state_dict(saved["quantisers"], strict=False)
    return True


# ---- the written graph ----


def _load_folded(path: Path) -> onnx.ModelProto:
    """Read what was exported without torch's optimiser, and do what little of it a quantised graph needs."""
    model = onnx_ir.from_proto(onnx.load(path))  # its files go away
    onnx_ir.passes.common.ShapeInferencePass()(model)  # so that shapes of weights behind a DQ fold as well
    fold_constants(model)
    for node in model.graph:
        # The exporter gives every convolution a bias; one of zeros, in floats, would keep it off the NPU.
        if node.op_type == "Conv" and len(node.inputs) > 2 and (bias := node.inputs[2]) is not None:
            zeros = bias.const_value
            if zeros is not None and not zeros.numpy().any():
                node.resize_inputs(2)
    onnx_ir.passes.common.RemoveUnusedNodesPass()(model)
    return onnx_ir.to_proto(model)


_PAIR = ("QuantizeLinear", "DequantizeLinear")
# Ops that carry values through unchanged: what stands on their other side decides.
_MOVES = frozenset(
    {"Concat", "DepthToSpace", "Flatten", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose"}
    | {"Unsqueeze"}
)
_DATA_ONLY_FIRST = frozenset({"Clip", "Pad", "Resize"} | _MOVES - {"Concat"})
_WITH_BIAS = frozenset({"Conv", "ConvTranspose", "Gemm", "InstanceNormalization", "LayerNormalization"})
_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_LARGEST = {TensorProto.INT4: 7, TensorProto.INT8: 127, TensorProto.INT16: 32767}
_UNSIGNED, _SIGNED = (TensorProto.UINT8, TensorProto.UINT16), (TensorProto.INT8, TensorProto.INT16)
_WIDE = (TensorProto.UINT16, TensorProto.INT16)
_MIDDLE = 32768  # zero point of a symmetric range written as uint16

Origin = NodeProto | str  # a node, or the name of a graph input or initializer


class _Graph:
    """Who makes and who reads each tensor."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = model.graph
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.producers = {name: node for node in model.graph.node for name in node.output}

    def origins(self, tensor: str) -> Iterator[Origin]:
        """Yield what a tensor's values come from, looking through moves."""
        node = self.producers.get(tensor)
        if node is None or node.op_type not in _MOVES:
            yield tensor if node is None else node
            return
        for name in self.operands(node):
            yield from self.origins(name)

    def operands(self, node: NodeProto) -> list[str]:
        """Return the inputs that hold values, not shapes, axes or scales."""
        if node.op_type in _DATA_ONLY_FIRST:
            return [node.input[0]]
        return [name for name in node.input if name and self._is_float(name)]

    def _is_float(self, name: str) -> bool:
        return name not in self.constants or self.constants[name].data_type == TensorProto.FLOAT

    def dtype(self, pair: NodeProto) -> int:
        """Return the integer type on the inner side of a Q or DQ."""
        return self.constants[pair.input[2]].data_type

    def value(self, name: str) -> Array:
        return numpy_helper.to_array(self.constants[name])

    def before_pairs(self, tensor: str) -> str:
        """Return the float tensor that Q and DQ made this one from."""
        node = self.producers.get(tensor)
        while node is not None and node.op_type in _PAIR:
            tensor = node.input[0]
            node = self.producers.get(tensor)
        return tensor

    def is_constant(self, dequantise: NodeProto) -> bool:
        """Whether a DQ yields weights."""
        stored = dequantise.input[0]
        return stored in self.constants or self.producers[stored].input[0] in self.constants


def convert_before_moves(model: onnx.ModelProto) -> None:
    """Let values change their width before they are moved, in place.

    before  uint16 -> DQ -> Reshape -> Q -> uint8      three operations in float for the compiler
    after   uint16 -> DQ -> Q -> uint8 -> DQ -> Reshape    one Convert

    A move takes every value where it was, so the result is the same.
    """
    graph = _Graph(model)
    replaced: dict[int, list[NodeProto]] = {}
    renamed: dict[str, str] = {}
    outputs = {value.name for value in model.graph.output}  # they keep their names
    for index, node in enumerate(model.graph.node):
        if node.op_type != "QuantizeLinear":
            continue
        moves, before = list[NodeProto](), graph.producers.get(node.input[0])
        while before is not None and before.op_type in _MOVES - {"Concat", "Split"}:
            moves.insert(0, before)
            before = graph.producers.get(before.input[0])
        if not moves or before is None or before.op_type != "DequantizeLinear":
            continue
        if graph.dtype(before) == graph.dtype(node):
            continue
        dequantise = next(n for n in model.graph.node if n.input[:1] == node.output[:1])
        if dequantise.output[0] in outputs:
            continue
        narrow, wide = f"{node.output[0]}_before", f"{dequantise.output[0]}_before"
        chain = [
            onnx.helper.make_node(node.op_type, [before.output[0], *node.input[1:]], [narrow], node.name),
            onnx.helper.make_node(
                dequantise.op_type, [narrow, *dequantise.input[1:]], [wide], dequantise.name
            ),
        ]
        for move in moves:
            copied = NodeProto()
            copied.CopyFrom(move)
            copied.input[0] = chain[-1].output[0]
            copied.output[0] = f"{move.output[0]}_{node.output[0]}"
            chain.append(copied)
        replaced[index] = chain
        renamed[dequantise.output[0]] = chain[-1].output[0]
    if not replaced:
        return
    nodes = [n for i, node in enumerate(model.graph.node) for n in replaced.get(i, [node])]
    for node in nodes:
        node.input[:] = [renamed.get(name, name) for name in node.input]
    read = set(outputs)
    kept: list[NodeProto] = []
    for node in reversed(nodes):
        if any(name in read for name in node.output):
            read.update(node.input)
            kept.append(node)
    del model.graph.node[:]
    model.graph.node.extend(reversed(kept))


def relabel(model: onnx.ModelProto) -> None:
    """Give 16-bit second operands of matrix products the type that the NPU has a kernel for, in place.

    before  uint16, zero point 32768 -> DQ -> MatMul        narrowed to 8 bits by the compiler
    after   uint16, zero point 32768 -> DQ -> Q -> int16, zero point 0 -> DQ -> MatMul

    Same scale, same values. Raises ExportError for a range that is not symmetric.
    """
    graph, zero = _Graph(model), numpy_helper.from_array(np.zeros((), np.int16), "relabel_zero_point")
    nodes: list[NodeProto] = []
    done: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type == "MatMul" and (pair := _unsigned_operand(graph, node)) is not None:
            scale, zero_point = pair.input[1:3]
            if int(graph.value(zero_point)) != _MIDDLE:
                raise ExportError(
                    f"{node.name}: the range of its second operand is not symmetric",
                    next_step=f"make the quantiser behind {pair.name} symmetric, or give it 8 bits by a rule",
                )
            operand = node.input[1]
            if operand not in done:
                done[operand] = f"{operand}_signed"
                inner = f"{operand}_int16"
                for op, before, after in zip(_PAIR, (operand, inner), (inner, done[operand]), strict=True):
                    name = f"{node.name}_relabel_{op}"
                    nodes.append(onnx.helper.make_node(op, [before, scale, zero.name], [after], name))
            node.input[1] = done[operand]
        nodes.append(node)
    if done:
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        model.graph.initializer.append(zero)


def _unsigned_operand(graph: _Graph, matmul: NodeProto) -> NodeProto | None:
    """Return the DQ from which a MatMul's second operand comes as uint16, unless it is a weight."""
    for origin in graph.origins(matmul.input[1]):
        if (
            isinstance(origin, NodeProto)
            and origin.op_type == "DequantizeLinear"
            and not graph.is_constant(origin)
            and graph.dtype(origin) == TensorProto.UINT16
        ):
            return origin
    return None


def check_quantised(model: onnx.ModelProto, is_float: Callable[[str], bool] = lambda _: False) -> None:
    """Refuse a graph that compiles and then is wrong, narrow or slow.

    `is_float` says of a module path whether float is what its rule asks for. Raises ExportError that names
    the node; weights have to be in memory.
    """
    check_interface(model)
    check_forms(model, is_float)
    check_coverage(model, is_float)
    check_operands(model, is_float)


def check_interface(model: onnx.ModelProto) -> None:
    """Refuse inputs or outputs that are not float32: what calls the NPU speaks floats."""
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type != TensorProto.FLOAT:
            raise ExportError(f"{value.name}: an input or output that is not float32")


def check_forms(model: onnx.ModelProto, is_float: Callable[[str], bool] = lambda _: False) -> None:
    """Refuse ops that the compiler runs in float32 or computes wrongly, whatever their ranges.

    All were seen on SM8650 with onnxruntime-qnn 2.7.0.
    """
    graph = _Graph(model)
    for node in model.graph.node:
        if is_float(_module(node)):
            continue
        if node.op_type == "GroupNormalization":
            raise ExportError(
                f"{node.name}: group normalisation always runs in float32",
                next_step='set graph.group_norm = "instance" in the recipe',
            )
        if node.op_type == "Expand":
            raise ExportError(
                f"{node.name}: an expanded axis is computed wrongly",
                next_step="concatenate the tensor with itself, or let an op broadcast",
            )
        if node.op_type == "Mul" and _is_silu(graph, node):
            raise ExportError(
                f"{node.name}: a tensor times its own sigmoid is computed wrongly at many sizes",
                next_step="use npu.ops.SiLU, which hides it from the compiler",
            )


def _is_silu(graph: _Graph, mul: NodeProto) -> bool:
    """Whether it multiplies x and sigmoid(x), each behind Q and DQ and nothing else."""
    for x, other in (mul.input, mul.input[::-1]):
        source = graph.before_pairs(other)
        node = graph.producers.get(source)
        if source != other and node is not None and node.op_type == "Sigmoid":
            return graph.before_pairs(node.input[0]) == graph.before_pairs(x)
    return False


def check_coverage(model: onnx.ModelProto, is_float: Callable[[str], bool] = lambda _: False) -> None:
    """Refuse values that reach an op, or the graph's output, without a Q and DQ on the way; name them all."""
    gaps = dict.fromkeys(_gaps(_Graph(model), is_float))
    if gaps:
        raise ExportError(
            "values without a range; what makes and what reads them would run in float32 or not on the NPU:"
            + listed(gaps),
            next_step="make each of these ops a module of its own with one instance per call, as in "
            "npu/ops.py (for SiLU: npu.ops.SiLU), or allow it by a rule with 32 bits",
        )


def _gaps(graph: _Graph, is_float: Callable[[str], bool]) -> Iterator[str]:
    """Yield what reads a value without a range, and which."""
    readers = [
        (f"{node.name} ({node.op_type})", operand, node)
        for node in graph.graph.node
        if node.op_type not in (*_PAIR, *_MOVES) and not is_float(_module(node))
        for operand in graph.operands(node)
    ]
    outputs = [(f"the output {output.name}", output.name, None) for output in graph.graph.output]
    for reader, operand, node in (*readers, *outputs):
        for origin in graph.origins(operand):
            if not isinstance(origin, NodeProto):
                yield f"{reader} reads {origin}"
            elif not (
                origin.op_type == "DequantizeLinear"
                or is_float(_module(origin))
                or (node is not None and _fuses(graph, origin, node))
            ):
                yield f"{reader} reads {origin.name} ({origin.op_type})"


def _fuses(graph: _Graph, first: NodeProto, second: NodeProto) -> bool:
    """Whether the compiler makes one op of the two."""
    if second.op_type in ("Relu", "Clip"):
        return first.op_type in ("Conv", "Gemm", "Add")
    if first.op_type != "MatMul" or second.op_type != "Add":
        return False
    # A linear layer on tokens: product with a weight, plus a bias.
    others = [first.input[1], *(name for name in second.input if name not in first.output)]
    return all(
        isinstance(origin, NodeProto) and origin.op_type == "DequantizeLinear" and graph.is_constant(origin)
        for name in others
        for origin in graph.origins(name)
    )


def check_operands(model: onnx.ModelProto, is_float: Callable[[str], bool] = lambda _: False) -> None:
    """Refuse integers of a type or scale that the compiler narrows, converts or leaves to the CPU."""
    graph = _Graph(model)
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            _check_signs(graph, node)
        elif is_float(_module(node)):
            continue
        elif node.op_type == "MatMul":
            _check_matmul(graph, node)
        elif node.op_type in _WITH_BIAS and len(node.input) > 2 and node.input[2]:
            _check_bias(graph, node)
        if node.op_type in _PRODUCTS:
            _check_steps(graph, node)


def _check_signs(graph: _Graph, node: NodeProto) -> None:
    before = graph.producers.get(node.input[0])
    relabelled = before is not None and before.op_type == "DequantizeLinear"
    if graph.dtype(node) not in _UNSIGNED and not relabelled and node.input[0] not in graph.constants:
        raise ExportError(
            f"{node.name}: a signed activation, which sends the layer to the CPU",
            next_step='export with force_activation_as="unsigned"',
        )


def _check_matmul(graph: _Graph, node: NodeProto) -> None:
    if _unsigned_operand(graph, node) is not None:
        raise ExportError(
            f"{node.name}: its second operand is uint16, which the compiler narrows to 8 bits",
            next_step="call relabel first",
        )
    first, second = (
        {
            graph.dtype(origin)
            for origin in graph.origins(name)
            if isinstance(origin, NodeProto) and origin.op_type == "DequantizeLinear"
        }
        for name in node.input
    )
    if second & set(_WIDE) and first - set(_WIDE):
        raise ExportError(
            f"{node.name}: a 16-bit second operand needs a 16-bit first one",
            next_step="give both the same bits by a rule",
        )


def _check_bias(graph: _Graph, node: NodeProto) -> None:
    bias = graph.producers.get(node.input[2])
    if bias is None or bias.op_type != "DequantizeLinear" or graph.dtype(bias) != TensorProto.INT32:
        raise ExportError(
            f"{node.name} ({node.op_type}): its bias is not int32, so it runs in float32",
            next_step="export with export_int32_bias, or allow it by a rule with 32 bits",
        )
    if node.op_type.endswith("Normalization"):
        return
    weight = graph.producers[node.input[1]]
    for source in graph.origins(node.input[0]):
        if isinstance(source, NodeProto) and source.op_type == "DequantizeLinear":
            expected = graph.value(source.input[1]) * graph.value(weight.input[1])
            if not np.allclose(graph.value(bias.input[1]), expected, rtol=1e-3, atol=0):
                raise ExportError(
                    f"{node.name}: its bias is stored for another input's scale; is the module called twice?",
                    next_step="one instance per call",
                )


def _check_steps(graph: _Graph, node: NodeProto) -> None:
    pair = graph.producers.get(node.input[1])
    if pair is None or pair.op_type != "DequantizeLinear" or pair.input[0] not in graph.constants:
        return
    integers = np.abs(graph.value(pair.input[0]).astype(np.int64))
    axis = next((a.i for a in pair.attribute if a.name == "axis"), 1)
    per_output = graph.value(pair.input[1]).ndim > 0
    rows = np.moveaxis(integers, axis, 0).reshape(integers.shape[axis], -1) if per_output else [integers]
    largest = _LARGEST.get(graph.constants[pair.input[0]].data_type, 0)
    for row in rows:
        if 0 < 2 * (steps := int(np.max(row))) <= largest:
            raise ExportError(
                f"{node.name}: weights stored as integers up to {steps} where {largest} is possible; the NPU "
                "drops the low byte of their sums",
                next_step="make their scale smaller",
            )


def _module(node: NodeProto) -> str:
    return node.name.rpartition("/")[0]


def _name_pairs(model: onnx.ModelProto) -> None:
    """Name each Q and DQ after the module that made its values, or that reads them if they are weights."""
    readers: dict[str, str] = {}
    for node in reversed(model.graph.node):
        owner = readers.get(node.output[0], "graph") if node.op_type in _PAIR else _module(node)
        readers |= dict.fromkeys(node.input, owner)
    owners = {value.name: value.name for value in model.graph.input}
    taken: Counter[str] = Counter()
    for node in model.graph.node:
        if node.op_type in _PAIR:
            owner = owners.get(node.input[0]) or readers[node.input[0]]
            name = f"{owner}/{node.op_type}"
            taken[name] += 1
            node.name = name if taken[name] == 1 else f"{name}_{taken[name]}"
        else:
            owner = _module(node)
        owners |= dict.fromkeys(node.output, owner)


# ---- what was lost ----


def answers(run: Runner, samples: Sequence[Tensors], given: Sequence[Array]) -> dict[str, float]:
    """Return by input how far the output of `run` moves when this input alone is taken from another sample.

    The RMS over the first samples, each with the next; `given` is what `run` gives for these, and how many
    they are. Raises UsageError for fewer than two samples.
    """
    if len(samples) < 2:
        raise UsageError("conditioning needs two samples or more")
    squares = dict.fromkeys(samples[0], 0.0)
    for i, base in enumerate(given):
        sample, other = samples[i], samples[(i + 1) % len(samples)]
        for name in squares:
            changed = np.asarray(run(sample | {name: other[name]}), np.float64) - base
            squares[name] += float(np.sum(changed * changed))
    sizes = sum(base.size for base in given)
    return {name: math.sqrt(square / sizes) for name, square in squares.items()}


def conditioning(given: Mapping[str, float], reference: Mapping[str, float]) -> dict[str, float]:
    """Return by input how much a network answers to it over how much the reference does; see `answers`.

    1 is perfect, 0 an input that does not matter any more. An input to which the reference does not answer
    either has 1, or inf if the network does.
    """
    return {name: _ratio(value, reference[name]) for name, value in given.items()}


def _ratio(value: float, reference: float) -> float:
    if reference:
        return value / reference
    return math.inf if value else 1.0


def sensitivity(quantised: Quantised, inputs: Tensors) -> dict[str, float]:
    """Return by block the SQNR of the output in dB with nothing but that block quantised, costliest first.

    A block is a resblock, a transformer or the like with all its modules, or a module that stands alone.
    Ranges stay as they are. A block that changes nothing has inf.
    """
    reference = quantised.run_float(inputs)
    alone: dict[str, float] = {}
    for block in dict.fromkeys(block_of(path) for path, _ in quantised.sim.named_qmodules()):
        with quantised._without(lambda path, block=block: block_of(path) != block):  # type: ignore[misc]
            alone[block] = sqnr_db(reference, quantised.run(inputs))
    return dict(sorted(alone.items(), key=lambda item: item[1]))


def block_of(path: str) -> str:
    """Return the path of the resblock, transformer or layer that a module is part of, or the module's own."""
    match = _BLOCK.match(path)
    return match[0] if match else path
