"""The real client on networks that refuse it: the root cause in one line, at once, and the remedy."""

from __future__ import annotations

import errno
import os
import re
import shutil
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import requests

from mobilevd_deploy.errors import MobileVDError, ResourceError, VendorError
from mobilevd_deploy.profiling.hub.client import Hub
from tests.support.hub_server import TOKEN, HubServer

PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")


@pytest.fixture(autouse=True)
def plain_network(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with HubServer() as server:
        monkeypatch.setenv("QAIHUB_CLIENT_INI", str(server.ini(tmp_path / "client.ini")))
        yield Hub.open()
        assert not server.broken


def behind(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """Configure the client for a service at `url`."""
    path = tmp_path / "client.ini"
    path.write_text(f"[api]\napi_token = {TOKEN}\napi_url = {url}\nweb_url = {url}\n")
    path.chmod(0o600)
    monkeypatch.setenv("QAIHUB_CLIENT_INI", str(path))
    return Hub.open()


def refusal(hub: Hub, kind: type[MobileVDError] = VendorError) -> MobileVDError:
    """Return the error of one call, which must come at once, in one line, and without the token."""
    begun = time.monotonic()
    with pytest.raises(kind) as caught:
        hub.devices()
    assert time.monotonic() - begun < 20  # the client's own retries take 48 s on an idle machine
    error = caught.value
    assert "\n" not in error.what
    assert TOKEN not in str(error)
    assert (error.__cause__, error.__context__) == (None, None)
    assert "object at 0x" not in error.what
    assert error.next_step
    assert "the same command again" in error.next_step
    return error


@pytest.fixture
def inspected(tmp_path: Path) -> Iterator[str]:
    """A TLS server whose certificate nobody vouches for, as a network that inspects TLS presents."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        [
            *(
                "openssl",
                "req",
                "-x509",
                "-newkey",
                "rsa:2048",
                "-nodes",
                "-days",
                "2",
                "-subj",
                "/CN=localhost",
            ),
            *("-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"https://localhost:{server.server_address[1]}/"
    server.shutdown()
    server.server_close()


def test_a_certificate_that_nobody_vouches_for(
    inspected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = refusal(behind(inspected, tmp_path, monkeypatch))
    assert error.what == (
        "AI Hub cannot be reached: cannot list the devices: "
        "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed certificate"
    )
    assert "set REQUESTS_CA_BUNDLE to it" in str(error.next_step)


def test_a_missing_file_of_certificates(
    inspected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/no/such.pem")
    error = refusal(behind(inspected, tmp_path, monkeypatch))
    assert "TLS CA certificate bundle, invalid path: /no/such.pem" in error.what
    assert "REQUESTS_CA_BUNDLE (or CURL_CA_BUNDLE) must name a file that exists" in str(error.next_step)


@pytest.mark.parametrize(
    ("proxy", "cause", "advice"),
    [
        ("socks5://127.0.0.1:9", "Missing dependencies for SOCKS support", "pip install 'requests[socks]'"),
        ("http://", "check proxy URL", "correct the address in HTTP_PROXY"),
        ("http://:80:90/", "not a valid host", "correct the address in HTTP_PROXY"),
    ],
)
def test_a_proxy_that_cannot_be_used(
    proxy: str, cause: str, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if proxy.startswith("socks"):
        monkeypatch.setitem(sys.modules, "socks", None)
    monkeypatch.setenv("HTTP_PROXY", proxy)
    error = refusal(behind("http://hub.invalid/", tmp_path, monkeypatch))
    assert cause.lower() in error.what.lower()
    assert advice in str(error.next_step)


@pytest.mark.parametrize(
    ("url", "cause"),
    [
        ("http://hub.invalid/", "Name or service not known|Temporary failure|nodename"),
        ("http://127.0.0.1:9/", "refused"),
    ],
)
def test_a_service_that_is_away_keeps_its_reason(
    url: str, cause: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
    error = refusal(behind(url, tmp_path, monkeypatch))
    assert re.search(cause, error.what)
    assert "check the network, and HTTP_PROXY and NO_PROXY" in str(error.next_step)


def test_a_full_temporary_folder(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also where the client wraps the error in one of its own."""

    def full(wrapped: bool) -> None:
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "upload.h5"))
        except OSError as error:
            if wrapped:
                raise ValueError("upload failed") from error
            raise

    for wrapped in (False, True):
        monkeypatch.setattr(hub._client, "get_devices", lambda wrapped=wrapped: full(wrapped))
        error = refusal(hub, ResourceError)
        assert error.what == f"AI Hub: cannot list the devices: the disk of {tmp_path / 'upload.h5'} is full"
        assert "set TMPDIR" in str(error.next_step)


def test_a_file_that_may_not_be_read_is_not_the_networks_fault(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/secret/model.onnx")

    monkeypatch.setattr(hub._client, "get_devices", refuse)
    assert refusal(hub).what == "cannot list the devices: /secret/model.onnx: Permission denied"


def test_the_probe_sends_no_token_and_only_once(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[requests.PreparedRequest] = []
    send = requests.Session.send

    def note(
        session: requests.Session, request: requests.PreparedRequest, **options: object
    ) -> requests.Response:
        seen.append(request)
        return send(session, request, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(requests.Session, "send", note)
    assert len(hub.devices()) == len(hub.devices()) == 2
    probes = [request for request in seen if request.method == "HEAD"]
    assert [dict(request.headers).get("Authorization") for request in probes] == [None]
