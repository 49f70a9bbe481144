"""Do different finetunes, splits and readings find the same direction? Every pair, layer by layer, beside its null."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from analyses.comparison import beside
from analyses.findings import ONE_DIRECTION, Finding, clause, greatest, named, said, value_of
from analyses.suite import Need, Suite, nothing_of
from em_interp import figures
from em_interp.directions.cosines import comparable, cosine_table
from em_interp.directions.direction import Direction
from em_interp.errors import DirectionError, EmInterpError
from em_interp.published.activations import DIFFERENCES
from em_interp.statistics import NORMAL, PERCENT

TITLE = "Convergence: cosines between directions"
TEXT = (
    "Cosines between the data-diff directions of every pair of finetunes and splits, between the four readings of "
    "each split, and of trained vectors with data-diffs at the layer they are added to. The content control matters "
    "most: the same texts read in the chat model (data-diff-in-chat) give almost the same direction, so a high cosine "
    "between two finetunes speaks first of what their texts share. content_cosine is the cosine between the two "
    "controls: where it is 1, both were measured on the same texts. Each cosine has its random-direction null "
    "(standard deviation 1/sqrt(d_model), exact two-sided p-value), which assumes that noise has no favourite axes; "
    "activations do, so a small p alone says little. Released means carry no single responses, so there is no "
    "permutation null beside it, and the interval columns are empty."
)
TABLES = ("cosines",)
NEEDS = (Need.RELEASED,)
STORY = (2, "cosines")
CHAPTER = ONE_DIRECTION


def compute(suite: Suite) -> dict[str, pd.DataFrame]:
    """Pairs of data-diffs of one model, of readings within a split, and of trained vectors with data-diffs."""
    splits = suite.published.splits
    named = {f"{split.label}:{kind}": split.direction(kind) for split in splits for kind in split.kinds}
    pairs = [(f"{a.label}:data-diff", f"{b.label}:data-diff") for a, b in combinations(splits, 2)]
    for split in splits:
        pairs += [(f"{split.label}:{a}", f"{split.label}:{b}") for a, b in combinations(DIFFERENCES, 2)]
    trained = _trained(suite)
    named |= trained
    pairs += [(run, f"{split.label}:data-diff") for run in trained for split in splits]
    usable = []
    for a, b in pairs:
        if a not in named or b not in named or not comparable(named[a], named[b]):
            continue
        if a not in trained and named[a].layers != named[b].layers:
            suite.note(
                DirectionError(f"{a} has {len(named[a].layers)} layers and {b} {len(named[b].layers)}: not compared.")
            )
            continue
        if set(named[a].layers) & set(named[b].layers):
            usable.append((a, named[a], b, named[b]))
    if not usable:
        raise nothing_of(suite, "two directions of one model to compare", "EM_interp")
    table = cosine_table(usable)
    controls = [(a, named.get(a + "-in-chat"), b, named.get(b + "-in-chat")) for a, _, b, _ in usable]
    texts = cosine_table(
        (a, x, b, y) for a, x, b, y in controls if x is not None and y is not None and a != b + "-in-chat"
    )
    keys = ["direction_a", "direction_b", "layer"]
    texts = texts[[*keys, "cosine"]].rename(columns={"cosine": "content_cosine"})
    return {"cosines": table.merge(texts, on=keys, how="left", validate="one_to_one")}


def _trained(suite: Suite) -> dict[str, Direction]:
    """The end of each steering-vector run, at its own layer."""
    ends = {}
    for run in suite.published.trajectories:
        if run.parameter != "steering-vector" or run.layer is None:
            continue
        try:
            vector = run.final()[None]
            ends[run.name] = Direction(vectors=vector, layers=(run.layer,), kind="steering-vector", model=run.model)
        except EmInterpError as error:
            suite.note(error)
    return ends


def findings(tables: dict[str, pd.DataFrame]) -> list[Finding]:
    """The least cosine between finetunes, and what their texts alone give; the content control of one split."""
    table = _parted(tables["cosines"])
    table = table[table["cosine"].notna()]
    found = []
    across = table[_across(table)]
    if len(across):
        least = greatest(across, "cosine", least=True)
        pairs = len(across[["direction_a", "direction_b"]].drop_duplicates())
        null = NORMAL * value_of(least, "null_sd")
        text = (
            f"The least cosine between data-diffs of two finetunes at any layer is {{estimate}} (layer "
            f"{int(least['layer'])})"
        )
        text += clause("; random directions stay within {}", said(null))
        content = said(value_of(least, "content_cosine"))
        text += clause("; there the texts alone, read in the chat model, have {}", content)
        what = "9-adapter and R32, smallest over layers (P2: above .8 in all but 4 layers)"
        verdict = beside(tables, "released.cosines", what).get("verdict", "")
        given: dict[str, Any] = {"published": 0.8, "source": "P2, sec. 3.5: above .8 in all but 4 layers"}
        given |= {"asked": "Likeness: least cosine of two finetunes' directions"}
        given |= {"beside": f"layer {int(least['layer'])}" + clause("; random within {}", said(null))}
        estimate = value_of(least, "cosine")
        found.append(Finding(text, estimate, pairs, "pairs", verdict=verdict, first=True, **given))
    control = table[table["direction_b"] == table["direction_a"] + "-in-chat"].sort_values("layer")
    if len(control):
        first = control[control["split_a"] == "all"] if (control["split_a"] == "all").any() else control
        rows = first[first["direction_a"] == first["direction_a"].iloc[0]]
        row = dict(rows.iloc[len(rows) // 2])
        least_of_all = said(float(rows["cosine"].astype(float).min()))
        text = (
            f"At layer {int(row['layer'])}, {named(row['direction_a'])} has a cosine of {{estimate}} with the same "
            f"texts read in the chat model; the least of all layers is {least_of_all}"
        )
        what, estimate = "content control: same texts read in the chat model, layer 24", value_of(row, "cosine")
        held = beside(tables, "released.cosines", what, estimate)
        held |= {"asked": "Content: its cosine with the same texts, read in the chat model"}
        held |= {"beside": f"layer {int(row['layer'])}; least of all layers {least_of_all}"}
        found.append(Finding(text, estimate, len(rows), "layers", first=True, **held))
    return found


def _parted(table: pd.DataFrame) -> pd.DataFrame:
    """With folder, split and kind of both directions (`FOLDER/SPLIT:KIND`; empty for trained vectors)."""
    table = table.copy()
    for side in ("a", "b"):
        parts = table[f"direction_{side}"].str.extract(r"^(?P<folder>.*)/(?P<split>[^/]*):(?P<kind>.*)$")
        table[[f"{name}_{side}" for name in parts]] = parts
    return table


def _across(table: pd.DataFrame) -> pd.Series:  # type: ignore[type-arg]
    """The rows of data-diffs of two finetunes, each by the split that stands for the whole of it."""
    data = (table["kind_a"] == "data-diff") & (table["kind_b"] == "data-diff")
    whole = _whole_splits(table)
    different = table["folder_a"] != table["folder_b"]
    return data & different & table["split_a"].isin(whole) & table["split_b"].isin(whole)


def plot(tables: dict[str, pd.DataFrame]) -> dict[str, go.Figure]:
    """Across finetunes, across splits of one finetune, and the content control; the null as a band."""
    table = _parted(tables["cosines"])
    same_folder = table["folder_a"] == table["folder_b"]
    same_split = same_folder & (table["split_a"] == table["split_b"])
    data = (table["kind_a"] == "data-diff") & (table["kind_b"] == "data-diff")
    across = _across(table)
    views = {
        "cosines": (
            "Data-diff directions of different finetunes.",
            across,
            table["folder_a"] + "  and  " + table["folder_b"],
        ),
        "cosines_splits": (
            "Data-diff directions of different splits of the answers of one finetune.",
            data & same_folder,
            table["split_a"] + " and " + table["split_b"],
        ),
        "cosines_content_control": (
            "The content control: each data-diff against the same texts read in the chat model.",
            same_split & (table["kind_b"] == "data-diff-in-chat") & (table["kind_a"] == "data-diff"),
            table["direction_a"].str.removesuffix(":data-diff"),
        ),
        "cosines_readings": (
            "The data-diff against the model-diff and the both-diff of the same split.",
            same_split & (table["kind_a"] == "data-diff") & (table["kind_b"] != "data-diff-in-chat"),
            table["direction_a"].str.removesuffix(":data-diff"),
        ),
    }
    drawn = {}
    for name, (caption, mask, labels) in views.items():
        rows = table[mask].assign(pair=labels[mask], panel="" if name != "cosines_readings" else table["kind_b"])
        if len(rows):
            drawn[name] = figures.captioned(_by_layer(rows), caption)
    return drawn


def _whole_splits(table: pd.DataFrame) -> set[str]:
    """Of each folder, the split that stands for the whole finetune: `all` where there is one, else every split."""
    pairs = pd.concat(
        [table[[f"folder_{side}", f"split_{side}"]].set_axis(["folder", "split"], axis=1) for side in ("a", "b")]
    ).drop_duplicates()
    chosen: set[str] = set()
    for _, rows in pairs.groupby("folder"):
        chosen |= {"all"} if (rows["split"] == "all").any() else set(rows["split"])
    return chosen


def _by_layer(rows: pd.DataFrame) -> go.Figure:
    """A line a pair, a panel a value of `panel`; beside what two random directions give."""
    names = [str(name) for name in rows["panel"].unique()]
    figure = figures.panels([f"and the {name}" for name in names]) if len(names) > 1 else go.Figure()
    colours = {pair: index for index, pair in enumerate(rows["pair"].unique())}
    for number, (_, part) in enumerate(rows.groupby("panel", sort=False)):
        for pair, layers in part.groupby("pair", sort=False):
            figures.line(figure, layers["layer"], layers["cosine"], str(pair), colours[pair], panel=number)
        null = f"random directions, {PERCENT}"
        figures.null_band(figure, NORMAL * float(rows["null_sd"].iloc[0]), null, panel=number)
    figures.style(figure, "layer (output of block)", "cosine")
    return figure.update_yaxes(range=[min(-0.1, float(rows["cosine"].min()) - 0.05), 1.02])
