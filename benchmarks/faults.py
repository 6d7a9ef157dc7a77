"""The fault campaign: tiny trainings are killed, damaged, stopped, starved of disk, and have to end as if nothing was.

In: --quick for a small sample, --seed N for other random moments. Out: on stdout a table (fault, how many, expected,
happened) and a verdict, progress on stderr; exit code 1 if an expectation failed.
"""

import argparse
import contextlib
import io
import itertools
import os
import random
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("", "tests", "tests/faults")]

from chains import Kind, Run, break_file, different, fill, means_the_same, messages, small_disk  # noqa: E402
from conftest import make_tiny, tiny_overrides  # noqa: E402
from launched import Launched  # noqa: E402
from ranks import HANG_SECONDS, Group, Nursery  # noqa: E402

from prosparse import checkpoint  # noqa: E402
from prosparse.telemetry import duration, read_metrics, versions  # noqa: E402

STAGES = ("substitution", "rise", "hold")
KEEP, EVERY = 2, 3  # save.keep, save.every
ORPHAN_SECONDS = 60
KILL, TERM, USR1, INT = (int(number) for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT))
COST = {"undisturbed": 14, "kill": 4, "stop": 5, "launched": 28, "finish": 7, "damage": 0.1, "resume": 7, "disk": 14}

SYNC, ASYNC = Kind(2, 2, False), Kind(2, 3, True)  # of these, every point of a save is a place to die
OTHERS = (Kind(2, 1, True), Kind(2, 3, False), Kind(1, 1, False), Kind(1, 2, True))


@dataclass(frozen=True)
class Size:
    """How much of everything; None: all there is."""

    steps: int = 20  # of each of the three stages
    kinds: tuple[Kind, ...] = (SYNC, ASYNC, *OTHERS)
    points: int | None = None  # of a save, of each kind and rank
    leftovers: int = 10
    training: int = 40
    both: int = 10
    evaluation: int = 12
    start: int = 10
    end: int = 8
    alone: int = 16
    launched_kills: int = 20
    damaged_kinds: tuple[Kind, ...] = (SYNC, ASYNC)
    damaged: int | None = None  # in-process, of each kind
    resumes: int = 10
    signals: int | None = None
    launched_signals: int | None = None
    disks: int = 10
    exports: bool = True  # whether some runs end with a model/


QUICK = Size(8, (SYNC, Kind(1, 2, True)), 1, 1, 1, 1, 1, 0, 0, 1, 0, (SYNC,), 8, 1, 2, 0, 1, False)


@dataclass(frozen=True)
class Blow:
    """One fault of a chain: who gets which signal, and when.

    when: "inject" (a rank does it to itself, as `inject` says) or a moment that `wait_for` knows; alone: a rank that is
    not hit is left to itself.
    """

    label: str
    who: tuple
    when: str
    inject: tuple[tuple[str, int], ...] = ()
    number: int = KILL
    alone: bool = False


@dataclass
class Row:
    """One line of the table."""

    expected: str
    count: int = 0
    remark: str = ""
    failures: list[str] = field(default_factory=list)


class Book:
    """What was done and what came of it; progress on stderr."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}
        self.counts: Counter = Counter()
        self.began, self.planned, self.spent = time.monotonic(), 0.0, 0.0

    def row(self, label: str, expected: str) -> Row:
        return self.rows.setdefault(label, Row(expected))

    def expect(self, holds: bool, label: str, text: str, kind: str = "wrong") -> bool:
        if not holds:
            self.counts[kind] += 1
            self.rows[label].failures.append(" ".join(text.split()))
            print(f"NOT AS EXPECTED ({kind}): {label}: {text}", file=sys.stderr, flush=True)
        return holds

    def did(self, label: str, cost: str, family: str | None = None) -> None:
        """One more of `label`; `family`: the count of the verdict that it belongs to."""
        if family is not None:
            self.counts[family] += 1
        if label in self.rows:
            self.rows[label].count += 1
        self.spent += COST[cost]
        elapsed = time.monotonic() - self.began
        left = max(0.0, self.planned - self.spent) * elapsed / self.spent
        done = min(1.0, self.spent / self.planned)
        print(f"[{done:4.0%}  {duration(elapsed)}, ETA {duration(left)}] {label}", file=sys.stderr, flush=True)

    def table(self) -> str:
        lines = ["| fault | how many | expected | happened |", "|---|---|---|---|"]
        for label, row in self.rows.items():
            happened = f"{len(row.failures)} otherwise: {row.failures[0]}" if row.failures else "as expected"
            lines.append(f"| {label} | {row.count} | {row.expected} | {happened}{row.remark} |")
        return "\n".join(lines)

    def verdict(self) -> str:
        names = ("kills", "damaged", "signals", "full_disks", "wrong", "hangs", "lost")
        return " ".join(f"{name}={self.counts[name]}" for name in names)


# --- the campaign -----------------------------------------------------------------------------------------------------


class Campaign:
    def __init__(self, root: Path, nursery: Nursery, rng: random.Random, size: Size) -> None:
        self.root, self.nursery, self.rng, self.size, self.book = root, nursery, rng, size, Book()
        (root / "tiny").mkdir()
        self.tiny = make_tiny(root / "tiny", num_hidden_layers=1)
        self.undisturbed: dict[Kind, Run] = {}
        self.reached: dict[str, set[int]] = defaultdict(set)  # steps of a save at which a rank died, by label
        self.runs, self.slowest = 0, 0.0

    def overrides(self, run: Run, *more: str) -> list[str]:
        return [
            *tiny_overrides(self.tiny, run.folder),
            *(f"recipe.stages.{stage}.steps={self.size.steps}" for stage in STAGES),
            f"save.every={EVERY}",
            f"save.keep={KEEP}",
            f"save.asynchronous={str(run.kind.asynchronous).lower()}",
            f"zero=zero{run.kind.zero}",
            "evaluate.every=5",
            "recipe.shift.threshold=0.01",
            "recipe.shift.budget=null",
            "timeouts.start_seconds=60",
            "timeouts.steady_seconds=60",
            *more,
        ]

    def new_run(self, kind: Kind) -> Run:
        self.runs += 1
        return Run(kind, self.root / f"run-{self.runs}")

    def until(self, export: bool) -> list[str]:
        return [] if export else ["until=shift"]

    def start(self, run: Run, *more: str, **inject) -> Group:
        return self.nursery.start(self.overrides(run, *more), run.kind.ranks, run.log, **inject)

    def make_undisturbed(self) -> None:
        """One run of each kind, with a model/, that also counts the steps of its saves."""
        for kind in self.size.kinds:
            run = self.undisturbed[kind] = self.new_run(kind)
            group = self.start(run, *self.until(self.size.exports), count_in_save=f"{run.folder}.steps")
            if group.wait() != [0] * kind.ranks:
                raise RuntimeError(f"the undisturbed run ended {group.codes}:\n{group.text()[-3000:]}")
            self.book.did(f"undisturbed: {kind}", "undisturbed")

    def finish(self, run: Run, label: str, export: bool = False) -> str:
        """Let a run come to its end and compare it with the undisturbed one, bit by bit; returns what it said."""
        before = run.newest
        group = self.start(run, *self.until(export))
        codes, text = group.wait(), group.text()
        self.check_start(run, text, before, label)
        self.book.expect(not group.hung, label, f"{run} hung: {text[-300:]}", "hangs")
        if self.book.expect(codes == [0] * run.kind.ranks, label, f"{run} ended {codes}: {text[-500:]}"):
            told = different(run, self.undisturbed[run.kind], export)
            self.book.expect(told is None, label, f"{run}: {told}")
        return text

    # --- what has to hold after a fault -------------------------------------------------------------------------------

    def check_start(self, run: Run, text: str, before: int, label: str) -> None:
        """A start went on from the newest checkpoint."""
        if "\nrun   " in text:
            found = re.search(r"^goes on from \S+/step-(\d+)", text, re.M)
            at = int(found[1]) if found else 0
            self.book.expect(at == before, label, f"{run} went on from step {at}, not from {before}")

    def check_announced(self, run: Run, text: str, label: str) -> None:
        """No checkpoint that was announced is lost: it verifies, or KEEP newer ones do."""
        run.announced |= {int(step) for step in re.findall(r"^saved \S+/step-(\d+): ", text, re.M)}
        complete = run.complete
        for step in sorted(run.announced - set(complete)):
            stage_end = step % self.size.steps == 0  # is kept
            kept = sum(other > step for other in complete) >= KEEP and not stage_end
            self.book.expect(kept, label, f"{run} had announced step {step} and has {complete}", "lost")

    def check_stopped(self, run: Run, text: str, codes: list, label: str) -> None:
        """After a request to stop: exit codes, the last applied step saved, every step in the metrics."""
        self.book.expect(codes == [75] * run.kind.ranks, label, f"{run}: exit codes {codes}: {text[-300:]}")
        steps = [row["step"] for row in read_metrics(run.folder) if row["kind"] == "train"]
        last = max(steps, default=0)
        self.book.expect(steps == list(range(1, last + 1)), label, f"{run}: the metrics have the steps {steps}")
        told = [int(step) for step in re.findall(r"^step +(\d+)/", text, re.M)]
        self.book.expect(not told or told[-1] == last, label, f"{run}: told {told[-1:]}, the metrics end at {last}")
        self.book.expect(run.newest == last, label, f"{run}: step {last} was the last, {run.newest} is saved")
        self.book.expect(not (run.folder / "STOP").exists(), label, f"{run}: the STOP file is still there")

    def check_survivor(self, run: Run, dead: int, codes: list, text: str, seconds: float) -> None:
        """The rank that was left to itself ended, with one message that names the other."""
        label = "of these: the other rank left to itself"
        row = self.book.row(label, f"ends within {HANG_SECONDS} s, code not 0, one message that names the dead rank")
        row.count, self.slowest = row.count + 1, max(seconds, self.slowest)
        row.remark = f", within {self.slowest:.0f} s"
        self.book.expect(codes[1 - dead] not in (0, None, -KILL), label, f"{run}: exit codes {codes}")
        if "\nrun   " in text:  # before, the ranks may not know each other yet
            told = messages(text)
            named = len(told) == 1 and told[0].startswith(f"rank {dead} ended without a word")
            self.book.expect(named, label, f"{run}: rank {dead} died, told was {told}")

    def check_points(self) -> None:
        """Every step of a save that was to be reached was."""
        for label, place in self.swept.items():
            missed = sorted(set(range(1, self.points(*place) + 1)) - self.reached[label])
            self.book.expect(self.size.points is not None or not missed, label, f"not reached: {missed}")

    # --- moments ------------------------------------------------------------------------------------------------------

    def wait_until(self, holds: Callable[[], bool], alive: Callable[[], bool], label: str) -> None:
        """Return when it holds or the run is over; one that does neither hangs."""
        until = time.monotonic() + HANG_SECONDS
        while not holds() and alive():
            if time.monotonic() > until:
                self.book.expect(False, label, "did not come so far", "hangs")
                return
            time.sleep(0.01)

    def wait_for(self, moment: str, started: Group | Launched, label: str) -> None:
        if moment == "start":
            time.sleep(self.rng.uniform(0, 2.0))
            return
        words, count, pause = {
            "import": ("WORLD INFO DICT", 1, 0),
            "opened": ("\ncheckpoints: ", 1, 0.5),
            "training": ("\nstep ", self.rng.randint(1, 6), 0.1),
            "saved": ("\nsaved ", self.rng.randint(1, 3), 0.1),
            "end": ("shifting the threshold", 1, 0.1),
        }[moment]
        self.wait_until(lambda: started.text().count(words) >= count, started.running, label)
        time.sleep(self.rng.uniform(0, pause))

    # --- chains of kills and signals ----------------------------------------------------------------------------------

    def chains(self, kind: Kind, blows: list[Blow], strike: Callable, family: str, cost: str) -> None:
        """Runs that take ten blows each, and are compared at their end."""
        label, over = f"{family}: the runs, at their end", 0
        while blows:
            run, chosen, blows = self.new_run(kind), sorted(blows[:10], key=lambda b: b.when == "end"), blows[10:]
            missed = [blow for blow in chosen if not self.strike(run, blow, strike, family, cost)]
            self.book.row(label, "rows and weights bit-equal to the undisturbed run's")
            self.finish(run, label, export=self.size.exports and self.runs % 3 == 0)
            self.book.did(label, "finish")
            over = over + 1 if len(missed) == len(chosen) else 0
            if over == 5:
                self.book.expect(False, label, f"5 runs ended before {missed} could happen")
                return
            blows += missed  # the run was over too soon

    def strike(self, run: Run, blow: Blow, strike: Callable, family: str, cost: str) -> bool:
        self.book.row(blow.label, EXPECTED[family])
        hit = strike(run, blow)
        if hit:
            self.book.did(blow.label, cost, family)
        return hit

    def kill(self, run: Run, blow: Blow) -> bool:
        """Start, SIGKILL, end the others or wait for them, look at the checkpoints; False if nothing was hit."""
        before = run.newest
        group = self.start(run, "until=shift", **dict(blow.inject))
        if blow.when == "inject":
            self.wait_until(lambda: group.ended(blow.who[0]), lambda: True, blow.label)
        else:
            self.wait_for(blow.when, group, blow.label)
            for rank in blow.who:
                group.signal(KILL, rank)
        began = time.monotonic()
        if not blow.alone:
            for rank in range(run.kind.ranks):
                group.signal(KILL, rank)
        codes, text = group.wait(), group.text()
        self.book.expect(not group.hung, blow.label, f"{run} hung, ended {codes}: {text[-300:]}", "hangs")
        self.check_start(run, text, before, blow.label)
        self.check_announced(run, text, blow.label)
        hit = all(codes[rank] == -KILL for rank in blow.who) and (blow.when != "inject" or "[injected]" in text)
        if hit and blow.alone:
            self.check_survivor(run, blow.who[0], codes, text, time.monotonic() - began)
        for step in re.findall(r"^\[injected\] rank \d+: SIGKILL at step (\d+) ", text, re.M):
            self.reached[blow.label].add(int(step))
        return hit

    def ask_to_stop(self, run: Run, blow: Blow) -> bool:
        """Start, signal or make a STOP file, wait; False if the run was over before."""
        before = run.newest
        group = self.start(run, "until=shift", **dict(blow.inject))
        if blow.when != "inject":
            self.wait_for(blow.when, group, blow.label)
            for who in blow.who:
                if who == "STOP":
                    (run.folder / "STOP").touch()
                else:
                    group.signal(blow.number, who)
        codes, text = group.wait(), group.text()
        self.book.expect(not group.hung, blow.label, f"{run} hung, ended {codes}: {text[-300:]}", "hangs")
        self.check_start(run, text, before, blow.label)
        if codes == [0] * run.kind.ranks:
            (run.folder / "STOP").unlink(missing_ok=True)
            return False
        self.check_stopped(run, text, codes, blow.label)
        self.check_announced(run, text, blow.label)
        return True

    def launched(self, run: Run, blow: Blow) -> bool:
        """The same through the real launcher, of which no process may stay; False if the run was over before."""
        before = run.newest
        started = Launched(self.overrides(run, "until=shift"), run.kind.ranks, run.log)
        if blow.when == "import" and blow.who != ("runner",):
            self.wait_until(lambda: started.find("rank 1") is not None, started.running, blow.label)
        else:
            self.wait_for(blow.when, started, blow.label)
        began = time.monotonic()
        for who in blow.who:
            started.signal(blow.number, who)
        left = started.wait(ORPHAN_SECONDS)
        codes, text = started.codes(), started.text()
        self.book.expect(not left, blow.label, f"{run}: {len(left)} processes left after {ORPHAN_SECONDS} s: {left}")
        self.check_start(run, text, before, blow.label)
        self.check_announced(run, text, blow.label)
        if codes == [0] * run.kind.ranks:
            return False
        if blow.number == KILL and blow.who[0] in ("rank 0", "rank 1"):
            self.book.expect(started.runner.returncode != 0, blow.label, f"{run}: deepspeed ended with code 0")
            self.check_survivor(run, int(blow.who[0][-1]), codes, text, time.monotonic() - began)
        elif not left and blow.when != "import":
            self.check_stopped(run, text, codes, blow.label)
        return True

    # --- damaged checkpoints ------------------------------------------------------------------------------------------

    def damage(self, kind: Kind, limit: int | None) -> None:
        """Break one file of the newest checkpoint at a time: `find` has to pass over it, naming the file."""
        folder = self.root / f"damaged-{kind.ranks}-{kind.zero}"
        shutil.copytree(self.undisturbed[kind].folder / "checkpoints", folder / "checkpoints")
        newest, older = sorted(folder.glob("checkpoints/step-*"), reverse=True)[:2]
        names = sorted(path.relative_to(newest) for path in newest.rglob("*") if path.is_file())
        hows = ("truncated", "flipped", "flipped", "deleted", "replaced")
        plan = list(itertools.product(hows, names))
        for how, name in plan if limit is None else self.rng.sample(plan, limit):
            path = newest / name
            before = path.read_bytes()
            break_file(path, how, self.rng, older)
            if path.is_file() and path.read_bytes() == before:
                continue  # the other step's file is the same
            label = DAMAGES[how]
            self.book.row(label, EXPECTED["damaged"])
            expected = newest if means_the_same(path, before) else older
            said = io.StringIO()
            with contextlib.redirect_stderr(said):
                found = self.found(folder)
            told = expected == newest or path.name in said.getvalue()
            self.book.expect(found == expected and told, label, f"{name}: found {found}, said {said.getvalue()}")
            path.write_bytes(before)
            self.book.did(label, "damage", "damaged")

    def found(self, folder: Path) -> Path | str | None:
        try:
            return checkpoint.find(folder)
        except Exception as error:  # it raises nothing, whatever a file holds
            return repr(error)

    def resume_damaged(self, kinds: tuple[Kind, ...], number: int) -> None:
        """Break checkpoints of runs that stopped after their second stage, and let these go on to the end."""
        label = "damaged, and resumed: a file of the newest checkpoint (once: of every one)"
        halfway = {kind: self.halfway(kind) for kind in kinds[:number]}
        for i in range(number):
            kind = kinds[i % len(kinds)]
            run = self.new_run(kind)
            shutil.copytree(halfway[kind].folder, run.folder)
            folders = sorted(run.folder.glob("checkpoints/step-*"), reverse=True)
            everything = number > 1 and i == number - 1
            how = ("truncated", "flipped", "deleted", "replaced")[i % 4]
            for folder in folders if everything else folders[:1]:
                files = sorted(path for path in folder.glob("engine/*") if path.is_file()) + [folder / "manifest.json"]
                path = self.rng.choice(files)
                break_file(path, "truncated" if everything else how, self.rng, folders[1])
            self.book.row(label, "passed over with a word; goes on from the one before; ends bit-equal")
            before = run.newest
            wanted = 0 if everything else int(folders[1].name[5:])
            self.book.expect(before == wanted, label, f"{run}: {path} {how}, found step {before}, not {wanted}")
            text = self.finish(run, label)
            told = text.count("passing over a checkpoint: ")
            self.book.expect(told == (len(folders) if everything else 1), label, f"{run}: {told} words of passing over")
            self.book.did(label, "resume", "damaged")

    def halfway(self, kind: Kind) -> Run:
        run = self.new_run(kind)
        group = self.start(run, "until=rise")
        if group.wait() != [0] * kind.ranks:
            raise RuntimeError(f"the run that was to be damaged ended {group.codes}:\n{group.text()[-3000:]}")
        return run

    # --- full disks ---------------------------------------------------------------------------------------------------

    def fill_disks(self, number: int) -> None:
        kinds = [kind for kind in self.size.kinds if kind.ranks == 2]
        for i in range(number):
            run = self.new_run(kinds[i % len(kinds)])
            with small_disk(run.folder) as mounted:
                if mounted and (i % 3 < 2 or number == 1):
                    self.full_disk(run)
                else:
                    self.full_rank(run, i % 2)

    def full_disk(self, run: Run) -> None:
        label = "full disk: a tmpfs of 16 MB, filled while the run trains"
        self.book.row(label, EXPECTED["full_disks"])
        group = self.start(run)
        self.wait_for("saved", group, label)
        filler = fill(run.folder, leave=self.rng.choice([0, self.rng.randrange(300_000)]))
        self.check_full(run, group, label, "No space left on device")
        filler.unlink()
        self.finish(run, label)
        self.book.did(label, "disk", "full_disks")

    def full_rank(self, run: Run, rank: int) -> None:
        label = "full disk: RLIMIT_FSIZE of one rank below its part of a checkpoint"
        self.book.row(label, EXPECTED["full_disks"])
        group = self.start(run)
        self.wait_for("saved", group, label)
        for one in range(run.kind.ranks):
            group.signal(KILL, one)
        group.wait()
        self.check_announced(run, group.text(), label)
        self.check_full(run, self.start(run, full=60_000, rank=rank), label, "File too large")
        self.finish(run, label)
        self.book.did(label, "disk", "full_disks")

    def check_full(self, run: Run, group: Group, label: str, reason: str) -> None:
        codes, text = group.wait(), group.text()
        self.book.expect(not group.hung, label, f"{run} hung, ended {codes}", "hangs")
        self.book.expect(codes == [1] * run.kind.ranks, label, f"{run} ended {codes}: {text[-300:]}")
        told = messages(text)
        self.book.expect(len(told) == 1 and reason in told[0], label, f"{run}: told was {told}")
        self.check_announced(run, text, label)
        if "could not be saved" in text:
            rest = [path.name for path in run.folder.glob("checkpoints/*.tmp")]
            self.book.expect(not rest, label, f"{run}: what could not be saved is still there: {rest}")

    # --- the plan -----------------------------------------------------------------------------------------------------

    def points(self, kind: Kind, rank: int) -> int:
        """How many steps a save has; now and then it is one more or less, as its threads happen to run."""
        counts = Path(f"{self.undisturbed[kind].folder}.steps-{rank}").read_text().split()
        return statistics.median_low(map(int, counts))

    def kills(self) -> dict[Kind, list[Blow]]:
        """Every kill without a launcher, by the kind of its run, in random order."""
        size, rng = self.size, self.rng
        plan: dict[Kind, list[Blow]] = {kind: [] for kind in size.kinds}
        self.swept: dict[str, tuple[Kind, int]] = {}
        for kind in (kind for kind in (SYNC, ASYNC) if kind in plan):
            for rank in range(kind.ranks):
                points = self.points(kind, rank)
                label = f"SIGKILL of rank {rank} at each of the {points} points of a {kind.how} save"
                chosen = list(range(1, points + 1))
                if size.points is not None:
                    chosen, label = rng.sample(chosen, size.points), label.replace("each", "some")
                self.swept[label] = kind, rank
                inject = [(("die_in_save", n), ("save", 2), ("rank", rank)) for n in chosen]
                plan[kind] += [Blow(label, (rank,), "inject", one) for one in inject]
        turn = itertools.cycle(size.kinds)
        for number, label, when in (
            (size.leftovers, "SIGKILL while the rest of an earlier save is removed", "first save"),
            (size.evaluation, "SIGKILL in an evaluation", "evaluation"),
            (size.training, "SIGKILL at a random moment of the training", "training"),
            (size.both, "SIGKILL of all ranks at a random moment of the training", "training"),
            (size.start, "SIGKILL at a random moment of the start", "start"),
            (size.end, "SIGKILL after the last step", "end"),
        ):
            for _ in range(number):
                kind = next(turn)
                rank = rng.randrange(kind.ranks)
                who = tuple(range(kind.ranks)) if "all ranks" in label else (rank,)
                inject = {
                    "first save": (("die_in_save", rng.randint(1, 20)), ("rank", rank)),
                    "evaluation": (("die_in_evaluation", rng.randint(1, 8)), ("rank", rank)),
                }.get(when, ())
                plan[kind].append(Blow(label, who, "inject" if inject else when, inject))
        places = [
            (kind, i) for kind in plan for i, blow in enumerate(plan[kind]) if kind.ranks == 2 == len(blow.who) + 1
        ]
        for kind, i in rng.sample(places, size.alone):
            plan[kind][i] = replace(plan[kind][i], alone=True)
        for blows in plan.values():
            rng.shuffle(blows)
        return plan

    def launched_kills(self) -> list[Blow]:
        early = [Blow("deepspeed: SIGKILL of launch.py or the runner before the ranks listen", (who,), "import")
                 for who in ("launch.py", "runner")]  # fmt: skip
        late = [Blow(f"deepspeed: SIGKILL of {'a rank' if 'rank' in who else who}", (who,), "training")
                for who in ("rank 0", "launch.py", "rank 1", "runner", "rank 0", "rank 1") * 3]  # fmt: skip
        return (early + late)[: self.size.launched_kills]

    def signals(self) -> list[Blow]:
        blows = []
        saves = (("die_in_save", 12), ("save", 2))
        passes = (("die_in_evaluation", 2),)
        for number, whens in ((TERM, ("training", saves)), (USR1, ("opened", passes)), (INT, ("end", saves))):
            for when, rank in itertools.product(whens, (0, 1)):
                name = signal.Signals(number).name
                inject = () if isinstance(when, str) else (*when, ("rank", rank), ("signal", number))
                blows.append(Blow(f"{name} to a rank", (rank,), "inject" if inject else when, inject, number))
        blows += [Blow("a STOP file", ("STOP",), when) for when in ("training", "saved", "opened", "training")]
        self.rng.shuffle(blows)
        return blows[: self.size.signals]

    def launched_signals(self) -> list[Blow]:
        told = [(TERM, "launch.py"), (INT, "launch.py"), (USR1, "launch.py"), (TERM, "runner"), (INT, "runner")]
        told.append((INT, "all"))  # as a terminal does
        blows = [Blow(f"deepspeed: {signal.Signals(n).name} to {who}", (who,), "training", number=n) for n, who in told]
        return blows[: self.size.launched_signals]

    def run(self) -> None:
        size, book = self.size, self.book
        book.planned = 1.0 * COST["undisturbed"] * len(size.kinds)
        self.make_undisturbed()
        kills, asked = self.kills(), self.signals()
        launched = {"kills": self.launched_kills(), "signals": self.launched_signals()}
        number = sum(map(len, kills.values()))
        chains = sum(-(-len(blows) // 10) for blows in kills.values()) + 7
        book.planned += number * COST["kill"] + len(asked) * COST["stop"] + chains * COST["finish"]
        book.planned += sum(map(len, launched.values())) * COST["launched"] + size.disks * COST["disk"]
        book.planned += size.resumes * COST["resume"] + 5

        for kind, blows in kills.items():
            self.chains(kind, blows, self.kill, "kills", "kill")
        self.check_points()
        main = [kind for kind in size.kinds if kind in (SYNC, ASYNC)]
        for i, kind in enumerate(main):
            self.chains(kind, asked[i :: len(main)], self.ask_to_stop, "signals", "stop")
        for kind in size.damaged_kinds:
            self.damage(kind, size.damaged)
        self.resume_damaged(size.damaged_kinds, size.resumes)
        self.fill_disks(size.disks)
        for family, blows in launched.items():
            for i, kind in enumerate(main):
                self.chains(kind, blows[i :: len(main)], self.launched, family, "launched")


EXPECTED = {
    "kills": "announced checkpoints kept; goes on from the newest; nothing left running",
    "signals": "codes 75; the last applied step saved; metrics complete",
    "damaged": "passed over with a word that names the file",
    "full_disks": "code 1 on all ranks, one message with the reason; earlier checkpoints kept; goes on with space",
}
DAMAGES = {
    "truncated": "damaged: a file truncated",
    "flipped": "damaged: one bit flipped",
    "deleted": "damaged: a file deleted",
    "replaced": "damaged: a file replaced by another step's",
}


def device() -> str:
    names = re.findall(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.M)
    return f"{len(os.sched_getaffinity(0))} CPU cores, {names[0] if names else 'unknown'}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    # A shell's background job ignores SIGINT, and so would the processes that it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    print(f"`python benchmarks/faults.py{' --quick' * given.quick} --seed {given.seed}`\n\n{device()}  ")
    print(", ".join(f"{name} {version}" for name, version in versions().items()), end="\n\n", flush=True)
    root = Path(tempfile.mkdtemp(prefix="faults-"))
    with Nursery() as nursery:
        campaign = Campaign(root, nursery, random.Random(given.seed), QUICK if given.quick else Size())
        campaign.run()
    book = campaign.book
    print(f"{book.table()}\n\n{duration(time.monotonic() - book.began)}\n\n{book.verdict()}")
    failed = any(book.counts[name] for name in ("wrong", "hangs", "lost"))
    if failed:
        print(f"logs and checkpoints: {root}", file=sys.stderr)
    else:
        shutil.rmtree(root)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
