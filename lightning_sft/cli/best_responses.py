"""`lightning-sft best_responses`: from what a model has said to rows that it learns."""

import json
from pathlib import Path

from lightning_sft.checks import check_local
from lightning_sft.errors import SettingsError, path_from_here
from lightning_sft.generation.best_responses import choose_responses


def best_responses(records: str | list[str], output: str, per_prompt: int = 1, min_reward: float = 1.0) -> None:
    """Write the best responses from files of `predict` as training rows: expert iteration, rejection sampling.

    For each prompt the responses with the highest reward are chosen, the first ones among equals, without duplicates
    and without truncated responses. Each ends in the token that ended it: if a chat template ends turns with another
    token than EOS, train on the rows with `--data.append_eos false`.

    Args:
        records: A file that `predict` wrote, a glob pattern, or a list of these.
        output: File to write, for `--data.train_data`: JSON lines with `prompt`, `output`, `ground_truth` and `reward`.
        per_prompt: Maximum number of responses per prompt.
        min_reward: Minimum reward of a response.

    Raises:
        MissingFileError: If there is no such file.
        SettingsError: If a file cannot be read or holds something else; no response has a reward, or enough of it; or
            the output cannot be written or would take the place of records.
    """
    check_local("output", output)
    path = Path(output).expanduser()
    if path.suffix != ".jsonl":
        raise SettingsError(f"`output` is {output!r}; expected a file ending in .jsonl.")
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace") as file:
            if '"response":' in file.readline():  # rows have it as `output`
                raise SettingsError(f"`output` is {output!r}, which holds records. Give another file.")
    chosen = choose_responses(records, per_prompt, min_reward)
    print(chosen)
    if not chosen.rows:
        raise SettingsError(
            f"no response has a reward of at least {min_reward:g} and has ended. Sample more of them, or lower "
            "`min_reward`."
        )
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen.rows)
    unfinished = path.with_suffix(".unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(lines, encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        raise SettingsError(f"`output` is {output!r}, which cannot be written: {error.strerror}.") from error
    print(f"Rows: {path_from_here(path)}")
