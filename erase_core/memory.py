"""Running out of memory, in words and in smaller parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

ADVICE = (
    "The device has not enough memory to {task}, even one picture at a time. Lower the resolution, "
    "free memory (close other programs, unload other models), or use the preset 'instant', which "
    "makes no predictions."
)


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that memory ran out.

    PyTorch has a class of its own for it on some devices and in newer versions only; all say it in
    these words.
    """
    text = str(error).casefold()
    return "out of memory" in text or "not enough memory" in text


@contextmanager
def advice_instead(task: str, error: type[Exception]) -> Iterator[None]:
    """Where memory runs out inside the block, raise another error that says what to do.

    Args:
        task: what there isn't enough memory for, in words.
        error: the error to raise.
    """
    try:
        yield
    except RuntimeError as reason:
        if not out_of_memory(reason):
            raise
        raise error(ADVICE.format(task=task)) from reason
