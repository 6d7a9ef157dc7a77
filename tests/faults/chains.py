"""Runs under fault: what they leave, in what two of them differ, how their files and disks are broken.

In: run folders. Out: answers, damage.
"""

import contextlib
import itertools
import json
import os
import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from conftest import BITWISE
from safetensors.torch import load_file

from prosparse import checkpoint, shards
from prosparse.telemetry import read_metrics

MEASURED = ("step", "model", "perplexity", "loss", "tokens", "sparsity_by_layer")


@dataclass(frozen=True)
class Kind:
    """What stays the same in a chain of faults, so that its end can be compared with an undisturbed run's."""

    ranks: int
    zero: int
    asynchronous: bool

    @property
    def how(self) -> str:
        return "asynchronous" if self.asynchronous else "synchronous"

    def __str__(self) -> str:
        return f"{self.ranks} rank{'s' * (self.ranks > 1)}, ZeRO-{self.zero}, {self.how}"


@dataclass
class Run:
    kind: Kind
    folder: Path
    announced: set[int] = field(default_factory=set)  # steps of the checkpoints that it said were saved

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(".log")

    @property
    def complete(self) -> list[int]:
        """The steps of the checkpoints that verify."""
        return sorted(int(f.name[5:]) for f in self.folder.glob("checkpoints/step-????????") if verifies(f))

    @property
    def newest(self) -> int:
        return max(self.complete, default=0)

    def __str__(self) -> str:
        return f"{self.folder.name} ({self.kind})"


# --- looking at runs --------------------------------------------------------------------------------------------------


def verifies(folder: Path) -> bool:
    try:
        checkpoint.verify(folder)
        return True
    except ValueError:
        return False


def rows_of(run: Run) -> list[dict]:
    """The metrics of training steps and evaluations without what a clock measured; without the exported model's."""
    kept = []
    for row in read_metrics(run.folder):
        if row["kind"] == "train":
            kept.append({key: row[key] for key in BITWISE})
        elif row["kind"] == "evaluation" and row["model"] != "exported":
            kept.append({key: row[key] for key in MEASURED})
    return kept


def weights_of(run: Run) -> dict[str, torch.Tensor]:
    """The master weights of the newest checkpoint."""
    folder = run.folder / "checkpoints" / f"step-{run.newest:08d}"
    manifest = checkpoint.verify(folder)
    return shards.read_weights(checkpoint.rank_files(folder, manifest), manifest["shapes"])


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def different(run: Run, undisturbed: Run, exported: bool) -> str | None:
    """In what a finished run is not bit-equal to the undisturbed one; None if it is."""
    ours, theirs = rows_of(run), rows_of(undisturbed)
    odd = next((pair for pair in itertools.zip_longest(ours, theirs) if pair[0] != pair[1]), None)
    if odd is not None:
        return f"a row is {odd[0]} and not {odd[1]}"
    if run.newest != undisturbed.newest or not equal(weights_of(run), weights_of(undisturbed)):
        return f"the weights of step {run.newest} differ"
    models = [one.folder / "model" / "model.safetensors" for one in (run, undisturbed)]
    if exported and not equal(load_file(models[0]), load_file(models[1])):
        return "model/ differs"
    return None


def messages(text: str) -> list[str]:
    """What a group said about its end."""
    begin = r"(?:ranks? \d|a rank ended|\[rank \d+\] |prosparse train: |Traceback )"
    return re.findall(rf"^{begin}.*", text, re.M)


# --- breaking files and disks -----------------------------------------------------------------------------------------


def break_file(path: Path, how: str, rng: random.Random, other: Path) -> None:
    """`other`: the checkpoint whose file of the same name replaces this one."""
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[: rng.randrange(len(content))])
    elif how == "flipped":
        place = rng.randrange(len(content))
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :])
    elif how == "deleted":
        path.unlink()
    else:
        shutil.copyfile(other / path.relative_to(path.parents[len(path.parts) - len(other.parts) - 1]), path)


def means_the_same(path: Path, before: bytes) -> bool:
    """Whether a file still says what it said; of a manifest blanks and the like do not count."""
    if not path.is_file():
        return False
    if path.name != "manifest.json":
        return path.read_bytes() == before
    try:
        return json.loads(path.read_text()) == json.loads(before)
    except ValueError:
        return False


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A tmpfs of 16 MB at `folder`; yields False, and mounts nothing, where the process may not."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    mounted = shutil.which("mount") is not None and subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path, leave: int) -> Path:
    """A file that takes the rest of the disk but for `leave` bytes."""
    path = folder / "filler"
    rest = os.statvfs(folder)
    with contextlib.suppress(OSError), open(path, "wb", buffering=0) as file:
        file.write(bytes(max(0, rest.f_bavail * rest.f_frsize - leave)))
        while leave == 0:  # until there is no room
            file.write(bytes(4096))
    return path
