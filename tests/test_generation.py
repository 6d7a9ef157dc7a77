"""`generate`: the text is greedy decoding's, the counts are those of a plain forward pass, the terminal works."""

import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from test_families import listen, stock_relu
from test_models import base_model
from test_releases import write_release
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from prosparse.cli import compose, main
from prosparse.config import Auto
from prosparse.generation import generate

CHATML = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "<|im_start|> {{ m.role }} {{ m.content }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
MARKS = ("<|im_start|>", "<|im_end|>")
PROMPT = "w07 w12 w31 w05 w80"


def words(template: str | None = None, **special) -> PreTrainedTokenizerFast:
    """A tokenizer of the 96 tokens w00 to w93, <|im_start|> and <|im_end|>; BOS is w01."""
    vocabulary = {name: i for i, name in enumerate([*(f"w{i:02}" for i in range(94)), *MARKS])}
    raw = Tokenizer(WordLevel(vocabulary, unk_token="w00"))
    raw.pre_tokenizer = Whitespace()
    special = {"bos_token": "w01", "unk_token": "w00", "additional_special_tokens": list(MARKS)} | special
    made = PreTrainedTokenizerFast(tokenizer_object=raw, **special)
    made.chat_template = template
    return made


def say(model, tokenizer, prompt: str = PROMPT, **how):
    return generate(model, tokenizer, [{"role": "user", "content": prompt}], **({"max_new_tokens": 12} | how))


def ids_of(text: str) -> list[int]:
    return words()(text, add_special_tokens=False).input_ids


def greedy(model, ids: list[int], tokens: int) -> list[int]:
    """`tokens` tokens after `ids`, each from a forward pass over the whole text."""
    ids = list(ids)
    with torch.no_grad():
        for _ in range(tokens):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids


def shares(rows: list[torch.Tensor], start: int, end: int, length: int) -> list[float]:
    """Share of zeros by layer in the intermediates (by layer, [length x k, neurons]) of the positions start to end."""
    return [(x1.unflatten(0, (length, -1))[start:end] == 0).double().mean().item() for x1 in rows]


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "opt", "mixtral"])
def test_text_and_sparsity_are_those_of_forward_passes_over_the_whole_text(family):
    stock, tokenizer = stock_relu(family), words()
    ids = ids_of(f"w01 {PROMPT}")
    expected = greedy(stock, ids, 12)
    heard = listen(stock)
    with torch.no_grad():
        stock(torch.tensor([expected[:-1]]), use_cache=False)  # the last token is never computed
    prefill, generated = (shares(heard, a, b, 17) for a, b in ((0, 6), (6, 17)))
    pieces: list[str] = []
    turn = say(stock_relu(family), tokenizer, tell=pieces.append)
    assert (
        turn.answer == tokenizer.decode(expected[6:], skip_special_tokens=True)
        and "".join(pieces) == turn.answer + "\n"
        and len(pieces) > 3
    )
    assert (turn.prompt_tokens, turn.generated_tokens, turn.ended) == (6, 12, "max_new_tokens")
    assert turn.sparsity_by_layer == pytest.approx(generated, abs=1e-9)
    assert turn.sparsity_generated == pytest.approx(sum(generated) / 2, abs=1e-9)
    assert turn.sparsity_prefill == pytest.approx(sum(prefill) / 2, abs=1e-9)
    assert 0.3 < turn.sparsity_generated < 0.7 and turn.tokens_per_second > 0


def test_a_swish_model_has_no_sparsity_and_stays_what_it_was():
    model = base_model("llama")
    model.generation_config = GenerationConfig(do_sample=True, repetition_penalty=3.0, eos_token_id=95)
    modules, own = [type(m) for m in model.modules()], model.generation_config
    turn = say(model, words())
    assert turn.sparsity_prefill == turn.sparsity_generated == 0
    assert turn.answer == words().decode(greedy(base_model("llama"), ids_of(f"w01 {PROMPT}"), 12)[6:])
    assert [type(m) for m in model.modules()] == modules and model.generation_config is own


def test_bos_and_eos():
    model = base_model("llama")
    ids = ids_of(f"w01 {PROMPT}")
    first, second = greedy(model, ids, 2)[6:]
    assert say(model, words(), max_new_tokens=2).answer == words().decode([first, second])
    one = say(model, words(eos_token=f"w{first:02}"))  # the tokenizer's
    assert (one.generated_tokens, one.ended, one.answer) == (1, "eos", "")
    assert one.sparsity_generated is one.sparsity_by_layer is one.tokens_per_second is None
    model.generation_config.eos_token_id = [second, 93]  # the model's
    assert say(model, words()).generated_tokens == 2
    assert say(model, words(bos_token=None)).prompt_tokens == 5


def test_the_template_decides_about_its_own_text():
    turn = say(base_model("llama"), words(CHATML))
    assert turn.prompt_tokens == 5 + 5  # <|im_start|> user ... <|im_end|> <|im_start|> assistant
    assert say(base_model("llama"), words(CHATML), chat=Auto.none).prompt_tokens == 6
    system = [{"role": "system", "content": "w03"}, {"role": "user", "content": "w04"}]
    with pytest.raises(ValueError, match="template refuses the messages: no system here"):
        generate(base_model("llama"), words(CHATML), system)
    with pytest.raises(ValueError, match="system is given, but no chat template"):
        generate(base_model("llama"), words(), system)


@pytest.mark.parametrize("length", [1, 2])
def test_an_answer_ends_before_what_the_template_renders_after_one(length):
    asked = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %} END \n{% endif %}{% endfor %}"
    new = greedy(base_model("llama"), ids_of(PROMPT), 5 + length)[5:]
    end = words().decode(new[5:])
    pieces: list[str] = []
    turn = say(base_model("llama"), words(asked.replace("END", end)), tell=pieces.append)
    assert (turn.generated_tokens, turn.ended) == (5 + length, "turn")
    assert turn.answer.split() == words().decode(new[:5]).split() and "".join(pieces) == turn.answer + "\n"
    special = words(asked.replace("END", end), additional_special_tokens=end.split())
    assert say(base_model("llama"), special).answer.split() == turn.answer.split()
    other = say(base_model("llama"), words(asked.replace("END", "w95")))
    assert (other.generated_tokens, other.ended) == (12, "max_new_tokens")


def test_the_positions_of_the_model_are_an_end():
    model = base_model("llama")
    model.config.max_position_embeddings = 8
    turn = say(model, words())
    assert (turn.generated_tokens, turn.ended) == (3, "positions")  # 6 and 2 are computed
    with pytest.raises(ValueError, match="the prompt has 9 tokens, the model 8 positions"):
        say(model, words(), "w02 " * 8)
    with pytest.raises(ValueError, match="token 95, but the model has 90"):
        model.resize_token_embeddings(90)
        say(model, words(CHATML))


def test_sampling_follows_the_seed():
    model = base_model("llama")

    def sample(seed: int) -> str:
        torch.manual_seed(seed)
        return say(model, words(), temperature=100.0).answer

    assert sample(1) == sample(1) != sample(2)


# --- the command ------------------------------------------------------------------------------------------------------

TEXTS = [
    'it\'s "quoted"',
    "'quoted'",
    '"quoted"',
    "a, b = {c: [1]} # ~!",
    "line\nline",
    " ends with \\",
    "\\'",
    "${oc.env:HOME} \\${x} \\\\${",
    "true",
    "1e3",
    "007",
    "λ\t$",
]


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_is_taken_as_it_is(text):
    config = compose("generate", ["checkpoint=x", f"prompt={text}", f"system={text}"])
    assert config.prompt == config.system == text


def test_several_prompts_of_a_multirun_are_one_text(monkeypatch):
    seen = []
    monkeypatch.setitem(main.__globals__["RUN"], "generate", lambda c: seen.append((c.prompt, c.seed)) or {})
    assert main(["generate", "-m", "checkpoint=x", "prompt=a, 'b'", "seed=1,2"]) == 0
    assert seen == [("a, 'b'", 1), ("a, 'b'", 2)]


@pytest.fixture(scope="module")
def bamboo(tmp_path_factory):
    """A tiny Bamboo in the release's layout, with ChatML."""
    folder = tmp_path_factory.mktemp("bamboo") / "release"
    write_release(folder, "PowerInfer/Bamboo-base-v0_1")
    words(CHATML, eos_token="<|im_end|>").save_pretrained(folder)
    return folder


def test_a_release_answers_at_the_command_line(bamboo, tmp_path, capsys):
    options = [f"checkpoint={bamboo}", "dtype=fp32", "device=cpu", "max_new_tokens=6"]
    assert main(["generate", *options, f"prompt={PROMPT}", f"out={tmp_path / 'out'}"]) == 0
    said = capsys.readouterr()
    result = json.loads(said.out)
    assert result == json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["answer"] + "\n[prompt 10 tokens, " in said.err and "sparsity" in said.err
    assert result["prompt"] == PROMPT and result["prompt_tokens"] == 10 and result["dtype"] == "fp32"
    model = AutoModelForCausalLM.from_pretrained(bamboo).eval()
    ids = ids_of(f"<|im_start|> user {PROMPT} <|im_end|> <|im_start|> assistant")
    heard = listen(model)
    with torch.no_grad():
        model(torch.tensor([ids]))
    assert result["sparsity_prefill"] == pytest.approx(sum(shares(heard, 0, 10, 10)) / 2, abs=1e-9)
    assert 0.6 < result["sparsity_prefill"] < 0.9  # dReLU


def test_a_conversation_that_outgrows_the_positions_keeps_its_turns(bamboo, tmp_path, capsys, monkeypatch):
    model = shutil.copytree(bamboo, tmp_path / "short")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 20}))
    lines = iter(["w07 w08\n", "w09 " * 9, "w10"])
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True, readline=lambda: next(lines)))
    options = [f"checkpoint={model}", "dtype=fp32", "device=cpu", "max_new_tokens=4", f"out={tmp_path / 'out'}"]
    assert main(["generate", *options]) == 0
    said = capsys.readouterr()
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert [turn["prompt"] for turn in result["turns"]] == ["w07 w08"] and result == json.loads(said.out)
    assert said.err.count("the conversation ends here: the prompt has ") == 1 and next(lines) == "w10"
    assert main(["generate", *options[:-1], "prompt=" + "w09 " * 20]) == 2


BAD = {
    "prompt=": "prompt is empty",
    "prompt=x temperature=-1": "temperature is -1.0",
    "prompt=x temperature=nan": "temperature is nan",
    "prompt=x top_p=0": "top_p is 0.0",
    "prompt=x top_p=0.5": "top_p is 0.5, but temperature 0 does not sample",
    "prompt=x max_new_tokens=0": "max_new_tokens is 0",
    "prompt=x threads=0": "threads is 0",
    "prompt=x device=tpu": "device is tpu",
    "prompt=x checkpoint=/no/where": "/no/where does not exist",
    "": "prompt is missing, and stdin is no terminal",
}


@pytest.mark.parametrize(("overrides", "message"), BAD.items())
def test_bad_input_is_one_line_and_exit_code_2(overrides, message, bamboo, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: False))
    assert main(["generate", f"checkpoint={bamboo}", *overrides.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.fixture
def terminal(bamboo):
    """Starts `prosparse generate` at a terminal of its own: (process, type, screen), screen waits for a text."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "prosparse.cli", "generate", f"checkpoint={bamboo}"]
    process = subprocess.Popen(
        [*command, "dtype=fp32", "device=cpu", "threads=1", "max_new_tokens=4"],
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)

    unread = [""]

    def screen(wanted: str, seconds: float = 60) -> str:
        end = time.monotonic() + seconds
        while wanted not in unread[0]:
            assert select.select([ours], [], [], max(0, end - time.monotonic()))[0], unread
            unread[0] += os.read(ours, 4096).decode()
        seen, unread[0] = unread[0].split(wanted, 1)
        return seen

    yield process, lambda text: os.write(ours, text.encode()), screen
    process.kill()
    process.communicate()
    os.close(ours)


@pytest.mark.parametrize("end", ["\x04", "\n"], ids=["ctrl-d", "empty line"])
def test_a_conversation_at_the_terminal_goes_on_until_it_is_ended(terminal, end):
    process, type_in, screen = terminal
    for line in ("w07 w08\n", "w09\n"):
        screen("\n> " if line == "w09\n" else "> ")
        type_in(line)
    screen("\n> ")
    type_in(end)
    result = json.loads(process.communicate(timeout=60)[0])
    first, second = result["turns"]
    assert process.returncode == 0 and (first["prompt"], second["prompt"]) == ("w07 w08", "w09")
    kept = len(first["answer"].split())
    assert first["prompt_tokens"] == 7 and second["prompt_tokens"] == kept + 7 + 7


def test_an_interrupt_at_the_terminal_ends_with_75(terminal):
    process, _, screen = terminal
    screen("> ")
    process.send_signal(signal.SIGINT)
    assert "stopped (SIGINT)" in screen(": start it again")
    assert process.communicate(timeout=60)[0] == b"" and process.returncode == 75
