"""A report as one page of HTML: its style and pictures stand inside it, and it needs no script and no network.

In: the result of a report, its tables, the folder with its pictures. Out: the page's text.
"""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; padding: 24px 32px 64px; max-width: 1120px; background: #fff; color: #1b1b1b;
       font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 20px; margin: 36px 0 8px; } h3 { font-size: 16px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 10px; text-align: left; border-bottom: 1px solid #e2e2e2; vertical-align: top;
         white-space: nowrap; }
.long { white-space: normal; min-width: 220px; }
th { border-bottom: 2px solid #888; font-weight: 600; vertical-align: bottom; white-space: normal; }
.number { text-align: right; }
figure { margin: 20px 0 32px; } figure img { max-width: 100%; height: auto; display: block; }
figcaption, .note, dd { font-size: 13.5px; color: #444; }
figcaption p { margin: 4px 0; }
code { font: 12.5px/1.4 ui-monospace, "DejaVu Sans Mono", monospace; background: #f4f4f4; padding: 1px 4px;
       overflow-wrap: anywhere; }
.warning { border-left: 5px solid #D55E00; background: #fdf3ec; padding: 8px 14px; margin: 12px 0; }
dl { display: grid; grid-template-columns: 120px 1fr; gap: 3px 12px; margin: 8px 0; }
dt { font-weight: 600; font-size: 13.5px; } dd { margin: 0; }
"""


@dataclass
class Table:
    """Cells as text, a note a line; a column all of whose cells are numbers or missing stands to the right."""

    title: str
    headings: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)

    @property
    def numeric(self) -> list[bool]:
        columns = ([row[i] for row in self.rows] for i in range(len(self.headings)))
        return [
            all(re.fullmatch(r"-|not run|[-+]?[\d,.]+(e[-+]?\d+)?( %)?", cell) for cell in column) for column in columns
        ]


def page(heading: str, tables: Sequence[Table], result: dict[str, Any], folder: Path) -> str:
    """The page of a report; the PNGs of `result` lie in `folder`."""
    runs = result["runs"]
    several = len(runs) > 1
    parts = [
        f"<h1>prosparse report: {escape(heading)}</h1>",
        f'<p class="note">{len(runs)} run{"s" * several}. Sparsity is the share of exact zeros in the intermediate, '
        "mean over layers; perplexity is over all predicted tokens. A dash stands for what was not measured.</p>",
        *(_warning(name, run) for name, run in runs.items() if run["status"] != "finished"),
        *(_table(table) for table in tables[:1]),
        *(f'<p class="note">{escape(note)}</p>' for note in _notes(result)),
        "<h2>Figures</h2>",
        *(_figure(name, figure, folder) for name, figure in result["figures"].items()),
        *(_table(table) for table in tables[1:]),
        "<h2>Runs</h2>",
        *(_run(name, run, run.get("report", result)) for name, run in runs.items()),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(heading)}: prosparse report</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def _warning(name: str, run: dict[str, Any]) -> str:
    reasons = run["problems"] or ["its training has not ended: what is shown is what its metrics.jsonl has so far"]
    told = "".join(f"<p>{escape(reason)}</p>" for reason in reasons)
    return f'<div class="warning"><strong>{escape(name)}: {escape(run["status"])}</strong>{told}</div>'


def _table(table: Table) -> str:
    longest = [max((len(row[i]) for row in table.rows), default=0) for i in range(len(table.headings))]
    kinds = [
        ' class="number"' if numeric else ' class="long"' if length > 32 else ""
        for numeric, length in zip(table.numeric, longest, strict=True)
    ]

    def line(cells: Sequence[str], tag: str) -> str:
        scope = ' scope="col"' * (tag == "th")
        inner = "".join(f"<{tag}{scope}{kind}>{escape(c)}</{tag}>" for c, kind in zip(cells, kinds, strict=True))
        return f"<tr>{inner}</tr>"

    body = "\n".join(line(row, "td") for row in table.rows)
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in table.notes)
    return (
        f'<h2>{escape(table.title)}</h2>\n<div class="scroll"><table>\n<thead>{line(table.headings, "th")}</thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table></div>\n{notes}"
    )


def _notes(result: dict[str, Any]) -> list[str]:
    """What the trainings themselves said of their figures, once each, with the names of the runs if there are more."""
    told: dict[str, list[str]] = {}
    for name, run in result["runs"].items():
        for note in run.get("report", result).get("notes") or []:
            told.setdefault(note, []).append(name)
    return [f"{', '.join(names)}: {note}" if len(result["runs"]) > 1 else note for note, names in told.items()]


def _figure(name: str, figure: dict[str, Any], folder: Path) -> str:
    picture = base64.b64encode((folder / name).read_bytes()).decode()
    sources = "".join(
        f"<p><strong>{escape(source['name'])}</strong>: {escape(source['conditions'])}; "
        f"<code>{escape(source['command'])}</code></p>"
        for source in figure["sources"]
    )
    shows = escape(figure["shows"])
    return (
        f'<figure>\n<img alt="{shows}" src="data:image/png;base64,{picture}">\n'
        f"<figcaption><p>{shows}</p>{sources}</figcaption>\n</figure>"
    )


def _run(name: str, run: dict[str, Any], report: dict[str, Any]) -> str:
    versions = ", ".join(f"{key} {value}" for key, value in (report.get("versions") or {}).items())
    facts = {
        "folder": run["folder"],
        "status": run["status"],
        "control": report.get("control"),
        "trained on": f"{report.get('tokens_trained', 0):,} tokens in {report.get('steps', 0):,} steps",
        "device, dtype": f"{report.get('device')}, {report.get('dtype')}",
        "versions": versions,
    }
    told = "".join(f"<dt>{escape(key)}</dt><dd>{escape(str(value))}</dd>" for key, value in facts.items() if value)
    command = f"<dt>command</dt><dd><code>{escape(str(report.get('command')))}</code></dd>"
    return f"<section><h3>{escape(name)}</h3><dl>{told}{command}</dl></section>"
