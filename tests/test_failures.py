"""What is said where memory is short, and how the command ends."""

import errno

import _train_run as run
import pytest
import torch

import fastalign as fa
from fastalign import cli
from fastalign._run.failures import CPUMemoryError, LostRankError, memory_advice


def test_memory_that_is_short_says_what_would_help(tmp_path):
    model, passes = run.model(), 0

    def short(module, args):
        nonlocal passes
        passes += 1
        if passes == 5:  # the first micro-batch of the third step
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    model.model.language_model.layers[1].register_forward_pre_hook(short)
    found = (
        r"out of memory in step 3 \(peak \d+ MiB in this process\): CUDA out of memory. Tried to "
        r"allocate 2.00 GiB.\nWhat would help, most helpful first: batch_size=1 with "
        r"gradient_accumulation_steps=4 \(now 2 and 2\), which makes the same step; grad"
    )
    with pytest.raises(torch.OutOfMemoryError, match=found) as caught:
        config = run.config(tmp_path, "sft")
        fa.train(config, model=model, dataset=range(20), collate=run.collate)
    assert str(caught.value.__cause__).startswith("CUDA out of memory")


def test_advice_is_that_of_the_configuration():
    least = fa.TrainConfig(
        objective="sft", batch_size=1, gradient_checkpointing=True, bf16=True, max_length=512
    )
    assert memory_advice(least) == ["a max_length below 512"]
    most = memory_advice(fa.TrainConfig(batch_size=6, train_vision_from=3, teacher="dino"))
    starts = ("batch_size=3 with gradient_accumulation_steps=2", "gradient_ch", "max_length")
    starts += ("bf16", "teacher_cache", "fewer deepalign.layers", 'trainable="adapters"')
    assert len(most) == 7 and all(a.startswith(b) for a, b in zip(most, starts, strict=True))


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "trained.safetensors could not be written"),
        FloatingPointError("loss not finite"),
        torch.OutOfMemoryError("out of memory"),
        CPUMemoryError("out of memory"),
        LostRankError("another rank was lost"),
    ],
)
def test_the_command_says_it_in_a_line(monkeypatch, capsys, error):
    def fail(argv):
        raise error

    monkeypatch.setitem(cli.COMMANDS, "train", fail)
    assert cli.main(["train"]) == 1
    assert capsys.readouterr().err == f"fastalign train: {error}\n"


def test_other_errors_keep_their_trace(monkeypatch):
    def fail(argv):
        raise RuntimeError("shapes differ")

    monkeypatch.setitem(cli.COMMANDS, "train", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        cli.main(["train"])
