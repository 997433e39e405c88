"""jaxlm generate prints and writes what the library generates; a mistake is one sentence."""

import json
import os

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm.cli.generate import _write
from jaxlm.cli.main import main
from jaxlm.core.errors import UserError
from jaxlm.evaluation import generate_text
from jaxlm.models import init_params, save_pretrained

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
    assert generate(capsys, *words, "--stop=[end]") == sample.text + "\n"


def test_json_has_the_text_that_is_streamed(capsys):
    words = [f"--prompt={PROMPT}", "--max_new_tokens=9", "--temperature=1", "--seed=3"]
    shown = generate(capsys, *words)
    (record,) = records(generate(capsys, *words, "--json=true"))
    assert record["text"] + "\n" == shown
    assert generate(capsys, *words[:-1]) != shown
    several = records(generate(capsys, *words, "--num_samples=3"))
    assert [record["sample"] for record in several] == [0, 1, 2]
    assert len({record["text"] for record in several}) == 3


def test_prompts_of_a_file(lm, tmp_path, capsys):
    prompts = [PROMPT, "a", "an actor who", "Zoë"]
    text, rows = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    text.write_text("\n\n".join(prompts) + "\n", encoding="utf-8")
    rows.write_text("".join(json.dumps({"prompt": p, "id": 1}) + "\n" for p in prompts))
    output = tmp_path / "out.jsonl"
    words = ["--max_new_tokens=7", "--batch_size=3"]
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
        _write(path, iter(["fast", "fast"]))
        yield "slow"

    with pytest.raises(UserError, match="output: is there already"):
        _write(path, lines())
    assert path.read_text() == "fast\nfast\n"
    assert list(tmp_path.iterdir()) == [path]


def test_a_model_of_ones_own_and_a_configuration(tiny_model, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {tiny_model}\nprompt: the film\nmax_new_tokens: 4\n")
    shown = generate(capsys, path)
    assert shown == generate(capsys, tiny_model, "--prompt=the film", "--max_new_tokens=4")
    assert len(shown.split()) == 4


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def without_tokenizer(folder):
    lm = jaxlm.from_pretrained(folder / "model")
    save_pretrained(lm.replace(tokenizer=None), folder / "bare")


def learned_positions(folder):
    lm = jaxlm.from_pretrained(folder / "model")
    config = lm.config.replace(
        family="gpt2", positions="learned", max_positions=8, norm="layernorm", activation="gelu",
        gated_mlp=False, attention_bias=True, output_bias=True, mlp_bias=True,
    )  # fmt: skip
    params = init_params(config, jax.random.key(0))
    save_pretrained(lm.replace(config=config, params=params), folder / "learned")


def nothing(folder):
    pass


ROWS = {
    "no prompt": (
        nothing,
        ["model"],
        "prompt: has no token, and the tokenizer puts none before it (got ''). Give text.",
    ),
    "prompt and file": (
        nothing,
        ["--prompt=a", "--file=b.txt"],
        "command line: file: is given beside prompt. Give one of them.",
    ),
    "unknown key": (
        nothing,
        ["--promt=a"],
        "command line: promt: is no key. Did you mean prompt?",
    ),
    "no model": (
        nothing,
        ["./no", "--prompt=a"],
        "model: there is no such folder (got ./no). Give a folder or a hub id.",
    ),
    "no tokenizer": (
        without_tokenizer,
        ["bare", "--prompt=a"],
        "model: has no tokenizer, which text needs. Put its files into the model's folder, or give "
        "token ids to lm.generate.",
    ),
    "too long": (
        learned_positions,
        ["learned", "--prompt=the film"],
        "max_new_tokens: with the prompt needs 65 positions, and the model has 8 (got 64). Lower "
        "it, or shorten the prompt.",
    ),
    "no file": (
        nothing,
        ["--file=no.txt"],
        "file: there is no such file (got no.txt). Give a file with prompts.",
    ),
    "other file": (
        nothing,
        ["--file=a.csv"],
        "file: is neither .txt nor .jsonl (got a.csv). Rename or convert it.",
    ),
    "empty file": (
        write("a.txt", b"\n \n"),
        ["--file=a.txt"],
        "file: is empty (got a.txt). Give a file with at least one prompt.",
    ),
    "binary file": (
        write("a.txt", b"\xff\xfe"),
        ["--file=a.txt"],
        "a.txt: not text in UTF-8. Correct the file or write it again.",
    ),
    "no JSON": (
        write("a.jsonl", b'{"prompt": "a"}\n{"text": "a"}\n'),
        ["--file=a.jsonl"],
        'a.jsonl, line 2: is no JSON object with a text "prompt". Write {"prompt": "..."}.',
    ),
    "output there": (
        write("o.jsonl", b"kept"),
        ["--prompt=a", "--output=o.jsonl"],
        "output: is there already (got o.jsonl). Give a new file.",
    ),
    "no folder": (
        nothing,
        ["--prompt=a", "--output=no/o.jsonl"],
        "output: there is no folder no (got no/o.jsonl). Make it.",
    ),
    "no tokens": (
        nothing,
        ["--max_new_tokens=0"],
        "command line: max_new_tokens: must be from 1 to 1000000000 (got 0). Correct it.",
    ),
    "no samples": (
        nothing,
        ["--num_samples=0"],
        "command line: num_samples: must be from 1 to 1048576 (got 0). Correct it.",
    ),
    "cold": (
        nothing,
        ["--temperature=-1"],
        "command line: temperature: must be at least 0 and at most 1e+30 (got -1.0). Correct it.",
    ),
    "top_p": (
        nothing,
        ["--temperature=1", "--top_p=0"],
        "command line: top_p: must be above 0 and at most 1 (got 0.0). Correct it.",
    ),
    "same samples": (
        nothing,
        ["--num_samples=2"],
        "command line: num_samples: all are the same at temperature 0 (got 2). Give temperature.",
    ),
    "idle filter": (
        nothing,
        ["--top_k=2"],
        "command line: top_k: does nothing at temperature 0 (got 2). Give temperature.",
    ),
    "empty stop": (nothing, ["--prompt=a", "--stop="], "stop: has an empty text. Leave it out."),
    "seed": (
        nothing,
        ["--seed=-1"],
        "command line: seed: must be from 0 to 2**32 - 1 (got -1). Correct it.",
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_mistake_is_one_sentence(name, tiny_model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(tiny_model)
    breaks, words, expected = ROWS[name]
    breaks(tmp_path)
    before = sorted(tmp_path.iterdir())
    capsys.readouterr()
    assert main(["generate", *words]) == 2
    said = capsys.readouterr()
    assert (said.err, said.out) == (f"error: {expected}\n", "")
    assert sorted(tmp_path.iterdir()) == before
