"""Qualcomm's client for AI Hub: the only module that imports qai_hub, and late.

The client's exceptions become VendorError with the root cause in one line. Neither they nor their tracebacks
leave `Hub`, because the client's frames hold the token. Configuration is the client's own: its ini file, or
the one that QAIHUB_CLIENT_INI names.
"""

from __future__ import annotations

import contextlib
import io
import re
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from mobilevd_deploy.base.files import FULL_DISK
from mobilevd_deploy.base.tensors import Array
from mobilevd_deploy.errors import MobileVDError, ResourceError, VendorError
from mobilevd_deploy.profiling.hub.hosted import HostedDevice, HostedPhone
from mobilevd_deploy.profiling.hub.ledger import HubJob, Upload

T = TypeVar("T")

AGAIN = "run the same command again"
_PROBE_SECONDS = 5.0


@dataclass(frozen=True)
class OfferedRuntime:
    """A QAIRT version that the hub offers: "2.51", "2.51.0", and possibly the tags "default" or "latest"."""

    api_version: str
    full_version: str
    tags: tuple[str, ...]


class NotConfiguredError(VendorError):
    """The client or its token is missing."""


class Hub:
    """The vendor's client, reduced to the calls that profiling needs.

    Every call raises VendorError with the hub's reason and the next step, or ResourceError for memory and
    disk; none of the client's own exceptions passes. If the service is down, the client retries for up to
    six minutes first. Faults that no retry mends (certificates, proxies) are found by a probe before that.
    """

    def __init__(self, client: Any, config_file: Path) -> None:
        self._client = client
        self._config_file = config_file
        self.url: str = client.config.api_url
        self.retry = AGAIN
        """The advice after a temporary fault; a run that has begun puts its `--resume` command here."""
        self._probed = False

    @classmethod
    def open(cls) -> Hub:
        """Configure the client from its own file.

        Raises NotConfiguredError if the client is not installed or has no usable file.
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
                next_step="qai-hub configure --api_token TOKEN writes it; the token is on your account page "
                "of Qualcomm AI Hub (write a % in it twice)",
            )
        return cls(client, path)

    @property
    def exposed(self) -> tuple[str, str] | None:
        """The problem and its remedy if others can read the token's file, else None."""
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

    def runtimes(self) -> list[OfferedRuntime]:
        """List the versions of QAIRT that the hub offers."""
        found = self._call("list the frameworks", lambda: self._client.get_frameworks())
        return [
            OfferedRuntime(f.api_version, f.full_version, tuple(f.api_tags))
            for f in found
            if f.name.upper() == "QAIRT"
        ]

    def has(self, upload: Upload) -> bool:
        """Return whether this account can still use an upload."""
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
        """Submit a compile job; return its id, its page and the id of its future target model."""
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

    def open_job(self, job: HubJob) -> Any:
        """Return the client's object of a job."""
        return self._call(f"look for job {job.id}", lambda: self._client.get_job(job.id))

    def status(self, handle: Any) -> tuple[str, bool, str | None]:
        """Return a job's state in the hub's term, whether it has finished, and why it failed (else None)."""
        status = self._call(f"ask for job {handle.job_id}", lambda: handle.get_status())
        reason = (self.plain(status.message) or "no reason given") if status.failure else None
        return str(status.code), bool(status.finished), reason

    def profile(self, handle: Any) -> Any:
        """Return the result of a finished profile job in the client's form."""
        return self._call(f"fetch job {handle.job_id}", lambda: handle.download_profile())

    def outputs(self, handle: Any) -> Any:
        """Return the outputs of a finished inference job: lists of arrays by name, or None."""
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

    def compiler(self, job: HubJob) -> str | None:
        """Return the QAIRT version that a finished compile job used, if the hub says so."""
        from qai_hub.client import ModelMetadataKey

        model = self._call(f"look for model {job.target}", lambda: self._client.get_model(job.target))
        found = model.metadata.get(ModelMetadataKey.QAIRT_SDK_VERSION)
        return None if found is None else str(found)

    def plain(self, text: object) -> str:
        """Return a text as one line without box-drawing, object addresses and the token."""
        line = re.sub(r"[\s─│┌┐└┘|]+", " ", str(text)).strip()
        line = re.sub(r"<\S+ object at 0x[0-9a-f]+>: | \(_ssl\.c:\d+\)", "", line)
        return line.replace(self._client.config.api_token, "[token]")[:600]

    def _device(self, target: HostedPhone) -> Any:
        import qai_hub

        return qai_hub.Device(target.device, target.os)

    def _call(self, doing: str, function: Callable[[], T]) -> T:
        failure: BaseException
        try:
            # The client prints to standard output, which is for our result.
            with contextlib.redirect_stdout(io.StringIO()):
                self._probe()
                return function()
        except KeyboardInterrupt:
            failure = KeyboardInterrupt()
        except Exception as error:
            failure = self._explain(doing, error)
        # Raised outside of the handler: no traceback may lead to the client's frames, which hold the token.
        raise failure

    def _probe(self) -> None:
        """Raise at once what no retry mends: a certificate, a CA file, a proxy. One request, no token.

        The client retries these silently for 48 s. Any answer passes, and so does a service that is down or
        slow, because the client's retries are meant for that.
        """
        if self._probed:
            return
        import requests

        try:
            requests.head(self.url, timeout=_PROBE_SECONDS, auth=lambda request: request).close()
        except OSError as error:  # exceptions of requests are OSErrors
            if _Cause.of(error).permanent:
                raise
        self._probed = True

    def _explain(self, doing: str, error: Exception) -> MobileVDError:
        import requests
        from qai_hub.client import InternalError, UserError

        if isinstance(error, MemoryError):
            return ResourceError(f"AI Hub: not enough memory to {doing}")
        cause = _Cause.of(error)
        full = [e for e in _causes(error) if isinstance(e, OSError) and e.errno in FULL_DISK]
        if full:
            place = full[0].filename or tempfile.gettempdir()
            return ResourceError(
                f"AI Hub: cannot {doing}: the disk of {place} is full",
                next_step=f"free some space, or set TMPDIR to a folder on another disk; then {self.retry}",
            )
        status, url = _http_status(error)
        where = (
            "AI Hub" if url is None or url.startswith(self.url) else f"AI Hub's store {urlsplit(url).netloc}"
        )
        said = self.plain(error)
        if status is not None and status >= 400:
            return self._refused(doing, where, status, said)
        unreachable = isinstance(error, (InternalError, requests.exceptions.RequestException))
        if unreachable or cause.permanent:
            return VendorError(
                f"{where} cannot be reached: cannot {doing}: {self.plain(cause)}",
                next_step=f"{cause.advice}; then {self.retry}",
            )
        if isinstance(error, UserError):
            return VendorError(f"AI Hub cannot {doing}: {said}", next_step=_CHANGE)
        if isinstance(error, OSError):
            place = f"{error.filename}: " if error.filename else ""
            return VendorError(f"cannot {doing}: {place}{self.plain(cause)}", next_step=self.retry)
        return VendorError(
            f"AI Hub's answer makes no sense ({type(error).__name__}: {self.plain(cause)}): cannot {doing}",
            next_step=f"pip install --upgrade qai-hub, or wait; then {self.retry}",
        )

    def _refused(self, doing: str, where: str, status: int, said: str) -> VendorError:
        """Explain an HTTP error. Only faults that pass are worth the same request again."""
        if status == 404 and where == "AI Hub":
            return _UnknownIdError(
                f"AI Hub cannot {doing}: {said}",
                next_step="it may belong to another account, or be deleted; profile without --resume",
            )
        if status >= 500:
            reason, next_step = "the service is down", "wait; then {retry}"
        elif where != "AI Hub":  # an upload's address has expired; a resumed run gets a new one
            reason, next_step = said, "{retry}"
        else:
            reason, next_step = _HTTP.get(status, (said, _CHANGE))
        next_step = next_step.format(file=self._config_file, retry=self.retry)
        return VendorError(f"{where} cannot {doing}: {reason} (HTTP {status})", next_step=next_step)


class _UnknownIdError(VendorError):
    """The hub does not know an id."""


_CHANGE = (
    "the hub refuses this request, so change it as the reason says (mobilevd-deploy devices --hub lists the "
    "devices), and start a new run"
)
_HTTP: dict[int, tuple[str, str]] = {
    401: (
        "the token is refused",
        "put the token of your account page into {file}; a default entry in ~/.netrc would replace it",
    ),
    403: ("this account may not", "ask the administrator of your organisation's account"),
    413: ("it is too large for the hub", "profile fewer --components, or export a smaller model"),
    426: ("the hub no longer speaks with this client", "pip install --upgrade qai-hub"),
    429: ("the hub wants fewer calls", "wait some minutes; then {retry}"),
}


@dataclass(frozen=True)
class _Cause:
    """The root cause of a client's exception, and what to do about it.

    `permanent`: the same request fails again until somebody changes this computer's settings.
    """

    error: BaseException
    advice: str
    permanent: bool

    @classmethod
    def of(cls, error: BaseException) -> _Cause:
        """Find the root cause below an exception of requests or of the client."""
        chain = list(_causes(error))
        root = chain[-1]
        for link in chain:
            for words, advice in _PERMANENT.items():
                if re.search(words, f"{type(link).__name__}: {link}"):
                    return cls(root, advice, True)
        return cls(root, "check the network, and HTTP_PROXY and NO_PROXY", False)

    def __str__(self) -> str:
        said = self.error.strerror if isinstance(self.error, OSError) else None
        return said or str(self.error) or type(self.error).__name__


# By name and words of any exception in the chain: requests wraps them differently from version to version.
_PERMANENT = {
    r"TLS CA certificate bundle": "REQUESTS_CA_BUNDLE (or CURL_CA_BUNDLE) must name a file that exists",
    r"SSLCertVerificationError": (
        "if this network inspects TLS, save its root certificate as PEM and set REQUESTS_CA_BUNDLE to it"
    ),
    r"Missing dependencies for SOCKS": (
        "pip install 'requests[socks]' for the SOCKS proxy of ALL_PROXY or HTTPS_PROXY, or name an HTTP proxy"
    ),
    r"InvalidProxyURL|ProxySchemeUnknown|LocationParseError": (
        "correct the address in HTTP_PROXY or HTTPS_PROXY"
    ),
}


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and those below it, the root last: causes, reasons, and exceptions in arguments."""
    seen: set[int] = set()
    below: BaseException | None = error
    while below is not None and id(below) not in seen:
        seen.add(id(below))
        yield below
        held = (below.__cause__, getattr(below, "reason", None), *below.args, below.__context__)
        below = next((one for one in held if isinstance(one, BaseException) and id(one) not in seen), None)


def _http_status(error: BaseException) -> tuple[int | None, str | None]:
    """Return the HTTP status and URL behind a client's exception, which keeps them in its chain only."""
    for link in _causes(error):
        status = getattr(link, "status_code", None)
        if isinstance(status, int):
            return status, getattr(link, "url", None)
        request = getattr(link, "request", None)
        if request is not None:
            found = re.search(r"too many (\d{3}) error responses", str(link))
            return (int(found[1]) if found else None), request.url
    return None, None
