"""What is refused of a launch in shards, without launching one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.utils import DistributedType
from conftest import make_model
from peft import get_peft_model
from training import lora, make_trainer

from hfkd import SelfTeacher
from hfkd.compatibility import check_sharding


def accelerator(version: int = 2, **settings: Any) -> Any:
    """As far as it is looked at."""
    plugin = SimpleNamespace(fsdp_version=version, state_dict_type="FULL_STATE_DICT", **settings)
    return SimpleNamespace(distributed_type=DistributedType.FSDP, state=SimpleNamespace(fsdp_plugin=plugin))


def test_the_first_version_is_refused(model: Any) -> None:
    """Its weights are flattened: the head would be read as nonsense, or not at all."""
    with pytest.raises(ValueError, match="fsdp_version: 2"):
        check_sharding(accelerator(1), model, None)
    check_sharding(accelerator(2), model, None)


def test_a_quantised_student_is_refused(model: Any) -> None:
    """Packed weights don't survive being cut."""
    model.is_quantized = True
    with pytest.raises(ValueError, match="quantised"):
        check_sharding(accelerator(), model, None)


def test_whole_students_are_left_alone(model: Any) -> None:
    """DDP takes quantised students."""
    model.is_quantized = True
    whole = SimpleNamespace(distributed_type=DistributedType.MULTI_GPU, state=SimpleNamespace())
    check_sharding(whole, model, None)


def test_tied_ends_behind_a_copy_are_refused() -> None:
    """torch says `shared with a parameter already managed`, and not where."""
    untied = get_peft_model(make_model(tie_word_embeddings=False), lora(modules_to_save=["lm_head"]))
    check_sharding(accelerator(), untied, None)
    check_sharding(accelerator(), make_model(), None)
    for end in ("lm_head", "embed_tokens"):
        tied = get_peft_model(make_model(), lora(target_modules=["q_proj"], modules_to_save=[end]))
        with pytest.raises(ValueError, match="Take lm_head and embed_tokens out of modules_to_save"):
            check_sharding(accelerator(), tied, None)
        blocked = accelerator()
        blocked.distributed_type = DistributedType.MULTI_GPU
        check_sharding(blocked, tied, None)


def test_the_student_is_looked_at_before_a_teacher_is_loaded(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half an hour of reading a teacher, and then a word about the launch."""
    done = []
    monkeypatch.setattr("hfkd.trainer.check_sharding", lambda *args: done.append("looked"))
    monkeypatch.setattr("hfkd.trainer.check_learning_terms", lambda *args: done.append("terms"))
    monkeypatch.setattr(SelfTeacher, "prepare", lambda self, *args: done.append("prepared"))
    monkeypatch.setattr(SelfTeacher, "share_prefix", lambda self, *args: None)
    make_trainer(tmp_path)
    assert done == ["looked", "prepared", "terms"]
