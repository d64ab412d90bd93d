"""Training: rows, the two stages on TRL's SFTTrainer, recipes. Names are imported on first use."""

from importlib import import_module


_MODULES = {
    "collator": ["CTMoEDataCollator"],
    "recipe": ["Stage1Config", "Stage2Config", "StageConfig", "TwoStageRecipe", "load_recipe"],
    "rows": ["ROW_FEATURES", "check_tasks", "count_tasks", "interleave_tasks", "load_rows"],
    "sft_config": ["CTMoESFTConfig"],
    "sft_trainer": ["CTMoESFTTrainer"],
    "stages": ["format_parts", "prepare_stage", "trained_parts"],
    "two_stage": ["train_stage", "train_two_stage"],
    "volume_cache": ["VolumeCache"],
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
