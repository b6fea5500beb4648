"""Encoders and projectors: each medium alone as in company, every place seen by every other, changes that repeat."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import randomise

from thinker.modality.audio import SoundEncoder
from thinker.modality.augment import DRAWS, changed_pictures, changed_sounds
from thinker.modality.projector import Projector
from thinker.modality.senses import HEARD_AT_ONCE, Senses, alike, take_over
from thinker.modality.settings import PictureConfig, ProjectorConfig, SensesConfig, SoundConfig
from thinker.modality.vision import PictureEncoder
from thinker.model import Block
from thinker.parameters import load_parameters

PICTURE = PictureConfig.model_validate({"width": 16, "size": 12, "patch": 4, "channels": 3, "heads": 2})
SOUND = SoundConfig.model_validate({"width": 24, "mels": 10, "heads": 2, "max_seconds": 1})
RNG = np.random.default_rng(0)


def senses(**fields: Any) -> Senses:
    torch.manual_seed(0)
    image = {"kind": "patches", "width": 16, "size": 12, "patch": 4, "heads": 2}
    audio = {"kind": "log-mel", "width": 24, "mels": 10, "heads": 2}
    return Senses(SensesConfig.model_validate({"image": image, "audio": audio} | fields), d_model=20)


def test_widths_are_those_of_the_issue():
    """Catches defaults that drift: vision is 128 wide, audio 192."""
    made = SensesConfig.model_validate({"image": {"kind": "patches"}, "audio": {"kind": "log-mel"}})
    built = Senses(made, d_model=64)
    assert built.of("image").encode([np.zeros((32, 32, 1), np.uint8)]).shape == (16, 128)
    assert built.of("audio").encode([np.zeros((50, 40), np.float32)]).shape == (13, 192)
    assert all(block.attn.causal is False for block in built.modules() if isinstance(block, Block))


@pytest.mark.parametrize(
    ("field", "value", "prepared"), [("level_bands", True, True), ("mels", 20, True), ("layers", 3, False)]
)
def test_media_are_prepared_again_when_they_would_become_something_else(field, value, prepared):
    """Catches a setting of the frames that finds those of another setting in the cache."""
    one, other = (
        SensesConfig.model_validate({"audio": {"kind": "log-mel"} | fields}) for fields in ({}, {field: value})
    )
    assert (one.preparation() != other.preparation()) is prepared


def test_features_of_another_width_are_looked_at_again():
    """Catches a width of the pictures' features that is lost beside that of the sounds'."""
    made = [
        SensesConfig.model_validate({kind: {"kind": "features", "width": width} for kind, width in widths.items()})
        for widths in ({"image": 8, "audio": 6}, {"image": 7, "audio": 6}, {"image": 8, "audio": 5}, {"image": 6})
    ]
    keys = [str(one.preparation()) for one in made]
    assert len(set(keys)) == len(keys)


def test_patches_stand_in_reading_order():
    """Catches rows and columns exchanged: the patch that changes must be the one in that place."""
    encoder = randomise(PictureEncoder(PICTURE).double())
    seen: list[torch.Tensor] = []
    encoder.embed.register_forward_hook(lambda _module, _given, made: seen.append(made))
    black, dotted = torch.zeros(1, 12, 12, 3), torch.zeros(1, 12, 12, 3)
    dotted[0, 1, 9] = 255  # first row of patches, last column
    encoder(black), encoder(dotted)
    assert (seen[0] != seen[1]).any(dim=-1)[0].nonzero().flatten().tolist() == [2]


def test_every_place_sees_every_other():
    """Catches an encoder that is causal: the first features then know nothing of the rest."""
    picture = randomise(PictureEncoder(PICTURE).double())
    pixels = torch.rand(1, 12, 12, 3).double() * 255
    changed = pixels.clone()
    changed[0, -1, -1] = 0
    assert (picture(pixels)[0, 0] != picture(changed)[0, 0]).any()
    sound, lengths = randomise(SoundEncoder(SOUND).double()), torch.tensor([32])
    frames = torch.randn(1, 32, 10).double()
    other = frames.clone()
    other[0, -1] = 0
    assert (sound(frames, lengths)[0][0, 0] != sound(other, lengths)[0][0, 0]).any()


def test_a_recording_gives_the_same_alone_and_beside_longer_ones():
    """Catches padding that is heard: through the convolutions' borders, or by attention."""
    encoder = randomise(SoundEncoder(SOUND).double())
    parts = [torch.randn(length, 10).double() for length in (1, 5, 17, 33, 40)]
    batch = torch.zeros(len(parts), 40, 10).double()
    for row, part in enumerate(parts):
        batch[row, : len(part)] = part
    together, real = encoder(batch, torch.tensor([len(part) for part in parts]))
    for row, part in enumerate(parts):
        alone, all_real = encoder(part[None], torch.tensor([len(part)]))
        assert all_real.all()
        assert alone.shape[1] == real[row].sum() == -(-len(part) // 4)
        torch.testing.assert_close(together[row][real[row]], alone[0], rtol=0, atol=1e-12)


def test_media_of_a_batch_come_one_after_the_other():
    """Catches features, or changes, of two recordings mixed when they are encoded in groups of like length."""
    sense = randomise(senses().double()).of("audio")
    lengths = RNG.integers(1, 90, size=2 * HEARD_AT_ONCE + 3).tolist()
    media = [RNG.normal(size=(length, 10)).astype(np.float32) for length in lengths]
    assert sorted(i for some in alike(media) for i in some) == list(range(len(media)))
    drawn = RNG.random((len(media), DRAWS), dtype=np.float32)
    with torch.no_grad():
        whole = sense(media)
        torch.testing.assert_close(whole, torch.cat([sense([one]) for one in media]), rtol=0, atol=1e-6)
        alone = [sense([one], draws[None]) for one, draws in zip(media, drawn, strict=True)]
        # Where a frame falls between two is rounded by the batch's length.
        torch.testing.assert_close(sense(media, drawn), torch.cat(alone), rtol=1e-3, atol=1e-3)


def test_sizes_that_do_not_fit_are_refused_with_both_numbers():
    """Catches a picture of another size that is reshaped into something, and a recording beyond the bound."""
    with pytest.raises(ValueError, match=r"\(12, 10, 3\), the encoder takes \(12, 12, 3\)"):
        PictureEncoder(PICTURE)(torch.zeros(1, 12, 10, 3))
    encoder = SoundEncoder(SOUND)
    with pytest.raises(ValueError, match="9 mel bands, the encoder takes 10"):
        encoder(torch.zeros(1, 8, 9), torch.tensor([8]))
    with pytest.raises(ValueError, match="30 positions of sound exceed the 26 of max_seconds 1"):
        encoder(torch.zeros(1, 120, 10), torch.tensor([120]))


@pytest.mark.parametrize(("kind", "matrices"), [("linear", 1), ("mlp", 2)])
def test_projectors(kind, matrices):
    """Catches an activation that is missing between two layers, which would make them one."""
    torch.manual_seed(0)
    projector = Projector(ProjectorConfig.model_validate({"kind": kind}), 7, 20)
    assert sum(parameter.dim() == 2 for parameter in projector.parameters()) == matrices
    x = torch.randn(5, 7)
    assert projector(x).shape == (5, 20)
    assert not any("bias" in name for name, _ in projector.named_parameters())
    # Both are blind to the scale of features; the linear one also commutes with their sign.
    torch.testing.assert_close(projector(1000 * x), projector(x), rtol=1e-4, atol=1e-4)
    assert torch.allclose(projector(-x), -projector(x)) == (kind == "linear")


def test_what_is_frozen_has_no_gradient():
    """Catches a frozen part that learns, and one that keeps what is before it from learning."""
    made = senses(
        image={"kind": "patches", "width": 16, "size": 12, "patch": 4, "heads": 2, "projector": {"frozen": True}},
        audio={"kind": "log-mel", "width": 24, "mels": 10, "heads": 2, "frozen": True},
    )
    randomise(made).train()
    made.of("image")([np.zeros((12, 12, 1), np.uint8)]).sum().backward()
    made.of("audio")([np.ones((9, 10), np.float32)]).sum().backward()
    learns = {name.rpartition(".")[0] for name, p in made.named_parameters() if p.grad is not None}
    assert any(name.startswith("image.encoder") for name in learns)
    assert any(name.startswith("audio.projector") for name in learns)
    assert not any(name.startswith(("image.projector", "audio.encoder")) for name in learns)


def test_changes_are_a_function_of_their_draws():
    """Catches a change that depends on the neighbours in the batch, or on nothing."""
    pixels = torch.from_numpy(RNG.integers(0, 256, (3, 12, 12, 1), dtype=np.uint8))
    frames, lengths = torch.randn(3, 30, 10), torch.tensor([30, 17, 8])
    draws = torch.from_numpy(RNG.random((3, DRAWS), dtype=np.float32))
    pictures, sounds = changed_pictures(pixels, draws), changed_sounds(frames, lengths, draws)
    for row in range(3):
        one = slice(row, row + 1)
        assert torch.equal(changed_pictures(pixels[one], draws[one])[0], pictures[row])
        assert torch.equal(changed_sounds(frames[one], lengths[one], draws[one])[0], sounds[row])
        assert not sounds[row, int(lengths[row]) :].any()
    assert (changed_pictures(pixels, draws.flip(0)) != pictures).any()
    still = torch.full((3, DRAWS), 0.5)
    assert (changed_pictures(pixels, still) - pixels).abs().max() < 0.01
    assert pictures.min() >= 0
    assert pictures.max() <= 255.01


def test_tensors_are_copied_whole_or_not_at_all():
    """Catches a file of other senses that is half taken."""
    one, other = randomise(senses()), randomise(senses(), seed=1)
    tensors = {name: p.detach().numpy().copy() for name, p in one.named_parameters()}
    load_parameters(other, tensors, "x")
    assert all((p.detach().numpy() == tensors[name]).all() for name, p in other.named_parameters())
    with pytest.raises(ValueError, match="x: has other parameters than the model, 1 of them"):
        load_parameters(other, {name: v for name, v in tensors.items() if name != "image.encoder.position"}, "x")


def test_a_sense_of_the_same_build_is_taken_over():
    """Catches a fine-tuning that begins with fresh encoders, or takes over those of another build."""
    one = randomise(senses())
    tensors = {name: p.detach().numpy().copy() for name, p in one.named_parameters()}
    wider = {"kind": "log-mel", "width": 48, "mels": 10, "heads": 2}
    other = senses(audio=wider)
    before = other.of("audio").projector.out.weight.clone()
    take_over(other, one.config, tensors)
    assert (other.of("image").projector.out.weight.detach().numpy() == tensors["image.projector.out.weight"]).all()
    assert torch.equal(other.of("audio").projector.out.weight, before)
