"""The Android app: its APKs as they come out of the build script, and its tests on the JVM.

The cpu APK bundles the demo; the npu APK a tiny artifact, and stand-ins for Qualcomm's libraries.

Without JDK, Maven, npm and Debian's Android tools these tests are skipped; with MOBILEVD_ANDROID=required, as
in CI, they fail instead.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.support import ROOT

pytestmark = pytest.mark.android

APP = ROOT / "android_app"
TINY = ROOT / "tests" / "vectors" / "artifact"
TOOLS = ("javac", "mvn", "npm", "aapt2", "zipalign", "apksigner", "dexdump")
FLAVOURS = ("cpu", "npu")
# Calls of later levels than the lowest; each stands behind a look at Build.VERSION.SDK_INT.
GUARDED = {
    "android.os.Build.SOC_MODEL",
    "android.os.PowerManager.getCurrentThermalStatus()",
    "android.view.Window.setDecorFitsSystemWindows(boolean)",
    "android.view.WindowInsets$Type",
    "android.view.WindowInsets$Type.displayCutout()",
    "android.view.WindowInsets$Type.ime()",
    "android.view.WindowInsets$Type.systemBars()",
    "android.view.WindowInsets.getInsets(int)",
}
# What of Java 8 an Android has.
JAVA = ("io", "lang", "math", "net", "nio", "security", "text", "time", "util")


def _load_build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("android_build", APP / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


build = _load_build()


@pytest.fixture(scope="session")
def tools() -> None:
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        text = f"not installed: {', '.join(missing)}; docs/how-to/app.md names the packages"
        if os.environ.get("MOBILEVD_ANDROID") == "required":
            pytest.fail(text)
        pytest.skip(text)


@dataclasses.dataclass(frozen=True)
class Apk:
    """A signed APK, and what aapt2 says about it."""

    path: Path
    badging: str

    def entries(self) -> dict[str, bytes]:
        return _unpacked(self.path.read_bytes())


@pytest.fixture(scope="session")
def bundled(demo_artifact: Path) -> dict[str, Path]:
    return {"cpu": demo_artifact, "npu": TINY}


@pytest.fixture(scope="session")
def unsigned(
    tools: None, bundled: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    output = tmp_path_factory.mktemp("apk")
    return {
        flavour: build.build_apk(flavour, {"demo": bundled[flavour]}, output, build.STAND_INS, None)
        for flavour in FLAVOURS
    }


@pytest.fixture(scope="session")
def apks(unsigned: dict[str, Path]) -> dict[str, Apk]:
    key = build.Key.debug()
    signed = {}
    for flavour, path in unsigned.items():
        target = path.with_name(f"{flavour}.apk")
        key.sign(path, target)
        signed[flavour] = Apk(target, _run("aapt2", "dump", "badging", target))
    return signed


@pytest.fixture(params=FLAVOURS)
def flavour(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def _run(*command: str | Path, ok: bool = True) -> str:
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert not ok or result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def _unpacked(archive: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        return {name: file.read(name) for name in file.namelist()}


def _settings() -> Mapping[str, Any]:
    return tomllib.loads((APP / "dependencies.toml").read_text())


def test_it_is_signed_and_aligned(apks: dict[str, Apk], flavour: str) -> None:
    level = str(build.api_level(f"minSdk-{flavour}"))
    shown = _run("apksigner", "verify", "--verbose", "--min-sdk-version", level, apks[flavour].path)
    assert "Verified using v3 scheme (APK Signature Scheme v3): true" in shown
    _run("zipalign", "-c", "-p", "4", apks[flavour].path)


def test_a_changed_byte_breaks_the_signature(apks: dict[str, Apk], tmp_path: Path) -> None:
    data = bytearray(apks["cpu"].path.read_bytes())
    data[len(data) // 2] ^= 1
    broken = tmp_path / "broken.apk"
    broken.write_bytes(data)
    assert "DOES NOT VERIFY" in _run("apksigner", "verify", broken, ok=False)


def test_badging(apks: dict[str, Apk], flavour: str) -> None:
    app, badging = _settings()["app"], apks[flavour].badging
    suffix = "" if flavour == "cpu" else "-stand-in"
    code, name = build.version_code(build.version()), build.version() + suffix
    assert f"name='{app['package']}' versionCode='{code}' versionName='{name}'" in badging
    assert f"sdkVersion:'{build.api_level(f'minSdk-{flavour}')}'" in badging
    assert f"targetSdkVersion:'{build.api_level('targetSdk')}'" in badging
    assert f"compileSdkVersion='{app['compile_sdk']}'" in badging
    assert f"native-code: {' '.join(repr(abi) for abi in app['abis'][flavour])}" in badging
    assert "application-debuggable" not in badging
    assert "launchable-activity: name='dev.mobilevd.demo.MainActivity'" in badging
    assert "locales: '--_--' 'de'" in badging


def test_permissions_and_parts(apks: dict[str, Apk], flavour: str) -> None:
    asked = re.findall(r"^uses-permission: name='([^']*)'(.*)$", apks[flavour].badging, re.MULTILINE)
    # READ_ is implied by WRITE_; both end with Android 9. The others are for runs in the background.
    assert {name.removeprefix("android.permission."): limit.strip() for name, limit in asked} == {
        "WRITE_EXTERNAL_STORAGE": "maxSdkVersion='28'",
        "READ_EXTERNAL_STORAGE": "maxSdkVersion='28'",
        "FOREGROUND_SERVICE": "",
        "POST_NOTIFICATIONS": "",
    }
    tree = _run("aapt2", "dump", "xmltree", "--file", "AndroidManifest.xml", apks[flavour].path)
    elements = re.findall(r"^ *E: ([a-z-]+)", tree, re.MULTILINE)
    assert not {"provider", "receiver"} & set(elements)
    service = tree.partition("E: service")[2].partition("E: ")[0]
    assert 'name(0x01010003)=".RunService"' in service
    assert re.search(r"exported\(0x[0-9a-f]+\)=false", service)
    assert elements.count("service") == 1
    assert elements.count("activity") == 2
    assert re.search(r'permission\(0x[0-9a-f]+\)="android.permission.DUMP"', tree)


def test_native_libraries(apks: dict[str, Apk], flavour: str) -> None:
    expected = {
        f"lib/{abi}/{name}"
        for abi in _settings()["app"]["abis"][flavour]
        for name in ("libonnxruntime.so", "libonnxruntime4j_jni.so")
    }
    if flavour == "npu":
        expected |= {
            f"lib/arm64-v8a/{name}.so"
            for name in (
                "libonnxruntime_providers_qnn", "libQnnHtp", "libQnnSystem",
                *(f"libQnnHtpV{arch}{kind}" for arch in (73, 75, 79, 81) for kind in ("Stub", "Skel")),
            )
        }  # fmt: skip
    entries = apks[flavour].entries()
    assert {name for name in entries if name.endswith(".so") or name.startswith("lib/")} == expected
    stand_ins = {name for name in expected if entries[name].startswith(b"Stand-in for ")}
    assert stand_ins == {name for name in expected if "Qnn" in name or "_qnn" in name}
    for name in expected - stand_ins:
        assert entries[name][:4] == b"\x7fELF", name


def test_the_artifact_is_in_it(apks: dict[str, Apk], bundled: dict[str, Path], flavour: str) -> None:
    root = bundled[flavour]
    files = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
    found = _unpacked(apks[flavour].entries()["assets/artifacts/demo.mvd"])
    assert next(iter(found)) == "manifest.json"
    assert found == {name: path.read_bytes() for name, path in files.items()}


def test_nothing_private_is_in_it(apks: dict[str, Apk], flavour: str) -> None:
    secret = re.compile(rb"PRIVATE KEY|api[_-]token|password", re.IGNORECASE)
    place = re.compile(
        rb"/(home|root|work|tmp|var|Users)/|https?://(?!schemas\.android\.com/)", re.IGNORECASE
    )
    entries = apks[flavour].entries()
    for name in [name for name in entries if name.endswith(".mvd")]:
        entries |= {f"{name}/{member}": data for member, data in _unpacked(entries.pop(name)).items()}
    for name, data in entries.items():
        assert ROOT.as_posix().encode() not in data, name
        assert not (found := secret.search(data)), (name, found)
        # ONNX Runtime's libraries name the folders that their builders had.
        if not name.startswith("lib/"):
            assert not (found := place.search(data)), (name, found)


def test_telemetry_is_left_out(apks: dict[str, Apk], flavour: str, tmp_path: Path) -> None:
    dex = tmp_path / "classes.dex"
    dex.write_bytes(apks[flavour].entries()["classes.dex"])
    classes = re.findall(r"Class descriptor  : 'L([^;]*);'", _run("dexdump", dex))
    assert "dev/mobilevd/demo/MainActivity" in classes
    # The last stands in for java.lang.Record, which Android has from 34 on.
    ours = ("dev/mobilevd/", "ai/onnxruntime/", "com/grack/nanojson/", "com/android/tools/r8/RecordTag")
    assert [name for name in classes if not name.startswith(ours)] == []
    assert [name for name in classes if "elemetry" in name] == []


def test_both_flavours_have_the_same_code(apks: dict[str, Apk]) -> None:
    """So that one check of it serves both."""
    assert apks["cpu"].entries()["classes.dex"] == apks["npu"].entries()["classes.dex"]


def test_every_call_is_there_at_the_lowest_level(apks: dict[str, Apk], tmp_path: Path) -> None:
    """Look up whatever the dex names: in Android 9's framework, and in the part of Java 8 that it has."""
    (framework,) = build.fetch("framework-28")
    android = tmp_path / "android.jar"
    with zipfile.ZipFile(framework) as jar:
        names = [
            n
            for n in jar.namelist()
            if n.endswith(".class") and n.startswith(("android/", "dalvik/", "org/"))
        ]
        build.write_zip(android, {name: jar.read(name) for name in names}, stored=True)
    java = tmp_path / "java.jar"
    home = Path(shutil.which("javac") or "").resolve().parent.parent
    with zipfile.ZipFile(home / "lib" / "ct.sym") as symbols:
        entries = {}
        for name in symbols.namelist():
            releases, _, path = name.partition("/")
            path = path.partition("/")[2].removesuffix(".sig")  # without the module
            if (
                "8" in releases
                and name.endswith(".sig")
                and path.startswith(tuple(f"java/{p}/" for p in JAVA))
            ):
                entries[f"{path}.class"] = symbols.read(name)
        build.write_zip(java, entries)
    dex = tmp_path / "classes.dex"
    dex.write_bytes(apks["cpu"].entries()["classes.dex"])
    (r8,) = [path for path in build.fetch("build") if path.name.startswith("r8-")]
    shown = _run(
        "java", *build.JVM, "-cp", r8, "com.android.tools.r8.tracereferences.TraceReferences", "--check",
        "--lib", android, "--lib", java, "--source", dex, ok=False,
    )  # fmt: skip
    missing = re.findall(r"Missing (?:field|method|class) (?:\S+ )?(\S+)(?= \(referenced)", shown)
    assert set(missing) == GUARDED, shown


def test_the_build_is_reproducible(
    unsigned: dict[str, Path], bundled: dict[str, Path], flavour: str, tmp_path: Path
) -> None:
    copy = tmp_path / "elsewhere" / "clone"
    shutil.copytree(APP, copy / "android_app")
    shutil.copytree(bundled[flavour], copy / "demo")
    shutil.copy(ROOT / "pyproject.toml", copy)
    for path in copy.rglob("*"):
        os.utime(path, (1, 1))
    command = [
        sys.executable, "android_app/build.py", "apk", "--flavour", flavour, "--qnn-libs", build.STAND_INS,
        "--unsigned", "--artifact", "demo", "--output", "out",
    ]  # fmt: skip
    subprocess.run(command, cwd=copy, check=True, capture_output=True, env={**os.environ, "TZ": "Asia/Tokyo"})
    (again,) = (copy / "out").glob("*.apk")
    assert again.name == unsigned[flavour].name
    assert again.read_bytes() == unsigned[flavour].read_bytes()


GRADLE_FILES = [APP / f"{name}.gradle.kts" for name in build.GRADLE_FILES]


def test_gradle_builds_the_same_app() -> None:
    app = _settings()["app"]
    text = (APP / "app" / "build.gradle.kts").read_text()
    assert re.findall(r'(?:namespace|applicationId) = "(.*)"', text) == [app["package"]] * 2
    assert re.findall(r"include\((.*)\)", (APP / "settings.gradle.kts").read_text()) == ['":core", ":app"']
    for flavour in FLAVOURS:
        block = text.partition(f'create("{flavour}") {{')[2].partition("}")[0]
        abis = ", ".join(f'"{abi}"' for abi in app["abis"][flavour])
        assert f"abiFilters += listOf({abis})" in block


def test_no_version_stands_twice() -> None:
    """The catalogue holds every version; scripts and hashes refer to it by name."""
    catalogue = build.catalogue()
    libraries = catalogue["libraries"].values()
    versions = {library["version"] for library in libraries if isinstance(library["version"], str)}
    versions |= {
        version for name, version in catalogue["versions"].items() if not name.startswith("android-")
    }
    assert len(versions) > 20
    for path in [*GRADLE_FILES, APP / "dependencies.toml", APP / "build.py"]:
        strings = set(re.findall(r'"([^"]*)"', path.read_text()))
        assert not strings & (versions | {build.version()}) - {"1"}, path  # javax.inject has the version 1
        assert not re.findall(r'"[\w.-]+:[\w.-]+:[\w.-]+"', path.read_text()), path
    levels = re.findall(r"(\w+Sdk) = (.*)", (APP / "app" / "build.gradle.kts").read_text())
    assert len(levels) == 4
    assert all(value.startswith("libs.versions.android.") for _, value in levels)


def test_every_hash_has_a_version_and_every_version_a_hash() -> None:
    settings = _settings()
    hashed = {name.partition("@")[0] for names in settings["maven"].values() for name in names}
    hashed |= {name.partition("@")[0] for name in settings["qnn"]["aars"]}
    hashed |= {"onnxruntime-android"}  # from npm
    assert hashed == set(build.catalogue()["libraries"])


def test_the_wrapper_checks_its_distribution() -> None:
    """The jar of the wrapper is not in the repository: `gradle wrapper` writes it."""
    text = (APP / "gradle" / "wrapper" / "gradle-wrapper.properties").read_text()
    assert re.search(
        r"^distributionUrl=https\\://services\.gradle\.org/distributions/gradle-[\d.]+-bin\.zip$", text, re.M
    )
    assert re.search(r"^distributionSha256Sum=[0-9a-f]{64}$", text, re.M)
    assert not [path for path in APP.rglob("*.jar") if "build" not in path.relative_to(APP).parts]


def test_gradle_files_compile(tools: None) -> None:
    build.check_gradle()


@pytest.mark.parametrize(
    ("file", "right", "wrong", "message"),
    [
        (
            "app/build.gradle.kts",
            "android.compileSdk.get().toInt()",
            "android.compileSdk.get()",
            "type mismatch",
        ),
        ("app/build.gradle.kts", "libs.qnn.plugin", "libs.qnn.plugins", "unresolved reference 'plugins'"),
        ("core/build.gradle.kts", "libs.nanojson", "libs.onnxruntime", "type mismatch"),
        ("settings.gradle.kts", "mavenCentral()", "mavenCentre()", "unresolved reference 'mavenCentre'"),
        ("build.gradle.kts", "libs.plugins.android.application", "libs.plugins.android.app", "has no plugin"),
    ],
)
def test_gradle_has_the_right_types(
    tools: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    file: str,
    right: str,
    wrong: str,
    message: str,
) -> None:
    copy = tmp_path / "android_app"
    shutil.copytree(APP, copy)
    text = (copy / file).read_text()
    assert right in text
    (copy / file).write_text(text.replace(right, wrong))
    monkeypatch.setattr(build, "APP", copy)
    with pytest.raises(build.BuildError, match=message):
        build.check_gradle()


def test_a_wrong_hash_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "library.jar"
    path.write_bytes(b"something else")
    with pytest.raises(build.BuildError, match=r"SHA-256 is [0-9a-f]{64}, dependencies.toml says 00"):
        build.check_hash(path, "00", "library")
    assert not path.exists()


def _elf(align: int, machine: int = 183) -> bytes:
    """Return an ELF-64 header with one PT_LOAD segment; all other fields are 0."""
    header = bytearray(64 + 56)
    header[:5] = b"\x7fELF\x02"
    header[18:20] = machine.to_bytes(2, "little")
    header[32:40] = (64).to_bytes(8, "little")
    header[54:56], header[56:58] = (56).to_bytes(2, "little"), (1).to_bytes(2, "little")
    header[64:68] = (1).to_bytes(4, "little")
    header[112:120] = align.to_bytes(8, "little")
    return bytes(header)


def test_libraries_are_ready_for_pages_of_16_kb(apks: dict[str, Apk], flavour: str, tmp_path: Path) -> None:
    libraries = {name: data for name, data in apks[flavour].entries().items() if name.endswith(".so")}
    assert libraries
    for name, data in libraries.items():
        build.check_pages(name, data)
        if data.startswith(b"\x7fELF") and shutil.which("readelf"):  # another reader of ELF must agree
            (tmp_path / "library.so").write_bytes(data)
            aligns = re.findall(
                r"^ +LOAD .* (0x[0-9a-f]+)$", _run("readelf", "-lW", tmp_path / "library.so"), re.M
            )
            assert aligns
            assert min(int(align, 16) for align in aligns) >= build.PAGE, name
    build.check_stored(apks[flavour].path)


@pytest.mark.parametrize("machine", [183, 62])
def test_a_library_for_pages_of_4_kb_is_refused(machine: int) -> None:
    build.check_pages("libnew.so", _elf(16384, machine))
    build.check_pages("libskel.so", _elf(4096, 164))  # Hexagon
    with pytest.raises(build.BuildError, match=r"libold.so: a segment is aligned to 4096 bytes"):
        build.check_pages("libold.so", _elf(4096, machine))


def test_a_stored_library_between_pages_is_refused(tmp_path: Path) -> None:
    build.write_zip(tmp_path / "a.apk", {"lib/arm64-v8a/libx.so": b"x"}, stored=True)
    with pytest.raises(build.BuildError, match=r"libx.so starts at \d+, not at a multiple of 16384"):
        build.check_stored(tmp_path / "a.apk")


def _qnn(**other: str) -> dict[str, bytes]:
    versions = {name.removesuffix(".so"): "v2.51.0.260929181845" for name in build.qnn_names()} | other
    return {f"{name}.so": versions[name].encode() for name in versions}


def test_every_qnn_librarys_version_is_checked() -> None:
    build.check_qnn_versions(_qnn(), [TINY])
    with pytest.raises(build.BuildError, match=r"different versions: .*libQnnHtpV75Skel.so 2.49.0"):
        build.check_qnn_versions(_qnn(libQnnHtpV75Skel="v2.49.0.250101123456"), [])
    with pytest.raises(build.BuildError, match=r"libQnnHtpV75Stub.so contains no QAIRT version"):
        build.check_qnn_versions(_qnn(libQnnHtpV75Stub="?"), [])
    old = {name: value.replace(b"v2.51", b"v1.0") for name, value in _qnn().items()}
    with pytest.raises(build.BuildError, match=r"compiled with QAIRT \d+.\d+.\d+, the libraries have 1.0.0"):
        build.check_qnn_versions(old, [TINY])


def test_the_target_is_what_the_store_demands() -> None:
    """Google Play demands API level 36 since August 2026."""
    assert build.api_level("targetSdk") >= 36


def test_libraries_for_another_processor_are_refused(tmp_path: Path) -> None:
    for name in build.qnn_names():
        (tmp_path / name).write_bytes(b"\x7fELF" + bytes(14) + (62).to_bytes(2, "little"))  # x86-64
    with pytest.raises(build.BuildError, match="is not built for arm64"):
        build.qnn_libraries(str(tmp_path))
    for name in build.qnn_names():
        (tmp_path / name).write_bytes(b"\x7fELF" + bytes(14) + (183).to_bytes(2, "little"))
    libraries, stand_ins = build.qnn_libraries(str(tmp_path))
    assert set(libraries) == set(build.qnn_names())
    assert not stand_ins
    (tmp_path / build.PLUGIN).unlink()
    with pytest.raises(build.BuildError, match=f"holds no {build.PLUGIN}"):
        build.qnn_libraries(str(tmp_path))


@pytest.fixture
def aars(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Path]:
    """AARs with the structure of Qualcomm's, which replace Maven's, and their hashes."""
    plugin, runtime = (build.Coordinates.of(name) for name in _settings()["qnn"]["aars"])
    files = {"plugin": tmp_path / plugin.file, "runtime": tmp_path / runtime.file}
    names = {"plugin": [build.PLUGIN], "runtime": [n for n in build.qnn_names() if n != build.PLUGIN]}
    for kind, path in files.items():
        build.write_zip(path, {f"jni/arm64-v8a/{name}": name.encode() for name in names[kind]})

    def maven(*command: str | Path) -> str:
        pom = Path(command[command.index("--file") + 1]).read_text()
        (target,) = re.findall("<outputDirectory>(.*)</outputDirectory>", pom)
        Path(target).mkdir()
        for path in files.values():
            if not path.exists():
                raise build.BuildError("mvn ended with 1")
            shutil.copy(path, target)
        return ""

    monkeypatch.setenv("MOBILEVD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "need", lambda *programs: None)
    monkeypatch.setattr(build, "run", maven)
    _pin(monkeypatch, [build.sha256(path) for path in files.values()])
    return files


def _pin(monkeypatch: pytest.MonkeyPatch, digests: list[str]) -> None:
    settings = dict(_settings())
    settings["qnn"] = {**settings["qnn"], "aars": dict(zip(settings["qnn"]["aars"], digests, strict=True))}
    monkeypatch.setattr(build, "dependencies", lambda: settings)


def test_qualcomms_aars_are_taken_by_their_hash(aars: dict[str, Path]) -> None:
    libraries, stand_ins = build.qnn_libraries(None)
    assert libraries == {name: name.encode() for name in build.qnn_names()}
    assert not stand_ins


def test_a_tampered_aar_ends_the_build(aars: dict[str, Path]) -> None:
    with zipfile.ZipFile(aars["runtime"], "a") as aar:
        aar.writestr("jni/arm64-v8a/libElse.so", b"")
    with pytest.raises(build.BuildError, match=r"qnn-runtime-.*[.]aar: SHA-256 is [0-9a-f]{64}, depend"):
        build.qnn_libraries(None)


def test_an_incomplete_aar_ends_the_build(aars: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    build.write_zip(aars["plugin"], {})
    _pin(monkeypatch, [build.sha256(path) for path in aars.values()])
    with pytest.raises(build.BuildError, match=f"hold no {build.PLUGIN}"):
        build.qnn_libraries(None)


def test_aars_that_do_not_resolve_have_stand_ins(
    aars: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    aars["plugin"].unlink()
    assert build.qnn_libraries(None) == (build.qnn_stand_ins(), True)
    assert "Maven cannot fetch everything of onnxruntime-android-qnn" in capsys.readouterr().err


def test_aars_without_a_hash_are_not_used(
    aars: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _pin(monkeypatch, [build.sha256(aars["plugin"]), ""])
    assert build.qnn_libraries(None) == (build.qnn_stand_ins(), True)
    assert "no SHA-256 of Qualcomm's AARs" in capsys.readouterr().err


def test_a_missing_program_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.shutil, "which", lambda program: None)
    with pytest.raises(build.BuildError, match="apt-get install aapt zipalign"):
        build.need("aapt2", "zipalign")


def test_java(tools: None, demo_artifact: Path) -> None:
    """The screens' own tests. They run the demo's artifact."""
    result = subprocess.run(
        [sys.executable, APP / "build.py", "test-app"],
        capture_output=True,
        text=True,
        env={**os.environ, "MOBILEVD_ARTIFACT": str(demo_artifact)},
    )
    assert result.returncode == 0, result.stdout[-20000:] + result.stderr[-5000:]
    number = re.search(r"^OK \((\d+) tests\)$", result.stdout, re.MULTILINE)
    assert number is not None, result.stdout
    assert int(number[1]) > 30
