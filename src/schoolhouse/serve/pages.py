"""The pages as HTML; what a run shows is its report, as new as its files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from urllib.parse import quote

from schoolhouse.data.show import Child, Html, join, tag
from schoolhouse.errors import ConfigError
from schoolhouse.report import page as reports
from schoolhouse.report import plots, result, words
from schoolhouse.report.plots import Series
from schoolhouse.report.read import Run
from schoolhouse.serve import workspace as spaces
from schoolhouse.serve.buttons import LONGEST_NAME, MOST_PROCESSES, Status
from schoolhouse.serve.chats import Chat


@dataclass(frozen=True, slots=True)
class Seen:
    """What is known of a run when a page is made of it."""

    status: Status
    version: str
    """Another text whenever something of it has changed."""
    run: Run | None
    """Its records; None where it has not begun to write, or they cannot be read."""
    unread: str = ""
    """Why they cannot be read."""


def layout(body: Child, title: str) -> str:
    """A whole page with the same head and the same scripts."""
    head = join([
        tag("meta", charset="utf-8"), tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"), tag("link", rel="icon", href="data:,"),
        tag("title", f"{title} · schoolhouse"), tag("link", rel="stylesheet", href="/style.css"),
        tag("script", src="/page.js", defer=""),
    ])
    whole = tag("html", tag("head", head), tag("body", tag("main", body, class_="sheet")), lang="en")
    return f"<!doctype html>\n{whole}\n"


def url(name: str, *rest: str) -> str:
    """Where a run's page is."""
    return "/".join(["/runs", quote(name, safe=""), *rest])


def fault(error: object) -> Html:
    """Something that was refused, as it is said on the command line."""
    return tag("div", tag("pre", str(error)), class_="fault", role="alert")


# ---- the first page --------------------------------------------------------------------------------------------


def index(recipes: Mapping[str, str], runs: Mapping[str, Seen], given: Mapping[str, str],
          error: ConfigError | None = None) -> str:  # fmt: skip
    """What can be started, and what there is. `recipes` are described by path; `given` is what the form held, where
    it was refused."""
    begun = [name for name, one in runs.items() if one.run is not None]
    body = join([
        tag("header", tag("p", tag("span", "schoolhouse"), class_="eyebrow"), tag("h1", "Training building")),
        None if error is None else fault(error),
        tag("section", tag("h2", "Start"), _start(recipes, given)),
        tag("section", tag("h2", "Runs"), _runs(runs), _choose_two(begun) if len(begun) > 1 else None),
    ])
    return layout(body, "Training building")


def _start(recipes: Mapping[str, str], given: Mapping[str, str]) -> Html:
    if not recipes:
        return tag("p", f"No recipe here: {', '.join(spaces.RECIPES)}.", class_="note")
    options = [tag("option", f"{path} · {text}", value=path, selected="" if path == given.get("recipe") else None)
               for path, text in recipes.items()]
    settings = tag("textarea", given.get("settings", ""), name="settings", rows="3", spellcheck="false",
                   placeholder="optim.learning_rate=1e-4")
    return tag(
        "form",
        _labelled("Recipe", tag("select", *options, name="recipe")),
        _labelled("Name of the run", _field("name", given.get("name", ""), required="", maxlength=LONGEST_NAME)),
        _labelled("Processes", _number(given.get("processes", "1"))),
        _labelled("Settings put over the recipe's, key=value, a line each", settings),
        tag("button", "Start", type="submit"), method="post", action="/start", class_="start",
    )  # fmt: skip


def _labelled(text: str, field: Html) -> Html:
    return tag("label", tag("span", text), field)


def _field(name: str, value: str, **more: Child) -> Html:
    return tag("input", name=name, value=value, autocomplete="off", **more)


def _number(value: str) -> Html:
    return _field("processes", value, type="number", min=1, max=MOST_PROCESSES)


def _runs(runs: Mapping[str, Seen]) -> Html:
    if not runs:
        return tag("p", "None yet.", class_="note")
    head = tag("thead", tag("tr", *(tag("th", name, scope="col") for name in ("run", "status", "outcome"))))
    rows = [tag("tr", tag("td", tag("a", name, href=url(name))), tag("td", _status(one)), tag("td", _outcome(one)))
            for name, one in runs.items()]
    return tag("div", tag("table", head, tag("tbody", *rows)), class_="scroll")


def _outcome(seen: Seen) -> str:
    return seen.unread or ("" if seen.run is None else result.verdict(seen.run))


def _status(seen: Seen) -> str:
    """What is recorded, put right where no process is there any more."""
    if seen.status == "stopping":
        return "‖ stopping after this step"
    if seen.run is None:
        if seen.unread:
            return "✗ cannot be read"
        return "… starting" if seen.status == "under way" else "✗ did not start"
    if seen.status == "under way":
        return result.STATUS["running"]
    return "✗ killed" if seen.run.status == "running" else result.STATUS.get(seen.run.status, seen.run.status)


def _choose_two(names: Sequence[str]) -> Html:
    lists = [
        tag("select", *(tag("option", name, value=name, selected="" if name == chosen else None) for name in names),
            name=field, aria_label=f"{field} run")
        for field, chosen in (("first", names[1]), ("second", names[0]))
    ]
    return tag("form", *lists, tag("button", "Compare", type="submit"), action="/compare", class_="row below")


# ---- a run -----------------------------------------------------------------------------------------------------


def run(name: str, path: Path, seen: Seen, error: ConfigError | None = None) -> str:
    """A run's page: its buttons, what it has printed, and its report; all in `live`, which a script renews."""
    found, printed = seen.run, spaces.console(path)
    shown = found is None or seen.status == "failed"
    live = join([
        _buttons(name, path, seen),
        None if error is None else fault(error),
        tag("p", f"{name}: {_status(seen)}", class_="verdict", role="status"),
        fault(seen.unread) if seen.unread else None,
        tag("p", "The last command ended with an error, which stands at the end of what it printed.", class_="note")
        if seen.status == "failed" else None,
        tag("details", tag("summary", "Printed"), tag("pre", printed, class_="console"), class_="answers",
            open="" if shown else None) if printed else None,
        None if found is None else reports.body(found),
    ])  # fmt: skip
    changes = url(name, f"changes?since={quote(seen.version, safe='')}")
    return layout(tag("div", live, id="live", data_changes=changes, data_page=url(name)), name)


def _buttons(name: str, path: Path, seen: Seen) -> Html:
    parts: list[Html] = [tag("a", "← all runs", href="/")]
    if seen.status == "under way":
        parts.append(_button("Stop", url(name, "stop")))
    elif seen.status != "stopping" and (path / "resolved.yaml").is_file() and seen.run and seen.run.status != "done":
        parts.append(_button("Resume", url(name, "resume"), _labelled("processes", _number("1"))))
    if any((path / "checkpoints").glob("step-*")):
        parts.append(tag("a", "Chat", href=url(name, "chat")))
    return tag("nav", *parts, class_="buttons", aria_label="This run")


def _button(text: str, action: str, *fields: Html, look: str | None = None) -> Html:
    press = tag("button", text, type="submit", class_=look)
    return tag("form", *fields, press, method="post", action=action, class_="row")


# ---- two runs --------------------------------------------------------------------------------------------------


def compare(names: tuple[str, str], first: Run, second: Run) -> str:
    """The curves of two runs in one figure each, and their last answers side by side."""
    heads = [tag("div", tag("h3", tag("a", name, href=url(name))), tag("p", result.verdict(one), class_="note"),
                 result.figures(one)) for name, one in zip(names, (first, second), strict=True)]  # fmt: skip
    body = join([
        tag("nav", tag("a", "← all runs", href="/"), class_="buttons"),
        tag("header", tag("h1", f"{names[0]} and {names[1]}")), tag("div", *heads, class_="columns"),
        tag("section", tag("h2", "Curves"), _both(names, first, second)),
        tag("section", tag("h2", "Answers"), result.side_by_side(names, first, second)),
    ])
    return layout(body, f"{names[0]} and {names[1]}")


def _both(names: tuple[str, str], first: Run, second: Run) -> Html:
    steps = [one.step for run in (first, second) for one in (*run.steps, *run.exams)]
    if not steps:
        return tag("p", "Nothing has been trained yet.", class_="note")
    frame = plots.Frame(min(steps), max(steps), ())

    def series(points: Callable[[Run], Sequence[plots.Point]]) -> list[Series]:
        return [Series(names[0], tuple(points(first))), Series(names[1], tuple(points(second)), "second")]

    loss = series(lambda run: result.course(run, attrgetter("loss")))
    exam = series(lambda run: [(one.step, one.score) for one in run.exams])
    speed = series(lambda run: result.course(run, attrgetter("tokens_per_second")))
    drawn = [
        result.figure(_of_whom("Loss", loss), loss, frame),
        result.figure(_of_whom("Exam", exam), exam, frame, plots.percent, (0, 1)),
        result.figure(_of_whom("Tokens a second", speed), speed, frame),
    ]
    return tag("div", *drawn, class_="plots")


def _of_whom(title: str, series: Sequence[Series]) -> str:
    """What one of two runs alone has is its own; a figure of both has a key."""
    having = [one.name for one in series if one.points]
    return f"{title} of {having[0]}" if len(having) == 1 else title


# ---- talking ---------------------------------------------------------------------------------------------------


def chat(name: str, talk: Chat) -> str:
    """The conversation so far, and a place to go on."""
    said = [tag("div", tag("p", one["role"], class_="role"), tag("pre", one["content"]), class_=f"said {one['role']}")
            for one in talk.said]
    form = tag(
        "form", tag("textarea", name="text", rows="3", required="", aria_label="Your message"),
        tag("button", "Send", type="submit"), method="post", action=url(name, "chat"), class_="start",
    )  # fmt: skip
    anew = _button("Begin anew", url(name, "forget"), look="quiet")
    body = join([
        tag("nav", tag("a", f"← {name}", href=url(name)), anew, class_="buttons"),
        tag("header", tag("h1", f"Talking to {name}")), *said, fault(talk.fault) if talk.fault else None, form,
        tag("p", "The best checkpoint answers, as it was when this conversation began. The first answer takes as long "
                 f"as the model takes to load; {words.plural(len(said), 'message')} so far.", class_="note"),
    ])
    return layout(body, f"Talking to {name}")
