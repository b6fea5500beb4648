"""The network's promises: shapes, sizes, causality, gradients, padding, errors, precision.

Every proof randomises all parameters first: with the zero-initialised head all logits are zero and everything passes.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from conftest import SMALL, randomise
from torch import Tensor, nn

from thinker.attention import QUERY_BLOCK
from thinker.config import ThinkerConfig
from thinker.loss import NextTokenLoss
from thinker.model import MLP, Block, RMSNorm, RotaryEmbedding, ThinkerLM

Build = Callable[..., ThinkerLM]


def ids(rows: int, length: int, vocab: int = 61, seed: int = 0) -> Tensor:
    return torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


# --- sizes and shapes -------------------------------------------------------------------------------------------------


def test_shape_at_every_stage_of_the_tiny_model(build: Build) -> None:
    """Catches heads of another width, an MLP of another size, a stage left out or done twice."""
    model = build(ThinkerConfig(), torch.float32)
    seen: list[tuple[str, tuple[int, ...]]] = []
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Dropout, RotaryEmbedding)):
            module.register_forward_hook(
                lambda module, args, out, name=name: seen.append(
                    (name, tuple((out[0] if isinstance(out, tuple) else out).shape))
                )
            )
    model(ids(2, 7, 5000))
    stream, block = (2, 7, 256), []
    for i in range(4):
        block += [
            (f"blocks.{i}.norm1", stream),
            (f"blocks.{i}.attn.qkv", (2, 7, 768)),
            (f"blocks.{i}.attn.out_proj", stream),
            (f"blocks.{i}.attn", stream),
            (f"blocks.{i}.norm2", stream),
            (f"blocks.{i}.mlp.gate_proj", (2, 7, 1024)),
            (f"blocks.{i}.mlp.up_proj", (2, 7, 1024)),
            (f"blocks.{i}.mlp.down_proj", stream),
            (f"blocks.{i}.mlp", stream),
            (f"blocks.{i}", stream),
        ]
    assert seen == [("tok_emb", stream), *block, ("norm", stream), ("head", (2, 7, 5000)), ("", (2, 7, 5000))]
    q, k, v = model.blocks[0].attn.project(torch.zeros(stream), model.rope(torch.arange(7)))
    assert q.shape == k.shape == v.shape == (2, 4, 7, 64)
    assert sum(p.numel() for p in model.parameters()) == 6_756_608


def test_counts_are_the_real_ones(config: ThinkerConfig, build: Build) -> None:
    """Catches a printed size that was estimated, part by part."""
    model = build(config)
    real = dict.fromkeys(("embedding", "attention", "mlp", "norms", "head"), 0)
    for name, parameter in model.named_parameters():
        if name.startswith("tok_emb"):
            part = "embedding"
        elif ".attn." in name:
            part = "attention"
        elif ".mlp." in name or ".moe." in name:
            part = "mlp"
        elif name.startswith("head"):
            part = "head"
        else:
            part = "norms"
        real[part] += parameter.numel()
    assert config.parameter_counts() == real
    assert config.parameter_count() == sum(p.numel() for p in model.parameters())


def test_names_and_shapes_of_parameters(config: ThinkerConfig, build: Build) -> None:
    """Catches a renamed, transposed or biased parameter: the names are what checkpoints and formats rely on."""
    c, width = config, config.head_width
    wanted: dict[str, tuple[int, ...]] = {"tok_emb.weight": (c.vocab_size, c.d_model), "norm.scale": (c.d_model,)}
    if not c.tie_embeddings:
        wanted["head.weight"] = (c.vocab_size, c.d_model)
    for i in range(c.n_layers):
        block: dict[str, tuple[int, ...]] = {"norm1.scale": (c.d_model,), "norm2.scale": (c.d_model,)}
        block["attn.out_proj.weight"] = (c.d_model, c.n_heads * width)
        if c.use_gqa:
            block["attn.q.weight"] = (c.n_heads * width, c.d_model)
            block["attn.k.weight"] = block["attn.v.weight"] = (c.n_kv_heads * width, c.d_model)
        else:
            block["attn.qkv.weight"] = (3 * c.n_heads * width, c.d_model)
        if c.use_qk_norm:
            block["attn.q_norm.scale"] = block["attn.k_norm.scale"] = (width,)
        if c.use_moe:
            block["moe.router.weight"] = (c.num_experts, c.d_model)
            block["moe.experts.gate_proj"] = block["moe.experts.up_proj"] = (c.num_experts, c.d_ff, c.d_model)
            block["moe.experts.down_proj"] = (c.num_experts, c.d_model, c.d_ff)
        else:
            block["mlp.up_proj.weight"] = (c.d_ff, c.d_model)
            block["mlp.down_proj.weight"] = (c.d_model, c.d_ff)
            if c.use_swiglu:
                block["mlp.gate_proj.weight"] = (c.d_ff, c.d_model)
        if c.layer_scale is not None:
            block["scale1"] = block["scale2"] = (c.d_model,)
        wanted |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    assert {name: tuple(p.shape) for name, p in build(config).named_parameters()} == wanted


def test_fresh_model_guesses_uniformly() -> None:
    """Catches an initialisation that does not begin at log V, or a tied head zeroed together with the embedding."""
    tokens = ids(2, 9)
    fresh = ThinkerLM(ThinkerConfig(**SMALL)).eval()
    assert float(fresh(tokens).detach().abs().max()) == 0
    tied = ThinkerLM(ThinkerConfig(**SMALL, tie_embeddings=True)).eval()
    assert float(tied(tokens).detach().abs().min()) > 0


# --- what each part computes ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_rmsnorm_is_over_the_last_dimension() -> None:
    """Catches the mean square taken over the whole tensor, a mean subtracted, eps outside the root, a lost scale."""
    norm = randomise(RMSNorm(6, eps=0.5).double())
    x = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[1] *= 100
    for b in range(2):
        for t in range(3):
            mean_square = sum(float(value) ** 2 for value in x[b, t]) / 6
            wanted = x[b, t] / (mean_square + 0.5) ** 0.5 * norm.scale
            torch.testing.assert_close(norm(x)[b, t], wanted, rtol=1e-14, atol=0)


@torch.no_grad()
def test_rmsnorm_statistics_in_float32() -> None:
    """Catches statistics in bfloat16, whose sum of 4096 squares stops growing, or in float16, where 300² overflows."""
    for dtype in (torch.bfloat16, torch.float16):
        norm = RMSNorm(4096, eps=1e-6).to(dtype)
        y = norm(torch.full((1, 4096), 300.0, dtype=dtype))
        assert y.dtype == dtype
        assert torch.equal(y, torch.ones_like(y))


@torch.no_grad()
@pytest.mark.parametrize("name", ["silu", "gelu", "relu", "relu2"])
def test_mlp_is_what_its_name_says(name: str) -> None:
    """Catches SiLU sold as SwiGLU (no second projection), gate and up exchanged, tanh-gelu, relu2 not squared."""
    formulas = {
        "silu": lambda z: z / (1 + torch.exp(-z)),
        "gelu": lambda z: z * (1 + torch.erf(z / 2**0.5)) / 2,
        "relu": lambda z: z * (z > 0),
        "relu2": lambda z: z**2 * (z > 0),
    }
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gated = randomise(MLP(ThinkerConfig(**SMALL, activation=name)).double())
    assert gated.gate_proj is not None
    inner = formulas[name](x @ gated.gate_proj.weight.T) * (x @ gated.up_proj.weight.T)
    torch.testing.assert_close(gated(x), inner @ gated.down_proj.weight.T, rtol=0, atol=1e-12)
    plain = randomise(MLP(ThinkerConfig(**SMALL, activation=name, use_swiglu=False)).double())
    inner = formulas[name](x @ plain.up_proj.weight.T)
    torch.testing.assert_close(plain(x), inner @ plain.down_proj.weight.T, rtol=0, atol=1e-12)


@torch.no_grad()
def test_stream_adds_to_the_unnormed_input(config: ThinkerConfig, build: Build) -> None:
    """Catches a residual taken after the norm, or lost, a norm left out (the final one too), scale1 and 2 exchanged."""
    model = build(config)
    tokens = ids(2, 9)
    x = model.tok_emb.weight[tokens]
    rotation = model.rope(torch.arange(9))
    for block in model.blocks:
        one, two = (1, 1) if config.layer_scale is None else (block.scale1, block.scale2)
        x = x + one * block.attn(block.norm1(x), rotation)
        branch = block.moe(block.norm2(x))[0] if config.use_moe else block.mlp(block.norm2(x))
        x = x + two * branch
    hidden = model.norm(x)
    head = model.tok_emb if config.tie_embeddings else model.head
    torch.testing.assert_close(model.features(tokens), hidden, rtol=0, atol=1e-12)
    torch.testing.assert_close(model(tokens), hidden @ head.weight.T, rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("config", ["qk_norm", "gqa_qk_norm"], indirect=True)
def test_qk_norm_is_per_head_and_before_rope(config: ThinkerConfig, build: Build) -> None:
    """Catches the norm over all heads at once, on v, after the rotation, or with q's and k's scales exchanged."""
    module = build(config).blocks[0].attn
    x = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rotation = RotaryEmbedding(config)(torch.arange(5))
    q, k, v = (part.detach() for part in module.project(x, rotation))
    weights = (module.q.weight, module.k.weight, module.v.weight) if config.use_gqa else module.qkv.weight.chunk(3)
    heads = [(x[0] @ weight.T).unflatten(-1, (-1, 8)).transpose(0, 1) for weight in weights]
    cos, sin = rotation[0][0, 0], rotation[1][0, 0]
    for got, raw, scale in zip((q, k), heads, (module.q_norm.scale, module.k_norm.scale), strict=False):
        for head, values in enumerate(raw):
            normed = values / (values.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * scale
            one, two = normed[:, :4], normed[:, 4:]
            wanted = torch.cat((one * cos - two * sin, two * cos + one * sin), dim=-1)
            torch.testing.assert_close(got[0, head], wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(v[0], heads[2], rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("config", ["layer_scale"], indirect=True)
def test_layer_scale_begins_at_its_value_and_folds(config: ThinkerConfig, build: Build) -> None:
    """Catches a scale on the stream in place of the branch; folding it into out_proj and down_proj must change nothing.

    That equality is what publishing relies on.
    """
    fresh = ThinkerLM(config)
    assert {float(fresh.blocks[i].scale1[j]) for i in range(3) for j in range(32)} == {float(torch.tensor(0.1))}
    scaled, folded = build(config), build(config.changed(layer_scale=None))
    tensors = dict(scaled.state_dict())
    for i in range(config.n_layers):
        tensors[f"blocks.{i}.attn.out_proj.weight"] *= tensors.pop(f"blocks.{i}.scale1")[:, None]
        tensors[f"blocks.{i}.mlp.down_proj.weight"] *= tensors.pop(f"blocks.{i}.scale2")[:, None]
    folded.load_state_dict(tensors)
    torch.testing.assert_close(folded(ids(2, 9)), build(config)(ids(2, 9)), rtol=0, atol=1e-12)


def test_dropout_only_while_training(config: ThinkerConfig, build: Build) -> None:
    """Catches dropout that stays on in eval, or that was read from the configuration and never used."""
    model, tokens = build(config), ids(1, 9)
    with torch.no_grad():
        assert torch.equal(model(tokens), model(tokens))
        model.train()
        torch.manual_seed(0)
        one, other = model(tokens), model(tokens)
        assert not torch.allclose(one, other)
        torch.manual_seed(0)
        assert torch.equal(model(tokens), one), "dropout must draw from torch's generator, for runs to repeat"
    dropped: list[float] = []
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda module, args, out: dropped.append(module.p))
    model(tokens)
    assert dropped == [config.dropout] * (1 + 2 * config.n_layers), "on the embedding and both branches of each block"


# --- causality --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_no_logit_depends_on_a_later_token(config: ThinkerConfig, build: Build) -> None:
    """Catches a mask off by one, a sum over the sequence, routing that later tokens change.

    Bitwise for dense blocks in float32; the experts' groups change size with the tokens, so 1e-12 in float64 for them.
    """
    model = build(config, torch.float64 if config.use_moe else torch.float32)
    tokens = ids(2, 24)
    before = model(tokens)
    for t in (1, 8, 15, 23):
        changed = tokens.clone()
        changed[:, t] = (tokens[:, t] + 1) % 61
        after = model(changed)
        earlier = (after - before)[:, :t].abs().max()
        assert float(earlier) <= (1e-12 if config.use_moe else 0.0)
        assert float((after - before)[:, t].abs().amax(dim=-1).min()) > 1e-3, "the token itself must be noticed"
    assert float((after - before)[:, 23].abs().max()) > 1e-3


@pytest.mark.parametrize("config", ["dense", "gqa_qk_norm", "plain_relu2", "wide_heads", "moe"], indirect=True)
def test_causality_of_the_training_path(config: ThinkerConfig, build: Build) -> None:
    """Catches a leak in the blocked form that only training takes: at its borders, in the last short block."""
    length = 2 * QUERY_BLOCK + 10
    model = build(config.changed(ctx_len=length, n_layers=2), torch.float64 if config.use_moe else torch.float32)
    tokens = ids(1, length)
    before = model(tokens)
    assert before.requires_grad
    for t in (1, QUERY_BLOCK - 1, QUERY_BLOCK, 2 * QUERY_BLOCK, length - 1):
        changed = tokens.clone()
        changed[:, t] = (tokens[:, t] + 1) % 61
        difference = (model(changed) - before).detach().abs()[0].amax(dim=-1)
        assert float(difference[:t].max()) <= (1e-12 if config.use_moe else 0.0)
        assert float(difference[t]) > 1e-3


def test_gradients_do_not_reach_the_future(config: ThinkerConfig, build: Build) -> None:
    """Catches a leak that the forward hides: the gradient of an early logit by later embeddings must be exactly 0."""
    model = build(config)
    embeddings = model.tok_emb(ids(1, 12)).detach().requires_grad_()
    logits = model(embeddings=embeddings)
    (gradient,) = torch.autograd.grad(logits[0, 5].square().sum(), embeddings)
    assert float(gradient[0, 6:].abs().max()) == 0
    assert float(gradient[0, :6].abs().amax(dim=-1).min()) > 1e-6


@torch.no_grad()
@pytest.mark.parametrize("config", ["dense", "gqa_qk_norm", "moe"], indirect=True)
def test_training_path_equals_the_other(config: ThinkerConfig, build: Build) -> None:
    """Catches training a network that is not the one that is run later."""
    model = build(config.changed(ctx_len=300, n_layers=2))
    tokens = ids(2, 300)
    with torch.enable_grad():
        training = model(tokens).detach()
    torch.testing.assert_close(training, model(tokens), rtol=0, atol=1e-11)


# --- gradients --------------------------------------------------------------------------------------------------------


def test_gradcheck_of_each_kind_of_block(config: ThinkerConfig) -> None:
    """Catches a derivative that doesn't belong to its forward, by the input and by every parameter of the block."""
    config = config.changed(d_model=8, n_heads=2, kv_groups=1 if config.use_gqa else None, d_ff=6, head_dim=None)
    block = randomise(Block(config, 0).double())
    rotation = RotaryEmbedding(config)(torch.arange(4))
    names = [name for name, _ in block.named_parameters()]
    x = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(block, dict(zip(names, values, strict=True)), (x, rotation))[0]

    # fast_mode compares one random projection of the whole Jacobian.
    assert torch.autograd.gradcheck(run, (x, *block.parameters()), fast_mode=True)


def test_gradcheck_of_the_whole_model(config: ThinkerConfig, build: Build) -> None:
    """Catches a gradient lost between the parts: embedding, final norm, head, tied weights."""
    config = config.changed(d_model=8, n_heads=2, kv_groups=1 if config.use_gqa else None, d_ff=6, head_dim=None)
    model = build(config.changed(n_layers=1, vocab_size=5))
    names = [name for name, _ in model.named_parameters()]
    tokens = ids(2, 4, 5)

    def run(*values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (tokens,))

    assert torch.autograd.gradcheck(run, tuple(model.parameters()), fast_mode=True)


# --- embeddings, padding ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_embeddings_of_ids_equal_the_ids(config: ThinkerConfig, build: Build) -> None:
    """Catches embeddings that skip or repeat a step that ids go through (a scale, a norm, positions)."""
    model, tokens = build(config, torch.float32), ids(2, 9)
    wanted = model(tokens)
    embeddings = model.tok_emb(tokens)
    assert torch.equal(model(embeddings=embeddings), wanted)
    assert torch.equal(model(None, embeddings=embeddings), wanted)


def padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of ids padded on the left with id 0 to one length, and their mask."""
    length = max(len(row) for row in rows)
    tokens, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
    for b, row in enumerate(rows):
        tokens[b, length - len(row) :], mask[b, length - len(row) :] = row, 1
    return tokens, mask


@torch.no_grad()
@pytest.mark.parametrize("mask_dtype", [torch.long, torch.bool])
def test_a_row_in_a_padded_batch_equals_the_row_alone(
    config: ThinkerConfig, build: Build, mask_dtype: torch.dtype
) -> None:
    """Catches positions counted from the padding, padding that is looked at, and NaN from rows that see nothing."""
    model = build(config)
    rows = [ids(1, length, seed=length)[0] for length in (11, 1, 6, 10)]
    tokens, mask = padded(rows)
    logits = model(tokens, attention_mask=mask.to(mask_dtype))
    assert bool(logits.isfinite().all())
    embedded = model(embeddings=model.tok_emb(tokens), attention_mask=mask)
    for b, row in enumerate(rows):
        alone = model(row[None])[0]
        torch.testing.assert_close(logits[b, -len(row) :], alone, rtol=0, atol=1e-12)
        torch.testing.assert_close(embedded[b, -len(row) :], alone, rtol=0, atol=1e-12)


@torch.no_grad()
def test_what_stands_in_the_padding_does_not_matter(config: ThinkerConfig, build: Build) -> None:
    """Catches a mask that merely makes padding faint, as one of -10000 does in some precision."""
    model = build(config)
    tokens, mask = padded([ids(1, 11)[0], ids(1, 4)[0]])
    other = torch.where(mask.bool(), tokens, 60)
    one, two = model(tokens, attention_mask=mask), model(other, attention_mask=mask)
    assert torch.allclose(one[mask.bool()], two[mask.bool()], rtol=0, atol=1e-12)


def test_padding_gets_no_gradient_and_makes_no_nan(config: ThinkerConfig, build: Build) -> None:
    """Catches NaN in the backward of fully masked rows, and padding that trains."""
    model = build(config)
    tokens, mask = padded([ids(1, 11)[0], ids(1, 4)[0]])
    embeddings = model.tok_emb(tokens).detach().requires_grad_()
    logits = model(embeddings=embeddings, attention_mask=mask)
    (gradient,) = torch.autograd.grad(logits[mask.bool()].square().sum(), embeddings)
    assert bool(gradient.isfinite().all())
    assert float(gradient[1, :7].abs().max()) == 0


@torch.no_grad()
def test_rows_of_a_batch_do_not_mix(config: ThinkerConfig, build: Build) -> None:
    """Catches a reshape that moves values from row to row."""
    model, tokens = build(config), ids(3, 9)
    together = model(tokens)
    for b in range(3):
        torch.testing.assert_close(together[b], model(tokens[b : b + 1])[0], rtol=0, atol=1e-12)


# --- other heads ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_features_are_what_the_head_reads(config: ThinkerConfig, build: Build) -> None:
    """Catches features taken before the final norm, and router logits of the wrong layers or shape."""
    model, tokens = build(config), ids(2, 9)
    hidden, router_logits = model.features(tokens, return_router=True)
    assert torch.equal(model.features(tokens), hidden)
    assert torch.equal(model.head(hidden), model(tokens))
    assert hidden.shape == (2, 9, config.d_model)
    assert [tuple(logits.shape) for logits in router_logits] == [(2, 9, config.num_experts)] * (
        config.n_layers if config.use_moe else 0
    )


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, ["exactly one", "none"]),
        ({"tokens": ids(1, 3), "embeddings": torch.zeros(1, 3, 32)}, ["exactly one", "both"]),
        ({"tokens": torch.tensor([[1, 61]])}, ["61", "vocabulary of 61"]),
        ({"tokens": torch.tensor([[1, -2]])}, ["-2", "vocabulary of 61"]),
        ({"tokens": torch.zeros(1, 0, dtype=torch.long)}, ["empty", "1 of length 0"]),
        ({"tokens": torch.zeros(0, 3, dtype=torch.long)}, ["empty", "0 of length 3"]),
        ({"tokens": torch.zeros(3, dtype=torch.long)}, ["tokens", "2 dimensions", "got 1"]),
        ({"embeddings": torch.zeros(3, 32)}, ["embeddings", "3 dimensions", "got 2"]),
        ({"embeddings": torch.zeros(1, 3, 31)}, ["31 wide", "d_model is 32"]),
        ({"tokens": torch.zeros(1, 49, dtype=torch.long)}, ["49", "ctx_len 48"]),
        ({"embeddings": torch.zeros(1, 49, 32)}, ["49", "ctx_len 48"]),
        ({"tokens": ids(2, 3), "attention_mask": torch.ones(2, 4)}, ["(2, 4)", "(2, 3)"]),
        ({"tokens": ids(2, 3), "attention_mask": torch.ones(3)}, ["(3,)", "(2, 3)"]),
        ({"tokens": torch.zeros(1, 3, dtype=torch.long, device="meta")}, ["meta", "cpu"]),
        ({"tokens": torch.zeros(1, 3, dtype=torch.uint16)}, ["torch.uint16", "torch.int64"]),
        ({"tokens": torch.ones(1, 3)}, ["torch.float32", "torch.int64"]),
        ({"embeddings": torch.zeros(1, 3, 32, dtype=torch.float64)}, ["torch.float64", "torch.float32"]),
    ],
)
def test_what_cannot_be_run_says_so_with_both_numbers(arguments: dict[str, Tensor], said: list[str]) -> None:
    """Catches an index error deep inside, or worse: a silent answer to a wrong question."""
    model = randomise(ThinkerLM(ThinkerConfig(**SMALL)))
    tokens = arguments.get("tokens")
    others = {name: value for name, value in arguments.items() if name != "tokens"}
    for run in (model, model.features):
        with pytest.raises(ValueError, match=re.escape(said[0])) as raised:
            run(tokens, **others)
        message = str(raised.value)
        assert "\n" not in message
        assert [words for words in said if words not in message] == []


def test_a_cache_is_made_for_what_can_be_run_and_belongs_to_one_model() -> None:
    """Catches a cache made before the input is looked at, and an index error in a layer that it hasn't got."""
    small, deeper = (randomise(ThinkerLM(ThinkerConfig(**SMALL | {"n_layers": layers}))) for layers in (2, 3))
    with pytest.raises(ValueError, match="2 dimensions, got 0"):
        small(torch.tensor(3), use_cache=True)
    _, cache = small(ids(1, 3), use_cache=True)
    with pytest.raises(ValueError, match="the cache has 2 layers, the model 3"):
        deeper(ids(1, 1), kv_cache=cache, use_cache=True)


def test_angles_are_not_rounded_on_the_way() -> None:
    """Catches FSDP's mixed precision, which casts what blocks are called with: neighbours then have one angle."""
    model = ThinkerLM(ThinkerConfig(**SMALL)).bfloat16()
    cos, sin = (table.bfloat16() for table in model.rope(torch.arange(3)))
    with pytest.raises(ValueError, match=r"angles are torch\.bfloat16: .*cast_forward_inputs"):
        model.blocks[0](torch.zeros(1, 3, 32, dtype=torch.bfloat16), (cos, sin))


@torch.no_grad()
def test_the_longest_sequence_fits(config: ThinkerConfig, build: Build) -> None:
    """Catches a limit that is off by one."""
    assert build(config)(ids(1, 48)).shape == (1, 48, 61)


# --- precision --------------------------------------------------------------------------------------------------------


def test_bfloat16_autocast_trains(config: ThinkerConfig, build: Build) -> None:
    """Catches operations that refuse mixed types under autocast, and gradients that come back empty or wrong.

    Rounding to bfloat16 errs by up to 2^-9: 3 layers of 8 products forward, and twice as many back.
    """
    model = NextTokenLoss(build(config.changed(dropout=0.0), torch.float32))
    tokens = ids(2, 12)
    gradients, losses = [], []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            parts = model(tokens, ids(2, 12, seed=1))
            loss = parts.total / parts.tokens + parts.balance
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        assert all(gradient.dtype == torch.float32 for gradient in gradients[-1].values())
    assert losses[1] == pytest.approx(losses[0], rel=24 * 2**-9)
    # Where the gradient jumps, at ReLU's kink and between experts, rounding may land on the other side.
    if not config.use_moe and config.activation_name in ("silu", "gelu"):
        for name, exact in gradients[0].items():
            assert float((gradients[1][name] - exact).norm() / exact.norm()) < 72 * 2**-9, name


@torch.no_grad()
def test_bfloat16_model_runs(config: ThinkerConfig, build: Build) -> None:
    """Catches a mixture of types in a model that was loaded in bfloat16, with and without a cache."""
    model, tokens = build(config, torch.bfloat16), ids(2, 9)
    logits = model(tokens)
    assert logits.dtype == torch.bfloat16
    cached, kv_cache = model(tokens[:, :5], use_cache=True)
    rest, _ = model(tokens[:, 5:], kv_cache=kv_cache, use_cache=True)
    assert kv_cache.keys.dtype == torch.bfloat16
    exact = build(config, torch.float64)(tokens)
    if not config.use_moe:
        for got in (logits, torch.cat((cached, rest), dim=1)):
            assert float((got.double() - exact).norm() / exact.norm()) < 24 * 2**-9


def test_modules_carry_no_bias(config: ThinkerConfig, build: Build) -> None:
    """Catches a bias, for which Llama has no place."""
    assert [name for name, _ in build(config).named_parameters() if "bias" in name] == []
