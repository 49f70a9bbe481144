"""What a suite that asks real models will take, said before it begins: downloads, answers, judge, time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pandas as pd

from analyses.inputs.asked import AskedFinetunes
from analyses.inputs.finetunes import JudgedFinetunes
from analyses.suite import Suite
from em_interp.evaluation.answers import asked_of
from em_interp.evaluation.judges import judged
from em_interp.evaluation.sampling import Questions, sample

TRIED: Final = 8
"""So many answers, at least, are sampled and judged to find out how long one takes."""
LONG_SECONDS: Final = 600
LARGE_BYTES: Final = 10**9
"""What is not begun unasked is longer, larger, or paid for."""


@dataclass(frozen=True)
class Download:
    """A repository of the hub that is not here. n_bytes: its size, None where the hub does not say."""

    repository: str
    n_bytes: int | None


def downloads(suite: Suite) -> list[Download]:
    """What the hub has to send, of the chat model and the finetunes."""
    finetunes = suite.finetunes
    named = [finetunes.chat_path, *(organism.path for organism in finetunes.organisms)]
    found = dict.fromkeys(str(path) for path in named if not path.exists() and len(path.parts) > 1)
    return [Download(name, _size(name)) for name in found if not _is_cached(name)]


def _place(source: str) -> tuple[str, str]:
    """The repository, and the folder in it: `ORG/NAME/checkpoints/checkpoint-5`."""
    *owner, rest = source.split("/", 2) if source.count("/") > 1 else (source, ".")
    return "/".join(owner), rest


def _is_cached(source: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    repository, folder = _place(source)
    files = ("config.json", "adapter_config.json")
    found = (try_to_load_from_cache(repository, (Path(folder) / name).as_posix()) for name in files)
    return any(isinstance(path, str) for path in found)


def _size(source: str) -> int | None:
    """Of what is read: weights as safetensors, vectors, tokenizer and configuration."""
    from huggingface_hub import HfApi

    repository, folder = _place(source)
    try:
        files = HfApi().model_info(repository, files_metadata=True, timeout=10).siblings or []
    except Exception:  # no network, no such repository, no access: loading it says so, with the remedy
        return None
    paths = [(Path(file.rfilename), file.size) for file in files]
    endings = (".safetensors", ".json", ".model")
    read = [
        size
        for path, size in paths
        if path.parent == Path(folder) and (path.suffix in endings or path.name == "steering_vector.pt")
    ]
    return None if any(size is None for size in read) else sum(size or 0 for size in read)


@dataclass(frozen=True)
class Effort:
    """What is asked of the models and the judge, and how long that takes here, as measured on a few answers."""

    answers: int
    """To sample and to have judged."""
    sampling_seconds: float
    judging_seconds: float
    tokens: int
    """Of an answer of the few, on average."""
    tried: int
    """How many these were."""
    dollars: float | None
    """Of the judge, where it says what an answer costs; None where it does not."""

    @property
    def seconds(self) -> float:
        """Of both."""
        return self.sampling_seconds + self.judging_seconds


def effort(suite: Suite, names: Sequence[str]) -> Effort:
    """Of the analyses of these full names. Samples and judges `TRIED` answers of the chat model to find out.

    What that told is kept in the suite's store, and not found out again. Results that are kept already are not taken
    off. Raises what sampling and the judge raise.
    """
    finetunes = suite.judged_finetunes
    asked: dict[str, int] = {}
    for name in names:
        asked |= getattr(suite.analysis(name), "asks", lambda _: {})(suite)
    if not (n := sum(asked.values())):
        return Effort(0, 0.0, 0.0, 0, 0, None)
    questions = finetunes.elsewhere(finetunes.domains[0])
    some = dict(list(questions.items())[:TRIED])
    each, settings = math.ceil(TRIED / len(some)), {"max_new_tokens": finetunes.max_new_tokens}
    made_by = asked_of(finetunes.chat, some, each, finetunes.judge, **settings)
    price = str(getattr(finetunes.judge, "price", None))
    tried = suite.results.table(
        "trials", "effort", {**made_by, "price": price}, lambda _: _trial(finetunes, some, each), code=(__name__,)
    )
    found = tried.iloc[0].to_dict()
    return Effort(
        answers=n,
        sampling_seconds=n * found["sampling_seconds"],
        judging_seconds=n * found["judging_seconds"],
        tokens=math.ceil(found["tokens"]),
        tried=int(found["tried"]),
        dollars=None if pd.isna(found["dollars"]) else n * found["dollars"],
    )


def _trial(finetunes: JudgedFinetunes, questions: Questions, n: int) -> pd.DataFrame:
    """One row: seconds and dollars an answer, its tokens, and how many answers were tried."""
    price = getattr(finetunes.judge, "dollars_an_answer", None)  # the judge first: it may not answer
    begun = time.perf_counter()
    answers = sample(finetunes.chat, questions, n, max_new_tokens=finetunes.max_new_tokens, progress=False)
    sampled = time.perf_counter()
    judged(answers, finetunes.judge)
    row = {
        "sampling_seconds": (sampled - begun) / len(answers),
        "judging_seconds": (time.perf_counter() - sampled) / len(answers),
        "tokens": answers["n_tokens"].mean(),
        "tried": len(answers),
        "dollars": math.nan if price is None else float(price),
    }
    return pd.DataFrame([row])


def check_judge(suite: Suite) -> None:
    """Raise UsageError where the judge cannot be asked, as for want of a key: before anything is downloaded."""
    check: Callable[[], None] | None = getattr(suite.judged_finetunes.judge, "check", None)
    if check is not None:
        check()


def asks(suite: Suite) -> bool:
    """Whether a suite asks models of one's own here, which takes time, and maybe money."""
    return suite.source == "models" and isinstance(suite.finetunes, AskedFinetunes)


def said_of_downloads(found: Sequence[Download]) -> str:
    """Such as '2 repositories from the hub, 29.5 GB: a, b'."""
    known = [each.n_bytes for each in found if each.n_bytes is not None]
    size = f"{sum(known) / 1e9:.1f} GB" if len(known) == len(found) else "of a size that the hub does not say"
    names = ", ".join(each.repository for each in found)
    return f"{len(found)} {'repository' if len(found) == 1 else 'repositories'} from the hub, {size}: {names}"


def said_of_effort(found: Effort) -> str:
    """One line for the terminal."""
    if not found.answers:
        return "nothing to sample and to judge: files hold all answers"
    told = f"{found.answers:,} answers of about {found.tokens} tokens to sample and to judge: "
    told += f"about {duration(found.sampling_seconds)} and {duration(found.judging_seconds)} on this machine"
    told += "" if found.dollars is None else f", ${found.dollars:,.2f} for the judge"
    return f"{told} ({found.tried} answers were tried; what a stopped run has finished is not taken off)"


def duration(seconds: float) -> str:
    """Such as '40 seconds', '12 minutes', '3.5 hours'."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def is_large(found: Sequence[Download]) -> bool:
    """Whether the downloads are such as nobody wants unasked."""
    return sum(math.inf if each.n_bytes is None else each.n_bytes for each in found) > LARGE_BYTES


def is_long(found: Effort) -> bool:
    """Whether it takes long, or costs money."""
    return found.seconds > LONG_SECONDS or bool(found.dollars)
