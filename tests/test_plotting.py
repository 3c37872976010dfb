import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from asit_hf.plotting import (
    plot_confusion,
    plot_curves,
    plot_embeddings,
    plot_log_mel,
    plot_reconstruction,
    plot_scores,
)


def images(figure: Figure) -> list[np.ndarray]:
    return [np.asarray(axes.images[0].get_array()) for axes in figure.axes if axes.images]


def test_reconstruction_shows_the_output_only_where_the_input_was_corrupted():
    clean, output = torch.randn(48, 32), torch.randn(32, 32)
    mask = torch.rand(48, 32) < 0.5
    corrupted = torch.where(mask, torch.zeros(()), clean)
    shown = images(plot_reconstruction(clean, corrupted, mask, output))
    expected = torch.where(mask[:32], output, clean[:32])
    np.testing.assert_allclose(shown[-1], expected.T.numpy(), rtol=1e-6)
    np.testing.assert_allclose(shown[0], clean[:32].T.numpy())


def test_log_mel_runs_from_left_to_right_with_low_bins_at_the_bottom():
    spectrogram = np.zeros((100, 16), dtype=np.float32)
    spectrogram[90, 2] = 1
    figure = plot_log_mel(spectrogram)
    assert images(figure)[0][2, 90] == 1
    assert figure.axes[0].images[0].origin == "lower"
    assert figure.axes[0].images[0].get_extent()[1] == 1.0


def test_curves_draw_what_was_logged():
    history = [{"step": 1, "loss": 3.0, "other": 1}, {"step": 2, "eval_loss": 9.0}, {"step": 3, "loss": 1.0}]
    figure = plot_curves(history, ["loss", "missing"])
    (line,) = figure.axes[0].lines
    assert line.get_xdata().tolist() == [1, 3]
    assert line.get_ydata().tolist() == [3.0, 1.0]
    with pytest.raises(ValueError, match="missing"):
        plot_curves(history, ["missing"])


def test_confusion_scales_rows_and_writes_counts():
    figure = plot_confusion([[3, 1], [0, 0]], ["a", "b"])
    np.testing.assert_allclose(images(figure)[0], [[0.75, 0.25], [0, 0]])
    assert {text.get_text() for text in figure.axes[0].texts} == {"3", "1"}


def test_embeddings_have_one_group_of_points_a_label():
    embeddings = np.random.default_rng(0).normal(size=(12, 8))
    figure = plot_embeddings(embeddings, [0, 1, 2] * 4, names=["x", "y", "z"])
    groups = figure.axes[0].collections
    assert [len(group.get_offsets()) for group in groups] == [4, 4, 4]
    assert [group.get_label() for group in groups] == ["x", "y", "z"]


def test_scores_have_a_panel_each_and_a_dot_a_run():
    figure = plot_scores({"one": {"a": [1.0, 3.0], "b": [2.0]}, "two": {"b": [5.0]}})
    one, two = figure.axes
    dots = [line.get_xdata().tolist() for line in one.lines if line.get_marker() == "o"]
    assert dots == [[1.0, 3.0], [2.0]]
    assert [line.get_xdata()[0] for line in one.lines if line.get_marker() == "|"] == [2.0, 2.0]
    assert [label.get_text() for label in one.get_yticklabels()] == ["a", "b"]
    assert [line.get_ydata()[0] for line in two.lines if len(line.get_xdata())] == [1, 1]
    with pytest.raises(ValueError, match="at least one score"):
        plot_scores({})
