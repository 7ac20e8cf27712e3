"""The package lm_eval, imported only where it is used, and quiet.

In:    the name of one of its modules
Out:   the module; its version
State: its log and its bars are switched off, once per process
"""

import logging
from importlib import metadata
from typing import Any

from core.errors import MissingPackage
from core.hf_hub import quiet_datasets
from core.optional_packages import need

PACKAGE = '"lm_eval[math]"'


def harness(module: str) -> Any:
    """Return a module of lm_eval, such as "tasks". Raises MissingPackage saying what to install."""
    imported = need(f"lm_eval.{module}", PACKAGE, MissingPackage)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    quiet_datasets()
    # the job has its own progress bar
    need("lm_eval.api.task", PACKAGE, MissingPackage).tqdm = lambda each, **_: each
    return imported


def version() -> str:
    """Return the version of the installed harness. Raises MissingPackage."""
    try:
        return metadata.version("lm_eval")
    except metadata.PackageNotFoundError:
        raise MissingPackage(f"the package lm_eval is missing: pip install {PACKAGE}") from None
