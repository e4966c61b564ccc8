"""The tools that people know: pipelines, Trainer, PEFT, offloading, quantisation, ONNX; and what Transformers asks."""

import copy
import inspect
import json
import warnings

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.models import HEADS, MODELS, build, main
from helpers.transformers_tests import COMMON
from helpers.videos import real_clips, write_clip
from torch import nn
from transformers import AutoModelForVideoClassification, Trainer, TrainingArguments, pipeline

from everest_hf import (
    EverestConfig,
    EverestForPreTraining,
    EverestForVideoClassification,
    EverestVideoProcessor,
    cli,
)
from everest_hf.data import VideoViews, collate
from everest_hf.data.transforms import normalize
from everest_hf.evaluation.evaluate import predict_videos


def clips(batch_size: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch_size, 12, 3, 24, 40, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def answer(model, pixel_values: torch.Tensor) -> torch.Tensor:
    return main(model(pixel_values))


# ------------------------------------------------------------------------------------------- one video, one answer


@pytest.fixture(scope="module", params=[{"frame_step": 3}, {"frame_sampling": "segment"}], ids=["stride", "segment"])
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model = build(EverestForVideoClassification, frame_oversampling=1.5)
    model.save_pretrained(folder)
    EverestVideoProcessor.from_config(model.config, **request.param).save_pretrained(folder)
    return folder, request.param


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> list[str]:
    """Real clips, a video that is shorter than a clip, and one that is higher than wide."""
    folder = tmp_path_factory.mktemp("videos")
    short = write_clip(folder / "short.mp4", num_frames=9)
    high = write_clip(folder / "high and long.mp4", num_frames=80, height=90, width=50)
    return [str(path) for path in (*real_clips().values(), short, high)]


def test_pipeline_command_and_evaluation_agree(checkpoint, videos, capsys):
    folder, sampling = checkpoint
    model = AutoModelForVideoClassification.from_pretrained(folder)
    config, names = model.config, model.config.id2label.values()
    rows = Dataset.from_dict({"video": videos, "label": [0] * len(videos)})
    counts = {"num_frames": config.num_frames, "num_input_frames": config.num_input_frames}
    views = VideoViews(rows, config.frame_size, num_segments=1, num_crops=1, **counts, **sampling)
    evaluated = predict_videos(
        model,
        (collate([views[i]]) for i in range(len(views))),
        to_pixel_values=lambda frames: normalize(frames, config.image_mean, config.image_std),
    )["scores"]
    assert evaluated.std(dim=0).min() > 1e-4  # the videos differ, or agreement says nothing

    by_pipeline = pipeline("video-classification", model=str(folder))(videos, top_k=len(names))
    assert cli.main(["predict", *videos, "--model", str(folder), "--top-k", str(len(names)), "--json"]) == 0
    by_command = [json.loads(line)["labels"] for line in capsys.readouterr().out.splitlines()]
    for found in (by_pipeline, by_command):
        scores = [{entry["label"]: entry["score"] for entry in entries} for entries in found]
        scores = torch.tensor([[entries[name] for name in names] for entries in scores])
        torch.testing.assert_close(scores, evaluated, atol=1e-6, rtol=0)


def test_pipeline_gives_the_best_few(checkpoint, videos):
    classify = pipeline("video-classification", model=str(checkpoint[0]))
    every = classify(videos[0], top_k=99)
    assert len(every) == 5
    assert classify(videos[0], top_k=2) == every[:2]
    assert [entry["score"] for entry in every] == sorted((entry["score"] for entry in every), reverse=True)


@pytest.mark.parametrize("num_labels", [1, 5])
def test_pipeline_gives_scores_of_the_kind_that_the_labels_were(num_labels, videos, tmp_path):
    model = build(EverestForVideoClassification, num_labels=num_labels)
    processor = EverestVideoProcessor.from_config(model.config)
    model(clips(), labels=torch.rand(2, num_labels)).loss.backward()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    found = pipeline("video-classification", model=str(tmp_path))(videos[0], top_k=num_labels)
    logits = answer(model, processor(videos[0], return_tensors="pt")["pixel_values"])[0]
    expected = (logits if num_labels == 1 else logits.sigmoid()).sort(descending=True).values
    torch.testing.assert_close(torch.tensor([entry["score"] for entry in found]), expected, atol=1e-6, rtol=0)


# ----------------------------------------------------------------------------------------------------------- Trainer


class Clips(torch.utils.data.Dataset):
    """Eight clips, with labels for the classifier."""

    def __init__(self, model_class):
        self.labelled = model_class is EverestForVideoClassification

    def __len__(self):
        return 8

    def __getitem__(self, index):
        item = {"pixel_values": clips(1, seed=index)[0]}
        return {**item, "labels": index % 5} if self.labelled else item


def trainer(model_class, folder, **options) -> Trainer:
    arguments = TrainingArguments(
        str(folder),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        per_device_train_batch_size=2,
        max_steps=4,
        learning_rate=1e-2,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        seed=3,
        **options,
    )
    model = build(model_class, drop_path_rate=0.2, hidden_dropout_prob=0.1)
    metrics = None if model_class is EverestForPreTraining else lambda p: {"top1": np.mean(p[0].argmax(-1) == p[1])}
    return Trainer(
        model, arguments, train_dataset=Clips(model_class), eval_dataset=Clips(model_class), compute_metrics=metrics
    )


@pytest.mark.parametrize("model_class", HEADS)
def test_trainer_trains_evaluates_and_resumes(model_class, tmp_path):
    whole = trainer(model_class, tmp_path / "whole")
    before = copy.deepcopy(whole.model.state_dict())
    whole.train()
    assert not [name for name, weight in whole.model.named_parameters() if torch.equal(weight, before[name])]
    figures = [line for line in whole.state.log_history if "eval_loss" in line]
    assert len(figures) == 2
    assert all(np.isfinite(line["eval_loss"]) for line in figures)
    if model_class is EverestForVideoClassification:
        predicted = whole.predict(Clips(model_class))
        assert predicted.predictions.shape == (8, 5)  # logits alone
        assert figures[-1]["eval_top1"] == predicted.metrics["test_top1"]
    resumed = trainer(model_class, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, weight in resumed.model.state_dict().items():
        assert torch.equal(weight, whole.model.state_dict()[name]), name


# -------------------------------------------------------------------------------------------------------------- PEFT


@pytest.mark.parametrize("targets", [["query", "value"], "all-linear"])
def test_lora_learns_saves_and_merges(targets, tmp_path):
    peft = pytest.importorskip("peft")
    model, pixel_values = build(EverestForVideoClassification), clips(4)
    before, start = copy.deepcopy(model.state_dict()), answer(model, pixel_values)
    config = peft.LoraConfig(r=2, target_modules=targets, modules_to_save=["classifier"])
    adapted = peft.get_peft_model(model, config)
    torch.testing.assert_close(answer(adapted, pixel_values), start)  # an adapter starts as nothing
    trained = [weight for weight in adapted.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    adapted.train()
    for _ in range(3):
        adapted(pixel_values, labels=torch.tensor([0, 1, 2, 3])).loss.backward()
        assert all(weight.grad is not None for weight in trained)
        optimizer.step()
        optimizer.zero_grad()
    adapted.eval()
    learned = answer(adapted, pixel_values)
    assert (learned - start).abs().max() > 0.01
    for name, weight in adapted.named_parameters():  # those of the base are as they were
        own = name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".original_module", "")
        assert own not in before or torch.equal(weight, before[own]), name

    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(build(EverestForVideoClassification), tmp_path).eval()
    torch.testing.assert_close(answer(again, pixel_values), learned)
    merged = adapted.merge_and_unload()
    assert type(merged) is EverestForVideoClassification
    assert set(merged.state_dict()) == set(before)
    torch.testing.assert_close(answer(merged, pixel_values), learned, atol=1e-5, rtol=1e-4)


# -------------------------------------------------------------------------------- offloading, quantisation, export


@pytest.mark.parametrize("model_class", MODELS)
def test_what_does_not_fit_is_read_from_disk(model_class, tmp_path):
    model = build(model_class, num_hidden_layers=4)
    model.save_pretrained(tmp_path / "model", max_shard_size="40KB")
    room = int(0.9 * sum(weight.nbytes for weight in model.parameters()))
    offloaded = model_class.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory={"cpu": room}, offload_folder=str(tmp_path / "disk")
    )
    assert {"cpu", "disk"} <= set(offloaded.hf_device_map.values())
    assert any(weight.is_meta for weight in offloaded.parameters())
    torch.testing.assert_close(answer(offloaded, clips()), answer(model, clips()), atol=1e-6, rtol=1e-6)


def by_torch(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it names torchao, which not everyone has
        torch.ao.quantization.quantize_dynamic(model.everest.encoder, {nn.Linear}, dtype=torch.qint8, inplace=True)


def by_torchao(model):
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(model.everest.encoder, torchao.Int8DynamicActivationInt8WeightConfig())


class PlainLinear(nn.Linear):
    """A linear layer that takes nothing but its input, as quantised ones do, with its weights in 8 bits."""

    def __init__(self, layer: nn.Linear):
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, dtype=layer.weight.dtype)
        scale = layer.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.weight = nn.Parameter((layer.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.scale = nn.Parameter(scale)
        self.bias = layer.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def replace_linear(module):
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, PlainLinear(child))
        else:
            replace_linear(child)


def by_replacement(model):
    """Replace every linear layer, the patch projection too, as quanto does."""
    replace_linear(model.everest)


def whole_by_torchao(model):
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())


def by_quanto(model):
    quanto = pytest.importorskip("optimum.quanto")
    quanto.quantize(model.everest, weights=quanto.qint8)
    quanto.freeze(model.everest)


@pytest.mark.parametrize("quantize", [by_replacement, whole_by_torchao, by_quanto])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_patch_projection_is_quantised_like_any_linear_layer(quantize, dtype):
    model = build(EverestForVideoClassification).to(dtype)
    small = copy.deepcopy(model)
    quantize(small)
    pixel_values = clips().to(dtype)
    mask = torch.arange(60).expand(2, -1) < 33  # the same tokens for both: near scores may change places
    with torch.no_grad():
        exact, near = (each(pixel_values, bool_masked_pos=mask, output_scores=True) for each in (model, small))
        assert small(pixel_values).logits.isfinite().all()
    assert near.scores.dtype == torch.float32
    for name in ("scores", "logits"):
        error = (near[name] - exact[name]).abs().max() / exact[name].std()
        assert 0 < error < (0.1 if dtype == torch.float32 else 0.3), name


@pytest.mark.parametrize("quantize", [by_torch, by_torchao])
def test_layers_of_eight_bits_give_nearly_the_same(quantize):
    model = build(EverestForVideoClassification)
    small = copy.deepcopy(model)
    quantize(small)
    exact, near = model(clips()), small(clips())
    assert torch.equal(near.kept_ids, exact.kept_ids)
    error = (near.logits - exact.logits).abs().max() / exact.logits.std()
    assert 0 < error < 0.1


@pytest.mark.parametrize("model_class", HEADS)
def test_onnx_gives_the_same_for_any_number_of_clips(model_class, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, path = build(model_class), tmp_path / "model.onnx"
    batch = torch.export.Dim("batch", min=1, max=64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            kwargs={"pixel_values": clips()},
            f=path,
            dynamo=True,
            dynamic_shapes={"pixel_values": {0: batch}},
            verbose=False,
        )
    session = runtime.InferenceSession(path)
    for batch_size in (1, 3):
        pixel_values = clips(batch_size, seed=batch_size)
        (name,) = [given.name for given in session.get_inputs()]
        found = session.run(None, {name: pixel_values.numpy()})
        expected = [value for value in model(pixel_values).values() if value is not None]
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(one), other.detach(), atol=1e-4, rtol=1e-4)


# ------------------------------------------------------- what Transformers' own tests ask of every model, beside what the
# other files here test: saving and loading, initialisation, outputs, eager and fused attention, gradient checkpointing,
# mismatched heads, problem types, precision, compilation, export.


@pytest.mark.parametrize("model_class", MODELS)
def test_a_clip_gives_the_same_alone_and_in_a_batch(model_class):
    model, pixel_values = build(model_class, frame_oversampling=1.0), clips(5)
    together = model(pixel_values)
    for i in range(5):
        alone = model(pixel_values[i : i + 1])
        for name in ("kept_ids", "visible_ids", "target_ids"):
            assert name not in together or torch.equal(together[name][i : i + 1], alone[name])
        torch.testing.assert_close(main(together)[i : i + 1], main(alone), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model_class", MODELS)
def test_states_and_attentions_keep_their_gradients(model_class):
    output = build(model_class)(clips(), output_hidden_states=True, output_attentions=True)
    for value in (*output.hidden_states, *output.attentions):
        value.retain_grad()
    main(output).square().sum().backward()
    for value in (*output.hidden_states, *output.attentions):
        assert value.grad.abs().max() > 0


@pytest.mark.parametrize("model_class", MODELS)
def test_the_main_input_comes_first(model_class):
    arguments = list(inspect.signature(model_class.forward).parameters)
    assert arguments[:2] == ["self", model_class.main_input_name]


@pytest.mark.parametrize("model_class", MODELS)
def test_input_embeddings_can_be_had_and_replaced(model_class):
    model = build(model_class)
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings, nn.Module)
    assert model.get_output_embeddings() is None
    replaced = copy.deepcopy(embeddings)
    nn.init.zeros_(replaced.weight)
    before = answer(model, clips())
    model.set_input_embeddings(replaced)
    assert model.get_input_embeddings() is replaced
    assert not torch.equal(answer(model, clips()), before)


@pytest.mark.parametrize("model_class", MODELS)
def test_the_attention_can_be_changed_at_any_time(model_class):
    model = build(model_class)
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        assert {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")} == {
            name
        }


@pytest.mark.parametrize("model_class", MODELS)
def test_a_model_survives_torch_save(model_class, tmp_path):
    model = build(model_class)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(answer(loaded, clips()), answer(model, clips()))


def test_a_part_of_a_repository_holds_a_model(tmp_path):
    model = build(EverestForVideoClassification)
    model.save_pretrained(tmp_path / "tiny" / "model")
    assert EverestConfig.from_pretrained(tmp_path, subfolder="tiny/model").to_dict() == model.config.to_dict()
    loaded = EverestForVideoClassification.from_pretrained(tmp_path, subfolder="tiny/model")
    torch.testing.assert_close(answer(loaded, clips()), answer(model, clips()))


def test_what_every_configuration_takes():
    config = EverestConfig(**COMMON)
    for source in (config, EverestConfig.from_dict(json.loads(config.to_json_string()))):
        for name, value in COMMON.items():
            found = getattr(source, name)
            assert (str(found).removeprefix("torch.") if name == "dtype" else found) == value, name
    assert EverestConfig(num_labels=3).id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
