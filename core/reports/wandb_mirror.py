"""A copy of the metrics log at Weights & Biases. The log is the truth: errors here never stop a
run.

In:    events
Out:   a wandb run, in the cloud when there is a key and a connection, else under `directory`/wandb
       for `wandb sync`
State: the wandb run
"""

import contextlib
import netrc
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

INIT_SECONDS = 15
FINISH_SECONDS = 60
CONNECT_SECONDS = 5
PLAIN_KEYS = (
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "skipped",
    "memory_mb",
    "tokens",
)


class WandbMirror:
    """Sends events of training to a wandb run, under our step. wandb drops steps that it already
    has, so a resumed run with the same id continues the curve instead of doubling it."""

    def __init__(
        self, project: str, run_id: str, name: str, config: dict, directory: Path, mode: str
    ):
        import wandb

        directory.mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(
            silent=True, console="off", init_timeout=INIT_SECONDS, login_timeout=1
        )
        self.run = wandb.init(
            project=project,
            id=run_id,
            name=name,
            config=config,
            dir=str(directory),
            mode=mode,
            resume="allow",
            settings=settings,
        )
        self.mode = mode
        self.run.define_metric("tokens")
        self.run.define_metric("*", step_metric="tokens")

    def update(self, event: dict) -> None:
        if values := _values(event):
            self.run.log(values, step=event["step"])

    def close(self) -> None:
        """Wait for the upload, but not for ever: without a connection wandb would retry again and
        again."""
        run, self.run = self.run, _Closed()
        _within(FINISH_SECONDS, run.finish)


class _Closed:
    def log(self, *_: Any, **__: Any) -> None: ...

    def finish(self) -> None: ...


def open_wandb(
    project: str, run_id: str, name: str, config: dict, directory: Path
) -> tuple[WandbMirror | None, str]:
    """Return the mirror, or None, and a line for the user on its state. Never asks and never
    raises.

    run_id      stored in the checkpoint, so that a resumed run continues the curve
    directory   logs/<lineage>; wandb makes its own folder in it
    """
    try:
        import wandb
    except ImportError:
        return None, "wandb is not installed (pip install wandb); the run is logged in logs/ only"
    base_url = wandb.setup().settings.base_url
    mode, why = os.environ.get("WANDB_MODE") or "online", ""
    if mode == "online" and not _has_key(base_url):
        mode, why = "offline", "has no API key (wandb login)"
    elif mode == "online" and not _reachable(base_url):
        mode, why = "offline", f"cannot be reached at {base_url}"

    def start(mode: str) -> WandbMirror:
        return WandbMirror(project, run_id, name, config, directory, mode)

    try:
        mirror = start(mode)
    except Exception as error:
        if mode != "online":
            return None, _cannot_start(error)
        try:
            # wandb's own process still holds the id of the run that could not start
            _within(FINISH_SECONDS, lambda: wandb.teardown(exit_code=1))
            mirror = start("offline")
        except Exception as second:
            return None, _cannot_start(second)
        return mirror, _offline(f"refuses ({_first_line(error)})", mirror)
    if mode == "online":
        return mirror, f"wandb: {getattr(mirror.run, 'url', None) or 'online'}"
    if mode == "offline":
        return mirror, _offline(why or "is set to offline", mirror)
    return mirror, f"wandb is {mode} (WANDB_MODE)"


def _cannot_start(error: Exception) -> str:
    return f"wandb does not start ({_first_line(error)}); the run is logged in logs/ only"


def _offline(why: str, mirror: WandbMirror) -> str:
    folder = Path(str(getattr(mirror.run, "dir", "") or "")).parent
    return f"wandb {why}; it logs offline, to be sent with: wandb sync {folder}"


def _values(event: dict) -> dict[str, Any]:
    """Return an event's numbers under their names at wandb; {} for events that are not mirrored."""
    values: dict[str, Any] = {}
    if event.get("event") == "step":
        values = {key: event.get(key) for key in PLAIN_KEYS}
        for group in ("losses", "scheduled", "model", "curriculum"):
            values |= _prefixed(group, event.get(group))
        values |= _source_values(event)
    elif event.get("event") == "eval":
        left_out = ("event", "step", "tokens", "time")
        values = {f"eval/{key}": value for key, value in event.items() if key not in left_out}
        values |= _prefixed("eval", _source_values(event))
        # losses and heads may have the names of other numbers
        for group in ("losses", "heads"):
            values |= _prefixed(f"eval/{group}", event.get(group))
        values["tokens"] = event.get("tokens")
    return {key: value for key, value in values.items() if isinstance(value, (int, float))}


def _prefixed(prefix: str, values: dict | None) -> dict[str, Any]:
    return {f"{prefix}/{name}": value for name, value in (values or {}).items()}


def _source_values(event: dict) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, source in (event.get("sources") or {}).items():
        values |= _prefixed(f"sources/{name}", source)
    return values


def _has_key(base_url: str) -> bool:
    """Tell whether wandb would find a key without asking."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(base_url).netloc
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        keys = netrc.netrc(os.environ.get("NETRC"))
        # wandb's service moved to another host, and still takes keys stored under the old one
        return bool(
            keys.authenticators(host)
            or (host == "api.forge.coreweave.com" and keys.authenticators("api.wandb.ai"))
        )
    return False


def _reachable(base_url: str) -> bool:
    """Tell whether a server answers: without a network that takes seconds here, and minutes in
    wandb's own retries."""
    parts = urlsplit(base_url)
    # behind a proxy a direct connection would tell nothing
    if getproxies().get(parts.scheme):
        return True
    try:
        socket.create_connection(
            (parts.hostname or "", parts.port or 443), timeout=CONNECT_SECONDS
        ).close()
    except OSError:
        return False
    return True


def _within(seconds: float, action: Callable[[], Any]) -> None:
    """Call `action` in a thread and wait so long at most; its exceptions are dropped."""

    def quietly() -> None:
        with contextlib.suppress(Exception):
            action()

    thread = threading.Thread(target=quietly, daemon=True)
    thread.start()
    thread.join(seconds)


def _first_line(error: Exception) -> str:
    return (str(error).strip().split("\n") or [""])[0][:200] or type(error).__name__
