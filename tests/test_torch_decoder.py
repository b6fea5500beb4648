from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import small

from thinker.decode.torch_decoder import TorchDecoder
from thinker.sampling import Draws

# Decoders answer in float32. Of a float64 model that is the only rounding: one unit in the last place.
ROUNDING = {"rtol": 2.4e-7, "atol": 1e-9}


def whole(model, ids):
    """The logits of every position, without a cache: (T, V)."""
    with torch.inference_mode():
        return model(torch.tensor([ids])).float().numpy()[0]


def ids_of(config, length, seed=0):
    return np.random.default_rng(seed).integers(config.vocab_size, size=length).tolist()


@pytest.mark.parametrize("fixed", [False, True])
def test_prefill_and_steps_equal_the_uncached_forward(config, build, fixed):
    """Catches a cache that is not advanced, positions that restart, and logits of another place than the last."""
    model = build(config)
    decoder, ids = TorchDecoder(model, fixed=fixed), ids_of(config, 20)
    expected = whole(model, ids)
    np.testing.assert_allclose(decoder.prefill(0, ids[:5]), expected[4], **ROUNDING)
    np.testing.assert_allclose(decoder.prefill(0, ids[5:12], every=True), expected[5:12], **ROUNDING)
    for place in range(12, 20):
        np.testing.assert_allclose(decoder.step([0], [ids[place]])[0], expected[place], **ROUNDING)
    assert decoder.length(0) == 20


@pytest.mark.parametrize("fixed", [False, True])
def test_slots_of_different_lengths_step_together_as_they_do_alone(config, build, fixed):
    """Catches a row that sees its neighbour's keys or length, slots out of order, and gaps between slots."""
    model = build(config)
    decoder = TorchDecoder(model, slots=6, fixed=fixed)
    texts = {slot: ids_of(config, 15, seed=slot) for slot in (5, 0, 4, 2)}
    for slot, begun in zip(texts, (1, 7, 3, 4), strict=True):
        decoder.prefill(slot, texts[slot][:begun])
    for _ in range(5):
        lengths = {slot: decoder.length(slot) for slot in texts}
        logits = decoder.step(list(texts), [texts[slot][lengths[slot]] for slot in texts])
        for row, slot in enumerate(texts):
            np.testing.assert_allclose(logits[row], whole(model, texts[slot])[lengths[slot]], **ROUNDING)
    assert [decoder.length(slot) for slot in range(6)] == [12, 0, 9, 0, 8, 6]


def test_more_slots_take_memory_for_what_is_held_alone(build):
    """Catches an empty rest of the context that is copied for every slot that begins, and so taken from the machine."""
    decoder = TorchDecoder(build(small("gqa")), slots=2)
    decoder.prefill(0, ids_of(decoder.config, 5))
    held = decoder.cache.keys[:, :, :, :5].clone()
    decoder.cache.keys[:, :, :, 5:] = torch.nan
    decoder.prefill(1, ids_of(decoder.config, 1))
    assert torch.equal(decoder.cache.keys[:, :1, :, :5], held)
    assert not decoder.cache.keys[:, 0, :, 5:].any(), "zeros that nobody has touched"


def test_a_slot_that_was_cut_goes_on_as_if_the_rest_had_never_been(build):
    """Catches keys of a forgotten tail that are still attended to, as with a shared prefix of two conversations."""
    model = build(small("gqa"))
    decoder, first, second = TorchDecoder(model), ids_of(model.config, 16), ids_of(model.config, 16, seed=1)
    decoder.prefill(0, first)
    decoder.truncate(0, 6)
    assert decoder.length(0) == 6
    np.testing.assert_allclose(decoder.prefill(0, second[6:]), whole(model, first[:6] + second[6:])[-1], **ROUNDING)
    decoder.truncate(0, 0)
    np.testing.assert_allclose(decoder.prefill(0, second), whole(model, second)[-1], **ROUNDING)


def test_embeddings_of_ids_equal_the_ids(build):
    """Catches embeddings that are rounded, transposed or looked up again."""
    model = build(small("dense"), dtype=torch.float32)
    ids = ids_of(model.config, 9)
    decoder = TorchDecoder(model, slots=2)
    embeddings = model.tok_emb(torch.tensor(ids)).detach().numpy()
    np.testing.assert_array_equal(decoder.prefill(0, embeddings=embeddings), decoder.prefill(1, ids))
    np.testing.assert_array_equal(*decoder.step([0, 1], [3, 3]))


def test_a_model_in_training_samples_without_dropout_and_goes_on_training(build):
    """Catches dropout in the samples of a training run, and a run that trains on without dropout after its sample."""
    model = build(small("dense"))
    ids = ids_of(model.config, 8)
    expected = whole(model, ids)[-1]
    model.train()
    np.testing.assert_allclose(TorchDecoder(model).prefill(0, ids), expected, **ROUNDING)
    assert model.training
    assert model.blocks[0].dropout.training


def test_memory_is_taken_when_a_slot_is_first_used_and_what_others_hold_stays(build):
    """Catches a long context allocated for slots that nobody uses, and a cache that grows by forgetting."""
    model = build(small("dense"))
    decoder, ids = TorchDecoder(model, slots=1000), ids_of(model.config, 8)
    decoder.prefill(0, ids[:5])
    assert decoder.cache.keys.shape[1] == 1
    decoder.prefill(3, ids)
    assert decoder.cache.keys.shape[1] == 4
    np.testing.assert_allclose(decoder.prefill(0, ids[5:]), whole(model, ids)[-1], **ROUNDING)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: d.prefill(0), "got none"),
        (lambda d: d.prefill(0, [1], np.zeros((1, 32))), "got both"),
        (lambda d: d.prefill(0, []), "at least one id"),
        (lambda d: d.prefill(0, [61]), "token id 61 is outside the vocabulary of 61"),
        (lambda d: d.prefill(0, [1] * 44), r"5 \+ 44 tokens exceed ctx_len 48"),
        (lambda d: d.prefill(0, embeddings=np.zeros((2, 31))), r"\(2, 31\): expected \(T, 32\)"),
        (lambda d: d.prefill(2, [1]), "slot 2 is not one of 0 to 1"),
        (lambda d: d.step([0, 1], [1]), "2 slots and 1 tokens"),
        (lambda d: d.step([0, 0], [1, 1]), "repeat one"),
        (lambda d: d.step([1, 0], [1, -1]), "token id -1"),
        (lambda d: d.run([0], [1], Draws(1, 61)), "draws are for 1 slots and 61 tokens, the decoder has 2 and 61"),
        (lambda d: d.run([0], [1], Draws(2, 60)), "draws are for 2 slots and 60 tokens, the decoder has 2 and 61"),
        (lambda d: d.truncate(0, 6), "slot 0 holds 5 tokens and can't be cut to 6"),
        (lambda d: d.truncate(1, -1), "slot 1 holds 0 tokens and can't be cut to -1"),
        (lambda d: TorchDecoder(d.model, slots=0), "slots is 0"),
    ],
)
def test_what_cannot_be_computed_is_refused_and_changes_nothing(build, call, message):
    """Catches an index error from the depths of torch, and a slot that has grown by a token that was refused."""
    decoder = TorchDecoder(build(small("dense")), slots=2)
    decoder.prefill(0, [1, 2, 3, 4, 5])
    with pytest.raises(ValueError, match=message):
        call(decoder)
    assert (decoder.length(0), decoder.length(1)) == (5, 0)


@pytest.mark.parametrize("fixed", [False, True])
def test_a_full_slot_stops_the_step_of_all(build, fixed):
    """Catches neighbours that have moved on when one slot had no room left."""
    decoder = TorchDecoder(build(small("dense")), slots=3, fixed=fixed)
    decoder.prefill(0, [1])
    decoder.prefill(2, [1] * 48)
    with pytest.raises(ValueError, match=r"48 \+ 1 tokens exceed ctx_len 48"):
        decoder.step([0, 2], [1, 1])
    assert (decoder.length(0), decoder.length(2)) == (1, 48)


def test_fixed_steps_leave_the_memory_of_other_slots_alone(build):
    """Catches a slot that gains a token while only its neighbours step: one that is full, empty, or in between."""
    model = build(small("gqa"))
    decoder = TorchDecoder(model, slots=4, fixed=True)
    full, some = ids_of(model.config, 48), ids_of(model.config, 9, seed=1)
    decoder.prefill(0, full)
    decoder.prefill(1, some)
    decoder.prefill(3, some[:4])
    before = decoder.cache.keys.clone(), decoder.cache.values.clone()
    logits = decoder.step([3], [some[4]])
    np.testing.assert_allclose(logits[0], whole(model, some[:5])[-1], **ROUNDING)
    for memory, was in zip((decoder.cache.keys, decoder.cache.values), before, strict=True):
        changed = (memory != was).any(dim=-1).any(dim=2).any(dim=0)  # (B, C)
        assert changed.nonzero().tolist() == [[3, 4]]
    assert [decoder.length(slot) for slot in range(4)] == [48, 9, 0, 5]
    decoder.truncate(0, 0)
    decoder.prefill(2, some)  # the memory grows or is used anew: steps go on from what is there
    np.testing.assert_allclose(decoder.step([2, 1], [5, 5])[0], whole(model, [*some, 5])[-1], **ROUNDING)


def test_a_fixed_step_asks_nothing_of_its_tensors(build):
    """Catches a value read back from the accelerator in the middle of a step, which no graph can replay."""
    model = build(small("gqa_qk_norm"), dtype=torch.float32)
    decoder = TorchDecoder(model, slots=2, fixed=True)
    ids = ids_of(model.config, 9)
    decoder.prefill(0, ids[:8])
    expected = decoder.step([0], [ids[8]])
    step = decoder._step
    recorded = torch.compile(step._logits, backend="eager", fullgraph=True)  # refuses what can't be recorded
    with torch.no_grad():
        np.testing.assert_allclose(recorded()[:1].numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
def test_an_accelerator_gives_the_same_numbers(build):
    """Catches tensors that were left on the processor, and slots on two devices."""
    model = build(small("gqa"))
    ids = ids_of(model.config, 12)
    expected = whole(model, ids)
    decoder = TorchDecoder(model.cuda(), slots=2)
    np.testing.assert_allclose(decoder.prefill(0, ids[:9]), expected[8], **ROUNDING)
    decoder.prefill(1, ids[:11])
    logits = decoder.step([0, 1], [ids[9], ids[11]])
    np.testing.assert_allclose(logits, expected[[9, 11]], **ROUNDING)
