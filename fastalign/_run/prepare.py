"""Before and after the loop of a run: its materials, its model, its classifier, its result."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastalign import objectives
from fastalign._run.guards import usable_pairs
from fastalign._run.looks import bad_output
from fastalign._run.stream_order import first_samples
from fastalign.adapters import NAME, adapter_of, attach, save_adapter
from fastalign.adapters._peft import prepare_base, save_tuners
from fastalign.adapters._tower import open_tower
from fastalign.config import TrainConfig
from fastalign.models import VLM, Batch
from fastalign.models._side_stream import is_part, is_writer, whole_tensor
from fastalign.models._text_packing import check_packable, check_packing
from fastalign.objectives import DeepAlignState
from fastalign.teachers import CachedTeacher, PatchTeacher, Teacher


def materials(
    config: TrainConfig, model: nn.Module | None, dataset: Any, collate: Any
) -> tuple[nn.Module, Any, Any]:
    """Model, dataset and collator: those given, else those that the configuration names."""
    if dataset is not None and collate is None:
        raise ValueError("collate must be given with a dataset: got none")
    if (model is None and not config.model) or (dataset is None and not config.data):
        raise ValueError("config must name a model and data, unless train() is given them")
    if model is None:
        from transformers import AutoModelForImageTextToText

        dtype = torch.bfloat16 if config.bf16 and not config.trains_base else torch.float32
        model = AutoModelForImageTextToText.from_pretrained(config.model, dtype=dtype)
    if dataset is None:
        from transformers import AutoProcessor

        from fastalign.data import Collator, open_data, open_stream

        read: Any = open_stream if config.streaming else open_data
        dataset = read(config.data, config.image_root, on_error=config.on_bad_sample)
        source = config.model or str(model.name_or_path)
        loader: Any = AutoProcessor
        processor = loader.from_pretrained(source)
        # A model learns to stop from the end token, which LLaVA-1.5's template leaves out.
        ends = processor.tokenizer.eos_token is not None
        collate = Collator(
            processor,
            max_length=config.max_length,
            on_overflow=config.on_overflow,
            append_eos=ends,
            pack_text=config.pack_text,
        )
    return model, dataset, collate


def prepare_model(
    config: TrainConfig,
    model: nn.Module,
    device: torch.device,
    teacher: Teacher | None,
    shards: bool = False,
) -> tuple[VLM, DeepAlignState | None, list[nn.Parameter], Teacher | None]:
    """Adapter attached, base frozen or not, the objective's state, and its teacher.

    A model that is going to be sharded stays where it is: it may not fit on one device.
    """
    if not shards:
        model.to(device)
    if config.needs_adapter and getattr(model, NAME, None) is None:
        attach(model, config.adapter)
    vlm = VLM(model)
    if config.pack_text:
        (check_packable if shards else check_packing)(vlm)
    prepare_base(model, config.trainable == "all", config.trains_base)
    if config.train_vision_from is not None:
        open_tower(vlm, config.train_vision_from)
    if config.needs_adapter:
        # Master weights in float32, whatever the base is kept in; in float64 with a base in it.
        wide = torch.promote_types(vlm.head.weight.dtype, torch.float32)
        adapter_of(model).to(wide).requires_grad_(True)
    state = None
    if config.objective == "deepalign":
        teacher = _teacher(config, vlm, device, teacher)
        state = DeepAlignState(vlm, config.deepalign, teacher).to(device)
    return vlm, state, [p for p in model.parameters() if p.requires_grad], teacher


def _teacher(
    config: TrainConfig, vlm: VLM, device: torch.device, teacher: Teacher | None
) -> Teacher | None:
    """The teacher given, else the one that the configuration names; cached when that asks for it.

    Raises:
        ValueError: A cache is asked for a callable that cannot be told from others.
    """
    if teacher is None and config.teacher:
        teacher = PatchTeacher.from_pretrained(
            config.teacher,
            config.model or str(vlm.model.name_or_path),
            image_size=config.teacher_image_size,
            views=vlm.views,
        ).to(device)
    if teacher is None or not config.teacher_cache or isinstance(teacher, CachedTeacher):
        return teacher
    if not isinstance(teacher, PatchTeacher):
        raise ValueError(
            "teacher_cache needs a teacher by path or a PatchTeacher: wrap a callable of your own, "
            "teacher=CachedTeacher(teacher, folder, name=..., views=VLM(model).views)"
        )
    return CachedTeacher(teacher, config.teacher_cache)


def parameter_groups(parameters: list[nn.Parameter], config: TrainConfig) -> list[dict[str, Any]]:
    """Matrices and kernels decay, vectors do not; the learning rate is set at every step."""
    decayed = [p for p in parameters if p.dim() > 1]
    others = [p for p in parameters if p.dim() <= 1]
    groups = [(decayed, config.weight_decay), (others, 0.0)]
    return [{"params": p, "weight_decay": decay, "lr": 0.0} for p, decay in groups if p]


def classifier_phase(
    config: TrainConfig, vlm: VLM, state: DeepAlignState, dataset: Any, collate: Any
) -> objectives.ClassifierReport:
    """DeepAlign's first phase; warns where the classifier cannot tell the modalities apart.

    Every rank fits on the same pairs, and takes the first one's weights: two devices may round.
    """
    batches = classifier_batches(config, vlm, state, dataset, collate)
    vlm.model.eval()
    report = objectives.fit_classifier(state, vlm, batches)
    if not all(tensor.isfinite().all() for tensor in state.state_dict().values()):
        again = classifier_batches(config, vlm, state, dataset, collate)
        raise FloatingPointError(
            "the classifier's weights must be finite: got others, from the base model's "
            f"{bad_output(vlm, again, state.layers) or 'representations'}"
        )
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for tensor in state.state_dict().values():
            torch.distributed.broadcast(tensor, 0)
    if report.warning:
        warnings.warn(report.warning, stacklevel=3)
    return report


def classifier_batches(
    config: TrainConfig, vlm: VLM, state: DeepAlignState, dataset: Any, collate: Any
) -> Iterator[Batch]:
    """Every rank takes the same pairs, so that all hold the same classifier."""
    chosen = first_samples(dataset, config, 2 * state.config.classifier_pairs)
    size, device = config.batch_size, next(vlm.model.parameters()).device
    for i in range(0, len(chosen), size):
        batch = to_device(collate([dataset[j] for j in chosen[i : i + size]]), device)
        if usable_pairs(config, vlm, batch, chosen[i : i + size]):
            yield batch


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on `device`."""
    return {
        k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()
    }


def write_result(config: TrainConfig, vlm: VLM, folder: Path) -> Path:
    """Write the result; the adapter goes back to the dtype of its base.

    Of a sharded model every rank must call; the first one writes, and the model stays sharded.
    """
    if config.needs_adapter:
        save_adapter(vlm.model, folder / "adapter")
        save_tuners(vlm.model, folder / "lora")
        if not any(is_part(p) for p in vlm.model.parameters()):
            adapter_of(vlm.model).place(vlm)
    if not config.trains_base:
        return folder / "adapter"
    own = vlm.model.state_dict(keep_vars=True)
    kept = {k: v for k, v in own.items() if not k.startswith(NAME + ".")}
    writes, whole = is_writer(kept), {}
    for tensor in {id(v): v for v in kept.values()}.values():  # tied weights are one, and stay so
        gathered = whole_tensor(tensor.detach())
        if writes:
            whole[id(tensor)] = gathered.cpu() if is_part(tensor) else gathered
    if writes:
        tensors = {name: whole[id(tensor)] for name, tensor in kept.items()}
        vlm.model.save_pretrained(folder / "model", state_dict=tensors)
    return folder / "model"
