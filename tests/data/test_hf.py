"""Hub datasets through the real `datasets` code, against a hub on loopback: resume and refusals."""

import gzip
import random
from pathlib import Path

import pytest

from tests.hub import PROLOGUE, Hub, lines, parquet, rows


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
    wrong = []
    for cut in cuts:
        resumed = source(dataset).stream(json.loads(cursors[cut]))
        if [document.text for document in resumed] != texts[cut:]:
            wrong.append(cut)
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
    source("me/gated", name="gated"),
    source("me/absent", name="absent"),
    source("me/script", name="script"),
    source("me/configs", name="no_config"),
    source("me/configs", config="huge", name="wrong_config"),
    source("me/configs", config="small", name="right_config"),
    source("me/parquet", split="test", name="split"),
    source("me/qa", name="column"),
    source("me/qa", name="qa", **qa),
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
gated, absent = source("me/gated", name="gated"), source("me/absent", name="absent")
print(json.dumps(opened(gated, absent, qa)[:2]))
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
