"""What `lyrics plan` says, against published sizes, other implementations' counts and the stages' own steps."""

import re
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import InstructBlipQFormerConfig, InstructBlipQFormerModel

from lyrics import compose
from lyrics import config as schema
from lyrics.config import Config
from lyrics.errors import InputError
from lyrics.model.inputs import TextTokenizer, VisualBatch
from lyrics.model.local_tokens import LocalFeatures
from lyrics.plan import costs, memory, parts, report, steps, storage
from lyrics.plan.hardware import GIB, Assumptions, Hardware, read_assumptions, read_hardware
from lyrics.train import losses
from lyrics.train.stage1 import Objectives
from lyrics.train.stage1_batches import Stage1Batch

ROOT = Path(__file__).parents[1]
RUN = ROOT / "params/run.yaml"


def config_of(preset: str, *settings: str) -> Config:
    return schema.parse(compose.preview([f"preset={preset}", *settings], RUN))


def assumed(preset: str) -> Assumptions:
    return read_assumptions(preset, ROOT / "params")


def hardware(name: str) -> Hardware:
    return read_hardware(name, ROOT / "params")


@pytest.fixture(scope="module")
def paper() -> parts.Parts:
    return parts.build(config_of("paper"), assumed("paper"))


def test_papers_parts_have_their_published_sizes(paper: parts.Parts) -> None:
    found = {row.name.strip(): row.total / 1e6 for row in parts.counts(paper, assumed("paper"))}
    published = {
        "image encoder": 303.2,
        "without its last layer (used)": 290.6,
        "segmenter": 641.1,
        "its image encoder": 637.0,
        "Q-Former as InstructBLIP's": 182.1,
        "language model": 13016,
    }
    assert {name: found[name] for name in published} == pytest.approx(published, rel=1e-3)
    assert all(p.is_meta for p in paper.llm.parameters())


@pytest.mark.parametrize(("width", "millions"), [(1024, 182.1), (1408, 185.7)])
def test_the_q_former_row_counts_what_transformers_counts(width: int, millions: float) -> None:
    """Its InstructBLIP Q-Former: text embeddings and layers, without queries and heads; exactly, not within 0.1 %."""
    with torch.device("meta"):
        theirs = InstructBlipQFormerModel(InstructBlipQFormerConfig(vocab_size=30523, encoder_hidden_size=width))
    config = config_of("paper", "mq_former.grounding_queries=0", f"foundation.clip.hidden_size={width}")
    ours = parts.build(config, assumed("paper"))
    rows = {row.name.strip(): row for row in parts.counts(ours, assumed("paper"))}
    assert rows["Q-Former as InstructBLIP's"].total == parts.size(theirs)
    assert parts.size(theirs) / 1e6 == pytest.approx(millions, rel=1e-3)


def test_the_rows_of_mq_former_add_up_and_stage_2_trains_no_heads(paper: parts.Parts) -> None:
    rows = {row.name: row for row in parts.counts(paper, assumed("paper"))}
    whole = rows["MQ-Former, all of it"]
    inside = [rows[label] for label in parts._MQ_FORMER]
    assert whole.total == sum(row.total for row in inside) == parts.size(paper.mq_former)
    assert whole.stage2 == whole.total - rows["  heads of stage 1"].total
    assert rows["language model"].stage2 == 0 and rows["LoRA adapter"].stage2 == rows["LoRA adapter"].total


def test_cached_features_take_what_a_shard_takes() -> None:
    """tiny's summary.json: 65 × 192 image tokens, 10 objects × (160 + 64)."""
    built = parts.build(config_of("tiny"), assumed("tiny"))
    assert storage.picture_bytes(config_of("tiny"), built) == (65 * 192 + 10 * (160 + 64)) * 2


def small(*settings: str) -> Config:
    sizes = ["hidden_size=32", "layers=2", "heads=2", "intermediate_size=64"]
    return config_of("tiny", *(f"mq_former.{size}" for size in sizes), "stage1.batch_size=4", *settings)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_products_and_activations_without_data_are_those_with_data(stage: str) -> None:
    config = small("stage1.precision=fp32", "stage2.precision=fp32", "stage2.batch_size=4")
    cost = memory.meter(stage, config, assumed("tiny"), hardware("cpu-2"))
    built = parts.build(config, assumed("tiny"), "cpu")
    shapes = steps.shapes(config, assumed("tiny"), built.encoder.patches, 4)
    trainee = getattr(steps, stage)(config, built, shapes)
    products = 0.0
    for kind, share in enumerate(trainee.shares):
        with FlopCounterMode(display=False) as counted:
            trainee.loss(kind).backward()
        products += share * counted.get_total_flops()
    of_optimizers = costs.flops(cost.operations[-1][1])
    assert cost.flops - of_optimizers == pytest.approx(products, rel=1e-9)


def own_batch(shapes: steps.Shapes, widths: tuple[int, int, int]) -> Stage1Batch:
    """A batch of the stage's own with the planned lengths and no two pictures alike."""
    image, detector, segmenter = widths
    batch, objects, hidden = shapes.batch, shapes.objects, shapes.masked
    local = LocalFeatures(
        detector_BND=torch.randn(batch, objects, detector),
        segmenter_BND=torch.randn(batch, objects, segmenter),
        tag_ids_BNK=torch.ones(batch, objects, shapes.tag_tokens, dtype=torch.long),
        boxes_BN4=torch.rand(batch, objects, 4),
        object_mask_BN=torch.ones(batch, objects, dtype=torch.bool),
    )
    return Stage1Batch(
        ids=tuple("abcd"),
        visual=VisualBatch(image_tokens_BPD=torch.randn(batch, shapes.patches, image), local=local),
        caption_rows=[[7] * shapes.caption] * batch,
        spatial_rows=[[7] * shapes.spatial] * batch,
        same_caption_BB=torch.eye(batch, dtype=torch.bool),
        same_spatial_BB=torch.eye(batch, dtype=torch.bool),
        msp_rows=[[7] * shapes.spatial] * batch,
        msp_labels=[[7] * hidden + [losses.IGNORED] * (shapes.spatial - hidden)] * batch,
        hidden_tag_BN=torch.zeros(batch, objects, dtype=torch.bool),
        hidden_box_BN=torch.zeros(batch, objects, dtype=torch.bool),
        uniform_B2=torch.rand(batch, 2, dtype=torch.float64),
    )


def test_a_planned_step_of_stage_1_multiplies_what_the_stage_multiplies() -> None:
    config = small("stage1.precision=fp32", "stage1.objectives=all")
    built = parts.build(config, assumed("tiny"), "cpu")
    shapes = steps.shapes(config, assumed("tiny"), built.encoder.patches, 4)
    sizes = built.mq_former.config
    tokenizer = object.__new__(TextTokenizer)
    tokenizer.pad, tokenizer.cls, tokenizer.sep, tokenizer.mask, tokenizer.dec = range(5)
    stage = Objectives(built.mq_former, tokenizer, itc_cross_query=True, smoothing=0.1)
    batch = own_batch(shapes, (sizes.image_width, sizes.detector_width, sizes.segmenter_width))
    with FlopCounterMode(display=False) as own:
        torch.stack(list(stage(batch, ("align", "generate")).values())).sum().backward()
    with FlopCounterMode(display=False) as planned:
        steps.stage1(config, built, shapes).loss(0).backward()
    assert planned.get_total_flops() == pytest.approx(own.get_total_flops(), rel=0.02)


def test_the_optimizer_and_gradients_hold_what_adamw_holds() -> None:
    config = small("stage1.optimizer.algorithm=adamw")
    cost = memory.meter("stage1", config, assumed("tiny"), hardware("cpu-2"))
    assert cost.gradients == cost.weights
    assert cost.optimizer == pytest.approx(2 * cost.weights, rel=1e-3)


def test_strategies_divide_what_they_say() -> None:
    cost = memory.StageCost(
        batch=8,
        weights=800,
        gradients=80,
        optimizer=160,
        largest_block=10,
        fixed_activations=0.0,
        activations_per_sample=GIB,
        operations=[],
    )
    one, ddp, fsdp = memory.strategies(cost, 64, hardware("h100-8"))
    assert (one.batch, ddp.batch, fsdp.batch) == (64, 8, 8)
    assert (ddp.weights, ddp.gradients, ddp.optimizer) == (800, 80, 160)
    assert (fsdp.weights, fsdp.gradients, fsdp.optimizer) == (800 / 8 + 2 * 10, 10, 20)
    assert one.activations == 64 * GIB and ddp.activations == 8 * GIB
    assert one.largest_batch == 78  # 80 GiB without 1.5 for the runtime and the bytes above


def test_a_roofline_waits_for_the_slower_of_products_and_traffic() -> None:
    machine = hardware("h100")
    products = costs.Operation(flops=int(6e14), moved=8, half=True)
    traffic = costs.Operation(flops=8, moved=int(2.7e12), half=False)
    assert costs.seconds([products], machine) == pytest.approx(1.0, rel=1e-3)
    assert costs.seconds([products, traffic], machine) == pytest.approx(2.0, rel=1e-3)


def test_fused_attention_keeps_no_probabilities() -> None:
    def peak(fused: bool) -> int:
        with costs.metered(fused_attention=fused) as counted:
            q, k, v = (torch.empty(2, 4, 256, 16, requires_grad=True) for _ in range(3))
            mask = torch.ones(2, 1, 256, 256, dtype=torch.bool)
            counted.forget()
            before = counted.live
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.1)
            found = counted.peak - before
            out.sum().backward()
            assert q.grad is not None and costs.flops(counted.operations) > 0
        return found

    assert peak(True) < 2 * 4 * 256 * 256 * 4 < peak(False)
    q = torch.randn(1, 1, 4, 8)
    assert torch.nn.functional.scaled_dot_product_attention(q, q, q).shape == q.shape  # put back


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["preset=huge"], "preset 'huge'.* choices: laptop, paper, tiny"),
        (["hardware=abacus"], "hardware 'abacus' is unknown; choices: a100-8, cpu-2, h100, h100-8"),
        (["stage1.stepz=3"], "stage1.stepz .* unknown key; keys there: batch_size"),
        (["stage1.steps=-3"], "stage1.steps"),
        (["pairs=many"], "pairs is 'many'; expected a whole number above 0"),
        (["nonsense"], "'nonsense' is not of the form key=value"),
        (["preset=paper", "foundation.llm.name=some/model"], "foundation.llm.name is some/model, whose sizes"),
    ],
)
def test_a_mistake_is_one_sentence_with_the_choices(settings: list[str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        report.plan(settings, run=RUN)


def test_hardware_of_the_users_own_is_read_and_checked(tmp_path: Path) -> None:
    folder = tmp_path / "hardware"
    folder.mkdir()
    (folder / "mine.yaml").write_text((ROOT / "params/hardware/h100.yaml").read_text())
    assert read_hardware("mine", tmp_path).devices == 1
    (folder / "mine.yaml").write_text("devices: 0\n")
    with pytest.raises(InputError, match=r"mine.yaml was refused \(.*devices: .*it holds kind, devices, memory_gib"):
        read_hardware("mine", tmp_path)


def test_every_preset_has_its_assumptions_and_their_hardware() -> None:
    for preset in (ROOT / "params/preset").glob("*.yaml"):
        assert hardware(assumed(preset.stem).hardware).devices >= 1


def test_the_readme_shows_what_the_command_prints() -> None:
    readme = (ROOT / "README.md").read_text()
    shown = re.search(r"^```text\n(preset paper,.*?)```$", readme, re.MULTILINE | re.DOTALL)
    assert shown is not None
    assert shown[1].strip() == report.text(report.plan(["preset=paper"], run=RUN)).strip()
