"""Running text, and the words of sentences."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from surefoot.data import load, words
from surefoot.errors import InputError


def test_tiny_shakespeare(shared_data: Path, network_calls: list[str]) -> None:
    path = shared_data / "text" / "tinyshakespeare.txt"
    data = load(str(path))
    text = path.read_text(encoding="utf-8")
    assert (data.task, data.kind, data.outputs, data.input_shape) == ("language", "text", 65, (128,))
    assert data.vocabulary is not None
    read = "".join(data.vocabulary[i] for i in data.train_x.flatten().tolist())
    assert text.startswith(read)
    assert len(text) * 0.9 - 129 < len(read) <= len(text) * 0.9
    # the next character, across windows too
    assert torch.equal(data.train_y.flatten()[:-1], data.train_x.flatten()[1:])
    held_out = text[len(text) - round(0.1 * len(text)) :]
    assert "".join(data.vocabulary[i] for i in data.test_x[0].tolist()) == held_out[:128]
    assert not network_calls


def test_limit_context_and_fraction(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("abcdefghij" * 30)
    data = load(str(path), context=9, test_fraction=0.5, limit=4)
    assert data.train_x.shape == (4, 9)
    assert data.test_x.shape == (16, 9)
    assert torch.equal((data.train_x + 1) % 10, data.train_y)
    assert any("limit: 4 of 16" in note for note in data.notes)
    assert "no test split: the last 50% of the text held out" in data.notes


def test_characters_only_in_the_test_part_do_not_enter_the_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ab" * 45 + "ab" * 5, encoding="utf-8")
    (tmp_path / "b.txt").write_text("ab" * 45 + "éü" * 5, encoding="utf-8")
    plain, strange = (load(str(tmp_path / name), context=3) for name in ("a.txt", "b.txt"))
    assert plain.vocabulary == ("a", "b")
    assert strange.vocabulary == ("a", "b", "\N{REPLACEMENT CHARACTER}")
    assert torch.equal(plain.train_x, strange.train_x)
    assert set(strange.test_x.flatten().tolist()) == {2}
    assert any("10 characters of the test part" in note for note in strange.notes)


@pytest.mark.parametrize(
    ("content", "arguments", "said"),
    [
        (b"", {}, "is empty"),
        (b" \n\n", {}, "is empty"),
        (b"abc" * 100, {}, "leave a part of 30, too short for a window of context=128"),
        (b"a" * 5000, {}, "repeats one character, 'a'"),
        ("caf\xe9".encode("latin-1") * 500, {}, "not UTF-8"),
        (b"abc" * 1000, {"target": "y"}, "target='y' has no effect"),
        (b"abc" * 1000, {"image_size": 8}, "image_size=8 has no effect"),
        (b"abc" * 1000, {"task": "classification"}, "task='classification' has no effect"),
    ],
)
def test_bad_texts(tmp_path: Path, content: bytes, arguments: dict, said: str) -> None:
    (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(InputError) as caught:
        load(str(tmp_path / "t.txt"), **arguments)
    assert said in str(caught.value)


def test_vocabulary_is_by_frequency_with_a_least_count_of_two() -> None:
    sentences = [words.words(s) for s in ("the cat saw the dog", "The dog, the cow; a dog")]
    assert words.vocabulary(sentences) == ("<pad>", "<unk>", "the", "dog")


def test_encode_cuts_pads_and_never_gives_padding_alone() -> None:
    ids = words.encode([["b", "a", "b"], ["x"], []], ("<pad>", "<unk>", "a", "b"), 2)
    assert ids.tolist() == [[3, 2], [1, 0], [1, 0]]


def test_at_most_twenty_thousand_words() -> None:
    sentences = [[f"w{i}", f"w{i}"] for i in range(21_000)]
    assert len(words.vocabulary(sentences)) == 20_000


@given(st.text())
def test_words_lose_nothing_but_space_and_apostrophe_joins(sentence: str) -> None:
    assert "".join("".join(words.words(sentence)).split()) == "".join(sentence.lower().split())
