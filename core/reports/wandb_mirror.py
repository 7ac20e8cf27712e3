"""A copy of the metrics log at Weights & Biases. The log is the truth: what goes wrong here never
stops a run.

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
    """Sends events of training to a wandb run, keyed by our step: wandb drops steps it already has,
    so a resumed run under the same id adds to the curve instead of doubling it."""

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
        """Wait for the upload, but not for ever: without a connection wandb tries again and
        again."""
        run, self.run = self.run, _Closed()
        _within(FINISH_SECONDS, run.finish)


class _Closed:
    def log(self, *_: Any, **__: Any) -> None: ...

    def finish(self) -> None: ...


def open_wandb(
    project: str, run_id: str, name: str, config: dict, directory: Path
) -> tuple[WandbMirror | None, str]:
    """The mirror, or None, and in either case one line that tells the user how it stands. Never
    asks, never raises.

    run_id      kept in the checkpoint, so that a resumed run goes on with the same curve
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
    try:
        mirror = WandbMirror(project, run_id, name, config, directory, mode)
    except Exception as error:
        if mode != "online":
            return (
                None,
                f"wandb does not start ({_first_line(error)}); the run is logged in logs/ only",
            )
        try:
            # wandb's own process still holds the id of the run that could not start.
            _within(FINISH_SECONDS, lambda: wandb.teardown(exit_code=1))
            mirror = WandbMirror(project, run_id, name, config, directory, "offline")
        except Exception as second:
            return (
                None,
                f"wandb does not start ({_first_line(second)}); the run is logged in logs/ only",
            )
        return (
            mirror,
            f"wandb refuses ({_first_line(error)}); it logs offline, to be sent with: "
            f"{_sync(mirror)}",
        )
    if mode == "online":
        return mirror, f"wandb: {getattr(mirror.run, 'url', None) or 'online'}"
    if mode == "offline":
        return (
            mirror,
            f"wandb {why or 'is set to offline'}; it logs offline, to be sent with: "
            f"{_sync(mirror)}",
        )
    return mirror, f"wandb is {mode} (WANDB_MODE)"


def _values(event: dict) -> dict[str, Any]:
    """The numbers of an event under the names they have at wandb; empty for events that are not
    mirrored."""
    kind = event.get("event")
    out: dict[str, Any] = {}
    if kind == "step":
        out = {key: event.get(key) for key in PLAIN_KEYS}
        out |= {f"losses/{name}": value for name, value in (event.get("losses") or {}).items()}
        out |= {
            f"scheduled/{name}": value for name, value in (event.get("scheduled") or {}).items()
        }
        out |= {f"model/{name}": value for name, value in (event.get("model") or {}).items()}
        out |= {
            f"curriculum/{name}": value for name, value in (event.get("curriculum") or {}).items()
        }
        out |= _of_sources(event)
    elif kind == "eval":
        out = {
            f"eval/{key}": value
            for key, value in event.items()
            if key not in ("event", "step", "tokens", "time")
        }
        out |= {f"eval/{key}": value for key, value in _of_sources(event).items()}
        # their names are a user's choice, or those of other measures
        for group in ("losses", "heads"):
            out |= {
                f"eval/{group}/{name}": value for name, value in (event.get(group) or {}).items()
            }
        out["tokens"] = event.get("tokens")
    return {key: value for key, value in out.items() if isinstance(value, (int, float))}


def _of_sources(event: dict) -> dict[str, Any]:
    return {
        f"sources/{name}/{key}": value
        for name, each in (event.get("sources") or {}).items()
        for key, value in each.items()
    }


def _has_key(base_url: str) -> bool:
    """Whether wandb would find a key without asking."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(base_url).netloc
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        keys = netrc.netrc(os.environ.get("NETRC"))
        # wandb's service moved to another host and still takes the keys kept under its old one.
        return bool(
            keys.authenticators(host)
            or (host == "api.forge.coreweave.com" and keys.authenticators("api.wandb.ai"))
        )
    return False


def _reachable(base_url: str) -> bool:
    """Whether anything answers there: a machine without network should learn so in seconds, not in
    wandb's own retries."""
    parts = urlsplit(base_url)
    # the proxy answers or it does not; a direct connection would say nothing
    if getproxies().get(parts.scheme):
        return True
    try:
        socket.create_connection(
            (parts.hostname or "", parts.port or 443), timeout=CONNECT_SECONDS
        ).close()
    except OSError:
        return False
    return True


def _sync(mirror: WandbMirror) -> str:
    folder = Path(str(getattr(mirror.run, "dir", "") or "")).parent
    return f"wandb sync {folder}"


def _within(seconds: float, action: Callable[[], Any]) -> None:
    """Do it, but wait no longer than that, and let nothing out."""

    def quietly() -> None:
        with contextlib.suppress(Exception):
            action()

    thread = threading.Thread(target=quietly, daemon=True)
    thread.start()
    thread.join(seconds)


def _first_line(error: Exception) -> str:
    return (str(error).strip().split("\n") or [""])[0][:200] or type(error).__name__
