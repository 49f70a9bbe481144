"""Lines and imports of ten everyday tasks: here, and as the documentation of other tools writes them.

    python -m docs.ten_tasks

writes the table of `ten_tasks.md` anew, from the code blocks below it and the cells of `notebooks/start_here.ipynb`.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

HERE = Path(__file__).resolve().parent
PAGE = HERE / "ten_tasks.md"
NOTEBOOK = HERE.parent / "notebooks" / "start_here.ipynb"
TOOLS = ("TransformerLens", "nnterp", "steering-vectors", "repeng")
START, END = "<!-- table -->\n", "<!-- end of table -->\n"


def counted(code: str) -> tuple[int, int]:
    """Lines of code, without blank lines and comments, and how many of them are imports."""
    lines = [line for line in code.splitlines() if line.strip() and not line.strip().startswith("#")]
    imports = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import | ast.ImportFrom)]
    return len(lines), len(imports)


def sections(page: str) -> dict[str, dict[str, str]]:
    """Task -> tool -> its code, or what the page says instead."""
    found: dict[str, dict[str, str]] = {}
    for task in re.split(r"^## ", page, flags=re.M)[1:]:
        title, _, text = task.partition("\n")
        if not re.match(r"\d+\. ", title):
            continue
        found[title] = {}
        for part in re.split(r"^\*\*", text, flags=re.M)[1:]:
            tool, _, said = part.partition(":**")
            code = re.search(r"```python\n(.*?)```", said, flags=re.S)
            found[title][tool] = code[1] if code else said.split(".")[0].strip()
    return found


def ours() -> dict[str, str]:
    """Task -> the code of its cells in the notebook, the import at its top included."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    found: dict[str, str] = {}
    title = ""
    for cell in cells:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            heading = re.match(r"## (\d+\. .*)", text)
            title = heading[1] if heading else title
        elif title:
            found[title] = found.get(title, "") + text + "\n"
    return {title: f"import em_interp as em\n{code}" for title, code in found.items()}


def table(page: str) -> str:
    """The table in Markdown: lines, of which imports, of each task and tool."""
    here = ours()
    rows = [f"| task | em_interp | {' | '.join(TOOLS)} |", "|---|" + "---|" * (len(TOOLS) + 1)]
    for title, by_tool in sections(page).items():
        cells = [_cell(here[title]), *(_cell(by_tool[tool]) for tool in TOOLS)]
        rows.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def _cell(found: str) -> str:
    if "\n" not in found:
        return "—" if found == "no" else found
    lines, imports = counted(found)
    return f"{lines} ({imports})"


def rewritten(page: str) -> str:
    """The page with its table made anew."""
    before, _, rest = page.partition(START)
    return before + START + table(page) + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
