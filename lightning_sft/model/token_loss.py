"""`TokenLoss`: what each response token adds to the loss."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_sft.checks import check_number
from lightning_sft.errors import SettingsError, one_line, shorten

NamedLoss = Literal["nll", "dft"]
LossFunction = Callable[[Tensor], Any]  # gives a tensor; the command line also takes functions that do not say so
LossType = NamedLoss | LossFunction

_MADE_UP = (-0.1, -3.0, 0.0, -20.0, -0.7)  # log-probabilities


def dft(log_probs: Tensor) -> Tensor:
    """Dynamic Fine-Tuning: `-p * log p`, of which the factor gets no gradient. Source: arXiv:2508.05629."""
    return -log_probs.detach().exp() * log_probs


@dataclass(frozen=True)
class TokenLoss:
    """What each response token adds to the loss, before it is divided.

    Attributes:
        kind: `nll`: `-log p(label)`. `dft`: see there. Or any function of the labels' log-probabilities,
            `(num_tokens,)`, that gives each token's loss, `(num_tokens,)`, from its log-probability alone.
        label_smoothing: Share `e` of the vocabulary in the target: `-(1 - e) * log p(label) - e * mean_v log p(v)`.

    Source: of smoothing, Szegedy et al. 2016 (arXiv:1512.00567).
    """

    kind: LossType = "nll"
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if callable(self.kind):
            self._check_function(self.kind)
        elif self.kind not in get_args(NamedLoss):
            raise SettingsError(
                f"`loss_type` is {shorten(self.kind)}, expected nll, dft or a function. Where a checkpoint names a "
                "function, give it to `load_from_checkpoint` as `loss_type`."
            )
        check_number("label_smoothing", self.label_smoothing, "at least 0 and below 1", lambda share: 0 <= share < 1)
        if self.kind != "nll" and self.label_smoothing:
            raise SettingsError(
                f"`loss_type` is {self.name!r} and `label_smoothing` is {self.label_smoothing}, which cannot be "
                "combined: set `label_smoothing` to 0, or `loss_type` to 'nll'."
            )

    @property
    def name(self) -> str:
        """A word, or the import path of the function."""
        return self.kind if isinstance(self.kind, str) else _import_path(self.kind)

    def factors(self, log_probs: Tensor) -> Tensor | None:
        """Minus the derivative of each token's loss by its log-probability, detached; None: it is 1."""
        if self.kind == "nll":
            return None
        with torch.enable_grad():
            given = log_probs.detach().requires_grad_()
            (slopes,) = torch.autograd.grad(self.of(given, None).sum(), given)
        return -slopes

    def of(self, log_probs: Tensor, mean_log_probs: Tensor | None) -> Tensor:
        """The loss of each token, `(num_tokens,)`.

        Args:
            log_probs: Of the labels, `(num_tokens,)`.
            mean_log_probs: Mean over the vocabulary, `(num_tokens,)`; needed if labels are smoothed.
        """
        if self.kind != "nll":
            losses: Tensor = dft(log_probs) if self.kind == "dft" else self.kind(log_probs)
            return losses
        if not self.label_smoothing:
            return -log_probs
        assert mean_log_probs is not None
        return -(1 - self.label_smoothing) * log_probs - self.label_smoothing * mean_log_probs

    def _check_function(self, function: LossFunction) -> None:
        """Refuse a function that does not give each token a loss of its own, with a gradient."""
        expected = (
            "Expected is a function of torch tensors, from the log-probabilities of labels, `(num_tokens,)`, to the "
            "loss of each token by its own alone, of the same shape and type, finite and with a gradient, such as "
            "`-log_probs`."
        )
        try:
            problem = _problem(function)
        except Exception as error:
            problem = f"fails on {list(_MADE_UP)}: {one_line(error)}"
            raise SettingsError(f"`loss_type` is the function `{self.name}`, which {problem}. {expected}") from error
        if problem is not None:
            raise SettingsError(f"`loss_type` is the function `{self.name}`, which {problem}. {expected}")


def _problem(function: LossFunction) -> str | None:
    """What is wrong with a function, tried out on made-up log-probabilities; None if nothing is."""
    log_probs = torch.tensor(_MADE_UP, device="cpu", requires_grad=True)
    with torch.enable_grad():
        losses = function(log_probs)
        if not isinstance(losses, Tensor):
            return f"returns {shorten(losses)} of type {type(losses).__name__}"
        if losses.shape != log_probs.shape or losses.dtype != log_probs.dtype:
            wanted = f"{log_probs.dtype} of shape {tuple(log_probs.shape)}"
            return f"returns {losses.dtype} of shape {tuple(losses.shape)} for {wanted}"
        if not losses.requires_grad:
            return "returns losses without a gradient"
        alone = torch.cat([function(each) for each in (*log_probs.split(1), log_probs[:0])])
        found, expected = (torch.stack([each, *torch.autograd.grad(each.sum(), log_probs)]) for each in (losses, alone))
    if not found.isfinite().all():
        return f"has losses {found[0].tolist()} and derivatives {found[1].tolist()} at {list(_MADE_UP)}"
    if not torch.allclose(found, expected, rtol=1e-4, atol=1e-6):
        return "gives a token another loss, or another gradient, beside others than alone"
    return None


def _import_path(function: LossFunction) -> str:
    if isinstance(function, partial):
        given = [*map(str, function.args), *(f"{name}={value}" for name, value in function.keywords.items())]
        return f"{_import_path(function.func)}({', '.join(given)})"
    kind = function if hasattr(function, "__qualname__") else type(function)
    return f"{kind.__module__}.{kind.__qualname__}"


NLL = TokenLoss()
