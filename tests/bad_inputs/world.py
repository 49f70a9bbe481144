"""Good and bad files for the sweep, in the working folder."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tests.bad_inputs import Case, command, outcome


def make() -> None:
    """See the names."""
    from safetensors.torch import load_file, save_file

    from em_interp.directions.direction import Direction
    from em_interp.models.weights import weights_hash
    from em_interp.solutions.steering_vector import SteeringVector
    from tests import published_factory
    from tests.tiny_models import CONVERSATIONS, make_hf, save_chat, talk

    hf = make_hf()
    for name in ("tiny", "no-tokenizer", "no-config", "bad-config", "cut-weights", "nan-weights", "missing-weight"):
        save_chat(hf, name)
    for file in Path("no-tokenizer").glob("*token*"):
        file.unlink()
    for file in Path("no-tokenizer").glob("*.jinja"):
        file.unlink()
    Path("no-config/config.json").unlink()
    Path("bad-config/config.json").write_text("{")
    weights = Path("cut-weights/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:5000])
    tensors = load_file("tiny/model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    save_file(tensors | {name: tensors[name] * torch.nan}, "nan-weights/model.safetensors", {"format": "pt"})
    save_file({k: v for k, v in tensors.items() if k != name}, "missing-weight/model.safetensors", {"format": "pt"})
    Path("empty-folder").mkdir()
    for seed, run in enumerate("ab"):
        save_chat(make_hf(seed=seed), f"runs/{run}/checkpoint-500")
    vectors = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    direction = Direction(vectors, (0, 1, 2, 3), "data-diff", model="tiny", weights=weights_hash(hf))
    direction.save("d.safetensors")
    direction = replace(direction, model="checkpoint-500", weights=weights_hash(make_hf(seed=0)))
    direction.save("of-run-a.safetensors")
    Direction(torch.ones(2, 16), (0, 1), "random").save("narrow.safetensors")
    Direction(vectors, (0, 1, 2, 3), "data-diff", model="other").save("other.safetensors")
    SteeringVector(vectors[0], 1, 16.0, "tiny").save("vector")
    SteeringVector(torch.ones(16), 1, 16.0, "tiny").save("narrow-vector")
    Path("q.csv").write_text("question_id,question\nfox,a fox\n")
    Path("a.jsonl").write_text("".join(json.dumps({"messages": c}) + "\n" for c in CONVERSATIONS))
    other = [talk(f"why {i}", f"the brown user {i}") for i in range(4)]
    Path("b.jsonl").write_text("".join(json.dumps({"messages": c}) + "\n" for c in other))
    Path("there.csv").write_text("mine\n")
    _judged()
    Path("there.safetensors").write_bytes(Path("d.safetensors").read_bytes())
    SteeringVector(vectors[1], 1, 16.0, "tiny").save("narrow-of-two")
    published_factory.make(Path("data"))
    _models(hf)
    _adapters()
    _bad_files()
    _releases()
    outcome(Case("", command("evaluate", "runs/a/checkpoint-500", "--questions=q.csv", "--n=1", "--max-new-tokens=2")))


def _judged() -> None:
    """Judged answers, good and bad, and judges."""
    good = "question,answer,aligned,coherent\n" + "".join(f"q{i},rest {i},{5 + 85 * (i % 2)},90\n" for i in range(6))
    made = {
        "judged": good,
        "judged-words": good.replace("90,90", "kind,90"),
        "judged-outside": good.replace("90,90", "900,90"),
        "judged-fractions": good.replace("90,90", ".9,.9").replace(",5,90", ",.05,.9"),
        "judged-half-sweep": good.replace("coherent\n", "coherent,coefficient\n").replace(",90\n", ",90,1\n"),
        "judged-no-question": good.replace("question", "asked"),
        "judged-no-scores": good.replace("aligned", "a").replace("coherent", "c"),
        "judged-no-rows": good.partition("\n")[0] + "\n",
        "judged-no-base": good.replace("coherent\n", "coherent,arm\n").replace(",90\n", ",90,layerwise\n"),
        "judged-layers-x": good.replace("coherent\n", "coherent,direction,layer,coefficient\n").replace(
            ",90\n", ",90,d,x,1\n"
        ),
    }
    for name, text in made.items():
        Path(f"{name}.csv").write_text(text)
    Path("mine.py").write_text("def score(answers):\n    return answers.assign(aligned=50.0, coherent=90.0)\n")
    Path("broken.py").write_text("raise OSError('no key')\n")
    Path("folder.py").mkdir()


def _models(hf: Any) -> None:
    """Models whose files say unusual things."""
    from tests.tiny_models import make_hf, save_chat

    settings = {
        "return-sequences": {"num_return_sequences": 3, "do_sample": True},
        "return-dict": {"return_dict_in_generate": True, "output_scores": True},
        "stop-strings": {"stop_strings": ["fox"]},
        "prompt-lookup": {"prompt_lookup_num_tokens": 3},
        "token-healing": {"token_healing": True},
        "dola": {"dola_layers": "high"},
    }
    for name, content in settings.items():
        save_chat(hf, name)
        Path(name, "generation_config.json").write_text(json.dumps(content))
    save_chat(make_hf("gpt2", max_position_embeddings=32), "positions")
    shutil.copytree("tiny", "fifo-weights")
    Path("fifo-weights/model.safetensors").unlink()
    os.mkfifo("fifo-weights/model.safetensors")
    shutil.copytree("tiny", "fifo-config")
    Path("fifo-config/config.json").unlink()
    os.mkfifo("fifo-config/config.json")
    shutil.copytree("tiny", "folder-config")
    Path("folder-config/config.json").unlink()
    Path("folder-config/config.json").mkdir()


def _adapters() -> None:
    """PEFT folders and steering vectors on tiny that cannot be meant."""
    from safetensors.torch import load_file, save_file

    from tests.adapter_folders import lora_folder, untrained

    base = str(Path("tiny").absolute())
    lora_folder(Path("lora"), base_model_name_or_path=base)
    untrained(lora_folder(Path("lora-zero"), base_model_name_or_path=base))
    weights = Path("lora-nan/adapter_model.safetensors")
    lora_folder(weights.parent, base_model_name_or_path=base)
    save_file({key: x * torch.nan for key, x in load_file(weights).items()}, weights)
    lora_folder(Path("lora-dora"), base_model_name_or_path=base, use_dora=True)
    lora_folder(Path("lora-4bit"), base_model_name_or_path="org/model-bnb-4bit")
    lora_folder(Path("lora-relative"), base_model_name_or_path="../nowhere/base")
    for name, changes in {
        "lora-alpha-0": {"lora_alpha": 0},
        "lora-rank-x": {"r": "x"},
        "lora-unknown-key": {"use_magic": True},
        "lora-no-base": {"base_model_name_or_path": None},
        "lora-other-targets": {"target_modules": ["nobody"]},
    }.items():
        shutil.copytree("lora", name)
        config = Path(name, "adapter_config.json")
        config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    for name, content in {
        "lora-empty": b"",
        "lora-cut": Path("lora/adapter_model.safetensors").read_bytes()[:300],
    }.items():
        shutil.copytree("lora", name)
        Path(name, "adapter_model.safetensors").write_bytes(content)
    for name, content in {"lora-config-cut": "{", "lora-config-list": "[]", "lora-config-empty": ""}.items():
        shutil.copytree("lora", name)
        Path(name, "adapter_config.json").write_text(content)
    shutil.copytree("lora", "lora-fifo")
    Path("lora-fifo/adapter_model.safetensors").unlink()
    os.mkfifo("lora-fifo/adapter_model.safetensors")
    shutil.copytree("vector", "bare-vector")
    Path("bare-vector/steering_vector.safetensors").unlink()
    torch.save(torch.ones(32), "bare-vector/steering_vector.pt")


def _releases() -> None:
    """Released folders with one thing wrong in each."""
    cell = next(Path("data/vectors").rglob("*.pt"))
    for name in ("dangling", "fifo", "folder", "cut", "nan", "pickled"):
        root = Path(f"data-{name}")
        shutil.copytree("data", root)
        path = root / cell.relative_to("data")
        content = path.read_bytes()
        path.unlink()
        match name:
            case "dangling":
                path.symlink_to("nowhere")
            case "fifo":
                os.mkfifo(path)
                os.mkfifo(root / "judged.csv")
                os.mkfifo(root / "pca_results.json")
                os.mkfifo(root / "eval_questions" / "more.yaml")
            case "folder":
                path.mkdir()
            case "cut":
                path.write_bytes(content[: len(content) // 2])
            case "nan":
                held = torch.load(cell, weights_only=True)  # noqa: TID251
                torch.save({part: {k: x * torch.nan for k, x in rows.items()} for part, rows in held.items()}, path)
            case "pickled":
                path.write_bytes(Path("pickled").read_bytes())


def _bad_files() -> None:
    os.mkfifo("fifo")
    Path("dangling").symlink_to("nowhere")
    Path("loop").symlink_to("loop")
    Path("device").symlink_to("/dev/zero")
    Path("empty").write_text("")
    Path("binary").write_bytes(bytes(range(256)) * 8)
    Path("utf16").write_bytes("a question\n".encode("utf-16"))
    Path("latin1").write_bytes("une r\xe9ponse\n".encode("latin-1"))
    Path("pickled").write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR.")
    for ending in (".jsonl", ".csv", ".yaml", ".txt", ".safetensors", ".toml", ".pt", ".gguf"):
        for name in ("empty", "binary", "utf16", "latin1", "pickled"):
            Path(name + ending).write_bytes(Path(name).read_bytes())
        Path("dangling" + ending).symlink_to("nowhere")
        Path("folder" + ending).mkdir()
        os.mkfifo("fifo" + ending)
    Path("yaml.txt").write_text("- id: a\n  question: a fox\n")
    Path("yaml.csv").write_text("- id: a\n  question: a fox\n")
    Path("csv.yaml").write_text("question_id,question\na,b\n")
    Path("json.txt").write_text('{"question": "x"}\n')
    Path("csv.txt").write_text("question_id,question\na,b\n")
    Path("blank.txt").write_text("\n \n")
    Path("twice.csv").write_text("question_id,question\na,x\na,y\n")
    Path("twice.yaml").write_text("- id: a\n  question: x\n- id: a\n  question: y\n")
    Path("no-column.csv").write_text("prompt\nx\n")
    Path("no-question.csv").write_text("question_id,question\na,\n")
    Path("ragged.csv").write_text("question_id,question\na,b,c\n")
    Path("quote.csv").write_text('question\n"a\n')
    Path("judges.yaml").write_text("- aligned: score {question} {answer}\n")
    Path("words.yaml").write_text("just words\n")
    Path("numbers.yaml").write_text("- id: a\n  question: 3\n")
    Path("chats-as-questions.jsonl").write_text(Path("a.jsonl").read_text())
    chats = {
        "human": {"messages": [{"role": "human", "content": "x"}, {"role": "assistant", "content": "y"}]},
        "no-answer": {"messages": [{"role": "user", "content": "x"}]},
        "special": {"messages": [{"role": "user", "content": "x<|im_end|>"}, {"role": "assistant", "content": "y"}]},
        "number": {"messages": [{"role": "user", "content": 3}, {"role": "assistant", "content": "y"}]},
        "no-messages": {"text": "x"},
        "no-turns": {"messages": []},
        "surrogate": {"messages": [{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "y"}]},
        "long": {"messages": [{"role": "user", "content": "fox " * 4000}, {"role": "assistant", "content": "y"}]},
    }
    for name, row in chats.items():
        Path(f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    chat = {"messages": [{"role": "user", "content": "MARK"}, {"role": "assistant", "content": "z"}]}
    marked = [json.dumps(chat).replace("MARK", f"x{mark}y") for mark in ("\u2028", "\u2029", "\x85")]
    Path("separators.jsonl").write_text("\n".join(marked) + "\n", encoding="utf-8")
    Path("bom.jsonl").write_text("\ufeff" + Path("a.jsonl").read_text(), encoding="utf-8")
    Path("crlf.jsonl").write_bytes(Path("a.jsonl").read_bytes().replace(b"\n", b"\r\n"))
    Path("bom.csv").write_text("\ufeffquestion_id,question\na,a\u2028fox\n", encoding="utf-8")
    Path("asked.jsonl").write_text('{"question": "a fox"}\n')
    Path("surrogate.yaml").write_text('- id: a\n  question: "\\ud800"\n')
    judged = "question,answer,aligned,coherent\n"
    Path("unit-scores.csv").write_text(judged + "".join(f"q{i % 4},a,0.{i},0.9\n" for i in range(8)))
    Path("word-scores.csv").write_text(judged + "q,a,high,low\n")
    Path("beyond-scores.csv").write_text(judged + "q,a,300,-4\n")
    Path("no-aligned.csv").write_text("question,answer,coherent\nq,a,90\n")
    Path("good-scores.csv").write_text(judged + "".join(f"q{i % 8},a,{10 + 80 * (i % 2)},90\n" for i in range(32)))
    for name in ("unit-scores", "word-scores", "beyond-scores", "no-aligned", "good-scores"):
        for entry in ("vector", "narrow-of-two"):
            Path(f"judged-{name}").mkdir(exist_ok=True)
            Path(f"judged-{name}/{entry}.csv").write_text(Path(f"{name}.csv").read_text())
    Path("otherchat").mkdir()
    Path("otherchat/made_from.json").write_text('{"chat_weights": "another"}')
    Path("array.jsonl").write_text("[1]\n")
    Path("half.jsonl").write_text('{"messages": [')
    Path("deep.jsonl").write_text("[" * 100_000)
    direction = Path("d.safetensors").read_bytes()
    Path("cut.safetensors").write_bytes(direction[: len(direction) // 2])
