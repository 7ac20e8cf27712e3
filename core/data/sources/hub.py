"""The Hugging Face Hub as the sources meet it: is it there, how a file of it is opened, and what an error of it means.

In:    names, URLs and errors of `datasets` and `huggingface_hub`
Out:   answers within seconds, and one-line reasons that say what to do
State: `datasets` is made quiet and impatient, once per process
"""

import socket
import ssl
import urllib.request
from typing import IO, Any
from urllib.parse import urlsplit

from core.data.sources.files import need
from core.errors import SourceUnavailable

PROBE_SECONDS = 5.0
"""How long a connection may take before the Hub counts as out of reach."""


def check_reachable() -> None:
    """Raises SourceUnavailable when no connection to the Hub (or to the proxy on the way) comes about.

    The library itself retries a failed name look-up for half a minute; a machine without network has to learn it at once.
    """
    constants = need("huggingface_hub.constants", "datasets")
    if constants.HF_HUB_OFFLINE:
        raise SourceUnavailable("HF_HUB_OFFLINE is set, and streaming needs the network; unset it or use local sources")
    host, port, way = _first_hop(constants.ENDPOINT)
    try:
        socket.create_connection((host, port), timeout=PROBE_SECONDS).close()
    except OSError as error:
        raise SourceUnavailable(
            f"cannot reach {way}: {error.strerror or error}; check the network, or use local sources"
        ) from None


def _first_hop(endpoint: str) -> tuple[str, int, str]:
    """Host and port the first packet goes to, and how to name it to a person."""
    url = urlsplit(endpoint)
    host = url.hostname or "huggingface.co"
    proxy = urllib.request.getproxies().get(url.scheme)
    if proxy and not urllib.request.proxy_bypass(host):
        hop = urlsplit(proxy if "//" in proxy else f"//{proxy}")
        return hop.hostname or host, hop.port or 80, f"the proxy {hop.hostname} before {host}"
    return host, url.port or (80 if url.scheme == "http" else 443), host


def quiet_datasets() -> Any:
    """The `datasets` module without bars, chatter and long waits."""
    datasets, hub = need("datasets", "datasets"), need("huggingface_hub.utils", "datasets")
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    hub.disable_progress_bars()
    hub.logging.set_verbosity_error()
    # Twenty tries of five seconds would hide an outage for minutes; the stream tries again itself, from its cursor.
    for what in ("READ", "OPEN"):
        setattr(datasets.config, f"STREAMING_{what}_MAX_RETRIES", 1)
    for what in ("READ", "OPEN", "READ_SERVER_UNAVAILABLE", "READ_RATE_LIMIT"):
        setattr(datasets.config, f"STREAMING_{what}_RETRY_INTERVAL", 0)
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # a call to a third host, three seconds long behind a firewall
    return datasets


def open_file(url: str) -> IO[bytes]:
    """A data file: `hf://...` (read by ranges) or a local path."""
    if not url.startswith("hf://"):
        return open(url, "rb")
    from huggingface_hub import HfFileSystem

    return HfFileSystem().open(url, "rb")  # type: ignore[return-value]


def is_permanent(error: Exception) -> bool:
    """Whether trying again is useless. A bare 401 or 403 is not: storage behind the Hub answers so in passing, too."""
    refusals = (
        "GatedRepoError",
        "RepositoryNotFoundError",
        "RevisionNotFoundError",
        "RemoteEntryNotFoundError",
        "DisabledRepoError",
    )
    return type(error).__name__ in refusals or isinstance(error, (FileNotFoundError, PermissionError))


def explain(error: Exception, dataset: str) -> str:
    """One line: what went wrong with a dataset, and what to do."""
    text = " ".join(str(error).split())
    low = text.lower()
    page = "the file" if dataset.startswith((".", "/", "~")) else f"https://huggingface.co/datasets/{dataset}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if "gated" in low:
        return f"{dataset} is gated: ask for access at {page}, and set HF_TOKEN"
    if "invalid credentials" in low:
        return "the Hub refused HF_TOKEN; correct it or unset it"
    if "doesn't exist on the hub" in low or type(error).__name__ == "RepositoryNotFoundError":
        return f"{dataset} is not on the Hub, or is private; check the spelling, or set HF_TOKEN"
    if status in (401, 403):
        return f"the Hub refused access to {dataset} (HTTP {status}): ask for it at {page}, and set HF_TOKEN"
    if ("builderconfig" in low and "not found" in low) or "config name is missing" in low:
        return f'{dataset} needs another "config": {_from_bracket(text)}'
    if "bad split" in low:
        return f'{dataset} has no such "split"; it has {_from_bracket(text)}'
    if "scripts are no longer supported" in low:
        return f"{dataset} is a loading script, which no version of datasets runs any more; choose a copy of it in Parquet"
    if isinstance(error, (ConnectionError, TimeoutError, ssl.SSLError, socket.gaierror)):
        return f"the connection to the Hub failed ({_short(text) or type(error).__name__}); check the network"
    return f"{dataset} cannot be read ({type(error).__name__}: {_short(text)}); look at {page}"


def _from_bracket(text: str) -> str:
    """The list at the end of one of the library's messages."""
    begin, end = text.find("["), text.find("]")
    return _short(text[begin + 1 : end].replace("'", ""), 600) if 0 <= begin < end else _short(text)


def _short(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else text[: limit - 4] + " ..."
