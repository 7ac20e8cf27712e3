"""The tokenize job: the same files for any number of processes and after any interruption; then
they train."""

import importlib
import io
import json
import multiprocessing
import os
import random
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.data.sources import build_source
from core.data.token_files import read_manifest
from core.data.tokenizer_build import build_tokenizer, read_tokenizer
from core.errors import Interrupted, NoData, SourceUnavailable, UserError
from core.jobs import JOBS
from core.parallel.single import Single
from core.preset.decode import decode_preset
from core.preset.settings import TokenizerSettings
from core.registry import Preset
from core.runtime import detect_runtime
from core.ui.tokenize import TokenizeView
from tests.documents import GUIDE, block_of, files_named
from tests.project import merged, story

job = importlib.import_module("core.jobs.tokenize")
tokenize_source = importlib.import_module("core.data.tokenize_source")
pool = importlib.import_module("core.data.token_pool")
chunks = importlib.import_module("core.data.token_files")

KILLS = 4
"""kill -9 so many times in test_killed_at_any_moment; raise it for a long night."""


def preset_of(**changes: Any) -> dict:
    """A preset that tokenizes the stories of a Project to bytes."""
    preset = {
        "job": "tokenize",
        "tokenizer": {"type": "byte"},
        "data": {"sources": [{"type": "text", "path": "texts"}]},
        "tokenize": {"output": "tokens", "chunk_tokens": 5000, "workers": 0},
    }
    return merged(preset, changes)


def tokenize_here(preset: dict, root: Path, stem: str = "t") -> str:
    """Run the job in this process; what it tells."""
    (root / "texts").mkdir(parents=True, exist_ok=True)
    for number in range(40):
        (root / "texts" / f"story{number:02}.txt").write_text(story(number))
    console = io.StringIO()
    job.tokenize(
        decode_preset(preset, Preset, stem, stem), detect_runtime(), Single(), root, 0.0, console
    )
    return console.getvalue()


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many batches, each saved at once."""
    monkeypatch.setattr(tokenize_source, "BATCH_CHARACTERS", 2500)
    monkeypatch.setattr(tokenize_source, "SAVE_SECONDS", 0.0)


# what comes out -----------------------------------------------------------------------------------


def test_the_files_hold_every_document_in_the_sources_order(tmp_path: Path) -> None:
    """Each followed by the end token; blank and too short ones are passed over, as in training."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "blank.txt").write_text(" \n\t " * 50)
    (tmp_path / "texts" / "short.txt").write_text("too short\n")
    (tmp_path / "texts" / "end.txt").write_text(
        "A text may say <|endoftext|>, which ends nothing. " * 3
    )
    preset = preset_of()
    told = tokenize_here(preset, tmp_path)
    decoded, tokenizer = (
        decode_preset(preset, Preset, "t", "t"),
        build_tokenizer(TokenizerSettings(type="byte"), []),
    )
    texts = [
        d.text
        for d in build_source(decoded.data.sources[0], tmp_path, decoded.train.seed).stream({})
    ]
    texts = [text for text in texts if text.strip() and len(text) >= 50]
    expected = np.concatenate(
        [np.append(ids, tokenizer.eos_id) for ids in tokenizer.encode_batch(texts)]
    )
    folder = tmp_path / "tokens" / "texts"
    manifest = read_manifest(folder)
    assert (
        b"".join((folder / c.file).read_bytes() for c in manifest.chunks)
        == expected.astype("<u4").tobytes()
    )
    assert [c.tokens for c in manifest.chunks[:-1]] == [5000] * (len(manifest.chunks) - 1) and len(
        manifest.chunks
    ) > 3
    assert (manifest.total_tokens, manifest.documents, manifest.complete) == (
        len(expected),
        41,
        True,
    )
    assert (
        manifest.eos_token_id == tokenizer.eos_id
        and manifest.vocab_size == 257
        and manifest.num_chunks == len(manifest.chunks)
    )
    assert read_tokenizer(tmp_path / "tokens" / "tokenizer.json").state() == tokenizer.state()
    for name in files_named(block_of(GUIDE, "data/tokens/tokenizer.json")):
        name = name.replace("data/tokens/corpus/", "tokens/texts/").replace("data/", "")
        assert (tmp_path / name).exists(), f"the guide says that the job writes {name}"
    assert (
        f"texts: {len(expected):,} tokens, 41 documents in" in told
        and '"type": "tokens", "path": "tokens/texts"' in told
    )


def test_any_number_of_processes_writes_the_same_files(tmp_path: Path, small_batches: None) -> None:
    found = []
    for workers in (0, 1, 3):
        tokenize_here(
            preset_of(tokenizer={"type": "bpe", "vocab_size": 300}, tokenize={"workers": workers}),
            tmp_path,
        )
        found.append(files(tmp_path / "tokens"))
        (tmp_path / "tokens").rename(tmp_path / f"tokens{workers}")
    assert found[0] == found[1] == found[2] and len(found[0]) > 5


def test_what_is_done_is_not_done_again_and_a_higher_limit_goes_on(
    tmp_path: Path, small_batches: None
) -> None:
    """A source stops at the end of the document that reaches the limit."""
    limited = preset_of(tokenize={"max_tokens": 9000})
    tokenize_here(limited, tmp_path)
    folder = tmp_path / "tokens" / "texts"
    manifest = read_manifest(folder)
    longest = max(len(story(number)) for number in range(40))
    assert 9000 <= manifest.total_tokens <= 9000 + longest and manifest.complete
    assert np.fromfile(folder / manifest.chunks[-1].file, "<u4")[-1] == manifest.eos_token_id
    before = files(tmp_path / "tokens")
    assert (
        "already; nothing to do" in tokenize_here(limited, tmp_path)
        and files(tmp_path / "tokens") == before
    )
    assert "goes on after" in tokenize_here(preset_of(), tmp_path)
    gone_on = files(tmp_path / "tokens")
    (tmp_path / "tokens").rename(tmp_path / "before")
    tokenize_here(preset_of(), tmp_path)
    assert files(tmp_path / "tokens") == gone_on
    assert "already; nothing to do" in tokenize_here(
        preset_of(tokenize={"max_tokens": 10**9}), tmp_path
    )


def test_each_source_may_have_a_limit_of_its_own(tmp_path: Path, small_batches: None) -> None:
    sources = [{"type": "text", "path": "texts", "name": name} for name in ("math", "stem")]
    preset = preset_of(data={"sources": sources}, tokenize={"max_tokens": [9000, 3000]})
    tokenize_here(preset, tmp_path)
    totals = [read_manifest(tmp_path / "tokens" / name).total_tokens for name in ("math", "stem")]
    longest = max(len(story(number)) for number in range(40))
    assert 9000 <= totals[0] <= 9000 + longest and 3000 <= totals[1] <= 3000 + longest
    lines = JOBS["tokenize"].preview(decode_preset(preset, Preset, "t", "t"), tmp_path)
    assert lines[1].endswith("at most 9,000 of math, 3,000 of stem")
    with pytest.raises(
        UserError,
        match=r"max_tokens has 2 numbers for 1 sources; give one for each, or one for all",
    ):
        tokenize_here(preset_of(tokenize={"max_tokens": [9000, 3000]}), tmp_path)


# interruptions ------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for a kill: nothing catches it, and nothing is saved on its way out."""


@pytest.mark.parametrize("seed", range(6))
def test_cut_off_at_any_write_it_comes_out_the_same(
    seed: int, tmp_path: Path, small_batches: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, in and after writing tokens, finishing a chunk, and saving the manifest."""
    tokenize_here(preset_of(), tmp_path)
    (tmp_path / "tokens").rename(tmp_path / "whole")
    rng, calls = random.Random(seed), [0]

    def dangerous(function: Callable) -> Callable:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            calls[0] -= 1
            if calls[0] == 0:
                if function is os.write and rng.random() < 0.7:
                    os.write(arguments[0], arguments[1][: rng.randrange(len(arguments[1]))])
                raise Killed
            return function(*arguments, **named)

        return wrapped

    for name in ("write", "fsync", "replace", "open"):
        monkeypatch.setattr(chunks.os, name, dangerous(getattr(os, name)))
    kills = 0
    while True:
        calls[0] = rng.randint(1, 60)
        try:
            tokenize_here(preset_of(), tmp_path)
            break
        except Killed:
            kills += 1
    calls[0] = 0
    assert kills >= 2
    left = files(tmp_path / "tokens")
    assert left == files(tmp_path / "whole")


def test_a_request_to_stop_saves_and_says_how_to_go_on(
    tmp_path: Path, small_batches: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenize_here(preset_of(), tmp_path)
    (tmp_path / "tokens").rename(tmp_path / "whole")

    def ask_soon(*_: Any) -> None:
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(TokenizeView, "update", ask_soon)
        with pytest.raises(
            Interrupted,
            match=r"interrupted after [\d,]+ tokens, \d+ documents of texts; everything is saved",
        ):
            tokenize_here(preset_of(), tmp_path)
    manifest = read_manifest(tmp_path / "tokens" / "texts")
    assert not manifest.complete and 0 < manifest.total_tokens < 20_000
    assert f"goes on after {manifest.total_tokens:,} tokens" in tokenize_here(preset_of(), tmp_path)
    assert files(tmp_path / "tokens") == files(tmp_path / "whole")


def test_a_full_disk_is_told_and_loses_nothing(tmp_path: Path, small_batches: None) -> None:
    big = preset_of(tokenize={"chunk_tokens": 100_000})
    tokenize_here(big, tmp_path)
    (tmp_path / "tokens").rename(tmp_path / "whole")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
    try:
        with pytest.raises(
            UserError,
            match=r"cannot be written: File too large\. A limit .*[\d,]+ tokens of texts are "
            r"safe: start again to go on",
        ):
            tokenize_here(big, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert read_manifest(tmp_path / "tokens" / "texts").total_tokens > 10_000
    tokenize_here(big, tmp_path)
    assert files(tmp_path / "tokens") == files(tmp_path / "whole")


def test_a_source_that_fails_for_good_keeps_what_it_had_and_the_others_go_on(
    tmp_path: Path, small_batches: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that cannot be opened, one that breaks off half-way. The next start goes on where it
    broke off."""
    sources = [{"type": "text", "path": "texts", "name": name} for name in ("a", "b")] + ["pdf"]
    preset = preset_of(data={"sources": sources})
    real = tokenize_source._batches

    def breaks(stream: Any, task: Any) -> Any:
        for number, batch in enumerate(real(stream, task)):
            if number == 4 and stream._source.name == "a":
                raise SourceUnavailable("the network is gone")
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(tokenize_source, "_batches", breaks)
        told = tokenize_here(preset, tmp_path)
    assert (
        "warning  source pdf left out" in told
        and "warning  source a stopped, the others go on: the network" in told
    )
    a, b = (read_manifest(tmp_path / "tokens" / name) for name in "ab")
    assert 0 < a.total_tokens < b.total_tokens and (a.complete, b.complete) == (False, True)
    tokenize_here(preset, tmp_path)
    assert read_manifest(tmp_path / "tokens" / "a").total_tokens == b.total_tokens
    with pytest.raises(NoData, match="nowhere"):
        tokenize_here(preset_of(data={"sources": [{"type": "text", "path": "nowhere"}]}), tmp_path)


# mistakes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"tokenizer": {"type": "bpe", "vocab_size": 300}},
            r"with another tokenizer .*\nDelete the folder .*tokens to",
        ),
        (
            {"tokenize": {"chunk_tokens": 4000}},
            r"\(tokenize.chunk_tokens changed since\).\nDelete the folder .*tokens/texts to",
        ),
        ({"train": {"seed": 1}}, r"\(train.seed changed since\)"),
        ({"data": {"min_text_length": 60}}, r"\(data.min_text_length changed since\)"),
        ({}, r"\(the list of its files changed since\)"),
        (
            {"data": {"sources": [{"type": "text", "path": "texts/*.txt", "name": "texts"}]}},
            r"\(path changed since\)",
        ),
    ],
)
def test_other_settings_are_refused_and_nothing_is_touched(
    change: dict, told: str, tmp_path: Path
) -> None:
    tokenize_here(preset_of(), tmp_path)
    before = files(tmp_path / "tokens")
    if not change:
        (tmp_path / "texts" / "another.txt").write_text(story(99))
    with pytest.raises(UserError, match=told):
        tokenize_here(preset_of(**change), tmp_path)
    assert files(tmp_path / "tokens") == before


def test_what_cannot_be_tokenized_is_refused(tmp_path: Path) -> None:
    chat = {"type": "chat", "path": "chats.jsonl", "name": "talk"}
    tokens = {"type": "tokens", "path": "tokens/texts", "name": "again"}
    for source, told in ((chat, "learned would be lost"), (tokens, "it is tokens already")):
        with pytest.raises(UserError, match=told):
            tokenize_here(preset_of(data={"sources": [source]}), tmp_path)
    twins = [{"type": "text", "path": "texts", "name": name} for name in ("a b", "a_b")]
    with pytest.raises(UserError, match="a b and a_b would share tokens/a_b"):
        tokenize_here(preset_of(data={"sources": twins}), tmp_path)
    # nothing lands in the project, or above it
    for output in (str(tmp_path), f"../{tmp_path.name}", str(tmp_path.parent)):
        with pytest.raises(UserError, match="holds the project itself"):
            tokenize_here(preset_of(tokenize={"output": output}), tmp_path)
    (tmp_path / "tokens" / "texts").mkdir(parents=True)
    (tmp_path / "tokens" / "texts" / "chunk_00000.bin").write_bytes(b"somebody's")
    with pytest.raises(UserError, match="holds chunks without a manifest"):
        tokenize_here(preset_of(), tmp_path)
    assert (tmp_path / "tokens" / "texts" / "chunk_00000.bin").read_bytes() == b"somebody's"


def test_a_dead_process_is_told(
    tmp_path: Path, small_batches: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill_one(view: Any, *_: Any) -> None:
        for process in multiprocessing.active_children():
            process.kill()

    monkeypatch.setattr(TokenizeView, "update", kill_one)
    with pytest.raises(UserError, match=r"a tokenizing process died.*tokenize.workers"):
        tokenize_here(preset_of(tokenize={"workers": 1}), tmp_path)
    assert read_manifest(tmp_path / "tokens" / "texts").complete is False


# a tokenizer in a file ----------------------------------------------------------------------------


def test_a_tokenizer_file_is_what_was_saved_and_what_others_write(tmp_path: Path) -> None:
    own = build_tokenizer(TokenizerSettings(vocab_size=300), [story(n) for n in range(9)])
    own.save(tmp_path / "tokenizer.json")
    settings = TokenizerSettings(type="file", path="tokenizer.json")
    assert build_tokenizer(settings, [], root=tmp_path).state() == own.state()
    config = tmp_path / "tokenizer_config.json"
    # the form in which the Hub keeps added tokens
    config.write_text(json.dumps({"eos_token": {"content": "ap"}}))
    assert (
        build_tokenizer(settings, [], root=tmp_path).eos_id
        == own._backend.token_to_id("ap")
        is not None
    )
    config.unlink()
    assert build_tokenizer(settings, [], root=tmp_path).eos_id == own.eos_id
    config.write_text(json.dumps({"eos_token": "<gone>"}))
    for path, told in (
        ("tokenizer.json", 'says "eos_token": "<gone>"'),
        ("none.json", "does not exist.*91_tokenize_local"),
    ):
        with pytest.raises(UserError, match=told):
            build_tokenizer(TokenizerSettings(type="file", path=path), [], root=tmp_path)
    for odd in (5, "", [], {"x": 1}, ["a", "b"], {"content": 3}, "e"):
        config.write_text(json.dumps({"eos_token": odd}))
        for kind, name in (("file", {"path": "tokenizer.json"}), ("hub", {"name": str(tmp_path)})):
            with pytest.raises(UserError, match=r"eos_token.*(is no token|a character of texts)"):
                build_tokenizer(TokenizerSettings(type=kind, **name), [], root=tmp_path)
    config.write_text('{"eos_token": "<|endoft')
    with pytest.raises(
        UserError, match="cannot be read as JSON, and it says which token ends a document"
    ):
        build_tokenizer(settings, [], root=tmp_path)
    config.unlink()
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="is no tokenizer"):
        build_tokenizer(settings, [], root=tmp_path)
