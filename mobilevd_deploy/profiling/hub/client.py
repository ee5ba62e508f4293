"""Qualcomm's client for AI Hub: its errors become ours, and the token stays inside."""

from __future__ import annotations

import contextlib
import errno
import io
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from mobilevd_deploy.base.tensors import Array
from mobilevd_deploy.errors import MobileVDError, ResourceError, VendorError
from mobilevd_deploy.profiling.hub.hosted import HostedDevice, HostedPhone
from mobilevd_deploy.profiling.hub.ledger import HubJob, Upload

T = TypeVar("T")


AGAIN = "the same command again"


@dataclass(frozen=True)
class OfferedRuntime:
    """A QAIRT that the hub offers: "2.51", "2.51.0", and perhaps the tags "default" or "latest"."""

    api_version: str
    full_version: str
    tags: tuple[str, ...]


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

    def runtimes(self) -> list[OfferedRuntime]:
        """List the versions of QAIRT that the hub offers."""
        found = self._call("list the frameworks", lambda: self._client.get_frameworks())
        return [
            OfferedRuntime(f.api_version, f.full_version, tuple(f.api_tags))
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

    def open_job(self, job: HubJob) -> Any:
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

    def compiler(self, job: HubJob) -> str | None:
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
