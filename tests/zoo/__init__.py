"""Small models of many families, as their authors wrote them: what every plan is tried on.

registry       the tables and what builders share
hugging_face   transformers
plain          timm, and models in plain PyTorch
held_out       families that were not looked at while the operator rules were written
oddities       one difficulty each
"""

from tests.zoo import held_out, hugging_face, oddities, plain
from tests.zoo.hugging_face import LLAMA, language_model
from tests.zoo.plain import CausalAttention, NanoGPT
from tests.zoo.registry import HELD_OUT, MODELS, Built, build, ids, labels, rows

__all__ = [
    "HELD_OUT",
    "LLAMA",
    "MODELS",
    "Built",
    "CausalAttention",
    "NanoGPT",
    "build",
    "held_out",
    "hugging_face",
    "ids",
    "labels",
    "language_model",
    "oddities",
    "plain",
    "rows",
]
