"""Loops of other libraries around a parallel module. Each file needs its library, and nothing else in fxpar needs these files.

transformers  `Trainer`, or `OnReplicas` for a subclass of your own
accelerate    `Accelerator`
lightning     `FxparStrategy`, for `lightning.fabric.Fabric`
peft          `save_adapters`, `load_adapters`
"""
