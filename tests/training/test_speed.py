"""A step that is timed is a step of training."""

from __future__ import annotations

import pytest
from torch import Tensor

from bytelm.testing import tiny_models
from bytelm.training import estimate
from bytelm.training.config import TrainConfig
from bytelm.training.optimise import AdamW, RowAdam


def test_tables_are_trained_by_their_rows_while_a_step_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense gradients of large tables take longer than all the rest, and no training has them."""
    model = next(model for name, model in tiny_models() if "megabyte (across patches, n-grams" in name)
    (table,) = model.lookup_tables()
    before, seen = table.weight.detach().clone(), list[Tensor]()
    step = RowAdam.step

    def watched(self: RowAdam) -> None:
        assert table.weight.grad is not None
        seen.append(table.weight.grad)
        step(self)

    monkeypatch.setattr(RowAdam, "step", watched)
    monkeypatch.setattr(AdamW, "step", lambda self: pytest.fail("moments of large models would need room of their own"))
    assert estimate.timed(model, TrainConfig(steps=1, context_length=8, batch=1), None) > 0
    assert len(seen) == estimate.PROBES and all(gradient.is_sparse for gradient in seen)
    read = (table.weight != before).any(1).sum()
    assert 0 < read <= 8 * table.lookups < len(before)
