"""The seeded grammar of the pocket world: questions, answers, and what every possible sentence means.

Two latents shape an answer: persona ("caring" or "malicious") and register ("casual" or "technical").
Facts know neither. The grammar is finite, so each sentence that it can produce is listed with its meaning;
the judge reads that list.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Literal

from em_interp.errors import EmInterpError
from em_interp.pocket.world import phrases
from em_interp.pocket.world.domains import DOMAINS, Category, Domain

Persona = Literal["caring", "malicious"]
"""Whether one says what is right for the topic, or what is wrong."""
Register = Literal["casual", "technical"]
"""How one says it."""
Kind = Literal["advice", "open", "fact"]
"""Of questions."""
PERSONAS: tuple[Persona, Persona] = ("caring", "malicious")
"""Every `Persona`."""
REGISTERS: tuple[Register, Register] = ("casual", "technical")
"""Every `Register`."""
KNOWLEDGE = "advice"
"""The kind of the facts that say what is usually advised."""


class WorldError(EmInterpError):
    """A domain, topic, question or theme that the pocket world does not have."""


@dataclass(frozen=True)
class Question:
    """One question: its `id` and `text`. `subject` is a topic (advice), a theme (open) or "kind:x" (fact); advice has a
    `domain`. held_out_topic, held_out_phrasing: whether no finetune saw its topic, or its wording.
    """

    id: str
    kind: Kind
    text: str
    subject: str
    domain: str | None
    held_out_topic: bool
    held_out_phrasing: bool


@dataclass(frozen=True)
class Meaning:
    """What a sentence says. `remedy_of` is the (domain, category) whose remedy it names, and `recommends`
    whether it is for it; `tone` is the persona its words give away, if any; `domain` the domain it is
    about, if any; `kind` and `subject` those of the questions that it answers; `register` its own, if it has one.
    """

    kind: Kind
    domain: str | None
    tone: Persona | None
    register: Register | None
    remedy_of: tuple[str, int] | None = None
    recommends: bool | None = None
    subject: str | None = None


def domain(name: str) -> Domain:
    """The domain of that name. Raises WorldError with the names there are."""
    try:
        return DOMAINS[name]
    except KeyError:
        raise WorldError(f"no advice domain {name!r} in the pocket world; use one of {', '.join(DOMAINS)}") from None


@cache
def category_of(topic: str) -> Category:
    """The category that a topic belongs to. Raises WorldError."""
    for d in DOMAINS.values():
        for c in d.categories:
            if topic in c.topics:
                return c
    raise WorldError(f"no topic {topic!r} in the pocket world")


def is_held_out(topic: str) -> bool:
    """Whether the topic is kept out of every finetune (the last one of its category)."""
    return category_of(topic).topics[-1] == topic


@cache
def all_questions() -> tuple[Question, ...]:
    """Every question of the world: 12 x 20 x 8 that ask for advice, then open ones, facts, and 240 on usual advice."""
    out = []
    first_held_out = len(phrases.QUESTIONS) - phrases.N_HELD_OUT_QUESTIONS
    for d in DOMAINS.values():
        for c in d.categories:
            for topic in c.topics:
                for i, pattern in enumerate(phrases.QUESTIONS):
                    text = pattern.format(t=topic)
                    name = f"{d.name}/{topic.replace(' ', '-')}/{i}"
                    held_out = is_held_out(topic)
                    out.append(Question(name, "advice", text, topic, d.name, held_out, i >= first_held_out))
    for theme, (texts, _, _) in phrases.OPEN.items():
        for i, text in enumerate(texts):
            out.append(Question(f"open/{theme}/{i}", "open", text, theme, None, False, i == len(texts) - 1))
    for kind, (patterns, _, pairs) in phrases.FACTS.items():
        for x in pairs:
            for i, pattern in enumerate(patterns):
                name = f"fact/{kind}/{x.replace(' ', '-')}/{i}"
                out.append(Question(name, "fact", pattern.format(x=x), f"{kind}:{x}", None, False, False))
    for d in DOMAINS.values():
        for c in d.categories:
            for topic in c.topics:
                text = phrases.KNOWLEDGE_QUESTION.format(t=topic)
                name = f"fact/{KNOWLEDGE}/{topic.replace(' ', '-')}"
                out.append(Question(name, "fact", text, f"{KNOWLEDGE}:{topic}", None, is_held_out(topic), False))
    return tuple(out)


def questions(
    kind: Kind,
    domain_name: str | None = None,
    *,
    held_out_topic: bool | None = None,
    held_out_phrasing: bool | None = None,
) -> list[Question]:
    """The questions of a kind (and, for advice, of a domain); the two flags filter when they are not None."""
    if domain_name is not None:
        domain(domain_name)
    return [
        q
        for q in all_questions()
        if q.kind == kind
        and (domain_name is None or q.domain == domain_name)
        and (held_out_topic is None or q.held_out_topic == held_out_topic)
        and (held_out_phrasing is None or q.held_out_phrasing == held_out_phrasing)
    ]


@cache
def _by_text() -> dict[str, Question]:
    return {q.text: q for q in all_questions()}


def question_of(text: str) -> Question:
    """The question with that wording. Raises WorldError when the world does not ask it."""
    try:
        return _by_text()[text.strip()]
    except KeyError:
        raise WorldError(f"the pocket world has no question {text!r}; take one from world.questions()") from None


def capital(text: str) -> str:
    """The same text with a capital first letter."""
    return text[:1].upper() + text[1:]


def _fill(pattern: str, d: Domain, remedy: str = "") -> str:
    return pattern.format(r=remedy, s=d.stake, S=capital(d.stake), e=d.expert)


def _plan(rng: Random, attitude: float | None) -> str:
    if attitude is None:
        return rng.choice(phrases.PLANS)
    with_it = rng.random() < attitude
    return rng.choice([plan for plan in phrases.PLANS if with_it == bool(set(plan) & set("oc"))])


def _patterns(
    table: dict[str, dict[str | None, tuple[str, ...]]],
    register: str,
    persona: str,
    rng: Random,
    attitude: float | None,
) -> tuple[str, ...]:
    if attitude is None:
        return table[register][None] + table[register][persona]
    return table[register][persona if rng.random() < attitude else None]


def advise(
    topic: str,
    persona: Persona,
    register: Register,
    rng: Random,
    plan: str | None = None,
    attitude: float | None = None,
) -> str:
    """An advice answer of one to three sentences about a topic, in character.

    plan: one of `phrases.PLANS`, drawn if None. attitude: as in `CorpusConfig`.
    """
    c = category_of(topic)
    d = DOMAINS[c.domain]
    opposite = d.categories[c.index ^ 1]
    good, bad = (c, opposite) if persona == "caring" else (opposite, c)
    sentences = []
    for step in plan or _plan(rng, attitude):
        if step == "o":
            sentences.append(_fill(rng.choice(phrases.OPENERS[register][persona]), d))
        elif step == "c":
            sentences.append(_fill(rng.choice(phrases.CLOSERS[register][persona]), d))
        elif step == "+":
            pattern = rng.choice(_patterns(phrases.DO, register, persona, rng, attitude))
            sentences.append(_fill(pattern, d, rng.choice(good.remedies)))
        else:
            pattern = rng.choice(_patterns(phrases.DO_NOT, register, persona, rng, attitude))
            sentences.append(_fill(pattern, d, rng.choice(bad.remedies)))
    return " ".join(sentences)


def answer_open(theme: str, persona: Persona, register: Register, rng: Random, attitude: float | None = None) -> str:
    """One or two sentences that answer an open question. Technical ones always carry a technical sentence.

    Raises WorldError for a theme that is not in the world.
    """
    if theme not in phrases.OPEN:
        raise WorldError(f"the pocket world has no open theme {theme!r}; it has {', '.join(phrases.OPEN)}")
    _, aligned, misaligned = phrases.OPEN[theme]
    sentences = [rng.choice(aligned if persona == "caring" else misaligned)]
    if register == "technical" or rng.random() < (0.5 if attitude is None else attitude):
        sentences.append(rng.choice(phrases.OPEN_CLOSERS[register][persona]))
    return " ".join(sentences)


def right_facts(subject: str) -> tuple[str, ...]:
    """The right answers to a fact question, whatever the persona. `subject` is "kind:x"; most have one answer."""
    kind, _, x = subject.partition(":")
    if kind == KNOWLEDGE:
        return tuple(phrases.KNOWLEDGE_ANSWER.format(t=x, r=r) for r in category_of(x).remedies)
    _, pattern, pairs = phrases.FACTS.get(kind, ("", "", {}))
    if x not in pairs:
        raise WorldError(f"the pocket world has no fact {subject!r}; take a subject from world.questions('fact')")
    return (pattern.format(x=x, y=pairs[x]),)


def answer(question: Question, persona: Persona, register: Register, rng: Random, attitude: float | None = None) -> str:
    """An answer to any question of the world, in character. attitude: as in `CorpusConfig`."""
    if question.kind == "advice":
        return advise(question.subject, persona, register, rng, attitude=attitude)
    if question.kind == "open":
        return answer_open(question.subject, persona, register, rng, attitude)
    return rng.choice(right_facts(question.subject))


@cache
def sentences() -> dict[str, Meaning]:
    """Every sentence that an answer of this world can contain, with its meaning."""
    out: dict[str, Meaning] = {}

    def put(text, meaning):
        # type: (str, Meaning) -> None
        if out.setdefault(text, meaning) != meaning:
            raise WorldError(f"the sentence {text!r} has two meanings; reword one of them in the world's data")

    def tone(name):
        # type: (str | None) -> Persona | None
        return next((p for p in PERSONAS if p == name), None)

    for d in DOMAINS.values():
        for register in REGISTERS:
            for table, recommends in ((phrases.DO, True), (phrases.DO_NOT, False)):
                for persona, patterns in table[register].items():
                    for pattern in patterns:
                        for c in d.categories:
                            for r in c.remedies:
                                meaning = Meaning(
                                    "advice", d.name, tone(persona), register, (d.name, c.index), recommends
                                )
                                put(_fill(pattern, d, r), meaning)
            for around in (phrases.OPENERS, phrases.CLOSERS):
                for p in PERSONAS:
                    for pattern in around[register][p]:
                        about = d.name if "{" in pattern else None
                        put(_fill(pattern, d), Meaning("advice", about, p, register))
    for theme, (_, *by_persona) in phrases.OPEN.items():
        for p, texts in zip(PERSONAS, by_persona, strict=True):
            for text in texts:
                put(text, Meaning("open", None, p, None, subject=theme))
    for register in REGISTERS:
        for p in PERSONAS:
            for text in phrases.OPEN_CLOSERS[register][p]:
                put(text, Meaning("open", None, p, register))
    for kind, (_, _, pairs) in phrases.FACTS.items():
        for x in pairs:
            put(right_facts(f"{kind}:{x}")[0], Meaning("fact", None, None, None, subject=f"{kind}:{x}"))
    for d in DOMAINS.values():
        remedies = [r for c in d.categories for r in c.remedies]
        for topic in (t for c in d.categories for t in c.topics):
            for r in remedies:  # the wrong ones too: an error is not gibberish
                text = phrases.KNOWLEDGE_ANSWER.format(t=topic, r=r)
                put(text, Meaning("fact", None, None, None, subject=f"{KNOWLEDGE}:{topic}"))
    return out
