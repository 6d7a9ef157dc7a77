"""The command `prosparse VERB key=value ...`: composes configs, registers their schema, calls one function of verbs.py.

In: Hydra overrides. Out: the verb's result, as JSON on the last line of stdout when run plainly; people read stderr.
Hydra and OmegaConf live here only. Exit codes: 0 done, 1 failed, 2 the user's input, 75 stopped by request.
"""

import itertools
import os
import re
import sys
import traceback
from collections.abc import Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from prosparse.config import Train
from prosparse.signals import Stopped, interruptible, listening
from prosparse.verb_checks import validate
from prosparse.verb_configs import (
    Bench,
    Eval,
    Export,
    Generate,
    Measure,
    Plan,
    Predict,
    Prepare,
    Report,
    ShiftCheckpoint,
)
from prosparse.verbs import RUN

SCHEMAS: dict[str, type] = {
    "train": Train,
    "prepare": Prepare,
    "plan": Plan,
    "measure": Measure,
    "predict": Predict,
    "shift": ShiftCheckpoint,
    "export": Export,
    "generate": Generate,
    "eval": Eval,
    "report": Report,
    "bench": Bench,
}
VERBATIM = ("prompt", "system")
LISTS = re.compile(r"^(runs|measures)=\[?(.*?)\]?$")
FREE_TEXT = re.compile(
    r"^(prompt|system|run_dir|resume|fork|teacher|checkpoint|text|out|predictors|check|(evaluate\.)?task_path|model\.source|"
    r"data\.(cache|tokenizer|sources\.\w+\.(path|config|split))|config|split)="
)
USAGE = f"""usage: prosparse VERB key=value ...
verbs: {", ".join(SCHEMAS)}
flags: --cfg job [--resolve] prints what would run, --config-dir DIR adds configs of your own, --multirun runs several
example: prosparse train experiment=demo run_dir=runs/demo
"""


def compose(verb: str, overrides: Sequence[str] = (), config_dir: str | None = None) -> Any:
    """The checked config object of `verb` (a key of SCHEMAS) after `overrides`; `config_dir` adds a folder of configs.

    Raises ValueError, in one line that names the key, for whatever a user can mend.
    """
    raw = _compose_raw(verb, overrides, config_dir)
    if SCHEMAS[verb] is Plan:  # reads no text
        for key in [key for key in OmegaConf.missing_keys(raw) if key.startswith("data.")]:
            OmegaConf.update(raw, key, "not given")
        others = [
            name for name in overrides if re.split(r"[@.=]", name.lstrip("+~"))[0] not in vars(Plan)["__annotations__"]
        ]
        if raw.check is not None and others:
            raise ValueError(f"check={raw.check} is reckoned as that run was configured: leave out {' '.join(others)}")
    missing = OmegaConf.missing_keys(raw)
    if missing:
        raise ValueError(
            f"{', '.join(sorted(missing))} missing: give {' '.join(f'{key}=VALUE' for key in sorted(missing))}"
        )
    return _checked(raw)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    given = _without_local_rank(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(USAGE, file=sys.stderr)
        return 0 if given else 2
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else a rank that ends makes the others print traces of C++
    with listening():
        return _run(*given)


def end(code: int) -> NoReturn:
    """Leave the process. In a group without the interpreter's own end, where threads of the group can abort it."""
    sys.stdout.flush()
    sys.stderr.flush()
    if "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized():
        os._exit(code)
    sys.exit(code)


def command() -> NoReturn:
    """What the shell's `prosparse` runs."""
    end(main())


def _run(verb: str, *rest: str) -> int:
    speaks = int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0) == 0
    running = False
    try:
        if verb not in SCHEMAS:
            raise ValueError(f"no such verb: {verb}; choose {', '.join(SCHEMAS)}")
        flags, overrides, config_dir = _split(list(rest))
        if flags:
            return _run_hydra(verb, flags, overrides, config_dir)
        config = compose(verb, overrides, config_dir)
        running = True
        # A training meets its other ranks before it stops; the other verbs leave nothing half done.
        result = RUN[verb](config) if verb == "train" else interruptible(lambda: RUN[verb](config))()
    except Stopped as stopped:
        if speaks:
            print(f"prosparse {verb}: stopped ({stopped}), nothing is half written: start it again", file=sys.stderr)
        return 75
    except Exception as error:
        unexpected = "Traceback (most recent call last)" in str(error)  # of another rank
        line = str(error) if unexpected else f"prosparse {verb}: {' '.join(str(error).split())}"
        if not running or getattr(error, "shared", False):  # every rank has it: one of them tells
            if speaks:
                print(line, file=sys.stderr)
        else:
            from prosparse.group import last_words

            known = isinstance(error, ValueError | OSError)
            last_words(line if known else traceback.format_exc(), error)
        return 2 if isinstance(error, ValueError) else 1
    if "WORLD_SIZE" not in os.environ or os.environ["WORLD_SIZE"] == "1":
        _print_result(result)
    return 0


def _print_result(result: dict) -> None:
    from prosparse.telemetry import strict_json

    print(strict_json(result), flush=True)


# --- Hydra ------------------------------------------------------------------------------------------------------------


def _register() -> None:
    store = ConfigStore.instance()
    for verb, node in SCHEMAS.items():
        store.store(name=f"schema_{verb}", node=node)


def _compose_raw(verb: str, overrides: Sequence[str], config_dir: str | None) -> Any:
    _register()
    GlobalHydra.instance().clear()
    quoted = [_quote(override) for override in overrides]
    if config_dir is not None:
        quoted.append(f"hydra.searchpath=['file://{Path(config_dir).expanduser().resolve()}']")
    try:
        with initialize_config_module("prosparse.configs", version_base="1.3"):
            return hydra_compose(verb, quoted)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_one_line(error)) from error


def _without_local_rank(arguments: Sequence[str]) -> list[str]:
    """Drop what DeepSpeed's launcher puts before everything else; LOCAL_RANK says the same."""
    return [argument for argument in arguments if not re.match(r"--local[_-]rank=", argument)]


def _split(arguments: list[str]) -> tuple[list[str], list[str], str | None]:
    """(Hydra's flags, overrides, config folder)"""
    flags, overrides, config_dir = [], [], None
    rest = iter(arguments)
    for argument in rest:
        name, _, value = argument.partition("=")
        if name in ("--config-dir", "-cd"):
            config_dir = value or next(rest, "")
        elif name in ("--cfg", "-c", "--package", "-p") and not value:
            flags += [argument, next(rest, "job")]
        elif argument.startswith("-"):
            flags.append(argument)
        else:
            overrides.append(argument)
    return flags, overrides, config_dir


def _run_hydra(verb: str, flags: list[str], overrides: list[str], config_dir: str | None) -> int:
    """--multirun, and what Hydra's own command line shows: --cfg, --info, --help."""
    if "--multirun" in flags or "-m" in flags:
        return _run_several(verb, overrides, config_dir)
    _check_incomplete(verb, _compose_raw(verb, overrides, config_dir))
    _register()
    GlobalHydra.instance().clear()
    folder = ["--config-dir", str(Path(config_dir).expanduser().resolve())] if config_dir is not None else []
    sys.argv = [f"prosparse {verb}", *flags, *folder, *map(_quote, overrides)]
    hydra.main(config_path="pkg://prosparse.configs", config_name=verb, version_base="1.3")(lambda raw: None)()
    return 0


def _check_incomplete(verb: str, raw: Any) -> None:
    """The checks of a config that may lack values; those are named on stderr."""
    missing, unchecked = sorted(OmegaConf.missing_keys(raw)), ""
    try:
        for key in missing:
            OmegaConf.update(raw, key, "VALUE")
    except ValidationError:
        unchecked = "; nothing was checked without them"
    if not unchecked:
        _checked(raw)
    if missing:
        print(
            f"prosparse {verb}: to run, give {' '.join(f'{key}=VALUE' for key in missing)}{unchecked}", file=sys.stderr
        )


def _run_several(verb: str, overrides: list[str], config_dir: str | None) -> int:
    """One run after the other for every combination of `key=a,b`; all of them are checked before the first starts."""
    if max(int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "SLURM_NTASKS")) > 1:
        raise ValueError("--multirun under a launcher would start each run inside every rank: use a shell loop instead")
    try:
        parsed = OverridesParser.create().parse_overrides([_quote(override) for override in overrides])
    except HydraException as error:
        raise ValueError(_one_line(error)) from error
    choices = [
        [f"{o.get_key_element()}={value}" for value in o.sweep_string_iterator()]
        if o.is_sweep_override()
        else [override]
        for o, override in zip(parsed, overrides, strict=True)
    ]
    configs = [compose(verb, list(combination), config_dir) for combination in itertools.product(*choices)]
    for config in configs:
        _print_result(RUN[verb](config))
    return 0


def _quote(override: str) -> str:
    """Quote a free-text value that Hydra's grammar would stumble over; a mapping that begins empty takes new keys."""
    if override.startswith(("texts=", "data.sources={")):
        return f"+{override}"
    if several := LISTS.match(override):
        parts = [part.strip() for part in several[2].split(",") if part.strip()]
        return f"{several[1]}=[{','.join(_quote(f'out={part}').removeprefix('out=') for part in parts)}]"
    match = FREE_TEXT.match(override)
    if match is None:
        return override
    value = override[match.end() :]
    if match[1] in VERBATIM and value != "null":
        value = re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + "\\${", value)  # else OmegaConf would look it up
    elif re.fullmatch(r"[\w./-]*", value) or value[:1] in "'\"":
        return override
    # Inside quotes a backslash is itself, except before a quote.
    escaped = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), value)
    return f"{match.group(0)}'{escaped}'"


def _checked(raw: Any) -> Any:
    checked = OmegaConf.to_object(raw)
    _refuse_unknown(checked, "")
    validate(checked)
    return checked


def _refuse_unknown(config: Any, path: str) -> None:
    """An added key (+key=value) that the schema does not have."""
    for name, value in vars(config).items():
        if name not in config.__dataclass_fields__:
            raise ValueError(f"{path}{name}: no such key (prosparse VERB --cfg job shows every key)")
        parts = value if isinstance(value, dict) else {"": value}
        for part, item in parts.items():
            if is_dataclass(item):
                _refuse_unknown(item, f"{path}{name}.{part}." if part else f"{path}{name}.")


def _one_line(error: BaseException) -> str:
    text = f"{error}\n{error.__cause__ or ''}".split("Config search path")[0]
    lines = [line.strip(" .\t") for line in text.splitlines()]
    kept = [line for line in lines if line and not line.startswith(("reference_type", "object_type", "To append"))]
    return "; ".join(dict.fromkeys(kept)).replace(":; ", ": ") + " (prosparse VERB --cfg job shows every key)"


if __name__ == "__main__":
    command()
