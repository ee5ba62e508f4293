"""Bits for each block of the UNet: the cheapest that still keep a wanted SQNR, or the best for a price.

    tune            checkpoint, recipe and a goal -> Tuned: the recipe with its rules, and the way there
    Mixture         one simulation whose modules take their quantisers from several calibrated ones
    bit_operations  the price

Each block begins with 8-bit weights and activations. How much noise it makes alone is measured once for every
candidate, and noise powers add up. So the next block to get more bits is the one that promises to lose most
noise for its price; the outcome is simulated as it really would be, and at the end calibrated anew.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from torch import nn

from mobilevd_deploy.base.files import digest, write_durably
from mobilevd_deploy.base.progress import Progress
from mobilevd_deploy.base.tensors import Tensors, sqnr_db
from mobilevd_deploy.config.recipe import QuantRule, QuantScheme, Recipe, to_toml
from mobilevd_deploy.config.spec import ComponentName
from mobilevd_deploy.deploy import tool_versions
from mobilevd_deploy.errors import ParityError, UsageError
from mobilevd_deploy.model.checkpoint import Checkpoint, open_checkpoint
from mobilevd_deploy.model.components import deploy_contract
from mobilevd_deploy.model.flops import count_flops_by_module
from mobilevd_deploy.model.interface import component_tensors
from mobilevd_deploy.npu import ops
from mobilevd_deploy.quantize.calibration import JUDGES, choose_pictures
from mobilevd_deploy.quantize.simulation import (
    FLOAT,
    Quantised,
    as_arguments,
    bits_of,
    block_of,
    borders,
    input_sources,
    quantise,
)
from mobilevd_deploy.runtime.pipeline import ClipJob
from mobilevd_deploy.stages.export import deploy_form, reference

Bits = tuple[int, int]
"""Bits of weights and of activations."""

UNIT: Bits = (8, 16)
"""Prices are relative to a UNet of which every block has these."""

CANDIDATES: tuple[Bits, ...] = ((8, 8), UNIT, (16, 16))
"""What a block may have, cheapest first. 16-bit weights with 8-bit activations cost as much as `UNIT`."""

_IN_FLOAT: Bits = (FLOAT, FLOAT)
_MEASURED = "measured.json"


@dataclass(frozen=True)
class Step:
    """A choice of bits that was simulated: what changed since the step before, the price, and the outcome.

    `block` is empty for the first one, all at 8 bits. `predicted_db` and `measured_db`: SQNR of the UNet's
    output on the first judging picture, by adding up noise and by simulation; None: nothing is lost.
    """

    block: str
    weights: int
    activations: int
    bit_operations: float
    predicted_db: float | None
    measured_db: float | None


@dataclass(frozen=True)
class Tuned:
    """The outcome of a search; `recipe` holds the rules.

    `bit_operations`: relative to 8-bit weights and 16-bit activations throughout. `sqnr_db`: of the UNet,
    calibrated anew by the rules, on the worst of the judging pictures.
    """

    recipe: Recipe
    bit_operations: float
    sqnr_db: float
    bits: dict[str, Bits]
    steps: tuple[Step, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain values; they go through JSON."""
        return dataclasses.asdict(self)


def tune(
    checkpoint_path: str | Path,
    recipe: Recipe,
    output: Path,
    progress: Progress | None = None,
    *,
    target_sqnr: float | None = None,
    budget: float | None = None,
    calibration: Sequence[str | Path] = (),
) -> Tuned:
    """Search, and write `output`, a recipe file with one rule for each block that differs from the scheme.

    Either `target_sqnr`, in dB, is reached as cheaply as the search finds, or the best is taken that costs at
    most `budget`, bit operations relative to W8A16. What is measured is kept in the folder <output>.work, so
    that a search that was stopped goes on, and one with another goal begins with what is known. Rules that
    the recipe has already stay, and stay first. `calibration` as for `deploy`.

    Raises:
        UsageError: the recipe quantises nothing, or `output` is not a TOML file.
        ParityError: the goal is out of reach; the error says what was reached.
        CheckpointError, RewriteError, ExportError: as `deploy`.
    """
    progress = progress or Progress()
    if recipe.quant is None:
        raise UsageError(f"recipe {recipe.name} quantises nothing", next_step="choose a recipe with [quant]")
    if (target_sqnr is None) == (budget is None):
        raise UsageError("one goal is needed", next_step="name --target-sqnr or --budget, not both")
    if output.suffix != ".toml":
        raise UsageError(f"{output} is not a TOML file", next_step="name it like my.toml")
    checkpoint = open_checkpoint(checkpoint_path)
    pictures = choose_pictures(checkpoint.spec, recipe, calibration, progress)
    assert pictures is not None
    progress.plan({"inputs": 1, "measure blocks": 4, "search": 4})
    progress.begin("inputs")
    feeds = _unet_inputs(checkpoint, [ClipJob(picture, i) for i, picture in enumerate(pictures.values)])
    progress.end()
    key = digest(
        {
            "checkpoint": checkpoint.sha256,
            "recipe": {**recipe.to_dict(), "floors": None, "npu": None},
            "pictures": pictures.sha256,
            "tools": tool_versions(recipe),
        }
    )
    work = output.with_name(f"{output.name}.work")
    work.mkdir(parents=True, exist_ok=True)
    search = _Search(
        lambda: deploy_form("unet", checkpoint.load("unet"), checkpoint.spec, recipe, Progress())[0],
        recipe.quant.of("unet"),
        feeds[:-JUDGES],
        feeds[-JUDGES:],
        _Notes(work / _MEASURED, key),
        work,
        progress,
    )
    if target_sqnr is not None:
        choice, steps, reached = search.reach(target_sqnr)
    else:
        assert budget is not None  # there is one goal
        choice, steps, reached = search.best(budget)
    price = search.price(choice)
    scheme = dataclasses.replace(recipe.quant, rules=(*recipe.quant.rules, *search.rules(choice)))
    floors = recipe.floors
    # The export measures it again; another machine rounds otherwise.
    if reached < floors.quantised_sqnr_db + 1:
        floors = dataclasses.replace(floors, quantised_sqnr_db=float(math.floor(reached - 1)))
    found = dataclasses.replace(
        recipe,
        name=output.stem,
        description=f"{recipe.description}; bits of the UNet's blocks by `tune`: {reached:.1f} dB SQNR at "
        f"{price:.2f} of W8A16's bit operations",
        quant=scheme,
        floors=floors,
    )
    write_durably(output, to_toml(found))
    return Tuned(found, price, reached, choice, tuple(steps))


class Mixture:
    """One simulation whose modules take their quantisers from several, each calibrated with other bits.

    `quantised` is the one that runs. `palettes` holds the quantisers of each, calibrated `apart`, by their
    bits. `sources` says for each leaf module where its inputs come from.
    """

    def __init__(
        self,
        quantised: Quantised,
        palettes: Mapping[Bits, Palette],
        sources: Mapping[str, Sequence[str | None]],
    ) -> None:
        self.quantised, self._palettes, self.sources = quantised, palettes, sources
        self._modules: dict[str, Any] = dict(quantised.sim.named_qmodules())
        self._joint: dict[tuple[Bits, tuple[str, ...]], Any] = {}

    def run(self, bits: Callable[[str], Bits], inputs: Tensors) -> npt.NDArray[Any]:
        """Return the output with the bits that `bits` gives to each module's path, 32 and 32 for float.

        An input that comes with other bits is converted to the module's own, as `quantise` would do it.
        """
        for path, module in self._modules.items():
            chosen = bits(path)
            for container, slots in zip(_containers(module), self._palette(chosen)[path], strict=True):
                for key, quantiser in slots.items():
                    container[key] = None if chosen == _IN_FLOAT else quantiser
        for paths in self.quantised.shared:
            for width in {bits(path)[1] for path in paths} - {FLOAT}:
                sharing = tuple(path for path in paths if bits(path)[1] == width)
                joint = self._joint_range(bits(sharing[0]), sharing)
                for path in sharing:
                    self._modules[path].output_quantizers[0] = joint
        for path, i, source in list(borders(self._modules, self.sources, bits)):
            self._modules[path].input_quantizers[i] = self._range_of(source, self._palette(bits(path)))
        return self.quantised.run(inputs)

    def _palette(self, bits: Bits) -> Palette:
        # Other bits than a palette's are those of a rule that holds in all of them.
        return self._palettes.get(bits) or next(iter(self._palettes.values()))

    def _joint_range(self, bits: Bits, paths: tuple[str, ...]) -> Any:
        if (bits, paths) not in self._joint:
            ranges = [self._palette(bits)[path][1][0] for path in paths]
            joint = copy.deepcopy(ranges[0])
            joint.set_range(
                torch.stack([one.min.detach() for one in ranges]).amin(0),
                torch.stack([one.max.detach() for one in ranges]).amax(0),
            )
            self._joint[bits, paths] = joint
        return self._joint[bits, paths]

    def _range_of(self, source: str | None, palette: Palette) -> Any:
        while source is not None:
            if source in palette and (quantiser := palette[source][1][0]) is not None:
                return quantiser
            source = self.sources[source][0]  # it only moves values
        return None


Slots = tuple[dict[Any, Any], dict[Any, Any], dict[Any, Any]]
"""Quantisers of a module's inputs, outputs and parameters, by position or name."""

Palette = Mapping[str, Slots]


def palette_of(quantised: Quantised) -> Palette:
    """Return the quantisers of a simulation by module path."""
    return {
        path: (dict(enumerate(inputs)), dict(enumerate(outputs)), dict(parameters.items()))
        for path, module in quantised.sim.named_qmodules()
        for inputs, outputs, parameters in (_containers(module),)
    }


def _containers(module: Any) -> tuple[Any, Any, Any]:
    return module.input_quantizers, module.output_quantizers, module.param_quantizers


def bit_operations(network: nn.Module, inputs: Tensors) -> dict[str, Callable[[Bits], int]]:
    """Return the price of each convolution, linear layer and matrix product by path, for given bits.

    Multiply-accumulates x the bits of both factors, counted in a run on `inputs`. A product of two
    activations has the bits of activations twice.
    """
    counts = count_flops_by_module(network, network, *as_arguments(inputs))["honest"]

    def price(macs: int, of_activations: bool, bits: Bits) -> int:
        weights, activations = bits
        return macs * activations * (activations if of_activations else weights)

    return {
        path: partial(price, counts[path] // 2, isinstance(module, ops.MatMul))
        for path, module in network.named_modules()
        if counts.get(path) and not [*module.children()]
    }


def group_blocks(sources: Mapping[str, Sequence[str | None]], priced: Sequence[str]) -> dict[str, str]:
    """Return for each leaf module the block that decides over its bits.

    That is `block_of` it where the block has a product, one of `priced`. Else it is the block that reads it,
    or, behind the last product, the block of that. `sources` is in running order.
    """
    own = {block_of(path) for path in priced}
    readers: dict[str, str] = {}
    for path, before in sources.items():
        for source in before:
            if source is not None:
                readers.setdefault(block_of(source), path)
    last = next(block_of(path) for path in reversed([*sources]) if block_of(path) in own)

    def group(block: str) -> str:
        seen = set()
        while block not in own:
            seen.add(block)
            if block not in readers or block_of(readers[block]) in seen:
                return last
            block = block_of(readers[block])
        return block

    return {path: group(block_of(path)) for path in sources}


class _Notes:
    """Numbers by name, in a file that is replaced whenever one is added; begun anew for another key."""

    def __init__(self, path: Path, key: str) -> None:
        self._path, self._key = path, key
        try:
            stored = json.loads(path.read_bytes())
            self._values: dict[str, float] = dict(stored["values"]) if stored["key"] == key else {}
        except (OSError, ValueError, KeyError, TypeError):
            self._values = {}

    def get(self, name: str, measure: Callable[[], float]) -> float:
        """Return what is known under `name`, or measure and keep it."""
        if name not in self._values:
            self._values[name] = measure()
            write_durably(self._path, json.dumps({"key": self._key, "values": self._values}, indent=1))
        return self._values[name]


Choice = dict[str, Bits]
"""Bits by group."""


class _Search:
    """All that is measured, and the order in which blocks get more bits."""

    def __init__(
        self,
        build: Callable[[], nn.Module],
        scheme: QuantScheme,
        samples: Sequence[Tensors],
        judges: Sequence[Tensors],
        notes: _Notes,
        work: Path,
        progress: Progress,
    ) -> None:
        self._build, self._scheme, self._samples, self._judges = build, scheme, samples, judges
        self._notes, self._work, self._progress = notes, work, progress
        network = build()
        self._prices = bit_operations(network, judges[0])
        self.sources = input_sources(network, judges[0])
        # What a rule of the recipe has decided is decided.
        free = [
            path for path in self.sources if not any(fnmatchcase(path, rule.modules) for rule in scheme.rules)
        ]
        priced = [path for path in free if path in self._prices]
        if not priced:
            raise UsageError("the recipe's rules decide over every block", next_step="remove some")
        groups = group_blocks(self.sources, priced)
        self._group = {path: groups[path] for path in free}
        self._groups = list(dict.fromkeys(groups[path] for path in priced))
        self._unit = sum(price(UNIT) for price in self._prices.values())

    @cached_property
    def _mixture(self) -> Mixture:
        palettes = {}
        for bits in CANDIDATES:
            self._progress.say(f"calibrating {_name(bits)}")
            rule = QuantRule("*", weights=bits[0], activations=bits[1])  # type: ignore[arg-type]
            mixed = self._quantise((rule,), f"{_name(bits)}.pt", apart=True)
            palettes[bits] = palette_of(mixed)
        return Mixture(mixed, palettes, self.sources)

    @cached_property
    def _exact(self) -> npt.NDArray[Any]:
        return self._mixture.run(lambda _: _IN_FLOAT, self._judges[0])

    def price(self, choice: Choice) -> float:
        """Bit operations relative to `UNIT` throughout."""
        return sum(price(self.bits_of(choice, path)) for path, price in self._prices.items()) / self._unit

    def rules(self, choice: Choice) -> Iterator[QuantRule]:
        """Yield what makes `choice` of the scheme: a rule for each block that differs from it."""
        blocks = defaultdict(list)
        for path, group in self._group.items():
            if choice[group] != (self._scheme.weights, self._scheme.activations):
                blocks[block_of(path), choice[group]].append(path)
        for (block, (weights, activations)), paths in blocks.items():
            pattern = block if paths == [block] else f"{block}.*"
            yield QuantRule(pattern, weights, activations, "unet")  # type: ignore[arg-type]

    def reach(self, target: float) -> tuple[Choice, list[Step], float]:
        """Give blocks more bits until the UNet, calibrated anew, is within `target` dB."""
        noise = self._measure_blocks()
        steps: list[Step] = []
        goal, checked = target, list[float]()
        self._progress.begin("search")
        for choice, step in self._steps(noise, None):
            steps.append(step)
            if (measured := _plain(step.measured_db)) >= goal:
                checked.append(self._check(choice))
                if checked[-1] >= target:
                    self._progress.end()
                    return choice, steps, checked[-1]
                goal = measured + (target - checked[-1])
        best = max(checked or [_plain(step.measured_db) for step in steps])
        raise ParityError(
            f"{target:g} dB is out of reach: the best choice of bits has {best:.1f} dB",
            next_step="ask for less, or calibrate with more pictures",
        )

    def best(self, budget: float) -> tuple[Choice, list[Step], float]:
        """Give blocks more bits as long as the price is at most `budget`; return the best of all steps."""
        cheapest = self.price(dict.fromkeys(self._groups, CANDIDATES[0]))
        if cheapest > budget:
            raise ParityError(
                f"a budget of {budget:g} is too small: 8 bits throughout cost {cheapest:.3f}",
                next_step="allow more",
            )
        noise = self._measure_blocks()
        self._progress.begin("search")
        found = list(self._steps(noise, budget))
        choice, _ = max(found, key=lambda item: _plain(item[1].measured_db))
        reached = self._check(choice)
        self._progress.end()
        return choice, [step for _, step in found], reached

    def _steps(
        self, noise: Mapping[tuple[str, Bits], float], budget: float | None
    ) -> Iterator[tuple[Choice, Step]]:
        """Yield all blocks at 8 bits, and then one block after the other with more, as far as it helps."""
        choice: Choice = dict.fromkeys(self._groups, CANDIDATES[0])
        changed, bits = "", CANDIDATES[0]
        while True:
            price = self.price(choice)
            predicted = sum(noise[group, chosen] for group, chosen in choice.items())
            measured = self._noise(f"mixed {_say(choice)}", partial(self.bits_of, dict(choice)))
            yield dict(choice), Step(changed, *bits, price, _decibels(predicted), _decibels(measured))
            options = {}
            for group, chosen in choice.items():
                for more in CANDIDATES[CANDIDATES.index(chosen) + 1 :]:
                    gain, extra = noise[group, chosen] - noise[group, more], self._extra(group, chosen, more)
                    if gain > 0 and (budget is None or price + extra <= budget):
                        options[group, more] = gain / extra
            if not options:
                return
            changed, bits = max(options, key=options.__getitem__)
            choice[changed] = bits

    def _extra(self, group: str, before: Bits, after: Bits) -> float:
        paths = [path for path in self._prices if self._group.get(path) == group]
        return sum(self._prices[path](after) - self._prices[path](before) for path in paths) / self._unit

    def _measure_blocks(self) -> dict[tuple[str, Bits], float]:
        """Return the noise power of each group alone, over the power of the signal, for every candidate."""
        self._progress.begin("measure blocks")
        noise = {}
        for number, group in enumerate(self._groups, start=1):
            for bits in CANDIDATES:

                def alone(path: str, group: str = group, bits: Bits = bits) -> Bits:
                    return bits if self._group.get(path) == group else _IN_FLOAT

                noise[group, bits] = self._noise(f"{group} alone {_name(bits)}", alone)
            self._progress.advance(number / len(self._groups))
        self._progress.end()
        return noise

    def _noise(self, name: str, bits: Callable[[str], Bits]) -> float:
        def measure() -> float:
            return 10 ** (-sqnr_db(self._exact, self._mixture.run(bits, self._judges[0])) / 10)

        return self._notes.get(name, measure)

    def _check(self, choice: Choice) -> float:
        """Return the SQNR of the worst judge as an export by these rules would have it."""

        def measure() -> float:
            self._progress.say(
                f"calibrating the choice, at {self.price(choice):.3f} of W8A16's bit operations"
            )
            quantised = self._quantise(tuple(self.rules(choice)), "chosen.pt")
            pairs = ((quantised.run_float(judge), quantised.run(judge)) for judge in self._judges)
            return min(sqnr_db(exact, given) for exact, given in pairs)

        return self._notes.get(f"calibrated anew {_say(choice)}", measure)

    def _quantise(self, rules: tuple[QuantRule, ...], state: str, *, apart: bool = False) -> Quantised:
        scheme = dataclasses.replace(self._scheme, rules=(*self._scheme.rules, *rules))
        return quantise(self._build(), self._samples, scheme, state=self._work / state, apart=apart)

    def bits_of(self, choice: Choice, path: str) -> Bits:
        group = self._group.get(path)
        return bits_of(self._scheme, path) if group is None else choice[group]


def _unet_inputs(checkpoint: Checkpoint, jobs: Sequence[ClipJob]) -> list[Tensors]:
    """Run what stands before the UNet, as it was trained, and return what the UNet gets for each job."""
    before: tuple[ComponentName, ...] = ("image_encoder", "vae_encoder")
    for name in before:
        inputs, (output,) = component_tensors(name, checkpoint.spec)
        network = deploy_contract(checkpoint.load(name))
        for job in jobs:
            job.outputs[name] = reference(network, output.name, job.gather(inputs))[output.name]
    inputs, _ = component_tensors("unet", checkpoint.spec)
    return [job.gather(inputs) for job in jobs]


def _name(bits: Bits) -> str:
    return f"w{bits[0]}a{bits[1]}"


def _say(choice: Choice) -> str:
    return digest({group: _name(bits) for group, bits in choice.items()})[:16]


def _decibels(noise: float) -> float | None:
    return -10 * math.log10(noise) if noise else None


def _plain(decibels: float | None) -> float:
    return math.inf if decibels is None else decibels
