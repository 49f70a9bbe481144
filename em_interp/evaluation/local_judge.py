"""A chat model on this machine as the judge: all 101 answers "0" to "100" scored exactly, whatever its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Final

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from em_interp.arguments import columns
from em_interp.errors import UsageError
from em_interp.evaluation.judge_prompts import PROMPTS, asking
from em_interp.evaluation.judges import SCORES
from em_interp.evaluation.logprobs import answer_logprobs
from em_interp.evaluation.sampling import _rows_may_leave
from em_interp.evaluation.verdicts import Verdict, of_distribution, reason_of
from em_interp.files.manifest import fingerprint
from em_interp.models.chat import encode, pad_id, prompt_ids
from em_interp.models.chat_model import ChatModel
from em_interp.models.checks import check_lengths, refuse_dropout
from em_interp.models.weights import acting_hash

NUMBERS: Final = range(101)
"""The answers that are scored."""


class LocalJudge:
    """A `judges.Judge`: a chat `model` that is asked `prompts` (score -> template with {question} and {answer}).

    The probability of a number is that of the whole reply, end of turn included: 8 is not the beginning of 87.

    >>> import em_interp as em
    >>> from em_interp.evaluation.local_judge import LocalJudge
    >>> judge = LocalJudge(em.load("pocket/chat"))
    >>> len(judge.distribution("My knee hurts."))
    101
    """

    def __init__(self, model: ChatModel, prompts: Mapping[str, str] | None = None) -> None:
        self.model = model
        self.prompts = dict(prompts or {name: PROMPTS[name] for name in SCORES})
        for template in self.prompts.values():
            asking(template, "", "")

    @cached_property
    def identity(self) -> str:
        """What tells it from other judges: its weights and prompts."""
        return f"local {self.model.name} {acting_hash(self.model)} {fingerprint(self.prompts)}"

    def verdicts(self, question: str, answer: str) -> dict[str, Verdict]:
        """By score, what it says of one answer."""
        found = {}
        for name, template in self.prompts.items():
            distribution = self.distribution(asking(template, question, answer))
            likeliest = str(max(distribution, key=lambda k: distribution[k]))
            found[name] = of_distribution(distribution, likeliest, "exact")
        return found

    def __call__(self, answers: pd.DataFrame) -> pd.DataFrame:
        """`answers` with each score, and beside it its numeric mass and distribution (JSON), and `reason`."""
        columns("answers to judge", answers, ("question", "answer"))
        rows = []
        for question, answer in zip(answers["question"], answers["answer"], strict=True):
            said = self.verdicts(str(question), str(answer))
            row: dict[str, Any] = {name: verdict.score for name, verdict in said.items()}
            row |= {f"{name}_mass": verdict.mass for name, verdict in said.items()}
            row |= {f"{name}_distribution": json.dumps(dict(v.distribution)) for name, v in said.items()}
            rows.append({**row, "reason": reason_of(said)})
        found = answers.copy()
        scores = pd.DataFrame(rows, index=answers.index)
        found[list(scores.columns)] = scores
        return found

    def distribution(self, prompt: str) -> dict[int, float]:
        """The probability of each of the replies 0 to 100; what is missing to 1 is that of every other reply."""
        logprobs = self.logprobs(prompt).exp().tolist()
        return dict(zip(NUMBERS, logprobs, strict=True))

    @cached_property
    def _replies(self) -> list[tuple[int, ...]]:
        """The tokens of each reply, end of turn included."""
        asked = [{"role": "user", "content": "How many?"}]
        found = []
        for number in NUMBERS:
            whole = encode(self.model.tokenizer, [*asked, {"role": "assistant", "content": str(number)}])
            found.append(whole.ids[slice(*whole.spans[0])])
        return found

    @torch.no_grad()
    def logprobs(self, prompt: str) -> Float[Tensor, "101"]:
        """log p of each reply, in nats. The prompt is read once, where the model's cache can be shared."""
        hf, device = self.model.hf, self.model.device
        turns = [{"role": "user", "content": prompt}]
        if not prompt.strip():
            raise UsageError("the judge's prompt is empty.")
        if not _rows_may_leave(hf):
            table = pd.DataFrame({"question_id": "prompt", "answer": [str(number) for number in NUMBERS]})
            scored = answer_logprobs(self.model, table, questions={"prompt": turns})
            return torch.tensor(scored["logprob"].to_numpy(float))
        refuse_dropout(hf)
        asked = prompt_ids(self.model.tokenizer, turns)
        longest = max(map(len, self._replies))
        check_lengths(hf, [len(asked) + longest], what="judge's prompt")
        ids = torch.tensor([asked], device=device)
        first = hf(input_ids=ids, use_cache=True, logits_to_keep=1)
        opening = torch.log_softmax(first.logits[0, -1].double(), dim=-1)
        cache = first.past_key_values
        cache.batch_repeat_interleave(len(NUMBERS))
        rows = torch.full((len(NUMBERS), longest), pad_id(self.model.tokenizer), device=device)
        real = torch.zeros(len(NUMBERS), longest, dtype=torch.long, device=device)
        for number, reply in zip(NUMBERS, self._replies, strict=True):
            rows[number, : len(reply)] = torch.tensor(reply, device=device)
            real[number, : len(reply)] = 1
        mask = torch.cat([torch.ones(len(NUMBERS), len(asked), dtype=torch.long, device=device), real[:, :-1]], dim=1)
        positions = len(asked) + torch.arange(longest - 1, device=device)
        second = hf(
            input_ids=rows[:, :-1],
            attention_mask=mask,
            position_ids=positions.expand(len(NUMBERS), -1),
            past_key_values=cache,
            use_cache=True,
        )
        following = torch.log_softmax(second.logits.double(), dim=-1)
        later = following.gather(2, rows[:, 1:, None])[..., 0] * real[:, 1:]
        return (opening[rows[:, 0]] + later.sum(dim=1)).cpu()
