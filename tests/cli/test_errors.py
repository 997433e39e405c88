"""A table of mistakes: each ends with exit code 2, one sentence of one form, and nothing written.

`pytest -n 0 -s tests/cli/test_errors.py` prints every sentence.
"""

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import yaml

import jaxlm
from jaxlm.cli.config import load
from jaxlm.cli.main import main
from jaxlm.models import init_params, save_pretrained
from jaxlm.train.finetuning import FinetuneConfig
from jaxlm.train.run_folder import to_dict
from tests.helpers.sentences import check_sentence
from tests.helpers.tiny import questions, write_jsonl, write_run

Break = Callable[[Path], object]


def written(name: str, content: str | bytes) -> Break:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def no_weights(folder: Path) -> None:
    (folder / "model" / "model.safetensors").unlink()


def pickled_weights(folder: Path) -> None:
    no_weights(folder)
    (folder / "model" / "pytorch_model.bin").write_bytes(b"\x80\x02")


def cut_weights(folder: Path) -> None:
    weights = folder / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def another_shape(folder: Path) -> None:
    from safetensors.numpy import load_file, save_file

    weights = folder / "model" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"] = np.ones(17, np.float32)
    save_file(tensors, weights)


def no_tokenizer(folder: Path) -> None:
    save_pretrained(jaxlm.from_pretrained(folder / "model").replace(tokenizer=None), folder / "new")


def eight_positions(folder: Path) -> None:
    import jax

    lm = jaxlm.from_pretrained(folder / "model")
    config = lm.config.replace(
        family="gpt2", positions="learned", max_positions=8, norm="layernorm", activation="gelu",
        gated_mlp=False, attention_bias=True, output_bias=True, mlp_bias=True,
    )  # fmt: skip
    params = init_params(config, jax.random.key(0))
    save_pretrained(lm.replace(config=config, params=params), folder / "new")


def other_files(folder: Path) -> None:
    (folder / "run").mkdir()
    (folder / "run" / "thesis.tex").write_text("kept")


def another_run(folder: Path) -> None:
    (folder / "run").mkdir()
    config = to_dict(load(FinetuneConfig, folder / "run.yaml"))
    (folder / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "run" / "summary.json").write_text("{}")  # it has begun


def no_output(folder: Path) -> None:
    text = (folder / "run.yaml").read_text()
    (folder / "run.yaml").write_text(text[: text.index("output:")])


def long_answers(folder: Path) -> None:
    rows = str(write_jsonl(folder / "questions.jsonl", questions(8)))
    task = {"name": "opt/squad", "train": rows, "test": rows, "num_validation": 4}
    text = (folder / "run.yaml").read_text()
    start, end = text.index("task:"), text.index("optimizer:")
    task = json.dumps(task | {"max_new_tokens": 32})
    (folder / "run.yaml").write_text(f"{text[:start]}task: {task}\n{text[end:]}")


class Row(NamedTuple):
    """A mistake.

    Attributes:
        words: the command.
        key: what its sentence must name.
        breaks: what is wrong with the files.
        sentence: the whole sentence, for one mistake of each kind.
    """

    words: str
    key: str
    breaks: Break | None = None
    sentence: str | None = None


RUN, DATA, GOOD = "finetune run.yaml", "train.jsonl", '{"text": "a", "label": 0}\n'
SVAG = f"{RUN} --dynamics.name=svag --dynamics.l=2"
ROWS = [
    # Command lines.
    Row(
        "finetone", "command",
        sentence="command: is not known (got finetone). Choose one of",
    ),
    Row("finetune --config=no.yaml", "config"),
    Row(f"{RUN} run.yaml", "config"),
    Row(f"{RUN} --steps", "--steps"),
    Row(f"{RUN} --steps=1 --steps=2", "--steps"),
    Row(f"{RUN} --resume=maybe", "--resume"),
    Row("evaluate model --model=model", "model"),
    Row("evaluate --mesh=rows=2", "mesh"),
    Row("evaluate --mesh", "--mesh"),
    Row("evaluate --mesh=data=30", "mesh"),
    Row("evaluate --processes=0", "processes"),
    Row("evaluate --devices=two", "devices"),
    Row("evaluate --distributed=here", "distributed"),
    Row("evaluate --processes=2 --distributed=auto", "processes"),
    Row("info model --devices=2", "devices"),
    Row("info a b", "MODEL"),
    Row("info --print-config", "--print-config"),
    Row("convert model", "TARGET"),
    Row("convert model model", "TARGET"),
    Row("convert model new --dtype=int8", "dtype"),
    Row("pretrain", "config"),
    Row("sweep", "config"),
    # Values of a configuration.
    Row(
        f"{RUN} --batchsize=3", "batchsize",
        sentence="command line: batchsize: is not a key (got '3'). Did you mean batch_size?",
    ),
    Row(f"{RUN} --lerning_rate=3", "lerning_rate"),
    Row(f"{RUN} --optimizer.lerning_rate=3", "optimizer.lerning_rate"),
    Row(
        f"{RUN} --steps=many", "steps",
        sentence="command line: steps: must be a whole number (got 'many'). Correct it.",
    ),
    Row(
        f"{RUN} --steps=-3", "steps",
        sentence="command line: steps: must be from 0 to 1000000000 (got -3). Correct it.",
    ),
    Row(
        f"{RUN} --bits=2", "bits",
        sentence="command line: bits: is not known (got '2'). Choose one of 8, 4.",
    ),
    Row(
        RUN, "output", no_output,
        sentence="run.yaml: output: is missing (got nothing). Add it.",
    ),
    Row(f"{RUN} --output=", "output"),
    Row(f"{RUN} --task.k=[1]", "task.k"),
    Row(f"{RUN} --task.labels=good", "task.labels"),
    Row(f"{RUN} --batch_size=0", "batch_size"),
    Row(f"{RUN} --optimizer.eps=0", "optimizer.eps"),
    Row(f"{RUN} --optimizer.name=adamm", "optimizer.name"),
    Row(f"{RUN} --optimizer.schedule=cubic", "optimizer.schedule"),
    Row(f"{RUN} --epochs=2", "epochs"),
    Row(f"{RUN} --patience=2 --task.validation=null", "patience"),
    Row(f"{RUN} --optimizer.select=nothing", "optimizer.select"),
    Row(f"{RUN} --optimizer.select=(", "optimizer.select"),
    Row(f"{RUN} --optimizer.name=adam --objective=accuracy", "objective"),
    Row(f"{RUN} --objective=f1", "objective"),
    Row(f"{RUN} --calibrate=maybe", "calibrate"),
    Row(SVAG, "dynamics"),
    Row(f"{RUN} --dynamics.name=svag", "dynamics.l"),
    Row(f"{SVAG} --optimizer.name=adamw --param_dtype=bfloat16", "dynamics"),
    Row(RUN, "config", written("run.yaml", "task: {text} x {")),
    # Devices of a dry run.
    Row(f"{RUN} --dry-run --device.name=H999", "device.name"),
    Row(f"{RUN} --dry-run --device.name=A100 --device.utilisation=40", "device.utilisation"),
    Row(f"{RUN} --dry-run --device.name=A100 --steps=0", "steps"),
    # Data.
    Row(f"{RUN} --task.train=no.jsonl", "task.train"),
    Row(f"{RUN} --task.labels='[good, \"\"]'", "task.labels"),
    Row(f"{RUN} --task.template='{{text}} it was'", "task.template"),
    Row(f"{RUN} --task.k=21", "task.k"),
    Row(f"{RUN} --task.k=11 --task.validation=hold_out", "task.k"),
    Row(RUN, "task.max_new_tokens", long_answers),
    Row(RUN, "task.train", written(DATA, "")),
    Row(
        RUN, "train.jsonl, line 1", written(DATA, b"\x00\xff\xfe\x00"),
        sentence="train.jsonl, line 1: not a text file in UTF-8. Save it as UTF-8.",
    ),
    Row(RUN, "train.jsonl, line 2", written(DATA, GOOD + "{text: 1}\n")),
    Row(RUN, "train.jsonl, line 2", written(DATA, GOOD + "[1]\n")),
    Row(RUN, "train.jsonl, line 2", written(DATA, GOOD + '{"txt": "a", "label": 0}\n')),
    Row(RUN, "train.jsonl, line 2", written(DATA, GOOD + '{"text": "a", "label": 2}\n')),
    # Models.
    Row(f"{RUN} --model=FOLDER/no", "model"),
    Row(f"{RUN} --model=FOLDER/model", "FOLDER/model/model.safetensors", no_weights),
    Row(f"{RUN} --model=FOLDER/model", "FOLDER/model/pytorch_model.bin", pickled_weights),
    Row(
        f"{RUN} --model=FOLDER/model", "FOLDER/model/model.safetensors", cut_weights,
        "FOLDER/model/model.safetensors: is truncated or not a safetensors file. Download it "
        "again.",
    ),
    Row(f"{RUN} --model=FOLDER/model", "FOLDER/model", another_shape),
    # Folders.
    Row(f"{RUN} --output=FOLDER/file/run", "output", written("file", "kept")),
    Row(RUN, "output", other_files),
    Row(
        f"{RUN} --optimizer.eps=0.5", "output", another_run,
        "output: the run in FOLDER/run has optimizer.eps = 0.001 (got 0.5), which cannot change. "
        "Choose another output or remove the folder.",
    ),
    # Generation.
    Row("generate model", "prompt"),
    Row("generate --prompt=a --file=b.txt", "file"),
    Row("generate --promt=a", "promt"),
    Row("generate ./no --prompt=a", "model"),
    Row("generate new --prompt=a", "model", no_tokenizer),
    Row("generate new --prompt='the film'", "max_new_tokens", eight_positions),
    Row("generate --file=no.txt", "file"),
    Row("generate --file=a.csv", "file"),
    Row("generate --file=a.txt", "file", written("a.txt", b"\n \n")),
    Row("generate --file=a.txt", "a.txt", written("a.txt", b"\xff\xfe")),
    Row("generate --file=a.jsonl", "a.jsonl, line 2", written("a.jsonl", '{"prompt": "a"}\n{}\n')),
    Row("generate --prompt=a --output=o.jsonl", "output", written("o.jsonl", b"kept")),
    Row("generate --prompt=a --output=no/o.jsonl", "output"),
    Row("generate --max_new_tokens=0", "max_new_tokens"),
    Row("generate --num_samples=0", "num_samples"),
    Row("generate --temperature=-1", "temperature"),
    Row("generate --temperature=1 --top_p=0", "top_p"),
    Row("generate --num_samples=2", "num_samples"),
    Row("generate --top_k=2", "top_k"),
    Row("generate --prompt=a --stop=", "stop"),
    Row("generate --seed=-1", "seed"),
    # Evaluation.
    Row("evaluate --split=tests", "split"),
    Row("evaluate model model model", "config"),
    Row("evaluate run.yaml --predictions=run.yaml", "predictions"),
    Row("predict model", "rows"),
    Row("predict model no.jsonl", "rows"),
    Row("predict model model a.jsonl", "MODEL"),
    Row("predict model a.jsonl", "a.jsonl, line 2", written("a.jsonl", '{"prompt": "a"}\n{}\n')),
    Row("predict model a.jsonl", "a.jsonl, line 1", written("a.jsonl", '{"txt": "a"}\n')),
    Row("predict run.yaml a.jsonl", "a.jsonl, line 1", written("a.jsonl", '{"txt": "a"}\n')),
    Row("predict run.yaml test.jsonl --output=no/p.jsonl", "output"),
    Row("predict run.yaml test.jsonl --output=train.jsonl", "output"),
    Row("predict run.yaml test.jsonl --samples=2", "samples"),
    Row("predict run.yaml test.jsonl --eval_batch_size=0", "eval_batch_size"),
    Row("predict new test.jsonl --task=null", "model", no_tokenizer),
    Row("evaluate --icl=2 --split=train --task=subj", "split"),
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAXLM_PARENT", "1")  # no process is started to watch others
    write_run(tmp_path, tiny_model)
    shutil.copytree(tiny_model, tmp_path / "model")
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.words}-{row.key}")
def test_a_mistake_is_one_sentence(row, folder, capsys, request):
    if row.breaks is not None:
        row.breaks(folder)
    before = contents(folder)
    capsys.readouterr()
    words = [word.replace("FOLDER", str(folder)) for word in shlex.split(row.words)]
    assert main(words) == 2
    out, err = capsys.readouterr()
    error, _, sentence = err.replace(str(folder), "FOLDER").rstrip("\n").partition(": ")
    if request.config.getoption("capture") == "no":
        with capsys.disabled():
            print(f"{row.words}\n    {sentence}")
    assert (error, out) == ("error", "")
    check_sentence(sentence, row.key)
    if row.sentence is not None:
        assert sentence.startswith(row.sentence)
    assert contents(folder) == before


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(folder, capsys):
    rates = ["--optimizer.name=adam", "--optimizer.learning_rate=1e38"]
    decay = "--optimizer.weight_decay=1e10"
    assert main(["finetune", str(folder / "run.yaml"), *rates, decay]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    check_sentence(last.removeprefix("error: "), "optimizer.learning_rate")
    assert "the checkpoint of step 0 is kept" in last
    assert [path.name for path in (folder / "run" / "checkpoints").iterdir()] == ["0"]


def test_the_installed_command_says_one_sentence(folder):
    command = shutil.which("jaxlm", path=str(Path(sys.executable).parent))
    assert command is not None, "install the package: pip install -e ."
    words = [command, "finetune", "run.yaml", "--task.train=no.jsonl"]
    options = {"cwd": folder, "capture_output": True, "text": True, "timeout": 120, "check": False}
    done = subprocess.run(words, **options)
    assert done.returncode == 2
    check_sentence(done.stderr.strip().removeprefix("error: "), "task.train")
