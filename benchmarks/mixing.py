"""The accuracy with which a mix of text knows how many tokens it has drawn, which it counts from
characters.

    python benchmarks/mixing.py [--short]

3,000 draws of the standard library's source (0.9) and this project's documents (0.1) under a BPE of
8,192, made for them; --short draws 60 under a tokenizer of bytes. Prints the tokens drawn, and what
the mix counted as a ratio, after a sixth, two thirds, all."""

import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main(short: bool) -> None:
    from core.data.corpus import open_corpus
    from core.data.mixing import Mixer
    from core.data.position import Position
    from core.data.tokenizer_build import SAMPLE_CHARACTERS, build_tokenizer
    from core.parallel.single import Single
    from core.preset.decode import decode_preset
    from core.registry import Preset

    sources = ["python_stdlib", {"type": "text", "path": "docs", "name": "docs"}]
    data = {
        "sources": sources,
        "mix_strategy": "weighted",
        "source_weights": [0.9, 0.1],
        "weights_of": "tokens",
    }
    tokenizer_section = {"type": "byte"} if short else {"type": "bpe", "vocab_size": 8192}
    preset = decode_preset(
        {"data": data, "tokenizer": tokenizer_section}, Preset, "benchmark", "benchmark"
    )
    corpus = open_corpus(preset, ROOT, Single())
    texts = [] if short else corpus.sample_texts(SAMPLE_CHARACTERS)
    tokenizer = build_tokenizer(preset.tokenizer, texts, corpus.markers, ROOT)
    settings = replace(corpus.mix, rates=corpus.rates(tokenizer))
    mixer, draws, tokens = (
        Mixer(corpus.sources, settings, corpus.may_train, Position()),
        60 if short else 3000,
        0,
    )
    for number in range(1, draws + 1):
        document = next(mixer).document
        assert document is not None
        tokens += len(tokenizer.encode_batch([document.text])[0]) + 1
        if number in (draws // 6, draws * 2 // 3, draws):
            counted = sum(tokens for _, tokens in mixer.snapshot()["drawn"].values())
            print(
                f"{tokens:>12,} tokens drawn   counted / drawn {counted / tokens:.4f}", flush=True
            )


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main("--short" in sys.argv[1:])
