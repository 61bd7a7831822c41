"""Optimizer steps whose loss or gradient norm is not a finite number."""

import lightning as L
import pytest
import torch
from support.models import tiny_model
from support.runs import ROWS, read_log, train

from lightning_sft import SFTModule
from lightning_sft.training.guard import StepGuard

# Every "z" is a NaN: the only row with one stands in line 12.
POISONED = [*ROWS[:11], {"prompt": "z", "output": "zzz"}, *ROWS[11:22]]


def poisoned_model():
    torch.manual_seed(0)
    model = tiny_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[ord("z")] = torch.nan
    return model


def poisoned(folder, **options):
    module = {"model": poisoned_model()} | options.pop("module", {})
    return train(folder, data={"train_data": POISONED}, module=module, **options)


def test_a_step_that_is_no_number_stops_the_run_names_its_rows_and_is_never_saved(tmp_path):
    with pytest.raises(FloatingPointError) as error_info:
        poisoned(tmp_path, every_n_steps=1)
    log = read_log(tmp_path / "steps_0.jsonl")
    message = str(error_info.value)
    assert message.startswith(f"Optimizer step {len(log) + 1} has the loss nan and the gradient norm nan; its rows")
    assert "row 12" in message
    assert not any("row 12" in step["rows"] for step in log)
    if log:
        checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt")
        assert checkpoint["global_step"] == len(log)


@pytest.mark.parametrize("hook", ["on_validation_start", "on_train_end", "on_save_checkpoint"])
def test_what_is_still_on_the_device_is_read_before_anything_relies_on_it(hook, monkeypatch):
    """On CUDA a step is looked at one step later, but no checkpoint, validation or end comes in between."""
    module = SFTModule(tiny_model())
    module.guard.announce(torch.tensor(torch.nan), ["row 1"])
    with monkeypatch.context() as on_device:
        on_device.setattr(module.guard, "check", lambda: None)
        assert module.guard.allows(3, torch.tensor(0.5), is_scaled=False)
    message = "Optimizer step 3 has the loss nan and the gradient norm 0.5; its rows on this device: row 1"
    with pytest.raises(FloatingPointError, match=message):
        getattr(module, hook)(*([{}] if hook == "on_save_checkpoint" else []))


def test_what_a_device_computes_with_a_refused_step_is_refused_too(monkeypatch):
    """As where `ModelCheckpoint` has `save_on_exception`: the weights have had the step by the time that it is read."""
    guard = StepGuard("error")
    with monkeypatch.context() as on_device:
        on_device.setattr(guard, "check", lambda: None)
        guard.allows(3, torch.tensor(torch.nan), is_scaled=False)
    with pytest.raises(FloatingPointError, match="Optimizer step 3"):
        guard.allows(4, torch.tensor(torch.nan), is_scaled=False)
    with pytest.raises(FloatingPointError, match="Optimizer step 4"):
        guard.check()


def test_an_infinite_gradient_norm_stops_the_run_too(tmp_path):
    class Explode(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if trainer.global_step == 3:
                next(pl_module.parameters()).grad.fill_(torch.inf)

    with pytest.raises(FloatingPointError, match=r"step 4 has the loss .* and the gradient norm inf; its rows"):
        train(tmp_path, callbacks=[Explode()])


def test_skipped_steps_leave_weights_optimizer_and_schedule_alone_and_are_counted(tmp_path):
    seen = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.before = self.snapshot(pl_module)

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            unchanged = [torch.equal(a, b) for a, b in zip(self.before, self.snapshot(pl_module), strict=True)]
            skipped = trainer.callback_metrics["train/skipped_steps"].item()
            seen.append(("row 12" in batch.locations, all(unchanged), skipped))

        @staticmethod
        def snapshot(module):
            weights = [weight.detach().nan_to_num(7.0) for weight in module.parameters()]
            states = [state["exp_avg"] for state in module.optimizers().state.values()]
            states += [torch.zeros_like(weights[i]) for i in range(len(states), len(weights))]
            return [t.clone() for t in (*weights, *states, torch.tensor(module.lr_schedulers().last_epoch))]

    poisoned(tmp_path, module={"nonfinite": "skip"}, callbacks=[Watch()], max_steps=6)
    assert [unchanged for _, unchanged, _ in seen] == [bad for bad, _, _ in seen]
    assert [bad for bad, _, _ in seen].count(True) == 2  # once in each epoch of 3 steps
    counts = [count for _, _, count in seen]
    assert counts == [sum(bad for bad, _, _ in seen[: i + 1]) for i in range(6)]
    again = poisoned(tmp_path, module={"nonfinite": "skip"}, max_steps=9)  # goes on from the checkpoint
    assert read_log(tmp_path / "steps_0.jsonl")[-1]["train/skipped_steps"] == 3
    assert len(again["losses"]) == 9


@pytest.mark.parametrize("nonfinite", ["error", "skip"])
def test_gradients_that_overflow_float16_are_neither_an_error_nor_skipped(nonfinite):
    guard = StepGuard(nonfinite)
    guard.announce(torch.tensor(1.0), ["row 1"])
    assert not guard.allows(1, torch.tensor(torch.inf), is_scaled=True)
    assert (guard.num_steps, guard.num_skipped, guard.known_loss) == (1, 0, 1.0)
    assert not guard.allows(2, torch.tensor(torch.inf), is_scaled=True)  # in a step of a subclass's own
    guard.check()
