"""The `tokenize` job: every source of a preset to a folder of token chunks, and the tokenizer
beside them.

In:    a preset: its sources, its tokenizer, its section `tokenize`
Out:   <output>/<source>/manifest.json and chunk_*.bin (core/data/token_files.py),
       <output>/tokenizer.json
State: each manifest holds the source's cursor: after a stop or a kill, the next start goes on
       there, and the files come out the same
"""

import hashlib
import re
from pathlib import Path, PurePath
from typing import Annotated, TextIO

from pydantic import AfterValidator, Field

from core.data.corpus import Corpus, open_corpus
from core.data.token_files import BadChunks, Manifest, read_manifest
from core.data.token_pool import TokenPool, usable_cores
from core.data.tokenize_source import NO_LIMIT, TokenizeTask
from core.data.tokenizer import Tokenizer
from core.data.tokenizer_build import (
    SAMPLE_CHARACTERS,
    build_tokenizer,
    read_tokenizer,
    tokenizer_facts,
)
from core.errors import NoData, SourceUnavailable, UserError
from core.file_names import file_name, is_file_name
from core.files import cause, own_path
from core.parallel.protocol import Parallel
from core.parallel.single import Single
from core.preset.base import PresetBase
from core.preset.settings import Settings
from core.runtime import Runtime
from core.signals import StopRequest
from core.ui.tokenize import TokenizeView

THREADS_SUFFICE = 2
"""Cores up to which the tokenizers library's own threads are used, not processes. On two, both
reach 2.0M tokens/s, and threads need no half second to start. On more, turning ids into arrays
would set their pace: 0.12 s of Python for each million tokens."""

MOST_PROCESSES = 32
"""One process reads for all of them: 0.03 s for each million tokens."""

NO_TEXT = {"chat": "which tokens of it are learned would be lost", "tokens": "it is tokens already"}


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
    parallel: Parallel,
    root: Path,
    started: float,
    console: TextIO,
) -> None:
    """Write every source, one after the other. Raises Interrupted after Ctrl-C, SIGTERM or SIGHUP,
    with everything saved."""
    if parallel.rank != 0:  # one process does it all; its own helpers are no ranks
        return
    with TokenizeView(console) as view, StopRequest() as stop:
        _refuse(preset, root)
        corpus = open_corpus(preset, root, Single())
        failed = dict(corpus.failed)
        for name, reason in failed.items():
            view.tell(f"warning  source {name} left out, the others go on: {reason}")
        tokenizer = _tokenizer(preset, corpus, root, view)
        notes, warnings = corpus.tokenizer_remarks(tokenizer)
        for note in notes:
            view.tell(f"note  {note}")
        for warning in warnings:
            view.tell(f"warning  {warning}")
        tasks = _tasks(preset, corpus, tokenizer, root)
        with TokenPool(tokenizer, _num_workers(preset.tokenize)) as pool:
            for task in tasks:
                try:
                    task.run(pool, view, stop)
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


def _num_workers(settings: TokenizeSettings) -> int:
    """Return how many processes tokenize; 0: the threads of this one."""
    if settings.workers is not None:
        return settings.workers
    cores = usable_cores()
    return 0 if cores <= THREADS_SUFFICE else min(cores, MOST_PROCESSES)


def token_files(preset: TokenizePreset, root: Path) -> list[Path]:
    """Return the chunks that are there."""
    return list(folder_of(preset, root).glob("*/*.bin"))


def preview_tokenize(preset: TokenizePreset, root: Path) -> list[str]:
    """Return the lines that the menu shows of this job."""
    wanted, kind = preset.tokenize, preset.tokenizer
    what = {
        "bpe": f"a BPE of {kind.vocab_size:,} tokens trained on them",
        "byte": "bytes",
        "hub": str(kind.name),
    }
    limit = ""
    if isinstance(wanted.max_tokens, int):
        limit = f", at most {wanted.max_tokens:,} of a source"
    elif wanted.max_tokens is not None:
        each = [f"{tokens:,} of {name}" for name, tokens in limits_of(preset).items()]
        limit = f", at most {', '.join(each)}"
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
    """Return {source: tokens after which it is left}."""
    limits, sources = preset.tokenize.max_tokens or NO_LIMIT, preset.data.sources
    return dict(
        zip(
            [source.name for source in sources],
            limits if isinstance(limits, list) else [limits] * len(sources),
        )
    )


def folder_of(preset: TokenizePreset, root: Path, source: str = "") -> Path:
    """Return the output folder, or a source's folder in it."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", source).lstrip(".")
    name = plain if is_file_name(plain) and source.isascii() else file_name(source)
    return own_path(preset.tokenize.output, root) / (name if source else "")


# before anything is written -----------------------------------------------------------------------


def _refuse(preset: TokenizePreset, root: Path) -> None:
    """Raise UserError for what cannot be tokenized."""
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
    """Return the tokenizer in the output folder, if this preset made it; else make one, and write
    it there."""
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


def _tasks(
    preset: TokenizePreset, corpus: Corpus, tokenizer: Tokenizer, root: Path
) -> list[TokenizeTask]:
    """Return a task for each source. Raises UserError when a folder holds something else than this
    preset would write."""
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
        at = _existing(folder, manifest) or manifest
        tasks.append(TokenizeTask(source, folder, at, limit, preset.data.min_text_length))
    return tasks


def _existing(folder: Path, wanted: Manifest) -> Manifest | None:
    """Return the manifest to go on from; None where there is none."""
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


def _how_to_use(preset: TokenizePreset, tasks: list[TokenizeTask]) -> str:
    """Return the lines of a preset that trains on what was written."""
    output = preset.tokenize.output.rstrip("/")
    sources = ", ".join(
        f'{{"type": "tokens", "path": "{output}/{task.folder.name}"}}' for task in tasks
    )
    return (
        f'"data": {{"sources": [{sources}]}}, "tokenizer": {{"type": "file", "path": '
        f'"{output}/tokenizer.json"}}'
    )
