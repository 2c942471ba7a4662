"""The contract every adapter keeps once PEFT carries it, on a small Llama with biases and grouped queries."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.contract.sites import adapters, label
from transformers import LlamaConfig, LlamaForCausalLM

import loraplex
from loraplex import AdapterConfig
from loraplex.adapters.registry import SaveFormat
from loraplex.tuner.peft_format import save_peft_format


def those(chosen):
    return pytest.mark.parametrize("options", [options for options in adapters() if chosen(options)], ids=label)


EVERY = those(lambda options: True)
PEFTS_OWN = those(lambda options: options.save_format is not SaveFormat.OWN)
ONE_PAIR = those(lambda options: options.peft_format is not SaveFormat.OWN)
SEVERAL_PAIRS = those(lambda options: options.peft_format is SaveFormat.OWN)
MERGEABLE = those(lambda options: options.mergeable)
NOT_MERGEABLE = those(lambda options: not options.mergeable)


def base_model(dtype=torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1,
        vocab_size=50, attention_bias=True, mlp_bias=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def adapted(options, base=None, name="default", **fields):
    config = AdapterConfig(
        adapter=options, r=3, lora_alpha=5, target_modules="all-linear", task_type="CAUSAL_LM", seed=11, **fields
    )
    return get_peft_model(base_model() if base is None else base, config, adapter_name=name)


def perturb(model):
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture
def ids():
    return torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(1))


@EVERY
def test_identity_at_initialization(options, ids):
    base = base_model()
    expected = base(ids).logits
    assert torch.equal(adapted(options, base)(ids).logits, expected)


@EVERY
def test_saved_adapter_loads_bit_equal(options, ids, tmp_path):
    model = perturb(adapted(options))
    model.save_pretrained(tmp_path)
    again = loraplex.load_adapter(base_model(), str(tmp_path))
    assert torch.equal(again(ids).logits, model(ids).logits)
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


@PEFTS_OWN
def test_what_is_exactly_lora_loads_in_stock_peft(options, ids, tmp_path):
    model = perturb(adapted(options))
    model.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(base_model(), tmp_path)
    assert type(stock.base_model).__name__ == "LoraModel"
    torch.testing.assert_close(stock(ids).logits, model(ids).logits, rtol=0, atol=1e-6)


@SEVERAL_PAIRS
def test_what_is_not_one_pair_is_not_written_out(options, tmp_path):
    with pytest.raises(loraplex.UserError, match=r"not one pair \(A, B\) per site"):
        save_peft_format(adapted(options), tmp_path)


@ONE_PAIR
@pytest.mark.parametrize("closed", [False, True], ids=["all ranks", "closed ranks"])
def test_pairs_written_out_load_in_stock_peft(options, closed, ids, tmp_path):
    model = perturb(adapted(options, alpha_pattern={"v_proj": 2.0}))
    if closed:
        model.base_model.close_ranks("default", "model.layers.0.self_attn.q_proj", [0, 2])
        model.base_model.close_ranks("default", "model.layers.1.mlp.down_proj", [0, 1, 2])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    save_peft_format(model, tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    stock = PeftModel.from_pretrained(base_model(), tmp_path)
    assert type(stock.base_model).__name__ == "LoraModel"
    torch.testing.assert_close(stock(ids).logits, model(ids).logits, rtol=0, atol=1e-6)


@PEFTS_OWN
def test_compacted_adapter_loads_in_stock_peft(options, ids, tmp_path):
    model = perturb(adapted(options, alpha_pattern={"v_proj": 2.0}))
    model.base_model.close_ranks("default", "model.layers.0.self_attn.q_proj", [0, 2])
    model.base_model.close_ranks("default", "model.layers.1.mlp.down_proj", [0, 1, 2])
    ranks = model.base_model.finish("default")
    assert ranks["model.layers.0.self_attn.q_proj"] == 1
    assert ranks["model.layers.1.mlp.down_proj"] == 0
    model.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(base_model(), tmp_path)
    torch.testing.assert_close(stock(ids).logits, model(ids).logits, rtol=0, atol=1e-6)
    assert LoraConfig.from_pretrained(tmp_path).rank_pattern[r"^model\.layers\.0\.self_attn\.q_proj"] == 1
    assert not any("layers.1.mlp.down_proj" in key for key in stock.state_dict() if "lora_" in key)


@NOT_MERGEABLE
def test_what_cannot_be_merged_is_refused_and_unloads(options, ids):
    base = base_model()
    before = {key: value.clone() for key, value in base.state_dict().items()}
    model = perturb(adapted(options, base))
    expected = model(ids).logits
    with pytest.raises(loraplex.UserError, match=r"cannot be merged into the base weights: .*; none was"):
        model.merge_adapter()
    with pytest.raises(loraplex.UserError, match=r"cannot be merged"):
        model.merge_and_unload()
    assert torch.equal(model(ids).logits, expected)
    _check_restored(model.unload(), before)


@MERGEABLE
def test_merging_unmerging_and_unloading(options, ids):
    base = base_model()
    plain = base(ids).logits
    before = {key: value.clone() for key, value in base.state_dict().items()}
    model = perturb(adapted(options, base))
    expected = model(ids).logits
    model.merge_adapter()
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-6)
    model.unmerge_adapter()
    assert torch.equal(model(ids).logits, expected)
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, plain)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, expected, rtol=0, atol=1e-6)
    _check_restored(model.unload(), before)


def _check_restored(base, before):
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())


@EVERY
def test_config_round_trip_and_unknown_key(options, tmp_path):
    config = AdapterConfig(adapter=options, r=3, target_modules=["q_proj"], seed=4)
    config.state.live = True  # in our own type
    config.save_pretrained(str(tmp_path))
    again = AdapterConfig.from_pretrained(str(tmp_path))
    assert again.adapter == options
    assert again.to_dict() == config.to_dict()
    text = (tmp_path / "adapter_config.json").read_text().replace('"r"', '"rankk"')
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(loraplex.UserError, match="unknown key 'rankk'"):
        AdapterConfig.from_pretrained(str(tmp_path))


class Tanh(torch.nn.Module):
    """Three linears in float64 throughout: Llama's norms compute in float32, which would hide differences."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(7, 11)
        self.second = torch.nn.Linear(11, 5, bias=False)
        self.third = torch.nn.Linear(5, 9)

    def forward(self, x):
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("use_rslora", [False, True], ids=["alpha", "rslora"])
def test_forward_and_every_gradient_equal_stock_peft(use_dora, use_rslora, tmp_path):
    """On sites with and without bias, in fp64, away from initialization."""
    torch.manual_seed(2)
    base, x = Tanh().double(), torch.randn(13, 7, dtype=torch.float64)
    targets = ["first", "second", "third"]
    lora = LoraConfig(r=3, lora_alpha=5, target_modules=targets, use_dora=use_dora, use_rslora=use_rslora)
    stock = perturb(get_peft_model(copy.deepcopy(base), lora))
    stock.save_pretrained(tmp_path)
    ours = loraplex.load_adapter(base, str(tmp_path), is_trainable=True)

    def gradients(model):
        model(x).square().sum().backward()
        names = ("loraplex_adapters.default.factors.", "loraplex_adapters.default.combine.", ".default", ".weight")
        found = {}
        for key, parameter in model.named_parameters():
            for name in names:
                key = key.replace(name, "")
            if parameter.requires_grad:
                found[key] = parameter.grad
        return found

    torch.testing.assert_close(ours(x), stock(x), rtol=0, atol=1e-12)
    mine, theirs = gradients(ours), gradients(stock)
    assert mine.keys() == theirs.keys()
    assert len(mine) == (9 if use_dora else 6)
    for key, gradient in theirs.items():
        torch.testing.assert_close(mine[key], gradient, rtol=1e-10, atol=1e-11, msg=key)
