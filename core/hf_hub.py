"""The Hugging Face Hub: check that it can be reached, open its files, and explain its errors.

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
"""Seconds that a connection may take before the Hub counts as out of reach."""
SILENCE_SECONDS = 30.0
"""Seconds that the Hub may be silent where huggingface_hub sets no limit. For data it sets one:
10 s, or HF_HUB_DOWNLOAD_TIMEOUT."""
LONGEST_WAIT_SECONDS = 60.0
"""The longest wait between two requests, even if the Hub asks for a longer one."""

_once, _limited = threading.Lock(), False


class HubTrouble(SourceUnavailable):
    """The Hub cannot be used at the moment: trying again may help."""

    def __init__(self, reason: str, reachable: bool, wait_seconds: float = 0.0):
        self.reachable, self.wait_seconds = reachable, wait_seconds
        super().__init__(reason)


def check_reachable() -> None:
    """Raise HubTrouble when the Hub (or the proxy on the way) cannot be reached.

    The library itself retries a failed name look-up for half a minute; a machine without a network
    has to know at once."""
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
    """Return the error of `check_reachable`, for callers that have a local cache to turn to; ""
    where the Hub can be reached."""
    try:
        check_reachable()
    except SourceUnavailable as error:
        return str(error)
    return ""


def _first_hop(endpoint: str) -> tuple[str, int, str]:
    """Return the host and port that the first packet goes to, and its name for a person."""
    url = urlsplit(endpoint)
    host = url.hostname or "huggingface.co"
    proxy = urllib.request.getproxies().get(url.scheme)
    if proxy and not urllib.request.proxy_bypass(host):
        hop = urlsplit(proxy if "//" in proxy else f"//{proxy}")
        return hop.hostname or host, hop.port or 80, f"the proxy {hop.hostname} before {host}"
    return host, url.port or (80 if url.scheme == "http" else 443), host


def _limit_waiting() -> None:
    """Limit the waits of huggingface_hub, which waits without end for some answers, and as long as
    an answer asks it to."""
    global _limited
    http = need("huggingface_hub.utils._http", "datasets")

    def end_of_silence(request: Any) -> None:
        limits = dict.fromkeys(("connect", "read", "write", "pool"), SILENCE_SECONDS)
        for phase, limit in (request.extensions.get("timeout") or {}).items():
            if phase in limits and limit is not None:
                limits[phase] = limit
        request.extensions = {**request.extensions, "timeout": limits}

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
    """Return the `datasets` module without bars, chatter and long waits."""
    datasets, hub = need("datasets", "datasets"), need("huggingface_hub.utils", "datasets")
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    hub.disable_progress_bars()
    hub.logging.set_verbosity_error()
    # Twenty tries of five seconds would hide an outage for minutes; the stream itself tries again,
    # from its cursor.
    for case in ("READ", "OPEN"):
        setattr(datasets.config, f"STREAMING_{case}_MAX_RETRIES", 1)
    for case in ("READ", "OPEN", "READ_SERVER_UNAVAILABLE", "READ_RATE_LIMIT"):
        setattr(datasets.config, f"STREAMING_{case}_RETRY_INTERVAL", 0)
    # a call to a third host, which takes three seconds behind a firewall
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    _keep_the_bars_lock()
    _limit_waiting()
    return datasets


def _keep_the_bars_lock() -> None:
    """Give the invisible progress bars a lock that stays. `datasets` makes and removes their shared
    lock in several threads at once, and the second thread finds none; a lock that is there before
    is kept. A plain lock leaves no semaphore behind in a data worker either."""
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


def fetch_file(repo: str, file: str, kind: str = "") -> Path:
    """Fetch a file of a model's repository, or, with `kind` "datasets/", of a dataset's, into the
    library's local cache, and return its path; use the cache alone where the Hub is out of reach.

    Raises SourceUnavailable with the reason, or MissingPackage.
    """
    hub, utils = (
        need(module, "huggingface_hub", MissingPackage)
        for module in ("huggingface_hub", "huggingface_hub.utils")
    )
    utils.disable_progress_bars()
    utils.logging.set_verbosity_error()
    unreachable = why_unreachable()
    try:
        where = {"repo_type": "dataset" if kind else "model", "local_files_only": bool(unreachable)}
        return Path(hub.hf_hub_download(repo, file, **where))
    except Exception as error:  # any error of the library, or of the HTTP client under it
        if unreachable:
            raise SourceUnavailable(f"{unreachable}; the local cache does not have it") from None
        if _is_a(_root(error), "EntryNotFoundError") and _status(_root(error)) == 404:
            raise SourceUnavailable(f"{repo} has no {file}") from None
        raise SourceUnavailable(explain(error, repo, kind=kind)) from None


# errors -------------------------------------------------------------------------------------------


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and its causes: `datasets` wraps the Hub's answer in errors of its own,
    sometimes "from None"."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or error.__context__


def _root(error: BaseException) -> BaseException:
    """Find the Hub's answer, or the error of the connection, among an error's causes; otherwise the
    error itself. The first one decides: earlier ones, such as a missing README, say nothing."""
    chain = list(_chain(error))
    for cause in chain:
        if getattr(cause, "response", None) is not None or _is_a(cause, "TransportError"):
            return cause
    return next((cause for cause in chain if _is_broken_line(cause)), error)


def _is_a(error: BaseException, *names: str) -> bool:
    """Return whether an error is of a class with one of the names. The HTTP library under
    huggingface_hub changes from version to version, the names of its errors do not."""
    return any(cls.__name__ in names for cls in type(error).__mro__)


def _is_broken_line(error: BaseException) -> bool:
    return isinstance(error, ConnectionError | TimeoutError) or _is_a(
        error, "TransportError", "SSLError", "gaierror"
    )


def _status(error: BaseException) -> int:
    """Return the HTTP status of the Hub's answer; 0 when there was none."""
    return getattr(getattr(error, "response", None), "status_code", 0)


def _is_refusal(root: BaseException) -> bool:
    """Return whether the Hub refused, and would refuse again."""
    missing = (
        "RepositoryNotFoundError",
        "RevisionNotFoundError",
        "RemoteEntryNotFoundError",
        "DatasetNotFoundError",
    )
    return _is_a(root, "GatedRepoError", "DisabledRepoError", *missing)


def is_passing(error: Exception) -> bool:
    """Return whether trying again may help: a broken connection, too many requests, trouble on the
    Hub's side."""
    root = _root(error)
    return not _is_refusal(root) and (
        _is_broken_line(root) or _status(root) in (408, 429) or _status(root) >= 500
    )


def is_of_the_line(error: Exception) -> bool:
    """Return whether an error comes from the Hub or the connection, and not from the content."""
    root = _root(error)
    return _is_broken_line(root) or getattr(root, "response", None) is not None


def is_permanent(error: Exception) -> bool:
    """Return whether trying again is useless. A bare 401 or 403 is not permanent: the storage
    behind the Hub sometimes answers so for a moment."""
    lost = isinstance(error, FileNotFoundError | PermissionError) and not is_passing(error)
    return lost or _is_refusal(_root(error)) or "invalid credentials" in str(_root(error)).lower()


def asked_to_wait(error: Exception) -> float:
    """Return the seconds that the Hub asks to wait (with HTTP 429 and 503), at most a minute; 0
    when it asks for none."""
    response = getattr(_root(error), "response", None)
    if response is None:
        return 0.0
    wait = _wait_of(response, need("huggingface_hub.utils._http", "datasets"))
    return min(wait, LONGEST_WAIT_SECONDS)


def _wait_of(response: Any, http: Any) -> float:
    """Return the seconds that one of two headers asks for; `ratelimit` is the Hub's own, with the
    seconds until its window of minutes is over."""
    if response.status_code not in (429, 503):
        return 0.0
    try:
        seconds = float(response.headers.get("Retry-After") or 0.0)
    except ValueError:  # a date
        seconds = 0.0
    window = getattr(http, "parse_ratelimit_headers", lambda headers: None)(response.headers)
    if window is not None and window.remaining == 0:
        seconds = max(seconds, float(window.reset_in_seconds))
    return max(seconds, 0.0)


def trouble(error: Exception, dataset: str) -> SourceUnavailable:
    """Return the error that a source raises for an error of the Hub."""
    reason = explain(error, dataset)
    if is_passing(error):
        return HubTrouble(reason, reachable=True, wait_seconds=asked_to_wait(error))
    return SourceUnavailable(reason)


def explain(error: Exception, dataset: str, kind: str = "datasets/") -> str:
    """Explain in one line what went wrong with a dataset, and what to do. With `kind` "" it is a
    model or a tokenizer."""
    reason = _explain_access(error, dataset, kind) or _explain_other(error, dataset, kind)
    return redacted(reason)


def _page(dataset: str, kind: str) -> str:
    """Return the address of a dataset's page, for a person."""
    local = dataset.startswith((".", "/", "~"))
    return "the file" if local else f"{_endpoint()}/{kind}{dataset}"


def _endpoint() -> str:
    endpoint: str = need("huggingface_hub.constants", "datasets").ENDPOINT
    return endpoint.rstrip("/")


def _has_token() -> bool:
    return need("huggingface_hub", "datasets").get_token() is not None


def _how_to_add_a_token() -> str:
    return (
        f"create a token with read access at {_endpoint()}/settings/tokens, put it as HF_TOKEN=... "
        "into the file .env in the project's folder (or into the environment), and start again"
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _explain_access(error: Exception, dataset: str, kind: str) -> str:
    """Explain an error about tokens and permissions; "" for any other."""
    root = _root(error)
    low, status = f"{_one_line(error)} {root}".lower(), _status(root)
    page, token, put = _page(dataset, kind), _has_token(), _how_to_add_a_token()
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
    return ""


def _explain_other(error: Exception, dataset: str, kind: str) -> str:
    """Explain an error about the dataset, the Hub's state or the connection."""
    root, text = _root(error), _one_line(error)
    low, status = f"{text} {root}".lower(), _status(root)
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
            "" if _has_token() else f", or raise the limit: {_how_to_add_a_token()}"
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
    reason = f"{type(error).__name__}: {_short(text)}"
    return f"{dataset} cannot be read ({reason}); look at {_page(dataset, kind)}"


def _from_bracket(text: str) -> str:
    """Return the list at the end of one of the library's messages."""
    begin, end = text.find("["), text.find("]")
    return _short(text[begin + 1 : end].replace("'", ""), 600) if 0 <= begin < end else _short(text)


def _short(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else text[: limit - 4] + " ..."
