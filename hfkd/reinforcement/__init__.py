"""A reward and a teacher on the same answers: TRL's GRPO with a distillation term, and negative-aware fine-tuning."""

from __future__ import annotations

from hfkd.reinforcement.config import KDRLConfig
from hfkd.reinforcement.kdrl import KDRLTrainer

__all__ = ["KDRLConfig", "KDRLTrainer"]
