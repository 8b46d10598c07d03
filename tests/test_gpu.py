"""What only a CUDA device can show: bfloat16 products summed and kept in float32, chunks by free memory."""

from __future__ import annotations

import pytest
import torch

from hfkd.objective import Objective
from hfkd.plan import rows_that_fit
from hfkd.rows import DenseRows, Head
from hfkd.signal import TeacherSignal

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def cuda() -> torch.device:
    """The device, or no test."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda")


@pytest.mark.parametrize("kind", ["forward_kl", "jensen_shannon", "adaptive_kl"])
def test_half_precision_products_follow_the_definition(cuda, kind):
    """Prevents logits rounded to bfloat16 on their way to the loss, and a head gradient summed in bfloat16."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(*shape, generator=generator)).to(cuda, torch.bfloat16)

    hidden, weight = draw(300, 64).requires_grad_(), draw(1000, 64, scale=0.25).requires_grad_()
    theirs, their_weight = draw(300, 64), draw(1000, 64, scale=0.25)
    targets = torch.randint(1000, (300,), generator=generator).to(cuda)
    signal = TeacherSignal(DenseRows(theirs, Head(their_weight)))
    result = Objective(kind, chunk_size=128)(DenseRows(hidden, Head(weight)), signal, targets)
    result.total.backward()
    exact = [one.detach().double().requires_grad_() for one in (hidden, weight)]
    signal = TeacherSignal(DenseRows(theirs.double(), Head(their_weight.double())))
    expected = Objective(kind, chunk_size=128)(DenseRows(exact[0], Head(exact[1])), signal, targets)
    expected.total.backward()
    assert result.total.item() == pytest.approx(expected.total.item(), rel=1e-4)
    for ours, one in zip((hidden, weight), exact, strict=True):
        assert (ours.grad.double() - one.grad).norm() / one.grad.norm() < 2e-2


def test_the_chunk_follows_the_free_memory(cuda):
    """Prevents a default that fills the device."""
    rows = rows_that_fit(151_936, cuda)
    assert rows >= 16 and rows * 151_936 * 8 <= torch.cuda.mem_get_info(cuda)[1]
