"""A condition over a report's numbers, such as 'p99_connect_ms > 50 or held < 10000'.

Decides the grammar: names, whole and decimal numbers, < <= > >= == !=, and, or, parentheses. Nothing is evaluated but
comparisons. Knows no report: the names that may be used, and their values, are the caller's.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn

from fourtuple.errors import BadConfig

OPTION = "--fail-if"
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
}
_WORD = re.compile(r"\s*(?:([A-Za-z_][A-Za-z0-9_]*)|([0-9][0-9_]*(?:\.[0-9]+)?)|(<=|>=|==|!=|<|>|\(|\)))")
_MOST_LETTERS = 200


@dataclass(frozen=True, slots=True)
class Condition:
    """A parsed condition."""

    text: str
    holds: Callable[[Mapping[str, float]], bool]
    """Whether it is true of these numbers."""

    @classmethod
    def parse(cls, text: str, names: Mapping[str, object]) -> Condition:
        """Read a condition; BadConfig says what is wrong with it and where."""
        words = _words(text)
        parser = _Parser(text, words, names)
        holds = parser.either()
        if parser.place < len(words):
            parser.refuse("and, or, or the end")
        return cls(text, holds)


Test = Callable[[Mapping[str, float]], bool]
Value = Callable[[Mapping[str, float]], float]


def _words(text: str) -> list[str]:
    if len(text) > _MOST_LETTERS:
        raise BadConfig(OPTION, f"is {len(text):,} characters long; at most {_MOST_LETTERS:,} are read")
    words, place = [], 0
    while text[place:].strip():
        matched = _WORD.match(text, place)
        if matched is None:
            raise BadConfig(OPTION, f"{text!r}: {text[place:].strip()[0]!r} is not understood")
        words.append(matched[0].strip())
        place = matched.end()
    return words


class _Parser:
    """Recursive descent: either = both {or both}; both = one {and one}; one = ( either ) | value compare value."""

    def __init__(self, text: str, words: list[str], names: Mapping[str, object]) -> None:
        self.text, self.words, self.names = text, words, names
        self.place = 0

    def either(self) -> Test:
        tests = [self.both()]
        while self.take("or"):
            tests.append(self.both())
        return lambda numbers: any(test(numbers) for test in tests)

    def both(self) -> Test:
        tests = [self.one()]
        while self.take("and"):
            tests.append(self.one())
        return lambda numbers: all(test(numbers) for test in tests)

    def one(self) -> Test:
        if self.take("("):
            inner = self.either()
            if not self.take(")"):
                self.refuse(")")
            return inner
        left = self.value()
        compare = _COMPARE.get(self.word())
        if compare is None:
            self.refuse("one of < <= > >= == !=")
        self.place += 1
        right = self.value()
        return lambda numbers: compare(left(numbers), right(numbers))

    def value(self) -> Value:
        word = self.word()
        if word[:1].isdigit():
            self.place += 1
            number = float(word.replace("_", ""))
            return lambda _: number
        if word not in self.names:
            self.refuse(f"a number or one of {', '.join(sorted(self.names))}")
        self.place += 1
        return lambda numbers: numbers[word]

    def word(self) -> str:
        return self.words[self.place] if self.place < len(self.words) else ""

    def take(self, word: str) -> bool:
        taken = self.word() == word
        self.place += taken
        return taken

    def refuse(self, wanted: str) -> NoReturn:
        found = repr(self.word()) if self.word() else "the end"
        raise BadConfig(OPTION, f"{self.text!r}: {found} stands where {wanted} is expected")
