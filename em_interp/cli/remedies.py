"""The package's messages speak Python; here their remedies are said in options."""

from __future__ import annotations

import re
from typing import Final

_IN_OPTIONS: Final = {
    r"any_base=True(?: in Python, --any-base on the command line)?": "--any-base",
    r"(?:--any-model, in Python )?direction\.for_model\([\w.]+\)": "--any-model",
    r"from_layer \(--from-layer\)": "--from-layer",
    r"load\(.*, base=\.\.\.\), or --base on the command line": "--base MODEL",
    r"load\(source, base=MODEL\), a ChatModel, a folder": "--base MODEL, a folder",
    r"read it with em_interp\.solutions\.load\.load\(folder, base=model\), and give that to add_adapter": (
        "give its base as --model, and it as --adapter"
    ),
    r"models\.load\(base, adapter=folder\)": "--model BASE --adapter FOLDER",
    r"an adapter goes into `adapter=`": "an adapter goes into --adapter",
    r"Give its base model's name, and it as `adapter`": "Give its base as --model, and it as --adapter",
    r"with base=model\b": "with --base MODEL",
    r"a smaller dtype, a larger device \(device_map='auto'\)": "a smaller --dtype, a larger device (--device-map auto)",
    r"device_map\b": "--device-map",
    r"Switch it off with model\.no_adapter\(\)": "Leave --adapter out",
    r"drop `scope` and `layers` from the ablation": "leave --layer out",
    r"Leave `layers` out": "Leave --layer out",
    r"dataclasses\.replace\(solution, base=.*?\)(?=\.$|\. |$)": "write any_base = true beside it in the suite file",
    r"\bmax_new_tokens(?:=| is )": "--max-new-tokens ",
    r"\btokens_per_batch(?:=| is )": "--tokens-per-batch ",
    r"\brandom_arms(?:=| is )": "--random ",
    r"\bn=": "--n ",
    r"\btemperature=": "temperature ",
    r"\bpass by='response'": "give more responses",
}
"""What a message says in Python, a pattern, and the words of the command line for it."""


def in_options(message: str) -> str:
    """A message with its remedy in options, for the terminal."""
    for python, option in _IN_OPTIONS.items():
        message = re.sub(python, option, message)
    return message


def brief(message: str, longest: int = 300) -> str:
    """A message in a line or two: of a traceback the error itself, of a long one the beginning and the end."""
    line = " ".join(message.strip().splitlines()[-1].split()) if message.startswith("Traceback") else message
    line = in_options(" ".join(line.split()))
    if len(line) <= longest:
        return line
    problem, remedy, what_to_do = line.partition(" To fix it: ")
    room = max(longest - len(remedy + what_to_do), longest // 2)
    return f"{problem[: room - 1]}…{remedy}{what_to_do}"
