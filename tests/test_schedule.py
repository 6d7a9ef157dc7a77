"""What a recipe says at each step, against the published tables."""

import pytest

from prosparse import schedule
from prosparse.cli import compose


def recipe(*overrides: str):
    return compose("train", ["experiment=llama2_7b", "run_dir=x", "data.sources.files.path=x", *overrides]).recipe


def shipped(name: str, *overrides: str):
    experiment = {"prosparse_1b": ["experiment=minicpm_1b", "run_dir=x"]}.get(name)
    return compose("train", [*experiment, *overrides]).recipe if experiment else recipe(f"recipe={name}", *overrides)


def demo(*overrides: str):
    steps = [f"recipe.stages.{name}.steps={n}" for name, n in (("substitution", 50), ("rise", 70), ("hold", 40))]
    return compose("train", ["experiment=demo", *steps, *overrides]).recipe


@pytest.mark.parametrize(
    ("step", "factor"),
    [(1, 0), (5000, 0), (5001, 5e-3), (6000, 5e-3), (7000, 0.01159), (8000, 0.0275), (9000, 0.04341), (10000, 5e-2)]
    + [(11000, 5e-2), (12000, 5e-2), (13000, 0.07197), (14000, 0.125), (15000, 0.17803), (16000, 0.2), (16500, 0.2)],
)
def test_l1_factor_follows_the_published_7b_schedule(step, factor):
    assert schedule.l1_factor(recipe(), step) == pytest.approx(factor, rel=5e-4)


@pytest.mark.parametrize(("step", "billions"), [(5000, 10.49), (6000, 12.58), (16000, 33.55), (16500, 34.60)])
def test_tokens_follow_the_published_7b_table(step, billions):
    sequences, context = schedule.batch_at(recipe(), step)
    assert step * sequences * context / 1e9 == pytest.approx(billions, abs=5e-3)


def test_a_sum_1e8_factor_becomes_the_mean_unit_with_micro_batch_context_and_neurons():
    # 0.2 · 1e-8 · 8 sequences · 4096 tokens · 11008 neurons
    assert schedule.l1_factor_mean(recipe(), 16500, 11008) == pytest.approx(0.0902 * 8, rel=1e-3)


def test_l1_factor_may_fall_and_joins_without_a_jump_or_a_kink():
    falling = recipe("recipe.stages.rise_again.l1.factor=0.01", "recipe.stages.settle.l1.factor=0.01")
    factors = [schedule.l1_factor(falling, step) for step in range(12000, 16001)]
    assert factors[0] == 5e-2 and factors[-1] == pytest.approx(0.01)
    assert factors == sorted(factors, reverse=True)
    assert abs(factors[1] - factors[0]) < 1e-7 and abs(factors[-1] - factors[-2]) < 1e-7


@pytest.mark.parametrize(("control", "activation"), [("silu_continued", None), ("relu_only", ("relu", 0.0))])
def test_controls_without_the_method_have_no_penalty_and_no_shift(control, activation):
    controlled = recipe(f"recipe.control={control}")
    assert {schedule.l1_factor(controlled, step) for step in (1, 5500, 9000, 16500)} == {0.0}
    assert schedule.activation(controlled) == activation and not schedule.shifts(controlled)


def test_the_constant_control_holds_the_largest_factor_from_the_first_penalized_step_and_shifts():
    controlled = recipe("recipe.control=constant_l1")
    assert [schedule.l1_factor(controlled, step) for step in (5000, 5001, 9000, 16500)] == [0, 0.2, 0.2, 0.2]
    assert schedule.shifts(controlled)


@pytest.mark.parametrize("control", ["silu_continued", "relu_only", "constant_l1"])
def test_controls_leave_rows_and_learning_rate_untouched(control):
    plain, controlled = recipe(), recipe(f"recipe.control={control}")
    for step in (1, 400, 5001, 9000, 16500):
        assert schedule.window_rows(plain, step, step - 1) == schedule.window_rows(controlled, step, step - 1)
        assert schedule.learning_rate(plain, step) == schedule.learning_rate(controlled, step)


def test_cosine_warms_up_to_the_peak_and_ends_at_its_final_ratio():
    r = recipe()
    assert schedule.learning_rate(r, 250) == pytest.approx(1.5e-5)
    assert schedule.learning_rate(r, 500) == pytest.approx(3e-5)
    assert schedule.learning_rate(r, 8500) == pytest.approx(3e-5 * 0.55)
    assert schedule.learning_rate(r, 16500) == pytest.approx(3e-6)


def test_wsd_is_flat_until_its_tail():
    r = demo("recipe.lr.schedule=wsd", "recipe.lr.decay_steps=40", "recipe.lr.final_ratio=0")
    rates = [schedule.learning_rate(r, step) for step in (8, 9, 120, 140, 160)]
    assert rates == pytest.approx([3e-4, 3e-4, 3e-4, 1.5e-4, 0])


def test_a_stage_that_names_a_learning_rate_opens_a_segment_of_its_own():
    r = demo(
        "recipe.stages.hold.lr.schedule=constant",
        "recipe.stages.hold.lr.peak=1e-5",
        "recipe.stages.hold.lr.warmup_steps=0",
    )
    assert schedule.learning_rate(r, 120) == pytest.approx(3e-5)  # the first segment ended its cosine
    assert [schedule.learning_rate(r, step) for step in (121, 160)] == [1e-5, 1e-5]


def test_every_row_is_read_once_across_stages_with_other_batches():
    r = demo("recipe.stages.rise.batch.sequences=6")
    read = [schedule.window_rows(r, step, step - 1) for step in range(1, 161)]
    assert all(first + rows == read[i + 1][0] for i, (first, rows) in enumerate(read[:-1]))
    assert read[-1] == (50 * 4 + 70 * 6 + 39 * 4, 4)


def test_a_skipped_window_moves_on_to_rows_not_read_before():
    r = demo("recipe.stages.rise.batch.sequences=6")
    seen: set[int] = set()
    window = 0
    for step in range(1, 161):
        for _ in range(2 if step in (10, 60, 125) else 1):  # the first of two was skipped
            first, rows = schedule.window_rows(r, step, window)
            assert not seen & set(range(first, first + rows))
            seen |= set(range(first, first + rows))
            window += 1


def test_another_context_or_mixture_reads_rows_of_its_own():
    r = demo("recipe.stages.hold.batch.context=512", "+recipe.stages.rise.data.stdlib=2")
    assert schedule.window_rows(r, 51, 50) == (0, 4) and schedule.window_rows(r, 121, 120) == (0, 4)
    assert schedule.contexts(r) == [256, 512]


def test_an_indivisible_batch_names_the_nearest_possible_ones():
    with pytest.raises(ValueError, match=r"recipe.batch.sequences=8 or 12, or micro_batch=1 or 5"):
        schedule.accumulation(10, 2, 2)
    assert schedule.accumulation(12, 2, 2) == 3


def test_a_step_outside_the_recipe_is_an_error():
    for step in (0, 16501):
        with pytest.raises(ValueError, match="outside the recipe"):
            schedule.l1_factor(recipe(), step)


PUBLISHED = {
    # recipe: (accumulated steps, λ, billions of tokens) at the end of each stage, (sequences, context) by stage, and of
    # the learning rate kind, peak and end of its first segment (the end is published of TurboSparse alone)
    "prosparse_7b": (
        [(5000, 0, 10.49), (6000, 5e-3, 12.58), (10000, 5e-2, 20.97), (12000, 5e-2, 25.17), (16000, 2e-1, 33.55),
         (16500, 2e-1, 34.60)], {"": (512, 4096)}, ("cosine", 3e-5, 3e-6),
    ),
    "prosparse_13b": (
        [(5500, 0, 46.14), (6750, 5e-3, 56.62), (10750, 1e-2, 90.18), (11000, 1e-2, 92.27), (15000, 2e-2, 125.83),
         (16000, 2e-2, 134.22)], {"": (2048, 4096)}, ("cosine", 5e-5, 5e-6),
    ),
    "prosparse_1b": (
        [(10000, 0, 49.15), (15000, 1e-3, 73.73), (20000, 5e-3, 98.30), (25000, 5e-3, 122.88), (35000, 5e-2, 172.03),
         (95000, 5e-2, 466.94), (101000, 1e-2, 473.02)], {"": (1200, 4096), "sft": (248, 4096)}, ("wsd", 1e-4, 1e-5),
    ),
    "turbosparse_mistral": ([(17881, 0, 150.0)], {"": (2048, 4096)}, ("cosine", 5e-5, 5e-6)),
    "bamboo_7b": (
        [(35763, 0, 150.0), (47684, 0, 200.0)], {"": (2048, 2048), "second_phase": (1024, 4096)},
        ("cosine", 5e-5, 5e-6),
    ),
    "relullama": ([(2384, 0, 5.0)], {"": (512, 4096)}, ("cosine", 3e-5, 3e-6)),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_steps_factors_tokens_and_peaks_are_the_published_ones(name):
    published, batches, (kind, peak, end) = PUBLISHED[name]
    chosen = shipped(name)
    spans = schedule.spans(chosen)
    tokens, before = 0.0, 0.0
    assert len(spans) == len(published)
    for span, (steps, factor, billions) in zip(spans, published, strict=True):
        sequences, context = schedule.batch_at(chosen, span.first)
        assert (sequences, context) == batches.get(span.name, batches[""])
        tokens += span.stage.steps * sequences * context / 1e9
        assert (span.last, schedule.l1_factor(chosen, span.last)) == (steps, factor)
        middle, jump = (span.first + span.last) // 2, factor - before
        if span.name in ("rise", "hold", "rise_again", "settle"):  # half a sine from the factor before
            ends = (before + jump / span.stage.steps**2 * 2.4674, before + jump / 2)  # sin² near 0: (π/2)²
        else:
            ends = (factor, factor)
        assert [schedule.l1_factor(chosen, step) for step in (span.first, middle)] == pytest.approx(ends, rel=1e-3)
        before = factor
        assert tokens == pytest.approx(billions, abs=2e-2 if span.name == "sft" else 6e-3)  # 248 whole rows a step
    assert schedule.total_tokens(chosen) / 1e9 == pytest.approx(tokens)
    rates = [schedule.learning_rate(chosen, step) for step in range(1, spans[-1].last + 1, 100)]
    assert max(rates) == pytest.approx(peak, rel=1e-2)
    trained = [span for span in spans if span.name not in ("sft", "second_phase")][-1].last  # the first segment
    assert (chosen.lr.schedule, schedule.learning_rate(chosen, trained)) == (kind, pytest.approx(end))


def test_what_else_is_published_of_a_recipe():
    bamboo = recipe("recipe=bamboo_7b")
    first, second = schedule.spans(bamboo)
    assert schedule.activation(bamboo) == ("drelu", 0.0) and not schedule.shifts(bamboo)
    assert (schedule.batch_at(bamboo, 1)[1], schedule.batch_at(bamboo, second.first)[1]) == (2048, 4096)
    assert schedule.learning_rate(bamboo, second.first) == pytest.approx(5e-6, rel=1e-6)
    assert [schedule.weight_decay(bamboo, span.first) for span in (first, second)] == [0.1, 0.01]
    turbo = recipe("recipe=turbosparse_mistral")
    assert schedule.learning_rate(turbo, 17881) == pytest.approx(5e-6) and turbo.optimizer.betas == [0.9, 0.95]
    small = shipped("prosparse_1b")
    assert small.shift.threshold == 0.03 and schedule.learning_rate(small, 30000) == small.lr.peak
    assert schedule.learning_rate(small, 95000) == pytest.approx(1e-5)
    assert [schedule.l1_factor(small, step) for step in (95000, 95001, 98000, 101000)] == [5e-2, 1e-2, 1e-2, 1e-2]
    sft = small.stages["sft"]
    assert sft.reset_optimizer and sft.data == {"ultrachat": 1}
    rates = [schedule.learning_rate(small, step) for step in (95100, 98050, 101000)]
    assert rates == pytest.approx([1e-5, 5.5e-6, 1e-6])
    assert all("ultrachat" not in stage.data for name, stage in small.stages.items() if name != "sft")
    relullama = recipe("recipe=relullama")
    assert schedule.activation(relullama) == ("relu", 0.0) and not schedule.shifts(relullama)
    assert all(stage.distillation.weight > 0 for stage in relullama.stages.values())


def test_steps_that_distill_are_known_and_what_they_did_is_history():
    r = demo("recipe.stages.rise.distillation.weight=0.5")  # steps 51-120
    cases = [((1, 50), False), ((1, 51), True), ((60, 70), True), ((120, 160), True), ((121, 160), False)]
    assert [schedule.distills(r, *steps) for steps, _ in cases] == [known for _, known in cases]
    assert [schedule.last_step(r, until) for until in ("substitution", "rise", "shift", None)] == [50, 120, 160, 160]
    told = [stage.get("distillation") for stage in schedule.history(r, 160)]
    assert told == [None, {"weight": 0.5, "temperature": 1.0}, None]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_scaled_recipe_keeps_its_shape(name):
    whole = shipped(name, "recipe.scale.steps=1e-3", "recipe.scale.batch=0.01")
    small = schedule.scaled(whole)
    assert list(small.stages) == list(whole.stages) and small.scale == schedule.Scale()
    assert [s.steps for s in small.stages.values()] == [max(1, round(s.steps / 1000)) for s in whole.stages.values()]
    for one, other in zip(schedule.spans(small), schedule.spans(whole), strict=True):
        assert schedule.l1_factor(small, one.last) == schedule.l1_factor(whole, other.last)
        sequences, context = schedule.batch_at(whole, other.first)
        assert schedule.batch_at(small, one.first) == (max(1, round(sequences / 100)), context)
    assert small.lr.peak == whole.lr.peak and schedule.scaled(small) == small


def test_the_set_point_of_target_stages_follows_a_sine_and_holds():
    r = recipe("recipe=target")
    assert schedule.steered(r, 45) is None and {schedule.steered(r, step) for step in (46, 125, 126, 185)} == {"rise"}
    points = [schedule.set_point(r, step, 0.65) for step in range(46, 186)]
    assert points == sorted(points) and points[39] == pytest.approx(0.7) and points[79:] == pytest.approx([0.75] * 61)
    assert points[0] - 0.65 < 1e-4
    with pytest.raises(ValueError, match="stage rise is steered"):
        schedule.l1_factor(r, 46)
    control = recipe("recipe=target", "recipe.control=silu_continued")
    assert schedule.steered(control, 100) is None and schedule.l1_factor(control, 100) == 0
    assert schedule.history(r, 100)[1]["l1_factor"][1] == 0.75


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["recipe.stages.rise.l1.factor=0.1"], "λ of a target stage is steered: set it to 0"),
        (["recipe.stages.rise.l1.sparsity=1.5"], "give a share between 0 and 1"),
        (["stage@recipe.stages.hold=sine", "recipe.stages.hold.l1.sparsity=null"], "right after a target stage"),
        (["stage@recipe.stages.hold=linear", "recipe.stages.hold.l1.sparsity=null"], "right after a target stage"),
        (
            ["stage@recipe.stages.hold=constant", "recipe.stages.hold.l1.sparsity=null"],
            "λ would drop to 0; give a factor",
        ),
        (["activation@recipe.activation=silu"], "silu has no zeros"),
        (["recipe.control=constant_l1"], "recipe.control=constant_l1"),
    ],
)
def test_what_a_target_stage_cannot_be(overrides, message):
    with pytest.raises(ValueError, match=message):
        recipe("recipe=target", *overrides)
    hold = ["recipe.stages.hold.l1.sparsity=null", "recipe.stages.hold.l1.factor=0.1"]
    recipe("recipe=target", "stage@recipe.stages.hold=constant", *hold)


@pytest.mark.parametrize("name", ["bamboo_7b", "turbosparse_mistral", "relullama"])
def test_a_control_that_would_be_the_recipe_itself_is_refused(name):
    others = "silu_continued" if name == "relullama" else "silu_continued or relu_only"
    with pytest.raises(ValueError, match=f"control=constant_l1 .* no stage has one: compare with {others}$"):
        recipe(f"recipe={name}", "recipe.control=constant_l1")
    recipe(f"recipe={name}", "recipe.control=silu_continued")
    if name == "relullama":
        with pytest.raises(ValueError, match=r"relu_only is this recipe itself.*compare with silu_continued"):
            recipe(f"recipe={name}", "recipe.control=relu_only")
        recipe(f"recipe={name}", "recipe.control=relu_only", "shift@recipe.shift=threshold")
    else:
        recipe(f"recipe={name}", "recipe.control=relu_only")


def test_a_token_budget_is_shared_by_all_stages():
    small = schedule.scaled(recipe("recipe=drelu_progressive", "recipe.scale.tokens=5e9"))
    assert schedule.total_tokens(small) == pytest.approx(5e9, rel=1e-3)
    assert [s.steps for s in small.stages.values()] == [5722, 2861, 954] and small.lr.warmup_steps == 286
    with pytest.raises(ValueError, match=r"recipe\.scale\.tokens and recipe\.scale\.steps are both given"):
        recipe("recipe.scale.tokens=1e9", "recipe.scale.steps=0.5")
