"""Class names and class ids of the `label` column, and cells that hold several labels."""

import ast
import itertools
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .audio import source_name
from .manifests import INTEGER, as_text

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

logger = logging.getLogger(__name__)

NO_SEPARATOR = "none"
_ITEM = r"""(?:np\.str_\()?('(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*")\)?"""
_QUOTED_LIST = re.compile(rf"[\[({{]\s*{_ITEM}(?:(?:\s*,\s*|\s*){_ITEM})*\s*,?\s*[\])}}]")
_NUMBER_LIST = re.compile(r"\[\s*(?:-?\d+\.?(?:\s*,\s*|\s+|(?=\])))*\]")  # or an empty one
_BARE_LIST = re.compile(r"\[[^\[\]'\"]*\]")
_MIDS = re.compile(r"(/[mgt]/\w+)(\s*,\s*/[mgt]/\w+)+")  # ids of AudioSet
_MISSING = ("nan", "na", "n/a", "<na>", "null")
_TIGHT_COMMA = re.compile(r",(?=\S)")


def label_names(dataset: "Dataset | IterableDataset") -> list[str]:
    """Class names of the `label` column, by class id."""
    names = class_names((dataset.features or {}).get("label"))
    if names is None:
        raise ValueError(f"expected a label column with class names among {dataset.column_names}: see encode_labels")
    return names


def divide_labels(
    dataset: "Dataset", names: Sequence[str] | None = None, separator: str | None = None, source: str = "the data set"
) -> "Dataset":
    """Turn a `label` column of text into lists if its cells hold several labels, as found by `find_lists`.

    Args:
        dataset: any; a column of other types stays as it is.
        names: class names that are known, for instance those of the training data.
        separator: of labels in a cell, or "none" to keep all cells whole. By default found from the column.
        source: of the labels, for messages.
    """
    feature = dataset.features["label"]
    if separator == NO_SEPARATOR or str(getattr(feature, "dtype", "")) not in ("string", "large_string"):
        return dataset
    cells = dataset["label"][:]
    labels = divide_cells(Counter(cells), names, separator, source)
    divided = [labels[cell] for cell in cells]
    return dataset if divided == cells else dataset.remove_columns("label").add_column("label", divided)


def divide_cells(
    counts: Mapping[str | None, int],
    names: Sequence[str] | None = None,
    separator: str | None = None,
    source: str | os.PathLike = "the data set",
) -> dict[str | None, Any]:
    """The label of each different cell of a column, or its labels if the cells are lists; see [`divide_labels`].

    Args:
        counts: how often each cell occurs.
        names, separator, source: as there.
    """
    stripped = {cell: cell.strip() or None if cell else None for cell in counts}
    if separator == NO_SEPARATOR:
        return stripped
    texts = sorted({text for text in stripped.values() if text})
    if separator:
        lists = {text: _cleaned(text.split(separator)) for text in texts if separator in text}
    else:
        lists = find_lists(texts, names)
    if not lists:
        return stripped
    example = next(text for text in stripped.values() if text in lists)
    if all(len(labels) < 2 and written_list(text) is None for text, labels in lists.items()):
        what = f"label cells of {source} such as {example!r} have a separator, but none has several labels"
        logger.warning_once(f"{what}: each is one label (label_separator=none keeps them whole)")
        return {cell: next(iter(lists[text]), None) if text in lists else text for cell, text in stripped.items()}
    number = {True: 0, False: 0, None: 0}  # of lists, of other labels and of empty cells
    for cell, text in stripped.items():
        number[text and text in lists] += counts[cell]
    what = f"{number[True]} of {sum(number.values())} label cells of {source} are lists"
    what += f", such as {example!r} of {' and '.join(map(repr, lists[example])) or 'nothing'}"
    if number[None]:
        what += f", and {number[None]} are empty, for clips without a label"
    say = logger.info if separator else logger.warning_once
    say(f"{what} (label_separator=none keeps them whole)")
    return {cell: lists.get(text, [text] if text else []) for cell, text in stripped.items()}


def label_text(label: Any, names: Sequence[str] | None = None) -> str | None:
    """A label as text: a class id by its name in `names`; of a list, the labels joined by `;`; None if missing."""
    if isinstance(label, (list, tuple, np.ndarray)):
        return ";".join(filter(None, (label_text(one, names) for one in label))) or None
    if label is None or (isinstance(label, float) and math.isnan(label)):
        return None
    if names is not None:
        return names[label] if label >= 0 else None  # `datasets` has -1 for a missing class
    return as_text(label)


def find_lists(texts: Iterable[str], names: Sequence[str] | None = None) -> dict[str, list[str]]:
    """The labels in those texts of a column that are lists of labels.

    A text is a list if it is written as one (`['dog', 'cat']`), holds `;` or `|`, or ids of AudioSet between commas,
    or if it divides at commas into other labels of the column, or into `names`; commas that this leaves divide, those
    without a space if any part of such a text is found in another text, and those with a space if most parts are,
    counting parts that only occur next to each other as one.

    So "Speech, Music" is a list beside "Speech" and "Music", "Accordion,Instrument,Music" is one beside
    "Drum,Instrument,Music", and "Inside, small room" is a class, also beside "Inside, public space".

    Args:
        texts: different texts of the column.
        names: class names, if they are known; texts among them are no lists, and no others divide at commas.
    """
    known, lists, commas = set(names or ()), {}, []
    texts = [text for text in texts if text not in known]
    bare = all(_BARE_LIST.fullmatch(text) for text in texts) and any("," in text for text in texts)
    for text in texts:
        items = written_list(text)
        if items is not None:
            lists[text] = items
        elif bare:
            lists[text] = _split(text[1:-1], ",")
        elif ";" in text or "|" in text:
            lists[text] = _split(text, ";|")
        elif _MIDS.fullmatch(text):
            lists[text] = _split(text, ",")
        elif "," in text:
            commas.append(text)
    if names is None:
        known = {text for text in texts if text not in lists and "," not in text}
        known.update(label for labels in lists.values() for label in labels)
    divided = _divide_at_commas(commas, known, names is None)
    return lists | divided


def written_list(text: str) -> list[str] | None:
    """The items of a list in the syntax of Python, numpy or json."""
    if _QUOTED_LIST.fullmatch(text):
        return _cleaned(ast.literal_eval(item) for item in re.findall(_ITEM, text))
    if _NUMBER_LIST.fullmatch(text):
        return re.findall(r"-?\d+", text)
    return None


def _split(text: str, separators: str) -> list[str]:
    return _cleaned(re.split(f"[{re.escape(separators)}]", text))


def _cleaned(labels: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(label.strip() for label in labels if label.strip()))


def _divide_at_commas(texts: Sequence[str], known: set[str], guess: bool) -> dict[str, list[str]]:
    bound = _bound_parts([*texts, *known])
    parts = {text: tuple(_join_bound(text, bound)) for text in (*texts, *known)}
    labels = {parts[label]: label for label in known}
    lists, rest = {}, []
    for text in sorted(texts, key=lambda text: len(parts[text])):  # a text can be a label of longer ones
        if composed := compose(parts[text], labels):
            lists[text] = composed
        elif guess:
            labels[parts[text]] = text
            rest += [text] if len(parts[text]) > 1 else []
    tight = {text: _cleaned(_TIGHT_COMMA.split(text)) for text in rest if _TIGHT_COMMA.search(text)}
    spaced = {text: list(parts[text]) for text in rest if text not in tight}
    counts = Counter(unit for units in (*tight.values(), *spaced.values(), *lists.values()) for unit in units)
    counts.update(set(labels.values()).difference(rest))
    for group, least in ((tight, 0.0), (spaced, 0.5)):
        shared = [counts[unit] > 1 for units in group.values() for unit in units]
        if sum(shared) > least * len(shared):
            lists.update(group)
    return {
        text: _cleaned(one for label in found for one in lists.get(label, [label])) for text, found in lists.items()
    }


def _bound_parts(texts: Iterable[str]) -> set[tuple[str, str]]:
    """Pairs of parts that only occur next to each other, with a comma and a space between."""
    parts, pairs = Counter(), Counter()
    for text in texts:
        parts.update(_split(text, ","))
        for one in _TIGHT_COMMA.split(text):
            pairs.update(itertools.pairwise(_split(one, ",")))
    return {pair for pair, count in pairs.items() if count == parts[pair[0]] == parts[pair[1]]}


def _join_bound(text: str, bound: set[tuple[str, str]]) -> list[str]:
    parts = _split(text, ",")
    joined = parts[:1]
    for before, part in itertools.pairwise(parts):
        if (before, part) in bound:
            joined[-1] += f", {part}"
        else:
            joined.append(part)
    return joined


def compose(parts: tuple[str, ...], labels: dict[tuple, str]) -> list[str] | None:
    """The labels that `parts` consist of, the longest first; None if they do not."""
    if not parts:
        return []
    for end in range(len(parts), 0, -1):
        if parts[:end] in labels and (rest := compose(parts[end:], labels)) is not None:
            return [labels[parts[:end]], *rest]
    return None


def encode_labels(dataset: Any, names: Sequence[str] | None = None) -> "Dataset | IterableDataset":
    """Turn the `label` column into class ids: `ClassLabel`, or `List(ClassLabel)` if it holds lists.

    Args:
        dataset: `Dataset` or `IterableDataset` with strings, integers (the class named "7"), class ids, or lists of
            them as `label`. Floating-point numbers that are all whole are integers (pandas writes them so if one is
            missing); others stay, for regression.
        names: class names by id, for instance a model's; by default the sorted labels of the data set. Required for a
            stream.

    Raises:
        ValueError: a label that is not among `names`, with its row; no label column; a stream without `names`.
    """
    from datasets import Dataset

    feature = (dataset.features or {}).get("label")
    if dataset.column_names is not None and "label" not in dataset.column_names:
        raise ValueError(f"expected a label column, got {dataset.column_names}")
    own_names = class_names(feature)
    if own_names is not None and (names is None or list(names) == own_names):
        return dataset
    is_float = str(getattr(getattr(feature, "feature", feature), "dtype", "")).startswith("float")
    if is_float and not (isinstance(dataset, Dataset) and _are_whole(dataset["label"][:])):
        if names is not None:
            raise ValueError(f"expected labels among {shortened(names)}, got floating-point numbers")
        return dataset
    if not isinstance(dataset, Dataset):
        return _encode_stream(dataset, names, own_names)
    labels = [_as_strings(label, own_names) for label in dataset["label"][:]]
    if names is None:
        found = {name for label in labels for name in (label if isinstance(label, list) else [label])} - {None}
        names = sorted(found, key=int if all(INTEGER.fullmatch(name) for name in found) else None)
        spellings = Counter(name.casefold() for name in found)
        alike = [name for name in names if spellings[name.casefold()] > 1]
        if alike:
            logger.warning_once(f"classes that differ only in case: {shortened(alike, 10)}")
        if missing := [name for name in names if name.casefold() in _MISSING]:
            logger.warning_once(f"labels that often mean a missing one are classes: {shortened(missing)}")
        if is_float:
            shown = shortened(names, 5)
            logger.warning_once(
                f"labels that are whole numbers are classes: {shown} (numbers: problem_type=regression)"
            )
    multiple = any(isinstance(label, list) for label in labels)

    def place(row: int) -> str:
        return f"row {row} ({source_name(dataset[row]['audio'])})"

    ids = _class_ids(labels, names, place)
    return dataset.remove_columns("label").add_column("label", ids, feature=_label_feature(names, multiple))


def class_names(feature: Any) -> list[str] | None:
    """Class names of a column's feature, by class id; None if its values are not class ids."""
    names = getattr(getattr(feature, "feature", feature), "names", None)
    return None if names is None else list(names)


def _label_feature(names: Sequence[str], multiple: bool) -> Any:
    from datasets import ClassLabel, List

    label = ClassLabel(names=list(names))
    return List(label) if multiple else label


def _as_strings(label: Any, names: list[str] | None) -> Any:
    """A label or a list of labels as class names without spaces around them; missing ones are None, and in lists no
    labels.
    """
    if isinstance(label, (list, tuple, np.ndarray)):
        labels = (_as_strings(one, names) for one in label)
        return list(dict.fromkeys(one for one in labels if one is not None))
    if label is None or isinstance(label, str):
        return (label or "").strip() or None
    if isinstance(label, float) and math.isnan(label):
        return None
    return as_text(label) if names is None else names[label]


def _are_whole(labels: Sequence) -> bool:
    present = [label for label in labels if label is not None and not (isinstance(label, float) and math.isnan(label))]
    return bool(present) and all(isinstance(label, float) and label.is_integer() for label in present)


def _class_ids(labels: Iterable, names: Sequence[str], place: Callable[[int], str]) -> list:
    ids = {name: index for index, name in enumerate(names)}
    encoded = []
    for row, label in enumerate(labels):
        for name in label if isinstance(label, list) else [label]:
            if name is not None and name not in ids:
                raise ValueError(f"expected a label among {shortened(names)}; got {name!r} in {place(row)}")
        encoded.append([ids[name] for name in label] if isinstance(label, list) else ids.get(label))
    return encoded


def _encode_stream(dataset: "IterableDataset", names: Sequence[str] | None, own_names: list[str] | None) -> Any:
    import pyarrow
    from datasets import Features

    if names is None:
        raise ValueError("expected names, which cannot be collected from the labels of a stream; got None")
    if dataset.features is None:
        raise ValueError("expected a stream with features, which show whether rows have lists of labels; got None")
    multiple = hasattr(dataset.features["label"], "feature")
    features = Features({**dataset.features, "label": _label_feature(names, multiple)})

    # tables, as encoding rows with an Audio column needs torchcodec
    def encode(table: "pyarrow.Table") -> "pyarrow.Table":
        labels = [_as_strings(label, own_names) for label in table["label"].to_pylist()]
        ids = _class_ids(labels, names, lambda row: f"the file {source_name(table['audio'][row].as_py())}")
        column = table.schema.get_field_index("label")
        return table.set_column(column, "label", pyarrow.array(ids, type=features.arrow_schema.field("label").type))

    return dataset.with_format("arrow").map(encode, batched=True, features=features).with_format(None)


def shortened(names: Sequence[str], limit: int = 60) -> str:
    """Names for a message."""
    shown = ", ".join(names[:limit])
    return f"{shown}, ... ({len(names)} in total)" if len(names) > limit else shown
