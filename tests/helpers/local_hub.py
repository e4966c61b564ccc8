"""A Hub on this machine: the part of its HTTP interface by which models and data sets are pushed and loaded, with real
clients.

Repositories with commits and branches, private ones, tokens of several users, Git LFS for large files, reading of parts
of a file, and an upload that breaks. All is kept in memory.
"""

import base64
import hashlib
import json
import re
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LARGE = (".safetensors", ".bin", ".parquet", ".mp4")
# A data set's name has this before it, as in its address.
REPO = r"(?P<repo>(datasets/)?[^/]+/[^/]+)"
API = f"/api/(models/)?{REPO}"


class Refused(Exception):
    """A request that is answered with an error: status, and the code and message of the Hub's headers."""

    def __init__(self, status: int, code: str, message: str):
        super().__init__(message)
        self.status, self.code = status, code


@dataclass
class Repo:
    """Commits (all files each, by name) by their id, the newest commit of each branch, and who may read."""

    owner: str
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        self.messages.append(message)
        sha = hashlib.sha1(repr((len(self.messages), message, sorted(files))).encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha

    def resolve(self, revision: str) -> str:
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.resolve(revision)]


class LocalHub:
    """The server and what it holds.

    tokens: user by token. repos: `Repo` by "user/name", or "datasets/user/name". requests: "METHOD path" of all that came.
    uploads: called with each large file before it is stored; it may raise `Refused`, or cut the connection by
    returning False.
    """

    def __init__(self, **tokens: str):
        self.tokens = tokens or {"x": "tester"}
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.uploads: Callable[[bytes], bool] = lambda content: True
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    @contextmanager
    def running(self):
        Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()

    def environment(self, home) -> dict[str, str]:
        """Variables by which a child process finds this Hub as its first user, with a cache of its own in `home`."""
        client = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_TOKEN": next(iter(self.tokens))}
        return client | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}

    # -------------------------------------------------------------------------------------------- who may do what

    def repo(self, name: str, user: str | None, *, write: bool = False) -> Repo:
        """Return a repository, or refuse as the Hub does: what a user may not read does not exist for them."""
        repo = self.repos.get(name)
        if repo is None or (repo.private and user != repo.owner):
            raise Refused(404 if user else 401, "RepoNotFound", "Repository not found")
        if write and user is None:
            raise Refused(401, "Unauthorized", "Invalid username or password.")
        if write and user != repo.owner:
            raise Refused(403, "Forbidden", "you do not have the right to write to this repository")
        return repo

    # ------------------------------------------------------------------------------------------------ the requests

    def whoami(self, user, query, body):
        if user is None:
            raise Refused(401, "Unauthorized", "Invalid username or password.")
        return {"name": user, "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}}

    def validate(self, user, query, body):
        header = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
        sound = header is not None and isinstance(yaml.safe_load(header[1]), dict)
        errors = [] if sound else [{"message": "the card has no metadata"}]
        if errors:
            raise Refused(400, "BadRequest", errors[0]["message"])
        return {"errors": errors, "warnings": []}

    def create(self, user, query, body):
        asked = json.loads(body)
        owner = asked.get("organization") or user
        if user is None:
            raise Refused(401, "Unauthorized", "Invalid username or password.")
        if user != owner:
            raise Refused(403, "Forbidden", f"you do not have the right to create a model under {owner}")
        name = f"{'datasets/' if asked.get('type') == 'dataset' else ''}{owner}/{asked['name']}"
        answer = {"url": f"{self.url}/{name}", "name": name, "id": name}
        if name in self.repos:
            return 409, answer
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.repos[name] = Repo(owner, private)
        self.repos[name].commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        return answer

    def info(self, user, query, body, repo, revision="main"):
        found = self.repo(repo, user)
        sha = found.resolve(revision)
        siblings = [{"rfilename": name} for name in found.commits[sha]]
        name = repo.removeprefix("datasets/")
        return {"_id": name, "id": name, "sha": sha, "private": found.private, "tags": [], "siblings": siblings}

    def refs(self, user, query, body, repo):
        branches = self.repo(repo, user).branches.items()
        entries = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in branches]
        return {"branches": entries, "tags": [], "converts": []}

    def branch(self, user, query, body, repo, revision):
        found = self.repo(repo, user, write=True)
        if revision in found.branches:
            raise Refused(409, "Conflict", "Reference already exists")
        found.branches[revision] = found.resolve(json.loads(body or b"{}").get("startingPoint", "main"))
        return {}

    def tree(self, user, query, body, repo, revision, folder=""):
        entries = _entries(self.repo(repo, user).files(revision))
        if folder and not any(entry["path"] == folder for entry in entries):
            raise Refused(404, "EntryNotFound", f"{folder} does not exist")
        within = [entry for entry in entries if entry["path"].startswith(f"{folder}/" if folder else "")]
        if query.get("recursive") in (["true"], ["True"]):
            return within
        return [entry for entry in within if entry["path"].rpartition("/")[0] == folder]

    def paths(self, user, query, body, repo, revision):
        entries = _entries(self.repo(repo, user).files(revision))
        asked = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode()).get("paths", [])
        return [entry for entry in entries if entry["path"] in asked]

    def preupload(self, user, query, body, repo, revision):
        self.repo(repo, user, write=True).resolve(revision)
        modes = [(entry["path"], "lfs" if entry["path"].endswith(LARGE) else "regular") for entry in _files(body)]
        return {"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes]}

    def commit(self, user, query, body, repo, revision):
        found = self.repo(repo, user, write=True)
        files, message = dict(found.files(revision)), ""
        for line in body.splitlines():
            entry = json.loads(line)
            kind, value = entry["key"], entry["value"]
            if kind == "header":
                message = value["summary"]
            elif kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
            elif kind == "deletedFile":
                del files[value["path"]]
        sha = found.commit(revision, files, message)
        return {"success": True, "commitOid": sha, "commitUrl": f"{self.url}/{repo}/commit/{sha}", "hookOutput": ""}

    def batch(self, user, query, body, repo):
        self.repo(repo, user, write=True)
        objects = json.loads(body)["objects"]
        for wanted in (entry for entry in objects if entry["oid"] not in self.blobs):
            wanted["actions"] = {"upload": {"href": f"{self.url}/large/{wanted['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    def store(self, user, query, body, oid):
        if not self.uploads(body):
            return None
        assert hashlib.sha256(body).hexdigest() == oid
        self.blobs[oid] = body
        return {}

    def download(self, user, query, body, repo, revision, name):
        found = self.repo(repo, user)
        sha = found.resolve(revision)
        if name not in found.commits[sha]:
            raise Refused(404, "EntryNotFound", f"{name} does not exist")
        content = found.commits[sha][name]
        return content, {"X-Repo-Commit": sha, "ETag": f'"{_identity(name, content)}"'}


ROUTES = [
    (method, re.compile(pattern), name)
    for method, pattern, name in (
        ("GET", "/api/whoami-v2", "whoami"),
        ("POST", "/api/validate-yaml", "validate"),
        ("POST", "/api/repos/create", "create"),
        ("GET", f"{API}(/revision/(?P<revision>.+))?", "info"),
        ("GET", f"{API}/refs", "refs"),
        ("POST", f"{API}/branch/(?P<revision>.+)", "branch"),
        ("GET", f"{API}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", "tree"),
        ("POST", f"{API}/paths-info/(?P<revision>.+)", "paths"),
        ("POST", f"{API}/preupload/(?P<revision>.+)", "preupload"),
        ("POST", f"{API}/commit/(?P<revision>.+)", "commit"),
        ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", "batch"),
        ("PUT", "/large/(?P<oid>[0-9a-f]{64})", "store"),
        ("GET", f"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", "download"),
    )
]


class _Handler(BaseHTTPRequestHandler):
    """Finds the method of the hub that answers a request, and sends its answer."""

    protocol_version = "HTTP/1.1"
    hub: LocalHub

    def log_message(self, *args):
        pass

    def _respond(self):
        url, body = urlsplit(self.path), self._body()
        path = unquote(url.path)
        self.hub.requests.append(f"{self.command} {path}")
        try:
            answer = self._answer(path, parse_qs(url.query), body)
        except Refused as refusal:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": str(refusal)}
            return self._send(refusal.status, json.dumps({"error": str(refusal)}).encode(), headers)
        if answer is None:  # as when the network fails
            self.close_connection = True
            return None
        if isinstance(answer, tuple) and isinstance(answer[0], bytes):
            return self._send_part(*answer)
        status, content = answer if isinstance(answer, tuple) else (200, answer)
        return self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    do_GET = do_HEAD = do_POST = do_PUT = _respond

    def _answer(self, path: str, query: dict, body: bytes):
        method = "GET" if self.command == "HEAD" else self.command
        for expected, pattern, name in ROUTES:
            if method == expected and (match := pattern.fullmatch(path)):
                found = {key: value for key, value in match.groupdict().items() if value is not None}
                return getattr(self.hub, name)(self._user(), query, body, **found)
        raise Refused(404, "NotFound", f"this Hub has no {method} {path}")

    def _user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise Refused(401, "Unauthorized", "Invalid credentials in Authorization header")
        return self.hub.tokens.get(token)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send_part(self, content: bytes, headers: dict[str, str]) -> None:
        """Send a file, or the bytes of it that are asked for."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return self._send(200, content, headers)
        first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        place = {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
        return self._send(206, content[first : last + 1], {**headers, **place})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _files(body: bytes) -> list[dict]:
    return json.loads(body)["files"]


def _identity(name: str, content: bytes) -> str:
    """What Git calls a file, or Git LFS a large one."""
    if name.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entries(files: dict[str, bytes]) -> list[dict]:
    """What a listing has of files and their folders."""
    folders = {str(folder) for name in files for folder in PurePosixPath(name).parents[:-1]}
    of_folders = [{"type": "directory", "path": name, "oid": _identity(name, b""), "size": 0} for name in folders]
    return sorted(of_folders + [_entry(*file) for file in files.items()], key=lambda entry: entry["path"])


def _entry(name: str, content: bytes) -> dict:
    git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry = {"type": "file", "path": name, "oid": git, "size": len(content)}
    if name.endswith(LARGE):
        entry["lfs"] = {"oid": _identity(name, content), "size": len(content), "pointerSize": 134}
    return entry
