"""Local sources: resume equals no resume, the order is a function of seed and epoch, and bad files
are named, not fatal."""

import gzip
import json
import random
import time
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from core.data.documents import Document
from core.data.sources import NAMED_SOURCES, SOURCES, build_source, files, open_sources
from core.data.sources.hf import HfSettings
from core.data.sources.pdf.source import PdfSettings
from core.data.sources.text import PythonStdlibSettings, TextSettings
from core.errors import SourceUnavailable

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "seven",
    "wizards",
    "bake",
    "bread",
]


def prose(seed: int, characters: int) -> str:
    rng = random.Random(seed)
    out = ""
    while len(out) < characters:
        sentence = " ".join(rng.choice(WORDS) for _ in range(rng.randint(4, 14))).capitalize() + "."
        out += sentence + rng.choice([" ", " ", "\n", "\n\n"])
    return out


def rows(count: int, tag: str) -> list[dict]:
    return [{"id": i, "text": f"{tag} row {i} " + prose(i, 60)} for i in range(count)]


def write_jsonl(path: Path, lines: list) -> None:
    import zstandard

    data = b"".join(
        (line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines
    )
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        data = zstandard.ZstdCompressor().compress(
            data[: len(data) // 2]
        ) + zstandard.ZstdCompressor().compress(
            data[len(data) // 2 :]
        )  # two frames, as parallel compressors write them
    path.write_bytes(data)


def write_parquet(path: Path, lines: list[dict], **options: int) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(lines), path, **options)


def write_pdf(path: Path, text: str | None, password: str | None = None) -> None:
    """`text` over as many pages as it takes; None: a page that is only an image."""
    import pymupdf

    document = pymupdf.open()
    for start in range(0, len(text or " "), 2500):
        page = document.new_page()
        if text is None:
            pixels = pymupdf.Pixmap(pymupdf.csRGB, (0, 0, 40, 40))
            pixels.clear_with(120)
            page.insert_image((50, 50, 300, 300), pixmap=pixels)
        else:
            page.insert_textbox((50, 50, 550, 780), text[start : start + 2500], fontsize=9)
    lock = (
        {"encryption": pymupdf.PDF_ENCRYPT_AES_256, "user_pw": password, "owner_pw": password}
        if password
        else {}
    )
    document.save(path, **lock)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("project")
    for folder in ("texts/deep/.hidden", "rows", "pdfs/deep"):
        (root / folder).mkdir(parents=True)
    for i in range(4):
        (root / f"texts/{i}.txt").write_text(prose(i, 40_000 + 9_000 * i))
    (root / "texts/deep/notes.md").write_text("# Notes\r\n\r\nshort\r\n")
    (root / "texts/deep/.hidden/x.txt").write_text("hidden")
    (root / "texts/empty.txt").write_text("")
    (root / "texts/latin.txt").write_bytes("caf\xe9 au lait".encode("latin-1"))
    write_jsonl(root / "rows/a.jsonl", rows(23, "a"))
    write_jsonl(root / "rows/b.jsonl.gz", rows(31, "b"))
    write_jsonl(root / "rows/c.jsonl.zst", rows(17, "c"))
    write_parquet(root / "rows/d.parquet", rows(41, "d"), row_group_size=7)
    for i in range(3):
        write_pdf(root / f"pdfs/{i}.pdf", prose(100 + i, 14_000))
    write_pdf(root / "pdfs/deep/UPPER.PDF", prose(200, 4_000))
    return root


LOCAL = {
    "plain": TextSettings(path="texts"),
    "rows": TextSettings(
        path=["rows/*.jsonl", "rows/*.gz", "rows/*.zst", "rows/d.parquet"], name="rows"
    ),
    "pdf": PdfSettings(),
    "python_stdlib": PythonStdlibSettings(),
    "hf_local": HfSettings(dataset="./rows/d.parquet"),
}


def documents(source, cursor: dict, limit: int = 1_000_000) -> list[Document]:
    out = []
    for document in source.stream(cursor):
        out.append(document)
        if len(out) >= limit:
            break
    return out


@pytest.mark.parametrize("kind", LOCAL)
def test_resume_is_no_resume(root: Path, kind: str) -> None:
    """Cut anywhere in two epochs, go on with a fresh source from the JSON of the cursor: the same
    documents."""
    limit = 60 if kind == "python_stdlib" else 1_000_000
    for epoch in (0, 1):
        straight, cursors = [], []
        stream = build_source(LOCAL[kind], root, 7).stream({"epoch": epoch})
        while len(straight) < limit:
            cursors.append(stream.cursor())
            try:
                straight.append(next(stream))
            except StopIteration:
                break
        assert len(straight) > 3 and len({d.key for d in straight}) == len(straight)
        for cut in [
            0,
            len(cursors) - 1,
            *random.Random(3).sample(range(len(cursors)), min(12, len(cursors))),
        ]:
            cursor = json.loads(json.dumps(cursors[cut]))
            assert (
                documents(build_source(LOCAL[kind], root, 7), cursor, len(straight) - cut or 1)[
                    : len(straight) - cut
                ]
                == (straight[cut:])
            ), cursor


@pytest.mark.parametrize("kind", [kind for kind in LOCAL if kind != "hf_local"])
def test_order_follows_from_seed_and_epoch(root: Path, kind: str) -> None:
    def keys(seed: int, epoch: int) -> list[str]:
        return [unit.key for unit in build_source(LOCAL[kind], root, seed).order(epoch)]

    assert keys(1, 0) == keys(1, 0)
    assert keys(1, 0) != keys(1, 1) and keys(1, 0) != keys(2, 0)
    assert sorted(keys(1, 0)) == sorted(keys(2, 5))


def test_every_epoch_holds_every_row(root: Path) -> None:
    source = build_source(LOCAL["rows"], root, 1)
    expected = sorted(
        row["text"]
        for tag, n in (("a", 23), ("b", 31), ("c", 17), ("d", 41))
        for row in rows(n, tag)
    )
    for epoch in (0, 1):
        assert sorted(d.text for d in source.stream({"epoch": epoch})) == expected


def test_plain_text_is_cut_without_loss(root: Path) -> None:
    source = build_source(LOCAL["plain"], root, 1)
    pieces: dict[str, str] = {}
    for document in source.stream({}):
        assert len(document.text) <= 18_000
        name = document.key.split("#")[0]
        pieces[name] = pieces.get(name, "") + document.text
    for i in range(4):
        assert pieces[f"texts/{i}.txt"] == (root / f"texts/{i}.txt").read_text()
    assert pieces["texts/latin.txt"] == "café au lait"
    assert pieces["texts/deep/notes.md"] == "# Notes\n\nshort\n"
    assert not any("hidden" in name for name in pieces)


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_long_files_are_read_in_stretches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """The stretches together are the file, each line in exactly one, wherever the boundaries
    fall."""
    path = tmp_path / f"long.{suffix}"
    text = "".join(f'{{"text": "line {i} é{"x" * (i % 37)}"}}\n' for i in range(900))
    path.write_text(text)
    for size in (64, 1000, 4096):
        monkeypatch.setattr(files, "SEGMENT_BYTES", size)
        units = files.split_into_units(path, path.name)
        pieces = [piece for unit in units for piece in unit.pieces(rows=suffix == "jsonl")]
        assert len(units) > 3 and b"".join(pieces).decode() == text
        source = build_source(TextSettings(path=str(path)), tmp_path, 1)
        got = sorted(d.text for d in source.stream({}))
        if suffix == "jsonl":
            assert got == sorted(json.loads(line)["text"] for line in text.splitlines())
        else:
            assert sum(map(len, got)) == len(text)


def test_files_may_come_and_go_between_runs(tmp_path: Path) -> None:
    for i in range(5):
        (tmp_path / f"{i}.txt").write_text(prose(i, 30_000))
    settings = TextSettings(path="*.txt")
    stream = build_source(settings, tmp_path, 1).stream({})
    for _ in range(9):
        next(stream)
    cursor = stream.cursor()
    (tmp_path / "9.txt").write_text(prose(9, 20_000))
    assert documents(build_source(settings, tmp_path, 1), cursor)
    for i in range(4):
        (tmp_path / f"{i}.txt").unlink()
    assert isinstance(documents(build_source(settings, tmp_path, 1), {**cursor, "unit": 4}), list)
    source = build_source(settings, tmp_path, 1)
    source.open()
    (tmp_path / "9.txt").unlink()  # vanishes after it was listed
    assert {d.key.split("#")[0] for d in source.stream({})} == {"4.txt"}
    assert source.notes == ["skipped 1 missing file: 9.txt"]


def test_bad_rows_are_counted_once(tmp_path: Path) -> None:
    good = rows(4, "x")
    write_jsonl(
        tmp_path / "x.jsonl",
        [good[0], b"{not json", b"", good[1], {"id": 1}, {"text": None}, b"\xff\xfe", *good[2:]],
    )
    source = build_source(TextSettings(path="x.jsonl"), tmp_path, 1)
    source.open()
    for epoch in (0, 1):
        assert [d.text for d in source.stream({"epoch": epoch})] == [row["text"] for row in good]
    assert source.notes == [
        "skipped 1 row: no JSON (the first: x.jsonl#1)",
        'skipped 2 rows: "text" is missing or null (the first: x.jsonl#4)',
        "skipped 1 row: not UTF-8 (the first: x.jsonl#6)",
    ]


def test_damaged_files_are_skipped_and_named(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "good.jsonl", rows(3, "x"))
    write_jsonl(tmp_path / "cut.jsonl.gz", rows(400, "x"))
    write_jsonl(tmp_path / "junk.jsonl.zst", rows(4, "x"))
    (tmp_path / "cut.jsonl.gz").write_bytes((tmp_path / "cut.jsonl.gz").read_bytes()[:2000])
    (tmp_path / "junk.jsonl.zst").write_bytes(b"not zstandard at all")
    (tmp_path / "junk.parquet").write_bytes(b"not parquet")
    source = build_source(TextSettings(path="."), tmp_path, 1)
    source.open()
    assert len([d for d in source.stream({}) if d.key.startswith("good")]) == 3
    assert 50 < len([d for d in source.stream({}) if d.key.startswith("cut")]) < 400
    skipped, used = source.notes
    assert (
        skipped.startswith("skipped 2 damaged files: ")
        and "junk.jsonl.zst" in skipped
        and "junk.parquet" in skipped
    )
    assert used == "used 1 file up to the damage: cut.jsonl.gz"


@pytest.mark.parametrize("name", ["r.jsonl", "r.jsonl.gz", "r.jsonl.zst", "r.parquet"])
def test_missing_column_names_the_columns(tmp_path: Path, name: str) -> None:
    (write_parquet if name.endswith("parquet") else write_jsonl)(
        tmp_path / name, [{"body": "x", "id": 1}]
    )
    _, failed = open_sources([build_source(TextSettings(path=".", name="s"), tmp_path, 1)])
    assert failed == {
        "s": f'{name} has no column "text"; its columns are body, id: set "text_field" to one of '
        "them"
    }
    source = build_source(TextSettings(path=name, text_field="body"), tmp_path, 1)
    assert [d.text for d in source.stream({})] == ["x"]


@pytest.mark.parametrize(
    "path, reason",
    [
        ("nowhere.txt", "does not exist"),
        ("nothing/*.txt", "no readable file matches"),
        ("empty", "holds no readable file"),
        ("table.xls", "is of no readable kind"),
    ],
)
def test_wrong_paths_are_named(tmp_path: Path, path: str, reason: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "table.xls").write_text("a,b")
    with pytest.raises(SourceUnavailable, match=reason) as error:
        build_source(TextSettings(path=path), tmp_path, 1).open()
    assert str(tmp_path) in str(error.value) and '"path"' in str(error.value)


def test_a_source_without_text_fails_instead_of_spinning(tmp_path: Path) -> None:
    (tmp_path / "blank.txt").write_text(" \n\n ")
    with pytest.raises(SourceUnavailable, match="no text in its only file"):
        build_source(TextSettings(path="."), tmp_path, 1).open()


def test_python_stdlib_is_the_library_only() -> None:
    source = build_source(PythonStdlibSettings(), Path("."), 1)
    source.open()
    labels = [unit.label for unit in source.order(0)]
    assert {"pathlib.py", "json/decoder.py", "asyncio/tasks.py"} <= set(labels) and len(
        labels
    ) > 300
    outside = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
    assert not [label for label in labels if outside & set(label.split("/"))]


def test_open_sources_keeps_order_and_deadline(root: Path) -> None:
    class Slow:
        name, finite, notes = "slow", True, ()

        def open(self) -> None:
            time.sleep(30)

    class Broken(Slow):
        name = "broken"

        def open(self) -> None:
            raise ZeroDivisionError("a fault")

    good = [build_source(LOCAL[kind], root, 1) for kind in ("pdf", "plain", "rows")]
    begin = time.monotonic()
    opened, failed = open_sources(
        [good[0], Slow(), good[1], Broken(), good[2]], deadline_seconds=1.5
    )
    assert time.monotonic() - begin < 3.0
    assert opened == good
    assert failed["broken"] == "ZeroDivisionError: a fault" and failed["slow"].startswith(
        "no answer within 1.5 s"
    )


def test_names(tmp_path: Path) -> None:
    assert TextSettings(path="data/my stories.jsonl.gz").name == "my_stories"
    assert TextSettings(path="data/*.txt").name == "data"
    assert TextSettings(path=["a.md", "b.md"]).name == "a"
    assert TextSettings(path="data/A [1]/b?.txt").name == "data", (
        "where nothing has that name, it is a pattern"
    )
    for name, path in (
        ("A_1", "A [1]"),
        ("B_2", "B [2]/*.txt"),
        ("t_2024_brouillon", "Été [2024] (brouillon)"),
    ):
        (tmp_path / path.removesuffix("/*.txt")).mkdir()
        assert TextSettings(path=str(tmp_path / path)).name == name
    assert PythonStdlibSettings().name == "python_stdlib" and PdfSettings().name == "pdf"
    assert (
        HfSettings(dataset="wikimedia/wikipedia", config="20231101.en").name
        == "wikimedia_wikipedia-20231101.en"
    )
    assert HfSettings(dataset="x/y", name="mine").name == "mine"


@pytest.mark.parametrize("name", NAMED_SOURCES)
def test_named_sources_decode(name: str) -> None:
    section = {"name": name, **NAMED_SOURCES[name]}
    settings = TypeAdapter(SOURCES[section["type"]][0]).validate_json(json.dumps(section))
    assert build_source(settings, Path("."), 1).name == name


@pytest.mark.parametrize(
    "section, problem",
    [
        ({"fields": ["a"]}, "go together"),
        ({"format": "{a}"}, "go together"),
        ({"fields": ["a"], "format": "{b}"}, "not among"),
        ({"fields": ["a"], "format": "{}"}, "not among"),
        ({"fields": ["a"], "format": "{a"}, "brace"),
        ({"fields": ["a"], "format": "a"}, "none of its"),
        ({"fields": ["a"], "format": "{a}", "text_field": "b"}, "exclude"),
        ({"dataset": 3}, "valid string"),
        ({"pth": "x"}, "xtra inputs"),
    ],
)
def test_wrong_hf_sections_are_refused(section: dict, problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        HfSettings.model_validate({"dataset": "a/b", **section})


def test_local_hf_formats_fields(tmp_path: Path) -> None:
    write_jsonl(
        tmp_path / "qa.jsonl",
        [{"q": f"q{i}", "a": i} for i in range(5)] + [{"q": "no answer", "a": None}],
    )
    settings = HfSettings(dataset="qa.jsonl", fields=["q", "a"], format="Q: {q}\nA: {a} {{}}")
    source = build_source(settings, tmp_path, 1)
    source.open()
    expected = [f"Q: q{i}\nA: {i} {{}}" for i in range(5)] + ["Q: no answer\nA:  {}"]
    assert source.finite and [d.text for d in source.stream({})] == expected


def test_local_hf_folder_and_missing_path(root: Path, tmp_path: Path) -> None:
    for i in range(3):
        write_parquet(tmp_path / f"train-{i}.parquet", rows(10, f"s{i}"))
    source = build_source(HfSettings(dataset=f"./{tmp_path.name}", name="x"), tmp_path.parent, 1)
    source.open()
    assert sorted(d.text for d in source.stream({})) == sorted(
        r["text"] for i in range(3) for r in rows(10, f"s{i}")
    )
    with pytest.raises(SourceUnavailable, match="does not exist"):
        build_source(HfSettings(dataset="./nowhere"), tmp_path, 1).open()
    with pytest.raises(SourceUnavailable, match="its columns are id, text"):
        build_source(HfSettings(dataset="./rows/d.parquet", text_field="body"), root, 1).open()


def test_local_text_stands_for_a_dataset_of_the_hub(tmp_path: Path) -> None:
    """`tinyshakespeare` is the file where it is there, under the same name in weights and logs;
    else the Hub's."""
    settings = HfSettings.model_validate(
        NAMED_SOURCES["tinyshakespeare"] | {"name": "tinyshakespeare"}
    )
    remote = build_source(settings, tmp_path, 7)
    assert (
        type(remote).__name__ == "HfSource"
        and remote.columns == ["Text"]
        and remote.name == "tinyshakespeare"
    )
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tinyshakespeare.txt").write_text(prose(1, 40_000))
    local = build_source(settings, tmp_path, 7)
    opened, failed = open_sources([local])
    assert opened == [local] and not failed and local.name == "tinyshakespeare"
    texts = [document.text for document in local.stream({})]
    assert len(texts) > 1 and sum(map(len, texts)) > 39_000
