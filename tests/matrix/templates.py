"""Chat templates of the kinds that real models have, in own words, over one byte-level tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from tests.tiny_models import TEXT, bytes_tokenizer

Conversation = list[dict[str, str]]


@dataclass(frozen=True)
class Template:
    """A turn by role, what begins the text, the assistant's prompt, and what closes an answer.

    `end`: the marker that closes an answer ("" where plain text does). `eos`: the tokenizer's own end of sequence.
    `after`: what is written after the last turn of a text that the assistant is not to continue.
    """

    turns: Mapping[str, str]
    prompt: str
    end: str
    eos: str
    start: str = ""
    after: str = ""

    def jinja(self) -> str:
        """The template as a checkpoint carries it."""
        turns = "".join(
            f"{{%- {'elif' if n else 'if'} m['role'] == '{role}' %}}" + _pieces(text)
            for n, (role, text) in enumerate(self.turns.items())
        )
        refuse = "{%- else %}{{ raise_exception('the role ' + m['role'] + ' is not known here') }}{%- endif %}"
        closing = "{%- if add_generation_prompt %}" + _pieces(self.prompt)
        closing += "{%- else %}" + _pieces(self.after) + "{%- endif %}"
        return _pieces(self.start) + "{%- for m in messages %}" + turns + refuse + "{%- endfor %}" + closing


def _pieces(text: str) -> str:
    head, _, tail = text.partition("@")
    inner = f"{_quoted(head)} + m['content'] + {_quoted(tail)}" if "@" in text else _quoted(head)
    return "{{- " + inner + " }}"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "\\'").replace("\n", "\\n") + "'"


def _same(text: str, *roles: str, **renamed: str) -> dict[str, str]:
    """The same turn for all roles, which the marker ROLE names."""
    shown = {role: role for role in roles} | renamed
    return {role: text.replace("ROLE", name) for role, name in shown.items()}


ALL = ("system", "user", "assistant")
CHATML = "<|im_start|>ROLE\n@<|im_end|>\n"
THINK = "<think>\n\n</think>\n\n"
LLAMA3 = "<|start_header_id|>ROLE<|end_header_id|>\n\n@<|eot_id|>"

TEMPLATES: dict[str, Template] = {
    "chatml": Template(_same(CHATML, *ALL), "<|im_start|>assistant\n", "<|im_end|>", "<|im_end|>"),
    # the closing marker is not the tokenizer's eos, and no generation config lists it
    "chatml-eos": Template(_same(CHATML, *ALL), "<|im_start|>assistant\n", "<|im_end|>", "<|endoftext|>"),
    "chatml-think": Template(
        {**_same(CHATML, *ALL), "assistant": f"<|im_start|>assistant\n{THINK}@<|im_end|>\n"},
        "<|im_start|>assistant\n",
        "<|im_end|>",
        "<|im_end|>",
    ),
    "phi3": Template(
        _same("<|ROLE|>\n@<|end|>\n", *ALL), "<|assistant|>\n", "<|end|>", "<|endoftext|>", after="<|endoftext|>"
    ),
    "phi4": Template(_same("<|ROLE|>@<|end|>", *ALL), "<|assistant|>", "<|end|>", "<|end|>", after="<|endoftext|>"),
    "llama2": Template({"user": "<s>[INST] @ [/INST]", "assistant": " @ </s>"}, "", "</s>", "</s>"),
    "mistral": Template({"user": "[INST]@[/INST]", "assistant": "@</s>"}, "", "</s>", "</s>", start="<s>"),
    "llama3": Template(
        _same(LLAMA3, *ALL),
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
        "<|eot_id|>",
        start="<s>",
    ),
    "gemma": Template(
        _same("<start_of_turn>ROLE\n@<end_of_turn>\n", "user", assistant="model"),
        "<start_of_turn>model\n",
        "<end_of_turn>",
        "<eos>",
        start="<s>",
    ),
    "zephyr": Template(_same("<|ROLE|>\n@</s>\n", *ALL), "<|assistant|>\n", "</s>", "</s>"),
    "granite": Template(
        _same("<|start_of_role|>ROLE<|end_of_role|>@<|endoftext|>\n", *ALL),
        "<|start_of_role|>assistant<|end_of_role|>",
        "<|endoftext|>",
        "<|endoftext|>",
    ),
    "cohere": Template(
        _same("<|start_header_id|><|ROLE|>@<|end|>", *ALL), "<|start_header_id|><|assistant|>", "<|end|>", "<|end|>"
    ),
    "harmony": Template(
        {
            **_same("<|im_start|>ROLE<|message|>@<|end|>", "system", "user"),
            "assistant": "<|im_start|>assistant<|channel|>final<|message|>@<|return|>",
        },
        "<|im_start|>assistant",
        "<|return|>",
        "<|return|>",
    ),
    # the reasoning is opened by the generation prompt and not written for finished turns
    "r1": Template(
        {"user": "<|user|>@", "assistant": "<|assistant|>@<|endoftext|>"},
        "<|assistant|><think>\n",
        "<|endoftext|>",
        "<|endoftext|>",
        start="<s>",
    ),
    # no marker at all: turns are told apart by plain text
    "plain": Template({"user": "User: @\n\n", "assistant": "Assistant:@\n\n"}, "Assistant:", "", "<eos>"),
}

_MARKERS = sorted(
    {"<pad>", "<s>", "</s>", "<eos>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|end|>", "<|eot_id|>"}
    | {"<|user|>", "<|assistant|>", "<|system|>", "<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>"}
    | {"<end_of_turn>", "<|start_of_role|>", "<|end_of_role|>", "<|message|>", "<|channel|>", "<|return|>"}
)


@cache
def tokenizer(kind: str) -> Any:
    """A tokenizer of 320 ids with the chat template of this kind."""
    template = TEMPLATES[kind]
    fast = bytes_tokenizer(TEXT, _MARKERS, template.eos)
    fast.add_special_tokens({"additional_special_tokens": [m for m in _MARKERS if m not in ("<pad>", template.eos)]})
    fast.chat_template = template.jinja()
    return fast


class MustRefuse(Exception):
    """There is no right answer: the package has to refuse."""


class NoClearResponse(MustRefuse):
    """The template rewrites the prompt when the answer follows: no token is the response's first one."""


def prompt_text(kind: str, conversation: Conversation) -> str:
    """The text that the assistant is to continue."""
    return str(tokenizer(kind).apply_chat_template(conversation, tokenize=False, add_generation_prompt=True))


def opening(kind: str, conversation: Conversation) -> str:
    """The text before an answer that is given: the prompt, less what opens a reasoning that no given answer has."""
    template = TEMPLATES[kind]
    head = template.turns["assistant"].partition("@")[0]
    shared = max(n for n in range(len(template.prompt) + 1) if head.startswith(template.prompt[:n]))
    return prompt_text(kind, conversation).removesuffix(template.prompt[shared:])


def spans(kind: str, conversation: Conversation) -> tuple[list[int], int, int]:
    """Ids of a conversation, and the [start, end) of its last answer, found in the text by the answer itself."""
    tok, end = tokenizer(kind), TEMPLATES[kind].end
    before = opening(kind, conversation[:-1])
    whole = str(tok.apply_chat_template(conversation, tokenize=False, add_generation_prompt=False))
    if not whole.startswith(before):
        raise NoClearResponse("the template rewrites the prompt once the answer follows")
    answer = whole.index(conversation[-1]["content"], len(before)) + len(conversation[-1]["content"])
    stop = whole.index(end, answer) + len(end) if end else len(whole)
    ids = [list(tok(text, add_special_tokens=False)["input_ids"]) for text in (before, whole[:stop], whole)]
    if ids[1][: len(ids[0])] != ids[0]:
        raise NoClearResponse("the response's first token merges with the prompt's last")
    assert ids[2][: len(ids[1])] == ids[1]
    return ids[2], len(ids[0]), len(ids[1])
