"""A causal language model of the transformers library as trunk and readout.

In:    a transformers model, from a config or a class; a Batch
Out:   ModelOutput(hidden (B, T, D), LinearReadout)
State: the transformers model's parameters and buffers, under their published names

B batch, T time, D hidden_size, V rows of the readout's table, n documents of a batch
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from core.contracts import Batch, LanguageModel, ModelOutput
from core.errors import MissingPackage
from core.models.attention import document_starts
from core.models.readout import LinearReadout

PROBE_TOKENS = 12
"""Length of the row on which an unknown architecture is tried out."""


def transformers() -> Any:
    """The library, quiet. Imported where it is used: it takes seconds."""
    try:
        import transformers
    except ImportError:
        raise MissingPackage(
            "models of type gpt2 and hub need the package transformers: pip install transformers"
        ) from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def configure(config: Any, dropout: float) -> Any:
    """The config with every dropout set (GPT-2's silently brings 0.1), but no layers dropped; and
    without a cache of keys and values, which has no place in training and keeps the library from
    looking for packed documents."""
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        part.use_cache = False
        for key, value in list(vars(part).items()):
            if "drop" in key and isinstance(value, int | float) and not isinstance(value, bool):
                setattr(part, key, 0.0 if key.endswith("layerdrop") else dropout)
    return config


class HuggingFaceLM(LanguageModel):
    """The trunk of a transformers causal LM, and a readout that shows its head. Labels never reach
    the library's code.

    The library's module itself is not kept: its children are registered here, under their own
    names."""

    is_causal = True

    def __init__(self, model: nn.Module):
        """`model`: one whose `obstacle` is None."""
        super().__init__()
        for name, child in model.named_children():
            self.add_module(name, child)
        for name, p in model.named_parameters(recurse=False):
            self.register_parameter(name, p)
        for name, buffer in model.named_buffers(recurse=False):
            self.register_buffer(
                name, buffer, persistent=name not in model._non_persistent_buffers_set
            )
        self._trunk, self._head, self._embedding = (
            _name_of(part, model) for part in parts_of(model)
        )
        self.vocab_size = min(len(self._readout().weight), len(self._readout().table))
        # whether the trunk itself keeps packed documents apart; see `tell_how_to_pack`
        self.packs = True
        # whether the library's cache gives what the whole text does; not tried yet: None
        self._extends: bool | None = None
        self._cuts = False  # whether it does so after it was cut, too

    def forward(self, batch: Batch) -> ModelOutput:
        """Hidden states of every position; nothing passes from one document to another."""
        trunk = self.get_submodule(self._trunk)
        if not batch.packed:
            hidden = run_trunk(trunk, batch.input_ids)
        elif self.packs:
            # positions that start again are where the library begins another document, in every
            # kind of mask
            hidden = run_trunk(trunk, batch.input_ids, batch.position_ids)
        else:
            hidden = _one_by_one(trunk, batch)
        return ModelOutput(hidden, self._readout())

    @property
    def config(self) -> Any:
        """The library's config of the architecture."""
        return self.get_submodule(self._trunk).config

    def new_cache(self) -> "LibraryCache | None":
        """The library's cache of keys and values; None where pieces of a text do not give what the
        whole does."""
        if self._extends is None:
            self._extends = self._try(
                [(0, 5), (5, 6), (6, 10), (10, 11), (11, PROBE_TOKENS)], LibraryCache
            )
            self._cuts = self._extends and self._try(
                [(0, 5), (2, 6), (4, 10), (10, PROBE_TOKENS)], CuttableCache
            )
        return (
            None
            if not self._extends
            else self._library_cache(CuttableCache if self._cuts else LibraryCache)
        )

    def extend(self, input_ids: Tensor, cache: "LibraryCache") -> ModelOutput:
        """Hidden states of the next positions (B, t) of unpacked texts."""
        trunk = self.get_submodule(self._trunk)
        # (B, t, D)
        hidden = trunk(input_ids=input_ids, past_key_values=cache.kept, use_cache=True)[0]
        return ModelOutput(hidden, self._readout())

    def attention_note(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return a note for the user about how packed rows are computed."""
        if self.packs:
            return None
        return (
            "this architecture cannot keep packed documents apart, so each is computed as a "
            "row of its own, which is slower"
        )

    @torch.no_grad()
    def tell_how_to_pack(self) -> None:
        """Try out whether the library's code for this architecture keeps documents apart; `packs`
        is False if it does not."""
        ids = probe_ids(self.vocab_size)
        cut = PROBE_TOKENS // 2 - 1
        documents = (torch.arange(PROBE_TOKENS) >= cut).int()[None]
        positions = torch.cat([torch.arange(cut), torch.arange(PROBE_TOKENS - cut)])[None]
        batch = Batch(ids, ids, positions, documents, torch.zeros_like(documents), packed=True)
        trunk, training = self.get_submodule(self._trunk), self.training
        self.eval()
        try:
            self.packs = _close(run_trunk(trunk, ids, positions), _one_by_one(trunk, batch))
        except Exception:  # it takes no positions, or none like these
            self.packs = False
        self.train(training)

    @torch.no_grad()
    def _try(self, pieces: list[tuple[int, int]], kind: "type[LibraryCache]") -> bool:
        """Return whether a few tokens, read in pieces, come out as they do at once: not where a
        state is kept in another way. A piece that begins before the end of the one before has the
        cache cut first."""
        positions = getattr(self.config, "max_position_embeddings", None)
        # on a GPU, trying would end the process
        if positions is not None and positions < PROBE_TOKENS:
            return False
        ids, training = probe_ids(self.vocab_size).to(self._readout().weight.device), self.training
        self.eval()
        try:
            with torch.autocast(ids.device.type, enabled=False):
                whole, cache, end = (
                    run_trunk(self.get_submodule(self._trunk), ids),
                    self._library_cache(kind),
                    0,
                )
                for begin, stop in pieces:
                    if begin < end:
                        cache.cut(begin)  # type: ignore[attr-defined]
                    if not _close(
                        self.extend(ids[:, begin:stop], cache).hidden, whole[:, begin:stop]
                    ):
                        return False
                    end = stop
            return True
        except Exception:  # it takes no cache, or another kind
            return False
        finally:
            self.train(training)

    def _library_cache(self, kind: "type[LibraryCache]") -> "LibraryCache":
        return kind(transformers().DynamicCache(config=self.config))

    def _readout(self) -> LinearReadout:
        head: Any = self.get_submodule(self._head)  # the library's linear layer
        table: Any = self.get_submodule(self._embedding)
        return LinearReadout(head.weight, head.bias, table.weight)


class LibraryCache:
    """The library's cache of keys and values, of a batch of texts of one length."""

    def __init__(self, kept: Any):
        self.kept = kept


class CuttableCache(LibraryCache):
    """One that can forget its newest positions. Raises ValueError where a layer keeps a window or a
    state: those cannot."""

    def __init__(self, kept: Any):
        super().__init__(kept)
        if any(type(layer).__name__ != "DynamicLayer" for layer in kept.layers):
            raise ValueError("a layer does not keep every position")

    def cut(self, length: int) -> None:
        self.kept.crop(length - self.kept.get_seq_length())


def parts_of(model: Any) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Trunk, head and embedding table of a transformers causal LM."""
    return model.base_model, model.get_output_embeddings(), model.get_input_embeddings()


# (B, T) -> (B, T, D)
def run_trunk(trunk: nn.Module, ids: Tensor, positions: Tensor | None = None) -> Tensor:
    # without, masks are plainly causal
    more = {} if positions is None else {"position_ids": positions}
    return trunk(input_ids=ids, use_cache=False, **more)[0]


def _one_by_one(trunk: nn.Module, batch: Batch) -> Tensor:
    """(B, T, D), each document in a row of its own: right for whatever is causal, also where the
    future is reached by recurrence, convolution or distance alone. Documents of similar length go
    together, so that at most half is padding."""
    ids = batch.input_ids.flatten()  # (B * T,)
    starts = document_starts(batch.document_ids).flatten()  # (B * T,)
    number = starts.cumsum(0) - 1  # (B * T,): which document
    # (B * T,): where in it
    place = torch.arange(len(ids), device=ids.device) - starts.nonzero().flatten()[number]
    lengths = torch.bincount(number)  # (n,)
    hidden, longest = None, int(lengths.max())
    while longest > 0:
        chosen = (lengths <= longest) & (lengths > longest // 2)  # (n,)
        if chosen.any():
            at = chosen[number].nonzero().flatten()
            row = (chosen.cumsum(0) - 1)[number[at]]
            rows = ids.new_zeros(int(chosen.sum()), longest)
            rows[row, place[at]] = ids[at]
            found = run_trunk(trunk, rows)[row, place[at]]  # (positions of these documents, D)
            hidden = found.new_zeros(len(ids), found.shape[-1]) if hidden is None else hidden
            hidden = hidden.index_copy(0, at, found)
        longest //= 2
    assert hidden is not None
    return hidden.view(*batch.input_ids.shape, -1)


# what a model must be like ------------------------------------------------------------------------


def probe_ids(vocab_size: int) -> Tensor:
    return (torch.arange(1, PROBE_TOKENS + 1) * 7 % vocab_size)[None]  # (1, PROBE_TOKENS)


@torch.no_grad()
def obstacle(model: Any) -> str | None:
    """Return why a transformers model cannot be trunk and linear readout here; None if it can.
    Tried out on a few tokens."""
    training = model.training
    model.eval()
    try:
        return next(_obstacles(model), None)
    finally:
        model.train(training)


def _obstacles(model: Any) -> Iterator[str]:
    trunk, head, embedding = parts_of(model)
    if trunk is model or not isinstance(head, nn.Linear) or not isinstance(embedding, nn.Embedding):
        yield "it is not built as a trunk, an embedding table and a linear readout"
        return
    ids = probe_ids(min(len(head.weight), len(embedding.weight)))
    hidden = run_trunk(trunk, ids)  # (1, T, D)
    other = ids.clone()
    other[:, -1] = ids[:, 0]
    if not _close(run_trunk(trunk, other)[:, :-1], hidden[:, :-1]):
        yield "a position sees the ones after it: it is an encoder, not a causal language model"
    seen: dict[str, Tensor] = {}

    def enlarge(_: nn.Module, inputs: tuple[Tensor, ...], scores: Tensor) -> Tensor:
        # random weights give scores so small that a soft cap would not show
        seen["hidden"], seen["scores"] = (
            inputs[0],
            scores * (50.0 / scores.abs().max().clamp_min(1e-9)),
        )
        return seen["scores"]

    handle = head.register_forward_hook(enlarge)
    try:
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        handle.remove()
    if "hidden" not in seen or not _close(seen["hidden"], hidden):
        yield "it changes the hidden states between its trunk and its readout"
    elif not _close(logits, seen["scores"]):
        yield (
            "it changes its scores after the readout (a soft cap or a scale, such as Gemma 2, "
            "Cohere and Granite have)"
        )


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=1e-4, atol=1e-4)


def _name_of(part: nn.Module, model: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is part)
