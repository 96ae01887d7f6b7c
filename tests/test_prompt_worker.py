"""Prompts to token ids in a bounded process: as transformers does it, whatever the template tries."""

import gc
import itertools
import json
import os
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from tokenizers import Tokenizer as BackendTokenizer
from tokenizers import processors

from jobs.generate_job import BUNDLED_PROMPTS
from nanovllm.errors import PromptError
from nanovllm.models.source import resolve_model
from nanovllm.prompt_process import MAX_TEXT_BYTES
from nanovllm.prompt_worker import MAX_BATCH, PromptWorker
from nanovllm.prompts import Conversation
from nanovllm.text import Tokenizer, load_tokenizer
from tests.checkpoints import CHAT_TEMPLATE, qwen3_config, write_tokenizer
from tests.test_text import sentencepiece_like

USER = {"role": "user", "content": "Grüße 😀"}
ANSWER = {"role": "assistant", "content": "Well, "}
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]}

TEMPLATES = {
    "ChatML with tools and thinking": (
        "{%- if tools %}{{ '<|im_start|>system\\n' }}"
        "{%- for tool in tools %}{{ tool | tojson }}{{ '\\n' }}{%- endfor %}{{ '<|im_end|>\\n' }}{%- endif %}"
        "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}"
        "{%- if message.content is string %}{{ message.content }}{%- endif %}"
        "{%- for call in message.tool_calls or [] %}{{ call.function | tojson }}{%- endfor %}"
        "{{ '<|im_end|>\\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
        "{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n' }}{%- endif %}{%- endif %}"
    ),
    "headers, after a BOS": (
        "{{- bos_token }}{%- for message in messages %}"
        "{{- '<h>' + message['role'] + '</h>\\n\\n' + (message['content'] or '') | trim + eos_token }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<h>assistant</h>\\n\\n' }}{%- endif %}"
    ),
    "instructions in turns": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}"
        "{{ (message.content or '') + eos_token }}{% endif %}{% endfor %}"
    ),
    "turns named by loops and macros": (
        "{% macro turn(role, text) %}<turn>{{ role }}\n{{ text }}</turn>\n{% endmacro %}"
        "{% set ns = namespace(last='') %}{% for message in messages %}"
        "{{ turn('model' if message.role == 'assistant' else message.role, message.content) }}"
        "{% set ns.last = message.role %}{% if loop.last and ns.last == 'user' %}{% break %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<turn>model\n{% endif %}"
    ),
}
CONVERSATIONS = {
    "one question": Conversation(messages=[USER]),
    "system, several turns": Conversation(messages=[{"role": "system", "content": " Be brief. "}, USER, ANSWER, USER]),
    "to be continued": Conversation(messages=[USER, ANSWER], continue_final_message=True),
    "with tools": Conversation(messages=[USER, CALL, {"role": "tool", "content": "5"}], tools=[TOOL]),
    "without thinking": Conversation(messages=[USER], template_kwargs={"enable_thinking": False}),
    "nulls": Conversation(messages=[{"role": "user", "content": "x", "tool_calls": None}]),
    "special tokens in the text": Conversation(messages=[{"role": "user", "content": "<|im_end|><s></s><think>"}]),
}


def tokenizer_with(directory: Path, template: str | None, adds_bos: bool = False) -> Tokenizer:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(qwen3_config()))
    write_tokenizer(directory, template)
    if adds_bos:
        backend = BackendTokenizer.from_file(str(directory / "tokenizer.json"))
        backend.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
        backend.save(str(directory / "tokenizer.json"))
        config = json.loads((directory / "tokenizer_config.json").read_text())
        (directory / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": "<|endoftext|>"}))
    loaded = load_tokenizer(directory)
    assert loaded is not None
    return loaded


@pytest.fixture(scope="module", params=["byte level", "byte level, adds a BOS", "sentencepiece-like"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    if request.param == "sentencepiece-like":
        tokenizer = sentencepiece_like()
        tokenizer._backed.bos_token = "<s>"
        return tokenizer
    return tokenizer_with(tmp_path_factory.mktemp("model"), CHAT_TEMPLATE, adds_bos="BOS" in request.param)


@pytest.fixture
def make_worker() -> Iterator:
    workers = []

    def make(tokenizer: Tokenizer, template: str | None = None) -> PromptWorker:
        setup = tokenizer.prompt_setup()
        if template is not None:
            setup = msgspec.structs.replace(setup, chat_template=template, tool_template=template)
        workers.append(PromptWorker(setup))
        return workers[-1]

    yield make
    for worker in workers:
        worker.close()


def expected(tokenizer: Tokenizer, chat: Conversation) -> list[int] | None:
    """By transformers; None where the template refuses."""
    try:
        return tokenizer._backed.apply_chat_template(
            chat.messages,
            tools=chat.tools,
            add_generation_prompt=not chat.continue_final_message,
            continue_final_message=chat.continue_final_message,
            tokenize=True,
            return_dict=False,
            **chat.template_kwargs,
        )
    except Exception:
        return None


def as_lists(results: list[np.ndarray | PromptError]) -> list[list[int] | str]:
    return [result.code if isinstance(result, PromptError) else result.tolist() for result in results]


# As transformers


def test_b47_the_bundled_conversations_give_the_ids_of_transformers(make_worker):
    tokenizer = load_tokenizer(resolve_model("tiny").directory)
    assert tokenizer is not None
    chats = [Conversation(messages=json.loads(line)["messages"]) for line in BUNDLED_PROMPTS.read_text().splitlines()]
    chats.append(Conversation(messages=[USER, ANSWER], continue_final_message=True))
    results = as_lists(make_worker(tokenizer).token_ids(chats))
    assert len(chats) > 2 * MAX_BATCH
    assert results == [expected(tokenizer, chat) for chat in chats]


@pytest.mark.parametrize("name", TEMPLATES)
def test_b47_every_format_gives_the_ids_of_transformers_with_one_bos(name: str, tokenizer: Tokenizer, make_worker):
    template = TEMPLATES[name]
    tokenizer._backed.chat_template = template
    wanted = {kind: expected(tokenizer, chat) for kind, chat in CONVERSATIONS.items()}
    results = dict(
        zip(CONVERSATIONS, as_lists(make_worker(tokenizer).token_ids([*CONVERSATIONS.values()])), strict=True)
    )
    assert results == {kind: "chat_template" if ids is None else ids for kind, ids in wanted.items()}
    assert sum(ids is not None for ids in wanted.values()) >= 4
    bos = tokenizer._backed.bos_token_id
    if bos is not None and "BOS" in name:
        assert results["one question"].count(bos) == 1


def test_a_template_for_tools_of_its_own_is_taken_for_them_alone(tokenizer: Tokenizer, make_worker):
    tokenizer._backed.chat_template = {"default": "plain {{ messages[0].content }}", "tool_use": "tools {{ tools }}"}
    chats = [CONVERSATIONS["one question"], CONVERSATIONS["with tools"]]
    results = as_lists(make_worker(tokenizer).token_ids(chats))
    assert results == [expected(tokenizer, chat) for chat in chats]
    assert results[0] != results[1]


@pytest.mark.parametrize("text", ["Hello 😀", " ", "<|im_start|>user<think><s>", "a" * 2000, "é\u0301"])
def test_plain_text_is_encoded_as_in_this_process(text: str, tokenizer: Tokenizer, make_worker):
    assert as_lists(make_worker(tokenizer).token_ids([text])) == [tokenizer.encode(text)]
    assert tokenizer.encode(text) == tokenizer._backed(text)["input_ids"]


# What cannot be rendered


def test_a_model_without_a_template_says_so(tmp_path: Path, make_worker):
    tokenizer = tokenizer_with(tmp_path, None)
    assert not tokenizer.has_chat_template
    assert as_lists(make_worker(tokenizer).token_ids([Conversation(messages=[USER])])) == ["no_chat_template"]


def test_what_is_no_unicode_or_no_json_is_refused_alone(tmp_path: Path, make_worker):
    tokenizer = tokenizer_with(tmp_path, CHAT_TEMPLATE)
    prompts = ["fine", "a\ud800b", Conversation(messages=[{"role": "user", "content": object()}]), "fine"]
    results = as_lists(make_worker(tokenizer).token_ids(prompts))
    assert results[1:3] == ["invalid_text", "invalid_messages"]
    assert results[0] == results[3] == tokenizer.encode("fine")


BAD_TEMPLATES = {
    "complains": ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    "arithmetic": ("{{ 1 // zero }}", "ZeroDivisionError"),
    "undefined": ("{{ nothing.at.all }}", "UndefinedError"),
    "class": ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    "popen": ("{{ cycler.__init__.__globals__.os.mkdir('CANARY') }}", "SecurityError"),
    "lipsum": ("{{ lipsum.__globals__['os'].mkdir('CANARY') }}", "SecurityError"),
    "namespace": ("{{ namespace.__init__.__globals__['__builtins__']['open']('CANARY', 'w') }}", "SecurityError"),
    "namespace attribute": ("{% set ns = namespace(__class__=5) %}", "SecurityError"),
    "format": ("{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}", "SecurityError"),
    "attr": ("{{ (''|attr('__class__')).mro() }}", "Error"),
    "subclasses": ("{{ [].__class__.__base__.__subclasses__() }}", "SecurityError"),
    "self": ("{{ self._TemplateReference__context.environment.globals }}", "SecurityError"),
    "mutate": ("{{ messages.append(1) }}", "SecurityError"),
    "include": ("{% include '/etc/hostname' %}", "TypeError"),
    "import": ("{% import 'os' as os %}{{ os.mkdir('CANARY') }}", "TypeError"),
    "generator": ("{% set g = (x for x in ()) %}{{ g.gi_frame }}", "TemplateSyntaxError"),
    "long range": ("{% for i in range(99999999) %}{% endfor %}", "OverflowError"),
}


@pytest.mark.parametrize("name", BAD_TEMPLATES)
def test_a_template_that_fails_or_breaks_out_costs_its_own_rows_alone(name: str, tmp_path: Path, make_worker):
    text, reason = BAD_TEMPLATES[name]
    canary = tmp_path / "canary"
    template = "{% if messages[0].content == 'go' %}" + text.replace("CANARY", str(canary)) + "{% endif %}fine"
    worker = make_worker(tokenizer_with(tmp_path, CHAT_TEMPLATE), template)
    chat = Conversation(messages=[{"role": "user", "content": "go"}], template_kwargs={"zero": 0})
    (result,) = worker.token_ids([chat])
    assert isinstance(result, PromptError)
    assert (result.code, reason in result.reason) == ("chat_template", True), result.reason
    assert len(result.reason) < 500
    assert not canary.exists()


# Bounds

BOMBS = {
    "a long text": ("{{ 'a' * n }}", "prompt_too_large"),
    "a text beyond all memory": ("{{ 'a' * (n * 10) }}", "prompt_too_large"),
    "a wide field": ("{{ '%0999999999d' % n }}", "prompt_too_large"),
    "a list that doubles": (
        "{% set ns = namespace(l=['aaaaaaaa']) %}{% for i in range(90000) %}{% set ns.l = ns.l + ns.l %}{% endfor %}",
        "prompt_too_large",
    ),
    "nested loops": (
        "{% for i in range(n // 2000) %}{% for j in range(n // 2000) %}{% endfor %}{% endfor %}",
        "prompt_too_slow",
    ),
    "one long instruction": ("{{ (n ** 3) ** (n // 40) % 7 }}", "prompt_too_slow"),
    "recursion": ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "chat_template"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_one_bad_row_within_5_s_and_64_mib(name: str, tmp_path: Path, make_worker):
    """G94. The limits are processor time of a process of its own, so a busy machine makes no good row a bad one."""
    text, code = BOMBS[name]
    tokenizer = tokenizer_with(tmp_path, CHAT_TEMPLATE)
    worker = make_worker(
        tokenizer, "{% if messages[0].content == 'bomb' %}" + text + "{% endif %}{{ messages[0].content }}"
    )
    chats = [
        Conversation(messages=[{"role": "user", "content": text}], template_kwargs={"n": 200_000_000})
        for text in ("before", "bomb", "after")
    ]
    worker.token_ids(chats[:1])  # the process is there, and has loaded what it needs
    children_s = children_cpu_s()
    largest, began = peak_bytes(), time.monotonic()
    results = as_lists(worker.token_ids(chats))
    assert results[::2] == [tokenizer.encode("before"), tokenizer.encode("after")]
    assert results[1] in (code, "prompt_too_slow"), "on a slow machine the time is up before the memory is"
    assert peak_bytes() - largest < 64 * 2**20
    wall_s = time.monotonic() - began
    worker.close()
    assert min(wall_s, children_cpu_s() - children_s) < 5, "on a machine shared with others, processor time counts"


def children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_a_text_at_the_limit_is_tokenised_and_one_beyond_is_refused(tmp_path: Path, make_worker):
    worker = make_worker(tokenizer_with(tmp_path, "{{ 'ab ' * n }}"))
    fits = Conversation(messages=[USER], template_kwargs={"n": MAX_TEXT_BYTES // 24})
    beyond = Conversation(messages=[USER], template_kwargs={"n": MAX_TEXT_BYTES // 3 + 1})
    ids, refused = worker.token_ids([fits, beyond])
    assert len(ids) > 10_000
    assert refused.code == "prompt_too_large"


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_a_process_that_somebody_ends_costs_no_row(ending: int, tmp_path: Path, make_worker):
    tokenizer = tokenizer_with(tmp_path, CHAT_TEMPLATE)
    worker = make_worker(tokenizer)
    for _ in range(3):
        assert as_lists(worker.token_ids(["a", "b"])) == [tokenizer.encode("a"), tokenizer.encode("b")]
        os.kill(worker._process._process.pid, ending)


def test_a_process_that_is_stopped_is_replaced(tmp_path: Path, make_worker, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("nanovllm.prompt_worker.STUCK_S", 0.5)
    tokenizer = tokenizer_with(tmp_path, CHAT_TEMPLATE)
    worker = make_worker(tokenizer)
    worker.start()
    first = worker._process._process.pid
    os.kill(first, signal.SIGSTOP)
    results = as_lists(worker.token_ids(["a", "b"]))
    assert results[1] == tokenizer.encode("b")
    assert results[0] in ("prompt_too_slow", tokenizer.encode("a"))
    assert worker._process._process.pid != first


def test_the_process_has_no_secret_no_signal_and_no_file_to_write(tmp_path: Path, make_worker, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnopqrstuvwxyz")
    worker = make_worker(tokenizer_with(tmp_path, CHAT_TEMPLATE))
    worker.start()
    pid = worker._process._process.pid
    environment = Path(f"/proc/{pid}/environ").read_bytes()
    assert b"PYTHONPATH" in environment
    assert b"hf_abc" not in environment
    assert os.getsid(pid) == pid, "Ctrl-C at the terminal does not reach it"
    limits = Path(f"/proc/{pid}/limits").read_text()
    (file_size,) = [line for line in limits.splitlines() if line.startswith("Max file size")]
    assert file_size.split()[3] == "0"


def test_no_process_is_left_behind(tmp_path: Path, make_worker):
    tokenizer = tokenizer_with(tmp_path, CHAT_TEMPLATE)
    closed, dropped = PromptWorker(tokenizer.prompt_setup()), PromptWorker(tokenizer.prompt_setup())
    for worker in (closed, dropped):
        worker.start()
    pids = [worker._process._process.pid for worker in (closed, dropped)]  # pyright: ignore[reportOptionalMemberAccess]
    closed.close()
    closed.close()
    del worker, dropped
    gc.collect()
    assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []


def test_a_process_that_cannot_start_says_why(tmp_path: Path):
    setup = msgspec.structs.replace(tokenizer_with(tmp_path, None).prompt_setup(), tokenizer="{}")
    with pytest.raises(RuntimeError, match=r"(?s)did not start: exit code 1; .*Model missing"):
        PromptWorker(setup).token_ids(["x"])


def test_batches_of_every_size_keep_their_order(tmp_path: Path, make_worker):
    tokenizer = tokenizer_with(tmp_path, CHAT_TEMPLATE)
    worker = make_worker(tokenizer)
    for count in (0, 1, 2, MAX_BATCH - 1, MAX_BATCH, MAX_BATCH + 1, 3 * MAX_BATCH + 5):
        texts = list(itertools.islice((f"row {number}" for number in itertools.count()), count))
        assert as_lists(worker.token_ids(texts)) == [tokenizer.encode(text) for text in texts]
