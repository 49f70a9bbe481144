"""The task run to its end, and gone on with where it was stopped: logs, and the judged tables that they hold."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import pandas as pd
from inspect_ai import eval_set
from inspect_ai._util.error import PrerequisiteError
from inspect_ai.log import EvalLog, EvalSample, read_eval_log
from inspect_ai.model import Model, ModelUsage, get_model

from em_interp.arguments import check_seed
from em_interp.errors import MissingDataError, UsageError
from em_interp.evaluation.judge_prompts import asking
from em_interp.evaluation.judges import LOCAL, is_a_model
from em_interp.evaluation.verdicts import REASONS
from em_interp.inspect import registry  # noqa: F401  (also where the package is not installed)
from em_interp.inspect.asked import asked
from em_interp.inspect.judges import MAX_TOKENS, prompts_of

__all__ = ["REASONS", "Price", "asked", "is_api", "judged_tables", "refuse_above", "run", "spent", "try_judge"]

TASK: Final = "em_interp/emergent_misalignment"
"""What is run by default."""
RETRIES: Final = 5
"""Requests to an API that fails are sent again so often, each time later; then its answer is left for the next run."""
_SAID: Final = ("question_id", "wording", "question", "system", "questions", "domain", "format")


@dataclass(frozen=True)
class Price:
    """Dollars for a million tokens that a judge reads (`given`) and writes (`said`)."""

    given: float
    said: float

    @classmethod
    def of(cls, text: str) -> Price:
        """READ:WRITTEN, such as 2.5:10. Raises UsageError."""
        try:
            given, said = (float(part) for part in text.split(":"))
        except ValueError as error:
            raise UsageError(
                f"the price is {text!r:.40}. Give READ:WRITTEN in dollars for a million tokens: 2.5:10."
            ) from error
        return cls(given, said)

    def cost(self, usage: ModelUsage) -> float:
        """In dollars."""
        read = usage.input_tokens + (usage.input_tokens_cache_read or 0) + (usage.input_tokens_cache_write or 0)
        return (read * self.given + usage.output_tokens * self.said) / 1e6


def is_api(judge: str) -> bool:
    """Whether a judge is asked over a network: PROVIDER/MODEL."""
    return is_a_model(judge) and not judge.startswith(LOCAL)


def try_judge(judge: str, prompts: str | None) -> ModelUsage:
    """Ask a judge behind an API once for each score, before anything is sampled. Raises UsageError where it fails."""

    async def ask() -> ModelUsage:
        async with get_model(judge, memoize=False) as model:
            used = ModelUsage()
            model.config.temperature, model.config.max_tokens = 0.0, MAX_TOKENS
            model.config.max_retries, model.config.timeout = 2, 60
            for template in prompts_of(prompts).values():
                reply = await model.generate(asking(template, "How are you?", "I am well. " * 20))
                used += reply.usage or ModelUsage()
            return used

    try:
        return asyncio.run(ask())
    except Exception as error:  # whatever a provider raises: no key, a wrong one, no such model, no network
        said = " ".join(str(error).split())[-240:]
        raise UsageError(
            f"the judge {judge} does not answer ({type(error).__name__}: {said}). Check its name, its key in the "
            "environment and the network; nothing has been asked of the model yet."
        ) from error


def refuse_above(budget: float, price: Price, used: ModelUsage, answers: int) -> float:
    """What judging so many answers will cost in dollars, by one trial. Raises UsageError where it is above `budget`."""
    expected = price.cost(used) * answers
    if expected > budget:
        raise UsageError(
            f"judging {answers} answers will cost about ${expected:.2f}, above the budget of ${budget:.2f}. Ask fewer "
            "answers (--n), fewer questions or a cheaper judge, or raise --budget."
        )
    return expected


def run(
    model: Model | str,
    out: str | Path,
    *,
    display: Literal["full", "conversation", "rich", "plain", "log", "none"] = "plain",
    retries: int = RETRIES,
    seed: int = 0,
    task: str = TASK,
    limit: int | None = None,
    **arguments: Any,
) -> EvalLog:
    """A task of Inspect's, such as `emergent_misalignment(**arguments)`, of a model, into OUT/logs.

    A run that was stopped is gone on with: answers and replies of judges are kept in OUT/cache, so that none is asked
    for twice. limit: at most so many of the task's samples. Raises UsageError for what the task refuses.
    """
    check_seed(seed)
    out = Path(out)
    try:
        with cached(out / "cache"):
            _, logs = eval_set(
                task,
                log_dir=str(out / "logs"),
                model=[model] if isinstance(model, Model) else model,
                task_args=arguments,
                display=display,
                seed=seed,
                limit=limit,
                max_retries=retries,
                retry_attempts=1,
                fail_on_error=True,
                continue_on_fail=True,
                log_dir_allow_dirty=True,
                log_realtime=False,
                score_display=False,
                ctl_server=False,
            )
    except PrerequisiteError as error:
        raise UsageError(str(error)) from error
    return read_eval_log(logs[0].location)


@contextmanager
def cached(folder: Path | None) -> Iterator[None]:
    """Inside, Inspect keeps what models say in this folder; None: where it does anyway."""
    before = os.environ.get("INSPECT_CACHE_DIR")
    if folder is not None:
        os.environ["INSPECT_CACHE_DIR"] = str(folder.absolute())
    try:
        yield
    finally:
        os.environ.pop("INSPECT_CACHE_DIR", None)
        if before is not None:
            os.environ["INSPECT_CACHE_DIR"] = before


def judged_tables(log: EvalLog | str | Path) -> dict[str, pd.DataFrame]:
    """Judge -> a judged table of a log of the task: one row an answer, also of those without a score.

    Columns model, question_id, wording, question, system, questions, domain, format, sample, answer, finished,
    n_tokens; each score, and how it was made and its numeric mass; judge, reason. The whole distributions are in the
    log. Raises MissingDataError for a log of another task, or without answers.
    """
    log = log if isinstance(log, EvalLog) else read_eval_log(str(log))
    judges = [str((each.options or {}).get("judge")) for each in log.eval.scorers or ()]
    if not log.samples or not judges:
        raise MissingDataError(
            log.location, f"it holds no judged answers ({log.status})", "run em_interp/emergent_misalignment"
        )
    keys = [f"judged{number or ''}" for number in range(len(judges))]
    return {
        judge: pd.DataFrame([_row(log, sample, key, judge) for sample in log.samples]).sort_values(
            ["question_id", "wording", "sample"], kind="stable", ignore_index=True
        )
        for key, judge in zip(keys, judges, strict=True)
    }


def _row(log: EvalLog, sample: EvalSample, key: str, judge: str) -> dict[str, Any]:
    output, score = sample.output, (sample.scores or {}).get(key)
    row: dict[str, Any] = {"model": str(log.eval.model).removeprefix("em_interp/")}
    row |= {name: sample.metadata[name] for name in _SAID if name in sample.metadata}
    row |= {
        "sample": sample.epoch - 1,
        "answer": output.completion,
        "finished": not output.empty and output.stop_reason != "max_tokens",
        "n_tokens": output.usage.output_tokens if output.usage else None,
        "aligned": None,
        "coherent": None,
    }
    if score is None:
        reason = "model_error" if output.empty else "judge_error"
        return {**row, "judge": judge, "reason": reason}
    told = score.metadata or {}
    for name, verdict in (told.get("verdicts") or {}).items():
        row |= {name: verdict["score"], f"{name}_how": verdict["how"], f"{name}_mass": verdict["mass"]}
    return {**row, "judge": told.get("judge", judge), "reason": score.reason or ""}


def spent(log: EvalLog, judges: Sequence[str], price: Price | None) -> dict[str, str]:
    """By model: tokens read and written, and of judges what they cost at this price."""
    told = {}
    for name, usage in log.stats.model_usage.items():
        cost = f", ${price.cost(usage):.2f}" if price is not None and name in judges else ""
        told[name] = f"{usage.input_tokens:,} tokens read, {usage.output_tokens:,} written{cost}"
    return told
