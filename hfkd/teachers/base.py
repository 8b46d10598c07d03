"""What a teacher is: something that says, for each supervised token of a batch, what the student should have said.

A teacher knows no loss and no trainer. A new one is a class with one method, `signal`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hfkd.batch import Batch
from hfkd.data.views import DistillationDataset
from hfkd.signal import DISTRIBUTION, TeacherSignal
from hfkd.teachers.vocabulary import check_same_tokens


class Teacher(ABC):
    """The interface of every teacher."""

    provides: frozenset[str] = frozenset({DISTRIBUTION})
    """What it can be asked for (see `hfkd.signal`)."""

    needs_second_view: bool = False
    """Whether it can teach nothing unless it reads another prompt than the student."""

    tokenizer: PreTrainedTokenizerBase | None = None
    """Its tokenizer where it has one of its own; compared with the student's."""

    other_vocabulary: bool = False
    """Whether its ids are not the student's, so that only losses made for that can read it."""

    drawn: bool = False
    """Whether its distributions are known through drawn ids only, so that only losses made for that can read it."""

    route: tuple[str, tuple[str, ...]] | None = None
    """The column that names each row's teacher, and the names that it may hold; None where one teacher teaches all."""

    begins_as_student: bool = False
    """Whether its weights are the student's before the first step, so that on the student's own prompt it has nothing
    to say until something else moves the student.
    """

    needs_adapter: bool = False
    """Whether the student must have an adapter."""

    def prepare(self, accelerator: Accelerator, student: nn.Module) -> None:
        """Load, freeze and place what is needed.

        Args:
            accelerator: Of the trainer.
            student: The student, before it is wrapped.
        """
        return None

    @abstractmethod
    def signal(self, batch: Batch, needs: frozenset[str]) -> TeacherSignal:
        """Speak of the supervised tokens of a batch.

        Args:
            batch: The N supervised tokens are those of `batch.teacher_view`, row by row.
            needs: What the losses ask for.

        Returns:
            The signal, N rows.
        """

    def weights(self) -> AbstractContextManager[PreTrainedModel]:
        """A context in which the returned model generates as the teacher does.

        Raises:
            TypeError: This teacher has no model to generate with.
        """
        raise TypeError(f"{type(self).__name__} has no model that can write answers. Use `answer: dataset`.")

    @property
    def writes(self) -> bool:
        """Whether it has a model that can write answers, see `weights`."""
        return type(self).weights is not Teacher.weights

    def share_prefix(self, ids: Sequence[int]) -> None:
        """Hear of the tokens that all its prompts begin with; a teacher may use them to save work."""
        return None

    def drop_padding(self) -> None:
        """Hear that batches are to be run as one row without padding (see `hfkd.packing`) where it can do so.

        Raises:
            PaddingFreeError: It is a model that can't keep the texts of such a row apart.
        """
        return None

    def keep_states(self, layers: Sequence[int]) -> None:
        """Hear of the layers whose states the losses will ask for (see `hfkd.states`).

        Args:
            layers: Numbers from 0 to the number of the teacher's blocks.

        Raises:
            TypeError: This teacher has no states to show.
        """
        if layers:
            raise TypeError(
                f"{type(self).__name__} shows no hidden states, but the losses read those of its layers "
                f"{list(layers)}. Take a teacher that is a model in this process (LocalTeacher, SelfTeacher), or "
                "losses that read distributions."
            )

    def meet(self, dataset: DistillationDataset, training: bool = True) -> None:
        """Hear of a set of texts before the first step.

        Args:
            dataset: Its views, tokenized.
            training: Whether it is the training set, and not one of an evaluation.

        Raises:
            ValueError: There are texts that this teacher can't speak of.
        """
        return None

    def check_vocabulary(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Make sure, once prepared, that it can read what the student's tokenizer writes; knows its own by default.

        Args:
            tokenizer: The student's.

        Raises:
            VocabularyError: An id stands for different tokens.
        """
        if self.tokenizer is not None and not self.other_vocabulary:
            check_same_tokens(tokenizer, self.tokenizer)

    def check_heads(self, check: Callable[[PreTrainedModel], None]) -> None:
        """Let each model be looked at whose output head its rows are read with; there is none by default.

        Args:
            check: Takes the model and raises what is wrong.
        """
        return None

    def after_epoch(self, epoch: float) -> None:
        """Hear that an epoch ended. A run that was resumed may tell the last one once more.

        Args:
            epoch: Epochs made so far.
        """
        return None

    def after_step(self, step: int) -> None:
        """Hear that the optimizer changed the student.

        Args:
            step: Optimizer steps made so far.
        """
        return None

    def describe(self) -> dict[str, Any]:
        """Plain data for the run record and the card."""
        return {"kind": type(self).__name__}

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint must hold to continue with the same teacher; empty for a frozen one."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""
        return None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into eval mode (no dropout, an adapter's included), and each back into its own mode
    afterwards.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
