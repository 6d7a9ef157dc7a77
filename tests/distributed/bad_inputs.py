"""Calls of `prosparse train` in one process: argv[1] maps names to overrides; prints {name: [exit code, stderr]}."""

import io
import json
import sys
from contextlib import redirect_stderr

from prosparse.cli import main

if __name__ == "__main__":
    answers = {}
    for name, overrides in json.loads(sys.argv[1]).items():
        with redirect_stderr(io.StringIO()) as error:
            code = main(["train", *overrides])
        answers[name] = [code, error.getvalue()]
    print(json.dumps(answers))
