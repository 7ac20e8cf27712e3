"""What is predicted from what: the one place where inputs and targets are aligned.

In:    one document as tokens
Out:   (inputs, labels), equally long: labels[t] is the target of the output at t
"""

import numpy as np

from core.data.documents import Encoded

IGNORE_INDEX = -100  # the same number as core.contracts.IGNORE_INDEX; this floor of data workers must not import torch


def next_token(document: Encoded, eos_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Each token from those before it, the first from the end-of-document token, which also closes the document.

    ids (n,) -> inputs (n+1,) = [eos, ids], labels (n+1,) = [ids, eos]. Every position has a target, unless the document says
    which tokens are learned: then only those are targets, and its end is none.
    """
    framed = np.empty(len(document.ids) + 2, dtype=np.int32)
    framed[0] = framed[-1] = eos_id
    framed[1:-1] = document.ids
    if document.learned is None:
        return framed[:-1], framed[1:]
    labels = np.full(len(document.ids) + 1, IGNORE_INDEX, dtype=np.int32)
    np.copyto(labels[:-1], document.ids, where=document.learned)
    return framed[:-1], labels
