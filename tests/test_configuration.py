import json

import pytest
from transformers import AutoConfig

from asit_hf import ASiTConfig, ASiTModel
from asit_hf.configuration_asit import AUTO_MAP, HUB_FILES, copy_hub_files


@pytest.mark.parametrize(
    ("size", "hidden_size", "num_heads"), [("tiny", 192, 3), ("small", 384, 6), ("base", 768, 12)]
)
def test_named_sizes(size, hidden_size, num_heads):
    config = ASiTConfig.from_size(size, num_mel_bins=64)
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (hidden_size, num_heads, 12)
    assert config.intermediate_size == 4 * hidden_size
    assert config.num_mel_bins == 64


def test_defaults_are_the_base_size_and_the_2024_release():
    config = ASiTConfig()
    assert config.hidden_size == ASiTConfig.from_size("base").hidden_size
    assert config.position_grid == (37, 8)
    assert (config.global_loss_weight, config.local_loss_weight, config.reconstruction_loss_weight) == (0.5, 0.5, 1.0)
    assert config.num_patch_prototypes is None


def test_overrides_replace_the_fields_of_a_size():
    assert ASiTConfig.from_size("tiny", num_hidden_layers=2).num_hidden_layers == 2


@pytest.mark.parametrize(("mode", "width"), [("cls", 192), ("mean", 192), ("cls_mean", 384)])
def test_pooled_size(mode, width):
    assert ASiTConfig.from_size("tiny", pooling_mode=mode).pooled_size == width


def test_position_grid_counts_whole_patches():
    assert ASiTConfig(num_frames=98, num_mel_bins=64).position_grid == (6, 4)


def test_round_trip_keeps_every_field(tmp_path):
    config = ASiTConfig.from_size(
        "tiny", num_patch_prototypes=16, drop_path_rate=0.1, num_labels=3, pooling_mode="mean"
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, ASiTConfig)
    differing = {name for name, value in config.to_dict().items() if loaded.to_dict()[name] != value}
    assert differing <= {"_name_or_path"}


def test_misspelled_fields_give_a_warning(caplog, tmp_path):
    ASiTConfig(num_mel_bin=64, my_note="x")
    assert "num_mel_bin," in caplog.text
    assert "num_mel_bins" in caplog.text
    assert "my_note" not in caplog.text
    caplog.clear()
    ASiTConfig(num_labels=3, architectures=["ASiTModel"]).save_pretrained(tmp_path)
    AutoConfig.from_pretrained(tmp_path, output_attentions=True, num_mel_bins=64)
    assert not caplog.records


def test_saved_folder_contains_the_code_named_by_its_auto_map(tmp_path):
    ASiTConfig.from_size("tiny").save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert {path.name for path in tmp_path.glob("*.py")} == set(HUB_FILES)
    assert {name.split(".")[0] + ".py" for name in AUTO_MAP.values()} <= set(HUB_FILES)


def test_hub_files_import_only_each_other(tmp_path):
    copy_hub_files(tmp_path)
    for path in tmp_path.glob("*.py"):
        imports = [line for line in path.read_text().splitlines() if line.startswith(("from .", "import ."))]
        assert all(line.split()[1].removeprefix(".") + ".py" in HUB_FILES for line in imports), imports
        assert "asit_hf" not in " ".join(line for line in path.read_text().splitlines() if line.startswith("from "))


def test_from_dict_keeps_every_field():
    fields = {"hidden_size": 48, "num_attention_heads": 3, "num_frames": 96, "num_mel_bins": 32}
    config = ASiTConfig.from_dict({**fields, "num_hidden_layers": 1, "intermediate_size": 96})
    assert {name: getattr(config, name) for name in fields} == fields
    assert ASiTModel(config).embeddings.position_embeddings.shape == (1, 1 + 6 * 2, 48)
