"""Qualcomm AI Hub: compile, profile and check an artifact on hosted phones; what is done is not done again.

profile_on_hub()        READ FIRST: the whole flow
├── Hub                 the vendor's client: its errors become ours, and the token stays inside
└── Book                the ledger on disk: what was uploaded and submitted
    └── Ledger
        ├── Upload      one per content and hub
        └── Run         one call of `profile`, with what it was asked for
            ├── Target  a device: what the user typed, and the hosted phone that stands for it
            └── Job

The only file that imports qai_hub, and late. Configuration is the client's own: its ini file, or the one
that QAIHUB_CLIENT_INI names. The client's exceptions and their tracebacks never leave `Hub`, because frames
of the client hold the token.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import io
import json
import os
import re
import secrets
import shlex
import shutil
import stat
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, TypeVar
from urllib.parse import urlsplit

import numpy as np

from mobilevd_deploy.artifact.artifact import Artifact
from mobilevd_deploy.artifact.manifest import Component, NpuBinary
from mobilevd_deploy.base.files import (
    LockHeldError,
    digest,
    disk_guard,
    remove_leftovers,
    take_lock,
    write_durably,
)
from mobilevd_deploy.base.progress import Progress
from mobilevd_deploy.base.tensors import Array, sqnr_db
from mobilevd_deploy.config.devices import chip_called
from mobilevd_deploy.config.strict import from_dict
from mobilevd_deploy.errors import (
    ArtifactError,
    MobileVDError,
    ResourceError,
    SpecError,
    UsageError,
    VendorError,
)
from mobilevd_deploy.profiles import (
    MADE_UP,
    Check,
    ComponentProfile,
    Latency,
    OpTime,
    Profile,
    join_parts,
    now,
    profiles_dir,
    runtime_notes,
    save_profile,
    total_ms,
    version,
)
from mobilevd_deploy.profiles import SCHEMA_VERSION as PROFILE_VERSION
from mobilevd_deploy.profiling.hub.hosted import HostedDevice, HostedPhone, choose_hosted
from mobilevd_deploy.quantize.encodings import write_encodings
from mobilevd_deploy.runtime.recording import run_on_host

T = TypeVar("T")
JobKind = Literal["compile", "profile", "inference"]
JobState = Literal["submitted", "done", "failed"]

LEDGER = "ledger.json"
LEDGER_VERSION: Final = 1
POLL_SECONDS = 10.0
SLOWEST = 5
AGAIN = "the same command again"

_COMPILE_OPTIONS = "--target_runtime qnn_context_binary"
# What is not quantised runs in float16 on the NPU, which the hub's compiler wants to be told.
_FLOAT16_OPTIONS = f"{_COMPILE_OPTIONS} --qnn_options default_graph_htp_precision=FLOAT16"
_PROFILE_OPTIONS = "--compute_unit npu --max_profiler_iterations {samples}"
_INFERENCE_OPTIONS = "--compute_unit npu"
_SUBMIT, _WAIT, _FETCH = "upload and submit", "wait for the jobs", "fetch the results"
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


@dataclass(frozen=True)
class Runtime:
    """A QAIRT that the hub offers: "2.51", "2.51.0", and perhaps the tags "default" or "latest"."""

    api_version: str
    full_version: str
    tags: tuple[str, ...]


@dataclass(frozen=True)
class Request:
    """What a run of `profile` was asked for.

    `compile` None profiles the artifact's own context binaries. Otherwise the hub's compiler makes them:
    "onnx" from the quantised graph (the float one where there is none), "aimet" from the same graph without
    its quantisers and AIMET's encodings beside it.
    """

    devices: tuple[str, ...]
    components: tuple[str, ...] = ()
    samples: int = 100
    compile: Literal["onnx", "aimet"] | None = None
    check: bool = False
    image: str | None = None


@dataclass(frozen=True)
class Upload:
    """A model or dataset that lies on a hub; `sha256` is of what it was made from."""

    kind: Literal["model", "dataset"]
    sha256: str
    hub: str
    id: str
    time: str


@dataclass(frozen=True)
class Job:
    """A job on the hub. `model` is its input's id, `target` the id of what a compile job makes.

    `part` counts the binaries of a component that is split.
    """

    kind: JobKind
    component: str
    device: str
    os: str
    id: str
    url: str
    model: str
    time: str
    target: str | None = None
    state: JobState = "submitted"
    reason: str | None = None
    part: int = 0


@dataclass(frozen=True)
class Run:
    """One call of `profile`; `saved` maps what was asked for to the profile's file.

    `runtime` is the QAIRT version on the devices, as far as the hub tells, and `runtime_option` asks for it.
    """

    id: str
    begun: str
    hub: str
    manifest_sha256: str
    request: Request
    targets: tuple[HostedPhone, ...]
    jobs: tuple[Job, ...] = ()
    saved: dict[str, str] = field(default_factory=dict)
    finished: bool = False
    runtime: str | None = None
    runtime_option: str = ""

    def job(self, kind: JobKind, component: str, target: HostedPhone, part: int = 0) -> Job | None:
        """Return the job of that kind; two targets with the same hosted device share it."""
        wanted = (kind, component, target.device, target.os, part)
        return next((j for j in self.jobs if (j.kind, j.component, j.device, j.os, j.part) == wanted), None)


@dataclass(frozen=True)
class Ledger:
    """Everything that a later run need not do again. It never holds a token."""

    schema_version: Literal[1] = LEDGER_VERSION
    uploads: tuple[Upload, ...] = ()
    runs: tuple[Run, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """A run as it stands, and its profiles with their files; none before the jobs have finished."""

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
    """Profile an artifact on every device of the request; None goes on with the run that was interrupted.

    1. Claim the ledger beside the artifact; resolve device names against the hub's live list.
    2. Upload the binaries of each component, part by part, unless the hub has some of the same content.
    3. Submit the jobs: compile where that was asked for, profile, and inference for a check. The hub queues
       each behind those that it needs. Every id is on the disk before the next call.
    4. Wait for all of them (not with `wait` False). A check of a split component goes part by part, each on
       what the device gave for those before it.
    5. Fetch: one profile per device, stored beside the artifact. A failed job is an error of its component.

    Raises UsageError for a request that does not fit the artifact, for a device that nobody knows, and where
    there is nothing to go on with; VendorError where the hub fails or refuses; ArtifactError, ResourceError.
    """
    progress = progress or Progress()
    with Book(profiles_dir(artifact)) as book:
        if request is None:
            run = _unfinished(book.ledger, artifact, hub)
            progress.say(f"going on with the run of {run.begun}: {', '.join(run.request.devices)}")
        else:
            run = _begin(artifact, request, hub)
        progress.plan(dict.fromkeys((_SUBMIT, _WAIT, _FETCH) if wait else (_SUBMIT,), 0.0))
        flow = _Flow(artifact, hub, book, run, progress)
        flow.submit()
        if not wait:
            return Outcome(flow.run)
        flow.wait(poll_seconds)
        return flow.fetch()


def refresh_jobs(artifact: Artifact, hub: Hub | None) -> tuple[Run, ...]:
    """Return all runs of an artifact, oldest first; with a hub, states are asked for and written down.

    Errors as in `profile_on_hub`.
    """
    written = read_ledger(profiles_dir(artifact) / LEDGER).runs
    if hub is None or all(run.finished for run in written):
        return written
    with Book(profiles_dir(artifact)) as book:
        for run in book.ledger.runs:
            if run.hub == hub.url and not run.finished:
                _Flow(artifact, hub, book, run, Progress()).look()
        return book.ledger.runs


def resume_command(artifact: Artifact) -> str:
    """Return what goes on with an artifact's run; it is named, for another may be the newest by then."""
    return shlex.join(["mobilevd-deploy", "profile", str(artifact.root), "--resume"])


class NotConfiguredError(VendorError):
    """There is no client, or no token for it."""


class Hub:
    """The vendor's client, as far as we use it.

    Every call raises VendorError with the hub's reason and what to do next, or ResourceError for memory and
    disk, and never lets one of the client's own exceptions through. Where the service is down, the client
    itself retries for up to six minutes before that.
    """

    def __init__(self, client: Any, config_file: Path) -> None:
        self._client = client
        self._config_file = config_file
        self.url: str = client.config.api_url
        # What errors advise: a run that has not begun cannot be resumed.
        self.go_on = AGAIN

    @classmethod
    def open(cls) -> Hub:
        """Configure the client from its own file.

        Raises NotConfiguredError where the client is not installed, or has no usable file.
        """
        try:
            import qai_hub
            from qai_hub import api_utils
        except ImportError:
            raise NotConfiguredError(
                "the AI Hub client is not installed", next_step="pip install 'mobilevd-deploy[hub]'"
            ) from None
        path = Path(api_utils.get_config_path())
        try:
            client = qai_hub.Client()
            client.config.verbose = False
        except Exception:  # its text may hold lines of the file, and so the token: it is not repeated
            client = None
        if client is None:
            state = "is not a configuration of the client" if path.exists() else "does not exist"
            raise NotConfiguredError(
                f"AI Hub is not configured: {path} {state}",
                next_step="qai-hub configure --api_token TOKEN writes it; the token stands on your account "
                "page of Qualcomm AI Hub (a % in it must be written twice)",
            )
        return cls(client, path)

    @property
    def exposed(self) -> tuple[str, str] | None:
        """What is wrong if others can read the token's file, and what mends it."""
        if not self._config_file.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            return None
        return "others on this computer can read your token", f"chmod 600 {self._config_file}"

    @property
    def client_version(self) -> str:
        """Version of the vendor's client."""
        import qai_hub

        return str(qai_hub.__version__)

    def devices(self) -> list[HostedDevice]:
        """List the devices that can be used now."""
        found = self._call("list the devices", lambda: self._client.get_devices())
        return [HostedDevice(device.name, device.os, tuple(device.attributes)) for device in found]

    def runtimes(self) -> list[Runtime]:
        """List the versions of QAIRT that the hub offers."""
        found = self._call("list the frameworks", lambda: self._client.get_frameworks())
        return [
            Runtime(f.api_version, f.full_version, tuple(f.api_tags))
            for f in found
            if f.name.upper() == "QAIRT"
        ]

    def has(self, upload: Upload) -> bool:
        """Say whether the hub still has this upload, and lets this account use it."""
        client = self._client
        get = client.get_model if upload.kind == "model" else client.get_dataset
        try:
            found = self._call(f"look for {upload.kind} {upload.id}", lambda: get(upload.id))
        except _UnknownIdError:
            return False
        return upload.kind == "model" or not found.is_expired()

    def upload_model(self, path: Path, name: str) -> str:
        """Upload a file and return its id; a folder comes as NAME.onnx.zip."""
        return str(
            self._call(f"upload {name}", lambda: self._client.upload_model(str(path), name=name)).model_id
        )

    def upload_dataset(self, inputs: Mapping[str, Array], name: str) -> str:
        """Upload one set of inputs and return its id; the hub keeps it for 30 days."""
        entries = {key: [value] for key, value in inputs.items()}
        return str(
            self._call(f"upload {name}", lambda: self._client.upload_dataset(entries, name=name)).dataset_id
        )

    def submit_compile(
        self, model: str, target: HostedPhone, name: str, options: str
    ) -> tuple[str, str, str]:
        """Submit a compile job; return its id, its page and the id of the model that it will make."""
        job = self._call(
            f"submit {name}",
            lambda: self._client.submit_compile_job(
                self._client.get_model(model),
                device=self._device(target),
                name=name,
                options=options,
                retry=False,
            ),
        )
        made = self._call(f"submit {name}", lambda: job.get_target_model().model_id)
        return job.job_id, job.url, str(made)

    def submit_run(
        self, model: str, target: HostedPhone, name: str, options: str, dataset: str | None = None
    ) -> tuple[str, str]:
        """Submit a profile job, or an inference job on a dataset; return its id and page."""
        client = self._client
        job = self._call(
            f"submit {name}",
            lambda: client.submit_inference_job(
                client.get_model(model),
                device=self._device(target),
                inputs=None if dataset is None else client.get_dataset(dataset),
                name=name,
                options=options,
                retry=False,
                profile=dataset is None,
            ),
        )
        return job.job_id, job.url

    def open_job(self, job: Job) -> Any:
        """Return the client's object of a job."""
        return self._call(f"look for job {job.id}", lambda: self._client.get_job(job.id))

    def status(self, handle: Any) -> tuple[str, bool, str | None]:
        """Return a job's state in the hub's word, whether it has finished, and why it failed if it did."""
        status = self._call(f"ask for job {handle.job_id}", lambda: handle.get_status())
        reason = (self.plain(status.message) or "no reason given") if status.failure else None
        return str(status.code), bool(status.finished), reason

    def profile(self, handle: Any) -> Any:
        """Return the result of a profile job that is done, as the client gives it."""
        return self._call(f"fetch job {handle.job_id}", lambda: handle.download_profile())

    def outputs(self, handle: Any) -> Any:
        """Return the outputs of an inference job that is done: lists of arrays by name, or None."""
        return self._call(f"fetch job {handle.job_id}", lambda: handle.download_output_data())

    def logs(self, handle: Any, folder: Path) -> list[Path]:
        """Store the logs of a finished job in `folder`; there may be none."""
        paths = self._call(
            f"fetch the logs of job {handle.job_id}", lambda: handle.download_job_logs(str(folder))
        )
        for path in map(Path, paths):
            clean = path.read_bytes().replace(self._client.config.api_token.encode(), b"[token]")
            path.write_bytes(clean)
        return [Path(path) for path in paths]

    def compiler(self, job: Job) -> str | None:
        """Return the QAIRT version that a finished compile job used, if the hub says so."""
        from qai_hub.client import ModelMetadataKey

        model = self._call(f"look for model {job.target}", lambda: self._client.get_model(job.target))
        found = model.metadata.get(ModelMetadataKey.QAIRT_SDK_VERSION)
        return None if found is None else str(found)

    def plain(self, text: object) -> str:
        """Return a text of the hub as one line without frames, and without the token."""
        line = re.sub(r"[\s─│┌┐└┘|]+", " ", str(text)).strip()
        return line.replace(self._client.config.api_token, "[token]")[:600]

    def _device(self, target: HostedPhone) -> Any:
        import qai_hub

        return qai_hub.Device(target.device, target.os)

    def _call(self, doing: str, function: Callable[[], T]) -> T:
        failure: BaseException
        try:
            # The client prints what it does; our result goes there.
            with contextlib.redirect_stdout(io.StringIO()):
                return function()
        except KeyboardInterrupt:
            failure = KeyboardInterrupt()
        except Exception as error:
            failure = self._explain(doing, error)
        # Outside of the handler: no traceback may lead to the client's frames, which hold the token.
        raise failure

    def _explain(self, doing: str, error: Exception) -> MobileVDError:
        import requests
        from qai_hub.client import InternalError, UserError

        if isinstance(error, MemoryError):
            return ResourceError(f"AI Hub: not enough memory to {doing}")
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return ResourceError(
                f"AI Hub: the disk is full: cannot {doing}", next_step=f"free some space; then {self.go_on}"
            )
        status, url = _http_status(error)
        where = (
            "AI Hub" if url is None or url.startswith(self.url) else f"AI Hub's store {urlsplit(url).netloc}"
        )
        said = self.plain(error)
        if status == 404 and where == "AI Hub":
            return _UnknownIdError(
                f"AI Hub cannot {doing}: {said}",
                next_step="it may belong to another account, or be deleted; profile without --resume",
            )
        if status is not None and status >= 400:
            reason, next_step = _HTTP.get(status if where == "AI Hub" else 0, (said, "{go_on}"))
            if status >= 500:
                reason, next_step = "the service is down", "wait; then {go_on}"
            next_step = next_step.format(file=self._config_file, go_on=self.go_on)
            return VendorError(f"{where} cannot {doing}: {reason} (HTTP {status})", next_step=next_step)
        if isinstance(error, (InternalError, requests.exceptions.RequestException)):
            return VendorError(
                f"{where} cannot be reached: cannot {doing}",
                next_step=f"look at the network, and at HTTP_PROXY and NO_PROXY; then {self.go_on}",
            )
        if isinstance(error, UserError):
            return VendorError(f"AI Hub cannot {doing}: {said}", next_step=self.go_on)
        return VendorError(
            f"AI Hub's answer makes no sense ({type(error).__name__}): cannot {doing}",
            next_step=f"pip install --upgrade qai-hub, or wait; then {self.go_on}",
        )


class _UnknownIdError(VendorError):
    """The hub does not know an id."""


_HTTP: dict[int, tuple[str, str]] = {
    401: (
        "the token is refused",
        "put the token of your account page into {file}; a default entry in ~/.netrc would replace it",
    ),
    403: ("this account may not", "ask whoever runs your organisation's account"),
    413: ("it is too large for the hub", "profile fewer --components, or export a smaller model"),
    426: ("the hub no longer speaks with this client", "pip install --upgrade qai-hub"),
    429: ("the hub wants fewer calls", "wait some minutes; then {go_on}"),
}


def _http_status(error: BaseException | None) -> tuple[int | None, str | None]:
    """Find the HTTP status and URL behind a client's exception; it keeps them in the chain only."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        status = getattr(error, "status_code", None)
        if isinstance(status, int):
            return status, getattr(error, "url", None)
        request = getattr(error, "request", None)
        if request is not None:
            found = re.search(r"too many (\d{3}) error responses", str(error))
            return (int(found[1]) if found else None), request.url
        error = error.__cause__ or error.__context__
    return None, None


class Book:
    """The ledger in a folder, held by one process at a time; a context manager.

    Entering raises UsageError if another run holds it, ArtifactError if the ledger is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ledger = Ledger()
        self._lock: int | None = None

    def __enter__(self) -> Book:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = take_lock(self.folder / "lock")
            remove_leftovers(self.folder)
            for left in self.folder.glob(".upload-*"):
                shutil.rmtree(left)
            self.ledger = read_ledger(self.folder / LEDGER)
        except LockHeldError:
            raise UsageError(
                f"another run is profiling with {self.folder}",
                next_step="wait for it, or end it; then --resume",
            ) from None
        except OSError as error:
            self._release()
            raise UsageError(f"{self.folder} cannot be used: {error}") from error
        except MobileVDError:
            self._release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._release()

    def add_upload(self, upload: Upload) -> None:
        """Write an upload down, in place of one of the same content."""
        key = (upload.kind, upload.sha256, upload.hub)
        others = (u for u in self.ledger.uploads if (u.kind, u.sha256, u.hub) != key)
        self._write(dataclasses.replace(self.ledger, uploads=(*others, upload)))

    def put(self, run: Run) -> None:
        """Write a run down, in place of its earlier state."""
        others = tuple(other for other in self.ledger.runs if other.id != run.id)
        self._write(dataclasses.replace(self.ledger, runs=(*others, run)))

    def _write(self, ledger: Ledger) -> None:
        try:
            write_durably(self.folder / LEDGER, json.dumps(dataclasses.asdict(ledger), indent=1) + "\n")
        except OSError as error:
            raise UsageError(f"{self.folder / LEDGER} cannot be written: {error}") from error
        self.ledger = ledger

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def read_ledger(path: Path) -> Ledger:
    """Read a ledger strictly; an empty one where there is no file. ArtifactError if it is damaged."""
    try:
        return from_dict(Ledger, json.loads(path.read_bytes()))
    except FileNotFoundError:
        return Ledger()
    except (OSError, ValueError, RecursionError, SpecError) as error:
        raise ArtifactError(
            f"{path} is damaged: {error}", next_step="remove it; what it knows of uploads and jobs is lost"
        ) from error


class _Flow:
    """One run, step by step; `run` is always what lies on the disk."""

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
        """Upload and submit whatever the ledger does not have."""
        self._book.put(self.run)
        self._hub.go_on = f"{resume_command(self._artifact)}, which uploads nothing again"
        self._progress.begin(_SUBMIT)
        for component in self._components:
            self._progress.say(f"{component.name} ...")
            self._submit_ready(component)
        self._progress.end()

    def _submit_ready(self, component: Component) -> None:
        """Submit the jobs of a component that the ledger does not have and whose inputs are there."""
        for target in self.run.targets:
            for part in range(self._parts(component, target)):
                if self.run.job("profile", component.name, target, part) is None:
                    self._submit("profile", component, target, part)
                checked = self.run.job("inference", component.name, target, part)
                if self.run.request.check and checked is None and self._given(component, target, part):
                    self._submit("inference", component, target, part)

    def _given(self, component: Component, target: HostedPhone, part: int) -> bool:
        """Say whether the device has given the outputs of all parts before this one."""
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
        self._add(Job(kind, component.name, target.device, target.os, id, url, model, now(), part=part))

    def _parts(self, component: Component, target: HostedPhone) -> int:
        return 1 if self.run.request.compile else len(own_binary(component, target).parts)

    def _runnable(self, component: Component, target: HostedPhone, part: int) -> str:
        """Return the id of the model that the device runs; its compile job need not have finished."""
        if not self.run.request.compile:
            return self._own_model(component, target, part)
        job = self.run.job("compile", component.name, target)
        if job is None:
            model = self._source_model(component)
            options = _COMPILE_OPTIONS if "quantised" in component.files else _FLOAT16_OPTIONS
            name = self._name(component, "compile", 0)
            id, url, made = self._hub.submit_compile(model, target, name, options)
            job = Job("compile", component.name, target.device, target.os, id, url, model, now(), made)
            self._add(job)
        assert job.target is not None
        return job.target

    def wait(self, poll_seconds: float) -> None:
        """Ask for the jobs until all have finished, and none is left that waits for another's outputs."""
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
        """Ask once for every job that has not finished, and write down what changed; True: some are left."""
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
        """Turn finished jobs into one profile per target, and store them."""
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
            notes.append(f"the total leaves {missing} of the artifact's components out")
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
        """Return the QAIRT version that compiled each component, as far as the hub tells."""
        if not self.run.request.compile:
            return {f"qairt of {c.name}": own_binary(c, target).sdk for c in self._components}
        jobs = [self._job("compile", component, target, 0) for component in self._components]
        told = {job.component: self._hub.compiler(job) for job in jobs if job.state == "done"}
        return {f"qairt of {name} (hub)": version for name, version in told.items() if version is not None}

    def _measure(self, component: Component, target: HostedPhone) -> ComponentProfile:
        """Read the results of a component's jobs, all parts of it together."""
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
                reason = f"the result of job {job.id} makes no sense: {error.what}"
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
            return dataclasses.replace(measured, check=_compare(self._reference(component)[1], given))
        except UsageError as error:
            return dataclasses.replace(measured, error=f"the check failed: {error.what}")

    def _job(self, kind: JobKind, component: Component, target: HostedPhone, part: int) -> Job:
        job = self.run.job(kind, component.name, target, part)
        assert job is not None
        return job

    def _outputs(self, component: Component, target: HostedPhone, part: int) -> dict[str, Array]:
        """Return what the device gave for a part, by name; UsageError where it is not what the part gives."""
        names: tuple[str, ...] = (component.outputs[0].name,)
        if not self.run.request.compile:
            names = own_binary(component, target).parts[part].outputs
        found = self._hub.outputs(self._handle(self._job("inference", component, target, part)))
        if not isinstance(found, dict) or len(found) != len(names):
            raise UsageError("the device gave no output, or several")
        # The hub's compiler may name them anew; it keeps their order.
        keys = names if set(names) == set(found) else found
        return {name: _single(found[key]) for name, key in zip(names, keys, strict=True)}

    def _failure(self, job: Job) -> str:
        what = f"{job.kind} job {job.id} failed: {job.reason}"
        try:
            logs = self._hub.logs(self._handle(job), self._book.folder / "logs" / job.id)
        except VendorError as error:
            return f"{what} (its log cannot be had: {error.what}; see {job.url})"
        return f"{what} (log: {logs[0].parent})" if logs else f"{what} (no log; see {job.url})"

    def _lost(self, job: Job) -> str | None:
        """Say why a job will never run: its compile job failed."""
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
        """Return the id of what the hub's compiler starts from."""
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
        """Return the id of a part's inputs: as this computer has them, and from parts before it."""
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
                self._progress.say(f"{component.name}: {kind} {known.id} is there already")
                return known.id
        id = upload()
        self._book.add_upload(Upload(kind, content, self._hub.url, id, now()))
        return id

    def _reference(self, component: Component) -> tuple[dict[str, Array], Array]:
        """Return the inputs and output of a component as this computer makes a clip."""
        if not self._host:
            self._progress.say("running the artifact on this computer, for the check")
            self._host = run_on_host(self._artifact, self.run.request.image)
        return self._host[component.name]

    def _name(self, component: Component, what: str, part: int) -> str:
        place = f" part {part + 1}" if part else ""
        return f"{self._artifact.manifest.name} {component.name} {what}{place}"

    def _add(self, job: Job) -> None:
        self._put(jobs=(*self.run.jobs, job))

    def _update(self, job: Job) -> None:
        self._put(jobs=tuple(job if other.id == job.id else other for other in self.run.jobs))

    def _put(self, **changes: Any) -> None:
        self.run = dataclasses.replace(self.run, **changes)
        self._book.put(self.run)

    def _handle(self, job: Job) -> Any:
        if job.id not in self._handles:
            self._handles[job.id] = self._hub.open_job(job)
        return self._handles[job.id]


def own_binary(component: Component, target: HostedPhone) -> NpuBinary:
    """Return the artifact's binary of a component for the chip of a target; UsageError if it has none."""
    chip = chip_called(target.chipset)
    for binary in component.npu:
        if chip is not None and binary.target.lower() in chip.sm:
            return binary
    there = ", ".join(binary.target for binary in component.npu)
    raise UsageError(
        f"the artifact has no context binary of {component.name} for {target.chipset}"
        + (f", only for {there}" if there else ""),
        next_step="export again with --target for that chip, or let the hub compile: --compile-on hub",
    )


def choose_runtime(offered: Sequence[Runtime], compiled_by: str) -> tuple[str | None, str]:
    """Pick the QAIRT that a binary runs with: its version, and the option that asks for it.

    Its own version where the hub has it, else the next newer one, else the newest; None where it has none.
    """
    if not offered:
        return None, ""
    ordered = sorted(offered, key=lambda runtime: version(runtime.full_version))
    fitting = (r for r in ordered if version(r.full_version)[:2] >= version(compiled_by)[:2])
    chosen = next(fitting, ordered[-1])
    return chosen.full_version, f"--qairt_version {chosen.api_version}"


def _single(values: Any) -> Array:
    """Return an output of an inference job on one set of inputs; UsageError where it is none."""
    if not isinstance(values, list) or len(values) != 1:
        raise UsageError("the device gave no output, or several")
    return np.asarray(values[0])


def _compare(reference: Array, output: Array) -> Check:
    """Compare an output with this computer's; UsageError where it holds what cannot be compared."""
    if output.dtype.kind not in "fiu":
        raise UsageError(f"the device's output is {output.dtype}")
    if not np.isfinite(output).all():
        raise UsageError("the device's output holds NaN or Inf")
    value = sqnr_db(reference, output)
    return Check(value if np.isfinite(value) else None)


def read_result(component: str, result: Any) -> ComponentProfile:
    """Read what the client returns for a profile job that is done (times in us, memory in bytes).

    Raises SpecError where it is not of that form, or holds no samples.
    """
    summary = _part(result, "execution_summary", dict)
    samples = [_number(value, "all_inference_times") for value in _part(summary, "all_inference_times", list)]
    peaks = summary.get("inference_memory_peak_range") or (
        None,
        summary.get("estimated_inference_peak_memory"),
    )
    ops: dict[str, int] = {}
    times = []
    for op in _part(result, "execution_detail", list):
        unit = str(_part(op, "compute_unit", str))
        ops[unit] = ops.get(unit, 0) + 1
        if op.get("execution_time") is not None:
            ms = _number(op["execution_time"], "execution_time") / 1000
            times.append(OpTime(str(op.get("name")), str(op.get("type")), unit, ms))
    order = ("NPU", "GPU", "CPU")
    return ComponentProfile(
        component,
        Latency.of([value / 1000 for value in samples]),
        first_load_ms=_milliseconds(summary.get("first_load_time"), "first_load_time"),
        warm_load_ms=_milliseconds(summary.get("warm_load_time"), "warm_load_time"),
        peak_bytes=None if peaks[1] is None else int(_number(peaks[1], "peak memory")),
        ops={unit: ops[unit] for unit in sorted(ops, key=lambda u: order.index(u) if u in order else 3)},
        slowest=tuple(sorted(times, key=lambda op: -op.ms)[:SLOWEST]),
    )


def _part(values: Any, key: str, kind: type) -> Any:
    found = values.get(key) if isinstance(values, dict) else None
    if not isinstance(found, kind):
        raise SpecError(f"there is no {key}")
    return found


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
        raise SpecError(f"{what}: {value!r} is not a measurement")
    return float(value)


def _milliseconds(value: Any, what: str) -> float | None:
    # The protocol cannot tell 0 from a value that was never set.
    return _number(value, what) / 1000 if value else None


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
                next_step="--compile-on hub lets the hub's compiler make one from the ONNX files",
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
    """Give NAME.zip with a folder NAME of these files: how the client takes more than one file.

    Stored, not compressed: weights hardly shrink. It lies below `folder`, which has the artifact's disk.
    """
    size = sum(path.stat().st_size for path in paths)
    with disk_guard(folder, size), tempfile.TemporaryDirectory(prefix=".upload-", dir=folder) as scratch:
        path = Path(scratch) / f"{name}.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for source in paths:
                archive.write(source, f"{name}/{source.name}")
        yield path
