"""The pages of the catalogue, as Markdown: one for each limit, an index, and the table from what is seen to suspects.

Decides headings and order. Knows no file: `docs/generate.py` writes what is returned here, or checks it.
"""

from __future__ import annotations

from fourtuple.limits import FAMILIES, LIMITS, Evidence, Limit, Remedy, Signature, suspects, suspects_by_counter

NOTICE = "<!-- Generated from python/fourtuple/limits by docs/generate.py: edit there. -->\n"


def pages() -> dict[str, str]:
    """Every page by its file name."""
    texts = {file_name(limit): page(limit) for limit in LIMITS}
    return {"README.md": index(), "signatures.md": signatures(), **texts}


def file_name(limit: Limit) -> str:
    """Such as A2-ephemeral-ports.md."""
    return f"{limit.id}-{limit.name}.md"


def page(limit: Limit) -> str:
    """The page of one limit."""
    sections = (
        ("What it bounds", f"{limit.bounds}\n\nScope: {limit.scope.value}. It bounds {limit.kind.value}."),
        ("How it is read", _bullets(limit.read)),
        ("Default", _sentence(limit.default)),
        ("Formula", _sentence(_capital(limit.formula))),
        ("What you see", _bullets(tuple(_seen(signature) for signature in limit.hit))),
        ("Way past", "\n".join(_way(remedy) for remedy in limit.remedies)),
        ("Since", _sentence(_capital(limit.since))),
        ("Side effects", _sentence(_capital(limit.side_effects))),
        ("Source and evidence", f"{_bullets(limit.sources)}\n\nEvidence: {limit.evidence.value}.{_weight(limit)}"),
    )
    body = "\n".join(f"## {heading}\n\n{text}\n" for heading, text in sections)
    return f"{NOTICE}# {limit.id} {limit.name}: {limit.title}\n\n{limit.why}\n\n{body}"


def index() -> str:
    """The table of all limits, a family at a time."""
    lines = [
        NOTICE + "# What bounds TCP connections on Linux",
        "",
        f"{len(LIMITS)} limits. Those measured or read in kernel source give numbers to `fourtuple doctor`; the"
        " others are advice. A version is where a feature appeared upstream; distributions backport, so try it"
        " rather than compare versions. [From what you see to the suspects](signatures.md).",
    ]
    for letter, title, family in FAMILIES:
        lines += [
            "",
            f"## {letter}. {title}",
            "",
            "| | limit | what it is | scope | bounds | default | evidence |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        lines += [
            f"| {limit.id} | [{limit.name}]({file_name(limit)}) | {_cell(limit.title)} | {limit.scope.value}"
            f" | {limit.kind.value} | {_cell(limit.default)} | {limit.evidence.value} |"
            for limit in family.LIMITS
        ]
    return "\n".join(lines) + "\n"


def signatures() -> str:
    """The table from errors, log lines and counters to the limits behind them."""
    every = [signature for limit in LIMITS for signature in limit.hit]
    errors = sorted({(signature.call, signature.errno) for signature in every if signature.errno})
    logs = [(signature.log, limit) for limit in LIMITS for signature in limit.hit if signature.log]
    counters = sorted({signature.counter for signature in every if signature.counter})
    lines = [NOTICE + "# From what you see to the suspects", "", "The first suspect stands first.", ""]
    lines += ["## A system call fails", "", "| call | error | suspects |", "| --- | --- | --- |"]
    lines += [f"| {call} | {errno} | {_links(suspects(call, errno))} |" for call, errno in errors]
    lines += ["", "## A line in the kernel log", "", "| pattern | limit |", "| --- | --- |"]
    lines += [f"| `{_cell(pattern)}` | {_links((limit,))} |" for pattern, limit in logs]
    lines += ["", "## A counter rises", "", "| counter | suspects |", "| --- | --- |"]
    lines += [f"| {name} | {_links(suspects_by_counter(name))} |" for name in counters]
    return "\n".join(lines) + "\n"


def _seen(signature: Signature) -> str:
    note = f": {signature.note}" if signature.note else ""
    if signature.errno:
        return f"`{signature.call}` fails with **{signature.errno}**{note}"
    if signature.log:
        return f"kernel log: `{signature.log}`{note}"
    if signature.counter:
        return f"counter **{signature.counter}** rises{note}"
    return signature.note


def _way(remedy: Remedy) -> str:
    lines = [f"- {_sentence(_capital(remedy.text))}"]
    if remedy.command:
        lines += ["", "  ```sh", f"  {remedy.command}", "  ```", ""]
    if remedy.persist:
        lines.append(f"  To make it last: {_sentence(remedy.persist)}")
    if remedy.risk:
        lines.append(f"  Risk: {_sentence(remedy.risk)}")
    return "\n".join(lines)


def _weight(limit: Limit) -> str:
    if limit.evidence in (Evidence.MEASURED, Evidence.SOURCE):
        return ""
    return " It gives no number to a diagnosis."


def _bullets(items: tuple[str, ...]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _links(limits: tuple[Limit, ...]) -> str:
    return ", ".join(f"[{limit.id} {limit.name}]({file_name(limit)})" for limit in limits)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _sentence(text: str) -> str:
    return text if text.endswith((".", "`")) else f"{text}."


def _capital(text: str) -> str:
    # A name such as io_uring or min(a, b) keeps its spelling at the beginning of a sentence.
    first = text.split(maxsplit=1)[0].rstrip(",;:")
    return text[:1].upper() + text[1:] if first.isalpha() else text
