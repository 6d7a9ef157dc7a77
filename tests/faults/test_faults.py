"""A sample of the fault campaign: kills, damaged files, signals, a full disk.

In: benchmarks/faults.py. Out: its verdict.
"""

import random

import pytest
from conftest import script


@pytest.mark.timeout(300)
def test_no_fault_of_a_sample_leads_to_wrong_state_a_hang_or_a_lost_checkpoint(nursery, tmp_path):
    faults = script("faults")
    campaign = faults.Campaign(tmp_path, nursery, random.Random(0), faults.QUICK)
    campaign.run()
    counts = campaign.book.counts
    assert not any(counts[name] for name in ("wrong", "hangs", "lost")), campaign.book.table()
    assert all(counts[name] > 0 for name in ("kills", "damaged", "signals", "full_disks"))
