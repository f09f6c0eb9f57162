"""A base with an adapter answers lmms-eval's requests as the model itself does.

What is served is tested anywhere. What lmms-eval makes of it needs lmms-eval, which has an
environment of its own: `.ci/run` makes it.
"""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastalign as fa

pytest.importorskip("transformers")
from _processors import PROCESSORS
from PIL import Image

from fastalign.adapters import disabled
from fastalign.demo.base import BASE, build_processor, load_base
from fastalign.demo.scenes import COLOURS, scenes
from fastalign.integrations._answers import (
    Prompt,
    Responder,
    batches,
    cut,
    generation_options,
    question,
)
from fastalign.testing.families import family

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")
INSTALLED = importlib.util.find_spec("lmms_eval") is not None
needs_lmms_eval = pytest.mark.skipif(
    not INSTALLED, reason="lmms-eval is not installed: it has an environment of its own"
)
CAPTION = "this is a picture of"
GREEDY = {"max_new_tokens": 12, "do_sample": False}


def picture(i=0):
    return Image.fromarray(scenes(i + 1, seed=5, split="heldout").images[i])


def responder(dtype=torch.float64, **options):
    return Responder(load_base(dtype=dtype), build_processor(), **options)


def randomised(model, layers=(2, 3)):
    """An adapter that is far from the identity."""
    adapter = fa.attach(model, fa.AdapterConfig(shift_layers=layers, calibration=True))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.add_(0.3 * noise / max(1, parameter[0].numel()) ** 0.5)
    return model


def alone(model, text, images, **options):
    """What the model itself generates, through transformers alone."""
    processor = build_processor()
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": text}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    inputs = processor(text=[prompt], images=images or None, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    if images:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    with torch.no_grad():
        out = model.generate(**inputs, **options)
    new = out[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(new, skip_special_tokens=True)


# -- prompts -------------------------------------------------------------------------------------


def test_images_come_first_or_where_the_marks_are():
    a, b = picture(0), picture(1)
    image = {"type": "image"}
    (turn,) = question("which ?", [a, b]).messages
    assert turn == {"role": "user", "content": [image, image, {"type": "text", "text": "which ?"}]}
    (turn,) = question("<image>left <image>right", [a, b]).messages
    texts = [{"type": "text", "text": text} for text in ("left ", "right")]
    assert turn["content"] == [image, texts[0], image, texts[1]]
    assert question("text alone").messages[0]["content"] == [{"type": "text", "text": "text alone"}]


def test_marks_must_be_as_many_as_images():
    with pytest.raises(ValueError, match="one <image> for each image, or none: got 2 and 1"):
        question("<image><image>", [picture()])
    with pytest.raises(ValueError, match="got 0 images and 1 parts"):
        Prompt(({"role": "user", "content": [{"type": "image"}]},))


def test_a_system_prompt_comes_first_unless_the_task_has_one():
    asked = responder(system_prompt="red ")
    assert asked.render(question("blue")) == "<bos>red blue"
    turns = [("system", "green "), ("user", "blue")]
    own = tuple({"role": r, "content": [{"type": "text", "text": t}]} for r, t in turns)
    assert asked.render(Prompt(own)) == "<bos>green blue"


def test_a_processor_without_a_template_gets_the_plain_one():
    processor = build_processor()
    processor.chat_template = None
    asked = Responder(load_base(), processor)
    assert asked.render(question("on the", [picture()])) == "<image>on the"


# -- settings of a task --------------------------------------------------------------------------

KNOWN = ("max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "num_beams")


@pytest.mark.parametrize(
    ("given", "samples"),
    [
        ({}, False),
        ({"temperature": 0}, False),
        ({"temperature": 0.2}, True),
        ({"temperature": 0.2, "do_sample": False}, False),
        ({"temperature": 0, "do_sample": True}, False),
        ({"do_sample": True}, True),
    ],
)
def test_sampling_follows_do_sample_then_the_temperature(given, samples):
    made, unknown = generation_options({**given, "top_p": 0.9}, KNOWN)
    assert made["do_sample"] is samples and not unknown
    assert made["top_p"] == (0.9 if samples else None)
    assert (made["max_new_tokens"], made["num_beams"]) == (1024, 1)


def test_settings_of_other_models_are_left_out_by_name():
    made, unknown = generation_options(
        {"image_aspect_ratio": "pad", "until": ["a"], "top_k": None, "max_new_tokens": 3}, KNOWN
    )
    assert unknown == {"image_aspect_ratio"} and made["max_new_tokens"] == 3
    assert "image_aspect_ratio" not in made and "until" not in made
    assert responder().unknown_options({**GREEDY, "num_beams": 2, "fps": 1}) == {"fps"}


def test_an_answer_ends_at_the_first_of_its_ends():
    assert cut("one red cat on the left", [" on", " red"]) == "one"
    assert cut("one red cat", "cat") == "one red "
    assert cut("one red cat", ["", "dog"]) == "one red cat"
    assert cut("one", None) == "one"


def test_batches_hold_equal_settings_the_longest_first():
    found = list(batches(["a", "b", "a", "a", "b"], [1, 2, 3, 2, 9], 2))
    assert found == [[2, 3], [0], [4, 1]]


# -- answers -------------------------------------------------------------------------------------


def test_prompts_are_padded_on_the_left():
    asked = responder()
    prompts = [question(CAPTION, [picture(0)]), question("here on the", [picture(1)])]
    batch = asked.batch(prompts)
    # <bos>, 64 image tokens and the words: 5 and 3.
    assert batch["attention_mask"].sum(1).tolist() == [70, 68]
    assert batch["attention_mask"][1].tolist() == [0, 0] + [1] * 68
    assert batch["input_ids"][1, :3].tolist() == [0, 0, 1]
    assert batch["pixel_values"].dtype == torch.float64
    single = asked.batch(prompts[1:])
    assert torch.equal(batch["input_ids"][1:, 2:], single["input_ids"])
    assert torch.equal(batch["pixel_values"][1:], single["pixel_values"])
    with pytest.raises(ValueError, match="must all have images, or all have none"):
        asked.batch([question("one"), prompts[0]])


def test_a_tokenizer_that_begins_with_bos_does_so_once():
    for name in ("paligemma", "blip2", "llava"):
        asked = Responder(family(name), PROCESSORS[name]())
        bos = asked.processor.tokenizer.bos_token_id
        batch = asked.batch([question("w20 w21", [Image.new("RGB", (16, 16))])])
        assert (batch["input_ids"] == bos).sum() == 1, name


@pytest.mark.parametrize("beams", [1, 2])
def test_a_mixed_batch_answers_as_the_model_does_alone(beams):
    asked = responder()
    randomised(asked.model)
    asks = [
        (CAPTION, [picture(0)]),
        ("one", []),
        ("here on the left side", [picture(1)]),
        (CAPTION, [picture(2), picture(3)]),
        ("against sky", []),
    ]
    options = {**GREEDY, "num_beams": beams}
    answers = asked.answer([question(*ask) for ask in asks], options)
    expected = [alone(asked.model, *ask, **options) for ask in asks]
    assert [answer.text for answer in answers] == expected
    assert len(set(expected)) > 2 and all(expected)
    # <bos>, 64 tokens an image, and the words.
    assert [answer.input_tokens for answer in answers] == [70, 2, 70, 134, 3]


def test_until_and_max_length_end_an_answer():
    asked = responder()
    prompt = question(CAPTION, [picture()])
    (whole,) = asked.answer([prompt], GREEDY)
    (ended,) = asked.answer([prompt], {**GREEDY, "until": [" on"]})
    assert " on" in whole.text and ended.text == whole.text.split(" on")[0]
    asked.max_length = 73
    (short,) = asked.answer([prompt], GREEDY)
    assert short.output_tokens == 3 and short.text == " ".join(whole.text.split()[:3])
    asked.max_length = 70
    with pytest.raises(ValueError, match="got a prompt of 70 tokens and max_length=70; raise"):
        asked.answer([prompt], GREEDY)
    with pytest.raises(ValueError, match="max_length must be at least 2 or None: got 1"):
        responder(max_length=1)


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_an_adapter_is_the_same_with_and_without_the_cache(beams):
    # After the first step the cache hands the model one new token and no pixels.
    model = randomised(load_base(dtype=torch.float64))
    batch = Responder(model, build_processor()).batch(
        [question(CAPTION, [picture(0)]), question("here on the", [picture(1)])]
    )
    options = {**GREEDY, "num_beams": beams, "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad():
        cached = model.generate(**batch, **options, use_cache=True)
        again = model.generate(**batch, **options, use_cache=False)
    assert torch.equal(cached.sequences, again.sequences)
    for a, b in zip(cached.logits, again.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    fa.detach(model)
    with torch.no_grad():
        base = model.generate(**batch, **GREEDY)
    assert base.shape != cached.sequences.shape or not torch.equal(base, cached.sequences)


# -- likelihoods ---------------------------------------------------------------------------------


def test_a_model_that_knows_nothing_gives_every_token_the_same():
    asked = responder()
    with torch.no_grad():
        asked.model.get_output_embeddings().weight.zero_()  # tied: every logit is 0
    vocabulary = asked.model.config.text_config.vocab_size
    mean, greedy = asked.score(question(CAPTION, [picture()]), " one red")
    assert mean == pytest.approx(-math.log(vocabulary), abs=1e-6) and not greedy


def test_a_score_is_the_mean_over_the_continuation_alone():
    asked = responder()
    prompt = question(CAPTION, [picture()])
    (answer,) = asked.answer([prompt], {"max_new_tokens": 3, "do_sample": False})
    mean, greedy = asked.score(prompt, " " + answer.text)
    assert greedy
    words = asked.processor.tokenizer(answer.text)["input_ids"]
    assert len(words) == 3
    batch = asked.batch([prompt])
    ids = torch.cat([batch["input_ids"], torch.tensor([words])], 1)
    with torch.no_grad():
        out = asked.model(input_ids=ids, pixel_values=batch["pixel_values"])
    table = out.logits[0].log_softmax(-1)
    by_hand = [table[-4, words[0]], table[-3, words[1]], table[-2, words[2]]]
    assert mean == pytest.approx(float(sum(by_hand)) / 3, abs=1e-6)
    other, likeliest = asked.score(prompt, " three purple umbrella")
    assert other < mean and not likeliest
    with pytest.raises(ValueError, match="a continuation must have a token: got ''"):
        asked.score(prompt, "")


# -- the families --------------------------------------------------------------------------------

SERVED = sorted(PROCESSORS.keys() - {"mllama"})


@pytest.mark.parametrize("name", SERVED)
def test_every_family_answers_a_batch_as_one_by_one(name):
    asked = Responder(family(name, dtype=torch.float64), PROCESSORS[name]())
    prompts = [
        question(text, [Image.new("RGB", size, "red")])
        for text, size in (("w20 w30", (20, 16)), ("w21 w30 w31", (40, 24)))
    ]
    options = {"max_new_tokens": 4, "do_sample": False}
    together = asked.answer(prompts, options)
    one_by_one = [asked.answer([prompt], options)[0] for prompt in prompts]
    assert together == one_by_one and all(answer.output_tokens for answer in together)


@pytest.mark.parametrize("name", SERVED)
def test_every_family_generates_with_an_adapter_as_without_the_cache(name):
    model = randomised(family(name, dtype=torch.float64), layers=(1,))
    prompt = question("w20 w30", [Image.effect_noise((20, 16), 80)])
    batch = Responder(model, PROCESSORS[name]()).batch([prompt])
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    options |= {"output_logits": True, "return_dict_in_generate": True}

    def logits(**settings):
        with torch.no_grad():
            return torch.cat(model.generate(**batch, **options, **settings).logits)

    cached = logits(use_cache=True)
    torch.testing.assert_close(cached, logits(use_cache=False), rtol=0, atol=1e-4)
    with disabled(model):
        assert (cached - logits())[0].abs().max() > 0.1


@pytest.mark.parametrize("name", SERVED)
def test_every_family_scores_an_answer_by_what_generated_it(name):
    asked = Responder(family(name, dtype=torch.float64), PROCESSORS[name]())
    prompt = question("w20 w30", [Image.new("RGB", (20, 16), "red")])
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    banned = {
        "suppress_tokens": [
            *range(5),
            *range(500, asked.model.get_output_embeddings().out_features),
        ]
    }
    with torch.no_grad():
        made = asked.model.generate(
            **asked.batch([prompt]),
            **settings,
            **banned,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    new = made.sequences[0, -3:]
    text = " " + " ".join(f"w{i}" for i in new.tolist())
    steps = [logits[0].log_softmax(-1)[i] for logits, i in zip(made.logits, new, strict=True)]
    mean, _ = asked.score(prompt, text)
    assert mean == pytest.approx(float(sum(steps)) / 3, abs=1e-5)


# -- inside lmms-eval ----------------------------------------------------------------------------

TASK = """\
task: scenes
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: question
doc_to_target: target
process_results: !function utils.process_results
generation_kwargs: {{until: [" on"], max_new_tokens: 12, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
CHOICES = """\
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_visual: !function utils.visual
doc_to_text: prefix
doc_to_target: colour
doc_to_choice: {choices}
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
UTILS = """\
from PIL import Image


def visual(doc):
    return [Image.open(path) for path in doc["images"]]


def process_results(doc, results):
    return {"exact_match": float(results[0] == doc["target"])}
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Tasks on local files, and an adapter for the demo's base."""
    folder = tmp_path_factory.mktemp("tasks")
    data = scenes(7, seed=5, split="heldout")
    docs = []
    for i, labels in enumerate(data.attributes):
        path = folder / f"{i}.png"
        Image.fromarray(data.images[i]).save(path)
        docs.append(
            {
                "images": [str(path)],
                "question": CAPTION,
                "target": "{count} {colour} {object}".format(**labels),
                "prefix": CAPTION + " " + labels["count"],
                "colour": list(COLOURS).index(labels["colour"]),
            }
        )
    docs[2]["images"] = docs[0]["images"] + docs[2]["images"]
    docs[4]["images"] = []
    docs[5]["question"] = "here on the left side we can see"
    (folder / "docs.json").write_text("\n".join(map(json.dumps, docs)))
    (folder / "utils.py").write_text(UTILS)
    data_file = json.dumps(str(folder / "docs.json"))
    (folder / "scenes.yaml").write_text(TASK.format(data=data_file))
    choices = json.dumps(list(COLOURS))
    (folder / "colours.yaml").write_text(CHOICES.format(data=data_file, choices=choices))
    fa.save_adapter(randomised(load_base()), folder / "adapter")
    return folder, docs


def run_lmms_eval(served, out, *arguments, tasks, adapter, launch=()):
    """lmms-eval's command line, offline: for each task its metrics, and answers by document."""
    folder, _ = served
    model = f"pretrained={BASE},dtype=float32"
    model += f",adapter={folder / 'adapter'}" * adapter
    home = {"HF_HOME": str(out / "home"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        [
            *(sys.executable, *launch, "-m", "lmms_eval", "--model", "fastalign"),
            *("--model_args", model, "--tasks", ",".join(tasks), "--include_path", str(folder)),
            *("--batch_size", "3", "--output_path", str(out), "--log_samples", *arguments),
        ],
        cwd=out,
        env={**os.environ, **home, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    said = done.stdout[-4000:] + done.stderr[-4000:]  # it returns 0 when an evaluation has failed
    assert done.returncode == 0 and "Error during evaluation" not in said, said
    (results,) = out.rglob("*_results.json")
    metrics = json.loads(results.read_text())["results"]
    found = {}
    for task in tasks:
        (samples,) = out.rglob(f"*_samples_{task}.jsonl")
        lines = [json.loads(line) for line in samples.read_text().splitlines()]
        answers = {line["doc_id"]: line["filtered_resps"] for line in lines}
        found[task] = metrics[task], [answers[i] for i in range(len(answers))]
    return found


def expected_answers(docs, model):
    """By transformers alone, one document at a time; and the share that is right."""
    found = []
    for doc in docs:
        images = [Image.open(path) for path in doc["images"]]
        text = alone(model, doc["question"], images, **GREEDY)
        found.append(text.split(" on")[0].strip())
    right = [answer == doc["target"] for answer, doc in zip(found, docs, strict=True)]
    return found, sum(right) / len(right)


@needs_lmms_eval
def test_the_command_line_reports_what_base_and_adapter_generate(served, tmp_path):
    model = load_base()
    plain, _ = expected_answers(served[1], model)
    expected, right = expected_answers(served[1], randomised(model))
    assert expected != plain
    found = run_lmms_eval(served, tmp_path, tasks=["scenes"], adapter=True)
    metrics, answers = found["scenes"]
    assert [answer.strip() for answer in answers] == expected
    assert metrics["exact_match,none"] == right


@needs_lmms_eval
def test_two_ranks_report_what_the_base_generates_and_finds_likely(served, tmp_path):
    model = load_base()
    expected, right = expected_answers(served[1], model)
    assert 0 < right < 1
    asked, chosen = Responder(model, build_processor()), []
    for doc in served[1]:
        images = [Image.open(path).convert("RGB") for path in doc["images"]]
        scores = [asked.score(question(doc["prefix"], images), f" {c}")[0] for c in COLOURS]
        chosen.append(scores.index(max(scores)) == doc["colour"])
    assert 0 < sum(chosen) < len(chosen)
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    tasks = ["scenes", "colours"]
    found = run_lmms_eval(
        served, tmp_path, "--force_simple", tasks=tasks, adapter=False, launch=launch
    )
    metrics, answers = found["scenes"]
    assert [answer.strip() for answer in answers] == expected
    assert metrics["exact_match,none"] == right
    assert found["colours"][0]["acc,none"] == sum(chosen) / len(chosen)


@needs_lmms_eval
def test_arguments_are_checked_before_a_model_is_loaded():
    from fastalign.integrations.lmms_eval import FastAlign

    with pytest.raises(ValueError, match="dtype must be one of auto, .*: got 'int8'"):
        FastAlign(pretrained="none", dtype="int8")
    with pytest.raises(ValueError, match="batch_size must be a whole number .*: got 'auto'"):
        FastAlign(pretrained="none", batch_size="auto")
    with pytest.raises(ValueError, match="or system_prompt: got trust_remote_code"):
        FastAlign(pretrained="none", trust_remote_code=True)


@needs_lmms_eval
def test_a_task_that_shows_a_video_is_refused():
    from fastalign.integrations.lmms_eval import _images

    with pytest.raises(ValueError, match="a task for fastalign must show images: got str 'a.mp4'"):
        _images(["a.mp4"])


# -- the page ------------------------------------------------------------------------------------


def tasks_of_the_page():
    """Task and metrics of each row of the table."""
    rows = [line.split("|") for line in PAGE.splitlines() if re.match(r"\| .+ \| `\w+` \|", line)]
    return {row[2].strip(" `"): re.findall(r"`([^`]+)`", row[3]) for row in rows}


def test_the_page_names_a_task_and_a_metric_for_each_benchmark():
    found = tasks_of_the_page()
    assert len(found) >= 14 and all(found.values())
    commands = re.findall(r"--tasks ([\w,]+)", PAGE)
    assert commands and {name for names in commands for name in names.split(",")} <= found.keys()


def test_lmms_eval_finds_the_model_by_the_declared_entry_point():
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    wanted = '[project.entry-points."lmms_eval.models"]\nfastalign = '
    assert wanted + '"fastalign.integrations.lmms_eval:manifest"' in declared
    if INSTALLED:
        from lmms_eval.models import get_model, get_model_manifest

        from fastalign.integrations import lmms_eval

        assert get_model_manifest("fastalign") == lmms_eval.manifest()
        assert get_model("fastalign") is lmms_eval.FastAlignChat
        assert get_model("fastalign", force_simple=True) is lmms_eval.FastAlign


def test_the_package_of_integrations_needs_no_lmms_eval():
    script = "import sys; sys.modules['lmms_eval'] = None; import fastalign.integrations as i; i"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_lmms_eval
def test_every_task_of_the_page_exists_with_its_metrics():
    import lmms_eval.tasks as installed
    from lmms_eval.utils import load_yaml_config

    manager = installed.TaskManager()
    for task, metrics in tasks_of_the_page().items():
        assert task in manager.all_tasks, task
        path = Path(manager.task_index[task]["yaml_path"])
        config = load_yaml_config(str(path), mode="simple")
        if "metric_list" not in config:  # a group: its own list, else that of its first task
            config["metric_list"] = config["aggregate_metric_list"]
        named = {entry["metric"] for entry in config["metric_list"]}
        assert set(metrics) <= named, (task, named)
