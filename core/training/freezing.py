"""The parameters that a run trains: those a preset names, or all.

In:    a module, patterns over parameter names (`train.trainable`)
Out:   `requires_grad` of its parameters
State: none
"""

import difflib
from fnmatch import fnmatchcase

from torch import nn

from core.errors import UserError


def train_only(model: nn.Module, patterns: list[str] | None) -> None:
    """Freeze every parameter that no pattern names; None freezes nothing.

    A pattern is one or more whole parts of a name, between dots, anywhere in it:
    "transformer_encoder.27" stands for "model.transformer_encoder.27.qkv.weight" and the rest of
    block 27, and never for block 2. "*" and "?" stand for letters of a part. Raises UserError for
    patterns that name nothing, or only what the model itself never trains."""
    if patterns is None:
        return
    parameters = dict(model.named_parameters())
    free = [name for name, p in parameters.items() if p.requires_grad]
    problems = []
    for pattern in patterns:
        if any(names(pattern, name) for name in free):
            continue
        if any(names(pattern, name) for name in parameters):
            problems.append(f'"{pattern}" names only what this model keeps as it is')
        else:
            problems.append(f'"{pattern}" names no parameter{_hint(pattern, free)}')
    if problems:
        outline = ", ".join(_outline(free))
        raise UserError(
            f"train.trainable: {'; '.join(problems)}.\nThe model's parameters are {outline}."
        )
    for name in free:
        parameters[name].requires_grad_(any(names(pattern, name) for pattern in patterns))


def names(pattern: str, name: str) -> bool:
    """Return whether the parts of `pattern` stand side by side among those of `name`."""
    wanted, parts = pattern.split("."), name.split(".")
    return any(
        all(fnmatchcase(part, want) for want, part in zip(wanted, parts[start:]))
        for start in range(len(parts) - len(wanted) + 1)
    )


def share_with_graph(model: nn.Module) -> float:
    """Return the share of a model's layers that keep activations for the backward pass: those from
    the first trained one on.

    Layers are counted by the numbers in parameter names, as blocks of a stack have them; what comes
    before the first block (embeddings) needs them all.
    """
    layers = [
        (next((int(part) for part in name.split(".") if part.isdigit()), None), p)
        for name, p in model.named_parameters()
    ]
    count = 1 + max((layer for layer, _ in layers if layer is not None), default=0)
    reached = False
    trained = []
    for layer, p in layers:  # in the order of registration, which is that of computation
        reached |= layer is not None
        if p.requires_grad:
            trained.append(layer if layer is not None else count if reached else 0)
    return (count - min(trained, default=count)) / count


def _hint(pattern: str, free: list[str]) -> str:
    parts = list(dict.fromkeys(part for name in free for part in name.split(".")))
    wrong = [
        part for part in pattern.split(".") if not any(fnmatchcase(each, part) for each in parts)
    ]
    if not wrong or wrong[0].isdigit():  # numbers are all alike
        return ""
    near = difflib.get_close_matches(wrong[0], parts, n=1)
    return f'; did you mean "{near[0]}"?' if near else ""


def _outline(free: list[str]) -> list[str]:
    """Shorten the names to one for all blocks of a stack: "transformer_encoder.0..27"."""
    numbered: dict[str, list[int]] = {}
    for name in free:
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        key = ".".join(parts[:at])
        numbered.setdefault(key, [])
        if at is not None:
            numbered[key].append(int(parts[at]))
    return [
        f"{key}.{min(numbers)}..{max(numbers)}" if numbers else key
        for key, numbers in numbered.items()
    ]
