"""The question after the menu, where the chosen preset has been trained before: resume, or start
fresh?

In:    the chosen preset's lineage, and what would be resumed, in words
Out:   a lineage that goes on, or one that was put aside
State: none
"""

from collections.abc import Callable
from pathlib import Path

from core.checkpoint.lineage import has_checkpoints, name_aside, put_aside
from core.ui import text
from core.ui.menu import STYLE, can_pick


def offer_fresh(root: Path, lineage: str, resumes: Callable[[], list[str]]) -> None:
    """Put a lineage aside if it has checkpoints and the person at the terminal says so; where there
    is nobody, it goes on.

    Raises KeyboardInterrupt when the user leaves, UserError where it is in use.
    """
    if (
        can_pick()
        and has_checkpoints(root, lineage)
        and ask_fresh(resumes(), name_aside(root, lineage))
    ):
        print(f'  what was there is the lineage "{put_aside(root, lineage)}" now')


def ask_fresh(resumes: list[str], kept_as: str) -> bool:
    """Ask at a terminal; Enter alone resumes. Raises KeyboardInterrupt when the user leaves."""
    import questionary

    for line in resumes:
        print(f"  {text.clean(line)}")
    choices = [
        questionary.Choice("resume", False),
        questionary.Choice(f'start fresh; what is there is kept as the lineage "{kept_as}"', True),
    ]
    asked = questionary.select(
        "go on where it stands?",
        choices,
        qmark="zeroarg",
        pointer="❯",
        instruction=" ",
        use_jk_keys=False,
        style=questionary.Style.from_dict(STYLE),
    )
    return asked.unsafe_ask()
