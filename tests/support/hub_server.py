"""A Hub on loopback: the part of the Hub's HTTP API that huggingface_hub uses to publish and to load models.

Repositories live in memory, as commits that hold whole trees; a commit is made in one step or not at all. Large and
binary files go through LFS, in one part or in several, and are kept and served at another address, which the token is
not for, as on the real Hub; Xet is not spoken (HF_HUB_DISABLE_XET=1). `fail` and `cut` make requests go wrong.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_right"
USER = "user"
ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass
class Repository:
    """Branches, and all commits by their ids."""

    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        """Returns the id of a commit that a branch points to from here on."""
        oid = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        self.messages.append(message)
        return oid

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Returns what is visible: the contents by path."""
        return self.commits[self.branches.get(revision, revision)]


@dataclass
class Fault:
    """What goes wrong, the next `times` times that a request matches."""

    method: str
    path: re.Pattern[str]
    times: int
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    after: int = 0


class HubError(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, message: str, code: str | None = None, **body: Any) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.body = status, message, code, body


class HubServer:
    """The state of the Hub, and the faults to come."""

    def __init__(self, *, part_size: int = 1 << 30) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.part_size = part_size
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.endpoint = ""
        self.storage = ""

    def fail(self, method: str, path: str, status: int, times: int = 1, **headers: str) -> None:
        """Answers the next requests that match with an error."""
        self.faults.append(Fault(method, re.compile(path), times, status, headers))

    def cut(self, method: str, path: str, after: int, times: int = 1) -> None:
        """Closes the connection of the next requests that match, `after` bytes of what is sent there or back."""
        self.faults.append(Fault(method, re.compile(path), times, after=after))

    def fault(self, method: str, path: str) -> Fault | None:
        """Returns what goes wrong with this request."""
        with self.lock:
            for fault in self.faults:
                if fault.times and fault.method == method and fault.path.search(path):
                    fault.times -= 1
                    return fault
        return None

    def count(self, method: str, path: str) -> int:
        """Returns how many requests there were."""
        return sum(seen == method and bool(re.search(path, where)) for seen, where, _ in self.requests)


class Handler(BaseHTTPRequestHandler):
    """One request: the routes, each by a method that returns what JSON holds, or bytes."""

    protocol_version = "HTTP/1.1"
    server: Any
    hub: HubServer

    def log_message(self, *_: Any) -> None:
        """Stays silent."""

    def __getattr__(self, name: str) -> Callable[[], None]:
        if name.startswith("do_"):
            return self.handle_request
        raise AttributeError(name)

    def handle_request(self) -> None:
        """Answers, or fails as was asked for."""
        parts = urlsplit(self.path)
        path, self.query = unquote(parts.path), parse_qs(parts.query)
        self.hub.requests.append((self.command, path, dict(self.headers)))
        fault = self.hub.fault(self.command, path)
        self.content_left: int | None = None
        if fault and fault.status is None:
            if self.command in ("POST", "PUT"):
                self.rfile.read(fault.after)
                self.hang_up()
                return
            self.content_left = fault.after
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            if fault and fault.status is not None:
                self.send(fault.status, b'{"error": "as asked for"}', **fault.headers)
                return
            with self.hub.lock:
                self.route(path)
        except HubError as error:
            headers = {"X-Error-Message": error.message} | ({"X-Error-Code": error.code} if error.code else {})
            self.send(error.status, json.dumps({"error": error.message, **error.body}).encode(), **headers)

    def hang_up(self) -> None:
        """Closes the connection without an answer."""
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def send(self, status: int, content: bytes = b"", **headers: Any) -> None:
        """Sends the answer, or the first bytes of it."""
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers, "Content-Length": len(content)}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content if self.content_left is None else content[: self.content_left])
            if self.content_left is not None:
                self.hang_up()

    def answer(self, values: Any) -> None:
        self.send(200, json.dumps(values).encode())

    def route(self, path: str) -> None:
        """Finds who answers."""
        for method, pattern, function in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split("|"):
                function(self, *match.groups())
                return
        raise HubError(404, f"no such address: {self.command} {path}")

    def authorised(self) -> bool:
        """Returns whether the request has the right token; a wrong one is refused wherever it is shown."""
        token = self.headers.get("Authorization")
        if token not in (None, f"Bearer {TOKEN}"):
            raise HubError(401, "Invalid credentials in Authorization header")
        return token is not None

    def writer(self) -> None:
        if not self.authorised():
            raise HubError(401, "Invalid username or password.")

    def repository(self, name: str, *, write: bool = False) -> Repository:
        if write:
            self.writer()
        allowed = self.authorised()
        found = self.hub.repositories.get(name)
        if found is None or (found.private and not allowed):
            if allowed:
                raise HubError(404, "Repository not found", "RepoNotFound")
            # The client knows what this 401 means by the address too, but only if that begins with https.
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        return found

    def commit_of(self, repository: Repository, revision: str) -> str:
        oid = repository.branches.get(revision, revision)
        if oid not in repository.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid

    def whoami(self) -> None:
        self.writer()
        self.answer({"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token"}})

    def create(self) -> None:
        self.writer()
        wanted = json.loads(self.body)
        owner = wanted.get("organization") or USER
        name = f"{owner}/{wanted['name']}"
        if owner != USER:
            raise HubError(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        url = f"{self.hub.endpoint}/{name}"
        if name in self.hub.repositories:
            raise HubError(409, "You already created this model repo", url=url)
        private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        repository = self.hub.repositories[name] = Repository(private)
        repository.commit("main", {".gitattributes": ATTRIBUTES}, "initial commit")
        self.answer({"url": url, "name": name})

    def branch(self, name: str, branch: str) -> None:
        repository = self.repository(name, write=True)
        if branch in repository.branches:
            raise HubError(409, "Reference already exists")
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        repository.branches[branch] = self.commit_of(repository, start)
        self.answer({})

    def validate_yaml(self) -> None:
        """Refuses metadata as the Hub does: what is no YAML, and paths in the place of names."""
        content = json.loads(self.body)["content"]
        block = re.match(r"---\n(.*?)\n---", content, re.DOTALL)
        values = yaml.safe_load(block.group(1)) if block else {}
        errors = []
        for key in ("base_model", "datasets"):
            named = values.get(key) or []
            for value in [named] if isinstance(named, str) else named:
                if not HUB_ID.fullmatch(value):
                    errors.append({"message": f'"{key}" with value "{value}" is not valid. Use a Hub id.'})
        body = json.dumps({"errors": errors, "warnings": []}).encode()
        self.send(400 if errors else 200, body)

    def preupload(self, name: str, revision: str) -> None:
        files = self.repository(name, write=True).files(revision)
        answers = []
        for file in json.loads(self.body)["files"]:
            binary = b"\0" in base64.b64decode(file["sample"]) or file["path"].endswith(".safetensors")
            stored = files.get(file["path"])
            mode = "lfs" if binary else "regular"
            answer = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
            if stored is not None:
                answer["oid"] = hashlib.sha256(stored).hexdigest() if binary else git_oid(stored)
            answers.append(answer)
        self.answer({"files": answers})

    def lfs_batch(self, name: str) -> None:
        self.repository(name, write=True)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            answer = {"oid": oid, "size": size}
            if oid not in self.hub.objects:
                upload: dict[str, Any] = {"href": f"{self.hub.storage}/storage/{oid}"}
                if size > self.hub.part_size:
                    count = -(-size // self.hub.part_size)
                    urls = {str(number): f"{upload['href']}/{number}" for number in range(1, count + 1)}
                    upload["header"] = {"chunk_size": str(self.hub.part_size), **urls}
                verify = {"href": f"{self.hub.endpoint}/{name}.git/info/lfs/objects/verify"}
                answer["actions"] = {"upload": upload, "verify": verify}
            objects.append(answer)
        self.answer({"transfer": "basic", "objects": objects})

    def verify(self, name: str) -> None:
        self.repository(name, write=True)
        wanted = json.loads(self.body)
        if len(self.hub.objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise HubError(404, "The object was not uploaded")
        self.answer({})

    def store(self, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            raise HubError(422, "The content does not have the hash that was announced")
        self.hub.objects[oid] = content

    def put_object(self, oid: str) -> None:
        self.store(oid, self.body)
        self.send(200)

    def put_part(self, oid: str, number: str) -> None:
        self.hub.parts[oid, int(number)] = self.body
        self.send(200, ETag=f'"{hashlib.md5(self.body).hexdigest()}"')

    def complete(self, oid: str) -> None:
        content = b""
        for part in json.loads(self.body)["parts"]:
            piece = self.hub.parts[oid, part["partNumber"]]
            if part["etag"].strip('"') != hashlib.md5(piece).hexdigest():
                raise HubError(400, "A part has another ETag")
            content += piece
        self.store(oid, content)
        self.send(200)

    def commit(self, name: str, revision: str) -> None:
        """Makes one commit of all that the lines say, or none."""
        repository = self.repository(name, write=True)
        files = dict(repository.files(self.commit_of(repository, revision)))
        message = ""
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise HubError(400, f"{value['path']}: the LFS object was not uploaded")
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise HubError(400, f"unknown operation {entry['key']}")
        oid = repository.commit(revision, files, message)
        self.answer({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.endpoint}/{name}/commit/{oid}"})

    def info(self, name: str, revision: str | None = None) -> None:
        repository = self.repository(name)
        oid = self.commit_of(repository, revision or "main")
        files = repository.files(oid)
        siblings = [{"rfilename": path} for path in sorted(files)]
        known = {"id": name, "sha": oid, "private": repository.private, "siblings": siblings, "tags": []}
        # The Hub knows of a model what its card says.
        metadata = re.match(rb"---\n(.*?)\n---", files.get("README.md", b""), flags=re.DOTALL)
        card = yaml.safe_load(metadata[1]) if metadata else {}
        self.answer({**known, **{key: card[key] for key in ("pipeline_tag", "library_name") if key in card}})

    def tree(self, name: str, revision: str, folder: str | None = None) -> None:
        repository = self.repository(name)
        files = repository.files(self.commit_of(repository, revision))
        folder = (folder or "").strip("/")
        inside = {path: content for path, content in files.items() if not folder or path.startswith(f"{folder}/")}
        if folder and not inside:
            raise HubError(404, f"{folder} does not exist", "EntryNotFound")
        self.answer(
            [
                {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
                for path, content in inside.items()
            ]
        )

    def resolve(self, name: str, revision: str, path: str) -> None:
        repository = self.repository(name)
        oid = self.commit_of(repository, revision)
        files = repository.files(oid)
        if path not in files:
            headers = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", "X-Repo-Commit": oid}
            self.send(404, b"Entry not found", **headers)
            return
        content = files[path]
        digest = hashlib.sha256(content).hexdigest()
        if self.hub.objects.get(digest) != content:
            self.serve(content, ETag=f'"{git_oid(content)}"', X_Repo_Commit=oid)
            return
        linked = {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": len(content)}
        self.send(302, Location=f"{self.hub.storage}/storage/{digest}", X_Repo_Commit=oid, **linked)

    def get_object(self, oid: str) -> None:
        if self.headers.get("Authorization"):
            raise HubError(400, "The token of the Hub was sent to the storage")
        self.serve(self.hub.objects[oid], ETag=f'"{oid}"')

    def serve(self, content: bytes, **headers: Any) -> None:
        """Sends a file, or the rest of it from where Range says."""
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            self.send(200, content, Accept_Ranges="bytes", **headers)
            return
        first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        place = f"bytes {first}-{last}/{len(content)}"
        self.send(206, content[first : last + 1], Content_Range=place, **headers)


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("POST", f"/api/models/{NAME}/branch/(.+)", Handler.branch),
    ("POST", f"/api/models/{NAME}/preupload/(.+)", Handler.preupload),
    ("POST", f"/api/models/{NAME}/commit/(.+)", Handler.commit),
    ("GET", f"/api/models/{NAME}", Handler.info),
    ("GET", f"/api/models/{NAME}/revision/(.+)", Handler.info),
    ("GET", f"/api/models/{NAME}/tree/([^/]+)(/.*)?", Handler.tree),
    ("POST", f"/{NAME}\\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("POST", f"/{NAME}\\.git/info/lfs/objects/verify", Handler.verify),
    ("GET|HEAD", f"/{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
    ("PUT", r"/storage/(\w+)", Handler.put_object),
    ("PUT", r"/storage/(\w+)/(\d+)", Handler.put_part),
    ("POST", r"/storage/(\w+)", Handler.complete),
    ("GET|HEAD", r"/storage/(\w+)", Handler.get_object),
]


def git_oid(content: bytes) -> str:
    """Returns the name of a blob in git."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def serving(**options: Any) -> Iterator[HubServer]:
    """Inside, a Hub answers at `endpoint`, from threads of its own."""
    hub = HubServer(**options)
    handler = type("BoundHandler", (Handler,), {"hub": hub})
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
    hub.endpoint, hub.storage = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    threads = [threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True) for server in servers]
    for server, thread in zip(servers, threads, strict=True):
        server.daemon_threads = True
        thread.start()
    try:
        yield hub
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()
