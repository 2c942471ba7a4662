"""A residual stream with HeteroLoRA's shortcuts, block by block from the formulas, in the precision of its tensors.

Llama and BERT are written out from their weights; GPT-2 and OPT are put together from the modules of their blocks.
"""

import math

import torch
from torch.nn import functional as F


def stream(h, blocks, shortcuts, norms_on_sums):
    """Return the state behind the last block.

    `blocks` are (first norm, attention, second norm, MLP) as functions, `shortcuts` {(block, kind): (P_A, P_B, s)}.
    """
    f_before = None
    for index, (first, attention, second, mlp) in enumerate(blocks):

        def along(kind, x, index=index):
            if (index, kind) not in shortcuts:
                return 0
            a, b, s = shortcuts[index, kind]
            return s * (x @ a.T) @ b.T

        sum_attention = h + attention(h if norms_on_sums else first(h)) + along("residual_attention", h)
        if index:
            sum_attention = sum_attention + along("shortcut_mlp", f_before)
        f = first(sum_attention) if norms_on_sums else sum_attention
        sum_mlp = f + mlp(f if norms_on_sums else second(f)) + along("residual_mlp", f) + along("shortcut_block", h)
        h = second(sum_mlp) if norms_on_sums else sum_mlp
        f_before = f
    return h


def attend(q, k, v, causal):
    """q (B, H, T, D), k and v with as many heads or fewer; returns (B, T, H·D)."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    if causal:
        later = torch.ones(q.shape[2], q.shape[2]).triu(1).bool()
        scores = scores.masked_fill(later, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def heads(x, count):
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def llama(model, weights, shortcuts, ids):
    """Return the logits; `weights` are the model's, with whatever adapters change in them."""
    config = model.config
    size = config.hidden_size // config.num_attention_heads
    # in float32, as the model has its angles
    angle = torch.arange(ids.shape[1]).float()[:, None] * (1 / 10000 ** (torch.arange(0, size, 2).float() / size))
    cos, sin = (torch.cat([x, x], dim=-1).double() for x in (angle.cos(), angle.sin()))

    def norm(name):
        def apply(x):
            return weights[name] * x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()

        return apply

    def turned(x):
        left, right = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-right, left], dim=-1) * sin

    def block(index):
        name = f"model.layers.{index}."

        def attention(x):
            q, k, v = (x @ weights[f"{name}self_attn.{kind}_proj.weight"].T for kind in "qkv")
            q, k, v = (
                heads(q, config.num_attention_heads),
                heads(k, config.num_key_value_heads),
                heads(v, config.num_key_value_heads),
            )
            return attend(turned(q), turned(k), v, causal=True) @ weights[f"{name}self_attn.o_proj.weight"].T

        def mlp(x):
            gate, up = (x @ weights[f"{name}mlp.{kind}_proj.weight"].T for kind in ("gate", "up"))
            return (F.silu(gate) * up) @ weights[f"{name}mlp.down_proj.weight"].T

        return norm(f"{name}input_layernorm.weight"), attention, norm(f"{name}post_attention_layernorm.weight"), mlp

    blocks = [block(index) for index in range(config.num_hidden_layers)]
    h = stream(weights["model.embed_tokens.weight"][ids], blocks, shortcuts, norms_on_sums=False)
    return norm("model.norm.weight")(h) @ weights["lm_head.weight"].T


def bert(model, weights, shortcuts, ids):
    """Return the logits of the classifier."""
    config = model.config

    def linear(name):
        return lambda x: x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name):
        def apply(x):
            centered = x - x.mean(-1, keepdim=True)
            scaled = centered / (centered.square().mean(-1, keepdim=True) + config.layer_norm_eps).sqrt()
            return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

        return apply

    def block(index):
        name = f"bert.encoder.layer.{index}."

        def attention(x):
            q, k, v = (
                heads(linear(f"{name}attention.self.{kind}")(x), config.num_attention_heads)
                for kind in ("query", "key", "value")
            )
            return linear(f"{name}attention.output.dense")(attend(q, k, v, causal=False))

        def mlp(x):
            inner = linear(f"{name}intermediate.dense")(x)
            return linear(f"{name}output.dense")(inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2))))

        return norm(f"{name}attention.output.LayerNorm"), attention, norm(f"{name}output.LayerNorm"), mlp

    blocks = [block(index) for index in range(config.num_hidden_layers)]
    h = stream(model.bert.embeddings(ids), blocks, shortcuts, norms_on_sums=True)
    return linear("classifier")(torch.tanh(linear("bert.pooler.dense")(h[:, 0])))


def gpt2(model, weights, shortcuts, ids):
    """Return the logits, from the modules of the model."""
    inner, mask = model.transformer, _mask(ids.shape[1])
    h = inner.wte(ids) + inner.wpe(torch.arange(ids.shape[1]))
    blocks = [
        (block.ln_1, lambda x, b=block: b.attn(x, attention_mask=mask)[0], block.ln_2, block.mlp) for block in inner.h
    ]
    return model.lm_head(inner.ln_f(stream(h, blocks, shortcuts, norms_on_sums=False)))


def opt(model, weights, shortcuts, ids):
    """Return the logits, from the modules of the model."""
    inner, mask = model.model.decoder, _mask(ids.shape[1])
    # OPT's positions start at 2
    h = inner.embed_tokens(ids) + inner.embed_positions.weight[2 : 2 + ids.shape[1]]
    blocks = [
        (
            block.self_attn_layer_norm,
            lambda x, b=block: b.self_attn(hidden_states=x, attention_mask=mask)[0],
            block.final_layer_norm,
            lambda x, b=block: b.fc2(b.activation_fn(b.fc1(x))),
        )
        for block in inner.layers
    ]
    before = model.config.do_layer_norm_before
    h = stream(h, blocks, shortcuts, norms_on_sums=not before)
    return model.lm_head(inner.final_layer_norm(h) if before else h)


def _mask(length):
    return torch.full((length, length), -torch.inf, dtype=torch.float64).triu(1)[None, None]
