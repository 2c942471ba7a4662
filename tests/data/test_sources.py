"""Files, folders and benchmark sets: what is read from them, and what is said when they are broken."""

import gzip
import json
from pathlib import Path

import datasets
import pytest

from loraplex.data import DataOptions, read_examples
from loraplex.data.sources import benchmark_root, read_json
from loraplex.errors import UserError

ROWS = [{"prompt": f"p{number}", "completion": f"c{number}"} for number in range(10)]


def write(path: Path, lines: list[str]) -> str:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in lines)
    return str(path)


def read(source: str, **options: object) -> list[str]:
    examples = read_examples(DataOptions(train=source, **options), "train")  # type: ignore[arg-type]
    return [str(example.prompt) for example in examples]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.txt"])
def test_json_lines_are_read_plain_and_gzipped(tmp_path: Path, name: str) -> None:
    lines = [json.dumps(row) for row in ROWS]
    source = write(tmp_path / name, [*lines[:3], "", *lines[3:]])
    examples = read_examples(DataOptions(train=source), "train")
    assert [(example.prompt, example.completion) for example in examples] == [tuple(row.values()) for row in ROWS]
    # The empty fourth line is skipped, and counted.
    assert examples[3].source == f"{source}:5"


def test_a_json_list_is_read(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.json", [json.dumps(ROWS)])
    assert read(source) == [row["prompt"] for row in ROWS]


def test_a_sample_is_seeded_and_keeps_the_order(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [json.dumps(row) for row in ROWS])
    first, again, other = (read(source, max_train=4, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert first == sorted(first)
    assert len(first) == 4


def test_several_sources_are_read_one_after_the_other(tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", [json.dumps(ROWS[0])])
    two = write(tmp_path / "two.jsonl", [json.dumps(ROWS[1])])
    examples = read_examples(DataOptions(test=(two, one)), "test")
    assert [example.prompt for example in examples] == ["p1", "p0"]


def test_a_folder_is_read_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", [json.dumps(row) for row in ROWS])
    write(folder / "test.jsonl", [json.dumps(ROWS[5])])
    options = DataOptions(train=str(folder), test=str(folder))
    assert [example.completion for example in read_examples(options, "train")] == [row["completion"] for row in ROWS]
    (example,) = read_examples(options, "test")
    assert (example.prompt, example.source) == ("p5", f"{folder}[test]:0")
    with pytest.raises(UserError, match=r"set' \(split 'validation'\) cannot be loaded: .*validation"):
        read_examples(DataOptions(test=str(folder), test_split="validation"), "test")


def test_a_hub_id_without_network_is_one_line() -> None:
    with pytest.raises(UserError, match=r"^data set 'nobody/no-such-set' \(split 'train'\) cannot be loaded") as raised:
        read("nobody/no-such-set")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"prompt": "a", "completion": "b"}', '{"prompt": "a", '], r"rows\.jsonl:2: not JSON \(.*column 16\)"),
        (['["a", "b"]'], r'rows\.jsonl:1: a row has to be a JSON object with named fields, not \["a", "b"\]'),
        (['"text"'], r'rows\.jsonl:1: a row has to be a JSON object with named fields, not "text"'),
        ([], r"rows\.jsonl has no rows"),
        (["", "  "], r"rows\.jsonl has no rows"),
    ],
)
def test_a_broken_file_names_the_line(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        read(write(tmp_path / "rows.jsonl", lines))
    assert "\n" not in str(raised.value)


def test_a_truncated_gzip_file_is_named(tmp_path: Path) -> None:
    source = Path(write(tmp_path / "rows.jsonl.gz", [json.dumps(row) for row in ROWS * 100]))
    source.write_bytes(source.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"rows\.jsonl\.gz is not a complete gzip file"):
        read(str(source))


def test_plain_text_under_a_gzip_name_is_named(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl.gz"
    source.write_text("{}\n")
    with pytest.raises(UserError, match=r"rows\.jsonl\.gz is not a complete gzip file"):
        read(str(source))


def test_what_is_not_utf8_is_named(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_bytes('{"prompt": "é"}'.encode("latin-1"))
    with pytest.raises(UserError, match=r"rows\.jsonl is not UTF-8 text"):
        read(str(source))


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [])
    with pytest.raises(UserError, match=r"trian\.jsonl' does not exist\. Did you mean 'train\.jsonl'\?"):
        read(str(tmp_path / "trian.jsonl"))
    with pytest.raises(UserError, match=r"Its folder '.*nowhere' does not exist either"):
        read(str(tmp_path / "nowhere" / "train.jsonl"))


def test_benchmark_sets_are_found_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "glue").mkdir()
    write(tmp_path / "glue" / "train.jsonl", [json.dumps(ROWS[0])])
    monkeypatch.setenv("LORAPLEX_DATA", str(tmp_path))
    (example,) = read_examples(DataOptions(train="benchmark:glue/train.jsonl"), "train")
    # The place is what the user wrote, not where the sets happen to be.
    assert example.source == "benchmark:glue/train.jsonl:1"
    with pytest.raises(UserError, match=r"benchmark set 'glue/tran\.jsonl' is not in .*'glue/train\.jsonl'\?"):
        read("benchmark:glue/tran.jsonl")


def test_benchmark_sets_beside_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORAPLEX_DATA", raising=False)
    (tmp_path / "shared" / "data").mkdir(parents=True)
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    assert benchmark_root() == tmp_path / "shared" / "data"


def test_absent_benchmark_sets_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loraplex.data.sources.benchmark_root", lambda: None)
    with pytest.raises(UserError, match=r"there are no benchmark sets here; set LORAPLEX_DATA"):
        read("benchmark:glue/train.jsonl")


def test_rows_are_read_lazily(tmp_path: Path) -> None:
    source = Path(write(tmp_path / "rows.jsonl", [json.dumps(ROWS[0]), "broken"]))
    assert next(read_json(source, "rows.jsonl")).fields == ROWS[0]


def test_short_prompts_are_left_out_of_training_before_the_sample_is_taken(tmp_path: Path) -> None:
    rows = [{"prompt": " ".join("abcdefgh"[:words]), "completion": "x"} for words in range(1, 9)]
    source = write(tmp_path / "rows.jsonl", [json.dumps(row) for row in rows])
    assert [len(prompt.split()) for prompt in read(source, min_words=4)] == [4, 5, 6, 7, 8]
    assert all(
        len(prompt.split()) > 3 for seed in range(9) for prompt in read(source, min_words=4, max_train=2, seed=seed)
    )
    # Test rows are what they are.
    assert len(read_examples(DataOptions(test=source, min_words=4), "test")) == 8
    with pytest.raises(UserError, match="min_words 9 leaves none of the 8 rows: lower it"):
        read(source, min_words=9)
