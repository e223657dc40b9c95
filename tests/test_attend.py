"""`lyrics attend` on tiny random parts: occlusion and attention against the model itself, and the page."""

import dataclasses
import html.parser
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import lyrics.attend as attending
from lyrics.attend import attend, examine
from lyrics.attend_page import box_cover, leaned, object_names, render, verdict
from lyrics.errors import InputError
from lyrics.inference import Lyrics
from lyrics.model.attention_maps import recording
from lyrics.model.inputs import SeenImage, TextTokenizer
from lyrics.model.language import WORD, PromptTemplate, add_lora
from lyrics.model.lyrics import LyricsModel
from lyrics.model.mq_former import MQFormer, MQFormerConfig
from lyrics.model.occlusion import Places, language_attention, object_texts, occlusion, prompt_places, without_objects
from lyrics.model.projection import Projection
from lyrics.model.vision import ImageEncoder, Preprocessing
from lyrics.refiner.refiner import RefinedObjects
from lyrics.refiner.spatial_text import format_objects

SPECIAL = "[PAD] [UNK] [CLS] [SEP] [MASK] [DEC] <s> </s>"
WORDS = f"{SPECIAL} what color is the star cup red blue question answer : ? ;".split()
WORDS += [str(number) for number in range(100)]
TEMPLATE = "{{ bos_token }}<image>{{ spatial_text ~ ' ' if spatial_text }}question : {{ messages[0].content }} answer :"
QUESTION = "what color is the cup ?"
BOXES = np.array([[0, 0, 32, 32], [16, 16, 64, 48], [40, 4, 60, 20]], np.float32)
TAGS = ("star", "cup", "star")


def words() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", bos_token="<s>", eos_token="</s>"
    )
    made.add_special_tokens({"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"})
    made.chat_template = TEMPLATE
    return made


class Tower(nn.Module):
    """Mean colours of 4 × 3 patches, and of the whole as a class token if there is one."""

    def __init__(self, prefix: int) -> None:
        super().__init__()
        self.prefix = prefix

    def forward(self, pixels_B3HW: Tensor) -> tuple[Tensor, list[Tensor]]:
        patches = nn.functional.adaptive_avg_pool2d(pixels_B3HW, (4, 3)).flatten(2).transpose(1, 2)
        return torch.cat([patches.mean(1, keepdim=True)] * self.prefix + [patches], dim=1), []


@dataclasses.dataclass(frozen=True)
class KnownObjects:
    """A refiner that finds the same objects in every picture."""

    tags: tuple[str, ...]
    settings = SimpleNamespace(feature_dtype="fp16")

    def refine(self, images: list[Image.Image], annotations: object = None) -> list[RefinedObjects]:
        count, draw = len(self.tags), np.random.default_rng(3)
        return [
            RefinedObjects(
                tags=self.tags,
                boxes_xyxy=BOXES[:count],
                scores=np.linspace(0.9, 0.5, count),
                masks=("",) * count,
                detector_tokens_ND=draw.normal(size=(count, 6)),
                segmenter_tokens_ND=draw.normal(size=(count, 5)),
                spatial_text=format_objects(self.tags, BOXES[:count] / 64, "grid100"),
            )
            for _ in images
        ]


def small(tags: tuple[str, ...] = TAGS, *, prefix: int = 1, in_llm: bool = True, **changes: object) -> Lyrics:
    tokenizer = words()
    torch.manual_seed(0)
    config = MQFormerConfig(
        visual_queries=2, grounding_queries=3, hidden_size=16, layers=3, heads=2, intermediate_size=32,
        cross_attention_every=2, max_text_tokens=64, dropout=0.0, projection_size=8, detector_tokens=True,
        segmenter_tokens=True, grounding="pooled", vocabulary_size=len(WORDS), pad_token_id=0, image_width=3,
        detector_width=6, segmenter_width=5, max_objects=4,
    )  # fmt: skip
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.3, attn_implementation="sdpa",
        )
    )  # fmt: skip
    model = LyricsModel(
        MQFormer(dataclasses.replace(config, **changes)),
        Projection(16, 16),
        add_lora(llama, rank=2, alpha=4, dropout=0.0, target_modules=["q_proj"]),
        text_tokenizer=TextTokenizer(tokenizer),
        template=PromptTemplate(tokenizer),
        spatial_text_in_llm=in_llm,
    )
    preprocessing = Preprocessing(24, (0.5,) * 3, (0.5,) * 3)
    encoder = ImageEncoder(Tower(prefix), preprocessing, width=3, grid=(4, 3), prefix_tokens=prefix)
    return Lyrics(model=model.eval(), encoder=encoder, refiner=KnownObjects(tags), label="a small model")


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))


@torch.no_grad()
def loss(lyrics: Lyrics, seen: SeenImage, ids: list[int], text: str) -> float:
    answer = lyrics.model.template.tokenizer.decode(ids)
    return float(lyrics.model([QUESTION], [seen], [answer], [text])) * (len(ids) + 1)


def test_a_drop_equals_what_the_training_loss_says(picture: Image.Image) -> None:
    """Local tokens of the last object: leaving it out altogether keeps all other ranks."""
    lyrics = small()
    seen = lyrics.see([picture])[0]
    ids = lyrics.model.template.tokenizer("red cup", add_special_tokens=False)["input_ids"]
    drops_B3 = occlusion(
        lyrics.model, QUESTION, seen, [*ids, lyrics.model.template.end], torch.eye(3, dtype=torch.bool)
    )
    shorter = " ".join(object_texts(seen.spatial_text)[:2])
    fewer = dataclasses.replace(
        seen,
        tags=seen.tags[:2],
        boxes_xyxy_N4=seen.boxes_xyxy_N4[:2],
        detector_tokens_ND=seen.detector_tokens_ND[:2],
        segmenter_tokens_ND=seen.segmenter_tokens_ND[:2],
    )
    own = loss(lyrics, seen, ids, seen.spatial_text)
    expected = [
        loss(lyrics, fewer, ids, seen.spatial_text) - own,
        loss(lyrics, dataclasses.replace(seen, spatial_text=shorter), ids, shorter) - own,
        loss(lyrics, dataclasses.replace(fewer, spatial_text=shorter), ids, shorter) - own,
    ]
    assert drops_B3[2].tolist() == pytest.approx(expected, abs=1e-4)
    assert min(map(abs, expected)) > 1e-3


def test_an_answer_leans_on_no_local_token_without_grounding_queries(picture: Image.Image) -> None:
    lyrics = small(grounding_queries=0)
    seen = lyrics.see([picture])[0]
    drops_B3 = occlusion(lyrics.model, QUESTION, seen, [14, 7], torch.eye(3, dtype=torch.bool))
    assert drops_B3[:, 0].tolist() == pytest.approx([0] * 3, abs=1e-5)
    assert drops_B3[:, 1].tolist() == pytest.approx(drops_B3[:, 2].tolist(), abs=1e-5)
    assert drops_B3[:, 1].abs().min() > 1e-3


@pytest.mark.parametrize("grounding", ["pooled", "per_object"])
def test_places_are_the_objects_texts_and_no_others_even_if_the_question_repeats_them(
    picture: Image.Image, grounding: str
) -> None:
    lyrics = small(grounding=grounding)
    seen = lyrics.see([picture])[0]
    question = f"is {seen.spatial_text} the cup ?"
    parts, objects = prompt_places(lyrics.model, question, seen, 2)
    prompt = lyrics.model.conversation(question, (), seen.spatial_text)
    tokenizer = lyrics.model.template.tokenizer
    words = [[prompt.ids[i] for i in place.positions if prompt.queries[i] == WORD] for place in objects]
    assert [tokenizer.decode(ids).replace(" ;", ";") for ids in words] == object_texts(seen.spatial_text)
    own = [[prompt.queries[i] for i in place.positions if prompt.queries[i] != WORD] for place in objects]
    assert own == ([[]] * 3 if grounding == "pooled" else [[2], [3], [4]])
    assert [(place.name, len(place.positions)) for place in parts] == [
        ("start of the prompt", 1), ("visual queries", 2), ("grounding queries", 3), ("answer so far", 2)
    ]  # fmt: skip
    assert {prompt.queries[i] for i in parts[2].positions} == {2, 3, 4}
    everything = sorted({i for place in objects for i in place.positions} | set(parts[1].positions))
    assert everything[-1] - everything[0] + 1 == len(everything) + (3 if grounding == "pooled" else 0)
    assert parts[3].positions[0] == len(prompt.ids)


def test_an_object_left_out_of_the_text_takes_its_own_token_along(picture: Image.Image) -> None:
    model = small(grounding="per_object").model
    seen = small().see([picture])[0]
    left = without_objects(seen, torch.tensor([True, False, False]))
    found = model.conversation(QUESTION, (), left.spatial_text, left.told)
    assert [query for query in found.queries if query != WORD] == [0, 1, 3, 4]


@pytest.mark.parametrize("grounding", ["pooled", "per_object"])
def test_shares_of_the_language_model_are_those_of_its_own_attention(picture: Image.Image, grounding: str) -> None:
    """The first token of the answer sees all but the answer, the second the first as well."""
    lyrics = small(grounding=grounding)
    seen = lyrics.see([picture])[0]
    parts, objects = prompt_places(lyrics.model, QUESTION, seen, 2)
    named = {i for place in [*parts, *objects] for i in place.positions}
    rest = Places(name="rest", positions=tuple(set(range(parts[3].positions[0])) - named))
    once = [*parts, *objects, rest] if grounding == "pooled" else [parts[0], parts[1], parts[3], *objects, rest]
    shares_YMK = language_attention(lyrics.model, QUESTION, seen, [14, 7], once)
    torch.testing.assert_close(shares_YMK.sum(-1), torch.ones(2, 2))
    answer = once.index(parts[3])
    assert shares_YMK[:, 0, answer].tolist() == [0, 0] and shares_YMK[:, 1, answer].min() > 0
    assert lyrics.model.llm.config._attn_implementation == "sdpa"


def test_token_probabilities_multiply_to_that_of_the_answer(picture: Image.Image) -> None:
    lyrics = small()
    found = examine(lyrics, picture, QUESTION, answer="red cup")
    seen = lyrics.see([picture])[0]
    log_prob = sum(np.log(token.probability) for token in found.tokens)
    assert [token.text for token in found.tokens] == ["red", "cup", "</s>"]
    assert log_prob == pytest.approx(-loss(lyrics, seen, [14, 13], seen.spatial_text), abs=1e-4)
    greedy = examine(lyrics, picture, QUESTION)
    assert greedy.answer == greedy.own_answer != "red cup"
    assert all(token.probability >= token.alternatives[0][1] - 1e-5 for token in greedy.tokens[:-1])


class Page(html.parser.HTMLParser):
    """Every attribute that names something outside, and the tables' rows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("href", "src", "xlink:href")]


def test_the_page_asks_for_nothing_and_escapes_what_it_is_told(picture: Image.Image) -> None:
    evil = '<script>alert("x")</script><img src=https://x.example>'
    lyrics = small(tags=(f"cup{evil}".replace(";", ""), "star"))
    page = render(examine(lyrics, picture, f"what {evil} ?", answer=evil), picture)
    parsed = Page(page)
    assert "script" not in parsed.tags and "img" not in parsed.tags
    assert all(link.startswith(("data:image/", "#photo")) for link in parsed.links) and len(parsed.links) > 4
    assert "url(" not in page and "@import" not in page


@pytest.mark.parametrize(
    ("tags", "options", "says"),
    [
        ((), {}, "The refiner found no object"),
        (TAGS, {"visual_queries": 0}, "This model has no visual queries"),
        (TAGS, {"grounding_queries": 0}, "This model has no grounding queries"),
        (TAGS, {"prefix": 0}, "peak"),
        (TAGS, {"prefix": 1}, "class token"),
        (TAGS, {"in_llm": False}, "The language model reads no spatial text here"),
        (TAGS, {"detector_tokens": False}, "nothing"),
        (TAGS, {"max_text_tokens": 6}, "spatial text"),
    ],
)
def test_every_kind_of_model_has_a_page(picture: Image.Image, tags: tuple, options: dict, says: str) -> None:
    page = render(examine(small(tags, **options), picture, QUESTION), picture)
    assert says in page
    assert ("class token" in page) == (options.get("prefix", 1) == 1 and options.get("visual_queries", 2) > 0)
    assert not re.search(r"\bnan\b|\binf\b", page)


def test_the_shares_on_the_page_are_the_whole(picture: Image.Image) -> None:
    found = examine(small(), picture, QUESTION)
    assert list(found.visual) == list(found.grounding) == [0, 2]
    for layer in (0, 2):
        assert found.visual[layer].shape == (2, 13) and found.grounding[layer].shape == (3, 4)
        torch.testing.assert_close(found.visual[layer].sum(-1), torch.ones(2))
        torch.testing.assert_close(found.grounding[layer].sum(-1), torch.ones(3))
    assert [(one.layer, one.kind) for one in found.readings[:2]] == [(0, "visual"), (0, "grounding")]
    for one in found.readings:
        whole = one.to_visual + one.to_grounding + float(one.to_question_T.sum()) + one.to_objects + one.to_special
        assert whole == pytest.approx(1, abs=1e-5)
        assert len(one.to_question_T) == len(found.question_tokens) == 6
    assert object_names(found) == ["star 1", "cup 2", "star 3"]


def test_queries_read_the_question_and_the_objects_apart(picture: Image.Image) -> None:
    """Five queries, then `[CLS] what color is the cup ? [SEP] 18 tokens of objects [SEP]`."""
    lyrics = small()
    found = examine(lyrics, picture, QUESTION)
    with recording(lyrics.model.mq_former) as maps, torch.no_grad():
        lyrics.model.query_tokens([QUESTION], lyrics.see([picture]))
    to_S = maps.self_attention(1)[0, :, 2:5].mean((0, 1))
    one = next(one for one in found.readings if (one.layer, one.kind) == (1, "grounding"))
    assert len(to_S) == 5 + 1 + 6 + 1 + 18 + 1
    assert one.to_question_T.tolist() == pytest.approx(to_S[6:12].tolist())
    assert one.to_objects == pytest.approx(float(to_S[13:-1].sum()))
    assert one.to_special == pytest.approx(float(to_S[5] + to_S[12] + to_S[-1]))


@pytest.mark.parametrize(
    ("worst", "way", "says"),
    [
        ((0.05, -3.0, 0.0), 2, "Taking away any single object hardly lowers"),
        (
            (0.1, np.log(2), 0.0),
            2,
            "leaned most on cup 2: without its tokens and text, the answer is 2.0 times less probable (0.69 nats)",
        ),
        ((0.1, 1.81, 0.0), 0, "leaned most on cup 2: without its local tokens, the answer is 6.1 times less probable"),
        ((7.5, 0.0, 0.0), 1, "star 1: without its spatial text, the answer is more than 1000 times less probable"),
    ],
)
def test_the_verdict_is_that_of_the_way_that_costs_most(
    picture: Image.Image, worst: tuple[float, ...], way: int, says: str
) -> None:
    found = examine(small(), picture, QUESTION)
    leanings = [
        dataclasses.replace(one, drops=tuple(drop if n == way else -9.0 for n in range(3)))
        for one, drop in zip(found.leanings, worst, strict=True)
    ]
    assert says in verdict(dataclasses.replace(found, leanings=leanings), object_names(found))


def test_an_object_shows_the_query_that_looks_at_it_most(picture: Image.Image) -> None:
    found = examine(small(), picture, QUESTION)
    last_GL = list(found.grounding.values())[-1]
    table = leaned(found, object_names(found))
    column = table.columns.index("most by a grounding query, last layer")
    shown = [row.cells[column].text for row in table.rows if not row.total]
    assert shown == [f"{100 * float(last_GL[:, n + 1].max()):.1f}" for n in range(len(shown))]


def test_a_box_covers_its_part_of_each_patch() -> None:
    cover_P = box_cover(np.array([0.0, 0.125, 0.5, 0.5]), (4, 3))
    np.testing.assert_allclose(cover_P.reshape(4, 3), [[0.5, 0.25, 0], [1, 0.5, 0], [0, 0, 0], [0, 0, 0]], atol=1e-7)


def test_the_file_is_written_whole_or_not_at_all(
    picture: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attending, "load", small)
    image, out = tmp_path / "scene.png", tmp_path / "pages" / "page.html"
    picture.save(image)
    found = attend(image, QUESTION, out)
    assert out.read_text().rstrip().endswith("</html>") and found.source in out.read_text()
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]
    for bad in (image, tmp_path):
        with pytest.raises(InputError, match="--out"):
            attend(image, QUESTION, bad)
    with pytest.raises(InputError, match="question is empty"):
        attend(image, "  ", out)
    (tmp_path / "no.png").write_text("no picture")
    with pytest.raises(InputError, match="cannot be used"):
        attend(tmp_path / "no.png", QUESTION, out)
