"""What a training step needs of the device's memory, and what to do where that is too little."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from .activations import SavedBytes

ADVICE = (
    "The device has not enough memory to {task}, even one picture at a time. Lower the resolution, "
    "free memory (close other programs, unload other models), or, in the hard form, use the preset "
    "'instant', which makes no predictions."
)

# Of what is free, for what a device's allocator loses between blocks of memory.
USABLE = 0.9


@dataclass(frozen=True)
class Need:
    """Bytes that forward and backward of one state need beside the weights.

    Attributes:
        plain: without checkpointing.
        checkpointed: with it.
    """

    plain: int
    checkpointed: int

    @classmethod
    def counted(cls, saved: SavedBytes) -> Need:
        """From one state's forward."""
        return cls(saved.needed, saved.needed_checkpointed)


@dataclass(frozen=True)
class Fit:
    """How a batch goes through the model.

    Attributes:
        parts: in which the batch is taken, one after the other.
        checkpointing: whether blocks are recomputed.
    """

    parts: int = 1
    checkpointing: bool = False

    def smaller(self, batch: int) -> Fit | None:
        """What needs less memory: half the states at once, then checkpointing; None after that."""
        if self.parts < batch:
            return Fit(min(2 * self.parts, batch), self.checkpointing)
        return None if self.checkpointing else Fit(self.parts, checkpointing=True)

    def needs(self, need: Need, batch: int) -> int:
        """Bytes that a batch needs when it goes through so."""
        at_once = -(-batch // self.parts)
        return at_once * (need.checkpointed if self.checkpointing else need.plain)

    @classmethod
    def into(cls, free: int, need: Need, batch: int) -> Fit:
        """The first that fits, or the smallest there is: an estimate is no reason not to try."""
        fit = cls()
        while fit.needs(need, batch) > USABLE * free:
            smaller = fit.smaller(batch)
            if smaller is None:
                return fit
            fit = smaller
        return fit


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
