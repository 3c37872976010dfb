import dataclasses

import numpy as np
import pytest
import torch

from asit_hf.data.randomness import mix_keys, uniform_noise
from asit_hf.pretraining import masking
from asit_hf.pretraining.masking import GMML, corrupt, draw_donors, draw_keys, draw_masks
from asit_hf.pretraining.presets import get_preset
from asit_hf.utils.device import ACCELERATOR

FRAMES, MEL = 592, 128
ZEROS = GMML(replace_probability=0.0)
REPLACE = GMML(replace_probability=1.0)


def keys(count: int, seed: int = 0) -> torch.Tensor:
    return draw_keys(count, torch.Generator().manual_seed(seed))


def clean(batch: int, views: int = 2, frames: int = 64, mel: int = 32) -> torch.Tensor:
    return torch.randn(batch, views, frames, mel, generator=torch.Generator().manual_seed(1))


def patches(mask: torch.Tensor) -> torch.Tensor:
    """Covered fraction of every 16 x 16 patch: (masks, time, mel)."""
    return mask.float().unfold(1, 16, 16).unfold(2, 16, 16).mean((-1, -2))


def plain_block_mask(rng: np.random.Generator, ratio: float) -> np.ndarray:
    """The definition of a mask, drawn block by block in NumPy."""
    mask = np.zeros((FRAMES, MEL), dtype=bool)
    while mask.mean() < ratio:
        row, column = rng.integers(0, FRAMES - 1), rng.integers(0, MEL - 1)
        height, width = rng.integers(1, int(0.3 * FRAMES)), rng.integers(1, int(0.3 * MEL))
        mask[row : row + height, column : column + width] = True
    return mask


@pytest.fixture(scope="module")
def masks_2023() -> torch.Tensor:
    return draw_masks(keys(400), FRAMES, MEL, torch.linspace(0.5, 0.7, 400), GMML())


def test_keys_come_from_the_generator():
    assert torch.equal(keys(5), keys(5))
    assert not torch.equal(keys(5), keys(5, seed=1))
    assert len(set(keys(1000).tolist())) == 1000


def test_mixing_depends_on_every_value_and_on_their_order():
    base = torch.tensor([1])
    mixed = [mix_keys(base, *values).item() for values in [(0,), (1,), (0, 0), (0, 1), (1, 0)]]
    assert len(set(mixed)) == 5
    assert mix_keys(torch.tensor([2]), 0).item() not in mixed
    assert torch.equal(mix_keys(base, torch.tensor([3, 4])), torch.cat([mix_keys(base, 3), mix_keys(base, 4)]))


def test_mixing_is_splitmix64():
    state, outputs = 1234567, []
    for _ in range(2):  # in Python integers
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        outputs.append(z ^ (z >> 31))
    mixed = mix_keys(torch.tensor([1234567]), torch.arange(2))
    assert [value % 2**64 for value in mixed.tolist()] == outputs


def test_noise_is_uniform():
    noise = uniform_noise(torch.arange(2000), 50)
    assert noise.shape == (2000, 50)
    assert noise.min() >= 0
    assert noise.max() < 1
    counts = torch.histc(noise, 20, 0, 1)
    assert (counts / counts.mean() - 1).abs().max() < 0.05
    for other in (noise.roll(1, 0), noise.roll(1, 1)):
        correlation = torch.corrcoef(torch.stack([noise.flatten(), other.flatten()]))[0, 1]
        assert correlation.abs() < 0.02


def test_masks_depend_on_their_key_alone():
    together = draw_masks(keys(7), 64, 32, torch.full((7,), 0.5), GMML())
    for key, mask in zip(keys(7), together):
        assert torch.equal(draw_masks(key[None], 64, 32, torch.tensor([0.5]), GMML())[0], mask)
    assert len({tuple(mask.flatten().tolist()) for mask in together}) == 7


def test_masks_reach_their_ratio_and_stop_there():
    ratios = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
    coverage = draw_masks(keys(5), FRAMES, MEL, ratios, GMML()).float().mean((1, 2))
    assert (coverage >= ratios).all()
    assert (coverage < ratios + 0.3 * 0.3).all()  # less than one block more


def test_statistics_equal_the_official_code(masks_2023):
    """
    Over 400 masks of the official code, coverage is 0.617 (standard error 0.003); 0.325 of the patches are covered
    wholly, 0.525 in part and 0.150 not at all; the first time patches are covered 0.10, the lowest mel patches 0.34,
    the rest 0.66.
    """
    coverage = masks_2023.float().mean((1, 2))
    assert coverage.mean().item() == pytest.approx(0.617, abs=0.012)
    assert coverage.std().item() == pytest.approx(0.2 / 12**0.5, abs=0.005)  # std of U(0.5, 0.7)
    covered = patches(masks_2023)
    whole, untouched = (covered == 1).float().mean().item(), (covered == 0).float().mean().item()
    assert whole == pytest.approx(0.325, abs=0.012)
    assert untouched == pytest.approx(0.150, abs=0.01)
    assert 1 - whole - untouched == pytest.approx(0.525, abs=0.01)
    assert covered[:, 0].mean().item() == pytest.approx(0.10, abs=0.02)
    assert covered[:, :, 0].mean().item() == pytest.approx(0.34, abs=0.03)
    assert covered[:, 1:, 1:].mean().item() == pytest.approx(0.66, abs=0.01)


def test_masks_follow_the_distribution_of_the_plain_definition(masks_2023):
    """Compares the mean coverage of each patch, whose standard error is about 0.025 over 300 masks."""
    rng = np.random.default_rng(0)
    plain = torch.as_tensor(np.stack([plain_block_mask(rng, ratio) for ratio in np.linspace(0.5, 0.7, 300)]))
    ours, theirs = patches(masks_2023), patches(plain)
    assert (ours.mean(0) - theirs.mean(0)).abs().max() < 0.12
    for profile in (lambda x: x.mean((0, 1)), lambda x: x.mean((0, 2))):  # along mel, along time
        assert (profile(ours) - profile(theirs)).abs().max() < 0.04
    assert abs((ours == 1).float().mean() - (theirs == 1).float().mean()) < 0.012
    assert abs((ours == 0).float().mean() - (theirs == 0).float().mean()) < 0.012


def test_statistics_of_2024_zeros_and_of_replacement():
    for ratio, expected in ((0.5, 0.511), (0.3, 0.314)):
        masks = draw_masks(keys(200), FRAMES, MEL, torch.full((200,), ratio), GMML())
        assert masks.float().mean().item() == pytest.approx(expected, abs=0.003)


def test_statistics_of_aligned_masks():
    """In the official code, alignment 16 covers 0.615 of the patches wholly and the rest not at all."""
    masks = draw_masks(keys(200), FRAMES, MEL, torch.linspace(0.5, 0.7, 200), GMML(alignment=16))
    covered = patches(masks)
    assert ((covered == 0) | (covered == 1)).all()
    assert (covered == 1).float().mean().item() == pytest.approx(0.615, abs=0.015)


def test_sides_stay_within_the_longest_block():
    """The masking ratio is so small that one block reaches it."""
    masks = draw_masks(keys(300), 100, 50, torch.full((300,), 1e-6), GMML())
    heights, widths = masks.any(2).sum(1), masks.any(1).sum(1)
    assert torch.equal(masks.flatten(1).sum(1), heights * widths)  # rectangles
    assert heights.max() == 29  # 0.3 of each extent is excluded from the range
    assert widths.max() == 14
    assert min(heights.min(), widths.min()) == 1


def test_presets():
    assert get_preset("2024").gmml == GMML(mask_ratio=(0.5, 0.5), replace_ratio=0.3, replace_probability=0.5)
    assert get_preset("2023").gmml.mask_ratio == (0.5, 0.7)
    assert get_preset("2023").gmml.alignment == get_preset("2024").gmml.alignment == 1


@pytest.mark.parametrize("config", [ZEROS, REPLACE, GMML(mask_ratio=(0.5, 0.7))])
def test_only_masked_pixels_are_corrupted(config):
    values = clean(6)
    copy = values.clone()
    corrupted, mask = corrupt(values, keys(6), 3, config)
    assert corrupted.shape == mask.shape == values.shape
    assert mask.dtype == torch.bool
    assert torch.equal(values, copy)
    assert torch.equal(corrupted[~mask], values[~mask])
    assert (corrupted[mask] != values[mask]).all()
    donors = values[draw_donors(6, 3)]
    from_zeros, from_donor = corrupted == 0, corrupted == donors
    assert (from_zeros | from_donor)[mask].all()
    for clip in range(6):
        for view in range(2):
            inside = mask[clip, view]
            assert from_zeros[clip, view][inside].all() or from_donor[clip, view][inside].all()


def test_choice_between_zeros_and_replacement():
    values = clean(8)
    for config, zeros in ((ZEROS, True), (REPLACE, False)):
        corrupted, mask = corrupt(values, keys(8), 0, config)
        assert bool((corrupted[mask] == 0).all()) is zeros
    many = clean(400, views=1, frames=16, mel=16)
    corrupted, mask = corrupt(many, keys(400), 0, GMML())
    replaced = ((corrupted != 0) | ~mask).flatten(1).all(1).float().mean()
    assert 0.42 < replaced < 0.58


def test_ratios_of_zeros_and_replacement():
    values = clean(60, frames=160, mel=64)
    _, mask = corrupt(values, keys(60), 0, GMML(mask_ratio=(0.6, 0.8), replace_probability=0.0))
    coverage = mask.float().mean((2, 3))
    assert 0.6 <= coverage.min() < 0.64
    assert 0.77 < coverage.max() < 0.85
    _, mask = corrupt(values, keys(60), 0, REPLACE)
    assert mask.float().mean().item() == pytest.approx(0.314, abs=0.02)


def test_corruption_is_reproducible_and_depends_on_each_clips_key():
    values, clip_keys = clean(5), keys(5)
    corrupted, mask = corrupt(values, clip_keys, 7, GMML())
    again, same_mask = corrupt(values, clip_keys, 7, GMML())
    assert torch.equal(corrupted, again)
    assert torch.equal(mask, same_mask)
    _, fewer = corrupt(values[1:4], clip_keys[1:4], 0, GMML())
    assert torch.equal(fewer, mask[1:4])
    _, other = corrupt(values, keys(5, seed=9), 7, GMML())
    assert not torch.equal(other, mask)


def test_views_have_different_masks():
    _, mask = corrupt(clean(4), keys(4), 0, ZEROS)
    assert (mask[:, 0] != mask[:, 1]).flatten(1).any(1).all()


def test_the_donor_key_changes_only_the_replacement():
    values, clip_keys = clean(6), keys(6)
    corrupted, mask = corrupt(values, clip_keys, 0, REPLACE)
    other, same_mask = corrupt(values, clip_keys, 1, REPLACE)
    assert torch.equal(mask, same_mask)
    assert not torch.equal(corrupted, other)


@pytest.mark.parametrize("config", [REPLACE, GMML()])
def test_a_batch_of_one_is_corrupted_by_zeros(config):
    values = clean(1)
    corrupted, mask = corrupt(values, keys(1), 0, config)
    assert (corrupted[mask] == 0).all()
    _, expected = corrupt(values, keys(1), 0, dataclasses.replace(config, replace_probability=0.0))
    assert torch.equal(mask, expected)


@pytest.mark.parametrize("batch", [2, 3, 16])
def test_a_donor_is_never_the_clip_itself(batch):
    seen = set()
    for key in range(200):
        donors = draw_donors(batch, key)
        assert (donors != torch.arange(batch)).all()
        assert ((donors >= 0) & (donors < batch)).all()
        seen.update((index, donor) for index, donor in enumerate(donors.tolist()))
    assert len(seen) == batch * (batch - 1)  # every other clip is drawn


@pytest.mark.parametrize("alignment", [2, 16])
def test_aligned_blocks_start_and_end_on_the_grid(alignment):
    _, mask = corrupt(clean(4), keys(4), 0, dataclasses.replace(ZEROS, alignment=alignment))
    blocks = mask.unfold(2, alignment, alignment).unfold(3, alignment, alignment).flatten(-2)
    assert (blocks.all(-1) == blocks.any(-1)).all()


# --- alternatives --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pattern", "axis"), [("time", 2), ("frequency", 1)])
def test_bands_cover_the_whole_other_axis(pattern, axis):
    masks = draw_masks(keys(50), FRAMES, MEL, torch.full((50,), 0.5), GMML(pattern=pattern))
    assert torch.equal(masks.any(axis), masks.all(axis))
    coverage = masks.float().mean((1, 2))
    assert coverage.min() >= 0.5
    assert coverage.mean() < 0.65


def test_single_patches_are_whole_uniform_and_independent(masks_2023):
    masks = draw_masks(keys(400), FRAMES, MEL, torch.full((400,), 0.5), GMML(pattern="patches"))
    covered = patches(masks)
    assert ((covered == 0) | (covered == 1)).all()
    assert torch.equal(covered.sum((1, 2)), torch.full((400,), 148.0))  # half of 37 x 8
    assert (covered.mean(0) - 0.5).abs().max() < 0.13  # five standard errors: edges are covered as often

    def neighbors_alike(covered):
        return ((covered[:, 1:] > 0.5) == (covered[:, :-1] > 0.5)).float().mean().item()

    assert neighbors_alike(covered) == pytest.approx(0.5, abs=0.02)
    assert neighbors_alike(patches(masks_2023)) > 0.7


def test_single_patches_of_another_size_that_does_not_divide_the_plane():
    masks = draw_masks(keys(20), 36, 32, torch.full((20,), 0.4), GMML(pattern="patches", patch_size=8))
    assert masks.shape == (20, 36, 32)
    blocks = masks[:, :32].unfold(1, 8, 8).unfold(2, 8, 8).flatten(-2)
    assert (blocks.all(-1) == blocks.any(-1)).all()
    assert masks[:, 32:].any()


def test_noise_has_the_scale_of_normalized_spectrograms():
    values = clean(6, frames=160, mel=64)
    config = GMML(fill="noise", replace_probability=0.0)
    corrupted, mask = corrupt(values, keys(6), 0, config)
    noise = corrupted[mask]
    assert noise.mean().abs() < 0.01
    assert noise.std().item() == pytest.approx(0.5, abs=0.01)
    assert torch.equal(corrupted[~mask], values[~mask])
    assert torch.equal(mask, corrupt(values, keys(6), 0, ZEROS)[1])  # the fill does not change the masks
    again, _ = corrupt(values[2:4], keys(6)[2:4], 5, config)
    assert torch.equal(again, corrupted[2:4])  # decided by each clip's key
    assert not torch.equal(corrupted[0, 0][mask[0, 0]][:50], corrupted[1, 0][mask[1, 0]][:50])


def test_noise_and_replacement_alternate_between_views():
    values = clean(40)
    corrupted, mask = corrupt(values, keys(40), 3, GMML(fill="noise"))
    donors = values[draw_donors(40, 3)]
    replaced = ((corrupted == donors) | ~mask).flatten(2).all(-1)
    assert 0.3 < replaced.float().mean() < 0.7
    assert (corrupted[mask] != 0).all()


def test_unknown_patterns_are_refused():
    with pytest.raises(ValueError, match="pattern.*'stripes'"):
        GMML(pattern="stripes")
    with pytest.raises(ValueError, match="fill.*'ones'"):
        GMML(fill="ones")


def test_bfloat16_and_small_planes():
    values = clean(2, frames=16, mel=16).bfloat16()
    corrupted, mask = corrupt(values, keys(2), 0, GMML())
    assert corrupted.dtype == torch.bfloat16
    assert mask.flatten(2).float().mean(-1).min() >= 0.3


@pytest.mark.parametrize("pattern", ["blocks", "time", "frequency"])
@pytest.mark.parametrize(("alignment", "max_block_ratio"), [(1, 0.3), (16, 0.3), (1, 0.1), (8, 1.0)])
def test_accelerators_draw_the_same_masks_as_cpus(pattern, alignment, max_block_ratio):
    ratios = torch.linspace(0.1, 0.8, 6)
    gmml = GMML(max_block_ratio=max_block_ratio, alignment=alignment, pattern=pattern)
    at_once = masking._draw_at_once(keys(6), 192, 64, ratios, gmml, 0.8)
    block_by_block, _ = masking._draw_block_by_block(keys(6), 192, 64, ratios, gmml)
    assert torch.equal(at_once, block_by_block)


@pytest.mark.parametrize("fill", ["zeros", "noise"])
def test_accelerators_corrupt_as_cpus_do(fill, monkeypatch):
    config = GMML(mask_ratio=(0.5, 0.7), fill=fill)
    arguments = (clean(6), keys(6), 3, config)
    corrupted, mask = corrupt(*arguments)
    monkeypatch.setattr(masking, "choices_for", lambda device: ACCELERATOR)
    corrupted_at_once, mask_at_once = corrupt(*arguments)
    assert torch.equal(mask, mask_at_once)
    assert torch.equal(corrupted, corrupted_at_once)


def test_accelerators_draw_enough_rounds_of_blocks():
    for extents in ((592, 128), (96, 32)):
        for ratio, gmml in ((0.5, GMML()), (0.7, GMML(alignment=16)), (0.7, GMML(pattern="time"))):
            rounds = masking.rounds_for(*extents, ratio, gmml)
            _, needed = masking._draw_block_by_block(keys(200), *extents, torch.full((200,), ratio), gmml)
            assert max(needed) <= rounds * masking.BLOCKS_PER_ROUND


def test_a_ratio_that_is_not_reached_is_an_error_on_accelerators_too(monkeypatch):
    monkeypatch.setattr(masking, "TRIALS", 2)
    ratios = torch.full((2,), 0.9)
    with pytest.raises(ValueError, match=r"0\.90"):  # blocks of one pixel
        masking._draw_at_once(keys(2), 128, 128, ratios, GMML(max_block_ratio=0.001), 0.9)
    monkeypatch.setattr(masking, "rounds_for", lambda *arguments: 1)
    with pytest.raises(RuntimeError):
        masking._draw_at_once(keys(2), 64, 32, ratios, GMML(max_block_ratio=0.1), 0.9)


def test_python_integers_mix_like_tensors():
    for value in (0, 1, -1, 2**31, 2**62 + 5, -(2**63)):
        assert torch.equal(mix_keys(keys(3), value), mix_keys(keys(3), torch.tensor(value)))
