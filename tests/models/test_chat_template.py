"""Chat templates: the texts of transformers, and an end to those without one."""

import os
import time

import pytest

from jaxlm.core.errors import UserError
from jaxlm.models import chat_template
from jaxlm.models.chat_template import render_chat
from tests.helpers.tiny import make_tokenizer

TURNS = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "Is it <good>, é?"},
    {"role": "assistant", "content": "yes"},
]
CHATML = """{%- for m in messages %}
{{- '<|im_start|>' + m['role'] + '\\n' }}
{%- if m.role == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}
{%- else %}{{ m['content'] | trim }}{% endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
TEMPLATES = {
    "chatml": CHATML,
    "special tokens": "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ pad_token }}"
    "{% endfor %}",
    "loop controls": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m }}"
    "{% endfor %}",
    "json": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}",
    "state": "{% set n = namespace(x=0) %}{% for m in messages %}{% set n.x = n.x + 1 %}"
    "{% endfor %}{{ n.x }}{{ tools is none }}",
}


@pytest.mark.parametrize("ask", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_texts_are_those_of_transformers(name: str, ask: bool):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATES[name]
    wanted = tokenizer.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=ask)
    assert render_chat(tokenizer, TURNS, add_generation_prompt=ask) == wanted


LOOPS = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
BOMBS = {
    "loops": LOOPS,
    "a long text": "{{ 'a' * 3000000000 }}",
    "a text that doubles": "{% set n = namespace(x='a') %}{% for i in range(99) %}"
    "{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
    "a wide field": "{{ 'a'.rjust(3000000000) }}",
    "a large number": "{{ (9 ** (9 ** 9)) | string | length }}",
    "an answer of gigabytes": "{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_template_without_end_is_stopped_and_the_next_one_works(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(chat_template, "SECONDS", 1)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = BOMBS[name]
    before = time.process_time()
    with pytest.raises(UserError, match=r"^chat template: .* Use another template\.$"):
        render_chat(tokenizer, TURNS)
    assert time.process_time() - before < 5
    tokenizer.chat_template = "{{ messages | length }}"
    assert render_chat(tokenizer, TURNS) == "3"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% if %}", "Expected an expression"),
        ("{{ messages[7].content }}", "no element 7"),
        (None, "no chat template"),
    ],
)
def test_what_a_template_says_is_passed_on(template: str | None, said: str):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=said):
        render_chat(tokenizer, TURNS)


def test_after_an_interruption_the_next_text_is_its_own(monkeypatch: pytest.MonkeyPatch):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    render_chat(tokenizer, TURNS)

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(chat_template._worker.stdout, "readline", interrupted)
    with pytest.raises(KeyboardInterrupt):
        render_chat(tokenizer, TURNS)
    assert render_chat(tokenizer, TURNS[1:]) == TURNS[1]["content"]


def test_the_process_reads_neither_files_nor_the_folder_it_starts_in(tmp_path, monkeypatch):
    """A file of the user that is called like a module of Python is not imported."""
    (tmp_path / "json.py").write_text("raise SystemExit")
    monkeypatch.chdir(tmp_path)
    chat_template.stop()
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% include '/etc/passwd' %}"
    with pytest.raises(UserError, match="no loader"):
        render_chat(tokenizer, TURNS)
    assert os.listdir(tmp_path) == ["json.py"]
