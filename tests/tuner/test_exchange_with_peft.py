"""Adapters travel: from loraplex to a process that has only PEFT, and from PEFT to loraplex."""

import json
import re

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tests.extras import SCIPY
from tests.tuner.exchange import CASES, FIELDS, our_config, ours, stock
from tests.tuner.tiny_models import adapted, build, gradients, llama, logits, move, same, tokens

import loraplex
from loraplex import AdapterConfig, UserError

EVERY = pytest.mark.parametrize(("name", "adapter"), CASES)
TOLERANCE = {"lora": 1e-6, "dora": 2e-6}

READER = """
import json, sys, torch, warnings
from peft import PeftModel
warnings.filterwarnings("error", module="peft")
ids, folder = torch.load(sys.argv[1] + "/ids.pt"), sys.argv[1]
differences = {}
for line in open(folder + "/cases.txt"):
    name, architecture = line.split()
    base = torch.load(f"{folder}/{architecture}.pt", weights_only=False)
    model = PeftModel.from_pretrained(base, f"{folder}/{name}").eval()
    assert type(model.base_model).__name__ == "LoraModel"
    with torch.no_grad():
        found = model(input_ids=ids).logits
    differences[name] = (found - torch.load(f"{folder}/{name}/expected.pt")).abs().max().item()
assert not any(name.startswith("loraplex") for name in sys.modules)
print(json.dumps(differences))
"""


@pytest.fixture(scope="module")
def read_by_peft(tmp_path_factory, stock_python):
    """Largest difference of the logits by case, as a process without loraplex finds it; warnings of PEFT are errors."""
    folder = tmp_path_factory.mktemp("exchange")
    torch.save(tokens(), folder / "ids.pt")
    for architecture in ("llama", "qwen2", "gpt2", "bert"):
        torch.save(build(architecture), folder / f"{architecture}.pt")
    lines = []
    for name, adapter in CASES:
        model = ours(name, adapter)
        model.save_pretrained(folder / f"{name}-{adapter}")
        torch.save(logits(model), folder / f"{name}-{adapter}" / "expected.pt")
        lines.append(f"{name}-{adapter} {FIELDS[name][0]}\n")
    (folder / "cases.txt").write_text("".join(lines))
    done = stock_python.run("-c", READER, str(folder))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@EVERY
def test_a_process_without_loraplex_computes_the_same(name, adapter, read_by_peft):
    assert read_by_peft[f"{name}-{adapter}"] <= TOLERANCE[adapter]


@EVERY
def test_our_folder_reloads_bit_equal(name, adapter, tmp_path):
    model = ours(name, adapter)
    model.save_pretrained(tmp_path)
    again = loraplex.load_adapter(build(FIELDS[name][0]), str(tmp_path))
    assert torch.equal(logits(again), logits(model))
    assert same(again.state_dict(), model.state_dict())
    again.save_pretrained(tmp_path / "again")
    assert same(*(load_file(f / "adapter_model.safetensors") for f in (tmp_path, tmp_path / "again")))
    left, right = (json.loads((f / "adapter_config.json").read_text()) for f in (tmp_path, tmp_path / "again"))
    for values in (left, right):
        for key in ("target_modules", "exclude_modules"):
            if isinstance(values[key], list):
                values[key] = sorted(values[key])
    assert left == right


@EVERY
def test_folder_of_stock_peft_runs_trains_on_and_goes_back(name, adapter, tmp_path):
    """Same logits, same gradients by tensor, and what is saved again is what was read."""
    architecture = FIELDS[name][0]
    theirs = stock(name, adapter)
    theirs.save_pretrained(tmp_path)
    mine = loraplex.load_adapter(build(architecture), str(tmp_path), is_trainable=True)
    assert type(mine.base_model).__name__ == "LoraplexTuner"
    mine.eval()
    torch.testing.assert_close(logits(mine), logits(theirs), rtol=0, atol=TOLERANCE[adapter])

    assert sum(p.numel() for p in mine.parameters() if p.requires_grad) == sum(
        p.numel() for p in theirs.parameters() if p.requires_grad
    )
    if architecture != "bert":
        left, right = ({plain_key(key): value for key, value in gradients(model).items()} for model in (mine, theirs))
        assert left.keys() == right.keys()
        for key, value in right.items():
            torch.testing.assert_close(left[key], value, rtol=1e-4, atol=1e-5, msg=key)
    mine.save_pretrained(tmp_path / "back")
    read, written = (load_file(f / "adapter_model.safetensors") for f in (tmp_path, tmp_path / "back"))
    # PEFT writes the bias of a module to save twice
    assert same({key: value for key, value in read.items() if not key.endswith("modules_to_save.bias")}, written)


def plain_key(key: str) -> str:
    """A parameter's name without what differs between the two tuners."""
    for part in (".loraplex_adapters.default.factors", ".loraplex_adapters.default.combine", ".default", ".weight"):
        key = key.replace(part, "")
    return key


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"lora_bias": True}, "lora_bias"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"target_parameters": ["q_proj.weight"]}, "target_parameters"),
        ({"alora_invocation_tokens": [3, 4]}, "alora_invocation_tokens"),
        ({"use_qalora": True}, "use_qalora"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying"),
        ({"arrow_config": {"top_k": 2}}, "arrow_config"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
        # these change the frozen weights while they initialize: without that the adapter computes something else
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"init_lora_weights": "corda"}, "init_lora_weights"),
        pytest.param(
            {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "init_lora_weights", marks=SCIPY
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_cannot_be_represented_is_refused_by_name(fields, named, tmp_path):
    stock("plain", "lora").save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    base = build("llama")
    before = base.state_dict()
    with pytest.raises(UserError, match=rf"uses {named}=.*load it with peft") as caught:
        loraplex.load_adapter(base, str(tmp_path))
    assert "\n" not in str(caught.value)
    assert same(base.state_dict(), before)


@pytest.mark.parametrize("method", ["gaussian", "orthogonal", False, "eva"])
def test_initializations_that_leave_the_frozen_weights_alone_are_read(method, tmp_path):
    model = stock("plain", "lora")
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    values = {**json.loads(path.read_text()), "init_lora_weights": method}
    path.write_text(json.dumps({**values, "eva_config": {"rho": 2.0} if method == "eva" else None}))
    again = loraplex.load_adapter(build("llama"), str(tmp_path))
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-6)


def test_names_that_the_model_does_not_have_beside_ones_it_has_do_not_matter(tmp_path):
    """Stock adapters often list targets for many architectures; every tensor of the file is checked anyhow."""
    patterns = {"rank_pattern": {"c_attn": 2, "q_proj": 3}, "alpha_pattern": {"v_proj": 2}}
    names = {"target_modules": ["q_proj", "c_attn", "query"], "exclude_modules": ["vision"]}
    model = move(get_peft_model(build("llama"), LoraConfig(r=4, **names, **patterns)))
    model.eval().save_pretrained(tmp_path)
    again = loraplex.load_adapter(build("llama"), str(tmp_path))
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-6)


def test_adapter_of_another_kind_is_refused(tmp_path):
    from peft import IA3Config

    model = get_peft_model(build("llama"), IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="IA3 adapter: loraplex loads its own and PEFT's LORA"):
        loraplex.load_adapter(build("llama"), str(tmp_path))


def test_model_with_pefts_own_adapters_is_refused(tmp_path):
    model = stock("plain", "lora")
    model.save_pretrained(tmp_path)
    before = model.state_dict()
    with pytest.raises(UserError, match="PEFT's own tuner"):
        loraplex.load_adapter(model, str(tmp_path), "second")
    assert same(model.state_dict(), before)


def test_config_of_a_stock_folder(tmp_path):
    stock("both_patterns", "dora").save_pretrained(tmp_path)
    config = AdapterConfig.from_peft(str(tmp_path))
    expected = our_config("both_patterns", "dora")
    for field in ("adapter", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "lora_dropout", "bias", "task_type"):
        assert getattr(config, field) == getattr(expected, field), field
    live = adapted()
    live.base_model.close_ranks("default", "model.layers.0.mlp.up_proj", [0])
    live.save_pretrained(tmp_path / "own")
    with pytest.raises(UserError, match="only LORA adapters can be read"):
        AdapterConfig.from_peft(str(tmp_path / "own"))


def test_written_config_names_the_base_model_and_loads_as_peft_config(tmp_path):
    model = adapted()
    model.base_model.model.name_or_path = "somewhere/base"
    model.peft_config["default"].base_model_name_or_path = "somewhere/base"
    model.save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    assert type(config) is LoraConfig
    assert config.base_model_name_or_path == "somewhere/base"
    assert config.inference_mode is True
    assert config.lora_alpha == 6


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_more_than_twenty_explicit_targets_keep_their_own_rank(adapter, tmp_path):
    """PEFT rewrites long lists of targets to short suffixes, in place; ranks by full name must survive that."""
    base = llama(num_hidden_layers=4)
    sites = [name for name, module in base.named_modules() if isinstance(module, torch.nn.Linear) and "layers" in name]
    ranks = {name: 1 + index % 4 for index, name in enumerate(sites) if index % 5}
    patterns = {f"^{re.escape(name)}": rank for name, rank in ranks.items()}
    model = get_peft_model(base, AdapterConfig(adapter=adapter, r=4, target_modules=list(ranks), rank_pattern=patterns))
    assert len(ranks) > 20
    move(model).eval().save_pretrained(tmp_path)
    for again in (
        PeftModel.from_pretrained(llama(num_hidden_layers=4), tmp_path),
        loraplex.load_adapter(llama(num_hidden_layers=4), str(tmp_path)),
    ):
        torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=2e-6)
    file = load_file(tmp_path / "adapter_model.safetensors")
    start, end = "base_model.model.", ".lora_A.weight"
    found = {k.removeprefix(start).removesuffix(end): v.shape[0] for k, v in file.items() if k.endswith(end)}
    assert found == ranks
