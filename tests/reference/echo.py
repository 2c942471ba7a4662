"""Echo-LoRA by the book, in fp64: one sequence at a time, whole weights, whole logits, masks token by token."""

import contextlib
import importlib

import torch
from torch.nn import functional as F

from loraplex.adapters.registry import REGISTRY
from loraplex.tuner.layer import SiteLayer


def loss(model, rows, *, items, boundaries, targets, routed=None, kept=None, distillation=None):
    """Return the loss of sequences `rows`, pairs (ids, labels), and its parts, per predicted token.

    `model` is a PeftModel in fp64 with the objective attached; `boundaries` and the sites `targets` are given, so are
    the draws: `routed` per sequence, the sites that are `kept`, and λ_kd (by default the option's).
    """
    objective = model.base_model.objectives()["default"]
    options, networks = objective.options, objective.networks
    raw = dict(networks.named_parameters()) if networks is not None else {}
    layers = [module for module in model.modules() if isinstance(module, SiteLayer)]
    base = model.get_base_model()
    kd = options.weight_distillation if distillation is None else distillation
    routed = [True] * len(rows) if routed is None else routed
    kept = targets if kept is None else kept

    plain, pooled = [], []
    for ids, labels in rows:
        with by_the_book(layers, {}):
            logits, states = run(base, ids, boundaries)
        plain.append(logits)
        pooled.append([pool(state.detach(), labels, options.pool) for state in states])

    parts = {"objective": [], "on": [], "off": [], "divergence": []}
    for index, (ids, labels) in enumerate(rows):
        z_off, predicting = plain[index], [t for t in range(len(ids) - 1) if labels[t + 1] != -100]
        z_on = None
        if routed[index]:
            inputs = {}
            if options.signal != "none":
                source = pooled[index - 1] if options.signal == "another" else pooled[index]
                mixed = sum(w * p for w, p in zip(torch.softmax(raw["echo_mix"], 0), source, strict=True))
                if options.signal == "zeros":
                    mixed = torch.zeros_like(mixed)
                offset = 0
                for k, site in enumerate(targets):
                    rank = next(layer for layer in layers if layer.site == site).adapter("default").factors.rank
                    if options.injection == "output":
                        rank = next(layer for layer in layers if layer.site == site).out_features
                    if site in kept:
                        inputs[site] = (network(raw, options, mixed, k, offset, rank), predicting, options.injection)
                    offset += rank
            with by_the_book(layers, inputs):
                z_on, _ = run(base, ids, boundaries)
        for t in predicting:
            log_off = F.log_softmax(z_off[t], 0)[labels[t + 1]]
            parts["off"].append(log_off)
            if z_on is None:
                parts["objective"].append(log_off)
                continue
            log_on = F.log_softmax(z_on[t], 0)[labels[t + 1]]
            tau = options.temperature
            p = F.softmax(z_on[t].detach() / tau, 0)
            kl = tau**2 * (p * (p.log() - F.log_softmax(z_off[t] / tau, 0))).sum()
            parts["on"].append(log_on)
            parts["divergence"].append(kl)
            parts["objective"].append(options.weight_on * log_on + options.weight_off * log_off - kd * kl)
    return -sum(parts["objective"]) / items, {name: torch.stack(v) if v else None for name, v in parts.items()}


def network(raw, options, mixed, k, offset, rank):
    """Return g_k u_k, with tanh(u_k) in the multiplicative form."""
    e = mixed / torch.sqrt((mixed**2).mean() + 1e-6) * raw["echo_norm"]
    t = F.silu(raw["echo_trunk"] @ e)
    u = raw["echo_up"][offset : offset + rank] @ t
    g = torch.sigmoid(raw["echo_gate"][k] @ t + raw["echo_gate_bias"][k])
    return g * (torch.tanh(u) if options.injection == "multiplicative" else u)


def pool(state, labels, kind):
    """Return the mean of the pooled tokens' states, zeros where there are none."""
    answers = [t for t, label in enumerate(labels) if label != -100]
    prompt = list(range(answers[0] if answers else len(labels)))
    chosen = {"prompt": prompt, "last_prompt": prompt[-1:], "answer": answers, "all": list(range(len(labels)))}[kind]
    return state[chosen].mean(0) if chosen else torch.zeros_like(state[0])


def run(base, ids, boundaries):
    """Return the logits (T, V) and the residual stream after the blocks `boundaries`, each (T, d)."""
    states = {}
    blocks = next(m for m in base.modules() if isinstance(m, torch.nn.ModuleList))
    handles = [
        blocks[s - 1].register_forward_hook(
            lambda module, args, output, s=s: states.update({s: output[0] if isinstance(output, tuple) else output})
        )
        for s in boundaries
    ]
    logits = base(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    return logits, [states[s].reshape(len(ids), -1) for s in boundaries]


@contextlib.contextmanager
def by_the_book(layers, inputs):
    """Let every site compute y = x W'ᵀ + b with W' formed, and its input at the rows that get it."""
    for layer in layers:
        layer.forward = lambda x, layer=layer: site(layer, x, inputs.get(layer.site))
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def site(layer, x, given):
    adapter, w0 = layer.adapter("default"), layer.frozen.matrix()
    factor_options, combine_options = layer.oracle_options
    factors, combine = (
        importlib.import_module(f"tests.reference.{REGISTRY.of_options(o).name}") for o in layer.oracle_options
    )
    raw = dict(adapter.factors.named_parameters()) | dict(adapter.factors.named_buffers())
    for name in adapter.factors._borrowed:
        raw |= {f"{name}.{key}": value for key, value in getattr(adapter.factors, name).named_parameters()}
    alpha = adapter.factors.scale * adapter.factors.rank
    a, b = factors.pair(factor_options, alpha, adapter.factors.rank, w0, raw)
    own = dict(adapter.combine.named_parameters())
    y = x @ combine.weight(combine_options, w0, a, b, adapter.factors.gate, own).T
    if layer.frozen.bias() is not None:
        y = y + layer.frozen.bias()
    if given is None:
        return y
    value, positions, form = given
    mask = torch.zeros(x.shape[-2], 1, dtype=x.dtype)
    mask[positions] = 1
    if form == "output":
        return y + mask * value
    # PiSSA's pair has the initial one behind the trained one
    whole, a, b = b @ a, a[: len(value)], b[:, : len(value)]
    low = mask * value if form == "additive" else mask * value * (x @ a.T)
    extra = low @ b.T
    if "lora_magnitude_vector" in own:
        extra = extra * (own["lora_magnitude_vector"] / torch.linalg.vector_norm(w0 + whole, dim=1).detach())
    return y + extra
