"""Made-up prompts on a known number of topics."""

import random

TOPICS = (
    "planet orbit comet telescope galaxy star nebula eclipse",
    "flour oven butter recipe dough sugar bake whisk",
    "goal striker referee penalty league keeper pitch midfield",
    "violin sonata orchestra conductor melody chord tempo cello",
    "court verdict judge lawyer appeal statute witness jury",
)
SHARED = ("please", "answer", "briefly", "question", "explain", "describe")


def prompts(topics: int, each: int = 40, seed: int = 0) -> tuple[list[str], list[int]]:
    """Return shuffled prompts and the topic of each: five words of the topic, two that all topics share."""
    draw = random.Random(seed)
    rows = [
        (" ".join([*draw.choices(SHARED, k=2), *draw.choices(TOPICS[topic].split(), k=5)]), topic)
        for topic in range(topics)
        for _ in range(each)
    ]
    draw.shuffle(rows)
    return [text for text, _ in rows], [topic for _, topic in rows]
