"""A tokenizer as the transformers library has it.

In:    a Trained
Out:   a fast tokenizer of the library, to be used or saved
State: none

Ids are the same, but for one thing: the library reads a marker such as <|endoftext|> in a text as
that token, unless it is called with split_special_tokens=True; here no text is ever read so.
"""

import json
from typing import Any

from core.data.chat import STOP, chat_note
from core.data.tokenizer import MASK, Tokenizer
from core.models.huggingface import transformers
from core.trained import Trained

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""What core/data/chat.py writes; the end-of-document token stands before a conversation."""


def transformers_tokenizer(trained: Trained[Any]) -> Any:
    """Return the tokenizer as the transformers library has it."""
    from tokenizers import Tokenizer as Backend

    tokenizer = trained.tokenizer
    backend = Backend.from_str(tokenizer.state()["json"])
    end = backend.id_to_token(tokenizer.eos_id)
    names = {"eos_token": end, "bos_token": end, "pad_token": end}
    if tokenizer.special_id(MASK) is not None:
        names["mask_token"] = MASK
    if tokenizer.unknown_id is not None:
        names["unk_token"] = backend.id_to_token(tokenizer.unknown_id)
    made = transformers().PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=trained.preset.model.seq_length,
        clean_up_tokenization_spaces=False,
        **names,
    )
    if chat_note(tokenizer) is None:
        made.chat_template = f"{{{{ {json.dumps(end)} }}}}{CHATML}"
    return made


def end_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the tokens at which a text is over: of a document, and of a turn."""
    stop = tokenizer.special_id(STOP)
    return [tokenizer.eos_id] if stop is None else [tokenizer.eos_id, stop]
