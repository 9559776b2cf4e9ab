"""Every class of transformers with a head: adapted, trained one step, saved, and loaded by stock PEFT and by us.

The small models and their batches are rows of `tests/support/tasks.py`.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerState, TrainingArguments

from plasticity_peft import load_adapter
from plasticity_peft.adapters.what_trains import check_has_head
from plasticity_peft.components.architecture import find_architecture
from plasticity_peft.components.wrappers import forward_parameters
from plasticity_peft.errors import ModelError
from tests.support.deprecations import Log
from tests.support.families import FIVE
from tests.support.models import moved
from tests.support.outputs import answers, difference
from tests.support.round_trips import adapt, fresh_base, save_case, stock_answers
from tests.support.tasks import COUNT, LORA_IS_LOST, STOCK_REFUSES, TASKS, Task

MODES = ("lora", "full")
TRAINED = ("vit", "segformer-semantic", "glpn", "videomae", "clip-towers", "mask2former", "upernet-swin")
"""Those that the Trainer is run on."""
CASES, CLASSES = 189, 83
"""How many adapters are saved and loaded, and of how many classes for a task there is a row."""
REFUSED = "no component is found: test_sweep.py holds the reasons"
NOT_BUILT = "it cannot be built from its default config here"
IN_TEXT = "it answers in text: beside the vision tower nothing trains, as with LlavaForConditionalGeneration"
UNNAMED = "its head is refused until it is named, as that of CLIPSegForImageSegmentation"
TOO_BIG = "it takes minutes to build at its default size"
LEFT_OUT = {
    IN_TEXT: """
        AriaForConditionalGeneration Blip2ForConditionalGeneration BlipForConditionalGeneration
        Cohere2VisionForConditionalGeneration DeepseekVLForConditionalGeneration Gemma3ForConditionalGeneration
        GitForCausalLM Idefics3ForConditionalGeneration InstructBlipForConditionalGeneration
        InstructBlipVideoForConditionalGeneration InternVLForConditionalGeneration JanusForConditionalGeneration
        Kosmos2ForConditionalGeneration Lfm2VlForConditionalGeneration LlavaNextForConditionalGeneration
        LlavaNextVideoForConditionalGeneration LlavaOnevisionForConditionalGeneration
        QianfanOCRForConditionalGeneration SmolVLMForConditionalGeneration T5Gemma2ForConditionalGeneration
    """,
    UNNAMED: """
        ColModernVBertForRetrieval FlavaForPreTraining MMGroundingDinoForObjectDetection PI0ForConditionalGeneration
        ShieldGemma2ForImageClassification T5Gemma2ForSequenceClassification T5Gemma2ForTokenClassification
        UltraVBertForMaskedLM UltraVBertForSequenceClassification UltraVBertForTokenClassification
    """,
    NOT_BUILT: """
        AyaVisionForConditionalGeneration BridgeTowerForContrastiveLearning ChameleonForConditionalGeneration
        CohereCompassForConditionalGeneration ConditionalDetrForSegmentation DeepseekOcr2ForConditionalGeneration
        DinatForImageClassification Emu3ForConditionalGeneration FastVlmForConditionalGeneration
        Gemma3nForConditionalGeneration Granite4VisionForConditionalGeneration HunYuanVLForConditionalGeneration
        OmDetTurboForObjectDetection PPOCRV5ServerDetForObjectDetection PPOCRV6MediumDetForObjectDetection
        PerceiverForImageClassificationConvProcessing PerceiverForImageClassificationFourier
        PerceptionLMForConditionalGeneration Qwen4ExpForConditionalGeneration TimmWrapperForImageClassification
        ViltForImagesAndTextClassification
    """,
    TOO_BIG: """
        Molmo2ForConditionalGeneration MuseGlimmerForConditionalGeneration MuseSparkForConditionalGeneration
        Qwen3_5ForConditionalGeneration
    """,
}
HANDFUL = ("vit", "clip-towers", "mask2former", "glpn", "upernet-dinov2")
"""One each of classification, two towers, a mask decoder, depth, and a backbone inside another model."""


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model card is written: its picture takes longer than all the rest."""
    monkeypatch.setattr("plasticity_peft.adapters.peft_model.complete_card", lambda *_: None)


def wrong(cases: list[tuple[str, str]], folder: Path) -> list[str]:
    """Returns what goes wrong where an adapter is saved and loaded, for each case a task and how it is trained."""
    problems, saved = [], []
    for name, training in cases:
        place = folder / f"{name}-{training}"
        place.mkdir()
        try:
            problem = save_case(TASKS[name], training, place)
            saved.append(place)
        except Exception as error:  # the other cases are wanted too
            problem = f"{type(error).__name__}: {error}"
        problems += [f"{place.name}: {problem}"] if problem else []
    stock = stock_answers(saved)
    assert set(stock) == {place.name for place in saved}
    return problems + [f"{name}, stock PEFT: {found}" for name, found in stock.items() if found != "equal"]


@pytest.mark.filterwarnings("ignore:.*timm:UserWarning")
def test_a_handful_of_classes_answers_the_same_when_loaded(tmp_path: Path) -> None:
    """One mode each: of the other one, `pytest -m slow` sees to it, for these and all others."""
    cases = [(name, MODES[number % 2]) for number, name in enumerate(HANDFUL) if TASKS[name].available]
    assert not wrong(cases, tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_class_answers_the_same_when_loaded(
    tmp_path: Path, record_property: Callable[[str, object], None], no_deprecation_is_logged: Log
) -> None:
    if not FIVE:
        pytest.skip("the small models are those of transformers 5; the handful runs under 4 too")
    names = [name for name in TASKS if name not in STOCK_REFUSES]
    cases = [(name, mode) for name in names for mode in MODES if mode == "full" or name not in LORA_IS_LOST]
    problems = wrong(cases, tmp_path)
    assert not problems, "\n".join(problems)
    record_property("adapters that were saved and loaded", len(cases))
    assert len(cases) == CASES
    # A class that transformers is about to drop is still tried.
    others = [message for message in no_deprecation_is_logged.messages if "`BlipModel` is going to be" not in message]
    assert not others
    no_deprecation_is_logged.messages.clear()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_class_is_trained_with_labels_if_it_has_a_loss() -> None:
    """Those that are given none take none, or transformers says that it cannot train them yet."""
    for name, task in TASKS.items():
        if not task.available or task.labels or name in STOCK_REFUSES:
            continue
        model = task.build()
        if {"labels", "return_loss", "mask_labels"} & set(forward_parameters(model)):
            with pytest.raises(NotImplementedError, match=r"[Tt]raining is not"):
                model(**task.images(), labels=torch.zeros(COUNT, 16, 16))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TRAINED)
def test_the_trainer_loads_the_best_and_goes_on(name: str, tmp_path: Path) -> None:
    task = TASKS[name]
    best, trainer = trained(task, tmp_path, epochs=3)
    expected = answers(best, batch_of(task))
    folder = trainer.state.best_model_checkpoint
    loaded = load_adapter(fresh_base(task, task.build()), folder)
    assert difference(answers(loaded, batch_of(task)), expected) is None
    assert (trainer.state.best_global_step, trainer.state.global_step) == (1, 3)
    _, longer = trained(task, tmp_path, epochs=4, resume_from_checkpoint=True)
    assert longer.state.global_step == 4


class FirstIsBest(TrainerCallback):
    """Sees to it that a loss grows with every step."""

    def on_evaluate(self, args: object, state: TrainerState, control: object, **options: Any) -> None:
        options["metrics"]["eval_loss"] = float(state.global_step)


def batch_of(task: Task) -> dict[str, object]:
    return {**task.images(), **(task.labels() if task.labels else {})}


def trained(task: Task, folder: Path, epochs: int, **options: Any) -> tuple[PeftModel, Trainer]:
    """Returns the best model of a Trainer, to which the first step is the best."""
    model = adapt(task, task.build(), "lora")
    arguments = TrainingArguments(
        output_dir=str(folder), num_train_epochs=epochs, per_device_train_batch_size=COUNT, learning_rate=1e-2,
        lr_scheduler_type="constant", eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True,
        metric_for_best_model="loss", report_to="none", use_cpu=True, disable_tqdm=True, prediction_loss_only=True,
        remove_unused_columns=False, dataloader_pin_memory=False,
        label_names=list(task.labels() if task.labels else ()),
        # Or the Trainer multiplies the loss in place, which GLPN's, a square root, does not survive.
        average_tokens_across_devices=False,
    )  # fmt: skip
    batch = batch_of(task)
    trainer = Trainer(
        model=model, args=arguments, train_dataset=[{}] * COUNT, eval_dataset=[{}] * COUNT,
        data_collator=lambda _: dict(batch), callbacks=[FirstIsBest()],
    )  # fmt: skip
    trainer.train(**options)
    return model, trainer


def classes_with_a_head() -> Iterator[type[PreTrainedModel]]:
    """Yields the classes of transformers for a task, `...For...`, that take images."""
    for name in sorted(set(dir(transformers))):
        if not re.search("For[A-Z]", name):
            continue
        try:
            found = getattr(transformers, name)
        except Exception:  # a class whose library is missing
            continue
        if (
            inspect.isclass(found)
            and issubclass(found, PreTrainedModel)
            and found.config_class
            and takes_images(found)
        ):
            yield found


def takes_images(model_class: type[PreTrainedModel]) -> bool:
    names = [*inspect.signature(inspect.unwrap(model_class.forward)).parameters, str(model_class.main_input_name)]
    return model_class.__module__.startswith("transformers.") and any(
        name.startswith("pixel_values") for name in names
    )


def kind_of(model_class: type[PreTrainedModel]) -> str:
    """Returns what there is to say of a class without a row, by what comes of it at its default size."""
    try:
        with torch.device("meta"):
            model = model_class(model_class.config_class())
    except Exception:
        return NOT_BUILT
    try:
        architecture = find_architecture(model)
    except ModelError:
        return REFUSED
    if not architecture.heads and model.can_generate():
        return IN_TEXT
    try:
        check_has_head(model, architecture, None)
    except ModelError:
        return UNNAMED
    return f"a head was found, {architecture.heads}, and it is not tried: it needs a row"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_class_with_a_head_is_tried_or_left_out_for_a_reason(
    record_property: Callable[[str, object], None],
) -> None:
    expected = {name: reason for reason, names in LEFT_OUT.items() for name in names.split()}
    tried = {task.model for task in TASKS.values()}
    counts: Counter[str] = Counter()
    problems, seen = [], set()
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    for model_class in classes_with_a_head():
        name = model_class.__name__
        seen.add(name)
        if name in tried:
            counts["tried"] += 1
            problems += [f"{name} is tried, and its reason is stale"] if name in expected else []
            continue
        due = expected.get(name, REFUSED)
        found = due if due == TOO_BIG else kind_of(model_class)
        counts[found] += 1
        if found != due:
            problems.append(f"{name}: expected {due}; {found}")
    transformers.logging.set_verbosity(level)
    if FIVE:
        problems += [f"{name}: transformers has no such class" for name in sorted(set(expected) - seen)]
        assert counts["tried"] == CLASSES, counts
    record_property("classes with a head", dict(counts))
    assert not problems, "\n".join(problems)


@pytest.mark.filterwarnings("ignore")
def test_lora_that_peft_would_not_find_again_is_refused() -> None:
    """MaskFormer: transformers renames its decoder when it loads a checkpoint, and PEFT renames its backbone along."""
    if not FIVE:
        pytest.skip("nothing is renamed under transformers 4")
    task = TASKS["maskformer"]
    model = task.build()
    query = next(name for name, _ in model.named_modules() if name.endswith("attention.self.query"))
    weights = get_peft_model_state_dict(get_peft_model(model, LoraConfig(target_modules=[query], r=2)))
    other = get_peft_model(task.build(), LoraConfig(target_modules=[query], r=2))
    assert any("lora_" in key for key in set_peft_model_state_dict(other, weights).missing_keys)
    with pytest.raises(
        ModelError, match=r"cannot load LoRA weights of .*It is so for MHA, FC1, FC2.* training=\"full\""
    ):
        adapt(task, task.build(), "lora")
    adapt(task, task.build(), "lora", candidates=("LN1", "LN2"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", STOCK_REFUSES)
def test_what_stock_peft_refuses_is_refused_in_the_same_words(name: str) -> None:
    if not FIVE:
        pytest.skip("transformers 4 knows the embeddings of these classes")
    task = TASKS[name]
    layer = next(path for path, module in task.build().named_modules() if isinstance(module, nn.Linear))
    with pytest.raises(NotImplementedError, match=r"get_input_embeddings"):
        get_peft_model(task.build(), LoraConfig(target_modules=[layer]))
    model = task.build()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(NotImplementedError, match=r"get_input_embeddings"):
        adapt(task, model, "full")
    assert {key: value.shape for key, value in model.state_dict().items()} == {k: v.shape for k, v in before.items()}


def test_plain_lora_on_both_towers_is_loaded(tmp_path: Path) -> None:
    """The layers of the tower for text have the names of those for images."""
    task = TASKS["clip-towers"]
    stock = moved(get_peft_model(task.build(), LoraConfig(target_modules=["q_proj", "fc1"], r=2)))
    assert {"text_model", "vision_model"} <= {
        name.split(".")[2] for name, p in stock.named_parameters() if p.requires_grad
    }
    stock.save_pretrained(tmp_path)
    loaded = load_adapter(task.build(), tmp_path)
    assert difference(answers(loaded, task.images()), answers(stock, task.images())) is None
