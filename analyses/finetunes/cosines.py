"""Do different finetunes, adapters and readings find the same direction?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import torch

from analyses.findings import ONE_DIRECTION, Finding, clause, decided, middle, named, said, value_of
from analyses.inputs.finetunes import Organism
from analyses.suite import Need, Suite, nothing_of
from analyses.tasks import Task
from em_interp import figures
from em_interp.directions.cosines import cosine_rows, organism_cosines
from em_interp.directions.direction import Direction
from em_interp.directions.extraction import Contrast
from em_interp.directions.resampling import Resamples, resample_direction
from em_interp.errors import EmInterpError, StatisticsError
from em_interp.solutions.base import Solution
from em_interp.statistics import NORMAL, PERCENT

TITLE = "Convergence: cosines between directions"
TEXT = (
    "Mean-diff directions of every pair of general organisms, layer by layer. Noise in the means shrinks a "
    f"cosine: cosine_debiased is without that, and low and high are its {PERCENT} interval (questions left out in "
    "turn), not that of the plain cosine; empty where a direction is no larger than its noise. content_cosine is "
    "the same pair of text sets read in the chat model: what they share by their words alone. Then the readings "
    "of one organism beside each other: mean-diff, model-diff, the trained vector or LoRA B. Two nulls: p_value "
    "is that of two directions random in all of d_model, which assumes that noise has no favourite axes. "
    "Activations do: noise_dimensions is how many axes of equal variance would vary as theirs do about their "
    "class's mean (the participation ratio of the spectrum), and where it is far below d_model, two directions of "
    "mere noise have large cosines and small p-values. permutation_p is against directions that noise in these "
    "very activations gives (labels permuted within a question); it is empty where no single responses stand "
    "behind either vector."
)
ALSO = {
    "pocket": (
        "Beside the readings of one organism stands the persona that pre-training put into the chat model, announced "
        "by a system prompt or only to be inferred from an earlier answer (read at the last prompt token)."
    ),
}
TABLES = ("cosines",)
NEEDS = (Need.DIRECTIONS,)
STORY = (2, "cosines")
CHAPTER = ONE_DIRECTION
READINGS = ("data-diff", "data-diff-in-chat", "model-diff")


def compute(suite: Suite) -> dict[str, pd.DataFrame]:
    """One row a pair and layer; column `comparison` says which of the three kinds of pair it is."""
    finetunes = suite.finetunes
    found = with_directions(suite, finetunes.select(solution="general", seed=0))
    if len(found) < 2:
        raise nothing_of(suite, "two general organisms with misaligned and aligned coherent answers")
    organisms, contrasts = list(found), {organism.name: contrast for organism, contrast in found.items()}
    mean_diffs = {name: c.direction() for name, c in contrasts.items()}
    resamples: dict[str, Resamples] = {}
    for name, of in contrasts.items():
        _add_resamples(suite, resamples, name, of)
    content = {e.name: finetunes.contrast(e, "data-diff-in-chat").direction() for e in organisms}
    between = organism_cosines(mean_diffs, resamples=resamples, content=content).assign(comparison="between finetunes")
    read = {f"persona ({how}, pre-trained)": persona(suite, how) for how in finetunes.personas()}
    personas = {name: of.direction() for name, of in read.items()}
    for name, of in read.items():
        _add_resamples(suite, resamples, name, of)
    readings = []

    def row(name_a: str, a: Direction, name_b: str, b: Direction) -> pd.DataFrame:
        shared = sorted(set(a.layers) & set(b.layers))
        behind = [
            resamples[name].only([direction.layers.index(layer) for layer in shared]) if name in resamples else None
            for name, direction in ((name_a, a), (name_b, b))
        ]
        return cosine_rows(name_a, a.only(shared), name_b, b.only(shared), (behind[0], behind[1]))

    for organism in organisms:
        of = finetunes.contrast(organism, "model-diff")
        _add_resamples(suite, resamples, f"{organism.name}:model-diff", of)
        if organism.name in resamples:
            resamples[f"{organism.name}:mean-diff"] = resamples[organism.name]
        named: dict[str, Direction] = {
            f"{organism.name}:mean-diff": mean_diffs[organism.name],
            f"{organism.name}:model-diff": of.direction(),
            **_trained(suite, finetunes.solution(organism), organism.name),
        }
        pairs = [*combinations(named.items(), 2)]
        pairs += [(a, b) for a in named.items() for b in personas.items()]
        for (name_a, a), (name_b, b) in pairs:
            if set(a.layers) & set(b.layers):
                readings.append(row(name_a, a, name_b, b))
    for (name_a, a), (name_b, b) in combinations(personas.items(), 2):
        readings.append(row(name_a, a, name_b, b))
    return {
        "cosines": pd.concat([between, *(r.assign(comparison="between readings") for r in readings)], ignore_index=True)
    }


def tasks(suite: Suite) -> list[Task]:
    """The directions of each organism, and of the personas."""
    found = direction_tasks(suite.finetunes.select(solution="general", seed=0), READINGS)
    return [*found, *(Task(f"persona, {how}", persona, (how,), 1.0) for how in suite.finetunes.personas())]


def asks(suite: Suite) -> dict[str, int]:
    """How many answers are sampled, by whose."""
    return open_asked(suite, suite.finetunes.select(solution="general", seed=0))


def open_asked(suite: Suite, organisms: Sequence[Organism]) -> dict[str, int]:
    """How many answers the directions of these finetunes are read from, where they are sampled."""
    return {f"open answers of {e.name}": suite.judged_finetunes.n_asked_openly(e) for e in organisms}


def with_directions(suite: Suite, organisms: Sequence[Organism]) -> dict[Organism, Contrast]:
    """Those that a direction can be read from, with what it lies between; why it cannot of others is noted.

    Raises `MissingDataError` for none.
    """
    found = {}
    for organism in organisms:
        try:
            found[organism] = suite.finetunes.contrast(organism)
        except EmInterpError as error:
            suite.note(error)
    if not found:
        raise nothing_of(suite, "general finetune with misaligned and aligned coherent answers")
    return found


def direction_tasks(organisms: Sequence[Organism], kinds: Sequence[str]) -> list[Task]:
    """The answers that directions are read from, and then each reading."""
    answers = [Task(f"open answers of {e.name}", open_answers, (e,), 3.0) for e in organisms]
    return [
        *answers,
        *(Task(f"{kind} of {e.name}", reading, (e, kind), 0.5, stage=1) for e in organisms for kind in kinds),
    ]


def open_answers(suite: Suite, organism: Organism) -> pd.DataFrame:
    """Judged answers of an organism to open questions."""
    return suite.finetunes.open_answers(organism)


def reading(suite: Suite, organism: Organism, kind: str) -> Contrast:
    """What differs between an organism's answers, or between it and the chat model."""
    return suite.finetunes.contrast(organism, kind)


def persona(suite: Suite, how: str) -> Contrast:
    """What two personas of pre-training differ by."""
    return suite.finetunes.persona(how)


def _add_resamples(suite: Suite, to: dict[str, Resamples], name: str, of: Contrast) -> None:
    """The resamples of a direction pooled over tokens, at the layers that it has; a note where there can be none."""
    layers = of.direction().layers
    sides = of.positive, of.negative
    rows = [torch.stack([side.each(of.scope, layer) for layer in layers], dim=1) for side in sides]
    weights = [side.counts[of.scope].double().numpy() for side in sides]
    try:
        to[name] = resample_direction(
            *rows,
            positive_questions=of.positive.questions,
            negative_questions=of.negative.questions,
            positive_weights=weights[0],
            negative_weights=weights[1],
        )
    except StatisticsError as error:
        suite.note(StatisticsError(f"{name}: {error}"))


def _trained(suite: Suite, solution: Solution, name: str) -> dict[str, Direction]:
    """What training itself wrote, where it is one vector in the residual stream."""
    trained = solution.trained()
    if trained.direction is None:
        return {}
    kind, vectors = trained.parameter, trained.direction[None]
    model = suite.finetunes.chat
    try:
        found = Direction(vectors, (solution.first_layer,), kind=kind, model=model.name, sources=(name,))
    except EmInterpError as error:
        suite.note(error)
        return {}
    return {f"{name}:{kind}": found}


def findings(tables: dict[str, pd.DataFrame]) -> list[Finding]:
    """The cosine of the middle pair of finetunes at the middle layer, and of the middle organism with the persona."""
    table = tables["cosines"]
    between = table[table["comparison"] == "between finetunes"]
    found = []
    if (at := _middle_layer(between)) is not None:
        rows = between[between["layer"] == at]
        value, row = _middle_cosine(rows)
        pair = f"{named(row['direction_a'])} and {named(row['direction_b'])}"
        which = pair if len(rows) == 1 else f"the middle of {len(rows)} pairs of finetunes, {pair}"
        content = said(value_of(row, "content_cosine"))
        text = f"At layer {at}, the mean-diffs of {which}, have a cosine of {{estimate}}{_noise(value)}"
        text += clause("; their texts alone, read in the chat model, one of {}", content)
        found.append(_finding(text, row, value, 0.8, "P2, sec. 3.5: above .8 in all but 4 layers", len(rows), "pairs"))
    persona = table[table["direction_b"].str.startswith("persona") & table["direction_a"].str.endswith(":model-diff")]
    for name, rows in persona.groupby("direction_b", sort=False):
        if (at := _middle_layer(rows)) is None:
            continue
        rows = rows[rows["layer"] == at]
        value, row = _middle_cosine(rows)
        of = named(row["direction_a"].removesuffix(":model-diff"))
        which = of if len(rows) == 1 else f"the middle of {len(rows)} organisms, {of},"
        text = f"At layer {at}, what finetuning changed in {which} and the {named(name)} have a cosine of {{estimate}}"
        text += _noise(value)
        found.append(_finding(text, row, value, None, "", len(rows), "organisms"))
    return found


def _middle_layer(rows: pd.DataFrame) -> int | None:
    """The middle one of the layers at which there is a cosine."""
    layers = sorted(rows.loc[rows["cosine"].notna(), "layer"].unique())
    return int(layers[len(layers) // 2]) if layers else None


def _middle_cosine(rows: pd.DataFrame) -> tuple[str, Mapping[Any, Any]]:
    """The middle row of the cosines without noise where there are any, else of the plain ones, and which they are."""
    for value in ("cosine_debiased", "cosine"):
        if value in rows and (row := middle(rows, value)) is not None:
            return value, row
    raise ValueError("no row has a cosine")


def _noise(value: str) -> str:
    return ", without the noise of the means" if value == "cosine_debiased" else ""


def _finding(
    text: str, row: Mapping[Any, Any], value: str, published: float | None, source: str, n: int, counts: str
) -> Finding:
    """Beside what random directions give; the interval is that of the cosine without noise alone."""
    ends = (value_of(row, "low"), value_of(row, "high")) if value == "cosine_debiased" else (math.nan, math.nan)
    null = NORMAL * value_of(row, "null_sd")
    text += clause("; random directions stay within {}", said(null))
    verdict = decided(*ends, null)
    is_papers = published is not None
    return Finding(
        text,
        value_of(row, value),
        n,
        counts,
        *ends,
        published=published,
        source=source,
        verdict=verdict,
        first=is_papers,
        asked="Likeness: cosine of two organisms' directions",
        beside=f"layer {int(row['layer'])}" + clause("; random within {}", said(null)),
    )


def plot(tables: dict[str, pd.DataFrame]) -> dict[str, go.Figure]:
    """Median cosine between finetunes by layer, beside the texts alone; every reading beside the persona."""
    table = tables["cosines"].astype({"cosine": float, "content_cosine": float})
    between = table[table["comparison"] == "between finetunes"]
    spread = go.Figure()
    shown = (("mean-diff", "cosine"), ("texts alone, in the chat model", "content_cosine"))
    for index, (name, column) in enumerate(shown):
        _median(spread, between, column, name, index, len(shown), "least to greatest pair")
    figures.null_band(spread, NORMAL * float(between["null_sd"].iloc[0]), f"random directions, {PERCENT}")
    figures.style(spread, "layer (output of block)", "cosine")
    drawn = {"cosines": figures.captioned(spread, "Cosines between finetunes by layer: the median over pairs.")}
    if (pairs := _pairs(between)) is not None:
        drawn["cosines_pairs"] = pairs
    readings = table[table["comparison"] == "between readings"]
    of_persona = readings["direction_b"].str.startswith("persona") & ~readings["direction_a"].str.startswith("persona")
    if of_persona.any():
        caption = "What finetuning switches on, beside the persona of pre-training: medians over organisms."
        drawn["cosines_persona"] = figures.captioned(_persona(readings[of_persona]), caption)
    return drawn


def _median(
    figure: go.Figure, rows: pd.DataFrame, column: str, name: str, index: int, n: int, of: str, panel: int = 0
) -> None:
    """The median by layer and, dotted, the whole range; the n lines of a panel side by side."""
    found = rows.groupby("layer")[column]
    x = found.median().index.to_numpy(float) + 0.1 * (index - (n - 1) / 2)
    figures.extent(figure, x, found.min(), found.max(), of, index, panel=panel)
    figures.line(figure, x, found.median(), name, index, markers=True, panel=panel)


def _pairs(between: pd.DataFrame) -> go.Figure | None:
    """Every pair at the middle layer, without the noise of the means, with its interval; none where none is known."""
    layers = sorted(between["layer"].unique())
    layer = layers[len(layers) // 2]
    rows = between[(between["layer"] == layer) & between["cosine_debiased"].notna()]
    if rows.empty:
        return None
    short = [rows[side].str.removeprefix("pocket/") for side in ("direction_a", "direction_b")]
    rows = rows.assign(pair=short[0] + " and " + short[1]).sort_values("cosine_debiased", ascending=False)
    groups = [
        ("without the noise of the means", "cosine_debiased", "low", "high"),
        ("texts alone, in the chat model", "content_cosine", None, None),
    ]
    figure = figures.dot_plot(rows, "pair", groups, "cosine", apart=False)
    figures.null_line(figure, 0, "no relation", axis="x")
    caption = f"Cosines of all pairs of finetunes at layer {layer}; intervals over questions."
    return figures.captioned(figure, caption)


def _persona(rows: pd.DataFrame) -> go.Figure:
    """A panel for each way that the persona was read, a line for each reading of the finetunes."""
    rows = rows.assign(reading=rows["direction_a"].str.split(":").str[1])
    personas, readings = list(dict.fromkeys(rows["direction_b"])), list(dict.fromkeys(rows["reading"]))
    figure, of = figures.panels([str(name) for name in personas]), "least to greatest organism"
    for number, persona in enumerate(personas):
        for index, reading in enumerate(readings):
            part = rows[(rows["direction_b"] == persona) & (rows["reading"] == reading)]
            _median(figure, part, "cosine", str(reading), index, len(readings), of, panel=number)
        half = NORMAL * float(rows["null_sd"].iloc[0])
        figures.null_band(figure, half, f"random directions, {PERCENT}", panel=number)
    return figures.style(figure, "layer (output of block)", "cosine")
