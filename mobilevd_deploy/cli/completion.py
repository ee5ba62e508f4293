"""Values for shell completion: presets, recipes, phones, chips and artifacts. Nothing here imports torch.

typer keeps those that begin with the typed letters. If none does, the shell completes paths.
"""

from __future__ import annotations

from pathlib import Path

_DEPTH = 3  # the depth of `find_newest`


def complete_preset() -> list[str]:
    """Return the names of the shipped presets."""
    from mobilevd_deploy.config.presets import preset_names

    return preset_names()


def complete_recipe() -> list[str]:
    """Return the names of the shipped recipes."""
    from mobilevd_deploy.config.recipe import recipe_names

    return recipe_names()


def complete_device() -> list[tuple[str, str]]:
    """Return phones with their chips, and chips with their part numbers.

    Names have hyphens, because bash does not quote spaces; `find` accepts both.
    """
    from mobilevd_deploy.config.devices import table

    named = [(phone.name, phone.chip) for phone in table().phone]
    named += [(chip.name, ", ".join(chip.sm)) for chip in table().chip]
    return [(name.replace(" ", "-"), help_text) for name, help_text in named]


def complete_target() -> list[tuple[str, str]]:
    """Return the first part number of each chip, with the chip's name."""
    from mobilevd_deploy.config.devices import table

    return [(chip.part_number, chip.name) for chip in table().chip]


def complete_artifact() -> list[str]:
    """Return the artifacts below the working directory, none in hidden folders."""
    from mobilevd_deploy.artifact.manifest import MANIFEST

    found = [path.parent for depth in range(_DEPTH + 1) for path in Path().glob("*/" * depth + MANIFEST)]
    return sorted(str(path) for path in found if not any(part.startswith(".") for part in path.parts))


def complete_artifact_or_preset() -> list[str]:
    """Return the names that `profile`, `inspect` and `traffic` take."""
    return [*complete_artifact(), *complete_preset()]
