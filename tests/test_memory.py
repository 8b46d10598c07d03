"""The arithmetic of memory against real tiny models: bytes of weights, gradients, optimizer state and shards."""

from __future__ import annotations

import pytest
import torch
from conftest import make_model
from peft import get_peft_model
from training import lora

from hfkd.memory import Memory, ModelSize, Setup, memory


def measured(model: torch.nn.Module) -> dict[str, int]:
    """Bytes of weights, gradients and AdamW's state after one real step."""
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-3)
    ids = torch.arange(12).view(1, -1)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    learning = [weight for weight in model.parameters() if weight.requires_grad]
    state = [value for of in optimizer.state.values() for name, value in of.items() if name != "step"]
    return {
        "weights": sum(weight.nbytes for weight in model.parameters()),
        "gradients": sum(weight.grad.nbytes for weight in learning),
        "optimizer": sum(value.nbytes for value in state),
    }


def compared(found: Memory, real: dict[str, int], parts: int = 1) -> None:
    """Hold each figure against the measured one."""
    for name, value in real.items():
        assert getattr(found, name) == pytest.approx(value / parts), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_full_student(dtype: str, tied: bool) -> None:
    """A formula that misses the state or takes another type's width promises a run that doesn't fit."""
    model = make_model(tie_word_embeddings=tied).to(getattr(torch, dtype))
    width = {"float32": 4, "bfloat16": 2}[dtype]
    size = ModelSize.of(model)
    found = memory(size, None, Setup(teacher="cached", student_dtype=dtype, state_bytes=2 * width))
    compared(found, measured(model))
    layer = sum(weight.numel() for weight in model.model.layers[0].parameters())
    assert size.layer == pytest.approx(layer, rel=1e-2) and size.head == model.lm_head.weight.numel()


def test_an_adapter() -> None:
    """Under LoRA only the adapter has gradients and state; counting the whole model forbids runs that fit."""
    model = make_model()
    size = ModelSize.of(model)
    model = get_peft_model(model, lora())
    adapter = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    real = measured(model)
    found = memory(size, None, Setup(teacher="adapter_off", learning=adapter / size.parameters))
    compared(found, real)
    assert found.teacher == 0 and found.cpu == 0


def test_shards_divide_what_they_say() -> None:
    """ZeRO-2 keeps whole weights; who counts them as divided is out of memory at the first step."""
    model = make_model()
    size, real = ModelSize.of(model), measured(model)
    whole = memory(size, size, Setup(processes=4))
    compared(whole, real)
    zero2 = memory(size, size, Setup(processes=4, sharding="zero2"))
    assert zero2.weights == whole.weights and zero2.teacher == whole.teacher
    assert (zero2.gradients, zero2.optimizer) == (whole.gradients / 4, whole.optimizer / 4)
    full = memory(size, size, Setup(processes=4, sharding="full"))
    compared(full, real, parts=4)
    assert full.teacher == whole.teacher / 4 == size.parameters * 2 / 4
    assert full.gathered > whole.gathered == 0


def test_where_the_teacher_lies() -> None:
    """What is in CPU memory, in a cache or the student itself takes nothing of the device."""
    student, teacher = ModelSize.of(make_model()), ModelSize.of(make_model(hidden_size=64))
    places = {place: memory(student, teacher, Setup(processes=2, sharding="full", teacher=place))
              for place in ("like_student", "replicated", "offloaded", "cached")}  # fmt: skip
    whole = teacher.parameters * 2
    assert [places[place].teacher for place in places] == [whole / 2, whole, 0, 0]
    assert [places[place].cpu for place in places] == [0, 0, whole / 2, 0]
    assert places["offloaded"].total < places["like_student"].total < places["replicated"].total
    assert places["cached"].objective < places["like_student"].objective
    alone = memory(student, teacher, Setup(teacher="offloaded"))
    assert alone.cpu == whole and alone.gathered > 0, "each layer is still brought to the device"


def test_total_is_what_the_device_holds() -> None:
    """A total that counts CPU memory, or leaves something out, is believed by whoever reads the table."""
    size = ModelSize(1e6, 2, 32, 1000)
    found = memory(size, size, Setup(teacher="offloaded"))
    parts = (found.weights, found.gradients, found.optimizer, found.teacher, found.gathered)
    assert found.cpu > 0 and found.total == pytest.approx(sum(parts) + found.activations + found.objective)


def test_activations_shrink_with_checkpointing() -> None:
    """Without it the layers' own activations are most of the memory."""
    size = ModelSize(1e9, 24, 2048, 32000)
    kept, left = (memory(size, size, Setup(checkpointing=on)).activations for on in (True, False))
    assert kept < left / 5 and left == 34 * 24 * 2048 * 4096


@pytest.mark.parametrize(
    ("setup", "message"),
    [
        (Setup(processes=0), "processes is 0"),
        (Setup(learning=0.0), "learning is 0.0"),
        (Setup(), "size isn't given"),
        (Setup(teacher="adapter_off"), "all of the student learns"),
    ],
)
def test_contradictions_are_refused(setup: Setup, message: str) -> None:
    """A figure for a run that can't be is worse than none."""
    with pytest.raises(ValueError, match=message):
        memory(ModelSize(1e6, 2, 32, 1000), None, setup)
