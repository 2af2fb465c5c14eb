"""The parts of a report that say what came out: the verdict, the exam, the figures, the curves and the answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePath
from types import MappingProxyType
from typing import Any

from schoolhouse.data.show import Html, tag
from schoolhouse.report import plots, words
from schoolhouse.report.plots import Frame, Point, Series, percent
from schoolhouse.report.read import Answer, ExamRecord, Run, number

SHOWN = {"learnt": 8, "forgotten": 8, "still wrong": 4, "right both times": 4, "right": 8, "wrong": 8}
"""Questions shown of each kind; all are in samples.jsonl."""
FEW_STEPS = 20
"""Fewer steps than these are drawn as they are, without a smoothed curve."""
STATUS = {"done": "✓ done", "running": "… running", "stopped": "‖ stopped", "failed": "✗ failed"}


# ---- the head of the page --------------------------------------------------------------------------------------


def name(run: Run) -> str:
    """The recipe's classroom and name, else the directory's name."""
    path = PurePath(str(run.facts.get("recipe_path") or run.directory.resolve().name))
    if path.name == "resolved.yaml":  # it was resumed with what it began with
        path = PurePath(run.directory.resolve().name)
    return f"{path.parent.name} / {path.stem}" if path.parent.name else path.stem


def header(run: Run) -> Html:
    """Who learnt what, how it ended, and anything that could not be read."""
    status = tag("span", STATUS.get(run.status, run.status), class_=f"status {run.status}")
    return tag(
        "header",
        tag("p", tag("span", "schoolhouse · run report"), status, class_="eyebrow"),
        tag("h1", name(run)),
        tag("p", verdict(run), class_="verdict"),
        tag("p", _who(run), class_="note"),
        _faults(run.faults),
    )


def verdict(run: Run) -> str:
    """The outcome in one sentence, and a second one where the run has not come to its end."""
    return " ".join(filter(None, [_outcome(run), _ending(run)]))


def _outcome(run: Run) -> str:
    if len(run.exams) > 1:
        first, last = run.exams[0], run.exams[-1]
        went = "rose" if last.score > first.score else "fell" if last.score < first.score else "stayed"
        return (
            f"The exam {went} from {percent(first.score)} to {percent(last.score)} "
            f"({last.correct:,} of {words.plural(last.count, 'question')}) in {words.duration(_seconds(run))}."
        )
    measured, what = (run.validations, "validation") if len(run.validations) > 1 else (run.steps, "training")
    if len(measured) < 2:
        return "Nothing has been trained yet."
    losses = f"from {words.figure(measured[0].loss)} to {words.figure(measured[-1].loss)}"
    return f"The {what} loss went {losses} in {words.duration(_seconds(run))}."


def _ending(run: Run) -> str:
    place = f"step {run.steps[-1].step if run.steps else 0:,}"
    planned = number(run.section("derived"), "steps_total")
    if math.isfinite(planned):
        place += f" of {words.count(planned)}"
    early = bool(run.steps) and run.steps[-1].step < planned
    endings = {
        "done": f"It ended early, after {place}: nothing had become better for a while." if early else "",
        "stopped": f"It was stopped after {place} and can be resumed.",
        "failed": f"It failed after {place}; the events below say why.",
    }
    return endings.get(run.status, f"The last record is {place}: the run is under way, or was killed.")


def _seconds(run: Run) -> float:
    """The run's own time; that of its steps where it is more, since a run notes its own at its end."""
    own, steps = number(run.facts, "seconds"), _total(step.seconds for step in run.steps)
    return max(own, steps) if math.isfinite(own) else steps


def _total(values: Iterable[float]) -> float:
    """The sum of what is known."""
    return math.fsum(value for value in values if math.isfinite(value))


def _who(run: Run) -> str:
    student, lesson = words.at(run.recipe, "model.path"), words.at(run.recipe, "data.train")
    sources = [str(one.get("path")) for one in lesson if isinstance(one, Mapping)] if isinstance(lesson, list) else []
    parts = [f"{words.value(student)} learns {', '.join(sources)}"] if student and sources else []
    if run.facts.get("started"):
        parts.append(f"started {words.moment(run.facts['started'])}")
    return " · ".join(parts)


def _faults(faults: Sequence[str]) -> Html | None:
    if not faults:
        return None
    shown = [tag("li", fault) for fault in faults[:5]]
    found = f"{words.plural(len(faults), 'record')} could not be read; everything else is here."
    return tag("div", found, tag("ul", *shown), class_="fault", role="note")


# ---- the exam and the figures ----------------------------------------------------------------------------------


def exam(run: Run) -> Html | None:
    """The first and the last exam as large as they matter, with their 95 % intervals."""
    if not run.exams:
        return None
    ends = run.exams[:1] if len(run.exams) == 1 else (run.exams[0], run.exams[-1])
    scores = [_score(one, _when(run, one), position) for one, position in zip(ends, ("first", "last"), strict=False)]
    arrow = [tag("p", "→", class_="arrow", aria_hidden="true")] if len(ends) == 2 else []
    rows = [(_when(run, one), *_interval(one)) for one in ends]
    label = "Exam with 95 % intervals: " + "; ".join(
        f"{when} {percent(share)}, {percent(low)} to {percent(high)}" for when, low, share, high in rows
    )
    rise = tag("div", scores[0], *arrow, *scores[1:], class_="rise")
    note = tag("p", _exam_note(run, rows), class_="hero-note")
    return tag("div", rise, tag("div", plots.intervals(label, rows), note), class_="hero", id="exam")


def _when(run: Run, one: ExamRecord) -> str:
    """What an exam is called: before, after, or by its step."""
    if one.step == 0:
        return "before"
    return "after" if run.status == "done" and one is run.exams[-1] else f"at step {one.step:,}"


def _score(one: ExamRecord, when: str, position: str) -> Html:
    low, _, high = _interval(one)
    figures, unit = percent(one.score).split(" ")
    return tag(
        "div",
        tag("p", f"exam {when}", class_="what"),
        tag("p", figures, tag("small", f" {unit}"), class_="big"),
        tag("p", f"{one.correct:,} of {one.count:,}", tag("br"), f"{percent(low)} to {percent(high)}", class_="under"),
        class_=position,
    )


def _interval(one: ExamRecord) -> tuple[float, float, float]:
    low, high = words.wilson(one.correct, one.count)
    return low, one.score, high


def _exam_note(run: Run, rows: Sequence[tuple[str, float, float, float]]) -> str:
    """What the intervals are, whether they part, and the best exam where it is not the last."""
    parts = ["Bars: 95 % intervals (Wilson)."]
    if len(rows) == 2:
        (_, low, _, high), (_, later_low, _, later_high) = rows
        apart = later_low > high or later_high < low
        parts.append("They do not overlap." if apart else "They overlap: the difference may be chance.")
    best = max(run.exams, key=lambda one: one.score)
    if best.score > run.exams[-1].score:
        parts.append(f"The best exam was {percent(best.score)} at step {best.step:,}.")
    return " ".join(parts)


def figures(run: Run) -> Html:
    """The run in a handful of numbers."""
    shown = [*_progress(run), *_losses(run), *_work(run), ("Time", words.duration(_seconds(run)), _evaluating(run))]
    cells = [tag("div", tag("dt", what), tag("dd", large, tag("small", small))) for what, large, small in shown]
    return tag("dl", *cells, class_="figures")


def _progress(run: Run) -> list[tuple[str, str, str]]:
    derived, found = run.section("derived"), []
    if run.steps:
        planned, epoch = number(derived, "steps_total"), number(run.recipe.get("train") or {}, "epochs")
        of = f"of {words.count(planned)}" if math.isfinite(planned) else ""
        by_steps = words.at(run.recipe, "train.steps") is not None
        epochs = words.plural(epoch, "epoch") if math.isfinite(epoch) and not by_steps else ""
        found.append(("Steps", words.count(run.steps[-1].step), ", ".join(filter(None, [of, epochs]))))
    if math.isfinite(number(derived, "trainable")):
        whole = f"of {plots.compact(number(derived, 'parameters'))} parameters"
        found.append(("Trainable", plots.compact(number(derived, "trainable")), whole))
    return found


def _losses(run: Run) -> list[tuple[str, str, str]]:
    found = []
    for what, records in (("Training loss", run.steps), ("Validation loss", run.validations)):
        if records:
            start = f"from {words.figure(records[0].loss)}" if len(records) > 1 else ""
            found.append((what, words.figure(records[-1].loss), start))
    return found


def _work(run: Run) -> list[tuple[str, str, str]]:
    """Tokens, their rate, and memory, over all steps."""
    if not run.steps:
        return []
    tokens, taught, took = (
        _total(values) for values in zip(*((step.tokens, step.supervised_tokens, step.seconds) for step in run.steps),
                                         strict=True)
    )  # fmt: skip
    found = [("Tokens", plots.compact(tokens), f"{plots.compact(taught)} supervised")]
    if took:
        found.append(("Tokens a second", plots.compact(tokens / took), f"{plots.compact(taught / took)} supervised"))
    memory = [step.peak_memory_gib for step in run.steps if math.isfinite(step.peak_memory_gib)]
    return [*found, ("Peak memory", f"{max(memory):.2f} GiB", "of this process")] if memory else found


def _evaluating(run: Run) -> str:
    """How much of the time went into steps."""
    return f"{words.duration(_total(step.seconds for step in run.steps))} in steps" if run.steps else ""


# ---- the curves ------------------------------------------------------------------------------------------------


def curves(run: Run) -> Html | None:
    """Every curve of the run over its steps."""
    if not run.steps:
        return None
    frame = _frame(run)
    exams = plots.finite((one.step, one.score) for one in run.exams)
    validation = [Series("validation", _points(run.validations, lambda one: one.loss), "second")]
    accuracy = [Series("validation", _points(run.validations, lambda one: one.accuracy), "second")]
    rate = _points(run.steps, lambda one: one.learning_rate)
    peak = max((value for _, value in rate), default=1)
    drawn = [
        figure("Loss", [*_smoothed(run, lambda one: one.loss), *validation], frame),
        figure("Exam", [Series("exam", exams)], frame, percent, (0, 1)),
        figure("Token accuracy", [*_smoothed(run, lambda one: one.accuracy), *accuracy], frame, percent),
        figure("Learning rate", [Series("learning rate", rate)], frame, plots.exponent, (0, peak)),
        figure("Gradient norm", _smoothed(run, lambda one: one.grad_norm), frame),
        figure("Tokens a second", _smoothed(run, lambda one: one.tokens_per_second), frame),
    ]
    note = "Each optimizer step is one point; the smoothed curve is an exponential mean over about 2 % of the steps."
    resumed = f" Dotted lines: resumed from {_listed(frame.marks)}." if frame.marks else ""
    return tag("div", tag("p", note + resumed, class_="note"), tag("div", *drawn, class_="plots"))


def _listed(marks: Sequence[float]) -> str:
    return ", ".join(f"step {mark:,}" for mark in marks)


def _frame(run: Run) -> Frame:
    """The range of steps that all figures share."""
    steps = [record.step for record in (*run.steps, *run.validations, *run.exams)]
    return Frame(min(steps), max(steps), tuple(_resumed(run)))


def _resumed(run: Run) -> list[int]:
    """The steps from which the run was resumed."""
    steps = {
        int(number(event, "step")) for event in run.events
        if str(event.get("event", "")).startswith("resum") and math.isfinite(number(event, "step"))
    }
    return sorted(steps)


def _points(records: Iterable[Any], value: Callable[[Any], float]) -> tuple[Point, ...]:
    return plots.finite((one.step, value(one)) for one in records)


def course(run: Run, value: Callable[[Any], float]) -> tuple[Point, ...]:
    """How a figure of the steps went, smoothed where there are enough of them."""
    return _smoothed(run, value)[0].points


def _smoothed(run: Run, value: Callable[[Any], float]) -> list[Series]:
    """A figure of every step, and its smoothed course where there are enough steps."""
    points = _points(run.steps, value)
    if len(points) < FEW_STEPS:
        return [Series("each step", points)]
    means = tuple(plots.smooth(points, max(2.0, len(points) / 50)))
    return [Series("smoothed", means), Series("each step", points, "raw")]


def figure(title: str, series: Sequence[Series], frame: Frame, form: plots.Format = plots.compact,
            bounds: tuple[float, float] | None = None) -> Html | None:  # fmt: skip
    """One figure with its key; None where nothing was recorded."""
    drawn = [one for one in series if one.points]
    if not drawn:
        return None
    key = [tag("span", one.name, class_=one.look) for one in drawn] if len(drawn) > 1 else []
    (start, first), (end, last) = drawn[0].points[0], drawn[0].points[-1]
    label = f"{title}: {form(first)} at step {start:,g}, {form(last)} at step {end:,g}"
    caption = tag("figcaption", tag("span", title), tag("span", *key, class_="key"))
    return tag("figure", caption, plots.curves(label, drawn, frame, form, bounds))


# ---- the answers -----------------------------------------------------------------------------------------------


def answers(run: Run) -> Html | None:
    """The same questions before and after, those that changed first."""
    if not run.answers:
        return None
    first, last = run.answers[0].step, run.answers[-1].step
    heads = ["before training" if first == 0 else f"at step {first:,}", f"after step {last:,}"]
    if first == last:
        return _grouped(_graded(_at(run, last)), heads[:1])
    return _grouped(_compared(_at(run, first), _at(run, last)), heads)


def side_by_side(names: Sequence[str], first: Run, second: Run) -> Html:
    """The last answers of two runs to the questions that both were asked."""
    found = [_at(run, run.answers[-1].step) if run.answers else {} for run in (first, second)]
    same = {index for index in found[0].keys() & found[1].keys() if _same(found[0][index], found[1][index])}
    if not same:
        return tag("p", "They were not asked the same questions.", class_="note")
    one, other = ({index: answers[index] for index in same} for answers in found)
    titles = {"learnt": f"only {names[1]} is right", "forgotten": f"only {names[0]} is right",
              "still wrong": "both are wrong", "right both times": "both are right"}
    return _grouped(_compared(one, other), names, titles)


def _at(run: Run, step: int) -> dict[int, Answer]:
    """The answers of one exam by question."""
    return {one.index: one for one in run.answers if one.step == step}


def _same(one: Answer, other: Answer) -> bool:
    """Whether two answers are to one question; conversations were each played with their own answers."""
    last = [answer.question[-1:] if isinstance(answer.question, list) else answer.question for answer in (one, other)]
    return last[0] == last[1] and one.reference == other.reference


def _grouped(
    kinds: Mapping[str, list[tuple[Answer, ...]]], heads: Sequence[str],
    titles: Mapping[str, str] = MappingProxyType({}),
) -> Html:
    """Each kind of questions, and how many there are of it; kinds are called by their `titles` where they have one."""
    counts = ", ".join(f"{len(found):,} {titles.get(kind, kind)}" for kind, found in kinds.items())
    full = [(kind, found) for kind, found in kinds.items() if found]
    groups = [
        _group(titles.get(kind, kind), found, found[: SHOWN[kind]], heads, opened=index == 0)
        for index, (kind, found) in enumerate(full)
    ]
    note = tag("p", f"The exam's questions, answered and graded {' and '.join(heads)}: {counts}.", class_="note")
    return tag("div", note, *groups)


def _graded(answers: Mapping[int, Answer]) -> dict[str, list[tuple[Answer, ...]]]:
    """The answers of one exam, by grade."""
    return {
        "wrong": [(one,) for one in answers.values() if not one.correct],
        "right": [(one,) for one in answers.values() if one.correct],
    }


def _compared(before: Mapping[int, Answer], after: Mapping[int, Answer]) -> dict[str, list[tuple[Answer, ...]]]:
    """The questions answered both times, by what became of them."""
    kinds: dict[str, list[tuple[Answer, ...]]] = {
        "learnt": [], "forgotten": [], "still wrong": [], "right both times": []
    }  # fmt: skip
    for index in before.keys() & after.keys():
        kinds[_kind(before[index], after[index])].append((before[index], after[index]))
    return {kind: sorted(pairs, key=lambda pair: pair[0].index) for kind, pairs in kinds.items()}


def _kind(before: Answer, after: Answer) -> str:
    if before.correct:
        return "right both times" if after.correct else "forgotten"
    return "learnt" if after.correct else "still wrong"


def _group(
    title: str, found: Sequence[tuple[Answer, ...]], chosen: Sequence[tuple[Answer, ...]], heads: Sequence[str], *,
    opened: bool,
) -> Html:
    """One kind of questions, of which some are shown, under a heading that folds."""
    many = f"{len(found):,}" if len(chosen) == len(found) else f"{len(chosen)} of {len(found):,} shown"
    summary = tag("summary", title[:1].upper() + title[1:], tag("span", many, class_="quiet"))
    shown = [_question(answered, heads) for answered in chosen]
    return tag("details", summary, *shown, class_="answers", open="" if opened else None)


def _question(answered: Sequence[Answer], heads: Sequence[str]) -> Html:
    """A question with its answers side by side, and the reference below.

    Where each exam played the conversation with its own answers, only the last question is common to all of them.
    """
    asked = answered[0].question
    played = isinstance(asked, list) and any(one.question != asked for one in answered)
    columns = [_answer(one, head, played=played) for one, head in zip(answered, heads, strict=True)]
    reference = tag("pre", answered[0].reference)
    return tag(
        "article", tag("div", *_asked(asked[-1:] if played else asked), class_="asked"),
        tag("div", *columns, class_="pair"),
        tag("details", tag("summary", "Reference answer"), reference, class_="reference"), class_="question",
    )  # fmt: skip


def _asked(question: Any) -> list[Html]:
    """The question's text, or the messages that led to it, each under its role where there are several."""
    if not isinstance(question, list):
        return [tag("pre", str(question))]
    found = []
    for message in question:
        said = message if isinstance(message, Mapping) else {"content": message}
        content = said.get("content")
        head = tag("span", str(said.get("role", "")), class_="role") if len(question) > 1 else None
        found.append(tag("div", head, tag("pre", content if isinstance(content, str) else words.value(content))))
    return found


def _answer(one: Answer, head: str, *, played: bool = False) -> Html:
    """One graded answer, under the conversation that led to it where that is its own."""
    grade = tag("b", "✓ right" if one.correct else "✗ wrong")
    extracted = tag("span", "read as ", tag("code", one.extracted)) if one.extracted is not None else None
    ended = tag("span", words.plural(one.tokens, "token") + ("" if one.stopped else ", did not stop"))
    title = tag("h3", tag("span", head), grade, extracted, ended)
    before = tag("details", tag("summary", "The conversation before"), *_asked(one.question[:-1])) if played else None
    return tag("div", title, before, tag("pre", one.text), class_=f"answer {'right' if one.correct else 'wrong'}")
