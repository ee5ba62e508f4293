"""generate(): a picture becomes a clip, by an exported artifact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mobilevd_deploy.artifact.artifact import Artifact
from mobilevd_deploy.base.places import (
    require_distinct,
    require_file_place,
    require_folder_place,
    require_scratch,
)
from mobilevd_deploy.base.progress import Progress
from mobilevd_deploy.base.tensors import Array
from mobilevd_deploy.runtime.media import (
    check_clip_path,
    check_frames_folder,
    check_sheet_path,
    enlarge,
    read_picture,
    write_clip,
    write_clip_sheet,
    write_frames,
)
from mobilevd_deploy.runtime.pipeline import Pipeline


@dataclass(frozen=True)
class Clip:
    """A generated clip.

    Attributes:
        frames: float32 (T, 3, H, W), nominally in [-1, 1], not clamped.
        fps: frames per second.
        seed: of the noise.
        picture: how the picture was fitted, as a sentence.
        artifact: that generated it.
        written: the files, in the order of writing.
    """

    frames: Array
    fps: int
    seed: int
    picture: str
    artifact: Artifact
    written: tuple[Path, ...] = ()


def generate(
    artifact: Artifact | str | Path,
    picture: str | Path,
    *,
    seed: int = 0,
    provider: str | Sequence[str] = "CPUExecutionProvider",
    scale: int = 1,
    output: str | Path | None = None,
    frames_dir: str | Path | None = None,
    sheet: str | Path | None = None,
    progress: Progress | None = None,
) -> Clip:
    """Generate the clip of one picture, and write it to the files that are named.

    Args:
        artifact: an exported artifact, or its folder.
        picture: an image file of any size, or a clip, whose first frame is used.
        seed: of the noise, from 0 to 2^64 - 1; the same seed gives the same clip on every machine.
        provider: onnxruntime execution providers, best first; or "npu-sim" (context binaries on the HTP
            simulator), or "quantised" (quantised graphs on the CPU).
        scale: whole factor that enlarges the frames.
        output: clip to write: .gif, .mp4, or all frames side by side as .png.
        frames_dir: new or empty folder for one PNG file per frame.
        sheet: PNG file of the picture above the frames.
        progress: receives the components as they begin and end.

    All places are checked before the first component runs.

    Raises:
        UsageError: a place that cannot be written, an output that is the picture or another output, a seed or
            provider that does not exist.
        MediaError: the picture cannot be read, or a file cannot be written.
        ArtifactError, ResourceError, VendorError: as `Pipeline.generate`.
    """
    progress, source = progress or Progress(), Path(picture)
    opened = artifact if isinstance(artifact, Artifact) else Artifact.open(artifact)
    spec = opened.manifest.pipeline
    raw_bytes = spec.frames * 3 * spec.height * spec.width * scale**2
    files = [Path(path) for path in (output, sheet) if path is not None]
    folder = None if frames_dir is None else Path(frames_dir)
    if output is not None:
        check_clip_path(Path(output))
    if sheet is not None:
        check_sheet_path(Path(sheet))
    require_distinct([*files, *([folder] if folder else [])], [source, opened.root])
    for path in files:
        require_file_place(path, raw_bytes)
    if folder is not None:
        check_frames_folder(folder)
        require_folder_place(folder, raw_bytes)
    providers = (provider,) if isinstance(provider, str) else tuple(provider)
    if "npu-sim" in providers:
        require_scratch()
    fitted = read_picture(source, spec.width, spec.height)
    progress.say(fitted.done)
    pipeline = Pipeline.open(opened, providers)
    frames = enlarge(pipeline.generate(fitted.pixels, seed, progress), scale)
    written: list[Path] = []
    if output is not None:
        write_clip(frames, output, spec.fps)
        written.append(Path(output))
    if folder is not None:
        written += write_frames(frames, folder)
    if sheet is not None:
        title = f"{Path(output).name}, seed {seed}" if output is not None else f"seed {seed}"
        write_clip_sheet(enlarge(fitted.pixels, scale), frames, title, sheet)
        written.append(Path(sheet))
    return Clip(frames, spec.fps, seed, fitted.done, opened, tuple(written))
