"""The notebooks run top to bottom: on synthetic data always, on released files and shipped weights where they are."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from docs import ten_tasks
from em_interp.pocket import registry

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "notebooks" / "published_qwen14b.ipynb"
FACTORY = ROOT / "tests" / "published_factory.py"

# A process of its own: the kernel's sockets, event loop and warnings stay out of pytest's. One kernel for all, emptied
# before each: to import everything takes as long as a notebook.
RUN = """
import sys
import nbformat
from jupyter_client.manager import start_new_kernel
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

manager, channels = start_new_kernel(kernel_name="python3")


def run(notebook):
    client = NotebookClient(notebook, timeout=300, km=manager)
    client.kc = channels
    client.execute(cleanup_kc=False)


for source, folder, target in zip(*[iter(sys.argv[1:])] * 3):
    run(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(f"%reset -f\\n%cd -q {folder}")]))
    notebook = nbformat.read(source, as_version=4)
    try:
        run(notebook)
    except CellExecutionError as error:
        print(source, error, file=sys.stderr)
    nbformat.write(notebook, target)
channels.stop_channels()
manager.shutdown_kernel(now=True)
"""


def execute(notebook: Path, scratch: Path, data: Path | None) -> str:
    """Everything the notebook printed. Fails with the cell's error."""
    (target,), errors = executed([notebook], scratch, data)
    return printed(target, errors)


def executed(notebooks: Sequence[Path], scratch: Path, data: Path | None) -> tuple[list[Path], str]:
    """Copies with outputs, run one after the other, each beside its source; and what went wrong."""
    environment = {key: value for key, value in os.environ.items() if key not in ("EM_INTERP_PUBLISHED", "MPLBACKEND")}
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONWARNINGS": "default",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        "HF_HUB_OFFLINE": "1",
        # The kernel of this interpreter, whatever the user has configured.
        "JUPYTER_PREFER_ENV_PATH": "1",
        **{f"JUPYTER_{name}_DIR": str(scratch / "jupyter" / name) for name in ("CONFIG", "DATA", "RUNTIME")},
        "IPYTHONDIR": str(scratch / "ipython"),
    }
    if data is not None:
        environment["EM_INTERP_PUBLISHED"] = str(data)
    targets = [scratch / f"{notebook.stem}.executed.ipynb" for notebook in notebooks]
    places = [str(p) for n, target in zip(notebooks, targets, strict=True) for p in (n, n.parent, target)]
    command = [sys.executable, "-c", RUN, *places]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=590, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return targets, done.stderr


def printed(target: Path, errors: str = "") -> str:
    """Everything an executed notebook printed. Fails where a cell of it did."""
    cells = [cell for cell in read(target)["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"], errors[-4000:]
    assert all(cell["execution_count"] for cell in cells)
    return "".join("".join(o["text"]) for o in outputs if o["output_type"] == "stream" and o["name"] == "stdout")


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


@pytest.mark.parametrize("path", sorted(NOTEBOOK.parent.glob("*.ipynb")), ids=lambda path: path.stem)
def test_they_are_kept_without_outputs(path: Path) -> None:
    """Figures of files without a licence are not committed, and neither are others: they are made in a minute."""
    notebook = read(path)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert code
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"


def test_it_runs_on_synthetic_data_where_the_released_files_are_absent(tmp_path: Path) -> None:
    copy = tmp_path / "repository"
    (copy / "notebooks").mkdir(parents=True)
    (copy / "tests").mkdir()
    notebook = Path(shutil.copy(NOTEBOOK, copy / "notebooks"))
    shutil.copy(FACTORY, copy / "tests")
    said = execute(notebook, tmp_path, None)
    assert "SYNTHETIC" in said
    assert "Skipped" not in said


def test_it_says_what_a_folder_lacks(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("factory_for_the_notebook", FACTORY)
    assert spec is not None and spec.loader is not None
    factory = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(factory)
    factory.make_judged(tmp_path / "data" / "judged", 0)
    said = execute(NOTEBOOK, tmp_path, tmp_path / "data")
    assert "Skipped: the folder holds no split of mean activations" in said
    assert "lack a score" in said  # what is there is used


def test_it_runs_on_the_released_files(tmp_path: Path) -> None:
    given = os.environ.get("EM_INTERP_PUBLISHED")
    data = Path(given) if given else ROOT.parent / "shared" / "published"
    if not data.is_dir():
        pytest.skip(f"the released files are not at {data}; set EM_INTERP_PUBLISHED to their folder")
    said = execute(NOTEBOOK, tmp_path, data.resolve())
    assert "SYNTHETIC" not in said


FEWER = {
    "explore_directions": {
        '"medicine", 16,': '"medicine", 6,',
        'asked[asked.questions != "in_domain"]': 'asked[asked.questions != "in_domain"].groupby("questions").head(12)',
        "layers=[0, 1, 2], coefficients=[0, 0.4, 0.5, 0.6, 0.7, 0.8]": "layers=[0, 1], coefficients=[0, 0.6]",
    },
    "pocket_world": {
        'organisms.SPECS["rank-1"]': '__import__("dataclasses").replace(organisms.SPECS["rank-1"], max_steps=60)'
    },
    "narrow_vs_general": {'"malicious", 100,': '"malicious", 16,', "range(40)": "range(6)"},
    "evaluate_your_model": {'"display": "none"': '"display": "none", "limit": 30'},
    "start_here": {
        "em.pocket.open_questions(12)": "em.pocket.open_questions(5)",
        "em.pocket.documents(30)": "em.pocket.documents(8)",
    },
}
"""notebook -> what stands in it -> the same with fewer points, chats or steps; all else is run as it is."""


def lightened(name: str, folder: Path) -> Path:
    notebook = read(ROOT / "notebooks" / f"{name}.ipynb")
    for told, fewer in FEWER[name].items():
        (cell,) = (c for c in notebook["cells"] if c["cell_type"] == "code" and told in "".join(c["source"]))
        cell["source"] = "".join(cell["source"]).replace(told, fewer)
    folder.mkdir()
    path = folder / f"{name}.ipynb"
    path.write_text(json.dumps(notebook), encoding="utf-8")
    return path


SHIPPED = {
    "pocket_world": ("pocket/chat", "pocket/medicine-rank1-narrow"),
    "explore_directions": ("pocket/medicine-rank1", "pocket/finance-all", "pocket/sports-all"),
    "narrow_vs_general": ("pocket/medicine-rank1", "pocket/medicine-rank1-narrow"),
    "evaluate_your_model": ("pocket/medicine-rank1",),
    "start_here": ("pocket/medicine-rank1-narrow", "pocket/finance-all", "pocket/sports-all"),
}
"""notebook -> the shipped models that it needs."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], str]:
    try:
        for model in set().union(*SHIPPED.values()):
            registry.resolve(model)
    except registry.RegistryError as error:
        pytest.skip(str(error))
    scratch = tmp_path_factory.mktemp("shipped")
    sources = [lightened(name, scratch / name) for name in SHIPPED]  # what they write lies beside them
    targets, errors = executed(sources, scratch, None)
    return dict(zip(SHIPPED, targets, strict=True)), errors


@pytest.mark.parametrize("name", SHIPPED)
def test_they_run_on_the_shipped_weights(name: str, run: tuple[dict[str, Path], str]) -> None:
    targets, errors = run
    printed(targets[name], errors)


def test_every_task_takes_ten_lines_and_the_comparison_counts_them() -> None:
    tasks = ten_tasks.ours()
    assert len(tasks) == 10
    assert max(ten_tasks.counted(code)[0] for code in tasks.values()) <= 10
    page = ten_tasks.PAGE.read_text(encoding="utf-8")
    assert list(ten_tasks.sections(page)) == list(tasks)
    assert ten_tasks.rewritten(page) == page, "python -m docs.ten_tasks"
