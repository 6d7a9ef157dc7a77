"""The gradient does not depend on how a window is computed."""

import json

import pytest


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_gradient_equals_that_of_the_explicit_loss_in_every_cell(nursery, tmp_path, ranks):
    done = nursery.run([], ranks, tmp_path / "log", "tests/distributed/gradient_table.py")
    assert done.codes == [0] * ranks, done.text()[-6000:]
    line = next(line for line in done.text().splitlines() if "TABLE " in line)
    table = json.loads(line.partition("TABLE ")[2])
    assert len(table) == {1: 63, 2: 108}[ranks]
    assert {cell: error for cell, error in table.items() if not error < 1e-5} == {}
