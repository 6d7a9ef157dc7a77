"""Small run folders and results of other verbs, as a training and `prosparse measure` write them."""

import json
from pathlib import Path

import yaml

from prosparse.telemetry import Metrics

SOURCE = "org/base"
A_TASK = {
    "metrics": {"acc": 0.3125, "acc_stderr": None},
    "shots": 5,
    "samples": 1200,
    "sparsity": 0.7,
    "tokens": 9,
    "seconds": 1.0,
}
STAGES = ("substitution", "rise", "settle")


def model(perplexity, sparsity, tokens=32768):
    by_layer = [sparsity - 0.05, sparsity + 0.05]
    return {"perplexity": perplexity, "sparsity": sparsity, "sparsity_by_layer": by_layer, "tokens": tokens}


def a_config(name, control, seed=0, path="stdlib"):
    stages = {stage: {"steps": 4, "l1": {"shape": "sine", "factor": 0.5, "sparsity": None}} for stage in STAGES}
    return {
        "run_dir": f"runs/{name}",
        "model": {"source": SOURCE},
        "recipe": {
            "activation": {"name": "relu", "threshold": 0.0},
            "stages": stages,
            "batch": {"sequences": 4, "context": 256},
            "lr": {"schedule": "cosine", "peak": 3e-4},
            "penalty": {"unit": "mean", "micro_batch_sequences": None},
            "control": control,
        },
        "data": {"sources": {"code": {"path": path}}, "cache": "anywhere"},
        "seed": seed,
        "dtype": "bf16",
    }


def a_report(control="none", tokens=12288, digest="a"):
    sweep = [(0.02, 0.74, 20.2), (0.01, 0.72, 20.1), (0.08, 0.9, float("inf"))]
    sparse = control == "none"
    models = {"base": model(20.0, 0.05)}
    models |= {"substituted": model(4000.0, 0.5)} if sparse else {}
    models |= {"trained": model(21.0, 0.712) if sparse else model(16.0, 0.05)}
    models |= {"shifted": model(22.0, 0.7345), "exported": model(22.0, 0.7345)} if sparse else {}
    shift = {"threshold": 0.02, "budget": 0.01, "tokens": 8160}
    files = ["chat_template.jinja", "model.safetensors", "modeling_sparsellama.py"]
    export = {"format": "hf", "out": "model", "activation": "fatrelu", "param": 0.02, "dtype": "bfloat16"}
    return {
        "models": models,
        "tokens_trained": tokens,
        "steps": 12,
        "seconds": 490.2,
        "text": "stdlib, held out",
        "device": "2 CPU ranks",
        "dtype": "bf16",
        "command": "prosparse train experiment=demo",
        "notes": ["made for a test"],
        "control": control,
        "rows_digest": {"256": digest},
        "versions": {"prosparse": "0.1.0"},
        "shift": shift | {"sweep": [{"threshold": t, "sparsity": s, "perplexity": p} for t, s, p in sweep]},
        "export": export | {"files": files},
    } | ({} if sparse else {"shift": None, "export": export | {"activation": "silu", "param": 0.0, "files": files}})


def a_run(folder: Path, control="none", tokens=12288, digest="a", ended=True, **config) -> Path:
    """A run of 12 steps in `folder`, which is evaluated before the first and after the last step."""
    metrics, report = Metrics(folder, -1), a_report(control, tokens, digest)
    (folder / "config.yaml").write_text(yaml.safe_dump(a_config(folder.name, control, **config), sort_keys=False))
    for name in ("base", "substituted"):
        if name in report["models"]:
            row = {"kind": "evaluation", "model": name, "step": 0, "loss": 3.5}
            metrics.append(row | report["models"][name])
    for step in range(1, 13):
        row = {"kind": "train", "step": step, "stage": STAGES[(step - 1) // 4], "tokens": step * tokens // 12}
        row |= {"loss": None if step == 5 else 5 - step / 10, "l1_factor": step / 24, "l1_factor_mean": step / 24}
        metrics.append(row | {"sparsity": step / 20, "lr": 3e-4})
    metrics.append({"kind": "evaluation", "model": "training", "step": 12, "loss": 3.8} | model(21.0, 0.712))
    if ended:
        (folder / "report").mkdir()
        (folder / "report" / "report.json").write_text(json.dumps(report).replace("Infinity", "null"))
    return folder


def a_measurement(folder: Path, checkpoint: str, perplexity: float, sparsity: float) -> Path:
    """The result of `prosparse measure` on two texts."""
    counts = {
        "active_per_token": {"mean": 290.5, "p50": 280.0, "p95": 400.0, "neurons": 1536.0},
        "dead": {"share": 0.01, "by_layer": [0.0, 0.02], "tokens": 16384},
        "reuse": {"share": 0.4, "by_layer": [0.3, 0.5]},
        "union": {"1": 0.2, "2": 0.3, "4": 0.5, "8": 0.7, "16": 0.9},
    }
    texts = {
        "code": {"text": "stdlib", "held_out": 0.02, **model(perplexity - 1, sparsity, 16384), **counts},
        "wiki": {"text": "wiki.txt", "held_out": None, **model(perplexity + 1, sparsity, 16384), **counts},
    }
    cett = {"percent": 1.0, "text": "code", "tokens": 16384, "cett": 0.13, "sparsity": 0.85}
    result = {
        "checkpoint": checkpoint,
        "opened": f"/anywhere/{checkpoint}" + "/model" * (checkpoint == "runs/" + Path(checkpoint).name),
        "command": f"prosparse measure checkpoint={checkpoint}",
        "dtype": "bf16",
        "device": "cpu",
        "context": 256,
        "activation": {"name": "fatrelu", "param": 0.02},
        **model(perplexity, sparsity),
        **counts,
        "texts": texts,
        "cett": cett | {"perplexity": perplexity * 1.01, "dense_perplexity": perplexity},
        "top_k": [{"percent": p, "perplexity": perplexity + 3 / p, "tokens": 16384, "text": "code"} for p in (100, 20)],
    }
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def a_shift(granularity: str) -> dict:
    """What a shift by layer or neuron tells of itself."""
    better = 0.04 if granularity == "neuron" else 0.02
    sweep = [(0.0, 0.7, 20.0), (0.01, 0.75, 20.1), (0.02, 0.78, 20.19), (0.04, 0.82, 20.6), (0.32, 0.99, 900.0)]
    tried = [(1e-6 * 4**n, s + better, p) for n, (_, s, p) in enumerate(sweep[:4])]
    return {
        "threshold": 0.02,
        "budget": 0.01,
        "tokens": 8160,
        "sweep": [{"threshold": t, "sparsity": s, "perplexity": p} for t, s, p in sweep],
        "granularity": granularity,
        "allocations": [{"price": c, "sparsity": s, "perplexity": p} for c, s, p in tried],
        "folded": {"threshold": 0.0625},
    }


def a_shift_result(folder: Path, granularity: str) -> Path:
    """The result of `prosparse shift`."""
    shift = a_shift(granularity) | {"text": "stdlib", "dtype": "bf16", "device": "cpu", "command": "prosparse shift"}
    shift["folded"] |= {"sparsity": 0.82, "perplexity": 20.2}
    folder.mkdir()
    result = {"format": "hf", "activation": "fatrelu", "param": 0.0625, "out": "shifted", "shift": shift}
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def an_evaluation(folder: Path, checkpoint: str, complete: bool = True) -> Path:
    """The result of `prosparse eval`."""
    folder.mkdir()
    result = {"verb": "eval", "checkpoint": checkpoint, "command": "prosparse eval", "complete": complete}
    result |= {"tasks": {"arc_easy": A_TASK}, "dtype": "bf16", "suites": {"prosparse": {"average": None}}}
    result |= {"remaining": [] if complete else ["piqa"], "notes": ["made by hand"]}
    (folder / "result.json").write_text(json.dumps(result))
    return folder
