"""One source's texts to a folder of token chunks, and on from where an earlier process stopped.

In:    an opened source, its folder and manifest, a TokenPool
Out:   the folder's chunks (token_files.py); what is shown goes to a TokenizeProgress
State: the manifest holds the source's cursor: after a kill, the next start goes on there, and the
       files come out the same
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from core.data.documents import Cursor, DocumentStream, Source, shorter_than
from core.data.token_files import MANIFEST, BadChunks, ChunkWriter, Manifest
from core.data.token_pool import TextBatch, TokenPool
from core.errors import Interrupted, SourceUnavailable, UserError
from core.files import cause

SAVE_SECONDS = 5.0
"""How much work a kill may cost."""

BATCH_CHARACTERS = 250_000
BATCH_DOCUMENTS = 1024

COUNTED_UNITS = 20
"""A source of fewer files than this shows no share done: they may differ much in length."""

NO_LIMIT = 1 << 62


class TokenizeProgress(Protocol):
    """Shows how far a source is."""

    def tell(self, line: str) -> None:
        """Show a line that stays."""

    def begin(self, name: str, tokens: int) -> None:
        """Begin a source, of which an earlier process wrote `tokens`."""

    def update(self, tokens: int, documents: int, fraction: float | None) -> None:
        """Show what is written, and the part of the source that is done, if known."""

    def end(self) -> None:
        """End the source."""


@dataclass
class TokenizeTask:
    """One source and its folder."""

    source: Source
    folder: Path
    manifest: Manifest
    limit: int  # tokens
    min_text_length: int  # characters
    short_texts: int = 0  # left out because they are shorter

    @property
    def amount(self) -> str:
        """Return what is written so far: "1,234 tokens, 5 documents"."""
        return f"{self.manifest.total_tokens:,} tokens, {self.manifest.documents or 0:,} documents"

    def run(self, pool: TokenPool, progress: TokenizeProgress, stop: Callable[[], bool]) -> None:
        """Write the source, from where its manifest stands to its end.

        Raises Interrupted, SourceUnavailable, UserError; everything is saved then.
        """
        manifest, name = self.manifest, self.source.name
        if manifest.complete and (manifest.writer["ended"] or manifest.total_tokens >= self.limit):
            progress.tell(f"{name}: {self.amount} already; nothing to do")
            return
        if manifest.total_tokens:
            progress.tell(f"{name}: goes on after {self.amount}")
        with self._writer() as writer:
            with self._disk():
                writer.save()  # before the first chunk: a folder of chunks always has a manifest
            outcome = self._write(writer, pool, progress, stop)
        notes = list(self.source.notes)
        if self.short_texts:
            short = shorter_than(self.min_text_length)
            notes.append(f"{self.short_texts:,} of the texts read are {short} and left out")
        for note in notes:
            progress.tell(f"note  {name}: {note}")
        if isinstance(outcome, SourceUnavailable):
            raise outcome
        if outcome == "stopped":
            raise Interrupted(
                f"interrupted after {self.amount} of {name}; everything is saved, start again to "
                "go on"
            )
        progress.tell(f"{name}: {self.amount} in {self.folder}")

    def _write(
        self,
        writer: ChunkWriter,
        pool: TokenPool,
        progress: TokenizeProgress,
        stop: Callable[[], bool],
    ) -> str | SourceUnavailable:
        """Write batch after batch, and save; return why it ended: "end", "limit", "stopped", or
        the source's failure."""
        progress.begin(self.source.name, writer.tokens)
        cursor, saved = self.manifest.writer["cursor"], time.monotonic()
        outcome: str | SourceUnavailable = "end"
        results = pool.run(_batches(self.source.stream(cursor), self), stop)
        try:
            for batch in results:
                kept = len(batch.ends)
                if writer.tokens + len(batch.tokens) >= self.limit:
                    # up to the document that reaches it
                    kept = int(np.searchsorted(batch.ends, self.limit - writer.tokens)) + 1
                    outcome = "limit"
                with self._disk():
                    writer.add(batch.tokens[: batch.ends[kept - 1]])
                    cursor = batch.cursors[kept - 1]
                    if time.monotonic() - saved >= SAVE_SECONDS:
                        writer.save(cursor=cursor)
                        saved = time.monotonic()
                share = self._share_done(writer.tokens, cursor)
                progress.update(writer.tokens, writer.documents, share)
                if outcome == "limit" or stop():
                    break
            if outcome == "end" and stop():
                outcome = "stopped"
        except SourceUnavailable as error:
            outcome = error
        finally:
            results.close()
            progress.end()
        with self._disk():
            complete = outcome in ("end", "limit")
            writer.save(complete=complete, cursor=cursor, ended=outcome == "end")
        return outcome

    def _share_done(self, tokens: int, cursor: Cursor) -> float | None:
        """Return the part of the source that is done; None where its files are too few to tell."""
        units = len(shards()) if (shards := getattr(self.source, "shards", None)) is not None else 0
        parts = [cursor.get("unit", 0) / units] if units >= COUNTED_UNITS else []
        parts += [tokens / self.limit] if self.limit < NO_LIMIT else []
        return min(1.0, max(parts)) if parts else None

    @contextmanager
    def _writer(self) -> Iterator[ChunkWriter]:
        with self._disk():
            writer = ChunkWriter(self.folder, self.manifest)
        try:
            yield writer
        finally:
            writer.close()

    @contextmanager
    def _disk(self) -> Iterator[None]:
        """Surround everything that writes: a full disk becomes a UserError that says what is
        safe."""
        try:
            yield
        except BadChunks as error:
            raise UserError(str(error)) from None
        except OSError as error:
            raise UserError(
                f"{self.folder} cannot be written: {cause(error, self.folder / MANIFEST)} "
                f"{self.manifest.total_tokens:,} tokens of {self.source.name} are safe: start "
                "again to go on."
            ) from None


def _batches(stream: DocumentStream, task: TokenizeTask) -> Iterator[TextBatch]:
    """Yield the texts of a stream, some at a time. Pass over blank ones, and those too short for
    training, which the task counts."""
    texts, cursors, size = list[str](), list[Cursor](), 0
    try:
        for document in stream:
            if document.messages is not None or document.encoded is not None:
                raise UserError(
                    f"{document.key} is no plain text and cannot be tokenized; take its source "
                    "out of this preset"
                )
            short = document.is_shorter_than(task.min_text_length)
            task.short_texts += short
            if short or not document.text.strip():
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
