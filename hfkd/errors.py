"""The errors of the project that a caller may want to catch by name. All of them say what was got, what was expected
and what to change.
"""

from __future__ import annotations


class HeadError(ValueError):
    """The output head of a model can't be read as `logits = cap(scale * (hidden @ weight.T + bias))`."""


class StateError(ValueError):
    """Hidden states of a layer can't be read from a model, or can't teach."""


class UnsupportedCache(ValueError):
    """The key-value cache of an architecture can't be expanded to a batch, so a shared prefix can't be reused."""


class VocabularyError(ValueError):
    """Student and teacher don't mean the same tokens by the same ids."""


class NonFiniteLoss(RuntimeError):
    """A loss became NaN or infinite; the message names the step and the term."""


class NothingToLearn(ValueError):
    """No token of the data or of a whole step is supervised."""
