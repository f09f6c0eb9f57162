"""A base model with an adapter as lmms-eval's model `fastalign`.

lmms-eval finds it by the entry point in this project's metadata. `--model fastalign` takes
`FastAlignChat`, whose tasks place images among the text themselves; with `--force_simple` it takes
`FastAlign`, which also scores continuations.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from loguru import logger
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from fastalign.adapters import load_adapter
from fastalign.data import IMAGE_SUFFIXES, open_image
from fastalign.data._errors import check_choice
from fastalign.integrations._answers import Answer, Prompt, Responder, batches, question

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

DTYPES = ("auto", "float32", "bfloat16", "float16")
# lmms-eval ends an answer at an empty line where a task does not say what ends it, which would cut
# every answer of several paragraphs. Its own models leave that out too.
_FILLED_IN = "\n\n"


def manifest() -> ModelManifest:
    """What lmms-eval's registry is told."""
    # `lmms_eval.models` imports this module while it fills its registry, so not the other way.
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="fastalign",
        simple_class_path=f"{__name__}.FastAlign",
        chat_class_path=f"{__name__}.FastAlignChat",
    )


class FastAlign(lmms):  # type: ignore[misc]
    """Serves requests of lmms-eval's simple tasks: text, and images before it or at `<image>`.

    Several processes (`accelerate launch -m lmms_eval`) each hold the model and take a share of the
    requests.

    Args:
        pretrained: Folder of a model and its processor, or a name on the hub; safetensors only,
            and no code of the checkpoint's own.
        adapter: Folder of `fastalign.save_adapter`; None for the base alone.
        dtype: "auto" (the checkpoint's), "float32", "bfloat16" or "float16".
        device: Such as "cuda:0"; None for the process's own GPU, the CPU where there is none.
        batch_size: Requests together, at least 1; `--batch_size` on the command line.
        max_batch_size: Given by lmms-eval; not used.
        attn_implementation: Of transformers, such as "sdpa"; None for its choice.
        max_length: Most tokens of a prompt and its answer together; None for any.
        system_prompt: The system turn of every conversation, or a file that holds it.

    Raises:
        FileNotFoundError: The adapter lacks a file.
        ValueError: An argument is unknown or has a value that is not allowed, or the adapter is
            another model's.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        adapter: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        attn_implementation: str | None = None,
        max_length: int | None = None,
        system_prompt: str | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise ValueError(
                f"model_args must be pretrained, adapter, dtype, attn_implementation, max_length "
                f"or system_prompt: got {', '.join(sorted(unknown))}"
            )
        check_choice("dtype", dtype, DTYPES)
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size must be a whole number of at least 1: got {batch_size!r}")
        self.accelerator = Accelerator()
        self._rank: int = self.accelerator.process_index
        self._world_size: int = self.accelerator.num_processes
        several = self._world_size > 1
        own = self.accelerator.device
        self._device = own if several or device is None else torch.device(device)
        self.batch_size = int(batch_size)
        model: Any = AutoModelForImageTextToText.from_pretrained(
            pretrained,
            dtype=dtype,
            use_safetensors=True,
            attn_implementation=attn_implementation,
        )
        model = model.to(self._device).eval()
        if adapter is not None:
            load_adapter(model, Path(adapter))
        load_processor: Any = AutoProcessor.from_pretrained
        self._responder = Responder(
            model,
            load_processor(pretrained),
            max_length=max_length,
            system_prompt=self._resolve_system_prompt(system_prompt or ""),
        )
        self._warned: set[str] = set()

    @property
    def device(self) -> torch.device:
        """Where the model is; lmms-eval gathers counts there."""
        return self._device

    def clean(self) -> None:
        """Free the model, which lmms-eval asks for before it starts a judge."""
        if hasattr(self, "_responder"):
            del self._responder
        super().clean()

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers, in the order of the requests."""
        arguments = [self._arguments(request) for request in requests]
        options = [self._options(given) for _, given, _ in arguments]
        keys = [json.dumps(given, sort_keys=True, default=str) for given in options]
        lengths = [len(text) for text, _, _ in arguments]
        results: list[GenerationResult | None] = [None] * len(requests)
        seconds, tokens = 0.0, 0
        with self._progress(len(requests)) as bar:
            for places in batches(keys, lengths, self.batch_size):
                prompts = [self._prompt(arguments[i][0], *arguments[i][2]) for i in places]
                started = time.perf_counter()
                answers = self._responder.answer(prompts, options[places[0]])
                seconds += time.perf_counter() - started
                tokens += sum(answer.output_tokens for answer in answers)
                for i, answer in zip(places, answers, strict=True):
                    results[i] = _result(answer)
                bar.update(len(places))
        self._report(seconds, tokens)
        return [result for result in results if result is not None]

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """Mean negative log-probability of each continuation (nats per token), greedy or not.

        A loss, though the name says otherwise: lmms-eval takes the smallest for the choice, and its
        own models return it so. The pair comes as the `text` of a result: of a bare pair lmms-eval
        0.7.3 makes a string, which no metric of likelihoods can read.
        """
        results = []
        with self._progress(len(requests)) as bar:
            for request in requests:
                text, target, to_visual, doc_id, task, split = request.args
                doc = self.task_dict[task][split][doc_id]
                continuation = target if isinstance(target, str) else str(target(doc))
                prompt = question(text, _images(to_visual(doc)))
                mean, greedy = self._responder.score(prompt, continuation)
                results.append(GenerationResult(text=(-mean, greedy)))
                bar.update(1)
        return results

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not served.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("fastalign serves tasks of one round: generate_until")

    def _arguments(self, request: Instance) -> tuple[str, dict[str, Any], tuple[Any, ...]]:
        """Text, generation settings, and what `_prompt` needs."""
        text, options, to_visual, doc_id, task, split = request.args
        return text, options, (to_visual, doc_id, task, split)

    def _prompt(self, text: str, source: Any, doc_id: int, task: str, split: str) -> Prompt:
        return question(text, _images(source(self.task_dict[task][split][doc_id])))

    def _options(self, given: dict[str, Any]) -> dict[str, Any]:
        until = given.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        options = {**given, "until": [end for end in until if end != _FILLED_IN]}
        unknown = self._responder.unknown_options(options) - self._warned
        if unknown:
            self._warned |= unknown
            logger.warning(f"generation settings that fastalign does not use: {sorted(unknown)}")
        return options

    def _progress(self, total: int) -> Any:
        return tqdm(total=total, disable=self.rank != 0, desc="Model Responding")

    def _report(self, seconds: float, tokens: int) -> None:
        from lmms_eval.models.model_utils.gen_metrics import log_metrics

        log_metrics(
            total_elapsed_time=seconds,
            total_gen_tokens=tokens,
            avg_speed=tokens / seconds if seconds else 0.0,
            additional_metrics={"rank": self.rank},
        )


class FastAlignChat(FastAlign):
    """The same for tasks of messages: text and images in the order that the task gives them."""

    is_simple = False

    def _arguments(self, request: Instance) -> tuple[str, dict[str, Any], tuple[Any, ...]]:
        text, to_messages, options, doc_id, task, split = request.args
        return text, options, (to_messages, doc_id, task, split)

    def _prompt(self, text: str, source: Any, doc_id: int, task: str, split: str) -> Prompt:
        messages, images = [], []
        for message in source(self.task_dict[task][split][doc_id]):
            content: list[dict[str, Any]] = []
            for part in message["content"]:
                if part["type"] == "text":
                    content.append({"type": "text", "text": part["text"]})
                else:
                    images += _images([part["url"]])
                    content.append({"type": "image"})
            messages.append({"role": message["role"], "content": content})
        return Prompt(tuple(messages), tuple(images))


def _images(visuals: Sequence[Any] | None) -> list[Image.Image]:
    """The images of a document, upright and in RGB.

    Raises:
        ValueError: One is a video or a sound.
    """
    images = []
    for visual in visuals or ():
        named = isinstance(visual, str) and Path(visual).suffix.lower() in IMAGE_SUFFIXES
        if not named and not isinstance(visual, Image.Image):
            raise ValueError(
                f"a task for fastalign must show images: got {type(visual).__name__} {visual!r:.80}"
            )
        images.append(open_image(visual))
    return images


def _result(answer: Answer) -> GenerationResult:
    counts = TokenCounts(input_tokens=answer.input_tokens, output_tokens=answer.output_tokens)
    return GenerationResult(text=answer.text, token_counts=counts)
