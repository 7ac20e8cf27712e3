"""Optional packages: imported where they are used, by one helper that says what to install.

In:    the name of a module
Out:   the module
State: none
"""

import importlib
from typing import Any

from core.errors import SourceUnavailable


def need(module: str, package: str, lacking: type[Exception] = SourceUnavailable) -> Any:
    """Import an optional module. Raises `lacking`, which says what to install; by default an error
    of one source, without which the other sources go on."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if error.name is not None and module.startswith(error.name):
            raise lacking(f"the package {package} is missing: pip install {package}") from None
        raise lacking(f"the package {package} cannot be imported: {error}") from None
