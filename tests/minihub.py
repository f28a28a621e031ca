"""A Hub on loopback: what huggingface_hub asks of one for models, kept in memory; `fail` breaks it.

Large files travel by LFS, to and from a second host, which must never see a token.
"""

import base64
import hashlib
import json
import re
import secrets
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKENS = {"hf_owner": "user", "hf_second": "second", "hf_reader": "user"}
READ_ONLY = "hf_reader"
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".png")


class _Error(Exception):
    """A refusal: status, message, and the code by which the client tells cases apart."""


@dataclass
class Repo:
    """Commits from id to files, branches as lists of them (newest last), and tags."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, list[str]] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        oid = secrets.token_hex(20)
        self.commits[oid] = files
        self.branches[branch] = [*self.branches.get(branch, []), oid]
        return oid

    def find(self, revision: str) -> str:
        oid = self.branches.get(revision, [self.tags.get(revision, revision)])[-1]
        if oid not in self.commits:
            raise _Error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.find(revision)]


class Hub(ThreadingHTTPServer):
    """`repos` by id, large `objects` by SHA-256, and `requests` as (method, path, host, token)."""

    daemon_threads, request_queue_size = True, 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.second_url = f"http://localhost:{self.server_port}"
        self.reset()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def reset(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str, str]] = []
        self.faults: list[tuple[str, str, str]] = []
        self.gate, self.lock = threading.Event(), threading.RLock()

    def fail(self, method: str, path: str, kind: str) -> None:
        """Make the next request to a path, a regex, fail in one way.

        "503" or another status; "lose" the answer to work that is done; "drop" the connection in
        mid-body; "truncate" the body, or "flip" one byte, as if all were well; "hold" until `gate`
        is set.
        """
        self.faults.append((method, path, kind))

    def take_fault(self, method: str, path: str) -> str:
        due = [f for f in self.faults if f[0] == method and re.search(f[1], path)][:1]
        self.faults = [fault for fault in self.faults if not due or fault is not due[0]]
        return due[0][2] if due else ""

    def handle_error(self, *args) -> None: ...  # of a connection that a test breaks


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # the client keeps its connections
    server: Hub

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.user = TOKENS.get(self.token)
        self.refused = 403 if self.user else 401
        self.server.requests.append((self.command, path, self.headers["Host"], self.token))
        self.fault = self.server.take_fault(self.command, path)
        if self.fault == "hold":
            self.server.gate.wait()
        try:
            if self.fault.isdigit():
                raise _Error(int(self.fault), "As the test asked for")
            self._route(path)
        except _Error as error:
            names = ("X-Error-Message", "X-Error-Code")
            self._send(error.args[0], b"{}", dict(zip(names, error.args[1:], strict=False)))

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _route(self, path: str) -> None:
        if match := re.fullmatch(r"/objects/(\w+)", path):  # a signed address: no token
            return self._object(match[1])
        if self.token and not self.user:
            raise _Error(401, "Invalid credentials in Authorization header")
        if path == "/api/validate-yaml":
            return self._json({})
        if path == "/api/repos/create":
            return self._create(**json.loads(self.body))
        if match := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            return self._lfs(self._repo(match[1], write=True), **json.loads(self.body))
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(self._repo(match[1], files=True), unquote(match[2]), match[3])
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w+)(?:/(.+))?)?", path)
        verb = getattr(self, f"_{match[2] or 'revision'}", None) if match else None
        if verb is None:
            raise _Error(404, f"There is no {path}")
        write = match[2] in ("preupload", "commit", "branch", "tag")
        revision, _, self.folder = (match[3] or "main").partition("/")
        verb(match[1], self._repo(match[1], write=write), unquote(revision))

    def _repo(self, name: str, *, write: bool = False, files: bool = False) -> Repo:
        repo, owner = self.server.repos.get(name), self.user == name.split("/")[0]
        if repo is None or (repo.private and not owner):
            raise _Error(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if write and (not owner or self.token == READ_ONLY):
            raise _Error(self.refused, "You may not write here")
        if files and repo.gated and not owner:
            raise _Error(self.refused, "Access is restricted", "GatedRepo")
        return repo

    def _create(self, name: str, organization: str | None, visibility: str = "", **_) -> None:
        owner = organization or self.user
        if self.user != owner or self.token == READ_ONLY:
            raise _Error(self.refused, f"You may not create models of {owner}")
        new = Repo(visibility == "private")
        new.commit("main", {".gitattributes": b"*.bin filter=lfs\n"})
        known = self.server.repos.setdefault(f"{owner}/{name}", new) is not new
        self._json({"url": f"{self.server.url}/{owner}/{name}"}, 409 if known else 200)

    def _preupload(self, name: str, repo: Repo, branch: str) -> None:
        files, answers = repo.files(branch), []
        for path in [asked["path"] for asked in json.loads(self.body)["files"]]:
            mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            entry = _entry(path, files[path]) if path in files else {}
            oid = entry.get("lfs", entry).get("oid")
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": answers})

    def _lfs(self, repo: Repo, objects: list[dict], **_) -> None:
        for row in objects:
            if row["oid"] not in self.server.objects:
                href = f"{self.server.second_url}/objects/{row['oid']}"
                row["actions"] = {"upload": {"href": href}}
        self._json({"transfer": "basic", "objects": objects})

    def _commit(self, name: str, repo: Repo, branch: str) -> None:
        header, *lines = [json.loads(line) for line in self.body.splitlines()]
        with self.server.lock:
            head = repo.find(branch)
            if header["value"].get("parentCommit", head) != head:
                raise _Error(412, "A commit has happened since")
            files = dict(repo.files(branch))
            for line in lines:
                path = line["value"]["path"]
                if line["key"] == "deletedFile":
                    del files[path]
                elif line["key"] == "lfsFile":
                    files[path] = self.server.objects[line["value"]["oid"]]
                else:
                    files[path] = base64.b64decode(line["value"]["content"])
            oid = repo.commit(branch, files)
        self._json({"commitOid": oid, "commitUrl": f"{self.server.url}/{name}/commit/{oid}"})

    def _branch(self, name: str, repo: Repo, branch: str) -> None:
        self._json(repo.branches.setdefault(branch, [repo.find("main")]))

    def _tag(self, name: str, repo: Repo, revision: str) -> None:
        taken = repo.tags.setdefault(json.loads(self.body)["tag"], oid := repo.find(revision))
        self._json({}, 200 if taken == oid else 409)

    def _revision(self, name: str, repo: Repo, revision: str) -> None:
        self._json({"id": name, "sha": repo.find(revision), "private": repo.private})

    def _refs(self, name: str, repo: Repo, _: str) -> None:
        def rows(refs: dict[str, str]) -> list[dict]:
            return [{"name": ref, "ref": ref, "targetCommit": refs[ref]} for ref in refs]

        branches = {ref: oids[-1] for ref, oids in repo.branches.items()}
        self._json({"branches": rows(branches), "tags": rows(repo.tags), "converts": []})

    def _tree(self, name: str, repo: Repo, revision: str) -> None:
        self._json([_entry(*f) for f in repo.files(revision).items() if self.folder in f[0]])

    def _resolve(self, repo: Repo, revision: str, path: str) -> None:
        headers = {"X-Repo-Commit": repo.find(revision)}
        if (content := repo.files(revision).get(path)) is None:
            return self._send(404, b"", headers | {"X-Error-Code": "EntryNotFound"})
        entry = _entry(path, content)
        headers["ETag"] = entry.get("lfs", entry)["oid"]
        if "lfs" not in entry:
            return self._send(200, content, headers)
        headers["Location"] = f"{self.server.second_url}/objects/{headers['ETag']}"
        self._send(302, b"", headers | {"X-Linked-Size": str(len(content))})

    def _object(self, oid: str) -> None:
        if self.command == "PUT":
            self.server.objects[hashlib.sha256(self.body).hexdigest()] = self.body
        content = self.server.objects[oid]
        if not (wanted := re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))):
            return self._send(200, content)
        where = f"bytes {wanted[1]}-{len(content) - 1}/{len(content)}"
        self._send(206, content[int(wanted[1]) :], {"Content-Range": where})

    def _json(self, value: object, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.close_connection = self.fault in ("lose", "drop")  # after this answer
        if self.fault == "lose":
            return
        half = len(content) // 2
        if self.fault == "truncate":
            content = content[:half]
        elif self.fault == "flip":
            content = content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:half] if self.fault == "drop" else content)

    def log_message(self, *args) -> None: ...


def _entry(path: str, content: bytes) -> dict:
    """Describe a file as the tree does: by git's checksum, and a large one by SHA-256 too."""
    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry = {"type": "file", "path": path, "size": len(content), "oid": oid}
    if path.endswith(LFS_SUFFIXES):
        entry["lfs"] = {"size": len(content), "pointerSize": 134}
        entry["lfs"]["oid"] = hashlib.sha256(content).hexdigest()
    return entry
