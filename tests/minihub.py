"""A Hub on loopback: as much of its HTTP API as huggingface_hub uses for models, kept in memory.

Large files travel as they do on the real Hub: through LFS, to and from a second host ("localhost"),
which needs no token and must never see one. Faults are asked for with `Hub.fail`.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKENS = {"hf_owner": "user", "hf_second": "second", "hf_reader": "reader"}
READ_ONLY = {"hf_reader"}
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".png", ".gguf")


@dataclass
class Commit:
    oid: str
    parent: str | None
    title: str
    files: dict[str, bytes]


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, title: str, files: dict[str, bytes]) -> str:
        parent = self.branches.get(branch)
        oid = hashlib.sha1(f"{parent} {title} {len(self.commits)}".encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent, title, files)
        self.branches[branch] = oid
        return oid

    def find(self, revision: str) -> Commit | None:
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        return self.commits.get(oid)

    def log(self, revision: str) -> list[Commit]:
        """List the commits of a revision, newest first."""
        found, commit = [], self.find(revision)
        while commit:
            found.append(commit)
            commit = self.commits.get(commit.parent or "")
        return found


@dataclass
class Fault:
    method: str
    path: str
    kind: str
    times: int


class Hub(ThreadingHTTPServer):
    """`repos` by id, large `objects` by SHA-256, and every request as (method, path, host, token).

    `gate` holds back the requests that `fail(..., "hold")` names until it is set.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str, str]] = []
        self.faults: list[Fault] = []
        self.gate, self.lock = threading.Event(), threading.RLock()
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.second_url = f"http://localhost:{self.server_port}"

    def fail(self, method: str, path: str, kind: str, times: int = 1) -> None:
        """Make the next requests whose path has the regex fail.

        Kinds: "503" and "401"; "lose" does the work and never answers; "drop" closes the connection
        in mid-body; "truncate" and "flip" send less, or another byte, with consistent headers;
        "hold" waits for `gate`.
        """
        self.faults.append(Fault(method, path, kind, times))

    def reset(self) -> None:
        self.repos.clear(), self.objects.clear(), self.requests.clear(), self.faults.clear()
        self.gate.clear()

    def take_fault(self, method: str, path: str) -> str:
        with self.lock:
            for fault in self.faults:
                if fault.times and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault.kind
        return ""

    def handle_error(self, request, client_address) -> None:
        """Keep connections that a test or a client breaks off the terminal."""


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """Run a `Hub` in a thread of its own for as long as the block lasts."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield hub
        finally:
            hub.gate.set()
            hub.shutdown()
            thread.join()


class _Error(Exception):
    def __init__(self, status: int, message: str, code: str = ""):
        self.status, self.message, self.code = status, message, code


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # the client keeps its connections
    server: Hub

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        path = unquote(address.path)
        self.query = parse_qs(address.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.server.requests.append((self.command, path, self.headers["Host"], self.token))
        self.fault = self.server.take_fault(self.command, path)
        if self.fault == "hold":
            self.server.gate.wait(30)
        try:
            if self.fault.isdigit():
                raise _Error(int(self.fault), "as the test asked for")
            self._route(path)
        except _Error as error:
            headers = {"X-Error-Message": error.message, "X-Error-Code": error.code}
            content = json.dumps({"error": error.message}).encode()
            self._send(error.status, content, {k: v for k, v in headers.items() if v})

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _route(self, path: str) -> None:
        if match := re.fullmatch(r"/objects/(\w+)", path):  # signed URLs: no token
            return self._put_object(match[1]) if self.command == "PUT" else self._get(match[1])
        if self.token and self.token not in TOKENS:
            raise _Error(401, "Invalid credentials in Authorization header")
        if path == "/api/whoami-v2":
            return self._json({"name": self._user(), "type": "user", "orgs": []})
        if path == "/api/validate-yaml":
            return self._validate_yaml(json.loads(self.body)["content"])
        if path == "/api/repos/create":
            return self._create(json.loads(self.body))
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/(objects/batch|verify)", path):
            return self._lfs(match[1], match[2])
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w[\w-]*)(?:/(.+))?)?", path):
            repo = self._repo(match[1], write=match[2] in ("preupload", "commit", "branch", "tag"))
            verb, rest = match[2] or "revision", match[3] or "main"
            return getattr(self, "_" + verb.replace("-", "_"), self._unknown)(match[1], repo, rest)
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(self._repo(match[1], files=True), match[2], match[3])
        self._unknown()

    def _unknown(self, *args) -> None:
        raise _Error(404, f"no such address: {self.path}")

    def _user(self) -> str:
        if self.token not in TOKENS:
            raise _Error(401, "Invalid username or password.")
        return TOKENS[self.token]

    def _repo(self, name: str, *, write: bool = False, files: bool = False) -> Repo:
        repo, user = self.server.repos.get(name), TOKENS.get(self.token)
        owner = user == name.split("/")[0]
        if repo is None or (repo.private and not owner):
            raise _Error(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and (not owner or self.token in READ_ONLY):
            raise _Error(403 if user else 401, "You need a token that may write here")
        if files and repo.gated and not owner:
            raise _Error(403 if user else 401, "Access to this model is restricted", "GatedRepo")
        return repo

    def _find(self, repo: Repo, revision: str) -> Commit:
        if (commit := repo.find(revision)) is None:
            raise _Error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # Writing

    def _validate_yaml(self, content: str) -> None:
        match = re.match(r"---\n(.*?\n)---\n", content, re.DOTALL)
        try:
            yaml.safe_load(match[1] if match else "")
        except yaml.YAMLError as error:
            return self._send(400, json.dumps({"errors": [{"message": str(error)}]}).encode())
        self._json({"errors": [], "warnings": []})

    def _create(self, asked: dict) -> None:
        owner = asked["organization"] or self._user()
        if self._user() != owner or self.token in READ_ONLY:
            raise _Error(403, f"You may not create a model in the namespace {owner}")
        name = f"{owner}/{asked['name']}"
        address = {"url": f"{self.server.url}/{name}", "name": name}
        with self.server.lock:
            if name in self.server.repos:
                return self._send(409, json.dumps(address | {"error": "exists"}).encode())
            repo = self.server.repos[name] = Repo(asked.get("visibility") == "private")
            repo.commit("main", "initial commit", {".gitattributes": b"*.bin filter=lfs\n"})
        self._json(address)

    def _preupload(self, name: str, repo: Repo, revision: str) -> None:
        files = self._find(repo, revision).files
        answers = []
        for asked in json.loads(self.body)["files"]:
            path, mode = asked["path"], "lfs" if asked["path"].endswith(LFS_SUFFIXES) else "regular"
            oid = _entry(path, files[path]) if path in files else {}
            oid = oid.get("lfs", oid).get("oid")
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": answers})

    def _lfs(self, name: str, verb: str) -> None:
        self._repo(name, write=True)
        asked = json.loads(self.body)
        if verb == "verify":
            return self._json({"ok": asked["oid"] in self.server.objects})
        for thing in asked["objects"]:
            if thing["oid"] not in self.server.objects:
                upload = {"href": f"{self.server.second_url}/objects/{thing['oid']}"}
                verify = {"href": f"{self.server.url}/{name}.git/info/lfs/verify"}
                thing["actions"] = {"upload": upload, "verify": verify}
        self._json({"transfer": "basic", "objects": asked["objects"]})

    def _put_object(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Error(400, "The checksum does not match")
        self.server.objects[oid] = self.body
        self._send(200)

    def _commit(self, name: str, repo: Repo, branch: str) -> None:
        lines = [json.loads(line) for line in self.body.splitlines()]
        with self.server.lock:
            head = self._find(repo, branch)
            files = dict(head.files)
            for line in lines:
                value = line["value"]
                if line["key"] == "header":
                    title = value["summary"]
                    if value.get("parentCommit", head.oid) != head.oid:
                        raise _Error(412, "A commit has happened since. Please refresh")
                elif line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.server.objects[value["oid"]]
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
            oid = repo.commit(branch, title, files)
        url = f"{self.server.url}/{name}/commit/{oid}"
        self._json({"success": True, "commitOid": oid, "commitUrl": url})

    def _branch(self, name: str, repo: Repo, branch: str) -> None:
        start = json.loads(self.body).get("startingPoint", "main")
        self._add_ref(repo.branches, branch, self._find(repo, start).oid)

    def _tag(self, name: str, repo: Repo, revision: str) -> None:
        self._add_ref(repo.tags, json.loads(self.body)["tag"], self._find(repo, revision).oid)

    def _add_ref(self, refs: dict[str, str], name: str, oid: str) -> None:
        with self.server.lock:
            if name in refs:
                raise _Error(409, f"Reference {name} exists already")
            refs[name] = oid
        self._send(200)

    # Reading

    def _revision(self, name: str, repo: Repo, revision: str) -> None:
        commit = self._find(repo, revision)
        files = [{"rfilename": path} for path in sorted(commit.files)]
        self._json({"id": name, "sha": commit.oid, "private": repo.private, "siblings": files})

    def _refs(self, name: str, repo: Repo, revision: str) -> None:
        kinds = {"branches": ("heads", repo.branches), "tags": ("tags", repo.tags)}
        answer = {"converts": []}
        for kind, (folder, refs) in kinds.items():
            answer[kind] = [
                {"name": ref, "ref": f"refs/{folder}/{ref}", "targetCommit": oid}
                for ref, oid in refs.items()
            ]
        self._json(answer)

    def _tree(self, name: str, repo: Repo, rest: str) -> None:
        revision, _, folder = rest.partition("/") if repo.find(rest) is None else (rest, "", "")
        below = f"{folder}/" if folder else ""
        files = self._find(repo, revision).files
        recursive = self.query.get("recursive", [""])[0].lower() == "true"
        here = [path for path in sorted(files) if path.startswith(below)]
        here = [path for path in here if recursive or "/" not in path.removeprefix(below)]
        self._json([_entry(path, files[path]) for path in here])

    def _resolve(self, repo: Repo, revision: str, path: str) -> None:
        commit = self._find(repo, revision)
        self.commit = {"X-Repo-Commit": commit.oid}
        if path not in commit.files:
            headers = self.commit | {"X-Error-Code": "EntryNotFound"}
            return self._send(404, headers=headers)
        content = commit.files[path]
        entry = _entry(path, content)
        if "lfs" not in entry:
            return self._content(content, self.commit | {"ETag": f'"{entry["oid"]}"'})
        oid = hashlib.sha256(content).hexdigest()
        linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
        where = {"Location": f"{self.server.second_url}/objects/{oid}"}
        self._send(302, headers=self.commit | linked | where)

    def _get(self, oid: str) -> None:
        self._content(self.server.objects[oid], {"ETag": f'"{oid}"'})

    def _content(self, content: bytes, headers: dict[str, str]) -> None:
        """Send a file, or the range that was asked for."""
        if not (wanted := self.headers.get("Range", "")):
            return self._send(200, content, headers)
        first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted).groups()
        end = min(int(last or len(content)), len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{end}/{len(content)}"
        self._send(206, content[int(first) : end + 1], headers)

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(
        self, status: int, content: bytes = b"", headers: dict[str, str] | None = None
    ) -> None:
        if self.fault == "lose":
            self.close_connection = True
            return
        middle = len(content) // 2
        if self.fault == "truncate":
            content = content[:middle]
        elif self.fault == "flip":
            content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.fault == "drop":
            content, self.close_connection = content[:middle], True
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args) -> None:
        """Write nothing: the tests look at `requests`."""


def _entry(path: str, content: bytes) -> dict:
    """Describe a file as the tree does: git's checksum, and for a large one SHA-256."""
    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry = {"type": "file", "path": path, "size": len(content), "oid": oid}
    if path.endswith(LFS_SUFFIXES):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content)}
        entry["lfs"]["pointerSize"] = 134
    return entry
