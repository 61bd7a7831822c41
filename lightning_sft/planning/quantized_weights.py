"""How much less memory weights take that bitsandbytes will hold in 4 or 8 bits, before there are any."""

import math
from typing import Any

from torch import Tensor
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from lightning_sft.errors import SettingsError, one_line
from lightning_sft.model.quantization import is_quantized_layer

_BLOCK = 64  # neighbouring 4-bit weights that share a factor in float32
_BLOCK_OF_FACTORS = 256  # factors that share one in turn, with `bnb_4bit_use_double_quant`; each is then one byte


def saved_by_quantization(model: PreTrainedModel, settings: Any) -> int:
    """Bytes that a model's weights take less than in the type that they are loaded in.

    Args:
        model: On the device `meta`, without adapters. Its layers are replaced.
        settings: The `quantization_config`.

    Raises:
        SettingsError: If another library quantises, or bitsandbytes is not there.
    """
    full = {name: weight.nbytes for name, weight in model.named_parameters()}
    try:
        quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=False)
        config = quantizer.quantization_config
        if not isinstance(config, BitsAndBytesConfig):
            raise SettingsError(f"only bitsandbytes is known here, not {config.quant_method.value}.")
        quantizer.validate_environment()
        quantizer.preprocess_model(model, device_map=None)
    except (ImportError, ValueError, TypeError) as error:
        raise SettingsError(one_line(error, 200)) from error
    layers = [(name, layer) for name, layer in model.named_modules() if is_quantized_layer(layer)]
    return sum(full[f"{name}.weight"] - _quantized_size(layer.weight, config) for name, layer in layers)


def _quantized_size(weight: Tensor, config: BitsAndBytesConfig) -> int:
    """Bytes of a weight, and of the factors that it is converted back with."""
    if config.load_in_8bit:
        return weight.numel() + 4 * weight.shape[0]  # a factor for each output
    num_factors = math.ceil(weight.numel() / _BLOCK)
    if config.bnb_4bit_use_double_quant:
        return weight.numel() // 2 + num_factors + 4 * math.ceil(num_factors / _BLOCK_OF_FACTORS)
    return weight.numel() // 2 + 4 * num_factors
