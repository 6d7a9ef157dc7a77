"""A sample of the fault campaign: kills, damaged files, signals, a full disk.

In: benchmarks/faults.py. Out: its verdict.
"""

import re
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.timeout(300)
def test_no_fault_of_a_sample_leads_to_wrong_state_a_hang_or_a_lost_checkpoint():
    command = [sys.executable, "benchmarks/faults.py", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=290)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    verdict = re.fullmatch(
        r"kills=(\d+) damaged=(\d+) signals=(\d+) full_disks=(\d+) wrong=0 hangs=0 lost=0", done.stdout.splitlines()[-1]
    )
    assert verdict is not None and all(int(count) > 0 for count in verdict.groups())
