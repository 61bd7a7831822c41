"""Generation records in loggers: tables, and histograms where there are such things."""

import math
from collections.abc import Sequence

import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from lightning_sft.generation.records import GenerationRecord
from lightning_sft.generation.report.terminal import beginning, end

_COLUMNS = ("prompt", "response", "ground_truth", "reward", "format_reward", "answer_reward", "response_length")
_LONGEST_TEXT = 600  # characters of a cell
_ESCAPES = {ord(char): f"&#{ord(char)};" for char in "\\|`*_[]<>&#~!"} | {ord("\n"): "<br>", ord("\r"): ""}


def log_records(logger: Logger, step: int, records: Sequence[GenerationRecord], num_rows: int) -> None:
    """Show a step's records in a logger: TensorBoard gets a table and histograms, others a table if they have one."""
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_text("generations", markdown_table(records[:num_rows]), step)
        for name, values in _distributions(records).items():
            finite = [value for value in values if math.isfinite(value)]
            if finite:
                logger.experiment.add_histogram(f"generations/{name}", torch.tensor(finite), step)
    elif hasattr(logger, "log_table"):  # Weights & Biases
        data = [[getattr(record, name) for name in _COLUMNS] for record in records[:num_rows]]
        logger.log_table("generations", columns=list(_COLUMNS), data=data, step=step)


def _distributions(records: Sequence[GenerationRecord]) -> dict[str, list[float]]:
    scored = [record for record in records if record.answer_reward is not None]
    return {
        "response_length_correct": [record.response_length for record in scored if record.is_correct],
        "response_length_incorrect": [record.response_length for record in scored if not record.is_correct],
        "token_entropy": [value for record in records for value in record.token_entropies],
        "token_log_prob": [value for record in records for value in record.token_log_probs],
    }


def markdown_table(records: Sequence[GenerationRecord]) -> str:
    """Records as a table for TensorBoard's text tab: texts escaped, long prompts cut in front, responses at the end.

    All numbers share one column: TensorBoard squeezes narrow ones until their words break.
    """
    lines = ["| prompt | response | result |", "|---|---|---|"]
    for record in records:
        parts = [
            f"{record.response_length} tokens",
            f"{record.token_entropy:.3f} nats",
            f"ended by {record.stop_reason}",
        ]
        if record.reward is not None:
            shares = f"format {record.format_reward:g}, answer {record.answer_reward:g}"
            parts = [f"reward {record.reward:g} ({shares})", f"expected {record.ground_truth}", *parts]
        texts = (end(record.prompt, _LONGEST_TEXT), beginning(record.response, _LONGEST_TEXT), "; ".join(parts))
        lines.append("| " + " | ".join(_cell(text) for text in texts) + " |")
    return "\n" + "\n".join(lines)


def _cell(text: str) -> str:
    return text.translate(_ESCAPES) or " "
