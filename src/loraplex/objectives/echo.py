"""Echo-LoRA: deep states of a plain forward pass, injected into shallow adapters of a second one while training.

Paper: Peng et al., Echo-LoRA, arXiv 2605.08177. Only its abstract is known here; from it: boundary hidden states of
deeper source layers, aggregated into one vector per sample; lightweight projection and gating networks that inject it
into shallow LoRA or DoRA modules; answer-only masking, masked distillation and stochastic routing; all of it discarded
after training. Everything else, the formulas below and every default, is our formulation of that.

    pass 1   z_off, H_s = model(x);  p_s = Σ_t m_t sg(H_s,t) / Σ_t m_t  for the boundaries s
             e = RMSNorm(Σ_s softmax(ω)_s p_s);  t = SiLU(W_d e);  u_k = W_u^k t;  g_k = sigmoid(w_g^k·t + c_k)
    pass 2   z_on = model(x) with a' = a + g_k u_k, a = A_k drop(x), where an answer is predicted; y = … + s B_k a'
    loss     CE(z_off) without pass 2; with it λ_on CE(z_on) + λ_off CE(z_off) + λ_kd τ² KL(sg(z_on)/τ ‖ z_off/τ)

all means over answer tokens. Pass 2 is drawn with probability p. Trainable parameters while training, over the sites k:
d·b + Σ_k (r_k·b + b + 1) + |S| + d; afterwards none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loraplex.adapters.contracts import Rate, SiteAdapter
from loraplex.adapters.registry import REGISTRY, Axis, Capability, Method, SaveFormat
from loraplex.errors import UserError
from loraplex.kernels.distilled_head import Weights
from loraplex.models.blocks import Blocks, find_blocks
from loraplex.objectives.contracts import Batch, Means, Objective, ObjectiveInit, Outcome, SecondPass
from loraplex.objectives.echo_networks import EchoNetworks
from loraplex.objectives.echo_options import EchoOptions
from loraplex.objectives.passes import Pass, PassContext, SiteInjector, carry_through_checkpoints, stop_carrying
from loraplex.objectives.pooling import Pool
from loraplex.seeds import seeded

_OWNER = "the objective 'echo'"


@dataclass(frozen=True)
class EchoLoRA(EchoOptions):
    """Options of the objective; see `EchoOptions` for the fields."""

    def build(self, init: ObjectiveInit) -> EchoObjective:
        """Return the objective for a model with adapters, not attached yet."""
        return EchoObjective(init, self)


class EchoObjective(Objective):
    """The networks, the draws and the two passes; see the file's head."""

    def __init__(self, init: ObjectiveInit, options: EchoLoRA) -> None:
        super().__init__(init.seed)
        self.options = options
        blocks = find_blocks(init.model, init.sites)
        self.boundaries = _boundaries(options, blocks)
        self.targets = _targets(options, blocks)
        self.stage = PassContext(_OWNER)
        self.means = Means()
        self.networks: EchoNetworks | None = None
        # in lists: their owner is the base model
        self._blocks, self._model = [blocks.modules], [init.model]
        self._adapters = [{site: init.sites[site] for site in self.targets}]
        self._forced: bool | None = None
        self._seen = (0, 0)
        if options.signal != "none":
            sizes = {
                site: init.widths[site] if options.injection == "output" else init.sites[site].factors.rank
                for site in self.targets
            }
            self.networks = EchoNetworks(
                blocks.width,
                len(self.boundaries),
                sizes,
                options.bottleneck,
                options.gate_bias,
                options.injection == "multiplicative",
                init.seed,
                init.identity,
            )

    def attach(self, model: nn.Module, sites: Mapping[str, SiteAdapter]) -> None:
        """Let the sites take input, and refuse training forwards that bring none."""
        for name, adapter in sites.items():
            adapter.input = SiteInjector(self.stage, name)

    def detach(self, model: nn.Module) -> None:
        """Let go of the sites and of the checkpoint functions."""
        for module in model.modules():
            if (
                isinstance(module, SiteAdapter)
                and isinstance(module.input, SiteInjector)
                and module.input.stage is self.stage
            ):
                module.input = None
        stop_carrying(model, self.stage)

    def loss(self, batch: Batch) -> Outcome:
        """Return the loss of one pass or of two, as drawn for this step; see the file's head.

        Raises:
            UserError: when the batch has nothing to pool, nobody has said how many steps there will be, the echo of
                another sample is asked for and there is none, or an allocation has closed every target site.
        """
        weights, routed = self._weights(), self._routed(batch)
        pool = Pool.of(batch, self.options.pool)
        if pool.lacks_tokens(batch):
            raise UserError(
                f"{_OWNER} could not act: no sequence of the batch has a token to pool (pool: {self.options.pool}); "
                "mask the labels of the prompts (training.loss_on: completion)"
            )
        carry_through_checkpoints(self._model[0], self.stage)
        with contextlib.ExitStack() as plain:
            plain.enter_context(self.stage.running(Pass()))
            if routed is not None and self.options.signal in ("pooled", "another"):
                plain.enter_context(pool.collecting(self._blocks[0], self.boundaries))
            off = batch.hidden(keep=routed is not None and self.options.second_pass == "auto")
        if routed is None:
            return self._one_pass(batch, off)
        again = batch.second_pass(routed, in_full=self.options.second_pass == "full")
        self.means.add("computed_again", torch.tensor(again.tokens / len(batch.sequence)))
        with self.stage.running(self._injecting(batch, pool, again)):
            on = again.hidden()
        return self._two_passes(batch, on, off, again.chosen, weights)

    def _one_pass(self, batch: Batch, off: Tensor) -> Outcome:
        log_probs, entropy, top = batch.log_probs(off)
        self.means.add("loss_off", -log_probs)
        self.means.add("routed", torch.zeros_like(log_probs))
        return Outcome(log_probs + self._nothing(log_probs), entropy, top)

    def _two_passes(self, batch: Batch, on: Tensor, off: Tensor, chosen: Tensor, weights: Weights) -> Outcome:
        """Return the weighted loss of the rows that went through both passes, and that of the plain one for the others.

        on (k, d) belongs to the rows `chosen` (k,), off (n, d) to all.
        """
        whole = len(chosen) == len(batch.rows)
        both = batch.distilled(on, off, weights) if whole else batch.distilled(on, off[chosen], weights, chosen)
        of_rows = torch.zeros(len(batch.rows), device=off.device).index_fill(0, chosen.to(off.device), 1.0)
        self.means.add("loss_on", -both.teacher)
        self.means.add("distillation", both.divergence)
        self.means.add("routed", of_rows)
        nothing = self._nothing(both.objective)
        if whole:
            self.means.add("loss_off", -both.student)
            return Outcome(both.objective + nothing, both.entropy, both.top)
        rest = (of_rows == 0).nonzero()[:, 0]
        log_probs, entropy, top = batch.log_probs(off[rest], rest)
        self.means.add("loss_off", -torch.cat([both.student, log_probs]))
        order = torch.cat([chosen, rest]).argsort()
        return Outcome(
            torch.cat([both.objective, log_probs])[order] + nothing,
            torch.cat([both.entropy, entropy])[order],
            torch.cat([both.top, top])[order],
        )

    def _injecting(self, batch: Batch, pool: Pool, again: SecondPass) -> Pass:
        """Return the second pass: what every target gets, and where."""
        signal = self._signal(batch, pool)
        if signal is None or self.networks is None:
            return Pass(again.tokens)
        values, gates = self.networks(signal)
        self.means.add("gate", gates)
        draws = torch.rand(len(self.targets), generator=seeded(self.seed, self.step, "targets"))
        opened, least = self._open_targets(), self.options.target_dropout
        kept = [site for site, draw in zip(self.targets, draws, strict=True) if site in opened and draw >= least]
        return Pass(
            again.tokens,
            again.rows,
            batch.sequence[batch.rows[again.chosen]],
            self.options.injection,
            {site: values[site] for site in kept},
            lambda: {site: value for site, value in self._values(batch, pool).items() if site in kept},
        )

    def _open_targets(self) -> set[str]:
        """Return the targets that an allocation has not switched off.

        Raises:
            UserError: when there is none.
        """
        found = {site for site, adapter in self._adapters[0].items() if not adapter.factors.closed}
        if not found:
            raise UserError(
                f"{_OWNER} could not act: the allocation has closed all of its {len(self.targets)} target sites; set "
                "targets to blocks that stay open, or leave more ranks open"
            )
        return found

    def _values(self, batch: Batch, pool: Pool) -> dict[str, Tensor]:
        signal = self._signal(batch, pool)
        assert signal is not None
        assert self.networks is not None
        return self.networks(signal)[0]  # type: ignore[no-any-return]

    def _signal(self, batch: Batch, pool: Pool) -> Tensor | None:
        """Return what goes into the networks in place of Σ_s softmax(ω)_s p_s, (sequences, d)."""
        networks, signal = self.networks, self.options.signal
        if networks is None:
            return None
        width, like = len(networks.echo_norm), networks.echo_norm
        if signal == "zeros":
            return like.new_zeros(batch.sequences, width)
        if signal == "random":
            fixed = torch.randn(width, generator=seeded(self.seed, "fixed"), dtype=torch.float64)
            return fixed.to(like).expand(batch.sequences, width)
        pooled = pool.stacked(self.boundaries)
        if signal == "another":
            samples = batch.samples.to(pooled.device)
            if len(samples) == 1:
                raise UserError(
                    f"{_OWNER} could not act: signal is 'another', and the batch has one sequence with an answer; "
                    "train on at least 2 rows at a time, and drop an odd last one (dataloader_drop_last)"
                )
            pooled = pooled.index_copy(1, samples, pooled[:, samples.roll(1)])
        return networks.mixed(pooled)

    def _routed(self, batch: Batch) -> Tensor | None:
        """Return which sequences (sequences,) go through the second pass, None when none does.

        Draws depend on seed and step alone: all micro-batches of a step share one, or one draw goes on over all of
        their samples, so that four batches of one are one of four.
        """
        device = batch.sequence.device
        if self._forced is not None:
            return torch.ones(batch.sequences, dtype=torch.bool, device=device) if self._forced else None
        generator = seeded(self.seed, self.step, "routing")
        if self.options.routing == "step":
            routed = (torch.rand(1, generator=generator) < self.options.probability).expand(batch.sequences)
        else:
            samples = batch.samples.cpu()
            seen = self._seen[1] if self._seen[0] == self.step else 0
            self._seen = (self.step, seen + len(samples))
            drawn = torch.rand(self._seen[1], generator=generator)[seen:] < self.options.probability
            routed = torch.zeros(batch.sequences, dtype=torch.bool).index_put((samples,), drawn)
        return routed.to(device) if bool(routed.any()) else None

    def _weights(self) -> Weights:
        """Return the weights of the step: λ_kd rises over the ramp."""
        options = self.options
        ramp = options.ramp if options.probability > 0 and options.weight_distillation > 0 else 0
        if 0 < ramp < 1 and self._forced is None:
            if self.total is None:
                raise UserError(
                    f"{_OWNER} has a ramp of {ramp:g} of all steps, and nobody has said how many there will be: "
                    "train with a Trainer, or set ramp to a number of steps (0 for none)"
                )
            ramp *= self.total
        share = min(1.0, self.step / ramp) if ramp > 0 else 1.0
        return Weights(options.weight_on, options.weight_off, options.weight_distillation * share, options.temperature)

    def _nothing(self, like: Tensor) -> Tensor:
        """Return 0 that depends on every parameter of the networks: on all ranks all of them have a gradient."""
        total = like.new_zeros(())
        for parameter in self.parameters():
            if parameter.requires_grad:
                total = total + (parameter.sum() * 0).to(total)
        return total

    def rates(self) -> Iterator[tuple[nn.Parameter, Rate]]:
        """Yield the networks' parameters, which have a rate of their own and do not decay."""
        for parameter in self.parameters():
            yield parameter, Rate(peak=self.options.learning_rate, decays=False)

    def report(self) -> dict[str, float]:
        """Return the mean losses of both passes, the divergence, the gates and the share of routed positions.

        `computed_again` is the share of the tokens that second passes compute, 1 where they run in full.
        """
        return self.means.take()

    def kinds_of_steps(self) -> list[tuple[float, contextlib.AbstractContextManager[None]]]:
        """Return steps with one pass and with two, as often as they are drawn."""
        two = self.options.passes - 1
        return [(share, self._force(second)) for share, second in ((1 - two, False), (two, True)) if share > 0]

    @contextlib.contextmanager
    def _force(self, second: bool) -> Iterator[None]:
        self._forced = second
        try:
            yield
        finally:
            self._forced = None
            self.means.take()


def _boundaries(options: EchoLoRA, blocks: Blocks) -> tuple[int, ...]:
    """Return the boundaries that are pooled: boundary s is the residual stream after s blocks."""
    count = len(blocks.modules)
    if isinstance(options.sources, int):
        first = -(-2 * count // 3)
        wanted = min(options.sources, count - first + 1)
        if wanted == 1:
            return (count,)
        return tuple(first + round(i * (count - first) / (wanted - 1)) for i in range(wanted))
    if options.sources[-1] > count:
        raise UserError(
            f"sources names boundary {options.sources[-1]}, but the model has {count} blocks: the last is {count}"
        )
    return options.sources


def _targets(options: EchoLoRA, blocks: Blocks) -> tuple[str, ...]:
    """Return the sites that get the echo."""
    count = len(blocks.modules)
    wanted = tuple(range(count // 3)) if options.targets is None else options.targets
    if wanted and wanted[-1] >= count:
        raise UserError(f"targets names block {wanted[-1]}, but the model has blocks 0 to {count - 1}")
    found = tuple(site for site, block in blocks.of_site.items() if block in wanted)
    if not found:
        given = "the first third" if options.targets is None else f"targets {list(wanted)}"
        raise UserError(f"{_OWNER} has no target: no adapted module lies in {given} of {count} blocks; set targets")
    return found


REGISTRY.add(
    Method(
        name="echo",
        axis=Axis.OBJECTIVE,
        options=EchoLoRA,
        summary="deep states of a first pass injected into shallow adapters of a second, gone after training",
        paper="arXiv 2605.08177",
        parameters="0; while training d·b + Σ(r·b + b + 1) + sources + d",
        needs=frozenset({Capability.RANK_INPUT}),
        save_format=SaveFormat.OWN,
        only_peft_model="the two passes of its objective are run by PEFT's tuner",
    )
)
