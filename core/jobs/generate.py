"""The `generate` job: a trained model answers each line that is typed, or continues it, and streams
its text to the screen.

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
from typing import Any, TextIO

from core.checkpoint.weights import preview_weights
from core.data.chat import START, STOP, chat_note, encode_turn, read_turn
from core.data.documents import ASSISTANT, Messages
from core.data.tokenizer import MASK
from core.errors import UserError
from core.generation.engine import GenerationRow, document_start, stream_text
from core.generation.fill_mask import fill_masks
from core.generation.sampling import SamplingParams
from core.parallel.protocol import Parallel
from core.preset.base import PresetBase
from core.preset.settings import MASKED_TOKENS, NEXT_TOKEN, objective_of
from core.randomness import derive_seed
from core.runtime import Runtime
from core.trained import Trained, build_generator, load_trained
from core.ui import text
from core.ui.generate import GenerateView
from core.ui.plain import NOT_CAUSAL


def generate(
    preset: PresetBase,
    runtime: Runtime,
    parallel: Parallel,
    root: Path,
    started: float,
    console: TextIO,
) -> None:
    """Answer until the input ends. Raises UserError when there is no model to ask."""
    if parallel.rank != 0:  # nor does it wait: a collective operation has a clock running
        return
    view = GenerateView(console)
    trained = load_trained(preset, root, runtime)
    for note in trained.notes:
        view.tell(f"note  {note}")
    view.tell(_describe(trained))
    session = open_session(trained)
    view.tell(session.description)
    if view.interactive:
        talk(session, view)
    else:
        answer_all(session, preset.generate.prompts, view)
    if summary := session.draft_summary():
        view.tell(summary)


def preview_generate(preset: PresetBase, root: Path) -> list[str]:
    """Return the menu's lines on the job."""
    try:
        weights = preview_weights(preset.init_from or preset.lineage, root)
    except UserError as error:
        return [f"cannot start yet: {error}"]
    if objective_of(preset.model) == MASKED_TOKENS:
        return [f"fills in {MASK} with {weights}"]
    settings = preset.generate
    sampling = f"temperature {settings.temperature:g}, top_p {settings.top_p:g}"
    planner = ", by its planner" if settings.planner else ""
    return [f"talks with {weights}", f"{sampling}, up to {settings.max_tokens:,} tokens{planner}"]


def _describe(trained: Trained) -> str:
    model = trained.preset.model
    step = "" if trained.step is None else f", step {trained.step:,}"
    parameters = text.count(sum(p.numel() for p in trained.model.parameters()))
    return (
        f"{trained.where}{step}: {model.type}, {parameters} parameters, "
        f"sees {model.seq_length:,} tokens"
    )


def answer_all(session: "Session", prompts: list[str], view: GenerateView) -> None:
    """Answer each line of a pipe; without one, each prompt of the preset."""
    count = 0
    for count, line in enumerate(view.piped_lines(), 1):
        show(session.answer_prompt(line, count - 1), view)
    if count == 0:
        for number, prompt in enumerate(prompts):
            view.echo(prompt)
            show(session.answer_prompt(prompt, number, of_preset=True), view)


def show(pieces: Iterator[str], view: GenerateView) -> None:
    """Show an answer as it comes."""
    for piece in pieces:
        view.show(piece)
    view.end_line()


# the terminal -------------------------------------------------------------------------------------


def talk(session: "Session", view: GenerateView) -> None:
    """Answer what is typed, until the user leaves."""
    view.tell("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves")
    while True:
        try:
            line = view.ask()
            if line is None or line.strip() == "/quit":
                return
            if line.startswith("/"):
                for reply in run_command(session, line).splitlines():
                    view.tell(reply)
            elif line.strip():
                show(session.answer(line), view)
        except KeyboardInterrupt:  # while an answer was made, or at the prompt
            view.interrupted("(stopped; Ctrl-D leaves)")


@dataclass(frozen=True)
class Command:
    """A command that sets a number; 1 and 0 stand for on and off.

    setting   what it sets, as `Session.setting` and `Session.change` name it
    parse     the value that was typed; raises ValueError
    accepts   which values those are, in words
    """

    setting: str
    parse: Callable[[str], float]
    is_valid: Callable[[float], bool]
    accepts: str
    example: str
    help: str


SWITCH = ("off", "on")
COMMANDS = {
    "temperature": Command(
        setting="temperature",
        parse=float,
        is_valid=lambda x: 0 <= x < math.inf,
        accepts="a number from 0 up",
        example="0.7",
        help="how freely tokens are drawn; 0 takes the likeliest each time",
    ),
    "top_p": Command(
        setting="top_p",
        parse=float,
        is_valid=lambda x: 0 < x <= 1,
        accepts="a number above 0 and up to 1",
        example="0.9",
        help="draw from the likeliest tokens that together reach this probability",
    ),
    "max": Command(
        setting="max_tokens",
        parse=int,
        is_valid=lambda x: x >= 1,
        accepts="a whole number from 1 up",
        example="200",
        help="tokens an answer may have",
    ),
    "seed": Command(
        setting="seed",
        parse=int,
        is_valid=lambda x: True,
        accepts="a whole number",
        example="1",
        help="the same seed and the same lines give the same answers",
    ),
}
PLANNER_COMMAND = Command(
    setting="planner",
    parse=SWITCH.index,
    is_valid=lambda x: True,
    accepts="on or off",
    example="on",
    help="draw from the planner's distribution, or the model's own",
)
DRAFT_COMMAND = Command(
    setting="draft",
    parse=int,
    is_valid=lambda x: x >= 0,
    accepts="a whole number from 0 up",
    example="2",
    help="tokens guessed ahead of each pass of the model; 0: none. The text stays the same",
)
ACTIONS = {
    "reset": "forget the conversation",
    "help": "this list",
    "quit": "leave, as Ctrl-D does; Ctrl-C stops an answer",
}


def run_command(session: "Session", line: str) -> str:
    """Do what a line that begins with / asks for; return the reply."""
    name, _, value = line[1:].strip().partition(" ")
    value = value.strip()
    if name in ACTIONS:
        if value:
            return f"/{name} takes nothing after it"
        return _help(session) if name == "help" else session.reset()
    if name not in session.commands:
        return _unknown_command(session, name)
    command = session.commands[name]
    current = session.setting(command.setting)
    if not value:
        return f"{name} is {current}; /{name} takes {command.accepts}"
    try:
        number = command.parse(value)
    except ValueError:
        number = math.nan
    if math.isnan(number) or not command.is_valid(number):
        return f'/{name} takes {command.accepts}, not "{value}"; it stays {current}'
    session.change(command.setting, number)
    return f"{name} is {session.setting(command.setting)} now"


def _unknown_command(session: "Session", name: str) -> str:
    near = difflib.get_close_matches(name, [*session.commands, *ACTIONS], n=1)
    hint = f"did you mean /{near[0]}?" if near else "/help lists those there are."
    return (
        f"there is no command /{name}; {hint} To say it to the model, begin the line with a space."
    )


def _help(session: "Session") -> str:
    lines = []
    for name, command in session.commands.items():
        current = session.setting(command.setting)
        lines.append((f"/{name} {command.example}", f"{command.help} (now {current})"))
    lines += [(f"/{name}", description) for name, description in ACTIONS.items()]
    table = [f"{left:18} {right}" for left, right in lines]
    return "\n".join([*table, "A line that begins with a space is no command."])


# sessions -----------------------------------------------------------------------------------------


class Session:
    """Continues each line, as a document that begins with it."""

    description = "continues what you type"

    def __init__(self, trained: Trained):
        """Raises UserError when the preset asks for a planner that was not trained."""
        preset = trained.preset
        self._trained, self._tokenizer = trained, trained.tokenizer
        options = build_generator(trained)
        self._generator, self._planner = options.generator, options.planner
        self._params = SamplingParams.from_settings(preset.generate)
        self._seed = preset.train.seed
        self._answers = 0  # with this seed
        self._ends: tuple[int, ...] = ()
        notes = list(options.notes)
        if objective_of(preset.model) == NEXT_TOKEN and not trained.model.is_causal:
            notes.insert(0, NOT_CAUSAL)
        self.description = "; ".join([self.description, *notes])
        self.commands = dict(COMMANDS)
        if self._planner is not None:
            self.commands["planner"] = PLANNER_COMMAND
        if self._generator.drafter is not None:
            self.commands["draft"] = DRAFT_COMMAND

    def answer(self, line: str) -> Iterator[str]:
        """Yield the text after a line, piece by piece."""
        row = self._row(document_start(self._tokenizer, line), self._next_number())
        return stream_text(self._generator, row)

    def answer_prompt(self, prompt: str, number: int, of_preset: bool = False) -> Iterator[str]:
        """Yield the text after a prompt that stands for itself. The seed follows from `number`."""
        row = self._row(document_start(self._tokenizer, prompt), number)
        return stream_text(self._generator, row)

    def reset(self) -> str:
        return "there is no conversation to forget: every line stands for itself"

    def setting(self, name: str) -> float | str:
        """Return the current value of what a command can set."""
        if name == "planner":
            return SWITCH[self._generator.guide is not None]
        if name == "draft" and self._generator.drafter is not None:
            return self._generator.drafter.tokens
        return self._seed if name == "seed" else getattr(self._params, name)

    def change(self, name: str, value: float) -> None:
        """Set it, from the next answer on."""
        if name == "planner":
            guide = self._planner if value else None
            self._generator = replace(self._generator, guide=guide)
        elif name == "seed":
            self._seed, self._answers = int(value), 0
        elif name == "draft" and self._generator.drafter is not None:
            self._generator.drafter.tokens = int(value)
        else:
            changes: dict[str, Any] = {name: value}
            self._params = replace(self._params, **changes)

    def draft_summary(self) -> str | None:
        """Return one line on how well drafts did; None where there were none."""
        return None if self._generator.drafter is None else self._generator.drafter.summary()

    def _next_number(self) -> int:
        self._answers += 1
        return self._answers - 1

    def _row(self, ids: list[int], number: int) -> GenerationRow:
        seed = derive_seed(self._seed, "generate", number)
        return GenerationRow(self._tokenizer, ids, self._params, seed, self._ends)


class ChatSession(Session):
    """Answers as the assistant of a conversation: of what fits into the context, or of all of it,
    with a memory."""

    description = "answers you in a conversation"

    def __init__(self, trained: Trained):
        super().__init__(trained)
        self._messages: Messages = ()
        if (stop := self._tokenizer.special_id(STOP)) is not None:
            self._ends = (stop,)
        if note := chat_note(self._tokenizer):
            self.description += f"; {note}"
            self._params = replace(self._params, until=(*self._params.until, STOP, START))

    def answer(self, line: str) -> Iterator[str]:
        self._messages = (*self._messages, ("user", line))
        row = self._row(self._fitting_ids(), self._next_number())
        try:
            yield from stream_text(self._generator, row)
        finally:  # also when it was stopped
            self._messages = (*self._messages, (ASSISTANT, row.text))

    def answer_prompt(self, prompt: str, number: int, of_preset: bool = False) -> Iterator[str]:
        messages = (read_turn(prompt) if of_preset else None) or (("user", prompt),)
        return stream_text(self._generator, self._row(self._ids(messages), number))

    def reset(self) -> str:
        self._messages = ()
        return "the conversation is forgotten"

    def _ids(self, messages: Messages) -> list[int]:
        return [self._tokenizer.eos_id, *encode_turn(self._tokenizer, messages)]

    def _fitting_ids(self) -> list[int]:
        """Return the conversation's tokens. While they and an answer do not fit into the context,
        its oldest exchange is forgotten, unless a memory compresses it."""
        ids = self._ids(self._messages)
        if self._generator.memory is not None:
            return ids
        room = self._generator.context - self._params.max_tokens
        while len(ids) > room and len(self._messages) > 2:
            self._messages = self._messages[2:]
            ids = self._ids(self._messages)
        return ids


class FillMaskSession(Session):
    """Shows the likeliest tokens at each [MASK], by a model of masked tokens."""

    description = f"fills in each {MASK} of what you type; a line without one gets it at its end"

    def __init__(self, trained: Trained):
        super().__init__(trained)
        self.commands = {}

    def answer(self, line: str) -> Iterator[str]:
        return self.answer_prompt(line, 0)

    def answer_prompt(self, prompt: str, number: int, of_preset: bool = False) -> Iterator[str]:
        context = self._generator.context
        yield fill_masks(self._trained.model, self._tokenizer, prompt, context)[1]


def open_session(trained: Trained) -> Session:
    """Return the kind of session that suits the model and the preset's `generate.chat`."""
    if objective_of(trained.preset.model) == MASKED_TOKENS:
        return FillMaskSession(trained)
    chat = trained.preset.generate.chat
    if chat == "always" or (chat == "auto" and chat_note(trained.tokenizer) is None):
        return ChatSession(trained)
    return Session(trained)
