"""What README, pages, card and contribution guide show is what there is: commands, recipes, files, figures, and
programs, which are run.
"""

import json
import re
import shlex
from pathlib import Path

import pytest
from helpers.tiny import tiny_config
from helpers.videos import write_clip

from everest_hf import EverestForVideoClassification, EverestVideoProcessor
from everest_hf.cli import build_parser
from everest_hf.training.options import parse_command_line
from everest_hf.training.recipe import load_recipe

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
ERRORS = "docs/troubleshooting.md"  # whose commands fail, in test_troubleshooting.py


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks_of(name: str) -> list[tuple[str, str]]:
    """The blocks of code of a file, each with its language."""
    return re.findall(r"```(\w+)\n(.*?)```", text_of(name), flags=re.DOTALL)


BLOCKS = [block for page in PAGES if page != ERRORS for block in blocks_of(page)]
PYTHON = [text for kind, text in BLOCKS + blocks_of("model_card.md") if kind == "python"]
RECIPES = [text for kind, text in BLOCKS if kind == "yaml"]
# Each once, though several pages show it. A block in a list is indented.
COMMANDS = list(
    dict.fromkeys(
        line.strip() for kind, text in BLOCKS if kind == "bash" for line in text.splitlines() if line.strip()
    )
)


def parts(program: str) -> list[list[str]]:
    """The arguments of each command that runs a program."""
    commands = [shlex.split(command) for line in COMMANDS for command in line.split(" && ")]
    return [words[words.index(program) + 1 :] for words in commands if program in words]


def test_there_are_commands():
    assert len(parts("train_accelerate.py")) >= 15
    assert len(parts("everest-hf")) >= 12
    assert RECIPES


def test_every_program_that_is_shown_is_known():
    """A command that no test reads would be shown untested."""
    programs = {shlex.split(command)[0] for line in COMMANDS for command in line.split(" && ")}
    assert programs == {"accelerate", "everest-hf", "pip", "python", "pytest", "docker"}
    scripts = [arguments[0] for arguments in parts("python")]
    assert all((ROOT / script).is_file() for script in scripts), scripts


@pytest.mark.parametrize("arguments", parts("train_accelerate.py"), ids=" ".join)
def test_commands_of_the_training(arguments):
    path, options = parse_command_line(arguments)
    if path is not None and path.startswith("recipes/"):
        path = ROOT / path
        assert load_recipe(path, options).task in path.stem or path.stem not in ("pretrain", "finetune")
    elif path is None and options:
        load_recipe(None, options)


@pytest.mark.parametrize("arguments", [*parts("everest-hf"), *parts("everest_hf.cli")], ids=" ".join)
def test_commands_of_everest_hf(arguments):
    assert callable(build_parser().parse_args(arguments).command)


@pytest.mark.parametrize("text", RECIPES)
def test_recipes_are_loaded(text, tmp_path):
    (tmp_path / "recipe.yaml").write_text(text)
    assert load_recipe(tmp_path / "recipe.yaml").settings()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model and videos where those of the quickstart are."""
    folder = tmp_path_factory.mktemp("readme")
    config, saved = tiny_config(), folder / "runs/quickstart/finetune/model"
    EverestForVideoClassification(config).save_pretrained(saved)
    EverestVideoProcessor.from_config(config, frame_step=1).save_pretrained(saved)
    for i, name in enumerate(("left/1", "left/2", "right/3", "right/4")):
        write_clip(folder / f"data/motion/train/{name}.mp4", num_frames=6, seed=i)
    write_clip(folder / "data/motion/val/left/00004.mp4")
    write_clip(folder / "clip.mp4")
    return folder


@pytest.mark.parametrize("text", PYTHON)
def test_python_runs(text, folder, monkeypatch):
    monkeypatch.chdir(folder)
    exec(compile(text, "a page", "exec"), {})


def test_the_checks_of_contributors_are_those_of_ci():
    commands = [
        command
        for kind, text in blocks_of("CONTRIBUTING.md")
        for line in text.splitlines()
        for command in line.split("#")[0].strip().split(" && ")
    ]
    run = (ROOT / ".ci" / "run").read_text().replace("pip install -q", "pip install").splitlines()
    assert commands[:2] == ["python -m venv env", "source env/bin/activate"]
    assert len(commands) >= 7
    assert set(commands[2:]) <= set(run)


def test_files_that_are_named_are_there():
    table = text_of("CONTRIBUTING.md").split("## Where things are")[1].split("## Rules")[0]
    rows = [re.findall(r"`([^`]+)`", line.split("|")[1]) for line in table.splitlines() if line.startswith("| `")]
    for first, *others in rows:
        folder = (ROOT / first).parent
        for name in (first, *others):
            # After the first name of a row, its folder goes without saying.
            assert (ROOT / name).exists() or (folder / name).exists(), name


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    targets = re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", text_of(page))
    missing = [target for target in targets if not ((ROOT / page).parent / target).exists()]
    assert not missing


def test_result_files_that_pages_name_are_there():
    """But for one that nobody has made yet."""
    named = {name for page in PAGES for name in re.findall(r"benchmarks/results/([\w.-]+\w)", text_of(page))}
    assert {name for name in named if not (RESULTS / name).is_file()} == {"efficiency-memory-cuda.json"}


def figures_of_gpu() -> dict[tuple, dict]:
    """What was measured on the H100, by task and the keep ratio of EVEREST; VideoMAE is "dense"."""
    names = ("efficiency-pretraining-cuda.json", "efficiency-cuda.json")
    groups = [group for name in names for group in json.loads((RESULTS / name).read_text())["results"]]
    cases = [(group["task"], case) for group in groups for case in group["cases"]]
    return {(task, case["keep_ratio"] if case["model"] == "everest" else "dense"): case for task, case in cases}


def speedups_of_cpu() -> dict[str, float]:
    """How many times as fast as VideoMAE each task of the base model is on a CPU, in fp32 with 8 clips a step."""
    names = ("model-pretraining-cpu.json", "model-batch8-cpu.json")
    results = [result for name in names for result in json.loads((RESULTS / name).read_text())["results"]]
    return {r["task"]: r["speedup"] for r in results if (r["size"], r["dtype"], r["batch"]) == ("base", "fp32", 8)}


@pytest.mark.parametrize(("task", "ratio"), [("pretraining", 0.3), ("finetuning", 0.6), ("inference", 0.6)])
def test_figures_of_speed_are_those_of_the_result_files(task, ratio):
    gpu = figures_of_gpu()
    ours, dense = gpu[task, ratio], gpu[task, "dense"]
    fast, slow = ours["clips_per_second"], dense["clips_per_second"]
    memory = [f"{case['peak_bytes'] / 2**30:.1f} GiB" for case in (ours, dense)]
    shown = [f"{fast:,.0f}", f"{fast / slow:.2f}", *memory, f"{speedups_of_cpu()[task]:.2f}"]
    name = {"pretraining": "pre-training", "finetuning": "fine-tuning"}.get(task, task)
    assert f"| {name} | {' | '.join(shown)} |\n" in text_of("README.md")
