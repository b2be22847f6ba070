"""A hub of one process: serves the folders of models and data sets as the hub's own API does, as far as downloads need it."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """`folders` maps "models/ORG/NAME" and "datasets/ORG/NAME" to local folders; `asked` are the paths of all requests."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self.folders = folders
        self.asked: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None:
                """Silent."""

            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self.answer(body=True)

            def answer(self, *, body: bool) -> None:
                path = unquote(urlsplit(self.path).path)
                hub.asked.append(path)
                status, data, headers = hub.reply(path)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if body:
                    self.wfile.write(data)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """End it."""
        self.server.shutdown()
        self.server.server_close()

    def reply(self, path: str) -> tuple[int, bytes, dict[str, str]]:
        """Status, body and headers of a request."""
        for key, folder in self.folders.items():
            kind, name = key.split("/", 1)
            files = sorted(p for p in folder.rglob("*") if p.is_file())
            if path.startswith(f"/api/{kind}/{name}"):
                rest = path.removeprefix(f"/api/{kind}/{name}")
                if rest.startswith("/tree/"):
                    inside = "/".join(rest.split("/")[3:])
                    listed = [
                        self.entry(folder, p) for p in files if p.relative_to(folder).as_posix().startswith(inside)
                    ]
                    return self.json(listed)
                if rest.startswith("/paths-info/"):
                    return self.json([self.entry(folder, p) for p in files])
                info = {"id": name, "sha": COMMIT, "private": False, "gated": False, "tags": [], "downloads": 0}
                info |= {"siblings": [{"rfilename": p.relative_to(folder).as_posix()} for p in files], "likes": 0}
                return self.json(info)
            prefix = f"/{name}/resolve/" if kind == "models" else f"/datasets/{name}/resolve/"
            if path.startswith(prefix):
                file = folder / path.removeprefix(prefix).split("/", 1)[1]
                if file.is_file():
                    data = file.read_bytes()
                    tag = hashlib.sha1(data).hexdigest()
                    return 200, data, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
                return 404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
        return 404, b"{}", {"X-Error-Code": "RepoNotFound"}

    def entry(self, folder: Path, path: Path) -> dict[str, object]:
        """A file in a listing."""
        data = path.read_bytes()
        return {
            "type": "file",
            "path": path.relative_to(folder).as_posix(),
            "size": len(data),
            "oid": hashlib.sha1(data).hexdigest(),
        }

    def json(self, value: object) -> tuple[int, bytes, dict[str, str]]:
        """A JSON answer."""
        return 200, json.dumps(value).encode(), {"Content-Type": "application/json"}
