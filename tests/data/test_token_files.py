"""Token chunks: specification 001's files and order exactly; every document once and whole,
wherever a chunk ends."""

import json
import random
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from core.data import token_files as chunks_module
from core.data.sources import SOURCES, build_source, open_sources
from core.data.sources.tokens import TokensSettings, TokensSource
from core.data.token_files import BadChunks, ChunkReader, ChunkWriter, Manifest, read_manifest
from core.data.tokenizer import Tokenizer
from core.data.tokenizer_build import build_tokenizer
from core.errors import SourceUnavailable, UserError
from core.preset.settings import TokenizerSettings

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "polyglu" / "chunks"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
SEEDS = {"math": 42, "stem": 43, "code": 44}
EOS_001 = 151643
EOS = 0


def source_of(folder: Path, seed: int | None = None, run_seed: int = 1) -> TokensSource:
    source = build_source(TokensSettings(path=str(folder), seed=seed), folder.parent, run_seed)
    source.open()
    return source


def documents(seed: int, count: int, longest: int = 40) -> list[np.ndarray]:
    rng = random.Random(seed)
    return [
        np.array([rng.randint(1, 999) for _ in range(rng.randint(1, longest))], np.int32)
        for _ in range(count)
    ]


def empty_manifest(chunk_size: int) -> Manifest:
    return Manifest(
        "test", None, 0, 0, chunk_size, EOS, complete=False, documents=0, vocab_size=1000
    )


def write(folder: Path, found: list[np.ndarray], chunk_size: int, complete: bool = True) -> Path:
    writer = ChunkWriter(folder, empty_manifest(chunk_size))
    for ids in found:
        writer.add(np.append(ids, EOS))
    writer.save(complete=complete)
    writer.close()
    return folder


def texts(source: TokensSource, cursor: dict | None = None) -> list[list[int]]:
    return [document.encoded.ids.tolist() for document in source.stream(cursor or {})]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# documents and chunks -----------------------------------------------------------------------------


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """The files are what specification 001 says: raw little-endian uint32 and its keys; the rest of
    the manifest is true."""
    found = documents(1, 50)
    folder = write(tmp_path / "t", found, 100)
    tokens = np.concatenate([np.append(ids, EOS) for ids in found])
    manifest = json.loads((folder / "manifest.json").read_text())
    on_disk = b"".join((folder / chunk["file"]).read_bytes() for chunk in manifest["chunks"])
    assert on_disk == tokens.astype("<u4").tobytes()
    sizes = [
        (folder / f"chunk_{i:05d}.bin").stat().st_size // 4 for i in range(manifest["num_chunks"])
    ]
    assert sizes[:-1] == [100] * (len(sizes) - 1) and 0 < sizes[-1] <= 100
    assert manifest["total_tokens"] == len(tokens) == sum(sizes) and manifest["documents"] == 50
    assert (
        sum(chunk["documents"] for chunk in manifest["chunks"]) == 50
        and manifest["complete"] is True
    )
    assert {"dataset_id", "config", "chunk_size", "eos_token_id", "vocab_size"} <= set(manifest)
    reader = ChunkReader(folder)
    read = [ids.tolist() for index in range(len(sizes)) for _, _, ids in reader.documents(index)]
    assert read == [ids.tolist() for ids in found] and reader.notes == []


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("block", [3, 1 << 20])
def test_no_document_is_lost_or_read_twice_in_any_order(
    seed: int, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some run over several chunks, some end exactly where a chunk does; chunks come in a shuffled
    order."""
    monkeypatch.setattr(chunks_module, "BLOCK", block)
    rng = random.Random(seed)
    found = documents(seed, 30, rng.choice([5, 40, 200]))
    folder = write(tmp_path / "t", found, rng.choice([7, 20, 50]))
    source = source_of(folder, run_seed=seed)
    assert [unit.label for unit in source.order(0)] != sorted(
        unit.label for unit in source.order(0)
    )
    stream = source.stream({})
    read, keys = [], []
    for document in stream:
        read.append(document.encoded.ids.tolist())
        keys.append(document.key)
        assert (
            document.encoded.ids.dtype == np.int32
            and document.encoded.learned is None
            and document.encoded.size == 0
        )
    assert sorted(read) == sorted(ids.tolist() for ids in found) and len(set(keys)) == len(keys)


def test_a_resumed_stream_goes_on_at_every_document(tmp_path: Path) -> None:
    folder = write(tmp_path / "t", documents(3, 60), 90)
    source = source_of(folder)
    stream, cursors, read = source.stream({"epoch": 2}), [{"epoch": 2}], []
    for document in stream:
        read.append(document)
        cursors.append(json.loads(json.dumps(stream.cursor())))
    for at in random.Random(0).sample(range(len(cursors)), 25):
        rest = list(source_of(folder).stream(cursors[at]))
        assert [(d.key, d.digest) for d in rest] == [(d.key, d.digest) for d in read[at:]]


def test_the_order_of_chunks_is_a_function_of_seed_and_epoch(tmp_path: Path) -> None:
    folder = write(tmp_path / "t", documents(1, 200), 60)
    orders = {
        tuple(u.label for u in source_of(folder, seed, run).order(e))
        for seed in (None, 5)
        for run in (1, 2)
        for e in (0, 1)
    }
    assert len(orders) == 6  # with a seed of its own, the run's makes no difference


def test_contents_change_with_the_chunks(tmp_path: Path) -> None:
    """What a resumed run goes by: whether the order it was reading in is still the same."""
    first = source_of(write(tmp_path / "a", documents(1, 20), 100)).contents()
    assert source_of(write(tmp_path / "b", documents(1, 20), 100)).contents() == first
    assert source_of(write(tmp_path / "c", documents(1, 21), 100)).contents() != first
    assert first == "658a2ca9a35aff6a", (
        "checkpoints hold it: runs begun before would begin their mix anew"
    )


def test_empty_documents_are_left_out_and_a_last_one_without_an_end_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "t"
    folder.mkdir()
    np.array([EOS, EOS, 5, 6, EOS, EOS, 7], "<u4").tofile(folder / "chunk_00000.bin")
    np.array([8, EOS, EOS, 9, 9], "<u4").tofile(folder / "chunk_00001.bin")
    facts = {
        "dataset_id": "x",
        "config": None,
        "total_tokens": 12,
        "num_chunks": 2,
        "chunk_size": 7,
        "eos_token_id": EOS,
    }
    (folder / "manifest.json").write_text(json.dumps(facts))
    assert sorted(texts(source_of(folder))) == [[5, 6], [7, 8], [9, 9]]


# what may be wrong --------------------------------------------------------------------------------


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_damaged_chunk_is_left_out_and_named(tmp_path: Path) -> None:
    """Only what lies in it is lost; a document that runs into it ends where the chunk begins."""
    # 31 tokens each with the end
    found = [np.arange(100 * i + 1, 100 * i + 31, dtype=np.int32) % 999 + 1 for i in range(20)]
    folder = write(tmp_path / "t", found, 100)
    flip(folder / "chunk_00002.bin", 40)
    source = source_of(folder)
    cut = found[6][: 200 - 6 * 31].tolist()  # document 6 runs into chunk 2, document 9 out of it
    assert sorted(texts(source)) == sorted(
        [*(ids.tolist() for i, ids in enumerate(found) if not 6 <= i <= 9), cut]
    )
    assert source.notes == ["skipped 1 damaged file: chunk_00002.bin"]


def test_a_source_of_one_damaged_chunk_cannot_be_opened(tmp_path: Path) -> None:
    folder = write(tmp_path / "t", documents(4, 10), 10000)
    flip(folder / "chunk_00000.bin", 8)
    with pytest.raises(
        SourceUnavailable, match=r"no document in .*skipped 1 damaged file: chunk_00000.bin"
    ):
        source_of(folder)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "make it first.*91_tokenize_local"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "no manifest of token chunks"),
        (
            lambda folder: (folder / "manifest.json").write_text('{"num_chunks": 1}'),
            "no manifest of token chunks",
        ),
        (
            lambda folder: edit(folder, total_tokens="many"),
            'manifest.json is no manifest.*"total_tokens" is "many"',
        ),
        (lambda folder: edit(folder, eos_token_id=True), '"eos_token_id" is true'),
        (lambda folder: edit(folder, documents=-1), '"documents" is -1'),
        (lambda folder: edit(folder, chunks={}), '"chunks" is {}'),
        (lambda folder: edit(folder, chunks=[None]), "null is no object"),
        (lambda folder: edit(folder, chunks=[{"file": 3, "tokens": 1}]), '"file" is 3'),
        (
            lambda folder: edit(folder, chunks=[{"file": "chunk_00000.bin", "tokens": "1"}]),
            '"tokens" is "1"',
        ),
        (lambda folder: edit(folder, chunks=[{"file": "chunk_00000.bin"}]), '"tokens" is missing'),
        (
            lambda folder: (folder / "chunk_00001.bin").unlink(),
            "chunk_00001.bin is missing, but the manifest lists it",
        ),
        (
            lambda folder: (folder / "chunk_00001.bin").write_bytes(b"\0" * 399),
            "399 bytes, the manifest says 400: copy it again",
        ),
        (lambda folder: edit(folder, dtype="uint16"), "says dtype uint16; only uint32 can be read"),
        (lambda folder: edit(folder, format=9), "has format 9, .*update the program"),
        (
            lambda folder: (edit(folder, chunks=None), cut(folder)),
            "398 bytes, which is no whole number of uint32",
        ),
        (lambda folder: edit(folder, chunks=[], num_chunks=0), "holds no token yet"),
    ],
)
def test_a_folder_that_cannot_be_used_says_what_to_do(change, told: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "t", documents(4, 20), 100)
    change(folder)
    with pytest.raises(SourceUnavailable, match=told):
        source_of(folder)
    assert open_sources([build_source(TokensSettings(path=str(folder)), tmp_path, 1)])[0] == []


def edit(folder: Path, **facts: object) -> None:
    """Change facts in a manifest; None takes them out."""
    manifest = json.loads((folder / "manifest.json").read_text()) | facts
    manifest = {
        key: value for key, value in manifest.items() if value is not None or key == "config"
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def cut(folder: Path) -> None:
    path = folder / "chunk_00001.bin"
    path.write_bytes(path.read_bytes()[:398])


def test_the_miscounts_of_the_references_resumed_manifests_are_told_and_mended(
    tmp_path: Path,
) -> None:
    """It counts a partial chunk as full, and in a second run only that run's tokens: the files are
    believed."""
    found = documents(4, 20)
    folder = write(tmp_path / "t", found, 100)
    edit(
        folder,
        chunks=None,
        complete=None,
        documents=None,
        format=None,
        dtype=None,
        total_tokens=1000,
    )
    source = source_of(folder)
    assert sorted(texts(source)) == sorted(ids.tolist() for ids in found)
    assert any("says 1,000 tokens, its chunks hold" in note for note in source.notes)


def test_ids_beyond_the_vocabulary_are_damage(tmp_path: Path) -> None:
    """Even where no checksum could tell: on a GPU such an id ends the run without a word of
    sense."""
    folder = write(tmp_path / "t", documents(4, 20), 10000)
    edit(folder, chunks=None, vocab_size=500)
    with pytest.raises(SourceUnavailable, match="damaged"):
        source_of(folder)


def test_an_unfinished_folder_can_be_used_while_it_is_written(tmp_path: Path) -> None:
    found = documents(5, 30)
    folder = write(tmp_path / "t", found, 100, complete=False)
    last = sorted(folder.glob("chunk_*.bin"))[-1]
    # the writer is ahead of what it has recorded
    last.write_bytes(last.read_bytes() + b"\x01\x02\x03\x04\x05")
    source = source_of(folder)
    assert sorted(texts(source)) == sorted(ids.tolist() for ids in found)
    assert any("was not finished" in note and "run it again" in note for note in source.notes)


def test_the_run_must_use_the_tokenizer_the_chunks_were_made_with(tmp_path: Path) -> None:
    """The vocabulary may only have grown at its end."""
    sample = ["the quick brown fox " * 50, "jumps over the lazy dog " * 50]
    own = build_tokenizer(TokenizerSettings(vocab_size=280), sample)
    other = build_tokenizer(TokenizerSettings(vocab_size=280), [text[::-1] for text in sample])
    small = build_tokenizer(TokenizerSettings(type="byte"), [])
    folder = write(tmp_path / "t", documents(1, 5), 1000)
    edit(
        folder,
        vocab_size=own.vocab_size,
        vocabulary_sha256=own.vocabulary_sha256(own.vocab_size),
        eos_token_id=own.eos_id,
    )
    source = TokensSource(TokensSettings(path="t"), tmp_path, 1)
    source.list_units()
    source.check_tokenizer(own)
    backend = Tokenizer.from_state(own.state())._backend
    backend.add_tokens(["<|new|>"])
    source.check_tokenizer(Tokenizer(backend, own.eos_id))
    for tokenizer, told in (
        (other, "other ids"),
        (small, "this one has 257"),
        (Tokenizer(backend, 5), "ends with token 0 there"),
    ):
        with pytest.raises(UserError, match=told):
            source.check_tokenizer(tokenizer)


# the writer ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_a_writer_goes_on_from_any_saved_state(seed: int, tmp_path: Path) -> None:
    """Whatever was written after it and not saved: half a token, whole chunks, nothing."""
    rng = random.Random(seed)
    found = documents(seed, 60)
    expected = files(write(tmp_path / "whole", found, 50))
    folder, at = tmp_path / "t", 0
    writer = ChunkWriter(folder, empty_manifest(50))
    writer.save(at=0)
    while at < len(found):
        for ids in found[at : at + rng.randint(0, 12)]:
            writer.add(np.append(ids, EOS))
            at += 1
        writer.save(at=at)
        for ids in documents(seed + 100, rng.randint(0, 9)):  # lost work
            writer.add(np.append(ids, EOS))
        writer.close()
        last = sorted(folder.glob("chunk_*.bin"))
        if last and rng.random() < 0.5:
            last[-1].write_bytes(last[-1].read_bytes() + b"\x07\x07\x07")
        writer = ChunkWriter(folder, read_manifest(folder))
        assert writer.manifest.writer == {"at": at}
    writer.manifest.writer.clear()
    writer.save(complete=True)
    writer.close()
    assert files(folder) == expected


def test_a_second_writer_and_a_shortened_chunk_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "t", documents(1, 10), 100, complete=False)
    writer = ChunkWriter(folder, read_manifest(folder))
    with pytest.raises(BadChunks, match="another process is writing"):
        ChunkWriter(folder, read_manifest(folder))
    writer.close()
    manifest = read_manifest(folder)
    last = folder / manifest.chunks[-1].file
    last.write_bytes(last.read_bytes()[:-4])
    with pytest.raises(BadChunks, match="were written: delete"):
        ChunkWriter(folder, manifest)


def test_a_manifest_keeps_all_it_says(tmp_path: Path) -> None:
    folder = write(tmp_path / "t", documents(1, 10), 100)
    manifest = read_manifest(folder)
    manifest.save(folder)
    assert asdict(read_manifest(folder)) == asdict(manifest)
    assert (
        SOURCES["tokens"][0] is TokensSettings
        and TokensSettings(path="./data/tokens/wiki").name == "wiki"
    )
