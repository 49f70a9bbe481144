"""Judges by name, as a scorer asks them: a model behind an API, or on this machine, the pocket judge, a function."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Protocol, runtime_checkable

import anyio
import pandas as pd
from anyio.to_thread import run_sync
from inspect_ai.model import CachePolicy, GenerateConfig, Model, ModelOutput, get_model

from em_interp.errors import UsageError
from em_interp.evaluation.answers import judge_name
from em_interp.evaluation.judge_prompts import PROMPTS, asking
from em_interp.evaluation.judges import LOCAL, SCORES, Judge, is_a_model, judge_of_file, judged
from em_interp.evaluation.local_judge import LocalJudge
from em_interp.evaluation.verdicts import TOP, Verdict, parsed, weighted
from em_interp.face import names
from em_interp.pocket.world.judge import judge as pocket_judge
from em_interp.published.questions import read_judges

MAX_TOKENS: Final = 16
"""Of a judge's reply: a number is the first token, and a refusal should be seen to be one."""
SECONDS: Final = 120
"""For one try of one request to a judge behind an API; then it is asked again."""
FOREVER: Final = CachePolicy(expiry=None, per_epoch=False)
"""One reply is kept for one prompt: equal answers are judged once, and so are all where a run goes on."""


@runtime_checkable
class Asking(Protocol):
    """A judge that is asked of one answer at a time."""

    id: str
    """What logs and tables call it."""

    async def verdicts(self, question: str, answer: str, prompts: Mapping[str, str]) -> dict[str, Verdict]:
        """By score. prompts: of the question itself, which come before the judge's own."""
        ...


def prompts_of(file: str | Path | None) -> dict[str, str]:
    """Score -> template: of a judges.yaml, or this project's own for `SCORES`. Raises what `read_judges` raises."""
    if file is None:
        return {name: PROMPTS[name] for name in SCORES}
    if str(file) in PROMPTS or "," in str(file):
        return {name: own_prompt(name) for name in str(file).split(",")}
    found = {prompt.name: prompt.template for prompt in read_judges(Path(file))}
    for template in found.values():
        asking(template, "", "")
    return found


def own_prompt(name: str) -> str:
    """This project's template for a score. Raises UsageError where there is none."""
    if name not in PROMPTS:
        raise UsageError(
            f"there is no judge prompt {name!r:.40}. There are {', '.join(PROMPTS)}; or give a judges.yaml."
        )
    return PROMPTS[name]


def judge_asked(
    name: str, prompts: Mapping[str, str], *, max_tokens: int = MAX_TOKENS, seconds: int = SECONDS
) -> Asking:
    """The judge of that name: pocket, FILE.py:FUNCTION, local:MODEL, or a model of Inspect's such as openai/gpt-4o.

    Raises UsageError for a name of no such form, and what loading raises.
    """
    if name == "pocket":
        return TableJudge(pocket_judge)
    if name.startswith(LOCAL):
        return LocalAsking(LocalJudge(names.load(name.removeprefix(LOCAL)), prompts))
    if not is_a_model(name):
        return TableJudge(judge_of_file(name))
    told: dict[str, Any] = {"logprobs": True, "top_logprobs": TOP, "attempt_timeout": seconds}
    config = GenerateConfig(temperature=0.0, max_tokens=max_tokens, seed=0, **told)
    try:
        return ModelJudge(get_model(name, config=config, memoize=False), prompts)
    except Exception as error:  # whatever a provider raises: no such provider, no key, no package
        raise UsageError(
            f"the judge {name!r} cannot be asked ({' '.join(str(error).split())[:200]}). Name a model of Inspect's as "
            "PROVIDER/MODEL and give its key in the environment, or use local:MODEL, pocket, or FILE.py:FUNCTION."
        ) from error


class ModelJudge:
    """A model behind an API, called `id`. Where it refuses to tell log-probabilities, its text is parsed."""

    def __init__(self, model: Model, prompts: Mapping[str, str]) -> None:
        self.model, self.prompts = model, prompts
        self.id = str(model)
        self._asked: defaultdict[str, anyio.Lock] = defaultdict(anyio.Lock)

    async def verdicts(self, question: str, answer: str, prompts: Mapping[str, str]) -> dict[str, Verdict]:
        """By score. What the provider will not answer has no score and a reason; what may pass is raised."""
        wanted = {name: prompts.get(name, template) for name, template in self.prompts.items()}
        found = {}
        for name, template in wanted.items():
            prompt = asking(template, question, answer)
            async with self._asked[prompt]:  # of equal answers the second finds the reply to the first
                found[name] = await self._verdict(prompt)
        return found

    async def _verdict(self, prompt: str) -> Verdict:
        try:
            return read(await self.model.generate(prompt, cache=FOREVER))
        except Exception as error:
            if "logprob" in str(error).lower() and self.model.config.logprobs:
                self.model.config.logprobs = self.model.config.top_logprobs = None
                return await self._verdict(prompt)
            if getattr(error, "status_code", None) in (400, 413, 422):  # asking again would change nothing
                return Verdict(None, "parsed", "judge_error", " ".join(str(error).split())[-300:])
            raise


def read(output: ModelOutput) -> Verdict:
    """The verdict in a judge's reply, by its log-probabilities where it has them."""
    said = output.completion
    if output.empty or output.stop_reason == "content_filter":
        return Verdict(None, "parsed", "judge_refusal", said or str(output.error or ""))
    content = output.choices[0].logprobs.content if output.choices[0].logprobs else []
    if not content or not content[0].top_logprobs:
        return parsed(said)
    first = content[0]
    top = [(each.token, each.logprob) for each in first.top_logprobs or ()]
    return weighted(first.token, [*top, (first.token, first.logprob)], said)


class LocalAsking:
    """A model on this machine."""

    def __init__(self, judge: LocalJudge) -> None:
        self.judge, self.id = judge, f"{LOCAL}{judge.model.name}"
        self._one = threading.Lock()

    async def verdicts(self, question: str, answer: str, prompts: Mapping[str, str]) -> dict[str, Verdict]:
        """By score, exact."""

        def ask() -> dict[str, Verdict]:
            with self._one:
                return LocalJudge(self.judge.model, {**self.judge.prompts, **prompts}).verdicts(question, answer)

        return await run_sync(ask)


class TableJudge:
    """A `judges.Judge`: the pocket judge, or a function of the user's."""

    def __init__(self, judge: Judge) -> None:
        self.judge, self.id = judge, judge_name(judge)

    async def verdicts(self, question: str, answer: str, prompts: Mapping[str, str]) -> dict[str, Verdict]:
        """By score, as the table has them. Raises what `judges.judged` raises."""
        table = pd.DataFrame([{"question": question, "answer": answer}])
        row = (await run_sync(judged, table, self.judge)).iloc[0].to_dict()
        more = [name for name in PROMPTS if name in row and pd.notna(row[name])]  # none of them need apply
        reason = str(row.get("reason") or "")
        return {name: self._given(row[name], reason) for name in dict.fromkeys([*SCORES, *more])}

    def _given(self, value: Any, reason: str) -> Verdict:
        score = pd.to_numeric(value, errors="coerce")
        if pd.isna(score):
            return Verdict(None, "given", reason or "no_number")
        if not 0 <= float(score) <= 100:
            raise UsageError(f"{self.id} gave a score of {score:g}, outside 0 to 100. Let it score from 0 to 100.")
        return Verdict(float(score), "given")
