"""The house: the maps are the tree, what is asked for is used, kinds of solutions are known to themselves."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KINDS = re.compile(r"\b(SteeringVector|LoraAdapter|WeightDelta|Dora\w*)\b")
CONFIGS = re.compile(r"\b(VectorConfig|LoraConfig)\b")
"""Of adapters' folders, which `files` reads."""
IMPORTED_AS = {
    "accelerate": "accelerate",
    "huggingface_hub": "huggingface_hub",
    "pyyaml": "yaml",
    "scikit-learn": "sklearn",
}
FOR_PEOPLE = {
    "accelerate": "transformers wants it for a device map",
    "openai": "Inspect speaks with most judges through it",
    "kaleido": "plotly calls it to draw",
    "ipykernel": "runs the notebooks",
    "ipywidgets": "tqdm's bar in notebooks",
    "nbclient": "runs the notebooks",
}
"""Asked for though no line here imports them, and what for."""


def packages() -> list[Path]:
    """em_interp, analyses and every folder of modules below them."""
    tops = (ROOT / "em_interp", ROOT / "analyses")
    return [folder for top in tops for folder in (top, *sorted(top.rglob("*"))) if (folder / "__init__.py").is_file()]


def modules(folder: Path) -> set[str]:
    """Modules and packages in a folder."""
    inside = {path.name for path in folder.iterdir() if (path / "__init__.py").is_file()}
    return {path.stem for path in folder.glob("*.py") if not path.stem.startswith("__")} | inside


@pytest.mark.parametrize("folder", packages(), ids=lambda folder: str(folder.relative_to(ROOT)))
def test_a_package_says_what_is_in_it(folder: Path) -> None:
    """Its docstring is the map: a list with the names of its modules in backticks."""
    said = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
    entries = re.findall(r"^- (.*?)(?:\n(?! )|\Z)", said, flags=re.M | re.S)
    named = {name for entry in entries for name in re.findall(r"`([a-z_0-9]+)`", entry)}
    assert named == modules(folder), f"the map of {folder.relative_to(ROOT)} in its docstring and the folder differ"


def test_the_readme_has_every_folder() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    there = {str(folder.relative_to(ROOT)) for folder in packages()} - {"em_interp", "analyses"}
    assert {name for name in there if f"`{name}`" not in text} == set()
    said = set(re.findall(r"`((?:em_interp|analyses)/[a-z_/]+)`", text))
    assert said - {"analyses/suites"} - {str(p.relative_to(ROOT)) for p in packages()} == set()


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def test_every_dependency_is_imported() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [d for name, of in project["optional-dependencies"].items() if name != "dev" for d in of]
    asked = {re.split(r"[<>=!\[ ]", line)[0] for line in (*project["dependencies"], *extras)}
    used = set().union(*(imports(p) for top in ("em_interp", "analyses") for p in (ROOT / top).rglob("*.py")))
    unused = {name for name in asked if IMPORTED_AS.get(name, name.replace("-", "_")) not in used}
    assert unused - set(FOR_PEOPLE) == set()


def test_no_kind_of_solution_is_asked_for_outside_its_folder() -> None:
    asked = []
    for top in ("em_interp", "analyses"):
        for path in (ROOT / top).rglob("*.py"):
            room = path.relative_to(ROOT).parts[1]
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
                    what = ast.unparse(node.args[1])
                    foreign = KINDS.search(what) or (CONFIGS.search(what) and room != "files")
                    asked += [f"{path.relative_to(ROOT)}:{node.lineno}"] if foreign and room != "solutions" else []
    assert asked == []
