"""llama.cpp in a process of its own, which a crash of it then ends in place of ours.

    python llamacpp.py FILE ANSWERS < REQUEST

This file is both sides: `ask` is for our process, and starts the file as a program that imports nothing of Thinker.
"""

# T tokens, V vocabulary

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

CONTEXT = 256  # the least that llama.cpp takes, and more than is asked here; a model's own may need gigabytes


@dataclass(frozen=True)
class Answers:
    """What llama.cpp makes of what it was asked."""

    texts: list[list[int]]  # the tokens of each text
    logits: np.ndarray  # (T, V)
    written: list[int]  # the likeliest continuation of the prompt


def ask(path: Path, texts: Sequence[str], tokens: list[int], prompt: list[int], room: int) -> Answers:
    """Ask about a GGUF file. Raises `RuntimeError` with llama.cpp's last words when it doesn't live to answer."""
    request = json.dumps({"texts": texts, "tokens": tokens, "prompt": prompt, "room": room})
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "answers.npz"
        # -P: no file beside this one may stand in for a package.
        command = [sys.executable, "-P", __file__, str(path), str(kept)]
        done = subprocess.run(command, input=request, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode < 0:
            raise RuntimeError(f"llama.cpp was ended by {signal.Signals(-done.returncode).name}")
        if done.returncode or not kept.exists():
            words = done.stderr.strip().splitlines() or ["it said nothing"]
            raise RuntimeError(f"llama.cpp failed: {words[-1]}")
        with np.load(kept) as answers:
            cuts = np.cumsum(answers["lengths"])[:-1]
            found = [part.tolist() for part in np.split(answers["texts"], cuts)]
            return Answers(found, answers["logits"], answers["written"].tolist())


def main() -> None:
    """The other side. Keys and values are float32, not llama.cpp's own choice of float16."""
    import llama_cpp

    path, kept = sys.argv[1:]
    request = json.load(sys.stdin)
    tokens, prompt, room = request["tokens"], request["prompt"], request["room"]
    llama = llama_cpp.Llama(
        path,
        n_ctx=CONTEXT,
        n_batch=len(tokens),
        n_ubatch=len(tokens),
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        logits_all=True,
        verbose=False,
    )
    texts = [llama.tokenize(text.encode(), add_bos=False, special=False) for text in request["texts"]]
    llama.eval(tokens)
    logits = np.array(llama.scores[: len(tokens)])
    llama.reset()
    written: list[int] = []
    for token in llama.generate(prompt, temp=0.0):
        written.append(token)
        if len(written) == room:
            break
    lengths, flat = [len(ids) for ids in texts], [token for ids in texts for token in ids]
    np.savez(kept, texts=np.array(flat, np.int64), lengths=lengths, logits=logits, written=written)


if __name__ == "__main__":
    main()
