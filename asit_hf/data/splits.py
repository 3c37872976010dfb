"""Names of splits, and splits into training and test data that keep groups together."""

import logging
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..utils.names import path_text

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

_SPLIT_KINDS = {
    "train": ("train", "training", "trainset"),
    "validation": ("validation", "valid", "val", "dev", "devel", "development"),
    "test": ("test", "testing", "testset", "eval", "evaluation"),
}
# words beside the name of a split, as in audio_train or train_labels.csv
_FILLERS = frozenset(
    ("annotation", "annotations", "audio", "clips", "csv", "data", "dataset", "files", "fold", "labels")
)
_FILLERS |= {"list", "manifest", "meta", "metadata", "set", "split", "wav", "wavs"}
_GROUP_COLUMNS = ("speaker", "speaker_id", "src_file", "source", "source_id", "recording", "recording_id", "fold")
# A group column found by its name may cost at most this share of the classes on one side.
_MAX_LOST_CLASSES = 0.1


def split_kind(name: str) -> str | None:
    """ "train", "validation" or "test" for a name of a split (training, val, dev, Eval, audio_train), else None."""
    words = [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word and word not in _FILLERS]
    kinds = [kind for kind, names in _SPLIT_KINDS.items() if words and words[0] in names]
    return kinds[0] if kinds and len(words) == 1 else None


def match_split(wanted: str, names: Iterable[str]) -> str | None:
    """`wanted` among `names`, in another case, or the only one of its kind: "train" finds "Training"."""
    names = list(names)
    if wanted in names:
        return wanted
    kind = split_kind(wanted)
    for same in (
        [name for name in names if name.lower() == wanted.lower()],
        [name for name in names if kind and split_kind(name) == kind],
    ):
        if len(same) == 1:
            return same[0]
    return None


def default_splits(names: Iterable[str], where: Any) -> dict[str, str]:
    """The split of each kind: "train", and "validation" and "test" if there are any.

    Raises:
        ValueError: no split for training, or several of one kind.
    """
    names = list(names)
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(split_kind(name) or name, []).append(name)
    several = [", ".join(same) for same in kinds.values() if len(same) > 1]
    if "train" not in kinds or several:
        what = f"several of one kind, {several[0]}" if several else "none for training"
        raise ValueError(f"cannot choose among the splits of {where}, {', '.join(names)}: {what}; name the splits")
    return {kind: kinds[kind][0] for kind in _SPLIT_KINDS if kind in kinds}


def split_paths(folder: Path, audio: Iterable[Path], tables: Iterable[Path]) -> dict[str, Path]:
    """Splits of a folder by name: a table each (train.csv), or else the first-level folders, if all are splits.

    Args:
        folder: absolute or relative, as the files.
        audio: files of audio, or shards of it, below the folder.
        tables: manifests in the folder.
    """
    named = {table.stem: table for table in tables if split_kind(table.stem)}
    if any(split_kind(name) == "train" for name in named):
        return named
    names = first_folders(folder, audio)
    return {name: folder / name for name in names} if all(map(split_kind, names)) else {}


def first_folders(folder: Path, files: Iterable[Path]) -> Counter:
    """Numbers of files by first-level folder, without folders such as `_background_noise_`."""
    parts = (file.relative_to(folder).parts for file in files)
    return Counter(names[0] for names in parts if len(names) > 1 and not names[0].startswith("_"))


def check_class_folders(folder: Path, files: Sequence[Path]) -> None:
    """Refuse first-level folders that are no classes, or that may be splits.

    Raises:
        ValueError: folds, splits beside classes, splits by other names (train_curated and test, or dev-clean and
            test-clean), or a single folder that holds folders.
    """
    counts = first_folders(folder, files)
    names = ", ".join(f"{name} ({count} files)" for name, count in counts.items())
    if len(counts) > 1 and all(re.fullmatch(r"(fold|part|split)[ _-]?\d+", name.lower()) for name in counts):
        raise ValueError(
            f"expected class folders in {folder}, got folds: {names}; pass one fold, or a manifest with a column of "
            "labels and one of folds"
        )
    inner = {file.relative_to(folder).parts[1] for file in files}
    direct = {file.parent.name for file in files if file.parent.parent == folder}
    (only, _), *others = counts.items()
    if not others and only not in direct:
        raise ValueError(
            f"expected class folders in {folder}, got one folder, {only}, that holds {', '.join(sorted(inner))}: pass "
            f"{folder / only}"
        )
    splits = [name for name in counts if split_kind(name)]
    kinds = [set(filter(None, map(split_kind, re.split(r"[^a-zA-Z0-9]+", name)))) for name in counts]
    if all(kinds) and len(set().union(*kinds)) > 1:
        splits = list(counts)
    several = len(splits) == len(counts) or len({split_kind(name) for name in splits}) > 1
    if splits and len(counts) > 1 and (several or not direct.issuperset(splits)):
        raise ValueError(
            f"cannot tell splits from classes in {folder}: {', '.join(splits)} among {names}; name one folder "
            "as split (--train_split, ...), move the classes into a folder for each split, or pass a manifest"
        )
    if splits and len(counts) > 1:
        logger.warning("the folder %s of %s is a class, as no other folder is a split", splits[0], folder)
    if len(inner) > 1 and all(map(split_kind, inner)):
        logger.warning(
            "the classes of %s are divided into %s, all of which are read", folder, ", ".join(sorted(inner))
        )
    empty = [one.name for one in sorted(folder.iterdir()) if one.is_dir() and one.name not in counts]
    if empty := [name for name in empty if not name.startswith((".", "_"))]:
        shown = _shown(map(path_text, empty))
        logger.warning("%d folders of %s hold no audio and are no classes: %s", len(empty), folder, shown)


def find_group_column(dataset: "Dataset", wanted: str | None = None) -> str | None:
    """The column whose groups cross-validation keeps together, or None to divide single rows.

    By default it is the first of the usual columns (speaker, source file, recording, fold) of which no group has more
    than half of the rows, and which leaves at most a tenth of the classes in one group, so that they cannot be both
    fitted and validated. What was chosen is logged, with a warning if a column does not serve or a class is alone.

    Args:
        dataset: rows, perhaps with a `label` column.
        wanted: the column, whatever its groups; "" for none.

    Raises:
        ValueError: no such column.
    """
    if wanted and wanted not in dataset.column_names:
        raise ValueError(f"expected group_column to be one of {dataset.column_names}, got {wanted!r}")
    labels = _classes(dataset)
    usual = [name for name in _GROUP_COLUMNS if name in dataset.column_names]
    for column in [*usual, ""] if wanted is None else [wanted]:
        groups = _groups(dataset, column)
        sizes, of_class = Counter(groups), {}
        for group, classes in zip(groups, labels):
            for one in classes:
                of_class.setdefault(one, set()).add(group)
        alone = [one for one, found in of_class.items() if len(found) < 2]
        if len(sizes) < 2 and wanted is None:
            continue
        what = f"{len(sizes)} groups" + (f"; in one group only: {_shown(alone)}" if alone else "")
        if wanted is None and column:
            largest = max(sizes.values())
            if largest > 0.5 * len(groups) or len(alone) > _MAX_LOST_CLASSES * len(of_class):
                what += f"; the largest has {largest} of {len(groups)} rows"
                logger.warning("rows are not grouped by %s (%s); --group_column %s does so", column, what, column)
                continue
        if column:
            message = 'rows are grouped by %s (%s); --group_column names another column, "" none'
            (logger.warning if alone else logger.info)(message, column, what)
        elif alone:
            logger.warning("classes of one row cannot be both fitted and validated: %s", _shown(alone))
        return column or None
    return None


def split_dataset(
    dataset: "Dataset", test_fraction: float, seed: int = 0, group_column: str | None = None, stratify: bool = True
) -> "tuple[Dataset, Dataset]":
    """Split into (train, test), deterministically for the same rows and seed.

    Args:
        dataset: rows, with a `label` column if `stratify` is to have an effect.
        test_fraction: share of the test rows, between 0 and 1; approximate, as groups stay whole. A class of one row
            or one group stays in the training data if it can.
        seed: of the draw.
        group_column: rows with the same value in this column stay on one side; a row without a value is a group. By
            default the first of the usual columns (speaker, source file, recording, fold) that gives half to twice
            the fraction and no fewer classes on either side than a split by row, up to a tenth of them; "" to split
            by row.
        stratify: keep each label's share equal on both sides, as far as the groups allow.

    What was chosen is logged, with a warning if the share is far off or a class is missing on one side.

    Raises:
        ValueError: an empty side, or no such column.
    """
    if not 0 < test_fraction < 1:
        raise ValueError(f"expected a test_fraction between 0 and 1, got {test_fraction}")
    if group_column and group_column not in dataset.column_names:
        raise ValueError(f"expected group_column to be one of {dataset.column_names}, got {group_column!r}")
    labels = _classes(dataset) if stratify else [[None]] * len(dataset)
    usual = [name for name in _GROUP_COLUMNS if name in dataset.column_names]
    candidates = [*usual, ""] if group_column is None else [group_column]

    def off(in_test: np.ndarray) -> float:
        """Rows beyond a quarter above or below the fraction."""
        aim = test_fraction * len(in_test)
        return max(0.0, abs(in_test.sum() - aim) - max(1, 0.25 * aim))

    def draw(column: str) -> tuple[np.ndarray, int, list[list]]:
        groups = _groups(dataset, column)
        in_test = _draw_test_rows(groups, labels, test_fraction, seed)
        if column and off(in_test):
            in_test = min(in_test, _draw_test_rows(groups, labels, test_fraction, seed, largest_first=True), key=off)
        sides = ({one for row in np.flatnonzero(side) for one in labels[row]} for side in (~in_test, in_test))
        first, second = sides
        return in_test, len(set(groups)), [sorted(second - first, key=str), sorted(first - second, key=str)]

    num_classes = len({one for classes in labels for one in classes})
    by_row = None
    for column in candidates:
        in_test, num_groups, missing = draw(column)
        by = f"{num_groups} groups of column {column!r}" if column else f"{num_groups} rows"
        share = in_test.mean() if len(in_test) else 0.0
        found = f"{in_test.sum()} of {len(in_test)} rows ({share:.0%}) for a fraction of {test_fraction:g}"
        sides = [(where, names) for where, names in zip(("training", "held-out"), missing) if names]
        found += "".join(f"; no {where} rows of {len(names)} classes: {_shown(names)}" for where, names in sides)
        if group_column is not None or not column:
            break
        fits = 0.5 * test_fraction <= share <= min(2 * test_fraction, (1 + test_fraction) / 2)
        if fits and any(missing):
            by_row = by_row or [len(names) for names in draw("")[-1]]
            allowed = _MAX_LOST_CLASSES * num_classes
            fits = len(missing[0]) <= by_row[0] and len(missing[1]) <= by_row[1] + allowed
        if fits:
            break
        if num_groups > 1:
            logger.warning("not split by %s: %s; --group_column %s does so", by, found, column)
    if in_test.all() or not in_test.any():
        raise ValueError(f"cannot split {by} with a test_fraction of {test_fraction}: one side would be empty")
    poor = any(missing) or off(in_test) > 0
    other = '; --group_column names another column, "" none' if column else ""
    (logger.warning if poor else logger.info)("split by %s: %s%s", by, found, other)
    return dataset.select(np.flatnonzero(~in_test)), dataset.select(np.flatnonzero(in_test))


def _classes(dataset: "Dataset") -> list[list]:
    """The class names of each row; [None] for rows without one, or with numbers for regression."""
    if "label" not in dataset.column_names:
        return [[None]] * len(dataset)
    feature = dataset.features["label"]
    names = getattr(getattr(feature, "feature", feature), "names", None)

    def of(label: Any) -> list:
        labels = label if isinstance(label, list) else [label]
        labels = [one if names is None or one is None else names[one] for one in labels if not isinstance(one, float)]
        return labels or [None]

    return [of(label) for label in dataset["label"][:]]


def group_ids(dataset: "Dataset", column: str) -> list[int]:
    """The group of each row by number, in the order of the column's values."""
    groups = _groups(dataset, column)
    ids = {group: index for index, group in enumerate(sorted(set(groups), key=_order))}
    return [ids[group] for group in groups]


def _order(group: Hashable) -> tuple[str, Any]:
    return str(type(group)), group


def _groups(dataset: "Dataset", column: str) -> list[Hashable]:
    """Values of a column; rows without a value are groups of their own, as are all without a column."""
    values = dataset[column][:] if column else [None] * len(dataset)
    return [("row", row) if value in (None, "") else value for row, value in enumerate(values)]


def _shown(names: Iterable, limit: int = 8) -> str:
    names = sorted(map(str, names))
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def _draw_test_rows(
    groups: Sequence[Hashable], labels: Sequence[list], fraction: float, seed: int, largest_first: bool = False
) -> np.ndarray:
    """Whether each row is in a group that brings each label closer to its share; while they are too few, groups that
    disturb it least.

    No group is taken with the last training rows of a label, unless every group is one.
    """
    # Not scikit-learn: at 30 % of ESC-50 by source file, labels deviate from their share by 1.5 points on average, but
    # by 8.3 with GroupShuffleSplit and 3.4 with StratifiedGroupKFold, which is limited to shares of 1/k and needs k
    # groups. Neither takes lists of labels.
    counts: dict[Hashable, Counter] = {}
    totals: Counter = Counter()
    for group, of_row in zip(groups, labels):
        counts.setdefault(group, Counter()).update(of_row)
        totals.update(of_row)
    sizes = Counter(groups)
    order = sorted(counts, key=_order)
    np.random.default_rng(seed).shuffle(order)
    if largest_first:
        order.sort(key=lambda group: -sizes[group])
    taken: Counter = Counter()
    rows, chosen = 0, set()

    def cost(group: Hashable) -> float:
        change = 0.0
        for label, count in counts[group].items():
            missing = fraction * totals[label] - taken[label]
            change += (missing - count) ** 2 - missing**2
        return change

    def is_last(group: Hashable) -> bool:
        return any(taken[label] + count >= totals[label] for label, count in counts[group].items())

    def alike(group: Hashable) -> tuple:
        return frozenset(counts[group].items()), sizes[group]

    def take(group: Hashable) -> None:
        nonlocal rows
        taken.update(counts[group])
        chosen.add(group)
        rows += sizes[group]

    protected = not all(map(is_last, order))
    for group in order:
        if cost(group) < 0 and not (protected and is_last(group)):
            take(group)
    aim = fraction * len(groups)
    rest: dict[Any, list] = {}  # groups of equal rows cost the same
    for group in reversed([group for group in order if group not in chosen]):
        rest.setdefault(alike(group), []).append(group)
    positions = {group: position for position, group in enumerate(order)}
    while rows < aim:
        firsts = [same[-1] for same in rest.values() if same]
        possible = [group for group in firsts if not (protected and is_last(group))]
        nearer = [group for group in possible if abs(rows + sizes[group] - aim) < aim - rows]
        if not possible or (not nearer and chosen):
            break
        best = min(nearer or possible, key=lambda group: (cost(group), positions[group]))
        take(best)
        rest[alike(best)].pop()
    return np.array([group in chosen for group in groups], dtype=bool)
