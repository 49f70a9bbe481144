"""What a newcomer hands over by mistake works, or is refused in words that say what to give."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

import em_interp as em
from em_interp.errors import EmInterpError

QUIET: dict[str, Any] = {"progress": False}
GRID: dict[str, Any] = {"n": 1, "max_new_tokens": 4, "random_arms": 0, **QUIET}
TYPES = re.compile(r"collections\.abc|typing\.|<class|<protocol|violates|type hint|em_interp\.\w+\.|NoneType|builtins")
"""What no newcomer reads."""


def held() -> Any:
    """What people hold while they make mistakes."""
    chat = em.load("pocket/chat")
    bad, good = (em.pocket.finetune_chats("medicine", persona, 4, seed=1) for persona in ("malicious", "caring"))
    contrast = em.contrast(chat, bad, good, progress=False)
    solution = em.load_solution("pocket/medicine-rank1")
    return SimpleNamespace(
        chat=chat,
        bad=bad,
        good=good,
        contrast=contrast,
        direction=contrast.direction(),
        solution=solution,
        named={"general": solution},
        asked=em.pocket.open_questions(1),
        answers=pd.DataFrame({"question": ["Why?"], "answer": ["So."]}),
    )


REFUSED: dict[str, tuple[Callable[[Any], object], str]] = {
    "a loaded model to load": (lambda h: em.load(h.chat), "loaded already"),
    "a loaded model as a solution": (lambda h: em.load_solution(h.chat), "loaded already"),
    "a near name": (lambda h: em.load("pocket/medicine"), "pocket/medicine-rank1"),
    "no such folder": (lambda h: em.load("./no/such"), "no such folder"),
    "a model's name for a model": (lambda h: em.extract("pocket/chat", h.bad, h.good), r"Give a ChatModel\. em\.load"),
    "the transformers model": (lambda h: em.extract(h.chat.hf, h.bad, h.good), r"em\.ChatModel\(hf, tokenizer\)"),
    "the model forgotten": (lambda h: em.extract(h.bad, h.good), "It comes first"),
    "a ChatModel twice": (lambda h: em.ChatModel(h.chat, h.chat.tokenizer), "ChatModel already"),
    "no such file of chats": (lambda h: em.extract(h.chat, "missing.jsonl", h.good), "no such file"),
    "one side": (lambda h: em.extract(h.chat, h.bad), "the negative one is missing"),
    "texts for chats": (lambda h: em.extract(h.chat, ["bad"], ["good"]), "list of turns"),
    "one chat for chats": (lambda h: em.extract(h.chat, h.bad[0], h.good[0]), r"\[conversation\]"),
    "a word for layers": (lambda h: em.extract(h.chat, h.bad, h.good, layers="all"), "a list of whole numbers"),
    "a layer beyond": (lambda h: em.extract(h.chat, h.bad, h.good, layers=[99]), "from 0 to 5"),
    "the papers' word": (lambda h: em.extract(h.chat, h.bad, h.good, kind="mean-diff"), "data-diff"),
    "an unknown scope": (lambda h: em.extract(h.chat, h.bad, h.good, scope="answer"), "response"),
    "a file for a direction": (lambda h: em.Steer("d.safetensors", 1, 4.0), r"em\.Direction\.load\(FILE\)"),
    "layers for a layer": (lambda h: em.Steer(h.direction, [1, 2], 4.0), "Give a whole number"),
    "a contrast for a direction": (lambda h: em.Steer(h.contrast, 1, 4.0), r"direction\(\) is one"),
    "a solution for a direction": (lambda h: em.Steer(h.solution, 1, 4.0), "solution.attached"),
    "a direction for interventions": (lambda h: em.intervening(h.chat, h.direction).__enter__(), r"em\.Steer\("),
    "a question for questions": (
        lambda h: em.sweep(h.chat, h.direction, "Who?", layers=1, coefficients=1, n=1),
        "list",
    ),
    "a number for questions": (lambda h: em.sample(h.chat, 3, 1), "text or a path or a list"),
    "a number for a question": (lambda h: em.sample(h.chat, {"q": 3}, 1), "Give a text"),
    "a number in questions": (lambda h: em.sample(h.chat, [1], 1), "Give a text"),
    "no such unit": (
        lambda h: em.sweep(h.chat, h.direction, h.asked, layers=1, coefficients=1, units="norm", **GRID),
        "'direction' or 'residual'",
    ),
    "a file of judged answers": (lambda h: em.em_rates("judged.csv"), r"pandas\.read_csv"),
    "answers that nobody judged": (lambda h: em.rates(h.answers), "Let a judge add them"),
    "a solution for solutions": (lambda h: em.efficiency(h.chat, h.solution, h.bad), r'\{"general": em\.load_solution'),
    "a list of solutions": (lambda h: em.efficiency(h.chat, [h.solution], h.bad), r'\{"general": em\.load_solution'),
    "names of solutions": (lambda h: em.efficiency(h.chat, {"a": "pocket/chat"}, h.bad), "which holds something else"),
    "directions for solutions": (lambda h: em.stability(h.chat, {"a": h.direction}, h.bad), r"em\.load_solution"),
    "questions for chats": (lambda h: em.efficiency(h.chat, h.named, list(h.asked.values())), "list of turns"),
    "a text for texts": (lambda h: em.influence(h.chat, h.named, "the quick brown fox"), r"\[text\]"),
    "one perturbation": (lambda h: em.stability(h.chat, h.named, h.bad, n_seeds=1), "at least two"),
    "a list for cosines": (lambda h: em.cosines([h.direction]), r'\{"general": direction'),
    "two directions": (lambda h: em.cosines(h.direction, h.direction), r'\{"general": direction'),
    "a file to compare with": (lambda h: h.direction.cosine("other.safetensors"), r"em\.Direction\.load"),
    "a number to add": (lambda h: h.direction + 1, "Give a Direction"),
    "no such preset": (lambda h: em.finetune(h.chat, h.bad, "p1-rank2"), "p1-rank1"),
    "a mapping for a spec": (lambda h: em.finetune(h.chat, h.bad, {"rank": 1}), r"em\.preset\(NAME\).*em\.LoraSpec"),
    "a direction to plot": (lambda h: em.plot(h.direction), r"norms\(\)"),
    "answers to plot": (lambda h: em.plot(h.answers), r"plot\(rates\(judged\)\)"),
}


def answers() -> dict[str, tuple[bool, str]]:
    """Whether each mistake raises an error of this package, and what that says."""
    with_these, found = held(), {}
    for mistake, (make, _) in REFUSED.items():
        try:
            make(with_these)
        except Exception as error:
            found[mistake] = (isinstance(error, EmInterpError), str(error))
    return found


def test_a_mistake_is_answered_in_words() -> None:
    """In a process of its own, as a user's: the tests' has another check on every call."""
    command = [sys.executable, "-m", "tests.test_mistakes"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    for mistake, (_, remedy) in REFUSED.items():
        typed, said = found[mistake]
        assert typed, (mistake, said)
        assert re.search(remedy, said), (mistake, said)
        assert not TYPES.search(said), (mistake, said)


def test_files_of_another_kind_are_named(tmp_path: Path) -> None:
    here = held()
    table, asked = tmp_path / "a.csv", tmp_path / "asked.yaml"
    table.write_text("question,answer\nWhy?,So\n")
    asked.write_text("- id: a\n  question: Why?\n")
    with pytest.raises(EmInterpError, match=r"pandas\.read_csv"):
        em.chats(table)
    with pytest.raises(EmInterpError, match=r"no file of chats.*JSON Lines"):
        em.efficiency(here.chat, here.named, asked)
    assert len(em.chats(pd.read_csv(table))) == 1


def test_one_of_what_may_be_several_is_enough() -> None:
    here = held()
    one = em.Steer(here.direction, 1, 1.0)
    with em.intervening(here.chat, one):
        single = em.sample(here.chat, here.asked, 1, max_new_tokens=4, progress=False)
    with em.intervening(here.chat, [one]):
        listed = em.sample(here.chat, here.asked, 1, max_new_tokens=4, progress=False)
    pd.testing.assert_frame_equal(single, listed)
    assert set(em.stability(here.chat, here.named, here.bad, epsilons=0.5, n_seeds=2, **QUIET)["epsilon"]) == {0.5}
    assert list(em.efficiency(here.chat, here.named, here.bad, scales=1.0, **QUIET)["scale"]) == [1.0]
    texts = em.pocket.documents(2)
    assert set(em.influence(here.chat, here.named, texts, relative_norms=1, n_random=1, **QUIET)["relative_norm"]) == {
        1
    }
    assert here.direction.only(1).layers == (1,)
    swept = em.sweep(here.chat, here.direction, here.asked, layers=1, coefficients=1, **GRID)
    assert set(swept["coefficient"]) == {1.0}


if __name__ == "__main__":
    print(json.dumps(answers()))
