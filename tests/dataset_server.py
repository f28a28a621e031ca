"""A Hub on loopback: as much of its HTTP API as `load_dataset` asks for, datasets from memory.

The client reads `HF_ENDPOINT` when huggingface_hub is imported: `call_with_hub` starts a process.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" * 6 + "c0ff"  # 40 hexadecimal digits, as git has

# /api/datasets/USER/NAME[/VERB[/REVISION[/PATH]]], and without /api the files themselves.
_ADDRESS = re.compile(r"(/api)?/datasets/([^/]+/[^/]+)(?:/([^/]+)(?:/[^/]+(?:/(.+))?)?)?")


class Hub(ThreadingHTTPServer):
    """Serve `datasets`, from repository id to its files, from path to content; one commit each."""

    daemon_threads = True

    def __init__(self, datasets: dict[str, dict[str, bytes]]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.datasets = datasets
        self.requests: list[str] = []  # "METHOD /path", in order
        self.url = f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serve_datasets(datasets: dict[str, dict[str, bytes]]) -> Iterator[Hub]:
    """Run a `Hub` in a thread of its own for as long as the block lasts."""
    with Hub(datasets) as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


def call_with_hub(hub: Hub, script: str, *args: str, home: Path) -> str:
    """Run a Python script for which `hub` is the Hub and `home` its cache; return its output."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(Path(__file__).parent.parent),
    }
    run = subprocess.run(
        [sys.executable, "-c", script, *args],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # the client keeps its connections
    server: Hub

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        self.server.requests.append(f"{self.command} {address.path}")
        # Read whatever was sent: it would otherwise be taken for the next request.
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        match = _ADDRESS.fullmatch(unquote(address.path))
        api, name, verb, path = match.groups() if match else (None, "", None, None)
        if (files := self.server.datasets.get(name)) is None:
            return self._send(404, headers={"X-Error-Code": "RepoNotFound"})
        if not api and verb == "resolve":
            return self._send_file(files.get(path))
        if api and verb in (None, "revision"):
            return self._send_json({"id": name, "sha": COMMIT, "siblings": [], "tags": []})
        if api and verb == "tree":
            return self._send_tree(files, path, "recursive=true" in address.query.lower())
        if api and verb == "paths-info":
            asked = json.loads(body)["paths"]
            return self._send_json([e for e in _list_entries(files) if e["path"] in asked])
        self._send(404)

    do_HEAD = do_POST = do_GET  # noqa: N815

    def _send_tree(self, files: dict[str, bytes], folder: str | None, recursive: bool) -> None:
        below = f"{folder}/" if folder else ""
        entries = [e for e in _list_entries(files) if e["path"].startswith(below)]
        if not entries:
            return self._send(404, headers={"X-Error-Code": "EntryNotFound"})
        here = [e for e in entries if recursive or "/" not in e["path"].removeprefix(below)]
        self._send_json(here)

    def _send_file(self, content: bytes | None) -> None:
        if content is None:
            return self._send(404, headers={"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{_checksum(content)}"', "Accept-Ranges": "bytes"}
        if not (wanted := self.headers.get("Range", "")):
            return self._send(200, content, headers)
        first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted).groups()
        end = min(int(last or len(content)), len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{end}/{len(content)}"
        self._send(206, content[int(first) : end + 1], headers)

    def _send_json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(
        self, status: int, content: bytes = b"", headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for name, value in ({"X-Repo-Commit": COMMIT} | (headers or {})).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args) -> None:
        """Write nothing: the tests look at `requests`."""


def _list_entries(files: dict[str, bytes]) -> list[dict]:
    folders = {str(parent) for name in files for parent in Path(name).parents} - {"."}
    return [{"type": "directory", "path": folder, "oid": COMMIT} for folder in sorted(folders)] + [
        {"type": "file", "path": name, "size": len(content), "oid": _checksum(content)}
        for name, content in files.items()
    ]


def _checksum(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
