"""Every cell of the gradient table on this group of ranks; rank 0 prints {cell: largest relative difference} as JSON.

Each cell trains one window through the trainer's own `accumulate` and compares every parameter's gradient with that of
an explicit loss, mean cross-entropy + λ · Σ_layers mean |x1|, computed by plain torch in fp64 on the whole window; in
the cells that distill + weight · temperature² · mean KL to a Swish model. Cells with two ranks a row are compared with
the same loss, of whole rows on one rank.
"""

import itertools
import json
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))

import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import tiny_llama
from transformers import LlamaForCausalLM

from prosparse.cli import compose
from prosparse.config import Checkpointing, Distillation, FfnMemory, Loss, Speed
from prosparse.data import Batch, next_tokens
from prosparse.engine import accumulate, deepspeed_config, join_deepspeed, start_teacher, stop_engine
from prosparse.ffn import sparse_ffns, substitute
from prosparse.group import start_group
from prosparse.penalty import COUNT, MAGNITUDE, NONZERO, PenaltyContext, new_statistics
from prosparse.speed import make_ready
from prosparse.ulysses import no_sharing, row_group

FACTOR, SEQUENCES, CONTEXT = 0.7, 8, 16
HOW = Distillation(weight=0.5, temperature=2.0)


def window() -> Batch:
    """8 rows; some are padded at the end, some have labels on a part only, some hold two documents."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 300, (SEQUENCES, CONTEXT), generator=generator)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 9:] = mask[6, 4:] = False
    labels = ids.masked_fill(~mask, -100)
    labels[3, :7] = -100
    positions = torch.arange(CONTEXT).repeat(SEQUENCES, 1)
    positions[1, 9:], positions[6, 4:] = torch.arange(7), torch.arange(12)  # the padding too is one
    positions[2, 5:], labels[2, 5:8] = torch.arange(11), -100
    return Batch(ids, next_tokens(labels), mask, positions)


def tiny_teacher() -> LlamaForCausalLM:
    """Far from the student."""
    return tiny_llama(initializer_range=0.3)


def causal(batch: Batch) -> Batch:
    """The same rows, where no document's bounds are told: sdpa has no mask for rows in parts."""
    return Batch(batch.input_ids, batch.labels, batch.token_mask)


def part(batch: Batch, rows: slice) -> Batch:
    return Batch(*(None if tensor is None else tensor[rows] for tensor in vars(batch).values()))


def explicit(batch: Batch, distills: bool) -> tuple[dict[str, torch.Tensor], torch.Tensor, float]:
    """Gradients by parameter name, statistics and mean KL, from the loss written out."""
    model = tiny_llama().double()
    substitute(model, "relu")
    intermediates = []
    for ffn in sparse_ffns(model):
        ffn.down_proj.register_forward_pre_hook(lambda module, inputs: intermediates.append(inputs[0]))
    logits = model(**batch.inputs(), use_cache=False).logits
    loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
    kept = [x1[batch.token_mask] for x1 in intermediates]
    labeled, (weight, t) = batch.labels != -100, (HOW.weight, HOW.temperature)
    with torch.no_grad():
        teacher = tiny_teacher().double()(**batch.inputs(), use_cache=False).logits
    log_t, log_s = (x[labeled].div(t).log_softmax(-1) for x in (teacher, logits))
    kl = (log_t.exp() * (log_t - log_s)).sum(-1).mean()
    loss = loss + weight * t**2 * kl * distills
    (loss + FACTOR * sum(x1.abs().mean() for x1 in kept)).backward()
    statistics = torch.tensor([[x.abs().sum().item(), (x != 0).sum().item(), x.numel()] for x in kept])
    return {name: parameter.grad for name, parameter in model.named_parameters()}, statistics, kl.item()


def main() -> None:
    config = compose(
        "train", ["experiment=demo", "dtype=fp32", "device=cpu", "threads=1", f"recipe.batch.sequences={SEQUENCES}"]
    )
    rank, world, device = start_group("cpu", threads=1, seed=0)
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    join_deepspeed(device)
    windows = {1: window(), 2: causal(window())}  # by the ranks that share a row
    both = {(size, distills): explicit(windows[size], distills) for size in (1, 2) for distills in (False, True)}
    groups = {1: no_sharing()} | ({2: row_group(2)} if world == 2 else {})
    table = {}
    fast = Speed()
    slow, small = Speed(FfnMemory.stock, loss=Loss.stock, prefetch=False), Speed(FfnMemory.recompute_x1)
    cells = [(checkpointing, False, fast, size) for checkpointing in Checkpointing for size in groups]
    cells += [(Checkpointing.none, True, fast, size) for size in groups]
    cells += [(Checkpointing.none, False, speed, 1) for speed in (slow, small)]
    for stage, (checkpointing, distills, speed, size) in itertools.product((1, 2, 3), cells):
        expected, expected_statistics, kl = both[size, distills]
        group, whole = groups[size], windows[size]
        config.zero.stage, config.sequence_parallel, config.micro_batch = stage, size, SEQUENCES // group.groups
        model = tiny_llama()
        substitute(model, "relu")
        config.checkpointing, config.speed = checkpointing, speed
        make_ready(model, config, device)
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=True)
        ds_config = deepspeed_config(config, world)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config, dist_init_required=False)
        teaching = (start_teacher(tiny_teacher(), ds_config), HOW) if distills else None
        context = PenaltyContext(torch.zeros(()), new_statistics(3))
        for accumulation in (1, 2, 4):  # as between stages of a run: one engine, whose own counter must not matter
            micro = SEQUENCES // (group.groups * accumulation)
            starts = range(group.number * micro, SEQUENCES, micro * group.groups)
            parts = [part(whole, slice(i, i + micro)) for i in starts]
            result = accumulate(engine, context, parts, FACTOR, teaching=teaching, speed=speed, group=group)
            assert result.kl is None if not distills else abs(result.kl / kl - 1) < 1e-4, (result.kl, kl)
            worst = 0.0
            for name, parameter in model.named_parameters():
                gradient = safe_get_full_grad(parameter).double().reshape(expected[name].shape)
                worst = max(worst, ((gradient - expected[name]).norm() / expected[name].norm()).item())
            counts = result.statistics
            assert torch.equal(counts[:, NONZERO].long(), expected_statistics[:, NONZERO].long()), "non-zeros differ"
            assert torch.equal(counts[:, COUNT].long(), expected_statistics[:, COUNT].long()), "elements differ"
            assert torch.allclose(counts[:, MAGNITUDE], expected_statistics[:, MAGNITUDE].double(), rtol=1e-5)
            cell = f"ranks {world} ZeRO-{stage} accumulation {accumulation} checkpointing {checkpointing} {speed.ffn}"
            table[cell + " distilling" * distills + " two ranks a row" * (size - 1)] = worst
            engine.step()  # learning rate 0: only clears the gradients
        if teaching is not None and stage == 3:
            stop_engine(teaching[0].model)
        engine.destroy()
    if rank == 0:
        print("TABLE " + json.dumps(table), flush=True)
    dist.barrier()


if __name__ == "__main__":
    main()
