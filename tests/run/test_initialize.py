"""`init_weights` on a meta model: what ``torch.manual_seed(seed)`` and the model's own initialisation give on one device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import fxpar
from tests import zoo
from tests.processes import launch

SEED = 11


class Plain(nn.Module):
    """Submodules that initialise themselves, buffers among them, and a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.head = nn.Embedding(24, 8), nn.Linear(8, 32), nn.Linear(8, 24, bias=False)
        self.norm, self.down = nn.BatchNorm1d(8), nn.Linear(32, 8)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.down(torch.relu(self.up(self.embed(x)))))).square().mean()


class Own(nn.Module):
    """A model with an `init_weights` of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)
        self.scale = nn.Parameter(torch.empty(8))
        self.init_weights()

    def init_weights(self) -> None:
        nn.init.trunc_normal_(self.down.weight, std=0.3, a=-0.4, b=0.4)
        nn.init.orthogonal_(self.up.weight)
        for module in (self.up, self.down):
            nn.init.zeros_(module.bias)
        nn.init.uniform_(self.scale, 1, 2)
        with torch.no_grad():
            self.down.weight.mul_(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return (self.down(torch.relu(self.up(x))) * self.scale).square().mean()


def hugging_face(config: str, **options: int) -> nn.Module:
    import transformers

    made = getattr(transformers, config)(vocab_size=96, use_cache=False, **options)
    return transformers.AutoModelForCausalLM.from_config(made)


def llama() -> nn.Module:
    return hugging_face("LlamaConfig", **zoo.LLAMA)


def gpt2() -> nn.Module:
    return hugging_face("GPT2Config", n_embd=32, n_layer=2, n_head=4, n_positions=64)


def mixtral() -> nn.Module:
    return hugging_face("MixtralConfig", **zoo.LLAMA, num_local_experts=4, num_experts_per_tok=2)


MODELS: dict[str, Callable[[], nn.Module]] = {"plain": Plain, "own": Own, "llama": llama, "gpt2": gpt2}
MIXTURES: dict[str, Callable[[], nn.Module]] = {"mixtral": mixtral}


def inputs(name: str) -> dict[str, Tensor]:
    if name in ("plain", "own"):
        return {"x": torch.zeros(4, dtype=torch.long) if name == "plain" else torch.ones(4, 8)}
    return dict.fromkeys(("input_ids", "labels"), torch.ones(2, 8, dtype=torch.long))


def on_one_device(name: str) -> nn.Module:
    torch.manual_seed(SEED)
    model = (MODELS | MIXTURES)[name]()
    torch.manual_seed(SEED)
    if name == "plain":
        for module in model.modules():
            getattr(module, "reset_parameters", lambda: None)()
    elif name == "own":
        model.init_weights()
    return model


def from_meta(rank: int, name: str, plan: str) -> tuple[dict[str, Tensor], float, bool]:
    """The filled model's state, a loss, and whether the caller's generator was left alone."""
    with torch.device("meta"):
        model = (MODELS | MIXTURES)[name]()
    module = fxpar.parallelize(model, plan, inputs(name))
    before = torch.get_rng_state()
    module.init_weights(SEED)
    alone = torch.equal(before, torch.get_rng_state())
    state = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in module.state_dict().items()}
    out = module.eval()(**inputs(name))
    return state, getattr(out, "loss", out).item(), alone


def check(name: str, state: dict[str, Tensor], loss: float, alone: bool) -> None:
    model = on_one_device(name).eval()
    want = model.state_dict()
    assert alone and list(state) == list(want)
    for key, value in want.items():
        assert torch.equal(state[key], value), key
    out = model(**inputs(name))
    assert loss == pytest.approx(getattr(out, "loss", out).item(), rel=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_one_rank_draws_what_one_device_draws(name):
    check(name, *from_meta(0, name, "dp=1"))


@pytest.mark.multiproc
@pytest.mark.parametrize("name", ["own", pytest.param("llama", marks=pytest.mark.slow)])
def test_tensor_parallel_ranks_draw_what_one_device_draws(name):
    for answer in launch(2, from_meta, name, "tp=2"):
        check(name, *answer)


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.parametrize("plan", ["dp=2,tp=2,ep=4", "dp=4,ep=2,zero=3"])
def test_ranks_that_share_experts_draw_what_one_device_draws(plan):
    for answer in launch(4, from_meta, "mixtral", plan):
        check("mixtral", *answer)


@pytest.mark.slow
def test_only_one_full_parameter_is_made_at_a_time(monkeypatch):
    """The first value of a parameter is dropped before the next one is made."""
    from fxpar.run import initialize

    alive, most = [0], [0]
    play = initialize._Tape.play

    class Counted:
        def __init__(self) -> None:
            alive[0] += 1
            most[0] = max(most[0], alive[0])

        def __del__(self) -> None:
            alive[0] -= 1

    def counted(tape, parameter):
        value = play(tape, parameter)
        value.counted = Counted()
        return value

    monkeypatch.setattr(initialize._Tape, "play", counted)
    from_meta(0, "llama", "dp=1")
    assert most[0] <= 2  # the new one is made while the name of the old one still holds it


@pytest.mark.parametrize("fill", [lambda p: None, lambda p: p.data.mul_(2), lambda p: p.data[0].zero_()],
                         ids=["untouched", "scaled", "in part"])  # fmt: skip
def test_a_parameter_that_nothing_fills_is_named(fill):
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(8))

        def reset_parameters(self) -> None:
            fill(self.scale)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    with torch.device("meta"):
        model = Scaled()
    module = fxpar.parallelize(model, "dp=1", (torch.ones(2, 8),))
    with pytest.raises(ValueError, match="does not fill parameter scale"):
        module.init_weights(SEED)


def test_what_only_a_constructor_sets_is_kept():
    """A temperature and a class token, which no initialisation draws again."""
    import transformers

    from fxpar.run import initialize

    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(text_config={**tower, "vocab_size": 64}, projection_dim=8,
                                     vision_config={**tower, "image_size": 8, "patch_size": 4})  # fmt: skip
    torch.manual_seed(SEED)
    model = transformers.CLIPModel(config)
    torch.manual_seed(SEED)
    tape = initialize._Tape()
    fresh = dict(initialize._initialize(model, tape).named_parameters())
    for name, p in model.named_parameters():
        assert torch.equal(tape.play(fresh[name]), p), name


def test_a_buffer_that_nothing_fills_is_named():
    class Buffered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.register_buffer("table", torch.arange(8.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) + self.table

    with torch.device("meta"):
        model = Buffered()
    module = fxpar.parallelize(model, "dp=1", (torch.ones(2, 8),))
    with pytest.raises(ValueError, match="buffer table is on the meta device"):
        module.init_weights(SEED)


def test_a_model_that_was_never_filled_is_an_error():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    module = fxpar.parallelize(model, "dp=1", (torch.ones(2, 4),))
    with pytest.raises(fxpar.InputError, match=r"made on the meta device and has no values yet: .*init_weights\(seed\)"):
        module(torch.ones(2, 4))
    module.init_weights(0)
    assert module(torch.ones(2, 4)).isfinite().all()


def test_a_model_that_is_filled_by_hand_is_no_error():
    with torch.device("meta"):
        model = nn.Linear(4, 4)
    module = fxpar.parallelize(model, "dp=1", (torch.ones(2, 4),))
    with torch.no_grad():
        for p in module.parameters():
            p.to_local().fill_(1.0)
    assert module(torch.ones(2, 4)).eq(5).all()
