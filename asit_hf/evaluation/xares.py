"""
The encoder interface of X-ARES (https://github.com/jimbozhang/xares), whose runner builds the one class of a module
whose name ends with "Encoder", without arguments:

    ASIT_XARES_MODEL=CHECKPOINT python -m xares.run asit_hf/evaluation/xares.py TASKS

With other options, instead of this module, one of your own:

    from asit_hf.evaluation import xares

    class FrameEncoder(xares.ASiTEncoder):
        def __init__(self):
            super().__init__("CHECKPOINT", hop_size_in_ms=40, concatenate_mel=False)
"""

import os
from os import PathLike

import torch

from ..fbank_asit import window_and_hop
from .adapters import WindowedModel, fingerprint, load_or_random

MODEL_VARIABLE = "ASIT_XARES_MODEL"


class ASiTEncoder(WindowedModel):
    """
    Args:
        model (`str`, *optional*): folder or Hub name of an encoder, a classifier or a pretraining checkpoint (its
            teacher). By default that of the environment variable `ASIT_XARES_MODEL`; if that is not set, a tiny
            encoder with random weights, the same ones every time.
        hop_size_in_ms (`float`, *optional*): distance of the frames. By default that of the time patches, 160 ms,
            which takes one pass of the encoder. 40 takes four passes, for tasks that need times (DESED, MAESTRO,
            speech recognition).
        concatenate_mel (`bool`): concatenate the mel patches of a frame, which improves linear probes, instead of
            averaging them, which makes frames `num_mel_bins / patch_size` times smaller on disk.
        window_seconds (`float`, *optional*): longer sounds are encoded in windows of this length, cut to whole time
            patches. By default the length of the pretraining crops, `config.num_frames`.

    Attributes that X-ARES requires: `sampling_rate` in Hz, `output_dim`, `hop_size_in_ms`. Its folders of embeddings
    and scores are named after the class and reused, so that every checkpoint and every choice of options is a class of
    its own.

    Raises:
        ValueError: a hop that does not divide a time patch.
    """

    def __init__(
        self,
        model: str | PathLike | None = None,
        hop_size_in_ms: float | None = None,
        concatenate_mel: bool = True,
        window_seconds: float | None = None,
    ):
        model = os.environ.get(MODEL_VARIABLE, "") if model is None else model
        super().__init__(*load_or_random(model), window_seconds)
        config = self.encoder.config
        self.sampling_rate = self.feature_extractor.sampling_rate
        frame_ms = 1000 * window_and_hop(self.sampling_rate)[1] / self.sampling_rate
        self.hop_frames = config.patch_size if hop_size_in_ms is None else round(hop_size_in_ms / frame_ms)
        self.hop_size_in_ms = self.hop_frames * frame_ms
        if self.hop_frames < 1 or config.patch_size % self.hop_frames:
            hops = [frames * frame_ms for frames in range(1, config.patch_size + 1) if config.patch_size % frames == 0]
            raise ValueError(
                f"expected hop_size_in_ms to be one of {', '.join(f'{hop:g}' for hop in hops)}, got {hop_size_in_ms:g}"
            )
        self.concatenate_mel = concatenate_mel
        self.output_dim = config.hidden_size * (config.position_grid[1] if concatenate_mel else 1)
        options = {"hop": self.hop_frames, "mel": concatenate_mel, "window": self.window_frames}
        name = type(self).__name__.removesuffix("Encoder")
        digest = fingerprint(self.encoder, self.feature_extractor, **options)
        self.__class__ = type(f"{name}_{digest}_Encoder", (type(self),), {})

    @torch.inference_mode()
    def forward(self, audio: torch.Tensor) -> torch.Tensor:
        """
        Args:
            audio (`torch.Tensor` of shape `(sounds, samples)` or `(samples,)`): mono, at `sampling_rate`, in [-1, 1].

        Returns:
            `torch.Tensor` of shape `(sounds, frames, output_dim)`, float32. Frame `i` is centered 7.5 ms after
            `(i + 1/2) * hop_size_in_ms`. The end of a sound, less than a hop and the 15 ms by which a log-mel frame is
            longer than its hop, gives no frame; a shorter sound gives one.
        """
        input_values = self.log_mel(audio[None] if audio.dim() == 1 else audio)
        # A patch is longer than a hop by this many frames: the first and last ones are repeated, half of them each.
        before = (self.encoder.config.patch_size - self.hop_frames) // 2
        after = self.encoder.config.patch_size - self.hop_frames - before
        edges = (input_values[:, :1].expand(-1, before, -1), input_values, input_values[:, -1:].expand(-1, after, -1))
        return self.time_patches(torch.cat(edges, dim=1), self.hop_frames, self.concatenate_mel)
