# Copyright 2026 The CT-MoE authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""A Hub on loopback for tests: what `huggingface_hub` asks of the real one, over HTTP, kept in memory.

- `HubEndpoint`: the server; `with HubEndpoint() as hub:` and `hub.environment(folder)` for processes that use it.

It speaks repositories, branches and tags, the tree, downloads with ETag and commit, `preupload`, LFS (basic and in
parts, with hashes checked as object stores do) and commits as NDJSON, each all or nothing. It does not speak Xet,
which the client is told not to use: uploads through Xet are untested. Tokens are not checked.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


REGULAR_LIMIT = 10_000_000  # bytes; larger files must go through LFS, as on the Hub
_ZERO = "0" * 40


class Refusal(Exception):
    """An answer that is no success: HTTP status, the Hub's error code, words."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class Repository:
    """Branches and tags point to commits; a commit is its parent and the hash of every file."""

    def __init__(self, private: bool):
        self.private = private
        self.commits: dict[str, dict] = {}
        self.tags: dict[str, str] = {}
        attributes = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
        self.contents = {hashlib.sha256(attributes).hexdigest(): attributes}
        self.branches = {"main": self.add(_ZERO, {".gitattributes": (next(iter(self.contents)), False)}, "initial")}

    def add(self, parent: str, files: dict[str, tuple[str, bool]], title: str) -> str:
        """A commit of `files`, path -> (sha256, whether it is kept by LFS)."""
        described = json.dumps([parent, sorted(files.items()), title, len(self.commits)])
        commit = hashlib.sha1(described.encode()).hexdigest()
        self.commits[commit] = {"parent": parent, "files": files, "title": title}
        return commit

    def commit_of(self, revision: str) -> str:
        for known in (self.branches, self.tags):
            if revision in known:
                return known[revision]
        if revision in self.commits:
            return revision
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")


class HubEndpoint:
    """The server, on a free port of 127.0.0.1.

    Attributes:
        repositories: by id.
        requests: (method, path) of everything that was asked.
        part_bytes: files of more bytes are asked for in parts of this size. None: never.
        uploading: set once the first bytes of an LFS upload have come.
        go_on: uploads of LFS files wait for it after their first bytes; set from the start.
        before_commit: called with the repository before a commit is looked at.
    """

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self.part_bytes: int | None = None
        self.uploading, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()
        self.before_commit = None
        self.parts: dict[tuple[str, int], bytes] = {}
        self.lock = threading.RLock()
        hub = self

        class Handler(_Handler):
            endpoint = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def __enter__(self) -> "HubEndpoint":
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.go_on.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def environment(self, folder: Path) -> dict[str, str]:
        """Variables for a process that uses this Hub, with its caches in `folder`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(folder / "hf"),
            "HF_MODULES_CACHE": str(folder / "modules"),
            "HF_TOKEN": "hf_of_the_loopback_endpoint",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Path -> content of every file of a revision."""
        repository = self.repositories[repo_id]
        files = repository.commits[repository.commit_of(revision)]["files"]
        return {path: repository.contents[digest] for path, (digest, _) in files.items()}


class _Handler(BaseHTTPRequestHandler):
    endpoint: HubEndpoint
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer("GET")

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def log_message(self, *_) -> None:
        pass

    # One entry per kind of request; groups of the pattern are the arguments.
    ROUTES = (
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("GET", r"/api/models/([^/]+/[^/]+)", "info"),
        ("GET", r"/api/models/([^/]+/[^/]+)/revision/([^/]+)", "info"),
        ("GET", r"/api/models/([^/]+/[^/]+)/refs", "refs"),
        ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", "tree"),
        ("POST", r"/api/models/([^/]+/[^/]+)/branch/([^/]+)", "branch"),
        ("POST", r"/api/models/([^/]+/[^/]+)/tag/([^/]+)", "tag"),
        ("POST", r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", "preupload"),
        ("POST", r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", "commit"),
        ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/([^/]+/[^/]+)/([0-9a-f]{64})", "lfs_upload"),
        ("PUT", r"/lfs/([^/]+/[^/]+)/([0-9a-f]{64})/([0-9]+)", "lfs_upload_part"),
        ("POST", r"/lfs/([^/]+/[^/]+)/([0-9a-f]{64})/complete", "lfs_complete"),
        ("POST", r"/lfs/([^/]+/[^/]+)/([0-9a-f]{64})/verify", "lfs_verify"),
        ("GET", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
    )

    def _answer(self, method: str) -> None:
        path, hub = urlsplit(self.path).path, self.endpoint
        hub.requests.append((method, path))
        asked = "GET" if method == "HEAD" else method
        try:
            for verb, pattern, name in self.ROUTES:
                if verb == asked and (match := re.fullmatch(pattern, path)):
                    arguments = [part and unquote(part) for part in match.groups()]
                    if name.startswith("lfs_upload"):  # may wait, so it must not hold the lock
                        return self._reply(*getattr(self, name)(*arguments))
                    body = self._body()
                    with hub.lock:
                        reply = getattr(self, name)(*arguments, **({"body": body} if verb == "POST" else {}))
                    return self._reply(*reply)
            self._body()
            raise Refusal(404, f"no such page: {path}", "EntryNotFound")
        except Refusal as refusal:
            errors = {"error": refusal.message, "errors": [{"message": refusal.message}]}
            code = {"X-Error-Code": refusal.code} if refusal.code else {}
            self._reply(errors, {"X-Error-Message": " ".join(refusal.message.split()), **code}, refusal.status)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _reply(self, content, headers: dict[str, str] | None = None, status: int = 200) -> None:
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        # A download that goes on where it broke off.
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted and status == 200 and self.command == "GET":
            start, size = int(wanted[1]), len(content)
            content, status = content[start : int(wanted[2]) + 1 if wanted[2] else None], 206
            headers = {**(headers or {}), "Content-Range": f"bytes {start}-{start + len(content) - 1}/{size}"}
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _repository(self, repo_id: str) -> Repository:
        if repo_id not in self.endpoint.repositories:
            raise Refusal(401, "Repository not found", "RepoNotFound")
        return self.endpoint.repositories[repo_id]

    def create(self, body: bytes):
        asked = json.loads(body)
        repo_id = f"{asked['organization'] or 'somebody'}/{asked['name']}"
        url = f"{self.endpoint.url}/{repo_id}"
        if repo_id in self.endpoint.repositories:
            return {"error": "You already created this model repo", "url": url}, {}, 409
        self.endpoint.repositories[repo_id] = Repository(asked.get("visibility") == "private")
        return {"url": url, "id": repo_id, "name": repo_id}, {}

    def validate_yaml(self, body: bytes):
        content = json.loads(body)["content"]
        match = re.match(r"---\n(.*?)\n---", content, re.DOTALL)
        try:
            data = yaml.safe_load(match[1]) if match else None
        except yaml.YAMLError as error:
            raise Refusal(400, f"bad YAML: {error}") from error
        if data is not None and not isinstance(data, dict):
            raise Refusal(400, "metadata is no mapping")
        return {"errors": [], "warnings": [] if data else [{"message": "empty or missing yaml metadata"}]}, {}

    def info(self, repo_id: str, revision: str = "main"):
        repository = self._repository(repo_id)
        commit = repository.commit_of(revision)
        siblings = [{"rfilename": path} for path in sorted(repository.commits[commit]["files"])]
        about = {"_id": repo_id, "id": repo_id, "modelId": repo_id, "sha": commit, "private": repository.private}
        return {**about, "tags": [], "downloads": 0, "likes": 0, "gated": False, "siblings": siblings}, {}

    def refs(self, repo_id: str):
        repository = self._repository(repo_id)
        kinds = (("branches", "heads", repository.branches), ("tags", "tags", repository.tags))
        refs = {
            kind: [{"name": n, "ref": f"refs/{place}/{n}", "targetCommit": c} for n, c in known.items()]
            for kind, place, known in kinds
        }
        return {**refs, "converts": []}, {}

    def tree(self, repo_id: str, revision: str, folder: str | None):
        repository = self._repository(repo_id)
        files = repository.commits[repository.commit_of(revision)]["files"]
        recursive = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() in ("true", "1")
        start = f"{folder}/" if folder else ""
        found, folders = [], set()
        for path, (digest, is_lfs) in sorted(files.items()):
            if not path.startswith(start):
                continue
            for parent in list(Path(path).parents)[:-1]:
                name = parent.as_posix()
                if name.startswith(start) and (recursive or "/" not in name.removeprefix(start)):
                    folders.add(name)
            if not recursive and "/" in path.removeprefix(start):
                continue
            content = repository.contents[digest]
            entry = {"type": "file", "path": path, "size": len(content), "oid": _blob_id(content, digest, is_lfs)}
            if is_lfs:
                entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": len(_pointer(content, digest))}
            found.append(entry)
        if folder and not found and not folders:
            raise Refusal(404, f"{folder} does not exist", "EntryNotFound")
        return [{"type": "directory", "path": name, "oid": _ZERO, "size": 0} for name in sorted(folders)] + found, {}

    def branch(self, repo_id: str, name: str, body: bytes):
        repository = self._repository(repo_id)
        if name in repository.branches:
            raise Refusal(409, f"Reference already exists: {name}")
        start = json.loads(body or b"{}").get("startingPoint", "main")
        repository.branches[name] = repository.commit_of(start)
        return {}, {}

    def tag(self, repo_id: str, revision: str, body: bytes):
        repository, name = self._repository(repo_id), json.loads(body)["tag"]
        if name in repository.tags:
            raise Refusal(409, f"Tag already exists: {name}")
        repository.tags[name] = repository.commit_of(revision)
        return {}, {}

    def preupload(self, repo_id: str, revision: str, body: bytes):
        repository = self._repository(repo_id)
        files = repository.commits[repository.commit_of(revision)]["files"]
        answers = []
        for file in json.loads(body)["files"]:
            is_binary = b"\0" in base64.b64decode(file["sample"])
            is_lfs = file["path"].endswith(".safetensors") or file["size"] > REGULAR_LIMIT or is_binary
            answer = {"path": file["path"], "uploadMode": "lfs" if is_lfs else "regular", "shouldIgnore": False}
            if file["path"] in files:
                digest, was_lfs = files[file["path"]]
                content = repository.contents[digest]
                answer["oid"] = digest if was_lfs else _blob_id(content, digest, False)
            answers.append(answer)
        return {"files": answers}, {}

    def lfs_batch(self, repo_id: str, body: bytes):
        repository, asked = self._repository(repo_id), json.loads(body)
        objects = []
        for file in asked["objects"]:
            answer, place = dict(file), f"{self.endpoint.url}/lfs/{repo_id}/{file['oid']}"
            if file["oid"] not in repository.contents:
                upload, part = {"href": place, "header": {}}, self.endpoint.part_bytes
                if part is not None and file["size"] > part and "multipart" in asked["transfers"]:
                    count = -(-file["size"] // part)
                    header = {str(number): f"{place}/{number}" for number in range(1, count + 1)}
                    upload = {"href": f"{place}/complete", "header": {"chunk_size": str(part), **header}}
                answer["actions"] = {"upload": upload, "verify": {"href": f"{place}/verify", "header": {}}}
            objects.append(answer)
        return {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"}

    def _slow_body(self) -> bytes:
        hub, size = self.endpoint, int(self.headers["Content-Length"])
        content = self.rfile.read(min(size, 1000))
        hub.uploading.set()
        hub.go_on.wait(60)
        content += self.rfile.read(size - len(content))
        if len(content) < size:
            raise Refusal(400, "the upload broke off")
        return content

    def lfs_upload(self, repo_id: str, digest: str):
        content = self._slow_body()
        self._keep(repo_id, digest, content)
        return b"", {"ETag": f'"{hashlib.md5(content).hexdigest()}"'}

    def lfs_upload_part(self, repo_id: str, digest: str, number: str):
        content = self._slow_body()
        with self.endpoint.lock:
            self.endpoint.parts[digest, int(number)] = content
        return b"", {"ETag": f'"{hashlib.md5(content).hexdigest()}"'}

    def lfs_complete(self, repo_id: str, digest: str, body: bytes):
        parts = []
        for part in json.loads(body)["parts"]:
            parts.append(self.endpoint.parts.pop((digest, part["partNumber"])))
            if part["etag"].strip('"') != hashlib.md5(parts[-1]).hexdigest():
                raise Refusal(400, f"part {part['partNumber']} is another one")
        self._keep(repo_id, digest, b"".join(parts))
        return {}, {}

    def _keep(self, repo_id: str, digest: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != digest:
            raise Refusal(400, "XAmzContentSHA256Mismatch")
        with self.endpoint.lock:
            self._repository(repo_id).contents[digest] = content

    def lfs_verify(self, repo_id: str, digest: str, body: bytes):
        content = self._repository(repo_id).contents.get(digest)
        if content is None or len(content) != json.loads(body)["size"]:
            raise Refusal(404, "not uploaded", "EntryNotFound")
        return {}, {}

    def commit(self, repo_id: str, revision: str, body: bytes):
        repository = self._repository(repo_id)
        if self.endpoint.before_commit is not None:
            self.endpoint.before_commit(repository)
        if revision not in repository.branches:
            raise Refusal(404, f"no branch {revision}", "RevisionNotFound")
        parent, (header, *changes) = repository.branches[revision], map(json.loads, body.splitlines())
        if header["value"].get("parentCommit") not in (None, parent):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files, contents = dict(repository.commits[parent]["files"]), {}
        for change in changes:
            kind, value = change["key"], change["value"]
            if kind == "file":
                content = base64.b64decode(value["content"], validate=True)
                if len(content) > REGULAR_LIMIT:
                    raise Refusal(400, f"{value['path']} is too large for git")
                digest = hashlib.sha256(content).hexdigest()
                contents[digest], files[value["path"]] = content, (digest, False)
            elif kind == "lfsFile":
                if value["oid"] not in repository.contents:
                    raise Refusal(400, f"LFS pointer of {value['path']} points to a file that does not exist")
                files[value["path"]] = (value["oid"], True)
            elif kind == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
            else:
                raise Refusal(400, f"unknown key {kind}")
        repository.contents |= contents
        commit = repository.add(parent, files, header["value"]["summary"])
        repository.branches[revision] = commit
        url = f"{self.endpoint.url}/{repo_id}/commit/{commit}"
        return {"success": True, "commitOid": commit, "commitUrl": url, "pullRequestUrl": None}, {}

    def resolve(self, repo_id: str, revision: str, path: str):
        repository = self._repository(repo_id)
        commit = repository.commit_of(revision)
        headers = {"X-Repo-Commit": commit}
        files = repository.commits[commit]["files"]
        if path not in files:
            refusal = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", **headers}
            return b"Entry not found", refusal, 404
        digest, is_lfs = files[path]
        content = repository.contents[digest]
        etag = digest if is_lfs else _blob_id(content, digest, False)
        linked = {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(content))} if is_lfs else {}
        return content, {"ETag": f'"{etag}"', "Accept-Ranges": "bytes", **linked, **headers}


def _pointer(content: bytes, digest: str) -> bytes:
    """What git keeps of a file that LFS keeps."""
    lines = ("version https://git-lfs.github.com/spec/v1", f"oid sha256:{digest}", f"size {len(content)}", "")
    return "\n".join(lines).encode()


def _blob_id(content: bytes, digest: str, is_lfs: bool) -> str:
    """Git's own name of a file."""
    content = _pointer(content, digest) if is_lfs else content
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
