"""Which metrics the evaluations of a preset give: what a comparison may be decided by.

In:    a preset
Out:   keys of core/metrics/table.py
State: none
"""

from core.metrics.table import HEAD, HELD_OUT, LOSS, METRICS, READ
from core.preset.base import PresetBase
from core.preset.settings import MASKED_TOKENS, objective_of


def metrics_of(preset: PresetBase) -> set[str]:
    """Every metric that evaluations of a preset may give."""
    model, sources = preset.model, [source.name for source in preset.data.sources]
    found = {"token_accuracy", "top5_accuracy", "table_cosine"}
    masked, distances = (
        objective_of(model) == MASKED_TOKENS,
        getattr(model, "head", None) == "distance",
    )
    if distances:
        found |= {
            key for key in METRICS if key.startswith(("nll_", "prototype_", "pseudo_perplexity_"))
        }
    else:
        found |= {"cross_entropy", "entropy", "max_probability", "embedding_cosine"}
        found |= {"pseudo_perplexity"} if masked else {"perplexity", "bits_per_byte"}
    if getattr(model, "keep_decoder", False):
        found |= {key for key in METRICS if key.startswith("decoder_")}
    found |= {f"{LOSS}{loss.name or loss.type}" for loss in preset.losses}
    for head in (HEAD + key.removeprefix("enable_") for key in preset.auxiliary.heads):
        found |= {head, *(key for key in METRICS if key.startswith(f"{head}."))}
    return found | {
        f"{what}{name}" for what in (HELD_OUT, READ) for name in sources if len(sources) > 1
    }
