"""Recipes: what a run's unset settings become, from the model's size, the amount of text and the budget.

What a person set, in a file or by a flag, stays. Each choice comes with its reason in one line. The numbers come from
the sweeps in `benchmarks/learning/`, whose results say how far they reach: models of 0.8 to 7 million parameters,
minutes on a processor. What is chosen is recorded with the run, and going on repeats it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..config import ThinkerConfig
from ..formats.huggingface_config import expressible, family_of
from .config import BETA2_TOKENS, TrainConfig

# More tokens a step mean fewer steps, and steps are what a short run lacks: in the sweeps fewer rows were worth more
# than any rate. Fewer tokens than some 6 times d_model a step, and Muon's update takes a good part of the time.
TOKENS_PER_WIDTH = 8
WIDTH_OF_RATES = 256  # the d_model that AdamW's rate below was found at
FROM_NOTHING = {"lr": 5e-3, "muon_lr": 1e-2, "adamw_lr": 2e-3}
# AdamW's beside Muon on texts that don't repeat. Where they do, weights decay, and the rate bounds how large the
# embedding and the head become: there the lower one is ahead.
LR_ON_NEW_TEXT = 1.2e-2
LR_TIED = 8e-3  # where they do, if embedding and head are one
LR_OF_CONVERSATIONS = 3e-3  # with pictures and sounds, at which new voices were heard better than at 5e-3
# A tenth of rates that new models had; three tenths learned more of the new text (0.14 nats) and forgot more (0.15).
FINE_TUNING = {"lr": 3e-4, "muon_lr": 1e-3, "adamw_lr": 2e-4}
SHORT_OF_DATA = 4.0  # epochs from which on there is dropout, and weights decay: at 3 dropout cost, at 12 both helped
PLENTY_OF_REPETITION = 12.0
# What the rate times the weight decay adds up to over a run whose text repeats: the weights at the end are a mean over
# so many times less than the whole run (arXiv 2405.13698), and such runs want more than is usual (arXiv 2509.14786).
DECAY = 3.0
MOST_DECAY = 0.1  # of a weight in one step, which only runs of a few steps come to
AVERAGE = 0.13  # of such a run is what the weights shown are a mean over: 1 % fewer bits, on new text none
INHERIT = 0.5  # of its parts' rows in a merged token's: a few per cent fewer bits, most where steps are few
COOCCURRENCE = 3  # tokens ahead that are counted before the first step: 1 was behind, 6 the same, 12 behind
PATIENCE = 2  # of 12 looks: in the sweeps more never found a better state, less a worse one once
# All that is chosen here, for who wants to say that it is.
CHOSEN = frozenset(
    "use_qk_norm batch_size lr muon_lr schedule warmup weight_decay inherit cooccurrence tie_embeddings beta2_tokens "
    "dropout early_stop average".split()
)


@dataclass(frozen=True)
class Choice:
    """Settings chosen together, and why in one line; or, without settings, advice."""

    values: Mapping[str, Any]
    reason: str

    def __str__(self) -> str:
        chosen = ", ".join(f"{name} {_shown(value)}" for name, value in self.values.items())
        return f"{chosen}: {self.reason}" if chosen else self.reason


def choose_first(config: ThinkerConfig, settings: TrainConfig, given: set[str]) -> list[Choice]:
    """What the network is made with, and rows of a batch, before anything is known of the machine.

    `given` names what a person set of the architecture.
    """
    choices = []
    normed = config.changed(use_qk_norm=True)
    if settings.init is None and "use_qk_norm" not in given and expressible(normed) is None:
        classes = f"{family_of(normed).class_name} and not {family_of(config).class_name}"
        why = f"learns more from the same text; the model is a {classes}"
        choices.append(Choice({"use_qk_norm": True}, why))
    if not settings.model_fields_set & {"batch_size", "accumulate"}:
        rows = max(2, round(TOKENS_PER_WIDTH * config.d_model / config.ctx_len))
        if settings.text:  # which needs a row, and conversations another
            rows = max(rows, math.ceil(1 / min(settings.text_share, 1 - settings.text_share)))
        why = f"{rows * config.ctx_len:,} tokens a step, few enough for many steps, enough to repay Muon's update"
        choices.append(Choice({"batch_size": rows}, why))
    return choices


def choose(
    config: ThinkerConfig, settings: TrainConfig, given: set[str], tokens_per_step: int, steps: float, epochs: float
) -> list[Choice]:
    """Everything else, when rows and expected length are known. `given` names what a person set of the architecture."""
    new_on_texts = settings.init is None and not settings.chat
    tie = new_on_texts and settings.tokenizer != "char" and ties(epochs)
    tied = config.tie_embeddings or (tie and "tie_embeddings" not in given)
    rates = _rates(config, settings, epochs, tied)
    choices = [
        rates,
        Choice({"schedule": "linear"}, "to zero at the end, so that longer runs lose nothing"),
        Choice({"warmup": 0.02}, f"{max(1, round(0.02 * steps)):,} of some {steps:,.0f} steps"),
        _decay(settings, rates, steps, epochs),
    ]
    if settings.init is None and settings.tokenizer != "char":
        choices.append(Choice({"inherit": INHERIT}, "what a token learns, tokens that contain it learn in part"))
        if new_on_texts:
            why = "which tokens follow which is counted at once, instead of learned step by step"
            choices.append(Choice({"cooccurrence": COOCCURRENCE}, why))
    if tie:
        choices.append(Choice({"tie_embeddings": True}, "one row for a token, read or written: less to learn by heart"))
    if settings.beta2 is None:
        half_life = max(BETA2_TOKENS, 13.5 * tokens_per_step)
        beta2 = settings.changed(beta2_tokens=half_life).adam_beta2(tokens_per_step)
        choices.append(Choice({"beta2_tokens": half_life}, f"β2 {beta2:.3f} at {tokens_per_step:,} tokens a step"))
    choices += [_dropout(epochs), _protection(epochs)]
    if new_on_texts and (average := average_for(epochs)):
        why = "held-out text is predicted better by a mean over the weights of the last part than by the last"
        choices.append(Choice({"average": average}, why))
    kept = []
    for choice in choices:
        free = {name: value for name, value in choice.values.items() if name not in settings.model_fields_set | given}
        if free:
            kept.append(Choice(free, choice.reason))
    better = dropout_for(epochs)
    if "dropout" in given and config.dropout > better:
        why = f"dropout is set to {config.dropout:g}, though at {epochs:.2f} epochs {better:g} learns more"
        kept.append(Choice({}, why))
    return kept


def with_choices(
    settings: TrainConfig, config: ThinkerConfig, choices: Iterable[Choice]
) -> tuple[TrainConfig, ThinkerConfig]:
    """The settings and the architecture with what was chosen."""
    values = {name: value for choice in choices for name, value in choice.values.items()}
    of_run = {name: value for name, value in values.items() if name in TrainConfig.model_fields}
    return settings.changed(**of_run), config.changed(**{name: values[name] for name in values.keys() - of_run.keys()})


def _rates(config: ThinkerConfig, settings: TrainConfig, epochs: float, tied: bool) -> Choice:
    """Peak learning rates."""
    narrow = (WIDTH_OF_RATES / max(config.d_model, WIDTH_OF_RATES)) ** 0.5
    if settings.init is not None:
        rates, why = FINE_TUNING, "low, for a model that knows something already"
    else:
        why = f"from nothing, at d_model {config.d_model}"
        rates = FROM_NOTHING | {"lr": LR_OF_CONVERSATIONS if settings.chat else lr_for(epochs, tied)}
    if settings.optimizer == "adamw":
        return Choice({"lr": rounded(narrow * rates["adamw_lr"])}, why)
    return Choice({"lr": rounded(narrow * rates["lr"]), "muon_lr": rates["muon_lr"]}, why)


def lr_for(epochs: float, tied: bool = False) -> float:
    """AdamW's peak rate beside Muon on texts, for a new model as wide as `WIDTH_OF_RATES`."""
    if epochs < SHORT_OF_DATA:
        return LR_ON_NEW_TEXT
    return LR_TIED if tied else FROM_NOTHING["lr"]


def ties(epochs: float) -> bool:
    """Whether a token shall have one row in the embedding and the head: where text repeats."""
    return epochs >= SHORT_OF_DATA


def decay_for(epochs: float, rate: float, steps: float) -> float:
    """Weight decay: none for text that is seen a few times. `rate` is the peak for the hidden matrices."""
    return 0.0 if epochs < SHORT_OF_DATA else rounded(min(DECAY / summed(rate, steps), MOST_DECAY / rate))


def summed(rate: float, steps: float) -> float:
    """The rates of all steps together, when they fall from `rate` to zero in a line."""
    return rate * steps / 2


def _decay(settings: TrainConfig, rates: Choice, steps: float, epochs: float) -> Choice:
    if settings.init is not None:
        return Choice({"weight_decay": 0.0}, "it would wear away what the model knows")
    if epochs < SHORT_OF_DATA:
        return Choice({"weight_decay": 0.0}, "none for text that is seen so seldom")
    name = "muon_lr" if settings.optimizer == "muon" else "lr"
    rate = getattr(settings, name) if name in settings.model_fields_set else rates.values[name]
    why = f"text that is seen {epochs:.1f} times is learned by heart less"
    return Choice({"weight_decay": decay_for(epochs, rate, steps)}, why)


def average_for(epochs: float) -> float:
    """The share of the run that weights are averaged over: none for text that is seen a few times."""
    return 0.0 if epochs < SHORT_OF_DATA else AVERAGE


def dropout_for(epochs: float) -> float:
    """None for text that is seen a few times, more the oftener it is seen."""
    if epochs < SHORT_OF_DATA:
        return 0.0
    return 0.1 if epochs < PLENTY_OF_REPETITION else 0.2


def _dropout(epochs: float) -> Choice:
    if epochs < SHORT_OF_DATA:
        why = f"{epochs:.2f} epochs: text that is seen so seldom isn't learned by heart"
    else:
        why = f"short of data: the text will be seen {epochs:.1f} times; more text helps most"
    return Choice({"dropout": dropout_for(epochs)}, why)


def _protection(epochs: float) -> Choice:
    if epochs < 1:
        return Choice({"early_stop": 0}, "off: all text is new, so the last state is the best")
    why = f"ends after {PATIENCE} of 12 looks without a better held-out loss, and publishes the best state"
    return Choice({"early_stop": PATIENCE}, why)


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def rounded(value: float) -> float:
    """Two digits: more would pretend to more than is known."""
    return float(f"{value:.2g}")
