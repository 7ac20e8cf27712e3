"""Five lines of Python: a trained model in a notebook, with the text and the numbers that the jobs
give."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import core
from core.api import LoadedModel
from core.contracts import plain_batch
from core.errors import PresetError, UserError
from core.models.readout import full_scores
from tests.documents import GUIDE, block_of
from tests.jobs.test_generate import piped
from tests.project import ROOT, merged, tiny_preset, train_here

TRAINED = tiny_preset(
    train={"max_steps": 3, "precision": "fp32"}, generate={"no_repeat_ngram": 0, "max_tokens": 20}
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose lineage "t" is trained; nothing here writes to it."""
    root = tmp_path_factory.mktemp("api")
    train_here(TRAINED, root)
    return root


@pytest.fixture(scope="module")
def model(root: Path) -> LoadedModel:
    return core.load("t", home=root)


def test_importing_loads_nothing(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); before = set(sys.modules); import core; "
        "new = set(sys.modules) - before; "
        "print(core.load.__name__, [name for name in new if name.startswith(('torch', 'core.'))])"
    )
    command = [sys.executable, "-B", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("load []\n", "")


def test_it_says_what_the_generate_job_says(
    model: LoadedModel, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the settings of the preset that it was trained with, and its seed."""
    settings = TRAINED["generate"] | {"temperature": 0.9, "top_p": 0.95}
    told = "\n".join(piped(root, monkeypatch, "In year\n", generate=settings))
    text = model.generate("In year")
    assert text and told.rstrip("\n").endswith(f"> In year\n{text}".rstrip("\n"))
    assert "".join(model.stream("In year")) == text == model.generate("In year")
    assert model.generate("In year", seed=7) == model.generate("In year", seed=7) != text


def test_sampling_is_checked_as_a_presets_is(model: LoadedModel) -> None:
    """At the call, not at the first piece."""
    short = model.generate("In year", max_tokens=3, temperature=0)
    whole = model.generate("In year", temperature=0)
    assert whole.startswith(short) and len(whole) == 20 and len(short) == 3
    stop = whole[4]
    assert model.generate("In year", temperature=0, stop=(stop,)) == whole[: whole.index(stop)]
    with pytest.raises(PresetError, match=r"generate\.temperature  -1.*"):
        model.stream("In year", temperature=-1)
    with pytest.raises(PresetError, match=r'generate\.max_token .*did you mean "max_tokens"'):
        model.generate("In year", max_token=3)


def test_log_probabilities_are_the_models(model: LoadedModel) -> None:
    """Each token's after all before it and the end of another document; beyond the context, in
    windows."""
    found = model.logprobs("In year 7")
    assert "".join(found.tokens) == "In year 7" and len(found.logprobs) == len(found.ids) == 9
    ids = torch.tensor([[model.trained.tokenizer.eos_id, *found.ids]])
    with torch.no_grad():
        output = model.trained.model(plain_batch(ids[:, :-1]))
        logs = full_scores(output.readout, output.hidden[0]).log_softmax(-1)
    expected = logs.gather(1, ids[0, 1:, None])[:, 0]
    assert torch.allclose(torch.tensor(found.logprobs), expected, atol=1e-5)
    assert found.total == sum(found.logprobs)
    long = model.logprobs("In year 7 the river of the stone met a letter.")
    assert len(long.logprobs) == 46 > 32 and long.logprobs[:9] == pytest.approx(found.logprobs)
    assert model.logprobs("").total == 0


def test_a_file_is_loaded_from_any_folder(
    root: Path, model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative to the folder where one is, as Python has it."""
    text = model.generate("In year")
    monkeypatch.chdir(root / "checkpoints")
    assert core.load("./t_current.pth").generate("In year") == text
    assert (
        core.load(root / "checkpoints" / "t_current.pth", home=tmp_path).generate("In year") == text
    )
    assert repr(model) == "<simple_lm of t_current.pth, sees 32 tokens>"


def test_what_cannot_be_loaded(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"s_current\.pth is not there.*checkpoints of t\."):
        core.load("s", home=root)
    with pytest.raises(UserError, match=r"none\.pth does not exist"):
        core.load(tmp_path / "none.pth")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "bare.pth")
    with pytest.raises(UserError, match=r"bare\.pth has no preset with it"):
        core.load(tmp_path / "bare.pth")


def test_a_model_of_masked_tokens_says_so(tmp_path: Path) -> None:
    masked = merged(
        tiny_preset(train={"max_steps": 1}),
        {"model": {"type": "neobert", "num_heads": 2, "intermediate_size": 48}},
    )
    train_here(masked, tmp_path)
    model = core.load("t", home=tmp_path)
    with pytest.raises(UserError, match="a neobert, which predicts masked tokens and continues no"):
        model.stream("The")
    with pytest.raises(UserError, match="gives no probabilities"):
        model.logprobs("The")
    with pytest.raises(UserError, match=r'code from its page on the Hub.*"as": "weights"'):
        model.to_transformers()


def test_the_model_of_transformers_computes_the_same(model: LoadedModel) -> None:
    theirs, tokenizer = model.to_transformers()
    ids: Any = tokenizer("In year 7", return_tensors="pt").input_ids
    assert ids[0].tolist() == model.logprobs("In year 7").ids
    output = model.trained.model(plain_batch(ids))
    ours = full_scores(output.readout, output.hidden[0])
    assert (theirs(ids).logits[0] - ours).abs().max() < 1e-5
    assert not any(parameter.requires_grad for parameter in theirs.parameters())


def test_the_guides_lines_run(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With this lineage in place of the guide's, in the folder of the program."""
    code = block_of(GUIDE, "import core").replace('"lm"', repr("t"))
    monkeypatch.setattr("core.api.HOME", root)
    exec(compile(code, "guide", "exec"), {})
    assert capsys.readouterr().out.strip()
