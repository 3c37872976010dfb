"""A server on this machine that answers the Hub's calls, and processes that use it."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

PACKAGE = Path(__file__).parents[1]


class Hub(ThreadingHTTPServer):
    """Repositories as `{name: {path: content}}`; weights are uploaded by the large-file calls."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Calls)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.large: dict[str, bytes] = {}
        self.private: set[str] = set()

    def commit_of(self, name: str) -> str:
        content = b"".join(path.encode() + data for path, data in sorted(self.repositories[name].items()))
        return hashlib.sha1(content).hexdigest()


class Calls(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args):
        pass

    def do_POST(self):
        body, path = self.read_body(), self.plain_path()
        if path == "/api/repos/create":
            request = json.loads(body)
            name = f"{request.get('organization') or 'me'}/{request['name']}"
            exists = name in self.server.repositories
            if request.get("private") or request.get("visibility") == "private":  # earlier versions, later versions
                self.server.private.add(name)
            self.server.repositories.setdefault(name, {".gitattributes": b""})
            return self.answer({"url": f"{self.server.url}/{name}", "name": name}, 409 if exists else 200)
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if match := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            actions = {"upload": {"href": f"{self.server.url}/large/OID"}}
            objects = [
                {**one, "actions": json.loads(json.dumps(actions).replace("OID", one["oid"]))}
                for one in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        if match := re.fullmatch(r"/api/models/(.+)/preupload/(.+)", path):
            request = json.loads(body)
            kept = self.server.repositories[match[1]].get(".gitignore", b"").decode()
            patterns = request.get("gitIgnore", kept).split()
            files = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": any(is_ignored(one["path"], pattern) for pattern in patterns),
                    "oid": None,
                }
                for one in request["files"]
            ]
            return self.answer({"files": files})
        if match := re.fullmatch(r"/api/models/(.+)/commit/(.+)", path):
            return self.commit(match[1], [json.loads(line) for line in body.splitlines()])
        if match := re.fullmatch(r"/api/datasets/(.+)/paths-info/(.+)", path):
            files = self.server.repositories.get(match[1], {})
            entries = {entry["path"]: entry for entry in entries_of(files, "")}
            return self.answer([entries[one] for one in parse_qs(body.decode())["paths"] if one in entries])
        return self.answer({"error": f"no such call {path}"}, 404)

    def do_PUT(self):
        self.server.large[self.plain_path().rpartition("/")[2]] = self.read_body()
        self.answer({})

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.plain_path()
        if path == "/api/whoami-v2":
            return self.answer({"name": "me", "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}})
        if match := re.fullmatch(r"/api/(?:models|datasets)/(.+)/tree/([^/]+)(/.*)?", path):
            files = self.server.repositories.get(match[1])
            if files is not None:
                return self.answer(entries_of(files, (match[3] or "").strip("/")))
        match = re.fullmatch(r"/api/(?:models|datasets)/([^/]+/[^/]+)(/revision/.+)?", path)
        if match and match[1] in self.server.repositories:
            siblings = [{"rfilename": one} for one in self.server.repositories[match[1]]]
            commit = self.server.commit_of(match[1])
            return self.answer({"id": match[1], "sha": commit, "siblings": siblings, "tags": [], "private": False})
        if match := re.fullmatch(r"(?:/datasets)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            data = self.server.repositories.get(match[1], {}).get(match[3])
            if data is not None:
                headers = {"ETag": f'"{oid(data)}"', "X-Repo-Commit": self.server.commit_of(match[1])}
                if block := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
                    start, stop = int(block[1]), min(int(block[2]) + 1, len(data))
                    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
                    return self.send(data[start:stop], 206, headers)
                return self.send(data, 200, headers)
            code = "EntryNotFound" if match[1] in self.server.repositories else "RepoNotFound"
            return self.send(b"", 404, {"X-Error-Code": code, "X-Error-Message": f"no {path}"})
        return self.send(b"{}", 404, {"X-Error-Code": "RepoNotFound"})

    def commit(self, name: str, lines: list[dict]) -> None:
        files = self.server.repositories[name]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            elif line["key"] == "deletedFile":
                files.pop(value["path"], None)
        commit = self.server.commit_of(name)
        self.answer({"commitUrl": f"{self.server.url}/{name}/commit/{commit}", "commitOid": commit, "success": True})

    def plain_path(self) -> str:
        return unquote(urlsplit(self.path).path)

    def read_body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, content: dict | list, status: int = 200) -> None:
        self.send(json.dumps(content).encode(), status, {"Content-Type": "application/json"})

    def send(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def entries_of(files: dict[str, bytes], folder: str) -> list[dict]:
    """The files below a folder, and the folders that they are in."""
    below = [path for path in sorted(files) if not folder or path.startswith(f"{folder}/")]
    folders = {parent.as_posix() for path in below for parent in Path(path).parents} - {"."}
    found = [{"type": "directory", "path": one, "size": 0, "oid": oid(one.encode())} for one in sorted(folders)]
    return found + [{"type": "file", "path": one, "size": len(files[one]), "oid": oid(files[one])} for one in below]


def is_ignored(path: str, pattern: str) -> bool:
    """Whether a `.gitignore` pattern matches: a leading slash anchors it to the top, a trailing one means folders."""
    folders = [str(folder) for folder in Path(path).parents][:-1]
    paths = folders if pattern.endswith("/") else [path, *folders]
    names = paths if pattern.startswith("/") else [Path(one).name for one in paths]
    return any(fnmatchcase(name, pattern.strip("/")) for name in names)


def oid(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def run(code: str, hub: Hub, folder: Path, *arguments: str, package: bool = True) -> str:
    """Runs code in a separate process with its own cache, logged in to `hub`; without `package`, asit_hf is hidden."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_token", "HF_HOME": str(folder / "hf")}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(PACKAGE), os.environ.get("PYTHONPATH", "")])
    if not package:
        code = f'import sys\nsys.modules["asit_hf"] = None\n{code}'
    command = [sys.executable, "-W", "error::FutureWarning", "-c", code, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
