"""One or several sources of audio as a command line or a recipe names them."""

import json
from typing import Any

from .datasets import load_audio_dataset


def load_unlabelled(specs: "list[str | dict] | str | dict", **defaults: Any):
    """
    Loads and joins sources of audio; of each, the rows that its filter keeps, and of those the audio only.

    Args:
        specs: a path or name, a dictionary (or its JSON) with the key `source`, any keyword of
            [`load_audio_dataset`] and `filter`, a list of `COLUMN=VALUE[,VALUE...]`; or a list of such.
        defaults: keywords for every source that does not say otherwise.

    Returns:
        A `datasets.Dataset` with the column `audio`; with `streaming=True` an `IterableDataset`, one source after
        another until `shuffle` mixes their shards.
    """
    from datasets import concatenate_datasets

    specs = specs if isinstance(specs, (list, tuple)) else [specs]
    if not specs:
        raise ValueError("expected at least one source of audio, got none")
    loaded = [_load(spec, defaults).select_columns("audio") for spec in specs]
    plain = [dataset.features["audio"] for dataset in loaded if isinstance(dataset.features["audio"], dict)]
    if plain:  # tar files among other streams: all get their kind of column
        loaded = [dataset.cast_column("audio", plain[0]) for dataset in loaded]
    return concatenate_datasets(loaded)


def filter_rows(dataset, filters: list[str]):
    """Rows whose columns have one of the wanted values: every filter is `COLUMN=VALUE[,VALUE...]`, all must hold."""
    for condition in filters:
        column, separator, values = condition.partition("=")
        if not separator or not values:
            raise ValueError(f"a filter must read COLUMN=VALUE[,VALUE...], got {condition!r}")
        if column not in dataset.column_names:
            raise ValueError(f"cannot filter by column {column!r}: the data have {dataset.column_names}")
        names = getattr(dataset.features[column], "names", None)
        wanted = set(values.split(","))
        dataset = dataset.filter(_keep, input_columns=column, fn_kwargs={"wanted": wanted, "names": names})
    return dataset


def _keep(value: Any, wanted: set[str], names: list[str] | None) -> bool:
    return str(names[value] if names is not None else value) in wanted


def _load(spec: "str | dict", defaults: dict[str, Any]):
    if isinstance(spec, str):
        spec = json.loads(spec) if spec.lstrip().startswith("{") else {"source": spec}
    options = {**defaults, **spec}
    if "source" not in options:
        raise ValueError(f"a source of audio needs the key 'source', got {sorted(spec)}")
    filters = options.pop("filter", None) or []
    dataset = load_audio_dataset(options.pop("source"), **options)
    kept = filter_rows(dataset, [filters] if isinstance(filters, str) else filters)
    if filters and hasattr(kept, "__len__") and len(kept) == 0:
        raise ValueError(f"no row of {spec} is left by its filter {filters}")
    return kept
