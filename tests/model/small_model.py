"""Lyrics of tiny random parts, with pictures, questions and answers for it."""

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lyrics.model.inputs import SeenImage, TextTokenizer
from lyrics.model.language import PromptTemplate, add_lora
from lyrics.model.lyrics import LyricsModel
from lyrics.model.mq_former import Grounding, MQFormer, MQFormerConfig
from lyrics.model.projection import Projection

SPECIAL = "[PAD] [UNK] [CLS] [SEP] [MASK] [DEC] <s> </s> <image>"
WORDS = f"{SPECIAL} what color is the star cup red blue question answer : ? ; 1 2 3"
TEMPLATE = (
    "{{ bos_token }}<image>{{ spatial_text }}{% for message in messages %}"
    "{% if message.role == 'user' %} question : {{ message.content }} answer :"
    "{% else %} {{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


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


def small_model(grounding: Grounding = "pooled") -> LyricsModel:
    words = tokenizer()
    torch.manual_seed(0)
    mq_former = MQFormer(
        MQFormerConfig(
            visual_queries=2, grounding_queries=2, hidden_size=16, layers=2, heads=2, intermediate_size=32,
            cross_attention_every=2, max_text_tokens=24, dropout=0.0, projection_size=8, detector_tokens=True,
            segmenter_tokens=True, grounding=grounding, vocabulary_size=len(words), pad_token_id=0, image_width=10,
            detector_width=6, segmenter_width=5, max_objects=4,
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


def with_adapter(model: LyricsModel) -> LyricsModel:
    """The same as if its adapter had been trained: B = 0 would hide it."""
    torch.manual_seed(2)
    for name, parameter in model.llm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    return model
