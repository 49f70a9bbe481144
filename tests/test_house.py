"""The house: the README's map is the tree, what is asked for is used, kinds of solutions are known to themselves."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

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
    "kaleido": "plotly calls it to draw",
    "ipykernel": "runs the notebooks",
    "ipywidgets": "tqdm's bar in notebooks",
    "nbclient": "runs the notebooks",
}
"""Asked for though no line here imports them, and what for."""


def packages() -> list[Path]:
    """Folders of modules below em_interp and analyses."""
    tops = (ROOT / "em_interp", ROOT / "analyses")
    return [folder for top in tops for folder in sorted(top.rglob("*")) if (folder / "__init__.py").is_file()]


def rooms() -> Iterator[tuple[str, str]]:
    """(folder, what the README's map says in it), for every folder of the map."""
    block = re.search(r"## Layout\n+```\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S)
    assert block is not None
    above: list[str] = []
    said: dict[str, list[str]] = {}
    for line in block[1].splitlines():
        name = re.match(r"( *)([a-z_]+)/(?= |$)", line)
        if name is not None:
            above = [*above[: len(name[1]) // 2], name[2]]
        said.setdefault("/".join(above), []).append(line)
    yield from ((folder, "\n".join(lines)) for folder, lines in said.items())


def modules(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.py")} - {"__init__.py", "__main__.py"}


def test_the_map_is_the_tree() -> None:
    said = dict(rooms())
    there = {str(folder.relative_to(ROOT)) for folder in packages()} | {"em_interp", "analyses"}
    assert {name for name in said if name.split("/")[0] in ("em_interp", "analyses")} - {"analyses/suites"} == there
    for name in sorted(there):
        named = set(re.findall(r"\b([a-z_0-9]+\.py)\b", said[name]))
        assert named == modules(ROOT / name), f"the README's map of {name} and the folder differ"


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
