"""Settings of the `GenerationMonitor` that cannot be used, and a reward that hangs in a run."""

import time

import pytest
from support.fits import make_trainer
from support.models import character_tokenizer, tiny_config
from support.refusals import ROWS, Refusal, each

from lightning_sft import GenerationMonitor, Sampling, SFTDataModule, SFTModule
from lightning_sft.errors import SettingsTypeError

REFUSED = {
    "num_prompts below 0": Refusal(
        lambda folder: GenerationMonitor(num_prompts=-1), "`num_prompts` is -1, expected at least 0."
    ),
    "steps to generate at, for no prompts": Refusal(
        lambda folder: GenerationMonitor(num_prompts=0, every_n_steps=5),
        "`num_prompts` is 0, so nothing is generated, but `every_n_steps` is 5. Leave one out.",
    ),
    "every_n_steps of a half": Refusal(
        lambda folder: GenerationMonitor(every_n_steps=0.5),
        "`every_n_steps` is 0.5 of type float, expected a whole number.",
        SettingsTypeError,
    ),
    "sampling of a dictionary": Refusal(
        lambda folder: GenerationMonitor(sampling={"temperature": 1}),
        "`sampling` is {'temperature': 1} of type dict, expected a `Sampling`.",
        SettingsTypeError,
    ),
    "no time for rewards": Refusal(
        lambda folder: GenerationMonitor(reward_seconds=0),
        "`reward_seconds` is 0, expected a positive number, or none.",
    ),
    "reward that is no function": Refusal(
        lambda folder: GenerationMonitor(reward_fn="exact"),
        "`reward_fn` is 'exact', expected a function of response and ground truth.",
        SettingsTypeError,
    ),
}


@each(REFUSED)
def test_a_setting_that_cannot_be_used_is_refused_by_name(refusal, tmp_path):
    refusal.check(tmp_path)


def hangs(response: str, ground_truth: str) -> dict[str, float]:
    while True:
        try:
            time.sleep(60)
        except Exception:
            continue


def test_a_reward_that_hangs_does_not_stop_training(tmp_path):
    monitor = GenerationMonitor(hangs, num_prompts=1, sampling=Sampling(max_new_tokens=2), reward_seconds=0.2)
    trainer = make_trainer(tmp_path, max_steps=1, callbacks=[monitor])
    with pytest.warns(
        UserWarning, match=r"failed on 1 of 1 examples, which count as 0. The first: it took longer than"
    ):
        trainer.fit(SFTModule(tiny_config()), SFTDataModule(character_tokenizer(), ROWS, val_data=ROWS))
    assert trainer.global_step == 1
    assert trainer.callback_metrics["val/reward_failures"] == 1
