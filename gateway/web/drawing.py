"""
How the page looks in HTML: each part of a `View` as a section of its own.

Words that come from clients are escaped by twisted.web.template, like all others.  Nothing has a
style of its own, which the page's Content-Security-Policy would not let through.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import attrs
from twisted.web.template import Tag, tags

from gateway.web.view import Call, Chart, Charts, Cold, Series, Tier, View

#: A value of a cell: words, or more.
Content = str | Tag | Sequence[str | Tag]

#: Hundredths of its bucket that a bar is wide; the charts are as high as 100.
_WIDE: Final = 80


@attrs.frozen
class Section:
    """
    A section of the page.

    Attributes:
        title: its heading.
        of: the part of a view that it shows.
        draw: draws that part.
    """

    title: str
    of: Callable[[View], object]
    draw: Callable[..., Content]

    def drawn(self, name: str, part: object) -> Tag:
        """It with that part of a view, under its `name`."""
        title = f"{name}-title"
        content = _each(self.draw(part))
        return tags.section(tags.h2(self.title, id=title), *content, id=name)(
            **{"aria-labelledby": title}
        )


def _tiers(tiers: Sequence[Tier]) -> Tag:
    return tags.div(*map(_tier, tiers), class_="tiers")


def _tier(tier: Tier) -> Tag:
    shown = [tags.div(tags.dt(label), tags.dd(value)) for label, value in tier.figures]
    return tags.article(
        tags.h3(
            tier.name,
            " ",
            tags.span(tier.state, class_=f"state {tier.tone}"),
        ),
        tags.p(tier.model or "its model is not known yet", class_="model"),
        tags.dl(*shown),
        *(
            tags.p(remark, class_="remark ill" if tier.tone == "bad" else "remark")
            for remark in tier.remarks
        ),
        *_advice(tier),
        *_buttons(tier),
        id=f"tier-{tier.name}",
    )


def _advice(tier: Tier) -> list[Tag]:
    if not tier.advice:
        return []
    said = [tags.p(advice) for advice in tier.advice]
    return [tags.details(tags.summary("What could be better"), *said, class_="advice")]


def _buttons(tier: Tier) -> list[Tag]:
    """What can be done with a tier; a restart, which costs most, takes two steps."""
    buttons = []
    if tier.saves:
        buttons.append(_button(f"/page/tiers/{tier.name}/save", "Save a snapshot", tier.name))
    if tier.is_ours:
        button = _button(f"/page/tiers/{tier.name}/restart", "Restart it now", tier.name)
        said = tags.p("Calls that run there are sent again once it is up.")
        summary = tags.summary("Restart…", *_hidden(tier.name))
        buttons.append(tags.details(summary, said, button, class_="restart"))
    return [tags.div(*buttons, class_="buttons")] if buttons else []


def _button(action: str, label: str, of: str) -> Tag:
    """A button that posts; `of` says to who does not see where it stands what it is for."""
    button = tags.button(label, *_hidden(of), type="submit")
    return tags.form(button, method="post", action=action)


def _hidden(words: str) -> list[Tag]:
    return [tags.span(f" ({words})", class_="hidden")]


# --- calls ----------------------------------------------------------------------------------------


def _running(calls: Sequence[Call]) -> Content:
    if not calls:
        return _nothing("No call is under way.")
    columns = ("call", "tier", "#waited", "#runs", "what it does", "")
    return _table(
        "Calls under way",
        columns,
        {
            f"run-{call.id}": (
                _kind(call),
                _route(call),
                call.waited,
                call.took,
                _doing(call),
                _cancel(call) if call.kind != "count" else "",
            )
            for call in calls
        },
    )


def _doing(call: Call) -> Content:
    said: list[str | Tag] = [tags.div(call.doing)]
    if call.fraction is not None:
        bar = tags.progress(value=f"{call.fraction:.3f}", max="1")
        said.insert(0, bar(**{"aria-label": f"Prefill of the {call.kind}"}))
    if call.detail:
        said.append(tags.div(call.detail, class_="more"))
    return said


def _waiting(part: tuple[Sequence[Call], int]) -> Content:
    calls, more = part
    if not calls:
        return _nothing("Nobody waits.")
    columns = ("place", "call", "tier", "#waited", "#its turn in", "why there", "")
    table = _table(
        "Calls in line, in the order in which they will go",
        columns,
        {
            f"wait-{call.id}": (
                call.place,
                _kind(call),
                _route(call),
                call.waited,
                call.eta,
                call.doing,
                _cancel(call) if call.kind != "count" else "",
            )
            for call in calls
        },
    )
    return [table, _nothing(f"and {more} more")] if more else table


def _last(calls: Sequence[Call]) -> Content:
    if not calls:
        return _nothing("No call has ended yet.")
    columns = (
        "at",
        "call",
        "tier",
        "#waited",
        "#first token",
        "#took",
        "#new",
        "#cached",
        "#share",
        "#out",
        "#speed",
        "outcome",
    )
    return _table(
        "Last calls, the latest first",
        columns,
        {
            f"past-{call.id}": (
                call.at,
                _kind(call),
                _route(call),
                call.waited,
                call.first,
                call.took,
                call.new,
                call.cached,
                call.share,
                call.output,
                call.speed,
                tags.span(call.outcome, class_="well" if call.is_well else "ill"),
            )
            for call in calls
        },
    )


def _cold(cold: Sequence[Cold]) -> Content:
    if not cold:
        return _nothing("No prompt was evaluated that need not have been.")
    columns = ("at", "call", "tier", "why", "cost, about")
    return _table(
        "Calls that evaluated again what had been evaluated before",
        columns,
        {f"cold-{each.id}": (each.at, each.kind, each.tier, each.why, each.cost) for each in cold},
    )


def _kind(call: Call) -> Content:
    kind = tags.span(call.kind, class_="kind aside" if call.background else "kind")
    return [kind, tags.div(call.model, class_="more")]


def _route(call: Call) -> Content:
    return [call.tier, tags.div(call.rule, class_="more")]


def _cancel(call: Call) -> Tag:
    return _button(f"/page/calls/{call.id}/cancel", "Cancel", f"{call.kind} {call.id}")


def _each(content: Content) -> Sequence[str | Tag]:
    return [content] if isinstance(content, str | Tag) else content


def _nothing(why: str) -> Tag:
    return tags.p(why, class_="nothing")


def _table(caption: str, columns: Sequence[str], rows: Mapping[str, Sequence[Content]]) -> Tag:
    """
    A table, which a narrow screen shows as cards; rows by their ids.

    A column whose name begins with ``#`` holds numbers.  The roles are those that the elements have
    anyway, until a style sheet makes cards of them.
    """
    names = [column.removeprefix("#") for column in columns]
    classes = ["number" if column.startswith("#") else "words" for column in columns]
    heads = [
        tags.th(name or tags.span("buttons", class_="hidden"), scope="col", class_=kind)(
            role="columnheader"
        )
        for name, kind in zip(names, classes, strict=True)
    ]
    lines = []
    for identity, cells in rows.items():
        line = tags.tr(id=identity, role="row")
        for name, kind, cell in zip(names, classes, cells, strict=True):
            line(tags.td(*_each(cell), class_=kind, role="cell")(**{"data-name": name}))
        lines.append(line)
    return tags.table(
        tags.caption(caption, class_="hidden"),
        tags.thead(tags.tr(*heads, role="row"), role="rowgroup"),
        tags.tbody(*lines, role="rowgroup"),
        role="table",
    )


# --- charts ---------------------------------------------------------------------------------------


def _charts(charts: Charts | None) -> Content:
    if charts is None:
        return _nothing("No call came in the last six hours.")
    columns = ("from", "#calls", "#evaluated", "#cached", "#share", "#out", "#first token")
    rows = {f"hour-{number}": hour for number, hour in enumerate(charts.hours)}
    table = _table("The same by the hour", columns, rows)
    return [
        tags.div(*(_chart(chart, charts.begin) for chart in charts.charts), class_="charts"),
        tags.details(tags.summary("By the hour"), table, id="hours"),
    ]


def _chart(chart: Chart, begin: str) -> Tag:
    bars = [
        _svg("path", d=_path(series), class_=f"series {series.name}") for series in chart.series
    ]
    width = 100 * len(chart.series[0].bars)
    drawing = _svg(
        "svg", *bars, viewBox=f"0 0 {width} 100", preserveAspectRatio="none", role="img"
    )(**{"aria-label": f"{chart.title}: {chart.says}"})
    legend = [tags.span(series.name, class_=f"legend {series.name}") for series in chart.series]
    return tags.figure(
        tags.figcaption(tags.h3(chart.title), tags.p(*legend if len(legend) > 1 else [])),
        tags.div(tags.span(chart.top, class_="top"), drawing, class_="plot"),
        tags.div(tags.span(begin), tags.span("now"), class_="axis"),
    )


def _path(series: Series) -> str:
    """Bars, each in its bucket; one that would not be seen is drawn a little higher."""
    drawn = []
    for number, bar in enumerate(series.bars):
        if bar is None or bar[0] == bar[1]:
            continue
        low, high = 100 - 100 * bar[0], 100 - 100 * bar[1]
        high = min(high, low - 1)
        left = 100 * number + (100 - _WIDE) // 2
        drawn.append(f"M{left} {low:.1f}V{high:.1f}h{_WIDE}V{low:.1f}z")
    return "".join(drawn)


def _svg(name: str, *content: Tag, class_: str = "", **attributes: str) -> Tag:
    drawn = Tag(name)(*content, **attributes)
    return drawn(class_=class_) if class_ else drawn


#: The sections of the page, by the ids that they have there.
SECTIONS: Final[Mapping[str, Section]] = {
    "tiers": Section("Tiers", lambda view: view.tiers, _tiers),
    "running": Section("Under way", lambda view: view.running, _running),
    "waiting": Section("In line", lambda view: (view.waiting, view.more), _waiting),
    "cold": Section("Cold prompts", lambda view: view.cold, _cold),
    "charts": Section("The last six hours", lambda view: view.charts, _charts),
    "last": Section("Last calls", lambda view: view.last, _last),
}
