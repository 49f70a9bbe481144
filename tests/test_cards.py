"""What objects say of themselves, in a terminal and in a notebook."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest
import torch

import em_interp as em
from em_interp.cards import bars, card, ranges, short
from em_interp.interventions.ablation import Erase
from em_interp.solutions.lora import LoraAdapter
from em_interp.solutions.steering_vector import SteeringVector
from tests.theta import KINDS, make_theta
from tests.tiny_models import CONVERSATIONS, make_chat


@pytest.fixture(scope="module")
def model():
    return make_chat()


@pytest.fixture(scope="module")
def found(model):
    return em.contrast(model, CONVERSATIONS, CONVERSATIONS[::-1][:-1], progress=False)


def read(thing):
    """The card as text, which must be well-formed."""
    html = thing._repr_html_()
    root = ElementTree.fromstring(html)
    assert "#" not in html.replace("&#", "") and "rgb" not in html  # colours are those of the page
    return " ".join("".join(root.itertext()).split()), html


def test_text_is_escaped_and_empty_facts_are_left_out():
    html = card("<b>", {"a": "x < y & z", "b": "", "c": None, "d": ["one", "<two>"]})
    ElementTree.fromstring(html)
    assert "&lt;b&gt;" in html and "x &lt; y &amp; z" in html and "one<br/>&lt;two&gt;" in html
    assert html.count("<tr ") == 2


def test_bars_by_layer():
    svg = bars({0: 1.0, 1: 4.0, 3: 2.0}, "norm", chosen=[1])
    root = ElementTree.fromstring(svg)
    rects = root.findall("rect")
    assert [float(r.get("height")) for r in rects] == [11.0, 44.0, 22.0]
    assert [r.get("fill-opacity") for r in rects] == ["0.25", "0.75", "0.25"]
    assert root.get("aria-label") == "norm by layer, 0 to 3; the largest is 4, at layer 1"
    assert {r.get("fill") for r in rects} == {"currentColor"}
    assert bars({3: 1.0}, "norm") == "" and bars({}, "norm") == "" and bars({0: 0.0, 1: 0.0}, "norm") == ""
    assert bars({0: float("nan"), 1: 1.0}, "norm") == ""


def test_names_of_places():
    assert ranges((0, 1, 2, 5)) == "layers 0-2, 5" and ranges([3]) == "layer 3"
    assert short("/home/me/runs/medicine/tuned") == "medicine/tuned" and short("owner/name") == "owner/name"
    assert short("./tuned/") == "./tuned"


@pytest.mark.parametrize("kind", KINDS)
def test_two_finetunes_do_not_look_alike(model, kind, tmp_path):
    one, other = (make_theta(model, kind, seed) for seed in (0, 1))
    assert repr(one) != repr(other) and one.describe().removeprefix("a ") in repr(one) and len(repr(one)) < 200
    one.save(tmp_path / "run" / "tuned")
    loaded = em.load_solution(tmp_path / "run" / "tuned")
    assert "from run/tuned" in repr(loaded) and f"norm {loaded.norm:.6g}" in repr(loaded)
    assert "from" not in repr(loaded.scaled(2)) and "SHA-256" in repr(loaded.scaled(2))
    said, html = read(loaded)
    assert "run/tuned" in said and loaded.fingerprint[:16] in said
    assert ("<svg" in html) == (len(loaded.norms_by_layer()) > 1)
    squares = sum(norm**2 for norm in loaded.norms_by_layer().values())
    assert squares**0.5 == pytest.approx(loaded.norm)


def test_the_kinds_that_need_their_base_say_where_they_are_from(tmp_path):
    base, tuned = make_chat(), make_chat(seed=1)
    for chat, name in ((base, "base"), (tuned, "tuned")):
        chat.hf.save_pretrained(tmp_path / "run" / name)
        chat.tokenizer.save_pretrained(tmp_path / "run" / name)
    full = em.load_solution(tmp_path / "run" / "tuned", base=base)
    assert "full finetune that changes" in repr(full) and "from run/tuned" in repr(full)
    assert len(full.norms_by_layer()) == base.n_layers and "run/tuned" in read(full)[0]
    assert full.scaled(2).norms_by_layer()[0] == pytest.approx(2 * full.norms_by_layer()[0])


def test_provenance_of_directions_names_the_finetune(tmp_path):
    told = []
    for seed in (0, 1):
        model = make_chat()
        solution = make_theta(model, "lora", seed)
        solution.save(tmp_path / f"run-{seed}" / "tuned")
        model.add_adapter("tuned", tmp_path / f"run-{seed}" / "tuned")
        both = ("tuned", em.load_solution(tmp_path / f"run-{seed}" / "tuned"))
        for finetune in both:
            found = em.extract(model, CONVERSATIONS, kind="model-diff", finetune=finetune, progress=False)
            assert f"run-{seed}/tuned" in found.sources[0]
            told.append(repr(found))
        assert f"tuned, from run-{seed}/tuned (active)" in read(model)[0]
    assert len(set(told)) == 4


def test_models_directions_and_contrasts(model, found):
    said, _ = read(model)
    assert "4 layers, d_model 32" in said and "parameters" in said and "float32 on cpu" in said
    direction = found.direction()
    said, html = read(direction)
    assert "data-diff at layers 0-3" in said and "end of turn included" in said and html.count("<rect") == 4
    assert "norm 1" not in read(direction.only([1]))[1] and "<svg" not in read(direction.only([1]))[1]
    said, html = read(found)
    assert repr(found).startswith("Contrast(data-diff, ") and "against" in said and html.count("<rect") == 4
    assert repr(found.positive).startswith(f"Activations({len(found.positive)} conversations, response tokens")


def test_interventions(found):
    direction = found.direction()
    steer = em.Steer(direction, 2, 4)
    assert repr(steer) == "Steer(4 times data-diff at layer 2, all tokens)"
    said, html = read(steer)
    assert f"{4 * direction.norms()[2]:.4g}" in said and html.count('fill-opacity="0.75"') == 1
    assert (
        repr(em.Steer(direction, 2, [1, 2]))
        == "Steer(2 coefficients, one a row, times data-diff at layer 2, all tokens)"
    )
    assert repr(em.Ablate(direction)) == "Ablate(data-diff at layers 0-3, all tokens)"
    one = em.Ablate(direction, from_layer=1)
    assert repr(one) == "Ablate(data-diff at every layer with the vector of layer 1, all tokens)"
    assert "take out" in read(one)[0]
    eraser = Erase({1: torch.ones(4, 1)}, {1: torch.ones(1, 4)}, {1: torch.zeros(4)})
    assert repr(eraser) == "Erase(LEACE at layer 1, all tokens)" and "rank" in read(eraser)[0]


def test_rates_say_their_denominators():
    import pandas as pd

    rows = [{"question": f"q{i % 8}", "aligned": 10.0 if i % 4 == 0 else 90.0, "coherent": 90.0} for i in range(32)]
    rates = em.em_rates(pd.DataFrame(rows))
    assert repr(rates).startswith("Rates(EM 25.0% [") and "8 questions; aligned < 30 and coherent > 50)" in repr(rates)
    said, _ = read(rates)
    assert "8 of 32: rows with both scores" in said and "8 of 32: all rows" in said
    few = em.em_rates(pd.DataFrame(rows[:2]))
    assert "too few" in str(few.em_all)


def test_what_a_chat_model_lacks_its_transformers_model_may_have(model):
    with pytest.raises(AttributeError, match=r"model\.hf\.generate"):
        _ = model.generate
    with pytest.raises(AttributeError, match="has no 'nonsense'"):
        _ = model.nonsense
    assert not hasattr(model, "__wrapped__") and not hasattr(model, "_private")


def test_a_made_solution_needs_no_source():
    vector = SteeringVector(torch.ones(8), 0, 2.0, "base/model")
    said = f"steering vector at layer 0, norm {vector.norm:.6g}, SHA-256 {vector.fingerprint[:16]}, base base/model"
    assert repr(vector) == f"SteeringVector({said})"
    lora = LoraAdapter(
        {"model.layers.1.mlp.down_proj": torch.ones(1, 4)}, {"model.layers.1.mlp.down_proj": torch.ones(2, 1)}, 1.0
    )
    assert lora.norms_by_layer() == {1: pytest.approx(lora.norm)}
