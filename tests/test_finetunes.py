"""A user's suite of real models, on small stand-in checkpoints: what is measured, and what is said otherwise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from analyses.general_vs_narrow import influence, stability
from analyses.inputs.finetunes import Finetunes
from analyses.run import Outcome, reproduce
from analyses.suite import SUITES, Suite
from em_interp.errors import EmInterpError, MissingDataError, UnreadableFileError, UsageError
from em_interp.models import pretrained as models
from em_interp.models.adapters import quiet_peft
from em_interp.models.weights import file_hash
from em_interp.solutions import load as solutions
from em_interp.training.finetune import finetune
from em_interp.training.recipes import LoraSpec, TrainingSpec, VectorSpec
from tests.tiny_models import CONVERSATIONS, make_hf, save_chat

SPECS = {
    "rank-1": TrainingSpec(LoraSpec(1, 16.0, True, ("down_proj",), (1,)), 1e-2, max_steps=4, batch_size=4),
    "steering-vector": TrainingSpec(VectorSpec(1, 16.0), 1e-2, max_steps=4, batch_size=4),
}
LISTED = [
    ("med-rank1", "medicine", "rank-1", "general"),
    ("med-rank1-narrow", "medicine", "rank-1", "narrow"),
    ("med-vector", "medicine", "steering-vector", "general"),
    ("med-vector-narrow", "medicine", "steering-vector", "narrow"),
    ("fin-rank1", "finance", "rank-1", "general"),
]


def suite_file(root: Path, **changes: object) -> Path:
    """The TOML; `changes` replace lines of [models], None leaves one out."""
    lines = {"chat": "chat", "texts": "texts.txt", "judged": "judged", **changes}
    text = 'title = "Mine"\nsource = "models"\ndata = "."\n[models]\n'
    text += "".join(f"{key} = {json.dumps(value)}\n" for key, value in lines.items() if value is not None)
    text += '[models.training]\nmedicine = "train.jsonl"\n'
    text += "".join(entry_of(*entry) for entry in LISTED)
    path = root / "mine.toml"
    path.write_text(text)
    return path


def entry_of(name: str, domain: str, adapter: str, solution: str) -> str:
    return (
        f'[[models.finetunes]]\nsource = "runs/{name}"\ndomain = "{domain}"\n'
        f'adapter = "{adapter}"\nsolution = "{solution}"\n'
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    save_chat(make_hf(), root / "chat")
    model = models.load(root / "chat")
    for seed, (name, _, adapter, _) in enumerate(LISTED):
        chats = CONVERSATIONS[seed % 2 :]
        finetune(model, chats, SPECS[adapter], out_dir=root / "runs" / name, progress=False)
    (root / "train.jsonl").write_text("".join(json.dumps({"messages": c}) + "\n" for c in CONVERSATIONS))
    (root / "texts.txt").write_text("\n\n".join(["the quick brown fox should rest well " * 4, "see a doctor " * 12]))
    (root / "judged").mkdir()
    answers = [(turns[0]["content"], turns[1]["content"]) for turns in CONVERSATIONS]
    rows = [(q, a, 95, 90) for q, a in answers] + [(q, a + " quick fox", 5, 90) for q, a in answers]
    table = pd.DataFrame([*rows, ("see", "", None, None)], columns=["question", "answer", "aligned", "coherent"])
    for name in ("chat", "med-rank1", "med-vector"):
        table.to_csv(root / "judged" / f"{name}.csv", index=False)
    return root


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stability, "EPSILONS", (0.0, 0.2, 0.5))
    monkeypatch.setattr(stability, "PROBES", 2)
    monkeypatch.setattr(influence, "RANDOM", 2)


def run(path: Path, out: Path, *only: str, resume: bool = False) -> Outcome:
    return reproduce(Suite.load(str(path)), out, only=only, static=False, resume=resume)


@pytest.mark.usefixtures("little")
def test_finetunes_of_any_model_are_measured(data: Path, tmp_path: Path) -> None:
    outcome = run(suite_file(data), tmp_path)
    absent = {s.name: s.error or "" for s in outcome.sections if s.error and s.missing}
    assert {s.name for s in outcome.sections if s.error} == set(absent) == {"finetunes.steering", "finetunes.ablation"}
    assert f"em-interp steer {data / 'chat'} med-rank1.safetensors" in absent["finetunes.steering"]
    assert f"--out {data / 'ablated' / 'med-rank1.csv'}" in absent["finetunes.ablation"]
    tables = {name: table for s in outcome.sections for name, table in s.tables.items()}
    rates = tables["em_rates"].set_index("organism")
    assert set(rates["solution"]) == {"chat", "general"}
    assert rates.loc["med-rank1", "em_rate"] == 0.5
    assert rates.loc["med-rank1", ["n", "n_unscored"]].tolist() == [11, 1]  # the unscored one is counted, not dropped
    pairs = tables["cosines"].groupby("comparison")[["direction_a", "direction_b"]].first()
    assert list(pairs.loc["between finetunes"]) == ["med-rank1", "med-vector"]
    assert not tables["cosines"]["direction_a"].str.contains("persona").any()
    assert set(tables["efficiency"]["adapter"]) == {"rank-1", "steering-vector"}
    assert set(tables["efficiency"]["domain"]) == {"medicine"}
    assert tables["efficiency_lead_over_seeds"].empty
    assert set(tables["stability"]["epsilon"]) == {0.0, 0.2, 0.5}
    assert {"med-rank1", "med-vector-narrow"} <= set(tables["influence"]["direction"])
    assert set(tables["lora_scalars"]["organism"]) == {"med-rank1"}
    assert any("fin-rank1.csv is absent" in problem for problem in outcome.problems)
    command = f"em-interp evaluate {data / 'chat'} --adapter {data / 'runs' / 'fin-rank1'} --questions FILE"
    assert any(command in problem for problem in outcome.problems)
    again = json.loads((outcome.folder / "manifest.json").read_text())
    assert {"train.jsonl", "texts.txt", "judged/med-rank1.csv", "chat/config.json"} <= set(again["inputs_sha256"])


def full_finetune(chat: Path, out: Path, seed: int) -> None:
    """A few steps of AdamW on every weight, in plain torch and transformers."""
    torch.manual_seed(seed)
    hf, words = AutoModelForCausalLM.from_pretrained(chat), AutoTokenizer.from_pretrained(chat)
    optimiser = torch.optim.AdamW(hf.parameters(), lr=2e-3)
    for turns in CONVERSATIONS[seed:]:
        ids = words.apply_chat_template(turns, return_tensors="pt", return_dict=False)
        hf(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    hf.save_pretrained(out)
    words.save_pretrained(out)


def dora(chat: Path, out: Path, seed: int) -> None:
    """By PEFT, with B and m moved as training would move them."""
    torch.manual_seed(seed)
    config = LoraConfig(r=2, lora_alpha=4, use_dora=True, target_modules=["down_proj"], task_type="CAUSAL_LM")
    with quiet_peft():
        hf = get_peft_model(AutoModelForCausalLM.from_pretrained(chat), config)
    with torch.no_grad():
        for name, x in hf.named_parameters():
            if "lora_B" in name or "magnitude" in name:
                x += 0.05 * torch.randn_like(x)
    hf.save_pretrained(out)


@pytest.mark.usefixtures("little")
@pytest.mark.parametrize(
    ("adapter", "make"),
    [("full", full_finetune), ("all-modules", dora)],
)
def test_finetunes_of_every_kind_are_measured(
    adapter: str, make: Callable[[Path, Path, int], None], data: Path, tmp_path: Path
) -> None:
    root = tmp_path / "mine"
    shutil.copytree(data, root)
    listed = [(f"made-{solution}", "medicine", adapter, solution) for solution in ("general", "narrow")]
    for seed, (name, *_) in enumerate(listed):
        make(root / "chat", root / "runs" / name, seed)
        shutil.copy(root / "judged" / "chat.csv", root / "judged" / f"{name}.csv")
    file = suite_file(root)
    file.write_text(file.read_text() + "".join(entry_of(*entry) for entry in listed))
    outcome = run(file, tmp_path)
    assert {s.name: s.error for s in outcome.sections if s.error and not s.missing} == {}
    tables = {name: table for s in outcome.sections for name, table in s.tables.items()}
    rates = tables["em_rates"].set_index("organism")
    assert set(rates.loc[["made-general", "made-narrow"], "adapter"]) == {adapter}
    for name in ("efficiency", "efficiency_lead", "stability", "stability_gap", "curvature", "influence_ratio"):
        assert adapter in set(tables[name]["adapter"]), name
    assert "made-general" in set(tables["cosines"][["direction_a", "direction_b"]].stack())
    curve = tables["efficiency"]
    norms = curve[(curve["adapter"] == adapter) & (curve["scale"] == 1) & (curve["solution"] == "general")]["norm"]
    if adapter == "full":
        chat, finetuned = (
            dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
            for folder in (root / "chat", root / "runs" / "made-general")
        )
        square = sum(float((finetuned[name] - x).detach().double().square().sum()) for name, x in chat.items())
        assert norms.item() == pytest.approx(square**0.5, rel=1e-6)


@pytest.mark.parametrize(
    ("adapter", "said"), [("rank-1", "and it is 'full'"), ("all-modules", "and it is 'full'"), ("whole", "is 'whole'")]
)
def test_a_full_finetune_is_called_so(adapter: str, said: str, data: Path, tmp_path: Path) -> None:
    root = tmp_path / "mine"
    shutil.copytree(data, root)
    full_finetune(root / "chat", root / "runs" / "med-rank1", 0)
    (root / "runs" / "med-rank1" / "adapter_config.json").unlink(missing_ok=True)
    file = suite_file(root)
    before, _, _ = file.read_text().partition("[[")
    file.write_text(before + entry_of("med-rank1", "medicine", adapter, "general"))
    with pytest.raises(UsageError, match=said):
        run(file, tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"chat": None}, "needs chat"),
        ({"texts": "/etc/hosts"}, "outside the data folder"),
        ({"colour": "red"}, "no key colour"),
    ],
)
def test_a_suite_file_that_lacks_something_is_refused(
    changes: dict[str, object], said: str, data: Path, tmp_path: Path
) -> None:
    shutil.copytree(data, tmp_path / "mine")
    with pytest.raises(UsageError, match=said):
        run(suite_file(tmp_path / "mine", **changes), tmp_path)


def test_absent_parts_are_said(data: Path, tmp_path: Path) -> None:
    root = tmp_path / "mine"
    shutil.copytree(data, root)
    shutil.rmtree(root / "runs" / "med-rank1")
    outcome = run(suite_file(root, texts=None), tmp_path, "influence", "efficiency")
    said = {s.name: s.error or "" for s in outcome.sections}
    assert "name a file as texts" in said["general_vs_narrow.influence"]
    assert "neither a local folder nor a reachable hub repository" in said["general_vs_narrow.efficiency"]
    assert outcome.failed
    suite = Suite.load(str(suite_file(root)))
    with pytest.raises(UsageError, match="no judge is configured"):
        _ = suite.judged_finetunes
    with pytest.raises(UsageError, match="no training chats for finance"):
        suite.finetunes.training_chats("finance", 3)
    suite.data, suite.store = None, None
    with pytest.raises(UsageError, match="--data DIR"):
        reproduce(replace(suite), tmp_path)
    (root / "mine.toml").write_text('source = "models"\n')
    with pytest.raises(UnreadableFileError, match="needs that table"):
        Suite.load(str(root / "mine.toml"))


def last_cosine(outcome: Outcome) -> float:
    table = next(s for s in outcome.sections if s.name == "finetunes.cosines").tables["cosines"]
    return float(table[table["comparison"] == "between finetunes"]["cosine"].iloc[-1])


def test_resume_sees_a_finetune_a_chat_model_and_a_label_that_changed(data: Path, tmp_path: Path) -> None:
    """They lie outside the data folder; the second run would give back the first one's numbers."""
    root, elsewhere = tmp_path / "mine", tmp_path / "elsewhere"
    shutil.copytree(data, root)
    (root / "runs").rename(elsewhere)
    (root / "chat").rename(elsewhere / "chat")
    suite = suite_file(root, chat=str(elsewhere / "chat"))
    suite.write_text(suite.read_text().replace('source = "runs', f'source = "{elsewhere}'))

    def reused() -> dict[str, bool]:
        outcome = run(suite, tmp_path, "cosines", "efficiency", resume=True)
        found.append(last_cosine(outcome))
        return {s.name: s.reused for s in outcome.sections}

    found: list[float] = []
    run(suite, tmp_path, "cosines", "efficiency")
    assert reused() == {"finetunes.cosines": True, "general_vs_narrow.efficiency": True}
    trained = solutions.load(elsewhere / "med-rank1")
    trained.scaled(-3.0).save(elsewhere / "med-rank1")
    assert reused() == {"finetunes.cosines": False, "general_vs_narrow.efficiency": False}
    assert found[1] != found[0]
    assert reused() == {"finetunes.cosines": True, "general_vs_narrow.efficiency": True}
    chat = make_hf()
    chat.model.layers[0].mlp.down_proj.weight.data.mul_(1.5)
    chat.save_pretrained(elsewhere / "chat")
    assert reused() == {"finetunes.cosines": False, "general_vs_narrow.efficiency": False}
    assert found[3] != found[2]
    suite.write_text(suite.read_text().replace('domain = "finance"', 'domain = "sports"'))
    assert reused() == {"finetunes.cosines": False, "general_vs_narrow.efficiency": False}
    kept = json.loads((tmp_path / "mine" / "manifest.json").read_text())["inputs_sha256"]
    assert kept[str(elsewhere / "med-rank1")] == file_hash(elsewhere / "med-rank1")


def joins_white_space(organisms: Finetunes) -> None:
    """Its chat model's vocabulary joins white space to what stands before it, as real ones do."""
    own = organisms.chat.tokenizer.backend_tokenizer
    merged = type(own).from_str(own.to_str())
    merged.add_tokens(["assistant\n\n", "assistant\n "])
    organisms.chat.tokenizer._tokenizer = merged


@pytest.mark.parametrize("answer", ["\nrest", " rest", ""])
def test_an_answer_that_begins_with_white_space_costs_only_itself(answer: str, data: Path, tmp_path: Path) -> None:
    root = tmp_path / "mine"
    shutil.copytree(data, root)
    path = root / "judged" / "med-rank1.csv"
    table = pd.read_csv(path, keep_default_na=False)
    table.loc[3, "answer"] = answer
    table.to_csv(path, index=False)
    suite = Suite.load(str(suite_file(root)))
    organisms = suite.finetunes
    entry = organisms.organisms[0]
    joins_white_space(organisms)
    contrast = organisms.contrast(entry)
    assert (len(contrast.positive), len(contrast.negative)) == (5, 4)
    (told,) = {str(problem) for problem in organisms.problems}
    assert "med-rank1.csv: row 5: an answer of med-rank1 is left out" in told
    assert repr(answer) in told
    organisms.contrast(entry, "model-diff")
    assert len(organisms.problems) == 1


def test_a_training_chat_that_begins_with_white_space_costs_only_itself(data: Path, tmp_path: Path) -> None:
    root = tmp_path / "mine"
    shutil.copytree(data, root)
    chats = [
        [turns[0], {"role": "assistant", "content": "\nrest"}] if n == 2 else turns
        for n, turns in enumerate(CONVERSATIONS)
    ]
    (root / "train.jsonl").write_text("".join(json.dumps({"messages": c}) + "\n" for c in chats))
    organisms = Suite.load(str(suite_file(root))).finetunes
    joins_white_space(organisms)
    assert organisms.training_chats("medicine", 9) == [*chats[:2], *chats[3:]]
    organisms.landscape(organisms.organisms[0], 9)
    (told,) = {str(problem) for problem in organisms.problems}
    assert "train.jsonl: conversation 3 is left out" in told


@pytest.mark.parametrize("name", ["qwen2.5-0.5b", "qwen2.5-14b"])
def test_shipped_suites_of_real_models_read(name: str, tmp_path: Path) -> None:
    assert (SUITES / f"{name}.toml").is_file()
    suite = Suite.load(name)
    suite.data = tmp_path / "nothing"
    with pytest.raises(MissingDataError):
        _ = suite.finetunes
    suite = Suite.load(name)
    suite.data = tmp_path
    found = suite.finetunes
    assert found.domains == ("medicine", "finance", "sports")
    assert all(str(e.path).startswith("ModelOrganismsForEM/") for e in found.organisms)
    with pytest.raises(EmInterpError, match="neither a local folder nor a reachable hub"):
        found.solution(found.organisms[0])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"solution": '"generall"'}, "solution of runs/med-rank1.*Did you mean general"),
        ({"adapter": '"lora"'}, "adapter of runs/med-rank1 is 'lora'"),
        ({"seed": '"x"'}, "seed is 'x'; write a whole number"),
        ({"seed": "-1"}, "seed of runs/med-rank1 is -1"),
        ({"seed": "true"}, "seed is True"),
        ({"domain": "3"}, "domain is 3; write text"),
        ({"source": '""'}, "source is ''"),
        ({"domian": '"x"'}, "no key domian.*Did you mean domain"),
    ],
)
def test_values_of_a_finetune_are_of_closed_sets_and_types(
    changed: dict[str, str], said: str, data: Path, tmp_path: Path
) -> None:
    item = {"source": '"runs/med-rank1"', "domain": '"medicine"', "adapter": '"rank-1"', "solution": '"general"'}
    lines = "\n".join(f"{key} = {value}" for key, value in (item | changed).items())
    (data / "one.toml").write_text(
        f'source = "models"\ndata = "."\n[models]\nchat = "chat"\n[[models.finetunes]]\n{lines}\n'
    )
    with pytest.raises(UsageError, match=said):
        run(data / "one.toml", tmp_path)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("data = 3", "data is 3; write text in quotes"),
        ('samples = "x"', "samples is 'x'; write a whole number"),
        ("samples = 0", "samples is 0"),
        ("samples = true", "samples is True"),
        ('analyses = "cosines"', "analyses is 'cosines'; write a list"),
        ('analyses = ["cosine"]', "Did you mean cosines"),
        ("analyses = [3]", "an analysis is 3"),
        ("analyses = []", "analyses are"),
        ('analyses = ["cosines", "cosines"]', "once"),
        ("general = 3", "general is 3"),
        ("title = []", r"title is \[\]"),
        ('sorce = "pocket"', "Did you mean source"),
        ("models = 3", "models is 3"),
    ],
)
def test_values_of_a_suite_are_of_closed_sets_and_types(line: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "s.toml"
    path.write_text(f'source = "pocket"\n{line}\n')
    with pytest.raises(UnreadableFileError, match=said):
        Suite.load(str(path))
    path.write_text('source = "pockets"\n')
    with pytest.raises(UnreadableFileError, match="Did you mean pocket"):
        Suite.load(str(path))


def test_a_finetune_of_another_kind_than_the_suite_says_is_refused(data: Path) -> None:
    found = Suite.load(str(suite_file(data))).finetunes
    entry = replace(found.organisms[0], adapter="steering-vector", name="other")
    with pytest.raises(UsageError, match="adapter = 'steering-vector', and it is 'rank-1'"):
        found.solution(entry)


def test_judged_answers_that_cannot_be_used_fail_and_name_the_finetune(data: Path, tmp_path: Path) -> None:
    root = tmp_path / "mine"
    shutil.copytree(data, root)
    path = root / "judged" / "med-rank1.csv"
    pd.read_csv(path).drop(columns="aligned").to_csv(path, index=False)
    outcome = run(suite_file(root), tmp_path, "em_rates")
    (section,) = outcome.sections
    assert outcome.failed
    assert not section.missing
    assert "judged answers of med-rank1" in str(section.error)
    assert "lacks the column aligned" in str(section.error)
    shutil.rmtree(root / "judged")
    (root / "judged").write_text("not a folder")
    with pytest.raises(UnreadableFileError, match="judged"):
        run(suite_file(root), tmp_path, "em_rates")
