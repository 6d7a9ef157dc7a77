"""What `deepspeed`, `torchrun` and `srun` start: `deepspeed launch/train.py experiment=NAME run_dir=DIR`."""

import sys

from prosparse.cli import end, main

if __name__ == "__main__":
    end(main(["train", *sys.argv[1:]]))
