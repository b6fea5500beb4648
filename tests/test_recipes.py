"""Recipes: what is chosen, that a person's choice stays, and that going on repeats it."""

import json

import pytest
import torch
from test_loop import ARCHITECTURE, Silent, quiet

from thinker.checkpoint import training
from thinker.config import ThinkerConfig
from thinker.train.config import TrainConfig, read_settings
from thinker.train.decide import repeatable
from thinker.train.loop import fit
from thinker.train.recipes import CHOSEN, DECAY, choose, choose_first, rounded, with_choices
from thinker.train.start import begin, resume

TINY = ThinkerConfig()


def chosen(config=TINY, settings=None, given=(), steps=1000.0, epochs=0.5):
    settings = settings or TrainConfig()
    choices = choose(config, settings, set(given), settings.batch_size * config.ctx_len, steps, epochs)
    return {name: value for choice in choices for name, value in choice.values.items()}


def test_what_a_person_set_stays():
    """Bug: a recipe overrides a flag, or a value that happens to equal the default counts as unset."""
    settings = TrainConfig(lr=3e-3, schedule="cosine", warmup=0.0, early_stop=0, beta2=0.9, batch_size=8)
    assert choose_first(TINY, settings, {"use_qk_norm"}) == []
    left = chosen(settings=settings, given={"dropout"}, epochs=9.0)
    of_tokens = {"inherit": 0.5, "cooccurrence": 3, "tie_embeddings": True}
    assert left == {"muon_lr": 1e-2, "weight_decay": 0.6, "average": 0.13} | of_tokens
    assert "weight_decay" not in chosen(settings=TrainConfig(weight_decay=0.0), epochs=9.0)
    assert "beta2_tokens" not in chosen(settings=TrainConfig(beta2_tokens=9.0))


def test_rows_follow_the_width():
    """Bug: rows without regard to the context, so that a short one makes steps of a few hundred tokens."""

    def rows(config):
        return choose_first(config, TrainConfig(), set())[-1].values

    assert rows(TINY) == {"batch_size": 4}
    mixed = TrainConfig(chat=True, text=("book.txt",), text_share=0.1)
    assert choose_first(TINY, mixed, set())[-1].values == {"batch_size": 10}, "a row of text among conversations"
    assert rows(TINY.changed(d_model=512, ctx_len=256)) == {"batch_size": 16}
    assert rows(TINY.changed(ctx_len=1 << 16)) == {"batch_size": 2}


def test_a_new_network_has_qk_norm_where_other_programs_know_it():
    """Bug: the recipe's best part is left to who knows the flag, or given to a trained model that has none."""

    def first(config=TINY, settings=None, given=()):
        return {n: v for c in choose_first(config, settings or TrainConfig(), set(given)) for n, v in c.values.items()}

    assert first()["use_qk_norm"] is first(TINY.changed(use_moe=True))["use_qk_norm"] is True
    assert "use_qk_norm" not in first(given={"use_qk_norm"}), "a person's word stays"
    assert "use_qk_norm" not in first(settings=TrainConfig(init="somewhere"))
    assert "use_qk_norm" not in first(TINY.changed(use_swiglu=False)), "no other program has the plain MLP with it"


def test_dropout_that_costs_bits_is_said():
    """Bug: the tiny configuration's own dropout wastes a short run without a word, or is taken away from who set it."""
    config = TINY.changed(dropout=0.1)
    lines = [str(choice) for choice in choose(config, TrainConfig(), {"dropout"}, 4096, 100.0, 0.5)]
    assert lines[-1] == "dropout is set to 0.1, though at 0.50 epochs 0 learns more"
    assert "dropout" not in chosen(config, given={"dropout"})
    assert not any("learns more" in str(c) for c in choose(config, TrainConfig(), {"dropout"}, 4096, 100.0, 5.0))


@pytest.mark.parametrize(("epochs", "dropout", "early_stop"), [(0.4, 0, 0), (3, 0, 2), (6, 0.1, 2), (30, 0.2, 2)])
def test_dropout_and_protection_follow_the_epochs(epochs, dropout, early_stop):
    """Bug: dropout costs a run whose text is all new, or text that is seen thirty times is learned by heart."""
    values = chosen(epochs=epochs)
    assert (values["dropout"], values["early_stop"]) == (dropout, early_stop)


def test_embedding_and_head_are_one_where_a_new_models_text_repeats():
    """Bug: a person's two matrices become one, or keep the rate of one."""
    values = chosen(epochs=6.0)
    assert (values["tie_embeddings"], values["lr"]) == (True, 8e-3)
    apart = chosen(epochs=6.0, given={"tie_embeddings"})
    assert ("tie_embeddings" in apart, apart["lr"]) == (False, 5e-3)
    together = chosen(TINY.changed(tie_embeddings=True), epochs=6.0, given={"tie_embeddings"})
    assert ("tie_embeddings" in together, together["lr"]) == (False, 8e-3)
    assert "tie_embeddings" not in chosen(epochs=3.0)
    for other in ({"init": "somewhere"}, {"chat": True}, {"tokenizer": "char"}):
        assert "tie_embeddings" not in chosen(settings=TrainConfig(**other), epochs=6.0)


def test_weights_are_averaged_where_a_new_models_text_repeats():
    """Bug: a run on new text lags behind itself, or one that goes on from a model forgets what was asked of it."""
    assert chosen(epochs=6.0)["average"] == 0.13
    assert "average" not in chosen(epochs=3.0)
    for other in ({"init": "somewhere"}, {"chat": True}, {"average": 0.0}):
        assert "average" not in chosen(settings=TrainConfig(**other), epochs=6.0)
    with pytest.raises(ValueError, match=r"average 0\.1 is for texts alone: drop average, or chat"):
        TrainConfig(chat=True, average=0.1)


def test_decay_adds_up_to_the_same_where_text_repeats():
    """Bug: a decay that wears a long run away, or what a trained model knows, and does nothing in a short run."""

    def decay(**of_run):
        return chosen(epochs=of_run.pop("epochs", 9.0), steps=of_run.pop("steps", 1000.0), **of_run)["weight_decay"]

    for steps in (100, 1000, 100_000):
        assert decay(steps=steps) * 1e-2 * steps / 2 == pytest.approx(DECAY, rel=0.02)
    assert decay(settings=TrainConfig(muon_lr=5e-3)) == decay(steps=500.0) == 2 * decay(), "by the person's rate"
    assert decay(settings=TrainConfig(optimizer="adamw")) * 2e-3 * 1000 / 2 == pytest.approx(DECAY, rel=0.02)
    assert decay(epochs=3.0) == decay(settings=TrainConfig(init="somewhere")) == 0
    assert decay(steps=2.0) * 1e-2 == pytest.approx(0.1), "a weight must not change its sign"


def test_adamw_goes_slower_where_weights_decay():
    """Bug: an embedding that outgrows what decay keeps of it, or that is held back where all text is new."""
    assert [chosen(epochs=epochs)["lr"] for epochs in (0.4, 3.9, 4.0, 30.0)] == [1.2e-2, 1.2e-2, 8e-3, 8e-3]
    assert chosen(epochs=0.4, settings=TrainConfig(chat=True))["lr"] == 3e-3, "as conversations were measured"


def test_tokens_inherit_and_know_their_neighbours_in_a_new_model():
    """Bug: a trained model's rows move with each other, or letters, which have no parts, are told that they inherit."""
    assert (chosen()["inherit"], chosen()["cooccurrence"]) == (0.5, 3)
    for settings in (TrainConfig(init="somewhere"), TrainConfig(tokenizer="char")):
        assert not {"inherit", "cooccurrence"} & chosen(settings=settings).keys()
    assert "cooccurrence" not in chosen(settings=TrainConfig(chat=True)), "of conversations only replies are learned"


def test_a_trained_model_gets_lower_rates():
    """Bug: fine-tuning at the rates of a new model forgets what the model knew."""
    new, tuned = chosen(), chosen(settings=TrainConfig(init="somewhere"))
    assert (tuned["lr"], tuned["muon_lr"]) == (3e-4, 1e-3), "a tenth of those that the sweep of fine-tuning began with"
    assert chosen(TINY.changed(d_model=1024))["lr"] < new["lr"]
    assert "muon_lr" not in chosen(settings=TrainConfig(optimizer="adamw"))


def test_large_steps_keep_a_beta2_of_095():
    """Bug: a half-life in tokens that a large step outlives several times over, so that Adam remembers nothing."""
    for tokens, beta2 in ((768, 0.990), (4096, 0.95), (1 << 20, 0.95)):
        values = {c: v for one in choose(TINY, TrainConfig(), set(), tokens, 10.0, 0.1) for c, v in one.values.items()}
        assert TrainConfig(beta2_tokens=values["beta2_tokens"]).adam_beta2(tokens) == pytest.approx(beta2, abs=2e-3)


def test_all_that_is_chosen_is_known_to_be():
    """Catches a default in the help that no run has."""
    choices = [*choose_first(TINY, TrainConfig(), set()), *choose(TINY, TrainConfig(), set(), 4096, 1000.0, 5.0)]
    assert {name for choice in choices for name in choice.values} == CHOSEN


def test_every_choice_has_a_reason_in_one_line():
    """Bug: a setting that changes without a word."""
    lines = [str(choice) for choice in choose(TINY, TrainConfig(), set(), 4096, 1000.0, 5.0)]
    assert all(": " in line and "\n" not in line for line in lines)
    assert any("short of data" in line and "5.0 times" in line for line in lines)


def test_settings_and_architecture_are_told_apart():
    """Bug: dropout, which is of the architecture, is looked for among the run's settings."""
    settings, config = with_choices(TrainConfig(steps=3), TINY, choose(TINY, TrainConfig(), set(), 4096, 9.0, 5.0))
    assert (settings.steps, settings.early_stop, config.dropout) == (3, 2, 0.1)
    assert config.changed(dropout=TINY.dropout, tie_embeddings=False) == TINY
    assert rounded(0.0021213) == 0.0021


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setenv("THINKER_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "words.txt"
    path.write_text("\n".join(f"line {n % 17} has {n % 5} words" for n in range(900)))
    return path


def test_a_run_takes_its_recipe_says_it_and_repeats_it_on_resuming(text, tmp_path):
    """Bug: the recipe is printed and not followed, or a resumed run takes another one than it began with."""
    architecture = ThinkerConfig(vocab_size=300, n_layers=1, d_model=32, n_heads=2, d_ff=64, ctx_len=32)
    settings = TrainConfig(data=(str(text),), out=tmp_path / "run", steps=120, precision="float32", compile="off")
    said = []
    with repeatable(None):
        run = begin(architecture, settings, set(), said.append)
    assert run.settings.batch_size == 8
    assert run.config.dropout == 0.1, "the text is seen several times"
    assert run.config.tie_embeddings
    assert run.model.head.weight is run.model.tok_emb.weight
    assert run.model.config == run.config
    assert run.model.blocks[0].dropout.p == run.model.dropout.p == run.model.config.dropout == 0.1
    assert any(line.startswith("dropout 0.1: short of data") for line in said)
    assert said[-1] == "counting which tokens follow which within 3"
    lines = {line for line in said[1:-1] if not line.startswith("compiling kernels")}  # on the first day
    assert lines <= set(run.decisions.reasons), "but for what was found in the text"
    assert run.optimizers[0].param_groups[0]["peak_lr"] == run.settings.muon_lr
    with repeatable(None):
        fit(run, Silent())
        longer = resume(architecture, settings.changed(steps=9999), {"steps"}, quiet)
    assert longer.settings == run.settings.changed(steps=9999)
    assert longer.config == run.config
    state = json.loads((training.latest(tmp_path / "run") / "state.json").read_text())
    assert state["settings"]["early_stop"] == 2


def test_dropout_in_the_configuration_stays(text, tmp_path):
    """Bug: a configuration file's dropout, or a flag's, is replaced by the recipe's."""
    path = tmp_path / "run.json"
    path.write_text('{"dropout": 0.3, "n_layers": 1, "d_model": 32, "n_heads": 2, "d_ff": 64, "ctx_len": 32}')
    flags = {"data": (str(text),), "out": tmp_path / "run", "steps": 3, "precision": "float32", "compile": "off"}
    config, settings, given = read_settings(path, flags | {"vocab_size": 300})
    with repeatable(None):
        run = begin(config, settings, given, quiet)
    assert run.config.dropout == run.model.dropout.p == 0.3
    assert ARCHITECTURE.dropout == 0.1
    assert torch.is_grad_enabled()


def test_a_model_of_the_best_recipe_has_the_same_loss_in_transformers(text, tmp_path):
    """Bug: what the recipe relies on (QK-norm, a best state other than the last) is lost on publishing."""
    import transformers

    architecture = ThinkerConfig(vocab_size=300, n_layers=2, d_model=32, n_heads=2, d_ff=64, ctx_len=32)
    settings = TrainConfig(data=(str(text),), out=tmp_path / "run", steps=120, precision="float32", compile="off")
    with repeatable(None):
        run = begin(architecture, settings, set(), quiet)
        fit(run, Silent())
        run.take_published(quiet)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(run.folder, dtype=torch.float32)
    assert type(theirs).__name__ == "Qwen3ForCausalLM"
    rows = run.corpus.windows(32)[range(8)]
    inputs, targets = (torch.from_numpy(part) for part in rows)
    with torch.no_grad():
        parts = run.module.eval()(inputs, targets)
        logits = theirs.eval()(inputs).logits
    ours = float(parts.total / parts.tokens)
    assert ours < 3, "it has learned something"
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert float(loss) == pytest.approx(ours, abs=1e-5 * float(logits.abs().max()))


@pytest.mark.parametrize(("precision", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_muon_computes_in_what_the_probe_found_fast(text, tmp_path, precision, dtype):
    """Bug: Muon orthogonalises in bfloat16 on a processor that has to emulate it, several times slower."""
    architecture = ThinkerConfig(vocab_size=300, n_layers=1, d_model=32, n_heads=2, d_ff=64, ctx_len=32)
    settings = TrainConfig(data=(str(text),), out=tmp_path / "run", steps=2, precision=precision, compile="off")
    with repeatable(None):
        run = begin(architecture, settings, set(), quiet)
    assert run.optimizers[0].dtype == dtype
