"""The bridge to lm-evaluation-harness: its numbers are ours, and its absence is one line."""

import json
from pathlib import Path

import pytest
from tests.bare import pretend_installed
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraplex.data import DataOptions, read_examples
from loraplex.errors import UserError
from loraplex.evaluation.harness import run_harness
from loraplex.evaluation.options import score_options

TASK = """\
task: tiny_local
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


def test_an_absent_harness_is_one_line(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(pretend_installed(tmp_path, "no-such-harness; extra == 'eval'"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    with pytest.raises(UserError, match=r"--lm-eval needs no-such-harness, .*pip install 'loraplex\[eval\]'"):
        run_harness(model, tokenizer, ["piqa"])


def test_the_harness_finds_what_we_find(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is an optional package")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    words = ["the", "cat", "sat", "on", "the", "mat", "and", "the", "dog", "ran", "over", "the", "hill"]
    rows = tmp_path / "rows.jsonl"
    with rows.open("w") as file:
        for number in range(30):
            choices = [words[number % 13], " ".join(words[number % 11 : number % 11 + 2])]
            row = {"question": words[number * 5 % 13], "choices": choices, "answer": number % 2}
            file.write(json.dumps(row) + "\n")
    (tmp_path / "task.yaml").write_text(TASK.format(rows=rows))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    found = run_harness(model, tokenizer, ["tiny_local"], task_folder=tmp_path)["tiny_local"]
    ours = score_options(model, tokenizer, read_examples(DataOptions(test=str(rows)), "test"))
    assert found["acc,none"] == pytest.approx(ours.accuracies("sum").overall.value)
    assert found["acc_norm,none"] == pytest.approx(ours.accuracies("characters").overall.value)
    assert found["acc_stderr,none"] > 0
    with pytest.raises(UserError, match=r"lm-eval has no task 'tiny_locl'\. Did you mean 'tiny_local'\?"):
        run_harness(model, tokenizer, ["tiny_locl"], task_folder=tmp_path)
