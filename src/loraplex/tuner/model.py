"""The one tuner: PEFT injects, switches, merges and saves through it, whatever the method."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import replace
from typing import Any, ClassVar, Literal, cast

import torch
from peft import PeftConfig
from torch import Tensor, nn

from loraplex.adapters.contracts import Rate
from loraplex.allocation.sites import EDGES
from loraplex.batch_loss import objective as objective_loss
from loraplex.batch_loss import trainer as trainer_loss
from loraplex.batch_loss import trl as trl_loss
from loraplex.batch_loss.own_losses import scaled_output
from loraplex.batch_loss.packing import restore_attention
from loraplex.compat.peft import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, BaseTuner, trained_biases
from loraplex.errors import UserError, nearest
from loraplex.kernels.loss_scale import LossScale
from loraplex.objectives.contracts import Objective
from loraplex.tuner import file_tensors, objectives
from loraplex.tuner.building import build_adapter
from loraplex.tuner.config import AdapterConfig
from loraplex.tuner.layer import ADAPTERS, AdapterLayer, SiteLayer, features
from loraplex.tuner.mixed_batches import adapter_per_row
from loraplex.tuner.plans import follow_plan
from loraplex.tuner.shared import SHARED, SharedTensors
from loraplex.tuner.shortcuts.building import add_shortcuts
from loraplex.tuner.shortcuts.layers import ShortcutLayer, shortcut_layers
from loraplex.tuner.shortcuts.stream import close_streams
from loraplex.tuner.sites import find_sites, module_names, resolved_targets
from loraplex.tuner.state import AdapterState
from loraplex.tuner.transaction import all_or_nothing

RESERVED = frozenset(
    {
        *("", ADAPTERS, SHARED, "factors", "combine", "gate", "dropout", "lora_A", "lora_B", "lora_magnitude_vector"),
        *("base_model", "model", "base_layer", "weight", "bias", "__base__", "modules_to_save", "original_module"),
        *EDGES,
        *("token_adapter", "trainable_tokens_delta", "trainable_tokens_original"),
    }
)
"""Components of keys that PEFT and we write ourselves: no adapter may be called so."""


class LoraplexTuner(BaseTuner):
    """Hosts every method; `peft_config` maps adapter names to `AdapterConfig`."""

    prefix = "loraplex_"
    tuner_layer_cls = AdapterLayer
    target_module_mapping = cast(Any, TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING)

    observers: ClassVar[list[Callable[[LoraplexTuner], None]]] = []
    """Called with a tuner that has got an adapter, or is a copy of one: what acts between training steps joins here."""

    loraplex_shared: SharedTensors
    states: dict[str, AdapterState]
    """What is known of every adapter beside its config."""
    loss_scale: LossScale
    """By what the loss of the last forward pass is scaled, for adapters that add a loss of their own."""

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        # PeftModel hands over a dict; a config alone comes from paths that keep the model and throw the tuner away
        if isinstance(peft_config, AdapterConfig) and (reason := peft_config.only_peft_model):
            raise UserError(
                f"adapter {peft_config.adapter.name} needs a PeftModel, because {reason}: "
                "use get_peft_model or loraplex.load_adapter"
            )
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        assert isinstance(config, AdapterConfig)
        if not hasattr(self, SHARED):
            self.loraplex_shared, self.states, self.loss_scale = SharedTensors(), {}, LossScale()
        config = self._take_over(config, adapter_name)
        refuse_name(model, adapter_name)
        # before anything is changed: every target and pattern must match, every rank must fit
        follow_plan(model, config)
        find_sites(model, config)
        config.target_modules = resolved_targets(model, config)
        if config.seed is None:
            config.seed = int(torch.randint(2**62, ()).item())

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Inject as PEFT does; when that fails the model is as it was before."""
        config = self.peft_config[adapter_name]
        twins = [name for name, other in self.peft_config.items() if other is config and name != adapter_name]
        if adapter_name not in self.states:
            self._pre_injection_hook(self.model, config, adapter_name)
        shared = self.loraplex_shared
        with all_or_nothing(model), all_or_nothing(shared):
            flags = [(parameter, parameter.requires_grad) for parameter in shared.parameters()]
            with warnings.catch_warnings():
                # `find_sites` has checked them, and knows residual edges too
                warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match")
                super().inject_adapter(model, adapter_name, *args, **kwargs)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            self._add_shortcuts(adapter_name)
            objectives.build(self, adapter_name)
            self._refuse_names_of_tensors()
        for layer in self.adapter_layers(adapter_name):
            if twins:
                gate = layer.adapter(twins[0]).factors.gate
                layer.adapter(adapter_name).factors.gate.copy_(gate)
        self._tell()

    def _take_over(self, config: AdapterConfig, adapter_name: str) -> AdapterConfig:
        """Keep a copy of the config with a state of its own, so that whoever gave it may use it again."""
        given = {id(other): name for name, other in self.peft_config.items() if name != adapter_name}
        twin = self.states.get(given.get(id(config), ""))
        # TRL copies an adapter by its config: what is known of the ranks comes along, and is not shared
        self.states[adapter_name] = AdapterState() if twin is None else replace(twin, driven=False)
        own = copy(config)
        own.bind(self.states[adapter_name])
        self.peft_config[adapter_name] = own
        return own

    def _add_shortcuts(self, adapter_name: str) -> None:
        """Build the adapter's shortcuts: switched, trained and frozen as its other sites are by now."""
        config = self.peft_config[adapter_name]
        assert isinstance(config, AdapterConfig)
        active = list(self.active_adapters)
        for layer in add_shortcuts(self.model, config, adapter_name):
            if len(layer.loraplex_adapters) == 1:
                layer.set_adapter(active, inference_mode=config.inference_mode)
            elif adapter_name not in active or config.inference_mode:
                layer.loraplex_adapters[adapter_name].requires_grad_(False)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over the state of the original: what optimizers do for it they do for the copy."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for own in self.states.values():
            own.driven = False
        self._tell()

    def _tell(self) -> None:
        for observer in self.observers:
            observer(self)

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        assert isinstance(peft_config, AdapterConfig)
        if isinstance(target, ShortcutLayer):
            # of another adapter; an expression has matched its name
            return
        layer = target if isinstance(target, SiteLayer) else None
        if layer is None:
            if features(target) is None:
                raise UserError(
                    f"target {current_key} is a {type(target).__name__}: loraplex adapts Linear and Conv1D modules only"
                )
            layer = SiteLayer(target, current_key)
        peft_config.state.transposed |= layer.frozen.transposed
        shared = self.loraplex_shared.getter(adapter_name)
        adapter = layer.loraplex_adapters[adapter_name] = build_adapter(layer, current_key, peft_config, shared)
        if adapter.combine.adds_loss:
            adapter.combine.loss_scale = self.loss_scale
            peft_config.state.adds_loss = True
        layer._move_adapter_to_device_of_base_layer(adapter_name)
        if adapter_name not in self.active_adapters:
            layer.loraplex_adapters[adapter_name].requires_grad_(False)
            self.loraplex_shared.requires_grad([adapter_name], False)
        if layer is not target:
            layer.train(target.training)
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own also hands weights over, which no module here lacks and its wrapper of embedding rows does not take
        setattr(parent, child_name, new_module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base model, or give a trainer that reads no logits what it reads: see `batch_loss`.

        Raises:
            UserError: when an objective or an adapter cannot train in this call.
        """
        output = self._compute_output(args, kwargs)
        if self.training and torch.is_grad_enabled() and any(self._adding_losses()):
            output = scaled_output(self.loss_scale, output, kwargs)
        return output

    def _adding_losses(self) -> Iterator[bool]:
        if not any(state.adds_loss for state in self.states.values()):
            return
        for layer in self.site_layers():
            for name in layer.active_adapters:
                if name in layer.loraplex_adapters:
                    yield layer.adapter(name).combine.adds_loss

    def _compute_output(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.training and torch.is_grad_enabled():
            objective = objectives.acting(self)
            if objective is not None:
                return objective_loss.compute_output(self.model, objective, args, kwargs, self.padding_free)
        if not torch.compiler.is_compiling():
            output = None
            if trl_loss.enabled(kwargs):
                output = trl_loss.compute_output(self.model, args, kwargs, self.padding_free)
            elif self.training and torch.is_grad_enabled():
                output = trainer_loss.compute_output(self.model, args, kwargs, self.padding_free)
            if output is not None:
                return output
        return self.model(*args, **kwargs)

    @property
    def padding_free(self) -> bool | Literal["auto"]:
        """What the active adapters ask for: False where one does not want it, else True where one insists on it."""
        asked = {config.padding_free for name in self.active_adapters if (config := self.config_of(name)) is not None}
        return False if False in asked else True if True in asked else "auto"

    def config_of(self, adapter_name: str) -> AdapterConfig | None:
        """Return the config of an adapter, None where there is no such adapter."""
        config = self.peft_config.get(adapter_name)
        assert config is None or isinstance(config, AdapterConfig)
        return config

    def rates(self) -> Iterator[tuple[nn.Parameter, Rate]]:
        """Yield the parameters that do not learn as the optimizer says."""
        yield from self.rates_of_adapters()
        yield from self.rates_of_objectives()

    def rates_of_adapters(self) -> Iterator[tuple[nn.Parameter, Rate]]:
        """Yield those that LoRA+ asks for: of the factors of a site, and the vectors that are trained beside them."""
        of_vectors: Rate | None = None
        for layer in self.adapter_layers():
            for name in layer.loraplex_adapters:
                factors = layer.adapter(name).factors
                yield from factors.rates()
                of_vectors = of_vectors or factors.vector_rate()
        if of_vectors is not None:
            # as LoRA+'s code and PEFT do it: whatever has one dimension, also outside of the adapter
            for parameter in self.model.parameters():
                if parameter.requires_grad and parameter.ndim == 1:
                    yield parameter, of_vectors

    def rates_of_objectives(self) -> Iterator[tuple[nn.Parameter, Rate]]:
        """Yield those that belong to an objective."""
        for objective in self.objectives().values():
            yield from objective.rates()

    def objectives(self) -> dict[str, Objective]:
        """Return the objectives that are attached, by the names of their adapters."""
        return objectives.attached(self.loraplex_shared)

    def detach_objective(self, adapter_name: str = "default") -> None:
        """End an adapter's objective: its tensors are dropped, the loss is plain, the adapter is saved as it deploys.

        Trainers do this at the end of training by themselves.
        """
        objectives.detach(self, adapter_name)

    def site_layers(self) -> Iterator[SiteLayer]:
        """Yield the linear maps that carry adapters, in the order of the base model's modules."""
        for module in self.model.modules():
            if isinstance(module, SiteLayer):
                yield module

    def adapter_layers(self, adapter_name: str | None = None) -> Iterator[AdapterLayer]:
        """Yield all layers that carry adapters (or the named one): linear maps, then residual edges."""
        for layer in (*self.site_layers(), *shortcut_layers(self.model)):
            if adapter_name is None or adapter_name in layer.loraplex_adapters:
                yield layer

    def open_shortcuts(self, adapter_name: str) -> list[str]:
        """Return the residual edges on which an adapter has open ranks."""
        return [layer.site for layer in shortcut_layers(self.model) if layer.is_open(adapter_name)]

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        for layer in self.adapter_layers():
            layer.cast_adapter(adapter_name, autocast_adapter_dtype)
        if adapter_name in self.loraplex_shared:
            base = next(self.site_layers()).frozen.parameter().dtype
            self.loraplex_shared.cast(adapter_name, base, autocast_adapter_dtype)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make these adapters the active ones; their tensors train, unless in inference mode."""
        super().set_adapter(adapter_name, inference_mode)
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        self.loraplex_shared.activate(names, inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Switch the gradients of these adapters on or off."""
        super().set_requires_grad(adapter_names, requires_grad)
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self.loraplex_shared.requires_grad(names, requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter with all its tensors."""
        self.detach_objective(adapter_name)
        super().delete_adapter(adapter_name)
        self.loraplex_shared.drop(adapter_name)
        self.states.pop(adapter_name, None)

    def _refuse_names_of_tensors(self) -> None:
        """Refuse adapters called like a tensor of another adapter: PEFT would take that for theirs."""
        taken = set(self.loraplex_shared.key_parts())
        for layer in self.adapter_layers():
            for module in layer.loraplex_adapters.values():
                taken |= {part for key in module.state_dict() for part in key.split(".")}
        for name in taken & set(self.peft_config):
            raise UserError(f"adapter name '{name}' is part of the names of an adapter's tensors: choose another")

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge the active (or the named) adapters; nothing is touched when one of them cannot be merged."""
        self._refuse_unmergeable(adapter_names, safe_merge)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._refuse_unmergeable(adapter_names, safe_merge)
        elif any(layer.merged for layer in self.site_layers()):
            self.unmerge_adapter()  # type: ignore[no-untyped-call]
        unloaded = cast(Any, super())._unload_and_optionally_merge(
            merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )
        close_streams(unloaded)
        restore_attention(unloaded)
        for objective in self.objectives().values():
            objective.detach(unloaded)
        return unloaded

    def _refuse_unmergeable(self, adapter_names: Sequence[str] | None, safe_merge: bool) -> None:
        for name in self.active_adapters if adapter_names is None else adapter_names:
            config = self.peft_config.get(name)
            if isinstance(config, AdapterConfig) and not config.adapter.mergeable:
                raise UserError(
                    f"adapter '{name}' ({config.adapter.name}) cannot be merged into the base weights: "
                    "its weight change is not the same for every token; none was"
                )
            if opened := self.open_shortcuts(name):
                raise UserError(
                    f"adapter '{name}' cannot be merged into the base weights: {opened[0]} and its other shortcuts "
                    f"({len(opened)} in all) lie where the model has no weight; none was merged"
                )
        for layer in self.site_layers():
            if not layer.frozen.parameter().is_floating_point():
                raise UserError(f"{layer.site} is quantized: load the base model in full precision to merge into it")
            if safe_merge:
                layer.check_merge(adapter_names)

    def close_ranks(self, adapter_name: str, site: str, ranks: Sequence[int]) -> None:
        """Close ranks of one site: their part of BA becomes zero at once, shapes and optimizer state stay.

        Until `finish` is called the adapter is live, and a checkpoint carries its gates in loraplex's own type.

        Raises:
            UserError: for an unknown adapter or site, or a rank that the site does not have.
        """
        config = self.peft_config.get(adapter_name)
        if not isinstance(config, AdapterConfig):
            raise UserError(f"no adapter '{adapter_name}': there are {', '.join(self.peft_config)}")
        for layer in self.adapter_layers(adapter_name):
            if layer.site == site:
                factors = layer.adapter(adapter_name).factors
                if any(not 0 <= rank < factors.rank for rank in ranks):
                    raise UserError(f"{site} has ranks 0 to {factors.rank - 1}, not {list(ranks)}")
                factors.gate[list(ranks)] = 0
                config.state.live = True
                return
        hint = nearest(site, [layer.site for layer in self.adapter_layers(adapter_name)])
        raise UserError(f"adapter '{adapter_name}' has no site '{site}'.{hint}")

    def finish(self, adapter_name: str) -> dict[str, int]:
        """End rank changes: from now on the adapter is saved compacted. Return the final rank of every site."""
        config = self.peft_config[adapter_name]
        assert isinstance(config, AdapterConfig)
        layers = self.adapter_layers(adapter_name)
        ranks = {layer.site: layer.adapter(adapter_name).factors.open_ranks for layer in layers}
        if not any(ranks.values()):
            raise UserError(f"adapter '{adapter_name}' has no open rank left: there is nothing to save")
        config.state.finished_ranks, config.state.live = ranks, False
        config.state.other_modules = module_names(self.model)
        return ranks

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        with adapter_per_row(self, names, self.peft_config, kwargs):
            yield

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        assert isinstance(config, AdapterConfig)
        tensors = file_tensors.file_tensors(
            file_tensors.of_adapter(state_dict, adapter_name), config, adapter_name, model
        )
        biases = trained_biases(cls, model, state_dict, config)
        # those of modules_to_save are written with their modules
        tensors.update({key: value for key, value in biases.items() if ".modules_to_save." not in key})
        return tensors

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        assert isinstance(config, AdapterConfig)
        biases = trained_biases(cls, model, model.state_dict(), config)
        given = dict(state_dict)
        file_tensors.check_allocation(given.pop(file_tensors.ALLOCATION, None), config, adapter_name)
        tensors = file_tensors.model_tensors(model, adapter_name, given, biases)
        # the file decides whether ranks are closed; what had been finished before is overwritten
        config.state.live, config.state.finished_ranks = not file_tensors.gates_are_open(tensors), None
        return tensors


def tuners_in(model: nn.Module | None) -> list[LoraplexTuner]:
    """Return the tuners of ours in a model, wrapped or not; a callback may be called without one."""
    return [] if model is None else [module for module in model.modules() if isinstance(module, LoraplexTuner)]


def refuse_name(model: nn.Module, adapter_name: str) -> None:
    """Raise a UserError for an adapter name that is a component of a parameter key.

    PEFT tells the adapters apart by searching ".name." in the keys, so such a name would lose tensors in silence.
    """
    taken = {part for name, _ in model.named_modules() for part in name.split(".")}
    taken |= {part for key in model.state_dict() for part in key.split(".")}
    taken -= set(getattr(model, "peft_config", None) or {}) - {adapter_name}
    # a ModuleDict holds the adapters of a site, and their shared tensors: its own attributes cannot be names
    if adapter_name in taken | RESERVED or hasattr(SharedTensors(), adapter_name) or "." in adapter_name:
        raise UserError(f"adapter name '{adapter_name}' is part of the model's own parameter names: choose another")
