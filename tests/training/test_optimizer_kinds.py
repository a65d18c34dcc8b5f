"""Optimizers beside AdamW: those with weights of their own for training, and those that do not fit."""

import copy
import functools

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
    [("LBFGS", "several times"), ("SparseAdam", "sparse gradients")],
)
def test_unsuitable_optimizers(name, reason, place, tmp_path, capsys):
    line = refused(capsys, "fit", settings(place, tmp_path, f"torch.optim.{name}"))
    assert f"model.optimizer {name}" in line and reason in line and "torch.optim.AdamW" in line


def test_the_state_of_such_an_optimizer_is_measured():
    assert optim.bytes_per_parameter(Averaged, torch.float32) == 4


MUON = {"model__optimizer__init_args__adjust_lr_fn": "match_rms_adamw"}


def two_matrices():
    """A hidden matrix, an embedding and a bias, with gradients from a seed."""
    torch.manual_seed(0)
    shapes = {"hidden": (6, 4), "embedding": (8, 4), "bias": (4,)}
    parameters = {name: torch.nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)
    return parameters


def test_muon_trains_hidden_matrices_and_adamw_the_rest():
    ours, alone = two_matrices(), two_matrices()
    groups = optim.parameter_groups(ours.items())
    make = functools.partial(torch.optim.Muon, lr=1e-2, weight_decay=0.2)
    optimizer = optim.build(make, groups, torch.float32, {id(ours["embedding"])})
    muon = make([alone["hidden"]])
    adamw = torch.optim.AdamW(
        [{"params": [alone["embedding"]]}, {"params": [alone["bias"]], "weight_decay": 0.0}],
        lr=1e-2,
        weight_decay=0.2,
    )
    for _ in range(3):
        optimizer.step()
        muon.step()
        adamw.step()
    for name, parameter in alone.items():
        assert torch.equal(parameter, ours[name]), name
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2] * 3


def test_muon_goes_on_from_its_state():
    ours, other = two_matrices(), two_matrices()
    make = functools.partial(torch.optim.Muon, lr=1e-2)
    first, second = (
        optim.build(
            make, optim.parameter_groups(each.items()), torch.float32, {id(each["embedding"])}
        )
        for each in (ours, other)
    )
    first.step()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for name, parameter in ours.items():
        other[name].data.copy_(parameter.data)
    for group in second.param_groups:
        group["lr"] = 1e-3
    for group in first.param_groups:
        group["lr"] = 1e-3
    first.step()
    second.step()
    for name, parameter in ours.items():
        assert torch.equal(parameter, other[name]), name
    assert {state.keys() == {"momentum_buffer"} for state in second.state.values()} == {True, False}


def test_a_resumed_run_of_muon_is_the_same(place, tmp_path):
    kind = "torch.optim.Muon"
    run("fit", settings(place, tmp_path / "whole", kind, trainer__max_epochs=2, **MUON))
    run("fit", settings(place, tmp_path / "parts", kind, **MUON))
    more = settings(place, tmp_path / "parts", kind, trainer__max_epochs=2, **MUON)
    run("fit", [*more, f"--ckpt_path={last(tmp_path / 'parts')}"])
    whole, parts = (final_weights(tmp_path / name) for name in ("whole", "parts"))
    assert all(torch.equal(weight, parts[name]) for name, weight in whole.items())
    state = read_checkpoint(last(tmp_path / "whole"))["optimizer_states"][0]
    assert any("momentum_buffer" in values for values in state["state"].values())
    assert any("exp_avg" in values for values in state["state"].values())
