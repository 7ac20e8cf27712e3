"""The table of auxiliary heads, in the order in which they are computed, and the section of a
preset that switches them on. Adding one: its file, its line here."""

from core.heads.draft import Draft, DraftSettings
from core.heads.dynamics import Dynamics, DynamicsSettings
from core.heads.head import Head
from core.heads.memory import Memory, MemorySettings
from core.heads.planner import Planner, PlannerSettings
from core.heads.policy import Policy, PolicySettings
from core.heads.rollouts import Rollouts, RolloutsSettings
from core.heads.span_contrastive import SpanContrastive, SpanContrastiveSettings
from core.heads.value import Value, ValueSettings
from core.preset.settings import AuxiliarySettingsBase, Settings

HEADS: dict[str, tuple[type[Settings], type[Head]]] = {
    "policy": (PolicySettings, Policy),
    "value": (ValueSettings, Value),
    "dynamics": (DynamicsSettings, Dynamics),
    "span_contrastive": (SpanContrastiveSettings, SpanContrastive),
    "rollouts": (RolloutsSettings, Rollouts),
    "planner": (PlannerSettings, Planner),
    "memory": (MemorySettings, Memory),
    "draft": (DraftSettings, Draft),
}


class AuxiliarySettings(*[keys for keys, _ in reversed(HEADS.values())], AuxiliarySettingsBase):  # type: ignore[misc]  # bases from a table
    """Auxiliary heads of the baseline LM, and adaptive weights of sources (specification 003, tier
    1). All off by default."""
