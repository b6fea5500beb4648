"""A recording's file to log-mel frames: decoding by soundfile, other rates by scipy, the spectrogram by numpy.

Stereo becomes mono, every rate becomes the config's; any format that libsndfile reads will do. The length is bounded
before anything is decoded. Everything learned is in `audio.py`.
"""

# N samples, F frames, M mel bands

from __future__ import annotations

import functools
import math
from typing import BinaryIO

import numpy as np

from .settings import NotInstalled, SoundConfig

RANGE = 6.0  # powers of ten below the loudest that still count


def read_sound(file: BinaryIO, name: str, config: SoundConfig) -> np.ndarray:
    """The log-mel frames of a recording, float32 (F, M). Raises `ValueError` with the name and the reason."""
    samples, rate = read_samples(file, name, config)
    return log_mel(resampled(samples, rate, config.rate), config)


def read_samples(file: BinaryIO, name: str, config: SoundConfig) -> tuple[np.ndarray, int]:
    """Mono samples float32 (N,), full scale ±1, and the file's own rate. Raises `ValueError` as `read_sound`."""
    try:
        import soundfile
    except ImportError:
        raise NotInstalled("sounds", "soundfile") from None
    try:
        with soundfile.SoundFile(file) as sound:
            seconds = sound.frames / sound.samplerate
            if sound.frames <= 0:
                raise ValueError(f"{name}: has no samples, a length of zero")
            if seconds > config.max_seconds:
                raise ValueError(
                    f"{name}: lasts {seconds:.1f} s, longer than max_seconds {config.max_seconds:g}: cut it"
                )
            if not 1000 <= sound.samplerate <= 400_000:
                raise ValueError(f"{name}: {sound.samplerate} samples per second, expected 1,000 to 400,000")
            samples = sound.read(dtype="float32", always_2d=True)
            rate = int(sound.samplerate)
    except Exception as error:  # of a damaged file, or one without a header, it may raise whatever it likes
        if isinstance(error, ValueError) and str(error).startswith(name):
            raise
        said = error.error_string if isinstance(error, soundfile.LibsndfileError) else error
        raise ValueError(f"{name}: can't be read as a sound ({' '.join(str(said).split())})") from None
    if len(samples) == 0:
        raise ValueError(f"{name}: has no samples, though its header says otherwise")
    mono = samples.mean(axis=1)
    if not np.isfinite(mono).all():
        raise ValueError(f"{name}: holds NaN or infinity")
    return mono, rate


def resampled(samples: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """Samples (N,) at another rate, through scipy's polyphase filter."""
    if rate == wanted:
        return samples
    try:
        from scipy.signal import resample_poly
    except ImportError:
        raise NotInstalled(f"sounds of other than {wanted:,} samples per second", "scipy") from None
    common = math.gcd(rate, wanted)
    return resample_poly(samples, wanted // common, rate // common).astype(np.float32)


def log_mel(samples: np.ndarray, config: SoundConfig) -> np.ndarray:
    """The log-mel spectrogram of samples (N,), float32 (F, M), F = 1 + N // hop; mean 0, deviation 1 over all of it.

    So how loud a recording is makes no difference; silence is all zeros. With `level_bands` each band has mean 0
    (cepstral mean normalisation, Atal 1974, in the log spectrum), so that voices and microphones differ less.
    """
    window, hop = config.window, config.hop
    padded = np.pad(samples.astype(np.float64), (window // 2, window))
    count = 1 + len(samples) // hop
    frames = np.lib.stride_tricks.sliding_window_view(padded, window)[::hop][:count]
    size = 1 << (window - 1).bit_length()
    power = np.abs(np.fft.rfft(frames * np.hanning(window), size)) ** 2
    mel = power @ mel_filters(config.rate, size, config.mels).T
    logs = np.log10(np.maximum(mel, 1e-12))
    logs = np.maximum(logs, logs.max() - RANGE)
    if config.level_bands:
        logs = logs - logs.mean(axis=0)
    deviation = logs.std()
    return ((logs - logs.mean()) / deviation if deviation > 1e-6 else np.zeros_like(logs)).astype(np.float32)


@functools.lru_cache(maxsize=8)
def mel_filters(rate: int, size: int, mels: int) -> np.ndarray:
    """Triangles evenly spaced on the mel scale 2595 log10(1 + f / 700), float64 (M, size // 2 + 1), each of sum 1.

    A triangle narrower than the distance of two frequencies takes the nearest one.
    """
    top = 2595 * math.log10(1 + rate / 2 / 700)
    corners = 700 * (10 ** (np.linspace(0, top, mels + 2) / 2595) - 1)
    frequencies = np.fft.rfftfreq(size, 1 / rate)
    left, middle, right = (corners[i : mels + i, None] for i in range(3))
    filters = np.minimum((frequencies - left) / (middle - left), (right - frequencies) / (right - middle)).clip(0)
    empty = filters.sum(axis=1) == 0
    filters[empty, np.abs(frequencies - middle).argmin(axis=1)[empty]] = 1.0
    return filters / filters.sum(axis=1, keepdims=True)
