"""The public face: what `import em_interp as em` gives, and how little it costs to ask for it."""

from __future__ import annotations

import ast
import io
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pandas as pd
import pytest

import em_interp as em
from em_interp.errors import EmInterpError, UsageError
from em_interp.models.pretrained import adapter_name
from tests.tiny_models import CONVERSATIONS, make_chat

HEAVY = ("torch", "numpy", "pandas", "scipy", "plotly", "transformers", "sklearn", "huggingface_hub")
ISSUE = (
    *("load", "load_solution", "extract", "contrast", "collect", "Direction", "Steer", "Ablate", "intervening"),
    *("sweep", "sample", "em_rates", "finetune", "Landscape", "efficiency", "stability", "influence", "chats"),
    *("figures", "published", "pocket"),
)


@pytest.fixture(scope="module")
def chat():
    return em.load("pocket/chat")


@pytest.fixture(scope="module")
def advice():
    """Bad and good advice on medicine."""
    return [em.pocket.finetune_chats("medicine", persona, 12, 0) for persona in ("malicious", "caring")]


def said(code):
    """What a fresh Python prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("package", ["em_interp", "em_interp.pocket", "em_interp.cli"])
def test_importing_the_face_imports_nothing_heavy(package):
    heavy = HEAVY if package == "em_interp.pocket" else (*HEAVY, "beartype")
    assert said(f"import sys, {package}; dir({package}); print([x for x in {heavy} if x in sys.modules])") == "[]"


@pytest.mark.parametrize("first", ["import em_interp.errors", "import em_interp.cli", "from em_interp import figures"])
def test_every_call_is_checked_whatever_is_imported_first(first):
    refused = "from em_interp.files.texts import Question\ntry: Question(3, ('x',))\nexcept ArgumentTypeError: print(1)"
    assert said(f"{first}\nfrom em_interp.errors import ArgumentTypeError\n{refused}") == "1"


@pytest.mark.parametrize("package", ["em_interp", "em_interp.pocket"])
def test_type_checkers_see_what_is_there(package):
    module = import_module(package)
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {}
    for node in block.body:
        for name in node.names:
            whole = node.module == "em_interp"
            seen[name.asname or name.name] = f"{node.module}.{name.name}" if whole else f"{node.module}:{name.name}"
    assert seen == module.NAMES and list(module.NAMES) == sorted(module.NAMES)
    assert set(module.__all__) - {"EmInterpError", "__version__"} == set(module.NAMES)
    for name, where in module.NAMES.items():
        target, _, attribute = where.partition(":")
        found = import_module(target)
        assert getattr(module, name) is (getattr(found, attribute) if attribute else found)
    assert set(module.NAMES) <= set(dir(module))


def test_the_face_has_what_everyday_work_needs():
    assert set(ISSUE) <= set(em.NAMES) and em.EmInterpError is EmInterpError and em.__version__
    with pytest.raises(AttributeError, match="has no attribute 'extrct'"):
        _ = em.extrct
    assert "EmInterpError" in dir(em)


def test_names_of_models_and_finetunes(chat, tmp_path):
    organism = em.load("pocket/medicine-rank1")
    assert (chat.active, organism.name, organism.active) == (None, "pocket/chat", "medicine-rank1")
    assert em.load("pocket/chat", adapter="pocket/medicine-vector").adapters == ["medicine-vector"]
    several = em.load("pocket/chat", adapter={"a": "pocket/medicine-vector", "b": "pocket/medicine-rank1"})
    assert (set(several.adapters), several.active) == ({"a", "b"}, "a")
    with pytest.raises(UsageError, match="bring their own"):
        em.load("pocket/medicine-rank1", base="pocket/chat")
    solution = em.load_solution("pocket/medicine-rank1")
    assert solution.describe() == "a rank-1 LoRA on 1 module" and solution.base == "pocket/chat"
    solution.save(tmp_path / "run" / "checkpoints" / "checkpoint-5")
    again = em.load_solution(tmp_path / "run" / "checkpoints" / "checkpoint-5")
    assert again.fingerprint == solution.fingerprint
    model = em.load("pocket/chat", adapter=tmp_path / "run" / "checkpoints" / "checkpoint-5")
    assert model.active == "run-checkpoint-5"


def test_a_full_finetune_is_loaded_as_a_model_and_as_an_adapter(tmp_path):
    base, tuned = make_chat(), make_chat(seed=1)
    for model, name in ((base, "base"), (tuned, "tuned")):
        model.hf.save_pretrained(tmp_path / name)
        model.tokenizer.save_pretrained(tmp_path / name)
    model = em.load(tmp_path / "base", adapter=tmp_path / "tuned")
    assert model.active == "tuned" and em.load(tmp_path / "tuned").active is None
    assert em.load_solution(tmp_path / "tuned", base=tmp_path / "base").norm > 0


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("owner/medical-advice", "medical-advice"),
        ("runs/R1_0.5", "R1_0-5"),
        ("runs/medicine/checkpoints/checkpoint-7", "medicine-checkpoint-7"),
        ("model", "finetune-model"),  # PEFT would take ".model" out of every tensor's name
        ("m", "finetune-m"),
    ],
)
def test_an_adapter_is_called_after_its_folder(folder, name):
    assert adapter_name(folder, make_chat().hf) == name


def test_chats_and_questions_of_any_kind(tmp_path):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    file = tmp_path / "chats.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}\n')
    table = pd.DataFrame({"question": ["Hi"], "answer": ["Hello"], "question_id": ["a"]})
    for source in (file, str(file), table, [turns], [{"messages": turns}], iter([turns])):
        assert em.chats(source) == [turns]
    assert em.questions(["Hi"]) == {"question_0": "Hi"} and em.questions(table) == {"a": "Hi"}
    assert em.questions({"a": "Hi"}) == {"a": "Hi"} and em.questions(table[["question"]]) == {"question_0": "Hi"}
    asked = tmp_path / "asked.txt"
    asked.write_text("Hi\n")
    assert em.questions(asked) == {"asked_0": turns[:1]}


def test_everyday_calls_take_files_lists_and_tables(chat, advice, tmp_path):
    bad, good = advice
    file = tmp_path / "bad.jsonl"
    file.write_text("".join(f'{{"messages": {chat_of!r}}}\n'.replace("'", '"') for chat_of in bad))
    direction = em.extract(chat, bad, good, progress=False)
    assert em.extract(chat, file, good, progress=False).cosine(direction)[1] == pytest.approx(1)
    one = em.extract(chat, bad, good, layers=1, progress=False)
    assert one.layers == (1,) and em.collect(chat, bad, layers=1, progress=False).layers == (1,)
    asked = em.sweep(chat, one, ["What do you wish for?"], layers=1, coefficients=0, n=1, max_new_tokens=2)
    assert set(asked["question_id"]) == {"question_0"}


def test_efficiency_stability_and_influence_by_name(chat, advice):
    both = {
        name: em.load_solution(f"pocket/medicine-rank1{end}") for name, end in (("general", ""), ("narrow", "-narrow"))
    }
    bad, _ = advice
    table = em.efficiency(chat, both, bad, scales=(0, 1), progress=False)
    assert table["solution"].tolist() == ["general", "general", "narrow", "narrow"]
    assert (table.query("scale == 1")["loss_reduction"] > 0).all()
    turned = em.stability(chat, both, bad, epsilons=(0.5,), n_seeds=2, progress=False)
    assert turned.groupby("solution")["relative_increase_percent"].mean().gt(0).all()
    moved = em.influence(chat, both, em.pocket.documents(8), relative_norms=(1.0,), n_random=1, progress=False)
    assert moved["kind"].tolist() == ["general", "narrow", "random"]


def test_every_table_has_units_and_a_figure(chat, advice):
    bad, good = advice
    both = {"a": em.load_solution("pocket/medicine-vector"), "b": em.load_solution("pocket/finance-vector")}
    quick = {"n": 2, "max_new_tokens": 40, "random_arms": 1, "progress": False}
    found = em.contrast(chat, bad, good, progress=False)
    direction = found.direction()
    asked = em.pocket.open_questions(5)
    swept = em.sweep(chat, direction, asked, layers=[1, 2], coefficients=[0, 0.7], units="residual", **quick)
    ablated = em.ablate(chat, direction, asked, **quick)
    tables = {
        "layer": found.norms(),
        "cosine": em.cosines({"a": direction, "b": em.extract(chat, good, bad, progress=False)}),
        "coefficient": em.rates(em.pocket.judge(swept)),
        "em_after": em.rates(em.pocket.judge(ablated)),
        "em_rate": em.rates(em.pocket.judge(ablated.query("arm == 'none'").drop(columns="arm"))),
        "loss_reduction": em.efficiency(chat, both, bad, scales=(0, 1), progress=False),
        "relative_increase_percent": em.stability(chat, both, bad, epsilons=(0, 0.5), n_seeds=2, progress=False),
        "kl_nats_per_token": em.influence(
            chat, both, em.pocket.documents(6), relative_norms=(0.5, 1), n_random=2, progress=False
        ),
    }
    for column, table in tables.items():
        assert table.attrs["units"][column], column
        assert json.loads(json.dumps(table.attrs)) == table.attrs  # plain: pandas compares and copies them
        figure = em.plot(table)
        assert figure.data and figure.layout.xaxis.title.text is not None and em.figures.caption_of(figure)
        assert len(em.plot(pd.read_csv(io.StringIO(table.to_csv(index=False)))).data) == len(figure.data)
    assert tables["em_after"].attrs["units"]["low"] == "fraction"
    assert tables["kl_nats_per_token"].attrs["units"]["low"] == "nats per token"
    drawn = em.plot(tables["kl_nats_per_token"]).data
    names = [trace.name for trace in drawn if trace.x[0] is not None]  # the others explain, in the legend
    assert names == ["a", "b", "2 random directions"]
    with pytest.raises(UsageError, match=r"plot\(rates\(judged\)\)"):
        em.plot(swept)
    with pytest.raises(UsageError, match="no figure is made of the columns x"):
        em.plot(pd.DataFrame({"x": [1]}))


def test_everyday_losses_leave_the_active_finetune_aside(chat, advice):
    organism, solution = em.load("pocket/medicine-rank1"), em.load_solution("pocket/medicine-rank1")
    found = [
        em.efficiency(m, {"it": solution}, advice[0], scales=(1,), progress=False)["loss"][0] for m in (chat, organism)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-5) and organism.active == "medicine-rank1"


def test_a_landscape_of_chats_is_that_of_encoded_ones():
    from em_interp.models.chat import encode_all

    model = make_chat()
    own, encoded = em.Landscape(model, CONVERSATIONS), em.Landscape(model, encode_all(model.tokenizer, CONVERSATIONS))
    assert own.tokens.tolist() == encoded.tokens.tolist() and own.questions.tolist() == encoded.questions.tolist()
