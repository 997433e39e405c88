"""jaxlm predict: the bits of evaluate, any rows, and files that survive a kill."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import jaxlm
from jaxlm.artifacts.lines import GrowingLines
from jaxlm.artifacts.processes import is_main_process
from jaxlm.cli.main import main
from jaxlm.cli.predict import PredictConfig
from jaxlm.data.sources import Record, absolute
from jaxlm.train.load import load_model
from jaxlm.train.predictions import with_input
from tests.helpers.sentences import refused
from tests.helpers.tiny import (
    make_model,
    make_reader,
    questions,
    read_lines,
    sentences,
    write_jsonl,
    write_run,
)

TEMPLATE = "{text} it was {label}"
TASK = {"name": "t", "template": TEMPLATE, "labels": ["good", "bad"], "classes": ["yes", "no"]}


def predict(*words) -> int:
    return main(["predict", *map(str, words)])


def texts(count: int) -> list[str]:
    """Texts of 4 to 20 words."""
    row = [each["text"] for each in sentences(40)]
    return [" ".join([row[i % 40], *row[i % 7].split()] * (1 + i % 2)) for i in range(count)]


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory) -> Path:
    """A calibrated run, and 40 test rows: three chunks of 16 batches of one row."""
    path = write_run(tmp_path_factory.mktemp("predict"), tiny_model)
    rows = [{"text": t, "label": i % 2, "more": [i, None]} for i, t in enumerate(texts(40))]
    write_jsonl(path.parent / "test.jsonl", rows)
    write_jsonl(path.parent / "rows.jsonl", [{"text": r["text"], "more": i} for i, r in
                                             enumerate(rows)])  # fmt: skip
    words = ["--optimizer.name=adam", "--optimizer.learning_rate=0.02", "--steps=12"]
    assert main(["finetune", str(path), *words, "--calibrate=true"]) == 0
    return path.parent


@pytest.fixture(scope="module")
def predicted(folder) -> Path:
    """Predictions of unlabelled rows."""
    output = folder / "rows-predicted.jsonl"
    assert predict(folder / "run", folder / "rows.jsonl", f"--output={output}",
                   "--eval_batch_size=1") == 0  # fmt: skip
    return output


@pytest.mark.parametrize("size", [1, 64])
def test_probabilities_are_those_of_evaluate_bit_for_bit(
    size, folder, predicted, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(folder)
    run, size = folder / "run", f"--eval_batch_size={size}"
    output = tmp_path / "evaluated.jsonl"
    assert main(["evaluate", str(run), size, f"--predictions={output}"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert predict(run, folder / "test.jsonl", size, f"--output={tmp_path / 'p.jsonl'}") == 0
    assert (tmp_path / "p.jsonl").read_bytes() == output.read_bytes()
    rows, given = read_lines(output), read_lines(folder / "test.jsonl")
    assert [{k: row[k] for k in given[0]} for row in rows] == given
    if size.endswith("=1"):
        unlabelled = read_lines(predicted)
        assert [row["probabilities"] for row in unlabelled] == [
            row["probabilities"] for row in rows
        ]
        assert "label" not in unlabelled[0]
    right = [row["prediction_index"] == row["label"] for row in rows]
    assert np.mean(right) == result["accuracy"]
    assert result["standard_error"] == pytest.approx(np.std(right, ddof=1) / math.sqrt(40))
    for row in rows:
        shares = row["probabilities"]
        assert sum(shares.values()) == pytest.approx(1)
        assert max(shares, key=shares.get) == row["prediction"] == ["good", "bad"][
            row["prediction_index"]
        ]  # fmt: skip


def test_the_offsets_of_the_run_are_subtracted(folder, predicted, capsys):
    """Without them, as a plain task has it, every log-odds differs by the same number."""
    offsets = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[0])
    offsets = offsets["option_offsets"]
    task = {**TASK, "classes": None}
    plain = jaxlm.predict(folder / "run", folder / "rows.jsonl", task=task)

    def odds(rows):
        pairs = [row["probabilities"] for row in rows]
        return np.array([math.log(pair["good"] / pair["bad"]) for pair in pairs])

    shift = odds(plain) - odds(read_lines(predicted))
    np.testing.assert_allclose(shift, offsets[0] - offsets[1], rtol=1e-4)
    assert abs(shift[0]) > 1e-3


def test_a_config_object_of_a_run_predicts_for_its_task(folder, predicted):
    run, rows = str(folder / "run"), str(folder / "rows.jsonl")
    found = jaxlm.predict(PredictConfig(model=run, rows=rows, eval_batch_size=1))
    assert found == read_lines(predicted)


@pytest.mark.parametrize("ending", ["csv", "parquet", "json", "jsonl.gz"])
def test_rows_of_every_form(ending, tiny_model, tmp_path):
    rows = [{"text": text, "label": "unknown"} for text in texts(5)]
    path = tmp_path / f"rows.{ending}"
    if ending == "csv":
        path.write_text("text,label\n" + "".join(f"{r['text']},{r['label']}\n" for r in rows))
    elif ending == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif ending == "json":
        path.write_text(json.dumps(rows))
    else:
        import gzip

        path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in rows).encode()))
    found = jaxlm.predict(tiny_model, path, task=TASK)
    assert [{k: row[k] for k in ("text", "label")} for row in found] == rows
    assert set(found[0]["probabilities"]) == {"yes", "no"}


@pytest.mark.parametrize("cut", [0, 1, 2000, 3456, -1])
def test_a_file_cut_anywhere_is_finished_with_the_same_bytes(cut, folder, predicted, tmp_path):
    output, whole = tmp_path / "p.jsonl", predicted.read_bytes()
    header = json.loads(GrowingLines(predicted).header.read_text())
    assert header["lines"] == 40
    GrowingLines(output).header.write_text(json.dumps({**header, "lines": None}))
    output.write_bytes(whole[:cut])
    words = (folder / "run", folder / "rows.jsonl", f"--output={output}", "--eval_batch_size=1")
    assert predict(*words) == 0
    assert output.read_bytes() == whole
    before = output.stat().st_mtime_ns
    assert predict(*words) == 0
    assert output.stat().st_mtime_ns == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.jsonl", "p.jsonl.header.json"]


def test_whole_chunks_that_are_there_are_not_predicted_again(
    folder, predicted, tmp_path, monkeypatch
):
    from jaxlm.train.measure import Choices

    chunks, score = [], Choices._score
    monkeypatch.setattr(Choices, "_score", lambda *a: chunks.append(len(a[1])) or score(*a))
    output, lines = tmp_path / "p.jsonl", predicted.read_text().splitlines(keepends=True)
    header = json.loads(GrowingLines(predicted).header.read_text())
    GrowingLines(output).header.write_text(json.dumps({**header, "lines": None}))
    output.write_text("".join(lines[:20]) + lines[20][:9])
    path = jaxlm.predict(folder / "run", folder / "rows.jsonl", output=output, eval_batch_size=1)
    assert path == output
    assert (chunks, output.read_bytes()) == ([16, 8], predicted.read_bytes())


def test_samples_of_a_choice_are_one_row_each(folder, predicted, tmp_path):
    """They do not differ, so that there is one; and the finished file stays as it is."""
    output = tmp_path / "p.jsonl"
    words = (folder / "run", folder / "rows.jsonl", f"--output={output}", "--eval_batch_size=1")
    for _ in range(2):
        assert predict(*words, "--samples=4", "--temperature=1") == 0
        assert output.read_bytes() == predicted.read_bytes()


def test_no_field_of_the_input_is_lost():
    values = {"input_prediction": 1, "prediction": 2, "input_input_prediction": 3, "id": 4}
    row = with_input(Record(values, "rows.jsonl", 1), {"prediction": "new"})
    assert sorted(map(str, row.values())) == ["1", "2", "3", "4", "new"]
    assert row["prediction"] == "new"


def test_a_source_that_is_a_link_keeps_its_name(folder, tmp_path):
    (tmp_path / "blob").write_bytes((folder / "rows.jsonl").read_bytes())
    (tmp_path / "rows.jsonl").symlink_to(tmp_path / "blob")
    assert absolute(str(tmp_path / "rows.jsonl"), "rows", None) == str(tmp_path / "rows.jsonl")


def test_an_output_of_something_else_is_refused_by_name(folder, predicted, tmp_path):
    kept = predicted.read_bytes()
    words = {"output": predicted, "eval_batch_size": 1}
    other = make_model(tmp_path / "other", scale=2.0)
    with refused("output", "was made with model = "):
        jaxlm.predict(other, folder / "rows.jsonl", task={**TASK, "classes": None}, **words)
    with refused("output", "was made with rows = "):
        jaxlm.predict(folder / "run", folder / "test.jsonl", **words)
    with refused("output", "was made with task.template = "):
        jaxlm.predict(
            folder / "run", folder / "rows.jsonl", **words | {"task.template": "{text} {label}"}
        )
    with refused("output", "was made with eval_batch_size = 1 (got 2)"):
        jaxlm.predict(folder / "run", folder / "rows.jsonl", **words | {"eval_batch_size": 2})
    (tmp_path / "p.jsonl").write_text("mine\n")
    with refused("output", "p.jsonl.header.json"):
        jaxlm.predict(folder / "run", folder / "rows.jsonl", output=tmp_path / "p.jsonl")
    lines = GrowingLines(tmp_path / "q.jsonl")
    with lines.held({}, {}), refused("output", f"process {os.getpid()}"):
        jaxlm.predict(folder / "run", folder / "rows.jsonl", output=tmp_path / "q.jsonl")
    assert predicted.read_bytes() == kept
    assert is_main_process()


def test_completions_are_those_of_generate(tiny_model, tmp_path):
    """A batch of three prompts has the key of `jaxlm generate`, and each sample is a row."""
    rows = [{"prompt": f"the film {i}", "completion": "good", "id": i} for i in range(7)]
    path = write_jsonl(tmp_path / "p.jsonl", rows)
    keys = {"max_new_tokens": 4, "temperature": 1.0, "seed": 3}
    wanted = jaxlm.generate(tiny_model, file=path, num_samples=2, batch_size=3, **keys)
    found = jaxlm.predict(tiny_model, path, samples=2, eval_batch_size=3, **keys)
    assert [row["completion"] for row in found] == [row["text"] for row in wanted]
    assert [(row["id"], row["sample"]) for row in found] == [
        (i, j) for i in range(7) for j in (0, 1)
    ]
    assert {row["input_completion"] for row in found} == {"good"}
    sums = [sum(row["log_probs"]) for row in wanted]
    np.testing.assert_allclose([row["log_probability"] for row in found], sums, atol=1e-4)
    output = tmp_path / "out.jsonl"
    words = [f"--{name}={value}" for name, value in keys.items()]
    words += ["--samples=2", "--eval_batch_size=3", f"--output={output}"]
    assert predict(tiny_model, path, *words) == 0
    assert read_lines(output) == found


def test_the_last_turn_of_the_assistant_is_written_anew(tiny_model, tmp_path):
    user, answer = (
        {"role": r, "content": c} for r, c in (("user", "the film"), ("assistant", "a"))
    )
    rows = [{"messages": [user]}, {"messages": [user, answer]}, {"prompt": [user]}]
    path = write_jsonl(tmp_path / "m.jsonl", rows)
    found = jaxlm.predict(tiny_model, path, messages={"template": "plain"}, max_new_tokens=3)
    wanted = jaxlm.generate(tiny_model, prompt="the film", max_new_tokens=3)[0]["text"]
    assert [row["completion"] for row in found] == [wanted] * 3
    path = write_jsonl(tmp_path / "m.jsonl", [{"messages": [answer]}])
    with refused(f"{path}, line 1", "has no turn"):
        jaxlm.predict(tiny_model, path)


def test_texts_have_the_loss_that_a_run_measures(tiny_model, tmp_path):
    """Texts of up to 60 tokens, in pieces of at most 32, against a sum token by token."""
    rows = [{"text": text} for text in [*texts(20), " ".join(["the"] * 60), ""]]
    path = write_jsonl(tmp_path / "texts.jsonl", rows)
    found = jaxlm.predict(tiny_model, path, eval_batch_size=3)
    lm = load_model(tiny_model)
    for row in (found[3], found[20]):
        ids, total = lm.tokenizer(row["text"], add_special_tokens=False)["input_ids"], 0.0
        for start in range(0, len(ids), 31):
            piece = np.array([[1, *ids[start : start + 31]]])
            total += float(lm.log_probs(lm.params, piece).sum())
        assert row["num_tokens"] == len(ids)
        assert row["log_probability"] == pytest.approx(total, rel=1e-5)
        assert row["perplexity"] == pytest.approx(math.exp(-total / len(ids)), rel=1e-5)
    assert (found[21]["num_tokens"], found[21]["log_probability"]) == (0, 0.0)
    run = jaxlm.finetune(
        model=tiny_model,
        text={"train": path, "test": path, "max_length": 32},
        steps=0,
        output=tmp_path / "run",
    )
    again = jaxlm.predict(run.folder, path)
    loss = -sum(row["log_probability"] for row in again) / sum(row["num_tokens"] for row in again)
    assert loss == pytest.approx(run.summary["test"]["loss"], rel=1e-6)


def test_generated_answers_of_a_task(tmp_path, capsys):
    model = make_model(tmp_path / "reader", make_reader(), scale=4.0)
    path = write_jsonl(tmp_path / "validation.jsonl", questions(9))
    task = {"name": "opt/squad", "train": path, "test": path, "max_new_tokens": 4}
    task |= {"num_validation": 1}
    found = jaxlm.predict(model, path, task=task)
    evaluated = tmp_path / "e.jsonl"
    result = jaxlm.evaluate(model, task=task, predictions=evaluated)
    by_title = [[row[k] for k in ("context", "completion")] for row in read_lines(evaluated)]
    assert sorted(by_title) == sorted([row["context"], row["completion"]] for row in found)
    assert result["standard_error"] >= 0


def test_rows_with_their_own_options(tiny_model, tmp_path):
    """An option that a row lists twice has the probability of both."""
    rows = [{"text": "the film", "options": options} for options in
            (["was good", "was bad", "it"], ["good", "bad", "good"], ["bad", "good"])]  # fmt: skip
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    task = {"name": "own", "template": "{text} {label}", "options": "per_example"}
    found = jaxlm.predict(tiny_model, path, task=task)
    for row, given in zip(found, rows, strict=True):
        assert row["options"] == given["options"]
        assert row["probabilities"].keys() == set(given["options"])
        assert sum(row["probabilities"].values()) == pytest.approx(1)
        assert row["prediction"] == given["options"][row["prediction_index"]]
    twice, once = found[1]["probabilities"], found[2]["probabilities"]
    odds = once["good"] / once["bad"]
    assert twice["good"] / twice["bad"] == pytest.approx(2 * odds, rel=1e-5)


def test_two_models_on_the_same_examples(folder, tiny_model, monkeypatch, capsys):
    from jaxlm.evaluation import paired_standard_error

    monkeypatch.chdir(folder)
    assert main(["evaluate", "run", str(tiny_model)]) == 0
    found = json.loads(capsys.readouterr().out)
    alone = jaxlm.evaluate(tiny_model, task=jaxlm_task(folder))
    skipped = {"peak_memory_bytes"}
    for name in alone.keys() - skipped:
        assert found["other"][name] == alone[name]
    rights = []
    for number, words in enumerate(([folder / "run"], [tiny_model])):
        output = folder / f"right-{number}.jsonl"
        options = {} if number == 0 else {"task": jaxlm_task(folder)}
        jaxlm.evaluate(*words, predictions=output, **options)
        rights.append([r["prediction_index"] == r["label"] for r in read_lines(output)])
    assert found["difference"]["accuracy"] == found["accuracy"] - alone["accuracy"]
    assert found["difference"]["standard_error"] == paired_standard_error(*map(np.array, rights))
    other = {**jaxlm_task(folder), "test": str(folder / "train.jsonl")}
    jaxlm.finetune(model=tiny_model, task=other, steps=0, output=folder / "other")
    with refused("other"):
        jaxlm.evaluate(folder / "run", other=folder / "other")
    test = str(folder / "test.jsonl")  # for both
    same = jaxlm.evaluate(folder / "run", other=folder / "other", **{"task.test": test})
    assert same["other"]["examples"] == same["examples"] == 40


def jaxlm_task(folder: Path) -> dict:
    files = {split: str(folder / f"{split}.jsonl") for split in ("train", "validation", "test")}
    return {**TASK, "classes": None, "name": "tiny", **files}


PEAK = """
import re, sys
from jaxlm.cli.main import main
from jaxlm.cli.predict import PredictConfig
assert main(["predict", *sys.argv[1:]]) == 0
# Unlike ru_maxrss, it has nothing of the process that started this one.
print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) >> 10)
"""


@pytest.mark.slow
def test_the_memory_does_not_grow_with_the_file(folder, tmp_path):
    """20,000 rows of 5 KB, 100 MB in all, and 200,000 short ones take little more than 2,000."""
    peaks = []
    for count, size in ((2000, 5000), (20_000, 5000), (200_000, 5)):
        rows = [{"text": text, "more": "x" * size} for text in texts(count)]
        path = write_jsonl(tmp_path / f"{count}.jsonl", rows)
        words = [folder / "run", path, f"--output={path}.out"]
        done = subprocess.run(
            [sys.executable, "-c", PEAK, *map(str, words)],
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(int(done.stdout))
    print(f"peak MiB of 2,000, 20,000 and 200,000 rows: {peaks}")
    assert max(peaks[1:]) < peaks[0] + 40
