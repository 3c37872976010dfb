"""Models with the libraries that adapt, compile, export, quantize and shard them."""

import copy
import importlib.util
import logging
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import tiny
import torch
from tiny import MEL
from torch import distributed, nn
from torch.export import Dim
from transformers import AutoModel, TorchAoConfig, pipeline

from asit_hf import (
    ASiTAudioClassificationPipeline,
    ASiTFeatureExtractor,
    ASiTForAudioClassification,
    ASiTForAudioFrameClassification,
    ASiTForPreTraining,
    ASiTModel,
)
from asit_hf.finetuning.trainer import FinetuningArguments, FinetuningTrainer
from asit_hf.hub.export import export_model
from asit_hf.loading import load_config, load_encoder, load_feature_extractor, load_trained
from asit_hf.predict import load_classifier

CLASSIFIERS = [ASiTForAudioClassification, ASiTForAudioFrameClassification]
DYNAMIC = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}  # batch and time


def build(cls=ASiTForAudioClassification, **kwargs):
    return tiny.build(cls, **kwargs)


def padded_batch(lengths: list[int], seed: int = 0) -> dict[str, torch.Tensor]:
    """Model inputs for clips of these lengths in frames."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(len(lengths), max(lengths), MEL, generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_values": values * mask[..., None], "attention_mask": mask}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    build().save_pretrained(folder)
    return folder


# --- adapters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_trains_saves_and_loads(checkpointing, tmp_path):
    peft = pytest.importorskip("peft")
    base = build()
    before = copy.deepcopy(base.state_dict())
    targets = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]}
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, **targets)).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(map(torch.numel, trained)) < 0.05 * sum(map(torch.numel, model.parameters()))
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    batch, labels, losses = padded_batch([96, 40, 250, 96]), torch.arange(4), []
    for _ in range(8):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        assert all(parameter.grad is not None for parameter in trained)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]

    model.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    frozen = build()
    loaded = peft.PeftModel.from_pretrained(frozen, tmp_path).eval()
    expected = model.eval()(**batch).logits
    torch.testing.assert_close(loaded(**batch).logits, expected, rtol=0, atol=1e-5)
    merged = loaded.merge_and_unload()
    assert type(merged) is ASiTForAudioClassification
    torch.testing.assert_close(merged(**batch).logits, expected, rtol=0, atol=1e-4)
    unchanged = model.unload().state_dict()
    for name, value in before.items():
        assert torch.equal(unchanged[name], value) is not name.startswith("classifier."), name


@pytest.fixture
def adapted(tmp_path):
    """A classifier with new classes on a saved encoder, with LoRA, and the folder of its adapter."""
    peft = pytest.importorskip("peft")
    build(ASiTModel).save_pretrained(tmp_path / "encoder")
    ASiTFeatureExtractor(num_mel_bins=MEL).save_pretrained(tmp_path / "encoder")
    names = dict(enumerate(("cat", "dog", "owl")))
    labels = {"id2label": names, "label2id": {name: index for index, name in names.items()}}
    base = ASiTForAudioClassification.from_pretrained(tmp_path / "encoder", **labels)
    targets = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]}
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, init_lora_weights=False, **targets)).eval()
    nn.init.normal_(model.get_base_model().classifier.modules_to_save["default"].weight)
    model.save_pretrained(tmp_path / "adapter")
    return model, tmp_path / "adapter"


def test_an_adapter_loads_with_its_classes(adapted, tmp_path, caplog):
    model, folder = adapted
    waveform = 0.1 * torch.randn(12000, generator=torch.Generator().manual_seed(1))
    extractor = ASiTFeatureExtractor(num_mel_bins=MEL)
    options = {"pipeline_class": ASiTAudioClassificationPipeline, "device": "cpu"}
    expected = pipeline("audio-classification", model=model, feature_extractor=extractor, **options)(waveform)
    scores = [pytest.approx(row["score"], abs=1e-5) for row in expected]
    assert expected[0]["score"] > 0.4
    assert ASiTFeatureExtractor.from_pretrained(folder).num_mel_bins == MEL  # the base model's

    unnamed = pipeline("audio-classification", model=str(folder), **options)(waveform)
    assert [row["score"] for row in unnamed] == scores
    assert "names of its 3 classes" in caplog.text
    batch = padded_batch([96, 40])
    adapted_states = model.get_base_model().asit(**batch).last_hidden_state
    torch.testing.assert_close(load_encoder(folder)(**batch).last_hidden_state, adapted_states, rtol=0, atol=1e-4)
    model.get_base_model().config.save_pretrained(folder)
    assert [row["score"] for row in load_classifier(folder, "cpu")(waveform)] == scores
    extractor.save_pretrained(folder)
    caplog.clear()
    for classifier in (pipeline("audio-classification", model=str(folder), **options), load_classifier(folder, "cpu")):
        named = classifier(waveform)
        assert [row["label"] for row in named] == [row["label"] for row in expected]
        assert [row["score"] for row in named] == scores
    assert not caplog.records

    encoder = load_encoder(folder)
    assert type(encoder) is ASiTModel
    torch.testing.assert_close(encoder(**batch).last_hidden_state, adapted_states, rtol=0, atol=1e-4)
    assert encoder.state_dict().keys() == build(ASiTModel).state_dict().keys()
    again = AutoModel.from_pretrained(folder)
    assert type(again) is ASiTModel
    torch.testing.assert_close(again(**batch).last_hidden_state, adapted_states, rtol=0, atol=1e-4)
    assert load_feature_extractor(folder).num_mel_bins == MEL


def test_an_adapter_is_exported_merged(adapted, tmp_path):
    model, folder = adapted
    model.get_base_model().config.save_pretrained(folder)
    merged = ASiTForAudioClassification.from_pretrained(export_model(folder, tmp_path / "merged")).eval()
    assert merged.config.id2label == {0: "cat", 1: "dog", 2: "owl"}
    batch = padded_batch([96, 40])
    torch.testing.assert_close(merged(**batch).logits, model(**batch).logits, rtol=0, atol=1e-4)
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "cat, dog, owl" in card
    assert str(tmp_path) not in card
    with pytest.raises(ValueError, match="encoder"):  # the adapter needs its base model
        export_model(folder, tmp_path / "encoder", overwrite=True)


@pytest.mark.parametrize(
    ("base_class", "saved"),
    [(ASiTForAudioClassification, ["classifier"]), (ASiTForAudioClassification, None), (ASiTModel, None)],
)
def test_an_adapter_gives_the_classifier_that_its_base_model_lacks(base_class, saved, tmp_path, caplog):
    peft = pytest.importorskip("peft")
    build(base_class).save_pretrained(tmp_path / "base")  # a classifier has five labels
    labels = {"id2label": {0: "cat", 1: "dog", 2: "owl"}, "label2id": {"cat": 0, "dog": 1, "owl": 2}}
    base = ASiTForAudioClassification.from_pretrained(tmp_path / "base", **labels, ignore_mismatched_sizes=True)
    lora = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj"], modules_to_save=saved)
    model = peft.get_peft_model(base, lora).eval()
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    base.config.save_pretrained(folder)
    ASiTFeatureExtractor(num_mel_bins=MEL).save_pretrained(folder)
    batch = padded_batch([96, 40])
    caplog.clear()
    encoded, expected = (one(**batch).pooler_output for one in (load_encoder(folder), base.asit))
    torch.testing.assert_close(encoded, expected, rtol=0, atol=1e-4)
    assert not caplog.records
    if saved:
        loaded, _ = load_trained(folder, ASiTForAudioClassification)
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, rtol=0, atol=1e-5)
        assert not caplog.records
        return
    with pytest.raises(ValueError, match=r"classifier\.(bias|weight)"):
        load_trained(folder, ASiTForAudioClassification)
    if base_class is ASiTModel:
        _, info = ASiTForAudioClassification.from_pretrained(folder, output_loading_info=True)
        assert info["missing_keys"] == {"classifier.bias", "classifier.weight"}
        assert "classifier.weight" in caplog.text


def test_an_adapter_of_an_encoder_loads_into_a_classifier_too(tmp_path):
    peft = pytest.importorskip("peft")
    build(ASiTModel).save_pretrained(tmp_path / "base")
    encoder = ASiTModel.from_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(encoder, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    batch = padded_batch([96, 40])
    expected = adapted(**batch).last_hidden_state
    for cls in (ASiTModel, ASiTForAudioClassification, ASiTForAudioFrameClassification):
        model = cls.from_pretrained(tmp_path / "adapter")
        states = getattr(model, "asit", model)(**batch).last_hidden_state
        torch.testing.assert_close(states, expected, rtol=0, atol=1e-4)


def test_finetuning_saves_the_classes_beside_an_adapter(adapted, tmp_path):
    model, _ = adapted
    options = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False, "use_cpu": True}
    arguments = FinetuningArguments(output_dir=str(tmp_path / "run"), report_to="none", **options)
    trainer = FinetuningTrainer(model, arguments, processing_class=ASiTFeatureExtractor(num_mel_bins=MEL))
    trainer.save_model()
    assert load_config(tmp_path / "run").id2label == {0: "cat", 1: "dog", 2: "owl"}
    assert not (tmp_path / "run" / "model.safetensors").exists()
    loaded = ASiTForAudioClassification.from_pretrained(tmp_path / "run")
    batch = padded_batch([96, 40])
    torch.testing.assert_close(loaded.eval()(**batch).logits, model(**batch).logits, rtol=0, atol=1e-5)


def test_lora_of_every_linear_layer():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build(), peft.LoraConfig(r=2, target_modules="all-linear"))
    adapted = {name.rpartition(".")[2] for name in model.targeted_module_names}
    assert adapted >= {"q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"}


# --- memory and precision ------------------------------------------------------------------------------------------


def gradients_of(model: nn.Module, batch: dict, **kwargs) -> dict[str, torch.Tensor]:
    model.train()(**batch, **kwargs).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_keeps_the_gradients_of_a_padded_batch(reentrant):
    batch, labels = padded_batch([96, 40]), torch.tensor([[0, 1, 2, 3, -100, 4], [3, 1, 0, 0, 0, 0]])
    expected = gradients_of(build(ASiTForAudioFrameClassification), batch, labels=labels)
    model = build(ASiTForAudioFrameClassification)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls = []
    model.asit.layers[0].mlp.register_forward_pre_hook(lambda *args: calls.append(1))
    gradients = gradients_of(model, batch, labels=labels)
    assert len(calls) == 2  # once in the forward and once in the backward pass
    torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("cls", CLASSIFIERS)
def test_a_step_in_bfloat16_autocast_is_near_float32(cls, masked):
    batch = padded_batch([96, 96, 96, 40])
    if not masked:
        del batch["attention_mask"]
    labels = torch.arange(4) if cls is ASiTForAudioClassification else torch.arange(24).view(4, 6) % 5
    losses, gradients = [], []
    for context in (nullcontext(), torch.autocast("cpu", dtype=torch.bfloat16)):
        model = build(cls, initializer_range=0.05)
        with context:
            loss = model.train()(**batch, labels=labels).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert torch.isfinite(gradients[1]).all()
    assert nn.functional.cosine_similarity(*gradients, dim=0) > 0.999


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_load(checkpoint, dtype):
    model = ASiTForAudioClassification.from_pretrained(checkpoint, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    batch = padded_batch([96, 40, 250])
    expected = build()(**batch).logits
    logits = model(batch["input_values"].to(dtype), attention_mask=batch["attention_mask"]).logits
    assert logits.dtype == dtype
    assert (logits.float() - expected).abs().max() < 0.1 * expected.std()


# --- attention -----------------------------------------------------------------------------------------------------


def test_attention_is_chosen_when_loading_and_later(checkpoint):
    batch = padded_batch([96, 40, 250])
    model = ASiTForAudioClassification.from_pretrained(checkpoint, attn_implementation="eager")
    assert model.asit.config._attn_implementation == "eager"
    eager = model(**batch).logits
    assert model(**batch, output_attentions=True).attentions[0] is not None
    model.set_attn_implementation("sdpa")
    assert model.asit.layers[0].attention.config._attn_implementation == "sdpa"
    torch.testing.assert_close(model(**batch).logits, eager, rtol=0, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_flex_attention_equals_sdpa(checkpoint):
    if not shutil.which("g++"):
        pytest.skip("flex attention compiles, and there is no C++ compiler")
    model = ASiTForAudioClassification.from_pretrained(checkpoint, attn_implementation="flex_attention")
    batch = padded_batch([96, 40, 250])
    torch.testing.assert_close(model(**batch).logits, build()(**batch).logits, rtol=0, atol=1e-5)


def test_flash_attention_without_its_package_is_refused(checkpoint):
    if importlib.util.find_spec("flash_attn") or torch.cuda.is_available():
        pytest.skip("flash attention is available")
    with pytest.raises(ImportError, match="FlashAttention2 .*installed"):
        ASiTForAudioClassification.from_pretrained(checkpoint, attn_implementation="flash_attention_2")


def test_an_unknown_attention_is_refused(checkpoint):
    with pytest.raises(ValueError, match="eager"):
        ASiTForAudioClassification.from_pretrained(checkpoint, attn_implementation="no_such_attention")


# --- compiling and exporting ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("cls", CLASSIFIERS)
def test_compiles_as_one_graph(cls):
    model = build(cls)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for batch in (padded_batch([96, 40]), {"input_values": padded_batch([96, 96])["input_values"]}):
        torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_training_compiles_as_one_graph():
    labels = torch.tensor([[0, 1, 2, 3, -100, 4], [3, 1, 0, 0, 0, 0]])
    batch = padded_batch([96, 40]) | {"labels": labels}
    expected = gradients_of(build(ASiTForAudioFrameClassification), batch)
    model = build(ASiTForAudioFrameClassification)
    model.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients_of(model, batch), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@torch.no_grad()
def test_inductor_equals_eager():
    if not shutil.which("g++"):
        pytest.skip("inductor needs a C++ compiler")
    model, batch = build(), padded_batch([96, 40])
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("frames", [96, 250])  # the length at which positions are learned, and another
def test_exports_with_dynamic_batch_and_frames(frames, masked):
    def clips(lengths: list[int]) -> dict[str, torch.Tensor]:
        batch = padded_batch(lengths)
        return batch if masked else {"input_values": batch["input_values"]}

    model, batch = build(), clips([96, 40, frames])
    program = torch.export.export(model, (), batch, dynamic_shapes=dict.fromkeys(batch, DYNAMIC))
    for lengths in ([96, 40, 250], [64, 130], [96]):
        batch = clips(lengths)
        torch.testing.assert_close(program.module()(**batch)["logits"], model(**batch).logits, rtol=0, atol=1e-5)


def to_onnx(model: nn.Module, batch: dict[str, torch.Tensor], **options):
    """Exports with transformers' exporter."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    from transformers.exporters import OnnxConfig, OnnxExporter

    return OnnxExporter().export(model, batch, OnnxConfig(dynamic_shapes=dict.fromkeys(batch, DYNAMIC), **options))


@pytest.mark.slow
@pytest.mark.parametrize("cls", CLASSIFIERS)
@torch.no_grad()
def test_onnx_equals_torch_at_other_batch_sizes_and_lengths(cls, tmp_path):
    model = build(cls, pooling_mode="cls_mean")
    exported = to_onnx(model, padded_batch([96, 60, 88]))
    exported.save_pretrained(tmp_path)
    loaded = type(exported).from_pretrained(tmp_path)
    for lengths in ([112, 60, 98], [64], [250, 96, 16, 33, 130], [1998, 250], [7, 5]):
        batch = padded_batch(lengths)
        expected = model(**batch)
        for run in (exported, loaded):
            for name, value in run(**batch).items():
                torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-4)


# --- int8 ----------------------------------------------------------------------------------------------------------


def assert_labels_agree(logits: torch.Tensor, expected: torch.Tensor) -> None:
    assert not torch.equal(logits, expected)
    assert (logits.argmax(-1) == expected.argmax(-1)).float().mean() > 0.9
    assert (logits - expected).abs().mean() < 0.1 * expected.std()


@pytest.mark.parametrize("name", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
@torch.no_grad()
def test_int8_by_torchao_keeps_labels_and_is_smaller(checkpoint, name, tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    options = TorchAoConfig(getattr(quantization, name)())
    model = ASiTForAudioClassification.from_pretrained(checkpoint, quantization_config=options)
    batch = padded_batch([96, 40, 112, 96] * 16)
    logits = model(**batch).logits
    assert_labels_agree(logits, build()(**batch).logits)
    model.save_pretrained(tmp_path)
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (tmp_path, checkpoint)]
    assert sizes[0] < 0.6 * sizes[1]
    torch.testing.assert_close(ASiTForAudioClassification.from_pretrained(tmp_path)(**batch).logits, logits)


@pytest.mark.slow
@torch.no_grad()
def test_int8_by_onnxruntime_keeps_labels(caplog):
    pytest.importorskip("onnxruntime")
    from transformers.exporters import OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer

    model = build()
    with caplog.at_level(logging.ERROR):
        exported = to_onnx(
            model, padded_batch([112, 60, 98]), quantizer=OnnxRuntimeQuantizer(OnnxRuntimeDynamicConfig())
        )
    batch = padded_batch([96, 40, 112, 96] * 16)
    assert_labels_agree(exported(**batch)["logits"], model(**batch).logits)


# --- several devices -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_device_map_loads(checkpoint, device_map):
    model = ASiTForAudioClassification.from_pretrained(checkpoint, device_map=device_map)
    batch = padded_batch([96, 40])
    torch.testing.assert_close(model(**batch).logits.cpu(), build()(**batch).logits, rtol=0, atol=1e-4)


def test_offloading_layers_to_disk_keeps_the_output(checkpoint, tmp_path):
    parts = ["asit.embeddings", "asit.layers.0", "asit.layers.1", "asit.layernorm", "classifier"]
    places = dict.fromkeys(parts, "cpu") | {"asit.embeddings": "disk", "asit.layers.1": "disk"}
    model = ASiTForAudioClassification.from_pretrained(checkpoint, device_map=places, offload_folder=tmp_path)
    assert model.asit.layers[1].mlp.fc1.weight.device.type == "meta"
    batch = padded_batch([96, 40])
    torch.testing.assert_close(model(**batch).logits, build()(**batch).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cls", [ASiTModel, *CLASSIFIERS, ASiTForPreTraining])
def test_no_split_modules_exist_and_stay_on_one_device(cls):
    from accelerate import infer_auto_device_map

    model = build(cls, num_hidden_layers=6)
    names = set(model._no_split_modules)
    whole = [name for name, module in model.named_modules() if type(module).__name__ in names]
    assert {type(model.get_submodule(name)).__name__ for name in whole} == names
    total = sum(value.nbytes for value in model.state_dict().values())
    places = infer_auto_device_map(
        model, max_memory={"cpu": 3 * total // 4, "disk": 2 * total}, no_split_module_classes=sorted(names)
    )
    assert set(places.values()) == {"cpu", "disk"}
    assert not any(place.startswith(f"{name}.") for place in places for name in whole)


@pytest.mark.needs_cpu_fsdp
def test_sharding_by_no_split_modules_keeps_the_gradients(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    batch = padded_batch([96, 40]) | {"labels": torch.tensor([1, 3])}
    expected = gradients_of(build(), batch)
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = build()
        mesh = init_device_mesh("cpu", (1,))
        for module in list(model.modules()):
            if type(module).__name__ in model._no_split_modules:
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        gradients = {name: value.full_tensor() for name, value in gradients_of(model, batch).items()}
        torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-7)
    finally:
        distributed.destroy_process_group()


# --- pretraining ---------------------------------------------------------------------------------------------------


def test_pretraining_model_loads_with_a_device_map_in_bfloat16(tmp_path):
    model = build(ASiTForPreTraining)
    model.save_pretrained(tmp_path)
    loaded = ASiTForPreTraining.from_pretrained(tmp_path, device_map="cpu", dtype=torch.bfloat16)
    state = loaded.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(state[name].float(), value.float(), rtol=0.01, atol=1e-6)
