"""Zero-cost proxies by their definitions: the model is called with W0 + s·BA in the place of every adapted weight."""

from functools import partial

import torch
from torch.func import functional_call


def merged(pairs, base, absolute=False):
    """{site.weight: W0 + s·B A} with every tensor in the place of which its modulus stands when `absolute`."""
    weights = dict(base.named_parameters())
    changed = {name: weight.detach().abs() for name, weight in weights.items()} if absolute else {}
    for site, (a, b, s) in pairs.items():
        w0 = weights[f"{site}.weight"].detach()
        w0 = w0.abs() if absolute else w0
        changed[f"{site}.weight"] = w0 + s * (b @ a)
    return changed


def loss(base, pairs, batch):
    return functional_call(base, merged(pairs, base), kwargs=batch).loss


def summed_gradients(base, pairs, batches):
    total = {site: [torch.zeros_like(a), torch.zeros_like(b)] for site, (a, b, _) in pairs.items()}
    for batch in batches:
        value = loss(base, pairs, batch)
        for site, (a, b, _) in pairs.items():
            for index, gradient in enumerate(torch.autograd.grad(value, [a, b], retain_graph=True)):
                total[site][index] += gradient
    return total


def grad_norm(base, pairs, batches):
    return {site: sum(float(g.norm()) for g in found) for site, found in summed_gradients(base, pairs, batches).items()}


def mean_of_norms(base, pairs, batches):
    each = [grad_norm(base, pairs, [batch]) for batch in batches]
    return {site: sum(norms[site] for norms in each) / len(each) for site in pairs}


def snip(base, pairs, batches):
    gradients = summed_gradients(base, pairs, batches)
    return {
        site: sum(float((tensor * g).abs().sum()) for tensor, g in zip((a, b), gradients[site], strict=True))
        for site, (a, b, _) in pairs.items()
    }


def synflow(base, pairs, batches, of="logits"):
    positive = {
        site: (a.detach().abs().requires_grad_(), b.detach().abs().requires_grad_(), s)
        for site, (a, b, s) in pairs.items()
    }
    ids = batches[0]["input_ids"]
    ones = torch.ones(*ids.shape, base.config.hidden_size, dtype=torch.float64)
    batch = {**{key: value for key, value in batches[0].items() if key != "input_ids"}, "inputs_embeds": ones}
    output = functional_call(base, merged(positive, base, absolute=True), kwargs=batch)
    flow = output.logits.sum() if of == "logits" else output.loss
    scores = {}
    for site, (a, b, _) in positive.items():
        da, db = torch.autograd.grad(flow, [a, b], retain_graph=True)
        scores[site] = float((a * da).abs().sum() + (b * db).abs().sum())
    return scores


def keep(outputs, site, module, inputs, y):
    outputs[site] = y


def fisher(base, pairs, batches):
    scores, samples = dict.fromkeys(pairs, 0.0), 0
    for batch in batches:
        outputs = {}
        handles = [base.get_submodule(site).register_forward_hook(partial(keep, outputs, site)) for site in pairs]
        value = loss(base, pairs, batch)
        for handle in handles:
            handle.remove()
        samples += len(batch["input_ids"])
        for site, y in outputs.items():
            (gradient,) = torch.autograd.grad(value, [y], retain_graph=True)
            for sample in range(len(y)):
                for channel in range(y.shape[-1]):
                    product = (y[sample, :, channel] * gradient[sample, :, channel]).sum()
                    scores[site] += float(product**2) / 2
    return {site: value / samples for site, value in scores.items()}


def grasp(base, pairs, batches):
    tensors = [tensor for a, b, _ in pairs.values() for tensor in (a, b)]
    mean = sum(loss(base, pairs, batch) for batch in batches) / len(batches)
    gradients = torch.autograd.grad(mean, tensors, create_graph=True)
    product = sum((g.detach() * g).sum() for g in gradients)
    hessian_times_g = iter(torch.autograd.grad(product, tensors))
    return {
        site: -float((a * next(hessian_times_g)).sum() + (b * next(hessian_times_g)).sum())
        for site, (a, b, _) in pairs.items()
    }


def alpha_test(base, pairs, batches, tolerance):
    def mean(scaled):
        with torch.no_grad():
            return sum(float(loss(base, scaled, batch)) for batch in batches) / len(batches)

    whole, scores = mean(pairs), {}
    for site, (a, b, s) in pairs.items():
        low, high = 0, 10
        while low < high:
            middle = (low + high) // 2
            if mean({**pairs, site: (a, b, s * middle / 10)}) <= (1 + tolerance) * whole:
                high = middle
            else:
                low = middle + 1
        scores[site] = low / 10
    return scores


def ab_lora(base, pairs, batches):
    """IS by (site, rank): S(M) − S(M without r) + S(M with r alone), S = −loss."""

    def s(kept):
        with torch.no_grad():
            return -sum(float(loss(base, kept, batch)) for batch in batches) / len(batches)

    def gated(choose):
        chosen = {}
        for site, (a, b, scale) in pairs.items():
            gate = torch.tensor([float(choose(site, k)) for k in range(len(a))], dtype=a.dtype)
            chosen[site] = (a, b * gate, scale)
        return chosen

    whole = s(pairs)
    return {
        (site, k): whole
        - s(gated(lambda other, j, site=site, k=k: (other, j) != (site, k)))
        + s(gated(lambda other, j, site=site, k=k: (other, j) == (site, k)))
        for site, (a, _, _) in pairs.items()
        for k in range(len(a))
    }
