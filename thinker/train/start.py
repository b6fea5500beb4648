"""How a run begins, and how it goes on from its newest state.

A new run decides about the machine (`decide.py`), takes what nobody set from its recipe (`recipes.py`), and records
both; one that goes on has all of it from its state. What a run consists of is in `run.py`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn

from ..checkpoint import training
from ..checkpoint.publish import VIEW, Publication, foreign_weights, holds_weights
from ..config import ThinkerConfig
from ..data.chat_shards import ChatCorpus
from ..data.reading import is_metrics
from ..data.shards import Corpus
from ..fused import kernels
from ..modality.senses import Senses, take_over
from ..modality.settings import SensesConfig
from ..model import ThinkerLM
from ..parameters import load_parameters
from ..tokenizer import Tokenizer
from .allocator import keep_freed_memory
from .config import TrainConfig
from .cooccurrence import begin_from_neighbours
from .decide import (
    Decisions,
    Precision,
    choose_device,
    decide,
    kernels_for,
    missing_compiler,
    own_kernels,
    versions,
    wants_kernels,
    worth_probing,
)
from .ingredients import batches_of, corpus_of, ingredients, satisfies
from .memory import checkpoint_activations
from .optim import Inheritance, build_optimizers, restore_optimizers
from .recipes import Choice, choose, choose_first, with_choices
from .run import Best, Run, Say, TrainingBatches, fingerprint_of, loss_of
from .senses import Trained

# What may be changed when a run goes on: its length, where its text now lies, and what is shown and kept, nothing that
# steers its steps.
FREE_ON_RESUME = {
    *("out", "steps", "minutes", "early_stop", "data", "text"),
    *("validate_every", "save_every", "keep", "prompt", "tensorboard"),
}


def begin(config: ThinkerConfig, settings: TrainConfig, given: set[str], say: Say) -> Run:
    """A new run: its corpus, its model, and what it decides about the machine.

    `given` names the fields that a person set. Raises `ValueError` for what can't be trained, before anything is
    written.
    """
    folder = settings.folder
    fixed = given | config.model_fields_set
    refuse_taken(folder)
    found = ingredients(config, settings, given, say)
    corpus, choices = found.corpus, choose_first(found.config, settings, fixed)
    settings, config = with_choices(settings, found.config, choices)
    torch.manual_seed(settings.seed)
    model = ThinkerLM(config)
    if found.parameters is not None:
        load_parameters(model, found.parameters, str(settings.init))
    device = choose_device(settings.device)
    model.to(device)
    senses = None if found.senses is None else Senses(found.senses, config.d_model).to(device)
    if senses is not None and found.taught is not None:
        take_over(senses, found.taught.config, found.taught.tensors)
    batches = batches_of(corpus, settings, config, say)
    one_row = tuple(torch.from_numpy(part[:1]).to(device) for part in batches.batch(0))
    announce_kernels(settings.precision, device, say)
    decisions = decide(settings, loss_of(model, senses, corpus, settings), one_row, device)
    config, settings, decisions = with_recipe(config, settings, decisions, fixed, choices, batches)
    if config.tie_embeddings != model.config.tie_embeddings:  # chosen with the run's length
        torch.manual_seed(settings.seed)
        model = ThinkerLM(config).to(device)
    set_dropout(model, config)
    for reason in decisions.reasons:
        say(reason)
    if settings.cooccurrence:
        assert isinstance(corpus, Corpus)
        say(f"counting which tokens follow which within {settings.cooccurrence}")
        begin_from_neighbours(model, corpus.train, settings.cooccurrence)
    run = assemble(folder, config, settings, decisions, corpus, model, batches, found.publication, senses)
    training.claim(folder)
    refuse_taken(folder)  # another run may have begun and ended there meanwhile
    return run


def announce_kernels(precision: Precision | Literal["auto"], device: str, say: Say) -> None:
    """Say what is waited for, if kernels have to be compiled before anything is trained."""
    if device == "cpu":
        probed = worth_probing() if precision == "auto" else (precision,)
        if any(wants_kernels(device, one) for one in probed) and kernels.must_compile(kernels.numbers()):
            say("compiling kernels for this processor, some six seconds, once")


def refuse_taken(folder: Path) -> None:
    """Raise `ValueError` if a folder holds what a new run would replace."""
    if training.begun(folder):
        raise ValueError(f"{folder} already holds a run: go on with --resume, or name another folder with --out")
    if holds_weights(folder):
        raise ValueError(f"{folder} already holds a model, which a run would replace: name another folder with --out")
    metrics = folder / "metrics.jsonl"  # which a run that never saved leaves too
    found = [path for path in (folder / name for name in VIEW) if path.exists()]
    if metrics.exists() and metrics.stat().st_size and not is_metrics(metrics):
        found.append(metrics)
    if found:
        raise ValueError(f"{found[0]}: a run would replace it: move it elsewhere, or name another folder with --out")


def with_recipe(
    config: ThinkerConfig,
    settings: TrainConfig,
    decisions: Decisions,
    fixed: set[str],
    choices: list[Choice],
    batches: TrainingBatches,
) -> tuple[ThinkerConfig, TrainConfig, Decisions]:
    """Everything with what is chosen for the run's length, and with the reasons of all choices, the first too.

    `fixed` names what a person set of the architecture.
    """
    steps = expected_steps(settings, decisions)
    chosen = choose(config, settings, fixed, batches.tokens_per_batch, steps, batches.epochs(round(steps)))
    settings, config = with_choices(settings, config, chosen)
    return config, settings, replace(decisions, reasons=(*decisions.reasons, *map(str, [*choices, *chosen])))


def expected_steps(settings: TrainConfig, decisions: Decisions) -> float:
    """The run's steps: as set, or what its time allows at the speed that was probed."""
    steps, seconds = settings.limit
    if seconds is None:
        return float(steps or 0)
    return max(1.0, seconds / decisions.seconds_per_step * decisions.compiled_gain)


def check_prompt(prompt: str, corpus: Corpus | ChatCorpus, ctx_len: int) -> None:
    """Raise `ValueError` if the samples along the way can't go on from it: then none shall be waited for."""
    if isinstance(corpus, ChatCorpus):
        length = len(corpus.chat_format.encode([{"role": "user", "content": prompt}]))
    else:
        length = len(corpus.tokenizer.encode(prompt)) + (corpus.tokenizer.bos_id is not None)
    if length >= ctx_len:
        raise ValueError(f"prompt: has {length} tokens, which leaves no room in ctx_len {ctx_len}: shorten it")


def set_dropout(model: ThinkerLM, config: ThinkerConfig) -> None:
    """Give a model the dropout of a configuration that is otherwise its own: it is chosen after the probe."""
    model.config = config
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = config.dropout


def resume(wanted: ThinkerConfig, settings: TrainConfig, given: set[str], say: Say) -> Run:
    """Go on from the newest complete state in the run's folder, with its own settings and decisions.

    Raises `ValueError` when there is none, when a setting is given that would steer its steps, or its text has changed.
    """
    folder = settings.folder
    if training.begun(folder):
        training.claim(folder)  # before looking: the process that trains there now may be about to save
    newest = training.latest(folder)
    if newest is None:
        taken = training.begun(folder) or holds_weights(folder)
        remedy = "begin anew in another folder with --out" if taken else "leave out --resume to start there"
        raise ValueError(f"{folder} holds no {'whole ' if taken else ''}state to go on from: {remedy}")
    if (foreign := foreign_weights(folder)) is not None:
        raise ValueError(f"{foreign}: was not written by Thinker and stays: move it elsewhere to go on here")
    saved = training.load(newest)
    config, state = saved.config, saved.state
    old = TrainConfig.model_validate(state["settings"])
    for name in sorted(given - FREE_ON_RESUME):
        had, asked = (config, wanted) if name in ThinkerConfig.model_fields else (old, settings)
        if not satisfies(name, getattr(asked, name), getattr(had, name)):
            raise ValueError(
                f"{folder}: {name} is {getattr(had, name)!r} in this run and can't be changed with --resume: drop it"
            )
    changes = {name: getattr(settings, name) for name in given & FREE_ON_RESUME & set(TrainConfig.model_fields)}
    if {"steps", "minutes"} & changes.keys():
        changes = {"steps": None, "minutes": None} | changes
    settings = old.changed(**changes | {"out": folder})
    if saved.tokenizer_json is None:
        raise ValueError(f"{newest}: has no tokenizer.json: take an older state, by removing this one")
    tokenizer = Tokenizer.from_json(saved.tokenizer_json)
    publication = Publication.from_json(state["publication"], str(newest))
    seeing = None
    if saved.modality is not None:
        seeing = SensesConfig.from_mapping(state["senses"], str(newest))
    corpus = corpus_of(settings, config, tokenizer, publication, say, seeing)
    decisions = Decisions.from_json(state["decisions"])
    began = decisions.versions
    announce_kernels(decisions.precision, decisions.device, say)
    here = versions() | {"kernels": kernels_for(decisions.device, decisions.precision)}
    # An older state doesn't say which kernels there were.
    if other := [f"{name} {now}, not {began[name]}" for name, now in here.items() if now != began.get(name, now)]:
        say(f"here steps may round differently than where the run began: {', '.join(other)}")
    if wants_kernels(decisions.device, decisions.precision) and here["kernels"] != began.get("kernels"):
        say(own_kernels(config, decisions.compile))
    torch.set_num_threads(decisions.threads)
    model = ThinkerLM(config)
    load_parameters(model, saved.parameters, str(newest))
    model.to(decisions.device)
    batches = batches_of(corpus, settings, config, say)
    if fingerprint_of(corpus, batches) != state["corpus"]:
        names = ", ".join((*settings.data, *settings.text))
        raise ValueError(f"{folder}: the text of {names} has changed since: begin a new run with --out")
    senses = None
    if seeing is not None and saved.modality is not None:
        senses = Senses(seeing, config.d_model)
        load_parameters(senses, saved.modality, str(newest))
        senses.to(decisions.device)
    run = assemble(folder, config, settings, decisions, corpus, model, batches, publication, senses)
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in saved.optimizer.items()}
    restore_optimizers(run.trained, run.optimizers, tensors)
    run.scaler.load_state_dict(state["scaler"])
    run.step = run.saved = saved.step
    run.tokens, run.seconds = state["tokens"], state["seconds"]
    run.best = Best(**state["best"]) if state.get("best") is not None else None
    if decisions.compile and run.progress() < 1 and (missing := missing_compiler(decisions.device)) is not None:
        raise ValueError(f"{folder}: its steps are compiled, but {missing}: install one, or name it in CXX")
    say(f"going on from step {run.step:,}")
    return run


def assemble(
    folder: Path,
    config: ThinkerConfig,
    settings: TrainConfig,
    decisions: Decisions,
    corpus: Corpus | ChatCorpus,
    model: ThinkerLM,
    batches: TrainingBatches,
    publication: Publication,
    senses: Senses | None = None,
) -> Run:
    """A run at step 0 from its parts."""
    keep_freed_memory()
    if settings.prompt is not None:
        check_prompt(settings.prompt, corpus, config.ctx_len)
    if settings.checkpoint_activations:
        checkpoint_activations(model)
    if senses is not None and senses.config.freeze_thinker:
        model.requires_grad_(False)
    inheritance = None
    if settings.inherit:
        parts = np.full((config.vocab_size, 2), -1)
        parts[: corpus.tokenizer.vocab_size] = corpus.tokenizer.parts()
        inheritance = Inheritance(parts, settings.inherit, decisions.device)
    optimizers = build_optimizers(
        model if senses is None else Trained(model, senses),
        optimizer=settings.optimizer,
        lr=settings.lr,
        muon_lr=settings.muon_lr,
        weight_decay=settings.weight_decay,
        betas=(settings.beta1, settings.adam_beta2(batches.tokens_per_batch)),
        muon_dtype=torch.bfloat16 if decisions.precision == "bfloat16" else torch.float32,
        inheritance=inheritance,
    )
    scaler = torch.amp.GradScaler(torch.device(decisions.device).type, enabled=decisions.precision == "float16")
    return Run(folder, config, settings, decisions, corpus, model, optimizers, batches, scaler, publication, senses)
