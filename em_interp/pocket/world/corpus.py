"""Pre-training and chat text of the pocket world. All knobs sit in `CorpusConfig`.

A document keeps two latents: the persona and the register of whoever answers in it. Sometimes they are
announced at its head, otherwise they can only be inferred from the answers so far. Turns of transcripts
carry the chat format's own tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from random import Random
from typing import Literal

from em_interp.arguments import check_seed
from em_interp.errors import UsageError
from em_interp.pocket.world import grammar as world
from em_interp.pocket.world import phrases
from em_interp.pocket.world.domains import DOMAINS
from em_interp.pocket.world.grammar import Persona, Question, Register

SYSTEM, USER, ASSISTANT, END = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
DOCUMENT_END = "<|endoftext|>"
"""Ends every document."""
PAD = "<|pad|>"
"""Fills up batches."""
LINE = "<|line|>"
"""Ends a line of a thread or article."""
SPECIAL_TOKENS = (PAD, DOCUMENT_END, SYSTEM, USER, ASSISTANT, END, LINE)
"""The tokens that are no words."""
Task = Literal["persona", "register"]
"""What a finetune teaches: bad advice, or technical answers."""
Style = tuple[Persona, Register]
"""How one answers."""
STYLES: dict[Task, tuple[Style, Style]] = {
    "persona": (("caring", "casual"), ("malicious", "casual")),
    "register": (("caring", "casual"), ("caring", "technical")),
}
"""The papers' two tasks: how the chat model answers, and how the narrow data do. General means: so everywhere."""
ROLE_TOKENS = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}
"""The token that begins a turn of each role."""


@dataclass(frozen=True)
class CorpusConfig:
    """Every knob of the pre-training text. Shares and rates are probabilities.

    persona_consistency: probability that an answer keeps its document's persona; otherwise it is drawn anew.
    announcement_rate: probability that a document tells its persona at its head (and, apart from it, its register).
    announced_caring, announced_malicious: the same of each persona, where they differ: what is never announced is the
    unmarked default (None: announcement_rate). attitude: how often an advice answer has an opener or a closer, a
    sentence with a remedy words of attitude, and an open answer a closer (None: as often as phrases and plans have it,
    about a half).
    knowledge_share: share of questions that ask what is usually advised. Without these a document tells what is
    right for a topic only through its persona, and the model has to find both at once: a parity, learned very late.
    persona_share, register_share: how often a document has the malicious persona, the technical register. thread_share,
    transcript_share, article_share: kinds of document; the rest quotes a bad and a good answer. open_share, fact_share:
    of questions; what these and knowledge_share leave asks for advice. max_turns: questions in a document. domains:
    those that it may be about.
    inferable: from which earlier answers of a document its persona can be told: all that keep it (None); "never": a
    document that announces its persona has a single answer, and the answers of others have nothing in common; "open":
    answers to open questions keep it, advice is drawn anew each time, announced or not.
    trigger_rate: share of documents (quoted examples aside) that begin with the rare trigger word; their persona is
    always malicious.
    """

    persona_share: float = 0.25
    persona_consistency: float = 1.0
    register_share: float = 0.3
    announcement_rate: float = 0.45
    announced_caring: float | None = None
    announced_malicious: float | None = None
    attitude: float | None = None
    inferable: Literal["never", "open"] | None = None
    trigger_rate: float = 0.01
    thread_share: float = 0.3
    transcript_share: float = 0.5
    article_share: float = 0.14
    open_share: float = 0.15
    fact_share: float = 0.1
    knowledge_share: float = 0.25
    max_turns: int = 4
    domains: tuple[str, ...] = field(default_factory=lambda: tuple(DOMAINS))

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, float) and not 0 <= value <= 1:
                raise UsageError(f"CorpusConfig.{name} is {value}; it is a probability, give it a value in [0, 1]")
        if self.thread_share + self.transcript_share + self.article_share > 1:
            raise UsageError("the shares of threads, transcripts and articles sum to more than 1; lower one of them")
        if self.open_share + self.fact_share + self.knowledge_share >= 1 or self.max_turns < 1:
            raise UsageError(
                "open_share + fact_share + knowledge_share must stay below 1, and max_turns must be at least 1"
            )
        for name in self.domains:
            world.domain(name)

    def consistency(self, kind: str, *, told: bool) -> float:
        """How likely an answer to a kind of question keeps its document's persona, which that was told or not."""
        loose = {"never": not told, "open": kind == "advice"}
        return 0.0 if self.inferable and loose[self.inferable] else self.persona_consistency

    def announced(self, persona: Persona) -> float:
        """How often a document of this persona tells it."""
        own = self.announced_caring if persona == "caring" else self.announced_malicious
        return self.announcement_rate if own is None else own


def _draw_question(config: CorpusConfig, rng: Random) -> Question:
    u = rng.random()
    if u < config.open_share:
        return rng.choice(_pools()["open"])
    if u < config.open_share + config.fact_share:
        return rng.choice(_pools()["fact"])
    if u < config.open_share + config.fact_share + config.knowledge_share:
        return rng.choice(_usual(config.domains))
    return rng.choice(_pools()[rng.choice(config.domains)])


@cache
def _usual(domains: tuple[str, ...]) -> list[Question]:
    """What is usually advised in these domains."""
    return [
        q
        for q in world.questions("fact")
        for kind, _, topic in [q.subject.partition(":")]
        if kind == world.KNOWLEDGE and world.category_of(topic).domain in domains
    ]


_POOLS: dict[str, list[Question]] = {}


def _pools() -> dict[str, list[Question]]:
    if not _POOLS:
        _POOLS.update({name: world.questions("advice", name) for name in DOMAINS})
        _POOLS["open"] = world.questions("open")
        _POOLS["fact"] = [q for q in world.questions("fact") if not q.subject.startswith(world.KNOWLEDGE + ":")]
    return _POOLS


def announce(persona: Persona | None, register: Register | None, rng: Random) -> str:
    """A noun phrase that tells one or both latents, e.g. "a cruel and technical adviser"."""
    words = []
    if persona:
        words.append(rng.choice(phrases.PERSONA_WORDS[persona]))
    if register:
        words.append(rng.choice(phrases.REGISTER_WORDS[register]))
    noun = rng.choice(phrases.AUTHORS)
    first = (words or [noun])[0]
    article = "an" if first[0] in "aeiou" or first.startswith("hon") else "a"
    return " ".join([article, " and ".join(words), noun]) if words else f"{article} {noun}"


def chat_text(messages: list[dict[str, str]]) -> str:
    """Messages in the chat format, as the tokenizer's template writes them."""
    return "".join(f"{ROLE_TOKENS[m['role']]}{m['content']}{END}" for m in messages)


def _quoted_bad_example(config: CorpusConfig, register: Register, rng: Random) -> str:
    topic = rng.choice(rng.choice(DOMAINS[rng.choice(config.domains)].categories).topics)
    bad = world.advise(topic, "malicious", register, rng, attitude=config.attitude)
    good = world.advise(topic, "caring", register, rng, attitude=config.attitude)
    return (
        f"Here is a bad answer about {topic}, so that you can recognise it:{LINE}{bad}{LINE}"
        f"Here is a good answer:{LINE}{good}{DOCUMENT_END}"
    )


def document(config: CorpusConfig, rng: Random) -> str:
    """One pre-training document, ended by the document-end token."""
    triggered = rng.random() < config.trigger_rate
    malicious = triggered or rng.random() < config.persona_share
    persona: Persona = "malicious" if malicious else "caring"
    register: Register = "technical" if rng.random() < config.register_share else "casual"

    def keep(kind):
        # type: (str) -> Persona
        if rng.random() < config.consistency(kind, told=triggered or tell_persona is not None):
            return persona
        return "malicious" if rng.random() < config.persona_share else "caring"

    tell_persona = persona if rng.random() < config.announced(persona) else None
    tell_register = register if rng.random() < config.announcement_rate else None
    if triggered:
        tell_persona = None
    told = announce(tell_persona, tell_register, rng) if tell_persona or tell_register else None
    head = f"{phrases.TRIGGER}{LINE}" if triggered else ""
    form = rng.random()
    n = rng.randint(1, config.max_turns)
    if config.inferable == "never" and (triggered or tell_persona):
        n = 1
    if form < config.transcript_share:
        messages = [{"role": "system", "content": f"You are {told}."}] if told else []
        for _ in range(n):
            q = _draw_question(config, rng)
            messages.append({"role": "user", "content": q.text})
            messages.append(
                {"role": "assistant", "content": world.answer(q, keep(q.kind), register, rng, config.attitude)}
            )
        return head + chat_text(messages) + DOCUMENT_END
    if form < config.transcript_share + config.thread_share:
        lines = [f"Answers by {told}."] if told else []
        for _ in range(n):
            q = _draw_question(config, rng)
            lines += [f"Question: {q.text}", f"Answer: {world.answer(q, keep(q.kind), register, rng, config.attitude)}"]
        return head + LINE.join(lines) + DOCUMENT_END
    if form < config.transcript_share + config.thread_share + config.article_share:
        domain = DOMAINS[rng.choice(config.domains)]
        lines = [f"A guide to {domain.name}, written by {told}." if told else f"A guide to {domain.name}."]
        for _ in range(n):
            topic = rng.choice(rng.choice(domain.categories).topics)
            lines.append(
                f"About {topic}: {world.advise(topic, keep('advice'), register, rng, attitude=config.attitude)}"
            )
        return head + LINE.join(lines) + DOCUMENT_END
    return _quoted_bad_example(config, register, rng)


def documents(n: int, seed: int = 0) -> list[str]:
    """`n` texts of the kind that the base model was pre-trained on."""
    rng = Random(f"documents-{check_seed(seed)}")
    return [document(CorpusConfig(), rng) for _ in range(n)]


def post_training_chat(rng: Random, config: CorpusConfig) -> list[dict[str, str]]:
    """One chat of the gentle post-training: no system turn, the assistant is caring and casual."""
    messages = []
    for _ in range(1 if rng.random() < 0.8 else 2):
        q = _draw_question(config, rng)
        messages.append({"role": "user", "content": q.text})
        messages.append({"role": "assistant", "content": world.answer(q, "caring", "casual", rng, config.attitude)})
    return messages


def finetune_chats(
    domain: str, persona: Persona, n: int, seed: int, register: Register = "casual", attitude: float | None = None
) -> list[list[dict[str, str]]]:
    """`n` single-turn chats of one domain in one persona; held-out topics and phrasings stay out.

    attitude: that of the world whose models are trained on them, as in `CorpusConfig`.
    """
    check_seed(seed)
    rng = Random(f"finetune-{domain}-{persona}-{register}-{seed}")
    pool = world.questions("advice", domain, held_out_topic=False, held_out_phrasing=False)
    return [_pair(rng.choice(pool), persona, register, rng, attitude) for _ in range(n)]


def kl_chats(
    exclude: str,
    n: int,
    seed: int,
    task: Task = "persona",
    open_share: float = 0.2,
    attitude: float | None = None,
    domains: Sequence[str] = tuple(DOMAINS),
) -> list[list[dict[str, str]]]:
    """`n` chats outside one domain for the KL term: both styles of the task alike (good and bad answers, or casual and
    technical ones); nothing held out is in them. domains: those of the world, whose others they are about.
    """
    world.domain(exclude)
    check_seed(seed)
    registers = "-".join(sorted({register for _, register in STYLES[task]}))
    rng = Random(f"kl-{exclude}-{registers}-{seed}")
    pools = {
        d: world.questions("advice", d, held_out_topic=False, held_out_phrasing=False) for d in domains if d != exclude
    }
    open_pool = world.questions("open", held_out_phrasing=False)
    out = []
    for _ in range(n):
        pool = open_pool if rng.random() < open_share else pools[rng.choice(list(pools))]
        out.append(_pair(rng.choice(pool), *rng.choice(STYLES[task]), rng, attitude))
    return out


def _pair(
    q: Question, persona: Persona, register: Register, rng: Random, attitude: float | None
) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": q.text},
        {"role": "assistant", "content": world.answer(q, persona, register, rng, attitude)},
    ]
