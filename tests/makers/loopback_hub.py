"""A Hub on 127.0.0.1: what the real `huggingface_hub` client asks for when models are loaded and pushed.

Large files go the LFS way, the others into the commit. Repositories are private to the process and kept in memory.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

WRITER, READER = "hf_writer", "hf_reader"
LARGE = (".safetensors", ".png")


@dataclass
class Repository:
    """Commits are whole trees, path to content; branches are names of commits."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], branch: str = "main", message: str = "Upload") -> str:
        """Add or replace files; returns the commit's id."""
        tree = {**self.tree(branch), **files}
        sha = hashlib.sha1(repr((sorted(tree), len(self.commits))).encode()).hexdigest()
        self.commits[sha], self.branches[branch] = tree, sha
        self.messages.append(message)
        return sha

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)

    def tree(self, revision: str = "main") -> dict[str, bytes]:
        sha = self.resolve(revision)
        return self.commits[sha] if sha else {}


class LoopbackHub:
    """Serves `repositories` until `close`; `requests` remembers the method and path of each request."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self.blobs: dict[str, bytes] = {}
        self.uploads: list[str] = []
        self.fail: set[str] = set()
        """Parts of paths that answer with status 400 when they are written to."""
        self.broken: set[str] = set()
        """Parts of paths that answer with status 500 when they are read."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def add(self, name: str, folder: Path, branch: str = "main") -> str:
        """Put a folder into a repository without asking the client; returns the commit's id."""
        files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        return self.repositories.setdefault(name, Repository()).commit(files, branch)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = self._path()
        if any(part in path for part in self.hub.broken):
            return self._error(500, None, "out of order")
        if path == "/test/requests":
            return self._json([" ".join(request) for request in self.hub.requests])
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            return self._model_info(found[1], found[2] or "main")
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", path):
            return self._tree(found[1], found[2])
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._file(*found.groups())
        return self._error(404, None, path)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path, body = self._path(), self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path == "/api/validate-yaml":
            return self._validate(json.loads(body)["content"])
        if self._token() is None:
            return self._error(401, None, "Invalid username or password.")
        if self._token() != WRITER:
            return self._error(403, None, "You don't have the rights to create or change this.")
        if any(part in path for part in self.hub.fail):
            return self._error(400, None, "refused by the test")
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/(.+)", path):
            repository = self.hub.repositories[found[1]]
            repository.branches.setdefault(found[2], repository.branches.get("main", ""))
            return self._json({})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/(.+)", path):
            return self._preupload(self.hub.repositories[found[1]], found[2], json.loads(body))
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self._lfs_batch(json.loads(body))
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
            return self._commit(found[1], found[2], body)
        return self._error(404, None, path)

    def do_PUT(self) -> None:
        path, body = self._path(), self.rfile.read(int(self.headers["Content-Length"]))
        if any(part in path for part in self.hub.fail):
            return self._error(400, None, "refused by the test")
        oid = path.rsplit("/", 1)[-1]
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.blobs[oid] = body
        self.hub.uploads.append(oid)
        self._answer(200, b"")

    # Reading.

    def _repository(self, name: str, revision: str) -> tuple[Repository, str] | None:
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and self._token() is None):
            self._error(404 if self._token() else 401, "RepoNotFound", f"no repository {name}")
            return None
        sha = repository.resolve(revision)
        if sha is None and revision != "main":
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repository, sha or ""

    def _model_info(self, name: str, revision: str) -> None:
        if found := self._repository(name, revision):
            repository, sha = found
            siblings = [{"rfilename": path} for path in repository.tree(sha)]
            self._json({"_id": "0", "id": name, "modelId": name, "sha": sha, "private": repository.private,
                        "siblings": siblings, "tags": [], "downloads": 0, "likes": 0})  # fmt: skip

    def _tree(self, name: str, revision: str) -> None:
        if found := self._repository(name, revision):
            repository, sha = found
            self._json([_entry(path, content) for path, content in repository.tree(sha).items()])

    def _file(self, name: str, revision: str, path: str) -> None:
        if not (found := self._repository(name, revision)):
            return
        repository, sha = found
        content = repository.tree(sha).get(path)
        if content is None:
            return self._error(404, "EntryNotFound", f"no {path}", {"X-Repo-Commit": sha})
        self._answer(200, content, {"ETag": f'"{_oid(path, content)}"', "X-Repo-Commit": sha,
                                    "Content-Type": "application/octet-stream"})  # fmt: skip

    # Writing.

    def _validate(self, content: str) -> None:
        block = re.match(r"---\n(.*?)\n---", content, re.DOTALL)
        data = yaml.safe_load(block[1]) if block else {}
        errors = [] if isinstance(data, dict) and data.get("license") else [{"message": '"license" is required'}]
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted.get('organization') or 'writer'}/{wanted['name']}"
        known = name in self.hub.repositories
        private = wanted.get("private") or wanted.get("visibility") == "private"
        self.hub.repositories.setdefault(name, Repository(private=bool(private)))
        self._json({"url": f"{self.hub.endpoint}/{name}", "name": name, "id": name}, 409 if known else 200)

    def _preupload(self, repository: Repository, revision: str, wanted: dict[str, Any]) -> None:
        tree = repository.tree(revision)
        answers = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
                "oid": _oid(file["path"], tree[file["path"]]) if file["path"] in tree else None,
            }
            for file in wanted["files"]
        ]
        self._json({"files": answers, "commitOid": repository.resolve(revision)})

    def _lfs_batch(self, wanted: dict[str, Any]) -> None:
        objects: list[dict[str, Any]] = []
        for blob in wanted["objects"]:
            upload = {"href": f"{self.hub.endpoint}/test/blobs/{blob['oid']}", "header": {}}
            missing = {} if blob["oid"] in self.hub.blobs else {"actions": {"upload": upload}}
            objects.append({**blob, **missing})
        self._json({"transfer": "basic", "objects": objects})

    def _commit(self, name: str, revision: str, body: bytes) -> None:
        repository, files, message = self.hub.repositories[name], {}, ""
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        sha = repository.commit(files, revision, message)
        self._json({"commitUrl": f"{self.hub.endpoint}/{name}/commit/{sha}", "commitOid": sha, "success": True})

    # Answers.

    def _path(self) -> str:
        path = unquote(urlsplit(self.path).path)
        if not path.startswith("/test/"):
            self.hub.requests.append((self.command, path))
        return path

    def _token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def _json(self, content: Any, status: int = 200) -> None:
        self._answer(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str | None, message: str, headers: dict[str, str] | None = None) -> None:
        described = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}
        content = json.dumps({"error": message}).encode()
        self._answer(status, content, {"Content-Type": "application/json", **described})

    def _answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _oid(path: str, content: bytes) -> str:
    """sha256 of large files, git's blob id of the others."""
    if path.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(path: str, content: bytes) -> dict[str, Any]:
    oid = _oid(path, content)
    large = {"lfs": {"oid": oid, "size": len(content), "pointerSize": 130}} if path.endswith(LARGE) else {}
    return {"type": "file", "path": path, "size": len(content), "oid": oid, **large}
