"""Shortcuts along the residual stream: what they compute, when they are off, and where they have no place."""

import copy
import re

import pytest
import torch
from peft import PeftModel, get_peft_model
from tests.reference import shortcuts as reference
from tests.tuner.tiny_models import build, config, frozen_copy, llama, logits, move, same, tokens, trainable
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from transformers import (
    AutoConfig,
    AutoModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from loraplex import EchoLoRA, UserError, load_adapter
from loraplex.allocation.sites import EDGES
from loraplex.tuner.sites import find_sites

ALL = {"name": "uniform", "shortcuts": True, "shortcut_r": 3, "shortcut_alpha": 5.0}
ARCHITECTURES = ("llama", "qwen2", "gpt2", "opt", "opt-post", "bert")
REFERENCES = {
    "llama": reference.llama,
    "bert": reference.bert,
    "gpt2": reference.gpt2,
    "opt": reference.opt,
    "opt-post": reference.opt,
}


def adapted(architecture="llama", base=None, **fields):
    fields = {"allocation": ALL, **fields}
    return get_peft_model(build(architecture) if base is None else base, config(architecture, **fields)).eval()


def shortcut_factors(model, name="default"):
    """{(block, kind): factors}."""
    found = {}
    for layer in model.base_model.adapter_layers(name):
        match = re.search(rf"\.(\d+)\.({'|'.join(EDGES)})$", layer.site)
        if match:
            found[int(match[1]), match[2]] = layer.adapter(name).factors
    return found


def loss_of(model, ids):
    if model.config.architectures == ["BertForSequenceClassification"] or hasattr(model.config, "type_vocab_size"):
        return model(input_ids=ids).logits.square().sum()
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def gradients(model, ids=None):
    model.zero_grad()
    loss_of(model, tokens() if ids is None else ids).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_of_them_start_as_the_base_model_to_the_bit(architecture):
    base = build(architecture)
    expected, names = logits(base), {name for name, _ in base.named_modules()}
    model = adapted(architecture, base)
    assert set(shortcut_factors(model)) == {(i, kind) for i in (0, 1) for kind in EDGES} - {(0, "shortcut_mlp")}
    assert torch.equal(logits(model), expected)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if not architecture.startswith("opt"):
        assert torch.equal(logits(model), expected)
    assert names <= {name.replace(".base_layer", "") for name, _ in model.get_base_model().named_modules()}
    move(model.eval())
    assert (logits(model) - expected).abs().max() > 1e-2
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    unloaded = adapted(architecture, init_lora_weights=False).unload()
    assert torch.equal(logits(unloaded), expected)
    assert [name for name, _ in unloaded.named_modules()] == [name for name, _ in build(architecture).named_modules()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in unloaded.modules())


@pytest.mark.parametrize("architecture", REFERENCES)
def test_values_and_gradients_are_those_of_the_formulas(architecture):
    base = build(architecture).double()
    for name, module in list(base.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            # which computes in float32 whatever its weight is
            norm = torch.nn.RMSNorm(32, module.variance_epsilon, dtype=torch.float64)
            base.set_submodule(name, norm)
    if architecture == "llama":
        # eager attention has its softmax in float32
        base.set_attn_implementation("sdpa")
    model = adapted(architecture, copy.deepcopy(base), init_lora_weights=False).double()
    pairs, linear = {}, {}
    for place, factors in shortcut_factors(model).items():
        a, b = (part.detach().clone().requires_grad_() for part in factors.raw_pair())
        pairs[place] = (a, b, 5 / 3)
        assert factors.scale == pytest.approx(5 / 3)
    with torch.no_grad():
        for layer in model.base_model.site_layers():
            weight = base.get_submodule(layer.site).weight
            weight += layer.get_delta_weight("default")
            linear[layer.site] = layer.adapter("default").factors
    weights = {name: parameter.detach().requires_grad_() for name, parameter in base.named_parameters()}
    expected = REFERENCES[architecture](base, weights, pairs, tokens())
    found = model(input_ids=tokens()).logits
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    chosen = torch.randn(found.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (found * chosen).sum().backward()
    (expected * chosen).sum().backward()
    for place, factors in shortcut_factors(model).items():
        a, b, _ = pairs[place]
        torch.testing.assert_close(factors.lora_A.grad, a.grad, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(factors.lora_B.grad, b.grad, rtol=1e-8, atol=1e-10)
        assert a.grad.abs().max() > 1e-6
    if architecture in ("llama", "bert"):
        for site, factors in linear.items():
            # ∂/∂A of W0 + s·BA
            full = weights[f"{site}.weight"].grad
            torch.testing.assert_close(
                factors.lora_A.grad, factors.scale * factors.lora_B.detach().T @ full, rtol=1e-8, atol=1e-10
            )


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "opt-post", "bert"])
def test_gradient_checkpointing_changes_no_gradient(architecture, reentrant):
    base = build(architecture).double()
    for module in base.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model = adapted(architecture, base, init_lora_weights=False).double().train()
    model.enable_input_require_grads()
    others = tokens(seed=2)
    expected, expected_others = gradients(model), gradients(model, others)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)
    # a forward pass before the backward pass of another one
    model.zero_grad()
    first, second = loss_of(model, tokens()), loss_of(model, others)
    with torch.no_grad(), model.disable_adapter():
        model(input_ids=tokens(seed=4))
    (first + second).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            total = expected[name] + expected_others[name]
            torch.testing.assert_close(parameter.grad, total, rtol=1e-9, atol=1e-12)
    assert not any("_checkpointed" in repr(vars(m).get("_gradient_checkpointing_func")) for m in model.modules())


def test_the_edge_into_a_block_whose_predecessor_has_none():
    """Only block 1's shortcut_mlp is there: block 0 sends nevertheless."""
    names = ["model.layers.1.shortcut_mlp"]
    model = adapted(allocation={**ALL, "shortcuts": names}, init_lora_weights=False).double().train()
    assert set(shortcut_factors(model)) == {(1, "shortcut_mlp")}
    expected = gradients(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    found = gradients(model)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)


def test_other_checkpoints_stop_where_a_block_needs_the_one_before_it():
    model = adapted(init_lora_weights=False).train()
    apply_activation_checkpointing(model, check_fn=lambda module: type(module).__name__ == "LlamaDecoderLayer")
    with pytest.raises(UserError, match="block 1 has a shortcut from the block before it, which did not run before it"):
        gradients(model)
    kinds = [kind for kind in EDGES if kind != "shortcut_mlp"]
    expected, model = (
        adapted(allocation={**ALL, "shortcuts": kinds}, init_lora_weights=False).train() for _ in range(2)
    )
    apply_activation_checkpointing(model, check_fn=lambda module: type(module).__name__ == "LlamaDecoderLayer")
    found = {name.replace("_checkpoint_wrapped_module.", ""): value for name, value in gradients(model).items()}
    assert all(torch.equal(found[name], value) for name, value in gradients(expected).items())


def test_batches_without_padding_have_the_same_loss_and_gradients():
    base = llama(attn_implementation="sdpa")
    base.set_attn_implementation("sdpa")
    model = adapted(base=base, init_lora_weights=False).train()
    ids = tokens(3, 8)
    mask = (torch.arange(8) < torch.tensor([8, 5, 3])[:, None]).long()
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    found = {}
    for padding_free in (True, False):
        model.peft_config["default"].padding_free = padding_free
        for _ in range(2):
            # the tuner looks at the first batch before it computes anything itself
            model.zero_grad()
            loss = model(**batch, num_items_in_batch=13).loss
        loss.backward()
        found[padding_free] = loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    torch.testing.assert_close(found[True][0], found[False][0], rtol=1e-5, atol=1e-6)
    for name, gradient in found[False][1].items():
        assert (found[True][1][name] - gradient).abs().max() <= 1e-4 * gradient.abs().max(), name


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "opt-post"])
def test_generation_with_a_cache_is_that_without(architecture):
    model = adapted(architecture, init_lora_weights=False)
    ids, options = tokens(2, 5), {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        cached, whole = (model.generate(input_ids=ids, use_cache=use, **options) for use in (True, False))
        assert torch.equal(cached, whole)
        plain = [model(input_ids=whole[:, : 5 + i]).logits[:, -1].argmax(-1) for i in range(cached.shape[1] - 5)]
    assert torch.equal(cached[:, 5:], torch.stack(plain, dim=1))


def test_adapters_stay_float32_over_a_bfloat16_base():
    base = llama().bfloat16()
    expected = logits(base)
    model = adapted(base=base)
    assert torch.equal(logits(model), expected)
    assert {parameter.dtype for parameter in trainable(model)} == {torch.float32}
    found = logits(move(model))
    assert found.dtype is torch.bfloat16
    assert (found - expected).abs().max() > 1e-2


def test_autocast_changes_only_the_precision():
    model = adapted(init_lora_weights=False).train()
    expected = gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() < 0.25 * gradient.norm(), name


def test_several_adapters_have_their_own():
    model = adapted(init_lora_weights=False)
    model.add_adapter("other", config(allocation={"name": "uniform", "shortcuts": "residual_mlp"}, seed=8))
    model.add_adapter("without", config(allocation="uniform"))
    first = logits(model)
    model.set_adapter("other")
    assert {name for name, p in model.named_parameters() if p.requires_grad and "residual_mlp" in name} == {
        f"base_model.model.model.layers.{i}.residual_mlp.loraplex_adapters.other.factors.lora_{x}"
        for i in (0, 1)
        for x in "AB"
    }
    assert torch.equal(logits(model), logits(llama()))
    model.base_model.set_adapter(["default", "other"])
    move(model, seed=6)
    both = logits(model)
    model.set_adapter("default")
    assert not torch.equal(logits(model), both)
    model.delete_adapter("other")
    assert {name for _, name in shortcut_factors(model)} == set(EDGES)
    model.set_adapter("without")
    assert torch.equal(logits(model), logits(llama()))
    assert not torch.equal(first, logits(llama()))
    with pytest.raises(UserError, match="'default' has shortcuts, which cannot act on some rows of a batch only"):
        model(input_ids=tokens(), adapter_names=["default", "without"])
    assert torch.equal(model(input_ids=tokens(), adapter_names=["__base__", "without"]).logits, logits(llama()))


def test_a_copy_of_the_model_is_on_its_own():
    model = adapted(init_lora_weights=False)
    twin, before = copy.deepcopy(model), logits(model)
    assert torch.equal(logits(twin), before)
    with torch.no_grad():
        for factors in shortcut_factors(twin).values():
            factors.lora_B.zero_()
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(twin), before)


def test_saved_and_reloaded_to_the_bit(tmp_path):
    model = adapted(init_lora_weights=False, rank_pattern={r"layers\.1\.shortcut_block": 2, "v_proj": 1})
    assert shortcut_factors(model)[1, "shortcut_block"].rank == 2
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(load_adapter(llama(), tmp_path).eval()), logits(model))
    lean = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=True).eval()
    assert same(frozen_copy(lean), frozen_copy(model))
    torch.testing.assert_close(logits(lean), logits(model), rtol=0, atol=1e-6)
    state = frozen_copy(again)
    assert sum("shortcut_mlp" in key and "lora_A" in key for key in state) == 1


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_closed_ranks_and_edges_are_left_out_of_what_is_written(adapter, tmp_path):
    model = adapted(init_lora_weights=False, adapter=adapter)
    tuner = model.base_model
    tuner.close_ranks("default", "model.layers.0.residual_attention", range(3))
    tuner.close_ranks("default", "model.layers.1.residual_mlp", [1])
    tuner.close_ranks("default", "model.layers.1.self_attn.q_proj", range(4))
    tuner.close_ranks("default", "model.layers.1.self_attn.v_proj", [0, 2])
    tuner.finish("default")
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path).eval()
    written = again.peft_config["default"]
    assert written.allocation.moves_ranks is False
    ranks = {layer.site: layer.adapter("default").factors.rank for layer in again.base_model.adapter_layers()}
    assert "model.layers.0.residual_attention" not in ranks
    assert "model.layers.1.self_attn.q_proj" not in ranks
    assert ranks["model.layers.1.residual_mlp"] == 2
    assert ranks["model.layers.1.self_attn.v_proj"] == 2
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-6)
    assert not any("factors.gate" in key for key in _file(tmp_path))


def _file(folder):
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def test_what_is_left_without_shortcuts_is_plain_lora(tmp_path):
    model = adapted(init_lora_weights=False)
    for place in shortcut_factors(model).values():
        place.gate.zero_()
    model.peft_config["default"].state.live = True
    model.base_model.finish("default")
    model.save_pretrained(tmp_path)
    assert '"peft_type": "LORA"' in (tmp_path / "adapter_config.json").read_text()
    assert not any(kind in key for key in _file(tmp_path) for kind in EDGES)
    stock = PeftModel.from_pretrained(llama(), tmp_path).eval()
    torch.testing.assert_close(logits(stock), logits(model), rtol=0, atol=1e-5)
    merged = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), merged, rtol=0, atol=1e-5)


def test_shortcuts_alone_are_written_with_a_linear_site_that_is_off(tmp_path):
    model = adapted(init_lora_weights=False)
    for layer in model.base_model.site_layers():
        layer.adapter("default").factors.gate.zero_()
    model.base_model.finish("default")
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert len(list(again.base_model.site_layers())) == 1
    assert torch.equal(logits(again), logits(model))


def test_an_open_shortcut_is_not_merged():
    model = adapted(init_lora_weights=False)
    with pytest.raises(
        UserError, match=r"cannot be merged into the base weights: model\.layers\.0\.residual_attention"
    ):
        model.merge_and_unload()
    with pytest.raises(UserError, match="none was merged"):
        model.merge_adapter()


def test_the_list_of_sites_has_the_edges():
    sites = find_sites(build("llama"), config(allocation=ALL, layers_to_transform=[1], target_modules=["q_proj"]))
    assert [site.name for site in sites] == [
        "model.layers.1.self_attn.q_proj",
        *(f"model.layers.1.{kind}" for kind in EDGES),
    ]
    assert {site.layer for site in sites} == {1}
    assert [site.edge for site in sites] == [False, True, True, True, True]


@pytest.mark.parametrize("kind", ["gemma2", "olmo2", "mixtral", "distilbert"])
def test_blocks_are_found_by_what_they_do(kind):
    """A norm behind every branch; a sum that goes into the MLP itself; experts; an encoder with other names."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "pad_token_id": 0}
    encoder = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "vocab_size": 64}
    made = AutoConfig.for_model(kind, **(encoder if kind == "distilbert" else sizes | heads))
    base = AutoModel.from_config(made).eval()
    with torch.no_grad():
        expected = base(input_ids=tokens()).last_hidden_state
        model = get_peft_model(base, config(allocation=ALL, task_type=None, target_modules="all-linear")).eval()
        assert torch.equal(model(input_ids=tokens()).last_hidden_state, expected)
        move(model)
        moved = model(input_ids=tokens()).last_hidden_state
        for factors in shortcut_factors(model).values():
            factors.gate.zero_()
        assert not torch.equal(model(input_ids=tokens()).last_hidden_state, moved)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_an_objective_with_two_passes_and_its_own_way_through_checkpoints(reentrant):
    echo = EchoLoRA(probability=1.0, ramp=0, target_dropout=0.0)
    base = llama(num_hidden_layers=4)
    model = adapted(base=base, objective=echo, init_lora_weights=False).train()
    labels = tokens().clone()
    labels[:, :4] = -100
    twin = copy.deepcopy(model)
    twin.enable_input_require_grads()
    twin.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = []
    for each in (model, twin):
        each(input_ids=tokens(), labels=labels).loss.backward()
        found.append({name: p.grad for name, p in each.named_parameters() if p.grad is not None})
    assert sum(".shortcut_" in name or ".residual_" in name for name in found[0]) == 2 * 15
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-7)


def neox():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, num_attention_heads=4, use_parallel_residual=True)).eval()


def t5():
    return T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4))


@pytest.mark.parametrize(
    ("base", "words"),
    [
        (neox, r"no place for shortcuts in block 0 \(GPTNeoXLayer\): it does not add attention and then an MLP"),
        (t5, "the model does not run on three tokens to find it"),
    ],
)
def test_where_there_is_no_place_the_model_stays_as_it_was(base, words):
    model = base()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(UserError, match=words):
        get_peft_model(model, config(allocation=ALL, task_type=None))
    assert [name for name, _ in model.named_modules()] == names
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("allocation", "words"),
    [
        ({"name": "uniform", "shortcuts": "residual_atention"}, "choose true, or some of .*'residual_attention'"),
        ({"name": "uniform", "shortcuts": ["model.layers.7.residual_mlp"]}, r"this model does not have.*layers\.[01]"),
        ({"name": "uniform", "shortcuts": True, "shortcut_r": 0}, r"rank of the shortcuts \(shortcut_r\) is 0"),
        ({"name": "uniform", "shortcuts": True, "shortcut_alpha": -1}, "shortcut_alpha is -1"),
        ({"name": "uniform", "shortcuts": True, "shortcut_r": 33}, "rank of .* is 33, but this site allows at most 32"),
    ],
)
def test_wrong_options_are_one_sentence(allocation, words):
    with pytest.raises(UserError, match=words):
        get_peft_model(llama(), config(allocation=allocation))


def test_a_model_without_weights_can_be_counted_and_not_run():
    with torch.device("meta"):
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
        base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4))
        model = get_peft_model(base, config(allocation=ALL))
    real = adapted()
    sizes = [sum(p.numel() for n, p in m.named_parameters() if any(k in n for k in EDGES)) for m in (model, real)]
    assert sizes == [7 * 2 * 3 * 32] * 2
    with pytest.raises(UserError, match="shortcuts were made on a model without weights"):
        model(input_ids=torch.zeros(1, 3, dtype=torch.long, device="meta"))
