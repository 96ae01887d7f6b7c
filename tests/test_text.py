import functools
import itertools
import json
import random
import time

import pytest
from tokenizers import Tokenizer as BackendTokenizer
from tokenizers import decoders, models

from nanovllm.errors import ModelError, PromptError
from nanovllm.stop_strings import StopChecker
from nanovllm.text import Tokenizer, has_tokenizer, load_tokenizer
from tests.checkpoints import qwen3_config, write_tokenizer

END = 2  # <|im_end|>
MESSAGES = [{"role": "user", "content": "Grüße 😀"}]


def write_model(directory, **settings):
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(qwen3_config()))
    write_tokenizer(directory, **settings)
    return directory


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    loaded = load_tokenizer(write_model(tmp_path_factory.mktemp("tokenizer")))
    assert loaded is not None
    return loaded


@pytest.fixture(scope="module")
def backend(tokenizer):
    return tokenizer._backed.backend_tokenizer


def sentencepiece_like() -> Tokenizer:
    """Words with a leading ▁, and bytes as <0xNN> for what has no token, as Llama 2 has."""
    from transformers import PreTrainedTokenizerFast

    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "▁the", "b", "c", "�"]
    backend = BackendTokenizer(
        models.BPE({t: i for i, t in enumerate(tokens)}, [], unk_token="<unk>", byte_fallback=True)
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"))


def random_ids(rng: random.Random, backend) -> list[int]:
    """Mixed ids: any token, pieces of real text (whole characters of 1 to 4 bytes), and ids beyond the vocabulary."""
    ids: list[int] = []
    while len(ids) < rng.randrange(1, 25):
        if rng.random() < 0.5:
            ids.append(rng.randrange(backend.get_vocab_size() + 5))
        else:
            text = "".join(rng.choices("aé世😀\u200d\n <>|_", k=3)) + rng.choice(["", "the", "<think>", "\ufffd"])
            ids += backend.encode(text).ids
    return ids


def known(ids: list[int], backend) -> list[int]:
    return [i for i in ids if backend.id_to_token(i) is not None]


@functools.cache
def can_become_a_character(beginning: bytes) -> bool:
    """Whether some bytes after it make one character of `beginning`, by trying."""
    for length in range(1, 5 - len(beginning)):
        for rest in itertools.product(b"\x80\x8f\x90\x9f\xa0\xbf", repeat=length):
            if len((beginning + bytes(rest)).decode(errors="ignore").encode()) == len(beginning) + length:
                return True
    return False


def ends_inside_a_character(data: bytes) -> bool:
    return any(can_become_a_character(data[-n:]) for n in (1, 2, 3) if n <= len(data) and data[-n] >= 0xC0)


def test_a_directory_without_tokenizer_files_has_none(tmp_path):
    assert load_tokenizer(None) is None
    assert load_tokenizer(tmp_path) is None
    (tmp_path / "vocab.json").write_text("{}")
    assert not has_tokenizer(tmp_path)


@pytest.mark.parametrize("text", ["", "{}", "not json", '{"model": null}'])
def test_a_broken_tokenizer_is_refused_naming_the_directory(tmp_path, text):
    write_model(tmp_path)
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ModelError, match=f"no usable tokenizer in {tmp_path}"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("text", ["nope", "[]", '{"auto_map": {"AutoTokenizer": ["evil.Slow", "evil.Fast"]}}'])
def test_a_tokenizer_config_that_is_broken_or_wants_code_is_refused(tmp_path, text):
    write_model(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(text)
    (tmp_path / "evil.py").write_text(f"import os; os.mkdir({str(tmp_path / 'canary')!r})")
    with pytest.raises(ModelError, match=r"tokenizer_config.json: "):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "canary").exists()


def test_encoding_is_that_of_transformers(tokenizer):
    for text in ("Hello 😀", "", " ", "<|im_start|>user<think>", "a" * 2000):
        assert tokenizer.encode(text) == tokenizer._backed(text)["input_ids"]


def test_text_that_is_no_unicode_is_a_prompt_error(tokenizer):
    with pytest.raises(PromptError) as caught:
        tokenizer.encode("a\ud800b")
    assert caught.value.code == "invalid_text"


def test_b39_the_tokenizers_eos_is_known(tokenizer):
    assert tokenizer.eos_token_id == END


def test_b43_decoding_all_ids_is_transformers_decoding_up_to_an_incomplete_character(tokenizer, backend):
    rng = random.Random(0)
    cut = 0
    for _ in range(10_000):
        ids = random_ids(rng, backend)
        whole = tokenizer._backed.decode(known(ids, backend), skip_special_tokens=True)
        incomplete = ends_inside_a_character(b"".join(tokenizer.token_bytes(i) or b"" for i in ids))
        assert tokenizer.decode(ids) == (whole[:-1] if incomplete else whole), ids
        cut += incomplete
    assert 100 < cut < 5_000


def test_text_survives_encoding_and_decoding(tokenizer):
    for text in ("", " a", "a\n\n", "😀", "\ufffd", "a\ufffd", "<think>\n", "naïve 世界"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("num_bytes", [1, 2, 3])
def test_an_output_that_ends_inside_a_character_is_cut_before_it(tokenizer, num_bytes):
    emoji = tokenizer.encode("😀")
    assert len(emoji) == 4
    ids = [*tokenizer.encode("Hi "), *emoji[:num_bytes]]
    assert tokenizer.decode(ids) == "Hi "
    assert tokenizer.decode([*ids, END]) == "Hi ", "a special token after it changes nothing"
    assert tokenizer.final_text([*tokenizer.encode("\ufffd"), *emoji[:num_bytes]]) == "\ufffd"


def test_bytes_that_can_never_become_a_character_are_replaced_at_once(tokenizer, backend):
    surrogate = [backend.token_to_id(character) for character in "íł"]  # ED A0, which CPython's decoder waits on
    assert tokenizer.decode(surrogate) == "\ufffd\ufffd"
    assert [*map(StopChecker(tokenizer, ("\ufffd\ufffd",)).push, surrogate)] == [False, True]


@pytest.mark.parametrize("num_bytes", [1, 2, 3])
def test_b44_a_prompt_that_ends_inside_a_character_does_not_leak(tokenizer, num_bytes):
    emoji = tokenizer.encode("😀")
    output = [*emoji[num_bytes:], *tokenizer.encode(" there")]
    assert tokenizer.decode(output) == "\ufffd" * (4 - num_bytes) + " there"


def test_b45_ids_that_the_tokenizer_does_not_know_are_skipped(tokenizer):
    strange = [-1, -(2**70), 300, 301, 319, 2**31, 2**32, 2**63, 2**100]
    known_token = tokenizer.encode("a")
    assert tokenizer.decode(strange) == "<think>"  # 300; the vocabulary ends there
    assert tokenizer.decode([*strange[3:], *known_token, *strange[:2]]) == "a"


def test_special_tokens_are_no_text_and_added_tokens_are(tokenizer):
    ids = tokenizer.encode("<|im_start|>a<think>b<|im_end|>")
    assert tokenizer.decode(ids) == "a<think>b"
    assert tokenizer.token_bytes(END) is None


def test_final_text_is_cut_before_the_earliest_stop_string(tokenizer):
    ids = tokenizer.encode("one two three")
    assert tokenizer.final_text(ids) == "one two three"
    assert tokenizer.final_text(ids, ("three", "wo")) == "one t"
    assert tokenizer.final_text(ids, ("absent",)) == "one two three"
    assert tokenizer.final_text(ids, ("one",)) == ""


def test_b41_a_stop_string_that_is_a_special_token_has_an_id(tokenizer):
    assert tokenizer.special_token_ids(("<|im_end|>", "x", "<think>", "<|endoftext|>")) == (0, 2)
    ids = tokenizer.encode("a<|im_end|>")
    assert ids[-1] == END
    assert not any(map(StopChecker(tokenizer, ("<|im_end|>",)).push, ids)), "decoding skips it"


def test_a_special_token_that_is_spelt_out_is_a_stop_string(tokenizer):
    ids = [i for character in "a<|im_end|>b" for i in tokenizer.encode(character)]
    fired = [*map(StopChecker(tokenizer, ("<|im_end|>",)).push, ids)]
    assert fired == [False] * len("a<|im_end|") + [True, True]
    assert tokenizer.final_text(ids, ("<|im_end|>",)) == "a"


def random_stops(rng: random.Random, text: str) -> tuple[str, ...]:
    """Strings that are in the text, nearly in it, or not."""
    stops = []
    for _ in range(rng.randint(1, 3)):
        begin = rng.randrange(len(text) + 1)
        stop = text[begin : begin + rng.randint(1, 6)] or "the"
        stops.append(stop if rng.random() < 0.6 else stop + rng.choice("a\ufffd "))
    return tuple(stops)


def assert_fires_when_final_text_is_cut(tokenizer: Tokenizer, ids: list[int], stops: tuple[str, ...]) -> bool:
    checker = StopChecker(tokenizer, stops)
    for length in range(1, len(ids) + 1):
        found = any(stop in tokenizer.decode(ids[:length]) for stop in stops)
        assert checker.push(ids[length - 1]) == found, (ids, stops, length)
        if found:
            assert tokenizer.final_text(ids[:length], stops) != tokenizer.decode(ids[:length])
            return True
    return False


def test_stop_checking_token_by_token_equals_searching_the_whole_text(tokenizer, backend):
    rng = random.Random(1)
    hits = 0
    for _ in range(10_000):
        ids = random_ids(rng, backend)
        hits += assert_fires_when_final_text_is_cut(tokenizer, ids, random_stops(rng, tokenizer.decode(ids)))
    assert 2_000 < hits < 9_500


def test_stop_checking_equals_searching_with_a_byte_fallback_tokenizer():
    tokenizer = sentencepiece_like()
    assert not tokenizer.byte_level
    rng = random.Random(2)
    hits = 0
    emoji = [3 + byte for byte in "😀".encode()]
    for _ in range(300):
        ids = []
        for _ in range(rng.randrange(1, 60)):
            ids += rng.choice([emoji, emoji[:2], [259], [260], [261], [262], [263], [264], [2], [9999]])
        stops = random_stops(rng, tokenizer.decode(ids)[-30:])
        hits += assert_fires_when_final_text_is_cut(tokenizer, ids, stops)
    assert 100 < hits < 300


@pytest.mark.parametrize("num_bytes", [1, 2, 3])
def test_byte_fallback_output_is_cut_before_an_incomplete_character(num_bytes):
    tokenizer = sentencepiece_like()
    emoji = [3 + byte for byte in "😀".encode()]
    assert tokenizer.decode([260, *emoji, *emoji[:num_bytes]]) == "a😀"
    assert tokenizer.decode([260, 264]) == "a�", "a token that is the replacement character"


def test_no_stop_strings_never_fire(tokenizer):
    checker = StopChecker(tokenizer, ())
    assert not any(map(checker.push, range(300)))
    assert not checker.matched


def test_a_match_is_remembered(tokenizer):
    checker = StopChecker(tokenizer, ("a",))
    assert [checker.push(i) for i in tokenizer.encode("b") + tokenizer.encode("a") + tokenizer.encode("b")] == [0, 1, 1]
    assert checker.matched


def test_stop_checking_costs_the_same_however_long_the_text():
    """Linear in the tokens for both kinds of tokenizer: 8 times the tokens take far less than 64 times as long."""

    def seconds(num_tokens: int) -> float:
        checker = StopChecker(tokenizer, ("zzz",))
        begin = time.process_time()
        for _ in range(num_tokens):
            checker.push(261)
        return time.process_time() - begin

    tokenizer = sentencepiece_like()
    seconds(100)
    assert seconds(4_000) < 30 * max(seconds(500), 1e-3)
