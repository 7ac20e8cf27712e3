"""What is odd costs itself, is counted and is named: kinds, columns, rows, encodings, damage,
links, lengths."""

import bz2
import gzip
import json
import lzma
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core.data.documents import Document
from core.data.sources import build_source, decode, files
from core.data.sources.chat import ChatSettings
from core.data.sources.hf import HfSettings
from core.data.sources.text import TextSettings
from core.errors import NoData, SourceUnavailable
from tests.project import tiny_preset, train_here

STORIES = [
    f"story {i}: the río of year {i} met a captain — and nobody wrote it down." for i in range(12)
]


def pack_zst(data: bytes, **how: Any) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    how = {"write_checksum": True, **how}  # as the program `zstd` does
    return zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(**how)
    ).compress(data)


PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": pack_zst,
}


def opened(path: Any, root: Path, **how: Any) -> Any:
    source = build_source(TextSettings(path=path, name="s", **how), root, 1)
    source.open()
    return source


def texts(source: Any) -> list[str]:
    return [document.text for document in in_order(source)]


def in_order(source: Any) -> list[Document]:
    """All documents, in the order of files and places in them."""
    found = [document for unit in source.shards() for _, document in quietly(source, unit)]
    assert sorted(d.key for d in found) == sorted(d.key for d in source.stream({})), (
        "an epoch has other documents"
    )
    return found


def quietly(source: Any, unit: Any) -> Any:
    try:
        yield from source.read(unit, 0)
    except Exception as error:
        source.recover(unit, error, 9)


def rows_as(kind: str, rows: list[dict]) -> bytes:
    if kind in (".jsonl", ".ndjson"):
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if kind == ".json":
        return json.dumps(rows, indent=1, ensure_ascii=False).encode()
    mark = "\t" if kind == ".tsv" else ","
    quoted = [
        mark.join('"{}"'.format(str(v).replace('"', '""')) for v in row.values()) for row in rows
    ]
    return ("\n".join([mark.join(rows[0]), *quoted]) + "\n").encode()


def write_parquet(path: Path, table: Any, **how: Any) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(
        table if isinstance(table, pyarrow.Table) else pyarrow.Table.from_pylist(table), path, **how
    )


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".html"])
def test_every_kind_is_read_packed_or_not(tmp_path: Path, kind: str, packed: str) -> None:
    """In capitals too; two members or frames, as parallel compressors write them."""
    plain = ["\n".join(STORIES) + "\n"]
    if kind == ".txt":
        data = plain[0].encode()
    elif kind == ".html":
        data = "".join(f"<p>{story}</p>" for story in STORIES).encode()
    else:
        data = rows_as(kind, [{"id": i, "text": story} for i, story in enumerate(STORIES)])
    pack = PACK[packed]
    half = len(data) // 2
    (tmp_path / f"a{kind}{packed}".upper()).write_bytes(pack(data[:half]) + pack(data[half:]))
    source = opened(".", tmp_path)
    found = texts(source)
    assert [
        line for text in found for line in text.splitlines() if line
    ] == STORIES and source.notes == []


@pytest.mark.parametrize(
    "content",
    [
        {"text": ["one", "two"], "id": [1, 2]},
        {"text": {"0": "one", "1": "two"}, "id": {"0": 1, "1": 2}},
        {"version": "1.1", "data": [{"text": "one"}, {"text": "two"}]},
        {"version": "1.1", "train": [{"text": "one"}, {"text": "two"}]},
        [{"text": "one"}, {"text": "two"}],
        '{"text": "one"}\n{"text": "two"}\n',
        '{"text": "one"}\n{broken\n{"text": "two"}\n',
        '{"text":\n "one"}\n\n {"text": "two"}',
        '\n [ {"text": "one"},\n{"text": "two"} ] ',
    ],
)
def test_forms_of_json(tmp_path: Path, content: Any) -> None:
    """An array, columns, a list under a key, or objects one after another, whatever the file is
    called."""
    (tmp_path / "a.json").write_text(content if isinstance(content, str) else json.dumps(content))
    assert texts(opened("a.json", tmp_path)) == ["one", "two"]
    (tmp_path / "one.json").write_text('{"text": "one", "id": 3}')
    assert texts(opened("one.json", tmp_path)) == ["one"]


def test_json_is_read_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever a piece ends: in a character, an escape, a number."""
    rows = [
        {"n": -12345.5e-3, "text": f'{story}\n\\ " \U0001f642 \t', "deep": [[{}], True, None]}
        for story in STORIES
    ]
    (tmp_path / "a.json").write_text(
        json.dumps(rows[:6], ensure_ascii=False)[:-1] + "," + json.dumps(rows[6:])[1:]
    )
    for size in (1, 2, 3, 7, 64):
        monkeypatch.setattr(decode, "PIECE", size)
        assert texts(opened("a.json", tmp_path)) == [row["text"] for row in rows]


def test_a_chat_of_one_object_is_one_conversation(tmp_path: Path) -> None:
    said = [{"role": "user", "content": "two?"}, {"role": "assistant", "content": "two."}]
    (tmp_path / "a.json").write_text(json.dumps({"messages": said}))
    (tmp_path / "b.json").write_text(json.dumps([{"messages": said[:]}]))
    (tmp_path / "c.csv").write_text('messages\n"' + json.dumps(said).replace('"', '""') + '"\n')
    source = build_source(ChatSettings(path=".", name="s"), tmp_path, 1)
    source.open()
    assert [d.messages for d in in_order(source)] == [(("user", "two?"), ("assistant", "two."))] * 3


def test_csv_as_programs_write_it(tmp_path: Path) -> None:
    long = "word " * 60_000  # beyond the usual limit of a field
    (tmp_path / "a.csv").write_bytes(
        '\ufeffid;text\r\n1;"a ""quoted""\nline; two"\r\n\r\n2;plain\r\n3\r\n'.encode()
    )
    (tmp_path / "b.csv").write_bytes(f'text,id\ncaf\xe9,1\n"{long}",2\n'.encode("latin-1"))
    (tmp_path / "c.csv").write_text("text,id,text\na,1,b\n")
    source = opened(".", tmp_path)
    assert texts(source) == ['a "quoted"\nline; two', "plain", "café", long]
    assert source.notes == [
        'skipped 1 file with the column "text" twice: c.csv',
        'skipped 1 row: "text" is missing or null (the first: a.csv#3)',
        "read as Windows-1252, being no UTF-8: b.csv",
    ]


def test_a_web_page_gives_its_text(tmp_path: Path) -> None:
    page = """<!DOCTYPE html><html><head><title>Rivers</title><style>p {color: red}</style><meta charset="windows-1251"></head>
    <body><script>let a = "<p>no</p>";</script><h1>Of &amp; about</h1><p>A <b>long</b>
    river &mdash; река.<br>Next</p><ul><li>one<li>two</ul><pre>  x = 1
  y</pre><table><tr><td>a</td><td>b</td></tr></table></body></html>"""
    (tmp_path / "a.html").write_bytes(page.encode("cp1251"))
    (text,) = texts(opened("a.html", tmp_path))
    assert (
        text
        == "Rivers\n\nOf & about\n\nA long river — река.\nNext\n\none\ntwo\n\n  x = 1\n  y\n\na b\n"
    )


@pytest.mark.parametrize(
    ("encoding", "words"),
    [
        ("windows-1250", "žluťoučký kůň příšerně"),
        ("shift_jis", "吾輩は猫である"),
        ("koi8-r", "река"),
    ],
)
def test_the_look_at_the_start_decodes_as_the_reader_does(
    tmp_path: Path, encoding: str, words: str
) -> None:
    """A page that declares its encoding is not told as skipped and then trained on; nor is one cut
    inside a character."""
    page = (
        f'<html><head><meta charset="{encoding}"></head><body>'
        + f"<p>{words} {words}</p>\n" * 20_000
        + "</body></html>"
    )
    (tmp_path / "a.html").write_bytes(page.encode(encoding))
    # says nothing
    (tmp_path / "b.html").write_bytes(
        f"<html><body><p>{words * 50}</p></body></html>".encode(encoding)
    )
    (tmp_path / "c.txt").write_text("words\n")
    source = opened(".", tmp_path)
    told = [note for note in source.notes if "textless" in note]
    assert words in "".join(texts(source))
    assert told == [note for note in source.notes if "textless" in note] and not any(
        "a.html" in note for note in told
    )


def test_one_odd_file_costs_itself(tmp_path: Path) -> None:
    """A table without the column, of any kind, among good files; named with its columns, and with
    what to do."""
    (tmp_path / "a.txt").write_text("plain text\n")
    (tmp_path / "good.jsonl").write_text('{"id": 1}\n{"text": "a row"}\n')
    (tmp_path / "odd.jsonl").write_text('{"body": "x", "id": 1}\n' * 3)
    (tmp_path / "odd.csv").write_text("body,id\nx,1\n")
    (tmp_path / "package.json").write_text('{"name": "x"}')
    write_parquet(tmp_path / "odd.parquet", [{"body": "x"}])
    source = opened(".", tmp_path)
    assert texts(source) == ["plain text\n", "a row"]
    lacking, row, columns = source.notes
    assert lacking.startswith('skipped 4 files without the column "text": ')
    assert all(name in lacking for name in ("odd.jsonl", "odd.csv", "odd.parquet", "package.json"))
    assert row == 'skipped 1 row: "text" is missing or null (the first: good.jsonl#0)'
    assert 'has no column "text"; its columns are ' in columns and columns.endswith(
        'set "text_field" to one of them'
    )
    assert ("odd.csv", 'without the column "text"') in source.skipped()


def test_where_no_file_has_the_column_the_source_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text('{"body": "x", "id": 1}\n')
    with pytest.raises(
        SourceUnavailable,
        match=r'.\.jsonl has no column "text"; its columns are body, id: set "text_field" to one',
    ):
        opened(".", tmp_path)


def test_kinds_that_are_not_read_are_named_and_counted(tmp_path: Path) -> None:
    for name in (
        "a.docx",
        "deep/b.DOCX",
        "c.pptx",
        ".git/config",
        "LICENSE",
        "good.txt",
        "e.tar.gz",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("something")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "nowhere.txt").symlink_to(tmp_path / "gone.txt")
    for path in (".", "**/*"):
        source = opened(path, tmp_path)
        assert texts(source) == ["something"]
        told = " | ".join(source.notes)
        for part in (
            "2 .docx",
            "1 .pptx",
            "1 files without a suffix",
            "1 .gz",
            "1 devices and pipes",
            "(for example a.docx)",
        ):
            assert part in told
        assert (
            "1 hidden (for example .git)" in told and "skipped 1 missing file: nowhere.txt" in told
        )


def test_a_folder_that_may_not_be_listed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "texts/private").mkdir(parents=True)
    (tmp_path / "texts/a.txt").write_text("open\n")
    scandir = os.scandir

    def refusing(path: Any) -> Any:
        if str(path).endswith("private"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    # root may list anything: a folder's mode would not stop it
    monkeypatch.setattr(os, "scandir", refusing)
    assert opened("texts", tmp_path).notes == ["skipped 1 unreadable file: texts/private"]


# damage -------------------------------------------------------------------------------------------


def lines_of(count: int) -> bytes:
    draw = random.Random(1)
    return b"".join(
        json.dumps({"text": f"{i} " + draw.randbytes(40).hex()}).encode() + b"\n"
        for i in range(count)
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


# links, names -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["texts", "texts/**/*.txt", "texts/**", ["texts/**/*", "texts/./one.txt", "again"]]
)
def test_links_are_followed_and_nothing_is_read_twice(tmp_path: Path, path: Any) -> None:
    """Loops, two ways to a folder, two ways to a file; what has a name of its own there goes by
    it."""
    for folder in ("texts/a_deep", "elsewhere/more"):
        (tmp_path / folder).mkdir(parents=True)
    for name in (
        "texts/one.txt",
        "texts/a_deep/two.txt",
        "elsewhere/three.txt",
        "elsewhere/more/four.txt",
    ):
        (tmp_path / name).write_text(f"{name}\n")
    for link, target in (
        ("texts/far", "elsewhere"),
        ("texts/loop", "texts"),
        ("texts/a_deep/back", "texts"),
        ("elsewhere/round", "texts"),
        ("texts/a_also.txt", "texts/one.txt"),
        ("again", "texts"),
    ):
        (tmp_path / link).symlink_to(tmp_path / target)
    source = opened(path, tmp_path)
    assert sorted(d.key for d in source.stream({})) == [
        "texts/a_deep/two.txt#0",
        "texts/far/more/four.txt#0",
        "texts/far/three.txt#0",
        "texts/one.txt#0",
    ]


@pytest.mark.parametrize("folder", ["data [v2]", "[a-c]*", "what?", "plain"])
def test_brackets_in_a_name_are_no_pattern(tmp_path: Path, folder: str) -> None:
    """In the project's own folder, in a folder's name, in a file's; patterns still work behind
    them."""
    root = tmp_path / folder / "project [1]"
    (root / "in [x]").mkdir(parents=True)
    (root / "in [x]" / "a [1].txt").write_text("a\n")
    (root / "in [x]" / "a1.md").write_text("b\n")
    for path, expected in (
        ("in [x]", ["a\n", "b\n"]),
        ("in [x]/a [1].txt", ["a\n"]),
        ("in [x]/*.txt", ["a\n"]),
        ("in [x]/a [1].*", ["a\n"]),
        ("in [x]/a[0-9].md", ["b\n"]),
        ("in*/*.md", ["b\n"]),
        ("**/a*", ["a\n", "b\n"]),
        (str(root / "in [x]" / "*.txt"), ["a\n"]),
    ):
        assert sorted(texts(opened(path, root))) == expected, path


def test_a_dataset_in_a_folder_with_brackets(tmp_path: Path) -> None:
    """As in one without."""
    for name in ("plain", "br [1]"):
        (tmp_path / name / "data/sub").mkdir(parents=True)
        for file, text in (("train-0", "a"), ("sub/train-1", "b"), ("test", "t")):
            (tmp_path / name / f"data/{file}.jsonl").write_text(json.dumps({"text": text}))
        for split, expected in (("train", ["a", "b"]), ("test", ["t"])):
            source = build_source(
                HfSettings(dataset="./data", split=split, name="s"), tmp_path / name, 1
            )
            source.open()
            assert sorted(document.text for document in source.stream({})) == expected


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


# a whole source -----------------------------------------------------------------------------------

STDLIB = {"type": "python_stdlib"}


@pytest.mark.parametrize(
    "section, reason",
    [
        ({"type": "text", "path": "nowhere"}, "nowhere does not exist"),
        ({"type": "text", "path": ["texts", "nothing/*.txt"]}, "no readable file matches"),
        (
            {"type": "text", "path": "odd.jsonl"},
            'odd.jsonl has no column "text"; its columns are body',
        ),
        ({"type": "chat", "path": "odd.jsonl"}, 'odd.jsonl has no column "messages"'),
        ({"type": "pdf", "path": "./my_pdfs"}, "does not exist"),
        ({"type": "tokens", "path": "data/tokens"}, "holds no manifest.json"),
        ({"type": "hf", "dataset": "./nowhere.jsonl"}, "does not exist"),
        (
            {"type": "chat", "dataset": "./odd.jsonl"},
            './odd.jsonl has no column "messages"; its columns are body',
        ),
        (
            {"type": "hf", "dataset": "odd.jsonl"},
            'odd.jsonl has no column "text"; its columns are body',
        ),
        ({"type": "hf", "dataset": "./empty.jsonl"}, "no row of it holds text in text"),
        ({"type": "hf", "dataset": "blank"}, "no row of it holds text in text"),
        (
            {"type": "hf", "dataset": "me/absent", "local": "empty.jsonl"},
            "no text in its only file (empty.jsonl",
        ),
        (
            {"type": "chat", "dataset": "./blank", "messages_field": "text"},
            "no row of it holds a conversation in text",
        ),
    ],
)
def test_an_own_path_without_text_ends_the_start(
    tmp_path: Path, section: dict, reason: str
) -> None:
    """What a person named is never missing without a question, though other sources could go on."""
    (tmp_path / "odd.jsonl").write_text('{"body": "x"}\n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "blank").mkdir()
    (tmp_path / "blank" / "train.jsonl").write_text('{"text": " "}\n' * 3)
    preset = tiny_preset(data={"sources": [STDLIB, section | {"name": "mine"}]})
    with pytest.raises(
        NoData, match=r"preset t names paths that give no text.*\n  mine: "
    ) as error:
        train_here(preset, tmp_path)
    assert reason in str(error.value) and error.value.exit_code == 3
    assert not (tmp_path / "checkpoints").exists() or not list((tmp_path / "checkpoints").iterdir())


def test_what_every_machine_may_lack_is_dropped_and_told(tmp_path: Path) -> None:
    """The folder of PDFs that nobody filled, and the Hub: the others go on."""
    sources = [
        "pdf",
        *({"type": "pdf", "path": path, "name": path} for path in ("pdfs", "pdfs/")),
        {"type": "hf", "dataset": "me/absent"},
    ]
    sources.append({"type": "text", "path": "texts"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        events = train_here(tiny_preset(data={"sources": sources}), tmp_path)
    told = [event["message"] for event in events if event["event"] == "warning"]
    assert len([message for message in told if "dropped, the others go on" in message]) == 4
    assert events[-1]["reason"] == "max_steps"


def test_what_was_skipped_is_in_the_log(tmp_path: Path) -> None:
    """At the start, and what is met later; rows by reason."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/a.jsonl").write_bytes(
        rows_as(".jsonl", [{"text": None}, *({"text": story} for story in STORIES)] * 9)
    )
    (tmp_path / "mine/b.docx").write_text("x")
    (tmp_path / "mine/c.parquet").write_text("x")
    events = train_here(
        tiny_preset(data={"sources": [{"type": "text", "path": "mine", "name": "mine"}]}), tmp_path
    )
    notes = next(event["notes"] for event in events if event["event"] == "run_start")
    for note in (
        "skipped 1 damaged file: mine/c.parquet",
        "not read: 1 .docx",
        'skipped 9 rows: "text" is missing or null',
    ):
        assert [each for each in notes if note in each], notes
    skipped = {(event["file"], event["reason"]) for event in events if event["event"] == "skipped"}
    assert ("mine/c.parquet", "damaged") in skipped
    assert ("mine/a.jsonl#0", '1 or more rows: "text" is missing or null') in skipped
