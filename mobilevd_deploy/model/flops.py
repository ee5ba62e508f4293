"""Floating-point operations of a network, counted from the calls that it really makes.

Two conventions:

    honest   2 per multiply-accumulate of convolutions, linear layers and matrix products, both
             products of an attention included; nothing else. Our default.
    paper    what DeepSpeed's profiler (up to 0.16.9) makes of diffusers' modules, by which MobileVD's
             figures are reproduced: as above, plus 1 per convolution output that has a bias, 5 per
             normalised element, 1 per SiLU, GELU or ReLU, 1 per entry of an attention's map, and
             for interpolation by a factor s the input's size times s to the power of the BATCH
             size: a bug of that version, which adds 0.55 T to SVD at 1024x576.

A `TorchFunctionMode` sees each functional call, so tensors may be on the meta device, where nothing
is computed or allocated. Source: facts of the paper's ablation; DeepSpeed, flops_profiler/profiler.py.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

Convention = Literal["honest", "paper"]


CONVENTIONS: tuple[Convention, ...] = ("honest", "paper")


def count_flops(function: Callable[..., Any], *inputs: Any, convention: Convention = "honest") -> int:
    """Call `function(*inputs)`, without gradients, and return the operations counted on the way."""
    with torch.no_grad(), _Counter() as counter:
        function(*inputs)
    return sum(counter.counts[convention].values())


def count_flops_by_module(
    module: nn.Module, function: Callable[..., Any], *inputs: Any
) -> dict[Convention, dict[str, int]]:
    """Call `function(*inputs)`, which runs `module`, and count for every module path, by both conventions.

    A path's count includes its children's; "" is the whole. Paths that were not called are absent.
    """
    with torch.no_grad(), _Counter() as counter, _attributed(module, counter):
        function(*inputs)
    return {convention: _with_children(counter.counts[convention]) for convention in CONVENTIONS}


def _with_children(counts: dict[str, int]) -> dict[str, int]:
    totals = {"": 0}
    for path, count in counts.items():
        totals[""] += count
        while path:
            totals[path] = totals.get(path, 0) + count
            path = path.rpartition(".")[0]
    return totals


class _Counter(TorchFunctionMode):
    """Counts per path of the module that is running, "" outside of all."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[Convention, dict[str, int]] = {name: defaultdict(int) for name in CONVENTIONS}
        self.running = [""]

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        # The mode is off in here, so calls that `func` makes itself are not counted again.
        result = func(*args, **kwargs)
        for convention, rules in _RULES.items():
            rule = rules.get(getattr(func, "__name__", ""))
            if rule is not None:
                self.counts[convention][self.running[-1]] += rule(result, *args, **kwargs)
        return result


@contextmanager
def _attributed(module: nn.Module, counter: _Counter) -> Iterator[None]:
    handles: list[RemovableHandle] = []
    for path, part in module.named_modules():

        def enter(_: nn.Module, __: Any, path: str = path) -> None:
            counter.running.append(path)

        def leave(_: nn.Module, __: Any, ___: Any) -> None:
            counter.running.pop()

        handles += [part.register_forward_pre_hook(enter), part.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# Each rule takes the call's result, then its arguments.


def _linear(out: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> int:
    return 2 * out.numel() * weight.shape[1]


def _convolution(
    out: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None, *_: Any, **__: Any
) -> int:
    return 2 * out.numel() * math.prod(weight.shape[1:])


def _convolution_paper(
    out: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None, *_: Any, **__: Any
) -> int:
    return _convolution(out, input, weight) + (out.numel() if bias is not None else 0)


def _product(out: Tensor, left: Tensor, right: Tensor, *_: Any, **__: Any) -> int:
    return 2 * out.numel() * left.shape[-1]


def _reversed_product(out: Tensor, right: Tensor, left: Tensor) -> int:
    return _product(out, left, right)


def _product_plus(out: Tensor, added: Tensor, left: Tensor, right: Tensor, *_: Any, **__: Any) -> int:
    return _product(out, left, right)


def _product_plus_paper(out: Tensor, added: Tensor, left: Tensor, right: Tensor, *_: Any, **__: Any) -> int:
    return _product(out, left, right) + added.numel()


def _einsum(out: Tensor, equation: str, *operands: Any) -> int:
    tensors = operands[0] if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands
    terms = equation.replace(" ", "").split("->")[0].split(",")
    if len(terms) != 2:
        raise NotImplementedError(f"einsum {equation!r}: only products of two tensors are counted")
    # "..." stands for the same trailing sizes everywhere: name its axes by their distance from the end.
    sizes: dict[str, int] = {}
    for term, tensor in zip(terms, tensors, strict=True):
        before, dots, after = term.partition("...")
        hidden = tensor.ndim - len(before) - len(after)
        names = [*before, *(f"...{i}" for i in range(hidden, 0, -1)), *after] if dots else [*term]
        for name, size in zip(names, tensor.shape, strict=True):
            sizes[name] = max(size, sizes.get(name, 1))
    return 2 * math.prod(sizes.values())


def _attention(out: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    entries = query[..., 0].numel() * key.shape[-2]
    return 2 * entries * (query.shape[-1] + value.shape[-1])


def _attention_paper(out: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    # diffusers' plain processor: baddbmm, which adds an empty tensor to each entry, then bmm.
    return _attention(out, query, key, value) + query[..., 0].numel() * key.shape[-2]


def _norm_paper(out: Tensor, *_: Any, **__: Any) -> int:
    return 5 * out.numel()


def _elements(out: Tensor, *_: Any, **__: Any) -> int:
    return out.numel()


def _interpolate_paper(
    out: Tensor, input: Tensor, size: Any = None, scale_factor: Any = None, *_: Any, **__: Any
) -> int:
    if size is not None:
        return int(math.prod(size)) if isinstance(size, Sequence) else int(size)
    factor = scale_factor[0] if isinstance(scale_factor, Sequence) else scale_factor
    # The batch size: len() of a tensor is its first axis. Meant was the number of axes.
    return input.numel() * int(factor) ** len(input)


# By name, which a function of torch, of torch.nn.functional and a tensor's method have in common.
_HONEST: dict[str, Callable[..., int]] = {
    "linear": _linear,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    **dict.fromkeys(("matmul", "__matmul__", "mm", "bmm"), _product),
    "__rmatmul__": _reversed_product,
    **dict.fromkeys(("addmm", "baddbmm"), _product_plus),
    "einsum": _einsum,
    "scaled_dot_product_attention": _attention,
}
_PAPER: dict[str, Callable[..., int]] = {
    **_HONEST,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution_paper),
    **dict.fromkeys(("addmm", "baddbmm"), _product_plus_paper),
    "scaled_dot_product_attention": _attention_paper,
    **dict.fromkeys(("group_norm", "layer_norm"), _norm_paper),
    **dict.fromkeys(("silu", "gelu", "relu"), _elements),
    "interpolate": _interpolate_paper,
}
_RULES: dict[Convention, dict[str, Callable[..., int]]] = {"honest": _HONEST, "paper": _PAPER}
