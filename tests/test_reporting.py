"""What is said of runs is what was measured, side by side only where that is fair, and marked where it is not whole."""

import base64
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread

from prosparse import plotting
from prosparse.cli import compose, main
from prosparse.records import differences, label, read_results, read_run, read_runs, stages
from prosparse.reporting import compare, plain, table, tables, write, write_report
from prosparse.telemetry import Metrics
from runs import A_TASK, SOURCE, a_measurement, a_report, a_run, a_shift, a_shift_result, an_evaluation, model


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch):
    monkeypatch.setattr(plotting, "DOTS_PER_INCH", 40)


@pytest.fixture
def report():
    return a_report()


@pytest.fixture
def run_dir(tmp_path):
    return a_run(tmp_path / "demo")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def cells(rows, *keys):
    return [tuple(row[key] for key in keys) for row in rows]


# --- the report of one training ---------------------------------------------------------------------------------------

FILES = ["README.md", "frontier.png", "index.html", "layers.png", "report.json", "shift.png"]
FILES += ["thresholds.png", "training.png"]


def test_a_report_is_strict_json_a_page_a_card_and_five_plots(run_dir, report, monkeypatch):
    monkeypatch.setattr(plotting, "DOTS_PER_INCH", 130)
    folder = write_report(run_dir, report)
    assert folder == run_dir / "report"
    assert names(folder) == FILES
    written = json.loads((folder / "report.json").read_text(), parse_constant=pytest.fail)
    assert written["models"] == report["models"]
    assert written["shift"]["sweep"][2]["perplexity"] is None
    assert sorted(written["files"]) == FILES
    for path in folder.glob("*.png"):
        image = imread(path)
        assert min(image.shape[:2]) > 500
        assert len(np.unique(image[..., :3].reshape(-1, 3), axis=0)) > 50, path.name


def test_a_run_that_stopped_early_has_the_plots_of_its_data_and_none_of_an_earlier_report(run_dir, report):
    write_report(run_dir, report)
    (run_dir / "metrics.jsonl").unlink()
    del report["shift"], report["export"]
    for name in ("substituted", "trained", "shifted", "exported"):
        del report["models"][name]
    assert names(write_report(run_dir, report)) == ["frontier.png", "index.html", "layers.png", "report.json"]
    report["models"]["base"] |= {"sparsity_by_layer": None, "perplexity": None}
    assert names(write_report(run_dir, report)) == ["index.html", "report.json"]


def test_the_table_shows_every_model_present_with_its_conditions(report):
    report["tokens_trained"] = 1_228_800
    text = table(report)
    caption, trained, *rest = text.splitlines()
    assert caption == "stdlib, held out, 32,768 tokens measured, bf16, 2 CPU ranks"
    assert trained == "trained on 1,228,800 tokens in 8 min 10 s"
    assert [line.split() for line in rest if line.split(" ")[0] in report["models"]] == [
        ["base", "20.000", "1.0000", "5.00", "%", "-"],
        ["substituted", "4000.000", "200.0000", "50.00", "%", "-"],
        ["trained", "21.000", "1.0500", "71.20", "%", "-"],
        ["shifted", "22.000", "1.1000", "73.45", "%", "0.02"],
        ["exported", "22.000", "1.1000", "73.45", "%", "0.02"],
    ]
    assert text.endswith("\n\nnote: made for a test")


FOLDED = {"threshold": 0.0625, "silenced": 3}


def test_thresholds_by_neuron_are_named_by_neuron_until_they_are_folded_into_another(run_dir, report):
    report["shift"] |= {"granularity": "neuron", "folded": FOLDED}
    report["export"] |= {"param": 0.0625}
    told = {line.split()[0]: line.split("%")[1].strip() for line in table(report).splitlines() if line[5:].count("%")}
    assert (told["trained"], told["shifted"], told["exported"]) == ("-", "by neuron", "0.0625")
    rows, _ = compare([read_run(run_dir, report=report)])
    assert cells(rows[-2:], "model", "activation") == [("shifted", "fatrelu by neuron"), ("exported", "fatrelu 0.0625")]


def test_the_table_of_a_control_names_it_and_leaves_out_what_is_missing(report):
    report |= {"control": "silu_continued", "shift": None, "notes": []}
    report["models"] = {"base": model(20.0, 0.05), "trained": model(float("nan"), 0.06) | {"tokens": 1024}}
    text = table(report)
    assert "control: silu_continued" in text
    assert "1,024 to 32,768 tokens measured" in text
    assert text.splitlines()[-1].split() == ["trained", "-", "-", "6.00", "%", "-"]


def test_a_report_of_a_report_says_the_same(run_dir):
    first = write(read_runs([str(run_dir)]), run_dir / "report")
    assert write(read_runs([str(run_dir)]), run_dir / "report") == first


def test_a_stage_has_the_factor_step_and_tokens_that_it_reached(run_dir):
    keys = ("stage", "l1_factor", "last_step", "tokens")
    assert cells(stages(read_run(run_dir)), *keys) == [
        ("substitution", 4 / 24, 4, 4096),
        ("rise", 8 / 24, 8, 4096),
        ("settle", 12 / 24, 12, 4096),
    ]


def test_tokens_of_steps_without_rows_are_not_those_of_a_later_stage(run_dir):
    path = run_dir / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    kept = [row for row in rows if row["kind"] != "train" or not 3 <= row["step"] <= 5]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in kept))
    assert cells(stages(read_run(run_dir)), "tokens") == [(2048,), (None,), (4096,)]
    speed = {"tokens_per_second": 512.0, "step_seconds": 2.0}
    path.write_text("".join(f"{json.dumps(row | speed)}\n" for row in kept))
    assert cells(stages(read_run(run_dir)), "tokens") == [(2048,), (3072,), (4096,)]


@pytest.mark.parametrize("where", ["config.yaml", "the manifest"])
def test_a_run_that_went_on_from_elsewhere_is_whole_without_the_steps_before(run_dir, where):
    path = run_dir / "metrics.jsonl"
    lines = [line for line in path.read_text().splitlines() if json.loads(line)["step"] > 6]
    path.write_text("\n".join(lines) + "\n")
    assert "lacks 6 of 12 steps" in read_run(run_dir).problems[0]
    config, saved = run_dir / "config.yaml", run_dir / "checkpoints" / "step-00000012"
    if where == "config.yaml":
        config.write_text(config.read_text() + "resume: runs/other/checkpoints/step-6\n")
    else:  # config.yaml is that of the last start, which went on by itself
        saved.mkdir(parents=True)
        (saved / "manifest.json").write_text('{"origin": "resume runs/other/checkpoints/step-6"}')
    record = read_run(run_dir)
    assert record.status == "finished"
    told = tables([record], write([record], run_dir / "out"))[1]
    assert told.notes[1].startswith("from step 7 on: the run went on from runs/other/checkpoints/step-6")
    path.write_text("\n".join(lines[:2] + lines[3:]) + "\n")
    assert "lacks 1 of 12 steps (9)" in read_run(run_dir).problems[0]


# --- several runs -----------------------------------------------------------------------------------------------------


def test_a_ratio_to_the_control_stands_only_where_tokens_text_and_seed_are_equal(tmp_path):
    folders = [
        a_run(tmp_path / "sparse"),
        a_run(tmp_path / "silu", control="silu_continued"),
        a_run(tmp_path / "longer", tokens=24576),
        a_run(tmp_path / "other_text", digest="b"),
        a_run(tmp_path / "other_seed", seed=1),
    ]
    records = read_runs([str(folder) for folder in folders])
    rows, notes = compare(records)
    assert cells([row for row in rows if row["x_control"] is not None], "run", "model", "x_control") == [
        ("sparse", "trained", 21 / 16),
        ("sparse", "shifted", 22 / 16),
        ("sparse", "exported", 22 / 16),
        ("silu", "trained", 1.0),
    ]
    assert [row["run"] for row in rows if row["model"] == "base"] == [None]  # the same base once
    assert notes == [
        "longer is not matched with silu: tokens trained 24,576 and 12,288",
        "other_text is not matched with silu: other rows of text (digests differ)",
        "other_seed is not matched with silu: seed 1 and 0",
    ]
    assert all(
        note in (tmp_path / "out" / "index.html").read_text() for note in notes if write(records, tmp_path / "out")
    )


def test_without_a_control_the_table_says_that_the_cost_is_not_told_and_what_differs(tmp_path):
    records = [read_run(a_run(tmp_path / "a")), read_run(a_run(tmp_path / "b", tokens=6144))]
    rows, notes = compare(records)
    assert {row["x_control"] for row in rows} == {None}
    assert "no silu_continued run" in notes[0]
    assert notes[1] == "b is not matched with a: tokens trained 6,144 and 12,288"


def test_without_digests_texts_are_compared_by_their_keys_and_that_is_said(tmp_path):
    a, b = (
        read_run(a_run(tmp_path / name, control=c, digest=None)) for name, c in (("a", "none"), ("b", "silu_continued"))
    )
    a.report["rows_digest"] = None
    assert differences(a, b) == []
    assert "by its path" in compare([a, b])[1][0]
    b.config["data"]["sources"]["code"]["path"] = "corpus"
    assert differences(a, b) == ["data.sources.code.path stdlib and corpus"]


def test_measurements_and_evaluations_stand_beside_their_runs_and_the_base(tmp_path):
    sparse, silu = a_run(tmp_path / "sparse"), a_run(tmp_path / "silu", control="silu_continued")
    records = read_runs([str(sparse), str(silu)])
    paths = [
        a_measurement(tmp_path / "m1", "runs/sparse", 24.0, 0.7),
        a_measurement(tmp_path / "m2", str(silu / "model"), 18.0, 0.0),
        a_measurement(tmp_path / "m3", SOURCE, 20.0, 0.0),
        a_measurement(tmp_path / "m4", f"{sparse}/checkpoints/step-00000008", 30.0, 0.6),
        an_evaluation(tmp_path / "e", "runs/sparse/model", complete=False),
    ]
    measured, evaluated = read_results([str(path) for path in paths], records)
    rows, _ = compare(records, measured)
    keys = ("run", "model", "tokens_trained", "x_base", "x_control")
    assert cells(rows[-4:], *keys) == [
        ("sparse", "exported (measured)", 12288, 24 / 20, 24 / 18),
        ("silu", "exported (measured)", 12288, 18 / 20, 1.0),
        (None, "base (measured)", None, 1.0, None),
        ("sparse", "step 8 (measured)", 8192, 30 / 20, None),
    ]
    result = write(records, tmp_path / "out", measured, evaluated)
    assert {"texts.png", "top_k.png", "union.png"} <= set(result["files"])
    told = {made.title: plain(made) for made in tables(records, result)}
    assert "measured b: 32,768 tokens, code (stdlib), held-out 2 %; wiki (wiki.txt), bf16, cpu" in told["Models"]
    assert re.search(r"sparse, exported +wiki +16,384 +70.00 % +25.000 +290.5", told["Measurements by text"])
    assert re.search(r"sparse, exported +code +16,384 +1 % +0.13 +85.00 %", told["CETT-PPL"])
    assert re.search(r"arc_easy +acc +0.3125", told["Tasks"]) and "incomplete, without piqa" in told["Tasks"]
    assert re.search(r"arc_easy +sparsity +70.00 %", told["Tasks"]) and re.search(
        r"prosparse +average +-", told["Tasks"]
    )


def test_a_measurement_of_a_run_folder_is_of_the_model_that_was_opened(run_dir):
    record = read_run(run_dir)
    for opened, told in [
        (f"/elsewhere/{run_dir.name}/model", "exported"),
        (str(run_dir / "checkpoints" / "step-00000008"), "step 8"),
        (None, "of an unknown step"),  # a result from before it was written down
    ]:
        assert label("runs/demo", [record], opened) == {"run": "demo", "model": told}
    assert label("runs/demo/model", [record])["model"] == "exported"


def test_a_model_is_not_said_to_have_risen_over_a_base_that_began_its_rows_otherwise(run_dir, tmp_path):
    paths = [a_measurement(tmp_path / "base", SOURCE, 20.0, 0.0), a_measurement(tmp_path / "m", "runs/demo", 24.0, 0.7)]
    records = [read_run(run_dir)]
    for bos, ratio in (("auto", 1.2), ("none", None)):
        result = json.loads((paths[1] / "result.json").read_text())
        (paths[1] / "result.json").write_text(json.dumps(result | {"bos": bos}))
        base = json.loads((paths[0] / "result.json").read_text()) | {"bos": "auto"}
        (paths[0] / "result.json").write_text(json.dumps(base))
        measured, _ = read_results([str(path) for path in paths], records)
        assert compare(records, measured)[0][-1]["x_base"] == ratio


def test_shifts_by_layer_and_neuron_stand_side_by_side_on_the_scale_of_their_budget(run_dir, tmp_path):
    records = [read_run(run_dir)]
    paths = [str(a_shift_result(tmp_path / name, name)) for name in ("layer", "neuron")]
    measured, _ = read_results(paths, records)
    records[0].report["shift"] = None
    figure = plotting.thresholds(records, measured)
    (axes,) = figure.axes
    lines = {tuple(line.get_xydata()[-1]): line for line in axes.lines if line.get_ls() != "None"}
    told = [text.get_text() for text in figure.legends[0].get_texts()]
    assert told == [
        "layer, of the whole model",
        "layer, by layer",
        "neuron, by neuron",
        "budget 1 %",
    ]  # the same sweep once
    own = [line for line in lines.values() if line.get_marker() in "ov*"]
    assert len({line.get_color() for line in own}) == len({line.get_marker() for line in own}) == 3
    assert own[0].get_xydata()[1] == pytest.approx((75, 0.5)) and axes.get_ylim()[1] < 4
    result = write(records, tmp_path / "out", measured)
    assert "thresholds.png" in result["files"] and "shift.png" not in result["files"]
    row = cells(result["table"][-1:], "model", "activation", "sparsity", "perplexity", "text")[0]
    assert row[0].endswith("neuron (measured)") and row[1:4] == ("fatrelu 0.0625", 0.82, 20.2)
    assert row[4] == "stdlib (calibration rows)"
    assert len(result["figures"]["thresholds.png"]["sources"]) == 2


def test_a_sweep_by_neuron_has_another_color_than_that_of_the_whole_model_on_the_frontier(run_dir, report):
    report["shift"] = a_shift("neuron")
    (axes,) = plotting.frontier([read_run(run_dir, report=report)]).axes
    assert len({line.get_color() for line in axes.lines if len(line.get_xdata()) > 1}) == 2


@pytest.mark.parametrize("number", [1, 3, 9])
def test_legends_lie_within_their_figures_and_no_label_on_another(tmp_path, number):
    folders = [a_run(tmp_path / f"a_run_of_{i}", "silu_continued" if i == 1 else "none") for i in range(number)]
    records = read_runs([str(folder) for folder in folders])
    paths = [a_measurement(tmp_path / f"m{i}", str(folder), 20.0, 0.7) for i, folder in enumerate(folders)]
    measured, _ = read_results([str(path) for path in paths], records)
    drawn = [draw(records) for draw in (plotting.training, plotting.frontier, plotting.layers, plotting.shift)]
    drawn.append(plotting.thresholds(records, measured))
    drawn += [draw(measured) for draw in (plotting.texts, plotting.top_k, plotting.union)]
    for figure in drawn:
        FigureCanvasAgg(figure).draw()
        panels = [axes.get_tightbbox() for axes in figure.axes]
        boxes = panels + [legend.get_window_extent() for legend in figure.legends]
        for box in boxes:
            assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 + 1
            assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1 + 1
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
        for legend in figure.legends:
            texts = [text.get_window_extent() for text in legend.get_texts()]
            assert not any(a.padded(-2).overlaps(b.padded(-2)) for i, a in enumerate(texts) for b in texts[:i])


# --- the page ---------------------------------------------------------------------------------------------------------


class Links(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for key, value in attributes if key in ("src", "href", "srcset", "action", "data")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_stands_alone_with_every_picture_and_its_conditions(run_dir, report):
    report["text"] = "<stdlib> & more"
    folder = write_report(run_dir, report)
    text = (folder / "index.html").read_text()
    page = Links(text)
    assert page.open == [] and not {"script", "link", "iframe"} & set(page.tags)
    assert not re.search(r"url\(|@import|https?://", text)
    pictures = [
        base64.b64decode(address.removeprefix("data:image/png;base64,"), validate=True) for address in page.addresses
    ]
    assert pictures == [
        (folder / name).read_bytes()
        for name in ("frontier.png", "training.png", "layers.png", "shift.png", "thresholds.png")
    ]
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", text, re.DOTALL)
    assert len(captions) == 5
    for caption in captions:
        for part in ("tokens", "bf16", "2 CPU ranks", "<code>prosparse train experiment=demo</code>"):
            assert part in caption
    assert "&lt;stdlib&gt; &amp; more" in text and "<stdlib>" not in text


# --- what is not whole ------------------------------------------------------------------------------------------------


def damage(run_dir, how):
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    if how == "a broken line":
        lines[6] = lines[6][:20] + "\n"
    elif how == "half of the file":
        lines = [*lines[:8], lines[8][:30]]
    elif how == "nothing left":
        lines = []
    elif how == "a row without its keys":
        lines[6] = '{"kind": "train"}\n'
    elif how == "a row without a step":
        lines[6] = lines[6].replace('"step": 5', '"step": null')
    elif how == "an empty line":
        lines[6] = "\n"
    path.write_text("".join(lines))
    config, report = run_dir / "config.yaml", run_dir / "report" / "report.json"
    if how == "a config cut off in a stage":
        config.write_text(config.read_text().split("  rise:")[0] + "  rise:\n")
    elif how == "a recipe that is a number":
        config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | {"recipe": 3}))
    elif how == "an empty report":
        report.write_text("{}")
    elif how == "a report without a model's tokens":
        report.write_text(report.read_text().replace('"tokens": 32768', '"tokens": null', 1))
    if how == "no metrics":
        path.unlink()
    elif how == "no config":
        (run_dir / "config.yaml").write_text("a: [")
    elif how == "a broken report":
        (run_dir / "report" / "report.json").write_text('{"models": {')


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("a broken line", "line 7 is not JSON"),
        ("half of the file", "lacks 6 of 12 steps (7 to 12)"),
        ("nothing left", "lacks 12 of 12 steps"),
        ("no metrics", "lacks 12 of 12 steps"),
        ("a row without its keys", "1 lines lack keys"),
        ("a row without a step", "1 lines lack keys"),
        ("an empty line", "line 7 is not JSON"),
        ("no config", "config.yaml cannot be read"),
        ("a config cut off in a stage", "config.yaml cannot be read (data holds no mapping)"),
        ("a recipe that is a number", "config.yaml cannot be read (recipe holds no mapping)"),
        ("an empty report", "report.json could not be read (it lacks text,"),
        ("a report without a model's tokens", "report.json could not be read (it lacks base)"),
        ("a broken report", "report.json could not be read"),
    ],
)
def test_a_damaged_run_is_shown_as_far_as_it_goes_and_marked_each_time(run_dir, capsys, how, told):
    damage(run_dir, how)
    for _ in range(2 if "report" in how else 1):  # the first must not hide the damage from the second
        assert main(["report", f"runs=[{run_dir}]"]) == 1
        assert told in capsys.readouterr().err.splitlines()[-1]
        result = json.loads((run_dir / "report" / "report.json").read_text())
        assert result["incomplete"] and told in result["problems"][0] + result["problems"][-1]
        assert result["models"]["base"]["perplexity"] == 20.0 if how != "nothing left" else True
        page = (run_dir / "report" / "index.html").read_text()
        assert '<div class="warning"><strong>demo: incomplete</strong>' in page and told in page
        assert any(row["status"] == "incomplete" for row in result["table"])


def test_figures_that_are_not_finite_end_no_report(run_dir, report, tmp_path):
    report["models"]["trained"] |= {"perplexity": None, "sparsity": None, "sparsity_by_layer": [None, 0.5]}
    report["tasks"] = {"base": {"piqa": A_TASK | {"sparsity": None}}}
    path = a_measurement(tmp_path / "m", "runs/demo", 24.0, 0.7)
    result = json.loads((path / "result.json").read_text())
    result["cett"]["perplexity"] = result["sparsity"] = result["union"]["2"] = result["texts"]["code"]["sparsity"] = (
        None
    )
    (path / "result.json").write_text(json.dumps(result))
    records = [read_run(run_dir, report=report)]
    made = write(records, tmp_path / "out", *read_results([str(path)], records))
    assert {"layers.png", "texts.png", "union.png"} <= set(made["files"])
    assert "sparsity -" in table(report)


def test_a_run_that_has_not_ended_is_shown_and_marked(tmp_path, capsys):
    folder = a_run(tmp_path / "demo", ended=False)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tra')  # being written
    for _ in range(2):
        assert main(["report", f"runs=[{folder}]"]) == 0
        said = capsys.readouterr()
        result = json.loads(said.out.splitlines()[-1])
        assert (result["finished"], result["incomplete"]) == (False, False)
        assert cells(result["table"], "model", "tokens_trained")[-1] == ("training", 12288)
        assert "not finished, step 12 so far" in said.err
        assert "demo: not finished" in (folder / "report" / "index.html").read_text()
        assert not (folder / "report" / "README.md").exists()


def test_a_run_that_has_shifted_and_may_recover_is_not_finished(run_dir):
    path = run_dir / "report" / "report.json"
    report = json.loads(path.read_text())
    models = {name: made for name, made in report["models"].items() if name != "exported"}
    path.write_text(json.dumps(report | {"until": "shift", "export": None, "models": models}))
    for _ in range(2):  # the first must not hide it from the second
        record = read_run(run_dir)
        assert (record.status, record.last, record.report["command"]) == ("not finished", "shifted", report["command"])
        write([record], run_dir / "report")
    more = {"kind": "train", "step": 13, "stage": "recover", "tokens": 13312, "loss": 2.0, "sparsity": 0.7}
    Metrics(run_dir, 12).append(more)
    record = read_run(run_dir)
    assert (record.status, record.report["steps"], record.report["tokens_trained"]) == ("not finished", 13, 13312)
    assert record.report["shift"] == report["shift"] and not record.problems


def test_the_sweep_of_a_run_that_has_not_ended_is_in_its_rows(tmp_path):
    folder = a_run(tmp_path / "demo", ended=False)
    Metrics(folder, 12).append({"kind": "shift", "step": 12, **a_shift("neuron")})
    record = read_run(folder)
    assert {"shift.png", "thresholds.png"} <= set(write([record], folder / "report")["files"])
    assert record.report["shift"]["sweep"] == a_shift("neuron")["sweep"]


def test_what_cannot_be_reported_is_one_line_and_writes_nothing(tmp_path, run_dir, capsys):
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"
    for arguments, told in [
        ([f"runs=[{run_dir},{tmp_path}/empty]", f"out={out}"], "is no run folder (it has neither"),
        ([f"runs={tmp_path}/nowhere", f"out={out}"], "is no run folder (there is no such folder)"),
        ([f"runs=[{run_dir},{run_dir}]", f"out={out}"], "is named twice"),
        ([f"runs=[{run_dir},x]"], "out is missing"),
        (["runs=[]"], "runs is empty"),
        ([f"runs={run_dir}", f"measures=[{tmp_path}/empty]", f"out={out}"], "No such file"),
        ([f"runs={run_dir}", f"measures=[{run_dir}/report/report.json]", f"out={out}"], "no result of a verb"),
    ]:
        assert main(["report", *arguments]) == 2
        error = capsys.readouterr().err
        assert told in error and error.count("\n") == 1
    assert not out.exists()


def test_paths_are_taken_as_they_are():
    config = compose("report", ["runs=[runs/a b,~/x=1,it's]", "measures=m/1", "out=o p"])
    assert (config.runs, config.measures, config.out) == (["runs/a b", "~/x=1", "it's"], ["m/1"], "o p")
