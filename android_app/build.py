#!/usr/bin/env python3
"""Builds and tests the Android app without Android SDK or Gradle. Standard library only.

    python3 android_app/build.py apk --artifact build/demo/artifact
    python3 android_app/build.py apk --flavour npu --artifact build/demo/npu --qnn-libs QNN_FOLDER
    python3 android_app/build.py test-core
    python3 android_app/build.py test-app

It needs JDK 17, Maven, npm and the Debian packages `aapt zipalign apksigner`. It fetches everything else on
first use into a cache outside the repository (MOBILEVD_CACHE, default ~/.cache/mobilevd-deploy): versions are
in gradle/libs.versions.toml, hashes in dependencies.toml. Exit codes: 0 done, 1 failed, 2 usage.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

APP = Path(__file__).resolve().parent
ROOT = APP.parent
MAIN = APP / "app" / "src" / "main"
CORE = APP / "core" / "src"
PLUGIN = "libonnxruntime_providers_qnn.so"
# Debian package of each program, for error messages.
PACKAGES = {
    "javac": "openjdk-17-jdk-headless",
    "mvn": "maven",
    "npm": "npm",
    "aapt2": "aapt",
    "zipalign": "zipalign",
    "apksigner": "apksigner",
}
# The earliest time that zip can store, for every entry: builds are reproducible.
EPOCH = (1980, 1, 1, 0, 0, 0)
# From target 30 on Android requires an uncompressed resource table.
STORED = {"resources.arsc"}
# The C2 compiler and parallel GC do not pay for programs this short: a third less CPU time without them.
JVM = ("-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC")
DEBUG_PASSWORD = "android"  # the password of Android's debug keys


class BuildError(Exception):
    """The message says what is wrong, where, and what to do next."""


class NotFetchedError(BuildError):
    """No Maven repository served a file."""


# 1. Requirements and downloads.


def dependencies() -> dict[str, Any]:
    """Read dependencies.toml: hashes, and what only this script needs."""
    return tomllib.loads((APP / "dependencies.toml").read_text(encoding="utf-8"))


def catalogue() -> dict[str, Any]:
    """Read Gradle's version catalogue."""
    return tomllib.loads((APP / "gradle" / "libs.versions.toml").read_text(encoding="utf-8"))


def api_level(name: str) -> int:
    """Return an API level of the catalogue: "targetSdk", "minSdk-cpu" or "minSdk-npu"."""
    return int(catalogue()["versions"][f"android-{name}"])


def cache() -> Path:
    """Return the folder that survives builds. It holds libraries and the debug key."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(os.environ.get("MOBILEVD_CACHE") or Path(base) / "mobilevd-deploy") / "android"
    path.mkdir(parents=True, exist_ok=True)
    return path


def need(*programs: str) -> None:
    """Raise BuildError unless all programs are installed; the message names their packages."""
    if missing := [program for program in programs if shutil.which(program) is None]:
        packages = " ".join(dict.fromkeys(PACKAGES[program] for program in missing))
        raise BuildError(f"not installed: {', '.join(missing)}\n  next: apt-get install {packages}")


def run(
    *command: str | Path,
    cwd: Path | None = None,
    quiet: bool = True,
    env: Mapping[str, str] | None = None,
) -> str:
    """Run a program and return its output; raise BuildError if it fails. Not quiet: print to the terminal."""
    words = [str(word) for word in command]
    result = subprocess.run(
        words,
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE if quiet else None,
        stderr=subprocess.STDOUT if quiet else None,
        env=None if env is None else {**os.environ, **env},
    )
    if result.returncode != 0:
        shown = (result.stdout or "").strip()
        raise BuildError(f"{Path(words[0]).name} ended with {result.returncode}" + f"\n{shown}" * bool(shown))
    return result.stdout or ""


def say(text: str) -> None:
    """Report progress."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def alone(name: str) -> Iterator[None]:
    """Hold the lock NAME of the cache, so that one build at a time writes there."""
    with (cache() / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def sha256(path: Path) -> str:
    """Return a file's SHA-256 in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_hash(path: Path, expected: str, what: str) -> None:
    """Remove the file and raise BuildError unless it has this SHA-256."""
    if (found := sha256(path)) != expected:
        path.unlink()
        raise BuildError(
            f"{what}: SHA-256 is {found}, dependencies.toml says {expected}; the file was removed"
        )


@dataclass(frozen=True)
class Coordinates:
    """A file in a Maven repository."""

    group: str
    artifact: str
    version: str
    type: str

    @classmethod
    def of(cls, name: str) -> Coordinates:
        """Look up a library of the catalogue by its name; "NAME@aar" is its AAR instead of its jar."""
        alias, _, kind = name.partition("@")
        library, versions = catalogue()["libraries"][alias], catalogue()["versions"]
        version = library["version"]
        if isinstance(version, dict):
            version = versions[version["ref"]]
        group, artifact = library["module"].split(":")
        return cls(group, artifact, version, kind or "jar")

    @property
    def file(self) -> str:
        """The file's name."""
        return f"{self.artifact}-{self.version}.{self.type}"


def fetch(name: str) -> list[Path]:
    """Fetch the set `maven.NAME` with Maven, check its hashes, and return its files in order."""
    return _fetch_all(name, dependencies()["maven"][name])


def _fetch_all(what: str, digests: Mapping[str, str]) -> list[Path]:
    wanted = {Coordinates.of(library): digest for library, digest in digests.items()}
    folder = cache() / "maven"
    with alone("maven"):
        missing = {item: digest for item, digest in wanted.items() if not (folder / item.file).exists()}
        if missing:
            say(f"fetching {len(missing)} files ({what}) ...")
            _maven(missing, folder)
    return [folder / item.file for item in wanted]


def _maven(items: Mapping[Coordinates, str], folder: Path) -> None:
    """Copy files from Maven repositories into `folder` after a check of their hashes."""
    need("mvn")
    listed = "".join(
        f"<artifactItem><groupId>{i.group}</groupId><artifactId>{i.artifact}</artifactId>"
        f"<version>{i.version}</version><type>{i.type}</type></artifactItem>"
        for i in items
    )
    # R8 and androidx are in Google's repository, which Maven does not know by default.
    repositories = "".join(
        f"<repository><id>extra{n}</id><url>{url}</url></repository>"
        for n, url in enumerate(os.environ.get("MAVEN_REPOSITORIES", "").split())
    )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache()) as scratch:
        pom = Path(scratch) / "pom.xml"
        pom.write_text(
            '<project xmlns="http://maven.apache.org/POM/4.0.0"><modelVersion>4.0.0</modelVersion>'
            "<groupId>dev.mobilevd</groupId><artifactId>fetch</artifactId><version>1</version>"
            f"<packaging>pom</packaging><repositories>{repositories}</repositories><build><plugins><plugin>"
            "<groupId>org.apache.maven.plugins</groupId><artifactId>maven-dependency-plugin</artifactId>"
            f"<version>3.6.1</version><configuration><artifactItems>{listed}</artifactItems>"
            f"<outputDirectory>{scratch}/out</outputDirectory></configuration></plugin></plugins></build>"
            "</project>",
            encoding="utf-8",
        )
        try:
            run("mvn", "--batch-mode", "--quiet", "--file", pom, "dependency:copy")
        except BuildError as error:
            raise NotFetchedError(
                f"Maven cannot fetch everything of {', '.join(i.file for i in items)}\n{error}\n"
                "  next: list more repositories, such as Google's, in MAVEN_REPOSITORIES"
            ) from error
        for item, digest in items.items():
            path = Path(scratch) / "out" / item.file
            check_hash(path, digest, item.file)
            path.replace(folder / item.file)


def onnxruntime_aar() -> Path:
    """Fetch ONNX Runtime for Android with npm, check its hash, and return the AAR."""
    entry = dependencies()["npm"]["onnxruntime"]
    version = catalogue()["versions"]["onnxruntime"]
    path = cache() / f"onnxruntime-{version}.aar"
    with alone("npm"):
        if not path.exists():
            need("npm")
            say(f"fetching ONNX Runtime {version} for Android (150 MB) ...")
            with tempfile.TemporaryDirectory(dir=cache()) as scratch:
                run("npm", "pack", entry["package"], "--silent", cwd=Path(scratch))
                (package,) = Path(scratch).glob("*.tgz")
                run("tar", "-xzf", package, "-C", scratch, entry["member"])
                member = Path(scratch) / entry["member"]
                check_hash(member, entry["sha256"], entry["package"])
                member.replace(path)
    return path


def derived(name: str, make: Callable[[Path], None]) -> Path:
    """Return a cached file that is derived from fetched ones; `make` writes it on first use."""
    path = cache() / name
    with alone(name):
        if not path.exists():
            partial = path.with_name(f".{name}.partial")
            make(partial)
            partial.replace(path)
    return path


def framework() -> tuple[Path, Path]:
    """Return Android's framework: its resources for aapt2, and its classes for javac and D8."""
    (source,) = [path for path in fetch("build") if path.name.startswith("android-all")]

    def resources(target: Path) -> None:
        with zipfile.ZipFile(source) as jar:
            # aapt2 maps the table into memory, so it must not be compressed.
            names = ("AndroidManifest.xml", "resources.arsc")
            write_zip(target, {name: jar.read(name) for name in names}, stored=True)

    def classes(target: Path) -> None:
        with zipfile.ZipFile(source) as jar:
            # Apps cannot use com/, but javac resolves the annotations there.
            kept = ("android/", "dalvik/", "org/", "javax/", "com/android/internal/annotations/")
            names = [n for n in jar.namelist() if n.endswith(".class") and n.startswith(kept)]
            write_zip(target, {name: jar.read(name) for name in names})

    stem = source.stem
    return derived(f"{stem}-resources.apk", resources), derived(f"{stem}-classes.jar", classes)


def android_onnxruntime_classes() -> Path:
    """Return ONNX Runtime's Java API as a jar, without its telemetry."""
    aar = onnxruntime_aar()

    def classes(target: Path) -> None:
        with zipfile.ZipFile(aar) as outer, zipfile.ZipFile(outer.open("classes.jar")) as jar:
            telemetry = ("ai/onnxruntime/telemetry/", "ai/onnxruntime/TelemetryInitializer")
            names = [n for n in jar.namelist() if n.endswith(".class") and not n.startswith(telemetry)]
            write_zip(target, {name: jar.read(name) for name in names})

    return derived(f"{aar.stem}-classes.jar", classes)


def write_zip(path: Path, entries: Mapping[str, bytes | Path], *, stored: bool = False) -> None:
    """Write a reproducible zip: it depends only on the names, contents and order of the entries."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in entries.items():
            info = zipfile.ZipInfo(name, EPOCH)
            info.create_system, info.external_attr = 3, 0o644 << 16
            plain = stored or name in STORED
            info.compress_type = zipfile.ZIP_STORED if plain else zipfile.ZIP_DEFLATED
            # Level 9 takes 50 % longer and saves 0.1 %.
            archive.writestr(info, value if isinstance(value, bytes) else value.read_bytes(), compresslevel=7)


# 2. Compile.


def version() -> str:
    """Return the version of the whole project."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return str(tomllib.loads(text)["project"]["version"])


def version_code(name: str) -> int:
    """Return Android's version code of a version: 1.2.3 has 10203."""
    major, minor, patch = (int(part) for part in name.split("."))
    return major * 10000 + minor * 100 + patch


def java_files(*folders: Path) -> list[Path]:
    """Return all Java sources below the folders, sorted."""
    return sorted(path for folder in folders for path in folder.rglob("*.java"))


def javac(sources: Iterable[Path], classpath: Iterable[Path], target: Path, *options: str) -> None:
    """Compile Java 17 with all warnings as errors."""
    need("javac")
    target.mkdir(parents=True, exist_ok=True)
    checks = ["-Xlint:all,-processing,-classfile", "-Werror", "-proc:none"]
    command = [*(f"-J{option}" for option in JVM), "-encoding", "UTF-8", "-g:source,lines", *checks]
    joined = os.pathsep.join(str(path) for path in classpath)
    run("javac", *command, *options, "-cp", joined or ".", "-d", target, *sources)


def link_resources(target: Path, flavour: str, version_name: str, java: Path) -> None:
    """Compile resources and manifest into an APK without code; write R.java below `java`."""
    need("aapt2")
    resources, _ = framework()
    compiled = target.with_suffix(".zip")
    run("aapt2", "compile", "--dir", MAIN / "res", "-o", compiled)
    manifest = complete_manifest(flavour, target.with_name("AndroidManifest.xml"))
    run(
        "aapt2", "link", "-o", target, "-I", resources, "--manifest", manifest, "--java", java,
        "--version-name", version_name, "--version-code", str(version_code(version())),
        # Debian's aapt2 does not know <uses-native-library>.
        "--warn-manifest-validation",
        compiled,
    )  # fmt: skip


def complete_manifest(flavour: str, target: Path) -> Path:
    """Write the manifest with package and API levels, which Gradle would add from its script."""
    levels = (
        f'android:minSdkVersion="{api_level(f"minSdk-{flavour}")}" '
        f'android:targetSdkVersion="{api_level("targetSdk")}"'
    )
    text = (MAIN / "AndroidManifest.xml").read_text(encoding="utf-8")
    text = text.replace("<manifest ", f'<manifest package="{dependencies()["app"]["package"]}" ', 1)
    target.write_text(text.replace("<application", f"<uses-sdk {levels} /><application", 1), encoding="utf-8")
    return target


def compile_app(work: Path, flavour: str, version_name: str) -> tuple[Path, Path]:
    """Compile resources and Java; return the APK with resources, and the folder of classes."""
    base, java, classes = work / "base.apk", work / "java", work / "classes"
    java.mkdir(parents=True)
    link_resources(base, flavour, version_name, java)
    _, android = framework()
    sources = java_files(CORE / "main", MAIN / "java", java)
    libraries = [*fetch("app"), android_onnxruntime_classes()]
    javac(sources, [*libraries, android], classes, "--release", "17")
    return base, classes


def dex(classes: Path, target: Path) -> None:
    """Compile the app's and ONNX Runtime's classes into `target`/classes.dex.

    All flavours use the lowest of their API levels, so they have the same dex and one check covers it.
    """
    (d8,) = [path for path in fetch("build") if path.name.startswith("r8-")]
    _, android = framework()
    level = min(api_level("minSdk-cpu"), api_level("minSdk-npu"))
    java_home = Path(shutil.which("javac") or "").resolve().parent.parent
    run(
        "java", *JVM, "-cp", d8, "com.android.tools.r8.D8", "--release", "--min-api", str(level),
        "--lib", android, "--lib", java_home, "--output", target,
        *sorted(classes.rglob("*.class")), *fetch("app"), android_onnxruntime_classes(),
    )  # fmt: skip


# 3. Package.


def native_libraries(flavour: str, qnn: Mapping[str, bytes | Path]) -> dict[str, bytes | Path]:
    """Return a flavour's native libraries by their names in the APK."""
    libraries: dict[str, bytes | Path] = {}
    abis = dependencies()["app"]["abis"][flavour]
    with zipfile.ZipFile(onnxruntime_aar()) as aar:
        for abi in abis:
            for name in ("libonnxruntime.so", "libonnxruntime4j_jni.so"):
                libraries[f"lib/{abi}/{name}"] = aar.read(f"jni/{abi}/{name}")
    libraries.update({f"lib/arm64-v8a/{name}": value for name, value in qnn.items()})
    for name, value in libraries.items():
        check_pages(name, value if isinstance(value, bytes) else value.read_bytes())
    return libraries


PAGE = 16384  # bytes of a memory page on newer phones
AARCH64, X86_64 = 183, 62  # e_machine in ELF


def check_pages(name: str, library: bytes) -> None:
    """Raise BuildError unless a 64-bit library can be loaded on devices with pages of 16 KB.

    Source: ELF-64, Elf64_Phdr: every PT_LOAD segment needs p_align >= 16384. Skeletons, which run on Hexagon,
    and stand-ins are not checked.
    """
    if library[:5] != b"\x7fELF\x02" or int.from_bytes(library[18:20], "little") not in (AARCH64, X86_64):
        return
    start, size, count = (
        int.from_bytes(library[i : i + n], "little") for i, n in ((32, 8), (54, 2), (56, 2))
    )
    for header in (library[start + i * size :] for i in range(count)):
        align = int.from_bytes(header[48:56], "little")
        if int.from_bytes(header[:4], "little") == 1 and align < PAGE:
            raise BuildError(
                f"{name}: a segment is aligned to {align} bytes; devices with 16 KB pages need {PAGE}\n"
                "  next: use a newer version of this library"
            )


def check_stored(apk: Path) -> None:
    """Raise BuildError unless every uncompressed library in an APK starts at a multiple of 16 KB.

    The system extracts compressed libraries (extractNativeLibs), and maps uncompressed ones.
    """
    with zipfile.ZipFile(apk) as archive, apk.open("rb") as file:
        for info in archive.infolist():
            if info.filename.endswith(".so") and info.compress_type == zipfile.ZIP_STORED:
                file.seek(info.header_offset + 26)
                lengths = file.read(4)
                extra = int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
                if (offset := info.header_offset + 30 + extra) % PAGE:
                    raise BuildError(
                        f"{apk.name}: {info.filename} starts at {offset}, not at a multiple of {PAGE}"
                    )


def qnn_names() -> list[str]:
    """Return the names of Qualcomm's libraries: plugin, runtime, stub and skeleton per Hexagon version."""
    parts = [
        f"libQnnHtpV{arch}{kind}.so" for arch in dependencies()["qnn"]["archs"] for kind in ("Stub", "Skel")
    ]
    return [PLUGIN, "libQnnHtp.so", "libQnnSystem.so", *parts]


def qnn_from_folder(folder: Path) -> dict[str, bytes | Path]:
    """Find the libraries anywhere below a folder, such as an unpacked QAIRT SDK's `lib`.

    If a name occurs more than once, the file below a folder named like "android" is taken.
    """
    found: dict[str, bytes | Path] = {}
    for name in qnn_names():
        places = sorted(folder.rglob(name))
        android = [path for path in places if "android" in str(path.relative_to(folder))]
        if not places:
            raise BuildError(f"{folder} holds no {name}\n  next: it needs {', '.join(qnn_names())}")
        found[name] = path = (android or places)[0]
        if not name.endswith("Skel.so") and not for_arm64(path):
            raise BuildError(f"{path} is not built for arm64\n  next: name the SDK's Android folder")
    return found


def for_arm64(path: Path) -> bool:
    """Whether a file is an ELF file for arm64. Skeletons are for Hexagon."""
    with path.open("rb") as file:
        head = file.read(20)
    return head[:4] == b"\x7fELF" and int.from_bytes(head[18:20], "little") == 183


def qnn_from_maven() -> dict[str, bytes | Path]:
    """Read the libraries from Qualcomm's AARs."""
    libraries: dict[str, bytes | Path] = {}
    for path in _fetch_all("Qualcomm", dependencies()["qnn"]["aars"]):
        with zipfile.ZipFile(path) as aar:
            for name in qnn_names():
                if f"jni/arm64-v8a/{name}" in aar.namelist():
                    libraries.setdefault(name, aar.read(f"jni/arm64-v8a/{name}"))
    if missing := set(qnn_names()) - set(libraries):
        names = ", ".join(sorted(missing))
        raise BuildError(f"Qualcomm's AARs hold no {names}\n  next: QNN_LIBS=FOLDER make apk")
    return libraries


def qnn_stand_ins() -> dict[str, bytes | Path]:
    """Return placeholder files with the libraries' names, to test the packaging. No phone can load them."""
    text = "Stand-in for {}: it proves the packaging and is not a library.\n"
    return {str(name): text.format(name).encode("ascii") for name in qnn_names()}


SDK_VERSION = re.compile(rb"v(\d{1,3})\.(\d{1,3})\.(\d{1,3})\.\d{12}")


def check_qnn_versions(libraries: Mapping[str, bytes | Path], artifacts: Iterable[Path]) -> None:
    """Raise BuildError unless all QNN libraries have one version, at least that of every artifact's binaries.

    libQnnSystem.so and the plugin contain no version.
    """
    found: dict[str, tuple[int, ...]] = {}
    for name, value in libraries.items():
        data = value if isinstance(value, bytes) else value.read_bytes()
        if match := SDK_VERSION.search(data):
            found[name] = tuple(int(part) for part in match.groups())
        elif name not in (PLUGIN, "libQnnSystem.so"):
            raise BuildError(f"{name} contains no QAIRT version\n  next: use the libraries of one QAIRT SDK")
    versions = sorted(set(found.values()))
    texts = {version: ".".join(map(str, version)) for version in versions}
    if len(versions) > 1:
        names = ", ".join(f"{name} {texts[version]}" for name, version in sorted(found.items()))
        raise BuildError(f"QNN libraries of different versions: {names}\n  next: use those of one QAIRT SDK")
    for folder in artifacts:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        for binary in (npu for component in manifest["components"] for npu in component.get("npu", [])):
            needed = tuple(int(part) for part in binary["sdk"].removeprefix("v").split(".")[:3])
            if versions[0] < needed:
                raise BuildError(
                    f"{folder}: compiled with QAIRT {'.'.join(map(str, needed))}, the libraries have "
                    f"{texts[versions[0]]}\n  next: use libraries that are at least as new"
                )


STAND_INS = "stand-ins"


def qnn_libraries(choice: str | None) -> tuple[Mapping[str, bytes | Path], bool]:
    """Return Qualcomm's libraries, and whether they are only stand-ins.

    `choice`: a folder, "stand-ins", or None for the AARs, with stand-ins if no repository serves them.
    Raises BuildError for an AAR with a wrong hash or without the libraries.
    """
    if choice == STAND_INS:
        return qnn_stand_ins(), True
    if choice is not None:
        return qnn_from_folder(Path(choice)), False
    if not all(dependencies()["qnn"]["aars"].values()):
        why = "dependencies.toml has no SHA-256 of Qualcomm's AARs"
    else:
        try:
            return qnn_from_maven(), False
        except NotFetchedError as error:
            why = str(error)
    say(
        f"{why}\n  the npu APK contains stand-ins and runs on the CPU\n"
        "  next: QNN_LIBS=FOLDER make apk, with the SDK's Android libraries and the plugin"
    )
    return qnn_stand_ins(), True


def mvd(folder: Path, target: Path) -> Path:
    """Write an artifact as an .mvd file: manifest first, not compressed, because the APK compresses it."""
    if not (folder / "manifest.json").is_file():
        raise BuildError(f"{folder} is not an artifact\n  next: make demo")
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    names.sort(key="manifest.json".__ne__)
    write_zip(target, {name: folder / name for name in names}, stored=True)
    return target


def build_apk(
    flavour: str, artifacts: Mapping[str, Path], output: Path, qnn: str | None, key: Key | None
) -> Path:
    """Build `output`/mobilevd-demo-FLAVOUR-VERSION.apk; without a key it is unsigned."""
    need("javac", "aapt2", "zipalign", *(["apksigner"] if key else []))
    libraries, stand_ins = qnn_libraries(qnn) if flavour == "npu" else ({}, False)
    if libraries and not stand_ins:
        check_qnn_versions(libraries, artifacts.values())
    name = version() + ("-stand-in" if stand_ins else "")
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=f".{flavour}-") as scratch:
        work = Path(scratch)
        say(f"{flavour}: compiling ...")
        base, classes = compile_app(work, flavour, name)
        dex(classes, work)
        say(f"{flavour}: packaging ...")
        with zipfile.ZipFile(base) as linked:
            entries: dict[str, bytes | Path] = {entry: linked.read(entry) for entry in linked.namelist()}
        entries["classes.dex"] = work / "classes.dex"
        entries |= native_libraries(flavour, libraries)
        for artifact, folder in artifacts.items():
            entries[f"assets/artifacts/{artifact}.mvd"] = mvd(folder, work / f"{artifact}.mvd")
        write_zip(work / "unaligned.apk", dict(sorted(entries.items())))
        aligned = work / "aligned.apk"
        run("zipalign", "-p", "4", work / "unaligned.apk", aligned)
        check_stored(aligned)
        stem = f"mobilevd-demo-{flavour}-{name}"
        if key is not None:
            key.sign(aligned, work / "signed.apk")
            target = output / f"{stem}.apk"
            (work / "signed.apk").replace(target)
        else:
            target = output / f"{stem}-unsigned.apk"
            aligned.replace(target)
    say(f"{target} ({target.stat().st_size / 1e6:.1f} MB)")
    return target


@dataclass(frozen=True)
class Key:
    """A key store for signing; the environment variable `password_variable` holds its password."""

    store: Path
    alias: str
    password_variable: str | None = None

    @classmethod
    def debug(cls) -> Key:
        """Return the debug key of this machine; it is created on first use."""
        store = cache() / "debug.keystore"
        with alone("debug-key"):
            if not store.exists():
                run(
                    "keytool", "-genkeypair", "-keystore", store, "-storepass", DEBUG_PASSWORD,
                    "-alias", "debug", "-keyalg", "RSA", "-keysize", "3072", "-validity", "10000",
                    "-dname", "CN=Debug",
                )  # fmt: skip
        return cls(store, "debug")

    def sign(self, source: Path, target: Path) -> None:
        """Sign an aligned APK with schemes v2 and v3."""
        source_of_password = (
            f"env:{self.password_variable}" if self.password_variable else f"pass:{DEBUG_PASSWORD}"
        )
        run(
            "apksigner", "sign", "--ks", self.store, "--ks-key-alias", self.alias, "--ks-pass",
            source_of_password, "--v1-signing-enabled", "false", "--v2-signing-enabled", "true",
            "--v3-signing-enabled", "true", "--v4-signing-enabled", "false", "--in", source, "--out", target,
        )  # fmt: skip


# 4. Test on the JVM.


def demo_artifact() -> Path:
    """Return the float artifact that the tests run: MOBILEVD_ARTIFACT, or the one of `make demo`."""
    return Path(os.environ.get("MOBILEVD_ARTIFACT") or ROOT / "build" / "demo" / "artifact")


def test_properties() -> list[str]:
    """Return the -D options of the Java tests: the paths of the repository, artifacts and QNN."""
    values = {
        "mobilevd.root": ROOT,
        "mobilevd.artifact": demo_artifact(),
        "mobilevd.npu": os.environ.get("MOBILEVD_NPU") or ROOT / "build" / "demo" / "npu",
        "mobilevd.qnn": os.environ.get("MOBILEVD_QNN") or _qnn_wheel() or "",
        # Clips by Python (tests.support.clip_reference), and the folder for results that Python reads.
        "mobilevd.reference": os.environ.get("MOBILEVD_REFERENCE", ""),
        "mobilevd.npuReference": os.environ.get("MOBILEVD_NPU_REFERENCE", ""),
        "mobilevd.results": os.environ.get("MOBILEVD_RESULTS", ""),
    }
    return [f"-D{name}={value}" for name, value in values.items()]


def _qnn_wheel() -> Path | None:
    """Return the folder of the onnxruntime-qnn wheel in the project's environment, if it is installed."""
    places = sorted((ROOT / ".venv" / "lib").glob("python3*/site-packages/onnxruntime_qnn"))
    return places[-1] if places else None


def junit(classes: Path, classpath: Sequence[Path], only: Sequence[str], *options: str) -> None:
    """Run all classes *Test below `classes`, or only those named `only`; print JUnit's report."""
    tests = (path.relative_to(classes).with_suffix("") for path in classes.rglob("*Test.class"))
    names = sorted(".".join(path.parts) for path in tests)
    chosen = [name for name in names if not only or name.rpartition(".")[2] in only]
    if not chosen:
        raise BuildError(f"no test is called {', '.join(only) or '*Test'}\n  next: one of {', '.join(names)}")
    joined = os.pathsep.join(str(path) for path in classpath)
    run(
        "java", *JVM, *test_properties(), *options, "-cp", joined,
        "org.junit.runner.JUnitCore", *chosen, cwd=ROOT, quiet=False,
    )  # fmt: skip


def test_core(only: Sequence[str]) -> None:
    """Compile core and its tests, and run them on ONNX Runtime for the desktop."""
    need("javac")
    libraries = [*fetch("app"), *fetch("jvm")]
    with tempfile.TemporaryDirectory(prefix="mobilevd-core-") as scratch:
        main, tests = Path(scratch) / "main", Path(scratch) / "test"
        javac(java_files(CORE / "main"), libraries, main, "--release", "17")
        javac(java_files(CORE / "test"), [main, *libraries], tests, "--release", "17")
        junit(tests, [tests, main, *libraries], only)


def aar_classes(path: Path) -> Path:
    """Return the classes of an AAR as a jar; return any other file unchanged."""
    if path.suffix != ".aar":
        return path

    def classes(target: Path) -> None:
        with zipfile.ZipFile(path) as aar:
            target.write_bytes(aar.read("classes.jar"))

    return derived(f"{path.stem}-classes.jar", classes)


def test_app(only: Sequence[str], record: bool) -> None:
    """Compile the app and its tests, and run them in Robolectric; `record` overwrites the golden pictures."""
    need("javac", "aapt2")
    _, android = framework()
    robolectric = [aar_classes(path) for path in fetch("robolectric")]
    frameworks = [*fetch("framework-28"), *fetch("framework-34")]
    with tempfile.TemporaryDirectory(prefix="mobilevd-app-") as scratch:
        work = Path(scratch)
        base, main = compile_app(work, "cpu", version())
        with zipfile.ZipFile(base, "a") as apk:
            apk.write(mvd(demo_artifact(), work / "demo.mvd"), "assets/artifacts/demo.mvd")
        tests = work / "test"
        libraries = [*fetch("app"), *fetch("jvm"), *robolectric]
        javac(java_files(APP / "app" / "src" / "test"), [main, *libraries, android], tests, "--release", "17")
        config = tests / "com" / "android" / "tools" / "test_config.properties"
        config.parent.mkdir(parents=True)
        config.write_text(
            f"android_resource_apk={base}\nandroid_merged_manifest={work / 'AndroidManifest.xml'}\n"
            f"android_custom_package={dependencies()['app']['package']}\n",
            encoding="utf-8",
        )
        offline = work / "frameworks"
        offline.mkdir()
        for path in frameworks:
            (offline / path.name).symlink_to(path)
        junit(
            tests, [tests, main, *libraries, android], only, "-Xmx1500m", "-Drobolectric.offline=true",
            f"-Drobolectric.dependency.dir={offline}", f"-Dmobilevd.record={str(record).lower()}",
            "--add-opens", "java.base/java.io=ALL-UNNAMED",  # Robolectric's file descriptors
        )  # fmt: skip


# The Gradle files, and what their statements act on.
GRADLE_FILES = {"settings": "Settings", "build": "Project", "core/build": "Project", "app/build": "Project"}
# Packages that Gradle imports into every script, as far as ours need them.
GRADLE_PACKAGES = ("", ".file", ".initialization", ".initialization.resolve", ".tasks", ".tasks.testing")
GRADLE_IMPORTS = "".join(f"import org.gradle.api{package}.*\n" for package in GRADLE_PACKAGES)


def check_gradle() -> None:
    """Type-check the Gradle files with Kotlin's compiler against the APIs of Gradle and its Android plugin.

    Gradle itself does not run: no registry that CI reaches serves it. Raises BuildError with the compiler's
    messages, or for a plugin that the catalogue does not name.
    """
    need("javac")
    files = fetch("kotlin")
    jars = os.pathsep.join(str(path) for path in files)
    # Gradle compiles scripts with this plugin: inside an action's braces, `this` is the action's argument.
    (receiver,) = [path for path in files if "sam-with-receiver" in path.name]
    with tempfile.TemporaryDirectory(prefix="mobilevd-gradle-") as scratch:
        sources = [APP / "gradle" / "Accessors.kt", Path(scratch) / "Catalogue.kt"]
        sources[-1].write_text(catalogue_accessors(), encoding="utf-8")
        for name, receiver_type in GRADLE_FILES.items():
            text = (APP / f"{name}.gradle.kts").read_text(encoding="utf-8")
            sources.append(Path(scratch) / f"{name.replace('/', '_')}.kt")
            sources[-1].write_text(gradle_source(text, receiver_type, sources[-1].stem), encoding="utf-8")
        run(
            "java", *JVM, "-Xmx600m", "-cp", jars, "org.jetbrains.kotlin.cli.jvm.K2JVMCompiler", "-no-stdlib",
            "-no-reflect", "-cp", jars, "-d", Path(scratch) / "out", f"-Xplugin={receiver}", "-P",
            "plugin:org.jetbrains.kotlin.samWithReceiver:annotation=org.gradle.api.HasImplicitReceiver",
            *sources,
        )  # fmt: skip


def gradle_source(script: str, receiver: str, name: str) -> str:
    """Return a Gradle script as Kotlin source: its classes, and a function of `receiver` with the rest."""
    for plugin in re.findall(r"alias\(libs\.plugins\.([\w.]+)\)", script):
        if plugin.replace(".", "-") not in catalogue()["plugins"]:
            raise BuildError(f"{name}: the catalogue has no plugin {plugin}")
    script = re.sub(r"^plugins \{.*?^\}\n", "", script, flags=re.MULTILINE | re.DOTALL)
    imports = re.findall(r"^import .*$", script, re.MULTILINE)
    script = re.sub(r"^import .*$", "", script, flags=re.MULTILINE)
    classes = re.findall(r"^abstract class .*?^\}$", script, re.MULTILINE | re.DOTALL)
    for text in classes:
        script = script.replace(text, "")
    head = GRADLE_IMPORTS + "\n".join(imports)
    return f"{head}\n{''.join(classes)}\nfun {receiver}.{name}() {{\n{script}\n}}\n"


def catalogue_accessors() -> str:
    """Return Kotlin source of the object `libs` that Gradle generates from the catalogue."""
    tree: dict[str, Any] = {}
    versions = {f"versions-{name}": "Version" for name in catalogue()["versions"]}
    for name, kind in {**dict.fromkeys(catalogue()["libraries"], "Library"), **versions}.items():
        node = tree
        for part in name.split("-"):
            node = node.setdefault(part, {})
        node[""] = kind

    def source(name: str, node: dict[str, Any]) -> str:
        body = "".join(source(child, value) for child, value in node.items() if child)
        if node.get("") == "Version":
            body += "override fun get(): String = TODO()\n"
        return f"object {name}{' : ' + node[''] if '' in node else ''} {{\n{body}}}\n"

    return source("libs", tree)


# 5. The command line.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command."""
    options = _parser().parse_args(arguments)
    try:
        match options.command:
            case "fetch":
                for name in options.sets or dependencies()["maven"]:
                    fetch(name)
                onnxruntime_aar()
            case "apk":
                key = None if options.unsigned else Key.debug()
                if options.keystore:
                    key = Key(options.keystore, options.key_alias, "KEYSTORE_PASSWORD")
                bundled = dict(_bundled(text) for text in options.artifact)
                print(build_apk(options.flavour, bundled, options.output, options.qnn_libs, key))
            case "check-gradle":
                check_gradle()
            case "test-core":
                test_core(options.only)
            case "test-app":
                test_app(options.only, options.record)
    except BuildError as error:
        say(f"build.py: {error}")
        return 1
    return 0


def _bundled(text: str) -> tuple[str, Path]:
    name, _, folder = text.rpartition("=")
    return name or Path(folder).name, Path(folder)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="build.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    fetching = commands.add_parser("fetch", help="fetch all dependencies")
    fetching.add_argument("sets", nargs="*", metavar="SET", help="sets of dependencies.toml (default: all)")
    apk = commands.add_parser("apk", help="build one APK")
    apk.add_argument("--flavour", choices=["cpu", "npu"], default="cpu")
    apk.add_argument(
        "--artifact",
        action="append",
        default=[],
        metavar="[NAME=]FOLDER",
        help="artifact to bundle; may be repeated",
    )
    apk.add_argument("--output", type=Path, default=ROOT / "build" / "apk", help="default: build/apk")
    apk.add_argument("--qnn-libs", metavar="FOLDER", help=f"Qualcomm's libraries, or '{STAND_INS}'")
    apk.add_argument("--unsigned", action="store_true", help="do not sign")
    apk.add_argument("--keystore", type=Path, help="key store; KEYSTORE_PASSWORD holds its password")
    apk.add_argument("--key-alias", default="release")
    commands.add_parser("check-gradle", help="type-check the Gradle files")
    for name, what in (("test-core", "core, on the JVM"), ("test-app", "app, in Robolectric")):
        test = commands.add_parser(name, help=f"test {what}")
        test.add_argument("only", nargs="*", metavar="CLASS", help="test classes (default: all)")
        if name == "test-app":
            test.add_argument("--record", action="store_true", help="overwrite the golden pictures")
    return parser


if __name__ == "__main__":
    sys.exit(main())
