"""A loopback server that speaks AI Hub's protocol, so that the real client runs against it. READ `HubServer`.

Every number that it gives out is made up. It keeps two origins, as the client wants: the API and the object
store. An inference job really runs the uploaded ONNX file. Whatever goes wrong in a handler is answered
with 418 and kept in `broken`: on a 5xx the client would retry for minutes.
"""

from __future__ import annotations

import email
import email.policy
import hashlib
import io
import re
import socket
import tempfile
import threading
import traceback
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import h5py
import numpy as np
import onnxruntime
from qai_hub import public_api_pb2 as pb
from qai_hub.util.dataset_entries_converters import dataset_entries_to_h5, h5_to_dataset_entries

TOKEN = "s3cr3t-t0ken-that-must-never-show"
PROTOBUF = "application/x-protobuf"
S24, S25 = "Samsung Galaxy S24 (Family)", "Samsung Galaxy S25 (Family)"
DEVICES = (
    (S24, "14", ("chipset:qualcomm-snapdragon-8gen3", "hexagon:v75", "framework:qnn", "framework:onnx")),
    (S25, "15", ("chipset:qualcomm-snapdragon-8-elite-for-galaxy", "hexagon:v79", "framework:qnn")),
)
STATES = {
    "compile_job": ("CREATED", "OPTIMIZING_MODEL"),
    "profile": ("CREATED", "PROVISIONING_DEVICE", "MEASURING_PERFORMANCE"),
    "inference": ("CREATED", "PROVISIONING_DEVICE", "RUNNING_INFERENCE"),
}


@dataclass
class Fault:
    """Answers requests whose "METHOD /path" matches, `times` times, after letting `after` of them through.

    `status`: an HTTP error with `body`. Otherwise `raw` is sent as a good protobuf answer, or the
    connection is cut. `act` runs first.
    """

    pattern: str
    status: int | None = None
    body: str = ""
    raw: bytes | None = None
    times: int = 10**9
    after: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    act: Callable[[], None] | None = None


@dataclass
class _Job:
    pb: pb.Job
    kind: str
    looks: int = 0
    output: str = ""


class HubServer:
    """A context manager. What it saw: `requests`, `uploaded` (sha256 of every finished upload), `jobs`.

    What it is told: `faults`; `looks`, how often a job is asked for before it is done; `reasons`, why jobs
    whose "KIND NAME" holds the key fail; `result`, another profile detail; `noise` on inference outputs;
    `qairt`, the versions that are offered.
    `stop` and `start` are a service that dies and comes back on the same ports, remembering everything.
    """

    part_size = 1000

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self.looks = 2
        self.reasons: dict[str, str] = {}
        self.result: pb.ProfileDetail | None = None
        self.noise = 0.0
        self.qairt: dict[str, tuple[str, ...]] = {"2.49.0": ("default",), "2.51.0": ("latest",)}
        self.requests: list[str] = []
        self.uploaded: list[str] = []
        self.broken: list[str] = []
        self.models: dict[str, pb.Model] = {}
        self.contents: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.made_from: dict[str, str] = {}
        self.datasets: dict[str, bytes] = {}
        self.jobs: dict[str, _Job] = {}
        self.bodies: list[bytes] = []
        self._lock = threading.RLock()
        self._ports = [0, 0]
        self._servers: list[ThreadingHTTPServer] = []
        self._numbers: dict[str, int] = {}

    def __enter__(self) -> HubServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def api(self) -> str:
        return f"http://127.0.0.1:{self._ports[0]}/"

    @property
    def store(self) -> str:
        return f"http://127.0.0.1:{self._ports[1]}/"

    def ini(self, path: Path, token: str = TOKEN) -> Path:
        path.write_text(
            f"[api]\napi_token = {token}\napi_url = {self.api}\nweb_url = {self.api}\nverbose = True\n"
        )
        path.chmod(0o600)
        return path

    def start(self) -> None:
        for index, answer in enumerate((self._api, self._store)):
            server = ThreadingHTTPServer(("127.0.0.1", self._ports[index]), _handler(self, answer))
            server.daemon_threads = True
            self._ports[index] = server.server_address[1]
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
            self._servers.append(server)

    def stop(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()
        self._servers.clear()

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, line)) for line in self.requests)

    def fault(self, line: str) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                if fault.times and re.search(fault.pattern, line):
                    if fault.after:
                        fault.after -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None

    def _new(self, letter: str) -> str:
        with self._lock:
            self._numbers[letter] = self._numbers.get(letter, 0) + 1
            return f"{letter}{self._numbers[letter]:04}"

    def _api(
        self, method: str, url: str, body: bytes, headers: dict[str, str]
    ) -> tuple[int, bytes, dict[str, str]]:
        if headers.get("authorization") != f"token {TOKEN}":
            return 401, b"", {}
        path = urlsplit(url).path
        query = parse_qs(urlsplit(url).query)
        assert path.startswith("/api/v1/"), path
        assert path.endswith("/"), path
        with self._lock:
            answer = self._answer(method, path.removeprefix("/api/v1/").strip("/").split("/"), query, body)
        if answer is None:
            return 404, b"no such thing", {}
        return 200, answer.SerializeToString(), {"Content-Type": PROTOBUF}

    def _answer(self, method: str, path: list[str], query: dict[str, list[str]], body: bytes) -> object:
        match method, path:
            case "GET", ["devices"]:
                name = query.get("name", [""])[0]
                found = [pb.Device(name=n, os=o, attributes=a) for n, o, a in DEVICES if name in ("", n)]
                return pb.DeviceList(devices=found)
            case "GET", ["frameworks"]:
                found = [
                    pb.Framework(name="QAIRT", api_version=v[:4], full_version=v, api_tags=tags)
                    for v, tags in self.qairt.items()
                ]
                return pb.FrameworkList(frameworks=found)
            case "POST", ["models"]:
                model = pb.Model.FromString(body)
                model.model_id = self._new("m")
                self.models[model.model_id] = model
                return pb.CreateUpdateResponse(id=model.model_id)
            case "GET", ["models", id]:
                return self.models.get(id)
            case "GET", ["models", id, "multipart_upload"]:
                size = int(query["file_size"][0])
                self.parts[id] = {}
                urls = [f"{self.store}part/{id}/{i}" for i in range(-(-size // self.part_size))]
                answer = pb.FileMultipartUploadURL(
                    urls=urls, upload_id=f"u{id}", max_part_size=self.part_size
                )
                return pb.FileUploadResponse(multipart_url=answer)
            case "POST", ["models", id, "multipart_upload"]:
                done = pb.FileMultipartUploadComplete.FromString(body)
                assert done.upload_id == f"u{id}"
                parts = [self.parts[id][index] for index in range(len(self.parts[id]))]
                assert list(done.etags) == [f'"{hashlib.md5(part).hexdigest()}"' for part in parts]
                self.contents[id] = b"".join(parts)
                self.uploaded.append(hashlib.sha256(self.contents[id]).hexdigest())
                return pb.CreateUpdateResponse(id=id)
            case "POST", ["datasets"]:
                return pb.CreateUpdateResponse(id=self._new("d"))
            case "GET", ["datasets", id, "upload_url"]:
                answer = pb.FileUploadURL(
                    url=f"{self.store}form/{id}", fields={"key": id}, file_field_name="file"
                )
                return pb.FileUploadResponse(url=answer)
            case "PATCH", ["datasets", id]:
                assert id in self.datasets
                return pb.CreateUpdateResponse(id=id)
            case "GET", ["datasets", id]:
                return pb.Dataset(dataset_id=id) if id in self.datasets else None
            case "GET", ["datasets", id, "download_data"]:
                answer = pb.FileDownloadURL(url=f"{self.store}data/{id}", filename=f"{id}.h5")
                return pb.FileDownloadResponse(url=answer)
            case "POST", ["jobs"]:
                return pb.CreateUpdateResponse(id=self._create_job(pb.Job.FromString(body)))
            case "GET", ["jobs", id]:
                return self._look(id)
            case "GET", ["jobs", id, "result"]:
                return self._result(self.jobs[id])
            case "GET", ["jobs", id, "device_runs", "latest", "artifact_list", kind]:
                log = pb.NamedArtifactDownloadURL(url=f"{self.store}log/{id}", filename=f"{id}-{kind}.log")
                return pb.NamedArtifactDownloadURLList(artifacts=[log])
            case _:
                raise AssertionError(f"{method} {path}")

    def _create_job(self, job: pb.Job) -> str:
        id = self._new("j")
        if job.WhichOneof("job") == "compile_job":
            compile_job = job.compile_job
            compile_job.compile_job_id = id
            compile_job.device.CopyFrom(compile_job.devices.devices[0])
            source = compile_job.model.model_id
            assert source in self.contents, "compiling what was never uploaded"
            target = pb.Model(
                model_id=self._new("t"), model_type=pb.MODEL_TYPE_QNN_CONTEXT_BINARY, producer_id=id
            )
            target.metadata.entries[pb.MODEL_METADATA_KEY_QAIRT_SDK_VERSION] = "2.99.0-made-up"
            compile_job.target_model.CopyFrom(target)
            self.models[target.model_id], self.made_from[target.model_id] = target, source
            self.jobs[id] = _Job(job, "compile_job")
        else:
            inference = job.inference_job
            inference.inference_job_id = id
            assert inference.model.model_id in self.models
            self.jobs[id] = _Job(job, "profile" if inference.is_profiling_on else "inference")
        return id

    def _inner(self, job: _Job) -> object:
        return job.pb.compile_job if job.kind == "compile_job" else job.pb.inference_job

    def _look(self, id: str) -> pb.Job | None:
        job = self.jobs.get(id)
        if job is None:
            return None
        inner, states = self._inner(job), STATES[job.kind]
        source = inner.model.model_id
        inner.model.CopyFrom(self.models[source])
        reason = next((r for key, r in self.reasons.items() if key in f"{job.kind} {inner.name}"), None)
        if job.looks < self.looks:
            state = states[min(job.looks * len(states) // self.looks, len(states) - 1)]
        elif reason is not None:
            state, inner.failure_reason = "FAILED", reason
            job.pb.available_artifacts[:] = [pb.JOB_ARTIFACT_TYPE_HUB_LOG]
        else:
            state = "DONE"
        job.looks += 1
        inner.job_state = pb.JobState.Value(f"JOB_STATE_{state}")
        return job.pb

    def _result(self, job: _Job) -> pb.JobResult:
        result = pb.InferenceJobResult(inference_job_id=job.pb.inference_job.inference_job_id)
        if job.kind == "profile":
            result.detail.CopyFrom(self.result or made_up_detail())
        else:
            job.output = job.output or self._run(job.pb.inference_job)
            result.output_dataset_id = job.output
        return pb.JobResult(inference_job_result=result)

    def _run(self, job: pb.InferenceJob) -> str:
        model = job.model.model_id
        content = self.contents[self.made_from.get(model, model)]
        with h5py.File(io.BytesIO(self.datasets[job.dataset.dataset_id]), "r") as file:
            feeds = {name: values[0] for name, values in h5_to_dataset_entries(file).items()}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            path.write_bytes(content)
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    archive.extractall(folder)
                (path,) = Path(folder).glob("*.*/*.onnx")
            session = onnxruntime.InferenceSession(path)
            outputs = session.run(None, feeds)
        noise = [self.noise * np.random.default_rng(0).standard_normal(o.shape) for o in outputs]
        values = [(o + n).astype(np.float32) for o, n in zip(outputs, noise, strict=True)]
        buffer, id = io.BytesIO(), self._new("d")
        with h5py.File(buffer, "w") as file:
            dataset_entries_to_h5({f"output_{i}": [value] for i, value in enumerate(values)}, file)
        self.datasets[id] = buffer.getvalue()
        return id

    def _store(
        self, method: str, url: str, body: bytes, headers: dict[str, str]
    ) -> tuple[int, bytes, dict[str, str]]:
        assert "authorization" not in headers, "the token must not go to the object store"
        match method, urlsplit(url).path.strip("/").split("/"):
            case "PUT", ["part", id, index]:
                self.parts[id][int(index)] = body
                return 200, b"", {"ETag": f'"{hashlib.md5(body).hexdigest()}"'}
            case "POST", ["form", id]:
                head = f"Content-Type: {headers['content-type']}\r\n\r\n".encode()
                form = email.message_from_bytes(head + body, policy=email.policy.HTTP)
                fields = {p.get_param("name", header="content-disposition"): p for p in form.iter_parts()}
                assert fields["key"].get_content().strip() == id
                self.datasets[id] = fields["file"].get_payload(decode=True)
                return 204, b"", {}
            case "GET", ["data", id]:
                return 200, self.datasets[id], {}
            case "GET", ["log", id]:
                return 200, f"{id}: what the hub wrote down, and by mistake {TOKEN}".encode(), {}
            case _:
                raise AssertionError(f"{method} {url}")


def made_up_detail(samples: tuple[int, ...] = (9000, 2000, 3000, 4000)) -> pb.ProfileDetail:
    """A profile with made-up numbers, in us and bytes."""
    memory = pb.ProfileDetail.MemoryUsage(peak=pb.Range(lower=1_000_000, upper=5_000_000))
    layers = [
        pb.LayerDetail(
            name=f"made-up-{i}",
            layer_type_name="Conv",
            compute_unit=pb.COMPUTE_UNIT_NPU,
            execution_time=100 * i,
        )
        for i in range(7)
    ]
    layers.append(
        pb.LayerDetail(name="made-up-cast", layer_type_name="Cast", compute_unit=pb.COMPUTE_UNIT_CPU)
    )
    return pb.ProfileDetail(
        major_version=1,
        minor_version=2,
        execution_time=min(samples, default=0),
        all_execution_times=samples,
        cold_load_time=800_000,
        warm_load_time=300_000,
        execution_memory=memory,
        layer_details=layers,
    )


def _handler(server: HubServer, answer: Callable[..., tuple[int, bytes, dict[str, str]]]) -> type:
    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            line = f"{self.command} {urlsplit(self.path).path}"
            headers = {name.lower(): value for name, value in self.headers.items()}
            body = self.rfile.read(int(headers.get("content-length", 0)))
            fault = server.fault(line)
            server.requests.append(line)
            if fault is not None:
                if fault.act is not None:
                    fault.act()
                if fault.status is not None:
                    return self.send(fault.status, fault.body.encode(), fault.headers)
                if fault.raw is not None:
                    return self.send(200, fault.raw, {"Content-Type": PROTOBUF} | fault.headers)
                self.connection.shutdown(socket.SHUT_RDWR)
                return None
            try:
                return self.send(*answer(self.command, self.path, body, headers))
            except Exception:
                server.broken.append(traceback.format_exc())
                return self.send(418, b"the test server is broken", {})

        do_GET = do_POST = do_PUT = do_PATCH = handle_any  # noqa: N815

        def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    return Handler
