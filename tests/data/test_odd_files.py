"""Odd files cost themselves, are counted and are named: kinds, columns, links, whole sources."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from core.data.sources import build_source, decode
from core.data.sources.chat import ChatSettings
from core.data.sources.hf import HfSettings
from core.errors import NoData, SourceUnavailable
from tests.data.odd import PACK, STORIES, in_order, opened, rows_as, texts, write_parquet
from tests.project import tiny_preset, train_here


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
    page = """<!DOCTYPE html><html><head><title>Rivers</title><style>p {color: red}</style>
    <meta charset="windows-1251"></head>
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
