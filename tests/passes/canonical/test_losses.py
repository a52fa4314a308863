"""Losses across split classes and split tokens, as users spell them."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxpar
from fxpar.testing import assert_equivalent

VOCAB, HIDDEN, BATCH, SEQ = 24, 8, 8, 6


class Head(nn.Module):
    """An embedding, a head over the vocabulary, and a loss."""

    def __init__(self, loss, vocab=VOCAB):
        super().__init__()
        self.embed, self.head, self.loss = nn.Embedding(vocab, HIDDEN), nn.Linear(HIDDEN, vocab), loss
        self.register_buffer("weight", torch.rand(vocab) + 0.5)

    def forward(self, ids, labels):
        return self.loss(self.head(torch.tanh(self.embed(ids))), labels, self.weight)


def flat(logits, labels):
    return logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)


def shifted(logits, labels):
    labels = F.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    return F.cross_entropy(*flat(logits, labels))


def z_loss(logits, labels):
    z = torch.logsumexp(logits, -1)
    return F.cross_entropy(*flat(logits, labels)) + 1e-2 * (z**2).mean()


def by_hand(logits, labels):
    log_p = F.log_softmax(logits, -1)
    valid = labels != -100
    picked = log_p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return -(picked * valid).sum() / valid.sum()


def soft_targets(logits, labels):
    return F.cross_entropy(
        flat(logits, labels)[0], F.one_hot(labels.clamp(min=0), logits.shape[-1]).float().flatten(0, 1)
    )


LOSSES = {
    "plain": lambda x, y, w: F.cross_entropy(*flat(x, y)),
    "shifted": lambda x, y, w: shifted(x, y),
    "classes second": lambda x, y, w: F.cross_entropy(x.transpose(1, 2), y),
    "smoothed": lambda x, y, w: F.cross_entropy(*flat(x, y), label_smoothing=0.1),
    "weighted": lambda x, y, w: F.cross_entropy(*flat(x, y), weight=w),
    "weighted and smoothed": lambda x, y, w: F.cross_entropy(*flat(x, y), weight=w, label_smoothing=0.2),
    "sum": lambda x, y, w: F.cross_entropy(*flat(x, y), reduction="sum") / 100,
    "none": lambda x, y, w: F.cross_entropy(*flat(x, y), reduction="none").square().mean(),
    "nll": lambda x, y, w: F.nll_loss(F.log_softmax(flat(x, y)[0], -1), flat(x, y)[1]),
    "z-loss": lambda x, y, w: z_loss(x, y),
    "by hand": lambda x, y, w: by_hand(x, y),
    "soft targets": lambda x, y, w: soft_targets(x, y),
    "mse": lambda x, y, w: F.mse_loss(x, torch.zeros_like(x)),
    "kl": lambda x, y, w: F.kl_div(F.log_softmax(x, -1), torch.full_like(x, 1 / x.shape[-1]), reduction="batchmean"),
}


def batch(vocab=VOCAB):
    torch.manual_seed(0)
    labels = torch.randint(0, vocab, (BATCH, SEQ))
    labels[0] = -100  # the tokens that count differ from replica to replica
    labels[3, 2:] = -100
    return {"ids": torch.randint(0, vocab, (BATCH, SEQ)), "labels": labels}


@pytest.mark.parametrize("plan", ["dp=4", "tp=4", "dp=2,tp=2", "tp=2,sequence_parallel=false"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_that_of_the_global_batch(name, plan):
    assert_equivalent(Head(LOSSES[name]), plan, batch())


@pytest.mark.parametrize("plan", ["tp=2", "tp=4", "dp=2,tp=2"])
def test_a_vocabulary_that_does_not_divide_is_left_replicated_and_said_so(plan):
    model = Head(LOSSES["shifted"], vocab=27)
    assert_equivalent(model, plan, batch(27))
    assert any("vocab 27" in note for note in fxpar.inspect(model, plan, batch(27)).notes)


def test_classes_are_split_and_logits_never_gathered():
    report = fxpar.inspect(Head(LOSSES["shifted"]), "tp=2", batch())
    layouts = {p.name: p.layout for p in report.parameters}
    assert "vocab24/tp" in layouts["embed.weight"] and "vocab24/tp" in layouts["head.weight"]
    logits = BATCH * SEQ * VOCAB * 4
    assert all(row.bytes < logits for row in report.collectives if row.phase == "forward" and row.kind == "all_gather")


def test_the_same_dropout_under_any_plan():
    class Dropped(Head):
        def forward(self, ids, labels):
            x = F.dropout(self.embed(ids), 0.5, self.training)
            return self.loss(F.dropout(self.head(x), 0.1, self.training), labels, self.weight)

    model = Dropped(LOSSES["shifted"]).train()
    losses = [
        fxpar.simulate(model, plan, batch()).step(**batch(), seed=7).loss.item()
        for plan in ("dp=1", "dp=4", "tp=4", "dp=2,tp=2")
    ]
    assert max(losses) - min(losses) < 1e-6 * losses[0]
    assert abs(fxpar.simulate(model, "dp=1", batch()).step(**batch(), seed=8).loss.item() - losses[0]) > 1e-3


def out_of_range(which, value):
    """A batch with one label, or one token id, that may be none."""
    made = batch()
    made[which][1, 2] = value
    return made


OUT_OF_RANGE = [("ids", VOCAB), ("ids", -1), ("labels", VOCAB + 1000), ("labels", -7)]


@pytest.mark.parametrize("plan", ["dp=1", "dp=2", "tp=2", "dp=2,zero=3", "dp=2,tp=2"])
@pytest.mark.parametrize("lowered", [False, True])
@pytest.mark.parametrize("which, value", OUT_OF_RANGE)
def test_labels_and_ids_out_of_range_are_errors(which, value, lowered, plan):
    model = Head(LOSSES["weighted"])
    with pytest.raises(IndexError):
        model(**out_of_range(which, value))
    ranks = fxpar.simulate(model, plan, batch(), lowered=lowered)
    ranks.step(**batch())
    with pytest.raises((IndexError, RuntimeError), match=r"out of (range|bounds)"):
        ranks.step(**out_of_range(which, value))


@pytest.mark.parametrize("grad", [True, False])
def test_compiled_programs_check_labels_and_ids(grad):
    model = fxpar.parallelize(Head(LOSSES["shifted"]), "dp=1", batch(), backend="inductor")
    with torch.set_grad_enabled(grad):
        model(**batch())
        for which, value in OUT_OF_RANGE:
            with pytest.raises(RuntimeError, match="out of bounds"):
                model(**out_of_range(which, value))


ON_A_GPU = """
import fxpar, torch
from tests.passes.canonical.test_losses import LOSSES, Head, batch, out_of_range
cuda = lambda inputs: {name: t.cuda() for name, t in inputs.items()}
model = fxpar.parallelize(Head(LOSSES["shifted"]).cuda(), "dp=1", cuda(batch()), backend="%s")
model(**cuda(batch())).backward()
torch.cuda.synchronize()
print("right so far")
model(**cuda(out_of_range("%s", %d))).backward()
torch.cuda.synchronize()
"""


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("which, value", OUT_OF_RANGE)
def test_labels_and_ids_out_of_range_end_a_process_with_a_gpu(which, value, backend):
    """As in PyTorch, by an assertion of the kernel: the process cannot go on."""
    done = subprocess.run([sys.executable, "-c", ON_A_GPU % (backend, which, value)], capture_output=True, text=True, timeout=300)
    assert done.returncode and "right so far" in done.stdout and "device-side assert" in done.stderr, done.stdout + done.stderr


def test_the_only_label_that_is_ignored_is_the_one_asked_for():
    model = Head(lambda x, y, w: F.cross_entropy(*flat(x, y), ignore_index=VOCAB + 3))
    labels = batch()["labels"].clamp(min=0)
    labels[0, 0] = VOCAB + 3
    inputs = {"ids": batch()["ids"], "labels": labels}
    assert_equivalent(model, "tp=2", inputs)
    ranks = fxpar.simulate(model, "tp=2", inputs)
    with pytest.raises(IndexError, match=f"less than {VOCAB}"):
        ranks.step(**out_of_range("labels", -100))
