"""The program. From Python: `import core`, and `core.load` gives a trained model.

In:    nothing; importing it loads no other package
Out:   load
State: none
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from core.api import LoadedModel

__all__ = ["load"]


def load(name: str | Path, home: str | Path | None = None) -> "LoadedModel":
    """Load a trained model. Raises UserError where there is none.

    name   a lineage, such as "lm"; or a checkpoint file, such as "checkpoints/lm_prev.pth"
    home   the folder whose `checkpoints` hold the lineage; left out, that of main.py
    """
    from core.api import load_model

    return load_model(name, home)
