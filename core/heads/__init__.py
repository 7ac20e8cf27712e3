"""The auxiliary heads a preset can switch on, in the order in which they are computed. Adding one:
its file, its line here, and its `enable_` key and weight in AuxiliarySettings."""

from core.heads.draft import Draft
from core.heads.dynamics import Dynamics
from core.heads.memory import Memory
from core.heads.planner import Planner
from core.heads.policy import Policy
from core.heads.rollouts import Rollouts
from core.heads.span_contrastive import SpanContrastive
from core.heads.value import Value

HEADS = {
    "policy": Policy,
    "value": Value,
    "dynamics": Dynamics,
    "span_contrastive": SpanContrastive,
    "rollouts": Rollouts,
    "planner": Planner,
    "memory": Memory,
    "draft": Draft,
}
