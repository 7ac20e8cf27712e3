"""Hub datasets through the real `datasets` code, against a hub on loopback: exact resume, plain
refusals, broken lines."""

import gzip
import io
import json
import random
import time
from pathlib import Path

import pytest

from tests.hub import Hub, hub_env, run_python

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


@pytest.fixture(scope="module")
def hub():
    import zstandard

    sizes = [20, 33, 7, 15]
    card = (
        b"---\nconfigs:\n- config_name: big\n  data_files: big/*.jsonl\n- config_name: "
        b"small\n  data_files: small/*.jsonl\n---\n"
    )
    with Hub() as hub:
        hub.add_dataset(
            "me/parquet",
            {
                f"data/train-{k}.parquet": parquet(rows(k, n), row_group_size=6)
                for k, n in enumerate(sizes)
            },
        )
        hub.add_dataset(
            "me/gzip",
            {
                f"en/train.{k}.json.gz": gzip.compress(lines(rows(k, n)))
                for k, n in enumerate(sizes)
            },
        )
        hub.add_dataset(
            "me/zstd",
            {
                f"train/{k}.jsonl.zst": zstandard.compress(lines(rows(k, n)))
                for k, n in enumerate(sizes)
            },
        )
        hub.add_dataset(
            "me/configs",
            {
                "README.md": card,
                "big/0.jsonl": lines(rows(0, 3)),
                "small/0.jsonl": lines(rows(1, 3)),
            },
        )
        hub.add_dataset(
            "me/script",
            {"script.py": b"import datasets", "data/train.parquet": parquet(rows(0, 3))},
        )
        hub.add_dataset("me/gated", {"data/train.parquet": parquet(rows(0, 3))}, gated=True)
        hub.tokens |= {"hf_withoutAccess1234": set(), "hf_withAccess12345678": {"me/gated"}}
        hub.add_dataset(
            "me/qa",
            {"train.jsonl": lines([{"question": f"q{i}", "answer": f"a{i}"} for i in range(4)])},
        )
        yield hub


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["me/parquet", "me/gzip", "me/zstd"])
def test_resume_is_no_resume(hub: Hub, tmp_path: Path, dataset: str) -> None:
    """From every cursor of two epochs, through JSON and a fresh source: the rest of the straight
    run."""
    result = hub.run(
        PROLOGUE
        + """
dataset, out = sys.argv[1], []
for epoch in (0, 1):
    texts, cursors = [], []
    stream = source(dataset).stream({"epoch": epoch})
    while True:
        cursors.append(json.dumps(stream.cursor()))
        try:
            texts.append(next(stream).text)
        except StopIteration:
            break
    cuts = sorted({0, len(texts), *random.Random(5).sample(range(len(texts)), 5)})
    wrong = [c for c in cuts if [d.text for d in source(dataset).stream(json.loads(cursors[c]))] != texts[c:]]
    out.append([texts, wrong])
print(json.dumps(out))
""",
        tmp_path,
        dataset,
    )
    expected = [row["text"] for k, n in enumerate([20, 33, 7, 15]) for row in rows(k, n)]
    for texts, wrong in result:
        assert wrong == [] and sorted(texts) == sorted(expected)
    assert result[0][0] != result[1][0]


@pytest.mark.slow
def test_resume_reads_no_row_group_behind_it(tmp_path: Path) -> None:
    """A resume deep in a long file fetches its end, not its beginning."""
    rng = random.Random(1)
    long = [{"text": f"{i} " + "".join(rng.choices("abcdefgh ", k=20_000))} for i in range(2000)]
    data = parquet(long, row_group_size=50, compression="none")
    with Hub() as hub:
        hub.add_dataset("me/long", {"train.parquet": data})
        key = hub.run(
            PROLOGUE
            + 'print(json.dumps(next(source("me/long").stream({"epoch": 0, "shard": 0, "row": '
            "1700})).key))",
            tmp_path,
        )
        fetched = [
            request.split()[-1].split("-")
            for request in hub.requests
            if "train.parquet " in request
        ]
    assert key == "train.parquet#1700"
    assert sum(min(int(end), len(data) - 1) - int(begin) + 1 for begin, end in fetched) < 0.6 * len(
        data
    )
    assert not [begin for begin, _ in fetched if 1_000_000 < int(begin) < 0.8 * len(data)]


@pytest.mark.slow
def test_refusals_say_what_to_do(hub: Hub, tmp_path: Path) -> None:
    good, failed, seconds, qa = hub.run(
        PROLOGUE
        + """
qa = {"fields": ["question", "answer"], "format": "Q: {question}\\nA: {answer}"}
good, failed, seconds = opened(
    source("me/gated", name="gated"), source("me/absent", name="absent"), source("me/script", name="script"),
    source("me/configs", name="no_config"), source("me/configs", config="huge", name="wrong_config"),
    source("me/configs", config="small", name="right_config"), source("me/parquet", split="test", name="split"),
    source("me/qa", name="column"), source("me/qa", name="qa", **qa),
)
stream = source("me/qa", **qa).stream({})
print(json.dumps([good, failed, seconds, [d.text for d in stream]]))
""",
        tmp_path,
    )
    assert good == ["right_config", "qa"]
    assert qa == [f"Q: q{i}\nA: a{i}" for i in range(4)]
    token = (
        f"create a token with read access at {hub.url}/settings/tokens, put it as "
        "HF_TOKEN=... into the file .env in the "
    )
    token += "project's folder (or into the environment), and start again"
    assert failed == {
        "gated": f"me/gated is gated: open {hub.url}/datasets/me/gated in a browser, log in, "
        "agree to the terms or ask for "
        f"access; then {token}",
        "absent": "me/absent is not on the Hub, or is private; check the spelling at "
        f"{hub.url}/datasets/me/absent; if it is "
        f"private, {token} (the token of an account that may read it)",
        "script": "me/script is a loading script, which no version of datasets runs any more; "
        "choose a copy of it in Parquet",
        "no_config": 'me/configs needs another "config": big, small',
        "wrong_config": 'me/configs needs another "config": big, small',
        "split": 'me/parquet has no such "split"; it has train',
        "column": 'me/qa has no column "text"; its columns are question, answer: '
        'set "text_field" to one of them, or "fields" and "format"',
    }
    assert seconds < 12


@pytest.mark.slow
def test_tokens_are_used_and_never_shown(hub: Hub, tmp_path: Path) -> None:
    """None, one without access, a wrong one, the right one: each is told what to do, and no text
    holds the token."""
    code = (
        PROLOGUE
        + """
qa = source("me/qa", name="qa", text_field="answer")
print(json.dumps(opened(source("me/gated", name="gated"), source("me/absent", name="absent"), qa)[:2]))
"""
    )
    good, failed = hub.run(code, tmp_path, HF_TOKEN="hf_withoutAccess1234")
    assert good == ["qa"] and "the account of your token has no access" in failed["gated"]
    assert (
        f"{hub.url}/datasets/me/gated" in failed["gated"]
        and "your token must have read access" in failed["absent"]
    )
    good, wrong = hub.run(code, tmp_path, HF_TOKEN="hf_mistypedMistyped")
    assert good == [] and set(wrong) == {"gated", "absent", "qa"}
    assert all(
        "the Hub refused your token" in reason and "/settings/tokens" in reason
        for reason in wrong.values()
    )
    strange, odd = hub.run(code, tmp_path, HF_TOKEN="hf_no\u00ef such header\t1")
    assert strange == []
    good, granted = hub.run(code, tmp_path, HF_TOKEN="hf_withAccess12345678")
    assert good == ["gated", "qa"] and set(granted) == {"absent"}
    texts = " ".join([*failed.values(), *wrong.values(), *granted.values(), *odd.values()])
    assert not [part for part in ("hf_with", "mistypedM", "such header") if part in texts]


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
def test_what_is_odd_in_a_dataset_costs_itself(tmp_path: Path) -> None:
    """A row that is none, a file without the column, a flipped block, a cut file: counted and
    named; the other shards go on."""
    whole = [{"text": f"{i} " + random.Random(i).randbytes(30).hex()} for i in range(300)]
    how = {"row_group_size": 100, "write_page_checksum": True, "use_dictionary": False}
    flipped, packed = bytearray(parquet(whole, **how)), gzip.compress(lines(whole))
    for at in range(len(flipped) // 2, len(flipped) // 2 + 40):
        flipped[at] ^= 0xFF
    bad = lines(whole[:2]) + b'{"text": null}\n{not json\n{"text": "\xff"}\n' + lines(whole[2:4])
    with Hub() as hub:
        hub.add_dataset(
            "me/tables",
            {"train-0.parquet": bytes(flipped), "train-1.parquet": parquet(whole, **how)},
        )
        files = {
            "train-0.json.gz": packed[: len(packed) // 2],
            "train-1.json.gz": gzip.compress(bad),
        }
        hub.add_dataset(
            "me/lines", files | {"train-2.json.gz": gzip.compress(lines([{"body": "x"}]))}
        )
        found = hub.run(
            PROLOGUE
            + """
HfSource.first_wait_seconds = 0.01
out = []
for name in ("me/tables", "me/lines"):
    s = source(name)
    s.open()
    out.append([[d.key for d in s.stream({})], sorted(s.notes)])
print(json.dumps(out))
""",
            tmp_path,
        )
    (tables, told), (rows, said) = found
    assert (
        sum(key.startswith("train-1") for key in tables) == 300
        and 100 <= sum(key.startswith("train-0") for key in tables) < 300
    )
    assert told == ["used 1 file up to the damage: train-0.parquet"]
    assert (
        sum(key.startswith("train-1") for key in rows) == 4
        and 50 < sum(key.startswith("train-0") for key in rows) < 300
    )
    hint = 'set "text_field" to one of them, or "fields" and "format"'
    assert said == [
        'skipped 1 file without the column "text": train-2.json.gz',
        'skipped 1 row: "text" is missing or null (the first: train-1.json.gz#2)',
        "skipped 1 row: no JSON (the first: train-1.json.gz#3)",
        "skipped 1 row: not UTF-8 (the first: train-1.json.gz#4)",
        f'train-2.json.gz has no column "text"; its columns are body: {hint}',
        "used 1 file up to the damage: train-0.json.gz",
    ]


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
            waits.append([hub.asked_to_wait(error), hub.asked_to_wait(outer), hub.is_passing(outer)])
            texts.append(hub.explain(outer, f"me/{name}"))
_http.time.sleep = slept.append
try:
    _http.http_backoff("GET", f"{hub.need('huggingface_hub.constants', '').ENDPOINT}/me/second/resolve/main/x")
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
    print(json.dumps([hub.is_passing(error), hub.explain(error, "me/parquet"), time.monotonic() - begin]))
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
