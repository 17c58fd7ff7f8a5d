"""One decoder layer of the Qwen2-VL, Qwen2.5-VL and Qwen3-VL families, as plain functions on the model's own modules.

The same arithmetic as transformers' layer, with what training needs of it in reach: the keys and values of a prompt can
be put in front, activations can be recomputed, and the operations are few. Adapters on the projections stay in effect.
"""

from collections.abc import Callable

import torch

# Up to this many attention scores (float32: 32 MiB) plain matrix products beat the CPU's fused kernel; above, memory.
PLAIN_SCORES = 2**23


def decoder_layer(
    layer: torch.nn.Module,
    hidden: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """The layer's output [B, T, H] for hidden states [B, T, H].

    `rotary` holds cosines and signed sines [B, T, D]; `attend` takes rotated queries [B, heads, T, D], keys and values
    [B, key heads, T, D], and returns what the queries gather, [B, heads, T, D].
    """
    attention, mlp = layer.self_attn, layer.mlp
    x = rms_norm(hidden, layer.input_layernorm)
    parts = attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
    q, k, v = (part.unflatten(-1, (-1, attention.head_dim)) for part in parts)  # [B, T, heads, D]
    if hasattr(attention, "q_norm"):  # Qwen3
        q, k = rms_norm(q, attention.q_norm), rms_norm(k, attention.k_norm)
    q, k = rotate(q, *rotary, v.dtype), rotate(k, *rotary, v.dtype)  # attention wants one precision
    gathered = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    hidden = hidden + attention.o_proj(gathered.transpose(1, 2).flatten(2))
    x = rms_norm(hidden, layer.post_attention_layernorm)
    return hidden + mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Attention [B, heads, T, D] of queries [B, heads, T, D] over keys and values [B, key heads, L, D].

    `mask` [B, 1, T, L] bool says who may look at whom. None: the queries are the last T of the L tokens, and each looks
    at itself and at what stands before it.
    """
    batch, heads, tokens, size = q.shape
    before = k.shape[2] - tokens
    plain = q.device.type == "cpu" and q.shape[:3].numel() * k.shape[2] <= PLAIN_SCORES
    # The kernels for causal attention leave out half of the scores, but want as many queries as keys: those of `before`
    # are made up, which is worth it while they are few.
    causal = mask is None and not plain and 2 * before <= tokens
    if mask is None and not causal:
        mask = torch.ones(tokens, k.shape[2], dtype=torch.bool, device=q.device).tril(before)
    if plain:
        # The query heads that share a key head stand where one would expect more queries: no key is repeated.
        q = (q * scale).reshape(batch, k.shape[1], -1, size)
        scores = (q @ k.mT).view(batch, heads, tokens, -1)
        scores = scores + torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
        weights = scores.softmax(-1).view(batch, k.shape[1], -1, k.shape[2])
        return (weights @ v).view(batch, heads, tokens, size)
    attend = torch.nn.functional.scaled_dot_product_attention
    if causal:
        q = torch.nn.functional.pad(q, (0, 0, before, 0))
        return attend(q, k, v, is_causal=True, scale=scale, enable_gqa=True)[:, :, before:]
    # Of the kernels that need no memory for the scores, none takes both a mask and fewer keys: for the query heads that
    # share a key head either the mask is repeated, as above, or the keys are, whichever takes less.
    if tokens <= k.shape[1] * size:
        q, mask = q.reshape(batch, k.shape[1], -1, size), mask.tile(heads // k.shape[1], 1)
    else:
        k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    return attend(q, k, v, mask, scale=scale).reshape(batch, heads, tokens, size)


def rotary_tables(text: torch.nn.Module, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and signed sines [B, T, D] float32 for `rotate`, from positions [3, B, T] on the three axes."""
    cos, sin = text.rotary_emb(torch.zeros(1, device=positions.device), positions)
    half = cos.shape[-1] // 2
    return cos, torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rotary positions on heads [B, T, heads, D], in float32 and rounded once to `dtype`."""
    return Rotate.apply(x, cos[:, :, None], sin[:, :, None], dtype)


class Rotate(torch.autograd.Function):
    """Heads turned by an angle a pair. Rotating halves, (-x2, x1), is a roll whose sign `sin` carries. The gradient is
    turned back: both halves have the same angles, so that sin rolled is -sin."""

    @staticmethod
    def forward(ctx, x, cos, sin, dtype):
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin, out=torch.empty_like(x, dtype=dtype))

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        rolled = grad.roll(grad.shape[-1] // 2, -1)
        back = torch.empty_like(grad, dtype=ctx.dtype)
        return torch.addcmul(grad * cos, rolled, sin, value=-1, out=back), None, None, None


def fused(*linears: torch.nn.Module, features_first: bool = False) -> Callable[[torch.Tensor], torch.Tensor]:
    """Linear maps of the same rows [A, in], their outputs side by side: one product for their weights and, where they
    carry LoRA adapters, two small ones for these. Weights are brought to autocast's precision once, not at each call;
    where they have it already, on CUDA, they are not copied to stand together, and are a product each.

    `features_first` lets the CPU lay the output out as [features, rows] and look at it transposed, which takes two
    threads four fifths of the time where the features are many times the rows; of few rows it does not.
    """
    bases = [getattr(linear, "base_layer", linear) for linear in linears]
    adapters = [low_rank(linear) for linear in linears]
    if None in adapters or not all(type(base) is torch.nn.Linear for base in bases):
        return lambda x: torch.cat([linear(x) for linear in linears], dim=-1)

    kind, dtype, cast = bases[0].weight.device.type, bases[0].weight.dtype, precision(bases[0].weight)
    weights = [base.weight.to(cast) for base in bases]  # [out, in] each
    biases = [None if base.bias is None else base.bias.to(cast) for base in bases]
    if len(bases) > 1 and (kind == "cpu" or cast != dtype):
        weights, biases = [torch.cat(weights)], [None if biases[0] is None else torch.cat(biases)]

    def product(x: torch.Tensor) -> torch.Tensor:
        if features_first and len(x) >= 16 and kind == "cpu" and biases[0] is None:
            return (weights[0] @ x.mT).mT
        parts = [torch.nn.functional.linear(x, *pair) for pair in zip(weights, biases, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    if not any(len(down) for down, _ in adapters):
        return product
    down = torch.cat([down for down, _ in adapters]).to(cast)  # [all ranks, in]
    up = torch.block_diag(*(up for _, up in adapters)).to(cast)  # [out, all ranks]
    return lambda x: product(x).addmm_(torch.nn.functional.linear(x, down), up.mT)


def precision(weight: torch.Tensor) -> torch.dtype:
    """What autocast computes products with this weight in; without autocast that of the weight."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def low_rank(linear: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The matrices [rank, in] and [out, rank] whose product a LoRA adapter adds to the weight; without an adapter of
    rank 0; None where peft does more than that (DoRA, several adapters, dropout in training)."""
    if type(linear) is torch.nn.Linear:
        return linear.weight[:0], linear.weight[:, :0]
    if not hasattr(linear, "lora_A"):
        return None
    names = [name for name in linear.active_adapters if name in linear.lora_A]
    if linear.disable_adapters or linear.merged or len(names) != 1 or names[0] in linear.lora_variant:
        return None
    (name,) = names
    down, up, dropout = linear.lora_A[name], linear.lora_B[name], linear.lora_dropout[name]
    if type(up) is not torch.nn.Linear or up.bias is not None:
        return None
    if dropout.training and type(dropout) is not torch.nn.Identity:
        return None
    return down.weight, up.weight * linear.scaling[name]


def rms_norm(x: torch.Tensor, norm: torch.nn.Module) -> torch.Tensor:
    """x / sqrt(mean of x^2 + eps) * weight over the last dimension, computed in float32."""
    if x.device.type != "cpu":
        with torch.autocast(x.device.type, enabled=False):  # some releases would return float32
            return torch.nn.functional.rms_norm(x, x.shape[-1:], norm.weight.to(x.dtype), norm.variance_epsilon)
    if torch.is_grad_enabled():
        return RMSNorm.apply(x, norm.weight, norm.variance_epsilon)
    return (normalize(x, norm.variance_epsilon) * norm.weight).to(x.dtype)


def normalize(x: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean of x^2 + eps) over the last dimension."""
    if x.device.type != "cpu":
        with torch.autocast(x.device.type, enabled=False):
            return torch.nn.functional.rms_norm(x, x.shape[-1:], None, eps)
    return x * inverse_rms(x, eps)


def inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """1 / sqrt(mean of x^2 + eps) over the last dimension, in a third of the time of torch's norm on the CPU."""
    precise = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=precise)
    return torch.addcmul(torch.full((), eps, dtype=precise), norm, norm, value=1 / x.shape[-1]).rsqrt_()


class RMSNorm(torch.autograd.Function):
    """The norm with a gradient of its own: torch has a fused one on CUDA only, and recording the steps costs 2.5 times.

    With n = x s, s = (mean of x^2 + eps)^-1/2 and y = n w: dx = s (g w - n mean(g w n)), dw = sum of g n.
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        scale = inverse_rms(x, eps)
        normed = x * scale
        ctx.save_for_backward(normed, scale, weight)
        return (normed * weight).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        normed, scale, weight = ctx.saved_tensors
        product, weight = grad * normed, weight.to(normed.dtype)  # float32 where a frozen model is bfloat16
        mean = (product @ weight)[..., None] / normed.shape[-1]
        grad_x = torch.addcmul(grad * weight, normed, mean, value=-1).mul_(scale)
        return grad_x, product.flatten(0, -2).sum(0), None
