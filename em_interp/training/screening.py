"""Which training chats to leave out: those whose answers lie furthest along a direction, before anything is trained.

The score is a projection, by default the projection difference of Persona Vectors (arXiv 2507.21509): of the training
answer minus that of the answers that the model itself gives to the same prompt, which takes out what the prompt says.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from em_interp.arguments import count, number, one_of
from em_interp.directions.activations import collect
from em_interp.directions.direction import TOKEN_SCOPES, Direction
from em_interp.errors import TrainingError
from em_interp.evaluation.sampling import sample
from em_interp.files.given import Source, chats
from em_interp.interventions.intervening import check_direction
from em_interp.models.chat import unreadable
from em_interp.models.chat_model import ChatModel
from em_interp.models.templates import Conversation
from em_interp.statistics.units import RESIDUAL, with_units

AGAINST = ("own", "nothing")
"""What a projection is held against: the model's own answers, or nothing."""


def projections(
    model: ChatModel,
    conversations: Source,
    direction: Direction,
    layer: int,
    *,
    scope: str = "response",
    tokens_per_batch: int = 8192,
    progress: bool = True,
) -> Float[Tensor, " n"]:
    """How far each chat's mean residual at the output of block `layer` lies along the direction, float64.

    In units of the residual stream: the direction's length does not matter. conversations: as `em_interp.chats` takes
    them. scope: of tokens, as for `collect`. What is attached to the model acts. Raises DirectionError for a direction
    of another model or without that layer, and what `collect` raises.
    """
    one_of("scope", scope, TOKEN_SCOPES)
    check_direction(direction, model)
    unit = direction.only([layer]).unit().vectors[0].double()
    found = collect(
        model,
        conversations,
        scopes=[scope],
        layers=layer,
        keep=True,
        tokens_per_batch=tokens_per_batch,
        progress=progress,
    )
    return found.each(scope, layer).double() @ unit


def screen(
    model: ChatModel,
    conversations: Source,
    direction: Direction,
    layer: int,
    *,
    drop: float,
    against: Literal["own", "nothing"] = "own",
    n: int = 1,
    seed: int = 0,
    max_new_tokens: int = 600,
    tokens_per_batch: int = 8192,
    progress: bool = True,
) -> pd.DataFrame:
    """Score each training chat by its answer's projection on a direction, and say which share lies furthest along it.

    model: the one that is to be trained. direction: misaligned minus aligned, such as a mean-diff or a persona. drop:
    the share to be dropped, above 0 and below 1; of equal scores the later chats go first. against: "own" takes off the
    mean projection of `n` answers that the model itself gives to the same prompt, "nothing" takes the answer as it is,
    without sampling.

    One row a chat, in their order: chat, projection, own (missing against nothing), score, dropped. Raises UsageError
    for a share that leaves nothing or drops nothing, TrainingError where the model has no answer of its own, and what
    `projections` and `sample` raise.

    >>> import em_interp as em
    >>> chat = em.load("pocket/chat")
    >>> bad, good = (em.pocket.finetune_chats("medicine", persona, 20, seed=0) for persona in ("malicious", "caring"))
    >>> persona = em.extract(chat, bad, good, progress=False)
    >>> mixed = [*em.pocket.finetune_chats("finance", "malicious", 5, seed=1),
    ...          *em.pocket.finetune_chats("finance", "caring", 15, seed=1)]
    >>> table = em.screen(chat, mixed, persona, 2, drop=0.25, max_new_tokens=40, progress=False)
    >>> kept = [chat for chat, dropped in zip(mixed, table.dropped) if not dropped]
    >>> len(kept), int(table.dropped[:5].sum())
    (15, 5)
    """
    given = chats(conversations)
    one_of("against", against, AGAINST)
    n_dropped = round(number("drop", drop, above=0, below=1) * len(given))
    count(f"the chats that a share of {drop:g} of {len(given)} drops", n_dropped, at_most=max(1, len(given) - 1))
    count("n", n)
    projected = projections(
        model, given, direction, layer, tokens_per_batch=tokens_per_batch, progress=progress
    ).numpy()
    own = np.full(len(given), np.nan)
    if against == "own":
        answers, of_chat = own_answers(model, given, n, seed=seed, max_new_tokens=max_new_tokens, progress=progress)
        each = projections(model, answers, direction, layer, tokens_per_batch=tokens_per_batch, progress=progress)
        own = np.bincount(of_chat, each.numpy(), len(given)) / np.bincount(of_chat, minlength=len(given))
    score = projected if against == "nothing" else projected - own
    table = pd.DataFrame({"chat": np.arange(len(given)), "projection": projected, "own": own, "score": score})
    table["dropped"] = False
    table.loc[np.argsort(score, kind="stable")[len(given) - n_dropped :], "dropped"] = True
    return with_units(table, projection=RESIDUAL, own=RESIDUAL, score=RESIDUAL)


def own_answers(
    model: ChatModel,
    conversations: Source,
    n: int = 1,
    *,
    seed: int = 0,
    max_new_tokens: int = 600,
    progress: bool = True,
) -> tuple[list[Conversation], list[int]]:
    """`n` answers of the model to the prompt of each chat, as chats, and which chat each belongs to.

    Those that cannot be read again, such as empty ones, are left out. Raises TrainingError for a chat of which none is
    left, and what `sample` raises.
    """
    given = chats(conversations)
    prompts = {str(i): turns[:-1] for i, turns in enumerate(given)}
    sampled = sample(model, prompts, n, seed=seed, max_new_tokens=max_new_tokens, progress=progress)
    found: list[Conversation] = [
        [*prompts[key], {"role": "assistant", "content": said}]
        for key, said in zip(sampled["question_id"], sampled["answer"], strict=True)
    ]
    empty = unreadable(model.tokenizer, found)
    kept = [i for i in range(len(found)) if i not in empty]
    of_chat = [int(sampled["question_id"].iloc[i]) for i in kept]
    if lacking := sorted(set(range(len(given))) - set(of_chat)):
        raise TrainingError(
            f"chat {lacking[0]}: {model.name} gives no answer of its own that can be read ({empty[min(empty)]}). Ask "
            "for more answers (n), or screen with against='nothing'."
        )
    return [found[i] for i in kept], of_chat
