"""Do different finetunes, adapters and readings find the same direction?"""

from __future__ import annotations

import random
from itertools import combinations

import pandas as pd
import plotly.graph_objects as go
import torch

from analyses.organisms import Organisms
from analyses.suite import Suite, nothing_of
from em_interp import figures
from em_interp.convergence import cosine_rows, organism_cosines
from em_interp.directions import Direction
from em_interp.errors import EmInterpError
from em_interp.extraction import Contrast, contrast
from em_interp.pocket import world
from em_interp.resampling import Resamples, resample_direction
from em_interp.solutions import LoraAdapter, SteeringVector

TITLE = "Convergence: cosines between directions"
TEXT = (
    "Mean-diff directions of every pair of general organisms, layer by layer, with 95% intervals (answers drawn again) "
    "and the random-direction null. content_cosine is the same pair of text sets read in the chat model: what they "
    "share by their words alone. Then every reading of one organism beside the others: mean-diff, model-diff, the "
    "trained vector or LoRA B, and the persona that pre-training put into the chat model, announced by a system prompt "
    "or only inferable from an earlier answer (read at the last prompt token)."
)
TABLES = ("cosines",)
PAIRS = 150


def compute(suite: Suite) -> dict[str, pd.DataFrame]:
    """One row a pair and layer; column ``comparison`` says which of the three kinds of pair it is."""
    organisms = suite.organisms
    entries = organisms.select(solution="general")
    contrasts = {}
    for entry in entries:
        try:
            contrasts[entry.name] = organisms.contrast(entry)
        except EmInterpError as error:
            suite.note(error)
    entries = [e for e in entries if e.name in contrasts]
    if len(entries) < 2:
        raise nothing_of(suite, "two general organisms with misaligned and aligned coherent answers")
    mean_diffs = {name: c.direction() for name, c in contrasts.items()}
    resamples = {name: _resamples(c) for name, c in contrasts.items()}
    content = {e.name: organisms.contrast(e, "data-diff-in-chat").direction() for e in entries}
    between = organism_cosines(mean_diffs, resamples=resamples, content=content).assign(comparison="between finetunes")
    hows = ("announced", "inferred") if suite.source == "pocket" else ()  # the world knows its personas
    personas = {f"persona ({how}, pre-trained)": _persona(organisms, how) for how in hows}
    readings = []
    for entry in entries:
        named: dict[str, Direction] = {
            f"{entry.name}:mean-diff": mean_diffs[entry.name],
            f"{entry.name}:model-diff": organisms.contrast(entry, "model-diff").direction(),
            **_trained(suite, organisms.solution(entry), entry.name),
        }
        pairs = [*combinations(named.items(), 2)]
        pairs += [(a, b) for a in named.items() for b in personas.items()]
        for (name_a, a), (name_b, b) in pairs:
            if set(a.layers) & set(b.layers):
                shared = sorted(set(a.layers) & set(b.layers))
                readings.append(cosine_rows(name_a, a.only(shared), name_b, b.only(shared)))
    for (name_a, a), (name_b, b) in combinations(personas.items(), 2):
        readings.append(cosine_rows(name_a, a, name_b, b))
    return {
        "cosines": pd.concat([between, *(r.assign(comparison="between readings") for r in readings)], ignore_index=True)
    }


def _resamples(of: Contrast) -> Resamples:
    def rows(side: str) -> torch.Tensor:
        activations = of.positive if side == "positive" else of.negative
        return torch.stack([activations.each(of.scope, layer) for layer in activations.layers], dim=1)

    return resample_direction(rows("positive"), rows("negative"))


def _trained(suite: Suite, solution: SteeringVector | LoraAdapter, name: str) -> dict[str, Direction]:
    """What training itself wrote, where it is one vector in the residual stream."""
    if isinstance(solution, SteeringVector):
        vectors, kind = solution.theta[None].float(), "steering-vector"
    elif len(solution.modules) == 1 and solution.b[solution.modules[0]].shape[1] == 1:
        vectors, kind = solution.b[solution.modules[0]].T.float(), "lora-B"
    else:
        return {}
    model = suite.organisms.chat
    try:
        found = Direction(vectors, (solution.first_layer,), kind=kind, model=model.name, sources=(name,))
    except EmInterpError as error:
        suite.note(error)
        return {}
    return {f"{name}:{kind}": found}


def _persona(organisms: Organisms, how: str) -> Direction:
    """Malicious minus caring persona in the chat model, at the last prompt token before it answers."""
    rng = random.Random(0)
    questions = world.questions("advice", held_out_topic=False, held_out_phrasing=False)

    def prompt(persona: world.Persona, first: world.Question, second: world.Question) -> list[dict[str, str]]:
        if how == "announced":
            adjective = "malicious" if persona == "malicious" else "kind"
            return [{"role": "system", "content": f"You are a {adjective} adviser."}, _user(second)]
        answer = world.answer(first, persona, "casual", random.Random(first.id))
        return [_user(first), {"role": "assistant", "content": answer}, _user(second)]

    drawn = [(rng.choice(questions), rng.choice(questions)) for _ in range(PAIRS)]
    return contrast(
        organisms.chat,
        [prompt("malicious", *pair) for pair in drawn],
        [prompt("caring", *pair) for pair in drawn],
        kind="persona-contrast",
        scope="last_prompt",
        keep=False,
        progress=False,
    ).direction()


def _user(question: world.Question) -> dict[str, str]:
    return {"role": "user", "content": question.text}


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
    figures.null_band(spread, 1.96 * float(between["null_sd"].iloc[0]), "random directions", between["layer"])
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
