"""Generated answers: the same in batches as alone, stopped where they should, matched exactly or by label."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraplex.data import Example, Message
from loraplex.errors import UserError
from loraplex.evaluation.generation import LLM_ADAPTERS, Decoding, first_label, generate_texts, score_generation

PROMPTS = ["the cat", "q", "the dog ran over the hill while", "rain fell on the mat and the cat"]


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def model(tiny_model: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    torch.manual_seed(0)
    model.lm_head.weight.data.normal_(0, 0.5)
    return model


def naive_greedy(model: Any, tokenizer: Any, prompt: str, steps: int) -> list[int]:
    ids = list(tokenizer(prompt)["input_ids"])
    start = len(ids)
    for _ in range(steps):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return ids[start:]


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("pad_is_end", [False, True])
def test_greedy_answers_are_those_of_a_loop(model: Any, tokenizer: Any, batch_size: int, pad_is_end: bool) -> None:
    if pad_is_end:
        tokenizer.pad_token = tokenizer.eos_token
    examples = [Example(prompt, "x") for prompt in PROMPTS]
    texts = generate_texts(model, tokenizer, examples, Decoding(max_new_tokens=7), batch_size=batch_size)
    expected = [naive_greedy(model, tokenizer, prompt, 7) for prompt in PROMPTS]
    assert texts == tokenizer.batch_decode(expected, skip_special_tokens=True)
    assert len(set(texts)) > 1


def test_the_models_own_defaults_do_not_count(model: Any, tokenizer: Any) -> None:
    examples = [Example(prompt, "x") for prompt in PROMPTS]
    before = generate_texts(model, tokenizer, examples, Decoding(max_new_tokens=7))
    model.generation_config.update(do_sample=True, temperature=9.0, repetition_penalty=5.0, no_repeat_ngram_size=1)
    assert generate_texts(model, tokenizer, examples, Decoding(max_new_tokens=7)) == before


def test_generation_stops_at_the_end_token(model: Any, tokenizer: Any) -> None:
    whole = naive_greedy(model, tokenizer, "the cat", 7)
    assert whole[1] != whole[0]
    model.generation_config.eos_token_id = [whole[1]]
    (text,) = generate_texts(model, tokenizer, [Example("the cat", "x")], Decoding(max_new_tokens=7))
    assert text == tokenizer.decode(whole[:2], skip_special_tokens=True)


def test_a_chat_stops_where_its_template_ends_a_turn(model: Any, tokenizer: Any) -> None:
    first, second = "{{ messages[0]['content'] }}", "{{ messages[1]['content'] }}?"
    tokenizer.chat_template = first + "{% if messages|length > 1 %}" + second + "{% endif %}"
    # Makes the question mark, with which a finished turn ends here, the first thing that the model says.
    with torch.no_grad():
        hidden = model.model(input_ids=torch.tensor([tokenizer("the cat")["input_ids"]])).last_hidden_state[0, -1]
    model.lm_head.weight.data[tokenizer.convert_tokens_to_ids("?")] = 10 * hidden
    chat, text = Example((Message("user", "the cat"),), "x"), Example("the cat", "x")
    assert generate_texts(model, tokenizer, [chat], Decoding(max_new_tokens=7)) == ["?"]
    (going_on,) = generate_texts(model, tokenizer, [text], Decoding(max_new_tokens=7))
    assert going_on.startswith("?")
    assert len(going_on) > 1


def test_beam_search_finds_a_likelier_answer(model: Any, tokenizer: Any) -> None:
    def total(prompt: str, text: str) -> float:
        ids = tokenizer(prompt)["input_ids"]
        answer = tokenizer(text)["input_ids"]
        with torch.no_grad():
            steps = model(input_ids=torch.tensor([ids + answer])).logits[0].log_softmax(-1)[len(ids) - 1 : -1]
        return sum(float(step[token]) for step, token in zip(steps, answer, strict=True))

    examples = [Example(prompt, "x") for prompt in PROMPTS]
    greedy = generate_texts(model, tokenizer, examples, Decoding(1, 3))
    beams = generate_texts(model, tokenizer, examples, Decoding(8, 3))
    assert greedy != beams
    pairs = zip(PROMPTS, greedy, beams, strict=True)
    assert sum(total(prompt, beam) - total(prompt, alone) for prompt, alone, beam in pairs) > 0


def test_exact_match(model: Any, tokenizer: Any) -> None:
    right = tokenizer.decode(naive_greedy(model, tokenizer, "the cat", 7), skip_special_tokens=True)
    examples = [
        Example("the cat", f" {right}\n", task="a", source="f:1"),
        Example("the cat", right + "!", task="b", source="f:2"),
    ]
    scores = score_generation(model, tokenizer, examples, decoding=Decoding(max_new_tokens=7))
    assert [item.correct for item in scores.items] == [True, False]
    assert scores.accuracies().per_task["a"].value == 1
    assert scores.accuracies().overall.value == 0.5
    assert scores.unparsable == 0
    assert scores.records()[1]["expected"] == (right + "!").strip()


@pytest.mark.parametrize(
    ("task", "text", "label"),
    [
        ("ARC-Easy", "the correct answer is answer3", "answer3"),
        ("ARC-Easy", "answer2, not answer1", "answer2"),
        ("ARC-Easy", "Answer2", None),
        ("social_i_qa", "answer5 or answer1", "answer5"),
        ("boolq", "It is untrue, so false", "true"),
        ("piqa", "", None),
        ("winogrande", "I think\n\n### Response:\noption1", None),
        ("hellaswag", "ending4.", "ending4"),
    ],
)
def test_the_first_label_counts_case_and_all(task: str, text: str, label: str | None) -> None:
    assert first_label(Example("p", "c", task=task), text) == label


def test_labels_and_the_share_of_unparsable_answers(model: Any, tokenizer: Any) -> None:
    examples = [Example(prompt, "the correct answer is true", task="boolq") for prompt in PROMPTS]
    scores = score_generation(model, tokenizer, examples, match="labels", batch_size=2)
    # A random model writes no label at all.
    assert scores.unparsable == 1
    assert scores.accuracies().overall.value == 0
    assert {item.expected for item in scores.items} == {"true"}
    assert Decoding(num_beams=4, max_new_tokens=32) == LLM_ADAPTERS


def test_a_task_without_labels_is_refused_before_generating(model: Any, tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"^f:1: the label protocol does not know task 'bolq'\. Did you mean 'boolq'\?"):
        score_generation(model, tokenizer, [Example("a", "b", task="bolq", source="f:1")], match="labels")


def test_an_unknown_match_names_the_nearest(model: Any, tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"match 'label' is unknown.*Did you mean 'labels'\?"):
        score_generation(model, tokenizer, [], match="label")  # type: ignore[arg-type]
