"""
The encoder interface of mteb (https://github.com/embeddings-benchmark/mteb), whose audio benchmark is MAEB:

    import mteb
    from asit_hf.evaluation.mteb import load_model

    model = load_model("CHECKPOINT")
    print(mteb.mock_run(model).to_markdown())  # checks the interface in seconds, without data; needs torchcodec
    print(mteb.evaluate(model, mteb.get_tasks(tasks=["ESC50"])))
"""

from functools import cached_property, partial
from os import PathLike
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from huggingface_hub import ModelCard
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..data.audio import AudioReadError
from ..data.clips import select_audio
from ..fbank_asit import window_and_hop
from ..feature_extraction_asit import ASiTFeatureExtractor
from ..modeling_asit import ASiTModel
from ..utils.extras import extra
from .adapters import fingerprint, load_or_random, window_frames
from .embeddings import embed_files, embedding_size

CITATION = """@article{atito2024asit,
  title   = {{ASiT}: Local-Global Audio Spectrogram vIsion Transformer for Event Classification},
  author  = {Atito, Sara and Awais, Muhammad and Wang, Wenwu and Plumbley, Mark D. and Kittler, Josef},
  journal = {IEEE/ACM Transactions on Audio, Speech, and Language Processing},
  year    = {2024},
  doi     = {10.1109/TASLP.2024.3428908},
}"""
_DEFAULTS = {"pooling": "mean_std_time", "num_layers": 1, "window_seconds": None}


class MtebModel:
    """
    An encoder and its feature extractor, with the methods of mteb's `EncoderProtocol`. Clips of any rate and number of
    channels are read by [`~asit_hf.data.audio.AudioReader`], without torchcodec or torchaudio, and embedded in windows
    over their whole length.

    Args:
        encoder, feature_extractor: of one checkpoint.
        path (`str`): where they were loaded from.
        name, revision, pooling, num_layers, window_seconds: see `load_model`.
    """

    def __init__(
        self,
        encoder: ASiTModel,
        feature_extractor: ASiTFeatureExtractor,
        path: str = "",
        name: str | None = None,
        revision: str | None = None,
        pooling: str = "mean_std_time",
        num_layers: int = 1,
        window_seconds: float | None = None,
    ):
        self.encoder = encoder
        self.feature_extractor = feature_extractor
        self.path = path
        self.is_local = not path or Path(path).is_dir()
        self.name = name or (f"asit_hf/{Path(path).resolve().name if path else 'random'}" if self.is_local else path)
        self.revision = revision
        self.options = {"pooling": pooling, "num_layers": num_layers, "window_seconds": window_seconds}
        self.embed_dim = embedding_size(encoder, pooling, num_layers)
        rate = feature_extractor.sampling_rate
        frames = window_frames(encoder, feature_extractor, window_seconds)
        self.window_seconds = frames * window_and_hop(rate)[1] / rate

    def encode(
        self,
        inputs: DataLoader,
        *,
        task_metadata: Any = None,
        hf_split: str | None = None,
        hf_subset: str | None = None,
        prompt_type: Any = None,
        batch_size: int = 32,
        show_progress_bar: bool = True,
        precision: str = "float32",
    ) -> np.ndarray:
        """
        Args:
            inputs: loader of a data set with a column `audio`, whose clips are embedded in the data set's order.
            task_metadata, hf_split, hf_subset, prompt_type: of mteb; they do not affect the embeddings.
            batch_size (`int`): of the windows.
            show_progress_bar (`bool`): over the clips.
            precision (`str`): "float32".

        Returns:
            `np.ndarray` of shape `(clips, embed_dim)`, float32.

        Raises:
            AudioReadError: an unreadable clip; a score must not leave it out.
            ValueError: a data set without audio, or a `precision` that is not float32.
        """
        if precision != "float32":
            raise ValueError(f"expected precision float32, got {precision}")
        clips = select_audio(inputs.dataset)
        embedded = embed_files(
            self.encoder,
            self.feature_extractor,
            clips,
            self.options["pooling"],
            batch_size,
            num_layers=self.options["num_layers"],
            window_seconds=self.window_seconds,
        )
        embeddings = np.empty((len(clips), self.embed_dim), np.float32)
        progress = tqdm(embedded, total=len(clips), desc="Embedding", unit="clip", disable=not show_progress_bar)
        for row, clip in enumerate(progress):
            if isinstance(clip, AudioReadError):
                raise clip
            embeddings[row] = clip.scene
        return embeddings

    def similarity(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Cosine similarity of every pair, `(embeddings1, embeddings2)`."""
        with extra("mteb"):
            from mteb.similarity_functions import cos_sim
        return cos_sim(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Cosine similarity of rows of the same number, `(embeddings,)`."""
        with extra("mteb"):
            from mteb.similarity_functions import pairwise_cos_sim
        return pairwise_cos_sim(embeddings1, embeddings2)

    @cached_property
    def mteb_model_meta(self) -> Any:
        """
        mteb's `ModelMeta`, under whose name and revision it stores results. The revision of a folder is a fingerprint
        of its weights; options that differ from the defaults are part of the name. What a folder does not tell, such
        as `training_datasets`, can be added with `model_copy(update=...)`.
        """
        with extra("mteb"):
            from mteb.models import ModelMeta
            from mteb.types import Licenses
        revision = self.revision or getattr(self.encoder.config, "_commit_hash", None)
        license = self._card_license()
        parameters = list(self.encoder.parameters())
        return ModelMeta(
            loader=partial(load_model, self.path),
            experiment_kwargs={key: value for key, value in self.options.items() if value != _DEFAULTS[key]} or None,
            name=self.name,
            revision=revision or fingerprint(self.encoder, self.feature_extractor),
            release_date=None,
            languages=None,
            n_parameters=sum(parameter.numel() for parameter in parameters),
            n_embedding_parameters=0,
            memory_usage_mb=sum(parameter.nbytes for parameter in parameters) / 2**20,
            max_tokens=float("inf"),
            embed_dim=self.embed_dim,
            license=license if license in get_args(Licenses) else None,
            open_weights=None if self.is_local else True,
            public_training_code=None,
            public_training_data=None,
            framework=["PyTorch", "Transformers", "safetensors"],
            reference=None if self.is_local else f"https://huggingface.co/{self.path}",
            similarity_fn_name="cosine",
            use_instructions=False,
            training_datasets=None,
            modalities=["audio"],
            citation=CITATION,
        )

    def _card_license(self) -> str | None:
        """The license that the model card names, if there is a card."""
        card = Path(self.path) / "README.md" if self.is_local else self.path
        if self.is_local and not (self.path and card.is_file()):
            return None
        return ModelCard.load(card, ignore_metadata_errors=True).data.license


def load_model(
    path: str | PathLike = "",
    name: str | None = None,
    revision: str | None = None,
    device: str | torch.device | None = None,
    pooling: str = "mean_std_time",
    num_layers: int = 1,
    window_seconds: float | None = None,
) -> MtebModel:
    """
    Args:
        path (`str`): folder or Hub name of an encoder, a classifier or a pretraining checkpoint (its teacher). Empty:
            a tiny encoder with random weights, the same ones every time.
        name (`str`, *optional*): name in mteb's results, `user/name`. By default the Hub name, or `asit_hf/` and the
            folder's name.
        revision (`str`, *optional*): of a model on the Hub, or in mteb's results.
        device (`str`, *optional*): by default a GPU, if there is one.
        pooling (`str`), num_layers (`int`): see [`~asit_hf.evaluation.embeddings.embed`]. The default pooling
            concatenates mel patches, which improves linear probes.
        window_seconds (`float`, *optional*): longer clips are embedded in windows of this length, cut to whole time
            patches. By default the length of the pretraining crops, `config.num_frames`.

    Raises:
        ValueError: an unknown pooling, or a wrong number of layers.
    """
    on_hub = path and not Path(path).is_dir()
    encoder, feature_extractor = load_or_random(path, **({"revision": revision} if on_hub and revision else {}))
    encoder.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return MtebModel(encoder, feature_extractor, str(path), name, revision, pooling, num_layers, window_seconds)
