"""Words for precision against what Lightning's own plugins do with weights and products."""

from typing import get_args

import pytest
import torch
from lightning.fabric.plugins.precision.precision import (
    _PRECISION_INPUT_STR,
    _PRECISION_INPUT_STR_ALIAS_CONVERSION,
)
from lightning.pytorch.plugins import DoublePrecision, HalfPrecision, MixedPrecision
from lightning.pytorch.plugins import Precision as FullPrecision

from lightning_sft.model.precision import Precision

PLUGINS = {
    "32-true": FullPrecision(),
    "64-true": DoublePrecision(),
    "16-true": HalfPrecision("16-true"),
    "bf16-true": HalfPrecision("bf16-true"),
    "16-mixed": MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu")),
    "bf16-mixed": MixedPrecision("bf16-mixed", "cpu"),
}


@pytest.mark.parametrize("word", PLUGINS)
def test_weights_and_products_have_the_types_that_lightning_s_plugin_gives_them(word):
    plugin, precision = PLUGINS[word], Precision.of(word)
    layer = plugin.convert_module(torch.nn.Linear(3, 3))
    assert layer.weight.dtype == (precision.stored or torch.float32)
    with plugin.forward_context():
        product = layer(torch.ones(1, 3, dtype=layer.weight.dtype))
    assert product.dtype == precision.compute_dtype
    assert precision.is_half == (product.dtype.itemsize == 2)


def test_every_word_that_lightning_takes_has_a_meaning():
    assert {str(Precision.of(word)) for word in get_args(_PRECISION_INPUT_STR)} == set(get_args(_PRECISION_INPUT_STR))
    for short, word in _PRECISION_INPUT_STR_ALIAS_CONVERSION.items():
        assert Precision.of(short) == Precision.of(word)
    assert Precision.of(32) == Precision.of(None) == Precision.of("32-true") == Precision()


def test_a_word_that_lightning_does_not_know_is_refused_by_name():
    with pytest.raises(ValueError, match="`precision` is '8-true', expected one of 32-true, 64-true, "):
        Precision.of("8-true")
