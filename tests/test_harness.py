"""lm-evaluation-harness on a checkpoint: its own `hf` backend and Thinker's adapter, the same scores."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import randomise, small

from thinker.checkpoint.publish import Publication, write_view
from thinker.model import ThinkerLM
from thinker.tokenizer import Tokenizer

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'thinker[harness]'")
pytestmark = pytest.mark.filterwarnings("default")  # the harness's own dependencies deprecate each other

CORPUS = ["the cat sat on the mat and the dog lay on the rug", "one two three four five six seven"] * 4
QUESTIONS = [
    {"question": "the cat sat on the", "choices": [" mat", " seven"], "gold": 0},
    {"question": "one two three", "choices": [" rug", " four"], "gold": 1},
    {"question": "the dog lay on", "choices": [" the rug", " five six"], "gold": 0},
]
TASK = """
task: small_choices
dataset_path: json
dataset_kwargs:
  data_files: {{test: {path}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: gold
doc_to_choice: "{{{{choices}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small random model with a tokenizer, as a published folder."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer.train(CORPUS, 320)
    config = small("gqa", vocab_size=tokenizer.vocab_size)
    model = randomise(ThinkerLM(config))
    arrays = {name: p.detach().numpy() for name, p in model.named_parameters()}
    about = Publication(bos_id=tokenizer.bos_id, eos_ids=(tokenizer.eos_id,), pad_id=tokenizer.pad_id, add_bos=True)
    write_view(path, 1, config, arrays, about, tokenizer.to_json())
    return path


def requests_of(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, number) for number, args in enumerate(arguments)]


def test_a_task_scores_the_same_in_both_backends(folder, tmp_path, monkeypatch):
    """Bug: bos is missing or doubled, a space is counted to the wrong side, or another folder is evaluated."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    from thinker.harness import ThinkerHarness

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    data = tmp_path / "questions.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in QUESTIONS))
    (tmp_path / "small_choices.yaml").write_text(TASK.format(path=data))
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    seen = []
    for model, arguments in (
        ("hf", {"pretrained": str(folder), "dtype": "float32", "device": "cpu", "add_bos_token": True}),
        (ThinkerHarness(str(folder)), None),
    ):
        done = lm_eval.simple_evaluate(
            model, model_args=arguments, tasks=["small_choices"], task_manager=tasks, bootstrap_iters=0
        )
        samples = sorted(done["samples"]["small_choices"], key=lambda sample: sample["doc_id"])
        assert len(samples) == len(QUESTIONS)
        scores = [[float(choice[0][0]) for choice in sample["resps"]] for sample in samples]
        seen.append((np.array(scores), done["results"]["small_choices"]["acc,none"]))
    assert seen[0][1] == seen[1][1]
    np.testing.assert_allclose(seen[0][0], seen[1][0], rtol=1e-4, atol=1e-4)


def test_likelihoods_are_sums_over_the_continuation(folder):
    """Bug: the first token of the continuation is left out, or the last of the context counted."""
    from thinker import load
    from thinker.harness import ThinkerHarness

    harness, llm = ThinkerHarness(str(folder)), load(folder, "torch")
    (total, greedy), (spaced, _) = harness.loglikelihood(
        requests_of("loglikelihood", ("the cat sat on", " the mat"), ("the cat sat on ", "the mat"))
    )
    ids = list(llm.encode("the cat sat on the mat"))
    first = len(llm.encode("the cat sat on"))
    with torch.no_grad():
        log_p = llm.model(torch.tensor([ids]))[0].log_softmax(-1)
    by_hand = sum(float(log_p[i - 1, ids[i]]) for i in range(first, len(ids)))
    assert total == pytest.approx(by_hand, abs=1e-4)
    assert spaced == total, "a space at the border belongs to the continuation"
    assert greedy == all(int(log_p[i - 1].argmax()) == ids[i] for i in range(first, len(ids)))
    (rolling,) = harness.loglikelihood_rolling(requests_of("loglikelihood_rolling", ("the cat sat on the mat",)))
    assert rolling == pytest.approx(sum(float(log_p[i - 1, ids[i]]) for i in range(1, len(ids))), abs=1e-4)


def test_nothing_and_a_token_across_the_border_can_be_scored(folder):
    """Bug: a border inside a token, an empty continuation or an empty text ends the run in a traceback."""
    from thinker.harness import ThinkerHarness

    harness = ThinkerHarness(str(folder))
    encode = harness.llm.encode
    assert len(encode("the cat")) == 3 < len(encode("the c")), "one token goes across"
    across, same, nothing, less = harness.loglikelihood(
        requests_of("loglikelihood", ("the c", "at"), ("the", " cat"), ("the cat", ""), ("", ""))
    )
    assert across == same, "the token counts whole"
    assert across[0] < 0
    assert nothing == less == (0.0, True)
    assert harness.loglikelihood_rolling(requests_of("loglikelihood_rolling", ("",))) == [0.0]


def test_the_first_token_of_a_model_without_bos_costs_nothing(folder):
    """Bug: a choice of one token, with no context and no bos, ends the run in a traceback."""
    from thinker.harness import ThinkerHarness

    harness = ThinkerHarness(str(folder))
    harness.llm.files = dataclasses.replace(harness.llm.files, bos_id=None, add_bos=False)
    (one, two) = harness.loglikelihood(requests_of("loglikelihood", ("", "a"), ("", "ax")))
    assert one == (0.0, True)
    assert two[0] < 0


def test_more_tokens_wanted_than_the_context_has_leave_the_prompt_its_half(folder, monkeypatch):
    """Bug: with the harness's own 256 tokens every prompt of a model with a short context is cut to its last token."""
    from thinker.harness import ThinkerHarness

    harness, asked = ThinkerHarness(str(folder)), []
    encode, bos = harness.llm.encode, harness.llm.files.bos_id
    monkeypatch.setattr(harness.llm, "generate", lambda context, **o: asked.append((context, o)) or "")
    harness.generate_until(requests_of("generate_until", ("one two three", {"max_gen_toks": 256})))
    context, options = asked[-1]
    assert context == "one two three"
    assert options["max_new_tokens"] == 48 - len(encode(context)), "all the room that there is"
    long = " ".join(CORPUS * 5)
    with pytest.warns(UserWarning, match="1 of 1 requests lost"):
        harness.generate_until(requests_of("generate_until", (long, {"max_gen_toks": 256})))
    context, options = asked[-1]
    assert options["max_new_tokens"] == 24
    assert encode(context) == (bos, *encode(long)[-23:])


def test_what_is_too_long_is_cut_on_the_left_and_counted(folder):
    """Bug: a long context ends the run with an error, or is cut in silence."""
    from thinker.harness import ThinkerHarness

    harness = ThinkerHarness(str(folder))
    long = " ".join(CORPUS * 5)
    with pytest.warns(UserWarning, match="1 of 2 requests lost their beginning to ctx_len 48"):
        (total, _), _ = harness.loglikelihood(requests_of("loglikelihood", (long, " mat"), ("the cat", " sat")))
    assert np.isfinite(total)
    with pytest.warns(UserWarning, match="1 of 1 requests lost") as told:
        (text,) = harness.generate_until(requests_of("generate_until", (long, {"until": [], "max_gen_toks": 5})))
    assert isinstance(text, str)
    assert len(told) == 1, "there is room for all five tokens, bos included"
    assert harness.cut == 2


def test_arguments_and_settings_reach_the_model(folder, monkeypatch):
    """Bug: a misspelt dtype evaluates in another one, and samples are drawn in another way than the task says."""
    from thinker.harness import ThinkerHarness

    with pytest.raises(ValueError, match="dtpye: no such argument of a model"):
        ThinkerHarness(str(folder), dtpye="int8")
    harness, asked = ThinkerHarness(str(folder), batch_size=1, max_batch_size=None, device="cpu"), []
    monkeypatch.setattr(harness.llm, "generate", lambda context, **options: asked.append(options) or "")
    nucleus = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1}
    settings = ({}, nucleus, {"do_sample": True, **nucleus}, {"do_sample": False, "temperature": 0.7})
    harness.generate_until(requests_of("generate_until", *(("one", each) for each in settings)))
    seen = [{name: options[name] for name in nucleus} for options in asked]
    assert seen[0] == {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    assert seen[1] == seen[2] == nucleus
    assert seen[3]["temperature"] == 0.0
