"""Steps of any lengths run through the graphs that the first step has compiled."""

import random

import pytest
import torch
import torch._dynamo
from support.cuda import attend_as_the_kernel
from support.fits import fit
from support.models import character_tokenizer, tiny_config
from torch import nn

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.model import attention


def rows_like_word_problems(number):
    """Lengths as those of GSM8K's prompts and answers are spread, in characters."""
    drawn = random.Random(0)

    def characters(character, mean, spread):
        return character * max(2, int(drawn.lognormvariate(mean, spread)))

    return [{"prompt": characters("p", 4.0, 0.5), "output": characters("o", 4.3, 0.6)} for _ in range(number)]


@pytest.mark.filterwarnings("ignore")  # of torch's compiler, about itself
@pytest.mark.parametrize(("layout", "num_graphs"), [("packed", 1), ("padded", 2)])
def test_real_lengths_need_no_further_compilation(tmp_path, monkeypatch, layout, num_graphs):
    torch._dynamo.reset()  # what other tests have compiled of the same code
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile_with = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: compile_with(self, backend=count, **options))
    monkeypatch.setattr(attention, "_attend_each", attend_as_the_kernel)
    data = {"batch_size": 8, "layout": layout, "max_tokens_per_microbatch": 600}  # a few to some dozen documents
    module = SFTModule(tiny_config(max_position_embeddings=1024), compile=True)
    datamodule = SFTDataModule(character_tokenizer(), rows_like_word_problems(480), **data)
    trainer = fit(tmp_path, module, datamodule, max_steps=60)[2]
    assert trainer.global_step == 60
    assert len(graphs) == num_graphs
