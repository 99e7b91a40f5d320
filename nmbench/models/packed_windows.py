"""Forward passes without the search of transformers for windows that pack several texts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from transformers import masking_utils


@contextlib.contextmanager
def ignoring_packed_windows() -> Iterator[None]:
    """Set transformers to treat every window as one text while the context is open.

    In each forward pass transformers reads position numbers back from the device to find windows that pack several
    texts, and the host waits. While a graph is recorded nothing can be read back; transformers then computes with an
    explicit mask, where a causal kernel is several times faster with the same result.
    """
    name = "find_packed_sequence_indices"
    found = getattr(masking_utils, name, None)
    if found is None:  # another release of transformers: right without, and slower
        yield
        return
    setattr(masking_utils, name, lambda position_ids: None)
    try:
        yield
    finally:
        setattr(masking_utils, name, found)
