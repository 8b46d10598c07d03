"""Which example comes next."""

from __future__ import annotations

from hfkd.sampling.base import ExampleSampler

SAMPLERS: dict[str, str] = {
    "domains": "hfkd.sampling.domains:DomainSampler",
    "hard_prompts": "hfkd.sampling.hard:HardPromptSampler",
}
"""Recipe keys of the samplers, and where their classes are: `module:Class`, imported when asked for."""

__all__ = ["SAMPLERS", "ExampleSampler"]
