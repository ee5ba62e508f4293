"""Quantisation with AIMET: calibrate, simulate, and write ONNX whose every op the NPU can run.

quantise          a deploy-form network and samples -> Quantised, its simulation
Quantised.export  ONNX with QuantizeLinear and DequantizeLinear (Q, DQ), repaired (quantize.qdq) and checked
                  (quantize.qdq_check)

The rules of the hardware are in export/htp_quantsim.json, in AIMET's format.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import logging
import pickle
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from mobilevd_deploy.base.files import written_aside
from mobilevd_deploy.base.graphs import check_file, save_graph
from mobilevd_deploy.base.tensors import Array, Tensors
from mobilevd_deploy.config.data import data_dir
from mobilevd_deploy.config.recipe import QuantScheme
from mobilevd_deploy.errors import ExportError, UsageError
from mobilevd_deploy.npu import ops
from mobilevd_deploy.npu.onnx_export import DATA, MODEL, name_nodes, quiet
from mobilevd_deploy.quantize.qdq import convert_before_moves, load_folded, name_pairs, relabel
from mobilevd_deploy.quantize.qdq_check import check_quantised

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

    The network is changed in place: AIMET's modules replace its arithmetic modules, and every module gets
    quantisers.

    Args:
        network: a result of `build_npu` in the forms linear = "conv" and group_norm = "instance".
        samples: inputs by name in the order of the network's arguments, float32. Read one at a time.
        scheme: bits, headroom and rules of the recipe.
        state: file of the ranges. If it exists and was made with this scheme, network and first sample, no
            other sample is read. Otherwise it is written.
        apart: give every module its own range, including those for which AIMET uses one shared range.

    Raises:
        UsageError: AIMET is not installed, or there is no sample.
        ExportError: AIMET cannot trace the network, a module never ran, or its values are not finite.
    """
    aimet = _load_aimet()
    stream = iter(samples)
    if (first := next(stream, None)) is None:
        raise UsageError("there is no sample to calibrate with")
    key = _digest(network, first, (scheme, apart))
    with _silence():
        _swap_arithmetic(network.eval().requires_grad_(False), aimet.arithmetic)
        sources = input_sources(network, first)
        with _blaming_aimet("simulate", network), _Hollow():
            sim = aimet.sim(
                network,
                as_arguments(first),
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
    """A calibrated simulation, made by `quantise`. `sim` is AIMET's QuantizationSimModel.

    `shared`: groups of modules whose outputs share one range, such as a concatenation and its inputs.
    """

    sim: Any
    scheme: QuantScheme
    shared: tuple[tuple[str, ...], ...] = ()

    @torch.no_grad()
    def run(self, inputs: Tensors) -> Array:
        """Return the output of the quantised network as float32, for inputs in argument order."""
        with _silence():
            output: Tensor = self.sim.model(*as_arguments(inputs))
        return np.asarray(output.as_subclass(torch.Tensor).numpy())

    def run_float(self, inputs: Tensors) -> Array:
        """Return the output of the same network without quantisers."""
        with self._without(lambda _: True):
            return self.run(inputs)

    def export(self, folder: Path, inputs: Tensors, output_names: Sequence[str]) -> None:
        """Write `folder`/model.onnx with its integer weights in model.onnx.data, repaired and checked.

        Inputs and outputs stay float32. Nodes are named <module path>/<op> as in a float export, a Q or DQ
        after the module whose values it quantises. `inputs` are example values. Raises ExportError if AIMET
        or torch cannot write the graph, or if `check_quantised` refuses it.
        """
        folder.mkdir(parents=True, exist_ok=True)
        # AIMET also writes files that no graph refers to.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".aimet-") as aside:
            raw = Path(aside) / MODEL
            network, arguments, aimet = self.sim.model, as_arguments(inputs), _load_aimet()
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
                    export_int32_bias=False,  # `int32_biases` has added them
                    force_activation_as="unsigned",
                )
            model = load_folded(raw)
            name_nodes(model)
            convert_before_moves(model)
            name_pairs(model)
            relabel(model)
            check_quantised(model, self._is_float)
            save_graph(model, folder / MODEL, DATA)
        check_file(folder / MODEL, f"the quantised export of {type(network).__name__}")

    def _is_float(self, module: str) -> bool:
        return FLOAT in bits_of(self.scheme, module)

    @contextlib.contextmanager
    def _without(self, chosen: Callable[[str], bool]) -> Iterator[None]:
        """Remove the quantisers of the modules whose path is `chosen`, within a with statement."""
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
    int32_biases: Any  # context manager: gives every bias a quantiser; runs the network to find the scales
    quantiser: Any  # QuantizeDequantize
    multiply: Any
    arithmetic: Mapping[type[nn.Module], Callable[[Any], nn.Module]]


@functools.cache
def _load_aimet() -> _Aimet:
    """Import AIMET, which takes 7 to 14 s, and register a quantised form of `Constant`."""
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
            f"quantising needs AIMET, which cannot be imported: {error}",
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
    """Keep the messages of AIMET and torch, hundreds of lines, off the terminal."""
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
    except Exception as error:  # AIMET and torch raise many types
        raise ExportError(
            f"AIMET could not {what} {type(network).__name__}: {_first_line(error)}",
            next_step="report this with the model's configuration",
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)  # the rest is example code


def as_arguments(inputs: Tensors) -> tuple[Tensor, ...]:
    """Return the inputs as tensors in calling order."""
    return tuple(torch.from_numpy(value) for value in inputs.values())


def _run_all(model: nn.Module, samples: Iterable[Tensors]) -> None:
    for sample in samples:
        with _blaming_aimet("calibrate", model):
            model(*as_arguments(sample))
        del sample  # before the next one is read


class _Hollow(TorchFunctionMode):
    """Run a network fast for tracing: shapes and call order are correct, values are meaningless.

    AIMET runs the network four times to trace it, to count inputs and outputs, and to find the scales of
    biases. None of these uses the values.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute one output channel from one input channel and repeat it; do not quantise."""
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


def bits_of(scheme: QuantScheme, path: str) -> tuple[int, int]:
    """Return the bits of a module's weights and activations."""
    rule = next((rule for rule in scheme.rules if fnmatchcase(path, rule.modules)), None)
    if rule is None:
        return scheme.weights, scheme.activations
    return rule.weights or scheme.weights, rule.activations or scheme.activations


def _fill_gaps(sim: Any, aimet: _Aimet) -> None:
    # AIMET gives no range to a product with one positive number, because a compiler can derive it, and none
    # to padding. The int32 bias of a convolution behind it would then have another scale than its sum.
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
    # Modules that share a range still share it if they have the same bits; others get a separate range.
    narrow: dict[int, tuple[Any, Any]] = {}  # quantisers by id, each with its copy of 8 bits
    for path, module in sim.named_qmodules():
        weights, activations = bits_of(scheme, path)
        parameters = module.param_quantizers
        for name, quantiser in parameters.items():
            if weights == FLOAT:
                parameters[name] = None
            elif quantiser is not None and isinstance(module, (nn.Conv2d, nn.Linear)):
                quantiser.bitwidth = weights  # the weights of a norm stay at 8 bits
        for container in (module.input_quantizers, module.output_quantizers):
            for i, quantiser in enumerate(container):
                if activations == FLOAT:
                    container[i] = None
                elif quantiser is not None and activations == 8:
                    _, twin = narrow.setdefault(id(quantiser), (quantiser, copy.deepcopy(quantiser)))
                    twin.bitwidth = 8
                    if twin.is_overwrite_allowed():
                        twin.symmetric = False  # only 16-bit operands must be symmetric
                    container[i] = twin


class _Traced(Tensor):
    """A tensor that keeps the name of the leaf module that made it, also when its values are moved."""

    source: str | None = None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        if isinstance(result, _Traced):
            flat = (a for arg in args for a in (arg if isinstance(arg, (tuple, list)) else (arg,)))
            result.source = next((a.source for a in flat if isinstance(a, _Traced) and a.source), None)
        return result


@torch.no_grad()
def input_sources(network: nn.Module, inputs: Tensors) -> dict[str, list[str | None]]:
    """Return the leaf module that makes each input of each leaf module; None for inputs of the network.

    Shapes are enough for that, so the network runs on the meta device.
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
    arguments = tuple(argument.to("meta") for argument in as_arguments(inputs))
    try:
        torch.func.functional_call(network, hollow, arguments)
    finally:
        for hook in hooks:
            hook.remove()
    return sources


def _convert_between(
    sim: Any, sources: Mapping[str, Sequence[str | None]], scheme: QuantScheme, aimet: _Aimet
) -> None:
    """Add a quantiser with the module's bits to each input that has other bits.

    An operation of the NPU has inputs and outputs of one width; a Q and DQ in between converts.
    """
    modules = dict(sim.named_qmodules())
    for path, i, _ in borders(modules, sources, functools.partial(bits_of, scheme)):
        own = bits_of(scheme, path)[1]
        modules[path].input_quantizers[i] = aimet.quantiser(shape=(), bitwidth=own, symmetric=False)


def borders(
    modules: Mapping[str, Any],
    sources: Mapping[str, Sequence[str | None]],
    bits: Callable[[str], tuple[int, int]],
) -> Iterator[tuple[str, int, str]]:
    """Yield (module, input index, source module) for each input whose bits differ from the module's.

    `modules`: AIMET's by path. Their quantisers follow `bits`, which returns (weights, activations) for a
    path. An input that has its own quantiser is left out.
    """

    def origin(path: str | None) -> tuple[str, int] | None:
        while path is not None:
            if bits(path)[1] == FLOAT:
                return path, FLOAT
            if path in modules and (quantiser := modules[path].output_quantizers[0]) is not None:
                return path, int(quantiser.bitwidth)
            path = sources[path][0]  # this module only moves values
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
    """Make the integers of weights as large as possible by a whole factor, which changes no rounding.

    AIMET stores weights with few distinct values as the smallest possible integers, for example an identity
    as ones. The NPU's 16-bit products drop the low byte of the sum, so small integers give coarse outputs.
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
    """Widen the ranges of 16-bit activations, except fixed ranges such as a softmax's."""
    activations = {
        id(quantiser): quantiser  # some modules share a quantiser
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
    """Load the ranges of an earlier run; return False if there are none that match."""
    try:
        saved = torch.load(state, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
        return False
    # Other quantisers: another version of this toolkit or of AIMET made the file.
    if saved["key"] != key or saved["quantisers"].keys() != sim.quantizer_state_dict().keys():
        return False
    sim.model.load_state_dict(saved["quantisers"], strict=False)
    return True


def block_of(path: str) -> str:
    """Return the path of the resblock, transformer or layer that contains a module, else the module's own."""
    match = _BLOCK.match(path)
    return match[0] if match else path
