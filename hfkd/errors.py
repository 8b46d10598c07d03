"""The errors of the project that a caller may want to catch by name. All of them say what was got, what was expected
and what to change.
"""

from __future__ import annotations

from pathlib import Path


class HeadError(ValueError):
    """The output head of a model can't be read as `logits = cap(scale * (hidden @ weight.T + bias))`."""


class StateError(ValueError):
    """Hidden states of a layer can't be read from a model, or can't teach."""


class UnsupportedCache(ValueError):
    """The key-value cache of an architecture can't be expanded to a batch, so a shared prefix can't be reused."""


class PaddingFreeError(ValueError):
    """A model can't keep the texts of a batch apart when they lie in one row without padding."""


class VocabularyError(ValueError):
    """Student and teacher don't mean the same tokens by the same ids."""


class NonFiniteLoss(RuntimeError):
    """A loss became NaN or infinite; the message names the step and the term."""


class NonFiniteGradient(RuntimeError):
    """A gradient became NaN or infinite while the loss was finite; the message names the step and parameters."""


class Preempted(SystemExit):
    """Training was ended by a signal, after a checkpoint was saved; or a recipe was, outside of training. If nothing
    catches it, the process ends with exit code 75 ("try again later").

    Args:
        message: What a user should read.
        checkpoint: The folder that was saved; None outside of training.
    """

    def __init__(self, message: str, checkpoint: Path | None) -> None:
        super().__init__(message)
        self.code = 75
        self.checkpoint = checkpoint


class NothingToLearn(ValueError):
    """No token of the data or of a whole step is supervised."""


class CheckpointError(ValueError):
    """A checkpoint can't be gone on from: it is damaged, of a newer version, or of another training."""


class CheckpointNotSaved(OSError):
    """A checkpoint couldn't be written; the message names the last one that is whole."""


class VerifierError(ValueError):
    """A verifier raised, or gave something that is no number from 0 to 1; the message names it and the row."""
