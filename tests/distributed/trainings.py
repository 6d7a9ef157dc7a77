"""Several trainings one after the other on one group of ranks: argv[1] is a JSON list of override lists."""

import json
import sys

from prosparse.cli import compose
from prosparse.trainer import train

if __name__ == "__main__":
    for overrides in json.loads(next(a for a in sys.argv[1:] if a.startswith("["))):
        train(compose("train", overrides))
