"""How two ways of computing the same are compared: in turns, so that what else the machine does meets both.

In: the arms, each a function that gives its seconds. Out: seconds by round, and their ratio with its spread.
"""

from collections.abc import Callable
from statistics import median


def in_turns(
    arms: dict[str, Callable[[], float]], rounds: int, progress: Callable[[int, int], None] | None = None
) -> dict[str, list[float]]:
    """Seconds of every arm by round; a round calls each arm once, and begins with another one than the round before."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    for number in range(rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            seconds[name].append(arms[name]())
        if progress is not None:
            progress(number + 1, rounds)
    return seconds


def ratio(ours: list[float], rival: list[float]) -> dict:
    """Median, smallest and largest of ours / rival over the rounds."""
    ratios = [a / b for a, b in zip(ours, rival, strict=True)]
    return {"median": median(ratios), "low": min(ratios), "high": max(ratios)}
