"""`train_on_prompts`: every token of a row is learnt, not only the response."""

import lightning as L
import pytest
import torch
from support.chat import CHATML, LONG, SYSTEM, THINKING, THOUGHT, assistant, chat_tokenizer, encode, responses, user
from support.models import character_tokenizer, tiny_config
from support.rows import refusal

from lightning_sft import SFTDataModule, SFTModule

ROWS = [{"prompt": "What is 2+2?", "output": "4"}, {"prompt": "Hi", "output": "Hello!"}]


@pytest.mark.parametrize(("bos", "layout"), [(False, "packed"), (True, "padded")])
def test_the_loss_is_that_of_a_language_model_over_all_tokens(bos, layout):
    tokenizer = character_tokenizer(bos=bos)
    data = SFTDataModule(tokenizer, val_data=ROWS, layout=layout, train_on_prompts=True)
    module = SFTModule(tiny_config())
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    (found,) = trainer.validate(module, data, verbose=False)
    total = count = 0
    for row in ROWS:
        text = tokenizer(row["prompt"])["input_ids"] + tokenizer(row["output"], add_special_tokens=False)["input_ids"]
        ids = torch.tensor([[*text, tokenizer.eos_token_id]])
        log_probs = module.model(input_ids=ids).logits.double().log_softmax(-1)
        total -= log_probs[0, :-1].gather(-1, ids[0, 1:, None]).sum().item()
        count += ids.shape[1] - 1
    assert found["val/loss"] == pytest.approx(total / count, rel=1e-6)


def test_all_turns_of_a_conversation_are_learnt_as_the_template_writes_them():
    tokenizer = chat_tokenizer(CHATML)
    messages = [SYSTEM, assistant("Hello."), *LONG]  # also one that nobody has asked for
    row, cut = encode([{"messages": messages}, {"messages": messages[:4]}], tokenizer, train_on_prompts=True)
    assert row["input_ids"] == tokenizer.apply_chat_template(messages)["input_ids"]
    assert responses(row, tokenizer) == [tokenizer.apply_chat_template(messages, tokenize=False)]
    assert row["num_response_tokens"] == len(row["input_ids"]) - 1
    (without,) = encode([{"messages": messages[:4]}], tokenizer)
    assert cut["input_ids"] == without["input_ids"]


def test_a_prompt_that_is_cut_is_still_learnt():
    (row,) = encode(ROWS[:1], character_tokenizer(), max_length=5, too_long="truncate", train_on_prompts=True)
    assert row["num_response_tokens"] == 4


@pytest.mark.parametrize(
    ("row", "template", "why"),
    [
        ({"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}, CHATML, "the row is tokenised, and its labels or masks"),
        ({"messages": THOUGHT}, THINKING, "with this chat template each turn of the conversation is an example"),
        ({"messages": [user("a"), assistant("b", weight=0), *LONG]}, CHATML, "a turn has the `weight` 0"),
    ],
    ids=["masks", "each turn", "a weight"],
)
def test_a_row_that_cannot_be_learnt_as_a_whole_is_refused(row, template, why):
    message = refusal([row], tokenizer=chat_tokenizer(template), train_on_prompts=True)
    assert f"row 1 of `train_data`: `train_on_prompts` is true, but {why}" in message
    assert message.endswith("or set `train_on_prompts` to false.")


def test_a_tokenised_row_of_which_every_token_is_learnt_already_is_taken():
    rows = [{"input_ids": [5, 6, 7]}, {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}]
    for row in encode(rows, character_tokenizer(), train_on_prompts=True):
        assert row["num_response_tokens"] == 2


def test_two_settings_that_exclude_each_other_are_refused():
    with pytest.raises(ValueError, match="`train_on_prompts` is true, which learns all turns, but `train_on_turns`"):
        SFTDataModule(character_tokenizer(), train_on_prompts=True, train_on_turns="last")
