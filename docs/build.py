"""The API reference: pdoc's pages of every public object, where a name in backticks leads to what it names.

    python -m docs.build OUT

`undocumented` and `broken` say what the reference lacks; the tests ask that both are empty.
"""

from __future__ import annotations

import builtins
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
import pdoc.extract
import pdoc.render
from pdoc.render_helpers import relative_link

import em_interp
from analyses.suite import FOLDERS, Analysis

LEFT_OUT = ("cli",)
"""Of `em_interp`: the commands document themselves, by `--help`."""
ANALYSES = ("suite", "comparison", *FOLDERS)
"""Of `analyses`: what one reads to use them, or to write another."""
CODE = re.compile(r"```.*?```|`([^`\n]+)`", re.S)
NAME = re.compile(r"[A-Za-z]\w*(?:\.[A-Za-z_]\w*)*")
FILE_NAME = re.compile(r".*\.(csv|html|json|jsonl|py|safetensors|toml|yaml)")
RAISED = re.compile(r"\b[A-Z]\w+(?:Error|Warning)\b")


@cache
def modules() -> dict[str, pdoc.doc.Module]:
    """Every module of the reference, by name. A package with `__all__` does not bring its modules along."""
    inside = {f"em_interp.{m.name}" for m in pkgutil.iter_modules(em_interp.__path__) if m.name not in LEFT_OUT}
    specs = ["em_interp", "analyses", *(f"analyses.{name}" for name in ANALYSES), *sorted(inside)]
    names = {name: None for spec in specs for name in pdoc.extract.walk_specs([spec])}
    kept = re.compile(rf"em_interp(\..*)?|analyses(\.({'|'.join(ANALYSES)})(\..*)?)?")
    return {name: pdoc.doc.Module.from_name(name) for name in names if kept.fullmatch(name)}


def members(module: pdoc.doc.Module) -> Iterator[tuple[pdoc.doc.Doc, pdoc.doc.Class | None]]:
    """Each public object that is defined in a module, and the class that it belongs to."""
    for member in module.own_members:
        if member.name.startswith("_") or isinstance(member, pdoc.doc.Module):
            continue
        yield member, None
        if isinstance(member, pdoc.doc.Class):
            own = [x for x in member.own_members if not x.name.startswith("_")]
            yield from ((x, member) for x in own)


def undocumented() -> list[str]:
    """Public objects without a docstring. One field may be told of in its class's, as a word of its own.

    What every analysis has is told of once, in `analyses.suite.Analysis`.
    """
    lacking = [name for name, module in modules().items() if not module.docstring.strip()]
    for name, module in modules().items():
        for member, owner in members(module):
            told = member.docstring.strip() and not member.docstring.startswith("Alias for field number")
            if owner is not None and isinstance(member, pdoc.doc.Variable):
                told = told or isinstance(owner.obj, EnumType) or _tells_of(owner, member.name)
            if name.startswith("analyses.") and member.name in Analysis.__annotations__:
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
    ours = {name.split(".")[-1] for name in modules()} | {name for name in index() if name[:1].isupper()}
    found = []
    for _, member, _ in docstrings():
        for match in CODE.finditer(member.docstring):
            text = (match[1] or "").removesuffix("()")
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
        text = (match[1] or "").removesuffix("()")
        target = named(text, module, qualname) if NAME.fullmatch(text) and text not in parameters else None
        if target is None or (target.startswith(f"{module.fullname}.") and target not in modules()):
            return match[0]
        home = target
        while home not in modules():
            home = home.rpartition(".")[0]
        url = relative_link(module.fullname, home) + (f"#{target[len(home) + 1 :]}" if home != target else "")
        return f"[`{match[1]}`]({url})"

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
