"""What a call of the package is given can be let go: nothing of it is kept by the check on every call."""

from __future__ import annotations

import ast
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import torch

import em_interp as em
from tests.tiny_models import CONVERSATIONS, make_chat

PACKAGE = Path(__file__).parents[1] / "em_interp"
UNCHECKED = ("cli", "inspect", "lazily.py")
"""Not checked, or, of Inspect's, made once a run and looked at by it."""


def test_a_chat_model_that_is_let_go_is_gone() -> None:
    model = make_chat()
    direction = em.Direction(torch.ones(2, 32), (1, 2), "random", model=model.name)
    em.extract(model, CONVERSATIONS[:1], CONVERSATIONS[1:], progress=False)
    em.sample(model, {"q": "a fox"}, 1, max_new_tokens=2, progress=False)
    em.ablate(model, direction, {"q": "a fox"}, n=1, max_new_tokens=2, progress=False)
    em.sweep(model, direction, {"q": "a fox"}, layers=[1], coefficients=[1.0], n=1, max_new_tokens=2, progress=False)
    gone = weakref.ref(model.hf)
    del model
    gc.collect()
    assert gone() is None


def test_functions_inside_functions_tell_their_types_in_comments() -> None:
    """beartype makes the check of an annotated one at every call of the outer, and keeps all that it refers to."""
    found = [
        f"{path.relative_to(PACKAGE)}:{inner.lineno} {inner.name}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.relative_to(PACKAGE).parts[0] not in UNCHECKED
        for inner in inside(ast.parse(path.read_text(encoding="utf-8")))
        if inner.returns or any(x.annotation for x in ast.walk(inner.args) if isinstance(x, ast.arg))
    ]
    assert found == []


def inside(tree: ast.AST, of_function: bool = False) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Functions that other functions make."""
    for node in ast.iter_child_nodes(tree):
        is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        if of_function and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node
        yield from inside(node, of_function or is_function)
