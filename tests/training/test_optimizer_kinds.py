"""Optimizers beside AdamW: those with weights of their own for training, and those that do not fit."""

import pytest
import torch
from running import arguments, chat_rows, final_weights, read_checkpoint, run, version, write_rows
from terminal import refused
from tiny import save_tiny

from lit_sft.training import optim


class Averaged(torch.optim.SGD):
    """Trains y and evaluates the average x of all y, as schedule-free optimizers do."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr=lr)
        for group in self.param_groups:
            group |= {"training": False, "steps": 0}

    def _exchange(self, training):
        for group in self.param_groups:
            if group["training"] == training:
                continue
            group["training"] = training
            for parameter in group["params"]:
                if "other" in self.state[parameter]:
                    other = self.state[parameter]["other"]
                    self.state[parameter]["other"] = parameter.detach().clone()
                    parameter.data.copy_(other)

    def train(self):
        self._exchange(True)

    def eval(self):
        self._exchange(False)

    def step(self, closure=None):
        assert all(group["training"] for group in self.param_groups)
        loss = super().step(closure)
        for group in self.param_groups:
            group["steps"] += 1
            for parameter in group["params"]:
                state = self.state[parameter]
                average = state.get("other", parameter.detach().clone())
                state["other"] = average.lerp(parameter.detach(), 1 / group["steps"])
        return loss


@pytest.fixture
def place(tmp_path):
    rows = write_rows(tmp_path / "train.jsonl", chat_rows(16))
    return save_tiny(tmp_path / "model"), rows


def settings(place, root, class_path, **more):
    optimizer = {"class_path": class_path, "init_args": {"lr": 1e-2}}
    # Under another schedule, more epochs would change the rates of the first.
    options = {"model__lr_schedule__type": "constant", "model__lr_schedule__warmup_steps": 0}
    options |= {"data__global_batch_size": 4, "data__questions": [], "model__optimizer": optimizer}
    return arguments(*place, root, **(options | more))


def last(root):
    return version(root) / "checkpoints" / "last.ckpt"


AVERAGED = "test_optimizer_kinds.Averaged"


@pytest.mark.parametrize("class_path", [AVERAGED, "schedulefree.AdamWScheduleFree"])
def test_saves_hold_the_evaluation_weights(class_path, place, tmp_path):
    pytest.importorskip(class_path.partition(".")[0])
    run("fit", settings(place, tmp_path, class_path))
    groups = read_checkpoint(last(tmp_path))["optimizer_states"][0]["param_groups"]
    key = "training" if "training" in groups[0] else "train_mode"
    assert [group[key] for group in groups] == [False] * len(groups)


def test_a_resumed_run_is_the_same(place, tmp_path):
    run("fit", settings(place, tmp_path / "whole", AVERAGED, trainer__max_epochs=2))
    run("fit", settings(place, tmp_path / "parts", AVERAGED))
    more = settings(place, tmp_path / "parts", AVERAGED, trainer__max_epochs=2)
    run("fit", [*more, f"--ckpt_path={last(tmp_path / 'parts')}"])
    whole, parts = (final_weights(tmp_path / name) for name in ("whole", "parts"))
    assert all(torch.equal(weight, parts[name]) for name, weight in whole.items())


@pytest.mark.parametrize(
    ("name", "reason"),
    [("LBFGS", "several times"), ("Muon", "matrices only"), ("SparseAdam", "sparse gradients")],
)
def test_unsuitable_optimizers(name, reason, place, tmp_path, capsys):
    line = refused(capsys, "fit", settings(place, tmp_path, f"torch.optim.{name}"))
    assert f"model.optimizer {name}" in line and reason in line and "torch.optim.AdamW" in line


def test_the_state_of_such_an_optimizer_is_measured():
    assert optim.bytes_per_parameter(Averaged, torch.float32) == 4
