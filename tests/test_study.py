"""The study: its arms differ in what their names say, its corpus is plain and distinct text, its table is kept."""

import json
import shutil

import pytest
from conftest import ROOT, script

from prosparse import checkpoint, schedule
from prosparse.cli import compose
from prosparse.records import read_run
from runs import a_measurement, a_run

study, corpus = script("study"), script("corpus")
PAGE = b"""<html><head><title>Not read</title></head><body><nav>Home</nav><h1>Pipes</h1>
<p>A pipe <b>joins</b>\n two programs.</p><pre>ls |\n  wc</pre><script>run()</script>
<ul><li>one<li>two &amp; three</ul><!-- no --></body></html>"""


@pytest.mark.parametrize("scale", ["cpu", "gpu_short"])
def test_arms_of_a_scale_have_the_same_tokens_rows_and_learning_rate(scale):
    def shared(arm):
        config = compose("train", [*study.overrides(arm, scale, 1), "run_dir=x", "data.sources.files.path=y"])
        recipe, recovered = config.recipe, config.recipe.recover.steps
        steps = sum(stage.steps for stage in recipe.stages.values()) + recovered
        batches = {schedule.batch_at(recipe, span.first) for span in schedule.spans(recipe)}
        return steps, batches, recipe.batch, recipe.lr, recipe.optimizer, config.model, config.data, config.seed

    assert all(shared(arm) == shared("silu_continued") for arm in study.ARMS)


@pytest.mark.parametrize("arm", study.FORKS)
def test_an_arm_begins_from_the_run_that_it_is_up_to_a_stage_if_its_checkpoint_is_there(tmp_path, arm):
    stage = study.FORKS[arm]
    assert study.begun_from(tmp_path, arm, 1, []) == []
    kept = tmp_path / f"{study.BASE}-seed1" / "checkpoints" / "step-00000050"
    kept.mkdir(parents=True)
    manifest = {"format": checkpoint.FORMAT, "stage_end": stage}
    (kept / "manifest.json").write_text(json.dumps(manifest | {"xxh3_128": checkpoint._digest_of(manifest)}))
    assert study.begun_from(tmp_path, arm, 1, []) == [f"fork={tmp_path / study.BASE}-seed1@{stage}"]
    assert study.begun_from(tmp_path, arm, 0, []) == study.begun_from(tmp_path, study.BASE, 1, []) == []
    assert study.begun_from(tmp_path, arm, 1, ["threads=1", "recipe.lr.peak=1e-4"]) == []

    own = tmp_path / f"{arm}-seed1" / "checkpoints" / "step-00000025"  # it has begun otherwise, and goes on
    own.mkdir(parents=True)
    assert study.begun_from(tmp_path, arm, 1, []) == []

    def lived_through(arm):
        recipe = compose("train", [*study.overrides(arm), "run_dir=x", "data.sources.files.path=y"]).recipe
        last = schedule.last_step(recipe, stage)
        return schedule.history(recipe, last), [schedule.learning_rate(recipe, step) for step in range(1, last + 1)]

    assert lived_through(arm) == lived_through(study.BASE)


def test_the_cpu_scale_has_a_million_tokens():
    config = compose("train", [*study.overrides("progressive_shift"), "run_dir=x", "data.sources.files.path=y"])
    assert schedule.total_tokens(config.recipe) == 1_024_000


def test_what_is_unknown_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match="arm=swish: give one of silu_continued, relu_only"):
        study.main(f"out={tmp_path}", "corpus=x", "arm=relu_only,swish")
    with pytest.raises(ValueError, match="report does not know corpus=x: it reads out=, earlier="):
        study.main("report", f"out={tmp_path}", "corpus=x")
    with pytest.raises(ValueError, match=r"earlier=none\.json: no results\.json of a study; give one"):
        study.main("report", f"out={tmp_path}", "earlier=none.json")
    for given in (["corpus=x"], ["corpus=hub://x", "wikitext=x"]):
        with pytest.raises(ValueError, match=rf"{given[-1][:-1]}.*/x does not exist: give a file"):
            study.main(f"out={tmp_path}", *given)
    with pytest.raises(ValueError, match="seed=one: give a whole number"):
        study.main(f"out={tmp_path}", "corpus=hub://x", "seed=one")
    with pytest.raises(ValueError, match="arm=thresholds: no arm that it cuts has ended"):
        study.main(f"out={tmp_path}", "corpus=hub://x", "arm=thresholds")
    assert not list(tmp_path.iterdir())


def test_an_arm_is_trained_measured_and_asked_once_and_cut_without_training(tiny, tmp_path):
    texts = [f"{number} {path.read_text()}" for path in tiny["text"].iterdir() for number in range(8)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    out, own = tmp_path / "out", ("model=hf", f"model.source={tiny['model']}", "threads=1", "scale=smoke")
    asked = (f"out={out}", f"corpus={tmp_path / 'corpus.jsonl'}", *own)
    study.main(*asked, "arm=silu_continued")
    made = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    study.main(*asked, "arm=silu_continued")
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == made
    with pytest.raises(ValueError, match=r"silu_continued was trained with recipe\.lr\.peak=0.0003, not 0.0009"):
        study.main(*asked, "arm=silu_continued", "recipe.lr.peak=9e-4")
    run = read_run(out / "silu_continued")
    assert run.status == "finished" and not (run.folder / "checkpoints").exists()
    assert all(study.complete(out / kind / "silu_continued") for kind in ("measured", "tasks"))

    study.main(*asked, "arm=magnitude")
    whole, *cut = json.loads((out / "cuts" / "silu_continued.json").read_text())["points"]
    assert whole["perplexity"] == pytest.approx(run.models["trained"]["perplexity"], rel=1e-3)
    assert whole["sparsity"] < 0.01 and len(list((out / "cuts").iterdir())) == 1
    assert [point["sparsity"] for point in cut] == pytest.approx(study.GRID, abs=0.05)

    shutil.copytree(out / "silu_continued", out / "relu_only")  # as if it had been trained with ReLU
    (out / "relu_only" / "model" / "config.json").write_text(
        (run.folder / "model" / "config.json").read_text().replace('"silu"', '"relu"')
    )
    study.main(*asked, "arm=thresholds")
    file = out / "cuts" / "relu_only.json"
    whole = file.read_bytes()
    file.write_text(json.dumps({"points": json.loads(whole)["points"][:2]}))  # stopped in between
    study.main(*asked, "arm=thresholds")
    assert file.read_bytes() == whole
    cut = json.loads((out / "cuts" / "relu_only.json").read_text())["points"]
    assert [point["cut"] for point in cut[:2]] == ["threshold 0.05005", "threshold 0.1001"]
    assert 0.2 < cut[0]["sparsity"] < cut[1]["sparsity"] < cut[-1]["sparsity"]


def test_arms_are_reported_as_multiples_of_the_matched_control(tmp_path):
    for name, control, seed in (("silu_continued", "silu_continued", 0), ("relu_only", "relu_only", 0)):
        a_run(tmp_path / name, control, seed=seed)
    a_run(tmp_path / "progressive_shift")
    a_run(tmp_path / "progressive_shift-seed1", seed=1)
    for folder in ("measured", "cuts"):
        (tmp_path / folder).mkdir()
    a_measurement(tmp_path / "measured" / "progressive_shift", str(tmp_path / "progressive_shift"), 22, 0.7)
    recovered = tmp_path / "progressive_shift_recover" / "report" / "report.json"
    a_run(recovered.parents[1])
    told = json.loads(recovered.read_text())
    told["models"]["recovered"] = told["models"]["shifted"]
    told["models"]["trained"] = told["models"]["trained"] | {"step": 8}  # its recovery are the last steps
    recovered.write_text(json.dumps(told))
    point = {"cut": "x1 quantile 0.5", "sparsity": 0.5, "perplexity": 24.0}
    (tmp_path / "cuts" / "silu_continued.json").write_text(json.dumps({"points": [point]}))
    study.main("report", f"out={tmp_path}")
    results = json.loads((tmp_path / "results.json").read_text())
    rows = {(row["arm"], row["seed"], row["model"]): row for row in results["rows"]}
    assert rows["silu_continued", 0, "trained"]["x_control"] == 1
    assert rows["progressive_shift", 0, "shifted"]["x_control"] == 22 / 16
    assert rows["progressive_shift_recover", 0, "trained"]["x_control"] is None
    assert rows["progressive_shift_recover", 0, "recovered"]["x_control"] == 22 / 16
    assert rows["progressive_shift", 0, "shifted"]["texts"] == {"code": 21, "wiki": 23}
    assert rows["progressive_shift", 1, "shifted"]["x_control"] is None  # another seed has no control of its own
    assert any("seed 1 and 0" in note for note in results["notes"])
    assert results["cuts"][0]["x_control"] == 1.5 and results["cuts"][0]["arm"] == "silu_continued"
    assert rows["progressive_shift", 0, "shifted"]["x_relu_only"] == 22 / rows["relu_only", 0, "trained"]["perplexity"]
    page = (tmp_path / "results.md").read_text()
    assert "| relu_only | trained | 0 | 12,288 |" in page and "| drelu | not measured |" in page
    assert page == study.table(results) and (tmp_path / "frontier.png").stat().st_size > 0

    # elsewhere one arm is repeated and others are added: beside the earlier results
    other = tmp_path / "other"
    a_run(other / "relu_only", "relu_only")
    a_run(other / "drelu")
    a_run(other / "target_89", tokens=6144)  # on fewer tokens: not matched
    study.main("report", f"out={other}", f"earlier={tmp_path / 'results.json'}")
    both = json.loads((other / "results.json").read_text())
    added = {(row["arm"], row["seed"], row["model"]): row for row in both["rows"]}
    assert both["repeated"] == ["relu_only 0: the same numbers as earlier"] and both["cuts"] == results["cuts"]
    assert {each: added[each] for each in rows} == rows
    assert added["drelu", 0, "trained"]["x_control"] == 21 / 16
    assert added["target_89", 0, "trained"]["x_control"] is None
    assert "matched with the earlier silu_continued by rows and tokens, not by config: drelu" in both["notes"]
    assert "| drelu | trained | 0 | 12,288 |" in (other / "results.md").read_text()

    # a repeat that differs stands in place of the earlier rows and cuts
    a_run(tmp_path / "single" / "relu_only", "relu_only")
    single = study.collect(tmp_path / "single")
    earlier = {**results, "notes": [], "cuts": [results["cuts"][0] | {"arm": "relu_only"}]}
    earlier["rows"] = [row | {"perplexity": 99} if row["arm"] == "relu_only" else row for row in results["rows"]]
    both = study.joined(single, earlier)
    assert both["repeated"] == ["relu_only 0: trained perplexity 8.4e-01 apart from earlier"] and not both["cuts"]
    near = {"perplexity": 16 + 1.6e-7}
    earlier["rows"] = [row | near if row["arm"] == "relu_only" else row for row in results["rows"]]
    both = study.joined(single, earlier)
    assert both["repeated"] == ["relu_only 0: trained perplexity 1.0e-08 apart from earlier"] and both["cuts"]
    with pytest.raises(ValueError, match="earlier=: dtype bf16 there, fp32 in out="):
        study.joined(results | {"conditions": results["conditions"] | {"dtype": "fp32"}}, results)


def test_pages_become_plain_text():
    assert corpus.text_of_html(PAGE) == "Pipes\n\nA pipe joins two programs.\n\nls |\n  wc\n\n- one\n\n- two & three\n"
    assert corpus.text_of_html(b"") == ""


def test_lines_that_many_pages_share_are_left_out():
    pages = [f"Manual\nChapter {number}\nNext: more\n" for number in range(20)]
    assert corpus.without_navigation(pages) == [f"Chapter {number}\n" for number in range(20)]
    assert corpus.without_navigation(pages[:4]) == pages[:4]


def test_documents_are_kept_once_and_up_to_the_size():
    texts = ["word " * 200, "Word\n" * 200, "short", "other " * 200, "long " * 200_000]
    documents = [corpus.Document(text, f"a/{number}") for number, text in enumerate(texts)]
    kept, left_out = corpus.chosen(documents, 10_000)
    assert sorted(document.origin for document in kept) == ["a/0", "a/3"]
    assert left_out == {"too short": 1, "too long": 1, "met before": 1}
    kept, left_out = corpus.chosen(documents, 1_500)
    assert len(kept) == 1 and left_out["beyond the size"] == 1


def test_a_corpus_is_the_same_in_whatever_order_its_documents_come(tmp_path):
    documents = [corpus.Document(f"text {number}\n", f"{'ab'[number % 2]}/{number}") for number in range(6)]
    one = corpus.write(tmp_path / "one", documents, {"versions": {"a": "1.0"}})
    two = corpus.write(tmp_path / "two", documents[::-1], {"versions": {"a": "1.0"}})
    assert (
        one == two and one["documents"] == 6 and one["sources"]["a"] == {"version": "1.0", "documents": 3, "bytes": 21}
    )
    assert (tmp_path / "one" / "corpus.jsonl").read_bytes() == (tmp_path / "two" / "corpus.jsonl").read_bytes()


def test_sources_of_an_installed_package_are_read_without_its_tests():
    found = [document.origin for document in corpus.python("hydra-core")]
    assert "hydra-core/hydra/main.py" in found and not any("/test" in origin for origin in found)


def test_the_table_on_the_page_is_that_of_the_figures_kept_beside_it():
    results = json.loads((ROOT / "benchmarks" / "study_cpu.json").read_text())
    assert study.table(results) in (ROOT / "docs" / "results.md").read_text()
