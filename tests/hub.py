"""A small Hugging Face hub on loopback: what `datasets`, `huggingface_hub` and tokenizers ask for,
and faults on demand.

    with Hub() as hub:
        hub.add_dataset("me/stories", {"data/train-0.parquet": data}, gated=True)
        hub.tokens["hf_mine"] = {"me/stories"}
        hub.fail("train-0.parquet", status=429, headers={"Retry-After": "1"}, skip=3, times=2)
        result = hub.run("...python source...", tmp_path, "argument")

`huggingface_hub` reads HF_ENDPOINT when it is imported, so whatever talks to the hub runs in a
process of its own: `hub.run`, or `subprocess` with `env=hub.env(folder)`.
"""

import base64
import contextlib
import hashlib
import http.server
import io
import json
import os
import subprocess
import sys
import threading
import time
import urllib.parse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Repo:
    files: dict[str, bytes]
    gated: bool = False


@dataclass
class Fault:
    """What happens to `times` requests (None: all), after `skip` of them, whose path contains
    `match`."""

    match: str
    status: int | None = None  # answer with this status
    headers: dict[str, str] = field(default_factory=dict)  # and these headers
    drop_after: int | None = None  # send so many bytes of the body, then cut the connection
    # send so many bytes of the body, then nothing any more, until the hub closes
    stall_after: int | None = None
    bytes_per_second: float | None = None  # send the body slowly
    delay_seconds: float = 0.0  # answer late
    skip: int = 0
    times: int | None = None
    method: str | None = None
    seen: int = 0  # requests it was applied to


@dataclass
class Hub:
    """The server. A context manager; `requests` lists what was asked, such as "GET
    /datasets/me/x/resolve/... 0-99".

    tokens  {token: the gated repositories its account may read}; any other token is refused,
            whatever it asks for
    """

    requests: list[str] = field(default_factory=list)
    repos: dict[tuple[str, str], Repo] = field(default_factory=dict)
    tokens: dict[str, set[str]] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    lock: Any = field(default_factory=threading.Lock)
    closing: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> "Hub":
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def add_dataset(self, repo: str, files: dict[str, bytes], gated: bool = False) -> None:
        self.repos["datasets", repo] = Repo(dict(files), gated)

    def add_model(self, repo: str, files: dict[str, bytes], gated: bool = False) -> None:
        self.repos["models", repo] = Repo(dict(files), gated)

    def fail(self, match: str, **how: Any) -> Fault:
        """A Fault for coming requests."""
        fault = Fault(match, **how)
        with self.lock:
            self.faults.append(fault)
        return fault

    def heal(self) -> None:
        with self.lock:
            self.faults.clear()

    def asked_for_data(self) -> int:
        """How many requests for the content of data files there were: not for listings, cards and
        columns."""
        return sum(
            r.startswith("GET ") and "/resolve/" in r and not r.split()[1].endswith((".md", ".py"))
            for r in self.requests
        )

    def fault_for(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.match in path and fault.times != 0 and fault.method in (None, method):
                    if fault.skip > 0:
                        fault.skip -= 1
                        continue
                    if fault.times is not None:
                        fault.times -= 1
                    fault.seen += 1
                    return fault
        return None

    def env(self, folder: Path, **extra: str) -> dict[str, str]:
        """The environment of a process that knows only this hub; caches go into `folder`."""
        return hub_env(self.url, folder, **extra)

    def run(
        self, code: str, folder: Path, *arguments: str, timeout: float = 120.0, **extra: str
    ) -> Any:
        """Runs Python source against this hub; returns what it printed last, decoded from JSON."""
        return run_python(code, self.env(folder, **extra), *arguments, timeout=timeout)


def hub_env(endpoint: str, folder: Path, **extra: str) -> dict[str, str]:
    kept = {
        key: value
        for key, value in os.environ.items()
        if "proxy" not in key.lower() and not key.startswith("HF_")
    }
    return (
        kept
        | {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(folder),
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "*",
        }
        | extra
    )


def run_python(code: str, env: dict[str, str], *arguments: str, timeout: float = 120.0) -> Any:
    """What a script printed last, decoded from JSON. Its standard error, where it fails or
    chatters, is in the message."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr.strip(), f"something was printed on standard error:\n{done.stderr}"
    return json.loads(done.stdout.splitlines()[-1])


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # or every answer, header and body, waits 40 ms for an acknowledgement
    disable_nagle_algorithm = True
    hub: Hub

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError, ValueError):  # the client has hung up
            super().handle()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def _answer(self, body: bytes = b"") -> None:
        url = urllib.parse.urlsplit(self.path)
        path = urllib.parse.unquote(url.path)
        asked = (self.headers.get("Range") or "").removeprefix("bytes=")
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {path} {asked}".strip())
        self._fault = self.hub.fault_for(self.command, path)
        if self._fault is not None:
            time.sleep(self._fault.delay_seconds)
            if self._fault.status is not None:
                return self._send(self._fault.status, b"fault on demand", self._fault.headers)
        parts = path.strip("/").split("/")
        if self.command == "POST" and parts[0] == "api" and self._push(parts[1:], body):
            return None
        if parts[0] == "api" and len(parts) > 2 and parts[1] in ("datasets", "models"):
            return self._api(parts[1], parts[2:], urllib.parse.parse_qs(url.query), body)
        kind = "datasets" if parts[0] == "datasets" else "models"
        rest = parts[1:] if kind == "datasets" else parts
        if "resolve" in rest:
            at = rest.index("resolve")
            return self._file(kind, "/".join(rest[:at]), "/".join(rest[at + 2 :]), asked)
        self._send(404, b"no such page")

    def _push(self, parts: list[str], body: bytes) -> bool:
        """Answer what an upload asks, for an account whose token is known; every file comes in the
        commit itself. False for any other request."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if parts == ["validate-yaml"]:
            self._json({"errors": [], "warnings": []})
        elif parts == ["repos", "create"] and token not in self.hub.tokens:
            self._send(401, b"", {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif parts == ["repos", "create"]:
            asked = json.loads(body)
            name = "/".join([asked.get("organization") or "me", asked["name"]])
            self.hub.repos.setdefault(
                ("models", name), Repo({}, asked.get("visibility") == "private")
            )
            self.hub.tokens[token].add(name)
            self._json({"url": f"{self.hub.url}/{name}", "name": name})
        elif "preupload" in parts:
            files = [
                {**each, "uploadMode": "regular", "shouldIgnore": False}
                for each in json.loads(body)["files"]
            ]
            self._json({"files": files})
        elif "commit" in parts and (repo := self._repo(parts[0], "/".join(parts[1:3]))):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    repo.files[line["value"]["path"]] = content
            url = f"{self.hub.url}/{'/'.join(parts[1:3])}/commit/{COMMIT}"
            self._json({"commitUrl": url, "commitOid": COMMIT, "success": True})
        else:
            return False
        return True

    def _repo(self, kind: str, name: str) -> Repo | None:
        """The repository, or None with the refusal already sent (as the real hub words it)."""
        repo = self.hub.repos.get((kind, name))
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            self._send(401, b"", {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif repo is None:  # the real one does not tell strangers whether a repository exists
            status = 404 if token else 401
            self._send(
                status,
                b"",
                {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"},
            )
        elif repo.gated and name not in self.hub.tokens.get(token, set()):
            message = (
                f"Access to {kind[:-1]} {name} is restricted. You must have access to it "
                "and be authenticated."
            )
            self._send(
                403 if token else 401,
                b"",
                {"X-Error-Code": "GatedRepo", "X-Error-Message": message},
            )
        else:
            return repo
        return None

    def _file(self, kind: str, name: str, file: str, asked: str) -> None:
        if (repo := self._repo(kind, name)) is None:
            return
        if file not in repo.files:
            headers = {
                "X-Error-Code": "EntryNotFound",
                "X-Error-Message": "Entry not found",
                "X-Repo-Commit": COMMIT,
            }
            return self._send(404, b"Entry not found", headers)
        data = repo.files[file]
        headers = {"ETag": f'"{_digest(data)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if not asked:
            return self._send(200, data, headers)
        first, last = asked.split("-")
        begin = int(first) if first else max(0, len(data) - int(last))
        end = min(int(last), len(data) - 1) if first and last else len(data) - 1
        if begin > end:
            return self._send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        self._send(
            206,
            data[begin : end + 1],
            headers | {"Content-Range": f"bytes {begin}-{end}/{len(data)}"},
        )

    def _api(self, kind: str, parts: list[str], query: dict[str, list[str]], body: bytes) -> None:
        verbs = [i for i, part in enumerate(parts) if part in ("revision", "tree", "paths-info")]
        at = verbs[0] if verbs else len(parts)
        name, verb, rest = "/".join(parts[:at]), parts[at : at + 1], parts[at + 2 :]
        if (repo := self._repo(kind, name)) is None:
            return
        if verb == ["tree"]:
            recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
            return self._json(_entries(repo, "/".join(rest), recursive))
        if verb == ["paths-info"]:
            asked = (
                urllib.parse.parse_qs(body.decode())
                if not body.startswith(b"{")
                else json.loads(body)
            )
            everything = {entry["path"]: entry for entry in _entries(repo, "", True)}
            return self._json([everything[path] for path in asked["paths"] if path in everything])
        siblings = [{"rfilename": file} for file in repo.files]
        info = {
            "_id": "0",
            "id": name,
            "sha": COMMIT,
            "private": False,
            "gated": repo.gated,
            "disabled": False,
        }
        self._json(info | {"siblings": siblings, "tags": [], "downloads": 0, "likes": 0})

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        fault = self._fault or Fault("")
        if fault.bytes_per_second is not None:
            step = max(1, int(fault.bytes_per_second / 20))
            for begin in range(0, len(body), step):
                self.wfile.write(body[begin : begin + step])
                self.hub.closing.wait(1 / 20)
        elif fault.drop_after is not None or fault.stall_after is not None:
            self.wfile.write(
                body[: fault.stall_after if fault.drop_after is None else fault.drop_after]
            )
            self.wfile.flush()
            if fault.drop_after is None:
                self.hub.closing.wait()
            self.connection.close()
            self.close_connection = True
        else:
            self.wfile.write(body)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _entries(repo: Repo, folder: str, recursive: bool) -> list[dict]:
    """A folder's listing, folders included, in the form of the hub's API."""
    found: dict[str, dict] = {}
    prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
    for path, data in repo.files.items():
        if not path.startswith(prefix):
            continue
        steps = path[len(prefix) :].split("/")
        for depth in range(1, len(steps)):
            if recursive or depth == 1:
                name = prefix + "/".join(steps[:depth])
                found[name] = {
                    "type": "directory",
                    "path": name,
                    "size": 0,
                    "oid": _digest(name.encode())[:40],
                }
        if recursive or len(steps) == 1:
            found[path] = {
                "type": "file",
                "path": path,
                "size": len(data),
                "oid": _digest(data)[:40],
            }
    return list(found.values())


PROLOGUE = """
import json, random, sys, time
from pathlib import Path
from core.data.sources import SOURCES, build_source, open_sources
from core.data.sources.hf import HfSettings, HfSource
def source(dataset, seed=7, **more):
    return build_source(HfSettings(dataset=dataset, **more), Path("."), seed)
def opened(*sources):
    begin = time.monotonic()
    good, failed = open_sources(list(sources))
    return [s.name for s in good], failed, time.monotonic() - begin
"""


def parquet(rows: list[dict], **options: int) -> bytes:
    import pyarrow
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out, **options)
    return out.getvalue()


def lines(rows: list[dict]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def rows(shard: int, count: int) -> list[dict]:
    return [{"id": i, "text": f"shard {shard} row {i}"} for i in range(count)]
