"""Rows of a data set by the values of their columns."""

import csv
import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from .labels import class_names, compose, shortened, written_list
from .manifests import INTEGER, NUMBER, as_text

logger = logging.getLogger(__name__)


def filter_rows(
    dataset: Any, filters: Sequence[str], source: Any = "the data set", renamed: Mapping[str, str] | None = None
) -> Any:
    """The rows that match all filters, each `COLUMN=VALUE[,VALUE...]`.

    Labels are compared by class name and numbers by value; one item of a list has to match. A value with a comma may
    be quoted, as in csv, but need not be if the column has it. `source` is for messages, and `renamed` has the
    columns by other names that filters may use.

    Raises:
        ValueError: another form, no such column, or no matching row. A value that no row has is only reported if
            others match. Streams are not checked.
    """
    kept = None
    for condition in filters:
        column, _, text = (part.strip() for part in condition.partition("="))
        if not text:
            raise ValueError(f"expected a filter COLUMN=VALUE[,VALUE...], got {condition!r}")
        column = (renamed or {}).get(column, column)
        if column not in dataset.column_names:
            known = list(dict.fromkeys([*dataset.column_names, *(renamed or ())]))
            raise ValueError(f"expected a filter by one of the columns {known}, got {condition!r}")
        names = class_names(dataset.features[column])
        if not hasattr(dataset, "select"):
            wanted = {_plain(text), *_wanted(text, ())}
            dataset = dataset.filter(_matches, input_columns=column, fn_kwargs={"wanted": wanted, "names": names})
            continue
        cells = [_values(cell, names) for cell in dataset[column][:]]
        found = set().union(*cells)
        wanted = _wanted(text, found)
        absent = [value for value in wanted if value not in found]
        if absent:
            what = f"no row of {source} has the {column} {' or '.join(absent)} of the filter {condition}"
            message = f"{what}: expected values among {shortened(sorted(found))}"
            if len(absent) == len(wanted):
                raise ValueError(message)
            logger.warning_once(message)
        rows = {row for row, values in enumerate(cells) if not values.isdisjoint(wanted)}
        kept = rows if kept is None else kept & rows
    if kept is None:
        return dataset
    if not kept:
        raise ValueError(f"no row of {source} matches all of the filters {' and '.join(filters)}")
    return dataset.select(sorted(kept))


def _matches(cell: Any, wanted: set[str], names: list[str] | None) -> bool:
    return not _values(cell, names).isdisjoint(wanted)


def _values(cell: Any, names: list[str] | None) -> set[str]:
    """What a filter can name a cell by; a text that is written as a list, also by its items."""
    items = cell if isinstance(cell, list) else [cell]
    if names is None:
        items = [*items, *(one for item in items if isinstance(item, str) for one in written_list(item) or ())]
    return {_plain(item if names is None else names[item]) for item in items if item is not None}


def _plain(value: Any) -> str:
    """One spelling of equal values: 1 and 1.0, True and true."""
    text = as_text(value).strip()
    if not INTEGER.fullmatch(text) and NUMBER.fullmatch(text):
        return as_text(float(text))
    return text.lower() if text.lower() in ("true", "false") else text


def _wanted(text: str, found: Collection[str]) -> list[str]:
    """The values of a filter, given those that the column has, of which some may have commas."""
    if _plain(text) in found:
        return [_plain(text)]
    parts = next(csv.reader([text], skipinitialspace=True))
    if '"' not in text:
        parts = [part.strip() for part in parts]
        whole = {tuple(part.strip() for part in value.split(",")): value for value in found if "," in value}
        parts = compose(tuple(parts), {**{(part,): part for part in parts}, **whole})
    return [_plain(part) for part in parts if part.strip()]
