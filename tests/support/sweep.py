"""One architecture's first optimizer step and scores, against each row alone through the plain model."""

import copy
import logging
import multiprocessing
import queue
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any
from unittest.mock import patch

import lightning as L
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.errors import SettingsError
from lightning_sft.model.linear_head import find_linear_head
from lightning_sft.model.log_probs import get_response_log_probs
from lightning_sft.model.lora import add_lora
from support.architectures import tiny_architecture
from support.models import character_tokenizer

# Of 7, 44, 3, 19 and 24 inputs; `<eos>` is the last label.
ROWS = [
    {"prompt": "a:", "output": "stone"},
    {"prompt": "river and", "output": "light and day or trees of the forest"[:35]},
    {"prompt": "b", "output": "to"},
    {"prompt": "sunmoonstar", "output": "a grass "},
    {"prompt": "of the sea and", "output": "the waters"},
]
TIME_LIMIT = 120  # seconds for each type
_TOLERANCES = {torch.float64: 1e-5, torch.float32: 2e-4}  # norms and rotary angles are float32 in float64 too


class Gradients(L.Callback):
    """Of the first optimizer step, as far as weights have any."""

    found: dict[str, Tensor] | None = None

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self.found is None:
            self.found = gradients_of(pl_module.model)


def gradients_of(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@dataclass
class Verdict:
    """What came of an architecture.

    Attributes:
        model_type: The type.
        size: Parameters of the tiny model.
        layout: What its batches are by default; with the reason if padded.
        head: What its head is.
        errors: Relative differences to each row alone: `packed`, `padded`, `helpers`, `lora`.
        refusal: In whose words it is refused.
        dtype: In which it was compared.
    """

    model_type: str
    size: int = 0
    layout: str = ""
    head: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    refusal: str = ""
    dtype: torch.dtype = torch.float64

    @property
    def state(self) -> str:
        """`agrees`, `refused`, `not built`, or `WRONG`."""
        if self.refusal:
            return self.refusal.partition(":")[0]
        return "agrees" if max(self.errors.values(), default=1) < _TOLERANCES[self.dtype] else "WRONG"


def token_rows(rows: Sequence[dict[str, str]]) -> list[tuple[Tensor, int]]:
    """Ids of the character tokenizer by hand, and how many of them are the prompt's."""
    return [(torch.tensor([*map(ord, row["prompt"] + row["output"]), 128]), len(row["prompt"])) for row in rows]


def naive_step(model: PreTrainedModel, rows: Sequence[dict[str, str]] = ROWS) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a step in which each row goes alone through a plain model that has seen no other."""
    tokens = token_rows(rows)
    total = sum(len(ids) - num_prompt for ids, num_prompt in tokens)
    loss, gradients = 0.0, dict[str, Tensor]()
    for ids, num_prompt in tokens:
        fresh = copy.deepcopy(model)
        part = -plain_log_probs(fresh, ids)[num_prompt - 1 :].sum() / total
        part.backward()
        loss += part.item()
        for name, gradient in gradients_of(fresh).items():
            gradients[name] = gradients.get(name, 0) + gradient
    return loss, gradients


def plain_log_probs(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Of each label of a row that goes through the model alone."""
    log_p = model(ids[None, :-1], use_cache=False).logits[0].double().log_softmax(-1)
    return log_p.gather(-1, ids[1:, None])[:, 0]


def first_step(
    model: PreTrainedModel, rows: Sequence[dict[str, str]] = ROWS, *, module: Any = None, **data: Any
) -> tuple[SFTModule, float, dict[str, Tensor]]:
    """`SFTModule`, loss and gradients of its first optimizer step over all rows."""
    gradients = Gradients()
    options: dict[str, Any] = {"max_grad_norm": None, "optimizer": lambda weights: torch.optim.SGD(weights, lr=0.1)}
    sft = SFTModule(model, **(options | {"warmup_steps": 0, "lr_scheduler": "constant"} | (module or {})))
    with (
        tempfile.TemporaryDirectory() as folder,
        patch("datasets.config.HF_DATASETS_CACHE", folder),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=1,
            default_root_dir=folder,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            callbacks=[gradients],
        )
        trainer.fit(sft, SFTDataModule(character_tokenizer(), rows, batch_size=len(rows), **data))
    assert gradients.found is not None
    return sft, trainer.callback_metrics["train/loss"].item(), gradients.found


def difference(given: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Norm of the difference of all gradients, relative to their norm."""
    squares = [torch.zeros(2, dtype=torch.float64)]
    for name in given.keys() | expected.keys():
        ours, naive = (each.get(name, torch.zeros(())).double() for each in (given, expected))
        squares.append(torch.stack([(ours - naive).square().sum(), naive.square().sum()]))
    off, size = torch.stack(squares).sum(0).sqrt().tolist()
    return off / size


def examine(model_type: str, **changes: Any) -> Verdict:
    """Build a tiny model of a type, train it for a step in both layouts, and score with the helpers."""
    verdict = Verdict(model_type)
    try:
        plain = tiny_architecture(model_type, **changes).train()
        verdict.size = sum(weight.numel() for weight in plain.parameters())
        naive = _naive_in_float64(plain, verdict)
    except Exception as error:
        verdict.refusal = f"not built: {type(error).__name__}: {error}"
        return verdict
    try:
        for layout in (None, "padded"):
            if layout and verdict.layout.startswith(layout):
                continue  # it was so by default
            sft, loss, gradients = first_step(copy.deepcopy(plain), layout=layout, gradient_accumulation_steps=2)
            if layout is None:
                verdict.layout = f"padded: {sft.why_not_packed}" if sft.why_not_packed else "packed"
            name = layout or verdict.layout.partition(":")[0]
            verdict.errors[name] = max(abs(loss / naive[0] - 1), difference(gradients, naive[1]))
        verdict.errors["lora"] = _adapters(plain)
        verdict.errors["helpers"], verdict.head = _helpers(plain)  # some models keep what they have seen
    except SettingsError as error:
        verdict.refusal = f"refused: {error}"
    except Exception as error:
        verdict.refusal = f"CRASHED: {type(error).__name__}: {error}"
    return verdict


def _naive_in_float64(plain: PreTrainedModel, verdict: Verdict) -> tuple[float, dict[str, Tensor]]:
    try:
        return naive_step(plain.double())
    except RuntimeError:  # it makes float32 of something by itself
        verdict.dtype = torch.float32
        return naive_step(plain.float())


def _adapters(plain: PreTrainedModel) -> float:
    """With the default targets; adapters whose output is not zero, so that all have gradients."""
    settings = {"r": 2, "init_lora_weights": False}
    adapted = copy.deepcopy(plain)
    try:
        add_lora(adapted, settings)
    except SettingsError:
        return 0.0
    loss, gradients = naive_step(adapted)
    _, given_loss, given = first_step(copy.deepcopy(plain), module={"lora": settings})
    return max(abs(given_loss / loss - 1), difference(given, gradients))


def _helpers(plain: PreTrainedModel) -> tuple[float, str]:
    ids, num_prompt = token_rows(ROWS)[1]
    mask = torch.arange(len(ids) - 1)[None] >= num_prompt - 1
    plain.zero_grad()
    scores = get_response_log_probs(plain, ids[None, :-1], ids[None, 1:], True, response_mask=mask)
    weights = torch.linspace(-1, 2, int(mask.sum()), dtype=torch.float64)
    (scores["log_probs"][mask] * weights).sum().backward()
    gradients = [gradients_of(plain)]
    plain.zero_grad()
    expected = plain_log_probs(plain, ids)[num_prompt - 1 :]
    (expected * weights).sum().backward()
    gradients.append(gradients_of(plain))
    off = (scores["log_probs"][mask] - expected).norm() / expected.norm()
    head = find_linear_head(plain)
    words = "logits kept" if head is None else "linear"
    if head is not None and (head.transform.scale, head.transform.softcap) != (1.0, None):
        words += f", times {head.transform.scale:g}" if head.transform.scale != 1 else ""
        words += f", capped at {head.transform.softcap:g}" if head.transform.softcap else ""
    return max(off.item(), difference(*gradients)), words


def examine_apart(model_type: str) -> Verdict:
    """In a process of its own, so that whatever a type does ends with it."""
    for name in ("peft", "torch._dynamo", "transformers.optimization"):
        import_module(name)  # once, rather than in each process
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    process = context.Process(target=_answer, args=(answers, model_type))
    process.start()
    try:
        return answers.get(timeout=TIME_LIMIT)
    except queue.Empty:
        return Verdict(model_type, refusal=f"CRASHED: no answer within {TIME_LIMIT} s")
    finally:
        process.join(2)
        process.kill()


def _answer(answers: Any, model_type: str) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    answers.put(examine(model_type))
