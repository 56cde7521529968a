"""A Hub on 127.0.0.1: the few routes that huggingface_hub 2.4 asks when it looks at a repository and downloads files.

Faults are set per repository or for the server: `gated` (401 without a token, 403 with one), a connection that breaks
after some bytes of a file, one that stalls, and answers that come late or are errors. The token hf_wrong is unknown.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse


@dataclass
class Repo:
    files: dict[str, bytes]
    gated: bool = False

    @property
    def commit(self) -> str:
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()


@dataclass
class Hub:
    """What the server holds, and what it was asked."""

    url: str = ""
    models: dict[str, Repo] = field(default_factory=dict)
    datasets: dict[str, Repo] = field(default_factory=dict)
    seen: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, Range
    sent: dict[str, int] = field(default_factory=dict)  # bytes per file
    break_after: dict[str, int] = field(default_factory=dict)  # file: bytes, once
    stall: dict[str, float] = field(default_factory=dict)  # file: seconds before the second half, once
    status: int = 0  # answer everything with this
    silent: float = 0  # seconds before any answer

    def downloaded(self) -> set[str]:
        return {path.split("/resolve/")[1].split("/", 1)[1] for m, path, _ in self.seen
                if m == "GET" and "/resolve/" in path}  # fmt: skip


def read_folder(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            url = urlparse(self.path)
            path = unquote(url.path)
            hub.seen.append((self.command, path, self.headers.get("Range") or ""))
            time.sleep(hub.silent)
            if self.headers.get("Authorization") == "Bearer hf_wrong":
                return self.json(
                    {"error": "x"}, 401, {"X-Error-Message": "Invalid credentials in Authorization header"}
                )
            if hub.status:
                return self.json({"error": "fault"}, hub.status)
            if path.startswith("/api/"):
                _, _, kind, *rest = path.split("/")
                self.api(getattr(hub, kind), rest, parse_qs(url.query))
            else:
                kind, rest = ("datasets", path[10:]) if path.startswith("/datasets/") else ("models", path[1:])
                name, _, tail = rest.partition("/resolve/")
                revision, _, file = tail.partition("/")
                self.file(getattr(hub, kind).get(name), revision, file)

        def api(self, repos: dict[str, Repo], rest: list[str], query: dict[str, list[str]]) -> None:
            name, rest = "/".join(rest[:2]), rest[2:]
            repo = repos.get(name)
            if repo is None:
                return self.refuse("RepoNotFound", 404 if self.headers.get("Authorization") else 401)
            if len(rest) > 1 and "/".join(rest[1:]) not in ("main", repo.commit):
                return self.refuse("RevisionNotFound", 404)
            if rest[:1] == ["tree"]:
                entries = [{"type": "file", "path": f, "size": len(b), "oid": oid(b)} for f, b in repo.files.items()]
                return self.json(entries)
            siblings = [{"rfilename": f, "size": len(b), "blobId": oid(b)} for f, b in repo.files.items()]
            gated = "manual" if repo.gated else False
            self.json({"id": name, "sha": repo.commit, "siblings": siblings, "gated": gated, "private": False})

        def file(self, repo: Repo | None, revision: str, file: str) -> None:
            if repo is None:
                return self.refuse("RepoNotFound", 404 if self.headers.get("Authorization") else 401)
            if repo.gated:
                return self.refuse("GatedRepo", 403 if self.headers.get("Authorization") else 401)
            if revision not in ("main", repo.commit):
                return self.refuse("RevisionNotFound", 404)
            if file not in repo.files:
                return self.refuse("EntryNotFound", 404)
            content, start = repo.files[file], 0
            if wanted := self.headers.get("Range"):
                start = int(wanted.removeprefix("bytes=").split("-")[0])
            self.send_response(206 if start else 200)
            self.send_header("ETag", f'"{oid(content)}"')
            self.send_header("X-Repo-Commit", repo.commit)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(content) - start))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.end_headers()
            if self.command == "HEAD":
                return
            body = content[start:]
            if file in hub.break_after:
                body = body[: hub.break_after.pop(file)]
                self.close_connection = True
            half = len(body) // 2
            self.wfile.write(body[:half])
            self.wfile.flush()
            time.sleep(hub.stall.pop(file, 0))
            with contextlib.suppress(OSError):  # the other side may be gone
                self.wfile.write(body[half:])
            hub.sent[file] = hub.sent.get(file, 0) + len(body)

        def refuse(self, code: str, status: int) -> None:
            self.json({"error": code}, status, {"X-Error-Code": code})

        def json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            for key, text in {"Content-Type": "application/json", "Content-Length": str(len(body)),
                              **(headers or {})}.items():  # fmt: skip
                self.send_header(key, text)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
