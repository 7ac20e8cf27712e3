"""Mistakes in presets: absurd numbers everywhere, files that are no presets, names that are none;
each told with what to do."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from core.bounds import Bounded
from core.data.sources.hf import HfSettings, _formatted
from core.data.tokenizer_build import build_tokenizer, read_tokenizer
from core.errors import PresetError, UserError
from core.file_names import file_name, is_file_name
from core.heads import HEADS
from core.jobs.compare import refuse_variants
from core.preset.decode import decode_preset, read_preset
from core.preset.settings import TokenizerSettings
from core.registry import Preset
from core.runtime import detect_runtime
from tests.project import tiny_preset

DATA = '"data": {"sources": ["pdf"]}'
ABSURD = ["NaN", "Infinity", "-Infinity", "1e400", "9" * 5000, "-" + "9" * 5000]


def told(folder: Path, text: str | bytes, stem: str = "a") -> list[str]:
    """What is wrong with a preset file."""
    path = folder / f"{stem}.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(PresetError) as caught:
        read_preset(path, Preset)
    assert str(path) in str(caught.value)
    return caught.value.problems


def good(folder: Path, text: str | bytes, stem: str = "a") -> Any:
    path = folder / f"{stem}.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_preset(path, Preset)


# numbers ------------------------------------------------------------------------------------------


def sections(cls: type[Bounded] = Bounded) -> Iterator[type[Bounded]]:
    """Every class a part of a preset is decoded to."""
    for each in cls.__subclasses__():
        if each.__module__.startswith("core."):
            yield each
        yield from sections(each)


@pytest.mark.parametrize("section", list(dict.fromkeys(sections())), ids=lambda cls: cls.__name__)
def test_no_key_takes_an_absurd_number(section: type[Bounded]) -> None:
    """Alone, in a list, in a schedule: also for a key that is added tomorrow."""
    for field in section.model_fields.values():
        for number in (float("nan"), float("inf"), float("-inf"), 10**400, -(10**400)):
            for value in (
                number,
                [number],
                [number, number],
                {"from": number, "to": number},
                [{"from": 1.0, "to": number}],
            ):
                with pytest.raises(ValueError, match="validation error"):
                    section.__pydantic_validator__.validate_json(
                        json.dumps({key_of(section, field): value, "path": "x", "type": "x"})
                    )


def key_of(section: type[Bounded], field: Any) -> str:
    return field.alias or next(name for name, each in section.model_fields.items() if each is field)


def test_absurd_numbers_are_refused_with_path_and_bounds_all_at_once(tmp_path: Path) -> None:
    for number in ABSURD:
        found = told(
            tmp_path,
            f"""{{"train": {{"learning_rate": {number}, "betas": [0.9, {number}],
                "max_steps": {number}, "seed": {number}}},
            "losses": [{{"type": "cross_entropy", "weight": {number}}},
                {{"type": "cosine", "temperature": {{"from": {number}, "to": 1}}}}],
            "model": {{"hidden_size": {number}}}, "generate": {{"temperature": {number}}},
            "seeds": [1, {number}],
            "data": {{"sources": ["pdf"], "source_weights": [{number}]}}}}""",
        )
        paths = [line.split("  ")[0] for line in found]
        assert set(paths) == {
            "train.learning_rate",
            "train.betas[1]",
            "train.max_steps",
            "train.seed",
            "losses[0].weight",
            "losses[1].temperature.from",
            "model.hidden_size",
            "generate.temperature",
            "seeds[1]",
            "data.source_weights[0]",
        }
        assert len(max(found, key=len)) < 200
    assert told(tmp_path, f'{{"train": {{"learning_rate": NaN}}, {DATA}}}') == [
        "train.learning_rate  NaN: input should be a finite number, above 0.0 and at most 100.0"
    ]
    assert told(tmp_path, f'{{"train": {{"max_steps": {"9" * 5000}}}, {DATA}}}') == [
        "train.max_steps  999999999999... (5,000 digits): input should be less than or equal to "
        "9007199254740991"
    ]


@pytest.mark.parametrize(
    ("sections", "path"),
    [
        ('"train": {"betas": [1, 1]}', "train.betas[0]"),
        ('"train": {"betas": [1.5, -1]}', "train.betas[1]"),
        ('"model": {"hidden_size": 10000000000}', "model.hidden_size"),
        ('"model": {"num_layers": 20000}', "model.num_layers"),
        ('"train": {"per_gpu_batch_size": 1099511627776}', "train.per_gpu_batch_size"),
        # a step of more tokens than the run has
        ('"train": {"per_gpu_batch_size": 1000000}', "train.per_gpu_batch_size"),
        ('"train": {"eps": 2.0}', "train.eps"),
        ('"generate": {"max_tokens": 1000000000000}', "generate.max_tokens"),
        (
            '"job": "compare", "variants": [{"name": "a"}, {"name": "b", "set": {"train": {"eps": '
            "1e400}}}]",
            "variants[1].set.train.eps",
        ),
    ],
)
def test_sizes_and_rates_have_bounds(sections: str, path: str, tmp_path: Path) -> None:
    assert path in [line.split("  ")[0] for line in told(tmp_path, f"{{{sections}, {DATA}}}")]


# files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ('{"a": 1,}', "Take out the comma"),
        ('{"a": [1, ]}', "Take out the comma"),
        ("{'a': 1}", "straight double quotes"),
        ("{“a”: 1}", "straight double quotes"),
        ('{"a": 1 // one\n}', "no comments"),
        ("# about\n{}", "no comments"),
        ('{"a": True}', "true, false and null"),
        ('{"a": .5}', "A number is written like"),
        ('{"a": 1_000}', "no _ in it"),
        ('{"a": 1 "b": 2}', "A comma is missing"),
        ('{"path": "C:\\data"}', "write \\\\ for a backslash"),
        ('{"a": "x\ny"}', "write \\n for a new line"),
        ('{"a": 1}}', "behind the closing bracket"),
        ('{"a": 1', "bracket is missing"),
        ("", "empty"),
    ],
)
def test_broken_json_says_where_and_what_to_write(text: str, advice: str, tmp_path: Path) -> None:
    (problem,) = told(tmp_path, text)
    assert problem.startswith("line ") and " column " in problem and advice in problem


def test_what_editors_of_other_systems_save_is_read(tmp_path: Path) -> None:
    text = f'{{"description": "é", {DATA}}}'
    for content in (
        b"\xef\xbb\xbf" + text.encode(),
        b"\xff\xfe" + text.encode("utf-16-le"),
        b"\xfe\xff" + text.encode("utf-16-be"),
    ):
        assert good(tmp_path, content).description == "é"
    assert "line 2 is no UTF-8 text" in told(tmp_path, b'{\n"a": "\xff"}')[0]


def test_a_name_that_is_no_utf_8_is_named(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.json"))
    path.write_text("{" + DATA + "}")
    with pytest.raises(
        PresetError, match=r"caf\?\.json(.|\n)*the file's name holds bytes that are no UTF-8"
    ):
        read_preset(path, Preset)


@pytest.mark.parametrize(
    "section", [{"type": "text", "path": ""}, {"type": "chat", "path": ["a.jsonl", ""]}]
)
def test_an_empty_path_is_not_the_whole_project(section: dict) -> None:
    with pytest.raises(PresetError, match=r"1 problem(.|\n)*would be the whole project"):
        decode_preset({"data": {"sources": [section]}}, Preset, "a", "a")
    decode_preset({"data": {"sources": [{**section, "path": "."}]}}, Preset, "a", "a")


def test_losses_of_no_weight_are_refused() -> None:
    """A schedule may be 0 somewhere, and one loss may be only reported, or rewarded; but something
    has to be learned."""

    def preset(*weights: Any, **others: Any) -> dict:
        losses = [
            {"type": "cross_entropy", "name": str(i), "weight": weight}
            for i, weight in enumerate(weights)
        ]
        return {"losses": losses, "data": {"sources": ["python_stdlib"]}, **others}

    for weights in ((0,), (-1,), (0, -0.5), ({"from": 0, "to": -1},)):
        with pytest.raises(PresetError, match="losses  none of them has a weight above 0"):
            decode_preset(preset(*weights), Preset, "a", "a")
    for weights in ((0, 1), (-1, 0.1), ({"from": 0, "to": 1},)):
        decode_preset(preset(*weights), Preset, "a", "a")
    for head in HEADS:
        decode_preset(preset(0, auxiliary={f"enable_{head}": True}), Preset, "a", "a")


def test_what_is_no_plain_file_is_never_opened(tmp_path: Path) -> None:
    """A pipe or a device would hang, or never end."""
    (tmp_path / "folder.json").mkdir()
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    (tmp_path / "link.json").symlink_to("gone")
    (tmp_path / "loop.json").symlink_to("loop.json")
    (tmp_path / "large.json").write_bytes(b" " * 1_000_001)
    for stem, why in (
        ("folder", "a folder"),
        ("pipe", "no plain file"),
        ("zero", "no plain file"),
        ("link", "a link to gone"),
        ("loop", "a link to loop.json"),
        ("large", "1,000,001 bytes"),
        ("none", "No such file"),
    ):
        with pytest.raises(PresetError, match=why):
            read_preset(tmp_path / f"{stem}.json", Preset)
        with pytest.raises(PresetError, match=f"{why}|is no preset"):
            good(tmp_path, json.dumps({"extends": stem}), "child")


def test_keys_and_texts_that_no_file_should_hold(tmp_path: Path) -> None:
    """All of them, with their paths, beside whatever else is wrong."""
    text = (
        '{"train": {"seed": 1, "seed": 2, "runs": 0}, "name": "a\\u0000", "description": '
        '"\\ud800", "lineage": "a/b", ' + DATA + "}"
    )
    assert [line.split("  ")[0] for line in told(tmp_path, text)] == [
        "train.seed",
        "name",
        "description",
        "lineage",
        "train.runs",
    ]
    assert "nested too deep" in told(tmp_path, "[" * 990 + "]" * 990)[0]
    for parent in ("x" * 300, "a\\u0000b", "../" * 40, ""):
        assert told(tmp_path, f'{{"extends": "{parent}"}}')


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ('"seeds": [{}]', "seeds[0]  {}: input should be a valid integer"),
        ('"seeds": [1, 1, [2]]', "seeds[2]  [2]: input should be a valid integer"),
        ('"losses": ["crossentropy"]', 'did you mean {"type": "cross_entropy"}?'),
        ('"losses": ["cosine"]', 'a loss is a section: {"type": "cosine"}'),
        ('"losses": [{"type": "crossentropy"}]', 'did you mean "cross_entropy"?'),
        ('"losses": "cosine"', 'write ["cosine"]'),
        ('"model": "gpt2"', 'a model is a section: {"type": "gpt2"}'),
        ('"train": {"max_steps": "100"}', "write 100, without quotes"),
        ('"train": {"max_steps": 100.0}', "write 100"),
        ('"train": {"max_steps": "1e3"}', "write 1000, without quotes"),
        ('"train": {"learning_rate": "3e-4"}', "write 3e-4, without quotes"),
        ('"train": {"max_steps": true}', "input should be a valid integer"),
        ('"train": {"eval_at_start": "true"}', "write true, without quotes"),
        ('"train": {"eval_at_start": "No"}', "write false, without quotes"),
        ('"train": {"eval_at_start": 1}', "input should be a valid boolean; write true"),
        ('"train": {"optimizer": "adam"}', 'did you mean "adamw"?'),
        ('"job": "trian"', 'did you mean "train"?'),
        ('"train": {"lr": 1}', 'did you mean "learning_rate"?'),
        ('"learning_rate": 1', 'did you mean "train.learning_rate"?'),
        ('"batch_size": 1', 'did you mean "train.per_gpu_batch_size"?'),
        ('"hidden_size": 1', 'did you mean "model.hidden_size"?'),
        ('"tokenizer": {"eos_token": 5}', "tokenizer.eos_token  unknown key"),
        ('"tokenize": {"output": ""}', "tokenize.output"),
        ('"tokenize": {"output": "."}', "is no folder of its own"),
        ('"tokenize": {"output": "../.."}', "is no folder of its own"),
        ('"tokenize": {"output": "/"}', "is no folder of its own"),
    ],
)
def test_each_mistake_has_path_value_and_fix(sections: str, line: str, tmp_path: Path) -> None:
    problem, *_ = told(tmp_path, f"{{{sections}, {DATA}}}")
    assert line in problem


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("./my_text", 'local files are a section: {"type": "text", "path": "./my_text"}'),
        ("texts/*.txt", '{"type": "text", "path": "texts/*.txt"}'),
        ("~/papers.pdf", '{"type": "pdf", "path": "~/papers.pdf"}'),
        ("me/mine", '{"type": "hf", "dataset": "me/mine"}'),
        ("wikipdia", 'did you mean "wikipedia"?'),
    ],
)
def test_a_path_as_a_source_is_told_how_to_write_it(source: str, line: str, tmp_path: Path) -> None:
    (problem,) = told(tmp_path, json.dumps({"data": {"sources": [source]}}))
    assert problem.startswith(f'data.sources[0]  "{source}"') and line in problem
    (problem,) = told(tmp_path, '{"data": {"sources": ["pdf"], "weights": [1]}}')
    assert problem == 'data.weights  unknown key; did you mean "source_weights"?'


@pytest.mark.parametrize(
    "form",
    [
        "{x:d}",
        "{x!r}",
        "{text:{b.__class__}}",
        "{text:>99999}",
        "{text.__class__}",
        "{text[0]}",
        "{}",
        "{0}",
        "{x",
        "none",
    ],
)
def test_a_format_holds_names_of_fields_and_nothing_else(form: str, tmp_path: Path) -> None:
    """No attributes, and no widths, which would fill the memory with spaces."""
    source = {"type": "hf", "dataset": "a/b", "fields": ["x", "text"], "format": form}
    (problem,) = told(tmp_path, json.dumps({"data": {"sources": [source]}}))
    assert problem.startswith("data.sources[0]  ") and '"format"' in problem


def test_a_column_may_be_called_anything() -> None:
    settings = HfSettings(
        dataset="a/b", fields=["a.b", "0", "x[1]"], format="{{}}{a.b}-{0}-{x[1]}{a.b}"
    )
    assert _formatted(settings.format or "", {"a.b": "A", "0": 5, "x[1]": None}) == "{}A-5-NoneA"


# names --------------------------------------------------------------------------------------------


def test_a_file_of_any_name_has_a_lineage_that_every_disk_takes(tmp_path: Path) -> None:
    names = ["my preset", "my_preset", "Größe", "日本", "中国", "..a", "con", "x" * 200, "a.", "-"]
    lineages = [good(tmp_path, f"{{{DATA}}}", name).lineage for name in names]
    assert len(set(lineages)) == len(names) and all(map(is_file_name, lineages))
    assert lineages[1] == "my_preset" and lineages[0].startswith("my_preset-")
    assert file_name("cafe\u0301") == file_name("caf\u00e9")  # one name, as two systems write it


@pytest.mark.parametrize(
    "lineage",
    [
        "..",
        ".",
        "...",
        ".hidden",
        "a.",
        "a b",
        "é",
        "CON",
        "nul.txt",
        "x" * 151,
        "a/b",
        "../x",
        "a\\\\b",
    ],
)
def test_a_lineage_never_leaves_its_folder(lineage: str, tmp_path: Path) -> None:
    (problem,) = told(tmp_path, f'{{"lineage": "{lineage}", {DATA}}}')
    assert problem.startswith("lineage  ")


def test_folders_without_ascii_letters_have_names_of_their_own(tmp_path: Path) -> None:
    folders = [{"type": "text", "path": name} for name in ("日本", "中国", "./my texts")]
    preset = good(tmp_path, json.dumps({"data": {"sources": folders}}))
    assert [source.name for source in preset.data.sources] == ["日本", "中国", "my_texts"]


# comparisons --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "told"),
    [
        ("cross_entropi", 'did you mean "cross_entropy"?'),
        ("loss: cross_entropy", ""),
        ("loss: cosine", "did you mean"),
        ("nll_h12", "they are "),  # of the harmonic loss alone
        ("head: draft.first", ""),
        ("head: planner.gain", "is none of the numbers"),
        ("held out of: pdf", "is none of the numbers"),  # one source: it is the loss itself
        ("bits_per_byte", ""),
    ],
)
def test_a_metric_that_nothing_measures_is_told_before_the_first_trial(
    metric: str, told: str
) -> None:
    draft = {"auxiliary": {"enable_draft": True}}
    data = {
        "job": "compare",
        "compare": {"metric": metric},
        "variants": [{"name": "a"}, {"name": "b", "set": draft}],
    }
    data |= {"data": {"sources": ["pdf"]}}
    if not told:
        assert decode_preset(data, Preset, "p", "p").compare.metric == metric
        return
    with pytest.raises(PresetError) as caught:
        decode_preset(data, Preset, "p", "p")
    (problem,) = caught.value.problems
    assert problem.startswith(f'compare.metric  "{metric}"') and told in problem


def test_every_variant_that_cannot_be_trained_is_told_before_the_first_is(tmp_path: Path) -> None:
    """Not after the hours of those before it: heads, losses, names of parameters, tokenizers."""
    sets = {
        "fine": {"auxiliary": {"enable_policy": True}},
        "planner": {"auxiliary": {"enable_planner": True}},
        "harmonic": {"losses": [{"type": "harmonic"}]},
        "frozen": {"train": {"trainable": ["layers.7"]}},
        "memory": {"auxiliary": {"enable_memory": True, "memory_tokens_after": 500}},
    }
    variants = [{"name": name, "set": own} for name, own in sets.items()]
    preset = decode_preset(tiny_preset(job="compare", variants=variants), Preset, "t", "t")
    with pytest.raises(UserError) as caught:
        refuse_variants(preset, tmp_path, detect_runtime())
    message = str(caught.value)
    for name, why in (
        ("planner", "builds on heads"),
        ("harmonic", "needs distances"),
        ("frozen", "layers.7"),
        ("memory", "rows of"),
    ):
        assert f"  {name}: " in message and why in message
    assert "fine: " not in message and not any(tmp_path.iterdir())


@pytest.mark.parametrize("token", [5, ["</s>"], {"content": 5}, "gone", True])
def test_an_end_token_that_is_none_is_told(token: Any, tmp_path: Path) -> None:
    build_tokenizer(TokenizerSettings(type="byte"), []).save(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}))
    with pytest.raises(UserError, match="eos_token"):
        read_tokenizer(tmp_path / "tokenizer.json")
