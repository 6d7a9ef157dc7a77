"""The matched-token study (docs/results.md): the same rows in the same order for every arm, one thing changed in each.

    python benchmarks/study.py out=DIR corpus=PATH [arm=NAME,...] [scale=cpu] [seed=0] [wikitext=PATH] [OVERRIDE ...]
    python benchmarks/study.py report out=DIR [earlier=FILE]

In: a corpus (benchmarks/corpus.py's corpus.jsonl, or hub://NAME), and optionally WikiText-2's validation text. The
first form trains the arms one after the other (without arm=: all), measures each on held-out text and asks it
tests/tasks; arm=magnitude,thresholds cuts the arms that have ended further without training. What is done is not done
again, and what was stopped goes on. Out, for ARM or ARM-seedN: DIR/ARM (a run folder), DIR/measured/ARM, DIR/tasks/ARM,
DIR/cuts/ARM.json; of `report`: DIR/report (that of `prosparse report`), DIR/results.json, DIR/results.md,
DIR/frontier.png. earlier=FILE, another results.json (benchmarks/study_cpu.json is one), adds the arms that only it has
and tells whether those that both have gave the same numbers.
"""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from prosparse import load_model, load_tokenizer
from prosparse.checkpoint import find_stage
from prosparse.cli import compose
from prosparse.config import Dtype
from prosparse.data import Batch
from prosparse.ffn import activation_of, round_bf16, substitute
from prosparse.penalty import new_statistics, sparsity_by_layer, tally_kept
from prosparse.plotting import GRAY, SERIES
from prosparse.preparation import prepare
from prosparse.records import flattened, read_run
from prosparse.sparsity import measure, run_passes, spread
from prosparse.telemetry import device_name, write_atomically

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("substitution", "rise", "hold")
NO_SHIFT = "shift@recipe.shift=none"
DRELU = "activation@recipe.activation=drelu"
NEURON = "recipe.shift.granularity=neuron"
LOWER = [f"recipe.stages.{stage}.l1.factor=2" for stage in STAGES[1:]]  # a quarter of the study's λ
RECOVER = "RECOVER"
GRID = (0.3, 0.5, 0.7, 0.8, 0.89)  # sparsities of the arm without training
THRESHOLDS = (0.05, 0.1, 0.2, 0.4, 0.8)  # on the gates of the trained models
KEYS = ("model", "sparsity", "perplexity", "x_control", "tokens", "tokens_trained", "steps", "activation")
SAME = ("rows_digest", "tokens", "dtype", "device")  # conditions of results that may stand in one table
ROUNDING = 1e-6  # relative: versions that add up in another order
TRAINED = ("trained", "shifted", "recovered")
TASKS = ("opposites", "series")
FILES = "data.sources.files."  # of a Hub corpus: config, split, column

# Up to the end of that stage these are one run with the arm BASE, and begin from its checkpoint where that is at hand.
BASE = "progressive_shift"
FORKS = {
    "relu_only": "substitution",
    "constant_l1": "substitution",
    "progressive_shift_l1_2": "substitution",
    "constant_l1_2": "substitution",
    "progressive_shift_neuron": "hold",
    "target_89": "substitution",
}

# What an arm changes of experiment=study: ReLU, λ along a sine, one threshold within +1 % of perplexity.
# The arm "progressive λ" without a shift is the model `trained` of progressive_shift: the same run, before its shift.
ARMS = {
    "silu_continued": ["recipe.control=silu_continued"],
    "relu_only": ["recipe.control=relu_only"],
    BASE: ["save.keep_stages=true"],
    "constant_l1": ["recipe.control=constant_l1"],
    "progressive_shift_l1_2": LOWER,
    "constant_l1_2": ["recipe.control=constant_l1", *LOWER],
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
            cuts = CUTS if key == "arm" else ()
            raise ValueError(f"{key}={name}: give one of {', '.join([*names, *cuts])}")
    counts, recovery, changed = SCALES[scale]
    own = [override for override in ARMS[arm] if override != RECOVER]
    if RECOVER in ARMS[arm]:  # the same tokens; the learning rate at which the others end
        counts = (*counts[:2], counts[2] - recovery)
        own += [f"recipe.recover.steps={recovery}", "recipe.recover.lr=3e-5"]
    steps = [f"recipe.stages.{stage}.steps={count}" for stage, count in zip(STAGES, counts, strict=True)]
    return ["experiment=study", *changed, *steps, *own, f"seed={seed}"]


def folder_of(arm: str, seed: int) -> str:
    """The name of an arm's folder."""
    return arm if seed == 0 else f"{arm}-seed{seed}"


def begun_from(out: Path, arm: str, seed: int, given: list[str]) -> list[str]:
    """The fork with which an arm begins, if it has one, that checkpoint is there and no recipe was given.

    An arm that has checkpoints of its own goes on from them, however it began.
    """
    base = out / folder_of(BASE, seed)
    own = any((out / folder_of(arm, seed) / "checkpoints").glob("step-*"))
    if own or any("recipe" in override.split("=")[0] for override in given):
        return []
    try:
        find_stage(base, FORKS[arm])
    except (KeyError, ValueError):
        return []
    return [f"fork={base}@{FORKS[arm]}"]


def verb(name: str, *overrides: str) -> None:
    """Run `prosparse NAME ...` in a process of its own; its JSON, which is in its files too, is not shown."""
    called = [sys.executable, "-m", "prosparse.cli", name, *overrides]
    done = subprocess.run(called, cwd=ROOT, stdout=subprocess.DEVNULL)
    if done.returncode:
        sys.exit(done.returncode)


def check_settings(folder: Path, wanted: list[str]) -> None:
    """ValueError if the run there was trained with another recipe, model, text or seed than `wanted` overrides say."""
    if "recipe" not in (had := read_run(folder).config):
        raise ValueError(f"{folder} has no config.yaml of a run: remove it, or give another out=")
    now = json.loads(json.dumps(asdict(compose("train", wanted)), default=str))
    before, after = ({key: str(value) for key, value in flattened(config).items()} for config in (had, now))
    for key in sorted(before.keys() & after.keys()):
        if key.startswith(("recipe.", "model.", "data.sources.", "seed")) and before[key] != after[key]:
            told = f"{key}={before[key]}, not {after[key]}"
            raise ValueError(f"{folder} was trained with {told}: remove it, or give another out=")


def complete(folder: Path) -> bool:
    """Whether `measure` or `eval` has written its whole result there."""
    file = folder / "result.json"
    return file.is_file() and json.loads(file.read_text()).get("complete", True)


def run(arm: str, out: Path, scale: str, seed: int, corpus: str, wikitext: str | None, given: list[str]) -> None:
    """One arm: train, measure, ask; each only if it has not been done."""
    name = folder_of(arm, seed)
    folder, devices = out / name, [o for o in given if o.startswith(("threads=", "device="))]
    text = [f"data.sources.files.path={corpus}", f"data.cache={out / 'cache'}"]
    if (folder / "report" / "report.json").exists():
        check_settings(folder, [*overrides(arm, scale, seed), f"run_dir={folder}", *text, *given])
    else:
        for kind in ("measured", "tasks"):  # of a run that was removed
            shutil.rmtree(out / kind / name, ignore_errors=True)
        (out / "cuts" / f"{name}.json").unlink(missing_ok=True)
        begun = begun_from(out, arm, seed, given)
        verb("train", *overrides(arm, scale, seed), f"run_dir={folder}", *begun, *text, *given)
    if arm != BASE:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # 3 to 5 GB an arm; the model is in RUN/model
    hub = dict(o.removeprefix(FILES).split("=", 1) for o in given if o.startswith(FILES))
    part = "".join(f", {key}: '{value}'" for key, value in hub.items())
    texts = {"corpus": f"{{path: '{corpus}', held_out: 0.02, rows: 128{part}}}"}
    texts |= {"wikitext": f"{{path: '{wikitext}', rows: 128}}"} if wikitext else {}
    measured = out / "measured" / name
    if complete(measured) and not texts.keys() <= json.loads((measured / "result.json").read_text())["texts"].keys():
        shutil.rmtree(measured)  # wikitext= is new
    if not complete(measured):
        named = ", ".join(f"{key}: {value}" for key, value in texts.items())
        where = [f"context={512 if scale == 'cpu' else 64 if scale == 'smoke' else 1024}", f"cache={out / 'cache'}"]
        verb("measure", f"checkpoint={folder}", f"texts={{{named}}}", *where, f"out={measured}", *devices)
    if not complete(out / "tasks" / name):
        asked = ["tasks=[opposites,series]", f"task_path={ROOT / 'tests' / 'tasks'}", "batch=16"]
        asked += ["limit=4"] if scale == "smoke" else []
        verb("eval", f"checkpoint={folder}", *asked, f"out={out / 'tasks' / name}", *devices)


# --- thresholds without training -------------------------------------------------------------------------------------


class Opened:
    """The last model of the run OUT/`name`, with the rows that it trained on and was measured on."""

    def __init__(self, out: Path, name: str, scale: str, corpus: str, given: list[str]) -> None:
        text = [f"data.sources.files.path={corpus}", f"data.cache={out / 'cache'}"]
        config = compose("train", [*overrides("silu_continued", scale), f"run_dir={out / name}", *text, *given])
        torch.set_num_threads(config.threads or torch.get_num_threads())
        device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
        dtype = torch.float32 if config.dtype is Dtype.fp32 else torch.bfloat16
        self.model = load_model(str(out / name / "model"), dtype=dtype, device=torch.device(device))
        self.layers, self.batch = self.model.config.num_hidden_layers, config.micro_batch
        context = config.recipe.batch.context
        rows = prepare(config.data, load_tokenizer(str(out / name / "model")), [context])[context]
        self.train, self.held_out = rows.train["files"], rows.held_out
        self.measured = spread(len(rows.held_out), config.evaluate.rows)
        self.device = device_name(self.model.device, 1)

    @torch.no_grad()
    def cut(self, thresholds: torch.Tensor) -> tuple[int, float, float]:
        """(tokens, sparsity, perplexity) held out; |x1| below its layer's one of `thresholds` [layers] becomes 0."""
        statistics = new_statistics(self.layers, self.model.device)

        def keep(layer: int, x1: torch.Tensor, data: Batch) -> torch.Tensor:
            x1 = torch.where(x1.float().abs() >= thresholds[layer].to(x1.device), x1, 0.0)
            tally_kept(statistics[layer], x1, data.token_mask)
            return x1

        totals = run_passes(self.model, self.held_out, self.measured, self.batch, keep).tolist()
        return int(totals[1]), sum(sparsity_by_layer(statistics)) / self.layers, math.exp(totals[0] / totals[1])

    def shift(self, threshold: float) -> tuple[int, float, float]:
        """(tokens, sparsity, perplexity) held out, with this threshold on all gates."""
        substitute(self.model, "drelu" if activation_of(self.model)[0] == "drelu" else "fatrelu", threshold)
        told = measure(self.model, self.held_out, batch=self.batch, indices=self.measured)
        return told.tokens, told.sparsity, told.perplexity

    def points(self, wanted: dict[str, Callable[[], tuple[int, float, float]]], file: Path) -> None:
        """What is `wanted`, by what it is called; written after each, and what is in `file` is not done again."""
        found = {point["cut"]: point for point in cuts_of(file)}
        file.parent.mkdir(exist_ok=True)
        for called, find in wanted.items():
            if called not in found:
                found[called] = dict(zip(("cut", "tokens", "sparsity", "perplexity"), (called, *find()), strict=True))
                print(f"{file.stem:<20} {found[called]}", flush=True)
            done = [found[name] for name in wanted if name in found]
            write_atomically(file, json.dumps({"device": self.device, "points": done}, indent=1) + "\n")


def cuts_of(file: Path) -> list[dict]:
    """The points that have been measured of a run."""
    return json.loads(file.read_text())["points"] if file.is_file() else []


def magnitude(out: Path, name: str, scale: str, corpus: str, given: list[str]) -> None:
    """The arm that trains nothing: of a run's intermediate, cut what is small in each layer (TEAL's way).

    A layer's threshold on |x1| is a quantile over 8 training rows, the same quantile in all layers. Sparsities: a grid,
    and those of the arms that have been trained. Writes OUT/cuts/NAME.json; measured on the runs' held-out rows.
    """
    levels = [0.0, *sorted({*GRID, *(round(share, 4) for share in sparsities(out) if share > 0.01)})]
    called = [f"x1 quantile {level:.4g}" for level in levels]
    file = out / "cuts" / f"{name}.json"
    if called == [point["cut"] for point in cuts_of(file)]:
        return
    opened = Opened(out, name, scale, corpus, given)
    cuts = torch.zeros(len(levels), opened.layers)

    def quantiles(layer: int, x1: torch.Tensor, data: Batch | None) -> None:
        size = x1.float().abs().flatten().sort().values.cpu()
        cuts[:, layer] = size[[min(len(size) - 1, round(level * len(size))) for level in levels]]

    with torch.no_grad():
        run_passes(opened.model, opened.train, spread(len(opened.train), 8), 8, quantiles)
    opened.points({each: partial(opened.cut, cut) for each, cut in zip(called, cuts, strict=True)}, file)


def thresholds(out: Path, name: str, scale: str, corpus: str, given: list[str]) -> None:
    """One threshold on the gate after the other, in a run's last model: what is cut that was not trained for.

    Writes OUT/cuts/NAME.json; measured on the runs' held-out rows.
    """
    called, file = [f"threshold {round_bf16(value):.4g}" for value in THRESHOLDS], out / "cuts" / f"{name}.json"
    if called != [point["cut"] for point in cuts_of(file)]:
        opened = Opened(out, name, scale, corpus, given)
        opened.points({each: partial(opened.shift, t) for each, t in zip(called, THRESHOLDS, strict=True)}, file)


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
    reports = {name: json.loads((out / name / "report" / "report.json").read_text()) for name in runs}
    first = reports[next(iter(runs))]
    odd = {note.partition(" is not matched with ")[0] for note in told["table_notes"]}
    controlled = any(arm == "silu_continued" for arm, _ in runs.values())
    rows, cuts = [], []
    for name, (arm, seed) in runs.items():
        own = [row for row in told["table"] if row["run"] == name and row["model"] in TRAINED]
        for row in own:
            unknown = not controlled and name not in odd
            matched = {"matched": None if unknown else row["x_control"] is not None}
            matched |= {"commit": reports[name]["versions"].get("commit")}
            rows.append({"arm": arm, "seed": seed} | {key: row[key] for key in KEYS} | matched)
        last = rows[-1]  # what was measured after the end is the last model
        if complete(out / "measured" / name):
            texts = json.loads((out / "measured" / name / "result.json").read_text())["texts"]
            last["texts"] = {text: texts[text]["perplexity"] for text in texts}
        if complete(out / "tasks" / name):
            tasks = json.loads((out / "tasks" / name / "result.json").read_text())["tasks"]
            last["tasks"] = {task: next(iter(tasks[task]["metrics"].values())) for task in tasks}
        shared = {key: last[key] for key in ("arm", "seed", "tokens_trained", "matched")}
        cuts += [shared | point for point in cuts_of(out / "cuts" / f"{name}.json")]
    conditions = {key: first[key] for key in ("text", "device", "dtype", "versions", "rows_digest")}
    conditions |= {"tokens": rows[0]["tokens"], "text": first["text"].replace(f"{out.parent}/", "")}
    results = {"conditions": conditions, "rows": rows, "cuts": cuts, "notes": told["table_notes"]}
    set_multiples(results)
    return results


def set_multiples(results: dict) -> None:
    """Perplexities of what is `matched` by those of SiLU continued and of ReLU only; None where one misses."""
    known = {(row["arm"], row["seed"]): row["perplexity"] for row in results["rows"] if row["matched"]}
    for row in results["rows"] + results["cuts"]:
        for key, control in (("x_control", "silu_continued"), ("x_relu_only", "relu_only")):
            by = known.get((control, row["seed"])) if row["matched"] else None
            row[key] = None if by is None else row["perplexity"] / by


def joined(results: dict, earlier: dict) -> dict:
    """`results` beside `earlier` ones; `repeated` says of an arm that both have whether its numbers are equal.

    Equal but for rounding, the earlier rows stay, and the cuts of both; else only those of `results`. Both must be of
    the same rows, held-out tokens, dtype and device (else ValueError names what differs). Where only `earlier` has a
    control, an arm counts as matched if its tokens are the control's; a note says that the configs were not compared.
    """
    for key in SAME:
        ours, theirs = (told["conditions"][key] for told in (results, earlier))
        if ours != theirs:
            raise ValueError(f"earlier=: {key} {theirs} there, {ours} in out=: join results of the same conditions")
    control = {row["seed"]: row["tokens_trained"] for row in earlier["rows"] if row["arm"] == "silu_continued"}
    by_tokens = [row for row in results["rows"] + results["cuts"] if row["matched"] is None and row["seed"] in control]
    for row in by_tokens:
        row["matched"] = row["tokens_trained"] == control[row["seed"]]
    kept: dict[str, list] = {"rows": [], "cuts": []}
    repeated = []
    for arm, seed in sorted({(row["arm"], row["seed"]) for told in (results, earlier) for row in told["rows"]}):
        new, old = (
            {kind: [row for row in told[kind] if (row["arm"], row["seed"]) == (arm, seed)] for kind in kept}
            for told in (results, earlier)
        )
        apart = {
            key: by for rows in zip(new["rows"], old["rows"], strict=False) for key, by in distances(*rows).items()
        }
        differ = max(apart.values(), default=0) > ROUNDING
        if new["rows"] and old["rows"]:
            told = ", ".join(f"{key} {by:.1e}" for key, by in apart.items())
            repeated.append(f"{arm} {seed}: {told + ' apart from earlier' if told else 'the same numbers as earlier'}")
        kept["rows"] += new["rows"] if differ or not old["rows"] else old["rows"]
        cuts = {row["cut"]: row for row in [*([] if differ else old["cuts"]), *new["cuts"]]}
        kept["cuts"] += sorted(cuts.values(), key=lambda row: float(row["cut"].split()[-1]))
    notes = results["notes"] + earlier["notes"]
    if control:
        notes = [note for note in notes if "no silu_continued" not in note]
    if arms := dict.fromkeys(row["arm"] for row in kept["rows"] if row["matched"] and row in by_tokens):
        notes.append(f"matched with the earlier silu_continued by rows and tokens, not by config: {', '.join(arms)}")
    versions = [*earlier["conditions"].get("earlier", []), earlier["conditions"]["versions"]]
    both = {"conditions": results["conditions"] | {"earlier": versions}, **kept, "notes": notes, "repeated": repeated}
    set_multiples(both)
    return both


def distances(now: dict, then: dict) -> dict[str, float]:
    """Relative distances of a row's numbers that are not another's; what only one of them has is not compared."""
    if now["model"] != then["model"]:
        return {f"{now['model']}, earlier {then['model']}:": math.inf}
    new, old = (row | row.get("texts", {}) | row.get("tasks", {}) for row in (now, then))
    keys = ["sparsity", "perplexity", *now.get("texts", {}), *now.get("tasks", {})]
    found = {f"{now['model']} {key}": (new[key], old.get(key, new[key])) for key in keys}
    return {key: abs(one - other) / max(one, other) for key, (one, other) in found.items() if one != other}


def read_results(file: str) -> dict:
    """A results.json; ValueError if it is none."""
    try:
        told = json.loads(Path(file).read_text())
        known = {row["arm"] for row in told["rows"] + told["cuts"]} <= set(ARMS) and "notes" in told
        known = known and set(SAME) <= set(told["conditions"])
        for row in told["rows"] + told["cuts"]:
            row.setdefault("matched", row["x_control"] is not None)
        for row in told["rows"]:
            row.setdefault("commit", told["conditions"]["versions"].get("commit"))
    except (OSError, ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise ValueError(f"earlier={file}: no results.json of a study; give one, such as benchmarks/study_cpu.json")
    return told


def table(results: dict) -> str:
    """The matched-token table as Markdown; an arm that has not been run has a row that says so."""
    heads = ["arm", "model", "seed", "tokens", "sparsity", "perplexity", "x SiLU continued", "x ReLU only"]
    heads += ["WikiText-2", *TASKS]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    form = lambda value, how: "-" if value is None else format(value, how)  # noqa: E731
    for arm in ARMS:
        own = [row for row in results["rows"] + results["cuts"] if row["arm"] == arm]
        for row in own:
            texts, tasks = row.get("texts", {}), row.get("tasks", {})
            cells = [arm, row.get("model", row.get("cut")), str(row["seed"]), f"{row['tokens_trained']:,}"]
            cells += [f"{row['sparsity']:.2%}", f"{row['perplexity']:.3f}"]
            cells += [
                form(row["x_control"], ".4f"),
                form(row["x_relu_only"], ".4f"),
                form(texts.get("wikitext"), ".2f"),
            ]
            lines.append(f"| {' | '.join([*cells, *(form(tasks.get(task), '.3f') for task in TASKS)])} |")
        if not own:
            lines.append(f"| {arm} | not measured |" + " |" * (len(heads) - 2))
    return "\n".join(lines) + "\n"


def frontier(results: dict, path: Path) -> None:
    """Perplexity as a multiple of the SiLU-continued arm's, over sparsity: models as marks, what is cut as lines."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    of = lambda kind, arm: [r for r in results[kind] if r["arm"] == arm and r["x_control"] is not None]  # noqa: E731
    for number, arm in enumerate(ARMS):
        color = GRAY if arm == "silu_continued" else SERIES[number % len(SERIES)]
        filled = color if number >= len(SERIES) else "none"
        for mark, model in zip("oDP", TRAINED, strict=True):
            found = [row for row in of("rows", arm) if row["model"] == model]
            x, y = ([100 * r["sparsity"] for r in found], [r["x_control"] for r in found])
            if found:
                axes.plot(x, y, label=f"{arm}, {model}", color=color, marker=mark, ls="none", mfc=filled)
        for seed in sorted({row["seed"] for row in of("cuts", arm)}):
            both = [row for row in of("rows", arm) if row["model"] == "trained"] + of("cuts", arm)
            found = [row for row in both if row["seed"] == seed]
            how = "smallest x1 cut" if arm == "silu_continued" else "further thresholds"
            x, y = ([100 * r["sparsity"] for r in found], [r["x_control"] for r in found])
            axes.plot(x, y, ".-", color=color, lw=1, ms=4, label=f"{arm}, {how}")
    axes.set(
        xlabel="sparsity (%): zeros of the gate; gray: of x1 (the axis is the logarithm of what is not zero)",
        ylabel="perplexity / that of SiLU continued (log scale)",
        yscale="log",
    )
    known = [row["x_control"] for row in results["rows"] if row["x_control"] is not None]
    axes.set_yticks(ticks := (1, 1.5, 2, 3, 5, 7, 10, 15, 20, 30), [f"{tick:g}" for tick in ticks])
    stretched = lambda percent: -np.log10(np.maximum(1e-3, 1 - np.asarray(percent) / 100))  # noqa: E731
    axes.set_xscale("function", functions=(stretched, lambda value: 100 * (1 - 10 ** -np.asarray(value))))
    most = max((100 * row["sparsity"] for row in results["rows"] + results["cuts"] if row["x_control"]), default=0)
    ticks = [tick for tick in (0, 50, 70, 80, 85, 90, 93, 95, 97, 98, 99) if tick <= max(50, most)]
    axes.set_xticks(ticks, map(str, ticks))
    axes.set_xlim(-2, max(50, most + (100 - most) / 10))
    axes.minorticks_off()
    axes.set_ylim(0.9, 2 * max(known, default=1.0))  # some cuts leave nothing of a model
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


CUTS = {"magnitude": magnitude, "thresholds": thresholds}  # what is done with the arms that have ended


def main(*arguments: str) -> None:
    report, arguments = "report" in arguments, [argument for argument in arguments if argument != "report"]
    options = {"scale": "cpu", "seed": "0", "arm": ",".join(dict.fromkeys([BASE, *ARMS, *CUTS])), "wikitext": ""}
    read = ("out", "earlier") if report else (*options, "out", "corpus")
    given = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in read and value:
            options[key] = value
        else:
            given.append(argument)
    for key in ("out",) if report else ("out", "corpus"):
        if key not in options:
            raise ValueError(f"{key}= is missing\n{__doc__}")
    out = Path(options["out"]).resolve()
    if report:
        if given:
            raise ValueError(f"report does not know {given[0]}: it reads {', '.join(f'{key}=' for key in read)}")
        earlier = read_results(options["earlier"]) if "earlier" in options else None
        results = collect(out)
        results = joined(results, earlier) if earlier else results
        write_atomically(out / "results.json", json.dumps(results, indent=1) + "\n")
        write_atomically(out / "results.md", table(results))
        frontier(results, out / "frontier.png")
        print(table(results), *results["notes"], *results.get("repeated", []), sep="\n")
        return
    arms, scale = options["arm"].split(","), options["scale"]
    for arm in arms:
        overrides(BASE if arm in CUTS else arm, scale)  # all names first
    for key in ("corpus", "wikitext"):
        if options[key] and "://" not in options[key]:
            options[key] = str(Path(options[key]).resolve())
            if not Path(options[key]).exists():
                raise ValueError(f"{key}={options[key]} does not exist: give a file, a folder or hub://NAME")
    if not options["seed"].isdecimal():
        raise ValueError(f"seed={options['seed']}: give a whole number")
    for arm in arms:
        if arm not in CUTS:
            run(arm, out, scale, int(options["seed"]), options["corpus"], options["wikitext"] or None, given)
            continue
        fitting = [name for name, (trained, _) in names(out).items() if may_be_cut(arm, trained)]
        if not fitting:
            raise ValueError(f"arm={arm}: no arm that it cuts has ended in out={out}; train one first")
        for name in fitting:
            CUTS[arm](out, name, scale, options["corpus"], given)


def may_be_cut(how: str, trained: str) -> bool:
    """Whether an arm's model is cut that way; thresholds by neuron are in its weights already."""
    return NEURON not in ARMS[trained] and how == ("magnitude" if trained == "silu_continued" else "thresholds")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except ValueError as error:
        sys.exit(str(error))
