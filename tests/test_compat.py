"""Every use of what other libraries keep private or do not document: each fails here, by name, when its library moves.

Whatever else breaks then follows from it: look at the line in `loraplex/compat` that is named.
"""

import inspect
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.extras import TRL
from tests.tuner.tiny_models import adapted, llama, tokens
from torch import nn
from transformers import Trainer, TrainerCallback

from loraplex.compat import accelerate, peft, transformers
from loraplex.compat import torch as compat_torch
from loraplex.tuner.layer import AdapterLayer
from loraplex.tuner.model import LoraplexTuner

# methods of PEFT's base classes that are overridden, and so have to be called by PEFT under these names
TUNER = (
    *("_pre_injection_hook", "inject_adapter", "_create_and_replace", "_cast_adapter_dtype", "set_adapter"),
    *("set_requires_grad", "delete_adapter", "merge_adapter", "_unload_and_optionally_merge"),
    *("_enable_peft_forward_hooks", "_get_adapter_state_dict", "_remap_adapter_state_dict_for_load"),
)
LAYER = ("_move_adapter_to_device_of_base_layer", "supports_lora_conversion", "disable_adapters", "merged")


@pytest.mark.parametrize("name", TUNER)
def test_peft_calls_the_tuners_methods_by_these_names(name: str) -> None:
    # one of them is PeftModel's, which calls the tuner's
    theirs = getattr(peft.BaseTuner, name, None) or getattr(PeftModel, name)
    ours = getattr(LoraplexTuner, name)
    assert theirs is not ours
    names = [
        n for n, p in inspect.signature(theirs).parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    own = inspect.signature(ours).parameters
    free = any(p.kind is p.VAR_KEYWORD for p in own.values())
    assert [n for n in names if n not in own and not free] == []


@pytest.mark.parametrize("name", LAYER)
def test_peft_reads_the_layers_attributes_by_these_names(name: str) -> None:
    assert hasattr(peft.BaseTunerLayer, name)
    assert hasattr(AdapterLayer, name)


def test_peft_matches_patterns_as_suffixes_of_names() -> None:
    assert peft.matching_pattern({"q_proj": 1, "layers.1.k_proj": 2}, "model.layers.1.k_proj") == "layers.1.k_proj"
    assert peft.matching_pattern({"q_proj": 1}, "model.v_proj") == "model.v_proj"
    config = LoraConfig(target_modules=["q_proj"], exclude_modules=["layers.0.q_proj"])
    assert peft.is_target(config, "model.layers.1.q_proj")
    assert not peft.is_target(config, "model.layers.1.k_proj")


def test_peft_keeps_its_types_in_mappings_by_their_names() -> None:
    types = peft.config_types()
    assert types["LORA"] is LoraConfig
    assert types["LORAPLEX"].__name__ == "AdapterConfig"


def test_peft_says_which_biases_are_trained() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(3, 4)), LoraConfig(target_modules=["0"], bias="all"))
    found = peft.trained_biases(type(model.base_model), model, model.state_dict(), model.peft_config["default"])
    assert [key.rpartition(".")[2] for key in found] == ["bias"]


def test_peft_dequantizes_a_full_weight_to_itself() -> None:
    linear = nn.Linear(3, 4)
    assert torch.equal(peft.dequantize_module_weight(linear), linear.weight)


def test_peft_names_the_files_of_an_adapter(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    assert {peft.CONFIG_NAME, peft.SAFETENSORS_WEIGHTS_NAME} <= {file.name for file in tmp_path.iterdir()}


def test_transformers_keeps_the_attention_in_the_config() -> None:
    model = llama()
    for name in ("sdpa", "eager"):
        model.set_attn_implementation(name)
        assert transformers.attention_of(model.config) == name
        assert not transformers.uses_flash_attention(model.config)
    assert transformers.takes_attention_functions(model)


@pytest.mark.parametrize("reentrant", [False, True])
def test_transformers_checkpoints_a_block_by_a_function_on_it(reentrant: bool) -> None:
    model, ran = llama().train(), []
    block = model.model.layers[0]
    assert not transformers.is_checkpointed(block)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert transformers.is_checkpointed(block)
    original = transformers.checkpoint_function(block)
    assert original is not None

    def function(run, *args, **kwargs):
        ran.append(run)
        return original(run, *args, **kwargs)

    transformers.set_checkpoint_function(block, function)
    model.enable_input_require_grads()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert len(ran) == 1


def test_transformers_has_one_loss_for_causal_models() -> None:
    assert llama().loss_function is transformers.ForCausalLMLoss


def test_transformers_gives_every_trainer_its_default_callbacks(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.trainer as module

    class Ours(TrainerCallback):
        pass

    monkeypatch.setattr(module, "DEFAULT_CALLBACKS", list(module.DEFAULT_CALLBACKS))
    transformers.join_every_trainer(Ours)
    transformers.join_every_trainer(Ours)
    trainer = Trainer(llama(), module.TrainingArguments("unused", use_cpu=True, report_to=[]))
    assert [type(callback) for callback in trainer.callback_handler.callbacks].count(Ours) == 1
    batch = transformers.prepared_inputs(trainer, {"input_ids": tokens()})
    assert torch.equal(batch["input_ids"], tokens())


@TRL
def test_trl_keeps_its_heads_settings_in_the_closure_of_forward() -> None:
    from loraplex.compat import trl

    model = llama()
    assert trl.fused_head_settings(model) is None
    trl.put_fused_head(model, outputs=("log_probs", "entropy", "is_top1"))
    settings = trl.fused_head_settings(model)
    assert settings is not None
    assert set(settings["outputs"]) == {"log_probs", "entropy", "is_top1"}
    assert isinstance(getattr(model, settings["backbone_attr"]), nn.Module)
    fields = {name: torch.zeros(2) for name in ("loss", "log_probs", "entropy", "is_top1", "label_mask")}
    assert vars(trl.fused_output(**fields)).keys() >= fields.keys()


def test_accelerate_marks_what_it_dispatches_and_wraps() -> None:
    from accelerate import Accelerator, dispatch_model

    linear = nn.Sequential(nn.Linear(2, 2))
    assert not accelerate.is_dispatched(linear[0])
    dispatch_model(linear, {"0": "cpu"}, force_hooks=True)
    assert accelerate.is_dispatched(linear[0])
    made = torch.optim.SGD(nn.Linear(2, 2).parameters())
    assert accelerate.unwrapped(Accelerator(cpu=True).prepare(made)) is made
    assert accelerate.unwrapped(made) is made


def test_torch_counts_writes_in_place_and_hooks() -> None:
    tensor = torch.zeros(3)
    before = compat_torch.version_of(tensor)
    tensor.add_(1)
    assert compat_torch.version_of(tensor) == before + 1
    module = nn.Linear(2, 2)
    handles = [
        module.register_forward_hook(lambda *args: None),
        module.register_forward_pre_hook(lambda *args: None),
        module.register_full_backward_hook(lambda *args: None),
    ]
    assert compat_torch.number_of_hooks(module) == 3
    for handle in handles:
        handle.remove()
    assert compat_torch.number_of_hooks(module) == 0


def test_torch_hands_out_children_and_the_gradient_of_a_softmax() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    assert compat_torch.child_names(model) == ["0"]
    assert compat_torch.child_of(model, "0") is model[0]
    assert compat_torch.child_of(model, "absent") is None
    x, upstream = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    (expected,) = torch.autograd.grad(x.softmax(-1), x, upstream)
    found = compat_torch.softmax_backward(upstream, x.detach().softmax(-1), -1, torch.float32)
    torch.testing.assert_close(found, expected)


def test_torch_and_others_show_when_something_was_drawn() -> None:
    import random

    import numpy

    device = torch.device("cpu")
    before = compat_torch.random_states(device)
    assert compat_torch.random_states(device) == before
    for draw in (lambda: torch.rand(1), random.random, numpy.random.rand):
        draw()
        after = compat_torch.random_states(device)
        assert after != before
        before = after


def test_torch_tells_of_every_optimizers_step() -> None:
    told: list[str] = []
    handles = [
        compat_torch.register_optimizer_step_pre_hook(lambda *args: told.append("before")),
        compat_torch.register_optimizer_step_post_hook(lambda *args: told.append("after")),
    ]
    torch.optim.SGD(nn.Linear(2, 2).parameters()).step()
    for handle in handles:
        handle.remove()
    assert told == ["before", "after"]
