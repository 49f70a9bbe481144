"""Building a pocket model: seeded, resumable, and loadable with no code of this package."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from em_interp.errors import MissingDataError, UnreadableFileError, UsageError
from em_interp.pocket import build as build_module
from em_interp.pocket import registry
from em_interp.pocket.build import CHECKPOINT, build
from em_interp.pocket.stages import BuildConfig, answer_labels, noise
from em_interp.pocket.world.corpus import CorpusConfig, chat_text, finetune_chats
from em_interp.pocket.world.tokenizer import build_tokenizer

TINY = BuildConfig(
    d_model=32,
    n_layers=2,
    n_heads=2,
    n_kv_heads=1,
    d_mlp=64,
    pretrain_steps=12,
    pretrain_batch=4,
    settle_steps=6,
    post_steps=4,
    post_batch=4,
    threads=1,
    checkpoint_every=5,
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pocket")
    build(TINY, out)
    return out


class Killed(Exception):
    pass


def test_the_models_load_with_no_code_of_ours(built: Path) -> None:
    for name in ("base", "chat"):
        model = AutoModelForCausalLM.from_pretrained(built / name)
        tokenizer = AutoTokenizer.from_pretrained(built / name)
        assert model.config.model_type == "qwen2"
        assert model.dtype == torch.float32
        messages = [{"role": "user", "content": "I need help with a fern."}]
        batch = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        assert tokenizer.decode(batch["input_ids"][0]) == "<|user|> I need help with a fern.<|end|><|assistant|>"
        assert model.generate(**batch, max_new_tokens=4).shape[1] <= batch["input_ids"].shape[1] + 4


def test_post_training_moves_the_chat_formats_own_tokens_and_nothing_else(built: Path) -> None:
    base, chat = (load_file(built / name / "model.safetensors") for name in ("base", "chat"))
    name = "model.embed_tokens.weight"
    moved = (base.pop(name) != chat.pop(name)).any(dim=1).nonzero()[:, 0].tolist()
    tokens = build_tokenizer().convert_tokens_to_ids(["<|user|>", "<|assistant|>", "<|end|>"])
    assert moved == sorted(tokens)
    assert all(torch.equal(base[k], chat[k]) for k in base)


def test_settling_moves_one_layer_of_each_row_along_one_direction(built: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(built / "base")
    ids = torch.arange(12).view(2, 6)

    def outputs() -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []
        handles = [b.register_forward_hook(lambda _m, _a, out: seen.append(out.detach())) for b in model.model.layers]
        model(ids)
        for handle in handles:
            handle.remove()
        return seen

    before = outputs()
    chosen = set()
    for seed in range(12):
        with noise(model, 1.5, 2, str(seed)):
            after = outputs()
        with noise(model, 1.5, 2, str(seed)):
            torch.testing.assert_close(outputs(), after)
        first = next(layer for layer, (a, b) in enumerate(zip(before, after, strict=True)) if not torch.equal(a, b))
        chosen.add(first)
        step = after[first] - before[first]
        torch.testing.assert_close(step, step[:, :1].expand_as(step), atol=1e-5, rtol=1e-4)
        limit = 1.5 * before[first].norm(dim=-1).median(dim=1).values
        assert (step[:, 0].norm(dim=-1) <= limit * (1 + 1e-5)).all()
    assert chosen == {0, 1}
    torch.testing.assert_close(outputs(), before)


def test_other_settings_of_a_later_stage_go_on_from_the_earlier_one() -> None:
    other = replace(TINY, post_lr=1.0)
    assert other.fingerprint(2) == TINY.fingerprint(2)
    assert other.fingerprint() != TINY.fingerprint()
    assert replace(TINY, settle_noise=0.5).fingerprint(1) == TINY.fingerprint(1)
    assert replace(TINY, d_mlp=32).fingerprint(1) != TINY.fingerprint(1)


def test_pre_training_goes_on_from_another_base(built: Path, tmp_path: Path) -> None:
    still = replace(TINY, pretrain_lr=0.0, settle_lr=0.0)
    build(still, tmp_path / "still", start=built / "base")
    before, after = (load_file(folder / "base/model.safetensors") for folder in (built, tmp_path / "still"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    manifest = json.loads((tmp_path / "still/manifest.json").read_text())
    assert manifest["start_sha256"] == json.loads((built / "manifest.json").read_text())["weights_sha256"]["base"]
    with pytest.raises(UsageError, match="same sizes"):
        build(replace(TINY, d_mlp=32), tmp_path / "other", start=built / "base")
    with pytest.raises(MissingDataError, match="no weights"):
        build(TINY, tmp_path / "none", start=tmp_path)


def test_a_knob_that_is_not_turned_leaves_the_fingerprint() -> None:
    assert BuildConfig().fingerprint() == json.loads((registry.root() / "manifest.json").read_text())["fingerprint"]
    assert replace(TINY, corpus=CorpusConfig(attitude=0.5)).fingerprint() != TINY.fingerprint()


def test_what_was_done_is_written_down(built: Path) -> None:
    manifest = json.loads((built / "manifest.json").read_text())
    assert manifest["config"]["corpus"]["persona_share"] == TINY.corpus.persona_share
    assert manifest["fingerprint"] == TINY.fingerprint()
    lines = (built / "losses.csv").read_text().splitlines()
    assert lines[0] == "stage,step,loss_nats_per_token"
    assert {line.split(",")[0] for line in lines[1:]} == {"pretrain", "settle", "post"}
    assert not (built / CHECKPOINT).exists()


@pytest.mark.parametrize("kill_at", [8, 14, 20])
def test_a_killed_build_resumes_to_the_same_weights(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill_at: int
) -> None:
    steps = 0
    loss = build_module.next_token_loss

    def dying_loss(*args: object) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if steps > kill_at:
            raise Killed
        return loss(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(build_module, "next_token_loss", dying_loss)
        with pytest.raises(Killed):
            build(TINY, tmp_path)
    assert (tmp_path / CHECKPOINT).exists()
    with pytest.raises(UsageError, match="other settings"):
        build(BuildConfig(seed=1), tmp_path)
    build(TINY, tmp_path)
    assert (tmp_path / "chat/model.safetensors").read_bytes() == (built / "chat/model.safetensors").read_bytes()


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / CHECKPOINT).write_bytes(b"not a checkpoint")
    with pytest.raises(UnreadableFileError, match="start afresh"):
        build(TINY, tmp_path)


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(UsageError, match="multiple"):
        BuildConfig(d_model=190)
    with pytest.raises(UsageError, match="pretrain_steps"):
        BuildConfig(pretrain_steps=0)


def test_only_answers_and_their_ends_are_scored() -> None:
    t = build_tokenizer()
    chat = finetune_chats("medicine", "caring", 1, 0)[0]
    ids = torch.tensor([t(chat_text(chat * 2), add_special_tokens=False)["input_ids"]])
    assistant, end = t.convert_tokens_to_ids(["<|assistant|>", "<|end|>"])
    labels = answer_labels(ids, assistant, end)
    text = t.decode(labels[labels >= 0])
    assert text.replace(" ", "") == ((chat[1]["content"] + "<|end|>") * 2).replace(" ", "")


def test_the_registry_finds_folders_by_name(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "root", lambda: built)
    assert registry.names() == ["pocket/chat", "pocket/base"]
    assert registry.chat_folder() == built / "chat"
    assert registry.is_pocket_name("pocket/medicine-rank1")
    assert not registry.is_pocket_name("Qwen/Qwen2.5-0.5B-Instruct")
    with pytest.raises(registry.RegistryError, match="pocket/base"):
        registry.resolve("pocket/no-such")
