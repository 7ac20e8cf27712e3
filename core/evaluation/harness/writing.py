"""Continuations of many prompts at once, for tasks: which go together, and how they fit into the
model's context.

In:    a generator; prompts, each with what ends it and how it is drawn
Out:   the text after each prompt, without what ended it
State: none; a draw depends on the seed, the prompt and how often it was asked before, never on its
batch

The writing itself is core/generation/engine.py's. Prompts of similar length go together: a batch
begins with its shortest."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from core.evaluation.harness.scoring import Told
from core.generation.engine import GenerationRow, TextGenerator, advance
from core.generation.sampling import SamplingParams
from core.randomness import derive_seed


@dataclass(frozen=True)
class Writer:
    """Writes with a model in evaluation mode."""

    generator: TextGenerator
    batch_size: int
    dtype: torch.dtype = torch.float32
    seed: int = 0
    notes: list[str] = field(default_factory=list)

    def write(
        self, asked: list[tuple[str, SamplingParams]], told: Told = lambda done, total: None
    ) -> list[str]:
        """The text after each prompt, in the order they came."""
        texts, done = [""] * len(asked), 0
        device = next(self.generator.model.parameters()).device  # type: ignore[attr-defined]
        for batch in self._batches(asked):
            with torch.autocast(device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
                for _ in advance(self.generator, list(batch.values())):
                    told(done, len(asked))
            for number, row in batch.items():
                texts[number] = row.text
            done += len(batch)
            told(done, len(asked))
        return texts

    def _batches(
        self, asked: list[tuple[str, SamplingParams]]
    ) -> Iterator[dict[int, GenerationRow]]:
        """Rows by their place in what was asked; longest prompts first."""
        before: Counter[str] = Counter()
        rows, tokenizer = {}, self.generator.tokenizer
        encoded = tokenizer.encode_batch([prompt for prompt, _ in asked])
        for number, ((prompt, params), ids) in enumerate(zip(asked, encoded)):
            params, kept = self._fitted(params, ids.tolist() or [tokenizer.eos_id])
            digest = hashlib.sha256(prompt.encode("utf-8", "replace")).hexdigest()
            rows[number] = GenerationRow(
                tokenizer, kept, params, derive_seed(self.seed, "harness", digest, before[prompt])
            )
            before[prompt] += 1
        longest_first = sorted(rows, key=lambda number: len(rows[number].ids), reverse=True)
        for i in range(0, len(rows), self.batch_size):
            yield {number: rows[number] for number in longest_first[i : i + self.batch_size]}

    def _fitted(self, params: SamplingParams, ids: list[int]) -> tuple[SamplingParams, list[int]]:
        """So that both fit into the context. The prompt loses its beginning, but it keeps half of
        the context if it needs it."""
        context = self.generator.context
        kept = ids[-max(context - params.max_tokens, min(len(ids), context // 2)) :]
        limit = min(params.max_tokens, context - len(kept))
        note = (
            f"the model sees {context:,} tokens: texts of up to {params.max_tokens:,} tokens "
            "end earlier here"
        )
        if limit < params.max_tokens and note not in self.notes:
            self.notes.append(note)
        return replace(params, max_tokens=limit), kept
