"""What programs do with a parallel module besides steps: generation, saving, copies, full state dicts, wrappers."""

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Shard, init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import LlamaConfig, LlamaForCausalLM

import fxpar
from fxpar import InputError, MismatchError, PlanError
from fxpar.run.outputs import Output, as_output
from tests.processes import launch


class Net(nn.Module):
    def __init__(self, loss=True):
        super().__init__()
        self.up, self.norm, self.down, self.head = nn.Linear(8, 32), nn.LayerNorm(8), nn.Linear(32, 8), nn.Linear(8, 4)
        self.blocks = nn.Sequential(self.up, nn.GELU(), self.down)
        self.register_buffer("scale", torch.ones(8))
        self.loss = loss

    def encode(self, x: Tensor) -> Tensor:
        return self.norm(x + self.blocks(x)) * self.scale

    def classes(self) -> int:
        return self.head.out_features

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        logits = self.head(self.encode(x))
        return F.cross_entropy(logits.flatten(0, 1), y.flatten()) if y is not None else logits


def close(a: Tensor, b: Tensor) -> bool:
    return ((a - b).norm() <= 1e-5 * b.norm() + 1e-6).item()


class Pair:
    """A plain module, the same as a parallel one, and rows for both."""

    def __init__(self, text: str):
        torch.manual_seed(0)
        self.plan = fxpar.Plan.parse(text)
        self.plain, self.x, self.y = Net(), torch.randn(4, 6, 8), torch.randint(4, (4, 6))
        self.module = fxpar.parallelize(copy.deepcopy(self.plain), self.plan, tuple(self.rows(0)))

    def rows(self, replica: int) -> list[Tensor]:
        return [t.chunk(self.plan.dp)[replica] for t in (self.x, self.y)]

    def mine(self) -> list[Tensor]:
        return self.rows(self.module.replica)

    def agree(self) -> bool:
        if not all(close(p.full_tensor(), self.plain.get_parameter(n)) for n, p in self.module.named_parameters()):
            return False
        return self.plan.pp > 1 or close(self.module(*self.mine()), self.plain(self.x, self.y))


def is_there_for_a_while(rank: int, pair: Pair) -> None:
    module, plain, x = pair.module, pair.plain, pair.x
    with module.gathered() as model:
        assert type(model) is Net and close(model.encode(x), plain.encode(x)) and close(module.encode(x), plain.encode(x))
        assert all(type(p) is nn.Parameter for p in model.parameters())
        assert all(map(torch.equal, model.parameters(), plain.parameters()))
        with pytest.raises(InputError, match="call the plain model"):
            module(*pair.mine())
        with pytest.raises(InputError, match="gathered already"), module.gathered():
            pass
        with torch.no_grad():
            model.head.weight.zero_()
            model.scale.zero_()
    assert pair.agree() and close(module.scale, plain.scale)
    with module.gathered(rank0_only=True, offload="cpu") as model:
        assert (model is not None) == (rank == 0)
        assert rank > 0 or all(map(torch.equal, model.state_dict().values(), plain.state_dict().values()))
    with module.gathered("head") as part:
        assert type(part) is nn.Linear and torch.equal(part.weight, plain.head.weight)
        assert isinstance(module.up.weight, DTensor)


def keeps_what_rank_0_wrote(rank: int, pair: Pair) -> None:
    module, plain = pair.module, pair.plain
    with module.gathered(module.head, write_back=True) as head, torch.no_grad():
        head.weight.add_(1 + rank)
        head.bias.requires_grad_(False)
        plain.head.weight.add_(1)
    assert pair.agree() and not dict(module.named_parameters()).get("head.bias", plain.up.weight.detach()).requires_grad
    with module.gathered(rank0_only=True, write_back=True) as model, torch.no_grad():
        if model is not None:
            model.up.weight.mul_(2)
            model.scale.mul_(3)
        plain.up.weight.mul_(2)
        plain.scale.mul_(3)
    assert pair.agree() and torch.equal(module.scale, plain.scale)
    module.requires_grad_(True)


def ends_on_all_ranks(rank: int, pair: Pair) -> None:
    module = pair.module
    with pytest.raises(ValueError if rank == 1 else MismatchError, match="boom"), module.gathered() as model:
        with torch.no_grad():
            model.head.weight.zero_()
        if rank == 1:
            raise ValueError("boom")
    with pytest.raises(InputError, match=r"'extra\.weight' was put into the model.*write_back=True"), module.gathered() as model:
        model.extra = nn.Linear(2, 2)
    assert pair.agree() and not hasattr(module, "extra")
    with pytest.raises(MismatchError, match="put different parameters"), module.gathered(write_back=True) as model:
        model.extra = nn.Linear(2 + rank, 2)
    assert pair.agree() and not hasattr(module, "extra")


def says_what_needs_it_whole(rank: int, pair: Pair) -> None:
    module = pair.module
    with pytest.raises(InputError, match=r"Net\.encode mixes plain tensors.*with module\.gathered\(\) as model: model\.encode"):
        module.encode(pair.x)
    assert module.classes() == 4
    for _ in range(2):
        with pytest.raises(InputError, match=r"Net\.norm mixes plain tensors.*with module\.gathered\(\) as model: model\.norm\("):
            module.norm(pair.x)
        with pytest.raises(InputError, match=r"Net\.blocks mixes plain tensors.*model\.blocks\(.*"):
            module.blocks(pair.x)
        assert torch.equal(module.blocks[1](pair.x), F.gelu(pair.x)) and pair.agree()
    with module.gathered() as model:
        assert close(model.blocks(pair.x), pair.plain.blocks(pair.x)) and close(module.norm(pair.x), pair.plain.norm(pair.x))
    with pytest.raises(InputError, match=r"Net\.norm mixes"):
        copy.deepcopy(module).norm(pair.x)


def takes_full_state_dicts(rank: int, pair: Pair) -> None:
    other = {n: t + 0.5 for n, t in pair.plain.state_dict().items()}
    pair.module.load_state_dict(other)
    pair.plain.load_state_dict(other)
    assert pair.agree()
    with pytest.raises(RuntimeError, match=r"size mismatch for head\.bias"):
        pair.module.load_state_dict({**other, "head.bias": torch.ones(3)})
    pair.module.load_state_dict(pair.module.state_dict())
    assert pair.agree()


def writes_what_is_put_into_data(rank: int, pair: Pair) -> None:
    for model in (pair.module, pair.plain):
        for p in model.parameters():
            p.data = p.data * 2
    assert pair.agree()
    whole, flat = pair.plain.up.weight.detach(), nn.utils.parameters_to_vector(pair.plain.parameters())
    for put in (lambda: setattr(pair.module.up.weight, "data", whole),
                lambda: nn.utils.vector_to_parameters(flat, pair.module.parameters())):
        with pytest.raises(InputError, match=r"put into `\.data` of a parameter of .*load_state_dict"):
            put()
    assert pair.agree()


def averages_weights(rank: int, pair: Pair) -> None:
    pairs = [(pair.module, pair.mine()), (pair.plain, [pair.x, pair.y])]
    averages = [AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.5)) for m, _ in pairs]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.5) for m, _ in pairs]
    for _ in range(2):
        for (model, rows), average, optimizer in zip(pairs, averages, optimizers, strict=True):
            optimizer.zero_grad()
            model(*rows).backward()
            optimizer.step()
            average.update_parameters(model)
        assert close(averages[0](*pair.mine()), averages[1](pair.x, pair.y)) and pair.agree()
        with torch.no_grad():
            assert close(averages[0](*pair.mine()), averages[1](pair.x, pair.y))
    assert not close(averages[0](*pair.mine()), pair.module(*pair.mine()))


def has_gradients_of_penalties(rank: int, pair: Pair) -> None:
    numbers = []
    for model, rows in ((pair.module, pair.mine()), (pair.plain, [pair.x, pair.y])):
        model.zero_grad()
        loss = model(*rows) + 0.1 * sum(p.pow(2).sum() for p in model.parameters()) + model.down.weight.norm(dim=1).sum()
        loss.backward()
        numbers.append([loss.item(), float(loss.detach() + 0), float(f"{loss:.6e}")])
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-5)
    for p, q in zip(pair.module.parameters(), pair.plain.parameters(), strict=True):
        assert close(p.grad.full_tensor(), q.grad)


def has_numbers_of_parameters(rank: int, pair: Pair) -> None:
    """Whatever is made of parameters, and added up, and put beside plain numbers."""
    makers = (lambda p: p.sum(), lambda p: p.abs().mean(), lambda p: p.norm(), lambda p: p.norm(3) ** 3, lambda p: p.max(),
              lambda p: p.min(), lambda p: (p > 0).sum(), lambda p: p.std(), lambda p: p.isnan().any(), lambda p: p.flatten()[-1],
              lambda p: (p * p).sum().sqrt(), lambda p: p.norm(dim=0).sum(), lambda p: p.norm(dim=-1).sum(),
              lambda p: (p * 2).square().mean() + torch.tensor(0.5), lambda p: torch.stack([p.norm(), -p.max()]).sum())
    pair.module.load_state_dict(pair.plain.state_dict())
    for number, make in enumerate(makers):
        have, want = ([make(p.detach()) for p in m.parameters()] for m in (pair.module, pair.plain))
        for a, b in zip([*have, sum(map(Tensor.float, have))], [*want, sum(map(Tensor.float, want))], strict=True):
            assert a.item() == pytest.approx(b.item(), rel=1e-5, abs=1e-6), number
            assert bool(a > b + 0.1) is bool(a + 0.1 < b) is False


def says_who_reads_a_number_alone(rank: int, pair: Pair) -> None:
    penalty = sum(p.pow(2).sum() for p in pair.module.parameters())
    if not any(place.is_partial() for place in penalty.placements):
        return
    with pytest.raises(MismatchError, match=r"rank 0 item\(\) of a sum over.*full_tensor\(\)`\), rank 1 "):
        if rank == 0:
            penalty.item()
        else:
            pair.module(*pair.mine())
    assert pair.agree()


def meets_plain_labels(rank: int, pair: Pair) -> None:
    plain, x, y = copy.deepcopy(pair.plain), pair.x, pair.y
    plain.zero_grad()
    module = fxpar.parallelize(copy.deepcopy(plain), fxpar.Plan(tp=2, roles={"head.weight[0]": "vocab"}), (x,))
    for model in (module, plain):
        logits = model(x)
        F.cross_entropy(logits[:, :-1].reshape(-1, 4), y[:, 1:].reshape(-1)).backward()
    assert isinstance(module(x), Output) and module(x).placements == (Shard(2),)
    assert all(close(p.grad.full_tensor(), q.grad) for p, q in zip(module.parameters(), plain.parameters(), strict=True))
    with torch.no_grad():
        assert (module(x).argmax(-1) == y).float().mean() == (plain(x).argmax(-1) == y).float().mean()
        assert module(x).softmax(-1).max().item() == pytest.approx(plain(x).softmax(-1).max().item())
    whole = fxpar.parallelize(copy.deepcopy(plain), fxpar.Plan(tp=2, outputs="whole", roles={"head.weight[0]": "vocab"}), (x,))
    assert type(whole(x)) is Tensor and close(whole(x), plain(x))
    whole(x).square().mean().backward()
    plain.zero_grad()
    plain(x).square().mean().backward()
    assert all(close(p.grad.full_tensor(), q.grad) for p, q in zip(whole.parameters(), plain.parameters(), strict=True))


CHECKS = (is_there_for_a_while, keeps_what_rank_0_wrote, ends_on_all_ranks, says_what_needs_it_whole, takes_full_state_dicts,
          writes_what_is_put_into_data, averages_weights, has_gradients_of_penalties, says_who_reads_a_number_alone)
UNDER_TP = (*CHECKS, meets_plain_labels)
SLOW = (*CHECKS, has_numbers_of_parameters)


def checks(rank, text, names):
    pair = Pair(text)
    for check in dict.fromkeys((*UNDER_TP, *SLOW)):
        if check.__name__ in names:
            check(rank, pair)


def names_of(*checks):
    return [check.__name__ for check in checks]


def test_a_module_besides_its_steps():
    launch(2, checks, "tp=2", names_of(*UNDER_TP))


@pytest.mark.slow
@pytest.mark.parametrize("text", ["tp=2", "dp=2", "dp=2,zero=1", "dp=2,zero=3"])
def test_a_module_besides_its_steps_under_other_plans(text):
    launch(2, checks, text, names_of(*SLOW))


@pytest.mark.slow
def test_a_pipeline_besides_its_steps():
    launch(2, checks, "pp=2,microbatches=2", names_of(keeps_what_rank_0_wrote))


def hugging_face(rank, text, tied, folder):
    torch.manual_seed(0)
    plan = fxpar.Plan.parse(text)
    plain = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                                         num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied, use_cache=False))
    ids = torch.randint(70, (4, 8))
    few = ids.clamp(max=63)
    module = fxpar.parallelize(copy.deepcopy(plain), plan, {n: few.chunk(plan.dp)[0] for n in ("input_ids", "labels")})
    for name in ("generate", "save_pretrained", "resize_token_embeddings"):
        with pytest.raises(InputError, match=rf"LlamaForCausalLM\.{name} cannot run.*with module\.gathered\(\)"):
            getattr(module, name)(few)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    with module.gathered() as model:
        assert torch.equal(model.generate(few[:, :4], **options), plain.generate(few[:, :4], **options))
    with module.gathered(rank0_only=True, offload="cpu") as model:
        if model is not None:
            model.save_pretrained(folder)
    back = LlamaForCausalLM.from_pretrained(folder)
    assert all(torch.equal(p, back.get_parameter(n)) for n, p in plain.named_parameters())
    torch.manual_seed(5 + rank)
    with module.gathered(write_back=True) as model:
        model.resize_token_embeddings(70, mean_resizing=False)
    torch.manual_seed(5)
    plain.resize_token_embeddings(70, mean_resizing=False)
    assert torch.equal(module.model.embed_tokens.weight.full_tensor(), plain.model.embed_tokens.weight)
    mine = ids.chunk(plan.dp)[module.replica]
    have, want = module(input_ids=mine, labels=mine).loss, plain(input_ids=ids, labels=ids).loss
    have.backward()
    want.backward()
    assert close(have, want)
    assert all(close(p.grad.full_tensor(), plain.get_parameter(n).grad) for n, p in module.named_parameters())
    torch.optim.AdamW(module.parameters()).step()
    assert module(input_ids=mine, labels=mine).loss < have


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("text", ["tp=2", "dp=2,zero=3"])
def test_a_hugging_face_model_generates_is_saved_and_resized(text, tied, tmp_path):
    launch(2, hugging_face, text, tied, str(tmp_path))


# ---- outputs ----


def test_an_output_is_gathered_where_it_meets_plain_tensors(one_rank):
    x = torch.randn(4, 6, requires_grad=True)
    out = as_output(DTensor.from_local(x * 2, init_device_mesh("cpu", (1,)), [Shard(1)], run_check=False))
    assert isinstance(out[:, 1:] + out[:, 1:], Output) and isinstance(out, DTensor)
    assert type(out * torch.ones(6)) is Tensor and type(out.full_tensor()) is Tensor
    assert out.tolist() == (x * 2).tolist() and out.detach().numpy().shape == (4, 6) and float(out.sum()) == float((2 * x).sum())
    (out[:, 1:] * torch.ones(5)).sum().backward()
    assert torch.equal(x.grad, 2 * torch.ones(4, 6) * (torch.arange(6) > 0))
    ones = torch.ones(6)
    for write in (lambda t: t.mul_(ones), lambda t: t.__setitem__(0, ones), lambda t: t.__iadd__(ones)):
        with pytest.raises(InputError, match=r"output = output\.full_tensor\(\)"):
            write(out.detach())
    assert torch.equal(torch.zeros(4, 6).copy_(out), 2 * x)


# ---- what is refused, and what a module looks like ----


def of_one_rank() -> fxpar.ParallelModule:
    return fxpar.parallelize(Net(), "dp=1", (torch.randn(2, 6, 8), torch.randint(4, (2, 6))))


def test_what_a_module_looks_like_to_others(tmp_path):
    module = of_one_rank()
    for wrap in (DistributedDataParallel, fully_shard, FullyShardedDataParallel):
        for whole in (module, nn.Sequential(module)):
            with pytest.raises(PlanError, match=r"is parallel already.*fxpar\.integrations"):
                wrap(whole)
        with pytest.raises(PlanError, match=r"Net\.up of a ParallelModule'.* is parallel already"):
            wrap(module.up)
    with pytest.raises(InputError, match=r"torch\.export or torch\.jit\.trace.*gathered\(rank0_only=True\)"):
        torch.export.export(module, (torch.randn(2, 6, 8),))
    with pytest.raises(InputError, match=r"inside of torch\.func.*gathered\(\)"):
        torch.vmap(lambda x: module(x[None]))(torch.randn(2, 6, 8))
    with pytest.raises(InputError, match=r"inside of torch\.func"):
        torch.func.grad(lambda x: module(x).sum())(torch.randn(2, 6, 8))
    with pytest.raises(InputError, match=r"share_memory\(\) was called.*gathered\(rank0_only=True\)"):
        module.share_memory()
    with pytest.raises(InputError, match=r"fxpar\.save_checkpoint.*gathered\(rank0_only=True"):
        torch.save(module, tmp_path / "x")
    assert inspect.signature(module.forward) == inspect.signature(Net().forward)
    assert module.accepts_loss_kwargs is False  # a loss is that of all replicas: trainers need not multiply it by their number


def test_parts_are_plain_modules_where_they_are_whole(tmp_path):
    module = of_one_rank()
    with module.gathered() as model:
        torch.save(model.blocks, tmp_path / "blocks")
        assert "named_modules" not in vars(model.blocks)
    assert b"fxpar" not in (tmp_path / "blocks").read_bytes()
    copied = copy.deepcopy(module.blocks)
    assert [name for name, _ in copied.named_modules()] == ["", "0", "1", "2"]
    assert next(copied.modules()) is copied and next(module.blocks.modules()) is module.blocks


class OfModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Penalised()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_what_is_compiled_around_a_module_leaves_it_as_it_is():
    x, counter = torch.randn(2, 8), CompileCounter()
    module = fxpar.parallelize(OfModule(), "dp=1", (x,))
    want = module(x)
    for compiled, times in ((torch.compile(module, backend=counter), 1),
                            (torch.compile(lambda x: module(x) * 2, backend=counter), 2)):
        loss = compiled(x)
        loss.backward()
        assert torch.equal(loss, times * want)
    step = torch.compile(lambda: (module.train_step(x), module.clip_grad_norm_(1.0)), backend=counter)
    assert torch.equal(step()[0], want.detach())
    assert counter.op_count <= 1  # the product
    with pytest.raises(InputError, match=r"OfModule\.inner mixes plain tensors.*gathered\(\) as model: model\.inner"):
        torch.compile(module.inner, backend=counter)(x)


def test_a_copy_is_a_module_of_its_own():
    module, (x, y) = of_one_rank(), (torch.randn(2, 6, 8), torch.randint(4, (2, 6)))
    before = module(x, y)
    other = copy.deepcopy(module)
    with pytest.raises(InputError, match="was not called yet"):
        other.report()
    with torch.no_grad():
        other.head.weight.mul_(2)
    assert torch.equal(module(x, y), before) and not torch.equal(other(x, y), before)
    assert other.report().plan == module.plan


class Penalised(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x))).square().mean()


def test_nan_is_looked_for():
    x = torch.randn(4, 8)
    module = fxpar.parallelize(Penalised(), "dp=1", (x,))
    with torch.autograd.detect_anomaly():
        module(x).backward()
        with pytest.raises(RuntimeError, match="returned nan"):
            (module(x) * float("nan")).backward()


def test_second_derivatives_that_are_none_are_refused():
    x = torch.randn(4, 8, requires_grad=True)
    module = fxpar.parallelize(Penalised(), "dp=1", (x,))
    torch.autograd.grad(module(x), x, create_graph=True)[0].square().sum().backward()
    with pytest.raises(InputError, match="second derivative with respect to parameters"):
        module(x).backward(create_graph=True)
    again = fxpar.parallelize(Penalised(), "dp=1,recompute=full", (x,))
    with pytest.raises(InputError, match=r"second derivative of Penalised.*recompute=none"):
        torch.autograd.grad(again(x), x, create_graph=True)


@pytest.mark.parametrize("kind", [torch.optim.Adafactor, torch.optim.LBFGS, torch.optim.Rprop])
def test_optimizers_of_parts_of_parameters_are_refused(one_rank, kind):
    mesh = init_device_mesh("cpu", (1,))
    of_one_rank()
    for place, refused in ((Shard(0), True), (None, False)):
        local = torch.randn(4, 4)
        p = nn.Parameter(local if place is None else DTensor.from_local(local, mesh, [place], run_check=False))
        p.grad = torch.ones_like(p)
        optimizer = kind([p])
        closure = [lambda p=p: p.sum()] if kind is torch.optim.LBFGS else []
        if refused:
            with pytest.raises(InputError, match=rf"{kind.__name__} cannot step.*AdamW"):
                optimizer.step(*closure)
        else:
            optimizer.step(*closure)


def test_the_adafactor_of_transformers_is_refused(one_rank):
    from transformers import Adafactor

    with pytest.raises(InputError, match=r"transformers\.optimization\.Adafactor mixes plain tensors.*AdamW"):
        Adafactor(of_one_rank().parameters()).step()
    p = nn.Parameter(torch.ones(4, 4))
    p.grad = torch.ones(4, 4)
    Adafactor([p]).step()
    assert not torch.equal(p, torch.ones(4, 4))
