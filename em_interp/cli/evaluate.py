"""`em-interp evaluate`: EM rates of the pocket suite, or sampled answers of any chat model for a judge."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from em_interp.cli import judging, options
from em_interp.cli.evaluate_judged import by_inspect, evaluate_judged, safe_name
from em_interp.errors import UsageError

ROOT = Path("out/evaluate")


def evaluate(
    model: options.Model = None,
    named: options.NamedModel = None,
    suite: Annotated[str | None, options.takes("suite", "pocket, whose models are judged exactly")] = None,
    only: Annotated[list[str] | None, options.takes("only", "names of organisms of the suite")] = None,
    questions: options.QuestionFile = None,
    n: options.Samples = 50,
    out: Annotated[
        Path | None, options.takes("out", "a folder, by default out/evaluate/ and the name of suite or model")
    ] = None,
    seed: options.Seed = 0,
    max_new_tokens: options.NewTokens = 600,
    judge: judging.JudgeNames = None,
    prompts: Annotated[
        Path | None, typer.Option(help="judges.yaml: what judges are asked, in place of our own words")
    ] = None,
    price: Annotated[
        str | None, typer.Option(help="READ:WRITTEN, what a judge costs in dollars for a million tokens")
    ] = None,
    budget: Annotated[float | None, typer.Option(min=0, help="most dollars that judging may cost")] = None,
    adapter: options.Adapter = None,
    base: options.Base = None,
    any_base: options.AnyBase = False,
    device_map: options.DeviceMap = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    tokens_per_batch: options.BatchTokens = 65_536,
    force: options.Force = False,
) -> None:
    """Sample answers for a judge, or judge the pocket suite's.

    The pocket suite gets tables; answers of another MODEL go to OUT/answers.csv. --judge pocket brings open questions
    of its own. With --judge, OUT/judged.csv has the scores, and OUT/judged-rates.csv and .html what they say; else have
    the file judged, and give it to `em-interp rates`. A judge may be a model of Inspect's, such as openai/gpt-4o (the
    extra eval), or local:MODEL; --questions may then name our own: open, medical, finance,
    sport, technical. A killed run goes on where it stopped, and a finished one is not repeated. --questions,
    --max-new-tokens, --judge, --adapter and --base belong to MODEL.
    """

    from em_interp.files.texts import read_questions

    if n < 1:
        raise UsageError(f"--n {n}: ask for at least one answer a question.")
    if (model is None and named is None) == (suite is None):
        raise UsageError("give either a MODEL with --questions FILE, or --suite pocket.")
    judges = [name.strip() for name in (judge or "").split(",") if name.strip()]
    if suite is not None:
        if suite != "pocket" or any((questions, judge, adapter, base, any_base)):
            raise UsageError(
                f"--suite {suite}: only the pocket suite has an exact judge, and brings models and questions. "
                "Evaluate another model with `em-interp evaluate MODEL --questions FILE`."
            )
        _evaluate_suite(out or ROOT / suite, tuple(only or ()), n, seed, force, options.loading(device_map, dtype))
        return
    modelled = by_inspect(judges)
    if only or (questions is None and not modelled and judges != ["pocket"]):
        raise UsageError("a MODEL needs --questions FILE, and --only belongs to --suite pocket.")
    chosen = options.ModelChoice(options.model_of(model, named), adapter, base, any_base, device_map, dtype)
    settings = {"n": n, "seed": seed, "max_new_tokens": max_new_tokens, "tokens_per_batch": tokens_per_batch}
    if modelled:
        where = out or ROOT / f"{chosen.label}-{'-'.join(map(safe_name, judges))}"
        said = None if questions is None else str(questions)
        evaluate_judged(chosen, said, judges, where, settings, prompts=prompts, price=price, budget=budget, force=force)
        return
    if prompts is not None or price is not None or budget is not None:
        raise UsageError("--prompts, --price and --budget belong to a judge that is a model, such as openai/gpt-4o.")
    name = judges[0] if judges else None
    ends = judging.Judging.of(name, Path("judged.csv"), [*filter(None, [questions]), *chosen.folders()])
    asked = _open_questions() if questions is None else read_questions(questions)
    ends.check(asked.asked())
    answers = answers_for_a_judge(chosen, asked, out, settings, force=force)
    typer.echo(f"answers: {answers}")
    if name is None:
        typer.echo(judging.next_step(answers, answers.with_name("rates.csv")))
    else:
        _judge(answers, replace(ends, out=answers.with_name("judged.csv")), force)


def _open_questions() -> Any:
    """Those that the pocket judge is for, where no others are asked: a `QuestionSet`."""
    from em_interp.files.texts import Question, QuestionSet
    from em_interp.pocket import open_questions

    return QuestionSet(Path("pocket"), tuple(Question(key, (text,)) for key, text in open_questions().items()))


def _judge(answers: Path, ends: judging.Judging, force: bool) -> None:
    """Have answers judged, unless this judge has judged these already, and say what they hold."""
    from em_interp.evaluation.answers import judge_name
    from em_interp.evaluation.judges import judged
    from em_interp.files.atomic import claim_output
    from em_interp.files.manifest import sha256, write_manifest
    from em_interp.files.results import read_table, write_table

    manifest = _manifest(answers.parent)
    before, made_by = manifest.get("judged", {}), [sha256(answers), judge_name(ends.judge)]
    if before.get("made_by") == made_by and ends.out.is_file() and sha256(ends.out) == before.get("sha256"):
        table = read_table(ends.out)
    else:
        claim_output(ends.out, inputs=ends.inputs, force=force)
        table = judged(read_table(answers), ends.judge)
        write_table(ends.out, table)
        told = {"judged": {"made_by": made_by, "sha256": sha256(ends.out)}}
        write_manifest(answers.with_name("manifest.json"), {**manifest, **told})
    ends.tell(table)


def _evaluate_suite(
    out: Path, organisms: tuple[str, ...], n: int, seed: int, force: bool, placed: dict[str, Any]
) -> None:
    from em_interp.errors import OutputError
    from em_interp.files.atomic import claim_output, sole_writer
    from em_interp.pocket import registry
    from em_interp.pocket.evaluate import available, evaluate_suite

    names = {registry.PREFIX + name.removeprefix(registry.PREFIX) for name in organisms} or set(available())
    claim_output(out / "em_rates.csv", force=True)
    before = _manifest(out)
    then = (set(before.get("weights", ())), before.get("samples"), before.get("seed"), before.get("dtype", "auto"))
    same = then == (names, n, seed, placed.get("dtype", "auto"))
    if not force and not same and (out / "em_rates.csv").exists():
        raise OutputError(f"{out}: holds an evaluation of other settings. Choose another --out, or pass --force.")
    with sole_writer(out):
        tables = evaluate_suite(out, organisms, n=n, seed=seed, **placed)
    columns = ["organism", "questions", "em_rate", "em_low", "em_high", "coherent_rate", "n"]
    typer.echo(tables["em_rates"][columns].to_string(index=False, float_format="%.3f"))
    typer.echo(f"tables: {', '.join(str(out / f'{name}.csv') for name in tables)}")


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "manifest.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def answers_for_a_judge(
    chosen: options.ModelChoice,
    questions: Any,
    out: Path | None,
    settings: Mapping[str, Any],
    *,
    force: bool = False,
) -> Path:
    """Sample answers to every wording of the questions (a `QuestionSet`), at temperature 1.

    settings: n, seed, max_new_tokens, tokens_per_batch. out: by default a folder below `ROOT` named after the model and
    a hash of its files. Writes OUT/answers.csv (model, adapter, question_id, wording, question, system, sample, answer,
    finished, n_tokens) and OUT/manifest.json.
    """

    from em_interp.evaluation.sampling import sample
    from em_interp.files.manifest import code_hash, fingerprint, sha256, write_manifest
    from em_interp.files.results import write_table
    from em_interp.files.tables import Parts, claimed, remove_parts, say_kept

    typer.echo(questions, err=True)
    every = [(q, number) for q in questions.questions for number in range(len(q.paraphrases))]
    asked = {f"{q.id}/{number}": q.turns(number) for q, number in every}
    system = {f"{q.id}/{number}": q.system or "" for q, number in every}
    weights = chosen.weights()
    path = questions.path if questions.path.is_file() else None
    made_of = fingerprint(asked) if path is None else sha256(path)
    made_by = {"weights": weights, "dtype": chosen.dtype, "questions": made_of, **settings}
    out = out or ROOT / f"{chosen.label}-{fingerprint(weights)[:8]}"
    answers, key = out / "answers.csv", fingerprint([made_by, code_hash()])
    before = _manifest(out)
    if before.get("key") == key and answers.is_file() and sha256(answers) == before.get("answers_sha256"):
        say_kept(len(asked) * settings["n"], len(asked) * settings["n"], "answers")
        remove_parts(answers)
        return answers
    inputs = [path, *chosen.folders()]
    with claimed(answers, key, inputs=inputs, force=force, endings=(".csv",)) as folder:
        chat = chosen.load()
        table = sample(chat, asked, **settings, parts=Parts(folder))
        split = table["question_id"].str.rsplit("/", n=1)
        table = table.assign(question_id=split.str[0], system=table["question_id"].map(system))
        table.insert(1, "wording", split.str[1])
        table.insert(0, "model", chosen.model)
        table.insert(1, "adapter", chosen.adapter or "")
        write_table(answers, table)
        content = {"model": chosen.model, **made_by, "key": key, "answers_sha256": sha256(answers)}
        write_manifest(out / "manifest.json", content)
    return answers
