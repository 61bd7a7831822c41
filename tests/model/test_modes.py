import pytest
import torch
from torch import nn

from lightning_sft.model.modes import evaluating


def test_eval_mode_and_no_gradients_last_as_long_as_the_context():
    model = nn.Sequential(nn.Dropout(), nn.Linear(1, 1))
    model[0].eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not model(torch.ones(1)).requires_grad
    assert [module.training for module in model.modules()] == [True, False, True]
    assert model(torch.ones(1)).requires_grad


def test_an_error_leaves_the_modes_as_they_were():
    model = nn.Linear(1, 1)
    with pytest.raises(RuntimeError), evaluating(model):
        raise RuntimeError
    assert model.training
