"""Prompts, spans and labels; left and right padding."""

import torch

from lyrics.model.language import IGNORED, Prompt, assemble

PROMPTS = [Prompt([1], [5, 6, 7]), Prompt([1], [8])]


def test_labels_are_the_answer_spans_alone_even_when_prompt_holds_the_same_tokens() -> None:
    sequences = assemble(PROMPTS, 2, pad=0, answers=[[6, 2], [8, 2]])
    assert sequences.ids_BS.tolist() == [[1, 0, 0, 5, 6, 7, 6, 2], [1, 0, 0, 8, 8, 2, 0, 0]]
    assert sequences.labels_BS.tolist() == [[IGNORED] * 6 + [6, 2], [IGNORED] * 4 + [8, 2] + [IGNORED] * 2]
    assert sequences.image_mask_BS.sum(1).tolist() == [2, 2]
    assert sequences.mask_BS.sum(1).tolist() == [8, 6]


def test_generation_is_padded_left_so_that_every_row_ends_where_its_answer_starts() -> None:
    sequences = assemble(PROMPTS, 2, pad=0)
    assert sequences.ids_BS[:, -1].tolist() == [7, 8]
    assert sequences.mask_BS.tolist()[1] == [False, False, True, True, True, True]
    assert torch.equal(sequences.image_mask_BS[1].nonzero().flatten(), torch.tensor([3, 4]))
    assert (sequences.labels_BS == IGNORED).all()
