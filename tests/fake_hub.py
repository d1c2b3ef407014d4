"""A hub on this machine: the few answers of the real one that downloads and commits need, over a folder per repository.

A repository is `FOLDER/models/owner/name` or `FOLDER/datasets/owner/name`; those of the owner "secret" are private, those of
"gated" have conditions.  What is committed is written there.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub(BaseHTTPRequestHandler):
    """Answers requests from `folder`, a class attribute that `serve` sets."""

    folder: Path
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def repository(self, kind: str, name: str, revision: str) -> Path | None:
        """The folder of a repository, or None after a refusal was answered."""
        folder = self.folder / kind / name
        if name.startswith("secret/"):
            self.answer(401)
        elif name.startswith("gated/"):
            self.answer(403, X_Error_Code="GatedRepo")
        elif not folder.is_dir():
            self.answer(404, X_Error_Code="RepoNotFound")
        elif revision not in ("main", "v1", COMMIT):
            self.answer(404, X_Error_Code="RevisionNotFound")
        else:
            return folder
        return None

    def do_GET(self) -> None:
        """A file, or what is said of a repository."""
        path = self.path.partition("?")[0]
        if found := re.fullmatch(r"/(datasets/)?([\w.-]+/[\w.-]+)/resolve/([\w.-]+)/(.+)", path):
            dataset, name, revision, file = found.groups()
            folder = self.repository("datasets" if dataset else "models", name, revision)
            if folder is None:
                return
            if not (folder / file).is_file():
                self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
                return
            body = (folder / file).read_bytes()
            self.answer(200, body, X_Repo_Commit=COMMIT, ETag=f'"{hashlib.sha1(body).hexdigest()}"')
        elif found := re.fullmatch(r"/api/(models|datasets)/([\w.-]+/[\w.-]+)(?:/revision/([\w.-]+))?", path):
            kind, name, revision = found.groups()
            folder = self.repository(kind, name, revision or "main")
            if folder is not None:
                files = [{"rfilename": str(file.relative_to(folder))} for file in sorted(folder.rglob("*")) if file.is_file()]
                self.answer_json({"id": name, "sha": COMMIT, "siblings": files, "private": False, "tags": [], "downloads": 0,
                                  "likes": 0})
        elif found := re.fullmatch(r"/api/(models|datasets)/([\w.-]+/[\w.-]+)/tree/([\w.-]+).*", path):
            kind, name, revision = found.groups()
            folder = self.repository(kind, name, revision)
            if folder is not None:
                self.answer_json([{"type": "file", "path": str(file.relative_to(folder)), "size": file.stat().st_size,
                                   "oid": hashlib.sha1(file.read_bytes()).hexdigest()}
                                  for file in sorted(folder.rglob("*")) if file.is_file()])
        else:
            self.answer(404)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """Make a repository, or commit to it."""
        body = self.rfile.read(int(self.headers["Content-Length"])) if "Content-Length" in self.headers else self.read_chunks()
        if self.headers.get("Authorization") != "Bearer right":
            self.answer(401)
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            kind = "datasets" if asked.get("type") == "dataset" else "models"
            name = f"{asked.get('organization') or 'me'}/{asked['name'].split('/')[-1]}"
            (self.folder / kind / name).mkdir(parents=True, exist_ok=True)
            self.answer_json({"url": f"http://{self.headers['Host']}/{'datasets/' if kind == 'datasets' else ''}{name}"})
        elif self.path == "/api/validate-yaml":
            self.answer_json({"errors": [], "warnings": []})
        elif re.match(r"/api/(?:models|datasets)/.+/preupload/", self.path):
            self.answer_json({"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                                        for file in json.loads(body)["files"]]})
        elif found := re.match(r"/api/(models|datasets)/([\w.-]+/[\w.-]+)/commit/", self.path):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    file = self.folder / found[1] / found[2] / line["value"]["path"]
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(base64.b64decode(line["value"]["content"]))
            self.answer_json({"success": True, "commitOid": COMMIT, "commitUrl": f"http://{self.headers['Host']}/{found[2]}"})
        else:
            self.answer(404)

    def answer_json(self, content: object) -> None:
        self.answer(200, json.dumps(content).encode(), Content_Type="application/json", X_Repo_Commit=COMMIT)

    def read_chunks(self) -> bytes:
        """The body of a request that does not say its length."""
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """A hub over `folder` while the block runs; gives its address."""
    handler = type("Handler", (FakeHub,), {"folder": folder})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
