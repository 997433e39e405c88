"""jaxlm generate prints and writes what the library generates; a mistake is one sentence."""

import io
import json
import os

import numpy as np
import pytest

import jaxlm
from jaxlm.cli.generate import write_samples
from jaxlm.cli.main import main
from jaxlm.core.errors import UserError
from jaxlm.evaluation import generate_text

PROMPT = "the film is"


@pytest.fixture(scope="module")
def lm():
    return jaxlm.from_pretrained()


def generate(capsys, *words):
    assert main(["generate", *map(str, words)]) == 0
    return capsys.readouterr().out


def records(text):
    return [json.loads(line) for line in text.splitlines()]


def test_one_prompt_is_streamed(lm, capsys):
    (sample,) = generate_text(lm, [PROMPT], max_new_tokens=12)[0]
    words = [f"--prompt={PROMPT}", "--max_new_tokens=12"]
    assert generate(capsys, *words) == sample.text + "\n"
    second = sample.text.split()[1]
    shown = generate(capsys, *words, f"--stop={second}")
    assert shown == sample.text[: sample.text.index(second)] + "\n"
    assert generate(capsys, *words, f'--stop=["#", "{second}"]') == shown
    assert generate(capsys, *words, "--stop=end") == sample.text + "\n"


def test_json_has_the_text_that_is_streamed(capsys):
    words = [f"--prompt={PROMPT}", "--max_new_tokens=9", "--temperature=1", "--seed=3"]
    shown = generate(capsys, *words)
    (record,) = records(generate(capsys, *words, "--json=true"))
    assert record["text"] + "\n" == shown
    assert generate(capsys, *words[:-1]) != shown
    several = records(generate(capsys, *words, "--num_samples=3"))
    assert [record["sample"] for record in several] == [0, 1, 2]
    assert len({record["text"] for record in several}) == 3


def test_a_chat_answers_each_line_with_all_before_it(lm, capsys, monkeypatch):
    lines = "the film is\n\nbut a story\n"
    options = {"max_new_tokens": 6, "stop": [lm.tokenizer.eos_token]}
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    words = ["--chat", "--template=tulu", "--system=be brief", "--max_new_tokens=6"]
    answers = generate(capsys, *words).splitlines()
    begin = "<|system|>\nbe brief\n<|user|>\nthe film is\n<|assistant|>\n"
    ((first,),) = generate_text(lm, [begin], **options)
    said = first.text.strip() + lm.tokenizer.eos_token
    more = f"{begin}{said}\n<|user|>\nbut a story\n<|assistant|>\n"
    ((second,),) = generate_text(lm, [more], **options)
    assert "\n".join(answers) == f"{first.text}\n{second.text}"


def test_messages_of_a_file_are_answered(lm, tmp_path, capsys):
    rows = tmp_path / "talk.jsonl"
    turns = [{"role": "user", "content": "the film is"}]
    rows.write_text(json.dumps({"messages": turns}) + "\n")
    (record,) = records(
        generate(capsys, f"--file={rows}", "--template=plain", "--max_new_tokens=5")
    )
    ((sample,),) = generate_text(lm, ["the film is"], max_new_tokens=5)
    assert (record["prompt"], record["text"]) == ("the film is", sample.text)


def test_prompts_of_a_file(lm, tmp_path, capsys):
    prompts = [PROMPT, "a", "an actor who", "Zoë"]
    text, rows = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    text.write_text("\n\n".join(prompts) + "\n", encoding="utf-8")
    rows.write_text("".join(json.dumps({"prompt": p, "id": 1}) + "\n" for p in prompts))
    output = tmp_path / "out.jsonl"
    words = ["--max_new_tokens=7", "--batch_size=2"]
    assert generate(capsys, f"--file={text}", *words, f"--output={output}") == ""
    found = records(output.read_text(encoding="utf-8"))
    assert records(generate(capsys, f"--file={rows}", *words)) == found
    assert [record["index"] for record in found] == [0, 1, 2, 3]
    wanted = generate_text(lm, prompts, max_new_tokens=7)
    for record, prompt, (sample,) in zip(found, prompts, wanted, strict=True):
        assert (record["prompt"], record["text"]) == (prompt, sample.text)
        assert (record["tokens"], record["finish"]) == (sample.tokens.tolist(), sample.finish)
        np.testing.assert_allclose(record["log_probs"], sample.log_probs, atol=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "out.jsonl", "prompts.jsonl", "prompts.txt"
    ]  # fmt: skip


def test_of_two_commands_with_one_output_one_writes_it(tmp_path, monkeypatch):
    path = tmp_path / "out.jsonl"

    def lines():
        yield "slow"
        monkeypatch.setattr(os, "getpid", lambda: 1)
        write_samples(path, ["fast", "fast"])
        yield "slow"

    with pytest.raises(UserError, match="output: exists already"):
        write_samples(path, lines())
    assert path.read_text() == "fast\nfast\n"
    assert list(tmp_path.iterdir()) == [path]


def test_a_model_of_ones_own_and_a_configuration(tiny_model, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {tiny_model}\nprompt: the film\nmax_new_tokens: 4\n")
    shown = generate(capsys, path)
    assert shown == generate(capsys, tiny_model, "--prompt=the film", "--max_new_tokens=4")
    assert len(shown.split()) == 4
