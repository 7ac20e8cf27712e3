"""The `tokenize` job: every source of a preset to a folder of token chunks, and the tokenizer
beside them.

In:    a preset: its sources, its tokenizer, its section `tokenize`
Out:   <output>/<source>/manifest.json and chunk_*.bin (core/data/token_files.py),
       <output>/tokenizer.json
State: each manifest holds the source's cursor: whoever was stopped or killed goes on there, and the
files come out the same"""

import hashlib
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, Field

from core.data.corpus import Corpus, open_corpus
from core.data.documents import Cursor, DocumentStream, Source, shorter_than
from core.data.token_files import MANIFEST, BadChunks, ChunkWriter, Manifest, read_manifest
from core.data.token_pool import TextBatch, TokenPool, usable_cores
from core.data.tokenizer import Tokenizer
from core.data.tokenizer_build import (
    SAMPLE_CHARACTERS,
    build_tokenizer,
    read_tokenizer,
    tokenizer_facts,
)
from core.errors import Interrupted, NoData, SourceUnavailable, UserError
from core.file_names import file_name, is_file_name
from core.files import cause, own_path
from core.parallel.single import Single
from core.preset.base import PresetBase
from core.preset.settings import Settings
from core.runtime import Runtime
from core.signals import StopRequest
from core.ui.tokenize import TokenizeView

SAVE_SECONDS = 5.0
"""How much work a kill may cost."""

BATCH_CHARACTERS = 250_000
BATCH_DOCUMENTS = 1024

THREADS_SUFFICE = 2
"""Cores up to which the tokenizers library's own threads are used, not processes. On two, both
reach 2.0M tokens/s, and threads need no half second to start. On more, turning ids into arrays
would set their pace: 0.12 s of Python for each million tokens."""

MOST_PROCESSES = 32
"""One process reads for all of them: 0.03 s for each million tokens."""

COUNTED_UNITS = 20
"""A source of fewer files than this shows no share done: they may differ much in length."""

NO_LIMIT = 1 << 62
NO_TEXT = {"chat": "which tokens of it are learned would be lost", "tokens": "it is tokens already"}


@dataclass
class Task:
    """One source and its folder."""

    source: Source
    folder: Path
    manifest: Manifest
    limit: int  # tokens


def _below_a_folder(output: str) -> str:
    parts = PurePath(output).parts
    if parts in ((), ("/",), ("~",)) or parts[-1] == "..":
        raise ValueError(
            "is no folder of its own: files would land in the project itself, or above it; "
            '"./data/tokens" is one'
        )
    return output


class TokenizeSettings(Settings):
    """The tokenize job: every source of `data` to a folder of chunks, which a source of type
    `tokens` reads."""

    output: Annotated[str, AfterValidator(_below_a_folder)] = Field("./data/tokens", min_length=1)
    """Folder that gets the tokenizer, and a folder of chunks for each source."""
    chunk_tokens: int = Field(100_000_000, ge=1, le=10_000_000_000)
    """Tokens of a chunk: 4 bytes each."""
    max_tokens: (
        Annotated[int, Field(ge=1)]
        | Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)]
        | None
    ) = None
    """Tokens after which a source is left, at the end of a document: one number, or one per source.
    Left out: read to the end."""
    workers: int | None = Field(None, ge=0, le=256)
    """Processes that tokenize; 0: the threads of this one. Left out: one per core. The files are
    the same for any number."""


class TokenizePreset(PresetBase):
    """A preset, as the tokenize job reads it."""

    tokenize: TokenizeSettings = TokenizeSettings()
    """The files of the tokenize job."""


def tokenize(
    preset: TokenizePreset,
    runtime: Runtime,
    parallel: Any,
    root: Path,
    started: float,
    console: Any,
) -> None:
    """Write every source, one after the other. Raises Interrupted after Ctrl-C, SIGTERM or SIGHUP,
    with everything saved."""
    if parallel.rank != 0:  # one process does it all; its own helpers are no ranks
        return
    wanted = preset.tokenize
    with TokenizeView(console) as view, StopRequest() as stop:
        _refuse(preset, root)
        corpus = open_corpus(preset, root, Single())
        failed = dict(corpus.failed)
        for name, reason in failed.items():
            view.tell(f"warning  source {name} left out, the others go on: {reason}")
        tokenizer = _tokenizer(preset, corpus, root, view)
        notes, warnings = corpus.tokenizer_remarks(tokenizer)
        for line in [f"note  {note}" for note in notes] + [
            f"warning  {warning}" for warning in warnings
        ]:
            view.tell(line)
        tasks = _tasks(preset, corpus, tokenizer, root)
        cores = usable_cores()
        workers = wanted.workers
        if workers is None:
            workers = 0 if cores <= THREADS_SUFFICE else min(cores, MOST_PROCESSES)
        with TokenPool(tokenizer, workers) as pool:
            for task in tasks:
                try:
                    _write(task, preset, pool, view, stop)
                except SourceUnavailable as error:
                    failed[task.source.name] = str(error)
                    view.tell(
                        f"warning  source {task.source.name} stopped, the others go on: {error}"
                    )
        if len(failed) == len(preset.data.sources):
            raise NoData(
                "no source could be tokenized:\n"
                + "\n".join(f"  {name}: {why}" for name, why in failed.items())
            )
        view.tell(f"to train on it: {_how_to_use(preset, tasks)}")


def token_files(preset: TokenizePreset, root: Path) -> list[Path]:
    """Return the chunks that are there."""
    return list(folder_of(preset, root).glob("*/*.bin"))


def preview_tokenize(preset: TokenizePreset, root: Path) -> list[str]:
    """What the menu tells before the job is chosen."""
    wanted, kind = preset.tokenize, preset.tokenizer
    what = {
        "bpe": f"a BPE of {kind.vocab_size:,} tokens trained on them",
        "byte": "bytes",
        "hub": str(kind.name),
    }
    limit = (
        f", at most {wanted.max_tokens:,} of a source" if isinstance(wanted.max_tokens, int) else ""
    )
    if isinstance(wanted.max_tokens, list):
        limit = f", at most {', '.join(f'{limit:,} of {name}' for name, limit in limits_of(preset).items())}"
    lines = [
        f"tokenizes {', '.join(source.name for source in preset.data.sources)}; tokenizer: "
        f"{what.get(kind.type, str(kind.path))}",
        f"writes {wanted.output}/<source>/chunk_00000.bin ..., {wanted.chunk_tokens:,} tokens "
        f"each{limit}",
    ]
    for source in preset.data.sources:
        try:
            manifest = read_manifest(folder_of(preset, root, source.name))
        except BadChunks:
            continue
        state = "done" if manifest.complete else "goes on there"
        lines.append(f"{source.name}: {manifest.total_tokens:,} tokens written, {state}")
    return lines if len(lines) > 2 else [*lines, "starts fresh"]


def limits_of(preset: TokenizePreset) -> dict[str, int]:
    """{source: tokens after which it is left}."""
    limits, sources = preset.tokenize.max_tokens or NO_LIMIT, preset.data.sources
    return dict(
        zip(
            [source.name for source in sources],
            limits if isinstance(limits, list) else [limits] * len(sources),
        )
    )


def folder_of(preset: TokenizePreset, root: Path, source: str = "") -> Path:
    """The output folder, or a source's folder in it."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", source).lstrip(".")
    name = plain if is_file_name(plain) and source.isascii() else file_name(source)
    return own_path(preset.tokenize.output, root) / (name if source else "")


# before anything is written -----------------------------------------------------------------------


def _refuse(preset: TokenizePreset, root: Path) -> None:
    """Raises UserError for what cannot be tokenized."""
    output, project = folder_of(preset, root).resolve(), root.resolve()
    if project.is_relative_to(output):
        raise UserError(
            f"tokenize.output is {output}, which holds the project itself; name a folder of its "
            "own: ./data/tokens"
        )
    limits, count = preset.tokenize.max_tokens, len(preset.data.sources)
    if isinstance(limits, list) and len(limits) != count:
        raise UserError(
            f"tokenize.max_tokens has {len(limits)} numbers for {count} sources; give one for "
            "each, or one for all."
        )
    for section in preset.data.sources:
        if section.type in NO_TEXT:
            raise UserError(
                f'source {section.name} is of type "{section.type}" and cannot be tokenized: '
                f"{NO_TEXT[section.type]}. "
                "Take it out of this preset; training reads it as it is."
            )
    folders: dict[Path, str] = {}
    for section in preset.data.sources:
        folder = folder_of(preset, Path(), section.name)
        if folder in folders:
            raise UserError(
                f"sources {folders[folder]} and {section.name} would share {folder}; give one "
                'another "name"'
            )
        folders[folder] = section.name


def _tokenizer(preset: TokenizePreset, corpus: Corpus, root: Path, view: TokenizeView) -> Tokenizer:
    """The one that stands in the output folder, if this preset put it there; else a new one,
    written there."""
    output, asked = folder_of(preset, root), preset.tokenizer.model_dump(mode="json")
    path = output / "tokenizer.json"
    made_from = tokenizer_facts(path).get("made_from")
    # a file is looked at again
    if path.exists() and made_from == asked and preset.tokenizer.type != "file":
        standing = read_tokenizer(path)
        if all(standing.special_id(marker) is not None for marker in corpus.markers):
            return standing
    if preset.tokenizer.type == "bpe":
        view.tell(
            f"training a BPE of {preset.tokenizer.vocab_size:,} tokens on a sample of the sources"
        )
    texts = corpus.sample_texts(SAMPLE_CHARACTERS) if preset.tokenizer.type == "bpe" else []
    tokenizer = build_tokenizer(preset.tokenizer, texts, corpus.markers, root)
    if path.exists():
        if read_tokenizer(path).state() == tokenizer.state():
            return tokenizer
        if any(output.glob("*/manifest.json")):
            raise UserError(
                f"{output} was tokenized with another tokenizer (made from {made_from}); this "
                f"preset asks for {asked}.\n"
                f"Delete the folder {output} to tokenize anew, or give the preset another "
                '"tokenize.output".'
            )
    try:
        output.mkdir(parents=True, exist_ok=True)
        tokenizer.save(path, made_from=asked)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {cause(error, path)} Then start again."
        ) from None
    return tokenizer


def _tasks(preset: TokenizePreset, corpus: Corpus, tokenizer: Tokenizer, root: Path) -> list[Task]:
    """What is to do. Raises UserError when a folder holds something else than this preset would
    write."""
    sha = hashlib.sha256(tokenizer.state()["json"].encode()).hexdigest()
    vocabulary = tokenizer.vocabulary_sha256(tokenizer.vocab_size)
    tasks = []
    for source, section in zip(corpus.sources, corpus.sections):
        facts = {
            "source": section.model_dump(mode="json"),
            "train.seed": preset.train.seed,
            "data.min_text_length": preset.data.min_text_length,
            "the list of its files": source.contents(),  # a cursor counts along it
        }
        manifest = Manifest(
            dataset_id=getattr(section, "dataset", section.name),
            config=getattr(section, "config", None),
            total_tokens=0,
            num_chunks=0,
            chunk_size=preset.tokenize.chunk_tokens,
            eos_token_id=tokenizer.eos_id,
            complete=False,
            documents=0,
            vocab_size=tokenizer.vocab_size,
            vocabulary_sha256=vocabulary,
            tokenizer_sha256=sha,
            writer={"made_from": facts, "cursor": {}, "ended": False},
        )
        folder = folder_of(preset, root, section.name)
        limit = limits_of(preset)[section.name]
        tasks.append(Task(source, folder, _existing(folder, manifest) or manifest, limit))
    return tasks


def _existing(folder: Path, wanted: Manifest) -> Manifest | None:
    """The manifest to go on from; None where there is none."""
    if not (folder / "manifest.json").exists():
        if any(folder.glob("chunk_*.bin")):
            raise UserError(
                f"{folder} holds chunks without a manifest; move them away, or choose another "
                "tokenize.output"
            )
        return None
    try:
        found = read_manifest(folder)
    except BadChunks as error:
        raise UserError(str(error)) from None
    before, now = found.writer.get("made_from"), wanted.writer["made_from"]
    if before is None:
        raise UserError(
            f"{folder} was not written by this job; delete it, or choose another tokenize.output"
        )
    old, new = ({**facts, **facts["source"]} for facts in (before, now))
    # a key that one of them lacks came with a newer version of this program
    changed = [key for key in new if key != "source" and old.get(key, new[key]) != new[key]]
    changed += ["tokenize.chunk_tokens"] if found.chunk_size != wanted.chunk_size else []
    changed += ["the tokenizer"] if found.tokenizer_sha256 != wanted.tokenizer_sha256 else []
    if changed:
        raise UserError(
            f"{folder} was begun with other settings ({', '.join(changed)} changed since).\n"
            f"Delete the folder {folder} to tokenize it anew, or give the preset another "
            '"tokenize.output".'
        )
    return found


# the work -----------------------------------------------------------------------------------------


def _write(
    task: Task,
    preset: TokenizePreset,
    pool: TokenPool,
    view: TokenizeView,
    stop: Callable[[], bool],
) -> None:
    """One source, from where its manifest stands to its end. Raises Interrupted, SourceUnavailable;
    all is saved then."""
    manifest, limit, name = task.manifest, task.limit, task.source.name
    if manifest.complete and (manifest.writer["ended"] or manifest.total_tokens >= limit):
        view.tell(f"{name}: {_told(task)} already; nothing to do")
        return
    if manifest.total_tokens:
        view.tell(f"{name}: goes on after {_told(task)}")
    share, failure = _share(task.source, limit), None
    with _writing(task) as writer:
        with _disk(task):
            writer.save()  # before the first chunk: a folder of chunks always has a manifest
        view.begin(name, writer.tokens)
        cursor, saved, outcome = manifest.writer["cursor"], time.monotonic(), "end"
        length, short = preset.data.min_text_length, [0]
        results = pool.run(_batches(task.source.stream(cursor), length, short), stop)
        try:
            for batch in results:
                kept = len(batch.ends)
                if writer.tokens + len(batch.tokens) >= limit:
                    # up to the document that reaches it
                    kept = int(np.searchsorted(batch.ends, limit - writer.tokens)) + 1
                    outcome = "limit"
                with _disk(task):
                    writer.add(batch.tokens[: batch.ends[kept - 1]])
                    cursor = batch.cursors[kept - 1]
                    if time.monotonic() - saved >= SAVE_SECONDS:
                        writer.save(cursor=cursor)
                        saved = time.monotonic()
                view.update(writer.tokens, writer.documents, share(writer.tokens, cursor))
                if outcome == "end" and stop():
                    outcome = "stopped"
                if outcome != "end":
                    break
            if outcome == "end" and stop():
                outcome = "stopped"
        except SourceUnavailable as error:
            failure, outcome = error, "failed"
        finally:
            results.close()
            view.end()
        with _disk(task):
            writer.save(complete=outcome in ("end", "limit"), cursor=cursor, ended=outcome == "end")
    told = (
        [f"{short[0]:,} of the texts read are {shorter_than(length)} and left out"]
        if short[0]
        else []
    )
    for note in [*task.source.notes, *told]:
        view.tell(f"note  {name}: {note}")
    if failure is not None:
        raise failure
    if outcome == "stopped":
        raise Interrupted(
            f"interrupted after {_told(task)} of {name}; everything is saved, start again to go on"
        )
    view.tell(f"{name}: {_told(task)} in {task.folder}")


def _batches(stream: DocumentStream, min_text_length: int, short: list[int]) -> Iterator[TextBatch]:
    """The texts of a stream, some at a time. Blank ones are passed over, and those too short for
    training, which are counted in `short`."""
    texts, cursors, size = [], [], 0
    try:
        for document in stream:
            if document.messages is not None or document.encoded is not None:
                raise UserError(
                    f"{document.key} is no plain text and cannot be tokenized; take its source "
                    "out of this preset"
                )
            short[0] += document.is_shorter_than(min_text_length)
            if not document.text.strip() or document.is_shorter_than(min_text_length):
                continue
            texts.append(document.text)
            cursors.append(stream.cursor())
            size += len(document.text)
            if size >= BATCH_CHARACTERS or len(texts) >= BATCH_DOCUMENTS:
                yield TextBatch(texts, cursors)
                texts, cursors, size = [], [], 0
    except SourceUnavailable:
        if texts:
            yield TextBatch(texts, cursors)
        raise
    if texts:
        yield TextBatch(texts, cursors)


def _share(source: Source, limit: int) -> Callable[[int, Cursor], float | None]:
    """(tokens, cursor) -> the part of the source that is done; None where its files are too few to
    tell."""
    units = len(shards()) if (shards := getattr(source, "shards", None)) is not None else 0

    def share(tokens: int, cursor: Cursor) -> float | None:
        parts = [cursor.get("unit", 0) / units] if units >= COUNTED_UNITS else []
        parts += [tokens / limit] if limit < NO_LIMIT else []
        return min(1.0, max(parts)) if parts else None

    return share


@contextmanager
def _writing(task: Task) -> Iterator[ChunkWriter]:
    with _disk(task):
        writer = ChunkWriter(task.folder, task.manifest)
    try:
        yield writer
    finally:
        writer.close()


@contextmanager
def _disk(task: Task) -> Iterator[None]:
    """Around everything that writes: a full disk is told, with what is safe."""
    try:
        yield
    except BadChunks as error:
        raise UserError(str(error)) from None
    except OSError as error:
        raise UserError(
            f"{task.folder} cannot be written: {cause(error, task.folder / MANIFEST)} "
            f"{task.manifest.total_tokens:,} tokens of {task.source.name} are safe: start again "
            "to go on."
        ) from None


def _told(task: Task) -> str:
    """ "1,234 tokens, 5 documents" """
    return f"{task.manifest.total_tokens:,} tokens, {task.manifest.documents or 0:,} documents"


def _how_to_use(preset: TokenizePreset, tasks: list[Task]) -> str:
    """The lines for a preset that trains on what was written."""
    output = preset.tokenize.output.rstrip("/")
    sources = ", ".join(
        f'{{"type": "tokens", "path": "{output}/{task.folder.name}"}}' for task in tasks
    )
    return (
        f'"data": {{"sources": [{sources}]}}, "tokenizer": {{"type": "file", "path": '
        f'"{output}/tokenizer.json"}}'
    )
