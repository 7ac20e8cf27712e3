"""The proof of an export, in a process of its own: loads a folder as anybody would, and says what
it computes. Nothing of this program is imported here.

In:    argv[1]: a JSON file, see core/export/proof.py; the logits of ours beside it
Out:   one line of JSON: what the folder's model and tokenizer, and its GGUF files, make of the same
       text
State: none
"""

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def main(request: dict[str, Any], ours: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return what the exported files make of a request."""
    import transformers  # slow to import

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = request["folder"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found: dict[str, Any] = {
        "ids": [tokenizer.encode(text, add_special_tokens=False) for text in request["texts"]]
    }
    if request["logits"]:
        load = transformers.AutoModelForCausalLM.from_pretrained
        found |= compared(load(folder, dtype=torch.float32).eval(), request, ours)
    found["gguf"] = {name: gguf(folder, name, request, ours) for name in request["gguf"]}
    return found


@torch.no_grad()
def compared(model: Any, request: dict[str, Any], ours: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return how far a model's logits are from ours, and what it says greedily."""
    import transformers

    differences = []
    for number, row in enumerate(request["rows"]):
        logits = model(torch.tensor([row])).logits[0].float()
        expected = ours[str(number)]
        differences.append(float((logits[:, : expected.shape[1]] - expected).abs().max()))
    prompt = torch.tensor([request["prompt"]])
    greedy = transformers.GenerationConfig(
        do_sample=False,
        max_new_tokens=request["new_tokens"],
        eos_token_id=request["end"],
        pad_token_id=request["end"],
    )
    said = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=greedy)[
        0, prompt.shape[1] :
    ].tolist()
    return {"max_difference": max(differences), "said": ended(said, request["end"])}


def gguf(
    folder: str, name: str, request: dict[str, Any], ours: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """Return what a GGUF file computes, read by transformers, and by llama.cpp where it is
    installed. The former overlooks some sizes in the file: it gets them from the folder."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, config=config, dtype=torch.float32
    )
    found = compared(model.eval(), request, ours)
    if find_spec("llama_cpp") is not None:
        found["llama_cpp"] = spoken(str(Path(folder) / name), request)
    return found


def spoken(path: str, request: dict[str, Any]) -> dict[str, Any]:
    """Return what llama.cpp says greedily, and the tokens it makes of the texts."""
    import llama_cpp

    size = len(request["prompt"]) + request["new_tokens"]
    model = llama_cpp.Llama(path, n_ctx=size, verbose=False, logits_all=False)
    said: list[int] = []
    for token in model.generate(request["prompt"], temp=0.0, repeat_penalty=1.0):
        said.append(int(token))
        if len(said) == request["new_tokens"] or token == request["end"]:
            break
    ids = [model.tokenize(text.encode(), add_bos=False, special=False) for text in request["texts"]]
    return {"said": ended(said, request["end"]), "ids": ids}


def ended(ids: list[int], end: int) -> list[int]:
    """Return the tokens before the end of the document."""
    return ids[: ids.index(end)] if end in ids else ids


if __name__ == "__main__":
    asked = Path(sys.argv[1])
    print(json.dumps(main(json.loads(asked.read_text()), load_file(asked.with_suffix(".logits")))))
