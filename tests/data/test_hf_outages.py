"""A hub that is away, slow or refuses, through the real `datasets` code: waits and retries."""

import json
import time
from pathlib import Path

import pytest

from tests.hub import PROLOGUE, Hub, hub_env, rows, run_python


@pytest.mark.slow
@pytest.mark.parametrize(
    "dataset, file", [("me/parquet", "train-1.parquet"), ("me/gzip", "train.1.json.gz")]
)
@pytest.mark.parametrize(
    "how",
    [
        {"drop_after": 30, "times": 2},
        {"status": 520, "times": 3},
        {"status": 429, "headers": {"Retry-After": "1"}, "times": 1},
        {"status": 503, "times": 1},
        {"stall_after": 30, "times": 2},
        {"bytes_per_second": 2000},
    ],
    ids=["cut", "520", "429", "503", "stalled", "slow"],
)
def test_a_broken_line_is_tried_again(
    hub: Hub, tmp_path: Path, dataset: str, file: str, how: dict
) -> None:
    """Dropped connections and server errors in mid-run: the same documents as without them."""
    code = (
        PROLOGUE
        + """
HfSource.first_wait_seconds = 0.01
s = source(sys.argv[1])
s.open()
print("opened", flush=True)
input()
print(json.dumps([d.text for d in s.stream({})]))
"""
    )
    texts = _run_with_fault(hub, tmp_path, code, dataset, file, **how)
    shards = [[row["text"] for row in rows(k, n)] for k, n in enumerate([20, 33, 7, 15])]
    order = [int(text.split()[1]) for text in texts if text.endswith(" row 0")]
    assert texts == [text for k in order for text in shards[k]] and len(order) == 4


@pytest.mark.slow
def test_a_line_that_stays_broken_ends_the_source(hub: Hub, tmp_path: Path) -> None:
    code = (
        PROLOGUE
        + """
HfSource.first_wait_seconds = 0.01
s = source(sys.argv[1])
s.open()
print("opened", flush=True)
input()
count = 0
try:
    for document in s.stream({}):
        count += 1
except Exception as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""
    )
    kind, message = _run_with_fault(
        hub, tmp_path, code, "me/parquet", "train-2.parquet", status=520
    )
    assert (
        kind == "SourceUnavailable"
        and message.startswith("reading failed 5 times in a row; ")
        and "HTTP 520" in message
    )
    kind, message = _run_with_fault(
        hub, tmp_path, code, "me/parquet", "train-2.parquet", status=403
    )
    assert kind == "SourceUnavailable" and "refused access to me/parquet (HTTP 403)" in message


@pytest.mark.slow
def test_a_hub_that_is_away_for_a_moment_costs_no_source_in_mid_run(
    hub: Hub, tmp_path: Path
) -> None:
    """A data worker opens again later. At the start of a run, no connection is told at once, and an
    answer is asked for twice."""
    code = (
        PROLOGUE
        + """
import threading
from huggingface_hub import constants
there = constants.ENDPOINT
HfSource.first_wait_seconds = 0.2
def away(patient, seconds):
    constants.ENDPOINT = "http://127.0.0.1:9"  # nobody listens there
    if seconds:
        threading.Timer(seconds, lambda: setattr(constants, "ENDPOINT", there)).start()
    s = source("me/parquet", name="p")
    s.patient = patient
    result = opened(s)
    constants.ENDPOINT = there
    return result
print(json.dumps([away(False, 0), away(True, 1.0), away(True, 0)]))
"""
    )
    impatient, patient, given_up = hub.run(code, tmp_path)
    assert "cannot reach 127.0.0.1" in impatient[1]["p"] and impatient[2] < 0.2
    assert patient[0] == ["p"] and patient[2] > 1.0
    assert "cannot reach 127.0.0.1" in given_up[1]["p"] and 2.5 < given_up[2] < 6

    fault = hub.fail("me/parquet", status=503, headers={"Retry-After": "0"}, times=1, method="GET")
    good, failed, _ = hub.run(
        PROLOGUE + 'print(json.dumps(opened(source("me/parquet", name="p"))))', tmp_path / "fresh"
    )
    hub.heal()
    assert (good, failed) == (["p"], {}) and fault.seen


@pytest.mark.slow
def test_the_wait_a_hub_asks_for_is_found_and_cut(hub: Hub, tmp_path: Path) -> None:
    """In the errors of huggingface_hub itself and under those of `datasets`; by either header;
    never beyond a minute."""
    hub.fail("me/first", status=429, headers={"Retry-After": "7"})
    hub.fail("me/second", status=503, headers={"Retry-After": "3600"})
    hub.fail(
        "me/third",
        status=429,
        headers={
            "RateLimit": '"api";r=0;t=55',
            "RateLimit-Policy": '"fixed window";"api";q=500;w=300',
        },
    )
    hub.fail("me/fourth", status=403, headers={"Retry-After": "7"})
    waits, texts, slept = hub.run(
        PROLOGUE
        + """
from huggingface_hub import HfApi
from huggingface_hub.utils import _http
from core import hf_hub as hub
hub.quiet_datasets()
waits, texts, slept = [], [], []
for name in ("first", "second", "third", "fourth"):
    try:
        HfApi().dataset_info(f"me/{name}")
    except Exception as error:
        try:
            raise ConnectionError("Server Disconnected") from error
        except ConnectionError as outer:
            asked = [hub.asked_to_wait(error), hub.asked_to_wait(outer)]
            waits.append([*asked, hub.is_passing(outer)])
            texts.append(hub.explain(outer, f"me/{name}"))
_http.time.sleep = slept.append
endpoint = hub.need("huggingface_hub.constants", "").ENDPOINT
try:
    _http.http_backoff("GET", f"{endpoint}/me/second/resolve/main/x")
except Exception:
    pass
print(json.dumps([waits, texts, slept]))
""",
        tmp_path,
    )
    hub.heal()
    assert waits == [[7, 7, True], [60, 60, True], [55, 55, True], [0, 0, False]]
    assert (
        "HTTP 429" in texts[0]
        and "/settings/tokens" in texts[0]
        and "HTTP 503" in texts[1]
        and "HTTP 403" in texts[3]
    )
    assert slept == [61.0] * 5  # the library adds a second


@pytest.mark.slow
def test_no_silence_is_waited_for_without_end(hub: Hub, tmp_path: Path) -> None:
    """huggingface_hub sets no limit for some questions; here they have one."""
    hub.fail("/api/datasets/me/parquet", delay_seconds=20)
    code = (
        PROLOGUE
        + """
from huggingface_hub import HfApi
from core import hf_hub as hub
hub.SILENCE_SECONDS = 0.5
hub.check_reachable()
begin = time.monotonic()
try:
    HfApi().dataset_info("me/parquet")
except Exception as error:
    seconds = time.monotonic() - begin
    print(json.dumps([hub.is_passing(error), hub.explain(error, "me/parquet"), seconds]))
"""
    )
    passing, reason, seconds = hub.run(code, tmp_path)
    hub.heal()
    assert passing and reason.startswith("the connection to the Hub failed") and seconds < 5


def _run_with_fault(
    hub: Hub, folder: Path, code: str, dataset: str, match: str, **how: object
) -> list:
    """Runs a script that opens, says so and waits; the fault begins only then."""
    import subprocess
    import sys

    process = subprocess.Popen(
        [sys.executable, "-c", code, dataset],
        env=hub.env(folder, HF_HUB_DOWNLOAD_TIMEOUT="1"),
        cwd=Path(__file__).resolve().parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "opened\n", (
        process.communicate()[1]
    )
    fault = hub.fail(match, **how)
    out, err = process.communicate("\n", timeout=90)
    hub.heal()
    assert process.returncode == 0 and not err, err
    assert fault.seen, "the fault never came about"
    return json.loads(out.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "https://no-such-host.invalid"])
def test_offline_is_learnt_within_seconds(tmp_path: Path, endpoint: str) -> None:
    begin = time.monotonic()
    good, failed, seconds = run_python(
        PROLOGUE
        + """
names = ["wikimedia/wikipedia", "Skylion007/openwebtext", "allenai/c4"]
local = build_source(SOURCES["python_stdlib"][0](), Path("."), 7)
print(json.dumps(opened(local, *(source(name) for name in names))))
""",
        hub_env(endpoint, tmp_path),
    )
    assert good == ["python_stdlib"] and len(failed) == 3
    assert all(
        reason.startswith("cannot reach") and "check the network" in reason
        for reason in failed.values()
    )
    assert seconds < 5 and time.monotonic() - begin < 10


@pytest.mark.slow
def test_a_silent_hub_does_not_outlast_the_deadline(hub: Hub, tmp_path: Path) -> None:
    hub.fail("me/parquet", delay_seconds=20)
    code = (
        PROLOGUE + 'b=time.monotonic(); f=open_sources([source("me/parquet")], 3.0)[1]; '
        "print(json.dumps([f, time.monotonic()-b]))"
    )
    failed, seconds = hub.run(code, tmp_path)
    hub.heal()
    assert failed["me_parquet"].startswith("no answer within 3 s") and seconds < 4
