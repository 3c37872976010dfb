"""Plots of spectrograms, training, predictions and embeddings. Every function returns a matplotlib figure."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from .utils.extras import extra

with extra("train"):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = np.ndarray | Tensor | Sequence
PROJECTIONS = ("pca", "tsne")


def _as_matrix(values: Array, name: str, axes: str) -> np.ndarray:
    matrix = values.detach().float().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values, np.float32)
    if matrix.ndim != 2 or matrix.size == 0:
        raise ValueError(f"expected {name} of shape ({axes}), got {matrix.shape}")
    return matrix


def _axes(width: float, height: float, rows: int = 1, columns: int = 1, **sharing: bool) -> tuple[Figure, list[Axes]]:
    """A figure of this size in inches, and its panels row by row."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **sharing).flat)


def _write(axes: Axes, title: str, x: str = "", y: str = "") -> None:
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(x, fontsize=8)
    axes.set_ylabel(y, fontsize=8)
    axes.tick_params(labelsize=7)


def _draw(spectrograms: Mapping[str, np.ndarray], height: float) -> Figure:
    """Spectrograms `(frames, mel)` by title, stacked, all on the color scale of the first; `height` is per row."""
    first = next(iter(spectrograms.values()))
    figure, panels = _axes(7, height * len(spectrograms), rows=len(spectrograms), sharex=True)
    longest = max(map(len, spectrograms.values()))
    for axes, (title, spectrogram) in zip(panels, spectrograms.items()):
        _draw_image(axes, spectrogram, cmap="magma", vmin=first.min(), vmax=first.max())
        _write(axes, title, "seconds" if axes is panels[-1] else "", "mel bin")
    panels[0].set_xlim(0, longest / 100)
    return figure


def _draw_image(axes: Axes, values: np.ndarray, **options: Any) -> None:
    """Values `(frames, mel)`, hop 10 ms: time from left to right, low mel bins at the bottom."""
    extent = (0, len(values) / 100, 0, values.shape[1])
    axes.imshow(values.T, origin="lower", aspect="auto", interpolation="nearest", extent=extent, **options)


def plot_log_mel(spectrogram: Array, title: str = "log-mel") -> Figure:
    """One spectrogram of shape `(frames, mel)`, hop 10 ms."""
    return _draw({title: _as_matrix(spectrogram, "a spectrogram", "frames, mel")}, height=2.4)


def plot_log_mels(spectrograms: Mapping[str, Array]) -> Figure:
    """Spectrograms of shape `(frames, mel)` by title, stacked, on one time axis and the color scale of the first."""
    matrices = {title: _as_matrix(values, "a spectrogram", "frames, mel") for title, values in spectrograms.items()}
    return _draw(matrices, height=1.2)


def plot_reconstruction(clean: Array, corrupted: Array, mask: Array, reconstruction: Array) -> Figure:
    """
    A clean spectrogram, its corrupted version and the student's reconstruction, all of shape `(frames, mel)`. The
    reconstruction may lack the last frames, which do not fill a patch. The bottom row shows the reconstruction where
    the input was corrupted, and the input elsewhere.
    """
    inputs = {"clean": clean, "corrupted": corrupted, "mask": mask}
    clean, corrupted, mask = (_as_matrix(values, name, "frames, mel") for name, values in inputs.items())
    if not clean.shape == corrupted.shape == mask.shape:
        shapes = [clean.shape, corrupted.shape, mask.shape]
        raise ValueError(f"expected {', '.join(inputs)} of one shape (frames, mel), got {shapes}")
    reconstruction = _as_matrix(reconstruction, "a reconstruction", "frames, mel")
    frames = min(len(clean), len(reconstruction))
    if reconstruction.shape[1] != clean.shape[1]:
        raise ValueError(f"expected a reconstruction of {clean.shape[1]} mel bins, got {reconstruction.shape[1]}")
    clean, corrupted, reconstruction = clean[:frames], corrupted[:frames], reconstruction[:frames]
    restored = np.where(mask[:frames] > 0.5, reconstruction, corrupted)
    return _draw({"clean": clean, "corrupted (student's input)": corrupted, "restored": restored}, height=1.8)


def plot_attention(spectrogram: Array, attention: Array, title: str = "attention") -> Figure:
    """
    A spectrogram, and below it the attention to each patch.

    Args:
        spectrogram: shape `(frames, mel)`, hop 10 ms.
        attention: shape `(time_patches, mel_patches)`, from low to high mel bins, as returned by
            [`~asit_hf.evaluation.attention.attention_rollout`]. The last frames, which do not fill a patch, have none.
    """
    spectrogram = _as_matrix(spectrogram, "a spectrogram", "frames, mel")
    attention = _as_matrix(attention, "attention", "time_patches, mel_patches")
    (frames, mel), (time_patches, mel_patches) = spectrogram.shape, attention.shape
    patch = mel // mel_patches
    if mel % mel_patches or time_patches != max(1, frames // patch):
        raise ValueError(
            f"expected attention for the square patches of {frames} frames and {mel} mel bins, got {time_patches} x "
            f"{mel_patches} patches (time x mel)"
        )
    figure, (above, below) = _axes(7, 4.2, rows=2, sharex=True)
    _draw_image(above, spectrogram, cmap="magma")
    _write(above, "log-mel", y="mel bin")
    _draw_image(below, attention.repeat(patch, 0).repeat(patch, 1)[:frames], cmap="viridis")
    below.set_xlim(0, frames / 100)
    _write(below, title, "seconds", "mel bin")
    return figure


def plot_timeline(timeline: Sequence[Mapping[str, Any]], count: int = 5, title: str = "scores by window") -> Figure:
    """
    Scores over time: one line per label, with a dot at the middle of every window.

    Args:
        timeline: the pipeline's `"timeline"`: windows of `{"start", "end", "labels"}`, in seconds, with `"labels"` a
            list of `{"score", "label"}`. A label's line has a gap at windows that do not list it (`top_k`).
        count (`int`, defaults to 5): number of labels to draw, those with the highest score in any window.
    """
    if not timeline:
        raise ValueError("expected at least one window, got none")
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    windows = [{entry["label"]: entry["score"] for entry in window["labels"]} for window in timeline]
    highest: dict[str, float] = {}
    for label, score in (item for window in windows for item in window.items()):
        highest[label] = max(score, highest.get(label, score))
    middles = [(window["start"] + window["end"]) / 2 for window in timeline]
    figure, (axes,) = _axes(7, 2.8)
    for label in sorted(highest, key=highest.get, reverse=True)[:count]:
        scores = [window.get(label, np.nan) for window in windows]
        axes.plot(middles, scores, "o-", markersize=3, linewidth=1.2, label=label)
    axes.set_xlim(min(window["start"] for window in timeline), max(window["end"] for window in timeline))
    _write(axes, title, "seconds", "score")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def plot_curves(history: Sequence[dict[str, float]], names: Sequence[str]) -> Figure:
    """Curves over steps from a Trainer's `state.log_history`: one panel for each of `names` that was logged."""
    series = {name: [(row["step"], row[name]) for row in history if name in row] for name in names}
    series = {name: points for name, points in series.items() if points}
    if not series:
        raise ValueError(f"expected a log of at least one of {list(names)}, got none of them")
    columns = min(3, len(series))
    rows = -(-len(series) // columns)
    figure, panels = _axes(3.6 * columns, 2.5 * rows, rows, columns)
    for axes, (name, points) in zip(panels, series.items()):
        axes.plot(*zip(*points), linewidth=1.2)
        _write(axes, name)
        axes.grid(alpha=0.3)
    for axes in panels[len(series) :]:
        axes.set_visible(False)
    return figure


def plot_confusion(matrix: Array, labels: Sequence[str]) -> Figure:
    """Confusion matrix from counts `(labels, labels)`: true labels in rows, which are normalized, by predictions."""
    matrix = _as_matrix(matrix, "a confusion matrix", "labels, labels")
    if matrix.shape != (len(labels), len(labels)):
        raise ValueError(f"expected a confusion matrix for {len(labels)} labels, got shape {matrix.shape}")
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    side = max(4.0, 0.28 * len(labels) + 1.5)
    figure, (axes,) = _axes(side, side)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7)
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if len(labels) <= 20:
        for row, column in np.ndindex(*matrix.shape):
            if matrix[row, column]:
                color = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, f"{matrix[row, column]:.0f}", ha="center", va="center", fontsize=7, color=color)
    return figure


def plot_embeddings(
    embeddings: Array, labels: Sequence[Any], names: Sequence[str] | None = None, projection: str = "pca"
) -> Figure:
    """
    A two-dimensional map of embeddings, colored by label.

    Args:
        embeddings: shape `(clips, dim)`.
        labels: one per clip; integers if `names` are given.
        names (`Sequence[str]`, *optional*): names of the labels 0, 1, 2... in the legend; default: the labels.
        projection (`str`, defaults to `"pca"`): `"pca"`, the first two principal components, or `"tsne"`,
            scikit-learn's t-SNE, which keeps neighbors together but neither distances nor densities.
    """
    embeddings = _as_matrix(embeddings, "embeddings", "clips, dim")
    if not np.isfinite(embeddings).all():
        raise ValueError("expected finite embeddings, got NaN or infinity")
    labels = np.asarray(labels)
    if labels.shape != embeddings.shape[:1]:
        raise ValueError(f"expected one label for each of {len(embeddings)} clips, got labels of shape {labels.shape}")
    points = _project(embeddings, projection)
    figure, (axes,) = _axes(6.5, 5)
    for index, label in enumerate(np.unique(labels)):
        chosen = points[labels == label]
        name = str(label) if names is None else names[int(label)]
        axes.scatter(*chosen.T, s=10, alpha=0.7, label=name, color=f"C{index % 10}", marker="os^vDP*"[index // 10 % 7])
    if len(np.unique(labels)) <= 25:
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set_xticks([])
    axes.set_yticks([])
    return figure


def _project(embeddings: np.ndarray, projection: str) -> np.ndarray:
    """`(clips, dim)` -> `(clips, 2)`."""
    clips, dim = embeddings.shape
    if projection not in PROJECTIONS:
        raise ValueError(f"projection must be one of {PROJECTIONS}, got {projection!r}")
    if clips < 3 or dim < 2:
        raise ValueError(f"expected at least 3 embeddings of 2 or more dimensions, got {clips} of {dim}")
    if projection == "tsne":
        with extra("train"):
            from sklearn.manifold import TSNE  # slow to import

        # scikit-learn requires perplexity < clips; its default is 30
        return TSNE(perplexity=min(30, (clips - 1) / 3), random_state=0).fit_transform(embeddings)
    centered = embeddings - embeddings.mean(0)
    _, _, axes_of_variance = np.linalg.svd(centered, full_matrices=False)
    return centered @ axes_of_variance[:2].T


def plot_scores(scores: dict[str, dict[str, Sequence[float]]], unit: str = "%") -> Figure:
    """
    Scores of several runs: one panel for each key of `scores`, in it one line for each name, with a dot for each run
    and a bar at the mean.
    """
    names = list(dict.fromkeys(name for panel in scores.values() for name in panel))
    if not names:
        raise ValueError("expected at least one score, got none")
    figure, panels = _axes(2.2 + 2.3 * len(scores), 1.1 + 0.32 * len(names), columns=len(scores), sharey=True)
    for axes, (title, panel) in zip(panels, scores.items()):
        for line, name in enumerate(names):
            values = panel.get(name, ())
            axes.plot(values, [line] * len(values), "o", color="C0", alpha=0.6, markersize=4)
            if len(values):
                axes.plot([np.mean(values)], [line], "|", color="C3", markersize=14, markeredgewidth=2)
        _write(axes, title, unit)
        axes.grid(axis="x", alpha=0.3)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    return figure
