"""Quality on held-out documents: cross-entropy, perplexity, bits per byte, token accuracy.

In:    a model, the loss stack, held-out rows (made when first asked for)
Out:   a dict of numbers, the same on every rank and for any batch size
State: the rows
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

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

    def run(self, model: LanguageModel, progress: float) -> dict[str, Any] | None:
        """The numbers of an `eval` event; None when nothing is held out. Every rank must call it."""
        if self._batches is None:
            rows = self._make_rows()[self._parallel.rank :: self._parallel.world_size]
            self._batches = [collate(rows[i : i + self._batch_rows], packed=True) for i in range(0, len(rows), self._batch_rows)]
        names = [loss.name for loss in self._stack.losses]
        sums = torch.zeros(4 + len(names), dtype=torch.float64)
        was_training = model.training  # type: ignore[attr-defined]
        model.eval()  # type: ignore[attr-defined]
        for batch in self._batches:
            sums += self._measure(model, batch, progress)
        model.train(was_training)  # type: ignore[attr-defined]
        count, nats, correct, num_bytes, *losses = self._parallel.sum(sums.tolist())
        if count == 0:
            return None
        cross_entropy = nats / count  # the token-weighted mean; perplexity is its exponential, never a mean of exponentials
        return {
            "cross_entropy": cross_entropy,
            "perplexity": math.exp(min(cross_entropy, 700.0)),
            "bits_per_byte": nats / math.log(2) / max(num_bytes, 1),
            "token_accuracy": correct / count,
            "losses": {name: value / count for name, value in zip(names, losses)},
            "eval_tokens": int(count),
        }

    @torch.no_grad()
    def _measure(self, model: LanguageModel, batch: Batch, progress: float) -> torch.Tensor:
        """[targets, nats, correct, bytes, *losses] of one batch, float64."""
        targets = batch.labels[batch.labels >= 0]
        num_bytes = int(self._token_bytes[targets].sum())
        moved = batch.to(self._device)
        with torch.autocast(self._device.type, dtype=self._dtype, enabled=self._dtype != torch.float32):
            measures = self._stack.measure(model(moved), moved, progress, num_sources=1 + int(batch.source_ids.max()))
        nats = measures.cross_entropy if measures.cross_entropy is not None else torch.tensor(math.nan)
        numbers = [measures.terms.count, nats, measures.correct, *measures.terms.sums.values()]
        count, nats, correct, *losses = torch.stack([number.double() for number in numbers]).cpu()
        return torch.stack([count, nats, correct, torch.tensor(float(num_bytes), dtype=torch.float64), *losses])
