"""The order of the house: lower floors do not import higher ones, libraries stay in their rooms."""

import ast
import subprocess
import sys

from conftest import ROOT

FLOORS = [
    {"activations", "config", "verb_configs", "checks", "verb_checks", "signals", "meeting", "group"},
    {"schedule", "penalty", "kernels", "shards", "guard", "controller", "lock", "checkpoint"},
    {"ffn", "decoding", "chat", "sources"},
    {"models", "data", "ulysses", "tokenization", "packing", "preparation"},
    {"sparsity", "activity"},
    {"allocation", "threshold", "predictor", "vllm_plugin", "distillation", "telemetry", "generation"},
    {"records", "card", "page", "plotting", "reporting"},
    {"exporters", "evaluation", "harness"},
    {"speed", "offload", "engine", "preflight"},
    {"planning", "plan_check", "sizes"},
    {"run", "tasks", "ending", "trainer", "benchmarking", "decoding_benchmark"},
    {"verbs"},
    {"cli"},
]
DEEPSPEED = ("run", "engine", "offload", "checkpoint", "models", "ulysses", "rivals")
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
MODULES = {
    path: path.relative_to(ROOT / "prosparse").parts[0].removesuffix(".py")
    for path in (ROOT / "prosparse").rglob("*.py")
}


def imports(path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            found |= {f"prosparse.{n.name}" for n in node.names} if module == "prosparse" else {module}
    return found


def test_a_room_imports_only_from_its_own_floor_and_below():
    for path, room in MODULES.items():
        for name in imports(path):
            other = name.split(".")[1] if name.startswith("prosparse.") else None
            if room in FLOOR and other in FLOOR:
                assert FLOOR[other] <= FLOOR[room], f"{path} imports {name}"


def test_hydra_and_deepspeed_stay_in_their_rooms():
    for path, room in MODULES.items():
        libraries = {name.split(".")[0] for name in imports(path)}
        assert room == "cli" or not libraries & {"hydra", "omegaconf"}, path
        assert room in DEEPSPEED or "deepspeed" not in libraries, path


def test_lm_eval_is_loaded_only_when_tasks_are_run():
    for path, room in MODULES.items():
        top = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        modules = {getattr(node, "module", None) or node.names[0].name for node in top}
        assert room == "harness" or not any(name.startswith(("lm_eval", "prosparse.harness")) for name in modules), path


def test_every_module_says_what_it_is_for_and_no_file_is_too_long():
    for path in MODULES:
        lines = path.read_text().splitlines()
        assert lines[0].startswith('"""'), path
        assert len(lines) <= 500, f"{path}: {len(lines)} lines"


def test_importing_the_package_needs_torch_and_transformers_only():
    others = {"deepspeed", "datasets", "grain", "hydra", "lm_eval", "wandb"}
    code = f"import sys, prosparse; print(sorted({others} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
