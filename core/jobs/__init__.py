"""What a preset can ask for: one file and one function each."""

from core.jobs.train import train

JOBS = {"train": train}
