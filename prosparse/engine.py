"""DeepSpeed around a model: its derived config, its optimizer, and one window's forward and backward.

In: a `Train` config, a model, micro-batches. Out: an engine whose gradient is that of the whole window, however it is
split over micro-batches and ranks.
"""

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from prosparse import schedule
from prosparse.config import Distillation, Dtype, Loss, Offload, Speed, Train
from prosparse.data import Batch
from prosparse.distillation import Teacher, check_head, divergence, freeze, take_head
from prosparse.ffn import set_penalty
from prosparse.group import gathered, on_any_rank, shared, summed
from prosparse.guard import watching
from prosparse.kernels.loss import summed_cross_entropy
from prosparse.offload import SUB_GROUP, align_swap, keep_gradients, swap_folder
from prosparse.penalty import PenaltyContext
from prosparse.sparsity import labeled, language_loss
from prosparse.speed import ffn_kernel
from prosparse.telemetry import redact
from prosparse.ulysses import RowGroup, no_sharing

Teaching = tuple[Teacher, Distillation]  # a teacher, and how much a stage follows it


SPEED = Speed()
BUCKET = 50_000_000  # elements of gradients that are reduced together; DeepSpeed's 5e8 holds 2 GB of them in fp32


@dataclass
class Window:
    """One global batch: mean loss and KL to the teacher, if there is one, over its labeled tokens, its non-padding
    tokens, statistics summed over the ranks."""

    loss: float
    kl: float | None
    tokens: int
    statistics: torch.Tensor  # fp64 [layers, 3], on the CPU


def accumulate(
    engine: Any,
    context: PenaltyContext,
    micro_batches: list[Batch],
    factor: float,
    poll: Callable[[], None] = lambda: None,
    teaching: Teaching | None = None,
    speed: Speed = SPEED,
    group: RowGroup | None = None,
) -> Window:
    """Forward and backward over this rank's micro-batches of one window, up to but without the last `engine.step()`.

    They lie on the CPU, so that a GPU is not waited for before its last kernel is queued. The ranks of a `group` have
    the same rows, of which each computes its stretch.
    The gradient is that of mean loss over labeled tokens + factor · Σ_layers mean |x1|, with a teacher + weight ·
    temperature² · mean KL over labeled tokens; all means are over the window of all ranks, however it is split into
    micro-batches; the engine's division by the rank count is undone here. A loss that is not finite makes the gradient
    so. `poll` is called before each micro-batch and may raise on all ranks.
    """
    from deepspeed.runtime.zero import GatheredParameters

    model, world, device = engine.module, dist.get_world_size(), context.scale.device
    group = group or no_sharing()
    micro_batches = [group.cut(whole) for whole in micro_batches]
    labels, tokens = summed(torch.tensor([_counts(b) for b in micro_batches], dtype=torch.float64).sum(0)).tolist()
    if labels == 0:
        raise shared(ValueError("a window has no labeled token: give its sources more answers, or longer rows"))
    context.scale.fill_(factor * world / tokens)
    context.statistics.zero_()
    loss_sum, kl_sum = torch.zeros(2, dtype=torch.float64, device=device)
    teacher, how = teaching or (None, Distillation())
    set_penalty(model, context, ffn_kernel(speed, device))
    with ExitStack() as stack:
        stack.callback(set_penalty, model, None)
        stack.enter_context(group.attending(model))
        for number, data in enumerate(micro_batches):
            poll()
            data = data.to(device)
            last = number == len(micro_batches) - 1
            engine.set_gradient_accumulation_boundary(last)
            context.token_mask = data.token_mask
            hidden: Any = None if teacher is None else teacher.hidden(**data.inputs())
            logits = engine(**data.inputs(), use_cache=False).logits
            if speed.loss is Loss.chunked:
                loss = summed_cross_entropy(logits, data.labels, keep_logits=teacher is not None)
            else:
                loss = language_loss(logits, data.labels)
            loss_sum += loss.detach()
            if teacher is not None:
                head = teacher.head
                with GatheredParameters(list(head.parameters())):
                    kl = divergence(logits, hidden, head.weight, head.bias, data.labels, how.temperature)
                kl_sum += kl.detach()
                loss = loss + how.weight * how.temperature**2 * kl
                del kl
            del hidden, logits  # whose memory holds their gradient, and is free once the output head has read it
            # an infinite loss can have a finite gradient, with which the step would be applied
            finite = torch.where(loss.detach().isfinite(), 1.0, torch.nan)
            engine.backward(loss * (world / labels) * finite, scale_wrt_gas=False)
            del loss  # else its graph lies beside that of the next micro-batch
            if not last:
                engine.step()
    sums = torch.cat([context.statistics.flatten(), loss_sum[None], kl_sum[None]])
    dist.all_reduce(sums)
    read = sums.cpu()  # the one moment of a window at which the host waits for a GPU
    loss_mean, kl_mean = (read[-2:] / labels).tolist()
    statistics = read[:-2].view_as(context.statistics)
    return Window(loss_mean, None if teacher is None else kl_mean, int(tokens), statistics)


@torch.no_grad()
def check_packing(model: PreTrainedModel, config: Train, group: RowGroup) -> None:
    """ValueError unless a document's logits are the same after another one in its row as at the row's start.

    Three forward passes of micro_batch short rows; all ranks call it. Where positions do not separate documents, or do
    not start anew, the difference is about that which attention to the other document makes.
    """
    length = max(1, min(8, schedule.contexts(config.recipe)[0] // 2) // group.size) * group.size
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randint(model.config.get_text_config().vocab_size, (2, length), generator=generator)
    positions = torch.arange(length).repeat(2)

    def logits(row: list[torch.Tensor], position_ids: torch.Tensor) -> torch.Tensor:
        ids, position_ids = (part.expand(config.micro_batch, -1) for part in (torch.cat(row), position_ids))
        data = group.cut(Batch(ids, ids, None, position_ids)).to(model.device)
        with group.attending(model):
            return group.whole(model(**data.inputs(), use_cache=False).logits.float())

    was_training = model.training
    model.eval()
    first = logits([one, other], positions)[:, :length]
    after = logits([other, one], positions)[:, length:]
    attended = logits([other, one], torch.arange(2 * length))[:, length:]
    model.train(was_training)
    apart = bool((after - first).norm() <= 0.1 * (attended - first).norm())  # not so with NaN
    if any(on_any_rank(not apart)):
        kind = f"{config.model.source} ({model.config.model_type}) with attention={config.attention}"
        remedy = "choose attention=sdpa or eager, else another model"
        if group.size > 1:
            kind += f", sequence_parallel={group.size}"
            remedy = "choose attention=flash_attention_2 with micro_batch=1, or sequence_parallel=1"
        raise shared(
            ValueError(
                f"{kind} and micro_batch={config.micro_batch} does not keep the documents of a row apart, which chat "
                f"sources need: {remedy}"
            )
        )


def diagnose(
    engine: Any,
    context: PenaltyContext,
    micro_batches: list[Batch],
    rows: list[range],
    factor: float,
    teaching: Teaching | None,
    speed: Speed,
    group: RowGroup | None = None,
) -> str:
    """Where the values of a window stop to be finite: rank, rows and modules, in words (all ranks call it).

    `rows` are the row numbers of each micro-batch. The engine's gradients are used up.
    """
    found: list[str] = []
    numbers, told = iter(rows), rows[0]
    with watching(engine.module) as places:

        def next_rows() -> None:
            if places:
                found.append(f"rows {told.start}-{told.stop - 1}: {', '.join(places)}")
                places.clear()

        def poll() -> None:
            nonlocal told
            next_rows()
            told = next(numbers)

        accumulate(engine, context, micro_batches, factor, poll, teaching, speed, group)
        next_rows()
    ranks = gathered(found)
    words = [f"rank {rank}, {entry}" for rank, entries in enumerate(ranks) for entry in entries[:2]]
    return "; ".join(words[:8]) or "every output and its gradient is finite, only their sum over the window is not"


def join_deepspeed(device: torch.device) -> None:
    """Let DeepSpeed use the process group, without the op that it would compile for CPU ranks.

    That op serves tensor-parallel inference only. Its build takes a minute behind a lock file that a killed process
    leaves behind, and its start spins until all ranks of the host are there, deaf to signals.
    """
    import deepspeed

    deepspeed.utils.logger.setLevel("WARNING")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", verbose=False)


def set_rate(engine: Any, rate: float, decay: float) -> None:
    """Learning rate and weight decay of the next step."""
    for group in engine.optimizer.param_groups:
        group["lr"], group["weight_decay"] = rate, decay if group["decays"] else 0.0


def start_engine(config: Train, model: PreTrainedModel, ds_config: dict) -> Any:
    """DeepSpeed's engine around `model` with AdamW."""
    import deepspeed

    if config.zero.offload is Offload.nvme:
        align_swap()
    engine, *_ = deepspeed.initialize(
        model=model.train(), optimizer=_optimizer(config, model), config=ds_config, dist_init_required=False
    )
    keep_gradients(engine)
    return engine


@torch.no_grad()
def start_teacher(model: PreTrainedModel, ds_config: dict) -> Teacher:
    """`model`, frozen, as a teacher; under ZeRO-3 partitioned, and offloaded where `ds_config` offloads parameters.

    Raises ValueError if its logits are not what its output head gives.
    """
    import deepspeed

    zero = ds_config["zero_optimization"]
    teacher = Teacher(model, freeze(model))
    if zero["stage"] == 3:
        own = {key: value for key, value in zero.items() if key != "offload_optimizer"}
        teacher.model, *_ = deepspeed.initialize(
            model=model, config=ds_config | {"zero_optimization": own}, dist_init_required=False
        )
    ids = torch.arange(2, 10, device=model.device)[None]
    logits = teacher.model(input_ids=ids, use_cache=False).logits
    take_head(model)
    with deepspeed.zero.GatheredParameters(list(teacher.head.parameters())):
        check_head(teacher, logits, ids)
    return teacher


def stop_engine(engine: Any) -> None:
    """Free the engine and give torch its own F.linear back: ZeRO-3's rounds twice where there is a bias, and stays."""
    from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses as Patched

    engine.destroy()
    torch.nn.functional.linear = getattr(Patched, "linear_bk", torch.nn.functional.linear)


def deepspeed_config(config: Train, world: int) -> dict:
    """DeepSpeed's config, derived from the typed keys; raises ValueError for a zero.extra key that contradicts one."""
    recipe, zero, size = config.recipe, config.zero, config.sequence_parallel
    if world % size != 0:
        sizes = ", ".join(str(n) for n in range(1, world + 1) if world % n == 0)
        raise ValueError(f"sequence_parallel is {size}, which does not divide the {world} ranks: choose {sizes}")
    batches = [schedule.batch_at(recipe, span.first)[0] for span in schedule.spans(recipe)]
    groups = world // size  # every stage has to divide among them
    steps = [schedule.accumulation(batch, config.micro_batch, groups) for batch in batches]
    overlap = zero.overlap_comm if zero.overlap_comm is not None else (None if zero.stage == 3 else False)
    own: dict[str, Any] = {"stage": zero.stage} | ({} if overlap is None else {"overlap_comm": overlap})
    if zero.offload is not Offload.none:
        own["offload_optimizer"] = {"device": str(zero.offload)}
    if (folder := swap_folder(config)) is not None:
        own["offload_optimizer"]["nvme_path"] = str(folder)
    if zero.offload_weights:
        own["offload_param"] = {"device": "cpu"}
    defaults = {"reduce_bucket_size": BUCKET} if zero.stage < 3 else {}
    if zero.offload is Offload.nvme:
        defaults["sub_group_size"] = SUB_GROUP
    for key in zero.extra:
        if key in ("stage", "overlap_comm"):
            raise ValueError(f"zero.extra.{key} contradicts zero.{key}: set zero.{key} instead")
        if key in ("offload_optimizer", "offload_param"):
            name = "offload" if key == "offload_optimizer" else "offload_weights"
            raise ValueError(f"zero.extra.{key} contradicts zero.{name}: set zero.{name} instead")
        if key in ("zero_hpz_partition_size", "mics_shard_size"):
            raise ValueError(f"zero.extra.{key}: a second copy of the weights, which a resume does not fill: remove it")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**own, **zero.extra)
    except ValueError as error:
        raise ValueError(f"zero.extra: {error}: see DeepSpeed's zero_optimization for its keys") from error
    return {
        "train_micro_batch_size_per_gpu": config.micro_batch,
        "gradient_accumulation_steps": steps[0],
        "bf16": {"enabled": config.dtype is Dtype.bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "gradient_clipping": recipe.optimizer.clip,
        "zero_optimization": own | defaults | zero.extra,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }


ONEDNN = "could not create a primitive"  # all that it says when memory ends; it may mean something else


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on a CPU: torch's own, or one inside oneDNN."""
    cpu = isinstance(error, RuntimeError) and any(words in str(error) for words in ("DefaultCPUAllocator", ONEDNN))
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or cpu


def less_memory(config: Train, world: int) -> str:
    """The next keys to set after a rank ran out of memory; the rows of a window and its gradient stay the same."""
    batches = [schedule.batch_at(config.recipe, span.first)[0] for span in schedule.spans(config.recipe)]
    groups = world // config.sequence_parallel
    smaller = [m for m in range(1, config.micro_batch) if all(batch % (m * groups) == 0 for batch in batches)]
    if smaller:
        return (
            f"set micro_batch={smaller[-1]} (it is {config.micro_batch}; rows and gradient of a window stay the same)"
        )
    if config.checkpointing == "none":
        return f"micro_batch is {config.micro_batch} already: set checkpointing=non_reentrant"
    if config.zero.stage < 3:
        return f"set zero=zero{config.zero.stage + 1}, or start more ranks (a checkpoint goes on with either)"
    if config.zero.offload is Offload.none:
        return "set zero=zero3_offload, or start more ranks (a checkpoint goes on with either)"
    if not config.zero.offload_weights:
        return "set zero.offload_weights=true, or start more ranks (a checkpoint goes on with either)"
    return (
        "start more ranks, more of which share a row (sequence_parallel; a checkpoint goes on with them), or shorten "
        "recipe.batch.context in a new run"
    )


def _optimizer(config: Train, model: PreTrainedModel) -> torch.optim.Optimizer:
    """AdamW; a group says whether it decays: matrices do, norms and biases do not. DeepSpeed's own where it steps in
    host memory."""
    settings = config.recipe.optimizer
    groups: tuple[list[Any], list[Any]] = ([], [])
    for parameter in model.parameters():
        dimensions = len(getattr(parameter, "ds_shape", parameter.shape))  # ds_shape: partitioned by ZeRO-3
        groups[0 if dimensions >= 2 else 1].append(parameter)
    options: list[dict] = [{"params": group, "decays": group is groups[0]} for group in groups if group]
    how: dict[str, Any] = {"lr": config.recipe.lr.peak, "betas": (settings.betas[0], settings.betas[1])}
    how |= {"eps": settings.eps, "weight_decay": settings.weight_decay}
    if config.zero.offload is Offload.none:
        return torch.optim.AdamW(options, **how, fused=True)
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    adam = DeepSpeedCPUAdam(options, **how, adamw_mode=True, fp32_optimizer_states=True)
    own = (adam.opt_id, how["lr"], *how["betas"], how["eps"], how["weight_decay"], True, False)

    def begin_anew(*_: Any) -> None:
        """Else its C++ side, where it is not new as in a resume, multiplies the powers of beta up from step to step."""
        adam.ds_opt_adam.create_adam(*own)

    adam.register_step_pre_hook(begin_anew)
    return adam


def _counts(data: Batch) -> list[int]:
    """[labeled tokens, non-padding tokens]"""
    return [labeled(data.labels), data.input_ids.numel() if data.token_mask is None else int(data.token_mask.sum())]


def plain(config: Train) -> dict:
    """The config as JSON knows it, without secrets."""
    return json.loads(redact(json.dumps(asdict(config))))
