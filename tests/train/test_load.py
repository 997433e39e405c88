"""Folders that travel: what a run or an adapter began with is found again, or refused by name."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import jax
import numpy as np
import pytest
import yaml

import jaxlm
from jaxlm.artifacts.yaml import read_yaml
from jaxlm.cli.main import main
from jaxlm.core.errors import UserError
from jaxlm.train.run_folder import RunFolder
from tests.helpers.sentences import refused
from tests.helpers.tiny import make_model, sentences, write_jsonl, write_run

IDS = np.arange(12, dtype=np.int32).reshape(2, 6) + 2
DATA = ("train", "validation", "test")
LORA = {"peft": {"name": "lora", "rank": 2}}


def logits(lm) -> np.ndarray:
    return np.asarray(lm.apply(lm.params, IDS))


def same(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)


def project(folder: Path, scale: float = 1.0) -> Path:
    """A folder with a base model, data and a configuration that names them without their folder."""
    folder.mkdir()
    make_model(folder / "base", scale=scale)
    path = write_run(folder, Path("base"))
    keys = {**read_yaml(path), "output": "run", "optimizer": {"name": "adam"}, "eval_every": 4}
    path.write_text(yaml.safe_dump(keys))
    return path


def tune(where: Path, **keys):
    return jaxlm.finetune(where / "run.yaml", **keys)


def places(folder: Path) -> dict[str, str]:
    return {f"task.{name}": str(folder / f"{name}.jsonl") for name in DATA}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A project with a run of 4 steps of LoRA."""
    home = tmp_path_factory.mktemp("home") / "here"
    project(home)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        run = tune(home, steps=4, **LORA)
        assert run.summary["versions"]["jax"] == jax.__version__
    return home


@pytest.fixture
def moved(tuned, tmp_path, monkeypatch):
    """(run, new place of its model and data); the working directory has other ones of that name."""
    for name in ("first", "other"):
        shutil.copytree(tuned, tmp_path / name)
    run, now = tmp_path / "run", tmp_path / "now"
    shutil.move(tmp_path / "first" / "run", run)
    shutil.move(tmp_path / "first", now)
    keys = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(keys.replace(str(tuned), str(tmp_path / "first")))
    shutil.rmtree(tmp_path / "other" / "base")
    make_model(tmp_path / "other" / "base", scale=2.0)
    write_jsonl(tmp_path / "other" / "test.jsonl", sentences(16)[::-1])
    monkeypatch.chdir(tmp_path / "other")
    return run, now


def test_a_moved_run_is_loaded_and_evaluated(moved, tuned):
    run, now = moved
    lm = jaxlm.from_pretrained(run, base=now / "base")
    same(lm, jaxlm.from_pretrained(tuned / "run"))
    with pytest.raises(UserError, match=r"^base: the model that .*/run began .*first/base\)"):
        jaxlm.from_pretrained(run)
    with pytest.raises(UserError, match=r"^model: has changed since .* \(got base\)"):
        jaxlm.from_pretrained(run, base="base")
    with pytest.raises(UserError, match=r"^base: only a run .* and an adapter have one"):
        jaxlm.from_pretrained(now / "base", base=now / "base")
    known = json.loads((run / "summary.json").read_text())["test"]["accuracy"]
    found = jaxlm.evaluate(run, base=str(now / "base"), **places(now))
    assert found["accuracy"] == known
    with pytest.raises(UserError, match=r"^task.train: there is no such file"):
        jaxlm.evaluate(run, base=str(now / "base"))


def test_other_data_of_the_same_name_are_refused(tuned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tuned, tmp_path / "copy")
    run = tmp_path / "copy" / "run"
    keys = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(keys.replace(f"{tuned}/", ""))
    for name in DATA:
        write_jsonl(tmp_path / f"{name}.jsonl", sentences(16)[::-1])
    with pytest.raises(UserError, match=r"^task.test: has changed since .* \(got test.jsonl\)"):
        jaxlm.evaluate(run)


def test_a_moved_run_goes_on_to_more_steps(moved, tuned, tmp_path):
    run, now = moved
    found = places(now)
    with pytest.raises(UserError, match=r"^model: has changed since .* \(got base\)"):
        tune(now, output=str(run), steps=8, **LORA, **found)
    keys = {"output": str(run), "model": str(now / "base"), **LORA}
    wrong = found | {"task.test": str(tmp_path / "other" / "test.jsonl")}
    with pytest.raises(UserError, match=r"^task.test: has changed .* \(got .*other/test.jsonl\)"):
        tune(now, steps=8, **keys, **wrong)
    longer = tune(now, steps=8, **keys, **found)
    assert read_yaml(run / "config.yaml")["model"] == str(now / "base")
    at_once = tune(now, steps=8, **keys | {"output": str(tmp_path / "at_once")}, **found)
    same(longer.model, at_once.model)
    assert tune(now, steps=8, **keys, **found).summary == longer.summary  # finished


def test_the_same_command_in_a_copy_of_the_project(tmp_path, monkeypatch):
    """All parameters are trained: the model is not needed, but another one is another run."""
    first, copy, other = (tmp_path / name for name in ("first", "copy", "other"))
    project(first)
    monkeypatch.chdir(first)
    run = tune(first, steps=1)
    assert read_yaml(first / "run" / "config.yaml")["model"] == str(first / "base")
    shutil.copytree(first, copy)
    monkeypatch.chdir(copy)
    assert tune(copy, steps=1).summary == run.summary
    assert read_yaml(copy / "run" / "config.yaml")["model"] == str(copy / "base")
    (copy / "base" / "model.safetensors").unlink()
    same(jaxlm.from_pretrained("run"), run.model)
    project(other, scale=2.0)
    monkeypatch.chdir(other)
    with pytest.raises(UserError, match=r"^model: has changed since the run in .*/first/run"):
        tune(other, steps=1, output=str(first / "run"))


def test_every_command_takes_an_adapter(moved, tuned, tmp_path, capsys):
    run, now = moved
    adapter, base = tmp_path / "adapter", f"--base={now / 'base'}"
    assert main(["convert", str(run), str(adapter), "--adapter", base]) == 0
    lm, wanted = jaxlm.from_pretrained(adapter), jaxlm.from_pretrained(tuned / "run")
    np.testing.assert_allclose(logits(lm), logits(wanted), atol=1e-6)
    (now / "base").rename(tmp_path / "moved")
    base = f"--base={tmp_path / 'moved'}"
    with pytest.raises(UserError, match=r"^base: the model that .*/adapter began with"):
        jaxlm.from_pretrained(adapter)
    with pytest.raises(UserError, match=r"^base: its weights are not those that the adapter"):
        jaxlm.from_pretrained(adapter, base="base")
    capsys.readouterr()
    task = [f"--{key}={place}" for key, place in places(now).items()]
    task += ["--task.name=t", "--task.template={text} it was {label}", "--task.labels=[good, bad]"]
    assert main(["evaluate", str(adapter), base, *task]) == 0
    accuracy = json.loads(capsys.readouterr().out)["accuracy"]
    assert accuracy == json.loads((run / "summary.json").read_text())["test"]["accuracy"]
    words = ["--prompt=the film", "--max_new_tokens=2", "--json=true"]
    assert main(["generate", str(adapter), base, *words]) == 0
    rows, output = str(now / "test.jsonl"), f"--output={tmp_path / 'predictions.jsonl'}"
    assert main(["predict", str(run), rows, base, output]) == 0
    assert main(["predict", str(adapter), rows, base, *task[3:]]) == 0
    assert main(["info", str(adapter), base]) == 0
    assert "lora_a" in capsys.readouterr().out
    assert main(["convert", str(adapter), str(tmp_path / "merged"), base]) == 0
    merged = jaxlm.from_pretrained(tmp_path / "merged")
    np.testing.assert_allclose(logits(merged), logits(wanted), atol=1e-5)
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace(f'"{now / "base"}"', "null"))
    with pytest.raises(UserError, match=r"^base: .*adapter_config.json does not name the model"):
        jaxlm.from_pretrained(adapter)


def test_an_adapter_and_its_base_may_be_on_the_hub(tuned, tmp_path, monkeypatch):
    adapter, wanted = tmp_path / "adapter", logits(jaxlm.from_pretrained(tuned / "run"))
    assert main(["convert", str(tuned / "run"), str(adapter), "--adapter"]) == 0
    config = json.loads((adapter / "adapter_config.json").read_text())
    base = config["base_model_name_or_path"]
    config = json.dumps(config | {"base_model_name_or_path": "lab/base"})
    (adapter / "adapter_config.json").write_text(config)
    hub = {"lab/adapter": str(adapter), "lab/base": base}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: hub[name])
    np.testing.assert_allclose(logits(jaxlm.from_pretrained("lab/adapter")), wanted, atol=1e-6)
    with refused("model", "cannot be downloaded from the hub"):
        jaxlm.from_pretrained("lab/other")


def test_an_adapter_is_no_base_of_another(tuned, tmp_path):
    adapter = tmp_path / "adapter"
    assert main(["convert", str(tuned / "run"), str(adapter), "--adapter"]) == 0
    with refused("base", "is an adapter itself"):
        jaxlm.from_pretrained(adapter, base=adapter)


@pytest.mark.parametrize("flag", [[], ["--adapter"]])
def test_a_converted_run_says_what_it_is(flag, tuned, tmp_path):
    target = tmp_path / "model"
    assert main(["convert", str(tuned / "run"), str(target), *flag]) == 0
    card = (target / "README.md").read_text()
    digests = RunFolder(tuned / "run").digests()
    assert {"model", "task.train", "task.test"} <= digests.keys()
    assert all(f"| SHA-256 of `{key}` | {value} |" in card for key, value in digests.items())
    summary = json.loads((tuned / "run" / "summary.json").read_text())
    assert f"| test accuracy | {summary['test']['accuracy']} |" in card
    assert f"| jax | {jax.__version__} |" in card
    assert "| base model | base |" in card
    config = yaml.safe_load(card.partition("```yaml\n")[2].partition("```")[0])
    assert (config["steps"], config["task"]["train"]) == (4, "train.jsonl")
    assert str(tuned) not in card
    assert card.startswith(f"---\nlibrary_name: {'peft' if flag else 'jaxlm'}\n---\n")


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_a_converted_run_is_opened_by_peft_and_by_transformers(tuned, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    theirs = pytest.importorskip("peft", reason="needs pip install 'jaxlm[parity]'")
    for name, flag in (("merged", []), ("adapter", ["--adapter"])):
        assert main(["convert", str(tuned / "run"), str(tmp_path / name), *flag]) == 0
    base = AutoModelForCausalLM.from_pretrained(tuned / "base")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    for model in (merged, theirs.PeftModel.from_pretrained(base, tmp_path / "adapter")):
        with torch.no_grad():
            found = model(torch.from_numpy(IDS).long()).logits.numpy()
        np.testing.assert_allclose(found, logits(jaxlm.from_pretrained(tuned / "run")), atol=1e-4)
