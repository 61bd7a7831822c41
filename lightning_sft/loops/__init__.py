"""How Lightning's loops see a run: all that touches the trainer's own settings and counters.

Lightning counts batches and validates and stops by epochs; a run here is counted in optimizer steps, and continues at
any of them. So these of Lightning's attributes, most of them private, are set for as long as a run lasts:

- The trainer's limits and intervals (`run_length.py`): in optimizer steps, whatever they were given in.
- `fit_loop.run` (`training_run.py`): between the restoring of a checkpoint and the first step all counters are set.
- The counters of the loops, `_batches_that_stepped` and `restarting` with what belongs to it (`progress.py`): restored
  by Lightning they are wrong once a run has continued twice. `Due` is what is left to do after the latest step, and
  `_Progress.at` gives the counters from which Lightning does just that.
- `fit_loop._combined_loader` (`training_run.py`): a loader asked for too early knows nothing of the checkpoint.
- `_logger_connector._callback_metrics` (`training_run.py`): callbacks find what was logged before the checkpoint.
- `manual_optimization._on_after_step` (`trainer_state.py`): a hook after each optimizer step, whoever takes it.
- `epoch_loop._broadcast_sigterm_tensor` (`trainer_state.py`): devices do not wait for one another before each step.

A new version of Lightning may do any of this otherwise, hence the upper bound in `pyproject.toml`.
"""
