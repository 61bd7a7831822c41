"""The transformer blocks of a model: compiled one by one, and sharded one by one."""

from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from lightning_sft.model.fused import RECOMPILE_LIMIT


def find_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The model's transformer blocks in their order, also of a sharded one; none if it does not say what they are.

    Where a model names parts of its blocks too, as Mamba does its mixers, the blocks are the outermost.
    """
    names = set(model._no_split_modules or ())
    blocks: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if module not in inside and any(kind.__name__ in names for kind in type(module).__mro__):
            blocks.append(module)
            inside.update(module.modules())
    return blocks


def compile_blocks(model: PreTrainedModel) -> None:
    """Compile each of the model's transformer blocks in place; the body as a whole if it does not say what they are.

    Blocks that run the same code share what is compiled of it, so that it takes no longer for more of them. The hooks
    that gather and release a sharded block's weights are not compiled. Names of weights remain what they are.
    """
    for part in find_blocks(model) or [model.base_model]:
        # In sharded modules the compiler would take every number for a variable, the sizes of heads included. There it
        # is left to find out which lengths vary, each time by compiling anew, and after 8 times it would give up.
        part.compile(dynamic=None if isinstance(part, FSDPModule) else True, **RECOMPILE_LIMIT)
