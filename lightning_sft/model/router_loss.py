"""Losses of routers that a model's configuration asks for beside that of the tokens: found, or refused."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_sft.errors import SettingsError
from lightning_sft.model.probing import Probe
from lightning_sft.model.routing import RoutingRecorder

_LARGE = float(2**20)  # so that no digit of the coefficient is lost beside the loss of the tokens


def router_coefficient(model: PreTrainedModel) -> float:
    """What the router loss is multiplied by; 0 unless the model's configuration asks for it.

    The configuration asks by `output_router_logits` and a coefficient, which has many names. To find the coefficient,
    the model is run on a few tokens with labels, and given two values for the router loss. A loss that is not known
    here is refused.
    """
    _refuse_z_loss(model)
    if next(model.parameters()).is_meta:
        return 0.0
    probe, losses = Probe(model), []
    input_ids = probe.document(8, seed=0).unsqueeze(0)
    for value in (_LARGE, 0.0):
        recorder = RoutingRecorder(model, value)
        if not recorder.has_loss:
            return 0.0
        losses.append(probe.loss(input_ids, recorder))
    coefficient = float(f"{(losses[0] - losses[1]) / _LARGE:.6g}")
    if (routing := recorder.routing) is None or not coefficient:
        return 0.0
    sums = routing.sums(torch.ones(input_ids.shape[1], device=input_ids.device))
    theirs = recorder.own_loss()
    if not isinstance(theirs, Tensor) or not torch.allclose(sums.loss(sums), theirs.float(), rtol=1e-3):
        raise SettingsError(
            f"`model` is {type(model).__name__} with `output_router_logits: true`, whose router loss is not supported. "
            "Set `output_router_logits` to false."
        )
    return coefficient


def _refuse_z_loss(model: PreTrainedModel) -> None:
    """Refuse a z-loss: a mean over all tokens, prompts included, of a sum over logits that the head does not keep."""
    for name, value in vars(model.config.get_text_config(decoder=True)).items():
        if "z_loss_coef" in name and value:
            raise SettingsError(
                f"`model` is {type(model).__name__} with `{name}` = {value}, a loss that is not supported. Set it to 0 "
                "in the model's configuration."
            )
