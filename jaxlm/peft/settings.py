"""adapter_config.json of Hugging Face PEFT: what of its settings is supported."""

import json
from pathlib import Path

from jaxlm.core.errors import UserError
from jaxlm.models.hf_fields import FLAG, WIDTH, Kind, check_fields, optional
from jaxlm.models.hf_folder import read_json

CONFIG = "adapter_config.json"
# What changes the numbers in another way than here, in PEFT's names; falsy values are harmless.
_REFUSED = (
    "alora_invocation_tokens",
    "alpha_pattern",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "monteclora_config",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
)
_FIELDS = {
    "r": WIDTH,
    "lora_alpha": Kind(
        "a finite number",
        lambda x: type(x) in (int, float) and -1e30 <= x <= 1e30,
    ),
    "use_rslora": optional(FLAG),
}
# Ways to start that leave the base model alone; the others take something out of its weights.
_STARTS = (True, False, "gaussian", "eva", "orthogonal")


def read_settings(folder: Path) -> tuple[int, float]:
    """Rank and scale of the adapters in a folder.

    Raises:
      UserError: if there is no configuration, or one that would change the numbers in a way that is
        not supported.
    """
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder / CONFIG}: there is no such file. Give a folder of PEFT.")
    config = read_json(folder / CONFIG)
    refused = {name: config.get(name) for name in _REFUSED if config.get(name)}
    if config.get("bias", "none") != "none":
        refused["bias"] = config["bias"]
    if config.get("init_lora_weights", True) not in _STARTS:
        refused["init_lora_weights"] = config["init_lora_weights"]
    if config.get("peft_type") != "LORA":
        refused = {"peft_type": config.get("peft_type")}
    for name, value in refused.items():
        raise UserError(
            f"{folder / CONFIG}: {name} is not supported (got {value!r}). Give plain LoRA."
        )
    if config.get("r") is None or config.get("lora_alpha") is None:
        raise UserError(f"{folder / CONFIG}: has no r or no lora_alpha. Download it again.")
    check_fields(config, _FIELDS, str(folder / CONFIG))
    rank = config["r"]
    return rank, config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)


def write_settings(
    rank: int,
    scale: float,
    *,
    base_model: str | None,
    task: str | None,
    targets: list[str],
    transposed: bool,
) -> str:
    """The text of a configuration; `transposed` says that HF keeps the weights as [in, out]."""
    config = {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": scale * rank,
        "target_modules": targets,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "inference_mode": True,
    }
    return json.dumps(config, indent=2) + "\n"
