"""The API reference: pdoc's pages of every public object, where a name in backticks leads to what it names.

    python -m docs.build OUT

`undocumented` and `broken` say what the reference lacks; the tests ask that both are empty.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import pkgutil
import re
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from enum import EnumType
from functools import cache
from pathlib import Path

import pdoc
import pdoc.doc
import pdoc.render
from pdoc.render_helpers import relative_link

import analyses
import em_interp
from analyses.suite import FOLDERS

KEPT = re.compile(
    rf"em_interp\.(?!cli\.)(?!.*__main__).*|analyses\.(suite|comparison|({'|'.join(FOLDERS)})(\..*)?)",
)
"""What one reads to use the package, or to write another analysis. The commands document themselves, by `--help`."""
OF_ANALYSES = tuple(f"analyses.{folder}." for folder in FOLDERS)
CODE = re.compile(r"```.*?```|`([^`\n]+)`", re.S)
NAME = re.compile(r"[A-Za-z]\w*(?:\.[A-Za-z_]\w*)*")
FILE_NAME = re.compile(r".*\.(csv|html|json|jsonl|pt|py|safetensors|toml|yaml)")
RAISED = re.compile(r"\b[A-Z]\w+(?:Error|Warning)\b")


@cache
def modules() -> dict[str, pdoc.doc.Module]:
    """Every module of the reference, by name."""
    found = {"em_interp": em_interp, "analyses": analyses}
    for top in list(found.values()):
        for module in pkgutil.walk_packages(top.__path__, f"{top.__name__}."):
            if KEPT.fullmatch(module.name):
                found[module.name] = importlib.import_module(module.name)
    for module in found.values():  # names that are imported as they are asked for
        vars(module).update({name: getattr(module, name) for name in getattr(module, "__all__", ())})
    return {name: pdoc.doc.Module(module) for name, module in found.items()}


def members(module: pdoc.doc.Module) -> Iterator[tuple[pdoc.doc.Doc, pdoc.doc.Class | None]]:
    """Each public object that a module defines (not those it takes from another), and the class that it belongs to."""
    own = _defined(module)
    for member in module.own_members:
        if member.name not in own or member.name.startswith("_"):
            continue
        yield member, None
        if isinstance(member, pdoc.doc.Class):
            yield from ((x, member) for x in member.own_members if not x.name.startswith("_"))


def _defined(module: pdoc.doc.Module) -> set[str]:
    found = set()
    for node in ast.parse(module.source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return found & set(getattr(module.obj, "__all__", found))


def undocumented() -> list[str]:
    """Public objects without a docstring. One field may be told of in its class's, as a word of its own.

    What every analysis has is told of once, in `analyses.suite.Analysis`; settings that are its own are told where they
    are used.
    """
    lacking = [name for name, module in modules().items() if not module.docstring.strip()]
    for name, module in modules().items():
        for member, owner in members(module):
            told = member.docstring.strip() and not member.docstring.startswith("Alias for field number")
            if owner is not None and isinstance(member, pdoc.doc.Variable):
                told = told or isinstance(owner.obj, EnumType) or _tells_of(owner, member.name)
            if name.startswith(OF_ANALYSES) and owner is None and isinstance(member, pdoc.doc.Variable):
                continue
            lacking += [] if told else [member.fullname]
    return lacking


def _tells_of(owner: pdoc.doc.Class, field: str) -> bool:
    documents = [owner.docstring, *(base.__doc__ or "" for base in owner.obj.__mro__ if base is not object)]
    return any(re.search(rf"\b{field}\b", text) for text in documents)


@cache
def index() -> dict[str, list[str]]:
    """Every way to name an object (`a.b.C.d`, `b.C.d`, `C.d`; of functions and classes also `C`) -> its full names."""
    found: dict[str, list[str]] = defaultdict(list)
    for name, module in modules().items():
        for given in getattr(module.obj, "__all__", ()):
            for package in {name, name.split(".")[-1], *(["em"] if name == "em_interp" else [])}:
                found[f"{package}.{given}"].append(f"{name}.{given}")
        named = [(name, 2), *((m.fullname, _shortest(m, owner)) for m, owner in members(module))]
        for fullname, shortest in named:
            parts = fullname.split(".")
            for length in range(min(shortest, len(parts)), len(parts) + 1):
                found[".".join(parts[-length:])].append(fullname)
    return found


def _shortest(member: pdoc.doc.Doc, owner: pdoc.doc.Class | None) -> int:
    return 1 if owner is None and isinstance(member, pdoc.doc.Class | pdoc.doc.Function) else 2


def named(text: str, module: pdoc.doc.Module, owner: str) -> str | None:
    """The full name of what `text` means in a docstring of `owner` (its qualified name) in `module`."""
    here = [module.fullname, *owner.split(".")] if owner else [module.fullname]
    for length in range(len(here), 0, -1):
        fullname = ".".join([*here[:length], text])
        if fullname in index().get(fullname, ()):
            return fullname
    found = set(index().get(text, ()))
    return found.pop() if len(found) == 1 else None


def docstrings() -> Iterator[tuple[pdoc.doc.Module, pdoc.doc.Doc, str]]:
    """Every docstring of the reference: its module, its object, and the qualified name that stands in it for `self`."""
    for module in modules().values():
        yield module, module, ""
        for member, _ in members(module):
            yield module, member, member.qualname


def broken() -> list[str]:
    """What docstrings name and nothing is called: a dotted name that begins with one of ours, an error, a class."""
    ours = {"em"} | {name.split(".")[-1] for name in modules()} | {name for name in index() if name[:1].isupper()}
    found = []
    for _, member, _ in docstrings():
        for match in CODE.finditer(member.docstring):
            text = (match[1] or "").partition("(")[0]
            if not NAME.fullmatch(text) or FILE_NAME.fullmatch(text) or "." not in text:
                continue
            if text.split(".")[0] in ours and text not in index():
                found.append(f"{member.fullname}: `{text}`")
        for name in RAISED.findall(member.docstring):
            if name not in index() and not hasattr(builtins, name):
                found.append(f"{member.fullname}: {name}")
    return found


def link(module: pdoc.doc.Module, member: pdoc.doc.Doc, qualname: str) -> str:
    """The docstring, with names in backticks as links to other pages (pdoc makes those of the same page)."""
    parameters = set(member.signature.parameters) if isinstance(member, pdoc.doc.Function) else set()

    def linked(match: re.Match[str]) -> str:
        text = (match[1] or "").partition("(")[0]
        target = named(text, module, qualname) if NAME.fullmatch(text) and text not in parameters else None
        if target is None or (target == f"{module.fullname}.{text}" and target not in modules()):
            return match[0]
        home = target
        while home not in modules():
            home = home.rpartition(".")[0]
        anchor = target[len(home) + 1 :].replace(".", "%2E")  # pdoc would link what follows a dot
        return f"[`{match[1]}`]({relative_link(module.fullname, home)}{'#' if anchor else ''}{anchor})"

    return CODE.sub(linked, member.docstring)


def build(out: Path) -> None:
    """Write the pages. What pdoc warns of is an error here."""
    pdoc.render.configure(docformat="markdown", show_source=False, footer_text=f"em_interp {em_interp.__version__}")
    with warnings.catch_warnings(), with_links():
        warnings.simplefilter("error", UserWarning)
        for name, module in modules().items():
            page = out / f"{name.replace('.', '/')}.html"
            page.parent.mkdir(parents=True, exist_ok=True)
            page.write_text(pdoc.render.html_module(module, modules()), encoding="utf-8")
        (out / "index.html").write_text(pdoc.render.html_index(modules()), encoding="utf-8")
        (out / "search.js").write_text(pdoc.render.search_index(modules()), encoding="utf-8")


@contextmanager
def with_links() -> Iterator[None]:
    """Inside, every docstring has its links."""
    before = [(member, member.docstring) for _, member, _ in docstrings()]
    after = [link(module, member, qualname) for module, member, qualname in docstrings()]
    try:
        for (member, _), text in zip(before, after, strict=True):
            vars(member)["docstring"] = text
        yield
    finally:
        for member, text in before:
            vars(member)["docstring"] = text


if __name__ == "__main__":
    for problem in (*undocumented(), *broken()):
        sys.exit(f"the reference lacks: {problem}")
    build(Path(sys.argv[1]))
