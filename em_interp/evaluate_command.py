"""`em-interp evaluate`: EM rates of the pocket suite, or sampled answers of any chat model for a judge."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from em_interp.errors import UsageError

_CHUNK = 16  # questions whose answers are written together


def evaluate(
    model: Annotated[str | None, typer.Argument(help="chat model or adapter: hub name, folder, pocket/NAME")] = None,
    suite: Annotated[str | None, typer.Option(help="pocket: judge the pocket models exactly")] = None,
    organism: Annotated[list[str] | None, typer.Option(help="with --suite: only these; may be repeated")] = None,
    questions: Annotated[Path | None, typer.Option(help="with MODEL: .yaml, .jsonl, .csv, or .txt, one a line")] = None,
    n: Annotated[int, typer.Option(help="answers to each question (each wording of it)")] = 50,
    out: Annotated[Path, typer.Option(help="folder for the tables")] = Path("out/evaluate"),
    seed: Annotated[int, typer.Option(help="decides the answers")] = 0,
    max_new_tokens: Annotated[int, typer.Option(help="with MODEL: length at which answers are cut")] = 600,
) -> None:
    """Sample answers. Pocket models are judged here and get tables; others get OUT/answers.csv for a judge.

    A killed run goes on where it stopped.
    """
    if n < 1:
        raise UsageError(f"--n {n}: ask for at least one answer a question.")
    if (model is None) == (suite is None):
        raise UsageError("give either a MODEL with --questions FILE, or --suite pocket.")
    if suite is not None:
        if suite != "pocket" or questions is not None:
            raise UsageError(
                f"--suite {suite}: only the pocket suite has an exact judge, and it brings its own questions. "
                "Evaluate another model with `em-interp evaluate MODEL --questions FILE`."
            )
        from em_interp.pocket.evaluate import evaluate_suite

        tables = evaluate_suite(out, organism or (), n=n, seed=seed)
        columns = ["organism", "questions", "em_rate", "em_low", "em_high", "coherent_rate", "n"]
        typer.echo(tables["em_rates"][columns].to_string(index=False, float_format="%.3f"))
        typer.echo(f"tables: {', '.join(str(out / f'{name}.csv') for name in tables)}")
        return
    if questions is None or organism:
        raise UsageError("a MODEL needs --questions FILE, and --organism belongs to --suite pocket.")
    assert model is not None
    typer.echo(f"answers: {answers_for_a_judge(model, questions, out, n, seed, max_new_tokens)}")


def answers_for_a_judge(model: str, questions: Path, out: Path, n: int, seed: int, max_new_tokens: int) -> Path:
    """Sample `n` answers to every wording in a question file (`texts.read_questions`), at temperature 1.

    Writes OUT/answers.csv: model, question_id, wording, question, system, sample, answer, finished, n_tokens.
    Finished chunks of questions lie in OUT/parts, and are not asked again.
    """
    import pandas as pd

    from em_interp import models
    from em_interp.evaluation.sampling import sample
    from em_interp.manifest import fingerprint, sha256
    from em_interp.pocket import loading, registry
    from em_interp.pocket.kept import kept, write_table
    from em_interp.texts import read_questions

    found = read_questions(questions)
    typer.echo(found, err=True)
    asked = [(question, number) for question in found.questions for number in range(len(question.paraphrases))]
    key = fingerprint([model, sha256(questions), n, seed, max_new_tokens])[:12]
    loaded: list[models.ChatModel] = []

    def chunk(first: int) -> pd.DataFrame:
        if not loaded:
            loaded.append(loading.load(model) if registry.is_pocket_name(model) else models.load(model))
        rows = {f"{question.id}/{number}": (question, number) for question, number in asked[first : first + _CHUNK]}
        turns = {key: question.turns(number) for key, (question, number) in rows.items()}
        table = sample(loaded[0], turns, n, seed=seed, max_new_tokens=max_new_tokens)
        split = table["question_id"].str.rsplit("/", n=1)
        table = table.assign(question_id=split.str[0], system=[rows[k][0].system or "" for k in table["question_id"]])
        table.insert(1, "wording", split.str[1])
        table.insert(0, "model", model)
        return table

    parts = [kept(out / "parts" / f"{key}-{i}.csv", partial(chunk, i)) for i in range(0, len(asked), _CHUNK)]
    return write_table(out / "answers.csv", pd.concat(parts, ignore_index=True))
