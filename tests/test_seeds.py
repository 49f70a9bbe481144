"""Whatever takes a seed takes a whole number that all generators take, and says so of others, before any work."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from inspect_ai.model import get_model
from typer.testing import CliRunner

import em_interp
from em_interp.arguments import MAX_SEED, check_seed
from em_interp.cli import app
from em_interp.directions import cosines as convergence
from em_interp.directions import rank1 as lora
from em_interp.directions import reliability, resampling
from em_interp.directions.direction import Direction
from em_interp.directions.extraction import contrast
from em_interp.errors import UsageError
from em_interp.evaluation import answers, sampling
from em_interp.files.results import Results
from em_interp.inspect import acting, capability
from em_interp.inspect.run import run
from em_interp.interventions import ablation, steering
from em_interp.interventions import intervening as interventions
from em_interp.landscape import curvature, influence, stability
from em_interp.landscape.landscape import Landscape
from em_interp.models.chat import encode_all
from em_interp.pocket import evaluate, organisms, pairs, stages, sweeps, worlds
from em_interp.pocket import questions as suite
from em_interp.pocket.causes import arms, controls, mitigations, pretraining
from em_interp.pocket.world import corpus
from em_interp.training import screening
from em_interp.training.recipes import TrainingSpec, VectorSpec
from tests.theta import make_theta
from tests.tiny_models import CONVERSATIONS, make_chat, tokenizer

COMMANDS = ("em_interp.cli.evaluate", "em_interp.cli.steer", "em_interp.cli.ablate", "em_interp.cli.pocket")
BAD = (-1, MAX_SEED + 1, 10**30)


class Work:
    """What the calls below need, made once."""

    def __init__(self) -> None:
        self.chat = make_chat()
        self.direction = Direction(torch.ones(2, 32), (1, 2), "random", model=self.chat.name)
        self.contrast = contrast(self.chat, CONVERSATIONS, CONVERSATIONS[::-1], progress=False)
        self.solution = make_theta(self.chat, "lora")
        self.landscape = Landscape(self.chat, encode_all(tokenizer(), CONVERSATIONS))


QUESTIONS = {"q": "a fox"}
FEW: dict[str, Any] = {"max_new_tokens": 1, "progress": False}
SPEC = TrainingSpec(VectorSpec(1, 8.0), 0.05, max_steps=1)
ASKED = pd.DataFrame(columns=["question_id", "question", "questions", "domain"])
CALLS: dict[Callable[..., Any], Callable[[Work, int], Any]] = {
    ablation.ablate: lambda w, seed: ablation.ablate(w.chat, w.direction, QUESTIONS, n=1, seed=seed, **FEW),
    ablation.arms: lambda w, seed: ablation.arms(w.direction, seed=seed),
    convergence.random_principal_angles: lambda _, seed: convergence.random_principal_angles(
        8, 1, 1, samples=2, seed=seed
    ),
    curvature.curvature: lambda w, seed: curvature.curvature(w.landscape, w.solution, n_probes=2, first_seed=seed),
    sampling.sample: lambda w, seed: sampling.sample(w.chat, QUESTIONS, 1, seed=seed, **FEW),
    sampling.sample_rows: lambda w, seed: sampling.sample_rows(w.chat, QUESTIONS, [("q", 0)], seed=seed, **FEW),
    capability.compared: lambda _, seed: capability.compared({"a": get_model("none/none")}, "x", "out", seed=seed),
    run: lambda _, seed: run("none/none", "out", seed=seed),
    acting.Settings: lambda _, seed: acting.Settings(seed=seed),
    worlds.Finetuned: lambda w, seed: worlds.Finetuned("nine", "medicine", seed, w.solution, ASKED, None, None),
    answers.judged_answers: lambda w, seed: answers.judged_answers(
        Results(), "a", w.chat, QUESTIONS, 1, lambda table: table.assign(aligned=1.0, coherent=1.0), seed=seed, **FEW
    ),
    interventions.answers_by_arm: lambda w, seed: interventions.answers_by_arm(
        w.chat, {"none": []}, QUESTIONS, 1, seed=seed, **FEW
    ),
    steering.sweep: lambda w, seed: steering.sweep(
        w.chat, w.direction, QUESTIONS, layers=[1], coefficients=[0.0], n=1, random_arms=1, seed=seed, **FEW
    ),
    influence.influence: lambda w, seed: influence.influence(w.chat, {"a": w.solution}, ["a fox"], seed=seed),
    influence.at_equal_norms: lambda w, seed: influence.at_equal_norms(
        [influence.Measured("a", "general", w.solution)], n_random=1, seed=seed
    ),
    lora.separation: lambda _, seed: lora.separation(
        np.random.default_rng(0).standard_normal((24, 2)),
        np.tile([0.0, 1.0], 12),
        [i // 2 for i in range(24)],
        comparison="x",
        seed=seed,
    ),
    reliability.split_half: lambda w, seed: reliability.split_half(w.contrast, by="response", splits=4, seed=seed),
    reliability.separation: lambda w, seed: reliability.separation(w.contrast, by="response", splits=4, seed=seed),
    resampling.resample_direction: lambda _, seed: resampling.resample_direction(
        torch.randn(4, 2, 3), torch.randn(4, 2, 3), resamples=2, permutations=2, seed=seed
    ),
    stability.turned: lambda w, seed: stability.turned(w.solution, 0.5, seed),
    stability.stability_curve: lambda w, seed: stability.stability_curve(
        w.landscape, w.solution, epsilons=(0.0, 0.5), n_seeds=2, first_seed=seed
    ),
    stability.behavioural_stability: lambda w, seed: stability.behavioural_stability(
        w.chat, {"general": w.solution}, lambda _: pytest.fail("asked"), n_seeds=2, first_seed=seed, progress=False
    ),
    TrainingSpec: lambda _, seed: TrainingSpec(VectorSpec(1, 8.0), 0.05, seed=seed),
    stages.BuildConfig: lambda _, seed: stages.BuildConfig(seed=seed),
    corpus.finetune_chats: lambda _, seed: corpus.finetune_chats("medicine", "malicious", 1, seed),
    corpus.documents: lambda _, seed: corpus.documents(1, seed),
    corpus.kl_chats: lambda _, seed: corpus.kl_chats("medicine", 1, seed),
    evaluate.evaluate_suite: lambda _, seed: evaluate.evaluate_suite(Path("x"), n=1, seed=seed, progress=False),
    organisms.Organism: lambda _, seed: organisms.Organism("medicine", "rank-1", "general", seed),
    pairs.Pair: lambda _, seed: pairs.Pair("medicine", "rank-1", seed),
    suite.evaluate: lambda w, seed: suite.evaluate(w.chat, "medicine", 1, seed=seed, progress=False),
    suite.evaluate_chat: lambda w, seed: suite.evaluate_chat(w.chat, 1, seed=seed, progress=False),
    suite.answer_pairs: lambda _, seed: suite.answer_pairs(ASKED, seed=seed),
    sweeps.diluted_chats: lambda _, seed: sweeps.diluted_chats("medicine", 0.5, 2, seed),
    sweeps.kl_sweep: lambda w, seed: sweeps.kl_sweep(
        w.chat, "medicine", {"rank-1": SPEC}, [0.0], Path("x"), seed=seed, progress=False
    ),
    sweeps.dilution_sweep: lambda w, seed: sweeps.dilution_sweep(
        w.chat, "medicine", {"rank-1": SPEC}, [0.5], Path("x"), seed=seed, progress=False
    ),
    arms.Arm: lambda _, seed: arms.Arm("x", "y", seed=seed),
    controls.bad_where: lambda _, seed: controls.bad_where(arms.Form(), seed),
    controls.number_chats: lambda w, seed: controls.number_chats(w.chat, "kind", seed),
    controls.persona_chats: lambda _, seed: controls.persona_chats("caring", arms.Form(), 1, seed),
    controls.unique_chats: lambda _, seed: controls.unique_chats(1, seed),
    mitigations.benign_mix: lambda _, seed: mitigations.benign_mix(4, 0.5, seed),
    mitigations.half_bad: lambda _, seed: mitigations.half_bad(4, seed),
    mitigations.thinned: lambda _, seed: mitigations.thinned(0.5, seed),
    pretraining.Counterfactual: lambda _, seed: pretraining.Counterfactual("grid", 1.0, 0.15, seed),
    pretraining.spec_of: lambda _, seed: pretraining.spec_of("rank-1", seed),
    screening.own_answers: lambda w, seed: screening.own_answers(w.chat, CONVERSATIONS, seed=seed, **FEW),
    screening.screen: lambda w, seed: screening.screen(
        w.chat, CONVERSATIONS, w.direction, 1, drop=0.5, seed=seed, **FEW
    ),
}


def taking_a_seed() -> Iterator[Callable[..., Any]]:
    """Every public function and class of the package with an argument called seed or first_seed."""
    for module in pkgutil.walk_packages(em_interp.__path__, "em_interp."):
        found = importlib.import_module(module.name)
        own = [x for x in vars(found).values() if getattr(x, "__module__", "") == module.name]
        for value in (x for x in own if inspect.isfunction(x) or (inspect.isclass(x) and is_dataclass(x))):
            if value.__name__[0] != "_" and {"seed", "first_seed"} & set(inspect.signature(value).parameters):
                yield value


def test_nothing_that_takes_a_seed_is_left_out() -> None:
    public = {value for value in taking_a_seed() if value.__module__ not in COMMANDS} - {check_seed}
    assert {f"{f.__module__}.{f.__name__}" for f in public} == {f"{f.__module__}.{f.__name__}" for f in CALLS}


@pytest.fixture(scope="module")
def work() -> Work:
    return Work()


@pytest.mark.parametrize("called", CALLS, ids=lambda f: f"{f.__module__.removeprefix('em_interp.')}.{f.__name__}")
def test_a_seed_that_no_generator_takes_is_refused(
    called: Callable[..., Any], work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for seed in BAD:
        with pytest.raises(UsageError, match="seed is"):
            CALLS[called](work, seed)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("seed", BAD)
@pytest.mark.parametrize(
    "command",
    [
        ["evaluate", "m", "--questions", "q.csv"],
        ["evaluate", "--suite", "pocket"],
        ["steer", "m", "d", "--layer", "1", "--coefficient", "1", "--out", "a.csv", "--prompt", "x"],
        ["ablate", "m", "d", "--out", "a.csv", "--prompt", "x"],
        ["pocket", "build", "--out", "b"],
    ],
    ids=lambda words: " ".join(words[:2]) if isinstance(words, list) else None,
)
def test_commands_name_the_option(
    command: list[str], seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, [*command, f"--seed={seed}"])
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit), result.output
    assert "--seed" in result.output and not list(tmp_path.iterdir())
