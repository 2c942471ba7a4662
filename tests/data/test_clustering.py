"""How many groups there are: found where they are known, by every method, the same ones every time."""

import collections
import random
from typing import Any, get_args

import numpy as np
import pytest
from tests.data.topics import TOPICS, prompts

from loraplex.data.clustering import Method, Partition, _decide, elbow, group_texts, inertia, silhouette
from loraplex.data.texts import text_points
from loraplex.errors import UserError

METHODS = get_args(Method)


@pytest.mark.parametrize("topics", [3, 5])
@pytest.mark.parametrize("method", METHODS)
def test_separate_topics_are_counted_and_found(method: Method, topics: int) -> None:
    texts, truth = prompts(topics)
    found = group_texts(texts, method)
    assert found.number == topics
    assert len(found.groups) == topics
    pairs = collections.Counter(
        (int(label), truth[row]) for label, row in zip(found.labels, found.points.rows, strict=True) if label >= 0
    )
    # every group is of one topic and every topic is one group; DBSCAN may leave a few texts out
    assert len(pairs) == topics
    assert sum(pairs.values()) >= 0.9 * len(texts)


def test_elbow_and_silhouette_agree_on_separate_topics() -> None:
    found = group_texts(prompts(4)[0])
    assert (found.elbow, found.best_silhouette, found.number) == (4, 4, 4)
    assert found.reason == "elbow and silhouette agree on 4"
    assert [partition.groups for partition in found.partitions] == list(range(2, 11))
    falling = [partition.inertia for partition in found.partitions]
    assert falling == sorted(falling, reverse=True)


def test_the_words_of_a_group_are_those_of_its_topic() -> None:
    found = group_texts(prompts(3)[0])
    assert sum(group.size for group in found.groups) == 120
    vocabularies = [set(topic.split()) for topic in TOPICS]
    for group in found.groups:
        assert any(set(group.words) <= vocabulary for vocabulary in vocabularies), group.words


def test_other_texts_are_in_the_group_of_their_topic() -> None:
    texts, truth = prompts(3, each=30)
    found = group_texts(texts)
    assert (found.group_of(texts) == found.labels).all()
    group_of_topic = {topic: int(label) for label, topic in zip(found.labels, truth, strict=True)}
    others, topics = prompts(3, each=10, seed=1)
    assert found.group_of(others).tolist() == [group_of_topic[topic] for topic in topics]
    assert found.group_of(["words nobody has seen"]).tolist() == [0]


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_groups(method: Method) -> None:
    texts = prompts(5, each=20)[0]
    one, other = group_texts(texts, method, seed=3), group_texts(texts, method, seed=3)
    assert one.evidence() == other.evidence()
    assert (one.labels == other.labels).all()


@pytest.mark.parametrize("method", ["kmeans", "ward"])
def test_texts_without_groups_say_so(method: Method) -> None:
    draw = random.Random(0)
    texts = [" ".join(f"word{draw.randrange(300)}" for _ in range(12)) for _ in range(300)]
    found = group_texts(texts, method)
    assert (found.number, found.elbow) == (4, None)
    assert "no groups to speak of" in found.reason


def test_the_order_of_the_rows_does_not_matter_to_the_number() -> None:
    texts = prompts(3)[0]
    assert group_texts(texts[::-1]).number == group_texts(texts).number


def test_the_range_is_kept() -> None:
    texts = prompts(5)[0]
    found = group_texts(texts, least=2, most=3)
    assert found.number in (2, 3)
    assert [partition.groups for partition in found.partitions] == [2, 3]
    assert group_texts(texts, "dbscan", least=2, most=3).number == 3


def test_inertia_and_silhouette_by_hand() -> None:
    points = np.array([[0.0, 0.0], [0.0, 2.0], [10.0, 0.0], [10.0, 2.0]])
    labels = np.array([0, 0, 1, 1])
    assert inertia(points, labels) == pytest.approx(4.0)
    near, far = 2.0, (10 + np.hypot(10, 2)) / 2
    assert silhouette(points, labels, 0) == pytest.approx((far - near) / far)
    assert silhouette(points, np.zeros(4, dtype=np.int64), 0) == 0.0


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([100, 60, 20, 18, 16, 14], 3),
        ([100, 30, 25, 20, 15, 10], 2),
        ([100, 80, 60, 40, 20, 0], None),
        ([100, 90, 78, 60, 35, 0], None),
        ([5, 5, 5, 5, 5, 5], None),
    ],
)
def test_the_elbow_is_where_the_fall_ends(values: list[float], expected: int | None) -> None:
    assert elbow(range(1, 7), values) == expected


def partitions(*silhouettes: float) -> list[Partition]:
    return [Partition(number, 0.0, value) for number, value in enumerate(silhouettes, start=2)]


@pytest.mark.parametrize(
    ("bend", "silhouettes", "number", "words"),
    [
        (3, [0.1, 0.4, 0.2, 0.1], 3, "agree on 3"),
        (3, [0.01, 0.04, 0.02, 0.01], 3, "agree on 3"),
        (None, [0.1, 0.2, 0.3, 0.2], 4, "highest at 4 (no clear elbow)"),
        (3, [0.1, 0.2, 0.3, 0.2], 4, "highest at 4 (the elbow is at 3)"),
        (3, [0.1, 0.2, 0.3, 0.4], 5, "still rises at 5, the most that was tried (see --most)"),
        (3, [0.01, 0.02, 0.03, 0.04], 3, "the elbow is at 3; no silhouette reaches 0.25"),
        (None, [0.01, 0.02, 0.03, 0.04], 4, "no clear elbow, and no silhouette reaches 0.25"),
        (None, [0.01, 0.02], 3, "as in the paper"),
    ],
)
def test_what_the_evidence_says(bend: int | None, silhouettes: list[float], number: int, words: str) -> None:
    found = partitions(*silhouettes)
    best = max(found, key=lambda partition: partition.silhouette)
    chosen, reason = _decide(bend, best, found)
    assert chosen == number
    assert words in reason


def test_words_that_every_text_has_are_no_feature() -> None:
    texts = [f"### Instruction: {text} ### Response:" for text in prompts(3)[0]]
    points = text_points(texts)
    assert not {"instruction", "response"} & set(points.words)
    assert "planet" in points.words
    assert np.linalg.norm(points.points, axis=1) == pytest.approx(1.0)


def test_more_texts_than_are_looked_at_are_sampled() -> None:
    texts = prompts(3, each=100)[0]
    points = text_points(texts, most_texts=90, seed=1)
    assert len(points) == len(set(points.rows.tolist())) == 90
    assert points.rows.max() > 200
    assert (points.rows == text_points(texts, most_texts=90, seed=1).rows).all()


@pytest.mark.parametrize(
    ("texts", "how", "message"),
    [
        (["a planet", "a star"], {}, "2 different texts among 2 are too few to tell 10 groups apart"),
        ([], {}, "0 different texts among 0 are too few"),
        (["a planet"] * 50, {}, "1 different texts among 50"),
        (["the " * n for n in range(1, 30)], {}, "have no words but stop words"),
        (
            [f"star {'and ' * n}" for n in range(1, 30)],
            {},
            "have no words but stop words and those that all of them share",
        ),
        (["planet orbit", *[f"the {'and ' * n}" for n in range(30)]], {}, "are left without stop words"),
        (
            [f"star planet orbit {'and ' * n}" for n in range(20)] + ["oven", "flour"],
            {},
            "to 3 different sets of words",
        ),
        (prompts(3)[0], {"least": 1}, "the numbers to try, 1 to 10, make no sense"),
        (prompts(3)[0], {"least": 5, "most": 4}, "the numbers to try, 5 to 4, make no sense"),
        (prompts(3)[0], {"method": "kmean"}, "Did you mean 'kmeans'?"),
    ],
)
def test_what_cannot_be_grouped(texts: list[str], how: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as raised:
        group_texts(texts, **how)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
