"""Tokenized chunks, as the tokenize job and specification 001's own program write them.

In:    a folder with a manifest and chunks (core/data/token_files.py)
Out:   one Document of tokens between two end-of-document tokens; chunks in an order permuted by
       seed and epoch
State: none of its own (shards.py); a position inside a chunk is the token after a document's end
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from core.data.documents import Document, Encoded, digest_of
from core.data.sources.files import FileSource, Unit
from core.data.sources.skips import Damaged
from core.data.sources.text import named_by, path_name
from core.data.token_files import MANIFEST, BadChunks, ChunkReader, DamagedChunk
from core.errors import SourceUnavailable, UserError
from core.files import own_path
from core.preset.settings import SourceSettings


class TokensSettings(SourceSettings):
    type: Literal["tokens"] = "tokens"
    """Tokens on disk, as the tokenize job writes them."""
    path: str = Field(min_length=1)
    """Folder that holds manifest.json and the chunks, relative to the project."""
    seed: int | None = None
    """Seed of the order of chunks alone (specification 001: 42, 43, 44); left out, it follows from
    the run's."""
    name: str = ""
    """Name in logs and weights; left out, the folder's."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, data: Any) -> Any:
        return named_by(data, lambda d: path_name(d.get("path")))


class TokensSource(FileSource):
    """A folder of chunks. Its units are chunks."""

    window = 1 << 20  # tokens

    def __init__(self, settings: TokensSettings, root: Path, seed: int):
        super().__init__(settings.name, seed if settings.seed is None else settings.seed)
        self._folder = own_path(settings.path, root)
        self._given_order = settings.seed is not None
        self._chunks: ChunkReader | None = None
        self._index: dict[str, int] = {}

    def list_units(self) -> list[Unit]:
        try:
            self._chunks = ChunkReader(self._folder)
        except BadChunks as error:
            raise SourceUnavailable(
                str(error) if (self._folder / MANIFEST).exists() else self._missing()
            ) from None
        self._index = {
            chunk.file: index for index, chunk in enumerate(self._chunks.manifest.chunks)
        }
        if not self._index:
            raise SourceUnavailable(
                f"{self._folder} holds no token yet: let the tokenize job go on until it does"
            )
        return [Unit(self._folder / name, name) for name in self._index]

    def order(self, epoch: int) -> list[Unit]:
        if epoch or not self._given_order:
            return super().order(epoch)
        units = list(self.shards())
        random.Random(self.seed).shuffle(units)  # exactly as specification 001's program does
        return units

    def read(self, unit: Unit, start: int) -> Iterator[tuple[int, Document]]:
        assert self._chunks is not None, "units are listed before one is read"
        try:
            for after, begin, ids in self._chunks.documents(self._index[unit.label], start):
                encoded = Encoded(ids, None, digest_of(ids.astype("<i4", copy=False).tobytes()), 0)
                yield after, Document("", f"{unit.label}#{begin}", encoded=encoded)
        except DamagedChunk:
            raise Damaged("damaged") from None

    def contents(self) -> str:
        self.shards()
        assert self._chunks is not None
        # checkpoints hold this digest: its text may never change, whatever the class is called
        facts = ", ".join(
            f"Chunk(file={each.file!r}, tokens={each.tokens!r}, documents={each.documents!r}, "
            f"sha256={each.sha256!r})"
            for each in self._chunks.manifest.chunks
        )
        return digest_of(f"[{facts}]".encode()).to_bytes(8, "big").hex()

    def nothing(self, order: list[Unit]) -> str:
        return f"no document in {self._folder}" + "".join(f"; {note}" for note in self.notes)

    @property
    def notes(self) -> list[str]:
        return [*(self._chunks.notes if self._chunks is not None else []), *super().notes]

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Raise UserError unless the tokens mean the same to this tokenizer as to the one that made
        them."""
        assert self._chunks is not None, "a source is opened before it is used"
        made = self._chunks.manifest
        size = made.vocab_size or 0
        if tokenizer.eos_id != made.eos_token_id:
            problem = (
                f"a document ends with token {made.eos_token_id} there, with "
                f"{tokenizer.eos_id} here"
            )
        elif tokenizer.vocab_size < size:
            problem = f"it had {size:,} tokens, this one has {tokenizer.vocab_size:,}"
        elif made.vocabulary_sha256 not in (None, tokenizer.vocabulary_sha256(size)):
            problem = "its tokens have other ids"
        else:
            return
        beside = self._folder.parent / "tokenizer.json"
        hint = (
            f'write "tokenizer": {{"type": "file", "path": "{beside}"}}'
            if beside.exists()
            else "name that one in the preset"
        )
        raise UserError(
            f"source {self.name} was made with another tokenizer than this run's: "
            f"{problem}.\nEither {hint}, or tokenize anew; "
            "a lineage that was trained with the other tokenizer keeps it: give this preset a "
            '"lineage" of its own.'
        )

    def _missing(self) -> str:
        return (
            f'{self._folder} holds no {MANIFEST}: make it first, by running a preset with "job": '
            '"tokenize" that writes there '
            '(91_tokenize_local writes ./data/tokens/python_stdlib), or correct the "path" of '
            "this source"
        )
