"""Exported folders reloaded in forks of a process that has torch and transformers imported, but not prosparse.

Stands in for `prosparse.exporters.hf.reload_in_fresh_process`, whose imports take seconds each time; the real one is in
tests/test_export.py.
"""

import ctypes
import json
import os
import runpy
import signal
import sys
from multiprocessing.connection import Client, Listener
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "prosparse" / "exporters" / "reload.py"
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def serve() -> str:
    """Fork the process that forks, which ends with this one; returns where `reload` finds it."""
    import torch  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, dynamic_module_utils  # noqa: F401

    address = f"\0prosparse-reloads-{os.getpid()}"  # in Linux's abstract namespace: nothing to remove
    listener = Listener(address)
    if os.fork():
        return address
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    while True:
        with listener.accept() as connection:
            scratch = connection.recv()
            if (pid := os.fork()) == 0:
                code = 1
                try:
                    said = os.open(f"{scratch}/said", os.O_WRONLY | os.O_CREAT)
                    os.dup2(said, 1)
                    os.dup2(said, 2)
                    dynamic_module_utils.HF_MODULES_CACHE = f"{scratch}/modules"
                    sys.argv = [str(SCRIPT), f"{scratch}/jobs.json"]
                    runpy.run_path(str(SCRIPT), run_name="__main__")
                    sys.stdout.flush()
                    code = 0
                finally:
                    os._exit(code)
            connection.send(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def reload(address: str, jobs: list[dict], scratch: Path) -> list[dict]:
    (scratch / "jobs.json").write_text(json.dumps(jobs))
    with Client(address) as connection:
        connection.send(str(scratch))
        code = connection.recv()
    said = (scratch / "said").read_text()
    if code != 0:
        raise RuntimeError(f"the export does not load in a fresh process (exit code {code}): {said}")
    return [json.loads(line) for line in said.splitlines() if line.startswith("{")]
