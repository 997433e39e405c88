from tests.tiny import run_yaml, tiny_model

__all__ = ["run_yaml", "tiny_model"]
