"""GSM8K rows in the form of the `r1_zero` prompt."""

import re
from collections.abc import Mapping
from typing import Any

from lightning_sft.errors import SettingsError


def r1_zero_row(row: Mapping[str, Any]) -> dict[str, Any]:
    r"""Turn a GSM8K answer into a response that continues `<think>`; a `row_transform` of the datamodule.

    `"4 + 4 = <<4+4=8>>8\n#### 8"` becomes `" 4 + 4 = 8 </think> <answer> 8 </answer>"`: the calculator annotations are
    removed, and the final answer moves between the tags, without thousands separators.

    Args:
        row: With `question` and `answer`, as in `openai/gsm8k`.

    Returns:
        The row with `output` and `ground_truth` added.

    Raises:
        SettingsError: If `answer` is not a text that ends in `#### <answer>`.
    """
    answer = row.get("answer")
    reasoning, mark, final = answer.rpartition("####") if isinstance(answer, str) else ("", "", "")
    if not mark or not final.strip():
        raise SettingsError(f"`answer` is {answer!r:.60}, expected GSM8K's reasoning with '#### <answer>' at its end.")
    reasoning = re.sub(r"<<[^>]*>>", "", reasoning).strip()
    ground_truth = final.strip().replace(",", "")
    output = f" {reasoning} </think> <answer> {ground_truth} </answer>"
    return {**row, "output": output, "ground_truth": ground_truth}
