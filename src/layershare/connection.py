"""Whether the Hugging Face hub answers: asked once and briefly, where its libraries would try for half a minute."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread

PATIENCE = 5
"""Seconds in which the hub must answer."""


@contextmanager
def asking_hub(name: str | Path | None = None) -> Iterator[None]:
    """Within, only what is on this machine is used if the hub cannot be reached; a `name` that is a folder needs none.

    Without an answer the libraries look into their caches at once, and say what is not there.
    """
    from datasets import config
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE
    if any(before) or (name is not None and Path(name).exists()) or _answers(constants.ENDPOINT):
        yield
        return
    try:
        constants.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE = True
        yield
    finally:
        constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE = before


@cache
def _answers(address: str) -> bool:
    """Whether there is an answer of any kind, such as a refusal, from an address."""
    from huggingface_hub import get_session

    answer: SimpleQueue[bool] = SimpleQueue()

    def ask() -> None:
        try:
            answer.put(get_session().head(address, timeout=PATIENCE).status_code < 500)
        except Exception:  # whatever the HTTP library of the day raises
            answer.put(False)

    # In a thread, since no time limit covers the look-up of the name.
    Thread(target=ask, daemon=True).start()
    try:
        return answer.get(timeout=PATIENCE)
    except Empty:
        return False
