"""Back to an older checkpoint, when updates have ruined the weights.

In:    the slots on the disk
Out:   weights and optimizer as they were; the data goes on behind the bad stretch
State: how often a run was put back
"""

from core.checkpoint.fitting import load_model
from core.checkpoint.slots import CheckpointStore, label, load_slot
from core.checkpoint.state import CheckpointState
from core.contracts import call_if_defined
from core.errors import CheckpointError, Diverged
from core.heads.build import load_heads
from core.parallel.shards import full
from core.training.machine import Machine
from core.training.objective import Objective
from core.training.optim import Optimizer
from core.training.reporter import Reporter

BAD_STEPS = 5
"""Non-finite steps in a row that mean the weights, not one batch, are at fault."""
ROLL_BACKS = 2
ADVICE = (
    "Lower train.learning_rate or train.max_grad_norm; the checkpoints before it are untouched."
)


class Recovery:
    """Puts weights and optimizer back to a checkpoint, at most ROLL_BACKS times in a run."""

    def __init__(
        self,
        store: CheckpointStore,
        objective: Objective,
        optimizer: Optimizer,
        machine: Machine,
        reporter: Reporter,
    ):
        self._store, self._objective, self._optimizer = store, objective, optimizer
        self._parallel, self._engine, self._reporter = machine.parallel, machine.engine, reporter
        self._times = 0

    def roll_back(self, step: int) -> None:
        """Go back after the bad update `step`. Raises Diverged where no slot helps. Every rank must
        call it."""
        self._store.wait()
        reason = f"loss or gradient were not finite {BAD_STEPS} times in a row at step {step}"
        if self._times >= ROLL_BACKS:
            raise Diverged(f"{reason}. {ADVICE}")
        # a slot saved right after the update that ruined the weights is of no use: the second time
        # an older one is taken
        state, path, notes = load_slot(self._store, self._parallel, self._times, settled=True)
        for note in notes:
            self._reporter.warn(note)
        if state is None or path is None:
            raise Diverged(f"{reason}. {ADVICE}")
        self._times += 1
        notes = []
        try:
            with self._engine.rewriting():
                is_finite = self._load(state, label(path), notes)
        except CheckpointError as error:
            raise Diverged(
                f"{reason}, and the checkpoint before cannot be gone back to: {error}"
            ) from None
        if not is_finite:
            lacking = "; ".join(notes)
            raise Diverged(
                f"{reason}, as are weights that {label(path)} lacks ({lacking}). {ADVICE}"
            )
        self._optimizer.load(state["optimizer"])
        self._reporter.warn(
            f"{BAD_STEPS} bad steps in a row: weights are back at {label(path)}, step "
            f"{state['progress']['step']}"
        )

    def _load(self, state: CheckpointState, where: str, notes: list[str]) -> bool:
        """Load the weights as a resumed run does: heads, or the rows' length, may have changed
        since. Returns whether all of them are finite."""
        model, heads = self._objective.model, self._objective.heads
        call_if_defined(model, "prepare_load", state["model"], notes)
        notes += load_model(model, state["model"], where)
        notes += load_heads(heads, state["heads"])
        return all(full(p.isfinite().all()) for p in self._objective.parameters())
