"""Constants of earlier versions: what became of each, for the command line, the file and old checkpoints."""

# script -> {old name: what became of it}
RENAMED = {
    "train.py": {
        "CUTOUT_SCALE": "it is CUTOUT_SCALE in common/augment.py now, set it there",
        "CUTOUT_RATIO": "it is CUTOUT_RATIO in common/augment.py now, set it there",
        "NOISE_LEVELS": "it is NOISE_LEVELS in common/augment.py now, set it there",
        "TIME_MASK": "it is SPEC_MASK now, for both directions",
        "FREQUENCY_MASK": "it is SPEC_MASK now, for both directions",
        "MIX_SWITCH": "it is gone, Mixup and CutMix take turns; set MIXUP or CUTMIX to 0 to have the other alone",
        "MIN_LEARNING_RATE": "it is gone, the schedule ends at a learning rate of 1e-6",
        "MAX_SKIPPED": "it is gone, a run stops after 10 steps in a row without a finite loss and gradient",
        "CHANNELS_LAST": "it is gone, the memory format is chosen by the device",
        "SPLIT_BATCHES": "it is gone, batches are always split where memory runs out",
        "USE_EMA": "it is gone, set EMA_DECAY to 0 to turn EMA off",
        "QUARTER_TURNS": 'it is gone, set ROTATION to 180, or to "quarter" for multiples of 90 degrees only',
        "SHARPNESS": "it is QUALITY now, which also compresses images and adds noise",
        "KEEP": "it is gone, the two newest checkpoints are kept",
        "FINE_TUNING": "it is gone, set EPOCHS, WARMUP_EPOCHS and LAYER_DECAY themselves",
    },
    "tools/export.py": {"PICTURES": "it is IMAGES now"},
    "tools/visualize.py": {"PICTURES": "it is IMAGES now", "FIELD_PICTURES": "it is FIELD_IMAGES now"},
    "benchmarks/data.py": {"PICTURES": "it is IMAGES now"},
    "benchmarks/export.py": {"PICTURES": "it is IMAGES now"},
    "benchmarks/sounds.py": {"EPOCHS_LEFT_OUT": "it is HELD_OUT_EPOCHS now"},
}

# Former constants of train.py that are literals now, with their values, where these affect the result.
FORMER_CONSTANTS = dict(
    CUTOUT_SCALE=[0.02, 0.4],
    CUTOUT_RATIO=[0.4, 2.5],
    NOISE_LEVELS=[40.0, 80.0],
    MIX_SWITCH=0.5,
    MIN_LEARNING_RATE=1e-6,
    CHANNELS_LAST="auto",
)


def upgrade_config(config):
    """The constants of train.py that a checkpoint holds, with today's names and spellings.

    Args:
        config: {name: value} of any version.
    """
    config = dict(config)
    for name, off in (("START_SIZE", 0), ("TEST_SIZE", 0), ("WORKERS", -1)):
        if config.get(name) == off:
            config[name] = None
    masks = [config.pop(name) for name in ("TIME_MASK", "FREQUENCY_MASK") if name in config]
    if masks:
        config["SPEC_MASK"] = masks[0] if all(mask == masks[0] for mask in masks) else masks
    if config.pop("USE_EMA", True) is False:
        config["EMA_DECAY"] = 0.0
    if config.pop("QUARTER_TURNS", False):  # and then by up to ROTATION degrees, nearly any angle
        config["ROTATION"] = 180.0 if config.get("ROTATION") else "quarter"
    if "SHARPNESS" in config:
        config["QUALITY"] = config.pop("SHARPNESS")
    return config


def upgrade_checkpoint(checkpoint):
    """A checkpoint of any version with today's kinds of values; its config is left as it is."""
    totals = checkpoint.get("totals")
    if getattr(totals, "shape", None) == (4,):  # a tensor once
        checkpoint = checkpoint | dict(totals=totals.tolist())
    return checkpoint
