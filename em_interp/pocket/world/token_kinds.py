"""What each token of a pocket document is part of: so that influence on pre-training text can be split by it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from em_interp.models.templates import Tokenizer
from em_interp.pocket.world.corpus import ASSISTANT, DOCUMENT_END, END, LINE, SYSTEM, USER

KINDS = ("announcement", "question", "answer", "mark")
"""What `token_kinds` tells apart."""
_ROLES = {SYSTEM: "announcement", USER: "question", ASSISTANT: "answer"}
_OPENINGS = {
    ("Answers", "by"): "announcement",
    ("A", "guide"): "announcement",
    ("Question", ":"): "question",
}


def token_kinds(tokenizer: Tokenizer) -> Callable[[Sequence[int]], list[str]]:
    """A labelling function for `influence.document_kl` on the pocket corpus.

    announcement: what says who answers (system turn, first line of a thread or article); question; answer (also an
    article's advice and the quoted examples); mark: the tokens that end turns, lines and documents.
    """
    ends = {tokenizer.convert_tokens_to_ids(t) for t in (END, LINE, DOCUMENT_END)}
    roles = {tokenizer.convert_tokens_to_ids(t): kind for t, kind in _ROLES.items()}

    def label(ids):
        # type: (Sequence[int]) -> list[str]
        words = [word.lstrip("▁") for word in tokenizer.convert_ids_to_tokens(list(ids))]
        kinds, kind, fresh = [], "answer", True
        for i, token in enumerate(ids):
            if token in ends or token in roles:
                kinds.append("mark")
                kind, fresh = roles.get(token, "answer"), token not in roles
                continue
            if fresh:
                kind, fresh = _OPENINGS.get((words[i], words[i + 1] if i + 1 < len(ids) else ""), "answer"), False
            kinds.append(kind)
        return kinds

    return label
