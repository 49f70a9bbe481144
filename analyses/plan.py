"""What a suite that asks real models will take, said before it begins: downloads, answers, judge, time."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from analyses.inputs.asked import AskedFinetunes
from analyses.suite import Suite
from em_interp.evaluation.judges import judged
from em_interp.evaluation.sampling import sample

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
    found = dict.fromkeys(str(path) for path in named if not path.exists())
    return [Download(name, _size(name)) for name in found if not _is_cached(name)]


def _is_cached(repository: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    files = ("config.json", "adapter_config.json")
    return any(isinstance(try_to_load_from_cache(repository, name), str) for name in files)


def _size(repository: str) -> int | None:
    """Of what is read: weights as safetensors, tokenizer and configuration."""
    from huggingface_hub import HfApi

    try:
        files = HfApi().model_info(repository, files_metadata=True, timeout=10).siblings or []
    except Exception:  # no network, no such repository, no access: loading it says so, with the remedy
        return None
    read = [file.size for file in files if Path(file.rfilename).suffix in (".safetensors", ".json", ".model")]
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

    Results that are kept already are not taken off. Raises what sampling and the judge raise.
    """
    finetunes = suite.judged_finetunes
    asked: dict[str, int] = {}
    for name in names:
        asked |= getattr(suite.analysis(name), "asks", lambda _: {})(suite)
    questions = finetunes.elsewhere(finetunes.domains[0])
    some = dict(list(questions.items())[:TRIED])
    begun = time.perf_counter()
    answers = sample(
        finetunes.chat, some, math.ceil(TRIED / len(some)), max_new_tokens=finetunes.max_new_tokens, progress=False
    )
    sampled = time.perf_counter()
    table = judged(answers, finetunes.judge)
    each_judged = (time.perf_counter() - sampled) / len(table)
    n = sum(asked.values())
    price = getattr(finetunes.judge, "dollars_an_answer", None)
    return Effort(
        answers=n,
        sampling_seconds=n * (sampled - begun) / len(answers),
        judging_seconds=n * each_judged,
        tokens=math.ceil(answers["n_tokens"].mean()),
        tried=len(answers),
        dollars=None if price is None else n * float(price),
    )


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
