"""The head alone, with entropies, forward and backward: time and memory beside full logits, TRL's function and torch's.

    python tests/benchmarks/head.py --rows 2048 --hidden 1024 --vocabulary 151936 --dtype bfloat16

Each list may have several values; all combinations are run. Memory is the peak beyond inputs and gradients.
"""

import argparse
import functools
import itertools
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from measure import GIB, PeakMemory, in_turn, machine, seconds, table
from torch import Tensor

Step = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def ours_known_weights(hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor) -> Tensor:
    from lightning_sft.model.head import Head, score_labels

    return score_labels(hidden, Head(weight), labels, token_weights=token_weights).loss


def ours_any_gradient(hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor) -> Tensor:
    from lightning_sft.model.head import Head, score_labels

    return -(score_labels(hidden, Head(weight), labels).log_probs * token_weights).sum()


@functools.cache
def _tiles_of_any_width() -> Any:
    from lightning_sft.model.tiles import Tiling, score_tile

    return Tiling.for_device("cuda", torch.compile(score_tile, dynamic=True))


def ours_any_width(hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor) -> Tensor:
    """With one compiled function for tiles of any width, rather than one for each."""
    from lightning_sft.model.head import Head, score_labels

    options = {"token_weights": token_weights, "tiling": _tiles_of_any_width()}
    return score_labels(hidden, Head(weight), labels, **options).loss


def full_logits(hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor) -> Tensor:
    logits = F.linear(hidden, weight).float()
    log_probs = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)
    with torch.no_grad():
        log_p = logits.log_softmax(-1)
        -(log_p.exp() * log_p).sum(-1)  # the entropy, as the course's text computes it
    return -(log_probs * token_weights).sum()


class _Products(torch.autograd.Function):
    """The three matrix products that no head can do without."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        logits = F.linear(hidden, weight)
        ctx.save_for_backward(hidden, weight, logits)
        return logits[0, 0].clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, Tensor]:
        hidden, weight, logits = ctx.saved_tensors
        return logits @ weight, logits.t() @ hidden


def products_alone(hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor) -> Tensor:
    return _Products.apply(hidden, weight)


def liger(hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor) -> Tensor:
    """The mean loss alone, without entropies and without weights of tokens."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden, weight, labels)


def trl(hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor) -> Tensor:
    from trl.trainer import utils

    log_probs, *_ = utils._ChunkedLogProbFunction.apply(
        hidden,
        weight,
        None,
        labels,
        1.0,
        utils._CHUNKED_LOGPROB_CHUNK_SIZE,
        None,
        1.0,
        ("log_probs", "entropy"),
    )
    return -(log_probs * token_weights).sum()


def torch_chunked(
    hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor, rows: int | None = None
) -> Tensor:
    """`F.linear_cross_entropy` of torch 2.13: the mean loss alone, without entropies and without weights of tokens."""
    chunks = {} if rows is None else {"batch_chunk_size": rows, "chunking_method": None}
    options = torch.nn.LinearCrossEntropyOptions(**chunks)
    return F.linear_cross_entropy(hidden, weight, labels, options=options)


CONTESTANTS = {
    "ours, known weights": ours_known_weights,
    "ours, any gradient": ours_any_gradient,
    "ours, known weights, code for any width": ours_any_width,
    "full logits": full_logits,
    "TRL": trl,
    "Liger, no entropies": liger,
    "the three products alone": products_alone,
    "torch, chunks of 128 rows, no entropies": functools.partial(torch_chunked, rows=128),
    "torch, its own chunks, no entropies": torch_chunked,
}


def contest(name: str, rows: int, hidden: int, vocabulary: int, dtype: str, device: str, repeats: int) -> dict:
    torch.manual_seed(0)
    kind = {"dtype": getattr(torch, dtype), "device": device}
    states = torch.randn(rows, hidden, **kind).requires_grad_()
    weight = torch.empty(vocabulary, hidden, **kind).normal_(std=hidden**-0.5).requires_grad_()
    labels = torch.randint(vocabulary, (rows,), device=device)
    token_weights = torch.full((rows,), 1 / rows, device=device)

    def step() -> None:
        states.grad = weight.grad = None
        CONTESTANTS[name](states, weight, labels, token_weights).backward()

    small = [tensor[:8].detach().requires_grad_() for tensor in (states, weight)]
    CONTESTANTS[name](*small, labels[:8] % 8, token_weights[:8]).backward()  # what libraries load on first use
    peak = PeakMemory(device)
    times = [seconds(step, device) for _ in range(1 + repeats)]
    gradients = (states.numel() + weight.numel()) * states.element_size()
    return {"seconds": statistics.median(times[1:]), "bytes": peak.read() - gradients}


class Contestant:
    """A named contestant that can be sent to another process."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, **arguments: object) -> dict:
        return contest(self.name, **arguments)  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[2048])
    parser.add_argument("--hidden", type=int, nargs="+", default=[1024])
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[151936])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--rounds", type=int, default=3, help="times that every contestant is run, in turn")
    parser.add_argument("--repeats", type=int, default=2, help="timed steps in each run, after one that is not")
    options = parser.parse_args()
    print(machine(options.device))
    contestants = {name: Contestant(name) for name in options.contestants}
    for dtype, rows, hidden, vocabulary in itertools.product(
        options.dtype, options.rows, options.hidden, options.vocabulary
    ):
        arguments = {"rows": rows, "hidden": hidden, "vocabulary": vocabulary, "dtype": dtype}
        arguments |= {"device": options.device, "repeats": options.repeats}
        rate, results = in_turn(contestants, arguments, options.rounds, dtype, options.device)
        print(f"\n{rows} rows, hidden {hidden}, vocabulary {vocabulary}, {dtype}; GEMM {rate / 1e9:,.0f} GFLOP/s\n")
        reference = results.get("full logits", {"error": "not run"})
        lines = []
        for name, result in results.items():
            if "error" in result:
                lines.append([name, str(result["error"]), "", "", "", ""])
                continue
            share = 6 * rows * hidden * vocabulary / rate / result["seconds"]
            ratios = ["", ""]
            if "error" not in reference:
                ratios = [
                    f"{reference['seconds'] / result['seconds']:.2f}x",
                    f"{result['bytes'] / reference['bytes']:.2f}x",
                ]
            lines.append(
                [name, f"{result['seconds']:.3f}", ratios[0], f"{share:.0%}", f"{result['bytes'] / GIB:.2f}", ratios[1]]
            )
        print(table(["", "seconds", "speed", "of the GEMM rate (3 products)", "GiB", "memory"], lines), flush=True)


if __name__ == "__main__":
    main()
