"""Letting a model write: generation with transformers or vLLM, the teacher's answers on disk, texts of training."""

from hfkd.rollout.answers import teacher_answers
from hfkd.rollout.base import Completion, GenerationSettings, Rollout
from hfkd.rollout.buffer import OffPolicyBuffer
from hfkd.rollout.hf import HFRollout
from hfkd.rollout.on_policy import Mixture, Writer
from hfkd.rollout.vllm import VllmRollout

__all__ = [
    "Completion",
    "GenerationSettings",
    "HFRollout",
    "Mixture",
    "OffPolicyBuffer",
    "Rollout",
    "VllmRollout",
    "Writer",
    "teacher_answers",
]
