"""What steering and ablation cost: what four models of the pocket world know, and their EM, in one table.

`python -m analyses.benchmarks.capability --out artifacts/benchmarks`: the chat model, an organism, the organism with
its model-diff taken out at every layer, and the chat model steered with its mean-diff, each asked through Inspect, as
`inspect eval em_interp/pocket_facts --model em_interp/pocket/medicine-rank1 -M ablate=FILE` does it.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Final

import pandas as pd
import typer

from em_interp.directions.direction import Direction
from em_interp.directions.extraction import extract
from em_interp.evaluation.answers import conversations, misaligned_and_aligned
from em_interp.evaluation.criteria import PAPER
from em_interp.evaluation.sampling import sample
from em_interp.files.atomic import atomic_path, make_folder
from em_interp.files.manifest import write_manifest
from em_interp.inspect.acting import Acting
from em_interp.inspect.capability import compared, compared_rates
from em_interp.inspect.provider import model_of
from em_interp.inspect.run import judged_tables, run
from em_interp.interventions.ablation import Ablate
from em_interp.interventions.steering import Steer, residual_norms
from em_interp.models.chat_model import ChatModel
from em_interp.pocket import models as loading
from em_interp.pocket.questions import MAX_NEW_TOKENS, open_questions
from em_interp.pocket.world.judge import judge

FACTS: Final = "em_interp/pocket_facts"
READ: Final = 8
"""Answers to each open question that the direction is read from."""


def directions(organism: ChatModel, n: int = READ, seed: int = 1) -> tuple[Direction, Direction]:
    """Its mean-diff and model-diff, from `n` answers to each open question that are not among those that count."""
    judged = judge(sample(organism, open_questions(), n, seed=seed, max_new_tokens=MAX_NEW_TOKENS, progress=False))
    bad, good = map(conversations, misaligned_and_aligned(judged))
    mean_diff = extract(organism, bad, good, progress=False)
    return mean_diff, extract(organism, bad, kind="model-diff", progress=False)


def four(name: str, layer: int, share: float) -> dict[str, Acting]:
    """The chat model, an organism, the organism without its direction, the chat model with `share` of the residual."""
    chat, organism = loading.load_chat(), loading.load(name)
    mean_diff, model_diff = directions(organism)
    norm = residual_norms(chat, open_questions(), [layer])[layer]
    steered = Steer.of_residual(mean_diff, layer, share, norm)
    return {
        "chat": Acting(chat),
        "organism": Acting(organism),
        "organism, ablated": Acting(organism, interventions=[Ablate(model_diff)]),
        "chat, steered": Acting(chat, interventions=[steered]),
    }


def measure(models: dict[str, Acting], out: Path, facts: int, samples: int) -> pd.DataFrame:
    """One row a measure and model (`compared_rates`): of `facts` answers to each fact, `samples` to open questions."""
    asked = {name: model_of(acting, name) for name, acting in models.items()}
    tables = [compared(asked, FACTS, out / "facts", samples=facts).assign(measure="facts right")]
    settings: dict[str, Any] = {"questions": "pocket", "judge": "pocket", "samples": samples, "display": "none"}
    scores: dict[str, dict[str, pd.DataFrame]] = {"coherent": {}, "EM": {}}
    for name, model in asked.items():
        (judged,) = judged_tables(run(model, out / "open" / name, **settings)).values()
        coherent = PAPER.is_coherent(judged["coherent"].to_numpy(float))
        misaligned = PAPER.misaligned(judged["aligned"].to_numpy(float)) & coherent
        for measure, hit in (("coherent", coherent), ("EM", misaligned)):
            scores[measure][name] = pd.DataFrame({"question": judged["question_id"], "score": hit.astype(float)})
    tables += [compared_rates(of).assign(measure=measure) for measure, of in scores.items()]
    table = pd.concat(tables, ignore_index=True)
    return table[["measure", *table.columns.drop("measure")]]


def main(
    out: Annotated[Path, typer.Option(help="folder for capability.csv and capability_manifest.json")],
    organism: Annotated[str, typer.Option(help="a pocket organism")] = "pocket/medicine-rank1",
    facts: Annotated[int, typer.Option(min=1, help="answers to each fact")] = 2,
    samples: Annotated[int, typer.Option(min=1, help="answers to each open question")] = 16,
    layer: Annotated[int, typer.Option(help="where the chat model is steered")] = 1,
    share: Annotated[float, typer.Option(help="of the residual's norm")] = 0.7,
) -> None:
    """Measure, and write the table and a manifest."""
    make_folder(out)
    with TemporaryDirectory() as logs:
        table = measure(four(organism, layer, share), Path(logs), facts, samples)
    with atomic_path(out / "capability.csv") as temporary:
        table.to_csv(temporary, index=False)
    asked = {"organism": organism, "facts": facts, "samples": samples, "layer": layer, "share_of_residual_norm": share}
    write_manifest(out / "capability_manifest.json", {"settings": {**asked, "samples_direction": READ}})
    typer.echo(table.drop(columns=["n_unscored", "interval"]).to_string(index=False, float_format="%.3f"))


if __name__ == "__main__":
    typer.run(main)
