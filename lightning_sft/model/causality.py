"""Whether a model reads its rows as a causal language model does."""

import torch
from transformers import PreTrainedModel

from lightning_sft.errors import SettingsError
from lightning_sft.model.probing import CALL_ERRORS, Probe, relative_difference

_LENGTH, _NUM_SHARED = 12, 7  # tokens of the documents, and how many they begin with alike


def check_causal(model: PreTrainedModel, dtype: torch.dtype | None = None) -> None:
    """Refuse a model whose logits change with tokens that follow, or with what else is in the batch.

    In the first case it would see the answers that it is to predict; in the second the loss would depend on how rows
    are put into batches. Two documents that begin alike are read side by side, and their beginning alone. Matrices are
    multiplied in `dtype`, by default that of the weights.
    """
    if next(model.parameters()).is_meta:
        return
    probe = Probe(model, dtype)
    document, other = probe.document(_LENGTH, seed=0), probe.document(_LENGTH, seed=1)
    other[:_NUM_SHARED] = document[:_NUM_SHARED]
    try:
        first, second = probe.logits(torch.stack([document, other]))[:, :_NUM_SHARED]
        alone = probe.logits(document[None, :_NUM_SHARED])[0]
    except CALL_ERRORS:
        return  # the first step will say the same, with its whole traceback
    tolerance = 5e-2 if probe.half else 1e-3
    name = type(model).__name__.removeprefix("FSDP")
    if relative_difference(first, second) > tolerance:
        raise SettingsError(
            f"`model` is {name}, whose logits change with the tokens that follow: it would see the response that it is "
            "to predict. Use a causal language model; an encoder such as BERT is one with `is_decoder: true` in its "
            "configuration."
        )
    if relative_difference(first, alone) > tolerance:
        raise SettingsError(
            f"`model` is {name}, whose logits change with the padding after a row, or with the rows beside it: the "
            "loss would depend on how rows are put into batches. Use another model."
        )
