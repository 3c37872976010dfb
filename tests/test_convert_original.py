import argparse
import os
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard
from torch import nn
from transformers import AutoModel

from asit_hf import ASiTConfig, ASiTFeatureExtractor, ASiTForPreTraining, ASiTModel
from asit_hf.convert_original import convert, main

FIXTURES = Path(__file__).parent / "fixtures"


def arrays_of(release: str) -> dict[str, torch.Tensor]:
    arrays = np.load(FIXTURES / f"official_{release}.npz")
    return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def group(arrays: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(f"{name}/"): value for key, value in arrays.items() if key.startswith(f"{name}/")}


def official_content(release: str) -> dict:
    """A training checkpoint as the authors' code writes it, its learning rate a NumPy number."""
    arrays = arrays_of(release)
    options = {"arch": "vit_tiny_test", "num_mel_bins": 32, "epochs": 40, "output_dir": "/home/somebody/runs"}
    if release == "2024":
        options["sample_rate"] = 16000
    content = {
        "student": OrderedDict((f"module.{key}", value) for key, value in group(arrays, "student").items()),
        "teacher": OrderedDict(group(arrays, "teacher")),
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": np.float64(5e-4)}]},
        "epoch": 17,
        "args": argparse.Namespace(**options),
    }
    cls_center, patch_center = arrays["input/cls_center"][None], arrays["input/patch_center"]
    if release == "2023":
        return {**content, "loss_cls": {"center": cls_center}, "loss_data": {"center": patch_center[None]}}
    return {**content, "CLS_PATCH_loss": {"center": cls_center, "center2": patch_center[None, None]}}


def backbone(
    width: int = 64, depth: int = 2, mlp: int = 128, patch: int = 16, positions: int = 8, bias: bool = True
) -> dict[str, torch.Tensor]:
    """Random weights under the authors' names."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + positions, width),
        "patch_embed.proj.weight": (width, 1, patch, patch),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    for index in range(depth):
        layers = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
        layers |= {"mlp.fc1": (mlp, width), "mlp.fc2": (width, mlp), "norm1": (width,), "norm2": (width,)}
        for name, shape in layers.items():
            shapes[f"blocks.{index}.{name}.weight"] = shape
            if bias or name != "attn.qkv":
                shapes[f"blocks.{index}.{name}.bias"] = shape[:1]
    return {key: 0.1 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def write(content, path: Path) -> Path:
    torch.save(content, path)
    return path


def prefixed(tensors: dict, prefix: str) -> dict:
    return {prefix + key: value for key, value in tensors.items()}


@torch.no_grad()
def tokens(encoder: ASiTModel, values: torch.Tensor) -> torch.Tensor:
    return encoder.eval()(values).last_hidden_state


# --- equality with the authors' code -------------------------------------------------------------------------------


@pytest.mark.parametrize("release", ["2023", "2024"])
def test_the_encoder_equals_the_authors(tmp_path, release):
    arrays = arrays_of(release)
    file = write(official_content(release), tmp_path / "checkpoint.pth")
    conversion = convert(file, tmp_path / "encoder")
    encoder = AutoModel.from_pretrained(tmp_path / "encoder")
    assert type(encoder) is ASiTModel
    computed = tokens(encoder, arrays["input/clean"][:, 0])
    torch.testing.assert_close(computed, arrays["expected/teacher_tokens"], rtol=0, atol=1e-5)
    if release == "2024":
        computed = tokens(encoder, arrays["input/long"])
        torch.testing.assert_close(computed, arrays["expected/long_teacher_tokens"], rtol=0, atol=1e-5)
    assert conversion.release == release
    assert ASiTFeatureExtractor.from_pretrained(tmp_path / "encoder").num_mel_bins == 32


@pytest.mark.parametrize("release", ["2023", "2024"])
def test_continued_pretraining_has_the_authors_losses_and_centers(tmp_path, release):
    arrays = arrays_of(release)
    convert(write(official_content(release), tmp_path / "checkpoint.pth"), tmp_path / "all", pretraining=True)
    model = ASiTForPreTraining.from_pretrained(tmp_path / "all").train()
    clean, mask = arrays["input/clean"], arrays["input/mask"]
    outputs = model(
        input_values=clean,
        corrupted_values=clean.masked_scatter(mask, arrays["input/filling"]),
        corruption_mask=mask,
        local_values=arrays.get("input/local"),
        teacher_temperature=arrays["input/teacher_temperature"].item(),
    )
    for name in ("global_loss", "local_loss", "reconstruction_loss", "loss"):
        assert outputs[name].item() == pytest.approx(arrays[f"expected/{name}"].item(), rel=2e-6), name
    model.update_centers()
    for name in ("cls_center", "patch_center"):
        center = getattr(model, name).center
        torch.testing.assert_close(center, arrays[f"expected/{name}"], rtol=0, atol=1e-6)


def test_teacher_and_student_are_different_encoders(tmp_path):
    content = official_content("2024")
    file = write(content, tmp_path / "checkpoint.pth")
    for encoder, prefix in (("student", "module.backbone."), ("teacher", "backbone.")):
        convert(file, tmp_path / encoder, encoder=encoder)
        state = ASiTModel.from_pretrained(tmp_path / encoder).state_dict()
        assert torch.equal(state["embeddings.position_embeddings"], content[encoder][f"{prefix}pos_embed"])
        qkv = content[encoder][f"{prefix}blocks.1.attn.qkv.weight"]
        parts = [state[f"layers.1.attention.{part}_proj.weight"] for part in "qkv"]
        assert torch.equal(torch.cat(parts), qkv)


# --- what a file may look like -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix", ["", "backbone.", "module.", "module.backbone.", "model.asit.", "teacher.backbone.", "_orig_mod.x."]
)
@pytest.mark.parametrize("container", [None, "model", "state_dict"])
def test_a_backbone_is_found_behind_any_prefix(tmp_path, prefix, container):
    arrays = arrays_of("2024")
    teacher = {key.removeprefix("backbone."): value for key, value in group(arrays, "teacher").items()}
    weights = {key: value for key, value in teacher.items() if not key.startswith("head")}
    content = {**prefixed(weights, prefix), "strong_head.weight": torch.zeros(3, 48)}
    content = {container: content} if container else content
    options = {"num_attention_heads": 3, "num_mel_bins": 32}
    conversion = convert(write(content, tmp_path / "ASIT_ssl.pt"), tmp_path / "encoder", **options)
    computed = tokens(ASiTModel.from_pretrained(tmp_path / "encoder"), arrays["input/clean"][:, 0])
    torch.testing.assert_close(computed, arrays["expected/teacher_tokens"], rtol=0, atol=1e-5)
    assert conversion.unused == [f"{container}.strong_head.weight" if container else "strong_head.weight"]
    assert conversion.release is None


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ({}, {"hidden_size": 64, "num_attention_heads": 1, "num_frames": 16, "num_mel_bins": 128}),
        ({"width": 192, "depth": 1, "mlp": 768}, {"num_attention_heads": 3, "intermediate_size": 768}),
        ({"width": 128, "depth": 3, "positions": 296}, {"num_hidden_layers": 3, "num_frames": 592}),
        ({"patch": 8, "positions": 48}, {"patch_size": 8, "num_frames": 24}),
        ({"bias": False}, {"qkv_bias": False}),
    ],
)
def test_sizes_are_inferred_from_the_tensors(tmp_path, shape, expected):
    weights = backbone(**shape)
    conversion = convert(write(weights, tmp_path / "x.pt"), tmp_path / "encoder")
    config = ASiTConfig.from_pretrained(tmp_path / "encoder")
    assert {name: getattr(config, name) for name in expected} == expected
    assert conversion.unused == []
    state = ASiTModel.from_pretrained(tmp_path / "encoder").state_dict()
    assert torch.equal(state["layers.0.mlp.fc1.weight"], weights["blocks.0.mlp.fc1.weight"])
    assert sum(value.numel() for value in state.values()) == sum(value.numel() for value in weights.values())


def test_head_widths_and_objective_are_the_files(tmp_path):
    for release in ("2023", "2024"):
        config = convert(write(official_content(release), tmp_path / "x.pth"), tmp_path / release).config
        assert (config.distillation_hidden_size, config.distillation_bottleneck_size) == (64, 32)
        assert config.num_prototypes == 64
        weights = (config.global_loss_weight, config.local_loss_weight, config.reconstruction_loss_weight)
        reconstruction = (config.reconstruction_hidden_size, config.reconstruction_bottleneck_size)
        if release == "2023":
            assert (weights, reconstruction, config.num_patch_prototypes) == ((1.0, 1.0, 2.0), (40, 24), 32)
        else:
            assert (weights, reconstruction, config.num_patch_prototypes) == ((0.5, 0.5, 1.0), (48, 48), None)


def heads(tmp_path, width: int, arch: str | None, **options) -> int:
    content = {"teacher": prefixed(backbone(width, depth=1), "backbone.")}
    if arch is not None:
        content["args"] = argparse.Namespace(arch=arch)
    return convert(write(content, tmp_path / "x.pth"), tmp_path / "out", **options).config.num_attention_heads


def test_heads_come_from_the_option_then_the_architecture_then_the_width(tmp_path):
    assert heads(tmp_path, 192, "vit_base", num_attention_heads=6) == 6
    assert heads(tmp_path, 192, "vit_base") == 12
    assert heads(tmp_path, 48, "vit_tiny_test") == 3
    assert heads(tmp_path, 128, "vit_tiny") == 2  # 3 do not divide 128
    assert heads(tmp_path, 128, "another") == 2
    with pytest.raises(ValueError, match="--num_attention_heads"):
        heads(tmp_path, 80, "vit_tiny")
    for count in (5, 0):
        with pytest.raises(ValueError, match=f"num_attention_heads .*got {count}"):
            heads(tmp_path, 192, None, num_attention_heads=count)


def test_mel_bins_rate_and_statistics_come_from_options_then_args(tmp_path):
    options = {"num_mel_bins": 64, "sample_rate": 8000, "data_mean": -5.5, "data_std": 3.25}
    content = {"teacher": prefixed(backbone(), "backbone."), "args": argparse.Namespace(**options)}
    file = write(content, tmp_path / "x.pth")
    extractor = convert(file, tmp_path / "args").feature_extractor
    assert (extractor.num_mel_bins, extractor.sampling_rate) == (64, 8000)
    assert (extractor.mean, extractor.std) == (-5.5, 3.25)
    conversion = convert(file, tmp_path / "options", num_mel_bins=32, sampling_rate=32000)
    extractor = ASiTFeatureExtractor.from_pretrained(tmp_path / "options")
    assert (extractor.num_mel_bins, extractor.sampling_rate) == (32, 32000)
    assert conversion.config.position_grid == (4, 2)
    extractor = convert(write(backbone(), tmp_path / "bare.pt"), tmp_path / "bare").feature_extractor
    assert (extractor.num_mel_bins, extractor.sampling_rate, extractor.mean) == (128, 16000, -4.2677393)


def test_half_precision_and_parameters_are_read_as_float32(tmp_path):
    weights = {key: nn.Parameter(value.half()) for key, value in backbone().items()}
    convert(write(weights, tmp_path / "x.pt"), tmp_path / "encoder")
    state = ASiTModel.from_pretrained(tmp_path / "encoder").state_dict()
    assert state["layernorm.weight"].dtype == torch.float32
    assert torch.equal(state["layernorm.weight"], weights["norm.weight"].float())


def test_every_unused_key_is_reported(tmp_path, capsys):
    content = official_content("2024")
    content["teacher"]["backbone.blocks.0.attn.rope"] = torch.zeros(3)
    content["fp16_scaler"] = None
    file = str(write(content, tmp_path / "checkpoint.pth"))
    assert main(["--checkpoint", file, "--output_dir", str(tmp_path / "encoder")]) == 0
    lines = capsys.readouterr().out.splitlines()
    unused = {line.removeprefix("not used: ") for line in lines if line.startswith("not used: ")}
    heads = {f"teacher.{key}" for key in content["teacher"] if key.startswith("head")}
    rest = {"teacher.backbone.blocks.0.attn.rope", "student", "optimizer", "fp16_scaler", "CLS_PATCH_loss"}
    assert unused == heads | rest
    assert any("2024 release" in line for line in lines)

    assert main(["--checkpoint", file, "--output_dir", str(tmp_path / "all"), "--pretraining"]) == 0
    lines = capsys.readouterr().out.splitlines()
    unused = {line.removeprefix("not used: ") for line in lines if line.startswith("not used: ")}
    assert unused == {"teacher.backbone.blocks.0.attn.rope", "optimizer", "fp16_scaler"}


def test_the_card_states_the_unknown_license_and_nothing_private(tmp_path):
    convert(write(official_content("2023"), tmp_path / "checkpoint.pth"), tmp_path / "encoder")
    card = ModelCard.load(tmp_path / "encoder" / "README.md")
    assert card.data.license == "unknown"
    assert "license is unknown" in card.text
    assert "checkpoint.pth" in card.text
    assert "somebody" not in card.text


# --- the swapped grid ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_frames", [998, 320, 592])
def test_positions_of_a_swapped_grid_are_stored_at_one_length(tmp_path, num_frames):
    weights = backbone(depth=1, positions=296)
    file = write(prefixed(weights, "model.asit."), tmp_path / "ASIT_weak_1.pt")
    arguments = ["--checkpoint", str(file), "--output_dir", str(tmp_path / "encoder")]
    assert main([*arguments, "--position_grid", "8x37", "--num_frames", str(num_frames)]) == 0
    encoder = ASiTModel.from_pretrained(tmp_path / "encoder")

    # the authors' model is built for 128 x 592 but gets (time, mel), so its 8 rows lie along time
    swapped = weights["pos_embed"][:, 1:].transpose(1, 2).reshape(1, 64, 128 // 16, 592 // 16)
    swapped = F.interpolate(swapped, size=(num_frames // 16, 8), mode="bicubic", align_corners=False)
    expected = swapped[0].permute(1, 2, 0)
    time_patches = num_frames // 16
    assert encoder.config.num_frames == 16 * time_patches
    assert encoder.config.position_grid == (time_patches, 8)
    computed = encoder.embeddings.patch_positions(time_patches)[0]
    torch.testing.assert_close(computed, expected, rtol=0, atol=1e-6)
    assert torch.equal(encoder.embeddings.position_embeddings[:, 0], weights["pos_embed"][:, 0])

    convert(file, tmp_path / "plain")
    plain = ASiTModel.from_pretrained(tmp_path / "plain")
    values = torch.randn(1, num_frames, 128, generator=torch.Generator().manual_seed(0))
    assert (tokens(plain, values) - tokens(encoder, values)).abs().max() > 0.01
    plain.embeddings.patch_positions = lambda *_: expected[None]
    torch.testing.assert_close(tokens(encoder, values), tokens(plain, values), rtol=0, atol=1e-5)


def test_contradicting_options(tmp_path):
    file, output = write(backbone(), tmp_path / "x.pt"), tmp_path / "encoder"
    with pytest.raises(ValueError, match="position_grid and num_frames together"):
        convert(file, output, position_grid=(8, 1))
    with pytest.raises(ValueError, match="position_grid and num_frames together"):
        convert(file, output, num_frames=992)
    with pytest.raises(ValueError, match="8 x 37 patch positions, got 8"):
        convert(file, output, position_grid=(8, 37), num_frames=992)
    with pytest.raises(ValueError, match="at least one patch of 16, got 15"):
        convert(file, output, position_grid=(8, 1), num_frames=15)
    with pytest.raises(ValueError, match="keeps both"):
        convert(file, output, pretraining=True, encoder="student")
    with pytest.raises(ValueError, match="keeps .* grid"):
        convert(file, output, pretraining=True, position_grid=(8, 1), num_frames=32)
    with pytest.raises(ValueError, match="expected student and teacher"):
        convert(file, output, pretraining=True)
    with pytest.raises(ValueError, match="with a student, got backbone"):
        convert(file, output, encoder="student")
    assert list(tmp_path.iterdir()) == [file]


# --- what is refused -----------------------------------------------------------------------------------------------


def replace(key: str, *shape: int):
    return lambda weights: weights | {key: torch.zeros(shape)}


def remove(*keys: str):
    return lambda weights: {key: value for key, value in weights.items() if key not in keys}


def swap_block(weights: dict) -> dict:
    return {key.replace("blocks.1.", "blocks.2."): value for key, value in weights.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replace("patch_embed.proj.weight", 64, 3, 16, 16), r"one channel.*\(64, 3, 16, 16\)"),
        (replace("patch_embed.proj.weight", 64, 1, 16, 8), r"square.*\(64, 1, 16, 8\)"),
        (replace("patch_embed.proj.weight", 64, 256), "patch_embed.proj.weight must be"),
        (replace("pos_embed", 1, 10, 64), "9 patch positions do not fit 128 mel bins"),
        (replace("pos_embed", 1, 1, 64), "0 patch positions"),
        (replace("pos_embed", 9, 64), "pos_embed must have 3 dimensions"),
        (replace("pos_embed", 1, 9, 32), r"pos_embed must be .*\(1, 9, 64\), got .*\(1, 9, 32\)"),
        (replace("cls_token", 1, 2, 64), r"cls_token must be .*\(1, 1, 64\)"),
        (replace("blocks.1.attn.qkv.weight", 64, 64), r"blocks.1.attn.qkv.weight must be .*\(192, 64\)"),
        (replace("blocks.0.mlp.fc1.weight", 100, 64), r"blocks.0.mlp.fc1.bias must be .*\(100,\)"),
        (replace("blocks.1.mlp.fc2.weight", 64, 64), r"blocks.1.mlp.fc2.weight must be .*\(64, 128\)"),
        (replace("norm.weight", 32), r"norm.weight must be .*\(64,\)"),
        (lambda weights: weights | {"norm.bias": torch.zeros(64, dtype=torch.int64)}, "floating point.*int64"),
        (remove("patch_embed.proj.weight"), "with a tensor patch_embed.proj.weight"),
        (remove("cls_token"), "tensor cls_token, .*missing"),
        (remove("blocks.1.norm2.bias"), "tensor blocks.1.norm2.bias"),
        (remove("blocks.0.attn.qkv.bias"), "tensor blocks.0.attn.qkv.bias"),
        (swap_block, r"without a gap, got \[0, 2\]"),
        (lambda weights: {key: value for key, value in weights.items() if "blocks" not in key}, r"got \[\]"),
        (lambda weights: weights | prefixed(weights, "ema."), "expected one backbone, got two"),
        (lambda weights: {}, "expected an ASiT backbone"),
        (lambda weights: list(weights.values()), "expected a dictionary of tensors, got list"),
    ],
)
def test_a_file_that_is_not_an_asit_is_refused_with_the_reason(tmp_path, change, message):
    file = write(change(backbone()), tmp_path / "x.pt")
    with pytest.raises(ValueError, match=message):
        convert(file, tmp_path / "out" / "encoder")
    assert list(tmp_path.iterdir()) == [file]


def test_pretraining_needs_complete_heads(tmp_path):
    content = official_content("2024")
    del content["student"]["module.head_recons.convTrans.bias"]
    file = write(content, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"tensor student\.module\.head_recons\.convTrans\.bias"):
        convert(file, tmp_path / "all", pretraining=True)
    content = official_content("2023")
    content["loss_data"]["center"] = torch.zeros(1, 31)
    write(content, file)
    with pytest.raises(ValueError, match=r"loss_data.center must be .*\(32,\)"):
        convert(file, tmp_path / "all", pretraining=True)
    assert convert(file, tmp_path / "encoder").written == "the encoder teacher.backbone.*"


class Intruder:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("container", ["zip", "legacy", "pickle"])
def test_a_file_that_would_run_code_is_refused(tmp_path, capsys, container):
    trace, file = tmp_path / "trace", tmp_path / "x.pt"
    content = {**backbone(), "args": argparse.Namespace(arch=Intruder(trace))}
    if container == "pickle":
        file.write_bytes(pickle.dumps({"args": Intruder(trace)}, protocol=2))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=container == "zip")
    assert main(["--checkpoint", str(file), "--output_dir", str(tmp_path / "encoder")]) == 1
    error = capsys.readouterr().err
    assert "refused" in error
    assert "posix.mkdir" in error or "nt.mkdir" in error
    assert len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == [file]
    torch.load(file, weights_only=False) if container != "pickle" else pickle.loads(file.read_bytes())
    assert trace.is_dir()  # an unsafe load does run the code


def test_objects_of_other_classes_are_refused(tmp_path):
    file = write({**backbone(), "config": ASiTConfig()}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="asit_hf.*refused"):
        convert(file, tmp_path / "encoder")


def test_damaged_and_missing_files(tmp_path, capsys):
    whole = write(backbone(), tmp_path / "x.pt").read_bytes()
    for damaged in (whole[:-100], whole[: len(whole) // 2], b"", b"hello", b"PK\x03\x04", pickle.dumps([1])):
        (tmp_path / "x.pt").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"x\.pt.*(is not a complete PyTorch file|refused)"):
            convert(tmp_path / "x.pt", tmp_path / "encoder")
    assert main(["--checkpoint", str(tmp_path / "y.pt"), "--output_dir", str(tmp_path / "encoder")]) == 1
    assert capsys.readouterr().err == f"error: no such file: {tmp_path / 'y.pt'}\n"
    assert not (tmp_path / "encoder").exists()


def test_nothing_is_overwritten_unasked(tmp_path):
    file, output = write(backbone(), tmp_path / "x.pt"), tmp_path / "encoder"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="neither empty nor an earlier export"):
        convert(file, output)
    assert [path.name for path in output.iterdir()] == ["notes.txt"]
    convert(file, output, overwrite=True)
    assert not (output / "notes.txt").exists()
    convert(write(backbone(depth=1), file), output)
    assert ASiTConfig.from_pretrained(output).num_hidden_layers == 1
    with pytest.raises(ValueError, match="choose another folder"):
        convert(file, tmp_path, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["encoder", "x.pt"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"num_mel_bins": "32"}, "args.num_mel_bins must be a positive integer"),
        ({"num_mel_bins": 32.5}, "args.num_mel_bins must be a positive integer"),
        ({"sample_rate": 0}, "args.sample_rate must be a positive integer"),
        ({"sample_rate": 16000.5}, "args.sample_rate must be a positive integer"),
    ],
)
def test_run_options_that_are_not_counts_are_refused_or_overridden(tmp_path, args, message):
    content = official_content("2024")
    content["args"] = argparse.Namespace(**{**vars(content["args"]), **args})
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "file.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    config = convert(tmp_path / "file.pth", tmp_path / "out", num_mel_bins=32, sampling_rate=16000).config
    assert config.num_mel_bins == 32
