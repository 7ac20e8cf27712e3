"""Quality on held-out documents: cross-entropy, perplexity, bits per byte, token accuracy, how sharp and how well aimed the
predictions are, and whether the embedding table collapses.

In:    a model, the loss stack, held-out rows (made when first asked for)
Out:   a dict of numbers, the same on every rank and for any batch size
State: the rows
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from core.contracts import Batch, LanguageModel
from core.data.loader import collate
from core.data.packing import Row
from core.losses.stack import LossStack


class Evaluator:
    """Evaluates a model on the same rows each time.

    make_rows     -> held-out rows; called once, at the first evaluation
    token_bytes   (V,) bytes each token stands for: bits per byte can be compared between tokenizers, loss per token cannot
    """

    def __init__(
        self,
        make_rows: Callable[[], list[Row]],
        stack: LossStack,
        token_bytes: np.ndarray,
        batch_rows: int,
        parallel: Any,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self._make_rows, self._stack, self._batch_rows = make_rows, stack, batch_rows
        self._token_bytes = torch.from_numpy(token_bytes)
        self._parallel, self._device, self._dtype = parallel, device, dtype
        self._batches: list[Batch] | None = None

    def run(
        self, model: LanguageModel, progress: float, told: Callable[[int, int], None] = lambda done, total: None
    ) -> dict[str, Any] | None:
        """The numbers of an `eval` event; None when nothing is held out. Every rank must call it.

        told   called with how many of how many batches are done; may raise, to stop
        """
        if self._batches is None:
            rows = self._make_rows()[self._parallel.rank :: self._parallel.world_size]
            self._batches = [collate(rows[i : i + self._batch_rows], packed=True) for i in range(0, len(rows), self._batch_rows)]
        sums: dict[str, float] = {}
        table_cosine = None
        was_training = model.training  # type: ignore[attr-defined]
        model.eval()  # type: ignore[attr-defined]
        for done, batch in enumerate(self._batches, 1):
            found, table = self._measure(model, batch, progress)
            sums = {name: sums.get(name, 0.0) + value for name, value in found.items()}
            table_cosine = mean_pairwise_cosine(table) if table_cosine is None else table_cosine
            told(done, len(self._batches))
        model.train(was_training)  # type: ignore[attr-defined]
        everyones = self._parallel.gather((sums, table_cosine))  # a rank may have had no rows
        totals = {name: sum(sums.get(name, 0.0) for sums, _ in everyones) for sums, _ in everyones for name in sums}
        if not (count := totals.pop("count", 0.0)):
            return None
        num_bytes = max(totals.pop("bytes"), 1.0)
        means = {name: value / count for name, value in totals.items()}
        cross_entropy = means.pop("cross_entropy", None)
        numbers: dict[str, Any] = {}
        if cross_entropy is not None:
            # the token-weighted mean; perplexity is its exponential, never a mean of exponentials
            numbers["cross_entropy"] = cross_entropy
            numbers["perplexity"] = math.exp(min(cross_entropy, 700.0))
            numbers["bits_per_byte"] = cross_entropy * count / math.log(2) / num_bytes
        of_losses = {loss.name: means.pop(f"losses/{loss.name}") for loss in self._stack.losses}
        return {
            **numbers,
            **means,
            "table_cosine": next(cosine for _, cosine in everyones if cosine is not None),
            "losses": of_losses,
            "causal": model.is_causal,
            "eval_tokens": int(count),
        }

    @torch.no_grad()
    def _measure(self, model: LanguageModel, batch: Batch, progress: float) -> tuple[dict[str, float], Tensor]:
        """Sums over the targets of one batch; the embedding table."""
        targets = batch.labels[batch.labels >= 0]
        moved = batch.to(self._device)
        with torch.autocast(self._device.type, dtype=self._dtype, enabled=self._dtype != torch.float32):
            output = model(moved)
            measures = self._stack.measure(output, moved, progress, num_sources=1 + int(batch.source_ids.max()))
        sums = {"count": measures.terms.count, **measures.of_logits, "token_accuracy": measures.correct}
        sums |= {f"losses/{name}": value for name, value in measures.terms.sums.items()}
        numbers = torch.stack([value.double() for value in sums.values()]).tolist()
        return {**dict(zip(sums, numbers)), "bytes": float(self._token_bytes[targets].sum())}, output.readout.table


@torch.no_grad()
def mean_pairwise_cosine(table: Tensor) -> float:
    """The mean cosine between two different rows of an embedding table (V, D): 1 when it has collapsed to one direction."""
    unit = F.normalize(table.float(), dim=1)
    total = unit.sum(dim=0, dtype=torch.float64)  # (D,) of it: every pair, and every row with itself
    itself = unit.square().sum(dtype=torch.float64)
    return float((total.square().sum() - itself) / max(len(table) * (len(table) - 1), 1))
