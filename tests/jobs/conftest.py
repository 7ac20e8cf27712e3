"""Fixtures of the tests of several jobs."""

import pytest

from tests.jobs.comparisons import job


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than training a tiny model, and so does freeing all memory; the slow
    tests do both."""
    monkeypatch.setattr("core.reports.run_card.plot_losses", lambda *_: None)
    monkeypatch.setattr(job, "write_report", lambda comparison, folder: None)
    monkeypatch.setattr(job, "forget_peak_memory", lambda runtime: True)
