"""The copy at wandb: against a stand-in for what wandb does wrong, and against the real one,
offline, where it is installed."""

import importlib.util
import sys
import types
from pathlib import Path

import pytest

from core.metrics.log import MetricsLog
from core.reports.wandb_mirror import open_wandb
from tests.ui import stream


class FakeRun:
    url, dir = "https://somewhere/run", "/logs/wandb/offline-run-1/files"

    def __init__(self):
        self.logged, self.finished = [], 0

    def define_metric(self, *_, **__): ...

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """A wandb that records how it was started, and refuses the modes in `refuse`."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    module = types.ModuleType("wandb")
    module.calls, module.refuse, module.run = [], set(), FakeRun()

    def init(**kwargs):
        module.calls.append(kwargs)
        if kwargs["mode"] in module.refuse:
            raise RuntimeError("bad key\nand more")
        return module.run

    settings = types.SimpleNamespace(base_url="http://127.0.0.1:9")
    module.init, module.Settings = init, lambda **kwargs: kwargs
    module.setup, module.teardown = (
        lambda: types.SimpleNamespace(settings=settings),
        lambda **_: None,
    )
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr("core.reports.wandb_mirror._reachable", lambda url: True)
    return module


def opened(tmp_path):
    return open_wandb("zeroarg", "abc123", "Best general", {"seed": 1}, tmp_path / "logs")


def test_not_installed(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    mirror, message = opened(tmp_path)
    assert mirror is None and "pip install wandb" in message and "logs/" in message


def test_without_a_key_it_is_offline_and_keeps_the_run_id(fake, tmp_path):
    mirror, message = opened(tmp_path)
    assert (
        mirror is not None
        and "no API key" in message
        and "wandb sync /logs/wandb/offline-run-1" in message
    )
    (call,) = fake.calls
    assert (call["mode"], call["id"], call["resume"]) == ("offline", "abc123", "allow")


@pytest.mark.parametrize("where", ["environment", "netrc"])
def test_with_a_key_it_is_online(fake, tmp_path, monkeypatch, where):
    if where == "environment":
        monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    else:
        (tmp_path / "netrc").write_text("machine 127.0.0.1:9 login user password " + "x" * 40)
    _, message = opened(tmp_path)
    assert fake.calls[0]["mode"] == "online" and "https://somewhere/run" in message


def test_what_refuses_online_goes_on_offline_and_what_refuses_both_goes_on_without(
    fake, tmp_path, monkeypatch
):
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    fake.refuse = {"online"}
    mirror, message = opened(tmp_path)
    assert (
        mirror is not None and "bad key" in message and "offline" in message and "\n" not in message
    )
    fake.refuse = {"online", "offline"}
    mirror, message = opened(tmp_path)
    assert mirror is None and "logs/ only" in message


def test_without_network_it_does_not_try(fake, tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    _, message = opened(tmp_path)
    assert [call["mode"] for call in fake.calls] == ["offline"] and "cannot be reached" in message


def test_numbers_go_under_our_step(fake, tmp_path):
    mirror, _ = opened(tmp_path)
    for event in stream.run(steps=10):
        mirror.update(event)
    assert [step for step, _ in fake.run.logged] == sorted(step for step, _ in fake.run.logged)
    step, first = fake.run.logged[0]
    assert (
        step == 1
        and first["tokens"] == 10_000_000
        and "losses/policy" in first
        and "sources/wikipedia/loss" in first
    )
    assert all(
        isinstance(value, (int, float))
        for _, values in fake.run.logged
        for value in values.values()
    )
    assert any("eval/cross_entropy" in values for _, values in fake.run.logged)
    mirror.close()
    mirror.close()
    assert fake.run.finished == 1


def test_each_number_of_an_evaluation_has_a_key_of_its_own(fake, tmp_path):
    """Losses, heads and sources may be called what a measure is called: none overwrites another."""
    groups = {
        "losses": {"accuracy": 1.0, "seconds": 2.0},
        "heads": {"accuracy": 3.0},
        "sources": {"accuracy": {"loss": 4.0}},
    }
    event = {
        "event": "eval",
        "step": 7,
        "tokens": 70,
        "time": 0.0,
        "accuracy": 0.5,
        "seconds": 6.0,
        **groups,
    }
    mirror, _ = opened(tmp_path)
    mirror.update(event)
    assert fake.run.logged == [
        (
            7,
            {
                "tokens": 70,
                "eval/accuracy": 0.5,
                "eval/seconds": 6.0,
                "eval/losses/accuracy": 1.0,
                "eval/losses/seconds": 2.0,
                "eval/heads/accuracy": 3.0,
                "eval/sources/accuracy/loss": 4.0,
            },
        )
    ]


def test_an_error_in_it_does_not_reach_training(fake, tmp_path):
    def lost(values, step):
        raise ConnectionError("gone")

    mirror, _ = opened(tmp_path)
    fake.run.log = lost
    with MetricsLog(tmp_path / "m.jsonl", [mirror]) as log:
        for step in (1, 2):
            log.emit("step", step=step, tokens=1, loss=1.0)
    assert [("gone" in line) for line in (tmp_path / "m.jsonl").read_text().splitlines()] == [
        False,
        True,
        False,
    ]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_the_real_one_offline(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    mirror, message = opened(tmp_path)
    assert mirror is not None and mirror.mode == "offline"
    folder = Path(message.rsplit(" ", 1)[1])
    for event in stream.run(steps=20):
        mirror.update(event)
    mirror.close()
    (record,) = folder.glob("run-abc123.wandb")
    assert record.stat().st_size > 5_000
    assert b"eval/cross_entropy" in record.read_bytes() and b"losses/policy" in record.read_bytes()
