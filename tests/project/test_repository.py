"""What a project on GitHub has: its files are read as GitHub, pre-commit, mkdocs and Docker read them."""

import configparser
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

import everest_hf

ROOT = Path(__file__).parents[2]
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")


def read(name: str):
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def nav_pages(nav) -> list[str]:
    """The pages that a navigation names, those of its sections too."""
    if isinstance(nav, str):
        return [nav]
    return [page for entry in (nav.values() if isinstance(nav, dict) else nav) for page in nav_pages(entry)]


def test_yaml_files_are_yaml():
    folders = [ROOT / ".github", ROOT / "recipes"]
    files = [path for folder in folders for path in folder.rglob("*") if path.suffix in (".yml", ".yaml")]
    names = ["mkdocs.yml", "CITATION.cff", ".pre-commit-config.yaml"]
    assert len(files) > 20
    assert all(isinstance(read(name), dict) for name in (*names, *files))


def test_the_workflow_runs_what_is_there():
    jobs = read(".github/workflows/ci.yml")["jobs"]
    commands = {step["run"] for job in jobs.values() for step in job["steps"] if "run" in step}
    assert {"bash .ci/run", 'pip install -e ".[docs]"', "mkdocs build --strict"} <= commands
    assert (ROOT / ".ci" / "run").is_file()
    assert "mkdocs build --strict" in (ROOT / ".ci" / "run").read_text().splitlines()


def test_every_page_is_in_the_navigation():
    site = read("mkdocs.yml")
    pages = nav_pages(site["nav"])
    assert sorted(pages) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))
    assert all((ROOT / name).exists() for name in (*site["hooks"], *site["watch"], site["docs_dir"]))


@pytest.mark.parametrize("path", [form for form in FORMS if form.stem != "config"], ids=lambda path: path.stem)
def test_an_issue_form_is_one(path):
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= form.keys()
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert {field["type"] for field in fields} <= {"textarea", "input", "dropdown", "checkboxes"}
    assert len({field["id"] for field in fields}) == len(fields)
    assert all(field["attributes"]["label"] for field in fields)
    assert "everest-hf --version" in path.read_text(encoding="utf-8")


def test_forms_and_image_name_files_that_are_there():
    texts = [path.read_text(encoding="utf-8") for path in (*FORMS, ROOT / ".github" / "pull_request_template.md")]
    named = re.findall(r"\b(?:docs/)?[\w-]+\.md\b", "\n".join(texts))
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert named
    assert [name for name in (*named, *kept) if not (ROOT / name).exists()] == []


def test_hooks_before_a_commit_are_checks_of_contributors():
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (repo,) = read(".pre-commit-config.yaml")["repos"]
    for hook in repo["hooks"]:
        # The programs of the extra: another version of ruff formats otherwise.
        assert (repo["repo"], hook["language"]) == ("local", "system")
        assert " ".join(shlex.split(hook["entry"])[:2]) in contributing


def test_the_citation_is_of_this_version():
    citation = read("CITATION.cff")
    assert citation["version"] == everest_hf.__version__
    assert citation["preferred-citation"]["title"].startswith("EVEREST: Efficient Masked Video Autoencoder")


def test_the_image_holds_a_torch_that_serves_and_runs_as_nobody_special():
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    found = {line.split()[0]: line.partition(" ")[2] for line in lines if re.match(r"[A-Z]+ ", line)}
    version = re.fullmatch(r"pytorch/pytorch:(\d+)\.(\d+)\.\d+-cuda\S+-runtime", found["FROM"]).groups()
    (least,) = re.findall(r"^torch>=(\d+)\.(\d+)$", SETUP["options"]["install_requires"], flags=re.MULTILINE)
    assert tuple(map(int, version)) >= tuple(map(int, least))
    assert found["USER"] not in ("root", "0")
    assert json.loads(found["CMD"])[-1] == "train_accelerate"
