"""The network, read from top to bottom: RMSNorm, RotaryEmbedding, Attention, MLP, Block, ThinkerLM.

Decoder-only and pre-norm: x = x + attn(norm1(x)), then x = x + mlp(norm2(x)). Token ids or raw embeddings come in,
logits go out. No loss, sampling, file access or choice of device in here; nor the fast forms of attention
(`attention.py`), the experts (`moe.py`), or foreign names of tensors (`formats/`).
"""

# B batch, T new tokens, S cached + new, D d_model, H query heads, G key/value heads, F d_ff, E experts, V vocabulary

from __future__ import annotations

import torch
from torch import Tensor, nn

from .activations import ACTIVATIONS, gated
from .attention import Rotation, attend, turn
from .cache import Cache, FixedCache, KVCache
from .config import ThinkerConfig
from .fused import norm
from .linear import Linear
from .moe import MoE
from .rope import rope_tables


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) * scale over the last dimension (arXiv 1910.07467), statistics in at least float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(…, width) to (…, width)."""
        if norm.serves(x, self.scale):
            return norm.normed(x, self.scale, self.eps)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return (normed * self.scale).to(x.dtype)


class RotaryEmbedding(nn.Module):
    """RoPE's cosines and sines by position, shared by all blocks."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ThinkerConfig) -> None:
        super().__init__()
        self.config = config
        self._fill(torch.empty(0).device)

    def _fill(self, device: torch.device) -> None:
        for name, table in zip(("cos", "sin"), rope_tables(self.config), strict=True):
            self.register_buffer(name, torch.from_numpy(table).to(device), persistent=False)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        super()._apply(fn, recurse)
        # model.bfloat16() must not round the angles: beyond position 256 bfloat16 can't tell neighbours apart.
        self._fill(self.cos.device)
        return self

    def forward(self, positions: Tensor) -> Rotation:
        """positions (T,) or (B, T) to cosines and sines (1 or B, 1, T, head_dim / 2), float32."""
        shape = (-1, 1, positions.shape[-1], self.cos.shape[-1])
        return self.cos[positions].view(shape), self.sin[positions].view(shape)


class Attention(nn.Module):
    """Multi-head attention with RoPE on q and k; grouped-query (arXiv 2305.13245) when `use_gqa`."""

    def __init__(self, config: ThinkerConfig, layer: int, causal: bool = True) -> None:
        super().__init__()
        self.layer, self.causal = layer, causal
        self.n_heads, self.n_kv_heads, self.width = config.n_heads, config.n_kv_heads, config.head_width
        inner, kv_inner = config.n_heads * self.width, config.n_kv_heads * self.width
        self.use_gqa = config.use_gqa
        if config.use_gqa:
            self.q = Linear(config.d_model, inner)
            self.k = Linear(config.d_model, kv_inner)
            self.v = Linear(config.d_model, kv_inner)
        else:
            self.qkv = Linear(config.d_model, 3 * inner)
        self.q_norm = RMSNorm(self.width, config.norm_eps) if config.use_qk_norm else None
        self.k_norm = RMSNorm(self.width, config.norm_eps) if config.use_qk_norm else None
        self.out_proj = Linear(inner, config.d_model)

    def project(self, x: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, D) to q (B, H, T, head_dim), k and v (B, G, T, head_dim); q and k normed, turned if so wanted."""
        if self.use_gqa:
            q, k, v = self.q(x), self.k(x), self.v(x)
        else:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.width)).transpose(1, 2) for part in (q, k, v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return turn(q, rotation), turn(k, rotation), v

    def forward(
        self,
        x: Tensor,
        rotation: Rotation,
        visible: Tensor | None = None,
        kv_cache: Cache | None = None,
        starts: Tensor | None = None,
    ) -> Tensor:
        """x (B, T, D) to (B, T, D). visible, starts: see `attention.attend`; a mask has causality in it."""
        if rotation[0].dtype not in (torch.float32, torch.promote_types(x.dtype, torch.float32)):
            raise ValueError(f"RoPE's angles are {rotation[0].dtype}: with FSDP say cast_forward_inputs=False")
        q, k, v = self.project(x, None if kv_cache is None else rotation)
        if kv_cache is not None:
            k, v = kv_cache.append(self.layer, k, v)  # (B, G, S, head_dim)
        # A single query is the newest token and sees everything.
        causal = self.causal and visible is None and q.shape[2] > 1
        y = attend(q, k, v, visible, causal, starts if causal else None, rotation if kv_cache is None else None)
        return self.out_proj(y.transpose(1, 2).flatten(start_dim=2))  # (B, T, D)


class MLP(nn.Module):
    """SwiGLU, down(silu(gate(x)) * up(x)) (arXiv 2002.05202), or the plain down(act(up(x)))."""

    def __init__(self, config: ThinkerConfig) -> None:
        super().__init__()
        self.activate = ACTIVATIONS[config.activation_name]
        self.gate_proj = Linear(config.d_model, config.d_ff) if config.use_swiglu else None
        self.up_proj = Linear(config.d_model, config.d_ff)
        self.down_proj = Linear(config.d_ff, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        if self.gate_proj is None:
            return self.down_proj(self.activate(self.up_proj(x)))
        return self.down_proj(gated(self.activate, self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    """One layer: attention, then the MLP or the experts, each normed before and added to the stream."""

    def __init__(self, config: ThinkerConfig, layer: int, causal: bool = True) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.d_model, config.norm_eps)
        self.attn = Attention(config, layer, causal)
        self.norm2 = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = None if config.use_moe else MLP(config)
        self.moe = MoE(config, ACTIVATIONS[config.activation_name]) if config.use_moe else None
        self.scale1 = self.scale2 = None
        if config.layer_scale is not None:  # arXiv 2103.17239
            self.scale1 = nn.Parameter(torch.full((config.d_model,), config.layer_scale))
            self.scale2 = nn.Parameter(torch.full((config.d_model,), config.layer_scale))
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        rotation: Rotation,
        visible: Tensor | None = None,
        kv_cache: Cache | None = None,
        starts: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """x (B, T, D) to (B, T, D) and the router's logits (B, T, E), None without experts."""
        y = self.attn(self.norm1(x), rotation, visible, kv_cache, starts)
        x = x + self.dropout(y if self.scale1 is None else y * self.scale1)
        y, router_logits = self.feed_forward(self.norm2(x))
        x = x + self.dropout(y if self.scale2 is None else y * self.scale2)
        return x, router_logits

    def feed_forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The MLP, or the experts with their router's logits."""
        if self.moe is not None:
            return self.moe(x)
        assert self.mlp is not None
        return self.mlp(x), None


class ThinkerLM(nn.Module):
    """The language model: tokens (B, T) or embeddings (B, T, D) to logits (B, T, V)."""

    def __init__(self, config: ThinkerConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_emb = nn.Embedding(config.vocab_size, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.rope = RotaryEmbedding(config)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.tok_emb.weight
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Normal matrices; zero output projections and head, so that training starts from the identity.

        Zero branches let signals and gradients through any depth at first (arXiv 2003.04887, with zero matrices in
        place of its scalars). A zero head (arXiv 2203.03466) starts at the loss of a uniform guess, log V. A tied one
        can't be zero: it is the embedding.
        """
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                continue
            if "out_proj" in name or "down_proj" in name or name == "head.weight":
                parameter.zero_()
            else:
                parameter.normal_(std=0.02)

    def features(
        self,
        tokens: Tensor | None = None,
        *,
        embeddings: Tensor | None = None,
        attention_mask: Tensor | None = None,
        segments: Tensor | None = None,
        kv_cache: Cache | None = None,
        return_router: bool = False,
    ) -> Tensor | tuple[Tensor, tuple[Tensor, ...]]:
        """The stream after the final norm, (B, T, D), for any head.

        With return_router also each layer's router logits (B, T, E). attention_mask (B, S) has 1 for real tokens and
        0 for padding, which stands on the left. segments (B, T) numbers the texts of packed rows, which then see only
        themselves. A cache is filled and advanced. `ValueError` for what can't be run.
        """
        x = self.embed(tokens, embeddings)
        B, T, _ = x.shape
        visible = starts = None
        if segments is None:
            positions, visible = self.places(B, T, attention_mask, kv_cache, x.device)
        elif attention_mask is None and kv_cache is None:
            positions, starts = self.packed_places(B, T, segments)
        else:
            raise ValueError("segments go with neither attention_mask nor kv_cache: packed rows are for training")
        x, rotation = self.dropout(x), self.rope(positions)
        router_logits = []
        for block in self.blocks:
            x, routed = block(x, rotation, visible, kv_cache, starts)
            if routed is not None:
                router_logits.append(routed)
        if kv_cache is not None:
            kv_cache.advance(T)
        x = self.norm(x)
        return (x, tuple(router_logits)) if return_router else x

    def forward(
        self,
        tokens: Tensor | None = None,
        *,
        embeddings: Tensor | None = None,
        attention_mask: Tensor | None = None,
        kv_cache: KVCache | None = None,
        use_cache: bool = False,
    ) -> Tensor | tuple[Tensor, KVCache]:
        """Logits (B, T, V); with use_cache also the cache, made when none is given, to pass with the next tokens."""
        if kv_cache is not None and not use_cache:
            raise ValueError("a kv_cache was given with use_cache=False: pass use_cache=True to go on from it")
        if use_cache and kv_cache is None:
            given = tokens if tokens is not None else embeddings
            batch = 0 if given is None or given.dim() == 0 else len(given)  # `embed` says what is wrong
            weight = self.head.weight
            kv_cache = KVCache.empty(self.config, batch, device=weight.device, dtype=weight.dtype)
        hidden = self.features(tokens, embeddings=embeddings, attention_mask=attention_mask, kv_cache=kv_cache)
        logits = self.head(hidden)
        return (logits, kv_cache) if kv_cache is not None else logits

    def embed(self, tokens: Tensor | None, embeddings: Tensor | None) -> Tensor:
        """Exactly one of tokens (B, T) and embeddings (B, T, D) as the stream's start, checked: (B, T, D)."""
        if (tokens is None) == (embeddings is None):
            raise ValueError(
                f"exactly one of tokens and embeddings is needed, got {'none' if tokens is None else 'both'}"
            )
        given = tokens if tokens is not None else embeddings
        assert given is not None
        wanted, weight = (2 if tokens is not None else 3), self.tok_emb.weight
        if given.dim() != wanted:
            raise ValueError(f"{'tokens' if wanted == 2 else 'embeddings'} need {wanted} dimensions, got {given.dim()}")
        if given.shape[0] == 0 or given.shape[1] == 0:
            raise ValueError(
                f"an empty sequence: got batch {given.shape[0]} of length {given.shape[1]}, need at least 1 of 1"
            )
        if given.device != weight.device:
            raise ValueError(f"the input is on {given.device}, the model on {weight.device}: move one of them")
        if embeddings is not None:
            if embeddings.shape[-1] != self.config.d_model:
                raise ValueError(
                    f"embeddings are {embeddings.shape[-1]} wide, the model's d_model is {self.config.d_model}"
                )
            if embeddings.dtype != weight.dtype and not torch.is_autocast_enabled(weight.device.type):
                raise ValueError(f"embeddings are {embeddings.dtype}, the model {weight.dtype}: convert one of them")
            return embeddings
        assert tokens is not None
        if tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"token ids are {tokens.dtype}: give torch.int64 or int32")
        # Reading values back would stall an accelerator and break a compiled graph; there the caller has checked.
        if tokens.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= self.config.vocab_size:
                wrong = low if low < 0 else high
                raise ValueError(f"token id {wrong} is outside the vocabulary of {self.config.vocab_size}")
        return self.tok_emb(tokens)

    def places(
        self, B: int, T: int, attention_mask: Tensor | None, kv_cache: Cache | None, device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        """Each token's position, (T,) or (B, T), and who sees whom, bool (B or 1, 1, T, S), None if plainly causal."""
        if isinstance(kv_cache, FixedCache):
            return kv_cache.places()
        if kv_cache is not None:
            if len(kv_cache.lengths) != B:
                raise ValueError(f"the batch has {B} rows, its cache {len(kv_cache.lengths)}")
            if len(kv_cache.keys) != self.config.n_layers:
                raise ValueError(f"the cache has {len(kv_cache.keys)} layers, the model {self.config.n_layers}")
            kv_cache.check_room(T)
            past, ragged = max(kv_cache.lengths), kv_cache.ragged
        else:
            past, ragged = 0, False
        S = past + T
        if self.config.ctx_len < S:
            raise ValueError(
                f"{S} positions exceed ctx_len {self.config.ctx_len}: shorten the input, or load with a larger ctx_len"
            )
        columns = kv_cache.columns(T) if kv_cache is not None and ragged else torch.arange(past, S, device=device)
        if attention_mask is None and not ragged and (past == 0 or T == 1):
            return columns, None
        keys = torch.arange(S, device=device)
        visible = (keys <= columns[..., None]).view(-1, 1, T, S)
        if attention_mask is None:
            return columns, visible
        if attention_mask.shape != (B, S):
            raise ValueError(f"attention_mask is {tuple(attention_mask.shape)}, cached and new tokens make {(B, S)}")
        if ragged:
            raise ValueError(f"attention_mask goes with rows of one length, the cache has {kv_cache.lengths}")  # type: ignore[union-attr]
        real = attention_mask.to(device=device, dtype=torch.bool)
        # Positions start at a row's first real token. Padding sees itself, since a row without any key is NaN.
        positions = (real.cumsum(dim=-1) - 1).clamp(min=0)[:, past:]
        itself = keys == columns[:, None]
        return positions, (visible & real[:, None, None, :]) | itself

    def packed_places(self, B: int, T: int, segments: Tensor) -> tuple[Tensor, Tensor]:
        """Positions (B, T) in rows of several texts, each counted from 0, and where each token's text starts, (B, T).

        Segments [1, 1, 2, 2, 2, 0] have positions [0, 1, 0, 1, 2, 0] and starts [0, 0, 2, 2, 2, 5]; what stands
        together is one text.
        """
        if segments.shape != (B, T):
            raise ValueError(f"segments are {tuple(segments.shape)}, the tokens are {(B, T)}: give one each")
        if segments.device != self.tok_emb.weight.device:
            raise ValueError(f"segments are on {segments.device}, the model on {self.tok_emb.weight.device}: move them")
        if self.config.ctx_len < T:
            raise ValueError(f"{T} positions exceed ctx_len {self.config.ctx_len}: pack shorter rows")
        columns = torch.arange(T, device=segments.device)
        begins = segments != segments.roll(1, dims=-1)
        starts = torch.where(begins, columns, 0).cummax(dim=-1).values
        return columns - starts, starts
