"""What README and guide list is what the program has, neither less nor more; every block they show
is held true by something."""

import json
import os
import re
import runpy
from pathlib import Path
from typing import get_args

import pytest

from core import errors
from core.data.chat import encode_chat, render_chat
from core.data.sources import NAMED_SOURCES, SOURCES
from core.data.sources.chat import ChatFiles, conversation
from core.data.sources.decode import COMPRESSIONS
from core.data.sources.hf import LOCAL_BUILDERS
from core.data.sources.tables import TABLES
from core.data.sources.text import TextSource
from core.data.tokenizer_build import build_tokenizer
from core.environment import read_dotenv
from core.heads import HEADS
from core.jobs import JOBS
from core.jobs.generate import ACTIONS, COMMANDS, DRAFT_COMMAND, PLANNER_COMMAND
from core.losses import LOSSES
from core.losses.sharpness import SharpnessSettings
from core.models import MODELS
from core.preset.settings import TokenizerSettings
from tests.documents import GUIDE, README, Block, block_of, fenced, named, table
from tests.project import ROOT

SCHEMA = json.loads((ROOT / "configs" / "preset.schema.json").read_text())
PRESETS = {path.stem for path in (ROOT / "configs").glob("*.json")} - {"preset.schema"}
captures = runpy.run_path(str(ROOT / "docs" / "captures.py"))


def first_column(*head: str) -> list[str]:
    return [name for row in table(GUIDE, *head) for name in named(row[0])]


# tables -------------------------------------------------------------------------------------------


def test_models_losses_heads_sources_and_jobs() -> None:
    assert first_column("`model.type`") == list(MODELS)
    assert set(first_column("`type`", "Per position")) == set(LOSSES)
    assert {*first_column("Name in `losses`"), "memory"} == set(
        HEADS
    ) and "One more head, `memory`" in GUIDE
    assert set(first_column("`type`", "Reads")) == set(SOURCES)
    assert set(first_column("`packing`")) == set(
        SCHEMA["$defs"]["DataSettings"]["properties"]["packing"]["enum"]
    )
    (listed,) = re.findall(r"^- \*\*Jobs\*\*: (.*)\. There is no server", GUIDE, re.MULTILINE)
    assert set(named(listed)) == set(JOBS)


def test_the_keys_in_the_tables_of_losses_and_heads_are_theirs() -> None:
    rows = table(GUIDE, "`type`", "Per position")
    for row in rows:
        (kind,) = named(row[0])
        assert set(named(row[2])) == set(LOSSES[kind][0].model_fields) - {
            "type",
            "name",
            "weight",
        }, kind
    (sharpness,) = [row[1] for row in rows if row[0] == "`sharpness`"]
    assert set(named(sharpness)) - {"top_k"} == set(
        get_args(SharpnessSettings.model_fields["penalty"].annotation)
    )


def test_the_kinds_of_files_are_those_that_are_read() -> None:
    """In the guide's table of sources, and in the meaning of the keys that name files."""
    rows = {named(row[0])[0]: row for row in table(GUIDE, "`type`", "Reads")}
    compressed = {
        kind: {*source.readable, *COMPRESSIONS}
        for kind, source in (("text", TextSource), ("chat", ChatFiles))
    }
    suffixes = {
        kind: {name for name in named(rows[kind][1]) if name.startswith(".")}
        for kind in ("text", "chat", "hf")
    }
    assert (
        suffixes["text"] == compressed["text"]
        and set(ChatFiles.readable) == set(TABLES)
        and not suffixes["chat"]
    )
    assert suffixes["hf"] == set(LOCAL_BUILDERS) - set(TABLES)
    assert all("tables, as `text` reads them" in rows[kind][1] for kind in ("chat", "hf"))
    for kind, suffixes in compressed.items():
        meaning = SOURCES[kind][0].model_json_schema()["properties"]["path"]["description"]
        others = {".ndjson", ".htm", ".xhtml"}  # other names for kinds that are there
        assert set(re.findall(r"\.\w+", meaning)) == suffixes - others, kind


def test_named_sources() -> None:
    rows = {named(row[0])[0]: named(row[1]) for row in table(GUIDE, "Name", "What it is")}
    assert set(rows) == set(NAMED_SOURCES)
    for name, section in NAMED_SOURCES.items():
        said = {
            section[key].removeprefix("./")
            for key in ("dataset", "config", "local")
            if key in section
        }
        # "the articles"
        missing = said - set(rows[name]) - ({"document"} if name == "arxiv" else set())
        assert not missing, f"{name}: {missing} not in the guide"


def test_every_preset_is_in_the_guide_and_every_preset_it_names_is_there() -> None:
    listed = [named(row[0])[0] for row in table(GUIDE, "Preset", "Name in the menu")]
    assert listed == sorted(PRESETS), "run: python docs/make_schema.py"
    texts = [
        README,
        GUIDE,
        *(path.read_text() for path in (ROOT / "docs" / "playbooks").glob("*.md")),
    ]
    for name in re.findall(r"\b(\d\d_[a-z0-9_]+)\b", "\n".join(texts)):
        assert name.removesuffix("_current") in PRESETS, f"no preset is called {name}"


def test_exit_codes() -> None:
    """Every error's code, 0, and no other, in both documents."""
    kinds = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.UserError)
    ]
    codes = {"0", "1", *(str(kind.exit_code) for kind in kinds)}
    assert {row[0] for row in table(README, "Exit code", "Meaning")} == codes
    assert {row[0] for row in table(GUIDE, "Code", "Meaning")} == codes


def test_events_and_why_a_run_ends() -> None:
    sources = {path: path.read_text() for path in (ROOT / "core").rglob("*.py")}
    everything = "".join(sources.values())
    emitted = set(re.findall(r'emit\(\s*"(\w+)"', everything))
    rows = {named(row[0])[0]: row[1] for row in table(GUIDE, "Event", "Fields")}
    assert emitted <= set(rows) and all(f'"{event}"' in everything for event in rows)
    for event, fields in rows.items():
        assert [
            name
            for name in named(fields)
            if name.isidentifier() and not re.search(rf"\b{name}\b", everything)
        ] == [], event
    loop = "".join(
        text
        for path, text in sources.items()
        if path.relative_to(ROOT / "core").as_posix()
        in ("training/trainer.py", "training/progress.py", "jobs/train.py")
    )
    reasons = {
        "budget",
        *re.findall(r'reason = "(\w+)"|reason="(\w+)"|return "(max_\w+|budget)"', loop),
    }
    found = {
        word for each in reasons for word in ([each] if isinstance(each, str) else each) if word
    }
    assert {"budget", "max_steps", "max_epochs", "interrupted"} <= found
    assert found <= set(named(rows["run_end"])), "the guide does not say why a run ends"


def test_commands_of_a_conversation() -> None:
    (said,) = re.findall(r"\*\*In a terminal\*\*(.*?)\*\*Through a pipe\*\*", GUIDE, re.DOTALL)
    said = re.sub("```.*?```", "", said, flags=re.DOTALL)
    commands = {name for quoted in named(said) for name in re.findall(r"^/(\w+)", quoted)}
    assert commands == {*COMMANDS, *ACTIONS, PLANNER_COMMAND.setting, DRAFT_COMMAND.setting}


# blocks -------------------------------------------------------------------------------------------

ILLUSTRATIONS = {  # first words -> what they are; everything else is made, run or checked
    "document   [ A1": "a drawing of the memory head's rows",
    "p(v) = (d(v) + 1e-8)**h": "a formula; tests/losses/test_goldens.py has its values",
    "source --> cache": "a drawing of the data's path",
}
CHECKED = {  # first words -> the test that holds them true
    "checkpoints/<lineage>_current.pth": (
        "tests/test_docs.py",
        "test_the_quick_test_and_the_code_of_the_guide",
    ),
    "main.py                     the only entry": (
        "tests/test_docs.py",
        "test_the_readme_names_every_file",
    ),
    '{"messages": [{"role": "user"': (
        "tests/test_listings.py",
        "test_chats_become_what_the_guide_shows",
    ),
    "<|im_start|>user": (
        "tests/test_listings.py",
        "test_chats_become_what_the_guide_shows",
    ),
    "data/tokens/tokenizer.json": (
        "tests/jobs/test_tokenize.py",
        "test_the_files_hold_every_document_in_the_sources_order",
    ),
    "HF_TOKEN=": (
        "tests/test_listings.py",
        "test_small_files_in_the_guide",
    ),
    "logs/<lineage>/report.html": (
        "tests/jobs/test_compare.py",
        "test_what_a_comparison_leaves",
    ),
    "logs/<lineage>/evaluate.md": (
        "tests/jobs/test_evaluate.py",
        "test_everything_is_measured_once_and_told",
    ),
    "# Plain facts": (
        "tests/test_listings.py",
        "test_small_files_in_the_guide",
    ),
    '{"question": ': (
        "tests/test_listings.py",
        "test_small_files_in_the_guide",
    ),
    "logs/<lineage>/interpret/index.html": (
        "tests/jobs/test_interpret.py",
        "test_a_trained_model_is_interpreted",
    ),
    "python3 -m venv": (
        "tests/test_docs.py",
        "test_the_readme_sets_everything_up_in_two_commands",
    ),
    "echo 90_quick_test |": (
        "tests/test_docs.py",
        "test_the_readme_sets_everything_up_in_two_commands",
    ),
    ".venv/bin/torchrun --nproc_per_node=2 main.py": (
        "tests/parallel/test_ddp.py",
        "test_two_ranks_train_as_one_with_twice_the_accumulation",
    ),
    "torchrun --nproc_per_node=2 main.py": (
        "tests/parallel/test_ddp.py",
        "test_two_ranks_train_as_one_with_twice_the_accumulation",
    ),
    "torchrun --nnodes=2": ("tests/parallel/test_engines.py", "test_two_machines_train_as_one"),
    "exports/<lineage>/": ("tests/jobs/test_export.py", "test_what_an_export_leaves"),
    "import core": ("tests/test_api.py", "test_the_guides_lines_run"),
    "#!/bin/bash\n#SBATCH": ("tests/parallel/test_engines.py", "test_the_guides_slurm_script"),
}

HELD_BY = {words: f"{file}::{test}" for words, (file, test) in CHECKED.items()}


def what_holds(block: Block) -> str:
    """What keeps a block true, in words; nothing where nobody knows."""
    if made := re.fullmatch(r"made by: python docs/captures.py (\w+)", block.note):
        return "docs/captures.py" if made[1] in captures["CAPTURES"] else ""
    if block.language == "json":
        return "tests/test_docs.py::test_examples_are_presets"
    if block.info == "run=after-quick-test" or (block.language == "bash" and block.code in RUN):
        return "tests/test_docs.py::test_the_quick_test_and_the_code_of_the_guide"
    return next(
        (
            what
            for words, what in {**HELD_BY, **ILLUSTRATIONS}.items()
            if block.code.startswith(words)
        ),
        "",
    )


RUN = [
    block.code
    for block in fenced(GUIDE)
    if block.language == "bash" and not block.code.startswith((*CHECKED,))
]
"""Shell commands of the guide, in its order, which are run after the quick test."""


@pytest.mark.parametrize("text", [README, GUIDE], ids=["README", "guide"])
def test_every_block_is_made_run_checked_or_a_known_illustration(text: str) -> None:
    found = fenced(text)
    assert len(found) == len(re.findall(r"^ *```\w", text, re.MULTILINE))
    unknown = [block.code.split("\n")[0] for block in found if not what_holds(block)]
    assert not unknown, f"say in tests/test_listings.py what holds these blocks true: {unknown}"


def test_what_is_named_here_is_there() -> None:
    texts = README + GUIDE
    for words in (*CHECKED, *ILLUSTRATIONS):
        assert f"\n{words}" in texts, f"no block begins with {words}"
    for where in HELD_BY.values():
        file, _, name = where.partition("::")
        assert f"\ndef {name}(" in (ROOT / file).read_text(), f"there is no test {where}"


def test_chats_become_what_the_guide_shows() -> None:
    """Both forms of a row, the text they become, and what of it is learned."""
    rows = [json.loads(line) for line in block_of(GUIDE, '{"messages": [').splitlines()]
    documents = [conversation(next(iter(row.values())), "key") for row in rows]
    assert documents[0] is not None and all(
        d is not None and d.messages == documents[0].messages for d in documents
    )
    *shown, marks = block_of(GUIDE, "<|im_start|>user").splitlines()
    assert render_chat(documents[0].messages).splitlines() == shown
    tokenizer = build_tokenizer(TokenizerSettings(type="byte"), [])
    ((ids, learned, _),) = encode_chat(tokenizer, [documents[0].messages])
    assert (
        tokenizer.decode(ids[learned].tolist()) == f"{shown[-1]}\n"
        and marks == f"{'~' * len(shown[-1])} learned"
    )


def test_small_files_in_the_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "")  # put back at the end
    del os.environ["HF_TOKEN"]
    (tmp_path / ".env").write_text(block_of(GUIDE, "HF_TOKEN="))
    assert read_dotenv(tmp_path / ".env") == [] and os.environ["HF_TOKEN"] == "hf_your_token"
    tasks = ROOT / "benchmarks" / "tasks"
    assert (tasks / "python_facts.yaml").read_text() == block_of(GUIDE, "# Plain facts")
    assert block_of(GUIDE, '{"question": ') in (tasks / "python_facts.jsonl").read_text()


def test_commands_name_presets_that_there_are() -> None:
    named_ones = re.findall(r"(?:echo |printf ')(\w+)", README + GUIDE)
    assert named_ones and set(named_ones) <= PRESETS
