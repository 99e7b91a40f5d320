"""The Hugging Face hub: asked once whether it answers, before libraries ask it again and again, with growing pauses."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

SWITCHES = ("huggingface_hub.constants", "datasets.config")  # datasets copies the other one when it is imported


@contextmanager
def hub_or_cache() -> Iterator[str | None]:
    """Yield None if the hub answers; else yield the reason, and forbid requests, so that its cache alone is read."""
    reason = hub_obstacle()
    with offline() if reason else nullcontext():
        yield reason


@contextmanager
def offline() -> Iterator[None]:
    """Forbid requests to the hub while the context is open: files in its cache, or in a folder, need none."""
    import huggingface_hub.constants

    before = {name: sys.modules[name].HF_HUB_OFFLINE for name in SWITCHES if name in sys.modules}
    try:
        for name in before:
            vars(sys.modules[name])["HF_HUB_OFFLINE"] = True
        yield
    finally:
        usual = before[huggingface_hub.constants.__name__]
        for name in SWITCHES:
            if name in sys.modules:
                vars(sys.modules[name])["HF_HUB_OFFLINE"] = before.get(name, usual)


def hub_obstacle() -> str | None:
    """Return why the hub cannot be reached, None if it can; any answer counts.

    One request, which may take HF_HUB_ETAG_TIMEOUT seconds (10 by default), as long as the hub's own client waits.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:  # those of the HTTP library, which depends on the version of huggingface_hub
        text = " ".join(str(error).split()) or "no answer"
        return f"{constants.ENDPOINT} does not answer ({type(error).__name__}: {text}); check network and proxy"
    return None
