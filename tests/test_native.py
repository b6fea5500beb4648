"""Native decoding: right against the network, and the same bytes however a text is cut, batched, or shared out."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import product as product_of

import numpy as np
import pytest
import torch
from conftest import randomise, small
from numba import njit

from benchmarks import same_bytes
from thinker import attention, moe
from thinker import model as network
from thinker.compiled import processor
from thinker.decode.decoder import Decoder
from thinker.decode.native import ahead, crew, open_native, product, rows, shares
from thinker.decode.native.decoder import NativeDecoder
from thinker.decode.native.elementwise import to_float16
from thinker.decode.native.layout import CHUNK, JOB, PANEL, PIECE, PIECES, QUERIES, ROWS, SHAPE, SHORT, sparse
from thinker.decode.native.pace import LEAST, MOST, Pace
from thinker.decode.torch_decoder import TorchDecoder
from thinker.formats.q8 import Q8Tensor
from thinker.model import ThinkerLM
from thinker.sampling import Draws, Sampling
from thinker.trace import trace


@dataclass
class Files:
    """What a decoder needs of a model's files."""

    config: object
    tensors: dict


def files_of(model, quantised=False):
    tensors = {}
    for name, parameter in model.named_parameters():
        array = parameter.detach().numpy()
        keep = array.ndim == 1 or ".router." in name
        tensors[name] = Q8Tensor.quantise(array) if quantised and not keep else array
    return Files(model.config, tensors)


def model_of(config, seed=0):
    return randomise(ThinkerLM(config), seed)


def logits_of(model, tokens):
    with torch.no_grad():
        return model(torch.as_tensor(tokens)[None])[0].numpy()


def tokens_of(config, count, seed=0):
    return np.random.default_rng(seed).integers(0, config.vocab_size, count)


def assert_within(ours, theirs):
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


def test_logits_equal_the_networks(config):
    """Bug: any difference of a kernel from the network: RoPE's halves, a wrong head's keys, an expert's weight."""
    model = model_of(config)
    tokens = tokens_of(config, 40)
    theirs = logits_of(model, tokens)
    decoder = open_native(files_of(model), threads=1)
    assert_within(decoder.prefill(0, tokens, every=True), theirs)
    decoder.truncate(0, 5)
    steps = np.concatenate([decoder.step([0], [token]) for token in tokens[5:]])
    assert_within(steps, theirs[5:])
    with torch.no_grad():
        embeddings = model.tok_emb(torch.as_tensor(tokens)).numpy()
    decoder.truncate(0, 0)
    assert_within(decoder.prefill(0, embeddings=embeddings, every=True), theirs)


@pytest.mark.parametrize("config", ["gqa_qk_norm", "moe"], indirect=True)
def test_prompts_may_be_longer_than_a_block(config):
    """Bug: the second block of a prompt has the first one's tokens, embeddings or places, or its logits are lost."""
    config = config.changed(ctx_len=2 * ROWS + 5)
    model = model_of(config)
    tokens = tokens_of(config, config.ctx_len)
    theirs, whole = logits_of(model, tokens), trace(model, torch.as_tensor(tokens)[None])
    with torch.no_grad():
        embeddings = model.tok_emb(torch.as_tensor(tokens)).numpy()
    decoder = open_native(files_of(model), threads=2)
    seen = decoder.trace(tokens)
    for layer in range(config.n_layers):
        np.testing.assert_allclose(seen.attention[layer], whole.attention[layer][0].numpy(), atol=1e-5)
    np.testing.assert_allclose(seen.norms, whole.norms[:, 0].numpy(), rtol=1e-5)
    for given in ({"tokens": tokens}, {"embeddings": embeddings}):
        decoder.truncate(0, 0)
        ours = decoder.prefill(0, **given, every=True)
        assert_within(ours, theirs)
        decoder.truncate(0, 3)
        last = decoder.prefill(0, **{name: all_of[3:] for name, all_of in given.items()})
        assert np.array_equal(last, ours[-1])


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("config", ["dense", "gqa_qk_norm", "moe", "everything", "plain_relu2"], indirect=True)
def test_the_same_bytes_however_it_is_computed(config, dtype):
    """Bug: a sum is split over lanes, rows or threads, so that a text depends on its neighbours or on the machine."""
    if dtype == "int8":
        config = config.changed(d_ff=64, head_dim=16)
    files = files_of(model_of(config))
    tokens = tokens_of(config, 46)
    reference = open_native(files, dtype=dtype, threads=1).prefill(0, tokens, every=True)
    for threads in (1, 2):
        decoder = open_native(files, ROWS, dtype, threads)
        for cuts in ((46,), (1,) * 46, (7, 1, 20, 18), (45, 1)):
            decoder.truncate(3, 0)
            at, parts = 0, []
            for cut in cuts:
                parts.append(decoder.prefill(3, tokens[at : at + cut], every=True))
                at += cut
            assert np.array_equal(np.concatenate(parts), reference), (threads, cuts)
        rng = np.random.default_rng(1)
        for slots in (2, 5, 32, ROWS):
            chosen = rng.permutation(ROWS)[:slots]
            lengths = rng.integers(1, 45, slots)
            for slot, length in zip(chosen, lengths, strict=True):
                decoder.truncate(slot, 0)
                decoder.prefill(slot, tokens[:length])
            together = decoder.step(chosen, tokens[lengths])
            assert np.array_equal(together, reference[lengths]), (threads, slots)


def rounded_rows(x):
    """x (..., k) as INT8's products see it: blocks of 32 in steps of a 32,512th of the largest, of two the even one."""
    blocks = x.reshape(*x.shape[:-1], -1, 32)
    largest = blocks.abs().amax(-1, keepdim=True)
    return ((blocks * (32512 / largest)).round() * (largest / 32512)).reshape(x.shape)


@pytest.mark.parametrize("config", ["dense", "gqa", "moe", "tied"], indirect=True)
def test_int8_has_the_numbers_of_q8_0(config, monkeypatch):
    """Bug: weights are rounded in another way than the file format rounds, or activations as coarsely."""
    config = config.changed(d_ff=64)
    model = model_of(config)
    tokens = tokens_of(config, 30)
    rounded = model_of(config)
    with torch.no_grad():
        for name, parameter in rounded.named_parameters():
            if parameter.dim() > 1 and ".router." not in name:
                parameter.copy_(torch.from_numpy(np.asarray(Q8Tensor.quantise(parameter.numpy()))))
    for name, module in rounded.named_modules():
        if isinstance(module, torch.nn.Linear) and "router" not in name:
            module.register_forward_pre_hook(lambda _, given: (rounded_rows(given[0]),))
    grouped = moe.grouped_product
    monkeypatch.setattr(moe, "grouped_product", lambda rows, *others: grouped(rounded_rows(rows), *others))

    def attend_to_float16(q, k, v, visible, causal, starts, rotation):
        q, k = (attention.turn(x, rotation) for x in (q, k))
        return attention.attend(q, k.half().float(), v.half().float(), visible, causal, starts)

    monkeypatch.setattr(network, "attend", attend_to_float16)
    decoder = open_native(files_of(model), dtype="int8", threads=1)
    ours, theirs = decoder.prefill(0, tokens, every=True), logits_of(rounded, tokens)
    # Where a last bit in float32 differs, an activation may be rounded to its other neighbour, then a key's float16 to
    # its own, 2^-11 away, and later rows see it. Activations in eight bits would be off by 2^-8, in every row.
    worst = np.abs(ours - theirs).max(axis=-1) / np.abs(theirs).max()
    assert worst.max() <= 2.0**-10
    assert np.median(worst) <= 2.0**-12
    taken = open_native(files_of(model, quantised=True), dtype="int8", threads=1)
    assert np.array_equal(taken.prefill(0, tokens, every=True), ours), "a Q8_0 file is not rounded again"


@pytest.mark.parametrize("dots", [True, False])
def test_a_row_is_rounded_to_the_nearest_step(dots):
    """Bug: a tie goes up, a block of zeros or of the smallest numbers divides by zero, a sum lacks its last number."""
    rng = np.random.default_rng(0)
    # Of a largest of 32,512 a step is 1.
    ties = np.concatenate([[32512], np.arange(-31, 0) * 333 + 0.5, [-32512], np.arange(31) * 333 + 0.5])
    tiny = np.float32(1e-38) * rng.standard_normal(32)
    x = np.concatenate([ties, np.zeros(32), tiny, 1e30 * rng.standard_normal(32), rng.standard_normal(160)])
    x = x.astype(np.float32)
    k, blocks = len(x), len(x) // 32
    out = np.full(2 * k + 8 * blocks + 64, 99, np.int8)
    to_int16 = rows._rounding(dots)

    @njit
    def rounded(x, k, out):
        to_int16(x, 0, k, out, 0)

    rounded(x.ctypes.data, k, out.ctypes.data)
    if dots:
        higher, lower = out[: 2 * k].reshape(blocks, 2, 32).astype(np.int64).transpose(1, 0, 2)
        whole = 256 * higher + lower
    else:
        whole = out[: 2 * k].view(np.int16).reshape(blocks, 32).astype(np.int64)
    scales, begins = out[2 * k :][: 4 * blocks].view(np.float32), out[2 * k + 4 * blocks :][: 4 * blocks].view(np.int32)
    assert whole[:2].reshape(-1).tolist() == np.rint(ties).tolist()
    assert not whole[2:4].any()
    largest = np.abs(x).reshape(blocks, 32).max(-1)
    assert np.array_equal(scales, largest / np.float32(32512))
    off = (
        np.abs(whole * scales[:, None].astype(np.float64) - x.reshape(blocks, 32)) / np.maximum(scales, 1e-37)[:, None]
    )
    assert off[largest > 1e-30].max() <= 0.51  # half a step, and the factor's own rounding: 32,512 times 2^-23
    assert np.array_equal(begins, -128 * whole.sum(-1))
    assert (out[2 * k + 8 * blocks :] == 99).all(), "it wrote beyond its row"


@pytest.mark.parametrize("instructions", ["fours of bytes", "pairs of int16", "none"])
@pytest.mark.parametrize("panels", [1, 2, 4])
def test_products_of_bytes_are_exact(instructions, panels, monkeypatch):
    """Bug: bytes are taken for signed, sums overflow, or processors without an instruction have other numbers."""
    dots = instructions == "fours of bytes"
    if (dots and not processor.DOTS) or (instructions == "pairs of int16" and not processor.PAIRS):
        pytest.skip("this processor has no such instruction")
    monkeypatch.setattr(product, "PAIRS", instructions == "pairs of int16")
    tile, group, P = product._tile(2, panels, dots), 4 if dots else 2, PANEL
    rng = np.random.default_rng(0)
    k, step = 96, 2 * 96 + 24
    whole = rng.integers(-32512, 32513, (2, 3, 32))  # row, block, input
    weights = rng.integers(-128, 128, (4, P, 3, 32))  # panel, output, block, input
    whole[0, 0], weights[0, 0, 0], weights[3, P - 1, 0] = 32512, 127, -128
    rows = np.zeros((2, step), np.int8)
    higher = (whole + 128) >> 8
    if dots:
        rows[:, : 2 * k] = np.stack([higher, whole - 256 * higher], axis=2).reshape(2, -1)
    else:
        rows[:, : 2 * k] = whole.astype(np.int16).reshape(2, -1).view(np.int8)
    rows[:, 2 * k : 2 * k + 12].view(np.float32)[:] = steps = np.array([[1, 2, 4], [8, 0.5, 1]])
    rows[:, 2 * k + 12 :].view(np.int32)[:] = -128 * whole.sum(-1)
    laid = (weights ^ -128).astype(np.int8).reshape(4, P, k // group, group).transpose(0, 2, 1, 3).copy()
    scales = np.exp2(rng.integers(-3, 3, (4, 3, P))).astype(np.float16)  # panel, block, output
    out = np.zeros((2, 4 * P), np.float32)

    @njit
    def multiply(x, w, scales, out):
        for panel in range(0, 4, panels):
            at = panel * P
            tile(x, 0, step, w, at * k, P * k, product.Q8, scales, k, 0, 1, 0, out, at, 4 * P)

    multiply(rows.ctypes.data, laid.ctypes.data, scales.ctypes.data, out.ctypes.data)
    sums = np.einsum("rbi,pobi->rpob", whole, weights).astype(np.float32)  # each rounded once
    total = np.zeros((2, 4, P))
    for block in range(3):  # powers of two scale exactly, and a sum is rounded once more
        total = (total + sums[..., block] * steps[:, None, block, None] * scales[:, block].astype(float)).astype(
            np.float32
        )
    assert np.array_equal(out, total.reshape(2, 4 * P))


def test_keys_and_values_are_rounded_to_the_nearest_float16():
    """Bug: small numbers become zero, ties go up, or what is too large becomes infinite and its text NaN."""
    every = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    between = (every[1:] + every[:-1]) / 2
    others = np.array([65519, 65520, 1e9, 2.0**-25, np.nextafter(np.float32(2.0**-25), np.float32(1))], np.float32)
    values = np.concatenate([every, between, np.nextafter(between, np.float32(0)), others])
    values = np.concatenate([values, -values])
    bits = np.array([to_float16(value) for value in values], np.int16)
    assert np.array_equal(bits.view(np.float16), np.clip(values, -65504, 65504).astype(np.float16))


def test_one_thread_goes_on_alone_after_a_stall_and_not_for_ever(monkeypatch):
    """Bug: another program takes one core for an instant, and a long text runs on one thread to its end."""
    now = [0.0]
    monkeypatch.setattr("thinker.decode.native.pace.time.perf_counter", lambda: now[0])
    pace = Pace()
    for seconds in (0.001, 0.001, 0.01):
        assert pace.begin(2) == 2
        pace.end(2, 1, seconds)
    assert pace.begin(2) == 1, "ten times the usual time is a stall"
    pace.end(1, 1, 0.002)
    now[0] += LEAST
    assert pace.begin(2) == 2
    for _ in range(20):
        pace.end(2, 1, 1.0)
    now[0] += MOST
    assert pace.begin(2) == 2, "however often it stalled"


def test_rows_that_blocks_do_not_fit_are_refused():
    """Bug: the last block of a row is read from the next row."""
    config = small("dense", d_ff=40)
    with pytest.raises(ValueError, match=r"40|32"):
        open_native(files_of(model_of(config)), dtype="int8", threads=1)


def test_tensors_are_read_once():
    """Bug: a mixture's experts are put together from their files once for each of them, and loading takes minutes."""
    read = Counter()

    class Counted(dict):
        def __getitem__(self, name):
            read[name] += 1
            return super().__getitem__(name)

    config = small("moe", layer_scale=0.1)
    files = files_of(model_of(config))
    open_native(Files(config, Counted(files.tensors)), threads=1)
    assert read == dict.fromkeys(files.tensors, 1)


@pytest.mark.skipif(sys.platform != "linux", reason="advice about memory is Linux's")
def test_a_kernel_without_huge_pages_is_no_hindrance(monkeypatch):
    """Bug: no model can be opened where Linux was built without huge pages."""

    class Unadvised(mmap.mmap):
        def madvise(self, *advice):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr("thinker.decode.native.layout.mmap.mmap", Unadvised)
    for piece in (1, SHORT):
        assert not sparse(100, np.float32, piece).any()


@pytest.mark.parametrize(("dtype", "guard"), [("float32", np.nan), ("int8", 0x7E00)])  # a float16 that is NaN
def test_nothing_reads_past_what_was_written(dtype, guard):
    """Bug: attention reads keys or values that belong to no token yet; with zeros there nobody would notice."""
    config = small("gqa", d_ff=64)
    files = files_of(model_of(config))
    tokens = tokens_of(config, 30)
    clean = open_native(files, 3, dtype, threads=2)
    guarded = open_native(files, 3, dtype, threads=2)
    for decoder in (clean, guarded):
        if decoder is guarded:
            for cache in decoder._model.caches:
                cache[:] = guard
        decoder.prefill(1, tokens[:20])
    for token in tokens[20:]:
        ours = guarded.step([1], [token])
        assert np.isfinite(ours).all()
        assert np.array_equal(ours, clean.step([1], [token]))


def test_what_does_not_fit_is_refused_and_changes_nothing():
    """Bug: a token past the cache is written into the next slot's memory."""
    config = small("dense")
    decoder = open_native(files_of(model_of(config)), 2, threads=1)
    decoder.prefill(0, tokens_of(config, config.ctx_len))
    with pytest.raises(ValueError, match=rf"{config.ctx_len} \+ 1 .*{config.ctx_len}"):
        decoder.step([0], [1])
    with pytest.raises(ValueError, match=r"61"):
        decoder.prefill(1, [61])
    with pytest.raises(ValueError):
        decoder.prefill(1, embeddings=np.zeros((3, 31), np.float32))
    assert (decoder.length(0), decoder.length(1)) == (config.ctx_len, 0)


@pytest.mark.parametrize("open_decoder", [lambda model: open_native(files_of(model), 2, threads=1), TorchDecoder])
@pytest.mark.parametrize(
    ("slots", "tokens", "message"),
    [
        ([0], [1.9], "tokens are float64: give integer ids"),
        ([0], [True], "tokens are bool"),
        ([0], ["a"], "tokens are <U1"),
        ([0.5], [1], "slots are float64: give whole numbers"),
        ([False], [1], "slots are bool"),
        (0, 1, r"slots have shape \(\)"),
        ([], [], r"slots have shape \(0,\)"),
        ([0], [[1]], r"tokens have shape \(1, 1\)"),
        ([0], [1, 2], "1 slots and 2 tokens"),
    ],
)
def test_every_decoder_refuses_the_same(open_decoder, slots, tokens, message):
    """Bug: 1.9 is taken for token 1 by one decoder, and ends with a TypeError from its depths in another place."""
    decoder = open_decoder(model_of(small("dense")))
    with pytest.raises(ValueError, match=message):
        decoder.step(slots, tokens)
    assert decoder.length(0) == 0


@pytest.mark.parametrize("open_decoder", [lambda model: open_native(files_of(model), 2, threads=1), TorchDecoder])
@pytest.mark.parametrize("wrong", [np.nan, np.inf, 1e300])
def test_embeddings_that_are_not_finite_are_refused(open_decoder, wrong):
    """Bug: one damaged vector makes those before it NaN too, or not, as the prompt happens to be cut."""
    decoder = open_decoder(model_of(small("dense")))
    embeddings = np.zeros((5, decoder.config.d_model))
    embeddings[3, 7] = wrong
    with pytest.raises(ValueError, match="embedding 3 holds NaN or an infinite number"):
        decoder.prefill(0, embeddings=embeddings)
    assert decoder.length(0) == 0


def test_slots_come_and_go():
    """Bug: a slot that is used again sees what its former text left behind."""
    config = small("dense")
    model = model_of(config)
    decoder = open_native(files_of(model), 3, threads=2)
    rng = np.random.default_rng(0)
    held = [[], [], []]
    for _ in range(60):
        slot = int(rng.integers(3))
        if len(held[slot]) > 40 or (held[slot] and rng.random() < 0.2):
            keep = int(rng.integers(len(held[slot])))
            decoder.truncate(slot, keep)
            del held[slot][keep:]
        new = tokens_of(config, int(rng.integers(1, 6)), seed=int(rng.integers(1000)))
        held[slot] += new.tolist()
        assert_within(decoder.prefill(slot, new), logits_of(model, held[slot])[-1])


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("config", ["dense", "gqa_qk_norm", "moe"], indirect=True)
def test_what_is_fetched_ahead_is_what_attention_will_read(config, dtype):
    """Bug: another slot's keys come, another layer's, or those that nobody sees: slow, and no number shows it."""
    config = config.changed(d_ff=64, head_dim=64)
    slots, lengths = 9, [1, 5, 40, 31, 32, 33, 2, 17, 46]
    decoder = open_native(files_of(model_of(config)), slots, dtype, threads=1)
    for slot, length in enumerate(lengths):
        decoder.prefill(slot, tokens_of(config, length))
    decoder.step(range(slots), [1] * slots)
    s, width = decoder._model.shape[0], config.head_width
    words = decoder._model.plan[s["at_ahead"] : s["at_ahead"] + s["ahead"]]
    listed = words[ahead.FIRST : ahead.FIRST + words[ahead.COUNT]].tolist()
    behind = words[ahead.FIRST + len(listed) : s["ahead"] - PIECES + len(listed)]
    assert len(behind) == -(-max(config.d_model, config.d_ff, config.n_heads * width, s["capacity"]) // 32)
    assert (behind == s["x"]).all()
    wanted = []
    for group, slot in product_of(range(config.n_kv_heads), range(slots)):
        at, length = slot * s["step_slot"] + group * s["step_head_cache"], lengths[slot] + 1
        runs = [(decoder._model.caches[0], at, -(-length // PANEL) * PANEL * width)]
        starts = [at + panel * s["capacity"] * PANEL for panel in range(s["head_panels"])]
        runs += [(decoder._model.caches[1], start, length * PANEL) for start in starts]
        for array, first, count in runs:
            begin, size = array.ctypes.data + int(first) * array.itemsize, int(count) * array.itemsize
            wanted += range(begin, begin + size, PIECE)
    assert listed == wanted[:PIECES]


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (8, 2), (6, 3), (9, 3), (5, 1)])
def test_threads_that_do_not_meet_attend_to_what_they_projected(heads, groups):
    """Bug: a thread reads q, k or v that another is about to write, which shows once in a million tokens."""
    s, job = np.zeros(1, SHAPE)[0], np.zeros(1, JOB)[0]
    s["heads"], s["groups"] = heads, groups
    each = heads // groups
    for threads, tokens, together in product_of((1, 2, 3, 4), (1, 7, 8, 32, 64), (1, QUERIES)):
        job["threads"], job["rows"], job["together"] = threads, tokens, together
        blocks, projected, attended = -(-tokens // together), [], []
        for me in range(threads):
            made = [range(*shares.share_of_heads(me, s, job, part)) for part in range(3)]
            projected += [head for part in made for head in part]
            count, first, last = shares.share_of_attention(me, s, job)
            starts = [item // blocks * count for item in range(first, last)]
            attended += [(head, item % blocks) for item, head in zip(range(first, last), starts, strict=True)]
            if shares.by_whole_groups(s, job):
                own = {head + i for head in starts for i in range(count)}
                assert own <= set(made[0])
                assert {heads + head // each for head in own} <= set(made[1])
                assert {heads + groups + head // each for head in own} <= set(made[2])
        assert sorted(projected) == list(range(heads + 2 * groups))
        assert len(set(attended)) == len(attended) == blocks * heads // count


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_many_tokens_in_one_call_are_those_of_single_steps(temperature):
    """Bug: the compiled loop draws with another index, or keeps a token that was drawn after the end."""
    config = small("dense")
    model = model_of(config)
    sampling = Sampling(temperature=temperature, top_p=0.9, repetition_penalty=1.1, seed=7)
    written = []
    for decoder, burst in (
        (open_native(files_of(model), threads=2), 20),
        (open_native(files_of(model), threads=1), 3),
        (open_native(files_of(model), threads=1), 1),
        (TorchDecoder(model), 5),
    ):
        draws = Draws(1, config.vocab_size)
        draws.begin(0, sampling, 0, [1, 2, 3])
        token = int(draws.draw([0], decoder.prefill(0, [1, 2, 3])[None])[0])
        text = [token]
        while len(text) < 21:
            text += decoder.run([0], text[-1:], draws, min(burst, 21 - len(text)))[0].tolist()
        written.append(text)
    assert written[0] == written[1] == written[2] == written[3]
    stop = written[0][6]
    decoder, draws = open_native(files_of(model), threads=2), Draws(1, config.vocab_size)
    draws.begin(0, sampling, 0, [1, 2, 3])
    first = int(draws.draw([0], decoder.prefill(0, [1, 2, 3])[None])[0])
    ended = [first, *decoder.run([0], [first], draws, 20, {stop})[0].tolist()]
    assert ended == written[0][: written[0].index(stop) + 1]
    assert decoder.length(0) == 3 + len(ended) - 1


def test_many_slots_in_one_call_draw_what_each_draws_alone():
    """Bug: a slot goes on with its neighbour's token, or one that another slot's end cut short loses some."""
    config = small("dense")
    model = model_of(config)
    sampling = Sampling(temperature=0.9, seed=7)
    prompts = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]

    def begun(decoder: Decoder) -> tuple[Draws, np.ndarray]:
        draws = Draws(3, config.vocab_size)
        for slot, prompt in enumerate(prompts):
            draws.begin(slot, sampling, slot, prompt)
        first = [int(draws.draw([slot], decoder.prefill(slot, prompt)[None])[0]) for slot, prompt in enumerate(prompts)]
        return draws, np.array(first)

    alone = open_native(files_of(model), 3, threads=1)
    draws, first = begun(alone)
    expected = np.concatenate([alone.run([slot], first[[slot]], draws, 40) for slot in range(3)])
    stop = int(expected[1, 5])
    cut = 1 + int((expected == stop).any(axis=0).argmax())
    for decoder in (open_native(files_of(model), 3, threads=2), TorchDecoder(model, 3)):
        draws, first = begun(decoder)
        begin = decoder.run([2, 0, 1], first[[2, 0, 1]], draws, 40, {stop})
        assert (begin == expected[[2, 0, 1], :cut]).all()
        assert [decoder.length(slot) for slot in range(3)] == [len(prompt) + cut for prompt in prompts]
        rest = decoder.run([2, 0, 1], begin[:, -1], draws, 40 - cut)
        assert (rest == expected[[2, 0, 1], cut:]).all()
        for wrong in (0, config.ctx_len):
            with pytest.raises(ValueError, match="count is 0" if wrong == 0 else "exceed ctx_len"):
                decoder.run([0, 1], first[:2], draws, wrong)


@pytest.mark.parametrize("config", ["gqa_qk_norm", "moe"], indirect=True)
def test_a_trace_shows_what_the_networks_own_shows(config):
    """Bug: the picture shows another head's attention, or experts in another order."""
    model = model_of(config)
    tokens = tokens_of(config, 12)
    theirs = trace(model, torch.as_tensor(tokens)[None])
    ours = open_native(files_of(model), threads=2).trace(tokens)
    assert_within(ours.logits, theirs.logits[0].numpy())
    for layer in range(config.n_layers):
        np.testing.assert_allclose(ours.attention[layer], theirs.attention[layer][0].numpy(), atol=2e-6)
        if config.use_moe:
            np.testing.assert_array_equal(ours.experts[layer], theirs.experts[layer][0].numpy())
            np.testing.assert_allclose(ours.expert_weights[layer], theirs.expert_weights[layer][0].numpy(), atol=2e-6)
    np.testing.assert_allclose(ours.norms, theirs.norms[:, 0].numpy(), rtol=1e-5)


def test_a_trace_that_does_not_fit_is_refused_before_it_takes_memory():
    """Bug: a long text ends with what numpy says about terabytes, instead of with the model's own length."""
    with pytest.raises(ValueError, match=r"0 \+ 200000 tokens exceed ctx_len 48"):
        open_native(files_of(model_of(small("dense"))), threads=1).trace([1] * 200_000)


PROGRAM = """
import os, sys
sys.path.insert(0, {tests!r})
from test_native import files_of, model_of, small, tokens_of
from thinker.decode.native import open_native
config = small("dense")
decoder = open_native(files_of(model_of(config)), 2, threads=2)
tokens = tokens_of(config, 20)
before = decoder.prefill(0, tokens).sum()
{body}
print("done", before)
"""
FORK = """
child = os.fork()
if child == 0:
    os._exit(0 if decoder.prefill(1, tokens).sum() == before else 3)
assert os.waitpid(child, 0)[1] == 0
"""

INTERRUPT = """
import time
def trace_until(moments):
    def trace(frame, event, argument):
        nonlocal moments
        if frame.f_code.co_filename.endswith("team.py"):
            moments -= 1
            if not moments:
                raise KeyboardInterrupt
            return trace
    return trace
for moments in range(1, 10):
    time.sleep(0.05)  # so that all helpers sleep
    decoder.truncate(0, 0)
    sys.settrace(trace_until(moments))
    try:
        decoder.prefill(0, tokens)
    except KeyboardInterrupt:
        pass
    sys.settrace(None)
    decoder.truncate(0, 0)
    assert decoder.prefill(0, tokens).sum() == before
"""

INTERRUPT_THE_FIRST = """
import threading, time
from thinker.decode.native import team
help_out, wait = team.help_out, threading.Event.wait
def help_late(*arguments):
    time.sleep(0.05)
    help_out(*arguments)
def wait_interrupted(*arguments):
    if threading.current_thread() is threading.main_thread():
        threading.Event.wait = wait
        raise KeyboardInterrupt
    return wait(*arguments)
team.help_out, threading.Event.wait = help_late, wait_interrupted
decoder = open_native(files_of(model_of(config)), 2, threads=3)
try:
    decoder.prefill(0, tokens)
    assert False, "it was to be interrupted while a thread starts"
except KeyboardInterrupt:
    pass
for _ in range(50):
    decoder.truncate(0, 0)
    assert decoder.prefill(0, tokens).sum() == before
    time.sleep(0.003)
"""


@pytest.mark.parametrize(
    ("body", "layer"),
    [
        ("", "workqueue"),
        (FORK, "omp"),
        (FORK, "workqueue"),
        (INTERRUPT, "default"),
        (INTERRUPT_THE_FIRST, "default"),
    ],
)
def test_threads_end_with_the_process_and_outlive_forks_and_interrupts(body, layer):
    """Bug: the process hangs at its end, a forked child waits for threads that it lacks, or a thread layer aborts; or
    a helper that was given work but not woken, since Ctrl-C came in between, is waited for without end; or Ctrl-C while
    the first helpers start leaves one that does the job of another, started later, a second time."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM.format(tests=os.path.dirname(__file__), body=body)],
        env=os.environ | {"NUMBA_THREADING_LAYER": layer},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("done")


def test_waiting_helpers_are_woken_however_late():
    """Bug: a helper that fell asleep is woken, falls asleep before it is given work, and so on for ever."""
    import time

    config = small("dense")
    decoder = open_native(files_of(model_of(config)), threads=2)
    decoder.prefill(0, [1, 2, 3])
    first = decoder.step([0], [4])
    for pause in (0.0, 0.001, 0.01, 0.05, 0.2):
        decoder.truncate(0, 3)
        time.sleep(pause)
        assert np.array_equal(decoder.step([0], [4]), first)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_long_recorded_run_gives_the_same_bytes(dtype):
    """Bug: a race between the threads that shows once in a hundred thousand tokens."""
    files = files_of(model_of(small("gqa_qk_norm", d_ff=64, head_dim=16, ctx_len=256)))
    compared = 0
    for tokens, different in same_bytes.comparisons(files, dtype):
        compared += tokens
        assert different == 0, compared
        if compared > 500_000:
            break


@pytest.mark.slow
def test_ten_thousand_positions_equal_the_networks(config):
    """Bug: a difference that only some tokens at some positions show."""
    config = config.changed(ctx_len=640)
    model = model_of(config)
    decoder = open_native(files_of(model), threads=2)
    for seed in range(16):
        tokens = tokens_of(config, 640, seed)
        decoder.truncate(0, 0)
        assert_within(decoder.prefill(0, tokens, every=True), logits_of(model, tokens))


@pytest.mark.parametrize("drafts", [False, True])
def test_a_busy_moment_does_not_choose_the_threads_for_good(monkeypatch, drafts):
    """Bug: a program that was busy while threads were measured halves the speed of whatever is written afterwards."""
    config = small("dense", d_ff=64, ctx_len=256)
    files = files_of(model_of(config))
    chosen = [(1, CHUNK)]
    monkeypatch.setattr(crew, "processors", lambda: 2)
    monkeypatch.setattr(crew, "AGAIN", 300)
    monkeypatch.setattr(crew, "fastest", lambda choices, *_: chosen.pop(0) if chosen else list(choices)[-1])
    decoder, plain = (NativeDecoder(files, threads=threads, drafts=drafts) for threads in (None, 1))
    numbers = []
    for _ in range(4):
        texts = []
        for one in (decoder, plain):
            draws = Draws(1, config.vocab_size)
            one.truncate(0, 0)
            one.prefill(0, [1, 2, 3])
            texts.append(one.run([0], [4], draws, 120).tolist())
        assert texts[0] == texts[1]
        numbers.append(decoder.threads)
    assert numbers == [1, 1, 2, 2]
    assert decoder.has_drafts == drafts
    assert not decoder._crew.doubts(10**9)


def test_ctrl_c_while_threads_are_measured_chooses_nothing(monkeypatch):
    """Bug: what was being tried when Ctrl-C came stays for good, such as all threads where one is the fastest."""

    def interrupted(choices, do, *_):
        for choice in choices:
            do(choice)
        raise KeyboardInterrupt

    config = small("dense", ctx_len=256)
    monkeypatch.setattr(crew, "processors", lambda: 2)
    monkeypatch.setattr(crew, "AGAIN", 100)
    with monkeypatch.context() as patched:
        patched.setattr(crew, "fastest", lambda *_: (1, CHUNK))
        decoder = NativeDecoder(files_of(model_of(config)))
    monkeypatch.setattr(crew, "fastest", interrupted)
    with pytest.raises(KeyboardInterrupt):
        decoder.run([0], [4], Draws(1, config.vocab_size), 120)
    assert (decoder.threads, int(decoder._model.shape[0]["abreast"])) == (1, CHUNK)
    assert decoder.length(0) == 0
