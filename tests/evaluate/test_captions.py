import gzip
import json

import pytest

from lyrics.evaluate import captions

needs_java = pytest.mark.skipif(not captions.has_java(), reason="the official tokenizer needs Java")


def _score_files(shared, expected):
    hypotheses = (shared / expected["hyp"]).read_text().splitlines()
    references = list(zip(*[(shared / name).read_text().splitlines() for name in expected["refs"]], strict=True))
    return hypotheses, references


def _tokens(hypotheses, references):
    return captions.tokenize(hypotheses), [captions.tokenize(group) for group in references]


def test_agrees_with_published_scores(shared):
    expected = json.loads((shared / "expected_scores.json").read_text())["nlg_eval"]
    found = captions.score(*_tokens(*_score_files(shared, expected)))
    names = {"Bleu_1": "bleu_1", "Bleu_2": "bleu_2", "Bleu_3": "bleu_3", "Bleu_4": "bleu_4"}
    for published, ours in (names | {"ROUGE_L": "rouge_l", "CIDEr": "cider"}).items():
        assert found.corpus[ours] == pytest.approx(expected["scores"][published], abs=1e-5), published
    assert sum(found.cider) / len(found.cider) == pytest.approx(found.corpus["cider"])


def test_agrees_with_published_scores_of_a_single_sentence(shared):
    expected = json.loads((shared / "expected_scores.json").read_text())["nlg_eval_single"]
    found = captions.score(*_tokens([expected["hyp"]], [expected["refs"]]))
    for n in range(1, 5):
        assert found.corpus[f"bleu_{n}"] == pytest.approx(expected["scores"][f"Bleu_{n}"], rel=1e-5)
    assert found.corpus["cider"] == 0.0  # one image: every n-gram is in every document


@needs_java
@pytest.mark.soak
def test_meteor_agrees_with_the_published_score(shared):
    expected = json.loads((shared / "expected_scores.json").read_text())["nlg_eval"]
    found = captions.MeteorProcess().score(*_tokens(*_score_files(shared, expected)))
    assert found == pytest.approx(expected["scores"]["METEOR"], abs=1e-5)


@needs_java
def test_tokenizes_as_the_library_does():
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    sentences = ["A man's dog, isn't it?", 'Two (2) tables; a "cup" -- black/white.', "", "Café n° 5: it's $3.50!"]
    library = PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(sentences)})
    assert captions.tokenize(sentences) == [library[i][0] for i in range(len(sentences))]


def test_a_caption_with_line_breaks_stays_one_caption():
    assert captions.tokenize(["a\nred\r\nstar\u2028here", "", "two"])[1:] == ["", "two"]


def test_without_java_a_named_fallback_tokenizes(monkeypatch):
    monkeypatch.setattr(captions, "has_java", lambda: False)
    assert captions.tokenizer_name() == captions.FALLBACK
    assert captions.tokenize(["A man's dog, isn't it?", "Two (2) red-hot cups."]) == [
        "a man 's dog is n't it",
        "two 2 red-hot cups",
    ]
    assert "Java" in (captions.meteor_absent(wanted=True) or "")


@needs_java
def test_fallback_and_official_tokenizer_agree_on_real_captions(shared, monkeypatch):
    lines = gzip.decompress((shared / "flickr8k/Flickr8k.token.txt.gz").read_bytes()).decode().splitlines()
    texts = [line.split("\t")[1] for line in lines[::20]]
    official = captions.tokenize(texts)
    monkeypatch.setattr(captions, "has_java", lambda: False)
    agreeing = sum(a == b for a, b in zip(official, captions.tokenize(texts), strict=True))
    assert agreeing / len(texts) > 0.98


@needs_java
def test_a_failing_java_is_an_error_with_its_message(monkeypatch):
    from pycocoevalcap.tokenizer import ptbtokenizer

    monkeypatch.setattr(ptbtokenizer, "STANFORD_CORENLP_3_4_1_JAR", "absent.jar")
    with pytest.raises(RuntimeError, match="exit status 1"):
        captions.tokenize(["a"])
