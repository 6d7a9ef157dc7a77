"""The matched-token study (docs/results.md): the same rows in the same order for every arm, one thing changed in each.

    python benchmarks/study.py out=DIR corpus=PATH [arm=NAME,...] [scale=cpu] [seed=0] [wikitext=PATH] [OVERRIDE ...]
    python benchmarks/study.py report out=DIR

In: a corpus (benchmarks/corpus.py's corpus.jsonl, or hub://NAME), and optionally WikiText-2's validation text. The
first form trains the arms one after the other (without arm=: all), measures each on held-out text and asks it
tests/tasks; what is done is not done again, and what was stopped goes on. Out, for ARM or ARM-seedN: DIR/ARM (a run
folder), DIR/measured/ARM, DIR/tasks/ARM; of `report`: DIR/report (that of `prosparse report`), DIR/results.json,
DIR/results.md, DIR/frontier.png.
"""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

from prosparse.plotting import GRAY, SERIES

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("substitution", "rise", "hold")
NO_SHIFT = "shift@recipe.shift=none"
DRELU = "activation@recipe.activation=drelu"
NEURON = "recipe.shift.granularity=neuron"
RECOVER = "RECOVER"
GRID = (0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.89)  # sparsities of the arm without training
KEYS = ("model", "sparsity", "perplexity", "x_control", "tokens", "tokens_trained", "steps", "activation")
TRAINED = ("trained", "shifted", "recovered")
TASKS = ("opposites", "series")
FILES = "data.sources.files."  # of a Hub corpus: config, split, column

# What an arm changes of experiment=study: ReLU, λ along a sine, one threshold within +1 % of perplexity.
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
    "smoke": (
        (1, 1, 2),
        1,
        ["recipe.batch.sequences=2", "recipe.batch.context=64", "micro_batch=2", "evaluate.rows=4"],
    ),
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
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # 3 to 5 GB an arm; the model is in RUN/model
    hub = dict(o.removeprefix(FILES).split("=", 1) for o in given if o.startswith(FILES))
    part = "".join(f", {key}: '{value}'" for key, value in hub.items())
    texts = {"corpus": f"{{path: '{corpus}', held_out: 0.02, rows: 128{part}}}"}
    texts |= {"wikitext": f"{{path: '{wikitext}', rows: 128}}"} if wikitext else {}
    if not complete(out / "measured" / name):
        named = ", ".join(f"{key}: {value}" for key, value in texts.items())
        where = [f"context={512 if scale == 'cpu' else 64 if scale == 'smoke' else 1024}", f"cache={out / 'cache'}"]
        verb(
            "measure", f"checkpoint={folder}", f"texts={{{named}}}", *where, f"out={out / 'measured' / name}", *devices
        )
    if not complete(out / "tasks" / name):
        asked = ["tasks=[opposites,series]", f"task_path={ROOT / 'tests' / 'tasks'}", "batch=16"]
        asked += ["limit=4"] if scale == "smoke" else []
        verb("eval", f"checkpoint={folder}", *asked, f"out={out / 'tasks' / name}", *devices)


# --- thresholds without training -------------------------------------------------------------------------------------


def magnitude(out: Path, dense: str, scale: str, corpus: str, given: list[str]) -> None:
    """The arm that trains nothing: of the run `dense`, cut what of each layer's intermediate is small (TEAL's way).

    A layer's threshold on |x1| is a quantile over 8 training rows, the same quantile in all layers. Sparsities: a grid,
    and those of the arms that have been trained. Writes OUT/magnitude/result.json; measured on the runs' held-out rows.
    """
    from prosparse import load_model, load_tokenizer
    from prosparse.cli import compose
    from prosparse.data import Batch
    from prosparse.penalty import new_statistics, sparsity_by_layer, tally_kept
    from prosparse.preparation import prepare
    from prosparse.sparsity import run_passes, spread
    from prosparse.telemetry import device_name

    text = [f"data.sources.files.path={corpus}", f"data.cache={out / 'cache'}"]
    config = compose("train", [*overrides("silu_continued", scale), f"run_dir={out / dense}", *text, *given])
    torch.set_num_threads(config.threads or torch.get_num_threads())
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    model = load_model(str(out / dense / "model"), dtype=torch.bfloat16, device=torch.device(device))
    context, layers = config.recipe.batch.context, model.config.num_hidden_layers
    rows = prepare(config.data, load_tokenizer(str(out / dense / "model")), [context])[context]
    train, indices = rows.train["files"], spread(len(rows.held_out), config.evaluate.rows)
    levels = sorted({*GRID, *(round(share, 4) for share in sparsities(out) if share > 0.01)})
    thresholds = torch.zeros(len(levels), layers)

    def quantiles(layer: int, x1: torch.Tensor, data: Batch | None) -> None:
        size = x1.float().abs().flatten().sort().values.cpu()
        thresholds[:, layer] = size[[min(len(size) - 1, round(level * len(size))) for level in levels]]

    points = []
    with torch.no_grad():
        run_passes(model, train, spread(len(train), 8), 8, quantiles)
        for level, cut in zip([0.0, *levels], [torch.zeros(layers), *thresholds], strict=True):
            statistics = new_statistics(layers, model.device)

            def keep(layer: int, x1: torch.Tensor, data: Batch) -> torch.Tensor:
                x1 = torch.where(x1.float().abs() >= cut[layer].to(x1.device), x1, 0.0)  # noqa: B023
                tally_kept(statistics[layer], x1, data.token_mask)  # noqa: B023
                return x1

            totals = run_passes(model, rows.held_out, indices, config.micro_batch, keep).tolist()
            sparsity = sum(sparsity_by_layer(statistics)) / layers
            points.append({"quantile": level, "sparsity": sparsity, "perplexity": math.exp(totals[0] / totals[1])})
            print(f"magnitude  sparsity {sparsity:.2%}  perplexity {points[-1]['perplexity']:.3f}", flush=True)
    result = {"model": dense, "tokens": int(totals[1]), "device": device_name(model.device, 1), "points": points}
    (out / "magnitude").mkdir(exist_ok=True)
    (out / "magnitude" / "result.json").write_text(json.dumps(result, indent=1) + "\n")


# --- what the arms say -----------------------------------------------------------------------------------------------


def names(out: Path) -> dict[str, tuple[str, int]]:
    """The arms that have ended: by folder's name, (arm, seed)."""
    found = {}
    for arm in ARMS:
        for folder in sorted(out.glob(f"{arm}*")):
            seed = folder.name.removeprefix(arm)
            if (folder / "report" / "report.json").is_file() and (not seed or seed.startswith("-seed")):
                found[folder.name] = arm, int(seed.removeprefix("-seed") or 0)
    return found


def sparsities(out: Path) -> list[float]:
    """Of all models that the arms have made."""
    reports = [json.loads((out / name / "report" / "report.json").read_text())["models"] for name in names(out)]
    return [told["sparsity"] for models in reports for name, told in models.items() if name in TRAINED]


def collect(out: Path) -> dict:
    """results.json from `prosparse report` of all arms: matched rows, conditions and notes."""
    runs, other = names(out), ("measured", "tasks")
    if not runs:
        raise ValueError(f"out={out}: no arm has ended there")
    measures = [out / kind / name for kind in other for name in runs if complete(out / kind / name)]
    lists = [
        f"{key}=[{','.join(map(str, paths))}]"
        for key, paths in (("runs", [out / r for r in runs]), ("measures", measures))
        if paths
    ]
    verb("report", *lists, f"out={out / 'report'}")
    told = json.loads((out / "report" / "report.json").read_text())
    first = told["runs"][next(iter(runs))]["report"]
    rows = []
    for row in told["table"]:
        if row["run"] in runs and row["model"] in TRAINED:
            arm, seed = runs[row["run"]]
            rows.append({"arm": arm, "seed": seed} | {key: row[key] for key in KEYS})
    for name, (arm, seed) in runs.items():  # what was measured after the end: of the last model
        row = [row for row in rows if (row["arm"], row["seed"]) == (arm, seed)][-1]
        if complete(out / "measured" / name):
            texts = json.loads((out / "measured" / name / "result.json").read_text())["texts"]
            row["texts"] = {text: texts[text]["perplexity"] for text in texts}
        if complete(out / "tasks" / name):
            tasks = json.loads((out / "tasks" / name / "result.json").read_text())["tasks"]
            row["tasks"] = {task: next(iter(tasks[task]["metrics"].values())) for task in tasks}
    cut = out / "magnitude" / "result.json"
    dense = next((row["perplexity"] for row in rows if row["arm"] == "silu_continued" and row["seed"] == 0), None)
    points = json.loads(cut.read_text())["points"] if cut.is_file() else []
    points = [point | {"x_control": point["perplexity"] / dense if dense else None} for point in points]
    conditions = {key: first[key] for key in ("text", "device", "dtype", "versions", "rows_digest")}
    return {
        "conditions": conditions | {"tokens": rows[0]["tokens"]},
        "rows": rows,
        "magnitude": points,
        "notes": told["table_notes"],
    }


def table(results: dict) -> str:
    """The matched-token table as Markdown; an arm that has not been run has a row that says so."""
    lines = [
        "| arm | model | seed | tokens | sparsity | perplexity | x SiLU continued | WikiText-2 | opposites | series |"
    ]
    lines.append("|---" * 10 + "|")
    form = lambda value, how: "-" if value is None else format(value, how)  # noqa: E731
    for arm in ARMS:
        rows = [row for row in results["rows"] if row["arm"] == arm]
        for row in rows:
            texts, tasks = row.get("texts", {}), row.get("tasks", {})
            cells = [arm, row["model"], str(row["seed"]), f"{row['tokens_trained']:,}", f"{row['sparsity']:.2%}"]
            cells += [f"{row['perplexity']:.3f}", form(row["x_control"], ".4f"), form(texts.get("wikitext"), ".2f")]
            lines.append(f"| {' | '.join([*cells, *(form(tasks.get(task), '.3f') for task in TASKS)])} |")
        if not rows:
            lines.append(f"| {arm} | not measured |" + " |" * 8)
    for point in results["magnitude"]:
        cells = [f"{point['sparsity']:.2%}", f"{point['perplexity']:.3f}", form(point["x_control"], ".4f")]
        lines.append(f"| magnitude | cut by {point['quantile']:.0%} | 0 | 0 | {' | '.join(cells)} | - | - | - |")
    return "\n".join(lines) + "\n"


def frontier(results: dict, path: Path) -> None:
    """Perplexity as a multiple of the SiLU-continued arm's, over sparsity."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    cut = [point for point in results["magnitude"] if point["x_control"] is not None]
    axes.plot(
        [100 * p["sparsity"] for p in cut],
        [p["x_control"] for p in cut],
        ".-",
        color=GRAY,
        label="no training: magnitude",
    )
    for number, arm in enumerate(ARMS):
        rows = [row for row in results["rows"] if row["arm"] == arm and row["x_control"] is not None]
        for mark, model in zip("oDP", TRAINED, strict=True):
            found = [row for row in rows if row["model"] == model]
            color = SERIES[number % len(SERIES)]
            how: dict = {"color": color, "marker": mark, "ls": "none", "mfc": "none" if number < len(SERIES) else color}
            if found:
                axes.plot(
                    [100 * r["sparsity"] for r in found],
                    [r["x_control"] for r in found],
                    label=f"{arm}, {model}",
                    **how,
                )
    axes.set(xlabel="sparsity (%)", ylabel="perplexity / that of SiLU continued (log scale)", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def main(*arguments: str) -> None:
    options = {"scale": "cpu", "seed": "0", "arm": ",".join([*ARMS, "magnitude"]), "wikitext": ""}
    given = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in (*options, "out", "corpus") and value:
            options[key] = value
        elif argument != "report":
            given.append(argument)
    for key in ("out",) if "report" in arguments else ("out", "corpus"):
        if key not in options:
            raise ValueError(f"{key}= is missing\n{__doc__}")
    out = Path(options["out"]).resolve()
    if "report" in arguments:
        results = collect(out)
        (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        (out / "results.md").write_text(table(results))
        frontier(results, out / "frontier.png")
        print(table(results), *results["notes"], sep="\n")
        return
    path = lambda text: text if not text or "://" in text else str(Path(text).resolve())  # noqa: E731
    arms = options["arm"].split(",")
    for arm in arms:
        arm == "magnitude" or overrides(arm, options["scale"])  # all names first
    for arm in arms:
        corpus, scale = path(options["corpus"]), options["scale"]
        if arm == "magnitude":
            magnitude(out, "silu_continued", scale, corpus, given)
        else:
            run(arm, out, scale, int(options["seed"]), corpus, path(options["wikitext"]) or None, given)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except ValueError as error:
        sys.exit(str(error))
