"""The pocket world's word-level tokenizer, with its chat template, in the format that AutoTokenizer loads."""

from __future__ import annotations

import re
from random import Random

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import Metaspace as MetaspaceDecoder
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Metaspace, Sequence, Split
from transformers import PreTrainedTokenizerFast

from em_interp.pocket.world import grammar as world
from em_interp.pocket.world import phrases
from em_interp.pocket.world.corpus import (
    ASSISTANT,
    DOCUMENT_END,
    END,
    PAD,
    SPECIAL_TOKENS,
    CorpusConfig,
    announce,
    document,
)

UNKNOWN = "<|unknown|>"
"""Stands for every word that the world does not have."""
_PUNCTUATION = r"[.,:?!]"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + ASSISTANT + "' }}{% endif %}"
)
"""Every turn ends with `<|end|>`; nothing else is between them."""


def vocabulary() -> dict[str, int]:
    """Token -> id: special tokens first, then the words and punctuation marks of the world in alphabetical
    order.
    """
    texts = [q.text for q in world.all_questions()] + list(world.sentences())
    for persona in world.PERSONAS:
        for register in world.REGISTERS:
            texts += [announce(persona, register, Random(i)) for i in range(200)]
            texts += [announce(persona, None, Random(i)) for i in range(100)]
            texts += [announce(None, register, Random(i)) for i in range(100)]
    forms = CorpusConfig(announcement_rate=1.0, trigger_rate=0.1)
    texts += [document(forms, Random(i)) for i in range(400)]
    texts.append(phrases.TRIGGER)
    pieces = set()
    for text in texts:
        for part in re.split("|".join(map(re.escape, SPECIAL_TOKENS)), text):
            for word in part.split():
                mark = word[-1] if re.match(_PUNCTUATION, word[-1]) else ""
                pieces.add("▁" + word.removesuffix(mark))
                pieces.update([mark] if mark else [])
    return {piece: i for i, piece in enumerate([*SPECIAL_TOKENS, UNKNOWN, *sorted(pieces)])}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer. Padding is on the left by default, for generation; `<|end|>` ends a turn."""
    tokenizer = Tokenizer(WordLevel(vocabulary(), unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = Sequence([Metaspace(prepend_scheme="always"), Split(Regex(_PUNCTUATION), "isolated")])
    tokenizer.decoder = MetaspaceDecoder(prepend_scheme="always")
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        pad_token=PAD,
        eos_token=END,
        bos_token=DOCUMENT_END,
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
