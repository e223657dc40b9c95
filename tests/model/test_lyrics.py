"""The whole model on tiny random parts: losses, adapters, generation."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lyrics.model.inputs import SeenImage, TextTokenizer
from lyrics.model.language import PromptTemplate, add_lora, load_adapter, save_adapter
from lyrics.model.lyrics import LyricsModel
from lyrics.model.mq_former import MQFormer, MQFormerConfig
from lyrics.model.projection import Projection

SPECIAL = "[PAD] [UNK] [CLS] [SEP] [MASK] [DEC] <s> </s> <image>"
WORDS = f"{SPECIAL} what color is the star cup red blue question answer : ? ; 1 2 3"
TEMPLATE = "{{ bos_token }}<image>{{ spatial_text }} question : {{ messages[0].content }} answer :"


def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS.split())}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", bos_token="<s>", eos_token="</s>"
    )
    made.chat_template = TEMPLATE
    return made


def llama() -> LlamaForCausalLM:
    torch.manual_seed(1)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS.split()), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3,
        )
    )  # fmt: skip


@pytest.fixture
def model() -> LyricsModel:
    words = tokenizer()
    torch.manual_seed(0)
    mq_former = MQFormer(
        MQFormerConfig(
            visual_queries=2, grounding_queries=2, hidden_size=16, layers=2, heads=2, intermediate_size=32,
            cross_attention_every=2, max_text_tokens=24, dropout=0.0, projection_size=8, detector_tokens=True,
            segmenter_tokens=True, vocabulary_size=len(words), pad_token_id=0, image_width=10, detector_width=6,
            segmenter_width=5, max_objects=4,
        )
    )  # fmt: skip
    return LyricsModel(
        mq_former,
        Projection(16, 16),
        add_lora(llama(), rank=2, alpha=4, dropout=0.0, target_modules=["q_proj", "v_proj"]),
        text_tokenizer=TextTokenizer(words),
        template=PromptTemplate(words),
        spatial_text_in_llm=True,
    ).eval()


def seen(count: int, number: int) -> SeenImage:
    draw = np.random.default_rng(number)
    return SeenImage(
        image_tokens_PD=draw.normal(size=(5, 10)).astype(np.float16),
        detector_tokens_ND=draw.normal(size=(count, 6)).astype(np.float16),
        segmenter_tokens_ND=draw.normal(size=(count, 5)).astype(np.float16),
        tags=("star", "cup", "star")[:count],
        boxes_xyxy_N4=draw.random((count, 4)).astype(np.float32),
        spatial_text=" ".join(["star 1 2 3 1 ;", "cup 2 2 3 3 ;", "star 1 1 1 2 ;"][:count]),
    )


QUESTIONS = ["what color is the star ?", "what is the cup ?", "is the cup red ?"]
PICTURES = [seen(2, 0), seen(0, 1), seen(3, 2)]
ANSWERS = ["red", "the blue cup is the star", "blue"]


def test_a_batch_loses_what_its_samples_lose(model: LyricsModel) -> None:
    texts = [p.spatial_text for p in PICTURES]
    alone = [float(model([q], [p], [a], [t])) for q, p, a, t in zip(QUESTIONS, PICTURES, ANSWERS, texts, strict=True)]
    lengths = [len(model.template.answer(a)) for a in ANSWERS]
    by_samples = float(model(QUESTIONS, PICTURES, ANSWERS, texts, "samples"))
    by_tokens = float(model(QUESTIONS, PICTURES, ANSWERS, texts, "tokens"))
    assert by_samples == pytest.approx(sum(alone) / 3, abs=1e-5)
    assert by_tokens == pytest.approx(np.average(alone, weights=lengths), abs=1e-5)
    assert abs(by_samples - by_tokens) > 1e-3


def test_answers_in_a_batch_equal_answers_one_by_one(model: LyricsModel) -> None:
    together = model.generate(QUESTIONS, PICTURES, max_new_tokens=6)
    alone = [model.generate([q], [p], max_new_tokens=6)[0] for q, p in zip(QUESTIONS, PICTURES, strict=True)]
    assert together == alone and any(together)


def test_the_picture_and_the_replaced_spatial_text_both_matter(model: LyricsModel) -> None:
    def loss(picture: SeenImage, text: str) -> float:
        return float(model(QUESTIONS[:1], [picture], ANSWERS[:1], [text]))

    own = loss(PICTURES[0], PICTURES[0].spatial_text)
    assert loss(PICTURES[2], PICTURES[0].spatial_text) != pytest.approx(own, abs=1e-6)
    assert loss(PICTURES[0], PICTURES[2].spatial_text) != pytest.approx(own, abs=1e-6)


def test_a_new_adapter_has_no_effect_and_the_base_stays_frozen(model: LyricsModel) -> None:
    ids = torch.tensor([[6, 9, 10, 11]])
    torch.testing.assert_close(model.llm(ids).logits, llama().eval()(ids).logits)
    model(QUESTIONS, PICTURES, ANSWERS, [""] * 3).backward()
    trained = {name for name, p in model.llm.named_parameters() if p.grad is not None}
    assert trained and all("lora_" in name for name in trained)
    assert model.mq_former.visual_queries.grad.abs().sum() > 0
    assert model.mq_former.local_tokens.project["detector"].weight.grad.abs().sum() > 0


def test_a_saved_adapter_loads_with_plain_peft_and_is_the_same_bytes(model: LyricsModel, tmp_path) -> None:
    for name, parameter in model.llm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    save_adapter(tmp_path / "a", model.llm)
    save_adapter(tmp_path / "b", model.llm)
    ids = torch.tensor([[6, 9, 10, 11]])
    loaded = load_adapter(tmp_path / "a", llama()).eval()
    torch.testing.assert_close(loaded(ids).logits, model.llm(ids).logits)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
