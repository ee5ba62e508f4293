"""Runs during a long outage of AI Hub: writes results/hub_faults.json and prints the table.

    python benchmarks/hub_faults.py

The vendor's client retries such faults for up to six minutes, which is too long for the tests. Here each
fault has its own process, a loopback server and the real client. The run must end with one clear error
(exit code 3). When the service is back, `--resume` must finish the run without a second upload. Needs no
account and no network. The result records how long the client retries.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _common import write_result
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))

from mobilevd_deploy.artifact.artifact import Artifact
from mobilevd_deploy.errors import VendorError
from mobilevd_deploy.profiling.hub.client import Hub
from mobilevd_deploy.profiling.hub.ledger import Request
from mobilevd_deploy.profiling.hub.run import profile_on_hub
from mobilevd_deploy.profiling.store import profiles_dir
from tests.support.hub_server import S24, TOKEN, Fault, HubServer
from tests.support.tiny_artifact import write_artifact

FAULTS: dict[str, Callable[[HubServer], Fault]] = {
    "too many calls, list of devices": lambda _: Fault("GET .*devices", status=429),
    "too many calls, submitting": lambda _: Fault("POST .*jobs", status=429),
    "internal error, list of devices": lambda _: Fault("GET .*devices", status=500),
    "internal error, submitting": lambda _: Fault("POST .*jobs", status=500),
    "unavailable while waiting": lambda _: Fault("GET .*jobs/j", status=503, after=6),
    "store unavailable in mid-upload": lambda _: Fault("PUT /part/m0004", status=503, after=1),
    "store cuts the line in mid-upload": lambda _: Fault("PUT /part/m0004", after=1),
    "service dies in mid-upload": lambda server: Fault("PUT /part/m0004/1", times=1, act=server.stop),
    "service dies while submitting": lambda server: Fault("POST .*jobs", times=1, after=1, act=server.stop),
    "service dies while waiting": lambda server: Fault("GET .*jobs/j", times=1, after=5, act=server.stop),
}


def suffer(name: str, results: multiprocessing.Queue[dict[str, Any]]) -> None:
    """Run during a fault, resume after it, and return what happened."""
    with tempfile.TemporaryDirectory() as folder, HubServer() as server:
        os.environ["QAIHUB_CLIENT_INI"] = str(server.ini(Path(folder) / "client.ini"))
        os.chdir(
            folder
        )  # the advice names the artifact; a fixed path makes the result equal on every machine
        write_artifact(Path("tiny"))
        artifact = Artifact.open("tiny")
        hub = Hub.open()
        server.faults.append(FAULTS[name](server))
        begun = time.monotonic()
        row: dict[str, Any] = {"fault": name, "error": None}
        try:
            profile_on_hub(artifact, Request((S24,), compile="onnx"), hub, poll_seconds=0.05)
        except VendorError as error:
            row |= {"error": error.what, "next_step": error.next_step, "exit_code": error.exit_code}
        row["seconds_until_error"] = round(time.monotonic() - begun, 1)
        server.faults.clear()
        server.stop()
        server.start()
        # The list of devices is the first call; before it there is nothing to resume.
        begun_before = (profiles_dir(artifact) / "ledger.json").exists()
        request = None if begun_before else Request((S24,), compile="onnx")
        outcome = profile_on_hub(artifact, request, hub, poll_seconds=0.05)
        files = [path for path in Path(folder).rglob("*") if path.is_file() and path.suffix != ".ini"]
        row |= {
            "resumed": outcome.run.finished and not outcome.profiles[0][1].errors,
            "uploads": len(server.uploaded),
            "token_shown": any(TOKEN.encode() in path.read_bytes() for path in files)
            or TOKEN in json.dumps(row),
        }
        results.put(row)


def main() -> None:
    """Run all faults in parallel, and fail unless each ends as described."""
    context = multiprocessing.get_context("fork")
    results: multiprocessing.Queue[dict[str, Any]] = context.Queue()
    names = sys.argv[1:] or list(FAULTS)
    processes = [context.Process(target=suffer, args=(name, results)) for name in names]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    rows = [results.get() for process in processes if process.exitcode == 0]
    rows.sort(key=lambda row: names.index(row["fault"]))
    table = Table("fault", "seconds until the error", "error", "uploads of 4", "resumed")
    for row in rows:
        table.add_row(
            row["fault"],
            str(row["seconds_until_error"]),
            row["error"],
            str(row["uploads"]),
            str(row["resumed"]),
        )
    Console().print(table)
    kept = all(r["error"] and r["resumed"] and r["uploads"] == 4 and not r["token_shown"] for r in rows)
    if len(rows) < len(names) or not kept:
        sys.exit("a fault did not end as promised")
    if names == list(FAULTS):
        write_result("hub_faults", {"rows": rows})


if __name__ == "__main__":
    main()
