"""What is predicted from what: the one place where inputs and targets are aligned.

In:    the token ids of one document
Out:   (inputs, labels), equally long: labels[t] is the target of the output at t
"""

import numpy as np


def next_token(ids: np.ndarray, eos_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Each token from those before it, the first from the end-of-document token, which also closes the document.

    ids (n,) -> inputs (n+1,) = [eos, ids], labels (n+1,) = [ids, eos]. Every position has a target.
    """
    framed = np.empty(len(ids) + 2, dtype=np.int32)
    framed[0] = framed[-1] = eos_id
    framed[1:-1] = ids
    return framed[:-1], framed[1:]
