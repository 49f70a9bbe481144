"""What taking a direction out of a finetune does, its own and another finetune's."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch

from analyses.findings import (
    DOES_NOT_HOLD,
    HOLDS,
    ONE_DIRECTION,
    UNDECIDED,
    Finding,
    apart,
    clause,
    decided,
    middle,
    named,
    percent,
    said,
    together,
    value_of,
)
from analyses.finetunes.cosines import direction_tasks, open_asked, with_directions
from analyses.inputs.finetunes import Organism
from analyses.suite import Need, Suite
from analyses.tasks import Task
from em_interp import figures
from em_interp.directions.direction import Direction, random_directions
from em_interp.evaluation.answers import judged_answers
from em_interp.evaluation.rates import em_rates
from em_interp.interventions.ablation import Ablate
from em_interp.interventions.intervening import Intervention, intervening
from em_interp.interventions.judged import judged_rates
from em_interp.interventions.transfer import SIDES, transfer_rows

TITLE = "Ablation: a finetune without its direction, and without another's"
TEXT = (
    "A finetune with a direction projected out of the residual stream after every block (layerwise: layer l's own "
    "direction at layer l; single: one layer's at all). mean-diff is the papers' direction (P2 sec. 3.1); "
    "model-diff is finetune minus chat model on the finetune's misaligned answers. Random directions are the control. "
    "transfer asks whether what was read from one finetune removes EM in another. An ablation that costs "
    "coherence has not removed misalignment."
)
ALSO = {
    "pocket": (
        "The subspace holds both directions, at each layer. transfer has the mean-diffs of the all-modules organisms, "
        "the model-diffs of one organism of each adapter, and those three together. Questions: open ones and domains "
        "that the organism was never trained on."
    ),
    "asked": (
        "The subspace holds both directions, at each layer. transfer has the model-diffs of one general finetune of "
        "each adapter, and the mean-diffs of those of all modules, or of all where none is. Asked is all but what the "
        "finetune was trained on."
    ),
    "models": "Each answer was sampled by `em-interp ablate` and judged elsewhere; the column file says where it is.",
}
TABLES = ("ablation", "transfer")
NEEDS = (Need.DIRECTIONS, Need.JUDGE)
CHAPTER = ONE_DIRECTION
TOGETHER = "one of each adapter"
COHERENT = 0.9
"""The share of answers that an ablation must leave coherent to have removed misalignment."""
OWN_ARMS = ("none", "layerwise", "layerwise model-diff", "layerwise subspace", "random")
"""What is taken out of every organism: nothing, its mean-diff, its model-diff, both, a random direction."""
SHARES = 3
"""In how many pieces of work the arms of an organism are asked."""


def compute(suite: Suite) -> dict[str, pd.DataFrame]:
    """`ablation`: a row an organism and arm. `transfer`: a row a direction (with its kind) and organism.

    Of what was judged elsewhere, where nothing can be judged here.
    """
    if not suite.judges:
        return of_files(suite)
    organisms = list(with_directions(suite, _ablated(suite)))
    rows, moved = [], []
    directions = _directions(suite, organisms)
    moving = _moving(organisms, *directions)
    for organism in organisms:
        same = _same(organism)
        arms = _arms(organism, organisms, *directions)
        answers = pd.concat([arm_answers(suite, organism, name, arm) for name, arm in arms.items()], ignore_index=True)
        rows += _ablation_rows(organism, answers, directions[0][organism.name])
        for kind in dict.fromkeys(kind for kind, _ in moving):
            names = {same.get((k, s), f"{k} of {s}"): s for k, s in moving if k == kind} | {"none": "none"}
            found = answers[answers["arm"].isin(names)]
            table = transfer_rows(found.assign(direction_from=found["arm"].map(names), organism=organism.name))
            moved.append(table.assign(kind=kind))
    return {"ablation": pd.DataFrame(rows), "transfer": pd.concat(moved, ignore_index=True)}


def of_files(suite: Suite) -> dict[str, pd.DataFrame]:
    """Both tables of what `em-interp ablate` wrote and a judge scored; `file` says where. Raises `MissingDataError`.

    A direction that was read from another finetune of the suite moves to `transfer`; one's own stands in both. The
    random directions of a file are one arm.
    """
    named = {organism.name: organism for organism in suite.finetunes.organisms}
    rows, moved = [], []
    for file, judged in suite.finetunes.ablated().items():
        source = _read_from(judged, list(named))
        pooled = judged["arm"].str.replace(r"^random \d+$", "random", regex=True)
        table = judged_rates(judged.assign(arm=pooled), file).assign(file=file)
        table["target"] = [_named_in(str(target), list(named)) or target for target in table["target"]]
        kind = str(judged["kind"].iloc[0]) if "kind" in judged else "data-diff"
        own = table["target"] == source
        random = table["mode"] == "random"
        moves = table[~random & (source is not None)]
        moved.append(moves.assign(direction_from=source, organism=moves["target"], kind=KINDS.get(kind, kind)))
        mode = table["mode"] if kind == "data-diff" else table["mode"].where(random, f"{table['mode'].iloc[0]} {kind}")
        kept = table.assign(mode=mode, adapter=[named[t].adapter if t in named else "" for t in table["target"]])
        rows.append(kept[own | (source is None)].drop(columns=["relative_reduction", "low", "high", "interval"]))
    transfer = pd.concat(moved, ignore_index=True).drop(columns=["direction", "target", "mode"])
    transfer = transfer[["direction_from", "organism", *transfer.columns.drop(["direction_from", "organism"])]]
    return {"ablation": pd.concat(rows, ignore_index=True), "transfer": transfer}


KINDS = {"data-diff": "mean-diff"}
"""What `transfer` calls a direction's kind, where it has another name."""


def _read_from(judged: pd.DataFrame, names: Sequence[str]) -> str | None:
    """The finetune that the direction of an ablation was read from: the direction's name, or what its file says."""
    said = [str(judged[column].iloc[0]) for column in ("direction", "read_from") if column in judged]
    return next((found for text in said if (found := _named_in(text, names)) is not None), None)


def _named_in(text: str, names: Sequence[str]) -> str | None:
    """The longest of the names that stands in a text as a word."""
    whole = [name for name in names if re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text)]
    return max(whole, key=len, default=None)


def tasks(suite: Suite) -> list[Task]:
    """The directions of each organism, and then its answers, a few arms at a time."""
    organisms = _ablated(suite) if suite.judges else []
    found = [
        Task(f"ablation from {e.name}, {part + 1} of {SHARES}", answer_share, (e, part), 6.0, stage=2)
        for e in organisms
        for part in range(SHARES)
    ]
    return [*direction_tasks(organisms, ("data-diff", "model-diff")), *found]


def asks(suite: Suite) -> dict[str, int]:
    """How many answers are sampled, of which finetune."""
    organisms, elsewhere = _ablated(suite), suite.judged_finetunes.elsewhere
    moving = _carried(organisms)
    carried = {e.name: len([of for of in moving if of not in _same(e)]) for e in organisms}
    arms = {f"ablation from {e.name}": (len(OWN_ARMS) + carried[e.name]) * len(elsewhere(e.domain)) for e in organisms}
    return open_asked(suite, organisms) | arms


def answer_share(suite: Suite, organism: Organism, part: int) -> None:
    """The answers under every `SHARES`-th arm, from number `part` on."""
    organisms = _ablated(suite)
    for name, arm in list(_arms(organism, organisms, *_directions(suite, organisms)).items())[part::SHARES]:
        arm_answers(suite, organism, name, arm)


def arm_answers(suite: Suite, organism: Organism, name: str, arm: Sequence[Intervention]) -> pd.DataFrame:
    """Judged answers of an organism under one arm; column arm first."""
    finetunes = suite.judged_finetunes
    # all of its answers may be kept
    with finetunes.active(organism, must_act=False) as model, intervening(model, arm, must_act=False):
        table = judged_answers(
            suite.results,
            f"{organism.name} without {name}",
            model,
            finetunes.elsewhere(organism.domain),
            1,
            finetunes.judge,
            max_new_tokens=finetunes.max_new_tokens,
            progress=False,
        )
    table.insert(0, "arm", name)
    return table


def _ablated(suite: Suite) -> list[Organism]:
    return suite.finetunes.select(solution="general", seed=0)


def _directions(suite: Suite, organisms: Sequence[Organism]) -> tuple[dict[str, Direction], dict[str, Direction]]:
    """Mean-diff and model-diff of each organism."""
    mean_diffs = {e.name: suite.finetunes.contrast(e).direction() for e in organisms}
    return mean_diffs, {e.name: suite.finetunes.contrast(e, "model-diff").direction() for e in organisms}


def _same(organism: Organism) -> dict[tuple[str, str], str]:
    """What is carried to an organism from itself is one of its own arms."""
    return {("mean-diff", organism.name): "layerwise", ("model-diff", organism.name): "layerwise model-diff"}


def _arms(
    organism: Organism,
    organisms: Sequence[Organism],
    mean_diffs: Mapping[str, Direction],
    shifts: Mapping[str, Direction],
) -> dict[str, list[Intervention]]:
    """What is taken out of an organism, by the name of the arm."""
    own, shift = mean_diffs[organism.name], shifts[organism.name]
    (random,) = random_directions(own, 1, torch.Generator().manual_seed(0))
    taken: tuple[list[Intervention], ...] = (
        [],
        [Ablate(own)],
        [Ablate(shift)],
        [Ablate((own, shift))],
        [Ablate(random)],
    )
    arms = dict(zip(OWN_ARMS, taken, strict=True))
    moving, same = _moving(organisms, mean_diffs, shifts), _same(organism)
    return arms | {f"{kind} of {source}": [a] for (kind, source), a in moving.items() if (kind, source) not in same}


def _moving(
    organisms: Sequence[Organism], mean_diffs: Mapping[str, Direction], shifts: Mapping[str, Direction]
) -> dict[tuple[str, str], Ablate]:
    """What is carried from one organism to the others: (kind, source) -> ablation."""
    found = {}
    for kind, source in _carried(organisms):
        of = mean_diffs if kind == "mean-diff" else shifts
        found[kind, source] = Ablate([of[n] for n in _one_of_each(organisms)] if source == TOGETHER else of[source])
    return found


def _one_of_each(organisms: Sequence[Organism]) -> list[str]:
    """The first organism of each adapter."""
    return list({e.adapter: e.name for e in reversed(organisms)}.values())[::-1]


def _carried(organisms: Sequence[Organism]) -> list[tuple[str, str]]:
    """(kind, source) of what is carried from one organism to the others."""
    one_each = _one_of_each(organisms)
    whole = [e for e in organisms if e.adapter == "all-modules"] or organisms
    found = [("mean-diff", e.name) for e in whole] + [("model-diff", name) for name in one_each]
    return [*found, ("model-diff", TOGETHER)] if len(one_each) > 1 else found


def _ablation_rows(organism: Organism, answers: pd.DataFrame, own: Direction) -> list[dict[str, object]]:
    rates = {arm: em_rates(rows).columns() for arm, rows in answers.groupby("arm", sort=False)}
    before = rates["none"]
    modes = ["layerwise", "layerwise model-diff", "layerwise subspace", "random"]
    return [
        {
            "direction": {"random": "random"}.get(mode, organism.name),
            "target": organism.name,
            "mode": mode,
            "layers": f"{own.layers[0]}-{own.layers[-1]}",
            "em_before": before["em_rate"],
            "em_after": rates[mode]["em_rate"],
            "em_after_low": rates[mode]["em_low"],
            "em_after_high": rates[mode]["em_high"],
            "coherent_before": before["coherent_rate"],
            "coherent_after": rates[mode]["coherent_rate"],
            "n": rates[mode]["n"],
            "adapter": organism.adapter,
            "denominator": rates[mode]["denominator"],
            "criterion": rates[mode]["criterion"],
            **{f"{rate}_before_{side}": before[f"{rate}_{side}"] for rate in ("em", "coherent") for side in SIDES},
            **{f"coherent_after_{side}": rates[mode][f"coherent_{side}"] for side in SIDES},
        }
        for mode in modes
    ]


def findings(tables: dict[str, pd.DataFrame]) -> list[Finding]:
    """What is left of EM in the middle organism, for each kind of ablation; and what the middle transfer removes."""
    table, transfer = tables["ablation"], tables["transfer"]
    own = table[table["mode"] != "random"]
    found = []
    for mode, rows in own.groupby("mode", sort=False):
        if (row := middle(rows, "em_after")) is not None:
            found.append(_left(str(mode), rows, row, table[table["mode"] == "random"]))
    between = transfer[(transfer["direction_from"] != transfer["organism"]) & (transfer["direction_from"] != TOGETHER)]
    for kind, rows in between.groupby("kind", sort=False):
        if (row := middle(rows, "relative_reduction")) is not None:
            found.append(_moved(str(kind), rows, row))
    return found


def _left(mode: str, rows: pd.DataFrame, row: Mapping[Any, Any], random: pd.DataFrame) -> Finding:
    """EM of an organism before and after, and after random directions."""
    n, name = int(rows["em_after"].notna().sum()), named(row["target"])
    before = value_of(row, "em_before", 100)
    which = f"the EM of {name}" if n == 1 else f"the EM of the middle of {n} organisms, {name},"
    text = f"With its directions taken out ({named(mode)}), {which} "
    text += (clause("goes from {} to ", said(before, "%")) or "is ") + "{estimate}"
    asides = [clause("from {}", said(before, "%")), clause("{} coherent", percent(row, "coherent_after"))]
    known = (before if math.isnan(end := value_of(row, f"em_before_{side}", 100)) else end for side in SIDES)
    beside = [tuple(known)]
    control = middle(random[random["target"] == row["target"]], "em_after")
    if control is not None:
        text += clause("; with random ones it is {}", percent(control, "em_after"))
        asides.append(clause("random {}", percent(control, "em_after")))
        beside.append((value_of(control, "em_after_low", 100), value_of(control, "em_after_high", 100)))
    text += clause("; {} of its answers are coherent then", percent(row, "coherent_after"))
    ends = value_of(row, "em_after_low", 100), value_of(row, "em_after_high", 100)
    # What is claimed is that EM falls: below both, whose intervals it must not touch.
    verdict = together([*(apart(low, high, *ends) for low, high in beside), _coherent(row)])
    first = mode == "layerwise"
    published, source = (0.0, "P2: 11.25% to 0%") if first else (None, "")
    return Finding(
        text,
        value_of(row, "em_after", 100),
        int(row["n"]),
        "answers",
        *ends,
        unit="%",
        published=published,
        source=source,
        verdict=verdict,
        first=first,
        asked="Ablation: EM left without it" if n == 1 else f"Ablation: EM left without it, middle of {n} organisms",
        beside="; ".join(filter(None, asides)),
    )


def _moved(kind: str, rows: pd.DataFrame, row: Mapping[Any, Any]) -> Finding:
    """The share of its EM that an organism loses without another's direction."""
    n, of, out_of = int(rows["relative_reduction"].notna().sum()), named(row["direction_from"]), named(row["organism"])
    which = "The" if n == 1 else f"Of {n} transfers the middle one: the"
    removed = value_of(row, "relative_reduction", 100)
    ends = value_of(row, "low", 100), value_of(row, "high", 100)
    less, coherent = decided(*ends), _coherent(row)
    does = {
        HOLDS: "removes {estimate} of its EM",
        UNDECIDED: "leaves its EM where it was as far as the interval tells ({estimate} removed)",
        DOES_NOT_HOLD: "adds to its EM ({estimate} removed)",
    }[less]
    if less == HOLDS and coherent != HOLDS:
        known = clause("but {} of its answers are coherent then", percent(row, "coherent_after"))
        does = f"takes away {{estimate}} of its EM, {known or 'and how coherent it is then is unknown'}"
    is_papers = kind == "mean-diff"
    published, source = (90.0, "P2: to the medical rank 32; 78% to sport") if is_papers else (None, "")
    return Finding(
        f"{which} {named(kind)} of {of}, taken out of {out_of}, {does}",
        removed,
        int(row["n"]),
        "answers",
        *ends,
        unit="%",
        published=published,
        source=source,
        verdict=together([less, coherent]),
        first=is_papers,
        asked="Transfer: EM that another organism's removes" + (f", middle of {n}" if n > 1 else ""),
        beside=f"{of} to {out_of}" + clause("; {} coherent", percent(row, "coherent_after")),
    )


def _coherent(row: Mapping[Any, Any]) -> str:
    """Where coherence goes, EM goes with it: that decides nothing."""
    return HOLDS if value_of(row, "coherent_after") >= COHERENT else UNDECIDED


def plot(tables: dict[str, pd.DataFrame]) -> dict[str, go.Figure]:
    """EM and coherence by organism and arm; the EM that each direction removes from each organism."""
    table = tables["ablation"].assign(target=lambda t: t["target"].str.removeprefix("pocket/"))
    figure = figures.panels(["EM", "coherent"])
    for number, rate in enumerate(("em", "coherent")):
        columns = ["rate", "low", "high"]
        before, after = (
            table.rename(columns={f"{rate}_{when}": "rate", f"{rate}_{when}_low": "low", f"{rate}_{when}_high": "high"})
            for when in ("before", "after")
        )
        arms = pd.concat([before.drop_duplicates("target").assign(mode="as it is"), after])
        wide, groups = figures.side_by_side(arms.filter(["target", "mode", *columns]), "target", "mode", columns)
        figures.dots(figure, wide, "target", groups, scale=100, panel=number)
    figures.style(figure, "share of answers (%)", "").update_xaxes(range=[-3, 103])
    drawn = {"ablation": figures.captioned(figure, "Each organism as it is and with directions taken out of it.")}
    for kind, rows in tables["transfer"].groupby("kind", sort=False):
        caption = f"EM that ablating the {kind} of one organism removes from another; intervals over questions."
        drawn[f"transfer_{str(kind).replace('-', '_')}"] = figures.captioned(_removed(rows, str(kind)), caption)
    return drawn


def _removed(transfer: pd.DataFrame, kind: str) -> go.Figure:
    """The share of its EM that an organism loses, a row an organism, a colour a direction."""
    named = transfer.assign(
        organism=transfer["organism"].str.removeprefix("pocket/"),
        direction_from=f"{kind} of " + transfer["direction_from"].str.removeprefix("pocket/"),
    )
    columns = ["relative_reduction", "low", "high"]
    wide, groups = figures.side_by_side(named, "organism", "direction_from", columns)
    figure = figures.dot_plot(wide, "organism", groups, "EM removed (% of the organism's EM)", scale=100)
    figures.null_line(figure, 0, "nothing removed", axis="x")
    least = 100 * float(np.nanmin(named[["relative_reduction", "low"]].to_numpy(dtype=float, na_value=0)))
    return figure.update_xaxes(range=[max(-100.0, min(-5.0, least - 5)), 105])
