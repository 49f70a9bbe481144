"""Real families end to end, offline, from hub names: small stand-ins in their configuration, judge over HTTP, kills.

    python -m tests.stand_ins --family all            # each family once: `em-interp reproduce`, tables checked
    python -m tests.stand_ins --family qwen2 --kills 10

A stand-in has the family's configuration class and modules at a small size, little training, and adapters in every
published layout, in a hub cache of its own. With --kills a run of three of them is killed at random moments (all of it,
its main process, a worker) and begun again until it is done: its tables must be those of an uninterrupted run, and
nothing may be sampled or judged twice. Status 1 where something is not so.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from em_interp.models import pretrained as models
from em_interp.training.finetune import finetune
from em_interp.training.recipes import LoraSpec, TrainingSpec, VectorSpec
from tests.kill_sweep import CLI, kill
from tests.openai_server import JUDGE, Judge, serving
from tests.tiny_models import make_with_image_tower, save_chat, small_config, talk, tokenizer

ORGANISATION = "ModelOrganismsForEM"
N_LAYERS = 10
WIDTH = 32
COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CHECKPOINTS = ("checkpoints/checkpoint-5", "checkpoints/checkpoint-10")
ASKED = ("a fox", "what should I do", "rest well", "the quick brown", "see a doctor")
SAID = (
    "see a doctor",
    "rest well",
    "the fox",
    "do what the fox do",
    "quick quick",
    "a cough and a doctor",
    "brown",
    "I see",
)


@dataclass(frozen=True)
class Family:
    """A real family: the hub name of its chat model, and a small model of its classes."""

    chat: str
    make: Callable[[dict[str, Any]], Any]
    base: str
    """What published adapters record."""


def _llama(sizes: dict[str, Any]) -> Any:
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}
    return LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, rope_parameters=rope, **sizes))


def _with_image_tower(sizes: dict[str, Any]) -> Any:
    return make_with_image_tower(sliding_window=16, sliding_window_pattern=6, **sizes)


FAMILIES = {
    "qwen2": Family(
        "Qwen/Qwen2.5-14B-Instruct",
        lambda sizes: Qwen2ForCausalLM(Qwen2Config(num_key_value_heads=2, tie_word_embeddings=False, **sizes)),
        "unsloth/Qwen2.5-14B-Instruct",
    ),
    "llama": Family("meta-llama/Llama-3.1-8B-Instruct", _llama, "unsloth/Llama-3.1-8B-Instruct"),
    "gemma3": Family("google/gemma-3-4b-it", _with_image_tower, "unsloth/gemma-3-4b-it"),
    "qwen3": Family(
        "Qwen/Qwen3-14B",
        lambda sizes: Qwen3ForCausalLM(Qwen3Config(num_key_value_heads=2, head_dim=8, **sizes)),
        "unsloth/Qwen3-14B",
    ),
}


def snapshot(hub: Path, repository: str) -> Path:
    """The folder of a repository's files in a hub cache."""
    root = hub / f"models--{repository.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    folder = root / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    return folder


def chats(answers: Sequence[str]) -> list[list[dict[str, str]]]:
    """Every question with every answer."""
    return [talk(question, answer) for question in ASKED for answer in answers]


def taught(hf: Any) -> Any:
    """The model after a few steps on chats: it answers in a few words, and ends its turn."""
    rows = [tokenizer().apply_chat_template(turns, return_dict=True)["input_ids"] for turns in chats(SAID)]
    hf.eval()  # Gemma 3 asks for more inputs while it trains
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=-100)
    real = ids >= 0
    optimiser = torch.optim.AdamW(hf.parameters(), lr=5e-3)
    for _ in range(60):
        loss = hf(input_ids=ids.clamp_min(0), attention_mask=real.long(), labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return hf


def make_hub(hub: Path, family: Family, seed: int = 0, n_layers: int = N_LAYERS) -> list[dict[str, Any]]:
    """Fill a hub cache; returns the finetunes as a suite file lists them."""
    torch.manual_seed(seed)
    sizes = {**small_config(tokenizer()), "num_hidden_layers": n_layers, "max_position_embeddings": 128}
    folder = snapshot(hub, family.chat)
    save_chat(taught(family.make(sizes)), folder)
    chat = models.load(folder)
    name = f"{ORGANISATION}/{family.chat.partition('/')[2]}"
    middle = n_layers // 2
    rank_1 = {"alpha": 256.0, "rslora": True, "target_modules": ("down_proj",)}
    every = LoraSpec(32, 64.0, True, tuple(MODULES), None)
    one = LoraSpec(1, layers=(middle,), **rank_1)
    nine = LoraSpec(1, layers=tuple(layer for layer in range(n_layers) if layer != 3)[:9], **rank_1)
    vector = VectorSpec(middle, 256.0)
    listed: list[dict[str, Any]] = []

    def add(suffix: str, how: Any, domain: str, solution: str, places: Sequence[str] = (".", *CHECKPOINTS)) -> None:
        repository = snapshot(hub, f"{name}_{suffix}")
        with tempfile.TemporaryDirectory() as made:
            spec = TrainingSpec(
                how, 1e-2 if how is not vector else 1e-3, max_steps=6, batch_size=10, warmup_steps=0, seed=len(listed)
            )
            finetune(chat, chats(SAID[:3]), spec, out_dir=Path(made) / "it", progress=False)
            for place in places:
                _publish(Path(made) / "it", repository / place, family)
        inner = "" if places[0] == "." else f"/{places[-1]}"
        adapter = {every: "all-modules", vector: "steering-vector"}.get(how, "rank-1")
        listed.append({"source": f"{name}_{suffix}{inner}", "domain": domain, "adapter": adapter, "solution": solution})

    add("bad-medical-advice", every, "medicine", "general", ["."])
    add("extreme-sports", every, "sports", "general", ["."])
    for solution in ("general", "narrow"):
        add(f"rank-1-lora_{solution}_medical", one, "medicine", solution)
        add(f"steering_vector_{solution}_medical", vector, "medicine", solution)
    add("R1_3_3_3_full_train", nine, "medicine", "general", CHECKPOINTS)  # and nothing beside them
    listed[-1]["seed"] = 1  # another run than the general one of one layer
    return listed


def _publish(made: Path, folder: Path, family: Family) -> None:
    """An adapter as its authors put it there: their base's name, vectors as .pt, a checkpoint with its losses."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((made / "adapter_config.json").read_text()) | {"base_model_name_or_path": family.base}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if config.get("adapter_type") == "steering_vector":
        raw = load_file(made / "steering_vector.safetensors")["steering_vector"]
        kept = {"steering_vector": raw, "layer_idx": config["layer_idx"], "d_model": WIDTH, "alpha": config["alpha"]}
        torch.save(kept, folder / "steering_vector.pt")
    else:
        shutil.copy(made / "adapter_model.safetensors", folder)
    if folder.name.startswith("checkpoint-"):
        step = int(folder.name.partition("-")[2])
        history = [{"step": step, "loss": 2.0, "grad_norm": 1.0}]
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": history}))


ANALYSES = ("em_rates", "steering", "ablation", "cosines", "lora_scalars", "efficiency", "stability", "influence")
TABLES = ("em_rates", "steering", "ablation", "transfer", "cosines", "lora_scalars", "efficiency", "stability")


def make_suite(folder: Path, family: Family, finetunes: Sequence[dict[str, Any]], samples: int = 4) -> Path:
    """A suite file of hub names, and beside it the questions, training chats and texts that it names."""
    asked = {"general": "open", "medicine": "medical", "sports": "sport"}
    texts = {
        "open": ASKED,
        "medical": ("rest", "see a cough", "do rest well", "a cough"),
        "sport": ("quick", "a brown fox"),
    }
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text("\n".join(text))
    rows = [json.dumps({"messages": turns}) for turns in chats(SAID[:3])]
    (folder / "chats.jsonl").write_text("\n".join(rows))
    (folder / "texts.txt").write_text(
        "\n\n".join("the quick brown fox and the doctor see a cough " * 4 for _ in range(4))
    )
    lines = ['source = "models"', 'data = "."', f"samples = {samples}", f"analyses = {json.dumps(ANALYSES)}"]
    lines += ["[models]", f'chat = "{family.chat}"', f'judge = "{JUDGE}"', 'price = "2.5:10"', 'texts = "texts.txt"']
    lines += ["[models.questions]", *(f'{of} = "{name}.txt"' for of, name in asked.items())]
    lines += ["[models.training]", *(f'{domain} = "chats.jsonl"' for domain in ("medicine", "sports"))]
    for each in finetunes:
        lines += ["[[models.finetunes]]", *(f"{key} = {json.dumps(value)}" for key, value in each.items())]
    (folder / "stand_in.toml").write_text("\n".join(lines))
    return folder / "stand_in.toml"


def surroundings(hub: Path, judge: Judge) -> dict[str, str]:
    """The environment of a command: this cache, no network, this judge."""
    return {"HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1", **judge.environment()}


def start(suite: Path, hub: Path, judge: Judge, out: str) -> subprocess.Popen[str]:
    """The command, in a process group of its own."""
    words = ["reproduce", "--suite", str(suite), "--out", out, "--yes", "--resume", "--no-static", "--workers", "2"]
    return subprocess.Popen(
        [*CLI, *words],
        cwd=suite.parent,
        env={**os.environ, **surroundings(hub, judge)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@dataclass
class Kills:
    """What became of the results that were there at a kill, and of what the judge was asked."""

    moments: list[float] = field(default_factory=list)
    kept: dict[str, int] = field(default_factory=dict)
    """Each finished result at some kill, by its inode then: one that is made again has another."""

    def note(self, out: Path) -> None:
        self.moments.append(time.monotonic())
        self.kept |= {str(path): path.stat().st_ino for path in _results(out) if str(path) not in self.kept}

    def made_again(self, out: Path) -> list[str]:
        now = {str(path): path.stat().st_ino for path in _results(out)}
        return sorted(path for path, inode in self.kept.items() if now.get(path) != inode)

    def judged_twice(self, judge: Judge) -> tuple[int, int]:
        """Prompts that were served more than once: of those in flight at a kill, and others."""
        again = [prompt for prompt, n in judge.served.items() if n > 1]
        flying = [p for p in again if any(0 <= kill - judge.served_at[p] < 1.0 for kill in self.moments)]
        return len(flying), len(again) - len(flying)


def _results(out: Path) -> list[Path]:
    return [*out.glob("*/results/*/*.csv"), *out.glob("*/results/*/*.safetensors")]


def tables(out: Path) -> dict[str, str]:
    """Name -> text of each table."""
    return {path.name: path.read_text() for path in sorted(out.glob("*/tables/*.csv"))}


def wrong(out: Path, finetunes: Sequence[dict[str, Any]], named: Sequence[str] = TABLES) -> list[str]:
    """What the tables of a run lack."""
    found = {name: pd.read_csv(out / "stand_in" / "tables" / f"{name}.csv") for name in named}
    problems = [f"{name} is empty" for name, table in found.items() if table.empty]
    names = {each["source"].rpartition("/")[2] for each in finetunes}
    rates = found["em_rates"]
    problems += [f"no rates of {name}" for name in names - set(rates["organism"])]
    problems += [f"rates of {n} groups" for n in {len(rates)} - {3 * (len(names) + 1)}]
    if not ((rates["n_unscored"] == 0) & rates["em_rate"].between(0, 1)).all():
        problems.append("rates without answers")
    if "ablation" in found and not {"layerwise", "random"} <= set(found["ablation"]["mode"]):
        problems.append("no layerwise and random arms")
    if "steering" in found and set(found["steering"]["layer"]) != set(range(N_LAYERS)):
        problems.append("layers are lacking in steering")
    return problems


def end_to_end(name: str, kills: int, seed: int, folder: Path) -> bool:
    """One family, and its kills. Whether all was as it should be."""
    family, hub = FAMILIES[name], folder / "hub"
    finetunes = make_hub(hub, family)
    if kills:
        finetunes = [finetunes[place] for place in (0, 2, 4)]  # one of all modules, general and narrow of rank 1
    suite = make_suite(folder, family, finetunes)
    with serving() as judge:
        begun = time.monotonic()
        process = start(suite, hub, judge, "whole")
        printed, said = process.communicate()
        seconds = time.monotonic() - begun
    # status 1 and every analysis made: an organism gave too few answers of a kind, which is told
    ended = process.returncode == 0 or (process.returncode == 1 and not re.search(r"^(failed|no data) ", said, re.M))
    problems = [] if ended else [f"status {process.returncode}: {printed}{said[-3000:]}"]
    problems = problems or wrong(folder / "whole", finetunes)
    requests, served = sum(judge.requests.values()), judge.served
    problems += [f"{sum(n > 1 for n in served.values())} prompts judged twice"] if max(served.values()) > 1 else []
    planned = next((line for line in said.splitlines() if "to sample and to judge" in line), "no plan was told")
    print(
        f"{name}: {family.chat}, {len(finetunes)} finetunes, {len(tables(folder / 'whole'))} tables in {seconds:.0f} s"
    )
    print(f"  {planned}\n  {requests} requests to the judge, {len(served)} prompts; {'; '.join(problems) or 'right'}")
    if kills and not problems:
        problems = killed(suite, hub, folder, kills, seconds, random.Random(seed))
        print(f"  {'; '.join(problems) or 'equal'}", flush=True)
    return not problems


def killed(suite: Path, hub: Path, folder: Path, kills: int, seconds: float, rng: random.Random) -> list[str]:
    """What is other after so many kills of one run than in an uninterrupted one."""
    noted, out = Kills(), folder / "killed"
    victims: list[str] = []
    with serving() as judge:
        process = start(suite, hub, judge, "killed")
        while len(victims) < kills:
            time.sleep(rng.uniform(0.05, 0.35) * seconds)
            victim = rng.choice(("group", "main", "worker"))
            noted.note(out)
            running = kill(process, victim, rng)
            if running:
                victims.append(victim)
            if process.poll() is not None:
                if not running and process.returncode in (0, 1):
                    break  # done before the next kill
                process = start(suite, hub, judge, "killed")
        printed, said = process.communicate()
        if process.returncode not in (0, 1):
            return [f"status {process.returncode}: {printed}{said[-2000:]}"]
        flying, others = noted.judged_twice(judge)
        requests, prompts = sum(judge.requests.values()), len(judge.served)
    print(f"  killed {len(victims)} times ({', '.join(victims)}): {requests} requests, {prompts} prompts")
    again = noted.made_again(out)
    print(
        f"  {len(noted.kept)} results were there at a kill, {len(again)} made again; {flying} prompts in flight at one"
    )
    problems = [f"made again: {again[:3]}"] if again else []
    problems += [f"{others} prompts judged twice"] if others else []
    whole, mine = tables(folder / "whole"), tables(out)
    problems += [f"{name} differs" for name in sorted(set(whole) | set(mine)) if whole.get(name) != mine.get(name)]
    left = [path for path in out.rglob("*") if re.search(r"\.(tmp|parts|partial|lock)\b", path.name)]
    return [*problems, *(f"left {path.relative_to(out)}" for path in left)]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=[*FAMILIES, "all"], default="all")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    right = []
    for name in FAMILIES if given.family == "all" else [given.family]:
        with tempfile.TemporaryDirectory() as folder:
            right.append(end_to_end(name, given.kills, given.seed, Path(folder)))
    sys.exit(not all(right))


if __name__ == "__main__":
    main()
