"""What others ask of a trainer's loops, or set in them."""

import signal
from functools import partial

import lightning as L
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import EarlyStopping


def leave_inference_mode(trainer: L.Trainer) -> None:
    """Evaluate without inference mode: FSDP2 could not train weights that it has gathered there for the first time."""
    validation = trainer.fit_loop.epoch_loop.val_loop
    for loop in (validation, trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
        loop.inference_mode = False


def logged_metrics(trainer: L.Trainer | None) -> dict[str, float]:
    """The latest numbers that callbacks of a run can look at."""
    return {} if trainer is None else {name: float(value) for name, value in trainer.callback_metrics.items()}


def ends_here(trainer: L.Trainer) -> bool:
    """Whether the epoch that is ending is the run's last; to be asked in `on_train_epoch_end`."""
    loop = trainer.fit_loop
    num_epochs = loop.epoch_progress.current.processed  # type: ignore[attr-defined]
    return trainer.should_stop or trainer.global_step == loop.max_steps or num_epochs == loop.max_epochs


def has_stopped_early(trainer: L.Trainer) -> bool:
    """Whether an `EarlyStopping` has ended the run, as its state says.

    Before the first step it has not, although a `patience` of 0, or the state of another run, looks as if it had.
    """
    stops = [each for each in trainer.callbacks if isinstance(each, EarlyStopping)]  # type: ignore[attr-defined]
    return trainer.global_step > 0 and any(each.wait_count >= max(each.patience, 1) for each in stops)


def validation_follows(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether the trainer validates after this step; in a run over other loaders its interval begins with the epoch."""
    interval, every = trainer.val_check_batch, trainer.check_val_every_n_epoch
    if not trainer.enable_validation or not interval:
        return False
    count = trainer.global_step if every is None else batch_idx + 1
    return count % interval == 0 and (every is None or (trainer.current_epoch + 1) % every == 0)


def log_latest_step(trainer: L.Trainer) -> None:
    """Log the latest optimizer step, if it is to be logged, before a hook ends the process: Lightning logs after it."""
    if trainer.training:
        trainer._logger_connector.update_train_step_metrics()


def call_after_optimizer_steps(trainer: L.Trainer) -> None:
    """Under manual optimization call the module's `on_after_optimizer_step`, a hook that Lightning does not have."""
    loop = trainer.fit_loop.epoch_loop.manual_optimization
    count = partial(type(loop)._on_after_step, loop)  # from then on `global_step` is that of the step

    def count_and_call() -> None:
        count()
        if hook := getattr(trainer.lightning_module, "on_after_optimizer_step", None):  # the trainer may get another
            hook()

    loop._on_after_step = count_and_call  # type: ignore[method-assign]


def exchange_no_signals(trainer: L.Trainer) -> bool:
    """Keep Lightning from asking all processes before each step for a SIGTERM, and waiting for their answers.

    The caller then receives signals. Returned is whether Lightning had received SIGTERM already, which it forgets: it
    would end this process alone.
    """
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    connector = trainer._signal_connector
    received, connector.received_sigterm = connector.received_sigterm, False
    return received


def exchange_signals_again(trainer: L.Trainer) -> None:
    """Undo `exchange_no_signals`, if it was called."""
    vars(trainer.fit_loop.epoch_loop).pop("_broadcast_sigterm_tensor", None)


def requeue_signal(trainer: L.Trainer) -> signal.Signals | None:
    """The signal by which SLURM asks for the job to be requeued, if Lightning is to obey it."""
    environment = trainer._accelerator_connector.cluster_environment  # the strategy of a single device has none
    if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
        return environment.requeue_signal or signal.SIGUSR1
    return None
