"""Echo-LoRA's networks: from pooled boundary states to what every target site gets.

The paper's abstract (arXiv 2605.08177) says: lightweight projection and gating networks; their form is ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loraplex.adapters.contracts import uniform
from loraplex.seeds import seeded

_EPSILON = 1e-6
"""Under the root of the RMS norm."""
_GATE_STD = 0.02


class EchoNetworks(nn.Module):
    """e = RMSNorm(Σ_s softmax(ω)_s p_s), t = SiLU(W_d e), u_k = W_u^k t, g_k = sigmoid(w_g^k·t + c_k); gives g_k u_k.

    With `bounded`, g_k tanh(u_k). Trainable parameters: d·b + Σ_k (r_k·b + b + 1) + |S| + d.
    At the start ω = 0, W_u = 0, c = `gate_bias`, so g u = 0.
    The sites lie one after the other in one matrix each for W_u and w_g.
    """

    def __init__(
        self,
        width: int,
        sources: int,
        sizes: Mapping[str, int],
        bottleneck: int,
        gate_bias: float,
        bounded: bool,
        seed: int,
        identity: bool,
    ) -> None:
        super().__init__()
        self.sizes, self.bounded = dict(sizes), bounded
        generator = seeded(seed, "networks")
        total, sites = sum(self.sizes.values()), len(self.sizes)
        self.echo_mix = nn.Parameter(torch.zeros(sources))
        self.echo_norm = nn.Parameter(torch.ones(width))
        self.echo_trunk = nn.Parameter(uniform((bottleneck, width), 1 / math.sqrt(width), generator))
        start = torch.zeros(total, bottleneck)
        gates = uniform((sites, bottleneck), _GATE_STD * math.sqrt(3), generator)
        self.echo_up = nn.Parameter(start if identity else uniform((total, bottleneck), 1.0, generator))
        self.echo_gate = nn.Parameter(gates)
        self.echo_gate_bias = nn.Parameter(torch.full((sites,), float(gate_bias)))

    def mixed(self, pooled: Tensor) -> Tensor:
        """Return Σ_s softmax(ω)_s p_s (samples, d) of p (sources, samples, d), in the networks' dtype.

        Not as a matrix product, which autocast would round: squares of large states leave float16.
        """
        pooled = pooled.to(self.echo_mix.device, self.echo_mix.dtype)
        return (torch.softmax(self.echo_mix, 0)[:, None, None] * pooled).sum(0)

    def forward(self, mixed: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Return g_k u_k (samples, r_k) by site, and the gates (samples, sites), for mixed states (samples, d)."""
        with torch.autocast(mixed.device.type, enabled=False):
            rms = (mixed.square().mean(1, keepdim=True) + _EPSILON).rsqrt()
            trunk = F.silu(F.linear(mixed * rms * self.echo_norm, self.echo_trunk))
            gates = torch.sigmoid(F.linear(trunk, self.echo_gate, self.echo_gate_bias))
            sizes = torch.tensor(list(self.sizes.values()), device=gates.device)
            up = F.linear(trunk, self.echo_up)
            values = (up.tanh() if self.bounded else up) * gates.repeat_interleave(
                sizes, 1, output_size=len(self.echo_up)
            )
            return dict(zip(self.sizes, values.split(list(self.sizes.values()), 1), strict=True)), gates
