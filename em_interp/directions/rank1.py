"""What rank-1 adapters read and write: the scalar s_t = A x_t at every token, and B seen through the unembedding.

A rank-1 adapter adds scale * s_t * B, so s_t is all that it knows of token t. Does it tell misaligned from aligned
answers, or the finetune's domain from others (P2 Table 1)? Sign and size of s alone mean nothing: (A, B) and (-A, -B)
are one adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from einops import rearrange, reduce
from jaxtyping import Float
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from em_interp.arguments import check_seed, count, number
from em_interp.directions.direction import Direction
from em_interp.directions.lens import logit_lens
from em_interp.errors import SolutionError, StatisticsError, UsageError
from em_interp.models.architectures import layer_of, unwrap, writes_to_residual
from em_interp.models.chat import batches, encode_all, pad_id
from em_interp.models.chat_model import ChatModel
from em_interp.models.checks import check_lengths
from em_interp.models.hooks import firing, tagged
from em_interp.models.templates import Conversation
from em_interp.solutions.lora import LoraAdapter
from em_interp.solutions.space import check_bare, check_comparable, check_inside_blocks
from em_interp.statistics import LEVEL, auroc
from em_interp.statistics.jackknife import chance_interval, clustered_auc, sides_of

Scope = Literal["prompt", "last_prompt", "response", "all"]
"""As in `direction.TOKEN_SCOPES`."""
ALIGNED, MISALIGNED = 90.0, 30.0  # P2 Table 1: aligned [90, 100], misaligned [0, 30]


def token_scalars(
    model: ChatModel,
    adapter: LoraAdapter,
    conversations: Sequence[Conversation],
    *,
    scope: Scope = "response",
    tokens_per_batch: int = 8192,
) -> Iterator[tuple[int, Float[Tensor, "token module"]]]:
    """(conversation's number, A x at its tokens in `scope` for each module), as batches go by; float32 on the CPU.

    x is the module's input in the finetuned model: the adapter is attached, others are off. Conversations end with the
    assistant; they come in order of length, not of number. Raises SolutionError for a rank above 1, whose scalars
    depend on an arbitrary basis.
    """
    if adapter.rank != 1:
        raise SolutionError(
            f"the adapter has rank {adapter.rank}: its A x is known only up to a change of basis. Take rank 1."
        )
    check_inside_blocks(adapter)
    check_comparable({"the adapter": adapter}, model)
    with model.no_adapter():
        check_bare(model)
    encoded = encode_all(model.tokenizer, conversations)
    check_lengths(model.hf, [len(row) for row in encoded])
    for batch in batches(encoded, pad=pad_id(model.tokenizer), tokens_per_batch=tokens_per_batch):
        with torch.no_grad(), model.no_adapter(), adapter.attached(model):
            read = _read(model, adapter, batch.to(model.device).inputs())
        for r, i in enumerate(batch.index):
            yield i, read[r, : len(encoded[i])][encoded[i].tokens_of(scope)].clone()


def _read(model: ChatModel, adapter: LoraAdapter, inputs: dict[str, Tensor]) -> Float[Tensor, "batch token module"]:
    """A x of each module at each position of a right-padded batch. The output head is not run."""
    modules = model.module_sets()[0]
    seen: dict[str, Tensor] = {}
    counts: dict[str, list[int]] = {name: [0] for name in adapter.a}

    def reader(name):
        # type: (str) -> Any
        a = adapter.a[name][0].float()

        def hook(_module, args):
            # type: (Any, tuple[Tensor, ...]) -> None
            counts[name][0] += 1
            seen[name] = (args[0].float() @ a.to(args[0].device)).cpu()

        tagged(hook)
        return hook

    handles = [modules[name].register_forward_pre_hook(reader(name)) for name in adapter.a]
    with firing(counts, handles):
        unwrap(model.hf).base_model(**inputs, use_cache=False)
    return rearrange([seen[name] for name in adapter.a], "module row token -> row token module")


def mean_scalars(
    model: ChatModel,
    adapter: LoraAdapter,
    conversations: Sequence[Conversation],
    *,
    scope: Scope = "response",
    tokens_per_batch: int = 8192,
) -> Float[np.ndarray, "conversation module"]:
    """Mean of `token_scalars` over each conversation's tokens, in the order of `conversations`; float64."""
    out = np.full((len(conversations), len(adapter.a)), np.nan)
    for i, values in token_scalars(model, adapter, conversations, scope=scope, tokens_per_batch=tokens_per_batch):
        out[i] = reduce(values.double(), "token module -> module", "mean").numpy()
    return out


def contrasts(judged: pd.DataFrame) -> dict[str, NDArray[np.float64]]:
    """The four comparisons of P2 Table 1: name -> 1, 0 or NaN (in neither class) for every answer.

    judged: columns `aligned` (0-100; missing allowed) and `in_domain` (True or False, as bool or 0 and 1). In "A / B",
    B is class 1. Raises UsageError for other values, words and missing ones among them.
    """
    if lacking := {"aligned", "in_domain"} - set(judged.columns):
        raise UsageError(f"judged answers lack the columns {sorted(lacking)}; there are {list(judged.columns)}.")
    score = judged["aligned"].to_numpy(dtype=float, na_value=np.nan)
    inside = _in_domain(judged["in_domain"])
    good, bad = score >= ALIGNED, score <= MISALIGNED

    def between(zero, one):
        # type: (NDArray[np.bool_], NDArray[np.bool_]) -> NDArray[np.float64]
        return np.where(one, 1.0, np.where(zero, 0.0, np.nan))

    return {
        "out-of-domain aligned / in-domain aligned": between(good & ~inside, good & inside),
        "out-of-domain misaligned / in-domain misaligned": between(bad & ~inside, bad & inside),
        "out-of-domain aligned / out-of-domain misaligned": between(good & ~inside, bad & ~inside),
        "in-domain aligned / in-domain misaligned": between(good & inside, bad & inside),
    }


def _in_domain(column: pd.Series) -> NDArray[np.bool_]:
    is_bool = column.map(lambda value: isinstance(value, bool | np.bool_ | int | np.integer) and value in (0, 1))
    if not is_bool.all():
        odd = list(dict.fromkeys(repr(value) for value in column[~is_bool]))
        raise UsageError(
            f"in_domain must be True or False for every answer; found {', '.join(odd[:5])}. Convert the column to bool "
            "where it was read from text, and drop the answers of which it is not known."
        )
    return column.to_numpy(dtype=bool)


def separation(
    scalars: Float[np.ndarray, "n module"],
    labels: Float[np.ndarray, "n"],
    groups: Sequence[Any],
    *,
    comparison: str,
    inverse_penalty: float = 1.0,
    folds: int = 5,
    level: float = LEVEL,
    seed: int = 0,
) -> dict[str, Any]:
    """One row of `lora_scalars`: how well the scalars tell class 1 from class 0; NaN labels are left out.

    Standardised logistic regression with balanced classes and an L1 penalty, as in P2; scored only on groups
    (questions) that it was not fitted on. P2 has inverse_penalty = .01, which below some hundred answers leaves no
    scalar in. low and high belong to the AUC, accuracy_low and accuracy_high to the accuracy: intervals over groups
    (`jackknife.chance_interval`) of what such a probe reaches on questions that it has not seen; `interval` says how
    they were made. Of several scalars the probes are fitted anew without each group, since which scalars they take
    varies; of one they only have a sign. Pooled over folds, the AUC of scalars that know nothing lies below .5 on
    average: its interval is mirrored there. Raises StatisticsError where a class has fewer than two groups, and
    UsageError for other labels than 0, 1 and NaN.
    """
    if not len(scalars) == len(labels) == len(groups) or not np.isin(labels[~np.isnan(labels)], (0, 1)).all():
        raise UsageError(
            f"{comparison}: {len(scalars)} rows of scalars, {len(labels)} labels and {len(groups)} groups, with labels "
            f"{np.unique(labels)[:5].tolist()}: give one of each for every answer, and labels 0, 1 or NaN."
        )
    number("inverse_penalty", inverse_penalty, above=0)
    count("folds", folds, at_least=2)
    used = np.isfinite(labels)
    x, y = scalars[used], labels[used].astype(int)
    if not np.isfinite(x).all():
        raise StatisticsError(f"{comparison}: scalars that are NaN or infinite; an answer without tokens was read.")
    codes, names = pd.factorize(pd.Series(list(groups))[used].reset_index(drop=True))
    spread = [len(set(codes[y == k])) for k in (0, 1)]
    if min(spread) < 2:
        raise StatisticsError(
            f"{comparison}: class 0 has answers to {spread[0]} questions, class 1 to {spread[1]}; a probe that is "
            "scored on questions it has not seen needs at least two of each. Sample more answers."
        )
    fold = np.empty(len(y), dtype=int)
    splitter = StratifiedGroupKFold(min(folds, *spread), shuffle=True, random_state=check_seed(seed))
    for index, (fit, held_out) in enumerate(splitter.split(x, y, codes)):
        if len(set(y[fit])) < 2:
            raise StatisticsError(f"{comparison}: all answers of one class fall into one fold. Sample more questions.")
        fold[held_out] = index
    score = _held_out_scores(x, y, fold, inverse_penalty)
    refitted = None
    if x.shape[1] > 1:
        refitted = np.full((len(names), 2), np.nan)
        for group in range(len(names)):
            kept = codes != group
            own = _held_out_scores(x[kept], y[kept], fold[kept], inverse_penalty)
            if np.isfinite(own).all():
                auc = auroc(own[y[kept] == 1], own[y[kept] == 0])
                refitted[group] = auc, ((own > 0) == (y[kept] == 1)).mean()
    return {"comparison": comparison, **_scored(score, y, codes, level, refitted), "n_questions": len(names)}


def _held_out_scores(
    x: NDArray[np.float64], y: NDArray[np.int_], fold: NDArray[np.int_], inverse_penalty: float
) -> NDArray[np.float64]:
    """Each fold scored by a probe fitted on the others; NaN where these have one class only."""
    score = np.full(len(y), np.nan)
    for own in np.unique(fold):
        fit = fold != own
        if len(set(y[fit])) == 2:
            score[~fit] = _probe(inverse_penalty).fit(x[fit], y[fit]).decision_function(x[~fit])
    return score


def _probe(inverse_penalty: float) -> Pipeline:
    return make_pipeline(
        StandardScaler(),
        LogisticRegression(
            l1_ratio=1.0,
            C=inverse_penalty,
            solver="liblinear",
            class_weight="balanced",
            tol=1e-6,
            max_iter=10_000,
            random_state=0,
        ),
    )


def _scored(
    score: NDArray[np.float64],
    y: NDArray[np.int_],
    groups: NDArray[np.intp],
    level: float = LEVEL,
    refitted: NDArray[np.float64] | None = None,
) -> dict[str, Any]:
    """Accuracy (score above 0 means class 1) and AUC of held-out scores, with intervals over groups.

    refitted: AUC and accuracy without each group, of probes that were fitted without it; by default the probes stay.
    """
    right = (score > 0) == (y == 1)
    hits, counts = np.bincount(groups, weights=right), np.bincount(groups).astype(float)
    auc, without = clustered_auc(score, y, groups)
    accuracy_without = (hits.sum() - hits) / (counts.sum() - counts)
    if refitted is not None:
        without, accuracy_without = refitted.T
    sides = sides_of(y, groups)
    of_auc = chance_interval(auc, without, sides, level=level)
    of_accuracy = chance_interval(float(right.mean()), accuracy_without, sides, level=level)
    return {
        "accuracy": float(right.mean()),
        "auc": auc,
        "low": of_auc.low,
        "high": of_auc.high,
        "n": len(y),
        "accuracy_low": of_accuracy.low,
        "accuracy_high": of_accuracy.high,
        "interval": of_auc.method,
        "n_class_1": int(y.sum()),
    }


def lora_scalars(
    scalars: Float[np.ndarray, "n module"], judged: pd.DataFrame, *, inverse_penalty: float = 1.0
) -> pd.DataFrame:
    """The table `lora_scalars`: one row for each of `contrasts(judged)` that has two questions in both classes.

    scalars: `mean_scalars` of the judged answers, row by row. judged: also a column `question`, the cluster. Raises
    StatisticsError where no comparison can be made.
    """
    if len(scalars) != len(judged) or "question" not in judged:
        raise UsageError(
            f"{len(scalars)} rows of scalars for {len(judged)} judged answers with columns {list(judged.columns)}; "
            "give one row each, and a column question."
        )
    rows, reasons = [], []
    for name, labels in contrasts(judged).items():
        try:
            rows.append(
                separation(scalars, labels, list(judged["question"]), comparison=name, inverse_penalty=inverse_penalty)
            )
        except StatisticsError as error:
            reasons.append(str(error))
    if not rows:
        raise StatisticsError("no comparison can be made. " + " ".join(reasons))
    return pd.DataFrame(rows)


def write_directions(adapter: LoraAdapter) -> dict[str, Direction]:
    """What each module of a rank-1 adapter writes for a scalar of 1: scale * B, as a Direction at its block's layer.

    Cosines with other directions are P2 sec. 3.5. Which sign a token gets depends on its scalar. Raises SolutionError
    for rank above 1, and for modules that do not write to the residual stream.
    """
    if adapter.rank != 1:
        raise SolutionError(f"the adapter has rank {adapter.rank}: it writes more than one direction. Take rank 1.")
    check_inside_blocks(adapter)
    found = {}
    for name, b in adapter.b.items():
        layer = layer_of(name)
        if layer is None or not writes_to_residual(name):
            raise SolutionError(f"{name} does not write to the residual stream, so its B is no direction of it.")
        found[name] = Direction(
            (adapter.scale_of(name) * b[:, 0].detach().float().cpu())[None],
            (layer,),
            "lora-B",
            model=adapter.base or "unknown",
            token_scope="all",
            sources=(name,),
        )
    return found


def write_lens(model: ChatModel, adapter: LoraAdapter, top_k: int = 10) -> pd.DataFrame:
    """The logit lens (`lens.logit_lens`) of what every module writes, with a column `module` first."""
    check_comparable({"the adapter": adapter}, model)
    parts = []
    for name, direction in write_directions(adapter).items():
        table = logit_lens(model, direction, top_k=top_k)
        table.insert(0, "module", name)
        parts.append(table)
    return pd.concat(parts, ignore_index=True)
