"""What a preset can ask for: one file and one function each."""

from core.jobs.compare import compare, preview_compare
from core.jobs.evaluate import evaluate, preview_evaluate
from core.jobs.generate import generate, preview_generate
from core.jobs.interpret import interpret, preview_interpret
from core.jobs.tokenize import preview_tokenize, tokenize
from core.jobs.train import train

JOBS = {
    "train": train,
    "tokenize": tokenize,
    "compare": compare,
    "evaluate": evaluate,
    "interpret": interpret,
    "generate": generate,
}

PREVIEWS = {
    "tokenize": preview_tokenize,
    "compare": preview_compare,
    "evaluate": preview_evaluate,
    "interpret": preview_interpret,
    "generate": preview_generate,
}
"""What the menu tells of a job's own before it tells of training: a function from preset and root
folder to lines."""
