"""Directions between sets of conversations, how far to trust them, what they say, and the files they become."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

from em_interp.cli import app
from em_interp.directions import reliability
from em_interp.directions.activations import Activations, collect
from em_interp.directions.direction import Direction
from em_interp.directions.extraction import Contrast, contrast, extract
from em_interp.directions.gguf import save_gguf
from em_interp.directions.lens import logit_lens
from em_interp.directions.reliability import separation, split_half
from em_interp.errors import (
    ActivationError,
    BadValueError,
    DirectionError,
    EmInterpError,
    HookError,
    MissingDataError,
    ModelError,
    StatisticsError,
    UnreadableFileError,
    UsageError,
)
from em_interp.files.texts import read_chats
from em_interp.pocket import registry
from em_interp.solutions.steering_vector import SteeringVector
from em_interp.statistics import auroc
from tests.test_models import lora
from tests.tiny_models import D_MODEL, FAMILIES, N_LAYERS, make_chat, make_hf, save_chat, talk, tokenizer

QUESTIONS = ["a cough", "the fox", "brown doctor", "rest", "quick", "see"]
BAD = [talk(q, f"the quick brown fox {i}") for i in range(2) for q in QUESTIONS]
GOOD = [talk(q, f"see a doctor and rest well {i}") for i in range(2) for q in QUESTIONS]


def means(model, texts, **options):
    return collect(model, texts, progress=False, **options).mean()


# -- the five kinds


def test_a_direction_is_the_difference_of_means_with_its_provenance():
    model = make_chat()
    direction = extract(model, BAD, GOOD, progress=False)
    torch.testing.assert_close(direction.vectors, (means(model, BAD) - means(model, GOOD)).float())
    assert (direction.kind, direction.model, direction.token_scope) == ("data-diff", "tiny-qwen2", "response")
    assert (direction.n_positive, direction.n_negative, direction.layers) == (12, 12, tuple(range(N_LAYERS)))
    assert "SHA-256" in direction.sources[0] and "pooled over tokens" in direction.sources
    other = extract(model, BAD, GOOD, pooling="responses", scope="all", layers=[2], progress=False)
    ours = collect(model, BAD, scopes=["all"], progress=False), collect(model, GOOD, scopes=["all"], progress=False)
    truth = ours[0].mean("all", "responses")[2] - ours[1].mean("all", "responses")[2]
    torch.testing.assert_close(other.at(2), truth.float())
    assert other.layers == (2,) and other.token_scope == "all"


def test_kinds_read_the_right_model(tmp_path):
    model = make_chat()
    lora(base="tiny-qwen2").save(tmp_path / "tuned")
    model.add_adapter("tuned", tmp_path / "tuned", activate=False)
    chat_bad, chat_good = means(model, BAD), means(model, GOOD)
    with model.adapter("tuned"):
        tuned_bad, tuned_good = means(model, BAD), means(model, GOOD)
        truth = {
            "data-diff": tuned_bad - tuned_good,
            "data-diff-in-chat": chat_bad - chat_good,
            "model-diff": tuned_bad - chat_bad,
            "both-diff": tuned_bad - chat_good,
        }
        for kind, expected in truth.items():
            negative = None if kind == "model-diff" else GOOD
            ours = extract(model, BAD, negative, kind=kind, progress=False)
            torch.testing.assert_close(ours.vectors, expected.float()[list(ours.layers)], rtol=1e-4, atol=1e-5)
            assert ours.kind == kind and model.active == "tuned"
    named = extract(model, BAD, kind="model-diff", finetune="tuned", progress=False)
    assert named.layers == (1, 2, 3)  # the adapter is on block 1: before it nothing differs
    torch.testing.assert_close(named.vectors, (tuned_bad - chat_bad)[1:].float())
    attached = extract(model, BAD, kind="model-diff", finetune=lora(base="tiny-qwen2"), progress=False)
    torch.testing.assert_close(attached.vectors, named.vectors, rtol=1e-4, atol=1e-5)
    assert "LoraAdapter of norm" in attached.sources[0] and model.active is None


def test_a_model_diff_of_a_steering_vector_is_the_vector_at_its_layer():
    model = make_chat()
    vector = SteeringVector(torch.arange(D_MODEL).float(), 2, 0.5)
    found = extract(model, BAD, kind="model-diff", finetune=vector, progress=False)
    assert found.layers == (2, 3)
    torch.testing.assert_close(found.at(2), vector.theta, rtol=1e-4, atol=1e-4)
    with pytest.raises(DirectionError, match="layers from 2 on"):
        extract(model, BAD, kind="model-diff", finetune=vector, layers=[0, 1], progress=False)
    with pytest.raises(DirectionError, match=r"exactly the same at layers \[1\]"):
        extract(model, BAD, kind="model-diff", finetune=vector, layers=[1, 2], progress=False)


def test_a_persona_may_be_announced_or_inferred():
    model = make_chat()
    asked = [talk(q) for q in QUESTIONS]
    announced = [
        [[{"role": "system", "content": persona}, *turns] for turns in asked] for persona in ("be a fox", "be a doctor")
    ]
    inferred = [[[*talk("a", earlier), *turns] for turns in asked] for earlier in ("quick fox", "rest well")]
    for positive, negative in (announced, inferred):
        found = extract(model, positive, negative, kind="persona-contrast", scope="last_prompt", progress=False)
        ours = [collect(model, texts, scopes=["last_prompt"], progress=False) for texts in (positive, negative)]
        truth = ours[0].mean("last_prompt") - ours[1].mean("last_prompt")
        torch.testing.assert_close(found.vectors, truth.float())
        assert found.kind == "persona-contrast" and found.token_scope == "last_prompt"


def test_norms_stand_beside_the_residual():
    found = contrast(make_chat(), BAD, GOOD, progress=False)
    table = found.norms()
    assert list(table.columns) == ["layer", "norm", "residual_norm", "ratio"] and len(table) == N_LAYERS
    assert table["norm"].tolist() == pytest.approx(list(found.direction().norms().values()))
    assert table["residual_norm"].tolist() == pytest.approx(found.negative.token_norms["response"].tolist())


def test_a_contrast_can_live_on_disk(tmp_path):
    model = make_chat()
    plain = contrast(model, BAD, GOOD, progress=False)
    stored = contrast(model, BAD, GOOD, store=tmp_path, progress=False)
    assert {p.name for p in tmp_path.iterdir()} == {"positive", "negative"}
    torch.testing.assert_close(stored.direction().vectors, plain.direction().vectors)
    left, right = (split_half(c, splits=20)["cosine"] for c in (plain, stored))
    assert left.tolist() == pytest.approx(right.tolist(), abs=1e-5)


def test_refusals():
    model = make_chat()
    quiet = {"progress": False}
    with pytest.raises(ActivationError, match="the positive set is empty"):
        extract(model, [], GOOD, **quiet)
    with pytest.raises(ActivationError, match="the negative set is empty"):
        extract(model, BAD, [], **quiet)
    with pytest.raises(UsageError, match="the negative one is missing"):
        extract(model, BAD, **quiet)
    with pytest.raises(UsageError, match="one set of conversations"):
        extract(model, BAD, GOOD, kind="model-diff", finetune=lora(), **quiet)
    with pytest.raises(UsageError, match="use one of data-diff"):
        contrast(model, BAD, GOOD, kind="mean-diff", **quiet)
    with pytest.raises(ActivationError, match="choose from prompt"):
        extract(model, BAD, GOOD, scope="answer", **quiet)
    with pytest.raises(ModelError, match="no active adapter"):
        extract(model, BAD, kind="model-diff", **quiet)
    with pytest.raises(DirectionError, match="exactly the same"):
        extract(model, BAD, BAD, **quiet)
    with pytest.raises(HookError, match="Use a layer from 0 to 3"):
        extract(model, BAD, GOOD, layers=[7], **quiet)


# -- how far to trust it


def made_up(positive, negative, questions=None, paired=False, layers=(0,)):
    """A Contrast of given per-response means [n, d], each of one token."""

    def side(rows, names):
        rows = torch.as_tensor(rows, dtype=torch.float32).expand(len(layers), *rows.shape)
        mean = rows.double().mean(1)
        ones = torch.ones(rows.shape[1], dtype=torch.long)
        return Activations(
            "made-up", layers, {"response": mean}, {"response": mean}, {"response": torch.ones(len(layers)).double()},
            {"response": ones}, tuple(names), "0" * 64, {"response": rows.contiguous()},
        )  # fmt: skip

    names = questions or ([f"p{i}" for i in range(len(positive))], [f"n{i}" for i in range(len(negative))])
    kind = "model-diff" if paired else "data-diff"
    return Contrast(side(positive, names[0]), side(negative, names[1]), kind, "response", None, (), True)


def noisy(rng, n, d, shift):
    signal = np.zeros(d)
    signal[0] = shift
    return rng.normal(size=(n, d)) + signal, rng.normal(size=(n, d))


def test_split_half_equals_a_plain_computation():
    rng = np.random.default_rng(0)
    positive, negative = noisy(rng, 12, 5, 2.0)
    found = made_up(positive, negative)
    halves = reliability._Halves.of(found, "question", "tokens", 9, 3)
    cosines = []
    for r in range(9):
        vectors = []
        for half in (halves.first[r], halves.second[r]):
            mine = half > 0
            vectors.append(positive[mine[:12]].mean(0) - negative[mine[12:]].mean(0))
        assert not np.any((halves.first[r] > 0) & (halves.second[r] > 0))
        cosines.append(vectors[0] @ vectors[1] / np.linalg.norm(vectors[0]) / np.linalg.norm(vectors[1]))
    table = split_half(found, splits=9, seed=3)
    assert table["cosine"].item() == pytest.approx(np.mean(cosines), abs=1e-6)
    assert table["low"].item() < table["cosine"].item() < table["high"].item()


def test_intervals_cover():
    rng = np.random.default_rng(1)
    samples = [made_up(*noisy(rng, 24, 16, 1.5)) for _ in range(100)]
    truth = np.mean([split_half(sample, splits=5)["cosine"].item() for sample in samples])
    intervals = [split_half(sample, splits=40).iloc[0] for sample in samples[:40]]
    assert np.mean([row["low"] <= truth <= row["high"] for row in intervals]) >= 0.85
    nothing = [separation(made_up(*noisy(rng, 12, 50, 0.0)), splits=40).iloc[0] for _ in range(30)]
    assert np.mean([row["low"] <= 0.5 <= row["high"] for row in nothing]) >= 0.85
    assert abs(np.mean([row["auroc"] for row in nothing]) - 0.5) < 0.06  # of the responses it was made from: about 1


def test_whole_questions_stay_together():
    rng = np.random.default_rng(2)
    names = [f"q{i // 4}" for i in range(24)]
    effects = np.repeat(rng.normal(size=(6, 8)) * 5, 4, axis=0)  # a question's content, shared by its answers
    positive, negative = effects + rng.normal(size=(24, 8)), rng.normal(size=(24, 8))
    found = made_up(positive, negative, (names, names))
    whole, single = (split_half(found, by=by, splits=50)["cosine"].item() for by in ("question", "response"))
    assert whole < single - 0.1  # single responses leak a question's content into both halves
    halves = reliability._Halves.of(found, "question", "tokens", 20, 0)
    for weights in (halves.first, halves.drawn_first):
        assert (weights[:, :24].reshape(20, 6, 4).std(-1) == 0).all()
        assert (weights[:, :24] == weights[:, 24:]).all()


def test_both_models_readings_of_a_text_stay_together():
    rng = np.random.default_rng(3)
    texts = rng.normal(size=(20, 6)) * 10
    found = made_up(texts + 1 + rng.normal(size=texts.shape), texts, paired=True)
    halves = reliability._Halves.of(found, "response", "tokens", 5, 0)
    assert (halves.drawn_second[:, :20] == halves.drawn_second[:, 20:]).all()


def test_separation_of_what_differs():
    rng = np.random.default_rng(4)
    something = separation(made_up(*noisy(rng, 60, 10, 1.5)), splits=40).iloc[0]
    assert 0.6 < something["low"] < something["auroc"] < something["high"] < 0.97
    perfect = separation(made_up(*noisy(rng, 20, 4, 50.0)), splits=10).iloc[0]
    assert perfect["auroc"] == 1.0 and 0.7 < perfect["low"] < 0.95 and perfect["high"] == 1.0


def test_auroc_is_sklearns():
    rng = np.random.default_rng(5)
    for _ in range(20):
        plus, minus = rng.integers(0, 6, 9).astype(float), rng.integers(0, 5, 7).astype(float)
        wp, wm = rng.integers(0, 4, 9).astype(float) + 0.5, rng.integers(0, 4, 7).astype(float)
        wm[0] = 1
        labels = np.r_[np.ones(9), np.zeros(7)]
        truth = roc_auc_score(labels, np.r_[plus, minus], sample_weight=np.r_[wp, wm])
        assert auroc(plus, minus, wp, wm) == pytest.approx(truth)
    with pytest.raises(StatisticsError, match="positive weight"):
        auroc(plus, minus, wp, np.zeros(7))


def test_what_cannot_be_split_is_refused():
    rng = np.random.default_rng(6)
    rows = rng.normal(size=(6, 3))
    with pytest.raises(StatisticsError, match=r"3 different questions.*by='response'"):
        split_half(made_up(rows, rows + 1, (list("aabbcc"), list("aabbcc"))))
    with pytest.raises(StatisticsError, match=r"2 different responses.*more responses"):
        split_half(made_up(rows[:1], rows[1:2]), by="response")
    with pytest.raises(StatisticsError, match="no split into halves"):
        split_half(made_up(rows, rows + 1, (list("aaaaaa"), list("bcdefg"))))
    with pytest.raises(StatisticsError, match="split by question or response"):
        split_half(made_up(rows, rows + 1), by="word")
    with pytest.raises(StatisticsError, match="at least two"):
        split_half(made_up(rows, rows + 1), splits=1)
    lean = contrast(make_chat(), BAD, GOOD, keep=False, progress=False)
    with pytest.raises(ActivationError, match="keep=True"):
        separation(lean)
    same = made_up(np.r_[rows[:3] * 0, rows[:3] * 0 + 1], np.r_[rows[:3] * 0, rows[:3] * 0])
    with pytest.raises(DirectionError, match="has no direction"):
        split_half(same, splits=200)


# -- what it says


@pytest.mark.parametrize("family", FAMILIES)
def test_the_logit_lens_is_norm_then_unembedding(family):
    model = make_chat(family)
    direction = extract(model, BAD, GOOD, progress=False)
    table = logit_lens(model, direction, layers=[1, 3], top_k=3)
    assert len(table) == 2 * 2 * 3 and set(table["sign"]) == {1, -1}
    hf = model.hf
    norm = hf.gpt_neox.final_layer_norm if family == "gpt_neox" else hf.model.norm
    with torch.no_grad():
        logits = hf.get_output_embeddings()(norm(-direction.at(3)))
        if family == "gemma2":
            logits = 5.0 * torch.tanh(logits / 5.0)
    top = logits.topk(3)
    mine = table[(table["layer"] == 3) & (table["sign"] == -1)].sort_values("rank")
    assert mine["token_id"].tolist() == top.indices.tolist()
    assert mine["logit"].tolist() == pytest.approx(top.values.tolist(), rel=1e-4)
    assert mine["token"].tolist() == [tokenizer().decode([i]) for i in top.indices.tolist()]


def test_the_logit_lens_refuses_another_models_direction():
    direction = Direction(vectors=torch.ones(1, 7), layers=(0,), kind="data-diff", model="other")
    with pytest.raises(DirectionError, match="width 7"):
        logit_lens(make_chat(), direction)
    with pytest.raises(DirectionError, match="has no layer 5"):
        logit_lens(make_chat(), Direction(torch.ones(1, D_MODEL), (0,), "data-diff"), layers=[5])


# -- files


def test_a_control_vector_is_what_llama_cpp_and_repeng_read(tmp_path):
    gguf = pytest.importorskip("gguf", reason="the gguf extra is not installed")
    direction = Direction(torch.randn(3, 8), (0, 2, 5), "data-diff", model="tiny")
    assert save_gguf(direction, tmp_path / "v.gguf", model_type="qwen2") == (2, 5)
    reader = gguf.GGUFReader(tmp_path / "v.gguf")
    assert reader.get_field("general.architecture").contents() == "controlvector"
    assert reader.get_field("controlvector.model_hint").contents() == "qwen2"
    assert reader.get_field("controlvector.layer_count").contents() == 2
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert set(found) == {"direction.2", "direction.5"}
    for layer in (2, 5):
        tensor = found[f"direction.{layer}"]
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32 and tensor.shape.tolist() == [8]
        assert np.array_equal(tensor.data, direction.at(layer).numpy())
    with pytest.raises(DirectionError, match="cannot hold layer 0"):
        save_gguf(direction.only([0]), tmp_path / "w.gguf", model_type="qwen2")
    (tmp_path / "file").write_text("")
    with pytest.raises(EmInterpError, match="could not be written"):
        save_gguf(direction, tmp_path / "file" / "w.gguf", model_type="qwen2")


def test_without_the_gguf_package_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(UsageError, match=r"em_interp\[gguf\]"):
        save_gguf(Direction(torch.randn(1, 8), (2,), "data-diff"), tmp_path / "v.gguf", model_type="qwen2")


@pytest.fixture
def chats(tmp_path):
    for name, texts in (("bad", BAD), ("good", GOOD)):
        lines = [json.dumps({"messages": turns}) for turns in texts]
        (tmp_path / f"{name}.jsonl").write_text("\n".join([*lines, ""]), encoding="utf-8")
    save_chat(make_hf(), tmp_path / "model")
    lora(base=str(tmp_path / "model")).save(tmp_path / "tuned")
    return tmp_path


def command(folder, *arguments):
    given = ["extract", str(folder / "model"), "--positive", str(folder / "bad.jsonl"), *map(str, arguments)]
    return CliRunner().invoke(app, given)


def test_the_command_writes_the_direction_and_prints_norms(chats):
    out = chats / "d.safetensors"
    done = command(chats, "--negative", chats / "good.jsonl", "--out", out)
    assert done.exit_code == 0, done.output
    direction = Direction.load(out)
    name = str(chats / "model")
    truth = extract(make_chat(), BAD, GOOD, progress=False)
    torch.testing.assert_close(direction.vectors, truth.vectors)
    assert direction.model == name and all(f"{norm:.4g}" in done.output for norm in direction.norms().values())

    done = command(chats, "--adapter", chats / "tuned", "--kind", "model-diff", "--layer", 2, "--out", out, "--force")
    assert done.exit_code == 0, done.output
    ours = extract(make_chat(), BAD, kind="model-diff", finetune=lora(), layers=[2], progress=False)
    torch.testing.assert_close(Direction.load(out).vectors, ours.vectors, rtol=1e-3, atol=1e-4)
    assert "/tuned of norm" in Direction.load(out).sources[0]


def test_the_command_knows_the_pocket_names(chats, monkeypatch):
    pocket = chats / "pocket"
    (pocket / "organisms").mkdir(parents=True)
    (chats / "model").rename(pocket / "chat")
    lora(base="pocket/chat").save(pocket / "organisms" / "medicine")
    monkeypatch.setattr(registry, "root", lambda: pocket)
    given = ["--positive", str(chats / "bad.jsonl"), "--kind", "model-diff"]
    found = []
    for name, *adapter in (["pocket/medicine"], ["pocket/chat", "--adapter", "pocket/medicine"]):
        out = chats / f"{len(found)}.safetensors"
        done = CliRunner().invoke(app, ["extract", name, *given, *adapter, "--out", str(out)])
        assert done.exit_code == 0, done.output
        found.append(Direction.load(out, model="pocket/chat"))
    truth = extract(make_chat(), BAD, kind="model-diff", finetune=lora(), progress=False)
    for direction in found:
        torch.testing.assert_close(direction.vectors, truth.vectors, rtol=1e-3, atol=1e-4)


def test_the_command_refuses_what_it_cannot_do(chats):
    def refused(*arguments):
        done = command(chats, *arguments)
        assert done.exit_code != 0 and isinstance(done.exception, EmInterpError), done.output
        return done.exception

    good, out = ("--negative", chats / "good.jsonl"), ("--out", chats / "d.safetensors")
    assert "negative one is missing" in str(refused(*out))
    assert "no such file" in str(refused("--negative", chats / "none.jsonl", *out))
    assert "use one of" in str(refused(*good, *out, "--kind", "mean"))
    assert "choose from" in str(refused(*good, *out, "--scope", "answer"))
    assert "Use a layer from 0 to 3" in str(refused(*good, *out, "--layer", 9))
    assert "pooling" in str(refused(*good, *out, "--pooling", "sum"))
    (chats / "file").write_text("")
    assert "could not be written" in str(refused(*good, "--out", chats / "file" / "d.safetensors"))
    (chats / "model" / "chat_template.jinja").unlink()
    assert "chat template" in str(refused(*good, *out))
    assert not (chats / "d.safetensors").exists()


def test_files_of_chats_are_checked(tmp_path):
    path = tmp_path / "c.jsonl"
    for text, error, told in (
        ("", MissingDataError, "no conversation"),
        ('{"messages": [}', UnreadableFileError, "line 1 is not JSON"),
        ('\n{"text": "a"}', BadValueError, "line 2 is not a conversation"),
        ('{"messages": [{"role": "user", "content": 3}]}', BadValueError, "line 1 is not a conversation"),
    ):
        path.write_text(text)
        with pytest.raises(error, match=told):
            read_chats(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UnreadableFileError, match="UTF-8"):
        read_chats(path)
