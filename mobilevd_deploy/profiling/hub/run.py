"""Profile an artifact on phones that Qualcomm AI Hub hosts; uploads and jobs are never repeated.

profile_on_hub()            READ FIRST: the whole flow
├── Hub                     the vendor's client, see client.py
└── Book                    the ledger on disk, see ledger.py
    └── Ledger
        ├── Upload          one per content and hub
        └── Run             one call of `profile` with its request
            ├── HostedPhone the user's name for a device, and the hosted phone that is used for it
            └── HubJob
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import secrets
import shlex
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np

from mobilevd_deploy.artifact.artifact import Artifact
from mobilevd_deploy.artifact.manifest import Component, NpuBinary
from mobilevd_deploy.base.files import digest, disk_guard
from mobilevd_deploy.base.progress import Progress
from mobilevd_deploy.base.tensors import Array
from mobilevd_deploy.config.devices import chip_called
from mobilevd_deploy.errors import SpecError, UsageError, VendorError
from mobilevd_deploy.profiling.hub.client import Hub, OfferedRuntime
from mobilevd_deploy.profiling.hub.hosted import HostedPhone, choose_hosted
from mobilevd_deploy.profiling.hub.ledger import (
    LEDGER,
    Book,
    HubJob,
    JobKind,
    Ledger,
    Request,
    Run,
    Upload,
    read_ledger,
)
from mobilevd_deploy.profiling.hub.result import compare, read_result, single
from mobilevd_deploy.profiling.profile import (
    MADE_UP,
    ComponentProfile,
    Profile,
    join_parts,
    now,
    runtime_notes,
    total_ms,
    version,
)
from mobilevd_deploy.profiling.profile import SCHEMA_VERSION as PROFILE_VERSION
from mobilevd_deploy.profiling.store import profiles_dir, save_profile
from mobilevd_deploy.quantize.encodings import write_encodings
from mobilevd_deploy.runtime.recording import run_on_host

POLL_SECONDS = 10.0

_COMPILE_OPTIONS = "--target_runtime qnn_context_binary"
# The NPU runs unquantised graphs in float16, which the hub's compiler needs as an option.
_FLOAT16_OPTIONS = f"{_COMPILE_OPTIONS} --qnn_options default_graph_htp_precision=FLOAT16"
_PROFILE_OPTIONS = "--compute_unit npu --max_profiler_iterations {samples}"
_INFERENCE_OPTIONS = "--compute_unit npu"
_SUBMIT, _WAIT, _FETCH = "upload and submit", "wait for the jobs", "fetch the results"
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


@dataclass(frozen=True)
class Outcome:
    """The state of a run, and its profiles with their files once the jobs have finished."""

    run: Run
    profiles: tuple[tuple[Path, Profile], ...] = ()


def profile_on_hub(
    artifact: Artifact,
    request: Request | None,
    hub: Hub,
    progress: Progress | None = None,
    *,
    wait: bool = True,
    poll_seconds: float = POLL_SECONDS,
) -> Outcome:
    """Profile an artifact on every device of the request; None resumes the run that was interrupted.

    1. Lock the ledger beside the artifact; resolve device names against the hub's live list.
    2. Upload the binaries of each component, part by part, unless the hub has the same content.
    3. Submit the jobs: compile if requested, profile, and inference for a check. The hub queues each behind
       its inputs' jobs. Every id is on the disk before the next call.
    4. Wait for all jobs, unless `wait` is False. A split component is checked part by part, each on the
       device's outputs of the parts before it.
    5. Fetch one profile per device and store it beside the artifact. A failed job is its component's error.

    Raises UsageError for a request that does not fit the artifact, an unknown device, and nothing to resume;
    VendorError if the hub fails or refuses; ArtifactError, ResourceError.
    """
    progress = progress or Progress()
    with Book(profiles_dir(artifact)) as book:
        if request is None:
            run = _unfinished(book.ledger, artifact, hub)
            progress.say(f"resuming the run of {run.begun}: {', '.join(run.request.devices)}")
        else:
            run = _begin(artifact, request, hub)
        progress.plan(dict.fromkeys((_SUBMIT, _WAIT, _FETCH) if wait else (_SUBMIT,), 0.0))
        flow = _HubRun(artifact, hub, book, run, progress)
        flow.submit()
        if not wait:
            return Outcome(flow.run)
        flow.wait(poll_seconds)
        return flow.fetch()


def refresh_jobs(artifact: Artifact, hub: Hub | None) -> tuple[Run, ...]:
    """Return all runs of an artifact, oldest first; with a hub, update the states first.

    Errors as in `profile_on_hub`.
    """
    written = read_ledger(profiles_dir(artifact) / LEDGER).runs
    if hub is None or all(run.finished for run in written):
        return written
    with Book(profiles_dir(artifact)) as book:
        for run in book.ledger.runs:
            if run.hub == hub.url and not run.finished:
                _HubRun(artifact, hub, book, run, Progress()).look()
        return book.ledger.runs


def resume_command(artifact: Artifact) -> str:
    """Return the command that resumes a run. It names the artifact, as another may be the newest later."""
    return shlex.join(["mobilevd-deploy", "profile", "hub", str(artifact.root), "--resume"])


class _HubRun:
    """One run, step by step; `run` always equals the ledger on disk."""

    def __init__(self, artifact: Artifact, hub: Hub, book: Book, run: Run, progress: Progress) -> None:
        self.run = run
        self._artifact = artifact
        self._hub = hub
        self._book = book
        self._progress = progress
        self._components = [artifact.manifest.component(name) for name in run.request.components]
        self._handles: dict[str, Any] = {}
        self._words: dict[str, str] = {}
        self._host: dict[str, tuple[dict[str, Array], Array]] = {}

    def submit(self) -> None:
        """Upload and submit everything that is not in the ledger."""
        self._book.put(self.run)
        self._hub.retry = f"{resume_command(self._artifact)}, which uploads nothing again"
        self._progress.begin(_SUBMIT)
        for component in self._components:
            self._progress.say(f"{component.name} ...")
            self._submit_ready(component)
        self._progress.end()

    def _submit_ready(self, component: Component) -> None:
        """Submit the jobs of a component that are not in the ledger and whose inputs exist."""
        for target in self.run.targets:
            for part in range(self._parts(component, target)):
                if self.run.job("profile", component.name, target, part) is None:
                    self._submit("profile", component, target, part)
                checked = self.run.job("inference", component.name, target, part)
                if self.run.request.check and checked is None and self._given(component, target, part):
                    self._submit("inference", component, target, part)

    def _given(self, component: Component, target: HostedPhone, part: int) -> bool:
        """Return whether the device has computed the outputs of all parts before this one."""
        before = [self.run.job("inference", component.name, target, earlier) for earlier in range(part)]
        return all(job is not None and job.state == "done" for job in before)

    def _submit(self, kind: JobKind, component: Component, target: HostedPhone, part: int) -> None:
        model = self._runnable(component, target, part)
        dataset, options = None, _PROFILE_OPTIONS.format(samples=self.run.request.samples)
        if kind == "inference":
            dataset, options = self._dataset(component, target, part), _INFERENCE_OPTIONS
        name = self._name(component, kind, part)
        id, url = self._hub.submit_run(
            model, target, name, " ".join(filter(None, (options, self.run.runtime_option))), dataset
        )
        self._add(HubJob(kind, component.name, target.device, target.os, id, url, model, now(), part=part))

    def _parts(self, component: Component, target: HostedPhone) -> int:
        return 1 if self.run.request.compile else len(own_binary(component, target).parts)

    def _runnable(self, component: Component, target: HostedPhone, part: int) -> str:
        """Return the id of the model that the device runs; its compile job may still be running."""
        if not self.run.request.compile:
            return self._own_model(component, target, part)
        job = self.run.job("compile", component.name, target)
        if job is None:
            model = self._source_model(component)
            options = _COMPILE_OPTIONS if "quantised" in component.files else _FLOAT16_OPTIONS
            name = self._name(component, "compile", 0)
            id, url, made = self._hub.submit_compile(model, target, name, options)
            job = HubJob("compile", component.name, target.device, target.os, id, url, model, now(), made)
            self._add(job)
        assert job.target is not None
        return job.target

    def wait(self, poll_seconds: float) -> None:
        """Poll until all jobs have finished, including those that need the outputs of others."""
        self._progress.begin(_WAIT)
        while True:
            left, known = self.look(), len(self.run.jobs)
            for component in self._components:
                self._submit_ready(component)
            if not left and len(self.run.jobs) == known:
                break
            time.sleep(poll_seconds)
        self._progress.end()

    def look(self) -> bool:
        """Poll every unfinished job once and record changes; return whether jobs are left."""
        for job in self.run.jobs:
            if job.state != "submitted":
                continue
            if lost := self._lost(job):
                self._update(dataclasses.replace(job, state="failed", reason=lost))
                continue
            word, finished, reason = self._hub.status(self._handle(job))
            if word != self._words.get(job.id):
                self._words[job.id] = word
                part = f" part {job.part + 1}" if job.part else ""
                self._progress.say(
                    f"{job.component}{part} on {job.device}: {job.kind} {word.lower().replace('_', ' ')}"
                )
            if finished:
                self._update(dataclasses.replace(job, state="failed" if reason else "done", reason=reason))
        return any(job.state == "submitted" for job in self.run.jobs)

    def fetch(self) -> Outcome:
        """Turn finished jobs into one profile per target and store the profiles."""
        self._progress.begin(_FETCH)
        profiles = []
        for target in self.run.targets:
            profile = self._profile(target)
            path = save_profile(profile, self._book.folder)
            self._put(saved=self.run.saved | {target.asked_for: path.name})
            profiles.append((path, profile))
        self._put(finished=True)
        self._progress.end()
        return Outcome(self.run, tuple(profiles))

    def _profile(self, target: HostedPhone) -> Profile:
        components = tuple(self._measure(component, target) for component in self._components)
        compiled = self._compiled(target)
        tools = {"qai-hub": self._hub.client_version, "hub": self._hub.url} | compiled
        if self.run.runtime is not None:
            tools["qairt on the device (hub)"] = self.run.runtime
        notes = [*target.notes, *runtime_notes(compiled.values(), self.run.runtime, "the hub's")]
        if self.run.request.compile:
            source = {"onnx": "ONNX", "aimet": "ONNX and AIMET's encodings"}[self.run.request.compile]
            notes.append(f"compiled by the hub from {source}: this is not a context binary of the artifact")
        else:
            for component in self._components:
                if (count := self._parts(component, target)) > 1:
                    notes.append(
                        f"{component.name} is {count} binaries, profiled one by one: its times are their sums"
                    )
        if urlsplit(self._hub.url).hostname in _LOOPBACK:
            notes.append(f"{self._hub.url} is a server on this computer, not AI Hub: {MADE_UP}")
        missing = len(self._artifact.manifest.components) - len(components)
        if missing:
            notes.append(f"the total excludes {missing} of the artifact's components")
        return Profile(
            schema_version=PROFILE_VERSION,
            asked_for=target.asked_for,
            device=target.device,
            chipset=target.chipset,
            source="hub",
            created=now(),
            artifact=self._artifact.manifest.name,
            manifest_sha256=self.run.manifest_sha256,
            components=components,
            total_ms=total_ms(components),
            notes=tuple(notes),
            tools=tools,
        )

    def _compiled(self, target: HostedPhone) -> dict[str, str]:
        """Return the QAIRT version that compiled each component, as far as the hub reports it."""
        if not self.run.request.compile:
            return {f"qairt of {c.name}": own_binary(c, target).sdk for c in self._components}
        jobs = [self._job("compile", component, target, 0) for component in self._components]
        told = {job.component: self._hub.compiler(job) for job in jobs if job.state == "done"}
        return {f"qairt of {name} (hub)": version for name, version in told.items() if version is not None}

    def _measure(self, component: Component, target: HostedPhone) -> ComponentProfile:
        """Read the results of a component's jobs and join its parts."""
        parts = range(self._parts(component, target))
        compiled = self.run.job("compile", component.name, target)
        timed = [self._job("profile", component, target, part) for part in parts]
        for needed in (compiled, *timed):
            if needed is not None and needed.state == "failed":
                return ComponentProfile(component.name, None, error=self._failure(needed), where=needed.url)
        found = []
        for job in timed:
            try:
                found.append(read_result(component.name, self._hub.profile(self._handle(job))))
            except SpecError as error:
                reason = f"the result of job {job.id} is invalid: {error.what}"
                return ComponentProfile(component.name, None, error=reason, where=job.url)
        measured = dataclasses.replace(join_parts(found), where=timed[0].url)
        if not self.run.request.check:
            return measured
        for part in parts:
            checked = self._job("inference", component, target, part)
            if checked.state == "failed":
                return dataclasses.replace(measured, error=self._failure(checked))
        try:
            given = self._outputs(component, target, parts[-1])[component.outputs[0].name]
            return dataclasses.replace(measured, check=compare(self._reference(component)[1], given))
        except UsageError as error:
            return dataclasses.replace(measured, error=f"the check failed: {error.what}")

    def _job(self, kind: JobKind, component: Component, target: HostedPhone, part: int) -> HubJob:
        job = self.run.job(kind, component.name, target, part)
        assert job is not None
        return job

    def _outputs(self, component: Component, target: HostedPhone, part: int) -> dict[str, Array]:
        """Return the device's outputs of a part by name; UsageError if they are not the part's outputs."""
        names: tuple[str, ...] = (component.outputs[0].name,)
        if not self.run.request.compile:
            names = own_binary(component, target).parts[part].outputs
        found = self._hub.outputs(self._handle(self._job("inference", component, target, part)))
        if not isinstance(found, dict) or len(found) != len(names):
            raise UsageError("the device gave no output, or several")
        # The hub's compiler may rename outputs; it keeps their order.
        keys = names if set(names) == set(found) else found
        return {name: single(found[key]) for name, key in zip(names, keys, strict=True)}

    def _failure(self, job: HubJob) -> str:
        what = f"{job.kind} job {job.id} failed: {job.reason}"
        try:
            logs = self._hub.logs(self._handle(job), self._book.folder / "logs" / job.id)
        except VendorError as error:
            return f"{what} (no log: {error.what}; see {job.url})"
        return f"{what} (log: {logs[0].parent})" if logs else f"{what} (no log; see {job.url})"

    def _lost(self, job: HubJob) -> str | None:
        """Return why a job will never run (its compile job failed), or None."""
        if job.kind == "compile":
            return None
        for other in self.run.jobs:
            if other.target == job.model and other.state == "failed":
                return f"its compile job {other.id} failed"
        return None

    def _own_model(self, component: Component, target: HostedPhone, part: int) -> str:
        """Return the id of a binary of ours, with the wrapper that loads it."""
        files = own_binary(component, target).parts[part].files
        content = digest({role: entry.sha256 for role, entry in files.items()})
        name = self._name(component, "binary", part)

        def upload() -> str:
            self._artifact.verify(component)
            paths = [self._artifact.root / entry.path for entry in files.values()]
            with _zipped(f"{component.name}.onnx", paths, self._book.folder) as path:
                return self._hub.upload_model(path, name)

        return self._upload("model", content, component, upload)

    def _source_model(self, component: Component) -> str:
        """Return the id of the model that the hub's compiler starts from."""
        roles = ("quantised", "quantised_data") if "quantised" in component.files else ("model", "data")
        files = {role: component.files[role] for role in roles if role in component.files}
        how, name = self.run.request.compile, f"{self._artifact.manifest.name} {component.name}"
        content = digest({role: entry.sha256 for role, entry in files.items()} | {"": how or ""})

        def upload() -> str:
            self._artifact.verify(component)
            paths = [self._artifact.path(component, role) for role in files]
            if how == "aimet":
                with tempfile.TemporaryDirectory(prefix=".upload-", dir=self._book.folder) as scratch:
                    made = write_encodings(paths[0], Path(scratch))
                    with _zipped(f"{component.name}.aimet", made, self._book.folder) as path:
                        return self._hub.upload_model(path, name)
            if len(paths) == 1:
                return self._hub.upload_model(paths[0], name)
            with _zipped(f"{component.name}.onnx", paths, self._book.folder) as path:
                return self._hub.upload_model(path, name)

        return self._upload("model", content, component, upload)

    def _dataset(self, component: Component, target: HostedPhone, part: int) -> str:
        """Return the id of a part's inputs: this computer's, and the device's outputs of earlier parts."""
        feeds = dict(self._reference(component)[0])
        for earlier in range(part):
            feeds |= self._outputs(component, target, earlier)
        if not self.run.request.compile:
            wanted = own_binary(component, target).parts[part].inputs
            feeds = {name: feeds[name] for name in wanted}
        content = hashlib.sha256()
        for name, value in feeds.items():
            content.update(f"{name} {value.dtype} {value.shape}\n".encode())
            content.update(np.ascontiguousarray(value).tobytes())
        name = self._name(component, "inputs", part)
        return self._upload(
            "dataset", content.hexdigest(), component, lambda: self._hub.upload_dataset(feeds, name)
        )

    def _upload(
        self, kind: Literal["model", "dataset"], content: str, component: Component, upload: Callable[[], str]
    ) -> str:
        for known in self._book.ledger.uploads:
            if (known.kind, known.sha256, known.hub) == (kind, content, self._hub.url) and self._hub.has(
                known
            ):
                self._progress.say(f"{component.name}: {kind} {known.id} is uploaded already")
                return known.id
        id = upload()
        self._book.add_upload(Upload(kind, content, self._hub.url, id, now()))
        return id

    def _reference(self, component: Component) -> tuple[dict[str, Array], Array]:
        """Return the inputs and output of a component in a clip generated on this computer."""
        if not self._host:
            self._progress.say("running the artifact on this computer, for the check")
            self._host = run_on_host(self._artifact, self.run.request.image)
        return self._host[component.name]

    def _name(self, component: Component, what: str, part: int) -> str:
        place = f" part {part + 1}" if part else ""
        return f"{self._artifact.manifest.name} {component.name} {what}{place}"

    def _add(self, job: HubJob) -> None:
        self._put(jobs=(*self.run.jobs, job))

    def _update(self, job: HubJob) -> None:
        self._put(jobs=tuple(job if other.id == job.id else other for other in self.run.jobs))

    def _put(self, **changes: Any) -> None:
        self.run = dataclasses.replace(self.run, **changes)
        self._book.put(self.run)

    def _handle(self, job: HubJob) -> Any:
        if job.id not in self._handles:
            self._handles[job.id] = self._hub.open_job(job)
        return self._handles[job.id]


def own_binary(component: Component, target: HostedPhone) -> NpuBinary:
    """Return the artifact's binary of a component for a phone's chip. Raises UsageError if there is none."""
    chip = chip_called(target.chipset)
    for binary in component.npu:
        if chip is not None and chip_called(binary.target) == chip:
            return binary
    there = ", ".join(binary.target for binary in component.npu)
    raise UsageError(
        f"the artifact has no context binary of {component.name} for {target.chipset}"
        + (f", only for {there}" if there else ""),
        next_step="export again with --target for that chip, or let the hub compile: --compile-on hub",
    )


def choose_runtime(offered: Sequence[OfferedRuntime], compiled_by: str) -> tuple[str | None, str]:
    """Choose the QAIRT that runs a binary: return its version and the job option that requests it.

    Prefers the compiler's own version, then the next newer one, then the newest; None if none is offered.
    """
    if not offered:
        return None, ""
    ordered = sorted(offered, key=lambda runtime: version(runtime.full_version))
    fitting = (r for r in ordered if version(r.full_version)[:2] >= version(compiled_by)[:2])
    chosen = next(fitting, ordered[-1])
    return chosen.full_version, f"--qairt_version {chosen.api_version}"


def _begin(artifact: Artifact, request: Request, hub: Hub) -> Run:
    known = [component.name for component in artifact.manifest.components]
    if unknown := sorted(set(request.components) - set(known)):
        raise UsageError(
            f"the artifact has no component {unknown[0]!r}", next_step=f"it has {', '.join(known)}"
        )
    if not request.devices:
        raise UsageError("no device is named", next_step='for example --device "Xiaomi 14 Pro"')
    chosen = tuple(name for name in known if not request.components or name in request.components)
    request = dataclasses.replace(request, components=chosen, devices=tuple(dict.fromkeys(request.devices)))
    if not request.compile:
        without = [name for name in chosen if not artifact.manifest.component(name).npu]
        if without:
            raise UsageError(
                f"{artifact.root} has no context binary of {', '.join(without)}",
                next_step="use --compile-on hub, which compiles the ONNX files",
            )
    if request.compile == "aimet":
        floats = [name for name in chosen if "quantised" not in artifact.manifest.component(name).files]
        if floats:
            raise UsageError(
                f"{', '.join(floats)}: not quantised, so there are no encodings",
                next_step="--compile-on hub compiles the float graph",
            )
    hosted = hub.devices()
    targets = tuple(choose_hosted(name, hosted) for name in request.devices)
    runtime, option = None, ""
    if request.compile:
        runtime = next((r.full_version for r in hub.runtimes() if "default" in r.tags), None)
    else:
        binaries = [own_binary(artifact.manifest.component(n), t) for n in chosen for t in targets]
        runtime, option = choose_runtime(hub.runtimes(), max((b.sdk for b in binaries), key=version))
    return Run(
        secrets.token_hex(6),
        now(),
        hub.url,
        artifact.digest,
        request,
        targets,
        runtime=runtime,
        runtime_option=option,
    )


def _unfinished(ledger: Ledger, artifact: Artifact, hub: Hub) -> Run:
    run = next((run for run in reversed(ledger.runs) if not run.finished), None)
    if run is None:
        raise UsageError(f"{artifact.root}: no run is unfinished", next_step="profile it without --resume")
    if run.manifest_sha256 != artifact.digest:
        raise UsageError(
            f"{artifact.root} is not the artifact that the run of {run.begun} began with",
            next_step="profile it without --resume; equal files are not uploaded again",
        )
    if run.hub != hub.url:
        raise UsageError(
            f"the run of {run.begun} began on {run.hub}, the client is configured for {hub.url}",
            next_step="use the configuration of that run (QAIHUB_CLIENT_INI)",
        )
    return run


@contextlib.contextmanager
def _zipped(name: str, paths: Sequence[Path], folder: Path) -> Iterator[Path]:
    """Yield NAME.zip with a folder NAME of these files: the client's form for more than one file.

    Stored, not compressed, because weights hardly shrink; below `folder`, on the artifact's disk.
    """
    size = sum(path.stat().st_size for path in paths)
    with disk_guard(folder, size), tempfile.TemporaryDirectory(prefix=".upload-", dir=folder) as scratch:
        path = Path(scratch) / f"{name}.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for source in paths:
                archive.write(source, f"{name}/{source.name}")
        yield path
