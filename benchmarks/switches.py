"""What each switch of `speed` does to a step: the default against the same with one key changed, in turns.

    python benchmarks/switches.py [ROUNDS] [OVERRIDE ...]

The overrides are those of `prosparse bench what=train`; prints a row of a table a switch: step time and peak memory of
the changed one as a multiple of the default's. Gradients, losses and L1 terms are compared first.
"""

import sys
import tempfile
from pathlib import Path

from prosparse.benchmarking import in_turns, ratio
from prosparse.cli import compose
from prosparse.training_benchmark import Arm, differences

SWITCHES = (
    "speed.ffn=save_x1",
    "speed.ffn=stock",
    "speed.loss=stock",
    "speed.norm=stock",
    "speed.compile=layers",
    "speed.freeze_gc=false",
    "checkpointing=selective",
    "checkpointing=non_reentrant",
    "+zero.extra.reduce_bucket_size=500000000",
)


def main(rounds: int = 8, *overrides: str) -> None:
    given = ["what=train", "out=.", *overrides]
    print("| changed | step time | peak memory |\n|---|---|---|")
    for switch in SWITCHES:
        with tempfile.TemporaryDirectory() as scratch:
            configs = {"default": compose("bench", given), switch: compose("bench", [*given, switch])}
            arms = {
                name: Arm("ours", config, Path(scratch) / str(number))
                for number, (name, config) in enumerate(configs.items())
            }
            for arm in arms.values():
                arm.wait()
            turns = {name: arm.turn for name, arm in arms.items()}
            in_turns(turns, 3)
            differences(*arms.values())
            seconds = in_turns(turns, rounds)
            memory = {name: arm.end()["memory_bytes"] for name, arm in arms.items()}
            for arm in arms.values():
                arm.stop()
        time = ratio(seconds[switch], seconds["default"])
        spread = f"{time['median']:.2f} ({time['low']:.2f} to {time['high']:.2f})"
        print(f"| `{switch}` | {spread} | {memory[switch] / memory['default']:.2f} |", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]), *sys.argv[2:])
