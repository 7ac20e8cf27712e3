"""The kinds of data a preset can name, and how they are opened. Adding one: a class, and a line in
SOURCES.

In:    the `data.sources` of a preset
Out:   opened sources, and the reason for each that could not be opened
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
from core.preset.settings import SourceSettings

SOURCES: dict[str, tuple[type[SourceSettings], Callable[[Any, Path, int], Source]]] = {
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


def build_source(settings: SourceSettings, root: Path, seed: int) -> Source:
    """Build the source of one section without opening it. Its paths are relative to `root`; its
    order follows from `seed`."""
    _, build = SOURCES[settings.type]
    return build(settings, root, seed)


def is_own_path(section: SourceSettings, root: Path) -> bool:
    """Return whether a section names a path on this machine. If nothing can be read there, that is
    a mistake and not an outage: the text that a person means to train on would be missing.

    The default folder `pdfs` does not count."""
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
    """Open all sources side by side.

    Returns those that opened, in the given order, and {name: reason} for the others (a reason does
    not repeat the name). Never raises, and never takes longer than the deadline: a source that has
    not answered by then counts as failed, whatever it does later.
    """
    problems: dict[int, str | None] = {}  # None: it opened

    def attempt(index: int, source: Source) -> None:
        try:
            source.open()
        except SourceUnavailable as error:
            problems[index] = str(error)
        except Exception as error:
            # a fault in one source must not take the others with it; it is reported, not hidden
            problems[index] = redacted(f"{type(error).__name__}: {error}")
        else:
            problems[index] = None

    threads = [
        threading.Thread(target=attempt, args=pair, daemon=True) for pair in enumerate(sources)
    ]
    end = time.monotonic() + deadline_seconds
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    done = dict(problems)  # a copy: late threads still write into the original
    late = (
        f"no answer within {deadline_seconds:g} s; check the network or the disk, or take it "
        "out of the preset"
    )
    opened: list[Source] = []
    failed: dict[str, str] = {}
    for index, source in enumerate(sources):
        problem = done.get(index, late)
        if problem is None:
            opened.append(source)
        else:
            failed[source.name] = problem or late
    return opened, failed
