"""Rows of conversations: the forms that are read, and why another one is not."""

import json
from pathlib import Path
from typing import Any

import pytest

from core.data.documents import Document, SkipRow
from core.data.sources import build_source, open_sources
from core.data.sources.chat import ChatSettings, conversation
from core.errors import PresetError, SourceUnavailable
from core.preset.decode import decode_preset
from core.registry import Preset
from tests.data.test_chat import SAID, chat_rows
from tests.data.test_sources import write_jsonl, write_parquet
from tests.project import tiny_preset

ROWS = {
    "ShareGPT": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
    "a JSON string": json.dumps(SAID),
    "ShareGPT as a JSON string": json.dumps(
        [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    ),
    "columns of the other form": [{**message, "from": None, "value": None} for message in SAID],
    "a row inside a row": {"conversations": SAID, "id": 7},
    "parts of a message": [
        {"role": "user", "content": [{"type": "text", "text": "q", "image_url": None}]},
        SAID[1],
    ],
    "Gemini": [{"role": "user", "parts": [{"text": "q"}]}, {"role": "model", "parts": ["a"]}],
    "empty calls of tools": [
        {**message, "tool_calls": [], "function_call": None} for message in SAID
    ],
    "weights of one": [SAID[0], {**SAID[1], "weight": 1, "train": True}],
    "a weight of what is only read": [{**SAID[0], "weight": 0.5}, SAID[1]],
    **{
        f"{user} and {other}": [{"role": user, "content": "q"}, {"role": other, "content": "a"}]
        for user, other in [
            ("User", "Assistant"),
            ("human", "gpt"),
            ("Human", "bot"),
            ("prompter", "model"),
            (" USER ", "chatbot"),
        ]
    },
}


@pytest.mark.parametrize("form", ROWS)
def test_forms_of_a_row(form: str) -> None:
    assert conversation(ROWS[form], "k") == Document(
        "q\na", "k", messages=(("user", "q"), ("assistant", "a"))
    )


OTHER = "a message has a role that is none of system, user, assistant, nor another name for one"
TOOLS = "an assistant calls tools in it, which are not read"
FORMLESS = "it is no list of messages with a role and a content each"
REASONS = [
    ([SAID[0], {"role": "assistant", "content": None}], "a message has no content (null)"),
    ([{"role": "user", "content": None}, SAID[1]], "a message has no content (null)"),
    ([SAID[0], {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}], TOOLS),
    (
        [SAID[0], {"role": "assistant", "content": "", "function_call": {"name": "f"}}, SAID[1]],
        TOOLS,
    ),
    ([SAID[0], {"role": "tool", "content": "42"}, SAID[1]], TOOLS),
    (
        [
            SAID[0],
            {"from": "function_call", "value": "{}"},
            {"from": "observation", "value": "42"},
            SAID[1],
        ],
        TOOLS,
    ),
    ([SAID[0], {"role": "narrator", "content": "42"}, SAID[1]], OTHER),
    (
        [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {}},
                    {"type": "text", "text": "what?"},
                ],
            },
            SAID[1],
        ],
        "image",
    ),
    ([{"role": "user", "content": 7}, SAID[1]], "something else than text"),
    ([SAID[0], {**SAID[1], "weight": 0.5}], "a weight that is neither 0 nor 1"),
    ([SAID[0], {**SAID[1], "weight": float("nan")}], "a weight that is neither 0 nor 1"),
    ([SAID[0], {**SAID[1], "weight": "0"}], "a weight that is neither 0 nor 1"),
    ([SAID[0], {**SAID[1], "weight": 0}], "all that the assistant says has weight 0"),
    ([SAID[0]], "no assistant says anything in it"),
    ([SAID[0], {"role": "assistant", "content": " "}], "no assistant says anything in it"),
    ([{"content": "q"}, SAID[1]], "a message has no role"),
    ("plain text", "it is text, not a list of messages"),
    (None, "it has no messages"),
    ([], "it has no messages"),
    (["q", "a"], FORMLESS),
    ([["q", "a"]], FORMLESS),
    (7, FORMLESS),
]


@pytest.mark.parametrize("value, reason", REASONS)
def test_a_row_that_is_not_read_says_why(value: Any, reason: str) -> None:
    """Whole conversations: an answer to something that was left out would be no answer."""
    for row in (value, json.dumps(value)) if isinstance(value, list) else (value,):
        with pytest.raises(SkipRow) as skipped:
            conversation(row, "k")
        assert reason in str(skipped.value)


def test_a_system_message_of_sharegpt() -> None:
    document = conversation([{"from": "system", "value": "s"}, *ROWS["ShareGPT"]], "k")
    assert document is not None and document.messages == (
        ("system", "s"),
        ("user", "q"),
        ("assistant", "a"),
    )


def test_a_system_message_in_a_column_of_its_own(tmp_path: Path) -> None:
    said = [SAID[0], {**SAID[1], "weight": 0}, SAID[0], SAID[1]]
    rows = [{"messages": said, "before": before} for before in ("Be brief.", None, " ", 7)]
    write_jsonl(tmp_path / "x.jsonl", rows)
    source = build_source(ChatSettings(path="x.jsonl", system_field="before"), tmp_path, 1)
    source.open()
    plain = (("user", "q"), ("assistant", "a")) * 2
    expected = [((("system", "Be brief."), *plain), (2,)), (plain, (1,)), (plain, (1,))]
    assert [(document.messages, document.read_only) for document in source.stream({})] == expected
    with pytest.raises(SkipRow, match="its system message is no text"):
        conversation(said, "k", 7)


BAD = [
    None,
    7,
    "plain text",
    "7",
    "[" * 100_000,
    [],
    "[]",
    {},
    ["q", "a"],
    [{"role": "user", "content": "q"}],
    [{"role": "user", "content": "q"}, {"role": "assistant", "content": " \n"}],
    [{"role": "user", "content": None}, {"role": "assistant", "content": "a"}],
    [{"role": "user", "content": "q"}, {"role": "assistant"}],
    [{"role": ["assistant"], "content": "a"}],
    [{"from": {}, "value": "a"}],
    [{"content": "a"}],
    [{"role": "tool", "content": "x"}],
]


def test_bad_rows_are_counted_once(tmp_path: Path) -> None:
    """Rows that are no conversation, or hold nothing to learn, are passed over and told."""
    good = chat_rows(3, "x")
    bad = [{"messages": value} for value in BAD]
    write_jsonl(
        tmp_path / "x.jsonl",
        [good[0], b"{not json", b"", *bad, good[1], {"id": 1}, b"[1" * 99_999, good[2]],
    )
    source = build_source(ChatSettings(path="x.jsonl"), tmp_path, 1)
    source.open()
    for epoch in (0, 1):
        assert [d.text for d in source.stream({"epoch": epoch})] == [
            f"x {i}?\nx {i}!" for i in range(3)
        ]
    assert sum(int(note.split()[1]) for note in source.notes) == len(bad) + 3, source.notes
    assert source.notes[0] == "skipped 2 rows: no JSON (the first: x.jsonl#1)"


@pytest.mark.parametrize("origin", ["path", "dataset"])
def test_rows_that_are_not_read_are_counted_by_reason(tmp_path: Path, origin: str) -> None:
    """With the first of each; where none is left, they are why the source is refused."""
    calls = [
        SAID[0],
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "function": {"name": "f"}}],
        },
    ]
    mute = [SAID[0], {**SAID[1], "weight": 0}]
    write_jsonl(tmp_path / "calls.jsonl", [{"messages": calls}] * 30)
    write_jsonl(
        tmp_path / "some.jsonl",
        [{"messages": messages} for messages in (calls, SAID, mute, SAID, calls)],
    )
    with pytest.raises(
        SourceUnavailable,
        match=r"skipped 30 rows: an assistant calls tools in it.*the first: \S*#0",
    ):
        next(build_source(ChatSettings(**{origin: "./calls.jsonl"}), tmp_path, 1).stream({}))
    source = build_source(ChatSettings(**{origin: "./some.jsonl"}), tmp_path, 1)
    assert [document.text for document in source.stream({})] == ["q\na"] * 2
    (tools, weights) = source.notes
    assert (
        tools.startswith(
            "skipped 2 rows: an assistant calls tools in it, which are not read (the first: "
        )
        and "#0)" in tools
    )
    assert (
        weights.startswith("skipped 1 row: all that the assistant says has weight 0 (the first: ")
        and "#2)" in weights
    )


@pytest.mark.parametrize(
    "values", [[ROWS["ShareGPT"]] * 3, [ROWS["a JSON string"]] * 3], ids=["ShareGPT", "JSON"]
)
@pytest.mark.parametrize("origin", ["path", "dataset"])
def test_forms_in_parquet(tmp_path: Path, values: list, origin: str) -> None:
    write_parquet(
        tmp_path / "x.parquet", [{"id": i, "talk": value} for i, value in enumerate(values)]
    )
    settings = ChatSettings(**{origin: "./x.parquet"}, messages_field="talk")
    source = build_source(settings, tmp_path, 1)
    source.open()
    assert [d.messages for d in source.stream({})] == [(("user", "q"), ("assistant", "a"))] * 3


@pytest.mark.parametrize("origin", ["path", "dataset"])
@pytest.mark.parametrize("name", ["r.jsonl", "r.parquet"])
def test_missing_column_names_the_columns(tmp_path: Path, name: str, origin: str) -> None:
    (write_parquet if name.endswith("parquet") else write_jsonl)(
        tmp_path / name, [{"talk": SAID, "id": 1}]
    )
    _, failed = open_sources(
        [build_source(ChatSettings(**{origin: f"./{name}"}, name="s"), tmp_path, 1)]
    )
    told = failed["s"].partition('has no column "messages"; its columns are talk, id: ')[2]
    assert told.startswith('set "messages_field" to one of them;') and told.endswith(
        'of type "hf" with "fields" and "format"'
    )


def test_without_a_conversation_a_source_fails(tmp_path: Path) -> None:
    write_jsonl(
        tmp_path / "x.jsonl", [{"messages": [{"role": "user", "content": "nobody answers"}]}] * 2
    )
    (tmp_path / "y.txt").write_text("plain text is no conversation")
    with pytest.raises(SourceUnavailable, match=r"no text in its only file .* skipped 2 rows"):
        build_source(ChatSettings(path="x.jsonl"), tmp_path, 1).open()
    with pytest.raises(
        SourceUnavailable,
        match=r"y.txt is of no readable kind \(.jsonl .ndjson .json .csv .tsv .parquet, and",
    ):
        build_source(ChatSettings(path="y.txt"), tmp_path, 1).open()
    with pytest.raises(SourceUnavailable, match="no row of it holds a conversation in messages"):
        next(build_source(ChatSettings(dataset="./x.jsonl"), tmp_path, 1).stream({}))


@pytest.mark.parametrize(
    "section, problem",
    [
        ({}, "give one of them"),
        ({"path": "x.jsonl", "dataset": "a/b"}, "give one of them"),
        ({"path": "x.jsonl", "config": "en"}, '"config" and "split" choose from a "dataset"'),
        ({"path": "x.jsonl", "split": "test"}, '"config" and "split" choose from a "dataset"'),
        ({"dataset": "a/b", "text_field": "x"}, "unknown key"),
        ({"dataset": ""}, "at least 1 character"),
        ({"path": 3}, "valid string"),
    ],
)
def test_wrong_sections_are_reported_by_the_preset(section: dict, problem: str) -> None:
    with pytest.raises(PresetError) as error:
        decode_preset(
            tiny_preset(data={"sources": [{"type": "chat", **section}]}),
            Preset,
            "configs/x.json",
            "x",
        )
    assert problem in str(error.value) and "data.sources[0]" in str(error.value)


def test_names() -> None:
    assert ChatSettings(path="data/my chats.jsonl.gz").name == "my_chats"
    assert (
        ChatSettings(dataset="HuggingFaceH4/ultrachat_200k", config="en").name
        == "HuggingFaceH4_ultrachat_200k-en"
    )
    assert ChatSettings(path="x.jsonl", name="mine").name == "mine"
    again = ChatSettings.model_validate_json(ChatSettings(path="x.jsonl").model_dump_json())
    assert again == ChatSettings(path="x.jsonl")  # what a checkpoint keeps decodes again
