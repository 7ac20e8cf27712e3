"""From files and the Hub to batches. A document's way, each step in the file of its name:

    sources/    text, chat, pdf, hf, tokens: documents, in an order fixed by seed and epoch
      │ shuffle.py         permuted inside windows of a shard ("shuffle": "documents")
      │ token_cache.py     tokenized once per machine, where reading again is slow
      ▼
    mixing.py   Mixer: one global order of draws over all sources; validation.py holds some out
      │ pipeline.py        deals each L draws to the L lanes; ranks and workers share the lanes
      ▼
    lane 0 .. L-1   encoding.py (tokenizer.py, chat.py) ► objectives.py ► packing.py: Row
      │ worker.py          in a thread of the rank, or in worker processes
      ▼
    loader.py   row n comes from lane n mod L ► reader.py: Batch ► a step, and its Position

In:    the `data` and `tokenizer` sections of a preset (corpus.py opens them)
Out:   the same rows in the same order for any number of ranks and workers, also after a resume
State: Position (position.py): where a run stands, in each checkpoint
"""
