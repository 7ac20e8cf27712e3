"""The kinds of data a preset can name, and how they are opened. Adding one: a class, and a line in
SOURCES.

In:    the `data.sources` of a preset
Out:   opened sources, and why the others could not be
State: none
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from core.data.documents import Source
from core.data.sources.chat import ChatSettings, chat_source
from core.data.sources.hf import HfSettings, hf_source
from core.data.sources.pdf.source import PdfSettings, PdfSource
from core.data.sources.text import (
    PythonStdlibSettings,
    PythonStdlibSource,
    TextSettings,
    TextSource,
)
from core.data.sources.tokens import TokensSettings, TokensSource
from core.environment import redacted
from core.errors import SourceUnavailable
from core.files import own_path
from core.preset.settings import Settings

SOURCES: dict[str, tuple[type[Settings], Callable[..., Source]]] = {
    "python_stdlib": (PythonStdlibSettings, PythonStdlibSource),
    "text": (TextSettings, TextSource),
    "pdf": (PdfSettings, PdfSource),
    "hf": (HfSettings, hf_source),
    "chat": (ChatSettings, chat_source),
    "tokens": (TokensSettings, TokensSource),
}

NAMED_SOURCES: dict[str, dict[str, Any]] = {
    "python_stdlib": {"type": "python_stdlib"},
    "pdf": {"type": "pdf", "path": "./pdfs"},
    "wikipedia": {"type": "hf", "dataset": "wikimedia/wikipedia", "config": "20231101.en"},
    "openwebtext": {"type": "hf", "dataset": "Skylion007/openwebtext"},
    "c4": {"type": "hf", "dataset": "allenai/c4", "config": "en"},
    "bookcorpus": {"type": "hf", "dataset": "lucadiliello/bookcorpusopen"},
    "pile_subset": {"type": "hf", "dataset": "monology/pile-uncopyrighted"},
    "finepdfs": {"type": "hf", "dataset": "HuggingFaceFW/finepdfs", "config": "eng_Latn"},
    "arxiv": {
        "type": "hf",
        "dataset": "ccdv/arxiv-summarization",
        "config": "document",
        "text_field": "article",
    },
    "tinyshakespeare": {
        "type": "hf",
        "dataset": "Trelis/tiny-shakespeare",
        "text_field": "Text",
        "local": "./data/tinyshakespeare.txt",
    },
    "common_crawl": {"type": "hf", "dataset": "HuggingFaceFW/fineweb", "config": "sample-10BT"},
}
"""Short names for `data.sources`. Every repository holds data files only: `datasets` runs no
scripts any more."""


def build_source(settings: Any, root: Path, seed: int) -> Source:
    """The source of one section, not opened. Its paths are relative to `root`, its order follows
    from `seed`."""
    return SOURCES[settings.type][1](settings, root, seed)


def is_own_path(section: Any, root: Path) -> bool:
    """Whether a section names a path on this machine: that nothing there can be read is a mistake,
    not an outage.

    The text that a person means to train on would be missing. The folder `pdfs` is named by default
    only."""
    path, dataset, local = (getattr(section, key, None) for key in ("path", "dataset", "local"))
    if dataset is not None:
        return dataset.startswith(("./", "../", "/", "~")) or any(
            own_path(each, root).exists() for each in (dataset, local) if each
        )
    return path is not None and (
        section.type != "pdf" or own_path(path, root) != own_path(PdfSettings().path, root)
    )


def open_sources(
    sources: list[Source], deadline_seconds: float = 12.0
) -> tuple[list[Source], dict[str, str]]:
    """Opens all sources side by side.

    Returns those that opened, in the given order, and {name: reason} for the others (a reason does
    not repeat the name). Never raises, and never takes longer than the deadline: a source that has
    not answered by then counts as failed, whatever it does later.
    """
    outcome: dict[int, str | None] = {}

    def attempt(index: int, source: Source) -> None:
        try:
            source.open()
        except SourceUnavailable as error:
            outcome[index] = str(error)
        except Exception as error:
            # a fault in one source must not take the others with it; it is told, not hidden
            outcome[index] = redacted(f"{type(error).__name__}: {error}")
        else:
            outcome[index] = None

    threads = [
        threading.Thread(target=attempt, args=pair, daemon=True) for pair in enumerate(sources)
    ]
    end = time.monotonic() + deadline_seconds
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    done = dict(outcome)  # a copy: late threads still write into the other
    late = (
        f"no answer within {deadline_seconds:g} s; check the network or the disk, or take it "
        "out of the preset"
    )
    opened = [
        source for index, source in enumerate(sources) if index in done and done[index] is None
    ]
    failed = {
        s.name: done.get(i) or late
        for i, s in enumerate(sources)
        if i not in done or done[i] is not None
    }
    return opened, failed
