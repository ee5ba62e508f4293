"""Models of the Hugging Face Hub: by id, downloaded with a filter, or in its cache on this disk.

An id is org/name, org/name@revision, or org/name/path/file.safetensors. The cache keeps a repository as
models--org--name/snapshots/<commit>/ with links into models--org--name/blobs/.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mobilevd_deploy.errors import CheckpointError

_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)((?:/[\w-][\w.-]*)+)?(?:@([\w./-]+))?")
_ENDINGS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".toml")
_PARTS = ("unet", "vae", "image_encoder", "feature_extractor")
_WEIGHTS = re.compile(r"\.(safetensors|bin)(\.index.*\.json)?$")


@dataclass(frozen=True)
class HubId:
    """A repository, a file in it (or "" for all that a checkpoint needs), and a revision."""

    repository: str
    file: str = ""
    revision: str | None = None


def parse_hub_id(text: str) -> HubId | None:
    """Read an id; None for anything that is rather a path. The caller has looked for the path first."""
    match = _ID.fullmatch(text)
    if match is None:
        return None
    repository, file = match[1], (match[2] or "").removeprefix("/")
    looks_local = (
        repository.endswith(_ENDINGS) or Path(text).parts[0] in (".", "..") or Path(text).parent.exists()
    )
    if looks_local or (file and not file.endswith(_ENDINGS)):
        return None
    return HubId(repository, file, match[3])


def download(wanted: HubId, notice: Callable[[str], None]) -> Path:
    """Return the folder or file of a repository, downloading what a checkpoint needs and the cache lacks.

    Raises CheckpointError: it cannot be downloaded and is not in the cache.
    """
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import OfflineModeIsEnabled

    name, revision = wanted.repository, wanted.revision
    try:
        if wanted.file:
            return Path(hf_hub_download(name, wanted.file, revision=revision))
        try:
            files = HfApi().list_repo_files(name, revision=revision)
        except OfflineModeIsEnabled:
            folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
        else:
            chosen = choose_files(files, name)
            notice(f"{name}: downloads {len(chosen)} of {len(files)} files, where the cache lacks them")
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=chosen))
            if len(chosen) == 1:
                return folder / chosen[0]
        return _single_file(folder)
    except CheckpointError:
        raise
    except Exception as error:  # the client passes on errors of its HTTP library
        if (cached := _cached(wanted)) is not None:
            notice(f"{name}: the Hub cannot be reached, so the cached copy is read")
            return cached
        raise CheckpointError(
            f"{name}: no such file or folder, and it cannot be downloaded from the Hugging Face Hub: "
            f"{_first_line(error)}",
            next_step=f"where there is network: hf download {name} "
            + (wanted.file or " ".join(f"--include '{part}/*'" for part in _PARTS))
            + " --local-dir FOLDER; copy FOLDER here and give its path",
        ) from error


def choose_files(files: Sequence[str], repository: str) -> list[str]:
    """Choose the files of a repository to download: its diffusers folder, else its only checkpoint.

    Weights of one kind are chosen: full precision before fp16, .safetensors before .bin.
    Raises CheckpointError.
    """
    parts = [file for file in files if file.split("/")[0] in _PARTS and file.count("/") == 1]
    if any(file.startswith("unet/") for file in parts):
        chosen = [file for file in parts if file.endswith(".json") and not _WEIGHTS.search(file)]
        for part in _PARTS:
            weights = [f for f in parts if f.startswith(f"{part}/") and _WEIGHTS.search(f)]
            for kind in ("safetensors", "bin"):
                same = [file for file in weights if f".{kind}" in file]
                plain = [file for file in same if not _variant(file)]
                half = [file for file in same if _variant(file) == "fp16"]
                if picked := plain or half or same:
                    chosen += picked
                    break
        return chosen
    single = [file for file in files if file.endswith((".safetensors", ".ckpt", ".pt"))]
    if len(single) == 1:
        return single
    raise CheckpointError(
        f"{repository}: no diffusers folder, and {len(single)} files of weights"
        + (f": {', '.join(single[:5])}" if single else ""),
        next_step=f"name one of them: {repository}/{single[0]}" if single else "choose another repository",
    )


def _variant(file: str) -> str:
    """Return fp16 for model.fp16.safetensors, model.fp16-00001-of-00002.safetensors, *.index.fp16.json."""
    name = re.sub(r"-\d+-of-\d+", "", file.split("/")[-1])
    name = re.sub(r"\.(safetensors|bin|index|json)(?=\.|$)", "", name)
    return name.partition(".")[2]


def _cached(wanted: HubId) -> Path | None:
    from huggingface_hub import constants

    root = Path(constants.HF_HUB_CACHE) / f"models--{wanted.repository.replace('/', '--')}"
    if not root.is_dir():
        return None
    folder = resolve_cache_folder(root, wanted.revision)
    return folder / wanted.file if wanted.file else _single_file(folder)


def _single_file(folder: Path) -> Path:
    files = [file for file in folder.glob("*") if file.suffix in (".safetensors", ".ckpt", ".pt")]
    return files[0] if len(files) == 1 and not (folder / "unet").is_dir() else folder


def resolve_cache_folder(path: Path, revision: str | None = None) -> Path:
    """Return the snapshot inside a repository's folder of the cache; any other folder is returned as it is.

    Raises CheckpointError: no snapshot, or several and none is the named revision or main.
    """
    snapshots = path / "snapshots"
    if not snapshots.is_dir():
        return path
    reference = path / "refs" / (revision or "main")
    commit = reference.read_text().strip() if reference.is_file() else revision
    there = sorted(folder for folder in snapshots.iterdir() if folder.is_dir())
    found = [folder for folder in there if commit and folder.name.startswith(commit)]
    if not found and len(there) == 1 and revision is None:
        found = there
    if len(found) != 1:
        raise CheckpointError(
            f"{path}: {len(there)} snapshots, none of revision {revision or 'main'}",
            next_step=f"give one of them: {there[0]}" if there else "download the model again",
        )
    return found[0]


def model_name(path: Path) -> str:
    """Name a model after its file or folder; a snapshot of the cache after its repository."""
    path = path.resolve() if path.exists() and not path.is_symlink() else path.absolute()
    for parent in path.parents:
        if parent.name.startswith("models--") and "snapshots" in path.parts:
            return parent.name.split("--")[-1]
    return path.stem if path.is_file() else path.name


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
