"""Microbatches through the model."""

from transformers import PreTrainedModel

from lightning_sft.data.steps.optimizer_step import OptimizerStep
from lightning_sft.data.tokens.microbatch import Microbatch
from lightning_sft.errors import SettingsTypeError
from lightning_sft.model.attention import packed_inputs
from lightning_sft.model.head import ResponseScores
from lightning_sft.model.log_probs import score_responses
from lightning_sft.model.rotary import positions_by_row
from lightning_sft.model.token_loss import NLL, TokenLoss
from lightning_sft.training.metrics import ResponseMetrics


def check_batch(batch: object) -> None:
    """Refuse batches of other loaders."""
    if not isinstance(batch, OptimizerStep):
        raise SettingsTypeError(
            f"The loader gives a batch of type {type(batch).__name__}, but `SFTModule` takes the `OptimizerStep`s of "
            "`SFTDataModule`, which also takes rows with `input_ids` and `labels`: `trainer.fit(module, "
            "SFTDataModule(tokenizer, rows))`."
        )


def score_microbatch(
    model: PreTrainedModel,
    microbatch: Microbatch,
    *,
    normalize_constant: float | None = None,
    token_loss: TokenLoss = NLL,
    return_is_top1: bool = False,
) -> ResponseScores:
    """Scores of a microbatch's response tokens on the model's device; the rest is as for `score_responses`."""
    inputs = packed_inputs(model, microbatch.model_inputs())
    if microbatch.packing is None:
        positions = positions_by_row(model, microbatch.lengths, microbatch.input_ids.shape[1])
        inputs = {} if positions is None else {"position_ids": positions.to(microbatch.input_ids.device)}
    return score_responses(
        model,
        microbatch.input_ids,
        microbatch.labels,
        microbatch.response_positions,
        normalize_constant=normalize_constant,
        token_loss=token_loss,
        return_is_top1=return_is_top1,
        **inputs,
    )


def evaluate(model: PreTrainedModel, step: OptimizerStep, metrics: ResponseMetrics, index: int) -> list[ResponseScores]:
    """Add the response tokens of a step to metrics of a set of rows, and return the scores of each microbatch."""
    check_batch(step)
    scores = [score_microbatch(model, microbatch, return_is_top1=True) for microbatch in step.microbatches]
    for each, microbatch in zip(scores, step.microbatches, strict=True):
        metrics.update(each, microbatch.num_sequences, index)
    return scores
