"""One reader for questions, chats and texts, whichever command or suite asks: YAML, JSON Lines, CSV or plain text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Final

import yaml

from em_interp.arguments import count
from em_interp.errors import AmbiguousDataError, BadValueError, MissingDataError, UnreadableFileError, UsageError
from em_interp.files.inputs import open_text, read_csv, read_text

ROLES: Final = ("system", "user", "assistant", "tool")
"""Who may speak in a chat."""
Texts = Path | str | Iterable[str] | Iterable[Mapping[str, Any]]
"""What `read_texts` takes: a file, texts, or mappings with `text`."""

_KINDS: Final = {
    ".yaml": "YAML",
    ".yml": "YAML",
    ".jsonl": "JSON Lines",
    ".ndjson": "JSON Lines",
    ".csv": "CSV",
    ".txt": "text",
    "": "text",
}
_ENTRY_KEY: Final = re.compile(r"^[ -]*[\"']?(id|question|paraphrases|judge_prompts)[\"']?[ ]*:(\s|$)", re.M)
_CHAT: Final = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'


@dataclass(frozen=True)
class Question:
    """One question: its wordings, what comes before it, and the judge prompts that come with it."""

    id: str
    """What answers and tables call it."""
    paraphrases: tuple[str, ...]
    """Its wordings, one or more."""
    judge_prompts: dict[str, str] = field(default_factory=dict)
    """Score -> the prompt that asks a judge for it."""
    system: str | None = None
    """The system prompt, if any."""
    samples_per_paraphrase: int | None = None
    """How many answers to each wording the file asks for; kept, not obeyed."""
    earlier: tuple[dict[str, str], ...] = ()
    """Turns between the system prompt and the question."""

    def turns(self, wording: int = 0) -> list[dict[str, str]]:
        """The conversation that one wording of it ends."""
        system = [{"role": "system", "content": self.system}] if self.system is not None else []
        return [*system, *self.earlier, {"role": "user", "content": self.paraphrases[wording]}]


@dataclass(frozen=True)
class QuestionSet:
    """The questions of the file at `path`."""

    path: Path
    questions: tuple[Question, ...]

    @property
    def name(self) -> str:
        """The file's, without its ending."""
        return self.path.stem

    @property
    def texts(self) -> frozenset[str]:
        """Every wording, for recognising which set an answer file belongs to."""
        return frozenset(text.strip() for question in self.questions for text in question.paraphrases)

    def asked(self) -> dict[str, list[dict[str, str]]]:
        """What to ask, by id; the wordings of a question that has several are ID/0, ID/1, ..."""
        named = {question.id: question for question in self.questions}
        return {key: named[name].turns(i) for key, (name, i) in self.wordings().items()}

    def wordings(self) -> dict[str, tuple[str, int]]:
        """Of each id in `asked`: the question's, and the number of its wording."""
        return {
            question.id if len(question.paraphrases) == 1 else f"{question.id}/{i}": (question.id, i)
            for question in self.questions
            for i in range(len(question.paraphrases))
        }

    def __str__(self) -> str:
        wordings = [len(question.paraphrases) for question in self.questions]
        each = f"{min(wordings)}" if len(set(wordings)) == 1 else f"{min(wordings)}-{max(wordings)}"
        system = sum(question.system is not None for question in self.questions)
        return f"{self.path.name}: {_number(sum(wordings), 'question')}, {_number(len(wordings), 'id')}, " + (
            f"{each} wording{'' if each == '1' else 's'} each" + (f", {system} with a system prompt" if system else "")
        )


def read_questions(path: str | PathLike[str]) -> QuestionSet:
    """Questions from YAML, JSON Lines, CSV or plain text, by the file's ending and content, which must agree.

    YAML: the released lists of `id` with `question` or `paraphrases`. JSON Lines: `question` (and `question_id` or
    `id`, `system`), or `messages` that end with the user's turn. CSV: the same columns. Text: one question a line.
    Without ids they are STEM_0, STEM_1, ... Raises MissingDataError, UnreadableFileError, BadValueError (an empty
    question, a role that does not exist), AmbiguousDataError (an id that comes twice).
    """
    text = read_text(path)
    path = Path(path)
    match _kind(path, text):
        case "YAML":
            questions = [question_of(path, item) for item in yaml_entries(path)]
        case "JSON Lines":
            rows = json_lines(path)
            questions = [_question_of_row(path, f"line {line}", row, i) for i, (line, row) in enumerate(rows)]
        case "CSV":
            questions = _questions_of_csv(path)
        case _:
            lines = [line.strip() for line in text.split("\n") if line.strip()]
            questions = [Question(f"{path.stem}_{i}", (line,)) for i, line in enumerate(lines)]
    if not questions:
        raise MissingDataError(path, "it holds no question", "write one question a line, row or entry")
    return question_set(path, questions)


def question_set(path: Path, questions: Sequence[Question]) -> QuestionSet:
    """Questions whose ids differ. Raises AmbiguousDataError."""
    names = [question.id for question in questions]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise AmbiguousDataError(
            path, f"question ids come more than once: {', '.join(twice[:5])}", "give each question its own id"
        )
    return QuestionSet(path, tuple(questions))


def yaml_entries(path: Path) -> list[dict[str, Any]]:
    """The mappings of a YAML list. Raises UnreadableFileError."""
    try:
        content = yaml.safe_load(read_text(path))
        json.dumps(content, ensure_ascii=False, skipkeys=True, default=str).encode()  # half of a surrogate pair
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        first = " ".join(str(error).split())[:160]
        raise UnreadableFileError(path, f"it is not readable YAML ({first})", "repair or download it again") from error
    if not isinstance(content, list) or not content or not all(isinstance(item, dict) for item in content):
        raise UnreadableFileError(
            path, "it is not a list of entries", "give each question an entry with `id` and `question`"
        )
    return content


def question_of(path: Path, item: Mapping[str, Any]) -> Question:
    """A question from an entry of YAML. Raises UnreadableFileError or BadValueError."""
    if item.get("id") is None:
        keys = ", ".join(map(str, item))
        judge = any(isinstance(text, str) and "{answer}" in text for text in item.values())
        what = "holds judge prompts, not questions" if judge else "has an entry without an id"
        raise UnreadableFileError(path, f"it {what} (keys {keys})", "give each question an `id`")
    name = str(item["id"])
    wordings = item.get("paraphrases", item.get("question"))
    wordings = [wordings] if isinstance(wordings, str) else wordings
    if not isinstance(wordings, list) or not wordings or not all(isinstance(text, str) for text in wordings):
        raise UnreadableFileError(
            path, f"question {name!r} has no wording", "give it `question` or a list of `paraphrases`"
        )
    if any(not text.strip() for text in wordings):
        raise BadValueError(path, f"question {name!r} has an empty wording", "write it, or leave it out")
    prompts = item.get("judge_prompts") or {}
    if not isinstance(prompts, dict):
        raise UnreadableFileError(path, f"judge_prompts of {name!r} is not a mapping", "name each judge")
    system, samples = item.get("system"), item.get("samples_per_paraphrase")
    if not (system is None or isinstance(system, str)):
        raise BadValueError(path, f"system of {name!r} is {system!r:.60}, not text", "write it as text")
    if samples is not None:
        try:
            samples = count("samples_per_paraphrase", samples)
        except UsageError as error:
            raise BadValueError(path, f"question {name!r}: {error}", "give a whole number") from error
    return Question(name, tuple(wordings), {str(k): str(text) for k, text in prompts.items()}, system, samples)


def _questions_of_csv(path: Path) -> list[Question]:
    header, body = read_csv(path)
    if "question" not in header or len(set(header)) < len(header):
        raise MissingDataError(
            path, f"it needs one column question; it has {', '.join(header)}", "name the column question"
        )
    rows = ({key: cell for key, cell in zip(header, row, strict=True) if cell.strip()} for row in body)
    return [_question_of_row(path, f"row {i + 2}", row, i) for i, row in enumerate(rows)]


def _question_of_row(path: Path, where: str, row: Mapping[str, Any], index: int) -> Question:
    name = row.get("question_id", row.get("id", f"{path.stem}_{index}"))
    if isinstance(name, bool) or not isinstance(name, (str, int)) or not str(name).strip():
        raise BadValueError(path, f"{where}: its id is {name!r:.60}", "give text or a whole number")
    system, text = row.get("system"), row.get("question")
    earlier: tuple[dict[str, str], ...] = ()
    if "messages" in row and text is None:
        turns = conversation_of(path, where, row["messages"])
        if turns[-1]["role"] != "user":
            raise BadValueError(
                path, f"{where} is a chat with its answer, not a question", "leave the last assistant turn out"
            )
        if turns[0]["role"] == "system" and system is None:
            system = turns.pop(0)["content"]
        text, earlier = turns[-1]["content"], tuple(turns[:-1])
    if not isinstance(text, str) or not text.strip():
        raise BadValueError(path, f"{where} has no question", "put a text into `question` of each row")
    if not (system is None or isinstance(system, str)):
        raise BadValueError(path, f"{where}: system is {system!r:.60}, not text", "write it as text")
    return Question(str(name), (text,), system=system, earlier=earlier)


def read_chats(path: str | PathLike[str]) -> list[list[dict[str, str]]]:
    """Conversations from JSON Lines of `{"messages": [{"role": ..., "content": ...}, ...]}`; blank lines are skipped.

    Raises MissingDataError, UnreadableFileError or BadValueError with the line.
    """
    found = Path(path) if isinstance(path, str) else path
    if Path(found).suffix.lower() in (".csv", ".yaml", ".yml", ".tsv"):
        raise UnreadableFileError(found, "it is no file of chats", f"give JSON Lines (.jsonl): {_CHAT}")
    chats = []
    for line, row in json_lines(found):
        if "messages" not in row:
            raise BadValueError(
                found, f"line {line} is not a conversation: it has {', '.join(row)}, no messages", f"write {_CHAT}"
            )
        chats.append(conversation_of(found, f"line {line}", row["messages"]))
    if not chats:
        raise MissingDataError(found, "it holds no conversation", "check the filter that it was made with")
    return chats


def chats_read(path: Path, chats: Sequence[Sequence[Mapping[str, str]]]) -> str:
    """What `read_chats` read, in a line."""
    lengths = [len(chat) for chat in chats]
    each = "-".join(map(str, sorted({min(lengths, default=0), max(lengths, default=0)})))
    return f"{path.name}: {_number(len(chats), 'conversation')}, {each} turn{'' if each == '1' else 's'} each"


def conversation_of(path: str | PathLike[str], where: str, messages: object) -> list[dict[str, str]]:
    """The turns of a conversation. Raises BadValueError for what is none, and for roles that do not exist."""
    if not isinstance(messages, list) or not messages:
        raise BadValueError(path, f"{where} is not a conversation", f"write {_CHAT}")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise BadValueError(path, f"{where} is not a conversation ({message!r:.60})", f"write {_CHAT}")
        if message["role"] not in ROLES:
            raise BadValueError(
                path, f"{where} has a turn of role {message['role']!r:.40}", f"roles are {', '.join(ROLES)}"
            )
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def json_lines(path: str | PathLike[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSON Lines file with their line numbers; blank lines are skipped. Raises UnreadableFileError."""
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if "\\u" in line:
                    json.dumps(row, ensure_ascii=False).encode()  # ValueError for half of a surrogate pair
            except (ValueError, RecursionError) as error:
                problem = f"line {number} is not JSON ({error})"
                raise UnreadableFileError(path, problem, "write JSON Lines: one object a line") from error
            if not isinstance(row, dict):
                raise UnreadableFileError(
                    path, f"line {number} is {type(row).__name__}, not an object", "write one object a line"
                )
            yield number, row


def read_texts(
    source: Texts,
    *,
    min_characters: int = 0,
    max_characters: int | None = None,
    max_documents: int | None = None,
) -> Iterator[str]:
    """Documents, one at a time, from texts, from rows with a `text` field (a streamed dataset), or from a file.

    A file holds documents separated by blank lines, or, as `.jsonl`, one object with a `text` a line. The papers'
    code drops texts of at most 100 characters and cuts at 2,000. Raises MissingDataError, UnreadableFileError,
    BadValueError (files), UsageError.
    """
    kept = 0
    if isinstance(source, str) and not Path(source).suffix and not Path(source).exists():
        raise UsageError(f"{source!r:.60} is no file of texts. If it is a text, give a list: [text].")
    if isinstance(source, (Mapping, bytes)) or not isinstance(source, (Path, Iterable)):
        raise UsageError(f"texts are {type(source).__name__}. Give a file, or a list of texts.")
    for number, item in enumerate(_file_texts(Path(source)) if isinstance(source, (str, Path)) else source):
        text = item.get("text") if isinstance(item, Mapping) else item
        if not isinstance(text, str):
            raise UsageError(
                f"document {number} is {type(text).__name__}, not text. Give strings, or rows with `text`."
            )
        if len(text) < min_characters:
            continue
        if max_documents is not None and kept >= max_documents:
            return
        kept += 1
        yield text[:max_characters]


def _file_texts(path: Path) -> Iterator[str]:
    kind = _KINDS.get(path.suffix.lower())
    if kind == "JSON Lines":
        for number, row in json_lines(path):
            if not isinstance(row.get("text"), str):
                raise BadValueError(path, f"line {number} has no text", 'write {"text": "..."} in each line')
            yield row["text"]
        return
    with open_text(path) as file:
        lines: list[str] = []
        for number, line in enumerate(file):
            if number == 0 and (kind != "text" or _is_json_object(line)):
                raise UnreadableFileError(
                    path, "it is not plain text", "give a .txt with a blank line between texts, or a .jsonl"
                )
            if line.strip():
                lines.append(line)
            elif lines:
                yield "".join(lines).strip()
                lines = []
        if lines:
            yield "".join(lines).strip()


def _kind(path: Path, text: str) -> str:
    """The format, by the ending. Plain text can be anything, so what looks like another format is refused as text."""
    kind = _KINDS.get(path.suffix.lower())
    if kind is None:
        raise UnreadableFileError(
            path, f"questions do not come as {path.suffix}", "give .yaml, .jsonl, .csv, or .txt with one a line"
        )
    if kind != "text":
        return kind
    first = next((line for line in text.split("\n") if line.strip()), "")
    if _is_json_object(first):
        found = "JSON Lines"
    elif _ENTRY_KEY.search(text) or first.startswith(("---", "%YAML")):
        found = "YAML"
    elif "question" in [cell.strip(' "') for cell in first.split(",")]:
        found = "CSV"
    else:
        return kind
    ending = next(ending for ending, name in _KINDS.items() if name == found)
    raise UnreadableFileError(path, f"it looks like {found}, and its name says text", f"let its name end in {ending}")


def _is_json_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), (dict, list))
    except (ValueError, RecursionError):
        return line.lstrip().startswith('{"')


def _number(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"
