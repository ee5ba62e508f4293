"""Search bit widths for each block of the UNet: the cheapest for a target SQNR, or the best for a budget.

    tune            checkpoint, recipe and a goal -> Tuned: the recipe with its rules, and the search's steps
    Mixture         one simulation whose modules take their quantisers from several calibrated simulations
    bit_operations  the cost of a choice of bits

All blocks start with 8-bit weights and activations. The noise of each block alone is measured once per
candidate, and noise powers are assumed to add up. Each step gives more bits to the block with the largest
predicted reduction of noise per cost, and simulates the whole choice. The final choice is calibrated again,
as an export would do it.
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
from mobilevd_deploy.model.lora import Lora
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
"""Costs are relative to a UNet whose blocks all have these bits."""

CANDIDATES: tuple[Bits, ...] = ((8, 8), UNIT, (16, 16))
"""Choices for a block, cheapest first. 16-bit weights with 8-bit activations would cost as much as `UNIT`."""

_IN_FLOAT: Bits = (FLOAT, FLOAT)
_MEASURED = "measured.json"


@dataclass(frozen=True)
class Step:
    """One simulated choice of bits: the block that changed, its new bits, and the choice's cost and SQNR.

    `block` is empty for the first step, in which all blocks have 8 bits. `bit_operations`: cost relative to
    `UNIT`. `predicted_db`, `measured_db`: SQNR of the UNet's output on the first judging picture, by the sum
    of noise powers and by simulation; None: identical outputs.
    """

    block: str
    weights: int
    activations: int
    bit_operations: float
    predicted_db: float | None
    measured_db: float | None


@dataclass(frozen=True)
class Tuned:
    """Result of a search; `recipe` holds the rules.

    `bit_operations`: cost relative to 8-bit weights and 16-bit activations in all blocks. `sqnr_db`: SQNR of
    the UNet on the worst judging picture, after calibration with the rules. `bits`: block -> bits.
    """

    recipe: Recipe
    bit_operations: float
    sqnr_db: float
    bits: dict[str, Bits]
    steps: tuple[Step, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that JSON can hold."""
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
    base: str | Path | None = None,
    loras: Sequence[Lora] = (),
) -> Tuned:
    """Search bit widths, and write a recipe with one rule per block whose bits differ from the scheme's.

    Measurements are stored in the folder <output>.work: an interrupted search resumes, and a search with
    another goal reuses them.

    Args:
        checkpoint_path: as for `deploy`.
        recipe: must quantise. Its own rules are kept and stay in front of the new ones.
        output: the recipe file to write, NAME.toml.
        progress: receives the stages.
        target_sqnr: goal in dB; the search takes the cheapest choice that it finds. Excludes `budget`.
        budget: limit of the bit operations relative to W8A16; the search takes the best choice that it finds.
        calibration: pictures or clips, as for `deploy`.
        base, loras: as for `open_checkpoint`.

    Raises:
        UsageError: the recipe quantises nothing, there is no goal or two, or `output` is not a TOML file.
        ParityError: the goal cannot be reached; the error gives the best SQNR, or the lowest cost.
        CheckpointError, RewriteError, ExportError: as for `deploy`.
    """
    progress = progress or Progress()
    if recipe.quant is None:
        raise UsageError(f"recipe {recipe.name} quantises nothing", next_step="choose a recipe with [quant]")
    if (target_sqnr is None) == (budget is None):
        raise UsageError("exactly one goal is needed", next_step="give either --target-sqnr or --budget")
    if output.suffix != ".toml":
        raise UsageError(f"{output} is not a TOML file", next_step="choose a name such as my.toml")
    checkpoint = open_checkpoint(checkpoint_path, base=base, loras=loras, notice=progress.say)
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
        _Measurements(work / _MEASURED, key),
        work,
        progress,
    )
    if target_sqnr is not None:
        choice, steps, reached = search.reach(target_sqnr)
    else:
        assert budget is not None  # checked above
        choice, steps, reached = search.best(budget)
    cost = search.cost(choice)
    scheme = dataclasses.replace(recipe.quant, rules=(*recipe.quant.rules, *search.rules(choice)))
    floors = recipe.floors
    # The export measures the SQNR again, and another machine may round differently: allow 1 dB.
    if reached < floors.quantised_sqnr_db + 1:
        floors = dataclasses.replace(floors, quantised_sqnr_db=float(math.floor(reached - 1)))
    found = dataclasses.replace(
        recipe,
        name=output.stem,
        description=f"{recipe.description}; bits of the UNet's blocks by `tune`: {reached:.1f} dB SQNR at "
        f"{cost:.2f} of W8A16's bit operations",
        quant=scheme,
        floors=floors,
    )
    use = f"mobilevd-deploy export CHECKPOINT --recipe {output.name}"
    write_durably(output, f"# Written by mobilevd-deploy tune. To use it: {use}\n\n{to_toml(found)}")
    return Tuned(found, cost, reached, choice, tuple(steps))


class Mixture:
    """One simulation whose modules take their quantisers from several simulations, one per choice of bits.

    `quantised` is the simulation that runs. `palettes`: bits -> the quantisers of a simulation that was
    calibrated with `apart`. `sources`: leaf module -> the modules that its inputs come from.
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
        """Return the output if each module has the bits that `bits` returns for its path; (32, 32) is float.

        An input with other bits is converted to the module's bits, as `quantise` does it.
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
        # Bits without a palette come from a rule of the recipe, which all palettes contain.
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
            source = self.sources[source][0]  # a module without quantiser only moves values
        return None


Slots = tuple[dict[Any, Any], dict[Any, Any], dict[Any, Any]]
"""Quantisers of a module's inputs, outputs and parameters, by position or name."""

Palette = Mapping[str, Slots]
"""Quantisers of all modules of a simulation, by module path."""


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
    """Return, by path, the cost function of each convolution, linear layer and matrix product.

    Cost = multiply-accumulates x bits of one factor x bits of the other, counted in a run on `inputs`. Both
    factors of a matrix product are activations.
    """
    counts = count_flops_by_module(network, network, *as_arguments(inputs))["honest"]

    def cost(macs: int, of_activations: bool, bits: Bits) -> int:
        weights, activations = bits
        return macs * activations * (activations if of_activations else weights)

    return {
        path: partial(cost, counts[path] // 2, isinstance(module, ops.MatMul))
        for path, module in network.named_modules()
        if counts.get(path) and not [*module.children()]
    }


def group_blocks(sources: Mapping[str, Sequence[str | None]], products: Sequence[str]) -> dict[str, str]:
    """Return for each leaf module the block whose bits it gets.

    It is the module's own block (`block_of`) if that contains one of `products`, the modules that multiply.
    Otherwise it is the block that reads the module; after the last product, it is that product's block.
    `sources` is in running order.
    """
    own = {block_of(path) for path in products}
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


class _Measurements:
    """Numbers by name in a JSON file. Each new number rewrites the file; another key discards it."""

    def __init__(self, path: Path, key: str) -> None:
        self._path, self._key = path, key
        try:
            stored = json.loads(path.read_bytes())
            self._values: dict[str, float] = dict(stored["values"]) if stored["key"] == key else {}
        except (OSError, ValueError, KeyError, TypeError):
            self._values = {}

    def get(self, name: str, measure: Callable[[], float]) -> float:
        """Return the stored number, or measure and store it."""
        if name not in self._values:
            self._values[name] = measure()
            write_durably(self._path, json.dumps({"key": self._key, "values": self._values}, indent=1))
        return self._values[name]


Choice = dict[str, Bits]
"""Block -> bits."""


class _Search:
    """The measurements, and the order in which blocks get more bits."""

    def __init__(
        self,
        build: Callable[[], nn.Module],
        scheme: QuantScheme,
        samples: Sequence[Tensors],
        judges: Sequence[Tensors],
        measurements: _Measurements,
        work: Path,
        progress: Progress,
    ) -> None:
        self._build, self._scheme, self._samples, self._judges = build, scheme, samples, judges
        self._measurements, self._work, self._progress = measurements, work, progress
        network = build()
        self._costs = bit_operations(network, judges[0])
        self.sources = input_sources(network, judges[0])
        # The recipe's own rules are kept: the search leaves the modules that they match alone.
        free = [
            path for path in self.sources if not any(fnmatchcase(path, rule.modules) for rule in scheme.rules)
        ]
        products = [path for path in free if path in self._costs]
        if not products:
            raise UsageError("the recipe's rules match every block", next_step="remove some of its rules")
        groups = group_blocks(self.sources, products)
        self._group = {path: groups[path] for path in free}
        self._groups = list(dict.fromkeys(groups[path] for path in products))
        self._unit = sum(cost(UNIT) for cost in self._costs.values())

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
    def _float_output(self) -> npt.NDArray[Any]:
        return self._mixture.run(lambda _: _IN_FLOAT, self._judges[0])

    def cost(self, choice: Choice) -> float:
        """Bit operations relative to `UNIT` throughout."""
        return sum(cost(self.bits_of(choice, path)) for path, cost in self._costs.items()) / self._unit

    def rules(self, choice: Choice) -> Iterator[QuantRule]:
        """Yield a rule for each block whose bits differ from the scheme's."""
        blocks = defaultdict(list)
        for path, group in self._group.items():
            if choice[group] != (self._scheme.weights, self._scheme.activations):
                blocks[block_of(path), choice[group]].append(path)
        for (block, (weights, activations)), paths in blocks.items():
            pattern = block if paths == [block] else f"{block}.*"
            yield QuantRule(pattern, weights, activations, "unet")  # type: ignore[arg-type]

    def reach(self, target: float) -> tuple[Choice, list[Step], float]:
        """Give blocks more bits until the UNet, calibrated with the rules, has `target` dB SQNR."""
        noise = self._measure_blocks()
        steps: list[Step] = []
        goal, checked = target, list[float]()
        self._progress.begin("search")
        for choice, step in self._steps(noise, None):
            steps.append(step)
            if (measured := _or_inf(step.measured_db)) >= goal:
                checked.append(self._check(choice))
                if checked[-1] >= target:
                    self._progress.end()
                    return choice, steps, checked[-1]
                goal = measured + (target - checked[-1])
        best = max(checked or [_or_inf(step.measured_db) for step in steps])
        raise ParityError(
            f"{target:g} dB cannot be reached: the best choice of bits has {best:.1f} dB",
            next_step="choose a lower target, or calibrate with more pictures",
        )

    def best(self, budget: float) -> tuple[Choice, list[Step], float]:
        """Give blocks more bits while the cost is at most `budget`; return the best choice of all steps."""
        cheapest = self.cost(dict.fromkeys(self._groups, CANDIDATES[0]))
        if cheapest > budget:
            raise ParityError(
                f"a budget of {budget:g} is too small: 8 bits in all blocks cost {cheapest:.3f}",
                next_step=f"choose a budget of at least {math.ceil(1000 * cheapest) / 1000:g}",
            )
        noise = self._measure_blocks()
        self._progress.begin("search")
        found = list(self._steps(noise, budget))
        choice, _ = max(found, key=lambda item: _or_inf(item[1].measured_db))
        reached = self._check(choice)
        self._progress.end()
        return choice, [step for _, step in found], reached

    def _steps(
        self, noise: Mapping[tuple[str, Bits], float], budget: float | None
    ) -> Iterator[tuple[Choice, Step]]:
        """Yield 8 bits in all blocks, then choices in which one block at a time gets more bits."""
        choice: Choice = dict.fromkeys(self._groups, CANDIDATES[0])
        changed, bits = "", CANDIDATES[0]
        while True:
            cost = self.cost(choice)
            predicted = sum(noise[group, chosen] for group, chosen in choice.items())
            measured = self._noise(f"mixed {_digest(choice)}", partial(self.bits_of, dict(choice)))
            yield dict(choice), Step(changed, *bits, cost, _decibels(predicted), _decibels(measured))
            options = {}
            for group, chosen in choice.items():
                for more in CANDIDATES[CANDIDATES.index(chosen) + 1 :]:
                    gain, extra = noise[group, chosen] - noise[group, more], self._extra(group, chosen, more)
                    if gain > 0 and (budget is None or cost + extra <= budget):
                        options[group, more] = gain / extra
            if not options:
                return
            changed, bits = max(options, key=options.__getitem__)
            choice[changed] = bits

    def _extra(self, group: str, before: Bits, after: Bits) -> float:
        paths = [path for path in self._costs if self._group.get(path) == group]
        return sum(self._costs[path](after) - self._costs[path](before) for path in paths) / self._unit

    def _measure_blocks(self) -> dict[tuple[str, Bits], float]:
        """Return noise power / signal power for each block and candidate, with all other blocks in float."""
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
            return 10 ** (-sqnr_db(self._float_output, self._mixture.run(bits, self._judges[0])) / 10)

        return self._measurements.get(name, measure)

    def _check(self, choice: Choice) -> float:
        """Return the SQNR of the worst judging picture, calibrated as an export with these rules would."""

        def measure() -> float:
            self._progress.say(
                f"calibrating the choice with {self.cost(choice):.3f} of W8A16's bit operations"
            )
            quantised = self._quantise(tuple(self.rules(choice)), "chosen.pt")
            return min(sqnr_db(quantised.run_float(judge), quantised.run(judge)) for judge in self._judges)

        return self._measurements.get(f"calibrated {_digest(choice)}", measure)

    def _quantise(self, rules: tuple[QuantRule, ...], state: str, *, apart: bool = False) -> Quantised:
        scheme = dataclasses.replace(self._scheme, rules=(*self._scheme.rules, *rules))
        return quantise(self._build(), self._samples, scheme, state=self._work / state, apart=apart)

    def bits_of(self, choice: Choice, path: str) -> Bits:
        group = self._group.get(path)
        return bits_of(self._scheme, path) if group is None else choice[group]


def _unet_inputs(checkpoint: Checkpoint, jobs: Sequence[ClipJob]) -> list[Tensors]:
    """Run the components before the UNet in training form; return the UNet's inputs for each job."""
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


def _digest(choice: Choice) -> str:
    return digest({group: _name(bits) for group, bits in choice.items()})[:16]


def _decibels(noise: float) -> float | None:
    return -10 * math.log10(noise) if noise else None


def _or_inf(decibels: float | None) -> float:
    return math.inf if decibels is None else decibels
