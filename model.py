"""The decoder: a nanoGPT-style transformer in which the mask and the positions are arguments.

In: token ids (or embeddings), a mask that says who may attend to whom, a position for every token. Out: the hidden
state of every token after the final norm, and logits from it. No code here depends on a view, a tokenizer or a model
family: `jepa.py` makes the mask, `data.py` the positions, `hf/` turns Hugging Face folders into `Decoder`s.

    B rows, T new columns, S columns attended to (S = T without a cache), C = d_model, H heads, G key/value heads,
    D = head_dim, V = vocab_size

The default is Llama's style: RoPE, RMSNorm, SwiGLU, no biases. GPT-2 (learned positions, LayerNorm, GELU, biases) and
all later families change a few fields of `Config`. Read next: `data.py`.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass
class Config:
    vocab_size: int
    n_layer: int
    n_head: int
    d_model: int
    d_ff: int  # inner width of the MLP
    n_kv_head: int | None = None  # fewer than n_head: grouped-query attention. None: n_head
    head_dim: int | None = None  # None: d_model / n_head
    block_size: int = 1024  # the longest a view may be, in tokens
    tied: bool = True  # the output matrix is the embedding matrix
    position: str = "rope"  # or "learned" (GPT-2)
    rope_theta: float = 10000.0
    norm: str = "rms"  # or "layer"
    norm_eps: float = 1e-5
    activation: str = "silu"  # or "gelu", "gelu_tanh"
    gated: bool = True  # down(act(gate(x)) * up(x)), otherwise down(act(up(x)))
    qkv_bias: bool = False
    out_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False

    # What other families change. A first reader may skip this part, and the lines below that name one of its fields: at
    # these defaults the model is a plain Llama.
    embed_scale: float = 1.0  # Gemma multiplies embeddings by sqrt(d_model)
    norm_plus_one: bool = False  # Gemma stores w - 1
    pre_norm: bool = True  # norm what goes into attention and MLP
    post_norm: bool = False  # norm what comes out of them (OLMo-2; Gemma-2 and 3 do both)
    parallel: bool = False  # Phi: attention and MLP take the same normed input
    qk_norm: str | None = None  # "head": each head of q and k (Qwen-3, Gemma-3); "full": all heads as one (OLMo-2)
    head_bias: bool = False  # of the output matrix (Phi)
    rope_fraction: float = 1.0  # Phi rotates only this part of each head
    rope_scaling: dict | None = None  # {"type": "linear" | "llama3", "factor": ..., ...}, see `rope_frequencies`
    attn_scale: float | None = None  # None: 1 / sqrt(head_dim)
    attn_softcap: float | None = None  # Gemma-2: cap * tanh(scores / cap)
    logit_softcap: float | None = None
    window: int | None = None  # windowed layers see only keys less than this many positions back
    windowed: tuple[bool, ...] = ()  # per layer; empty: every layer, if there is a window
    rope_theta_window: float | None = None  # Gemma-3: windowed layers use this theta, and no rope_scaling

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_dim = self.head_dim or self.d_model // self.n_head
        self.windowed = tuple(self.windowed) or (self.window is not None,) * self.n_layer
        assert self.n_head % self.n_kv_head == 0, f"{self.n_head} heads cannot share {self.n_kv_head} key/value heads"
        assert len(self.windowed) == self.n_layer, "Config.windowed needs one entry per layer"


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in fp32 whatever the type of x."""

    formula = staticmethod(F.rms_norm)

    def __init__(self, width, eps, plus_one=False):
        super().__init__()
        self.eps, self.plus_one = eps, plus_one
        self.weight = nn.Parameter(torch.full((width,), 0.0 if plus_one else 1.0))

    def forward(self, x):
        weight = self.weight.float() + 1 if self.plus_one else self.weight.float()
        return self.formula(x.float(), weight.shape, weight, self.eps).type_as(x)


def make_norm(config, width=None):
    width = width or config.d_model
    if config.norm == "layer":
        return nn.LayerNorm(width, eps=config.norm_eps)
    return RMSNorm(width, config.norm_eps, config.norm_plus_one)


def rope_frequencies(config, device, windowed=False):
    """Radians per position for each rotated pair of dimensions, (R/2,). RoFormer, arXiv 2104.09864, section 3.2.2."""
    theta = config.rope_theta_window if windowed and config.rope_theta_window else config.rope_theta
    rotated = int(config.head_dim * config.rope_fraction)
    frequency = theta ** -(torch.arange(0, rotated, 2, device=device).float() / rotated)
    scaling = config.rope_scaling
    if scaling is None or (windowed and config.rope_theta_window):
        return frequency
    slowed = frequency / scaling["factor"]
    if scaling["type"] == "linear":
        return slowed
    # Llama-3: long waves are slowed by `factor`, short ones are left alone, those between are blended.
    turns = scaling["original_block_size"] * frequency / (2 * math.pi)  # turns within the original context
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * frequency + (1 - keep) * slowed


def rotate(x, cos, sin):
    """Turn pairs of the first R <= D dimensions of x (B, H, T, D); cos, signed sin (B, 1, T, R): see `Decoder.rope`.

    A pair is (i, i + R/2), as in Hugging Face checkpoints; the RoPE paper pairs (2i, 2i + 1). The two differ by a fixed
    permutation of q_proj's and k_proj's rows, so weights of one convention give nonsense under the other.
    """
    R, D = cos.shape[-1], x.shape[-1]
    turned, rest = x[..., :R], x[..., R:]
    turned = torch.addcmul(turned * cos, turned.roll(R // 2, dims=-1), sin).type_as(x)  # roll: each one's partner
    return torch.cat([turned, rest], dim=-1) if R < D else turned


class Attention(nn.Module):
    """Multi-head attention: who attends to whom is the mask's business alone."""

    def __init__(self, config, layer):
        super().__init__()
        c, self.config, self.layer = config, config, layer
        self.q_proj = nn.Linear(c.d_model, c.n_head * c.head_dim, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.d_model, c.n_kv_head * c.head_dim, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.d_model, c.n_kv_head * c.head_dim, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.n_head * c.head_dim, c.d_model, bias=c.out_bias)
        if c.qk_norm:
            heads = (1, 1) if c.qk_norm == "head" else (c.n_head, c.n_kv_head)  # that are normed as one
            self.q_norm, self.k_norm = (make_norm(c, n * c.head_dim) for n in heads)

    def forward(self, x, mask, rope=None, cache=None):
        c, (B, T, _) = self.config, x.shape
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)  # (B, T, H*D), (B, T, G*D) twice
        if x.device.type == "cpu":  # attention stays in fp32 there: its backward kernel for bfloat16 takes 4 x as long
            q, k, v = q.float(), k.float(), v.float()
        if c.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.view(B, T, -1, c.head_dim).transpose(1, 2) for t in (q, k, v))  # (B, H or G, T, D)
        if c.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, G, S, D): all columns so far
        y = self.attend(q, k, v, mask)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))

    @torch.autocast("cpu", enabled=False)  # or it would take q, k and v to bfloat16 again
    def attend(self, q, k, v, mask):
        """softmax(scale q k^T + mask) v: (B, H, T, D). mask: see `Decoder.added`.

        The H/G query heads that share keys are laid one after another, as H/G*T queries of one head. (Of CUDA's fused
        kernels at most cuDNN's takes `enable_gqa` together with a mask; and keys would be read once for each head.)
        """
        c, sharing = self.config, self.config.n_head // self.config.n_kv_head
        q = q.unflatten(1, (-1, sharing)).flatten(2, 3)  # (B, G, H/G*T, D)
        scale = c.attn_scale or c.head_dim**-0.5
        if c.attn_softcap is None and q.device.type != "mps":
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        else:  # no fused kernel caps the scores, and that of MPS mixes up masks that differ from row to row
            scores = q @ k.transpose(-2, -1) * scale
            if c.attn_softcap is not None:
                scores = c.attn_softcap * torch.tanh(scores / c.attn_softcap)
            y = (scores + mask).softmax(dim=-1) @ v
        return y.unflatten(2, (sharing, -1)).flatten(1, 2)


class MLP(nn.Module):
    """Two projections, or three if gated, with a nonlinearity in between."""

    def __init__(self, config):
        super().__init__()
        c = config
        self.act = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": nn.GELU(approximate="tanh")}[c.activation]
        self.gate_proj = nn.Linear(c.d_model, c.d_ff, bias=c.mlp_bias) if c.gated else None
        self.up_proj = nn.Linear(c.d_model, c.d_ff, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.d_ff, c.d_model, bias=c.mlp_bias)

    def forward(self, x):
        if self.gate_proj is None:
            return self.down_proj(self.act(self.up_proj(x)))
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


def in_autocast_type(x):
    """x in the type that autocast wants, once, instead of anew by every projection that takes it."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


class Block(nn.Module):
    """Attention and MLP, each added to the residual stream x (B, T, C)."""

    def __init__(self, config, layer):
        super().__init__()
        norm_if = lambda wanted: make_norm(config) if wanted else nn.Identity()  # noqa: E731
        self.parallel = config.parallel
        self.attn_norm = norm_if(config.pre_norm)
        self.attn = Attention(config, layer)
        self.attn_post_norm = norm_if(config.post_norm)
        self.mlp_norm = norm_if(config.pre_norm and not config.parallel)
        self.mlp = MLP(config)
        self.mlp_post_norm = norm_if(config.post_norm)

    def forward(self, x, mask, rope=None, cache=None):
        h = in_autocast_type(self.attn_norm(x))
        attended = self.attn_post_norm(self.attn(h, mask, rope, cache))
        if self.parallel:
            return x + attended + self.mlp(h)
        x = x + attended
        return x + self.mlp_post_norm(self.mlp(in_autocast_type(self.mlp_norm(x))))


class Decoder(nn.Module):
    """Embedding, blocks, final norm, output matrix."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.checkpoint_activations = False  # recompute each block in the backward pass: less memory, more time
        self.embed = nn.Embedding.from_pretrained(torch.empty(c.vocab_size, c.d_model), freeze=False)  # _draw draws it
        if c.position == "learned":
            self.position_embed = nn.Embedding.from_pretrained(torch.empty(c.block_size, c.d_model), freeze=False)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = make_norm(config)
        if not config.tied:
            self.head = nn.Linear(config.d_model, config.vocab_size, bias=config.head_bias)
        if not self.embed.weight.is_meta:  # shapes alone are wanted where weights are loaded: see hf/weights.py
            self.apply(self._draw)

    def _draw(self, module):
        """GPT-2's initialisation: N(0, 0.02), and smaller for projections into the residual stream, whose variance
        would otherwise grow with depth. A block is visited after what is in it."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, Block):
            for projection in (module.attn.o_proj, module.mlp.down_proj):
                nn.init.normal_(projection.weight, std=0.02 / math.sqrt(2 * self.config.n_layer))

    def forward(self, ids):
        """Logits (B, T, V) of ids (B, T) as any language model gives them: one text a row, each token sees all before.

        Training and decoding call `hidden`, with masks and positions of their own.
        """
        B, T = ids.shape
        causal = torch.ones(B, T, T, dtype=torch.bool, device=ids.device).tril()
        position = torch.arange(T, device=ids.device).expand(B, T)
        return self.logits(self.hidden(ids, causal, position))

    def hidden(self, ids, mask, position, cache=None, embeds=None):
        """States after the final norm, (B, T, C).

        ids (B, T). mask (B, T, S) bool: True where token q may attend to column k. position (B, T): counted per view.
        cache: an `evaluation.generate.Cache` of the S - T earlier columns. embeds (B, T, C): used as `embed(ids)`.
        """
        c = self.config
        x = (self.embed(ids) if embeds is None else embeds) * c.embed_scale  # (B, T, C)
        if c.position == "learned":
            x = x + self.position_embed(position)
        key_position = position if cache is None else cache.extend(position)  # (B, S)
        rope, mask_window, rope_window = self.rope(position), None, None
        if any(c.windowed):
            mask_window = self.added(mask & (position[:, :, None] - key_position[:, None, :] < c.window), x)
            rope_window = self.rope(position, windowed=True)
        mask = self.added(mask, x)
        for block, windowed in zip(self.blocks, c.windowed, strict=True):
            arguments = (x, mask_window, rope_window, cache) if windowed else (x, mask, rope, cache)
            if self.checkpoint_activations and self.training:
                x = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x = block(*arguments)
        return self.norm(x)

    def added(self, mask, x):  # (B, T, S) bool -> (B, 1, H/G*T, S)
        """The mask as attention adds it to scores, in their type: 0, or -inf where a token must not look. Made once for
        all layers, which would each keep one of their own for the backward pass."""
        dtype = torch.float32 if x.device.type == "cpu" else in_autocast_type(x).dtype
        added = torch.zeros(mask.shape, dtype=dtype, device=x.device).masked_fill(~mask, -math.inf)
        return added.repeat(1, self.config.n_head // self.config.n_kv_head, 1)[:, None]

    def rope(self, position, windowed=False):
        """(cos, signed sin) of RoPE's angles, (B, 1, T, R) each; None where positions are learned. sin is negative in
        the first half: first' = first cos - second sin, second' = second cos + first sin."""
        if self.config.position != "rope":
            return None
        angle = position[:, None, :, None].float() * rope_frequencies(self.config, position.device, windowed)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)

    def logits(self, hidden):
        """Scores over the vocabulary, (..., V), for states (..., C)."""
        logits = F.linear(hidden, self.embed.weight) if self.config.tied else self.head(hidden)
        if self.config.logit_softcap is not None:
            logits = self.config.logit_softcap * torch.tanh(logits / self.config.logit_softcap)
        return logits
