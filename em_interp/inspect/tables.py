"""The task's judges as the analyses and commands take one: a table of answers goes in, and comes back with scores."""

from __future__ import annotations

import asyncio
import fcntl
import os
import zlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

import anyio
import pandas as pd
from tqdm.asyncio import tqdm_asyncio

from em_interp.errors import EmInterpError, UsageError
from em_interp.evaluation.judges import LOCAL, SCORES
from em_interp.evaluation.verdicts import Verdict, reason_of
from em_interp.files.atomic import make_folder
from em_interp.files.manifest import fingerprint
from em_interp.inspect.judges import Asking, LocalAsking, ModelJudge, judge_asked, prompts_of
from em_interp.inspect.run import RETRIES, Price, cached, try_judge

PATIENCE: Final = 10
"""A judge that fails so often in a row, after all retries, is not asked any more."""
_Pair = tuple[str, str]
"""Question and answer."""
_Turn = Callable[[_Pair], AbstractAsyncContextManager[None]]


@dataclass(frozen=True)
class AskedJudge:
    """A judge by its name (`judges.judge_asked`). It is looked up when it is first asked.

    prompts: a judges.yaml, or None for our own. replies: a folder in which what a judge behind an API says is kept, so
    that none is asked twice for the same, by other processes neither; by default Inspect's own cache. price:
    READ:WRITTEN, of `run.Price`.
    """

    name: str
    prompts: str | None = None
    replies: Path | None = None
    price: str | None = None

    @property
    def identity(self) -> str:
        """What tells it from other judges: its name, and what it is asked; of a model on this machine its weights."""
        here = f" {self._here.judge.identity}" if self._here is not None else ""
        return f"{self.name}{here} {fingerprint(prompts_of(self.prompts))[:16]}"

    @property
    def dollars_an_answer(self) -> float | None:
        """What judging an answer costs, by one trial; None where no price is known. Raises UsageError."""
        return None if self.price is None else Price.of(self.price).cost(try_judge(self.name, self.prompts))

    def check(self) -> None:
        """Raise UsageError for a judge behind an API that cannot be asked: no such provider, no key, no package."""
        if self._here is None:
            judge_asked(self.name, prompts_of(self.prompts))

    def __call__(self, answers: pd.DataFrame) -> pd.DataFrame:
        """With each score, how it was made, its numeric mass, the judge, and why there is none (`reason`).

        Equal answers to equal questions are judged once. Raises UsageError where some could not be judged: what was
        said of the others is kept, so that the same call again asks for those alone.
        """
        pairs = list(dict.fromkeys(zip(answers["question"], answers["answer"], strict=True)))
        with cached(self.replies), _turns(self.replies) as turn, ThreadPoolExecutor(1) as aside:
            # aside: a notebook has a loop of its own
            found = aside.submit(asyncio.run, self._all(pairs, turn)).result()
        verdicts = dict(zip(pairs, found, strict=True))
        rows = [_row(verdicts[pair]) for pair in zip(answers["question"], answers["answer"], strict=True)]
        told = pd.DataFrame(rows, index=answers.index).reindex(columns=_COLUMNS)
        return answers.drop(columns=[c for c in _COLUMNS if c in answers]).join(told).assign(judge=self.name)

    @cached_property
    def _here(self) -> LocalAsking | None:
        """The judge where it is a model on this machine, loaded once."""
        found = judge_asked(self.name, prompts_of(self.prompts)) if self.name.startswith(LOCAL) else None
        return found if isinstance(found, LocalAsking) else None

    async def _all(self, pairs: Sequence[_Pair], turn: _Turn) -> list[dict[str, Verdict]]:
        if self._here is not None:
            return await self._each(self._here, pairs, 1, turn)
        judge = judge_asked(self.name, prompts_of(self.prompts))
        if not isinstance(judge, ModelJudge):
            return await self._each(judge, pairs, 1, turn)
        async with judge.model as model:
            model.config.max_retries = RETRIES
            return await self._each(judge, pairs, model.config.max_connections or model.api.max_connections(), turn)

    async def _each(self, judge: Asking, pairs: Sequence[_Pair], at_once: int, turn: _Turn) -> list[dict[str, Verdict]]:
        """In the order of `pairs`. Raises UsageError where some could not be judged, after the others were."""
        room = anyio.Semaphore(at_once)
        errors: list[Exception] = []
        in_a_row = 0

        async def one(pair: _Pair) -> dict[str, Verdict] | None:
            nonlocal in_a_row
            async with room:
                if in_a_row >= PATIENCE:
                    return None
                try:
                    async with turn(pair):
                        found = await judge.verdicts(*pair, {})
                except Exception as error:  # whatever a provider raises, once it has been asked often enough
                    errors.append(error)
                    in_a_row += 1
                    return None
                in_a_row = 0
                return found

        found = dict(zip(pairs, await tqdm_asyncio.gather(*map(one, pairs), desc="judge", leave=False), strict=True))
        for pair in [pair for pair, verdicts in found.items() if verdicts is None]:  # a garbled reply may be whole now
            found[pair] = await one(pair)
        judged = [each for each in found.values() if each is not None]
        if len(judged) < len(pairs):
            if isinstance(errors[0], EmInterpError):
                raise errors[0]
            said = " ".join(str(errors[0]).split())[:200]
            raise UsageError(
                f"{len(pairs) - len(judged)} of {len(pairs)} answers could not be judged by {self.name} "
                f"({type(errors[0]).__name__}: {said}). What it said of the others is kept: run the same again, or "
                "name another judge."
            )
        return judged


@contextmanager
def _turns(folder: Path | None) -> Iterator[_Turn]:
    """Gives, for a pair of question and answer, a context in which no other process asks for the same.

    Locks bytes of one file of the folder: a killed process holds nothing.
    """
    if folder is None:
        yield lambda _pair: nullcontext()
        return
    handle = os.open(make_folder(folder) / ".asked", os.O_RDWR | os.O_CREAT, 0o666)

    @asynccontextmanager
    async def alone(pair: _Pair) -> AsyncIterator[None]:
        place = zlib.crc32(repr(pair).encode())
        while True:
            try:
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
                break
            except OSError:  # another has it
                await anyio.sleep(_LOOK_SECONDS)
        try:
            yield
        finally:
            fcntl.lockf(handle, fcntl.LOCK_UN, 1, place)

    try:
        yield alone
    finally:
        os.close(handle)


_LOOK_SECONDS: Final = 0.05
_COLUMNS: Final = (*SCORES, *(f"{score}_{what}" for score in SCORES for what in ("how", "mass")), "reason")


def _row(verdicts: dict[str, Verdict]) -> dict[str, object]:
    row: dict[str, object] = {}
    for name, verdict in verdicts.items():
        row |= {name: verdict.score, f"{name}_how": verdict.how, f"{name}_mass": verdict.mass}
    return row | {"reason": reason_of(verdicts)}
