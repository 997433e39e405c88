"""What can be broken: rows by kind of file, each with the key or the file that must be named."""

import functools
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tests.hostile.world import COMMANDS, FILES, MADE, Break, Row, write_json

Change = Callable[[Any], Any]
TRAINED = tuple(MADE)
READS_A_MODEL = ("finetune", "less", "kernel", "evaluate", "predict", "generate", "convert", "info")
READS_A_RUN = tuple(command for command in COMMANDS if command.endswith(" run"))
CELLS = {
    "value": tuple(COMMANDS),
    "configuration": (*TRAINED, "evaluate"),
    "output": (*TRAINED, "predict", "predict run", "generate", "convert", "convert run"),
    "data": (*TRAINED, "evaluate", "evaluate run", "predict", "predict run", "generate file"),
    "table": ("finetune", "evaluate"),
    "model": (*READS_A_MODEL, "adam", "sweep", "pretrain", "compare"),
    "adapter": READS_A_MODEL,
    "run": ("finetune", "adam", "pretrain", *READS_A_RUN),
    "store": ("pretrain", "sweep", "less", "kernel", "compare"),
    "trajectory": ("finetune", "evaluate run", "generate run", "convert run"),
    "environment": tuple(COMMANDS),
}
"""Kinds of file, and the commands that read or write them."""


def content(name: str, data: str | bytes) -> Break:
    """Replaces what a file holds."""

    def apply(folder: Path) -> None:
        raw = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
        (folder / name).write_bytes(raw)

    return apply


def cut(name: str, share: float = 0.5) -> Break:
    """Keeps the first part of a file."""

    def apply(folder: Path) -> None:
        path = one(folder, name)
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])

    return apply


def flipped(name: str, count: int = 64) -> Break:
    """Flips bytes in the middle of the largest file that matches."""

    def apply(folder: Path) -> None:
        path = one(folder, name)
        data = bytearray(path.read_bytes())
        start = max(0, len(data) // 2 - count // 2)
        for at in range(start, min(start + count, len(data))):
            data[at] ^= 0xFF
        path.write_bytes(bytes(data))

    return apply


def each(pattern: str, damage: Callable[[str], Break]) -> Break:
    """Damages every file that matches."""

    def apply(folder: Path) -> None:
        paths = [path for path in folder.glob(pattern) if path.is_file()]
        assert paths, pattern
        for path in paths:
            damage(str(path.relative_to(folder)))(folder)

    return apply


def one(folder: Path, pattern: str) -> Path:
    """The largest file that matches."""
    return max(
        (path for path in folder.glob(pattern) if path.is_file()),
        key=lambda path: path.stat().st_size,
    )


def removed(name: str) -> Break:
    def apply(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return apply


def edited(name: str, change: Change) -> Break:
    """Changes the values of a JSON or YAML file."""

    def apply(folder: Path) -> None:
        path = one(folder, name)
        is_json = path.suffix == ".json"
        values = (json.loads if is_json else yaml.safe_load)(path.read_text())
        values = change(values) or values
        path.write_text(json.dumps(values) if is_json else yaml.safe_dump(values, sort_keys=False))

    return apply


def put(name: str, dotted: str, value: Any) -> Break:
    """Sets one value of a JSON or YAML file, at a dotted key."""

    def change(values: Any) -> None:
        *sections, last = dotted.split(".")
        for section in sections:
            values = values.setdefault(section, {})
        values[last] = value

    return edited(name, change)


def several(*breaks: Break) -> Break:
    def apply(folder: Path) -> None:
        for damage in breaks:
            damage(folder)

    return apply


def tensors(change: Callable[[dict[str, np.ndarray]], None], name: str = "model") -> Break:
    """Changes the weights of a model folder."""

    def apply(folder: Path) -> None:
        from safetensors.numpy import load_file, save_file

        path = folder / name / "model.safetensors"
        values = load_file(path)
        change(values)
        save_file(values, path, {"format": "pt"})

    return apply


def first_value(value: float) -> Callable[[dict[str, np.ndarray]], None]:
    def change(values: dict[str, np.ndarray]) -> None:
        values["model.norm.weight"] = values["model.norm.weight"].copy()
        values["model.norm.weight"][0] = value

    return change


def linked(name: str, target: str) -> Break:
    def apply(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return apply


def pipe(name: str) -> Break:
    def apply(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return apply


def bomb(name: str, megabytes: int) -> Break:
    """A gzip file of zeros that unpacks to many times its size."""

    def apply(folder: Path) -> None:
        import gzip

        (folder / name).unlink(missing_ok=True)
        with gzip.open(folder / name, "wb", 9) as file:
            for _ in range(megabytes):
                file.write(bytes(2**20))

    return apply


def file_of(command: str) -> str:
    """The configuration of a command."""
    return next(word for word in COMMANDS[command] if word in FILES)


# Values of configurations: key, value, and what may be named beside the key or its last part.
VALUES: dict[str, list[tuple[Any, ...]]] = {
    "finetune": [
        ("steps", float("inf")),
        ("steps", "1e12"),
        ("batch_size", 0),
        ("seed", -1),
        ("calibrate", [True]),
        ("bits", {"a": 8}),
        ("optimizer", {"name": ["mezo"]}),
        ("optimizer.select", "(a+)+$|(.*a){30}b"),
    ],
    "adam": [
        ("optimizer.eps", "1e-60"),
        ("optimizer.b2", 1),
        ("optimizer.learning_rate", "nan"),
        ("peft", {"name": "lora", "rank": "1e9"}, "rank"),
        ("peft", {"name": "lora", "alpha": "nan"}),
        ("peft", "lorra"),
        ("param_dtype", ["float32"]),
        ("eval_batch_size", "1e12"),
    ],
    "pretrain": [
        ("corpus.domains", []),
        ("corpus.domains", [{"name": "films", "weight": 1}, {"name": "films", "weight": 1}]),
        ("corpus.domains", [{"name": "films", "weight": 0}]),
        ("corpus.domains", [{"name": "films", "weight": "nan"}]),
        ("corpus.held_out", "films"),
        ("corpus.domains", [{"name": "../films", "weight": 1}]),
        ("model.num_layers", "1e8"),
        ("seq_len", 1000),
    ],
    "sweep": [
        ("seeds", []),
        ("seeds", [-1]),
        ("seeds", [0, 0]),
        ("methods", {"..": {}}),
        ("methods", {"mezo": {"grid": {"seed": [1, 2]}}}, "seed"),
        ("methods", {"mezo": {"output": "elsewhere"}}, "output"),
        ("methods", {"mezo": {"optimizer": {"name": "mezzo"}}}, "optimizer.name"),
        ("run", ["model"]),
    ],
    "less": [
        ("seeds", [-1]),
        ("methods", ["lesss"]),
        ("eval_batch_size", 0),
        ("fraction", "nan"),
        ("features.dim", "1e12"),
        ("features.block_size", 0),
        ("recipe.epochs", 0),
        ("sources", {}),
    ],
    "kernel": [
        ("ks", [0]),
        ("ks", []),
        ("seeds", [2**40]),
        ("prompts", [3]),
        ("solver", "rigde"),
        ("training", []),
        ("training", [{"optimizer": {"name": "sgd"}, "learning_rates": [-1]}], "learning_rate"),
        ("training", [{"optimizer": {"name": "sgd"}, "batch_size": 0}], "batch_size"),
    ],
    "compare": [
        ("variants", {}),
        ("variants", {"..": {}}),
        ("variants", {"a": {"stepz": 3}}, "stepz"),
        ("variants", {"a": {"scale": {"rule": "sqrt", "k": 0}}}, "scale.k"),
        ("seeds", [1.5]),
        ("variants", {"a": {"scale": 3}}, "scale"),
        ("y", "held_out"),
        ("run", {}, "held-out"),
    ],
}


def named_by(dotted: str) -> tuple[str, ...]:
    return (dotted.split(".")[-1], dotted)


def values() -> Iterator[Row]:
    for command, pairs in VALUES.items():
        for number, (dotted, value, *more) in enumerate(pairs):
            yield Row(
                command,
                "value",
                f"{number} {dotted}",
                put(file_of(command), dotted, value),
                named=(*named_by(dotted), *more),
            )
    for command, words, named in (
        ("evaluate", ("--eval_batch_size=0",), "eval_batch_size"),
        ("evaluate", ("--task.k=-1",), "k"),
        ("evaluate", ("--task.max_length=1e12",), "max_length"),
        ("evaluate", ("--devices=100000",), "devices"),
        ("predict", ("--eval_batch_size=0",), "eval_batch_size"),
        ("predict", ("--samples=3",), "samples"),
        ("predict run", ("--bits=3",), "bits"),
        ("generate", ("--max_new_tokens=0",), "max_new_tokens"),
        ("generate", ("--max_new_tokens=1e12",), "max_new_tokens"),
        ("generate", ("--temperature=nan",), "temperature"),
        ("generate", ("--top_p=0",), "top_p"),
        ("generate", ("--seed=-1",), "seed"),
        ("generate", ("--max_new_tokens=31",), "max_new_tokens"),
        ("generate file", ("--num_samples=1e12",), "num_samples"),
        ("generate file", ("--output=p.jsonl",), "output"),
        ("convert", ("--dtype=int8",), "dtype"),
        ("convert", ("--bits=3",), "bits"),
        ("info", ("--nonsense=3",), "nonsense"),
        ("info", ("model",), "info"),
        ("evaluate run", ("--split=tests",), "split"),
        ("evaluate run", ("--icl=-1",), "icl"),
        ("generate run", ("--top_k=0", "--temperature=1"), "top_k"),
        ("generate run", ("--bits=16",), "bits"),
        ("convert run", ("--dtype=float8",), "dtype"),
        ("info run", ("--devices=2",), "info"),
    ):
        yield Row(command, "value", " ".join(words), words=words, named=(named,))


# Texts of a configuration file, for every command that reads one.
TEXTS: dict[str, str | bytes] = {
    "a tag": "model: !!python/object/apply:os.system ['touch ran']\n",
    "aliases": "a: &a [x, x]\n"
    + "".join(
        f"{name}: &{name} [{', '.join([f'*{last}'] * 9)}]\n"
        for last, name in itertools.pairwise("abcdefghijkl")
    ),
    "not YAML": "a: {b: ]\n",
    "not UTF-8": b"\xff\xfe\x00",
    "nested": "a: " + "[" * 50_000,
    "a key twice": "output: a\noutput: b\n",
    "empty": "",
    "a list": "- 1\n- 2\n",
    "two documents": "a: 1\n---\nb: 2\n",
}


def configurations() -> Iterator[Row]:
    for number, command in enumerate(CELLS["configuration"]):
        file = file_of(command)
        names = list(TEXTS)
        if command != "finetune":
            names = [names[(3 * number + place) % len(names)] for place in range(3)]
        else:
            names = names[:6]
        for name in names:
            text, named = TEXTS[name], (file, "output", "is missing")
            yield Row(command, "configuration", name, content(file, text), named=named)
        if command == "evaluate":
            continue  # which passes over what does not concern it
        yield Row(
            command,
            "configuration",
            "unknown key",
            put(file, "lerning_rate", 3),
            named=("lerning",),
        )
    yield Row("adam", "configuration", "missing", removed("adam.yaml"), named=("adam.yaml",))
    yield Row("sweep", "configuration", "a pipe", pipe("sweep.yaml"), named=("sweep.yaml",))
    yield Row(
        "finetune",
        "configuration",
        "flag twice",
        words=("--steps=3", "--steps=4"),
        named=("steps",),
    )


def outputs() -> Iterator[Row]:
    """Places where a run cannot be."""

    def foreign(folder: Path, name: str) -> None:
        (folder / name).mkdir()
        (folder / name / "table.md").write_text("mine")

    for command in TRAINED:
        output = FILES[file_of(command)]["output"]
        breaks: dict[str, Break] = {
            "a foreign folder": lambda folder, o=output: foreign(folder, o),
            "below a file": put(file_of(command), "output", "test.jsonl/run"),
        }
        if command in ("finetune", "less"):
            breaks["a NUL"] = put(file_of(command), "output", "a\0b")
            breaks["no such user"] = put(file_of(command), "output", "~nosuchuser/run")
            breaks["a long name"] = put(file_of(command), "output", "a" * 300)
            breaks["nothing"] = put(file_of(command), "output", "")
        for name, apply in breaks.items():
            yield Row(command, "output", name, apply, named=("output",))
    for command in ("convert", "convert run"):
        yield Row(command, "output", "is there", made("converted"), named=("TARGET",))
        file = content("converted", "mine")
        yield Row(command, "output", "is a file", file, named=("TARGET",))
    header = "p.out.header.json"
    for command in ("predict", "predict run"):
        foreigner = content(header, '{"inputs": {"model": "f00"}, "lines": 3}')
        of_another = several(content("p.out", "{}\n"), foreigner)
        yield Row(command, "output", "of another model", of_another, named=("p.out",))
        yield Row(command, "output", "no header", content("p.out", "{}\n"), named=("p.out",))
        noise = several(content("p.out", "{}\n"), content(header, '{"inputs": 3'))
        yield Row(command, "output", "a damaged header", noise, named=(header,))
    for word in ("test.jsonl/out.jsonl", "no/out.jsonl", "model"):
        yield Row("generate", "output", word, words=(f"--output={word}",), named=(word, "output"))


def made(name: str) -> Break:
    return lambda folder: (folder / name).mkdir()


DATA: dict[str, tuple[Break, str]] = {
    "missing": (removed("train.jsonl"), "train"),
    "empty": (content("train.jsonl", ""), "train"),
    "not JSON": (content("train.jsonl", '{"text": "a", "label": 0}\n{'), "train.jsonl"),
    "digits": (content("train.jsonl", f'{{"text": "a", "label": {"9" * 5000}}}\n'), "train.jsonl"),
    "surrogate": (content("train.jsonl", '{"text": "\\ud800", "label": 0}\n'), "train.jsonl"),
    "a pipe": (pipe("train.jsonl"), "train"),
    "endless": (linked("train.jsonl", "/dev/zero"), "train"),
    "a folder": (several(removed("train.jsonl"), made("train.jsonl")), "train"),
    "one label": (content("train.jsonl", '{"text": "a", "label": 0}\n'), "train"),
    "a list": (content("train.jsonl", "[1, 2]\n"), "train.jsonl"),
}
TEST_DATA: dict[str, tuple[Break, str]] = {
    "missing": (removed("test.jsonl"), "test"),
    "other fields": (content("test.jsonl", '{"txt": "a", "label": 0}\n'), "test.jsonl"),
    "another label": (content("test.jsonl", '{"text": "a", "label": 7}\n'), "test.jsonl"),
    "not UTF-8": (content("test.jsonl", b"\xff\xfe\n"), "test.jsonl"),
}


TABLES: dict[str, str | bytes] = {
    "empty.csv": "",
    "twice.csv": "text,label,label\na,0,1\n",
    "short.tsv": "text\tlabel\na\n",
    "noise.parquet": b"PAR1" + bytes(range(256)) + b"PAR1",
    "noise.jsonl.gz": b"\x1f\x8b" + bytes(range(256)),
}


def csv_task(file: str) -> Break:
    """A column of 200,000 characters in quotes that never end."""
    text = 'text,label\n"a' + "b" * 200_000 + "\nc,0\n"
    return several(content("train.csv", text), put(file, "task.train", "train.csv"))


def zipped(file: str) -> Break:
    return several(bomb("train.jsonl.gz", 2048), put(file, "task.train", "train.jsonl.gz"))


def data() -> Iterator[Row]:
    for name, (apply, named) in list(DATA.items())[:8]:
        yield Row("finetune", "data", name, apply, named=(named,))
    for command in ("adam", "less", "kernel"):
        for name in ("missing", "not JSON", "a pipe"):
            apply, named = DATA[name]
            yield Row(command, "data", name, apply, named=(named,))
    for name, (apply, named) in TEST_DATA.items():
        yield Row("evaluate", "data", name, apply, named=(named,))
        yield Row("evaluate run", "data", name, apply, named=(named,))
    rows: dict[str, Break] = {
        "missing": removed("rows.jsonl"),
        "empty": content("rows.jsonl", ""),
        "another field": content("rows.jsonl", '{"txt": "the"}\n'),
        "cut": content("rows.jsonl", '{"text": "the"}\n{"text": "t'),
        "a list": content("rows.jsonl", '{"text": "the"}\n[1]\n'),
        "a pipe": pipe("rows.jsonl"),
        "endless": linked("rows.jsonl", "/dev/zero"),
    }
    for number, (name, apply) in enumerate(rows.items()):
        command = ("predict", "predict run")[number % 2]
        yield Row(command, "data", name, apply, named=("rows.jsonl", "rows"))
    for name in ("missing", "empty", "not JSON", "digits"):
        apply = {
            "missing": removed("corpus/films.jsonl"),
            "empty": content("corpus/films.jsonl", ""),
            "not JSON": content("corpus/films.jsonl", '{"text": "a"}\n{'),
            "digits": content("corpus/films.jsonl", f'{{"text": {"9" * 5000}}}'),
        }[name]
        yield Row("pretrain", "data", name, apply, named=("films",))
        yield Row("compare", "data", name, apply, named=("films",), changes=True)
    for command in ("finetune", "evaluate"):
        file = file_of(command)
        yield Row(command, "table", "an open quote", csv_task(file), named=("train.csv",))
        yield Row(command, "table", "a bomb", zipped(file), named=("train.jsonl.gz",))
        for name, text in TABLES.items():
            apply = several(content(name, text), put(file, "task.train", name))
            yield Row(command, "table", name, apply, named=(name,))
    for name in ("missing", "not JSON", "a folder"):
        apply, named = DATA[name]
        yield Row("sweep", "data", name, apply, named=(named,), changes=True)
    yield Row("pretrain", "data", "a pipe", pipe("corpus/films.jsonl"), named=("films",))
    prompts: dict[str, Break] = {
        "missing": removed("p.jsonl"),
        "empty": content("p.jsonl", ""),
        "not JSON": content("p.jsonl", '{"prompt": "the"}\n{'),
        "another field": content("p.jsonl", '{"text": "the"}\n'),
        "a number": content("p.jsonl", '{"prompt": 3}\n'),
        "not UTF-8": content("p.jsonl", b"\xff\xfe\n"),
        "a pipe": pipe("p.jsonl"),
        "endless": linked("p.jsonl", "/dev/zero"),
    }
    for name, apply in prompts.items():
        yield Row("generate file", "data", name, apply, named=("p.jsonl",))


def evil(folder: Path) -> None:
    """A tokenizer whose configuration asks for the code beside it, which would leave a mark."""
    code = "from pathlib import Path\nPath('ran').touch()\nclass Evil: pass\n"
    (folder / "model" / "evil.py").write_text(code)
    put("model/tokenizer_config.json", "auto_map", {"AutoTokenizer": [None, "evil.Evil"]})(folder)
    put("model/tokenizer_config.json", "tokenizer_class", "Evil")(folder)


def outside(folder: Path) -> None:
    shutil.move(folder / "model" / "model.safetensors", folder / "elsewhere.safetensors")
    index = {"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
    write_json(folder / "model" / "model.safetensors.index.json", index)


CONFIG = "model/config.json"
MODELS: dict[str, tuple[Break, tuple[str, ...]]] = {
    "a NaN": (tensors(first_value(float("nan"))), ("model.norm.weight",)),
    "an infinity": (tensors(first_value(float("inf"))), ("model.norm.weight",)),
    "cut weights": (cut("model/model.safetensors"), ("model.safetensors",)),
    "no weights": (removed("model/model.safetensors"), ("model.safetensors",)),
    "weights elsewhere": (outside, ("index.json",)),
    "a pickle": (
        several(removed("model/model.safetensors"), content("model/pytorch_model.bin", b"\x80")),
        ("pytorch_model.bin",),
    ),
    "no config": (removed(CONFIG), ("config.json",)),
    "cut config": (cut(CONFIG), ("config.json",)),
    "a list for config": (content(CONFIG, "[]"), ("config.json",)),
    "no heads": (put(CONFIG, "num_attention_heads", 0), ("num_attention_heads",)),
    "half a layer": (put(CONFIG, "num_hidden_layers", 2.5), ("num_hidden_layers",)),
    "digits": (content(CONFIG, f'{{"hidden_size": {"9" * 5000}}}'), ("config.json",)),
    "a text for eps": (put(CONFIG, "rms_norm_eps", "small"), ("rms_norm_eps",)),
    "NaN for eps": (put(CONFIG, "rms_norm_eps", float("nan")), ("rms_norm_eps",)),
    "text for rope": (put(CONFIG, "rope_parameters", "linear"), ("rope",)),
    "rope factor 0": (
        put(CONFIG, "rope_scaling", {"rope_type": "linear", "factor": 0}),
        ("factor", "rope"),
    ),
    "no architecture": (put(CONFIG, "architectures", 3), ("architectures",)),
    "another family": (put(CONFIG, "model_type", "mamba"), ("mamba",)),
    "a list for eos": (put(CONFIG, "eos_token_id", {}), ("eos_token_id",)),
    "cut tokenizer": (cut("model/tokenizer.json"), ("tokenizer",)),
    "its own code": (evil, ("tokenizer", "code")),
    "a pipe": (pipe("model/tokenizer_config.json"), ("tokenizer_config.json",)),
    "a folder": (
        several(removed("model/model.safetensors"), made("model/model.safetensors")),
        ("model.safetensors",),
    ),
    "a text for a length": (
        put("model/tokenizer_config.json", "model_max_length", "long"),
        ("tokenizer",),
    ),
    "heads of keys": (put(CONFIG, "num_key_value_heads", 3), ("num_key_value_heads",)),
    "another shape": (
        tensors(lambda values: values.update({"model.norm.weight": np.ones(17, np.float32)})),
        ("model.norm.weight",),
    ),
    "a tensor too many": (
        tensors(
            lambda values: values.update(
                {"model.layers.0.self_attn.q_proj.bias": np.ones(16, np.float32)}
            )
        ),
        ("q_proj.bias",),
    ),
    "whole numbers": (
        tensors(
            lambda values: values.update(
                {"model.norm.weight": np.ones(values["model.norm.weight"].shape, np.int32)}
            )
        ),
        ("model.norm.weight",),
    ),
}


def models() -> Iterator[Row]:
    first = {
        "generate": ("its own code", "a NaN", "a pipe", "a text for a length"),
        "less": ("a pickle",),
        "evaluate": ("a NaN", "another shape"),
        "convert": ("a NaN", "a folder", "cut weights"),
        "info": ("heads of keys", "no weights"),
    }
    faults = itertools.cycle(MODELS)  # the next ones, so that each fault meets some command
    for command in READS_A_MODEL:
        names = dict.fromkeys(first.get(command, ()))
        while len(names) < 6:
            name = next(faults)
            # Those without a text do without a tokenizer.
            if "code" not in name or command not in ("convert", "info"):
                names[name] = None
        for name in names:
            apply, named = MODELS[name]
            yield Row(command, "model", name, apply, named=named)
    tokenizer = several(
        content("tokenizer/evil.py", "raise SystemExit(9)"),
        put("tokenizer/tokenizer_config.json", "auto_map", {"AutoTokenizer": [None, "evil.Evil"]}),
        put("tokenizer/tokenizer_config.json", "tokenizer_class", "Evil"),
    )
    yield Row("pretrain", "model", "its own code", tokenizer, named=("tokenizer",))
    yield Row("pretrain", "model", "no tokenizer", removed("tokenizer"), named=("tokenizer",))
    yield Row("pretrain", "model", "cut", cut("tokenizer/tokenizer.json"), named=("tokenizer",))
    yield Row("compare", "model", "no tokenizer", removed("tokenizer"), named=("tokenizer",))
    yield Row("sweep", "model", "missing", removed("model"), named=("model",), changes=True)
    for name in ("a NaN", "cut tokenizer", "a pickle"):
        apply, named = MODELS[name]
        yield Row("adam", "model", name, apply, named=named)


def adapters() -> Iterator[Row]:
    """An adapter folder where a model is wanted."""

    def apply(folder: Path) -> None:
        (folder / "model" / "config.json").unlink()
        (folder / "model" / "model.safetensors").rename(
            folder / "model" / "adapter_model.safetensors"
        )
        settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
        write_json(folder / "model" / "adapter_config.json", settings)

    for command in READS_A_MODEL:
        yield Row(command, "adapter", "as a model", apply, named=("config.json", "adapter"))


def runs() -> Iterator[Row]:
    """Folders of finished or stopped runs, damaged, and what reads or resumes them."""
    for number, command in enumerate(READS_A_RUN):
        run = COMMANDS[command][1]
        rows: dict[str, tuple[Break, tuple[str, ...]]] = {
            "a pipe": (pipe(f"{run}/config.yaml"), ("config.yaml",)),
            "foreign configuration": (content(f"{run}/config.yaml", "a: 1\n"), ("config.yaml",)),
            "a list for configuration": (content(f"{run}/config.yaml", "[1]"), ("config.yaml",)),
            "flipped checkpoint": (  # all of it, since some commands read the parameters alone
                each(f"{run}/checkpoints/*/*/arrays.bin", functools.partial(flipped, count=10**6)),
                ("checkpoints",),
            ),
            "cut checkpoint": (each(f"{run}/checkpoints/*/*/arrays.bin", cut), ("checkpoints",)),
            "no model": (removed("model"), ("model",)),
            "itself as model": (put(f"{run}/config.yaml", "model", run), ("model",)),
        }
        kept = list(rows.items())[number % 2 :: 2] if number else rows.items()
        for name, (apply, named) in kept:
            yield Row(command, "run", name, apply, named=named)
    for command, run in (("finetune", "run"), ("adam", "adam"), ("pretrain", "pretrained")):
        stopped = removed(f"{run}/summary.json")
        rows = {
            "cut summary": (cut(f"{run}/summary.json"), ("summary.json",)),
            "a list for summary": (content(f"{run}/summary.json", "[]"), ("summary.json",)),
            "cut configuration": (cut(f"{run}/config.yaml"), ("config.yaml", "output")),
            "flipped checkpoint": (
                several(stopped, each(f"{run}/checkpoints/*/*/arrays.bin", flipped)),
                ("checkpoints",),
            ),
            "cut checkpoint": (
                several(stopped, each(f"{run}/checkpoints/*/*/arrays.bin", cut)),
                ("checkpoints",),
            ),
            "noise for metrics": (
                several(stopped, content(f"{run}/metrics.jsonl", "\x01\x02{\n")),
                ("metrics.jsonl",),
            ),
        }
        for name, (apply, named) in rows.items():
            yield Row(command, "run", name, apply, named=named, fresh=False)
        changed = "corpus/films.jsonl" if command == "pretrain" else "train.jsonl"
        yield Row(
            command,
            "run",
            "other data",
            several(stopped, appended(changed)),
            named=(changed.split("/")[-1].split(".")[0],),
            fresh=False,
        )
        yield Row(
            command,
            "run",
            "another configuration",
            words=("--seed=5",),
            named=("seed",),
            fresh=False,
        )
    offsets = '{"step": 0, "option_offsets": [1, 2, 3]}\n'
    yield Row(
        "evaluate run",
        "run",
        "three offsets",
        content("run/metrics.jsonl", offsets),
        named=("metrics.jsonl",),
    )
    foreign = several(made("mixed"), content("mixed/config.yaml", "a: 1\n"))
    for command in ("adam", "pretrain"):
        yield Row(
            command, "output", "not a run", foreign, words=("--output=mixed",), named=("mixed",)
        )


def appended(name: str) -> Break:
    """One more row of a file, like its first."""

    def apply(folder: Path) -> None:
        lines = (folder / name).read_text().splitlines()
        (folder / name).write_text("\n".join([*lines, lines[0]]) + "\n")

    return apply


def stores() -> Iterator[Row]:
    """What studies keep for themselves between two starts."""
    store = "less/seed-0/train-1-*/store"
    choice = "less/seed-0/select-less-*"
    rows: dict[str, dict[str, tuple[Break, tuple[str, ...]]]] = {
        "less": {
            "flipped rows": (
                several(
                    gone("less/seed-0/select-*"),
                    gone("less/seed-0/tune-*"),
                    flipped(f"{store}/*.safetensors"),
                ),
                ("store",),
            ),
            "cut record": (
                several(
                    gone("less/seed-0/select-*"),
                    gone("less/seed-0/tune-*"),
                    cut(f"{store}/000.json"),
                ),
                ("000.json",),
            ),
            "cut stage": (
                several(
                    gone("less/seed-0/select-*"),
                    gone("less/seed-0/tune-*"),
                    cut("less/seed-0/train-1-*/manifest.json"),
                ),
                ("manifest.json",),
            ),
            "cut choice": (
                several(gone("less/seed-0/tune-*"), lines_cut(f"{choice}/selected.jsonl")),
                ("selected.jsonl",),
            ),
        },
        "kernel": {
            "cut report": (cut("kernel/reports/*"), ("reports",)),
            "cut manifest": (
                several(
                    gone("kernel/reports"),
                    each("kernel/kernels/**/manifest.json", cut),
                ),
                ("manifest",),
            ),
            "flipped kernel": (
                several(gone("kernel/reports"), flipped("kernel/kernels/**/*.safetensors")),
                ("kernels",),
            ),
        },
        "sweep": {
            "cut summary": (cut("sweep/**/summary.json"), ("summary.json",)),
            "cut failure": (
                several(
                    removed_one("sweep/**/summary.json"),
                    content_one("sweep/mezo/**/config.yaml", "failed.json", "{"),
                ),
                ("failed.json", "config.yaml", "sweep"),
            ),
        },
        "compare": {
            "cut summary": (cut("compare/**/summary.json"), ("summary.json",)),
            "cut metrics": (content_at("compare/**/metrics.jsonl", "{"), ("metrics.jsonl",)),
        },
    }
    for command, found in rows.items():
        for name, (apply, named) in found.items():
            yield Row(command, "store", name, apply, named=named, fresh=False, changes=True)
    tokens = several(removed("pretrained/summary.json"), flipped("pretrained/tokens/**/*"))
    yield Row(
        "pretrain",
        "store",
        "flipped tokens",
        tokens,
        named=("tokens",),
        fresh=False,
        code=(0, 2),
        changes=True,
    )


def gone(pattern: str) -> Break:
    def apply(folder: Path) -> None:
        for path in list(folder.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return apply


def removed_one(pattern: str) -> Break:
    return lambda folder: one(folder, pattern).unlink()


def content_at(pattern: str, text: str) -> Break:
    return lambda folder: [path.write_text(text) for path in folder.glob(pattern)] and None


def content_one(beside: str, name: str, text: str) -> Break:
    return lambda folder: (one(folder, beside).parent / name).write_text(text) and None


def lines_cut(pattern: str) -> Break:
    """Keeps the first half of a file's lines: each that is left is whole."""

    def apply(folder: Path) -> None:
        path = one(folder, pattern)
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(lines[: len(lines) // 2]))

    return apply


def trajectories() -> Iterator[Row]:
    """A run by forward passes without its checkpoints: what is left is its trajectory."""
    bare = removed("run/checkpoints")
    path = "run/trajectory.zo"
    rows: dict[str, Break] = {
        "cut header": cut(path, 0.05),
        "half of the steps": half(path),
        "flipped": flipped(path),
        "flipped header": several(content_head(path, 40)),
        "empty": content(path, ""),
        "text": content(path, "hello\n" * 100),
        "missing": removed(path),
    }
    for number, command in enumerate(("evaluate run", "generate run", "convert run")):
        for name, apply in list(rows.items())[number - 1 :: 2] if number else rows.items():
            named = ("trajectory", "checkpoint")
            yield Row(command, "trajectory", name, several(bare, apply), named=named)
    for name in ("cut header", "flipped", "flipped header", "text", "half of the steps"):
        apply = several(removed("run/summary.json"), rows[name])
        yield Row("finetune", "trajectory", name, apply, named=("trajectory",), fresh=False)


def half(name: str) -> Break:
    """Keeps the first steps, each of them whole."""

    def apply(folder: Path) -> None:
        from jaxlm.zo import Trajectory

        trajectory = Trajectory.open(folder / name)
        trajectory.cut(trajectory.steps // 2)

    return apply


def content_head(name: str, count: int) -> Break:
    """Flips the first bytes of a file."""

    def apply(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(bytes(b ^ 0xFF for b in data[:count]) + data[count:])

    return apply


def mode(name: str, bits: int) -> Break:
    return lambda folder: (folder / name).chmod(bits)


DENIED: dict[str, Break] = {
    "finetune": mode("finetune.yaml", 0),
    "less": mode("train.jsonl", 0),
    "compare": mode("corpus/films.jsonl", 0),
    "evaluate": mode("test.jsonl", 0),
    "evaluate run": each("run/checkpoints/*/*/arrays.bin", lambda name: mode(name, 0)),
    "predict": mode("rows.jsonl", 0),
    "predict run": mode(".", 0o555),
    "generate": mode("model/model.safetensors", 0),
    "generate file": mode("p.jsonl", 0),
    "generate run": mode("run/config.yaml", 0),
    "convert": mode(".", 0o555),
    "convert run": mode(".", 0o555),
    "info": mode("model/config.json", 0),
    "info run": mode("adam/checkpoints", 0),
}
"""What may not be read; of the other commands, the place where they write is closed."""
NOT_READ = (
    *(
        "finetune.yaml",
        "train.jsonl",
        "films.jsonl",
        "test.jsonl",
        "p.jsonl",
        "checkpoints",
        "rows",
    ),
    *("config", "model.safetensors", "output", "closed", "converted"),
)


def environments() -> Iterator[Row]:
    no_gpu = {"JAX_PLATFORMS": "cuda"}
    for command in ("finetune", "pretrain", "generate", "info", "less", "kernel"):
        yield Row(
            command,
            "environment",
            "no GPU",
            env=no_gpu,
            named=("JAX_PLATFORMS", "cuda"),
            changes=True,
        )
    for command in COMMANDS:
        apply, words = DENIED.get(command), ()
        if apply is None:
            apply, words = several(made("closed"), mode("closed", 0o555)), ("--output=closed/run",)
        yield Row(command, "environment", "no permission", apply, words=words, named=NOT_READ)
        if command not in ("adam", "compare", "sweep", "less", "kernel"):
            yield Row(
                command,
                "environment",
                "C locale without HOME",
                env={"LC_ALL": "C", "HOME": "UNSET", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
                code=(0,),
                changes=True,
            )
    yield Row(
        "finetune", "environment", "markup", words=("--output=o[/b]",), code=(0,), changes=True
    )
    yield Row(
        "finetune", "environment", "brackets", words=("--output=lr[1e-3]",), code=(0,), changes=True
    )


def every_row() -> list[Row]:
    """All of them; of rows with the same id the first."""
    makers = (
        values,
        configurations,
        outputs,
        data,
        models,
        adapters,
        runs,
        stores,
        trajectories,
        environments,
    )
    found: dict[str, Row] = {}
    for maker in makers:
        for row in maker():
            found.setdefault(row.id, row)
    return list(found.values())
