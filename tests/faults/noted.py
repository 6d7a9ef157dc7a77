"""`launch/train.py` that notes what its rank came to, which launchers do not tell.

In: overrides; the folder EXIT_CODES. Out: the exit code in the file EXIT_CODES/RANK.
"""

import os
import sys
from pathlib import Path

from prosparse.cli import end, main

if __name__ == "__main__":
    code = main(["train", *sys.argv[1:]])
    Path(os.environ["EXIT_CODES"], os.environ["RANK"]).write_text(str(code))
    end(code)
