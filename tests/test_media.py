"""Files of pictures, sounds and features: what is taken, and what is refused with its name and the reason."""

from __future__ import annotations

import base64
import io
import json
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from safetensors.numpy import save_file
from safetensors.torch import save_file as torch_file

from thinker.modality.media import IMAGE_SUFFIXES, Medium, attachment, medium_of, positions
from thinker.modality.pictures import FORMATS
from thinker.modality.settings import NotInstalled, SensesConfig
from thinker.modality.sounds import log_mel, mel_filters

SENSES = SensesConfig.model_validate(
    {"image": {"kind": "patches", "size": 16, "patch": 4}, "audio": {"kind": "log-mel", "max_seconds": 2}}
)
FEATURES = SensesConfig.model_validate({"image": {"kind": "features", "width": 3}})


def picture(path: Path) -> np.ndarray:
    return Medium("image", path.name, path).prepared(SENSES)


def sound(path: Path) -> np.ndarray:
    return Medium("audio", path.name, path).prepared(SENSES)


def tone(rate: int, seconds: float = 0.5, frequency: float = 440.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(int(rate * seconds)) / rate)


def bomb(width: int, height: int) -> bytes:
    """A PNG that says it is huge, with hardly any data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "1", "CMYK", "I;16"])
def test_every_kind_of_picture_becomes_grey_of_one_size(tmp_path, mode):
    """Catches a mode that comes out black, transposed or of another range; the left half of it is dark."""
    grey = np.full((20, 40), 255, np.uint8)
    grey[:, :20] = 0
    image = Image.fromarray(grey)
    image = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    image.save(path)
    pixels = picture(path)
    assert (pixels.shape, pixels.dtype) == ((16, 16, 1), np.uint8)
    assert pixels[:, :6].max() < 40
    assert pixels[:, 10:].min() > 215


def test_greys_of_any_range_are_spread_and_turned_alike(tmp_path):
    """Catches a range below zero or beyond 16 bits that is cut off, and a turned scan that only 8 bits turn upright."""
    grey = np.add.outer(3 * np.arange(64), np.arange(64)).astype(np.uint8)
    turned = Image.Exif()
    turned[0x112] = 6
    Image.fromarray(grey).save(tmp_path / "x.png", exif=turned)
    upright = picture(tmp_path / "x.png").astype(int)
    for name, values in {
        "half.png": grey.astype(np.uint16) * 257,
        "unit.tif": (grey / 255).astype(np.float32),
        "signed.tif": (grey / 126 - 1).astype(np.float32),
        "below.tif": grey.astype(np.int32) - 128,
        "large.tif": grey.astype(np.int32) * 100_000,
    }.items():
        Image.fromarray(values).save(tmp_path / name, exif=turned)
        spread = picture(tmp_path / name) * (252 / 255 if name in ("signed.tif", "below.tif", "large.tif") else 1)
        np.testing.assert_allclose(spread, upright, atol=1.5, err_msg=name)


def test_the_photo_of_a_camera_with_views_is_the_first(tmp_path):
    """Catches a phone's photo refused as animated for the preview that lies behind it."""
    photo, view = Image.new("RGB", (8, 8), "white"), Image.new("RGB", (4, 4), "black")
    photo.save(tmp_path / "x.jpg", format="MPO", save_all=True, append_images=[view])
    assert picture(tmp_path / "x.jpg").min() > 250


def test_transparency_lies_on_white(tmp_path):
    """Catches a transparent picture whose hidden colour, mostly black, is what the model sees."""
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "x.png")
    assert picture(tmp_path / "x.png").min() == 255


def test_colours_are_kept_where_they_are_asked_for(tmp_path):
    """Catches red and blue exchanged."""
    Image.new("RGB", (8, 8), (200, 100, 50)).save(tmp_path / "x.png")
    config = SensesConfig.model_validate({"image": {"kind": "patches", "size": 4, "patch": 2, "channels": 3}})
    pixels = Medium("image", "x", tmp_path / "x.png").prepared(config)
    assert pixels.reshape(-1, 3).tolist() == [[200, 100, 50]] * 16


def test_pictures_that_are_refused_with_their_name(tmp_path):
    """Catches a decompression bomb that is decoded, an animation taken for its first frame, and errors without name."""
    (tmp_path / "large.png").write_bytes(bomb(10_000, 10_000))
    (tmp_path / "huge.png").write_bytes(bomb(60_000, 60_000))  # Pillow itself refuses to open this one
    (tmp_path / "cut.png").write_bytes(bomb(100, 100))
    (tmp_path / "text.png").write_text("no picture")
    Image.new("L", (4, 4)).save(tmp_path / "program.png", format="EPS")  # PostScript, which Ghostscript would run
    (tmp_path / "empty.png").write_bytes(b"")
    Image.fromarray(np.array([[0.5, np.inf], [np.nan, 0.1]], np.float32)).save(tmp_path / "endless.tif")
    frames = [Image.new("L", (4, 4), shade) for shade in (0, 100, 200)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "pages.tif", save_all=True, append_images=frames[1:2])
    before, width, after = (tmp_path / "pages.tif").read_bytes().rpartition(struct.pack("<HH", 256, 4))
    (tmp_path / "pages.tif").write_bytes(before + b"\0" * len(width) + after)  # for which Pillow has a TypeError
    for name, reason in {
        "large.png": "10000 × 10000 is 100,000,000 pixels, more than the 50,000,000",
        "huge.png": "more than the 50,000,000 pixels",
        "cut.png": "is damaged",
        "pages.tif": "is damaged (Missing dimensions)",
        "text.png": "is no picture that can be read (PNG, ",
        "program.png": "is no picture that can be read (PNG, ",
        "empty.png": "the file is empty",
        "endless.tif": "holds NaN or infinity",
        "moving.gif": "is animated, 3 frames",
        "missing.png": "No such file",
        ".": "is a folder",
    }.items():
        with pytest.raises(ValueError) as caught:
            picture(tmp_path / name)
        assert reason in str(caught.value), name
        assert (tmp_path / name).name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_endings_and_formats_of_pictures_agree():
    """Catches an ending that is taken for a picture's and never opened, and a format that no ending leads to."""
    extensions = Image.registered_extensions()
    assert {extensions[suffix] for suffix in IMAGE_SUFFIXES} == set(FORMATS)


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "PCM_U8", "FLOAT", "DOUBLE"])
@pytest.mark.parametrize("rate", [8000, 44_100])
@pytest.mark.parametrize("channels", [1, 2])
def test_every_kind_of_recording_becomes_the_same_frames(tmp_path, subtype, rate, channels):
    """Catches a rate, a width or a second channel that turns the tone into another one."""
    samples = np.repeat(tone(rate)[:, None], channels, axis=1)
    soundfile.write(tmp_path / "x.wav", samples, rate, subtype=subtype)
    frames = sound(tmp_path / "x.wav")
    assert frames.dtype == np.float32
    assert frames.shape[1] == 40
    assert abs(len(frames) - 51) <= 1
    soundfile.write(tmp_path / "plain.wav", tone(8000), 8000, subtype="DOUBLE")
    middle = slice(5, -6)
    assert (frames[middle].argmax(axis=1) == sound(tmp_path / "plain.wav")[5].argmax()).all()


def test_how_loud_it_is_makes_no_difference_and_silence_is_zero():
    """Catches features that tell a microphone's level, and a division by the deviation of silence."""
    config = SENSES.audio
    np.testing.assert_allclose(log_mel(tone(8000), config), log_mel(0.01 * tone(8000), config), atol=1e-4)
    assert not log_mel(np.zeros(4000), config).any()
    frames = log_mel(tone(8000), config)
    assert abs(frames.mean()) < 1e-4
    assert abs(frames.std() - 1) < 1e-3


def test_levelled_bands_do_not_tell_one_microphone_from_another():
    """Catches means of frames taken for those of bands: an equaliser must make no difference, and a word must."""
    config = SENSES.audio.model_copy(update={"level_bands": True})
    rng = np.random.default_rng(0)
    word = rng.standard_normal(4000) * np.hanning(4000)
    duller = np.convolve(word, [0.5, 0.3, 0.1])[:4000]
    levelled = np.abs(log_mel(word, config) - log_mel(duller, config)).mean()
    assert levelled < 0.2 * np.abs(log_mel(word, SENSES.audio) - log_mel(duller, SENSES.audio)).mean()
    np.testing.assert_allclose(log_mel(word, config).mean(axis=0), 0, atol=1e-5)
    assert log_mel(word, config).std() == pytest.approx(1, abs=1e-3)
    assert not log_mel(np.zeros(4000), config).any()


def test_mel_filters_cover_every_band():
    """Catches a band that is empty where it is narrower than the distance of two frequencies."""
    for rate, size, mels in ((8000, 256, 40), (16_000, 512, 80), (8000, 256, 128)):
        filters = mel_filters(rate, size, mels)
        np.testing.assert_allclose(filters.sum(axis=1), 1)
        assert (np.diff(filters.argmax(axis=1)) >= 0).all()


def test_sounds_that_are_refused_with_their_name(tmp_path):
    """Catches a recording of no length, one of hours that fills the memory, and a file that is none."""
    soundfile.write(tmp_path / "nothing.wav", np.zeros(0), 8000)
    soundfile.write(tmp_path / "long.wav", np.zeros(8000 * 3), 8000)
    soundfile.write(tmp_path / "odd.wav", np.full(800, np.nan, np.float32), 8000, subtype="FLOAT")
    (tmp_path / "text.wav").write_text("no sound at all")
    whole = (tmp_path / "long.wav").read_bytes()
    (tmp_path / "header.wav").write_bytes(whole[:20])
    (tmp_path / "bare.raw").write_bytes(whole[44:])
    for name, reason in {
        "nothing.wav": "a length of zero",
        "long.wav": "lasts 3.0 s, longer than max_seconds 2",
        "odd.wav": "NaN",
        "text.wav": "can't be read as a sound",
        "header.wav": "header.wav",
        "bare.raw": "can't be read as a sound (samplerate",
        "missing.wav": "No such file",
    }.items():
        with pytest.raises(ValueError) as caught:
            sound(tmp_path / name)
        assert reason in str(caught.value), name
        assert name in str(caught.value)


def test_another_rate_needs_a_package(tmp_path, monkeypatch):
    """Catches a traceback where one of the packages for sounds is there and the other one is not."""
    soundfile.write(tmp_path / "x.wav", tone(44_100), 44_100)
    monkeypatch.setitem(sys.modules, "scipy.signal", None)
    with pytest.raises(NotInstalled, match=r"8,000 samples per second need scipy: pip install 'thinker\[senses\]'"):
        sound(tmp_path / "x.wav")


def test_the_longest_recording_has_room(tmp_path):
    """Catches an encoder that is one position short of a recording that is just as long as allowed."""
    soundfile.write(tmp_path / "x.wav", tone(44_100, 0.1199), 44_100)
    config = SensesConfig.model_validate({"audio": {"kind": "log-mel", "max_seconds": 0.1199}})
    frames = Medium("audio", "x.wav", tmp_path / "x.wav").prepared(config)
    assert positions(config, "audio", frames) == config.audio.max_positions


def test_data_uris(tmp_path):
    """Catches a URI whose bytes are not the file's, one that is none, and anything fetched from the network."""
    Image.new("L", (4, 4), 77).save(tmp_path / "x.png")
    data = (tmp_path / "x.png").read_bytes()
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    medium = medium_of({"type": "image", "image": uri})
    assert (medium.prepared(SENSES) == picture(tmp_path / "x.png")).all()
    assert len(medium.name) < 60
    for bad, reason in {
        "data:image/png;base64,???": "is not base64",
        "data:image/png": "comma",
        "data:,": "no bytes",
        "https://example.org/x.png": "nothing is fetched",
        "a\0b.png": r"a\\x00b\.png",
    }.items():
        with pytest.raises(ValueError, match=reason):
            medium_of({"type": "image", "image": bad})


def test_paths_begin_at_the_folder_of_their_file(tmp_path):
    """Catches paths that depend on where the command was started."""
    assert medium_of({"type": "image", "image": "a/x.png"}, tmp_path).path == tmp_path / "a/x.png"
    assert medium_of({"type": "image", "url": str(tmp_path / "y.png")}, Path("z")).path == tmp_path / "y.png"


def test_features_from_elsewhere(tmp_path):
    """Catches a width that is not looked at, a vector taken for n features, a pickle that is opened, and tracebacks."""
    values = np.arange(6, dtype=np.float16).reshape(2, 3)
    np.save(tmp_path / "two.npy", values)
    np.save(tmp_path / "one.npy", values[0])
    np.save(tmp_path / "wide.npy", np.zeros((2, 4)))
    np.save(tmp_path / "nan.npy", np.full((1, 3), np.nan))
    np.save(tmp_path / "large.npy", np.full((1, 3), 1e300))
    np.save(tmp_path / "none.npy", np.zeros((0, 3)))
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    np.savez(tmp_path / "archive.npz", values)
    (tmp_path / "archive.npz").rename(tmp_path / "archive.npy")
    whole = (tmp_path / "two.npy").read_bytes()
    (tmp_path / "torn.npy").write_bytes(whole.replace(b"(2, 3)", b"(2, 3 "))
    with (tmp_path / "lying.npy").open("wb") as file:
        about = {"descr": "<f8", "fortran_order": False, "shape": (10**12, 3)}
        np.lib.format.write_array_header_1_0(file, about)
    save_file({"features": values}, tmp_path / "two.safetensors")
    half = json.dumps({"features": {"dtype": "F4", "shape": [2, 4], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "half.safetensors").write_bytes(struct.pack("<Q", len(half)) + half + bytes(4))
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        torch_file({"features": torch.from_numpy(values).to(dtype)}, tmp_path / f"{dtype}.safetensors")

    def prepared(name: str) -> np.ndarray:
        return Medium("image", name, tmp_path / name).prepared(FEATURES)

    for name in ("two.npy", "two.safetensors", "torch.bfloat16.safetensors", "torch.float8_e4m3fn.safetensors"):
        assert prepared(name).tolist() == values.tolist()
        assert positions(FEATURES, "image", prepared(name)) == 2
    assert prepared("one.npy").shape == (1, 3)
    Image.new("L", (4, 4)).save(tmp_path / "x.png")
    for name, reason in {
        "wide.npy": "features are 4 wide, this model takes 3",
        "nan.npy": "NaN",
        "large.npy": "too large for float32",
        "none.npy": r"features are float64 of shape \(0, 3\)",
        "objects.npy": "can't be read as .npy",
        "archive.npy": "can't be read as .npy",
        "torn.npy": "can't be read as .npy",
        "lying.npy": "can't be read as .npy",
        "half.safetensors": "can't be read as safetensors",
        "x.png": "thinker encode",
    }.items():
        with pytest.raises(ValueError, match=reason):
            prepared(name)
    with pytest.raises(ValueError, match="has an encoder of its own"):
        Medium("image", "two.npy", tmp_path / "two.npy").prepared(SENSES)
    with pytest.raises(ValueError, match="no encoder for audio"):
        Medium("audio", "x.wav", tmp_path / "x.wav").prepared(FEATURES)


def test_an_attachment_is_told_by_its_ending():
    """Catches a sound that is opened as a picture."""
    assert attachment("a/7.PNG") == {"type": "image", "image": "a/7.PNG"}
    assert attachment(Path("five.flac")) == {"type": "audio", "audio": "five.flac"}
    assert attachment("x.audio.npy")["type"] == "audio"
    for bad in ("x.npy", "x.txt", "x"):
        with pytest.raises(ValueError, match=bad):
            attachment(bad)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image": {"kind": "patches", "size": 30, "patch": 8}}, "30 is not divisible by patch 8"),
        ({"image": {"kind": "patches", "width": 127}}, "127 is not divisible"),
        ({"audio": {"kind": "log-mel", "rate": 10}}, "rate"),
        ({"audio": {"kind": "patches"}}, "kind"),
        ({"smell": {}}, "smell"),
    ],
)
def test_senses_that_can_not_be(values: dict[str, Any], message: str):
    """Catches a configuration that fails only when the first picture comes."""
    with pytest.raises(ValueError) as caught:
        SensesConfig.from_mapping(values, "x.json")
    assert message in str(caught.value)
    assert io.StringIO(str(caught.value)).readline() == str(caught.value)
