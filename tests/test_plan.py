"""What `lyrics plan` says, against published sizes, other implementations' counts and the stages' own steps."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import InstructBlipQFormerConfig, InstructBlipQFormerModel

from lyrics import compose
from lyrics import config as schema
from lyrics.config import Config
from lyrics.errors import InputError
from lyrics.model.inputs import SeenImage, TextTokenizer
from lyrics.model.language import OBJECT, WORD, Conversation
from lyrics.model.lyrics import LyricsModel
from lyrics.model.mq_former import MQFormerConfig
from lyrics.plan import costs, measure, memory, parts, report, steps, storage
from lyrics.plan.hardware import GIB, Assumptions, Hardware, read_assumptions, read_hardware
from lyrics.train import losses
from lyrics.train.objectives import Objectives
from lyrics.train.stage1_batches import Stage1Batch

ROOT = Path(__file__).parents[1]
RUN = ROOT / "params/run.yaml"


def config_of(preset: str, *settings: str) -> Config:
    return schema.parse(compose.preview(["~overrides", f"preset={preset}", "data=world", *settings], RUN))


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
    sizes = ["hidden_size=32", "layers=1", "heads=2", "intermediate_size=64"]
    plain = ["stage1.precision=fp32", "stage2.precision=fp32", "stage1.batch_size=4", "stage2.batch_size=4"]
    return config_of("tiny", "foundation.llm.layers=2", *(f"mq_former.{size}" for size in sizes), *plain, *settings)


def products(run: Callable[[], Tensor]) -> int:
    with FlopCounterMode(display=False) as counted:
        run().backward()
    return counted.get_total_flops()


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_products_without_data_are_those_with_data(stage: str) -> None:
    config = small(f"{stage}.accumulate=2", f"{stage}.activation_checkpointing=true")
    cost = memory.meter(stage, config, assumed("tiny"), hardware("cpu-2"))
    trainee = steps.take(stage, config, assumed("tiny"), parts.build(config, assumed("tiny"), "cpu"), 2)
    expected = sum(
        2 * share * products(lambda kind=kind: trainee.loss(kind)) for kind, share in enumerate(trainee.shares)
    )
    assert cost.flops - costs.flops(cost.optimizer_step) == pytest.approx(expected, rel=1e-9)


class Words:
    """A tokenizer, and a chat template, of texts that are the number of their tokens: "12" has twelve."""

    pad, cls, sep, mask, dec = range(5)
    pad_rows, visual_batch = TextTokenizer.pad_rows, TextTokenizer.visual_batch

    def ids(self, text: str) -> list[int]:
        return [7] * int(text or 0)

    answer = ids

    def conversation(
        self, questions: tuple[str], answers: tuple[str], spatial_text: str, first: range, beside: Sequence[int]
    ) -> Conversation:
        told = self.ids(spatial_text.split(OBJECT)[0])
        words, answer = [*self.ids(questions[0]), *told], self.ids(answers[0])
        queries = [WORD, *first, *beside, *[WORD] * len(words + answer)]
        return Conversation([7] * len(queries), queries, ((len(queries) - len(answer), len(queries)),))


def pictures(s: steps.Shapes, sizes: MQFormerConfig) -> list[SeenImage]:
    def features(rows: int, width: int) -> np.ndarray:
        return np.random.default_rng(0).standard_normal((rows, width), dtype=np.float32)

    one = SeenImage(
        image_tokens_PD=features(s.patches, sizes.image_width),
        detector_tokens_ND=features(s.objects, sizes.detector_width),
        segmenter_tokens_ND=features(s.objects, sizes.segmenter_width),
        tags=(str(s.tag_tokens),) * s.objects,
        boxes_xyxy_N4=np.tile(np.array([0.1, 0.2, 0.3, 0.4], np.float32), (s.objects, 1)),
        spatial_text=str(s.spatial),
    )
    return [one] * s.batch


def own_batch(s: steps.Shapes, sizes: MQFormerConfig) -> Stage1Batch:
    """A batch of the stage's own with the planned lengths and no two pictures alike."""
    words: Any = Words()
    hidden_bN = torch.zeros(s.batch, s.objects, dtype=torch.bool)
    return Stage1Batch(
        own=slice(0, s.batch),
        ids=tuple("abcd"),
        visual=words.visual_batch(pictures(s, sizes)),
        caption_rows=[words.ids(str(s.caption))] * s.batch,
        spatial_rows=[words.ids(str(s.spatial))] * s.batch,
        same_caption_BB=torch.eye(s.batch, dtype=torch.bool),
        same_spatial_BB=torch.eye(s.batch, dtype=torch.bool),
        msp_rows=[words.ids(str(s.spatial))] * s.batch,
        msp_labels=[[7] * s.masked + [losses.IGNORED] * (s.spatial - s.masked)] * s.batch,
        msp_in_tag=[[False] * s.spatial] * s.batch,
        hidden_tag_bN=hidden_bN,
        hidden_box_bN=hidden_bN,
        uniform_B2=torch.rand(s.batch, 2, dtype=torch.float64),
        totals=dict.fromkeys(("itc_loss", "itc_spatial_loss", "itm_loss", "icg_loss", "msp_loss"), s.batch),
    )


@pytest.mark.parametrize("checkpointing", ["true", "false"])
def test_a_planned_step_of_stage_1_multiplies_what_the_stage_multiplies(checkpointing: str) -> None:
    config = small("stage1.objectives=all", f"stage1.activation_checkpointing={checkpointing}")
    built = parts.build(config, assumed("tiny"), "cpu")
    s = steps.shapes(config, assumed("tiny"), built.encoder.patches, 4)
    s = dataclasses.replace(s, pair=s.caption + s.spatial)  # of one length: matching pads nothing
    planned = steps.stage1(config, built, s)
    words: Any = Words()
    stage = Objectives(built.mq_former, words, itc_cross_query=True, smoothing=0.1)
    batch = own_batch(s, built.mq_former.config)
    own = products(lambda: torch.stack(list(stage(batch, ("align", "generate")).values())).sum())
    assert products(lambda: planned.loss(0)) == pytest.approx(own, rel=0.02)


def test_pairs_of_matching_are_as_long_as_said_and_at_most_their_two_texts() -> None:
    def flops(pair_tokens: int) -> float:
        given = dataclasses.replace(assumed("tiny"), pair_tokens=pair_tokens)
        return memory.meter("stage1", small(), given, hardware("cpu-2")).flops

    tiny = assumed("tiny")
    whole = tiny.caption_tokens + tiny.objects * tiny.object_tokens
    assert flops(tiny.pair_tokens) < flops(whole) == flops(10 * whole)


@pytest.mark.parametrize(("packing", "checkpointing"), [("true", "false"), ("false", "true")])
def test_a_planned_step_of_stage_2_multiplies_what_the_stage_multiplies(packing: str, checkpointing: str) -> None:
    switches = [f"stage2.packing={packing}", f"stage2.activation_checkpointing={checkpointing}"]
    config = small("stage2.first.steps=0", *switches)
    built = parts.build(config, assumed("tiny"), "cpu")
    s = dataclasses.replace(steps.shapes(config, assumed("tiny"), built.encoder.patches, 4), rows=4)
    planned = steps.stage2(config, built, s)
    words: Any = Words()
    model = LyricsModel(
        built.mq_former,
        built.projection,
        built.llm,
        text_tokenizer=words,
        template=words,
        spatial_text_in_llm=True,
        packing=config.stage2.packing,
    )
    asked = s.instruction - s.spatial - 2
    told = s.prompt - config.mq_former.visual_queries - s.objects - asked - 1
    spatial = f"{told}{' 1 2 3 4;' * s.objects}"
    texts = ([str(asked)] * 4, pictures(s, built.mq_former.config), [str(s.answer)] * 4, [spatial] * 4)
    assert products(lambda: planned.loss(0)) == pytest.approx(products(lambda: model.train()(*texts)), rel=0.02)


def test_checkpointing_compiling_and_packing_cost_less_where_they_should() -> None:
    def cost(*settings: str) -> memory.StageCost:
        config = small("stage2.first.steps=0", "stage2.packing=false", *settings)
        return memory.meter("stage2", config, dataclasses.replace(assumed("tiny"), packed_share=0.6), machine)

    machine = hardware("h100")
    plain, checkpointed = cost(), cost("stage2.activation_checkpointing=true")
    assert checkpointed.activations_per_sample < 0.8 * plain.activations_per_sample
    assert checkpointed.flops > plain.flops
    assert cost("stage2.packing=true").flops < plain.flops
    compiled = cost("stage2.compile=true")
    assert compiled.flops == plain.flops and compiled.seconds(machine) < 0.8 * plain.seconds(machine)


def test_fewer_bits_hold_the_language_models_layers_in_less() -> None:
    def held(bits: str) -> dict[str, int]:
        config = small(f"stage2.llm_bits={bits}")
        llm = parts.build(config, assumed("tiny")).llm
        found = {"layers": 0, "others": 0}
        for name, p in llm.named_parameters():
            kind = "layers" if "base_layer" in name and name.endswith("weight") else "others"
            found[kind] += memory.weight_bytes([(name, p)], config.stage2.llm_bits)
        return found

    fp32, bf16, eight, four = (held(bits) for bits in ("null", "16", "8", "4"))
    assert fp32["layers"] == 2 * bf16["layers"] == 4 * eight["layers"] == 8 * four["layers"] > 0
    assert fp32["others"] > bf16["others"] == eight["others"] == four["others"]  # embeddings; the adapter stays fp32


def test_ranks_share_a_micro_batch_and_meet_in_the_contrastive_loss() -> None:
    eight = hardware("h100-8")
    cost = memory.meter("stage1", small("stage1.batch_size=32", "stage1.processes=8"), assumed("tiny"), eight)
    alone = memory.meter("stage1", small("stage1.batch_size=4"), assumed("tiny"), eight)
    assert (cost.ranks, cost.batch, alone.ranks, alone.batch) == (8, 4, 1, 4)
    sizes = config_of("tiny").mq_former
    each = 6 * 4 * (sizes.visual_queries + sizes.grounding_queries) * sizes.projection_size  # b, forward and backward
    # Half of the steps align: own pictures with all texts and all pictures with own texts, in place of one square.
    assert cost.flops - alone.flops == pytest.approx(each * (2 * 32 - 4) / 2)


def test_the_optimizer_and_gradients_hold_what_adamw_holds() -> None:
    config = small("stage1.optimizer.algorithm=adamw")
    cost = memory.meter("stage1", config, assumed("tiny"), hardware("cpu-2"))
    assert cost.gradients == cost.weights
    assert cost.optimizer == pytest.approx(2 * cost.weights, rel=1e-3)


def test_strategies_divide_what_they_say() -> None:
    cost = memory.StageCost(
        batch=8,
        ranks=8,
        accumulate=1,
        strategy="fsdp",
        weights=800,
        gradients=80,
        optimizer=160,
        unsharded=50,
        activations_per_sample=GIB,
        micro_batch=[],
        optimizer_step=[],
    )
    one, ddp, fsdp = memory.strategies(cost, hardware("h100-8"))
    assert (one.batch, ddp.batch, fsdp.batch) == (64, 8, 8)
    assert (one.chosen, ddp.chosen, fsdp.chosen) == (False, False, True)
    assert (ddp.weights, ddp.gradients, ddp.optimizer) == (800, 2 * 80, 160)  # buckets are copies of gradients
    assert (fsdp.weights, fsdp.gradients, fsdp.optimizer) == (800 / 8 + 50, 10, 20)
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
        (["stage1.stepz=3"], "stage1.stepz .* unknown key; keys there: accumulate"),
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
    assert shown[1].strip() == report.text(report.plan(["~overrides", "preset=paper"], run=RUN)).strip()


def test_products_in_bf16_are_measured_on_less_where_they_are_a_loop(monkeypatch):
    monkeypatch.setattr(measure, "_seconds", lambda run, device: 1.0)
    for native, side in ((True, 2048), (False, 256)):
        monkeypatch.setattr(measure, "has_native_bf16", lambda _, native=native: native)
        assert measure._product_tflops(torch.bfloat16, torch.device("cpu")) == 2 * side**3 / 1e12
        assert measure._product_tflops(torch.float32, torch.device("cpu")) == 2 * 2048**3 / 1e12


def test_auto_is_the_precision_of_the_planned_hardware_not_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for native in (True, False):
        monkeypatch.setattr("lyrics.numerics.has_native_bf16", lambda _, native=native: native)
        config = small("stage1.precision=auto")
        cost = memory.meter("stage1", config, assumed("tiny"), hardware("h100"))
        found.append((cost.activations_per_sample, cost.seconds(hardware("h100"))))
    fp32 = memory.meter("stage1", small(), assumed("tiny"), hardware("h100"))
    assert found[0] == found[1] and found[0][0] < fp32.activations_per_sample
    slow = dataclasses.replace(hardware("cpu-2"), bf16_tflops=0.01)
    assert (slow.precision("auto"), hardware("cpu-2").precision("auto")) == ("fp32", "bf16")


def test_annotated_pictures_are_refined_and_kept_checkpoints_stored() -> None:
    def rows(*settings: str, pairs: int | None = None) -> dict[str, float]:
        config, built = small(*settings), parts.build(small(*settings), assumed("tiny"))
        stages = {"pretrain": memory.meter("stage1", config, assumed("tiny"), hardware("cpu-2"))}
        of_pictures = storage.pictures_of(config, assumed("tiny"), pairs)
        return {row.name: row.size_bytes for row in storage.rows(config, assumed("tiny"), built, stages, *of_pictures)}

    each = storage.picture_bytes(small(), parts.build(small(), assumed("tiny")))
    scenes = small().world.scenes
    every = scenes.web + scenes.instruct + scenes.val + scenes.test + scenes.test_ood
    assert rows()["cached features"] == each * every and rows(pairs=10)["cached features"] == each * 10
    four, two = rows("stage1.checkpoints_kept=4"), rows("stage1.checkpoints_kept=2")
    assert four["checkpoints and models"] == 2 * two["checkpoints and models"]
