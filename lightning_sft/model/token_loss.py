"""`TokenLoss`: what each response token adds to the loss."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lightning_sft.checks import check_choice, check_number
from lightning_sft.errors import SettingsError

LossType = Literal["nll", "dft"]


@dataclass(frozen=True)
class TokenLoss:
    """What each response token adds to the loss, before it is divided.

    Attributes:
        kind: `nll`: `-log p(label)`. `dft`: `-p(label) * log p(label)`, of which the factor gets no gradient.
        label_smoothing: Share `e` of the vocabulary in the target: `-(1 - e) * log p(label) - e * mean_v log p(v)`.

    Source: of `dft`, Wu et al. 2025 (arXiv:2508.05629); of smoothing, Szegedy et al. 2016 (arXiv:1512.00567).
    """

    kind: LossType = "nll"
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_choice("loss_type", self.kind, LossType)
        check_number("label_smoothing", self.label_smoothing, "at least 0 and below 1", lambda share: 0 <= share < 1)
        if self.kind == "dft" and self.label_smoothing:
            raise SettingsError(
                f"`loss_type` is 'dft' and `label_smoothing` is {self.label_smoothing}, which cannot be combined: set "
                "`label_smoothing` to 0, or `loss_type` to 'nll'."
            )

    def factors(self, log_probs: Tensor) -> Tensor | None:
        """What the loss of each token is multiplied by, detached; None: by nothing."""
        return log_probs.detach().exp() if self.kind == "dft" else None

    def of(self, log_probs: Tensor, mean_log_probs: Tensor | None) -> Tensor:
        """The loss of each token, `(num_tokens,)`.

        Args:
            log_probs: Of the labels, `(num_tokens,)`.
            mean_log_probs: Mean over the vocabulary, `(num_tokens,)`; needed if labels are smoothed.
        """
        if (factors := self.factors(log_probs)) is not None:
            return -factors * log_probs
        if not self.label_smoothing:
            return -log_probs
        assert mean_log_probs is not None
        return -(1 - self.label_smoothing) * log_probs - self.label_smoothing * mean_log_probs


NLL = TokenLoss()
