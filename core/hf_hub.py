"""The Hugging Face Hub as the program meets it: is it there, how a file of it is opened, and what
an error of it means.

In:    names, URLs and errors of `datasets` and `huggingface_hub`
Out:   answers within seconds, and one-line reasons that say what to do and never show a token
State: both libraries are made quiet and impatient, once per process
"""

import socket
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from core.environment import redacted
from core.errors import MissingPackage, SourceUnavailable
from core.optional_packages import need

PROBE_SECONDS = 5.0
"""How long a connection may take before the Hub counts as out of reach."""
SILENCE_SECONDS = 30.0
"""How long the Hub may say nothing where huggingface_hub sets no limit. For data it does: 10 s, or
HF_HUB_DOWNLOAD_TIMEOUT."""
LONGEST_WAIT_SECONDS = 60.0
"""A wait the Hub asks for is cut down to this; then it is asked again."""

_once, _limited = threading.Lock(), False


class HubTrouble(SourceUnavailable):
    """The Hub cannot be had just now: trying again may help."""

    def __init__(self, reason: str, reachable: bool, wait_seconds: float = 0.0):
        self.reachable, self.wait_seconds = reachable, wait_seconds
        super().__init__(reason)


def check_reachable() -> None:
    """Raises HubTrouble when no connection to the Hub (or to the proxy on the way) comes about.

    The library itself retries a failed name look-up for half a minute; a machine without network
    has to learn it at once."""
    constants = need("huggingface_hub.constants", "datasets")
    if constants.HF_HUB_OFFLINE:
        raise SourceUnavailable(
            "HF_HUB_OFFLINE is set, and streaming needs the network; unset it or use local sources"
        )
    host, port, way = _first_hop(constants.ENDPOINT)
    try:
        socket.create_connection((host, port), timeout=PROBE_SECONDS).close()
    except OSError as error:
        reason = (
            f"cannot reach {way}: {error.strerror or error}; check the network, or use "
            "local sources"
        )
        raise HubTrouble(reason, reachable=False) from None
    _limit_waiting()


def why_unreachable() -> str:
    """Return what `check_reachable` says, for whoever has a local cache to turn to; "" where the
    Hub can be reached."""
    try:
        check_reachable()
    except SourceUnavailable as error:
        return str(error)
    return ""


def _first_hop(endpoint: str) -> tuple[str, int, str]:
    """Host and port the first packet goes to, and how to name it to a person."""
    url = urlsplit(endpoint)
    host = url.hostname or "huggingface.co"
    proxy = urllib.request.getproxies().get(url.scheme)
    if proxy and not urllib.request.proxy_bypass(host):
        hop = urlsplit(proxy if "//" in proxy else f"//{proxy}")
        return hop.hostname or host, hop.port or 80, f"the proxy {hop.hostname} before {host}"
    return host, url.port or (80 if url.scheme == "http" else 443), host


def _limit_waiting() -> None:
    """huggingface_hub waits without end for the answers to some questions, and as long as an answer
    asks it to: no longer."""
    global _limited
    http = need("huggingface_hub.utils._http", "datasets")

    def end_of_silence(request: Any) -> None:
        asked = request.extensions.get("timeout") or {}
        limits = {what: asked.get(what) for what in ("connect", "read", "write", "pool")}
        request.extensions = {
            **request.extensions,
            "timeout": {
                what: SILENCE_SECONDS if limit is None else limit for what, limit in limits.items()
            },
        }

    def end_of_waiting(response: Any) -> None:
        if _wait_of(response, http) > LONGEST_WAIT_SECONDS:
            response.headers["Retry-After"] = f"{LONGEST_WAIT_SECONDS:.0f}"
            response.headers.pop("RateLimit", None)

    def client() -> Any:
        made = http.default_client_factory()
        hooks = made.event_hooks
        made.event_hooks = {
            "request": [*hooks.get("request", []), end_of_silence],
            "response": [*hooks.get("response", []), end_of_waiting],
        }
        return made

    with _once:  # sources open side by side, and setting it closes the connections of the others
        if not _limited:
            http.set_client_factory(client)
            _limited = True


def quiet_datasets() -> Any:
    """The `datasets` module without bars, chatter and long waits."""
    datasets, hub = need("datasets", "datasets"), need("huggingface_hub.utils", "datasets")
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    hub.disable_progress_bars()
    hub.logging.set_verbosity_error()
    # Twenty tries of five seconds would hide an outage for minutes; the stream tries again itself,
    # from its cursor.
    for what in ("READ", "OPEN"):
        setattr(datasets.config, f"STREAMING_{what}_MAX_RETRIES", 1)
    for what in ("READ", "OPEN", "READ_SERVER_UNAVAILABLE", "READ_RATE_LIMIT"):
        setattr(datasets.config, f"STREAMING_{what}_RETRY_INTERVAL", 0)
    # a call to a third host, three seconds long behind a firewall
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    _keep_the_bars_lock()
    _limit_waiting()
    return datasets


def _keep_the_bars_lock() -> None:
    """Bars that nobody sees share a lock, which `datasets` makes and takes away again, in several
    threads at once: the one who comes second finds none. One that is there before stays; a plain
    one leaves no semaphore behind in a data worker either."""
    bar = need("tqdm", "datasets").tqdm
    with _once:
        if not hasattr(bar, "_lock"):
            bar.set_lock(threading.RLock())


def open_file(url: str) -> BinaryIO:
    """Open a data file for reading: `hf://...` (read by ranges) or a local path."""
    if not url.startswith("hf://"):
        return open(url, "rb")
    from huggingface_hub import HfFileSystem

    file: BinaryIO = HfFileSystem().open(url, "rb")
    return file


def fetch_file(repo: str, file: str) -> Path:
    """A file of a model's repository, in the library's local cache; from there alone where the Hub
    is out of reach.

    Raises SourceUnavailable saying why it cannot be had, or MissingPackage.
    """
    hub, utils = (
        need(module, "huggingface_hub", MissingPackage)
        for module in ("huggingface_hub", "huggingface_hub.utils")
    )
    utils.disable_progress_bars()
    utils.logging.set_verbosity_error()
    unreachable = why_unreachable()
    try:
        return Path(hub.hf_hub_download(repo, file, local_files_only=bool(unreachable)))
    except Exception as error:  # whatever the library raises, or the HTTP client under it
        if unreachable:
            raise SourceUnavailable(f"{unreachable}; the local cache does not have it") from None
        if _is_a(_root(error), "EntryNotFoundError") and _status(_root(error)) == 404:
            raise SourceUnavailable(f"{repo} has no {file}") from None
        raise SourceUnavailable(explain(error, repo, kind="")) from None


# what an error means ------------------------------------------------------------------------------


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what caused it: `datasets` wraps what the Hub answered, sometimes "from None",
    in errors of its own."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or error.__context__


def _root(error: BaseException) -> BaseException:
    """Find what the Hub answered, or how the line broke; the error itself when it tells of neither.
    The first one found decides: what it happened after, such as a missing README, says nothing."""
    chain = list(_chain(error))
    told = (
        e for e in chain if getattr(e, "response", None) is not None or _is_a(e, "TransportError")
    )
    return next(told, next((e for e in chain if _is_broken_line(e)), error))


def _is_a(error: BaseException, *names: str) -> bool:
    """By name: the HTTP library under huggingface_hub changes from version to version, the names of
    its errors do not."""
    return any(cls.__name__ in names for cls in type(error).__mro__)


def _is_broken_line(error: BaseException) -> bool:
    return isinstance(error, ConnectionError | TimeoutError) or _is_a(
        error, "TransportError", "SSLError", "gaierror"
    )


def _status(error: BaseException) -> int:
    """The HTTP status of the Hub's answer; 0 when there was none."""
    return getattr(getattr(error, "response", None), "status_code", 0)


def _is_refusal(root: BaseException) -> bool:
    """Return whether the Hub said no, and would say it again."""
    missing = (
        "RepositoryNotFoundError",
        "RevisionNotFoundError",
        "RemoteEntryNotFoundError",
        "DatasetNotFoundError",
    )
    return _is_a(root, "GatedRepoError", "DisabledRepoError", *missing)


def is_passing(error: Exception) -> bool:
    """Return whether trying again may help: a broken line, too many requests, trouble on the Hub's
    side."""
    root = _root(error)
    return not _is_refusal(root) and (
        _is_broken_line(root) or _status(root) in (408, 429) or _status(root) >= 500
    )


def is_of_the_line(error: Exception) -> bool:
    """Return whether the Hub, or the way to it, has to do with an error; else it is what the bytes
    say."""
    root = _root(error)
    return _is_broken_line(root) or getattr(root, "response", None) is not None


def is_permanent(error: Exception) -> bool:
    """Return whether trying again is useless. A bare 401 or 403 is not: storage behind the Hub
    answers so in passing, too."""
    lost = isinstance(error, FileNotFoundError | PermissionError) and not is_passing(error)
    return lost or _is_refusal(_root(error)) or "invalid credentials" in str(_root(error)).lower()


def asked_to_wait(error: Exception) -> float:
    """Seconds the Hub wants to be left alone for (HTTP 429 and 503 may say so), at most a minute; 0
    when it says nothing."""
    response = getattr(_root(error), "response", None)
    wait = (
        0.0
        if response is None
        else _wait_of(response, need("huggingface_hub.utils._http", "datasets"))
    )
    return min(wait, LONGEST_WAIT_SECONDS)


def _wait_of(response: Any, http: Any) -> float:
    """By one of two headers; `ratelimit` is the Hub's own, and tells how long until its window of
    minutes is over."""
    if response.status_code not in (429, 503):
        return 0.0
    try:
        seconds = float(response.headers.get("Retry-After") or 0.0)
    except ValueError:  # a date
        seconds = 0.0
    window = getattr(http, "parse_ratelimit_headers", lambda headers: None)(response.headers)
    return max(
        seconds,
        0.0,
        float(window.reset_in_seconds) if window is not None and window.remaining == 0 else 0.0,
    )


def trouble(error: Exception, dataset: str) -> SourceUnavailable:
    """The error as a source raises it."""
    reason = explain(error, dataset)
    return (
        HubTrouble(reason, True, asked_to_wait(error))
        if is_passing(error)
        else SourceUnavailable(reason)
    )


def explain(error: Exception, dataset: str, kind: str = "datasets/") -> str:
    """One line: what went wrong with a dataset, and what to do. With `kind` "" it is a model or a
    tokenizer."""
    return redacted(_explain(error, dataset, kind))


def _explain(error: Exception, dataset: str, kind: str) -> str:
    root, text = _root(error), " ".join(str(error).split())
    low, status = f"{text} {root}".lower(), _status(root)
    local = dataset.startswith((".", "/", "~"))
    endpoint = need("huggingface_hub.constants", "datasets").ENDPOINT.rstrip("/")
    page = "the file" if local else f"{endpoint}/{kind}{dataset}"
    token = need("huggingface_hub", "datasets").get_token() is not None
    put = f"create a token with read access at {endpoint}/settings/tokens, {_where_to_put_it()}"
    if "invalid credentials" in low or "invalid username or password" in low:
        return (
            "the Hub refused your token (HTTP 401): it is mistyped, expired or revoked. Either "
            f"{put}; or take HF_TOKEN away: "
            "what is public needs none"
        )
    if _is_a(root, "GatedRepoError") or "gated dataset" in low:
        if token:
            return (
                f"{dataset} is gated, and the account of your token has no access: open {page} in "
                "a browser, logged in as that "
                "account, agree to the terms or ask for access, and start again once it is "
                "granted (a fine-grained token also "
                'needs the permission "read access to gated repositories")'
            )
        return (
            f"{dataset} is gated: open {page} in a browser, log in, agree to the terms or ask "
            f"for access; then {put}"
        )
    if "doesn't exist on the hub" in low or _is_a(root, "RepositoryNotFoundError"):
        private = (
            "your token must have read access to it"
            if token
            else f"{put} (the token of an account that may read it)"
        )
        return (
            f"{dataset} is not on the Hub, or is private; check the spelling at {page}; if it "
            f"is private, {private}"
        )
    if status in (401, 403):
        return f"the Hub refused access to {dataset} (HTTP {status}): ask for it at {page}" + (
            "" if token else f"; then {put}"
        )
    if ("builderconfig" in low and "not found" in low) or "config name is missing" in low:
        return f'{dataset} needs another "config": {_from_bracket(text)}'
    if "bad split" in low:
        return f'{dataset} has no such "split"; it has {_from_bracket(text)}'
    if "scripts are no longer supported" in low:
        return (
            f"{dataset} is a loading script, which no version of datasets runs any more; "
            "choose a copy of it in Parquet"
        )
    if status == 429:
        return "the Hub is asked too often (HTTP 429); try later" + (
            "" if token else f", or raise the limit: {put}"
        )
    if status >= 500:
        return (
            f"the Hub or its storage is in trouble (HTTP {status}: {_short(text, 100)}); try "
            "later, see https://status.huggingface.co"
        )
    if _is_broken_line(root):
        return (
            f"the connection to the Hub failed ({_short(text) or type(error).__name__}); "
            "check the network"
        )
    return f"{dataset} cannot be read ({type(error).__name__}: {_short(text)}); look at {page}"


def _where_to_put_it() -> str:
    return (
        "put it as HF_TOKEN=... into the file .env in the project's folder (or into the "
        "environment), and start again"
    )


def _from_bracket(text: str) -> str:
    """The list at the end of one of the library's messages."""
    begin, end = text.find("["), text.find("]")
    return _short(text[begin + 1 : end].replace("'", ""), 600) if 0 <= begin < end else _short(text)


def _short(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else text[: limit - 4] + " ..."
