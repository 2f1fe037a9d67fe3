"""The softmax normaliser in pieces equals the plain one, gradients included."""

import pytest
import torch

from training.softmax import mean_log_normaliser


@pytest.mark.parametrize("rows", [1, 256, 700])
def test_value_and_gradients_equal_those_of_all_logits_at_once(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    shapes = ((rows, 16), (90, 16), (90,))
    given = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    pieces, plain = ([value.clone().requires_grad_() for value in given] for _ in range(2))
    loss = mean_log_normaliser(*pieces)
    expected = (plain[0] @ plain[1].T + plain[2]).logsumexp(-1).mean()
    (3 * loss).backward()
    (3 * expected).backward()
    assert torch.allclose(loss, expected)
    for left, right in zip(pieces, plain, strict=True):
        assert left.grad is not None
        assert right.grad is not None
        assert torch.allclose(left.grad, right.grad)


def test_large_logits_do_not_overflow() -> None:
    assert mean_log_normaliser(torch.full((1, 1), 1e3), torch.ones(2, 1), torch.zeros(2)).item() == pytest.approx(1000.6931)
