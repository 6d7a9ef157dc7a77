import json

import numpy as np
import pytest
from matplotlib.image import imread

from prosparse.reporting import table, write_report
from prosparse.telemetry import Metrics


def model(perplexity, sparsity):
    by_layer = [sparsity - 0.05, sparsity + 0.05]
    return {"perplexity": perplexity, "sparsity": sparsity, "sparsity_by_layer": by_layer, "tokens": 32768}


@pytest.fixture
def report():
    sweep = [(0.02, 0.74, 20.2), (0.01, 0.72, 20.1), (0.08, 0.9, float("inf"))]
    return {
        "models": {
            "base": model(20.0, 0.05),
            "substituted": model(4000.0, 0.5),
            "trained": model(21.0, 0.712),
            "shifted": model(22.0, 0.7345),
            "exported": model(22.0, 0.7345),
        },
        "tokens_trained": 1_228_800,
        "seconds": 490.2,
        "text": "stdlib, held out",
        "device": "cpu",
        "dtype": "bf16",
        "command": "prosparse train",
        "notes": ["made for a test"],
        "control": "none",
        "shift": {
            "threshold": 0.02,
            "budget": 0.01,
            "sweep": [{"threshold": t, "sparsity": s, "perplexity": p} for t, s, p in sweep],
        },
    }


@pytest.fixture
def run_dir(tmp_path):
    metrics = Metrics(tmp_path, -1)
    metrics.append({"kind": "evaluation", "step": 0, "loss": 3.5, "sparsity": 0.5})
    for step in range(1, 13):
        stage = ("substitution", "rise", "settle")[(step - 1) // 4]
        loss = None if step == 5 else 5 - step / 10
        row = {"kind": "train", "step": step, "stage": stage, "loss": loss, "l1_factor": step / 10, "lr": 3e-4}
        metrics.append(row | {"sparsity": step / 20})
    metrics.append({"kind": "evaluation", "step": 12, "loss": 3.8, "sparsity": 0.6})
    return tmp_path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_report_is_strict_json_and_three_plots(run_dir, report):
    folder = write_report(run_dir, report)
    assert folder == run_dir / "report"
    assert names(folder) == ["layers.png", "report.json", "shift.png", "training.png"]
    written = json.loads((folder / "report.json").read_text(), parse_constant=pytest.fail)
    assert written["models"] == report["models"]
    assert written["shift"]["sweep"][2]["perplexity"] is None
    for path in folder.glob("*.png"):
        image = imread(path)
        assert min(image.shape[:2]) > 500
        assert len(np.unique(image[..., :3].reshape(-1, 3), axis=0)) > 50, path.name


def test_a_run_that_stopped_early_has_the_plots_of_its_data_and_none_of_an_earlier_report(run_dir, report):
    write_report(run_dir, report)
    (run_dir / "metrics.jsonl").unlink()
    del report["shift"]
    for name in ("substituted", "trained", "shifted", "exported"):
        del report["models"][name]
    assert names(write_report(run_dir, report)) == ["layers.png", "report.json"]
    report["models"]["base"]["sparsity_by_layer"] = None
    assert names(write_report(run_dir, report)) == ["report.json"]


def test_the_table_shows_every_model_present_with_its_conditions(report):
    text = table(report)
    caption, trained, *rest = text.splitlines()
    assert caption == "stdlib, held out, 32,768 tokens measured, bf16, cpu"
    assert trained == "trained on 1,228,800 tokens in 8 min 10 s"
    cells = [line.split() for line in rest if line.split(" ")[0] in report["models"]]
    assert cells == [
        ["base", "20.000", "1.0000", "5.00", "%", "-"],
        ["substituted", "4000.000", "200.0000", "50.00", "%", "-"],
        ["trained", "21.000", "1.0500", "71.20", "%", "-"],
        ["shifted", "22.000", "1.1000", "73.45", "%", "0.02"],
        ["exported", "22.000", "1.1000", "73.45", "%", "0.02"],
    ]
    assert text.endswith("\n\nnote: made for a test")


def test_the_table_of_a_control_names_it_and_leaves_out_what_is_missing(report):
    report |= {"control": "silu_continued", "shift": None, "notes": []}
    report["models"] = {"base": model(20.0, 0.05), "trained": model(float("nan"), 0.06) | {"tokens": 1024}}
    text = table(report)
    assert "control: silu_continued" in text
    assert "1,024 to 32,768 tokens measured" in text
    assert text.splitlines()[-1].split() == ["trained", "-", "-", "6.00", "%", "-"]
