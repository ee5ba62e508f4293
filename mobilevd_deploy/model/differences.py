"""Where weights and configuration disagree: one sentence with the cause, then the names side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, zip_longest

from mobilevd_deploy.errors import CheckpointError
from mobilevd_deploy.model.interface import COMPONENTS
from mobilevd_deploy.model.lora import is_adapter
from mobilevd_deploy.model.weight_files import DTYPES, Header

_LISTED = 10  # problems that a message lists
Shapes = Mapping[str, tuple[int, ...]]


def require_same(expected: Shapes, found: Mapping[str, Header], where: str) -> None:
    """Compare names, shapes and dtypes with those of the configuration.

    Raises CheckpointError: the cause where one explains the differences, and the first ten of them.
    """
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    shapes = [name for name in expected if name in found and found[name].shape != expected[name]]
    dtypes = [name for name in expected if name in found and found[name].dtype not in DTYPES.values()]
    count = len(missing) + len(unexpected) + len(shapes) + len(dtypes)
    if not count:
        return
    lines = [
        *_side_by_side(
            [f"missing     {name} {list(expected[name])}" for name in missing],
            [f"unexpected  {name} {list(found[name].shape)}" for name in unexpected],
        ),
        *(
            f"shape       {name} is {list(found[name].shape)}, the configuration wants {list(expected[name])}"
            for name in shapes
        ),
        *(
            f"dtype       {name} is {found[name].dtype}, allowed are {', '.join(DTYPES.values())}"
            for name in dtypes
        ),
    ]
    shown = "\n  ".join(lines[:_LISTED])
    rest = f"\n  and {count - _LISTED} more" if count > _LISTED else ""
    cause, next_step = _cause(expected, found, missing, unexpected, shapes, dtypes)
    raise CheckpointError(
        f"{where}: weights and configuration disagree in {count} tensors{cause}:\n  {shown}{rest}",
        next_step=next_step,
    )


def _side_by_side(left: Sequence[str], right: Sequence[str]) -> list[str]:
    """Alternate between two lists, so that the first lines show both."""
    return [line for line in chain.from_iterable(zip_longest(left, right)) if line is not None]


def _cause(
    expected: Shapes,
    found: Mapping[str, Header],
    missing: Sequence[str],
    unexpected: Sequence[str],
    shapes: Sequence[str],
    dtypes: Sequence[str],
) -> tuple[str, str]:
    """Return the one cause of all differences, if there is one, and what to do."""
    training = "was that the configuration of the training run? models/README.md lists the names"
    if any(map(is_adapter, unexpected)):
        return (
            "; adapters (LoRA) are not merged",
            "merge them before saving (peft: merge_and_unload()), or give the adapters alone with --lora",
        )
    if dtypes and not (missing or unexpected or shapes):
        kinds = sorted({found[name].dtype for name in dtypes})
        return f"; weights are {', '.join(kinds)}", "save them as float32, float16 or bfloat16"
    if prefixes := _common_prefix(missing, unexpected):
        old, new = prefixes
        return f"; every name has the prefix {new!r} instead of {old!r}", "save the weights without it"
    absent = [part for part in COMPONENTS if not any(name.startswith(f"{part}.") for name in found)]
    if absent and all(name.split(".", 1)[0] in absent for name in missing) and not (unexpected or shapes):
        return f"; there is no {' and no '.join(absent)}", f"save the {' and the '.join(absent)} too"
    for feature, marks in _FEATURES.items():
        for names, owner in ((unexpected, "the weights"), (missing, "the configuration")):
            others = [name for name in chain(missing, unexpected, shapes) if name not in names]
            if names and not others and all(any(mark in name for mark in marks) for name in names):
                return f"; only {owner} {'have' if owner == 'the weights' else 'has'} {feature}", training
    if shapes and not (missing or unexpected):
        return "; all names fit, so this is the same network in other widths", training
    return "", training


# What the UNet has beyond diffusers' names.
_FEATURES = {
    "gates of temporal blocks": (".time_mixer.gate", ".time_mixer.importance"),
    "channel funnels": (".squeeze", ".widen"),
    "temporal multiscaling by convolution": ("unet.temporal_downsample.", "unet.temporal_upsample."),
}


def _common_prefix(missing: Sequence[str], unexpected: Sequence[str]) -> tuple[str, str] | None:
    """Return prefixes whose exchange turns every missing name into an unexpected one, if there are any."""
    wanted, others = sorted(missing), sorted(unexpected)
    if not wanted or len(wanted) != len(others):
        return None
    for old in ("", f"{wanted[0].split('.', 1)[0]}."):
        rest = wanted[0].removeprefix(old)
        new = others[0].removesuffix(rest)
        same = (
            a.startswith(old) and b == new + a.removeprefix(old) for a, b in zip(wanted, others, strict=True)
        )
        if new != others[0] and all(same):
            return old, new
    return None
