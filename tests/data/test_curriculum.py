"""Words, tasks about their characters, and curricula of these: right by other ways, without what is held out."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from bytelm.cli import run as cli
from bytelm.data.curriculum import LINES, lessons, random_words, training_words, write
from bytelm.data.pack import pack
from bytelm.data.tasks import TASKS, contains, task_of
from bytelm.data.words import HELD_OUT, LONGEST, Vocabulary, bare, decoded, encoded, found_in, group_of, is_held_out
from bytelm.errors import DataError, ResourceError, UsageError
from solving import RULES, TEXTS, solved, words

KNOWN = random_words(5, 2000)


def asked_of(line: str) -> tuple[str, str]:
    """The question and the answer in a line of a curriculum."""
    question, _, answer = line.partition(": ")
    return question, answer


@pytest.mark.parametrize("name", TASKS)
def test_answers_are_right_and_wrong_ones_are_wrong_and_differ(name: str) -> None:
    draw = np.random.default_rng(3)
    for word in [*KNOWN[:150], *(w for w in words(60) if len(set(w)) > 1), "aab", "пример", "äßé", "abababab"]:
        task = task_of(name, word, KNOWN, draw)
        assert task.line == f"{task.asked} {task.answer}\n"
        assert task.answer == solved(task.question), task.question
        wrong = task.wrong(draw, 3)
        assert len(set(wrong)) == len(wrong) == (1 if "contains" in name else 3), task.question
        assert task.answer not in wrong
        assert word in task.question or name == "join"


def test_tasks_undo_each_other() -> None:
    draw = np.random.default_rng(4)
    for word in KNOWN[:100]:
        assert solved(f"Reverse {task_of('reverse', word, KNOWN, draw).answer}") == word
        assert solved(f"Join {task_of('spell', word, KNOWN, draw).answer}") == word
        task = task_of("insert", word, KNOWN, draw)
        letter = task.question.split()[1]
        if letter not in word:
            assert solved(f"Delete {letter} in {task.answer}") == word
        task = task_of("swap", word, KNOWN, draw)
        _, one, _, two, _, _ = task.question.split()
        assert one != two and task.answer != word
        assert solved(f"Swap {one} and {two} in {task.answer}") == word


def test_neither_yes_nor_a_letter_gives_an_answer_away() -> None:
    """Whoever knows how often each letter is in a word, but not the word, is right half of the time."""
    known, draw = [word for word in words(3000) if group_of(word) == "training words"], np.random.default_rng(0)
    for name in ("contains", "contains word"):
        tasks = [task_of(name, known[draw.integers(len(known))], known, draw) for _ in range(3000)]
        said = [(task.question.rpartition(" ")[2], task.answer) for task in tasks]
        assert sum(answer == "yes" for _, answer in said) / len(said) == pytest.approx(0.5, abs=0.04)
        letters: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for letter, answer in said[::2]:
            letters[letter][answer] += 1
        right = sum(letters[letter][answer] * 2 > letters[letter].total() for letter, answer in said[1::2])
        assert right / len(said[1::2]) < 0.54
    draw = np.random.default_rng(0)
    letters_asked = {contains("abc", ["abd", "xyz"], draw).question[-1] for _ in range(40)}
    assert letters_asked == {"c", "d"}  # in which the two differ, as likely from either


def test_a_curriculum_asks_right_questions_of_training_words_alone() -> None:
    known = training_words_of_texts()
    documents = list(lessons(known, 30_000, 1))
    lines = [line for text in documents for line in text.splitlines()]
    assert len(lines) == LINES * len(documents)
    assert 30_000 <= sum(len(text.encode()) for text in documents) < 30_000 + 2 * len(documents[0])
    forms: Counter[int] = Counter()
    for question, answer in map(asked_of, lines):
        assert solved(question) == answer
        forms[next(n for n, (pattern, _) in enumerate(RULES) if re.fullmatch(pattern, question))] += 1
        for word in re.findall(r"\w{3,}", question.partition(" ")[2]):
            assert word in ("after", "and", "contain") or group_of(word) == "training words", question
    assert len(forms) == len(TASKS) and min(forms.values()) > len(lines) / 20
    assert list(lessons(known, 30_000, 1)) == documents != list(lessons(known, 30_000, 2))


def training_words_of_texts() -> list[str]:
    """The training words of the texts."""
    known = Vocabulary.of(data for _, data in TEXTS.documents).words()
    return [word for word in known if group_of(word) == "training words"]


def test_one_word_in_eight_is_held_out_whatever_the_texts() -> None:
    held = sum(map(is_held_out, {*random_words_of_all(4000)}))
    assert held / 4000 == pytest.approx(1 / HELD_OUT, abs=0.02)
    assert [group_of(word) for word in ("aa", "aaaa", "a" + "b" * LONGEST, "a" * 13)] == [
        None,
        None,
        "longer words",
        None,
    ]
    assert (group_of("bright"), group_of("overall")) == ("held-out words", "training words")
    assert not any(map(is_held_out, KNOWN)) and is_held_out("bright") and not is_held_out("overall")


def random_words_of_all(count: int) -> list[str]:
    """Words of six random letters."""
    draw = np.random.default_rng(0)
    return ["".join(map(chr, draw.integers(97, 123, 6))) for _ in range(count)]


@pytest.mark.parametrize(
    ("token", "word"),
    [
        ("house,", "house"),
        ("“house”", "house"),
        ("(пример)", "пример"),
        ("你好。", "你好"),
        ("House", ""),
        ("don't", ""),
        ("x2", ""),
        ("a_b", ""),
        ("--", ""),
        ("", ""),
        (decoded("café".encode("latin-1")), ""),
        (decoded(b"\x00a"), ""),
        ("हिन्दी", ""),  # marks are no letters
    ],
)
def test_a_word_is_letters_alone_in_lower_case(token: str, word: str) -> None:
    assert bare(token) == word
    assert Vocabulary.of([encoded(f"{token} {token}\r\n")]).counts == ({word: 2} if word else {})
    text = f" {token}\t.{token}"
    found = list(found_in(text))
    assert (
        [text[place:][: len(one)] for place, one in found]
        == [one for _, one in found]
        == ([word, word] if word else [])
    )
    assert len({place for place, _ in found}) == len(found)


def test_a_curriculum_is_written_and_read_as_documents(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes").mkdir()
    for name, data in TEXTS.documents:
        (tmp_path / "notes" / name).write_bytes(data)
    out = tmp_path / "new" / "tasks.jsonl"
    command = ["data", "curriculum", "-o", str(out), "--bytes", "20000", "--seed", "3"]
    assert (
        cli([*command, "--words", str(tmp_path / "notes" / "a.txt"), "--words", str(tmp_path / "notes"), "--json"]) == 0
    )
    told = json.loads(capfd.readouterr().out)
    texts = [json.loads(line)["text"] for line in out.read_text().splitlines()]
    assert told == {
        "curriculum": str(out),
        "documents": len(texts),
        "bytes": sum(map(len, texts)),
        "words": len(training_words_of_texts()),
    }
    assert texts == list(lessons(training_words_of_texts(), 20_000, 3))
    corpus = pack([out], tmp_path / "packed")
    assert (corpus.count(), corpus.total) == (told["documents"], told["bytes"])
    assert cli(command) == 0 and "--mix text=0.95,tasks=0.05" in capfd.readouterr().out
    assert out.read_text() and json.loads(out.read_text().splitlines()[0])["text"] == next(
        lessons(random_words(3), 1, 3)
    )


def test_what_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text("only a few words here, and " + "x" * 99)
    with pytest.raises(DataError, match="5 words of 3 to 8 lower-case letters"):
        training_words([tmp_path / "few.txt"])
    with pytest.raises(UsageError, match=r"call it ….jsonl"):
        write(tmp_path / "tasks.txt", KNOWN, 10, 0)
    with pytest.raises(UsageError, match="--bytes 0"):
        write(tmp_path / "tasks.jsonl", KNOWN, 0, 0)
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="choose another place"):
        write(tmp_path / "file" / "tasks.jsonl", KNOWN, 10, 0)
