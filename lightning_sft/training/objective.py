"""`Objective`: what an optimizer step minimises."""

from dataclasses import dataclass

from lightning_sft.model.embedding_noise import EmbeddingNoise
from lightning_sft.model.token_loss import TokenLoss
from lightning_sft.training.losses import LossScale


@dataclass(frozen=True)
class Objective:
    """What an optimizer step minimises.

    Attributes:
        token_loss: What each response token adds to the loss.
        scale: What their sum is divided by.
        noise: What is added to the embeddings.
        router_coefficient: What the router loss is multiplied by; 0: it is no part of the loss.
    """

    token_loss: TokenLoss
    scale: LossScale
    noise: EmbeddingNoise
    router_coefficient: float = 0.0

    def settings(self) -> dict[str, object]:
        """Those that make another loss, by the names that `SFTModule` has for them."""
        settings: dict[str, object] = {
            "loss_type": self.token_loss.name,
            "label_smoothing": self.token_loss.label_smoothing,
            "loss_normalization": self.scale.normalization,
        }
        if self.scale.normalization == "sequence":
            settings["normalize_constant"] = self.scale.constant
        return settings
