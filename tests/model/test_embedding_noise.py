"""Noise on embeddings against the formula of NEFTune, and the same however rows are batched."""

import math
from copy import deepcopy

import pytest
import torch
from support.models import tiny_model

from lightning_sft.data.tokens.collation import collate
from lightning_sft.errors import SettingsError
from lightning_sft.model.embedding_noise import EmbeddingNoise, NoisyRows

NAMES, LENGTHS = ["line 1", "line 2", "line 3"], [4, 60, 25]
IDS = [torch.arange(length) + 3 for length in LENGTHS]


def noise_of(noise, rows, input_ids):
    """What the model's body gets, less the embeddings."""
    model, seen = tiny_model(), []
    noise.install(model)
    noise.install(model)  # as for each stage of a run: that does not add it twice
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with noise.on(rows):
        model(input_ids)
    model(input_ids)
    assert torch.equal(seen[1], embeddings.weight[input_ids])  # no noise but on rows that are trained on
    return (seen[0] - seen[1]).detach()


def padded(alpha=5.0, seed=0, step=7, order=(0, 1, 2)):
    """The noise of each row, by its number; with what is beyond its end checked."""
    width = max(LENGTHS[i] for i in order)
    ids = torch.stack([torch.nn.functional.pad(IDS[i], (0, width - LENGTHS[i])) for i in order])
    rows = NoisyRows([NAMES[i] for i in order], [LENGTHS[i] for i in order], packed=False, step=step)
    noise = noise_of(EmbeddingNoise(alpha, seed), rows, ids)
    assert all(not row[LENGTHS[i] :].any() for i, row in zip(order, noise, strict=True))
    return {i: row[: LENGTHS[i]] for i, row in zip(order, noise, strict=True)}


def test_noise_is_uniform_within_alpha_over_the_root_of_a_row_s_own_size():
    for i, noise in padded().items():
        bound = 5.0 / math.sqrt(LENGTHS[i] * 16)
        scaled = (noise / bound).flatten()
        assert scaled.abs().max() <= 1 + 1e-5
        assert scaled.abs().max() > 0.9
        assert abs(scaled.mean()) < 4 * math.sqrt(1 / 3 / len(scaled))
        assert scaled.square().mean() == pytest.approx(1 / 3, abs=4 * math.sqrt(4 / 45 / len(scaled)))


def test_noise_of_a_row_does_not_depend_on_what_it_is_batched_with_nor_on_the_layout():
    together = padded()
    packed = noise_of(EmbeddingNoise(5.0, 0), NoisyRows(NAMES, LENGTHS, packed=True, step=7), torch.cat(IDS)[None])
    for i, part in enumerate(packed[0].split(LENGTHS)):
        torch.testing.assert_close(part, together[i], rtol=0, atol=1e-6)
        torch.testing.assert_close(padded(order=[i])[i], together[i], rtol=0, atol=1e-6)
        torch.testing.assert_close(padded(order=[2, 1, 0])[i], together[i], rtol=0, atol=1e-6)


def test_each_row_step_and_seed_has_noise_of_its_own():
    drawn = [padded()[1], padded(step=8)[1], padded(seed=1)[1]]
    drawn.append(padded(order=[0])[0].new_zeros(60, 16) + padded()[2].repeat(3, 1)[:60])
    for i, one in enumerate(drawn):
        assert all(not torch.allclose(one[:20], other[:20], atol=1e-3) for other in drawn[:i])


def test_a_copy_of_a_model_has_the_noise_of_the_copy_and_so_have_other_embeddings():
    model, noise = tiny_model(), EmbeddingNoise(5.0, 0)
    noise.install(model)
    model, noise = deepcopy((model, noise))
    for _ in range(2):
        noise.install(model)
        embeddings, rows = model.get_input_embeddings(), NoisyRows(NAMES[:1], LENGTHS[:1], packed=False, step=7)
        with noise.on(rows):
            added = embeddings(IDS[0][None])[0] - embeddings.weight[IDS[0]]
        torch.testing.assert_close(added, padded()[0], rtol=0, atol=1e-6)
        model.set_input_embeddings(torch.nn.Embedding(131, 16))


def test_noise_leaves_the_random_numbers_of_dropout_alone():
    state = torch.get_rng_state()
    model, noise = tiny_model(), EmbeddingNoise(5.0, 0)
    noise.install(model)
    torch.set_rng_state(state)
    with noise.on(NoisyRows(NAMES[:1], LENGTHS[:1], packed=False, step=0)):
        model(IDS[0][None])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_device_without_a_row_has_no_noise(layout):
    nothing = collate([], layout)
    rows = NoisyRows(nothing.locations, nothing.lengths, layout == "packed", step=0)
    assert not noise_of(EmbeddingNoise(5.0, 0), rows, nothing.input_ids).any()


@pytest.mark.filterwarnings("ignore")  # of torch's compiler, about itself
def test_a_compiled_body_gets_the_noise_of_each_step():
    torch.manual_seed(0)
    model, noise = tiny_model(), EmbeddingNoise(50.0, 0)
    noise.install(model)
    input_ids, outputs = IDS[0][None], []
    for compiled in (False, True):
        if compiled:
            model.base_model.compile(dynamic=True, backend="eager")
        outputs.append([])
        for step in (None, 0, 1, None):
            num_rows = 0 if step is None else 1
            rows = NoisyRows(NAMES[:num_rows], LENGTHS[:num_rows], packed=False, step=step or 0)
            with noise.on(rows), torch.no_grad():
                outputs[-1].append(model(input_ids, use_cache=False).logits)
    for plain, compiled in zip(*outputs, strict=True):
        torch.testing.assert_close(compiled, plain)
    assert not torch.allclose(outputs[1][1], outputs[1][2], atol=1e-3)


@pytest.mark.parametrize("alpha", [0, -1.0, math.inf])
def test_a_strength_that_is_none_is_refused(alpha):
    with pytest.raises(SettingsError, match=f"`neftune_noise_alpha` is {alpha}, expected a positive number, or none"):
        EmbeddingNoise(alpha, 0)
