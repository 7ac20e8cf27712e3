"""Odd content costs itself, is counted and is named: damage, encodings, rows, lengths."""

import bz2
import gzip
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from core.data.sources import build_source, decode, files
from core.data.sources.chat import ChatSettings
from core.data.sources.hf import HfSettings
from core.data.sources.text import TextSettings
from tests.data.odd import (
    PACK,
    STORIES,
    lines_of,
    opened,
    pack_zst,
    rows_as,
    texts,
    write_parquet,
)


@pytest.mark.parametrize("kind", [".jsonl", ".json"])  # which may both be lines
@pytest.mark.parametrize("packed", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("harm", ["later member", "cut", "junk after", "flip"])
def test_what_is_whole_before_damage_is_used(
    tmp_path: Path, packed: str, harm: str, kind: str
) -> None:
    pack = PACK[packed]
    members = [pack(lines_of(400)), pack(lines_of(400)), pack(lines_of(400))]
    data = b"".join(members)
    if harm == "later member":
        data = data[: len(members[0]) + 40]
    elif harm == "cut":
        data = data[:-20]
    elif harm == "junk after":
        data += b"no member at all"
    else:
        broken = bytearray(data)
        broken[len(members[0]) + len(members[1]) // 2] ^= 0x55
        data = bytes(broken)
    least = {"later member": 400, "cut": 800, "junk after": 1200, "flip": 400}[harm]
    (tmp_path / f"a{kind}{packed}").write_bytes(data)
    source = opened(f"a{kind}{packed}", tmp_path)
    expected = [json.loads(line)["text"] for line in lines_of(400)[:-1].split(b"\n")] * 3
    found = texts(source)
    assert found[:least] == expected[:least] and (harm == "flip" or found == expected[: len(found)])
    assert source.notes[0] == f"used 1 file up to the damage: a{kind}{packed}"
    # whose rows may be no JSON, before the checksum tells
    assert len(source.notes) == 1 or harm == "flip"
    assert source.skipped()[0] == (f"a{kind}{packed}", "used up to the damage")


def test_long_windows_of_zstd(tmp_path: Path) -> None:
    """As `zstd --long=31` writes them, and a frame that is to be passed over."""
    skippable = (0x184D2A50).to_bytes(4, "little") + (4).to_bytes(4, "little") + b"note"
    data = (
        pack_zst(lines_of(50), window_log=31, enable_ldm=True, write_content_size=False)
        + skippable
        + pack_zst(lines_of(7))
    )
    (tmp_path / "a.jsonl.zst").write_bytes(data)
    source = opened("a.jsonl.zst", tmp_path)
    assert len(texts(source)) == 57 and source.notes == []


# encodings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.json.gz"])
def test_a_byte_order_mark_says_the_encoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, encoding: str
) -> None:
    """Long files too: they are not cut into stretches."""
    monkeypatch.setattr(files, "SEGMENT_BYTES", 100)
    monkeypatch.setattr("core.data.sources.text.SEGMENT_BYTES", 100)
    monkeypatch.setattr("core.data.sources.text.LOW", 10)
    monkeypatch.setattr("core.data.sources.text.HIGH", 30)
    kind = f".{name.split('.')[1]}"
    whole = "\n".join(STORIES) + "\n"
    text = (
        whole if kind == ".txt" else rows_as(kind, [{"text": story} for story in STORIES]).decode()
    )
    data = ("\ufeff" * encoding.endswith("be") + text).encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    source = opened(name, tmp_path)
    assert (
        "".join(texts(source)) == whole if kind == ".txt" else texts(source) == STORIES
    ) and source.notes == []


def test_replacement_characters_are_counted_and_told(tmp_path: Path) -> None:
    (tmp_path / "cut.txt").write_bytes(
        "naïve río façade — ünd ".encode() * 40 + b"\xc3(" + "ñandú\n".encode() * 9 + b"\xff\n"
    )
    (tmp_path / "latin.txt").write_bytes("un café très léger\n".encode("latin-1") * 30)
    source = opened(".", tmp_path)
    found = texts(source)
    assert found[0].count("\ufffd") == 2 and found[1] == "un café très léger\n" * 30
    assert source.notes == [
        "2 replacement characters, for bytes that are no text, in 1 file: cut.txt",
        "read as Windows-1252, being no UTF-8: latin.txt",
    ]
    assert (
        "cut.txt",
        "1 or more replacement characters: bytes that are no text",
    ) in source.skipped()


@pytest.mark.parametrize(
    "junk",
    [
        bytes(5000),
        random.Random(2).randbytes(5000),
        "with no mark at its beginning".encode("utf-16-le") * 40,
        "не та кодировка, и всё же текст ".encode("cp1251") * 40,
        "文字コードが違う".encode("shift-jis") * 40,
    ],
    ids=["nul", "binary", "utf-16", "cp1251", "shift-jis"],
)
def test_what_is_mostly_damage_is_no_text(tmp_path: Path, junk: bytes) -> None:
    (tmp_path / "good.txt").write_text("text\n")
    (tmp_path / "junk.txt").write_bytes(junk)
    source = opened(".", tmp_path)
    assert source.notes == ["skipped 1 textless (binary, or of an unknown encoding) file: junk.txt"]
    assert texts(source) == ["text\n"]


# rows ---------------------------------------------------------------------------------------------


def test_parquet_rows_that_cannot_be_read_are_counted(tmp_path: Path) -> None:
    import pyarrow as pa

    column = pa.StringArray.from_buffers(
        5,
        pa.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, 3, 5, 5, 8, 9))),
        pa.py_buffer(b"one\xff\xfetwo "),
    )
    table = pa.table(
        {"text": pa.concat_arrays([column, pa.array([None, "three"])]), "other": list(range(7))}
    )
    write_parquet(tmp_path / "bad.parquet", table, row_group_size=4)
    write_parquet(tmp_path / "bytes.parquet", pa.table({"text": pa.array([b"four", b"\xff"])}))
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    write_parquet(tmp_path / "twice.parquet", twice)
    write_parquet(tmp_path / "lists.parquet", [{"text": ["a"]}])
    write_parquet(tmp_path / "numbers.parquet", [{"text": 5}])
    source = opened(".", tmp_path)
    assert texts(source) == ["one", "two", "three", "four"]
    assert sorted(source.notes) == [
        'skipped 1 file with the column "text" twice: twice.parquet',
        'skipped 1 row: "text" is a list, no text (the first: lists.parquet#0)',
        'skipped 1 row: "text" is a number, a date or the like, no text (the first: '
        "numbers.parquet#0)",
        'skipped 1 row: "text" is missing or null (the first: bad.parquet#5)',
        'skipped 2 rows: "text" is blank (the first: bad.parquet#2)',
        "skipped 2 rows: not UTF-8 (the first: bad.parquet#1)",
    ]


@pytest.mark.parametrize("compress", ["none", "snappy", "gzip", "zstd"])
@pytest.mark.parametrize(
    "make",
    [
        lambda path: TextSettings(path=path, name="s"),
        lambda path: HfSettings(dataset=f"./{path}", name="s"),
    ],
)
def test_a_flipped_block_of_parquet_costs_its_file(
    tmp_path: Path, compress: str, make: Any
) -> None:
    rows = [json.loads(line) for line in lines_of(300).splitlines()]
    how = {
        "row_group_size": 100,
        "compression": compress,
        "write_page_checksum": True,
        "use_dictionary": False,
    }
    (tmp_path / "t").mkdir()
    for name in ("a", "b"):
        write_parquet(tmp_path / f"t/{name}.parquet", rows, **how)
    data = bytearray((tmp_path / "t/a.parquet").read_bytes())
    for at in range(len(data) // 2, len(data) // 2 + 40):
        data[at] ^= 0xFF
    (tmp_path / "t/a.parquet").write_bytes(data)
    source = build_source(make("t"), tmp_path, 1)
    source.open()
    found = list(source.stream({}))
    assert (
        len([d for d in found if d.key.startswith("b.") or "/b." in d.key]) == 300
        and 400 <= len(found) < 600
    )
    assert len(source.notes) == 1 and source.notes[0].startswith("used 1 file up to the damage: ")


ALPACA = [
    {"instruction": "Add 1 and 2.", "input": "", "output": "3"},
    {"instruction": "Say it.", "input": None, "output": "It."},
    {"instruction": "Say it.", "output": "It."},
    {"instruction": "", "input": " ", "output": None},
    {"instruction": "Shout.", "input": ["a"], "output": "A!"},
    {"instruction": "Last.", "input": "x", "output": "y"},
]


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".parquet"])
def test_rows_with_a_blank_column_are_kept(tmp_path: Path, kind: str) -> None:
    """As long as something of a row has text; else it is counted and told."""
    rows = (
        ALPACA
        if kind != ".parquet"
        else [row for row in ALPACA if not isinstance(row.get("input"), list)]
    )
    if kind == ".parquet":
        write_parquet(tmp_path / "a.parquet", [{"input": None} | row for row in rows])
    else:
        (tmp_path / f"a{kind}").write_bytes(rows_as(kind, rows))
    how = {
        "fields": ["instruction", "input", "output"],
        "format": "{instruction}\n{input}\n{output}",
    }
    source = build_source(HfSettings(dataset=f"./a{kind}", name="s", **how), tmp_path, 1)
    source.open()
    assert [d.text for d in source.stream({})] == [
        "Add 1 and 2.\n\n3",
        "Say it.\n\nIt.",
        "Say it.\n\nIt.",
        "Last.\nx\ny",
    ]
    notes = [f"skipped 1 row: no text in any of instruction, input, output (the first: a{kind}#3)"]
    notes += (
        [f'skipped 1 row: "input" is a list, no text (the first: a{kind}#4)']
        if kind != ".parquet"
        else []
    )
    assert source.notes == notes


def test_later_passes_count_nothing_twice(tmp_path: Path) -> None:
    """And the log is told again when a count has grown tenfold."""
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' + '{"text": ""}\n' * 9)
    (tmp_path / "b.jsonl").write_text('{"text": ""}\n' * 9 + '{"text": "y"}\n')
    source = build_source(TextSettings(path=".", name="s"), tmp_path, 1)
    told = set()
    for epoch in range(3):
        for _ in source.stream({"epoch": epoch}):
            told |= set(source.skipped())
    told |= set(source.skipped())
    assert len(source.notes) == 1 and source.notes[0].startswith(
        'skipped 18 rows: "text" is blank (the first: '
    )
    assert sorted(why for _, why in told) == [
        '1 or more rows: "text" is blank',
        '10 or more rows: "text" is blank',
    ]


# lengths ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz"])
def test_a_row_has_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """What is longer is passed over and counted; what follows is read."""
    monkeypatch.setattr(decode, "RECORD_BYTES", 1 << 20)
    monkeypatch.setattr("core.data.sources.tables.LONGEST", 2 << 20)
    rows = [{"text": text} for text in ("one", "x" * 1_500_000, "two", "y" * 1_000_000)]
    if kind == ".parquet":
        write_parquet(tmp_path / "a.parquet", rows)
    else:
        plain = rows_as(f".{kind.split('.')[1]}", rows)
        (tmp_path / f"a{kind}").write_bytes(gzip.compress(plain) if kind.endswith("gz") else plain)
    for settings in (
        TextSettings(path=f"a{kind}", name="s"),
        HfSettings(dataset=f"./a{kind}", name="s"),
    ):
        source = build_source(settings, tmp_path, 1)
        source.open()
        assert [len(d.text) for d in source.stream({})] == [3, 3, 1_000_000]
        assert source.notes == [f"skipped 1 row: longer than 1 MB (the first: a{kind}#1)"]


def test_long_lines_over_several_stretches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of plain text nothing is lost, though a line has no end; of rows one is, and is told."""
    monkeypatch.setattr(files, "SEGMENT_BYTES", 1000)
    monkeypatch.setattr(files, "LINE_BYTES", 300)
    monkeypatch.setattr(files, "PIECE", 128)
    monkeypatch.setattr(decode, "RECORD_BYTES", 2500)
    whole = "short\n" + "".join(f"wörd{i} " for i in range(2000)) + "\nend\n" + "x" * 3000
    (tmp_path / "a.txt").write_text(whole)
    source = opened("a.txt", tmp_path)
    assert "".join(texts(source)) == whole and source.notes == [] and len(source.shards()) > 10
    rows = [
        {"text": text} for text in ("a", "b" * 900, "c" * 9000, "d", "e" * 2400, "f" * 5000, "g")
    ]
    (tmp_path / "a.jsonl").write_bytes(rows_as(".jsonl", rows * 2))
    source = opened("a.jsonl", tmp_path)
    assert [text[0] for text in texts(source)] == list("abdegabdeg")
    assert len(source.notes) == 1 and source.notes[0].startswith("skipped 4 rows: longer than")


# resume -------------------------------------------------------------------------------------------


def test_resume_is_no_resume_among_odd_things(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From every cursor of an epoch over bad rows, damage, blanks, links and other encodings: the
    rest of the straight run."""
    monkeypatch.setattr("core.data.sources.text.LOW", 40)
    monkeypatch.setattr("core.data.sources.text.HIGH", 80)
    monkeypatch.setattr("core.data.sources.text.SEGMENT_BYTES", 300)
    rows: list[Any] = [{"text": story} for story in STORIES]
    odd = [*rows[:3], {"text": None}, {"id": 1}, *rows[3:6], {"text": " "}, 5, *rows[6:]]
    (tmp_path / "a.jsonl").write_bytes(
        rows_as(".jsonl", odd[:4]) + b"{bad\n\n\xff\n" + rows_as(".jsonl", odd[4:])
    )
    (tmp_path / "b.json").write_bytes(rows_as(".json", odd))
    (tmp_path / "c.csv").write_bytes(rows_as(".csv", rows) + b'x"\n\n')
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(rows_as(".jsonl", odd) * 20)[:-30])
    (tmp_path / "e.txt").write_bytes("\n".join(STORIES).encode("utf-16"))
    (tmp_path / "f.html.bz2").write_bytes(bz2.compress("<p>".join(STORIES).encode()))
    write_parquet(
        tmp_path / "g.parquet",
        [{"text": None if i % 3 else story} for i, story in enumerate(STORIES)],
        row_group_size=5,
    )
    (tmp_path / "odd.jsonl").write_text('{"body": 1}\n')
    (tmp_path / "link.txt").symlink_to(tmp_path / "e.txt")
    straight, cursors = [], []
    stream = build_source(TextSettings(path=".", name="s"), tmp_path, 7).stream({"epoch": 1})
    while True:
        cursors.append(json.loads(json.dumps(stream.cursor())))
        try:
            straight.append(next(stream))
        except StopIteration:
            break
    assert len(straight) > 60 and len({d.key for d in straight}) == len(straight)
    for cut in range(0, len(cursors), 7):
        source = build_source(TextSettings(path=".", name="s"), tmp_path, 7)
        assert list(source.stream(cursors[cut])) == straight[cut:], cursors[cut]


@pytest.mark.parametrize("kind", ["hf", "chat"])
def test_a_local_dataset_notices_that_its_files_change(kind: str, tmp_path: Path) -> None:
    """A row more, a file more, another name; a project that was moved is the same."""

    def contents(folder: Path, dataset: str) -> str:
        source = build_source(
            (HfSettings if kind == "hf" else ChatSettings)(dataset=dataset, name="mine"), folder, 1
        )
        source.open()
        return source.contents()

    row = {
        "hf": '{"text": "a text"}\n',
        "chat": '{"messages": [{"role": "assistant", "content": "a text"}]}\n',
    }[kind]
    (tmp_path / "one" / "data").mkdir(parents=True)
    file = tmp_path / "one" / "data" / "train-0.jsonl"
    file.write_text(row)
    found = {contents(tmp_path / "one", "./data")}
    assert found == {contents(tmp_path / "one", "data")}
    shutil.copytree(tmp_path / "one", tmp_path / "moved")
    assert found == {contents(tmp_path / "moved", "./data")}
    single = contents(tmp_path / "one", "data/train-0.jsonl")
    file.write_text(2 * row)
    assert single != contents(tmp_path / "one", "data/train-0.jsonl")
    found.add(contents(tmp_path / "one", "./data"))
    shutil.copy(file, file.with_name("train-1.jsonl"))
    found.add(contents(tmp_path / "one", "./data"))
    file.rename(file.with_name("train-2.jsonl"))
    found.add(contents(tmp_path / "one", "./data"))
    assert len(found) == 4
