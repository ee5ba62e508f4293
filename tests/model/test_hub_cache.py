"""Ids of the Hugging Face Hub: what is downloaded, what the cache gives, and what to do without a network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlparse

import pytest
from huggingface_hub import constants
from safetensors.torch import load_file

from mobilevd_deploy.errors import CheckpointError
from mobilevd_deploy.model.checkpoint import open_checkpoint
from mobilevd_deploy.model.hub_cache import HubId, choose_files, parse_hub_id
from tests.support import ROOT
from tests.support.svd_folders import write_svd_folder

COMMIT = "9c1a" * 10


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("someone/tiny-svd", HubId("someone/tiny-svd")),
        ("someone/svd_v1.1@v2", HubId("someone/svd_v1.1", "", "v2")),
        ("someone/svd@refs/pr/1", HubId("someone/svd", "", "refs/pr/1")),
        ("someone/svd/sub/a.safetensors@main", HubId("someone/svd", "sub/a.safetensors", "main")),
        ("someone/svd.safetensors", None),
        ("/someone/svd", None),
        ("./someone/svd", None),
        ("svd", None),
        ("someone/svd/unet", None),
        ("a b/c", None),
    ],
)
def test_ids(text: str, wanted: HubId | None) -> None:
    assert parse_hub_id(text) == wanted


def test_a_path_in_a_folder_that_exists_is_no_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    assert parse_hub_id("models/svd") is None
    with pytest.raises(CheckpointError, match=r"models/svd: no such file or folder$"):
        open_checkpoint("models/svd")


def test_files_of_a_repository() -> None:
    """Those of stabilityai/stable-video-diffusion-img2vid-xt: the single files and fp16 are not needed."""
    configs = ["unet/config.json", "vae/config.json", "image_encoder/config.json"]
    weights = [f"{part}/diffusion_pytorch_model{{}}.safetensors" for part in ("unet", "vae")]
    weights.append("image_encoder/model{}.safetensors")
    preprocessor = "feature_extractor/preprocessor_config.json"
    files = [*configs, preprocessor, *(w.format(v) for w in weights for v in ("", ".fp16"))]
    files += ["README.md", "model_index.json", "svd_xt.safetensors", "svd_xt_image_decoder.safetensors"]
    files += ["scheduler/scheduler_config.json", "unet/diffusion_pytorch_model.bin"]
    wanted = sorted([*configs, preprocessor, *(w.format("") for w in weights)])
    assert sorted(choose_files(files, "x/y")) == wanted
    half = [file for file in files if ".fp16" in file or file.endswith(".json")]
    assert sorted(choose_files(half, "x/y")) == sorted(
        [*configs, preprocessor, *(w.format(".fp16") for w in weights)]
    )
    shards = [f"unet/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = "unet/diffusion_pytorch_model.safetensors.index.json"
    assert sorted(choose_files([configs[0], *shards, index], "x/y")) == sorted([configs[0], *shards, index])
    assert choose_files(["a.safetensors", "README.md"], "x/y") == ["a.safetensors"]
    with pytest.raises(CheckpointError, match=r"2 files of weights: a\.safetensors, b\.ckpt"):
        choose_files(["a.safetensors", "b.ckpt"], "x/y")


class Hub(BaseHTTPRequestHandler):
    """The parts of the Hub's interface that a download needs, for one repository with one commit."""

    folder: Path
    fetched: list[str]

    def _answer(self, body: bool) -> None:
        path = urlparse(self.path).path
        files = sorted(f.relative_to(self.folder).as_posix() for f in self.folder.rglob("*") if f.is_file())
        headers = {"X-Repo-Commit": COMMIT}
        if path.startswith("/api/models/someone/tiny-svd/tree/"):
            entries = [
                {"type": "file", "path": f, "size": (self.folder / f).stat().st_size, "oid": f"{i:040x}"}
                for i, f in enumerate(files)
            ]
            content = json.dumps(entries).encode()
        elif path.startswith("/api/models/someone/tiny-svd"):
            siblings = [{"rfilename": file} for file in files]
            content = json.dumps({"id": "someone/tiny-svd", "sha": COMMIT, "siblings": siblings}).encode()
        elif path.startswith(f"/someone/tiny-svd/resolve/{COMMIT}/"):
            name = path.split(f"{COMMIT}/")[1]
            content = (self.folder / name).read_bytes()
            headers["ETag"] = f'"{files.index(name):040x}"'
            if body:
                self.fetched.append(name)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def do_GET(self) -> None:
        self._answer(True)

    def do_HEAD(self) -> None:
        self._answer(False)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, type[Hub]]]:
    handler = type("OneHub", (Hub,), {"folder": write_svd_folder(tmp_path / "repository"), "fetched": []})
    (handler.folder / "svd.safetensors").write_bytes(bytes(1000))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    server.server_close()


OPEN = """
import sys
from mobilevd_deploy.errors import CheckpointError
from mobilevd_deploy.model.checkpoint import open_checkpoint
try:
    opened = open_checkpoint(sys.argv[1], notice=print)
    print(opened.path, opened.spec.name, float(opened.load("unet").conv_in.bias.sum()))
except CheckpointError as error:
    print(error)
"""


def open_in_a_child(text: str, cache: Path, **environment: str) -> list[str]:
    """The client reads its environment when it is imported."""
    values = {"HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
    ended = subprocess.run(
        [sys.executable, "-c", OPEN, text],
        env={**os.environ, "PYTHONPATH": str(ROOT), **values, **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    return ended.stdout.splitlines()


def test_a_repository_is_downloaded_once_without_what_is_not_needed(
    hub: tuple[str, type[Hub]], tmp_path: Path
) -> None:
    url, server = hub
    notice, result = open_in_a_child("someone/tiny-svd", tmp_path / "cache", HF_ENDPOINT=url)
    assert notice == "someone/tiny-svd: downloads 7 of 8 files, where the cache lacks them"
    path, name, total = result.split()
    weights = load_file(server.folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert (name, float(total)) == ("tiny-svd", float(weights["conv_in.bias"].sum()))
    assert COMMIT in path
    assert len(server.fetched) == 7
    assert "svd.safetensors" not in server.fetched
    # Without the network, the same id finds the cached files.
    again = open_in_a_child("someone/tiny-svd", tmp_path / "cache", HF_HUB_OFFLINE="1")
    assert again[-1] == result
    assert len(server.fetched) == 7
    missing = open_in_a_child("someone/other", tmp_path / "cache", HF_ENDPOINT=url)
    assert missing[0].startswith("someone/other: no such file or folder, and it cannot be downloaded")
    assert "404" in missing[0]


def test_offline_the_next_step_says_what_to_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint("someone/tiny-svd")
    assert "cannot be downloaded from the Hugging Face Hub" in caught.value.what
    assert caught.value.next_step is not None
    assert "hf download someone/tiny-svd --include 'unet/*' --include 'vae/*'" in caught.value.next_step
    assert "copy FOLDER here and give its path" in caught.value.next_step
