import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from asit_hf.plotting import (
    plot_attention,
    plot_confusion,
    plot_curves,
    plot_embeddings,
    plot_log_mel,
    plot_reconstruction,
    plot_scores,
    plot_timeline,
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


def test_curves_draw_the_logged_values():
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


def test_embeddings_have_one_group_of_points_per_label():
    embeddings = np.random.default_rng(0).normal(size=(12, 8))
    figure = plot_embeddings(embeddings, [0, 1, 2] * 4, names=["x", "y", "z"])
    groups = figure.axes[0].collections
    assert [len(group.get_offsets()) for group in groups] == [4, 4, 4]
    assert [group.get_label() for group in groups] == ["x", "y", "z"]


def test_scores_have_one_panel_per_key_and_one_dot_per_run():
    figure = plot_scores({"one": {"a": [1.0, 3.0], "b": [2.0]}, "two": {"b": [5.0]}})
    one, two = figure.axes
    dots = [line.get_xdata().tolist() for line in one.lines if line.get_marker() == "o"]
    assert dots == [[1.0, 3.0], [2.0]]
    assert [line.get_xdata()[0] for line in one.lines if line.get_marker() == "|"] == [2.0, 2.0]
    assert [label.get_text() for label in one.get_yticklabels()] == ["a", "b"]
    assert [line.get_ydata()[0] for line in two.lines if len(line.get_xdata())] == [1, 1]
    with pytest.raises(ValueError, match="at least one score"):
        plot_scores({})


def test_attention_covers_whole_patches_of_the_spectrogram():
    attention = torch.rand(3, 2)
    above, below = plot_attention(torch.randn(60, 32), attention).axes
    heat = np.asarray(below.images[0].get_array())
    assert heat.shape == (32, 48)
    np.testing.assert_allclose(heat[::16, ::16], attention.T.numpy())
    assert below.images[0].get_extent()[1] == 0.48
    assert above.get_xlim() == below.get_xlim() == (0, 0.6)
    short = plot_attention(torch.randn(5, 32), torch.rand(1, 2))
    assert images(short)[1].shape == (32, 5)


def test_timeline_draws_the_highest_labels_at_the_windows_middles():
    timeline = [
        {"start": 0.0, "end": 2.0, "labels": [{"label": "dog", "score": 0.9}, {"label": "cat", "score": 0.1}]},
        {"start": 1.0, "end": 3.0, "labels": [{"label": "rain", "score": 0.6}, {"label": "cat", "score": 0.2}]},
    ]
    (axes,) = plot_timeline(timeline, count=2).axes
    dog, rain = axes.lines
    assert [line.get_label() for line in axes.lines] == ["dog", "rain"]
    assert dog.get_xdata().tolist() == [1.0, 2.0]
    np.testing.assert_array_equal(dog.get_ydata(), [0.9, np.nan])
    np.testing.assert_array_equal(rain.get_ydata(), [np.nan, 0.6])
    assert axes.get_xlim() == (0.0, 3.0)


def test_neighbors_stay_neighbors_in_either_map():
    generator = np.random.default_rng(0)
    labels = np.arange(30) % 3
    embeddings = generator.normal(size=(30, 16)) + 50 * np.eye(3, 16)[labels]
    for projection in ("pca", "tsne"):
        figure = plot_embeddings(embeddings, labels, projection=projection)
        groups = [np.asarray(group.get_offsets()) for group in figure.axes[0].collections]
        centers = np.stack([group.mean(0) for group in groups])
        radius = max(np.linalg.norm(group - group.mean(0), axis=1).max() for group in groups)
        apart = min(np.linalg.norm(centers[a] - centers[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
        assert apart > radius, projection


MEL = np.zeros((48, 32))


@pytest.mark.parametrize(
    ("plot", "message"),
    [
        (lambda: plot_log_mel(np.zeros(48)), r"\(frames, mel\), got \(48,\)"),
        (lambda: plot_log_mel(np.zeros((0, 32))), "got"),
        (lambda: plot_reconstruction(MEL, MEL[:40], MEL, MEL), "one shape"),
        (lambda: plot_reconstruction(MEL, MEL, MEL, MEL[:, :16]), "32 mel bins, got 16"),
        (lambda: plot_attention(MEL, np.zeros((4, 2))), "got 4 x 2 patches"),
        (lambda: plot_attention(MEL, np.zeros((3, 5))), "got 3 x 5 patches"),
        (lambda: plot_timeline([]), "at least one window"),
        (lambda: plot_timeline([{"start": 0, "end": 1, "labels": []}], count=0), "count must be at least 1, got 0"),
        (lambda: plot_confusion([[1, 2]], ["a", "b"]), r"2 labels, got shape \(1, 2\)"),
        (lambda: plot_embeddings(MEL, [0, 1]), "one label for each of 48 clips"),
        (lambda: plot_embeddings(MEL[:2], [0, 1]), "at least 3 embeddings"),
        (lambda: plot_embeddings(MEL, [0] * 48, projection="umap"), "got 'umap'"),
        (lambda: plot_embeddings(MEL * np.nan, [0] * 48), "finite"),
    ],
)
def test_wrong_input(plot, message):
    with pytest.raises(ValueError, match=message):
        plot()
