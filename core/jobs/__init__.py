"""What a preset can ask for: one file and one function each."""

from core.jobs.tokenize import preview_tokenize, tokenize
from core.jobs.train import train

JOBS = {"train": train, "tokenize": tokenize}

PREVIEWS = {"tokenize": preview_tokenize}
"""What the menu tells of a job that does not train: a function from preset and root folder to lines."""
