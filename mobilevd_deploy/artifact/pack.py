"""An artifact as one file, NAME.mvd, to be sent to a phone by whatever carries files.

It is a zip: manifest.json first, then manifest.sha256, then the files of the manifest under their own paths.
Stored, not compressed, because weights hardly shrink; entries carry a fixed time, so that equal artifacts
give equal files. Nothing else is in it: whoever unpacks it has an artifact.
"""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

from mobilevd_deploy.artifact.artifact import Artifact
from mobilevd_deploy.artifact.manifest import MANIFEST, MANIFEST_DIGEST
from mobilevd_deploy.base.files import written_aside
from mobilevd_deploy.base.progress import Progress
from mobilevd_deploy.errors import UsageError

SUFFIX = ".mvd"
# The zip format's own zero.
_TIME = (1980, 1, 1, 0, 0, 0)


def pack(artifact: Artifact, output: str | Path, progress: Progress | None = None) -> Path:
    """Write an artifact into one file `output`, aside and renamed; one that is there is replaced.

    Raises ArtifactError for a damaged artifact, UsageError for a name without .mvd, one inside of the
    artifact, or a place that cannot be written, ResourceError on a full disk.
    """
    progress, output = progress or Progress(), Path(output)
    if output.suffix != SUFFIX or output.is_dir():
        raise UsageError(f"{output} is not a file name that ends in {SUFFIX}", next_step="-o NAME.mvd")
    if output.resolve().is_relative_to(artifact.root.resolve()):
        raise UsageError(f"{output} lies inside of the artifact", next_step="choose a place beside it")
    artifact.verify()
    paths = [MANIFEST, MANIFEST_DIGEST, *(entry.path for entry in artifact.manifest.all_files())]
    progress.begin(f"pack {artifact.bytes / 1e6:,.1f} MB")
    try:
        with written_aside(output, artifact.bytes) as aside, zipfile.ZipFile(aside, "w") as archive:
            for number, path in enumerate(paths, start=1):
                source = artifact.root / path
                info = zipfile.ZipInfo(path, _TIME)
                info.external_attr = 0o644 << 16
                info.file_size = source.stat().st_size  # beyond 2 GiB the header has to say so
                with source.open("rb") as file, archive.open(info, "w") as entry:
                    shutil.copyfileobj(file, entry, 2**20)
                progress.advance(number / len(paths))
    except OSError as error:
        raise UsageError(f"{output} cannot be written: {error}", next_step="choose another -o") from error
    progress.end()
    return output
