"""A training loop of one's own: evaluation, a moving average of the weights, and a run that is stopped and goes on.

    torchrun --nproc-per-node=2 examples/loop.py --check
    torchrun --nproc-per-node=4 examples/loop.py --plan dp=2,tp=2,zero=3 --check

NCCL where there are GPUs, gloo elsewhere. With --check the plain model trains without a stop.
"""

import copy
import itertools
import tempfile

import common
import torch
import torch.distributed as dist

import fxpar


class Batches:
    """Batches of a data set, shuffled anew in each epoch, that say where they are, as torchdata's StatefulDataLoader does."""

    def __init__(self, rows, size, sampler, device):
        self.rows, self.size, self.sampler, self.device = rows, size, sampler, device
        self.epoch = self.taken = 0

    def __iter__(self):
        while True:
            self.sampler.set_epoch(self.epoch)
            order = list(self.sampler)
            for start in range(self.taken * self.size, len(order), self.size):
                self.taken += 1
                batch = torch.utils.data.default_collate([self.rows[i] for i in order[start : start + self.size]])
                yield {name: t.to(self.device) for name, t in batch.items()}
            self.epoch, self.taken = self.epoch + 1, 0

    def state_dict(self):
        return dict(epoch=self.epoch, taken=self.taken)

    def load_state_dict(self, state):
        self.epoch, self.taken = state["epoch"], state["taken"]


class Run:
    """A model with all that trains it, as it is at the beginning, or where the newest checkpoint in `folder` left it."""

    def __init__(self, args, folder):
        rows, held_out = common.rows_of_text(80, 64)[:64], common.rows_of_text(80, 64)[64:]
        self.model, replica, count = common.tiny_llama().to(args.device), 0, 1
        if not args.alone:
            self.model = fxpar.parallelize(self.model, args.plan)
            replica, count = int(self.model.replica), self.model.replica.count
        sampler = torch.utils.data.DistributedSampler(rows, count, replica)  # fxpar.sampler(rows, self.model)
        in_order = torch.utils.data.DistributedSampler(held_out, count, replica, shuffle=False)
        self.batches = Batches(rows, 8 // count, sampler, args.device)
        self.held_out = Batches(held_out, 8 // count, in_order, args.device)
        self.average = copy.deepcopy(self.model)
        self.opt = torch.optim.AdamW(self.model.parameters(), lr=args.lr)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.opt, args.steps)
        self.step, self.manager = 0, None
        if not args.alone:
            self.manager = fxpar.CheckpointManager(folder, self.model, self.opt, scheduler=self.scheduler, loader=self.batches)
            self.averages = fxpar.CheckpointManager(folder + "/average", self.average)
            self.step = self.manager.restore().step
            if self.step:
                self.averages.restore(self.step)

    def train(self, until):
        losses = []
        for batch in itertools.islice(self.batches, until - self.step):
            loss = self.model(**batch).loss
            loss.backward()
            if self.manager:
                self.model.clip_grad_norm_(1.0)
            else:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.opt.step()
            self.scheduler.step()
            self.opt.zero_grad()
            with torch.no_grad():
                for mean, p in zip(self.average.parameters(), self.model.parameters()):
                    mean.lerp_(p, 0.1)
            self.step += 1
            losses.append(loss.item())
            common.say(f"step {self.step}  loss {losses[-1]:.4f}")
        return losses

    def save(self):
        self.averages.save(self.step)
        self.manager.save(self.step)

    @torch.no_grad()
    def evaluate(self, model):
        model.eval()
        losses = [model(**batch).loss.item() for batch in itertools.islice(self.held_out, 2)]
        model.train()
        return sum(losses) / len(losses)


def train(args):
    """The loss of every step, and those of the evaluation: of the model, and of the average."""
    folder = [None]
    if not args.alone:
        folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(folder)
    run, losses = Run(args, folder[0]), []
    if not args.alone:
        losses += run.train(args.steps // 2)
        run.save()
        run.train(args.steps // 2 + 2)  # and here it is killed
        run = Run(args, folder[0])
        common.say(f"goes on from step {run.step}")
    losses += run.train(args.steps)
    return [*losses, run.evaluate(run.model), run.evaluate(run.average)]


if __name__ == "__main__":
    common.run(train, common.arguments(__doc__, "dp=2", lr=3e-3, steps=12))
