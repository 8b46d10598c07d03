"""Letting a model write: the interface, generation with transformers, and the teacher's answers kept on disk."""

from hfkd.rollout.answers import teacher_answers
from hfkd.rollout.base import Completion, GenerationSettings, Rollout
from hfkd.rollout.hf import HFRollout

__all__ = ["Completion", "GenerationSettings", "HFRollout", "Rollout", "teacher_answers"]
