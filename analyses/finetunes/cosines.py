"""Do different finetunes, adapters and readings find the same direction?"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import pandas as pd
import plotly.graph_objects as go
import torch

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
    "Mean-diff directions of every pair of general organisms, layer by layer. Noise in the means shrinks a cosine: "
    f"cosine_debiased is without that, and low and high are its {PERCENT} interval (questions left out in turn), not "
    "that of the plain cosine; empty where a direction is no larger than its noise. content_cosine is the same pair of "
    "text sets read in the chat model: what they share by their words alone. Then every reading of one organism beside "
    "the others: mean-diff, model-diff, the trained vector or LoRA B, and the persona that pre-training put into the "
    "chat model, announced by a system prompt or only inferable from an earlier answer (read at the last prompt "
    "token). Two nulls: p_value is that of two directions random in all of d_model, which assumes that noise has no "
    "favourite axes. Activations do: noise_dimensions is how many axes of equal variance would vary as theirs do about "
    "their class's mean (the participation ratio of the spectrum), and where it is far below d_model, two directions "
    "of mere noise have large cosines and small p-values. permutation_p is against directions that noise in these very "
    "activations gives (labels permuted within a question); it is empty where no single responses stand behind either "
    "vector."
)
TABLES = ("cosines",)
NEEDS = (Need.DIRECTIONS,)
READINGS = ("data-diff", "data-diff-in-chat", "model-diff")


def compute(suite: Suite) -> dict[str, pd.DataFrame]:
    """One row a pair and layer; column `comparison` says which of the three kinds of pair it is."""
    finetunes = suite.finetunes
    organisms = finetunes.select(solution="general", seed=0)
    contrasts = {}
    for organism in organisms:
        try:
            contrasts[organism.name] = finetunes.contrast(organism)
        except EmInterpError as error:
            suite.note(error)
    organisms = [e for e in organisms if e.name in contrasts]
    if len(organisms) < 2:
        raise nothing_of(suite, "two general organisms with misaligned and aligned coherent answers")
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


def with_directions(suite: Suite, organisms: Sequence[Organism]) -> list[Organism]:
    """Those that a direction can be read from; why it cannot of others is noted. Raises `MissingDataError` for none."""
    found = []
    for organism in organisms:
        try:
            suite.finetunes.contrast(organism)
        except EmInterpError as error:
            suite.note(error)
        else:
            found.append(organism)
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


def plot(tables: dict[str, pd.DataFrame]) -> dict[str, go.Figure]:
    """Median cosine between finetunes by layer, beside the texts alone; every reading of the first organism."""
    table = tables["cosines"].astype({"cosine": float})
    between = table[table["comparison"] == "between finetunes"]
    spread = go.Figure()
    for index, (name, column) in enumerate(
        (("mean-diff", "cosine"), ("texts alone, in the chat model", "content_cosine"))
    ):
        found = between.astype({column: float}).groupby("layer")[column]
        figures.line(
            spread,
            list(found.median().index),
            found.median(),
            name,
            index,
            markers=True,
            low=found.min(),
            high=found.max(),
        )
    figures.null_band(spread, NORMAL * float(between["null_sd"].iloc[0]), "random directions", between["layer"])
    figures.style(spread, "layer", "cosine")
    spread.update_yaxes(range=[-0.3, 1.05])
    readings = table[table["comparison"] == "between readings"]
    persona = readings[
        readings["direction_b"].str.startswith("persona") & ~readings["direction_a"].str.startswith("persona")
    ]
    persona = persona.assign(reading=persona["direction_a"].str.split(":").str[1] + " and " + persona["direction_b"])
    figure = go.Figure()
    for index, (reading, rows) in enumerate(persona.groupby("reading", sort=False)):
        found = rows.groupby("layer")["cosine"]
        figures.line(
            figure,
            list(found.median().index),
            found.median(),
            str(reading),
            index,
            markers=True,
            low=found.min(),
            high=found.max(),
        )
    figures.style(figure, "layer", "cosine")
    drawn = {
        "cosines": figures.captioned(
            spread, "Median over pairs of finetunes; bands from the least to the greatest pair."
        )
    }
    if len(persona):
        caption = "What finetuning switches on, beside the persona of pre-training; medians and ranges over organisms."
        drawn["cosines_persona"] = figures.captioned(figure, caption)
    return drawn
