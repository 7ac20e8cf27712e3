"""A model of this program as lm-evaluation-harness sees one: text in, log-probabilities and text
out.

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
from core.evaluation.harness.scoring import Pair, ReportProgress, Scorer
from core.evaluation.harness.writing import Request, Writer
from core.generation.sampling import SamplingParams

KNOWN = {"until", "do_sample", "temperature", "top_p"}
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""What tasks call the length limit of a text; the first of them that is there counts, as in the
harness."""
DEFAULT_LIMIT = 256
"""The harness's own, where a task names none."""


def as_harness_model(
    scorer: Scorer, writer: Writer, tokenizer: Tokenizer, progress: ReportProgress
) -> Any:
    """Return an instance of lm_eval.api.model.LM, a class of a library without types. `progress` is
    called with how much of what the harness requested is done."""
    template: Any = harness("api.model").TemplateLM
    # answers share their question
    ids_of = lru_cache(maxsize=64)(lambda text: tokenizer.encode_batch([text])[0].tolist())

    class Model(template):
        """Three kinds of requests; everything else is the harness's. A request has `args`."""

        eot_token_id = tokenizer.eos_id

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **_: Any
        ) -> list[int]:
            return ids_of(string)

        def loglikelihood(
            self, requests: list[Any], disable_tqdm: bool = False
        ) -> list[tuple[float, bool]]:
            pairs = [self._pair(*request.args) for request in requests]
            return scorer.loglikelihoods(pairs, progress)

        def loglikelihood_rolling(
            self, requests: list[Any], disable_tqdm: bool = False
        ) -> list[float]:
            texts = [self.tok_encode(request.args[0]) for request in requests]
            first, longest = self.prefix_token_id, scorer.longest
            windows = [_rolling_windows(ids, first, longest) for ids in texts]
            pairs = [pair for text in windows for pair in text]
            scores = iter(scorer.loglikelihoods(pairs, progress))
            return [sum((next(scores)[0] for _ in text), 0.0) for text in windows]

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            prompts = []
            for request in requests:
                prompt, kwargs = request.args
                prompts.append(Request(prompt, sampling_params(kwargs, writer.notes)))
            return writer.write(prompts, progress)

        def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
            pairs = [(context, continuation) for _, context, continuation in requests]
            return scorer.loglikelihoods(pairs, progress)

        def _pair(self, context: str, continuation: str) -> Pair:
            """Return the token ids of both; the context's are never empty."""
            ids: list[int] = []
            if context:
                ids, scored = self._encode_pair(context, continuation)
            else:
                scored = self.tok_encode(continuation)
            # one token spans both: tokenized apart, there is something to score
            if not scored and continuation:
                ids, scored = self.tok_encode(context), self.tok_encode(continuation)
            return ids or [self.prefix_token_id], scored

    return Model()


def _rolling_windows(ids: list[int], first: int, longest: int) -> list[Pair]:
    """Cut a text into the harness's windows, each token scored once. `first`: the token before
    it."""
    utils = harness("utils")
    windows = utils.get_rolling_token_windows(
        token_list=ids, prefix_token=first, max_seq_len=longest, context_len=1
    )
    return [utils.make_disjoint_window(window) for window in windows]


def sampling_params(kwargs: dict[str, Any], notes: list[str]) -> SamplingParams:
    """Return a task's generation_kwargs as sampling parameters. Those that this program does not
    have are named in `notes`. Raises UserError."""
    if unknown := sorted(set(kwargs) - KNOWN - set(LIMITS)):
        note = (
            f"generation_kwargs {', '.join(unknown)} of the task: this program does not have "
            "them, and they are ignored"
        )
        if note not in notes:
            notes.append(note)
    until = kwargs.get("until") or []
    limits = [int(kwargs[name]) for name in LIMITS if kwargs.get(name) is not None]
    limit = limits[0] if limits else DEFAULT_LIMIT
    temperature = float(kwargs.get("temperature") or 0.0)
    if limit < 1 or temperature < 0:
        raise UserError(
            f"generation_kwargs of the task: {kwargs}: a positive limit of tokens and a "
            "temperature from 0 up, please"
        )
    if not kwargs.get("do_sample", temperature > 0):
        temperature = 0.0
    elif kwargs.get("temperature") is None:
        temperature = 1.0
    return SamplingParams(
        until=(until,) if isinstance(until, str) else tuple(until),
        max_tokens=limit,
        temperature=temperature,
        top_p=float(kwargs.get("top_p") or 1.0),
    )
