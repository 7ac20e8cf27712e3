"""Optional packages: imported where they are used, by one helper that says what to install.

In:    the name of a module
Out:   the module
State: none
"""

import importlib
from typing import Any

from core.errors import SourceUnavailable


def need(module: str, package: str) -> Any:
    """An optional module. Raises SourceUnavailable saying what to install: the other sources can go on without it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise SourceUnavailable(f"the package {package} is missing: pip install {package}") from None
