"""The API reference: every public object is documented, what docstrings name is there, and examples run."""

from __future__ import annotations

import doctest
import re
from pathlib import Path
from urllib.parse import unquote

import pytest

pytest.importorskip("pdoc")

from docs import build

EXAMPLES = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def test_every_public_object_is_documented() -> None:
    assert build.undocumented() == []


def test_what_docstrings_name_is_there() -> None:
    assert build.broken() == []


def test_pages_are_built_without_a_warning_and_every_link_leads_somewhere(tmp_path: Path) -> None:
    build.build(tmp_path)
    pages = {page: page.read_text(encoding="utf-8") for page in tmp_path.rglob("*.html")}
    anchors = {page: set(re.findall(r'\bid="([^"]+)"', text)) for page, text in pages.items()}
    assert tmp_path / "em_interp.html" in pages and tmp_path / "index.html" in pages
    dead = []
    for page, text in pages.items():
        for link in re.findall(r'\bhref="([^"]+)"', text):
            target, _, anchor = unquote(link).partition("#")
            if re.match(r"[a-z]+:|\$", target):  # another site; what a script fills in
                continue
            to = (page.parent / target).resolve() if target else page
            if to not in pages or (anchor and anchor not in anchors[to]):
                dead.append(f"{page.relative_to(tmp_path)}: {link}")
    assert dead == []


def test_every_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = [(module, member) for module, member, _ in build.docstrings() if ">>>" in member.docstring]
    assert examples
    said: list[str] = []
    for module, member in examples:
        (folder := tmp_path / member.fullname).mkdir()
        monkeypatch.chdir(folder)
        names = dict(vars(module.obj))
        example = doctest.DocTestParser().get_doctest(member.docstring, names, member.fullname, None, 0)
        doctest.DocTestRunner(optionflags=EXAMPLES).run(example, out=said.append)
    assert not said, "".join(said)
