"""What `deepspeed`, `torchrun` and `srun` start: `deepspeed launch/train.py experiment=NAME run_dir=DIR`."""

import sys

from prosparse.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
