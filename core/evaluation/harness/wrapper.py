"""A model of ours as lm-evaluation-harness sees one: text in, log-probabilities and text out.

In:    a Scorer, a Writer, a tokenizer; the harness's requests
Out:   what its class LM promises
State: none

Contexts and continuations become tokens by the harness's own rule (TemplateLM._encode_pair: white
space at the end of a context belongs to the continuation, and both are tokenized together). Nothing
stands before a context. An empty one is the end-of-document token, which every document of training
followed."""

from functools import lru_cache
from typing import Any

from core.data.tokenizer import Tokenizer
from core.errors import UserError
from core.evaluation.harness.library import harness
from core.evaluation.harness.scoring import Pair, Scorer, Told
from core.evaluation.harness.writing import Writer
from core.generation.sampling import SamplingParams

KNOWN = {"until", "do_sample", "temperature", "top_p"}
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""What tasks call the longest text they want; the first of them that is there counts, as in the
harness."""
USUAL_LIMIT = 256
"""The harness's own, where a task names none."""


def as_harness_model(scorer: Scorer, writer: Writer, tokenizer: Tokenizer, told: Told) -> Any:
    """An instance of lm_eval.api.model.LM. `told` is called with how much of what the harness asked
    for is done."""
    utils = harness("utils")
    # answers share their question
    ids_of = lru_cache(maxsize=64)(lambda text: tokenizer.encode_batch([text])[0].tolist())

    class Model(harness("api.model").TemplateLM):
        """Three kinds of requests; everything else is the harness's."""

        eot_token_id = tokenizer.eos_id

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **_: Any
        ) -> list[int]:
            return ids_of(string)

        def loglikelihood(
            self, requests: list[Any], disable_tqdm: bool = False
        ) -> list[tuple[float, bool]]:
            return scorer.loglikelihoods([self._pair(*request.args) for request in requests], told)

        def loglikelihood_rolling(
            self, requests: list[Any], disable_tqdm: bool = False
        ) -> list[float]:
            windows: list[Pair] = []
            counts = []
            for request in requests:
                rolling = utils.get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=scorer.longest,
                    context_len=1,
                )
                own = [utils.make_disjoint_window(window) for window in rolling]
                windows += own
                counts.append(len(own))
            found = iter(scorer.loglikelihoods(windows, told))
            return [sum((next(found)[0] for _ in range(count)), 0.0) for count in counts]

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            return writer.write(
                [
                    (request.args[0], sampling_params(request.args[1], writer.notes))
                    for request in requests
                ],
                told,
            )

        def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
            return scorer.loglikelihoods(
                [(context, continuation) for _, context, continuation in requests], told
            )

        def _pair(self, context: str, continuation: str) -> Pair:
            """Token ids; the context's are never none."""
            ids, scored = (
                self._encode_pair(context, continuation)
                if context
                else ([], self.tok_encode(continuation))
            )
            # one token spans both: tokenized apart, there is something to score
            if not scored and continuation:
                ids, scored = self.tok_encode(context), self.tok_encode(continuation)
            return ids or [self.prefix_token_id], scored

    return Model()


def sampling_params(kwargs: dict[str, Any], notes: list[str]) -> SamplingParams:
    """A task's generation_kwargs as we understand them. What this program does not have is told in
    `notes`."""
    if unknown := sorted(set(kwargs) - KNOWN - set(LIMITS)):
        note = (
            f"generation_kwargs {', '.join(unknown)} of the task: this program does not have "
            "them, and they are ignored"
        )
        notes.append(note) if note not in notes else None
    until = kwargs.get("until") or []
    until = [until] if isinstance(until, str) else until
    limit = next(
        (int(kwargs[name]) for name in LIMITS if kwargs.get(name) is not None), USUAL_LIMIT
    )
    temperature = float(kwargs.get("temperature") or 0.0)
    if limit < 1 or temperature < 0:
        raise UserError(
            f"generation_kwargs of the task: {kwargs}: a positive limit of tokens and a "
            "temperature from 0 up, please"
        )
    sampled = kwargs.get("do_sample", temperature > 0)
    if not sampled:
        temperature = 0.0
    elif kwargs.get("temperature") is None:
        temperature = 1.0
    return SamplingParams(tuple(until), limit, temperature, float(kwargs.get("top_p") or 1.0))
