import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from lyrics.foundation import llm, lookup
from lyrics.foundation.tokenizer import train_wordpiece

TEXT = "cup 1 2 3 4; question: Where is the cup? answer: 1 2 3 4 question: Is it red? answer: no"


def tokenizer(tmp_path):
    train_wordpiece([TEXT], 200).save(str(tmp_path / "tokenizer.json"))
    return llm.add_text_ends(tmp_path)


def test_answers_are_spans_that_end_with_the_end_token(tmp_path):
    made = tokenizer(tmp_path)
    document = llm.read_document(TEXT, made)
    spans = [(made.decode(document.ids[start:stop]), kind) for start, stop, kind in document.answers]
    assert spans == [("1 2 3 4 </s>", "where_is"), ("no </s>", "is_it")]
    assert document.ids[0] == made.bos_token_id and document.ids[-1] == made.eos_token_id
    plain = llm.read_document("A red cup.", made)
    assert plain.answers == () and made.decode(plain.ids) == "<s> a red cup. </s>"


def test_padding_and_context_carry_no_or_little_loss(tmp_path):
    made = tokenizer(tmp_path)
    documents = [llm.read_document(TEXT, made), llm.read_document("A red cup.", made)]
    ids_BS, labels_BS, weights_BS = llm.pad_batch(documents, made.pad_token_id)
    short = len(documents[1].ids)
    assert (weights_BS[1, :short] == 1).all() and (weights_BS[1, short:] == 0).all()
    assert (labels_BS[1, short:] == -100).all() and (ids_BS[1, short:] == made.pad_token_id).all()
    start, stop, _ = documents[0].answers[0]
    assert (weights_BS[0, start:stop] == 1).all() and 0 < weights_BS[0, start - 1] < 0.5


def test_batches_hold_every_document_once_an_epoch_and_depend_on_the_seed_alone():
    documents = [llm.Document(list(range(2 + i % 7)), ()) for i in range(50)]
    batches = llm.length_buckets(documents, 8, 14, seed=3)
    assert batches == llm.length_buckets(documents, 8, 14, seed=3) != llm.length_buckets(documents, 8, 14, seed=4)
    assert sorted(i for batch in batches[:7] for i in batch) == list(range(50))
    spread = [max(len(documents[i].ids) for i in b) - min(len(documents[i].ids) for i in b) for b in batches]
    assert max(spread) <= 2  # of like length, so little padding


def test_exact_match_is_what_greedy_decoding_would_give(tmp_path):
    made = tokenizer(tmp_path)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(made), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        )
    ).eval()
    document = llm.read_document(TEXT, made)
    start = document.answers[-1][0]
    prompt = torch.tensor([document.ids[:start]])
    greedy = model.generate(prompt, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)[0, start:]
    said = llm.Document([*document.ids[:start], *greedy.tolist()], ((start, start + 3, "said"),))
    unsaid = llm.Document([*said.ids[:-1], (said.ids[-1] + 1) % len(made)], ((start, start + 3, "unsaid"),))
    quality = llm.quality_of(model, [said, unsaid], 0, torch.device("cpu"))
    assert (quality["exact_match_said"], quality["exact_match_unsaid"], quality["exact_match"]) == (1.0, 0.0, 0.5)


def test_first_layer_starts_as_looks_back(monkeypatch):
    """Head h attends h + 1 tokens back, from any token to any other."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=128,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            attn_implementation="eager",
        )
    ).eval()
    lookup.start_with_lookup(model)
    attention_HSS = model(torch.randint(0, 50, (1, 20)), output_attentions=True).attentions[0][0]
    for head in range(4):
        on_target = attention_HSS[head].diagonal(-head - 1)
        assert on_target.min() > 0.9, head


def test_pad_is_made_to_differ_from_the_end(tmp_path):
    made = tokenizer(tmp_path)
    made.pad_token = made.eos_token
    assert llm.with_own_pad(made).pad_token_id not in (made.eos_token_id, made.bos_token_id)
    assert isinstance(made.backend_tokenizer, Tokenizer)


def test_a_document_longer_than_the_model_reads_is_cut(tmp_path):
    document = llm.read_document(TEXT, tokenizer(tmp_path))
    first, second = document.answers
    assert document.cut(len(document.ids)) == document
    short = document.cut(second[1] - 1)  # within the second answer
    assert short.ids == document.ids[: second[1] - 1] and short.answers == (first,)
