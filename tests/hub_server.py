# SPDX-License-Identifier: Apache-2.0
"""A small Hub on loopback, enough for the real client's uploads and downloads of models and datasets, without Xet.

with LoopbackHub() as hub:
    hub.add("me/base", folder)
    subprocess.run(..., env=os.environ | hub.environment(cache))
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin", ".png", ".parquet")  # stored by their hash, as LFS does


class LoopbackHub:
    """The server.

    Attributes:
        repos: name -> commits, newest last; a commit is (hash, {path: content}).
        objects: content of large files by its SHA-256.
        uploads: hashes of the large files that were sent, in order.
        tokens: tokens that came with requests.
        fail_uploads: how many uploads of large files are still to be refused.
    """

    def __init__(self) -> None:
        self.repos: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.objects: dict[str, bytes] = {}
        self.uploads: list[str] = []
        self.tokens: set[str] = set()
        self.fail_uploads = 0
        self.lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """Variables that a process needs before it imports `huggingface_hub`."""
        wanted = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        return wanted | {"HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}

    def add(self, name: str, folder: Path) -> None:
        files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        self.commit(name, files)

    def commit(self, name: str, files: dict[str, bytes]) -> str:
        with self.lock:
            digest = hashlib.sha1(f"{name} {len(self.repos.get(name, []))}".encode()).hexdigest()
            self.repos.setdefault(name, []).append((digest, files))
            return digest

    def files(self, name: str) -> dict[str, bytes]:
        """Of the newest commit."""
        return self.repos[name][-1][1]

    def find(self, name: str, revision: str | None) -> tuple[str, dict[str, bytes]] | None:
        commits = self.repos.get(name, [])
        if revision in (None, "main"):
            return commits[-1] if commits else None
        return next((commit for commit in commits if commit[0] == revision), None)


def _oid(content: bytes, large: bool) -> str:
    if large:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, format: str, *args: Any) -> None:  # quiet
        pass

    def _answer(
        self, status: int, value: Any = None, headers: dict[str, str] | None = None, body: bytes | None = None
    ) -> None:
        content = body if body is not None else b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, text)
        if value is not None:
            self.send_header("Content-Type", "application/json")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _missing(self, code: str, headers: dict[str, str] | None = None) -> None:
        self._answer(404, {"error": code}, {"X-Error-Code": code, **(headers or {})})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while True:
            part = self.rfile.read(int(self.rfile.readline().split(b";")[0], 16))
            self.rfile.readline()
            if not part:
                return b"".join(parts)
            parts.append(part)

    def _handle(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        data = self._body()
        scheme, _, token = (self.headers.get("Authorization") or "").partition(" ")
        if scheme == "Bearer":
            hub.tokens.add(token)
        for pattern, method in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split("_")[1].upper().replace("READ", "GET HEAD"):
                groups = [group and group.removeprefix("models/") for group in match.groups()]
                return getattr(self, method)(data, *groups)
        return self._missing("RepoNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    # One method a route; its name says which requests it takes.

    def _read_whoami(self, data: bytes) -> None:
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        self._answer(200, {"type": "user", "id": "1", "name": "me", "fullname": "Me", "orgs": [], "auth": auth})

    def _post_create(self, data: bytes) -> None:
        asked = json.loads(data)
        kind = "datasets/" if asked.get("type") == "dataset" else ""
        name = f"{kind}{asked.get('organization') or 'me'}/{asked['name']}"
        if name in self.hub.repos:
            return self._answer(409, {"error": "exists", "url": f"{self.hub.url}/{name}"})
        self.hub.commit(name, {})
        return self._answer(200, {"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def _post_validate(self, data: bytes) -> None:
        self._answer(200, {"errors": [], "warnings": []})

    def _post_preupload(self, data: bytes, name: str, revision: str) -> None:
        known, found = self.hub.files(name), []
        for file in json.loads(data)["files"]:
            large = file["path"].endswith(LARGE)
            entry = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if file["path"] in known:
                entry["oid"] = _oid(known[file["path"]], large)
            found.append(entry)
        self._answer(200, {"files": found})

    def _post_batch(self, data: bytes, name: str) -> None:
        found = []
        for wanted in json.loads(data)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.objects:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/objects/{wanted['oid']}"}}
            found.append(entry)
        self._answer(200, {"transfer": "basic", "objects": found})

    def _put_object(self, data: bytes, oid: str) -> None:
        with self.hub.lock:
            if self.hub.fail_uploads:
                self.hub.fail_uploads -= 1
                return self._answer(403, {"error": "the line is cut"})
            assert hashlib.sha256(data).hexdigest() == oid
            self.hub.objects[oid] = data
            self.hub.uploads.append(oid)
        return self._answer(200, {})

    def _post_commit(self, data: bytes, name: str, revision: str) -> None:
        files = dict(self.hub.files(name))
        for line in data.splitlines():
            change = json.loads(line)
            kind, value = change["key"], change["value"]
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif kind == "deletedFile":
                files.pop(value["path"], None)
        digest = self.hub.commit(name, files)
        url = f"{self.hub.url}/{name}/commit/{digest}"
        self._answer(200, {"success": True, "commitOid": digest, "commitUrl": url})

    def _read_tree(self, data: bytes, name: str, revision: str, folder: str | None = None) -> None:
        commit = self.hub.find(name, revision)
        if commit is None:
            return self._missing("RepoNotFound" if name not in self.hub.repos else "RevisionNotFound")
        prefix, deep = f"{folder}/" if folder else "", "recursive=true" in self.path.lower()
        found: dict[str, dict[str, Any]] = {}
        for path, content in commit[1].items():
            if path.startswith(prefix):
                name, below, _ = path.removeprefix(prefix).partition("/")
                if below and not deep:
                    found[name] = {"type": "directory", "path": prefix + name, "oid": "0" * 40, "size": 0}
                else:
                    found[path] = {"type": "file", "path": path, "size": len(content), "oid": _oid(content, False)}
        entries = list(found.values())
        if folder is not None and not entries:
            return self._missing("EntryNotFound", {"X-Repo-Commit": commit[0]})
        return self._answer(200, entries, {"X-Repo-Commit": commit[0]})

    def _read_info(self, data: bytes, name: str, revision: str | None = None) -> None:
        commit = self.hub.find(name, revision)
        if commit is None:
            return self._missing("RepoNotFound" if name not in self.hub.repos else "RevisionNotFound")
        files = [{"rfilename": path} for path in commit[1]]
        about = {"_id": "0", "id": name, "modelId": name, "sha": commit[0], "siblings": files, "tags": []}
        return self._answer(200, {**about, "private": False, "gated": False, "disabled": False})

    def _read_file(self, data: bytes, name: str, revision: str, path: str) -> None:
        commit = self.hub.find(name, revision)
        if commit is None:
            return self._missing("RepoNotFound" if name not in self.hub.repos else "RevisionNotFound")
        if path not in commit[1]:
            return self._missing("EntryNotFound", {"X-Repo-Commit": commit[0]})
        content = commit[1][path]
        etag = f'"{_oid(content, path.endswith(LARGE))}"'
        return self._answer(200, None, {"X-Repo-Commit": commit[0], "ETag": etag}, body=content)


_NAME = r"((?:datasets/)?[^/]+/[^/]+)"  # as in addresses of files
_API_NAME = r"((?:models|datasets)/[^/]+/[^/]+)"
_ROUTES = (
    (r"/api/whoami-v2", "_read_whoami"),
    (r"/api/repos/create", "_post_create"),
    (r"/api/validate-yaml", "_post_validate"),
    (rf"/api/{_API_NAME}/preupload/(.+)", "_post_preupload"),
    (rf"/{_NAME}\.git/info/lfs/objects/batch", "_post_batch"),
    (r"/objects/(\w+)", "_put_object"),
    (rf"/api/{_API_NAME}/commit/(.+)", "_post_commit"),
    (rf"/api/{_API_NAME}/tree/([^/]+)(?:/(.+))?", "_read_tree"),
    (rf"/api/{_API_NAME}(?:/revision/(.+))?", "_read_info"),
    (rf"/(?:api/resolve-cache/models/)?{_NAME}/resolve/([^/]+)/(.+)", "_read_file"),
)
