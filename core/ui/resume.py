"""The question after the menu, if the chosen preset has been trained before: resume, or start
fresh?

In:    the chosen preset's lineage, and a description of what would be resumed
Out:   the lineage as it was, or put aside under another name
State: none
"""

from collections.abc import Callable
from pathlib import Path

from core.checkpoint.lineage import has_checkpoints, name_aside, put_aside
from core.ui import text
from core.ui.menu import STYLE, can_pick


def offer_fresh(root: Path, lineage: str, resumes: Callable[[], list[str]]) -> None:
    """Ask whether a lineage that has checkpoints shall be put aside, and do so. Without a terminal,
    nobody is asked and the lineage goes on.

    resumes   returns the description of what would be resumed

    Raises KeyboardInterrupt when the user leaves, UserError where the lineage is in use.
    """
    if not can_pick() or not has_checkpoints(root, lineage):
        return
    if ask_fresh(resumes(), name_aside(root, lineage)):
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
    question = questionary.select(
        "resume where it stopped?",
        choices,
        qmark="zeroarg",
        pointer="❯",
        instruction=" ",
        use_jk_keys=False,
        style=questionary.Style.from_dict(STYLE),
    )
    return question.unsafe_ask()
