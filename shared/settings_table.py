"""The list of all settings: `python -m shared.settings_table [--markdown]`, or `make settings`.

In: the settings schema and the environment. Out: on stdout, per section, each variable with its value in force, its
default where that differs, type with bounds, and its sentence. With wrong settings the list shows the defaults, and
the error is one sentence on stderr with exit status 2: a misspelt variable must not hide the list that mends it.
`--markdown` gives the page of the documentation, which has defaults alone.
"""

import argparse
import os
import re
import signal
import sys
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from shared.settings import PREFIX, Settings, SettingsError, build_settings

INTRODUCTION = """\
Made by `make settings-page` from `shared/settings.py`. `make settings` shows the same with the values in force. A
profile (`DRZERO_PROFILE`, a file in `shared/profiles/`) changes some of the defaults; a variable wins over it. An empty
variable counts as unset, a misspelt one is an error."""
MARKDOWN_HEAD = ("| variable | default | type | meaning |", "| --- | --- | --- | --- |")
BOUNDS = {"ge": "≥ {}", "gt": "> {}", "le": "≤ {}", "lt": "< {}", "pattern": "like {}"}


def table(settings: Settings | None) -> str:
    """The whole list as text; without settings only the defaults."""
    lines: list[str] = []
    for title, sentence, rows in _sections(Settings, settings, ()):
        lines += [f"# {title}: {sentence}" if title else f"# {sentence}", ""]
        for variable, value, default, kind, meaning in rows:
            note = "" if value == default else f"   (default {default})"
            lines += [f"{variable}={value}{note}", f"    {kind}. {meaning}"]
        lines.append("")
    return "\n".join(lines)


def page() -> str:
    """The list as a Markdown page: defaults, types and sentences, a table per section."""
    lines = ["# Settings", "", INTRODUCTION]
    for title, sentence, rows in _sections(Settings, None, ()):
        lines += ["", f"## {title or 'for all'}", "", sentence, "", *MARKDOWN_HEAD]
        for variable, _, default, kind, meaning in rows:
            cells = (f"`{variable}`", f"`{default}`" if default else "", kind, meaning)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


Row = tuple[str, str, str, str, str]


def _sections(
    section: type[BaseModel], values: BaseModel | None, path: tuple[str, ...]
) -> Iterator[tuple[str, str, list[Row]]]:
    rows: list[Row] = []
    inner: list[tuple[type[BaseModel], BaseModel | None, tuple[str, ...]]] = []
    for name, field in section.model_fields.items():
        kind = field.annotation
        value = field.get_default() if values is None else getattr(values, name)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            inner.append((kind, None if values is None else value, (*path, name)))
            continue
        variable = PREFIX + "__".join((*path, name)).upper()
        rows.append((variable, show(value), show(field.get_default()), describe(field), field.description or ""))
    yield ".".join(path), section.__doc__ or "", rows
    for part in inner:
        yield from _sections(*part)


def show(value: Any) -> str:
    """A value as a variable would hold it; a password inside an address is left out."""
    if value is None:
        return ""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if isinstance(value, bool):
        return str(value).lower()
    return re.sub(r"//[^@/]*@", "//…@", str(value))


def describe(field: FieldInfo) -> str:
    """The type and bounds of a field, e.g. `int, ≥ 1, ≤ 65535`."""
    parts = [_kind(field.annotation)]
    for rule in field.metadata:
        parts += [text.format(bound) for key, text in BOUNDS.items() if (bound := getattr(rule, key, None)) is not None]
    return ", ".join(parts)


def _kind(annotation: Any) -> str:
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(inside[0])
    if origin is Literal:
        return "one of " + ", ".join(map(str, inside))
    if origin in (Union, types.UnionType):
        return " or ".join("empty" if part is type(None) else _kind(part) for part in inside)
    if origin is tuple:
        return f"{len(inside)} × {_kind(inside[0])}, separated by commas"
    name = str(annotation.__name__).lower()
    return {"str": "text", "bool": "true or false"}.get(name, name)


def main() -> int:
    """Print the list; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m shared.settings_table", description="List all settings.")
    parser.add_argument("--markdown", action="store_true", help="as a page of the documentation")
    if parser.parse_args().markdown:
        print(page(), end="")
        return 0
    problem: SettingsError | None = None
    settings: Settings | None = None
    try:
        settings = build_settings(os.environ)
    except SettingsError as error:
        problem = error
    print(table(settings))
    if problem is not None:
        print(f"settings: {problem}; the list above shows the defaults", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `make settings | head` ends without a traceback
    raise SystemExit(main())
