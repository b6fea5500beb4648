"""For a new task, change the head: which module of the standard library does a line of code come from?

    python examples/classify.py                              a small fresh model, trained whole
    python examples/classify.py --model runs/demo --freeze   a trained body, of which only the new head learns

The task needs no download. For one of your own replace `lines_by_class`: the rest takes any texts and classes.
"""

# B batch, T tokens, D d_model, C classes

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from thinker import ThinkerConfig, ThinkerLM, Tokenizer, load

MODULES = ("argparse", "difflib", "statistics", "tarfile", "turtle")


class Classifier(nn.Module):
    """A language model's body with a head of its own on the mean of its features."""

    def __init__(self, model: ThinkerLM, tokenizer: Tokenizer, classes: list[str]) -> None:
        super().__init__()
        self.model, self.tokenizer, self.classes = model, tokenizer, classes
        self.head = nn.Linear(model.config.d_model, len(classes))

    def forward(self, texts: list[str]) -> Tensor:
        """A score of each text for each class, (B, C)."""
        rows = [self.tokenizer.encode(text)[: self.model.config.ctx_len] for text in texts]
        padding = [max(map(len, rows)) - len(row) for row in rows]  # stands on the left
        tokens = torch.tensor([[0] * pad + row for pad, row in zip(padding, rows, strict=True)])  # (B, T)
        mask = torch.tensor([[0] * pad + [1] * len(row) for pad, row in zip(padding, rows, strict=True)])
        hidden = self.model.features(tokens, attention_mask=mask)  # (B, T, D)
        return self.head((hidden * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True))

    @torch.no_grad()
    def predict(self, texts: list[str]) -> list[str]:
        """The class of each text."""
        return [self.classes[best] for best in self(texts).argmax(dim=-1)]


def lines_by_class(per_class: int) -> list[tuple[str, str]]:
    """(line, module), shuffled: as many from each module, and only lines that no other module has.

    Raises `ValueError` with both numbers where a module has fewer.
    """
    draws, pairs = random.Random(0), []
    sources = {name: Path(importlib.util.find_spec(name).origin).read_text(encoding="utf-8") for name in MODULES}
    lines = {name: {line.strip() for line in text.splitlines() if len(line) > 30} for name, text in sources.items()}
    for name in MODULES:
        own = lines[name].difference(*(lines[other] for other in MODULES if other != name))
        if len(own) < per_class:
            raise ValueError(f"{name} has {len(own):,} lines of its own, fewer than the {per_class:,} asked for")
        pairs += [(line, name) for line in draws.sample(sorted(own), per_class)]
    draws.shuffle(pairs)
    return pairs


def train(classifier: Classifier, pairs: list[tuple[str, str]], freeze: bool, epochs: int = 6) -> None:
    """With freeze only the head learns, otherwise the body too."""
    classifier.model.requires_grad_(not freeze).train(not freeze)  # a frozen body has no use for dropout
    optimizer = torch.optim.AdamW((classifier.head if freeze else classifier).parameters(), lr=1e-2 if freeze else 1e-3)
    for epoch in range(epochs):
        order = random.Random(epoch).sample(pairs, len(pairs))
        for start in range(0, len(order), 32):
            texts, names = zip(*order[start : start + 32], strict=True)
            labels = torch.tensor([classifier.classes.index(name) for name in names])
            loss = F.cross_entropy(classifier(list(texts)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1} of {epochs}: loss {loss.item():.3f} in its last batch")


def save(classifier: Classifier, folder: Path) -> None:
    """Head and body, and what it takes to make them anew."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: p.detach() for name, p in classifier.named_parameters()}, folder / "classifier.safetensors")
    plan = {"classes": classifier.classes, "config": classifier.model.config.model_dump()}
    (folder / "classifier.json").write_text(json.dumps(plan))
    (folder / "tokenizer.json").write_text(classifier.tokenizer.to_json())


@torch.no_grad()
def reload(folder: Path) -> Classifier:
    """A saved classifier, ready to predict."""
    plan = json.loads((folder / "classifier.json").read_text())
    tokenizer = Tokenizer.from_file(folder / "tokenizer.json")
    classifier = Classifier(ThinkerLM(ThinkerConfig(**plan["config"])), tokenizer, plan["classes"])
    for name, tensor in load_file(folder / "classifier.safetensors").items():
        classifier.get_parameter(name).copy_(tensor)
    return classifier.eval()


def main(model: str = "", out: Path = Path("runs/classifier"), freeze: bool = False, lines: int = 400) -> Classifier:
    """Train on `lines` of each module, save, reload, and say how many unseen lines find their module."""
    torch.manual_seed(0)
    unseen, seen = (pairs := lines_by_class(lines))[:lines], pairs[lines:]
    if model:
        body, tokenizer = (llm := load(model)).model, llm.tokenizer
    else:
        tokenizer = Tokenizer.train((line for line, _ in seen), vocab_size=1000)
        body = ThinkerLM(ThinkerConfig(vocab_size=tokenizer.vocab_size, n_layers=2, d_model=128, d_ff=256))
    classifier = Classifier(body, tokenizer, list(MODULES))
    train(classifier, seen, freeze)
    classifier.eval()
    save(classifier, out)
    guesses = reload(out).predict([line for line, _ in unseen])
    right = sum(guess == name for guess, (_, name) in zip(guesses, unseen, strict=True)) / lines
    print(f"{right:.0%} of {lines} unseen lines found their module, {1 / len(MODULES):.0%} would by chance: {out}")
    return classifier


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
