"""Adapters from strangers: what is refused, by which rule, and what that costs."""

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import fastalign as fa
from fastalign.adapters import CONFIG, WEIGHTS, _files, _metadata
from fastalign.testing.models import llava_batch, tiny_llava

GB = 2**30
BOTH = fa.AdapterConfig(shift_layers=(1, 3), shift_hidden_dim=5, calibration=True)


def trained(model):
    torch.manual_seed(7)
    adapter = fa.attach(model, BOTH)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    fa.save_adapter(trained(tiny_llava()), folder)
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "adapter"))


@pytest.fixture(scope="module")
def model():
    return tiny_llava()


def refused(model, folder, message, kind=ValueError):
    """The rule is told, with the file that breaks it, and the model stays as it is."""
    with pytest.raises(kind, match=message) as caught:
        fa.load_adapter(model, folder)
    assert str(folder) in str(caught.value) and len(str(caught.value)) < 1500
    assert not hasattr(model, "fastalign_adapter")


# -- the weights ---------------------------------------------------------------------------------


def parts(folder):
    """Header and data of a safetensors file."""
    whole = (folder / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    return json.loads(whole[8:end]), whole[end:]


def write(folder, header, data=b"", length=None, size=None):
    """A safetensors file by hand, of a header that is text or JSON; `size` makes it sparse."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    start = (len(text) if length is None else length).to_bytes(8, "little")
    (folder / WEIGHTS).write_bytes(start + text + data)
    if size is not None:
        os.truncate(folder / WEIGHTS, size)


@pytest.mark.parametrize(
    ("length", "size", "message"),
    [
        (10 * GB, None, r"claims 10,737,418,240 bytes, and the file has 10$"),
        (10 * GB, 10 * GB + 8, r"header of at most 1,048,576 bytes .* claims 10,737,418,240"),
        (2**64 - 1, None, r"claims 18,446,744,073,709,551,615 bytes"),
        (100 * 2**20, 200 * 2**20, r"claims 104,857,600 bytes, and the file has 209,715,200"),
        (3, None, r"claims 3 bytes, and the file has 10"),
    ],
    ids=["10-GB-claimed", "10-GB-held", "2^64", "100-MB-held", "one-too-long"],
)
def test_a_long_header_is_not_read(model, folder, length, size, message, monkeypatch):
    write(folder, b"{}", length=length, size=size)
    monkeypatch.delattr(_files, "Adapter")  # nothing is made, not even without memory
    refused(model, folder, "must be a safetensors file.*" + message)


ENTRY = b'"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"not JSON", "must be a safetensors file, with a header of JSON: Expecting value"),
        (b"[]", r"with a header of names: got \[\]"),
        (b"[" * 100_000, "with a header of JSON: maximum recursion depth"),
        (b'{"a": ' * 100_000, "with a header of JSON: maximum recursion depth"),
        (b"\xff\xfe{}", "with a header of JSON: .*can't decode"),
        (b"{" + ENTRY + b"," + ENTRY + b"}", "header of JSON: the key 'a' stands twice"),
        (b'{"a": NaN}', "with a header of JSON: NaN is no number of JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "with a header of JSON: Exceeds the limit"),
    ],
    ids=["text", "list", "nested", "nested-objects", "bytes", "twice", "nan", "digits"],
)
def test_a_header_is_plain_json(model, folder, header, message, monkeypatch):
    write(folder, header, b"\0" * 4)
    monkeypatch.delattr(_files, "Adapter")
    refused(model, folder, message)


def test_a_file_without_a_header_is_refused(model, folder):
    for content in (b"", b"\1\0\0"):
        (folder / WEIGHTS).write_bytes(content)
        refused(model, folder, f"must be a safetensors file.*the file has {len(content)}$")


BIAS = "shifts.1.conv1.bias"  # of 5 numbers


def overlap(header):
    header["shifts.3.conv1.bias"]["data_offsets"] = header[BIAS]["data_offsets"]


def shift_all(header):
    for entry in header.values():
        entry["data_offsets"] = [4 + offset for offset in entry["data_offsets"]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "I64"}, r"must be floating point, \['F64', 'F32', 'F16', 'BF16'\]: got 'I64'"),
        ({"dtype": ["F32"]}, "must be floating point"),
        ({"shape": [2**40]}, r"must have the 4,398,046,511,104 bytes of its shape \[1099511627776"),
        ({"shape": [2**62] * 8}, "bytes of its shape"),
        ({"shape": [10**30]}, "at most 8 whole numbers"),
        ({"shape": [1] * 9}, "at most 8 whole numbers"),
        ({"shape": [-5]}, "at most 8 whole numbers"),
        ({"shape": [True]}, "at most 8 whole numbers"),
        ({"shape": [5.0]}, "at most 8 whole numbers"),
        ({"shape": 5}, "at most 8 whole numbers"),
        ({"data_offsets": [20, 0]}, "must have the 20 bytes of its shape"),
        ({"data_offsets": [-20, 0]}, "must have two data_offsets"),
        ({"data_offsets": [0]}, "must have two data_offsets"),
        ({"data_offsets": [2**50, 2**50 + 20]}, "must begin where the tensor before it ends"),
        ({"shape": [2**40], "data_offsets": [0, 2**42]}, "must begin where the tensor before it"),
        ({"code": "x"}, "must have dtype, shape and data_offsets and no more"),
        (overlap, "must begin where the tensor before it ends"),
        (shift_all, "must begin where the tensor before it ends"),
        (lambda header: header.update({BIAS: [1]}), "must have dtype, shape and data_offsets"),
        (lambda header: header.pop("shifts.3.conv1.bias"), "must begin where|must end with"),
    ],
)
def test_a_header_describes_its_file(model, folder, change, message, monkeypatch):
    header, data = parts(folder)
    if isinstance(change, dict):
        header[BIAS] |= change
    else:
        change(header)
    write(folder, header, data)
    monkeypatch.delattr(_files, "Adapter")
    refused(model, folder, message)


def test_data_beyond_the_last_tensor_is_refused(model, folder):
    write(folder, *parts(folder)[:1], parts(folder)[1] + b"\0" * 7)
    refused(model, folder, "must end with its last tensor")


def test_other_keys_and_shapes_are_refused_by_the_header(model, folder, monkeypatch):
    header, data = parts(folder)
    header[BIAS]["shape"] = [1, 5]
    write(folder, header, data)
    monkeypatch.delattr(_files, "_load_weights")  # no value is read
    refused(model, folder, rf"{BIAS} in .* must be \(5,\): got \(1, 5\)")
    header[BIAS]["shape"] = [5]
    write(folder, {("x" * 5000 if k == BIAS else k): v for k, v in header.items()}, data)
    refused(model, folder, rf"missing \['{BIAS}'\], unknown \['xxx")


def test_weights_that_are_not_finite_are_refused_where_the_probe_is_blind(model, tmp_path):
    """Before a ReLU, -inf is as good as any number below 0."""
    other = trained(tiny_llava())
    with torch.no_grad():
        other.fastalign_adapter.shifts["1"].conv1.bias[2] = -torch.inf
    assert all(x.isfinite().all() for x in other.fastalign_adapter.probe().values())
    fa.save_adapter(other, tmp_path)
    refused(model, tmp_path, "shifts.1 in .* must be finite, and conv1.bias is not: the file is da")


# -- the configuration ---------------------------------------------------------------------------


def within(part, **values):
    return lambda about: about[part].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda about: about.update(run="rm"), r"must hold the keys .* unknown \['run'\]"),
        (within("adapter", path="../x"), r"must hold an adapter of the keys .*: got \['path'\]"),
        (within("base", url="x"), r"must hold a base of the keys .* unknown \['url'\]"),
        (lambda about: about.update(format="2"), "must be an adapter of format 2: got '2'"),
        (lambda about: about.update(adapter=None), "must hold an adapter of the keys"),
        (lambda about: about.update(base=[]), "must hold a base of names and sizes"),
        (within("base", model_type={"a": []}), "must hold a base of names and sizes"),
        (lambda about: about.update(peft_type="LORA"), "got 'LORA'; one of PEFT's own is loaded"),
        (within("adapter", kernel_size="3"), "kernel_size in .* must be an odd size: got '3'"),
        (within("adapter", kernel_size=2), "kernel_size in .* must be an odd size: got 2"),
        (within("adapter", kernel_size=-3), "kernel_size in .* must be an odd size"),
        (within("adapter", kernel_size=True), "kernel_size in .* must be an odd size: got True"),
        (within("adapter", kernel_size=3.0), "kernel_size in .* must be an odd size: got 3.0"),
        (within("adapter", shift_hidden_dim=0), "shift_hidden_dim in .* a size or null: got 0"),
        (within("adapter", shift_hidden_dim=2**40), "shift_hidden_dim in .* a size or null"),
        (within("adapter", decoder_shift_hidden_dim=[]), "decoder_shift_hidden_dim in .* a size"),
        (within("adapter", shift_layers="13"), "shift_layers in .* a list of layers from 1"),
        (within("adapter", shift_layers=[0]), "shift_layers in .* a list of layers from 1"),
        (within("adapter", shift_layers=[1.5]), "shift_layers in .* a list of layers from 1"),
        (within("adapter", shift_layers=[1, 1]), "shift_layers must not repeat"),
        (within("adapter", decoder_shift_layers=None), "decoder_shift_layers in .* a list of lay"),
        (within("adapter", calibration=1), "calibration in .* must be true or false: got 1"),
        (within("adapter", calibration_init_std=-1), "calibration_init_std in .* a number from 0"),
        (within("adapter", calibration_init_std="0"), "calibration_init_std in .* a number from 0"),
        (within("adapter", shift_layers=[], calibration=False), "an adapter must hold something"),
        # The base is one of width 24 in the tower and 32 in the decoder: 2 layers, 2 convolutions.
        (within("adapter", shift_hidden_dim=10**9), "864,000,000,000 in convolutions alone: got"),
        (within("adapter", kernel_size=10**9 + 1), "in convolutions alone: got"),
        (within("adapter", decoder_shift_layers=[1]), "in convolutions alone: got"),
    ],
)
def test_a_configuration_is_checked_before_anything_is_made(
    model, folder, change, message, monkeypatch
):
    about = json.loads((folder / CONFIG).read_text())
    change(about)
    (folder / CONFIG).write_text(json.dumps(about))
    monkeypatch.delattr(_files, "Adapter")
    refused(model, folder, message)


def test_a_configuration_that_the_model_cannot_have_is_named(model, folder):
    about = json.loads((folder / CONFIG).read_text())
    about["adapter"]["shift_layers"] = [1, 4]
    (folder / CONFIG).write_text(json.dumps(about))
    refused(model, folder, "does not fit this model: shift_layers must lie in 1..3")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"format": 2, "adapter": {"calibration_init_std": NaN}}', "JSON: NaN is no number"),
        (b'{"format": -Infinity}', "must be JSON: -Infinity is no number"),
        (b'{"format": 1, "format": 2}', "must be JSON: the key 'format' stands twice"),
        (b'{"format": 2, "base": {}, "adapter": {"calibration_init_std": 1e999}}', "number from 0"),
        (b"[" * 60_000, "must be JSON: maximum recursion depth"),
        (b'{"format": ' + b"9" * 5000 + b"}", "must be JSON: Exceeds the limit"),
        (b"\x80", "must be JSON: .*can't decode"),
        (b'"' + b"x" * 2**16 + b'"', "must have at most 65,536 bytes: got 65,538"),
        (b"7", "must be an adapter of fastalign: got 7"),
    ],
    ids=["nan", "infinity", "twice", "1e999", "nested", "digits", "bytes", "long", "number"],
)
def test_a_configuration_is_short_plain_json(model, folder, text, message, monkeypatch):
    (folder / CONFIG).write_bytes(text)
    monkeypatch.delattr(_files, "Adapter")
    refused(model, folder, message)


def test_every_setting_has_a_rule():
    assert list(_metadata._RULES) == [field.name for field in fields(fa.AdapterConfig)]


# -- the folder ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_link_out_of_the_folder_is_refused(model, folder, name):
    outside = folder.parent / "outside"
    (folder / name).rename(outside)
    for target in (outside, Path("../outside")):
        (folder / name).symlink_to(target)
        refused(model, folder, rf"{name} must lie in its folder: got a link to .*outside")
        (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    refused(model, folder, "must lie in its folder: got a link to /dev/zero")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_only_regular_files_are_opened(model, folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)  # opened, it would wait for a writer
    refused(model, folder, rf"{name} must be a regular file")
    (folder / name).unlink()
    (folder / name).mkdir()
    refused(model, folder, rf"{name} must be a regular file")
    (folder / name).rmdir()
    (folder / name).symlink_to(name)
    refused(model, folder, "Too many levels of symbolic links", OSError)
    (folder / name).unlink()
    refused(model, folder, "No such file", FileNotFoundError)


def test_links_inside_the_folder_and_of_the_hub_are_followed(folder, tmp_path):
    snapshot, blobs = tmp_path / "models--a--b/snapshots/0a1b", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, name in enumerate((CONFIG, WEIGHTS)):
        shutil.copy(folder / name, blobs / str(number))
        (snapshot / name).symlink_to(f"../../blobs/{number}")
        (folder / name).rename(folder / f"{number}.kept")
        (folder / name).symlink_to(f"{number}.kept")
    linked = tmp_path / "linked"
    linked.symlink_to(folder)
    for place in (snapshot, folder, linked):
        assert fa.load_adapter(tiny_llava(), place).config == BOTH


def test_a_file_is_no_folder(model, folder):
    refused(model, folder / CONFIG, "must be the folder of an adapter", NotADirectoryError)


@contextmanager
def without_privileges():
    """Root reads every file."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_file_that_cannot_be_read_is_named(model, folder, name):
    (folder / name).chmod(0)
    with without_privileges(), pytest.raises(PermissionError, match="denied: '.*/"):
        fa.load_adapter(model, folder)
    assert not hasattr(model, "fastalign_adapter")


COST = """
import json, os, resource, sys
from pathlib import Path
import fastalign as fa
from fastalign.testing.models import tiny_llava

folder, model, opened, listening = Path(sys.argv[1]), tiny_llava(), set(), False
config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"

def hear(event, args):
    if listening and event == "open" and isinstance(args[0], (str, os.PathLike)):
        opened.add(str(args[0]))

sys.addaudithook(hear)
fa.load_adapter(tiny_llava(), folder)  # imports what it needs
about, good = json.loads(config.read_text()), weights.read_bytes()
end = 8 + int.from_bytes(good[:8], "little")
header = json.loads(good[8:end])
listening = True
fa.load_adapter(tiny_llava(), folder)
listening = False

def held(length, text, size):
    weights.write_bytes(length.to_bytes(8, "little") + text)
    os.truncate(weights, size)

def tensor_of_10_gb():
    header["shifts.1.conv1.bias"] |= {"shape": [5 * 2**29], "data_offsets": [0, 10 * 2**30]}
    at = 10 * 2**30
    for name in header.keys() - {"shifts.1.conv1.bias"}:
        first, last = header[name]["data_offsets"]
        header[name]["data_offsets"], at = [at, at + last - first], at + last - first
    text = json.dumps(header).encode()
    held(len(text), text, 8 + len(text) + at)

def channels():
    weights.write_bytes(good)
    wide = about["adapter"] | {"shift_hidden_dim": 10**9}
    config.write_text(json.dumps(about | {"adapter": wide}))

def long_config():
    config.write_text("[")
    os.truncate(config, 10 * 2**30)

cases = [
    lambda: held(10 * 2**30, b"{}", 10),
    lambda: held(10 * 2**30, b"{}", 10 * 2**30 + 8),
    lambda: held(100 * 2**20, b"{}", 10 * 2**30 + 8),
    lambda: held(2**20, b"[" * 2**20, 2**20 + 8),
    tensor_of_10_gb, channels, long_config,
]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
refused = 0
for case in cases:
    case()
    try:
        fa.load_adapter(model, folder)
    except ValueError:
        refused += 1
config.unlink(), weights.unlink()
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
print(json.dumps({"grown": grown, "refused": refused, "opened": sorted(opened)}))
"""


def test_claims_of_10_gb_cost_nothing_and_two_files_are_opened(folder):
    done = subprocess.run(
        [sys.executable, "-c", COST, str(folder)], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["refused"] == 7 and found["grown"] < 50 * 1024, found
    # safetensors opens the weights again, past Python.
    assert found["opened"] == sorted(str(folder / name) for name in (CONFIG, WEIGHTS))


# -- PEFT ----------------------------------------------------------------------------------------


def test_the_configuration_has_the_keys_that_peft_reads(folder):
    about = json.loads((folder / CONFIG).read_text())
    assert {k: about[k] for k in ("peft_type", "task_type", "auto_mapping", "inference_mode")} == {
        "peft_type": "FASTALIGN", "task_type": None, "auto_mapping": None, "inference_mode": True,
    }  # fmt: skip
    assert about["base_model_name_or_path"] is None  # the model was made, not loaded
    named = tiny_llava()
    named.name_or_path = "some/model"
    assert fa.attach(named, BOTH).metadata["base_model_name_or_path"] == "some/model"


def test_an_adapter_of_format_2_without_these_keys_loads(folder):
    about = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({k: about[k] for k in ("format", "adapter", "base")}))
    assert fa.load_adapter(tiny_llava(), folder).config == BOTH


def test_the_usual_names_save_and_load(tmp_path, folder):
    adapter = fa.adapters.Adapter.from_pretrained(tiny_llava(), folder)
    adapter.save_pretrained(tmp_path / "again")
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_peft_refuses_our_folder_by_its_type(folder):
    peft = pytest.importorskip("peft")
    other = tiny_llava()
    for load in (
        lambda: peft.PeftConfig.from_pretrained(folder),
        lambda: peft.PeftModel.from_pretrained(other, folder),
        lambda: other.load_adapter(str(folder)),  # transformers' own, through PEFT
    ):
        with pytest.raises(KeyError, match="FASTALIGN"):
            load()
    assert not [name for name, _ in other.named_parameters() if "lora" in name]


TEXT = r".*language_model.*\.(q_proj|v_proj)"


def add_lora(model):
    """Low-rank matrices that do something."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    options = {"target_modules": TEXT, "r": 2, "init_lora_weights": False}
    return peft.get_peft_model(model, peft.LoraConfig(**options))


def both(order):
    """A model with both, all of either trained, and PEFT's wrapper."""
    model = tiny_llava(head_scale=2.0)
    if order == "adapter first":
        trained(model)
    wrapped = add_lora(model)
    if order == "LoRA first":
        trained(model)
    model.fastalign_adapter.requires_grad_(True)  # PEFT freezes all that is not its own
    assert wrapped.get_base_model() is model
    return model, wrapped


def logits(model):
    with torch.no_grad():
        return model(**llava_batch(["ttityy", "tiyy"])).logits


def moved(model, before):
    return {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}


def copied(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


ORDERS = pytest.mark.parametrize("order", ["adapter first", "LoRA first"])


@ORDERS
@pytest.mark.parametrize("objective", ["sft", "deepalign"])
def test_lora_trains_beside_an_adapter(order, objective, tmp_path):
    peft = pytest.importorskip("peft")
    model, wrapped = both(order)
    vlm, batch = fa.VLM(model), llava_batch(["ttityy", "tiyy", "ttiyyty"])
    if objective == "deepalign":
        options = fa.objectives.DeepAlignConfig(without=("distillation",))
        state = fa.objectives.DeepAlignState(vlm, options)
        fa.objectives.fit_classifier(state, vlm, [batch] * 2)
        loss = fa.objectives.deepalign(vlm, batch, state=state)["loss"]
    else:
        loss = fa.objectives.sft(vlm, batch)["loss"]
    loss.backward()
    parameters = {k: p for k, p in model.named_parameters() if p.requires_grad}
    assert {k for k in parameters if "lora_" in k} and {k for k in parameters if "shifts" in k}
    # The last calibration acts on tokens that no label of these samples is predicted from.
    idle = {k for k, p in parameters.items() if p.grad is None or not p.grad.abs().sum() > 0}
    assert all("calibrations.3" in k for k in idle)
    before = copied(model)
    torch.optim.SGD(parameters.values(), lr=0.1).step()
    assert moved(model, before) == parameters.keys() - idle

    fa.save_adapter(model, tmp_path / "ours")
    wrapped.save_pretrained(tmp_path / "theirs")
    stored = _files.read_header(tmp_path / "theirs/adapter_model.safetensors")
    assert all("lora_" in key for key in stored)
    fresh = tiny_llava(head_scale=2.0)
    if order == "adapter first":
        fa.load_adapter(fresh, tmp_path / "ours")
        peft.PeftModel.from_pretrained(fresh, tmp_path / "theirs")
    else:
        peft.PeftModel.from_pretrained(fresh, tmp_path / "theirs")
        fa.load_adapter(fresh, tmp_path / "ours")
    assert torch.equal(logits(fresh), logits(model))
    other = tiny_llava()
    refused(other, tmp_path / "theirs", "got 'LORA'; one of PEFT's own is loaded")


@ORDERS
def test_disabled_leaves_lora_on_and_either_can_be_taken_off(order):
    model, wrapped = both(order)
    plain, adapted = tiny_llava(head_scale=2.0), trained(tiny_llava(head_scale=2.0))
    low_rank = add_lora(tiny_llava(head_scale=2.0))
    with fa.adapters.disabled(model):
        assert torch.equal(logits(model), logits(low_rank))
        assert not torch.equal(logits(model), logits(plain))
    with wrapped.disable_adapter():
        assert torch.equal(logits(model), logits(adapted))
    assert torch.equal(logits(wrapped.unload()), logits(adapted))
    fa.detach(model)
    assert torch.equal(logits(model), logits(plain))


def settings(folder, **changes):
    chosen = {"output_dir": str(folder), "objective": "sft", "adapter": BOTH, "max_steps": 2}
    chosen |= {"batch_size": 2, "learning_rate": 1e-2, "save_every": 1, "progress": False}
    return fa.TrainConfig(**(chosen | changes))


def run(config, model):
    samples = ["ttityyy", "tiyyyy", "ttiyyty", "tiyyt"]
    return fa.train(config, model=model, dataset=samples, collate=llava_batch)


@pytest.mark.parametrize("frozen", [False, True])
def test_training_adapters_trains_lora_that_is_not_frozen(tmp_path, frozen):
    peft = pytest.importorskip("peft")
    model = tiny_llava(head_scale=2.0)
    wrapped = add_lora(model)
    if frozen:
        wrapped.requires_grad_(False)
    before = copied(model)
    run(settings(tmp_path), model)
    changed = {k for k in before if not torch.equal(model.state_dict()[k], before[k])}
    low_rank = {k for k in before if "lora_" in k}
    assert changed == (set() if frozen else low_rank)
    stored = _files.read_header(tmp_path / "checkpoint-2/trained.safetensors")
    assert {k for k in stored if "lora_" in k} == {f"model.{k}" for k in changed}
    if not frozen:  # the same end from the checkpoint after one step
        shutil.rmtree(tmp_path / "checkpoint-2")
        resumed = tiny_llava(head_scale=2.0)
        add_lora(resumed)
        run(settings(tmp_path), resumed)
        assert torch.equal(logits(resumed), logits(model))
    wrapped.save_pretrained(tmp_path / "theirs")
    fresh = tiny_llava(head_scale=2.0)
    peft.PeftModel.from_pretrained(fresh, tmp_path / "theirs")
    fa.load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(logits(fresh), logits(model))


@pytest.mark.parametrize("changes", [{"trainable": "all"}, {"train_vision_from": 2}])
def test_a_base_with_lora_is_not_trained_and_written_whole(tmp_path, changes):
    model = tiny_llava()
    add_lora(model)
    with pytest.raises(ValueError, match=re.escape("merge_and_unload()")):
        run(settings(tmp_path, **changes), model)


def test_pefts_wrapper_is_no_model(folder):
    wrapped = add_lora(tiny_llava())
    for use in (fa.VLM, fa.attach, lambda model: fa.load_adapter(model, folder)):
        with pytest.raises(TypeError, match=re.escape("pass its get_base_model()")):
            use(wrapped)
