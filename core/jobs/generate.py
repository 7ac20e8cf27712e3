"""The `generate` job: a trained model answers what is typed, or continues it, as it is typed.

In:    a preset: its `init_from` or its lineage's newest checkpoint, its section `generate`; lines
       of standard input
Out:   answers on the screen; nothing is written
State: the conversation, and what commands have changed

    terminal   a prompt line; commands such as /temperature 0.7; Ctrl-C stops an answer, Ctrl-D
               leaves
    pipe       each line after the preset's name is a prompt of its own; without one,
               `generate.prompts` are

Under torchrun rank 0 does it alone.
"""

import difflib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from core.checkpoint.weights import preview_weights
from core.data.chat import START, STOP, chat_note, encode_turn, read_turn
from core.data.documents import ASSISTANT, Messages
from core.data.tokenizer import MASK
from core.errors import UserError
from core.generation.engine import Row, Wish, document_start, stream
from core.generation.fill_mask import fill
from core.preset.settings import MASKED_TOKENS, NEXT_TOKEN, objective_of
from core.randomness import derive_seed
from core.runtime import Runtime
from core.trained import Trained, load_trained
from core.ui import text
from core.ui.generate import TalkView
from core.ui.plain import NOT_CAUSAL
from core.voice import voice_of


def generate(
    preset: Any, runtime: Runtime, parallel: Any, root: Path, started: float, console: Any
) -> None:
    """Answer until the input ends. Raises UserError when there is no model to ask."""
    if parallel.rank != 0:  # nor does it wait: a collective operation has a clock running
        return
    view = TalkView(console)
    trained = load_trained(preset, root, runtime)
    for note in trained.notes:
        view.tell(f"note  {note}")
    model = trained.preset.model
    parameters = sum(p.numel() for p in trained.model.parameters())
    step = "" if trained.step is None else f", step {trained.step:,}"
    view.tell(
        f"{trained.where}{step}: {model.type}, {text.count(parameters)} parameters, sees "
        f"{model.seq_length:,} tokens"
    )
    speaker = speaker_of(trained)
    view.tell(speaker.about)
    if view.interactive:
        talk(speaker, view)
    else:
        answer_all(speaker, preset.generate.prompts, view)
    if told := speaker.account():
        view.tell(told)


def preview_generate(preset: Any, root: Path) -> list[str]:
    """What the menu tells before the job is chosen."""
    try:
        weights = preview_weights(preset.init_from or preset.lineage, root)
    except UserError as error:
        return [f"cannot start yet: {error}"]
    wanted = preset.generate
    if objective_of(preset.model) == MASKED_TOKENS:
        return [f"fills in {MASK} with {weights}"]
    how = (
        f"temperature {wanted.temperature:g}, top_p {wanted.top_p:g}, up to "
        f"{wanted.max_tokens:,} tokens"
    )
    return [f"talks with {weights}", how + ", by its planner" * wanted.planner]


def answer_all(speaker: "Speaker", prompts: list[str], view: TalkView) -> None:
    """Each line of a pipe; without one, each prompt of the preset."""
    count = 0
    for count, line in enumerate(view.given(), 1):
        answer(speaker.alone(line, count - 1), view)
    if count == 0:
        for number, prompt in enumerate(prompts):
            view.echo(prompt)
            answer(speaker.alone(prompt, number, of_preset=True), view)


# the terminal -------------------------------------------------------------------------------------


def talk(speaker: "Speaker", view: TalkView) -> None:
    """Lines and answers, until somebody leaves."""
    view.tell("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves")
    while True:
        try:
            line = view.ask()
            if line is None or line.strip() == "/quit":
                return
            if line.startswith("/"):
                for each in obey(speaker, line).splitlines():
                    view.tell(each)
            elif line.strip():
                answer(speaker.answer(line), view)
        except KeyboardInterrupt:  # while an answer was made, or at the prompt
            view.interrupted("(stopped; Ctrl-D leaves)")


def answer(pieces: Iterator[str], view: TalkView) -> None:
    for piece in pieces:
        view.show(piece)
    view.end_line()


@dataclass(frozen=True)
class Knob:
    """What a command sets: a number, or 1 and 0 for on and off."""

    field: str
    read: Callable[[str], float]
    fits: Callable[[float], bool]
    takes: str
    example: str
    help: str


KNOBS = {
    "temperature": Knob(
        "temperature",
        float,
        lambda x: 0 <= x < math.inf,
        "a number from 0 up",
        "0.7",
        "how freely tokens are drawn; 0 takes the likeliest each time",
    ),
    "top_p": Knob(
        "top_p",
        float,
        lambda x: 0 < x <= 1,
        "a number above 0 and up to 1",
        "0.9",
        "draw from the likeliest tokens that together reach this probability",
    ),
    "max": Knob(
        "max_tokens",
        int,
        lambda x: x >= 1,
        "a whole number from 1 up",
        "200",
        "tokens an answer may have",
    ),
    "seed": Knob(
        "seed",
        int,
        lambda x: True,
        "a whole number",
        "1",
        "the same seed and the same lines give the same answers",
    ),
}
SWITCH = ("off", "on")
PLANNER = Knob(
    "planner",
    SWITCH.index,
    lambda x: True,
    "on or off",
    "on",
    "draw from the planner's distribution, or the model's own",
)
DRAFT = Knob(
    "draft",
    int,
    lambda x: x >= 0,
    "a whole number from 0 up",
    "2",
    "tokens guessed ahead of each pass of the model; 0: none. It says the same",
)
OTHERS = {
    "reset": "forget the conversation",
    "help": "this list",
    "quit": "leave, as Ctrl-D does; Ctrl-C stops an answer",
}


def obey(speaker: "Speaker", line: str) -> str:
    """Do what a line that begins with / asks for; returns what is told."""
    name, _, value = line[1:].strip().partition(" ")
    value, known = value.strip(), [*speaker.knobs, *OTHERS]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean /{near[0]}?" if near else "/help lists those there are."
        return (
            f"there is no command /{name}; {hint} To say it to the model, begin the line with "
            "a space."
        )
    if name in OTHERS:
        if value:
            return f"/{name} takes nothing after it"
        return _help(speaker) if name == "help" else speaker.reset()
    knob = speaker.knobs[name]
    if not value:
        return f"{name} is {speaker.manner(knob.field)}; /{name} takes {knob.takes}"
    try:
        number = knob.read(value)
    except ValueError:
        number = math.nan
    if math.isnan(number) or not knob.fits(number):
        return f'/{name} takes {knob.takes}, not "{value}"; it stays {speaker.manner(knob.field)}'
    speaker.change(knob.field, number)
    return f"{name} is {speaker.manner(knob.field)} now"


def _help(speaker: "Speaker") -> str:
    lines = [
        (f"/{name} {knob.example}", f"{knob.help} (now {speaker.manner(knob.field)})")
        for name, knob in speaker.knobs.items()
    ]
    lines += [(f"/{name}", what) for name, what in OTHERS.items()]
    return "\n".join(
        [
            *(f"{left:18} {right}" for left, right in lines),
            "A line that begins with a space is no command.",
        ]
    )


# who answers --------------------------------------------------------------------------------------


class Speaker:
    """Continues what is typed, as a document that begins with it."""

    about = "continues what you type"

    def __init__(self, trained: Trained):
        """Raises UserError when the preset asks for a planner that was not trained."""
        self._trained, self._tokenizer = trained, trained.tokenizer
        self._context = trained.preset.model.seq_length
        self._voice, self._planner, told = voice_of(trained)
        self._wish = Wish.of(trained.preset.generate)
        self._seed = trained.preset.train.seed
        self._answers = 0  # with this seed
        self._ends: tuple[int, ...] = ()
        if objective_of(trained.preset.model) == NEXT_TOKEN and not trained.model.is_causal:
            self.about += f"; {NOT_CAUSAL}"
        self.about = "; ".join([self.about, *told])
        self.knobs = (
            KNOBS
            | ({"planner": PLANNER} if self._planner else {})
            | ({"draft": DRAFT} if self._voice.drafter else {})
        )

    def answer(self, line: str) -> Iterator[str]:
        """What the model says after a line, piece by piece."""
        return self._said(self._row(document_start(self._tokenizer, line), self._number()))

    def alone(self, prompt: str, number: int, of_preset: bool = False) -> Iterator[str]:
        """The same after a prompt that stands for itself; `number` tells its seed from others'."""
        return self._said(self._row(document_start(self._tokenizer, prompt), number))

    def reset(self) -> str:
        return "there is no conversation to forget: every line stands for itself"

    def manner(self, field: str) -> float | str:
        """What a command can set, as it is."""
        if field == "planner":
            return SWITCH[self._voice.guide is not None]
        if field == "draft" and self._voice.drafter is not None:
            return self._voice.drafter.tokens
        return self._seed if field == "seed" else getattr(self._wish, field)

    def change(self, field: str, value: float) -> None:
        """The next answer is made so."""
        if field == "planner":
            self._voice = replace(self._voice, guide=self._planner if value else None)
        elif field == "seed":
            self._seed, self._answers = int(value), 0
        elif field == "draft" and self._voice.drafter is not None:
            self._voice.drafter.tokens = int(value)
        else:
            self._wish = replace(self._wish, **{field: value})

    def account(self) -> str | None:
        """What is told when the session ends."""
        return None if self._voice.drafter is None else self._voice.drafter.account()

    def _number(self) -> int:
        self._answers += 1
        return self._answers - 1

    def _row(self, ids: list[int], number: int) -> Row:
        return Row(
            self._tokenizer,
            ids,
            self._wish,
            derive_seed(self._seed, "generate", number),
            self._ends,
        )

    def _said(self, row: Row) -> Iterator[str]:
        return stream(self._voice, row)


class Chatter(Speaker):
    """Answers as the assistant of a conversation: of what fits into the context, or of all of it,
    with a memory."""

    about = "answers you in a conversation"

    def __init__(self, trained: Trained):
        super().__init__(trained)
        self._messages: Messages = ()
        if (stop := self._tokenizer.special_id(STOP)) is not None:
            self._ends = (stop,)
        if note := chat_note(self._tokenizer):
            self.about += f"; {note}"
            self._wish = replace(self._wish, until=(*self._wish.until, STOP, START))

    def answer(self, line: str) -> Iterator[str]:
        self._messages = (*self._messages, ("user", line))
        row = self._row(self._fitted(), self._number())
        try:
            yield from self._said(row)
        finally:  # also when it was stopped
            self._messages = (*self._messages, (ASSISTANT, row.text))

    def alone(self, prompt: str, number: int, of_preset: bool = False) -> Iterator[str]:
        messages = (read_turn(prompt) if of_preset else None) or (("user", prompt),)
        return self._said(self._row(self._ids(messages), number))

    def reset(self) -> str:
        self._messages = ()
        return "the conversation is forgotten"

    def _ids(self, messages: Messages) -> list[int]:
        return [self._tokenizer.eos_id, *encode_turn(self._tokenizer, messages)]

    def _fitted(self) -> list[int]:
        """The conversation's tokens; while they and an answer do not fit into the context, its
        oldest exchange is forgotten, but for a memory, which compresses it."""
        if self._voice.memory is not None:
            return self._ids(self._messages)
        while (
            len(ids := self._ids(self._messages)) + self._wish.max_tokens > self._context
            and len(self._messages) > 2
        ):
            self._messages = self._messages[2:]
        return ids


class BlankFiller(Speaker):
    """Of a model of masked tokens: tells what is likeliest behind each [MASK]."""

    about = f"fills in each {MASK} of what you type; a line without one gets it at its end"

    def __init__(self, trained: Trained):
        super().__init__(trained)
        self.knobs = {}

    def answer(self, line: str) -> Iterator[str]:
        return self.alone(line, 0)

    def alone(self, prompt: str, number: int, of_preset: bool = False) -> Iterator[str]:
        yield fill(self._trained.model, self._tokenizer, prompt, self._context)[1]


def speaker_of(trained: Trained) -> Speaker:
    """Who answers with this model."""
    wanted = trained.preset.generate.chat
    if objective_of(trained.preset.model) == MASKED_TOKENS:
        return BlankFiller(trained)
    chats = wanted == "always" or (wanted == "auto" and chat_note(trained.tokenizer) is None)
    return Chatter(trained) if chats else Speaker(trained)
