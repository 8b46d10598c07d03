"""What is refused of a launch in shards, without launching one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.utils import DistributedType

from hfkd import Objective
from hfkd.compatibility import check_sharding


def accelerator(version: int = 2, **settings: Any) -> Any:
    """As far as it is looked at."""
    plugin = SimpleNamespace(fsdp_version=version, state_dict_type="FULL_STATE_DICT", **settings)
    return SimpleNamespace(distributed_type=DistributedType.FSDP, state=SimpleNamespace(fsdp_plugin=plugin))


def test_the_first_version_is_refused(model: Any) -> None:
    """Its weights are flattened: the head would be read as nonsense, or not at all."""
    objective = Objective([{"kind": "forward_kl"}])
    with pytest.raises(ValueError, match="fsdp_version: 2"):
        check_sharding(accelerator(1), model, objective, None)
    check_sharding(accelerator(2), model, objective, None)


def test_a_quantised_student_is_refused(model: Any) -> None:
    """Packed weights don't survive being cut."""
    model.is_quantized = True
    with pytest.raises(ValueError, match="quantised"):
        check_sharding(accelerator(), model, Objective([{"kind": "forward_kl"}]), None)


def test_whole_students_are_left_alone(model: Any) -> None:
    """DDP takes quantised students."""
    model.is_quantized = True
    whole = SimpleNamespace(distributed_type=DistributedType.MULTI_GPU, state=SimpleNamespace())
    check_sharding(whole, model, Objective([{"kind": "forward_kl"}]), None)
