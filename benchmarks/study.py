"""The matched-token study (docs/results.md): the same rows in the same order for every arm, one thing changed in each.

    python benchmarks/study.py out=DIR corpus=PATH [arm=NAME,...] [scale=cpu] [seed=0] [wikitext=PATH] [OVERRIDE ...]
    python benchmarks/study.py report out=DIR

In: a corpus (benchmarks/corpus.py's corpus.jsonl, or hub://NAME), and optionally WikiText-2's validation text. The first form trains
the arms one after the other (without arm=: all), measures each on held-out text and asks it tests/tasks; what is done is not
done again, and what was stopped goes on. Out, for ARM or ARM-seedN: DIR/ARM (a run folder), DIR/measured/ARM, DIR/tasks/ARM;
of `report`: DIR/report (that of `prosparse report`), DIR/results.json, DIR/results.md, DIR/frontier.png.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("substitution", "rise", "hold")
NO_SHIFT = "shift@recipe.shift=none"
DRELU = "activation@recipe.activation=drelu"
NEURON = "recipe.shift.granularity=neuron"
RECOVER = "RECOVER"

# What an arm changes of experiment=study, whose recipe is: ReLU, λ along a sine, one threshold within +1 % of perplexity.
# The arm "progressive λ" without a shift is the model `trained` of progressive_shift: the same run, before its shift.
ARMS = {
    "silu_continued": ["recipe.control=silu_continued"],
    "relu_only": ["recipe.control=relu_only"],
    "progressive_shift": [],
    "constant_l1": ["recipe.control=constant_l1"],
    "progressive_shift_neuron": [NEURON],
    "progressive_shift_recover": [RECOVER],
    "progressive_shift_neuron_recover": [NEURON, RECOVER],
    "drelu": [DRELU, NO_SHIFT, "recipe.stages.rise.l1.factor=0", "recipe.stages.hold.l1.factor=0"],
    "drelu_progressive_shift": [DRELU],
    "progressive_shift_distilled": [f"recipe.stages.{stage}.distillation.weight=1" for stage in STAGES],
    "target_89": [NO_SHIFT]
    + [f"stage@recipe.stages.{stage}=target" for stage in STAGES[1:]]
    + [f"recipe.stages.{stage}.l1.{key}" for stage in STAGES[1:] for key in ("factor=0", "sparsity=0.89")],
}
ON_A_GPU = ["recipe.batch.sequences=64", "recipe.batch.context=1024", "micro_batch=16", "recipe.lr.warmup_steps=30"]
ON_A_GPU += ["evaluate.rows=128", "save.every=100"]
# By name: steps of the stages; how many of the last are those of a recovery, where there is one; what else is changed.
SCALES: dict[str, tuple[tuple[int, int, int], int, list[str]]] = {
    "cpu": ((50, 120, 80), 20, []),  # x 8 x 512 tokens: 1.02 M
    "gpu": ((153, 366, 244), 60, ON_A_GPU),  # x 64 x 1024 tokens: 50.0 M
    "gpu_short": ((61, 147, 98), 25, ON_A_GPU),  # 20.1 M
    "smoke": ((1, 1, 2), 1, ["recipe.batch.sequences=2", "recipe.batch.context=64", "micro_batch=2", "evaluate.rows=4"]),
}


def overrides(arm: str, scale: str = "cpu", seed: int = 0) -> list[str]:
    """Those of `prosparse train` for an arm, but its text and its folder; ValueError for an unknown arm or scale."""
    for key, name, names in (("arm", arm, ARMS), ("scale", scale, SCALES)):
        if name not in names:
            raise ValueError(f"{key}={name}: give one of {', '.join(names)}")
    counts, recovery, changed = SCALES[scale]
    own = [override for override in ARMS[arm] if override != RECOVER]
    if RECOVER in ARMS[arm]:  # the same tokens; the learning rate at which the others end
        counts = (*counts[:2], counts[2] - recovery)
        own += [f"recipe.recover.steps={recovery}", "recipe.recover.lr=3e-5"]
    steps = [f"recipe.stages.{stage}.steps={count}" for stage, count in zip(STAGES, counts, strict=True)]
    return ["experiment=study", *changed, *steps, *own, f"seed={seed}"]


def verb(name: str, *overrides: str) -> None:
    """Run `prosparse NAME ...` in a process of its own."""
    done = subprocess.run([sys.executable, "-m", "prosparse.cli", name, *overrides], cwd=ROOT)
    if done.returncode:
        sys.exit(done.returncode)


def complete(folder: Path) -> bool:
    """Whether `measure` or `eval` has written its whole result there."""
    file = folder / "result.json"
    return file.is_file() and json.loads(file.read_text()).get("complete", True)


def run(arm: str, out: Path, scale: str, seed: int, corpus: str, wikitext: str | None, given: list[str]) -> None:
    """One arm: train, measure, ask; each only if it has not been done."""
    name = arm if seed == 0 else f"{arm}-seed{seed}"
    folder, devices = out / name, [o for o in given if o.startswith(("threads=", "device="))]
    text = [f"data.sources.files.path={corpus}", f"data.cache={out / 'cache'}"]
    if not (folder / "report" / "report.json").exists():
        verb("train", *overrides(arm, scale, seed), f"run_dir={folder}", *text, *given)
    texts = {} if corpus.startswith("hub://") else {"corpus": f"{{path: '{corpus}', held_out: 0.02, rows: 128}}"}
    texts |= {"wikitext": f"{{path: '{wikitext}', rows: 128}}"} if wikitext else {}
    if texts and not complete(out / "measured" / name):
        named = ", ".join(f"{key}: {value}" for key, value in texts.items())
        where = [f"context={512 if scale == 'cpu' else 64 if scale == 'smoke' else 1024}", f"cache={out / 'cache'}"]
        verb("measure", f"checkpoint={folder}", f"texts={{{named}}}", *where, f"out={out / 'measured' / name}", *devices)
    if not complete(out / "tasks" / name):
        asked = ["tasks=[opposites,series]", f"task_path={ROOT / 'tests' / 'tasks'}", "batch=16"]
        asked += ["limit=4"] if scale == "smoke" else []
        verb("eval", f"checkpoint={folder}", *asked, f"out={out / 'tasks' / name}", *devices)


def main(*arguments: str) -> None:
    options = {"scale": "cpu", "seed": "0", "arm": ",".join(ARMS), "wikitext": ""}
    given = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in (*options, "out", "corpus") and value:
            options[key] = value
        elif argument != "report":
            given.append(argument)
    for key in ("out",) if "report" in arguments else ("out", "corpus"):
        if key not in options:
            raise ValueError(f"{key}= is missing")
    out = Path(options["out"]).resolve()
    path = lambda text: text if not text or "://" in text else str(Path(text).resolve())  # noqa: E731
    for arm in options["arm"].split(","):
        overrides(arm, options["scale"])  # all names first
    for arm in options["arm"].split(","):
        where = (path(options["corpus"]), path(options["wikitext"]) or None)
        run(arm, out, options["scale"], int(options["seed"]), *where, given)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except ValueError as error:
        sys.exit(f"{error}\n{__doc__}")
