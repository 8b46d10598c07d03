"""What is changed of a step's batches before they are learned."""

from __future__ import annotations

from hfkd.revision.base import Reviser

REVISERS: dict[str, str] = {
    "correct": "hfkd.revision.correction:Correction",
    "select": "hfkd.revision.select:Selection",
    "teacher_quality": "hfkd.revision.teacher_quality:TeacherQuality",
    "private": "hfkd.revision.private:PrivateTokens",
}
"""Recipe keys of the revisers, and where their classes are: `module:Class`, imported when asked for."""

__all__ = ["REVISERS", "Reviser"]
