"""Pack an artifact into one file, NAME.mvd, that any file transfer can carry to a phone.

The file is a zip: manifest.json, then manifest.sha256, then the files of the manifest under their own paths.
Entries are stored uncompressed, because weights hardly compress, and have a fixed time, so that equal
artifacts give equal files. The unpacked zip is the artifact.
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
# The earliest time that a zip entry can have.
_TIME = (1980, 1, 1, 0, 0, 0)


def pack(artifact: Artifact, output: str | Path, progress: Progress | None = None) -> Path:
    """Pack an artifact into the file `output`, by `written_aside`; an existing file is replaced.

    Raises ArtifactError for a damaged artifact, ResourceError on a full disk, and UsageError for a name
    without .mvd, a path inside the artifact, or a path that cannot be written.
    """
    progress, output = progress or Progress(), Path(output)
    if output.suffix != SUFFIX or output.is_dir():
        raise UsageError(f"{output} is not a file name that ends in {SUFFIX}", next_step="use -o NAME.mvd")
    if output.resolve().is_relative_to(artifact.root.resolve()):
        raise UsageError(f"{output} is inside the artifact", next_step="choose a path outside of it")
    artifact.verify()
    paths = [MANIFEST, MANIFEST_DIGEST, *(entry.path for entry in artifact.manifest.all_files())]
    progress.begin(f"pack {artifact.bytes / 1e6:,.1f} MB")
    try:
        with written_aside(output, artifact.bytes) as aside, zipfile.ZipFile(aside, "w") as archive:
            for number, path in enumerate(paths, start=1):
                source = artifact.root / path
                info = zipfile.ZipInfo(path, _TIME)
                info.external_attr = 0o644 << 16
                info.file_size = source.stat().st_size  # above 2 GiB the header needs the zip64 form
                with source.open("rb") as file, archive.open(info, "w") as entry:
                    shutil.copyfileobj(file, entry, 2**20)
                progress.advance(number / len(paths))
    except OSError as error:
        raise UsageError(f"{output} cannot be written: {error}", next_step="choose another -o") from error
    progress.end()
    return output
