"""FSDP2 on two processes against the model in one piece."""

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from lightning_utilities.core.imports import RequirementCache
from support.models import character_tokenizer, tiny_config
from support.processes import Processes
from support.runs import whole
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_sft import Sampling, SettingsError, log_generations
from lightning_sft.model.blocks import compile_blocks
from lightning_sft.model.checkpointing import ActivationCheckpointing
from lightning_sft.model.log_probs import score_responses
from lightning_sft.model.packing import enable_packing
from lightning_sft.model.sharding import Sharding, gradient_sync, is_sharded, load_sharded, reshard, transformer_blocks

MODELS = {
    "tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "untied": {"model_type": "llama", "tie_word_embeddings": False},
    "gpt2": {"model_type": "gpt2", "embd_pdrop": 0, "resid_pdrop": 0, "attn_pdrop": 0},
    "soft-capped": {"model_type": "gemma2", "final_logit_softcapping": 3.0, "head_dim": 8, "sliding_window": 4},
}
COMPILED = "soft-capped"  # its blocks are of two kinds


def build(name, seed=0):
    torch.manual_seed(seed)
    config = tiny_config(num_key_value_heads=1, bos_token_id=None, eos_token_id=128, pad_token_id=128) | MODELS[name]
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))


def score(model, rank, microbatch):
    ids = torch.arange(12).view(1, 12) + 5 * rank + microbatch
    return score_responses(model, ids, ids + 1, torch.arange(4, 12), normalize_constant=8.0).loss


class Gathers(TorchDispatchMode):
    num = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.num += "allgather" in str(function)
        return function(*args, **(kwargs or {}))


def gathered_before_each_block(model):
    """How many of the root and the blocks are gathered, or on their way, once each block has its own weights."""
    reshard(model)
    counts, inside = [], [next(block.children()) for block in transformer_blocks(model)]
    with Gathers() as gathers, torch.no_grad():
        hooks = [layer.register_forward_pre_hook(lambda *_: counts.append(gathers.num)) for layer in inside]
        model(torch.arange(12).view(1, 12))
    for hook in hooks:
        hook.remove()
    return counts


def compile_counted(model):
    """Compile the blocks without generating code; returns the list of what is compiled once they run."""
    graphs, compile_with = [], nn.Module.compile

    def count(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "compile", lambda self, **options: compile_with(self, backend=count, **options))
        compile_blocks(model)
    return graphs


def compare_responses(model, reference):
    """Three prompts for two processes, one of them with room for four tokens only.

    Both call the model equally often, until the last response is done.
    """
    prompts, sampling = ["ab", "abcdef", "a" * 60], Sampling(max_new_tokens=5, temperature=1.0, num_samples=2)
    arguments = character_tokenizer(), prompts, [None] * len(prompts)
    alone, _ = log_generations(reference, *arguments, sampling=sampling)
    for found, _ in (
        log_generations(model, *arguments, sampling=sampling, max_tokens_per_batch=1),
        log_generations(reference, *arguments, sampling=sampling, distributed=True),
    ):
        for ours, theirs in zip(found, alone, strict=True):
            assert (ours.index, ours.sample, ours.response) == (theirs.index, theirs.sample, theirs.response)
            assert ours.stop_reason == theirs.stop_reason
            assert ours.token_log_probs == pytest.approx(theirs.token_log_probs, rel=1e-4, abs=1e-5)


def compare(folder):
    """Every process: the same numbers as the whole model, though only the first one has ever held it."""
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for name in MODELS:
        reference = build(name)
        model = load_sharded(lambda name=name: build(name, seed=rank), torch.device("cpu"), Sharding("cpu"))
        assert is_sharded(model)
        assert not is_sharded(reference)
        for (key, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
            assert torch.equal(whole(ours), theirs), key
            assert ours.to_local().numel() < theirs.numel(), key
        for (key, ours), theirs in zip(model.named_buffers(), reference.buffers(), strict=True):
            assert torch.equal(ours, theirs), key
        assert enable_packing(model) == enable_packing(reference)
        if RequirementCache("torch>=2.12") or name != COMPILED:  # of Gemma 2, 2.11 has begun one alone by then
            assert gathered_before_each_block(model) == [3, 3]  # the root and both blocks: the second ahead of its turn
        graphs = []
        if name == COMPILED:
            graphs = compile_counted(model)
            ActivationCheckpointing(True).enable(model.train())
        for microbatch in range(2):
            with gradient_sync(model, enabled=microbatch == 1):
                score(model, rank, microbatch).backward()
            exchanged = [weight.grad is not None for weight in model.parameters()]
            assert all(exchanged) if microbatch == 1 else not any(exchanged)
            for each in range(world_size):
                (score(reference, each, microbatch) / world_size).backward()
        for (key, ours), theirs in zip(model.named_parameters(), reference.named_parameters(), strict=True):
            torch.testing.assert_close(whole(ours.grad), theirs[1].grad, msg=lambda text, key=key: f"{key}: {text}")
        assert model.state_dict().keys() == reference.state_dict().keys()
        assert bool(graphs) == (name == COMPILED)
        if name != COMPILED:  # each length of a response would be compiled
            compare_responses(model, reference)
    (folder / f"done_{rank}").touch()
    dist.destroy_process_group()


def test_a_sharded_model_is_the_whole_model(tmp_path):
    assert Processes(compare, tmp_path, world_size=2).wait() == [0, 0]
    assert len(list(tmp_path.iterdir())) == 2


def refuse(folder):
    dist.init_process_group("gloo")

    def build_nothing():
        raise SettingsError("`model` is 'none', which cannot be loaded")

    with pytest.raises(ValueError, match="`model` is 'none'"):
        load_sharded(build_nothing, torch.device("cpu"), Sharding("cpu"))
    (folder / f"done_{dist.get_rank()}").touch()


def test_a_model_that_cannot_be_loaded_is_refused_on_every_process(tmp_path):
    assert Processes(refuse, tmp_path, world_size=2).wait() == [0, 0]
    assert len(list(tmp_path.iterdir())) == 2


def test_blocks_neither_contain_each_other_nor_share_weights():
    """Mamba names its blocks and the mixer in each of them; what is sharded already cannot be sharded again."""
    config = AutoConfig.for_model("mamba", vocab_size=16, hidden_size=8, num_hidden_layers=2)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert transformer_blocks(model) == list(model.backbone.layers)
    model.backbone.layers[1].mixer.in_proj.weight = model.backbone.layers[0].mixer.in_proj.weight
    with pytest.raises(SettingsError, match=r"Blocks of MambaForCausalLM share weights, .* Use the strategy `ddp`"):
        transformer_blocks(model)


def test_a_model_that_does_not_name_its_blocks_is_refused_but_compiled_as_a_whole(monkeypatch):
    compiled, model = [], build("untied")
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: compiled.append(self))
    assert transformer_blocks(model) == list(model.model.layers)
    compile_blocks(model)
    assert compiled == list(model.model.layers)
    monkeypatch.setattr(model, "_no_split_modules", None)
    compile_blocks(model)
    assert compiled[-1] is model.model
    with pytest.raises(SettingsError, match="LlamaForCausalLM does not say what its blocks are"):
        transformer_blocks(model)
