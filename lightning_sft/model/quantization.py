"""Weights that bitsandbytes holds in 4 or 8 bits."""

from typing import Any

from torch import nn

from lightning_sft.errors import SettingsError


def is_quantized(model: nn.Module) -> bool:
    """Whether bitsandbytes holds some of the weights."""
    return any(is_quantized_layer(module) for module in model.modules())


def is_quantized_layer(module: nn.Module) -> bool:
    """Whether bitsandbytes holds the layer's own weight."""
    return type(getattr(module, "weight", None)).__module__.startswith("bitsandbytes")


def check_quantized(trains_adapters: bool, is_sharded: bool) -> None:
    """Refuse what cannot be done with weights that bitsandbytes holds."""
    if not trains_adapters or is_sharded:
        why = "not be sharded; use the strategy `ddp`" if trains_adapters else "only train `lora` adapters"
        raise SettingsError(f"`model` is quantised by bitsandbytes, and such weights can {why}.")


def keep_from_packing(model: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights for inference, which it does on CPUs with bfloat16 arithmetic.

    Its layers do so when they first run in eval mode, in place and for good, and their kernel for packed weights has no
    gradient. On other CPUs and on CUDA nothing changes. Weights that are packed already are refused.
    """
    for module in model.modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise SettingsError(
                "`model` has run in eval mode on this CPU, for which bitsandbytes has packed its 4-bit weights for "
                "inference. Adapters cannot be trained beside packed weights. Load the model anew, or give its name."
            )
        module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def dequantized(module: Any) -> nn.Linear:
    """A quantised layer as a plain one, in main memory."""
    from peft.utils.integrations import dequantize_bnb_weight

    weight = dequantize_bnb_weight(module.weight, getattr(module, "state", None)).detach().cpu()
    bias = None if module.bias is None else module.bias.detach().to("cpu", weight.dtype)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer
