"""Pictures of what the model hears, learns and predicts. Every function returns a matplotlib figure."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure


def _as_array(values: Any) -> np.ndarray:
    return values.detach().float().cpu().numpy() if hasattr(values, "detach") else np.asarray(values, dtype=np.float32)


def _draw_spectrogram(axes, spectrogram: np.ndarray, limits: tuple[float, float], title: str) -> None:
    seconds = len(spectrogram) / 100
    axes.imshow(
        spectrogram.T,
        origin="lower",
        aspect="auto",
        cmap="magma",
        vmin=limits[0],
        vmax=limits[1],
        extent=(0, seconds, 0, spectrogram.shape[1]),
        interpolation="nearest",
    )
    axes.set_title(title, fontsize=9)
    axes.set_ylabel("mel bin", fontsize=8)
    axes.tick_params(labelsize=7)


def plot_log_mel(spectrogram: Any, title: str = "log-mel") -> Figure:
    """One spectrogram of shape `(frames, mel)`, hop 10 ms."""
    spectrogram = _as_array(spectrogram)
    figure = Figure(figsize=(7, 2.4), layout="constrained")
    axes = figure.subplots()
    _draw_spectrogram(axes, spectrogram, (spectrogram.min(), spectrogram.max()), title)
    axes.set_xlabel("seconds", fontsize=8)
    return figure


def plot_reconstruction(clean: Any, corrupted: Any, mask: Any, reconstruction: Any) -> Figure:
    """
    What the student was given and what it made of it; all of shape `(frames, mel)`. The last row shows its output
    where the input was corrupted and the input elsewhere.
    """
    clean, corrupted, reconstruction = _as_array(clean), _as_array(corrupted), _as_array(reconstruction)
    frames = min(len(clean), len(reconstruction))
    mask = _as_array(mask)[:frames] > 0.5
    clean, corrupted, reconstruction = clean[:frames], corrupted[:frames], reconstruction[:frames]
    limits = (float(clean.min()), float(clean.max()))
    rows = [
        ("clean", clean),
        ("corrupted (student's input)", corrupted),
        ("restored", np.where(mask, reconstruction, corrupted)),
    ]
    figure = Figure(figsize=(7, 5.4), layout="constrained")
    for axes, (title, spectrogram) in zip(figure.subplots(len(rows), 1, sharex=True), rows):
        _draw_spectrogram(axes, spectrogram, limits, title)
    axes.set_xlabel("seconds", fontsize=8)
    return figure


def plot_curves(history: Sequence[dict[str, float]], names: Sequence[str]) -> Figure:
    """Curves of a Trainer's `state.log_history`, one panel each of those `names` that were logged, over steps."""
    series = {name: [(row["step"], row[name]) for row in history if name in row] for name in names}
    series = {name: points for name, points in series.items() if points}
    if not series:
        raise ValueError(f"none of {list(names)} stands in the log")
    columns = min(3, len(series))
    rows = -(-len(series) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.5 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axes, (name, points) in zip(panels, series.items()):
        axes.plot(*zip(*points), linewidth=1.2)
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
    for axes in list(panels):
        axes.set_visible(False)
    return figure


def plot_confusion(matrix: Any, labels: Sequence[str]) -> Figure:
    """Confusion matrix of counts, rows true and columns predicted, each row scaled to its share."""
    matrix = _as_array(matrix)
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    side = max(4.0, 0.28 * len(labels) + 1.5)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
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


def plot_embeddings(embeddings: Any, labels: Sequence[Any], names: Sequence[str] | None = None) -> Figure:
    """Embeddings of shape `(clips, dim)` on their two first principal components, coloured by label."""
    embeddings = _as_array(embeddings)
    centred = embeddings - embeddings.mean(0)
    _, _, axes_of_variance = np.linalg.svd(centred, full_matrices=False)
    points = centred @ axes_of_variance[:2].T
    labels = np.asarray(labels)
    figure = Figure(figsize=(6.5, 5), layout="constrained")
    axes = figure.subplots()
    for index, label in enumerate(np.unique(labels)):
        chosen = points[labels == label]
        name = str(label) if names is None else names[int(label)]
        axes.scatter(*chosen.T, s=10, alpha=0.7, label=name, color=f"C{index % 10}", marker="os^vDP*"[index // 10 % 7])
    if len(np.unique(labels)) <= 25:
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set_xticks([])
    axes.set_yticks([])
    return figure


def plot_scores(scores: dict[str, dict[str, Sequence[float]]], unit: str = "%") -> Figure:
    """
    Scores of several runs side by side: a panel for each key of `scores`, in it a line for each name, with a dot a run
    and a bar at their mean.
    """
    names = list(dict.fromkeys(name for panel in scores.values() for name in panel))
    if not names:
        raise ValueError("expected at least one score, got none")
    figure = Figure(figsize=(2.2 + 2.3 * len(scores), 1.1 + 0.32 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(scores), sharey=True, squeeze=False)[0]
    for axes, (title, panel) in zip(panels, scores.items()):
        for line, name in enumerate(names):
            values = panel.get(name, ())
            axes.plot(values, [line] * len(values), "o", color="C0", alpha=0.6, markersize=4)
            if len(values):
                axes.plot([np.mean(values)], [line], "|", color="C3", markersize=14, markeredgewidth=2)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(unit, fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(axis="x", alpha=0.3)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    return figure
