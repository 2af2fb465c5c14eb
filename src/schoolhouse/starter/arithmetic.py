"""Word problems of one to three steps in the form of GSM8K (Cobbe et al., 2021), made from a seed.

The answer is worked one step a line with calculation marks such as `48/2 = <<48/2=24>>24`, and ends in `#### n`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from random import Random

from schoolhouse.starter.words import PEOPLE, THINGS, draw, part_of_all, pick, seeded

_SIZES = {"train": 24_000, "validation": 256, "exam": 256}
_SHARES = {"train": range(28), "validation": range(28, 30), "exam": range(30, 32)}
"""Which thirty-seconds of all calculations belong to a split: enough that none is asked twice in an exam."""

_LARGEST = 99
"""No number in a problem is larger."""

_RANGES = {"a": (2, 20), "b": (2, 20), "c": (2, 20), "n": (2, 6), "m": (2, 6), "p": (2, 10), "q": (2, 10)}
"""The smallest and largest value of each number that a problem may give."""

_GOODS = "bike lamp game coat tent desk radio watch jacket chair drum guitar camera skateboard phone scooter"
_BOXES = "box/boxes bag/bags jar/jars tray/trays crate/crates basket/baskets shelf/shelves drawer/drawers pack/packs"

_PROBLEMS = (
    # Each problem: the question, then one line of the answer for each step. `(x|y)` chooses a wording, `{a}` is a
    # number given (see _RANGES), `[a+b=u]` a calculation; results are u, v, w in this order, the last is the answer.
    # One step.
    ("{A} has {a} {things}. {B} gives {him} {b} more. How many {things} does {A} have now?",
     "{A} has [a+b=u] {things} now."),
    ("{A} (had|owned) {a} {things} and (lost|sold|gave away) {b} of them. How many {things} are left?",
     "There are [a-b=u] {things} left."),
    ("There are {n} {boxes} with {p} {things} in each. How many {things} are there (in all|altogether)?",
     "There are [n*p=u] {things} in all."),
    ("{A} (finds|counts|makes|collects) {a} {things} and {B} {b}. How many {things} is that together?",
     "Together that is [a+b=u] {things}."),
    ("{A} has {a} {things}. {B} has half as many. How many {things} does {B} have?",
     "{B} has [a/2=u] {things}."),
    ("{A} has {a} {things}. {B} has (twice as many|double that). How many {things} does {B} have?",
     "{B} has [a*2=u] {things}."),
    ("A book has {a} pages. {A} has read {b} of them. How many pages (are left|does {he} still have to read)?",
     "{A} has [a-b=u] pages left."),
    ("One {thing} costs ${p}. How much (do {n} {things} cost|does {A} pay for {n} {things})?",
     "{n} {things} cost [$n*p=u]."),
    ("{A} shares {a} {things} (equally|fairly) among {n} friends. How many {things} does each friend get?",
     "Each friend gets [a/n=u] {things}."),
    ("{A} is {a} years old. {B} is {n} years older. How old is {B}?",
     "{B} is [a+n=u] years old."),
    ("{A} (runs|walks|cycles) {p} km every day. How many km is that in a week?",
     "In a week that is [p*7=u] km."),
    ("{A} wants a {good} that costs ${a} but has only ${b}. How much more (money does {he} need|must {he} save)?",
     "{A} needs [$a-b=u] more."),
    ("{A} puts {a} {things} into {n} {boxes}, the same number in each. How many {things} are in one {box}?",
     "One {box} has [a/n=u] {things}."),
    ("{A} scored {a} points and {B} scored {b}. By how many points did {A} win?",
     "{A} won by [a-b=u] points."),
    ("A bus (has|carries) {a} people. At a stop {b} more get on. How many people are on the bus now?",
     "There are [a+b=u] people on the bus."),
    # Two steps.
    ("{A} has {a} {things}. {B} has twice as many. How many {things} do they have together?",
     "{B} has [a*2=u] {things}.", "Together they have [a+u=v] {things}."),
    ("{A} sold {a} {things} in (May|April|June) and half as many in July. How many {things} did {he} sell in all?",
     "{A} sold [a/2=u] {things} in July.", "In all {he} sold [a+u=v] {things}."),
    ("{A} buys {n} {boxes} of {p} {things} and gives away {b}. How many {things} are left?",
     "{A} buys [n*p=u] {things}.", "There are [u-b=v] {things} left."),
    ("{A} has {a} {things}, {b} more than {B}. How many {things} do they have together?",
     "{B} has [a-b=u] {things}.", "Together they have [a+u=v] {things}."),
    ("{A} had {a} {things}, (found|bought|got) {b} more and then (lost|sold) {c}. How many {things} are left?",
     "{A} had [a+b=u] {things}.", "There are [u-c=v] {things} left."),
    ("{A} pays for {n} {things} at ${p} each with ${a}. How much change does {he} get?",
     "The {things} cost [$n*p=u].", "The change is [$a-u=v]."),
    ("A class has {a} girls and {b} boys. (Half of them|Half of the class) go by bus. How many go by bus?",
     "The class has [a+b=u] children.", "By bus go [u/2=v] children."),
    ("{A} reads {p} pages (in the morning|before lunch) and {q} at night. How many pages does {he} read in {n} days?",
     "{A} reads [p+q=u] pages a day.", "In {n} days that is [u*n=v] pages."),
    ("{A} earns ${p} an hour. {He} works {n} hours and spends ${b}. How much does {he} have left?",
     "{A} earns [$n*p=u].", "There is [$u-b=v] left."),
    ("{A} has {a} {things} and {B} has {b}. They share them equally. How many {things} does each get?",
     "Together they have [a+b=u] {things}.", "Each gets [u/2=v] {things}."),
    ("There are {n} {boxes} with {p} {things} in each and {a} {things} on the table. How many {things} are there?",
     "In the {boxes} there are [n*p=u] {things}.", "There are [u+a=v] {things}."),
    ("{A} has {a} {things} and (loses|drops|sells) {b}. The rest go into {n} {boxes}. How many are in each {box}?",
     "There are [a-b=u] {things} left.", "Each {box} has [u/n=v] {things}."),
    ("A {good} costs ${a}. {A} has ${b} and gets ${c} from {B}. How much more does {he} need?",
     "{A} has [$b+c=u].", "{He} needs [$a-u=v] more."),
    ("A bus has {a} people. At a stop {b} get off and {c} get on. How many people are on the bus now?",
     "There are [a-b=u] people left.", "Now there are [u+c=v] people."),
    ("{A} is {n} years old. {B} is {m} times as old. How old (is {B}|will {B} be) in {p} years?",
     "{B} is [n*m=u] years old.", "In {p} years {B} is [u+p=v]."),
    ("{A} (plants|sows) {n} rows of {p} beans. {a} of them do not grow. How many beans grow?",
     "{A} plants [n*p=u] beans.", "So [u-a=v] beans grow."),
    ("{A} has {a} red {things}, and {b} fewer blue ones. How many {things} does {he} have in all?",
     "{A} has [a-b=u] blue {things}.", "In all {he} has [a+u=v] {things}."),
    ("{A} needs {a} minutes to (school|work) and twice as long back. How many minutes is that in all?",
     "The way back takes [a*2=u] minutes.", "In all that is [a+u=v] minutes."),
    ("{A} wins {n} games and {B} wins {m}. Each win gives {p} points. How many points do they have together?",
     "They win [n+m=u] games.", "Together they have [u*p=v] points."),
    ("A farm has {a} hens and {b} ducks. {A} sells {c} of them. How many birds are left?",
     "There are [a+b=u] birds.", "There are [u-c=v] birds left."),
    # Three steps.
    ("{A} has {a} {things}. {B} had twice as many but lost {c}. How many {things} do they have together now?",
     "{B} had [a*2=u] {things}.", "{B} has [u-c=v] {things} now.", "Together they have [a+v=w] {things}."),
    ("{A} buys {n} {things} at ${p} each and {m} (pens|hats) at ${q} each. How much does {he} pay?",
     "The {things} cost [$n*p=u].", "The others cost [$m*q=v].", "{A} pays [$u+v=w]."),
    ("{A} had {a} {things}. {He} bought {b}, sold {c} and then gave half of the rest to {B}. How many did {B} get?",
     "{A} had [a+b=u] {things}.", "There were [u-c=v] left.", "{B} got [v/2=w] {things}."),
    ("{A} fills {n} {boxes} with {p} {things} each and {B} fills {m} with {q} each. How many {things} are there?",
     "{A} packs [n*p=u] {things}.", "{B} packs [m*q=v] {things}.", "There are [u+v=w] {things}."),
    ("{A} has {a} {things}, {B} has {b} more than {A}. How many {things} are left when they sell {c}?",
     "{B} has [a+b=u] {things}.", "Together they have [a+u=v] {things}.", "There are [v-c=w] {things} left."),
    ("{A} earns ${p} an hour for {n} hours and gets a ${a} tip. {He} spends ${b}. How much does {he} have left?",
     "{A} earns [$n*p=u].", "With the tip {he} has [$u+a=v].", "There is [$v-b=w] left."),
    ("{A} saves ${p} a week for {n} weeks. {B} saves half as much. How much do they save together?",
     "{A} saves [$n*p=u].", "{B} saves [$u/2=v].", "Together they save [$u+v=w]."),
    ("A shop has {n} {boxes} of {p} {things}. It sells {a} on Monday and {b} on Tuesday. How many {things} are left?",
     "The shop has [n*p=u] {things}.", "After Monday there are [u-a=v].", "There are [v-b=w] {things} left."),
    ("A train has {a} people. At the first stop {b} get on, at the next {c} get off and {n} get on. How many people "
     "are on it now?",
     "First there are [a+b=u] people.", "Then [u-c=v] are left.", "Now there are [v+n=w] people."),
    ("{A} reads {a} pages on Monday, {b} on Tuesday and twice as many as on Tuesday on Friday. How many pages is that?",
     "On Friday {A} reads [b*2=u] pages.", "On the first two days {he} reads [a+b=v].", "That is [v+u=w] pages."),
    ("{A} has ${a}. {He} buys {n} {things} at ${p} each, and {B} gives {him} ${c}. How much does {A} have now?",
     "The {things} cost [$n*p=u].", "{A} has [$a-u=v] left.", "Now {he} has [$v+c=w]."),
    ("{A} (bakes|makes) {n} trays of {p} buns. {He} keeps {b} and sells the rest at $2 each. How much does {he} earn?",
     "{A} makes [n*p=u] buns.", "{He} sells [u-b=v] buns.", "{He} earns [$v*2=w]."),
    ("{A} has {a} {things}, {B} half as many, and {C} has {b} more than {B}. How many {things} do {B} and {C} have?",
     "{B} has [a/2=u] {things}.", "{C} has [u+b=v] {things}.", "Together they have [u+v=w] {things}."),
    ("{A} has {a} red and {b} blue {things}. {He} gives {c} away and shares the rest equally with {B}. How many does "
     "each get?",
     "{A} has [a+b=u] {things}.", "There are [u-c=v] left.", "Each gets [v/2=w] {things}."),
    ("{A} drives {n} hours at {p} km an hour, then {m} hours at {q} km an hour. How many km is that?",
     "First {he} drives [n*p=u] km.", "Then {he} drives [m*q=v] km.", "That is [u+v=w] km."),
)


@dataclass(frozen=True, slots=True)
class _Problem:
    """One sentence pattern, taken apart once so that rows are made fast."""

    questions: tuple[str, ...]
    """The wordings, as format strings."""
    answer: str
    """A format string."""
    given: tuple[str, ...]
    """The numbers to draw."""
    steps: tuple[tuple[str, str, str, str], ...]
    """Left, operator, right and result of each calculation."""


def rows(split: str) -> Iterator[dict[str, str]]:
    """Make the rows of a split, `{"question", "answer"}` each: no question twice, and held out no calculation twice."""
    random = seeded("arithmetic", split)
    problems = tuple(_parse(*lines) for lines in _PROBLEMS)
    seen: set[str] = set()
    while len(seen) < _SIZES[split]:
        problem = pick(random, problems)
        numbers = None
        while numbers is None:
            numbers = _solve(problem, {letter: draw(random, *_RANGES[letter]) for letter in problem.given})
        calculation = _chain(problem, numbers)
        if part_of_all(calculation) not in _SHARES[split]:
            continue
        row = _write(random, problem, numbers)
        asked = row["question"] if split == "train" else calculation
        if asked not in seen:
            seen.add(asked)
            yield row


def _parse(question: str, *lines: str) -> _Problem:
    answer = "\n".join(lines)
    steps = tuple(re.findall(r"\[\$?(\w+)([-+*/])(\w+)=(\w)\]", answer))
    given = tuple(letter for letter in _RANGES if re.search(rf"\{{{letter}\}}", question))
    worked = re.sub(r"\[(\$?)(\w+)([-+*/])(\w+)=(\w)\]", _calculation, answer)
    return _Problem(_wordings(question), f"{worked}\n#### {{{steps[-1][3]}}}", given, steps)


def _calculation(found: re.Match[str]) -> str:
    """`[a+b=u]` as GSM8K writes it, a format string: `{a}+{b} = <<{a}+{b}={u}>>{u}`."""
    unit, left, operator, right, result = found.groups()
    left, right = (part if part.isdigit() else f"{{{part}}}" for part in (left, right))
    return f"{left}{operator}{right} = {unit}<<{left}{operator}{right}={{{result}}}>>{{{result}}}"


def _wordings(text: str) -> tuple[str, ...]:
    """Every choice of `(x|y)`."""
    parts = re.split(r"\(([^()]*\|[^()]*)\)", text)
    choices = [part.split("|") if index % 2 else [part] for index, part in enumerate(parts)]
    return tuple("".join(words) for words in product(*choices))


def _solve(problem: _Problem, numbers: dict[str, int]) -> dict[str, int] | None:
    """Work all steps; None when a result is not a whole number from 2 to the largest."""
    for left, operator, right, result in problem.steps:
        x, y = (numbers[part] if part in numbers else int(part) for part in (left, right))
        if operator == "/" and x % y:
            return None
        value = {"+": x + y, "-": x - y, "*": x * y, "/": x // y}[operator]
        if not 2 <= value <= _LARGEST:
            return None
        numbers[result] = value
    return numbers


def _chain(problem: _Problem, numbers: dict[str, int]) -> str:
    """A problem's calculation, whatever words it is put in: its hash decides the split, so the exam is unseen.

    It is the operators and numbers, the order of the two sides of a sum or product aside.
    """
    chain = []
    for left, operator, right, _ in problem.steps:
        sides = [numbers[part] if part in numbers else int(part) for part in (left, right)]
        chain.append(f"{operator}".join(map(str, sorted(sides) if operator in "+*" else sides)))
    return ";".join(chain)


def _write(random: Random, problem: _Problem, numbers: dict[str, int]) -> dict[str, str]:
    """Put a problem into words."""
    words = _words(random) | numbers
    return {
        "question": pick(random, problem.questions).format_map(words),
        "answer": problem.answer.format_map(words),
    }


def _words(random: Random) -> dict[str, str]:
    """Who and what a problem is about."""
    he = pick(random, ("she", "he"))
    people = [pick(random, PEOPLE[he].split())]
    while len(people) < 3:
        person = pick(random, PEOPLE[pick(random, ("she", "he"))].split())
        people += [person] * (person not in people)
    thing, (box, boxes) = pick(random, THINGS.split()), pick(random, _BOXES.split()).split("/")
    return dict(
        zip("ABC", people, strict=True),
        he=he, He=he.capitalize(), him={"she": "her", "he": "him"}[he],
        thing=thing, things=f"{thing}s", box=box, boxes=boxes, good=pick(random, _GOODS.split()),
    )
