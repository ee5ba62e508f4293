"""Runners of a component: onnxruntime, and the parts of a split component one after another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from mobilevd_deploy.artifact.manifest import Component
from mobilevd_deploy.base.tensors import Array
from mobilevd_deploy.errors import ArtifactError, ResourceError, UsageError


class Runner(Protocol):
    """A loaded component; callers drop it to free its memory."""

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Map inputs by name to outputs by name."""


Loader = Callable[[Component], Runner]


class Wired(Protocol):
    """Something with named inputs and outputs: `NpuPart`, or a part that is not compiled yet."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the values."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the values."""


P = TypeVar("P", bound=Wired)


@dataclass(frozen=True)
class PartsRunner(Generic[P]):
    """A split component: runs its parts one after another, in the order of `NpuBinary.parts`.

    `load` loads a part when it is needed; the part is dropped after its run, and a value after its last use.
    """

    parts: Sequence[P]
    load: Callable[[P], Runner]

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Return the outputs of the last part."""
        values = dict(feeds)
        for i, part in enumerate(self.parts):
            values |= self.load(part).run({name: values[name] for name in part.inputs})
            needed = {name for later in self.parts[i + 1 :] for name in later.inputs}
            values = {n: v for n, v in values.items() if n in needed or n in part.outputs}
        return {name: values[name] for name in self.parts[-1].outputs}


class OnnxRunner:
    """An ONNX file in an onnxruntime session.

    Raises UsageError for an execution provider that this onnxruntime does not have or cannot start (with the
    available ones), ArtifactError for a file that it cannot load or run, ResourceError if memory runs out.
    """

    def __init__(self, path: Path, providers: Sequence[str] = ("CPUExecutionProvider",)) -> None:
        import onnxruntime

        check_providers(providers)
        if not path.is_file():
            raise ArtifactError(f"{path} does not exist")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors; they are raised as well
        self._path = path
        try:
            self._session = onnxruntime.InferenceSession(path, options, providers=list(providers))
        except Exception as error:  # onnxruntime's exceptions have no other common base
            raise self._error("load", error) from error
        if missing := sorted(set(providers) - set(self._session.get_providers())):
            raise UsageError(f"{missing[0]} does not start on this machine", next_step=_available())

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run the session."""
        names = [output.name for output in self._session.get_outputs()]
        try:
            return dict(zip(names, self._session.run(None, dict(feeds)), strict=True))
        except Exception as error:
            raise self._error("run", error) from error

    def _error(self, what: str, error: Exception) -> ArtifactError | ResourceError:
        if isinstance(error, MemoryError) or "bad_alloc" in str(error) or "allocate memory" in str(error):
            return ResourceError(
                f"{self._path}: not enough memory to {what} it", next_step="close other programs"
            )
        return ArtifactError(
            f"{self._path}: onnxruntime cannot {what} it: {error}", next_step="export it again"
        )


def check_providers(providers: Sequence[str]) -> None:
    """Raise UsageError unless onnxruntime has every one of these execution providers."""
    import onnxruntime

    if not providers:
        raise UsageError("no execution provider is named", next_step=_available())
    if unknown := [name for name in providers if name not in onnxruntime.get_available_providers()]:
        raise UsageError(f"onnxruntime has no execution provider {unknown[0]!r} here", next_step=_available())


def _available() -> str:
    import onnxruntime

    return f"available: {', '.join(onnxruntime.get_available_providers())}"
