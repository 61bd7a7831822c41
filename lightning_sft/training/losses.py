"""Masked sums and the supervised fine-tuning loss."""

import math
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from lightning_sft.checks import check_choice, check_integer, check_number
from lightning_sft.errors import SettingsError

LossNormalization = Literal["token", "sequence"]
_Count = TypeVar("_Count", float, Tensor)


def masked_normalize(
    tensor: Tensor, mask: Tensor, normalize_constant: float | Tensor, dim: int | None = None
) -> Tensor:
    """Sum the elements where `mask == 1` and divide by a constant.

    Elements outside the mask never contribute, not even NaN or infinity, nor do they receive a gradient.

    Args:
        tensor: Any shape.
        mask: The same shape; elements with 1 or True are summed.
        normalize_constant: Divides the sum.
        dim: Dimension to sum over; all if None.

    Returns:
        `tensor`'s shape without `dim`; a scalar if `dim` is None.

    Raises:
        SettingsError: If `mask` has more elements than `tensor`.

    Source: Stanford CS336, assignment 5, "SFT helper methods".
    """
    kept = torch.where(mask == 1, tensor, torch.zeros((), dtype=tensor.dtype, device=tensor.device))
    if kept.shape != tensor.shape:  # its elements would count several times
        raise SettingsError(
            f"`mask` is of shape {tuple(mask.shape)}, expected that of `tensor`, {tuple(tensor.shape)}."
        )
    total = kept.sum() if dim is None else kept.sum(dim=dim)
    return total / normalize_constant


@dataclass(frozen=True)
class LossScale:
    """What the summed negative log-likelihood of an optimizer step is divided by.

    Attributes:
        normalization: `"token"`: the step's number of response tokens. `"sequence"`: `constant` times its number of
            sequences.
        constant: For `"sequence"` alone.
    """

    normalization: LossNormalization = "token"
    constant: float = 1.0

    def __post_init__(self) -> None:
        check_choice("loss_normalization", self.normalization, LossNormalization)
        check_number("normalize_constant", self.constant, "a positive number", lambda constant: 0 < constant < math.inf)
        if self.normalization == "token" and self.constant != LossScale.constant:
            raise SettingsError(
                f"`normalize_constant` is {self.constant}, but `loss_normalization` is 'token', which divides by the "
                "number of response tokens alone. Leave it out, or set `loss_normalization` to 'sequence'."
            )

    def divisor(self, num_response_tokens: _Count, num_sequences: _Count) -> _Count:
        """The divisor of a step with so many response tokens and sequences, over all microbatches and ranks."""
        return num_response_tokens if self.normalization == "token" else self.constant * num_sequences


def sft_loss(
    log_probs: Tensor,
    response_mask: Tensor,
    *,
    num_response_tokens: int,
    num_sequences: int,
    loss_normalization: LossNormalization = "token",
    normalize_constant: float = 1.0,
) -> Tensor:
    """The share of one microbatch in an optimizer step's loss: its sum over all microbatches and ranks is the loss.

    The loss of the step is the negative log-likelihood of its response tokens, summed, and divided by

    - `"token"`: the step's number of response tokens, or
    - `"sequence"`: `normalize_constant` times the step's number of sequences. With equal microbatches this is
      `sft_microbatch_train_step` accumulated over `gradient_accumulation_steps`.

    Args:
        log_probs: `(batch_size, sequence_length)`, in nats.
        response_mask: The same shape; True where the label is a response token.
        num_response_tokens: Number of response tokens in the whole step: all microbatches, all ranks.
        num_sequences: Number of sequences in the whole step.
        loss_normalization: `"token"` or `"sequence"`.
        normalize_constant: Only for `"sequence"`.

    Returns:
        A scalar.

    Raises:
        SettingsError: If `loss_normalization` is neither, or `normalize_constant` is not positive, or given with
            `"token"`.
    """
    scale = LossScale(loss_normalization, normalize_constant)
    return -masked_normalize(log_probs, response_mask, scale.divisor(num_response_tokens, num_sequences))


def sft_microbatch_train_step(
    policy_log_probs: Tensor,
    response_mask: Tensor,
    gradient_accumulation_steps: int,
    normalize_constant: float | None = 1.0,
) -> tuple[Tensor, dict[str, Any]]:
    """Backpropagate the loss of one microbatch.

    `loss = mean_b(-masked_normalize(log_probs, mask, normalize_constant, dim=-1)) / gradient_accumulation_steps`

    Args:
        policy_log_probs: `(batch_size, sequence_length)`, carrying gradients.
        response_mask: The same shape; 1 or True where the label is a response token.
        gradient_accumulation_steps: Microbatches per optimizer step.
        normalize_constant: Divides each sequence's sum. None: 1.

    Returns:
        The loss that was backpropagated (a detached scalar), and metadata, scalars too: the same `loss`,
        `num_response_tokens`, and `mean_log_prob`, the mean over the response tokens in nats (NaN if there is none).

    Raises:
        SettingsTypeError: If `gradient_accumulation_steps` is not a whole number.
        SettingsError: If it is below 1.

    Source: Stanford CS336, assignment 5, "SFT helper methods".
    """
    check_integer("gradient_accumulation_steps", gradient_accumulation_steps, at_least=1)
    constant = 1.0 if normalize_constant is None else normalize_constant
    per_sequence = -masked_normalize(policy_log_probs, response_mask, constant, dim=-1)
    loss = per_sequence.mean() / gradient_accumulation_steps
    loss.backward()
    num_response_tokens = (response_mask == 1).expand_as(policy_log_probs).sum()
    mean_log_prob = masked_normalize(policy_log_probs.detach(), response_mask, num_response_tokens)
    loss = loss.detach()
    return loss, {"loss": loss, "num_response_tokens": num_response_tokens, "mean_log_prob": mean_log_prob}
