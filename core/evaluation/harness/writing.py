"""Text after many prompts at once, for tasks: batches of prompts, fitted into the model's context.

In:    a TextGenerator; prompts, each with its sampling parameters
Out:   the text after each prompt, without what ended it
State: none; a draw depends on the seed, the prompt and how often it was requested before, never on
       its batch

core/generation/engine.py generates the text. Prompts of similar length go together: a batch begins
with its shortest."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from core.evaluation.harness.scoring import ReportProgress
from core.generation.engine import GenerationRow, TextGenerator, advance
from core.generation.sampling import SamplingParams
from core.randomness import derive_seed


class Request(NamedTuple):
    """A prompt, and how the text after it is drawn."""

    prompt: str
    params: SamplingParams


@dataclass(frozen=True)
class Writer:
    """Writes with a model in evaluation mode. `notes` are for the report."""

    generator: TextGenerator
    batch_size: int
    dtype: torch.dtype = torch.float32
    seed: int = 0
    notes: list[str] = field(default_factory=list)

    def write(
        self, requests: list[Request], progress: ReportProgress = lambda done, total: None
    ) -> list[str]:
        """Return the text after each prompt, in the order of the requests."""
        texts, done = [""] * len(requests), 0
        device, low = self.generator.device, self.dtype != torch.float32
        for batch in self._batches(requests):
            with torch.autocast(device.type, dtype=self.dtype, enabled=low):
                for _ in advance(self.generator, list(batch.values())):
                    progress(done, len(requests))
            for number, row in batch.items():
                texts[number] = row.text
            done += len(batch)
            progress(done, len(requests))
        return texts

    def _batches(self, requests: list[Request]) -> Iterator[dict[int, GenerationRow]]:
        """Yield rows by the number of their request, longest prompts first."""
        before: Counter[str] = Counter()
        rows, tokenizer = {}, self.generator.tokenizer
        encoded = tokenizer.encode_batch([prompt for prompt, _ in requests])
        for number, ((prompt, params), ids) in enumerate(zip(requests, encoded)):
            params, kept = self._fitted(params, ids.tolist() or [tokenizer.eos_id])
            digest = hashlib.sha256(prompt.encode("utf-8", "replace")).hexdigest()
            seed = derive_seed(self.seed, "harness", digest, before[prompt])
            rows[number] = GenerationRow(tokenizer, kept, params, seed)
            before[prompt] += 1
        longest_first = sorted(rows, key=lambda number: len(rows[number].ids), reverse=True)
        for i in range(0, len(rows), self.batch_size):
            yield {number: rows[number] for number in longest_first[i : i + self.batch_size]}

    def _fitted(self, params: SamplingParams, ids: list[int]) -> tuple[SamplingParams, list[int]]:
        """Return parameters and prompt such that both fit into the context. The prompt loses its
        beginning, but it keeps half of the context if it needs it."""
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
