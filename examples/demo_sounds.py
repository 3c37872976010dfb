"""
Write a labelled set of synthetic sounds: `python examples/demo_sounds.py FOLDER`.

Sixteen classes differ in timbre, pitch movement and rhythm. Pitch, speed, spectral tilt, level, position, duration and
background noise are random in every clip. All tonal classes share one distribution of timbres and all rhythmic ones
share one of strikes, so that neither level nor average spectrum identifies a class.
"""

import argparse
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

from asit_hf.utils.files import whole_folder

PARAMETERS_FILE = "demo_sounds.json"
# First three formants in Hz of five cardinal vowels of an average adult voice.
FORMANTS = np.array([(300, 2300, 3000), (450, 2000, 2700), (750, 1250, 2600), (450, 850, 2500), (320, 700, 2400)])
BELL_RATIOS = np.array([0.5, 1.0, 1.19, 1.5, 2.0, 2.52, 2.67, 3.01, 4.1, 5.43])


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _fundamental(rng: np.random.Generator) -> float:
    return _log_uniform(rng, 180.0, 520.0)


def _tilt(signal: np.ndarray, sampling_rate: int, db_per_octave: float) -> np.ndarray:
    """Tilt the spectrum of a signal around 1 kHz; below 50 Hz the gain is constant."""
    frequency = np.fft.rfftfreq(len(signal), 1 / sampling_rate)
    gain = (np.maximum(frequency, 50.0) / 1000.0) ** (db_per_octave / 6.02)
    return np.fft.irfft(np.fft.rfft(signal) * gain, len(signal))


def _ramp(samples: int, rng: np.random.Generator, sampling_rate: int) -> np.ndarray:
    """Envelope of a sustained sound, with fades of 10 to 200 ms at both ends."""
    rise, fall = rng.uniform(0.01, 0.2, size=2) * sampling_rate
    position = np.arange(samples)
    return np.clip(position / rise, 0, 1) * np.clip((samples - position) / fall, 0, 1)


def _oscillator(pitch: np.ndarray, amplitudes: np.ndarray, sampling_rate: int) -> np.ndarray:
    """Harmonic tone with the pitch (samples,) in Hz, without harmonics that would alias."""
    audible = np.arange(1, len(amplitudes) + 1) * pitch.max() < 0.48 * sampling_rate
    spectrum = np.concatenate([[0], amplitudes * audible])
    period = np.fft.irfft(-1j * spectrum, 4096)
    phase = np.cumsum(pitch) / sampling_rate
    return period[(phase * 4096).astype(np.int64) % 4096]


def _tone(rng: np.random.Generator, pitch: np.ndarray, sampling_rate: int) -> np.ndarray:
    """Sustained tone of random timbre, shared by the classes that differ in pitch or loudness movement."""
    number = np.arange(1, 25)
    amplitudes = number ** -rng.uniform(0.5, 1.5) * 10 ** (rng.normal(0, 2, size=24) / 20)
    if rng.random() < 0.3:
        amplitudes[1::2] = 0
    return _oscillator(pitch, amplitudes, sampling_rate) * _ramp(len(pitch), rng, sampling_rate)


def _band_noise(rng: np.random.Generator, center: np.ndarray, bandwidth: float, sampling_rate: int) -> np.ndarray:
    """Band-limited noise with a moving center frequency (samples,) in Hz."""
    samples = len(center)
    baseband = np.fft.fft(rng.standard_normal(samples) + 1j * rng.standard_normal(samples))
    frequency = np.fft.fftfreq(samples, 1 / sampling_rate)
    baseband = np.fft.ifft(baseband * np.exp(-0.5 * (2 * frequency / bandwidth) ** 2))
    return (baseband * np.exp(2j * np.pi * np.cumsum(center) / sampling_rate)).real


def _onsets(rate: np.ndarray, sampling_rate: int) -> np.ndarray:
    """Sample indices of events at `rate` (samples,) per second; the first is 0."""
    beat = np.floor(np.cumsum(rate) / sampling_rate)
    return np.flatnonzero(np.diff(beat, prepend=-1))


def _place(onsets: np.ndarray, gains: np.ndarray, sound: np.ndarray, samples: int) -> np.ndarray:
    """Sum of copies of a sound that start at the onsets, truncated to `samples`."""
    out = np.zeros(samples)
    for onset, gain in zip(onsets, gains):
        piece = sound[: samples - onset]
        out[onset : onset + len(piece)] += gain * piece
    return out


def _strikes(
    rng: np.random.Generator, onsets: np.ndarray, decay: float, center: float, samples: int, sampling_rate: int
) -> np.ndarray:
    """The same noisy strike around `center` Hz, with time constant `decay` in seconds, at every onset."""
    time = np.arange(int(5 * decay * sampling_rate)) / sampling_rate
    ringing = np.sin(2 * np.pi * center * time)
    noise = _band_noise(rng, np.full(len(time), center), _log_uniform(rng, 500.0, 6000.0), sampling_rate)
    strike = (ringing + rng.uniform(0.2, 3.0) * noise / noise.std()) * np.exp(-time / decay)
    return _place(onsets, 10 ** (rng.uniform(-8, 0, size=len(onsets)) / 20), strike, samples)


def steady_tone(rng: np.random.Generator, samples: int, sampling_rate: int) -> np.ndarray:
    return _tone(rng, np.full(samples, _fundamental(rng)), sampling_rate)


def rising_glide(rng: np.random.Generator, samples: int, sampling_rate: int) -> np.ndarray:
    octaves = rng.uniform(1.0, 2.0) * np.linspace(-0.5, 0.5, samples)
    return _tone(rng, _fundamental(rng) * 2**octaves, sampling_rate)


def falling_glide(rng: np.random.Generator, samples: int, sampling_rate: int) -> np.ndarray:
    octaves = rng.uniform(1.0, 2.0) * np.linspace(0.5, -0.5, samples)
    return _tone(rng, _fundamental(rng) * 2**octaves, sampling_rate)


def vibrato(rng: np.random.Generator, samples: int, sampling_rate: int) -> np.ndarray:
    swing = np.sin(2 * np.pi * rng.uniform(4, 8) * np.arange(samples) / sampling_rate)
    return _tone(rng, _fundamental(rng) * 2 ** (rng.uniform(0.06, 0.2) * swing), sampling_rate)


def two_tone_siren(rng: np.random.Generator, samples: int, sampling_rate: int) -> np.ndarray:
    beat = np.floor(rng.uniform(3, 9) * np.arange(samples) / sampling_rate)
    octaves = rng.uniform(0.4, 1.0) * (beat % 2 - 0.5)
    return _tone(rng, _fundamental(rng) * 2**octaves, sampling_rate)


def tremolo(rng: np.random.Generator, samples: int, sampling_rate: int) -> np.ndarray:
    swing = np.cos(2 * np.pi * rng.uniform(4, 12) * np.arange(samples) / sampling_rate)
    depth = rng.uniform(0.85, 1.0)
    return steady_tone(rng, samples, sampling_rate) * (1 - depth * (0.5 + 0.5 * swing))


def plucked_string(rng: np.random.Generator, samples: int, sampling_rate: int) -> np.ndarray:
    """Karplus-Strong synthesis: a burst of noise circulates in a delay line through a two-point average."""
    delay = int(sampling_rate / _log_uniform(rng, 120.0, 800.0))
    line = rng.standard_normal(delay)
    loss = 10 ** (-3 * delay / sampling_rate / rng.uniform(0.4, 2.5))
    periods = []
    for _ in range(-(-samples // delay)):
        periods.append(line)
        line = loss * 0.5 * (line + np.roll(line, 1))
    string = np.concatenate(periods)
    onsets = _onsets(np.full(samples, rng.uniform(1, 4)), sampling_rate)
    return _place(onsets, rng.uniform(0.5, 1.0, size=len(onsets)), string, samples)


def bell(rng: np.random.Generator, samples: int, sampling_rate: int) -> np.ndarray:
    time = np.arange(samples) / sampling_rate
    ratios = BELL_RATIOS * rng.uniform(0.98, 1.02, size=len(BELL_RATIOS))
    frequencies = ratios * _log_uniform(rng, 200.0, 1200.0)
    gains = 10 ** (rng.normal(0, 6, size=len(ratios)) / 20) / np.sqrt(ratios)
    decays = rng.uniform(0.2, 0.8) / np.sqrt(ratios)
    sound = np.zeros(samples)
    for frequency, gain, decay in zip(frequencies, gains, decays):
        if frequency < 0.48 * sampling_rate:
            sound += gain * np.exp(-time / decay) * np.sin(2 * np.pi * frequency * time)
    onsets = _onsets(np.full(samples, rng.uniform(0.5, 3)), sampling_rate)
    return _place(onsets, rng.uniform(0.5, 1.0, size=len(onsets)), sound, samples)


def click_train(rng: np.random.Generator, samples: int, sampling_rate: int) -> np.ndarray:
    onsets = _onsets(np.full(samples, rng.uniform(4, 12)), sampling_rate)
    decay, center = _log_uniform(rng, 0.003, 0.012), _log_uniform(rng, 600.0, 3500.0)
    return _strikes(rng, onsets, decay, center, samples, sampling_rate)


def accelerating_bursts(rng: np.random.Generator, samples: int, sampling_rate: int) -> np.ndarray:
    onsets = _onsets(np.geomspace(rng.uniform(2, 4), rng.uniform(14, 30), samples), sampling_rate)
    decay, center = _log_uniform(rng, 0.015, 0.05), _log_uniform(rng, 200.0, 2000.0)
    return _strikes(rng, onsets, decay, center, samples, sampling_rate)


def rain_ticks(rng: np.random.Generator, samples: int, sampling_rate: int) -> np.ndarray:
    count = int(rng.uniform(15, 40) * samples / sampling_rate)
    onsets = rng.integers(0, samples, size=count)
    decay, center = _log_uniform(rng, 0.003, 0.025), _log_uniform(rng, 600.0, 3500.0)
    return _strikes(rng, onsets, decay, center, samples, sampling_rate)


def noise_sweep(rng: np.random.Generator, samples: int, sampling_rate: int) -> np.ndarray:
    octaves = rng.choice([-1, 1]) * rng.uniform(1.0, 2.5) * np.linspace(-0.5, 0.5, samples)
    center = _log_uniform(rng, 500.0, 2000.0) * 2**octaves
    noise = _band_noise(rng, center, _log_uniform(rng, 100.0, 800.0), sampling_rate)
    return noise * _ramp(samples, rng, sampling_rate)


def growl(rng: np.random.Generator, samples: int, sampling_rate: int) -> np.ndarray:
    """Frequency modulation by an irregular low frequency."""
    time = np.arange(samples) / sampling_rate
    wander = 1 + 0.1 * np.sin(2 * np.pi * rng.uniform(0.5, 3) * time + rng.uniform(0, 2 * np.pi))
    roughness = 2 * np.pi * np.cumsum(rng.uniform(25, 70) * wander) / sampling_rate
    index = rng.uniform(2, 8) * wander
    sound = np.sin(2 * np.pi * _log_uniform(rng, 250.0, 1500.0) * time + index * np.sin(roughness))
    return sound * _ramp(samples, rng, sampling_rate)


def chirping_bird(rng: np.random.Generator, samples: int, sampling_rate: int) -> np.ndarray:
    length = int(rng.uniform(0.05, 0.15) * sampling_rate)
    position = np.linspace(0, 1, length)
    contour = rng.choice([-1, 1]) * rng.uniform(0.4, 1.0) * position + rng.uniform(-0.5, 0.5) * np.sin(
        np.pi * position
    )
    pitch = np.minimum(_log_uniform(rng, 800.0, 4000.0) * 2**contour, 0.48 * sampling_rate)
    chirp = np.sin(2 * np.pi * np.cumsum(pitch) / sampling_rate) * np.sin(np.pi * position)
    onsets = _onsets(np.full(samples, rng.uniform(3, 7)), sampling_rate)
    return _place(onsets, rng.uniform(0.4, 1.0, size=len(onsets)), chirp, samples)


def square_arpeggio(rng: np.random.Generator, samples: int, sampling_rate: int) -> np.ndarray:
    chord = np.array([(0, 4, 7, 12), (0, 3, 7, 12), (0, 5, 9, 12), (0, 4, 8, 12)])[rng.integers(4)]
    beat = (rng.uniform(5, 12) * np.arange(samples) / sampling_rate).astype(np.int64)
    pitch = _log_uniform(rng, 120.0, 600.0) * 2 ** (chord[:: rng.choice([-1, 1])][beat % 4] / 12)
    number = np.arange(1, 40)
    return _oscillator(pitch, (number % 2) / number, sampling_rate) * _ramp(samples, rng, sampling_rate)


def babble(rng: np.random.Generator, samples: int, sampling_rate: int) -> np.ndarray:
    """Syllables of a buzzing voice, each with a random vowel."""
    time = np.arange(samples) / sampling_rate
    drift = rng.uniform(-0.3, 0.3) * np.linspace(0, 1, samples) + 0.05 * np.sin(2 * np.pi * rng.uniform(1, 3) * time)
    pitch = _log_uniform(rng, 90.0, 300.0) * 2**drift
    number = np.arange(1, 60)
    syllable = rng.uniform(2, 5) * time
    sound = np.zeros(samples)
    for beat in range(int(syllable[-1]) + 1):
        formants = FORMANTS[rng.integers(len(FORMANTS))] * rng.uniform(0.85, 1.2)
        distance = (number[:, None] * pitch.mean() - formants) / (0.06 * formants + 40)
        amplitudes = (np.array([1.0, 0.6, 0.3]) / (1 + distance**2)).sum(axis=1)
        envelope = np.clip(1.1 - np.abs(syllable - beat - 0.5) / 0.6, 0, 1)
        sound += _oscillator(pitch, amplitudes, sampling_rate) * envelope
    return sound


# (generator, samples, sampling rate in Hz) -> sound (samples,), at any level
Voice = Callable[[np.random.Generator, int, int], np.ndarray]

CLASSES: dict[str, Voice] = {
    voice.__name__: voice
    for voice in (
        steady_tone,
        rising_glide,
        falling_glide,
        vibrato,
        two_tone_siren,
        tremolo,
        plucked_string,
        bell,
        click_train,
        accelerating_bursts,
        rain_ticks,
        noise_sweep,
        growl,
        chirping_bird,
        square_arpeggio,
        babble,
    )
}


def make_clip(name: str, seed: int, index: int, sampling_rate: int = 16000, seconds: float = 2.0) -> np.ndarray:
    """One clip of a class, a deterministic function of the arguments.

    Returns:
        float32 array (samples,), peak between -20 and -3 dB of full scale.

    Raises:
        ValueError: unknown class, a sampling rate under 8000 Hz or a clip shorter than 1 s.
    """
    if name not in CLASSES:
        raise ValueError(f"expected a class among {', '.join(CLASSES)}, got {name!r}")
    if sampling_rate < 8000 or seconds < 1:
        raise ValueError(f"expected at least 8000 Hz and 1 s, got {sampling_rate} Hz and {seconds} s")
    rng = np.random.default_rng([seed, list(CLASSES).index(name), index])
    samples = round(seconds * sampling_rate)
    length = int(rng.uniform(0.6, 0.95) * samples)
    onset = rng.integers(0, samples - length + 1)

    sound = _tilt(CLASSES[name](rng, length, sampling_rate), sampling_rate, rng.uniform(-2, 2))
    edge = sampling_rate // 200
    sound[:edge] *= np.linspace(0, 1, edge)
    sound[-edge:] *= np.linspace(1, 0, edge)
    noise = _tilt(rng.standard_normal(samples), sampling_rate, rng.uniform(-4, 0))
    signal_to_noise = rng.uniform(12, 30)
    clip = noise / noise.std() * 10 ** (-signal_to_noise / 20)
    clip[onset : onset + length] += sound / sound.std()
    peak = 10 ** (rng.uniform(-20, -3) / 20)
    return (clip * peak / np.abs(clip).max()).astype(np.float32)


def write_sounds(
    folder: str | Path,
    clips_per_class: int = 40,
    seed: int = 0,
    sampling_rate: int = 16000,
    seconds: float = 2.0,
) -> Path:
    """Write `folder/<class>/<class>_0000.flac`, ... (16 bit) and return the folder.

    The folder is replaced atomically. A complete set with the same parameters is kept, any other set of demo sounds is
    replaced.

    Raises:
        ValueError: `clips_per_class` under 1, or a value that `make_clip` rejects.
        FileExistsError: the folder contains files that are not demo sounds.
    """
    if clips_per_class < 1:
        raise ValueError(f"expected at least 1 clip per class, got {clips_per_class}")
    folder = Path(folder).resolve()
    parameters = {
        "classes": list(CLASSES),
        "clips_per_class": clips_per_class,
        "seed": seed,
        "sampling_rate": sampling_rate,
        "seconds": seconds,
        "code": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
    }
    clips = {
        Path(name, f"{name}_{index:04d}.flac"): (name, index) for name in CLASSES for index in range(clips_per_class)
    }
    record, text = folder / PARAMETERS_FILE, json.dumps(parameters, indent=2) + "\n"
    if record.is_file() and record.read_text() == text and all((folder / path).is_file() for path in clips):
        return folder
    _refuse_other_files(folder)

    with whole_folder(folder) as fresh:
        for name in CLASSES:
            (fresh / name).mkdir(parents=True)
        for path, (name, index) in tqdm(clips.items(), desc="demo sounds", unit="clip"):
            clip = make_clip(name, seed, index, sampling_rate, seconds)
            soundfile.write(fresh / path, clip, sampling_rate, subtype="PCM_16")
        (fresh / PARAMETERS_FILE).write_text(text)
    return folder


def _refuse_other_files(folder: Path) -> None:
    """Raise an error if the folder to be replaced contains files other than demo sounds."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"expected a folder for demo sounds, but {folder} is a file")
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    if PARAMETERS_FILE in files:
        files = {name for name in files - {PARAMETERS_FILE} if not re.fullmatch(r"(\w+)/\1_\d+\.flac", name)}
    if files:
        raise FileExistsError(f"expected a new or empty folder or one with demo sounds, but {folder} has {min(files)}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the labelled sounds of the demo, one folder per class.")
    parser.add_argument("folder", type=Path, help="output folder")
    parser.add_argument("--clips_per_class", type=int, default=40, help="clips per class (default: 40)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    parser.add_argument("--sampling_rate", type=int, default=16000, help="sampling rate in Hz (default: 16000)")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of each clip in seconds (default: 2)")
    arguments = parser.parse_args()
    folder = write_sounds(**vars(arguments))
    print(f"{len(CLASSES) * arguments.clips_per_class} clips of {len(CLASSES)} classes in {folder}")


if __name__ == "__main__":
    main()
