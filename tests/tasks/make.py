"""Writes the items of the task files beside it: opposites (multiple choice) and series (generated). Own material."""

import json
from pathlib import Path

HERE = Path(__file__).parent
OPPOSITES = """
hot cold, big small, fast slow, up down, left right, day night, black white, open closed, high low, hard soft,
wet dry, old young, rich poor, happy sad, strong weak, early late, full empty, long short, thick thin, heavy light,
deep shallow, wide narrow, clean dirty, loud quiet, sweet sour, rough smooth, sharp blunt, near far, first last,
true false, love hate, win lose, buy sell, give take, push pull, begin end, laugh cry, remember forget, arrive depart,
accept refuse, attack defend, build destroy, create erase, enter leave, float sink, freeze melt, import export,
increase decrease, lend borrow, raise lower, friend enemy, hero villain, king queen, north south, east west,
summer winter, question answer, success failure, war peace, truth lie, parent child, teacher student
"""


def opposites() -> list[dict]:
    pairs = [tuple(pair.split()) for pair in " ".join(OPPOSITES.split()).split(", ")]
    words = [word for pair in pairs for word in pair]
    items = []
    for number, (one, other) in enumerate([*pairs, *[(b, a) for a, b in pairs]]):
        wrong = [words[(7 * number + 31 * step + 5) % len(words)] for step in range(1, 12)]
        wrong = [word for word in dict.fromkeys(wrong) if word not in (one, other)][:3]
        place = number % 4
        items.append({"word": one, "choices": [*wrong[:place], other, *wrong[place:]], "label": place})
    return items


def series() -> list[dict]:
    items = []
    for first in range(1, 41):
        for step in (1, 2, 5):
            shown = [str(first + step * place) for place in range(5)]
            items.append({"shown": ", ".join(shown[:4]), "next": shown[4]})
    return items


if __name__ == "__main__":
    for name, items in (("opposites", opposites()), ("series", series())):
        (HERE / f"{name}.jsonl").write_text("".join(f"{json.dumps(item)}\n" for item in items))
