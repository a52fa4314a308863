"""Plans: what they refuse and what they then suggest, their text, Megatron's flags."""

import dataclasses
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxpar.errors import CaptureError, FxparError, PlanError, UnsupportedOperator
from fxpar.plan import Plan
from fxpar.plan import plan as plans_
from fxpar.sharding import mesh as meshes

# model: GPUs, tp, pp, cp, ep, dp
PRODUCTION = {
    "Llama-3 8B": (8, 1, 1, 2, 1, 4),
    "Llama-3 70B": (64, 4, 4, 2, 1, 2),
    "Llama-3.1 405B": (1024, 8, 8, 2, 1, 8),
    "GPT-3 175B, small": (128, 4, 8, 1, 1, 4),
    "GPT-3 175B, large": (512, 4, 8, 1, 1, 16),
    "Mixtral 8x7B": (64, 1, 4, 1, 8, 16),
    "Mixtral 8x22B": (256, 4, 4, 1, 8, 16),
    "DeepSeek-V3": (1024, 2, 16, 1, 64, 32),
}


def refused(make, field, suggestion, *mentions):
    """Runs `make`; its PlanError must name the field and the value, suggest that, and mention those."""
    with pytest.raises(PlanError) as caught:
        make()
    error = caught.value
    assert (error.field, error.suggestion) == (field, suggestion)
    text = str(error)
    assert f"`{field}`={error.value!r}" in text and text.endswith(f"try {suggestion}" if suggestion else "")
    for mention in mentions:
        assert mention in text
    return error


# ---- plans alone ----


def test_defaults():
    plan = Plan()
    assert plan.world_size == 1 and str(plan) == "dp=1" and not plan.shards_sequence
    assert plan.recompute == "none" and plan.param_dtype is None and plan.overlap_grad_reduce


@pytest.mark.parametrize("world, tp, pp, cp, ep, dp", PRODUCTION.values(), ids=PRODUCTION)
def test_production_configurations(world, tp, pp, cp, ep, dp):
    plan = Plan(dp=dp, tp=tp, pp=pp, cp=cp, ep=ep)
    assert plan.world_size == math.prod(plan.degrees.values()) == world
    plan.check_world(world)
    flags = (
        f"--tensor-model-parallel-size {tp} --pipeline-model-parallel-size={pp} --context-parallel-size {cp}"
        f" --expert-model-parallel-size {ep} --sequence-parallel"
    )
    assert Plan.from_megatron(flags, world_size=world).degrees == plan.degrees


@pytest.mark.parametrize("field", ["dp", "tp", "pp", "cp", "ep", "dp_replicate", "microbatches", "virtual_stages"])
@pytest.mark.parametrize("value", [0, -2, True, 2.0, 2.5, math.nan, math.inf, "2", None, 1e300])
def test_counts_are_positive_integers(field, value):
    meant = 2 if value == 2.0 else 1  # 1e300 would be refused, too
    refused(lambda: Plan(**{field: value}), field, f"{field}={meant}", "positive integer")


@pytest.mark.parametrize(
    "fields, field, suggestion",
    [
        ({"dp": 4, "ep": 3}, "ep", "ep=2"),
        ({"dp": 2, "pp": 8, "ep": 8}, "ep", "ep=2"),  # pp does not carry experts
        ({"dp": 6, "dp_replicate": 4}, "dp_replicate", "dp_replicate=3"),
        ({"dp": 1, "ep": 10**30}, "ep", "ep=1"),
        ({"tp": 2, "ep": 2, "sequence_parallel": False}, "sequence_parallel", "sequence_parallel=true"),
        ({"pp": 2, "virtual_stages": 2}, "virtual_stages", "virtual_stages=1, or schedule=interleaved1f1b"),
        ({"pp": 2, "virtual_stages": 2, "schedule": "gpipe"}, "virtual_stages", "virtual_stages=1, or schedule=interleaved1f1b"),
        ({"pp": 2, "schedule": "interleaved1f1b"}, "virtual_stages", "virtual_stages=2, or schedule=1f1b"),
        ({"pp": 2, "schedule": "zbv"}, "virtual_stages", "virtual_stages=2, or schedule=zb1p"),
        ({"pp": 2, "schedule": "zbv", "virtual_stages": 3}, "virtual_stages", "virtual_stages=2, or schedule=zb1p"),
        ({"schedule": "gpipe"}, "schedule", "schedule=1f1b, or pp=2"),
        ({"virtual_stages": 2}, "virtual_stages", "virtual_stages=1, or pp=2"),
        ({"stage_boundaries": ("a",)}, "stage_boundaries", "stage_boundaries=none, or pp=2"),
        ({"zero": 5}, "zero", "zero=3"),
        ({"zero": -1}, "zero", "zero=0"),
        ({"zero": True}, "zero", "zero=0"),
        ({"zero": "optim_grad"}, "zero", "zero=optim_grads"),
        ({"sequence_parallel": 1}, "sequence_parallel", "sequence_parallel=true"),
        ({"overlap_grad_reduce": None}, "overlap_grad_reduce", "overlap_grad_reduce=true"),
        ({"cp_comm": "all_gather"}, "cp_comm", "cp_comm=allgather"),
        ({"pp": 2, "virtual_stages": 2, "schedule": "interleaved"}, "schedule", "schedule=interleaved1f1b"),
        ({"ep_dispatch": 3}, "ep_dispatch", "ep_dispatch=alltoall"),
        ({"outputs": "losses"}, "outputs", "outputs=loss"),
        ({"recompute": "some"}, "recompute", "recompute=full"),
        ({"recompute": 0}, "recompute", "recompute=full"),
        ({"recompute": 1.5}, "recompute", "recompute=full"),
        ({"recompute": math.nan}, "recompute", "recompute=full"),
        ({"recompute": True}, "recompute", "recompute=full"),
        ({"param_dtype": torch.int8}, "param_dtype", "param_dtype=bfloat16"),
        ({"reduce_dtype": "float23"}, "reduce_dtype", "reduce_dtype=float32"),
        ({"batch_dims": {"x": -1}}, "batch_dims", "batch_dims=input_ids:0"),
        ({"batch_dims": {"x;y": 1}}, "batch_dims", "batch_dims=input_ids:0"),
        ({"batch_dims": {0: 1}}, "batch_dims", "batch_dims=input_ids:0"),
        ({"batch_dims": (("x", 1), ("x", 0))}, "batch_dims", "batch_dims=input_ids:0"),
        ({"batch_dims": 1}, "batch_dims", "batch_dims=input_ids:0"),
        ({"batch_dims": [("x", [])]}, "batch_dims", "batch_dims=input_ids:0"),
        ({"pp": 3, "stage_boundaries": ("a", "b", "c")}, "stage_boundaries", "stage_boundaries=none"),
        ({"pp": 3, "stage_boundaries": ["a", "a"]}, "stage_boundaries", "stage_boundaries=none"),
        ({"pp": 2, "stage_boundaries": ["none"]}, "stage_boundaries", "stage_boundaries=none"),
        ({"pp": 3, "stage_boundaries": ["a", "b c"]}, "stage_boundaries", "stage_boundaries=none"),
        ({"pp": 3, "stage_boundaries": 2}, "stage_boundaries", "stage_boundaries=none"),
        ({"roles": {"head.weight": "vocab"}}, "roles", "roles=lm_head.weight[0]:vocab"),
        ({"roles": {"head.weight[-1]": "vocab"}}, "roles", "roles=lm_head.weight[0]:vocab"),
        ({"roles": {"head.weight[0]": 3}}, "roles", "roles=lm_head.weight[0]:vocab"),
    ],
)
def test_refusals_name_the_field_and_suggest_what_works(fields, field, suggestion):
    error = refused(lambda: Plan(**fields), field, suggestion)
    value = suggestion.partition("=")[2].partition(", or")[0]
    Plan(**{**fields, field: int(value) if value.isdigit() else value == "true" or value})
    assert error.value == fields.get(field, 1) or error.value is fields[field]


def test_values_are_normalised():
    assert Plan(zero="optim_grads_params") == Plan(zero=3)
    assert Plan(param_dtype="bf16", reduce_dtype="torch.float32") == Plan(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32
    )
    assert Plan(recompute=1).recompute == 1.0 and isinstance(Plan(recompute=1).recompute, float)
    assert Plan(pp=2, schedule="GPipe").schedule == "gpipe"
    plan = Plan(batch_dims={"tgt": 1, "mask": None, "src": 1}, roles={"head.weight[0]": "none"})
    assert plan.batch_dims == (("mask", None), ("src", 1), ("tgt", 1))
    assert plan.roles == (("head.weight[0]", None),)


def test_sequence_parallel_follows_tp_unless_told():
    assert Plan(tp=2).shards_sequence
    assert not Plan(tp=2, sequence_parallel=False).shards_sequence
    assert not Plan(sequence_parallel=True).shards_sequence
    assert dataclasses.replace(Plan(), tp=2).shards_sequence
    assert Plan(tp=2, dp=2, ep=4).shards_sequence


def test_a_fraction_is_a_memory_budget():
    assert Plan(recompute=0.25).memory_budget == 0.25 and Plan(recompute=1).memory_budget == 1.0
    assert Plan(recompute="full").memory_budget is None and Plan().memory_budget is None


def test_plans_are_values():
    plan = Plan(dp=2, batch_dims={"src": 1}, roles={"w[0]": None}, param_dtype="bf16")
    again = Plan(dp=2, batch_dims={"src": 1}, roles={"w[0]": None}, param_dtype=torch.bfloat16)
    assert {plan: 1}[again] == 1
    assert dataclasses.replace(plan, dp=4).batch_dims == plan.batch_dims
    assert pickle.loads(pickle.dumps(plan)) == plan
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.dp = 3


# ---- against the world and this version ----


def test_check_world_says_which_dp_works():
    plan = Plan(dp=2, tp=2)
    plan.check_world(4)
    refused(lambda: plan.check_world(8), "dp", "dp=4", "world size 8", "here 4")
    refused(lambda: plan.check_world(7), "dp", "launching 4 ranks", "world size 7")
    refused(lambda: plan.check_world(0), "world_size", "world_size=1")
    refused(lambda: plan.check_world(1), "dp", "launching 4 ranks")
    refused(lambda: Plan(dp=4, ep=4).check_world(6), "dp", "launching 4 ranks")  # dp=6 contradicts ep=4


def test_require_supported():
    Plan(
        dp=2, tp=2, sequence_parallel=False, param_dtype="bf16", reduce_dtype="fp32", outputs="loss"
    ).require_supported()
    Plan(microbatches=4, batch_dims={"x": 1}, roles={"w[0]": "ffn"}).require_supported()
    for zero, recompute in [(1, "selective"), (2, "full"), (3, 0.5)]:
        Plan(dp=4, dp_replicate=2, zero=zero, recompute=recompute).require_supported()
    for comm in ("p2p", "allgather", "a2a", "a2a+p2p"):
        Plan(dp=2, cp=4, cp_comm=comm, zero=3).require_supported()


def test_require_supported_refuses(monkeypatch):
    monkeypatch.setitem(plans_._ONLY_YET, "dp_replicate", 1)
    refused(Plan(dp=2, dp_replicate=2).require_supported, "dp_replicate", "dp_replicate=1", "not available in this version yet")


def test_who_says_nothing_of_the_overlap_of_tensor_parallelism(monkeypatch):
    for auto in (False, True):
        monkeypatch.setattr(plans_, "AUTO_TP_OVERLAP", auto)
        told = ("tp=2", "tp=2,tp_comm_overlap=true", "tp=2,tp_comm_overlap=false", "dp=2", "tp=2,sequence_parallel=false",
                "tp=2,sequence_parallel=false,tp_comm_overlap=true")
        assert [Plan.parse(t).overlaps_tp for t in told] == [auto, True, False, False, False, False]
        assert [str(Plan.parse(t)) for t in told] == list(told)


# ---- text ----

names = st.text(st.characters(exclude_characters=",;:=[]", exclude_categories=["Z", "C"]), min_size=1, max_size=6)
dtypes = st.none() | st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64])


@st.composite
def plans(draw):
    dp, tp, cp = (draw(st.integers(1, 12)) for _ in range(3))
    divisors = [d for d in range(1, dp * tp * cp + 1) if dp * tp * cp % d == 0]
    ep = draw(st.sampled_from(divisors))
    sequence = [None, True] if ep > 1 and tp > 1 else [None, True, False]
    switches = {
        name: draw(st.booleans()) for name in ("overlap_grad_reduce", "overlap_param_gather")
    } | {"tp_comm_overlap": draw(st.sampled_from([None, True, False]))}
    budget = st.floats(0, 1, exclude_min=True)
    params = st.tuples(names, st.integers(0, 3)).map(lambda pair: f"{pair[0]}[{pair[1]}]")
    pp = draw(st.integers(1, 9))
    stages = draw(st.integers(1, 4)) if pp > 1 else 1
    schedules = {1: ["gpipe", "1f1b", "zb1p"], 2: ["interleaved1f1b", "zb1p", "zbv"]}.get(stages, ["interleaved1f1b", "zb1p"])
    schedules = schedules if pp > 1 else ["1f1b"]
    later = pp * stages - 1
    return Plan(
        **switches, dp=dp, tp=tp, cp=cp, ep=ep, pp=pp, zero=draw(st.integers(0, 3)),
        dp_replicate=draw(st.sampled_from([d for d in divisors if dp % d == 0])),
        sequence_parallel=draw(st.sampled_from(sequence)),
        cp_comm=draw(st.sampled_from(["p2p", "allgather", "a2a", "a2a+p2p"])),
        microbatches=draw(st.integers(1, 99)),
        virtual_stages=stages, schedule=draw(st.sampled_from(schedules)),
        stage_boundaries=draw(st.just([]) | st.lists(names, min_size=later, max_size=later, unique=True)),
        ep_dispatch=draw(st.sampled_from(["alltoall", "allgather"])),
        recompute=draw(st.sampled_from(["none", "selective", "full"]) | budget),
        param_dtype=draw(dtypes), reduce_dtype=draw(dtypes), outputs=draw(st.sampled_from(["all", "loss"])),
        batch_dims=draw(st.dictionaries(names, st.none() | st.integers(0, 5), max_size=3)),
        roles=draw(st.dictionaries(params, st.none() | names, max_size=3)),
    )  # fmt: skip


@given(plans())
def test_text_round_trips(plan):
    assert Plan.parse(str(plan)) == plan
    assert eval(repr(plan)) == plan


@given(
    st.text(max_size=20)
    | st.lists(st.sampled_from(["dp", "zero", "roles", "=", ",", ":", ";", "[0]", "1", "nan", " "])).map("".join)
)
def test_any_text_is_a_plan_or_a_plan_error(text):
    try:
        plan = Plan.parse(text)
    except PlanError:
        return
    assert Plan.parse(str(plan)) == plan


@pytest.mark.parametrize(
    "text, plan, shown",
    [
        ("tp=2, dp=2", Plan(dp=2, tp=2), "dp=2,tp=2"),
        ("zero=optim", Plan(zero=1), "zero=1"),
        ("tp=2,sequence_parallel=false", Plan(tp=2, sequence_parallel=False), "tp=2,sequence_parallel=false"),
        ("param_dtype=bf16", Plan(param_dtype=torch.bfloat16), "param_dtype=bfloat16"),
        ("recompute=0.5", Plan(recompute=0.5), "recompute=0.5"),
        ("recompute=none,param_dtype=none,sequence_parallel=none,roles=none", Plan(), "dp=1"),
        ("batch_dims=tgt:none;src:1", Plan(batch_dims={"src": 1, "tgt": None}), "batch_dims=src:1;tgt:none"),
        ("roles=head.weight[0]:vocab", Plan(roles={"head.weight[0]": "vocab"}), "roles=head.weight[0]:vocab"),
        ("pp=3, stage_boundaries=h.4; h.8", Plan(pp=3, stage_boundaries=["h.4", "h.8"]), "pp=3,stage_boundaries=h.4;h.8"),
        ("pp=2,stage_boundaries=0", Plan(pp=2, stage_boundaries=("0",)), "pp=2,stage_boundaries=0"),
        ("pp=2,stage_boundaries=none", Plan(pp=2), "pp=2"),
    ],
)
def test_parse_and_show(text, plan, shown):
    assert Plan.parse(text) == plan and str(plan) == shown


@pytest.mark.parametrize(
    "text, field, suggestion",
    [
        ("dp=2,zeros=3", "zeros", "zero=3"),
        ("banana=3", "banana", "dp=1"),
        ("", "", "dp=1"),
        ("dp=2,", "", "dp=1"),
        ("tp", "tp", "tp=1"),
        ("tp=2,dp=2,tp=4", "tp", "tp=4"),
        ("dp=two", "dp", "dp=1"),
        ("dp=inf", "dp", "dp=1"),
        ("dp=none", "dp", "dp=1"),
        ("batch_dims=x:1;x:0", "batch_dims", "batch_dims=input_ids:0"),
        ("batch_dims=x", "batch_dims", "batch_dims=input_ids:0"),
    ],
)
def test_parse_refuses(text, field, suggestion):
    refused(lambda: Plan.parse(text), field, suggestion)


def test_unknown_field_lists_all_fields():
    error = refused(lambda: Plan.parse("banana=3"), "banana", "dp=1")
    assert all(field.name in error.requirement for field in dataclasses.fields(Plan))


# ---- Megatron's flags ----


@pytest.mark.parametrize(
    "flags, world, plan",
    [
        ("", None, "dp=1"),
        ("--tensor-model-parallel-size 4 --sequence-parallel", 8, "dp=2,tp=4,sequence_parallel=true"),
        ("--tensor-model-parallel-size=4", 4, "tp=4,sequence_parallel=false"),  # off in Megatron unless told
        ("--use-distributed-optimizer", 2, "dp=2,zero=1"),
        ("--data-parallel-sharding-strategy optim_grads", 2, "dp=2,zero=2"),
        ("--data-parallel-sharding-strategy no_shard --use-distributed-optimizer", 2, "dp=2,zero=1"),
        ("--use-megatron-fsdp --use-distributed-optimizer", 2, "dp=2,zero=3"),
        ("--use-megatron-fsdp --data-parallel-sharding-strategy optim_grads", 2, "dp=2,zero=2"),
        (
            "--use-distributed-optimizer --num-distributed-optimizer-instances 2",
            4,
            "dp=4,zero=1,dp_replicate=2",
        ),
        (
            "--pipeline-model-parallel-size 4 --num-layers 80 --num-layers-per-virtual-pipeline-stage 5",
            8,
            "dp=2,pp=4,schedule=interleaved1f1b,virtual_stages=4",
        ),
        (
            "--pipeline-model-parallel-size 4 --num-layers 80 --num-layers-per-virtual-pipeline-stage 20",
            4,
            "pp=4",
        ),
        (
            "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2",
            2,
            "pp=2,schedule=interleaved1f1b,virtual_stages=2",
        ),
        ("--context-parallel-size 2 --cp-comm-type a2a a2a", 2, "cp=2,cp_comm=a2a"),
        (
            "--expert-model-parallel-size 8 --num-experts 64 --moe-grouped-gemm"
            " --expert-tensor-parallel-size 1 --moe-token-dispatcher-type allgather",
            8,
            "dp=8,ep=8,ep_dispatch=allgather",
        ),
        ("--micro-batch-size 2 --global-batch-size 64", 4, "dp=4,microbatches=8"),
        ("--overlap-grad-reduce --overlap-param-gather --tp-comm-overlap", 2, "dp=2,tp_comm_overlap=true"),
        ("--recompute-activations", 1, "recompute=selective"),
        (
            "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
            1,
            "recompute=full",
        ),
        ("--bf16", 1, "param_dtype=bfloat16,reduce_dtype=float32"),
        ("--bf16 --grad-reduce-in-bf16", 1, "param_dtype=bfloat16,reduce_dtype=bfloat16"),
        ("--fp16", 1, "param_dtype=float16"),
        ("--accumulate-allreduce-grads-in-fp32", 1, "reduce_dtype=float32"),
        ("--tensor-model-parallel-size 2 \\\n  --sequence-parallel", 2, "tp=2,sequence_parallel=true"),
    ],
)
def test_from_megatron(flags, world, plan):
    assert str(Plan.from_megatron(flags, world_size=world)) == plan


def test_from_megatron_takes_words():
    assert Plan.from_megatron(["--tensor-model-parallel-size", 2, "--sequence-parallel"]).tp == 2


@pytest.mark.parametrize(
    "flags, world, field, suggestion",
    [
        ("--tensor-parallel-size 2", 2, "--tensor-parallel-size", "--tensor-model-parallel-size"),
        ("--bananas", 2, "--bananas", None),
        ("4 --bf16", 2, "args", None),
        ("--bf16 '", 2, "args", None),
        ("--bf16 true", 2, "--bf16", "--bf16"),
        ("--bf16 --bf16", 2, "--bf16", None),
        ("--bf16 --fp16", 2, "--fp16", "--bf16"),
        ("--context-parallel-size", 2, "--context-parallel-size", None),
        ("--context-parallel-size two", 2, "--context-parallel-size", "--context-parallel-size 1"),
        ("--context-parallel-size=-2", 2, "--context-parallel-size", "--context-parallel-size 1"),
        ("--context-parallel-size 2 2", 2, "--context-parallel-size", None),
        ("--context-parallel-size 2 --cp-comm-type p2p a2a", 2, "--cp-comm-type", "--cp-comm-type p2p"),
        ("--cp-comm-type ring", 2, "cp_comm", "cp_comm=p2p"),
        ("--context-parallel-size 4", 6, "world_size", "world_size=8"),
        ("--context-parallel-size 4", True, "world_size", "world_size=4"),
        ("--expert-model-parallel-size 4", None, "world_size", None),
        ("--expert-model-parallel-size 4 --num-experts 6", 4, "--num-experts", "--num-experts 8"),
        (
            "--expert-tensor-parallel-size 2",
            4,
            "--expert-tensor-parallel-size",
            "--expert-tensor-parallel-size 1",
        ),
        (
            "--tensor-model-parallel-size 2 --expert-model-parallel-size 2",
            2,
            "sequence_parallel",
            "sequence_parallel=true",
        ),
        (
            "--num-layers-per-virtual-pipeline-stage 2",
            1,
            "--num-layers-per-virtual-pipeline-stage",
            "--num-layers 2",
        ),
        (
            "--num-layers 12 --pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage 2",
            4,
            "--num-layers-per-virtual-pipeline-stage",
            "--num-layers-per-virtual-pipeline-stage 3",
        ),
        ("--global-batch-size 8", 2, "--global-batch-size", "--micro-batch-size 1"),
        ("--micro-batch-size 3 --global-batch-size 8", 2, "--global-batch-size", "--global-batch-size 12"),
        (
            "--data-parallel-sharding-strategy all",
            2,
            "--data-parallel-sharding-strategy",
            "--data-parallel-sharding-strategy no_shard",
        ),
        ("--recompute-granularity some", 2, "--recompute-granularity", "--recompute-granularity full"),
        ("--recompute-method block", 2, "--recompute-method", "--recompute-method uniform"),
        (
            "--accumulate-allreduce-grads-in-fp32 --grad-reduce-in-bf16",
            2,
            "--accumulate-allreduce-grads-in-fp32",
            "--accumulate-allreduce-grads-in-fp32",
        ),
    ],
)
def test_from_megatron_refuses(flags, world, field, suggestion):
    refused(lambda: Plan.from_megatron(flags, world_size=world), field, suggestion)


# ---- errors ----


def test_plan_error_text():
    error = PlanError("tp", 3, "must divide the 8 kv heads", "tp=2")
    assert str(error) == "plan field `tp`=3: must divide the 8 kv heads; try tp=2"
    assert isinstance(error, FxparError) and isinstance(error, ValueError)


@pytest.mark.parametrize(
    "error",
    [
        PlanError("tp", 3, "must divide 8", "tp=2"),
        CaptureError("a branch on data", "model.py:12", "use torch.where"),
        UnsupportedOperator(what="aten.foo.default", way_out="register a rule"),
    ],
)
def test_errors_cross_processes(error):
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error) and str(copy) == str(error) and vars(copy) == vars(error)


def test_source_errors_say_where_and_the_way_out():
    error = CaptureError("a branch on data", "model.py:12", "use torch.where")
    assert str(error) == "cannot capture a branch on data (at model.py:12); use torch.where"
    error = UnsupportedOperator("aten.foo.default")
    assert str(error) == "no sharding rule for operator aten.foo.default" and error.op == "aten.foo.default"


# ---- the mesh of a plan ----


def test_a_mesh_has_the_axes_of_every_strategy():
    mesh = meshes.from_plan(Plan.parse("dp=4,dp_replicate=2,zero=3,tp=4"))
    assert (mesh.axes("dp"), mesh.axes("zero"), mesh.axes("tp")) == (("dp_replicate", "dp_shard"), ("dp_shard",), ("tp",))
    assert mesh.size("dp_replicate", "tp") == 8 and mesh.size() == 1
    assert meshes.from_plan(Plan(tp=2)).axes("dp") == ()


def test_an_unknown_strategy_or_axis_is_an_error():
    mesh = meshes.from_plan(Plan(dp=2, tp=2))
    with pytest.raises(KeyError, match="no strategy 'tensor'; there are dp, cp, ring, a2a, tp, zero"):
        mesh.axes("tensor")
    with pytest.raises(KeyError, match="no axis 'tp0' in a mesh of dp=2 x tp=2"):
        mesh.size("tp0")


def test_an_axis_that_is_split_is_split_in_every_strategy():
    mesh = meshes.from_plan(Plan(dp=4, tp=2, zero=3)).split("dp", (2, 2))
    assert mesh.axes("dp") == mesh.axes("zero") == ("dp0", "dp1") and mesh.names == ("dp0", "dp1", "tp")


@pytest.mark.parametrize("zero, says", [(0, (False, False, False)), (1, (True, False, False)), (2, (True, True, False)),
                                        (3, (True, True, True))])  # fmt: skip
def test_what_a_level_of_zero_means(zero, says):
    plan = Plan(dp=2, zero=zero)
    assert (plan.stores_parts, plan.reduces_each_backward, plan.gathers_each_use) == says
