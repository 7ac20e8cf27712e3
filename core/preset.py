"""The typed preset: what a JSON file in configs/ may say, every mistake in it reported at once, and its JSON Schema.

In:    a file in configs/, and the tables of models, losses and sources (this floor knows none of them by name)
Out:   a Preset: frozen pydantic sections, every field with a default but `data.sources`
State: none
"""

import difflib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    create_model,
    model_validator,
)

from core.errors import PresetError
from core.schedules import Schedule, turns, value_at

RUN_TOKENS = 100_000_000
"""Training tokens of one run, over all ranks, padding not counted."""


class Settings(BaseModel):
    """The base of every section: unknown keys are errors, values are not coerced, nothing changes after decoding."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True, use_attribute_docstrings=True)


class TokenizerSettings(Settings):
    type: Literal["bpe", "byte", "hub", "file"] = "bpe"
    """bpe: byte-level BPE trained on a sample of the preset's own sources. byte: 256 bytes. hub: a Hugging Face tokenizer.
    file: a tokenizer.json on this machine."""
    vocab_size: int = Field(8192, ge=260)
    """Vocabulary of a trained BPE."""
    name: str | None = None
    """Hub repository of a `hub` tokenizer, such as "gpt2"."""
    path: str | None = None
    """The tokenizer.json of a `file` tokenizer, relative to the project, such as "./data/tokens/tokenizer.json". What ends a
    document is read from the tokenizer_config.json beside it."""

    @model_validator(mode="after")
    def _hub_is_named(self) -> "TokenizerSettings":
        if (self.type == "hub") != (self.name is not None):
            raise ValueError(
                '"type": "hub" goes with a "name", and only with it; to name a Hub tokenizer write "tokenizer": "gpt2"'
            )
        if (self.type == "file") != (self.path is not None):
            raise ValueError('"type": "file" goes with a "path" to a tokenizer.json, and only with it')
        return self


class ScheduleSettings(Settings):
    type: Literal["wsd", "cosine", "constant"] = "wsd"
    """wsd: warm-up, stable, linear decay. cosine: warm-up, cosine decay. constant: warm-up, then level."""
    warmup: float = Field(0.02, ge=0.0, le=1.0)
    """Fraction of the run that warms up."""
    decay: float = Field(0.2, ge=0.0, le=1.0)
    """Fraction of the run that decays at its end (wsd)."""
    floor: float = Field(0.0, ge=0.0, le=1.0)
    """Fraction of the peak learning rate left at the end (wsd, cosine)."""

    @model_validator(mode="after")
    def _fits(self) -> "ScheduleSettings":
        if self.type == "wsd" and self.warmup + self.decay > 1.0:
            raise ValueError(f"warmup {self.warmup:g} and decay {self.decay:g} are more than the whole run; together at most 1")
        return self


class TrainSettings(Settings):
    per_gpu_batch_size: int = Field(32, ge=1)
    """Rows of one forward pass on each device."""
    accumulation_steps: int = Field(1, ge=1)
    """Forward passes of one optimizer step."""
    learning_rate: float = Field(6e-4, gt=0.0)
    """Peak learning rate."""
    schedule: ScheduleSettings = ScheduleSettings()
    """Shape of the learning rate over the run."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the matrices of the trunk, AdamW for everything else."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's averaging factors."""
    eps: float = Field(1e-8, gt=0.0)
    """AdamW's epsilon."""
    weight_decay: float = Field(0.1, ge=0.0)
    """Decoupled weight decay, on matrices only (biases, norms and the position table are exempt)."""
    muon_learning_rate: float = Field(0.02, gt=0.0)
    """Peak learning rate of the matrices under Muon."""
    max_grad_norm: float = Field(1.0, gt=0.0)
    """Global norm the gradient is clipped to."""
    seed: int = 42
    """Seed of everything random."""
    runs: int = Field(1, ge=1)
    """Runs of 100,000,000 tokens chained into one horizon."""
    max_steps: int | None = Field(None, ge=1)
    """Shortens a run to so many optimizer steps."""
    max_epochs: int | None = Field(None, ge=1)
    """Reads each source at most so many times, and ends when nothing is left."""
    eval_tokens: int = Field(500_000, ge=0)
    """Held-out tokens of one evaluation; 0: never evaluate."""
    eval_every_tokens: int = Field(10_000_000, ge=1)
    """Training tokens between evaluations."""
    checkpoint_every_minutes: float = Field(10.0, gt=0.0)
    """Minutes between checkpoints. One is always written after the first steps, at the end and on Ctrl-C."""
    checkpoint_every_steps: int | None = Field(None, ge=1)
    """Also write a checkpoint every so many steps."""
    compile: Literal["auto", "always", "never"] = "auto"
    """torch.compile: auto compiles when the run is long enough to pay for it."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 compute over fp32 weights where the device computes bf16 natively, fp32 elsewhere."""
    train_tokens: int | None = None
    """Accepted for old presets and overridden: one run is always 100,000,000 tokens."""

    @model_validator(mode="after")
    def _one_limit(self) -> "TrainSettings":
        if self.runs > 1 and self.max_epochs is not None:
            raise ValueError(
                f"runs {self.runs} with max_epochs {self.max_epochs}: once all is read there is no next run; drop one"
            )
        return self


class AuxiliarySettings(Settings):
    """Auxiliary heads of the baseline LM (specification 003, tier 1). All off by default."""

    enable_policy: bool = False
    """Predict the next token at a sampled position from a head of its own, towards the language model's distribution."""
    enable_value: bool = False
    """Predict the average loss of the coming span."""
    enable_dynamics: bool = False
    """Predict coming hidden states from the present one and the coming tokens."""
    enable_span_contrastive: bool = False
    """Tell a masked span from the batch's other spans (InfoNCE)."""
    policy_kl_weight: Schedule = 0.05
    """Weight of the policy head's divergence."""
    value_weight: Schedule = 0.05
    """Weight of the value head's error."""
    dynamics_weight: Schedule = 0.05
    """Weight of the dynamics head's error."""
    span_contrastive_weight: Schedule = 0.05
    """Weight of the contrastive loss."""
    span_mask_fraction: float = Field(0.15, gt=0.0, lt=1.0)
    """Share of a row that is masked."""
    span_contrastive_temperature: float = Field(0.07, gt=0.0)
    """Temperature of the contrastive loss."""
    span_l2_normalize: bool = True
    """Compare directions only."""
    enable_adaptive_sources: bool = False
    """Draw more from sources with a higher loss."""
    adaptive_interval_tokens: int = Field(5_000_000, ge=1)
    """Tokens between changes of the weights."""
    adaptive_min_weight: float = Field(0.5, gt=0.0)
    """Lowest factor on a source's weight."""
    adaptive_max_weight: float = Field(3.0, gt=0.0)
    """Highest factor on a source's weight."""
    adaptive_smoothing: float = Field(0.9, ge=0.0, lt=1.0)
    """Share of the old factor kept at a change."""

    @property
    def enabled(self) -> list[str]:
        return [key for key, value in self if key.startswith("enable_") and value]


class GenerateSettings(Settings):
    prompts: list[str] = ["Once upon a time", "The most important", "def main("]
    """Beginnings continued at each evaluation."""
    max_tokens: int = Field(60, ge=1)
    """New tokens of a sample."""
    temperature: float = Field(0.9, gt=0.0)
    """Divides the scores before sampling."""
    top_p: float = Field(0.95, gt=0.0, le=1.0)
    """Nucleus sampling: the smallest set of tokens that reaches this probability."""
    no_repeat_ngram: int = Field(3, ge=0)
    """No sequence of so many tokens appears twice; 0: no block."""


class TokenizeSettings(Settings):
    """The tokenize job: every source of `data` to a folder of chunks, which a source of type `tokens` reads."""

    output: str = "./data/tokens"
    """Folder that gets the tokenizer, and a folder of chunks for each source."""
    chunk_tokens: int = Field(100_000_000, ge=1)
    """Tokens of a chunk: 4 bytes each."""
    max_tokens: int | None = Field(None, ge=1)
    """Tokens after which a source is left, at the end of a document; left out, it is read once to its end."""
    workers: int | None = Field(None, ge=0, le=256)
    """Processes that tokenize; 0: the threads of this one. Left out: one per core. The files are the same for any number."""


class LoggingSettings(Settings):
    wandb: bool = False
    """Mirror the metrics log to Weights & Biases; offline when there is no key."""
    wandb_project: str = "zeroarg"
    """Project name there."""


class DataSettingsBase(Settings):
    """Everything of `data` but the sources, whose kinds come from a table."""

    mix_strategy: Literal["round_robin", "sequential", "weighted"] = "round_robin"
    """round_robin: one document from each in turn. sequential: each to its end. weighted: shares of `source_weights`."""
    source_weights: list[Schedule] | None = None
    """One number or schedule per source (weighted): its share of what is drawn."""
    weights_of: Literal["documents", "tokens"] = "documents"
    """What source_weights are shares of: documents drawn, or their tokens (a source of long documents is drawn less often)."""
    min_text_length: int = Field(50, ge=1)
    """Documents of fewer characters are passed over."""
    packing: Literal["documents", "best_fit", "padding"] = "documents"
    """documents: end to end, attention kept inside each. best_fit: kept whole wherever they fit. padding: one piece a row."""
    shuffle: Literal["documents", "shards"] = "documents"
    """What each epoch puts in another order: shards (files) only, or also the documents in stretches of 1,024 inside them."""
    validation_fraction: float = Field(0.01, gt=0.0, lt=0.5)
    """Share of the documents held out for evaluation, chosen by a hash of their text."""
    workers: int | None = Field(None, ge=0, le=64)
    """Processes that read and tokenize, per rank; 0: a thread. Left out: a thread on CPU, one process on a GPU."""
    cache_gigabytes: float = Field(20.0, ge=0.0)
    """Disk space for tokens of streams and compressed files, in .cache/ (safe to delete); 0: no cache."""
    lanes: int = Field(24, ge=1, le=4096)
    """Parallel lanes the order of documents is laid over. The number of ranks must divide it."""
    train_tokens: int | None = None
    """Accepted for old presets and overridden: one run is always 100,000,000 tokens."""

    @model_validator(mode="after")
    def _weights_fit(self) -> "DataSettingsBase":
        sources = self.sources  # type: ignore[attr-defined]  # every real Data section has it
        names = [source.name for source in sources]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f'two sources are called {", ".join(twice)}; give one another "name"')
        if self.mix_strategy == "weighted" and self.source_weights is None:
            raise ValueError('mix_strategy "weighted" needs "source_weights", one number per source')
        if self.source_weights is not None:
            if len(self.source_weights) != len(sources):
                raise ValueError(f"{len(self.source_weights)} source_weights for {len(sources)} sources; give one each")
            for moment in sorted({0.0, 1.0, *(end for weight in self.source_weights for end in turns(weight))}):
                shares = [value_at(weight, moment) for weight in self.source_weights]
                if min(shares) < 0 or sum(shares) <= 0:
                    raise ValueError(f"source_weights must not be negative, and not all zero; at {moment:g} they are {shares}")
        return self


def _union(
    table: dict[str, tuple[type[Settings], Any]], what: str, default: str | None, text_is: Any = None, names: tuple[str, ...] = ()
) -> Any:
    """A field type that picks its section class from a table by `type`; a string, one of `names`, is expanded by `text_is`."""

    def expand(value: Any) -> Any:
        return text_is(value) if text_is is not None and isinstance(value, str) else value

    def kind(value: Any) -> str | None:
        found = value.get("type", default) if isinstance(value, dict) else getattr(value, "type", None)
        return found if isinstance(found, str) and found in table else None

    known = ", ".join(f'"{name}"' for name in table)
    members = [Annotated[settings, Tag(name)] for name, (settings, _) in table.items()]
    union: Any = members[0]
    for member in members[1:]:
        union = union | member
    picked = Discriminator(kind, custom_error_type="kind", custom_error_message=f"unknown type of {what}; known are {known}")
    section = Annotated[union, picked]
    if not names:
        return Annotated[section, BeforeValidator(expand)]
    return Annotated[section, BeforeValidator(expand, json_schema_input_type=section | Literal[names])]


def preset_class(models: dict, losses: dict, sources: dict, source_names: dict[str, dict], jobs: list[str]) -> type[BaseModel]:
    """The Preset class over these tables.

    models, losses, sources   {type: (Settings class, built class)}
    source_names              {short name: the source it stands for}, usable as plain strings in `data.sources`
    jobs                      what a preset can ask for
    """

    def named_source(name: str) -> dict:
        if name in source_names:
            return {"name": name, **source_names[name]}
        known = sorted(source_names)
        near = difflib.get_close_matches(name, known, n=1)
        hint = f'; did you mean "{near[0]}"?' if near else f"; known are {', '.join(known)}"
        raise ValueError(f'no source is called "{name}"{hint}')

    tokenizer = Annotated[
        TokenizerSettings,
        BeforeValidator(
            lambda v: {"type": "hub", "name": v} if isinstance(v, str) else v, json_schema_input_type=TokenizerSettings | str
        ),
    ]
    model = _union(models, "model", default="simple_lm")
    source = _union(sources, "source", default=None, text_is=named_source, names=tuple(source_names))
    data = create_model(
        "DataSettings",
        __base__=DataSettingsBase,
        sources=(Annotated[list[source], Field(min_length=1, description="Where text comes from: names or sections.")], ...),
    )
    default_model = next(iter(models.values()))[0]
    return create_model(
        "Preset",
        __base__=Settings,
        schema_=(str | None, Field(None, alias="$schema", description="The JSON Schema an editor completes from.")),
        name=(str, Field("", description="Name in the menu; left out, the file's.")),
        description=(str, Field("", description="One line for the menu.")),
        extends=(str | None, Field(None, description="Another preset; this one states only what differs.")),
        job=(Literal[tuple(jobs)], Field(jobs[0], description="What to do.")),
        lineage=(str, Field("", pattern=r"^[A-Za-z0-9._-]*$", description="Name of the checkpoints; left out, the file's.")),
        model=(model, Field(default_factory=default_model, description="The architecture.")),
        tokenizer=(tokenizer, Field(TokenizerSettings(), description="Section, or the name of a Hub tokenizer.")),
        train=(TrainSettings, Field(TrainSettings(), description="The recipe.")),
        losses=(
            Annotated[list[_union(losses, "loss", default=None)], Field(min_length=1)],
            Field(
                default_factory=lambda: [next(iter(losses.values()))[0]()],
                description="Weighted sum of losses on the vocabulary.",
            ),
        ),
        auxiliary=(AuxiliarySettings, Field(AuxiliarySettings(), description="Auxiliary heads.")),
        data=(data, Field(description="What to read, and how.")),
        generate=(GenerateSettings, Field(GenerateSettings(), description="Sampling.")),
        tokenize=(TokenizeSettings, Field(TokenizeSettings(), description="What the tokenize job writes.")),
        logging=(LoggingSettings, Field(LoggingSettings(), description="Where metrics go besides logs/.")),
    )


def read_preset(path: Path, cls: type[BaseModel]) -> Any:
    """The preset in a file, with what it extends merged in.

    Raises PresetError with every problem: JSON syntax with line and column, unknown keys with the nearest known one,
    wrong values with path, value and what would be right.
    """
    data = _read_json(path)
    seen = [path.stem]
    while isinstance(data, dict) and isinstance(parent := data.get("extends"), str):
        parent_path = path.parent / f"{parent.removesuffix('.json')}.json"
        if parent_path.stem in seen:
            raise PresetError(str(path), [f"extends  goes in a circle: {' -> '.join([*seen, parent_path.stem])}"])
        if not parent_path.exists():
            near = difflib.get_close_matches(parent, [p.stem for p in path.parent.glob("*.json")], n=1)
            hint = f'; did you mean "{near[0]}"?' if near else ""
            raise PresetError(str(path), [f'extends  "{parent}" is no preset in {path.parent}{hint}'])
        seen.append(parent_path.stem)
        base = _read_json(parent_path)
        if not isinstance(base, dict):
            raise PresetError(str(parent_path), ["a preset is a JSON object: { ... }"])
        own = {key: value for key, value in data.items() if key != "extends"}
        data = _merge({key: value for key, value in base.items() if key not in ("name", "description", "lineage")}, own)
    return decode_preset(data, cls, str(path), path.stem)


def decode_preset(data: Any, cls: type[BaseModel], where: str, stem: str) -> Any:
    """A preset from decoded JSON; `stem` names it and its lineage where it does not itself. Raises PresetError."""
    if not isinstance(data, dict):
        raise PresetError(where, ["a preset is a JSON object: { ... }"])
    filled = {**data, "name": data.get("name") or stem, "lineage": data.get("lineage") or stem}
    try:
        return cls.model_validate_json(json.dumps(filled))
    except ValidationError as error:
        raise PresetError(where, [_explain(e, filled, cls) for e in error.errors()]) from None


def preset_json(preset: BaseModel) -> dict:
    """The resolved preset as plain JSON: what is broadcast, logged and kept in checkpoints."""
    return preset.model_dump(mode="json", by_alias=True, exclude={"schema_", "extends"})


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=lambda pairs: _object(pairs, path))
    except json.JSONDecodeError as error:
        raise PresetError(
            str(path), [f"line {error.lineno} column {error.colno}: {error.msg}; the file is not valid JSON"]
        ) from None
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise PresetError(str(path), [f"cannot be read: {error}"]) from None


def _object(pairs: list[tuple[str, Any]], path: Path) -> dict:
    """A JSON object. Of a key given twice, JSON readers drop the first value without a word."""
    keys = [key for key, _ in pairs]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise PresetError(str(path), [f'"{key}" stands twice in one object; keep one of them' for key in twice])
    return dict(pairs)


def _merge(base: Any, own: Any) -> Any:
    """`own` over `base`: objects are merged key by key (unless their `type` changes), everything else is replaced."""
    if not (isinstance(base, dict) and isinstance(own, dict)) or own.get("type", base.get("type")) != base.get("type"):
        return own
    return {**base, **{key: _merge(base.get(key), value) for key, value in own.items()}}


def _explain(error: Any, data: Any, cls: type[BaseModel]) -> str:
    """One line: path, value, what is wrong and what would be right."""
    path, node, missing = [], data, error["type"] == "missing"
    for depth, part in enumerate(error["loc"]):  # union tags in loc are not part of the user's path
        if isinstance(part, int) and isinstance(node, list) and part < len(node):
            path[-1:] = [f"{path[-1]}[{part}]"]
            node = node[part]
        elif isinstance(node, dict) and part in node:
            path.append(str(part))
            node = node[part]
        elif missing and depth == len(error["loc"]) - 1:
            path.append(str(part))
    where = ".".join(path) or "the preset"
    if missing:
        return f"{where}  is missing; it has no default"
    if error["type"] == "extra_forbidden":
        known = _known_keys(cls, error["loc"][:-1])
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1, cutoff=0.5)
        return f"{where}  unknown key; " + (f'did you mean "{near[0]}"?' if near else f"known are {', '.join(known)}")
    message = error["msg"].removeprefix("Value error, ")
    shown = json.dumps(node, default=str)
    return f"{where}  {shown if len(shown) <= 60 else shown[:57] + '...'}: {message[0].lower() + message[1:]}"


def _known_keys(cls: type[BaseModel], loc: tuple) -> list[str]:
    """The keys allowed where an unknown one was found, from the JSON Schema."""
    schema = cls.model_json_schema(by_alias=True)
    nodes = [schema]
    for part in loc:
        found = []
        for node in _resolved(nodes, schema):
            if isinstance(part, int):
                found += [node["items"]] if "items" in node else []
            elif part in node.get("properties", {}):
                found.append(node["properties"][part])
            else:  # a union tag: keep the members of that type
                kinds = node.get("properties", {}).get("type", {})
                found += [node] if kinds.get("const") in (part, None) else []
        nodes = found or nodes
    return sorted({key for node in _resolved(nodes, schema) for key in node.get("properties", {})})


def _resolved(nodes: list[dict], schema: dict) -> list[dict]:
    """Nodes with `$ref` followed and unions opened."""
    out = []
    for node in nodes:
        if "$ref" in node:
            out += _resolved([schema["$defs"][node["$ref"].rsplit("/", 1)[1]]], schema)
        elif "oneOf" in node or "anyOf" in node:
            out += _resolved(node.get("oneOf", []) + node.get("anyOf", []), schema)
        else:
            out.append(node)
    return out
